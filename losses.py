"""Every objective, as a pure function of tensors: shift, log-probabilities, likelihood, ranking, unlikelihood, preferences.

Methods:
    cross_entropy            token-level likelihood                     arXiv 2203.02155 (the SFT step of InstructGPT)
    pairwise_ranking_loss    hinge over pairs of responses              RRHF, arXiv 2304.05302, Eq. 2-3
    cat_loss                 ranking + lam * cross-entropy              CAT, arXiv 2403.14221; form of RRHF, Eq. 5
    cut_loss                 unlikelihood of inappropriate tokens       CUT, arXiv 2312.14591, Eq. 5-7
    token_unlikelihood       of tokens said before                      arXiv 1908.04319, Eq. 5
    dpo_loss                 DPO, cDPO, robust, IPO, RSO's hinge        arXiv 2305.18290, 2403.00409, 2310.12036, 2309.06657
    slic_loss                hinge of sums + lam * likelihood           SLiC-HF, arXiv 2305.10425
    pro_loss                 a softmax over falling rewards             PRO, arXiv 2306.17492
    reward_loss              Bradley-Terry, hard or soft labels         arXiv 2203.02155, Eq. 1; RLAIF, 2309.00267
    ppo_policy_loss          clipped ratio; with ppo_value_loss, gae    PPO, arXiv 1707.06347; for text 1909.08593

    B batch   T length   V vocabulary   N positions of a packed row   M labelled positions   n responses   P pairs

A loss returns (sum, count). The training loop divides once, by the count over micro-batches and ranks; so an empty
batch adds 0 / 0 tokens and no NaN. A count is an int, or where it depends on numbers a 0-dim tensor, so that no GPU is
waited for. Only `prediction_rows` shifts; all other functions work on what it selected:

    rows, targets = prediction_rows(labels)                # before the forward pass
    logprobs = gathered_logprobs(head(hidden[rows]), targets)
    loss_sum, count = cross_entropy(logprobs)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# From labels to log-probabilities


def prediction_rows(labels: Tensor, before: Tensor | None = None, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Where the labelled tokens are predicted: the one place that shifts (position t-1 predicts labels[t]).

    labels (B, T), or (N,) for a packed row, aligned with input_ids -> rows (M,) into the flat (B*T,) or (N,)
    positions, and targets (M,), the token ids there. Raises ValueError for a label that no position precedes.
    In a packed row the caller guarantees that the first token of every document carries no label: lengths are not
    known here, and such a label would be predicted from the document before. `before` (N,) names the position before
    each, where that is another one: responses that share their prompt all begin behind its last token.
    """
    if (labels[..., :1] != ignore_index).any():
        raise ValueError(f"the first of {labels.shape[-1]} positions carries a label, but no position precedes it; "
                         f"set labels[..., 0] to {ignore_index} (usually the BOS token's place).")
    flat = labels.reshape(-1)                                      # (B, T) -> (B*T,)
    positions = (flat != ignore_index).nonzero().squeeze(-1)       # (M,)
    return positions - 1 if before is None else before[positions], flat[positions]


