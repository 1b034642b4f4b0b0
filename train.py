"""Train: stages, the one loop, collecting records, runs that continue where they stopped.

    python train.py --stage cat                                   # the demo: base, SFT, SFT(IA), CAT, and a table
    python train.py --stage cat --model DIR --tasks DIR --paraphrases FILE --out runs/x

Stages so far: `pretrain` (next token), `sft` and `sft-ia` (instruction fine-tuning without and with instruction
augmentation, arXiv 2403.14221 stage 1), `cat` (consistency alignment training, stage 2: sample answers to paraphrased
instructions, let the model reward them itself, rank the good over the bad). A stage that needs an earlier one finds
its adapter in the run folder, or trains it first. Order of this file: flags, stages, loop, pipeline, command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal

from eval import complain, fail, flag, parse_flags

HERE = Path(__file__).parent
TUNING, PREFERENCE = ("sft", "sft-ia", "cat"), ("cat",)


@dataclass
class TrainConfig:
    """Every flag of train.py. Precedence: this default < the stage's < the demo's < the command line."""

    stage: str = flag("cat", "what to train")
    model: str = flag("", "Hugging Face folder of the base model (default: demo/base)")
    tokenizer: str = flag("", "tokenizer.model, where the model folder has none")
    template: str = flag("", "prompt template: alpaca or plain (default: the checkpoint's own, else alpaca)")
    tasks: str = flag("", "task file or folder (default: demo/tasks)", TUNING)
    paraphrases: str = flag("", "JSON file of wordings per task (default for the demo's tasks: demo/paraphrases.json)", TUNING)
    out: str = flag("", "run folder (default: runs/STAGE)")
    init: str = flag("", "run folder in which finished earlier stages are looked for (default: --out)", PREFERENCE)
    seed: int = flag(0, "seeds examples, order, adapters and sampling")
    device: str = flag("auto", "cpu, cuda, cuda:1, ... (auto: cuda where there is one)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "type of the base weights (auto: bfloat16 on a GPU, else float32)")
    # examples
    wordings: int = flag(10, "training wordings per task beside the original instruction", ("sft-ia", "cat"))
    augment: Literal["assign", "product"] = flag("assign", "give each instance one wording, or all of them", ("sft-ia", "cat"))
    per_task: int = flag(100, "training instances per task", TUNING)
    judge_share: float = flag(0.0, "share of training examples that teach judging (answers to the train instances, judged by rule)", TUNING)
    max_len: int = flag(512, "longest document in tokens; an over-long prompt loses its left")
    # optimisation
    steps: int = flag(200, "optimiser steps")
    batch_size: int = flag(24, "examples (cat: groups) per step")
    sft_steps: int = flag(200, "steps of the SFT stages on the way", PREFERENCE)
    sft_lr: float = flag(2e-4, "learning rate of the SFT stages on the way", PREFERENCE)
    micro_tokens: int = flag(8192, "most tokens per forward pass; bounds memory, changes no result")
    lr: float = flag(2e-4, "peak learning rate")
    warmup_ratio: float = flag(0.05, "share of the steps that warm up")
    min_lr_ratio: float = flag(0.1, "final learning rate as a share of the peak (cosine)")
    weight_decay: float = flag(0.0, "AdamW weight decay")
    clip: float = flag(1.0, "largest gradient norm")
    full: bool = flag(False, "train all weights instead of an adapter")
    rank: int = flag(16, "adapter rank", TUNING)
    alpha: float = flag(32.0, "adapter scale: alpha / rank", TUNING)
    dropout: float = flag(0.0, "adapter dropout", TUNING)
    # collecting candidates
    pool_per_task: int = flag(20, "fresh instances per task that candidates are sampled for", PREFERENCE)
    pool_wordings: int = flag(6, "training wordings per instance that candidates are sampled under", PREFERENCE)
    samples: int = flag(2, "answers per instance and wording", PREFERENCE)
    temperature: float = flag(1.0, "sampling temperature", PREFERENCE)
    top_p: float = flag(1.0, "nucleus sampling", PREFERENCE)
    candidates: str = flag("", "train on this candidates.jsonl instead of collecting", PREFERENCE)
    judge: Literal["self", "rule"] = flag("self", "who rewards the candidates: the model itself, or exact rules", PREFERENCE)
    reward_mode: Literal["gated", "sum"] = flag("gated", "how answer type and correctness make the reward", PREFERENCE)
    reward_steps: Literal["two", "one"] = flag("two", "ask type then correctness, or correctness alone", PREFERENCE)
    show_target: bool = flag(True, "let the judge see the reference answer", PREFERENCE)
    rouge_threshold: float = flag(0.7, "ROUGE-L from which the rule judge accepts a free answer", TUNING)
    # CAT
    lam: float = flag(1.0, "weight of the cross-entropy term", PREFERENCE)
    margin: float = flag(0.0, "margin of the ranking term", PREFERENCE)
    pairs: Literal["best", "all"] = flag("best", "rank only the best over the rest, or every better over every worse", PREFERENCE)
    condition: Literal["own", "original", "worse"] = flag("own", "the wording under which the best answer is scored", PREFERENCE)
    ce_target: Literal["best", "gold"] = flag("best", "cross-entropy on the best sampled answer, or on the reference (a control)", PREFERENCE)
    ranking: bool = flag(True, "use the ranking term (off: cross-entropy alone, a control)", PREFERENCE)
    max_worse: int = flag(3, "lower-rewarded answers per item", PREFERENCE)
    # pre-training
    corpus: str = flag("", "JSON Lines of documents: lists of [text, is_label]", ("pretrain",))
    preset: str = flag("demo", "shape of the new model", ("pretrain",))
    export: str = flag("", "folder for the finished model", ("pretrain",))
    # evaluation
    evaluate: bool = flag(True, "answer held-out questions before and after, and write the report", TUNING)
    compare: bool = flag(True, "also train and evaluate the stages that this one is compared with", PREFERENCE)
    split: Literal["dev", "test"] = flag("dev", "which held-out inputs and wordings to report on", TUNING)
    eval_per_task: int = flag(16, "held-out instances per task", TUNING)
    eval_wordings: int = flag(8, "held-out wordings per task", TUNING)
    max_new_tokens: int = flag(128, "longest answer in tokens", TUNING)
    eval_batch: int = flag(128, "answers generated side by side", TUNING)


STAGE_DEFAULTS = {
    "pretrain": dict(full=True, steps=3000, batch_size=40, lr=2.5e-3, weight_decay=0.05, max_len=512),
    "sft": dict(),
    "sft-ia": dict(),
    "cat": dict(steps=100, batch_size=16, lr=1e-4),
}
DEMO_MODEL = {                                              # a model of two million parameters wants larger steps
    "sft": dict(lr=2e-3, steps=300), "sft-ia": dict(lr=2e-3, steps=300), "cat": dict(lr=5e-4, sft_lr=2e-3, sft_steps=300),
}
DEMO_TASKS = dict(per_task=24, judge_share=0.2, max_new_tokens=24, rouge_threshold=0.95)


def parse_config(argv=None) -> TrainConfig:
    """Command line -> config. A mistake prints one sentence and exits with 2."""
    given = parse_flags(TrainConfig, argv, __doc__.split("Stages so far")[0])
    stage = given.get("stage", "cat")
    if stage not in STAGE_DEFAULTS:
        near = difflib.get_close_matches(stage, STAGE_DEFAULTS, 1)
        fail(f'unknown stage "{stage}". Stages: {", ".join(STAGE_DEFAULTS)}.'
             + (f' Did you mean "{near[0]}"?' if near else ""))
    for item in dataclasses.fields(TrainConfig):
        if item.name in given and item.metadata["only"] and stage not in item.metadata["only"]:
            fail(f'--{item.name.replace("_", "-")} means nothing to stage "{stage}", only to '
                 f'{", ".join(item.metadata["only"])}. Leave it out.')
    demo_model = {} if given.get("model") or stage == "pretrain" else DEMO_MODEL[stage]
    demo_tasks = {} if given.get("tasks") or stage == "pretrain" else DEMO_TASKS
    cfg = TrainConfig(**{**STAGE_DEFAULTS[stage], **demo_model, **demo_tasks, **given})
    problem = check_config(cfg)
    if problem:
        fail(problem)
    return fill_paths(cfg)


def check_config(cfg: TrainConfig) -> str:
    """What is wrong with the values, in one sentence, or nothing."""
    for name in ("steps", "sft_steps", "batch_size", "micro_tokens", "max_len", "rank", "samples", "pool_wordings", "max_new_tokens",
                 "eval_per_task", "max_worse", "per_task", "pool_per_task", "eval_batch"):
        if getattr(cfg, name) < 1:
            return f"--{name.replace('_', '-')} is {getattr(cfg, name)}. Expected 1 or more."
    for name in ("lr", "sft_lr", "clip", "alpha"):
        if not getattr(cfg, name) > 0 or math.isinf(getattr(cfg, name)):
            return f"--{name} is {getattr(cfg, name)}. Expected a positive number."
    for name, top in (("dropout", 1), ("judge_share", 1), ("warmup_ratio", 1), ("min_lr_ratio", 1), ("top_p", 1.0001)):
        if not 0 <= getattr(cfg, name) < top:
            return f"--{name.replace('_', '-')} is {getattr(cfg, name)}. Expected a share between 0 and 1."
    if cfg.temperature < 0 or cfg.lam < 0 or cfg.margin < 0 or cfg.wordings < 0:
        return "--temperature, --lam, --margin and --wordings cannot be negative."
    if cfg.eval_wordings < 2:
        return f"--eval-wordings is {cfg.eval_wordings}. Consistency needs at least 2."
    for name in ("model", "tasks", "paraphrases", "corpus", "candidates", "tokenizer", "init"):
        path = getattr(cfg, name)
        if path and not Path(path).exists():
            return f"--{name} {path} does not exist. Give a path that does."
    if cfg.stage == "pretrain" and not (cfg.corpus and cfg.tokenizer):
        return "stage pretrain needs --corpus FILE and --tokenizer FILE; demo/make_base.py makes both."
    return ""


def fill_paths(cfg: TrainConfig) -> TrainConfig:
    """The paths that were left out: the demo's, and runs/STAGE."""
    demo_tasks = not cfg.tasks
    paraphrases = cfg.paraphrases or (str(HERE / "demo/paraphrases.json") if demo_tasks else "")
    model = cfg.model or ("" if cfg.stage == "pretrain" else str(HERE / "demo/base"))
    return dataclasses.replace(cfg, model=model, tasks=cfg.tasks or str(HERE / "demo/tasks"),
                               paraphrases=paraphrases, out=cfg.out or f"runs/{cfg.stage}")


