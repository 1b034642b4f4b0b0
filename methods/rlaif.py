"""Preferences from AI feedback (RLAIF): DPO on soft labels.

A judge says how probable it is that the first of two answers is the better one, in both orders
(arXiv 2309.00267); the loss is DPO's with that probability as a soft label. Labels are the letter
of the better answer, or with --labels scores the difference of the self-judge's rewards.
"""

import math
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import judge as judging
from eval import extra
from methods import candidates, losses, merged_copy, preference, torch
from methods.flags import flag
from methods.groups import group_rng, grouped_candidates
from methods.pairing import labelled_items
from methods.preference import add_reference

title = "SFT(IA)+RLAIF"
base = candidates
CHOSEN = ("wording", "response", "p_expected", "p_correct", "reward", "how")


@dataclass
class Flags(candidates.Flags):
    """What stage rlaif reads beside the common flags."""

    labels: Literal["letters", "scores"] = flag("letters", "letter of the better one, or scores")
    beta: float = flag(0.1, "inverse temperature of DPO", above=0)
    length_normalize: bool = flag(False, "means of log-probabilities instead of sums")
    reference_free: bool = flag(False, "leave the reference model out")


TERMS = {"loss": "pairs"}
METRICS = preference.METRICS


def check(cfg) -> None:
    """Raises ValueError for flags that do not fit together."""
    candidates.check(cfg)
    # Letters are the answer of a model, scores a number.
    if cfg.labels == "letters" and cfg.judge not in ("self", "http"):
        raise ValueError(f"--judge {cfg.judge} has no letters to choose from. Add --labels scores.")
    if cfg.labels == "letters" and not extra("judges", cfg.plain):
        raise ValueError("--labels letters needs extras/judges. Leave out --plain, or give "
                         "--labels scores.")
    if cfg.labels == "scores" and cfg.judge == "http":
        raise ValueError("--judge http gives letters, not scores. Add --labels letters.")


def collect(run) -> None:
    """preferences.jsonl: pairs of different answers to one question, with their labels."""
    cfg, path, todo = run.cfg, run.folder / "preferences.jsonl", []
    candidates.collect(run, judged=cfg.labels == "scores")
    done = run.guard.kept(path, lambda record: (record["task"], record["id"], record["number"]))
    for group in grouped_candidates(run):
        for pair in answer_pairs(run, group):
            if (pair["task"], pair["id"], pair["number"]) not in done:
                todo.append(pair)
    unlabelled, label = 0, labeller(replace(run, model=merged_copy(run.model)))
    for chunk in run.chunks(todo, "label"):
        kept = []
        for pair, probability in zip(chunk, label(chunk), strict=True):
            if probability is not None:
                kept.append(pair | {"probability": probability})
        unlabelled += len(chunk) - len(kept)
        run.guard.keep(path, kept)
    if todo and unlabelled == len(todo) and not done:
        raise ValueError(f"not one of {len(todo)} pairs got a label, so there is nothing to train "
                         "on. Use another --judge.")
    if unlabelled:
        run.say(f"rlaif: {unlabelled} of {len(todo)} pairs got no label and are left out.")


def answer_pairs(run, group) -> list[dict]:
    """A few pairs of different answers to one question, as records to be labelled."""
    answers, found = {}, []
    for x in group:
        if x["response"].strip():
            answers[x["response"]] = x
    answers = list(answers.values())
    group_rng(run, group).shuffle(answers)
    for number, pair in enumerate(list(combinations(answers, 2))[:run.cfg.max_worse]):
        first, second = ({name: x.get(name) for name in CHOSEN} for x in pair)
        x, more = pair[0], {}
        if "messages" in x:  # a dialogue
            more["messages"] = x["messages"]
        found.append({"task": x["task"], "id": x["id"], "number": number, **more,
                      "instruction": x["instruction"], "input": x["input"], "first": first,
                      "second": second})
    return found


def labeller(run):
    """A function from pairs to probabilities that the first answer is better, None: no label."""
    if run.cfg.labels == "scores":
        return lambda pairs: [two_scores(pair) for pair in pairs]
    return lambda pairs: extra("judges", run.cfg.plain).label_pairs(run, pairs)


def two_scores(pair: dict) -> float | None:
    """sigma(score of the first - score of the second); None where one has no reward."""
    first, second = answer_score(pair["first"]), answer_score(pair["second"])
    if first is None or second is None:
        return None
    return 1 / (1 + math.exp(min(700.0, second - first)))


def answer_score(answer: dict):
    """A judge's number; of a verdict the log-odds of half the expected reward."""
    if answer["how"] not in judging.VERDICTS or answer["reward"] is None:
        return answer["reward"]
    expected, correct = answer["p_expected"], answer["p_correct"] or 0.0
    if expected is None:
        value = correct if answer["p_correct"] is not None else answer["reward"] / 2
    else:
        value = expected * (1 + correct) / 2
    # Away from 0 and 1, where the logarithm is infinite.
    value = min(max(value, 1e-6), 1 - 1e-6)
    return math.log(value / (1 - value))


def items(run) -> list[dict]:
    """The labelled pairs, with each document's log-probability under the starting model."""
    return add_reference(run, labelled_items(run, run.folder / "preferences.jsonl"))


def step(model, batch, cfg) -> dict:
    """DPO with soft labels; a pair counts as right if the policy prefers what the judge prefers."""
    h, q = preference.pair_logits(model, batch, cfg), batch["probability"]  # (P,), (P,)
    total, _ = losses.dpo_loss(h, beta=cfg.beta, label_smoothing=1 - q.to(h))
    right = torch.where(q < 0.5, -h, h).detach()
    return {"loss": total, **preference.pair_metrics(right, cfg.beta)}
