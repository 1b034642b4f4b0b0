"""Reward and correctness against the distance from SFT(IA): best of n, DPO and PPO.

    python demo/frontier.py --split test --seeds 1 2 3

Per seed: SFT(IA), and a reward model that learns exact rewards of its answers. The same reward
model then chooses the best of n samples, rewards PPO's answers, and ranks DPO's pairs, each at
several distances. DPO's follow from its learning rate: at the default one the model hardly moves in
100 steps, whatever beta is. Asked are held-out inputs under held-out wordings; reward and exact
match are of sampled answers, and the distance is the KL divergence from SFT(IA) in nats per answer
(of the best of n the bound log n - (n - 1) / n). Writes results.md and plots/ to --out.
"""

import numpy as np
import trials

SAMPLES = 32  # of SFT(IA), for the best of 1, 2, 4, ... of them
ARMS = {  # {method: {setting: (stage, flags)}}
    "DPO": {f"rate {rate}": ("dpo", f"--lr {rate}") for rate in ("3e-5", "1e-4", "3e-4", "6e-4")},
    "PPO": {f"KL coefficient {beta}": ("ppo", f"--kl-beta {beta}") for beta in (0.5, 0.1, 0.02)},
}
BEST = "best of n"
SHOWN = {"kl": "KL, nats per answer", "reward": "reward beyond SFT(IA)'s",
         "truth": "exact match, percent"}


def runs_of_seed(args, seed):
    """{(method, setting): {"kl", "reward", "truth"}} of one seed."""
    main, folders = f"{args.out}/seed{seed}", {}
    common = ["--seed", str(seed), "--no-evaluate", "--no-compare"]
    trials.train("reward", main, *common, "--judge", "rule", makes="adapter_config.json")
    common += ["--init", main, "--judge", "reward", "--reward-model", main]
    for method, settings in ARMS.items():
        for number, (title, (stage, flags)) in enumerate(settings.items()):
            folder = folders[method, title] = f"{main}-{stage}{number}"
            if stage == "dpo" and number:  # the first one's answers are what all would sample
                flags += f" --candidates {main}-dpo0/candidates.jsonl"
            trials.train(stage, folder, *common, *flags.split(), makes="adapter_config.json")
    # What their answers are worth, and how far they went.
    start, asked = f"{main}/sft-ia", ["--split", args.split, "--per-task", str(args.per_task)]
    chosen = ["--reward-model", main, "--seed", str(seed), *asked]
    many = trials.best_of(f"{main}-many", "--samples", str(SAMPLES), "--adapter", start, *chosen)
    one = trials.best_of(f"{main}-one", "--samples", "1", "--adapter", *folders.values(), *chosen)
    distance = trials.evaluate(f"{main}-kl", "--reference", start, "--adapter", *folders.values(),
                               *asked)
    found = {}
    for row in many[start]["reward model"]:
        found[BEST, f"n {row['n']}"] = row
    for key, folder in folders.items():
        (row,) = one[folder]["reward model"]
        found[key] = row | {"kl": distance[folder]["kl"]["mean"]}
    level = found[BEST, "n 1"]["reward"]  # which is arbitrary in each reward model
    return {key: row | {"reward": row["reward"] - level} for key, row in found.items()}


def frontier_table(seeds):
    """Markdown: a row per method and setting, means and spread over the seeds."""
    lines = []
    for method, setting in seeds[0]:
        cells = [method, setting]
        for name in SHOWN:
            values = np.array([found[method, setting][name] for found in seeds])
            values = 100 * values if name == "truth" else values
            cells.append(f"{values.mean():.2f} ± {values.std(ddof=1) if len(seeds) > 1 else 0:.2f}")
        lines.append(cells)
    return trials.table(["method", "setting", *SHOWN.values()], lines)


def plot_frontier(seeds):
    """Reward, and exact match, over the distance: a line per method, means over the seeds."""
    from extras.reports.plots import new_figure

    figure, panels = new_figure(9, 3.8, columns=2)
    for method in (BEST, *ARMS):
        points = []  # [(kl, reward, truth)]
        for key in seeds[0]:
            if key[0] == method:
                points.append([np.mean([found[key][name] for found in seeds]) for name in SHOWN])
        kl, reward, truth = np.array(sorted(points)).T
        panels[0].plot(kl, reward, marker="o", label=method)
        panels[1].plot(kl, 100 * truth, marker="o")
    for axes, name in zip(panels, ("reward", "truth"), strict=True):
        axes.set(xlabel=SHOWN["kl"], ylabel=SHOWN[name])
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def main(argv=None):
    """Run what is missing, then write the table and the figure."""
    parser = trials.make_parser(__doc__, "runs/frontier", 3)
    parser.add_argument("--per-task", type=int, default=10, help="held-out inputs per task")
    args = parser.parse_args(argv)
    seeds = trials.run_seeds(lambda _, seed: runs_of_seed(args, seed), args.seeds)
    about = (f"Split {args.split}, seeds {', '.join(map(str, args.seeds))}; mean ± standard "
             "deviation over seeds.")
    trials.write_results(args.out, [about, frontier_table(seeds)])
    from extras.reports.plots import save_plots

    save_plots(args.out, {"frontier": (plot_frontier, seeds)})


if __name__ == "__main__":
    main()
