"""Inputs to sample answers to: those of the tasks' pool, or of a file without any targets.

--unlabelled FILE has a JSON line {"task": name, "input": text} for each input. Inputs that are
asked in an evaluation are left out of it, since a model must not train on its own test.
"""

import data


def pool_instances(run, task) -> list[data.Instance]:
    """All inputs of a task that answers may be sampled to, in a fixed order."""
    if not getattr(run.cfg, "unlabelled", ""):
        return data.split_instances(task, "pool")
    if "unlabelled" not in run.memory:
        run.memory["unlabelled"] = read_inputs(run)
    return run.memory["unlabelled"].get(task.name, [])


def read_inputs(run) -> dict[str, list[data.Instance]]:
    """{task: inputs} of the file --unlabelled. Raises ValueError that names the line."""
    path, tasks, found, left_out = run.cfg.unlabelled, {}, {}, 0
    for task in run.tasks:
        tasks[task.name] = asked_inputs(task)
    for number, record in enumerate(data.read_records(path), 1):
        name, text = read_input(record, f"{path}, line {number},")
        if name not in tasks:
            raise ValueError(f"{path}, line {number}, names task {name}, which --tasks does not "
                             f"have. Its tasks begin with {', '.join(sorted(tasks)[:5])}. Fix or "
                             "delete that line.")
        if text in tasks[name]:
            left_out += 1
        else:
            instance = data.Instance(f"line-{number}", text, ())
            found.setdefault(name, {}).setdefault(text, instance)  # equal inputs count once
    if not found:
        raise ValueError(f"{path} has no input to sample for. Expected lines of "
                         '{"task": name, "input": text} that no evaluation asks.')
    if left_out:
        run.say(f"{path}: {left_out} inputs are asked in an evaluation, and are left out.")
    for name, instances in found.items():
        found[name] = list(instances.values())
    return found


def read_input(record, where: str) -> tuple[str, str]:
    """The task and the input of a line. Raises ValueError for anything else."""
    if isinstance(record, dict):
        found = record.get("task"), record.get("input")
        if all(isinstance(text, str) for text in found):
            return found[0], found[1].strip()
    raise ValueError(f'{where} is no input. Expected {{"task": name, "input": text}}.')


def asked_inputs(task) -> set[str]:
    """The inputs of a task that the development and final splits ask."""
    found = set()
    for split in ("dev", "test"):
        found.update(instance.input for instance in data.split_instances(task, split))
    return found
