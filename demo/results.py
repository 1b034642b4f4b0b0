"""The tables of docs/results.md: what makes CAT raise consistency, on the demo.

    python demo/results.py --split dev --seeds 101 102 103          # while choosing settings
    python demo/results.py --split test --seeds 11 12 13 14 15      # the final numbers
    python demo/results.py --part precision --seeds 11 12 13

--part without    wordings without targets: SFT(IA) sees 5 wordings, CAT the 9 others
       with       SFT(IA) sees all 14 wordings with their targets
       unseen     whole tasks held out: trained on 26 tasks, asked about the 8 others
       unseen-real   the same on demo/real with --model DIR: 8 tasks, 3 others
       precision  exact rewards of which a share is turned round, for four methods
       ranking    what the ranking term adds to imitation, setting by setting
       real       a pretrained model, --model DIR, on the tasks of demo/real

Every arm is printed, whatever it shows. A table has means over seeds; below it are paired
differences with 95 % t intervals. Writes results.md to --out/PART. How runs are started: trials.py.
"""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import trials

METRICS = {"cr": "CR", "mcr": "MCR", "rougeL": "ROUGE-L", "exact_match": "EM",
           "consistent_and_correct": "consistent and correct", "label": "commonest label"}
IA = "SFT(IA)"
FEW, ALL = "--wordings 5", "--wordings 14"  # what SFT(IA) sees
FRESH, SEEN = "--wordings 5 --fresh-wordings 9", "--wordings 14 --fresh-wordings 0"  # and CAT
AGREE = "--judge agreement"
# The arms of a part: {title: flags}. {agreement} is the run folder of the arm of that name, whose
# candidates another arm learns from, so that both see the same items.
SAME = "--candidates {agreement}/candidates.jsonl"
ARMS = {
    "CAT as it was: each answer under its own wording": "--judge self --condition own",
    "CAT, self-judge": "--judge self",
    "agreement": AGREE,
    "CAT, exact rules": "--judge rule",
    "imitation of the same items": f"{SAME} --no-ranking",
    "gold targets on the same items": f"{SAME} --no-ranking --ce-target gold",
}
POOL = "--pool-per-task 60 --unlabelled {inputs}"
LARGE = {
    "agreement, three times the inputs": f"{AGREE} {POOL}",
    "the same, up to 250 steps, --patience 2": f"{AGREE} {POOL} --steps 250 --patience 2",
}
METHODS = {"CAT": ("cat", ""), "imitation alone": ("cat", "--no-ranking"), "DPO": ("dpo", ""),
           "RRHF": ("rrhf", "")}
FLIPS = (0.0, 0.05, 0.1, 0.2, 0.3)
RANKING = {
    "imitation alone": "--no-ranking",
    "CAT": "",
    "margin 0.5": "--margin 0.5",
    "margin 2": "--margin 2",
    "lambda 0": "--lam 0",
    "lambda 0.1": "--lam 0.1",
    "1 worse answer an item": "--max-worse 1",
    "8 worse answers an item": "--max-worse 8",
    "rate 1e-4": "--lr 1e-4",
    "rate 1e-3": "--lr 1e-3",
    "not normalised by length": "--no-length-normalize",
}
REAL_WORLD = "--model {model} --dtype bfloat16 --max-new-tokens 12"
REAL = (f"{REAL_WORLD} --tasks demo/real/tasks --paraphrases demo/real/paraphrases.json "
        "--per-task 24")
REAL_SFT = "--steps 45 --batch-size 24 --lr 5e-4"
REAL_CAT = "--steps 30 --batch-size 8 --lr 1e-4 --pool-per-task 20"
REAL_ARMS = {
    "CAT, self-judge": "--judge self",
    "agreement": AGREE,
    "agreement, balanced": f"{SAME} --balance",
    "CAT, exact rules": "--judge rule",
    "gold targets on the same items": f"{SAME} --no-ranking --ce-target gold",
}
# Tasks held out by the parts unseen and unseen-real, two or one of each kind.
HELD_OUT = {
    "demo": ("purchase_country", "purchase_no_colour", "words_first", "words_fruit",
             "review_venue", "review_recommend", "meeting_hour", "meeting_decline"),
    "demo/real": ("comparative", "kind", "sum"),
}
UNSEEN_ARMS = {
    "CAT, self-judge": "--judge self",
    "agreement": AGREE,
    "CAT, exact rules": "--judge rule",
}
# What demo/settings.json says of the demo's tasks, for other folders of tasks.
DEMO_WORLD = "--max-new-tokens 24 --rouge-threshold 0.95"
DEMO_SFT = "--per-task 24 --augment product --judge-share 0.5"


