"""What methods on judged responses learn from: answers with a written judgment of each.

A line of judged.jsonl holds at least instruction, input, response, and judgment: what is wrong, in
words, or null if the response satisfies (CUT, arXiv 2312.14591). Judgments come from rules, from
the model itself, from the adapter of stage critic, or from a server; or from a file, --records.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import data
from eval import complete, extra
from methods import candidates, merged_copy, open_trained, record_name
from methods.candidates import SampleFlags, answered, not_kept, unanswered
from methods.critics import FAILED, LocalCritic, RuleCritic, critic_prompt
from methods.flags import flag
from methods.groups import read_fields
from methods.settings import has_result


@dataclass
class Flags(SampleFlags):
    """The flags of the methods that train on judged responses."""

    records: str = flag("", "train on this file of judged responses", path=True)
    judge: Literal["rule", "self", "http"] = flag("rule", "who writes judgments")
    critic: str = flag("", "run folder of stage critic, for --judge self; or http")
    downsample: float = flag(0.25, "satisfying responses kept per other, 0: all", at_least=0)


DEFAULTS = {"steps": 120, "batch_size": 16, "samples": 1}
kind = "judged"
needs = "sft"
unread = ("eval_wordings",)  # error rates are under the task's own instruction


inspect = candidates.inspect


def check(cfg) -> None:
    """Raises ValueError for flags that do not fit together."""
    if cfg.critic not in ("", "http") and cfg.judge != "self":
        raise ValueError("--critic writes judgments only with --judge self. Add that, or leave "
                         "--critic out.")
    if cfg.critic not in ("", "http") and not has_result(Path(cfg.critic)):
        raise ValueError(f"--critic {cfg.critic} holds no finished run. Give one of --stage "
                         "critic.")
    if "http" in (cfg.judge, cfg.critic) and not extra("judges", cfg.plain):
        raise ValueError("judgments by a server need extras/judges. Leave out --plain, or give "
                         "--judge rule.")
    if cfg.model and not cfg.tasks and not cfg.records:
        raise ValueError(f"--stage {cfg.stage} with --model needs --tasks DIR to sample answers "
                         "to, or --records FILE of judged responses.")


# ----- Collecting -----
def collect(run) -> None:
    """Sample answers and have them judged in words; a stopped run continues after the last."""
    cfg, path, empty = run.cfg, run.folder / "judged.jsonl", 0
    if cfg.records:
        return
    todo = not_kept(run, path, unanswered(run))
    critic = make_critic(run)
    run = replace(run, model=merged_copy(run.model))
    for chunk in run.chunks(todo, "collect"):
        records = []
        for record in answered(run, chunk):
            if "{input}" in record["instruction"]:  # from here on it is text like any other
                text = record["instruction"].replace("{input}", record["input"])
                record |= {"instruction": text, "input": ""}
            if record["response"].strip():
                records.append(record)
        empty += len(chunk) - len(records)
        judgments = critic.critique(records)
        run.guard.keep(path, [record | {"judgment": judgment} for record, judgment
                              in zip(records, judgments, strict=True)])
    if empty:
        run.say(f"{cfg.stage}: {empty} empty responses were not recorded.")


def make_critic(run):
    """Who writes judgments: rules, a server, or the model (with the adapter of --critic)."""
    cfg = run.cfg
    if "http" in (cfg.judge, cfg.critic):
        return extra("judges", cfg.plain).server_critic(cfg, run)
    if cfg.judge == "rule":
        return RuleCritic()
    model = open_trained(cfg, Path(cfg.critic)) if cfg.critic else run.model
    run = replace(run, model=merged_copy(model))
    return LocalCritic(lambda prompts: write_texts(run, prompts))


def write_texts(run, asked: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    """The model's greedy texts for (instruction, input) pairs, and whether each ended."""
    from model import Sampling

    prompts = [run.template.render(*pair) for pair in asked]

    def work(part):
        made = complete(run.model, run.tokenizer, part, Sampling(run.cfg.max_new_tokens),
                        batch_size=run.cfg.eval_batch, max_len=run.cfg.max_len)
        return [(response.text, response.finished) for response in made]
    return run.guard.share(prompts, work)


# ----- From records to items -----
def judged_records(run) -> list[dict]:
    """The judged responses to train on, from --records or as collected; says what was dropped.

    Satisfying ones are reduced to --downsample per other one, as the CUT authors do. Those whose
    judgment failed are dropped.
    """
    cfg, formats = run.cfg, extra("formats", run.cfg.plain)
    path = cfg.records or run.folder / "judged.jsonl"
    if formats:
        records = formats.fitting_records(run, formats.read_judged(path))
    else:
        records = read_fields(path, "instruction input response judgment")
    negative = [record for record in records if record["judgment"] is not None]
    kept = positive = [record for record in records if record["judgment"] is None]
    room = int(cfg.downsample * len(negative))
    if cfg.downsample and len(positive) > room:
        kept = random.Random(cfg.seed).sample(positive, room)
    usable = [record for record in negative if record["judgment"].strip() != FAILED]
    run.say(f"{cfg.stage}: {len(negative)} unsatisfying responses ({len(negative) - len(usable)} "
            f"of them without a judgment, dropped), {len(positive)} satisfying ones, {len(kept)} "
            "of them kept.")
    return usable + kept


def judged_document(run, record: dict, judgment: str | None = None) -> dict:
    """The response behind its prompt, with or without a judgment in it; its ids are the same."""
    prompt = run.template.render(record["instruction"], record["input"], judgment, literal=True)
    return data.encode_example(run.tokenizer, run.template, prompt, record["response"],
                               max_len=run.cfg.max_len)


def critic_document(run, record: dict, judgment: str) -> dict:
    """A judgment as the response to a critic's prompt."""
    asked = critic_prompt(record["instruction"], record["input"], record["response"])
    return data.encode_example(run.tokenizer, run.template, run.template.render(*asked), judgment,
                               max_len=run.cfg.max_len)


def record_key(record: dict) -> str:
    """What tells one judged response from another."""
    return json.dumps([record["instruction"], record["input"], record["response"]])


def one_document(record: dict, document: dict) -> dict:
    """An item of a single document."""
    return {"documents": [document], "name": record_name(record)}


def report(run, ladder: dict) -> None:
    """Error rates of greedy and of sampled answers under the tasks' own instructions."""
    reports = extra("reports", run.cfg.plain)
    if reports and run.cfg.evaluate and run.tasks:
        reports.report_judged(run, ladder)
    else:
        run.say(f"{run.cfg.stage}: nothing is evaluated (error rates are in extras/reports). The "
                f"adapter is in {run.cfg.out}.")