def say(message: str) -> None:
    """Print once, however many processes there are."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


if __name__ == "__main__":
    parse_config()                                          # a mistake answers at once, before torch is imported

import torch                                                # noqa: E402
import torch.distributed as dist                            # noqa: E402
from tqdm import tqdm                                       # noqa: E402

import data                                                 # noqa: E402
import judge as judging                                     # noqa: E402
import lora                                                 # noqa: E402
import losses                                               # noqa: E402
from eval import EvalConfig, complete, evaluate_model, evaluate_responses, keyword_logprobs, summary_table, write_report    # noqa: E402
from model import PRESETS, Llama, load_model, save_model    # noqa: E402


# ---------------------------------------------------------------------------------------------------------------------
# Stages: how records come about, how a record becomes documents, the step


@dataclass
class Run:
    """What every part of a run needs: settings, model, texts, and the folder that it may write to."""

    cfg: TrainConfig
    model: torch.nn.Module
    tokenizer: data.Tokenizer
    template: data.Template
    tasks: list[data.Task]
    folder: Path

    def document(self, wording: str, input: str, response: str) -> dict:
        """Prompt and response as token ids and labels."""
        return data.encode_example(self.tokenizer, self.template, self.template.render(wording, input), response,
                                   max_len=self.cfg.max_len)


def corpus_groups(run: Run) -> list[dict]:
    """pretrain: one document per group; </s> as a last segment of its own is EOS."""
    groups = []
    for segments in data.read_records(run.cfg.corpus):
        ends = segments[-1][0] == "</s>"
        document = data.encode_document(run.tokenizer, segments[:-1] if ends else segments, max_len=run.cfg.max_len)
        if ends:
            document["input_ids"].append(run.tokenizer.eos_id)
            document["labels"].append(run.tokenizer.eos_id)
        groups.append({"documents": [document]})
    return groups


def sft_groups(run: Run, wordings: int) -> list[dict]:
    """sft, sft-ia: one document per instruction example, and judge_share of documents that teach judging."""
    cfg = run.cfg
    examples = data.instruction_examples(run.tasks, wordings=wordings, augment=cfg.augment, per_task=cfg.per_task,
                                         seed=cfg.seed)
    documents = [run.document(x["wording"], x["input"], x["output"]) for x in examples]
    documents += judge_documents(run, round(len(documents) * cfg.judge_share / (1 - cfg.judge_share)))
    return [{"documents": [document]} for document in documents]


def judge_documents(run: Run, n: int) -> list[dict]:
    """`n` documents in the self-judge's format over the train instances, judged by rule."""
    cfg, rule, rng = run.cfg, judging.RuleJudge(rouge_threshold=run.cfg.rouge_threshold), random.Random(f"judge/{run.cfg.seed}")
    by_input: dict[str, list[str]] = {}
    for task in run.tasks:
        for x in task.instances:
            by_input.setdefault(x.input, []).append(x.outputs[0])
    documents = []
    for _ in range(n):
        task = rng.choice(run.tasks)
        pool = data.split_instances(task, "train")[:cfg.per_task] or task.instances
        x = rng.choice(pool)
        target = x.outputs[0]
        answers = data.answer_candidates(target, same_task=[y.outputs[0] for y in pool], rng=rng, n=4,
                                         same_input=[text for text in by_input[x.input] if text != target])
        items = [{"instruction": task.definition, "input": x.input, "target": target, "response": text,
                  "labels": task.labels} for text in answers]
        judged = []
        for text, verdict in zip(answers, rule.judge(items)):
            ask_type = rng.random() < 0.5
            judged.append((text, verdict.type if ask_type else None, None if ask_type else verdict.correct))
        segments = judging.judge_document(task.definition, x.input, target if rng.random() < 0.75 else None, judged)
        documents.append(data.encode_document(run.tokenizer, segments, max_len=cfg.max_len))
    return documents


