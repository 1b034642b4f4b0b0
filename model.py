"""A LLaMA-family language model: forward pass, KV cache, sampling, and reading and writing of checkpoints.

Touvron et al. 2023 (arXiv 2302.13971, 2307.09288): pre-norm decoder with
    RMSNorm     y = w * x / sqrt(mean(x^2) + eps)                       Zhang & Sennrich 2019
    RoPE        position t turns the pair (x_i, x_{i + Dh/2}) by the angle t * theta^(-2i/Dh)      Su et al. 2021
    GQA         H query heads share K key/value heads                   Ainslie et al. 2023
    SwiGLU      down(silu(gate(x)) * up(x))                             Shazeer 2020
Module names are those of Hugging Face's LlamaForCausalLM, so its weights load without a table.

The one shape inside is (N, D): linears, norms and RoPE see real tokens only, laid end to end, never padding. One small
object, `attend(layer, q, k, v)`, knows which token belongs to which document: `Packed` for whole documents (training,
scoring), `Cached` for tokens appended to a KV cache (prefill, decoding, forks).

Shapes: B batch (rows or documents), T row length, N real tokens in all, S key length, D model dim, H/K query/kv heads,
Dh head dim, F ffn dim, V vocab, L layers, M rows of logits asked for.

    model = load_model("runs/base", dtype=torch.bfloat16, device="cuda")
    answers = generate(model, [[1, 15043], [1, 1724, 338]], max_new_tokens=64)
"""
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_SHARD_BYTES = 5 * 10**9
MAX_CONFIG_BYTES = 10**6
PREFILL_TOKENS = 8192      # prompts enter the cache in calls of about this many tokens, which bounds memory


# ---------------------------------------------------------------------------------------------------------------
# Config


def option(default, help: str, hf: str | None = None, low=None, high=None):
    """A field; `hf` is its key in Hugging Face's config.json, whose values must lie between `low` and `high`."""
    return field(default=default, metadata={"help": help, "hf": hf, "low": low, "high": high})


@dataclass
class ModelConfig:
    """Shape of a model; the defaults are those of Hugging Face's LlamaConfig.

    Raises:
        ValueError: sizes that cannot be, or a RoPE that is scaled.
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
    rope_scaling: dict | None = option(None, "only None, plain RoPE, is implemented")
    max_position_embeddings: int = option(2048, "longest sequence", "max_position_embeddings", 1, 2**24)
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
        if (self.rope_scaling or {}).get("rope_type", "default") != "default":
            raise ValueError(f"RoPE scaling {self.rope_scaling} is not implemented; only default (none) is.")

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
        values = {item.name: checked(raw, default=item.default, **item.metadata) for item in hf_fields()}
        window, longest = raw.get("sliding_window"), values["max_position_embeddings"]
        if raw["model_type"] == "mistral" and window is not None and not (type(window) is int and window >= longest):
            raise ValueError(f"config.json: sliding_window is {window!r:.60}; only null, or at least "
                             f"max_position_embeddings ({longest}), is implemented.")
        template = raw.get("prompt_template")
        return cls(**values, rope_theta=plain_rope_theta(raw), prompt_template=template and str(template),
                   bos_id=next(iter(token_ids(raw, "bos_token_id", 1)), None),
                   eos_ids=token_ids(raw, "eos_token_id", 2))

    def to_hf(self, dtype: str = "float32") -> dict:
        """The keys of a config.json that transformers 4 and 5 both read."""
        raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype, "hidden_act": "silu"}
        raw |= {item.metadata["hf"]: getattr(self, item.name) for item in hf_fields()}
        raw |= {"rope_theta": self.rope_theta, "rope_scaling": None, "bos_token_id": self.bos_id}
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


def plain_rope_theta(raw: dict) -> float:
    """The base of the rotary frequencies: in `rope_theta` (transformers 4) or in `rope_parameters` (transformers 5)."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("config.json: the RoPE parameters are malformed or differ by layer; only plain RoPE is "
                         "implemented.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json: RoPE scaling {kind!r:.60} is not implemented; only default (none) is.")
    if not all(place.get("partial_rotary_factor") in (None, 1) for place in (raw, rope)):
        raise ValueError("config.json: a partial_rotary_factor other than 1 is not implemented.")
    return checked({"rope_theta": raw.get("rope_theta")} | rope, "rope_theta", 10000.0, 1.0, 1e12)


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


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps); float32 inside, cast back, then times the weight. (N, D) -> (N, D)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


