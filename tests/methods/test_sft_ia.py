"""sft_ia.py: instances under training wordings, dealt in turn or all of them."""

import json
from collections import Counter

import pytest

import data
import train
from methods import sft_ia


def wordings_of(run, items):
    """How often each wording stands in the prompts of the items."""
    texts = [run.tokenizer.decode(item["documents"][0]["input_ids"]) for item in items]
    return Counter(text.partition("Instruction: ")[2].partition("\n")[0] for text in texts)


def test_assign_deals_the_wordings_to_the_instances_in_turn(make_run):
    run = make_run("sft-ia", "--wordings", "3", "--per-task", "8", "--judge-share", "0")
    items = sft_ia.items(run)
    found = wordings_of(run, items)
    assert len(items) == 16 and len({item["name"] for item in items}) == 16
    for task in run.tasks:
        own = [task.definition, *(wording.text for wording in task.wordings["train"])]
        assert [found[text] for text in own] == [2] * 4


def test_product_asks_each_instance_with_every_wording(make_run):
    run = make_run("sft-ia", "--wordings", "2", "--augment", "product", "--per-task", "8",
                   "--judge-share", "0")
    items = sft_ia.items(run)
    found = wordings_of(run, items)
    assert len(items) == 2 * 8 * 3 and set(found.values()) == {8}
    assert set(Counter(item["name"] for item in items).values()) == {3}


def test_a_wording_changes_neither_input_nor_output(make_run):
    run = make_run("sft-ia", "--wordings", "3", "--augment", "product", "--judge-share", "0")
    outputs = {x.id: x.outputs[0] for task in run.tasks for x in task.instances}
    for item in sft_ia.items(run):
        text = run.tokenizer.decode(item["documents"][0]["input_ids"])
        assert text.endswith("Response: " + outputs[item["name"].partition("/")[2]])


def test_held_out_wordings_are_never_learnt(make_run):
    run = make_run("sft-ia", "--wordings", "99", "--augment", "product")
    learnt = wordings_of(run, sft_ia.items(run))
    for task in run.tasks:
        held_out = {wording.text for split in ("dev", "test") for wording in task.wordings[split]}
        assert held_out and not held_out & learnt.keys()


def test_without_wordings_it_is_sft(make_run):
    from methods import sft
    assert sft_ia.items(make_run("sft-ia", "--wordings", "0")) == sft.items(make_run("sft"))


def test_a_step_is_the_mean_over_tokens_and_micro_batches_change_nothing(
        ready, written_out, same_in_parts):
    run = ready("sft-ia", "--wordings", "3")
    items = sft_ia.items(run)
    terms = [x for item in items for x in written_out(run.model, item["documents"][0])]
    means = same_in_parts(run, items)
    assert means["ce"] == pytest.approx(-sum(terms) / len(terms), rel=1e-5)


def test_the_command_shows_it_beside_sft(command):
    folder = command("sft-ia", "--wordings", "3")
    assert list(json.loads((folder / "metrics.json").read_text())) == ["base", "SFT", "SFT(IA)"]
    assert len(data.read_records(folder / "sft/log.jsonl")) == 3


def test_alone_it_neither_trains_nor_shows_sft(arguments, tmp_path):
    argv = arguments(tmp_path / "run", "--plain", "--steps", "2", "--no-compare", stage="sft-ia")
    assert train.main(["--stage", "sft-ia", *argv]) == 0
    assert not (tmp_path / "run" / "sft").exists()
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [title for title, row in found.items() if isinstance(row, dict)] == ["SFT(IA)"]
