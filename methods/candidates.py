"""What preference methods learn from: sampled answers to one question, with their rewards.

CAT's way to collect them (arXiv 2403.14221): sample answers to fresh inputs under several training
wordings, let a judge reward each, and write everything to candidates.jsonl. A line holds

    task, id, instruction, wording, input, target, sample, response, finished,
    reward, how (the reward came about), expected, correct, p_expected, p_correct

Every method that imports this file trains on the same lines, so only the method differs.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal

import data
from eval import complete, extra
from methods import agreement, common, merged_copy, probe, probe_questions
from methods.agreement import question_key
from methods.finding import find_method
from methods.flags import flag, rare
from methods.rewards import JudgeFlags, check_judge, make_judge, rewarded
from methods.unlabelled import pool_instances


@dataclass
class SampleFlags(common.Flags):
    """What every method reads that samples answers from the model of an earlier stage."""

    init: str = flag("", "run folder to continue from: its settings and finished stages", path=True)
    sft_steps: int = flag(200, "steps of the SFT stages on the way", at_least=1)
    sft_lr: float = rare(2e-4, "learning rate of the SFT stages", above=0)
    compare: bool = flag(True, "also train and show the stages it is compared with")
    rounds: int = flag(1, "collect and train so many times (online)", at_least=1)
    pool_per_task: int = flag(20, "fresh instances per task to sample for", at_least=1)
    samples: int = rare(2, "answers per instance and wording", at_least=1)
    temperature: float = rare(1.0, "sampling temperature", at_least=0)
    top_p: float = rare(1.0, "nucleus sampling", share=True)


@dataclass
class AnswerFlags(SampleFlags):
    """What every method reads that samples answers under several wordings."""

    unlabelled: str = flag("", "file of inputs without targets to sample for", path=True)
    wordings: int = flag(10, "training wordings per task beside the instruction", at_least=0)
    augment: Literal["assign", "product"] = rare("assign", "one wording per instance, or all")
    pool_wordings: int = rare(6, "wordings per instance to sample under", at_least=1)
    fresh_wordings: int = rare(0, "sample under so many wordings unseen in SFT(IA)", at_least=0)
    probe_inputs: int = rare(5, "unlabelled inputs per task to measure agreement on", at_least=0)
    patience: int = rare(0, "end after so many measurements without more agreement", at_least=0)
    max_passes: float = rare(0.0, "at most so many passes over the items, 0: any", at_least=0)


@dataclass
class Flags(AnswerFlags, JudgeFlags):
    """The flags of the methods that train on scored candidates."""

    candidates: str = flag("", "train on this candidates.jsonl instead of collecting", path=True)
    max_worse: int = rare(3, "lower-rewarded answers per item", at_least=1)


DEFAULTS = {"steps": 100, "batch_size": 16, "lr": 1e-4}
kind = "candidates"
needs, beside = "sft-ia", ("sft",)


# ----- Collecting -----
def collect(run, *, judged=True) -> None:
    """Sample answers and reward them, chunk by chunk; a stopped run continues after the last."""
    cfg, path = run.cfg, run.folder / "candidates.jsonl"
    if cfg.candidates or getattr(cfg, "preferences", ""):  # a file has them
        return
    todo = unanswered(run)
    missing = {candidate_key(record) for record in not_kept(run, path, todo)}
    todo = whole_questions(todo, missing)
    run = replace(run, model=merged_copy(run.model))
    judge = make_judge(run) if judged else None
    if judged and cfg.judge == "self":
        from methods import judge_auc

        judge_auc.measure(run, judge)
    for chunk in run.chunks(todo, "collect", question_key):
        records = rewarded(run, answered(run, chunk), judge)
        run.guard.keep(path, [record for record in records if candidate_key(record) in missing])
    if judged and cfg.judge == "agreement":
        run.guard.first(lambda: agreement.tell(run, data.read_records(path)))
    judges = extra("judges", cfg.plain)
    if judges and judged:
        judges.after_collecting(run, judge, unanswered)


def whole_questions(records: list[dict], missing: set[tuple]) -> list[dict]:
    """The records of all questions that lack an answer; missing: keys of candidates.

    A judge of agreement looks at all answers to a question. So if one of them is missing, all are
    sampled again, from the same seeds.
    """
    unfinished = set()
    for record in records:
        if candidate_key(record) in missing:
            unfinished.add(question_key(record))
    return [record for record in records if question_key(record) in unfinished]


def candidate_key(record: dict) -> tuple:
    """What tells one candidate from another."""
    return record["task"], record["id"], record["wording"], record["sample"]


def not_kept(run, path, records: list[dict]) -> list[dict]:
    """The records that a stopped run has not collected yet."""
    done = run.guard.kept(path, candidate_key)
    return [record for record in records if candidate_key(record) not in done]


def unanswered(run) -> list[dict]:
    """The answers to collect, without responses: this round's instances x wordings x samples."""
    cfg, records = run.cfg, []
    for task in run.tasks:
        texts, start = sampled_wordings(task, cfg), run.round * cfg.pool_per_task
        for instance in pool_instances(run, task)[start:start + cfg.pool_per_task]:
            rng = random.Random(f"pool/{cfg.seed}/{task.name}/{instance.id}")
            few = min(getattr(cfg, "pool_wordings", 1), len(texts))
            for wording in rng.sample(texts, few):
                for sample in range(cfg.samples):
                    records.append(record_to_answer(task, instance, wording, sample))
    if not records:
        raise ValueError(f"round {run.round + 1} finds no instance left to sample for. Lower "
                         "--pool-per-task or --rounds.")
    return records


