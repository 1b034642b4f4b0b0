"""hindsight.py: a bad response behind its judgment, a good one behind the plain prompt."""

import pytest

import data
from methods import hindsight
from methods.judged import judged_document


def test_each_response_stands_behind_its_judgment(make_run, judged):
    run = make_run("hindsight", "--records", str(judged), "--downsample", "0")
    found = [item["documents"] for item in hindsight.items(run)]
    for record in data.read_records(judged):
        document = judged_document(run, record, record["judgment"])
        text = run.tokenizer.decode(document["input_ids"])
        assert ("Judgment: wrong : blue ." in text) == bool(record["judgment"])
        assert found.count([document]) == 1
    assert len(found) == 12


def test_a_step_is_the_mean_of_means_and_micro_batches_change_nothing(
        ready, judged, written_out, same_in_parts):
    run = ready("hindsight", "--records", str(judged), "--downsample", "0")
    items, total = hindsight.items(run), 0.0
    for item in items:
        terms = written_out(run.model, item["documents"][0])
        total -= sum(terms) / len(terms)
    means = same_in_parts(run, items)
    assert means["ce"] == pytest.approx(total / len(items), rel=1e-5)


def test_the_command_samples_judges_and_trains(command):
    folder = command("hindsight", "--pool-per-task", "4")
    records, log = (data.read_records(folder / name) for name in ("judged.jsonl", "log.jsonl"))
    assert records and all(row["judgment"] for row in records) and len(log) == 3
