"""losses.py: golden numbers (spec 2.G), the shift, gradients, packed = padded, empty batches."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import losses

PROMPT, LENGTHS, VOCAB, IGNORE = 3, (7, 6, 8, 5), 7, -100


def golden_row(i):
    """Logits (T, V), ids (T,), labels (T,) of candidate i: pi(i, t, v) = 2 sin(0.7i + 1.3t + 2.1v + 0.5)."""
    t, v = torch.arange(LENGTHS[i], dtype=torch.float64)[:, None], torch.arange(VOCAB, dtype=torch.float64)[None]
    ids = torch.tensor([(3 * i + 2 * t + 1) % VOCAB for t in range(LENGTHS[i])])
    labels = ids.clone()
    labels[:PROMPT] = IGNORE
    return 2 * torch.sin(0.7 * i + 1.3 * t + 2.1 * v + 0.5), ids, labels


def packed():
    """The four candidates end to end: logits (26, V), labels (26,), document of each position (26,)."""
    rows = [golden_row(i) for i in range(4)]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    return torch.cat([row[0] for row in rows]), torch.cat([row[2] for row in rows]), documents


def padded(fill=0.0):
    """The four candidates as rows of 8: logits (4, 8, V), labels (4, 8)."""
    logits, labels = torch.full((4, 8, VOCAB), fill, dtype=torch.float64), torch.full((4, 8), IGNORE)
    for i in range(4):
        logits[i, :LENGTHS[i]], _, labels[i, :LENGTHS[i]] = golden_row(i)
    return logits, labels


def golden_logprobs():
    logits, labels, documents = packed()
    rows, targets = losses.prediction_rows(labels)
    return losses.gathered_logprobs(logits[rows], targets), documents[rows]


def near(values):
    return pytest.approx(values, abs=1e-8, rel=0)


# ---------------------------------------------------------------------------------------------------------------------
# The head without logits


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_head_logprobs_equal_those_of_logits_with_their_gradients(scale, temperature, monkeypatch):
    hidden, weight = (torch.randn(700, 8, dtype=torch.float64) * scale).requires_grad_(), torch.randn(50, 8, dtype=torch.float64)
    targets, slopes = torch.randint(0, 50, (700,)), torch.randn(2, 700, dtype=torch.float64)
    logits = hidden @ weight.T / temperature
    plain = torch.stack([losses.gathered_logprobs(logits, targets), losses.complement_logprobs(logits, targets)])
    direct = torch.stack(losses.head_logprobs(hidden, weight, targets, temperature=temperature))
    assert torch.allclose(direct, plain, atol=1e-10, rtol=1e-12)
    wanted, = torch.autograd.grad((plain * slopes).sum(), hidden)
    found, = torch.autograd.grad((direct * slopes).sum(), hidden)
    assert torch.allclose(found, wanted, atol=1e-9)


def test_head_logprobs_of_a_sure_model_stay_finite():
    """p(target) is 1 to the last bit: log(1 - p) is still told, and still pushes the target down with the full weight."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    logprobs, complements = losses.head_logprobs(hidden, weight, torch.tensor([0]))
    assert logprobs.item() == 0 and complements.item() == pytest.approx(-200)
    slope, = torch.autograd.grad(complements.sum(), hidden)
    assert torch.allclose(slope, weight[1:2] - weight[:1])


def test_head_logprobs_of_no_rows_and_without_gradients():
    weight = torch.randn(9, 4)
    hidden = torch.zeros(0, 4, requires_grad=True)
    logprobs, _ = losses.head_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long))
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    with torch.no_grad():
        assert losses.head_logprobs(torch.randn(3, 4), weight, torch.tensor([1, 2, 3]))[0].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# The shift


def test_prediction_rows_by_hand():
    rows, targets = losses.prediction_rows(torch.tensor([[IGNORE, 3, 4], [IGNORE, IGNORE, 2]]))
    assert rows.tolist() == [0, 1, 4] and targets.tolist() == [3, 4, 2]
    rows, targets = losses.prediction_rows(torch.tensor([IGNORE, 5, IGNORE, 6, 0]))
    assert rows.tolist() == [0, 2, 3] and targets.tolist() == [5, 6, 0]
    rows, targets = losses.prediction_rows(torch.tensor([[-1, 3], [-1, -100]]), ignore_index=-1)
    assert rows.tolist() == [0, 2] and targets.tolist() == [3, -100]


