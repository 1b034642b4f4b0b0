"""A sentencepiece tokenizer with all that a checkpoint brings along: added and control tokens."""

import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from data import Tokenizer, as_list
from extras.formats.checks import check_layout, read_object, reading, refuse
from extras.formats.records import LONGEST_TEXT
from extras.formats.templates import Prompt

SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
ALL_FILES = ("tokenizer.model", "tokenizer.json", *SIDE_FILES, "chat_template.jinja")
# Marks of chat templates: control tokens, whatever a tokenizer's files call them.
MARK = re.compile(r"<\|[^|<>]+\|>|\[/?INST\]|<</?SYS>>")


class HFTokenizer(Tokenizer):
    """A tokenizer.model with the files beside it; users' text never yields control tokens.

    Control are the model's control pieces, added tokens that are special, and user-defined pieces
    that are special or look like a template's marks. Other added tokens are found in any text.
    `legacy` is about text behind a control token: if true, it gets sentencepiece's blank in front.
    Raises ValueError where the file is absent or of another kind.
    """

    def __init__(self, path, model_folder=""):
        check_layout(path)
        path = Path(path)
        self.path = path / "tokenizer.model" if path.is_dir() else path
        self.folder = self.path.parent
        # a file that stands alone goes with what the model's folder has beside its own
        if model_folder and not any((self.folder / name).is_file() for name in SIDE_FILES):
            self.folder = Path(model_folder)
        config = read_object(self.folder / "tokenizer_config.json")
        added, special = added_tokens(self.folder, config)
        self.model = read_sentencepiece(self.path, special)
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        refuse(self.bos_id < 0 or self.eos_id < 0, f"{self.path} defines no BOS or no EOS piece. "
               "Use the tokenizer of a LLaMA-family checkpoint.")
        self.legacy = config.get("legacy") is not False
        self.add_bos = config.get("add_bos_token") is not False
        ids = range(len(self.model))
        self.special = {self.model.id_to_piece(i): i for i in ids if self.model.is_control(i)}
        self.special |= {"<s>": self.bos_id, "</s>": self.eos_id}  # whatever their own names are
        self.special |= {text: token for text, token in added.items() if text in special}
        self.added = {text: token for text, token in added.items()
                      if text not in special and token not in ids}
        self.text_of = {token: text for text, token in self.added.items()}
        self.control = set(self.special.values())
        self.drops = {}

    def __len__(self) -> int:
        """One more than the highest id that this can give."""
        return 1 + max(len(self.model) - 1, *self.special.values(), *self.added.values())

    def encode_prompt(self, text: str) -> list[int]:
        """BOS, once, and the ids of `text`."""
        runs = self.split_runs(text)
        ids = self.encode_first(runs[0]) + self.encode_rest(runs)
        begun = not self.add_bos or ids[:1] == [self.bos_id] or getattr(text, "whole", False)
        return ids if begun else [self.bos_id] + ids

    def encode_continuation(self, text: str, tail: str = "\n") -> list[int]:
        """The ids of `text` behind a prompt that ends in `tail`: those of the joint encoding."""
        runs = self.split_runs(text)
        return super().encode_continuation(runs[0], tail) + self.encode_rest(runs)

    def encode_turn(self, text: str) -> list[int]:
        """The ids of `text` behind a control token."""
        return self.encode_rest(["", None, *self.split_runs(text)])

    def split_runs(self, text: str) -> list:
        """[text, id, text, id, ..., text]: added tokens, and control tokens that may be meant."""
        runs = [""]
        for part, trusted in getattr(text, "parts", ((text, False),)):
            refuse(re.search("[\ud800-\udfff]", part), f"{ascii(part[:60])} holds half of a "
                   "character (a lone surrogate). Mend it where it comes from.")
            refuse(len(part) > LONGEST_TEXT, f"{ascii(part[:60])} goes on for {len(part):,} "
                   f"characters. Expected at most {LONGEST_TEXT:,}.")
            meant = getattr(text, "names", None)
            names = {name: token for name, token in self.special.items()
                     if trusted and (meant is None or name in meant)} | self.added
            pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
            for k, piece in enumerate(re.split(f"({pattern})", part) if names else [part]):
                if k % 2:
                    runs += [names[piece], ""]
                else:
                    runs[-1] += piece
        for k in range(1, len(runs), 2) if self.drops else ():
            left, right = self.drops.get(runs[k], (False, False))
            runs[k - 1] = runs[k - 1].rstrip() if left else runs[k - 1]
            runs[k + 1] = runs[k + 1].lstrip() if right else runs[k + 1]
        return runs

    def encode_rest(self, runs: list) -> list[int]:
        """The ids of all runs but the first; None stands for a token that is there already."""
        ids = []
        for token, text in zip(runs[1::2], runs[2::2], strict=True):
            ids += [] if token is None else [token]
            ids += self.encode_behind(text) if text else []
        return ids

    def encode_first(self, text: str) -> list[int]:
        """The ids of a text that begins a prompt."""
        return self.model.encode(text)

    def encode_behind(self, text: str) -> list[int]:
        """The ids of a text behind a control token."""
        return self.model.encode(text) if self.legacy else self.encode_continuation(text)

    def describe(self) -> dict:
        """A tokenizer_config.json for a tokenizer.model that stands alone."""
        name = self.model.id_to_piece
        return {"tokenizer_class": "LlamaTokenizer", "legacy": self.legacy,
                "add_bos_token": self.add_bos, "add_eos_token": False,
                "clean_up_tokenization_spaces": False, "bos_token": name(self.bos_id),
                "eos_token": name(self.eos_id), "unk_token": name(self.model.unk_id())}

    def decode(self, ids: list[int]) -> str:
        """The text of `ids` without control tokens, unknown ids and surrounding blanks."""
        texts, run = [], []
        for token in [*ids, None]:
            if token is None or token in self.text_of:
                texts += [self.model.decode(run), self.text_of.get(token, "")]
                run = []
            elif token < len(self.model) and token not in self.control:
                run.append(token)
        return "".join(texts).strip()

    def stop_ids(self, prompts: list[str]) -> list[int]:
        """The ids that end a response to these prompts: EOS, and what their templates end with."""
        ends = {prompt.end for prompt in prompts if isinstance(prompt, Prompt)}
        tokens = {self.eos_id}
        for end in ends:
            last = self.encode_turn(Prompt.of([(end, True)]))[-1]
            refuse(last not in self.control, f"the template ends responses with {end.strip()!r}, "
                   f"which is no token of {self.path}. Use the template that the model was made "
                   "for.")
            tokens.add(last)
        return [self.eos_id, *sorted(tokens - {self.eos_id})]


def open_tokenizer(path, model_folder="") -> HFTokenizer:
    """The tokenizer of a folder, or that in a file tokenizer.model or tokenizer.json.

    Raises ValueError where a folder has both and they are of different tokenizers.
    """
    from extras.formats.tokenizer_json import FILE, JsonTokenizer

    path = Path(path)
    pieces, library = path / "tokenizer.model", path / FILE
    if path.suffix == ".json" or library.is_file() and (
            not pieces.is_file() or is_tiktoken(pieces.read_bytes())):
        return JsonTokenizer(path, model_folder)
    tokenizer = HFTokenizer(path, model_folder)
    if library.is_file():
        check_agreement(tokenizer, library)
    return tokenizer


def check_agreement(tokenizer: HFTokenizer, file: Path) -> None:
    """Raise ValueError where a tokenizer.json has other tokens than the tokenizer.model beside it.

    transformers reads the one, llama.cpp and this program the other.
    """
    raw = read_object(file)
    with reading(file, "a tokenizer.json of the tokenizers library"):
        known = (raw.get("model") or {}).get("vocab") or {}
        if isinstance(known, list):  # with scores, of a unigram model
            known = {row[0]: token for token, row in enumerate(known)}
        known = {token: text for text, token in known.items()}
        known |= {entry["id"]: entry["content"] for entry in raw.get("added_tokens") or []}
    for token in range(len(tokenizer.model)):
        piece = tokenizer.model.id_to_piece(token)
        refuse(known and known.get(token) != piece, f"{tokenizer.path} and {file.name} beside it "
               f"are of different tokenizers: token {token} is {piece!r:.40} in the first, "
               f"{known.get(token)!r:.40} in the second. Name the right one with --tokenizer FILE.")


def is_tiktoken(blob: bytes) -> bool:
    """Whether a tokenizer.model is Meta's text form, of LLaMA 3 and later."""
    return re.match(rb"[A-Za-z0-9+/=]+ \d+\n", blob) is not None


