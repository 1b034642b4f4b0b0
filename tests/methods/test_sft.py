"""sft.py: what it learns from, its loss, and that it moves the adapter and nothing else."""

import json

import pytest
import torch
from safetensors.torch import load_file

import data
import train
from methods import collate, sft

# ----- Items -----

def test_each_training_instance_is_asked_with_the_original_instruction(make_run):
    run = make_run("sft", "--per-task", "5", "--judge-share", "0")
    items, wanted = sft.items(run), []
    for task in run.tasks:
        train_ids = {x.id for x in data.split_instances(task, "train")}
        named = [item for item in items if item["name"].startswith(task.name + "/")]
        assert len(named) == 5 and {x["name"].partition("/")[2] for x in named} <= train_ids
        for x in data.split_instances(task, "train"):
            wanted.append([run.document(task.definition, x.input, x.outputs[0])])
    assert all(item["documents"] in wanted for item in items)


def test_documents_end_in_eos_which_is_learnt(make_run):
    run = make_run("sft", "--judge-share", "0")
    for item in sft.items(run):
        document, = item["documents"]
        assert document["input_ids"][-1] == document["labels"][-1] == run.tokenizer.eos_id


def test_a_share_of_the_examples_teaches_judging(make_run):
    counts = []
    for share in ("0", "0.2", "0.5"):
        names = [item["name"] for item in sft.items(make_run("sft", "--judge-share", share))]
        counts.append(sum(name.startswith("judging example") for name in names) / len(names))
    assert counts == pytest.approx([0, 0.2, 0.5], abs=0.01)


# ----- The step -----

def test_a_step_is_the_mean_over_tokens_and_micro_batches_change_nothing(
        ready, written_out, same_in_parts):
    run = ready("sft")
    items = sft.items(run)
    terms = [x for item in items for x in written_out(run.model, item["documents"][0])]
    means = same_in_parts(run, items)
    assert means["ce"] == pytest.approx(-sum(terms) / len(terms), rel=1e-5)


def test_golden_number(golden):
    model, documents = golden()
    batch = collate([{"documents": [x]} for x in documents], model, "cpu")
    loss = sft.step(model, batch, None)["ce"] / len(batch["targets"])
    assert loss.item() == pytest.approx(2.2177273310, rel=1e-6)


def test_the_loss_is_that_of_transformers(make_run, world):
    transformers = pytest.importorskip("transformers")
    run = make_run("sft")
    theirs = transformers.LlamaForCausalLM.from_pretrained(world / "model")
    for item in sft.items(run)[:5]:
        ids, labels = (torch.tensor(item["documents"][0][name]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            wanted = theirs(input_ids=ids[None], labels=labels[None]).loss.item()
            batch = collate([item], run.model, "cpu")
            found = sft.step(run.model, batch, run.cfg)["ce"].item() / len(batch["targets"])
        assert found == pytest.approx(wanted, rel=1e-5)


def test_documents_without_a_target_add_nothing(ready, gradients):
    run = ready("sft")
    items, empty = sft.items(run)[:3], []
    for item in items:
        ids = item["documents"][0]["input_ids"]
        blank = {"input_ids": ids, "labels": [data.IGNORE_INDEX] * len(ids), "truncated": 0}
        empty.append({"documents": [blank], "name": "empty"})
    means, wanted = gradients(run, items)
    for more, micro_tokens in ((items + empty, 10**9), (items + empty, 1)):
        found, grads = gradients(run, more, micro_tokens)
        assert found == pytest.approx(means, rel=1e-5)
        torch.testing.assert_close(grads, wanted, atol=1e-6, rtol=1e-4)
    found, grads = gradients(run, empty)
    assert found == {"ce": 0} and not grads.any()


# ----- Runs -----

def test_it_moves_the_adapter_and_nothing_else(command, world):
    before = {path.name: path.read_bytes() for path in (world / "model").iterdir()}
    folder = command("sft", "--no-evaluate")
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2  # A and B of seven linears in each of two layers
    assert all(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)
    assert before == {path.name: path.read_bytes() for path in (world / "model").iterdir()}
    log = data.read_records(folder / "log.jsonl")
    assert [row["step"] for row in log] == [0, 1, 2] and all(row["ce"] > 0 for row in log)


def test_it_learns_and_is_evaluated_beside_its_base(command):
    folder = command("sft", "--steps", "30", "--lr", "0.01", "--judge-share", "0", "--full")
    log = data.read_records(folder / "log.jsonl")
    assert log[-1]["ce"] < 0.5 * log[0]["ce"]
    assert list(json.loads((folder / "metrics.json").read_text())) == ["base", "SFT"]


def test_examples_are_a_matter_of_extras(refused, tmp_path):
    (tmp_path / "alpaca.json").write_text("[]")
    refused("--examples is read by extras/formats. Leave out --plain.", "sft", "--judge-share", "0",
            "--examples", str(tmp_path / "alpaca.json"))
    refused("--mix has 2 weights, and --examples 1 files", "sft", "--judge-share", "0",
            "--examples", str(tmp_path / "alpaca.json"), "--mix", "2", "1")
    refused("--mix has 1 weights, and --examples 1 files", "sft", "--judge-share", "0",
            "--examples", str(tmp_path / "alpaca.json"), "--mix", "2")
    two = ["--examples", str(tmp_path / "alpaca.json"), "--examples", str(tmp_path)]  # both count
    for weight in ("0", "-1", "two", "nan"):
        refused(f"--mix has a weight '{weight}'", "sft", "--judge-share", "0", *two, "--mix", "1",
                weight)
    refused("none.json does not exist", "sft", "--judge-share", "0", "--examples",
            str(tmp_path / "alpaca.json"), str(tmp_path / "none.json"))
    refused("--judge-share 0.3 takes --tasks, not --examples", "sft",
            "--examples", str(tmp_path / "alpaca.json"))
    assert train.parse_config(["--stage", "sft", "--plain"])[0].examples == []
