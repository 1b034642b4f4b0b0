"""Train: stages, the one loop, collecting records, runs that continue where they stopped.

    python train.py --stage cat                                   # the demo: base, SFT, SFT(IA), CAT, and a table
    python train.py --stage cat --model DIR --tasks DIR --paraphrases FILE --out runs/x

Stages: `pretrain` (next token), `sft` and `sft-ia` (instruction fine-tuning without and with instruction augmentation,
arXiv 2403.14221 stage 1), `cat` (consistency alignment training, stage 2: sample answers to paraphrased instructions, let
the model reward them itself, rank the good over the bad); on the same scored candidates `dpo`, `rso`, `slic`, `rrhf`, `pro`,
`expert`, `conditional`, `reward`, `ppo`, `rlaif`, and `constitutional`; on judged responses `cut` (arXiv 2312.14591),
`forward`, `ilf`, `hindsight`, `unlikelihood` and `critic`. A stage that needs an earlier one finds
its adapter in the run folder, or trains it first. Order of this file: flags, stages, loop, pipeline, command line.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import difflib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal

from eval import JudgeFlags, check_judge, check_writable, complain, fail, flag, parse_flags

HERE = Path(__file__).parent
PREFERENCE = ("cat", "dpo", "rso", "slic", "rrhf", "pro", "expert", "conditional", "reward", "ppo", "rlaif", "constitutional")
JUDGED = ("cut", "forward", "ilf", "hindsight", "unlikelihood", "critic")
AFTER_SFT = PREFERENCE + JUDGED
TUNING = ("sft", "sft-ia", *AFTER_SFT)
KIND: dict[str, str] = {}                                   # stages added by `register`: name -> the stage whose flags it shares
RECORDS = ("preferences.jsonl", "revisions.jsonl", "candidates.jsonl", "judged.jsonl", "refined.jsonl", "rollouts.jsonl")


@dataclass
class TrainConfig(JudgeFlags):
    """Every flag of train.py. Precedence: this default < the stage's < the demo's < the command line."""

    stage: str = flag("cat", "what to train")
    model: str = flag("", "Hugging Face folder of the base model (default: demo/base)")
    tokenizer: str = flag("", "tokenizer.model, where the model folder has none")
    template: str = flag("", "prompt template: alpaca, alpaca-stanford, plain, vicuna, llama2, chatml, zephyr, raw, or a JSON file (default: the checkpoint's own, else alpaca)")
    tasks: str = flag("", "task file or folder (default: demo/tasks; for judgments demo/records)", TUNING)
    examples: str = flag("", "instruction data to learn from instead of tasks: Alpaca, ShareGPT or messages, JSON or JSON Lines", ("sft",))
    paraphrases: str = flag("", "JSON file of wordings per task (default for the demo's tasks: demo/paraphrases.json)", TUNING)
    out: str = flag("", "run folder (default: runs/STAGE)")
    init: str = flag("", "run folder in which finished earlier stages are looked for (default: --out)", AFTER_SFT)
    dry_run: bool = flag(False, "print parameters, memory and steps, and stop; --model may be a config.json or a preset's name, needs no weights")
    seed: int = flag(0, "seeds examples, order, adapters and sampling")
    device: str = flag("auto", "cpu, cuda, cuda:1, ... (auto: cuda where there is one)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "type of the base weights (auto: bfloat16 on a GPU, else float32)")
    quantize: Literal["none", "int8", "nf4"] = flag("none", "keep the base's linears in 8 or 4 bits while adapters train", TUNING)
    # examples
    wordings: int = flag(10, "training wordings per task beside the original instruction", ("sft-ia", *PREFERENCE))
    augment: Literal["assign", "product"] = flag("assign", "give each instance one wording, or all of them", ("sft-ia", *PREFERENCE))
    per_task: int = flag(100, "training instances per task", TUNING)
    judge_share: float = flag(0.0, "share of training examples that teach judging (answers to the train instances, judged by rule)", TUNING)
    max_len: int = flag(512, "longest document in tokens; an over-long prompt loses its left")
    save_every: int = flag(50, "steps between checkpoints, from which the same command goes on when it was stopped (0: none)")
    # optimisation
    steps: int = flag(200, "optimiser steps")
    batch_size: int = flag(24, "examples (cat: groups) per step")
    sft_steps: int = flag(200, "steps of the SFT stages on the way", AFTER_SFT)
    sft_lr: float = flag(2e-4, "learning rate of the SFT stages on the way", AFTER_SFT)
    micro_tokens: int = flag(8192, "most tokens per forward pass; bounds memory, changes no result (but of --combine half --reduction token)")
    compile: bool = flag(False, "compile the one-token step of sampling: some 20 s for each shape, then faster")
    checkpointing: bool = flag(False, "keep each block's input only and compute it again in the backward pass: less memory, a third slower, same result")
    lr: float = flag(2e-4, "peak learning rate")
    warmup_ratio: float = flag(0.05, "share of the steps that warm up")
    min_lr_ratio: float = flag(0.1, "final learning rate as a share of the peak (cosine)")
    weight_decay: float = flag(0.0, "AdamW weight decay")
    clip: float = flag(1.0, "largest gradient norm")
    full: bool = flag(False, "train all weights instead of an adapter")
    shard: bool = flag(False, "under torchrun: each process holds a part of the weights, and sees a block whole while it computes it (FSDP2); "
                              "sampling and evaluation still hold the model whole", tuple(x for x in TUNING if x not in ("reward", "ppo")))
    rank: int = flag(16, "adapter rank", TUNING)
    alpha: float = flag(32.0, "adapter scale: alpha / rank", TUNING)
    dropout: float = flag(0.0, "adapter dropout", TUNING)
    adapt: list[str] = flag(list, "linears that get an adapter, by the end of their names (default: all seven of a block)", TUNING)
    # collecting candidates
    pool_per_task: int = flag(20, "fresh instances per task that candidates are sampled for", AFTER_SFT)
    pool_wordings: int = flag(6, "training wordings per instance that candidates are sampled under", PREFERENCE)
    fresh_wordings: int = flag(0, "sample under so many training wordings that SFT(IA) has not seen, instead of those it has", PREFERENCE)
    samples: int = flag(2, "answers per instance and wording", AFTER_SFT)
    temperature: float = flag(1.0, "sampling temperature", AFTER_SFT)
    top_p: float = flag(1.0, "nucleus sampling", AFTER_SFT)
    candidates: str = flag("", "train on this candidates.jsonl instead of collecting", tuple(x for x in PREFERENCE if x != "constitutional"))
    judge: Literal["self", "rule", "http", "reward", "length"] = flag("self", "who judges sampled answers: the model itself, exact rules, a "
                                                                       "server, a reward model, or their length alone (a control)", AFTER_SFT)
    reward_model: str = flag("", "run folder of a reward stage, for --judge reward", PREFERENCE)
    reward_mode: Literal["gated", "sum"] = flag("gated", "how answer type and correctness make the reward", PREFERENCE)
    reward_steps: Literal["two", "one"] = flag("two", "ask type then correctness, or correctness alone", PREFERENCE)
    show_target: bool = flag(True, "let the judge see the reference answer", PREFERENCE)
    rouge_threshold: float = flag(0.7, "ROUGE-L from which the rule judge accepts a free answer", TUNING)
    # CAT
    lam: float = flag(1.0, "weight of the cross-entropy term", ("cat", "slic"))
    margin: float = flag(0.0, "margin of the ranking term (slic: 1 unless given)", ("cat", "slic"))
    pairs: Literal["best", "all"] = flag("best", "rank only the best over the rest, or every better over every worse", ("cat", "dpo", "slic"))
    condition: Literal["own", "original", "worse"] = flag("own", "the wording under which the best answer is scored", ("cat", "dpo", "slic"))
    ce_target: Literal["best", "gold"] = flag("best", "cross-entropy on the best sampled answer, or on the reference (a control)", ("cat", "slic"))
    ranking: bool = flag(True, "use the ranking term (off: cross-entropy alone, a control)", ("cat",))
    # preferences
    preference: Literal["sigmoid", "robust", "ipo", "hinge"] = flag("sigmoid", "DPO, its robust form, IPO, or RSO's hinge-norm", ("dpo", "rso"))
    beta: float = flag(0.1, "inverse temperature of DPO; IPO's tau, RSO's gamma", ("dpo", "rso", "rlaif"))
    label_smoothing: float = flag(0.0, "share of pairs taken for wrongly ordered (cDPO, robust)", ("dpo", "rso"))
    length_normalize: bool = flag(False, "means of log-probabilities instead of sums", ("dpo", "rso", "rlaif", "slic"))
    reference_free: bool = flag(False, "leave the reference model out (with hinge: RSO's third loss, SLiC's)", ("dpo", "rso", "rlaif"))
    rso_keep: int = flag(8, "answers that rejection sampling keeps per question", ("rso",))
    rso_beta: float = flag(0.5, "its temperature: small keeps the best, large takes them as they come", ("rso",))
    rso_ranking: Literal["first", "tournament", "all"] = flag("first", "pairs among those kept: neighbours, a knock-out, or every pair", ("rso",))
    conditional: Literal["labels", "quantiles", "reward", "best"] = flag("labels", "what stands before the instruction: good or bad, the "
                                                                          "reward's quantile, the reward; best: the top quantile alone", ("conditional",))
    quantiles: int = flag(4, "equal parts of the candidates by reward", ("conditional",))
    ft_reduction: Literal["sum", "mean"] = flag("sum", "RRHF's likelihood of the best answer: over its tokens, or per token", ("rrhf",))
    use_rewards: bool = flag(True, "PRO with the rewards' gaps as temperatures (off: every gap is 1)", ("pro",))
    sft_weight: float = flag(0.05, "weight of PRO's likelihood, times (n - 1)^2", ("pro",))
    max_worse: int = flag(3, "lower-rewarded answers per item", PREFERENCE)
    preferences: str = flag("", "fit to these soft labels (preferences.jsonl of rlaif) instead of candidates", ("reward",))
    labels: Literal["letters", "scores"] = flag("letters", "AI labels: the letter of the better answer in both orders, or the difference "
                                                           "of the self-judge's scores", ("rlaif",))
    principles: str = flag("", "text file, a principle per line (default: judge.PRINCIPLES)", ("constitutional",))
    revisions: int = flag(1, "rounds of critique and revision", ("constitutional",))
    # reward model and PPO
    fit_reward: bool = flag(True, "fit a reward model to the judge's rewards first (off: those rewards as they are)", ("ppo",))
    rm_steps: int = flag(100, "steps of the reward model on the way", ("ppo",))
    rm_lr: float = flag(1e-4, "its learning rate", ("ppo",))
    rollouts: int = flag(64, "answers sampled per phase", ("ppo",))
    ppo_epochs: int = flag(2, "passes over a phase's answers", ("ppo",))
    kl_beta: float = flag(0.05, "price of a nat of KL to the model that the stage starts from", ("ppo",))
    kl_target: float = flag(0.0, "adapt that price towards this KL per answer (0: constant)", ("ppo",))
    clip_ratio: float = flag(0.2, "clip of the probability ratio", ("ppo",))
    clip_value: float = flag(0.2, "clip of the value's change", ("ppo",))
    value_weight: float = flag(0.1, "weight of the value loss", ("ppo",))
    gamma: float = flag(1.0, "discount", ("ppo",))
    gae_lam: float = flag(1.0, "lambda of the advantage estimate", ("ppo",))
    whiten_rewards: bool = flag(True, "unit variance of a phase's rewards", ("ppo",))
    unfinished_reward: float = flag(-1.0, "reward of an answer that does not end", ("ppo",))
    # learning from judgments
    records: str = flag("", "train on this file of judged responses instead of sampling and judging", JUDGED)
    rounds: int = flag(1, "collect and train so many times, each round from the last one's model (online alignment)", AFTER_SFT)
    critic: str = flag("", "run folder of a critic stage whose adapter writes the judgments (with --judge self), or http: a server does", JUDGED)
    downsample: float = flag(0.25, "satisfying responses kept per unsatisfying one (0: all)", JUDGED)
    detect: Literal["ratio", "all"] = flag("ratio", "which tokens of a bad response are unlearned: those the judgment makes likelier, or all", ("cut",))
    detect_lam: float = flag(1.1, "a token is flagged where p(token | judgment) > this * p(token)", ("cut",))
    detect_floor: float = flag(0.0, "... and where p(token | judgment) is above this (DualCUT)", ("cut",))
    detector: Literal["live", "frozen"] = flag("live", "detect with the model as it is, or as it was when the stage began", ("cut",))
    unlike_alpha: float = flag(1.0, "weight of the unlikelihood of a token", ("cut", "unlikelihood"))
    unlike_gamma: float = flag(0.0, "exponent of p(token | judgment) in that weight", ("cut",))
    combine: Literal["sum", "half"] = flag("sum", "L1 + L2, or (L1 + L2) / 2 for judged responses as in the authors' code", ("cut",))
    reduction: Literal["mean_per_sequence", "token"] = flag("mean_per_sequence", "1/N per response, or one mean over tokens", ("cut",))
    positive: Literal["plain", "text"] = flag("plain", "the satisfied condition: no judgment, or one that praises", ("cut",))
    use_l1: bool = flag(True, "CUT's L1 (off: an ablation)", ("cut",))
    use_good: bool = flag(True, "CUT's L2 on satisfying responses (off: an ablation)", ("cut",))
    use_judged: bool = flag(True, "CUT's L2 on judged responses (off: an ablation)", ("cut",))
    judged_warmup: int = flag(0, "steps before L1 sets in, so that the model learns to read judgments first", ("cut",))
    level: Literal["response", "token", "sequence"] = flag("response", "unlikelihood of all tokens of bad responses, of "
                                                            "tokens said before, or of repeated 4-grams", ("unlikelihood",))
    refinements: int = flag(5, "refinements sampled per bad response", ("ilf",))
    # pre-training
    corpus: str = flag("", "JSON Lines of documents: lists of [text, is_label]", ("pretrain",))
    preset: Literal["tiny", "demo", "tinyllama", "llama2-7b", "llama2-13b"] = flag("demo", "shape of the new model", ("pretrain",))
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
    **{stage: dict(steps=100, batch_size=16, lr=1e-4) for stage in PREFERENCE},
    "slic": dict(steps=100, batch_size=16, lr=1e-4, margin=1.0),
    "rso": dict(steps=100, batch_size=16, lr=1e-4, preference="hinge", beta=0.05),
    "ppo": dict(steps=100, batch_size=32, lr=1e-4),
    "constitutional": dict(steps=100, batch_size=16, lr=1e-4, samples=1),
    **{stage: dict(steps=120, batch_size=16, judge="rule", samples=1) for stage in JUDGED},
}
DEMO_MODEL = {                                              # a model of two million parameters wants larger steps
    "sft": dict(lr=2e-3, steps=400), "sft-ia": dict(lr=2e-3, steps=400),
    **{stage: dict(lr=3e-4, sft_lr=2e-3, sft_steps=400) for stage in PREFERENCE},
    **{stage: dict(lr=3e-5, sft_lr=2e-3, sft_steps=400) for stage in ("dpo", "rso")},       # without a likelihood term they walk far
    "ppo": dict(lr=3e-4, sft_lr=2e-3, sft_steps=400, rm_lr=3e-4, rollouts=512, batch_size=256),
    "rlaif": dict(lr=3e-5, sft_lr=2e-3, sft_steps=400, labels="scores"),     # it never saw a comparison of letters
}
DEMO_MODEL |= {stage: dict(lr=5e-4, steps=200, sft_lr=2e-3, sft_steps=200) for stage in JUDGED}
DEMO_MODEL["cut"] |= dict(detect_lam=1.5, judged_warmup=60)
DEMO_TASKS = dict(per_task=24, wordings=14, augment="product", judge_share=0.5, max_new_tokens=24, rouge_threshold=0.95)
DEMO_RECORDS = dict(per_task=400, pool_per_task=350, eval_per_task=200, max_new_tokens=40, rouge_threshold=0.95)   # demo/records


def kind(stage: str) -> str:
    """The stage whose flags and defaults `stage` has: itself, unless `register` added it."""
    return KIND.get(stage, stage)


def parse_config(argv=None) -> TrainConfig:
    """Command line -> config. A mistake prints one sentence and exits with 2."""
    given = parse_flags(TrainConfig, argv, __doc__.split("Stages:")[0])
    stage = given.get("stage", "cat")
    if stage not in STAGE_DEFAULTS:
        near = difflib.get_close_matches(stage, STAGE_DEFAULTS, 1)
        fail(f'unknown stage "{stage}". Stages: {", ".join(STAGE_DEFAULTS)}.'
             + (f' Did you mean "{near[0]}"?' if near else ""))
    for item in dataclasses.fields(TrainConfig):
        if item.name in given and item.metadata["only"] and kind(stage) not in item.metadata["only"]:
            fail(f'--{item.name.replace("_", "-")} means nothing to stage "{stage}", only to '
                 f'{", ".join(item.metadata["only"])}. Leave it out.')
    demo_model = {} if given.get("model") or stage == "pretrain" else DEMO_MODEL[stage]
    demo_tasks = {} if given.get("tasks") or given.get("examples") or stage == "pretrain" else DEMO_RECORDS if kind(stage) in JUDGED else DEMO_TASKS
    cfg = TrainConfig(**{**STAGE_DEFAULTS[stage], **demo_model, **demo_tasks, **given})
    problem = check_config(cfg)
    if problem:
        fail(problem)
    return fill_paths(cfg)


def check_config(cfg: TrainConfig) -> str:
    """What is wrong with the values, in one sentence, or nothing."""
    for name in ("steps", "sft_steps", "batch_size", "micro_tokens", "max_len", "rank", "samples", "pool_wordings", "max_new_tokens",
                 "eval_per_task", "max_worse", "per_task", "pool_per_task", "eval_batch", "rounds", "refinements", "rso_keep", "quantiles",
                 "rm_steps", "rollouts", "ppo_epochs", "revisions"):
        if getattr(cfg, name) < 1:
            return f"--{name.replace('_', '-')} is {getattr(cfg, name)}. Expected 1 or more."
    for name in ("lr", "sft_lr", "rm_lr", "clip", "alpha", "detect_lam", "beta", "rso_beta", "clip_ratio", "clip_value"):
        if not getattr(cfg, name) > 0 or math.isinf(getattr(cfg, name)):
            return f"--{name.replace('_', '-')} is {getattr(cfg, name)}. Expected a positive number."
    for name, top in (("dropout", 1), ("judge_share", 1), ("label_smoothing", 0.5), ("warmup_ratio", 1), ("min_lr_ratio", 1), ("top_p", 1.0001), 
                      ("gamma", 1.0001), ("gae_lam", 1.0001)):
        if not 0 <= getattr(cfg, name) < top:
            return f"--{name.replace('_', '-')} is {getattr(cfg, name)}. Expected a share between 0 and 1."
    for name in ("temperature", "lam", "margin", "wordings", "downsample", "detect_floor", "unlike_alpha", "unlike_gamma", "judged_warmup", "fresh_wordings", "kl_beta", "kl_target",
                 "value_weight", "save_every"):
        if not getattr(cfg, name) >= 0:
            return f"--{name.replace('_', '-')} is {getattr(cfg, name)}. Expected 0 or more."
    try:
        check_judge(cfg, asked="http" in (cfg.judge, cfg.critic))
        for place in (cfg.out, cfg.export):                 # of the process that writes
            if place and not cfg.dry_run and os.environ.get("RANK", "0") == "0":
                check_writable(place)
    except ValueError as error:
        return str(error)
    if cfg.critic not in ("", "http") and cfg.judge != "self":
        return "--critic writes judgments only with --judge self. Add that, or leave --critic out."
    if kind(cfg.stage) in JUDGED and cfg.model and not cfg.tasks and not cfg.records:
        return f"--stage {cfg.stage} with --model needs --tasks DIR to sample answers to, or --records FILE of judged responses."
    if cfg.reward_model and cfg.judge != "reward":
        return f"--reward-model is for --judge reward, not {cfg.judge}. Add that, or leave it out."
    if cfg.reward_model and Path(cfg.reward_model).exists() and not Path(cfg.reward_model, "value_head.safetensors").exists():
        return f"--reward-model {cfg.reward_model} has no value_head.safetensors. Give the run folder of --stage reward."
    if kind(cfg.stage) in JUDGED and cfg.judge in ("reward", "length"):
        return f"--judge {cfg.judge} writes no judgments. Give --judge rule, self or http."
    if cfg.label_smoothing and cfg.preference in ("ipo", "hinge") and kind(cfg.stage) in ("dpo", "rso"):
        return f"--label-smoothing changes nothing in --preference {cfg.preference}. Give --preference sigmoid or robust, or leave it out."
    if kind(cfg.stage) == "rlaif" and cfg.labels == "letters" and cfg.judge not in ("self", "http"):
        return f"--judge {cfg.judge} has no letters to choose from. Add --labels scores."
    if kind(cfg.stage) == "reward" and cfg.rounds > 1:
        return "--stage reward has one round: a reward model samples nothing. Leave out --rounds."
    if kind(cfg.stage) in ("ppo", "constitutional") and cfg.model and not cfg.tasks:
        return f"--stage {cfg.stage} samples its own answers and needs --tasks DIR."
    if cfg.judge == "reward" and not cfg.reward_model:
        return "--judge reward needs --reward-model DIR, the run folder of --stage reward."
    if kind(cfg.stage) == "reward" and cfg.judge == "reward":
        return "--stage reward learns from another judge. Give --judge self or rule."
    if kind(cfg.stage) == "ppo" and (cfg.dropout or cfg.top_p < 1 or cfg.temperature == 0):
        return "--stage ppo compares probabilities of what it sampled: it needs --dropout 0, --top-p 1 and a --temperature above 0."
    if kind(cfg.stage) == "ppo" and cfg.rollouts * cfg.ppo_epochs % cfg.batch_size:
        return (f"--rollouts {cfg.rollouts} in {cfg.ppo_epochs} epochs make no whole number of batches of {cfg.batch_size}. "
                "Make --batch-size divide them.")
    if kind(cfg.stage) == "constitutional" and cfg.judge not in ("self", "http"):
        return f"--judge {cfg.judge} writes no critiques. Give --judge self or http."
    if kind(cfg.stage) == "rlaif" and cfg.labels == "scores" and cfg.judge == "http":
        return "--judge http gives letters, not scores. Add --labels letters."
    if cfg.quantize != "none" and cfg.full:
        return f"--quantize {cfg.quantize} keeps the base frozen under adapters. Leave out --full, or --quantize."
    if cfg.quantize != "none" and cfg.shard:
        return f"--quantize {cfg.quantize} has no shards. Leave out --shard, or --quantize."
    if cfg.eval_wordings < 2:
        return f"--eval-wordings is {cfg.eval_wordings}. Consistency needs at least 2."
    if cfg.examples and cfg.judge_share:
        return f"--judge-share {cfg.judge_share} wants --tasks, not --examples. Leave one of them out."
    for name in ("model", "tasks", "paraphrases", "corpus", "candidates", "tokenizer", "init", "records", "critic", "examples", "reward_model",
                 "preferences", "principles"):
        path = getattr(cfg, name)
        if path and (name, path) != ("critic", "http") and not (cfg.dry_run and name == "model") and not Path(path).exists():
            return f"--{name} {path} does not exist. Give a path that does."
    if cfg.stage == "pretrain" and not (cfg.corpus and cfg.tokenizer):
        return "stage pretrain needs --corpus FILE and --tokenizer FILE; demo/make_base.py makes both."
    return ""


def fill_paths(cfg: TrainConfig) -> TrainConfig:
    """The paths that were left out: the demo's, and runs/STAGE."""
    if cfg.model and not cfg.tasks and (kind(cfg.stage) in JUDGED or cfg.candidates):     # another model and a file of records: no tasks, no SFT stage
        return dataclasses.replace(cfg, out=cfg.out or f"runs/{cfg.stage}")
    if cfg.examples:
        return dataclasses.replace(cfg, model=cfg.model or str(HERE / "demo/base"), out=cfg.out or f"runs/{cfg.stage}")
    demo_tasks, folder = not cfg.tasks, "demo/records" if kind(cfg.stage) in JUDGED else "demo/tasks"
    paraphrases = cfg.paraphrases or (str(HERE / "demo/paraphrases.json") if demo_tasks and kind(cfg.stage) not in JUDGED else "")
    model = cfg.model or ("" if cfg.stage == "pretrain" else str(HERE / "demo/base"))
    return dataclasses.replace(cfg, model=model, tasks=cfg.tasks or str(HERE / folder),
                               paraphrases=paraphrases, out=cfg.out or f"runs/{cfg.stage}")


