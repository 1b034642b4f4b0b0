"""A checkpoint's own chat template: Jinja, rendered in a sandbox with what transformers gives it.

What a user or a model says may hold the name of a control token. While a template is rendered, a
placeholder stands for each such name; so every control token in the result is the template's own.
"""

import datetime
import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from extras.formats.checks import read_object, reading, refuse
from extras.formats.templates import Prompt, TemplateRefusal
from extras.formats.tokenizer import MARK, SIDE_FILES, added_tokens, control_pieces, special_name

NAME = "chat"  # what --template calls it
JINJA_FILE = "chat_template.jinja"
OPENING, CLOSING = "\ue000", "\ue001"  # private characters around the number of a hidden text
ANSWER, BLANKS = "Qz7", "\t \t"  # what no template says of itself
JUDGED = "{}\n\nJudgment of the response: {}"


# ----- Where it stands -----
def find_source(folder) -> str | None:
    """The default chat template of a folder, or None: from its own file, or tokenizer_config.json.

    Raises ValueError for several without one that is called default.
    """
    folder = Path(folder)
    file, config = folder / JINJA_FILE, folder / SIDE_FILES[0]
    if file.is_file():
        with reading(file, "a template in UTF-8"):
            return file.read_text(encoding="utf-8")
    source = read_object(config).get("chat_template")
    if isinstance(source, list):  # of named ones
        with reading(f"{config}, chat_template", "objects with name and template"):
            named = {entry["name"]: entry["template"] for entry in source}
        refuse("default" not in named, f"{config} has chat templates named "
               f"{', '.join(map(str, named)):.80}, and none is the default. Name one of the "
               "program's own with --template.")
        source = named["default"]
    refuse(source is not None and not isinstance(source, str),
           f"{config}: chat_template is {source!r:.40}. Expected a text.")
    return source


def has_template(folder) -> bool:
    """Whether a folder has a chat template, however that reads."""
    folder = Path(folder)
    return (folder / JINJA_FILE).is_file() or bool(
        read_object(folder / SIDE_FILES[0]).get("chat_template"))


def open_chat_template(*folders) -> "JinjaTemplate":
    """The chat template of the first folder that has one. Raises ValueError if none has."""
    for folder in map(Path, filter(None, folders)):
        source = find_source(folder)
        if source is not None:
            config = read_object(folder / SIDE_FILES[0])
            added, special = added_tokens(folder, config)
            tokens = read_object(folder / SIDE_FILES[1]) | config
            known = {f"{name}_token": special_name(tokens.get(f"{name}_token"))
                     for name in ("bos", "eos", "unk", "pad")}
            names = {*special, *filter(None, known.values()), *filter(MARK.fullmatch, added)}
            if (folder / "tokenizer.model").is_file():
                names |= control_pieces(folder / "tokenizer.model")
            with reading(f"the chat template of {folder}", "a template as transformers reads it"):
                return JinjaTemplate.make(source, known, names)
    raise ValueError(f"{' and '.join(map(str, filter(None, folders)))} has no chat template of its "
                     "own. Name another with --template.")


