"""Adapters of PEFT and of other programs: everything is checked before the model is touched."""

import json
import math
import operator
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from extras.formats.checks import check, read_object, refuse
from lora import PREFIX, LoraConfig, attach_adapter, lora_modules, matches

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MERGE = ("Merge it with peft, and give DIR with --model: base = AutoModelForCausalLM."
         "from_pretrained(BASE); PeftModel.from_pretrained(base, ADAPTER).merge_and_unload()"
         ".save_pretrained(DIR)")
# Options of PEFT that make an adapter more than a low-rank update. One that uses any is refused.
MERGEABLE = {
    "use_dora": "DoRA rescales the whole weight",
    "modules_to_save": "these modules were trained in full; if the vocabulary has grown to N, "
                       "base.resize_token_embeddings(N) comes first",
    "trainable_token_indices": "rows of the embedding were trained",
    "target_parameters": "it adapts weights that are not of a linear layer"}
UNSUPPORTED = (
    "layer_replication", "megatron_config", "alora_invocation_tokens", "fan_in_fan_out",
    "lora_bias", "use_qalora", "arrow_config", "use_bdlora", "velora_config", "kasa_config",
    "monteclora_config")
EMBEDDINGS = ("model.embed_tokens", "lm_head")  # what PEFT may save along with an adapter
MATCH_SECONDS = 10  # for the regular expressions of an option on the names of a model's linears
# For each expression: {name that it fits: its group "idx", or null}
MATCH = """
import json, re, sys
function, patterns, names = json.load(sys.stdin)
found = []
for pattern in patterns:
    fits = {name: getattr(re, function)(pattern, name) for name in names}
    found.append({name: fit.groupdict().get("idx") for name, fit in fits.items() if fit})
print(json.dumps(found))
"""
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # others alter the base


def open_adapter(model: nn.Module, path, trainable: bool = False) -> nn.Module:
    """Adapt the model, in place, as an adapter folder in PEFT's format says. Returns the model.

    Raises ValueError for what is not plain LoRA, damaged, or made for another model.
    """
    refuse(lora_modules(model), "the model already has LoRA adapters; merge them first "
           "(merge_lora), or start from the base.")
    raw = read_adapter_config(Path(path) / "adapter_config.json")
    tensors = read_adapter_weights(Path(path) / "adapter_model.safetensors")
    drop_saved_embeddings(model, tensors, path)
    linears = {name: part for name, part in model.named_modules() if hasattr(part, "in_features")}
    modules, expected = find_modules(list(linears), raw), {}
    for name, (rank, _) in modules.items():
        expected[f"{PREFIX}{name}.lora_A.weight"] = (rank, linears[name].in_features)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (linears[name].out_features, rank)
    base_model = str(raw.get("base_model_name_or_path") or "no model")[:200]
    for key in sorted(tensors) + sorted(expected):
        module = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight", key) or ["", ""]
        refuse(module[1] and module[1] not in linears, f"adapter {path} was made for another "
               f"model: no module named {module[1]:.200}. It names {base_model} as its "
               "base; pass that with --model.")
        found = tuple(tensors[key].shape) if key in tensors else "missing"
        wanted = expected.get(key, "none of this name")
        refuse(found != wanted, f"tensor {key:.200} of adapter {path} is {found}, expected "
               f"{wanted}: the adapter, or its adapter_config.json, was made for another model.")
        refuse(not tensors[key].isfinite().all(),
               f"tensor {key} of adapter {path} has non-finite values. The adapter is broken.")
    refuse(not expected, f"adapter {path} lacks any tensor for this model.")
    config = unify_ranks(modules, tensors)
    config.dropout = raw.get("lora_dropout") or 0.0
    attach_adapter(model, config, tensors, trainable)
    ends = raw["target_modules"]
    if isinstance(ends, list) and find_names(list(linears), ends) == list(modules):
        config.targets = tuple(ends)  # saved as short as they came
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


def find_modules(names: list[str], raw: dict) -> dict[str, tuple[int, float]]:
    """{name: (rank, alpha)} of each linear that PEFT would adapt; its update has alpha / rank."""
    ranks, alphas = (find_values(names, field, raw) for field in ("rank_pattern", "alpha_pattern"))
    found = {}
    for name in find_targets(names, raw):
        rank, alpha = ranks.get(name, raw["r"]), alphas.get(name, raw["lora_alpha"])
        if raw.get("use_rslora"):
            alpha *= math.sqrt(rank)  # alpha / sqrt(r), written as alpha' / r
        found[name] = rank, alpha
    return found


def unify_ranks(modules: dict[str, tuple[int, float]], tensors: dict) -> LoraConfig:
    """Make all modules' tensors those of one rank and one alpha, the largest ones; its config.

    What is added to a rank is zero in A and in B, and so stays zero in training.
    """
    most, alphas = max(rank for rank, _ in modules.values()), {}
    for name, (rank, alpha) in modules.items():
        alphas[name] = alpha if rank == most else alpha * most / rank
    strongest = max(alphas.values())
    for name, (rank, _) in modules.items():
        A, B = (f"{PREFIX}{name}.lora_{letter}.weight" for letter in "AB")
        tensors[A] = F.pad(tensors[A], (0, 0, 0, most - rank))  # (R, in)
        tensors[B] = F.pad(tensors[B], (0, most - rank))  # (out, R)
        if alphas[name] != strongest:
            tensors[B] = tensors[B].float() * (alphas[name] / strongest)
    return LoraConfig(most, strongest, targets=tuple(modules))


