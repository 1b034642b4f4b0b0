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
from types import SimpleNamespace

import numpy as np
import trials

import data
from judge import RuleJudge, normalize
from methods import rewards
from methods.agreement import AgreementJudge

METRICS = {"cr": "CR", "mcr": "MCR", "rougeL": "ROUGE-L", "exact_match": "EM",
           "consistent_and_correct": "consistent and correct", "label": "commonest label"}
TASK_METRICS = ("cr", "exact_match", "consistent_and_correct")  # of single tasks
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
    "agreement": AGREE,
    "imitation alone": f"{SAME} --no-ranking",
    "margin 0.5": f"{SAME} --margin 0.5",
    "margin 2": f"{SAME} --margin 2",
    "lambda 0": f"{SAME} --lam 0",
    "lambda 0.1": f"{SAME} --lam 0.1",
    "1 worse answer an item": f"{SAME} --max-worse 1",
    "8 worse answers an item": f"{SAME} --max-worse 8",
    "rate 1e-4": f"{SAME} --lr 1e-4",
    "rate 1e-3": f"{SAME} --lr 1e-3",
    "not normalised by length": f"{SAME} --no-length-normalize",
}
# As many steps on answers that are sampled anew twice.
THRICE = f"{AGREE} --rounds 3 --pool-per-task 7 --steps 34 --probe-inputs 2"
ROUNDS = {"3 rounds": THRICE, "3 rounds, imitation alone": f"{THRICE} --no-ranking"}
RANKING |= ROUNDS
REAL_WORLD = "--model {model} --dtype bfloat16 --max-new-tokens 12"
REAL = (f"{REAL_WORLD} --tasks demo/real/tasks --paraphrases demo/real/paraphrases.json "
        "--per-task 24")
REAL_SFT = "--steps 45 --batch-size 24 --lr 5e-4"
REAL_CAT = "--steps 30 --batch-size 8 --lr 1e-4 --pool-per-task 20"
# {title: (stage, which rewards of the sampled answers, flags)}
REAL_ARMS = {
    "CAT, self-judge": ("cat", "self", ""),
    "agreement": ("cat", "agreement", ""),
    "agreement, --balance": ("cat", "agreement", "--balance"),
    "CAT, exact rules": ("cat", "rule", ""),
    "gold targets on the same items": ("cat", "agreement", "--no-ranking --ce-target gold"),
    # An item of CAT reads three documents' worth of tokens and more, see the table's last column.
    "gold targets on all inputs, as many tokens": ("expert", "gold", "--batch-size 24"),
}
# Arms that are compared with each other, too: the second minus the first.
BETWEEN = (
    *(("imitation alone", title) for title in RANKING if title not in ("imitation alone", *ROUNDS)),
    ("agreement", "3 rounds"), ("imitation alone", "3 rounds, imitation alone"),
    ("3 rounds, imitation alone", "3 rounds"),
    *((f"imitation alone, {100 * flip:.0f} % flipped", f"CAT, {100 * flip:.0f} % flipped")
      for flip in FLIPS),
    ("CAT as it was: each answer under its own wording", "CAT, self-judge"),
    ("CAT, self-judge", "agreement"),
    ("imitation of the same items", "agreement"),
    ("gold targets on the same items", "agreement"),
    ("gold targets on all inputs, as many tokens", "agreement"),
    ("agreement, --balance", "agreement"),
)
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


def describe_answers(folder, title):
    """A model's metrics task by task, and the share of its commonest label.

    The share is a mean over the tasks with a closed set of labels; 1 if a model always says the
    same. Returns {"label": {"mean": share}, "tasks": {task: {metric: mean}}, "reference": the share
    that the reference outputs have}.
    """
    questions, tasks, tops = {}, {}, {"said": [], "wanted": []}
    for row in data.read_records(f"{folder}/questions.jsonl"):
        if row["model"] == title:
            questions.setdefault(row["task"], []).append(row)
    for task, rows in questions.items():
        tasks[task] = {name: np.mean([row[name] for row in rows]) for name in TASK_METRICS}
        if rows[0]["labels"]:
            tasks[task]["label"] = commonest_share(x for row in rows for x in row["responses"])
            tops["said"].append(tasks[task]["label"])
            tops["wanted"].append(commonest_share(row["targets"][0] for row in rows))
    said, wanted = map(np.mean, tops.values())
    return {"label": {"mean": said}, "tasks": tasks, "reference": wanted}


def commonest_share(texts):
    """The share of the commonest of some texts."""
    counts = Counter(map(normalize, texts))
    return counts.most_common(1)[0][1] / counts.total()


