"""A LLaMA-family language model: forward pass, KV cache, sampling, and a Hugging Face folder.

Touvron et al. 2023, arXiv 2302.13971 and 2307.09288. A pre-norm decoder with

    RMSNorm   y = w * x / sqrt(mean(x^2) + eps)                          Zhang & Sennrich 2019
    RoPE      position t turns (x_i, x_{i + Dh/2}) by t * theta^(-2i / Dh)     Su et al. 2021
    GQA       H query heads share K key/value heads                      Ainslie et al. 2023
    SwiGLU    down(silu(gate(x)) * up(x))                                Shazeer 2020

Inside the model there is one shape, (N, D): the tokens of all documents laid end to end, never
padded. Linears, norms and RoPE treat each token alone. Which token sees which is known only to a
small object, `attend(layer, q, k, v)`: `Packed` for whole documents, `Cached` for tokens that
continue the rows of a cache. Modules have the names of Hugging Face's LlamaForCausalLM.
Shapes: B rows or documents, T their length, N tokens in all, S keys, D model dim, H/K query/kv
heads, Dh head dim, F ffn dim, V vocabulary, M chosen tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


# ----- Config -----
@dataclass
class ModelConfig:
    """The shape of a model; the defaults are LLaMA-1's of 7B. extras/formats has a subclass."""

    vocab_size: int = 32000
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32
    head_dim: int = 128
    hidden_dim: int = 11008
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    context: int = 2048  # the most tokens of a sequence
    tie_embeddings: bool = False  # the head is the embedding
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_id: int | None = 1
    eos_ids: list[int] = field(default_factory=lambda: [2])
    prompt_template: str | None = None  # the template that it was trained with (our own key)

    def rope_frequencies(self, device) -> Tensor:
        """Angle per position of each pair, (Dh/2,)."""
        powers = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim
        return 1.0 / self.rope_theta**powers

    def rope_tables(self, position_ids):
        """cos and sin of the angle of each pair, both (N, 1, Dh), at positions (N,), in float32."""
        frequencies = self.rope_frequencies(position_ids.device)
        angles = position_ids[:, None] * frequencies.repeat(2)  # (N, Dh)
        return angles.cos()[:, None], angles.sin()[:, None]


# what Hugging Face's config.json calls these fields
HF_KEYS = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "hidden_dim": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
    "context": "max_position_embeddings", "tie_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias", "mlp_bias": "mlp_bias", "bos_id": "bos_token_id",
    "eos_ids": "eos_token_id", "prompt_template": "prompt_template",
}


# ----- Blocks -----
class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps), in float32 inside: (N, D) -> (N, D)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


def rotate(x, rope_cos, rope_sin):
    """Turn the pairs (x_i, x_{i + Dh/2}) of x (N, H, Dh). Meta's files pair (x_2i, x_{2i+1})."""
    left, right = x.chunk(2, dim=-1)  # (N, H, Dh/2) each
    return x * rope_cos + torch.cat([-right, left], dim=-1) * rope_sin


class Attention(nn.Module):
    """Queries, keys and values of each token, rotated; `attend` says who sees whom."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        bias = config.attention_bias
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias)

    def forward(self, x, attend, rope_cos, rope_sin):
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, heads)  # (N, D) -> (N, H, Dh)
        k = self.k_proj(x).unflatten(-1, heads)  # (N, D) -> (N, K, Dh)
        v = self.v_proj(x).unflatten(-1, heads)  # (N, D) -> (N, K, Dh)
        q, k = rotate(q, rope_cos, rope_sin), rotate(k, rope_cos, rope_sin)
        mixed = attend(self.layer, q, k, v)  # (N, H, Dh)
        return self.o_proj(mixed.flatten(1))  # (N, H, Dh) -> (N, D)


class MLP(nn.Module):
    """SwiGLU: a gate decides, number by number, what of the wide layer comes through."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, config.mlp_bias)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (N, F) -> (N, D)


class Block(nn.Module):
    """Attention, then the MLP. Each reads a normed copy and adds its result: (N, D) -> (N, D)."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, attend, rope_cos, rope_sin):
        x = x + self.self_attn(self.input_layernorm(x), attend, rope_cos, rope_sin)
        return x + self.mlp(self.post_attention_layernorm(x))  # (N, D)


# ----- Who attends to whom -----
def attention(q, k, v, **mask):
    """Softmax attention of q (B, T, H, Dh) over k and v (B, S, K, Dh) -> (B, T, H, Dh)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T or S, Dh)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask).transpose(1, 2)


def split(q, k, v, lengths):
    """The queries, keys and values of each document in turn."""
    return zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)


class Packed:
    """Causal attention inside each of the documents that lie end to end in the flat row."""

    before = None  # each token follows the one to its left

    def __init__(self, lengths, device="cpu"):
        self.lengths = lengths
        self.position_ids = torch.cat([torch.arange(n) for n in lengths]).to(device)  # (N,)

    def __call__(self, layer, q, k, v):
        """q (N, H, Dh), k and v (N, K, Dh) -> (N, H, Dh)."""
        out = []
        for queries, keys, values in split(q, k, v, self.lengths):  # (T, H or K, Dh) each
            out.append(attention(queries[None], keys[None], values[None], is_causal=True)[0])
        return torch.cat(out)


