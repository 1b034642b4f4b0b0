"""Every table and figure of the README's results: several seeds, controls, ablations. Resumes where it stopped.

    python demo/experiments.py --split dev --seeds 101 102       # while choosing settings
    python demo/experiments.py --split test --seeds 1 2 3 4 5    # the final numbers: about an hour on two cores

Each run is one `python train.py ...` that is printed first; two run side by side, one thread each. Writes results.md
and figures to --out. Effects are paired differences per seed, printed whatever they are.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from eval import paired_difference, plot_sweep              # noqa: E402

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}     # two-sided t quantiles, n values
METRICS = {"cr": "CR", "mcr": "MCR", "rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "exact_match": "EM",
           "consistent_and_correct": "consistent and correct", "worst_paraphrase": "worst wording"}
LADDER = ("base", "SFT", "SFT(IA)", "SFT(IA)+CAT")

# Runs that continue a seed's SFT(IA) (in {main}); "{main}/candidates.jsonl" are the candidates that its CAT trained on.
SAME = ["--init", "{main}", "--candidates", "{main}/candidates.jsonl"]
AGAIN = ["--init", "{main}"]
CONTROLS = {
    "gold": ("more cross-entropy on gold targets", [*SAME, "--ce-target", "gold", "--no-ranking"]),
    "rule": ("CAT, exact judge", [*AGAIN, "--judge", "rule"]),
}
ABLATIONS = {
    "lam0": ("lambda 0", [*SAME, "--lam", "0"]), "lam0.1": ("lambda 0.1", [*SAME, "--lam", "0.1"]),
    "lam0.5": ("lambda 0.5", [*SAME, "--lam", "0.5"]),
    "noranking": ("cross-entropy on the best answer only", [*SAME, "--no-ranking"]),
    "onestep": ("one-step reward", [*AGAIN, "--reward-steps", "one"]),
    "hidden": ("reward without the target", [*AGAIN, "--no-show-target"]),
    "worse": ("best answer under each failing wording", [*SAME, "--condition", "worse"]),
}
WORDINGS = (2, 5)                                           # besides the default
FRESH = {                                                   # SFT(IA) on 5 wordings, then answers to the 9 others, without their targets
    "fresh": ("5 wordings, then CAT on 9 others", []), "freshrule": ("the same, exact judge", ["--judge", "rule"]),
}
FEW = "SFT(IA) on 5 wordings"


def command(out, *rest, stage="cat"):
    """One train.py command line."""
    return [sys.executable, str(HERE.parent / "train.py"), "--stage", stage, "--out", str(out), *rest]


def run(line, threads):
    """Run a command unless its metrics are there already; its output goes to a log beside the run folder."""
    out = Path(line[line.index("--out") + 1])
    if not (out / "metrics.json").exists():
        print("$ python " + " ".join(line[1:]), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{out}.log", "w") as log:
            code = subprocess.run(line, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
        if code:
            raise SystemExit(f"error: that run failed; see {out}.log")
    return json.loads((out / "metrics.json").read_text())


def runs_of_seed(root, seed, split, more, threads):
    """{row: metrics} of one seed: the ladder, the controls, and with `more` the ablations."""
    main, shared = root / f"seed{seed}", ["--seed", str(seed), "--split", split, "--eval-per-task", "30"]
    rows = dict(run(command(main, *shared), threads))
    for name, (title, flags) in {**CONTROLS, **(ABLATIONS if more else {})}.items():
        flags = [text.format(main=main) for text in flags]
        (rows[title],) = run(command(root / f"seed{seed}-{name}", *shared, "--no-compare", *flags), threads).values()
    for count in WORDINGS if more else ():
        out = root / f"seed{seed}-wordings{count}"
        found = run(command(out, *shared, "--no-compare", "--wordings", str(count)), threads)
        (rows[f"{count} wordings"],) = found.values()
    for name, (title, flags) in FRESH.items() if more else ():
        few = ["--wordings", "5", "--init", f"{main}-wordings5", "--fresh-wordings", "9", *flags]
        (rows[title],) = run(command(root / f"seed{seed}-{name}", *shared, "--no-compare", *few), threads).values()
    if more:
        few = Path(f"{main}-wordings5", "sft-ia")
        line = [sys.executable, str(HERE.parent / "eval.py"), "--adapter", str(few), "--split", split, "--per-task", "30", "--max-len", "512"]
        rows[FEW] = run([*line, "--out", str(root / f"seed{seed}-ia5")], threads)[str(few)]
    rows["judge"] = json.loads((main / "judge.json").read_text())
    return rows


def spread(values):
    """mean +- sample standard deviation, in percent."""
    values = 100 * np.array(values)
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def difference(after, before):
    """Mean paired difference over seeds with its 95 % t interval, and in how many seeds it is positive."""
    delta = 100 * (np.array(after) - np.array(before))
    half = T95[len(delta)] * delta.std(ddof=1) / np.sqrt(len(delta)) if len(delta) in T95 else float("nan")
    return f"{delta.mean():+.1f} [{delta.mean() - half:+.1f}, {delta.mean() + half:+.1f}] {(delta > 0).sum()}/{len(delta)}"


def table(seeds, names):
    """Markdown: a row per model, mean and spread over the seeds."""
    lines = ["| model | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for name in names:
        cells = [spread([rows[name][metric]["mean"] for rows in seeds]) for metric in METRICS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(seeds, pairs):
    """Markdown: paired differences per seed."""
    shown = ("cr", "mcr", "rougeL", "exact_match")
    lines = ["| difference | " + " | ".join(METRICS[m] for m in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for before, after in pairs:
        cells = [difference([r[after][m]["mean"] for r in seeds], [r[before][m]["mean"] for r in seeds]) for m in shown]
        lines.append(f"| {after} - {before} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def confusion(seeds):
    """Markdown: the self-judge against the exact rules, on the different answers that it was asked about."""
    lines = ["| question | accuracy | precision | recall | n per seed |", "|---|---|---|---|---|"]
    for name, title in (("type", "expected type"), ("correct", "correct"), ("best", "reward 2")):
        rows = [s["judge"]["asked"][name] for s in seeds]
        cells = [spread([row[k] for row in rows if row[k] is not None]) for k in ("accuracy", "precision", "recall")]
        n = np.mean([row["tp"] + row["fp"] + row["fn"] + row["tn"] for row in rows])
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {n:.0f} |")
    return "\n".join(lines)


def resolution(root, numbers):
    """Half the width of the 95 % interval of one seed's CR difference, SFT(IA) to CAT: paired bootstrap over questions."""
    halves, n = [], 0
    for number in numbers:
        tables = {}
        with open(root / f"seed{number}" / "questions.jsonl", encoding="utf-8") as file:
            for row in map(json.loads, file):
                tables.setdefault(row["model"], []).append(row)
        found = paired_difference(tables[LADDER[2]], tables[LADDER[3]], "cr")
        halves, n = [*halves, 50 * (found["ci95"][1] - found["ci95"][0])], found["n"]
    return (f"Within one seed, over its {n} questions, the CR difference from {LADDER[2]} to {LADDER[3]} is known to ± "
            f"{np.mean(halves):.1f} points (95 %, paired bootstrap over questions, mean of the seeds).")


