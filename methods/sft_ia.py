"""Instruction-augmented fine-tuning, SFT(IA): the first stage of consistency alignment.

Fine-tune on (wording, input, output), where every wording of a task's instruction keeps inputs and
outputs unchanged   (arXiv 2403.14221). The loss is that of SFT.
"""

from dataclasses import dataclass
from typing import Literal

from methods import common, token_step
from methods.examples import instruction_items
from methods.flags import flag

title = "SFT(IA)"
kind = "sft"
beside = ("sft",)


@dataclass
class Flags(common.Flags):
    """What stage sft-ia reads beside the common flags."""

    compare: bool = flag(True, "also train and show SFT, without other wordings")
    wordings: int = flag(10, "training wordings per task beside the instruction", at_least=0)
    augment: Literal["assign", "product"] = flag("assign", "one wording per instance, or all")


TERMS = {"ce": "tokens"}
step = token_step


def items(run) -> list[dict]:
    """One document per instance and wording."""
    return instruction_items(run, wordings=run.cfg.wordings, augment=run.cfg.augment)
