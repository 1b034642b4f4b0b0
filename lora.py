"""Low-rank adapters over any linear layer: inject, disable, merge, save, load.

Hu et al. 2021, arXiv 2106.09685, Section 4.1:

    h = W x + (alpha / r) * B A x          A is random and B = 0 at the start

W stays frozen. A and B are float32 whatever the type of W and are cast to that of x, so a bfloat16
model keeps its speed while the optimizer sees float32. Shapes: in, out features; R rank; N rows.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Module

LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # a weight's name in PEFT: PREFIX + module + ".lora_A.weight"


@dataclass
class LoraConfig:
    """What to adapt, and how strongly: the update is scaled by alpha / rank."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # on the adapter's input, while training
    targets: Sequence[str] = LLAMA_TARGETS  # linears, by the end of their names


class LoRALinear(Module):
    """A frozen linear layer, plain or quantised, and its update: (..., in) -> (..., out)."""

    def __init__(self, base: Module, config: LoraConfig):
        super().__init__()
        self.base, self.config, self.enabled = base.requires_grad_(False), config, True
        device = next(iter([*base.parameters(), *base.buffers()])).device
        A = torch.empty(config.rank, base.in_features, dtype=torch.float32, device=device)
        B = torch.zeros(base.out_features, config.rank, dtype=torch.float32, device=device)
        nn.init.kaiming_uniform_(A, a=5**0.5)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (..., in) -> (N, in)
        out = self.base(rows)  # (N, out)
        if self.enabled:
            rows = F.dropout(rows, self.config.dropout, self.training)
            low = F.linear(rows, self.lora_A.to(rows.dtype)).to(out.dtype)  # (N, R)
            scale = self.config.alpha / self.config.rank
            # out + scale * low B^T, added in place so that no second copy of `out` is made
            out = out.addmm_(low, self.lora_B.to(out.dtype).T, alpha=scale)
        return out.view(*x.shape[:-1], out.shape[-1])

    def merged(self) -> nn.Linear:
        """The base, its weight overwritten by W + (alpha / r) B A, summed in float32."""
        if not isinstance(self.base, nn.Linear):
            raise ValueError("the base is quantised, and merging would round the update away; load "
                             "the model in full precision, and merge the adapter into that.")
        scale, weight = self.config.alpha / self.config.rank, self.base.weight  # (out, in)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            A, B = self.lora_A.float(), self.lora_B.float()
            weight.copy_(torch.addmm(weight.float(), B, A, alpha=scale))
        return self.base


def lora_modules(model: Module) -> dict[str, LoRALinear]:
    """The adapted linears, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}


def adapter_weights(model: Module) -> dict[str, nn.Parameter]:
    """A (R, in) and B (out, R) of each adapted linear, by the names that PEFT gives them."""
    found = {}
    for name, module in lora_modules(model).items():
        found[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A
        found[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B
    return found


def apply_lora(model: Module, config: LoraConfig) -> Module:
    """Adapt each linear whose name ends in a target, in place; freeze all else. Returns the model.

    Raises ValueError if the model has adapters already, or for a target that names no linear, or
    one that shares its weight with the embedding (an adapter would be merged into both).
    """
    if lora_modules(model):
        raise ValueError("the model already has LoRA adapters; merge them first.")
    linears = {}
    shared = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    for name, part in model.named_modules():
        if hasattr(part, "in_features") and id(getattr(part, "weight", None)) not in shared:
            linears[name] = part
    for target in config.targets:
        if not any(matches(name, (target,)) for name in linears):
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise ValueError(f'LoRA target "{target}" names no linear layer of the model with a '
                             f"weight of its own; there are: {ends or 'none'}.")
    model.requires_grad_(False)
    for name, module in linears.items():
        if matches(name, config.targets):
            # in the mode of what it replaces: no dropout in a model that is in eval mode
            model.set_submodule(name, LoRALinear(module, config).train(module.training))
    return model


def matches(name: str, targets: Sequence[str]) -> bool:
    """Whether a target names a linear: its whole name, or its end at a dot."""
    return any(name == target or name.endswith("." + target) for target in targets)


@contextmanager
def disabled(model: Module) -> Iterator[None]:
    """Inside, the model is its base. Nests, and restores on errors."""
    enabled = [module for module in lora_modules(model).values() if module.enabled]
    try:
        for module in enabled:
            module.enabled = False
        yield
    finally:
        for module in enabled:
            module.enabled = True


def merge_lora(model: Module, *, in_place: bool = False) -> Module:
    """Fold the adapters into plain linears, in a copy or in place. Returns the merged model.

    Raises ValueError over a quantised base.
    """
    merged = model if in_place else copy.deepcopy(model)
    for name, module in lora_modules(merged).items():
        merged.set_submodule(name, module.merged())
    return merged


def save_adapter(model: Module, path, base_model: str = "") -> None:
    """Write adapter_model.safetensors (float32) and adapter_config.json, as PEFT reads them.

    Raises ValueError if the model has no adapters.
    """
    weights, folder = adapter_weights(model), Path(path)
    if not weights:
        raise ValueError(f"nothing to save to {path}: the model has no LoRA adapters.")
    config = next(iter(lora_modules(model).values())).config
    raw = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
           "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
           "target_modules": list(config.targets), "bias": "none", "fan_in_fan_out": False,
           "use_rslora": False, "modules_to_save": None, "inference_mode": True}
    tensors = {name: x.detach().float().cpu().contiguous() for name, x in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(raw, indent=2) + "\n")


def load_adapter(model: Module, path, trainable=False):
    """Adapt the model, in place, as a folder of `save_adapter` says. Returns the model."""
    folder = Path(path)
    raw = json.loads((folder / "adapter_config.json").read_text())
    if any(map(raw.get, ("use_rslora", "rank_pattern", "alpha_pattern"))):
        raise ValueError(f"{path} is no plain LoRA adapter; reading it takes extras/formats.")
    config = LoraConfig(raw["r"], raw["lora_alpha"], raw["lora_dropout"], raw["target_modules"])
    return attach_adapter(model, config, load_file(folder / "adapter_model.safetensors"), trainable)


def attach_adapter(model: Module, config: LoraConfig, tensors: dict, trainable=False) -> Module:
    """Adapt the model, in place, with these weights. Raises ValueError unless all of them fit."""
    weights = adapter_weights(apply_lora(model, config))
    for name in sorted(weights.keys() | tensors.keys()):
        weight, given = weights.get(name), tensors.get(name)
        if weight is None or given is None or weight.shape != given.shape:
            raise ValueError(f"the adapter was made for another model: {name} does not fit.")
        weight.data.copy_(given)
        weight.requires_grad_(trainable)
    return model
