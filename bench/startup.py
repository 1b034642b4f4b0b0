"""How long until a command shows its first output? Each run is a process of its own.

    python -m tools.convert smollm2 models/smollm2   # once
    python bench/startup.py
    python bench/startup.py --quick                  # does it run? help and a wrong flag, once

Seconds from the start of the process until it has written what the row waits for; then it is
killed. A first run of each command is not counted: after it, the files are in the system's cache.
The output is a pseudo-terminal, because eval.py shows its progress at a terminal only; in a pipe,
its first line is that of the table.
"""

import argparse
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LONGEST = 120  # seconds


@dataclass
class Row:
    """A command, and the pattern of the output that is waited for."""

    name: str
    words: list[str]  # what follows `python`
    awaited: bytes = b"."
    said: bytes = b""  # what lies on its standard input


FLAGS = [Row("train.py --help", ["train.py", "--help"]),
         Row("train.py --stage cat --no-such-flag",
             ["train.py", "--stage", "cat", "--no-such-flag"], b"error: ")]
TORCH = Row("python -c 'import torch'", ["-c", "import torch; print(torch.__version__)"])


def model_rows(model: str, out: str) -> list[Row]:
    """eval.py and tools.chat on a real model; eval.py has the least work that gives a table."""
    shared = ["--model", model, "--dtype", "bfloat16", "--out", out, "--max-new-tokens"]
    tasks = ["--tasks", "demo/real/tasks", "--paraphrases", "demo/real/paraphrases.json",
             "--per-task", "1", "--wordings", "2"]
    evaluation, chat = ["eval.py", *shared, "1", *tasks], ["-m", "tools.chat", *shared, "16"]
    return [Row("eval.py to its progress bar", evaluation, b"responses:"),
            Row("eval.py to its table", evaluation, rb"model +\|"),
            Row("python -m tools.chat to its prompt", chat, b"\n> "),
            Row("python -m tools.chat to the first token", chat, rb"\n> [^\r\n(]",
                b"Who are you?\n")]


def seconds_until(row: Row) -> float:
    """Run the command until it says what is awaited. Raises ValueError if it ends before."""
    (ours, theirs), heard = os.openpty(), b""
    subprocess.run(["stty", "rows", "24", "cols", "80"], stdin=theirs, check=True)  # or no bars
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *row.words], cwd=ROOT, bufsize=0, stdout=theirs,
                               stderr=theirs, stdin=subprocess.PIPE)
    os.close(theirs)
    try:
        process.stdin.write(row.said)
        while not re.search(row.awaited, heard, re.DOTALL):
            if not select.select([ours], [], [], LONGEST)[0]:
                raise OSError
            heard += os.read(ours, 4096)  # OSError where the process has ended
        return time.perf_counter() - began
    except OSError:
        raise ValueError(f"{row.name} ended, or was silent for {LONGEST} s, without {row.awaited}: "
                         f"{heard}") from None
    finally:
        process.kill()
        process.stdin.close()
        process.wait()
        os.close(ours)


def measure(rows: list[Row], rounds: int) -> dict[str, list[float]]:
    """{name: seconds of each round}, the rows in turn; a first round warms up."""
    found = {row.name: [] for row in rows}
    for number in range(rounds + 1):
        for row in rows:
            seconds = seconds_until(row)
            if number:
                found[row.name].append(seconds)
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2", help="folder of a real model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of two rows")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as out:
        rows, rounds = [*FLAGS, TORCH, *model_rows(args.model, out)], args.rounds
        if args.quick:
            rows, rounds = FLAGS, 1
        elif not Path(ROOT, args.model).is_dir():
            print(f"no model at {args.model}: eval.py and tools.chat are left out.")
            rows = [*FLAGS, TORCH]
        found = measure(rows, rounds)
    print("| command | median s | lowest | highest |\n|---|---|---|---|")
    for name, every in found.items():
        print(f"| {name} | {statistics.median(every):.2f} | {min(every):.2f} | {max(every):.2f} |")


if __name__ == "__main__":
    main()