def find_values(names: list[str], field: str, raw: dict) -> dict:
    """{name: value of the first pattern that fits it}, as PEFT's `get_pattern_key`."""
    patterns, values = raw.get(field) or {}, {}
    found = match_names(names, field, "match", [rf"(.*\.)?({key})$" for key in patterns])
    for value, fits in zip(patterns.values(), found, strict=True):
        values = dict.fromkeys(fits, value) | values
    return values


def find_targets(names: list[str], raw: dict) -> list[str]:
    """The linears that are adapted, as PEFT's `check_target_module_exists`."""
    layers, excluded = raw.get("layers_to_transform"), raw.get("exclude_modules") or []
    found = find_names(names, raw["target_modules"])
    excluded = find_names(names, excluded, "exclude_modules")
    found = [name for name in found if name not in excluded]
    if layers in (None, []):
        return found
    patterns, layers = raw.get("layers_pattern"), layers if isinstance(layers, list) else [layers]
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns or ()]
    numbers = {}
    for fits in match_names(found, "layers_pattern", "match",
                            expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."]):
        numbers = fits | numbers
    return [name for name in found if name in numbers and int(numbers[name]) in layers]


def find_names(names: list[str], wanted, field: str = "target_modules") -> list[str]:
    """PEFT's rule: a list holds ends of names, a string is a regular expression or "all-linear"."""
    if not isinstance(wanted, str):
        return [name for name in names if matches(name, tuple(wanted))]
    if wanted == "all-linear" and field == "target_modules":
        return [name for name in names if name.rpartition(".")[2] != "lm_head"]
    return list(match_names(names, field, "fullmatch", [wanted])[0])


def match_names(names: list[str], field: str, function: str, patterns: list[str]) -> list[dict]:
    """For each regular expression {name that it fits: its group "idx"}; Python's re.`function`."""
    if not patterns:
        return []
    # some expressions take for ever, and Python cannot be stopped in the middle of one
    try:
        found = subprocess.run([sys.executable, "-I", "-S", "-c", MATCH], check=True, text=True,
                               input=json.dumps([function, patterns, names]), capture_output=True,
                               timeout=MATCH_SECONDS).stdout
    except subprocess.SubprocessError:
        raise ValueError(f"{field} has {', '.join(patterns)!r:.100}: a regular expression that "
                         f"fails, or takes over {MATCH_SECONDS} seconds. Give plain names of "
                         "modules.") from None
    return json.loads(found)


def are_targets(targets) -> bool:
    """Whether this is a regular expression, or a list of names."""
    if isinstance(targets, list):
        return bool(targets) and all(isinstance(name, str) for name in targets)
    try:
        return 0 < len(targets) <= 10_000 and re.compile(targets) is not None
    except (re.error, OverflowError, RecursionError, TypeError):
        return False


def are_names(value) -> bool:
    """Whether this is a text, a list of texts, or nothing."""
    return not value or isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(name, str) for name in value))


def are_layers(value) -> bool:
    """Whether this is a number of a layer, a list of such, or null."""
    numbers = value if isinstance(value, list) else [value]
    return value is None or all(type(number) is int and number >= 0 for number in numbers)


def is_rank(value) -> bool:
    """Whether this can be the rank of an adapter."""
    return type(value) is int and 1 <= value <= 2**14


def is_alpha(value) -> bool:
    """Whether this can be the alpha of an adapter."""
    return type(value) in (int, float) and 0 < value <= 1e6


def pattern_of(test):
    """The test of an object {module: value}, or null, whose values pass a test."""
    return lambda value: not value or (isinstance(value, dict) and all(map(test, value.values())))


FIELDS = {
    "peft_type": ("LORA", lambda value: value == "LORA"),
    "target_modules": ("a list of names or a regular expression", are_targets),
    "r": ("a rank of at least 1", is_rank),
    "lora_alpha": ("a positive number, such as twice the rank", is_alpha),
    "rank_pattern": ("an object of modules with ranks of at least 1", pattern_of(is_rank)),
    "alpha_pattern": ("an object of modules with positive numbers", pattern_of(is_alpha)),
    "layers_to_transform": ("a layer's number, a list of them, or null", are_layers),
    "layers_pattern": ("a name, a list of names, or null", are_names),
    "exclude_modules": ("a list of names, a regular expression, or null", are_names),
    "lora_dropout": ("a number in [0, 1)", lambda value: not value or (
        isinstance(value, int | float) and 0 <= value < 1)),
    "bias": (f"none: the biases were trained. {MERGE}", lambda value: value in (None, "none")),
    "init_lora_weights": ("one that leaves the base alone", lambda value: value in PLAIN_INITS),
} | dict.fromkeys(UNSUPPORTED, ("nothing: it is not implemented; only plain LoRA is",
                                operator.not_))
FIELDS |= {name: (f"nothing: {why}. {MERGE}", operator.not_) for name, why in MERGEABLE.items()}


def read_adapter_config(file: Path) -> dict:
    """The config as it stands in the file, checked."""
    raw = read_object(file)
    refuse(not file.is_file(), f"no adapter at {file.parent} (no {file.name}). Give a folder in "
           "PEFT's format.")
    check(raw, FIELDS, file)
    layers, pattern = raw.get("layers_to_transform"), raw.get("layers_pattern")
    refuse(isinstance(raw["target_modules"], str) and (layers is not None or pattern),
           f"{file}: layers_to_transform and layers_pattern go with a list as target_modules, and "
           f"it is {raw['target_modules']!r:.60}. Put the layers into that expression.")
    refuse(pattern and layers is None, f"{file}: layers_pattern is {pattern!r:.60}, but "
           "layers_to_transform is null. Give the numbers of the layers, or no layers_pattern.")
    return raw


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
