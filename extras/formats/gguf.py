"""llama.cpp's GGUF files: metadata and tensors of a model of LLaMA architecture.

A file is a header (keys with values, then name, shape, type and place of each tensor) and the
tensors' bytes. Every count is checked against the bytes that are there before anything is made of
it. The package gguf turns quantised blocks into numbers; it is imported where that begins.

Like Meta's files, GGUF pairs neighbours in the rows of q and k; see meta.reorder.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from extras.formats import weights
from extras.formats.checks import read_value, reading, refuse
from extras.formats.config import BOUNDS, HFConfig
from extras.formats.meta import reorder
from extras.formats.rope import LENGTH, scale_frequencies
from model import Llama

FORMS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
         11: "<i8", 12: "<f8"}  # of the values' types; 8 is a text, 9 an array
TEXT, ARRAY = 8, 9
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm"}
KEYS = {  # our field: its key behind "llama."
    "dim": "embedding_length", "n_layers": "block_count", "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    "hidden_dim": "feed_forward_length", "norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length", "vocab_size": "vocab_size"}
MAY_LACK = ("n_kv_heads", "head_dim", "vocab_size")
ROPE = {"factor": "rope.scaling.factor", LENGTH: "rope.scaling.original_context_length",
        "beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
WITHOUT_EFFECT = ("rope.scaling.finetuned", "tensor_data_layout", "expert_count",
                  "expert_used_count", "attention.value_length", "rope.dimension_count")
OTHERS = ("rope.freq_base", "rope.scaling.type", "rope.scale_linear", "attention.sliding_window")
CUT = "it is cut off or damaged. Download it again"
ENDS = ("<|eot_id|>", "<|im_end|>", "<|end_of_turn|>")  # of a turn, where a chat template has them


@dataclass
class Gguf:
    """values: the metadata. tensors: (shape, number of the type, first byte), by name."""

    file: Path
    values: dict
    tensors: dict[str, tuple]
    blob: mmap.mmap


class Cursor:
    """Reads a header from its beginning; nothing is made of bytes that are not there."""

    def __init__(self, blob: mmap.mmap):
        self.blob, self.place = blob, 0

    def numbers(self, form: str, count: int) -> list:
        """`count` numbers of a form."""
        kind = np.dtype(form)
        begin, left = self.place, len(self.blob) - self.place
        refuse(count * kind.itemsize > left, f"{count:,} values of {kind.itemsize} bytes are "
               f"claimed where {left:,} bytes are left: {CUT}")
        self.place += count * kind.itemsize
        return np.frombuffer(self.blob, kind, count, begin).tolist()

    def text(self) -> str:
        """A text behind its length."""
        length, = self.numbers("<u8", 1)
        left = len(self.blob) - self.place
        refuse(length > left, f"a text of {length:,} bytes is claimed where {left:,} are left: "
               f"{CUT}")
        self.place += length
        return self.blob[self.place - length:self.place].decode()

    def value(self, kind: int):
        """A value of this type."""
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            (inner,), (count,) = self.numbers("<u4", 1), self.numbers("<u8", 1)
            if inner != TEXT:
                refuse(inner not in FORMS, f"it holds an array of the unknown type {inner}")
                return self.numbers(FORMS[inner], count)
            left = len(self.blob) - self.place
            refuse(8 * count > left, f"{count:,} texts are claimed where {left:,} bytes are left: "
                   f"{CUT}")
            return [self.text() for _ in range(count)]
        refuse(kind not in FORMS, f"it holds a value of the unknown type {kind}")
        return self.numbers(FORMS[kind], 1)[0]


# ----- The file -----
def read_gguf(file: Path) -> Gguf:
    """The metadata, and where the tensors are. Raises ValueError for what is no whole GGUF file."""
    with open(file, "rb") as stream:
        start = stream.read(8)
        refuse(not start.startswith(b"GGUF") or len(start) < 8, f"{file} is not a GGUF file: it "
               f"begins with {start!r}. Download it again.")
        blob = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    version, = struct.unpack("<I", start[4:])
    refuse(version not in (2, 3), f"{file} is GGUF of version {version}. Expected 2 or 3 "
           "(little-endian). Get a newer file of this model.")
    cursor = Cursor(blob)
    cursor.place = 8
    with reading(file, "a GGUF file"):
        n_tensors, n_values = cursor.numbers("<u8", 2)
        # a key or a tensor takes at least 12 bytes
        refuse(12 * (n_tensors + n_values) > len(blob), f"{n_tensors:,} tensors and {n_values:,} "
               f"keys are claimed in {len(blob):,} bytes: {CUT}")
        values, places = {}, {}
        for _ in range(n_values):
            key, (kind,) = cursor.text(), cursor.numbers("<u4", 1)
            values[key] = cursor.value(kind)
        for _ in range(n_tensors):
            name, (n_dims,) = cursor.text(), cursor.numbers("<u4", 1)
            refuse(n_dims > 4, f"tensor {name!r:.100} has {n_dims:,} dimensions")
            shape = tuple(reversed(cursor.numbers("<u8", n_dims)))  # GGUF's begin with the columns
            refuse(name in places, f"tensor {name!r:.100} is there twice")
            places[name] = shape, *cursor.numbers("<u4", 1), *cursor.numbers("<u8", 1)
        step = read_value(values, "general.alignment", 32, 1, 2**16)
        begin = -(-cursor.place // step) * step
        tensors = check_places(places, begin, len(blob), file)
    return Gguf(file, values, tensors, blob)


def check_places(places: dict, begin: int, size: int, file: Path) -> dict[str, tuple]:
    """(shape, type, first byte) of each tensor, if all of them lie in the file side by side."""
    tensors, total = {}, 0
    for name, (shape, kind, offset) in places.items():
        n_bytes = bytes_per_row(kind, shape[-1] if shape else 1, name, file)
        for rows in shape[:-1]:
            n_bytes *= rows
        refuse(begin + offset + n_bytes > size, f"tensor {name!r:.100} ends at byte "
               f"{begin + offset + n_bytes:,} of {size:,}: {CUT}")
        total += n_bytes
        tensors[name] = shape, kind, begin + offset
    refuse(begin + total > size, f"its tensors take {total:,} bytes of {size:,}: it is damaged. "
           "Download it again")
    return tensors


def bytes_per_row(kind: int, columns: int, name: str, file: Path) -> int:
    """The size of a row of a tensor of this type."""
    gguf = import_gguf(file)
    known = [entry for entry in gguf.GGML_QUANT_SIZES if int(entry) == kind]
    refuse(not known, f"tensor {name!r:.100} has the unknown type {kind}. A newer gguf may know "
           "it: pip install --upgrade gguf")
    block, size = gguf.GGML_QUANT_SIZES[known[0]]
    refuse(columns % block, f"tensor {name!r:.100} has {columns} columns, which are no blocks of "
           f"{block}")
    return columns // block * size


def import_gguf(file: Path):
    """The package gguf. Raises ValueError that says how to get it."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ValueError(f"{file} is a GGUF file, and its tensors are read with the package gguf. "
                         "Install it: pip install gguf") from None
    return gguf


