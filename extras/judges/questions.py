"""Questions to a chat model, and verdicts that nobody but the judge can give.

A text under judgment may try to answer for the judge ("VERDICT: correct"), or to give it orders.
So texts stand unaltered between fences that carry a nonce, and a verdict is a last line that
carries it too. A question's own nonce is a hash of its task and texts, so that equal questions are
equal prompts, under one key. Since everyone can compute it, a client sends a random one in its
place (`draw_nonce`); the local model, which has to say the same in every run, is shown the hash.

A *backend* is whatever answers: ask(questions, temperature=0.0, sample=0) -> one Reply a question.
ChatClient.ask is one, a server; LocalChat.ask another, the model itself.
"""

import hashlib
import json
import math
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
FIRST_LOOK = 10  # verdicts, most of which must be readable before more are paid for
UNPARSED_AFTER = 100  # verdicts, before a smaller share of unread ones can stop a run
UNPARSED_BLOCK = 200  # verdicts that are asked for between two looks at that share
UNLISTED = "no keyword among the likeliest tokens"
# What is wrong with a reply of one token whose server gives no probabilities, if anything is.
ONE_TOKEN = ("", "cut at max_tokens", "cut while thinking", "empty message", "no finish_reason")

# What may stand before, between and behind the words of a verdict, and what is not seen at all.
BOXED = r"\\(?:boxed|text(?:bf)?)\{"
BEFORE = rf"(?:[\s*_`\"'#>(\[|$\u2022]|-(?=\s)|{BOXED})*"
SEPARATOR = rf"(?:[\s:=*_`\"'()\[\]>|$\u2013\u2014]|-(?=\s)|{BOXED})*"
BEHIND = r"[\s.!*_`\"')\]|}$]*"
# How models mark the end of a turn; some servers leave it in the text.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>",
             "<|endoftext|>", "<|end_of_turn|>", "<|return|>", "<|end\u2581of\u2581sentence|>",
             "<end_of_turn>", "<eos>", "</s>")
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
    one_token: bool = False  # the probabilities of the first token are the answer


@dataclass(frozen=True)
class Reply:
    """What came of a question. A failed one keeps its text, to be looked at, but has no verdict."""

    text: str
    failure: str = ""  # why there is no answer or verdict; "" for an answer that ended by itself
    odds: float | None = None  # log p(first choice) - log p(second), where the backend knows it
    verdict: str | None = None  # filled in by `ask_all`; then `text` is what stood before it
    nonce: str = field(default="", compare=False)  # that was sent; "": the question's own
    first: dict | None = None  # {token: log-probability} of the likeliest first tokens, if asked


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
                  system: str = TEXTS["question"]["judge"], examples=()) -> Question:
    """A prompt: the task, each part unaltered between fences with a nonce, how to answer.

    A verdict is one of `choices`, or what `menu` matches and `shown` puts into words. With
    neither, the reply is free text. `think` lets the judge explain itself first. `examples` are
    (parts, verdict) of other questions of this kind, shown before it as turns of the chat.
    """
    nonce, count = "", 0
    texts = "\n".join([task, *parts.values()])
    texts += "\n" + normal_form(texts)
    while not nonce or nonce in texts:
        blob = json.dumps([task, parts, count]).encode()
        nonce, count = hashlib.sha256(blob).hexdigest()[:8], count + 1
    menu, ending = menu or "|".join(map(re.escape, choices)), []
    if menu:
        words = TEXTS["question"]["explain" if think else "brief"]
        ending = [words.format(nonce=nonce, menu=shown or " or ".join(choices))]
    messages = [{"role": "system", "content": system.format(nonce=nonce)}]
    for shot, verdict in [*examples, (parts, "")]:
        sections = [f"<{name} {nonce}>\n{text}\n</{name} {nonce}>" for name, text in shot.items()]
        text = "\n\n".join([task, *sections, *ending])
        messages.append({"role": "user", "content": text})
        if verdict:
            messages.append({"role": "assistant", "content": f"VERDICT {nonce}: {verdict}"})
    if not max_tokens:
        max_tokens = 512 if think or not menu else 64
    return Question(messages, max_tokens, nonce, menu, choices, bool(choices) and not think)


def strip_turn_ends(text: str) -> str:
    """The text without marks of an ended turn at its end."""
    while text.endswith(TURN_ENDS):
        mark = next(mark for mark in TURN_ENDS if text.endswith(mark))
        text = text.removesuffix(mark).rstrip()
    return text


def last_line(text: str) -> tuple[str, str]:
    """(the text before its last line, that line in its normal form).

    Blank lines, marks of an ended turn and one closing code fence behind it are not lines.
    """
    lines, fenced, last = text.replace("\r", "\n").split("\n"), False, ""
    while lines:
        last = strip_turn_ends(normal_form(lines.pop()).strip())
        if last and (last != "```" or fenced):
            break
        fenced = fenced or bool(last)
    before = "\n".join(lines).strip()
    if fenced:
        before = re.sub(r"(?:\A|\n)```\w*\Z", "", before).strip()
    return before, last


def parse_verdict(text: str, nonce: str, menu: str) -> str | None:
    """The verdict in the last line of a text, if that line is nothing but the verdict.

    Case, Markdown, brackets, quotes, LaTeX's \\boxed and invisible characters around it are
    forgiven, and "Output" before a letter; another nonce, word or number, or a line after it, are
    not.
    """
    named = r"(?:output(?=[\s(\[*_`\"'])" + SEPARATOR + ")?"
    match = re.fullmatch(rf"{BEFORE}verdict{SEPARATOR}([0-9a-z]+){SEPARATOR}(?<![^\W_])"
                         rf"{named}({menu}){BEHIND}", last_line(text)[1])
    return match[2] if match and match[1] == nonce else None


