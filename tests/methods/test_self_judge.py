"""self_judge.py: several questions, their priors, and a threshold from train instances."""

import math
from dataclasses import replace

import numpy as np
import pytest

import data
import judge as judging
from judge import TYPE_WORDS, VERDICT_WORDS
from methods import candidates, judge_auc, rewards, self_judge
from methods.judge_questions import UNFIT, taught_question, yes_question
from methods.self_judge import FREE, SelfJudge

QUESTIONS = (taught_question, yes_question)
KEYS = [("name it .", "a hat", "red", "blue"), ("name it .", "a hat", None, "red ### hat"),
        ("say it .", "", "red", "red one")]


def odds_of(prefix, suffix, words):
    """Log-odds that depend on all of a prompt, the same in every process."""
    return sum(map(ord, prefix + suffix + words[0])) % 97 / 40 - 1


class Asked:
    """Answers questions by `odds_of`, and keeps them."""

    def __init__(self):
        self.prompts = []

    def __call__(self, prefixes, suffixes, words):
        prompts = list(zip(prefixes, suffixes, words, strict=True))
        self.prompts += prompts
        return [(odds_of(*prompt) - 2, -2.0) for prompt in prompts]


def test_one_question_without_more_is_the_judge_that_is_taught():
    items = [{"instruction": a, "input": b, "target": c or "green", "response": d}
             for a, b, c, d in KEYS]
    asked, plain = Asked(), Asked()
    assert SelfJudge(asked).judge(items) == judging.LocalJudge(plain).judge(items)
    assert asked.prompts == plain.prompts and asked.prompts


@pytest.mark.parametrize("words", [TYPE_WORDS, VERDICT_WORDS])
def test_log_odds_are_means_over_questions_without_their_priors(words):
    for number in (1, 2):
        for free in ((), FREE):
            asked = Asked()
            judge = SelfJudge(asked, questions=number, prior=bool(free))
            found = judge.log_odds(KEYS, words)
            for key, odds in zip(KEYS, found, strict=True):
                wanted = 0
                for question in QUESTIONS[:number]:
                    wanted += odds_of(*question(key, words)) / number
                    for text in free:
                        prior = odds_of(*question((*key[:3], text), words))
                        wanted -= prior / number / len(free)
                assert odds == pytest.approx(wanted)
            assert len(set(asked.prompts)) == len(asked.prompts)  # nothing is asked twice


def test_questions_differ_in_words_and_keywords_and_show_what_they_should():
    for words in (TYPE_WORDS, VERDICT_WORDS):
        prompts = [question(KEYS[0], words) for question in QUESTIONS]
        assert len({pair for _, _, pair in prompts}) == len({x for _, x, _ in prompts}) == 2
        for question, (prefix, suffix, pair) in zip(QUESTIONS, prompts, strict=True):
            assert prefix.endswith("\n") and all(word.startswith(" ") for word in pair)
            assert "name it ." in prefix and "a hat" in prefix and "red" in prefix
            assert "blue" in suffix and "blue" not in prefix
            prefix, suffix, _ = question(KEYS[1], words)
            assert "eference" not in prefix and "red # hat" in suffix  # no section is opened
            assert "nput: " not in question(KEYS[2], words)[0]
    for question in QUESTIONS:
        assert question(KEYS[0], TYPE_WORDS)[1:] != question(KEYS[0], VERDICT_WORDS)[1:]


def test_judged_examples_stand_before_the_taught_question(make_run, scored_stage):
    run = make_run(scored_stage, "--judge", "self", "--self-questions", "2")
    task = run.tasks[0]
    train = {x.input: x.outputs[0] for x in data.split_instances(task, "train")}
    for flag, shown in (("--show-target", True), ("--no-show-target", False)):
        run = make_run(scored_stage, "--judge", "self", "--self-questions", "2", flag)
        judge = rewards.make_judge(run)
        key = (task.definition, "an input", "red" if shown else None, "blue")
        for words, name in ((TYPE_WORDS, "Type"), (VERDICT_WORDS, "Verdict")):
            prefix, *rest = judge.example_question(key, words)
            plain, *same = taught_question(key, words)
            assert prefix.endswith(plain) and rest == same
            first, second = prefix.removesuffix(plain).split("### Task: ")[1:]
            for text, order in ((first, 1), (second, -1)):
                lines = [line.split(": ", 1) for line in text.splitlines() if ": " in line]
                known = {name: value for name, value in lines[1:]}
                target = train[known["### Input"]]
                assert known.get("### Reference", target) == target
                assert ("### Reference" in known) == shown
                answers = [value for name, value in lines if name == "### Answer"][::order]
                said = [value for label, value in lines if label == f"### {name}"][::order]
                assert answers[0] == target and said == [word.strip() for word in words]
                wrong = answers[1]
                if words == TYPE_WORDS:
                    assert wrong == UNFIT
                else:
                    assert wrong != target and wrong in train.values()
    measured = {x.input for part in (0, 1) for name, x in judge_auc.train_instances(run, part)
                if name is run.tasks[0]}
    assert known["### Input"] not in measured
    run.tasks[0].instances = [replace(row, outputs=("red",)) for row in task.instances]
    assert self_judge.judged_examples(run, True)[task.definition, TYPE_WORDS] == ""


