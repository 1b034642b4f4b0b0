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
from extras.judges.questions import TEXTS, Question, Reply, make_question
from extras.judges.writers import unquote
from judge import count_words, split_words

DATA = tomllib.loads(Path(__file__).with_name("recipes.toml").read_text(encoding="utf-8"))
PROMPTS, FILTERS = DATA["prompts"], DATA["filters"]
TEMPERATURE = 0.7  # of all that is written to be varied; self-instruct's
SEED_APART = 10_000  # numbers of samples that each --seed has to itself
REFUSAL_WORDS = 80  # "sorry" in an answer of fewer words refuses
STOP_WORDS = frozenset(FILTERS["stop_words"].split())
PLACEHOLDERS = frozenset(FILTERS["placeholders"])
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no tokenizer takes


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


def read_text(question: Question, reply: Reply, *, quoted: bool = False) -> tuple[str, str]:
    """(the text of a reply, why it cannot be used, or "").

    quoted: quotation marks or a code fence around all of it are no part of it.
    """
    text, nonce = reply.text.strip(), reply.nonce or question.nonce
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


def find_answer_fault(text: str) -> str:
    """Why a text is no answer, by the rules of Evol-Instruct (arXiv 2304.12244); "" if it is one.

    It is a refusal in few words, or nothing but punctuation and stop words (English ones).
    """
    words = split_words(text)
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
def explain(ask: Callable, seeds: list[str], settings) -> list[dict]:
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
        text, reason = read_text(question, reply)
        messages = [*question.messages, {"role": "assistant", "content": text}]
        rows.append(make_row("answer", source, text, reason or find_answer_fault(text),
                             example={"messages": messages}))
    return rows
