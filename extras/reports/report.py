"""The pages of an evaluation: report.md, and report.html with all questions.

Both are made of the same blocks. Texts of models and data appear in them as plain text.
"""

from pathlib import Path

import numpy as np

from eval import TABLE
from extras.judges.similar import NAMES
from extras.reports import page, plots
from extras.reports.agreement import letters, match_questions, rank_styles, rank_wordings
from extras.reports.metrics import paired_difference
from extras.reports.tables import Block, fixed, is_empty, markdown, plain, table

# What the columns of the table mean: the short name also for plots, and a definition.
MEANING = {
    "cr": ("consistency rate", "share of a question's pairs of responses that agree"),
    "mcr": ("maximum consistency rate", "share of a question's responses in its largest cluster"),
    "rouge1": ("ROUGE-1", "F1 of single words against the best reference"),
    "rougeL": ("ROUGE-L", "F1 of the longest common subsequence with the best reference"),
    "exact_match": ("exact match", "share of responses that equal a reference but for case, "
                                   "punctuation and spacing"),
    "consistent_and_correct": ("consistent and correct",
                               "share of pairs that agree and are both exact matches")}
INTERVALS = ("Percent. In brackets are 95 % intervals: the first for other questions of these "
             "tasks, the one after \"tasks\" for other tasks than these.")
PAIRED = ("Later minus earlier model in percentage points, question by question over the questions "
          "that both answered. Where an interval holds 0, chance may explain the difference.")
WITHIN = ("Within one wording: share of pairs of samples under the same wording that agree. The "
          "difference is what wording does beyond sampling noise.")
CONTROLS = "The same metrics of responses whose quality is known. Read the results between these."
TIES = ("Percent of questions, and their number, in which the answer is outside the question's "
        "largest cluster. If several clusters are the largest, each counts as the one with equal "
        "chance. Samples under one wording count as their mean.")


# ----- What both pages say -----
def write_report(folder: Path, results: dict, tables: dict, shown: int = 10) -> None:
    """Write report.md, report.html and plots; results, tables are those of eval.write_results."""
    names, questions = list(tables), match_questions(tables)
    blocks = make_blocks(results, questions)
    drawn = {"metrics": (plots.plot_bars, main_rows(results), caption(results))}
    alike = [rows for rows in questions if plots.is_complete(rows, names)]
    if alike:
        drawn["question"] = plots.plot_question, names, [list(rows.values()) for rows in alike]
    plots.save_plots(folder, drawn)
    parts = ["# Evaluation", describe(results, questions, markdown)]
    for block in blocks:
        parts += [f"## {block.title}", table(block.corner, block.rows), *block.notes]
        parts += ["![Metrics](plots/metrics.png)"] * (
            block.title == "Results" and (folder / "plots/metrics.png").exists())
    parts += sample_sections(results, questions, shown)
    if alike and (folder / "plots/question.png").exists():
        parts.append("The question on which the models' CR differ most:\n\n"
                     "![A question](plots/question.png)")
    text = "\n\n".join(part for part in parts if part)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    page.write_page(folder, describe(results, questions, plain), blocks, names, questions)


def number_of(counts: set[int], what: str) -> str:
    """Such as "1 task", "8 wordings" or "2 to 5 wordings"."""
    least, most = min(counts, default=0), max(counts, default=0)
    number = str(most) if least == most else f"{least} to {most}"
    return f"{number} {what}" + "s" * (most != 1)


def describe(results: dict, questions: list[dict], escape) -> str:
    """Which models, how many questions, tasks and wordings; escape: of the models' names."""
    tasks, wordings = set(), set()
    for rows in questions:
        for row in rows.values():
            tasks.add(row["task"])
            wordings.add(len(set(row["wordings"])))
    models = "Model" if len(results) == 1 else "Models compared"
    return (f"{models}: {', '.join(map(escape, results))}. Questions: {len(questions)} of "
            f"{number_of({len(tasks)}, 'task')}, {split_of(results)}, each under "
            f"{number_of(wordings, 'wording')}.")


