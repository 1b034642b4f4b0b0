"""Run folders: the settings that one holds, and whether it holds what a stage has trained."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import data
from eval import extra
from methods.common import CommonFlags
from methods.finding import find_method, stages
from methods.flags import expected, flag_names, same, spelled

# A continued run may differ in these, and in how a server is asked; they change no result.
FREE = {"out", "init", "device", "evaluate", "compare", "split", "micro_tokens", "checkpointing",
        "shard", "save_every", "plain", "eval_per_task", "eval_wordings", "eval_batch"}
# What a run does not take over from that of an earlier stage.
OWN = {"steps", "lr", "batch_size", "epochs", "validation"}
# What a judge behind a server says hangs on these.
ASKED = {"judge_url", "judge_model", "judge_extra", "judge_temperature", "judge_fold_system",
         "verdict"}
# What runs of earlier versions did not say.
ADDED = {"epochs": 0.0, "validation": 0.0, "train_on": "all"}


@dataclass
class ServerFlags:
    """Where a judge's server is; those of extras/judges say more about it."""

    judge_url: str = field(default="http://127.0.0.1:8000/v1", metadata={"help": "its address"})
    judge_model: str = field(default="", metadata={"help": "the judge's name there"})


def server_flags(plain: bool) -> type:
    """The dataclass of the flags of a judge's server."""
    judges = extra("judges", plain)
    return judges.ServerFlags if judges else ServerFlags


def config_class(method, *, plain: bool = False, server: bool = False) -> type:
    """The dataclass of all flags that a stage reads, with those of a server that is asked."""
    bases = (method.Flags, CommonFlags)
    if server:
        bases = (*bases, server_flags(plain))
    return dataclass(type("Config", bases, {}))


def has_result(folder: Path) -> bool:
    """Whether a folder holds what a finished stage leaves."""
    return any((folder / name).exists() for name in ("adapter_config.json", "model/config.json"))


def saved_settings(folder: Path) -> dict:
    """The config.json of a run folder; {} where there is none. Raises ValueError for damage."""
    path = folder / "config.json"
    saved = data.read_json(path) if path.is_file() else {}
    if not isinstance(saved, dict):
        raise ValueError(f"{path} holds no settings. Give another run folder, or delete it.")
    if isinstance(saved.get("examples"), str):  # one file, until November 2026
        saved["examples"] = list(filter(None, [saved["examples"]]))
    name = saved.get("stage")
    if isinstance(name, str) and name in stages():
        flags = config_class(find_method(name), server="judge_url" in saved)
        check_saved(saved, flags, path)
    if name in ("rrhf", "pro"):  # which had no such flag until November 2026
        saved.setdefault("condition", "own")
    if "gae_lam" in saved:  # its name until November 2026
        saved["gae_lambda"] = saved.pop("gae_lam")
    return saved


def check_saved(saved: dict, flags: type, path: Path) -> None:
    """Raise ValueError for a value in a config.json that its flag could not have."""
    hints = get_type_hints(flags)
    for item in fields(flags):
        value, kind = saved.get(item.name), hints[item.name]
        if item.name not in saved:
            continue
        if not is_of(value, kind) or expected(value, item.metadata):
            raise ValueError(f"{path}: {item.name} is {str(value)[:80]!r}, which no flag can be. "
                             "Restore the file, or use another folder.")


def is_of(value, kind) -> bool:
    """Whether a value read from JSON has the type of a flag."""
    if get_origin(kind) is Literal:
        return type(value) is str and value in get_args(kind)
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def save_settings(cfg, folder: Path) -> None:
    """Write the config.json of a run folder, all of it or nothing."""
    part = folder / "config.json.part"
    part.write_text(json.dumps(asdict(cfg), indent=1) + "\n")
    part.replace(folder / "config.json")


def is_finished(folder: Path, cfg) -> bool:
    """Whether a folder holds what this stage and these settings trained.

    Raises ValueError if it holds a run, finished or not, with other settings or inputs.
    """
    finished = has_result(folder)
    if not (finished or any(folder.glob("*.jsonl")) or (folder / "checkpoints").exists()):
        return False  # a mistake stopped it before it had begun
    # How often a server is asked, and what it may cost, is free, too.
    server = flag_names(server_flags(cfg.plain))
    saved = ADDED | saved_settings(folder)
    free = FREE | server - ASKED
    asked_as = getattr(cfg, "asked_as", {})
    if asked_as:  # a stage on the way, of which this command cannot set these
        free = free | {"batch_size", "validation"}
    if cfg.epochs:  # the steps follow from it
        free = free | {"steps"}
    elif asked_as:  # the steps say it all
        free = free | {"epochs"}
    for item in fields(cfg):
        name, value = item.name, getattr(cfg, item.name)
        if name in saved and name not in free and not same(saved[name], value):
            shown = spelled(asked_as.get(name, name))
            raise ValueError(f"{folder} holds another run: {shown} was {str(saved[name])[:200]}, "
                             f"now {value}. Use another --out, or leave {shown} out.")
    runtime = extra("runtime", cfg.plain)
    if runtime:  # the same names, and the same bytes behind them
        runtime.check_inputs(folder, cfg)
    return finished