def describe_run(folder, title):
    """`describe_answers` and what the run cost."""
    return describe_answers(folder, title) | {"cost": read_json(f"{folder}/summary.json")}


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
        if Path(folder, "candidates.jsonl").exists():  # it sampled for itself
            found["sampled"] = sampled_precision(folder)
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
    """Methods under exact rewards of which a share is turned round; the "precision" of the rest."""
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

    Which ones follows from the seed and the answer. Returns the `learnt_precision`.
    """
    groups, lines = {}, []
    for record in data.read_records(source):
        right, question = record["reward"] == 2, (record["task"], record["id"])
        key = f"{seed}/{record['task']}/{record['id']}/{record['response']}"
        if random.Random(key).random() < share:
            record["reward"] = 0 if right else 2
        groups.setdefault(question, []).append((record["reward"], right))
        lines.append(json.dumps(record) + "\n")
    target.write_text("".join(lines), encoding="utf-8")
    return learnt_precision(groups)


def learnt_precision(groups):
    """The share of right answers among those of reward 2; groups: {question: [(reward, right)]}.

    Only questions count that are learnt from: a lower reward is there. nan if there are none.
    """
    learnt = []
    for answers in groups.values():
        if min((reward for reward, _ in answers if reward is not None), default=2) < 2:
            learnt += [right for reward, right in answers if reward == 2]
    return sum(learnt) / len(learnt) if learnt else float("nan")


def sampled_precision(folder):
    """`learnt_precision` of what a run sampled for inputs with a target.

    Right are answers that equal it up to case and punctuation.
    """
    groups = {}
    for x in data.read_records(f"{folder}/candidates.jsonl"):
        if x["target"] is not None:
            right = normalize(x["response"]) == normalize(x["target"])
            groups.setdefault((x["task"], x["id"]), []).append((x["reward"], right))
    return learnt_precision(groups)


def ranking(runs):
    """What ranking adds to imitation, setting by setting, on the items that agreement rewards.

    For exact rewards see `precision`.
    """
    start, found = runs.first("few", FEW)
    return {IA: found} | runs.arms("rank", start, FRESH, RANKING)


def real(runs):
    """A pretrained model on tasks of our own: wordings without targets, and two gold controls."""
    found = {"SFT": runs.first("real-sft", f"{REAL} {REAL_SFT}", "sft")[1]}
    start, found[IA] = runs.first("real-ia", f"{REAL} {REAL_SFT} {FEW}")
    # The first arm samples and judges; the others get the same answers with other rewards.
    folder = f"{runs.out}-real-0"
    for number, (title, (stage, judge, flags)) in enumerate(REAL_ARMS.items()):
        words = f"{FRESH} {REAL_CAT} {flags}"
        if number:
            words += f" --candidates {write_judged(folder, judge)}"
        _, found[title] = runs.run(stage, f"real-{number}", start, words)
    return found


def write_judged(folder, name):
    """The path of a run's sampled answers with other rewards; the run's own with name "self".

    agreement, rule: what a run with --judge NAME samples, since the model and the seeds are the
    same. gold: the reference output under each wording of each question, whatever was answered.
    """
    source = Path(folder, "candidates.jsonl")
    target = Path(f"{folder}-{name}.jsonl")
    if name == "self":
        return source
    judge = RuleJudge()
    if name == "agreement":
        judge = AgreementJudge(judge, rewards.JudgeFlags.agreement_share)
    tasks = data.read_tasks(read_json(f"{folder}/config.json")["tasks"])
    records = data.read_records(source)
    if name == "gold":
        answers = {}
        for x in records:  # stage expert learns one answer an id, so each wording has its own
            name = f"{x['id']} {x['wording']}"
            answers[x["task"], name] = x | {"id": name, "response": x["target"]}
        records = list(answers.values())
    judged = rewards.rewarded(SimpleNamespace(tasks=tasks), records, judge)
    target.write_text("".join(json.dumps(record) + "\n" for record in judged), encoding="utf-8")
    return target


def unseen(runs):
    """Whole tasks are held out: does consistency that is learnt on others carry over?"""
    return on_unseen_tasks(runs, "demo", DEMO_WORLD, DEMO_SFT, "")


def unseen_real(runs):
    """The same for a pretrained model and the tasks of demo/real."""
    world = REAL_WORLD.format(model=runs.args.model)
    return on_unseen_tasks(runs, "demo/real", world, f"--per-task 24 {REAL_SFT}", REAL_CAT)


def on_unseen_tasks(runs, source, world, sft_flags, cat_flags):
    """Stages trained on the tasks of `source` that are not held out, asked about those that are."""
    args, name = runs.args, f"{runs.out}-unseen-{Path(source).name}"
    seen, held = (f"{world} {flags}" for flags in args.halves[source])
    paths, common = {}, ["--seed", str(runs.seed), "--no-compare", "--no-evaluate"]

    def run(title, stage, flags):
        paths[title] = f"{name}-{len(paths)}"
        trials.train(stage, paths[title], *common, *flags.split(), makes="adapter_config.json")

    run(IA, "sft-ia", f"{seen} {sft_flags} {FEW}")
    for title, flags in UNSEEN_ARMS.items():
        run(title, "cat", f"--init {paths[IA]} {FRESH} {cat_flags} {flags}")
    run("SFT(IA) on all 14 wordings, with targets", "sft-ia", f"{seen} {sft_flags} {ALL}")
    found = trials.evaluate(name, "--split", args.split, *held.split(), "--per-task",
                            str(args.per_task), "--adapter", *paths.values())
    base, *_ = found  # under the name of its folder
    rows = {"base": found[base] | describe_answers(name, base)}
    for title, path in paths.items():
        cost = read_json(f"{path}/summary.json")  # without the evaluation
        rows[title] = found[path] | describe_answers(name, path) | {"cost": cost}
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
    """Inputs without targets, and the two halves of the tasks, as files in --out."""
    import world

    args.out.mkdir(parents=True, exist_ok=True)
    args.halves = {source: hold_out(source, args.out / source) for source in HELD_OUT}
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
    header = ["arm", *METRICS.values(), "minutes, GB, thousand tokens"]
    wanted = 100 * seeds[0][first]["reference"]
    label = f"The commonest label of the reference outputs has a share of {wanted:.1f}."
    about = (f"Paired differences to {first}: mean [95 % t interval over the seeds], and the "
             "number of seeds in which it is positive.")
    between = []
    for one, other in BETWEEN:
        if {one, other} <= set(seeds[0]):
            cells = [trials.difference(seeds, one, other, metric) for metric in METRICS]
            between.append([f"{other} - {one}", *cells])
    found = [trials.table(header, rows), label, about,
             trials.table(["arm", *METRICS.values()], deltas)]
    if between:
        found += ["The same between arms.", trials.table(["arms", *METRICS.values()], between)]
    sampled = {}
    for title in seeds[0]:
        if "sampled" in seeds[0][title]:
            sampled[title] = trials.spread([rows[title]["sampled"] for rows in seeds])
    if sampled:
        said = "; ".join(f"{title} {value}" for title, value in sampled.items())
        found.append(f"Precision of reward 2 in what arms sampled, percent: {said}.")
    return found


def task_tables(seeds):
    """Markdown: differences to SFT(IA) as means over tasks, and two arms task by task."""
    names, deltas, rows = list(seeds[0][IA]["tasks"]), [], []

    def mean(title, task, metric):  # over the seeds; None if the task has no such metric
        values = [found[title]["tasks"][task].get(metric) for found in seeds]
        return None if None in values else np.mean(values)

    for title in seeds[0]:
        if title not in (IA, "SFT", "base"):
            cells = [trials.interval([mean(title, task, metric) - mean(IA, task, metric)
                                      for task in names]) for metric in TASK_METRICS]
            deltas.append([title, *cells])
    for task in names:
        rows.append([task])
        for metric in (*TASK_METRICS, "label"):
            before, after = mean(IA, task, metric), mean("agreement", task, metric)
            rows[-1].append("" if before is None else f"{100 * before:.0f} to {100 * after:.0f}")
    titles = [METRICS[name] for name in TASK_METRICS]
    about = (f"Paired differences to {IA} by task, each the mean over the seeds: mean "
             f"[95 % t interval over the {len(names)} tasks], and in how many it is positive.")
    by_task = f"Task by task: {IA} to agreement, means over the seeds."
    return [about, trials.table(["arm", *titles], deltas), by_task,
            trials.table(["task", *titles, METRICS["label"]], rows)]


def cost_of(seeds, title):
    """Minutes and tokens read of a run, means over the seeds, and its peak memory; or ""."""
    costs = [rows[title].get("cost") for rows in seeds]
    if None in costs:
        return ""
    minutes = np.mean([cost["seconds"] for cost in costs]) / 60
    memory = max(cost["peak_memory_bytes"]["process"] for cost in costs) / 1e9
    tokens = np.mean([cost["tokens"] for cost in costs]) / 1e3
    return f"{minutes:.1f}, {memory:.1f}, {tokens:.0f}"


def precision_of(seeds, flip):
    """The mean precision of reward 2 in percent where a share of the rewards is turned round."""
    title = f"CAT, {100 * flip:.0f} % flipped"
    return 100 * np.mean([rows[title]["precision"] for rows in seeds])


def precision_line(seeds):
    """A sentence with the precision at each share of flips."""
    said = [f"{precision_of(seeds, flip):.1f} with {100 * flip:.0f} %" for flip in FLIPS]
    return f"Precision of reward 2, percent: {', '.join(said)} flipped."


def plot_precision(seeds):
    """CR and consistent-and-correct minus SFT(IA), over the precision of the reward."""
    from extras.reports.plots import new_figure

    figure, panels = new_figure(9, 3.8, columns=2)
    for axes, metric in zip(panels, ("cr", "consistent_and_correct"), strict=True):
        start = trials.means(seeds, IA, metric)  # (seeds,)
        for number, title in enumerate(METHODS):
            names = [f"{title}, {100 * flip:.0f} % flipped" for flip in FLIPS]
            # Side by side, so that no interval hides another.
            x = [precision_of(seeds, flip) + 0.3 * (number - 1.5) for flip in FLIPS]
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
    parser.add_argument("--model", default="models/smollm2", help="of parts real, unseen-real")
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
        parts = [about, *tables(seeds)]
        if part in ("real", "unseen", "unseen-real"):
            parts += task_tables(seeds)
        if part == "precision":
            parts.append(precision_line(seeds))
        trials.write_results(out, parts)
        if part == "precision":
            from extras.reports.plots import save_plots

            save_plots(out, {"precision": (plot_precision, seeds)})


if __name__ == "__main__":
    main()
