"""Chat templates: prompts that know who says what in them, and conversations as documents."""

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import data
from data import IGNORE_INDEX, truncate_left
from extras import tomllib
from extras.formats.checks import read_object, reading, refuse, show


class Prompt(str):
    """The text of a prompt, `parts` [(text, trusted)] that make it up, and what `end`s a response.

    What a template says is trusted: where it names a control token, that token is meant. What a
    user says is not: there `</s>` is four characters.
    """

    @classmethod
    def of(cls, parts, end: str = "</s>", *, whole: bool = False, names=None) -> "Prompt":
        """A prompt of these parts; where it is `whole`, no BOS is added.

        names: the control tokens that trusted parts may name; None for all.
        """
        prompt = cls("".join(text for text, _ in parts))
        prompt.parts, prompt.end, prompt.whole, prompt.names = tuple(parts), end, whole, names
        return prompt


class TemplateRefusal(ValueError):
    """A chat template cannot write a conversation; others of the same data it may."""


@dataclass(frozen=True)
class ChatTemplate(data.Template):
    """A template for conversations, too; templates.toml says what the fields are."""

    end: str = "</s>"
    turn: str = ""
    opening: str = ""
    system: str = ""
    between: str = ""
    strip: bool = False

    @property
    def tail(self) -> str:
        """What every prompt ends in; a line break where that is up to the user."""
        return "\n" if self.with_input.endswith("}") else self.with_input[-1]

    def render(self, instruction: str, input: str = "", judgment: str | None = None, *,
               literal: bool = False) -> Prompt:
        """The prompt of one instruction; see `data.Template.render`."""
        if "{input}" in instruction and not literal:
            instruction, input = instruction.replace("{input}", input), ""
        kind = "" if judgment is None else "judged_"
        text = getattr(self, f"{kind}with_input" if input else f"{kind}without_input")
        values = {"instruction": instruction, "input": input, "judgment": judgment or ""}
        return self.fill(text, values)

    def render_turn(self, user: str, *, system: str | None = None, first: bool = True) -> Prompt:
        """What stands before the response of one turn of a conversation."""
        system = self.system if system is None else system
        text = self.turn.replace("{opening}", self.opening if first and system else "")
        return self.fill(self.between * (not first) + text, {"user": user, "system": system})

    def render_conversation(self, messages: list[dict]) -> Prompt:
        """The prompt of messages: maybe one of the system, then turns; the user last."""
        parts = []
        for prompt, response in self.split_turns(messages):
            parts += prompt.parts
            if response is not None:
                parts += self.close(response).parts
        return Prompt.of(parts, self.end)

    def split_turns(self, messages: list[dict]) -> list[list]:
        """[[prompt, response], ...] of messages; None for a response to come."""
        turns, system = [], None
        for message in messages:
            if message["role"] == "system":
                system = message["content"]
            elif message["role"] == "user":
                user = message["content"]
                turns.append([self.render_turn(user, system=system, first=not turns), None])
            else:
                turns[-1][1] = message["content"]
        return turns

    def close(self, response: str) -> Prompt:
        """What stands behind a prompt: the response and its end."""
        text = response.strip() if self.strip else response
        return Prompt.of([(self.separator + text, False), (self.end, True)])

    def fill(self, text: str, values: dict) -> Prompt:
        """Fill the places in one pass. The template's text is trusted, the values are not."""
        parts = []
        for k, piece in enumerate(re.split("{(" + "|".join(values) + ")}", text)):
            if k % 2 and self.strip and piece != "system":
                parts.append((values[piece].strip(), False))
            else:
                parts.append((values[piece], False) if k % 2 else (piece, True))
        return Prompt.of(parts, self.end)

    def encode_response(self, tokenizer, response: str) -> list[int]:
        """The ids of a response and its end, the same behind any prompt of this template."""
        ids = tokenizer.encode_continuation(self.close(response), self.tail)
        return ids if ids[-1] in tokenizer.control else ids + [tokenizer.eos_id]


def encode_conversation(tokenizer, template: ChatTemplate, example: dict, *, max_len: int,
                        last_only: bool = False) -> dict | None:
    """An example of `read_examples` as a document, with labels on what the assistant says.

    last_only: all before the last answer is its prompt. Of a conversation that is too long the last
    turns are dropped, of a single prompt its left. None where not even the first response fits.
    """
    if "messages" in example and last_only:
        *before, answer = example["messages"]
        turns = [[template.render_conversation(before), answer["content"]]]
    elif "messages" in example:
        turns = template.split_turns(example["messages"])
    else:
        prompt = template.render(example["instruction"], example["input"], literal=True)
        turns = [[prompt, example["output"]]]
    ids, labels, truncated = [], [], 0
    for asked, answer in turns:
        response = template.encode_response(tokenizer, answer)
        prompt = tokenizer.encode_turn(asked) if ids else tokenizer.encode_prompt(asked)
        if len(ids) + len(prompt) + len(response) > max_len:
            truncated = 1
            if ids or len(response) > max_len - 2:
                break
            prompt = truncate_left(prompt, max_len - len(response))
        ids += prompt + response
        labels += [IGNORE_INDEX] * len(prompt) + response
    return {"input_ids": ids, "labels": labels, "truncated": truncated} if ids else None


