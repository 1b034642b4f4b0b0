"""Hugging Face's tokenizer files, made of what a GGUF file or Meta's tiktoken file says.

Byte-level BPE (GPT-2, Llama 3, SmolLM) becomes a tokenizer.json, sentencepiece a tokenizer.model.
Bytes stand in a tokenizer.json as letters: those that can be printed as themselves, the others as
the letters from U+0100 on.
"""

import base64
import json
import struct
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from extras.formats.checks import read_value, reading, refuse

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of tokens, as in sentencepiece
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
OLD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# What text is split by before pairs are merged, by tokenizer.ggml.pre: patterns that are applied
# one after the other. Without any, GPT-2's pattern, which the byte level knows by itself.
SPLITS = {"gpt-2": (), "smollm": (), "llama-bpe": (LLAMA3,),
          "default": (r"[\p{P}\$\+<=>\^~\|]+", OLD, r"\p{N}+", "[0-9][0-9][0-9]")}
CLASS = "PreTrainedTokenizerFast"


# ----- Of a GGUF file -----
def gguf_tokenizer(values: dict, rows: int, longest: int) -> dict[str, bytes]:
    """The files of the tokenizer that the metadata describe, {name: bytes}.

    rows: of the embedding. longest: the most tokens of a text. Raises ValueError.
    """
    raw = {key.removeprefix("tokenizer.ggml."): value for key, value in values.items()}
    kind, tokens = raw.get("model"), raw.get("tokens")
    refuse(kind not in ("gpt2", "llama"), f"tokenizer.ggml.model is {kind!r:.60}; only gpt2 "
           "(byte-level BPE) and llama (sentencepiece) are implemented. Get the model in Hugging "
           "Face's format")
    refuse(type(tokens) is not list or not 0 < len(tokens) <= rows or len(set(tokens)) < len(tokens)
           or not all(isinstance(token, str) for token in tokens), f"tokenizer.ggml.tokens must be "
           f"1 to {rows} different texts, as the embedding has {rows} rows")
    types = raw.setdefault("token_type", [NORMAL] * len(tokens))
    refuse(type(types) is not list or len(types) != len(tokens) or not set(types) <= set(range(7)),
           f"tokenizer.ggml.token_type must be {len(tokens)} numbers from 0 to 6")
    refuse(raw.get("add_eos_token"), "tokenizer.ggml.add_eos_token is true, which is not "
           "implemented: prompts would end in EOS")
    names = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = read_value(raw, f"{key}_token_id", None, 0, len(tokens) - 1)
        if token is not None:
            names[f"{name}_token"] = tokens[token]
    refuse("eos_token" not in names, "tokenizer.ggml.eos_token_id is missing")
    template = values.get("tokenizer.chat_template")
    refuse(not isinstance(template, str | None), "tokenizer.chat_template is no text")
    added = {token: kind == CONTROL for token, kind in zip(tokens, types, strict=True)
             if kind in (CONTROL, USER_DEFINED)}
    make = bpe_of_gguf if kind == "gpt2" else sentencepiece_of_gguf
    files, own = make(raw, names, added)
    ids = {token: number for number, token in enumerate(tokens)}
    config = own | names | {"model_max_length": longest, "clean_up_tokenization_spaces": False}
    config["added_tokens_decoder"] = {
        str(ids[text]): describe(text, special) for text, special in added.items()}
    if template:
        config["chat_template"] = template
    return files | {"tokenizer_config.json": to_json(config)}


def describe(text: str, special: bool) -> dict:
    """An added token as tokenizer_config.json has it."""
    return {"content": text, "special": special, "lstrip": False, "rstrip": False,
            "normalized": False, "single_word": False}


