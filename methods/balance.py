"""Questions in equal numbers: of each task, and of each label of a task with few labels.

Sampled answers that tell a good one from a bad one are no fair sample of the questions. Where most
of a task's items say "positive", a model learns to say that, and its answers agree all the more.
"""

from statistics import median

import judge as judging
from methods.groups import best_answers

TIMES = 2  # times as many questions as of the rarest label, or of the median task


def balanced_groups(run, groups: list[list[dict]]) -> list[list[dict]]:
    """The groups that --balance keeps, in their order; each is the answers to one question.

    A label is the best answer, if it is a label of its task. At most twice as many questions are
    kept as of the task's rarest label among these (one question where only one occurs), and of the
    median task.
    """
    if not run.cfg.balance or not groups:
        return groups
    by_label, kept = label_numbers(run, groups), []
    # First of each label ...
    by_task = {}
    for (name, label), numbers in by_label.items():
        sizes = [len(x) for (task, other), x in by_label.items() if task == name and other]
        most = TIMES * min(sizes, default=0)
        if not label:
            most = len(numbers)
        elif len(sizes) == 1:
            most = 1
        by_task.setdefault(name, []).extend(numbers[:most])
    # ... then of each task.
    most = TIMES * max(1, int(median(map(len, by_task.values()))))
    for numbers in by_task.values():
        kept += sorted(numbers)[:most]
    run.say(f"{run.cfg.stage}: balanced, {len(kept)} of {len(groups)} questions are kept.")
    return [groups[number] for number in sorted(kept)]


def label_numbers(run, groups: list[list[dict]]) -> dict[tuple, list[int]]:
    """{(task, label): the numbers of its groups}; "" for an answer that is no label of its task."""
    labels, found = {}, {}
    for task in run.tasks:
        labels[task.name] = set(map(judging.normalize, task.labels or ()))
    for number, group in enumerate(groups):
        name, label = group[0]["task"], ""
        best, _ = best_answers(group)
        if best:
            label = judging.normalize(best[0]["response"])
        if label not in labels.get(name, ()):
            label = ""
        found.setdefault((name, label), []).append(number)
    return found