class KVCache:
    """Keys and values of B rows with S places each; lengths[b] of row b's places are filled."""

    def __init__(self, model, batch: int, max_len: int):
        c = model.config
        shape = (2, c.n_layers, batch, max_len, c.n_kv_heads, c.head_dim)
        self.kv = model.model.embed_tokens.weight.new_zeros(shape)  # (2, L, B, S, K, Dh)
        self.lengths = [0] * batch


class Cached:
    """New tokens behind the rows of a cache: counts[b] of them for row b, maybe none.

    The flat row holds row 0's new tokens, then row 1's, and so on. Each sees its own row of the
    cache up to itself. Make a new object for every forward pass.
    """

    def __init__(self, cache, counts):
        self.cache, self.counts, self.begins = cache, counts, cache.lengths
        cache.lengths = [begin + n for begin, n in zip(self.begins, counts, strict=True)]
        spans = map(torch.arange, self.begins, cache.lengths)
        self.position_ids = torch.cat(list(spans)).to(cache.kv.device)  # (N,)

    def __call__(self, layer, q, k, v):
        """q (N, H, Dh), k and v (N, K, Dh) -> (N, H, Dh)."""
        out, rows = [], split(q, k, v, self.counts)
        for row, (queries, new_keys, new_values) in enumerate(rows):  # (T, H or K, Dh) each
            T, begin, end = len(queries), self.begins[row], self.cache.lengths[row]
            keys, values = self.cache.kv[:, layer, row, :end]  # (S, K, Dh) each
            keys[begin:], values[begin:] = new_keys, new_values
            # The t-th new token sees what was there, and the new ones up to itself.
            mask = torch.ones(T, end, dtype=torch.bool, device=q.device).tril(begin)  # (T, S)
            if T:
                out.append(attention(queries[None], keys[None], values[None], attn_mask=mask)[0])
        return torch.cat(out)


