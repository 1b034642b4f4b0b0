"""Low-rank adapters over any linear layer: inject, disable, merge, save and load in PEFT's format.

Hu et al. 2021 (arXiv 2106.09685), Section 4.1:   h = W x + (alpha / r) * B A x,   A random, B = 0 at the start.
W stays frozen; A and B are float32 whatever the type of W, and are cast to x's type in the forward pass (never x to
float32), so a bfloat16 model keeps its speed while the optimizer sees float32 masters.

A linear layer is an `nn.Linear`, or a frozen one of another make, such as a quantised one, that has in_features,
out_features and dequantize(dtype) -> (out, in). Adapters train over both and merge into the first only.

Shapes: in/out features of the Linear, R rank.

    apply_lora(model, LoraConfig(rank=16))
    with disabled(model): ...                       # the reference model
    save_adapter(model, "runs/x"); load_adapter(fresh_model, "runs/x"); merged = merge_lora(model)
"""
import copy
import errno
import itertools
import json
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PREFIX = "base_model.model."                        # PEFT's keys: PREFIX + module + ".lora_A.weight"
# PEFT options that change what an adapter computes; an adapter that uses one is refused, never half understood.
UNSUPPORTED = ("use_dora", "modules_to_save", "layer_replication", "target_parameters", "megatron_config",
               "rank_pattern", "alpha_pattern", "alora_invocation_tokens", "fan_in_fan_out", "lora_bias", "use_qalora",
               "exclude_modules", "layers_to_transform", "layers_pattern", "trainable_token_indices", "arrow_config",
               "use_bdlora")
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")       # the others (pissa, olora, ...) alter W


@dataclass
class LoraConfig:
    """What to adapt, and how strongly: the update is scaled by alpha / rank."""

    rank: int = field(default=16, metadata={"help": "rank of the update"})
    alpha: float = field(default=32.0, metadata={"help": "strength; the update is scaled by alpha / rank"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input, while training"})
    targets: tuple[str, ...] = field(default=LLAMA_TARGETS, metadata={"help": "name suffixes of the linears to adapt"})

    def __post_init__(self):
        if type(self.rank) is not int or not 1 <= self.rank <= 2**14:
            raise ValueError(f"LoRA rank is {self.rank!r:.40}; expected an integer of at least 1.")
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha <= 1e6:
            raise ValueError(f"LoRA alpha is {self.alpha!r:.40}; expected a positive number, such as twice the rank.")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout is {self.dropout!r:.40}; expected a number in [0, 1).")


class LoRALinear(nn.Module):
    """A frozen linear layer and its update. (..., in) -> (..., out), in the type of x."""

    def __init__(self, base: nn.Module, config: LoraConfig):
        super().__init__()
        self.base, self.config, self.enabled = base.requires_grad_(False), config, True
        device = next(itertools.chain(base.parameters(), base.buffers())).device
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])                                                # (N, in)
        out = self.base(rows)                                                            # (N, out)
        if self.enabled:
            if self.config.dropout > 0:
                rows = F.dropout(rows, self.config.dropout, self.training)
            low = F.linear(rows, self.lora_A.to(rows.dtype)).to(out.dtype)               # (N, R)
            out = out.addmm_(low, self.lora_B.to(out.dtype).T, alpha=self.config.alpha / self.config.rank)         # in place: no second copy
        return out.view(*x.shape[:-1], out.shape[-1])

    def merged(self) -> nn.Linear:
        """The base, its weight now W + (alpha / r) B A: summed in float32, rounded once to the base's type."""
        if not isinstance(self.base, nn.Linear):
            raise ValueError("the base is quantised, and merging would round the update away; load the model in full "
                             "precision, and merge the adapter into that.")
        scale, weight = self.config.alpha / self.config.rank, self.base.weight           # (out, in)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            weight.copy_(torch.addmm(weight.float(), self.lora_B.float(), self.lora_A.float(), alpha=scale))
        return self.base


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted linears, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A (R, in) and B (out, R) of each adapted linear: what an optimizer should train."""
    return [weight for module in lora_modules(model).values() for weight in (module.lora_A, module.lora_B)]


def apply_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Adapt, in place, each Linear whose name ends in a target; freeze all else. Returns the model.

    Raises:
        ValueError: the model has adapters already, or a target names no Linear, or one that shares its weight.
    """
    linears = plain_linears(model)
    for target in config.targets:
        if not any(matches(name, [target]) for name in linears):
            raise ValueError(f'LoRA target "{target}" names no linear layer of the model; there are: '
                             f"{', '.join(sorted({name.rpartition('.')[2] for name in linears})) or 'none'}.")
    embedded = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    if any(module.weight is weight for name, module in linears.items() if isinstance(module, nn.Linear) and matches(name, config.targets) for weight in embedded):
        raise ValueError("this model's lm_head is its embedding, and an adapter on the one would be merged into both. Adapt other linears.")
    model.requires_grad_(False)
    for name, module in linears.items():
        if matches(name, config.targets):
            replace(model, name, LoRALinear(module, config))
    return model


