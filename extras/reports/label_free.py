"""A section of report.md on what is known of a run without targets (docs/agreement.md)."""

from collections import Counter

from extras.reports.tables import table
from methods.agreement import commonest_answers
from methods.groups import best_answers

SHOWN = 3  # answers of a task


def label_free_section(groups: list[list[dict]], measured: list[dict]) -> str:
    """Markdown: how many questions have a best answer, which ones, and agreement while training.

    groups: scored candidates by question; measured: the records of probe.jsonl. "" if there is
    nothing to tell.
    """
    parts = []
    if measured:
        rows = {str(record["step"]): {"agreement": {"mean": record["agreement"]}}
                for record in measured}
        parts += ["Agreement is CR of greedy answers to inputs that no answer was sampled for, "
                  "percent. A model that always says the same agrees with itself, so read it "
                  "beside the answers below.", table("after step", rows)]
    if groups:
        parts += ["Questions with a best answer among those sampled, and the commonest of these "
                  "answers, with the numbers of their questions.",
                  table("task", task_rows(groups))]
    if not parts:
        return ""
    return "\n## What is known without targets\n\n" + "\n\n".join(parts) + "\n"


def task_rows(groups: list[list[dict]]) -> dict[str, dict]:
    """{task: {"questions", "with a best answer", "best answers"}}."""
    rows, said = {}, []
    for group in groups:
        best, _ = best_answers(group)
        said.append((group[0]["task"], [x["response"] for x in best]))
    answers = commonest_answers(said)
    for task, n in Counter(task for task, _ in said).items():
        counts = answers.get(task, Counter())
        shown = [f"{text[:40]} ({count})" for text, count in counts.most_common(SHOWN)]
        rows[task] = {"questions": n, "with a best answer": counts.total(),
                      "best answers": ", ".join(shown)}
    return rows