# ----- Running -----
def read_json(path):
    """What a file of a run holds."""
    return json.loads(Path(path).read_text())


def describe_run(folder, title):
    """What a run cost, its CR task by task, and the share of its commonest label.

    The last is the mean over the tasks with few labels: 1 if a model always says the same.
    """
    tasks, answers = {}, {}
    for line in Path(folder, "questions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["model"] == title:
            tasks.setdefault(row["task"], []).append(row["cr"])
            if row["labels"]:
                answers.setdefault(row["task"], Counter()).update(row["responses"])
    tops = [counts.most_common(1)[0][1] / counts.total() for counts in answers.values()]
    return {"cost": read_json(f"{folder}/summary.json"), "label": {"mean": np.mean(tops)},
            "tasks": {task: float(np.mean(values)) for task, values in tasks.items()}}


class Seed:
    """The runs of one seed: each is made once, and continues the SFT(IA) of its setting."""

    def __init__(self, args, seed):
        self.args, self.seed, self.out = args, seed, args.out / f"seed{seed}"
        self.common = ["--seed", str(seed), "--split", args.split, "--eval-per-task",
                       str(args.per_task), "--no-compare"]

    def first(self, setting, flags, stage="sft-ia"):
        """The folder of SFT(IA), or SFT, in a setting, and its metrics."""
        folder, words = f"{self.out}-{setting}", flags.format(model=self.args.model).split()
        common = self.common if stage == "sft-ia" else self.common[:-1]  # SFT reads no --compare
        found = trials.train(stage, folder, *common, *words)
        *_, title = found  # its own row is the last
        return folder, found[title] | describe_run(folder, title)

    def run(self, stage, name, init, flags):
        """The metrics of a stage that continues the run folder `init`, and its folder."""
        folder = f"{self.out}-{name}"
        words = ["--init", init, *flags.split()]
        ((title, found),) = trials.train(stage, folder, *self.common, *words).items()
        return folder, found | describe_run(folder, title)

    def arms(self, setting, start, wordings, arms):
        """{title: metrics} of arms that continue SFT(IA) under these wordings."""
        folder, rows = "", {}
        for number, (title, flags) in enumerate(arms.items()):
            words = flags.format(agreement=folder, inputs=self.args.out / "inputs.jsonl")
            place, rows[title] = self.run("cat", f"{setting}{number}", start, f"{wordings} {words}")
            if title == "agreement":
                folder = place
        return rows


def without_targets(runs):
    """Wordings without targets, against SFT(IA) with targets for all of them."""
    start, found = runs.first("few", FEW)
    rows = {IA: found} | runs.arms("few-", start, FRESH, ARMS | LARGE)
    return rows | {"SFT(IA) on all 14 wordings, with targets": runs.first("all", ALL)[1]}


def with_targets(runs):
    """SFT(IA) has seen all wordings with targets; then also inputs without targets."""
    start, found = runs.first("all", ALL)
    return {IA: found} | runs.arms("all-", start, SEEN, ARMS | LARGE)


def precision(runs):
    """Methods under exact rewards of which a share is turned round; "precision" of reward 2."""
    start, found = runs.first("few", FEW)
    folder, _ = runs.run("cat", "exact", start, f"{FRESH} --judge rule")
    rows = {IA: found}
    for flip in FLIPS:
        path = Path(f"{runs.out}-flip{100 * flip:.0f}.jsonl")
        right = write_flipped(Path(folder, "candidates.jsonl"), path, flip, runs.seed)
        for title, (stage, flags) in METHODS.items():
            name = f"flip{100 * flip:.0f}-{title.split()[0].lower()}"
            _, row = runs.run(stage, name, start, f"{FRESH} --candidates {path} {flags}")
            rows[f"{title}, {100 * flip:.0f} % flipped"] = row | {"precision": right}
    return rows


def write_flipped(source, target, share, seed):
    """Candidates of which a share of the different answers has the opposite reward: 2 or 0.

    Which ones follows from the seed and the answer. Returns the share of right ones of reward 2.
    """
    best, lines = [], []
    for line in source.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        right = record["reward"] == 2
        key = f"{seed}/{record['task']}/{record['id']}/{record['response']}"
        if random.Random(key).random() < share:
            record["reward"] = 0 if right else 2
        if record["reward"] == 2:
            best.append(right)
        lines.append(json.dumps(record) + "\n")
    target.write_text("".join(lines), encoding="utf-8")
    return sum(best) / len(best)


def ranking(runs):
    """What ranking adds to imitation on identical items, by agreement and by exact rules."""
    start, found = runs.first("few", FEW)
    rows = {IA: found}
    for judge in ("agreement", "rule"):
        folder, _ = runs.run("cat", f"rank-{judge}", start, f"{FRESH} --judge {judge}")
        for number, (title, flags) in enumerate(RANKING.items()):
            given = f"{FRESH} --candidates {folder}/candidates.jsonl {flags}"
            _, rows[f"{judge}: {title}"] = runs.run("cat", f"rank-{judge}{number}", start, given)
        for title, flags in (("3 rounds", ""), ("3 rounds, imitation alone", "--no-ranking")):
            given = (f"{FRESH} --judge {judge} --rounds 3 --pool-per-task 7 --steps 34 "
                     f"--probe-inputs 2 {flags}")
            name = f"rank-{judge}-{len(rows)}"
            _, rows[f"{judge}: {title}"] = runs.run("cat", name, start, given)
    return rows


def real(runs):
    """A pretrained model on tasks of our own: wordings without targets, and two gold controls."""
    found = {"SFT": runs.first("real-sft", f"{REAL} {REAL_SFT}", "sft")[1]}
    start, found[IA] = runs.first("real-ia", f"{REAL} {REAL_SFT} {FEW}")
    found |= runs.arms("real-", start, f"{FRESH} {REAL_CAT}", REAL_ARMS)
    folder = f"{runs.out}-real-{list(REAL_ARMS).index('agreement')}"
    path = Path(f"{runs.out}-real-gold.jsonl")
    write_gold(Path(folder, "candidates.jsonl"), path)
    flags = f"{FRESH} {REAL_CAT} --candidates {path}"
    found["gold targets on all inputs"] = runs.run("expert", "real-gold", start, flags)[1]
    return found


def write_gold(source, target):
    """The reference output under each wording of each question, whatever the model answered."""
    lines = {}
    for line in source.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        key = record["task"], record["id"], record["wording"]
        lines[key] = json.dumps(record | {"response": record["target"], "reward": 2}) + "\n"
    target.write_text("".join(lines.values()), encoding="utf-8")


def unseen(runs):
    """Whole tasks are held out: does consistency that is learnt on others carry over?"""
    return on_unseen_tasks(runs, "demo", DEMO_WORLD, DEMO_SFT, "")


def unseen_real(runs):
    """The same for a pretrained model and the tasks of demo/real."""
    world = REAL_WORLD.format(model=runs.args.model)
    return on_unseen_tasks(runs, "demo/real", world, f"--per-task 24 {REAL_SFT}", REAL_CAT)


def on_unseen_tasks(runs, source, world, sft_flags, cat_flags):
    """Stages trained on the tasks of `source` that are not held out, asked about those that are."""
    args, name = runs.args, f"{runs.out}-{Path(source).name}"
    seen, held = (f"{world} {flags}" for flags in hold_out(source, args.out / source))
    paths, common = {}, ["--seed", str(runs.seed), "--no-compare", "--no-evaluate"]

    def run(title, stage, flags):
        paths[title] = f"{name}-{len(paths)}"
        trials.train(stage, paths[title], *common, *flags.split(), makes="adapter_config.json")

    run(IA, "sft-ia", f"{seen} {sft_flags} {FEW}")
    for title, flags in UNSEEN_ARMS.items():
        run(title, "cat", f"--init {paths[IA]} {FRESH} {cat_flags} {flags}")
    run("SFT(IA) on all 14 wordings, with targets", "sft-ia", f"{seen} {sft_flags} {ALL}")
    found = trials.evaluate(f"{name}-unseen", "--split", args.split, *held.split(), "--per-task",
                            str(args.per_task), "--adapter", *paths.values())
    rows = {"base": found["base"] | describe_run(f"{name}-unseen", "base") | {"cost": None}}
    for title, path in paths.items():
        rows[title] = found[path] | describe_run(f"{name}-unseen", path)
        rows[title]["cost"] = read_json(f"{path}/summary.json")  # without the evaluation
    return rows


def hold_out(source, folder):
    """The flags of the tasks that are seen, and of those that are not; copies both to `folder`."""
    phrases, flags = read_json(f"{source}/paraphrases.json"), []
    for half in ("seen", "held"):
        tasks, words = folder / half, folder / f"{half}.json"
        tasks.mkdir(parents=True, exist_ok=True)
        names = [name for name in phrases if (name in HELD_OUT[source]) == (half == "held")]
        for name in names:
            shutil.copy(f"{source}/tasks/{name}.json", tasks)
        words.write_text(json.dumps({name: phrases[name] for name in names}))
        flags.append(f"--tasks {tasks} --paraphrases {words}")
    return flags


PARTS = {"without": without_targets, "with": with_targets, "unseen": unseen,
         "unseen-real": unseen_real, "precision": precision, "ranking": ranking, "real": real}


def prepare(args):
    """Inputs without targets, as a file in --out."""
    import world

    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "inputs.jsonl").exists():
        lines = [json.dumps({"task": task, "input": text}) + "\n"
                 for task in world.load_phrases() for text in world.fresh_inputs(task)]
        (args.out / "inputs.jsonl").write_text("".join(lines))