def cat_groups(run: Run) -> list[dict]:
    """cat: items of good answers and the answers below them for one task and input, from candidates.jsonl."""
    cfg, groups, skipped = run.cfg, [], {"no best": 0, "no worse": 0}
    for group in grouped_candidates(run):
        best = [c for c in group if c["reward"] == 2]
        worse = [c for c in group if c["reward"] is not None and c["reward"] < 2]
        if not best or not worse:
            skipped["no worse" if best else "no best"] += 1
            continue
        rng = random.Random(f"{cfg.seed}/{group[0]['task']}/{group[0]['id']}")
        worse = list({(c["wording"], c["response"]): c for c in worse}.values())
        rng.shuffle(worse)
        for start in range(0, len(worse), cfg.max_worse):
            groups.append(cat_item(run, rng.choice(best), worse[start:start + cfg.max_worse]))
    say(f"cat: {len(groups)} items; skipped {skipped['no best']} groups without a best answer and "
          f"{skipped['no worse']} with nothing below the best.")
    return groups


def cat_item(run: Run, best: dict, worse: list[dict]) -> dict:
    """{"documents": good answers first, "n_best", "pairs": [(better, worse)]} of one item (spec 2.5).

    `condition` own: each answer under the wording that produced it; original: all under the task's own instruction;
    worse: the good answer under each wording that failed, so that a pair answers one and the same prompt.
    """
    cfg, good = run.cfg, best["target"] if run.cfg.ce_target == "gold" else best["response"]
    wording = {"own": lambda c: c["wording"], "original": lambda c: c["instruction"], "worse": lambda c: c["wording"]}[cfg.condition]
    tops = list(dict.fromkeys(wording(c) for c in worse)) if cfg.condition == "worse" else [wording(best)]
    documents = [run.document(text, best["input"], good) for text in tops]
    documents += [run.document(wording(c), c["input"], c["response"]) for c in worse]
    n = len(tops)
    if cfg.condition == "worse":
        pairs = [(tops.index(c["wording"]), n + k) for k, c in enumerate(worse)]
    else:
        pairs = list(zip(*losses.best_vs_lower_pairs([2.0] + [float(c["reward"]) for c in worse], rule=cfg.pairs)))
    return {"documents": documents, "n_best": n, "pairs": pairs if cfg.ranking else []}


