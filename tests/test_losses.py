"""losses.py: golden numbers, the shift by one, gradients, parity with torch and TRL, refusals.

The golden numbers belong to four candidates of lengths 7, 6, 8 and 5 behind a prompt of 3 tokens,
with logits pi(i, t, v) = 2 sin(0.7 i + 1.3 t + 2.1 v + 0.5) over a vocabulary of 7.
"""

import inspect
import math
import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import losses

PROMPT, LENGTHS, VOCAB, IGNORE = 3, (7, 6, 8, 5), 7, -100
SUMS = [-5.8064740333, -8.7850893872, -12.7249884894, -3.7316307244]
MEANS = [-1.4516185083, -2.9283631291, -2.5449976979, -1.8658153622]


def golden_row(i, frequencies=(0.7, 1.3, 2.1, 0.5)):
    """Logits (T, V), ids (T,) and labels (T,) of candidate i."""
    a, b, c, d = frequencies
    t = torch.arange(LENGTHS[i], dtype=torch.float64)[:, None]
    v = torch.arange(VOCAB, dtype=torch.float64)
    ids = torch.tensor([(3 * i + 2 * t + 1) % VOCAB for t in range(LENGTHS[i])])
    labels = ids.clone()
    labels[:PROMPT] = IGNORE
    return 2 * torch.sin(a * i + b * t + c * v + d), ids, labels


def packed():
    """The four candidates end to end: logits (26, V), labels (26,), document of each (26,)."""
    rows = [golden_row(i) for i in range(4)]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    return torch.cat([row[0] for row in rows]), torch.cat([row[2] for row in rows]), documents


def padded(fill=0.0, **kind):
    """The four candidates as rows of 8: logits (4, 8, V), labels (4, 8)."""
    logits = torch.full((4, 8, VOCAB), fill, dtype=torch.float64)
    labels = torch.full((4, 8), IGNORE)
    for i, length in enumerate(LENGTHS):
        logits[i, :length], _, labels[i, :length] = golden_row(i, **kind)
    return logits, labels


def golden_logprobs():
    """Log-probabilities of the response tokens (14,) and the candidate of each (14,)."""
    logits, labels, documents = packed()
    rows, targets = losses.prediction_rows(labels)
    return losses.gathered_logprobs(logits[rows], targets), documents[rows]


def near(values):
    return pytest.approx(values, abs=1e-8, rel=0)


def cat_plan(rewards, **rule):
    """better, worse and weights of one group of responses, as cat_loss wants them."""
    better, worse = losses.best_vs_lower_pairs(rewards, **rule)
    top = sorted(set(better)) if rule.get("rule") != "all" else [rewards.index(max(rewards))]
    weights = [float(i in top) / len(top) for i in range(len(rewards))]
    return torch.tensor(better), torch.tensor(worse), torch.tensor(weights, dtype=torch.float64)


# ----- The shift -----

def test_prediction_rows_by_hand():
    rows, targets = losses.prediction_rows(torch.tensor([[IGNORE, 3, 4], [IGNORE, IGNORE, 2]]))
    assert rows.tolist() == [0, 1, 4] and targets.tolist() == [3, 4, 2]
    rows, targets = losses.prediction_rows(torch.tensor([IGNORE, 5, IGNORE, 6, 0]))
    assert rows.tolist() == [0, 2, 3] and targets.tolist() == [5, 6, 0]
    labels = torch.tensor([[-1, 3], [-1, -100]])
    rows, targets = losses.prediction_rows(labels, ignore_index=-1)
    assert rows.tolist() == [0, 2] and targets.tolist() == [3, -100]


def test_prediction_rows_follow_the_positions_that_come_before():
    labels = torch.tensor([IGNORE, IGNORE, 5, 6, 7])  # two responses behind one prompt
    rows, targets = losses.prediction_rows(labels, torch.tensor([-1, 0, 1, 2, 1]))
    assert rows.tolist() == [1, 2, 1] and targets.tolist() == [5, 6, 7]


@pytest.mark.parametrize("labels", [[[1, 2], [IGNORE, 2]], [[IGNORE, 2], [1, IGNORE]], [1, 2]])
def test_a_label_that_nothing_precedes_is_refused(labels):
    with pytest.raises(ValueError, match="first of 2 positions carries a label, but nothing prece"):
        losses.prediction_rows(torch.tensor(labels))


def test_labels_stay_as_they_were():
    logits, labels = padded()
    before = labels.clone()
    losses.cross_entropy(*losses.token_logprobs(logits, labels))
    losses.prediction_rows(labels)
    losses.cat_loss_from_logits(logits, labels, [(0, 1)])
    assert torch.equal(labels, before)


