"""Intervals over tasks: coverage on simulated tasks, by hand, paired, and in what is written."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from eval import evaluate_responses, write_results
from extras.reports import MoreMetrics
from extras.reports.metrics import paired_difference, student_t, summarize


def simulate(rng, n_tasks, share):
    """Values in [0, 1] of tasks of 1 to 30 questions, and their tasks; share: between tasks."""
    values, tasks = [], []
    for task in range(n_tasks):
        middle = rng.normal(0.5, 0.1 * math.sqrt(share))
        own = rng.normal(middle, 0.1 * math.sqrt(1 - share), int(rng.integers(10, 31)))
        values += own.tolist()
        tasks += [task] * len(own)
    return values, tasks


@pytest.mark.faults
@pytest.mark.parametrize("n_tasks, correlation, least, trials", [
    (5, 0.5, 0.90, 400), (10, 0.3, 0.92, 400), (30, 0.3, 0.93, 400), (10, 0.0, 0.92, 400)])
def test_coverage_of_the_interval_over_tasks(n_tasks, correlation, least, trials):
    """Near 95 %; of the interval over questions, far below where the tasks differ.

    Five tasks of very different sizes count as fewer, so that there it is a little below.
    """
    rng, covered, control = np.random.default_rng(0), 0, 0
    for _ in range(trials):
        found = summarize(*simulate(rng, n_tasks, correlation))
        low, high = found["ci95_tasks"]
        covered += low <= 0.5 <= high
        low, high = found["ci95"]
        control += low <= 0.5 <= high
    assert least <= covered / trials <= 0.98, (covered, control)
    assert control / trials < 0.75 if correlation else control / trials > 0.9, (covered, control)


@pytest.mark.faults
@pytest.mark.parametrize("trials", [300])
def test_coverage_of_a_difference_is_paired_within_tasks(trials):
    """Two models that find the same tasks hard: the paired interval is right, and narrower."""
    rng, covered, narrower = np.random.default_rng(1), 0, 0
    for _ in range(trials):
        values, tasks = simulate(rng, 12, 0.5)
        gains = np.repeat(rng.normal(0.05, 0.02, 12), np.bincount(tasks))
        before = [{"cr": x, "task": task} for x, task in zip(values, tasks, strict=True)]
        after = [{"cr": x + gain + rng.normal(0, 0.02), "task": task}
                 for x, gain, task in zip(values, gains, tasks, strict=True)]
        low, high = paired_difference(before, after, "cr")["ci95_tasks"]
        covered += low <= 0.05 <= high
        alone = summarize(values, tasks)["ci95_tasks"]
        narrower += high - low < alone[1] - alone[0]
    assert 0.91 <= covered / trials <= 0.99 and narrower > 0.95 * trials


def test_the_clustered_error_by_hand():
    """Tasks (0, 1), (1, 1), (0): mean 0.6, sums of deviations -0.2, 0.8, -0.6."""
    found = summarize([0, 1, 1, 1, 0, None], ["a", "a", "b", "b", "c", "d"], span=None)
    error = math.sqrt(3 / 2 * (0.2**2 + 0.8**2 + 0.6**2)) / 5
    assert (found["tasks"], found["n"]) == (3, 5)
    assert found["ci95_tasks"] == pytest.approx([0.6 - 3.1824 * error * 4.3027 / 3.1824,
                                                 0.6 + 4.3027 * error])
    clipped = summarize([0, 1, 1, 1, 0], ["a", "a", "b", "b", "c"])["ci95_tasks"]
    assert clipped == [0, 1]


def test_one_task_and_tasks_that_are_all_alike():
    assert summarize([0.2, 0.7], ["a", "a"])["ci95_tasks"] is None
    assert summarize([], []) == {"mean": None, "ci95": None, "n": 0, "ci95_tasks": None, "tasks": 0}
    full = summarize([1.0] * 40, [k % 4 for k in range(40)])
    assert full["ci95_tasks"] == pytest.approx([4 / 7.84, 1])  # four tasks, none of which differs
    assert full["ci95"] == pytest.approx([40 / 43.84, 1])
    low, high = summarize([0.0, 1.0, 0.0, 1.0], ["a", "a", "b", "b"])["ci95_tasks"]
    assert low < 0.2 and high > 0.8  # two equal tasks are no proof that all are
    assert summarize([0.0] * 4, list("aabb"), span=None)["ci95_tasks"] == [0, 0]


def test_quantiles_of_student():
    torch = pytest.importorskip("torch")
    for df in (1, 2, 3, 4, 5, 9, 30, 200):
        x = torch.distributions.StudentT(float(df)).log_prob(
            torch.linspace(0, student_t(df), 200_001, dtype=torch.float64)).exp()
        assert torch.trapezoid(x, dx=student_t(df) / 200_000) == pytest.approx(0.475, abs=4e-4)


class Never:
    """Everything is similar but what stands in a set of forbidden pairs."""

    name = "never"

    def similar_pairs(self, pairs):
        return [abs(int(a) - int(b)) not in (1, 4) or int(a) // 5 != int(b) // 5
                for _, a, b in pairs]


def test_a_bound_is_marked_in_rows_metrics_and_report(question, tmp_path, monkeypatch):
    """Five-cycles in ten responses are found; in fifty the search gives up."""
    monkeypatch.setattr("extras.reports.metrics.bounded_clusters.__defaults__", (50,))
    asked = [question([str(k) for k in range(n)], task=f"t{n}") for n in (10, 50)]
    metrics, rows = evaluate_responses(asked, Never(), more=MoreMetrics())
    assert rows[0]["mcr"] == rows[0]["mcr_upper"] == 0.4
    assert rows[1]["mcr"] <= 0.4 < rows[1]["mcr_upper"]
    write_results(SimpleNamespace(out=tmp_path, plain=False), {"m": metrics}, {"m": rows})
    found = json.loads((tmp_path / "metrics.json").read_text())["m"]
    assert found["mcr_inexact"] == 1 and found["mcr"]["mean"] < found["mcr_upper"]["mean"]
    assert found["cr"]["tasks"] == 2 and len(found["cr"]["ci95_tasks"]) == 2
    text = (tmp_path / "report.md").read_text()
    assert "questions whose MCR is only a lower bound | MCR at most |" in text
    assert " tasks [" in text
    for cluster in ("component", "greedy"):
        _, (row, _) = evaluate_responses(asked, Never(), more=MoreMetrics(cluster=cluster))
        assert row["mcr"] == row["mcr_upper"]
