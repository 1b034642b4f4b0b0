"""judged.py: who judges in words, what is collected, and what is learnt from it."""

import pytest

import data
import train
from eval import complete
from methods import critics, judged
from methods.judged import judged_records
from model import Sampling

IGNORE = data.IGNORE_INDEX


def test_who_writes_judgments(make_run, judged_stage):
    assert judged.make_critic(make_run(judged_stage)).name == "rule"
    assert judged.make_critic(make_run(judged_stage, "--judge", "self")).name == "self"
    with pytest.raises(ValueError, match="judgments by a server need extras/judges"):
        make_run(judged_stage, "--judge", "http", "--judge-model", "m")
    with pytest.raises(ValueError, match="--critic . holds no finished run"):
        make_run(judged_stage, "--judge", "self", "--critic", ".")


def test_collected_responses_carry_their_judgment(make_run, judged_stage):
    run = make_run(judged_stage, "--pool-per-task", "4")
    judged.collect(run)
    path = run.folder / "judged.jsonl"
    records, whole = data.read_records(path), path.read_bytes()
    assert records and all(x["response"].strip() for x in records)
    assert [x["judgment"] for x in records] == critics.RuleCritic().critique(records)
    assert all(x["wording"] == x["instruction"] for x in records)
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    judged.collect(run)
    assert path.read_bytes() == whole


def test_a_wording_that_places_the_input_is_placed_and_braces_in_texts_stay(
        make_run, judged_stage, monkeypatch):
    run = make_run(judged_stage)
    record = {"task": "t", "id": "0", "sample": 0, "wording": "{input} : which ?",
              "instruction": "{input} : which ?", "input": "the {x} hat", "target": "red"}
    monkeypatch.setattr(judged, "unanswered", lambda run: [record])
    monkeypatch.setattr(judged, "answered", lambda run, records: [
        x | {"response": "blue", "finished": True} for x in records])
    judged.collect(run)
    found, = data.read_records(run.folder / "judged.jsonl")
    assert (found["instruction"], found["input"]) == ("the {x} hat : which ?", "")
    found["instruction"] = "tom {input} ann"
    prompt = run.template.render("tom {input} ann", literal=True)
    assert "tom {input} ann" in prompt
    assert judged.judged_document(run, found) == data.encode_example(
        run.tokenizer, run.template, prompt, "blue", max_len=run.cfg.max_len)


def test_empty_responses_are_not_recorded_and_counted(make_run, judged_stage, monkeypatch, capsys):
    run = make_run(judged_stage, "--pool-per-task", "2")
    monkeypatch.setattr(judged, "answered", lambda run, records: [
        x | {"response": " " if x["task"] == "colour" else "red", "finished": True}
        for x in records])
    judged.collect(run)
    assert {x["task"] for x in data.read_records(run.folder / "judged.jsonl")} == {"person"}
    assert "2 empty responses were not recorded" in capsys.readouterr().out


@pytest.mark.parametrize("share, kept", [("0", 6), ("0.25", 0), ("0.5", 1), ("1.5", 4), ("9", 6)])
def test_satisfying_responses_are_thinned_out(share, kept, make_run, judged_stage, judged):
    rows = data.read_records(judged)
    rows = [x for x in rows if x["judgment"] is None] + [x for x in rows if x["judgment"]][:3]
    judged.unlink()
    data.append_records(judged, rows)
    run = make_run(judged_stage, "--records", str(judged), "--downsample", share)
    records = judged_records(run)
    assert [x["judgment"] for x in records] == ["wrong : blue ."] * 3 + [None] * kept
    assert len({x["input"] for x in records}) == 3 + kept  # none twice


def test_failed_judgments_are_dropped_and_counted(make_run, judged_stage, judged, capsys):
    rows = data.read_records(judged)
    rows[0]["judgment"] = " $ERROR$ "
    judged.unlink()
    data.append_records(judged, rows)
    run = make_run(judged_stage, "--records", str(judged))
    records = judged_records(run)
    assert [x["judgment"] for x in records] == ["wrong : blue ."] * 5 + [None]
    assert "6 unsatisfying responses (1 of them without a judgment, dropped), 6 satisfying ones" \
        in capsys.readouterr().out


def test_a_response_has_the_same_ids_with_and_without_a_judgment(make_run, judged_stage):
    run = make_run(judged_stage)
    row = {"instruction": "give the colour .", "input": "x", "response": ") odd : text"}
    documents = [judged.judged_document(run, row, text) for text in (None, "wrong : odd .")]
    plain, told = ([label for label in document["labels"] if label != IGNORE]
                   for document in documents)
    assert plain == told and len(documents[0]["input_ids"]) < len(documents[1]["input_ids"])


@pytest.mark.parametrize("wanted, flags", [
    ("--critic writes judgments only with --judge self", ("--critic", "x")),
    ("--downsample is -1.0", ("--downsample", "-1"))])
def test_flags_of_judged_stages_that_do_not_fit_are_refused(wanted, flags, refused, judged_stage):
    refused(wanted, judged_stage, *flags)


def test_a_model_without_tasks_or_records_is_refused(world, judged_stage, judged, capsys):
    argv = ["--stage", judged_stage, "--model", str(world / "model"), "--plain"]
    with pytest.raises(SystemExit):
        train.main(argv)
    assert "--records FILE" in capsys.readouterr().err
    cfg, _ = train.parse_config([*argv, "--records", str(judged)])
    assert cfg.tasks == ""


def test_written_texts_are_greedy_and_say_whether_they_ended(make_run, judged_stage):
    run = make_run(judged_stage, "--max-new-tokens", "5")
    asked = [("do", "x"), ("do", "y"), ("do", "x")]
    found = judged.write_texts(run, asked)
    prompts = [run.template.render(*pair) for pair in asked]
    wanted = [complete(run.model, run.tokenizer, [prompt], Sampling(5),
                       max_len=run.cfg.max_len)[0] for prompt in prompts]
    assert found == [(x.text, x.finished) for x in wanted] and found[0] == found[2]


def test_without_extras_a_record_without_a_judgment_is_named(make_run, judged_stage, tmp_path):
    data.append_records(tmp_path / "r.jsonl", [{"instruction": "a", "input": "", "response": "b"}])
    run = make_run(judged_stage, "--records", str(tmp_path / "r.jsonl"))
    with pytest.raises(ValueError, match='r.jsonl, line 1, has no field "judgment". Expected an'):
        judged_records(run)
