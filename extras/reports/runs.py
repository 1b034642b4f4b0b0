"""What train.py reports of a run beside its table: curves, error rates, masks, rewards, judges."""

import json
import shlex
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

import data
import judge as judging
from eval import DEMO, answer_questions, evaluate_responses, open_model, write_results
from extras.formats.checks import reading
from extras.formats.records import read_judged
from extras.judges.judges import confusion
from extras.reports import masks, page, plots
from extras.reports.judges import confusion_section
from extras.reports.label_free import label_free_section
from extras.reports.length import length_figures, length_section
from extras.reports.metrics import MoreMetrics
from methods import candidates, heads, merged_copy, open_trained, record_name
from methods.critics import FAILED, PERFECT
from methods.groups import grouped_candidates
from methods.rewards import with_labels


def report_training(folder: Path) -> None:
    """Curves of log.jsonl in plots/training.png, and of PPO's phases in plots/ppo.png."""
    drawn = {"training": (data.read_records(folder / "log.jsonl"), "step"),
             "ppo": (data.read_records(folder / "rollouts.jsonl"), "phase")}
    with reading(folder, "rows as a run writes them"):
        plots.save_plots(folder, {name: (plots.plot_training, rows, x)
                                  for name, (rows, x) in drawn.items() if rows})


# ----- Methods on judged responses -----

def report_judged(run, ladder: dict) -> None:
    """Error rates under the tasks' own instructions, of greedy and of sampled answers.

    For a method that flags tokens (CUT) also which. All processes call this.
    """
    from model import Sampling

    cfg, results, tables = run.cfg, {}, {}
    judge, more = judging.RuleJudge(cfg.rouge_threshold), MoreMetrics()
    asked = data.questions(run.tasks, split=cfg.split, wordings=0, per_task=cfg.eval_per_task)
    seeded = [(question, cfg.seed + k) for k, question in enumerate(asked)]
    for title, folder in ladder.items():
        model = merged_copy(open_trained(cfg, folder) if folder else open_model(cfg))
        for name, temperature in (("error_rate", 0.0), ("sampled_error_rate", 1.0)):
            sampling = Sampling(cfg.max_new_tokens, temperature)

            def work(part, model=model, sampling=sampling):
                some, seeds = map(list, zip(*part, strict=True))
                return answer_questions(model, run.tokenizer, run.template, some, sampling,
                                        seeds=seeds, batch_size=cfg.eval_batch,
                                        max_len=cfg.max_len)
            metrics, rows = evaluate_responses(run.guard.share(seeded, work), judge, more=more)
            results.setdefault(title, metrics)[name] = one_minus(metrics["exact_match"])
            tables.setdefault(title, rows)
    run.guard.first(lambda: write_results(cfg, results, tables))
    for title, found in results.items():
        greedy, sampled = found["error_rate"]["mean"], found["sampled_error_rate"]["mean"]
        run.say(f"{title:24} errors: greedy {100 * greedy:5.1f} %, sampled {100 * sampled:5.1f} %")
    if hasattr(run.method, "flagged_tokens"):
        run.guard.first(lambda: measure_masks(run, ladder))


def one_minus(summary: dict) -> dict:
    """The summary of 1 - x from that of x."""
    found = summary | {"mean": 1 - summary["mean"]}
    for name in ("ci95", "ci95_tasks"):
        found[name] = summary[name] and [1 - bound for bound in reversed(summary[name])]
    return found


def measure_masks(run, ladder: dict) -> None:
    """mask.json: how well CUT's flags match the wrong tokens, per lambda; a plot of the last."""
    cfg, out, found = run.cfg, Path(run.cfg.out), {}
    records = [record for record in read_judged(cfg.records or out / "judged.jsonl")
               if record["judgment"] not in (None, FAILED)][:400]
    satisfied = PERFECT if cfg.positive == "text" else None
    lams = sorted({*masks.LAMS, cfg.detect_lam})
    for title, folder in ladder.items():
        if folder:
            model = merged_copy(open_trained(cfg, folder))
            made = masks.find_masks(replace(run, model=model), records, lams,
                                    floor=cfg.detect_floor, satisfied=satisfied)
            found[title] = masks.score_masks(made)
    (out / "mask.json").write_text(json.dumps(found, indent=1) + "\n")
    if any(score["n"] for score in found[title]):  # the wrong tokens are known
        plots.save_plots(out, {"mask": (plots.plot_training, found[title], "lam")})


# ----- Methods on scored candidates -----

def report_run(run) -> None:
    """Curves of each stage, judge.json of the candidates, and what to do next, on the screen.

    The first process calls this.
    """
    for log in Path(run.cfg.out).rglob("log.jsonl"):
        report_training(log.parent)
    if run.method.collect is candidates.collect and not getattr(run.cfg, "preferences", ""):
        report_candidates(run)
        report_label_free(run)
        report_length(run)
    page.embed_plots(Path(run.cfg.out))
    if Path(run.cfg.out, "report.md").exists():
        run.say(f"report: {run.cfg.out}/report.html\nnext: {next_command(run.cfg)}")


