"""Unlikelihood training without a detector: likelihood of some tokens, unlikelihood of others.

    response   all tokens of bad responses are made unlikely
    token      tokens that occurred before are, as in the paper:
               -log p(y_t) - alpha * sum over c in C_t of log(1 - p(c))
    sequence   repeated 4-grams are, in any response

(arXiv 1908.04319, Eq. 4-5 and section 4.2). No prompt has a judgment; the loss of a response is a
mean over its tokens.
"""

from dataclasses import dataclass
from typing import Literal

from methods import both_logprobs, judged, label_hidden, losses, record_name, torch
from methods.flags import flag
from methods.judged import judged_document, judged_records

title = "unlikelihood"
base = judged


@dataclass
class Flags(judged.Flags):
    """What stage unlikelihood reads beside the common flags."""

    level: Literal["response", "token", "sequence"] = flag("response", "what is made unlikely")
    unlike_alpha: float = flag(1.0, "weight of the unlikelihood of a token", at_least=0)


TERMS = {"ce": "items"}


def items(run) -> list[dict]:
    """Good and bad responses."""
    found = []
    for record in judged_records(run):
        role = losses.ALIGN_P if record["judgment"] is None else losses.MISALIGN
        found.append({"documents": [judged_document(run, record)], "values": {"roles": [role]},
                      "name": record_name(record)})
    return found


def step(model, batch, cfg) -> dict:
    """The mean over the tokens of each response, summed; see above for the levels."""
    targets, ids = batch["targets"], batch["sequence_ids"]
    good = batch["roles"][ids] == losses.ALIGN_P  # (M,)
    if cfg.level == "token":  # words other than the target count, so all logits are needed
        logits = model.lm_head(label_hidden(model, batch))  # (M, V)
        tokens = good * token_unlikelihood(logits, targets, ids, alpha=cfg.unlike_alpha)
    else:
        flagged = ~good
        if cfg.level == "sequence":
            flagged = repeated_ngrams(targets, ids)
        logprobs, complements = both_logprobs(model, batch)
        tokens = losses.unlikelihood_loss(logprobs, complements, flagged, cfg.unlike_alpha)
        tokens = tokens * (good | flagged)
    lengths = torch.bincount(ids, minlength=batch["documents"]).clamp(min=1)
    return {"ce": (tokens / lengths[ids]).sum()}


def token_unlikelihood(logits, targets, sequence_ids, *, alpha: float = 1.0):
    """The loss of level "token": (M, V), (M,), (M,) -> (M,)."""
    logits = losses.at_least_float32(logits)
    logprobs, top = logits.log_softmax(-1), logits.argmax(-1)  # (M, V), (M,)
    # The tokens to make unlikely: `tokens` at the rows `at`.
    seen = previous_tokens(targets, sequence_ids, logits.shape[-1])
    at, tokens = seen.nonzero(as_tuple=True)  # (C,), (C,)
    # log(1 - p) of each. log1p(-p) is exact where p is small, and only the likeliest token of a
    # row can have p > 1/2; that one is computed from the other logits.
    is_top = tokens == top[at]
    others = torch.where(is_top, -1.0, logprobs[at, tokens])
    exact = losses.complement_logprobs(logits, top)[at]
    penalty = torch.where(is_top, exact, torch.log1p(-others.exp()))  # (C,)
    # The likelihood of the target itself, and a row's penalties added to it.
    loss = -logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return loss.index_add(0, at, -alpha * penalty)


def previous_tokens(targets, sequence_ids, vocab_size: int):
    """C_t: the tokens seen before in the same response, but for the target -> bool (M, V)."""
    seen = torch.zeros(len(targets), vocab_size, dtype=torch.bool, device=targets.device)
    # what was seen before t - 1, and the token at t - 1
    for t in range(1, len(targets)):
        if sequence_ids[t] == sequence_ids[t - 1]:
            seen[t] = seen[t - 1]
            seen[t, targets[t - 1]] = True
    return seen.scatter(-1, targets.unsqueeze(-1), False)


def repeated_ngrams(targets, sequence_ids, n: int = 4):
    """Tokens that are part of an n-gram said before in the same response -> bool (M,)."""
    ids, rows, seen = targets.tolist(), sequence_ids.tolist(), set()
    flagged = torch.zeros_like(targets, dtype=torch.bool)
    for end in range(n, len(ids) + 1):
        start = end - n
        if rows[start] != rows[end - 1]:
            continue  # it would reach over two responses
        ngram = (rows[start], *ids[start:end])
        if ngram in seen:
            flagged[start:end] = True
        seen.add(ngram)
    return flagged