def test_token_logprobs_match_a_naive_loop():
    logits, labels = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    labels[torch.rand(3, 6) < 0.4] = IGNORE
    labels[:, 0] = IGNORE
    logprobs, mask = losses.token_logprobs(logits, labels)
    assert logprobs.shape == mask.shape == (3, 5) and mask.dtype == torch.bool
    for b in range(3):
        for t in range(1, 6):
            assert mask[b, t - 1] == (labels[b, t] != IGNORE)
            wanted = torch.tensor(0.0)
            if mask[b, t - 1]:
                wanted = logits[b, t - 1].softmax(-1)[labels[b, t]].log()
            torch.testing.assert_close(logprobs[b, t - 1], wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_cross_entropy_equals_torch_with_padding_and_packing(seed):
    torch.manual_seed(seed)
    lengths = torch.randint(2, 9, (4,)).tolist()
    rows = [(torch.randn(n, 13, dtype=torch.float64), torch.randint(0, 13, (n,))) for n in lengths]
    logits, labels = torch.zeros(4, 9, 13, dtype=torch.float64), torch.full((4, 9), IGNORE)
    for i, (own, ids) in enumerate(rows):
        ids[:torch.randint(1, len(ids) + 1, ())] = IGNORE
        start = i % 2 * (9 - len(ids))  # odd rows are padded on the left
        logits[i, start:start + len(ids)], labels[i, start:start + len(ids)] = own, ids
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                             ignore_index=IGNORE, reduction="sum")
    total, count = losses.cross_entropy(*losses.token_logprobs(logits, labels))
    at, targets = losses.prediction_rows(torch.cat([ids for _, ids in rows]))
    flat = losses.gathered_logprobs(torch.cat([own for own, _ in rows])[at], targets)
    assert count == flat.numel() == (labels != IGNORE).sum()
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(losses.cross_entropy(flat)[0], wanted)


@pytest.mark.parametrize("where", ["padding", "the dummy id 0"])
def test_what_stands_at_unlabelled_positions_does_not_matter(where):
    (clean, labels), (dirty, _) = padded(), padded(fill=float("nan"))
    if where != "padding":
        dirty = clean.clone()
        dirty[labels.roll(-1, 1) == IGNORE, 0] = -torch.inf
    for logits in (clean, dirty):
        logits.requires_grad_()
        losses.cat_loss_from_logits(logits, labels, [(0, 1)]).backward()
    assert torch.equal(clean.grad, dirty.grad) and not clean.grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logprobs_are_float32_or_better(dtype):
    logits, labels = padded()
    found = losses.token_logprobs(logits.to(dtype), labels)[0]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = losses.token_logprobs(logits.to(dtype).double(), labels)[0]
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=0)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    assert losses.gathered_logprobs(logits, torch.tensor([1])).item() == -1e4
    flat = losses.gathered_logprobs(torch.zeros(1, 3), torch.tensor([2]))
    assert flat.item() == pytest.approx(-math.log(3), abs=1e-6)


def test_ignore_index_is_that_of_the_data():
    for function in (losses.prediction_rows, losses.token_logprobs):
        assert inspect.signature(function).parameters["ignore_index"].default == data.IGNORE_INDEX


# ----- Golden numbers of likelihood and ranking -----

def test_golden_sequence_logprobs():
    logprobs, sequence_ids = golden_logprobs()
    sums, lengths = losses.sequence_logprobs(logprobs, sequence_ids, 4)
    assert sums.tolist() == near(SUMS) and (sums / lengths).tolist() == near(MEANS)
    assert lengths.tolist() == [4, 3, 5, 2]
    by_row, mask = losses.token_logprobs(*padded())
    torch.testing.assert_close(by_row.sum(1), sums, atol=1e-12, rtol=0)
    assert mask.sum(1).tolist() == [4, 3, 5, 2]


def test_golden_sft():
    logprobs, sequence_ids = golden_logprobs()
    total, count = losses.cross_entropy(logprobs)
    sums, lengths = losses.sequence_logprobs(logprobs, sequence_ids, 4)
    assert (total / count).item() == near(2.2177273310)
    assert -(sums / lengths).mean().item() == near(2.1976986744)


def test_golden_rrhf():
    logprobs, sequence_ids = golden_logprobs()
    terms = losses.cat_loss(logprobs, sequence_ids, *cat_plan([1, 3, 2, 0], rule="all"), lam=1.0)
    assert terms["rank"][0].item() == near(4.6952193440) and terms["rank"][1] == 6
    assert terms["ce"][0].item() == near(8.7850893872) and terms["ce"][1] == 3
    assert sum(term for term, _ in terms.values()).item() == near(13.4803087312)


def test_golden_cat():
    logprobs, sequence_ids = golden_logprobs()
    better, worse, weights = cat_plan([1, 2, 1, 0])
    assert (better.tolist(), worse.tolist()) == ([1, 1, 1], [0, 2, 3])
    terms = losses.cat_loss(logprobs, sequence_ids, better, worse, weights, lam=0.5)
    assert terms["rank"][0].item() == near(2.9226578189) and terms["rank"][1] == 3
    assert terms["ce"][0].item() == near(0.5 * 8.7850893872) and terms["ce"][1] == 3
    scores, hinges = torch.tensor(MEANS, dtype=torch.float64), []
    for k in range(3):
        loss, count = losses.pairwise_ranking_loss(scores, better[k:k + 1], worse[k:k + 1])
        hinges.append(loss.item())
        assert count == 1
    assert hinges == near([1.4767446208, 0.3833654312, 1.0625477669])


def test_margin_by_hand():
    scores = torch.tensor([-1.0, -1.2, -3.0], dtype=torch.float64)
    better, worse = torch.tensor([0, 0]), torch.tensor([1, 2])
    loss, count = losses.pairwise_ranking_loss(scores, better, worse, margin=0.5)
    assert loss.item() == near(0.3) and count == 2


