"""Plots: grouped bars, curves, and the responses to one question. Each function makes a figure."""

from pathlib import Path

import numpy as np


def printable(text: str) -> str:
    """The text on one line: control and format characters are written as escapes, such as \\n."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def save_plots(run: Path, plots: dict[str, tuple]) -> None:
    """Write plots/NAME.png of a run for each {NAME: (function that makes it, arguments)}.

    Without matplotlib a line says that there are none.
    """
    (run / "plots").mkdir(parents=True, exist_ok=True)
    try:
        import matplotlib
    except ImportError:
        print("plots skipped: matplotlib is not installed (pip install matplotlib)")
        return
    with matplotlib.rc_context(fname=Path(__file__).with_name("plots.mplstyle")):
        for name, (plot, *arguments) in plots.items():
            plot(*arguments).savefig(run / "plots" / f"{name}.png")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """A figure and the list of its axes, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def plot_bars(found: dict[str, dict]):
    """A group of bars per metric, a bar per name with its interval; {name: {title: summary}}."""
    titles, width = list(next(iter(found.values()))), 0.8 / len(found)
    figure, (axes,) = new_figure(max(7, 1.5 + 0.32 * len(titles) * (len(found) + 1)), 4)
    for k, (name, summaries) in enumerate(found.items()):
        means = np.array([100 * (summary["mean"] or 0) for summary in summaries.values()])
        low, high = 100 * np.array([summary["ci95"] or (0, 0) for summary in summaries.values()]).T
        whiskers = np.where(high > 0, np.abs([low - means, high - means]), 0)  # (2, metrics)
        at = np.arange(len(titles)) + (k - (len(found) - 1) / 2) * width
        axes.bar(at, means, width * 0.92, yerr=whiskers, label=printable(name[:40]),
                 ecolor="#444444")
    axes.set_xticks(range(len(titles)), titles)
    axes.set(xlim=(-0.55, len(titles) - 0.45), ylim=(0, 103), ylabel="percent")
    figure.legend(loc="outside upper center", ncols=min(len(found), 5))
    return figure


def plot_training(log_rows: list[dict], x: str = "step"):
    """A panel for each figure of the rows over x; for log.jsonl terms of the loss, norm and rate.

    Rows with the same x, such as the answers of a phase of PPO, give their mean. What was measured
    on held-out items is a second line in the panel of its term.
    """
    panels = {}  # {name: {x: [value]}}
    for row in log_rows:
        if type(row.get(x)) not in (int, float):
            raise ValueError(f"a row of the log has no {x} that is a number: {row!s:.200}. Restore "
                             "log.jsonl, or use another --out.")
        for name, value in row.items():
            if type(value) in (int, float) and name not in (x, "tokens", "seconds", "n"):
                panels.setdefault(name, {}).setdefault(row[x], []).append(value)
    held_out = {name: panels.pop(name) for name in list(panels) if name.startswith("validation_")}
    rows = -(-len(panels) // 3)
    figure, grid = new_figure(10, 0.3 + 2.2 * rows, rows, 3)
    for axes in grid[len(panels):]:
        axes.set_visible(False)
    for axes, (name, points) in zip(grid, panels.items(), strict=False):
        lines = {"trained on": points, "held out": held_out.get(f"validation_{name}", {})}
        for label, line in lines.items():
            if line:
                means = [np.mean(values) for values in line.values()]
                marker = "o" if len(line) < 10 else ""
                axes.plot(list(line), means, marker=marker, label=label)
        if lines["held out"]:
            axes.legend()
        axes.set(title=name, xlabel=x)
    return figure


def plot_question(names: list[str], questions: list[tuple]):
    """Responses to the question on which the CR of the models differ most.

    questions: a tuple of rows each, one per model.
    """
    def interest(rows):
        rates = [row["cr"] or 0 for row in rows]
        return np.ptp(rates), -min(rates)
    rows = max(questions, key=interest)
    n, style = len(rows[0]["wordings"]), {"fontsize": 8, "parse_math": False}
    figure, (axes,) = new_figure(4 + 1.9 * len(rows), 1.2 + 0.34 * n)
    for column, row in enumerate(rows):
        for i, text in enumerate(row["responses"]):
            cluster = row["cluster"][i]
            colour = f"C{cluster}" if row["cluster"].count(cluster) > 1 else "#BBBBBB"
            axes.barh(i, 0.96, 0.86, left=column - 0.48, color=colour, alpha=0.4)
            label = printable(text[:24]) + " ✓" * bool(row["correct"][i])
            axes.text(column, i, label, ha="center", va="center", **style)
    axes.set_yticks(range(n), [printable(text[:50]) for text in rows[0]["wordings"]], **style)
    axes.set_xticks(range(len(rows)), [printable(name[:24]) for name in names], **style)
    axes.set(xlim=(-0.5, len(rows) - 0.5), ylim=(n - 0.5, -0.5),
             xlabel="one colour: similar responses   grey: alone   ✓ exact match")
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    title = printable(f"{rows[0]['task'][:30]}: {rows[0]['input'][:60]}")
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure
