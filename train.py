"""Train: what a stage is, the one loop, the pipeline.

    python train.py --stage cat                      # the demo: base, SFT, SFT(IA), CAT, a table
    python train.py --stage cat --help               # what the stage reads
    python train.py --stage cat --model DIR --tasks DIR --paraphrases FILE --out runs/x

A stage is a method of methods/ (its contract is in methods/__init__.py). One that needs an earlier
stage finds its adapter in the run folder, or trains it first. Order of this file: the loop, the
pipeline, `main`.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import data
import judge as judging
import methods
from eval import evaluate_responses, extra, fail, pick_device, write_results
from methods import Run, collate, early, merged_copy, open_trained, probe, settings, torch
from methods.finding import find_method
from methods.schedule import check_items, is_told, items_to_train, measured
from methods.settings import parse_config


# ----- The loop -----
class Alone:
    """One process that keeps no checkpoints. extras/runtime has guards for many, and for resuming.

    The pipeline and the loop call these in a fixed order, on which resuming bit by bit rests.
    """

    rank, size = 0, 1

    def sum(self, values):  # {name: number} summed over all processes
        return values

    def share(self, items, work):  # work(items), of which each process may do a part
        return work(items)

    def first(self, action):  # what the first process gets from action()
        return action()

    def keep(self, path, records):  # append records to a file of the run
        data.append_records(path, records)

    def kept(self, path, key):  # the keys of the records that are there
        return {key(record) for record in data.read_records(path)}

    def even(self, batches):  # (batch, weight), equally many in each process
        return [(batch, 1) for batch in batches]

    def clip(self, parameters, most):  # sum gradients, clip them by their norm, return that
        return float(torch.nn.utils.clip_grad_norm_(parameters, most))

    def resume(self, run, optimizer, make_items):  # the items, and how far an earlier run came
        return make_items(), {"step": 0, "tokens": 0, "seconds": 0.0}

    def inspect(self, run, means, norm, items):  # refuse bad numbers; what else to log
        if not math.isfinite(sum(means.values()) + norm):
            raise FloatingPointError(f"{run.cfg.stage}: a loss or the gradient norm is not finite: "
                                     f"{means}, norm {norm}. Nothing was updated. Lower --lr.")
        return {}

    def after_step(self, run, optimizer, items, done):
        pass

    def write(self, folder, save):  # save(folder), all of it or nothing
        save(folder)

    def open(self, run):  # called before anything is written to its folder
        run.folder.mkdir(parents=True, exist_ok=True)
        for name in ("log.jsonl", "probe.jsonl", "rollouts.jsonl"):  # of a run that was stopped
            (run.folder / name).unlink(missing_ok=True)


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up over a share of the steps, then a cosine down to a share of the peak."""
    warmup = max(1, round(cfg.warmup_ratio * cfg.steps))
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, cfg.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
    share = cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * cosine
    return cfg.lr * share


def train(run: Run) -> None:
    """The one loop, for every method and any number of processes.

    Process r of n takes each step's items r, r + n, ...
    """
    from tqdm import tqdm

    cfg, guard, method = run.cfg, run.guard, run.method
    device = next(run.model.parameters()).device
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=cfg.weight_decay,
                                  fused=True)  # its rate is set in every step
    torch.manual_seed(cfg.seed + guard.rank)  # dropout
    # A run that was stopped gets back its items, its optimizer and how far it came.
    items, done = guard.resume(run, optimizer, lambda: items_to_train(run))
    check_items(run, items)
    cfg = run.cfg  # its steps may follow from --epochs
    started = time.monotonic() - done["seconds"]
    phase = method.phase(cfg)
    run.model.train()
    for step in tqdm(range(done["step"], cfg.steps), desc=cfg.stage, initial=done["step"],
                     total=cfg.steps, disable=bool(guard.rank) or None):
        # PPO samples new answers from time to time
        if phase and step and step % phase == 0:
            items = method.items(run)
            run.model.train()
        # The items of this step; this process's share of them, in parts that fit into memory.
        indices = data.batch_indices(len(items), cfg.batch_size, step, cfg.seed)
        chosen = [items[index] for index in indices]
        parts = data.micro_batches(chosen[guard.rank::guard.size], cfg.micro_tokens)
        batches = [collate(part, run.model, device) | {"step": step} for part in parts]
        # Gradients, and the update.
        means = backward(run, batches)
        norm = guard.clip(parameters, cfg.clip)
        noted = guard.inspect(run, means, norm, chosen)
        rate = learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # What is known of the step; a checkpoint, if one is due.
        means |= measured(run, step, backward)
        tokens = sum(len(batch["input_ids"]) for batch in batches)
        done["tokens"] += int(guard.sum({"tokens": tokens})["tokens"])
        done["step"] = step + 1
        done["seconds"] = time.monotonic() - started
        log_step(run, step, means, {"norm": round(norm, 4), "lr": rate}, noted, done)
        guard.after_step(run, optimizer, items, done)
        if done["step"] == run.cfg.steps:  # which --patience may have lowered
            break
    probe.finish(run)
    run.model.eval()