@pytest.mark.parametrize("rewards, rule, pairs", [
    ([2, 0, 1, 2], "best", [(0, 1), (0, 2), (3, 1), (3, 2)]),
    ([2, 0, 1], "all", [(0, 1), (0, 2), (2, 1)]),
    ([1, 0, 0], "best", []),
    ([1, 1], "all", []),
    ([2, 2], "best", []),
    ([2, None, 0], "best", [(0, 2)]),
    ([None, 1], "all", []),
    ([], "best", []),
])
def test_pairs_by_hand(rewards, rule, pairs):
    found = losses.best_vs_lower_pairs(rewards, rule=rule)
    assert list(zip(*found, strict=True)) == pairs


def test_the_best_reward_may_be_another_number():
    assert losses.best_vs_lower_pairs([0.5, 0.9, 0.1], best=0.9) == ([1, 1], [0, 2])
    assert losses.best_vs_lower_pairs([2, 1, 0], best=1) == ([1], [2])


def test_unknown_pair_rule_is_refused():
    with pytest.raises(ValueError, match="unknown pair rule 'some'; use 'best' or 'all'"):
        losses.best_vs_lower_pairs([1, 2], rule="some")


def test_likelihood_is_the_mean_over_best_responses():
    logprobs, sequence_ids = golden_logprobs()
    terms = losses.cat_loss(logprobs, sequence_ids, *cat_plan([2, 2, 2, 1]), lam=1.5)
    assert terms["ce"][0].item() == near(-1.5 * sum(SUMS[:3]) / 3)
    assert float(terms["ce"][1]) == near((4 + 3 + 5) / 3)


def test_sums_and_counts_of_several_groups_add_up():
    logprobs, sequence_ids = golden_logprobs()
    better, worse = torch.tensor([1, 2]), torch.tensor([0, 3])
    both = losses.cat_loss(logprobs, sequence_ids, better, worse, torch.tensor([0., 1., 1., 0.]))
    first = sequence_ids < 2
    parts = [losses.cat_loss(logprobs[first], sequence_ids[first], better[:1], worse[:1],
                             torch.tensor([0.0, 1.0])),
             losses.cat_loss(logprobs[~first], sequence_ids[~first] - 2, better[1:] - 2,
                             worse[1:] - 2, torch.tensor([1.0, 0.0]))]
    for term in ("rank", "ce"):
        assert both[term][0].item() == near(sum(part[term][0].item() for part in parts))
        assert both[term][1] == sum(part[term][1] for part in parts)


# ----- Gradients and empty batches -----

@pytest.mark.parametrize("margin, lam", [(0.0, 1.0), (0.3, 0.5)])
def test_cat_gradients_against_finite_differences(margin, lam):
    logits, labels, documents = packed()
    rows, targets = losses.prediction_rows(labels)
    plan = torch.tensor([1, 2]), torch.tensor([0, 3]), torch.tensor([0.0, 1.0, 1.0, 0.0])

    def loss(logits):
        logprobs = losses.gathered_logprobs(logits[rows], targets)
        terms = losses.cat_loss(logprobs, documents[rows], *plan, margin=margin, lam=lam)
        return sum(total / count for total, count in terms.values())

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_token_logprob_gradients_against_finite_differences():
    logits, labels = padded()
    one = lambda x: losses.token_logprobs(x, labels)[0]  # noqa: E731
    assert torch.autograd.gradcheck(one, logits.requires_grad_())


def test_ties_have_no_gradient():
    scores = torch.tensor([-1.0, -1.0], requires_grad=True)
    losses.pairwise_ranking_loss(scores, torch.tensor([0]), torch.tensor([1]))[0].backward()
    assert scores.grad.tolist() == [0, 0]


def test_an_all_ignored_batch_is_zero_with_a_gradient():
    logits = torch.randn(2, 4, VOCAB, requires_grad=True)
    labels, none = torch.full((2, 4), IGNORE), torch.zeros(0, dtype=torch.long)
    logprobs, mask = losses.token_logprobs(logits, labels)
    rows, targets = losses.prediction_rows(labels)
    flat = losses.gathered_logprobs(logits.flatten(0, 1)[rows], targets)
    terms = losses.cat_loss(flat, none, none, none, torch.zeros(2))
    found = [losses.cross_entropy(logprobs, mask), losses.cross_entropy(flat), *terms.values()]
    assert [(total.item(), float(count)) for total, count in found] == [(0, 0)] * 4
    sum(total for total, _ in found).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


# ----- Unlikelihood and CUT -----

def golden_cut():
    """Logits of candidate 0's tokens: its own (with the judgment), candidate 1's (without)."""
    judged, ids, _ = golden_row(0)
    plain, targets = golden_row(1)[0], ids[PROMPT:]
    return judged[PROMPT - 1:-1], plain[PROMPT - 1:PROMPT - 1 + len(targets)], targets


