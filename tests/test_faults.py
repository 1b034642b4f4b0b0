"""Faults: runs killed at any moment go on to the very same bytes; damage, a second process and bad numbers are told in one sentence.

The short ones run with the suite; `pytest -m faults` runs all of them, with more trials.
"""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

import chatserver
import data
import eval as evaluation
import losses
import train
from test_train import JUDGED, ROOT, arguments, cat, judged, planted, world     # noqa: F401


@pytest.fixture(autouse=True)
def one_thread():
    """As a child process has it; the other tests put no weight on it."""
    torch.set_num_threads(1)


def without_times(log: Path) -> str:
    """The rows of a log without what the clock says."""
    return "\n".join(json.dumps({k: v for k, v in json.loads(line).items() if k != "seconds"}) for line in log.read_text().splitlines())


def leftovers(out: Path) -> dict[str, bytes | str]:
    """What a run leaves: adapters, heads, records and logs of it and of every stage and round under it."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.name in ("adapter_model.safetensors", "value_head.safetensors", "model.safetensors", *train.RECORDS):
            found[name] = path.read_bytes()
        elif path.name == "log.jsonl":
            found[name] = without_times(path)
    return found


def forked(argv: list[str]) -> int:
    """A child that runs train.py and has torch imported already: its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            status = train.main(argv)
        finally:
            os._exit(status)
    return child


def lives(argv: list[str], delays, *, limit: float = 240) -> tuple[int, int]:
    """Run train.py in children forked from this process, killing them after each delay, until one ends: (kills, exit status)."""
    kills = 0
    for delay in [*delays, None]:
        child = forked(argv)
        end = time.time() + (limit if delay is None else delay)
        while time.time() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return kills, os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    raise AssertionError(f"no life of {argv} ended within {limit} s")


RUNS = {
    "sft": ["--stage", "sft", "--steps", "12", "--batch-size", "4", "--dropout", "0.1", "--micro-tokens", "120", "--no-evaluate", "--save-every", "1"],
    "cut": ["--stage", "cut", *JUDGED[:2], "--steps", "8", *JUDGED[4:], "--dropout", "0.1", "--no-evaluate", "--save-every", "1"],
    "rounds": ["--stage", "cut", *JUDGED[:2], "--steps", "6", *JUDGED[4:], "--rounds", "2", "--no-evaluate", "--save-every", "2"],
    "cat": ["--stage", "cat", "--steps", "8", "--sft-steps", "4", "--batch-size", "4", "--dropout", "0.1", "--no-compare", "--no-evaluate", "--save-every", "1"],
    "dpo": ["--stage", "dpo", "--steps", "8", "--sft-steps", "4", "--batch-size", "4", "--no-compare", "--no-evaluate", "--save-every", "1"],
    "ppo": ["--stage", "ppo", "--steps", "12", "--sft-steps", "4", "--batch-size", "4", "--rollouts", "8", "--no-fit-reward", "--judge", "rule", "--pool-per-task", "4",
            "--wordings", "3", "--kl-target", "0.1", "--no-compare", "--no-evaluate", "--save-every", "1"],
    "full": ["--stage", "sft", "--steps", "6", "--batch-size", "4", "--full", "--no-evaluate", "--save-every", "1"],
}


def command(world, out, name):                              # noqa: F811
    """A run of RUNS with its files."""
    more = ["--candidates", str(world / "candidates.jsonl")] if name in ("cat", "dpo") else []
    if more and not (world / "candidates.jsonl").exists():
        planted(world, world / "candidates.jsonl")
    return [*arguments(world, out), *RUNS[name], *more]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):                         # noqa: F811
    """name -> (what its run leaves when nothing stops it, seconds), made once."""
    made = {}

    def run(name):
        if name not in made:
            torch.set_num_threads(1)
            out, start = tmp_path_factory.mktemp(name), time.time()
            assert lives(command(world, out, name), []) == (0, 0)
            made[name] = leftovers(out), time.time() - start
        return made[name]
    return run


# Resume --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("sft", "ppo") else pytest.mark.faults) for name in RUNS])
def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(name, world, whole, tmp_path):     # noqa: F811
    wanted, seconds = whole(name)
    seed = random.randrange(10**6)
    delays = [random.Random(f"{seed}/{k}").uniform(0.05, 0.7) * seconds for k in range(3)]
    kills, status = lives(command(world, tmp_path, name), delays)
    assert status == 0, f"seed {seed}"
    assert leftovers(tmp_path) == wanted, f"seed {seed}, {kills} kills after {delays}"
    assert not list(tmp_path.rglob("checkpoints"))          # a finished stage has removed them


def test_checkpoints_that_a_kill_left_beside_a_finished_stage_are_removed(world, tmp_path):     # noqa: F811
    argv = [*arguments(world, tmp_path), "--stage", "sft", "--steps", "2", "--batch-size", "4", "--no-evaluate", "--save-every", "1"]
    assert train.main(argv) == 0
    (tmp_path / "checkpoints/step-000002").mkdir(parents=True)
    assert train.main(argv) == 0 and not (tmp_path / "checkpoints").exists()


class Stopped(BaseException):
    """Ends a run at a chosen step, as a kill does."""


def stop_after(monkeypatch, step: int) -> None:
    """train.train dies when the log has `step` rows of the run's own stage; whatever was saved before stays."""
    real = train.log_step

    def log_step(path, cfg, number, *rest, **more):
        real(path, cfg, number, *rest, **more)
        if path.parent == Path(cfg.out) and not path.parent.name.startswith("sft") and number + 1 == step:
            raise Stopped
    monkeypatch.setattr(train, "log_step", log_step)


@pytest.mark.parametrize("name, steps", [("cat", (1, 3, 7)), ("ppo", (2, 4, 5, 11)), ("cut", (5,)), ("full", (3,)), ("dpo", (4,))])
def test_a_run_stopped_at_each_step_resumes_there(name, steps, world, whole, tmp_path, monkeypatch, capsys):     # noqa: F811
    """In the middle of an epoch, of a phase, and at a phase's border: the row after the last checkpoint is run again."""
    wanted, _ = whole(name)
    for step in steps:
        out = tmp_path / str(step)
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, step)
            train.main(command(world, out, name))
        saved = train.saved_steps(out)
        assert len(saved) == min(step - 1, train.KEPT) and not list(out.rglob(".*.part"))
        capsys.readouterr()
        assert train.main(command(world, out, name)) == 0
        assert (f"resuming at step {step - 1}." in capsys.readouterr().out) == (step > 1)
        assert leftovers(out) == wanted


