"""Contrastive unlikelihood training (CUT): a judgment tells which tokens were wrong.

Each judged response becomes up to two examples   (arXiv 2312.14591):
    ALIGN_P   instruction -> a satisfying response                likelihood
    ALIGN_N   instruction, judgment -> the bad response           likelihood: it fits the judgment
    MISALIGN  instruction -> the same bad response                unlikelihood of its wrong tokens

A token is wrong where the judgment makes it likelier: p(token | judgment) > lambda * p(token).
"""

from dataclasses import dataclass
from typing import Literal

from methods import both_logprobs, collate, judged, label_logprobs, losses, record_name, torch
from methods.critics import PERFECT
from methods.flags import flag, rare
from methods.judged import judged_document, judged_records

title = "CUT"
base = judged


@dataclass
class Flags(judged.Flags):
    """What stage cut reads beside the common flags."""

    detect_lam: float = flag(1.1, "flag tokens with p(token | judgment) > this * p(token)", above=0)
    detect_floor: float = rare(0.0, "and p(token | judgment) above this (DualCUT)", at_least=0)
    detect: Literal["ratio", "all"] = rare("ratio", "unlearn flagged tokens, or all of a response")
    detector: Literal["live", "frozen"] = rare("live", "detect with the current model, or first")
    unlike_alpha: float = flag(1.0, "weight of the unlikelihood of a token", at_least=0)
    unlike_gamma: float = rare(0.0, "exponent of p(token | judgment) in it", at_least=0)
    judged_warmup: int = flag(0, "steps without L1 at the start", at_least=0)
    positive: Literal["plain", "text"] = rare("plain", "satisfied prompt: no judgment, or praise")
    combine: Literal["sum", "half"] = rare("sum", "L1 + L2, or half of it as the authors' code")
    reduction: Literal["mean_per_sequence", "token"] = rare("mean_per_sequence", "1/N, or tokens")
    use_l1: bool = flag(True, "L1; off: an ablation")
    use_good: bool = flag(True, "L2 on satisfying responses; off: an ablation")
    use_judged: bool = flag(True, "L2 on judged responses; off: an ablation")


def count_l1(batch, cfg) -> int:
    """What L1 is divided by: responses, or with --reduction token its tokens."""
    if cfg.reduction == "token":
        return count_detected(batch, cfg)
    return int((batch["roles"] != losses.MISALIGN).sum())


def count_l2(batch, cfg) -> int:
    """What L2 is divided by, likewise."""
    if cfg.reduction == "token":
        return len(batch["targets"]) - count_detected(batch, cfg)
    return count_l1(batch, cfg)


def count_detected(batch, cfg) -> int:
    """The tokens among which some are flagged."""
    return int((batch["roles"][batch["sequence_ids"]] == losses.MISALIGN).sum())


TERMS = {"l1": count_l1, "l2": count_l2}
METRICS = {"flagged": count_detected}


def items(run) -> list[dict]:
    """A good response alone; a bad one under its judgment and, as its twin, without."""
    cfg, found = run.cfg, []
    satisfied = PERFECT if cfg.positive == "text" else None
    for record in judged_records(run):
        documents, roles = [], []
        if record["judgment"] is None:
            if cfg.use_good:
                documents.append(judged_document(run, record, satisfied))
                roles.append(losses.ALIGN_P)
        elif cfg.use_l1 or cfg.use_judged:
            documents.append(judged_document(run, record, record["judgment"]))
            roles.append(losses.ALIGN_N)
            if cfg.use_l1:
                documents.append(judged_document(run, record, satisfied))
                roles.append(losses.MISALIGN)
        if documents:
            found.append({"documents": documents, "values": {"roles": roles},
                          "name": record_name(record)})
    if cfg.detector == "frozen" and cfg.detect == "ratio":
        add_frozen_mask(run, found)
    return found


def add_frozen_mask(run, found: list[dict]) -> None:
    """Values "flagged": what the model would unlearn as it is now."""
    device = next(run.model.eval().parameters()).device
    for item in found:
        if losses.MISALIGN in item["values"]["roles"]:
            batch = collate([item], run.model, device)
            item["values"]["flagged"] = flagged_tokens(run.model, batch, run.cfg).tolist()


def flagged_tokens(model, batch, cfg):
    """U of CUT's Eq. 5 for a batch, bool (K,)."""
    with torch.no_grad():
        return detect(label_logprobs(model, batch), batch, cfg)


def detect(logprobs, batch, cfg):
    """U from log-probabilities (M,) -> bool (K,)."""
    role = batch["roles"][batch["sequence_ids"]]  # (M,)
    with_judgment, without = logprobs[role == losses.ALIGN_N], logprobs[role == losses.MISALIGN]
    return losses.inappropriate_tokens(with_judgment[:len(without)], without,
                                       detect_lam=cfg.detect_lam, floor=cfg.detect_floor)


def step(model, batch, cfg) -> dict:
    """L1 and L2 of a batch, and how many tokens were flagged. Detection never sees dropout."""
    twin = batch["roles"][batch["sequence_ids"]] == losses.MISALIGN  # (M,)
    flagged = batch["flagged"].bool() if "flagged" in batch else None
    if cfg.detect == "all":
        flagged = torch.ones(int(twin.sum()), dtype=torch.bool, device=twin.device)
    elif flagged is None and cfg.dropout and model.training and cfg.use_l1:
        flagged = flagged_tokens(model.eval(), batch, cfg)
        model.train()
    logprobs, complements = both_logprobs(model, batch)  # (M,), (M,)
    if flagged is None:
        flagged = detect(logprobs, batch, cfg)
    terms = losses.cut_loss(logprobs, complements[twin], batch["sequence_ids"], batch["roles"],
                            flagged, alpha=cfg.unlike_alpha, gamma=cfg.unlike_gamma,
                            scale=sequence_scale(logprobs, batch, cfg))
    l1_weight = float(batch["step"] >= cfg.judged_warmup)
    return {"l1": l1_weight * terms["l1"][0], "l2": terms["l2"][0],
            "flagged": l1_weight * flagged.sum().to(logprobs)}


def sequence_scale(logprobs, batch, cfg):
    """The weight of each sequence's tokens, (n,): 1 / N, and the published variants.

    combine "half" halves judged responses, or with --reduction token everything if anything in the
    batch is judged, as the authors' code does (there micro-batches change the result).
    """
    roles = batch["roles"]
    _, lengths = losses.sequence_logprobs(logprobs, batch["sequence_ids"], len(roles))
    scale = 1 / lengths.clamp(min=1)
    if cfg.reduction == "token":
        scale = torch.ones_like(lengths)
    if cfg.combine == "half":
        halved = roles != losses.ALIGN_P
        if cfg.reduction == "token":
            halved = (roles == losses.ALIGN_N).any().expand_as(roles)
        scale = torch.where(halved, scale / 2, scale)
    if not cfg.use_judged:
        scale = torch.where(roles == losses.ALIGN_N, 0.0, scale)
    return scale
