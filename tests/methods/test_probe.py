"""probe.py: agreement without targets, before and after, and training that ends by it."""

from dataclasses import replace

import pytest
import torch

import data
import eval as evaluation
import lora
import methods
import train
from methods import candidates as candidates_file
from methods import early, probe, schedule
from methods.unlabelled import pool_instances
from model import Sampling


@pytest.fixture
def probed(ready, scored_stage, candidates):
    """A function that makes a run of ten steps on given candidates that has begun."""
    def make(*more):
        run = ready(scored_stage, "--candidates", str(candidates), "--pool-per-task", "3",
                    "--wordings", "3", "--probe-inputs", "4", "--steps", "10", *more)
        run.method.begin(run)
        return run
    return make


def asked(run):
    """The questions that a run measures agreement on."""
    return probe.probe_questions(run, candidates_file.sampled_wordings)


@pytest.mark.parametrize("source", ["pool", "unlabelled"])
def test_the_questions_are_none_that_are_sampled_for(source, make_run, scored_stage, tmp_path):
    flags = ["--pool-per-task", "2", "--rounds", "2", "--probe-inputs", "3", "--wordings", "1",
             "--fresh-wordings", "9", "--pool-wordings", "4"]
    if source == "unlabelled":
        rows = [{"task": task, "input": f"input {k % 9}"} for task in ("colour", "person")
                for k in range(12)]  # some are there twice
        data.append_records(tmp_path / "inputs.jsonl", rows)
        flags += ["--unlabelled", str(tmp_path / "inputs.jsonl"), "--judge", "agreement"]
    run = make_run(scored_stage, *flags)
    found = asked(run)
    assert len(found) == 2 * 3 == len({(x["task"], x["input"]) for x in found})
    sampled = {(x["task"], x["input"]) for k in range(2)
               for x in candidates_file.unanswered(replace(run, round=k))}
    assert len(sampled) == 2 * 2 * 2 and not sampled & {(x["task"], x["input"]) for x in found}
    for task in run.tasks:
        own = [x for x in found if x["task"] == task.name]
        texts = [wording.text for wording in task.wordings["train"][1:3]]
        assert all(x["wordings"] == texts and not x["unseen"] for x in own)
        assert all(x["targets"] == [] for x in own)
    run.cfg.probe_inputs = 0
    assert asked(run) == []


def test_the_texts_of_a_file_of_candidates_are_not_asked(make_run, scored_stage, candidates):
    flags = ("--wordings", "0", "--pool-per-task", "1", "--probe-inputs", "99")
    run = make_run(scored_stage, *flags, "--candidates", str(candidates))
    given = {(x["task"], x["input"]) for x in data.read_records(candidates)}  # five of each task
    found = {(x["task"], x["input"]) for x in asked(run)}
    assert found and not found & given
    assert len(found) + len(given) == sum(len(pool_instances(run, task)) for task in run.tasks)
    # Of three wordings that no flag names, the file has one.
    records = data.read_records(candidates)
    first = run.tasks[0].wordings["train"][0].text
    candidates.unlink()
    data.append_records(candidates, [x | {"wording": first} for x in records])
    (found, *_) = asked(make_run(scored_stage, *flags, "--candidates", str(candidates)))
    assert found["task"] == run.tasks[0].name and found["unseen"]
    assert found["wordings"] == [x.text for x in run.tasks[0].wordings["train"][1:]]


@pytest.mark.parametrize("wordings, fresh, most, numbers", [
    (1, 0, 6, [1, 2]),  # two are left that no stage sees
    (0, 1, 6, [1, 2]),
    (0, 0, 6, [0, 1, 2]),
    (0, 0, 1, [0, 1]),  # a pair at least
    (2, 0, 6, [None, 0, 1]),  # one is left, which is no pair; None is the instruction
    (3, 0, 3, [None, 0, 1])])
def test_the_wordings_are_none_that_a_stage_sees(wordings, fresh, most, numbers, make_run,
                                                 scored_stage):
    run = make_run(scored_stage, "--wordings", str(wordings), "--fresh-wordings", str(fresh),
                   "--pool-wordings", str(most))
    for question in probe.probe_questions(run, candidates_file.sampled_wordings):
        (task,) = (task for task in run.tasks if task.name == question["task"])
        train = [wording.text for wording in task.wordings["train"]]
        assert len(train) == 3 and question["unseen"] == (wordings + fresh < 2)
        assert question["wordings"] == [
            task.definition if number is None else train[number] for number in numbers]


