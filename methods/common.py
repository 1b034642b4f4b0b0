"""The flags that every stage reads, and those of every stage that tunes a model on tasks.

What is `rare` is named in the last paragraph of --help only. `Flags` and all names below it are
what a method gets that does not define them itself.
"""

from dataclasses import dataclass
from typing import Literal

from methods.flags import flag, rare


@dataclass
class CommonFlags:
    """What every stage reads."""

    stage: str = flag("cat", "what to train: a name of methods/, or the path of a file like those")
    model: str = flag("", "Hugging Face folder of the base model (default: the demo's)", path=True)
    out: str = flag("", "run folder (default: runs/STAGE)", folder=True)
    steps: int = flag(200, "optimiser steps", at_least=1)
    epochs: float = rare(0.0, "passes over the data, instead of --steps", below=10**6)
    batch_size: int = flag(24, "items per step", at_least=1)
    lr: float = flag(2e-4, "peak learning rate", above=0)
    max_len: int = rare(512, "longest document in tokens", at_least=1)
    seed: int = flag(0, "seeds examples, order, adapters and sampling")
    plain: bool = flag(False, "run the course's own code, without extras/")
    # The optimiser.
    warmup_ratio: float = rare(0.05, "share of the steps that warm up", below=1)
    min_lr_ratio: float = rare(0.1, "final rate as a share of the peak", below=1)
    weight_decay: float = rare(0.0, "of AdamW")
    clip: float = rare(1.0, "largest gradient norm", above=0)
    full: bool = rare(False, "train all weights instead of an adapter")
    validation: float = rare(0.0, "share of the items to hold out and measure the loss on", below=1)
    # The model's texts.
    template: str = rare("", "prompt template (default: the checkpoint's own, else alpaca)")
    tokenizer: str = rare("", "tokenizer file, if the model has none", path=True)
    # The machine. These change no result, but for dtype.
    device: str = rare("auto", "cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = rare("auto", "of the base weights")
    micro_tokens: int = rare(8192, "most tokens per forward pass; changes no result", at_least=1)
    save_every: int = rare(50, "steps between checkpoints, 0: none", at_least=0, extras=True)
    checkpointing: bool = rare(False, "recompute blocks in the backward pass", extras=True)


@dataclass
class Flags:
    """What every method reads that tunes a model on tasks."""

    # The data.
    tasks: str = flag("", "task file or folder; by default the demo's", path=True)
    paraphrases: str = flag("", "JSON file of wordings per task", path=True)
    per_task: int = flag(100, "training instances per task", at_least=1)
    judge_share: float = rare(0.0, "share of examples that teach judging", below=1)
    rouge_threshold: float = rare(0.7, "ROUGE-L from which rules accept an answer", share=True)
    max_new_tokens: int = flag(128, "longest response in tokens", at_least=1)
    # The evaluation at the end.
    evaluate: bool = flag(True, "answer held-out questions before and after")
    split: Literal["dev", "test"] = flag("dev", "held-out inputs and wordings to report on")
    eval_per_task: int = flag(16, "held-out instances per task", at_least=1)
    eval_wordings: int = rare(8, "held-out wordings per task", at_least=2)
    eval_batch: int = rare(128, "responses generated side by side", at_least=1)
    # The adapter, and what it lies over.
    rank: int = rare(16, "rank of the adapter", at_least=1)
    alpha: float = rare(32.0, "scale of the adapter: alpha / rank", above=0)
    dropout: float = rare(0.0, "dropout of the adapter", below=1)
    adapt: list[str] = rare([], "linears to adapt, by the end of their names")
    quantize: Literal["none", "int8", "nf4"] = rare("none", "base in 8 or 4 bits", extras=True)
    shard: bool = rare(False, "spread the weights over the processes (FSDP2)", extras=True)


DEFAULTS = {}
title = "tuned"
kind, needs, beside, unread, METRICS = "", "", (), (), {}


def check(cfg) -> None:
    """Raise ValueError for flags that do not fit together."""


def also_needs(cfg) -> dict:
    """{stage: settings} of more stages that come first."""
    return {}


def inspect(run) -> None:
    """Raise ValueError for inputs that the method cannot use, before anything is trained."""


def attach(run) -> None:
    """Add modules of the method's own to the model."""


def collect(run) -> None:
    """Write the records that `items` reads."""


def begin(run) -> None:
    """Prepare what lasts for the whole stage, before the first step."""


def phase(cfg) -> int:
    """Steps after which `items` is called anew; 0: never."""
    return 0


def remark(run, results) -> str:
    """A line below the table; results: {title: metrics}."""
    return ""


def prefix(run) -> str:
    """Words before every instruction, for a model that was trained to react to them."""
    return ""