def next_command(cfg) -> str:
    """The final split of the tasks that a run reports on; without wordings a talk to the model."""
    words = ["--model", cfg.model, "--adapter", cfg.out]
    if not cfg.paraphrases or cfg.full:
        return shlex.join(["python", "-m", "tools.chat", *words])
    if Path(cfg.tasks) == DEMO / "tasks" and Path(cfg.model) == DEMO / "base":
        words = words[2:]
    else:
        words += ["--tasks", cfg.tasks, "--paraphrases", cfg.paraphrases, "--max-new-tokens",
                  str(cfg.max_new_tokens), "--rouge-threshold", str(cfg.rouge_threshold)]
    return shlex.join(["python", "eval.py", *words, "--split", "test"])


def report_candidates(run) -> None:
    """judge.json and a section of report.md: the rewards of the candidates against exact rules.

    Rewards that are plain numbers are no verdicts, and not compared.
    """
    cfg, verdicts = run.cfg, []
    records = [x for group in grouped_candidates(run) for x in group if x["target"] is not None]
    records = with_labels(run, records)
    for x in records:
        verdicts.append(judging.Verdict(x.get("expected"), x.get("correct"), x["reward"], x["how"]))
    if not verdicts or any(verdict.how not in judging.VERDICTS for verdict in verdicts):
        return
    found = confusion(records, verdicts, judging.RuleJudge(cfg.rouge_threshold).judge(records))
    (run.folder / "judge.json").write_text(json.dumps(found, indent=1) + "\n")
    if Path(cfg.out, "report.md").exists():
        with open(Path(cfg.out, "report.md"), "a", encoding="utf-8") as file:
            file.write(confusion_section(found, cfg.judge))


def report_label_free(run) -> None:
    """A section of report.md on what is known without targets."""
    path = Path(run.cfg.out, "report.md")
    if path.exists():
        groups = grouped_candidates(run)
        if any(x["how"] not in judging.VERDICTS for group in groups for x in group):
            groups = []  # rewards that are plain numbers have no best answer to count
        section = label_free_section(groups, data.read_records(run.folder / "probe.jsonl"))
        with path.open("a", encoding="utf-8") as file:
            file.write(section)


def report_length(run) -> None:
    """length.json and a section of report.md: the candidates' rewards against their length."""
    rows, path = [], Path(run.cfg.out, "report.md")
    for group in grouped_candidates(run):
        for x in group:
            if x["reward"] is not None:
                rows.append({"group": record_name(x), "reward": x["reward"],
                             "length": judging.count_words(x["response"])})
    if rows:
        found = length_figures(rows)
        (run.folder / "length.json").write_text(json.dumps(found, indent=1) + "\n")
        if path.exists():
            with path.open("a", encoding="utf-8") as file:
                file.write(length_section(found))


def report_rewards(run) -> None:
    """rewards.json: a reward model's rewards of all candidates against judge, rules and length."""
    records = [x for group in grouped_candidates(run) for x in group
               if x["reward"] is not None and x["target"] is not None]
    if not records:  # nothing says what is right
        return
    scores = heads.reward_scores(run, heads.open_reward_model(run, run.folder), records)
    truths = judging.RuleJudge(run.cfg.rouge_threshold).judge(with_labels(run, records))
    rows = {"held out": [], "trained on": []}
    for record, score, truth in zip(records, scores, truths, strict=True):
        part = "held out" if run.method.is_held_out(record) else "trained on"
        rows[part].append({"group": (record["task"], record["id"]), "reward": score,
                           "judge": record["reward"], "truth": truth.reward,
                           "length": judging.count_words(record["response"])})
    found = {part: compare_rewards(some) for part, some in rows.items()}
    (run.folder / "rewards.json").write_text(json.dumps(found, indent=1) + "\n")
    run.say(f"rewards against the judge, exact rules and length: {run.folder / 'rewards.json'}")


def compare_rewards(rows: list[dict]) -> dict:
    """A reward against its judge, the truth and length   arXiv 2310.03716.

    rows: {"group", "reward", "judge", "truth", "length"}. "accuracy", "true_accuracy": of a group's
    pairs that the judge (the truth) tells apart, the share that the reward orders alike;
    "longer_wins": the same of length and judge. The others are those of `length_figures`.
    """
    groups, pairs = {}, []
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    for group in groups.values():
        pairs += combinations(group, 2)
    uneven = [(a, b) for a, b in pairs if a["length"] != b["length"]]
    return {"accuracy": ordered_alike(pairs, "reward", "judge"),
            "true_accuracy": ordered_alike(pairs, "reward", "truth"),
            "longer_wins": ordered_alike(uneven, "length", "judge"),
            "comparisons": sum(a["judge"] != b["judge"] for a, b in pairs), **length_figures(rows)}


def ordered_alike(pairs: list[tuple], by: str, like: str) -> float | None:
    """The share of pairs that `by` orders as `like` does; ties of `by` count half."""
    known = [(a, b) for a, b in pairs if a[like] != b[like]]
    signs = [np.sign(a[by] - b[by]) * np.sign(a[like] - b[like]) for a, b in known]
    return float(np.mean((np.array(signs) + 1) / 2)) if signs else None
