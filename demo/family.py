"""The family on the same candidates: every method trains from one SFT(IA) on one candidates.jsonl, several seeds, one table.

    python demo/family.py --split test --seeds 1 2 3

Per seed: SFT(IA), its sampled answers, and their rewards by the model itself and by exact rules; then each method on
either, each one `python train.py ...` that is printed first, two side by side, one thread each. ppo samples its own
answers; they are rewarded by the rules, or by a reward model that learns the model's own rewards of the same candidates.
Writes results.md, family.png and ppo.png to --out.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from eval import COLOURS, _figure, _tidy                    # noqa: E402
from experiments import command, spread                     # noqa: E402

METHODS = {                                                 # title: (stage, flags beyond the defaults)
    "CAT": ("cat", []), "best answers only": ("expert", []), "conditional": ("conditional", []), "DPO": ("dpo", []),
    "IPO": ("dpo", ["--preference", "ipo", "--length-normalize"]), "RSO": ("rso", []), "SLiC": ("slic", []), "RRHF": ("rrhf", []),
    "PRO": ("pro", []), "RLAIF": ("rlaif", []), "PPO": ("ppo", []),
}
VARIANTS = {                                                # with --variants
    "cDPO": ("dpo", ["--label-smoothing", "0.1"]), "robust DPO": ("dpo", ["--preference", "robust", "--label-smoothing", "0.1"]),
    "RSO, sigmoid": ("rso", ["--preference", "sigmoid"]), "best quantile": ("conditional", ["--conditional", "best"]),
}
CHOICES = {"self": "rewards by the model itself", "rule": "rewards by exact rules", "length": "rewards by length alone (control)"}
SHOWN = {"cr": "CR", "mcr": "MCR", "rougeL": "ROUGE-L", "exact_match": "EM"}


def launch(line):
    """Run a command with one thread, its output in a log beside its --out; the run folders tell what is done already."""
    print("$ python " + " ".join(line[1:]), flush=True)
    with open(line[line.index("--out") + 1] + ".log", "a") as log:
        code = subprocess.run(line, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code:
        raise SystemExit(f"error: that run failed; see {log.name}")


def runs_of_seed(root, seed, split, per_task, judges, methods):
    """{judge: {title: metrics}} of one seed, with "kl" and "seconds"."""
    main, found = root / f"seed{seed}", {}
    for judge in judges:
        start, jobs = root / f"seed{seed}-{judge}", {}
        shared = ["--seed", str(seed), "--no-evaluate", "--no-compare", "--judge", judge]
        if not (start / "adapter_config.json").exists():    # CAT collects the candidates; the first judge's run trains SFT(IA)
            launch(command(start, *shared, *(["--init", str(main)] if main.exists() else [])))
            if not main.exists():
                (start / "sft-ia").rename(main)
        candidates = ["--init", str(main), "--candidates", str(start / "candidates.jsonl")]
        for number, (title, (stage, flags)) in enumerate(methods.items()):
            jobs[title] = out = start if stage == "cat" else root / f"seed{seed}-{judge}-{number}"
            direct = ["--no-fit-reward"] if stage == "ppo" and judge == "rule" else []      # rules can be asked as often as one likes
            if not (out / "adapter_config.json").exists():
                launch(command(out, *shared, *candidates, *flags, *direct, stage=stage))
        found[judge] = evaluated(root / f"seed{seed}-{judge}-eval", main, jobs, split, per_task)
    return found


def evaluated(out, start, jobs, split, per_task):
    """Metrics of the start and of each method, and the KL to the start; conditional models are asked for a good answer."""
    shared = [sys.executable, str(HERE.parent / "eval.py"), "--split", split, "--per-task", str(per_task), "--reference", str(start)]
    marked = {title: folder for title, folder in jobs.items() if title == "conditional"}
    plain = {title: folder for title, folder in jobs.items() if title not in marked}
    wanted = [out / "metrics.json", *(Path(f"{out}-marked", "metrics.json") for _ in marked)]
    if not all(path.exists() for path in wanted):
        out.mkdir(parents=True, exist_ok=True)
        launch([*shared, "--adapter", str(start), *map(str, plain.values()), "--out", str(out)])
        for title, folder in marked.items():
            launch([*shared, "--adapter", str(folder), "--prefix", "good answer : ", "--out", f"{out}-marked"])
    metrics = json.loads((out / "metrics.json").read_text()) | (json.loads(Path(f"{out}-marked", "metrics.json").read_text()) if marked else {})
    rows = {"SFT(IA)": {**metrics[str(start)], "seconds": 0.0}}
    for title, folder in jobs.items():
        log = (folder / "log.jsonl").read_text().splitlines()
        rows[title] = {**metrics[str(folder)], "seconds": json.loads(log[-1])["seconds"]}
    return rows


def table(seeds):
    """Markdown: mean and spread over the seeds per method."""
    lines = ["| method | " + " | ".join(SHOWN.values()) + " | KL to SFT(IA), nats | seconds |", "|---" * (len(SHOWN) + 3) + "|"]
    for title in seeds[0]:
        cells = [spread([rows[title][name]["mean"] for rows in seeds]) for name in SHOWN]
        kl, seconds = ([rows[title]["kl"]["mean"] for rows in seeds], [rows[title]["seconds"] for rows in seeds])
        lines.append(f"| {title} | " + " | ".join([*cells, f"{np.mean(kl):.2f}", f"{np.mean(seconds):.0f}"]) + " |")
    return "\n".join(lines)


def plot(found, path):
    """CR against KL to the start: a point per method and judge, means over seeds."""
    figure, axes = _figure(7, 4.5)
    for colour, (judge, seeds) in zip(COLOURS, found.items()):
        for title in seeds[0]:
            x, y = (np.mean([rows[title][name]["mean"] for rows in seeds]) for name in ("kl", "cr"))
            axes.scatter([max(x, 1e-2)], [100 * y], color=colour, s=18, label=CHOICES[judge] if title == "CAT" else None)
            axes.annotate(title, (max(x, 1e-2), 100 * y), fontsize=6, xytext=(3, 2), textcoords="offset points")
    axes.set(xscale="log", xlabel="KL to SFT(IA), nats per answer", title="CR on held-out wordings")
    _tidy(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)


def plot_ppo(root, numbers, judge, path):
    """PPO's reward and KL per phase, a line per seed."""
    figure, axes = _figure(8, 3.2, ncols=2)
    folder = list(METHODS).index("PPO")
    for colour, seed in zip(COLOURS, numbers):
        rows = [json.loads(line) for line in (root / f"seed{seed}-{judge}-{folder}" / "rollouts.jsonl").read_text().splitlines()]
        phases = sorted({row["phase"] for row in rows})
        for axis, name in zip(axes, ("score", "kl")):
            axis.plot(phases, [np.mean([row[name] for row in rows if row["phase"] == phase]) for phase in phases], color=colour, label=f"seed {seed}")
    for axis, title in zip(axes, ("reward of sampled answers", "KL to SFT(IA), nats per answer")):
        axis.set(title=title, xlabel="phase")
        _tidy(axis)
        axis.set_ylabel("")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main(argv=None):
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--per-task", type=int, default=10, help="held-out inputs per task")
    parser.add_argument("--judges", nargs="+", choices=CHOICES, default=["self", "rule"])
    parser.add_argument("--variants", action="store_true", help="cDPO, robust DPO, RSO with the sigmoid, the best quantile")
    parser.add_argument("--out", default="runs/family")
    args = parser.parse_args(argv)
    root = Path(args.out)
    root.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(runs_of_seed, root, seed, args.split, args.per_task, args.judges, METHODS | (VARIANTS if args.variants else {})) for seed in args.seeds]
        seeds = [job.result() for job in jobs]
    found = {judge: [rows[judge] for rows in seeds] for judge in args.judges}
    parts = [f"Split {args.split}, seeds {', '.join(map(str, args.seeds))}; mean ± standard deviation over seeds, percent; seconds of training, one thread."]
    for judge, rows in found.items():
        parts += [f"{CHOICES[judge][0].upper()}{CHOICES[judge][1:]}:", table(rows)]
    (root / "results.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
    plot(found, root / "family.png")
    plot_ppo(root, args.seeds, args.judges[-1], root / "ppo.png")


if __name__ == "__main__":
    main()
