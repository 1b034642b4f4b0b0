"""Conversations that models write: self-chat in one transcript, and two sides with a prompt each.

Examples are {"messages"} of user and assistant in turns, as `--stage sft --examples` reads them.
"""

import re
from collections.abc import Callable

from extras.judges.questions import Question, Reply
from extras.judges.recipes import (
    ENTRY_START,
    PLACEHOLDERS,
    SEED_APART,
    TEMPERATURE,
    ask_writer,
    make_row,
    read_written,
    split_entries,
)
from judge import normalize

SIDES = ("user", "assistant")  # in the order in which they speak
NAMES = {"user": "[Human]", "assistant": "[AI]"}
ROLES = {"human": "user", "ai": "assistant"}
# A speaker at the beginning of a line: "[Human]", "**[AI]:** ", "[|Human|]"
SPEAKER = re.compile(rf"(?i){ENTRY_START}\[\|?(?P<name>human|ai)\|?\](?P<tail>(?P=mark)?)[:：]?")


def read_turns(text: str) -> list[dict]:
    """The messages of a transcript; what stands before the first speaker is left out."""
    return [{"role": ROLES[name], "content": said}
            for name, said in split_entries(SPEAKER, text)]


def show_turns(messages: list[dict]) -> str:
    """A transcript of messages, as `read_turns` reads it."""
    return "\n".join(f"{NAMES[turn['role']]} {turn['content']}" for turn in messages)


# ----- One model plays both sides -----
def self_chat(ask: Callable, seeds: list[str], settings) -> list[dict]:
    """One transcript for each seed, a question (Baize, Xu et al. 2023, arXiv 2304.01196)."""
    questions = [ask_writer("self_chat", {"question": source}) for source in seeds]
    replies = ask(questions, temperature=TEMPERATURE, sample=SEED_APART * settings.seed)
    rows = []
    for source, question, reply in zip(seeds, questions, replies, strict=True):
        text, reason = read_written(question, reply)
        messages = read_turns(text)
        if messages and messages[-1]["role"] == "user":  # nobody answers it
            messages.pop()
        reason = reason or find_turn_fault(messages)
        rows.append(make_row("conversation", source, text, reason, example={"messages": messages}))
    return rows


def find_turn_fault(messages: list[dict]) -> str:
    """Why turns are no conversation; "" if user and assistant alternate and all say something."""
    if len(messages) < 2:
        return "has fewer than two turns"
    for number, turn in enumerate(messages):
        if turn["role"] != SIDES[number % 2]:
            return "speaks out of turn"
        if not turn["content"]:
            return "has an empty turn"
        if normalize(turn["content"]) in PLACEHOLDERS:
            return "repeats the prompt"
    return ""


# ----- Two sides -----
def dialogue(ask: Callable, seeds: list[str], settings) -> list[dict]:
    """One dialogue on each seed, a topic, of settings.turns turns of each side.

    As UltraChat's (Ding et al. 2023, arXiv 2305.14233), the user's side and the assistant's have a
    prompt each, and both see all that was said. A turn that cannot be used ends its dialogue, as
    the row's "ended" says; what was answered before is kept.
    """
    talks, ended = [[] for _ in seeds], [""] * len(seeds)
    for number in range(2 * settings.turns):
        going = [i for i, reason in enumerate(ended) if not reason]
        if not going:
            break
        side, questions = SIDES[number % 2], []
        for i in going:
            questions.append(ask_turn(side, seeds[i], talks[i]))
        replies = ask(questions, temperature=TEMPERATURE,
                      sample=SEED_APART * settings.seed + number)
        for i, question, reply in zip(going, questions, replies, strict=True):
            text, ended[i] = read_turn(side, question, reply, talks[i])
            if not ended[i]:
                talks[i].append({"role": side, "content": text})
    rows = []
    for source, messages, reason in zip(seeds, talks, ended, strict=True):
        if len(messages) % 2:  # nobody answers the last turn
            messages.pop()
        rows.append(make_row("dialogue", source, show_turns(messages),
                             "" if messages else reason, ended=reason,
                             example={"messages": messages}))
    return rows


def ask_turn(side: str, topic: str, messages: list[dict]) -> Question:
    """The question for the next turn of a side, which sees the topic (the user) and all turns."""
    if not messages:
        return ask_writer("opening", {"topic": topic}, length="short")
    parts = {"conversation": show_turns(messages)}
    if side == "user":
        return ask_writer("user", {"topic": topic} | parts, length="short")
    return ask_writer("reply", parts)


def read_turn(side: str, question: Question, reply: Reply, before: list[dict]) -> tuple[str, str]:
    """(what a side says, why it cannot be used, or ""); the name of the side itself is left out."""
    text, reason = read_written(question, reply, quoted=side == "user")
    # A text that begins with a name leaves nothing to the turn that is put before it.
    turns = [turn for turn in read_turns(f"{NAMES[side]}\n{text}") if turn["content"]]
    if not reason and not turns:
        reason = "empty"
    if not reason and (len(turns) > 1 or turns[0]["role"] != side):
        reason = "speaks for the other side"
    if not reason:
        text = turns[0]["content"]
    said = {normalize(turn["content"]) for turn in before}
    if not reason and normalize(text) in said:
        reason = "repeats an earlier turn"
    return text, reason
