"""What a run was made of is not exchanged unnoticed: inputs, weights below it, its own result.

Each trial changes one file of a run and gives the same command again: refused, in one sentence that
names the file, and what is in the folder stays as it was.
"""

import dataclasses
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import short_runs as runs
import torch

import data
import eval as evaluation
import train
from extras.runtime import identity
from methods import finding, settings

FAULTS = pytest.mark.faults
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def home(world, tmp_path_factory):
    """A folder with a world of its own, a finished run and one that was stopped, and commands."""
    home = tmp_path_factory.mktemp("identity")
    shutil.copytree(world, home / "world")
    rows = []
    for task in data.read_tasks(world / "tasks"):
        for x in data.split_instances(task, "pool")[:5]:
            for wording, response, reward in (("w1", x.outputs[0], 2), ("w2", "hat", 0)):
                rows.append({"task": task.name, "id": x.id, "instruction": task.definition,
                             "wording": wording, "input": x.input, "target": x.outputs[0],
                             "sample": 0, "response": response, "reward": reward,
                             "finished": True, "how": "rule", "expected": True,
                             "correct": reward == 2, "p_expected": None, "p_correct": None})
    data.append_records(home / "candidates.jsonl", rows)
    inputs = ["--model", f"{home}/world/model", "--tasks", f"{home}/world/tasks", "--paraphrases",
              f"{home}/world/paraphrases.json", "--max-new-tokens", "4"]
    first = ["--stage", "sft-ia", *inputs, "--out", f"{home}/earlier", "--steps", "2", "--per-task",
             "8", "--judge-share", "0.3", "--no-evaluate"]
    second = ["--stage", "dpo", "--init", f"{home}/earlier", "--candidates",
              f"{home}/candidates.jsonl", "--steps", "4", "--batch-size", "2", "--no-evaluate",
              "--no-compare", "--save-every", "1"]
    assert train.main(first) == 0 and train.main([*second, "--out", f"{home}/finished"]) == 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(runs.Died):
        runs.die_after(patch, 3)
        train.main([*second, "--out", f"{home}/stopped"])
    look = [*inputs, "--per-task", "1", "--wordings", "2", "--out", f"{home}/eval", "--adapter"]
    return SimpleNamespace(path=home, commands={
        "finished": (train, [*second, "--out", f"{home}/finished"]),
        "stopped": (train, [*second, "--out", f"{home}/stopped"]),
        "evaluated": (evaluation, [*look, f"{home}/finished"])})


def change(file, how, rng):
    """A random bit of a file flipped, or a line of it said again."""
    blob = bytearray(file.read_bytes())
    if how == "flip":
        blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    elif how == "fraction":  # a low bit of a weight: it stays a number, of about the same value
        at = 8 + int.from_bytes(blob[:8], "little")
        blob[rng.randrange(at, len(blob), 4)] ^= 1 << rng.randrange(4)
    else:
        blob += rng.choice(blob.splitlines()) + b"\n"
    file.write_bytes(blob)


