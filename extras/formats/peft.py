"""Adapters of PEFT and of other programs: everything is checked before the model is touched."""

import json
import math
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from extras.formats.checks import check, read_object, refuse
from lora import PREFIX, LoraConfig, attach_adapter, lora_modules, matches

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Options of PEFT that change what an adapter computes. One that uses any is refused.
UNSUPPORTED = (
    "use_dora", "modules_to_save", "layer_replication", "target_parameters", "megatron_config",
    "rank_pattern", "alpha_pattern", "alora_invocation_tokens", "fan_in_fan_out", "lora_bias",
    "use_qalora", "exclude_modules", "layers_to_transform", "layers_pattern",
    "trainable_token_indices", "arrow_config", "use_bdlora")
EMBEDDINGS = ("model.embed_tokens", "lm_head")  # what PEFT may save along with an adapter
MATCH_SECONDS = 10  # for a regular expression on the names of a model's linears
MATCH = ("import json, re, sys; pattern, names = json.load(sys.stdin); "
         "print(json.dumps([name for name in names if re.fullmatch(pattern, name)]))")
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # others alter the base


def open_adapter(model: nn.Module, path, trainable: bool = False) -> nn.Module:
    """Adapt the model, in place, as an adapter folder in PEFT's format says. Returns the model.

    Raises ValueError for what is not plain LoRA, damaged, or made for another model.
    """
    refuse(lora_modules(model), "the model already has LoRA adapters; merge them first "
           "(merge_lora), or start from the base.")
    config, base_model = read_adapter_config(Path(path) / "adapter_config.json")
    tensors = read_adapter_weights(Path(path) / "adapter_model.safetensors")
    drop_saved_embeddings(model, tensors, path)
    linears = {name: part for name, part in model.named_modules() if hasattr(part, "in_features")}
    targets, expected = config.targets, {}
    config.targets = find_targets(list(linears), targets)
    for name in config.targets:
        expected[f"{PREFIX}{name}.lora_A.weight"] = (config.rank, linears[name].in_features)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (linears[name].out_features, config.rank)
    for key in sorted(tensors) + sorted(expected):
        module = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight", key) or ["", ""]
        refuse(module[1] and module[1] not in linears, f"adapter {path} was made for another "
               f"model: no module named {module[1]:.200}. It names {base_model or 'no model'} as "
               "its base; pass that with --model.")
        found = tuple(tensors[key].shape) if key in tensors else "missing"
        wanted = expected.get(key, "none of this name")
        refuse(found != wanted, f"tensor {key:.200} of adapter {path} is {found}, expected "
               f"{wanted}: the adapter, or its adapter_config.json, was made for another model.")
        refuse(not tensors[key].isfinite().all(),
               f"tensor {key} of adapter {path} has non-finite values. The adapter is broken.")
    refuse(not expected, f"adapter {path} lacks any tensor for this model.")
    attach_adapter(model, config, tensors, trainable)
    if not isinstance(targets, str):
        config.targets = tuple(targets)  # saved as short as they came
    if not any(tensor.any() for key, tensor in tensors.items() if "lora_B" in key):
        warnings.warn(f"adapter {path} changes nothing: each lora_B in it is zero.", stacklevel=2)
    return model


def drop_saved_embeddings(model: nn.Module, tensors: dict[str, torch.Tensor], path) -> None:
    """Take the embedding and the head out of the tensors; they must be the model's own.

    PEFT saves both when the vocabulary was resized, and the one that is adapted.
    """
    parts = dict(model.named_modules())
    for name in EMBEDDINGS:
        for key in (f"{PREFIX}{name}.weight", f"{PREFIX}{name}.base_layer.weight"):
            if key not in tensors or name not in parts:
                continue
            given, own = tensors.pop(key), parts[name].weight.detach()
            own = (own.full_tensor() if hasattr(own, "full_tensor") else own).cpu()
            # either may have been rounded when it was loaded
            kind = own.dtype if own.dtype.itemsize <= given.dtype.itemsize else given.dtype
            refuse(given.shape != own.shape or not torch.equal(given.to(kind), own.to(kind)),
                   f"adapter {path} was saved with a {name} of its own, {tuple(given.shape)}, and "
                   f"the model's, {tuple(own.shape)}, is another: the vocabulary was resized, or "
                   "this was trained. Merge it with peft, and give DIR with --model: base = "
                   f"AutoModelForCausalLM.from_pretrained(BASE); base.resize_token_embeddings("
                   f"{len(given)}); PeftModel.from_pretrained(base, ADAPTER).merge_and_unload()"
                   ".save_pretrained(DIR). The adapter's tokenizer belongs into DIR.")


