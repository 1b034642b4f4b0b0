"""Statistical rejection sampling optimisation (RSO): better pairs for a preference loss.

Of the answers to a question, rejection sampling keeps some as if they came from the optimal policy,
which is proportional to exp(r / beta); the loss takes pairs among those. The loss is one of
methods/dpo.py, by default the hinge with gamma = 0.05   (arXiv 2309.06657, Algorithm 1, Eq. 10).
"""

import math
from dataclasses import dataclass
from typing import Literal

from methods import candidates, losses, preference, record_name
from methods.flags import flag
from methods.groups import candidate_document, distinct, group_rng, grouped_candidates
from methods.preference import add_reference

title = "SFT(IA)+RSO"
base = candidates
unread = ("max_worse",)


@dataclass
class Flags(preference.PreferenceFlags, candidates.Flags):
    """What stage rso reads beside the common flags."""

    rso_keep: int = flag(8, "answers kept per question", at_least=1)
    rso_beta: float = flag(0.5, "temperature; low: keeps the best, high: random", above=0)
    rso_ranking: Literal["first", "tournament", "all"] = flag("first", "pairs among those kept")


DEFAULTS = {**candidates.DEFAULTS, "preference": "hinge", "beta": 0.05}
TERMS = {"loss": "pairs"}
METRICS = preference.METRICS
step, check = preference.preference_step, preference.check_preference


def items(run) -> list[dict]:
    """The pairs among the answers that rejection sampling keeps of each question."""
    cfg, found, n_kept, n_pairs = run.cfg, [], 0, 0
    for group in grouped_candidates(run):
        known = distinct(group, "response")
        rng, rewards = group_rng(run, group), [x["reward"] for x in known]
        # The rejected ones are gone; the loss sees pairs of the others, in random order.
        accepted = rejection_sample(rewards, cfg.rso_keep, beta=cfg.rso_beta, rng=rng)
        kept = [known[i] for i in accepted]
        rng.shuffle(kept)
        pairs = ranked_pairs([x["reward"] for x in kept], cfg.rso_ranking)
        n_kept, n_pairs = n_kept + len(kept), n_pairs + len(pairs)
        if pairs:
            found.append(pairs_item(run, kept, pairs))
    run.say(f"rso: kept {n_kept} answers, {n_pairs} pairs of different reward in {len(found)} "
            "questions.")
    return add_reference(run, found)


def pairs_item(run, answers: list[dict], pairs: list[tuple]) -> dict:
    """An item of the answers that are in a pair."""
    # Documents are counted within the item, so the numbers of answers become places in `used`.
    better, worse = zip(*pairs, strict=True)
    used = sorted({*better, *worse})
    # Answers that are in no pair are left out.
    indices = {"better": list(map(used.index, better)), "worse": list(map(used.index, worse))}
    return {"documents": [candidate_document(run, answers[i]) for i in used],
            "indices": indices, "name": record_name(answers[0])}


def rejection_sample(rewards: list[float], n: int, *, beta: float, rng) -> list[int]:
    """Algorithm 1: the indices of up to n accepted answers; rng is a random.Random.

    In passes over the remaining answers each is accepted with probability exp((r - max r) / beta),
    the maximum taken once a pass. beta -> 0 keeps the n best, a large beta the first n. The answers
    must be distinct texts.
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


def ranked_pairs(rewards: list[float], how: str) -> list[tuple[int, int]]:
    """(better, worse) among answers in random order.

    "first": neighbours, "tournament": a knock-out from there on, "all": every pair.
    """
    if how == "all":
        return list(zip(*losses.best_vs_lower_pairs(rewards, rule="all"), strict=True))
    pairs, left = [], list(range(len(rewards)))
    while len(left) > 1:
        winners = []
        for k in range(0, len(left) - 1, 2):
            i, j = sorted(left[k:k + 2], key=lambda i: -rewards[i])
            if rewards[i] > rewards[j]:
                pairs.append((i, j))
            winners.append(i)
        left = winners + left[2 * len(winners):] if how == "tournament" else []
    return pairs