@pytest.mark.parametrize("what", ["weights", "moments", "adam's step", "random state", "beta", "phase"])
def test_whatever_a_checkpoint_leaves_out_is_missed(what, world, whole, tmp_path, monkeypatch):     # noqa: F811
    """The control: with one part of the state not restored the same comparison fails."""
    name, step = ("ppo", 4) if what in ("beta", "phase") else ("sft", 7)
    wanted, _ = whole(name)
    argv = command(world, tmp_path, name)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, step + 1)
        train.main(argv)
    real_load = train.load_checkpoint

    def load(run, optimizer, place, groups):
        before = {name: p.detach().clone() for name, p in train.trained(run.model).items()}
        state = torch.get_rng_state()
        found = real_load(run, optimizer, place, groups)
        if what == "weights":
            with torch.no_grad():
                for key, p in train.trained(run.model).items():
                    p.copy_(before[key])
        for slots in optimizer.state.values():
            if what == "moments":
                slots["exp_avg_sq"] = slots["exp_avg_sq"].bfloat16().float()
            if what == "adam's step":
                slots["step"] = torch.zeros_like(slots["step"])
        if what == "random state":
            torch.set_rng_state(state)
        if what == "beta":
            run.memory["beta"] = run.cfg.kl_beta
        if what == "phase":
            run.memory["phase"] = 0
        return found
    monkeypatch.setattr(train, "load_checkpoint", load)
    assert train.main(argv) == 0
    assert leftovers(tmp_path) != wanted


@pytest.fixture(scope="module")
def stopped_run(world, tmp_path_factory):                   # noqa: F811
    """The folder of a run that was stopped behind the checkpoints of its steps 5 and 6."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        torch.set_num_threads(1)
        stop_after(patch, 7)
        train.main(command(world, out, "sft"))
    assert [place.name for place in train.saved_steps(out)] == ["step-000006", "step-000005"]
    return out


@pytest.fixture()
def stopped(stopped_run, world, tmp_path):                  # noqa: F811
    """The command that goes on with a copy of it."""
    shutil.copytree(stopped_run, tmp_path, dirs_exist_ok=True)
    return command(world, tmp_path, "sft")


def spoil(file: Path, how: str) -> None:
    """Damage a file."""
    blob = file.read_bytes()
    if how == "deleted":
        return file.unlink()
    middle = len(blob) // 2
    file.write_bytes({"empty": b"", "cut": blob[:-1], "flipped": blob[:middle] + bytes([blob[middle] ^ 1]) + blob[middle + 1:]}[how])


SAVED = ("weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "manifest.json")
QUICK = {("weights.safetensors", "flipped"), ("optimizer.safetensors", "deleted"), ("state.json", "cut"), ("manifest.json", "empty")}


@pytest.mark.parametrize("name, how", [pytest.param(name, how, marks=() if (name, how) in QUICK else pytest.mark.faults)
                                       for name in SAVED for how in ("deleted", "empty", "cut", "flipped") if (name, how) != ("manifest.json", "flipped")])
def test_a_damaged_checkpoint_is_told_and_passed_over(name, how, stopped, whole, tmp_path, capsys):
    spoil(tmp_path / "checkpoints/step-000006" / name, how)
    (tmp_path / "checkpoints/.tmp-000007-1").mkdir()        # of a process that was killed while it wrote
    assert train.main(stopped) == 0
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and f"warning: checkpoint step-000006 is incomplete ({name}" in said
    assert "resuming from step-000005." in said and "resuming at step 5." in said
    assert leftovers(tmp_path) == whole("sft")[0] and not (tmp_path / "checkpoints").exists()


def test_no_whole_checkpoint_is_one_sentence(stopped, tmp_path, capsys):
    for place in train.saved_steps(tmp_path):
        spoil(place / "optimizer.safetensors", "flipped")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert train.main(stopped) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no checkpoint in" in error and "optimizer.safetensors: checksum differs" in error
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "run.lock"}


@pytest.mark.parametrize("change, sentence", [
    (["--lr", "0.1"], "lr was 0.0002, now 0.1"), (["--seed", "7"], "seed was 0, now 7"), (["--rank", "4"], "rank was 16, now 4"), (["--steps", "13"], "steps was 12, now 13"),
    (["--stage", "sft-ia"], "stage was sft, now sft-ia")])
def test_other_settings_do_not_go_on_with_a_checkpoint(change, sentence, stopped, tmp_path, capsys):
    assert train.main([*stopped, *change]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and sentence in error and train.saved_steps(tmp_path)


def test_settings_that_change_no_result_may_change(stopped, whole, tmp_path):
    assert train.main([*stopped, "--save-every", "0"]) == 0
    assert leftovers(tmp_path) == whole("sft")[0]


def test_changed_inputs_and_a_lost_log_are_refused(stopped, world, tmp_path, capsys):     # noqa: F811
    shutil.copytree(world / "tasks", tmp_path / "tasks")
    file = tmp_path / "tasks/colour.json"
    file.write_text(file.read_text().replace("hat 1", "cap 1"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tasks": str(tmp_path / "tasks")}))     # the same path, other bytes
    place = stopped.index("--tasks") + 1
    assert train.main([*stopped[:place], str(tmp_path / "tasks"), *stopped[place + 1:]]) == 2
    assert "was trained on other documents than these inputs give" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "log.jsonl").unlink()
    assert train.main(stopped) == 2 and "log.jsonl is shorter than when the last checkpoint was written" in capsys.readouterr().err


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_are_synced_before_their_folder_is_renamed_and_have_the_umasks_mode(umask, world, tmp_path, monkeypatch):     # noqa: F811
    calls, old = [], os.umask(umask)
    for name in ("fsync", "rename", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append((name, os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync"
                                                                                         else str(args[0]))), real(*args))[1])
    real_rmtree, modes = shutil.rmtree, set()

    def rmtree(path, *args, **more):
        modes.update(file.stat().st_mode & 0o777 for file in Path(path).rglob("*.*") if file.is_file())
        real_rmtree(path, *args, **more)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    try:
        argv = command(world, tmp_path, "sft")
        argv[argv.index("--save-every") + 1] = "6"
        assert train.main(argv) == 0
    finally:
        os.umask(old)
    assert modes == {0o666 & ~umask}
    renamed = next(i for i, (name, path) in enumerate(calls) if name == "rename" and ".tmp-" in path)
    part = calls[renamed][1]
    assert calls[renamed - 1] == ("fsync", part) and calls[renamed + 1] == ("fsync", str(tmp_path / "checkpoints"))
    synced = {Path(path).name.lstrip(".").split(".")[0] for name, path in calls[:renamed] if name == "fsync" and Path(path).parent == Path(part)}
    assert synced == {"weights", "optimizer", "random", "state", "manifest"}
    assert Path([path for name, path in calls[:renamed] if name == "replace" and path.startswith(part)][-1]).name.startswith(".manifest.json")    # last


FAILURES = {"no room": OSError(28, "No space left on device", "x"), "a bad disk": OSError(5, "Input/output error", "x"),
            "no permission": PermissionError(13, "Permission denied", "x"), "a second Ctrl-C": train.Stopped(signal.SIGINT)}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("call", [pytest.param("fsync", marks=pytest.mark.faults), pytest.param("replace", marks=pytest.mark.faults),
                                  pytest.param("touch", marks=pytest.mark.faults), "rename", "mkdir"])
def test_a_save_that_fails_leaves_the_one_before(call, failure, world, whole, tmp_path, monkeypatch, capsys, record_property):     # noqa: F811
    """The n-th such call of a save fails, n = 1, 2, ...: one sentence, and the next run goes on from the last whole one."""
    failed, error = 0, FAILURES[failure]
    for n in range(1, 12):
        out, count = tmp_path / str(n), [0]
        argv = command(world, out, "sft")
        with monkeypatch.context() as patch:
            owner = Path if call in ("mkdir", "touch") else os
            real, real_write = getattr(owner, call), train.write_checkpoint

            def broken(*args, **more):
                if count[0] >= 0 and saving[0]:
                    count[0] += 1
                    if count[0] == n:
                        raise error
                return real(*args, **more)
            saving = [False]

            def write(run, stage, tensors, groups, done):
                saving[0] = done["step"] == 4
                try:
                    real_write(run, stage, tensors, groups, done)
                finally:
                    saving[0] = False
            patch.setattr(owner, call, broken)
            patch.setattr(train, "write_checkpoint", write)
            status = train.main(argv)
        said = capsys.readouterr().err
        if status == 0:
            break
        failed += 1
        assert status == (1 if isinstance(error, OSError) else 130) and said.count("\n") == 1
        assert (f": {error.strerror}. What was finished is kept" if isinstance(error, OSError) else "stopped by SIGINT") in said
        assert train.find_checkpoint(out) and not list((out / "checkpoints").glob(".tmp-*"))
        assert train.main(argv) == 0 and leftovers(out) == whole("sft")[0]
    record_property("trials", failed)
    assert failed == {"fsync": 7, "replace": 5, "touch": 5, "rename": 1, "mkdir": 1}[call]


def test_a_run_folder_may_be_a_link(world, whole, tmp_path):             # noqa: F811
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert train.main(command(world, tmp_path / "link", "sft")) == 0 and leftovers(tmp_path / "real") == whole("sft")[0]


@pytest.mark.parametrize("trials", [2, pytest.param(5, marks=pytest.mark.faults)])
def test_answers_collected_before_a_kill_are_not_sampled_again(trials, world, tmp_path, record_property):     # noqa: F811
    """200 answers in chunks of 16: after each kill all whole chunks are there, and the file ends as it does without kills, byte by byte."""
    def argv(out):
        return ["--stage", "cat", *arguments(world, out), "--judge", "length", "--pool-per-task", "10", "--pool-wordings", "3", "--samples", "4", "--wordings", "3",
                "--eval-batch", "4", "--sft-steps", "2", "--steps", "2", "--batch-size", "4", "--no-compare", "--no-evaluate"]
    assert lives(argv(tmp_path / "whole"), []) == (0, 0)
    wanted, total = (tmp_path / "whole/candidates.jsonl").read_bytes(), 0
    assert wanted.count(b"\n") >= 200
    for trial in range(trials):
        out, kills = tmp_path / str(trial), 0
        for share in sorted(random.uniform(0.1, 0.9) for _ in range(2)):
            goal, path, before, child = share * len(wanted), out / "candidates.jsonl", -1, forked(argv(out))
            while os.waitpid(child, os.WNOHANG) == (0, 0) and (not path.exists() or path.stat().st_size < goal):
                before = max(before, path.stat().st_size if path.exists() else 0)
                time.sleep(0.001)
            try:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
            except (ProcessLookupError, ChildProcessError):              # it has ended already
                pass
            assert wanted.startswith(path.read_bytes()) and path.stat().st_size >= max(goal, before)
        assert lives(argv(out), []) == (0, 0) and path.read_bytes() == wanted
        total += kills
    assert total                                            # a busy machine may let some runs end before they are seen
    record_property("trials", total)


# Kills at random moments, of what saves and of what records ----------------------------------------------------------


def killed(work, delay: float) -> int:
    """Fork a child that does work(say), where say(number) reaches this process at once; kill it after `delay`; the last number it said, or -1."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work(lambda number: os.write(write, f"{number}\n".encode()))
        finally:
            os._exit(70)
    os.close(write)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(read) as stream:
        return int((stream.read().split() or ["-1"])[-1])


