"""Questions to a chat model, and verdicts that nobody but the judge can give.

A text under judgment may try to answer for the judge ("VERDICT: correct"), or to give it orders.
So texts stand unaltered between fences that carry a nonce, and a verdict is a last line that
carries it too. A question's own nonce is a hash of all that is shown, so that equal questions are
equal prompts, under one key. Since everyone can compute it, a client sends a random one in its
place (`draw_nonce`); the local model, which has to say the same in every run, is shown the hash.

A *backend* is whatever answers: ask(questions, temperature=0.0, sample=0) -> one Reply a question.
ChatClient.ask is one, a server; LocalChat.ask another, the model itself.
"""

import hashlib
import json
import re
import secrets
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from extras import tomllib

TEXTS = tomllib.loads(Path(__file__).with_name("texts.toml").read_text(encoding="utf-8"))
PROMPT_VERSION = "1"  # of how prompts are put together; part of the keys of kept answers
NONCE_BYTES = 12  # of a nonce that is sent: twice as many hexadecimal digits

NO_VERDICT = "no verdict"
REASK_TEMPERATURE = 0.7  # at 0 a reply without a verdict would come again
UNPARSED_AFTER = 100  # verdicts, before their share of unparsed ones can stop a run
UNPARSED_BLOCK = 200  # verdicts that are asked for between two looks at that share

# What may stand between the words of a verdict, and what is not seen at all.
SEPARATOR = r"(?:[\s:=*_`\"'()\[\]>|\u2013\u2014]|-(?=\s))*"
INVISIBLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")


def describe_problem(problem: str, **values) -> str:
    """The sentence of that name in texts.toml, with its places filled in."""
    return TEXTS["problems"][problem].format(**values)


class JudgeStopped(RuntimeError):
    """Nothing more can be asked: no server, no credit, a limit. All answers so far are kept."""


@dataclass(frozen=True)
class Question:
    """A prompt for a chat model; `menu`, a regular expression, says what a verdict may be."""

    messages: list[dict]
    max_tokens: int = 256
    nonce: str = ""
    menu: str = ""  # empty: the reply is free text
    choices: tuple[str, ...] = ()  # the verdicts as words, where they are words
    pick: bool = False  # nothing but one of the choices is wanted


@dataclass(frozen=True)
class Reply:
    """What came of a question. A failed one keeps its text, to be looked at, but has no verdict."""

    text: str
    failure: str = ""  # why there is no answer or verdict; "" for an answer that ended by itself
    odds: float | None = None  # log p(first choice) - log p(second), where the backend knows it
    verdict: str | None = None  # filled in by `ask_all`; then `text` is what stood before it
    nonce: str = field(default="", compare=False)  # that was sent; "": the question's own


def normal_form(text: str) -> str:
    """The form in which a nonce is looked for in texts, and verdicts are read.

    It is made letter by letter: if a judge repeats a part of a text, the normal form of that part
    holds no nonce that the normal form of the text does not hold.
    """
    return INVISIBLE.sub("", unicodedata.normalize("NFKD", text)).casefold()


def draw_nonce(messages: list[dict], own: str) -> tuple[str, list[dict]]:
    """(a random nonce, the messages with it in place of a question's own, if it has one)."""
    if not own:  # a question whose answer is no verdict
        return "", messages
    texts = normal_form("\n".join(message["content"] for message in messages))
    nonce = secrets.token_hex(NONCE_BYTES)
    while nonce in texts:
        nonce = secrets.token_hex(NONCE_BYTES)
    return nonce, [{**message, "content": message["content"].replace(own, nonce)}
                   for message in messages]


