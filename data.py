"""From task files to packed batches: tokenizer, templates, tasks, wordings, splits, records.

Methods: instruction augmentation of arXiv 2403.14221 (`instruction_examples`); everything here is text and token ids.

    B batch   N tokens of a packed row (documents laid end to end, no padding)

A document is a prompt and its response. `input_ids` and `labels` are aligned; labels are IGNORE_INDEX on the prompt.
The shift by one lives in losses.prediction_rows, nowhere else.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import random
import re
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import sentencepiece
import torch

IGNORE_INDEX = -100
LONGEST_TEXT = 4 * 10**6                                    # characters: sentencepiece takes some hundred bytes for each
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")     # what a tokenizer.model itself does not say


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and templates


class Prompt(str):
    """The text of a prompt, and who says what in it: `parts` are (text, trusted) pairs that make up the text.

    What a template says is trusted: where it names a control token, that token is meant. What a user says is not: there
    `</s>` is four characters. `end` is what ends a response to this prompt.
    """

    parts: tuple[tuple[str, bool], ...]
    end: str

    @classmethod
    def of(cls, parts, end: str = "</s>") -> Prompt:
        prompt = cls("".join(text for text, _ in parts))
        prompt.parts, prompt.end = tuple(parts), end
        return prompt


class Tokenizer:
    """A sentencepiece model in LLaMA's manner: BOS is added once, by `encode_prompt`; users' text never yields control ids.

    Control are the model's control pieces, added tokens that are special, and user-defined pieces that are special or that
    look like a template's marks. Other user-defined pieces are words.

    `path` is a tokenizer.model or a folder that holds one. What stands beside it is read along: tokenizer_config.json
    (`legacy`, `add_bos_token`, added tokens) and added_tokens.json; beside a file that stands alone, what `model_folder`
    has of them. Added tokens that are not special are found in any text.

    `legacy` is about text behind a control token: true (the default where the key is absent, as in transformers 4) gives
    it sentencepiece's blank in front, false does not.

    Raises ValueError where the file is absent or of another kind.
    """

    def __init__(self, path, model_folder=""):
        path = Path(path)
        file = path / "tokenizer.model" if path.is_dir() else path
        alone = bool(model_folder) and not any((file.parent / name).is_file() for name in SIDE_FILES)
        self.path, self.folder = file, Path(model_folder) if alone else file.parent
        config = _beside(self.folder, "tokenizer_config.json")
        added, special = _added_tokens(self.folder, config)
        self.model = _read_sentencepiece(file, special)
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{file} defines no BOS or no EOS piece (ids {self.bos_id}, {self.eos_id}). "
                             "Use the tokenizer of a LLaMA-family checkpoint.")
        self.legacy, self.add_bos = config.get("legacy") is not False, config.get("add_bos_token") is not False
        self.special = {self.model.id_to_piece(i): i for i in range(len(self.model)) if self.model.is_control(i)}
        self.special |= {"<s>": self.bos_id, "</s>": self.eos_id}                       # however this tokenizer calls them
        self.special |= {text: token for text, token in added.items() if text in special}
        self.added = {text: token for text, token in added.items() if text not in special and token >= len(self.model)}
        self.text_of = {token: text for text, token in self.added.items()}
        self.control = set(self.special.values())

    def __len__(self) -> int:
        """One more than the highest id that this can give."""
        return max(len(self.model), 1 + max([*self.special.values(), *self.added.values()]))

    def encode_prompt(self, text: str) -> list[int]:
        """BOS, once, and the ids of `text`."""
        runs = self._runs(getattr(text, "parts", ((text, False),)))
        ids = self.model.encode(runs[0]) + self._rest(runs)
        return ids if not self.add_bos or ids[:1] == [self.bos_id] else [self.bos_id] + ids

    def encode_continuation(self, text: str, tail: str = "\n") -> list[int]:
        """The ids of `text` as they stand behind a prompt that ends in `tail` (equal to the joint encoding's).

        sentencepiece puts a space before whatever it encodes; so `tail` is encoded along and its ids are dropped. Where
        the two would fuse into one piece, as ":" and ")" do, a tail is taken that nothing fuses with.
        """
        runs = self._runs(getattr(text, "parts", ((text, False),)))
        for head_text in (tail, "\n", "\x01"):
            head, ids = self.model.encode(head_text), self.model.encode(head_text + runs[0])
            if ids[:len(head)] == head:
                return ids[len(head):] + self._rest(runs)
        raise ValueError(f"{self.path} makes one piece of a line break and {text[:20]!r}. Use a LLaMA-family tokenizer.")

    def encode_turn(self, text: str) -> list[int]:
        """The ids of `text` behind a control token."""
        return self._rest(["", None, *self._runs(getattr(text, "parts", ((text, False),)))])

    def _runs(self, parts) -> list:
        """[text, id, text, id, ..., text]: the ids of added tokens, and of control tokens where the part is trusted."""
        runs = [""]
        for text, trusted in parts:
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"{ascii(text[:60])} holds half of a character (a lone surrogate), which no tokenizer takes. Mend it where it comes from.")
            if len(text) > LONGEST_TEXT:
                raise ValueError(f"{ascii(text[:60])} goes on for {len(text):,} characters. Expected at most {LONGEST_TEXT:,}. Cut it where it comes from.")
            names = self.special | self.added if trusted else self.added
            pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
            for k, piece in enumerate(re.split(f"({pattern})", text) if names else [text]):
                if k % 2:
                    runs += [names[piece], ""]
                else:
                    runs[-1] += piece
        return runs

    def _rest(self, runs: list) -> list[int]:
        """The ids of all runs but the first; None stands for a token that is there already."""
        ids = []
        for token, text in zip(runs[1::2], runs[2::2]):
            ids += [token] if token is not None else []
            if text:
                ids += self.model.encode(text) if self.legacy else self.encode_continuation(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, control tokens and ids without a text dropped, without surrounding blanks."""
        texts, run = [], []
        for token in [*ids, None]:
            if token is None or token in self.text_of:
                texts += [self.model.decode(run), self.text_of.get(token, "")]
                run = []
            elif token < len(self.model) and token not in self.control:
                run.append(token)
        return "".join(texts).strip()


def stop_ids(tokenizer, prompts: list[str]) -> tuple[int, ...]:
    """The ids that end an answer to these prompts: EOS, and what their template ends a response with."""
    ends = {tokenizer.encode_turn(Prompt.of([(prompt.end, True)]))[-1] for prompt in prompts if isinstance(prompt, Prompt)}
    return tuple(dict.fromkeys([tokenizer.eos_id, *sorted(ends & tokenizer.control if ends else ())]))


def check_vocabulary(tokenizer, vocab_size: int, bos_id: int | None, eos_ids: tuple[int, ...], where) -> str:
    """A warning where config.json and the tokenizer name other BOS and EOS ids, or nothing; the tokenizer is believed.

    Raises ValueError where the tokenizer has ids that the embedding has no rows for.
    """
    if len(tokenizer) > vocab_size:
        raise ValueError(f"tokenizer has {len(tokenizer)} pieces but the embedding has {vocab_size} rows "
                         f"({where}). Use the tokenizer that came with this checkpoint.")
    if tokenizer.eos_id in eos_ids and bos_id in (None, tokenizer.bos_id):
        return ""
    return (f"warning: config.json of {where} says BOS {bos_id} and EOS {', '.join(map(str, eos_ids)) or 'none'}, its tokenizer says "
            f"{tokenizer.bos_id} and {tokenizer.eos_id}; the tokenizer is believed.")


def check_template(tokenizer, template: Template, name: str) -> None:
    """Raise ValueError where the template ends responses with a token that the tokenizer does not have."""
    if tokenizer.encode_turn(Prompt.of([(template.end, True)]))[-1] not in tokenizer.control:
        raise ValueError(f"template {name} ends responses with {template.end.strip()!r}, which is no token of {tokenizer.path}. "
                         "Use the template that the model was made for.")


TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", *SIDE_FILES, "chat_template.jinja")


def copy_tokenizer(tokenizer, model_folder, target) -> None:
    """Put every tokenizer file, and the model folder's generation_config.json, into `target`, whichever of them exist.

    A tokenizer.model that stands alone gets a tokenizer_config.json, without which transformers would not know its kind.
    """
    target, folder = Path(target), tokenizer.folder
    found = {name: (place / name).read_bytes() for place in (folder, tokenizer.path.parent) for name in TOKENIZER_FILES if (place / name).is_file()}
    found["tokenizer.model"] = tokenizer.path.read_bytes()
    if model_folder and (Path(model_folder) / "generation_config.json").is_file():
        found["generation_config.json"] = (Path(model_folder) / "generation_config.json").read_bytes()
    if "tokenizer_config.json" not in found:
        pieces = {name: tokenizer.model.id_to_piece(i) for name, i in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id),
                                                                       ("unk_token", tokenizer.model.unk_id()))}
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": tokenizer.legacy, "add_bos_token": tokenizer.add_bos, "add_eos_token": False,
                  "clean_up_tokenization_spaces": False, **pieces}
        found["tokenizer_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    target.mkdir(parents=True, exist_ok=True)
    for name, blob in found.items():
        (target / name).write_bytes(blob)


def _beside(folder: Path, name: str) -> dict:
    """The JSON object in a file of `folder`; {} where there is none."""
    path = folder / name
    if not path.is_file():
        return {}
    if path.stat().st_size > 10**8:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, which is no {name}.")
    found = _read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}. Expected a JSON object.")
    return found