@pytest.mark.parametrize("labels", [[[1, 2], [IGNORE, 2]], [[IGNORE, 2], [1, IGNORE]], [1, 2]])
def test_a_label_that_nothing_precedes_is_refused(labels):
    with pytest.raises(ValueError, match="no position precedes"):
        losses.prediction_rows(torch.tensor(labels))


def test_labels_stay_as_they_were():
    logits, labels = padded()
    before = labels.clone()
    losses.cross_entropy(*losses.token_logprobs(logits, labels))
    assert torch.equal(labels, before)


def test_token_logprobs_match_a_naive_loop():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    labels[torch.rand(3, 6) < 0.4] = IGNORE
    labels[:, 0] = IGNORE
    logprobs, mask = losses.token_logprobs(logits, labels)
    assert logprobs.shape == mask.shape == (3, 5) and mask.dtype == torch.bool
    for b in range(3):
        for t in range(1, 6):
            assert mask[b, t - 1] == (labels[b, t] != IGNORE)
            wanted = logits[b, t - 1].softmax(-1)[labels[b, t]].log() if mask[b, t - 1] else torch.tensor(0.0)
            torch.testing.assert_close(logprobs[b, t - 1], wanted)


@pytest.mark.parametrize("seed", range(5))
def test_cross_entropy_matches_torch_with_padding_and_packing(seed):
    torch.manual_seed(seed)
    lengths = torch.randint(2, 9, (4,)).tolist()
    rows = [(torch.randn(n, 13, dtype=torch.float64), torch.randint(0, 13, (n,))) for n in lengths]
    for _, labels in rows:
        labels[:torch.randint(1, len(labels) + 1, ())] = IGNORE
    left, right = torch.zeros(4, 9, 13, dtype=torch.float64), torch.full((4, 9), IGNORE)
    for i, (logits, labels) in enumerate(rows):
        start = i % 2 * (9 - len(labels))                          # odd rows are padded on the left
        left[i, start:start + len(labels)], right[i, start:start + len(labels)] = logits, labels
    wanted = F.cross_entropy(left[:, :-1].flatten(0, 1), right[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
    loss_sum, count = losses.cross_entropy(*losses.token_logprobs(left, right))
    flat_rows, targets = losses.prediction_rows(torch.cat([labels for _, labels in rows]))
    flat = losses.gathered_logprobs(torch.cat([logits for logits, _ in rows])[flat_rows], targets)
    assert count == flat.numel() == (right != IGNORE).sum()
    torch.testing.assert_close(loss_sum, wanted)
    torch.testing.assert_close(losses.cross_entropy(flat)[0], wanted)


def test_what_stands_at_unlabelled_positions_does_not_matter():
    (clean, labels), (dirty, _) = padded(), padded(fill=float("nan"))
    clean.requires_grad_(), dirty.requires_grad_()
    for logits in (clean, dirty):
        losses.cross_entropy(*losses.token_logprobs(logits, labels))[0].backward()
    assert torch.equal(clean.grad, dirty.grad) and not clean.grad.isnan().any()


@pytest.mark.parametrize("dtype, wanted", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                                           (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_logprobs_are_float32_or_better(dtype, wanted):
    logits, labels = padded()
    assert losses.token_logprobs(logits.to(dtype), labels)[0].dtype == wanted
    exact = losses.token_logprobs(logits.to(dtype).double(), labels)[0]
    torch.testing.assert_close(losses.token_logprobs(logits.to(dtype), labels)[0].double(), exact, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Golden numbers, spec 2.G


def test_golden_sequence_logprobs():
    logprobs, sequence_ids = golden_logprobs()
    sums, lengths = losses.sequence_logprobs(logprobs, sequence_ids, 4)
    assert sums.tolist() == near([-5.8064740333, -8.7850893872, -12.7249884894, -3.7316307244])
    assert (sums / lengths).tolist() == near([-1.4516185083, -2.9283631291, -2.5449976979, -1.8658153622])
    assert lengths.tolist() == [4, 3, 5, 2]
    by_row, mask = losses.token_logprobs(*padded())
    torch.testing.assert_close(by_row.sum(1), sums)
    assert mask.sum(1).tolist() == [4, 3, 5, 2]


def test_golden_sft():
    logprobs, sequence_ids = golden_logprobs()
    loss_sum, count = losses.cross_entropy(logprobs)
    sums, lengths = losses.sequence_logprobs(logprobs, sequence_ids, 4)
    assert (loss_sum / count).item() == near(2.2177273310)
    assert -(sums / lengths).mean().item() == near(2.1976986744)


def test_golden_rrhf():
    logprobs, sequence_ids = golden_logprobs()
    terms = losses.cat_loss(logprobs, sequence_ids, *losses.cat_targets([[1, 3, 2, 0]], rule="all"), lam=1.0)
    assert terms["rank"][0].item() == near(4.6952193440) and terms["rank"][1] == 6
    assert terms["ce"][0].item() == near(8.7850893872) and terms["ce"][1] == 3
    assert sum(term for term, _ in terms.values()).item() == near(13.4803087312)


def test_golden_cat():
    logprobs, sequence_ids = golden_logprobs()
    better, worse, weights = losses.cat_targets([[1, 2, 1, 0]])
    assert (better.tolist(), worse.tolist(), weights.tolist()) == ([1, 1, 1], [0, 2, 3], [0, 1, 0, 0])
    terms = losses.cat_loss(logprobs, sequence_ids, better, worse, weights, lam=0.5)
    assert terms["rank"][0].item() == near(2.9226578189) and terms["rank"][1] == 3
    assert terms["ce"][0].item() == near(0.5 * 8.7850893872) and terms["ce"][1] == 3
    scores = torch.tensor([-1.4516185083, -2.9283631291, -2.5449976979, -1.8658153622], dtype=torch.float64)
    hinges = [losses.pairwise_ranking_loss(scores, better[k:k + 1], worse[k:k + 1])[0].item() for k in range(3)]
    assert hinges == near([1.4767446208, 0.3833654312, 1.0625477669])


def test_margin_by_hand():
    scores = torch.tensor([-1.0, -1.2, -3.0])
    loss, count = losses.pairwise_ranking_loss(scores, torch.tensor([0, 0]), torch.tensor([1, 2]), margin=0.5)
    assert loss.item() == pytest.approx(0.3) and count == 2


# ---------------------------------------------------------------------------------------------------------------------
# Pairs and groups


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
def test_pairs(rewards, rule, pairs):
    assert list(zip(*losses.best_vs_lower_pairs(rewards, rule=rule))) == pairs


def test_unknown_pair_rule():
    with pytest.raises(ValueError, match="'some' is unknown"):
        losses.best_vs_lower_pairs([1, 2], rule="some")


def test_groups_lie_end_to_end_and_those_without_a_pair_take_no_part():
    better, worse, weights = losses.cat_targets([[0, 2], [2, 2], [1, 0], [2, 1, 2]])
    assert better.tolist() == [1, 6, 8] and worse.tolist() == [0, 7, 7]
    assert weights.tolist() == [0, 1, 0, 0, 0, 0, 0.5, 0, 0.5]


def test_ce_is_the_mean_over_best_responses():
    logprobs, sequence_ids = golden_logprobs()
    sums, _ = losses.sequence_logprobs(logprobs, sequence_ids, 4)
    terms = losses.cat_loss(logprobs, sequence_ids, *losses.cat_targets([[2, 2, 2, 1]]), lam=1.5)
    assert terms["ce"][0].item() == near(-1.5 * sums[:3].sum().item() / 3)
    assert terms["ce"][1] == near((4 + 3 + 5) / 3)


def test_several_groups_add_up():
    logprobs, sequence_ids = golden_logprobs()
    first, second = sequence_ids < 2, sequence_ids >= 2
    whole = losses.cat_loss(logprobs, sequence_ids, *losses.cat_targets([[0, 2], [2, 1]]))
    parts = [losses.cat_loss(logprobs[first], sequence_ids[first], *losses.cat_targets([[0, 2]])),
             losses.cat_loss(logprobs[second], sequence_ids[second] - 2, *losses.cat_targets([[2, 1]]))]
    for term in ("rank", "ce"):
        assert whole[term][0].item() == near(sum(part[term][0].item() for part in parts))
        assert whole[term][1] == sum(part[term][1] for part in parts)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients and empty batches


@pytest.mark.parametrize("margin, lam", [(0.0, 1.0), (0.3, 0.5)])
def test_gradients_against_finite_differences(margin, lam):
    logits, labels, documents = packed()
    rows, targets = losses.prediction_rows(labels)
    plan = losses.cat_targets([[1, 2], [2, 0]])

    def loss(logits):
        logprobs = losses.gathered_logprobs(logits[rows], targets)
        terms = losses.cat_loss(logprobs, documents[rows], *plan, margin=margin, lam=lam)
        return sum(total / count for total, count in terms.values())

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: losses.token_logprobs(x, padded()[1])[0], padded()[0].requires_grad_())


def test_ties_have_no_gradient():
    scores = torch.tensor([-1.0, -1.0], requires_grad=True)
    losses.pairwise_ranking_loss(scores, torch.tensor([0]), torch.tensor([1]))[0].backward()
    assert scores.grad.tolist() == [0, 0]


def test_an_all_ignored_batch_is_zero_with_a_gradient():
    logits = torch.randn(2, 4, VOCAB, requires_grad=True)
    labels = torch.full((2, 4), IGNORE)
    logprobs, mask = losses.token_logprobs(logits, labels)
    rows, targets = losses.prediction_rows(labels)
    flat = losses.gathered_logprobs(logits.flatten(0, 1)[rows], targets)
    terms = losses.cat_loss(flat, torch.zeros(0, dtype=torch.long), *losses.cat_targets([[1, 1]]))
    found = [losses.cross_entropy(logprobs, mask), losses.cross_entropy(flat), terms["rank"], terms["ce"]]
    assert [(total.item(), count) for total, count in found] == [(0, 0)] * 4
    sum(total for total, _ in found).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    assert losses.gathered_logprobs(logits, torch.tensor([1])).item() == -1e4
    assert losses.gathered_logprobs(torch.zeros(1, 3), torch.tensor([2])).item() == pytest.approx(-math.log(3))


def test_ignore_index_is_data_s():
    data = pytest.importorskip("data")
    for function in (losses.prediction_rows, losses.token_logprobs):
        assert inspect.signature(function).parameters["ignore_index"].default == data.IGNORE_INDEX


# ---------------------------------------------------------------------------------------------------------------------
# Unlikelihood and CUT


def golden_cut():
    """Response tokens of candidate 0 under its own logits (with judgment) and those of candidate 1 (without)."""
    (told, ids, _), (plain, _, _) = golden_row(0), golden_row(1)
    targets = ids[PROMPT:]
    return told[PROMPT - 1:-1], plain[PROMPT - 1:PROMPT - 1 + len(targets)], targets


def cut_terms(told, plain, targets, **switches):
    logprobs = torch.cat([losses.gathered_logprobs(told, targets), losses.gathered_logprobs(plain, targets)])
    ids = torch.tensor([0] * len(targets) + [1] * len(targets))
    return losses.cut_loss(logprobs, losses.complement_logprobs(plain, targets), ids,
                           torch.tensor([losses.ALIGN_N, losses.MISALIGN]), **switches)


@pytest.mark.parametrize("lam, alpha, gamma, flagged, l1", [
    (1.1, 1, 0, [1, 1, 1, 0], 0.4272930751), (1.1, 0.5, 0, [1, 1, 1, 0], 0.3589349213),
    (1.1, 0.5, 1, [1, 1, 1, 0], 0.3190289312), (1.5, 0.25, 2, [1, 1, 0, 0], 0.5571892214),
])
def test_golden_cut(lam, alpha, gamma, flagged, l1):
    told, plain, targets = golden_cut()
    assert losses.gathered_logprobs(told, targets).exp().tolist() == pytest.approx([.0746784, .3572816, .4455342, .2530424], abs=1e-7)
    found = losses.inappropriate_tokens(losses.gathered_logprobs(told, targets), losses.gathered_logprobs(plain, targets), lam=lam)
    assert found.tolist() == [bool(flag) for flag in flagged]
    terms = cut_terms(told, plain, targets, lam=lam, alpha=alpha, gamma=gamma)
    assert terms["l1"][0].item() == near(l1) and terms["l2"][0].item() == near(1.4516185083)
    assert terms["l1"][1] == terms["l2"][1] == 1 and (terms["flagged"][0].item(), terms["flagged"][1]) == (sum(flagged), 4)


def authors_cut(told, plain, lengths, kinds, targets, *, alpha, threshold):
    """The published code's loss of a micro-batch (modeling_llama_unlikelihood.py), from its description in words.

    Rows A: the judged prompt, or the plain one of a good response; rows B: the plain prompt of the bad ones.
    """
    row_a = torch.cat([told[i].log_softmax(-1).gather(-1, targets[i][:, None]).squeeze(-1) for i in range(len(kinds))])
    l2 = -row_a.mean()
    bad = [i for i, kind in enumerate(kinds) if kind == "bad"]
    if not bad:
        return l2
    p_a = torch.cat([told[i].softmax(-1).gather(-1, targets[i][:, None]).squeeze(-1) for i in bad])
    p_b = torch.cat([plain[i].softmax(-1).gather(-1, targets[i][:, None]).squeeze(-1) for i in bad])
    ratio = (p_a / p_b).detach()
    one_minus = torch.where(1 - p_b == 0, (1 - p_b) + 1e-5, 1 - p_b)
    tokens = torch.where(ratio > threshold, alpha * one_minus.log(), p_b.log())
    return (-tokens.mean() + l2) / 2


@pytest.mark.parametrize("seed", range(6))
def test_cut_with_half_and_token_mean_is_the_authors_loss(seed):
    torch.manual_seed(seed)
    lengths, kinds = [5, 3, 6, 2], [["bad", "good", "bad", "good"], ["good"] * 4, ["bad"] * 4][seed % 3]
    told = [torch.randn(n, 13, dtype=torch.float64, requires_grad=True) for n in lengths]
    plain = [torch.randn(n, 13, dtype=torch.float64, requires_grad=True) for n in lengths]
    targets = [torch.randint(0, 13, (n,)) for n in lengths]
    logprobs, ids, roles, complements = [], [], [], []
    for i, kind in enumerate(kinds):
        logprobs.append(losses.gathered_logprobs(told[i], targets[i]))
        ids += [len(roles)] * lengths[i]
        roles.append(losses.ALIGN_N if kind == "bad" else losses.ALIGN_P)
        if kind == "bad":
            logprobs.append(losses.gathered_logprobs(plain[i], targets[i]))
            complements.append(losses.complement_logprobs(plain[i], targets[i]))
            ids += [len(roles)] * lengths[i]
            roles.append(losses.MISALIGN)
    terms = losses.cut_loss(torch.cat(logprobs), torch.cat(complements) if complements else torch.zeros(0, dtype=torch.float64),
                            torch.tensor(ids), torch.tensor(roles), lam=1.1, alpha=0.5, combine="half", reduction="token")
    ours = sum(total / max(1, count) for name, (total, count) in terms.items() if name != "flagged")
    theirs = authors_cut(told, plain, lengths, kinds, targets, alpha=0.5, threshold=1.1)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    leaves = [*told, *(x for x, kind in zip(plain, kinds) if kind == "bad")]
    for mine, their in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)):
        torch.testing.assert_close(mine, their, atol=1e-12, rtol=0)


def test_half_halves_judged_responses_only():
    told, plain, targets = golden_cut()
    whole, half = cut_terms(told, plain, targets), cut_terms(told, plain, targets, combine="half")
    assert half["l1"][0].item() == near(whole["l1"][0].item() / 2) and half["l2"][0].item() == near(whole["l2"][0].item() / 2)
    logprobs, ids, roles = losses.gathered_logprobs(told, targets), torch.zeros(4, dtype=torch.long), torch.tensor([losses.ALIGN_P])
    good = losses.cut_loss(logprobs, logprobs[:0], ids, roles, combine="half")
    assert good["l2"][0].item() == near(1.4516185083) and good["l1"][0].item() == 0 and good["flagged"][1] == 0


@pytest.mark.parametrize("switches", [{"combine": "third"}, {"reduction": "none"}])
def test_unknown_cut_variants(switches):
    with pytest.raises(ValueError, match="sum or half"):
        cut_terms(*golden_cut(), **switches)


def test_cut_gradients_against_finite_differences_and_no_gradient_through_the_mask():
    told, plain, targets = golden_cut()

    def loss(told, plain, **switches):
        terms = cut_terms(told, plain, targets, **switches)
        return terms["l1"][0] + terms["l2"][0]
    assert torch.autograd.gradcheck(loss, (told.clone().requires_grad_(), plain.clone().requires_grad_()))
    held = told.clone().requires_grad_()
    terms = cut_terms(held, plain.clone().requires_grad_(), targets, gamma=1.0)
    terms["l1"][0].backward()
    assert held.grad.abs().max() == 0                                      # L1 never reaches the judged forward pass


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
        assert value.item() == pytest.approx(exact, rel=tolerance, abs=tolerance)
        assert logits.grad[0, 1].item() == pytest.approx(-1 / (1 + math.exp(others - margin)), abs=tolerance)
    clamped = torch.tensor([[0.0, 200.0]], dtype=dtype, requires_grad=True)
    losses.complement_logprobs(clamped, torch.tensor([1]), clamp=1e-5).sum().backward()
    assert clamped.grad.abs().max() == 0                                   # the published clamp forgets what it is surest of


def test_cut_at_the_extremes_is_finite():
    for sure in (True, False):
        logits = torch.full((3, 5), 0.0)
        logits[:, 2] = 1e4 if sure else -1e4
        logits.requires_grad_()
        terms = cut_terms(logits, logits * 1.0, torch.tensor([2, 2, 2]), lam=0.9)
        (terms["l1"][0] + terms["l2"][0]).backward()
        assert torch.isfinite(terms["l1"][0]) and torch.isfinite(logits.grad).all()
    empty = torch.zeros(0, requires_grad=True)
    terms = losses.cut_loss(empty, empty, torch.zeros(0, dtype=torch.long), torch.tensor([losses.ALIGN_P]))
    assert all(total.item() == 0 for total, _ in terms.values())


def test_floor_drops_improbable_tokens():
    judged, plain = torch.tensor([0.5, 1e-4]).log(), torch.tensor([0.1, 1e-6]).log()
    assert losses.inappropriate_tokens(judged, plain).tolist() == [True, True]
    assert losses.inappropriate_tokens(judged, plain, floor=1e-3).tolist() == [True, False]


def test_token_level_unlikelihood_by_hand():
    torch.manual_seed(0)
    logits, targets, ids = torch.randn(5, 4, dtype=torch.float64), torch.tensor([1, 2, 1, 3, 1]), torch.tensor([0, 0, 0, 1, 1])
    p = logits.softmax(-1)
    candidates = [[], [1], [2], [], [3]]                                   # said before in the same response, but the target
    wanted = [-p[t, targets[t]].log() - 0.5 * sum((1 - p[t, c]).log() for c in cs) for t, cs in enumerate(candidates)]
    found = losses.token_unlikelihood(logits, targets, ids, alpha=0.5)
    assert found.tolist() == near([value.item() for value in wanted])


@pytest.mark.parametrize("tokens, rows, n, flagged", [
    ([1, 2, 1, 2, 1], [0] * 5, 2, [0, 0, 1, 1, 1]), ([1, 2, 1, 2], [0, 0, 1, 1], 2, [0, 0, 0, 0]),
    ([5, 5, 5], [0] * 3, 2, [0, 1, 1]), ([1, 2, 3], [0] * 3, 4, [0, 0, 0]), ([], [], 4, []),
])
def test_repeated_ngrams(tokens, rows, n, flagged):
    found = losses.repeated_ngrams(torch.tensor(tokens, dtype=torch.long), torch.tensor(rows, dtype=torch.long), n)
    assert found.tolist() == [bool(flag) for flag in flagged]


# ---------------------------------------------------------------------------------------------------------------------
# Preferences

SUMS = torch.tensor([-5.8064740333, -8.7850893872, -12.7249884894, -3.7316307244], dtype=torch.float64)
REFERENCE = torch.tensor([-10.7027159023, -7.3647605120, -11.5411262450, -3.1807849124], dtype=torch.float64)
SIZES = torch.tensor([4, 3, 5, 2], dtype=torch.float64)
ONE_PAIR = torch.tensor([0]), torch.tensor([1])


@pytest.mark.parametrize("switches, wanted", [
    ({}, 0.4263847502), ({"label_smoothing": 0.1}, 0.4895504577), ({"beta": 0.5}, 0.0416202817),
    ({"kind": "robust", "label_smoothing": 0.1}, 0.3474276159), ({"kind": "ipo"}, 1.7333585244), ({"kind": "hinge", "beta": 0.05}, 0.6841714628),
])
def test_golden_dpo_and_kin(switches, wanted):
    h = losses.preference_logits(SUMS, REFERENCE, *ONE_PAIR)
    assert h.item() == near(6.3165707442)
    loss, count = losses.dpo_loss(h, **switches)
    assert loss.item() == near(wanted) and count == 1


def test_golden_ipo_of_means_slic_and_pro():
    means = SUMS / SIZES
    ipo = losses.dpo_loss(losses.preference_logits(means, REFERENCE / SIZES, *ONE_PAIR), kind="ipo")
    assert ipo[0].item() == pytest.approx(10.9064836237, abs=2e-8)         # ten times a difference of rounded inputs
    terms = losses.slic_loss(SUMS, *ONE_PAIR, torch.tensor([2]), delta=1.0, lam=0.5)
    assert terms["rank"][0].item() == 0 and terms["ce"][0].item() == near(6.3624942447)
    rewards = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64), torch.tensor([2.5, 1.0, 0.9, -1.0], dtype=torch.float64), None
    for reward, wanted in zip(rewards, (6.4753757094, 8.9559069001, 3.5679220900)):
        assert losses.pro_loss(means, reward).item() == near(wanted)
    with pytest.raises(ValueError, match="best first"):
        losses.pro_loss(means, torch.tensor([0.0, 1.0, 2.0, 3.0]))


def test_dpo_at_the_start_is_log_2_and_extremes_are_finite():
    h = losses.preference_logits(SUMS, SUMS, torch.tensor([0, 2]), torch.tensor([1, 3]))
    assert losses.dpo_loss(h)[0].item() == near(2 * math.log(2))
    for kind in ("sigmoid", "robust", "ipo", "hinge"):
        far = torch.tensor([1e4, -1e4], requires_grad=True)
        loss, _ = losses.dpo_loss(far, kind=kind, label_smoothing=0.1)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(far.grad).all()
        none = losses.dpo_loss(torch.zeros(0), kind=kind)
        assert none[0].item() == 0 and none[1] == 0
    for bad in ({"kind": "sum"}, {"label_smoothing": 0.5}):
        with pytest.raises(ValueError):
            losses.dpo_loss(h, **bad)


def test_preference_gradients_against_finite_differences():
    scores, rewards = SUMS.clone().requires_grad_(), torch.tensor([3.0, 2.0, 1.0, 0.0])
    pairs = torch.tensor([0, 3]), torch.tensor([1, 2])
    for kind in ("sigmoid", "robust", "ipo", "hinge"):
        assert torch.autograd.gradcheck(lambda s: losses.dpo_loss(losses.preference_logits(s, REFERENCE, *pairs), kind=kind, label_smoothing=0.1)[0], scores)
    assert torch.autograd.gradcheck(lambda s: losses.pro_loss(s / SIZES, rewards), scores)
    assert torch.autograd.gradcheck(lambda s: sum(t for t, _ in losses.slic_loss(s, *pairs, torch.tensor([1, 2])).values()), scores)


# Quirks of published codes, reproduced here and nowhere else -----------------------------------------------------------


def test_rrhf_as_its_code_computes_it():
    """It divides every score by the padded length of 8, prompt included, and takes the likelihood's mean over that, too."""
    scores = SUMS / 8
    better, worse = losses.best_vs_lower_pairs([1, 3, 2, 0], rule="all")
    rank = losses.pairwise_ranking_loss(scores, torch.tensor(better), torch.tensor(worse))[0]
    assert rank.item() == near(3.2523486933) and -scores[1].item() == near(1.0981361734)


def test_pro_as_its_code_computes_it():
    """It also scores the first padding token (id 2) of every candidate that is shorter than the longest."""
    scores, best = [], None
    for i in range(4):
        logits, ids, labels = golden_row(i)
        terms = [logits[t - 1].log_softmax(-1)[ids[t]] for t in range(PROMPT, LENGTHS[i])]
        if LENGTHS[i] < max(LENGTHS):
            terms.append(logits[-1].log_softmax(-1)[2])
        scores.append(torch.stack(terms).mean())
        best = torch.stack(terms).sum() if best is None else best
    rank, likelihood = losses.pro_loss(torch.stack(scores), torch.tensor([3.0, 2.0, 1.0, 0.0])), -0.05 * 9 * best
    assert rank.item() == near(2.3352446248 + 4.1170372823 + 0.6393939482) and likelihood.item() == near(4.0233530016)
    assert (rank + likelihood).item() == near(11.1150288567)
