"""A LLaMA-family language model: forward pass, KV cache, sampling, and reading and writing of checkpoints.

Touvron et al. 2023 (arXiv 2302.13971, 2307.09288): pre-norm decoder with
    RMSNorm     y = w * x / sqrt(mean(x^2) + eps)                       Zhang & Sennrich 2019
    RoPE        position t turns the pair (x_i, x_{i + Dh/2}) by the angle t * theta^(-2i/Dh)      Su et al. 2021
                and its scalings to longer texts: linear, dynamic, llama3, yarn (`rope_frequencies`)
    GQA         H query heads share K key/value heads                   Ainslie et al. 2023
    SwiGLU      down(silu(gate(x)) * up(x))                             Shazeer 2020
Module names are those of Hugging Face's LlamaForCausalLM, so its weights load without a table.

The one shape inside is (N, D): linears, norms and RoPE see real tokens only, laid end to end, never padding. One small
object, `attend(layer, q, k, v)`, knows which token belongs to which document: `Packed` for whole documents (training,
scoring), `Branched` for those that share their beginning, `Prefill` for prompts into a KV cache, `Cached` for tokens behind
them, `Step` for one token a row. On a GPU, in 16 bits, the first two are one call of torch's varlen_attn (`Segments`), and a
`Step` is a CUDA graph (`OneToken`).

Shapes: B batch (rows or documents), T row length, N real tokens in all, S key length, D model dim, H/K query/kv heads,
Dh head dim, F ffn dim, V vocab, L layers, M rows of logits asked for.

    model = load_model("runs/base", dtype=torch.bfloat16, device="cuda")
    answers = generate(model, [[1, 15043], [1, 1724, 338]], max_new_tokens=64)
"""
import errno
import functools
import hashlib
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

MAX_SHARD_BYTES = 5 * 10**9
MAX_CONFIG_BYTES = 10**6
SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK_NUMBERS = 2**20      # weights are converted, checked and quantised so many at a time
PREFILL_TOKENS = 8192      # prompts enter the cache in calls of about this many tokens, which bounds memory
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")     # where it is known to be fast
PREPACKED_ROWS = 64        # rows that oneDNN's layout is chosen for; it serves any number
PART_ROWS = 256            # rows of a weight that are multiplied with one vector at a time
SHORTEST_SHARED = 8        # tokens that prompts must have in common to be read together
GRAPH_KEYS = 256           # a CUDA graph reads so many places of the cache, or twice, four times, ... as many


# ---------------------------------------------------------------------------------------------------------------
# Config


def option(default, help: str, hf: str | None = None, low=None, high=None):
    """A field; `hf` is its key in Hugging Face's config.json, whose values must lie between `low` and `high`."""
    return field(default=default, metadata={"help": help, "hf": hf, "low": low, "high": high})


