"""unlabelled.py: inputs without targets, and what must not be sampled for."""

import json

import pytest

import data
import eval as evaluation
from eval import Completion
from methods import candidates, groups, rewards, unlabelled


@pytest.fixture
def unlabelled_run(make_run, scored_stage, tmp_path):
    """A function that makes a run on a file of such lines."""
    def make(*records, flags=("--judge", "agreement")):
        path = tmp_path / "inputs.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return make_run(scored_stage, "--unlabelled", str(path), "--pool-per-task", "2",
                        "--probe-inputs", "1", *flags)
    return make


def line(task, text):
    """An input."""
    return {"task": task, "input": text}


def test_answers_are_sampled_to_the_inputs_of_the_file_alone(unlabelled_run):
    run = unlabelled_run(*(line(task, f"paul has a hat {k}") for k in (7, 7, 8, 9)
                           for task in ("person", "colour")))
    records = candidates.unanswered(run)
    assert {(x["task"], x["id"], x["input"]) for x in records} == {
        ("person", "line-1", "paul has a hat 7"), ("colour", "line-2", "paul has a hat 7"),
        ("person", "line-5", "paul has a hat 8"), ("colour", "line-6", "paul has a hat 8")}
    assert {x["target"] for x in records} == {None} and "targets" not in records[0]
    assert [x.input for x in unlabelled.pool_instances(run, run.tasks[0])][2] == "paul has a hat 9"


def test_the_questions_of_an_evaluation_are_left_out(unlabelled_run, capsys):
    run = unlabelled_run(line("person", "new"))
    asked = list(unlabelled.asked_inputs(run.tasks[0]))
    assert data.split_instances(run.tasks[0], "test")[0].input in asked
    pool = [x.input for x in data.split_instances(run.tasks[0], "pool")][:2]
    run = unlabelled_run(*(line(run.tasks[0].name, f" {text}\n") for text in [*asked, *pool]))
    assert {x["input"] for x in candidates.unanswered(run)} == set(pool) and len(asked) > 5
    assert f"{len(asked)} inputs are asked in an evaluation, and are left out." in (
        capsys.readouterr().out)


@pytest.mark.parametrize("record, said", [
    ({"task": "hat", "input": "x"}, 'line 2, names task hat, which --tasks does not have. Its '
                                    'tasks begin with colour, person. Fix'),
    ({"task": "person"}, 'line 2, is no input. Expected {"task": name, "input": text}.'),
    (["person", "x"], "line 2, is no input"), ({"task": "person", "input": 3}, "line 2, is no")])
def test_a_line_that_is_no_input_is_named(record, said, unlabelled_run):
    with pytest.raises(ValueError, match="inputs.jsonl, " + said):
        candidates.inspect(unlabelled_run(line("person", "x"), record))


def test_a_file_without_a_usable_input_is_refused(unlabelled_run):
    run = unlabelled_run(line("person", "x"))
    asked = data.split_instances(run.tasks[0], "dev")[0].input
    with pytest.raises(ValueError, match="inputs.jsonl has no input to sample for. Expected lines"):
        candidates.inspect(unlabelled_run(line(run.tasks[0].name, asked)))
    with pytest.raises(ValueError, match="round 2 finds no instance left"):
        candidates.inspect(unlabelled_run(line("person", "x"), flags=(
            "--judge", "agreement", "--rounds", "2")))


@pytest.mark.parametrize("judge", ["rule", "length"])
def test_judges_that_read_targets_are_refused(judge, refused, scored_stage, tmp_path):
    (tmp_path / "inputs.jsonl").write_text("")
    refused(f"--judge {judge} reads targets, and --unlabelled has none.", scored_stage,
            "--judge", judge, "--unlabelled", str(tmp_path / "inputs.jsonl"))


def test_a_whole_run_without_targets(command, make_run, scored_stage, tmp_path, monkeypatch):
    path = tmp_path / "inputs.jsonl"
    for task in ("person", "colour"):
        data.append_records(path, [line(task, f"anna has a hat {k}") for k in range(100, 108)])

    def complete(model, tokenizer, prompts, *rest, **options):
        return [Completion("red" if k % 3 else "blue", [5], True) for k in range(len(prompts))]
    monkeypatch.setattr(candidates, "complete", complete)
    folder = command(scored_stage, "--judge", "agreement", "--unlabelled", str(path),
                     "--reference-free", "--pool-per-task", "6", "--probe-inputs", "2")
    records = data.read_records(folder / "candidates.jsonl")
    assert {(x["response"], x["reward"]) for x in records} == {("red", 2), ("blue", 0)}
    assert {x["target"] for x in records} == {None}
    assert (folder / "adapter_config.json").exists()
    run = make_run(scored_stage, "--candidates", str(folder / "candidates.jsonl"))
    with pytest.raises(ValueError, match="colour/line-9 has no target, which --ce-target gold "
                                         "imitates. Give --ce-target best."):
        groups.known_target(groups.grouped_candidates(run)[0][0])
    command(scored_stage, "--candidates", str(folder / "candidates.jsonl"), "--no-plain",
            "--reference-free", "--probe-inputs", "2", out="again")


def test_a_self_judge_without_targets(make_run, scored_stage, tmp_path):
    path = tmp_path / "inputs.jsonl"
    data.append_records(path, [line("person", f"anna has a hat {k}") for k in range(100, 104)])
    run = make_run(scored_stage, "--judge", "self", "--unlabelled", str(path))
    run.cfg.plain = False  # with the canaries of extras/
    candidates.collect(run)
    records = data.read_records(run.folder / "candidates.jsonl")
    assert len(records) == 4 * 4 * 2 and {x["how"] for x in records} <= {"judged", "empty"}
    if evaluation.extra("judges", False):
        assert (run.folder / "canaries.json").exists()


@pytest.mark.parametrize("given", [True, False])
def test_the_self_judge_is_asked_without_a_reference_where_there_is_none(
        given, make_run, scored_stage, tmp_path):
    data.append_records(tmp_path / "inputs.jsonl", [{"task": "colour", "input": "a new hat"}])
    more = ["--unlabelled", str(tmp_path / "inputs.jsonl")] if given else []
    judge = rewards.make_judge(make_run(scored_stage, "--judge", "self", *more))
    assert judge.config.show_target is not given