def plain_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model without adapters, by name. Raises ValueError if it has some."""
    if lora_modules(model):
        raise ValueError("the model already has LoRA adapters; merge them first (merge_lora), or start from the base.")
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) or hasattr(module, "dequantize")}


def matches(name: str, targets) -> bool:
    """PEFT's rule: a list holds suffixes at a dot, a string is a regular expression for the whole name."""
    if targets == "all-linear":
        return name.rpartition(".")[2] != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base. Nests, and restores on errors."""
    before = [(module, module.enabled) for module in lora_modules(model).values()]
    try:
        for module, _ in before:
            module.enabled = False
        yield
    finally:
        for module, enabled in before:
            module.enabled = enabled


def mergeable(model: nn.Module) -> bool:
    """Whether there are adapters, and all of them lie over weights in full precision."""
    modules = lora_modules(model).values()
    return bool(modules) and all(isinstance(module.base, nn.Linear) for module in modules)


def merge_lora(model: nn.Module, *, in_place: bool = False) -> nn.Module:
    """A deep copy whose adapters are folded into plain linears; the model itself is left as it is, unless `in_place`.

    Raises:
        ValueError: the base is quantised.
    """
    merged = model if in_place else copy.deepcopy(model)
    for name, module in lora_modules(merged).items():
        replace(merged, name, module.merged())
    return merged


def save_adapter(model: nn.Module, path: str | os.PathLike, base_model: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors (float32), as PEFT reads them.

    Raises:
        ValueError: the model has no adapters.
    """
    modules = lora_modules(model)
    if not modules:
        raise ValueError(f"nothing to save to {path}: the model has no LoRA adapters.")
    config = next(iter(modules.values())).config
    raw = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": config.rank,
           "lora_alpha": config.alpha, "lora_dropout": config.dropout, "target_modules": list(config.targets),
           "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "modules_to_save": None,
           "inference_mode": True}
    tensors = {}
    for name, module in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A.detach().float().cpu().contiguous()     # (R, in)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B.detach().float().cpu().contiguous()     # (out, R)
    Path(path).mkdir(parents=True, exist_ok=True)
    write_file(Path(path, "adapter_model.safetensors"), lambda file: save_file(tensors, file, {"format": "pt"}))
    write_file(Path(path, "adapter_config.json"), lambda file: file.write_text(json.dumps(raw, indent=2) + "\n"))


def write_file(target: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target, sync, rename: a reader sees the old file or the new one, whole."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode                                   # as the umask has it; safetensors is stricter
        write(part)
        part.chmod(mode)
        with open(part, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(part, target)
    except (OSError, SafetensorError) as error:                      # no room, most often: say where
        code = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number or errno.EIO), str(target)) from None
    finally:
        part.unlink(missing_ok=True)


