"""The same results, sooner: `accelerate(model)` changes a model of the course in place."""

from extras.fast import llama
from extras.fast.attention import put
from extras.fast.check import check_once
from extras.fast.cpu import prepacked
from extras.fast.llama import FastLlama

__all__ = ["FastLlama", "accelerate", "check_once", "prepacked", "put"]


def accelerate(model, *, checkpointing: bool = False) -> FastLlama:
    """Make a model faster, in place, once the fast code has been checked on its device."""
    weight = model.model.embed_tokens.weight
    if weight.device.type != "meta":
        check_once(weight.device, weight.dtype)
    return llama.accelerate(model, checkpointing=checkpointing)
