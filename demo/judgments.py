"""Every table and figure of the README's results on judgments: CUT, its ablations and its baselines, several seeds.

    python demo/judgments.py --split test --seeds 1 2 3 4 5

Each run is one `python train.py ...` that is printed first; two run side by side, one thread each. Every method starts
from the seed's flawed SFT model and trains on the same judged responses. Writes results.md and mask.png to --out.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from eval import plot_mask                                   # noqa: E402
from judge import RuleCritic                                # noqa: E402
from experiments import T95, command, difference, run, spread      # noqa: E402

METHODS = {                                                 # title: (stage, flags beyond the defaults)
    "fine-tuning on the good ones": ("cut", ["--no-use-l1", "--no-use-judged", "--downsample", "0"]),
    "hindsight": ("hindsight", ["--downsample", "0"]),
    "forward prediction": ("forward", ["--downsample", "0"]),
    "ILF": ("ilf", ["--downsample", "0"]),
    "unlikelihood of all tokens": ("unlikelihood", []),
    "CUT without L1": ("cut", ["--no-use-l1"]),
    "CUT without good responses": ("cut", ["--no-use-good"]),
    "CUT without judged likelihood": ("cut", ["--no-use-judged"]),
    "CUT without detection": ("cut", ["--detect", "all"]),
    "CUT, frozen detector": ("cut", ["--detector", "frozen"]),
}
BAD_ONLY = {                                                # the same without a single satisfying response
    "hindsight, bad only": ("hindsight", []), "forward prediction, bad only": ("forward", []), "ILF, bad only": ("ilf", []),
    "unlikelihood of all tokens, bad only": ("unlikelihood", []), "CUT, bad only": ("cut", []),
}
ONLINE = ["--rounds", "4", "--pool-per-task", "88", "--downsample", "0", "--steps", "100", "--judged-warmup", "30"]    # few records a round
RATES = {"error_rate": "greedy errors", "sampled_error_rate": "sampled errors"}


def agreement(path):
    """How often a written judgment finds fault where the rules do, and in the same words."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    ruled = RuleCritic().critique(records)
    same = [(r["judgment"] is None) == (j is None) for r, j in zip(records, ruled)]
    return {"verdict": np.mean(same), "words": np.mean([r["judgment"] == j for r, j in zip(records, ruled)]), "n": len(records)}


def runs_of_seed(root, seed, split, online, own_critic):
    """{row: metrics} of one seed, and the mask's scores."""
    main, shared = root / f"seed{seed}", ["--seed", str(seed), "--split", split]
    rows = dict(run(command(main, *shared, stage="cut"), 1))
    bad = root / f"seed{seed}-bad.jsonl"
    lines = (main / "judged.jsonl").read_text().splitlines(keepends=True)
    bad.write_text("".join(line for line in lines if json.loads(line)["judgment"] is not None))
    for number, (title, (stage, flags)) in enumerate((METHODS | BAD_ONLY).items()):
        records = bad if title in BAD_ONLY else main / "judged.jsonl"
        found = run(command(root / f"seed{seed}-{number}", *shared, "--init", str(main), "--records", str(records), *flags, stage=stage), 1)
        rows[title] = list(found.values())[-1]
    if online:
        out = root / f"seed{seed}-online"
        found = run(command(out, *shared, "--init", str(main), *ONLINE, stage="cut"), 1)
        rows |= {f"online {title.replace('CUT, ', '')}": found[title] for title in list(found)[2:-1]}
        rows["online round 4"] = found["CUT"]
    if own_critic:                                          # learn to judge on one half of the pool; round 2 judges the other
        half, critic, out = ["--pool-per-task", "175"], root / f"seed{seed}-critic", root / f"seed{seed}-self"
        run(command(critic, *shared, "--init", str(main), *half, stage="critic"), 1)
        found = run(command(out, *shared, "--init", str(main), *half, "--judge", "self", "--critic", str(critic), "--rounds", "2", "--downsample", "0", "--steps", "100",
                            "--judged-warmup", "30", stage="cut"), 1)
        rows |= {"own critic, round 1": found["CUT, round 1"], "own critic, round 2": found["CUT"]}
        rows["critic"] = agreement(out / "judged.jsonl")
    rows["mask"] = json.loads((main / "mask.json").read_text())
    return rows


def table(seeds, titles):
    """Markdown: error rates per method, and the difference to the flawed model."""
    lines = ["| model | " + " | ".join(RATES.values()) + " | greedy errors, minus SFT |", "|---" * (len(RATES) + 2) + "|"]
    for title in titles:
        cells = [spread([rows[title][name]["mean"] for rows in seeds]) for name in RATES]
        delta = difference([r[title]["error_rate"]["mean"] for r in seeds], [r["SFT"]["error_rate"]["mean"] for r in seeds])
        lines.append(f"| {title} | " + " | ".join([*cells, delta]) + " |")
    return "\n".join(lines)


def mask_table(seeds):
    """Markdown and the means: precision and recall of CUT's mask against lambda, before and after training."""
    lines, means = ["| model | lambda | precision | recall |", "|---|---|---|---|"], {}
    for title in ("SFT", "CUT"):
        for row in zip(*(rows["mask"][title] for rows in seeds)):
            cells = {name: [x[name] for x in row if x[name] is not None] for name in ("precision", "recall")}
            lines.append(f"| {title} | {row[0]['lam']:g} | " + " | ".join(spread(v) if v else "-" for v in cells.values()) + " |")
            means.setdefault(title, []).append({"lam": row[0]["lam"], **{k: np.mean(v) if v else None for k, v in cells.items()}})
    return "\n".join(lines), means


def main(argv=None):
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--out", default="runs/judgments")
    parser.add_argument("--critic-seeds", type=int, default=3, help="the first so many seeds also train a critic and let it judge")
    parser.add_argument("--online", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    root = Path(args.out)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(runs_of_seed, root, seed, args.split, args.online, k < args.critic_seeds) for k, seed in enumerate(args.seeds)]
        seeds = [job.result() for job in jobs]
    masks, means = mask_table(seeds)
    titles = ["base", "SFT", "CUT", *([f"online round {k}" for k in (1, 2, 3, 4)] if args.online else []), *METHODS, *BAD_ONLY]
    parts = [f"Split {args.split}, seeds {', '.join(map(str, args.seeds))}; mean ± standard deviation over seeds, percent. Differences: "
             f"mean [95 % t interval, {T95[len(args.seeds)]:.2f} standard errors] and in how many seeds they are positive." if len(args.seeds) > 1
             else f"Split {args.split}, seed {args.seeds[0]}, percent.", table(seeds, titles), "CUT's mask against the truly wrong tokens:", masks]
    taught = seeds[:args.critic_seeds]
    if taught:
        said = [spread([rows["critic"][name] for rows in taught]) for name in ("verdict", "words")]
        parts += [f"A critic that the model has learnt itself, on answers of round 2 to inputs that it never saw (the first {len(taught)} seeds): "
                  f"finds fault where the rules do in {said[0]} %, in the same words in {said[1]} %.",
                  table(taught, ["SFT", "own critic, round 1", "own critic, round 2"])]
    plot_mask(means, root / "mask.png")
    (root / "results.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
