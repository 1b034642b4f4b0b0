"""Sequence likelihood calibration from human feedback (SLiC-HF).

    L = max(0, delta - s(y_w) + s(y_l)) - lam * s(y_ref)                       arXiv 2305.10425

with s the sum of log-probabilities and delta = --margin. y_ref, which the second term imitates, is
the better answer, or with --ce-target gold the reference output.
"""

from dataclasses import dataclass
from typing import Literal

from methods import candidates, document_logprobs, losses
from methods.flags import flag, rare
from methods.groups import candidate_document, known_target
from methods.pairing import PairFlags, pair_items, ranked_item

title = "SFT(IA)+SLiC"
base = candidates


@dataclass
class Flags(PairFlags):
    """What stage slic reads beside the common flags."""

    lam: float = flag(1.0, "weight of the likelihood term", at_least=0)
    margin: float = flag(1.0, "delta, the margin of the ranking term", at_least=0)
    ce_target: Literal["best", "gold"] = rare("best", "imitate the better answer, or the reference")
    length_normalize: bool = rare(False, "means of log-probabilities instead of sums")


TERMS = {"rank": "pairs", "ce": "pairs"}


def items(run) -> list[dict]:
    """The items of CAT, each with the document that every pair's second term imitates."""
    return pair_items(run, slic_item)


def slic_item(run, best: dict, worse: list[dict]) -> dict:
    """An item of CAT with "imitated": for each pair the document of its second term."""
    item, _ = ranked_item(run, best, worse, best["response"])
    imitated, wording = item["indices"]["better"], best["wording"]
    if run.cfg.ce_target == "gold":  # one more document, which all pairs share
        if run.cfg.condition == "original":
            wording = best["instruction"]
        elif run.cfg.condition == "worse":
            wording = worse[0]["wording"]
        gold = best | {"wording": wording, "response": known_target(best)}
        item["documents"].append(candidate_document(run, gold))
        imitated = [len(item["documents"]) - 1] * len(imitated)
    item["indices"]["imitated"] = list(imitated)
    return item


def step(model, batch, cfg) -> dict:
    """Hinge and likelihood over the pairs of a batch."""
    scores, lengths = document_logprobs(model, batch)  # (n,), (n,)
    if cfg.length_normalize:
        scores = scores / lengths
    rank, _ = losses.pairwise_ranking_loss(scores, batch["better"], batch["worse"],
                                           margin=cfg.margin)
    return {"rank": rank, "ce": -cfg.lam * scores[batch["imitated"]].sum()}
