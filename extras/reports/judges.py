"""Pages about judges: against people's labels (LLMBar), and against exact rules."""

import json
import math
from pathlib import Path

from data import append_records
from extras.reports import plots
from extras.reports.tables import markdown, table


def judge_table(results: dict[str, dict]) -> str:
    """Markdown: for each evaluator and subset accuracy / agreement of both orders, in percent.

    Behind it stands the share of verdicts that could not be read, if there were any.
    """
    rows = {}
    for name, found in results.items():
        rows[name] = {}
        for subset, metrics in found.items():
            figures = [metrics[column]["mean"] for column in ("accuracy", "agreement")]
            text = " / ".join(map(percent, figures))
            if metrics["unread"]["mean"]:
                text += f" ({percent(metrics['unread']['mean'])} % unread)"
            rows[name][subset] = text
    return table("evaluator", rows)


def percent(share: float | None) -> str:
    """A share in percent, or "-"."""
    return "-" if share is None else f"{100 * share:.1f}"


def cost_table(costs: dict[str, dict]) -> str:
    """Markdown: what each evaluator took; costs: {evaluator: {what: number}}."""
    rows = {}
    for name, found in costs.items():
        rows[name] = found | {"seconds": f"{found['seconds']:.1f}"}
        if "cost" in found:
            rows[name]["cost"] = f"{found['cost']:.4f}"
    return table("evaluator", rows)


def own_table(results: dict[str, dict]) -> str:
    """Markdown: how often each evaluator prefers outputs of its own family, and people do."""
    return table("evaluator", {name: found["Average"]["own"] for name, found in results.items()})


def write_judge_report(out: Path, subsets: dict, results: dict, judged: dict, about: dict) -> None:
    """Write metrics.json, verdicts.jsonl, report.md and plots/judge.png.

    subsets: {subset: pairs}; judged: {evaluator: {subset: repeats of rows}}; results: for each
    evaluator what extras.judges.meta.summarize_judge says; about: of the whole, for metrics.json.
    """
    text = json.dumps({**about, "evaluators": results}, indent=2, allow_nan=False) + "\n"
    (out / "metrics.json").write_text(text)
    (out / "verdicts.jsonl").unlink(missing_ok=True)
    for name, found in judged.items():
        for subset, repeats in found.items():
            for repeat, rows in enumerate(repeats):
                place = {"evaluator": name, "subset": subset, "repeat": repeat}
                append_records(out / "verdicts.jsonl", [
                    place | pair | row for pair, row in zip(subsets[subset], rows, strict=True)])
    parts = ["# How far to trust the judge", f"Judge: {markdown(about['judge'])}. Accuracy / "
             "agreement of both orders, percent, over the verdicts that could be read; averages "
             "are over subsets, unweighted. The controls use no model.",
             judge_table(results | about["controls"]), "What each took in this run:",
             cost_table(about["costs"])]
    for name, found in about["annotators"].items():
        parts += [f"## The pool of {markdown(name)}", "Each annotator's agreement with people over "
                  "the pairs that were drawn for it, before and after verdicts were flipped.",
                  table("annotator", found)]
    if about.get("own"):
        parts += [f"## Outputs by {markdown(about['own'])}", "How often the judge and people "
                  "prefer them to others' outputs, percent, over all pairs.", own_table(results)]
    parts += [f"## {markdown(name)}\n\n{table('subset', results[name])}" for name in results]
    parts += [f"Asked: {markdown(json.dumps(usage))}" for usage in about["usage"]]
    (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    plots.save_plots(out, {"judge": (plot_judges, results)})


def plot_judges(results: dict[str, dict]):
    """Accuracy per subset, a bar per evaluator."""
    accuracy = {}
    for name, found in results.items():
        accuracy[name] = {}
        for subset, metrics in found.items():
            figure = metrics["accuracy"]
            if figure["mean"] is None:  # nothing was read: no bar
                figure = figure | {"mean": math.nan}
            accuracy[name][subset] = figure
    return plots.plot_bars(accuracy)


def confusion_section(found: dict, name: str) -> str:
    """Markdown: the rewards of a run against exact rules; found: extras.judges.confusion."""
    rows = {}
    for part in ("all", "asked"):
        for question in ("type", "correct", "best"):
            rows[f"{question}, {part}"] = found[part][question]
    return (f"\n## How far to trust the judge\n\nThe {markdown(name)} judge's rewards against "
            "exact rules. asked: different answers, without those that equal the shown target.\n\n"
            f"{table('question, answers', rows)}\n")
