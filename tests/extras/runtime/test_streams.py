"""What happens beside a run: its log or its lock removed, readers that leave, a clock set back."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import short_runs as runs

import train
from extras.runtime import guard, streams

FAULTS = pytest.mark.faults
ROOT = Path(train.__file__).parent


def at_step(monkeypatch, step, act, name="log_step"):
    """act(run) once, before (or, by name, at) a step of the run's own stage."""
    real = getattr(train, name)

    def call(run, *rest):
        if name == "log_step" and rest[0] == step:
            act(run)
        return real(run, *rest)
    monkeypatch.setattr(train, name, call)


# ----- The log and the lock -----

def removed(path):
    path.unlink()


def moved(path):
    path.rename(path.with_name("away"))


def replaced(path):
    path.rename(path.with_name("away"))
    path.write_text('{"step": 99}\n')


def copied(path):
    """As an editor saves it."""
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


@pytest.mark.parametrize("trials", [2, pytest.param(20, marks=FAULTS)])
@pytest.mark.parametrize("how", [removed, moved, replaced, copied])
def test_a_log_that_is_removed_is_put_back_and_the_run_stops(how, trials, command, unstopped,
                                                             tmp_path, monkeypatch, capsys):
    """At random steps, the last one too, with and without checkpoints; the bytes in the end."""
    wanted = unstopped("sft", command("sft", ""), tmp_path / "unstopped")[0]
    rng = random.Random(how.__name__)
    for trial in range(trials):
        out, step = tmp_path / str(trial), rng.choice(range(1, 12))
        argv = [*command("sft", out), "--save-every", rng.choice("013")]
        capsys.readouterr()
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda run: how(run.folder / "log.jsonl"))
            status, said = train.main(argv), capsys.readouterr()
        words = (f"{out}/log.jsonl was removed or replaced while this run wrote it; it is there "
                 "again")
        if step == 11:  # the last one: nothing is left to stop
            assert status == 0 and f"warning: {words}." in said.out
        else:
            assert status == 1 and said.err == (f"error: {words}. Step {step + 1} of sft is saved. "
                                                "The same command goes on from there.\n")
            assert len(runs.read_rows(out / "log.jsonl")) == step + 1
            assert train.main(argv) == 0
        assert runs.read_results(out) == wanted