def _added_tokens(folder: Path, config: dict) -> tuple[dict[str, int], set[str]]:
    """{text: id} of the tokens that were added to the sentencepiece model, and which of them are special.

    In added_tokens_decoder of tokenizer_config.json (new), or in added_tokens.json (old), where those are special that
    special_tokens_map.json or tokenizer_config.json name; or, as transformers 5 writes, in tokenizer.json alone.
    """
    added, special, decoder = {}, set(), config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(isinstance(entry, dict) and isinstance(entry.get("content"), str) for entry in decoder.values()):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is {json.dumps(decoder)[:60]}. Expected an object of objects with "
                         "content, by id. Take the file that came with the model.")
    for token, entry in decoder.items():
        added[entry.get("content")] = int(token) if token.isdecimal() and len(token) < 9 else None
        special |= {entry.get("content")} if entry.get("special") is True else set()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for value in (config if name == "tokenizer_config.json" else _beside(folder, name)).values():
            for item in value if isinstance(value, list) else [value]:
                text = item.get("content") if isinstance(item, dict) else item
                special |= {text} if isinstance(text, str) else set()
    for text, token in _beside(folder, "added_tokens.json").items():
        added.setdefault(text, token)
    rows = _beside(folder, "tokenizer.json").get("added_tokens") or [] if not added else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("content"), str) for row in rows):
        raise ValueError(f"{folder / 'tokenizer.json'}: added_tokens is {json.dumps(rows)[:60]}. Expected a list of objects with id and content. "
                         "Take the file that came with the model.")
    added |= {row["content"]: row.get("id") for row in rows}
    special |= {row["content"] for row in rows if row.get("special") is True}
    for text, token in added.items():
        if not isinstance(text, str) or not text or type(token) is not int or not 0 <= token < 2**24:
            raise ValueError(f"{folder}: added token {text!r:.60} has the id {token!r:.20}. Expected a text and a number from 0 to {2**24}.")
    return added, special


MARKER = re.compile(r"<\|[^|<>]+\|>|\[/?INST\]|<</?SYS>>")   # templates' own marks, whatever a tokenizer's files call them


def _guarded(blob: bytes, special: set[str]) -> bytes:
    """The sentencepiece model with its special user-defined pieces turned into control pieces, so that no text yields them.

    A piece is a message of a file of messages: its text (field 1), its score (2), its kind (3: user-defined is 4, control 3).
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=blob)
    for piece in map(model.id_to_piece, range(len(model))):
        text = piece.encode()
        if (piece in special or MARKER.fullmatch(piece)) and len(text) < 128:
            blob = re.sub(rb"(\n%b(?:\x15.{4})?\x18)\x04" % re.escape(bytes([len(text)]) + text), b"\\1\x03", blob, flags=re.DOTALL)
    return blob


def _read_sentencepiece(file: Path, special: set[str]) -> sentencepiece.SentencePieceProcessor:
    """The model in the file, special pieces guarded, or one sentence that says what the file is instead."""
    if not file.exists():
        fast = file.parent / "tokenizer.json"
        if fast.exists():
            raise ValueError(f"{file.parent} has tokenizer.json but no tokenizer.model, and this program reads "
                             "sentencepiece only. Newer transformers versions do not save that file: take it from the "
                             "original model and pass --tokenizer FILE.")
        raise ValueError(f"no tokenizer at {file}. Give the model's tokenizer.model with --tokenizer FILE.")
    blob = file.read_bytes()
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\n", blob):
        raise ValueError(f"{file} is a tiktoken file (LLaMA 3 and later), not sentencepiece. "
                         "Use a LLaMA-1/2, Mistral, Vicuna or TinyLlama checkpoint.")
    if blob.startswith(b"version https://git-lfs"):
        raise ValueError(f'{file} is a Git LFS pointer of {len(blob)} bytes, not a tokenizer. Run "git lfs pull" there.')
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=_guarded(blob, special))
    except (RuntimeError, ValueError) as error:             # damaged, or pieces that are no UTF-8
        raise ValueError(f"{file} is not a sentencepiece model ({' '.join(str(error).split())[:80]}). Use the tokenizer.model of the checkpoint.") from None


@dataclass(frozen=True)
class Template:
    """How an instruction and an input become a prompt; `separator` stands before the response and belongs to it.

    `<s>` and `</s>` stand for BOS and EOS, but a prompt's first BOS is the tokenizer's to add. Conversations: `turn` with
    {opening} and {user}, where the opening, with {system}, stands in the first turn only; `between` follows a response.
    """

    with_input: str
    without_input: str
    judged_with_input: str                                  # the same, with a judgment that the response should match
    judged_without_input: str
    separator: str = ""
    end: str = "</s>"                                       # ends a response and is learnt with it
    turn: str = ""
    opening: str = ""
    system: str = ""                                        # the system message where the data has none
    between: str = ""
    strip: bool = False                                     # what users and models say loses its surrounding blanks

    @property
    def tail(self) -> str:
        """What every prompt of this template ends in; responses are encoded behind it. A line break where that is open."""
        return "\n" if self.with_input.endswith("}") else self.with_input[-1]

    def render(self, instruction: str, input: str = "", judgment: str | None = None, *, literal: bool = False) -> Prompt:
        """The prompt. A task's wording with the placeholder {input} places the input itself; other people's text is `literal`.

        Substitutes once, in one pass.
        """
        if "{input}" in instruction and not literal:
            instruction, input = instruction.replace("{input}", input), ""
        if judgment is None:
            text = self.with_input if input else self.without_input
        else:
            text = self.judged_with_input if input else self.judged_without_input
        return self._fill(text, {"instruction": instruction, "input": input, "judgment": judgment})

    def render_turn(self, user: str, *, system: str | None = None, first: bool = True) -> Prompt:
        """What stands before the response of one turn of a conversation."""
        system = (self.system if system is None else system) if first else ""
        text = self.turn.replace("{opening}", self.opening if system else "")
        return self._fill(text if first else self.between + text, {"user": user, "system": system})

    def render_conversation(self, messages: list[dict]) -> Prompt:
        """A prompt of a whole conversation: [{"role": "system"}, ] then user and assistant in turns, the user last."""
        parts, system = [], None
        for message in messages:
            if message["role"] == "system":
                system = message["content"]
            elif message["role"] == "user":
                parts += self.render_turn(message["content"], system=system, first=not parts).parts
            else:
                answer = message["content"].strip() if self.strip else message["content"]
                parts += [(self.separator + answer, False), (self.end, True)]
        return Prompt.of(parts, self.end)

    def _fill(self, text: str, values: dict) -> Prompt:
        """The template's own text is trusted, the values are not."""
        pieces = re.split(r"\{(%s)\}" % "|".join(values), text)
        said = {name: value.strip() if self.strip and isinstance(value, str) and name != "system" else value for name, value in values.items()}
        return Prompt.of([(said[piece], False) if k % 2 else (piece, True) for k, piece in enumerate(pieces)], self.end)