def record_to_answer(task, instance, wording, sample) -> dict:
    """A candidate before it has a response."""
    record = {"task": task.name, "id": instance.id, "sample": sample,
              "instruction": task.definition, "wording": wording, "input": instance.input,
              "target": None}
    if instance.outputs:
        record["target"] = instance.outputs[0]
    if len(instance.outputs) > 1:
        record["targets"] = list(instance.outputs)
    return record


def sampled_wordings(task, cfg) -> list[str]:
    """The wordings to sample under; methods on judged responses use the instruction alone."""
    texts = [task.definition]
    if hasattr(cfg, "pool_wordings"):
        train = [wording.text for wording in task.wordings.get("train", [])]
        texts += train[:cfg.wordings]
        if cfg.fresh_wordings:  # those behind the ones that SFT(IA) has seen
            texts = train[cfg.wordings:cfg.wordings + cfg.fresh_wordings]
        if not texts:
            raise ValueError(f"task {task.name} has {len(train)} training wordings, so there are "
                             "none for --fresh-wordings. Lower --wordings, or give "
                             "--fresh-wordings 0.")
    return texts


def sample_prompts(run, records: list[dict], prompts: list[str]) -> list:
    """One completion per record. Each draws from its own seed, so chunks change nothing."""
    from model import Sampling

    cfg, asked = run.cfg, []
    for record, prompt in zip(records, prompts, strict=True):
        rng = random.Random(f"{cfg.seed}/{candidate_key(record)}")
        asked.append((prompt, rng.getrandbits(31)))
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.top_p)

    def work(part):
        texts, seeds = zip(*part, strict=True)
        return complete(run.model, run.tokenizer, list(texts), sampling, seeds=list(seeds),
                        batch_size=cfg.eval_batch, max_len=cfg.max_len)
    return run.guard.share(asked, work)


def answered(run, records: list[dict]) -> list[dict]:
    """The records with a sampled response."""
    mark, prompts, found = "", [], []
    if run.round:  # conditional tokens, once the model knows them
        mark = run.prefix()
    for record in records:
        prompts.append(run.template.render(mark + record["wording"], record["input"]))
    for record, response in zip(records, sample_prompts(run, records, prompts), strict=True):
        found.append(record | {"response": response.text, "finished": response.finished})
    return found


def begin(run) -> None:
    """Measure what is known without targets before the first step (methods/probe.py)."""
    probe.begin(run, sampled_wordings)


def remark(run, results) -> str:
    """What the model saw of which wordings, below the table."""
    cfg, before = run.cfg, find_method(run.method.needs).title
    if not cfg.fresh_wordings or cfg.candidates or before not in results:
        return ""
    fresh = max(len(sampled_wordings(task, cfg)) for task in run.tasks)
    old, new = (100 * results[title]["cr"]["mean"] for title in (before, run.method.title))
    return (f"{before} saw targets under the instruction and {cfg.wordings} wordings of each task. "
            f"Then the model's own answers under {fresh} others were rewarded by "
            f"--judge {cfg.judge}: CR {new - old:+.1f} points.")


# ----- Before a run -----
def inspect(run) -> None:
    """Raises ValueError if a round would find no instance to sample for, or --patience none."""
    cfg = run.cfg
    if hasattr(cfg, "patience"):
        probe_questions.check_questions(run, sampled_wordings)
    if run.tasks and not (getattr(cfg, "candidates", "") or getattr(cfg, "records", "")):
        for number in range(cfg.rounds):
            unanswered(replace(run, round=number))


def check(cfg) -> None:
    """Raises ValueError for flags that do not fit together."""
    check_judge(cfg)
    if cfg.unlabelled and cfg.judge in ("rule", "length"):
        raise ValueError(f"--judge {cfg.judge} reads targets, and --unlabelled has none. Give "
                         "--judge agreement, self or http.")
    if getattr(cfg, "pairs", "best") == "all" and cfg.condition == "worse":
        raise ValueError("--pairs all compares lower answers, too, and --condition worse only the "
                         "best with each of them. Add --condition own or original.")
    if cfg.unlabelled and getattr(cfg, "ce_target", "") == "gold":
        raise ValueError("--ce-target gold imitates targets, and --unlabelled has none. Leave one "
                         "of them out.")
