"""Rank responses to align with human feedback (RRHF).

    L = sum over pairs of max(0, p_worse - p_better) - S(best),   p = S(y) / N

per question, unweighted and undivided   (arXiv 2304.05302, Eq. 3-5).

DEVIATION: this follows the paper; its released code divides by the padded length.
"""

from dataclasses import dataclass
from typing import Literal

from methods import candidates, document_logprobs, losses
from methods.flags import flag
from methods.ranking import RankFlags, ranking_items

title = "SFT(IA)+RRHF"
base = candidates


@dataclass
class Flags(RankFlags):
    """What stage rrhf reads beside the common flags."""

    ft_reduction: Literal["sum", "mean"] = flag("sum", "likelihood of the best answer, in tokens")


TERMS = {"rank": "items", "ce": "items"}
items = ranking_items


def step(model, batch, cfg) -> dict:
    """Ranking and likelihood, summed over the questions of a batch."""
    sums, lengths = document_logprobs(model, batch)  # (n,), (n,)
    rank, _ = losses.pairwise_ranking_loss(sums / lengths, batch["better"], batch["worse"])
    if cfg.ft_reduction == "mean":
        sums = sums / lengths
    return {"rank": rank, "ce": -(batch["weights"] * sums).sum()}