def rope_tables(config: ModelConfig, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, both (N, 1, Dh), of positions (N,); computed in float32, then cast."""
    powers = torch.arange(0, config.head_dim, 2, device=position_ids.device).float() / config.head_dim    # (Dh/2,)
    angles = position_ids.float()[:, None] * (1.0 / config.rope_theta**powers)                            # (N, Dh/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]                                                 # (N, 1, Dh)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + Dh/2}) of x (N, H, Dh). Meta's own files pair (x_2i, x_{2i+1}) instead."""
    left, right = x.chunk(2, dim=-1)                                   # (N, H, Dh/2) each
    return x * rope_cos + torch.cat([-right, left], dim=-1) * rope_sin


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=config.attention_bias)

    def forward(self, x: Tensor, attend: Callable, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))          # (N, H, Dh)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))          # (N, K, Dh)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))          # (N, K, Dh)
        q, k = rotate(q, rope_cos, rope_sin), rotate(k, rope_cos, rope_sin)
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))     # (N, H, Dh) -> (N, D)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Callable, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), attend, rope_cos, rope_sin)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---------------------------------------------------------------------------------------------------------------
# Who attends to whom


def right_padded(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Lay documents out as rows: where each place's token lies in the flat row, (B, T), and whether it is real, (B, T).

    Padding repeats the row's last token.
    """
    columns = torch.arange(int(lengths.max()))                                           # (T,)
    return starts[:, None] + torch.minimum(columns, (lengths[:, None] - 1).clamp(min=0)), columns < lengths[:, None]


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along the first dimension; written so because index_select has the faster backward."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def similar_lengths(lengths: Tensor, ratio: float = 0.75) -> Iterator[Tensor]:
    """Split documents (B,) into groups whose shortest is at least `ratio` of their longest; yields indices."""
    order, begin = lengths.argsort(descending=True, stable=True), 0
    for end in range(1, len(order) + 1):
        if end == len(order) or lengths[order[end]] < ratio * lengths[order[begin]]:
            yield order[begin:end].sort().values
            begin = end


class Packed:
    """Causal attention inside each of the documents that lie end to end in the flat row.

    Documents of similar length are attended to together, right-padded; causality hides the padding, so there is no
    mask. All indices are made once, here, and serve every layer.
    """

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu"):
        size = torch.tensor(lengths, dtype=torch.long)                                   # (B,)
        if (size < 1).any():
            raise ValueError(f"document lengths must be at least 1, found {int(size.min())}.")
        starts = size.cumsum(0) - size                                                   # (B,)
        position_ids = torch.arange(int(size.sum())) - starts.repeat_interleave(size)    # (N,)
        inverse, offset, self.groups = torch.empty_like(position_ids), 0, []
        for group in similar_lengths(size):
            index, real = right_padded(starts[group], size[group])                       # (B, T)
            inverse[index[real]] = offset + real.flatten().nonzero().squeeze(1)
            offset += index.numel()
            self.groups.append(index.to(device))
        equal = len(self.groups) == 1 and offset == len(inverse)                         # one group without padding
        self.equal_shape = self.groups[0].shape if equal else None
        self.inverse = inverse.to(device)                                                # (N,) into the padded places
        self.position_ids = position_ids.to(device)                                      # (N,)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, Dh), k and v (N, K, Dh) -> (N, H, Dh)."""
        if self.equal_shape is not None:                                                 # views, no copies
            return causal(*(x.unflatten(0, self.equal_shape) for x in (q, k, v)))
        out = [causal(take(q, index), take(k, index), take(v, index)) for index in self.groups]
        return take(torch.cat(out), self.inverse) if out else q


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, T, H, Dh), k and v (B, T, K, Dh) -> (B * T, H, Dh)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                     # (B, H or K, T, Dh)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


