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
    AROUND,
    ENTRY_START,
    FILTERS,
    PLACEHOLDERS,
    PROMPTS,
    SEED_APART,
    TEMPERATURE,
    ask_writer,
    drop,
    make_row,
    read_written,
    split_entries,
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
NUMBER = r"\(?\d{1,3}[.):]{1,2}"
# "1. ", "2) ", "(3). ", "**4.** ", "5、", "6.写" at the beginning of a line, but not "1.5"
NUMBERED = re.compile(
    ENTRY_START + r"(?P<name>\(?\d{1,3}(?: ?[.):]{1,2}(?!\d)|[．、）]))(?P<tail>)")
# "Input:", "**Output 2:**", "1. **Input**:"
ENTRY = re.compile(rf"(?i)(?:(?P<own>[*_]{{0,3}}){NUMBER}(?P=own)[ \t]*)?{ENTRY_START}"
                   rf"(?:{NUMBER}[ \t]*)?(?P<name>label|input|output)"
                   r"(?P<tail>[ *_]{0,4}\d{0,2}[ *_]{0,4})[:：]")
# What may stand above an entry: "### Any", "Case 2", "**Example 3: hard**", "4."
HEADING = re.compile(r"(?i)#{2,6} .*|[#*_> ]*(?:test )?(?:case|example) {0,2}"
                     r"(?:\d{1,2}(?:[ *_]{0,3}[:：.)(–-].{0,80})?)?[ *_:：.]*|\(?\d{1,3}[.)][ *_]*")
EMPHASIS = re.compile(r"\A([*_]{1,3})(?![\s*_])((?:(?!\1).)+)(?<![\s*_])\1\Z")  # around all


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
        # Of few seeds some prompts are equal, and a server or a model would answer these alike.
        asked = [ask_instructions(seeds, new, rng) for _ in range(prompts)]
        questions = list({str(question.messages): question for question in asked}.values())
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
    text, reason = read_written(question, reply)
    items = [item for _, item in split_entries(NUMBERED, text)]
    if not reason and not items:
        reason = "has no numbered list"
    if reason:
        return [(text, reason)]
    # Closing talk stands behind the last task, in a line or a paragraph of its own.
    talk = r"\n(?=[\w(])"
    if any("\n" in item for item in items[:-1]):  # tasks that are longer than a line
        talk = r"\n\s*\n(?=[\w(])"
    items[-1] = re.split(talk, items[-1], maxsplit=1)[0]
    found = []
    for item in items:
        item = unquote(EMPHASIS.sub(r"\2", " ".join(item.split())))
        found.append((item[:1].upper() + item[1:], ""))
    return found


def find_instruction_fault(text: str) -> str:
    """Why a text is no instruction for a model of text; "" if rules see nothing.

    DEVIATION from 2212.10560: letters and digits of all scripts may come first, not ASCII alone,
    and behind an opening mark: ¿, a quotation mark, emphasis.
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
    if not re.match(r"""[¿¡"'“‘«„「*]*[^\W_]""", text):
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

    What is dropped is said by `filter_cases`.
    """
    questions, rows = [], []
    for task in tasks:
        name = "output_first" if task["classification"] else "input_first"
        questions.append(ask_writer(name, {"task": task["text"]}, n=CASES))
    replies = ask(questions, sample=SEED_APART * seed) if questions else []
    for task, question, reply in zip(tasks, questions, replies, strict=True):
        text, reason = read_written(question, reply)
        cases = read_cases(text)
        if not reason and not cases:
            reason = "has no case in the form asked for"
        if reason:
            rows.append(make_row("case", task["text"], text, reason))
            continue
        for input, output, reason in filter_cases(cases, labelled=task["classification"]):
            example = {"instruction": task["text"], "input": input, "output": output}
            rows.append(make_row("case", task["text"], output or input or "", reason,
                                 example=example))
    return rows


def read_cases(text: str) -> list[tuple[str | None, str | None]]:
    """[(input, output), ...] of entries "Input:" and "Output:", or "Label:" and "Input:".

    An entry ends where the next begins. None stands for the half that a case lacks.
    """
    cases, first = [], ("", "")  # what may be the first half of a case
    for name, value in [*split_entries(ENTRY, text, HEADING), ("", "")]:  # and an end
        pair = (first[0], name)
        if pair == ("input", "output"):
            cases.append((read_input(first[1]), value))
        elif pair == ("label", "input"):
            cases.append((read_input(value), first[1]))
        elif first[0]:
            cases.append((first[1], None) if first[0] == "input" else (None, first[1]))
        whole = pair in (("input", "output"), ("label", "input"))
        first = ("", "") if whole else (name, value)
    return cases


def read_input(text: str) -> str:
    """An input; "" if it says that there is none."""
    return "" if normalize(text.strip(AROUND)) in FILTERS["no_input"] else text


def filter_cases(cases: list[tuple], *, labelled: bool = False) -> list[tuple[str, str, str]]:
    """[(input, output, why it is dropped, or ""), ...] of the cases of one task.

    DEVIATION from the code of 2212.10560: two outputs for one input drop these cases, not all of
    the task's. Without an input, several outputs are fine, unless they are labels (`labelled`).
    """
    faults, outputs, seen, found = [], {}, set(), []
    for input, output in cases:
        faults.append(find_case_fault(input, output))
        if not faults[-1]:
            outputs.setdefault(normalize(input), set()).add(normalize(output))
    for (input, output), fault in zip(cases, faults, strict=True):
        case = (normalize(input or ""), normalize(output or ""))
        if not fault and (case[0] or labelled) and len(outputs[case[0]]) > 1:
            fault = "has several outputs for one input"
        elif not fault and case in seen:
            fault = "said already"
        if not fault:
            seen.add(case)
        found.append((input, output, fault))
    return found


def find_case_fault(input: str | None, output: str | None) -> str:
    """Why a case, taken by itself, is dropped; "" if it is not."""
    if input is None or output is None:
        return "has one half only"
    if not output:
        return "empty"
    if not PLACEHOLDERS.isdisjoint({normalize(input), normalize(output)}):
        return "repeats the prompt"
    if input.endswith(COLONS) or output.endswith(COLONS):  # what follows is missing
        return "ends in a colon"
    if input == output:  # but for capitals, which may be what the task is about
        return "repeats its input"
    return ""
