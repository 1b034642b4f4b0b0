"""Every table and figure of docs/consistency.md: several seeds, controls, ablations.

    python demo/experiments.py --split dev --seeds 101 102       # while choosing settings
    python demo/experiments.py --split test --seeds 1 2 3 4 5    # the final numbers, about an hour

Writes results.md and plots/ to --out. What is run, and how: trials.py.
"""

import argparse
import json
import shutil

import numpy as np
import trials

ALL_METRICS = {"cr": "CR", "mcr": "MCR", "rouge1": "ROUGE-1", "rougeL": "ROUGE-L",
               "exact_match": "EM", "consistent_and_correct": "consistent and correct",
               "worst_paraphrase": "worst wording"}
SFT_IA, CAT = "SFT(IA)", "SFT(IA)+CAT"
LADDER = ("base", "SFT", SFT_IA, CAT)
# Runs that continue SFT(IA) of the seed's main run. SAME: on the candidates of that run's CAT.
AGAIN, SAME = "--init {main}", "--init {main} --candidates {main}/candidates.jsonl"
CONTROLS = {  # run: (title, flags)
    "gold": ("more cross-entropy on gold targets", f"{SAME} --ce-target gold --no-ranking"),
    "rule": ("CAT, exact judge", f"{AGAIN} --judge rule"),
}
ABLATIONS = {
    "lam0": ("lambda 0", f"{SAME} --lam 0"),
    "lam0.1": ("lambda 0.1", f"{SAME} --lam 0.1"),
    "lam0.5": ("lambda 0.5", f"{SAME} --lam 0.5"),
    "noranking": ("cross-entropy on the best answer only", f"{SAME} --no-ranking"),
    "onestep": ("one-step reward", f"{AGAIN} --reward-steps one"),
    "hidden": ("reward without the target", f"{AGAIN} --no-show-target"),
    "worse": ("best answer under each failing wording", f"{SAME} --condition worse"),
    "wordings2": ("2 wordings", "--wordings 2"),
    "wordings5": ("5 wordings", "--wordings 5"),
}
# SFT(IA) sees 5 wordings; CAT samples answers under the 9 others, without their targets.
UNSEEN = "--init {main}-wordings5 --fresh-wordings 9"
FRESH = {
    "fresh": ("5 wordings, then CAT on 9 others", UNSEEN),
    "freshrule": ("the same, exact judge", f"{UNSEEN} --judge rule"),
}
FEW = "SFT(IA) on 5 wordings"
SWEEPS = {  # plot: (setting, {its value: model})
    "lambda": ("lambda", {0: "lambda 0", 0.1: "lambda 0.1", 0.5: "lambda 0.5", 1: CAT}),
    "wordings": ("training wordings per task", {2: "2 wordings", 5: "5 wordings", 14: CAT}),
}


def titles(variants):
    """What the tables call these runs."""
    return [title for title, _ in variants.values()]


def runs_of_seed(out, seed, split, more):
    """{model: metrics} of one seed: the ladder, the controls, and with `more` the ablations."""
    main, variants = out / f"seed{seed}", CONTROLS
    common = ["--seed", str(seed), "--split", split, "--eval-per-task", "30",
              "--condition", "own", "--fresh-wordings", "0"]
    rows = dict(trials.train("cat", main, *common, "--wordings", "14"))
    if more:
        variants = CONTROLS | ABLATIONS | FRESH
    for name, (title, flags) in variants.items():
        words = [word.format(main=main) for word in flags.split()]
        found = trials.train("cat", f"{main}-{name}", *common, "--no-compare", *words)
        (rows[title],) = found.values()
    if more:
        few = f"{main}-wordings5/sft-ia"
        rows[FEW] = trials.evaluate(f"{main}-ia5", "--adapter", few, "--split", split,
                                    "--per-task", "30", "--max-len", "512")[few]
    rows["judge"] = json.loads((main / "judge.json").read_text())
    return rows


# ----- Tables and figures -----
def model_table(seeds, models):
    """Markdown: a row per model, mean and spread over the seeds."""
    rows = []
    for name in models:
        cells = [trials.spread(trials.means(seeds, name, metric)) for metric in ALL_METRICS]
        rows.append([name, *cells])
    return trials.table(["model", *ALL_METRICS.values()], rows)


def difference_table(seeds, pairs):
    """Markdown: paired differences per seed of (before, after)."""
    rows = []
    for before, after in pairs:
        cells = [trials.difference(seeds, before, after, metric) for metric in trials.METRICS]
        rows.append([f"{after} - {before}", *cells])
    return trials.table(["difference", *trials.METRICS.values()], rows)


