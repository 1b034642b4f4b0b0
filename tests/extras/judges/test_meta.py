"""Figures about a judge, by hand."""

import pytest

from extras.judges.meta import (
    check_sources,
    cohen_kappa,
    judge_metrics,
    length_bias,
    retest_agreement,
    self_preference,
    summarize_judge,
    wilson,
)
from extras.judges.pairs import SUBSETS, evaluate_by_rule

PAIR = {"input": "Name a colour.", "output_1": "Red.", "output_2": "A nice thing.", "label": 1}


def rows(*winners):
    """Rows of pairs.evaluate_pairs with these winners in both orders."""
    return [{"winners": list(pair), "draw": False, "failures": []} for pair in winners]


def test_kappa_by_hand():
    assert cohen_kappa([1, 1, 2, 2], [1, 1, 2, 2]) == 1
    assert cohen_kappa([1, 2, 1, 2], [1, 1, 2, 2]) == 0
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed 0.7, expected 0.5 * 0.6 + 0.5 * 0.4
    first, second = [1] * 25 + [0] * 25, [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa([1, 1], [1, 1]) is None and cohen_kappa([], []) is None


def test_figures_of_a_judge_by_hand():
    pairs = [PAIR | {"label": label} for label in (1, 2, 1, 2)]
    judged = rows("11", "22", "12", (None, "2"))
    judged[2]["draw"], judged[3]["failures"] = True, ["http 400: long"]
    found = judge_metrics(pairs, judged)
    assert found["accuracy"]["mean"] == pytest.approx((1 + 1 + 0.5 + 1) / 4)  # of what was read
    assert found["accuracy_both"]["mean"] == found["agreement"]["mean"] == pytest.approx(2 / 3)
    assert found["accuracy"]["n"] == 4 and found["agreement"]["n"] == 3
    assert found["unread"] == {"mean": 1 / 8, "n": 8}
    assert (found["n"], found["verdicts"], found["unparsed"], found["draws"]) == (4, 8, 1, 1)
    assert found["failures"] == {"http 400": 1} and found["kappa_orders"] is not None
    assert judge_metrics(pairs, rows("11", "22", "11", "22"))["kappa"] == 1


def test_length_bias_by_hand():
    pairs = [{"input": "i", "output_1": "x" * 100, "output_2": "x" * 50, "label": label}
             for label in (1, 2, 2, 2)]
    pairs.append({"input": "i", "output_1": "abc", "output_2": "abcd", "label": 1})  # too near
    found = length_bias(pairs, [["1", "1"], ["1", "2"], ["2", None], ["1", "1"], ["2", "2"]])
    assert found == {"verdicts": 7, "longer_wins": 5 / 7, "longer_is_right": 2 / 7,
                     "accuracy_longer_right": 1.0, "accuracy_shorter_right": 2 / 5}
    winners = [row["winners"] for row in evaluate_by_rule(pairs, "longer")]
    assert length_bias(pairs, winners)["longer_wins"] == 1.0
    assert length_bias([], [])["longer_wins"] is None


def test_what_was_not_read_is_missing_and_not_wrong():
    pairs = [PAIR | {"label": label} for label in (1, 2, 1, 2)]
    read = judge_metrics(pairs, rows("11", "21", "12", "22"))
    more = judge_metrics(pairs + [PAIR] * 3, rows("11", "21", "12", "22", *[(None, None)] * 3))
    for name in ("accuracy", "accuracy_both", "agreement", "kappa", "kappa_orders"):
        assert more[name] == read[name]
    assert more["unread"]["mean"] == 3 / 7 and read["unread"]["mean"] == 0
    nothing = judge_metrics(pairs, rows(*[(None, None)] * 4))
    for name in ("accuracy", "accuracy_both", "agreement"):
        assert nothing[name] == {"mean": None, "ci95": None, "n": 0}
    assert nothing["kappa"] is nothing["kappa_orders"] is None and nothing["unread"]["mean"] == 1


def test_retest_by_hand():
    found = retest_agreement([rows("11", "12"), rows("11", "11"), rows("12", "12")])
    assert found["mean"] == pytest.approx((4 / 6 + 4 / 6) / 2)
    assert retest_agreement([rows("11")]) is None
    # An unread verdict is missing.
    assert retest_agreement([rows((None, "1")), rows((None, "1"))])["mean"] == 1
    assert retest_agreement([rows((None, "1")), rows(("1", "2"))])["mean"] == 0
    assert retest_agreement([rows((None, "1")), rows(("1", None))])["mean"] is None


def test_self_preference_by_hand():
    pairs = [PAIR | {"label": 2, "source_1": "acme-7b", "source_2": "other"},
             PAIR | {"label": 1, "source_1": "other", "source_2": "ACME-13b"},
             PAIR | {"label": 1, "source_1": "acme-7b", "source_2": "acme-13b"}, PAIR,
             PAIR | {"source_1": "acme-7b"}]
    winners = [["1", "1"], ["1", "2"], ["1", "1"], ["1", "1"], [None, None]]
    found = self_preference(pairs, winners, "acme")
    assert [found[name]["mean"] for name in ("judge", "people", "difference")] == [0.75, 0, 0.75]
    assert {found[name]["n"] for name in found} == {2}
    assert found["difference"]["ci95"][0] <= 0.75 <= found["difference"]["ci95"][1]
    swapped = self_preference(pairs[:1] * 20 + pairs[1:2] * 20, [["2", "2"]] * 40, "Acme")
    assert swapped["judge"]["mean"] == 0.5 == swapped["difference"]["mean"]
    everything = summarize_judge({"x": pairs[:1], "y": pairs[1:]}, {
        "x": [rows("11")], "y": [rows("12", "11", "11", (None, None))]}, own="acme")
    assert everything["Average"]["own"] == found and everything["x"]["own"]["judge"]["n"] == 1


def test_sources_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="--own acme needs to know who wrote the outputs, and no"):
        check_sources([PAIR], "acme")
    known = PAIR | {"source_1": "other", "source_2": "zeta"}
    with pytest.raises(ValueError, match="no pair has one output by acme and .* are other, zeta"):
        check_sources([PAIR, known], "acme")
    with pytest.raises(ValueError, match="no pair has one output by e and one by another"):
        check_sources([known], "e")  # both hold it
    check_sources([PAIR, known], "Zeta")


