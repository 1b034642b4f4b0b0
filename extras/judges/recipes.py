"""Training data that a model writes: what the recipes share, and answers that explain themselves.

A recipe is a function of (ask, seeds, settings): a backend (questions.py), texts, a `Settings`. It
returns one row for each thing that was written, kept or not:

    {"step", "source", "text", "kept", "reason"}, and "example" where it is an instruction example

self_instruct.py has new tasks, evolving.py harder ones and dialogues.py conversations. The prompts
are in recipes.toml.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from extras import tomllib
from extras.judges.questions import TEXTS, Question, Reply, make_question, strip_turn_ends
from extras.judges.writers import unquote
from judge import ENDINGS, count_words, split_words

DATA = tomllib.loads(Path(__file__).with_name("recipes.toml").read_text(encoding="utf-8"))
PROMPTS, FILTERS = DATA["prompts"], DATA["filters"]
TEMPERATURE = 0.7  # of all that is written to be varied; self-instruct's
SEED_APART = 10_000  # numbers of samples that each --seed has to itself
REFUSAL_WORDS = 80  # "sorry" in an answer of fewer words refuses
STOP_WORDS = frozenset(FILTERS["stop_words"].split())
PLACEHOLDERS = frozenset(FILTERS["placeholders"])
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no tokenizer takes
# What may stand before the name of an entry: a quotation, a heading, a bullet, emphasis.
ENTRY_START = r"[ \t>#-]*(?:\*[ \t]+)?(?P<mark>[*_]{0,3})"
# A last line that is no part of an entry: "---", "[End of conversation]"
RULE = re.compile(r"(?i)-{3,}|\*{3,}|={3,}|[\[(<*_]+(?:the )?end(?: of [\w ]{1,30})?[\])>*_.]+"
                  r"|(?:the )?end of (?:the )?(?:conversation|dialogue|chat)\.?")
FENCE = "```"
AROUND = "*_`()[]<>\"'. "  # what may stand around a word or letter that is a whole text


@dataclass
class Settings:
    """What recipes read; flags that hold these fields serve as well."""

    number: int = 100  # instructions of self-instruct
    rounds: int = 4  # of Evol-Instruct
    turns: int = 3  # of each side of a dialogue
    seed: int = 0
    max_unparsed: float = 0.1  # share of unread verdicts that stops a recipe


# ----- What recipes share -----
def ask_writer(name: str, parts: dict[str, str], *, length: str = "long", **places) -> Question:
    """The question for a text, by the prompt of that name in recipes.toml."""
    return make_question(PROMPTS[name].format(**places), parts,
                         system=TEXTS["question"]["writer"], max_tokens=DATA["lengths"][length])


def ask_answer(text: str, system: str = PROMPTS["assistant"]) -> Question:
    """The question that a user would put, without fences: the text is an order to the model.

    No verdict hangs on the answer, so there is none that the text could give in its place.
    """
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return Question(messages, DATA["lengths"]["long"])


def read_written(question: Question, reply: Reply, *, quoted: bool = False) -> tuple[str, str]:
    """(the text of a reply, why it cannot be used, or "").

    quoted: quotation marks or a code fence around all of it are no part of it.
    """
    text, nonce = strip_turn_ends(reply.text.strip()), reply.nonce or question.nonce
    if quoted:
        text = unquote(text)
    if reply.failure:
        return text, reply.failure
    if not text:
        return text, "empty"
    if SURROGATE.search(text):
        return text, "has half a character"
    if nonce and nonce in text:
        return text, "repeats the prompt"
    return text, ""


def split_entries(start: re.Pattern, text: str,
                  heading: re.Pattern | None = None) -> list[tuple[str, str]]:
    """[(name, text), ...] of entries, each of which begins with a line that `start` matches.

    start has groups: mark (ENTRY_START), name, and tail, in which a mark may be closed again. What
    stands before the first entry is left out, and nothing in a code fence begins one. `heading`
    matches a last line that belongs to the next entry.
    """
    found, fenced = [], False
    closed = text.count(FENCE) % 2 == 0  # else nobody can tell where the code ends
    for line in text.split("\n"):
        match = start.match(line)
        if match and not fenced:
            found.append((match, [line[match.end():]]))
        elif found:
            found[-1][1].append(line)
        if found and closed and line.count(FENCE) % 2:
            fenced = not fenced
    entries = []
    for number, (match, lines) in enumerate(found, 1):
        strip_rules(lines, heading if heading and number < len(found) else RULE)
        entries.append((match["name"].lower(), text_after(match, "\n".join(lines))))
    return entries


def strip_rules(lines: list[str], heading: re.Pattern) -> None:
    """Remove lines from the end that are no part of an entry, but never its first."""
    while len(lines) > 1:
        last = lines[-1].strip()
        stray = last == FENCE and "\n".join(lines).count(FENCE) % 2
        if last and not (stray or RULE.fullmatch(last) or heading.fullmatch(last)):
            break
        lines.pop()


def text_after(match: re.Match, text: str) -> str:
    """The text without the mark that ends an emphasis which began before its entry's name."""
    if match["mark"] not in match["tail"]:
        mark = re.escape(match["mark"])
        text = re.sub(rf"\A\s*{mark}|(?<=\S){mark}(?!\w)", "", text, count=1)
    return text.strip()


def find_answer_fault(text: str) -> str:
    """Why a text is no answer, by the rules of Evol-Instruct (arXiv 2304.12244); "" if it is one.

    It is a refusal in few words, or nothing but punctuation and stop words (English ones).
    DEVIATION: one letter or symbol is an answer, such as the "A" of a multiple choice, or "+".
    """
    words, core = split_words(text), text.strip(AROUND) or text
    if len(core) == 1 and core.isprintable() and core not in ENDINGS:
        return ""
    if "sorry" in words and count_words(text) < REFUSAL_WORDS:
        return "refuses"
    if STOP_WORDS.issuperset(words):
        return "says nothing"
    return ""


def make_row(step: str, source: str, text: str, reason: str, **more) -> dict:
    """A row of what was written; it is kept if there is no reason against it."""
    return {"step": step, "source": source, "text": text, "kept": not reason, "reason": reason,
            **more}


def drop(row: dict, reason: str) -> None:
    """Note why a row is not kept after all."""
    row.update(kept=False, reason=reason)


# ----- Explanations -----
def answer_and_explain(ask: Callable, seeds: list[str], settings) -> list[dict]:
    """Answers to seeds that explain themselves (Orca, Mukherjee et al. 2023, arXiv 2306.02707).

    A system prompt is drawn for each. Examples are {"messages"} of the system, user and assistant.
    """
    systems, rows = [], []
    for number in range(len(seeds)):
        rng = random.Random(f"explain/{settings.seed}/{number}")
        systems.append(rng.choice(DATA["explain"]["systems"]))
    questions = list(map(ask_answer, seeds, systems))
    replies = ask(questions, temperature=TEMPERATURE, sample=SEED_APART * settings.seed)
    for source, question, reply in zip(seeds, questions, replies, strict=True):
        text, reason = read_written(question, reply)
        messages = [*question.messages, {"role": "assistant", "content": text}]
        rows.append(make_row("answer", source, text, reason or find_answer_fault(text),
                             example={"messages": messages}))
    return rows