def cut_terms(judged, plain, targets, *, detect_lam=1.1, **switches):
    """cut_loss of one bad response: its ALIGN_N and its MISALIGN sequence."""
    with_judgment = losses.gathered_logprobs(judged, targets)
    without = losses.gathered_logprobs(plain, targets)
    flagged = losses.inappropriate_tokens(with_judgment, without, detect_lam=detect_lam)
    return losses.cut_loss(
        torch.cat([with_judgment, without]), losses.complement_logprobs(plain, targets),
        torch.tensor([0] * len(targets) + [1] * len(targets)),
        torch.tensor([losses.ALIGN_N, losses.MISALIGN]), flagged, **switches)


@pytest.mark.parametrize("detect_lam, alpha, gamma, flagged, l1", [
    (1.1, 1, 0, [1, 1, 1, 0], 0.4272930751),
    (1.1, 0.5, 0, [1, 1, 1, 0], 0.3589349213),
    (1.1, 0.5, 1, [1, 1, 1, 0], 0.3190289312),
    (1.5, 0.25, 2, [1, 1, 0, 0], 0.5571892214),
])
def test_golden_cut(detect_lam, alpha, gamma, flagged, l1):
    judged, plain, targets = golden_cut()
    likely, unlikely = (losses.gathered_logprobs(x, targets) for x in (judged, plain))
    assert likely.exp().tolist() == pytest.approx(
        [.0746784, .3572816, .4455342, .2530424], abs=1e-7)
    assert unlikely.exp().tolist() == pytest.approx(
        [.0180993, .0995697, .3453913, .3127638], abs=1e-7)
    found = losses.inappropriate_tokens(likely, unlikely, detect_lam=detect_lam)
    assert found.tolist() == [bool(flag) for flag in flagged]
    terms = cut_terms(judged, plain, targets, detect_lam=detect_lam, alpha=alpha, gamma=gamma)
    assert terms["l1"][0].item() == near(l1) and terms["l2"][0].item() == near(1.4516185083)
    assert terms["l1"][1] == terms["l2"][1] == 1


@pytest.mark.parametrize("seed", range(4))
def test_cut_equals_its_own_arithmetic(seed):
    """Eq. 5-7, token by token in plain Python, for a random mixture of responses."""
    rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
    alpha, gamma, vocabulary = rng.uniform(0.2, 2), rng.choice([0.0, 1.0, 2.5]), 9
    logprobs, complements, ids, roles, flagged = [], [], [], [], []
    l1 = l2 = 0.0
    for _ in range(6):
        length, bad = rng.randint(1, 7), rng.random() < 0.6
        tables = torch.randn(2, length, vocabulary, dtype=torch.float64, generator=torch_rng)
        targets = torch.tensor([rng.randrange(vocabulary) for _ in range(length)])
        p, p_plain = tables.softmax(-1)[:, torch.arange(length), targets].tolist()
        l2 -= sum(map(math.log, p)) / length
        ids += [len(roles)] * length
        roles.append(losses.ALIGN_N if bad else losses.ALIGN_P)
        logprobs.append(losses.gathered_logprobs(tables[0], targets))
        if not bad:
            continue
        for with_judgment, without in zip(p, p_plain, strict=True):
            flagged.append(with_judgment > 1.1 * without)
            if flagged[-1]:
                l1 -= alpha * with_judgment**gamma * math.log(1 - without) / length
            else:
                l1 -= math.log(without) / length
        ids += [len(roles)] * length
        roles.append(losses.MISALIGN)
        logprobs.append(losses.gathered_logprobs(tables[1], targets))
        complements.append(losses.complement_logprobs(tables[1], targets))
    terms = losses.cut_loss(torch.cat(logprobs), torch.cat(complements), torch.tensor(ids),
                            torch.tensor(roles), torch.tensor(flagged), alpha=alpha, gamma=gamma)
    assert terms["l1"][0].item() == pytest.approx(l1, abs=1e-10)
    assert terms["l2"][0].item() == pytest.approx(l2, abs=1e-10)
    assert terms["l1"][1] == terms["l2"][1] == 6


def authors_cut(judged, plain, kinds, targets, *, alpha, threshold):
    """The published code's loss of a micro-batch, from its description in words.

    Rows A: the judged prompt, or the plain one of a good response; rows B: the plain prompt of the
    bad ones.
    """
    row_a = [x.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
             for x, ids in zip(judged, targets, strict=True)]
    l2 = -torch.cat(row_a).mean()
    bad = [i for i, kind in enumerate(kinds) if kind == "bad"]
    if not bad:
        return l2
    p_a, p_b = [], []
    for i in bad:
        p_a.append(judged[i].softmax(-1).gather(-1, targets[i][:, None]).squeeze(-1))
        p_b.append(plain[i].softmax(-1).gather(-1, targets[i][:, None]).squeeze(-1))
    p_a, p_b = torch.cat(p_a), torch.cat(p_b)
    ratio = (p_a / p_b).detach()
    one_minus = torch.where(1 - p_b == 0, (1 - p_b) + 1e-5, 1 - p_b)
    tokens = torch.where(ratio > threshold, alpha * one_minus.log(), p_b.log())
    return (-tokens.mean() + l2) / 2