@dataclass
class ModelConfig:
    """Shape of a model; the defaults are those of Hugging Face's LlamaConfig.

    Raises:
        ValueError: sizes that cannot be, or a RoPE scaling that is unknown or incomplete.
    """

    vocab_size: int = option(32000, "rows of the embedding", "vocab_size", 1, 2**24)
    dim: int = option(4096, "width of the residual stream", "hidden_size", 1, 2**17)
    n_layers: int = option(32, "number of blocks", "num_hidden_layers", 1, 1024)
    n_heads: int = option(32, "query heads", "num_attention_heads", 1, 4096)
    n_kv_heads: int | None = option(None, "key/value heads; None: n_heads", "num_key_value_heads", 1, 4096)
    head_dim: int | None = option(None, "width of a head; None: dim / n_heads", "head_dim", 2, 4096)
    hidden_dim: int = option(11008, "width of the feed-forward layer", "intermediate_size", 1, 2**20)
    norm_eps: float = option(1e-6, "epsilon inside RMSNorm", "rms_norm_eps", 0.0, 1.0)
    rope_theta: float = option(10000.0, "base of the rotary frequencies")
    rope_scaling: dict | None = option(None, "None, or rope_type linear, dynamic, llama3 or yarn with its values")
    max_position_embeddings: int = option(2048, "longest sequence before scaling", "max_position_embeddings", 1, 2**24)
    sliding_window: int | None = option(None, "Mistral's window; sequences are kept within it, where it changes nothing")
    tie_embeddings: bool = option(False, "the head is the embedding", "tie_word_embeddings", False, True)
    attention_bias: bool = option(False, "biases on q, k, v and o", "attention_bias", False, True)
    mlp_bias: bool = option(False, "biases on gate, up and down", "mlp_bias", False, True)
    bos_id: int | None = option(1, "id that begins a sequence")
    eos_ids: tuple[int, ...] = option((2,), "ids that end a sequence")
    prompt_template: str | None = option(None, "template it was trained with (our own key in config.json)")

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.dim // self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}.")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; RoPE turns pairs, so it must be even and at least 2.")
        self.rope_scaling = checked_scaling(self.rope_scaling, self.max_position_embeddings)
        if self.rope_theta <= 1 and (self.rope_scaling or {}).get("rope_type") == "yarn":
            raise ValueError(f"rope_theta is {self.rope_theta}; RoPE scaling 'yarn' needs one above 1. Take the config.json that came with the weights.")

    @property
    def context(self) -> int:
        """Most tokens of a sequence: max_position_embeddings, times the factor where config.json leaves that out.

        Under linear and dynamic scaling config.json keeps the unscaled length; under yarn either length is found.
        """
        scaling, longest = self.rope_scaling or {}, self.max_position_embeddings
        if scaling.get("rope_type") in ("linear", "dynamic"):
            longest = int(longest * scaling["factor"])
        if scaling.get("rope_type") == "yarn":
            longest = max(longest, int(scaling["original_max_position_embeddings"] * scaling["factor"]))
        return min(longest, self.sliding_window or longest)

    @classmethod
    def from_hf(cls, raw: dict) -> "ModelConfig":
        """Read the keys of a Hugging Face config.json, in the spelling of transformers 4 or 5.

        Raises:
            ValueError: another architecture, a feature that would change the numbers, or an impossible value.
        """
        if raw.get("model_type") not in ("llama", "mistral"):
            raise ValueError(f"config.json: model_type is {raw.get('model_type')!r:.60}; only llama and mistral are "
                             "implemented.")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: hidden_act is {raw['hidden_act']!r:.60}; only silu is implemented.")
        if raw.get("quantization_config"):
            raise ValueError("config.json: quantization_config is given, and such weights are not read; take the "
                             "full-precision checkpoint (--quantize makes int8 or 4 bits of it).")
        values = {item.name: checked(raw, default=item.default, **item.metadata) for item in hf_fields()}
        theta, scaling = rope_parameters(raw)
        if raw["model_type"] == "mistral" and raw.get("sliding_window", 4096) is not None:     # absent means 4096 there
            values["sliding_window"] = checked(raw, "sliding_window", 4096, 1, 2**24)
        template = raw.get("prompt_template")
        if template is not None and not isinstance(template, str):
            raise ValueError(f"config.json: prompt_template is {template!r:.60}; expected the name of a template.")
        return cls(**values, rope_theta=theta, rope_scaling=scaling, prompt_template=template,
                   bos_id=next(iter(token_ids(raw, "bos_token_id", 1)), None),
                   eos_ids=token_ids(raw, "eos_token_id", 2))

    def to_hf(self, dtype: str = "float32") -> dict:
        """The keys of a config.json that transformers 4 and 5 both read."""
        raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype, "hidden_act": "silu"}
        if self.sliding_window:
            raw |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": self.sliding_window}
        raw |= {item.metadata["hf"]: getattr(self, item.name) for item in hf_fields()}
        raw |= {"rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling, "bos_token_id": self.bos_id}
        raw["eos_token_id"] = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None
        return raw | ({"prompt_template": self.prompt_template} if self.prompt_template else {})


def hf_fields() -> list[Field]:
    """The fields of ModelConfig that config.json holds under a name of its own."""
    return [item for item in fields(ModelConfig) if item.metadata["hf"]]


def checked(raw: dict, hf: str, default, low, high, help: str = ""):
    """raw[hf], of the type of `low` and within [low, high]; where it is absent or null, the default."""
    value = raw.get(hf)
    if value is None:
        return default
    types = (int, float) if type(low) is float else (type(low),)
    if type(value) not in types or not low <= value <= high:
        raise ValueError(f"config.json: {hf} is {value!r:.60}; expected {type(low).__name__} from {low} to {high}.")
    return type(low)(value)


def token_ids(raw: dict, key: str, default: int) -> tuple[int, ...]:
    """An id or a list of ids under `key`, as a tuple. Raises ValueError for anything else."""
    value = raw.get(key, default)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ValueError(f"config.json: {key} is {value!r:.60}; expected an id or a list of ids.")
    return tuple(ids)


ROPE_NEEDS = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
ROPE_RANGES = {"factor": (1.0, 1e4), "low_freq_factor": (1e-3, 1e4), "high_freq_factor": (1e-3, 1e4),
               "beta_fast": (1e-3, 1e4), "beta_slow": (1e-3, 1e4), "mscale": (0.0, 1e4), "mscale_all_dim": (0.0, 1e4),
               "attention_factor": (1e-3, 1e4), "original_max_position_embeddings": (1, 2**24), "truncate": (False, True)}


def rope_parameters(raw: dict) -> tuple[float, dict | None]:
    """Base and scaling of the rotary frequencies, in any of config.json's spellings.

    `rope_scaling` (transformers 4) wins over `rope_parameters` (5) as a whole; a rope_theta inside wins over one outside,
    rope_type over the older `type`, but an original_max_position_embeddings outside over one inside.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("config.json: the RoPE parameters are malformed or differ by layer; one set for all layers is "
                         "implemented.")
    if not all(place.get("partial_rotary_factor") in (None, 1) for place in (raw, rope)):
        raise ValueError("config.json: a partial_rotary_factor other than 1 is not implemented.")
    theta = checked({"rope_theta": raw.get("rope_theta")} | rope, "rope_theta", 10000.0, 1.0, 1e12)
    kind, original = rope.get("rope_type", rope.get("type", "default")), "original_max_position_embeddings"
    known = {name: value for name, value in rope.items() if name not in ("rope_theta", "type", "partial_rotary_factor",
                                                                         "finetuned") and value is not None}
    if raw.get(original) is not None and kind in ("llama3", "yarn"):
        known[original] = raw[original]
    return theta, None if kind == "default" else known | {"rope_type": kind}


def checked_scaling(scaling: dict | None, longest: int) -> dict | None:
    """The scaling with every value in range and its original length filled in; None for plain RoPE."""
    kind = (scaling or {}).get("rope_type", "default")
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in ROPE_NEEDS:
        raise ValueError(f"RoPE scaling {kind!r:.60} is not implemented; {', '.join(ROPE_NEEDS)} are.")
    unknown = [name for name in scaling if name not in ROPE_RANGES and name != "rope_type"]
    missing = [name for name in ROPE_NEEDS[kind] if scaling.get(name) is None]
    if unknown or missing:
        raise ValueError(f"RoPE scaling {kind!r} {'has the unknown value' if unknown else 'lacks'} "
                         f"{(unknown or missing)[0]!r:.60}. Take the config.json that came with the weights.")
    values = {name: checked(scaling, name, None, *ROPE_RANGES[name]) for name in scaling if name != "rope_type"}
    if kind in ("llama3", "yarn"):
        values.setdefault("original_max_position_embeddings", longest)
    if kind == "llama3" and not values["low_freq_factor"] < values["high_freq_factor"]:
        raise ValueError("RoPE scaling 'llama3': low_freq_factor must be below high_freq_factor.")
    return {"rope_type": kind} | values


PRESETS = {
    "tiny": ModelConfig(vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64,
                        norm_eps=1e-5, max_position_embeddings=512),
    "demo": ModelConfig(vocab_size=1200, dim=192, n_layers=4, n_heads=4, hidden_dim=512,
                        norm_eps=1e-5, max_position_embeddings=1024, tie_embeddings=True),
    "tinyllama": ModelConfig(dim=2048, n_layers=22, n_kv_heads=4, hidden_dim=5632, norm_eps=1e-5),
    "llama2-7b": ModelConfig(norm_eps=1e-5, max_position_embeddings=4096),
    "llama2-13b": ModelConfig(dim=5120, n_layers=40, n_heads=40, hidden_dim=13824, norm_eps=1e-5,
                              max_position_embeddings=4096),
}


# ---------------------------------------------------------------------------------------------------------------
# Blocks


def sampling_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: int) -> Tensor:
    """x (N, in) times a weight (out, in), plain or as `prepacked` lays it out: (N, out). On a CPU, without gradients."""
    if torch.compiler.is_compiling():                                  # which would take the call apart, were it not an operator
        return torch.ops.alignment.linear(x, weight, bias, out)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if weight.dim() == 2:                                              # one row. MKL reads a matrix for one vector with one thread, a batch with all
        parts = weight.unflatten(0, (row_parts(out), -1))              # (P, out / P, in)
        y = torch.bmm(parts, x.T.expand(len(parts), -1, -1)).view(1, out)
    elif len(x) == 1:                                                  # an embedding bag adds up weighted rows, and reads them as fast as memory goes
        P, size, rows = weight.shape                                   # (P, in, out / P)
        factors = torch.cat([x] * P).view(-1)                          # (P * in,)
        y = torch.embedding_bag(weight.view(-1, rows), *bags(P, size), False, 0, False, factors)[0].view(1, out)     # not scaled, mode 0: sums
    else:
        y = torch.bmm(x.expand(len(weight), -1, -1), weight).transpose(0, 1).flatten(1)
    return y if bias is None else y + bias


@functools.cache
def bags(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Rows 0, 1, 2, ... in bags of `size`: the rows, (count * size,), and where each bag begins, (count,)."""
    return torch.arange(count * size, dtype=torch.int32), torch.arange(count, dtype=torch.int32) * size


if not hasattr(torch.ops.alignment, "linear"):                         # a second import finds it made
    torch.library.define("alignment::linear", "(Tensor x, Tensor weight, Tensor? bias, int out) -> Tensor")
    torch.library.impl("alignment::linear", "CompositeExplicitAutograd", sampling_linear)
    torch.library.register_fake("alignment::linear", lambda x, weight, bias, out: x.new_empty(*x.shape[:-1], out))


def row_parts(rows: int) -> int:
    """How many parts a matrix of so many rows is cut into: some for each thread, none much above PART_ROWS rows."""
    parts = 2 * torch.get_num_threads()
    while rows > parts * PART_ROWS:
        parts *= 2
    return math.gcd(rows, parts)


class Linear(nn.Linear):
    """nn.Linear, whose weight `prepacked` can lay out anew for sampling."""

    layout = None                                                      # the weight in that form

    def forward(self, x: Tensor) -> Tensor:
        if self.layout is not None:
            return sampling_linear(x, self.layout, self.bias, self.out_features)
        if x.shape == (1, self.in_features) and x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled():
            return sampling_linear(x, self.weight, self.bias, self.out_features)
        return super().forward(x)


@contextmanager
def prepacked(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside, for sampling `rows` answers together on a CPU, linears keep their weights in another layout than torch's.

    For several rows it is oneDNN's; for one, in bfloat16, parts of the transposed weight. (In float32 `sampling_linear` reads torch's
    own layout for one row.) It serves any number of rows, without gradients; bench/speed.py prints what each gains.
    The plain weights' memory is let go meanwhile, where nothing else needs it, and they are back, bit for bit, at the end.
    Training keeps torch's: oneDNN makes and keeps a kernel for each new number of rows, and there every step has another.
    Nests. Where oneDNN has no such layout (GPUs, other types, sharded weights) nothing happens.
    """
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    types = [torch.float32] if ONEDNN and rows > 1 else []
    types += [torch.bfloat16] if ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    linears = [module for module in model.modules() if isinstance(module, Linear) and module.layout is None
               and type(module.weight.data) is Tensor and module.weight.device.type == "cpu" and module.weight.dtype in types]
    try:
        for linear in linears:
            weight, storage = linear.weight.data, linear.weight.untyped_storage()
            if rows > 1:
                linear.layout = torch.ops.mkldnn._reorder_linear_weight(weight, PREPACKED_ROWS)
            else:
                linear.layout = weight.unflatten(0, (row_parts(len(weight)), -1)).transpose(1, 2).contiguous()
            if id(linear.weight) not in shared and storage.resizable() and storage.nbytes() == weight.nbytes:
                storage.resize_(0)
        yield
    finally:
        for linear in linears:
            weight, storage = linear.weight.data, linear.weight.untyped_storage()
            if not storage.nbytes():
                storage.resize_(weight.nbytes)
                if linear.layout.is_mkldnn:
                    weight.copy_(linear.layout.to_dense())
                else:
                    weight.unflatten(0, (len(linear.layout), -1)).copy_(linear.layout.transpose(1, 2))
            linear.layout = None


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps); float32 inside, cast back, then times the weight. (N, D) -> (N, D)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


def rope_frequencies(config: ModelConfig, spans: Tensor) -> tuple[Tensor, float]:
    """Angles per position, (Dh/2,) or per token (N, Dh/2), and what cos and sin are multiplied by.

    spans: (N,), how long each token's document is by now; only dynamic scaling depends on it, and only past
    max_position_embeddings.
    """
    scaling, Dh, theta = config.rope_scaling or {}, config.head_dim, config.rope_theta
    powers = torch.arange(0, Dh, 2, device=spans.device).float() / Dh                                     # (Dh/2,)
    plain, kind, factor = 1.0 / theta**powers, scaling.get("rope_type"), scaling.get("factor", 1.0)       # (Dh/2,)
    if kind == "linear":                                               # positions pressed together
        return plain / factor, 1.0
    if kind == "dynamic":                                              # the base grows with the text (NTK-aware)
        grown = spans.float().clamp(min=config.max_position_embeddings) / config.max_position_embeddings  # (N,)
        bases = theta * (factor * grown - (factor - 1)) ** (Dh / max(Dh - 2, 1))                          # (N,)
        return 1.0 / bases[:, None] ** powers, 1.0                                                        # (N, Dh/2)
    if kind == "llama3":                                               # slow frequencies pressed, fast ones kept
        turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)                       # (Dh/2,)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)                                                 # (Dh/2,)
        return (1 - keep) * plain / factor + keep * plain, 1.0
    if kind == "yarn":                                                 # Peng et al. 2023, arXiv 2309.00071, Section 3
        keep = 1 - yarn_ramp(config, spans.device)                                                        # (Dh/2,)
        return (1 - keep) * plain / factor + keep * plain, yarn_strength(scaling)
    return plain, 1.0


def yarn_ramp(config: ModelConfig, device: torch.device) -> Tensor:
    """(Dh/2,): 0 for frequencies that turn beta_fast times and more within the original length, 1 below beta_slow."""
    scaling, Dh = config.rope_scaling, config.head_dim

    def place(turns):                                                  # the index whose frequency makes so many turns
        length = scaling["original_max_position_embeddings"]
        return Dh * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
    low, high = place(scaling.get("beta_fast") or 32), place(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, Dh - 1)
    high += 0.001 if low == high else 0
    return ((torch.arange(Dh // 2, device=device).float() - low) / (high - low)).clamp(0, 1)


def yarn_strength(scaling: dict) -> float:
    """YaRN's factor on cos and sin, which sharpens attention over longer texts: 0.1 ln(factor) + 1 unless given."""
    def strength(weight):
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return strength(scaling["mscale"]) / strength(scaling["mscale_all_dim"])
    return strength(1.0)


def rope_tables(config: ModelConfig, position_ids: Tensor, spans: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, both (N, 1, Dh), of positions (N,) in documents of lengths spans (N,); in float32, then cast."""
    frequencies, strength = rope_frequencies(config, spans)
    angles = position_ids.float()[:, None] * frequencies                                                  # (N, Dh/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]                                                 # (N, 1, Dh)
    return (angles.cos() * strength).to(dtype), (angles.sin() * strength).to(dtype)


def rotate(x: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + Dh/2}) of x (N, H, Dh). Meta's own files pair (x_2i, x_{2i+1}) instead."""
    left, right = x.chunk(2, dim=-1)                                   # (N, H, Dh/2) each
    return x * rope_cos + torch.cat([-right, left], dim=-1) * rope_sin


def only(x: Tensor, rows: Tensor | None) -> Tensor:
    """The given rows of x, or all."""
    return x if rows is None else x.index_select(0, rows)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.dim, q_dim, bias=config.attention_bias)
        self.k_proj = Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.v_proj = Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.o_proj = Linear(q_dim, config.dim, bias=config.attention_bias)

    def forward(self, x: Tensor, attend: Callable, rope_cos: Tensor, rope_sin: Tensor, rows: Tensor | None = None) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))          # (N, H, Dh)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))          # (N, K, Dh)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))          # (N, K, Dh)
        q, k = rotate(q, rope_cos, rope_sin), rotate(k, rope_cos, rope_sin)
        return self.o_proj(only(attend(self.layer, q, k, v).flatten(1), rows))           # (N, H, Dh) -> (N or M, D)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.dim, config.hidden_dim, bias=config.mlp_bias)
        self.up_proj = Linear(config.dim, config.hidden_dim, bias=config.mlp_bias)
        self.down_proj = Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps these two for the backward pass and nothing in between. (N, F), (N, F) -> (N, F)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Callable, rope_cos: Tensor, rope_sin: Tensor, rows: Tensor | None = None) -> Tensor:
        """(N, D) -> (N, D), or (M, D) where only `rows` (M,) are wanted: all are attended to, but no others go further."""
        x = only(x, rows) + self.self_attn(self.input_layernorm(x), attend, rope_cos, rope_sin, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---------------------------------------------------------------------------------------------------------------
# Weights in 8 and 4 bits


def to_int8(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows as 127ths of their largest number: (n, in) -> int8 codes (n, in), scales (n, 1) in `dtype`."""
    scales = (weight.float().abs().amax(1, keepdim=True) / 127).to(dtype)                # rounded before it is used
    return (weight.float() / scales.float()).nan_to_num().round().clamp(-127, 127).to(torch.int8), scales


def from_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_int8`, (n, in) in `dtype`."""
    return codes.to(dtype) * scales.to(dtype)


NF4_BLOCK = 64


@functools.cache
def nf4_levels(device: torch.device | str = "cpu") -> Tensor:
    """The 16 numbers of NF4, (16,): quantiles of a normal distribution scaled to [-1, 1], with an exact 0.

    Dettmers et al. 2023 (arXiv 2305.14314), Section 3: 8 levels from below, 9 from above, 0 counted once; the outermost
    quantile is midway between those of 16 and 15 equal shares of the distribution.
    """
    outer = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(outer, 0.5, 9, dtype=torch.float64)[:-1])                 # (8,)
    below = -torch.special.ndtri(torch.linspace(outer, 0.5, 8, dtype=torch.float64)[:-1])                # (7,)
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values                # (16,)
    return (levels / levels.max()).float().to(device)


def to_nf4(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Blocks of 64 as levels of their largest number: (n, in) -> codes (n, ceil(in / 64) * 32), two a byte, scales (n, blocks)."""
    levels = nf4_levels(weight.device)
    blocks = F.pad(weight.float(), (0, -weight.shape[1] % NF4_BLOCK)).unflatten(1, (-1, NF4_BLOCK))       # (n, blocks, 64)
    scales = blocks.abs().amax(-1).to(dtype)                                                             # (n, blocks)
    share = (blocks / scales.float()[..., None]).nan_to_num()                                            # a block of zeros
    codes = torch.bucketize(share, (levels[1:] + levels[:-1]) / 2).flatten(1).to(torch.uint8)            # (n, in): nearest
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


def from_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_nf4`, (n, blocks * 64) in `dtype`."""
    levels = nf4_levels(codes.device).to(dtype)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)                        # (256, 2) by byte
    values = F.embedding(codes.int(), pairs)                                                             # (n, bytes, 2)
    return (values.view(len(codes), -1, NF4_BLOCK) * scales.to(dtype)[..., None]).flatten(1)


# name: (encode, decode, type of a code, codes per row, scales per row)
QUANTIZERS = {
    "int8": (to_int8, from_int8, torch.int8, lambda width: width, lambda width: 1),
    "nf4": (to_nf4, from_nf4, torch.uint8, lambda width: -(-width // NF4_BLOCK) * NF4_BLOCK // 2, lambda width: -(-width // NF4_BLOCK)),
}


class QuantLinear(nn.Module):
    """A frozen linear whose weight is kept in int8 or NF4 and made anew for each product. (..., in) -> (..., out).

    The backward pass makes it once more, so that no full-precision weight outlives its layer: a LoRALinear around this
    trains in the memory of the codes. The error is that of the weight; products run in x's type.
    """

    def __init__(self, in_features: int, out_features: int, kind: str, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        _, _, code_type, n_codes, n_scales = QUANTIZERS[kind]
        self.in_features, self.out_features, self.kind, self.bias = in_features, out_features, kind, None
        self.register_buffer("codes", torch.empty(out_features, n_codes(in_features), dtype=code_type, device=device))
        self.register_buffer("scales", torch.empty(out_features, n_scales(in_features), dtype=dtype, device=device))

    def encode_rows(self, rows: slice, weight: Tensor) -> None:
        """Quantise `weight` (n, in) into the given rows."""
        self.codes[rows], self.scales[rows] = QUANTIZERS[self.kind][0](weight.to(self.codes.device), self.scales.dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, (out, in)."""
        return QUANTIZERS[self.kind][1](self.codes, self.scales, dtype)[:, :self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "int8" and x.dtype == torch.bfloat16 and x.device.type == "cpu" and 0 < x[..., 0].numel() <= 16 and not x.requires_grad and (
                self.in_features % 16 == 0):                                             # other widths crash the kernel
            rows = x.reshape(-1, x.shape[-1])                                            # a few rows: the codes are read as they are
            out = torch._weight_int8pack_mm(rows, self.codes, self.scales.flatten()).view(*x.shape[:-1], -1)
        else:
            out = FrozenProduct.apply(x, self)
        return out if self.bias is None else out + self.bias


class FrozenProduct(torch.autograd.Function):
    """x W^T for a W that gets no gradient and is not kept for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: QuantLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.linear.dequantize(grad.dtype), None


# ---------------------------------------------------------------------------------------------------------------
# Who attends to whom


def on_gpu(device: torch.device | str) -> bool:
    """Whether a device is an NVIDIA GPU, or an AMD one under the same name."""
    return torch.device(device).type == "cuda"


def put(x: Tensor, device: torch.device | str) -> Tensor:
    """x, which lies in the CPU's memory, on `device`; to a GPU from pinned memory, so that nobody waits for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if on_gpu(device) else x.to(device)


def right_padded(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Lay documents out as rows: where each place's token lies in the flat row, (B, T), and whether it is real, (B, T).

    Padding repeats the row's last token.
    """
    columns = torch.arange(int(lengths.max()))                                           # (T,)
    return starts[:, None] + torch.minimum(columns, (lengths[:, None] - 1).clamp(min=0)), columns < lengths[:, None]


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along the first dimension."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


class LayOut(torch.autograd.Function):
    """Tokens (N, ...) to padded places (P, ...); the way back is another selection, since padding gets no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class LayBack(torch.autograd.Function):
    """Padded places (P, ...) to tokens (N, ...)."""

    @staticmethod
    def forward(ctx, x: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.places = x.shape
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.places).index_copy_(0, *ctx.saved_tensors, grad), None


def similar_lengths(lengths: Tensor, ratio: float = 0.75) -> Iterator[Tensor]:
    """Split documents (B,) into groups whose shortest is at least `ratio` of their longest; yields indices."""
    order, begin = lengths.argsort(descending=True, stable=True), 0
    for end in range(1, len(order) + 1):
        if end == len(order) or lengths[order[end]] < ratio * lengths[order[begin]]:
            yield order[begin:end].sort().values
            begin = end


def laid_out(lengths: Tensor, device: torch.device | str) -> tuple[list[torch.Size], Tensor | None, Tensor]:
    """Documents of lengths (B,), on the CPU and end to end, as padded rows of similar length.

    Returns the shapes (rows, width) of the groups, the token at each of their P places, (P,), and the place of each token,
    (N,). Where nothing moves, the places are None.
    """
    starts, offset, places, shapes = lengths.cumsum(0) - lengths, 0, [], []
    inverse = torch.empty(int(lengths.sum()), dtype=torch.long)
    for group in similar_lengths(lengths):
        index, real = right_padded(starts[group], lengths[group])                        # (B, T)
        inverse[index[real]] = offset + real.flatten().nonzero().squeeze(1)
        offset += index.numel()
        places.append(index.flatten())
        shapes.append(index.shape)
    return shapes, None if len(shapes) <= 1 and offset == len(inverse) else put(torch.cat(places), device), put(inverse, device)


class Segments:
    """Causal attention by torch's varlen_attn, without padding: on a GPU, in 16 bits.

    segments: [(where its stem begins, tokens of its stem, own tokens)], whose own tokens lie end to end in the flat row. Each
    sees its stem, which lies elsewhere in the row, and itself: varlen_attn aligns the causal mask with the last key.
    """

    def __init__(self, segments: list[tuple[int, int, int]], device: torch.device | str):
        begins, stems, sizes = torch.tensor(segments).unbind(1)                          # (B,) each
        ends = [F.pad(lengths.cumsum(0), (1, 0)).int() for lengths in (sizes, stems + sizes)]        # (B + 1,) each, of queries and keys
        self.ends, self.longest = [put(x, device) for x in ends], [int(sizes.max()), int((stems + sizes).max())]
        own = zip(begins.tolist(), stems.tolist(), ends[0].tolist(), sizes.tolist())
        self.keys = put(torch.cat([torch.cat([torch.arange(begin, begin + stem), torch.arange(start, start + size)])
                                   for begin, stem, start, size in own]), device) if stems.any() else None       # the flat tokens that are keys

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, Dh), k and v (N, K, Dh) -> (N, H, Dh)."""
        k, v = only(k, self.keys), only(v, self.keys)
        return varlen_attn(q.to(v.dtype), k.to(v.dtype), v, *self.ends, *self.longest, window_size=(-1, 0), enable_gqa=True)

    @staticmethod
    def serve(v: Tensor) -> bool:
        """Whether v (N, K, Dh) is what varlen_attn takes; its causal mask is known for NVIDIA's GPUs only."""
        return (on_gpu(v.device) and v.dtype in (torch.float16, torch.bfloat16) and v.shape[-1] % 8 == 0 and v.shape[-1] <= 128
                and torch.cuda.get_device_capability(v.device) >= (8, 0) and not torch.version.hip)


class Packed:
    """Causal attention inside each of the documents that lie end to end in the flat row.

    Documents of similar length are attended to together, right-padded; causality hides the padding, so there is no
    mask. All indices are made once, when they are first needed, and serve every layer; with gradients, too, wherever that was.
    """

    before = None                                                                        # each token follows the one to its left

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu"):
        size = torch.tensor(lengths, dtype=torch.long)                                   # (B,)
        if (size < 1).any():
            raise ValueError(f"document lengths must be at least 1, found {int(size.min())}.")
        starts = size.cumsum(0) - size                                                   # (B,)
        position_ids = torch.arange(int(size.sum())) - starts.repeat_interleave(size)    # (N,)
        self.lengths, self.device = size, device
        self.spans = put(size.repeat_interleave(size), device)                           # (N,) length of its document
        self.position_ids = put(position_ids, device)                                    # (N,)

    @functools.cached_property
    @torch.inference_mode(False)
    def segments(self) -> Segments:
        return Segments([(0, 0, size) for size in self.lengths.tolist()], self.device)

    @functools.cached_property
    @torch.inference_mode(False)
    def rows(self) -> tuple[list[torch.Size], Tensor | None, Tensor]:
        return laid_out(self.lengths, self.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, Dh), k and v (N, K, Dh) -> (N, H, Dh)."""
        if not len(q):
            return q
        if Segments.serve(v):
            return self.segments(q, k, v)
        shapes, index, inverse = self.rows
        parts = zip(*(as_rows(x, shapes, index, inverse) for x in (q, k, v)))
        return as_tokens([causal(*part) for part in parts], index, inverse)


def as_rows(x: Tensor, shapes: list[torch.Size], index: Tensor | None, inverse: Tensor) -> list[Tensor]:
    """Tokens (N, H, Dh) in the padded groups that `laid_out` has made: (B, T, H, Dh) each."""
    x = x if index is None else LayOut.apply(x, index, inverse)                          # (P, H, Dh)
    return [part.unflatten(0, shape) for part, shape in zip(x.split([shape.numel() for shape in shapes]), shapes)]


def as_tokens(groups: list[Tensor], index: Tensor | None, inverse: Tensor) -> Tensor:
    """The way back: (B * T, H, Dh) each -> (N, H, Dh)."""
    return groups[0] if index is None else LayBack.apply(torch.cat(groups), inverse)


def attention(trees: list[tuple[int, list[int]]], device: torch.device | str = "cpu") -> "Packed | Branched":
    """The closure for documents that share their beginnings, or for those that share nothing: (length, []) each."""
    return Branched(trees, device) if any(branches for _, branches in trees) else Packed([stem for stem, _ in trees], device)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, T, H, Dh), k and v (B, T, K, Dh) -> (B * T, H, Dh)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                     # (B, H or K, T, Dh)
    if in_pieces(q, k):
        rows, group = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3), q.shape[1] // k.shape[1]       # (B, K, H/K * T, Dh): heads that share keys are more queries
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().repeat(group, 1)          # (H/K * T, T)
        out = pieces(rows, k, v, seen).view(q.shape)                                     # (B, H, T, Dh)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def in_pieces(q: Tensor, k: Tensor) -> bool:
    """Whether attention of q (B, H, T, Dh) over k (B, K, S, Dh) is quicker by `pieces`: in bfloat16 on a CPU, while its weights are few."""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[:3].numel() * k.shape[2] <= 2**24


def pieces(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention as two products with the weights written down between them. q (B, K, T, Dh), k and v (B, K, S, Dh), seen (T, S) -> (B, K, T, Dh)."""
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, float("-inf"))      # (T, S)
    scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=q.shape[-1] ** -0.5)           # (B * K, T, S)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(q.shape)


class Branched:
    """Causal attention in documents that share their beginnings: each tree is a stem, then branches that see it and themselves.

    trees: [(tokens of the stem, [tokens of each branch])]; the flat row holds each stem and behind it its branches. A
    branch's positions go on from its stem's, so that it is computed as if it stood behind a copy of the stem (but for dynamic
    RoPE past the original length, where a stem turns as a text of its own).
    """

    def __init__(self, trees: list[tuple[int, list[int]]], device: torch.device | str = "cpu"):
        self.trees, self.device = trees, device
        self.sizes = [size for stem, branches in trees for size in (stem, sum(branches))]
        self.stems = Packed([stem for stem, _ in trees], device)
        places, spans, before, start = [], [], [], 0
        for stem, branches in trees:
            length = torch.tensor(branches, dtype=torch.long)
            own = torch.cat([torch.arange(size) for size in branches]) if branches else length
            places += [torch.arange(stem), stem + own]
            spans += [torch.full((stem,), stem), (stem + length).repeat_interleave(length)]
            back = torch.arange(start + stem, start + stem + len(own)) - 1               # the token before, ...
            back[own == 0] = start + stem - 1                                            # ... for a branch's first the stem's last
            before += [torch.arange(start, start + stem) - 1, back]
            start += stem + len(own)
        self.position_ids, self.spans = put(torch.cat(places), device), put(torch.cat(spans), device)        # (N,) each
        self.before = torch.cat(before)                                                  # (N,), on the CPU: what each token follows

    @functools.cached_property
    @torch.inference_mode(False)
    def segments(self) -> Segments:
        found, start = [], 0
        for stem, branches in self.trees:
            found += [(0, 0, stem)] + [(start, stem, size) for size in branches]
            start += stem + sum(branches)
        return Segments(found, self.device)

    @functools.cached_property
    @torch.inference_mode(False)
    def branches(self) -> list[tuple]:
        """For each tree its branches as padded rows (`laid_out`), and for each width T what is seen, (T, stem + T)."""
        found = []
        for stem, branches in self.trees:
            shapes, index, inverse = laid_out(torch.tensor(branches, dtype=torch.long), self.device)
            masks = [torch.arange(stem + T) <= stem + torch.arange(T)[:, None] for _, T in shapes]
            found.append((shapes, index, inverse, [put(mask, self.device) for mask in masks]))
        return found

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, Dh), k and v (N, K, Dh) -> (N, H, Dh)."""
        if Segments.serve(v):
            return self.segments(q, k, v)
        q, k, v = (x.split(self.sizes) for x in (q, k, v))
        stems = self.stems(layer, *(torch.cat(x[::2]) for x in (q, k, v))).split(self.sizes[::2])
        out = []
        for tree, (stem, (shapes, index, inverse, masks)) in enumerate(zip(stems, self.branches)):
            out.append(stem)
            if shapes:
                own = zip(*(as_rows(x[2 * tree + 1], shapes, index, inverse) for x in (q, k, v)), masks)
                out.append(as_tokens([self.branch(*part, k[2 * tree], v[2 * tree]) for part in own], index, inverse))
        return torch.cat(out)

    @staticmethod
    def branch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, stem_k: Tensor, stem_v: Tensor) -> Tensor:
        """Branches of one tree over the stem and themselves: q (n, T, H, Dh), k and v (n, T, K, Dh), stem (S, K, Dh) -> (n * T, H, Dh)."""
        (n, T), K = q.shape[:2], k.shape[2]
        q = q.unflatten(2, (K, -1)).transpose(1, 2).flatten(2, 3)      # (n, K, T * H/K, Dh): heads that share keys are more queries
        k, v = (torch.cat([stem.expand(n, -1, -1, -1), own], dim=1).transpose(1, 2)
                for stem, own in ((stem_k, k), (stem_v, v)))                             # (n, K, S + T, Dh)
        mask = mask.repeat_interleave(q.shape[2] // T, dim=0)                            # (T * H/K, S + T)
        out = pieces(q, k, v, mask) if in_pieces(q, k) else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)        # (n, K, T * H/K, Dh)
        return out.unflatten(2, (T, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


class KVCache:
    """Keys and values of B rows: k[layer] and v[layer] are (B, K, S, Dh); lengths (B,), on the CPU, says how many of the S places are filled.

    Make one, and give it to `Llama.forward` as often as there are new tokens. To fork rows, `select` them. A layer's tensors
    are its own: a compiled step that writes to a part of one larger tensor would copy all of it.
    """

    def __init__(self, config: ModelConfig, batch: int, max_len: int, dtype: torch.dtype, device: torch.device | str):
        self.config, self.max_len, self.dtype, self.device = config, max_len, dtype, device
        shape = (batch, config.n_kv_heads, max_len, config.head_dim)
        self.k, self.v = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)] for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.long)

    def select(self, rows: list[int], max_len: int | None = None) -> "KVCache":
        """A copy of the given rows in their order, repeated as asked, with room for max_len (default: as here)."""
        index = torch.tensor(rows, dtype=torch.long)
        copy = KVCache(self.config, len(rows), max_len or self.max_len, self.dtype, self.device)
        copy.lengths = self.lengths[index]
        used = max(copy.lengths.tolist(), default=0)
        for new, old in zip(copy.k + copy.v, self.k + self.v):
            new[:, :, :used] = old[index.to(self.device), :, :used]
        return copy

    def move(self, source: int, target: int) -> None:
        """Overwrite row `target` with row `source`, and empty `source`."""
        used = int(self.lengths[source])
        for layer in self.k + self.v:
            layer[target, :, :used] = layer[source, :, :used]
        self.lengths[target], self.lengths[source] = used, 0


class Cached:
    """Append counts[b] new tokens to row b of a cache; each attends to its row's cache up to itself.

    The flat row holds row 0's new tokens, then row 1's, and so on; a count may be 0. The tokens' places are taken when
    this object is made, so make one per forward pass. Rows that were empty are attended to as packed documents.
    """

    def __init__(self, kv_cache: KVCache, counts: list[int]):
        size, before, device = torch.tensor(counts), kv_cache.lengths.clone(), kv_cache.device
        if len(size) != len(before):
            raise ValueError(f"the cache has {len(before)} rows, the batch {len(size)}; they must be the same.")
        n_keys = int((before + size).max())
        if n_keys > kv_cache.max_len:
            raise ValueError(f"the cache has room for {kv_cache.max_len} tokens a row, {n_keys} are needed; make it "
                             "with a larger max_len.")
        kv_cache.lengths += size
        starts = size.cumsum(0) - size                                                   # (B,)
        rows = torch.arange(len(size)).repeat_interleave(size)                           # (N,)
        positions = torch.arange(len(rows)) - starts[rows] + before[rows]                # (N,)
        self.cache, self.rows, self.position_ids = kv_cache, put(rows, device), put(positions, device)
        self.spans = put((before + size)[rows], device)                                  # (N,) length by now
        used = size > 0
        self.packed = None if before[used].any() else Packed(size[used].tolist(), device)
        if self.packed is None:
            n_rows = int(rows.max()) + 1                                                 # idle rows at the end: cut
            index, real = right_padded(starts[:n_rows], size[:n_rows])                   # (B, T)
            places = positions[index.clamp(max=len(rows) - 1)]                           # (B, T)
            mask = torch.arange(n_keys) <= places[:, :, None]                            # (B, T, S)
            group = kv_cache.config.n_heads // kv_cache.config.n_kv_heads
            self.mask = None if mask.all() else put(mask.repeat_interleave(group, dim=1)[:, None], device)   # (B, 1, T * H/K, S)
            self.shape, self.n_keys, plain = index.shape, n_keys, bool(real.all())
            self.index = None if plain else put(index, device)                           # (B, T)
            self.inverse = None if plain else put(real.flatten().nonzero().squeeze(1), device)       # (N,)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, Dh), k and v (N, K, Dh) -> (N, H, Dh)."""
        self.cache.k[layer][self.rows, :, self.position_ids] = k.detach()
        self.cache.v[layer][self.rows, :, self.position_ids] = v.detach()
        if self.packed is not None:
            return self.packed(layer, q, k, v)
        (B, T), S = self.shape, self.n_keys
        k, v = self.cache.k[layer][:B, :, :S], self.cache.v[layer][:B, :, :S]            # (B, K, S, Dh)
        q = q.unflatten(0, (B, T)) if self.index is None else take(q, self.index)        # (B, T, H, Dh)
        q = q.unflatten(2, (k.shape[1], -1)).transpose(1, 2).flatten(2, 3)            # (B, K, T * H/K, Dh): heads that share keys become more queries
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)               # (B, K, T * H/K, Dh)
        out = out.unflatten(2, (T, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)      # (B * T, H, Dh)
        return out if self.inverse is None else take(out, self.inverse)


class Step:
    """One more token for each of a cache's first B rows, idle ones too, which sees the row's places up to its own.

    position_ids (B,) says where; all lie in the first n_keys places. `even` promises that they are alike, n_keys - 1.
    """

    def __init__(self, kv_cache: KVCache, position_ids: Tensor, n_keys: int, even: bool = False):
        self.cache, self.position_ids, self.spans, self.n_keys = kv_cache, position_ids, position_ids + 1, n_keys        # (B,) each
        self.rows = torch.arange(len(position_ids), device=position_ids.device)
        places = torch.arange(n_keys, device=position_ids.device)                        # (S,)
        self.mask = None if even else (places <= position_ids[:, None])[:, None, None]   # (B, 1, 1, S)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, Dh), k and v (B, K, Dh) -> (B, H, Dh)."""
        self.cache.k[layer][self.rows, :, self.position_ids] = k
        self.cache.v[layer][self.rows, :, self.position_ids] = v
        q = q.unflatten(1, (k.shape[1], -1))                                             # (B, K, H/K, Dh)
        k, v = (x[:len(q), :, :self.n_keys] for x in (self.cache.k[layer], self.cache.v[layer]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).flatten(1, 2)


class Prefill:
    """Read prompts into empty rows of a cache, from row `first` on; what prompts share at their beginning is read once.

    Give `hidden` these `input_ids`, (N,); its states at `last`, (B,), are those of the prompts' last tokens.
    """

    def __init__(self, kv_cache: KVCache, prompts: list[list[int]], first: int):
        ids, trees, rows, places, source, last, device = [], [], [], [], [], {}, kv_cache.device
        scaling = kv_cache.config.rope_scaling or {}
        alone = scaling.get("rope_type") == "dynamic" and max(map(len, prompts)) > kv_cache.config.max_position_embeddings
        for stem, members in [(len(prompt), [k]) for k, prompt in enumerate(prompts)] if alone else shared_prompts(prompts):
            begin = len(ids)
            ids += prompts[members[0]][:stem]
            for member in members:
                own, size = len(ids), len(prompts[member])
                ids += prompts[member][stem:]
                source += [*range(begin, begin + stem), *range(own, len(ids))]           # the flat tokens that fill this row
                rows += [first + member] * size
                places += range(size)
                last[member] = len(ids) - 1
                kv_cache.lengths[first + member] = size
            trees.append((stem, [len(prompts[member]) - stem for member in members] if len(members) > 1 else []))
        self.cache, self.attend = kv_cache, attention(trees, device)
        self.position_ids, self.spans = self.attend.position_ids, self.attend.spans
        self.input_ids, self.rows, self.places, self.source = (put(torch.tensor(x), device) for x in (ids, rows, places, source))
        self.last = put(torch.tensor([last[member] for member in range(len(prompts))]), device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, Dh), k and v (N, K, Dh) -> (N, H, Dh)."""
        self.cache.k[layer][self.rows, :, self.places] = k[self.source]
        self.cache.v[layer][self.rows, :, self.places] = v[self.source]
        return self.attend(layer, q, k, v)


def shared_prompts(prompts: list[list[int]]) -> list[tuple[int, list[int]]]:
    """Prompts in groups that begin alike: (tokens they share, their indices); each keeps at least its last token to itself.

    Neighbours in alphabetical order, for as long as one more member saves tokens. A group of one shares all of itself.
    """
    groups, order = [], sorted(range(len(prompts)), key=prompts.__getitem__)
    for member in order:
        ids = prompts[member]
        if groups:
            stem, members = groups[-1]
            other = prompts[members[0]]
            most = min(len(ids), len(other)) - 1 if len(members) == 1 else min(len(ids) - 1, stem)
            same = next((i for i in range(most) if ids[i] != other[i]), most)
            if same >= SHORTEST_SHARED and len(members) * same >= (len(members) - 1) * stem:
                groups[-1] = (same, [*members, member])
                continue
        groups.append((len(ids), [member]))
    return groups


# ---------------------------------------------------------------------------------------------------------------
# The model


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class Llama(nn.Module):
    """LLaMA with a language-model head. `Llama(config).init_weights(seed)` is a fresh one, `load_model` a trained one.

    Set `checkpointing = True` to recompute each block in the backward pass instead of keeping its activations, `compiling =
    True` to have `generate` compile its one-token step.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpointing, self.compiling = config, False, False
        self.model = Decoder(config)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Llama":
        """Matrices normal(0, 0.02), biases 0, norms 1, from `seed` alone, whatever the device."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                weight.copy_(torch.empty(weight.shape).normal_(0.0, 0.02, generator=generator))
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    def hidden(self, input_ids: Tensor, attend: Callable, position_ids: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Final hidden states, normed, (N, D) of flat input_ids (N,); lm_head turns them into logits.

        rows: (M,) indices into (N,), repeats allowed: make (M, D), those states only. The last block's MLP sees no others.
        attend: `Packed`, `Branched`, `Cached`, ..., or any callable (layer, q (N, H, Dh), k, v (N, K, Dh)) -> (N, H, Dh).
        position_ids: (N,); by default those of `attend`. Where they are given, all tokens count as one text as long
            as the highest of them, for the sake of dynamic RoPE.
        """
        if position_ids is None or not len(position_ids):
            position_ids, spans = attend.position_ids, attend.spans
        else:
            spans = (position_ids.max() + 1).expand_as(position_ids)
        x = self.model.embed_tokens(input_ids)                                           # (N, D)
        rope_cos, rope_sin = rope_tables(self.config, position_ids, spans, x.dtype)      # (N, 1, Dh) each
        for layer, block in enumerate(self.model.layers, start=1):
            wanted = rows if layer == len(self.model.layers) else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attend, rope_cos, rope_sin, wanted, use_reentrant=False)
            else:
                x = block(x, attend, rope_cos, rope_sin, wanted)
        return self.model.norm(x)

    def forward(self, input_ids: Tensor, *, lengths: list[int] | None = None, attention_mask: Tensor | None = None,
                segment_ids: Tensor | None = None, position_ids: Tensor | None = None,
                kv_cache: KVCache | None = None, logits_at: Tensor | None = None) -> Tensor:
        """Logits of the next token, in the dtype of the weights.

        Args:
            input_ids: (B, T) rows, or (N,) documents laid end to end.
            lengths: for (N,), the length of each document (default: one document), or, with a cache, the number of new
                tokens of each of its rows.
            attention_mask: (B, T), True = real token; padding left or right, right only with a cache.
            segment_ids: (B, T), 0 = padding; each other value is one document of the row, its positions start at 0.
            position_ids: shape of input_ids; by default counted from 0 in each document, or on from what is cached.
            kv_cache: extended by the new tokens.
            logits_at: (M,) indices into (N,): compute logits there only.
        Returns:
            (B, T, V), zero at padding; or (N, V); or (M, V).
        Raises:
            ValueError: arguments that do not fit together.
        """
        if input_ids.dim() == 1:
            if attention_mask is not None or segment_ids is not None:
                raise ValueError("flat input_ids (N,) take lengths, not attention_mask or segment_ids.")
            lengths = [len(input_ids)] if lengths is None else lengths
            if sum(lengths) != len(input_ids):
                raise ValueError(f"lengths sum to {sum(lengths)}, input_ids have {len(input_ids)} tokens.")
            attend = Packed(lengths, input_ids.device) if kv_cache is None else Cached(kv_cache, lengths)
            rows = None if logits_at is None else logits_at.to(input_ids.device)
            return self.lm_head(self.hidden(input_ids, attend, position_ids, rows))      # (N or M, V)
        if lengths is not None or logits_at is not None:
            raise ValueError("lengths and logits_at go with flat input_ids (N,), not with rows (B, T).")
        real, lengths = documents(input_ids, attention_mask, segment_ids, cached=kv_cache is not None)
        position_ids = None if position_ids is None else position_ids[real]
        logits = self(input_ids[real], lengths=lengths, position_ids=position_ids, kv_cache=kv_cache)    # (N, V)
        if len(logits) == input_ids.numel():
            return logits.view(*input_ids.shape, -1)
        out = logits.new_zeros(*input_ids.shape, logits.shape[-1])                       # (B, T, V)
        out[real] = logits
        return out


def documents(input_ids: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None, *,
              cached: bool) -> tuple[Tensor, list[int]]:
    """Which tokens of the rows (B, T) are real, (B, T), and the lengths of the documents they form, row by row."""
    if attention_mask is not None and segment_ids is not None:
        raise ValueError("give attention_mask or segment_ids, not both.")
    segments = segment_ids if segment_ids is not None else attention_mask
    if segments is None:
        return torch.ones_like(input_ids, dtype=torch.bool), [input_ids.shape[1]] * len(input_ids)
    if segments.shape != input_ids.shape:
        raise ValueError(f"the mask is {tuple(segments.shape)}, input_ids are {tuple(input_ids.shape)}.")
    segments = segments.long()                                                           # (B, T)
    real = segments != 0
    if cached:
        if segment_ids is not None or (real[:, 1:] & ~real[:, :-1]).any():
            raise ValueError("with a kv_cache, rows take an attention_mask with padding on the right only.")
        return real, real.sum(1).tolist()
    before = F.pad(segments, (1, 0))[:, :-1]                                             # (B, T), the token to the left
    first = real & (segments != before)
    rows = torch.arange(len(segments), device=segments.device)[:, None].expand_as(segments)
    names = torch.stack([rows[first], segments[first]], dim=1)                           # (documents, 2)
    unique, times = names.unique(dim=0, return_counts=True)
    if (times > 1).any():
        row, segment = unique[times > 1][0].tolist()
        raise ValueError(f"row {row}: document {segment} is in {int(times[times > 1][0])} pieces; its tokens must be "
                         "contiguous.")
    starts = first[real].nonzero().squeeze(1).tolist()                                   # into the flat row (N,)
    return real, [end - start for start, end in zip(starts, starts[1:] + [int(real.sum())])]


# ---------------------------------------------------------------------------------------------------------------
# Sampling


@dataclass
class Answer:
    """One row of `generate`: its prompt, the most tokens it may get, its own random stream, and what has come out so far."""

    prompt: list[int]
    most: int
    stream: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def generate(model: Llama, prompts: list[list[int]], *, max_new_tokens: int | list[int], temperature: float = 0.0,
             top_p: float = 1.0, top_k: int = 0, eos_ids: tuple[int, ...] | None = None, seed: int | list[int] = 0,
             batch_size: int = 64, progress: Callable[[int], None] | None = None,
             watch: Callable[[list[int]], None] | None = None, return_logprobs: bool = False):
    """Continue prompts until an EOS id (kept as the last element) or max_new_tokens.

    A row's answer depends on its own prompt and seed only: not on its neighbours, nor on batch_size.

    Args:
        prompts: token ids, ragged, none empty.
        max_new_tokens: one number, or one per prompt.
        temperature: 0 takes the most probable token; else top_k (0: off), then top_p (1: off), then a draw.
        eos_ids: by default those of the model's config.
        seed: one int for all (row i draws from (seed, i)), or one int per row.
        progress: called as progress(k) when k more rows are done, so that a tqdm bar's `update` fits.
        watch: called with the tokens of an answer so far whenever it has got one more.
    Returns:
        new token ids per prompt; with return_logprobs a pair (ids, logprobs), the latter of the full distribution at
        temperature 1, as teacher forcing gives them.
    Raises:
        ValueError: a prompt that is empty or leaves no room, a setting out of range, or non-finite logits.
    """
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if not (min(most, default=1) >= 1 and len(most) == len(prompts) and batch_size >= 1 and temperature >= 0 and 0 < top_p <= 1 and top_k >= 0):
        raise ValueError(f"max_new_tokens {max_new_tokens}, batch_size {batch_size}, temperature {temperature}, top_p "
                         f"{top_p}, top_k {top_k}: expected >= 1 (one number, or one per prompt), >= 1, >= 0, in (0, 1] and >= 0.")
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= model.config.context - most[index]:
            raise ValueError(f"prompt {index} has {len(prompt)} tokens; expected 1 to {model.config.context - most[index]}, since the "
                             f"model takes {model.config.context} positions, max_new_tokens {most[index]}.")
    streams = [f"{seed},{index}" for index in range(len(prompts))] if isinstance(seed, int) else list(map(str, seed))
    if len(streams) != len(prompts):
        raise ValueError(f"{len(streams)} seeds for {len(prompts)} prompts; give one int, or one per prompt.")
    answers = [Answer(*row) for row in zip(prompts, most, streams)]
    was_training = model.training
    model.eval()
    try:
        stop = set(model.config.eos_ids if eos_ids is None else eos_ids)
        with prepacked(model, min(batch_size, len(answers))):
            decode(model, answers, (temperature, top_k, top_p), stop, batch_size, progress, watch)
    finally:
        model.train(was_training)
    tokens = [answer.tokens for answer in answers]
    return (tokens, [answer.logprobs for answer in answers]) if return_logprobs else tokens


def uniform(stream: str, step: int) -> float:
    """Number `step` of a random stream, uniform in [0, 1): a hash, so there is no state to carry."""
    return (int.from_bytes(hashlib.sha256(f"{stream},{step}".encode()).digest()[:8], "big") >> 11) / 2**53


def one_token(model: Llama, input_ids: Tensor, kv_cache: KVCache, position_ids: Tensor, n_keys: int, even: bool = False) -> Tensor:
    """Logits (B, V) behind one more token (B,) of a cache's first B rows, at position_ids (B,) among n_keys places."""
    return model.lm_head(model.hidden(input_ids, Step(kv_cache, position_ids, n_keys, even)))


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's graphs are recorded: one for all, since cuBLAS keeps memory for each."""
    return torch.cuda.Stream(device)


class OneToken:
    """`one_token` for the rows that are live, which are a cache's first: compiled if the model says so, on a GPU as CUDA graphs.

    A graph has fixed shapes and memory: one is recorded, where it is first needed, for each power of two of rows and of
    GRAPH_KEYS places (compiled: only for all of both), and replayed with what `input_ids` and `position_ids` hold. All go
    together, when this object does: cuBLAS's memory for the stream they were recorded on goes with the first.
    """

    def __init__(self, model: Llama, kv_cache: KVCache):
        self.model, self.cache, self.graphs, self.pool = model, kv_cache, {}, None
        self.run = torch.compile(one_token, dynamic=False) if model.compiling else one_token
        self.input_ids, self.position_ids = (torch.zeros(len(kv_cache.lengths), dtype=torch.long, device=kv_cache.device) for _ in range(2))

    def __call__(self, tokens: list[int]) -> Tensor:
        """Append a token to each of the first rows; logits (len(tokens), V) of the next, which hold until the next call."""
        cache, live, (rows, n_keys) = self.cache, len(tokens), self.shape(len(tokens))
        self.input_ids[:live], self.position_ids[:rows] = put(torch.tensor(tokens), cache.device), put(cache.lengths[:rows], cache.device)
        even = (rows, n_keys) == (live, int(cache.lengths[:live].min()) + 1) and not self.model.compiling
        inputs = self.model, self.input_ids[:rows], cache, self.position_ids[:rows], n_keys
        cache.lengths[:live] += 1
        return self.replay(*inputs)[:live] if on_gpu(cache.device) else self.run(*inputs, even)[:live]

    def shape(self, live: int) -> tuple[int, int]:
        """How many rows and places a step takes."""
        longest = int(self.cache.lengths[:live].max()) + 1
        if self.model.compiling:
            return len(self.cache.lengths), self.cache.max_len
        if on_gpu(self.cache.device):
            return (min(len(self.cache.lengths), 1 << (live - 1).bit_length()),
                    min(self.cache.max_len, GRAPH_KEYS << (-(-longest // GRAPH_KEYS) - 1).bit_length()))
        return live, longest

    def replay(self, *inputs) -> Tensor:
        """self.run(*inputs) by the graph for these shapes."""
        shape = len(inputs[1]), inputs[-1]                           # rows, places
        if shape not in self.graphs:
            with torch.cuda.device(self.input_ids.device):
                self.graphs[shape] = self.record(*inputs)
        graph, logits = self.graphs[shape]
        graph.replay()
        return logits

    def record(self, *inputs) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of self.run(*inputs), and where it leaves the logits. The graphs share what memory they work in."""
        aside = recording_stream(self.input_ids.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):                               # what is made at a first call is made now: kernels, workspaces, compiled code
            for _ in range(2):
                self.run(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=aside, capture_error_mode="thread_local"):       # other threads may go on
            logits = self.run(*inputs)
        self.pool = graph.pool()
        return graph, logits


@torch.inference_mode()
def decode(model: Llama, answers: list[Answer], how: tuple, eos_ids: set[int], batch_size: int,
           progress: Callable[[int], None] | None, watch: Callable[[list[int]], None] | None) -> None:
    """Fill in the answers. Live rows stay in front of a static cache; a quarter of free slots is refilled at once."""
    if not answers:
        return
    weight = model.model.embed_tokens.weight
    slots = min(batch_size, len(answers))
    max_len = max(len(answer.prompt) + answer.most for answer in answers)
    if model.compiling:                                                                  # few shapes: each is compiled anew
        slots, max_len = min(batch_size, 1 << (slots - 1).bit_length()), min(model.config.context, -(-max_len // 256) * 256)
    cache = KVCache(model.config, slots, max_len, weight.dtype, weight.device)
    step = OneToken(model, cache)
    waiting = sorted(answers, key=lambda answer: (len(answer.prompt), answer.prompt))    # longest last, taken first
    live: list[Answer] = []                                                              # live[i] has the cache's row i
    while waiting or live:
        begin = 0                                                                        # rows [begin, live) move on
        if waiting and 4 * len(live) <= 3 * slots:
            begin, room = len(live), PREFILL_TOKENS
            while waiting and len(live) < slots and (len(live) == begin or len(waiting[-1].prompt) <= room):
                live.append(waiting.pop())
                room -= len(live[-1].prompt)
        moving = live[begin:]
        if not moving[0].tokens:
            prompts = Prefill(cache, [answer.prompt for answer in moving], begin)
            logits = model.lm_head(model.hidden(prompts.input_ids, prompts, rows=prompts.last))        # (B, V)
        else:
            logits = step([answer.tokens[-1] for answer in moving])
        draws = torch.tensor([uniform(answer.stream, len(answer.tokens)) for answer in moving], dtype=torch.float64)
        chosen, logprobs = sample(logits.float(), put(draws, weight.device), *how)
        for answer, token, logprob in zip(moving, chosen.tolist(), logprobs.tolist()):
            answer.tokens.append(token)
            answer.logprobs.append(logprob)
            if watch is not None:
                watch(answer.tokens)
        was_live = len(live)
        for slot in reversed(range(begin, was_live)):
            if live[slot].tokens[-1] in eos_ids or len(live[slot].tokens) == live[slot].most:
                cache.move(len(live) - 1, slot)                                          # the last row fills the hole
                live[slot] = live[-1]
                live.pop()
        if progress is not None and len(live) < was_live:
            progress(was_live - len(live))


def sample(logits: Tensor, draws: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """One id per row by inverse CDF. logits (B, V) float32, draws (B,) float64 -> ids (B,), logprobs (B,)."""
    normalizer = logits.logsumexp(-1)                                                    # (B,)
    if temperature == 0:
        ids = logits.argmax(-1, keepdim=True)                                            # (B, 1)
    else:
        scaled = logits if temperature == 1 else (logits - logits.amax(-1, keepdim=True)) / temperature
        probs = scaled.softmax(-1)                                                       # (B, V)
        order = None
        if top_k or top_p < 1:
            probs, order = probs.topk(min(top_k or probs.shape[-1], probs.shape[-1]))    # (B, k), falling
            probs = probs / probs.sum(-1, keepdim=True)
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)            # the token that crosses stays
        cdf = probs.cumsum(-1, dtype=torch.float64)
        ids = torch.searchsorted(cdf, draws[:, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[-1] - 1)
        ids = ids if order is None else order.gather(1, ids)                             # (B, 1)
    if not normalizer.isfinite().all():                              # asked last: a GPU has all its work by now
        raise ValueError("the model gave non-finite logits; its weights are broken, or overflow in this dtype.")
    return ids.squeeze(1), logits.gather(1, ids).squeeze(1) - normalizer


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


def load_model(path: str | os.PathLike, *, dtype: torch.dtype | None = torch.float32,
               device: torch.device | str = "cpu", quantize: str = "", shard: Callable[[nn.Module], object] | None = None) -> Llama:
    """Read a folder in Hugging Face format (config.json and *.safetensors, or the older pytorch_model*.bin), or in Meta's
    (params.json and consolidated.*).

    Names and shapes are derived from the config and compared with the files' before anything is allocated; nothing is
    ever unpickled beyond plain tensors; each tensor goes row by row straight into `dtype` on `device`, and its file is let
    go again, so that memory never exceeds the finished model by more than about one tensor.

    Args:
        dtype: of the weights; None leaves each as it is stored.
        quantize: "int8" or "nf4" for the linears of the blocks (QuantLinear), "" for none.
        shard: makes each weight of a model without storage a DTensor; its own rows are all that this process reads and holds.
    Raises:
        ValueError: one sentence that says what is wrong with which file.
    """
    if shard:
        return load_shards(Path(path), dtype, device, shard)
    if quantize and quantize not in QUANTIZERS:
        raise ValueError(f"quantize is {quantize!r:.60}; expected {' or '.join(QUANTIZERS)}.")
    folder = Path(path)
    config = read_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    find = find_tensors if (folder / "config.json").is_file() else find_meta_tensors
    state = {}
    for name, (file, open_tensor) in find(folder, config, shapes).items():
        shape, (stored, read), module = shapes[name], open_tensor(), name.removesuffix(".weight")
        if quantize and ".layers." in name and len(shape) == 2:
            linear = QuantLinear(shape[1], shape[0], quantize, dtype or stored, device)
            linear.bias = model.get_submodule(module).bias           # still without storage; loaded like any other
            model.set_submodule(module, linear)
            fill(linear.encode_rows, read, shape, dtype or stored, name, file, config.head_dim)
        else:
            state[name] = torch.empty(shape, dtype=dtype or stored, device=device)
            fill(state[name].__setitem__, read, shape, dtype or stored, name, file, config.head_dim)
    model.load_state_dict(state, strict=False, assign=True)          # complete by now, but for a tied head
    model.tie_weights()
    return model


def load_shards(folder: Path, dtype: torch.dtype, device: torch.device | str, shard: Callable[[nn.Module], object]) -> Llama:
    """`load_model` where each process holds some rows of every weight, and reads no others."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    config = read_config(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is in Meta's format, of which no rows can be read alone. Convert it with eval.py --export.")
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    found = find_tensors(folder, config, shapes)
    shard(model)
    model.to_empty(device=device).tie_weights()
    for name, weight in model.named_parameters():
        file, open_tensor = found[name]
        (rows, *rest), (begin, *_) = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        (_, read), local = open_tensor(), weight.detach().to_local()
        fill(local.__setitem__, lambda part: read(slice(begin + part.start, begin + part.stop)), (rows, *rest), dtype, name, file, 1)
    return model


def fill(place: Callable[[slice, Tensor], None], read: Callable[[slice], Tensor], shape: tuple, dtype: torch.dtype, name: str,
         file: Path, multiple: int) -> None:
    """place(rows, read(rows)) for all rows, a multiple of `multiple` at a time; all numbers must be finite in `dtype`."""
    step = multiple * max(1, CHUNK_NUMBERS // (multiple * math.prod(shape[1:])))
    broken, limit = 0, torch.finfo(dtype).max
    for begin in range(0, shape[0], step):
        rows = slice(begin, min(begin + step, shape[0]))
        part = read(rows)
        low, high = part.aminmax()                                   # NaN where there is one, and it makes no copy
        if not (low >= -limit and high <= limit):
            broken += int((~(part.abs() <= limit)).sum())
        place(rows, part)
    if broken:
        raise ValueError(f"tensor {name} has {broken} non-finite values ({file}). The checkpoint is "
                         f"broken{', or too large for float16' * (dtype == torch.float16)}.")


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The ModelConfig of a model folder, or of its config.json alone. Raises ValueError where it is missing or unreadable."""
    folder = Path(path)
    file = folder if folder.is_file() else folder / "config.json"
    meta = folder / "params.json"
    if not file.is_file() and not meta.is_file():
        raise ValueError(f"no model at {folder} (no config.json). Give a folder in Hugging Face format: config.json, "
                         "*.safetensors, tokenizer.model; or in Meta's: params.json, consolidated.*.")
    file = file if file.is_file() else meta
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, which is no {file.name}.")
    try:
        return ModelConfig.from_hf(read_json(file)) if file != meta else read_meta_config(folder)
    except ValueError as error:
        said = str(error).removeprefix("config.json: ")
        raise ValueError(said if str(folder) in said else f"{file}: {said}") from None


def one_line(error: Exception) -> str:
    """The beginning of an error text, on one line."""
    return " ".join(str(error).split())[:100]


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises ValueError for anything else."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {one_line(error)}.") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is not a JSON object.")
    return raw


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors preferred; shards are checked to exist and to lie in the folder."""
    stems = ("model.safetensors", "pytorch_model.bin")
    files = [folder / name for stem in stems for name in (stem, stem + ".index.json")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"no weights at {folder} (no {stems[0]}, no {stems[1]}, no index of shards). Give a folder in "
                         "Hugging Face format: config.json, *.safetensors, tokenizer.model.")
    if file.suffix != ".json":
        return [file]
    weight_map = read_json(file).get("weight_map")
    listed = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    names = [*dict.fromkeys(name for name in listed if isinstance(name, str)), *(name for name in listed if not isinstance(name, str))]
    homes = (folder.resolve(), folder.resolve().parent.parent / "blobs")    # links of the Hugging Face cache lead there
    for name in names:
        plain = isinstance(name, str) and re.fullmatch(r"[\w.-]{1,200}\.(safetensors|bin)", name)
        if not plain or (folder / name).resolve().parent not in homes:
            raise ValueError(f"{file} points outside its folder ({json.dumps(name):.80}). Refused; do not trust this "
                             "download.")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing, though {file.name} lists it. Download it again.")
    return [folder / name for name in names]


Rows = Callable[[slice], Tensor]                     # reads some rows of a tensor, valid until the next are read
Source = tuple[Path, Callable[[], tuple[torch.dtype, Rows]]]         # a file, and a function that opens a tensor in it


def find_tensors(folder: Path, config: ModelConfig, expected: dict[str, tuple]) -> dict[str, Source]:
    """Where each expected tensor is. Raises ValueError unless names and shapes are just the expected."""
    sources = {}
    for file in weight_files(folder):
        shapes, open_tensor = open_weights(file)
        for name, shape in shapes.items():
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in expected):
                continue                                             # a buffer of old files; a head that is tied
            if name not in expected or name in sources:
                what = "comes twice" if name in sources else "has no place in the model that config.json describes"
                raise ValueError(f"tensor {name!r:.200} in {file} {what}. The weights and config.json are from "
                                 "different models.")
            if shape != expected[name]:
                raise ValueError(f"tensor {name} is {shape} in {file}, config.json says {expected[name]}. The weights "
                                 "and config.json are from different models.")
            sources[name] = file, functools.partial(open_tensor, name)
    missing = [name for name in expected if name not in sources]
    if missing:
        raise ValueError(f"tensor {missing[0]} is missing from {folder} ({len(missing)} of {len(expected)} are). The "
                         "weights and config.json are from different models.")
    return sources


def open_weights(file: Path) -> tuple[dict[str, tuple], Callable[[str], tuple[torch.dtype, Rows]]]:
    """Shapes by name of a weight file, and a function that opens a tensor: name -> type and reader of rows.

    What is read goes through one small buffer, or, of a .bin, through a mapping of its own for each tensor, since what
    has been read of a mapping counts as used memory until the mapping is gone.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f'{file} is a Git LFS pointer of {size} bytes, not weights. Run "git lfs pull" in that '
                             "folder.")
    try:
        if file.suffix != ".safetensors":
            return {name: tuple(tensor.shape) for name, tensor in read_bin(file).items()}, functools.partial(open_bin_tensor, file)
        handle = safe_open(file, "pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{file} is damaged or incomplete: {one_line(error)}. Download it again (found {size:,} "
                         "bytes).") from None
    for name, piece in slices.items():
        if piece.get_dtype() not in SAFETENSORS_TYPES:
            raise ValueError(f"tensor {name!r:.200} in {file} is {piece.get_dtype()}, expected F32, F16 or BF16.")
    shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
    return shapes, functools.partial(open_safetensor, file, shapes)


def open_bin_tensor(file: Path, name: str) -> tuple[torch.dtype, Rows]:
    """Type and rows of a tensor in a .bin or .pth."""
    tensor = read_bin(file)[name]
    return tensor.dtype, tensor.__getitem__


def open_safetensor(file: Path, shapes: dict[str, tuple], name: str) -> tuple[torch.dtype, Rows]:
    """Type and rows of a tensor in a safetensors file: 8 bytes of length, that much JSON, then data at the offsets it gives.

    `open_weights` has had the whole header checked by the safetensors library before.
    """
    with open(file, "rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(start - 8))[name]
    dtype, (begin, end) = SAFETENSORS_TYPES[entry["dtype"]], entry["data_offsets"]
    width, buffer = (end - begin) // shapes[name][0], bytearray()

    def read(rows: slice) -> Tensor:
        if len(buffer) < (rows.stop - rows.start) * width:
            buffer.extend(bytes((rows.stop - rows.start) * width - len(buffer)))
        view = memoryview(buffer)[:(rows.stop - rows.start) * width]
        with open(file, "rb") as stream:
            stream.seek(start + begin + rows.start * width)
            if stream.readinto(view) != len(view):
                raise ValueError(f"{file} ended while tensor {name} was read. Download it again.")
        return torch.frombuffer(view, dtype=dtype).view(-1, *shapes[name][1:])
    return dtype, read


def read_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a pytorch_model*.bin, memory-mapped, and nothing but plain dense tensors."""
    try:
        with zipfile.ZipFile(file) as archive:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True) if stored else None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(f"{file} contains {found[1] if found else 'an object'}, which is code, not weights. It was "
                         "not loaded. Get a safetensors version of this model.") from None
    except Exception as error:                                       # damaged bytes can make the reader raise anything
        raise RuntimeError(f"{type(error).__name__} {error}") from None
    if not stored:
        raise ValueError(f"{file} is compressed, which torch.save never does. It was not loaded.")
    for name, tensor in tensors.items() if isinstance(tensors, dict) else [("", None)]:
        if not (isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
                and tensor.device.type == "cpu" and tensor.is_floating_point()
                and tensor.nbytes <= tensor.untyped_storage().nbytes()):
            raise ValueError(f"{file}: entry {name!r:.100} is not a plain tensor of floats. It was not loaded.")
        if tensor.dtype not in SAFETENSORS_TYPES.values():
            raise ValueError(f"tensor {name!r:.200} in {file} is {tensor.dtype}, expected float32, float16 or bfloat16.")
    return tensors


# Meta's own layout. Its q and k pair neighbours (x_2i, x_2i+1) where Hugging Face's pair halves (x_i, x_{i + Dh/2}), so
# their rows are in another order; everything else differs in name only. A model of n files is cut for n GPUs: some
# matrices by rows, some by columns, norms not at all.
META_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
              "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
              "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
              "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
META_KEYS = {"dim": "dim", "n_layers": "n_layers", "n_heads": "n_heads", "n_kv_heads": "n_kv_heads", "head_dim": "head_dim",
             "hidden_dim": "hidden_dim", "norm_eps": "norm_eps"}     # of params.json; the last but one is Mistral's


def meta_name(name: str) -> str:
    """What Meta calls the weight that Hugging Face calls `name`."""
    head, _, layer = name.removesuffix(".weight").partition(".layers.")
    number, _, part = layer.partition(".")
    return f"layers.{number}.{META_NAMES[part]}.weight" if layer else f"{META_NAMES[head]}.weight"


def pairs_to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a q or k (heads * Dh, D) from Meta's order into Hugging Face's."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def halves_to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `pairs_to_halves`."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def meta_files(folder: Path) -> list[Path]:
    """consolidated.00.pth, 01, ... or Mistral's consolidated.safetensors; all there, none beside."""
    single = folder / "consolidated.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("consolidated.*.pth"))
    wanted = [folder / f"consolidated.{number:02}.pth" for number in range(len(files))]
    if not files or files not in ([single], wanted):
        raise ValueError(f"{folder} has params.json, but {len(files)} files consolidated.*.pth, numbered with gaps or not at "
                         "all; expected consolidated.00.pth and those that follow. Download the missing ones.")
    return files


def read_meta_config(folder: Path) -> ModelConfig:
    """A ModelConfig from Meta's or Mistral's params.json.

    The vocabulary is often given as -1, so it is read off the weights' shapes. The longest sequence is not given at all:
    4096 where norm_eps is 1e-5 (LLaMA-2), 2048 where it is 1e-6 (LLaMA-1), 16384 with a rope_theta (CodeLlama).
    """
    raw, file = read_json(folder / "params.json"), folder / "params.json"
    ranges = {item.name: (item.default, item.metadata["low"], item.metadata["high"]) for item in hf_fields()}
    try:
        values = {ours: checked(raw, theirs, *ranges[ours]) for theirs, ours in META_KEYS.items()}
        for name in ("dim", "n_layers", "n_heads"):
            if name not in raw:
                raise ValueError(f"{name} is missing")
        if raw.get("moe") or raw.get("use_scaled_rope") or raw.get("quantization_args"):
            raise ValueError("moe, use_scaled_rope and quantization_args are not implemented")
        if "hidden_dim" not in raw:                                  # two thirds of 4 dim, rounded up to a multiple
            multiple = checked(raw, "multiple_of", 256, 1, 2**20)
            wide = int(2 * 4 * values["dim"] / 3)
            wide = int(checked(raw, "ffn_dim_multiplier", 1.0, 1e-3, 1e3) * wide)
            values["hidden_dim"] = multiple * -(-wide // multiple)
        theta = checked(raw, "rope_theta", 10000.0, 1.0, 1e12)
        window = checked(raw, "sliding_window", None, 1, 2**24)
        vocab_size = checked(raw, "vocab_size", -1, -1, 2**24)
    except ValueError as error:
        raise ValueError(f"{file}: {str(error).removeprefix('config.json: ')}") from None
    if vocab_size < 1:
        rows = [[*open_weights(part)[0].get("output.weight", ()), 0][0] for part in meta_files(folder)]
        vocab_size = sum(rows)
        if not 1 <= vocab_size <= 2**24:
            raise ValueError(f"{folder}: no output.weight says how large the vocabulary is, and {file.name} does not either.")
    longest = 16384 if "rope_theta" in raw else 4096 if values["norm_eps"] > 5e-6 else 2048
    longest = checked(raw, "max_seq_len", longest, 1, 2**24)
    return ModelConfig(**values, vocab_size=vocab_size, rope_theta=theta, sliding_window=window, max_position_embeddings=longest)


def find_meta_tensors(folder: Path, config: ModelConfig, expected: dict[str, tuple]) -> dict[str, Source]:
    """Where each expected tensor is, and how its parts are put together. Raises ValueError for anything unexpected."""
    files = meta_files(folder)
    parts = [open_weights(file) for file in files]
    ours = {meta_name(name): name for name in expected}
    for (shapes, _), file in zip(parts, files):
        strange = [name for name in shapes if name not in ours and not name.endswith("rope.freqs")]
        missing = [name for name in ours if name not in shapes]
        if strange or missing:
            raise ValueError(f"tensor {(strange or missing)[0]!r:.200} {'has no place in' if strange else 'is missing from'} "
                             f"{file}, going by params.json. The weights and params.json are from different models.")
    sources = {}
    for theirs, name in ours.items():
        shape, pieces = expected[name], [shapes[theirs] for shapes, _ in parts]
        cut = [dim for dim in range(len(shape)) if fits(pieces, shape, dim)]
        if not cut and not (len(shape) == 1 and set(pieces) == {shape}):
            raise ValueError(f"tensor {theirs} is {pieces[0]} in each of {len(files)} files, starting with {files[0]}; params.json says "
                             f"{shape} in all. The weights and params.json are from different models.")
        openers = [functools.partial(open_tensor, theirs) for _, open_tensor in parts]
        turned = config.head_dim if name.endswith(("q_proj.weight", "k_proj.weight")) else 0
        sources[name] = files[0], functools.partial(open_joined, openers, pieces, cut[0] if cut else None, turned)
    return sources


def fits(pieces: list[tuple], shape: tuple, dim: int) -> bool:
    """Whether the pieces, side by side along `dim`, have this shape."""
    others = all(len(piece) == len(shape) and piece[:dim] + piece[dim + 1:] == shape[:dim] + shape[dim + 1:] for piece in pieces)
    return others and sum(piece[dim] for piece in pieces) == shape[dim]


def open_joined(openers: list[Callable], pieces: list[tuple], dim: int | None, turned: int) -> tuple[torch.dtype, Rows]:
    """Type and rows of a tensor cut along `dim` (None: the same in all files), reordered in heads of `turned` rows (0: not)."""
    opened = [opener() for opener in (openers if dim is not None else openers[:1])]

    def read(rows: slice) -> Tensor:
        if dim == 1:
            part = torch.cat([read_part(rows) for _, read_part in opened], 1)
        else:
            found, before = [], 0                                    # rows.start and .stop counted from each file's first row
            for (_, read_part), piece in zip(opened, pieces):
                low, high = max(rows.start - before, 0), min(rows.stop - before, piece[0])
                found += [read_part(slice(low, high))] if low < high else []
                before += piece[0]
            part = torch.cat(found) if len(found) > 1 else found[0]
        return pairs_to_halves(part, turned) if turned else part
    return opened[0][0], read


def save_meta(model: Llama, path: str | os.PathLike) -> None:
    """Write params.json and consolidated.00.pth, as Meta's own code reads them, in the dtype of the weights.

    Raises:
        ValueError: something that Meta's layout cannot say, such as biases or scaled RoPE.
    """
    config, folder = model.config, Path(path)
    if config.attention_bias or config.mlp_bias or config.rope_scaling or config.sliding_window:
        raise ValueError("Meta's layout has no biases, no RoPE scaling and no sliding window; write Hugging Face's instead.")
    if config.head_dim * config.n_heads != config.dim:
        raise ValueError(f"Meta's layout takes head_dim to be dim / n_heads, and here it is {config.head_dim}; write Hugging Face's.")
    wide = int(2 * 4 * config.dim / 3)                               # multiple_of, or a multiplier of it, gives hidden_dim
    raw = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads,
           "norm_eps": config.norm_eps, "vocab_size": config.vocab_size, "multiple_of": 256}
    if config.hidden_dim != 256 * -(-wide // 256):
        raw |= {"multiple_of": 1, "ffn_dim_multiplier": (config.hidden_dim + 0.5) / wide}
    if config.rope_theta != 10000.0:
        raw["rope_theta"] = config.rope_theta
    tensors = {}
    for name, weight in (*plain_weights(model).items(), *([("lm_head.weight", model.lm_head.weight)] if config.tie_embeddings else [])):
        weight = weight.detach().cpu()
        turned = name.endswith(("q_proj.weight", "k_proj.weight"))
        tensors[meta_name(name)] = halves_to_pairs(weight, config.head_dim) if turned else weight.clone()
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "consolidated.00.pth", lambda target: torch.save(tensors, target))
    write_file(folder / "params.json", lambda target: target.write_text(json.dumps(raw, indent=2)))


def plain_weights(model: Llama) -> dict[str, Tensor]:
    """The weights by name; a tied head is not among them. Raises ValueError for a model that is more or less than plain."""
    with torch.device("meta"):
        names = [name for name, _ in Llama(model.config).named_parameters()]
    weights = dict(model.named_parameters())
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError("the model is quantised, and quantised weights are not written; load it in full precision first.")
    if weights.keys() != set(names):
        raise ValueError(f"{sorted(weights.keys() ^ set(names))[0]} is not a weight of a plain model; merge adapters "
                         "with merge_lora before saving.")
    return {name: weights[name] for name in names}


def save_model(model: Llama, path: str | os.PathLike, *, dtype: torch.dtype | None = None,
               max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write config.json and model.safetensors, or shards and their index, as transformers reads and writes them.

    Args:
        dtype: cast to this; by default as they are.
        max_shard_bytes: size at which a new file begins.
    Raises:
        ValueError: the model has weights of its own, such as adapters that are not merged.
    """
    folder, weights = Path(path), plain_weights(model)
    folder.mkdir(parents=True, exist_ok=True)
    types, sizes = {name: dtype or weight.dtype for name, weight in weights.items()}, {}
    shards, room = [], 0
    for name, weight in weights.items():
        n_bytes = weight.numel() * types[name].itemsize
        sizes[types[name]] = sizes.get(types[name], 0) + n_bytes
        if n_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= n_bytes
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": {}}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: weights[name].detach().to("cpu", types[name]).contiguous() for name in shard}
        write_file(folder / file, lambda target: save_file(tensors, target, {"format": "pt"}))
        index["weight_map"] |= dict.fromkeys(shard, file)
    written = set(index["weight_map"].values())
    if len(shards) > 1:
        written.add("model.safetensors.index.json")
        text = json.dumps(index, indent=2)
        write_file(folder / "model.safetensors.index.json", lambda target: target.write_text(text))
    config = json.dumps(model.config.to_hf(str(max(sizes, key=sizes.get)).removeprefix("torch.")), indent=2)     # where types are mixed, the main one
    write_file(folder / "config.json", lambda target: target.write_text(config))
    for old in folder.glob("model*.safetensors*"):                   # an earlier save must not shadow this one
        if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", old.name) and old.name not in written:
            old.unlink()


def write_file(target: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target, sync, rename: a reader sees the old file or the new one, whole."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode                                   # as the umask has it; safetensors is stricter
        write(part)
        part.chmod(mode)
        with open(part, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(part, target)
    except (OSError, SafetensorError) as error:                      # no room, most often: say where
        code = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number or errno.EIO), str(target)) from None
    finally:
        part.unlink(missing_ok=True)
