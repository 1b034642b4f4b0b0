"""forward.py: the response, and as another document its judgment."""

import pytest

import data
from methods import forward
from methods.judged import critic_document, judged_document


def test_a_bad_response_brings_its_judgment_along(make_run, judged):
    run = make_run("forward", "--records", str(judged), "--downsample", "0")
    items, records = forward.items(run), data.read_records(judged)
    assert sorted(len(item["documents"]) for item in items) == [1] * 6 + [2] * 6
    for record in records:
        wanted = [judged_document(run, record)]
        if record["judgment"]:
            wanted.append(critic_document(run, record, record["judgment"]))
            assert "Judgment" not in run.tokenizer.decode(wanted[0]["input_ids"])
            assert run.tokenizer.decode(wanted[1]["input_ids"]).endswith("wrong : blue .")
        assert [item["documents"] for item in items].count(wanted) == 1


def test_a_step_equals_the_equation_and_micro_batches_change_nothing(
        ready, judged, written_out, same_in_parts):
    """Both parts are means over their tokens; their sum is divided by the number of responses."""
    run = ready("forward", "--records", str(judged), "--downsample", "0")
    items, total = forward.items(run), 0.0
    for item in items:
        for document in item["documents"]:
            terms = written_out(run.model, document)
            total -= sum(terms) / len(terms)
    means = same_in_parts(run, items)
    assert means["ce"] == pytest.approx(total / len(items), rel=1e-5)


def test_the_command_runs(command, judged):
    folder = command("forward", "--records", str(judged))
    log = data.read_records(folder / "log.jsonl")
    assert len(log) == 3 and all(row["ce"] > 0 for row in log)