def grouped_candidates(run: Run) -> list[list[dict]]:
    """The scored candidates by (task, input), in the order of the file."""
    groups: dict[tuple, list[dict]] = {}
    for record in data.read_records(run.cfg.candidates or run.folder / "candidates.jsonl"):
        groups.setdefault((record["task"], record["id"]), []).append(record)
    return list(groups.values())


def collect_candidates(run: Run) -> None:
    """Sample answers to train wordings of fresh instances and reward them; resumes behind the last whole record."""
    cfg, path = run.cfg, run.folder / "candidates.jsonl"
    if cfg.candidates:
        return
    done = {candidate_key(record) for record in data.read_records(path)}
    todo = [record for record in unanswered(run) if candidate_key(record) not in done]
    run = dataclasses.replace(run, model=plain(run.model))
    judge, chunk = make_judge(run), 4 * cfg.eval_batch
    for start in tqdm(range(0, len(todo), chunk), desc="collect", unit="chunk", disable=None):
        data.append_records(path, score_candidates(run, judge, todo[start:start + chunk]))


def candidate_key(record: dict) -> tuple:
    """What tells one candidate from another."""
    return record["task"], record["id"], record["wording"], record["sample"]


def unanswered(run: Run) -> list[dict]:
    """The candidates to collect, without their responses: pool instances x wordings x samples."""
    cfg, records = run.cfg, []
    for task in run.tasks:
        texts = [task.definition] + [w.text for w in task.wordings.get("train", [])[:cfg.wordings]]
        for instance in data.split_instances(task, "pool")[:cfg.pool_per_task]:
            rng = random.Random(f"pool/{cfg.seed}/{task.name}/{instance.id}")
            records += [{"task": task.name, "id": instance.id, "sample": sample, "instruction": task.definition, "wording": text,
                         "input": instance.input, "target": instance.outputs[0]}
                        for text in rng.sample(texts, min(cfg.pool_wordings, len(texts))) for sample in range(cfg.samples)]
    return records


def score_candidates(run: Run, judge, records: list[dict]) -> list[dict]:
    """The records with a sampled response and its reward; each draws from its own seed, so chunks change nothing."""
    cfg, labels = run.cfg, {task.name: task.labels for task in run.tasks}
    seeds = [random.Random(f"{cfg.seed}/{candidate_key(record)}").getrandbits(31) for record in records]
    answers = complete(run.model, run.tokenizer, [run.template.render(r["wording"], r["input"]) for r in records],
                       max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p, seed=seeds,
                       batch_size=cfg.eval_batch, max_len=cfg.max_len)
    records = [{**record, "response": answer.text, "finished": answer.finished} for record, answer in zip(records, answers)]
    verdicts = judge.judge([{**record, "labels": labels[record["task"]]} for record in records])
    return [{**record, "reward": verdict.reward, "how": verdict.how, "expected": verdict.type, "correct": verdict.correct,
             "p_expected": verdict.p_expected, "p_correct": verdict.p_correct} for record, verdict in zip(records, verdicts)]


