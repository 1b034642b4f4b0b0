"""Preference ranking optimisation (PRO): a softmax over all answers below, rank by rank.

    L = sum_k { logsumexp(s_k max_i g_ki, {s_i g_ki}_{i > k}) - s_k max_i g_ki }
        + sft_weight (n - 1)^2 * -S(best)                                      arXiv 2306.17492

for the n answers to a question, best first: s = S(y) / N, g_ki = r_k - r_i, or 1 without rewards.
"""

from dataclasses import dataclass

from methods import candidates, document_logprobs, torch
from methods.flags import flag
from methods.ranking import RankFlags, ranking_items

title = "SFT(IA)+PRO"
base = candidates


@dataclass
class Flags(RankFlags):
    """What stage pro reads beside the common flags."""

    use_rewards: bool = flag(True, "gaps between rewards as temperatures; off: every gap is 1")
    sft_weight: float = flag(0.05, "weight of the best answer's likelihood, times (n - 1)^2")


TERMS = {"rank": "items", "ce": "items"}
items = ranking_items


def step(model, batch, cfg) -> dict:
    """Both terms, summed over the questions of a batch."""
    sums, lengths = document_logprobs(model, batch)  # (n,), (n,)
    rank, ce = sums.new_zeros(()), sums.new_zeros(())
    starts = batch["best"].tolist()  # a question's documents begin with its best answer
    for start, end in zip(starts, [*starts[1:], len(sums)], strict=True):
        rewards = batch["rewards"][start:end] if cfg.use_rewards else None
        rank = rank + pro_loss((sums / lengths)[start:end], rewards)
        ce = ce - cfg.sft_weight * (end - start - 1) ** 2 * sums[start]
    return {"rank": rank, "ce": ce}


def pro_loss(scores, rewards=None):
    """The first term for one question. scores, rewards (n,) in falling order of reward.

    Raises ValueError if rewards increase, which would reverse the loss.
    """
    if rewards is not None and (rewards[1:] > rewards[:-1]).any():
        raise ValueError("PRO takes a question's answers best first; sort them by reward.")
    total = scores.new_zeros(())
    for k in range(len(scores) - 1):
        gaps = scores.new_ones(len(scores) - 1 - k)
        if rewards is not None:
            gaps = (rewards[k] - rewards[k + 1:]).to(scores)
        own = (scores[k] * gaps.max()).reshape(1)
        terms = torch.cat([own, scores[k + 1:] * gaps])  # (n - k,)
        total = total + terms.logsumexp(0) - terms[0]
    return total