def to_json(value) -> bytes:
    """A file of JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def bpe_of_gguf(raw: dict, names: dict, added: dict) -> tuple[dict, dict]:
    """The tokenizer.json of a byte-level BPE, and its keys in tokenizer_config.json."""
    pre, merges = raw.get("pre"), raw.get("merges")
    refuse(pre not in SPLITS, f"tokenizer.ggml.pre is {pre!r:.60}; only {', '.join(SPLITS)} are "
           "implemented. Get the model in Hugging Face's format")
    pairs = [tuple(merge.split(" ")) for merge in merges] if type(merges) is list else [()]
    refuse(not all(len(pair) == 2 for pair in pairs), "tokenizer.ggml.merges must be texts of two "
           "parts and one blank")
    # llama.cpp's own defaults, where a file does not say
    begins = read_value(raw, "add_bos_token", pre == "llama-bpe", False, True)
    bos = names.get("bos_token") if begins else None
    refuse(begins and not bos, "add_bos_token is true, and tokenizer.ggml.bos_token_id is missing")
    vocabulary = {token: number for number, token in enumerate(raw["tokens"])}
    blob = make_bpe(vocabulary, pairs, pre, added, bos)
    return {"tokenizer.json": blob}, {
        "tokenizer_class": CLASS, "add_bos_token": begins, "add_prefix_space": False}


# ----- Byte-level BPE -----
def make_bpe(vocabulary: dict[str, int], merges: list[tuple], pre: str, added: dict[str, bool],
             bos: str | None) -> bytes:
    """A tokenizer.json. pre: of SPLITS. added: {text: is it special}. bos: begins every text."""
    try:
        from tokenizers import (
            AddedToken,
            Regex,
            Tokenizer,
            decoders,
            models,
            pre_tokenizers,
            processors,
        )
    except ImportError:
        raise ValueError("a byte-level BPE is written with the package tokenizers. Install it: "
                         "pip install tokenizers") from None
    try:
        # Llama 3 takes a word that is a token as it is
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"the tokens and their merges do not fit together: {reason}") from None
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not SPLITS[pre]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    for text, special in added.items():
        token = AddedToken(text, normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer.to_str(pretty=True).encode()


def letters_of_bytes() -> list[str]:
    """The letter that stands for each byte in a byte-level BPE (Radford et al. 2019, GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, others = [], 0
    for byte in range(256):
        letters.append(chr(byte if byte in printable else 256 + others))
        others += byte not in printable
    return letters


# ----- Of Meta's Llama 3 -----
def is_tiktoken(file: Path) -> bool:
    """Whether the first line of a file is a token in base 64 and its rank."""
    if not file.is_file():
        return False
    with open(file, "rb") as stream:
        first = stream.readline(200).split()
    return len(first) == 2 and first[1] == b"0"


def llama3_tokenizer(file: Path, rows: int, longest: int) -> dict[str, bytes]:
    """The files of Llama 3's tokenizer, whose tokenizer.model is tiktoken's; rows: see above."""
    letters, ranks = letters_of_bytes(), {}
    with reading(file, "lines of a token in base 64 and its rank"):
        refuse(file.stat().st_size > 10**8, "it is too large")
        for line in file.read_bytes().splitlines():
            token, number = line.split()
            text = "".join(letters[byte] for byte in base64.b64decode(token, validate=True))
            refuse(int(number) != len(ranks) or text in ranks, "its ranks must count from 0")
            ranks[text] = int(number)
        names = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{n}" for n in range(4)),
                 "start_header_id", "end_header_id", "reserved_special_token_4", "eot_id"]
        names += [f"reserved_special_token_{number}" for number in range(5, 251)]
        refuse(len(ranks) + len(names) != rows, f"it has {len(ranks)} tokens. With Llama 3's "
               f"{len(names)} special ones they must be {rows}, as the embedding has rows")
    added = {f"<|{name}|>": True for name in names}
    ids = ranks | {text: len(ranks) + number for number, text in enumerate(added)}
    bos, eos, *_ = added
    config = {"tokenizer_class": CLASS, "bos_token": bos, "eos_token": eos, "add_bos_token": True,
              "model_max_length": longest, "clean_up_tokenization_spaces": False}
    config["added_tokens_decoder"] = {str(ids[text]): describe(text, True) for text in added}
    return {"tokenizer.json": make_bpe(ids, find_merges(ranks), "llama-bpe", added, bos),
            "tokenizer_config.json": to_json(config)}


def find_merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs that make up each token, in the order of ranks; tiktoken merges by rank alone."""
    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                merges.append((rank, left, right, token[:cut], token[cut:]))
    return [merge[3:] for merge in sorted(merges)]


# ----- sentencepiece -----
def sentencepiece_of_gguf(raw: dict, names: dict, added: dict) -> tuple[dict, dict]:
    """The tokenizer.model of a sentencepiece BPE, and its keys in tokenizer_config.json.

    The file is a protobuf message, whose numbers are those of sentencepiece_model.proto.
    """
    tokens, types, scores = raw["tokens"], raw["token_type"], raw.get("scores")
    refuse(type(scores) is not list or len(scores) != len(tokens),
           f"tokenizer.ggml.scores must be {len(tokens)} numbers")
    refuse(types.count(UNKNOWN) != 1, "tokenizer.ggml.token_type must have one unknown token (2)")
    refuse("bos_token" not in names, "tokenizer.ggml.bos_token_id is missing")
    names.setdefault("unk_token", tokens[types.index(UNKNOWN)])
    blob = b""
    for token, score, kind in zip(tokens, scores, types, strict=True):
        blob += field(1, field(1, token) + b"\x15" + struct.pack("<f", score) + field(3, kind or 1))
    trainer = field(3, 2) + field(4, len(tokens)) + field(35, int(6 in types))  # BPE, its size, ...
    for number, name in ((40, "unk"), (41, "bos"), (42, "eos"), (43, "pad")):
        text = names.get(f"{name}_token")
        trainer += field(number, tokens.index(text) if text else -1)
        trainer += field(number + 5, text) if text else b""
    blank = read_value(raw, "add_space_prefix", True, False, True)
    packed = read_value(raw, "remove_extra_whitespaces", False, False, True)
    chart = bytes(byte % 256 for byte in raw.get("precompiled_charsmap", ()))
    normaliser = field(1, "identity") + field(2, chart) + field(3, int(blank))
    normaliser += field(4, int(packed)) + field(5, 1)
    begins = read_value(raw, "add_bos_token", True, False, True)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": begins, "add_eos_token": False,
              "legacy": True, "add_prefix_space": blank}  # legacy: as llama.cpp does
    blob += field(2, trainer) + field(3, normaliser)
    try:
        SentencePieceProcessor(model_proto=blob)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"the tokens are no sentencepiece model: {reason}") from None
    return {"tokenizer.model": blob}, config


def field(number: int, value) -> bytes:
    """A field of a protobuf message: a whole number, a text or bytes."""
    if isinstance(value, int):
        return varint(8 * number) + varint(value % 2**64)
    value = value.encode() if isinstance(value, str) else value
    return varint(8 * number + 2) + varint(len(value)) + value


def varint(number: int) -> bytes:
    """A number as protobuf writes it: seven bits a byte, the lowest first."""
    found = b""
    while number > 127:
        found += bytes([number % 128 + 128])
        number //= 128
    return found + bytes([number])
