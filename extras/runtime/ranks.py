"""Many processes that train as one: all call these functions, in the same order."""

import contextlib
import datetime
import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import astuple, is_dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lora
from eval import Completion, pick_device
from extras.fast import accelerate
from model import Llama

# What travels is JSON. How a value is made of its parts, by its type; others are JSON's own.
MAKERS = {"list": list, "tuple": tuple, "dict": lambda parts: dict(zip(*parts, strict=True)),
          "Completion": lambda parts: Completion(*parts)}


def join(cfg, method) -> int:
    """Meet the others of torchrun: how many. Raises ValueError for flags that do not fit."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        if pick_device(cfg)[0] != "cpu":
            torch.cuda.set_device(pick_device(cfg)[0])
        dist.init_process_group(timeout=datetime.timedelta(hours=12))  # servers may be slow
        gather([])  # all have met before one of them may fail and leave
    if cfg.batch_size < size:
        raise ValueError(f"--batch-size {cfg.batch_size} is less than {size} processes. Raise it.")
    alone = size == 1 or getattr(cfg, "quantize", "none") != "none" or hasattr(method, "detach")
    if alone and getattr(cfg, "shard", False):
        raise ValueError("--shard spreads weights over the processes of torchrun. It needs several"
                         ", no --quantize, and a stage without a head. Give --no-shard.")
    return size


def encode(value):
    """A value in JSON's own types, of which `decode` makes the same again: tuples stay tuples."""
    name = type(value).__name__
    if name == "dict":
        value = [list(value), list(value.values())]
    elif is_dataclass(value):
        value = astuple(value)
    return [name, *map(encode, value)] if isinstance(value, (list, tuple)) else value


def decode(value):
    """What `encode` was given."""
    return MAKERS[value[0]](map(decode, value[1:])) if isinstance(value, list) else value


def gather(own: list) -> list:
    """The values of all processes in one list, in the order of ranks."""
    if not dist.is_initialized():
        return own
    text = json.dumps(encode(own)).encode()
    room = torch.tensor(len(text))
    dist.all_reduce(room, dist.ReduceOp.MAX)
    padded = bytearray(text.ljust(int(room)))
    blobs = [torch.empty(len(padded), dtype=torch.uint8) for _ in range(dist.get_world_size())]
    dist.all_gather(blobs, torch.frombuffer(padded, dtype=torch.uint8))
    return [value for blob in blobs for value in decode(json.loads(blob.numpy().tobytes()))]


def act_first(action: Callable, rank: int):
    """What action() gives on the first process, for all; if it fails, all stop, and it says why."""
    try:
        result, error = [action()] if rank == 0 else [], None
    except Exception as problem:
        result, error = [], problem
    result = gather(result)
    if error:
        raise error
    if not result:  # torchrun ends all with the first that ends: let rank 0 speak and leave
        with contextlib.suppress(RuntimeError):
            gather([])
        sys.exit(1)
    return result[0]


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum gradients over all processes; one that no process has stays None."""
    used = torch.tensor([float(p.grad is not None) for p in parameters])
    dist.all_reduce(used)
    for p, n in zip(parameters, used.tolist(), strict=True):
        if n:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)


def spread(model: Llama) -> None:
    """Spread every weight over the processes (FSDP2), in place; gradients are summed.

    A block is gathered while it computes, embeddings and head until the end of the backward pass.
    Adapters come later and stay whole.
    """
    # torch's modules for this take half a second, and few runs need them
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    accelerate(model)
    for part in (*model.model.layers, model):
        fully_shard(part)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no sum with a factor
    register_fsdp_forward_method(model, "hidden")  # what steps call
    model.gather_copy = functools.partial(gather_copy, model)


def is_spread(x: Tensor) -> bool:
    """Whether this process has a part of x only (a DTensor)."""
    return hasattr(x, "full_tensor")


def gather_copy(model: Llama) -> Llama:
    """For sampling: a copy with all of its weights in each process, its adapters merged."""
    state = {}
    for name, x in model.named_parameters():
        if "lora_" not in name:
            state[name.replace(".base.", ".")] = x.detach().full_tensor()
    found = make_whole(model.config, state)
    found.requires_grad_(False)
    for name, module in lora.lora_modules(model).items():
        weight, scale = found.get_submodule(name).weight, module.config.alpha / module.config.rank
        B, A = module.lora_B.detach().float(), module.lora_A.detach().float()
        weight.copy_(torch.addmm(weight.float(), B, A, alpha=scale))  # as LoRALinear.merged
    return accelerate(found)


def make_whole(config, state: dict[str, Tensor]) -> Llama:
    """A model of these weights, or without weights."""
    with torch.device("meta"):
        found = Llama(config)
    found.load_state_dict(state, strict=False, assign=True)
    if config.tie_embeddings:
        found.lm_head.weight = found.model.embed_tokens.weight
    return found


def gather_tensors(tensors: dict[str, Tensor], rank: int, dtype=None) -> dict[str, Tensor]:
    """All of each tensor in the first process's main memory; {} in the others."""
    found = {}
    for name, x in tensors.items():
        x = x.detach().full_tensor() if is_spread(x) else x.detach()
        if rank == 0:
            found[name] = x.to("cpu", dtype).contiguous()
    return found


def gather_model(model: Llama, rank: int, dtype) -> Llama:
    """The whole model on the first process's CPU; in the others it has no weights."""
    return make_whole(model.config, gather_tensors(dict(model.named_parameters()), rank, dtype))


def place_like(x: Tensor, other: Tensor) -> Tensor:
    """x on the device of `other`, and in the same shards."""
    x = x.to(other.device)
    if not is_spread(other):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, other.device_mesh, other.placements, src_data_rank=None)
