"""The Markdown page of an evaluation. Texts of models and data appear in it as plain text."""

import re
import string
from pathlib import Path

import numpy as np

from eval import TABLE
from extras.reports import plots
from extras.reports.metrics import paired_difference
from extras.reports.plots import printable


def markdown(text: str, width: int = 1000) -> str:
    """Text from outside for a Markdown table: no markup, link, HTML or control character."""
    if len(text) > width:
        text = text[:width - 1] + "…"
    return re.sub(r"([\\`*_\[\]<>#|~&$:@!])", r"\\\1", printable(text))


def cell(value) -> str:
    """A figure or a text: a share {"mean", "ci95"} in percent, a number with two digits."""
    if value is None or value == {} or isinstance(value, dict) and value.get("mean", 0) is None:
        return "-"
    if isinstance(value, dict) and "mean" in value:
        text = f"{100 * value['mean']:.1f}"
        for name, words in (("ci95", ""), ("ci95_tasks", "tasks ")):
            if value.get(name):
                text += " {}[{:.1f}, {:.1f}]".format(words, *(100 * x for x in value[name]))
        return text
    if isinstance(value, dict):
        return ", ".join(f"{markdown(key)} {cell(part)}" for key, part in value.items())
    return f"{value:.2f}" if isinstance(value, float) else markdown(str(value))


def table(corner: str, rows: dict[str, dict]) -> str:
    """A Markdown table from {name: {column: figure or text}}."""
    columns = list(next(iter(rows.values())))
    lines = [[corner, *map(markdown, columns)], ["---"] * (len(columns) + 1)]
    for name, row in rows.items():
        lines.append([markdown(name), *(cell(row.get(column)) for column in columns)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_report(folder: Path, results: dict, tables: dict, shown: int = 10) -> None:
    """Write report.md and plots; results and tables are those of eval.write_results."""
    rows, counts, changes, names = {}, {}, {}, list(tables)
    for model, metrics in results.items():
        rows[model] = {title: metrics[name] for name, title in TABLE.items()}
        counts[model] = {name: metrics[name] for name in (
            "questions", "responses", "unfinished", "unparsed", "judge", "cluster")}
        if any(found["mcr_inexact"] for found in results.values()):
            counts[model] |= {"questions whose MCR is only a lower bound": metrics["mcr_inexact"],
                              "MCR at most": metrics["mcr_upper"]}
        if "kl" in metrics:  # --reference
            counts[model]["KL, nats per answer"] = metrics["kl"]["mean"]
    parts = ["# Evaluation", table("model", rows),
             "Percent, with 95 % intervals: over questions, and over tasks, which is the one for "
             "other tasks than these."]
    for before, after in zip(names, names[1:], strict=False):
        changes[f"{after} - {before}"] = {
            title: paired_difference(tables[before], tables[after], name)
            for name, title in TABLE.items()}
    if changes:
        parts.append(table("difference, points", changes))
    questions = list(zip(*tables.values(), strict=True))  # the rows of all models
    chosen = np.linspace(0, len(questions) - 1, min(shown, len(questions))).astype(int)
    parts += [table("model", counts), f"## {len(chosen)} questions", "Spread evenly over the test "
              "set. A letter names the cluster of similar responses, a tick an exact match."]
    for number, place in enumerate(chosen, 1):
        found = dict(zip(names, questions[place], strict=True))
        parts.append(f"### {number}. {question_section(found)}")
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    drawn = {"metrics": (plots.plot_bars, rows)}
    if questions:
        drawn["question"] = plots.plot_question, names, questions
    plots.save_plots(folder, drawn)


def question_section(found: dict[str, dict]) -> str:
    """One question, {model: its row}: a line per wording, a column per model."""
    first, rows = next(iter(found.values())), {}
    for i, wording in enumerate(first["wordings"]):
        rows[wording] = {}
        for model, row in found.items():
            mark = string.ascii_uppercase[row["cluster"][i] % 26] + " ✓" * bool(row["correct"][i])
            rows[wording][model] = f"{mark} {row['responses'][i]}"
    return (f"{markdown(first['task'])}\n\nInput: {markdown(first['input'])}  \nReference: "
            f"{' / '.join(map(markdown, first['targets']))}\n\n{table('wording', rows)}\n")
