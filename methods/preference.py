"""The loss that dpo, rso, rlaif and rlcd share, and its flags; the equations are in dpo.py.

Shapes: n documents, P pairs.
"""

from dataclasses import dataclass
from typing import Literal

import data
from methods import candidates, collate, document_logprobs, losses, torch
from methods.flags import flag, rare
from methods.schedule import items_seen

METRICS = {"margin": "pairs", "accuracy": "pairs"}


@dataclass
class PreferenceFlags:
    """What the loss reads."""

    preference: Literal["sigmoid", "robust", "ipo", "hinge"] = flag("sigmoid", "form of the loss")
    beta: float = flag(0.1, "inverse temperature; IPO's tau", above=0)
    label_smoothing: float = rare(0.0, "share of pairs in the wrong order", below=0.5)
    length_normalize: bool = rare(False, "means of log-probabilities instead of sums")
    reference_free: bool = rare(False, "leave the reference model out")


def check_preference(cfg) -> None:
    """Raises ValueError for flags that do not fit together."""
    candidates.check(cfg)
    check_smoothing(cfg)


def check_smoothing(cfg) -> None:
    """Raises ValueError for smoothed labels in a loss that reads none."""
    if cfg.label_smoothing and cfg.preference in ("ipo", "hinge"):
        raise ValueError(f"--label-smoothing changes nothing in --preference {cfg.preference}. "
                         "Give --preference sigmoid or robust, or leave it out.")


def preference_step(model, batch, cfg) -> dict:
    """The loss over the pairs of a batch, and what h says of them for the log."""
    h = pair_logits(model, batch, cfg)  # (P,)
    total = preference_loss(h, cfg.preference, cfg.beta, cfg.label_smoothing)
    return {"loss": total, **pair_metrics(h.detach(), cfg.beta)}


def pair_logits(model, batch, cfg):
    """h of each pair, (P,)."""
    sums, lengths = document_logprobs(model, batch)  # (n,), (n,)
    reference = 0.0
    if not cfg.reference_free:
        reference = batch["reference"].to(sums)
    if cfg.length_normalize:
        sums, reference = sums / lengths, reference / lengths
    return losses.preference_logits(sums, reference, batch["better"], batch["worse"])


def pair_metrics(h, beta: float) -> dict:
    """How far the better answers are ahead, and in how many pairs, as sums over (P,)."""
    return {"margin": beta * h.sum(), "accuracy": (h > 0).sum().to(h)}


def preference_loss(h, kind: str, beta: float, e: float):
    """The sum over h (P,) of the loss that `kind` names; methods/dpo.py has the equations."""
    if kind == "sigmoid":
        return losses.dpo_loss(h, beta=beta, label_smoothing=e)[0]
    if kind == "ipo":
        return ((h - 1 / (2 * beta)) ** 2).sum()
    if kind == "hinge":
        return torch.relu(1 - beta * h).sum()
    log_sigmoid = torch.nn.functional.logsigmoid  # what is left is the robust form
    right, wrong = log_sigmoid(beta * h), log_sigmoid(-beta * h)
    robust = (-(1 - e) * right + e * wrong) / (1 - 2 * e)
    return robust.sum()


def add_reference(run, items: list[dict], *, every: bool = False) -> list[dict]:
    """The items with values "reference": each document's log-probability under the model as it is
    now, before the stage trains it. Only for items that some step will see, or for all of them.
    """
    cfg, device = run.cfg, next(run.model.parameters()).device
    if not items:
        return items
    used = items if every else items_seen(cfg, items)
    run.model.eval()
    with torch.no_grad(), run.precision():
        for part in data.micro_batches(used, cfg.micro_tokens):
            batch, start = collate(part, run.model, device), 0
            sums = document_logprobs(run.model, batch)[0].tolist()
            for item in part:
                end = start + len(item["documents"])
                item.setdefault("values", {})["reference"] = sums[start:end]
                start = end
    return items
