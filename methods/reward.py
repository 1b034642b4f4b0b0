"""Reward model: a scalar head on the last token, fitted to comparisons of answers.

    L = -q log sigma(r_w - r_l) - (1 - q) log sigma(r_l - r_w)      arXiv 2203.02155, Eq. 1 (q = 1)

All comparisons of a question are one item and weigh 1 / their number, so every question counts
once. q is a soft label: the probability that the first of two answers is better, from an AI judge
(--preferences; RLAIF, arXiv 2309.00267), or 1 from RLCD's two prompts. A tenth of the questions is
held out for the report.
"""

import random
from dataclasses import dataclass

from eval import extra
from methods import candidates, common, heads, losses, record_name, torch
from methods.flags import flag
from methods.groups import candidate_document, distinct, group_rng, grouped_candidates
from methods.pairing import labelled_items
from methods.ranking import take_in_turn

title = "reward model"
base = candidates
beside = ()
unread = ("eval_per_task", "eval_wordings", "probe_inputs", "patience")  # it answers nothing


@dataclass
class Flags(candidates.Flags):
    """What stage reward reads beside the common flags."""

    preferences: str = flag("", "preferences.jsonl of rlaif or rlcd to fit to", path=True)


TERMS = {"loss": "items"}
METRICS = {"accuracy": "items"}
attach, detach = heads.attach, heads.detach
begin = common.begin  # it answers nothing that could agree


def check(cfg) -> None:
    """Raises ValueError for flags that do not fit together."""
    if cfg.judge == "reward":
        raise ValueError("--stage reward learns from another judge. Give --judge self or rule.")
    if cfg.rounds > 1:
        raise ValueError("--stage reward trains one model, in one round. Leave --rounds out.")
    candidates.check(cfg)


def items(run) -> list[dict]:
    """All comparisons among a few answers of each question."""
    cfg, found, n_pairs = run.cfg, [], 0
    if cfg.preferences:
        return labelled_items(run, cfg.preferences)
    for group in grouped_candidates(run):
        known = distinct(group, "wording", "response")
        group_rng(run, group).shuffle(known)
        known = take_in_turn(known, cfg.max_worse + 1)
        better, worse = losses.best_vs_lower_pairs([x["reward"] for x in known], rule="all")
        if better and not is_held_out(group[0]):
            n_pairs += len(better)
            found.append({"documents": [candidate_document(run, x) for x in known],
                          "indices": {"better": better, "worse": worse},
                          "values": {"pair_weights": [1 / len(better)] * len(better)},
                          "name": record_name(known[0])})
    run.say(f"reward: {n_pairs} comparisons in {len(found)} questions.")
    return found


def is_held_out(record: dict) -> bool:
    """Whether a question belongs to the tenth that no reward model trains on."""
    return random.Random(f"held out/{record['task']}/{record['id']}").random() < 0.1


def step(model, batch, cfg) -> dict:
    """The loss over the comparisons of a batch, and how many come out right."""
    rewards, weights = heads.document_rewards(model, batch), batch["pair_weights"]
    h = rewards[batch["better"]] - rewards[batch["worse"]]  # (P,)
    q = batch.get("probability", torch.ones_like(h))
    log_sigmoid = torch.nn.functional.logsigmoid
    loss = -q * log_sigmoid(h) - (1 - q) * log_sigmoid(-h)
    right = torch.where(q < 0.5, -h, h).detach() > 0
    return {"loss": (weights * loss).sum(), "accuracy": (weights * right).sum()}


def report(run, ladder: dict) -> None:
    """rewards.json: the rewards against the judge, exact rules and length (extras/reports)."""
    reports = extra("reports", run.cfg.plain)
    if run.cfg.evaluate and reports and not run.cfg.preferences:
        run.guard.first(lambda: reports.report_rewards(run))
