"""Responses that somebody already has, of any models, as the questions that eval.py measures.

A file (JSON Lines, a JSON list, CSV, TSV or Parquet) has a row per response:

    question   the question that rewordings share, as text, name or number (or: id, doc_id)
    wording    the question as it was asked, or a number or name of the wording (or: prompt)
    response   what the model said; "" is an answer, too (or: completion, prediction)
    target     optional: the right answer, or a list of them (or: targets, reference, output)
    input, model, task, style, sample   optional; sample tells apart answers to equal wordings

The samples of lm-evaluation-harness are such rows under its own names, and a row of our own
questions.jsonl holds all responses to a question. Whatever is wrong raises ValueError.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from extras.formats.checks import name_fields, refuse, show
from extras.formats.rows import read_rows

# Under which names a column is looked for; of several in one row, the first counts.
COLUMNS = {
    "question": ("question", "question_id", "id", "doc_id"),
    "wording": ("wording", "paraphrase", "prompt", "arguments", "prompt_hash"),
    "response": ("response", "completion", "prediction", "filtered_resps"),
    "target": ("target", "targets", "reference", "references", "output"),
}
COMMON = "responses"  # the task of rows that name none, where there are several files
WANTED = "responses: rows with question (or id), wording and response"


def print_warning(text: str) -> None:
    """A line on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def read_files(paths: list, say: Callable[[str], None] = print_warning) -> dict[str, list[dict]]:
    """`read_responses` of several files together, so that their models can be compared.

    Rows without a task are of one task in all files. Raises ValueError for a model that is in two
    files, and for a question whose targets differ between two.
    """
    found, homes, targets = {}, {}, {}
    for path in map(str, paths):
        refuse(Path(path).is_dir(), f"{path} is a folder. Give a file of answers, such as its "
               "questions.jsonl.")
        for model, questions in read_responses(path, say).items():
            refuse(model in found, f"{homes.get(model)} and {path} both have a model "
                   f"{show(model)}. Name it otherwise in one of them, in the column model; without "
                   "one, the file's name is the model's.")
            found[model], homes[model] = questions, path
            for question in questions:
                if len(paths) > 1 and question["task"] == Path(path).stem:
                    question["task"] = COMMON
                key = identify(question)
                wanted, first = targets.setdefault(key, (question["targets"], path))
                refuse(wanted != question["targets"], f"the target of question "
                       f"{show(question['id'])} is {show(wanted)} in {first}, and "
                       f"{show(question['targets'])} in {path}. Make them equal, or tell the "
                       "questions apart in a column task.")
    return found


def read_responses(path, say: Callable[[str], None] = print_warning) -> dict[str, list[dict]]:
    """{model: questions}; of several models all have the same questions and wordings, in order.

    A question is {task, id, instruction, input, targets, labels, wordings, styles, responses,
    unfinished}. Those with a single wording have no pair: they are left out, and counted.
    """
    groups, filters = {}, {}
    for row, where in read_rows(path, WANTED):
        if "filtered_resps" in row:
            filters.setdefault(str(row.get("filter")), where)
        refuse(len(filters) > 1, f"{where}: the rows of {path} are answers after several filters "
               f"({', '.join(filters)}), so each answer stands there several times. Keep the rows "
               "of one filter.")
        for one in read_row(row, where, Path(path)):
            add_response(groups, one, where)
    found, left_out = {}, 0
    for (model, *_), group in groups.items():
        single = len(set(group["wordings"])) < 2
        left_out += single
        if not single:
            question = {name: part for name, part in group.items() if name not in OWN}
            found.setdefault(model, []).append(question)
    refuse(not found, f"{path}: none of its {len(groups)} questions was asked in two wordings, and "
           "consistency needs two. The column question (or id) names what rewordings share, and "
           "wording tells them apart.")
    if left_out:
        say(f"{path}: {left_out} of {len(groups)} questions have one wording only, and are left "
            "out.")
    return {model: align(found, model, path) for model in found}