def _chat(turn: str, **more) -> Template:
    """A template of conversations, with its forms for one instruction: the input on the line behind it."""
    template = Template("", "", "", "", turn=turn, **more)
    ask = turn.replace("{opening}", template.opening.replace("{system}", template.system) if template.system else "")
    said = ("{instruction}\n{input}", "{instruction}", "{instruction}\n{input}\n\nJudgment of the response: {judgment}",
            "{instruction}\n\nJudgment of the response: {judgment}")
    return Template(*(ask.replace("{user}", text) for text in said), turn=turn, **more)


ALPACA = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a "
          "response that appropriately completes the request.\n\n",
          "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n")
ALPACA_JUDGED = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a "   # CUT, Fig. 5
                 "response to the instruction and the response should match the corresponding judgment.\n\n",
                 "Below is an instruction that describes a task. Write a response to the instruction and the response should match "
                 "the corresponding judgment.\n\n")


def _alpaca(tail: str) -> Template:
    """Stanford's wording (2023); `tail` follows "### Response:"."""
    instruction, input, judgment = "### Instruction:\n{instruction}\n\n", "### Input:\n{input}\n\n", "### Judgment:\n{judgment}\n\n"
    response = "### Response:" + tail
    return Template(ALPACA[0] + instruction + input + response, ALPACA[1] + instruction + response,
                    ALPACA_JUDGED[0] + instruction + input + judgment + response, ALPACA_JUDGED[1] + instruction + judgment + response,
                    turn="{opening}### Instruction:\n{user}\n\n" + response, opening="{system}\n\n", system=ALPACA[1].rstrip(), between="\n\n")


TEMPLATES = {
    "alpaca": _alpaca("\n"),                                # alpaca-lora's and CUT's: a line break behind the colon
    "alpaca-stanford": _alpaca(""),
    "plain": Template("### Instruction: {instruction}\n### Input: {input}\n### Response:",
                      "### Instruction: {instruction}\n### Response:",
                      "### Instruction: {instruction}\n### Input: {input}\n### Judgment: {judgment}\n### Response:",
                      "### Instruction: {instruction}\n### Judgment: {judgment}\n### Response:", separator=" ",
                      turn="{opening}### Instruction: {user}\n### Response:", opening="{system}\n", between="\n"),
    "vicuna": _chat("{opening}USER: {user} ASSISTANT:", opening="{system} ", separator=" ",     # v1.1 and later
                    system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
                           "and polite answers to the user's questions."),
    "llama2": _chat("[INST] {opening}{user} [/INST]", opening="<<SYS>>\n{system}\n<</SYS>>\n\n", separator=" ", end=" </s>",
                    between="<s>", strip=True),
    "chatml": _chat("{opening}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
                    opening="<|im_start|>system\n{system}<|im_end|>\n", end="<|im_end|>", between="\n"),
    "zephyr": _chat("{opening}<|user|>\n{user}</s>\n<|assistant|>\n", opening="<|system|>\n{system}</s>\n", between="\n"),  # TinyLlama's, too
    "raw": _chat("{opening}{user}", opening="{system}\n", separator=" ", between="\n"),
}


def find_template(name: str) -> Template:
    """TEMPLATES[name], or the template in a user's JSON file; a ValueError that lists the names."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name.endswith(".json"):
        return _template_from_file(Path(name))
    raise ValueError(f"unknown template {name!r:.60}. Templates: {', '.join(TEMPLATES)}, or a JSON file of your own "
                     "(--template, or prompt_template in the model's config.json).")


def _template_from_file(path: Path) -> Template:
    """A template from JSON: the fields of Template, of which `turn` alone suffices, or alpaca-lora's prompt_input and prompt_no_input."""
    if not path.is_file():
        raise ValueError(f"there is no template file {path}. Templates: {', '.join(TEMPLATES)}, or a JSON file that exists.")
    given = _read_json(path)
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds a {type(given).__name__}. Expected a JSON object.")
    given = {{"prompt_input": "with_input", "prompt_no_input": "without_input"}.get(name, name): value for name, value in given.items()
             if name not in ("description", "response_split")}                          # alpaca-lora's, without a use here
    kinds = {item.name: bool if item.name == "strip" else str for item in fields(Template)}
    for name, value in given.items():
        if name not in kinds or type(value) is not kinds[name]:
            raise ValueError(f"{path}: {name} is {json.dumps(value)[:60]}. Expected texts under {', '.join(kinds)} (strip: true or false).")
    if "turn" in given and "with_input" not in given and "without_input" not in given:
        judged = {name: given.pop(name) for name in ("judged_with_input", "judged_without_input") if name in given}
        made = replace(_chat(**given), **judged)
    else:
        for name, other in (("with_input", "without_input"), ("without_input", "with_input")):
            if name not in given:
                given[name] = given.get(other, "").replace("{instruction}", "{instruction}\n{input}" if name == "with_input" else "{instruction}")
        told = "{instruction}\n\nJudgment of the response: {judgment}"
        given = {"judged_" + name: given[name].replace("{instruction}", told) for name in ("with_input", "without_input")} | given
        made = Template(**({"turn": "{opening}" + given["without_input"].replace("{instruction}", "{user}"), "between": "\n"} | given))
    prompts = {"with_input": ("instruction", "input"), "without_input": ("instruction",), "turn": ("user",),
               "judged_with_input": ("instruction", "input", "judgment"), "judged_without_input": ("instruction", "judgment")}
    if not made.end.strip():
        raise ValueError(f"{path}: end is {made.end!r}. Expected the token that ends a response, such as </s>.")
    for name, wanted in prompts.items():
        missing = [word for word in wanted if "{%s}" % word not in getattr(made, name)]
        if missing or getattr(made, name).startswith("<s>"):
            raise ValueError(f"{path}: {name} {'lacks {%s}' % missing[0] if missing else 'begins with <s>, and BOS is added anyway'}. "
                             "Give it, so that every prompt has it once.")
    tails = {text[-1] for text in (made.with_input, made.without_input, made.judged_with_input, made.judged_without_input, made.turn)}
    if len(tails) > 1:
        raise ValueError(f"{path}: its prompts end in {' and '.join(map(repr, sorted(tails)))}. Let them all end alike, so that a "
                         "response has the same tokens behind each.")
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and wordings


@dataclass(frozen=True)
class Instance:
    """One input and its reference outputs."""

    id: str
    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Wording:
    """One way to put a task's instruction into words."""

    text: str
    style: str = ""


@dataclass
class Task:
    """A task: its original instruction, other wordings of it by split, and instances."""

    name: str
    definition: str
    instances: list[Instance]
    wordings: dict[str, list[Wording]] = field(default_factory=dict)    # {"train": [...], "dev": [...], "test": [...]}

    @property
    def labels(self) -> list[str] | None:
        """The closed set of outputs of a classification task; None where the answer is free.

        A task counts as classification when its outputs repeat: at most 50 different ones of at most six words, each
        of them twice or more on average.
        """
        outputs = [output for instance in self.instances for output in instance.outputs]
        labels = sorted(set(outputs))
        closed = len(labels) <= 50 and 2 * len(labels) <= len(outputs) and all(len(x.split()) <= 6 for x in labels)
        return labels if closed else None


