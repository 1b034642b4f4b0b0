"""What is written is there completely or not at all: failing disks, kills while saving, locks."""

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import short_runs as runs
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from extras.runtime import checkpoint, files, guard

FAULTS = pytest.mark.faults


def kill_later(work, delay: float) -> int:
    """A child does work(say), where say(number) is heard here at once; it is killed after `delay`.

    The last number that it said, or -1.
    """
    read, write = os.pipe()
    child = runs.fork(lambda: work(lambda number: os.write(write, f"{number}\n".encode())))
    os.close(write)
    time.sleep(delay)
    runs.kill(child)
    with os.fdopen(read) as stream:
        return int((stream.read().split() or ["-1"])[-1])


# ----- One folder -----

@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_are_synced_before_they_get_their_names(umask, tmp_path, monkeypatch):
    """And have the mode that the umask gives them."""
    calls, old = [], os.umask(umask)
    for name in ("fsync", "rename"):
        real = getattr(os, name)

        def note(*args, name=name, real=real):
            path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else args[0]
            calls.append((name, str(path)))
            return real(*args)
        monkeypatch.setattr(os, name, note)

    def save(part):
        (part / "sub").mkdir()
        safetensors.torch.save_file({"x": torch.ones(1)}, part / "sub/a")
        (part / "b").write_text("b")
    part, target = tmp_path / ".tmp-1", tmp_path / "there"
    try:
        files.write_folder(part, save, lambda part: os.rename(part, target))
    finally:
        os.umask(old)
    renamed = calls.index(("rename", str(part)))
    wanted = {str(path) for path in (part, part / "sub", part / "sub/a", part / "b")}
    assert {path for name, path in calls[:renamed]} == wanted
    assert calls[renamed + 1:] == [("fsync", str(tmp_path))] and not part.exists()
    modes = {path.stat().st_mode & 0o777 for path in target.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def test_what_tells_that_a_stage_is_finished_comes_last(tmp_path, monkeypatch):
    moved, real = [], os.replace
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").write_text("")

    def replace(path, target):
        assert (tmp_path / "checkpoints").exists()
        moved.append(Path(target).name)
        real(path, target)

    def save(part):
        (part / "model").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors", "model/config.json",
                     "value_head.safetensors"):
            (part / name).write_text(name)
    monkeypatch.setattr(os, "replace", replace)
    guard.Guard(None).write(tmp_path, save)
    assert set(moved[:2]) == {"adapter_model.safetensors", "value_head.safetensors"}
    assert set(moved[2:]) == {"adapter_config.json", "model"}
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {*moved, "model/config.json"}