def saved_in_place(run, stage, tensors, groups, done):
    """The control: what many programs do."""
    place = run.folder / "checkpoints" / f"step-{done['step']:06d}"
    place.mkdir(parents=True)
    for name, found in tensors.items():
        safetensors.torch.save_file(found, place / f"{name}.safetensors")
    (place / "state.json").write_text(json.dumps(done))
    for old in train.saved_steps(run.folder)[train.KEPT:]:
        shutil.rmtree(old)


@pytest.mark.parametrize("how, trials", [("ours", 20), ("in place", 200), pytest.param("ours", 300, marks=pytest.mark.faults)])
def test_kills_while_saving_leave_the_last_checkpoint_whole(how, trials, world, tmp_path, monkeypatch, record_property):     # noqa: F811
    """A child saves without end; the newest checkpoint it leaves is of one step, and of the last that it reported or a later one. The control stops when it has failed."""
    cfg = train.parse_config(command(world, tmp_path, "sft"))
    run = train.make_run(cfg)
    run.model = train.trainable(cfg, None)
    weights, rng, bad = train.trained(run.model), random.Random(trials), 0
    if how == "in place":
        monkeypatch.setattr(train, "write_checkpoint", saved_in_place)
        monkeypatch.setattr(train, "damage", lambda place: "")
    for trial in range(trials):
        if how != "ours" and bad > 2:
            break
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)

        def work(say):
            optimizer = torch.optim.AdamW(weights.values())
            for step in range(1, 10**6):
                with torch.no_grad():
                    for p in weights.values():
                        p.fill_(step)
                        optimizer.state[p] = {"exp_avg": torch.full_like(p, step)}
                train.save_checkpoint(run, train.STAGES["sft"], optimizer, [], {"step": step})
                say(step)
        last = killed(work, rng.uniform(0.05, 0.25))
        try:
            place = train.find_checkpoint(tmp_path)
            if place is None:
                bad += last > 0
                continue
            values = [x for name in ("weights", "optimizer") for x in load_file(place / f"{name}.safetensors").values()]
            steps = {float(x) for value in values for x in (value.min(), value.max())} | {float(json.loads((place / "state.json").read_text())["step"])}
            load_file(place / "random.safetensors")
            bad += len(steps) > 1 or max(steps) < last
        except (OSError, ValueError, safetensors.SafetensorError):
            bad += 1
    record_property("trials", trials)
    assert bad == 0 if how == "ours" else bad > 2, f"{bad} of {trials}"


@pytest.mark.parametrize("how, trials", [("ours", 10), ("unmended", 200), pytest.param("ours", 150, marks=pytest.mark.faults)])
def test_kills_while_recording_lose_no_record_that_was_reported(how, trials, tmp_path, monkeypatch, record_property):
    """Two lives each; records of 300 bytes, 20 KB and 4 MB. The control does not cut the torn end before it goes on, and loses what is glued to it."""
    rng, bad = random.Random(trials), 0
    for trial in range(trials):
        if how != "ours" and bad:
            break
        path, reported = tmp_path / f"{trial}.jsonl", []
        size = (300, 20_000, 4_000_000)[trial % 3] if how == "ours" else 4_000_000
        for life in range(2):
            if how == "ours":
                data.read_records(path, own=True)

            def work(say):
                for number in range(10**6):
                    data.append_records(path, [{"id": f"{life}/{number}", "text": "x" * size}])
                    say(number)
            reported += [f"{life}/{number}" for number in range(killed(work, rng.uniform(0.01, 0.06)) + 1)]
        try:
            found = [record["id"] for record in data.read_records(path, own=how == "ours")]
            bad += len(found) != len(set(found)) or not set(reported) <= set(found)
        except ValueError:
            bad += 1
        path.unlink(missing_ok=True)
    record_property("trials", 2 * trials)
    assert bad == 0 if how == "ours" else bad, f"{bad} of {trials}"