def test_the_answers_are_those_of_the_trained_model_without_sampling(probed, monkeypatch):
    seen = []
    monkeypatch.setattr(probe, "evaluate_responses", lambda answered, judge: (
        seen.append(answered) or {"cr": {"mean": 0.25}}, []))
    run = probed()
    answered = evaluation.answer_questions(lora.merge_lora(run.model), run.tokenizer, run.template,
                                           run.memory["probe"], Sampling(4))
    assert seen == [answered] and len({x for y in answered for x in y["responses"]}) > 8
    (record,) = data.read_records(run.folder / "probe.jsonl")
    assert record == {"step": 0, "agreement": 0.25, "commonest": probe.commonest(answered)}
    assert run.memory["best_agreement"] == 0.25
    run.method.prefix = lambda cfg: "said "  # what the trained model reacts to
    probe.measure(run, 3)
    marked = [x | {"wordings": ["said " + text for text in x["wordings"]]}
              for x in run.memory["probe"]]
    again = evaluation.answer_questions(lora.merge_lora(run.model), run.tokenizer, run.template,
                                        marked, Sampling(4))
    assert [x["responses"] for x in seen[1]] == [x["responses"] for x in again]
    assert [x["step"] for x in data.read_records(run.folder / "probe.jsonl")] == [0, 3]


def test_the_agreement_is_cr(probed, monkeypatch):
    monkeypatch.setattr(methods, "answer_questions", lambda model, tokenizer, template, questions,
                        sampling, **options: [x | {"responses": ["a", "A.", "b", "c"][:len(
                            x["wordings"])], "unfinished": 0} for x in questions])
    assert probed("--wordings", "1").memory["best_agreement"] == 1  # the pair of a and A.
    assert probed("--wordings", "2").memory["best_agreement"] == pytest.approx(1 / 3)
    assert probed("--wordings", "3").memory["best_agreement"] == pytest.approx(1 / 6)


def test_the_commonest_answer_is_that_of_most_questions():
    questions = [{"task": "t", "responses": ["a", "A.", "b"]}, {"task": "t", "responses": ["a"]},
                 {"task": "t", "responses": ["b", "b", "a"]}, {"task": "u", "responses": ["x"]}]
    assert probe.commonest(questions) == {"t": ["a", 2 / 3, 3], "u": ["x", 1.0, 1]}


def follow(run, monkeypatch, values):
    """What `measure_and_stop` gives in each of ten steps if these values are measured in turn."""
    values, found = iter(values), []
    monkeypatch.setattr(probe, "measure", lambda run, step: next(values))
    for step in range(run.cfg.steps):
        told = schedule.is_told(step, run.cfg)
        found.append(probe.measure_and_stop(run, step, told).get("agreement"))
        if run.cfg.steps == step + 1:
            return found


def test_it_is_measured_at_the_end_alone_without_patience(probed, monkeypatch):
    assert follow(probed(), monkeypatch, [0.5]) == [None] * 9 + [0.5]


@pytest.mark.parametrize("patience, values, best", [
    ("2", [0.90, 0.91, 0.91, 0.5], 2),  # of equal ones the earlier
    ("2", [0.90, 0.80, 0.95, 0.7, 0.6], 3),
    ("1", [0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99], 10),
    ("3", [0.0, 0.0, 0.0], 0)])
def test_training_ends_when_agreement_rises_no_more(patience, values, best, probed, monkeypatch,
                                                    capsys):
    run = probed("--patience", patience)
    weights, real = {}, probe.keep_weights

    def keep(run, step):
        for p in lora.adapter_weights(run.model).values():
            p.data += 1
        weights[step] = [p.clone() for p in lora.adapter_weights(run.model).values()]
        real(run, step)
    monkeypatch.setattr(probe, "keep_weights", keep)
    keep(run, 0)
    assert follow(run, monkeypatch, values) == values and run.cfg.steps == len(values)
    assert run.memory["best_step"] == best and run.model.training
    for p in lora.adapter_weights(run.model).values():
        p.data += 7
    records = [{"step": k, "agreement": k / 10, "commonest": {}} for k in range(11)]
    monkeypatch.setattr(probe.data, "read_records", lambda path: records)
    probe.finish(run)
    for p, wanted in zip(lora.adapter_weights(run.model).values(), weights[best], strict=True):
        assert torch.equal(p, wanted)
    said = capsys.readouterr().out
    assert f"with the weights of step {best}.\n" in said and (run.folder / "best").exists()
    early.discard_weights(run)
    assert not (run.folder / "best").exists()
    assert (f"{patience} measurements in a row brought no more agreement" in said) == (
        len(values) < 10)