def backward(run: Run, batches: list[dict], learn: bool = True) -> dict:
    """Gradients of one step, unless the loss is only measured; returns {term: mean}.

    Each term is divided once, by its total over micro-batches and processes. A batch without a
    target adds nothing: its sum and its count are 0.
    """
    cfg, method = run.cfg, run.method
    totals, sums, counts = Counter(), Counter(), method.TERMS | method.METRICS
    # First count: the divisor of a term is known before its first gradient.
    for batch in batches:
        for term, count in counts.items():
            totals[term] += count_of(count, batch, cfg)
    totals = run.guard.sum(totals)
    prepare(run, batches)
    # Then differentiate, batch by batch; the gradients add up to those of the whole step.
    for batch, weight in run.guard.even(batches):
        with torch.set_grad_enabled(learn), run.precision():
            terms = method.step(run.model, batch, cfg)
        if terms.keys() != counts.keys():
            raise ValueError(f"step of {cfg.stage} returns {list(terms)}; expected the names "
                             "in TERMS and METRICS.")
        loss = 0.0
        for term in method.TERMS:
            loss = loss + terms[term] / max(1, totals[term])
        if learn:
            (weight * loss).backward()
        for term, value in terms.items():
            sums[term] += weight * value.detach()
    sums = run.guard.sum({term: float(value) for term, value in sums.items()})
    return {term: value / max(1, totals[term]) for term, value in sums.items()}


def count_of(count, batch: dict, cfg) -> float:
    """What a term is divided by in one batch; see TERMS in methods/__init__.py."""
    if callable(count):
        return count(batch, cfg)
    if count == "tokens":
        return len(batch["targets"])
    if count == "pairs":
        return len(batch["better"])
    return batch[count]


def prepare(run: Run, batches: list[dict]) -> None:
    """A method's statistics of the whole step, for every batch, whatever --micro-tokens."""
    if not hasattr(run.method, "prepare"):
        return
    sums, found = Counter(), {}
    for batch, weight in run.guard.even(batches):
        with torch.no_grad(), run.precision():
            found = run.method.prepare(run.model, batch, run.cfg)
        for name, (total, count) in found.items():
            sums[name] += weight * float(total)
            sums[f"count of {name}"] += weight * float(count)
    sums = run.guard.sum(sums)
    means = {name: sums[name] / max(1, sums[f"count of {name}"]) for name in found}
    for batch in batches:
        batch["statistics"] = means


def log_step(run: Run, step: int, means: dict, update: dict, noted: dict, done: dict) -> None:
    """A row of log.jsonl for every step, a line on the screen for every tenth of the run."""
    from tqdm import tqdm

    cfg, row = run.cfg, {"stage": run.cfg.stage, "step": step}
    if run.guard.rank:
        return
    for name, value in means.items():
        row[name] = round(value, 6)
    row |= update | {
        "tokens": done["tokens"],
        "seconds": round(done["seconds"], 2),
    }
    data.append_records(run.folder / "log.jsonl", [row | noted])
    if is_told(step, cfg) or step + 1 == cfg.steps:
        shown = " | ".join(f"{name} {value:.3f}" for name, value in means.items())
        speed = done["tokens"] / done["seconds"] / 1000
        tqdm.write(f"{cfg.stage} step {step + 1}/{cfg.steps} | {shown} | {speed:.1f}k tok/s")