@pytest.mark.parametrize("seed", range(6))
def test_cut_with_half_the_weight_of_every_token_is_the_authors_loss(seed):
    torch.manual_seed(seed)
    lengths = [5, 3, 6, 2]
    kinds = [["bad", "good", "bad", "good"], ["good"] * 4, ["bad"] * 4][seed % 3]
    judged = [torch.randn(n, 13, dtype=torch.float64, requires_grad=True) for n in lengths]
    plain = [torch.randn(n, 13, dtype=torch.float64, requires_grad=True) for n in lengths]
    targets = [torch.randint(0, 13, (n,)) for n in lengths]
    logprobs, ids, roles, complements, flagged = [], [], [], [], []
    for i, kind in enumerate(kinds):
        logprobs.append(losses.gathered_logprobs(judged[i], targets[i]))
        ids += [len(roles)] * lengths[i]
        roles.append(losses.ALIGN_N if kind == "bad" else losses.ALIGN_P)
        if kind == "bad":
            logprobs.append(losses.gathered_logprobs(plain[i], targets[i]))
            flagged.append(losses.inappropriate_tokens(logprobs[-2], logprobs[-1]))
            complements.append(losses.complement_logprobs(plain[i], targets[i]))
            ids += [len(roles)] * lengths[i]
            roles.append(losses.MISALIGN)
    none = torch.zeros(0, dtype=torch.float64)
    scale = torch.full((len(roles),), 0.5 if "bad" in kinds else 1.0, dtype=torch.float64)
    terms = losses.cut_loss(torch.cat(logprobs), torch.cat([none, *complements]),
                            torch.tensor(ids), torch.tensor(roles),
                            torch.cat([none.bool(), *flagged]), alpha=0.5, scale=scale)
    n_bad = sum(n for n, kind in zip(lengths, kinds, strict=True) if kind == "bad")
    ours = terms["l1"][0] / max(1, n_bad) + terms["l2"][0] / sum(lengths)
    theirs = authors_cut(judged, plain, kinds, targets, alpha=0.5, threshold=1.1)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    leaves = judged + [x for x, kind in zip(plain, kinds, strict=True) if kind == "bad"]
    slopes = torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)
    for mine, their in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, their, atol=1e-12, rtol=0)


def test_cut_gradients_against_finite_differences_and_none_through_the_mask():
    judged, plain, targets = golden_cut()

    def loss(judged, plain):
        terms = cut_terms(judged, plain, targets)
        return terms["l1"][0] + terms["l2"][0]

    leaves = judged.clone().requires_grad_(), plain.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)
    held = judged.clone().requires_grad_()
    cut_terms(held, plain.clone().requires_grad_(), targets, gamma=1.0)["l1"][0].backward()
    assert held.grad.abs().max() == 0  # L1 never reaches the judged forward pass


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("vocabulary", [2, 32000])
def test_complement_is_finite_with_gradient_p_up_to_margin_200(dtype, tolerance, vocabulary):
    for margin in (0.0, 1.0, 17.0, 80.0, 200.0):
        logits = torch.zeros(1, vocabulary, dtype=dtype)
        logits[0, 1] = margin
        logits.requires_grad_()
        value = losses.complement_logprobs(logits, torch.tensor([1]))
        value.sum().backward()
        others = math.log(vocabulary - 1)
        exact = others - (margin + math.log1p(math.exp(others - margin)))
        p = 1 / (1 + math.exp(others - margin))
        assert value.item() == pytest.approx(exact, rel=tolerance, abs=tolerance)
        assert logits.grad[0, 1].item() == pytest.approx(-p, abs=tolerance)


def test_the_published_clamp_is_theirs_and_forgets_what_the_model_is_surest_of():
    sure = torch.tensor([[0.0, 200.0]], dtype=torch.float64, requires_grad=True)
    value = losses.complement_logprobs(sure, torch.tensor([1]), clamp=1e-5)
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(1e-5)) and sure.grad.abs().max() == 0
    unsure, target = torch.randn(5, 7, dtype=torch.float64), torch.arange(5)
    clamped = losses.complement_logprobs(unsure, target, clamp=1e-5)
    torch.testing.assert_close(clamped, losses.complement_logprobs(unsure, target))


def test_complement_is_float32_for_half_precision():
    assert losses.complement_logprobs(torch.randn(2, 5).half(), torch.tensor([1, 2])).dtype == (
        torch.float32)


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_cut_at_the_extremes_is_finite(logit):
    logits = torch.zeros(3, 5)
    logits[:, 2] = logit
    logits.requires_grad_()
    terms = cut_terms(logits, logits * 1.0, torch.tensor([2, 2, 2]), detect_lam=0.9)
    (terms["l1"][0] + terms["l2"][0]).backward()
    assert torch.isfinite(terms["l1"][0]) and torch.isfinite(logits.grad).all()


def test_cut_without_tokens_or_without_bad_responses_is_zero():
    empty, no_ids = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.long)
    good = torch.tensor([losses.ALIGN_P])
    terms = losses.cut_loss(empty, empty, no_ids, good, torch.zeros(0, dtype=torch.bool))
    assert all(total.item() == 0 and count == 1 for total, count in terms.values())
    logprobs = torch.tensor([-1.0, -3.0])
    terms = losses.cut_loss(logprobs, empty, torch.tensor([0, 0]), good, empty.bool())
    assert terms["l1"][0].item() == 0 and terms["l2"][0].item() == 2