def say(message: str) -> None:
    """Print once, however many processes there are."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


if __name__ == "__main__":
    parse_config()                                          # a mistake answers at once, before torch is imported

import torch                                                # noqa: E402
import safetensors.torch                                    # noqa: E402
import torch.distributed as dist                            # noqa: E402
from tqdm import tqdm                                       # noqa: E402

import data                                                 # noqa: E402
import judge as judging                                     # noqa: E402
import lora                                                 # noqa: E402
import losses                                               # noqa: E402
from eval import (MASK_LAMS, VALUE_HEAD, Completion, EvalConfig, LocalChat, add_head, complete, confusion_report, cut_masks, document_rewards, evaluate_errors,    # noqa: E402
                  evaluate_model, evaluate_responses, keyword_logprobs, load_head, make_client, mask_report, mask_scores, out_of_memory, pick_device, plot_mask, plot_rollouts,
                  reward_report, reward_scores, summary_table, wilson, write_report)
from model import PRESETS, Llama, QuantLinear, attention, load_model, put, read_config, read_json, save_model    # noqa: E402


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
    round: int = 0
    memory: dict = dataclasses.field(default_factory=dict)  # what a stage keeps between its phases

    def document(self, wording: str, input: str, response: str) -> dict:
        """Prompt and response as token ids and labels."""
        return data.encode_example(self.tokenizer, self.template, self.template.render(wording, input), response,
                                   max_len=self.cfg.max_len)


def corpus_groups(run: Run) -> list[dict]:
    """pretrain: one document per group; </s> as a last segment of its own is EOS."""
    groups = []
    for number, segments in enumerate(data.load_corpus(run.cfg.corpus), 1):
        ends = segments[-1][0] == "</s>"
        document = data.encode_document(run.tokenizer, segments[:-1] if ends else segments, max_len=run.cfg.max_len)
        if ends:
            document["input_ids"].append(run.tokenizer.eos_id)
            document["labels"].append(run.tokenizer.eos_id)
        groups.append({"documents": [document], "name": f"line {number}"})
    return groups


def sft_groups(run: Run, wordings: int) -> list[dict]:
    """sft, sft-ia: one document per instruction example, and judge_share of documents that teach judging."""
    cfg = run.cfg
    if cfg.examples:
        return example_groups(run)
    examples = data.instruction_examples(run.tasks, wordings=wordings, augment=cfg.augment, per_task=cfg.per_task,
                                         seed=cfg.seed)
    documents = [(run.document(x["wording"], x["input"], x["output"]), record_name(x)) for x in examples]
    taught = judge_documents(run, round(len(documents) * cfg.judge_share / (1 - cfg.judge_share)))
    documents += [(document, f"judging example {number}") for number, document in enumerate(taught)]
    return [{"documents": [document], "name": name} for document, name in documents]


def record_name(record: dict) -> str:
    """What a message calls a record: task/id, or the id of one without a task."""
    return "/".join(str(record[key]) for key in ("task", "id") if record.get(key) is not None)


def example_groups(run: Run) -> list[dict]:
    """sft on outside data: one document per Alpaca row or conversation; what was left out is said."""
    examples, left_out = data.load_examples(run.cfg.examples)
    documents = [data.encode_conversation(run.tokenizer, run.template, x, max_len=run.cfg.max_len) for x in examples]
    if None in documents:
        left_out[f"whose first answer is longer than --max-len {run.cfg.max_len}"] = documents.count(None)
    say(f"{run.cfg.stage}: {len(documents) - documents.count(None)} examples"
        + "".join(f"; left out {n} {why}" for why, n in left_out.items()) + ".")
    return [{"documents": [document], "name": f"example {number}"} for number, document in enumerate(documents) if document]


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
        best, worse = best_answers(group)
        if not best or not worse:
            skipped["no worse" if best else "no best"] += 1
            continue
        rng = random.Random(f"{cfg.seed}/{group[0]['task']}/{group[0]['id']}")
        worse = list({(c["wording"], c["response"]): c for c in worse}.values())
        rng.shuffle(worse)
        for start in range(0, len(worse), cfg.max_worse):
            groups.append(cat_item(run, rng.choice(best), worse[start:start + cfg.max_worse]))
    say(f"{cfg.stage}: {len(groups)} items; skipped {skipped['no best']} groups without a best answer and "
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
    documents = [run.document(text, best["input"], good if kind(cfg.stage) == "cat" else best["response"]) for text in tops]
    documents += [run.document(wording(c), c["input"], c["response"]) for c in worse]
    n = len(tops)
    if cfg.condition == "worse":
        pairs = [(tops.index(c["wording"]), n + k) for k, c in enumerate(worse)]
    else:
        pairs = list(zip(*losses.best_vs_lower_pairs([best["reward"]] + [c["reward"] for c in worse], rule=cfg.pairs, best=best["reward"])))
    if kind(cfg.stage) == "slic":                                 # imitates the better answer, or SFT's target (SLiC-HF's y_ref)
        if cfg.ce_target == "gold":
            documents.append(run.document(tops[0], best["input"], best["target"]))
        imitated = [better if cfg.ce_target == "best" else len(documents) - 1 for better, _ in pairs]
        return {"documents": documents, "pairs": pairs, "imitated": imitated, "name": record_name(best)}
    return {"documents": documents, "n_best": n, "pairs": pairs if cfg.ranking else [], "name": record_name(best)}


def best_answers(group: list[dict]) -> tuple[list[dict], list[dict]]:
    """The best answers of one question, and those below. Of verdicts only reward 2 is best; of other rewards the highest."""
    known = [c for c in group if c["reward"] is not None]
    verdicts = all(c["how"] in judging.VERDICTS for c in known)
    top = 2 if verdicts else max(c["reward"] for c in known)
    return [c for c in known if c["reward"] == top], [c for c in known if c["reward"] < top]


def dpo_groups(run: Run) -> list[dict]:
    """dpo: the items of cat with "reference": each document's log-probability under the model that the stage starts from."""
    return with_reference(run, cat_groups(run))


def with_reference(run: Run, groups: list[dict]) -> list[dict]:
    """The groups with "reference": log-probabilities under the model as it is now, once for each that a step will see."""
    cfg, device = run.cfg, next(run.model.parameters()).device
    if not groups:
        return groups
    seen = {i for step in range(cfg.steps) for i in data.batch_indices(len(groups), cfg.batch_size, step, cfg.seed)}
    run.model.eval()
    with torch.no_grad(), precision(cfg, device.type):
        for part in data.micro_batches([groups[i] for i in sorted(seen)], cfg.micro_tokens):
            sums = iter(document_logprobs(run.model, collate(part, device))[0].tolist())
            for group in part:
                group["reference"] = [next(sums) for _ in group["documents"]]
    return groups


def rso_groups(run: Run) -> list[dict]:
    """rso: pairs among the answers that rejection sampling keeps of each question (RSO, 2309.06657, Algorithm 1)."""
    cfg, groups, kept = run.cfg, [], 0
    for group in grouped_candidates(run):
        known = list({c["response"]: c for c in group if c["reward"] is not None}.values())     # distinct texts
        rng = random.Random(f"{cfg.seed}/{group[0]['task']}/{group[0]['id']}")
        chosen = [known[i] for i in losses.rejection_sample([c["reward"] for c in known], cfg.rso_keep, beta=cfg.rso_beta, rng=rng)]
        rng.shuffle(chosen)
        kept += len(chosen)
        pairs = ranked_pairs([c["reward"] for c in chosen], cfg.rso_ranking)
        used = sorted({i for pair in pairs for i in pair})
        if used:
            groups.append({"documents": [run.document(chosen[i]["wording"], chosen[i]["input"], chosen[i]["response"]) for i in used],
                           "pairs": [(used.index(i), used.index(j)) for i, j in pairs], "name": record_name(group[0])})
    say(f"rso: kept {kept} answers, {sum(len(group['pairs']) for group in groups)} pairs of different reward in {len(groups)} groups.")
    return with_reference(run, groups)


def ranked_pairs(rewards: list[float], how: str) -> list[tuple[int, int]]:
    """(better, worse) among responses in random order: neighbours ("first" round), a whole "tournament", or "all" pairs."""
    if how == "all":
        return list(zip(*losses.best_vs_lower_pairs(rewards, rule="all")))
    pairs, left = [], list(range(len(rewards)))
    while len(left) > 1:
        duels = [sorted(left[k:k + 2], key=lambda i: -rewards[i]) for k in range(0, len(left) - 1, 2)]
        pairs += [(i, j) for i, j in duels if rewards[i] > rewards[j]]
        left = [duel[0] for duel in duels] + left[2 * len(duels):] if how == "tournament" else []
    return pairs


def ranked_groups(run: Run) -> list[dict]:
    """rrhf, pro: a best answer and up to max_worse others with their rewards, best first, each under its own wording."""
    groups, cfg = [], run.cfg
    for group in grouped_candidates(run):
        known = list({(c["wording"], c["response"]): c for c in group if c["reward"] is not None}.values())
        random.Random(f"{cfg.seed}/{group[0]['task']}/{group[0]['id']}").shuffle(known)
        known.sort(key=lambda c: -c["reward"])              # stable: equal rewards stay shuffled
        if not known or known[0]["reward"] == known[-1]["reward"]:
            continue
        kept = sorted(spread_rewards(known, cfg.max_worse + 1), key=lambda c: -c["reward"])
        rewards = [float(c["reward"]) for c in kept]
        groups.append({"documents": [run.document(c["wording"], c["input"], c["response"]) for c in kept], "n_best": 1, "rewards": rewards,
                       "pairs": list(zip(*losses.best_vs_lower_pairs(rewards, rule="all"))), "name": record_name(kept[0])})
    say(f"{cfg.stage}: {len(groups)} groups with answers of different reward.")
    return groups


def expert_groups(run: Run) -> list[dict]:
    """expert: a best answer of each group, as in fine-tuning (best-of-n, then SFT; spec 2.15)."""
    groups = []
    for group in grouped_candidates(run):
        best, _ = best_answers(group)
        if best:
            chosen = random.Random(f"{run.cfg.seed}/{group[0]['task']}/{group[0]['id']}").choice(best)
            groups.append({"documents": [run.document(chosen["wording"], chosen["input"], chosen["response"])], "name": record_name(chosen)})
    say(f"expert: {len(groups)} groups with a best answer.")
    return groups