def mean_metrics(seeds, name):
    """Mean over seeds in the form of metrics.json, the interval being that of the mean over seeds."""
    found = {}
    for metric in METRICS:
        values = np.array([rows[name][metric]["mean"] for rows in seeds])
        half = T95.get(len(values), 0.0) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        found[metric] = {"mean": values.mean(), "ci95": [values.mean() - half, values.mean() + half], "n": len(values)}
    return found


def write_results(root, seeds, split, numbers, n_ablated):
    """results.md and, with the ablations, the two sweeps."""
    pairs = [*zip(LADDER, LADDER[1:]), *((LADDER[2], title) for title, _ in CONTROLS.values()),
             *((title, LADDER[3]) for title, _ in CONTROLS.values())]
    parts = [f"Split {split}, seeds {', '.join(map(str, numbers))}; mean ± standard deviation over seeds, percent.",
             table(seeds, [*LADDER, *(title for title, _ in CONTROLS.values())]),
             "Paired differences per seed: mean [95 % interval] and the number of seeds in which it is positive.",
             differences(seeds, pairs), resolution(root, numbers), "The self-judge against the exact rules, unique answers that it was asked about:",
             confusion(seeds)]
    shutil.copy(root / f"seed{numbers[0]}" / "plots" / "metrics.png", root / "metrics.png")
    shutil.copy(root / f"seed{numbers[0]}" / "plots" / "question.png", root / "question.png")
    if n_ablated:
        ablated = seeds[:n_ablated]
        titles = [title for title, _ in ABLATIONS.values()] + [f"{n} wordings" for n in WORDINGS]
        parts += [f"Ablations, the first {len(ablated)} of these seeds; each against the full method on the same seeds.",
                  table(ablated, [LADDER[3], *titles]), differences(ablated, [(LADDER[3], title) for title in titles])]
        few = [title for title, _ in FRESH.values()]
        parts += ["Wordings that no target was ever given for: SFT(IA) sees 5 wordings, CAT samples answers under the 9 others and rewards them.",
                  table(ablated, [FEW, "5 wordings", *few, LADDER[2]]),
                  differences(ablated, [(FEW, "5 wordings"), *((FEW, title) for title in few)])]
        sweep = [(lam, mean_metrics(ablated, f"lambda {lam:g}")) for lam in (0, 0.1, 0.5)]
        plot_sweep([*sweep, (1, mean_metrics(ablated, LADDER[3]))], "lambda", root / "lambda.png")
        sweep = [(n, mean_metrics(ablated, f"{n} wordings")) for n in WORDINGS]
        plot_sweep([*sweep, (14, mean_metrics(ablated, LADDER[3]))], "training wordings per task", root / "wordings.png")
    (root / "results.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))


def main(argv=None):
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--out", default="runs/experiments")
    parser.add_argument("--ablations", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ablation-seeds", type=int, default=3, help="the first so many seeds run the ablations")
    args = parser.parse_args(argv)
    root = Path(args.out)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(runs_of_seed, root, seed, args.split, args.ablations and k < args.ablation_seeds, 1)
                for k, seed in enumerate(args.seeds)]
        seeds = [job.result() for job in jobs]
    write_results(root, seeds, args.split, args.seeds, args.ablation_seeds if args.ablations else 0)


if __name__ == "__main__":
    main()