def dequantize(found: Gguf, name: str) -> Tensor:
    """A tensor's numbers in float32."""
    gguf = import_gguf(found.file)
    shape, code, begin = found.tensors[name]
    kind = gguf.GGMLQuantizationType(code)
    n_bytes = bytes_per_row(code, shape[-1], name, found.file)
    n_rows = int(np.prod(shape[:-1], dtype=np.int64))
    raw = np.frombuffer(found.blob, np.uint8, n_rows * n_bytes, begin)
    try:
        numbers = gguf.quants.dequantize(raw.reshape(*shape[:-1], n_bytes), kind)
    except NotImplementedError:
        raise ValueError(f"{found.file}: tensor {name!r:.100} is of type {kind.name}, which the "
                         "package gguf does not dequantise. Get the model in F16, BF16 or Q8_0."
                         ) from None
    return torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy())


# ----- The model -----
def hf_name(name: str) -> str:
    """What Hugging Face calls the weight that GGUF calls `name`; "" where it is unknown."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = (stem.split(".", 2) + ["", ""])[:3]
        return f"model.layers.{layer}.{NAMES[part]}.{kind}" if part in NAMES else ""
    return f"{NAMES[stem]}.{kind}" if stem in NAMES else ""


def shortest(number: float) -> float:
    """The number with the fewest digits that is the same in float32: 1e-05 of 9.99999974e-06."""
    return float(str(np.float32(number)))


def read_hyperparameters(found: Gguf) -> HFConfig:
    """The config that the metadata and the tensors' shapes describe."""
    kind = found.values.get("general.architecture")
    refuse(kind != "llama", f"general.architecture is {kind!r:.60}; only llama is implemented")
    refuse(found.values.get("split.count", 0) not in (0, 1), "it is one of several parts of a "
           "model. Merge them first: llama-gguf-split --merge FIRST_PART MERGED.gguf")
    raw = {key.removeprefix("llama."): value for key, value in found.values.items()
           if key.startswith("llama.")}
    known = {*KEYS.values(), *ROPE.values(), *WITHOUT_EFFECT, *OTHERS}
    for key in raw.keys() - known:
        refuse(key != "rope.scaling.attn_factor" or raw[key] != 1.0, f"llama.{key} is "
               f"{raw[key]!r:.60}, which is not implemented and would change the model's answers")
    refuse(raw.get("expert_count"), f"expert_count is {raw.get('expert_count')!r:.20}; mixtures "
           "of experts are not implemented")
    values = {}
    for name, key in KEYS.items():
        refuse(name not in MAY_LACK and key not in raw, f"llama.{key} is missing")
        values[name] = read_value(raw, key, None, *BOUNDS[name])
    rows = found.tensors.get("token_embd.weight", ((0, 0),))[0][0]
    refuse(not 0 < rows <= BOUNDS["vocab_size"][1], f"its embedding has {rows:,} rows")
    refuse(values["vocab_size"] not in (None, rows), f"llama.vocab_size is {values['vocab_size']}, "
           f"and the embedding has {rows} rows")
    values["vocab_size"], values["norm_eps"] = rows, shortest(values["norm_eps"])
    values["n_kv_heads"] = values["n_kv_heads"] or values["n_heads"]
    values["head_dim"] = values["head_dim"] or values["dim"] // values["n_heads"]
    for key in ("rope.dimension_count", "attention.value_length"):
        other = raw.get(key, values["head_dim"])
        refuse(other != values["head_dim"], f"llama.{key} is {other!r:.20} where a head has "
               f"{values['head_dim']} numbers; expected the same")
    theta = shortest(read_value(raw, "rope.freq_base", 1e4, 1.0, 1e12))
    biases = {hf_name(name) for name in found.tensors if name.endswith(".bias")}
    config = HFConfig(
        **values, rope_theta=theta, rope_scaling=read_scaling(raw),
        tie_embeddings="output.weight" not in found.tensors,
        attention_bias=any(".self_attn." in name for name in biases),
        mlp_bias=any(".mlp." in name for name in biases),
        sliding_window=read_value(raw, "attention.sliding_window", 0, 0, 2**24) or None)
    if "rope_freqs.weight" in found.tensors:
        config.rope_scaling = recover_llama3(found, config, raw)
        config.__post_init__()
    config.bos_id = read_value(found.values, "tokenizer.ggml.bos_token_id", None, 0, rows - 1)
    config.eos_ids = find_ends(found.values, rows)
    return config


