"""Write other wordings of tasks' instructions, or of plain questions, with a model.

    python -m tools.paraphrase --tasks DIR --judge-url URL --judge-model NAME --out DIR
    python -m tools.paraphrase --tasks questions.jsonl --judge self --model DIR --out DIR
    python -m tools.paraphrase --tasks questions.jsonl --judge rule --out DIR    # without a model

paraphrases.json has those that are kept, for --paraphrases of eval.py and train.py, in the --split
that they are for; paraphrases.jsonl says of each where it came from and why it was kept or not. A
questions.jsonl has a row {"id", "question", "target"} for each question, only question is needed.
With --paraphrases FILE, new wordings are added to those in FILE, and differ from all of them.
--judge rule sets the text into the sentences of extras/formats/frames.toml.
"""

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from data import Task, split_wordings
from extras.formats import add_paraphrases, read_tasks
from extras.formats.checks import refuse
from extras.formats.tasks import SPLITS, frame_task, is_plain
from extras.judges import ServerFlags, check_flags, client_from_flags
from extras.judges.local import LocalChat
from extras.judges.writers import check_meaning, paraphrase
from methods.flags import flag_names
from tools import make_main, open_models
from tools.meta_evaluate import MODEL, refuse_unread

CHECK_KEY = "CHECK_API_KEY"  # where the key of another server that checks is looked for


def write_paraphrases(cfg) -> None:
    """Ask for wordings, check them, write both files, and say how many of each task are kept."""
    tasks, known, answers = read_tasks(cfg.tasks), {}, {}
    if cfg.paraphrases:
        add_paraphrases(cfg.paraphrases, tasks)
    for task in tasks:
        known[task.name] = [wording.text for some in task.wordings.values() for wording in some]
        if is_plain(task):
            answers[task.name] = list(task.instances[0].outputs)
    check_choices(cfg)
    texts = {task.name: task.definition for task in tasks}
    name, writer = open_writer(cfg)
    checker_name, checker = name, writer
    if cfg.check not in ("writer", cfg.judge) or cfg.check == "http":
        checker_name, checker = open_checker(cfg)
    if cfg.judge == "rule":
        rows = frame(tasks, cfg.number, known, checker)
    else:
        rows = paraphrase(writer, texts, cfg.number, checker=checker, known=known,
                          answers=answers, model=name)
    out, lines = Path(cfg.out), [json.dumps(row | {"checker": checker_name}) for row in rows]
    (out / "paraphrases.jsonl").write_text("\n".join([*lines, ""]))
    found = {task.name: add_kept(task, rows, cfg.split) for task in tasks}
    (out / "paraphrases.json").write_text(json.dumps(found, indent=1) + "\n")
    report(cfg, rows, found)


def check_choices(cfg) -> None:
    """Raise ValueError for flags that nobody would read."""
    refuse(len(cfg.adapter) > 1, "--adapter names several adapters, and one model writes. Give "
           "one at most.")
    refuse(cfg.check != "http" and (cfg.check_url or cfg.check_model), "--check-url and "
           "--check-model are for a checker behind a server. Add --check http, or leave them out.")
    refuse(cfg.check_key_env != CHECK_KEY and not cfg.check_url, "--check-key-env names the key "
           "for --check-url, which is not given. Add it, or leave --check-key-env out.")
    refuse(cfg.check == "http" and not cfg.check_model, "--check http needs --check-model NAME, "
           "the name under which the server offers the model that checks.")
    if cfg.judge != "http" and cfg.check != "http":
        check_flags(cfg, asked=False)
    read = {"tasks", "paraphrases", "split", "judge", "out"} | flag_names(ServerFlags)
    if "self" in (cfg.judge, cfg.check):
        read |= MODEL
    refuse_unread(cfg, read)


def open_writer(cfg) -> tuple[str, Callable]:
    """(name, backend) of who writes: the model behind --judge-url, --model itself, or nobody."""
    if cfg.judge == "rule":
        return "", None
    if cfg.judge == "http":
        client = client_from_flags(cfg, cfg.out)
        return client.name, client.ask
    return open_local(cfg)