# ----- Finding one -----
def make_template(given: dict) -> ChatTemplate:
    """A template of these fields: prompts are made of `turn`, or `turn` of the prompts."""
    judgment = "\n\nJudgment of the response: {judgment}"
    made, one = {}, given.get("without_input", given.get("with_input"))
    if one is None and "turn" in given:
        system = given.get("system", "")
        opening = given.get("opening", "").replace("{system}", system) if system else ""
        ask = given["turn"].replace("{opening}", opening)
        asked = {"with_input": "{instruction}\n{input}", "without_input": "{instruction}"}
        for name, text in asked.items():
            made[name] = ask.replace("{user}", text)
            made[f"judged_{name}"] = ask.replace("{user}", text + judgment)
    else:
        one = one or ""
        made = {"with_input": one.replace("{instruction}", "{instruction}\n{input}"),
                "without_input": one, "between": "\n",
                "turn": "{opening}" + one.replace("{instruction}", "{user}")}
        for name in ("with_input", "without_input"):
            text = given.get(name, made[name])
            made[f"judged_{name}"] = text.replace("{instruction}", "{instruction}" + judgment)
    return ChatTemplate(**made | given)


def read_templates() -> dict[str, ChatTemplate]:
    """The templates of templates.toml, by name; the course has the prompts of some."""
    text = Path(__file__).with_name("templates.toml").read_text(encoding="utf-8")
    known = {name: asdict(template) for name, template in data.TEMPLATES.items()}
    return {name: make_template(given | known.get(name, {}))
            for name, given in tomllib.loads(text).items()}


TEMPLATES = read_templates()
THEIRS = {"prompt_input": "with_input", "prompt_no_input": "without_input"}  # alpaca-lora's names
PLACES = {"with_input": ("instruction", "input"), "without_input": ("instruction",),
          "judged_with_input": ("instruction", "input", "judgment"),
          "judged_without_input": ("instruction", "judgment"), "turn": ("user",)}


def find_template(name: str, *folders):
    """TEMPLATES[name], the template in a JSON file, or "chat", the chat template of a checkpoint.

    folders: of an adapter and a model, where the checkpoint's own is, and copies of files that are
    not found by their names. Raises ValueError that lists the names.
    """
    from extras.formats import chat

    place = next(filter(None, folders), "a model")
    refuse(not isinstance(name, str), f"the template in config.json of {place} is {show(name)}. "
           "Expected a name.")
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name == chat.NAME:
        return chat.open_chat_template(*folders)
    refuse(not name.endswith(".json"), f"unknown template {name!r:.60}. Templates: "
           f"{', '.join(TEMPLATES)}, chat (the checkpoint's own), or a JSON file of your own "
           "(--template, or prompt_template in the model's config.json).")
    file = find_file(name, *folders)
    refuse(not file, f"there is no template file {name}. Templates: {', '.join(TEMPLATES)}, chat "
           "(the checkpoint's own), or a JSON file that exists.")
    return read_template(file)


def find_file(name: str, *folders) -> Path | None:
    """A template file by its name, or its copy in one of the folders."""
    places = [Path(name), *(Path(folder, Path(name).name) for folder in folders if folder)]
    return next((place for place in places if name.endswith(".json") and place.is_file()), None)


def keep_template(name: str, folder: Path) -> None:
    """Copy a template file into a run folder, where it is found from any working directory."""
    file = find_file(name)
    if file and file.resolve() != (folder / file.name).resolve():
        shutil.copyfile(file, folder / file.name)


def read_template(file: Path) -> ChatTemplate:
    """The template in a JSON file."""
    given = {THEIRS.get(key, key): value for key, value in read_object(file).items()
             if key not in ("description", "response_split")}
    with reading(file, "the fields of extras/formats/templates.toml"):
        template = make_template(given)
        for key, value in asdict(template).items():
            kind = bool if key == "strip" else str
            refuse(type(value) is not kind, f"{key} is {show(value)}. Expected a {kind.__name__}.")
        refuse(not template.end.strip(), "end is empty. Expected a token, such as </s>.")
        for key, places in PLACES.items():
            text = getattr(template, key)
            for place in places:
                refuse(f"{{{place}}}" not in text, f"{key} lacks {{{place}}}.")
            refuse(text.startswith("<s>"), f"{key} begins with <s>, and BOS is added anyway.")
        ends = sorted({getattr(template, key)[-1] for key in PLACES})
        refuse(len(ends) > 1, f"its prompts end in {' and '.join(map(repr, ends))}. Let them end "
               "alike, so that a response has the same tokens behind each.")
    return template


def check_template(tokenizer, template: ChatTemplate, name: str) -> None:
    """Raise ValueError where the tokenizer has no token that ends the template's responses."""
    try:
        tokenizer.stop_ids([Prompt.of([], template.end)])
    except ValueError as error:
        raise ValueError(str(error).replace("the template", f"template {name}", 1)) from None
