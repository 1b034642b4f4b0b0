"""The objectives of both papers and of DPO, as pure functions of tensors.

    cross_entropy            token-level likelihood            InstructGPT, arXiv 2203.02155
    pairwise_ranking_loss    hinge over pairs of responses     RRHF, arXiv 2304.05302, Eq. 2-3
    cat_loss                 ranking + lam * cross-entropy     CAT, arXiv 2403.14221
    cut_loss                 unlikelihood of wrong tokens      CUT, arXiv 2312.14591, Eq. 5-7
    dpo_loss                 logistic loss of preferences      DPO, arXiv 2305.18290, Eq. 7

The losses of the other methods stand in their files in `methods/`.

Shapes: B batch, T length, V vocabulary, M labelled tokens of a batch, n responses, P pairs.

A loss returns sums and counts: (sum, count), or {term: (sum, count)}. The training loop divides
a sum once, by the count of a whole step (TERMS of a method). To use a loss elsewhere, call the
functions that end in `_from_logits`: they check padded batches and return the mean loss.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


# ----- From labels to log-probabilities -----
def prediction_rows(labels: Tensor, before: Tensor | None = None,
                    ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Find the positions that predict the labelled tokens: position t - 1 predicts labels[t].

    `labels` is (N,) for documents laid end to end, or (B, T), aligned with input_ids. Returns
    `rows` (M,), indices into the N or B * T positions, and `targets` (M,), the ids to predict.
    `before` (N,) names the position that precedes each one, where that is not the one to its left
    (responses that share one copy of their prompt).

    The first token of a document must not carry a label, because it would be predicted from the
    document before. Raises ValueError if the first position of a row carries one.
    """
    if (labels[..., :1] != ignore_index).any():
        raise ValueError(f"the first of {labels.shape[-1]} positions carries a label, but nothing "
                         f"precedes it; set labels[..., 0] to {ignore_index}, as BOS is there.")
    flat = labels.reshape(-1)  # (B, T) -> (B * T,)
    positions = (flat != ignore_index).nonzero().squeeze(-1)  # (M,)
    rows = positions - 1 if before is None else before[positions]
    return rows, flat[positions]