def read_scaling(raw: dict) -> dict | None:
    """The rope_scaling of a config.json that the keys say: none, linear or yarn."""
    kind = raw.get("rope.scaling.type", "linear" if "rope.scale_linear" in raw else "none")
    refuse(kind not in ("none", "linear", "yarn"),
           f"llama.rope.scaling.type is {kind!r:.60}; expected none, linear or yarn")
    if kind == "none":
        return None
    raw = {"rope.scaling.factor": raw.get("rope.scale_linear")} | raw
    scaling = {name: read_value(raw, key, None, *BOUNDS_OF_ROPE[name])
               for name, key in ROPE.items()}
    refuse(scaling["factor"] is None, "llama.rope.scaling.factor is missing")
    scaling["factor"] = shortest(scaling["factor"])
    if kind == "linear":
        return {"rope_type": kind, "factor": scaling["factor"]}
    refuse(scaling[LENGTH] is None, f"llama.{ROPE[LENGTH]} is missing")
    return {"rope_type": kind} | {name: x for name, x in scaling.items() if x is not None}


BOUNDS_OF_ROPE = {"factor": (1.0, 1e4), LENGTH: (1, 2**24), "beta_fast": (1e-3, 1e4),
                  "beta_slow": (1e-3, 1e4)}


def recover_llama3(found: Gguf, config: HFConfig, raw: dict) -> dict | None:
    """The llama3 scaling whose divisors of the frequencies the file holds, (Dh/2,).

    llama.cpp stores the divisors and not what they were computed from. The last is the factor; the
    rest is what Meta's models have: 1, 4 and 8192. Raises ValueError unless that gives the same.
    """
    divisors = dequantize(found, "rope_freqs.weight")
    if torch.equal(divisors, torch.ones(config.head_dim // 2)):
        return config.rope_scaling
    refuse(config.rope_scaling, "it has both rope_freqs.weight and another RoPE scaling")
    refuse(divisors.shape != (config.head_dim // 2,) or not bool((divisors >= 1).all()),
           "rope_freqs.weight does not fit the heads")
    length = read_value(raw, ROPE[LENGTH], 8192, *BOUNDS_OF_ROPE[LENGTH])
    scaling = {"rope_type": "llama3", "factor": shortest(float(divisors[-1])),
               "low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: length}
    plain = config.rope_frequencies("cpu")
    config.rope_scaling = scaling
    ours = plain / scale_frequencies(plain, config)
    refuse(not torch.allclose(ours, divisors, rtol=1e-4), "rope_freqs.weight is not the scaling of "
           "Llama 3.1, so that config.json cannot say it. Get the model in Hugging Face's format")
    return scaling


def find_ends(values: dict, rows: int) -> list[int]:
    """The ids that end a response: EOS, and what a key or the chat template ends a turn with."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    refuse(keys[0] not in values, f"{keys[0]} is missing")
    ends = [read_value(values, key, None, 0, rows - 1) for key in keys]
    tokens, template = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.chat_template")
    if isinstance(tokens, list) and isinstance(template, str):
        ends += [tokens.index(text) for text in ENDS if text in template and text in tokens]
    return list(dict.fromkeys(end for end in ends if end is not None))


def read_model(found: Gguf, dtype: torch.dtype | None) -> Llama:
    """The model, in `dtype`; None: in the type of the matrices where they are of one plain type.

    Quantised blocks are then written in float32, which loses nothing.
    """
    with reading(found.file, "the metadata of a LLaMA model"):
        config = read_hyperparameters(found)
    model, state = weights.make_empty(config), {}
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    names = {hf_name(name): name for name in found.tensors if name != "rope_freqs.weight"}
    for name, theirs in names.items():
        shape, wanted = found.tensors[theirs][0], expected.get(name, "that there is none")
        refuse(shape != wanted, f"tensor {theirs!r:.100} is {shape} in {found.file}, its metadata "
               f"say {wanted}. The file is damaged.")
    dtype = dtype or stored_type(found)
    for name, shape in expected.items():
        bias = name.endswith(".bias")  # some models have those of q, k and v alone
        refuse(name not in names and not bias, f"{found.file} has no tensor for {name}. The file "
               "is damaged.")
        weight = dequantize(found, names[name]) if name in names else torch.zeros(shape)
        state[name] = reorder(name, weight, config.head_dim, to_meta=False).to(dtype)
        refuse(not state[name].isfinite().all(), f"tensor {names.get(name)!r:.100} of {found.file} "
               f"has numbers that are not finite in {dtype}. Try --dtype float32.")
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def stored_type(found: Gguf) -> torch.dtype:
    """float16 or bfloat16 if all matrices are, and all vectors fit exactly; or else float32."""
    kinds = {kind for shape, kind, _ in found.tensors.values() if len(shape) == 2}
    dtype = {(1,): torch.float16, (30,): torch.bfloat16}.get(tuple(kinds), torch.float32)
    for name, (shape, _, _) in found.tensors.items():
        if len(shape) == 1 and dtype != torch.float32:
            vector = dequantize(found, name)
            if not torch.equal(vector.to(dtype).float(), vector):
                return torch.float32
    return dtype