# ----- The model -----
class Decoder(nn.Module):
    """Everything below the head; a module of its own because of the weights' names."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class Llama(nn.Module):
    """LLaMA with a language-model head.

    `load_model` reads a trained one; methods/pretrain.py trains a fresh one. extras/fast has a
    subclass of it: the same results, sooner.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, input_ids: Tensor, attend: Callable, rows: Tensor | None = None) -> Tensor:
        """Final hidden states, normed, (N, D) of flat input_ids (N,); lm_head makes logits of them.

        attend: any callable (layer, q (N, H, Dh), k, v (N, K, Dh)) -> (N, H, Dh) that has
        `position_ids` (N,), such as `Packed`. rows (M,): return these states only, (M, D).
        """
        x = self.model.embed_tokens(input_ids)  # (N, D)
        cos, sin = (table.to(x.dtype) for table in self.config.rope_tables(attend.position_ids))
        for block in self.model.layers:
            x = block(x, attend, cos, sin)
        x = self.model.norm(x)
        return x if rows is None else x[rows]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next token for rows of one length: (B, T) -> (B, T, V)."""
        B, T = input_ids.shape
        attend = Packed([T] * B, input_ids.device)
        hidden = self.hidden(input_ids.flatten(), attend)  # (B * T, D)
        return self.lm_head(hidden).unflatten(0, (B, T))

    def decode(self, answers: list[Answer], batch_size):
        """Yield (logits (B, V), answers) until all are done: for the prompts, then token by token.

        Whoever reads them adds one token to each of the answers before asking for more.
        """
        device = self.model.embed_tokens.weight.device
        for start in range(0, len(answers), batch_size):
            batch = answers[start:start + batch_size]
            # All prompts in one pass, ...
            counts = [len(answer.prompt) for answer in batch]
            cache = KVCache(self, len(batch), max(counts) + batch[0].most)
            ids = torch.tensor([token for answer in batch for token in answer.prompt])  # (N,)
            last = torch.tensor(counts).cumsum(0) - 1  # (B,), where each prompt ends
            hidden = self.hidden(ids.to(device), Cached(cache, counts), last.to(device))  # (B, D)
            yield self.lm_head(hidden), batch
            # ... then a pass for each token of the answers that go on.
            while live := [answer for answer in batch if not answer.done]:
                counts = [int(not answer.done) for answer in batch]
                ids = torch.tensor([answer.tokens[-1] for answer in live])
                hidden = self.hidden(ids.to(device), Cached(cache, counts))  # (live rows, D)
                yield self.lm_head(hidden), live


# ----- Sampling -----
@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0 takes the most probable token
    top_p: float = 1.0  # draw from the fewest tokens that hold this much probability


@dataclass
class Answer:
    """One row of `generate`: its prompt, its random stream, and what has come out so far."""

    prompt: list[int]
    most: int  # new tokens at most
    stream: str
    tokens: list[int]  # the new tokens, with the EOS token where it has come
    done: bool = False


@torch.inference_mode()
def generate(model: Llama, prompts: list[list[int]], sampling: Sampling, *, seeds=None,
             eos_ids=None, batch_size: int = 64, watch=None) -> list[list[int]]:
    """Continue prompts (token ids, ragged) until an EOS id, which is kept, or max_new_tokens.

    A row depends on its own prompt and seed (seeds: one per prompt), not on its neighbours.
    eos_ids: by default the config's. watch(answer) is called whenever an `Answer` has got one more
    token. Prompt and response must fit config.context. The model stays in eval mode. Raises
    ValueError for an empty prompt and for non-finite logits.
    """
    if sampling.max_new_tokens < 1 or not all(prompts):
        raise ValueError("a prompt is empty, or max_new_tokens below 1; there is nothing to do.")
    seeds = seeds or [f"0,{index}" for index in range(len(prompts))]
    answers, stop = [], eos_ids or model.config.eos_ids
    for prompt, seed in zip(prompts, seeds, strict=True):
        answers.append(Answer(prompt, sampling.max_new_tokens, str(seed), []))
    model.eval()
    for logits, batch in model.decode(answers, batch_size):
        draws = [uniform(answer.stream, len(answer.tokens)) for answer in batch]
        tokens = sample(logits, draws, sampling)
        for answer, token in zip(batch, tokens, strict=True):
            answer.tokens.append(token)
            answer.done = token in stop or len(answer.tokens) == answer.most
            if watch:
                watch(answer)
    return [answer.tokens for answer in answers]


def uniform(stream, step) -> float:
    """Number `step` of a random stream, uniform in [0, 1): a hash, so there is no state."""
    digest = hashlib.sha256(f"{stream},{step}".encode()).digest()
    bits = int.from_bytes(digest[:8], "big") >> 11  # as many as a float holds
    return bits / 2**53


def sample(logits, draws, sampling: Sampling) -> list[int]:
    """One token id for each row of logits (B, V), by inverse CDF from numbers in [0, 1), (B,)."""
    logits = logits.float()
    if not logits.logsumexp(-1).isfinite().all():
        raise ValueError("the model gave non-finite logits; its weights are broken, or overflow.")
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    logits = logits - logits.amax(-1, keepdim=True)
    probs, order = (logits / sampling.temperature).softmax(-1), None  # (B, V)
    if sampling.top_p < 1:
        probs, order = probs.sort(descending=True)  # (B, V), (B, V)
        # keep the tokens before top_p is reached, but for rounding, and the one that crosses it
        before = probs.double().cumsum(1) - probs
        probs = probs.masked_fill(before >= sampling.top_p * 0.999999, 0.0)
    # The first token whose cumulative probability exceeds the draw.
    cdf = probs.double().cumsum(1)  # (B, V)
    points = torch.tensor(draws, device=cdf.device, dtype=cdf.dtype)[:, None]  # (B, 1)
    points = points * cdf[:, -1:]  # the last sum is what top_p left
    # Rounding may put a point behind the last token.
    ids = torch.searchsorted(cdf, points, right=True).clamp(max=cdf.shape[1] - 1)  # (B, 1)
    if order is not None:
        ids = order.gather(1, ids)
    return ids.squeeze(1).tolist()


# ----- A Hugging Face folder -----
def load_model(path, *, dtype=torch.float32, device="cpu") -> Llama:
    """Read config.json and all *.safetensors of a plain LLaMA folder.

    extras/formats reads other models, checks every name and number, and needs less memory.
    Raises ValueError for a model that is not plain LLaMA.
    """
    folder, state = Path(path), {}
    raw = json.loads((folder / "config.json").read_text())
    if raw["model_type"] != "llama" or raw.get("rope_scaling") or "rope_parameters" in raw:
        raise ValueError(f"{path} is not a plain LLaMA model; reading it takes extras/formats.")
    raw.setdefault("num_key_value_heads", raw["num_attention_heads"])
    raw.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    config = ModelConfig(**{ours: raw[theirs] for ours, theirs in HF_KEYS.items() if theirs in raw})
    if isinstance(config.eos_ids, int):
        config.eos_ids = [config.eos_ids]
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    if config.tie_embeddings:  # no other head is in the file, or it counts
        embedding = state["model.embed_tokens.weight"]
        config.tie_embeddings = state.setdefault("lm_head.weight", embedding).equal(embedding)
    model = Llama(config)
    model.load_state_dict(state)
    return model.to(device, dtype)


def save_model(model: Llama, path, *, dtype=None) -> None:
    """Write model.safetensors and config.json, as transformers reads them."""
    folder, tensors = Path(path), {}
    for name, weight in model.named_parameters():  # a tied head is not among them
        tensors[name] = weight.detach().to("cpu", dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
           "torch_dtype": str(tensors["model.norm.weight"].dtype).removeprefix("torch.")}
    for ours, theirs in HF_KEYS.items():
        raw[theirs] = getattr(model.config, ours)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
