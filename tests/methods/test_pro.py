"""pro.py: its loss by golden numbers and finite differences, its step, short runs."""

import json
import math

import pytest
import torch

from methods import collate, pro

MEANS = torch.tensor([-1.4516185083, -2.9283631291, -2.5449976979, -1.8658153622],
                     dtype=torch.float64)


@pytest.mark.parametrize("rewards, wanted", [
    ([3.0, 2.0, 1.0, 0.0], 6.4753757094), ([2.5, 1.0, 0.9, -1.0], 8.9559069001),
    (None, 3.5679220900)])
def test_golden_loss(rewards, wanted):
    if rewards:
        rewards = torch.tensor(rewards, dtype=torch.float64)
    assert pro.pro_loss(MEANS, rewards).item() == pytest.approx(wanted, abs=1e-7)


def test_golden_step(golden, make_run):
    model, documents = golden()
    item = {"documents": documents, "indices": {"best": [0]},
            "values": {"rewards": [3.0, 2.0, 1.0, 0.0]}}
    terms = pro.step(model, collate([item], model, "cpu"), make_run("pro").cfg)
    assert terms["rank"].item() == pytest.approx(6.4753757094, rel=1e-6)
    assert terms["ce"].item() == pytest.approx(2.6129133150, rel=1e-6)
    cfg = make_run("pro", "--no-use-rewards", "--sft-weight", "0.1").cfg
    terms = pro.step(model, collate([item], model, "cpu"), cfg)
    assert terms["rank"].item() == pytest.approx(3.5679220900, rel=1e-6)
    assert terms["ce"].item() == pytest.approx(2 * 2.6129133150, rel=1e-6)


def test_the_released_code_scores_a_padding_token_too(golden):
    """A quirk of the published code, reproduced here and nowhere else."""
    model, documents = golden()
    scores, start = [], 0
    for document in documents:
        ids, n = document["input_ids"], len(document["input_ids"])
        rows = model.table[start:start + n].log_softmax(-1)
        terms = [rows[t - 1, ids[t]] for t in range(3, n)]
        if n < 8:  # shorter than the longest: one more token, the padding id 2
            terms.append(rows[-1, 2])
        scores.append(torch.stack(terms).mean())
        start += n
    rank = pro.pro_loss(torch.stack(scores), torch.tensor([3.0, 2.0, 1.0, 0.0]))
    assert rank.item() == pytest.approx(2.3352446248 + 4.1170372823 + 0.6393939482, abs=1e-8)
    assert -0.05 * 9 * 5 * scores[0].item() == pytest.approx(4.0233530016, abs=1e-8)


def test_gradients_against_finite_differences():
    scores = torch.randn(5, dtype=torch.float64).requires_grad_()
    rewards = torch.rand(5, dtype=torch.float64).sort(descending=True).values
    assert torch.autograd.gradcheck(lambda x: pro.pro_loss(x, rewards), scores)
    assert torch.autograd.gradcheck(pro.pro_loss, scores)


def test_answers_in_rising_order_are_refused():
    with pytest.raises(ValueError, match="answers best first; sort them by reward"):
        pro.pro_loss(MEANS, torch.tensor([0.0, 1.0, 2.0, 3.0]))


@pytest.mark.parametrize("scores, rewards", [
    ([-1.0], [2.0]), ([-1.0, -2.0, -3.0], [1.0, 1.0, 1.0]), ([-1e4, 0.0, -5e3], [2.0, 1.0, 0.0]),
    ([-1.0, -2.0], [1e6, -1e6])])
def test_it_is_finite_at_its_limits(scores, rewards):
    scores = torch.tensor(scores, requires_grad=True)
    loss = pro.pro_loss(scores, torch.tensor(rewards))
    assert loss.isfinite() and loss >= 0
    if len(scores) > 1:
        loss.backward()
        assert scores.grad.isfinite().all()


@pytest.mark.parametrize("flags", [(), ("--no-use-rewards",)])
def test_a_step_equals_the_equation_and_micro_batches_change_nothing(
        flags, ready, candidates, written_out, same_in_parts):
    run = ready("pro", "--candidates", str(candidates), *flags)
    rank, ce, items = 0.0, 0.0, pro.items(run)
    for item in items:
        terms = [written_out(run.model, x) for x in item["documents"]]
        rewards, n = item["values"]["rewards"], len(terms)
        scores = [sum(x) / len(x) for x in terms]
        for k in range(n - 1):
            gaps = [1.0 if flags else rewards[k] - rewards[i] for i in range(k + 1, n)]
            powers = [scores[k] * max(gaps)]
            powers += [s * gap for s, gap in zip(scores[k + 1:], gaps, strict=True)]
            rank += math.log(sum(map(math.exp, powers))) - powers[0]
        ce -= 0.05 * (n - 1) ** 2 * sum(terms[0])
    means = same_in_parts(run, items)
    n = len(items)
    assert means == pytest.approx({"rank": rank / n, "ce": ce / n}, rel=1e-4) and rank > 0


@pytest.mark.parametrize("flags", [(), ("--no-use-rewards",)])
def test_the_command_runs(flags, command, candidates):
    folder = command("pro", "--candidates", str(candidates), *flags)
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+PRO"]
