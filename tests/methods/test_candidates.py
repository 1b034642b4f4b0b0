"""candidates.py: what is sampled for which inputs, how it is judged, and going on."""

from dataclasses import replace

import pytest
import torch

import data
import judge as judging
import lora
from methods import candidates, heads, rewards


@pytest.fixture
def collecting(make_run, scored_stage):
    """A function that makes a run that samples four instances per task, judged by rules."""
    def make(*more):
        return make_run(scored_stage, "--judge", "rule", "--pool-per-task", "4", "--wordings", "3",
                        *more)
    return make


def test_every_instance_is_answered_under_several_wordings_several_times(collecting):
    run = collecting("--pool-wordings", "2", "--samples", "3")
    records = candidates.unanswered(run)
    assert len(records) == len({candidates.candidate_key(x) for x in records}) == 2 * 4 * 2 * 3
    for task in run.tasks:
        pool = {x.id: x for x in data.split_instances(task, "pool")[:4]}
        for x in (x for x in records if x["task"] == task.name):
            assert x["input"] == pool[x["id"]].input and x["target"] == pool[x["id"]].outputs[0]
            assert x["wording"] in candidates.sampled_wordings(task, run.cfg)
            assert x["instruction"] == task.definition


def test_each_round_takes_other_instances_until_none_is_left(collecting):
    run = collecting()
    first, second = ({x["id"] for x in candidates.unanswered(replace(run, round=number))}
                     for number in (0, 1))
    assert first and second and not first & second
    with pytest.raises(ValueError, match="round 9 finds no instance left"):
        candidates.unanswered(replace(run, round=8))


def test_rounds_that_no_instance_is_left_for_are_refused_before_the_first(collecting, tmp_path):
    candidates.inspect(collecting("--rounds", "2"))
    with pytest.raises(ValueError, match="round 6 finds no instance left to sample for. Lower --p"):
        candidates.inspect(collecting("--rounds", "9"))
    data.append_records(tmp_path / "given.jsonl", [{"task": "t"}])  # nothing is sampled then
    candidates.inspect(collecting("--rounds", "9", "--candidates", str(tmp_path / "given.jsonl")))


def test_fresh_wordings_are_those_beyond_training(collecting):
    run = collecting("--wordings", "1", "--fresh-wordings", "2")
    texts = {x["wording"] for x in candidates.unanswered(run) if x["task"] == "colour"}
    assert texts == {"colour :", "tell the colour"}
    said = "3 training wordings.*Lower --wordings, or give --fresh-wordings 0"
    with pytest.raises(ValueError, match=said):
        candidates.unanswered(collecting("--wordings", "3", "--fresh-wordings", "2"))


def test_all_outputs_of_an_instance_are_targets(collecting):
    run = collecting()
    run.tasks[0].instances = [replace(x, outputs=(*x.outputs, "other"))
                              for x in run.tasks[0].instances]
    records = candidates.unanswered(run)
    for x in records:
        several = x["task"] == run.tasks[0].name
        assert x.get("targets") == ([x["target"], "other"] if several else None)


def test_what_is_sampled_follows_seed_and_record_whatever_the_chunks(collecting):
    texts = []
    for more in ((), ("--eval-batch", "3"), ("--seed", "1")):
        run = collecting(*more)
        records = [x | {"wording": x["instruction"]} for x in candidates.unanswered(collecting())]
        texts.append([x["response"] for chunk in run.chunks(records, "x")
                      for x in candidates.answered(run, chunk)])
    assert texts[0] == texts[1]
    assert sum(a != b for a, b in zip(texts[0], texts[2], strict=True)) > 32


def test_each_answer_is_drawn_from_a_seed_of_its_own(collecting, monkeypatch):
    seen, complete = [], candidates.complete

    def note(*arguments, seeds=None, **options):
        seen.append(seeds)
        return complete(*arguments, seeds=seeds, **options)
    monkeypatch.setattr(candidates, "complete", note)
    run = collecting()
    records = candidates.unanswered(run)
    candidates.answered(run, records)
    candidates.answered(run, records[::-1])
    assert seen[0] == seen[1][::-1] and len(set(seen[0])) == len(records) == 64