def test_a_prior_takes_away_what_a_judge_says_of_anything():
    def ask(prefixes, suffixes, words):
        return [(8.0 + ("red" in suffix), 0.0) for suffix in suffixes]
    keys = [("i", "x", None, "red"), ("i", "x", None, "blue")]
    for prior, wanted in ((False, [9, 8]), (True, [1, 0])):
        judge = SelfJudge(ask, questions=2, prior=prior)
        assert judge.log_odds(keys, VERDICT_WORDS) == pytest.approx(wanted)


def test_the_threshold_moves_the_probability():
    judge, key = SelfJudge(lambda *prompts: [(1.5, 0.0)]), KEYS[0]
    judge.thresholds[VERDICT_WORDS] = 2.0
    for words, wanted in ((TYPE_WORDS, 1.5), (VERDICT_WORDS, -0.5)):
        p = judge.probabilities([key], None, words)[key]
        assert p == pytest.approx(1 / (1 + math.exp(-wanted)))
    nan = SelfJudge(lambda *prompts: [(math.nan, 0.0)])
    assert nan.probabilities([key], None, VERDICT_WORDS) == {key: None}


@pytest.mark.parametrize("odds, right, wanted", [
    ([1, 2, 3, 4], [0, 0, 1, 1], 2.5),  # told apart, halfway
    ([-3, -2, 2, 3], [0, 0, 1, 1], 0.0),  # well as it is
    ([1, 2, 3, 9], [0, 1, 0, 1], 1.5),  # as good as 6, and nearer to 0
    ([1, 2], [1, 1], 0.0), ([1, 2], [0, 0], 0.0), ([], [], 0.0), ([5, 5], [0, 1], 0.0)])
def test_thresholds_by_hand(odds, right, wanted):
    assert self_judge.best_threshold(odds, right) == wanted


def test_no_threshold_is_better():
    rng = np.random.default_rng(0)
    right = rng.random(80) < 0.3
    odds = np.round(rng.normal(right * 1.0) + 3, 1)

    def balanced(cut):
        return (odds[right] > cut).mean() + (odds[~right] <= cut).mean()
    best = balanced(self_judge.best_threshold(odds.tolist(), right.tolist()))
    assert best == pytest.approx(max(balanced(cut) for cut in np.linspace(-1, 8, 901)))
    assert best > balanced(0.0)


def test_calibration_reads_train_instances_alone(make_run, scored_stage):
    run = make_run(scored_stage, "--judge", "self", "--self-calibrate")
    asked = Asked()
    judge = SelfJudge(asked)
    self_judge.calibrate(run, judge)
    inputs = {x.input for task in run.tasks for x in data.split_instances(task, "train")}
    for prefix, _, _ in asked.prompts:
        assert prefix.split("### Input: ")[1].split("\n")[0] in inputs
    assert {words for _, _, words in asked.prompts} == {TYPE_WORDS, VERDICT_WORDS}


def test_calibration_mends_a_judge_that_calls_all_correct(make_run, scored_stage):
    def ask(prefixes, suffixes, words):
        found = []
        for prefix, suffix in zip(prefixes, suffixes, strict=True):
            target = prefix.split("### Reference: ")[1].strip()
            answer = suffix.split("### Answer: ")[1].split("\n")[0]
            found.append((4.0 + (answer == target), 0.0))
        return found
    judge = SelfJudge(ask, judging.JudgeConfig(steps="one"))
    run = make_run(scored_stage, "--judge", "self")
    item = {"instruction": "i", "input": "x", "target": "red", "response": "blue"}
    assert judge.judge([item])[0].correct
    self_judge.calibrate(run, judge)
    assert judge.thresholds[VERDICT_WORDS] == 4.5 and judge.judge([item])[0].correct is False


def test_flags_make_the_judge(make_run, scored_stage):
    judge = rewards.make_judge(make_run(scored_stage, "--judge", "self"))
    assert type(judge) is judging.LocalJudge
    run = make_run(scored_stage, "--judge", "self", "--self-questions", "2", "--self-prior",
                   "--reward-steps", "one")
    judge = rewards.make_judge(run)
    assert judge.questions == (judge.example_question, yes_question)
    assert judge.free == FREE and judge.config.steps == "one"
    records = [x | {"response": "red hat"} for x in candidates.unanswered(run)[:3]]
    assert all(0 < verdict.p_correct < 1 for verdict in judge.judge(records))
    run = make_run(scored_stage, "--judge", "self", "--self-calibrate")
    assert any(rewards.make_judge(run).thresholds.values())


def test_flags_that_do_not_fit_are_refused(refused, scored_stage):
    refused("--self-questions is 3. There are 2; give 1 or 2.", scored_stage,
            "--self-questions", "3")
    assert len(SelfJudge(None, questions=9).questions) == 2
    refused("--self-questions is 0. Expected 1 or more", scored_stage, "--self-questions", "0")
    for flags in (["--self-questions", "2"], ["--self-prior"], ["--self-calibrate"]):
        refused("--self-calibrate are for --judge self, not rule", scored_stage, "--judge", "rule",
                *flags)