def test_the_average_is_over_the_published_sets():
    def average(names):
        judged = {name: [rows("22" if name == "Mine" else "11")] for name in names}
        found = summarize_judge({name: [PAIR] for name in names}, judged)
        assert found[names[0]]["retest"] is None
        return found["Average"]["accuracy"]["mean"], "Adversarial" in found
    names = list(SUBSETS)
    assert average(names) == average([*names, "Mine"]) == (1, True)
    assert average([*names[:4], "Mine"]) == (0.8, False)
    assert average([*names[1:], "Mine"]) == (0.8, True)


def test_an_average_over_nothing_is_none():
    judged = {"x": [rows("11", (None, "1"))], "y": [rows((None, None), (None, None))]}
    found = summarize_judge({"x": [PAIR] * 2, "y": [PAIR] * 2}, judged)["Average"]
    assert found["accuracy"]["mean"] is None and found["accuracy"]["ci95"] is None
    assert found["unread"] == {"mean": 5 / 8, "n": 8}


def test_intervals_of_averages():
    pairs = [PAIR] * 40
    judged = {name: [rows(*["11"] * 30, *["22"] * 10)] for name in SUBSETS}
    found = summarize_judge({name: pairs for name in SUBSETS}, judged)
    (low, high), (wide, wider) = (found[name]["accuracy"]["ci95"] for name in ("Average", "Manual"))
    assert wide < low < found["Average"]["accuracy"]["mean"] == 0.75 < high < wider
    assert found["Average"]["accuracy"]["n"] == 200


def test_wilson_intervals_by_hand():
    assert wilson(0, 0) is None
    assert wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert wilson(0, 20) == pytest.approx([0.0, 0.1611], abs=1e-4)
