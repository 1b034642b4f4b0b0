"""Does a self-judge know anything? Its AUC on sampled answers, before its rewards are used.

    AUC = P(s(right) > s(wrong)) + P(s(right) = s(wrong)) / 2

with s the judge's probability that an answer is correct, right and wrong as exact rules say, which
know the targets: 1/2 is chance, 1 is perfect (the Mann-Whitney U statistic divided by the number of
pairs; Hanley and McNeil 1982). The answers are sampled for train instances. Accuracy would not do:
where most answers are right, a judge that accepts all of them is mostly right.
"""

import json
import math
import random

import numpy as np

import data
import judge as judging
from methods import candidates, rewards

INPUTS = 128  # about so many train instances; two answers to each are sampled
WEAK = 0.6  # an AUC below this is warned about
INSTEAD = """\
Its rewards say little about which answers are right. There are --judge agreement, which rewards \
what most wordings lead to and needs no judge, --judge http for a stronger model, --judge rule \
where targets are known, more --judge-share to teach the model, and --self-questions 2, which asks \
in another way."""


# ----- Answers whose truth is known -----
def train_order(run, task) -> list:
    """The train instances of a task, first those that SFT takes: data.instruction_examples."""
    instances = data.split_instances(task, "train")
    random.Random(f"{run.cfg.seed}/{task.name}").shuffle(instances)
    return instances


def train_instances(run, part: int) -> list[tuple]:
    """(task, instance) from the train split, evenly over the tasks; part 0 and 1 are disjoint.

    From the end, so that those come first that SFT has not seen, without the two that may be a
    judge's examples. The pool and the held-out splits are left alone.
    """
    found, few = [], run.tasks[::math.ceil(len(run.tasks) / INPUTS)]
    for task in few:
        instances = train_order(run, task)[:1:-1]
        for instance in instances[part::2][:max(1, INPUTS // len(few))]:
            found.append((task, instance))
    return found


def sampled_answers(run, pairs: list[tuple]) -> list[dict]:
    """Two sampled answers to each (task, instance), from seeds that no candidate has."""
    records = []
    for task, instance in pairs:
        for sample in range(2):
            records.append(candidates.record_to_answer(task, instance, task.definition, sample))
    if not records:  # no task has train instances
        return []
    return candidates.answered(run, records)


def labelled(run, judge, records: list[dict]) -> dict:
    """{key: the verdict of exact rules} of the different answers that have words."""
    rule, found = judging.RuleJudge(run.cfg.rouge_threshold), {}
    for item in rewards.with_labels(run, records):
        target = item["target"] if judge.config.show_target else None
        if item["response"].strip():
            key = (item["instruction"], item["input"], target, item["response"])
            found[key] = rule.verdict(item)
    return found


# ----- AUC -----
def measure(run, judge) -> None:
    """Print the self-judge's AUC on sampled answers to train instances; write self_judge.json."""
    path = run.folder / "self_judge.json"
    if not isinstance(judge, judging.LocalJudge) or run.guard.first(path.exists):
        return
    truths = labelled(run, judge, sampled_answers(run, train_instances(run, 1)))
    if not truths:
        run.say("warning: the self-judge's AUC is unknown: there are no train instances.")
        return
    said = judge.probabilities(list(truths), judging.verdict_question, judging.VERDICT_WORDS)
    # The judge's probabilities, what is true, and the question of each answer: (n,) each.
    scores, right, questions = [], [], []
    for key, truth in truths.items():
        if said[key] is not None:
            scores.append(said[key])
            right.append(truth.correct)
            questions.append(key[:2])
    scores, right = np.array(scores), np.array(right, dtype=bool)
    found = auc(scores, right, questions)
    passed = scores > judge.config.threshold
    found["n"] = len(right)
    found["right"] = int(right.sum())
    found["passed_right"] = int(passed[right].sum())
    found["passed_wrong"] = int(passed[~right].sum())
    found["thresholds"] = list(getattr(judge, "thresholds", {}).values())
    run.guard.first(lambda: path.write_text(json.dumps(found) + "\n"))
    tell(run, found)


def auc(scores, right, questions: list) -> dict:
    """{"auc", "ci95"} of scores (n,) and right (n,) bool; None unless there are both kinds.

    The interval is a bootstrap over questions, since answers to one question are not independent.
    """
    scores, right = np.asarray(scores, dtype=float), np.asarray(right, dtype=bool)
    if right.all() or not right.any():
        return {"auc": None, "ci95": None}
    difference = scores[right][:, None] - scores[~right]  # (n right, n wrong)
    wins = (difference > 0) + (difference == 0) / 2
    # A resample draws each question some times, and so its answers.
    numbers = {question: number for number, question in enumerate(dict.fromkeys(questions))}
    groups = np.array([numbers[question] for question in questions])  # (n,)
    rng, n, found = np.random.default_rng(0), len(numbers), []
    for _ in range(1000):
        drawn = np.bincount(rng.integers(0, n, n), minlength=n)[groups]  # (n,)
        pairs = drawn[right].sum() * drawn[~right].sum()
        if pairs:
            found.append(drawn[right] @ wins @ drawn[~right] / pairs)
    interval = np.quantile(found, (0.025, 0.975)).tolist()
    return {"auc": float(wins.mean()), "ci95": interval}


def tell(run, found: dict) -> None:
    """Print what was measured, and a warning if it is weak or unknown."""
    n, right = found["n"], found["right"]
    over = f"over {n} sampled answers ({right} right)"
    if found["auc"] is None:
        run.say(f"warning: the self-judge's AUC is unknown {over}; an AUC needs right and wrong "
                "ones.")
        return
    low, high = found["ci95"]
    run.say(f"self-judge: AUC {found['auc']:.2f} [{low:.2f}, {high:.2f}] {over}; it accepts "
            f"{found['passed_right']} of {right} right answers and {found['passed_wrong']} of "
            f"{n - right} wrong ones.")
    if found["auc"] < WEAK:
        run.say(f"warning: an AUC of 0.5 is chance, and the self-judge's is {found['auc']:.2f}. "
                f"{INSTEAD}")
