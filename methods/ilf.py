"""Imitation learning from language feedback (ILF): learn the response that a judgment led to.

The model refines each bad response by its judgment a few times; the refinement that the judge
rewards most is imitated, and good responses are as they are   (arXiv 2204.14146; CUT's paper,
Eq. 2-3). The loss is the mean likelihood of a response's tokens.

DEVIATION: with --judge rule the judge of the refinements knows the target.
"""

from dataclasses import dataclass, replace

import data
import judge as judging
from judge import flatten
from methods import judged, merged_copy, sequence_step
from methods.candidates import sample_prompts
from methods.flags import flag
from methods.judged import judged_document, judged_records, one_document, record_key
from methods.rewards import make_judge

title = "ILF"
base = judged


@dataclass
class Flags(judged.Flags):
    """What stage ilf reads beside the common flags."""

    refinements: int = flag(5, "refinements sampled per bad response", at_least=1)


TERMS = {"ce": "items"}
step = sequence_step


def items(run) -> list[dict]:
    """The chosen refinement of each bad response, and the good ones."""
    found, kept, refined = [], 0, {}
    for row in data.read_records(run.folder / "refined.jsonl"):
        refined[row["key"]] = row["refinement"]
    for record in judged_records(run):
        if record["judgment"] is not None:
            text = record.get("refinement") or refined.get(record_key(record)) or ""
            record = record | {"response": text}
            kept += bool(text)
        if record["response"]:
            found.append(one_document(record, judged_document(run, record)))
    run.say(f"ilf: {kept} refinements.")
    return found


def collect(run) -> None:
    """Judged responses, then for each bad one the best of several refinements."""
    judged.collect(run)
    cfg, path, todo = run.cfg, run.folder / "refined.jsonl", []
    done = run.guard.kept(path, lambda row: row["key"])
    for record in judged_records(run):
        bad = record["judgment"] is not None and not record.get("refinement")
        if bad and record_key(record) not in done:
            todo.append(record)
    has_targets = all(record.get("target") is not None for record in todo)
    if cfg.judge == "rule" and not has_targets:
        raise ValueError(f"{cfg.records} has records without a target, which --judge rule needs. "
                         "Give --judge self.")
    run = replace(run, model=merged_copy(run.model))
    judge = refinement_judge(run, has_targets)
    for start in range(0, len(todo), cfg.eval_batch):
        part = todo[start:start + cfg.eval_batch]
        tried = refinements(run, part)
        verdicts = judge.judge(tried)
        for k, record in enumerate(part):
            # of a record's own refinements the one with the highest reward, the first of equals
            span = range(k * cfg.refinements, (k + 1) * cfg.refinements)
            best = max(span, key=lambda i: (verdicts[i].reward or 0, -i))
            text = tried[best]["response"]
            if text.strip() in ("", record["response"].strip()):
                text = None
            row = {"key": record_key(record), "refinement": text, "reward": verdicts[best].reward}
            run.guard.keep(path, [row])


def refinements(run, records: list[dict]) -> list[dict]:
    """The records, each as often as refinements are sampled, with those as responses."""
    asked, prompts, found = [], [], []
    for record in records:
        name = {"task": "", "id": record_key(record), "wording": ""}
        for k in range(run.cfg.refinements):
            asked.append(record | name | {"sample": k})
            prompts.append(run.template.render(*refine_prompt(record)))
    for record, made in zip(asked, sample_prompts(run, asked, prompts), strict=True):
        found.append(record | {"response": made.text})
    return found


def refinement_judge(run, show_target: bool):
    """Rules, or the model itself, or a server; the settings of rewards are the usual ones."""
    if run.cfg.judge == "rule":
        return judging.RuleJudge(run.cfg.rouge_threshold)
    return make_judge(run, judging.JudgeConfig(show_target=show_target))


def refine_prompt(record: dict) -> tuple[str, str]:
    """What a model is asked to improve a response by its judgment, as instruction and input."""
    asked = f"{flatten(record['instruction'])} {flatten(record['input'])}".strip()
    return ("write the answer again as the judgment says .",
            f"{asked} ### Answer: {flatten(record['response'])} "
            f"### Judgment: {flatten(record['judgment'])}")
