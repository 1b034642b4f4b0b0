"""Other people's judged responses, soft labels, and texts to pre-train on, in our own form.

All readers raise ValueError that names the file and the record.
"""

from pathlib import Path

from extras.formats.checks import (
    FILLED,
    NUMBER,
    TEXT,
    TEXT_OR_NULL,
    check,
    name_fields,
    refuse,
    show,
)
from extras.formats.rows import LONGEST_TEXT, read_lines, read_rows, read_text  # noqa: F401

SATISFIED = 7  # as in the CUT authors' converter: a score of 7 or more is satisfaction


def judged_rows(row: dict) -> list[dict]:
    """The judged responses of a row, under our own names."""
    if isinstance(row.get("completions"), list):  # UltraFeedback (arXiv 2310.01377)
        found = [{"instruction": row.get("instruction"), "response": answer.get("response"),
                  "judgment": answer["critique"], "score": answer.get("overall_score")}
                 for answer in row["completions"] if answer.get("critique")]
    elif "question" in row and "answer" in row:  # Shepherd (arXiv 2308.04592)
        found = [{"instruction": row["question"], "response": row["answer"],
                  "judgment": row.get("feedback", ""),
                  "refinement": row.get("output_correct") or None}]
    elif isinstance(row.get("data"), dict) and "passage" in row["data"]:
        found = judged_summaries(row["data"])
    else:  # our own, or the CUT authors' (arXiv 2312.14591)
        refuse("judgment" not in row, f'field "judgment" is missing; found: {name_fields(row)}. '
               "Expected a text, or null for a satisfying response.")
        found = [{"response": row.get("output"), "refinement": row.get("i_ans")} | row]
    for part in found:
        if isinstance(part.get("score"), int | float) and part["score"] >= SATISFIED:
            part["judgment"] = None
    return found


def judged_summaries(data: dict) -> list[dict]:
    """Critiques of summaries (arXiv 2206.05802): of the best answer to each question on a passage.

    Skipped and empty answers are left out.
    """
    found = []
    for question in data.get("questions") or []:
        ranks = question["rankings"]
        answer = question["answers"][ranks.index(max(ranks))]
        if answer["feedback"].get("skip"):
            continue
        critiques = answer["feedback"].get("critiques") or []
        refinement = critiques[-1]["refinement"] if critiques else None
        if answer["answer"] and bool(critiques) == bool(refinement):
            judgment = " ".join(critique["text"] for critique in critiques).strip() or None
            found.append({"instruction": f"{data['passage']['text']}\n{question['question']}",
                          "response": answer["answer"], "judgment": judgment,
                          "refinement": refinement})
    return found


JUDGED = {"instruction": FILLED, "input": TEXT, "response": FILLED, "judgment": (
    "a text, or null for a satisfying response", lambda x: x is None or FILLED[1](x)),
    "refinement": TEXT_OR_NULL, "target": TEXT_OR_NULL, "targets": (
    "a list of texts, or null", lambda x: not x or isinstance(x, list) and all(
        isinstance(text, str) for text in x))}


def read_judged(path) -> list[dict]:
    """Judged responses: {"id"} and the fields of JUDGED. A judgment of None means satisfaction."""
    found = []
    for parts, where in read_rows(path, "judged responses", judged_rows):
        for part in parts:
            record = {"id": str(part.get("id", len(found)))}
            record |= {name: part.get(name) for name in JUDGED}
            record["input"] = record["input"] or ""
            check(record, JUDGED, where)
            found.append(record)
    return found


# ----- Soft labels, texts -----
def read_labelled(path) -> list[dict]:
    """Pairs {input, first, second, probability} with a judge's soft label: that first is better."""
    share = "a number from 0 to 1", lambda x: NUMBER[1](x) and 0 <= x <= 1
    rows = read_rows(path, "pairs with first, second and probability")
    for row, where in rows:
        check(row, {"probability": share, "input": TEXT}, where)
        for side in ("first", "second"):
            check(row.get(side), {"wording": TEXT, "response": TEXT}, f"{where}, {side}")
    return [row for row, _ in rows]


def read_corpus(path) -> list[list]:
    """Documents to pre-train on, one a line: [[text, whether it is learnt], ...]."""
    documents = read_lines(read_text(Path(path)), path)
    for number, document in enumerate(documents, 1):
        parts = document if isinstance(document, list) else []
        sound = [isinstance(part, list) and len(part) == 2 and isinstance(part[0], str)
                 and isinstance(part[1], int) for part in parts]
        refuse(not parts or not all(sound), f"{path}, line {number} is {show(document)}. Expected "
               "a list of [text, true or false].")
    return documents
