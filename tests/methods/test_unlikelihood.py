"""unlikelihood.py: its three levels by hand, and who takes part in which."""

import json
import math

import pytest
import torch

from methods import collate, losses, unlikelihood

# ----- By hand -----

def test_unlikelihood_of_tokens_said_before_by_hand():
    logits = torch.randn(5, 4, dtype=torch.float64)
    targets, ids = torch.tensor([1, 2, 1, 3, 1]), torch.tensor([0, 0, 0, 1, 1])
    p, wanted = logits.softmax(-1), []
    for t, said in enumerate([[], [1], [2], [], [3]]):  # before, in the same response
        penalty = sum((1 - p[t, c]).log() for c in said)
        wanted.append((-p[t, targets[t]].log() - 0.5 * penalty).item())
    found = unlikelihood.token_unlikelihood(logits, targets, ids, alpha=0.5)
    assert found.tolist() == pytest.approx(wanted, abs=1e-10)


def test_gradients_against_finite_differences():
    targets, ids = torch.randint(0, 4, (6,)), torch.tensor([0, 0, 0, 0, 1, 1])

    def loss(logits):
        return unlikelihood.token_unlikelihood(logits, targets, ids, alpha=0.7).sum()
    assert torch.autograd.gradcheck(loss, torch.randn(6, 4).double().requires_grad_())


def test_a_sure_repetition_is_penalised_with_a_finite_gradient():
    logits = torch.zeros(2, 3)
    logits[1, 1] = 100.0  # about to say again what was said
    logits.requires_grad_()
    loss = unlikelihood.token_unlikelihood(logits, torch.tensor([1, 2]), torch.tensor([0, 0]))
    loss.sum().backward()
    assert loss[1].item() == pytest.approx(200, abs=1)
    assert logits.grad.isfinite().all() and logits.grad[1, 1] == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize("tokens, rows, n, flagged", [
    ([1, 2, 1, 2, 1], [0] * 5, 2, [0, 0, 1, 1, 1]), ([1, 2, 1, 2], [0, 0, 1, 1], 2, [0] * 4),
    ([5, 5, 5], [0] * 3, 2, [0, 1, 1]), ([1, 2, 3], [0] * 3, 4, [0] * 3), ([], [], 4, [])])
def test_repeated_ngrams(tokens, rows, n, flagged):
    tokens, rows = (torch.tensor(x, dtype=torch.long) for x in (tokens, rows))
    found = unlikelihood.repeated_ngrams(tokens, rows, n)
    assert found.tolist() == [bool(flag) for flag in flagged]


# ----- The step -----

def test_response_level_equals_the_equation_and_micro_batches_change_nothing(
        ready, judged, written_out, same_in_parts):
    run = ready("unlikelihood", "--records", str(judged), "--downsample", "0",
                "--unlike-alpha", "0.5")
    items, total = unlikelihood.items(run), 0.0
    for item in items:
        terms = written_out(run.model, item["documents"][0])
        if item["values"]["roles"] == [losses.MISALIGN]:
            loss = -0.5 * sum(math.log1p(-math.exp(x)) for x in terms)
        else:
            loss = -sum(terms)
        total += loss / len(terms)
    means = same_in_parts(run, items)
    assert means["ce"] == pytest.approx(total / len(items), rel=1e-4)


def test_token_level_equals_the_equation_and_bad_answers_take_no_part(
        ready, judged, gradients):
    run = ready("unlikelihood", "--records", str(judged), "--downsample", "0", "--level", "token")
    items, total = unlikelihood.items(run), 0.0
    for item in items:
        if item["values"]["roles"] == [losses.MISALIGN]:
            continue
        document, said, loss = item["documents"][0], [], 0.0
        ids, labels = document["input_ids"], document["labels"]
        with torch.no_grad():
            p = run.model(torch.tensor(ids)[None])[0].double().softmax(-1)
        n = sum(label != -100 for label in labels)
        for t in range(len(ids) - n, len(ids)):
            loss -= p[t - 1, ids[t]].log().item()
            loss -= sum(torch.log1p(-p[t - 1, c]).item() for c in set(said) - {ids[t]})
            said.append(ids[t])
        total += loss / n
    means, _ = gradients(run, items)
    assert means["ce"] == pytest.approx(total / len(items), rel=1e-4)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_bad_answers_take_no_part_in_unlikelihood_of_what_was_said(level, ready, judged):
    run = ready("unlikelihood", "--records", str(judged), "--downsample", "0", "--level", level)
    items = unlikelihood.items(run)
    good = [item for item in items if item["values"]["roles"] == [losses.ALIGN_P]]
    assert 0 < len(good) < len(items)
    found = [unlikelihood.step(run.model, collate(part, run.model, "cpu"), run.cfg)["ce"].item()
             for part in (items, good)]
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[1] > 0


def test_repeated_ngrams_of_any_answer_are_made_unlikely(ready, judged, make_run, written_out):
    run = ready("unlikelihood", "--records", str(judged), "--level", "sequence")
    text = "red hat red hat red hat red hat"
    document = run.document("w", "x", text)
    item = {"documents": [document], "values": {"roles": [losses.MISALIGN]}}
    targets = torch.tensor([label for label in document["labels"] if label != -100])
    flags = unlikelihood.repeated_ngrams(targets, torch.zeros_like(targets))
    terms = written_out(run.model, document)
    loss = -sum(math.log1p(-math.exp(x)) for x, flag in zip(terms, flags, strict=True) if flag)
    found = unlikelihood.step(run.model, collate([item], run.model, "cpu"), run.cfg)["ce"]
    assert found.item() == pytest.approx(loss / len(terms), rel=1e-4) and flags.any()


@pytest.mark.parametrize("level", ["response", "token", "sequence"])
def test_the_command_runs(level, command, judged):
    folder = command("unlikelihood", "--records", str(judged), "--level", level)
    assert not (folder / "judged.jsonl").exists()
    assert json.loads((folder / "config.json").read_text())["level"] == level
