"""What methods/probe.py asks: inputs that are never sampled for, under wordings nobody learns from.

Agreement rises sooner under the wordings that are trained on than under new ones. So the wordings
are those that --wordings and --fresh-wordings leave, if they leave two.
"""

from methods.groups import grouped_candidates
from methods.unlabelled import pool_instances


def probe_questions(run, sampled) -> list[dict]:
    """The questions: of each task the inputs behind those of all rounds, under some wordings.

    sampled(task, cfg): the wordings that a run samples under. A task with a single wording has no
    pairs, and is left out.
    """
    cfg, found = run.cfg, []
    start = cfg.rounds * cfg.pool_per_task
    if not cfg.probe_inputs:
        return []
    inputs, wordings = given_texts(run)
    for task in run.tasks:
        apart = unseen_wordings(task, cfg, wordings)
        texts = apart if len(apart) > 1 else sampled(task, cfg)
        if len(texts) < 2:
            continue
        left = [x for x in pool_instances(run, task)[start:] if (task.name, x.input) not in inputs]
        for instance in left[:cfg.probe_inputs]:
            found.append({"task": task.name, "id": instance.id, "instruction": task.definition,
                          "input": instance.input, "targets": [], "labels": task.labels,
                          "wordings": texts[:max(2, cfg.pool_wordings)], "unseen": texts is apart})
    return found


def unseen_wordings(task, cfg, given: set[str]) -> list[str]:
    """The training wordings of a task that no stage sees; given: those of --candidates."""
    found, seen = [], cfg.wordings + cfg.fresh_wordings
    for wording in task.wordings.get("train", [])[seen:]:
        if wording.text not in given:
            found.append(wording.text)
    return found


def given_texts(run) -> tuple[set, set]:
    """{(task, input)} and the wordings of --candidates, which may be others than the flags name."""
    inputs, wordings = set(), set()
    if getattr(run.cfg, "candidates", ""):
        for group in grouped_candidates(run):
            for record in group:
                inputs.add((record["task"], record["input"]))
                wordings.add(record["wording"])
    return inputs, wordings


def check_questions(run, sampled) -> None:
    """Raises ValueError if --patience has nothing to measure."""
    if run.cfg.patience and not probe_questions(run, sampled):
        raise ValueError("--patience measures agreement on inputs that are not sampled for, and "
                         "there are none. Give --probe-inputs, two --pool-wordings, and a lower "
                         "--pool-per-task.")