def add_response(groups: dict, one: dict, where: str) -> None:
    """Put a response into the group of its question, which it opens if it is the first there."""
    key = tuple(one[name] for name in ("model", "task", "id", "input"))
    group = groups.setdefault(key, {
        **{name: one[name] for name in ("task", "id", "instruction", "input", "targets", "labels")},
        "wordings": [], "styles": [], "responses": [], "unfinished": 0, "seen": {},
        "where": where})
    refuse(group["targets"] != one["targets"], f"{where}: the target of question "
           f"{show(one['id'])} is {show(one['targets'])}, and in {group['where']} "
           f"{show(group['targets'])}. Rewordings share their right answers: make them equal, or "
           "give the questions different names.")
    if one["sample"] is not None:
        first = group["seen"].setdefault((one["wording"], one["sample"]), where)
        refuse(first != where, f"{where}: sample {show(one['sample'])} of wording "
               f"{show(one['wording'])} of question {show(one['id'])} is in {first} already. "
               "Remove one of them, or number the samples.")
    for name in ("wording", "style", "response"):
        group[f"{name}s"].append(one[name])
    group["unfinished"] += one["unfinished"]


OWN = {"seen", "where"}  # of a group, what is no part of the question


def align(found: dict, model: str, path) -> list[dict]:
    """A model's questions in the order of the first model's, as their wordings and responses.

    They are compared question by question, so both have to be the same.
    """
    first, *_ = found
    mine = {identify(question): question for question in found[model]}
    others = {identify(question): question for question in found[first]}
    advice = "Give each model the same, or a file of its own."
    for one, other, name in ((mine, others, model), (others, mine, first)):
        extra = [key for key in one if key not in other]
        refuse(extra, f"{path}: {len(extra)} questions of model {show(name)} were not put to "
               f"{show(first if name == model else model)}, for example "
               f"{show(' '.join((extra or [['']])[0]))}. {advice}")
    aligned = []
    for key, other in others.items():
        question, order = mine[key], []
        left = list(enumerate(question["wordings"]))
        for wording in other["wordings"]:
            place = next((pair for pair in left if pair[1] == wording), None)
            refuse(not place, f"{path}: model {show(model)} has fewer responses than {show(first)} "
                   f"to wording {show(wording)} of question {show(question['id'])}. {advice}")
            left.remove(place)
            order.append(place[0])
        refuse(left, f"{path}: model {show(model)} has more responses than {show(first)} to "
               f"question {show(question['id'])}. {advice}")
        columns = {name: [question[name][i] for i in order]
                   for name in ("wordings", "styles", "responses")}
        aligned.append(question | columns)
    return aligned


def identify(question: dict) -> tuple:
    """What makes a question the same for two models."""
    return question["task"], question["id"], question["input"]


# ----- Rows -----
def read_row(row: dict, where: str, path: Path) -> Iterator[dict]:
    """The responses of a row, each with all that is known of its question."""
    given = {"labels": None, "unfinished": 0}
    for name, default in (("model", path.stem), ("task", path.stem), ("input", ""), ("style", ""),
                          ("sample", None)):
        given[name] = default
        if row.get(name) not in (None, ""):
            given[name] = as_text(row[name], name, where)
    refuse(not given["model"].isprintable(), f"{where}: model is {show(given['model'])}. Expected "
           "a name on one line.")
    if "responses" in row:
        yield from read_own(row, where, given)
        return
    refuse({"key", "request", "text"} <= row.keys(), f"{where} is an answer as the client of "
           "servers keeps it. The questions.jsonl of the run in the same folder has all answers "
           "with their questions: give that file.")
    columns = {}
    for column, names in COLUMNS.items():
        columns[column] = next((name for name in names if name in row), "")
        missing = not columns[column] and column != "target"
        refuse(missing, f"{where} has no {column} ({' or '.join(names)}); found: "
               f"{name_fields(row)}. Expected {WANTED}.")
    given["id"] = as_text(row[columns["question"]], "question", where)
    given["instruction"] = given["id"] * (columns["question"] == "question")
    given["targets"] = read_targets(row.get(columns["target"]), where, path)
    given["wording"] = read_wording(row[columns["wording"]], where)
    refuse(not given["id"].strip() or not given["wording"].strip(), f"{where}: question or wording "
           "is empty. Expected a text, a number or a name in both.")
    texts = row[columns["response"]]
    if columns["response"] != "filtered_resps":
        yield given | {"response": read_response(texts, where)}
        return
    refuse(not isinstance(texts, list) or not texts, f"{where}: filtered_resps is {show(texts)}. "
           "Expected a list of texts.")
    for number, text in enumerate(texts):
        yield given | {"response": read_response(text, where), "sample": str(number)}