def make_judge(run: Run):
    """The judge that --judge names: the model as it stands (base and adapter), or exact rules."""
    cfg = run.cfg
    if cfg.judge == "rule":
        return judging.RuleJudge(rouge_threshold=cfg.rouge_threshold)

    def ask(prefixes, suffixes, keywords):
        return keyword_logprobs(run.model, run.tokenizer, prefixes, suffixes, keywords, batch_size=cfg.eval_batch,
                                max_len=cfg.max_len)
    return judging.LocalJudge(ask, judging.JudgeConfig(mode=cfg.reward_mode, steps=cfg.reward_steps,
                                                       show_target=cfg.show_target))


def token_step(model, batch, cfg) -> dict:
    """Next-token cross-entropy on the labelled tokens (spec 2.1)."""
    rows, targets = losses.prediction_rows(batch["labels"])
    logits = model(batch["input_ids"], lengths=batch["lengths"], logits_at=rows)   # (M, V)
    return {"ce": losses.cross_entropy(losses.gathered_logprobs(logits, targets))[0]}


def token_counts(batch) -> dict:
    """Labelled tokens."""
    return {"ce": int((batch["labels"] != data.IGNORE_INDEX).sum())}


def cat_step(model, batch, cfg) -> dict:
    """L = L_rank + lambda * L_ce over items of good and lower answers (spec 2.5)."""
    rows, targets = losses.prediction_rows(batch["labels"])
    logits = model(batch["input_ids"], lengths=batch["lengths"], logits_at=rows)   # (M, V)
    terms = losses.cat_loss(losses.gathered_logprobs(logits, targets), batch["document_ids"][rows], batch["better"],
                            batch["worse"], batch["weights"], lam=cfg.lam, margin=cfg.margin)
    return {term: loss for term, (loss, _) in terms.items()}


def cat_counts(batch) -> dict:
    """Pairs, and tokens of the good answers, weighted as the loss weights them."""
    labelled = batch["labels"] != data.IGNORE_INDEX
    return {"rank": len(batch["better"]), "ce": float(batch["weights"][batch["document_ids"]][labelled].sum())}


@dataclass(frozen=True)
class Stage:
    """A row of STAGES: how its records are collected, how they become groups of documents, its step and its counts."""

    groups: Callable                                        # Run -> [{"documents": [...], ...}], one per item of a step
    step: Callable                                          # (model, batch, cfg) -> {term: weighted loss sum}
    counts: Callable                                        # batch -> {term: n}, from the batch alone
    collect: Callable = lambda run: None                    # Run -> records in the run folder
    needs: str = ""                                         # the stage whose adapter this one continues
    beside: tuple[str, ...] = ()                            # stages that the table shows next to it
    title: str = ""


STAGES = {
    "pretrain": Stage(corpus_groups, token_step, token_counts, title="base"),
    "sft": Stage(lambda run: sft_groups(run, 0), token_step, token_counts, title="SFT"),
    "sft-ia": Stage(lambda run: sft_groups(run, run.cfg.wordings), token_step, token_counts, beside=("sft",), title="SFT(IA)"),
    "cat": Stage(cat_groups, cat_step, cat_counts, collect_candidates, needs="sft-ia", beside=("sft",), title="SFT(IA)+CAT"),
}
assert STAGES.keys() == STAGE_DEFAULTS.keys()


