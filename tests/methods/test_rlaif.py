"""rlaif.py: labels of pairs from scores, soft labels in the loss, what is written, short runs."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

import data
import train
from methods import collate, losses, rlaif

EXACT = {"how": "exact", "reward": 2, "p_expected": None, "p_correct": None}
SURE = {"how": "judged", "reward": 2, "p_expected": 0.99, "p_correct": 0.95}
EXPECTED = {"how": "judged", "reward": 1, "p_expected": 0.9, "p_correct": 0.1}
UNEXPECTED = {"how": "judged", "reward": 0, "p_expected": 0.45, "p_correct": None}
EMPTY = {"how": "empty", "reward": 0, "p_expected": None, "p_correct": None}


# ----- Labels -----

def test_scores_of_all_kinds_lie_on_one_scale():
    """An exact answer beats every judged one, an expected one every unexpected one."""
    for a, b in itertools.combinations([EXACT, SURE, EXPECTED, UNEXPECTED, EMPTY], 2):
        first = rlaif.two_scores({"first": a, "second": b})
        second = rlaif.two_scores({"first": b, "second": a})
        assert first > 0.5 > second and first + second == pytest.approx(1)
    one_step = [{"how": "judged", "reward": 2, "p_expected": None, "p_correct": p}
                for p in (0.97, 0.51)]
    assert rlaif.two_scores(dict(zip(("first", "second"), one_step, strict=True))) > 0.9


def test_a_label_from_scores_by_hand():
    value = 0.9 * (1 + 0.1) / 2  # half the expected reward
    assert rlaif.answer_score(EXPECTED) == pytest.approx(math.log(value / (1 - value)))
    assert rlaif.answer_score(EXACT) == pytest.approx(math.log(1e6), rel=1e-5)
    scored = [{"how": "scored", "reward": reward} for reward in (1.5, -0.5)]
    pair = dict(zip(("first", "second"), scored, strict=True))
    assert rlaif.two_scores(pair) == pytest.approx(1 / (1 + math.exp(-2)))
    far = {"first": {"how": "scored", "reward": -1e6}, "second": {"how": "scored", "reward": 1e6}}
    assert rlaif.two_scores(far) == pytest.approx(0, abs=1e-12)


def test_an_answer_without_a_reward_gives_no_label():
    nothing = {"how": "unparsed", "reward": None, "p_expected": None, "p_correct": None}
    assert rlaif.two_scores({"first": nothing, "second": EXACT}) is None
    assert rlaif.two_scores({"first": EXACT, "second": nothing}) is None


# ----- Collecting -----

def test_pairs_are_of_different_answers_to_one_question(make_run, candidates):
    run = make_run("rlaif", "--candidates", str(candidates), "--labels", "scores",
                   "--judge", "rule", "--max-worse", "2")
    rlaif.collect(run)
    rows = data.read_records(run.folder / "preferences.jsonl")
    assert len(rows) == 10 * 2  # three answers are not empty, hence three pairs; two are asked for
    rewards = {(x["task"], x["id"], x["response"]): x for x in data.read_records(candidates)}
    for row in rows:
        first, second = (rewards[row["task"], row["id"], row[side]["response"]]
                         for side in ("first", "second"))
        assert first["response"] != second["response"] and first["input"] == row["input"]
        assert row["first"]["wording"] == first["wording"]
        assert first["response"].strip() and second["response"].strip()
        assert (row["probability"] > 0.5) == (first["reward"] > second["reward"])


def test_pairs_without_a_label_are_left_out_and_said(make_run, candidates, monkeypatch, capsys):
    run = make_run("rlaif", "--candidates", str(candidates), "--labels", "scores")
    monkeypatch.setattr(rlaif, "labeller", lambda run: lambda pairs: [
        None if pair["task"] == "colour" else 0.25 for pair in pairs])
    rlaif.collect(run)
    rows = data.read_records(run.folder / "preferences.jsonl")
    assert {(row["task"], row["probability"]) for row in rows} == {("person", 0.25)}
    assert "rlaif: 15 of 30 pairs got no label and are left out." in capsys.readouterr().out


def test_collecting_goes_on_behind_the_labels_that_are_there(make_run, candidates):
    run = make_run("rlaif", "--candidates", str(candidates), "--labels", "scores",
                   "--judge", "rule")
    rlaif.collect(run)
    path = run.folder / "preferences.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:7]))
    rlaif.collect(run)
    assert path.read_bytes() == whole


# ----- The step -----

def test_the_loss_is_dpo_with_a_soft_label_for_each_pair(golden, make_run):
    (model, documents), cfg = golden(), make_run("rlaif", "--labels", "scores", "--beta", "0.3").cfg
    reference, q = torch.randn(4).tolist(), torch.rand(2).tolist()
    item = {"documents": documents, "indices": {"better": [0, 2], "worse": [1, 3]},
            "values": {"reference": reference, "probability": q}}
    terms = rlaif.step(model, collate([item], model, "cpu"), cfg)
    sums = [-5.8064740333, -8.7850893872, -12.7249884894, -3.7316307244]
    total, margin, right = 0.0, 0.0, 0
    for p, (i, j) in zip(q, ((0, 1), (2, 3)), strict=True):
        h = sums[i] - sums[j] - reference[i] + reference[j]
        total += p * math.log1p(math.exp(-0.3 * h)) + (1 - p) * math.log1p(math.exp(0.3 * h))
        likelier = -h if p < 0.5 else h
        margin, right = margin + 0.3 * likelier, right + (likelier > 0)
    assert terms["loss"].item() == pytest.approx(total, rel=1e-5)
    assert terms["margin"].item() == pytest.approx(margin, rel=1e-4, abs=1e-5)
    assert terms["accuracy"] == right


def test_one_label_for_all_pairs_is_label_smoothing():
    h = torch.randn(5, dtype=torch.float64)
    soft = losses.dpo_loss(h, label_smoothing=torch.full((5,), 0.2, dtype=torch.float64))[0]
    assert soft.item() == pytest.approx(losses.dpo_loss(h, label_smoothing=0.2)[0].item())


def test_micro_batches_change_nothing(ready, candidates, same_in_parts):
    run = ready("rlaif", "--candidates", str(candidates), "--labels", "scores", "--judge", "rule")
    rlaif.collect(run)
    means = same_in_parts(run, rlaif.items(run))
    assert means["loss"] == pytest.approx(math.log(2), abs=1e-4)  # h is 0, whatever the labels


# ----- Runs -----

@pytest.mark.parametrize("judge", ["self", "rule", "length"])
def test_the_command_samples_labels_and_trains(judge, command):
    folder = command("rlaif", "--labels", "scores", "--judge", judge, "--pool-per-task", "4",
                     "--wordings", "3", "--temperature", "2")
    rows = data.read_records(folder / "preferences.jsonl")
    assert rows and all(0 <= row["probability"] <= 1 for row in rows)
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+RLAIF"]


def test_letters_need_a_judge_that_knows_letters(refused):
    refused("has no letters to choose from", "rlaif", "--labels", "letters", "--judge", "rule")
    refused("gives letters, not scores", "rlaif", "--labels", "scores", "--judge", "http")


def test_letters_need_extras(refused):
    refused("--labels letters needs extras/judges. Leave out --plain, or give", "rlaif")


def test_letters_come_from_extras(make_run, candidates, monkeypatch):
    def label_pairs(run, pairs):
        return [0.75] * len(pairs)
    monkeypatch.setattr(rlaif, "extra", lambda *_: SimpleNamespace(label_pairs=label_pairs))
    run = make_run("rlaif", "--candidates", str(candidates), "--labels", "letters")
    rlaif.collect(run)
    rows = data.read_records(run.folder / "preferences.jsonl")
    assert {row["probability"] for row in rows} == {0.75}
    assert train.count_of("pairs", collate(rlaif.items(run), run.model, "cpu"), run.cfg) == 30