def find_targets(names: list[str], targets) -> tuple[str, ...]:
    """PEFT's rule: a list holds ends of names, a string is a regular expression or "all-linear"."""
    if targets == "all-linear":
        return tuple(name for name in names if name.rpartition(".")[2] != "lm_head")
    if not isinstance(targets, str):
        return tuple(name for name in names if matches(name, tuple(targets)))
    # some expressions take for ever, and Python cannot be stopped in the middle of one
    try:
        found = subprocess.run([sys.executable, "-I", "-S", "-c", MATCH], check=True, text=True,
                               input=json.dumps([targets, names]), capture_output=True,
                               timeout=MATCH_SECONDS).stdout
    except subprocess.SubprocessError:
        raise ValueError(f"target_modules is {targets!r:.100}, a regular expression that fails, or "
                         f"takes over {MATCH_SECONDS} seconds. Give a list of names.") from None
    return tuple(json.loads(found))


def are_targets(targets) -> bool:
    """Whether this is a regular expression, or a list of names."""
    if isinstance(targets, list):
        return bool(targets) and all(isinstance(name, str) for name in targets)
    try:
        return 0 < len(targets) <= 10_000 and re.compile(targets) is not None
    except (re.error, OverflowError, RecursionError, TypeError):
        return False


FIELDS = {
    "peft_type": ("LORA", lambda value: value == "LORA"),
    "target_modules": ("a list of names or a regular expression", are_targets),
    "r": ("a rank of at least 1", lambda value: type(value) is int and 1 <= value <= 2**14),
    "lora_alpha": ("a positive number, such as twice the rank",
                   lambda value: isinstance(value, int | float) and 0 < value <= 1e6),
    "lora_dropout": ("a number in [0, 1)", lambda value: not value or (
        isinstance(value, int | float) and 0 <= value < 1)),
    "bias": ("none", lambda value: value in (None, "none")),
    "init_lora_weights": ("one that leaves the base alone", lambda value: value in PLAIN_INITS),
} | dict.fromkeys(UNSUPPORTED, ("nothing: it is not implemented; only plain LoRA is",
                                lambda value: not value))


def read_adapter_config(file: Path) -> tuple[LoraConfig, str]:
    """The config, its targets as they stand in the file, and the name of the base model."""
    raw = read_object(file)
    refuse(not file.is_file(), f"no adapter at {file.parent} (no {file.name}). Give a folder in "
           "PEFT's format.")
    check(raw, FIELDS, file)
    alpha = raw["lora_alpha"]
    if raw.get("use_rslora"):
        alpha *= math.sqrt(raw["r"])  # alpha / sqrt(r), written as alpha' / r
    config = LoraConfig(raw["r"], alpha, raw.get("lora_dropout") or 0.0, raw["target_modules"])
    return config, str(raw.get("base_model_name_or_path") or "")[:200]


def read_adapter_weights(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of adapter_model.safetensors, by PEFT's names. Raises ValueError."""
    if not file.is_file():
        refuse(file.with_suffix(".bin").is_file(), f"{file.parent} has its weights in a .bin file. "
               f"Convert it first: python -m tools.convert {shlex.quote(str(file.parent))} OUT")
        raise ValueError(f"no adapter at {file.parent} (no {file.name}). Give a folder in PEFT's "
                         "format.")
    try:
        tensors = load_file(file)
    except Exception as error:  # damaged bytes can make a reader raise anything
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{file} is damaged or incomplete: {reason}. Get it again.") from None
    refuse(any(tensor.dtype not in FLOATS for tensor in tensors.values()),
           f"{file} does not hold tensors of float32, float16 or bfloat16. It was not loaded.")
    return tensors