def collate(groups: list[dict], device) -> dict:
    """Groups of a micro-batch as one packed row, with the documents' pairs counted through."""
    documents = [document for group in groups for document in group["documents"]]
    batch, better, worse, weights = data.pack(documents), [], [], []
    for group in groups:
        start, n_best = len(weights), group.get("n_best", 0)
        better += [start + pair[0] for pair in group.get("pairs", ())]
        worse += [start + pair[1] for pair in group.get("pairs", ())]
        weights += [1 / max(1, n_best)] * n_best + [0.0] * (len(group["documents"]) - n_best)
    batch["document_ids"] = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(batch["lengths"]))
    batch.update(better=torch.tensor(better, dtype=torch.long), worse=torch.tensor(worse, dtype=torch.long),
                 weights=torch.tensor(weights))
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Linear warm-up over a ratio of the steps, then a cosine down to min_lr_ratio of the peak."""
    warmup = max(1, round(cfg.warmup_ratio * cfg.steps))
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, cfg.steps - warmup)
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def ranks() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_first_rank(action: Callable, *arguments) -> None:
    """Rank 0 acts while the others wait; where it fails, all stop, and only rank 0 speaks."""
    rank, size = ranks()
    failed, error = torch.zeros(1), None
    if rank == 0:
        try:
            action(*arguments)
        except (ValueError, OSError) as problem:
            failed, error = torch.ones(1), problem
    if size > 1:
        dist.broadcast(failed, 0)
    if error:
        raise error
    if failed:
        sys.exit(1)


def all_sum(values: dict) -> dict:
    """The sums over all ranks of {name: number}, in float64."""
    if ranks()[1] == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def backward(model, stage: Stage, batches: list[dict], cfg: TrainConfig) -> dict:
    """Gradients of one step; returns {term: mean}. Each term is divided once, by its total over batches and ranks."""
    totals, sums = {}, {}
    for batch in batches:
        for term, n in stage.counts(batch).items():
            totals[term] = totals.get(term, 0) + n
    totals = all_sum(totals)
    device = next(model.parameters()).device.type
    for batch in batches:
        with torch.autocast(device, torch.bfloat16, enabled=cfg.full and cfg.dtype != "float32"):
            terms = stage.step(model, batch, cfg)
        sum(loss / max(1, totals[term]) for term, loss in terms.items()).backward()
        for term, loss in terms.items():
            sums[term] = sums.get(term, 0.0) + loss.detach()
    if ranks()[1] > 1:
        for parameter in model.parameters():
            if parameter.requires_grad:
                dist.all_reduce(parameter.grad)
    return {term: value / max(1, totals[term]) for term, value in all_sum({k: float(v) for k, v in sums.items()}).items()}


def train(run: Run, stage: Stage, groups: list[dict], log_path: Path) -> None:
    """The one loop, for every stage and any number of ranks: rank r takes each step's groups r, r + size, ..."""
    cfg, device, (rank, size) = run.cfg, next(run.model.parameters()).device, ranks()
    if not groups:
        raise ValueError(f"nothing to train on for stage {cfg.stage}: no item is left. See the counts above; "
                         "more samples or another judge may help.")
    cut = sum(document["cut"] for group in groups for document in group["documents"])
    if cut:
        say(f"{cfg.stage}: {cut} documents are longer than --max-len {cfg.max_len}; the left of their prompts was cut.")
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=cfg.weight_decay)
    torch.manual_seed(cfg.seed + rank)                      # dropout
    run.model.train()
    bar, seen, started = tqdm(range(cfg.steps), desc=cfg.stage, disable=None if rank == 0 else True), 0, time.time()
    for step in bar:
        chosen = data.batch_indices(len(groups), cfg.batch_size, step, cfg.seed)[rank::size]
        batches = [collate(part, device) for part in data.micro_batches([groups[i] for i in chosen], cfg.micro_tokens)]
        means = backward(run.model, stage, batches, cfg)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, cfg.clip))
        if not math.isfinite(sum(means.values())) or not math.isfinite(norm):
            raise FloatingPointError(f"step {step} of {cfg.stage} gave a non-finite loss or gradient norm ({means}, norm "
                                     f"{norm}); nothing was updated. Try a lower --lr.")
        for part in optimizer.param_groups:
            part["lr"] = learning_rate(step, cfg)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += size * sum(len(batch["input_ids"]) for batch in batches)
        seconds = time.time() - started
        bar.set_postfix_str(f"{seen / seconds / 1000:.1f}k tok/s")
        if rank == 0:
            log_step(log_path, cfg, step, means, norm=norm, tokens=seen, seconds=seconds)
    run.model.eval()


def log_step(path: Path, cfg: TrainConfig, step: int, means: dict, *, norm: float, tokens: int, seconds: float) -> None:
    """A row of log.jsonl for every step, a line on the screen for every tenth of the run."""
    means = {name: round(value, 6) for name, value in means.items()}
    data.append_records(path, [{"stage": cfg.stage, "step": step, **means, "norm": round(norm, 4),
                                "lr": learning_rate(step, cfg), "tokens": tokens, "seconds": round(seconds, 2)}])
    if (step + 1) % max(1, cfg.steps // 10) == 0:
        text = " | ".join(f"{name} {value:.3f}" for name, value in means.items())
        tqdm.write(f"{cfg.stage} step {step + 1}/{cfg.steps} | {text} | {tokens / seconds / 1000:.1f}k tok/s")


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline


def pick_device(cfg: TrainConfig) -> tuple[str, torch.dtype]:
    """The device and the base weights' type that --device and --dtype mean here."""
    device = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = cfg.dtype if cfg.dtype != "auto" else ("bfloat16" if device.startswith("cuda") else "float32")
    return device, getattr(torch, dtype)


def make_run(cfg: TrainConfig) -> Run:
    """Read everything that the flags name; whatever is wrong with it shows here, before anything is trained."""
    tasks = data.load_tasks(cfg.tasks)
    if cfg.paraphrases:
        data.load_paraphrases(cfg.paraphrases, tasks)
    framed = data.frame_bare_tasks(tasks)
    if framed:
        say(framed)
    tokenizer = data.Tokenizer(cfg.tokenizer or cfg.model)
    model = load_trained(cfg, None)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"tokenizer has {len(tokenizer)} pieces but the embedding has {model.config.vocab_size} rows "
                         f"({cfg.model}). Use the tokenizer that came with this checkpoint.")
    cfg = dataclasses.replace(cfg, template=cfg.template or model.config.prompt_template or "alpaca")
    template = data.find_template(cfg.template)
    held = [task.name for task in tasks if len(task.wordings.get(cfg.split, [])) >= 2]
    if not held and cfg.evaluate:
        raise ValueError(f"no task has two held-out wordings in split {cfg.split!r}, so consistency cannot be measured. "
                         "Give --paraphrases FILE with at least eight wordings per task, or --no-evaluate.")
    if not any(task.wordings.get("train") for task in tasks) and cfg.stage != "sft":
        raise ValueError(f"no training wordings for any of the {len(tasks)} tasks. Give --paraphrases FILE.")
    return Run(cfg, model, tokenizer, template, tasks, Path(cfg.out))