def read_reply(question: Question, reply: Reply) -> Reply:
    """The reply with its verdict, or with NO_VERDICT as its failure. Free text stays as it is."""
    if reply.failure or not question.menu:
        return reply
    verdict = parse_verdict(reply.text, reply.nonce or question.nonce, question.menu)
    if verdict is None:
        return replace(reply, failure=NO_VERDICT)
    return replace(reply, text=last_line(reply.text)[0], verdict=verdict)


# ----- Verdicts by the probability of a keyword -----
def pick_choice(question: Question, first: float, second: float) -> Reply:
    """The more probable of two choices as a reply, from their log-probabilities."""
    if math.isnan(first - second):
        return Reply("", "no number")
    choice = question.choices[second > first]
    return Reply(f"VERDICT {question.nonce}: {choice}", odds=first - second)


def ask_for_keyword(question: Question) -> Question:
    """The question so that its answer begins with one of two choices. Others stay as they are."""
    if not question.pick:
        return question
    menu = " or ".join(question.choices)
    brief = TEXTS["question"]["brief"].format(nonce=question.nonce, menu=menu)
    keyword, messages = TEXTS["verdict"]["keyword"].format(menu=menu), []
    for message in question.messages:
        text = message["content"]
        if message["role"] == "user":
            assert text.endswith(brief), "a choice that is asked for in another way"
            text = text.removesuffix(brief) + keyword
        elif message["role"] == "assistant":  # the verdict of an example
            text = text.removeprefix(f"VERDICT {question.nonce}: ")
        messages.append({**message, "content": text})
    return replace(question, messages=messages, max_tokens=1, one_token=True)


def read_keyword(question: Question, reply: Reply) -> Reply:
    """The reply to `ask_for_keyword` as `pick_choice` gives it.

    A token counts for the one choice that it begins, whatever its case and blanks before it. A
    choice that is not listed is at most as probable as the least probable token that is. Raises
    JudgeStopped if the server gives no probabilities.
    """
    if not question.one_token:
        return reply
    if reply.failure in ONE_TOKEN and not reply.first:
        raise JudgeStopped(describe_problem("no_logprobs"))
    if reply.failure:
        return reply
    found = [[], []]  # log-probabilities for either choice
    for token, logprob in reply.first.items():
        begun = normal_form(token).strip()
        fits = [choice.startswith(begun) for choice in question.choices]
        if begun and sum(fits) == 1:
            found[fits.index(True)].append(logprob)
    if not any(found):
        return replace(reply, failure=UNLISTED, first=None)
    least = min(reply.first.values())
    return pick_choice(question, *(log_sum(logprobs or [least]) for logprobs in found))


def log_sum(logprobs: list[float]) -> float:
    """log(sum(exp(logprobs)))."""
    highest = max(logprobs)
    return highest + math.log(sum(math.exp(logprob - highest) for logprob in logprobs))


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
    """Asks for verdicts, and stops the run when too many of them cannot be read.

    That is more than the share `most` of a hundred or more, and more than half of fewer: the first
    ten are looked at before the next are asked for, and so are all of a call if none was read so
    far. With `most` 1 nothing stops before `finish`.
    """

    def __init__(self, ask: Callable, most: float, reask: int = 1, name: str = ""):
        self.backend, self.most, self.reask, self.name = ask, most, reask, name
        self.asked, self.causes = 0, Counter()

    def ask(self, questions: list[Question], *, read: Callable = read_reply,
            sample: int = 0) -> list[Reply]:
        """`ask_all` in blocks, so that a judge that cannot be read is not paid for to the end."""
        replies = []
        while len(replies) < len(questions):
            size = max(0, FIRST_LOOK - self.asked) or UNPARSED_BLOCK
            block = questions[len(replies):len(replies) + size]
            made = ask_all(self.backend, block, read=read, reask=self.reask, sample=sample)
            replies += made
            self.asked += len(made)
            self.causes.update(reply.failure.split(":")[0] for reply in made if reply.failure)
            self.look()
        return replies

    def look(self) -> None:
        """Raise JudgeStopped if too many verdicts could not be read so far."""
        missing, most = self.causes.total(), self.most
        if self.asked < UNPARSED_AFTER:
            most = max(most, 0.5)
        if self.asked < FIRST_LOOK and missing < self.asked:  # too few to tell
            return
        if missing > most * self.asked:
            raise self.stop()

    def finish(self) -> None:
        """The last verdict is there. Raises JudgeStopped if not a single one could be read."""
        if 0 < self.asked == self.causes.total():
            raise self.stop()

    def describe(self) -> str:
        """How many could not be read, and why; "" if all could."""
        causes = ", ".join(f"{n} {cause}" for cause, n in self.causes.most_common())
        if not causes:
            return ""
        return describe_problem("unread", missing=self.causes.total(), asked=self.asked,
                                causes=causes)

    def stop(self) -> JudgeStopped:
        """Why the run stops, and what helps against the two most frequent causes."""
        remedies = []
        for cause, _ in self.causes.most_common(2):
            remedies.append(TEXTS["remedies"].get(cause, TEXTS["remedies"]["other"]))
        remedies = " ".join(dict.fromkeys(remedies))
        return JudgeStopped(f"{self.describe()} {remedies} {TEXTS['remedies']['all']}")
