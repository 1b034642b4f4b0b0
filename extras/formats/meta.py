"""Meta's layout: params.json and consolidated.*, of LLaMA-1, 2 and 3, or Mistral's single file.

Meta's q and k pair neighbours (x_2i, x_2i+1), Hugging Face's halves (x_i, x_{i + Dh/2}), so their
rows are in another order; all else differs in name only. A model of n files is divided for n GPUs:
some matrices by rows, some by columns, norms not at all.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from extras.formats import weights
from extras.formats.checks import read_object, read_value, reading, refuse
from extras.formats.config import BOUNDS, HFConfig
from extras.formats.pickles import read_bin
from model import Llama

NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm"}
GIVEN = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "norm_eps")
LLAMA3_ROWS = 128256  # of Llama 3's vocabulary, whose texts may be 8192 tokens long


def meta_name(name: str) -> str:
    """What Meta calls the weight that Hugging Face calls `name`."""
    head, _, layer = name.removesuffix(".weight").partition(".layers.")
    number, _, part = layer.partition(".")
    return f"layers.{number}.{NAMES[part]}.weight" if layer else f"{NAMES[head]}.weight"


def reorder(name: str, weight: Tensor, head_dim: int, *, to_meta: bool) -> Tensor:
    """The rows of q and k in the other layout's order; every other weight as it is."""
    if not name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
        return weight
    pair = (2, head_dim // 2) if to_meta else (head_dim // 2, 2)
    return weight.view(-1, *pair, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def read_params(file: Path, rows: int) -> HFConfig:
    """The config that Meta's or Mistral's params.json describes; rows: of the output matrix.

    The vocabulary may be given as -1, and the longest sequence is not given: 4096 where norm_eps is
    1e-5 (LLaMA-2), 2048 where it is 1e-6 (LLaMA-1), 16384 with a rope_theta (CodeLlama), 8192 for
    the vocabulary of Llama 3.
    """
    raw = read_object(file, 10**6)
    with reading(file, "Meta's params.json"):
        refuse(raw.get("moe") or raw.get("use_scaled_rope") or raw.get("quantization_args"),
               "moe, use_scaled_rope and quantization_args are not implemented. Get the model in "
               "Hugging Face's format, which says how RoPE is scaled.")
        for name in GIVEN[:3]:
            refuse(name not in raw, f"{name} is missing.")
        values = {name: read_value(raw, name, None, *BOUNDS[name]) for name in GIVEN}
        wide = int(2 * 4 * values["dim"] / 3)  # two thirds of 4 dim, rounded up to a multiple
        wide = int(read_value(raw, "ffn_dim_multiplier", 1.0, 1e-3, 1e3) * wide)
        multiple = read_value(raw, "multiple_of", 256, 1, 2**20)
        usual = {"n_kv_heads": values["n_heads"], "head_dim": values["dim"] // values["n_heads"],
                 "norm_eps": 1e-6, "hidden_dim": multiple * -(-wide // multiple)}
        values |= {name: value for name, value in usual.items() if values[name] is None}
        vocab_size = read_value(raw, "vocab_size", -1, -1, 2**24)
        vocab_size = vocab_size if vocab_size > 0 else rows
        refuse(vocab_size < 1, "no output.weight says how large the vocabulary is.")
        longest = 4096 if values["norm_eps"] > 5e-6 else 2048
        longest = 16384 if "rope_theta" in raw else longest
        longest = 8192 if vocab_size == LLAMA3_ROWS else longest
        return HFConfig(
            **values, vocab_size=vocab_size,
            rope_theta=read_value(raw, "rope_theta", 10000.0, 1.0, 1e12),
            sliding_window=read_value(raw, "sliding_window", None, 1, 2**24),
            max_position_embeddings=read_value(raw, "max_seq_len", longest, 1, 2**24))


def read_meta(folder: Path) -> Llama:
    """The model of consolidated.00.pth, 01, ..., or of Mistral's consolidated.safetensors."""
    files = [folder / "consolidated.safetensors"]
    if files[0].is_file():
        weights.read_header(files[0])  # which checks it
        parts = [load_file(files[0])]
    else:
        files = sorted(folder.glob("consolidated.*.pth"))
        wanted = [folder / f"consolidated.{number:02}.pth" for number in range(len(files))]
        refuse(not files or files != wanted, f"{folder} has {len(files)} files consolidated.*.pth, "
               "numbered with gaps or not at all. Expected consolidated.00.pth and the next ones.")
        parts = [read_bin(file) for file in files]
    outputs = [part["output.weight"] for part in parts if "output.weight" in part]
    rows = sum(len(output) for output in outputs if output.dim() == 2)
    config = read_params(folder / "params.json", rows)
    model, dims, state = weights.make_empty(config), {}, {}
    ours = {meta_name(name): name for name, _ in model.named_parameters()}
    for part in parts:
        for name in (part.keys() ^ ours.keys()) - {"rope.freqs"}:
            raise ValueError(f"tensor {name!r:.200} is in {folder} or in params.json's model, and "
                             "not in the other. They are from different models.")
    for theirs, name in ours.items():
        shapes = [tuple(part[theirs].shape) for part in parts]
        dims[theirs] = find_division(shapes, tuple(model.get_parameter(name).shape), theirs)
    for theirs, name in ours.items():
        weight = parts[0][theirs]
        if dims[theirs] is not None:
            weight = torch.cat([part[theirs] for part in parts], dims[theirs])
        state[name] = reorder(name, weight, config.head_dim, to_meta=False)
    model.load_state_dict(state, assign=True)
    return model


def find_division(shapes: list[tuple], whole: tuple, name: str) -> int | None:
    """The dimension along which parts of these shapes make the whole; None if each is the whole."""
    if len(whole) == 1 and set(shapes) == {whole}:
        return None
    for dim in range(len(whole)):
        others = {shape[:dim] + shape[dim + 1:] for shape in shapes if len(shape) == len(whole)}
        if others == {whole[:dim] + whole[dim + 1:]}:
            if sum(shape[dim] for shape in shapes) == whole[dim]:
                return dim
    raise ValueError(f"tensor {name} is {shapes[0]} in each of {len(shapes)} files, params.json "
                     f"says {whole} in all. They are from different models.")
