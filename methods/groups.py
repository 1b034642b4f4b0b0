"""Scored candidates by question: the groups of answers that methods choose from."""

import random

import data
import judge as judging
from eval import extra
from methods import record_name


def grouped_candidates(run) -> list[list[dict]]:
    """The scored candidates by question (task and input), in the order of the file."""
    groups, formats = {}, extra("formats", run.cfg.plain)
    path = run.cfg.candidates or run.folder / "candidates.jsonl"
    if formats:
        records = formats.usable_candidates(path, run)
    else:
        records = read_fields(path, "task id wording input response reward how")
    for record in records:
        groups.setdefault((record["task"], record["id"]), []).append(record)
    return list(groups.values())


def read_fields(path, names: str) -> list[dict]:
    """The records of a file. Raises ValueError for one that lacks a field, or a text."""
    records = data.read_records(path)
    for number, record in enumerate(records, 1):
        for name in names.split():
            if not isinstance(record, dict) or name not in record:
                raise ValueError(f'{path}, line {number}, has no field "{name}". Expected an '
                                 f"object with {names.replace(' ', ', ')}.")
            if name in ("wording", "instruction", "input", "response"):
                if not isinstance(record[name], str):
                    raise ValueError(f'{path}, line {number}: "{name}" is no text. Fix that line.')
        if "messages" in record:
            raise ValueError(f"{path}, line {number}, is a dialogue (messages), which needs "
                             "extras/formats. Leave out --plain.")
    return records


def best_answers(group) -> tuple[list, list]:
    """The best answers to one question, and those below.

    Among verdicts, the reward 2 is best, among labels (good or bad) 1; among other rewards (a
    reward model's), the highest.
    """
    known = [record for record in group if record["reward"] is not None]
    top, best, below = 2, [], []
    if any(record["how"] == "label" for record in known):
        top = 1
    elif any(record["how"] not in judging.VERDICTS for record in known):
        top = max(known, key=lambda record: record["reward"])["reward"]
    for record in known:
        if record["reward"] == top:
            best.append(record)
        elif record["reward"] < top:
            below.append(record)
    return best, below


def known_target(record: dict) -> str:
    """A candidate's reference output. Raises ValueError where the input has none."""
    if record["target"] is None:
        raise ValueError(f"{record_name(record)} has no target, which --ce-target gold imitates. "
                         "Give --ce-target best.")
    return record["target"]


def group_rng(run, group: list[dict]) -> random.Random:
    """Random numbers that depend on the seed and the question alone."""
    return random.Random(f"{run.cfg.seed}/{group[0]['task']}/{group[0]['id']}")


def candidate_document(run, record: dict, mark: str = "") -> dict:
    """A candidate under the wording, or in the dialogue, that produced it.

    mark: words before what the user says last.
    """
    if not record.get("messages"):
        return run.document(mark + record["wording"], record["input"], record["response"])
    *before, last = record["messages"]
    asked = last | {"content": mark + last["content"]}
    prompt = run.template.render_conversation([*before, asked])
    return data.encode_example(run.tokenizer, run.template, prompt, record["response"],
                               max_len=run.cfg.max_len)


def distinct(records: list[dict], *names: str) -> list[dict]:
    """The records that have a reward, once for equal values of these fields; the last stays."""
    found = {}
    for record in records:
        if record["reward"] is not None:
            found[tuple(map(record.get, names))] = record
    return list(found.values())
