"""The bounded search for cliques against eval.clusters, and by construction."""

import signal
import sys

import numpy as np
import pytest

import eval as evaluation
from extras.reports.cliques import bounded_clusters
from extras.reports.metrics import components


def random_graph(rng, n, share):
    half = np.triu(rng.random((n, n)) < share, 1)
    return half | half.T | np.eye(n, dtype=bool)


def no_five_cycle(rings):
    """The complement of 5-cycles: the largest clique has two of each, colours need three."""
    n = 5 * rings
    similar = np.ones((n, n), dtype=bool)
    for v in range(n):
        after = v + 1 if v % 5 < 4 else v - 4
        similar[v, after] = similar[after, v] = False
    return similar


def is_partition(found, similar):
    assert sorted(sum(found, [])) == list(range(len(similar)))
    return all(similar[np.ix_(group, group)].all() for group in found)


def test_the_same_sets_as_the_course_finds():
    rng = np.random.default_rng()
    for _ in range(300):
        similar = random_graph(rng, int(rng.integers(1, 25)), rng.random())
        found, upper = bounded_clusters(similar)
        course = evaluation.clusters(similar)
        assert found == sorted(course, key=lambda group: (-len(group), group))
        assert upper == len(course[0])


@pytest.mark.parametrize("trials", [4, pytest.param(30, marks=pytest.mark.faults)])
def test_a_search_that_gives_up_bounds_the_largest_clique(trials):
    """Planted cliques and small budgets: the truth lies between size and bound, and is marked."""
    rng, inexact = np.random.default_rng(), 0
    for trial in range(trials):
        similar = random_graph(rng, 45, 0.7 + 0.25 * rng.random())
        (truth, *_), exact = bounded_clusters(similar)
        assert exact == len(truth)
        found, upper = bounded_clusters(similar, budget=trial)
        assert is_partition(found, similar) and len(found[0]) <= exact <= upper
        inexact += len(found[0]) < upper
    assert inexact >= trials / 2  # else nothing was tried


@pytest.mark.faults
@pytest.mark.parametrize("similar, largest", [
    (no_five_cycle(10), 20), (no_five_cycle(30), 60),
    (random_graph(np.random.default_rng(0), 150, 0.9), None),
    (np.ones((1100, 1100), dtype=bool), 1100), (np.eye(1100, dtype=bool), 1),
    (random_graph(np.random.default_rng(0), 1000, 0.5), None)],
    ids=["n=50", "n=150", "random 150", "all equal", "all different", "random 1000"])
def test_graphs_that_defeat_the_plain_search_end(similar, largest):
    found, upper = bounded_clusters(similar)
    assert is_partition(found, similar)
    assert len(found[0]) <= (largest or upper) <= upper
    if largest in (1, 1100):
        assert len(found[0]) == largest == upper


@pytest.mark.faults
def test_the_plain_search_goes_as_deep_as_the_largest_clique():
    before = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(1000)
        assert evaluation.clusters(np.ones((1100, 1100), dtype=bool)) == [list(range(1100))]
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.faults
def test_the_plain_search_does_not_end():
    """The control: it takes every branch."""
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.alarm(30)  # ten times what the bounded search takes
            evaluation.clusters(no_five_cycle(10))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def test_components_by_powers_of_the_matrix():
    rng = np.random.default_rng()
    for _ in range(20):
        similar = random_graph(rng, 30, 0.06)
        linked = np.linalg.matrix_power(similar.astype(float), 30) > 0
        assert sorted(components(similar)) == [
            np.flatnonzero(row).tolist() for v, row in enumerate(linked) if row.argmax() == v]
