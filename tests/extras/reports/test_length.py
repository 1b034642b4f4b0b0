"""length.py: rewards against lengths, by other formulae and by hand."""

import numpy as np
import pytest

from extras.reports.length import correlation, length_figures, length_section


def rows_of(table):
    return [{"group": group, "reward": reward, "length": length} for group, reward, length in table]


def test_correlations():
    x = [1.0, 2.0, 3.0, 4.0]
    assert correlation(x, [2.0, 4.0, 6.0, 8.0]) == pytest.approx(1)
    assert correlation(x, [1.0] * 4) is None and correlation([1], [1]) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_correlations_by_other_formulae(seed):
    rng, n = np.random.default_rng(seed), 60
    groups, lengths, rewards = rng.integers(0, 6, n), rng.permutation(n), rng.permutation(n) / 7
    found = length_figures(rows_of(zip(groups.tolist(), rewards, lengths, strict=True)))
    slope = np.polyfit(lengths, rewards, 1)[0]
    assert found["length"] == pytest.approx(slope * lengths.std() / rewards.std())
    # Spearman's without ties, from the differences of the ranks.
    d = rewards * 7 - lengths
    assert found["length_rank"] == pytest.approx(1 - 6 * (d ** 2).sum() / (n * (n ** 2 - 1)))
    # Within groups: what is left of both when each group has an intercept of its own.
    dummies = (groups[:, None] == np.arange(6)).astype(float)
    left = [x - dummies @ np.linalg.lstsq(dummies, x, rcond=None)[0]
            for x in (rewards, lengths.astype(float))]
    assert found["length_within"] == pytest.approx(
        left[0] @ left[1] / np.sqrt((left[0] ** 2).sum() * (left[1] ** 2).sum()))


def test_what_choosing_by_length_gains():
    found = length_figures(rows_of([("a", 2, 1), ("a", 0, 5), ("a", 1, 5),  # two are the longest
                                    ("b", 0, 1), ("b", 2, 2)]))
    assert found["any"] == 1 and found["best"] == 2
    assert found["longest"] == (0.5 + 2) / 2 and found["by_length"] == pytest.approx(0.25)
    assert "gains 25 % of what choosing by reward gains" in length_section(found)


def test_what_does_not_exist_is_none():
    same = length_figures(rows_of([("a", 1, 1), ("a", 1, 4)]))
    assert same["by_length"] is None and same["any"] == same["longest"] == same["best"] == 1
    assert "Choosing" not in length_section(same)
    assert set(length_figures([]).values()) == {None}
    rounded = length_figures(rows_of([(k % 3, 0.7, k) for k in range(9)]))  # and its sum rounds
    names = ("length", "length_rank", "length_within", "by_length")
    assert {rounded[name] for name in names} == {None}
    assert "| reward | - | - | - |" in length_section(length_figures([]))
