"""reward.py: its loss by hand and against trl, which comparisons it learns, and that it learns."""

import json
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import data
from methods import collate, heads, reward
from model import save_model


@pytest.fixture
def step(monkeypatch):
    """A function that gives the terms of one item with the given rewards of its documents."""
    monkeypatch.setattr(heads, "document_rewards", lambda rewards, batch: rewards)

    def compute(rewards, better, worse, **values):
        documents = [{"input_ids": [1, 2], "labels": [-100, 2], "truncated": 0}] * len(rewards)
        item = {"documents": documents, "indices": {"better": better, "worse": worse},
                "values": {"pair_weights": [1.0] * len(better)} | values}
        return reward.step(rewards, collate([item], None, "cpu"), None)
    return compute


# ----- The loss -----

def test_the_loss_by_hand(step):
    rewards = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    found = step(rewards, [0, 2], [1, 0])
    losses = [math.log1p(math.exp(-1.5)), math.log1p(math.exp(-1.0))]
    assert found["loss"].item() == pytest.approx(sum(losses), abs=1e-12) and found["accuracy"] == 2
    found = step(rewards, [0, 2], [1, 0], pair_weights=[0.5, 0.25])
    assert found["loss"].item() == pytest.approx(0.5 * losses[0] + 0.25 * losses[1], abs=1e-12)
    found = step(rewards, [0, 2], [1, 0], probability=[0.25, 1.0])
    soft = 0.25 * losses[0] + 0.75 * math.log1p(math.exp(1.5)) + losses[1]
    assert found["loss"].item() == pytest.approx(soft, abs=1e-12)
    assert found["accuracy"] == 1  # the first pair's likelier order is the other one