def test_cut_refuses_twins_of_another_length():
    roles = torch.tensor([losses.ALIGN_N, losses.MISALIGN])
    with pytest.raises(ValueError, match="2 tokens with the judgment, 1 without"):
        losses.cut_loss(-torch.ones(3), -torch.ones(1), torch.tensor([0, 0, 1]), roles,
                        torch.tensor([True]))


def test_detection_compares_with_the_ratio_and_the_floor():
    judged, plain = torch.tensor([0.5, 1e-4, 0.2]).log(), torch.tensor([0.1, 1e-6, 0.15]).log()
    find = losses.inappropriate_tokens
    assert find(judged, plain).tolist() == [True, True, True]
    assert find(judged, plain, floor=1e-3).tolist() == [True, False, True]
    assert find(judged, plain, detect_lam=1.5).tolist() == [True, True, False]
    assert not find(judged.requires_grad_(), plain).requires_grad


def test_unlikelihood_by_hand():
    logprobs = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    complements = torch.tensor([0.5, 0.75], dtype=torch.float64).log()
    found = losses.unlikelihood_loss(logprobs, complements, torch.tensor([False, True]), 3.0)
    assert found.tolist() == near([math.log(2), -3 * math.log(0.75)])


# ----- DPO -----

REFERENCE = [-10.7027159023, -7.3647605120, -11.5411262450, -3.1807849124]
ONE_PAIR = torch.tensor([0]), torch.tensor([1])


def golden_tensors():
    return torch.tensor(SUMS, dtype=torch.float64), torch.tensor(REFERENCE, dtype=torch.float64)


@pytest.mark.parametrize("switches, wanted", [
    ({}, 0.4263847502), ({"label_smoothing": 0.1}, 0.4895504577), ({"beta": 0.5}, 0.0416202817)])
def test_golden_dpo(switches, wanted):
    h = losses.preference_logits(*golden_tensors(), *ONE_PAIR)
    assert h.item() == near(6.3165707442)
    loss, count = losses.dpo_loss(h, **switches)
    assert loss.item() == near(wanted) and count == 1


def test_dpo_at_the_start_is_log_2_and_extremes_are_finite():
    sums, _ = golden_tensors()
    h = losses.preference_logits(sums, sums, torch.tensor([0, 2]), torch.tensor([1, 3]))
    assert losses.dpo_loss(h)[0].item() == near(2 * math.log(2))
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss, _ = losses.dpo_loss(far, label_smoothing=0.1)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(far.grad).all()
    none, count = losses.dpo_loss(torch.zeros(0))
    assert none.item() == 0 and count == 0


def test_dpo_without_a_reference_and_with_a_label_for_each_pair():
    sums, _ = golden_tensors()
    better, worse = torch.tensor([0, 2]), torch.tensor([1, 3])
    h = losses.preference_logits(sums, 0.0, better, worse)
    assert h.tolist() == near([SUMS[0] - SUMS[1], SUMS[2] - SUMS[3]])
    both = losses.dpo_loss(h, label_smoothing=torch.tensor([0.0, 0.3], dtype=torch.float64))[0]
    each = losses.dpo_loss(h[:1])[0] + losses.dpo_loss(h[1:], label_smoothing=0.3)[0]
    torch.testing.assert_close(both, each)


def test_dpo_gradients_against_finite_differences():
    sums, reference = golden_tensors()
    pairs = torch.tensor([0, 3]), torch.tensor([1, 2])

    def loss(scores):
        h = losses.preference_logits(scores, reference, *pairs)
        return losses.dpo_loss(h, beta=0.3, label_smoothing=0.1)[0]

    assert torch.autograd.gradcheck(loss, sums.requires_grad_())


# ----- Padded batches in, the mean loss out -----

