"""tokenizer.json, as transformers saves it, through the `tokenizers` library.

Llama 3 and SmolLM2 have no other file, and transformers 5 writes no other. The library finds
control tokens in any text; here they are found in what a template says alone, and users' and
models' texts are encoded as text.
"""

import copy
import json
import re
from pathlib import Path

from data import as_list
from extras.formats.checks import read_object, reading, refuse
from extras.formats.tokenizer import MARK, SIDE_FILES, HFTokenizer, added_tokens, special_name

FILE = "tokenizer.json"


class JsonTokenizer(HFTokenizer):
    """A tokenizer.json with the files beside it; users' text never yields control tokens.

    Control are the added tokens that are special, that a file beside it names, or that look like a
    template's marks. Other added tokens are found in any text. Raises ValueError where the file is
    damaged or of another kind, and where nothing says which token is EOS.
    """

    def __init__(self, path, model_folder=""):
        path = Path(path)
        self.path = path / FILE if path.is_dir() else path
        self.folder = self.path.parent
        if model_folder and not any((self.folder / name).is_file() for name in SIDE_FILES):
            self.folder = Path(model_folder)
        raw, config = read_object(self.path), read_object(self.folder / SIDE_FILES[0])
        special = added_tokens(self.folder, config)[1]
        with reading(self.path, "a tokenizer.json of the tokenizers library"):
            entries = raw.get("added_tokens") or []
            for entry in entries:
                known = entry["content"] in special or MARK.fullmatch(entry["content"])
                entry["special"] = bool(entry.get("special") or known)
            self.special = {entry["content"]: entry["id"] for entry in entries if entry["special"]}
            # Blanks that the library drops beside a token.
            self.drops = {entry["id"]: (entry.get("lstrip"), entry.get("rstrip"))
                          for entry in entries if entry.get("lstrip") or entry.get("rstrip")}
        self.first, self.rest = open_library(raw, self.path)
        self.vocabulary = self.first.get_vocab(with_added_tokens=True)
        self.size = 1 + max(self.vocabulary.values(), default=-1)
        self.find_ends(config)
        self.add_bos = self.begins_with_bos(config)
        self.control = set(self.special.values())
        self.added, self.text_of = {}, {}  # the library finds and writes the others
        model = raw.get("model") or {}
        unknown = {model.get("unk_id"), self.vocabulary.get(model.get("unk_token"))}
        self.forbidden = self.control - unknown  # unknown words are texts, too

    def find_ends(self, config: dict) -> None:
        """The ids of BOS, which there may not be, and EOS, by the files beside the tokenizer."""
        named = read_object(self.folder / SIDE_FILES[1]) | config
        generation = read_object(self.folder / "generation_config.json")
        ids = {}
        for name in ("bos", "eos"):
            text = special_name(named.get(f"{name}_token"))
            model = read_object(self.folder / "config.json") | generation
            given = as_list(model.get(f"{name}_token_id"))[:1] or [None]
            ids[name] = self.vocabulary.get(text, given[0] if text is None else None)
            refuse(text is not None and text not in self.vocabulary, f"{self.folder}: {name}_token "
                   f"is {text!r:.60}, which is no token of {self.path}. The files are of different "
                   "tokenizers.")
        refuse(type(ids["eos"]) is not int or not 0 <= ids["eos"] < self.size,
               f"{self.folder} does not say which token of {self.path.name} is EOS. Put its "
               "tokenizer_config.json, with eos_token, beside it.")
        self.bos_id, self.eos_id = ids["bos"], ids["eos"]
        for name, token in (("<s>", self.bos_id), ("</s>", self.eos_id)):
            if token is not None:  # what templates call them
                self.special[name] = token
                self.special[self.first.id_to_token(token)] = token

    def begins_with_bos(self, config: dict) -> bool:
        """Whether BOS stands before a text: by add_bos_token where transformers reads it."""
        flag = config.get("add_bos_token")
        if type(flag) is bool and "Llama" in str(config.get("tokenizer_class")):
            return flag and self.bos_id is not None
        return self.bos_id is not None and self.first.encode("").ids[:1] == [self.bos_id]

    def __len__(self) -> int:
        """One more than the highest id that this can give."""
        return self.size

    def encode_first(self, text: str) -> list[int]:
        """The ids of a text that begins a prompt."""
        return self.encode_text(self.first, text)

    def encode_behind(self, text: str) -> list[int]:
        """The ids of a text behind a control token."""
        return self.encode_text(self.rest, text)

    def encode_text(self, library, text: str) -> list[int]:
        """The ids of a text, none of which is control."""
        ids = library.encode(text, add_special_tokens=False).ids
        if self.forbidden.isdisjoint(ids):
            return ids
        # A vocabulary may hold a control token as a word, too: such words are cut in two.
        names = "|".join(re.escape(name[1:]) for name in self.special)
        parts = re.split(f"(?={names})", text)
        return [token for part in parts for token in library.encode(
            part, add_special_tokens=False).ids if token not in self.forbidden]

    def encode_continuation(self, text: str, tail: str = "\n") -> list[int]:
        """The ids of `text` behind a prompt that ends in `tail`; see data.Tokenizer."""
        runs = self.split_runs(text)
        for before in (tail, "\n", "\x01"):
            head, ids = self.encode_behind(before), self.encode_behind(before + runs[0])
            if ids[:len(head)] == head:
                return ids[len(head):] + self.encode_rest(runs)
        raise ValueError(f"{self.path} makes one piece of a line break and {text[:20]!r}. Use the "
                         "tokenizer of a LLaMA-family model.")

    def decode(self, ids: list[int]) -> str:
        """The text of `ids` without control tokens, unknown ids and surrounding blanks."""
        known = [token for token in ids if token < self.size and token not in self.control]
        return self.first.decode(known, skip_special_tokens=False).strip()

    def describe(self) -> dict:
        """A tokenizer_config.json for a tokenizer.json that stands alone."""
        named = {"tokenizer_class": "PreTrainedTokenizerFast",
                 "clean_up_tokenization_spaces": False}
        for name, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            named |= {} if token is None else {name: self.first.id_to_token(token)}
        return named


def open_library(raw: dict, file: Path) -> tuple:
    """The library's tokenizer for the first text of a prompt, and for text behind a control token.

    They differ where a blank is put before the first text alone (Metaspace, "first").
    """
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"{file} needs a library that is not installed: pip install tokenizers"
                         ) from None
    places = ("pre_tokenizer", "normalizer")
    rest = raw | {name: copy.deepcopy(raw[name]) for name in places if name in raw}
    for name in places:
        for part in [rest.get(name) or {}, *((rest.get(name) or {}).get("pretokenizers") or [])]:
            if part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
    made = []
    for given in (raw, rest) if rest != raw else (raw,):
        try:
            library = tokenizers.Tokenizer.from_str(json.dumps(given))
            library.no_truncation()
            library.no_padding()
            library.encode_special_tokens = True  # as text
        except BaseException as error:  # the library's panics are no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            reason = " ".join(str(error).split())[:100]
            raise ValueError(f"{file} is not a tokenizer that the tokenizers library reads "
                             f"({reason}). Get it again.") from None
        made.append(library)
    return made[0], made[-1]
