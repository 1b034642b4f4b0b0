"""The course's model, faster in place: `accelerate` changes classes and moves no weight.

Names stay, so state dicts, deep copies, adapters and FSDP work as before. Shapes: N tokens, M
chosen tokens, D model dim.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import IGNORE_INDEX
from extras.fast.attention import Branched
from extras.fast.cpu import FastLinear
from extras.fast.head import HeadLogprobs
from extras.fast.keywords import keyword_logprobs
from extras.fast.sampling import decode
from model import Block, Llama, rotate


class FastBlock(Block):
    """A block that goes on with some tokens only, and multiplies as `prepacked` says."""

    products = None  # one for each of `groups`

    def groups(self) -> list[list[nn.Module]]:
        """Its linears; those in a group read the same numbers."""
        a, mlp = self.self_attn, self.mlp
        return [[a.q_proj, a.k_proj, a.v_proj], [a.o_proj], [mlp.gate_proj, mlp.up_proj],
                [mlp.down_proj]]

    def forward(self, x, attend, rope_cos, rope_sin, rows=None):
        """(N, D) -> (M, D). All tokens are attended to, but only `rows` (M,) go further."""
        if self.products:
            return self.forward_joined(x, attend, rope_cos, rope_sin, rows)
        if rows is None:
            return super().forward(x, attend, rope_cos, rope_sin)

        def attend_rows(*arguments):
            return attend(*arguments).index_select(0, rows)

        wanted = x.index_select(0, rows)  # (M, D)
        x = wanted + self.self_attn(self.input_layernorm(x), attend_rows, rope_cos, rope_sin)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward_joined(self, x, attend, rope_cos, rope_sin, rows):
        """As `forward`, by fewer and wider products."""
        qkv, o, gate_up, down = self.products
        a = self.self_attn
        heads = qkv(self.input_layernorm(x)).unflatten(-1, (-1, a.head_dim))  # (N, H + 2K, Dh)
        n_kv = a.k_proj.out_features // a.head_dim
        qk = rotate(heads[:, :-n_kv], rope_cos, rope_sin)  # (N, H + K, Dh)
        mixed = attend(a.layer, qk[:, :-n_kv], qk[:, -n_kv:], heads[:, -n_kv:]).flatten(1)
        if rows is not None:
            x, mixed = x.index_select(0, rows), mixed.index_select(0, rows)
        x = x + o(mixed)
        gate, up = gate_up(self.post_attention_layernorm(x)).chunk(2, dim=-1)  # (M, F) each
        return x + down(F.silu(gate) * up)


class FastLlama(Llama):
    """A `Llama` that `accelerate` has changed."""

    checkpointing = False  # whether the backward pass computes each block again, to save memory
    decode = decode
    keyword_logprobs = keyword_logprobs

    def hidden(self, input_ids: Tensor, attend: Callable, rows: Tensor | None = None) -> Tensor:
        """As `Llama.hidden`; the last block goes on with the wanted rows only."""
        x = self.model.embed_tokens(input_ids)  # (N, D)
        cos, sin = (table.to(x.dtype) for table in self.config.rope_tables(attend.position_ids))
        for block in self.model.layers:
            wanted = rows if block is self.model.layers[-1] else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attend, cos, sin, wanted, use_reentrant=False)
            else:
                x = block(x, attend, cos, sin, wanted)
        return self.model.norm(x)

    def lay_out(self, items: list[dict]) -> tuple[dict[str, list[int]], Branched]:
        """The documents of items {"documents": [...]} as one row, and who attends to whom.

        What the documents of an item share is laid down once if it is long enough to pay. The row
        has "input_ids", "labels", "sequence_ids" (N,), "ends" (where each document's last token
        lies) and "lengths" (of whole documents).
        """
        documents = [document for item in items for document in item["documents"]]
        groups = []
        for item in items:
            rows = [document["input_ids"] for document in item["documents"]]
            groups.append((shared_start(item["documents"]), rows))
        attend = Branched(groups, self.model.embed_tokens.weight.device)
        labels, owners = [IGNORE_INDEX] * len(attend.input_ids), [0] * len(attend.input_ids)
        for number, tokens in enumerate(attend.tokens):
            for token, label in zip(tokens, documents[number]["labels"], strict=True):
                labels[token], owners[token] = label, number
        row = {"input_ids": attend.input_ids, "labels": labels, "sequence_ids": owners,
               "ends": [x[-1] for x in attend.tokens], "lengths": [*map(len, attend.tokens)]}
        return row, attend

    def fused_logprobs(self, hidden: Tensor, targets: Tensor,
                       temperature: float = 1.0) -> tuple[Tensor, Tensor] | None:
        """log p(target), log(1 - p(target)) of hidden states (M, D): (M,), (M,), without logits.

        None where the head is trained or no plain linear.
        """
        head = self.lm_head
        if not isinstance(head, nn.Linear) or head.weight.requires_grad:
            return None
        return HeadLogprobs.apply(hidden, head.weight, targets, temperature)


def shared_start(documents: list[dict]) -> int:
    """How many unlabelled tokens all documents begin with; 0 if sharing saves under a quarter."""
    rows, most = [document["input_ids"] for document in documents], len(documents[0]["labels"]) - 1
    for document in documents:
        labels = document["labels"][:most + 1]
        most = next((i for i, x in enumerate(labels) if x != IGNORE_INDEX), len(labels) - 1)
    stem = next((i for i in range(most) if any(row[i] != rows[0][i] for row in rows)), most)
    if 4 * stem * (len(rows) - 1) < sum(map(len, rows)):
        return 0
    return stem


FASTER = {Llama: FastLlama, Block: FastBlock, nn.Linear: FastLinear}


def accelerate(model: Llama, *, checkpointing: bool = False) -> FastLlama:
    """Make a model of the course faster, in place; returns it. May be called again.

    Call it before weights are sharded. Adapters may be there, or come later.
    """
    for part in [model, *model.model.modules(), *model.lm_head.modules()]:
        part.__class__ = FASTER.get(type(part), type(part))
    model.checkpointing = checkpointing
    return model
