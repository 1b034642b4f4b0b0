"""How the candidates of a question become pairs of a best answer and lower ones.

cat, dpo, orpo and slic learn from these; rrhf and pro from rankings (methods/ranking.py).
"""

from dataclasses import dataclass
from typing import Literal

import data
from eval import extra
from methods import losses, record_name
from methods.balance import balanced_groups
from methods.flags import rare
from methods.groups import best_answers, candidate_document, distinct, group_rng, grouped_candidates
from methods.ranking import RankFlags


@dataclass
class PairFlags(RankFlags):
    """How the candidates of a question become pairs; cat, dpo, orpo and slic read these."""

    pairs: Literal["best", "all"] = rare("best", "rank the best over the rest, or every pair")


def comparable_groups(run) -> list[list[dict]]:
    """The answers to each question that has a best one and a lower one; says how many have not."""
    found, no_best, no_worse = [], 0, 0
    for group in grouped_candidates(run):
        best, worse = best_answers(group)
        if best and worse:
            found.append(group)
        no_best += not best
        no_worse += bool(best) and not worse
    run.say(f"{run.cfg.stage}: {len(found)} questions to learn from; skipped {no_best} without a "
            f"best answer and {no_worse} with nothing below the best.")
    return balanced_groups(run, found)


def pair_items(run, make_item=None) -> list[dict]:
    """For each question with a best and a lower answer, items of one best and a few lower ones."""
    make_item = make_item or pair_item
    cfg, found = run.cfg, []
    for group in comparable_groups(run):
        best, worse = best_answers(group)
        rng, worse = group_rng(run, group), distinct(worse, "wording", "response")
        rng.shuffle(worse)
        for start in range(0, len(worse), cfg.max_worse):
            found.append(make_item(run, rng.choice(best), worse[start:start + cfg.max_worse]))
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


def labelled_items(run, path) -> list[dict]:
    """Pairs with the probability that the first is better, as rlaif and rlcd write them."""
    found, formats = [], extra("formats", run.cfg.plain)
    records = formats.read_labelled(path) if formats else data.read_records(path)
    for record in records:
        documents = []
        for x in (record["first"], record["second"]):
            documents.append(candidate_document(run, record | x))
        found.append({"documents": documents, "indices": {"better": [0], "worse": [1]},
                      "values": {"probability": [record["probability"]], "pair_weights": [1.0]},
                      "name": record_name(record)})
    run.say(f"{run.cfg.stage}: {len(found)} labelled pairs.")
    return found
