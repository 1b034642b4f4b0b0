"""How the candidates of a question become pairs and rankings.

cat, dpo, orpo and slic take a best answer and a few lower ones (`pair_items`), rrhf and pro a
ranking of a few answers (`ranking_items`), reward comparisons of answers spread over the rewards.
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import data
from eval import extra
from methods import candidates, losses, record_name
from methods.flags import flag
from methods.groups import best_answers, candidate_document, distinct, group_rng, grouped_candidates


@dataclass
class PairFlags(candidates.Flags):
    """How the candidates of a question become pairs; cat, dpo, orpo and slic read these."""

    pairs: Literal["best", "all"] = flag("best", "rank the best over the rest, or every pair")
    condition: Literal["own", "original", "worse"] = flag("own", "the wording of the best answer")


def pair_items(run, make_item=None) -> list[dict]:
    """For each question with a best and a lower answer, items of one best and a few lower ones."""
    make_item = make_item or pair_item
    cfg, found, no_best, no_worse = run.cfg, [], 0, 0
    for group in grouped_candidates(run):
        best, worse = best_answers(group)
        if not best:
            no_best += 1
            continue
        if not worse:
            no_worse += 1
            continue
        rng, worse = group_rng(run, group), distinct(worse, "wording", "response")
        rng.shuffle(worse)
        for start in range(0, len(worse), cfg.max_worse):
            found.append(make_item(run, rng.choice(best), worse[start:start + cfg.max_worse]))
    run.say(f"{cfg.stage}: {len(found)} items; skipped {no_best} questions without a best answer "
            f"and {no_worse} with nothing below the best.")
    return found


def pair_item(run, best: dict, worse: list[dict]) -> dict:
    """An item of the best answer and lower ones; see `ranked_item`."""
    return ranked_item(run, best, worse, best["response"])[0]


def ranked_item(run, best: dict, worse: list[dict], good: str) -> tuple[dict, int]:
    """Documents of one best answer, whose text is `good`, and of lower ones, with their pairs.

    --condition own: each answer stands under the wording that produced it; original: all under the
    task's own instruction; worse: the best answer under each wording that failed, so that a pair
    answers one and the same prompt. Returns the item and how many of its documents are best ones.
    """
    cfg, name = run.cfg, "wording"
    if cfg.condition == "original":
        name = "instruction"
    tops = [best[name]]  # what the best answer stands under
    if cfg.condition == "worse":
        tops = list(dict.fromkeys(x[name] for x in worse))
    # The documents: the best answer under each of those, then the lower ones.
    documents, good_one = [], best | {"response": good}
    for wording in tops:
        documents.append(candidate_document(run, good_one | {"wording": wording}))
    for x in worse:
        documents.append(candidate_document(run, x | {"wording": x[name]}))
    # The pairs, as the numbers of two documents each.
    if cfg.condition == "worse":
        better = [tops.index(x[name]) for x in worse]
        lower = list(range(len(tops), len(documents)))
    else:
        rewards = [x["reward"] for x in [best, *worse]]
        better, lower = losses.best_vs_lower_pairs(rewards, rule=cfg.pairs, best=best["reward"])
    item = {"documents": documents, "indices": {"better": better, "worse": lower},
            "name": record_name(best)}
    return item, len(tops)


def ranking_items(run) -> list[dict]:
    """A best answer and a few others of each question, best first, with all pairs.

    "best" and "weights" mark the best answer, "rewards" (n,) are those of all documents.
    """
    found = []
    for group in grouped_candidates(run):
        kept = spread_answers(run, group)
        if kept:
            rewards = [float(x["reward"]) for x in kept]
            better, worse = losses.best_vs_lower_pairs(rewards, rule="all")
            weights = [1.0] + [0.0] * (len(kept) - 1)
            found.append({"documents": [candidate_document(run, x) for x in kept],
                          "indices": {"better": better, "worse": worse, "best": [0]},
                          "values": {"rewards": rewards, "weights": weights},
                          "name": record_name(kept[0])})
    run.say(f"{run.cfg.stage}: {len(found)} questions with answers of different reward.")
    return found


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


def labelled_items(run, path) -> list[dict]:
    """Pairs with soft labels, as stage rlaif writes them to preferences.jsonl."""
    found, formats = [], extra("formats", run.cfg.plain)
    records = formats.read_labelled(path) if formats else data.read_records(path)
    for record in records:
        documents = []
        for x in (record["first"], record["second"]):
            documents.append(candidate_document(run, record | x))
        found.append({"documents": documents, "indices": {"better": [0], "worse": [1]},
                      "values": {"probability": [record["probability"]], "pair_weights": [1.0]},
                      "name": record_name(record)})
    run.say(f"{run.cfg.stage}: {len(found)} pairs with soft labels.")
    return found
