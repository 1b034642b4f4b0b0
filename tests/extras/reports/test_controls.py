"""Controls beside CR, and what is said of sampling."""

import random
from types import SimpleNamespace

import pytest

from extras.reports import MoreMetrics
from extras.reports.controls import add_controls, control_answers, describe, print_notes


class Rule:
    name = "rule"

    def __init__(self):
        self.asked = 0

    def similar_pairs(self, pairs):
        self.asked += len(pairs)
        return [False] * len(pairs)


def settings(**more):
    return SimpleNamespace(**{"judge": "rule", "similar": "", "controls": "auto", "seed": 0,
                              "symmetrize": "and", **more})


def made(question, evaluate, cfg, judge=None):
    rng = random.Random()
    questions = [question([rng.choice("abc") for _ in range(4)], ["a", "b"], task=f"t{k % 2}",
                          input=f"{k}") for k in range(6)]
    metrics, rows = evaluate(questions)
    results = {"m": metrics}
    add_controls(cfg, results, {"m": rows}, judge or Rule(), MoreMetrics())
    return results["m"].get("controls"), rows


def test_the_controls_are_what_they_are_called(question, evaluate):
    found, rows = made(question, evaluate, settings())
    assert list(found) == ["always the same answer", "reference answers", "shuffled answers"]
    assert found["always the same answer"]["cr"]["mean"] == 1
    assert found["reference answers"]["exact_match"]["mean"] == 1
    assert found["reference answers"]["cr"]["mean"] == pytest.approx(2 / 6)  # a b a b
    answers = control_answers(rows, seed=3)
    said = [text for row in rows for text in row["responses"]]
    [usual] = {text for row in answers["always the same answer"] for text in row}
    assert said.count(usual) == max(map(said.count, said))
    for task in ("t0", "t1"):  # a task keeps its answers
        own = [k for k, row in enumerate(rows) if row["task"] == task]
        dealt = [text for k in own for text in answers["shuffled answers"][k]]
        assert sorted(dealt) == sorted(text for k in own for text in rows[k]["responses"])
    assert control_answers(rows, seed=3) == answers


def test_single_questions_share_their_answers(question, evaluate):
    _, rows = evaluate([question([f"{k}"] * 4, task=f"t{k}") for k in range(30)])
    dealt = control_answers(rows, seed=1)["shuffled answers"]
    assert sum(len(set(row)) > 1 for row in dealt) > 20


def test_without_references_they_are_no_control(question, evaluate):
    metrics, rows = evaluate([question(["a", "b"], [])])
    results = {"m": metrics}
    add_controls(settings(), results, {"m": rows}, Rule(), MoreMetrics())
    assert list(results["m"]["controls"]) == ["always the same answer", "shuffled answers"]


@pytest.mark.parametrize("more, wanted", [
    ({"controls": "none"}, False), ({"judge": "http"}, False), ({"similar": "mine:f"}, False),
    ({"similar": "exact"}, True),
    ({"judge": "http", "controls": "all"}, True), ({}, True)])
def test_a_judge_is_asked_for_controls_only_if_they_are_wanted(more, wanted, question, evaluate):
    judge = Rule()
    found, _ = made(question, evaluate, settings(**more), judge)
    assert bool(found) == wanted == bool(judge.asked)


def test_the_settings_of_training_are_not_those_of_the_evaluation():
    cfg = {"split": "dev", "seed": 1, "samples": 2, "temperature": 1.0, "rouge_threshold": 0.7}
    for more, known in (({}, set(cfg)), ({"stage": "cat"}, {"split", "seed", "rouge_threshold"})):
        results = {"m": {}}
        describe(SimpleNamespace(**cfg, **more), results)
        assert set(results["m"]["settings"]) == known


def test_what_is_printed_of_them(question, evaluate, capsys):
    results, tables = {}, {}
    for model, answers in (("m", ["a", "a"]), ("n", ["a", "b"])):
        results[model], tables[model] = evaluate([question(answers, ["a"])])
    add_controls(settings(), results, tables, Rule(), MoreMetrics())
    print_notes(results)
    lines = [line.split(" | ")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["", "control", "always the same answer", "reference answers",
                     "shuffled answers: m", "shuffled answers: n"]


def test_answers_without_words_or_ends_are_counted_aloud(question, evaluate, capsys):
    metrics, _ = evaluate([question(["", " ", "a"], []) | {"unfinished": 2}, question(["a"], [])])
    print_notes({"m": metrics})
    assert capsys.readouterr().out.splitlines() == [
        "m: 2 of 4 answers are empty, and empty answers agree with each other.",
        "m: 2 of 4 answers were truncated at the length limit."]


def test_what_sampling_costs_is_said_where_it_is_known(question, evaluate, capsys):
    """One question has no interval; without a pair that was read, there is nothing to say."""
    own = {"wordings": ["w", "w", "v"], "styles": [""] * 3}
    metrics, _ = evaluate([question(["a", "b", "b"], []) | own])
    print_notes({"m": metrics})
    assert capsys.readouterr().out == (
        "m: two answers to one wording agree in 0.0 %, to two wordings in 50.0 %; the effect of "
        "wording beyond sampling: -50.0 points.\n")
    unknown = {"n": 0, "mean": None, "ci95": None}
    print_notes({"m": metrics | {"wording_effect": unknown}})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("more, wanted", [
    ({}, {"similar", "seed", "rouge_threshold", "temperature", "split"}),
    ({"judge": "http"}, {"similar", "seed", "temperature", "split"}),
    ({"similar": "exact"}, {"similar", "seed", "temperature", "split"}),
    ({"responses": ["a.csv"]}, {"similar", "seed", "rouge_threshold"})])
def test_settings_are_those_that_were_read(more, wanted):
    results = {"m": {"settings": {"k": 1}}}
    cfg = settings(rouge_threshold=0.7, temperature=0.0, split="dev", responses=[])
    vars(cfg).update(more)
    describe(cfg, results)
    assert results["m"]["settings"].keys() == wanted | {"k"}
