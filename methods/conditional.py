"""Conditional tokens: learn every answer behind what its reward says of it, then ask for the best.

A mark before the instruction says how good the answer is to be: "good answer : ", the reward's
quantile (Quark, arXiv 2205.13636), or the reward itself. Marks are plain text, so no token is new.
The loss is that of SFT. The trained model is asked with the mark of the best answers.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from methods import candidates, record_name, token_step
from methods.flags import flag
from methods.groups import best_answers, candidate_document, grouped_candidates

title = "SFT(IA)+conditional"
base = candidates
unread = ("max_worse",)


@dataclass
class Flags(candidates.Flags):
    """What stage conditional reads beside the common flags."""

    conditional: Literal["labels", "quantiles", "reward", "best"] = flag(
        "labels", "good or bad, quantile, reward; best: the top quantile, unmarked")
    quantiles: int = flag(4, "equal parts of the candidates by reward", at_least=1)


TERMS = {"ce": "tokens"}
step = token_step


def items(run) -> list[dict]:
    """Every answer behind its mark."""
    cfg, records, found = run.cfg, [], []
    for group in grouped_candidates(run):
        best, worse = best_answers(group)
        records += [(record, True) for record in best] + [(record, False) for record in worse]
    random.Random(f"{cfg.seed}/quantiles").shuffle(records)  # ties favour no task
    records.sort(key=lambda pair: pair[0]["reward"])
    size = max(1, len(records) // cfg.quantiles)
    for k, (record, good) in enumerate(records):
        quantile = min(k // size, cfg.quantiles - 1) + 1  # the last part takes the remainder
        if cfg.conditional == "best" and quantile < cfg.quantiles:
            continue
        mark = reward_mark(cfg, good=good, quantile=quantile, reward=record["reward"])
        found.append({"documents": [candidate_document(run, record, mark)],
                      "name": record_name(record)})
    run.say(f"conditional: {len(found)} answers; the model will be asked with {prefix(run)!r}.")
    return found


def prefix(run) -> str:
    """The mark of the best answers."""
    rewards = []
    if run.cfg.candidates or Path(run.folder, "candidates.jsonl").exists():
        for group in grouped_candidates(run):
            rewards += [x["reward"] for x in group if x["reward"] is not None]
    best = max(rewards, default=2)  # 2 is the best verdict
    return reward_mark(run.cfg, good=True, quantile=run.cfg.quantiles, reward=best)


def reward_mark(cfg, *, good: bool, quantile: int, reward: float) -> str:
    """The words before an instruction that say how good the answer is to be."""
    marks = {"labels": "good answer : " if good else "bad answer : ",
             "quantiles": f"quality {quantile} of {cfg.quantiles} : ",
             "reward": f"reward {reward:.2f} : ", "best": ""}
    return marks[cfg.conditional]
