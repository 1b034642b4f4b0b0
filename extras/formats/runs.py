"""What a run is given, read and checked before anything is trained."""

import math

import data
from data import IGNORE_INDEX
from extras.formats.checks import refuse
from extras.formats.conversations import read_examples
from extras.formats.messages import learnt_answers
from extras.formats.preferences import read_preferences
from extras.formats.records import read_judged
from extras.formats.tasks import frame_bare_tasks
from extras.formats.templates import TemplateRefusal, check_template, encode_conversation
from extras.formats.tokenizer import check_vocabulary


def check_inputs(run) -> None:
    """Warn of, or refuse with ValueError, what the flags name and the stage cannot use."""
    cfg, config, kind = run.cfg, run.model.config, run.method.kind
    for warning in (frame_bare_tasks(run.tasks) if kind != "judged" else "",
                    check_vocabulary(run.tokenizer, config.vocab_size, config.bos_id,
                                     config.eos_ids, cfg.model)):
        if warning:
            run.say(warning)
    check_template(run.tokenizer, run.template, cfg.template)
    if getattr(cfg, "records", ""):
        read_judged(cfg.records)
    if getattr(cfg, "candidates", ""):
        check_labels(run, read_preferences(cfg.candidates)[0])
    if run.tasks:
        check_tasks(run.tasks, cfg, kind)


def check_tasks(tasks: list[data.Task], cfg, kind: str) -> None:
    """Raise ValueError where no task has the wordings or instances that the stage needs."""
    held = [task for task in tasks if len(task.wordings.get(cfg.split, [])) >= 2]
    if kind == "judged":
        held = [task for task in tasks if data.split_instances(task, cfg.split)]
        refuse(cfg.evaluate and not held, f"no instance of the {len(tasks)} tasks falls into split "
               f"{cfg.split!r}. Give more, or --no-evaluate.")
        return
    refuse(cfg.evaluate and not held, f"no task has two held-out wordings in split {cfg.split!r}, "
           "so consistency cannot be measured. Give --paraphrases FILE with at least eight "
           "wordings per task, or --no-evaluate.")
    refuse(hasattr(cfg, "wordings") and not any(task.wordings.get("train") for task in tasks),
           f"no training wordings for any of the {len(tasks)} tasks. Give --paraphrases FILE.")


def check_labels(run, records: list[dict]) -> None:
    """Raise ValueError for answers without a rival where the method compares answers."""
    single = any(record["how"] == "label" for record in records)
    refuse(single and not getattr(run.method, "takes_labels", False),
           f"{run.cfg.candidates} holds single answers (prompt, completion and label), and "
           f"--stage {run.cfg.stage} compares answers. Use --stage kto, or give chosen and "
           "rejected answers.")


# ----- What is left out -----
def say_left_out(run, path, left_out: dict[str, int]) -> None:
    """Say how many records are left out, by reason."""
    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items() if n)
    if reasons:
        run.say(f"{run.cfg.stage}: of the records of {path}, these are left out: {reasons}.")


def check_systems(run, conversations: list[list[dict]]) -> None:
    """Say if the template does not show what a system says in them."""
    given = any(messages[0]["role"] == "system" for messages in conversations)
    told = [{"role": "system", "content": "@"}, {"role": "user", "content": "?"}]
    try:
        shown = not given or "@" in run.template.render_conversation(told)
    except TemplateRefusal:  # such conversations are left out
        return
    if not shown:
        run.say(f"{run.cfg.stage}: template {run.cfg.template} has no place for a system, so what "
                "it says is not used.")


def fitting_records(run, records: list[dict]) -> list[dict]:
    """The judged responses that fit --max-len together with their judgments; the rest is counted.

    Raises ValueError if none fits.
    """
    cfg, found = run.cfg, []
    for record in records:
        texts = [record["response"], record["judgment"] or ""]
        if cfg.stage == "unlikelihood":  # its prompts hold no judgments
            texts[1] = ""
        length = sum(len(run.tokenizer.encode_continuation(text)) for text in texts if text)
        # BOS, EOS and the template's words behind the judgment
        if length + 16 <= cfg.max_len:
            found.append(record)
    path, reason = cfg.records or "judged.jsonl", f"longer than --max-len {cfg.max_len} allows"
    refuse(records and not found, f"{path}: all {len(records)} records are {reason}. Raise it.")
    say_left_out(run, path, {reason: len(records) - len(found)})
    return found


