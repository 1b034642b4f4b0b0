"""What a run is given, read and checked before anything is trained."""

import data
from extras.formats.checks import refuse
from extras.formats.records import read_candidates, read_examples, read_judged
from extras.formats.tasks import frame_bare_tasks
from extras.formats.templates import check_template, encode_conversation
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
        check_lengths(run, read_judged(cfg.records))
    if getattr(cfg, "candidates", ""):
        read_candidates(cfg.candidates)
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


def check_lengths(run, records: list[dict]) -> None:
    """Raise ValueError for a record whose judgment and response do not fit --max-len together."""
    cfg = run.cfg
    for number, record in enumerate(records):
        if record["judgment"] is None or cfg.stage == "unlikelihood":
            continue
        judgment, response = (len(run.tokenizer.encode_continuation(record[name]))
                              for name in ("judgment", "response"))
        # BOS, EOS and the template's words behind the judgment
        refuse(judgment + response + 16 > cfg.max_len,
               f"{cfg.records or 'judged.jsonl'}, record {number}: its judgment ({judgment} "
               f"tokens) and response ({response}) do not fit --max-len {cfg.max_len}. Raise it, "
               "or remove the record.")


def usable_candidates(path, run) -> list[dict]:
    """The candidates to train on; of others' files those that are not empty and fit --max-len."""
    records, most = read_candidates(path), run.cfg.max_len
    if "usable" in run.memory or not any(record["how"] == "file" for record in records):
        return run.memory.get("usable", records)
    found = []
    for record in records:
        length = len(run.template.encode_response(run.tokenizer, record["response"]))
        if record["response"] and length + 16 <= most:
            found.append(record)
    if len(found) < len(records):
        run.say(f"{run.cfg.stage}: {len(records) - len(found)} of {len(records)} answers of {path} "
                f"are empty or longer than --max-len {most} allows, and are left out.")
    run.memory["usable"] = found
    return found


def example_items(run) -> list[dict]:
    """Items of --examples: one document per row or conversation; says what was left out."""
    (examples, left_out), most, found = read_examples(run.cfg.examples), run.cfg.max_len, []
    for number, example in enumerate(examples):
        document = encode_conversation(run.tokenizer, run.template, example, max_len=most)
        if document:
            found.append({"documents": [document], "name": f"example {number}"})
    if len(found) < len(examples):
        reason = f"whose first answer is longer than --max-len {most}"
        left_out[reason] = len(examples) - len(found)
    reasons = "".join(f"; left out {n} {reason}" for reason, n in left_out.items())
    run.say(f"{run.cfg.stage}: {len(found)} examples{reasons}.")
    return found