def read_own(row: dict, where: str, given: dict) -> Iterator[dict]:
    """The responses of a row of our own questions.jsonl."""
    lists = {}
    for name in ("wordings", "responses", "targets"):
        lists[name] = row.get(name)
        refuse(not isinstance(lists[name], list), f"{where}: {name} is {show(lists[name])}. "
               "Expected a list, as in the questions.jsonl of a run.")
    styles = row.get("styles") or [""] * len(lists["wordings"])
    refuse(not isinstance(styles, list), f"{where}: styles is {show(styles)}. Expected a list.")
    sizes = len(lists["wordings"]), len(lists["responses"]), len(styles)
    refuse(len(set(sizes)) > 1, f"{where} has {sizes[0]} wordings, {sizes[1]} responses and "
           f"{sizes[2]} styles. Expected one of each per response.")
    given["id"] = as_text(row.get("id", where), "id", where)
    given["instruction"] = as_text(row.get("instruction", ""), "instruction", where)
    given["targets"] = [as_text(text, "targets", where) for text in lists["targets"]]
    labels = row.get("labels")
    refuse(labels is not None and not isinstance(labels, list), f"{where}: labels is "
           f"{show(labels)}. Expected a list of texts, or null.")
    given["labels"] = labels and [as_text(text, "labels", where) for text in labels]
    unfinished = row.get("unfinished") or 0
    refuse(type(unfinished) is not int, f"{where}: unfinished is {show(unfinished)}. Expected how "
           "many responses reached the length limit.")
    seen = []
    for wording, response, style in zip(lists["wordings"], lists["responses"], styles, strict=True):
        wording = read_wording(wording, where)
        # The same row a second time is found by these numbers.
        yield given | {"wording": wording, "style": as_text(style, "style", where),
                       "response": read_response(response, where),
                       "sample": f"{seen.count(wording)} of one row",
                       "unfinished": 0 if seen else unfinished}
        seen.append(wording)


def as_text(value, name: str, where: str) -> str:
    """A text as it is, and a number as it is written."""
    number = type(value) is int or type(value) is float and math.isfinite(value)
    refuse(not number and not isinstance(value, str), f"{where}: {name} is {show(value)}. Expected "
           "a text or a number.")
    return value if isinstance(value, str) else json.dumps(value)


def read_response(value, where: str) -> str:
    """A response. One that is missing was never given, which is no answer of the model."""
    refuse(value is None, f"{where}: the response is null, so this request was never answered. Ask "
           'again, or delete the rows of that wording; an answer without words is "".')
    refuse(isinstance(value, list), f"{where}: the response is {show(value)}. Expected a text: "
           "scores of answers to choose from are no responses.")
    return as_text(value, "response", where)


def read_wording(value, where: str) -> str:
    """A wording: a text, the messages of a chat, or lm-evaluation-harness's "arguments", in which
    the prompt comes first."""
    if isinstance(value, list) and all(isinstance(x, dict) and "content" in x for x in value):
        return "\n".join(as_text(message["content"], "wording", where) for message in value)
    while isinstance(value, (dict, list)) and value:
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return as_text(value, "wording", where)


def read_targets(value, where: str, path: Path) -> list[str]:
    """The right answers: none, one, or a list. A cell of a table may hold a list in JSON."""
    is_table = path.suffix.lower() in (".csv", ".tsv")
    if value is None or is_table and not value:
        return []
    if is_table and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass  # a text that begins with a bracket
    values = value if isinstance(value, list) else [value]
    return [as_text(part, "target", where) for part in values]