def judge_table(seeds):
    """Markdown: the self-judge against exact rules, on the different answers that it was asked."""
    questions, lines = {"type": "expected type", "correct": "correct", "best": "reward 2"}, []
    ratios = ("accuracy", "precision", "recall")
    for name, title in questions.items():
        asked = [rows["judge"]["asked"][name] for rows in seeds]
        cells = []
        for ratio in ratios:
            known = [counts[ratio] for counts in asked if counts[ratio] is not None]
            cells.append(trials.spread(known))
        n = np.mean([sum(counts[cell] for cell in ("tp", "fp", "fn", "tn")) for counts in asked])
        lines.append([title, *cells, f"{n:.0f}"])
    return trials.table(["question", *ratios, "n per seed"], lines)


def resolution(out, numbers):
    """How well one seed knows its CR difference, SFT(IA) to CAT: bootstrap over questions."""
    from extras.reports.metrics import paired_difference

    halves = []
    for number in numbers:
        tables = {}
        for line in (out / f"seed{number}" / "questions.jsonl").read_text().splitlines():
            row = json.loads(line)
            tables.setdefault(row["model"], []).append(row)
        found = paired_difference(tables[SFT_IA], tables[CAT], "cr")
        halves.append(50 * (found["ci95"][1] - found["ci95"][0]))
    return (f"Within one seed, over its {found['n']} questions, the CR difference from {SFT_IA} to "
            f"{CAT} is known to ± {np.mean(halves):.1f} points (95 %, paired bootstrap over "
            "questions, mean of the seeds).")


def main_tables(seeds, args):
    """The parts of results.md on the ladder, the controls and the self-judge."""
    controls, numbers = titles(CONTROLS), ", ".join(map(str, args.seeds))
    pairs = [*zip(LADDER, LADDER[1:], strict=False), *((SFT_IA, title) for title in controls),
             *((title, CAT) for title in controls)]
    return [f"Split {args.split}, seeds {numbers}; mean ± standard deviation over seeds, percent.",
            model_table(seeds, [*LADDER, *controls]),
            "Paired differences per seed: mean [95 % interval] and the number of seeds in which it "
            "is positive.",
            difference_table(seeds, pairs), resolution(args.out, args.seeds),
            "The self-judge against the exact rules, unique answers that it was asked about:",
            judge_table(seeds)]


def ablation_tables(seeds):
    """The parts of results.md on the ablations, and on wordings without targets."""
    ablations, fresh = titles(ABLATIONS), ["5 wordings", *titles(FRESH)]
    return [f"Ablations, the first {len(seeds)} of these seeds; each against the full method on "
            "the same seeds.",
            model_table(seeds, [CAT, *ablations]),
            difference_table(seeds, [(CAT, title) for title in ablations]),
            "Wordings that no target was ever given for: SFT(IA) sees 5 wordings, CAT samples "
            "answers under the 9 others and rewards them.",
            model_table(seeds, [FEW, *fresh, SFT_IA]),
            difference_table(seeds, [(FEW, title) for title in fresh])]


def plot_sweep(seeds, setting, models):
    """CR and ROUGE-L over a setting, with 95 % t intervals over seeds; models: {value: model}."""
    from extras.reports.plots import new_figure

    figure, (axes,) = new_figure(6, 3.8)
    for k, metric in enumerate(("cr", "rougeL")):
        values = [100 * trials.means(seeds, name, metric) for name in models.values()]
        mean = np.mean(values, 1)  # (models,)
        half = np.array([trials.half_interval(row) for row in values])
        axes.plot(list(models), mean, f"C{k}o-", label=ALL_METRICS[metric])
        axes.fill_between(list(models), mean - half, mean + half, color=f"C{k}", alpha=0.15,
                          linewidth=0)
    axes.set(xlabel=setting, ylabel="percent", xticks=list(models))
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def main(argv=None):
    """Run what is missing, then write the tables."""
    parser = trials.make_parser(__doc__, "runs/experiments", 5)
    parser.add_argument("--ablations", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ablation-seeds", type=int, default=3,
                        help="the first so many seeds run the ablations")
    args = parser.parse_args(argv)
    n = args.ablation_seeds if args.ablations else 0
    seeds = trials.run_seeds(lambda k, seed: runs_of_seed(args.out, seed, args.split, k < n),
                             args.seeds)
    parts = main_tables(seeds, args)
    shutil.copytree(args.out / f"seed{args.seeds[0]}" / "plots", args.out / "plots",
                    dirs_exist_ok=True)
    if n:
        from extras.reports.plots import save_plots

        parts += ablation_tables(seeds[:n])
        save_plots(args.out, {name: (plot_sweep, seeds[:n], *sweep)
                              for name, sweep in SWEEPS.items()})
    trials.write_results(args.out, parts)


if __name__ == "__main__":
    main()
