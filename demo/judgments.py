"""Every table and figure of docs/judgments.md: CUT, its ablations and its baselines, several seeds.

    python demo/judgments.py --split test --seeds 1 2 3 4 5

Every method starts from the seed's flawed SFT model and trains on the same judged responses. Writes
results.md and plots/ to --out. What is run, and how: trials.py.
"""

import argparse
import json

import numpy as np
import trials

METHODS = {  # title: (stage, flags beyond the defaults)
    "fine-tuning on the good ones": ("cut", "--no-use-l1 --no-use-judged --downsample 0"),
    "hindsight": ("hindsight", "--downsample 0"),
    "forward prediction": ("forward", "--downsample 0"),
    "ILF": ("ilf", "--downsample 0"),
    "unlikelihood of all tokens": ("unlikelihood", ""),
    "CUT without L1": ("cut", "--no-use-l1"),
    "CUT without good responses": ("cut", "--no-use-good"),
    "CUT without judged likelihood": ("cut", "--no-use-judged"),
    "CUT without detection": ("cut", "--detect all"),
    "CUT, frozen detector": ("cut", "--detector frozen"),
}
BAD_ONLY = {  # the same without a single satisfying response
    "hindsight, bad only": ("hindsight", ""),
    "forward prediction, bad only": ("forward", ""),
    "ILF, bad only": ("ilf", ""),
    "unlikelihood of all tokens, bad only": ("unlikelihood", ""),
    "CUT, bad only": ("cut", ""),
}
SHORT = "--downsample 0 --steps 100 --judged-warmup 30".split()  # a round has few records
ONLINE = ["--rounds", "4", "--pool-per-task", "88", *SHORT]
# A critic learns on one half of the pool; round 2 judges answers to the other.
HALF, ROUNDS = ["--pool-per-task", "175"], ["--judge", "self", "--rounds", "2", *SHORT]
OWN_CRITIC = ("own critic, round 1", "own critic, round 2")
RATES = {"error_rate": "greedy errors", "sampled_error_rate": "sampled errors"}


def runs_of_seed(args, number, seed):
    """{model: metrics} of one seed, the mask's scores, and the critic's agreement with rules."""
    main, asked = args.out / f"seed{seed}", ["--seed", str(seed), "--split", args.split]
    common, judged = [*asked, "--init", str(main)], main / "judged.jsonl"
    rows = dict(trials.train("cut", main, *asked))
    rows["mask"] = json.loads((main / "mask.json").read_text())
    bad = args.out / f"seed{seed}-bad.jsonl"
    lines = judged.read_text().splitlines(keepends=True)
    bad.write_text("".join(x for x in lines if json.loads(x)["judgment"] is not None))
    for k, (title, (stage, flags)) in enumerate((METHODS | BAD_ONLY).items()):
        records = bad if title in BAD_ONLY else judged
        found = trials.train(stage, f"{main}-{k}", *common, "--records", str(records),
                             *flags.split())
        rows[title] = list(found.values())[-1]
    if args.online:
        found = trials.train("cut", f"{main}-online", *common, *ONLINE)
        for k in (1, 2, 3):
            rows[f"online round {k}"] = found[f"CUT, round {k}"]
        rows["online round 4"] = found["CUT"]
    if number < args.critic_seeds:
        critic, out = f"{main}-critic", f"{main}-self"
        trials.train("critic", critic, *common, *HALF)
        found = trials.train("cut", out, *common, *HALF, *ROUNDS, "--critic", critic)
        rows |= zip(OWN_CRITIC, (found["CUT, round 1"], found["CUT"]), strict=True)
        rows["critic"] = agreement(f"{out}/judged.jsonl")
    return rows


def agreement(path):
    """How often a written judgment agrees with the rules: on whether there is one, and in words."""
    from data import read_records
    from methods.critics import RuleCritic

    records = read_records(path)
    pairs = [(record["judgment"], judgment) for record, judgment
             in zip(records, RuleCritic().critique(records), strict=True)]
    return {"verdict": np.mean([(a is None) == (b is None) for a, b in pairs]),
            "words": np.mean([a == b for a, b in pairs])}


