"""bench/growth.py: the growth exponent, what arithmetic alone would take, the figure."""

import sys
from pathlib import Path

import pytest

from model import ModelConfig

sys.path.append(str(Path(__file__).parent.parent / "bench"))  # last: both have a judge.py
growth = pytest.importorskip("growth")

SMALL = ModelConfig(vocab_size=10, dim=4, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=2,
                    hidden_dim=6)


def test_the_exponent_is_that_of_a_power_law(capsys):
    assert growth.fit([1, 4, 16], [5.0, 10.0, 20.0])[0] == pytest.approx(0.5)
    assert growth.fit([100, 1000], [3.0, 3.0])[0] == pytest.approx(0)
    values = {1: [5.0, 4.0, 500.0], 4: [10.0, 8.0, 10.1], 16: [20.0, 16.0, 20.1]}
    growth.print_series("slots", values)  # an exponent of each column: 0.5 of the medians
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| slots | 1 | 5.0 | 4.0 | 500.0 |"
    assert rows[3].startswith("| slots | growth exponent | 0.50 | 0.50 | -1.16 |")


def test_the_operations_are_counted_by_hand(monkeypatch):
    """qkv 4 * 2 * (2 + 1 + 1) = 32, the rest of a block 4 * 2 * 2 + 3 * 4 * 6 = 88, the head 40."""
    monkeypatch.setattr(growth, "CONFIG", SMALL)
    # Every token has q, k, v and the first block; one of three has the last block's rest, and
    # logits. In both blocks a token sees 1, 2 or 3 others: 2 on average, with 2 heads of 2 numbers
    # each for the keys and again for the values.
    linears = 2 * 32 + 88 + 88 / 3 + 40 / 3
    assert growth.prompt_operations(3) == pytest.approx(2e-6 * (linears + 2 * (2 * 2 * 2 * 2)))
    # Responses are 230 - 200 = 30 of 230 tokens.
    linears = 2 * 32 + 88 + (88 + 40) * 30 / 230
    assert growth.group_operations(1) == pytest.approx(4e-6 * linears)


@pytest.mark.parametrize("name", growth.OPERATIONS)  # the other series take seconds
def test_a_series_is_measured(name, monkeypatch, capsys):
    monkeypatch.setattr(growth, "CONFIG", SMALL)
    growth.main(["--only", name, "--quick"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    sizes = growth.SERIES[name][1][:2]
    assert [row[:2] for row in rows[:2]] == [[name, str(n)] for n in sizes]
    for row, n in zip(rows, sizes, strict=False):
        assert float(row[2]) > 0 and row[2] == row[3] == row[4]  # one round
        assert row[5] == f"{growth.OPERATIONS[name](n):.1f}"
    assert rows[2][1] == "growth exponent" and len(rows) == 3


def test_a_prompt_of_8000_tokens_fits():
    assert max(growth.SERIES["prompt tokens"][1]) < growth.CONFIG.context


def test_the_figure_has_a_panel_and_a_fit_for_each_series(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    pages, save = [], Figure.savefig

    def savefig(page, path):
        pages.append(page)
        save(page, path)
    monkeypatch.setattr(Figure, "savefig", savefig)
    found = {name: {n: [n**0.25, n**0.25 * 1.1, n**0.25 * 0.9] for n in sizes}
             for name, (_, sizes) in growth.SERIES.items()}
    with matplotlib.rc_context():
        growth.plot(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert [axis.get_xlabel() for axis in pages[0].axes] == list(growth.SERIES)
    for axis in pages[0].axes:
        labels = [text.get_text() for text in axis.get_legend().get_texts()]
        assert labels[0] == "growth exponent 0.25"
        assert len(labels) == 1 + (axis.get_xlabel() in growth.OPERATIONS)