def usable_candidates(path, run) -> list[dict]:
    """The candidates to train on; of others' files those that are not empty and fit --max-len."""
    if "usable" in run.memory:
        return run.memory["usable"]
    (records, left_out), most, found = read_preferences(path), run.cfg.max_len, []
    if all(record["how"] not in ("file", "label") for record in records):
        return records
    records, left_out["that the template cannot write"] = writable(run, records)
    say_left_out(run, path, left_out)
    check_systems(run, [record["messages"] for record in records if "messages" in record])
    for record in records:
        length = len(run.template.encode_response(run.tokenizer, record["response"]))
        if record["response"].strip() and length + 16 <= most:
            found.append(record)
    if len(found) < len(records):
        run.say(f"{run.cfg.stage}: {len(records) - len(found)} of {len(records)} answers of {path} "
                f"are empty or longer than --max-len {most} allows, and are left out.")
    run.memory["usable"] = found
    return found


def writable(run, records: list[dict]) -> tuple[list[dict], int]:
    """The records whose dialogues the template can write, and how many others there are."""
    found = []
    for record in records:
        try:
            if record.get("messages"):
                run.template.render_conversation(record["messages"])
        except TemplateRefusal:
            continue
        found.append(record)
    refuse(not found, "the template can write none of the dialogues. Name another with --template.")
    return found, len(records) - len(found)


def example_items(run) -> list[dict]:
    """Items of --examples: one document per row or conversation; says what was left out.

    With --mix, the rarer files are repeated until the numbers of examples are in proportion to the
    weights.
    """
    cfg, sources, found = run.cfg, [read_items(run, path) for path in run.cfg.examples], []
    weights = list(map(float, cfg.mix)) or [len(items) for items in sources]
    most = max(len(items) / weight for items, weight in zip(sources, weights, strict=True))
    for path, items, weight in zip(cfg.examples, sources, weights, strict=True):
        n = round(most * weight)
        found += (items * math.ceil(n / len(items)))[:n]
        if cfg.mix:
            run.say(f"{cfg.stage}: in a pass {n} examples of {path}, which has {len(items)}.")
    return found


def read_items(run, path: str) -> list[dict]:
    """The items of one file of examples. Raises ValueError if it has none that fits."""
    (examples, left_out), found = read_examples(path, run.say), []
    check_systems(run, [example["messages"] for example in examples if "messages" in example])
    name = f"{path}, example" if len(run.cfg.examples) > 1 else "example"
    for number, example in enumerate(examples):
        document, fault = learnt_document(run, example)
        if document:
            found.append({"documents": [document], "name": f"{name} {number}"})
        else:
            left_out[fault] = left_out.get(fault, 0) + 1
    reasons = "".join(f"; left out {n} {reason}" for reason, n in left_out.items())
    run.say(f"{run.cfg.stage}: {len(found)} examples of {path}{reasons}.")
    refuse(not found, f"{path}: none of its {len(examples)} examples can be learnt{reasons}. Raise "
           "--max-len, or give another file.")
    return found


def learnt_document(run, example: dict) -> tuple[dict | None, str]:
    """An example as a document, or None and why; its labels are those of the learnt answers."""
    most, learnt = run.cfg.max_len, [True]
    if "messages" in example:
        learnt = learnt_answers(example["messages"], getattr(run.cfg, "train_on", "all"))
    last_only = learnt[1:] and learnt[-1] and not any(learnt[:-1])
    try:
        document = encode_conversation(run.tokenizer, run.template, example, max_len=most,
                                       last_only=last_only)
    except TemplateRefusal as error:
        return None, f"that the template cannot write ({error})"
    if not document:
        which = "last" if last_only else "first"
        return None, f"whose {which} answer is longer than --max-len {most}"
    if last_only:
        return document, ""
    labels, number, before = [], -1, IGNORE_INDEX
    for label in document["labels"]:
        number += before == IGNORE_INDEX != label  # an answer begins behind its prompt
        before = label
        labels.append(label if learnt[number] else IGNORE_INDEX)
    document["labels"] = labels
    if all(label == IGNORE_INDEX for label in labels):
        return None, f"of whose learnt answers none fits --max-len {most}"
    return document, ""