def stage_config(cfg: TrainConfig, stage: str) -> TrainConfig:
    """This run's settings for an SFT stage on the way: its own steps, batch and learning rate, everything else as given."""
    batch_size = {**dataclasses.asdict(TrainConfig()), **STAGE_DEFAULTS[stage]}["batch_size"]
    steps, lr = (cfg.sft_steps, cfg.sft_lr) if cfg.stage in PREFERENCE else (cfg.steps, cfg.lr)
    return dataclasses.replace(cfg, stage=stage, out=str(Path(cfg.out) / stage), steps=steps, lr=lr, batch_size=batch_size)


def finished(folder: Path, cfg: TrainConfig) -> bool:
    """Whether `folder` holds the adapter of this very stage and settings; a ValueError if it holds another's."""
    if not (folder / "adapter_config.json").exists() and not (folder / "model/config.json").exists():
        return False
    old, ignore = json.loads((folder / "config.json").read_text()), ("out", "init", "device", "evaluate", "compare", "split")
    for item in dataclasses.fields(TrainConfig):
        name, only = item.name, item.metadata["only"]
        read = (not only or cfg.stage in only) and name not in ignore and not name.startswith("eval_")
        if read and name in old and old[name] != getattr(cfg, name):
            raise ValueError(f"{folder} holds another run: {name} was {old[name]}, now {getattr(cfg, name)}. "
                             "Use another --out, or the old settings.")
    return True


def load_trained(cfg: TrainConfig, folder: Path | None, *, trainable: bool = False) -> torch.nn.Module:
    """The base (folder None), or what a finished stage left in its folder: an adapter, or with --full a whole model."""
    device, dtype = pick_device(cfg)
    if folder and (folder / "model").is_dir():
        return load_model(folder / "model", dtype=dtype, device=device)
    model = load_model(cfg.model, dtype=dtype, device=device)
    return lora.load_adapter(model, folder, trainable=trainable) if folder else model


def plain(model: torch.nn.Module) -> torch.nn.Module:
    """For sampling and judging: adapters merged into a copy; the model itself where it has none."""
    return lora.merge_lora(model) if lora.lora_modules(model) else model


def trainable(cfg: TrainConfig, folder: Path | None) -> torch.nn.Module:
    """A model to train: all weights with --full, else an adapter, fresh or continued from a finished stage."""
    model = load_trained(cfg, folder, trainable=True)
    if cfg.full:
        model.float()                                       # float32 masters; autocast makes the products cheap
    elif not folder:
        torch.manual_seed(cfg.seed)
        lora.apply_lora(model, lora.LoraConfig(rank=cfg.rank, alpha=cfg.alpha, dropout=cfg.dropout))
    return model


def save_trained(run: Run) -> None:
    """The adapter into the run folder, or with --full the model into its folder `model`."""
    if not run.cfg.full:
        return lora.save_adapter(run.model, run.folder, run.cfg.model)
    device, dtype = pick_device(run.cfg)
    save_model(run.model, run.folder / "model", dtype=dtype)
    (run.folder / "model/tokenizer.model").write_bytes(run.tokenizer.path.read_bytes())


def run_stage(run: Run, name: str) -> Path:
    """Train a stage unless its folder already holds it; returns the folder of its adapter."""
    stage, cfg = STAGES[name], run.cfg if name == run.cfg.stage else stage_config(run.cfg, name)
    folder = Path(cfg.out)
    places = [Path(run.cfg.init) / name, Path(run.cfg.init)] if run.cfg.init and cfg is not run.cfg else [folder]
    for place in places:
        if finished(place, cfg):
            say(f"{name}: found in {place}.")
            return place
    before = run_stage(run, stage.needs) if stage.needs else None
    say(f"{name}: training in {folder}.")
    part = dataclasses.replace(run, cfg=cfg, folder=folder, model=trainable(cfg, before))
    on_first_rank(prepare_folder, part)
    on_first_rank(stage.collect, part)
    train(part, stage, stage.groups(part), folder / "log.jsonl")
    on_first_rank(save_trained, part)
    return folder


