"""Evol-Instruct (WizardLM): a model makes instructions harder or rarer, round by round.

    a round: instruction --one of six ways--> new instruction --> is more in it? --> answer

An instruction whose evolution is eliminated goes back into the pool as it was. arXiv 2304.12244.
"""

import random
import re
from collections.abc import Callable

from extras.judges.questions import Unread, make_question
from extras.judges.recipes import (
    DATA,
    FILTERS,
    PROMPTS,
    SEED_APART,
    TEMPERATURE,
    ask_answer,
    ask_writer,
    drop,
    find_answer_fault,
    make_row,
    read_written,
    text_after,
)
from extras.judges.writers import unquote
from judge import normalize, split_words

WAYS = (*DATA["evolving"], "widen")  # five deepen, one widens; each as likely as the others
COPIED_WORDS = 6  # in a row that also stand in the prompt
# "Revised instruction: ", "**New prompt**: ", "Sure! Here's a harder version of the instruction: "
NAMED = r"(?:instructions?|prompts?|version|rewrite)"
PREAMBLE = re.compile(
    r"(?i)(?:(?:sure|certainly|of course|okay)\b.{0,40}[!.,:：]\s*)?[# \t]*(?P<mark>[*_]{0,3})"
    rf"(?:(?:here(?:['’]s| is)|this is)\b[^\n:：]{{0,60}}\b{NAMED}\b[^\n:：]{{0,60}}"
    rf"|(?:(?:the|my) )?(?:{'|'.join(FILTERS['evolved'])}) (?:{NAMED}|question|task)"
    r"|(?:instruction|prompt))(?P<tail>[#*_ \t]*)[:：]")


def evolve(ask: Callable, seeds: list[str], settings) -> list[dict]:
    """Instructions that grow from seeds, with their answers, of every round (arXiv 2304.12244).

    A row's step is the way in which it evolved. Examples are {"instruction", "input", "output"}
    with an empty input. Raises JudgeStopped if too few verdicts can be read.
    """
    pool, rows = list(seeds), []
    known, verdicts = set(map(normalize, seeds)), Unread(ask, settings.max_unparsed)
    for number in range(settings.rounds):
        sample = SEED_APART * settings.seed + number
        ways = []
        for i in range(len(pool)):
            ways.append(random.Random(f"evol/{settings.seed}/{number}/{i}").choice(WAYS))
        made = write_evolved(ask, pool, ways, sample)
        for row in made:
            row["round"] = number + 1
            if row["kept"] and normalize(row["text"]) in known:
                drop(row, "said already")
            known.add(normalize(row["text"]))
        # What costs nothing has dropped its rows by now; a verdict is cheaper than an answer.
        check_gain(verdicts, [row for row in made if row["kept"]])
        write_answers(ask, [row for row in made if row["kept"]], sample)
        for i, row in enumerate(made):
            if row["kept"]:
                pool[i] = row["text"]
        rows += made
    return rows


def write_evolved(ask: Callable, pool: list[str], ways: list[str], sample: int) -> list[dict]:
    """One row for each instruction of the pool, evolved in one of WAYS."""
    questions, rows = [], []
    for source, way in zip(pool, ways, strict=True):
        name, how = "deepen", DATA["evolving"].get(way, "")
        if way == "widen":
            name = "widen"
        questions.append(ask_writer(name, {"instruction": source}, length="short", how=how))
    replies = ask(questions, temperature=TEMPERATURE, sample=sample)
    for source, way, question, reply in zip(pool, ways, questions, replies, strict=True):
        text, reason = read_written(question, reply, quoted=True)
        text = unquote(strip_preamble(text, source))
        prompt = question.messages[1]["content"].partition("\n\n")[0]
        if not reason and not text:
            reason = "empty"
        if not reason and copies_prompt(text, source, prompt):
            reason = "copies words of the prompt"
        rows.append(make_row(way, source, text, reason))
    return rows


def strip_preamble(text: str, source: str) -> str:
    """The text without a first sentence that announces it, unless its source has one, too."""
    match = PREAMBLE.match(text)
    if not match or PREAMBLE.match(source):
        return text
    return text_after(match, text[match.end():])


def copies_prompt(text: str, source: str, prompt: str) -> bool:
    """Whether a text holds words of the prompt that made it, which its source does not hold.

    That is one of a list of phrases, or six words in a row.
    """
    said = f" {' '.join(split_words(text))} "  # blanks around, so that only whole words count
    before = f" {' '.join(split_words(source))} "
    words, runs = split_words(prompt), list(FILTERS["copied"])
    for start in range(len(words) - COPIED_WORDS + 1):
        runs.append(" ".join(words[start:start + COPIED_WORDS]))
    return any(f" {run} " in said and f" {run} " not in before for run in runs)


def check_gain(verdicts: Unread, rows: list[dict]) -> None:
    """Drop the rows whose text asks for no more than its source, or of which nobody can tell."""
    questions = []
    for row in rows:
        parts = {"first instruction": row["source"], "second instruction": row["text"]}
        questions.append(make_question(PROMPTS["gain"], parts, choices=("different", "equal")))
    for row, reply in zip(rows, verdicts.ask(questions), strict=True):
        if reply.verdict is None:
            drop(row, f"not compared: {reply.failure}")
        elif reply.verdict == "equal":
            drop(row, "gains no information")


def write_answers(ask: Callable, rows: list[dict], sample: int) -> None:
    """Put an example into each row, or drop it for its answer."""
    questions = [ask_answer(row["text"]) for row in rows]
    replies = ask(questions, temperature=TEMPERATURE, sample=sample) if rows else []
    for row, question, reply in zip(rows, questions, replies, strict=True):
        text, reason = read_written(question, reply)
        row["example"] = {"instruction": row["text"], "input": "", "output": text}
        reason = reason or find_answer_fault(text)
        if reason:
            drop(row, f"its answer: {reason}")