# ----- The pipeline -----
def make_run(cfg, method, guard) -> Run:
    """Read everything that the flags name; what is wrong with it shows before any training."""
    formats, tasks = extra("formats", cfg.plain), []
    readers = formats or data  # without extras/, our own forms only
    if getattr(cfg, "tasks", ""):
        tasks = readers.read_tasks(cfg.tasks)
    if getattr(cfg, "paraphrases", ""):
        readers.add_paraphrases(cfg.paraphrases, tasks)
    model, tokenizer = methods.open_model(cfg, trainable=True), methods.open_tokenizer(cfg)
    if cfg.max_len > model.config.context:
        raise ValueError(f"--max-len is {cfg.max_len}, but {cfg.model} takes "
                         f"{model.config.context} tokens. Lower it.")
    cfg = replace(cfg, template=cfg.template or model.config.prompt_template or "alpaca")
    template = readers.find_template(cfg.template, cfg.model)
    run = Run(cfg, method, model, tokenizer, template, tasks, Path(cfg.out), guard)
    if formats:
        formats.check_inputs(run)
    return run


def run_stage(run: Run, name: str) -> Path:
    """Train a stage unless its folder holds it already; returns the folder of its adapter."""
    own, init = name == run.cfg.stage, getattr(run.cfg, "init", "")
    method, cfg, rounds = run.method, run.cfg, getattr(run.cfg, "rounds", 1)
    if not own:
        method, cfg, rounds = find_method(name), settings.stage_config(run.cfg, name), 1
    # It may be there already, in this run's folder or in that of --init.
    places = [Path(cfg.out)]
    if init and not own:
        places = [Path(init) / name, Path(init), *places]
    for place in places:
        if settings.saved_settings(place).get("stage") == name and settings.is_finished(place, cfg):
            run.say(f"{name}: found in {place}.")
            return place
    # The stage that it continues comes first, trained by the same rule.
    before = None
    if method.needs and (run.tasks or init):
        before = run_stage(run, method.needs)
    # Each round goes on from the last; the last round's folder is the run's own.
    for number in range(rounds):
        folder = Path(cfg.out)
        if number + 1 < rounds:
            folder = folder / f"round{number + 1}"
        if not settings.is_finished(folder, cfg):
            run.say(f"{name}: training in {folder}.")
            model = trainable_model(cfg, before)
            train_stage(replace(run, cfg=cfg, method=method, folder=folder, round=number,
                                model=model, memory={}))
        before = folder
    return before


def trainable_model(cfg, before: Path | None):
    """The model that a stage trains, on the device that the flags mean."""
    import lora
    # With a new adapter, or going on with that of the stage before it.
    if before:
        model = open_trained(cfg, before, trainable=True)
    else:
        model = methods.open_model(cfg, trainable=True)
    if cfg.full:
        return model.float()  # float32 weights; autocast makes their products cheap
    if not before:
        torch.manual_seed(cfg.seed)
        targets = tuple(cfg.adapt) or lora.LLAMA_TARGETS
        lora.apply_lora(model, lora.LoraConfig(cfg.rank, cfg.alpha, cfg.dropout, targets))
    return model


def train_stage(run: Run) -> None:
    """Collect, train, save."""
    method, guard = run.method, run.guard
    guard.open(run)
    # The settings go first, so that even a run that is stopped says what it was.
    guard.first(lambda: settings.save_settings(run.cfg, run.folder))
    method.attach(run)
    method.collect(run)
    method.begin(run)
    train(run)
    # Written under another name and renamed: a folder that has an adapter is a finished stage.
    save = getattr(method, "save", save_trained)
    guard.first(lambda: guard.write(run.folder, lambda folder: save(run, folder)))
    guard.first(lambda: early.discard_weights(run))


