"""Questions with responses, a judge that needs no model, and a run of a stage for reports."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from eval import evaluate_responses
from extras.reports import MoreMetrics


class EqualJudge:
    """Similar means equal; a response that starts with "?" yields no verdict."""

    name = "equal"

    def similar_pairs(self, pairs):
        return [None if "?" in (a[:1], b[:1]) else a == b for _, a, b in pairs]


@pytest.fixture
def question():
    """A function that makes a question: question(responses, targets, task, ...)."""
    def make(responses, targets=("red",), task="colour", **more):
        return {"task": task, "input": more.pop("input", "a red lamp"), "targets": list(targets),
                "labels": None, "wordings": [f"wording {i}" for i in range(len(responses))],
                "responses": list(responses), "unfinished": 0, **more}
    return make


@pytest.fixture
def evaluate():
    """evaluate(questions, more): the metrics and the table of responses."""
    def run(questions, more=None):
        return evaluate_responses(questions, EqualJudge(), more=more or MoreMetrics())
    return run


@pytest.fixture
def without_references():
    """without_references(metrics, rows): the same as if no question had a reference."""
    def change(metrics, rows):
        names = ("exact_match", "consistent_and_correct", "rouge1", "rougeL")
        unknown = {"targets": [], **dict.fromkeys(names)}
        nothing = {"mean": None, "ci95": None, "n": 0, "ci95_tasks": None, "tasks": 0}
        changed = [row | unknown | {"correct": [None] * len(row["responses"])} for row in rows]
        return metrics | dict.fromkeys(names, nothing), changed
    return change


@pytest.fixture
def make_run(arguments):
    """make_run(stage, out, *flags): a run of the tiny world as train.py makes it."""
    import train
    from methods.settings import parse_config

    def make(stage, out, *more):
        cfg, method = parse_config(["--stage", stage, *arguments(out, *more, stage=stage)])
        Path(out).mkdir(exist_ok=True)
        return train.make_run(cfg, method, train.Alone())
    return make


@pytest.fixture
def settings():
    """Settings as eval.py has them."""
    return SimpleNamespace(prefix="best ", max_new_tokens=6, max_len=0, batch_size=8, seed=0,
                           reference="adapter")
