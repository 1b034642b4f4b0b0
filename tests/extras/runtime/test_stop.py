"""A run that is told to stop does so after the current step, and says in one line where."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import short_runs as runs

import train
from extras.runtime.guard import Guard, Stopped
from extras.runtime.program import explain

FAULTS = pytest.mark.faults


@pytest.mark.parametrize("number, size", [
    (signal.SIGTERM, 1), (signal.SIGINT, 2), pytest.param(signal.SIGTERM, 2, marks=FAULTS),
    pytest.param(signal.SIGINT, 1, marks=FAULTS)])
def test_a_signal_stops_after_the_step_and_nothing_is_lost(number, size, command, unstopped,
                                                           tmp_path, capfd):
    out = tmp_path / "run"
    argv, log = [*command("sft", out), "--save-every", "0"], out / "log.jsonl"
    wanted = unstopped("sft", command("sft", ""), tmp_path / "unstopped")[0]
    capfd.readouterr()

    def strike():
        return number if log.exists() and log.read_bytes().count(b"\n") >= 4 else 0
    assert runs.run_together(argv, size, strike) == [128 + number] * size
    error, done = capfd.readouterr().err, len(log.read_text().splitlines())
    assert error.count("\n") == 1
    assert (f"stopped by {number.name} after step {done} of sft, which is saved. The same command "
            "goes on from there.") in error
    assert runs.saved_steps(out) == [done]
    if size == 1:
        assert train.main(argv) == 0 and runs.read_results(out) == wanted


def test_a_signal_while_a_stage_is_saved_stops_after_it(command, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "run", train.save_trained

    def save(run, folder):
        if run.cfg.stage == "sft-ia":
            os.kill(os.getpid(), signal.SIGTERM)
        real(run, folder)
    monkeypatch.setattr(train, "save_trained", save)
    assert train.main(command("cat", out)) == 143
    assert "stopped by SIGTERM after sft-ia, which is finished. " in capsys.readouterr().err
    assert (out / "sft-ia/adapter_config.json").exists() and not (out / "log.jsonl").exists()
    assert not (out / "sft-ia/checkpoints").exists()


def test_between_steps_a_first_signal_waits_and_a_second_does_not():
    guard = Guard(None)
    with pytest.raises(Stopped):
        guard.hear(15, None)  # nothing is under way
    guard = Guard(None)
    guard.waiting = True
    guard.hear(15, None)
    with pytest.raises(Stopped):
        guard.hear(2, None)


@FAULTS
@pytest.mark.parametrize("name", ["sft", "cat", "ppo", "rounds"])
def test_signals_at_random_moments_lose_nothing(name, command, unstopped, tmp_path, capfd):
    """Also while answers are sampled, judged and written."""
    wanted, seconds = unstopped(name, command(name, ""), tmp_path / "unstopped")
    rng = random.Random(seed := random.randrange(10**6))
    for trial in range(5):
        out, statuses = tmp_path / str(trial), []
        argv = [*command(name, out), "--save-every", "0"]
        capfd.readouterr()
        for _ in range(2):
            moment = time.time() + rng.uniform(0.1, 0.9 * seconds)
            statuses += runs.run_together(
                argv, 1, lambda moment=moment: signal.SIGTERM if time.time() > moment else 0)
        error = capfd.readouterr().err
        assert set(statuses) <= {0, 143}, f"seed {seed}: {error}"
        assert error.count("\n") == statuses.count(143), f"seed {seed}: {error}"
        assert train.main(argv) == 0 and runs.read_results(out) == wanted, f"seed {seed}"


def test_a_finished_command_says_and_keeps_what_it_took(command, tmp_path, capsys):
    assert train.main(command("full", tmp_path / "run")) == 0
    found = json.loads((tmp_path / "run/summary.json").read_text())
    assert found["seconds"] > 0 and found["peak_memory_bytes"]["process"] > 1e7
    assert found["tokens"] > 0 and found["tokens_per_second"] > 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"done in 0\.\d min; peak memory \d+\.\d\d GB \(process\)", said)
    assert said.endswith(f"sft trained at {found['tokens_per_second']:,} tok/s.")


@pytest.mark.parametrize("error, status, words", [
    (ValueError("no such thing"), 2, "no such thing"),
    (OSError(28, "No space left on device", "a/b"), 1, "a/b: No space left on device. What was"),
    (OSError(5, "Input/output error"), 1, "runs/x: Input/output error. What was finished is kept"),
    (FloatingPointError("step 3"), 1, "step 3"), (MemoryError(), 1, "out of memory: "),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9"), 1,
     "DefaultCPUAllocator: can't allocate memory: you tried 9. What was finished is kept; lower"),
    (KeyError("x"), 1, "")])
def test_every_error_has_its_status_and_its_sentence(error, status, words, tmp_path, monkeypatch):
    class Flags:
        out = "runs/x"
    monkeypatch.chdir(tmp_path)
    Path("runs/x").mkdir(parents=True)
    found = explain(error, Guard(Flags))
    assert found[0] == status and words in found[1] and bool(words) == bool(found[1])


def test_a_bug_is_raised_and_the_handlers_are_given_back(command, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)

    def fail(*args):
        raise KeyError("a bug")
    monkeypatch.setattr(train, "make_run", fail)
    with pytest.raises(KeyError):
        train.main(command("sft", tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler
