"""Sampling many responses: free rows are refilled, what prompts share is read once.

Shapes: N tokens, B rows, S places of a row, H/K query/kv heads, Dh head dim, V vocabulary.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from extras.fast.attention import Branched, on_gpu, put
from extras.fast.cpu import prepacked
from model import Answer, Llama

PREFILL_TOKENS = 8192  # prompts are read about so many tokens at a time, which bounds memory
SHORTEST_SHARED = 8  # tokens that prompts must have in common to be read together
GRAPH_KEYS = 256  # a CUDA graph reads so many places of a row, or twice, four times as many


class Rows:
    """Responses under way: a static cache of B rows with S places, of which lengths[b] are filled.

    On a GPU a step is a CUDA graph, which has fixed shapes and memory. One is recorded when it is
    first needed for each power of two of rows and of GRAPH_KEYS places.
    """

    def __init__(self, model: Llama, rows: int, places: int):
        weight, config = model.model.embed_tokens.weight, model.config
        shape = (2, config.n_layers, rows, config.n_kv_heads, places, config.head_dim)
        self.kv = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.input_ids = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.position_ids = torch.zeros_like(self.input_ids)
        self.model, self.device, self.lengths = model, weight.device, [0] * rows
        self.graphs, self.pool = {}, None

    def move(self, source: int, target: int) -> None:
        """Overwrite row `target` with row `source`."""
        used = self.lengths[target] = self.lengths[source]
        self.kv[:, :, target, :, :used] = self.kv[:, :, source, :, :used]

    def step(self, tokens: list[int]) -> Tensor:
        """Append a token to each of the first rows. Returns logits (B, V), until the next call."""
        live, n_keys = len(tokens), max(self.lengths[:len(tokens)]) + 1
        rows = live
        if on_gpu(self.device):
            rows = min(len(self.lengths), 1 << (live - 1).bit_length())
            n_keys = GRAPH_KEYS << ((n_keys - 1) // GRAPH_KEYS).bit_length()
            n_keys = min(n_keys, self.kv.shape[4])
        self.input_ids[:live] = put(torch.tensor(tokens), self.device)
        self.position_ids[:rows] = put(torch.tensor(self.lengths[:rows]), self.device)
        for row in range(live):
            self.lengths[row] += 1
        if not on_gpu(self.device):
            return self.compute(rows, n_keys)
        if (rows, n_keys) not in self.graphs:
            with torch.cuda.device(self.device):
                self.graphs[rows, n_keys] = self.record(rows, n_keys)
        graph, logits = self.graphs[rows, n_keys]
        graph.replay()
        return logits[:live]

    def compute(self, rows: int, n_keys: int) -> Tensor:
        """Logits (rows, V) of input_ids at position_ids, among the first n_keys places."""
        attend = Step(self, self.position_ids[:rows], n_keys)
        return self.model.lm_head(self.model.hidden(self.input_ids[:rows], attend))

    def record(self, rows: int, n_keys: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of `compute`, and where it leaves the logits. The graphs share their memory."""
        aside, graph = recording_stream(self.device), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # the first calls make kernels and workspaces
                self.compute(rows, n_keys)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph, pool=self.pool, stream=aside,
                              capture_error_mode="thread_local"):  # other threads may go on
            logits = self.compute(rows, n_keys)
        self.pool = graph.pool()
        return graph, logits


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for a device's graphs: one for all, because cuBLAS keeps memory for each."""
    return torch.cuda.Stream(device)