class KVCache:
    """Keys and values (L, B, K, S, Dh) of B rows; lengths (B,), on the CPU, says how many of the S places are filled.

    Make one, and give it to `Llama.forward` as often as there are new tokens. To fork rows, `select` them.
    """

    def __init__(self, config: ModelConfig, batch: int, max_len: int, dtype: torch.dtype, device: torch.device | str):
        shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_dim)
        self.config = config
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long)

    def select(self, rows: list[int], max_len: int | None = None) -> "KVCache":
        """A copy of the given rows in their order, repeated as asked, with room for max_len (default: as here)."""
        rows = torch.tensor(rows, dtype=torch.long)
        copy = KVCache(self.config, len(rows), max_len or self.k.shape[3], self.k.dtype, self.k.device)
        copy.lengths = self.lengths[rows]
        used = max(copy.lengths.tolist(), default=0)
        copy.k[:, :, :, :used] = self.k[:, rows.to(self.k.device), :, :used]
        copy.v[:, :, :, :used] = self.v[:, rows.to(self.v.device), :, :used]
        return copy

    def move(self, source: int, target: int) -> None:
        """Overwrite row `target` with row `source`, and empty `source`."""
        used = int(self.lengths[source])
        self.k[:, target, :, :used] = self.k[:, source, :, :used]
        self.v[:, target, :, :used] = self.v[:, source, :, :used]
        self.lengths[target], self.lengths[source] = used, 0