# Full disks and repeated records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, size", [("sft", 20_000), ("sft", 70_000), ("cut", 3000), *(pytest.param(name, size, marks=pytest.mark.faults) for name, most in (
    ("sft", 60_000), ("cat", 60_000), ("cut", 60_000)) for size in range(500, most, most // 15))])
def test_a_full_disk_is_one_sentence_and_loses_nothing(name, size, world, whole, tmp_path, monkeypatch, capfd):     # noqa: F811
    """No file may grow beyond `size` bytes: records, log, checkpoints, results. With room again the same command ends in the same bytes."""
    def cramped(argv, real=train.main):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return real(argv)
    argv = command(world, tmp_path, name)
    whole(name), capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", cramped)
        status = lives(argv, [])[1]
    error = capfd.readouterr().err
    assert status == 1 and error.count("\n") == 1 and error.startswith("error: ") and str(tmp_path) in error and "too large" in error.lower(), error
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob(".tmp-*"))
    assert train.main(argv) == 0 and leftovers(tmp_path) == whole(name)[0]


def test_records_that_are_there_twice_are_dropped_and_contradictions_refused(world, tmp_path, capsys):     # noqa: F811
    """1,000 records, 200 of them again: the first stays. 100 of another content under a known key: refused, and the file untouched."""
    rng, path = random.Random(0), tmp_path / "candidates.jsonl"
    records = [{"task": "t", "id": str(i), "wording": "w", "sample": 0, "response": rng.choice("abc")} for i in range(1000)]
    data.append_records(path, records + rng.sample(records, 200))
    assert train.collected(path, train.candidate_key) == {("t", str(i), "w", 0) for i in range(1000)}
    assert data.read_records(path) == records and "dropped 200 records" in capsys.readouterr().out
    for record in rng.sample(records, 100):
        data.append_records(path, [{**record, "response": "other"}])
        before = path.read_bytes()
        with pytest.raises(ValueError, match=rf"line 1001, holds another record for .* than line {records.index(record) + 1}\."):
            train.collected(path, train.candidate_key)
        assert path.read_bytes() == before
        os.truncate(path, before[:-1].rindex(b"\n") + 1)
    for line in (b"null\n", b"[1]\n", b"{}\n", b"3\n"):
        path.write_bytes(line)
        with pytest.raises(ValueError, match="line 1, is no record of this stage"):
            train.collected(path, train.candidate_key)


# One process per run folder ------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_until_its_process_ends(world, tmp_path, capsys):     # noqa: F811
    code = f"import sys, time, train; lock = train.in_use(train.Path({str(tmp_path)!r})); lock.__enter__(); print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        argv = command(world, tmp_path, "sft")
        assert train.main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{tmp_path} is in use by process {holder.pid} on " in error
        assert {path.name for path in tmp_path.iterdir()} == {"run.lock"}
    finally:
        holder.kill()
        holder.wait()
    assert train.main(argv) == 0                            # after kill -9 the lock is free


# Numbers -------------------------------------------------------------------------------------------------------------


def poisoned(monkeypatch, name: str, step: int, value: float, where: str) -> None:
    """From `step` on the loss of the named record is `value` or, `where` gradient, finite with a gradient that is not."""
    real_collate, real = train.collate, train.token_step

    def collate(groups, device):
        return {**real_collate(groups, device), "bad": any(group["name"] == name for group in groups)}

    def token_step(model, batch, cfg):
        terms = real(model, batch, cfg)
        if batch["bad"] and batch["step"] >= step:
            p = next(p for p in model.parameters() if p.requires_grad)
            terms["ce"] = terms["ce"] + ((p * 0).sum() + value if where == "loss" else (p - p.detach()).abs().sum().sqrt() * 0 if where == "gradient" else value * p.sum())
        return terms
    monkeypatch.setattr(train, "collate", collate)
    monkeypatch.setitem(train.STAGES, "sft", train.dataclasses.replace(train.STAGES["sft"], step=token_step))


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.faults)])
@pytest.mark.parametrize("where, value", [("loss", float("nan")), ("loss", float("inf")), ("gradient", 0.0), ("large", 3e38)])
def test_a_bad_number_changes_no_bit_and_names_its_record(where, value, ranks, world, tmp_path, monkeypatch, capfd):     # noqa: F811
    argv = command(world, tmp_path, "sft")
    run = train.make_run(train.parse_config(argv))
    names = [group["name"] for group in train.sft_groups(run, 0)]
    steps = [[names[i] for i in data.batch_indices(len(names), 4, step, 0)] for step in range(12)]
    step = next(k for k in range(5, 12) if sum(names[0] in chosen for chosen in steps[5:k + 1]) == 1)
    poisoned(monkeypatch, names[0], 5, value, where)
    real, seen = train.save_checkpoint, tmp_path / "weights"

    def save(run, stage, optimizer, groups, done):
        real(run, stage, optimizer, groups, done)
        if train.ranks()[0] == ranks - 1 and done["step"] == step:      # the last rank's weights and moments before the bad step ...
            kept.extend([(p, p.detach().clone()) for p in train.trained(run.model).values()])
            kept.extend([(x, x.clone()) for slots in optimizer.state.values() for x in slots.values()])
    kept = []
    real_complain = train.complain

    def complain(message):
        seen.write_text(str(bool(kept) and all(torch.equal(a, b) for a, b in kept)))     # ... are there when it gives up
        return real_complain(message)
    monkeypatch.setattr(train, "save_checkpoint", save)
    monkeypatch.setattr(train, "complain", lambda message: complain(message) if train.ranks()[0] == ranks - 1 else real_complain(message))
    capfd.readouterr()
    statuses = together(argv, ranks) if ranks > 1 else [train.main(argv)]
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert statuses == [1] * ranks and len(lines) == 1 and "Traceback" not in error
    assert f"step {step} of sft gave a non-finite" in lines[0] and f"Last checkpoint: step {step}." in lines[0] and names[0] in lines[0]
    assert where != "loss" or f"records {names[0]})" in lines[0]            # and no other
    assert seen.read_text() == "True"