def _read_json(path: Path):
    """The JSON in a file, or a ValueError naming file, line and column."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error.msg}, line {error.lineno} column {error.colno}.") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not readable as UTF-8 JSON: {error}.") from None


def _strings(value, where: str) -> list[str]:
    """A string or a list of strings, as a list (both are found in every field of the older files)."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(item, str) for item in values):
        raise ValueError(f"{where} is {json.dumps(value)[:60]}. Expected a string or a list of strings.")
    return values


def _task_from_ni(path: Path) -> Task:
    """A Super-NaturalInstructions file in any of its ages: Definition and output str or list, id or none."""
    record = _read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a {type(record).__name__}. Expected a task object with Definition and Instances.")
    for name in ("Definition", "Instances"):
        if name not in record:
            raise ValueError(f'{path}: field "{name}" is missing; found: {", ".join(list(record)[:8])}. '
                             "Expected a Super-NaturalInstructions task.")
    definition = " ".join(_strings(record["Definition"], f'{path}: field "Definition"')).strip()
    if not isinstance(record["Instances"], list) or not record["Instances"]:
        raise ValueError(f"{path} has no instances. Give it at least one, or remove the file.")
    instances = []
    for number, row in enumerate(record["Instances"]):
        where = f"{path}, record {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is a {type(row).__name__}. Expected an object with input and output.")
        for name in ("input", "output"):
            if name not in row:
                raise ValueError(f'{where}: field "{name}" is missing; found: {", ".join(row)}. '
                                 "Expected a string or a list of strings.")
        outputs = [text.strip() for text in _strings(row["output"], f'{where}, field "output"')]
        instances.append(Instance(str(row.get("id", f"{path.stem}-{number}")),
                                  _strings(row["input"], f'{where}, field "input"')[0].strip(), tuple(outputs)))
    return Task(path.stem, definition, instances)


def _tasks_from_induction(folder: Path) -> list[Task]:
    """The instruction-induction layout: human wordings in annotations/, instances in execute/."""
    tasks = []
    for path in sorted((folder / "annotations").glob("*.json")):
        file = path
        try:
            wordings = list(dict.fromkeys(text.strip() for text in _read_json(file)["annotations"] if text.strip()))
            file = folder / "execute" / path.name
            examples = _read_json(file)["examples"].items()
            instances = [Instance(f"{path.stem}-{number}", *_induction_example(row)) for number, row in examples]
            tasks.append(Task(path.stem, wordings[0], instances, split_wordings(path.stem, wordings[1:])))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no file of instruction induction: {error!r:.60}. Expected annotations, and examples by number.") from None
    return tasks


def _induction_example(row: dict) -> tuple[str, tuple[str, ...]]:
    """Input and reference outputs of one instruction-induction example, whichever its task's fields are."""
    if "cause" in row:                                      # two sentences in either order; the cause is asked for
        first, second = sorted((row["cause"], row["effect"]))
        return f"Sentence 1: {first} Sentence 2: {second}", (str(row["cause"]),)
    if "items" in row:
        return ", ".join(row["items"]), tuple(dict.fromkeys(map(str, [row["concept"], *row["all_common_concepts"]])))
    more = row.get("other_rhymes", []) + row.get("possible_translations", [])
    return str(row["input"]), tuple(dict.fromkeys(map(str, [row["output"], *more])))


