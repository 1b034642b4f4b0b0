"""What the tests of a run share: commands, children, and what a run leaves behind."""

import contextlib
import io
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import train

SHORT = ["--batch-size", "4", "--no-evaluate", "--save-every", "1"]
JUDGED = ["--stage", "cut", "--judge", "rule", "--sft-steps", "2", "--pool-per-task", "4",
          "--downsample", "0", "--no-compare"]
RUNS = {
    "sft": ["--stage", "sft", "--steps", "12", "--dropout", "0.1", "--micro-tokens", "120", *SHORT],
    "held out": ["--stage", "sft", "--epochs", "3", "--validation", "0.2", "--dropout", "0.1",
                 "--micro-tokens", "120", *SHORT],
    "cut": [*JUDGED, "--steps", "8", "--dropout", "0.1", *SHORT],
    "rounds": [*JUDGED, "--steps", "6", "--rounds", "2", *SHORT, "--save-every", "2"],
    "cat": ["--stage", "cat", "--steps", "8", "--sft-steps", "4", "--dropout", "0.1",
            "--no-compare", *SHORT],
    "patience": ["--stage", "cat", "--steps", "20", "--sft-steps", "4", "--no-compare",
                 "--lr", "0.01", "--wordings", "3", "--pool-per-task", "6", "--patience", "5",
                 "--probe-inputs", "3", "--rouge-threshold", "0.1", *SHORT],
    "dpo": ["--stage", "dpo", "--steps", "8", "--sft-steps", "4", "--no-compare", *SHORT],
    "ppo": ["--stage", "ppo", "--steps", "12", "--sft-steps", "4", "--rollouts", "8",
            "--no-fit-reward", "--judge", "rule", "--pool-per-task", "4", "--wordings", "3",
            "--kl-target", "0.1", "--no-compare", *SHORT],
    "full": ["--stage", "sft", "--steps", "6", "--full", *SHORT],
}
KEPT = ("adapter_model.safetensors", "value_head.safetensors", "model.safetensors",
        "candidates.jsonl", "judged.jsonl", "rollouts.jsonl",
        "probe.jsonl")


def read_rows(path: Path) -> list[dict]:
    """The rows of a log without what the clock says."""
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows.append({name: value for name, value in row.items() if name != "seconds"})
    return rows


def read_results(out: Path) -> dict:
    """What a run leaves: weights, records and logs of it, and of every stage and round under it."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.name in KEPT:
            found[str(path.relative_to(out))] = path.read_bytes()
        elif path.name == "log.jsonl":
            found[str(path.relative_to(out))] = read_rows(path)
    return found


def saved_steps(out: Path) -> list[int]:
    """The steps of a run folder's checkpoints."""
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


# ----- Children of this process -----

def fork(work) -> int:
    """A child that does work() and ends with the status that it returns: its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            status = work()
        except SystemExit as stop:
            status = int(stop.code or 0)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def wait_for(child: int, until: float) -> int | None:
    """The exit status of a child, or None if it has not ended by then."""
    while time.time() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def kill(child: int) -> None:
    """kill -9."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def survive(argv: list[str], delays, limit: float = 240) -> tuple[int, int]:
    """Run train.py, kill it after each delay and run it again: (number of kills, exit status)."""
    for kills, delay in enumerate([*delays, limit]):
        child = fork(lambda: train.main(argv))
        status = wait_for(child, time.time() + delay)
        if status is not None:
            return kills, status
        kill(child)
    raise AssertionError(f"{argv} did not end within {limit} s")


def call(program, argv: list[str]) -> tuple[int, str]:
    """main(argv) of a program: its status, or 70 for an exception, and what it writes to stderr."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            status = program.main(argv)
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
            status = 70
    return status, error.getvalue()


def run_together(argv: list[str], size: int, strike=lambda: 0) -> list[int]:
    """train.py as `size` processes: their exit statuses.

    The last one is sent the signal that strike() returns, once.
    """
    def work(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        return train.main(argv)
    port, end = free_port(), time.time() + 240
    children = [fork(lambda rank=rank: work(rank)) for rank in range(size)]
    statuses, struck = {}, False
    while len(statuses) < size and time.time() < end:
        for child in set(children) - statuses.keys():
            status = wait_for(child, time.time() + 0.003)
            if status is not None:
                statuses[child] = status
        number = 0 if struck or children[-1] in statuses else strike()
        if number:
            os.kill(children[-1], number)
            struck = True
    for child in set(children) - statuses.keys():
        kill(child)
        statuses[child] = -signal.SIGKILL
    return [statuses[child] for child in children]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Died(BaseException):
    """Ends a run at a chosen step, as a kill does."""


def die_after(patch, step: int) -> None:
    """The run's own stage dies once its log has `step` rows; what was saved before stays."""
    real = train.log_step

    def log_step(run, number, *rest):
        real(run, number, *rest)
        if not run.folder.name.startswith(("sft", "round")) and number + 1 == step:
            raise Died
    patch.setattr(train, "log_step", log_step)