class Cached:
    """Append counts[b] new tokens to row b of a cache; each attends to its row's cache up to itself.

    The flat row holds row 0's new tokens, then row 1's, and so on; a count may be 0. The tokens' places are taken when
    this object is made, so make one per forward pass. Rows that were empty are attended to as packed documents.
    """

    def __init__(self, kv_cache: KVCache, counts: list[int]):
        size, before, device = torch.tensor(counts), kv_cache.lengths.clone(), kv_cache.k.device
        if len(size) != len(before):
            raise ValueError(f"the cache has {len(before)} rows, the batch {len(size)}; they must be the same.")
        n_keys = int((before + size).max())
        if n_keys > kv_cache.k.shape[3]:
            raise ValueError(f"the cache has room for {kv_cache.k.shape[3]} tokens a row, {n_keys} are needed; make it "
                             "with a larger max_len.")
        kv_cache.lengths += size
        starts = size.cumsum(0) - size                                                   # (B,)
        rows = torch.arange(len(size)).repeat_interleave(size)                           # (N,)
        positions = torch.arange(len(rows)) - starts[rows] + before[rows]                # (N,)
        self.cache, self.rows, self.position_ids = kv_cache, rows.to(device), positions.to(device)
        used = size > 0
        self.packed = None if before[used].any() else Packed(size[used].tolist(), device)
        if self.packed is None:
            n_rows = int(rows.max()) + 1                                                 # idle rows at the end: cut
            index, real = right_padded(starts[:n_rows], size[:n_rows])                   # (B, T)
            places = positions[index.clamp(max=len(rows) - 1)]                           # (B, T)
            mask = torch.arange(n_keys) <= places[:, :, None]                            # (B, T, S)
            group = kv_cache.config.n_heads // kv_cache.config.n_kv_heads
            self.mask = mask.repeat_interleave(group, dim=1)[:, None].to(device)         # (B, 1, T * H/K, S)
            self.index = index.to(device)
            self.inverse = None if real.all() else real.flatten().nonzero().squeeze(1).to(device)    # (N,)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, Dh), k and v (N, K, Dh) -> (N, H, Dh)."""
        self.cache.k[layer][self.rows, :, self.position_ids] = k.detach()
        self.cache.v[layer][self.rows, :, self.position_ids] = v.detach()
        if self.packed is not None:
            return self.packed(layer, q, k, v)
        (B, T), S = self.index.shape, self.mask.shape[-1]
        k, v = self.cache.k[layer, :B, :, :S], self.cache.v[layer, :B, :, :S]            # (B, K, S, Dh)
        q = take(q, self.index).unflatten(2, (k.shape[1], -1))                           # (B, T, K, H/K, Dh)
        q = q.transpose(1, 2).flatten(2, 3)            # (B, K, T * H/K, Dh): heads that share keys become more queries
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)               # (B, K, T * H/K, Dh)
        out = out.unflatten(2, (T, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)      # (B * T, H, Dh)
        return out if self.inverse is None else take(out, self.inverse)


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

    Set `checkpointing = True` to recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
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

    def hidden(self, input_ids: Tensor, attend: Callable, position_ids: Tensor | None = None) -> Tensor:
        """Final hidden states, normed, (N, D) of flat input_ids (N,); lm_head turns them into logits.

        attend: `Packed`, `Cached`, or any callable (layer, q (N, H, Dh), k, v (N, K, Dh)) -> (N, H, Dh).
        position_ids: (N,); by default those of `attend`.
        """
        position_ids = attend.position_ids if position_ids is None else position_ids
        x = self.model.embed_tokens(input_ids)                                           # (N, D)
        rope_cos, rope_sin = rope_tables(self.config, position_ids, x.dtype)             # (N, 1, Dh) each
        for block in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attend, rope_cos, rope_sin, use_reentrant=False)
            else:
                x = block(x, attend, rope_cos, rope_sin)
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
            hidden = self.hidden(input_ids, attend, position_ids)                        # (N, D)
            hidden = hidden if logits_at is None else take(hidden, logits_at.to(hidden.device))
            return self.lm_head(hidden)                                                  # (N or M, V)
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
    """One row of `generate`: its prompt, the name of its own random stream, and what has come out so far."""

    prompt: list[int]
    stream: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def generate(model: Llama, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, top_k: int = 0, eos_ids: tuple[int, ...] | None = None, seed: int | list[int] = 0,
             batch_size: int = 64, progress: Callable[[int], None] | None = None, return_logprobs: bool = False):
    """Continue prompts until an EOS id (kept as the last element) or max_new_tokens.

    A row's answer depends on its own prompt and seed only: not on its neighbours, nor on batch_size.

    Args:
        prompts: token ids, ragged, none empty.
        temperature: 0 takes the most probable token; else top_k (0: off), then top_p (1: off), then a draw.
        eos_ids: by default those of the model's config.
        seed: one int for all (row i draws from (seed, i)), or one int per row.
        progress: called as progress(k) when k more rows are done, so that a tqdm bar's `update` fits.
    Returns:
        new token ids per prompt; with return_logprobs a pair (ids, logprobs), the latter of the full distribution at
        temperature 1, as teacher forcing gives them.
    Raises:
        ValueError: a prompt that is empty or leaves no room, a setting out of range, or non-finite logits.
    """
    if not (max_new_tokens >= 1 and batch_size >= 1 and temperature >= 0 and 0 < top_p <= 1 and top_k >= 0):
        raise ValueError(f"max_new_tokens {max_new_tokens}, batch_size {batch_size}, temperature {temperature}, top_p "
                         f"{top_p}, top_k {top_k}: expected >= 1, >= 1, >= 0, in (0, 1] and >= 0.")
    room = model.config.max_position_embeddings - max_new_tokens
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= room:
            raise ValueError(f"prompt {index} has {len(prompt)} tokens; expected 1 to {room}, since the model takes "
                             f"{model.config.max_position_embeddings} positions, max_new_tokens {max_new_tokens}.")
    streams = [f"{seed},{index}" for index in range(len(prompts))] if isinstance(seed, int) else list(map(str, seed))
    if len(streams) != len(prompts):
        raise ValueError(f"{len(streams)} seeds for {len(prompts)} prompts; give one int, or one per prompt.")
    answers = [Answer(prompt, stream) for prompt, stream in zip(prompts, streams)]
    was_training = model.training
    model.eval()
    try:
        stop = set(model.config.eos_ids if eos_ids is None else eos_ids)
        decode(model, answers, max_new_tokens, (temperature, top_k, top_p), stop, batch_size, progress)
    finally:
        model.train(was_training)
    tokens = [answer.tokens for answer in answers]
    return (tokens, [answer.logprobs for answer in answers]) if return_logprobs else tokens


def uniform(stream: str, step: int) -> float:
    """Number `step` of a random stream, uniform in [0, 1): a hash, so there is no state to carry."""
    return (int.from_bytes(hashlib.sha256(f"{stream},{step}".encode()).digest()[:8], "big") >> 11) / 2**53