def prepare_folder(run: Run) -> None:
    """Make the stage's folder, with its resolved settings in config.json and no log of an unfinished try."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "log.jsonl").unlink(missing_ok=True)
    (run.folder / "config.json").write_text(json.dumps(dataclasses.asdict(run.cfg), indent=1) + "\n")


def pretrain(cfg: TrainConfig) -> None:
    """A new model, or --model trained on, on --corpus; the finished checkpoint goes to --export in bfloat16."""
    device, _ = pick_device(cfg)
    tokenizer = data.Tokenizer(cfg.tokenizer)
    config = dataclasses.replace(PRESETS[cfg.preset], vocab_size=len(tokenizer), bos_id=tokenizer.bos_id,
                                 eos_ids=(tokenizer.eos_id,), prompt_template=cfg.template or "plain")
    model = load_model(cfg.model, device=device) if cfg.model else Llama(config).init_weights(cfg.seed).to(device)
    run = Run(cfg, model, tokenizer, data.find_template(config.prompt_template), [], Path(cfg.out))
    on_first_rank(prepare_folder, run)
    say(f"pretrain: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters.")
    train(run, STAGES["pretrain"], corpus_groups(run), run.folder / "log.jsonl")
    on_first_rank(export, run)


def export(run: Run) -> None:
    """The finished model and its tokenizer as a Hugging Face folder."""
    target = Path(run.cfg.export or run.folder / "model")
    save_model(run.model, target, dtype=torch.bfloat16)
    (target / "tokenizer.model").write_bytes(Path(run.cfg.tokenizer).read_bytes())
    say(f"pretrain: wrote {target}.")


def align(cfg: TrainConfig) -> None:
    """Train the stage and what it needs, evaluate all of them on the same held-out questions, and write the report."""
    run = make_run(cfg)
    stage, ladder = STAGES[cfg.stage], {}
    for name in [*(stage.beside if cfg.compare else ()), *([stage.needs] if stage.needs else []), cfg.stage]:
        ladder[STAGES[name].title] = run_stage(run, name)
    on_first_rank(report, run, {"base": None, **ladder} if cfg.compare else {stage.title: ladder[stage.title]})


def report(run: Run, ladder: dict[str, Path | None]) -> None:
    """Evaluate {title: adapter folder} and write metrics.json, judge.json, report.md and plots."""
    cfg = run.cfg
    if STAGES[cfg.stage].collect is collect_candidates:
        measure_judge(run)
    if not cfg.evaluate:
        return
    rows = data.questions(run.tasks, split=cfg.split, wordings=cfg.eval_wordings, per_task=cfg.eval_per_task)
    config = EvalConfig(template=cfg.template, max_new_tokens=cfg.max_new_tokens, max_len=cfg.max_len, batch_size=cfg.eval_batch)
    judge, results, tables = judging.RuleJudge(rouge_threshold=cfg.rouge_threshold), {}, {}
    say(f"evaluating on {len(rows)} held-out questions ({cfg.split}), {sum(len(r['wordings']) for r in rows)} answers per model.")
    for title, folder in ladder.items():
        model = plain(load_trained(cfg, folder))
        results[title], tables[title] = evaluate_responses(evaluate_model(model, run.tokenizer, rows, config), judge=judge)
    write_report(cfg.out, results, tables)
    say(summary_table(results))
    say(f"report: {cfg.out}/report.md\nnext: {next_command(cfg)}")


def measure_judge(run: Run) -> None:
    """Write judge.json: the rewards that were trained on against the exact rules."""
    labels, items, verdicts, truths = {task.name: task.labels for task in run.tasks}, [], [], []
    for record in (c for group in grouped_candidates(run) for c in group):
        items.append({**record, "labels": labels.get(record["task"])})
        verdicts.append(judging.Verdict(record["expected"], record["correct"], record["reward"], record["how"]))
    truths = judging.RuleJudge(rouge_threshold=run.cfg.rouge_threshold).judge(items)
    found = judging.confusion(items, verdicts, truths)
    (run.folder / "judge.json").write_text(json.dumps(found, indent=1) + "\n")
    asked = found["asked"]
    if asked["n"]:
        parts = [f"{name} {100 * asked[name]['accuracy']:.0f} %" for name in ("type", "correct") if asked[name]["accuracy"] is not None]
        say(f"self-judge against exact rules, on {asked['n']} different answers that it was asked about: " + ", ".join(parts))


def next_command(cfg: TrainConfig) -> str:
    """What to try now."""
    if cfg.stage != "cat":
        return f"python train.py --stage cat --out {cfg.out}-cat"
    return f"python train.py --stage cat --init {cfg.out} --candidates {cfg.out}/candidates.jsonl --lam 0.1 --out {cfg.out}-lam0.1"


def main(argv=None) -> int:
    """Run a stage. Returns 0, or 2 for a mistake in what was given, 1 for a run that failed."""
    cfg = parse_config(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if pick_device(cfg)[0].startswith("cuda") else "gloo")
        if cfg.batch_size < ranks()[1]:
            return complain(f"--batch-size {cfg.batch_size} is less than the {ranks()[1]} processes. Raise it.")
    try:
        (pretrain if cfg.stage == "pretrain" else align)(cfg)
    except ValueError as error:
        return complain(str(error))
    except (FloatingPointError, OSError) as error:
        complain(str(error))
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
