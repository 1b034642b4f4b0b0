"""What preference methods learn from: sampled answers to one question, with their rewards.

CAT's way to collect them (arXiv 2403.14221): sample answers to fresh inputs under several training
wordings, let a judge reward each, and write everything to candidates.jsonl. A line holds

    task, id, instruction, wording, input, target, sample, response, finished,
    reward, how (the reward came about), expected, correct, p_expected, p_correct

Every method that imports this file trains on the same lines, so only the method differs.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import data
import judge as judging
from eval import complete, extra
from methods import common, merged_copy
from methods.flags import flag, rare


@dataclass
class SampleFlags(common.Flags):
    """What every method reads that samples answers from the model of an earlier stage."""

    init: str = flag("", "run folder to continue from: its settings and finished stages", path=True)
    sft_steps: int = flag(200, "steps of the SFT stages on the way", at_least=1)
    sft_lr: float = rare(2e-4, "learning rate of the SFT stages", above=0)
    compare: bool = flag(True, "also train and show the stages it is compared with")
    rounds: int = flag(1, "collect and train so many times (online)", at_least=1)
    pool_per_task: int = flag(20, "fresh instances per task to sample for", at_least=1)
    samples: int = flag(2, "answers per instance and wording", at_least=1)
    temperature: float = flag(1.0, "sampling temperature", at_least=0)
    top_p: float = rare(1.0, "nucleus sampling", share=True)


@dataclass
class Flags(SampleFlags):
    """The flags of the methods that train on scored candidates."""

    candidates: str = flag("", "train on this candidates.jsonl instead of collecting", path=True)
    judge: Literal["self", "rule", "http", "reward", "length"] = flag(
        "self", "who rewards answers")
    wordings: int = flag(10, "training wordings per task beside the instruction", at_least=0)
    augment: Literal["assign", "product"] = rare("assign", "one wording per instance, or all")
    pool_wordings: int = flag(6, "wordings per instance to sample under", at_least=1)
    fresh_wordings: int = rare(0, "sample under so many wordings unseen in SFT(IA)", at_least=0)
    max_worse: int = rare(3, "lower-rewarded answers per item", at_least=1)
    reward_model: str = rare("", "run folder of stage reward, for --judge reward", path=True)
    reward_mode: Literal["gated", "sum"] = rare("gated", "how two answers are combined")
    reward_steps: Literal["two", "one"] = rare("two", "ask type and correctness")
    show_target: bool = rare(True, "let the judge see the reference")
    self_questions: int = rare(1, "questions of the self-judge, 1 or 2", at_least=1)
    self_prior: bool = rare(False, "minus its log-odds for no answer")
    self_calibrate: bool = rare(False, "fit its threshold")


DEFAULTS = {"steps": 100, "batch_size": 16, "lr": 1e-4}
kind = "candidates"
needs, beside = "sft-ia", ("sft",)


# ----- Collecting -----
def collect(run, *, judged=True) -> None:
    """Sample answers and reward them, chunk by chunk; a stopped run continues after the last."""
    cfg, path = run.cfg, run.folder / "candidates.jsonl"
    if cfg.candidates or getattr(cfg, "preferences", ""):  # a file has them
        return
    todo = not_kept(run, path, unanswered(run))
    run = replace(run, model=merged_copy(run.model))
    judge = make_judge(run) if judged else None
    if judged and cfg.judge == "self":
        from methods import judge_auc

        judge_auc.measure(run, judge)
    for chunk in run.chunks(todo, "collect"):
        records = answered(run, chunk)
        run.guard.keep(path, rewarded(run, records, judge))
    judges = extra("judges", cfg.plain)
    if judges and judged:
        judges.after_collecting(run, judge, unanswered)


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
        for instance in data.split_instances(task, "pool")[start:start + cfg.pool_per_task]:
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
              "target": instance.outputs[0]}
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
                             "none for --fresh-wordings. Lower --wordings.")
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


def rewarded(run, records: list[dict], judge) -> list[dict]:
    """The records with what the judge says of each; without a judge, with no reward."""
    if judge is None:
        return [record | {"reward": None, "how": "unasked"} for record in records]
    found = []
    for record, verdict in zip(records, judge.judge(with_labels(run, records)), strict=True):
        found.append(record | as_fields(verdict))
    return found


def with_labels(run, records: list[dict]) -> list[dict]:
    """The records with the closed set of labels of their task, which rules look at."""
    # None for free text.
    labels = {task.name: task.labels for task in run.tasks}
    return [record | {"labels": labels.get(record["task"])} for record in records]


def as_fields(verdict: judging.Verdict) -> dict:
    """A verdict as the fields of a record."""
    return {"reward": verdict.reward, "how": verdict.how, "expected": verdict.type,
            "correct": verdict.correct, "p_expected": verdict.p_expected,
            "p_correct": verdict.p_correct}


# ----- Judges -----
def make_judge(run, config: judging.JudgeConfig | None = None):
    """The judge that --judge names: the model as it is now, rules, a server, or a number."""
    cfg = run.cfg
    if cfg.judge == "rule":
        return judging.RuleJudge(cfg.rouge_threshold)
    if cfg.judge in ("reward", "length"):
        from methods import heads

        return heads.score_judge(run, cfg.reward_model)
    if config is None:
        config = judging.JudgeConfig(cfg.reward_mode, cfg.reward_steps, cfg.show_target)
    if cfg.judge == "self":
        from methods import self_judge

        return self_judge.make(run, config)
    if extra("judges", cfg.plain):
        return extra("judges", cfg.plain).server_judge(cfg, config, run)
    return judging.HttpJudge(cfg.judge_url, cfg.judge_model, config)


# ----- Before a run -----
def inspect(run) -> None:
    """Raises ValueError if a round would find no instance to sample for."""
    cfg = run.cfg
    if run.tasks and not (getattr(cfg, "candidates", "") or getattr(cfg, "records", "")):
        for number in range(cfg.rounds):
            unanswered(replace(run, round=number))


def check(cfg) -> None:
    """Raises ValueError for flags that do not fit together."""
    if cfg.reward_model and cfg.judge != "reward":
        raise ValueError(f"--reward-model is for --judge reward, not {cfg.judge}. Add that, or "
                         "leave it out.")
    if cfg.reward_model and not Path(cfg.reward_model, "value_head.safetensors").exists():
        raise ValueError(f"--reward-model {cfg.reward_model} has no value_head.safetensors. Give a "
                         "run folder of --stage reward.")
    if cfg.judge == "reward" and not cfg.reward_model:
        raise ValueError("--judge reward needs --reward-model DIR, a run folder of --stage reward.")
    if cfg.self_questions > 2:
        raise ValueError(f"--self-questions is {cfg.self_questions}. There are 2; give 1 or 2.")
    if cfg.judge != "self" and (cfg.self_questions > 1 or cfg.self_prior or cfg.self_calibrate):
        raise ValueError("--self-questions, --self-prior and --self-calibrate are for --judge "
                         f"self, not {cfg.judge}. Add that, or leave them out.")