def try_changes(home, state, name, how, trials, monkeypatch):
    """(changes that a command refused, its errors); what it changes is put back."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    program, argv = home.commands[state]
    file, kept, found = home.path / name, home.path / "kept", []
    whole, rng = file.read_bytes(), random.Random(f"{state}/{name}/{trials}")
    folder = home.path / ("stopped" if state == "stopped" else "finished")
    shutil.copytree(folder, kept)
    try:
        for _ in range(trials):
            change(file, how, rng)
            before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            status, error = runs.call(program, argv)
            if status:
                lines = [line for line in error.splitlines() if line.startswith("error: ")]
                assert status == 2 and len(lines) == 1 and "Traceback" not in error
                found += lines
                after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                assert {x for x in after if after[x] != before.get(x)} <= {folder / "run.lock"}
            file.write_bytes(whole)
            shutil.rmtree(folder)
            shutil.copytree(kept, folder)
    finally:
        shutil.rmtree(kept)
    return found


QUICK = [("finished", "candidates.jsonl", "line", "--candidates"),
         ("evaluated", "world/model/model.safetensors", "flip", "--model"),
         ("stopped", f"earlier/{WEIGHTS}", "fraction", "")]
SLOW = [("stopped", "candidates.jsonl", "line", "--candidates"),
        ("finished", "world/model/model.safetensors", "flip", "--model"),
        ("stopped", "world/model/model.safetensors", "flip", "--model"),
        ("finished", "world/model/tokenizer.model", "flip", "--model"),
        ("finished", "world/tasks/colour.json", "flip", "--tasks"),
        ("stopped", "world/paraphrases.json", "flip", "--paraphrases"),
        ("finished", f"earlier/{WEIGHTS}", "flip", ""),
        ("stopped", f"earlier/{WEIGHTS}", "flip", ""),
        ("finished", f"finished/{WEIGHTS}", "flip", "its result"),
        ("evaluated", f"finished/{WEIGHTS}", "fraction", "its result"),
        ("evaluated", "finished/adapter_config.json", "flip", "its result")]


@pytest.mark.parametrize("trials", [16])
@pytest.mark.parametrize("state, name, how, what", [
    *QUICK, *(pytest.param(*row, marks=FAULTS) for row in SLOW)])
def test_a_changed_file_is_refused_by_its_name(state, name, how, what, trials, home, monkeypatch):
    found = try_changes(home, state, name, how, trials, monkeypatch)
    assert len(found) == trials
    if how == "flip" and not name.endswith("safetensors"):
        assert all(str(home.path) in line for line in found)  # or it cannot be read at all
        return
    end = "Restore it, or delete "
    for line in found:
        assert f"{home.path / name} is not as it was when {home.path}/" in line and end in line
        assert f" was trained ({what}" in line


@pytest.mark.parametrize("state, name", [
    ("stopped", f"earlier/{WEIGHTS}"), ("finished", "candidates.jsonl"),
    pytest.param("evaluated", "world/model/model.safetensors", marks=FAULTS),
    pytest.param("evaluated", f"finished/{WEIGHTS}", marks=FAULTS)])
def test_without_identities_such_changes_go_unnoticed(state, name, home, monkeypatch):
    """The control: folders as the first version and --plain leave them. They are read."""
    places = [home.path / folder for folder in ("earlier", "finished", "stopped")]
    kept = {place / identity.FILE: (place / identity.FILE).read_bytes() for place in places}
    states = sorted(home.path.glob("stopped/checkpoints/*/state.json"))
    for path in kept:
        path.unlink()
    monkeypatch.setattr(identity, "refuse_changes", lambda *args: None)  # in checkpoints
    try:
        assert runs.call(*home.commands["finished"]) == (0, "") and states
        how = "line" if name.endswith("jsonl") else "fraction"
        assert len(try_changes(home, state, name, how, 4, monkeypatch)) < 4
    finally:
        for path, blob in kept.items():
            path.write_bytes(blob)


def test_what_did_not_change_is_found(home):
    for state in ("finished", "evaluated"):
        assert runs.call(*home.commands[state])[0] == 0


def test_metrics_name_the_bytes_that_they_are_of(home):
    assert runs.call(*home.commands["evaluated"])[0] == 0
    found = json.loads((home.path / "eval/metrics.json").read_text())
    base, tuned = found["model"]["inputs"], found[f"{home.path}/finished"]["inputs"]
    file = home.path / "world/model/model.safetensors"
    assert base["--model"]["model.safetensors"] == identity.checksum(file)
    assert base["--tasks"].keys() == {"colour.json", "person.json"} and "--adapter" not in base
    file = home.path / "finished" / WEIGHTS
    assert tuned["--adapter"][WEIGHTS] == identity.checksum(file)
    assert tuned["machine"]["threads"] == 1 and tuned["machine"]["torch"] == torch.__version__
    assert len(tuned["machine"]["program"]) == 12


def test_an_adapter_over_another_base_is_refused(home, tmp_path):
    """Of the same shape, in another folder."""
    shutil.copytree(home.path / "world/model", tmp_path / "other")
    change(tmp_path / "other/model.safetensors", "fraction", random.Random(1))
    program, argv = home.commands["evaluated"]
    status, error = runs.call(program, [*argv[:1], f"{tmp_path}/other", *argv[2:]])
    assert status == 2 and f"{tmp_path}/other/model.safetensors is not as it was when " in error
    status, error = runs.call(program, [*argv[:1], f"{tmp_path}/other", *argv[2:-2]])
    assert status == 0  # the base alone


def test_another_number_of_threads_is_said_once(home, tmp_path, capsys, monkeypatch):
    """And so is another version of torch; the identity keeps both."""
    shutil.copytree(home.path / "stopped", tmp_path / "run")
    argv = [*home.commands["stopped"][1][:-1], str(tmp_path / "run")]
    torch.set_num_threads(2)
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    try:
        assert train.main(argv) == 0
    finally:
        torch.set_num_threads(1)
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: ")]
    now = json.loads((home.path / "stopped" / identity.FILE).read_text())["machine"]["torch"]
    assert said == [f"warning: {tmp_path}/run was begun with threads 1, now 2; torch {now[0]}, now "
                    "0.0.1. What follows is rounded in another way than in a run that was never "
                    "stopped."]
    found = json.loads((tmp_path / "run" / identity.FILE).read_text())["machine"]
    assert found["threads"] == [1, 2] and found["torch"] == [*now, "0.0.1"]
    assert found["device"] == ["cpu"]


def test_another_version_of_torch_is_said_of_what_is_found(home, capsys, monkeypatch):
    """Once, and the run is used."""
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    program, argv = home.commands["finished"]
    now = json.loads((home.path / "finished" / identity.FILE).read_text())["machine"]["torch"][-1]
    assert program.main(argv) == 0
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ")]
    assert said == [f"note: {home.path}/finished was trained with torch {now}, now 0.0.1. It is "
                    "used as it is."]


@pytest.mark.parametrize("init", ["", "before"])
def test_the_reward_model_beside_ppo_is_an_input(init, tmp_path):
    """Found where the stage finds it: in the folder of --init, or in that of the run."""
    home = tmp_path / (init or "run")
    (home / "reward").mkdir(parents=True)
    for name in ("adapter_config.json", "value_head.safetensors"):
        (home / "reward" / name).write_bytes(bytes(100))
    cfg = settings.parse_config(["--stage", "ppo", "--out", f"{tmp_path}/run"])[0]
    cfg.init = init and str(home)
    (tmp_path / "run").mkdir(exist_ok=True)
    identity.record_inputs(SimpleNamespace(cfg=cfg, folder=tmp_path / "run", say=print), None)
    identity.check_inputs(tmp_path / "run", cfg)
    change(home / "reward/value_head.safetensors", "flip", random.Random(2))
    with pytest.raises(ValueError, match="reward/value_head.safetensors is not as it was when .*"
                                         "the stage beside it"):
        identity.check_inputs(tmp_path / "run", cfg)


# ----- All flags that name a file -----

def test_every_flag_that_names_a_file_is_an_input():
    """But for `init`, whose adapter is the earlier stage, and the certificates of a server."""
    named = set()
    for stage in finding.stages():
        for item in dataclasses.fields(settings.config_class(finding.find_method(stage),
                                                             server=True)):
            named |= {item.name} if item.metadata.get("path") else set()
    assert named - {"init", "judge_ca"} <= set(identity.FLAGS)
    assert set(identity.FLAGS) - named == {"critic"}  # which may also be `http`


def test_each_of_several_files_is_an_input(tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        file.write_text("{}")
    cfg = SimpleNamespace(stage="sft", examples=list(map(str, files)), model="")
    assert identity.find_inputs(cfg) == {"--examples": files[0], "--examples 2": files[1]}


@pytest.mark.parametrize("trials", [20])
@pytest.mark.parametrize("flag", identity.FLAGS)
def test_any_change_of_any_input_is_refused(flag, trials, tmp_path):
    """Bytes changed, files added and files removed, in a file or a folder."""
    rng, what = random.Random(flag), "--" + flag.replace("_", "-")
    for trial in range(trials):
        place, run = tmp_path / str(trial), tmp_path / f"run{trial}"
        files = [place]
        if flag in ("model", "tasks", "reward_model", "critic"):
            files = [place / f"adapter_{k}.json" for k in range(3)]
        for file in [run / "log.jsonl", *files]:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(rng.randbytes(30))
        cfg = SimpleNamespace(stage="sft", out=str(run), device="cpu", dtype="auto",
                              **{flag: str(place)})
        said = []
        identity.record_inputs(SimpleNamespace(cfg=cfg, folder=run, say=said.append), None)
        identity.check_inputs(run, cfg)  # nothing has changed
        file = rng.choice(files)
        how = rng.choice(("flip", "line", "removed", "added")[:2 * len(files)])
        if how == "removed":
            file.unlink()
        elif how == "added":
            file = place / "adapter_new.json"
            file.write_text("")
        else:
            change(file, how, rng)
        with pytest.raises(ValueError) as stop:
            identity.check_inputs(run, cfg)
        assert str(stop.value) == (
            f"{file} is not as it was when {run} was trained ({what}). Restore it, or delete "
            f"{run / identity.FILE} to go on all the same.") and not said


@pytest.mark.parametrize("text", ["[]", "3", '{"inputs": 3}', '{"result": []}', "{"])
def test_a_damaged_identity_is_named(text, home, tmp_path):
    shutil.copytree(home.path / "finished", tmp_path / "run")
    (tmp_path / "run" / identity.FILE).write_text(text)
    status, error = runs.call(train, [*home.commands["finished"][1][:-1], str(tmp_path / "run")])
    assert status == 2 and error.count("\n") == 1 and f"{tmp_path}/run/identity.json" in error