def test_a_run_folder_may_be_a_link(command, unstopped, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert train.main(command("sft", tmp_path / "link")) == 0
    wanted = unstopped("sft", command("sft", ""), tmp_path / "unstopped")[0]
    assert runs.read_results(tmp_path / "real") == wanted


@pytest.mark.parametrize("place", ["file", "file/below", "link to nowhere", "link to nowhere/x"])
@pytest.mark.parametrize("program", [train, evaluation])
def test_a_place_that_cannot_be_written_to_is_one_line(program, place, world, arguments, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link to nowhere").symlink_to("/proc/none")
    argv = arguments(tmp_path / place, "--stage", "sft", "--steps", "1")
    if program is evaluation:
        argv = [*argv[:8], "--per-task", "1", "--wordings", "2", "--max-new-tokens", "2"]
    status, error = runs.call(program, argv)
    line, = [line for line in error.splitlines() if line.startswith("error: ")]
    assert status in (1, 2) and str(tmp_path / place.split("/")[0]) in line or "/proc/none" in line
    assert (tmp_path / "file").read_text() == "mine" and "Traceback" not in error


# ----- Disks that fail -----

FAILURES = {"no room": OSError(28, "No space left on device", "x"),
            "a bad disk": OSError(5, "Input/output error", "x"),
            "no permission": OSError(13, "Permission denied", "x"),
            "a second Ctrl-C": guard.Stopped(signal.SIGINT, "")}


@pytest.mark.parametrize("call, times, failure", [
    ("rename", 1, "no room"), ("rename", 1, "a second Ctrl-C"),
    *(pytest.param(call, times, failure, marks=FAULTS) for failure in FAILURES
      for call, times in (("mkdir", 1), ("open", 8), ("chmod", 5), ("fsync", 7)))])
def test_a_save_that_fails_leaves_the_one_before(call, times, failure, command, unstopped,
                                                 tmp_path, monkeypatch, capsys):
    """The n-th such call of a save fails, n = 1, 2, ...: one sentence, and the run can go on."""
    failed, error, real = 0, FAILURES[failure], getattr(os, call)
    wanted = unstopped("sft", command("sft", ""), tmp_path / "unstopped")[0]
    for n in range(1, 12):
        out, count, saving = tmp_path / str(n), [0], [False]
        argv, real_write = command("sft", out), checkpoint.write_checkpoint

        def fail_once(*args, n=n, count=count, saving=saving, **more):
            count[0] += saving[0]
            if saving[0] and count[0] == n:
                raise error
            return real(*args, **more)

        def write(run, tensors, items, books, saving=saving, real_write=real_write):
            saving[0] = books["step"] == 4
            try:
                real_write(run, tensors, items, books)
            finally:
                saving[0] = False
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail_once)
            patch.setattr(checkpoint, "write_checkpoint", write)
            status = train.main(argv)
        said = capsys.readouterr().err
        if status == 0:
            break
        failed += 1
        assert said.count("\n") == 1 and status == (1 if isinstance(error, OSError) else 130)
        if isinstance(error, OSError):
            assert f": {error.strerror}. What was finished is kept" in said
        assert not list((out / "checkpoints").glob(".tmp-*"))
        assert checkpoint.find_checkpoint(out)
        assert train.main(argv) == 0 and runs.read_results(out) == wanted
    assert failed == times


@pytest.mark.parametrize("name, size", [
    ("sft", 20_000), ("sft", 70_000), ("cut", 3000),
    *(pytest.param(name, size, marks=FAULTS) for name in ("sft", "cat", "cut")
      for size in range(2500, 60_000, 4000))])
def test_a_full_disk_is_one_sentence_and_loses_nothing(name, size, command, unstopped, tmp_path,
                                                       capfd):
    """No file may grow beyond `size` bytes. With room again the same command ends as it should."""
    out = tmp_path / "run"
    argv, wanted = command(name, out), unstopped(name, command(name, ""), tmp_path / "u")[0]
    capfd.readouterr()

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return train.main(argv)
    status, error = runs.wait_for(runs.fork(work), time.time() + 99), capfd.readouterr().err
    assert status == 1 and error.count("\n") == 1 and "too large" in error.lower(), error
    assert error.startswith("error: ") and str(out) in error
    assert not list(tmp_path.rglob(".tmp-*"))
    assert train.main(argv) == 0 and runs.read_results(out) == wanted


# ----- Kills while a checkpoint is written -----

def save_in_place(run, tensors, items, books):
    """The control: what many programs do."""
    place = run.folder / "checkpoints" / f"step-{books['step']:06d}"
    place.mkdir(parents=True)
    for name, found in zip(checkpoint.TENSORS, tensors, strict=True):
        safetensors.torch.save_file(found, place / f"{name}.safetensors")
    (place / "state.json").write_text(json.dumps(books))
    for old in checkpoint.saved_steps(run.folder)[checkpoint.KEPT:]:
        shutil.rmtree(old)


class FakeRun:
    """What a checkpoint reads of a run."""

    def __init__(self, folder):
        self.folder, self.memory, self.cfg, self.guard = folder, {}, None, guard.Guard(None)
        self.method = SimpleNamespace(phase=lambda cfg: 0)
        self.model = torch.nn.Linear(300, 300)


def last_is_whole(run, step: int) -> bool:
    """Whether the newest checkpoint is of one step, and of `step` or a later one."""
    try:
        place = checkpoint.find_checkpoint(run.folder)
        if place is None:
            return step <= 0
        steps = {float(json.loads((place / "state.json").read_text())["step"])}
        for name in ("weights", "optimizer", "random"):
            for value in load_file(place / f"{name}.safetensors").values():
                steps |= set() if name == "random" else {float(value.min()), float(value.max())}
        return len(steps) == 1 and max(steps) >= step
    except (OSError, ValueError, safetensors.SafetensorError):
        return False


@pytest.mark.parametrize("how, trials", [
    ("ours", 8), ("in place", 200), pytest.param("ours", 312, marks=FAULTS)])
def test_kills_while_saving_leave_the_last_checkpoint_whole(how, trials, tmp_path, monkeypatch):
    """A child saves without end. The control stops when it has failed."""
    run, rng, bad, most = FakeRun(tmp_path), random.Random(trials), 0, 0
    weights = dict(run.model.named_parameters())
    optimizer = torch.optim.AdamW(weights.values())  # whose imports take longer than a child lives
    if how == "in place":
        monkeypatch.setattr(checkpoint, "write_checkpoint", save_in_place)
        monkeypatch.setattr(checkpoint, "find_checkpoint",
                            lambda folder: (checkpoint.saved_steps(folder) or [None])[0])

    def work(say):
        for step in range(1, 10**6):
            for weight in weights.values():
                weight.data.fill_(step)
                optimizer.state[weight] = {"exp_avg": torch.full_like(weight, step)}
            checkpoint.save_checkpoint(run, optimizer, [], {"step": step})
            say(step)
    for _ in range(trials):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        last = kill_later(work, rng.uniform(0.05, 0.2))
        bad, most = bad + (not last_is_whole(run, last)), max(most, last)
        if how != "ours" and bad:
            break
    assert most > 1 and (bad == 0 if how == "ours" else bad), f"{bad} of {trials}"


# ----- One process per run folder -----

def test_a_folder_in_use_is_refused_until_its_process_ends(command, tmp_path, capsys):
    out = tmp_path / "run"

    def hold():
        lock = guard.take_lock(out)
        time.sleep(99)
        lock.close()
    holder = runs.fork(hold)
    while not (out / "run.lock").exists() or not (out / "run.lock").read_text():
        time.sleep(0.01)
    assert train.main(command("sft", out)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{out} is in use by process {holder} on " in error
    assert {path.name for path in out.iterdir()} == {"run.lock"}
    runs.kill(holder)
    assert train.main(command("sft", out)) == 0  # after kill -9 the lock is free


def test_two_processes_that_start_at_once_share_no_folder(tmp_path):
    """Twenty times: one has the folder, the other is told; killed, it leaves the folder free."""
    for trial in range(20):
        children, reports = [], []

        def work(write, folder=tmp_path / str(trial)):
            try:
                lock = guard.take_lock(folder)
                os.write(write, b"has it")
                signal.pause()
                lock.close()
            except ValueError as error:
                os.write(write, str(error).encode())
            return 0
        for _ in range(2):
            read, write = os.pipe()
            children.append(runs.fork(lambda write=write: work(write)))
            os.close(write)
            reports.append(read)
        heard = sorted(os.read(read, 500).decode() for read in reports)
        for child in children:
            runs.kill(child)
        assert heard[1] == "has it" and " is in use by " in heard[0], heard
        guard.take_lock(tmp_path / str(trial)).close()