def test_the_wordings_drawn_follow_the_seed(collecting):
    drawn = [[x["wording"] for x in candidates.unanswered(collecting("--pool-wordings", "1",
                                                                     "--seed", seed))]
             for seed in ("5", "5", "6")]
    assert drawn[0] == drawn[1] != drawn[2]


def test_collecting_writes_rewarded_answers_and_goes_on_behind_the_last(collecting):
    run = collecting()
    candidates.collect(run)
    path = run.folder / "candidates.jsonl"
    whole = path.read_bytes()
    for x in data.read_records(path):
        verdict = judging.RuleJudge(0.7).judge(rewards.with_labels(run, [x]))[0]
        assert (x["reward"], x["how"], x["expected"], x["correct"]) == (
            verdict.reward, verdict.how, verdict.type, verdict.correct)
        assert isinstance(x["response"], str) and isinstance(x["finished"], bool)
    assert len(data.read_records(path)) == 2 * 4 * 4 * 2
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:23]))
    candidates.collect(run)
    assert path.read_bytes() == whole


def test_candidates_may_be_collected_without_a_judge(collecting):
    run = collecting()
    candidates.collect(run, judged=False)
    records = data.read_records(run.folder / "candidates.jsonl")
    assert {(x["reward"], x["how"]) for x in records} == {(None, "unasked")}


def test_labels_of_a_closed_set_are_shown_to_rules(collecting):
    run = collecting()
    records = rewards.with_labels(run, candidates.unanswered(run))
    assert {len(x["labels"]) for x in records if x["task"] == "colour"} == {5}


@pytest.mark.parametrize("flags, kind", [
    (("--judge", "rule"), judging.RuleJudge), (("--judge", "self"), judging.LocalJudge),
    (("--judge", "length"), heads.ScoreJudge),
    (("--judge", "http", "--judge-model", "m"), judging.HttpJudge)])
def test_judges(flags, kind, make_run, scored_stage):
    run = make_run(scored_stage, *flags, "--rouge-threshold", "0.6", "--reward-steps", "one")
    judge = rewards.make_judge(run)
    assert type(judge) is kind
    if hasattr(judge, "config"):
        assert (judge.config.steps, judge.config.mode) == ("one", "gated")
    if kind is judging.RuleJudge:
        assert judge.rouge_threshold == 0.6


def test_the_self_judge_is_the_model_as_it_is(ready, scored_stage):
    run = ready(scored_stage, "--judge", "self")
    records = [x | {"response": "red hat"} for x in candidates.unanswered(run)[:3]]
    before = rewards.make_judge(run).judge(records)
    assert all(verdict.how == "judged" and 0 < verdict.p_expected < 1 for verdict in before)
    with torch.no_grad():
        for weight in lora.adapter_weights(run.model).values():
            weight.normal_(0, 0.2)
    assert rewards.make_judge(run).judge(records) != before


@pytest.mark.parametrize("wanted, flags", [
    ("--reward-model is for --judge reward, not rule", ("--judge", "rule", "--reward-model", ".")),
    ("--judge reward needs --reward-model", ("--judge", "reward")),
    ("--reward-model nowhere does not exist", ("--reward-model", "nowhere"))])
def test_flags_that_do_not_fit_are_refused(wanted, flags, refused, scored_stage):
    refused(wanted, scored_stage, *flags)


def test_the_line_below_the_table(make_run, scored_stage):
    run = make_run(scored_stage, "--wordings", "2", "--fresh-wordings", "1", "--judge", "rule")
    results = {"SFT(IA)": {"cr": {"mean": 0.475}}, "mine": {"cr": {"mean": 0.55}}}
    assert candidates.remark(run, results) == (
        "SFT(IA) saw targets under the instruction and 2 wordings of each task. Then the model's "
        "own answers under 1 others were rewarded by --judge rule: CR +7.5 points.")
    assert candidates.remark(run, {"mine": results["mine"]}) == ""  # nothing to compare with
    run.cfg.fresh_wordings = 9  # of which there is one
    assert "under 1 others" in candidates.remark(run, results)
    run.cfg.candidates = "given.jsonl"  # nothing was sampled or rewarded
    assert candidates.remark(run, results) == ""
    run.cfg.candidates, run.cfg.fresh_wordings = "", 0
    assert candidates.remark(run, results) == ""