def load_tasks(path) -> list[Task]:
    """All tasks at `path`: a Super-NaturalInstructions file, a folder of them, or an instruction-induction folder."""
    path = Path(path)
    if path.is_file():
        return [_task_from_ni(path)]
    if (path / "annotations").is_dir() and (path / "execute").is_dir():
        return _tasks_from_induction(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else []
    if not files:
        raise ValueError(f"no task files at {path}. Give a folder of *.json files in the schema of "
                         "Super-NaturalInstructions, or one such file.")
    return [_task_from_ni(file) for file in files]


def _hash_order(names: list[str], salt: str) -> list[str]:
    """The names in an order that depends on each name and the salt alone, not on the others."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}/{name}".encode(errors="surrogatepass")).digest())


def split_wordings(task: str, texts: list[str]) -> dict[str, list[Wording]]:
    """A plain list of wordings in three by a hash of the text: a quarter dev, a quarter test (two at least), the rest train.

    Fewer than five wordings are all for training: consistency needs two held-out ones.
    """
    order = [Wording(text) for text in _hash_order(list(dict.fromkeys(texts)), f"wordings/{task}")]
    held = max(2, len(order) // 4) if len(order) >= 5 else 0
    return {"test": order[:held], "dev": order[held:2 * held], "train": order[2 * held:]}


def load_paraphrases(path, tasks: list[Task]) -> None:
    """Read {task: [wording, ...]} or {task: {split: [wording, ...]}} into tasks; a wording is a string or {text, style}.

    Lists are split by `split_wordings`. The derived file of Tk-Instruct's human paraphrases ({task: {definition,
    paraphrases}}) is read too. Wordings equal to the definition or said twice are dropped.
    """
    path, by_name = Path(path), {task.name: task for task in tasks}
    record = _read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a {type(record).__name__}. Expected an object: task name -> wordings.")
    for name, given in record.items():
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, 1)
            raise ValueError(f"{path} has wordings for task {name!r}, which is not among the {len(tasks)} tasks."
                             + (f" Did you mean {near[0]!r}?" if near else " Remove them, or add the task."))
        task, where = by_name[name], f"{path}, task {name!r}"
        if isinstance(given, dict) and "paraphrases" in given:
            given = given["paraphrases"]
        if isinstance(given, list):
            task.wordings = split_wordings(name, [w.text for w in _wordings(given, where) if w.text != task.definition])
        elif isinstance(given, dict) and given.keys() <= {"train", "dev", "test"}:
            seen, task.wordings = {task.definition}, {}
            for split in ("train", "dev", "test"):
                rows = _wordings(given.get(split, []), f"{where}, {split}")
                task.wordings[split] = [w for w in rows if not (w.text in seen or seen.add(w.text))]
        else:
            raise ValueError(f"{where} is {json.dumps(given)[:60]}. Expected a list of wordings, or an object with the "
                             "lists train, dev and test.")


def _wordings(rows, where: str) -> list[Wording]:
    """A list of strings or {text, style} as wordings."""
    if not isinstance(rows, list):
        raise ValueError(f"{where} is {json.dumps(rows)[:60]}. Expected a list of wordings.")
    found = []
    for number, row in enumerate(rows):
        text, style = (row.get("text"), row.get("style", "")) if isinstance(row, dict) else (row, "")
        if not isinstance(text, str) or not text.strip() or not isinstance(style, str):
            raise ValueError(f"{where}, wording {number} is {json.dumps(row)[:60]}. Expected a string, or an object with "
                             "text and, if you like, style.")
        found.append(Wording(text, style))
    return found


FRAMES = {                                                  # around a definition, where nobody wrote wordings of it
    "train": ["Please do the following. {definition}", "{definition} Answer for the text below.", "Task: {definition}",
              "Here is what you have to do: {definition}", "{input}\n\n{definition}", "I need your help. {definition}",
              "Read the instruction and follow it. {definition}", "Given: {input}\nWhat to do: {definition}"],
    "dev": ["Could you help me with this? {definition}", "{input}\n\nThe instruction for the text above: {definition}",
            "Instruction - {definition}", "You are an expert. {definition} Think carefully, then give only the answer."],
    "test": ["Would you mind doing this for me? {definition}", "Text: {input}\n\nNow, {definition}", "TODO: {definition}",
             "{definition} Do not explain, just answer."],
}


def frame_bare_tasks(tasks: list[Task]) -> str:
    """Give every task without wordings some made of FRAMES; returns a sentence that says so, or nothing.

    They are a weak stand-in for paraphrases, since the definition's own words stay.
    """
    bare = [task for task in tasks if not any(task.wordings.values())]
    for task in bare:
        task.wordings = {split: [Wording(frame.replace("{definition}", task.definition), "frame") for frame in frames]
                         for split, frames in FRAMES.items()}
    return (f"{len(bare)} of {len(tasks)} tasks have no paraphrases: their definitions are set into the sentences of "
            "data.FRAMES. Real paraphrases (--paraphrases FILE) measure more.") if bare else ""


def split_instances(task: Task, split: str) -> list[Instance]:
    """The instances of one of the four disjoint splits: train, pool (for sampled candidates), dev, test.

    By a hash of the input text, so tasks that share inputs share the split, and the split outlives reordering:
    30 % train, 30 % pool, 15 % dev, 25 % test.
    """
    share = {"train": (0, 30), "pool": (30, 60), "dev": (60, 75), "test": (75, 100)}[split]

    def bucket(text):
        return int(hashlib.sha256(f"instances/{text}".encode(errors="surrogatepass")).hexdigest()[:8], 16) % 100
    return [instance for instance in task.instances if share[0] <= bucket(instance.input) < share[1]]


def load_pairs(path) -> dict[str, list[dict]]:
    """Labelled pairs of outputs by subset: {input, output_1, output_2, label 1 or 2}, as LLMBar has them (arXiv 2310.07641).

    `path` is LLMBar's repository or any folder in it (dataset.json in a folder per subset), a folder of such files named
    by subset (LLMBar_Natural.json), or one file.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.rglob("dataset.json")) or sorted(path.glob("*.json"))
    if not files:
        raise ValueError(f"no pairs at {path}. Give LLMBar's folder, or a JSON list of {{input, output_1, output_2, label}}.")
    subsets = {}
    for file in files:
        rows, name = _read_json(file), file.parent.name if file.name == "dataset.json" else file.stem.split("_")[-1]
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{file} holds no list. Expected a JSON list of {{input, output_1, output_2, label}}.")
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("input", "output_1", "output_2")) or not (
                    type(row.get("label")) is int and row["label"] in (1, 2)):
                raise ValueError(f"{file}, record {number} is {json.dumps(row)[:60]}. Expected input, output_1 and output_2 as text and a label 1 or 2.")
        if name in subsets:
            raise ValueError(f"{file}: subset {name!r} is there twice. Rename one of the files.")
        subsets[name] = [{key: row[key] for key in ("input", "output_1", "output_2", "label")} for row in rows]
    order = ["Natural", "Neighbor", "GPTInst", "GPTOut", "Manual"]
    return dict(sorted(subsets.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


# ---------------------------------------------------------------------------------------------------------------------
# Examples and questions


def instruction_examples(tasks, *, wordings: int, augment: str, per_task: int, seed: int, split="train") -> list[dict]:
    """Instruction examples {task, instruction, input, output, ...} (arXiv 2403.14221, stage 1).

    `wordings` = 0 gives the original instruction only (SFT); k > 0 adds k train wordings (SFT(IA)). `assign` keeps the
    number of examples: each instance gets one wording, dealt round; `product` gives each instance all of them.
    """
    examples = []
    for task in tasks:
        rng = random.Random(f"{seed}/{task.name}")
        instances = split_instances(task, split)
        rng.shuffle(instances)                              # some files are sorted by label
        texts = [task.definition] + [w.text for w in task.wordings.get("train", [])[:wordings]]
        for number, instance in enumerate(instances[:per_task]):
            chosen = texts if augment == "product" else [texts[number % len(texts)]]
            examples += [{"task": task.name, "id": instance.id, "instruction": task.definition, "wording": text,
                          "input": instance.input, "output": instance.outputs[0]} for text in chosen]
    return examples


def questions(tasks, *, split: str, wordings: int, per_task: int) -> list[dict]:
    """Held-out questions: one instance under several held-out wordings of its task (the split's own, both).

    `wordings` = 0 asks with the original instruction alone.
    """
    rows = []
    for task in tasks:
        held = task.wordings.get(split, [])[:wordings] if wordings else [Wording(task.definition)]
        if wordings and len(held) < 2:
            continue                                        # CR needs two wordings; the caller reports how many remain
        names = {instance.id: instance for instance in split_instances(task, split)}
        for name in _hash_order(list(names), "questions")[:per_task]:
            instance = names[name]
            rows.append({"task": task.name, "id": instance.id, "instruction": task.definition, "input": instance.input,
                         "targets": list(instance.outputs), "labels": task.labels,
                         "wordings": [w.text for w in held], "styles": [w.style for w in held]})
    return rows


def answer_candidates(target: str, *, same_task: list[str], same_input: list[str], rng, n: int) -> list[str]:
    """`n` answers to judge: the target itself about half the time, else an error of the kinds that models make.

    Another instance's output, another task's output for the same input, or the target with one word dropped or changed.
    """
    answers = []
    for _ in range(n):
        kind, words = rng.random(), target.split()
        if kind < 0.4:
            answer = target
        elif kind < 0.6 and same_input:
            answer = rng.choice(same_input)
        elif kind < 0.8 and len(words) > 1:
            at = rng.randrange(len(words))
            other = rng.choice(rng.choice(same_task).split())
            answer = " ".join(words[:at] + ([other] if rng.random() < 0.7 else []) + words[at + 1:])
        else:
            answer = rng.choice(same_task)
        answers.append(answer)
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# Outside instruction data

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "bard": "assistant",
         "bing": "assistant", "model": "assistant", "system": "system"}


def load_examples(path) -> tuple[list[dict], dict[str, int]]:
    """Instruction data: {"instruction", "input", "output"} or {"messages": [{"role", "content"}]}, and how many were left out, and why.

    A JSON list or JSON Lines of Alpaca's rows (instruction, input, output), of ShareGPT's (conversations: from, value), or
    of messages (messages: role, content). A conversation begins with at most one system message, then user and assistant
    take turns; what an assistant says first, and a user says last, is cut off. Left out are rows with an empty or missing
    answer, and conversations whose turns do not alternate. Raises ValueError for a row of another shape.
    """
    rows = _rows(path, "Alpaca, ShareGPT or messages rows")
    found, left_out = [], {}
    for where, row in rows:
        turns = row.get("messages", row.get("conversations"))
        example, problem = _alpaca_row(row, where) if turns is None else _conversation(turns, where)
        if problem:
            left_out[problem] = left_out.get(problem, 0) + 1
        else:
            found.append(example)
    if not found:
        raise ValueError(f"{path}: none of its {len(rows)} records can be used ({', '.join(f'{n} {why}' for why, n in left_out.items())}).")
    return found, left_out


def _alpaca_row(row: dict, where: str) -> tuple[dict, str]:
    """A row of Alpaca's, and what is wrong with it, if anything."""
    example = {"instruction": row.get("instruction"), "input": row.get("input") or "", "output": row.get("output")}
    for name, value in example.items():
        if not isinstance(value, str):
            raise ValueError(f'{where}: field "{name}" is {json.dumps(value)[:60]}. Expected a text; rows are Alpaca\'s (instruction, input, '
                             "output), ShareGPT's (conversations) or messages.")
    return example, "" if example["output"].strip() and example["instruction"].strip() else "with an empty instruction or output"


def _conversation(turns, where: str) -> tuple[dict, str]:
    """ShareGPT's or plain messages as checked messages, and what is wrong with them, if anything."""
    if not isinstance(turns, list):
        raise ValueError(f"{where}: its conversation is a {type(turns).__name__}. Expected a list of turns.")
    messages = []
    for number, turn in enumerate(turns):
        role, text = (turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise ValueError(f"{where}, turn {number} is {json.dumps(turn)[:80]}. Expected role (or from) of {', '.join(sorted(ROLES))}, and content "
                             "(or value) as text.")
        messages.append({"role": ROLES[role], "content": text})
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    rest = messages[len(system):]
    rest = rest[1:] if rest and rest[0]["role"] == "assistant" else rest
    rest = rest[:-1] if rest and rest[-1]["role"] == "user" else rest
    if not rest:
        return {}, "without an answer"
    if [message["role"] for message in rest] != ["user", "assistant"] * (len(rest) // 2):
        return {}, "whose turns do not alternate"
    if not all(message["content"].strip() for message in rest):
        return {}, "with an empty turn"
    return {"messages": system + rest}, ""


def load_corpus(path) -> list[list]:
    """Documents to pre-train on, one a line: [[text, learn], ...]."""
    documents = read_records(path)
    for number, document in enumerate(documents, 1):
        if not isinstance(document, list) or not document or not all(
                isinstance(part, list) and len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], (bool, int)) for part in document):
            raise ValueError(f"{path}, line {number} is {json.dumps(document)[:60]}. Expected a list of [text, true or false].")
    return documents


# ---------------------------------------------------------------------------------------------------------------------
# Judged responses

ERROR_JUDGMENT = "$ERROR$"                                  # in the CUT authors' files: the judge gave no answer
SATISFIED_SCORE = 7                                         # their converter: a score of 7 and more is satisfied


def load_judged(path) -> list[dict]:
    """Judged responses {id, instruction, input, response, judgment, refinement, target}; judgment None is satisfaction.

    A JSON list or JSON Lines of any of: our own records; the CUT authors' (output, score, i_ans; arXiv 2312.14591);
    Shepherd (question, answer, feedback; 2308.04592); critiques of summaries (data.passage, data.questions;
    2206.05802): the highest-ranked answer of each question, its critiques joined, the last one's refinement;
    UltraFeedback (instruction, completions with critiques; 2310.01377), every completion that has a critique. A score
    of 7 and more, also UltraFeedback's overall_score, means satisfaction, as in the CUT authors' converter.
    Raises ValueError naming file and record where a field is missing or mistyped or a response is empty.
    """
    found = []
    for where, row in _rows(path, "judged responses"):
        found += [_judged_record(part, where, len(found) + k) for k, part in enumerate(_judged_rows(row, where))]
    return found


def _rows(path, what: str) -> list[tuple[str, dict]]:
    """[(where, object)] of a JSON list or of JSON Lines; ValueError where there is none of either."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist. Give a file of {what}.")
    with open(path, "rb") as file:
        is_list = file.read(100).lstrip().startswith(b"[")
    rows = _read_json(path) if is_list else read_records(path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no list of records. Expected a JSON list or JSON Lines of {what}.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, record {number} is a {type(row).__name__}. Expected an object, one of {what}.")
        longest = max((len(value) for value in row.values() if isinstance(value, str)), default=0)
        if longest > LONGEST_TEXT:
            raise ValueError(f"{path}, record {number} holds a text of {longest:,} characters. Expected at most {LONGEST_TEXT:,}. Remove the record.")
    return [(f"{path}, record {number}", row) for number, row in enumerate(rows)]


def _judged_rows(row: dict, where: str) -> list[dict]:
    """One outside row as rows with our own names."""
    if "completions" in row:                                # UltraFeedback
        if not isinstance(row["completions"], list) or not all(isinstance(x, dict) for x in row["completions"]):
            raise ValueError(f"{where}: completions is no list of objects. Expected UltraFeedback's completions with response and critique.")
        return [{"instruction": row.get("instruction"), "response": x.get("response"), "judgment": _unless_satisfied(x["critique"], x.get("overall_score"))}
                for x in row["completions"] if x.get("critique")]
    if "question" in row and "answer" in row:               # Shepherd
        return [{"instruction": row["question"], "response": row["answer"], "judgment": row.get("feedback", ""),
                 "refinement": row.get("output_correct") or None}]
    if isinstance(row.get("data"), dict) and "passage" in row["data"]:      # critiques of summaries
        return _critiqued(row["data"], where)
    own = dict(row)
    for ours, theirs in (("response", "output"), ("refinement", "i_ans")):
        if ours not in own and theirs in own:
            own[ours] = own[theirs]
    if "judgment" not in own:
        raise ValueError(f'{where}: field "judgment" is missing; found: {", ".join(list(row)[:8])}. '
                         "Expected a text, or null for a satisfying response.")
    return [{**own, "judgment": _unless_satisfied(own["judgment"], own.get("score"))}]


def _unless_satisfied(judgment, score):
    """The judgment, or None where a score says that the response satisfies."""
    return None if isinstance(score, (int, float)) and score >= SATISFIED_SCORE else judgment


def _critiqued(data: dict, where: str) -> list[dict]:
    """The highest-ranked answer of each question about a passage, but of those that were skipped or are empty."""
    found = []
    try:
        for question in data.get("questions") or []:
            best = max(range(len(question["rankings"])), key=question["rankings"].__getitem__)
            answer = question["answers"][best]
            critiques = answer["feedback"].get("critiques") or []
            if not (answer["feedback"].get("skip") or not answer["answer"] or (critiques and not critiques[-1]["refinement"])):
                found.append({"instruction": f'{data["passage"]["text"]}\n{question["question"]}', "response": answer["answer"],
                              "judgment": " ".join(x["text"] for x in critiques).strip() or None,
                              "refinement": critiques[-1]["refinement"] if critiques else None})
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is no critique of a summary: {error!r:.60}. Expected a passage and questions with rankings, answers and feedback.") from None
    return found


def _judged_record(row: dict, where: str, number: int) -> dict:
    """A checked record."""
    record = {"id": str(row.get("id", number)), "instruction": row.get("instruction"), "input": row.get("input") or "",
              "response": row.get("response"), "judgment": row.get("judgment"), "refinement": row.get("refinement"),
              "target": row.get("target"), "targets": row.get("targets")}
    for name, optional in (("instruction", False), ("input", False), ("response", False), ("judgment", True), ("refinement", True),
                           ("target", True)):
        value = record[name]
        if not isinstance(value, str) and not (optional and value is None):
            raise ValueError(f'{where}: field "{name}" is {json.dumps(value)[:60]}. Expected a text'
                             + (" or null." if optional else "."))
    if not isinstance(record["targets"] or [], list) or not all(isinstance(text, str) for text in record["targets"] or []):
        raise ValueError(f'{where}: field "targets" is {json.dumps(record["targets"])[:60]}. Expected a list of texts, or null.')
    for name in ("instruction", "response"):
        if not record[name].strip():
            raise ValueError(f'{where}: field "{name}" is empty. Remove the record; an empty text teaches nothing.')
    if record["judgment"] is not None and not record["judgment"].strip():
        raise ValueError(f'{where}: field "judgment" is empty. Expected a text, or null for a satisfying response.')
    return record


def keep_judged(records: list[dict], *, downsample: float, seed: int) -> tuple[list[dict], dict]:
    """The records to train on, and {"negative", "positive", "kept", "failed"} counts.

    Positives are cut to int(downsample * negatives), as the CUT authors do, if there are more; failed judgments
    ("$ERROR$") count as negatives there but are dropped. `downsample` of 0 keeps all positives.
    """
    negative, positive = ([r for r in records if (r["judgment"] is None) == satisfied] for satisfied in (False, True))
    room = int(downsample * len(negative))
    kept = positive if not downsample or len(positive) <= room else random.Random(seed).sample(positive, room)
    usable = [r for r in negative if r["judgment"].strip() != ERROR_JUDGMENT]
    return usable + kept, {"negative": len(negative), "positive": len(positive), "kept": len(kept),
                           "failed": len(negative) - len(usable)}


# ---------------------------------------------------------------------------------------------------------------------
# Scored candidates

CANDIDATE = ("task", "id", "instruction", "wording", "input", "target", "response", "reward", "how")


def load_candidates(path) -> list[dict]:
    """Scored candidates: a run's own candidates.jsonl as it is, or another file of preferences in the same shape.

    Others are lists or JSON Lines of {prompt, chosen, rejected} as TRL has them (texts, or lists of messages; without
    a prompt it is what both dialogues share); HH-RLHF (chosen, rejected: whole dialogues in one text each);
    {conversations, chosen, rejected} of ShareGPT's form; UltraFeedback (instruction, completions, overall_score, or its
    binarized form with score_chosen, score_rejected); RRHF's {query, responses, scores}. A pair without scores has
    rewards 1 and 0. The target is the best response, and "how" is "file".
    Raises ValueError naming file and record where a field is missing or mistyped or a prompt is empty.
    """
    rows = _rows(path, "scored candidates or preferences")
    if any("response" in row and "reward" in row for _, row in rows):
        for where, row in rows:
            missing = [name for name in CANDIDATE if name not in row]
            if missing:
                raise ValueError(f'{where}: field "{missing[0]}" is missing. Expected a candidate with {", ".join(CANDIDATE)}.')
            for name in ("reward", "p_expected", "p_correct"):
                if row.get(name) is not None:
                    _number(row[name], where, name, ", or null where there is no verdict")
            if not isinstance(row["id"], (str, int)):
                raise ValueError(f"{where}: id is {json.dumps(row['id'])[:40]}. Expected a text or a number.")
            _texts(row, where, *(name for name in CANDIDATE if name not in ("id", "reward")))
        return [row for _, row in rows]
    found = []
    for number, (where, row) in enumerate(rows):
        prompt, answers = _preference(row, where)
        if not prompt.strip():
            raise ValueError(f"{where}: the prompt is empty. Remove the record; there is nothing to answer.")
        best = max(answers, key=lambda answer: answer[1])[0]
        wording, input = ("{input}", prompt) if "{input}" in prompt else (prompt, "")    # outside text has no placeholders
        found += [{"task": Path(path).stem, "id": str(number), "instruction": wording, "wording": wording, "input": input, "target": best,
                   "response": response, "reward": reward, "how": "file", "sample": k, "expected": None, "correct": None}
                  for k, (response, reward) in enumerate(answers)]
    return found


def _preference(row: dict, where: str) -> tuple[str, list[tuple[str, float]]]:
    """(prompt, [(response, reward)]) of one outside row."""
    if isinstance(row.get("completions"), list):            # UltraFeedback
        scored = [(_said(x.get("response"), where), _number(x["overall_score"], where, "overall_score")) for x in row["completions"]
                  if isinstance(x, dict) and isinstance(x.get("overall_score"), (int, float))]
        return _said(row.get("instruction"), where), _at_least_two(scored, where)
    if "responses" in row and "scores" in row:              # RRHF
        if not isinstance(row["responses"], list) or not isinstance(row["scores"], list) or len(row["responses"]) != len(row["scores"]):
            raise ValueError(f"{where}: responses and scores differ in length, or are no lists. Expected one score per response.")
        return _said(row.get("query"), where), _at_least_two([(_said(text, where), _number(score, where, "a score")) for text, score in zip(row["responses"], row["scores"])], where)
    if "chosen" not in row or "rejected" not in row:
        raise ValueError(f'{where}: fields "chosen" and "rejected" are missing; found: {", ".join(list(row)[:8])}. Expected a preference, see '
                         "the README's list of forms.")
    chosen, rejected = row["chosen"], row["rejected"]
    rewards = [_number(row.get(name, usual), where, name) for name, usual in (("score_chosen", 1.0), ("score_rejected", 0.0))]
    prompt = next((row[name] for name in ("prompt", "conversations", "messages") if row.get(name)), None)
    if prompt is None:
        if isinstance(chosen, str) and "\n\nAssistant:" in chosen:      # HH-RLHF
            chosen, rejected = _hh_turns(chosen, where), _hh_turns(rejected, where)
        if isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected:
            prompt = [a for a, b in zip(chosen[:-1], rejected[:-1]) if a == b]
            if len(prompt) != len(chosen) - 1 or len(prompt) != len(rejected) - 1:
                raise ValueError(f"{where}: chosen and rejected differ before their last turn. Expected one dialogue with two endings.")
            chosen, rejected = chosen[-1:], rejected[-1:]
        else:
            raise ValueError(f"{where}: no prompt, and chosen and rejected are no dialogues that share one. Give a field \"prompt\".")
    elif isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):    # binarized UltraFeedback repeats the prompt inside
        chosen, rejected = chosen[-1:], rejected[-1:]
    return _dialogue(prompt, where), [(_said(chosen, where), rewards[0]), (_said(rejected, where), rewards[1])]


def load_labelled(path) -> list[dict]:
    """Pairs with a judge's soft labels, as the stage rlaif writes them: the probability that the first of two answers is the better one."""
    rows = _rows(path, "pairs with first, second and probability")
    for where, row in rows:
        if not 0 <= _number(row.get("probability"), where, "probability") <= 1:
            raise ValueError(f"{where}: probability is {row['probability']}. Expected one from 0 to 1.")
        _texts(row, where, "input")
        for side in ("first", "second"):
            _texts(row[side] if isinstance(row.get(side), dict) else {}, f"{where}, {side}", "wording", "response")
    return [row for _, row in rows]