class Step:
    """Attention of a token of each of the first rows, at position_ids (B,) among n_keys places."""

    def __init__(self, rows: Rows, position_ids: Tensor, n_keys: int):
        self.kv, self.position_ids, self.n_keys = rows.kv, position_ids, n_keys
        self.rows = torch.arange(len(position_ids), device=position_ids.device)
        self.mask = None
        if len(position_ids) > 1 or on_gpu(rows.device):  # a single row here fills all places
            places = torch.arange(n_keys, device=position_ids.device)
            hidden = (places > position_ids[:, None])[:, None, None]  # (B, 1, 1, n_keys)
            # numbers to add, which are made once for all layers
            zeros = torch.zeros_like(hidden, dtype=rows.kv.dtype)
            self.mask = zeros.masked_fill(hidden, float("-inf"))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, Dh), k and v (B, K, Dh) -> (B, H, Dh)."""
        keys, values = self.kv[:, layer]  # (rows, K, S, Dh) each
        keys[self.rows, :, self.position_ids] = k
        values[self.rows, :, self.position_ids] = v
        keys, values = keys[:len(q), :, :self.n_keys], values[:len(q), :, :self.n_keys]
        q = q.unflatten(1, (k.shape[1], -1))  # (B, K, H/K, Dh)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask).flatten(1, 2)


class Prefill:
    """Attention of prompts that are read into rows from `first` on, `input_ids` (N,) in all.

    `last` (B,) says where each prompt's last token is.
    """

    def __init__(self, rows: Rows, prompts: list[list[int]], first: int):
        groups, self.longest = group_prompts(prompts), max(map(len, prompts))
        laid = [(stem, [prompts[member] for member in members]) for stem, members in groups]
        attend, tokens = Branched(laid, rows.device), [[]] * len(prompts)
        order = [member for _, members in groups for member in members]
        for member, row in zip(order, attend.tokens, strict=True):
            rows.lengths[first + member] = len(row)
            # the padding is overwritten, token by token
            tokens[member] = row + row[-1:] * (self.longest - len(row))
        self.kv, self.attend = rows.kv[:, :, first:first + len(prompts)], attend
        self.position_ids = attend.position_ids
        self.input_ids = put(torch.tensor(attend.input_ids), rows.device)
        self.tokens = put(torch.tensor(tokens), rows.device)  # (B, longest)
        self.last = self.tokens[:, -1]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, Dh), k and v (N, K, Dh) -> (N, H, Dh)."""
        for cached, x in zip(self.kv[:, layer], (k, v), strict=True):
            cached[:, :, :self.longest] = x[self.tokens].transpose(1, 2)
        return self.attend(layer, q, k, v)


def group_prompts(prompts: list[list[int]]) -> list[tuple[int, list[int]]]:
    """Prompts in groups that begin alike: (tokens they share, their indices).

    Neighbours in alphabetical order, for as long as one more member saves tokens.
    """
    groups = []
    for member in sorted(range(len(prompts)), key=prompts.__getitem__):
        ids = prompts[member]
        if groups:
            stem, members = groups[-1]
            # each keeps at least its last token to itself
            other, most = prompts[members[0]], min(len(ids) - 1, stem)
            same = next((i for i in range(most) if ids[i] != other[i]), most)
            if same >= SHORTEST_SHARED and len(members) * same >= (len(members) - 1) * stem:
                groups[-1] = (same, [*members, member])
                continue
        groups.append((len(ids) - 1, [member]))
    return [(stem if len(members) > 1 else 0, members) for stem, members in groups]


def decode(model: Llama, answers: list[Answer], batch_size: int) -> Iterator:
    """As `Llama.decode`: yield (logits (B, V), answers) until all are done."""
    slots = min(batch_size, len(answers))
    places = max((len(answer.prompt) + answer.most for answer in answers), default=0)
    rows, live = Rows(model, slots, places), []  # live[i] has row i
    # the longest prompt is last, and taken first
    waiting = sorted(answers, key=lambda answer: (len(answer.prompt), answer.prompt))
    with prepacked(model, slots):
        while waiting or live:
            begin = 0  # the rows from here on go one token further
            if waiting and 4 * len(live) <= 3 * slots:  # a quarter is free: refill
                begin, room = len(live), PREFILL_TOKENS
                while waiting and len(live) < slots:
                    room -= len(waiting[-1].prompt)
                    if room < 0 and len(live) > begin:
                        break
                    live.append(waiting.pop())
            moving = live[begin:]
            if moving[0].tokens:
                logits = rows.step([answer.tokens[-1] for answer in moving])
            else:
                prompts = Prefill(rows, [answer.prompt for answer in moving], begin)
                hidden = model.hidden(prompts.input_ids, prompts, rows=prompts.last)
                logits = model.lm_head(hidden)
            yield logits, moving
            for row in reversed(range(begin, len(live))):
                if live[row].done:  # the last row fills the hole
                    rows.move(len(live) - 1, row)
                    live[row] = live[-1]
                    live.pop()