@torch.inference_mode()
def decode(model: Llama, answers: list[Answer], max_new_tokens: int, how: tuple, eos_ids: set[int], batch_size: int,
           progress: Callable[[int], None] | None) -> None:
    """Fill in the answers. Live rows stay in front of a static cache; a quarter of free slots is refilled at once."""
    if not answers:
        return
    weight = model.model.embed_tokens.weight
    slots = min(batch_size, len(answers))
    max_len = max(len(answer.prompt) for answer in answers) + max_new_tokens
    cache = KVCache(model.config, slots, max_len, weight.dtype, weight.device)
    waiting = sorted(answers, key=lambda answer: len(answer.prompt))                     # longest last, taken first
    live: list[Answer] = []                                                              # live[i] has the cache's row i
    while waiting or live:
        begin = 0                                                                        # rows [begin, live) move on
        if waiting and 4 * len(live) <= 3 * slots:
            begin, room = len(live), PREFILL_TOKENS
            while waiting and len(live) < slots and (len(live) == begin or len(waiting[-1].prompt) <= room):
                live.append(waiting.pop())
                room -= len(live[-1].prompt)
        moving = live[begin:]
        inputs = [answer.tokens[-1:] or answer.prompt for answer in moving]
        counts = [0] * begin + [len(ids) for ids in inputs] + [0] * (slots - len(live))
        input_ids = torch.tensor([token for ids in inputs for token in ids], device=weight.device)    # (N,)
        last = torch.tensor(counts[begin:len(live)], device=weight.device).cumsum(0) - 1              # (B,)
        logits = model(input_ids, lengths=counts, kv_cache=cache, logits_at=last)        # (B, V)
        draws = [uniform(answer.stream, len(answer.tokens)) for answer in moving]
        chosen, logprobs = sample(logits.float(), torch.tensor(draws, dtype=torch.float64, device=weight.device), *how)
        for answer, token, logprob in zip(moving, chosen.tolist(), logprobs.tolist()):
            answer.tokens.append(token)
            answer.logprobs.append(logprob)
        was_live = len(live)
        for slot in reversed(range(begin, was_live)):
            if live[slot].tokens[-1] in eos_ids or len(live[slot].tokens) == max_new_tokens:
                cache.move(len(live) - 1, slot)                                          # the last row fills the hole
                live[slot] = live[-1]
                live.pop()
        if progress is not None and len(live) < was_live:
            progress(was_live - len(live))


