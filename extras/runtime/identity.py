"""Identities: the sha256 of all that a run reads, so that nothing is exchanged under it unnoticed.

RUN/identity.json holds "inputs" and "result", {what: {file: sha256}}, and "machines": what it ran
on, which changes rounding only. Whoever finds, resumes, continues or evaluates a run compares. A
folder without the file, of the first version or of --plain, is taken as it is.
"""

import functools
import hashlib
import json
import os
from pathlib import Path

import torch

import data
from eval import pick_device
from extras.formats.templates import find_file
from extras.runtime.files import checksum
from methods.finding import find_method
from methods.flags import spelled
from methods.settings import has_result, saved_settings

FILE, ROOT = "identity.json", Path(__file__).parents[2]
FLAGS = ("model", "tokenizer", "tasks", "paraphrases", "candidates", "choices", "records",
         "responses", "examples", "preferences", "principles", "corpus", "unlabelled",
         "reward_model", "critic")
ADAPTERS = ("adapter", "reference", "reward_model", "critic")  # flags that name finished runs
EARLIER, BESIDE, RESULT = "the earlier stage", "the stage beside it", "its result"
RUNS = (EARLIER, BESIDE, RESULT, "--adapter", "--reward-model", "--critic", "--responses")
# What is read in the folder of a run, and in that of a model or of tasks.
TRAINED = ("adapter_*", "value_head.safetensors", "model/*")
GIVEN = ("*", "annotations/*", "execute/*")
KINDS = (".json", ".jsonl", ".safetensors", ".model", ".jinja")


# ----- What a run reads -----

def find_inputs(cfg, folder: Path | None = None) -> dict[str, Path]:
    """{what: path} of all that the flags name and, for a run folder, of what it starts from."""
    found = {}
    for name in FLAGS:
        given = getattr(cfg, name, "")
        for number, path in enumerate(given if isinstance(given, list) else [given], 1):
            if path:
                found[spelled(name) + f" {number}" * (number > 1)] = Path(path)
    template = find_file(getattr(cfg, "template", ""))
    found |= {"--template": template} if template else {}
    if folder:
        found[EARLIER] = find_earlier(cfg, folder)
        for name in find_method(cfg.stage).also_needs(cfg):  # one at most, a reward model
            places = Path(getattr(cfg, "init", "") or cfg.out, name), Path(cfg.out, name)
            found[BESIDE] = next(filter(has_result, places), None)
    return {what: place for what, place in found.items() if place and place.exists()}


def find_earlier(cfg, folder: Path) -> Path | None:
    """The run folder whose adapter a stage, or a round of it, starts from."""
    out, number, needs = Path(cfg.out), getattr(cfg, "rounds", 1) - 1, find_method(cfg.stage).needs
    if folder.parent == out and folder.name.startswith("round"):
        number = int(folder.name[5:]) - 1
    if number > 0:
        return out / f"round{number}"
    init = Path(getattr(cfg, "init", "") or out)
    for place in (init / needs, init, out / needs):  # in the order of train.run_stage
        if needs and saved_settings(place).get("stage") == needs and has_result(place):
            return place
    return None


def hash_files(what: str, place: Path) -> dict[str, str]:
    """{name: sha256} of a file, whose name is ".", or of what is read in a folder."""
    files, found = [place], {}
    if place.is_dir():
        trained = what.rstrip(" 0123456789") in RUNS  # of several, the second is "--responses 2"
        files = [file for pattern in (TRAINED if trained else GIVEN)
                 for file in place.glob(pattern) if file.suffix in KINDS and file.is_file()]
    for file in sorted(files):
        status = file.stat()
        found[str(file.relative_to(place))] = known_checksum(
            file.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)
    return found


@functools.cache
def known_checksum(file: Path, size: int, changed: int, inode: int) -> str:
    """sha256 of a file, computed once in a process while the file stays as it is."""
    return checksum(file)


def describe_machine(cfg) -> dict:
    """What changes how results are rounded, or how they are computed."""
    code = hashlib.sha256()
    files = [file for room in ("*.py", "methods/*.py", "extras/*/*.py") for file in ROOT.glob(room)]
    if getattr(cfg, "stage", "").endswith(".py"):
        files.append(Path(cfg.stage))
    for file in sorted(files):
        code.update(file.read_bytes())
    return {"threads": torch.get_num_threads(), "device": pick_device(cfg)[0].partition(":")[0],
            "processes": int(os.environ.get("WORLD_SIZE", "1")), "torch": torch.__version__,
            "program": code.hexdigest()[:12]}


# ----- identity.json -----