def _texts(row: dict, where: str, *names: str) -> None:
    """Raise ValueError unless each of these fields is a text."""
    for name in names:
        if not isinstance(row.get(name), str):
            raise ValueError(f"{where}: {name} is {json.dumps(row.get(name))[:40]}. Expected a text.")


def _number(value, where: str, name: str, more: str = "") -> float:
    """A finite number as it is. Raises ValueError for anything else."""
    if type(value) not in (int, float) or not abs(value) <= 1e300:
        raise ValueError(f"{where}: {name} is {json.dumps(value)[:40]}. Expected a number{more}.")
    return float(value)


def _at_least_two(scored: list, where: str) -> list:
    if len(scored) < 2:
        raise ValueError(f"{where} has {len(scored)} responses with a score. Expected two or more to compare.")
    return scored


def _said(turn, where: str) -> str:
    """The text of a response: a text, a message, or a list with one message."""
    if isinstance(turn, list) and len(turn) == 1:
        turn = turn[0]
    if isinstance(turn, dict):
        turn = turn.get("content", turn.get("value"))
    if not isinstance(turn, str):
        raise ValueError(f"{where}: {json.dumps(turn)[:60]} is no response. Expected a text, or a message with content or value.")
    return turn.strip()


def _dialogue(prompt, where: str) -> str:
    """One text for what stands before a response: the user's words, earlier turns behind their speakers' names."""
    if isinstance(prompt, str):
        return prompt.strip()
    turns = []
    for turn in prompt if isinstance(prompt, list) else [prompt]:
        role = ROLES.get(str(turn.get("role", turn.get("from"))).lower()) if isinstance(turn, dict) else None
        if role is None:
            raise ValueError(f"{where}: {json.dumps(turn)[:60]} is no turn of a dialogue. Expected role (or from) user, assistant or system.")
        turns.append((role, _said(turn, where)))
    system = "\n".join(text for role, text in turns if role == "system")
    turns = [turn for turn in turns if turn[0] != "system" and turn[1]]
    if not turns or turns[-1][0] != "user":
        raise ValueError(f"{where}: the dialogue before the response does not end with the user's turn.")
    text = turns[0][1] if len(turns) == 1 else "\n".join(f"{role}: {said}" for role, said in turns)
    return f"{system}\n{text}" if system else text


