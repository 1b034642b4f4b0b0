"""What a command leaves out: the demo's model, its tasks, and their settings."""

from dataclasses import replace
from pathlib import Path

import data
from eval import DEMO

MODEL = str(DEMO / "base")


def demo_settings(method, given: dict, before: dict) -> dict:
    """The demo's settings, those of its model and of its tasks where these are used."""
    settings, found = data.read_json(DEMO / "settings.json"), {}
    name, kind = method.__name__.rpartition(".")[2], method.kind
    if not kind:
        return {}
    # Rates and steps belong to the model, ...
    if "model" not in given and before.get("model", MODEL) == MODEL:
        found |= settings["model"][kind] | settings["model"].get(name, {})
    # ... lengths and numbers of examples to the tasks.
    tasks = str(demo_tasks(kind))
    if not {"tasks", "examples"} & given.keys() and before.get("tasks", tasks) == tasks:
        found |= settings[Path(tasks).name]
    return found


def demo_tasks(kind: str) -> Path:
    """The demo's tasks; those of methods on judged responses have longer answers."""
    if kind == "judged":
        return DEMO / "records"
    return DEMO / "tasks"


def fill_paths(cfg, method):
    """The paths that were left out: the demo's model and tasks."""
    kind, given = method.kind, {}
    if not hasattr(cfg, "tasks"):  # pretrain
        return cfg
    # With a model of one's own, records may be all that there is.
    records = cfg.model and (kind == "judged" or getattr(cfg, "candidates", ""))
    if not cfg.model:
        given["model"] = MODEL
    if not (cfg.tasks or records or getattr(cfg, "examples", "")):
        given["tasks"] = str(demo_tasks(kind))
        if kind != "judged":
            given["paraphrases"] = cfg.paraphrases or str(DEMO / "paraphrases.json")
    return replace(cfg, **given)