def sample(logits: Tensor, draws: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """One id per row by inverse CDF. logits (B, V) float32, draws (B,) float64 -> ids (B,), logprobs (B,)."""
    normalizer = logits.logsumexp(-1)                                                    # (B,)
    if not normalizer.isfinite().all():
        raise ValueError("the model gave non-finite logits; its weights are broken, or overflow in this dtype.")
    if temperature == 0:
        ids = logits.argmax(-1, keepdim=True)                                            # (B, 1)
    else:
        probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)     # (B, V)
        order = None
        if top_k or top_p < 1:
            probs, order = probs.topk(min(top_k or probs.shape[-1], probs.shape[-1]))    # (B, k), falling
            probs = probs / probs.sum(-1, keepdim=True)
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)            # the token that crosses stays
        cdf = probs.cumsum(-1, dtype=torch.float64)
        ids = torch.searchsorted(cdf, draws[:, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[-1] - 1)
        ids = ids if order is None else order.gather(1, ids)                             # (B, 1)
    return ids.squeeze(1), logits.gather(1, ids).squeeze(1) - normalizer


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


def load_model(path: str | os.PathLike, *, dtype: torch.dtype = torch.float32,
               device: torch.device | str = "cpu") -> Llama:
    """Read a folder in Hugging Face format: config.json and *.safetensors, or the older pytorch_model*.bin.

    Names and shapes are derived from config.json and compared with the files' before anything is allocated; nothing is
    ever unpickled beyond plain tensors; each tensor goes straight into `dtype` on `device`.

    Raises:
        ValueError: one sentence that says what is wrong with which file.
    """
    folder = Path(path)
    config = read_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    sources = find_tensors(folder, {name: tuple(weight.shape) for name, weight in model.named_parameters()})
    state = {}
    for name, (file, get) in sources.items():
        tensor = get(name).to(device, dtype, copy=True)
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
            raise ValueError(f"tensor {name} has {int((~tensor.isfinite()).sum())} non-finite values ({file}). The "
                             f"checkpoint is broken{', or too large for float16' * (dtype == torch.float16)}.")
        state[name] = tensor
    model.load_state_dict(state, strict=False, assign=True)          # complete by now, but for a tied head
    model.tie_weights()
    return model


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder. Raises ValueError where config.json is missing or unreadable."""
    file = folder / "config.json"
    if not file.is_file():
        meta = " Meta's own format (params.json) must be converted first." if (folder / "params.json").is_file() else ""
        raise ValueError(f"no model at {folder} (no config.json). Give a folder in Hugging Face format: config.json, "
                         f"*.safetensors, tokenizer.model.{meta}")
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, which is no config.json.")
    return ModelConfig.from_hf(read_json(file))


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
    names = list(dict.fromkeys(weight_map.values())) if isinstance(weight_map, dict) else [None]
    homes = (folder.resolve(), folder.resolve().parent.parent / "blobs")    # links of the Hugging Face cache lead there
    for name in names:
        plain = isinstance(name, str) and re.fullmatch(r"[\w.-]{1,200}\.(safetensors|bin)", name)
        if not plain or (folder / name).resolve().parent not in homes:
            raise ValueError(f"{file} points outside its folder ({json.dumps(name):.80}). Refused; do not trust this "
                             "download.")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing, though {file.name} lists it. Download it again.")
    return [folder / name for name in names]


def find_tensors(folder: Path, expected: dict[str, tuple]) -> dict[str, tuple[Path, Callable[[str], Tensor]]]:
    """Where each expected tensor is: name -> (file, reader). Raises unless names and shapes are just the expected."""
    sources = {}
    for file in weight_files(folder):
        shapes, get = open_weights(file)
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
            sources[name] = file, get
    missing = [name for name in expected if name not in sources]
    if missing:
        raise ValueError(f"tensor {missing[0]} is missing from {folder} ({len(missing)} of {len(expected)} are). The "
                         "weights and config.json are from different models.")
    return sources


def open_weights(file: Path) -> tuple[dict[str, tuple], Callable[[str], Tensor]]:
    """Shapes by name of a weight file, and a function that reads one tensor."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f'{file} is a Git LFS pointer of {size} bytes, not weights. Run "git lfs pull" in that '
                             "folder.")
    try:
        if file.suffix == ".bin":
            tensors = read_bin(file)
            return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__
        handle = safe_open(file, "pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{file} is damaged or incomplete: {one_line(error)}. Download it again (found {size:,} "
                         "bytes).") from None
    for name, piece in slices.items():
        if piece.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"tensor {name!r:.200} in {file} is {piece.get_dtype()}, expected F32, F16 or BF16.")
    return {name: tuple(piece.get_shape()) for name, piece in slices.items()}, handle.get_tensor


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
    return tensors


def save_model(model: Llama, path: str | os.PathLike, *, dtype: torch.dtype | None = None,
               max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write config.json and model.safetensors, or shards and their index, as transformers reads and writes them.

    Args:
        dtype: cast to this; by default as they are.
        max_shard_bytes: size at which a new file begins.
    Raises:
        ValueError: the model has weights of its own, such as adapters that are not merged.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        names = [name for name, _ in Llama(model.config).named_parameters()]             # a tied head is not among them
    weights = dict(model.named_parameters())
    if weights.keys() != set(names):
        raise ValueError(f"{sorted(weights.keys() ^ set(names))[0]} is not a weight of a plain model; merge adapters "
                         "with merge_lora before saving.")
    dtype = dtype or weights[names[0]].dtype
    shards, room = [], 0
    for name in names:
        n_bytes = weights[name].numel() * dtype.itemsize
        if n_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= n_bytes
    total = sum(weights[name].numel() for name in names) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": {}}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: weights[name].detach().to("cpu", dtype).contiguous() for name in shard}
        write_file(folder / file, lambda target: save_file(tensors, target, {"format": "pt"}))
        index["weight_map"] |= dict.fromkeys(shard, file)
    written = set(index["weight_map"].values())
    if len(shards) > 1:
        written.add("model.safetensors.index.json")
        text = json.dumps(index, indent=2)
        write_file(folder / "model.safetensors.index.json", lambda target: target.write_text(text))
    config = json.dumps(model.config.to_hf(str(dtype).removeprefix("torch.")), indent=2)
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
    finally:
        part.unlink(missing_ok=True)