def together(argv: list[str], size: int, *, limit: float = 240, strike=lambda: 0) -> list[int]:
    """train.py as `size` gloo processes, forked from this one: their exit statuses. The last is sent the signal that `strike` returns, once."""
    port, children = free_port(), []
    for rank in range(size):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                status = train.main(argv)
            except SystemExit as stop:
                status = int(stop.code or 0)
            finally:
                os._exit(status)
        children.append(child)
    statuses, end = {}, time.time() + limit
    while len(statuses) < size and time.time() < end:
        for child in set(children) - statuses.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
        number = strike() if children[-1] not in statuses else 0
        if number:
            os.kill(children[-1], number)
            strike = lambda: 0                              # noqa: E731
        time.sleep(0.002)
    for child in set(children) - statuses.keys():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        statuses[child] = -signal.SIGKILL
    return [statuses[child] for child in children]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_clipping_alone_would_have_spread_it():
    """The control: AdamW behind the usual clipping, with one bad element in one gradient, spoils every weight."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    for p in weights:
        p.grad = torch.ones(3)
    weights[0].grad[1] = float("nan")
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    assert all(p.isnan().all() for p in weights)


def test_rows_without_a_target_add_nothing(world, tmp_path):             # noqa: F811
    run = train.make_run(train.parse_config(command(world, tmp_path, "sft")))
    run.model, groups = train.trainable(run.cfg, None).eval(), train.sft_groups(run, 0)[:3]     # no dropout here
    empty = [{"documents": [{**group["documents"][0], "labels": [data.IGNORE_INDEX] * len(group["documents"][0]["labels"])}], "name": "empty"} for group in groups]
    stage, found = train.STAGES["sft"], []
    for batch in ([groups], [groups + empty], [groups, empty]):
        run.model.zero_grad()
        means = train.backward(run.model, stage, [train.collate(part, "cpu") for part in batch], run.cfg)
        found.append((means["ce"], torch.cat([p.grad.flatten() for p in train.trained(run.model).values()])))
    for means, grads in found:
        assert means == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(grads, found[0][1], atol=1e-6, rtol=1e-4)
    run.model.zero_grad()
    assert train.backward(run.model, stage, [train.collate(empty, "cpu")], run.cfg) == {"ce": 0}
    assert all(p.grad is None or not p.grad.any() for p in train.trained(run.model).values())


SMALLEST = {                                                # the flags of each loss
    "sft": (), "expert": (), "cat": (), "dpo": (), "dpo ipo": ("--preference", "ipo"), "dpo by length": ("--length-normalize",), "rso": (), "slic": (), "rrhf": (), "pro": (),
    "reward": (), "conditional": (), "cut": (), "hindsight": (), "forward": (), "unlikelihood": (), "unlikelihood token": ("--level", "token"),
    "unlikelihood sequence": ("--level", "sequence")}


@pytest.mark.parametrize("name", SMALLEST)
def test_every_loss_of_answers_that_are_only_an_end_is_finite(name, world, judged, tmp_path):     # noqa: F811
    """One label in each document, one group in the batch; where losses are of tokens, another group without any changes nothing."""
    stage = name.split()[0]
    records = ["--records", str(judged), *JUDGED] if train.kind(stage) in train.JUDGED else [
        "--candidates", str(planted(world, tmp_path / "candidates.jsonl"))] if stage != "sft" else []
    run = train.make_run(train.parse_config(["--stage", stage, *arguments(world, tmp_path / "run"), *records, *SMALLEST[name]]))
    run.model = train.trainable(run.cfg, None).eval()
    if train.STAGES[stage].head:
        evaluation.add_head(run.model)
    groups = train.STAGES[stage].groups(run)[:1]
    ignored = data.IGNORE_INDEX

    def ending(group, kept=1):
        return {**group, "documents": [{**document, "labels": [ignored] * (len(document["labels"]) - kept) + document["labels"][len(document["labels"]) - kept:]}
                                       for document in group["documents"]]}
    found = []
    for batch in ([[ending(group) for group in groups]], [[ending(group) for group in groups], [ending(group, 0) for group in groups]]):
        run.model.zero_grad()
        means = train.backward(run.model, train.STAGES[stage], [{**train.collate(part, "cpu"), "step": 0} for part in batch], run.cfg)
        grads = torch.cat([p.grad.flatten() for p in train.trained(run.model).values() if p.grad is not None])
        assert all(math.isfinite(value) for value in means.values()) and grads.isfinite().all()
        assert grads.any() or name in ("unlikelihood token", "unlikelihood sequence")             # an end alone repeats nothing
        found.append((means, grads))
        if train.STAGES[stage].counts is not train.token_counts:
            break                                           # the others count documents, pairs or groups, and none comes without a label
    for means, grads in found[1:]:
        assert means == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(grads, found[0][1], atol=1e-6, rtol=1e-4)


def slope(loss, *at):
    """The loss's gradient at float32 numbers."""
    points = [torch.tensor(numbers, requires_grad=True) for numbers in at]
    loss(*points).sum().backward()
    return [point.grad.tolist() for point in points]


far, one = [1e4, -1e4], torch.zeros(1, dtype=torch.long)
LIMITS = {
    **{f"{kind} of log-ratios of 10,000": lambda kind=kind: slope(lambda h: losses.dpo_loss(h, kind=kind)[0], far) for kind in ("sigmoid", "robust", "ipo", "hinge")},
    "a ratio of exp(89), good": lambda: slope(lambda logprobs: losses.ppo_policy_loss(logprobs, torch.tensor([-89.0]), torch.tensor([1.0])), [0.0]),
    "a ratio of exp(89), bad": lambda: slope(lambda logprobs: losses.ppo_policy_loss(logprobs, torch.tensor([-89.0]), torch.tensor([-1.0])), [0.0]),
    "a ratio of exp(-1e4)": lambda: slope(lambda logprobs: losses.ppo_policy_loss(logprobs, torch.tensor([0.0]), torch.tensor([-1.0])), [-1e4]),
    "values far off": lambda: slope(lambda values: losses.ppo_value_loss(values, torch.tensor([0.0]), torch.tensor([1e4])), [-1e4]),
    "equal advantages": lambda: losses.whiten(torch.ones(5)).tolist(),
    "one advantage": lambda: losses.whiten(torch.ones(1)).tolist() + losses.whiten(torch.ones(1), shift_mean=False).tolist(),
    "no advantage": lambda: losses.whiten(torch.ones(0)).tolist(),
    "one token": lambda: [found.tolist() for found in losses.gae(torch.ones(1), torch.ones(1), one)],
    "no token": lambda: [found.tolist() for found in losses.gae(torch.ones(0), torch.ones(0), one[:0])],
    "a group of one": lambda: [losses.pro_loss(torch.tensor([-1.0])).item(), losses.best_vs_lower_pairs([2])],
    "equal rewards": lambda: [slope(lambda s: losses.pro_loss(s, torch.ones(3)), [-1.0, -2.0, -3.0]), losses.best_vs_lower_pairs([1, 1, 1])],
    "likelihoods of -10,000": lambda: slope(losses.pro_loss, [-1e4, 0.0, -5e3]),
    "rewards far apart": lambda: slope(lambda r: losses.reward_loss(r, one, one + 1)[0], far) + slope(lambda r: losses.reward_loss(r, one + 1, one)[0], far),
    "no divergence": lambda: losses.adapted_beta(0.1, 0.0, 1e-9),
    "best of one": lambda: [losses.best_of_n([1.0], 1), losses.best_of_n_kl(1)],
    "RSO of equal rewards": lambda: losses.rejection_sample([1.0] * 4, 2, beta=1e-9, rng=random.Random(0)),
    "RSO of far rewards": lambda: losses.rejection_sample([1e9, 0.0], 2, beta=1e-9, rng=random.Random(0)),
    "CR of one answer": lambda: evaluation.consistency_rate([[True]]),
    "MCR of one answer": lambda: evaluation.max_consistency_rate([[True]]),
    "ROUGE of nothing": lambda: [evaluation.rouge_scores("", ["x"]), evaluation.rouge_scores("x", [""]), evaluation.rouge_scores("", [""])],
    "an interval of nothing": lambda: [evaluation.wilson(0, 0), evaluation.bootstrap([])],
    "an interval of one": lambda: [evaluation.wilson(1, 1), evaluation.bootstrap([0.5])],
    "kappa of agreement by chance alone": lambda: [evaluation.cohen_kappa([1, 1], [1, 1]), evaluation.cohen_kappa([], [])],
    "correlations of constants": lambda: [evaluation.correlation([1, 1, 1], [1, 2, 3]), evaluation.correlation([1], [1]), evaluation.correlation([], [])],
}


