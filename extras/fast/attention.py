"""Who attends to whom, sooner: shared beginnings, padded groups, torch's varlen kernel.

Documents that begin alike are laid out as a *stem*, which is what they share, and a *branch* each,
which is the rest. A branch sees its stem and itself, at the positions that it has behind the stem.

Shapes: N tokens, B rows, T queries of a row, S keys, H/K query/kv heads, Dh head dim.
"""

import functools
from collections import namedtuple
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model import attention

# a stem, a branch (`stem` is the number of its stem) or a whole document in the flat row, and the
# tokens that its last one sees
Segment = namedtuple("Segment", "begin size stem seen")


def on_gpu(device: torch.device | str) -> bool:
    """Whether a device is an NVIDIA GPU, or an AMD one under the same name."""
    return torch.device(device).type == "cuda"


def put(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy x from the CPU's memory to a device; nothing waits for a copy to a GPU."""
    if on_gpu(device):
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Branched:
    """Causal attention inside documents, groups of which may share a stem.

    groups: [(shared tokens or 0, [token ids of each document])]. `input_ids` is the flat row,
    `tokens` says where each document's tokens are in it, `before` (N,), on the CPU, which token
    each one follows. Indices are made when they are first needed, and serve every layer.
    """

    def __init__(self, groups: list[tuple[int, list[list[int]]]],
                 device: torch.device | str = "cpu"):
        self.device, self.input_ids, self.segments, self.tokens = device, [], [], []
        for stem, documents in groups:
            number, shared = None, range(len(self.input_ids), len(self.input_ids) + stem)
            if stem:
                number = len(self.segments)
                self.segments.append(Segment(shared.start, stem, None, shared))
                self.input_ids += documents[0][:stem]
            for ids in documents:
                begin, size = len(self.input_ids), len(ids) - stem
                self.tokens.append([*shared, *range(begin, begin + size)])
                self.segments.append(Segment(begin, size, number, self.tokens[-1]))
                self.input_ids += ids[stem:]
        positions, self.before = torch.zeros(2, len(self.input_ids), dtype=torch.long)  # (N,) each
        for tokens in map(torch.tensor, self.tokens):
            positions[tokens] = torch.arange(len(tokens))
            self.before[tokens[1:]] = tokens[:-1]
        self.position_ids = put(positions, device)  # (N,)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, Dh), k and v (N, K, Dh) -> (N, H, Dh)."""
        if varlen_serves(v):
            keys, *lengths = self.varlen
            if keys is not None:
                k, v = k.index_select(0, keys), v.index_select(0, keys)
            return varlen_attn(q.to(v.dtype), k.to(v.dtype), v, *lengths, window_size=(-1, 0),
                               enable_gqa=True)
        groups, places, inverse = self.groups
        sizes, out = [segment.size for segment in self.segments], []
        stems_k, stems_v = k.split(sizes), v.split(sizes)
        numbers = [shape.numel() for shape, _ in groups]
        rows = [x.index_select(0, places).split(numbers) for x in (q, k, v)]
        for (shape, stem), *own in zip(groups, *rows, strict=True):
            own = [x.unflatten(0, shape) for x in own]  # (B, T, H or K, Dh) each
            if stem is None:
                out.append(attend_causally(*own))
            else:
                out.append(attend_beyond(*own, stems_k[stem], stems_v[stem]))
        return torch.cat(out).index_select(0, inverse)

    @functools.cached_property
    @torch.inference_mode(False)  # so that a later pass with gradients can use them, too
    def groups(self) -> tuple[list[tuple], Tensor, Tensor]:
        """[(shape (B, T), stem)] of right-padded rows; their tokens; the place of each token."""
        families, shapes, places, offset = {}, [], [], 0
        for segment in self.segments:  # the branches of each stem, and all else
            families.setdefault(segment.stem, []).append(segment)
        inverse = torch.empty(len(self.before), dtype=torch.long)  # (N,)
        for stem, family in families.items():
            for tokens, real in padded_rows(family):
                shapes.append((tokens.shape, stem))
                places.append(tokens.flatten())
                inverse[tokens[real]] = offset + real.flatten().nonzero().squeeze(1)
                offset += tokens.numel()
        return shapes, put(torch.cat(places), self.device), put(inverse, self.device)

    @functools.cached_property
    @torch.inference_mode(False)
    def varlen(self) -> tuple:
        """What varlen_attn takes: the tokens that are keys (None: all), ends, longest lengths.

        It aligns the causal mask with the last key, so a branch sees all of its stem.
        """
        sizes = [segment.size for segment in self.segments]
        seen = [len(segment.seen) for segment in self.segments]
        ends = [F.pad(torch.tensor(x).cumsum(0), (1, 0)).int() for x in (sizes, seen)]  # (B + 1,)
        keys = torch.tensor([token for segment in self.segments for token in segment.seen])
        keys = put(keys, self.device) if sizes != seen else None
        return keys, *(put(end, self.device) for end in ends), max(sizes), max(seen)


def varlen_attn(q: Tensor, k: Tensor, v: Tensor, *lengths, **named) -> Tensor:
    """torch's kernel, which is imported late: that takes half a second."""
    from torch.nn.attention import varlen

    return varlen.varlen_attn(q, k, v, *lengths, **named)


def varlen_serves(v: Tensor) -> bool:
    """Whether varlen_attn takes v (N, K, Dh); its causal mask is known on NVIDIA's GPUs only."""
    if not on_gpu(v.device) or torch.version.hip or v.dtype.itemsize != 2:
        return False
    recent = torch.cuda.get_device_capability(v.device) >= (8, 0)
    return recent and v.shape[-1] % 8 == 0 and v.shape[-1] <= 128


def padded_rows(segments: list[Segment], ratio: float = 0.75) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the token at each place of rows of similar length, and whether it is real: (B, T).

    Padding repeats a row's last token; causality hides it, so no mask is needed.
    """
    order, first = sorted(range(len(segments)), key=lambda i: -segments[i].size), 0
    for end in range(1, len(order) + 1):
        longest = segments[order[first]].size
        if end == len(order) or segments[order[end]].size < ratio * longest:
            group = torch.tensor([segments[i][:2] for i in sorted(order[first:end])])  # (B, 2)
            begins, sizes, columns = group[:, :1], group[:, 1:], torch.arange(longest)
            yield begins + torch.minimum(columns, sizes - 1), columns < sizes
            first = end


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows over themselves: q (B, T, H, Dh), k and v (B, T, K, Dh) -> (B * T, H, Dh)."""
    if not in_pieces(q, k):
        return attention(q, k, v, is_causal=True).flatten(0, 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T, Dh)
    group, T = q.shape[1] // k.shape[1], q.shape[2]
    # query heads that share a key head become more queries of it
    rows = q.unflatten(1, (-1, group)).flatten(2, 3)  # (B, K, H/K * T, Dh)
    seen = torch.ones(T, T, dtype=torch.bool).tril().repeat(group, 1)  # (H/K * T, T)
    return attend_in_pieces(rows, k, v, seen).view(q.shape).transpose(1, 2).flatten(0, 1)


def attend_beyond(q: Tensor, k: Tensor, v: Tensor, stem_k: Tensor, stem_v: Tensor) -> Tensor:
    """Branches over their stem, (S, K, Dh), and themselves, as in `attend_causally`."""
    (B, T), K, S = q.shape[:2], k.shape[2], len(stem_k)
    k = torch.cat([stem_k.expand(B, -1, -1, -1), k], dim=1)  # (B, S + T, K, Dh)
    v = torch.cat([stem_v.expand(B, -1, -1, -1), v], dim=1)  # (B, S + T, K, Dh)
    attend = attend_in_pieces if in_pieces(q, k) else F.scaled_dot_product_attention
    q = q.unflatten(2, (K, -1)).transpose(1, 2).flatten(2, 3)  # (B, K, T * H/K, Dh)
    columns = torch.arange(S + T, device=q.device)
    seen = (columns <= columns[S:, None]).repeat_interleave(q.shape[2] // T, dim=0)
    out = attend(q, k.transpose(1, 2), v.transpose(1, 2), seen).unflatten(2, (T, -1))
    return out.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (B, K, T, H/K, Dh) -> (B * T, H, Dh)


def in_pieces(q: Tensor, k: Tensor) -> bool:
    """Whether `attend_in_pieces` is faster: in bfloat16 on a CPU, while the weights are few."""
    weights = q.shape[:3].numel() * k.shape[1]
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and weights <= 2**24


def attend_in_pieces(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention as two products: q (B, K, T, Dh), k, v (B, K, S, Dh), seen (T, S) -> q's shape."""
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, float("-inf"))  # (T, S)
    keys = k.flatten(0, 1).transpose(1, 2)  # (B * K, Dh, S)
    scores = torch.baddbmm(mask, q.flatten(0, 1), keys, alpha=q.shape[-1] ** -0.5)  # (B * K, T, S)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(q.shape)