def gathered_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target], in float32 at least: (M, V), (M,) -> (M,)."""
    logits = at_least_float32(logits)
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32, because log_softmax of it loses digits."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


def token_logprobs(logits: Tensor, labels: Tensor, *,
                   ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """log p(labels[t] | input_ids[<t]) of a padded batch.

    logits (B, T, V), labels (B, T) -> logprobs and mask, both (B, T - 1). Column t - 1 belongs to
    labels[t]; logprobs are 0 where the mask is False. Logits of padding are not looked at, so they
    may be anything. Raises ValueError for a label in the first column.
    """
    rows, targets = prediction_rows(labels, ignore_index=ignore_index)  # (M,), (M,)
    mask = labels[:, 1:] != ignore_index  # (B, T - 1)
    found = gathered_logprobs(logits.flatten(0, 1)[rows], targets)  # (M,)
    logprobs = found.new_zeros(mask.shape)
    logprobs[mask] = found  # both run through the rows from left to right
    return logprobs, mask


def sequence_logprobs(logprobs: Tensor, sequence_ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """S(y) = sum_t log p(y_t | x, y_<t) and the length N of each of n responses.

    logprobs (M,), sequence_ids (M,) in [0, n): the response that each token belongs to. Returns
    sums (n,) and lengths (n,); N counts the EOS token.
    """
    sums = logprobs.new_zeros(n).index_add(0, sequence_ids, logprobs)  # (n,)
    lengths = logprobs.new_zeros(n).index_add(0, sequence_ids, torch.ones_like(logprobs))  # (n,)
    return sums, lengths


# ----- Likelihood -----
def cross_entropy(logprobs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """L = -sum_t log p(y_t | x, y_<t). Returns the sum and the number of tokens.

    Takes the log-probabilities (M,) of labelled tokens, or both results of `token_logprobs`.
    """
    if mask is not None:
        logprobs = logprobs[mask]  # (B, T - 1) -> (M,)
    return (-logprobs).sum(), logprobs.numel()


# ----- Ranking: RRHF and CAT -----
def best_vs_lower_pairs(rewards: list[float | None], *, rule: str = "best",
                        best: float = 2) -> tuple[list[int], list[int]]:
    """Pairs (better, worse) among the responses to one question, as two lists of indices.

    rule "best": the better one has the reward `best`, the worse one less (CAT). rule "all": every
    pair of different rewards (RRHF). A reward of None, no verdict, takes part in no pair.
    """
    if rule not in ("best", "all"):
        raise ValueError(f"unknown pair rule {rule!r}; use 'best' or 'all'.")
    better, worse = [], []
    for i, high in enumerate(rewards):
        for j, low in enumerate(rewards):
            if high is None or low is None or not low < high:
                continue
            if rule == "all" or high == best:
                better.append(i)
                worse.append(j)
    return better, worse


def pairwise_ranking_loss(scores: Tensor, better: Tensor, worse: Tensor, *,
                          margin: float = 0.0) -> tuple[Tensor, int]:
    """L = sum over pairs of max(0, margin - p_better + p_worse)   RRHF, Eq. 3 (there margin = 0).

    scores (n,), length-normalised log-probabilities; better, worse (P,), indices into them.
    Returns the sum and P.
    """
    return torch.relu(margin - scores[better] + scores[worse]).sum(), better.numel()


def cat_loss(logprobs: Tensor, sequence_ids: Tensor, better: Tensor, worse: Tensor,
             weights: Tensor, *, lam: float = 1.0, margin: float = 0.0,
             length_normalize: bool = True) -> dict[str, tuple[Tensor, Tensor | int]]:
    """L = L_rank + lam * L_ce   CAT, arXiv 2403.14221; the form is that of RRHF, Eq. 5.

        p_i    = S(y_i) / N_i
        L_rank = sum over pairs of max(0, margin - p_better + p_worse)
        L_ce   = sum over responses of weight_i * -S(y_i)

    logprobs, sequence_ids (M,): the response tokens and the response each belongs to. better, worse
    (P,): indices of responses. weights (n,): 1 / (number of best responses in the group) on the
    best responses, 0 on the others, so that L_ce averages over a group's best responses.

    Returns {"rank": (sum, pairs), "ce": (lam * sum, weighted tokens)}: each sum is to be divided by
    its own count, and then the two are added.
    """
    weights = weights.to(logprobs)
    sums, lengths = sequence_logprobs(logprobs, sequence_ids, len(weights))  # (n,), (n,)
    scores = sums  # (n,)
    if length_normalize:
        scores = sums / lengths.clamp(min=1)
    rank = pairwise_ranking_loss(scores, better, worse, margin=margin)
    likelihood = (-lam * (weights * sums).sum(), (weights * lengths).sum())
    return {"rank": rank, "ce": likelihood}


# ----- Unlikelihood and CUT -----
ALIGN_P, ALIGN_N, MISALIGN = 0, 1, 2  # the role of a sequence in CUT


def complement_logprobs(logits: Tensor, targets: Tensor, *, clamp: float = 0.0) -> Tensor:
    """log(1 - p(target)), in float32 at least: (M, V), (M,) -> (M,).

    Computed as logsumexp of the other logits minus logsumexp of all. This is finite however sure
    the model is, and its gradient with respect to the target's logit is -p, so the surest mistakes
    are unlearned too. A `clamp` above 0 gives log(max(1 - p, clamp)), as published codes have it
    (arXiv 1908.04319: 1e-5); the gradient vanishes where the clamp applies.
    """
    logits = at_least_float32(logits)
    if clamp:
        return (1 - gathered_logprobs(logits, targets).exp()).clamp(min=clamp).log()
    others = logits.scatter(-1, targets.unsqueeze(-1), float("-inf"))  # (M, V)
    return others.logsumexp(-1) - logits.logsumexp(-1)


def unlikelihood_loss(logprobs: Tensor, complements: Tensor, flagged: Tensor,
                      weights: Tensor | float = 1.0) -> Tensor:
    """-log p of the tokens to keep, -weight * log(1 - p) of the flagged ones. All (M,) -> (M,).

    The two kinds of tokens in arXiv 1908.04319 and in CUT, Eq. 6; `flagged` is bool.
    """
    return -torch.where(flagged, weights * complements, logprobs)


def inappropriate_tokens(with_judgment: Tensor, without: Tensor, *, detect_lam: float = 1.1,
                         floor: float = 0.0) -> Tensor:
    """U = {t : p(y_t | x, j) > detect_lam * p(y_t | x)}   CUT, arXiv 2312.14591, Eq. 5.

    These are the tokens that the judgment makes likelier. with_judgment, without (K,): the
    log-probabilities of the same tokens with and without the judgment in the prompt. Returns a bool
    tensor (K,). `floor` drops tokens with p(y_t | x, j) at or below it, where the ratio is noise
    (DualCUT, arXiv 2412.20297).
    """
    with_judgment, without = with_judgment.detach(), without.detach()
    return (with_judgment - without > math.log(detect_lam)) & (with_judgment.exp() > floor)


def cut_loss(logprobs: Tensor, complements: Tensor, sequence_ids: Tensor, roles: Tensor,
             flagged: Tensor, *, alpha: float = 1.0, gamma: float = 0.0,
             scale: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """L = L1 + L2 over judged responses   CUT, arXiv 2312.14591, Eq. 5-7.

        ALIGN_P   x -> y     a satisfying response                       likelihood (L2)
        ALIGN_N   x, j -> y  a bad one, the judgment in the prompt       likelihood (L2)
        MISALIGN  x -> y     the same bad one, without the judgment      L1

        L1 = -(1/N) [ sum_{t not in U} log p_t + sum_{t in U} alpha * (p-_t)^gamma * log(1 - p_t) ]

    where p-_t is the probability under the judgment (without gradient) and p_t the one without.

    logprobs, sequence_ids (M,): all response tokens of all sequences. roles (n,). complements and
    flagged (K,): log(1 - p) of the K MISALIGN tokens, and whether they are in U (see
    `inappropriate_tokens`). The k-th ALIGN_N token must be the k-th MISALIGN token: the same
    responses in the same order. scale (n,): the weight of each sequence's tokens, by default 1 / N.

    Returns {"l1": (sum, responses), "l2": (sum, responses)}. Raises ValueError if the MISALIGN
    tokens are not as many as the ALIGN_N tokens (there may be no MISALIGN sequence at all).
    """
    role = roles[sequence_ids]  # (M,)
    with_judgment, without = logprobs[role == ALIGN_N], logprobs[role == MISALIGN]  # (K,), (K,)
    if len(without) not in (0, len(with_judgment)):
        raise ValueError(f"{len(with_judgment)} tokens with the judgment, {len(without)} without; "
                         "expected the same responses in the same order under both prompts.")
    if scale is None:
        lengths = sequence_logprobs(logprobs, sequence_ids, len(roles))[1]
        scale = 1 / lengths.clamp(min=1)  # (n,)
    scale = scale[sequence_ids]  # (n,) -> (M,)
    weights = alpha * with_judgment[: len(without)].detach().exp() ** gamma  # (K,)
    l1 = unlikelihood_loss(without, complements, flagged, weights)  # (K,)
    l2 = -logprobs[role != MISALIGN]  # (M - K,)
    responses = (roles != MISALIGN).sum()
    return {"l1": ((scale[role == MISALIGN] * l1).sum(), responses),
            "l2": ((scale[role != MISALIGN] * l2).sum(), responses)}


# ----- DPO -----
def preference_logits(scores: Tensor, reference: Tensor | float, better: Tensor,
                      worse: Tensor) -> Tensor:
    """h = [s(y_w) - s(y_l)] - [s_ref(y_w) - s_ref(y_l)]   DPO, arXiv 2305.18290, Eq. 7.

    scores, reference (n,): sums of log-probabilities (TRL's IPO takes means). A reference of 0.0
    means no reference model. better, worse (P,): indices of responses -> (P,).
    """
    gains = scores - reference  # (n,)
    return gains[better] - gains[worse]


def dpo_loss(h: Tensor, *, beta: float = 0.1,
             label_smoothing: Tensor | float = 0.0) -> tuple[Tensor, int]:
    """L = -(1 - e) log sigma(beta h) - e log sigma(-beta h)   DPO, Eq. 7, where e = 0.

    h (P,), see `preference_logits`. label_smoothing e, a number or (P,): the probability that a
    pair is in the wrong order (cDPO; soft labels of an AI judge). Returns the sum and P. RSO's, the
    robust and the IPO form of this loss are in methods/preference.py.
    """
    right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
    losses = -(1 - label_smoothing) * right - label_smoothing * wrong  # (P,)
    return losses.sum(), h.numel()


# ----- For use elsewhere: padded batches in, the mean loss out -----
def cat_loss_from_logits(logits: Tensor, labels: Tensor, pairs: list[tuple[int, int]], *,
                         rewards: list[float] | None = None, lam: float = 1.0,
                         margin: float = 0.0) -> Tensor:
    """The mean CAT loss of logits (B, T, V) and labels (B, T), -100 on prompts and padding.

    pairs: (better row, worse row); every better row is imitated. Give `rewards`, one per row, to
    have their order checked. Raises ValueError if shapes do not fit, a row has no response, or a
    pair is in the wrong order.
    """
    better, worse = check_pairs(pairs, labels, rewards)
    logprobs, mask = check_logprobs(logits, labels)  # (B, T - 1) twice
    weights = logprobs.new_zeros(len(labels)).index_fill(0, better, 1.0)
    rows = mask.nonzero()[:, 0]  # (M,): that of each token
    terms = cat_loss(logprobs[mask], rows, better, worse, weights, lam=lam, margin=margin)
    return sum(total / count for total, count in terms.values())


def cut_loss_from_logits(logits: Tensor, labels: Tensor, pairs: list[tuple[int, int]], *,
                         detect_lam: float = 1.1, alpha: float = 1.0) -> Tensor:
    """The mean CUT loss of logits (B, T, V), padded on the right; see `cut_loss`.

    pairs: (row with the judgment in its prompt, row of the same response without). Rows in no pair
    are satisfying responses. Raises ValueError if the responses of a pair differ, or if the first
    prompt is not the longer one, as happens when the two rows are swapped.
    """
    check_pairs(pairs, labels)
    logprobs, mask = check_logprobs(logits, labels)  # (B, T - 1) twice
    means = logprobs.sum(1) / mask.sum(1)  # (B,)
    aligned = set(range(len(labels))) - {second for _, second in pairs}
    total = -means[sorted(aligned)].sum()  # L2
    for first, second in pairs:
        targets = labels[second, 1:][mask[second]]  # (N,)
        if not torch.equal(labels[first, 1:][mask[first]], targets):
            raise ValueError(f"rows {first} and {second} are a pair, but their labels differ; "
                             "expected the same response in both.")
        if mask[first].int().argmax() <= mask[second].int().argmax():
            raise ValueError(f"row {first} should have the judgment in its prompt, but that is "
                             f"not longer than row {second}'s; swap them, and pad on the right.")
        judged, kept = logprobs[first][mask[first]], logprobs[second][mask[second]]
        flagged = inappropriate_tokens(judged, kept, detect_lam=detect_lam)  # (N,)
        complements = complement_logprobs(logits[second, :-1][mask[second]], targets)
        total = total + unlikelihood_loss(kept, complements, flagged, alpha).mean()  # L1
    return total / len(aligned)


def dpo_loss_from_logits(logits: Tensor, reference_logits: Tensor, labels: Tensor,
                         pairs: list[tuple[int, int]], *, rewards: list[float] | None = None,
                         beta: float = 0.1) -> Tensor:
    """The mean DPO loss of logits (B, T, V) of policy and reference; see `dpo_loss`.

    pairs: (chosen row, rejected row). Give `rewards`, one per row, to have the order of the pairs
    checked. Raises ValueError if shapes do not fit, a row has no response, or a pair is in the
    wrong order.
    """
    better, worse = check_pairs(pairs, labels, rewards)
    scores = check_logprobs(logits, labels)[0].sum(1)  # (B,)
    reference = check_logprobs(reference_logits, labels)[0].sum(1).detach()  # (B,)
    total, count = dpo_loss(preference_logits(scores, reference, better, worse), beta=beta)
    return total / count


def check_logprobs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of a batch whose shapes fit and whose rows all hold a response."""
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}; "
                         "expected (B, T, V) and (B, T), the labels not shifted.")
    logprobs, mask = token_logprobs(logits, labels)
    if not mask.any(1).all():
        raise ValueError("a row has no labelled token; expected a response in each row.")
    return logprobs, mask


def check_pairs(pairs, labels: Tensor, rewards=None) -> tuple[Tensor, Tensor]:
    """Pairs of rows as two index tensors (P,), (P,)."""
    n = len(labels)
    if not pairs or rewards is not None and len(rewards) != n:
        raise ValueError(f"expected at least one pair, and one reward per row ({n}) or none.")
    for first, second in pairs:
        if not (0 <= first < n and 0 <= second < n) or first == second:
            raise ValueError(f"pair ({first}, {second}) does not name two of the {n} rows.")
        if rewards is not None and not rewards[first] > rewards[second]:
            raise ValueError(f"pair ({first}, {second}) is in the wrong order: its rewards are "
                             f"{rewards[first]} and {rewards[second]}; put the better row first.")
    index = torch.tensor(pairs, device=labels.device)  # (P, 2)
    return index[:, 0], index[:, 1]