def check_vocabulary(tokenizer, vocab_size: int, bos_id: int | None, eos_ids: list[int],
                     where) -> str:
    """A warning where config.json names other BOS and EOS ids than the tokenizer, or "".

    Raises ValueError for ids that the embedding has no rows for.
    """
    refuse(len(tokenizer) > vocab_size,
           f"tokenizer has {len(tokenizer)} pieces but the embedding has {vocab_size} rows "
           f"({where}). Use the tokenizer that came with this checkpoint.")
    if tokenizer.eos_id in eos_ids and bos_id in (None, tokenizer.bos_id):
        return ""
    eos = ", ".join(map(str, eos_ids)) or "none"
    return (f"warning: config.json of {where} says BOS {bos_id} and EOS {eos}, its tokenizer says "
            f"{tokenizer.bos_id} and {tokenizer.eos_id}; the tokenizer is believed.")


# ----- Files -----
def added_tokens(folder: Path, config: dict) -> tuple[dict[str, int], set[str]]:
    """{text: id} of the tokens that were added to the model, and the texts of special ones.

    They stand in tokenizer_config.json (added_tokens_decoder), or in the older added_tokens.json,
    where those are special that special_tokens_map.json or tokenizer_config.json name; and in
    tokenizer.json, where transformers 5 writes them alone.
    """
    added, special = read_object(folder / "added_tokens.json"), set()
    names = [value for given in (config, read_object(folder / "special_tokens_map.json"))
             for key, value in given.items() if key.endswith(("_token", "_tokens"))]
    with reading(f"{folder / SIDE_FILES[0]}, added_tokens_decoder", "objects with content, by id"):
        decoder = config.get("added_tokens_decoder") or {}
        entries = [entry | {"id": int(token)} for token, entry in decoder.items()]
    entries = [*(read_object(folder / "tokenizer.json").get("added_tokens") or []), *entries]
    with reading(f"{folder}, added tokens", "objects with id and content"):
        added = {entry["content"]: entry.get("id") for entry in entries} | added
        names += [entry for entry in entries if entry.get("special") is True]
    for value in names:
        for item in as_list(value):
            text = special_name(item)
            special |= {text} if text is not None else set()
    for text, token in added.items():
        known = text and isinstance(text, str) and type(token) is int and 0 <= token < 2**24
        refuse(not known, f"{folder}: added token {text!r:.60} has the id {token!r:.20}. Expected "
               f"a text and a number from 0 to {2**24}.")
    return added, special


def special_name(value) -> str | None:
    """The text of a token as the files name it: a text, or an object with its content."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def control_pieces(file: Path) -> set[str]:
    """The control pieces of a tokenizer.model; none for Meta's text form."""
    blob = file.read_bytes()
    if is_tiktoken(blob):
        return set()
    model = read_sentencepiece(file, set())
    return {model.id_to_piece(i) for i in range(len(model)) if model.is_control(i)}


def read_sentencepiece(file: Path, special: set[str]) -> SentencePieceProcessor:
    """The model in a file, its special user-defined pieces as control pieces, which no text yields.

    Raises ValueError that says what the file is instead.
    """
    if not file.exists():
        raise ValueError(f"no tokenizer at {file}, and no tokenizer.json. Give the model's "
                         "tokenizer.model or tokenizer.json with --tokenizer FILE.")
    blob = file.read_bytes()
    refuse(is_tiktoken(blob), f"{file} is Meta's tokenizer of LLaMA 3 and later, not "
           "sentencepiece. Put the tokenizer.json of the same model in Hugging Face's format "
           "beside it, or name that with --tokenizer FILE.")
    refuse(blob.startswith(b"version https://git-lfs"), f"{file} is a Git LFS pointer of "
           f"{len(blob)} bytes, not a tokenizer. Run \"git lfs pull\" there.")
    try:
        model = SentencePieceProcessor(model_proto=blob)
        for piece in map(model.id_to_piece, range(len(model))):
            text = piece.encode()
            if (piece in special or MARK.fullmatch(piece)) and len(text) < 128:
                # a piece is a protobuf message of text (field 1), score (2) and kind (3), which is
                # 4 for user-defined pieces and 3 for control pieces
                head = re.escape(bytes([len(text)]) + text)
                blob = re.sub(rb"(\n%b(?:\x15.{4})?\x18)\x04" % head, b"\\1\x03", blob, flags=re.S)
        return SentencePieceProcessor(model_proto=blob)
    except (RuntimeError, ValueError) as error:  # damaged, or pieces that are not UTF-8
        reason = " ".join(str(error).split())[:80]
        raise ValueError(f"{file} is not a sentencepiece model ({reason}). Use the "
                         "tokenizer.model of the checkpoint.") from None