# ----- Rendering -----
@functools.cache
def compile_template(source: str):
    """A template in the environment that transformers renders it in."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError("a chat template needs a library that is not installed: pip install jinja2"
                         ) from None

    class Generation(Extension):
        """{% generation %} around what an assistant says: the text alone."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception,
                     "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    try:
        return made.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"it is no Jinja template ({' '.join(str(error).split())[:100]}). Name "
                         "another with --template.") from None


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template under the calls of a ChatTemplate.

    source: the template. known: the names of control tokens that it is given. names: the texts that
    are control tokens where the template says them. Made by `make`, which finds the rest: what
    stands before a response and ends it, whether the template itself says the end, and whether a
    response loses the blanks on its left and right.
    """

    source: str
    known: dict
    names: frozenset
    separator: str = ""
    end: str = "</s>"
    ended: bool = False
    strips: tuple = (False, False)
    probe: Prompt = field(default=Prompt(), repr=False)  # a prompt, whose end is that of all

    @classmethod
    def make(cls, source: str, known: dict, names) -> "JinjaTemplate":
        """A template whose prompts were tried. Raises ValueError for one that has no prompts."""
        names = frozenset({*names, "<s>", "</s>"})
        plain = cls(source, {name: text for name, text in known.items() if text}, names)
        asked = [{"role": "user", "content": "x"}]
        prompt = plain.render_raw(asked, [])
        answer = {"role": "assistant", "content": BLANKS + ANSWER + BLANKS}
        answered = plain.render_raw([*asked, answer], [], prompt=False)
        refuse(not answered.startswith(prompt) or ANSWER not in answered[len(prompt):],
               f"a conversation in it does not begin with its prompt, {prompt[-40:]!r}, and go on "
               "with the response. Name another with --template.")
        before, _, behind = answered[len(prompt):].partition(ANSWER)
        strips = not before.endswith(BLANKS), not behind.startswith(BLANKS)
        before, behind = before.removesuffix(BLANKS), behind.removeprefix(BLANKS)
        last = re.search("|".join(map(re.escape, sorted(names, key=len, reverse=True))), behind)
        end = behind[:last.end()] if last else known.get("eos_token") or "</s>"
        probe = Prompt.of([(prompt, True)], end, whole=True, names=names)
        return cls(source, plain.known, names, before, end, bool(last), strips, probe)

    @property
    def tail(self) -> str:
        """What every prompt ends in."""
        return self.probe[-1:]

    def hide_names(self, messages: list[dict], hidden: list[str]) -> list[dict]:
        """The messages with placeholders for names of control tokens, which are added to hidden."""
        pattern = "|".join(map(re.escape, sorted({*self.names, OPENING}, key=len, reverse=True)))

        def hide(found):
            hidden.append(found[0])
            return f"{OPENING}{len(hidden) - 1}{CLOSING}"
        return [message | {"content": re.sub(f"{pattern}|{MARK.pattern}", hide,
                                             message["content"])} for message in messages]

    def render_raw(self, messages: list[dict], hidden: list[str], *, prompt: bool = True) -> str:
        """What the template makes of messages, with placeholders for the texts in `hidden`.

        prompt: whether a response of the assistant is to come. The texts are added to `hidden`.
        """
        given, made = self.hide_names(messages, hidden), compile_template(self.source)
        import jinja2
        try:
            return made.render(
                messages=given, add_generation_prompt=prompt, tools=None, documents=None,
                **self.known)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError,
                ArithmeticError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise TemplateRefusal(f"the chat template says: {reason}. Change the data, or name "
                                  "another template with --template.") from None

    def as_prompt(self, raw: str, hidden: list[str], *, whole: bool) -> Prompt:
        """A part of what the template made as a prompt: hidden texts are the user's, not its own.

        whole: whether it begins where the conversation does, so that BOS is in it or not meant.
        """
        parts = []
        for k, piece in enumerate(re.split(f"{OPENING}(\\d+){CLOSING}", raw)):
            parts.append((hidden[int(piece)], False) if k % 2 else (piece, True))
        return Prompt.of(parts, self.end, whole=whole, names=self.names)

    def render(self, instruction: str, input: str = "", judgment: str | None = None, *,
               literal: bool = False) -> Prompt:
        """The prompt of one instruction; see `data.Template.render`."""
        if "{input}" in instruction and not literal:
            instruction, input = instruction.replace("{input}", input), ""
        text = f"{instruction}\n{input}" if input else instruction
        text = text if judgment is None else JUDGED.format(text, judgment)
        return self.render_conversation([{"role": "user", "content": text}])

    def render_conversation(self, messages: list[dict]) -> Prompt:
        """The prompt of messages: maybe one of the system, then turns; the user last."""
        hidden = []
        return self.as_prompt(self.render_raw(messages, hidden), hidden, whole=True)

    def split_turns(self, messages: list[dict]) -> list[list]:
        """[[prompt, response], ...] of messages; None for a response to come.

        Each prompt but the first is what the template adds to the turns before it. Raises
        TemplateRefusal for a template that writes an earlier turn in another way when more follow,
        or a response in another way than it is learnt.
        """
        turns, said = [], ""
        for k, message in enumerate(messages):
            if message["role"] != "user":
                continue
            hidden = []
            raw = self.render_raw(messages[:k + 1], hidden)
            self.check_kept(raw, said)
            turns.append([self.as_prompt(raw[len(said):], hidden, whole=not turns), None])
            if k + 1 < len(messages):
                turns[-1][1] = messages[k + 1]["content"]
                answer = self.hide_names(messages[:k + 2], [])[-1]["content"]
                said = raw + self.separator + self.strip(answer) + self.end * self.ended
                whole = self.render_raw(messages[:k + 2], [], prompt=False)
                self.check_kept(whole, raw)
                if not whole.startswith(said) or not self.ended and k + 2 < len(messages):
                    raise TemplateRefusal(
                        "the chat template writes a response in another way than it is learnt, or "
                        "without an end. Name another with --template.")
        return turns

    @staticmethod
    def check_kept(text: str, begin: str) -> None:
        """Raise TemplateRefusal unless a conversation begins as it did when it was shorter."""
        if not text.startswith(begin):
            raise TemplateRefusal(
                "the chat template writes an earlier turn in another way when more follow, so its "
                "responses cannot be learnt together. Learn the last with --train-on last, or name "
                "another template with --template.")

    def strip(self, response: str) -> str:
        """A response without the blanks that the template drops around it."""
        left, right = self.strips
        response = response.lstrip() if left else response
        return response.rstrip() if right else response

    def close(self, response: str) -> Prompt:
        """What stands behind a prompt: the response and its end."""
        parts = [(self.separator + self.strip(response), False), (self.end, True)]
        return Prompt.of(parts, names=self.names)

    def encode_response(self, tokenizer, response: str) -> list[int]:
        """The ids of a response and its end, the same behind any prompt of this template."""
        before = tokenizer.encode_prompt(self.probe)
        if before and before[-1] in tokenizer.control:
            ids = tokenizer.encode_turn(self.close(response))
        else:
            ids = tokenizer.encode_continuation(self.close(response), self.tail)
        return ids if ids[-1] in tokenizer.control else ids + [tokenizer.eos_id]