# ----- Tables and figures -----
def tables(seeds, first=IA):
    """Markdown: means and spread of every arm, then paired differences to the first."""
    rows, deltas = [], []
    for title in seeds[0]:
        cells = [trials.spread(trials.means(seeds, title, metric)) for metric in METRICS]
        rows.append([title, *cells, cost_of(seeds, title)])
        if title != first and title != "SFT":
            cells = [trials.difference(seeds, first, title, metric) for metric in METRICS]
            deltas.append([title, *cells])
    header = ["arm", *METRICS.values(), "minutes, GB"]
    about = (f"Paired differences to {first}: mean [95 % t interval], and the number of seeds in "
             "which it is positive.")
    return [trials.table(header, rows), about, trials.table(["arm", *METRICS.values()], deltas)]


def cost_of(seeds, title):
    """Minutes and peak memory of a run, means over the seeds; "" where it was not run alone."""
    costs = [rows[title].get("cost") for rows in seeds]
    if None in costs:
        return ""
    minutes = np.mean([cost["seconds"] for cost in costs]) / 60
    memory = max(cost["peak_memory_bytes"]["process"] for cost in costs) / 1e9
    return f"{minutes:.1f}, {memory:.1f}"


def plot_precision(seeds):
    """CR and consistent-and-correct minus SFT(IA), over the precision of the reward."""
    from extras.reports.plots import new_figure

    figure, panels = new_figure(9, 3.8, columns=2)
    for axes, metric in zip(panels, ("cr", "consistent_and_correct"), strict=True):
        start = trials.means(seeds, IA, metric)  # (seeds,)
        for title in METHODS:
            names = [f"{title}, {100 * flip:.0f} % flipped" for flip in FLIPS]
            x = [100 * np.mean([rows[name]["precision"] for rows in seeds]) for name in names]
            gains = 100 * np.array([trials.means(seeds, name, metric) - start for name in names])
            half = [trials.half_interval(gain) for gain in gains]
            axes.errorbar(x, gains.mean(1), half, marker="o", capsize=3, label=title)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(xlabel="precision of reward 2, percent",
                 ylabel=f"{METRICS[metric]}, points gained")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def main(argv=None):
    """Run what is missing, then write the tables."""
    parser = trials.make_parser(__doc__, "runs/results", 5)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=["without"])
    parser.add_argument("--model", default="models/smollm2", help="of --part real")
    parser.add_argument("--per-task", type=int, default=30, help="held-out inputs per task")
    args = parser.parse_args(argv)
    prepare(args)
    for part in args.part:
        work = PARTS[part]
        seeds = trials.run_seeds(lambda _, seed, work=work: work(Seed(args, seed)), args.seeds)
        out = args.out / part
        out.mkdir(exist_ok=True)
        numbers = ", ".join(map(str, args.seeds))
        about = (f"Part {part}, split {args.split}, seeds {numbers}; mean ± standard deviation "
                 "over seeds, percent.")
        trials.write_results(out, [about, *tables(seeds)])
        if part == "precision":
            from extras.reports.plots import save_plots

            save_plots(out, {"precision": (plot_precision, seeds)})


if __name__ == "__main__":
    main()