def random_batch(seed, rows=5, vocabulary=11, dtype=torch.float64):
    """Logits (B, T, V), labels (B, T): prompts and responses of random lengths, right padding."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [(rng.randint(1, 5), rng.randint(1, 6)) for _ in range(rows)]
    longest = max(map(sum, sizes)) + 1
    labels = torch.full((rows, longest), IGNORE)
    for row, (prompt, response) in enumerate(sizes):
        labels[row, prompt:prompt + response] = torch.randint(vocabulary, (response,))
    return torch.randn(rows, longest, vocabulary, dtype=dtype), labels


def flat(logits, labels):
    """Response log-probabilities (M,) and the row of each (M,), without padding."""
    rows, targets = losses.prediction_rows(labels)
    return losses.gathered_logprobs(logits.flatten(0, 1)[rows], targets), rows // labels.shape[1]


def mean_loss(name, logits, labels, pairs, reference=None):
    """One of the three mean losses; the reference of DPO is by default a scaled copy."""
    if name == "cat":
        return losses.cat_loss_from_logits(logits, labels, pairs, margin=0.1)
    if name == "cut":
        return losses.cut_loss_from_logits(logits, labels, pairs)
    reference = 0.9 * logits if reference is None else reference
    return losses.dpo_loss_from_logits(logits, reference, labels, pairs)


PAIRS = [(0, 3), (0, 1), (4, 2)]  # row 0 is better twice, and imitated once


@pytest.mark.parametrize("seed", range(5))
def test_cat_from_logits_equals_the_flat_loss(seed):
    logits, labels = random_batch(seed)
    better, worse = torch.tensor(PAIRS).T
    weights = torch.tensor([1.0, 0, 0, 0, 1.0])
    terms = losses.cat_loss(*flat(logits, labels), better, worse, weights, lam=0.7, margin=0.2)
    wanted = sum(total / count for total, count in terms.values())
    found = losses.cat_loss_from_logits(logits, labels, PAIRS, lam=0.7, margin=0.2,
                                        rewards=[2, 1, 0, 1, 2])
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_golden_cat_from_logits():
    pairs = [(1, 0), (1, 2), (1, 3)]
    found = losses.cat_loss_from_logits(*padded(), pairs, rewards=[1, 2, 1, 0], lam=0.5)
    assert found.item() == near(2.9226578189 / 3 + 0.5 * 8.7850893872 / 3)


def cut_batch(seed):
    """A batch for CUT: rows 0 and 1, 4 and 2 are pairs, row 3 is a satisfying response."""
    logits, labels = random_batch(seed, rows=5)
    longest = labels.shape[1] + 6
    logits = torch.randn(5, longest, logits.shape[-1], dtype=torch.float64)
    labels = torch.cat([labels, torch.full((5, 6), IGNORE)], 1)
    rng = random.Random(seed)
    for judged, plain in ((0, 1), (4, 2)):  # the same response behind a longer prompt
        response = labels[plain][labels[plain] != IGNORE]
        start = int((labels[plain] != IGNORE).int().argmax()) + rng.randint(1, 6)
        labels[judged] = IGNORE
        labels[judged, start:start + len(response)] = response
    return logits, labels, [(0, 1), (4, 2)]


@pytest.mark.parametrize("seed", range(5))
def test_cut_from_logits_equals_the_flat_loss(seed):
    logits, labels, pairs = cut_batch(seed)
    order = [0, 4, 3, 1, 2]  # ALIGN_N twice, ALIGN_P, then the twins in the order of ALIGN_N
    roles = torch.tensor([losses.ALIGN_N] * 2 + [losses.ALIGN_P] + [losses.MISALIGN] * 2)
    logprobs, ids = flat(logits[order], labels[order])
    at, targets = losses.prediction_rows(labels[[1, 2]])
    complements = losses.complement_logprobs(logits[[1, 2]].flatten(0, 1)[at], targets)
    role = roles[ids]
    flagged = losses.inappropriate_tokens(logprobs[role == losses.ALIGN_N],
                                          logprobs[role == losses.MISALIGN], detect_lam=1.2)
    terms = losses.cut_loss(logprobs, complements, ids, roles, flagged, alpha=0.6)
    wanted = sum(total / count for total, count in terms.values())
    found = losses.cut_loss_from_logits(logits, labels, pairs, detect_lam=1.2, alpha=0.6)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_dpo_from_logits_equals_the_flat_loss(seed):
    logits, labels = random_batch(seed)
    reference = torch.randn_like(logits)
    sums = [losses.sequence_logprobs(*flat(x, labels), 5)[0] for x in (logits, reference)]
    better, worse = torch.tensor(PAIRS).T
    h = losses.preference_logits(*sums, better, worse)
    total, count = losses.dpo_loss(h, beta=0.3)
    found = losses.dpo_loss_from_logits(logits, reference, labels, PAIRS, beta=0.3,
                                        rewards=[2, 1, 0, 1, 2])
    torch.testing.assert_close(found, total / count, atol=1e-12, rtol=0)


def test_golden_dpo_from_logits():
    (logits, labels), (reference, _) = padded(), padded(frequencies=(0.9, 1.1, 1.7, 0.2))
    found = losses.dpo_loss_from_logits(logits, reference, labels, [(0, 1)])
    assert found.item() == near(0.4263847502)


def random_models():
    """A policy and a reference: transformers' Llama, tiny and random, with TRL's head on it."""
    transformers, trainer = pytest.importorskip("transformers"), pytest.importorskip("trl.trainer")
    config = transformers.LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=24,
                                      num_hidden_layers=1, num_attention_heads=2)
    models = [transformers.LlamaForCausalLM(config) for _ in range(2)]
    for model in models:
        for weight in model.parameters():
            weight.data.normal_(0, 0.3)
        trainer.utils.add_fused_lm_head(
            model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return models


def trl_loss(policy, reference, inputs, beta):
    """The loss of TRL's DPOTrainer, called with no more of a trainer than it reads."""
    from trl import DPOTrainer

    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x,
                                  gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=policy, ref_model=reference, accelerator=accelerator, beta=beta, ld_alpha=None,
        aux_loss_enabled=False, precompute_ref_logps=False, use_weighting=False, _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), label_smoothing=0.0,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0],
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0)
    return DPOTrainer._compute_loss(trainer, policy, inputs, False)


@pytest.mark.parametrize("seed", range(3))
def test_dpo_from_logits_equals_trl(seed):
    _, labels = random_batch(seed, rows=6)  # for TRL three chosen rows, then the rejected three
    policy, reference = random_models()
    policy.train()
    inputs = {"input_ids": torch.where(labels == IGNORE, torch.randint(11, labels.shape), labels),
              "attention_mask": torch.ones_like(labels),
              "completion_mask": (labels != IGNORE).long()}
    theirs = trl_loss(policy, reference, inputs, 0.3)
    logits, fixed = (model(input_ids=inputs["input_ids"]).logits for model in (policy, reference))
    pairs = [(0, 3), (1, 4), (2, 5)]
    ours = losses.dpo_loss_from_logits(logits, fixed, labels, pairs, beta=0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    weights = list(policy.parameters())
    slopes = torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights)
    for mine, their in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["cat", "cut", "dpo"])