def make_question(task: str, parts: dict[str, str], *, choices: tuple[str, ...] = (),
                  menu: str = "", shown: str = "", think: bool = False, max_tokens: int = 0,
                  system: str = TEXTS["question"]["judge"]) -> Question:
    """A prompt: the task, each part unaltered between fences with a nonce, how to answer.

    A verdict is one of `choices`, or what `menu` matches and `shown` puts into words. With
    neither, the reply is free text. `think` lets the judge explain itself first.
    """
    nonce, count = "", 0
    texts = "\n".join([task, *parts.values()])
    texts += "\n" + normal_form(texts)
    while not nonce or nonce in texts:
        blob = json.dumps([task, parts, count]).encode()
        nonce, count = hashlib.sha256(blob).hexdigest()[:8], count + 1
    sections = [task]
    for name, text in parts.items():
        sections.append(f"<{name} {nonce}>\n{text}\n</{name} {nonce}>")
    menu = menu or "|".join(map(re.escape, choices))
    if menu:
        ending = TEXTS["question"]["explain" if think else "brief"]
        sections.append(ending.format(nonce=nonce, menu=shown or " or ".join(choices)))
    messages = [{"role": "system", "content": system.format(nonce=nonce)},
                {"role": "user", "content": "\n\n".join(sections)}]
    if not max_tokens:
        max_tokens = 512 if think or not menu else 64
    return Question(messages, max_tokens, nonce, menu, choices, bool(choices) and not think)


def parse_verdict(text: str, nonce: str, menu: str) -> str | None:
    """The verdict in the last line that is not blank, if that line is nothing but the verdict.

    Case, Markdown, brackets, quotes and invisible characters around it are forgiven; another
    nonce, word or number, or a line after it, are not.
    """
    lines = normal_form(text).replace("\r", "\n").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    match = re.fullmatch(
        rf"[\s*_`\"'#>(\[|]*verdict{SEPARATOR}{re.escape(nonce)}{SEPARATOR}({menu})"
        rf"[\s.!*_`\"')\]|]*", last)
    return match and match[1]


def read_reply(question: Question, reply: Reply) -> Reply:
    """The reply with its verdict, or with NO_VERDICT as its failure. Free text stays as it is."""
    if reply.failure or not question.menu:
        return reply
    verdict = parse_verdict(reply.text, reply.nonce or question.nonce, question.menu)
    if verdict is None:
        return replace(reply, failure=NO_VERDICT)
    before = reply.text.strip().rpartition("\n")[0].strip()
    return replace(reply, text=before, verdict=verdict)


def ask_all(ask: Callable, questions: list[Question], *, read: Callable = read_reply,
            temperature: float = 0.0, sample: int = 0, reask: int = 1) -> list[Reply]:
    """One reply per question, in order, with its verdict read.

    A reply that ended by itself without a verdict is asked for again, `reask` times, as another
    sample. No other failure is: it has cost its tries already, or would come again.
    """
    replies, wanted = {}, list(range(len(questions)))
    for number in range(reask + 1):
        made = ask([questions[i] for i in wanted], temperature=temperature,
                   sample=sample + 1000 * number)
        for i, reply in zip(wanted, made, strict=True):
            replies[i] = read(questions[i], reply)
        wanted = [i for i in wanted if replies[i].failure == NO_VERDICT]
        if not wanted:
            break
        temperature = max(temperature, REASK_TEMPERATURE)
    return [replies[i] for i in range(len(questions))]


class Unread:
    """Asks for verdicts, and stops the run when the share of unreadable ones is above `most`."""

    def __init__(self, ask: Callable, most: float, reask: int = 1):
        self.backend, self.most, self.reask = ask, most, reask
        self.asked, self.causes = 0, Counter()

    def ask(self, questions: list[Question]) -> list[Reply]:
        """`ask_all` in blocks, so that a judge that cannot be read is not paid for to the end.

        Raises JudgeStopped, from the hundredth verdict on.
        """
        replies = []
        for start in range(0, len(questions), UNPARSED_BLOCK):
            block = questions[start:start + UNPARSED_BLOCK]
            replies += ask_all(self.backend, block, reask=self.reask)
            failures = [reply.failure.split(":")[0] for reply in replies[start:] if reply.failure]
            self.asked, self.causes = self.asked + len(block), self.causes + Counter(failures)
            missing = self.causes.total()
            if self.asked >= UNPARSED_AFTER and missing > self.most * self.asked:
                causes = ", ".join(f"{n} {cause}" for cause, n in self.causes.most_common())
                raise JudgeStopped(describe_problem(
                    "unread", missing=missing, asked=self.asked, causes=causes))
        return replies
