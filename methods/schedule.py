"""What a stage trains on and for how long: the share that is held out, and passes over the rest.

--validation holds out a share of the questions by a hash of their prompts, so that the answers to
one prompt are on one side. Their loss is measured whenever a line is printed, and at the end.
"""

import math
from dataclasses import replace

import data
from methods import collate, probe
from methods.folders import save_settings

HELD_OUT = "held out"  # the key of the run's memory


# ----- Before the first step -----
def items_to_train(run) -> list[dict]:
    """The method's items without those that --validation holds out; sets how many steps there are.

    A method with phases makes new items from time to time, and has neither.
    """
    items = run.method.items(run)
    if not run.method.phase(run.cfg):
        items, run.memory[HELD_OUT] = split_items(run, items)
        set_steps(run, items)
    return items


def check_items(run, items: list[dict]) -> None:
    """Say how many prompts were truncated. Raises ValueError if there is nothing to train on."""
    cfg, truncated = run.cfg, 0
    if not items:
        raise ValueError(f"nothing to train on for stage {cfg.stage}: no item is left. See the "
                         "counts above; more samples or another judge may help.")
    for item in items:
        truncated += sum(document["truncated"] for document in item["documents"])
    if truncated:
        run.say(f"{cfg.stage}: {truncated} documents are longer than --max-len {cfg.max_len}, and "
                "were truncated.")


def split_items(run, items: list[dict]) -> tuple[list, list]:
    """The items to train on, and those that are held out. Raises ValueError if one is empty."""
    share, keys, first = run.cfg.validation, [], {}
    if not share or not items:
        return items, []
    # Items of one name, such as pairs of answers to one question, go by the first one's prompt.
    for item in items:
        prompt = prompt_of(item)
        keys.append(first.setdefault(item.get("name", prompt), prompt))
    order = data.hash_order(list(dict.fromkeys(keys)), "validation")
    held = set(order[:round(share * len(order))])
    kept, apart = [], []
    for item, key in zip(items, keys, strict=True):
        if key in held:
            apart.append(item)
        else:
            kept.append(item)
    if not kept or len(apart) < run.guard.size:
        raise ValueError(f"--validation {share} holds out {len(apart)} of {len(items)} items. "
                         "Expected at least one for each process, and some to train on. Give "
                         "another share, or more data.")
    run.say(f"{run.cfg.stage}: {len(apart)} items are held out, {len(kept)} are trained on.")
    return kept, apart


def prompt_of(item: dict) -> str:
    """The ids before the first label of an item's first document, as a text."""
    document, found = item["documents"][0], []
    for token, label in zip(document["input_ids"], document["labels"], strict=True):
        if label != data.IGNORE_INDEX:
            break
        found.append(token)
    return str(found)


def items_seen(cfg, items: list[dict]) -> list[dict]:
    """Those of a method's items that some step will see, before any are held out."""
    if cfg.epochs or cfg.validation:
        return items
    seen = set()
    for step in range(cfg.steps):
        seen.update(data.batch_indices(len(items), cfg.batch_size, step, cfg.seed))
    return [items[index] for index in sorted(seen)]


def set_steps(run, items: list[dict]) -> None:
    """--steps from --epochs, if that was given; says how many passes over the items it makes."""
    cfg = run.cfg
    if not items:
        return
    if cfg.epochs:
        steps = cfg.epochs * len(items) / cfg.batch_size
        steps = math.ceil(round(steps, 6))  # 0.07 * 100 is a little more than 7
        run.cfg = cfg = replace(cfg, steps=steps)
        run.guard.first(lambda: save_settings(cfg, run.folder))
    if getattr(cfg, "max_passes", 0):
        most = cfg.max_passes * len(items) / cfg.batch_size
        most = int(most + 1e-6)  # 0.29 * 100 is a little less than 29
        steps = max(1, min(cfg.steps, most))
        run.cfg = cfg = replace(cfg, steps=steps)
    passes = cfg.steps * cfg.batch_size / len(items)
    run.say(f"{cfg.stage}: {cfg.steps} steps of {cfg.batch_size} are {passes:.3g} passes over "
            f"{len(items)} items.")


# ----- In the loop -----
def is_told(step: int, cfg) -> bool:
    """Whether a line on the screen tells of a step: a tenth of them do."""
    return (step + 1) % max(1, cfg.steps // 10) == 0


def measured(run, step: int, measure) -> dict:
    """What is measured after a step, where it is due: {name: number}.

    "validation_TERM", means over the held-out items by measure(run, batches, learn) -> {term:
    mean}; and "agreement", see methods/probe.py, which may set the run's steps to end it here.
    """
    held, found = run.memory.get(HELD_OUT), {}
    told = is_told(step, run.cfg)
    last = step + 1 == run.cfg.steps
    if held and (told or last):
        found = validation_means(run, held, step, measure)
    return found | probe.measure_and_stop(run, step, told)


def validation_means(run, held: list[dict], step: int, measure) -> dict:
    """{"validation_TERM": mean over the held-out items}."""
    cfg, guard = run.cfg, run.guard
    batches, device = [], next(run.model.parameters()).device
    for part in data.micro_batches(held[guard.rank::guard.size], cfg.micro_tokens):
        batches.append(collate(part, run.model, device) | {"step": step})
    run.model.eval()
    means = measure(run, batches, learn=False)
    run.model.train()
    return {f"validation_{name}": mean for name, mean in means.items()}
