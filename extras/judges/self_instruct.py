"""Self-instruct: a model invents tasks from a few seeds, then inputs and outputs of each.

    seeds --> instructions --filters--> classification or not --> cases --filters--> examples

Wang et al. 2023, arXiv 2212.10560, section 2 and the released code.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable

from extras.judges.questions import Question, Reply, Unread, make_question
from extras.judges.recipes import (
    FILTERS,
    PLACEHOLDERS,
    PROMPTS,
    SEED_APART,
    TEMPERATURE,
    ask_writer,
    drop,
    make_row,
    read_text,
)
from extras.judges.writers import unquote
from judge import count_words, normalize, rouge_l, split_words

SHOWN, SHOWN_NEW = 8, 2  # tasks in a prompt, and how many of them the model wrote itself
ASKED = 8  # tasks that a prompt asks for
PROMPTS_A_ROUND = 8  # that do not see each other's answers
IDLE_ROUNDS = 3  # in a row without anything new, after which no more are asked for
CASES = 3  # of a task that is no classification
SIMILAR = 0.7  # ROUGE-L above this is no new instruction
SHORTEST, LONGEST = 4, 150  # words of an instruction
COLONS = (":", "：")

IMPOSSIBLE = re.compile(rf"(?i)\b(?:{'|'.join(FILTERS['impossible'])})\b")
# "1. ", "2) ", "(3). ", "**4.** ", "5、" at the beginning of a line
NUMBERED = re.compile(r"(?m)^[ \t*_#>-]*\(?\d{1,3}(?: ?[.):]{1,2}(?=[\s*_])|[．、])[\s*_]*")
# "Input:", "**Output 2:**", and headings such as "Case 2". Repeats that follow one another have
# bounds, else the time grew with the square of a text's length.
ENTRY = re.compile(
    r"(?im)^[ \t*_#>-]{0,8}(?:(label|input|output)[ *_]{0,4}\d{0,2}[ *_]{0,4}[:：][ \t*_]*"
    r"|(?:case|example) {0,2}\d{0,2}[ *_:：.]{0,4}$)")


def self_instruct(ask: Callable, seeds: list[str], settings) -> list[dict]:
    """New tasks from seeds, and cases of each (Wang et al. 2023, arXiv 2212.10560, section 2).

    Examples are {"instruction", "input", "output"}. The cases of classification tasks are written
    with the label first. Raises JudgeStopped if too few verdicts can be read.
    """
    rows = write_instructions(ask, seeds, settings)
    classify(ask, [row for row in rows if row["kept"]], settings.max_unparsed)
    return rows + write_cases(ask, [row for row in rows if row["kept"]], settings.seed)


def write_instructions(ask: Callable, seeds: list[str], settings) -> list[dict]:
    """Rows of the step "instruction", of which settings.number are kept, or fewer.

    Each round shows a few seeds and a few of what was kept so far. After some rounds in a row
    without anything new, no more is asked for.
    """
    rng, rows, new = random.Random(f"tasks/{settings.seed}"), [], []
    known = {text: Counter(split_words(text)) for text in seeds}
    number, idle = 0, 0
    while len(new) < settings.number and idle < IDLE_ROUNDS:
        prompts = min(PROMPTS_A_ROUND, math.ceil((settings.number - len(new)) / ASKED))
        questions = [ask_instructions(seeds, new, rng) for _ in range(prompts)]
        replies = ask(questions, temperature=TEMPERATURE,
                      sample=SEED_APART * settings.seed + number)
        number, idle = number + 1, idle + 1
        for question, reply in zip(questions, replies, strict=True):
            for text, reason in read_list(question, reply):
                reason = reason or find_instruction_fault(text)
                if not reason and is_similar(text, known):
                    reason = "too similar to another"
                if not reason and len(new) == settings.number:
                    reason = "more than --number"
                if not reason:
                    known[text] = Counter(split_words(text))
                    new.append(text)
                    idle = 0
                rows.append(make_row("instruction", "", text, reason))
    return rows


def ask_instructions(seeds: list[str], new: list[str], rng: random.Random) -> Question:
    """The question for more tasks, which shows up to eight: two of the new ones, the rest seeds."""
    shown = rng.sample(new, min(SHOWN_NEW, len(new)))
    shown += rng.sample(seeds, min(SHOWN - len(shown), len(seeds)))
    rng.shuffle(shown)
    lines = [f"{number}. {' '.join(text.split())}" for number, text in enumerate(shown, 1)]
    return ask_writer("instructions", {"list": "\n".join(lines)}, n=ASKED)


def read_list(question: Question, reply: Reply) -> list[tuple[str, str]]:
    """[(text, why it cannot be used, or ""), ...] of a numbered list.

    Of a reply that was cut, or failed, nothing is used.
    """
    text, reason = read_text(question, reply)
    items = NUMBERED.split(text)[1:]  # what stands before the first number is talk
    if not reason and not items:
        reason = "has no numbered list"
    if reason:
        return [(text, reason)]
    found = []
    for item in items:
        item = unquote(" ".join(item.split()).strip("*_ "))
        found.append((item[:1].upper() + item[1:], ""))
    return found


def find_instruction_fault(text: str) -> str:
    """Why a text is no instruction for a model of text; "" if rules see nothing.

    DEVIATION from 2212.10560: letters and digits of all scripts may come first, not ASCII alone.
    """
    if not text:
        return "empty"
    if count_words(text) < SHORTEST:
        return f"has fewer than {SHORTEST} words"
    if count_words(text) > LONGEST:
        return f"has more than {LONGEST} words"
    if IMPOSSIBLE.search(text):
        return "asks for what text cannot do"
    if text.casefold().startswith("write a program"):
        return "asks for a program"
    if not re.match(r"[¿¡]?[^\W_]", text):
        return "begins with no letter or digit"
    return ""


def is_similar(text: str, known: dict[str, Counter]) -> bool:
    """Whether the ROUGE-L of a text and one of the known texts, {text: its words}, is above 0.7.

    The words that two texts share, in any order, bound it from above, and are counted sooner.
    """
    words = Counter(split_words(text))
    for other, others in known.items():
        most = 2 * (words & others).total() / max(1, words.total() + others.total())
        if most > SIMILAR and rouge_l(other, text) > SIMILAR:
            return True
    return False


def classify(ask: Callable, rows: list[dict], most_unread: float) -> None:
    """Note in each row whether its task is a classification; one without a verdict is dropped."""
    questions = [make_question(PROMPTS["classification"], {"task": row["text"]},
                               choices=("classification", "other")) for row in rows]
    replies = Unread(ask, most_unread).ask(questions)
    for row, reply in zip(rows, replies, strict=True):
        row["classification"] = reply.verdict == "classification"
        if reply.verdict is None:
            drop(row, f"not classified: {reply.failure}")


def write_cases(ask: Callable, tasks: list[dict], seed: int) -> list[dict]:
    """Rows of the step "case": inputs with outputs of each task, at temperature 0 as in the paper.

    What is dropped is said by `judge_cases`.
    """
    questions, rows = [], []
    for task in tasks:
        name = "output_first" if task["classification"] else "input_first"
        questions.append(ask_writer(name, {"task": task["text"]}, n=CASES))
    replies = ask(questions, sample=SEED_APART * seed) if questions else []
    for task, question, reply in zip(tasks, questions, replies, strict=True):
        text, reason = read_text(question, reply)
        cases = read_cases(text)
        if not reason and not cases:
            reason = "has no case in the form asked for"
        if reason:
            rows.append(make_row("case", task["text"], text, reason))
            continue
        for input, output, reason in judge_cases(cases):
            example = {"instruction": task["text"], "input": input, "output": output}
            rows.append(make_row("case", task["text"], output, reason, example=example))
    return rows


def read_cases(text: str) -> list[tuple[str, str]]:
    """[(input, output), ...] of entries "Input:" and "Output:", or "Label:" and "Input:".

    An entry ends where the next begins; a half of a case without its other half is left out.
    """
    parts, cases, before = ENTRY.split(text)[1:], [], ("", "")
    for name, value in zip(parts[::2], parts[1::2], strict=True):
        name, value = (name or "").lower(), value.strip()
        if not name:  # a heading such as "Case 2"
            continue
        if (before[0], name) == ("input", "output"):
            input, output = before[1], value
        elif (before[0], name) == ("label", "input"):
            input, output = value, before[1]
        else:  # the first half of a case
            before = (name, value)
            continue
        before = ("", "")
        if input.casefold() in FILTERS["no_input"]:
            input = ""
        cases.append((input, output))
    return cases


def judge_cases(cases: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """[(input, output, why it is dropped, or ""), ...] of the cases of one task.

    DEVIATION from the code of 2212.10560: two outputs for one input drop these cases, not all of
    the task's. Neither drops several outputs where there is no input.
    """
    found, outputs = [], {}
    for input, output in cases:
        outputs.setdefault(normalize(input), set()).add(normalize(output))
    seen = set()
    for input, output in cases:
        case, reason = (normalize(input), normalize(output)), ""
        if not output:
            reason = "empty"
        elif not PLACEHOLDERS.isdisjoint(case):
            reason = "repeats the prompt"
        elif input.endswith(COLONS) or output.endswith(COLONS):  # what follows is missing
            reason = "ends in a colon"
        elif case[0] == case[1]:
            reason = "repeats its input"
        elif case[0] and len(outputs[case[0]]) > 1:
            reason = "has several outputs for one input"
        elif case in seen:
            reason = "said already"
        seen.add(case)
        found.append((input, output, reason))
    return found
