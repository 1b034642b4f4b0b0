"""Every table and figure of docs/family.md: all methods on the same candidates, several seeds.

    python demo/family.py --split test --seeds 1 2 3
    python demo/family.py --split test --seeds 1 2 3 --setting fresh --judges agreement
        --out runs/family-fresh

Per seed: SFT(IA), its sampled answers, and their rewards by the model itself and by exact rules;
then each method on either. PPO samples its own answers. They are rewarded by the rules, or by a
reward model that learns the model's own rewards of the same candidates. Writes results.md and
plots/ to --out. What is run, and how: trials.py.
"""

import json

import numpy as np
import trials

METHODS = {  # title: (stage, flags beyond the defaults)
    "CAT": ("cat", ""),
    "best answers only": ("expert", ""),
    "conditional": ("conditional", ""),
    "DPO": ("dpo", ""),
    "IPO": ("dpo", "--preference ipo --length-normalize"),
    "RSO": ("rso", ""),
    "SLiC": ("slic", ""),
    "RRHF": ("rrhf", ""),
    "PRO": ("pro", ""),
    "RLAIF": ("rlaif", ""),
    "PPO": ("ppo", ""),
}
VARIANTS = {  # with --variants
    "cDPO": ("dpo", "--label-smoothing 0.1"),
    "robust DPO": ("dpo", "--preference robust --label-smoothing 0.1"),
    "RSO, sigmoid": ("rso", "--preference sigmoid"),
    "best quantile": ("conditional", "--conditional best"),
}
# SFT(IA) sees all wordings with their targets, or 5 of them, and the methods learn from 9 others.
SETTINGS = {"seen": "--wordings 14 --fresh-wordings 0", "fresh": ""}
COMPARING = ("cat", "dpo", "slic", "rrhf", "pro")  # which read --condition
CHOICES = {"self": "rewards by the model itself", "rule": "rewards by exact rules",
           "agreement": "rewards by agreement",
           "length": "rewards by length alone (control)"}
PPO_PANELS = {"score": "reward of sampled answers", "kl": "KL to SFT(IA), nats per answer"}


def runs_of_seed(args, seed):
    """{judge: {title: metrics}} of one seed, with "kl" and "seconds"."""
    main, found = args.out / f"seed{seed}", {}
    methods = METHODS | (VARIANTS if args.variants else {})
    for judge in args.judges:
        cat, folders = args.out / f"seed{seed}-{judge}", {}
        common = ["--seed", str(seed), "--no-evaluate", "--no-compare", "--judge", judge,
                  *SETTINGS[args.setting].split()]
        init = ["--init", str(main)] if main.exists() else []
        # CAT collects the candidates. The first judge's run trains SFT(IA) on the way.
        own = ["--condition", "own"] if args.setting == "seen" else []
        trials.train("cat", cat, *common, *own, *init, makes="adapter_config.json")
        if not main.exists():
            (cat / "sft-ia").rename(main)
        common += ["--init", str(main), "--candidates", str(cat / "candidates.jsonl")]
        for number, (title, (stage, flags)) in enumerate(methods.items()):
            folders[title] = f"{cat}-{number}" if number else str(cat)
            if not number:  # the run that collected
                continue
            words = flags.split() + own * (stage in COMPARING)
            if stage == "ppo" and judge == "rule":  # rules can be asked as often as one likes
                words.append("--no-fit-reward")
            trials.train(stage, folders[title], *common, *words, makes="adapter_config.json")
        found[judge] = evaluate_methods(args, f"{cat}-eval", str(main), folders)
    return found


def evaluate_methods(args, out, main, folders):
    """{title: metrics} of SFT(IA) and of each method, with the KL to SFT(IA)."""
    common = ["--split", args.split, "--per-task", str(args.per_task), "--reference", main]
    plain = [folder for title, folder in folders.items() if title != "conditional"]
    metrics = trials.evaluate(out, *common, "--adapter", main, *plain)
    # Conditional models are asked for a good answer.
    metrics |= trials.evaluate(f"{out}-marked", *common, "--adapter", folders["conditional"],
                               "--prefix", "good answer : ")
    found = {"SFT(IA)": metrics[main] | {"seconds": 0.0}}
    for title, folder in folders.items():
        found[title] = metrics[folder] | {"seconds": read_rows(folder, "log")[-1]["seconds"]}
    return found


