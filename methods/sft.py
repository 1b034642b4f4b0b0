"""Supervised fine-tuning (SFT): likelihood of reference outputs.

    L = -sum_t log p(y_t | instruction, input, y_<t) / number of tokens      arXiv 2203.02155

Each training instance is asked with its task's original instruction. With --examples the model
learns from Alpaca's rows or from conversations instead of tasks; with --train-on last, of each
conversation the last answer.
"""

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

    examples: str = flag("", "Alpaca, messages or prompts to learn instead of tasks", path=True)
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
    if cfg.examples and not extra("formats", cfg.plain):
        raise ValueError("--examples is read by extras/formats. Leave out --plain.")


def items(run) -> list[dict]:
    """One document per instruction example."""
    if run.cfg.examples:
        return extra("formats", run.cfg.plain).example_items(run)
    return instruction_items(run, wordings=0, augment="assign")
