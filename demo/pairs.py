"""Where DPO's pairs come from: scored answers, AI feedback, two prompts, or unequal models.

    python demo/pairs.py --split test --seeds 1 2 3

Per seed all arms start from one SFT(IA) that saw 5 wordings of each task, and learn 100 steps of
16 pairs by DPO's loss, from answers to the same inputs under 9 other wordings. DPO and RLAIF have
12 answers to an input, with rewards by exact rules or by the model itself; RLCD has 6 under either
prompt. The curriculum has 6 of each of three models: SFT(IA) trained for a quarter of the steps,
SFT(IA) itself, and SFT(IA) on all 14 wordings with their targets.

What differs beside the source of the pairs: DPO leaves out questions without a right answer, and
the curriculum's strong model has learnt targets under the wordings in use. Writes results.md to
--out; how runs are started: trials.py.
"""

import numpy as np
import trials

import data
from judge import normalize

START, WEAK_STEPS = "SFT(IA)", 100
JUDGES = {"rule": "exact rules", "self": "self-judge"}
ORDERS = ("easy", "hard", "mixed")


def runs_of_seed(args, seed):
    """{arm: metrics} of one seed; of arms with labelled pairs also "pairs", see `pair_quality`."""
    out, found = f"{args.out}/seed{seed}", {}
    common = ["--seed", str(seed), "--split", args.split, "--eval-per-task", str(args.per_task),
              "--no-compare"]

    def train(title, stage, name, *flags):
        *_, own = trials.train(stage, f"{out}-{name}", *common, *flags).values()
        found[title] = own
        return f"{out}-{name}"

    start = train(START, "sft-ia", "start")
    for judge, words in JUDGES.items():
        rewarded = ["--init", start, "--judge", judge]
        # An item is one pair, each answer under its own wording, as in RLAIF.
        dpo = train(f"DPO, {words}", "dpo", f"dpo-{judge}", *rewarded, "--max-worse", "1",
                    "--condition", "own")
        candidates = f"{dpo}/candidates.jsonl"
        rlaif = train(f"RLAIF, {words}", "rlaif", f"rlaif-{judge}", *rewarded, "--candidates",
                      candidates)
        found[f"RLAIF, {words}"]["pairs"] = pair_quality(rlaif, candidates)
    rlcd = train("RLCD", "rlcd", "rlcd", "--init", start, "--samples", "1")
    found["RLCD"]["pairs"] = pair_quality(rlcd, candidates)
    weak = train("the weak model", "sft-ia", "weak", "--steps", str(WEAK_STEPS))
    strong = train("the strong model", "sft-ia", "strong", "--wordings", "14")
    for order in ORDERS:
        train(f"curriculum, {order}", "curriculum", f"curriculum-{order}", "--init", start,
              "--curriculum", order, "--responses", weak, start, strong)
    return found


def pair_quality(folder, candidates):
    """How many pairs preferences.jsonl of a run has, and in which share one answer alone is right.

    {"n", "right": the better one is, "wrong": the worse one is}; candidates has the targets.
    """
    targets = {(x["task"], str(x["id"])): normalize(x["target"])
               for x in data.read_records(candidates)}
    right, wrong, pairs = 0, 0, data.read_records(f"{folder}/preferences.jsonl")
    for pair in pairs:
        target = targets[pair["task"], str(pair["id"])]
        sides = pair["first"], pair["second"]
        better, worse = (normalize(side["response"]) == target for side in sides)
        if pair["probability"] < 0.5:
            better, worse = worse, better
        right += better and not worse
        wrong += worse and not better
    return {"n": len(pairs), "right": right / len(pairs), "wrong": wrong / len(pairs)}


def tables(seeds):
    """Markdown: means and spread of every arm, paired differences, and what the pairs are worth."""
    rows, deltas, pairs = [], [], []
    for title, row in seeds[0].items():
        rows.append([title, *(trials.spread(trials.means(seeds, title, metric))
                              for metric in trials.METRICS)])
        if title != START:
            deltas.append([title, *(trials.difference(seeds, START, title, metric)
                                    for metric in trials.METRICS)])
        if "pairs" in row:
            n = np.mean([found[title]["pairs"]["n"] for found in seeds])
            shares = [trials.spread([found[title]["pairs"][name] for found in seeds])
                      for name in ("right", "wrong")]
            pairs.append([title, f"{n:.0f}", *shares])
    names = list(trials.METRICS.values())
    return [trials.table(["arm", *names], rows),
            f"Paired differences to {START}: mean [95 % t interval over the seeds], and the number "
            "of seeds in which it is positive.", trials.table(["arm", *names], deltas),
            "Pairs of which one answer alone is right, percent: the one that is called better, or "
            "the other.", trials.table(["arm", "pairs", "better", "worse"], pairs)]


def main(argv=None):
    """Run what is missing, then write the tables."""
    parser = trials.make_parser(__doc__, "runs/pairs", 3)
    parser.add_argument("--per-task", type=int, default=15, help="held-out inputs per task")
    args = parser.parse_args(argv)
    seeds = trials.run_seeds(lambda _, seed: runs_of_seed(args, seed), args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    about = (f"Split {args.split}, seeds {', '.join(map(str, args.seeds))}; mean ± standard "
             "deviation over seeds, percent.")
    trials.write_results(args.out, [about, *tables(seeds)])


if __name__ == "__main__":
    main()
