"""Kahneman-Tversky optimisation (KTO): learn from single answers that are called good or bad.

    L = mean over answers of    lambda_D (1 - sigma(beta (r - z0)))    if y is desirable
                                lambda_U (1 - sigma(beta (z0 - r)))    if it is not
    r  = log pi(y | x) - log pi_ref(y | x)                                 arXiv 2402.01306, Eq. 7
    z0 = max(0, mean of log pi(y' | x) - log pi_ref(y' | x)),  y' an answer to another prompt

z0 estimates the KL between policy and reference. It is one number for a whole step and has no
gradient: see `prepare`. The reference is the model that the stage starts from.

DEVIATION: y' is chosen when the items are made; the authors shift answers within a micro-batch.
"""

import random
from dataclasses import dataclass

from methods import candidates, document_logprobs, record_name, torch
from methods.flags import flag
from methods.groups import best_answers, candidate_document, distinct, grouped_candidates
from methods.preference import add_reference

title = "SFT(IA)+KTO"
base = candidates
takes_labels = True
unread = ("max_worse",)


@dataclass
class Flags(candidates.Flags):
    """What stage kto reads beside the common flags."""

    beta: float = flag(0.1, "inverse temperature", above=0)
    desirable_weight: float = flag(1.0, "lambda_D, the weight of desirable answers", at_least=0)
    undesirable_weight: float = flag(1.0, "lambda_U, that of undesirable ones", at_least=0)


TERMS = {"loss": "items"}
METRICS = {"kl": "items"}


def items(run) -> list[dict]:
    """Each answer with its label: the best ones of a question are desirable, those below not.

    A second document has the same prompt and an answer to another question.
    """
    labelled, found = [], []
    for group in grouped_candidates(run):
        best, worse = best_answers(group)
        labelled += [(record, 1.0) for record in distinct(best, "wording", "response")]
        labelled += [(record, 0.0) for record in distinct(worse, "wording", "response")]
    random.Random(f"{run.cfg.seed}/kto").shuffle(labelled)
    for number, (record, desirable) in enumerate(labelled):
        other = other_answer(labelled, number)
        mismatched = candidate_document(run, record | {"response": other})
        found.append({"documents": [candidate_document(run, record), mismatched],
                      "indices": {"own": [0], "other": [1]},
                      "values": {"desirable": [desirable]}, "name": record_name(record)})
    n_desirable = sum(int(desirable) for _, desirable in labelled)
    run.say(f"kto: {n_desirable} desirable and {len(found) - n_desirable} undesirable answers.")
    return add_reference(run, found)


def other_answer(labelled: list[tuple], number: int) -> str:
    """The answer of the nearest item before this one, round the end, that has another question."""
    record, _ = labelled[number]
    for back in range(1, len(labelled)):
        other, _ = labelled[number - back]
        if (other["task"], other["id"]) != (record["task"], record["id"]):
            return other["response"]
    raise ValueError(f"all answers are to the question {record_name(record)}, and the KL estimate "
                     "of kto needs two questions. Give more candidates.")


def log_ratios(model, batch):
    """log pi(y | x) - log pi_ref(y | x) of each document, (n,)."""
    sums, _ = document_logprobs(model, batch)
    return sums - batch["reference"].to(sums)


def prepare(model, batch, cfg) -> dict:
    """The sum and number of the log-ratios that z0 is the mean of."""
    ratios = log_ratios(model, batch)[batch["other"]]
    return {"kl": (ratios.sum(), len(ratios))}


def step(model, batch, cfg) -> dict:
    """The loss over the answers of a batch; z0 is that of the whole step."""
    z0 = max(0.0, batch["statistics"]["kl"])
    r = log_ratios(model, batch)[batch["own"]]  # (items,)
    desirable = batch["desirable"] > 0
    gains = torch.where(desirable, r - z0, z0 - r)
    weights = torch.where(desirable, cfg.desirable_weight, cfg.undesirable_weight)
    loss = weights * (1 - torch.sigmoid(cfg.beta * gains))
    return {"loss": loss.sum(), "kl": torch.full_like(r, z0).sum()}