@pytest.mark.parametrize("how", ["truncated", "another row", "a row and a half"])
def test_a_log_that_others_write_to_stops_the_run(how, command, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"

    def act(run):
        path = run.folder / "log.jsonl"
        if how == "truncated":
            os.truncate(path, 10)
        else:
            with open(path, "a") as file:
                file.write('{"step": 9}\n' if how == "another row" else '{"step": 9}\n{"st')
    at_step(monkeypatch, 5, act)
    assert train.main(command("sft", out)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}/log.jsonl was changed by somebody else while this run ")
    assert error.count("\n") == 1 and runs.saved_steps(out)[-1] == 5


def test_without_the_watch_a_lost_log_goes_unnoticed(command, tmp_path, monkeypatch):
    """The control: the run ends well, with a log that is not what happened."""
    monkeypatch.setattr(streams.Watch, "check", lambda watch: "")
    at_step(monkeypatch, 5, lambda run: removed(run.folder / "log.jsonl"))
    assert train.main([*command("sft", tmp_path), "--save-every", "0"]) == 0
    assert len(runs.read_rows(tmp_path / "log.jsonl")) == 7 < 12


@pytest.mark.parametrize("trials", [2, pytest.param(20, marks=FAULTS)])
def test_of_two_processes_after_a_lock_was_removed_one_stops(trials, command, unstopped, tmp_path,
                                                             capfd):
    """The second one has the folder, and what it ends with is what one process ends with."""
    wanted = unstopped("sft", command("sft", ""), tmp_path / "unstopped")[0]
    rng = random.Random(trials)
    for trial in range(trials):
        out, pause = tmp_path / str(trial), rng.uniform(0.02, 0.05)
        argv, step = command("sft", out), rng.randrange(2, 8)
        capfd.readouterr()

        def slowly(argv=argv, pause=pause):
            real = train.backward
            train.backward = lambda *rest: time.sleep(pause) or real(*rest)
            return train.main(argv)
        first = runs.fork(slowly)
        while not (out / "log.jsonl").exists() or len(
                (out / "log.jsonl").read_bytes().splitlines()) < step:
            time.sleep(0.002)
        (out / "run.lock").unlink()
        second = runs.fork(slowly)
        statuses = [runs.wait_for(child, time.time() + 60) for child in (first, second)]
        error = capfd.readouterr().err
        assert statuses == [1, 0] and error.count("error: ") == 1, error
        assert f"error: {out}/run.lock was removed or replaced while " in error
        assert runs.read_results(out) == wanted


def test_without_the_look_at_the_lock_both_end_well(command, tmp_path, monkeypatch):
    """The control."""
    monkeypatch.setattr(guard.Guard, "check_lock", lambda guard: None)
    at_step(monkeypatch, 5, lambda run: removed(run.folder.parent / "run/run.lock"))
    assert train.main(command("sft", tmp_path / "run")) == 0


def test_a_removed_lock_stops_while_records_are_collected(command, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "run", guard.Guard.keep

    def keep(self, path, records):
        real(self, path, records)
        removed(out / "run.lock")
    monkeypatch.setattr(guard.Guard, "keep", keep)
    argv = [*command("cut", out), "--eval-batch", "1"]
    assert train.main(argv) == 1
    assert f"{out}/run.lock was removed or replaced while this process" in capsys.readouterr().err
    assert len((out / "judged.jsonl").read_bytes().splitlines()) == 4  # one chunk


# ----- Signals, the clock, leftovers -----

def test_a_hangup_stops_as_the_other_signals_do(command, unstopped, tmp_path, capfd):
    out = tmp_path / "run"
    argv, log = [*command("sft", out), "--save-every", "0"], out / "log.jsonl"
    wanted = unstopped("sft", command("sft", ""), tmp_path / "unstopped")[0]
    capfd.readouterr()

    def strike():
        return signal.SIGHUP if log.exists() and log.read_bytes().count(b"\n") >= 4 else 0
    assert runs.run_together(argv, 1, strike) == [129]
    assert "stopped by SIGHUP after step " in capfd.readouterr().err and runs.saved_steps(out)
    assert train.main(argv) == 0 and runs.read_results(out) == wanted


def test_a_hangup_that_is_ignored_stays_ignored(command, tmp_path, monkeypatch):
    """By nohup; and the handlers are given back."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 3, lambda run: os.kill(os.getpid(), signal.SIGHUP))
        assert train.main(command("sft", tmp_path)) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_clock_that_is_set_back_changes_no_seconds(command, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 3, lambda run: monkeypatch.setattr(time, "time", lambda: 0.0))
    assert train.main(command("sft", tmp_path)) == 0
    assert 0 < json.loads((tmp_path / "summary.json").read_text())["seconds"] < 99
    seconds = [json.loads(line)["seconds"] for line in open(tmp_path / "log.jsonl")]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    assert "done in 0." in capsys.readouterr().out


def test_what_a_kill_left_half_written_is_gone_at_the_next_start(command, unstopped, tmp_path):
    out = tmp_path / "run"
    left = [".tmp-result", ".tmp-candidates.jsonl", "checkpoints/.tmp-step-000007"]
    for name in left:
        (out / name).mkdir(parents=True)
        (out / name / "half").write_text("")
    for name in ("config.json.part", "identity.json.part", "log.jsonl.part"):
        (out / name).write_text("half")
    wanted = unstopped("sft", command("sft", ""), tmp_path / "unstopped")[0]
    assert train.main(command("sft", out)) == 0 and runs.read_results(out) == wanted
    assert not [path for path in out.rglob("*") if path.suffix == ".part" or ".tmp-" in path.name]


# ----- Streams -----

def shell(line, argv, out):
    """(status, output, errors) of a line of bash in which TRAIN is the command."""
    words = " ".join(f"'{word}'" for word in [sys.executable, "train.py", *argv])
    done = subprocess.run(["bash", "-c", line.replace("TRAIN", words)], cwd=ROOT,
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("line", [
    "TRAIN | head -1 | cut -c1-3; exit ${PIPESTATUS[0]}",
    pytest.param("TRAIN 2>&1 | head -1 | cut -c1-3; exit ${PIPESTATUS[0]}", marks=FAULTS),
    pytest.param("TRAIN | true; exit ${PIPESTATUS[0]}", marks=FAULTS),
    "TRAIN 2>&-", pytest.param("TRAIN >&-", marks=FAULTS),
    pytest.param("TRAIN <&- >&- 2>&-", marks=FAULTS),
    pytest.param("TRAIN >/dev/full", marks=FAULTS)])
def test_a_run_outlasts_those_who_read_what_it_says(line, command, unstopped, tmp_path):
    wanted = unstopped("sft", command("sft", ""), tmp_path / "unstopped")[0]
    status, said, error = shell(line, command("sft", tmp_path / "run"), tmp_path)
    assert (status, error) == (0, ""), said
    assert runs.read_results(tmp_path / "run") == wanted
    assert (tmp_path / "run/summary.json").exists()


def test_what_is_no_text_is_refused_before_anything_is_read(command, tmp_path, capsys):
    out = os.fsdecode(bytes(tmp_path) + b"/r\xffn")
    assert train.main(command("sft", out)) == 2
    error = capsys.readouterr().err
    assert error == f"error: --out {tmp_path}/r\\udcffn is not UTF-8. Give another.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["candidates.jsonl"]


@pytest.mark.parametrize("program", ["eval", "tools.outputs"])
def test_other_programs_refuse_it_too(program, world, tmp_path, capsys):
    import importlib

    more = ["--instructions", "x"] if program != "eval" else []
    out = os.fsdecode(bytes(tmp_path) + b"/\xff")
    argv = ["--model", str(world / "model"), "--tasks", str(world / "tasks"), "--out", out, *more]
    status, error = runs.call(importlib.import_module(program), argv)
    assert status == 2 and error.count("\n") == 1 and "/\\udcff is not UTF-8" in error
    assert not list(tmp_path.iterdir())
