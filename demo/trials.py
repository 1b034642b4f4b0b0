"""What the experiments share: their flags, how they run commands, and tables over several seeds.

Each run is one `python train.py ...` or `python eval.py ...`, printed before it starts. Two run
side by side, one thread each. What is there already is not made again, so a command that was
stopped goes on where it was. Effects are paired differences per seed, printed whatever they are.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the scripts import the course and extras/, too
# Two-sided 95 % quantiles of Student's t, for the mean of so many values.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262,
       11: 2.228, 12: 2.201}
METRICS = {"cr": "CR", "mcr": "MCR", "rougeL": "ROUGE-L", "exact_match": "EM"}


# ----- Running -----
def make_parser(about, out, seeds):
    """The flags of every experiment."""
    parser = argparse.ArgumentParser(description=about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, seeds + 1)))
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def run_seeds(work, seeds):
    """[work(number, seed), ...] for each seed and its number from 0 on."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, range(len(seeds)), seeds))


def train(stage, out, *flags, makes="metrics.json"):
    """Run a stage; see `run`."""
    return run(["train.py", "--stage", stage], out, flags, makes)


def evaluate(out, *flags):
    """Run eval.py; see `run`."""
    return run(["eval.py"], out, flags, "metrics.json")


def best_of(out, *flags):
    """Run tools.best_of; see `run`."""
    return run(["-m", "tools.best_of"], out, flags, "best_of.json")


def run(words, out, flags, makes):
    """Run a command unless OUT has the JSON file that it makes; returns what that file holds.

    The command and its output go to OUT.log. What another command made is refused.
    """
    line = [*words, "--out", str(out), *flags]
    if words[0] != "-m":
        line[0] = str(HERE.parent / words[0])
    command, log = "$ " + shlex.join(["python", *line]), Path(f"{out}.log")
    if Path(out, makes).exists():
        made = log.read_text().partition("\n")[0] if log.exists() else command
        if without_init(made) != without_init(command):
            raise SystemExit(f"error: {out} was made by another command ({log}):\n{made}\nnot "
                             f"by\n{command}\nGive another --out, or remove that folder.")
    else:
        print(command, flush=True)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            print(command, file=file, flush=True)
            code = subprocess.run([sys.executable, *line], stdout=file, stderr=file,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        if code:
            raise SystemExit(f"error: that run failed; see {out}.log")
    return json.loads(Path(out, makes).read_text())


def without_init(command):
    """A command without --init DIR: what comes before is found or trained."""
    return re.sub(r" --init ('[^']*'|\S+)", "", command)


# ----- Figures over seeds -----
def means(seeds, model, metric):
    """A model's metric in each seed, (seeds,), from [{model: metrics}, ...]."""
    return np.array([rows[model][metric]["mean"] for rows in seeds])


def spread(values):
    """mean ± sample standard deviation, in percent."""
    values = 100 * np.array(values)
    if len(values) < 2:
        return f"{values.mean():.1f}"
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def half_interval(values):
    """Half the width of the 95 % t interval of the mean; nan where there is none."""
    if len(values) not in T95:
        return float("nan")
    return T95[len(values)] * np.std(values, ddof=1) / np.sqrt(len(values))


def difference(seeds, before, after, metric):
    """Mean paired difference with its 95 % t interval, and in how many seeds it is positive."""
    return interval(means(seeds, after, metric) - means(seeds, before, metric))


def interval(delta):
    """The mean of differences (n,) with its 95 % t interval, in percent; how many are positive.

    One difference has no interval.
    """
    delta = 100 * np.array(delta)
    mean, half = delta.mean(), half_interval(delta)
    bounds = f"[{mean - half:+.1f}, {mean + half:+.1f}] " if len(delta) > 1 else ""
    return f"{mean:+.1f} {bounds}{(delta > 0).sum()}/{len(delta)}"


def table(header, rows):
    """A Markdown table of texts."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


def write_results(out, parts):
    """Write results.md, and print it."""
    text = "\n\n".join(parts) + "\n"
    (out / "results.md").write_text(text)
    print(text, end="")