def split_of(results: dict) -> str:
    """The split, where the results say it."""
    found = {str(settings_of(metrics).get("split") or "") for metrics in results.values()}
    split = found.pop() if len(found) == 1 else ""
    return f"{split} split" if split in ("dev", "test") else "split not recorded"


def settings_of(metrics: dict) -> dict:
    """What one model was evaluated with: all of "settings", and what stands beside the metrics."""
    names = ("split", "seed", "wordings", "samples", "temperature", "judge", "symmetrize",
             "rouge_threshold", "cluster", "use_stemmer")
    found = {name: metrics[name] for name in names if name in metrics}
    return found | (metrics.get("settings") or {})


def settings_rows(results: dict) -> dict:
    """A row per setting; where models differ, each model's value."""
    rows, all_settings = {}, {name: settings_of(found) for name, found in results.items()}
    for key in dict.fromkeys(key for settings in all_settings.values() for key in settings):
        values = {}
        for name, settings in all_settings.items():
            value = settings.get(key)
            values[name] = "-" if value in (None, "", [], {}) else str(value)
        text = "; ".join(f"{name}: {value}" for name, value in values.items())
        if len(set(values.values())) == 1:
            text = next(iter(values.values()))
        if text != "-":  # what nobody set
            rows[str(key).replace("_", " ")] = {"value": text}
    return rows


def shown_metrics(results: dict) -> dict[str, str]:
    """{metric: title} of the table, without metrics that no model has.

    Where no question has two responses there is no CR, and MCR would always be 100 %.
    """
    shown = {}
    for name, title in TABLE.items():
        needed = "cr" if name == "mcr" else name
        if not all(is_empty(found.get(needed)) for found in results.values()):
            shown[name] = title
    return shown or TABLE


def main_rows(results: dict, shown: dict | None = None) -> dict[str, dict]:
    """{model: {title: summary}}"""
    shown = shown or shown_metrics(results)
    return {model: {title: metrics.get(name) for name, title in shown.items()}
            for model, metrics in results.items()}


def caption(results: dict) -> str:
    """What a plot of the table needs to be read alone."""
    counts = {metrics["questions"] for metrics in results.values()}
    codes = [f"{title} = {MEANING.get(name, (title,))[0]}"
             for name, title in shown_metrics(results).items()]
    return f"Whiskers: 95 % intervals over {number_of(counts, 'question')}. {', '.join(codes)}"


def make_blocks(results: dict, questions: list[dict]) -> list[Block]:
    """The tables of both pages."""
    shown = shown_metrics(results)
    meanings = [f"{title}: {', '.join(MEANING[name])}." for name, title in shown.items()
                if name in MEANING]
    blocks = [Block("Results", "model", main_rows(results, shown),
                    (INTERVALS, " ".join(meanings))),
              Block("Differences", "difference, points", difference_rows(questions, results, shown),
                    (PAIRED,)),
              within_block(results),
              Block("Controls", "control", control_rows(results, shown), (CONTROLS,)),
              Block("Counts", "model", count_rows(results)),
              Block("Settings", "setting", settings_rows(results)),
              Block("Styles that break agreement", "style", rank_styles(questions), (TIES,)),
              Block("Wordings that break agreement", "task and wording", wording_rows(questions),
                    ("The ten that break it most often.", TIES))]
    return [block for block in blocks if block.rows]


def difference_rows(questions: list[dict], results: dict, shown: dict) -> dict[str, dict]:
    """Later minus earlier model: all pairs of up to four models, else to the first and the last."""
    rows, names = {}, list(results)
    for place, after in enumerate(names):
        earlier = names[:place]
        if len(names) > 4:
            earlier = dict.fromkeys(earlier[:1] + earlier[-1:])
        for before in earlier:
            both = [rows for rows in questions if before in rows and after in rows]
            tables = [[rows[name] for rows in both] for name in (before, after)]
            rows[f"{after} - {before}"] = {title: paired_difference(*tables, name)
                                           for name, title in shown.items()}
    return rows