def gathered_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target]; logits (M, V), targets (M,) -> (M,), float32 or, for float64 logits, float64."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()                                    # log_softmax of half precision loses digits
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def head_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p(target) and log(1 - p(target)) straight from hidden states, for a head that is not trained.

    hidden (M, D), weight (V, D), targets (M,) -> (M,), (M,): gathered_logprobs and complement_logprobs of hidden weight^T /
    temperature, without keeping a logit: memory is that of a few hundred rows, and the gradient is formed on the way.
    """
    return _HeadLogprobs.apply(hidden, weight, targets, temperature)


def head_rows(device: str) -> int:
    """How many rows of logits exist at a time: on a CPU as many as its cache holds."""
    return 256 if device == "cpu" else 4096


class _HeadLogprobs(torch.autograd.Function):
    """With q the distribution over the words other than the target y, and u = (W_y - q W) / temperature,

        d log p_y / d h = (1 - p_y) u        d log(1 - p_y) / d h = -p_y u

    so one vector per row serves both, and nothing cancels where p_y is nearly 1.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        rows = head_rows(hidden.device.type)
        found, slopes = [], []
        for h, y in zip(hidden.split(rows), targets.split(rows)):
            logits = h @ weight.T                                  # (m, V)
            logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            logits = logits if temperature == 1 else logits.div_(temperature)
            own = logits.gather(1, y[:, None])                     # (m, 1)
            logits.scatter_(1, y[:, None], float("-inf"))
            others = logits.logsumexp(1, keepdim=True)             # (m, 1)
            whole = torch.logaddexp(own, others)                   # (m, 1)
            found.append(torch.cat([own - whole, others - whole], dim=1))
            if ctx.needs_input_grad[0]:
                share = logits.sub_(others).exp_().to(weight.dtype)        # q, (m, V)
                slopes.append((weight[y] - share @ weight) / temperature)
        logprobs, complements = torch.cat(found).unbind(1) if found else (hidden.new_zeros(0),) * 2
        if slopes:
            ctx.save_for_backward(torch.cat(slopes), logprobs, complements)
        return logprobs, complements

    @staticmethod
    def backward(ctx, grad_logprobs, grad_complements):
        if not ctx.saved_tensors:                                  # no rows, or nobody asked
            return None, None, None, None
        slopes, logprobs, complements = ctx.saved_tensors
        strength = grad_logprobs * complements.exp() - grad_complements * logprobs.exp()       # (M,)
        return strength[:, None].to(slopes.dtype) * slopes, None, None, None