def _hh_turns(text, where: str) -> list[dict]:
    """HH-RLHF's dialogue in one text as messages."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text)[1:] if isinstance(text, str) else []
    if len(parts) < 4 or parts[-2] != "Assistant":
        raise ValueError(f"{where}: {json.dumps(text)[:60]} is no dialogue that ends with the Assistant's turn.")
    return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


# ---------------------------------------------------------------------------------------------------------------------
# Documents and packed batches


def encode_document(tokenizer, segments, *, max_len: int) -> dict:
    """[(text, is_label), ...] -> {"input_ids", "labels"}: every segment in context, labels on the labelled ones only.

    The first segment is the prompt (BOS is added). Used for documents with several labelled places; see encode_example.
    """
    ids = [tokenizer.bos_id] if tokenizer.add_bos else []
    labels, tail = [IGNORE_INDEX] * len(ids), ""
    for text, is_label in segments:
        piece = tokenizer.encode_continuation(text, tail) if tail else tokenizer.encode_prompt(text)[len(ids):]
        ids += piece
        labels += piece if is_label else [IGNORE_INDEX] * len(piece)
        tail = text[-1:] or tail
    return {"input_ids": ids[:max_len], "labels": labels[:max_len], "cut": int(len(ids) > max_len)}


def encode_response(tokenizer, template: Template, response: str) -> list[int]:
    """Response ids with EOS, as they stand behind any prompt of this template; N in every loss counts these."""
    said = response.strip() if template.strip else response
    ids = tokenizer.encode_continuation(Prompt.of([(template.separator + said, False), (template.end, True)]), template.tail)
    return ids if ids[-1:] and ids[-1] in tokenizer.control else ids + [tokenizer.eos_id]


def encode_example(tokenizer, template: Template, prompt: str, response, *, max_len: int) -> dict:
    """Prompt and response (text, or ids that a model sampled) -> {"input_ids", "labels", "cut"}.

    An over-long prompt loses its left (never BOS, never the response), and `cut` says so.
    Raises ValueError where the response alone fills max_len.
    """
    tokens = response if isinstance(response, list) else encode_response(tokenizer, template, response)
    ids = tokenizer.encode_prompt(prompt)
    room = max_len - len(tokens)
    if room < 2:
        raise ValueError(f"--max-len {max_len} leaves no room for a response of {len(tokens)} tokens and a prompt; "
                         f"raise --max-len to at least {len(tokens) + len(ids)}.")
    kept = cut_left(ids, room)
    return {"input_ids": kept + tokens, "labels": [IGNORE_INDEX] * len(kept) + tokens, "cut": int(len(ids) > room)}


def encode_conversation(tokenizer, template: Template, example: dict, *, max_len: int) -> dict | None:
    """An example of `load_examples` -> {"input_ids", "labels", "cut"}: labels on what the assistant says and its ends only.

    Of a conversation that is too long the last turns are dropped, of a single turn the left of its prompt. None where
    not even the first response fits.
    """
    if "messages" not in example:
        turns = [(template.render(example["instruction"], example["input"], literal=True), example["output"])]
    else:
        turns, system = [], None
        for message in example["messages"]:
            if message["role"] == "system":
                system = message["content"]
            elif message["role"] == "user":
                asked = template.render_turn(message["content"], system=system, first=not turns)
            else:
                turns.append((asked, message["content"]))
    ids, labels, cut = [], [], 0
    for asked, answer in turns:
        response = encode_response(tokenizer, template, answer)
        prompt = tokenizer.encode_turn(asked) if ids else tokenizer.encode_prompt(asked)
        if len(ids) + len(prompt) + len(response) > max_len:
            cut = 1
            if ids or len(response) > max_len - 2:
                break
            prompt = cut_left(prompt, max_len - len(response))
        ids += prompt + response
        labels += [IGNORE_INDEX] * len(prompt) + response
    return {"input_ids": ids, "labels": labels, "cut": cut} if ids else None


def cut_left(ids: list[int], room: int) -> list[int]:
    """Prompt ids that fit: BOS and the right end. The answer depends most on what stands last."""
    return ids if len(ids) <= room else ids[:1] + ids[len(ids) - room + 1:]


def pack(documents: list[dict], sizes: list[int] | None = None) -> dict:
    """Documents laid end to end, without padding: "input_ids", "labels" and "document_ids" (N,), "lengths" [int].

    sizes: how many documents in a row belong to one group each. A group's prompt is laid down once if it is long enough to
    pay; "trees" has what model.attention needs to know of that, "ends" (n,) says where each document's last token is.
    """
    row, trees, ends = {"input_ids": [], "labels": [], "document_ids": []}, [], []
    for size in sizes or [1] * len(documents):
        group = documents[len(ends):len(ends) + size]
        stem = shared_start(group)
        for number, document in enumerate(group):
            skipped = stem if number else 0
            for name in ("input_ids", "labels"):
                row[name] += document[name][skipped:]
            row["document_ids"] += [len(ends)] * (len(document["input_ids"]) - skipped)
            ends.append(len(row["input_ids"]) - 1)
        lengths = [len(document["input_ids"]) for document in group]
        trees += [(stem, [length - stem for length in lengths])] if stem else [(length, []) for length in lengths]
    return {**{name: torch.tensor(values, dtype=torch.long) for name, values in row.items()}, "trees": trees, "ends": torch.tensor(ends),
            "lengths": [len(document["input_ids"]) for document in documents]}


def shared_start(group: list[dict]) -> int:
    """How many unlabelled tokens all documents of a group begin with; 0 where sharing them saves less than a quarter."""
    ids = [document["input_ids"] for document in group]
    most = min(min(len(d["input_ids"]) - 1, next((i for i, label in enumerate(d["labels"]) if label != IGNORE_INDEX), sys.maxsize)) for d in group)
    stem = next((i for i in range(most) if any(row[i] != ids[0][i] for row in ids)), most)
    return stem if 4 * stem * (len(ids) - 1) >= sum(map(len, ids)) and len(ids) > 1 else 0


def micro_batches(groups: list[dict], max_tokens: int) -> list[list[dict]]:
    """Split a step's groups {"documents": [...]} into runs of at most `max_tokens` tokens; a group is never torn."""
    runs, size = [[]], 0
    for group in groups:
        tokens = sum(len(document["input_ids"]) for document in group["documents"])
        if runs[-1] and size + tokens > max_tokens:
            runs.append([])
            size = 0
        runs[-1].append(group)
        size += tokens
    return runs


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The examples of one step, from (seed, epoch) alone: a permutation per epoch, steps run on across epochs."""
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, n)
        indices.append(_permutation(n, seed, epoch)[offset])
    return indices


@functools.lru_cache(maxsize=2)                             # a step may straddle two epochs
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


# ---------------------------------------------------------------------------------------------------------------------
# Records: JSON Lines, one writer, whole lines


def append_records(path, records: list[dict]) -> None:
    """Append whole lines and sync them, so that a stopped run keeps what it collected."""
    append_blob(path, "".join(json.dumps(record, ensure_ascii=True, allow_nan=False) + "\n" for record in records).encode())


def append_blob(path, blob: bytes) -> None:
    """Append bytes and sync them."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        while blob:
            blob = blob[os.write(handle, blob):]            # a nearly full disk writes a part and says so
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


def read_records(path, *, own: bool = False) -> list[dict]:
    """The records of a file, or [] where there is none; damage is a ValueError that names the line.

    Of a file that the run itself appends to (`own`) a torn last line is cut off and kept in PATH.torn, and a whole one
    gets its missing newline. Other files are never touched.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    if last and own and not _is_json(last):
        path.with_name(path.name + ".torn").write_bytes(last)
        os.truncate(path, path.stat().st_size - len(last))
        print(f"warning: cut an unfinished record of {len(last)} bytes from {path} (kept in {path.name}.torn).")
    elif last:
        lines.append(last)
        if own:
            append_blob(path, b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}. Only a torn last line of a run's own file is repaired "
                             "automatically. Fix or delete that line.") from None
    return records


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