def test_gradients_against_finite_differences(step):
    def loss(rewards):
        return step(rewards, [0, 2, 4], [1, 3, 0], probability=[0.875, 0.25, 1.0])["loss"]
    assert torch.autograd.gradcheck(loss, torch.randn(6, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_rewards_far_apart_give_finite_numbers(far, step):
    rewards = torch.tensor([far, -far], requires_grad=True)
    loss = step(rewards, [0], [1])["loss"]
    loss.backward()
    assert loss.isfinite() and rewards.grad.isfinite().all()


def test_loss_and_accuracy_are_those_of_trl(make_model, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    transformers = pytest.importorskip("transformers")
    model = make_model(64, 3)
    save_model(model, tmp_path / "model")
    model.value_head = torch.nn.Linear(32, 1, bias=False)
    theirs = transformers.LlamaForSequenceClassification.from_pretrained(
        tmp_path / "model", num_labels=1, pad_token_id=0).eval()
    with torch.no_grad():
        theirs.score.weight.copy_(model.value_head.weight)
    rows = [torch.randint(3, 64, (n,)) for n in (9, 4, 7, 6, 8, 3)]  # chosen, then rejected
    ids, mask = torch.zeros(6, 9).long(), torch.zeros(6, 9).long()
    for k, row in enumerate(rows):
        ids[k, :len(row)], mask[k, :len(row)] = row, 1
    log = defaultdict(lambda: defaultdict(list))
    trainer = SimpleNamespace(
        model=theirs, args=SimpleNamespace(center_rewards_coefficient=None), _metrics=log,
        _total_train_tokens=0,
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x))
    wanted = trl.RewardTrainer.compute_loss(trainer, theirs,
                                            {"input_ids": ids, "attention_mask": mask})
    items = []
    for first, second in zip(rows[:3], rows[3:], strict=True):
        documents = [{"input_ids": x.tolist(), "labels": [-100] + x[1:].tolist(), "truncated": 0}
                     for x in (first, second)]
        items.append({"documents": documents, "indices": {"better": [0], "worse": [1]},
                      "values": {"pair_weights": [1.0]}})
    found = reward.step(model, collate(items, model, "cpu"), None)
    assert found["loss"].item() / 3 == pytest.approx(wanted.item(), rel=1e-5)
    assert found["accuracy"].item() / 3 == pytest.approx(log["eval"]["accuracy"][0])


# ----- Items -----

def test_every_question_counts_once_and_a_tenth_is_held_out(make_run, candidates, monkeypatch):
    run = make_run("reward", "--candidates", str(candidates))
    monkeypatch.setattr(reward, "is_held_out", lambda record: record["task"] == "colour")
    items = reward.items(run)
    assert {item["name"].partition("/")[0] for item in items} == {"person"} and len(items) == 5
    for item in items:
        assert len(item["indices"]["better"]) == 5  # of rewards 2, 1, 0, 0
        assert sum(item["values"]["pair_weights"]) == pytest.approx(1)
    monkeypatch.undo()
    held = [reward.is_held_out({"task": "t", "id": str(k)}) for k in range(4000)]
    assert 0.08 < sum(held) / 4000 < 0.12
    assert held == [reward.is_held_out({"task": "t", "id": str(k)}) for k in range(4000)]


def test_soft_labels_come_from_a_file(make_run, tmp_path):
    row = {"task": "t", "id": "1", "number": 0, "instruction": "do", "input": "x",
           "first": {"wording": "w1", "response": "a"},
           "second": {"wording": "w2", "response": "b"}}
    data.append_records(tmp_path / "preferences.jsonl", [row | {"probability": 0.3}])
    run = make_run("reward", "--preferences", str(tmp_path / "preferences.jsonl"))
    reward.collect(run)  # nothing to sample
    assert not (run.folder / "candidates.jsonl").exists()
    item, = reward.items(run)
    assert item["values"] == {"probability": [0.3], "pair_weights": [1.0]}
    assert item["documents"] == [run.document("w1", "x", "a"), run.document("w2", "x", "b")]


def test_micro_batches_change_nothing(ready, candidates, same_in_parts):
    run = ready("reward", "--candidates", str(candidates))
    same_in_parts(run, reward.items(run))


# ----- Runs -----

def test_it_learns_the_order_of_the_answers(command, candidates):
    folder = command("reward", "--candidates", str(candidates), "--steps", "40", "--lr", "3e-3")
    log = data.read_records(folder / "log.jsonl")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[-1]["loss"] < 0.4 and log[-1]["accuracy"] > 0.8
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", heads.HEAD, "config.json", "log.jsonl"} <= files


def test_a_trained_one_rewards_the_right_answers_more(command, candidates, make_run):
    folder = command("reward", "--candidates", str(candidates), "--steps", "40", "--lr", "3e-3")
    run = make_run("reward", "--candidates", str(candidates))
    model = heads.open_reward_model(run, folder)
    records = data.read_records(candidates)
    scores = heads.reward_scores(run, model, records)
    by_reward = defaultdict(list)
    for record, score in zip(records, scores, strict=True):
        by_reward[record["reward"]].append(score)
    means = [sum(by_reward[reward]) / len(by_reward[reward]) for reward in (0, 1, 2)]
    assert means == sorted(means) and means[2] > means[0] + 1


def test_it_learns_from_soft_labels_and_with_all_weights(command, candidates, tmp_path):
    rows = []
    for k, record in enumerate(x for x in data.read_records(candidates) if x["reward"] == 2):
        about = {name: record[name] for name in ("task", "id", "instruction", "input")}
        rows.append(about | {"number": k, "first": record, "probability": 0.9,
                             "second": record | {"response": "hat"}})
    data.append_records(tmp_path / "preferences.jsonl", rows)
    folder = command("reward", "--preferences", str(tmp_path / "preferences.jsonl"), "--full",
                     behind=False)
    assert (folder / heads.HEAD).exists() and (folder / "model/config.json").exists()
    assert len(data.read_records(folder / "log.jsonl")) == 3
    assert not json.loads((folder / "config.json").read_text())["candidates"]


def test_wrong_flags_are_refused(refused, scored_stage):
    refused("trains one model, in one round. Leave --rounds out.", "reward", "--rounds", "2")
    refused("learns from another judge", "reward", "--judge", "reward", "--reward-model", ".")
    refused("--reward-model is for --judge reward", "reward", "--reward-model", ".")
    refused("has no value_head.safetensors", scored_stage, "--judge", "reward", "--reward-model",
            ".")