def within_block(results: dict) -> Block:
    """CR beside the agreement of samples under one wording, where several were drawn."""
    rows = {}
    for model, metrics in results.items():
        within, rate = metrics.get("within"), metrics["cr"]
        if not is_empty(within) and not is_empty(rate):
            rows[model] = {"CR": rate, "within one wording": within,
                           "difference": metrics.get("wording_effect")}
    return Block("Wording and sampling noise", "model", rows, (WITHIN,))


def control_rows(results: dict, shown: dict) -> dict[str, dict]:
    """{control: its metrics}; one that is not the same for all models has a row for each."""
    rows, found = {}, {}
    for model, metrics in results.items():
        for control, values in (metrics.get("controls") or {}).items():
            row = main_rows({control: values}, shown)[control]
            found.setdefault(control, {})[model] = row
    for control, by_model in found.items():
        first, *others = by_model.values()
        if all(row == first for row in others):
            rows[control] = first
        else:
            rows |= {f"{control}, {model}": row for model, row in by_model.items()}
    return rows


def count_rows(results: dict) -> dict[str, dict]:
    """Counts; of verdicts only where a judge was asked, which rules never are."""
    rows = {}
    inexact = any(metrics.get("mcr_inexact") for metrics in results.values())
    for model, metrics in results.items():
        row = {name: metrics.get(name) for name in ("questions", "responses", "unfinished")}
        if metrics.get("judge") not in NAMES:
            row["unread verdicts"] = metrics.get("unparsed")
            if metrics.get("unread_share") is not None:
                row["unread, percent"] = fixed(100 * metrics["unread_share"], 1)
        if inexact:
            row |= {"questions whose MCR is only a lower bound": metrics.get("mcr_inexact"),
                    "MCR at most": metrics.get("mcr_upper")}
        if "kl" in metrics:  # --reference
            row["KL, nats per answer"] = metrics["kl"]["mean"]
        rows[model] = row
    return rows


def wording_rows(questions: list[dict], most: int = 10) -> dict[str, dict]:
    """The first wordings of the ranking, as a table."""
    rows = {}
    for entry in rank_wordings(questions)[:most]:
        rows[f"{entry['task']}: {entry['wording']}"] = entry["models"]
    return rows


# ----- Ten questions -----
def sample_sections(results: dict, questions: list[dict], shown: int) -> list[str]:
    """Markdown of some questions, spread evenly."""
    chosen = np.linspace(0, len(questions) - 1, min(shown, len(questions))).astype(int)
    split = split_of(results)
    whole = f"the {split}" if split.endswith(" split") else "all questions"
    note = f"Spread evenly over {whole}. A letter names the cluster of similar responses"
    if any(row["targets"] for rows in questions for row in rows.values()):
        note += ", a tick an exact match"
    parts = [f"## {number_of({len(chosen)}, 'question')}",
             f"{note}. All questions are in report.html."]
    for number, place in enumerate(chosen, 1):
        parts.append(f"### {number}. {question_section(questions[place])}")
    return parts


def question_section(found: dict[str, dict]) -> str:
    """One question, {model: its row}: a line per wording and sample, a column per model."""
    first, rows = next(iter(found.values())), {}
    for model, row in found.items():
        seen = {}
        for i, wording in enumerate(row["wordings"]):
            seen[wording] = seen.get(wording, 0) + 1
            sample = f" (sample {seen[wording]})" if seen[wording] > 1 else ""
            mark = letters(row["cluster"][i]) + " ✓" * bool(row["correct"][i])
            rows.setdefault(wording + sample, {})[model] = f"{mark} {row['responses'][i]}"
    reference = " / ".join(map(markdown, first["targets"])) or "none"
    return (f"{markdown(first['task'])}\n\nInput: {markdown(first['input'])}  \nReference: "
            f"{reference}\n\n{table('wording', rows)}\n")