def test_a_collapse_is_named(probed, monkeypatch, capsys):
    run = probed()
    before = {"colour": ["red", 0.6, 5], "person": ["tom", 0.8, 5], "few": ["a", 0.1, 4]}
    after = {"colour": ["red", 0.8, 5], "person": ["tom", 0.8, 5], "few": ["a", 1.0, 4]}
    records = [{"step": 0, "agreement": 0.5, "commonest": before},
               {"step": 10, "agreement": 0.75, "commonest": after}]
    monkeypatch.setattr(probe.data, "read_records", lambda path: records)
    probe.finish(run)
    said = capsys.readouterr().out
    assert "agree in 50.0 % of pairs before, and in 75.0 % with the weights of step 10." in said
    assert "inputs that are not sampled for, under wordings that are sampled under, agree" in said
    assert said.count("warning") == 1
    assert "80 % of 5 questions of task colour now get the answer 'red'. Agreement also" in said


def test_a_run_ends_early_by_itself(command, scored_stage, candidates):
    folder = command(scored_stage, "--candidates", str(candidates), "--steps", "30",
                     "--wordings", "3", "--patience", "2", "--lr", "1e-9", "--reference-free",
                     "--pool-per-task", "5")
    log, measured = (data.read_records(folder / name) for name in ("log.jsonl", "probe.jsonl"))
    assert [x["step"] for x in measured] == [0, 3, 6] and len(log) == 6
    assert [x["agreement"] for x in log if "agreement" in x] == [
        round(x["agreement"], 6) for x in measured[1:]]
    assert not (folder / "best").exists() and (folder / "adapter_config.json").exists()


def test_most_passes(make_run, scored_stage, candidates, capsys):
    for passes, steps in (("2", 5), ("0.1", 1), ("99", 10)):
        run = make_run(scored_stage, "--candidates", str(candidates), "--steps", "10",
                       "--batch-size", "4", "--max-passes", passes)
        assert len(schedule.items_to_train(run)) == 10 and run.cfg.steps == steps
    assert train.parse_config(["--stage", scored_stage])[0].max_passes == 0
    assert "10 steps of 4 are 4 passes over 10 items" in capsys.readouterr().out


def test_a_single_wording_has_no_agreement(make_run, scored_stage):
    run = make_run(scored_stage, "--wordings", "2", "--fresh-wordings", "9")
    assert asked(run) == []
    run.method.begin(run)
    assert probe.measure_and_stop(run, run.cfg.steps - 1, True) == {}
    probe.finish(run)


@pytest.mark.parametrize("flags", [("--probe-inputs", "0"), ("--pool-per-task", "999"),
                                   ("--wordings", "2", "--fresh-wordings", "1")])
def test_patience_without_anything_to_measure_is_refused(flags, make_run, scored_stage):
    run = make_run(scored_stage, "--patience", "2", *flags)
    with pytest.raises(ValueError, match="--patience measures agreement on inputs that are not"):
        run.method.inspect(run)


def test_passes_are_rounded(make_run, scored_stage, candidates):
    run = make_run(scored_stage, "--candidates", str(candidates), "--steps", "9", "--batch-size",
                   "1", "--max-passes", "0.7")
    schedule.items_to_train(run)
    assert run.cfg.steps == 7


def test_after_a_measurement_the_model_trains_on(ready, scored_stage, candidates):
    """A model without an adapter is not copied, and answers in eval mode itself."""
    run = ready(scored_stage, "--candidates", str(candidates), "--pool-per-task", "3", "--full",
                "--wordings", "3", "--steps", "10")
    run.method.begin(run)
    run.model.train()
    assert probe.measure_and_stop(run, 9, True) and run.model.training