@pytest.mark.parametrize("name", LIMITS)
def test_figures_at_their_limits_are_finite_or_null(name):
    json.dumps(LIMITS[name](), allow_nan=False)


def test_planted_spikes_are_found_and_clean_losses_are_not_flagged():
    rng, flagged, false_alarms = random.Random(0), 0, 0
    planted_at, recent = set(rng.sample(range(20, 2020), 20)), []
    for step in range(2020):
        loss = (2 * 0.999 ** step + 0.5) * rng.lognormvariate(0, 0.15)
        if step in planted_at:
            flagged += train.is_spike(50 * loss, recent)
            continue                                        # what came of it in a real run is not known here
        false_alarms += train.is_spike(loss, recent)
        recent = [*recent, loss][-10:]
    assert flagged == 20 and false_alarms == 0


def test_a_spike_is_flagged_in_the_log_with_its_records(world, tmp_path, monkeypatch):     # noqa: F811
    real = train.backward
    steps = iter(range(100))
    monkeypatch.setattr(train, "backward", lambda *args: {k: v * (50 if next(steps) == 10 else 1) for k, v in real(*args).items()})
    assert train.main(command(world, tmp_path, "sft")) == 0
    log = data.read_records(tmp_path / "log.jsonl")
    assert [row["step"] for row in log if "spike" in row] == [10] and ("colour/" in log[10]["spike"] or "person/" in log[10]["spike"])


# Many processes ------------------------------------------------------------------------------------------------------


COLLECT = {"greedy": ["--stage", "cat", "--judge", "rule", "--temperature", "0"], "sampled": ["--stage", "cat", "--judge", "rule"],
           "self": ["--stage", "cat", "--judge", "self"], "ilf": ["--stage", "ilf", "--judge", "rule", "--refinements", "2", "--downsample", "0"],
           "scores": ["--stage", "rlaif", "--judge", "self", "--labels", "scores"], "letters": ["--stage", "rlaif", "--judge", "self", "--labels", "letters"],
           "revised": ["--stage", "constitutional", "--judge", "self"]}


@pytest.fixture(scope="module")
def taught(world, tmp_path_factory):                        # noqa: F811
    """The tiny world with a model that has learnt a little: some of its answers are right."""
    out, path = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("taught")
    torch.set_num_threads(1)
    assert train.main(["--stage", "sft", *arguments(world, out), "--steps", "120", "--lr", "5e-3", "--per-task", "30", "--batch-size", "8", "--judge-share", "0.1",
                       "--full", "--no-evaluate"]) == 0
    shutil.copytree(world, path, dirs_exist_ok=True)
    shutil.copytree(out / "model", path / "model", dirs_exist_ok=True)
    return path


def nearly(one, other, most: float = 1e-4) -> bool:
    """Equal, but for rounding in float32."""
    if isinstance(one, (dict, list)):
        keys = one.keys() if isinstance(one, dict) else range(len(one))
        return len(one) == len(other) and all(nearly(one[key], other[key], most) for key in keys)
    return one == other or isinstance(one, float) and isinstance(other, float) and abs(one - other) <= most + most * abs(one)


@pytest.mark.parametrize("name, size", [("greedy", 2), ("self", 2), *(pytest.param(name, size, marks=pytest.mark.faults) for name in COLLECT for size in (2, 3, 4)
                                                                    if size != 2 or name not in ("greedy", "self"))])
def test_processes_share_sampling_judging_and_evaluation(name, size, taught, tmp_path):
    """Records byte for byte as one process writes them (a model's probabilities within rounding), also where the work is uneven; adapter and figures within rounding."""
    extra = [] if name == "ilf" else ["--wordings", "3", "--pool-wordings", "2", "--no-compare"]
    argv = lambda out: [*arguments(taught, out, *COLLECT[name], "--pool-per-task", "7", "--steps", "3", "--sft-steps", "3", "--batch-size", "4", "--samples", "1", *extra)]     # noqa: E731
    one, many, way = tmp_path / "one", tmp_path / "many", "sft" if name == "ilf" else "sft-ia"
    status = lives(argv(one), [])[1]
    assert status == (2 if name == "revised" else 0)        # it writes no revision that ends, so that nothing is left to train on
    shutil.copytree(one / way, many / way)                  # the same start, to the bit
    assert together(argv(many), size) == [status] * size
    found = [path.name for path in one.iterdir() if path.name in train.RECORDS]
    for file in found:
        rows = [data.read_records(folder / file) for folder in (one, many)]
        assert rows[0] and nearly(*rows)
        assert name in ("self", "scores", "letters") or (one / file).read_bytes() == (many / file).read_bytes()
    assert found and {path.name for path in one.iterdir()} == {path.name for path in many.iterdir()}
    for file in [path.name for path in one.glob("*.json") if path.name not in ("summary.json", "config.json")]:
        assert nearly(*(json.loads((folder / file).read_text()) for folder in (one, many)))
    for file in [path.name for path in one.glob("*.safetensors")]:
        weights = [load_file(folder / file) for folder in (one, many)]
        assert all(torch.allclose(weights[0][key], weights[1][key], atol=1e-5) for key in weights[0])


