"""Supervised fine-tuning (SFT): likelihood of reference outputs.

    L = -sum_t log p(y_t | instruction, input, y_<t) / number of tokens      arXiv 2203.02155

Each training instance is asked with its task's original instruction. With --examples the model
learns from Alpaca's rows or from conversations instead of tasks; with --train-on last, of each
conversation the last answer. Several files are mixed, as TÜLU's are (arXiv 2306.04751); with
--mix 2 1 a pass has twice as many examples of the first, and those of the rarer file are repeated.
"""

import re
from dataclasses import dataclass
from typing import Literal

from eval import extra
from methods import common, token_step
from methods.examples import instruction_items
from methods.flags import flag

title = "SFT"
kind = "sft"


@dataclass
class Flags(common.Flags):
    """What stage sft reads beside the common flags."""

    examples: list[str] = flag([], "Alpaca, messages or prompts to learn instead of tasks",
                               path=True)
    mix: list[str] = flag([], "weights of the files of --examples, such as 2 1")
    train_on: Literal["all", "last"] = flag("all", "answers of a conversation that are learnt")


TERMS = {"ce": "tokens"}
step = token_step


def check(cfg) -> None:
    """Raises ValueError for flags that do not fit together."""
    if cfg.train_on == "last" and not cfg.examples:
        raise ValueError("--train-on last is about conversations. Add --examples FILE, or leave it "
                         "out.")
    if cfg.examples and cfg.judge_share:
        raise ValueError(f"--judge-share {cfg.judge_share} takes --tasks, not --examples. Leave "
                         "one of them out.")
    if cfg.mix and (len(cfg.mix) < 2 or len(cfg.mix) != len(cfg.examples)):
        raise ValueError(f"--mix has {len(cfg.mix)} weights, and --examples {len(cfg.examples)} "
                         "files. Give two files or more, and a weight for each.")
    for weight in cfg.mix:
        if not re.fullmatch(r"\d+(\.\d+)?", weight) or not float(weight):
            raise ValueError(f"--mix has a weight {weight!r}. Expected numbers above 0.")
    if cfg.examples and not extra("formats", cfg.plain):
        raise ValueError("--examples is read by extras/formats. Leave out --plain.")


def items(run) -> list[dict]:
    """One document per instruction example."""
    if run.cfg.examples:
        return extra("formats", run.cfg.plain).example_items(run)
    return instruction_items(run, wordings=0, augment="assign")
