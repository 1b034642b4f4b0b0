"""Contrastive distillation (RLCD): pairs of answers from two prompts, learnt without a judge.

    y+ ~ p(y | positive, x)    y- ~ p(y | negative, x)    y+ is the better one      arXiv 2307.12950

One model writes both; --positive and --negative stand before the instruction and should differ only
in the quality that is wanted. Neither is in the prompt that is trained. The paper fits a reward
model to the pairs and trains with PPO: `--stage reward --preferences RUN/preferences.jsonl`, then
`--stage ppo --judge reward --reward-model DIR`.

DEVIATION: this stage itself learns from the pairs by DPO's loss. Pairs with equal or empty answers
are left out.
"""

from dataclasses import dataclass, replace

import data
from methods import candidates, common, merged_copy, preference
from methods.flags import flag
from methods.pairing import labelled_items
from methods.preference import add_reference

title = "SFT(IA)+RLCD"
base = candidates
KEPT = ("task", "id", "number", "instruction", "input")


@dataclass
class Flags(preference.PreferenceFlags, candidates.AnswerFlags):
    """What stage rlcd reads beside the common flags."""

    positive: str = flag("give a right answer . ", "words before the instruction, for better ones")
    negative: str = flag("give a wrong answer . ", "words before the instruction, for lower ones")


TERMS = {"loss": "pairs"}
METRICS = preference.METRICS
step, remark = preference.preference_step, common.remark


def check(cfg) -> None:
    """Raises ValueError for flags that do not fit together."""
    preference.check_smoothing(cfg)
    if cfg.positive == cfg.negative:
        raise ValueError(f"--positive and --negative are both {cfg.positive!r}, so no answer is "
                         "the better one. Give two that differ.")


# ----- Collecting -----
def collect(run) -> None:
    """contrasts.jsonl: all pairs, the better answer first; preferences.jsonl: those that differ.

    A stopped run continues behind the pairs that are there.
    """
    path, todo = run.folder / "contrasts.jsonl", []
    done = run.guard.kept(path, pair_key)
    for number, record in enumerate(candidates.unanswered(run)):
        if pair_key(record | {"number": number}) not in done:
            todo.append(record | {"number": number})
    if todo:
        model = merged_copy(run.model)
        for chunk in run.chunks(todo, "collect"):
            run.guard.keep(path, contrasted(replace(run, model=model), chunk))
    run.guard.first(lambda: write_useful(run, data.read_records(path)))


def pair_key(record: dict) -> tuple:
    """What tells one pair from another."""
    return record["task"], record["id"], record["number"]


def contrasted(run, records: list[dict]) -> list[dict]:
    """A pair per record: the answer under --positive, then the one under --negative."""
    cfg, answers = run.cfg, []
    for side, words in enumerate((cfg.positive, cfg.negative)):
        drawn, prompts = [], []
        for x in records:
            # Another number of the sample draws from another seed, so the two are independent.
            drawn.append(x | {"sample": 2 * x["sample"] + side})
            prompts.append(run.template.render(words + x["wording"], x["input"]))
        answers.append(candidates.sample_prompts(run, drawn, prompts))
    found = []
    for record, better, worse in zip(records, *answers, strict=True):
        pair = {name: record[name] for name in KEPT} | {"probability": 1.0}
        pair["first"] = {"wording": record["wording"], "response": better.text}
        pair["second"] = {"wording": record["wording"], "response": worse.text}
        found.append(pair)
    return found


def write_useful(run, pairs: list[dict]) -> None:
    """Write preferences.jsonl, and say how many pairs are left out. Raises ValueError for all."""
    path, useful = run.folder / "preferences.jsonl", list(filter(differs, pairs))
    if not useful:
        raise ValueError(f"rlcd: not one of {len(pairs)} pairs has two answers that differ. Raise "
                         "--temperature, or give prompts that differ more.")
    path.unlink(missing_ok=True)
    data.append_records(path, useful)
    run.say(f"rlcd: the two prompts gave equal or empty answers in {len(pairs) - len(useful)} of "
            f"{len(pairs)} pairs, which are left out.")


def differs(pair: dict) -> bool:
    """Whether a pair has two answers, and they differ."""
    first, second = pair["first"]["response"].strip(), pair["second"]["response"].strip()
    return bool(first and second) and first != second


def items(run) -> list[dict]:
    """The pairs, with each document's log-probability under the starting model."""
    return add_reference(run, labelled_items(run, run.folder / "preferences.jsonl"))