def save_trained(run: Run, folder: Path) -> None:
    """The adapter, or with --full the model in the folder `model`."""
    import lora
    # A method may have put modules of its own into the model, such as a head for values.
    if hasattr(run.method, "detach"):
        run.method.detach(run, folder)
    if run.cfg.full:
        methods.save_model_folder(run, folder / "model", pick_device(run.cfg)[1])
    else:
        lora.save_adapter(run.model, folder, run.cfg.model)


def align(run: Run) -> None:
    """Train the stage and what it needs, and evaluate all of them on the same questions."""
    method, cfg = run.method, run.cfg
    # What is wrong shows before anything is trained: another run in the folder, or the inputs.
    settings.is_finished(Path(cfg.out), cfg)
    method.inspect(run)
    compare, rounds, names = getattr(cfg, "compare", True), getattr(cfg, "rounds", 1), []
    if run.tasks and compare:
        names += method.beside
    if run.tasks and method.needs:
        names.append(method.needs)
    # The ladder: what the table shows, from the base model upwards.
    ladder = {"base": None} if run.tasks else {}
    for name in names:
        ladder[find_method(name).title] = run_stage(run, name)
    for name in method.also_needs(cfg):  # such as a reward model, which answers nothing
        run_stage(run, name)
    folder = run_stage(run, cfg.stage)
    if not compare:
        ladder = {}
    elif names:
        for number in range(1, rounds):
            ladder[f"{method.title}, round {number}"] = folder / f"round{number}"
    ladder[method.title] = folder
    getattr(method, "report", report)(run, ladder)
    reports = extra("reports", cfg.plain)
    # Training curves, and how good the rewards were.
    if reports:
        run.guard.first(lambda: reports.report_run(run))


def report(run: Run, ladder: dict[str, Path | None]) -> None:
    """Evaluate {title: run folder} on the same held-out questions, and write the results."""
    cfg, results, tables = run.cfg, {}, {}
    if not cfg.evaluate or not run.tasks:
        run.say(f"{cfg.stage}: nothing is evaluated. The adapter is in {cfg.out}.")
        return
    questions = data.questions(run.tasks, split=cfg.split, wordings=cfg.eval_wordings,
                               per_task=cfg.eval_per_task)
    judge, reports = judging.RuleJudge(cfg.rouge_threshold), extra("reports", cfg.plain)
    more = reports and reports.MoreMetrics()
    run.say(f"evaluating on {len(questions)} held-out questions ({cfg.split}).")
    # Every model answers the same questions, greedily, by the same judge.
    for title, folder in ladder.items():
        model = methods.open_model(cfg) if folder is None else open_trained(cfg, folder)
        model, prefix = merged_copy(model), ""
        if title.startswith(run.method.title):
            prefix = run.prefix()
        answered = run.answers(model, questions, prefix)
        results[title], tables[title] = evaluate_responses(answered, judge, more=more)
    run.guard.first(lambda: write_results(cfg, results, tables))
    if remark := run.method.remark(run, results):
        run.say(remark)


def main(argv: list[str] | None = None) -> int:
    """Run a stage; the exit status is 2 for a mistake in what was given."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        cfg, method = parse_config(argv)
        if runtime := extra("runtime", cfg.plain):
            return runtime.supervise(cfg, method, run_method)
        run_method(cfg, method, Alone())
    # Mistakes in the flags end here, and without extras/ all others too.
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)  # under torchrun, the first process says it, and its end ends the others
        fail(str(error))
    return 0


def run_method(cfg, method, guard) -> None:
    """Everything that a command does."""
    if hasattr(method, "open_run"):  # pretrain starts without a model
        train_stage(method.open_run(cfg, guard, method))
    else:
        align(make_run(cfg, method, guard))


if __name__ == "__main__":
    sys.exit(main())