def read_rows(folder, name):
    """The rows of a JSON Lines file of a run."""
    with open(f"{folder}/{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ----- Tables and figures -----
def method_table(seeds):
    """Markdown: mean and spread over the seeds per method."""
    lines = []
    for title in seeds[0]:
        cells = [trials.spread(trials.means(seeds, title, metric)) for metric in trials.METRICS]
        seconds = np.mean([rows[title]["seconds"] for rows in seeds])
        kl = trials.means(seeds, title, "kl").mean()
        lines.append([title, *cells, f"{kl:.2f}", f"{seconds:.0f}"])
    header = ["method", *trials.METRICS.values(), "KL to SFT(IA), nats", "seconds"]
    return trials.table(header, lines)


def difference_table(seeds):
    """Markdown: paired differences to SFT(IA) per method, with intervals over the seeds."""
    lines = []
    for title in seeds[0]:
        if title != "SFT(IA)":
            lines.append([title, *(trials.difference(seeds, "SFT(IA)", title, metric)
                                   for metric in trials.METRICS)])
    return trials.table(["method", *trials.METRICS.values()], lines)


def plot_family(found):
    """CR against KL to the start: a point per method and judge, means over seeds."""
    from extras.reports.plots import new_figure

    figure, (axes,) = new_figure(7, 4.5)
    for judge, seeds in found.items():
        x = [max(trials.means(seeds, title, "kl").mean(), 1e-2) for title in seeds[0]]
        y = [100 * trials.means(seeds, title, "cr").mean() for title in seeds[0]]
        axes.scatter(x, y, s=18, label=CHOICES[judge])
        for title, *place in zip(seeds[0], x, y, strict=True):
            axes.annotate(title, place, (3, 2), textcoords="offset points", fontsize=6)
    axes.set(xscale="log", xlabel="KL to SFT(IA), nats per answer", ylabel="percent",
             title="CR on held-out wordings")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def plot_ppo(args):
    """PPO's reward and KL per phase, under the last judge, a line per seed."""
    from extras.reports.plots import new_figure

    figure, panels = new_figure(8, 3.2, columns=2)
    for seed in args.seeds:
        run = f"seed{seed}-{args.judges[-1]}-{list(METHODS).index('PPO')}"
        rows = read_rows(args.out / run, "rollouts")
        phases = sorted({row["phase"] for row in rows})
        for axes, (name, title) in zip(panels, PPO_PANELS.items(), strict=True):
            values = [np.mean([row[name] for row in rows if row["phase"] == k]) for k in phases]
            axes.plot(phases, values, label=f"seed {seed}")
            axes.set(title=title, xlabel="phase")
    panels[0].legend(fontsize=8)
    return figure


def main(argv=None):
    """Run what is missing, then write the tables."""
    parser = trials.make_parser(__doc__, "runs/family", 3)
    parser.add_argument("--per-task", type=int, default=10, help="held-out inputs per task")
    parser.add_argument("--judges", nargs="+", choices=CHOICES, default=["self", "rule"])
    parser.add_argument("--setting", choices=SETTINGS, default="seen",
                        help="wordings with targets, or without (5 for SFT(IA), 9 others)")
    parser.add_argument("--variants", action="store_true",
                        help="cDPO, robust DPO, RSO with the sigmoid, the best quantile")
    args = parser.parse_args(argv)
    seeds = trials.run_seeds(lambda _, seed: runs_of_seed(args, seed), args.seeds)
    found = {judge: [rows[judge] for rows in seeds] for judge in args.judges}
    parts = [f"Split {args.split}, seeds {', '.join(map(str, args.seeds))}; mean ± standard "
             "deviation over seeds, percent; seconds of training, one thread."]
    for judge, rows in found.items():
        parts += [f"{CHOICES[judge].capitalize()}:", method_table(rows),
                  "Paired differences to SFT(IA): mean [95 % t interval over the seeds], and the "
                  "number of seeds in which it is positive.", difference_table(rows)]
    trials.write_results(args.out, parts)
    from extras.reports.plots import save_plots

    save_plots(args.out, {"family": (plot_family, found), "ppo": (plot_ppo, args)})


if __name__ == "__main__":
    main()
