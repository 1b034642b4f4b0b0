"""Checkpoints: all that the next step reads, so that a stopped stage goes on with the same bits.

RUN/checkpoints/step-000123 holds weights, AdamW's state and random states as safetensors,
state.json and, in manifest.json, a checksum of each. A folder is complete or has another name.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from extras.runtime import identity, ranks
from extras.runtime.files import checksum, write_folder

FOLDER, KEPT = "checkpoints", 2
# What steps append to; resuming truncates it.
GROWING = ("log.jsonl", "probe.jsonl", "rollouts.jsonl")
TENSORS = ("weights", "optimizer", "random")


def save_checkpoint(run, optimizer, items: list[dict], books: dict) -> None:
    """Write the state after books["step"] steps, and the books; called by all processes."""
    weights = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    rank, adam = run.guard.rank, {}
    for name, weight in weights.items():
        for slot, value in optimizer.state.get(weight, {}).items():
            adam[f"{name}/{slot}"] = value
    state, device = torch.get_rng_state(), next(run.model.parameters()).device
    if device.type == "cuda":  # the GPU's stands behind that of the CPU
        state = torch.cat([state, torch.cuda.get_rng_state(device)])
    states = enumerate(ranks.gather([state.tolist()]))
    random = {str(rank): torch.tensor(state, dtype=torch.uint8) for rank, state in states}
    found = ranks.gather_tensors(weights, rank), ranks.gather_tensors(adam, rank), random
    run.guard.first(lambda: write_checkpoint(run, found, items, books))


def write_checkpoint(run, tensors: tuple, items: list[dict], books: dict) -> None:
    """Write the folder, then remove the checkpoints before the last `KEPT`."""
    memory = {name: x for name, x in run.memory.items() if isinstance(x, (int, float))}
    grown = [run.folder / name for name in GROWING if (run.folder / name).exists()]
    books = books | {"memory": memory, "sizes": {path.name: path.stat().st_size for path in grown},
                     "data": fingerprint(items), "groups": None,
                     "inputs": identity.read_identity(run.folder).get("inputs", {})}
    if run.method.phase(run.cfg):  # such a method cannot make its items again
        books["groups"] = items
    folder, name = run.folder / FOLDER, f"step-{books['step']:06d}"

    def save(part: Path) -> None:
        for kind, found in zip(TENSORS, tensors, strict=True):
            save_file(found, part / f"{kind}.safetensors")
        (part / "state.json").write_text(json.dumps(books) + "\n")
        manifest = {}
        for file in sorted(part.iterdir()):
            manifest[file.name] = {"bytes": file.stat().st_size, "sha256": checksum(file)}
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1))

    def publish(part: Path) -> None:
        shutil.rmtree(folder / name, ignore_errors=True)  # a damaged one that was passed over
        os.rename(part, folder / name)
    write_folder(folder / f".tmp-{name}", save, publish)
    for old in saved_steps(run.folder)[KEPT:]:
        shutil.rmtree(old)


def saved_steps(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first."""
    return sorted((folder / FOLDER).glob("step-*"), key=lambda place: -int(place.name[5:]))


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint without damage, or None. Raises ValueError if all are damaged."""
    problem = ""
    for place in saved_steps(folder):
        try:
            manifest = json.loads((place / "manifest.json").read_text())
            for name in (*(f"{kind}.safetensors" for kind in TENSORS), "state.json"):
                if checksum(place / name) != manifest[name]["sha256"]:
                    raise ValueError(f"{name}: checksum differs")
            return place
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            problem = f"checkpoint {place} is damaged ({error})"
            print(f"warning: {problem}.", flush=True)
    if problem:
        raise ValueError(f"{problem}, and so are all newer ones. Remove {folder / FOLDER} to train "
                         "the stage anew.")
    return None


def load_checkpoint(run, optimizer, place: Path, make_items: Callable) -> tuple[list, dict]:
    """Restore a checkpoint; its items and books. Raises ValueError if an input has changed."""
    weights = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    text = (place / "state.json").read_text()
    for old, new in (("cut", "truncated"), ("per_token", "values")):  # names of the first version
        text = text.replace(f'"{old}": ', f'"{new}": ')
    books = json.loads(text)
    items = books["groups"] or make_items()
    saved, adam, states = (load_file(place / f"{kind}.safetensors") for kind in TENSORS)
    shapes = [{name: x.shape for name, x in found.items()} for found in (saved, weights)]
    if shapes[0] != shapes[1] or books["data"] != fingerprint(items):
        raise ValueError(f"{place} was trained on other documents or weights: a file has changed "
                         "since, or a chat template says another date. Restore it, or remove "
                         f"{place.parent} to train the stage anew.")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(ranks.place_like(saved[name], weight))
    for key, value in adam.items():
        name, _, slot = key.rpartition("/")
        state, weight = optimizer.state[weights[name]], weights[name]
        state[slot] = ranks.place_like(value, weight) if value.dim() else value.to(weight.device)
    run.memory.update(books["memory"])
    if len(states) == run.guard.size:
        state, length = states[str(run.guard.rank)], len(torch.get_rng_state())
        torch.set_rng_state(state[:length])
        if len(state) > length and torch.cuda.is_available():
            torch.cuda.set_rng_state(state[length:])
    elif getattr(run.cfg, "dropout", 0):
        run.say(f"warning: {len(states)} processes became {run.guard.size}: dropout starts anew.")
    run.guard.first(lambda: truncate_files(run.folder, books["sizes"]))
    return items, books


def truncate_files(folder: Path, sizes: dict[str, int]) -> None:
    """Drop what steps after the checkpoint have written. Raises ValueError for a shorter file."""
    for name, length in sizes.items():
        path = folder / name
        if not path.exists() or path.stat().st_size < length:
            raise ValueError(f"{path} is shorter than when the last checkpoint was written. "
                             f"Restore it, or remove {folder / FOLDER} to train the stage anew.")
        os.truncate(path, length)


def fingerprint(items: list[dict]) -> str:
    """A checksum of all documents' tokens and labels, in order."""
    digest = hashlib.sha256()
    for document in [document for item in items for document in item["documents"]]:
        for ids in (document["input_ids"], document["labels"]):
            digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.hexdigest()