def test_gradients_from_logits_against_finite_differences(name):
    logits, labels, pairs = cut_batch(3)
    reference = torch.randn_like(logits)
    loss = lambda x: mean_loss(name, x, labels, pairs, reference)  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_the_reference_of_dpo_gets_no_gradient():
    logits, labels = random_batch(0)
    reference = torch.randn_like(logits).requires_grad_()
    loss = losses.dpo_loss_from_logits(logits.requires_grad_(), reference, labels, PAIRS)
    loss.backward()
    assert reference.grad is None and logits.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["cat", "cut", "dpo"])
def test_more_padding_changes_nothing(name):
    logits, labels, pairs = cut_batch(1)
    wider = torch.cat([logits, 50 * torch.randn(5, 4, logits.shape[-1], dtype=torch.float64)], 1)
    more = F.pad(labels, (0, 4), value=IGNORE)
    found = mean_loss(name, logits, labels, pairs), mean_loss(name, wider, more, pairs)
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["cat", "cut", "dpo"])
@pytest.mark.parametrize("pairs, words", [
    ([], r"expected at least one pair, and one reward per row \(5\) or none"),
    ([(0, 5)], r"pair \(0, 5\) does not name two of the 5 rows"),
    ([(-1, 0)], r"pair \(-1, 0\) does not name two of the 5 rows"),
    ([(0, 1), (3, 3)], r"pair \(3, 3\) does not name two of the 5 rows"),
])
def test_pairs_that_cannot_be_are_refused(name, pairs, words):
    logits, labels, _ = cut_batch(2)
    with pytest.raises(ValueError, match=words):
        mean_loss(name, logits, labels, pairs)


@pytest.mark.parametrize("name", ["cat", "cut", "dpo"])
def test_shapes_that_cannot_be_are_refused(name):
    logits, labels, pairs = cut_batch(2)
    with pytest.raises(ValueError, match=r"expected \(B, T, V\) and \(B, T\), the labels not shi"):
        mean_loss(name, logits, labels[:, 1:], pairs)
    with pytest.raises(ValueError, match=r"logits are \(4, .*, 11\) and labels \(5, "):
        mean_loss(name, logits[1:], labels, pairs)
    labels[3] = IGNORE
    with pytest.raises(ValueError, match="a row has no labelled token; expected a response in eac"):
        mean_loss(name, logits, labels, pairs)


@pytest.mark.parametrize("name", ["cat", "cut", "dpo"])
def test_a_label_in_the_first_column_is_refused(name):
    logits, labels, pairs = cut_batch(2)
    labels[3, 0] = 1
    with pytest.raises(ValueError, match="nothing precedes it"):
        mean_loss(name, logits, labels, pairs)
    with pytest.raises(ValueError, match="nothing precedes it"):
        losses.token_logprobs(logits, labels)


@pytest.mark.parametrize("rewards, words", [
    ([2, 1, 0, 1], r"one reward per row \(5\)"),
    ([2, 1, 0, 2, 2], r"pair \(0, 3\) is in the wrong order: its rewards are 2 and 2; put the"),
    ([0, 1, 0, 1, 2], r"pair \(0, 3\) is in the wrong order: its rewards are 0 and 1"),
])
def test_rewards_show_a_wrong_order(rewards, words):
    logits, labels = random_batch(0)
    with pytest.raises(ValueError, match=words):
        losses.cat_loss_from_logits(logits, labels, PAIRS, rewards=rewards)
    with pytest.raises(ValueError, match=words):
        losses.dpo_loss_from_logits(logits, logits, labels, PAIRS, rewards=rewards)


def test_logits_of_a_reference_must_fit_too():
    logits, labels = random_batch(0)
    with pytest.raises(ValueError, match=r"logits are \(5, \d+, 11\) and labels"):
        losses.dpo_loss_from_logits(logits, logits[:, 1:], labels, PAIRS)


def test_cut_from_logits_refuses_swapped_and_different_rows():
    logits, labels, pairs = cut_batch(4)
    with pytest.raises(ValueError, match="row 1 should have the judgment in its prompt, but that "
                                         "is not longer than row 0's; swap them"):
        losses.cut_loss_from_logits(logits, labels, [(1, 0), (4, 2)])
    labels[4, (labels[4] != IGNORE).int().argmax()] += 1
    with pytest.raises(ValueError, match="rows 4 and 2 are a pair, but their labels differ"):
        losses.cut_loss_from_logits(logits, labels, pairs)


def test_cut_from_logits_refuses_padding_on_the_left():
    logits, labels, pairs = cut_batch(0)
    rows = []
    for row in labels:
        last = int((row != IGNORE).nonzero()[-1]) + 1
        rows.append(row.roll(len(row) - last))
    with pytest.raises(ValueError, match="pad on the right"):
        losses.cut_loss_from_logits(logits, torch.stack(rows), pairs)