# ----- Tables and figures -----
def error_table(seeds, models):
    """Markdown: error rates per model, and the difference to the flawed model."""
    lines = []
    for name in models:
        cells = [trials.spread(trials.means(seeds, name, rate)) for rate in RATES]
        lines.append([name, *cells, trials.difference(seeds, "SFT", name, "error_rate")])
    return trials.table(["model", *RATES.values(), "greedy errors, minus SFT"], lines)


def mask_scores(seeds, model, name):
    """{lambda: precision or recall of CUT's mask in each seed that has one}."""
    found = {}
    for rows in seeds:
        for score in rows["mask"][model]:
            known = [score[name]] if score[name] is not None else []
            found[score["lam"]] = found.get(score["lam"], []) + known
    return found


def mask_table(seeds):
    """Markdown: precision and recall of CUT's mask against lambda, before and after training."""
    lines = []
    for model in ("SFT", "CUT"):
        precision, recall = (mask_scores(seeds, model, name) for name in ("precision", "recall"))
        for lam in precision:
            cells = [trials.spread(x) if x else "-" for x in (precision[lam], recall[lam])]
            lines.append([model, f"{lam:g}", *cells])
    return trials.table(["model", "lambda", "precision", "recall"], lines)


def plot_mask(seeds):
    """The means of `mask_table` as lines."""
    from extras.reports.plots import new_figure

    figure, (axes,) = new_figure(6, 3.8)
    for model, style in (("SFT", "--"), ("CUT", "-")):
        for k, name in enumerate(("precision", "recall")):
            scores = mask_scores(seeds, model, name)
            values = [100 * np.mean(x) if x else np.nan for x in scores.values()]
            axes.plot(list(scores), values, f"C{k}o{style}", label=f"{name}, {model}",
                      clip_on=False)
    ticks = [lam for lam in scores if lam != 1.1]  # it is too near to 1
    axes.set(xscale="log", xlabel="lambda", ylim=(0, 100), ylabel="percent")
    axes.set_xticks(ticks, [f"{lam:g}" for lam in ticks])
    axes.minorticks_off()
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def main(argv=None):
    """Run what is missing, then write the tables."""
    parser = trials.make_parser(__doc__, "runs/judgments", 5)
    parser.add_argument("--critic-seeds", type=int, default=3,
                        help="the first so many seeds also train a critic and let it judge")
    parser.add_argument("--online", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    seeds = trials.run_seeds(lambda k, seed: runs_of_seed(args, k, seed), args.seeds)
    about = f"Split {args.split}, seed {args.seeds[0]}, percent."
    if len(seeds) > 1:
        about = (f"Split {args.split}, seeds {', '.join(map(str, args.seeds))}; mean ± standard "
                 "deviation over seeds, percent. Differences: mean [95 % t interval, "
                 f"{trials.T95[len(seeds)]:.2f} standard errors] and in how many seeds they are "
                 "positive.")
    models = ["base", "SFT", "CUT", *METHODS, *BAD_ONLY]
    if args.online:
        models[3:3] = [f"online round {k}" for k in (1, 2, 3, 4)]
    parts = [about, error_table(seeds, models), "CUT's mask against the truly wrong tokens:",
             mask_table(seeds)]
    taught = seeds[:args.critic_seeds]
    if taught:
        verdict, words = (trials.spread([rows["critic"][name] for rows in taught])
                          for name in ("verdict", "words"))
        parts += ["A critic that the model has learnt itself, on answers of round 2 to inputs that "
                  f"it never saw (the first {len(taught)} seeds): agrees with the rules on "
                  f"{verdict} % of responses, in the same words on {words} %.",
                  error_table(taught, ["SFT", *OWN_CRITIC])]
    trials.write_results(args.out, parts)
    from extras.reports.plots import save_plots

    save_plots(args.out, {"mask": (plot_mask, seeds)})


if __name__ == "__main__":
    main()
