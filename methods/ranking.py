"""How the candidates of a question become a ranking of a few answers, for rrhf and pro."""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from methods import candidates, losses, record_name
from methods.balance import balanced_groups
from methods.flags import flag, rare
from methods.groups import best_answers, candidate_document, distinct, group_rng, grouped_candidates


@dataclass
class RankFlags(candidates.Flags):
    """What answers are compared under; pairs and rankings read these."""

    condition: Literal["worse", "own", "original"] = flag(
        "worse", "best answer under each failed wording, its own, the instruction")
    balance: bool = rare(False, "leave questions out, so that no task or label has most of them")


def ranking_items(run) -> list[dict]:
    """A best answer and a few others of each question, best first, with all pairs.

    --condition worse: such an item for each wording that failed, all of whose answers stand under
    it. "best" and "weights" mark the best answer, "rewards" (n,) are those of all documents.
    """
    found = []
    groups = filter(lambda group: spread_answers(run, group), grouped_candidates(run))
    groups = balanced_groups(run, list(groups))
    for group in groups:
        for kept in rankings(run, group):
            rewards = [float(x["reward"]) for x in kept]
            better, worse = losses.best_vs_lower_pairs(rewards, rule="all")
            weights = [1.0] + [0.0] * (len(kept) - 1)
            found.append({"documents": [candidate_document(run, x) for x in kept],
                          "indices": {"better": better, "worse": worse, "best": [0]},
                          "values": {"rewards": rewards, "weights": weights},
                          "name": record_name(kept[0])})
    run.say(f"{run.cfg.stage}: {len(found)} rankings of {len(groups)} questions with answers of "
            "different reward.")
    return found


def rankings(run, group: list[dict]) -> list[list[dict]]:
    """The answers of a question that are ranked together, best first, each with its wording."""
    if run.cfg.condition == "own":
        return [spread_answers(run, group)]
    if run.cfg.condition == "original":
        moved = [x | {"wording": x["instruction"]} for x in group]
        return [spread_answers(run, moved)]
    best, worse = best_answers(group)
    if not best:
        return []
    rng, failed = group_rng(run, group), {}  # {wording: the answers that failed under it}
    for x in worse:
        failed.setdefault(x["wording"], []).append(x)
    for wording, answers in failed.items():
        answers.append(rng.choice(best) | {"wording": wording})
    return [spread_answers(run, answers) for answers in failed.values()]


def spread_answers(run, group: list[dict]) -> list[dict]:
    """Up to max_worse + 1 answers of a question, best first, spread over the rewards.

    Answers of each reward are taken in turn, so that few answers still hold many comparisons.
    Empty where all rewards are the same.
    """
    known = distinct(group, "wording", "response")
    group_rng(run, group).shuffle(known)
    known.sort(key=lambda x: -x["reward"])  # stable: equal rewards stay shuffled
    if not known or known[0]["reward"] == known[-1]["reward"]:
        return []
    kept = take_in_turn(known, run.cfg.max_worse + 1)
    return sorted(kept, key=lambda x: -x["reward"])


def take_in_turn(records: list[dict], most: int) -> list[dict]:
    """Up to `most` records, one of each reward in turn."""
    by_reward, found = {}, []
    for record in records:
        by_reward.setdefault(record["reward"], []).append(record)
    for turn in zip_longest(*by_reward.values()):
        found += filter(None, turn)
    return found[:most]
