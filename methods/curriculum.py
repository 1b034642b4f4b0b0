"""Contrastive post-training on a curriculum: pairs of stronger and weaker models, easy ones first.

    y_w by the stronger of two models, y_l by the weaker; no judge is asked         arXiv 2310.02263

--responses names the models, the weakest first: run folders, whose models answer, or files of
answers. A pair is easy if its models are the first and the last, and hard if they are nearer. The
share of hard pairs grows from 0 to 1 in PHASES equal steps; --curriculum hard goes the other way,
and mixed draws from all pairs throughout. The loss is DPO's or one of its relatives.

DEVIATION: which pairs of its three models the paper calls hard, and its schedule, are not known.
"""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from methods import candidates, common, merged_copy, open_trained, preference
from methods.flags import flag
from methods.folders import has_result
from methods.groups import candidate_document, read_fields
from methods.preference import add_reference

title = "SFT(IA)+curriculum"
base = candidates
unread = ("epochs", "validation", "max_passes")  # every phase has a mixture of its own
PHASES = 10


@dataclass
class Flags(preference.PreferenceFlags, candidates.AnswerFlags):
    """What stage curriculum reads beside the common flags."""

    responses: list[str] = flag([], "run folders or files of answers, the weakest first", path=True)
    curriculum: Literal["easy", "hard", "mixed"] = flag("easy", "which pairs come first")


DEFAULTS = {**candidates.DEFAULTS, "samples": 1}
TERMS = {"loss": "pairs"}
METRICS = preference.METRICS
step, remark = preference.preference_step, common.remark


def check(cfg) -> None:
    """Raises ValueError for flags that do not fit together."""
    preference.check_smoothing(cfg)
    least = 2 if cfg.curriculum == "mixed" else 3
    if len(cfg.responses) < least:
        raise ValueError(f"--responses names {len(cfg.responses)} models, and --curriculum "
                         f"{cfg.curriculum} needs {least}, the weakest first. Give run folders, or "
                         "files of answers.")
    for path in cfg.responses:
        if Path(path).is_dir() and not has_result(Path(path)):
            raise ValueError(f"--responses {path} is no run folder with a finished stage. Give "
                             "one, or a file of answers.")


def inspect(run) -> None:
    """Raises ValueError for files that cannot be read, before anything is trained."""
    candidates.inspect(run)
    for path in run.cfg.responses:
        if Path(path).is_file():
            read_answers(path)


def phase(cfg) -> int:
    """Steps after which the mixture changes."""
    return math.ceil(cfg.steps / PHASES)


# ----- Answers -----
def collect(run) -> None:
    """responses-K.jsonl of each run folder: its answers to the same inputs and wordings."""
    cfg = run.cfg
    for number, place in enumerate(cfg.responses):
        if Path(place).is_file():
            continue
        path = run.folder / f"responses-{number}.jsonl"
        todo = candidates.not_kept(run, path, candidates.unanswered(run))
        if not todo:
            continue
        model = merged_copy(open_trained(cfg, Path(place)))
        for chunk in run.chunks(todo, f"model {number + 1}"):
            run.guard.keep(path, candidates.answered(replace(run, model=model, round=0), chunk))


def read_answers(path) -> dict[tuple, dict]:
    """{(task, input, wording, sample): the line}; several without a sample are numbered."""
    found, count = {}, {}
    for record in read_fields(path, "task input wording response"):
        key = record["task"], record["input"], record["wording"]
        number = record.get("sample", count.get(key, 0))
        count[key] = count.get(key, 0) + 1
        found[(*key, number)] = record
    return found


def make_pairs(run) -> list[dict]:
    """Items of two models' different answers to one prompt; "easy" for the farthest models."""
    cfg, answers, found = run.cfg, [], []
    for number, place in enumerate(cfg.responses):
        path = place if Path(place).is_file() else run.folder / f"responses-{number}.jsonl"
        answers.append(read_answers(path))
    for strong in range(1, len(answers)):
        for weak in range(strong):
            for key, better in answers[strong].items():
                worse = answers[weak].get(key)
                if worse and differs(better, worse):
                    found.append({
                        "documents": [candidate_document(run, x) for x in (better, worse)],
                        "indices": {"better": [0], "worse": [1]}, "name": f"{key[0]}/{key[1]}",
                        "easy": strong - weak == len(answers) - 1})
    return found


def differs(better: dict, worse: dict) -> bool:
    """Whether both said something, and not the same."""
    texts = better["response"].strip(), worse["response"].strip()
    return all(texts) and texts[0] != texts[1]


# ----- Phases -----
def begin(run) -> None:
    """All pairs, with their log-probabilities under the model that the stage starts from."""
    candidates.begin(run)
    pairs = add_reference(run, make_pairs(run), every=True)
    kinds = {True: [], False: []}
    for item in pairs:
        kinds[item.pop("easy")].append(item)
    run.say(f"curriculum: {len(kinds[True])} easy and {len(kinds[False])} hard pairs.")
    enough = any if run.cfg.curriculum == "mixed" else all
    if not enough(kinds.values()):
        raise ValueError(f"--curriculum {run.cfg.curriculum} finds too few pairs. Give models "
                         "whose answers to the same inputs and wordings differ.")
    run.memory.update(phase=0, easy=kinds[True], hard=kinds[False])


def items(run) -> list[dict]:
    """The pairs of the next phase, drawn with replacement: so many that each is seen once."""
    cfg, memory, number = run.cfg, run.memory, run.memory["phase"]
    rng, n = random.Random(f"{cfg.seed}/{number}"), cfg.batch_size * phase(cfg)
    memory["phase"] = number + 1
    if cfg.curriculum == "mixed":
        return rng.choices(memory["easy"] + memory["hard"], k=n)
    hard = min(1.0, number / (PHASES - 1))
    if cfg.curriculum == "hard":
        hard = 1 - hard
    n_hard = round(hard * n)
    return rng.choices(memory["easy"], k=n - n_hard) + rng.choices(memory["hard"], k=n_hard)