def torchrun(*argv: str, size: int = 2) -> tuple[int, list[str], str]:
    """train.py under torchrun: exit status, the lines of ours on stderr that begin with error, and all of stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "train.py", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("error: ")], done.stderr


@pytest.mark.parametrize("change, words", [
    (["--stepz", "3"], "--stepz"), (["--tasks", "/nowhere"], "--tasks /nowhere does not exist"), (["--max-len", "100000"], "--max-len is 100000, but"),
    (["--lr", "1e30"], "gave a non-finite loss or gradient norm"), (["--batch-size", "1"], "--batch-size 1 is less than the 2 processes"),
    *(pytest.param(*row, marks=pytest.mark.faults) for row in [
        (["--model", "/tmp"], "no tokenizer at /tmp"), (["--template", "nobody"], "unknown template 'nobody'"), (["--stage", "sfft"], 'unknown stage "sfft"'),
        (["--template", "chatml"], "template chatml ends responses with"), (["--tasks", str(ROOT / "demo/base")], "config.json"), (["--shard", "--quantize", "int8"], "has no shards")])])
def test_a_mistake_is_one_line_for_the_whole_job(change, words, world, tmp_path):     # noqa: F811
    """Behind it torchrun writes what it has to say itself."""
    status, lines, stderr = torchrun(*command(world, tmp_path, "sft"), *change)
    assert status != 0 and len(lines) == 1 and words in lines[0], stderr
    assert not [line for line in stderr.splitlines() if line.lstrip().startswith('File "') and str(ROOT) in line and "site-packages" not in line]     # no traceback through our code


def test_what_one_process_alone_finds_or_dies_of_is_one_line(world, tmp_path, monkeypatch, capfd):     # noqa: F811
    real_run, real_backward, count = train.make_run, train.backward, [0]

    def make_run(cfg):
        if train.ranks()[0] == 1:
            raise ValueError("this machine has no such file")
        return real_run(cfg)
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_run", make_run)
        assert together(command(world, tmp_path / "a", "sft"), 2) == [1, 2]
    error = capfd.readouterr().err
    assert error == "error: rank 1: this machine has no such file\n"

    def backward(*args):
        count[0] += 1
        if train.ranks()[0] == 1 and count[0] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return real_backward(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", backward)
        assert together(command(world, tmp_path / "b", "sft"), 2) == [1, -signal.SIGKILL]
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: another process of this job ended before its work was done.")
    assert [place.name for place in train.saved_steps(tmp_path / "b")] == ["step-000003", "step-000002"]


def served(world, out, server, *more):                      # noqa: F811
    """A run whose judge is a server."""
    return [*arguments(world, out), "--stage", "cat", "--judge", "http", "--judge-url", server.url, "--judge-model", "m", "--sft-steps", "2", "--steps", "2",
            "--batch-size", "4", "--wordings", "3", "--no-compare", *more]


def test_a_server_is_asked_by_the_first_rank_alone(taught, tmp_path):
    def decide(request, number):
        nonce, words = re.search(r"VERDICT ([0-9a-f]{8}): X\" with (\w+) or (\w+)", text := request["messages"][-1]["content"]).group(1, 2, 3), text[-2000:]
        return {"body": chatserver.completion(f"VERDICT {nonce[0]}: {nonce[1 + len(words) % 2]}")}
    asked, records = [], []
    with chatserver.ChatServer(decide) as server:
        for size in (1, 2):
            out = tmp_path / str(size)
            if size > 1:
                shutil.copytree(tmp_path / "1/sft-ia", out / "sft-ia")
            assert together(served(taught, out, server, "--pool-per-task", "5"), size) == [0] * size
            asked.append(sorted(json.dumps(request) for request, *_ in server.requests))
            records.append((out / "candidates.jsonl").read_bytes())
            server.requests.clear()
    assert records[0] == records[1] and asked[0] == asked[1] and len(asked[0]) == len(set(asked[0])) > 50


@pytest.mark.parametrize("reply, words", [({"status": 401, "body": {"error": {"message": "no"}}}, "no API key"), ({"body": chatserver.completion("hm")}, "had no readable verdict"),
                                          *(pytest.param(*row, marks=pytest.mark.faults) for row in [
                                              ({"status": 402, "body": ""}, "out of credit"), ({"status": 404, "body": ""}, "has no chat completions"),
                                              ({"status": 307, "headers": {"Location": "http://127.0.0.1:1"}}, "redirects"),
                                              ({"status": 429, "headers": {"Retry-After": "600"}}, "longer than 120 s"),
                                              ({"status": 429, "body": {"error": {"message": "no", "code": "insufficient_quota"}}}, "out of credit"),
                                              ({"status": 400, "body": {"error": {"message": "no"}}}, "10 requests in a row failed"),
                                              ({"body": "data: {}", "headers": {"Content-Type": "text/event-stream"}}, "streams its answers")])])
def test_a_server_that_fails_the_first_rank_stops_all_with_one_line(reply, words, taught, tmp_path, capfd):
    """Where rank 0 cannot ask on, and where every rank sees that the answers are no verdicts."""
    with chatserver.ChatServer(lambda request, number: reply) as server:
        argv = served(taught, tmp_path, server, "--pool-per-task", "30")
        capfd.readouterr()
        statuses = together(argv, 2)
    error = capfd.readouterr().err
    assert statuses == [1, 1] and error.count("error: ") == 1 and words in error and "Traceback" not in error


@pytest.mark.parametrize("pairs", [((2, 1), (1, 2), (2, 2)), pytest.param(((3, 1), (1, 3), (3, 2), (2, 3), (3, 3), (4, 1), (2, 4)), marks=pytest.mark.faults)])
def test_a_run_of_two_processes_goes_on_with_one_and_back(pairs, world, tmp_path, monkeypatch, record_property):     # noqa: F811
    """The same records in the same steps: equal to the run that one process never stopped within float32 rounding, with 2 -> 2 and 3 -> 3 to the bit."""
    argv = lambda out: command(world, out, "sft")[:-2] + ["--dropout", "0", "--save-every", "4"]     # noqa: E731
    same = next(first for first, second in pairs if first == second)
    assert together(argv(tmp_path / "1"), 1) == [0] and together(argv(tmp_path / str(same)), same) == [0] * same
    for first, second in pairs:
        out = tmp_path / f"{first}{second}"
        with monkeypatch.context() as patch:
            patch.setattr(train, "backward", lambda *args, steps=iter(range(9)), real=train.backward: os._exit(9) if next(steps) == 6 else real(*args))
            assert together(argv(out), first) == [9] * first
        assert [place.name for place in train.saved_steps(out)] == ["step-000004"]
        assert together(argv(out), second) == [0] * second
    record_property("trials", len(pairs))
    final = {out: load_file(tmp_path / out / "adapter_model.safetensors") for out in ("1", str(same), *(f"{first}{second}" for first, second in pairs))}
    rows = {out: data.read_records(tmp_path / out / "log.jsonl") for out in final}
    assert leftovers(tmp_path / f"{same}{same}")["adapter_model.safetensors"] == leftovers(tmp_path / str(same))["adapter_model.safetensors"]
    for out in final:
        assert [row["step"] for row in rows[out]] == list(range(12))
        assert max(abs(row["ce"] - wanted["ce"]) for row, wanted in zip(rows[out], rows["1"])) <= 2e-6
        assert all(torch.allclose(value, final["1"][name], atol=1e-6, rtol=1e-5) for name, value in final[out].items())


# Told to stop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_stops_behind_the_step_and_nothing_is_lost(number, size, world, whole, tmp_path, capfd):     # noqa: F811
    argv = [*command(world, tmp_path, "sft"), "--save-every", "0"]
    capfd.readouterr()
    log = tmp_path / "log.jsonl"
    assert together(argv, size, strike=lambda: number if log.exists() and log.read_bytes().count(b"\n") >= 4 else 0) == [128 + number] * size
    error, done = capfd.readouterr().err, len(log.read_text().splitlines())
    assert error.count("\n") == 1 and f"stopped by {number.name} behind step {done} of sft, which is saved. The same command goes on from there." in error
    assert [place.name for place in train.saved_steps(tmp_path)] == [f"step-{done:06d}"]
    if size == 1:
        assert train.main(argv) == 0 and leftovers(tmp_path) == whole("sft")[0]


@pytest.mark.faults
@pytest.mark.parametrize("name", ["sft", "cat", "ppo", "rounds"])
def test_signals_at_random_moments_lose_nothing(name, world, whole, tmp_path, capfd, record_property):     # noqa: F811
    """Also while answers are sampled, judged and written."""
    record_property("trials", 10)
    wanted, seconds = whole(name)
    rng = random.Random(seed := random.randrange(10**6))
    for trial in range(5):
        out, argv = tmp_path / str(trial), [*command(world, tmp_path / str(trial), name), "--save-every", "0"]
        statuses = []
        for _ in range(2):
            moment = time.time() + rng.uniform(0.1, 0.9 * seconds)
            statuses += together(argv, 1, strike=lambda: signal.SIGTERM if time.time() > moment else 0)
        error = capfd.readouterr().err
        assert set(statuses) <= {0, 143} and error.count("\n") == statuses.count(143), f"seed {seed}: {error}"
        assert train.main(argv) == 0 and leftovers(out) == wanted, f"seed {seed}"


# Shards --------------------------------------------------------------------------------------------------------------


SAMPLED = ["--sft-steps", "3", "--judge", "rule", "--temperature", "0", "--samples", "1", "--pool-per-task", "7", "--wordings", "3", "--pool-wordings", "2", "--no-compare"]
SHARDED = {"full": ["--stage", "sft", "--full", "--lr", "0.02"], "adapter": ["--stage", "sft"], "recomputed": ["--stage", "sft", "--full", "--checkpointing"],
           "few": ["--stage", "sft", "--checkpointing", "--micro-tokens", "60"], "compiled": ["--stage", "cat", *SAMPLED, "--compile", "--evaluate"],
           "cat": ["--stage", "cat", "--full", *SAMPLED, "--pool-per-task", "20", "--pool-wordings", "3", "--sft-lr", "1e-5"], "dpo": ["--stage", "dpo", *SAMPLED],
           "frozen": ["--stage", "cut", "--sft-steps", "3", "--detector", "frozen", "--samples", "1", "--pool-per-task", "7", "--downsample", "0"]}


@pytest.mark.parametrize("name, size", [("full", 2), ("adapter", 2), *(pytest.param(name, size, marks=pytest.mark.faults) for name in SHARDED for size in (2, 3)
                                                                      if size != 2 or name not in ("full", "adapter"))])
def test_shards_train_as_one_process_does(name, size, taught, tmp_path, monkeypatch):
    """Losses, norms and final weights are those of one process that holds all, within float32 rounding; also with uneven micro-batches, and stopped and resumed
    with and without shards. (AdamW's first steps have full size whatever the gradient's; where that is rounding alone, a weight differs by up to --lr.)"""
    if name == "full":
        monkeypatch.setattr(torch.optim, "AdamW", lambda weights, lr, **rest: torch.optim.SGD(weights, lr=lr, momentum=0.9))
    loss, weight = (3e-6, 2e-6) if name == "full" else (1e-4, 2e-5) if name not in ("cat", "recomputed") else (2e-4, 2e-4)
    argv = lambda out: [*arguments(taught, out), "--steps", "6", "--batch-size", "5", "--micro-tokens", "120", "--save-every", "2", "--dtype", "float32", *SHARDED[name]]     # noqa: E731
    assert lives(argv(tmp_path / "one"), []) == (0, 0)
    assert together([*argv(tmp_path / "many"), "--shard"], size) == [0] * size
    for first, second in ((["--shard"], []), ([], ["--shard"])) if name in ("full", "adapter") else ():
        out = tmp_path / f"then{len(first)}"
        with monkeypatch.context() as patch:
            patch.setattr(train, "backward", lambda *args, steps=iter(range(9)), real=train.backward: os._exit(9) if next(steps) == 3 else real(*args))
            assert together([*argv(out), *first], size if first else 1) == [9] * (size if first else 1)
        assert together([*argv(out), *second], size if second else 1) == [0] * (size if second else 1)
    for out in [path for path in tmp_path.iterdir() if path.name != "one"]:
        rows = [[{**row, "seconds": 0, "tokens": 0} for row in data.read_records(folder / "log.jsonl")] for folder in (tmp_path / "one", out)]
        assert nearly(*rows, loss)
        for file in [path.relative_to(out) for path in out.rglob("*.safetensors")]:
            weights = [load_file(folder / file) for folder in (tmp_path / "one", out)]
            assert weights[0].keys() == weights[1].keys()
            assert all(torch.allclose(weights[0][key], weights[1][key], atol=weight, rtol=weight) for key in weights[0])


def test_each_process_reads_and_holds_its_rows_alone(taught):
    """Of a base of n numbers each of two processes holds n / 2 (the last rows may be fewer)."""
    code = ("import sys, torch, train, model; cfg = train.parse_config(sys.argv[1:]); train.join(cfg)\n"
            "reads, real = [], model.fill\n"
            "model.fill = lambda place, read, shape, *rest: (reads.append(torch.Size(shape).numel()), real(place, read, shape, *rest))[1]\n"
            "held = train.load_trained(cfg, None, shard=True)\n"
            "local = sum(p.to_local().numel() for p in held.parameters())\n"
            "whole = train.load_trained(cfg, None)\n"
            "same = all(torch.equal(train.whole(p), q) for p, q in zip(held.parameters(), whole.parameters()))\n"
            "total = sum(p.numel() for p in whole.parameters())\n"
            "read = sum(reads[:len(reads) // 2])\n"
            "train.os.write(1, f'share {local / total} {read / total} {same}\\n'.encode()); train.dist.destroy_process_group()")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable, "-c", code,
               "--stage", "sft", "--model", str(taught / "model"), "--tasks", str(taught / "tasks"), "--shard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    lines = re.findall(r"share ([\d.]+) ([\d.]+) (\w+)", done.stdout)
    assert len(lines) == 2 and all(same == "True" and 0.49 < float(local) < 0.51 and 0.49 < float(read) < 0.51 for local, read, same in lines), done.stderr


@pytest.mark.faults
def test_two_machines_are_one_job(taught, tmp_path, capfd):
    """Two agents of torchrun on loopback: the weights of two processes of one agent, and one line for a mistake."""
    found = []
    for name, more in (("two", []), ("mistake", ["--max-len", "100000"])):
        port, argv = free_port(), [*arguments(taught, tmp_path / name), "--stage", "sft", "--steps", "3", "--batch-size", "4", "--no-evaluate", *more]
        agents = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
                                    "--master-port", str(port), "train.py", *argv], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for node in range(2)]
        stderr = "".join(agent.communicate(timeout=600)[1] for agent in agents)
        found.append(([agent.returncode == 0 for agent in agents], stderr.count("error: "), "--max-len is 100000" in stderr))
    assert found == [([True, True], 0, False), ([False, False], 1, True)]
    assert together([*arguments(taught, tmp_path / "one"), "--stage", "sft", "--steps", "3", "--batch-size", "4", "--no-evaluate"], 2) == [0, 0]
    assert (tmp_path / "one/adapter_model.safetensors").read_bytes() == (tmp_path / "two/adapter_model.safetensors").read_bytes()
