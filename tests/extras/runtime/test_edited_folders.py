"""Run folders that somebody has edited: the command ends as before, or says which file is wrong.

Each trial damages one file, by a value or by bytes, and gives the same command again in a child.
"""

import json
import os
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import short_runs as runs
from damage import garbled, in_children, spoilt, spoilt_text

import eval as evaluation
import train

TRIALS = [  # the state of the folder, the file that is damaged, long trials
    ("finished", "identity.json", 40), ("stopped", "identity.json", 40),
    ("evaluated", "identity.json", 20),
    ("finished", "sft-ia/config.json", 60), ("finished", "candidates.jsonl", 20),
    ("collecting", "candidates.jsonl", 80), ("stopped", "log.jsonl", 20),
    ("stopped", "checkpoints/step-000002/state.json", 10),
    ("stopped", "checkpoints/step-000002/manifest.json", 20),
    ("stopped", "checkpoints/step-000002/weights.safetensors", 10),
    ("evaluated", "adapter_config.json", 60), ("evaluated", "adapter_model.safetensors", 60),
    ("finished", "config.json", 60), ("collecting", "config.json", 20),
    ("stopped", "config.json", 20), ("evaluated", "config.json", 40),
    ("finished", "log.jsonl", 20)]
QUICK = 3


@pytest.fixture(scope="module")
def edited(world, tmp_path_factory):
    """A finished run and one that was stopped, as folders, and the commands that read them."""
    home = tmp_path_factory.mktemp("edited")
    out = str(home / "out")
    train_it = ["--stage", "cat", "--judge", "length", "--steps", "3", "--sft-steps", "1",
                "--samples", "1", "--pool-per-task", "4", "--wordings", "3", "--no-compare",
                "--batch-size", "2", "--save-every", "1"]
    inputs = ["--model", str(world / "model"), "--tasks", str(world / "tasks"), "--paraphrases",
              str(world / "paraphrases.json"), "--out", out, "--max-new-tokens", "4"]
    train_it += [*inputs, "--no-evaluate", "--per-task", "8", "--judge-share", "0.3"]
    evaluate_it = [*inputs, "--adapter", str(home / "run"), "--per-task", "1", "--wordings", "2"]
    with pytest.MonkeyPatch.context() as patch:
        with pytest.raises(runs.Died):
            runs.die_after(patch, 3)
            train.main(train_it)
    shutil.copytree(out, home / "stopped")
    assert train.main(train_it) == 0
    shutil.move(out, home / "finished")
    shutil.copytree(home / "finished", home / "collecting")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (home / "collecting" / name).unlink()
    return SimpleNamespace(home=home, train=train_it, evaluate=evaluate_it)


def damaged(file, number):
    """The bytes of a file, damaged."""
    blob, rng = file.read_bytes(), random.Random(f"{file.name}/{number}")
    if file.suffix == ".safetensors":
        return garbled(blob, rng)
    lines = blob.decode().splitlines() if file.suffix == ".jsonl" else [blob.decode()]
    at = rng.randrange(len(lines))
    if rng.random() < 0.3:
        changed = spoilt_text(lines[at], rng)
    else:
        changed = json.dumps(spoilt(json.loads(lines[at]), rng)).encode()
    lines = [line.encode() for line in lines]
    lines[at] = changed
    return b"\n".join(lines) + b"\n"


def list_files(folder, leave_out):
    """The files under a folder, outside of some folders in it."""
    return {str(path) for path in folder.rglob("*")
            if not leave_out & {path, *path.parents}}


@pytest.mark.parametrize("state, name, trials", [
    *((state, name, QUICK) for state, name, _ in TRIALS),
    *(pytest.param(*row, marks=pytest.mark.faults) for row in TRIALS)])
def test_an_edited_run_folder_ends_as_before_or_names_the_file(state, name, trials, edited,
                                                               monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    if name != "log.jsonl":  # a run without plots is quick
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    home, out = edited.home, edited.home / "out"
    evaluating = state == "evaluated"
    original = home / ("finished" if evaluating else state)
    run = home / "run" if evaluating else out
    weights = (home / "finished/adapter_model.safetensors").read_bytes()

    def work(number):
        for folder in (out, run):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, run)
        blob = damaged(original / name, number)
        (run / name).write_bytes(blob)
        before = list_files(home, {out})
        status, error = runs.call(*((evaluation, edited.evaluate) if evaluating
                               else (train, edited.train)))
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        if list_files(home, {out}) != before:
            return f"something was written outside of --out: {blob[:300]}"
        if status == 2 and len(lines) == 1 and len(error) < 2000 and "Traceback" not in error:
            named = str(run) in error or " --" in error  # or the flag that has such a value
            return "" if named else f"no name of a file: {error} {blob[:3000]}"
        if status:
            return f"{status}: {error[-1500:]} {blob[:3000]}"
        edited_ones = evaluating or state == "collecting" or (state, name) == (
            "stopped", "config.json")  # whose values are those of the run
        same = edited_ones or (out / "adapter_model.safetensors").read_bytes() == weights
        return "" if same else f"other weights: {blob[:300]}"
    cases = range(10_000 * trials, 10_000 * trials + trials)  # the short trials are others
    found = in_children(work, cases)
    wrong = [f"{case}: {text}" for case, text in zip(cases, found, strict=True) if text]
    assert not wrong, f"{len(wrong)} of {trials}:\n" + "\n".join(wrong[:5])
