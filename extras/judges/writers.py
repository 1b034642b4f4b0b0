"""Texts that a backend writes: other wordings of instructions, revisions by principles."""

import random
import re
from collections.abc import Callable

from extras.judges.judges import shown_parts
from extras.judges.questions import TEXTS, ask_all, make_question
from judge import normalize

PRINCIPLES = tuple(TEXTS["writers"]["principles"])


def text_question(task: str, parts: dict[str, str]):
    """A question that wants a text."""
    return make_question(task, parts, system=TEXTS["question"]["writer"])


# ----- Wordings -----
def paraphrase(ask: Callable, tasks: dict[str, str], n: int, *, check: bool = True,
               temperature: float = 0.9, model: str = "") -> list[dict]:
    """Up to `n` wordings of each task's instruction, {task: instruction}, as records.

    A record says where a wording came from and why it was kept or not: {task, original, text,
    style, model, sample, temperature, kept, reason}. Equal texts are kept once. With `check`, the
    model is asked in both orders whether a wording asks for the same; only a clear yes keeps it.
    """
    records, styles = [], TEXTS["writers"]["styles"]
    seen = {(name, normalize(text)) for name, text in tasks.items()}
    for number in range(n):
        style = styles[number % len(styles)]
        task = TEXTS["writers"]["paraphrase"].replace("{style}", style)
        questions = [text_question(task, {"instruction": text}) for text in tasks.values()]
        replies = ask(questions, temperature=temperature, sample=number)
        for (name, original), reply in zip(tasks.items(), replies, strict=True):
            text, reason = unquote(reply.text), reply.failure
            if not reason and ("{input}" in original) != ("{input}" in text):
                reason = "lost a place holder"
            if not reply.failure and (name, normalize(text)) in seen:
                reason = "said already"
            seen.add((name, normalize(text)))
            records.append({"task": name, "original": original, "text": text, "style": style,
                            "model": model, "sample": number, "temperature": temperature,
                            "kept": not reason, "reason": reason})
    if check:
        check_meaning(ask, [record for record in records if record["kept"]])
    return records


def check_meaning(ask: Callable, records: list[dict]) -> None:
    """Keep only the records whose wording is clearly said to ask for the same, in both orders."""
    questions = []
    for record in records:
        for first, second in (("original", "text"), ("text", "original")):
            parts = {"first instruction": record[first], "second instruction": record[second]}
            questions.append(make_question(TEXTS["writers"]["equivalent"], parts,
                                           choices=("same", "different")))
    replies = ask_all(ask, questions) if questions else []
    for record, one, two in zip(records, replies[::2], replies[1::2], strict=True):
        unread = [reply.failure for reply in (one, two) if reply.verdict is None]
        if unread:
            record.update(kept=False, reason=f"not checked: {unread[0]}")
        elif "different" in (one.verdict, two.verdict):
            record.update(kept=False, reason="asks for something else")


def unquote(text: str) -> str:
    """The text without quotation marks or a code fence around all of it."""
    text = re.sub(r"\A```\w*\n(.*)\n```\Z", r"\1", text.strip(), flags=re.S).strip()
    if len(text) > 1 and text[0] + text[-1] in ('""', "''", "“”", "``"):
        return text[1:-1].strip()
    return text


# ----- Revisions -----
def constitutional(ask: Callable, items: list[dict], principles: list[str], *, rounds: int = 1,
                   seed: int = 0) -> list[dict]:
    """Critique and revision by principles (arXiv 2212.08073), one principle per item and round.

    Returns the items with "revision" and the "history" of each round. A round that fails leaves
    the text as it was; `revision` is None where no round succeeded.
    """
    if not principles:
        raise ValueError("constitutional revision needs principles. Give at least one sentence.")
    rows = [{**item, "revision": None, "history": []} for item in items]
    for number in range(rounds):
        drawn, shown, questions = [], [], []
        for i, row in enumerate(rows):
            principle = random.Random(f"{seed}/{number}/{i}").choice(principles)
            parts = shown_parts(row) | {"response": row["revision"] or row["response"]}
            questions.append(text_question(TEXTS["writers"]["critique"] + principle, parts))
            drawn.append(principle)
            shown.append(parts)
        critiques = ask(questions, sample=number)
        questions = []
        for principle, parts, critique in zip(drawn, shown, critiques, strict=True):
            if not critique.failure:
                parts = {**parts, "criticism": critique.text}
                questions.append(text_question(TEXTS["writers"]["revise"] + principle, parts))
        revisions = iter(ask(questions, sample=number))
        for row, principle, critique in zip(rows, drawn, critiques, strict=True):
            revision = critique if critique.failure else next(revisions)
            text = None if revision.failure else revision.text.strip()
            row["history"].append({"principle": principle, "critique": critique.text,
                                   "revision": text, "failure": revision.failure})
            row["revision"] = text or row["revision"]
    return rows