def token_logprobs(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """log p(labels[t] | input_ids[<t]) for padded batches; logits (B, T, V), labels (B, T) -> logprobs, mask, (B, T-1).

    Column t-1 belongs to labels[t]; logprobs are 0 where the mask is False.
    """
    rows, targets = prediction_rows(labels, ignore_index=ignore_index)
    picked = gathered_logprobs(logits.flatten(0, 1)[rows], targets)                             # (M,)
    logprobs = picked.new_zeros(labels.numel()).index_copy(0, rows, picked).view_as(labels)     # (B, T)
    mask = torch.zeros_like(labels, dtype=torch.bool).view(-1).index_fill(0, rows, True).view_as(labels)
    return logprobs[:, :-1], mask[:, :-1]                          # the last column predicts nothing


def sequence_logprobs(logprobs: Tensor, sequence_ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """S(y) = sum_t log p(y_t | x, y_<t) and the length N of each of n responses (EOS counted).

    logprobs (M,), sequence_ids (M,) in [0, n) -> sums (n,), lengths (n,). Length-normalised: sums / lengths.
    """
    sums = logprobs.new_zeros(n).index_add(0, sequence_ids, logprobs)                           # (n,)
    lengths = logprobs.new_zeros(n).index_add(0, sequence_ids, torch.ones_like(logprobs))       # (n,)
    return sums, lengths


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood


def cross_entropy(logprobs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """L = -sum_t log p(y_t | x, y_<t); sum / count is the token mean of arXiv 2203.02155.

    Either logprobs (M,) of labelled tokens alone, or `cross_entropy(*token_logprobs(logits, labels))`: logprobs and
    mask of any one shape. Returns the sum and the number of tokens; without tokens, 0 (with a gradient) and 0.
    """
    if mask is not None:
        logprobs = logprobs[mask]                                  # (B, T-1) -> (M,)
    return (-logprobs).sum(), logprobs.numel()


# ---------------------------------------------------------------------------------------------------------------------
# Ranking: RRHF and CAT


def best_vs_lower_pairs(rewards: list[float], *, rule: str = "best", best: float = 2) -> tuple[list[int], list[int]]:
    """Pairs (i better than j) within one group of responses to one question, as two index lists.

    rule "best": r_i = best and r_j < best (arXiv 2403.14221); "all": r_i > r_j (arXiv 2304.05302).
    A reward of None (no verdict) is in no pair. Equal rewards make none, so both lists may be empty.
    """
    if rule not in ("best", "all"):
        raise ValueError(f"pair rule {rule!r} is unknown; use 'best' or 'all'.")
    known = [(i, reward) for i, reward in enumerate(rewards) if reward is not None]
    pairs = [(i, j) for i, high in known for j, low in known if low < high and (rule == "all" or high == best)]
    return [i for i, _ in pairs], [j for _, j in pairs]


def cat_targets(groups: list[list[float]], *, rule: str = "best", best: float = 2) -> tuple[Tensor, Tensor, Tensor]:
    """What `cat_loss` needs to know of a batch of groups, from their rewards; the groups' responses lie end to end.

    Returns better (P,) and worse (P,), indices into all n responses, and weights (n,): 1 / (number of best responses
    of the group) on those, 0 elsewhere. A group without a pair gets weights 0, so that it takes no part at all.
    """
    better, worse, weights = [], [], []
    for rewards in groups:
        offset = len(weights)
        high, low = best_vs_lower_pairs(rewards, rule=rule, best=best)
        better += [offset + i for i in high]
        worse += [offset + i for i in low]
        top = max((rewards[i] for i in high), default=None)        # = best under rule "best", the maximum under "all"
        chosen = {i for i in high if rewards[i] == top}
        weights += [1 / len(chosen) if i in chosen else 0.0 for i in range(len(rewards))]
    return (torch.tensor(better, dtype=torch.long), torch.tensor(worse, dtype=torch.long),
            torch.tensor(weights, dtype=torch.float64))


def pairwise_ranking_loss(scores: Tensor, better: Tensor, worse: Tensor, *, margin: float = 0.0) -> tuple[Tensor, int]:
    """L = sum over pairs of max(0, margin - p_better + p_worse)   RRHF, arXiv 2304.05302, Eq. 3 (there margin = 0).

    scores (n,), length-normalised log-probabilities; better, worse (P,) indices. Returns the sum and P.
    """
    return torch.relu(margin - scores[better] + scores[worse]).sum(), better.numel()


def cat_loss(logprobs: Tensor, sequence_ids: Tensor, better: Tensor, worse: Tensor, weights: Tensor, *,
             lam: float = 1.0, margin: float = 0.0) -> dict[str, tuple[Tensor, Tensor | int]]:
    """L = L_rank + lam * L_ce   CAT, arXiv 2403.14221 (the form is RRHF's Eq. 5; lam weighs the cross-entropy).

        p_i    = S(y_i) / N_i
        L_rank = sum over pairs of max(0, margin - p_better + p_worse)
        L_ce   = sum over responses of weight_i * -S(y_i)          the mean over a group's best responses

    logprobs (M,) of response tokens, sequence_ids (M,) the response of each; better, worse (P,) and weights (n,) as
    `cat_targets` makes them. Returns {"rank": (sum, pairs), "ce": (lam * sum, weighted tokens)}: lam is inside the sum
    and not in the count, so that a loop adds the terms as they are, each over its own total. The undivided sums of
    one group with rule="all" and lam=1 add up to RRHF's loss.
    """
    weights = weights.to(logprobs)
    sums, lengths = sequence_logprobs(logprobs, sequence_ids, len(weights))                     # (n,), (n,)
    rank = pairwise_ranking_loss(sums / lengths.clamp(min=1), better, worse, margin=margin)
    return {"rank": rank, "ce": (-lam * (weights * sums).sum(), (weights * lengths).sum())}


# ---------------------------------------------------------------------------------------------------------------------
# Unlikelihood and CUT

ALIGN_P, ALIGN_N, MISALIGN = 0, 1, 2                               # what a document of a CUT batch is; see cut_loss


def complement_logprobs(logits: Tensor, targets: Tensor, *, clamp: float = 0.0) -> Tensor:
    """log(1 - p(target)); logits (M, V), targets (M,) -> (M,), float32 or, for float64 logits, float64.

    logsumexp of the other logits minus logsumexp of all: finite however sure the model is, and its gradient with
    respect to the target's own logit is -p, so that the surest mistakes are unlearned, too. `clamp` > 0 gives
    log(max(1 - p, clamp)) instead, as published codes have it (arXiv 1908.04319: 1e-5); its gradient vanishes there.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if clamp:
        return (1 - gathered_logprobs(logits, targets).exp()).clamp(min=clamp).log()
    others = logits.scatter(-1, targets.unsqueeze(-1), float("-inf"))                           # (M, V)
    return others.logsumexp(-1) - logits.logsumexp(-1)


def unlikelihood_loss(logprobs: Tensor, complements: Tensor, flagged: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """-log p of the tokens to keep, -weight * log(1 - p) of the flagged ones   (arXiv 1908.04319; CUT Eq. 6).

    logprobs, complements, flagged (bool), weights: (M,) -> (M,), one loss per token, to be summed or averaged.
    """
    return -torch.where(flagged, weights * complements, logprobs)


def inappropriate_tokens(judged: Tensor, plain: Tensor, *, lam: float = 1.1, floor: float = 0.0) -> Tensor:
    """U = {t : p(y_t | x, j) > lam * p(y_t | x)}: the tokens that the judgment makes likelier   CUT, 2312.14591, Eq. 5.

    judged, plain (M,): log-probabilities of the same tokens with and without the judgment -> bool (M,), no gradient.
    `floor` drops tokens with p(y_t | x, j) at or below it, where the ratio is noise (DualCUT, arXiv 2412.20297).
    """
    judged, plain = judged.detach(), plain.detach()
    return (judged - plain > math.log(lam)) & (judged.exp() > floor)


def cut_loss(logprobs: Tensor, complements: Tensor, sequence_ids: Tensor, roles: Tensor, *, lam: float = 1.1,
             alpha: float = 1.0, gamma: float = 0.0, floor: float = 0.0, combine: str = "sum",
             reduction: str = "mean_per_sequence", flagged: Tensor | None = None, use_judged: bool = True) -> dict[str, tuple[Tensor, Tensor | int]]:
    """L = L1 + L2 over judged responses   CUT, arXiv 2312.14591, Eq. 5-7.

        ALIGN_P   x -> y       a good response under the plain prompt            likelihood (L2, first part)
        ALIGN_N   x, j -> y    a bad one under the prompt with its judgment      likelihood (L2, second part)
        MISALIGN  x -> y       the same bad one under the plain prompt           L1: unlikelihood on U, likelihood else

        L1 = -(1/N) [ sum_{t not in U} log p_t + sum_{t in U} alpha * (p-_t)^gamma * log(1 - p_t) ]

    with p-_t under the judgment (detached) and p_t without. logprobs, sequence_ids (M,) and roles (n,), on all response
    tokens of all documents; complements (K,) = log(1 - p) on the K MISALIGN tokens. The k-th ALIGN_N token is the k-th
    MISALIGN token: the same response under two prompts. `flagged` (K,) replaces the detection, e.g. by a frozen model's;
    use_judged=False drops the second part of L2 (an ablation) and keeps the detection.

    Variants. combine "sum", or "half": (L1 + L2) / 2 for judged responses, as in the authors' code. reduction
    "mean_per_sequence": 1/N each, count = number of responses; "token": a token mean, where "half" halves everything
    if anything in this call is judged (the authors' code beyond a micro-batch of one: there the way in which a step is cut
    into micro-batches matters). gamma 0: constant weight, as in their code.
    Returns {"l1": (sum, count), "l2": (sum, count), "flagged": (number, K)}, the last for the log.
    """
    if combine not in ("sum", "half") or reduction not in ("mean_per_sequence", "token"):
        raise ValueError(f"CUT with combine={combine!r}, reduction={reduction!r}: use sum or half, and "
                         "mean_per_sequence or token.")
    role = roles[sequence_ids]                                                                  # (M,)
    told, untold = logprobs[role == ALIGN_N], logprobs[role == MISALIGN]                        # (K,), (K,)
    told = told[:len(untold)]                                      # without MISALIGN documents L1 is empty
    if flagged is None:
        flagged = inappropriate_tokens(told, untold, lam=lam, floor=floor)
    l1 = unlikelihood_loss(untold, complements, flagged, alpha * told.detach().exp() ** gamma)  # (K,)
    l2 = -logprobs[role != MISALIGN]
    lengths = sequence_logprobs(logprobs, sequence_ids, len(roles))[1].clamp(min=1)             # (n,)
    n = ((roles != MISALIGN).sum(),) * 2
    scale = 1 / lengths
    if reduction == "token":
        scale, n = torch.ones_like(lengths), (l1.numel(), l2.numel())
    if combine == "half":
        halved = (roles != ALIGN_P) if reduction == "mean_per_sequence" else (roles == ALIGN_N).any().expand_as(roles)
        scale = torch.where(halved, scale / 2, scale)
    if not use_judged:
        scale = torch.where(roles == ALIGN_N, 0.0, scale)
    scale = scale[sequence_ids]                                                                 # (M,)
    return {"l1": ((scale[role == MISALIGN] * l1).sum(), n[0]), "l2": ((scale[role != MISALIGN] * l2).sum(), n[1]),
            "flagged": (flagged.sum().to(logprobs), flagged.numel())}


def previous_tokens(targets: Tensor, sequence_ids: Tensor, vocab_size: int) -> Tensor:
    """C_t of token-level unlikelihood: the tokens seen before in the same response, the target apart -> bool (M, V).

    targets, sequence_ids (M,). arXiv 1908.04319, section 4.1 (previous context tokens).
    """
    seen = torch.zeros(len(targets), vocab_size, dtype=torch.bool, device=targets.device)
    for t in range(1, len(targets)):
        if sequence_ids[t] == sequence_ids[t - 1]:
            seen[t] = seen[t - 1]
            seen[t, targets[t - 1]] = True
    return seen.scatter(-1, targets.unsqueeze(-1), False)


def repeated_ngrams(targets: Tensor, sequence_ids: Tensor, n: int = 4) -> Tensor:
    """Tokens that are part of an n-gram which stood before in the same response -> bool (M,).

    What sequence-level unlikelihood penalises (arXiv 1908.04319, section 4.2; n = 4 in its code).
    """
    flagged, seen = torch.zeros(len(targets), dtype=torch.bool, device=targets.device), set()
    ids, rows = targets.tolist(), sequence_ids.tolist()
    for end in range(n, len(ids) + 1):
        if rows[end - n] == rows[end - 1]:
            ngram = (rows[end - 1], *ids[end - n:end])
            if ngram in seen:
                flagged[end - n:end] = True
            seen.add(ngram)
    return flagged


def token_unlikelihood(logits: Tensor, targets: Tensor, sequence_ids: Tensor, *, alpha: float = 1.0) -> Tensor:
    """-log p(y_t) - alpha * sum over c in C_t of log(1 - p(c))   arXiv 1908.04319, Eq. 5; (M, V), (M,), (M,) -> (M,)."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    logprobs, top = logits.log_softmax(-1), logits.argmax(-1)                                   # (M, V), (M,)
    at, tokens = previous_tokens(targets, sequence_ids, logits.shape[-1]).nonzero(as_tuple=True)    # (C,), (C,)
    is_top = tokens == top[at]                                     # only a row's likeliest token can have p > 1/2
    others = torch.where(is_top, -1.0, logprobs[at, tokens])
    penalty = torch.where(is_top, complement_logprobs(logits, top)[at], torch.log1p(-others.exp()))    # (C,)
    loss = -logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return loss.index_add(0, at, -alpha * penalty)


# ---------------------------------------------------------------------------------------------------------------------
# Preferences: DPO and kin, SLiC, RRHF, PRO


def preference_logits(scores: Tensor, reference: Tensor | float, better: Tensor, worse: Tensor) -> Tensor:
    """h = [s(y_w) - s(y_l)] - [s_ref(y_w) - s_ref(y_l)]   DPO, arXiv 2305.18290, Eq. 7.

    scores, reference (n,), sums of log-probabilities (or means, for TRL's IPO); reference 0.0 is reference-free;
    better, worse (P,) indices -> (P,).
    """
    gains = scores - reference                                                                  # (n,)
    return gains[better] - gains[worse]


def dpo_loss(h: Tensor, *, beta: float = 0.1, kind: str = "sigmoid", label_smoothing: Tensor | float = 0.0) -> tuple[Tensor, int]:
    """The loss of preference logits h (P,); returns the sum and P.

        sigmoid   -(1-e) log sigma(beta h) - e log sigma(-beta h)               DPO; cDPO for e = label_smoothing > 0
        robust    [-(1-e) log sigma(beta h) + e log sigma(-beta h)] / (1 - 2e)  arXiv 2403.00409
        ipo       (h - 1 / (2 beta))^2                                          arXiv 2310.12036; there beta is tau
        hinge     max(0, 1 - beta h)                                            RSO's hinge-norm, arXiv 2309.06657, Eq. 10

    label_smoothing: a share below one half; or, with sigmoid, (P,) shares in [0, 1]: the soft labels of an AI judge, each
    its probability that the pair stands the wrong way round (RLAIF, arXiv 2309.00267).
    """
    e = label_smoothing
    if not (0 <= e < 0.5 if isinstance(e, (int, float)) else kind == "sigmoid" and ((0 <= e) & (e <= 1)).all()):
        raise ValueError(f"label smoothing {e} is no share below one half (soft labels, one per pair, go with sigmoid).")
    right, wrong = torch.nn.functional.logsigmoid(beta * h), torch.nn.functional.logsigmoid(-beta * h)
    if kind == "sigmoid":
        losses = -(1 - e) * right - e * wrong
    elif kind == "robust":
        losses = (-(1 - e) * right + e * wrong) / (1 - 2 * e)
    elif kind == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif kind == "hinge":
        losses = torch.relu(1 - beta * h)
    else:
        raise ValueError(f"preference loss {kind!r} is unknown; use sigmoid, robust, ipo or hinge.")
    return losses.sum(), h.numel()


def slic_loss(scores: Tensor, better: Tensor, worse: Tensor, target: Tensor, *, delta: float = 1.0,
              lam: float = 1.0) -> dict[str, tuple[Tensor, int]]:
    """L = max(0, delta - s(y_w) + s(y_l)) - lam * s(y_ref)   SLiC-HF, arXiv 2305.10425, as in RSO, Eq. 1.

    scores (n,) sums (or means: then rescale delta); better, worse (P,); target (P,) the response that each pair's
    regulariser imitates. Returns {"rank": (sum, P), "ce": (lam * sum, P)}.
    """
    return {"rank": pairwise_ranking_loss(scores, better, worse, margin=delta), "ce": (-lam * scores[target].sum(), target.numel())}


def pro_loss(scores: Tensor, rewards: Tensor | None = None) -> Tensor:
    """L_PRO of one group whose n responses stand best first   PRO, arXiv 2306.17492.

        sum_k { logsumexp(s_k max_i g_ki, {s_i g_ki}_{i>k}) - s_k max_i g_ki },  g_ki = r_k - r_i, or 1 without rewards

    scores (n,) length-normalised; rewards (n,) in falling order (a rise would turn the loss round: ValueError).
    """
    n = len(scores)
    if rewards is not None and (rewards[1:] > rewards[:-1]).any():
        raise ValueError("PRO wants a group's responses best first; sort them by reward.")
    total = scores.new_zeros(())
    for k in range(n - 1):
        gaps = scores.new_ones(n - 1 - k) if rewards is None else (rewards[k] - rewards[k + 1:]).to(scores)
        terms = torch.cat([(scores[k] * gaps.max()).reshape(1), scores[k + 1:] * gaps])         # (n - k,)
        total = total + terms.logsumexp(0) - terms[0]
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Reward models and PPO


def reward_loss(rewards: Tensor, better: Tensor, worse: Tensor, *, probability: Tensor | float = 1.0,
                weights: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """L = -q log sigma(r_w - r_l) - (1 - q) log sigma(r_l - r_w)   arXiv 2203.02155, Eq. 1 (there q = 1).

    rewards (n,), scalars of a head; better, worse (P,); probability q that the first is really better, (P,) or a
    number: soft labels of an AI judge (RLAIF, arXiv 2309.00267). weights (P,): for K-wise comparisons 1 / C(K, 2), so
    that every prompt counts once however many of its pairs there are. Returns the sum and the sum of the weights.
    """
    delta = rewards[better] - rewards[worse]                                                    # (P,)
    log_sigmoid = torch.nn.functional.logsigmoid
    losses = -probability * log_sigmoid(delta) - (1 - probability) * log_sigmoid(-delta)
    return (weights * losses).sum(), (weights * torch.ones_like(delta)).sum()


def shaped_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, sequence_ids: Tensor, *, beta: float) -> Tensor:
    """r_t = -beta (log pi_old - log pi_ref)_t, and the response's score on its last token   arXiv 1909.08593, Eq. 2.

    scores (n,); logprobs, reference (M,) of the sampled tokens; sequence_ids (M,), the response of each, without gaps
    between the tokens of one response -> (M,). The difference may be negative: its mean is the KL, clamping would bias it.
    """
    rewards = -beta * (logprobs - reference)                                                    # (M,)
    return rewards + scores[sequence_ids] * last_tokens(sequence_ids)


def last_tokens(sequence_ids: Tensor) -> Tensor:
    """True on the last token of every response; sequence_ids (M,) -> bool (M,)."""
    ends = torch.ones_like(sequence_ids, dtype=torch.bool)
    ends[:-1] = sequence_ids[1:] != sequence_ids[:-1]
    return ends


def gae(rewards: Tensor, values: Tensor, sequence_ids: Tensor, *, gamma: float = 1.0, lam: float = 1.0) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, arXiv 1506.02438, within each response; all (M,) -> advantages, returns (M,).

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   R_t = A_t + V_t

    V and A behind a response's last token are 0: the text ends there.
    """
    ends, earned, expected = last_tokens(sequence_ids).tolist(), rewards.tolist(), values.tolist()
    advantages, advantage, value = [0.0] * len(ends), 0.0, 0.0
    for t in reversed(range(len(ends))):
        advantage, value = (0.0, 0.0) if ends[t] else (advantage, value)
        advantage = earned[t] + gamma * value - expected[t] + gamma * lam * advantage
        advantages[t], value = advantage, expected[t]
    found = torch.tensor(advantages, dtype=values.dtype, device=values.device)
    return found, found + values


def whiten(values: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Unit variance, and mean 0 unless shift_mean is off (rewards keep their mean); (M,) -> (M,). Of one value: 0 or itself."""
    if len(values) < 2:
        return values - values.mean() if shift_mean else values
    mean = values.mean()
    white = (values - mean) * (values.var() + 1e-8).rsqrt()
    return white if shift_mean else white + mean


def ppo_policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, *, clip: float = 0.2) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = pi / pi_old   PPO, arXiv 1707.06347, Eq. 7; all (M,) -> (M,)."""
    ratio = (logprobs - old).clamp(max=80).exp()             # beyond, float32 overflows, and 0 * inf is no gradient
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def ppo_value_loss(values: Tensor, old: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), all (M,) -> (M,)   (AlpacaFarm, InstructGPT)."""
    clipped = torch.minimum(torch.maximum(values, old - clip), old + clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def adapted_beta(beta: float, kl: float, target: float, *, rate: float = 0.1) -> float:
    """beta (1 + rate * clip(kl / target - 1, -0.2, 0.2)): a proportional controller   arXiv 1909.08593, Eq. 3."""
    return beta * (1 + rate * min(0.2, max(-0.2, kl / target - 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Choosing among samples: best of n, RSO


def best_of_n(rewards: list[float], n: int, values: list[float] | None = None) -> float:
    """Expected reward of the best of n samples, without bias, from N >= n scored ones   WebGPT, arXiv 2112.09332.

        sum_{i=n}^{N} C(i-1, n-1) / C(N, n) * r_(i),   r_(1) <= ... <= r_(N)

    With `values`, the expected value of the sample that the rewards choose (what a proxy's choice is really worth).
    Samples of equal reward are chosen alike: they share their values' mean.
    """
    if not 1 <= n <= len(rewards):
        raise ValueError(f"best of {n} cannot be estimated from {len(rewards)} samples.")
    values, tied = rewards if values is None else values, {}
    for reward, value in zip(rewards, values, strict=True):
        tied.setdefault(reward, []).append(value)
    ordered = [sum(tied[reward]) / len(tied[reward]) for reward in sorted(rewards)]
    return sum(math.comb(i - 1, n - 1) * ordered[i - 1] for i in range(n, len(ordered) + 1)) / math.comb(len(ordered), n)


def best_of_n_kl(n: int) -> float:
    """KL of the best of n to the model it samples from, in nats: log n - (n - 1) / n, a bound where rewards tie."""
    return math.log(n) - (n - 1) / n


def rejection_sample(rewards: list[float], n: int, *, beta: float, rng) -> list[int]:
    """RSO's statistical rejection sampling, arXiv 2309.06657, Algorithm 1 -> indices of up to n accepted responses.

    In passes over the remaining responses each is accepted with probability exp((r - max r) / beta), the maximum taken
    once a pass; what was accepted leaves. beta -> 0 keeps the n best, a large beta the first n. Responses must be
    distinct texts: fewer than n give them all. rng is a random.Random.
    """
    if not beta > 0:
        raise ValueError(f"rejection sampling needs a positive beta, not {beta}.")
    left, accepted = list(range(len(rewards))), []
    while left and len(accepted) < n:
        top = max(rewards[i] for i in left)
        for i in list(left):
            if rng.random() < math.exp((rewards[i] - top) / beta):
                accepted.append(i)
                left.remove(i)
                if len(accepted) == n:
                    break
    return accepted
