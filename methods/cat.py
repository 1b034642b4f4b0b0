"""Consistency alignment training (CAT): the second stage of consistency alignment.

    L = L_rank + lam * L_ce                                                  arXiv 2403.14221
    L_rank = sum over pairs of max(0, margin - p_better + p_worse),   p = S(y) / N
    L_ce   = likelihood of the best answers

Answers to one question under several wordings are rewarded 0, 1 or 2 (methods/candidates.py). A
best one, reward 2, is ranked above the others, and imitated. It stands under the wording of each
that it is ranked above, so that a pair answers one prompt (--condition).

DEVIATION: the others are taken --max-worse at a time, each time with a best answer drawn at random;
--pairs all adds the pairs among those.
"""

from dataclasses import dataclass
from typing import Literal

from methods import candidates, label_logprobs, losses
from methods.flags import flag, rare
from methods.groups import known_target
from methods.pairing import PairFlags, pair_items, ranked_item

title = "SFT(IA)+CAT"
base = candidates


@dataclass
class Flags(PairFlags):
    """What stage cat reads beside the common flags."""

    lam: float = flag(1.0, "weight of the cross-entropy term", at_least=0)
    length_normalize: bool = rare(True, "rank means of log-probabilities, not sums")
    margin: float = flag(0.0, "margin of the ranking term", at_least=0)
    ce_target: Literal["best", "gold"] = rare("best", "better answer: the best, or the reference")
    ranking: bool = rare(True, "use the ranking term; off: a control")


TERMS = {"rank": "pairs", "ce": lambda batch, cfg: float(weighted_tokens(batch))}


def items(run) -> list[dict]:
    """Items of best answers and the answers below them, from candidates.jsonl."""
    return pair_items(run, cat_item)


def step(model, batch, cfg) -> dict:
    """Ranking and cross-entropy over the items of a batch."""
    logprobs = label_logprobs(model, batch)  # (M,)
    terms = losses.cat_loss(logprobs, batch["sequence_ids"], batch["better"], batch["worse"],
                            batch["weights"], lam=cfg.lam, margin=cfg.margin,
                            length_normalize=cfg.length_normalize)
    return {term: total for term, (total, _) in terms.items()}


def weighted_tokens(batch):
    """The number of tokens of the best answers, weighted as the loss weighs them."""
    return batch["weights"][batch["sequence_ids"]].sum()


def cat_item(run, best: dict, worse: list[dict]) -> dict:
    """An item whose documents have weights: the best answer 1, or n copies of it 1 / n each."""
    cfg, good = run.cfg, best["response"]
    if cfg.ce_target == "gold":
        good = known_target(best)
    item, n_best = ranked_item(run, best, worse, good)
    n = len(item["documents"])
    item["values"] = {"weights": [1 / n_best] * n_best + [0.0] * (n - n_best)}
    if not cfg.ranking:
        item["indices"] = {"better": [], "worse": []}
    return item
