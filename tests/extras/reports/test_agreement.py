"""Which wordings break agreement, against brute force; and which rows are the same question."""

import random
from fractions import Fraction
from itertools import permutations

import pytest

from extras.reports.agreement import (
    letters,
    match_questions,
    outside_largest,
    rank_styles,
    rank_wordings,
)


def test_ties_of_the_largest_cluster_by_hand():
    assert outside_largest([0, 0, 1]) == [0, 0, 1]
    assert outside_largest([0, 1, 0, 1, 2]) == [0.5, 0.5, 0.5, 0.5, 1]
    assert outside_largest([0, 1, 2, 3]) == [0.75] * 4


def test_outside_is_the_mean_over_all_ways_to_break_a_tie():
    """And so does not depend on the order of the responses."""
    rng = random.Random()
    for _ in range(50):
        cluster = rng.choices(range(3), k=rng.randrange(1, 7))
        ways = []
        for order in permutations(sorted(set(cluster))):
            largest = max(order, key=cluster.count)  # the first of equals
            ways.append([number != largest for number in cluster])
        wanted = [Fraction(sum(way[i] for way in ways), len(ways)) for i in range(len(cluster))]
        assert outside_largest(cluster) == pytest.approx([float(x) for x in wanted])


def test_wordings_are_ranked_per_task_and_model(question):
    def asked(task, answers, wordings, cluster, styles):
        return question(answers, task=task, styles=styles) | {
            "wordings": wordings, "cluster": cluster}
    rows = [asked("t", "aab", ["x", "y", "z"], [0, 0, 1], ["", "typo", "terse"]),
            asked("t", "aba", ["x", "y", "z"], [0, 1, 0], ["", "typo", "terse"]),
            asked("u", "aabc", ["x", "x", "z", "z"], [0, 0, 1, 2], ["", "", "typo", "typo"]),
            asked("u", "a", ["x"], [0], [""])]  # a single response cannot disagree
    found = {(entry["task"], entry["wording"]): entry["models"]["m"]
             for entry in rank_wordings(match_questions({"m": rows}))}
    assert found == {("u", "z"): {"share": 1.0, "n": 1}, ("t", "y"): {"share": 0.5, "n": 2},
                     ("t", "z"): {"share": 0.5, "n": 2}, ("t", "x"): {"share": 0.0, "n": 2},
                     ("u", "x"): {"share": 0.0, "n": 1}}
    assert list(found)[0] == ("u", "z") and set(list(found)[3:]) == {("t", "x"), ("u", "x")}
    styles = rank_styles(match_questions({"m": rows}))
    assert styles == {"typo": {"m": {"share": pytest.approx(2 / 3), "n": 3}},
                      "terse": {"m": {"share": 0.5, "n": 2}},
                      "plain": {"m": {"share": 0.0, "n": 3}}}
    assert list(styles) == ["typo", "terse", "plain"]
    without = [{name: value for name, value in row.items() if name != "styles"} for row in rows]
    assert rank_styles(match_questions({"m": without})) == {}
    assert len(rank_wordings(match_questions({"m": without}))) == 5
    short = [row | {"styles": ["typo"] * (len(row["responses"]) - 1)} for row in rows]
    assert rank_styles(match_questions({"m": short})) == {}  # whose style is whose is unknown


def test_rows_are_matched_by_task_and_id_or_input(question):
    rng = random.Random()
    rows = [question("ab", task=f"t{k % 3}", input=f"i{k}", id=str(k)) for k in range(30)]
    some = rng.sample(rows, 20)
    found = match_questions({"a": rows, "b": some, "c": []})
    assert [x["a"] for x in found] == rows
    assert sum("b" in x for x in found) == 20 and not any("c" in x for x in found)
    assert all(x["b"] is x["a"] for x in found if "b" in x)
    # Without an id somewhere, the input counts.
    bare = [{name: value for name, value in row.items() if name != "id"} for row in some]
    found = match_questions({"a": rows, "b": bare})
    assert len(found) == 30
    assert all(x["b"]["input"] == x["a"]["input"] for x in found if "b" in x)
    # A question that is there twice is matched in order.
    assert len(match_questions({"a": rows[:1] * 2, "b": rows[:1]})) == 2


def test_letters_go_on_after_z():
    names = [letters(number) for number in range(26 + 26 * 26 + 1)]
    assert names[:2] + names[25:28] + names[-1:] == ["A", "B", "Z", "AA", "AB", "AAA"]
    assert len(set(names)) == len(names)