def frame(tasks: list[Task], number: int, known: dict, checker: Callable | None) -> list[dict]:
    """Records as those of `paraphrase`, of wordings that no model wrote."""
    rows = []
    for task in tasks:
        for wording in frame_task(task, number):
            reason = "said already" if wording.text in known[task.name] else ""
            rows.append({"task": task.name, "original": task.definition, "text": wording.text,
                         "style": wording.style, "model": "", "kept": not reason,
                         "reason": reason})
    if checker:
        plain = {task.name for task in tasks if is_plain(task)}
        check_meaning(checker, [row for row in rows if row["kept"]], plain)
    return rows


def open_local(cfg) -> tuple[str, Callable]:
    """(name, backend) of --model, with its adapter if one is given."""
    *_, (name, *parts) = open_models(cfg)
    return name, LocalChat(*parts, batch_size=cfg.batch_size).ask


def open_checker(cfg) -> tuple[str, Callable | None]:
    """(name, backend) of who checks, if that is not the writer."""
    if cfg.check == "self":
        return open_local(cfg)
    if cfg.check != "http":
        return "", None
    flags = copy.copy(cfg)
    flags.judge_model = cfg.check_model
    if cfg.check_url:  # another server gets another key
        flags.judge_url, flags.judge_key_env = cfg.check_url, cfg.check_key_env
    client = client_from_flags(flags, cfg.out)
    return client.name, client.ask


def add_kept(task: Task, rows: list[dict], split: str) -> dict[str, list]:
    """The wordings of a task, those that were known and those that are kept, in their splits."""
    found = {name: [asdict(wording) for wording in task.wordings.get(name, [])]
             for name in SPLITS}
    kept = [{"text": row["text"], "style": row["style"]} for row in rows
            if row["kept"] and row["task"] == task.name]
    if split == "divide":
        for name, some in split_wordings(task.name, kept).items():
            found[name] += map(asdict, some)
    else:
        found[split] += kept
    return {name: some for name, some in found.items() if some}


def report(cfg, rows: list[dict], found: dict[str, dict]) -> None:
    """Say what became of the wordings of each task. Raises ValueError if none can be used."""
    split = "dev" if cfg.split == "divide" else cfg.split
    few = [name for name, splits in found.items() if len(splits.get(split, [])) < 2]
    for name in found:
        mine = [row for row in rows if row["task"] == name]
        reasons = Counter(row["reason"] or "kept" for row in mine)
        print(f"{name}:", ", ".join(f"{n} {reason}" for reason, n in reasons.items()))
    reasons = Counter(row["reason"] or "kept" for row in rows)
    print(f"{len(rows)} wordings:", ", ".join(f"{n} {reason}" for reason, n in reasons.items()))
    refuse(len(few) == len(found), f"no task has two {split} wordings, and consistency needs two. "
           f"{cfg.out}/paraphrases.jsonl says why none was kept. Raise --number, or use another "
           "model to write or to check.")
    if few:
        shown = ", ".join(few[:8]) + ", ..." * (len(few) > 8)
        print(f"warning: {len(few)} of {len(found)} tasks have fewer than two {split} wordings, "
              f"so they cannot be measured: {shown}. Raise --number, or use another model to "
              "write or to check.", file=sys.stderr)


main = make_main(
    write_paraphrases, __doc__, number=(8, "wordings to write per task"),
    judge=(("http", "self", "rule"), "who writes: a server, --model itself, or fixed sentences"),
    check=(("writer", "http", "self", "none"), "who checks that they ask for the same"),
    check_url=("", "address of the server that checks (default: --judge-url)"),
    check_model=("", "the name there of the model that checks"),
    check_key_env=(CHECK_KEY, "environment variable with the key for --check-url"),
    split=(("dev", "test", "train", "divide"), "split that they are for; divide: all three"))

if __name__ == "__main__":
    sys.exit(main())