def read_identity(folder: Path) -> dict:
    """The identity.json of a run folder; {} where there is none. Raises ValueError for damage."""
    path = folder / FILE
    found = data.read_json(path) if path.is_file() else {}
    try:
        sound = all(isinstance(part, dict) for part in found.values())
        places = [*found.get("inputs", {}).values(), found.get("result", {})]
        sound &= all(isinstance(sha, str) for place in places for sha in place.values())
        sound &= all(data.as_list(seen)[-1:] for seen in found.get("machine", {}).values())
    except AttributeError:  # something is no object
        sound = False
    if not sound:
        raise ValueError(f"{path} holds no identities. Delete it to go on without.")
    return found


def write_identity(folder: Path, found: dict) -> None:
    """Write the identity.json of a run folder, all of it or nothing."""
    part = folder / f"{FILE}.part"
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(folder / FILE)


def record_inputs(run, place: Path | None) -> None:
    """Write what a stage reads; says what rounds in another way than when it was begun.

    Raises ValueError if its checkpoint, in `place`, has read something else.
    """
    was, now = read_identity(run.folder).get("machine", {}), describe_machine(run.cfg)
    inputs, machine, said = find_inputs(run.cfg, run.folder), {}, []
    if place:
        refuse_changes(place, data.read_json(place / "state.json").get("inputs", {}), inputs,
                       f"remove {place.parent} to train the stage anew")
    if not (place or any(run.folder.glob("*.jsonl"))):
        was = {}  # nothing was computed yet
    for name, value in now.items():
        seen = data.as_list(was.get(name, []))
        if seen and seen[-1] != value:
            said.append(f"{name} {seen[-1]}, now {value}")
        machine[name] = seen + [value] * (value not in seen[-1:])
    if said:
        run.say(f"warning: {run.folder} was begun with {'; '.join(said)}. What follows is rounded "
                "in another way than in a run that was never stopped.")
    found = {what: hash_files(what, path) for what, path in inputs.items()}
    write_identity(run.folder, {"inputs": found, "machine": machine})


def record_result(folder: Path, part: Path) -> None:
    """Add what a finished stage left in `part` to the identity of its folder, written there."""
    found = read_identity(folder)
    if found:
        write_identity(part, found | {"result": hash_files(RESULT, part)})


def refuse_changes(folder: Path, saved: dict, places: dict, remedy: str = "") -> None:
    """Raise ValueError if a file is not what it was when a run folder was trained.

    saved: {what: {file: sha256}}; places: {what: path}. What is not in both is not compared.
    """
    for what in saved.keys() & places.keys():
        was, now = saved[what], hash_files(what, places[what])
        for name in sorted({*was, *now}):
            if was.get(name) != now.get(name):
                raise ValueError(
                    f"{places[what] / name} is not as it was when {folder} was trained ({what}). "
                    f"Restore it, or {remedy or f'delete {folder / FILE} to go on all the same'}.")


def check_run(folder: Path, places: dict) -> None:
    """Raise ValueError if what a run folder was made of, or what it holds, has changed."""
    saved = read_identity(folder)
    if int(os.environ.get("RANK", "0")) or not saved:  # the first process speaks for all
        return
    refuse_changes(folder, saved.get("inputs", {}), places)
    if has_result(folder):
        refuse_changes(folder, {RESULT: saved.get("result", {})}, {RESULT: folder})


def check_inputs(folder: Path, cfg) -> None:
    """Raise ValueError if the inputs of a run, or its result, are not what its folder says.

    That a finished one comes from other versions is said, once.
    """
    check_run(folder, find_inputs(cfg, folder))
    was, now = read_identity(folder).get("machine", {}), describe_machine(cfg)
    said = [f"{name} {data.as_list(was[name])[-1]}, now {now[name]}"
            for name in ("torch", "program")
            if name in was and data.as_list(was[name])[-1] != now[name]]
    if said and has_result(folder) and os.environ.get("RANK", "0") == "0":
        note(f"note: {folder} was trained with {'; '.join(said)}. It is used as it is.")


@functools.cache
def note(message: str) -> None:
    """Print a line, the first time."""
    print(message, flush=True)


def check_adapters(cfg) -> None:
    """Raise ValueError for an adapter that was changed, or trained over another base."""
    for name in ADAPTERS:
        for folder in data.as_list(getattr(cfg, name, None) or []):
            check_run(Path(folder), {"--model": Path(cfg.model)})


def note_inputs(cfg) -> None:
    """Add to the metrics.json of eval.py what each model was made of."""
    path, own = Path(cfg.out, "metrics.json"), {"machine": describe_machine(cfg)}
    own |= {what: hash_files(what, place) for what, place in find_inputs(cfg).items()}
    results = data.read_json(path)
    for name in results:
        results[name]["inputs"] = own
        if name in cfg.adapter:
            results[name]["inputs"] = own | {"--adapter": hash_files("--adapter", Path(name))}
    path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
