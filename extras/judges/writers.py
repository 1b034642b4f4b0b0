"""Texts that a backend writes: other wordings of instructions, revisions by principles."""

import random
import re
from collections.abc import Callable

from extras.judges.judges import shown_parts
from extras.judges.questions import TEXTS, ask_all, make_question
from judge import UNSPACED, normalize, split_numbers, split_words

PRINCIPLES = tuple(TEXTS["writers"]["principles"])
PLACE = r"\{(?:[A-Za-z_]\w*|\d*)\}"  # a place holder, as extras/formats/tasks.py reads wordings


def text_question(task: str, parts: dict[str, str]):
    """A question that wants a text."""
    return make_question(task, parts, system=TEXTS["question"]["writer"])


# ----- Wordings -----
def paraphrase(ask: Callable, tasks: dict[str, str], n: int, *, checker: Callable | None = None,
               known: dict | None = None, answers: dict | None = None, temperature: float = 0.9,
               model: str = "") -> list[dict]:
    """Up to `n` wordings of each task's instruction, {task: instruction}, as records.

    A record says where a wording came from and why it was kept or not: {task, original, text,
    style, model, sample, temperature, kept, reason}. Texts that are there already, also in `known`
    ({task: texts}), are not kept. Tasks in `answers` ({task: right answers}) are plain questions.
    A `checker`, a backend too, is asked in both orders whether a wording asks for the same; only a
    clear yes keeps it.
    """
    records, styles, answers = [], TEXTS["writers"]["styles"], answers or {}
    seen = {(name, normalize(text)) for name, text in tasks.items()}
    seen |= {(name, normalize(text)) for name, texts in (known or {}).items() for text in texts}
    for number in range(n):
        style, questions = styles[number % len(styles)], []
        for name, original in tasks.items():
            kind, wanted = "instruction", "paraphrase"
            if name in answers:
                kind, wanted = "question", "paraphrase_question"
            task = TEXTS["writers"][wanted].replace("{style}", style)
            questions.append(text_question(task, {kind: original}))
        replies = ask(questions, temperature=temperature, sample=number)
        for (name, original), question, reply in zip(tasks.items(), questions, replies,
                                                     strict=True):
            text, reason = unquote(reply.text), reply.failure
            if not reason and (reply.nonce or question.nonce) in text:
                reason = "repeats the prompt"
            reason = reason or find_fault(original, text, answers.get(name))
            if not reply.failure and (name, normalize(text)) in seen:
                reason = "said already"
            seen.add((name, normalize(text)))
            records.append({"task": name, "original": original, "text": text, "style": style,
                            "model": model, "sample": number, "temperature": temperature,
                            "kept": not reason, "reason": reason})
    if checker:
        check_meaning(checker, [record for record in records if record["kept"]], set(answers))
    return records


def find_fault(original: str, text: str, answers: list[str] | None = None) -> str:
    """Why a text is no wording of the original, as far as rules can see; "" if they see nothing.

    answers: the right ones, known or not, of a plain question; None for an instruction.
    """
    said, asked = normalize(text), normalize(original)
    if not said:
        return "empty"
    if asked in said and len(said) > 2 * len(asked):
        return "repeats the original"
    if "\n" in text.strip() and "\n" not in original.strip():
        return "has several lines"
    if ("{input}" in original) != ("{input}" in text):
        return "lost a place holder"
    for place in re.findall(PLACE, text):
        if place != "{input}" and place not in original:
            return "made up a place holder"
    for answer in map(normalize, answers or []):
        if answer and answer not in asked and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", said):
            return "gives an answer"
    numbers, others = split_numbers(asked)[1], split_numbers(said)[1]
    if sorted(map(str, numbers)) != sorted(map(str, others)):
        return "has other numbers"
    shared = content_words(asked) & content_words(said)
    if answers is not None and content_words(asked) and not shared:
        return "has no word of the original"
    asks = set(TEXTS["writers"]["asking"]) & set(split_words(said))
    if holds_question_mark(original) and not holds_question_mark(text) and not asks:
        return "asks nothing"
    return ""


def content_words(text: str) -> set[str]:
    """The words of a text that may say what it is about: those of four letters and more.

    Of a script without spaces between words, all letters.
    """
    return {word for word in split_words(text) if len(word) > 3 or UNSPACED.match(word)}


def holds_question_mark(text: str) -> bool:
    """Whether a text holds a question mark of some script."""
    return any(mark in text for mark in "?？؟՞")


def check_meaning(ask: Callable, records: list[dict], plain=frozenset()) -> None:
    """Keep only the records whose wording is clearly said to ask for the same, in both orders.

    plain: the tasks that are plain questions.
    """
    questions = []
    for record in records:
        kind = "question" if record["task"] in plain else "instruction"
        task = TEXTS["writers"]["equivalent"].replace("instruction", kind)
        for first, second in (("original", "text"), ("text", "original")):
            parts = {f"first {kind}": record[first], f"second {kind}": record[second]}
            questions.append(make_question(task, parts, choices=("same", "different")))
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
    if len(text) < 2 or text[0] + text[-1] not in ('""', "''", "“”", "``"):
        return text
    # In '"a" or "b"' the first mark inside closes what the first of all opened. An apostrophe in a
    # word is no mark.
    inner, marks = text[1:-1], f"[{text[0]}{text[-1]}]"
    first = re.search(rf"(?<!\w){marks}|{marks}(?!\w)", inner)
    if first and not inner[:first.start()][-1:].isspace():
        return text
    return inner.strip()


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