def conditional_groups(run: Run) -> list[dict]:
    """conditional: every answer behind what its reward says of it (spec 2.16; Quark, arXiv 2205.13636)."""
    cfg, records = run.cfg, []
    for group in grouped_candidates(run):
        best, worse = best_answers(group)
        records += [(c, True) for c in best] + [(c, False) for c in worse]
    random.Random(f"{cfg.seed}/quantiles").shuffle(records)  # of equal rewards no task is better than another
    records.sort(key=lambda item: item[0]["reward"])
    groups, size = [], max(1, len(records) // cfg.quantiles)
    for k, (record, good) in enumerate(records):
        quantile = min(k // size, cfg.quantiles - 1) + 1    # the last part takes the remainder
        if cfg.conditional == "best" and quantile < cfg.quantiles:
            continue
        mark = reward_mark(cfg, good=good, quantile=quantile, reward=record["reward"])
        groups.append({"documents": [run.document(mark + record["wording"], record["input"], record["response"])], "name": record_name(record)})
    say(f"conditional: {len(groups)} answers; asked with {best_mark(run)!r} before the instruction.")
    return groups


def best_mark(run: Run) -> str:
    """The mark of the best answers, with which a conditional model is asked."""
    known = Path(run.cfg.candidates or run.folder / "candidates.jsonl").exists()
    rewards = [c["reward"] for group in grouped_candidates(run) for c in group if c["reward"] is not None] if known else []
    return reward_mark(run.cfg, good=True, quantile=run.cfg.quantiles, reward=max(rewards, default=2))      # 2: the best verdict


def reward_mark(cfg: TrainConfig, *, good: bool, quantile: int, reward: float) -> str:
    """The words before an instruction that say how good the answer is to be; plain text, so that no token is new."""
    return {"labels": "good answer : " if good else "bad answer : ", "quantiles": f"quality {quantile} of {cfg.quantiles} : ",
            "reward": f"reward {reward:.2f} : ", "best": ""}[cfg.conditional]


def label_hidden(model, batch) -> torch.Tensor:
    """Final hidden states where labelled tokens are predicted: (M, D)."""
    return model.hidden(batch["input_ids"], batch["attend"], rows=batch["rows"])


def label_logprobs(model, batch, hidden: torch.Tensor | None = None, *, temperature: float = 1.0) -> tuple[torch.Tensor, Callable]:
    """log p of the labelled tokens, (M,), and a function that gives their log(1 - p), (M,)."""
    hidden, head = label_hidden(model, batch) if hidden is None else hidden, model.lm_head
    if isinstance(head, torch.nn.Linear) and not head.weight.requires_grad:
        logprobs, complements = losses.head_logprobs(hidden, head.weight, batch["targets"], temperature=temperature)
        return logprobs, lambda: complements
    logits = head(hidden) if temperature == 1 else head(hidden).float() / temperature          # (M, V)
    return losses.gathered_logprobs(logits, batch["targets"]), lambda: losses.complement_logprobs(logits, batch["targets"])


def document_logprobs(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of log-probabilities and the number of labelled tokens of each document of a batch: (n,), (n,)."""
    return losses.sequence_logprobs(label_logprobs(model, batch)[0], batch["owners"], len(batch["lengths"]))


def dpo_step(model, batch, cfg) -> dict:
    """-log sigma(beta h) and its kin over the pairs (spec 2.11), with what h says of them for the log."""
    sums, lengths = document_logprobs(model, batch)
    reference = 0.0 if cfg.reference_free else batch["reference"].to(sums)
    if cfg.length_normalize:
        sums, reference = sums / lengths, reference / lengths
    h = losses.preference_logits(sums, reference, batch["better"], batch["worse"])
    smoothing = 1 - batch["probability"].to(h) if "probability" in batch else cfg.label_smoothing    # soft labels of an AI judge
    right = likelier(batch, h) * h.detach()
    return {"loss": losses.dpo_loss(h, beta=cfg.beta, kind=cfg.preference, label_smoothing=smoothing)[0],
            "margin": cfg.beta * right.sum(), "accuracy": (right > 0).sum().to(h)}


def likelier(batch, like):
    """1 where the first answer of a pair is the better one, -1 where a soft label says that the second is."""
    return 1 - 2 * (batch["probability"] < 0.5).to(like) if "probability" in batch else torch.ones_like(like)


def dpo_counts(batch, cfg) -> dict:
    """Pairs."""
    return dict.fromkeys(("loss", "margin", "accuracy"), len(batch["better"]))


def slic_step(model, batch, cfg) -> dict:
    """A hinge over the pairs and the likelihood of the better one (spec 2.12)."""
    sums, lengths = document_logprobs(model, batch)
    terms = losses.slic_loss(sums / lengths if cfg.length_normalize else sums, batch["better"], batch["worse"], batch["imitated"],
                             delta=cfg.margin, lam=cfg.lam)
    return {term: loss for term, (loss, _) in terms.items()}


def slic_counts(batch, cfg) -> dict:
    """Pairs."""
    return dict.fromkeys(("rank", "ce"), len(batch["better"]))


def rrhf_step(model, batch, cfg) -> dict:
    """L_rank + L_ft per group, unweighted and undivided (RRHF, Eq. 3-5)."""
    sums, lengths = document_logprobs(model, batch)
    best = batch["weights"].to(sums)
    likelihood = sums if cfg.ft_reduction == "sum" else sums / lengths
    return {"rank": losses.pairwise_ranking_loss(sums / lengths, batch["better"], batch["worse"])[0], "ce": -(best * likelihood).sum()}


def pro_step(model, batch, cfg) -> dict:
    """L_PRO + sft_weight (n - 1)^2 * -S(best) per group (spec 2.14)."""
    sums, lengths = document_logprobs(model, batch)
    rank, ce, start = sums.new_zeros(()), sums.new_zeros(()), 0
    for rewards in batch["rewards"]:
        part = slice(start, start + len(rewards))
        rank = rank + losses.pro_loss((sums / lengths)[part], torch.tensor(rewards) if cfg.use_rewards else None)
        ce, start = ce - cfg.sft_weight * (len(rewards) - 1) ** 2 * sums[start], start + len(rewards)
    return {"rank": rank, "ce": ce}


def group_counts(batch, cfg) -> dict:
    """Groups."""
    return dict.fromkeys(("rank", "ce"), batch["groups"])


def reward_groups(run: Run) -> list[dict]:
    """reward: all comparisons of one question in one group, each weighing 1 / their number (arXiv 2203.02155, Eq. 1)."""
    cfg, groups = run.cfg, []
    if cfg.preferences:
        return labelled_groups(run, cfg.preferences)
    for group in grouped_candidates(run):
        known = list({(c["wording"], c["response"]): c for c in group if c["reward"] is not None}.values())
        random.Random(f"{cfg.seed}/{group[0]['task']}/{group[0]['id']}").shuffle(known)
        known = spread_rewards(known, cfg.max_worse + 1)
        pairs = list(zip(*losses.best_vs_lower_pairs([c["reward"] for c in known], rule="all")))
        if pairs and not held_out(group[0]):
            groups.append({"documents": [run.document(c["wording"], c["input"], c["response"]) for c in known],
                           "pairs": pairs, "pair_weights": [1 / len(pairs)] * len(pairs), "name": record_name(known[0])})
    say(f"reward: {sum(len(group['pairs']) for group in groups)} comparisons in {len(groups)} groups.")
    return groups


def labelled_groups(run: Run, path) -> list[dict]:
    """Pairs with an AI judge's soft labels, as preferences.jsonl holds them."""
    groups = []
    for record in data.load_labelled(path) if Path(path).exists() else []:
        documents = [run.document(record[side]["wording"], record["input"], record[side]["response"]) for side in ("first", "second")]
        groups.append({"documents": documents, "pairs": [(0, 1)], "probability": [record["probability"]], "pair_weights": [1.0],
                       "name": record_name(record)})
    say(f"{run.cfg.stage}: {len(groups)} pairs with soft labels.")
    return groups


def rlaif_groups(run: Run) -> list[dict]:
    """rlaif: DPO whose labels are an AI judge's probabilities (arXiv 2309.00267; labels as in spec 2.18)."""
    return with_reference(run, labelled_groups(run, run.folder / "preferences.jsonl"))


def collect_preferences(run: Run) -> None:
    """rlaif: pairs of different answers to one question, and how probable the judge finds it that the first is better."""
    cfg, path = run.cfg, run.folder / "preferences.jsonl"
    collect_candidates(run, judged=cfg.labels == "scores")
    done = collected(path, lambda record: (record["task"], record["id"], record["number"]))
    todo = []
    for group in grouped_candidates(run):
        distinct = list({c["response"]: c for c in group if c["response"].strip()}.values())
        random.Random(f"{cfg.seed}/{group[0]['task']}/{group[0]['id']}").shuffle(distinct)
        for number, (first, second) in enumerate(list(itertools.combinations(distinct, 2))[:cfg.max_worse]):
            if (first["task"], first["id"], number) not in done:
                todo.append({"task": first["task"], "id": first["id"], "number": number, "instruction": first["instruction"], "input": first["input"],
                             "first": {k: first.get(k) for k in CHOSEN}, "second": {k: second.get(k) for k in CHOSEN}})
    label, unread = make_labeller(dataclasses.replace(run, model=plain(run.model))), 0
    for start in tqdm(range(0, len(todo), 4 * cfg.eval_batch), desc="label", unit="chunk", disable=None if ranks()[0] == 0 else True):
        part = todo[start:start + 4 * cfg.eval_batch]
        labelled = [{**pair, "probability": q} for pair, q in zip(part, label(part), strict=True)]
        unread += sum(pair["probability"] is None for pair in labelled)
        keep(path, [pair for pair in labelled if pair["probability"] is not None])
    if unread:
        say(f"rlaif: {unread} of {len(todo)} pairs got no label and are left out.")


CHOSEN = ("wording", "response", "p_expected", "p_correct", "reward", "how")


def make_labeller(run: Run) -> Callable[[list[dict]], list[float | None]]:
    """pairs -> probabilities that the first answer is better: letters of a model or a server, or the judge's own rewards."""
    cfg = run.cfg
    if cfg.judge not in ("self", "http") or cfg.labels == "scores":
        def score(side):                                    # log-odds of half the expected reward; of others' rewards, themselves
            if side["how"] not in judging.VERDICTS or side["reward"] is None:
                return side["reward"]
            expected, correct = side["p_expected"], side["p_correct"] or 0.0
            value = side["reward"] / 2 if side["p_expected"] is side["p_correct"] is None else correct if expected is None else expected * (1 + correct) / 2
            return math.log(min(max(value, 1e-6), 1 - 1e-6) / (1 - min(max(value, 1e-6), 1 - 1e-6)))

        def label(pairs):
            scores = [(score(pair["first"]), score(pair["second"])) for pair in pairs]
            return [None if a is None or b is None else 1 / (1 + math.exp(min(700.0, b - a))) for a, b in scores]
        return label
    ask = backend(run)

    def letters(pairs):
        texts = [{"input": f"{pair['instruction']}\n\n{pair['input']}".strip(), "output_1": pair["first"]["response"],
                  "output_2": pair["second"]["response"]} for pair in pairs]
        return judging.preference_probabilities(ask, texts)
    return letters


def collect_revisions(run: Run) -> None:
    """constitutional: sampled answers, criticised and revised by principles drawn for each (arXiv 2212.08073)."""
    cfg, path = run.cfg, run.folder / "revisions.jsonl"
    principles = list(judging.PRINCIPLES)
    if cfg.principles:
        principles = [line.strip() for line in Path(cfg.principles).read_text(encoding="utf-8").splitlines() if line.strip()]
        if not principles:
            raise ValueError(f"{cfg.principles} holds no principle. Expected one sentence per line.")
    run = dataclasses.replace(run, model=plain(run.model))
    ask = backend(run)
    done = collected(path, candidate_key)
    todo, chunk = [record for record in unanswered(run) if candidate_key(record) not in done], 4 * cfg.eval_batch
    for start in tqdm(range(0, len(todo), chunk), desc="revise", unit="chunk", disable=None if ranks()[0] == 0 else True):
        keep(path, judging.constitutional(ask, answered(run, todo[start:start + chunk]), principles, rounds=cfg.revisions, seed=cfg.seed))
    judging.RUN.tell(say)


def constitutional_groups(run: Run) -> list[dict]:
    """constitutional: the last revision of each answer, as in fine-tuning (SL-CAI, arXiv 2212.08073)."""
    records = data.read_records(run.folder / "revisions.jsonl")
    revised = [record for record in records if (record["revision"] or "").strip()]
    failures = Counter(turn["failure"] for record in records for turn in record["history"] if turn["failure"])
    say(f"constitutional: {len(revised)} of {len(records)} answers were revised"
        + (f"; failures: {', '.join(f'{name} ({n})' for name, n in failures.most_common(3))}." if failures else "."))
    return [{"documents": [run.document(record["wording"], record["input"], record["revision"])], "name": record_name(record)} for record in revised]


def spread_rewards(known: list[dict], k: int) -> list[dict]:
    """Up to k answers, one of each reward in turn, so that few answers still hold many comparisons."""
    by_reward: dict[float, list[dict]] = {}
    for c in known:
        by_reward.setdefault(c["reward"], []).append(c)
    turns = itertools.zip_longest(*by_reward.values())
    return [c for turn in turns for c in turn if c][:k]


def held_out(record: dict) -> bool:
    """Whether a question belongs to the tenth that no reward model trains on."""
    return random.Random(f"held out/{record['task']}/{record['id']}").random() < 0.1


def reward_step(model, batch, cfg) -> dict:
    """Bradley-Terry over the comparisons of each question (arXiv 2203.02155, Eq. 1)."""
    rewards, weights = document_rewards(model, batch), batch["pair_weights"]
    loss, _ = losses.reward_loss(rewards, batch["better"], batch["worse"], probability=batch.get("probability", 1.0), weights=weights)
    right = (likelier(batch, weights) * (rewards[batch["better"]] - rewards[batch["worse"]]) > 0).float()
    return {"loss": loss, "accuracy": (weights * right).sum().detach()}


def reward_counts(batch, cfg) -> dict:
    """Questions."""
    return dict.fromkeys(("loss", "accuracy"), batch["groups"])


def begin_ppo(run: Run) -> None:
    """What ppo keeps between its phases: the weights it starts from, its judge, the phase's number, the price of KL."""
    start = [(p, p.detach().clone()) for name, p in run.model.named_parameters() if p.requires_grad and "value_head" not in name]
    run.memory.update(phase=0, beta=run.cfg.kl_beta, start=start, todo=unanswered(run),
                      judge=make_judge(dataclasses.replace(run, model=frozen(run.model))))


def ppo_groups(run: Run) -> list[dict]:
    """ppo, once a phase: answers of the policy as it is, and per token what the clipped objectives compare with (spec 2.17).

    The reference is the model that the stage started from: its trained weights are kept and put back for one pass.
    The response's own sampled ids are scored, not its text encoded again.
    """
    cfg, memory, device = run.cfg, run.memory, next(run.model.parameters()).device
    if not memory:
        begin_ppo(run)
    chosen = data.batch_indices(len(memory["todo"]), cfg.rollouts, memory["phase"], cfg.seed)
    records = [{**memory["todo"][i], "sample": f"{memory['phase']}/{k}"} for k, i in enumerate(chosen)]
    run.model.eval()
    prompts = [run.template.render(r["wording"], r["input"]) for r in records]
    answers = sampled(dataclasses.replace(run, model=plain(run.model)), records, prompts)
    room, labels = cfg.max_len - cfg.max_new_tokens, {task.name: task.labels for task in run.tasks}
    verdicts = memory["judge"].judge([{**r, "response": a.text, "labels": labels[r["task"]]} for r, a in zip(records, answers)])
    rewards = [v.reward if a.finished else cfg.unfinished_reward for a, v in zip(answers, verdicts)]
    kept = [k for k, reward in enumerate(rewards) if reward is not None]            # no verdict: no reward is made up
    if len(kept) < len(rewards):
        say(f"ppo phase {memory['phase']}: {len(rewards) - len(kept)} of {len(rewards)} answers got no verdict and are left out.")
    if not kept:
        raise ValueError(f"ppo phase {memory['phase']}: the judge gave no verdict on any of {len(rewards)} answers. Give another --judge.")
    records, prompts, answers, scores = [records[k] for k in kept], [prompts[k] for k in kept], [answers[k] for k in kept], torch.tensor([float(rewards[k]) for k in kept])
    groups = []
    for record, prompt, answer in zip(records, prompts, answers):
        ids = data.cut_left(run.tokenizer.encode_prompt(prompt), room)      # as `complete` cut it
        groups.append({"documents": [{"input_ids": ids + answer.token_ids, "labels": [data.IGNORE_INDEX] * len(ids) + answer.token_ids, "cut": 0}],
                       "name": record_name(record)})
    batches = [collate(part, device) for part in data.micro_batches(groups, cfg.micro_tokens)]
    with torch.no_grad(), precision(cfg, device.type):
        old, values = (torch.cat(parts).float().cpu() for parts in zip(*(policy_and_values(run.model, batch, cfg) for batch in batches)))
        with swapped(memory["start"]):
            reference = torch.cat([policy_and_values(run.model, batch, cfg)[0] for batch in batches]).float().cpu()
    ids = torch.repeat_interleave(torch.arange(len(answers)), torch.tensor([len(a.token_ids) for a in answers]))
    rewards = losses.shaped_rewards(scores, old, reference, ids, beta=memory["beta"])
    rewards = losses.whiten(rewards, shift_mean=False) if cfg.whiten_rewards else rewards
    if memory["phase"] == 0:                                # the value head starts at the mean, else all layers would carry it there
        mean = losses.gae(rewards, torch.zeros_like(values), ids, gamma=cfg.gamma)[1].mean()
        values = values + mean
        with torch.no_grad():
            run.model.value_head.bias += mean.to(device)
    advantages, returns = losses.gae(rewards, values, ids, gamma=cfg.gamma, lam=cfg.gae_lam)
    per_token = {"old": old, "old_values": values, "advantages": losses.whiten(advantages), "returns": returns}
    for k, group in enumerate(groups):
        group["per_token"] = {name: tensor[ids == k].tolist() for name, tensor in per_token.items()}
    kls = torch.zeros(len(answers)).index_add(0, ids, old - reference)
    rows = [{**record, "phase": memory["phase"], "response": answer.text, "finished": answer.finished, "score": score, "kl": kl, "beta": memory["beta"]}
            for record, answer, score, kl in zip(records, answers, scores.tolist(), kls.tolist())]
    if ranks()[0] == 0:
        data.append_records(run.folder / "rollouts.jsonl", rows)
        tqdm.write(f"ppo phase {memory['phase']} | score {scores.mean():.3f} | KL {kls.mean():.3f} nats per answer | beta {memory['beta']:.4f}")
    if cfg.kl_target:
        memory["beta"] = losses.adapted_beta(memory["beta"], float(kls.mean()), cfg.kl_target)
    memory["phase"] += 1
    return groups


@contextlib.contextmanager
def swapped(weights: list[tuple[torch.nn.Parameter, torch.Tensor]]):
    """Parameters with other values, for one pass."""
    now = [parameter.detach().clone() for parameter, _ in weights]
    with torch.no_grad():
        for parameter, value in weights:
            parameter.copy_(value)
        try:
            yield
        finally:
            for (parameter, _), value in zip(weights, now):
                parameter.copy_(value)


def policy_and_values(model, batch, cfg) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi of the sampled tokens at the temperature they were sampled at, and V of the text before each: (M,), (M,)."""
    hidden = label_hidden(model, batch)                     # (M, D)
    logprobs, _ = label_logprobs(model, batch, hidden, temperature=cfg.temperature)
    return logprobs, model.value_head(hidden.float()).squeeze(-1)


def ppo_step(model, batch, cfg) -> dict:
    """Clipped policy and value objectives over the tokens of sampled answers (PPO, arXiv 1707.06347; spec 2.17)."""
    logprobs, values = policy_and_values(model, batch, cfg)
    policy = losses.ppo_policy_loss(logprobs, batch["old"], batch["advantages"], clip=cfg.clip_ratio)
    value = losses.ppo_value_loss(values, batch["old_values"], batch["returns"], clip=cfg.clip_value)
    clipped = ((logprobs.detach() - batch["old"]).exp() - 1).abs() > cfg.clip_ratio
    return {"policy": policy.sum(), "value": cfg.value_weight * value.sum(), "clipped": clipped.sum().float()}


def ppo_counts(batch, cfg) -> dict:
    """Sampled tokens."""
    return dict.fromkeys(("policy", "value", "clipped"), len(batch["old"]))


def grouped_candidates(run: Run) -> list[list[dict]]:
    """The scored candidates by (task, input), in the order of the file."""
    groups: dict[tuple, list[dict]] = {}
    for record in usable_candidates(run):
        groups.setdefault((record["task"], record["id"]), []).append(record)
    return list(groups.values())


def usable_candidates(run: Run) -> list[dict]:
    """The candidates to train on; of another file, those that are not empty and fit --max-len."""
    cfg, found = run.cfg, data.load_candidates(run.cfg.candidates or run.folder / "candidates.jsonl")
    if any(c["how"] == "file" for c in found) and "usable" not in run.memory:
        lengths = [len(data.encode_response(run.tokenizer, run.template, c["response"])) for c in found]
        keep = [bool(c["response"]) and n + 16 <= cfg.max_len for c, n in zip(found, lengths)]
        if not all(keep):
            say(f"{cfg.stage}: {keep.count(False)} of {len(keep)} answers of {cfg.candidates} are empty or longer than --max-len {cfg.max_len} "
                "allows, and are left out.")
        run.memory["usable"] = [c for c, kept in zip(found, keep) if kept]
    return run.memory.get("usable", found)


def collect_candidates(run: Run, *, judged: bool = True) -> None:
    """Sample answers to train wordings of fresh instances and reward them; resumes behind the last whole record."""
    cfg, path = run.cfg, run.folder / "candidates.jsonl"
    if cfg.candidates or cfg.preferences:
        return
    done = collected(path, candidate_key)
    todo = [record for record in unanswered(run) if candidate_key(record) not in done]
    run = dataclasses.replace(run, model=plain(run.model))
    judge, chunk = make_judge(run) if judged else None, 4 * cfg.eval_batch
    for start in tqdm(range(0, len(todo), chunk), desc="collect", unit="chunk", disable=None if ranks()[0] == 0 else True):
        keep(path, score_candidates(run, judge, todo[start:start + chunk]))
    if not judged:
        return
    if isinstance(judge, (judging.LocalJudge, judging.HttpJudge)) and not from_first_rank((run.folder / "canaries.json").exists):     # the others give no verdicts
        measure_canaries(run, judge, unanswered(run))
    judging.RUN.tell(say)


def measure_canaries(run: Run, judge, items: list[dict]) -> None:
    """canaries.json: how many answers without content the judge calls correct, of those it gave a verdict on; above 5 % it warns."""
    verdicts = judge.judge(judging.canary_items(items))
    unread, passed = sum(verdict.how == "unparsed" for verdict in verdicts), sum(verdict.correct is True and verdict.how != "unparsed" for verdict in verdicts)
    read = len(verdicts) - unread
    interval = wilson(passed, read)
    text = json.dumps({"asked": len(verdicts), "unread": unread, "passed": passed, "ci95": interval}) + "\n"
    on_first_rank(lora.write_file, run.folder / "canaries.json", lambda file: file.write_text(text))
    if 2 * unread > len(verdicts):
        say(f"warning: the judge gave no readable verdict on {unread} of {len(verdicts)} answers without content; whether they please it is unknown.")
    if passed > 0.05 * read:
        say(f"warning: the judge called {passed} of {read} answers without content correct ({100 * passed / read:.0f} %, 95 % interval "
            f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f} %); treat its scores with care.")


def candidate_key(record: dict) -> tuple:
    """What tells one candidate from another."""
    return record["task"], record["id"], record["wording"], record["sample"]


def unanswered(run: Run) -> list[dict]:
    """The answers to collect, without their responses: this round's pool instances x wordings x samples."""
    cfg, records, start = run.cfg, [], run.round * run.cfg.pool_per_task
    for task in run.tasks:
        texts = [task.definition]
        if kind(cfg.stage) in PREFERENCE:
            train = [w.text for w in task.wordings.get("train", [])]
            texts = train[cfg.wordings:cfg.wordings + cfg.fresh_wordings] if cfg.fresh_wordings else texts + train[:cfg.wordings]
            if not texts:
                raise ValueError(f"task {task.name} has {len(train)} training wordings, none of them beyond the {cfg.wordings} of --wordings, so "
                                 "--fresh-wordings finds none. Lower --wordings.")
        for instance in data.split_instances(task, "pool")[start:start + cfg.pool_per_task]:
            rng = random.Random(f"pool/{cfg.seed}/{task.name}/{instance.id}")
            records += [{"task": task.name, "id": instance.id, "sample": sample, "instruction": task.definition, "wording": text,
                         "input": instance.input, "target": instance.outputs[0],
                         **({"targets": list(instance.outputs)} if len(instance.outputs) > 1 else {})}
                        for text in rng.sample(texts, min(cfg.pool_wordings, len(texts))) for sample in range(cfg.samples)]
    if not records:
        raise ValueError(f"round {run.round + 1} finds no instance left to sample answers for: the tasks' pools hold "
                         f"{max((len(data.split_instances(task, 'pool')) for task in run.tasks), default=0)} instances at most, and each round takes "
                         f"--pool-per-task {cfg.pool_per_task}. Lower it, or --rounds.")
    return records


def sampled(run: Run, records: list[dict], prompts: list[str]) -> list:
    """One completion per record; each draws from its own seed, so chunks change nothing."""
    cfg = run.cfg
    seeds = [random.Random(f"{cfg.seed}/{candidate_key(record)}").getrandbits(31) for record in records]

    def work(part):
        texts, numbers = zip(*part)
        made = complete(run.model, run.tokenizer, list(texts), max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                        top_p=cfg.top_p, seed=list(numbers), batch_size=cfg.eval_batch, max_len=cfg.max_len)
        return [(answer.text, answer.token_ids, answer.finished) for answer in made]
    return [Completion(*row) for row in shared(list(zip(prompts, seeds)), work)]


def answered(run: Run, records: list[dict]) -> list[dict]:
    """The records with a sampled response."""
    mark = best_mark(run) if run.cfg.stage == "conditional" and run.round else ""   # from the second round on it knows marks
    answers = sampled(run, records, [run.template.render(mark + r["wording"], r["input"]) for r in records])
    return [{**record, "response": answer.text, "finished": answer.finished} for record, answer in zip(records, answers)]


def score_candidates(run: Run, judge, records: list[dict]) -> list[dict]:
    """The records with a sampled response and its reward; without a judge, with none."""
    labels, records = {task.name: task.labels for task in run.tasks}, answered(run, records)
    if judge is None:                                       # pairs of them will be compared instead
        return [{**record, "reward": None, "how": "unasked"} for record in records]
    verdicts = judge.judge([{**record, "labels": labels[record["task"]]} for record in records])
    return [{**record, "reward": verdict.reward, "how": verdict.how, "expected": verdict.type, "correct": verdict.correct,
             "p_expected": verdict.p_expected, "p_correct": verdict.p_correct} for record, verdict in zip(records, verdicts)]


def backend(run: Run) -> judging.Backend:
    """Who answers questions, with the same replies on every rank: a server, which rank 0 alone asks, or the model, which each rank asks its share."""
    if "http" in (run.cfg.judge, run.cfg.critic):
        client = []
        on_first_rank(lambda: client.append(make_client(run.cfg, run.folder)))
        work = lambda questions, how: from_first_rank(lambda: [dataclasses.astuple(reply) for reply in client[0].ask(questions, **how)])     # noqa: E731
    else:
        chat = LocalChat(run.model, run.tokenizer, run.template, batch_size=run.cfg.eval_batch)
        work = lambda questions, how: shared(questions, lambda part: [dataclasses.astuple(reply) for reply in chat.ask(part, **how)])     # noqa: E731
    return lambda questions, **how: [judging.Reply(*row) for row in work(questions, how)]


def make_judge(run: Run):
    """The judge that --judge names: the model as it stands (base and adapter), exact rules, or a server."""
    cfg = run.cfg
    fitted = cfg.reward_model or (str(reward_folder(cfg)) if kind(cfg.stage) == "ppo" and cfg.fit_reward else "")
    if cfg.judge == "rule" and not fitted:
        return judging.RuleJudge(rouge_threshold=cfg.rouge_threshold)
    if cfg.judge == "length" and not fitted:
        return judging.ScoreJudge(judging.length_scores)
    if fitted:
        model = load_trained(cfg, Path(fitted))
        return judging.ScoreJudge(lambda items: shared(items, lambda part: reward_scores(
            model, run.tokenizer, run.template, part, max_len=cfg.max_len, max_tokens=cfg.micro_tokens)))
    config = judging.JudgeConfig(mode=cfg.reward_mode, steps=cfg.reward_steps, show_target=cfg.show_target)
    if cfg.judge == "http":
        return judging.HttpJudge(backend(run), config, max_unparsed=cfg.max_unparsed, name=f"http {cfg.judge_model}")

    def ask(prefixes, suffixes, keywords):
        return shared(list(zip(prefixes, suffixes, keywords, strict=True)), lambda part: keyword_logprobs(
            run.model, run.tokenizer, *map(list, zip(*part)), batch_size=cfg.eval_batch, max_len=cfg.max_len))
    return judging.LocalJudge(ask, config)


def judged_records(run: Run) -> list[dict]:
    """The judged responses to train on, from --records or as collected; says what was dropped."""
    cfg = run.cfg
    found = data.load_judged(cfg.records or run.folder / "judged.jsonl")
    kept, counts = data.keep_judged(found, downsample=cfg.downsample, seed=cfg.seed)
    say(f"{cfg.stage}: {counts['negative']} unsatisfying responses"
        + (f" ({counts['failed']} without a judgment, dropped)" if counts["failed"] else "")
        + f", {counts['positive']} satisfying ones, {counts['kept']} of them kept.")
    check_lengths(cfg, run.tokenizer, found)
    return kept


def check_lengths(cfg: TrainConfig, tokenizer, records: list[dict]) -> None:
    """Raise ValueError for the first record whose judgment and response do not fit --max-len together."""
    for number, record in enumerate(records):
        if record["judgment"] is not None and cfg.stage != "unlikelihood":
            tokens = [len(tokenizer.encode_continuation(record[name])) for name in ("judgment", "response")]
            if sum(tokens) + 16 > cfg.max_len:              # BOS, EOS and the template's words behind the judgment
                raise ValueError(f"{cfg.records or 'judged.jsonl'}, record {number}: its judgment ({tokens[0]} tokens) and response "
                                 f"({tokens[1]}) do not fit --max-len {cfg.max_len}. Raise it, or remove the record.")


def judged_document(run: Run, record: dict, *, judgment: str | None = None) -> dict:
    """The record's response behind its prompt, with or without a judgment in it; the same response ids either way."""
    prompt = run.template.render(record["instruction"], record["input"], judgment, literal=True)
    return data.encode_example(run.tokenizer, run.template, prompt, record["response"], max_len=run.cfg.max_len)


def cut_groups(run: Run) -> list[dict]:
    """cut: a good response alone; a bad one under its judgment and, as its twin, under the satisfied condition."""
    cfg, groups = run.cfg, []
    satisfied = judging.PERFECT if cfg.positive == "text" else None
    for record in judged_records(run):
        if record["judgment"] is None:
            if cfg.use_good:
                groups.append({"documents": [judged_document(run, record, judgment=satisfied)], "roles": [losses.ALIGN_P], "name": record_name(record)})
            continue
        if not (cfg.use_l1 or cfg.use_judged):              # only the good ones are left: plain fine-tuning on them
            continue
        documents = [judged_document(run, record, judgment=record["judgment"])]
        if cfg.use_l1:
            documents.append(judged_document(run, record, judgment=satisfied))
        groups.append({"documents": documents, "roles": [losses.ALIGN_N, losses.MISALIGN][:len(documents)], "name": record_name(record)})
    return with_frozen_mask(run, groups) if cfg.detector == "frozen" and cfg.detect == "ratio" else groups


def with_frozen_mask(run: Run, groups: list[dict]) -> list[dict]:
    """The groups with "flagged": what the model as it is now would unlearn (--detector frozen)."""
    device = next(run.model.parameters()).device
    run.model.eval()
    for group in groups:
        if losses.MISALIGN in group["roles"]:
            group["flagged"] = flagged_tokens(run.model, collate([group], device), run.cfg).tolist()
    return groups


@torch.no_grad()
def flagged_tokens(model, batch: dict, cfg: TrainConfig) -> torch.Tensor:
    """U of CUT's Eq. 5 for a batch, bool (K,): its MISALIGN tokens that the judgment makes likelier."""
    logprobs, roles = label_logprobs(model, batch)[0], batch["roles"][batch["owners"]]
    return losses.inappropriate_tokens(logprobs[roles == losses.ALIGN_N], logprobs[roles == losses.MISALIGN],
                                       lam=cfg.detect_lam, floor=cfg.detect_floor)


def cut_step(model, batch, cfg) -> dict:
    """L = L1 + L2 (CUT, spec 2.6). Detection never sees dropout."""
    flagged, twin = batch.get("flagged"), batch["roles"][batch["owners"]] == losses.MISALIGN
    if cfg.detect == "all":
        flagged = torch.ones(int(twin.sum()), dtype=torch.bool, device=twin.device)
    elif flagged is None and cfg.dropout and cfg.use_l1:
        flagged = flagged_tokens(model.eval(), batch, cfg)
        model.train()
    logprobs, complements = label_logprobs(model, batch)
    terms = losses.cut_loss(logprobs, complements()[twin], batch["owners"], batch["roles"], lam=cfg.detect_lam, floor=cfg.detect_floor,
                            alpha=cfg.unlike_alpha, gamma=cfg.unlike_gamma, combine=cfg.combine, reduction=cfg.reduction,
                            flagged=flagged, use_judged=cfg.use_judged)
    heard = batch["step"] >= cfg.judged_warmup
    return {term: loss if heard or term == "l2" else 0 * loss for term, (loss, _) in terms.items()}


def cut_counts(batch, cfg) -> dict:
    """Responses, or with --reduction token their tokens; and how many tokens were looked at."""
    labelled = batch["roles"][batch["owners"]]
    twins = int((labelled == losses.MISALIGN).sum())
    if cfg.reduction == "token":
        return {"l1": twins, "l2": len(labelled) - twins, "flagged": twins}
    n = int((batch["roles"] != losses.MISALIGN).sum())
    return {"l1": n, "l2": n, "flagged": twins}


def hindsight_groups(run: Run) -> list[dict]:
    """hindsight: every response behind its judgment (CUT, Eq. 4); good ones behind the plain prompt."""
    return [{"documents": [judged_document(run, record, judgment=record["judgment"])], "name": record_name(record)} for record in judged_records(run)]


def forward_groups(run: Run) -> list[dict]:
    """forward: the response, and behind it its judgment (CUT, Eq. 1): two documents, each with its own mean."""
    groups = []
    for record in judged_records(run):
        documents = [judged_document(run, record)]
        if record["judgment"] is not None:
            documents.append(critic_document(run, record, record["judgment"]))
        groups.append({"documents": documents, "name": record_name(record)})
    return groups


def critic_document(run: Run, record: dict, judgment: str) -> dict:
    """A judgment as the response to a critic's prompt."""
    prompt = run.template.render(*judging.critic_prompt(record["instruction"], record["input"], record["response"]))
    return data.encode_example(run.tokenizer, run.template, prompt, judgment, max_len=run.cfg.max_len)


def critic_groups(run: Run) -> list[dict]:
    """critic: write the judgment of a response, or that it is perfect."""
    return [{"documents": [critic_document(run, record, record["judgment"] or judging.PERFECT)], "name": record_name(record)}
            for record in judged_records(run)]


def ilf_groups(run: Run) -> list[dict]:
    """ilf: the chosen refinement of each bad response, and the good ones as they are (CUT, Eq. 2-3)."""
    refined = {record["key"]: record["refinement"] for record in data.read_records(run.folder / "refined.jsonl")}
    groups, kept = [], 0
    for record in judged_records(run):
        if record["judgment"] is not None:
            record = {**record, "response": record["refinement"] or refined.get(record_key(record)) or ""}
            kept += bool(record["response"])
        if record["response"]:
            groups.append({"documents": [judged_document(run, record)], "name": record_name(record)})
    say(f"ilf: {kept} refinements.")
    return groups


def sequence_step(model, batch, cfg) -> dict:
    """-(1/N) sum_t log p(y_t) of each document (CUT, Eq. 1-4), over the number of examples."""
    sums, lengths = document_logprobs(model, batch)
    return {"ce": -(sums / lengths.clamp(min=1)).sum()}


def sequence_counts(batch, cfg) -> dict:
    """Examples."""
    return {"ce": batch["groups"]}


def unlikelihood_groups(run: Run) -> list[dict]:
    """unlikelihood: good and bad responses, all behind the plain prompt."""
    return [{"documents": [judged_document(run, record)], "roles": [losses.ALIGN_P if record["judgment"] is None else losses.MISALIGN],
             "name": record_name(record)} for record in judged_records(run)]


def unlikelihood_step(model, batch, cfg) -> dict:
    """Likelihood of good responses, and unlikelihood without a detector (arXiv 1908.04319).

    Level response: of all tokens of bad responses. sequence: of 4-grams said before, in any response. token: of the
    tokens said before, in good responses, as the paper has it for its training texts; bad responses take no part.
    """
    targets, ids = batch["targets"], batch["owners"]
    good = batch["roles"][ids] == losses.ALIGN_P
    if cfg.level == "token":                                # words other than the target count, so all logits are needed
        tokens = good * losses.token_unlikelihood(model.lm_head(label_hidden(model, batch)), targets, ids, alpha=cfg.unlike_alpha)
    else:
        flagged = ~good if cfg.level == "response" else losses.repeated_ngrams(targets, ids)
        logprobs, complements = label_logprobs(model, batch)
        tokens = losses.unlikelihood_loss(logprobs, complements(), flagged, cfg.unlike_alpha) * (good | flagged)
    lengths = torch.bincount(ids, minlength=len(batch["lengths"])).clamp(min=1)
    return {"ce": (tokens / lengths[ids]).sum()}


def collect_judged(run: Run) -> None:
    """Sample answers to fresh instances and have them judged in words; resumes behind the last whole record."""
    cfg, path = run.cfg, run.folder / "judged.jsonl"
    if cfg.records:
        return
    done = collected(path, candidate_key)
    todo = [record for record in unanswered(run) if candidate_key(record) not in done]
    critic, chunk, empty = make_critic(run), 4 * cfg.eval_batch, 0
    run = dataclasses.replace(run, model=plain(run.model))
    for start in tqdm(range(0, len(todo), chunk), desc="collect", unit="chunk", disable=None if ranks()[0] == 0 else True):
        records = answered(run, todo[start:start + chunk])
        spoken = [record for record in records if record["response"].strip()]
        empty += len(records) - len(spoken)
        for record in spoken:
            if "{input}" in record["instruction"]:          # a task's wording; in records of judged responses that is a text like others
                record |= {"instruction": record["instruction"].replace("{input}", record["input"]), "input": ""}
        keep(path, [{**record, "judgment": judgment} for record, judgment in zip(spoken, critic.critique(spoken), strict=True)])
    judging.RUN.tell(say)
    if empty:
        say(f"{cfg.stage}: {empty} empty responses were not recorded.")


def collect_refined(run: Run) -> None:
    """ilf: judged responses, then for each bad one the best of several refinements by the model itself."""
    collect_judged(run)
    cfg, path = run.cfg, run.folder / "refined.jsonl"
    done = collected(path, lambda record: record["key"])
    todo = [r for r in judged_records(run) if r["judgment"] is not None and not r["refinement"] and record_key(r) not in done]
    if cfg.judge == "rule" and any(record["target"] is None for record in todo):
        raise ValueError(f"{cfg.records} has records without a target, which --judge rule needs. Give --judge self.")
    run = dataclasses.replace(run, model=plain(run.model), cfg=dataclasses.replace(cfg, show_target=all(r["target"] is not None for r in todo)))
    judge = make_judge(run)
    for start in range(0, len(todo), cfg.eval_batch):
        part = todo[start:start + cfg.eval_batch]
        asked = [{**record, "task": "", "id": record_key(record), "wording": "", "sample": k} for record in part for k in range(cfg.refinements)]
        prompts = [run.template.render(*judging.refine_prompt(r["instruction"], r["input"], r["response"], r["judgment"])) for r in asked]
        made = sampled(run, asked, prompts)
        judged = judge.judge([{**record, "response": answer.text} for record, answer in zip(asked, made)])
        for k, record in enumerate(part):
            span = range(k * cfg.refinements, (k + 1) * cfg.refinements)
            best = max(span, key=lambda i: (judged[i].reward or 0, -i))
            text = made[best].text
            good = text.strip() and text.strip() != record["response"].strip()
            keep(path, [{"key": record_key(record), "refinement": text if good else None, "reward": judged[best].reward}])


def record_key(record: dict) -> str:
    """What tells one judged response from another."""
    return json.dumps([record["instruction"], record["input"], record["response"]])


def make_critic(run: Run):
    """Who writes judgments: a server, rules, or the model with --critic's adapter (its own without)."""
    cfg = run.cfg
    if "http" in (cfg.judge, cfg.critic):
        return judging.HttpCritic(backend(run), max_unparsed=cfg.max_unparsed)
    if cfg.judge == "rule":
        return judging.RuleCritic()
    model = plain(load_trained(cfg, Path(cfg.critic))) if cfg.critic else plain(run.model)

    def write(asked):
        prompts = [run.template.render(*pair) for pair in asked]
        return shared(prompts, lambda part: [(answer.text, answer.finished) for answer in complete(
            model, run.tokenizer, part, max_new_tokens=cfg.max_new_tokens, batch_size=cfg.eval_batch, max_len=cfg.max_len)])
    return judging.LocalCritic(write)


def token_step(model, batch, cfg) -> dict:
    """Next-token cross-entropy on the labelled tokens (spec 2.1)."""
    return {"ce": losses.cross_entropy(label_logprobs(model, batch)[0])[0]}


def token_counts(batch, cfg) -> dict:
    """Labelled tokens."""
    return {"ce": len(batch["targets"])}


def cat_step(model, batch, cfg) -> dict:
    """L = L_rank + lambda * L_ce over items of good and lower answers (spec 2.5)."""
    terms = losses.cat_loss(label_logprobs(model, batch)[0], batch["owners"], batch["better"], batch["worse"], batch["weights"],
                            lam=cfg.lam, margin=cfg.margin)
    return {term: loss for term, (loss, _) in terms.items()}


def cat_counts(batch, cfg) -> dict:
    """Pairs, and tokens of the good answers, weighted as the loss weights them."""
    return {"rank": len(batch["better"]), "ce": float(batch["weights"][batch["owners"]].sum())}


@dataclass(frozen=True)
class Stage:
    """A row of STAGES: how its records are collected, how they become groups of documents, its step and its counts."""

    groups: Callable                                        # Run -> [{"documents": [...], ...}], one per item of a step
    step: Callable                                          # (model, batch, cfg) -> {term: weighted loss sum}
    counts: Callable                                        # (batch, cfg) -> {term: n}
    collect: Callable = lambda run: None                    # Run -> records in the run folder; every rank calls it, rank 0 writes (`keep`)
    needs: str = ""                                         # the stage whose adapter this one continues
    beside: tuple[str, ...] = ()                            # stages that the table shows next to it
    head: bool = False                                      # a value head on the final hidden states
    refresh: bool = False                                   # groups are made anew every phase (ppo)
    begin: Callable = lambda run: None                      # Run -> its memory as it is before the first phase
    losses: tuple[str, ...] = ()                            # the terms whose sum is watched for spikes (default: all)
    title: str = ""


STAGES = {
    "pretrain": Stage(corpus_groups, token_step, token_counts, title="base"),
    "sft": Stage(lambda run: sft_groups(run, 0), token_step, token_counts, title="SFT"),
    "sft-ia": Stage(lambda run: sft_groups(run, run.cfg.wordings), token_step, token_counts, beside=("sft",), title="SFT(IA)"),
    "cat": Stage(cat_groups, cat_step, cat_counts, collect_candidates, needs="sft-ia", beside=("sft",), title="SFT(IA)+CAT"),
    "dpo": Stage(dpo_groups, dpo_step, dpo_counts, collect_candidates, needs="sft-ia", beside=("sft",), losses=("loss",), title="SFT(IA)+DPO"),
    "rso": Stage(rso_groups, dpo_step, dpo_counts, collect_candidates, needs="sft-ia", beside=("sft",), losses=("loss",), title="SFT(IA)+RSO"),
    "slic": Stage(cat_groups, slic_step, slic_counts, collect_candidates, needs="sft-ia", beside=("sft",), title="SFT(IA)+SLiC"),
    "rrhf": Stage(ranked_groups, rrhf_step, group_counts, collect_candidates, needs="sft-ia", beside=("sft",), title="SFT(IA)+RRHF"),
    "pro": Stage(ranked_groups, pro_step, group_counts, collect_candidates, needs="sft-ia", beside=("sft",), title="SFT(IA)+PRO"),
    "expert": Stage(expert_groups, token_step, token_counts, collect_candidates, needs="sft-ia", beside=("sft",), title="SFT(IA)+expert"),
    "conditional": Stage(conditional_groups, token_step, token_counts, collect_candidates, needs="sft-ia", beside=("sft",), title="SFT(IA)+conditional"),
    "reward": Stage(reward_groups, reward_step, reward_counts, collect_candidates, needs="sft-ia", head=True, losses=("loss",), title="reward model"),
    "ppo": Stage(ppo_groups, ppo_step, ppo_counts, needs="sft-ia", beside=("sft",), head=True, refresh=True, begin=begin_ppo, losses=("value",), title="SFT(IA)+PPO"),
    "rlaif": Stage(rlaif_groups, dpo_step, dpo_counts, collect_preferences, needs="sft-ia", beside=("sft",), losses=("loss",), title="SFT(IA)+RLAIF"),
    "constitutional": Stage(constitutional_groups, token_step, token_counts, collect_revisions, needs="sft-ia", beside=("sft",),
                            title="SFT(IA)+constitutional"),
    "cut": Stage(cut_groups, cut_step, cut_counts, collect_judged, needs="sft", losses=("l1", "l2"), title="CUT"),
    "forward": Stage(forward_groups, sequence_step, sequence_counts, collect_judged, needs="sft", title="forward prediction"),
    "ilf": Stage(ilf_groups, sequence_step, sequence_counts, collect_refined, needs="sft", title="ILF"),
    "hindsight": Stage(hindsight_groups, sequence_step, sequence_counts, collect_judged, needs="sft", title="hindsight"),
    "unlikelihood": Stage(unlikelihood_groups, unlikelihood_step, sequence_counts, collect_judged, needs="sft", title="unlikelihood"),
    "critic": Stage(critic_groups, sequence_step, sequence_counts, collect_judged, needs="sft", title="critic"),
}
assert STAGES.keys() == STAGE_DEFAULTS.keys()


def register(name: str, stage: Stage, *, like: str) -> None:
    """Add a stage that shares the flags and the defaults of another, so that `main` knows it by name."""
    if name in STAGES:
        raise ValueError(f"stage {name!r} exists already. Give another name.")
    STAGES[name], KIND[name] = stage, kind(like)
    for defaults in (STAGE_DEFAULTS, DEMO_MODEL):
        defaults[name] = defaults.get(like, {})


def collate(groups: list[dict], device) -> dict:
    """Groups of a micro-batch as one packed row, with the documents' pairs counted through.

    "attend" is the row's attention; "rows" (M,) is where its labelled tokens are predicted, "targets" (M,) what they are, and
    "owners" (M,) whose: the number of their document.
    """
    documents = [document for group in groups for document in group["documents"]]
    batch, better, worse, weights, imitated = data.pack(documents, [len(group["documents"]) for group in groups]), [], [], [], []
    batch["attend"] = attention(batch["trees"], device)
    batch["rows"], batch["targets"] = losses.prediction_rows(batch["labels"], batch["attend"].before)
    batch["owners"] = batch["document_ids"][batch["labels"] != data.IGNORE_INDEX]
    for group in groups:
        start, n_best = len(weights), group.get("n_best", 0)
        better += [start + pair[0] for pair in group.get("pairs", ())]
        worse += [start + pair[1] for pair in group.get("pairs", ())]
        imitated += [start + k for k in group.get("imitated", ())]
        weights += [1 / max(1, n_best)] * n_best + [0.0] * (len(group["documents"]) - n_best)
    batch["groups"], batch["rewards"] = len(groups), [group["rewards"] for group in groups if "rewards" in group]
    if any("reference" in group for group in groups):
        batch["reference"] = torch.tensor([value for group in groups for value in group["reference"]])
    for name in groups[0].get("per_token", ()):             # (M,) each
        batch[name] = torch.tensor([value for group in groups for value in group["per_token"][name]])
    if any("pair_weights" in group for group in groups):
        batch["pair_weights"] = torch.tensor([weight for group in groups for weight in group["pair_weights"]])
    if any("probability" in group for group in groups):
        batch["probability"] = torch.tensor([q for group in groups for q in group["probability"]])
    if any("roles" in group for group in groups):
        batch["roles"] = torch.tensor([role for group in groups for role in group["roles"]])
    if any("flagged" in group for group in groups):
        batch["flagged"] = torch.tensor([x for group in groups for x in group.get("flagged", ())], dtype=torch.bool)
    batch.update(better=torch.tensor(better, dtype=torch.long), worse=torch.tensor(worse, dtype=torch.long),
                 imitated=torch.tensor(imitated, dtype=torch.long), weights=torch.tensor(weights))
    return {name: put(value, device) if torch.is_tensor(value) else value for name, value in batch.items()}


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
        except (ValueError, OSError, judging.JudgeStopped) as problem:
            failed, error = torch.ones(1), problem
    if size > 1:
        dist.broadcast(failed, 0)
    if error:
        raise error
    if failed:
        with contextlib.suppress(RuntimeError):             # until rank 0 has spoken and left: torchrun ends all with the first that ends
            dist.broadcast(failed, 0)
        sys.exit(1)


def from_first_rank(action: Callable):
    """What `action` returns on rank 0, on every rank. It travels as JSON: exact for numbers, and nothing is unpickled."""
    found = []
    on_first_rank(lambda: found.append(action()))
    return exchanged(found)[0]


def shared(items: list, work: Callable[[list], list]) -> list:
    """work(items), of which each rank does its share; every rank gets all results, in the order of one process."""
    rank, size = ranks()
    if size == 1:
        return work(items)
    mine = items[len(items) * rank // size:len(items) * (rank + 1) // size]
    return exchanged(work(mine) if mine else [])


def exchanged(values: list) -> list:
    """The values of all ranks, rank by rank."""
    size = ranks()[1]
    if size == 1:
        return values
    blob = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(blob)]))
    room = max(int(n) for n in lengths)
    blobs = [torch.zeros(room, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(blobs, torch.cat([blob, torch.zeros(room - len(blob), dtype=torch.uint8)]))
    return [value for part, n in zip(blobs, lengths) for value in json.loads(part[:int(n)].numpy().tobytes())]


def keep(path: Path, records: list[dict]) -> None:
    """Append records that every rank has to a file of the run, once."""
    on_first_rank(data.append_records, path, records)


def collected(path: Path, key: Callable[[dict], object]) -> set:
    """The keys of the records that a file of the run holds already; rank 0 reads it, and mends it."""
    found = from_first_rank(lambda: mended(path, key))
    return {tuple(item) if isinstance(item, list) else item for item in found}


def mended(path: Path, key: Callable[[dict], object]) -> list:
    """The keys of a file's records. A torn end is cut off, a record that is there again is dropped; two of one key that differ are refused."""
    records, first = data.read_records(path, own=True), {}
    for number, record in enumerate(records, 1):
        try:
            line, known = first.setdefault(key(record), (number, record))
        except (KeyError, TypeError):
            raise ValueError(f"{path}, line {number}, is no record of this stage. Fix or delete that line.") from None
        if known != record:
            raise ValueError(f"{path}, line {number}, holds another record for {key(record)} than line {line}. Expected one. Delete one of the two lines.")
    if len(first) < len(records):
        lora.write_file(path, lambda file: data.append_records(file, [record for _, record in first.values()]))
        say(f"warning: dropped {len(records) - len(first)} records from {path} that were there twice.")
    return list(first)


def all_sum(values: dict) -> dict:
    """The sums over all ranks of {name: number}, in float64."""
    if ranks()[1] == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def precision(cfg: TrainConfig, device: str):
    """The numbers that a step computes in; what it is compared with (a reference, old log-probabilities) must use the same."""
    return torch.autocast(device, torch.bfloat16, enabled=cfg.full and pick_device(cfg)[1] != torch.float32)


def backward(model, stage: Stage, batches: list[dict], cfg: TrainConfig) -> dict:
    """Gradients of one step; returns {term: mean}. Each term is divided once, by its total over batches and ranks.

    A row, a batch or a rank without a target adds nothing: its sum and its count are 0.
    """
    totals, sums = {}, {}
    for batch in batches:
        for term, n in stage.counts(batch, cfg).items():
            totals[term] = totals.get(term, 0) + n
    totals = all_sum(totals)
    device = next(model.parameters()).device.type
    for batch, weight in in_step(batches) if cfg.shard else zip(batches, itertools.repeat(1)):
        with precision(cfg, device):
            terms = stage.step(model, batch, cfg)
        (weight * sum(loss / max(1, totals[term]) for term, loss in terms.items())).backward()
        for term, loss in terms.items():
            sums[term] = sums.get(term, 0.0) + weight * loss.detach()
    if ranks()[1] > 1:
        sum_gradients([p for p in model.parameters() if p.requires_grad and not is_shard(p)])
    return {term: value / max(1, totals[term]) for term, value in all_sum({k: float(v) for k, v in sums.items()}).items()}


def in_step(batches: list[dict]) -> list[tuple[dict, int]]:
    """Micro-batches, as many as the rank with the most has: the others repeat their last one for nothing, since all need all ranks' shards."""
    most = max(exchanged([len(batches)]))
    return [(batch, 1) for batch in batches] + [(batches[-1], 0)] * (most - len(batches))


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Add up gradients over the ranks, in buckets; one that no rank has stays None, as on one process."""
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
    dist.all_reduce(used)
    pending = [p for p, n in zip(parameters, used.tolist()) if n]
    while pending:
        bucket, size = [], 0
        while pending and (not bucket or size + pending[0].numel() <= 2**23 and pending[0].dtype == bucket[0].dtype):
            bucket.append(pending.pop(0))
            size += bucket[-1].numel()
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        dist.all_reduce(flat)
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket])):
            p.grad = part.view_as(p)


def culprits(model, stage: Stage, groups: list[dict], chosen: list[int], cfg: TrainConfig, step: int) -> str:
    """The records of a step that gave a number that is not finite: those whose own loss is not, or else all of them."""
    (rank, size), device = ranks(), next(model.parameters()).device
    bad = torch.zeros(len(chosen))
    with torch.no_grad():
        for k in range(len(chosen)) if cfg.shard else range(rank, len(chosen), size):
            batch = {**collate([groups[chosen[k]]], device), "step": step}
            with precision(cfg, device.type):
                bad[k] = not all(bool(loss.isfinite()) for loss in stage.step(model, batch, cfg).values())
    if size > 1:
        dist.all_reduce(bad)
    return named([groups[i] for i, found in zip(chosen, bad.tolist()) if found] or [groups[i] for i in chosen])


def named(groups: list[dict], most: int = 5) -> str:
    """The records of groups, the first few by name."""
    names = list(dict.fromkeys(group.get("name", "without a name") for group in groups))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_spike(loss: float, recent: list[float]) -> bool:
    """Whether a loss is worse than the last and more than three times the mean of the last ten."""
    return len(recent) == 10 and sum(recent) > 0 and loss > recent[-1] and loss > 3 * sum(recent) / 10


def train(run: Run, stage: Stage, groups: list[dict], log_path: Path, place: Path | None = None) -> None:
    """The one loop, for every stage and any number of ranks: rank r takes each step's groups r, r + size, ...

    It goes on from the checkpoint `place`, where one is given, as if it had never stopped: same bits on the same CPU.
    """
    cfg, device, (rank, size) = run.cfg, next(run.model.parameters()).device, ranks()
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=cfg.weight_decay, fused=True)
    torch.manual_seed(cfg.seed + rank)                      # dropout
    done = {"step": 0, "tokens": 0, "seconds": 0.0, "recent": []}
    if place:
        done, groups = load_checkpoint(run, optimizer, place, groups)
        say(f"{cfg.stage}: resuming at step {done['step']}.")
    if not groups:
        raise ValueError(f"nothing to train on for stage {cfg.stage}: no item is left. See the counts above; "
                         "more samples or another judge may help.")
    cut = sum(document["cut"] for group in groups for document in group["documents"])
    if cut:
        say(f"{cfg.stage}: {cut} documents are longer than --max-len {cfg.max_len}; the left of their prompts was cut.")
    run.model.train()
    HEARD["wait"] = True
    seen, started, recent = done["tokens"], time.time() - done["seconds"], done["recent"]
    bar = tqdm(range(done["step"], cfg.steps), desc=cfg.stage, initial=done["step"], total=cfg.steps, disable=None if rank == 0 else True)
    phase = cfg.rollouts * cfg.ppo_epochs // cfg.batch_size     # steps per phase, where a stage has phases
    for step in bar:
        if stage.refresh and step and step % phase == 0:
            groups = stage.groups(run)
            run.model.train()
        chosen = data.batch_indices(len(groups), cfg.batch_size, step, cfg.seed)
        batches = [{**collate(part, device), "step": step} for part in data.micro_batches([groups[i] for i in chosen[rank::size]], cfg.micro_tokens)]
        means = backward(run.model, stage, batches, cfg)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)))
        if not math.isfinite(sum(means.values())) or not math.isfinite(norm):
            found, last = culprits(run.model, stage, groups, chosen, cfg, step), saved_steps(run.folder)[:1]
            raise FloatingPointError(f"step {step} of {cfg.stage} gave a non-finite loss or gradient norm ({means}, norm {norm}; records {found}); "
                                     f"nothing was updated. {f'Last checkpoint: step {int(last[0].name[5:])}. ' if last else ''}"
                                     "Try a lower --lr with another --out, or look at those records.")
        for part in optimizer.param_groups:
            part["lr"] = learning_rate(step, cfg)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += int(all_sum({"tokens": sum(len(batch["input_ids"]) for batch in batches)})["tokens"])
        seconds = time.time() - started
        bar.set_postfix_str(f"{seen / seconds / 1000:.1f}k tok/s")
        loss = sum(means[term] for term in stage.losses or means)
        spike, recent = named([groups[i] for i in chosen]) if is_spike(loss, recent) else "", [*recent, loss][-10:]
        if rank == 0:
            log_step(log_path, cfg, step, means, norm=norm, tokens=seen, seconds=seconds, spike=spike)
        stop = asked_to_stop() if step + 1 < cfg.steps else 0
        if stop or cfg.save_every and (step + 1) % cfg.save_every == 0 and step + 1 < cfg.steps:
            save_checkpoint(run, stage, optimizer, groups, {"step": step + 1, "tokens": seen, "seconds": seconds, "recent": recent})
        if stop:
            raise Stopped(stop, f" behind step {step + 1} of {cfg.stage}, which is saved")
    run.model.eval()
    say(f"{cfg.stage}: {seen:,} tokens in {spoken(time.time() - started)}, {seen / (time.time() - started):,.0f} tok/s; {peak_memory(device)[1]}.")


def log_step(path: Path, cfg: TrainConfig, step: int, means: dict, *, norm: float, tokens: int, seconds: float, spike: str = "") -> None:
    """A row of log.jsonl for every step, a line on the screen for every tenth of the run; a loss that jumped names its records."""
    means = {name: round(value, 6) for name, value in means.items()}
    data.append_records(path, [{"stage": cfg.stage, "step": step, **means, "norm": round(norm, 4),
                                "lr": learning_rate(step, cfg), "tokens": tokens, "seconds": round(seconds, 2), **({"spike": spike} if spike else {})}])
    if spike:
        tqdm.write(f"warning: the loss of {cfg.stage} jumped at step {step} (records {spike}).")
    if (step + 1) % max(1, cfg.steps // 10) == 0:
        text = " | ".join(f"{name} {value:.3f}" for name, value in means.items())
        tqdm.write(f"{cfg.stage} step {step + 1}/{cfg.steps} | {text} | {tokens / seconds / 1000:.1f}k tok/s")


def spoken(seconds: float) -> str:
    """3 h 12 min, 4 min 10 s, 12 s."""
    hours, minutes, rest = int(seconds // 3600), int(seconds // 60 % 60), int(seconds % 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def peak_memory(device) -> tuple[dict, str]:
    """The most memory that this process has used so far, as bytes by place and in words."""
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.max_memory_allocated(device)
    return found, "peak memory " + ", ".join(f"{bytes / 1e9:.2f} GB ({place})" for place, bytes in found.items())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: what a step reads, so that a stopped stage goes on. Safetensors and JSON, whole or not there at all

CHECKPOINTS, KEPT = "checkpoints", 2
GROWING = ("log.jsonl", "rollouts.jsonl")                   # files that training appends to; resuming cuts them back


def save_checkpoint(run: Run, stage: Stage, optimizer: torch.optim.Optimizer, groups: list[dict], done: dict) -> None:
    """Weights, AdamW's state, random states and books after done["step"] steps, as RUN/checkpoints/step-000123."""
    rank, size = ranks()
    state = random_state(next(run.model.parameters()).device)
    states = [torch.empty_like(state) for _ in range(size)] if rank == 0 else None
    if size > 1:
        dist.gather(state, states, 0)
    weights = trained(run.model)
    adam = {f"{name}/{key}": value for name, p in weights.items() for key, value in optimizer.state.get(p, {}).items()}
    tensors = {"weights": on_cpu(weights), "optimizer": on_cpu(adam), "random": dict(zip(map(str, range(size)), states if size > 1 else [state])) if rank == 0 else {}}
    on_first_rank(write_checkpoint, run, stage, tensors, groups, done)


def write_checkpoint(run: Run, stage: Stage, tensors: dict[str, dict], groups: list[dict], done: dict) -> None:
    """All files into a folder beside, synced, the manifest of their checksums last; then renamed; then older ones go."""
    folder = run.folder / CHECKPOINTS
    books = {**done, "memory": {name: value for name, value in run.memory.items() if isinstance(value, (int, float))},
             "sizes": {name: (run.folder / name).stat().st_size for name in GROWING if (run.folder / name).exists()},
             "data": fingerprint(groups), "groups": groups if stage.refresh else None}
    part = folder / f".tmp-{done['step']:06d}-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name, found in tensors.items():
            lora.write_file(part / f"{name}.safetensors", lambda file: safetensors.torch.save_file(found, file))
        lora.write_file(part / "state.json", lambda file: file.write_text(json.dumps(books) + "\n"))
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": checksum(file)} for file in sorted(part.iterdir())}
        lora.write_file(part / "manifest.json", lambda file: file.write_text(json.dumps(manifest, indent=1)))
        sync(part)
        target = folder / f"step-{done['step']:06d}"
        shutil.rmtree(target, ignore_errors=True)           # a damaged one that was passed over
        os.rename(part, target)
        sync(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in saved_steps(run.folder)[KEPT:]:
        shutil.rmtree(old)


def load_checkpoint(run: Run, optimizer, place: Path, groups: list[dict]) -> tuple[dict, list[dict]]:
    """Put a checkpoint's state into model, optimizer, memory and random generators; its books and the stage's groups."""
    (rank, size), weights = ranks(), trained(run.model)
    books = json.loads((place / "state.json").read_text())
    groups = books.pop("groups") or groups
    if books["data"] != fingerprint(groups):
        raise ValueError(f"{place} was trained on other documents than these inputs give: a file has changed since. "
                         f"Give the old ones, or remove {place.parent} to train the stage anew.")
    read = {name: safetensors.torch.load_file(place / f"{name}.safetensors") for name in ("weights", "optimizer", "random")}
    if {name: p.shape for name, p in weights.items()} != {name: x.shape for name, x in read["weights"].items()}:
        raise ValueError(f"{place} holds other weights than this stage trains: the model has changed since. "
                         f"Give the old one, or remove {place.parent} to train the stage anew.")
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(like(read["weights"][name], p))
    for key, value in read["optimizer"].items():
        name, _, slot = key.rpartition("/")
        optimizer.state[weights[name]][slot] = value if slot == "step" else like(value, weights[name])
    run.memory.update(books["memory"])
    if len(read["random"]) == size:
        set_random_state(read["random"][str(rank)])
    elif run.cfg.dropout:
        say(f"warning: {run.cfg.stage} was stopped with {len(read['random'])} processes and goes on with {size}, so its dropout draws anew.")
    if rank == 0:
        for name, length in books["sizes"].items():
            cut_back(run.folder / name, length)
    return books, groups


def is_shard(x: torch.Tensor) -> bool:
    """Whether this rank holds only a part of it."""
    return hasattr(x, "full_tensor")


def whole(x: torch.Tensor) -> torch.Tensor:
    """All of a tensor, which every rank asks for."""
    return x.full_tensor() if is_shard(x) else x


def on_cpu(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Tensors whole in rank 0's main memory, gathered one after another; on the other ranks nothing."""
    found = {}
    for name, x in tensors.items():
        x = whole(x.detach())
        if ranks()[0] == 0:
            found[name] = x.to("cpu", dtype).contiguous()
    return found


def like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """x where `other` is, and in the same shards."""
    if not is_shard(other):
        return x.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None where there is none at all; damaged ones are told."""
    damaged, found = [], saved_steps(folder)
    for place in found:
        problem = damage(place)
        if not problem:
            for name, reason in damaged:
                say(f"warning: checkpoint {name} is incomplete ({reason}); resuming from {place.name}.")
            return place
        damaged.append((place.name, problem))
    if damaged:
        raise ValueError(f"no checkpoint in {folder / CHECKPOINTS} is whole ({damaged[0][0]}: {damaged[0][1]}). "
                         "Remove that folder to train the stage anew.")
    return None


def damage(place: Path) -> str:
    """What is wrong with a checkpoint, or nothing."""
    try:
        manifest = json.loads((place / "manifest.json").read_text())
        for name in ("weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"):
            if (place / name).stat().st_size != manifest[name]["bytes"] or checksum(place / name) != manifest[name]["sha256"]:
                return f"{name}: checksum differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "manifest.json is damaged"
    return ""


def saved_steps(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first."""
    return sorted((place for place in (folder / CHECKPOINTS).glob("step-*") if place.name[5:].isdigit()), key=lambda place: -int(place.name[5:]))


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that the stage trains, by name: adapters or all weights, and the value head."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_state(device) -> torch.Tensor:
    """torch's random state as bytes: the CPU's, and behind it the GPU's."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


def set_random_state(state: torch.Tensor) -> None:
    """Undo `random_state`. On another kind of device its own part stays as it is."""
    length = len(torch.get_rng_state())
    torch.set_rng_state(state[:length])
    if len(state) > length and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[length:])


def fingerprint(groups: list[dict]) -> str:
    """A checksum of the documents' tokens and labels, in order."""
    digest = hashlib.sha256()
    for document in (document for group in groups for document in group["documents"]):
        for ids in (document["input_ids"], document["labels"]):
            digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.hexdigest()


def checksum(file: Path) -> str:
    """sha256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cut_back(path: Path, length: int) -> None:
    """A file as it was when it had `length` bytes."""
    if not path.exists() or path.stat().st_size < length:
        raise ValueError(f"{path} is shorter than when the last checkpoint was written. Put it back, or remove {path.parent / CHECKPOINTS} "
                         "to train the stage anew.")
    os.truncate(path, length)


@contextlib.contextmanager
def in_use(folder: Path):
    """Keep other processes out of a run folder; the system gives the lock back however this one ends."""
    on_first_rank(take_lock, folder)
    try:
        yield
    finally:
        if folder in LOCKS:
            os.close(LOCKS.pop(folder))


LOCKS: dict[Path, int] = {}                                 # run folder -> open handle of its run.lock


def take_lock(folder: Path) -> None:
    """Lock RUN/run.lock and write into it who has it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        raise ValueError(f"{folder} is in use by {holder or 'another process'}. Wait for it, or choose another --out.") from None
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    LOCKS[folder] = handle


def sync(folder: Path) -> None:
    """Make the names in a folder outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# Before a run: what it will take, by arithmetic


class _Attention(torch.autograd.Function):
    """Stands in for attention on the meta device: keeps what a fused kernel keeps (q, k, v, output), computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def activation_bytes(config, cfg: TrainConfig, dtype: torch.dtype, tokens: int) -> int:
    """Bytes that a forward pass of `tokens` keeps for the backward pass, without logits: counted on a model without storage."""
    small = dataclasses.replace(config, n_layers=1)
    with torch.device("meta"):
        model = Llama(small).to(dtype)
        for name, module in list(model.named_modules()):
            if cfg.quantize != "none" and ".layers." in name and isinstance(module, torch.nn.Linear):
                model.set_submodule(name, QuantLinear(module.in_features, module.out_features, cfg.quantize, dtype, "meta"))
        if not cfg.full:
            lora.apply_lora(model, adapter_config(cfg))
        weights, kept = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}, {}

        def count(tensor):
            if tensor.untyped_storage()._cdata not in weights:
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes(), tensor      # held, so that no id comes twice
            return tensor
        x, cos = torch.empty(tokens, config.dim, dtype=dtype, requires_grad=True), torch.empty(tokens, 1, config.head_dim, dtype=dtype)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.model.layers[0](x, lambda layer, q, k, v: _Attention.apply(q, k, v), cos, cos)
    block = sum(bytes for bytes, _ in kept.values())
    return config.n_layers * tokens * config.dim * dtype.itemsize + block if cfg.checkpointing else config.n_layers * block


def documents_per_group(cfg: TrainConfig) -> int:
    """The most documents that a group of this stage holds; a step takes --batch-size groups."""
    stage, worse = kind(cfg.stage), cfg.max_worse
    if stage in ("cat", "dpo", "slic"):
        return (2 * worse if cfg.condition == "worse" else 1 + worse) + (stage == "slic" and cfg.ce_target == "gold")
    return {"rrhf": 1 + worse, "pro": 1 + worse, "reward": 2 if cfg.preferences else 1 + worse, "rso": cfg.rso_keep, "rlaif": 2,
            "cut": 2 if cfg.use_l1 else 1, "forward": 2}.get(stage, 1)


def estimate(cfg: TrainConfig) -> list[tuple[str, float, str]]:
    """(what, bytes or number, remark) of a run, from its flags and the shape of its model alone."""
    if not Path(cfg.model).exists() and cfg.model not in PRESETS and cfg.stage != "pretrain":
        raise ValueError(f"--model {cfg.model} is no folder, no config.json and no preset. Presets: {', '.join(PRESETS)}.")
    config = PRESETS[cfg.preset] if cfg.stage == "pretrain" and not cfg.model else PRESETS[cfg.model] if cfg.model in PRESETS else read_config(cfg.model)
    with torch.device("meta"):
        model = Llama(config)
    _, dtype = pick_device(cfg)
    dtype = torch.float32 if cfg.full else dtype
    named = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linears = [module for name, module in named.items() if ".layers." in name]
    adapted = [module for name, module in named.items() if lora.matches(name, adapter_config(cfg).targets)]
    parameters, inside = sum(p.numel() for p in model.parameters()), sum(module.weight.numel() for module in linears)
    base = parameters * dtype.itemsize
    if cfg.quantize != "none":
        with torch.device("meta"):
            codes = [QuantLinear(m.in_features, m.out_features, cfg.quantize, dtype, "meta") for m in linears]
        base += sum(x.nbytes for module in codes for x in module.buffers()) - inside * dtype.itemsize
    trained = parameters if cfg.full else sum(cfg.rank * (m.in_features + m.out_features) for m in adapted)
    state = 12 if cfg.full else 16
    in_group = documents_per_group(cfg)
    micro = max(cfg.micro_tokens, in_group * cfg.max_len)   # a group is never torn
    kept = cfg.full or kind(cfg.stage) == "unlikelihood" and cfg.level == "token" or "lm_head" in cfg.adapt     # else a piece at a time, and a vector each
    rows_at_once = micro if kept else min(micro, losses.head_rows(pick_device(cfg)[0]))
    logits = rows_at_once * config.vocab_size * (dtype.itemsize + (4 if dtype.itemsize == 4 else 8)) + (0 if kept else micro * config.dim * dtype.itemsize)
    cache = 2 * cfg.eval_batch * min(cfg.max_len, config.context) * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize
    merged = 0 if cfg.full or cfg.quantize != "none" else base
    training = base + state * trained + activation_bytes(config, cfg, dtype, micro) + logits
    rows = [("parameters", parameters, f"{config.n_layers} layers, width {config.dim}, {config.vocab_size} pieces, {config.context} positions"),
            ("trained parameters", trained, "all" if cfg.full else f"adapters of rank {cfg.rank}, {100 * trained / parameters:.2f} %"),
            ("weights", base, cfg.quantize if cfg.quantize != "none" else str(dtype).removeprefix("torch.")),
            ("gradients and AdamW", state * trained, f"float32, {state} bytes for each trained parameter" + ("" if cfg.full else ", itself included")),
            ("activations", training - base - state * trained - logits, f"of one micro-batch, {micro:,} tokens: --micro-tokens, or a group of {in_group} x --max-len"),
            ("logits", logits, "if each of its tokens is a target; usually a fraction" if kept else f"of {rows_at_once:,} tokens at a time"),
            ("training, at most", training, "the four above"),
            ("merged copy", merged, "while sampling and evaluating"),
            ("cache", cache, f"of --eval-batch {cfg.eval_batch} rows of --max-len {cfg.max_len} tokens"),
            ("sampling, at most", base + merged + cache, "weights, copy, cache")]
    tokens = cfg.steps * cfg.batch_size * in_group * cfg.max_len
    way = stage_config(cfg, "sft") if kind(cfg.stage) in AFTER_SFT and cfg.tasks else None
    work = [("operations, at most", tokens, "")] + ([("... of SFT on the way", way.steps * way.batch_size * cfg.max_len, f"{way.steps} x {way.batch_size} examples: ")] if way else [])
    price = (6 if cfg.full else 4) * parameters             # a token's
    return rows + [("steps", cfg.steps, f"of {cfg.batch_size} examples (cat and its kin: groups), after {cfg.sft_steps} of SFT on the way"
                    if kind(cfg.stage) in AFTER_SFT else f"of {cfg.batch_size} examples"),
                   ("tokens, at most", tokens, f"{cfg.steps} x {cfg.batch_size} x --max-len {cfg.max_len}" + (f" x {in_group} documents in a group" if in_group > 1 else "")),
                   *((what, price * n, f"{said}{6 if cfg.full else 4} x parameters x tokens: {spoken(price * n / 4e14)} at 400 TFLOP/s, "
                      f"{spoken(price * n / 5e13)} at 50 (arithmetic, not measured)") for what, n, said in work)]


def dry_run(cfg: TrainConfig) -> None:
    """Print the estimate, and how many examples the tasks give."""
    for what, number, remark in estimate(cfg):
        counted = what.endswith("parameters") or what.startswith(("steps", "tokens", "operations", "..."))
        shown = f"{number:,.0f}" if counted and number < 1e12 else f"{number:.2e}" if counted else f"{number / 1e9:,.2f} GB"
        say(f"{what:20s} {shown:>16s}   {remark}")
    if cfg.tasks and kind(cfg.stage) not in JUDGED:
        tasks = data.load_tasks(cfg.tasks)
        if cfg.paraphrases:
            data.load_paraphrases(cfg.paraphrases, tasks)
        examples = data.instruction_examples(tasks, wordings=0 if cfg.stage == "sft" else cfg.wordings, augment=cfg.augment, per_task=cfg.per_task, seed=cfg.seed)
        say(f"{'examples':20s} {len(examples):>16,}   of {len(tasks)} tasks; {cfg.steps * cfg.batch_size / max(1, len(examples)):.1f} passes over them in SFT's terms")


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline


def make_run(cfg: TrainConfig) -> Run:
    """Read everything that the flags name; whatever is wrong with it shows here, before anything is trained."""
    tasks = data.load_tasks(cfg.tasks) if cfg.tasks else []
    if cfg.paraphrases:
        data.load_paraphrases(cfg.paraphrases, tasks)
    framed = data.frame_bare_tasks(tasks) if kind(cfg.stage) not in JUDGED else ""
    if framed:
        say(framed)
    tokenizer = data.Tokenizer(cfg.tokenizer or cfg.model, cfg.model)
    model = load_trained(cfg, None) if not cfg.shard else Llama(read_config(cfg.model)).to("meta")
    warning = data.check_vocabulary(tokenizer, model.config.vocab_size, model.config.bos_id, model.config.eos_ids, cfg.model)
    if warning:
        say(warning)
    if cfg.max_len > model.config.context:
        raise ValueError(f"--max-len is {cfg.max_len}, but {cfg.model} takes {model.config.context} tokens. Lower it.")
    cfg = dataclasses.replace(cfg, template=cfg.template or model.config.prompt_template or "alpaca")
    template = data.find_template(cfg.template)
    data.check_template(tokenizer, template, cfg.template)
    if cfg.records:
        check_lengths(cfg, tokenizer, data.load_judged(cfg.records))
    if cfg.candidates:
        data.load_candidates(cfg.candidates)
    held = [task.name for task in tasks if len(task.wordings.get(cfg.split, [])) >= 2]
    if not held and cfg.evaluate and tasks and kind(cfg.stage) not in JUDGED and not cfg.examples:
        raise ValueError(f"no task has two held-out wordings in split {cfg.split!r}, so consistency cannot be measured. "
                         "Give --paraphrases FILE with at least eight wordings per task, or --no-evaluate.")
    if cfg.evaluate and tasks and kind(cfg.stage) in JUDGED and not any(data.split_instances(task, cfg.split) for task in tasks):
        raise ValueError(f"no instance of the {len(tasks)} tasks falls into split {cfg.split!r}. Give more, or --no-evaluate.")
    if tasks and not any(task.wordings.get("train") for task in tasks) and kind(cfg.stage) in ("sft-ia", *PREFERENCE):
        raise ValueError(f"no training wordings for any of the {len(tasks)} tasks. Give --paraphrases FILE.")
    return Run(cfg, model, tokenizer, template, tasks, Path(cfg.out))


def stage_config(cfg: TrainConfig, stage: str) -> TrainConfig:
    """This run's settings for an SFT stage on the way: its own steps, batch and learning rate, everything else as given."""
    batch_size = {**dataclasses.asdict(TrainConfig()), **STAGE_DEFAULTS[stage]}["batch_size"]
    steps, lr = (cfg.sft_steps, cfg.sft_lr) if kind(cfg.stage) in AFTER_SFT else (cfg.steps, cfg.lr)
    if stage == "reward":
        steps, lr = cfg.rm_steps, cfg.rm_lr
    return dataclasses.replace(cfg, stage=stage, out=str(Path(cfg.out) / stage), steps=steps, lr=lr, batch_size=batch_size)


def finished(folder: Path, cfg: TrainConfig) -> bool:
    """Whether `folder` holds what this very stage and these settings trained; a ValueError if it holds another run.

    Records that a stopped run collected count, too: they are never mixed with those of other settings.
    """
    done = (folder / "adapter_config.json").exists() or (folder / "model/config.json").exists()
    if not done and not any((folder / name).exists() for name in (*RECORDS, CHECKPOINTS)):
        return False
    old, ignore = read_json(folder / "config.json"), {"out", "device", "evaluate", "compare", "split", "micro_tokens", "checkpointing", "compile", "shard", "dry_run", "save_every"}
    ignore |= JudgeFlags.__annotations__.keys() - {"judge_url", "judge_model"}
    if folder != Path(cfg.out):
        ignore.add("init")
    if cfg.stage in ("sft", "sft-ia"):
        ignore |= {"max_new_tokens", "judge_url", "judge_model"}    # they sample nothing, and nobody judges
    for item in dataclasses.fields(TrainConfig):
        name, only = item.name, item.metadata["only"]
        read = (not only or kind(cfg.stage) in only) and name not in ignore and not name.startswith("eval_")
        if read and name in old and old[name] != getattr(cfg, name):
            raise ValueError(f"{folder} holds another run: {name} was {str(old[name])[:200]}, now {getattr(cfg, name)}. "
                             "Use another --out, or the old settings.")
    return done


def spread(model: torch.nn.Module, device: str) -> None:
    """Cut the weights into as many parts as there are ranks, block by block (FSDP2). Gradients are summed, as everywhere here."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.partition(":")[0], (ranks()[1],))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)        # gloo knows no sum with a factor
    register_fsdp_forward_method(model, "hidden")           # what steps call; embeddings and head stay whole from then to the end of the backward pass


def load_trained(cfg: TrainConfig, folder: Path | None, *, trainable: bool = False, shard: bool = False) -> torch.nn.Module:
    """The base (folder None), or what a finished stage left in its folder: an adapter, or with --full a whole model."""
    device, dtype = pick_device(cfg)
    full = folder and (folder / "model").is_dir()
    model = load_model(folder / "model" if full else cfg.model, dtype=dtype, device=device,
                       quantize="" if full else cfg.quantize.removeprefix("none"), shard=functools.partial(spread, device=device) if shard else None)
    if folder and not full:
        lora.load_adapter(model, folder, trainable=trainable)
    model.compiling = cfg.compile
    if folder and (folder / VALUE_HEAD).exists():
        load_head(model, folder / VALUE_HEAD)
    return model


def reward_folder(cfg: TrainConfig) -> Path:
    """Where ppo finds the reward model that it needs: under --init, or in its own run folder."""
    given = Path(cfg.init, "reward") if cfg.init else None
    return given if given and (given / VALUE_HEAD).exists() else Path(cfg.out, "reward")


def frozen(model: torch.nn.Module) -> torch.nn.Module:
    """The model as it is now, untouched by what training does to it."""
    copied = plain(model)
    return copy.deepcopy(copied).requires_grad_(False) if copied is model else copied


def adapter_config(cfg: TrainConfig) -> lora.LoraConfig:
    """What the adapter flags say."""
    config = lora.LoraConfig(rank=cfg.rank, alpha=cfg.alpha, dropout=cfg.dropout)
    return dataclasses.replace(config, targets=tuple(cfg.adapt)) if cfg.adapt else config


def plain(model: torch.nn.Module) -> torch.nn.Module:
    """For sampling and judging: adapters merged into a copy; the model itself where it has none or is quantised."""
    return lora.merge_lora(model) if lora.mergeable(model) else model.eval()


def trainable(cfg: TrainConfig, folder: Path | None, *, shard: bool = False) -> torch.nn.Module:
    """A model to train: all weights with --full, else an adapter, fresh or continued from a finished stage."""
    model = load_trained(cfg, folder, trainable=True, shard=shard)
    model.checkpointing = cfg.checkpointing
    if cfg.full:
        model.float()                                       # float32 masters; autocast makes the products cheap
    elif not folder:
        torch.manual_seed(cfg.seed)
        lora.apply_lora(model, adapter_config(cfg))
    return model


def gathered(run: Run) -> Run:
    """The run with its model whole on rank 0's CPU, in the type it is saved in, where its shards were trained."""
    if not run.cfg.shard or not run.cfg.full:
        return run
    state = on_cpu(dict(run.model.named_parameters()), pick_device(run.cfg)[1])
    with torch.device("meta"):
        model = Llama(run.model.config)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return dataclasses.replace(run, model=model)


def save_trained(run: Run) -> None:
    """The adapter into the run folder, or with --full the model into its folder `model`; beside it the value head.

    What tells that the stage is finished is written last; then its checkpoints go.
    """
    if hasattr(run.model, "value_head"):
        lora.write_file(run.folder / VALUE_HEAD, lambda part: safetensors.torch.save_file(run.model.value_head.cpu().state_dict(), part))
        del run.model.value_head
    if run.cfg.full:
        data.copy_tokenizer(run.tokenizer, run.cfg.model, run.folder / "model")
        save_model(run.model, run.folder / "model", dtype=pick_device(run.cfg)[1])
    else:
        lora.save_adapter(run.model, run.folder, run.cfg.model)
    shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)


def run_stage(run: Run, name: str) -> Path:
    """Train a stage unless its folder already holds it; returns the folder of its adapter."""
    stage, cfg = STAGES[name], run.cfg if name == run.cfg.stage else stage_config(run.cfg, name)
    folder = Path(cfg.out)
    places = [Path(run.cfg.init) / name, Path(run.cfg.init)] if run.cfg.init and cfg is not run.cfg else [folder]
    for place in places if name != "reward" else list(dict.fromkeys((places[0], folder))):     # no SFT stage: made where it is not found
        if finished(place, cfg):
            say(f"{name}: found in {place}.")
            if place == folder:
                shutil.rmtree(place / CHECKPOINTS, ignore_errors=True)      # of a process that was killed before it came to that
            return place
    before = run_stage(run, stage.needs) if stage.needs and run.tasks else None
    rounds = cfg.rounds if cfg is run.cfg else 1
    for number in range(rounds):                            # the last round's folder is the run's own
        place = folder / f"round{number + 1}" if number + 1 < rounds else folder
        if not finished(place, cfg):
            say(f"{name}: training in {place}.")
            first = trainable(cfg, before) if not cfg.shard or samples(stage, cfg) else None
            part = dataclasses.replace(run, cfg=cfg, folder=place, model=first, round=number, memory={})
            if stage.head:
                add_head(part.model)
            stopped = find_checkpoint(place)
            on_first_rank(prepare_folder, part, stopped)
            stage.collect(part)
            if cfg.shard:
                part.model = first = None                   # sampled with it whole
                part.model = trainable(cfg, before, shard=True)
            if stopped:
                stage.begin(part)                           # from the weights that the stage began with
            train(part, stage, [] if stopped and stage.refresh else stage.groups(part), place / "log.jsonl", stopped)
            on_first_rank(save_trained, gathered(part))
            stop_behind(cfg.stage)
        shutil.rmtree(place / CHECKPOINTS, ignore_errors=True)
        before = place
    return folder


def samples(stage: Stage, cfg: TrainConfig) -> bool:
    """Whether collecting needs the model: not where a file holds all that is trained on."""
    given = {collect_candidates: cfg.candidates, collect_judged: cfg.records}
    return stage.collect.__name__ != "<lambda>" and not given.get(stage.collect)


def prepare_folder(run: Run, stopped: Path | None) -> None:
    """Make the stage's folder, with its resolved settings in config.json and no log of a try that left no checkpoint."""
    run.folder.mkdir(parents=True, exist_ok=True)
    for name in GROWING if not stopped else ():
        (run.folder / name).unlink(missing_ok=True)
    for part in (run.folder / CHECKPOINTS).glob(".tmp-*"):  # of a process that was killed while it wrote
        shutil.rmtree(part)
    text = json.dumps(dataclasses.asdict(run.cfg), indent=1) + "\n"
    lora.write_file(run.folder / "config.json", lambda file: file.write_text(text))


def pretrain(cfg: TrainConfig) -> None:
    """A new model, or --model trained on, on --corpus; the finished checkpoint goes to --export in bfloat16."""
    with in_use(Path(cfg.out)):
        pretrain_here(cfg)


def pretrain_here(cfg: TrainConfig) -> None:
    """`pretrain`, once the run folder is ours."""
    device, _ = pick_device(cfg)
    tokenizer = data.Tokenizer(cfg.tokenizer, cfg.model)
    config = dataclasses.replace(PRESETS[cfg.preset], vocab_size=len(tokenizer), bos_id=tokenizer.bos_id,
                                 eos_ids=(tokenizer.eos_id,), prompt_template=cfg.template or "plain")
    model = load_model(cfg.model, device=device) if cfg.model else Llama(config).init_weights(cfg.seed).to(device)
    run = Run(cfg, model, tokenizer, data.find_template(config.prompt_template), [], Path(cfg.out))
    stopped = find_checkpoint(run.folder)
    if stopped:
        finished(run.folder, cfg)                           # refuses other settings
    on_first_rank(prepare_folder, run, stopped)
    say(f"pretrain: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters.")
    train(run, STAGES["pretrain"], corpus_groups(run), run.folder / "log.jsonl", stopped)
    on_first_rank(export, run)
    stop_behind("pretrain")


def export(run: Run) -> None:
    """The finished model and its tokenizer as a Hugging Face folder."""
    target = Path(run.cfg.export or run.folder / "model")
    save_model(run.model, target, dtype=torch.bfloat16)
    data.copy_tokenizer(run.tokenizer, "", target)
    shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
    say(f"pretrain: wrote {target}.")


def align(cfg: TrainConfig) -> None:
    """Train the stage and what it needs, evaluate all of them on the same held-out questions, and write the report."""
    run = make_run(cfg)
    stage, ladder = STAGES[cfg.stage], {}
    for number in range(cfg.rounds if kind(cfg.stage) in AFTER_SFT and not (cfg.records or cfg.candidates) else 0):
        unanswered(dataclasses.replace(run, round=number))  # every round has instances: known before anything is trained
    with in_use(Path(cfg.out)):
        for name in [*(stage.beside if cfg.compare and run.tasks else ()), *([stage.needs] if stage.needs and run.tasks else []), cfg.stage]:
            if kind(name) == "ppo" and cfg.fit_reward and cfg.judge != "reward":
                run_stage(run, "reward")
            folder = run_stage(run, name)
            rounds = cfg.rounds - 1 if name == cfg.stage else 0
            ladder |= {f"{stage.title}, round {k + 1}": folder / f"round{k + 1}" for k in range(rounds)} | {STAGES[name].title: folder}
        report(run, {"base": None, **ladder} if cfg.compare else {stage.title: ladder[stage.title]})


def report(run: Run, ladder: dict[str, Path | None]) -> None:
    """Evaluate {title: adapter folder} and write metrics.json, judge.json, report.md and plots. Ranks share the answering."""
    cfg = run.cfg
    judged = from_first_rank(lambda: measure_judge(run)) if STAGES[cfg.stage].collect is collect_candidates and not cfg.preferences else ""
    if not cfg.evaluate:
        return
    if cfg.preferences:
        return say(f"{cfg.stage}: no candidates with rewards, so nothing is compared. The reward model is in {cfg.out}.")
    if kind(cfg.stage) == "reward":
        return on_first_rank(report_rewards, run)
    if not run.tasks:
        return say(f"{cfg.stage}: no --tasks, so nothing is evaluated. The adapter is in {cfg.out}.")
    if kind(cfg.stage) in JUDGED:
        return report_judged(run, ladder)
    rows = data.questions(run.tasks, split=cfg.split, wordings=cfg.eval_wordings, per_task=cfg.eval_per_task)
    config = EvalConfig(template=cfg.template, max_new_tokens=cfg.max_new_tokens, max_len=cfg.max_len, batch_size=cfg.eval_batch)
    judge, results, tables = judging.RuleJudge(rouge_threshold=cfg.rouge_threshold), {}, {}
    say(f"evaluating on {len(rows)} held-out questions ({cfg.split}), {sum(len(r['wordings']) for r in rows)} answers per model.")
    for title, folder in ladder.items():
        model = plain(load_trained(cfg, folder))
        asked = dataclasses.replace(config, prefix=best_mark(run)) if title.startswith(STAGES["conditional"].title) else config
        answers = shared(rows, lambda part: evaluate_model(model, run.tokenizer, part, asked))
        if ranks()[0] == 0:
            results[title], tables[title] = evaluate_responses(answers, judge=judge)
    on_first_rank(finish_report, run, results, tables, judged)


def finish_report(run: Run, results: dict, tables: dict, judged: str) -> None:
    """Write what the evaluation found, and say it."""
    cfg = run.cfg
    write_report(cfg.out, results, tables)
    if kind(cfg.stage) == "ppo" and (Path(cfg.out) / "plots").is_dir():       # there with matplotlib
        plot_rollouts(data.read_records(run.folder / "rollouts.jsonl"), Path(cfg.out) / "plots" / "ppo.png")
    with open(Path(cfg.out) / "report.md", "a", encoding="utf-8") as written:
        written.write(judged)
    say(summary_table(results))
    say(f"report: {cfg.out}/report.md\nnext: {next_command(cfg)}")


def report_rewards(run: Run) -> None:
    """rewards.json: the reward model's rewards of all candidates against the judge's, against exact rules, and against length."""
    records = [c for group in grouped_candidates(run) for c in group if c["reward"] is not None]
    labels = {task.name: task.labels for task in run.tasks}
    scores = reward_scores(load_trained(run.cfg, run.folder), run.tokenizer, run.template, records, max_len=run.cfg.max_len,
                           max_tokens=run.cfg.micro_tokens)
    rule = judging.RuleJudge(rouge_threshold=run.cfg.rouge_threshold)
    truths = rule.judge([{**c, "labels": labels.get(c["task"])} for c in records])
    rows = [{"group": (c["task"], c["id"]), "held_out": held_out(c), "reward": score, "judge": c["reward"], "truth": truth.reward,
             "length": len(c["response"].split())} for c, score, truth in zip(records, scores, truths)]
    found = {name: reward_report([row for row in rows if row["held_out"] == held]) for name, held in (("held out", True), ("trained on", False))}
    (run.folder / "rewards.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, part in found.items():
        say(f"{name} questions: " + ", ".join(f"{key} {value:.3f}" for key, value in part.items() if isinstance(value, float)) + f" (n = {part['comparisons']})")
    say(f"rewards: {run.folder}/rewards.json")


def report_judged(run: Run, ladder: dict[str, Path | None]) -> None:
    """Error rates under the tasks' own instructions; for cut also what its mask flags, against the truly wrong tokens."""
    cfg = run.cfg
    rows = data.questions(run.tasks, split=cfg.split, wordings=0, per_task=cfg.eval_per_task)
    config = EvalConfig(template=cfg.template, max_new_tokens=cfg.max_new_tokens, max_len=cfg.max_len, batch_size=cfg.eval_batch)
    judge, results, tables = judging.RuleJudge(rouge_threshold=cfg.rouge_threshold), {}, {}
    for title, folder in ladder.items():
        model = plain(load_trained(cfg, folder))
        results[title], tables[title] = evaluate_errors(model, run.tokenizer, rows, config, judge=judge, seed=cfg.seed, share=shared)
    on_first_rank(finish_judged, run, ladder, results, tables)


def finish_judged(run: Run, ladder: dict[str, Path | None], results: dict, tables: dict) -> None:
    """Write what the evaluation of judged responses found, and say it."""
    cfg = run.cfg
    write_report(cfg.out, results, tables)
    if cfg.stage == "cut":
        measure_mask(run, {title: folder for title, folder in ladder.items() if folder})
    say("\n".join(f"{title:24s} errors: greedy {100 * found['error_rate']['mean']:5.1f} %, sampled {100 * found['sampled_error_rate']['mean']:5.1f} %"
                  for title, found in results.items()))
    say(f"report: {cfg.out}/report.md")
    if not cfg.full:
        more = "".join(f" --{name} {shlex.quote(getattr(cfg, name))}" for name in ("tokenizer", "template") if f" --{name} " in settings(cfg))
        say(f"next: python eval.py --model {cfg.model} --adapter {ladder['SFT']} {cfg.out}{more} --show-mask {cfg.records or cfg.out + '/judged.jsonl'}")


def measure_mask(run: Run, ladder: dict[str, Path]) -> None:
    """What CUT's mask flags in the records, before and after: into report.md and mask.json, with a plot where errors are known."""
    cfg, found, path = run.cfg, {}, Path(run.cfg.out)
    records = [r for r in data.load_judged(cfg.records or path / "judged.jsonl") if r["judgment"] not in (None, data.ERROR_JUDGMENT)][:400]
    for title, folder in ladder.items():
        lams = sorted({*MASK_LAMS, cfg.detect_lam})
        masks = cut_masks(plain(load_trained(cfg, folder)), run.tokenizer, run.template, records, lams=lams, floor=cfg.detect_floor,
                          satisfied=judging.PERFECT if cfg.positive == "text" else None, max_len=cfg.max_len)
        found[title] = mask_scores(masks)
        with open(path / "report.md", "a", encoding="utf-8") as report:
            report.write("\n\n" + mask_report(title, records, masks, run.tokenizer, cfg.detect_lam) + "\n")
    (path / "mask.json").write_text(json.dumps(found, indent=1) + "\n")
    if any(score["n"] for scores in found.values() for score in scores) and (path / "plots").is_dir():     # there with matplotlib
        plot_mask(found, path / "plots" / "mask.png")


def measure_judge(run: Run) -> str:
    """Write judge.json: the rewards that were trained on against the exact rules. Returns it as a section of the report."""
    labels, items, verdicts, truths = {task.name: task.labels for task in run.tasks}, [], [], []
    for record in (c for group in grouped_candidates(run) for c in group):
        items.append({**record, "labels": labels.get(record["task"])})
        verdicts.append(judging.Verdict(record.get("expected"), record.get("correct"), record["reward"], record["how"]))
    if any(verdict.how not in judging.VERDICTS for verdict in verdicts):
        return ""                                           # plain numbers: nothing to compare with verdicts
    truths = judging.RuleJudge(rouge_threshold=run.cfg.rouge_threshold).judge(items)
    found = judging.confusion(items, verdicts, truths)
    (run.folder / "judge.json").write_text(json.dumps(found, indent=1) + "\n")
    asked = found["asked"]
    if asked["n"]:
        parts = [f"{name} {100 * asked[name]['accuracy']:.0f} %" for name in ("type", "correct") if asked[name]["accuracy"] is not None]
        say(f"{run.cfg.judge} judge against exact rules, on {asked['n']} different answers that it was asked about: " + ", ".join(parts))
    return confusion_report(found, run.cfg.judge)


def summarise(cfg: TrainConfig, seconds: float) -> None:
    """Say and keep, in summary.json, what the run took: time, peak memory, tokens per second of its own stage."""
    memory, words = peak_memory(pick_device(cfg)[0])
    log = data.read_records(Path(cfg.out) / "log.jsonl")
    try:
        speed = round(log[-1]["tokens"] / max(1e-9, log[-1]["seconds"])) if log else None
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{Path(cfg.out) / 'log.jsonl'}, line {len(log)}, is no step of a run. Delete that line.") from None
    found = {"seconds": round(seconds, 1), "peak_memory_bytes": memory, "tokens_per_second": speed, "tokens": log[-1]["tokens"] if log else None}
    (Path(cfg.out) / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    say(f"done in {spoken(seconds)}; {words}" + (f"; {cfg.stage} trained at {speed:,} tok/s." if log else "."))


def next_command(cfg: TrainConfig) -> str:
    """What to try now, with every setting of this run that is not the default."""
    if cfg.stage in ("sft", "sft-ia"):
        inputs = "".join(f" --{name} {shlex.quote(getattr(cfg, name))}" for name in ("model", "tasks", "paraphrases", "tokenizer", "template")
                         if f" --{name} " in settings(cfg))
        return f"python train.py --stage cat{inputs} --out {cfg.out}-cat"
    if cfg.stage in ("ppo", "constitutional"):              # no candidates to share
        return f"python train.py --stage cat{settings(cfg)} --init {cfg.init or cfg.out} --out {cfg.out}-cat"
    records = cfg.candidates or f"{cfg.out}/candidates.jsonl"
    other = "--lam 0.1 --out {}-lam0.1" if cfg.stage == "cat" else "--out {}-cat"
    return f"python train.py --stage cat{settings(cfg)} --init {cfg.init or cfg.out} --candidates {records} {other.format(cfg.out)}"


def settings(cfg: TrainConfig) -> str:
    """The flags in which a run differs from its stage's defaults, as far as stage cat knows them."""
    usual, argv, words = dataclasses.asdict(parse_config(["--stage", cfg.stage])), ["--stage", cfg.stage], []
    for name in ("model", "tasks"):                         # other inputs have other defaults
        if getattr(cfg, name) and getattr(cfg, name) != usual[name]:
            argv += [f"--{name}", getattr(cfg, name)]
            words.append(f"--{name} {shlex.quote(getattr(cfg, name))}")
    usual = dataclasses.asdict(parse_config(argv))
    if cfg.template:                                        # where it was left out, `make_run` has filled it in
        usual["template"] = read_config(cfg.model).prompt_template or "alpaca"
    for item in dataclasses.fields(TrainConfig):
        value, name, only = getattr(cfg, item.name), item.name.replace("_", "-"), item.metadata["only"]
        if value != usual[item.name] and (not only or "cat" in only) and item.name not in ("out", "init", "candidates", "records", "lam"):
            words.append(f"--{name}" if value is True else f"--no-{name}" if value is False
                         else f"--{name} {' '.join(map(shlex.quote, value if isinstance(value, list) else [str(value)]))}")
    return "".join(f" {word}" for word in words)


class Stopped(BaseException):
    """SIGTERM or Ctrl-C (`number`), heard where stopping loses nothing; `where` says what was saved for it."""

    def __init__(self, number: int, where: str = ""):
        super().__init__(number, where)
        self.number, self.where = number, where


HEARD = {"signal": 0, "wait": False}                        # the signal that asked to stop; whether a step is under way, which is waited for


@contextlib.contextmanager
def stoppable():
    """The first SIGTERM or Ctrl-C stops the run behind the step or the chunk that is under way, a second one at once."""
    def hear(number, frame):
        again, HEARD["signal"] = HEARD["signal"], number
        if again or not HEARD["wait"]:
            raise Stopped(number)

    HEARD.update(signal=0, wait=False)
    main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)} if main_thread else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop() -> int:
    """The signal that some rank heard while it waited, or 0."""
    return int(max(exchanged([HEARD["signal"]])))


def stop_behind(stage: str) -> None:
    """A signal that came while a stage ended stops the run now that its result is saved; from here on signals stop at once."""
    HEARD["wait"] = False
    stop = asked_to_stop()
    if stop:
        raise Stopped(stop, f" behind {stage}, which is finished")


def join(cfg: TrainConfig) -> None:
    """Under torchrun: meet the other processes."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if cfg.batch_size < size:
        raise ValueError(f"--batch-size {cfg.batch_size} is less than the {size} processes. Raise it.")
    if cfg.shard and size == 1:
        raise ValueError("--shard cuts the weights between processes, and this is the only one. Start it with torchrun, or leave out --shard.")
    if size > 1 and not dist.is_initialized():
        gpu = pick_device(cfg)[0].startswith("cuda")
        if gpu:
            torch.cuda.set_device(pick_device(cfg)[0])
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=datetime.timedelta(hours=12))   # rank 0 asks a server alone


def told(error: BaseException) -> int | None:
    """Say what stopped the run, in one line for all its processes; returns the exit status, or None for what is a fault of the program."""
    if isinstance(error, Stopped) or HEARD["signal"] and not HEARD["wait"]:     # what a library makes of Stopped has other names
        complain(f"stopped by {signal.Signals(HEARD['signal'] or error.number).name}{getattr(error, 'where', '')}. The same command goes on from there.")
        return 128 + (HEARD["signal"] or error.number)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        complain(f"{place}{error.strerror or error}. What was finished is kept; give another --out, or make room, and run the same command again.")
    elif isinstance(error, ValueError):
        return complain(str(error))
    elif out_of_memory(error):
        complain(f"{out_of_memory(error)} Lower --micro-tokens or --eval-batch, or add --checkpointing; what was finished is kept.")
    elif isinstance(error, (judging.JudgeStopped, FloatingPointError)):
        complain(str(error))
    elif ranks()[1] > 1 and any(word in str(error).lower() for word in ("connection", "socket", "peer")):     # gloo's words
        complain("another process of this job ended before its work was done. What was finished is kept; run the same command again.")
    else:
        return None
    return 1


def main(argv=None) -> int:
    """Run a stage. Returns 0, or 2 for a mistake in what was given, 1 for a run that failed, 143 or 130 for one that was told to stop."""
    cfg, started = parse_config(argv), time.time()
    try:
        with stoppable():
            join(cfg)
            (dry_run if cfg.dry_run else pretrain if cfg.stage == "pretrain" else align)(cfg)
            if not cfg.dry_run:
                on_first_rank(summarise, cfg, time.time() - started)
            if dist.is_initialized():
                dist.barrier()                              # nobody hangs up while another still listens
    except (Stopped, ValueError, RuntimeError, FloatingPointError, OSError, MemoryError) as error:
        status = told(error)
        if status is None:
            raise
        return status
    finally:
        judging.RUN.close(say)
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:                                # threads of gloo that outlive their group can abort a process that ends in the usual way
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