def load_adapter(model: nn.Module, path: str | os.PathLike, trainable: bool = False) -> nn.Module:
    """Adapt the model, in place, as an adapter folder in PEFT's format says. Returns the model.

    Everything is checked before the model is touched; nothing is ever skipped in silence.

    Raises:
        ValueError: not a plain LoRA adapter, damaged, or made for another model.
    """
    config, targets, base_model = read_adapter_config(Path(path))
    tensors = read_adapter_weights(Path(path))
    linears = plain_linears(model)
    names = [name for name in linears if matches(name, targets)]
    expected = {f"{PREFIX}{name}.lora_A.weight": (config.rank, linears[name].in_features) for name in names}
    expected |= {f"{PREFIX}{name}.lora_B.weight": (linears[name].out_features, config.rank) for name in names}
    for key, tensor in tensors.items():
        module = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight", key)
        if module and module[1] not in linears:
            raise ValueError(f"adapter {path} was made for another model: no module named {module[1]:.200}. It names "
                             f"{base_model or 'no model'} as its base; pass that with --model.")
        if key not in expected:
            raise ValueError(f"tensor {key!r:.200} of adapter {path} is not one that its adapter_config.json asks for.")
        if tuple(tensor.shape) != expected[key]:
            raise ValueError(f"tensor {key} of adapter {path} is {tuple(tensor.shape)}, expected {expected[key]}: the "
                             "adapter was made for another model, or its adapter_config.json is another's.")
        if not tensor.isfinite().all():
            raise ValueError(f"tensor {key} of adapter {path} has non-finite values. The adapter is broken.")
    missing = sorted(expected.keys() - tensors.keys())
    if missing or not expected:
        raise ValueError(f"adapter {path} lacks {missing[0] if missing else 'any tensor for this model'}. It is "
                         "incomplete, or was made for another model.")
    config.targets = tuple(names)
    apply_lora(model, config)
    if not isinstance(targets, str):
        config.targets = tuple(targets)                              # as short as they came
    with torch.no_grad():
        for name, module in lora_modules(model).items():
            module.lora_A.copy_(tensors[f"{PREFIX}{name}.lora_A.weight"])
            module.lora_B.copy_(tensors[f"{PREFIX}{name}.lora_B.weight"])
    for weight in lora_parameters(model):
        weight.requires_grad_(trainable)
    if not any(module.lora_B.any() for module in lora_modules(model).values()):
        warnings.warn(f"adapter {path} changes nothing: each lora_B in it is zero.", stacklevel=2)
    return model


def read_adapter_config(folder: Path) -> tuple[LoraConfig, list[str] | str, str]:
    """Config, target_modules (suffixes, a regular expression, or "all-linear") and name of the base model."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"no adapter at {folder} (no adapter_config.json). Give a folder in PEFT's format.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {str(error)[:100]}.") from None
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise ValueError(f"{file} does not describe a LoRA adapter (peft_type LORA).")
    used = [f"{key} = {raw[key]!r:.60}" for key in UNSUPPORTED if raw.get(key)]
    used += [f"bias = {raw['bias']!r:.60}"] if raw.get("bias", "none") != "none" else []
    init = raw.get("init_lora_weights")
    used += [f"init_lora_weights = {init!r:.60}"] if init not in PLAIN_INITS else []
    if used:
        raise ValueError(f"{file} asks for {used[0]}, which is not implemented; only plain LoRA is.")
    targets = raw.get("target_modules")
    is_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    try:
        re.compile(targets if isinstance(targets, str) else "")
    except (re.error, OverflowError, RecursionError):
        targets = None
    if not targets or not (is_list or isinstance(targets, str)):
        raise ValueError(f"{file}: target_modules is {raw.get('target_modules')!r:.60}; expected a list of names or a "
                         "regular expression.")
    try:
        config = LoraConfig(rank=raw.get("r"), alpha=raw.get("lora_alpha"), dropout=raw.get("lora_dropout") or 0.0)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if raw.get("use_rslora"):
        config.alpha *= math.sqrt(config.rank)                       # alpha / sqrt(r) written as alpha' / r
    return config, targets, str(raw.get("base_model_name_or_path") or "")[:200]


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors (or .bin), by PEFT key. Raises ValueError for a missing or bad file."""
    file = folder / "adapter_model.safetensors"
    file = file if file.is_file() else folder / "adapter_model.bin"
    if not file.is_file():
        raise ValueError(f"no adapter at {folder} (no adapter_model.safetensors). Give a folder in PEFT's format.")
    try:
        tensors = load_file(file) if file.suffix != ".bin" else torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{file} contains code, not weights. It was not loaded. Get a safetensors version.") from None
    except Exception as error:                                       # damaged bytes can make a reader raise anything
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{file} is damaged or incomplete: {reason}. Get it again.") from None
    values = tensors.values() if isinstance(tensors, dict) else [None]
    if not all(isinstance(value, Tensor) and value.dtype in FLOATS for value in values):
        raise ValueError(f"{file} does not hold tensors by name, of float32, float16 or bfloat16. It was not loaded.")
    return tensors
