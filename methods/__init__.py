"""What every method shares: its contract, the run, batches, and log-probabilities.

A method is a file in this folder (or anywhere: `--stage path/to/mine.py`) that has

    TERMS       {term of the loss: what it is divided by, counted over the whole step}: "tokens",
                "items", "pairs", "documents", or a function (batch, cfg) -> number
    items(run)                  -> what it trains on, [item, ...]
    step(model, batch, cfg)     -> {term: sum}, one for each name in TERMS and METRICS

and may have what follows. What it leaves out it gets from the file that it names as its `base`
(candidates or judged), or else from methods/common.py.

    Flags       a dataclass of the flags that it reads beside the common ones
    DEFAULTS    {flag: value} where its default differs from the common one
    METRICS     like TERMS, for figures of the log that are not part of the loss
    title       its name in the table
    kind        which of the demo's settings apply
    needs       the name of the stage that comes before, whose adapter it continues
    beside      names of stages that are trained and shown for comparison
    unread      names of flags that its Flags have, but that it does not read
    takes_labels    whether it learns from single answers that are called good or bad
    check, also_needs, inspect, attach, collect, begin, phase, remark, prefix   see common.py
    detach(run, folder)         saves and removes what `attach` added
    prepare(model, batch, cfg)  -> {name: (sum, count)}: statistics of the whole step, which the
                                loop totals and hands to `step` as batch["statistics"][name]
    report(run, ladder)         evaluates the finished models

A `batch` is what `collate` makes of items, and "step", the number of the step. Import torch, losses
and lora from here: they are loaded when they are first used, so that `--help` and a wrong flag are
answered at once.

An item is {"documents": [...], "name": ..., "indices": {name: [number of one of its documents]},
"values": {name: [number]}}. `collate` lays the documents of a batch end to end and joins the rest
by name, so it knows no method.

Shapes: N tokens of a batch, M labelled ones, n documents, D model dim.
"""

import importlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import data
from eval import (  # noqa: F401
    answer_questions,
    extra,
    open_model,
    open_tokenizer,
    pick_device,
)


class Later:
    """A module that is imported when it is first used: torch takes a second to load."""

    def __init__(self, name: str):
        self.module_name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self.module_name), attribute)


torch, losses, lora = Later("torch"), Later("losses"), Later("lora")


# ----- The run -----
@dataclass
class Run:
    """What every part of a stage needs: settings, model, texts, and the folder it writes to."""

    cfg: object
    method: object  # the module
    model: object
    tokenizer: data.Tokenizer
    template: data.Template
    tasks: list[data.Task]
    folder: Path
    guard: object  # see train.Alone
    round: int = 0
    memory: dict = field(default_factory=dict)  # what a stage keeps between its phases

    def document(self, wording: str, input: str, response) -> dict:
        """Prompt and response as token ids and labels."""
        prompt = self.template.render(wording, input)
        return data.encode_example(self.tokenizer, self.template, prompt, response,
                                   max_len=self.cfg.max_len)

    def say(self, message: str) -> None:
        """Print once, however many processes there are."""
        if self.guard.rank == 0:
            print(message, flush=True)

    def chunks(self, records: list[dict], what: str, key=None):
        """The records in parts that are sampled and written together, with a progress bar.

        key(record): neighbours with the same key stay in one part.
        """
        from tqdm import tqdm

        size, silent, parts = 4 * self.cfg.eval_batch, bool(self.guard.rank) or None, []
        for number, record in enumerate(records):
            together = key and number and key(record) == key(records[number - 1])
            if not parts or len(parts[-1]) >= size and not together:
                parts.append([])
            parts[-1].append(record)
        yield from tqdm(parts, desc=what, unit="chunk", disable=silent)

    def answers(self, model, questions: list[dict], prefix: str = "") -> list[dict]:
        """The questions with a model's greedy "responses"; each process answers a share."""
        from model import Sampling

        def work(part):
            return answer_questions(model, self.tokenizer, self.template, part,
                                    Sampling(self.cfg.max_new_tokens), prefix=prefix,
                                    batch_size=self.cfg.eval_batch, max_len=self.cfg.max_len)
        return self.guard.share(questions, work)

    def prefix(self) -> str:
        """Words before every instruction, for methods that train a model to react to them."""
        return self.method.prefix(self)

    def precision(self):
        """The numbers that a step computes in: with --full, bfloat16 around float32 weights."""
        device, dtype = pick_device(self.cfg)
        mixed = self.cfg.full and dtype != torch.float32
        return torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=mixed)


def open_trained(cfg, folder: Path, *, trainable: bool = False):
    """What a finished stage left in its folder: an adapter over the base, or a whole model."""
    if (folder / "model").is_dir():
        return open_model(cfg, folder=str(folder / "model"))
    return open_model(cfg, str(folder), trainable=trainable)


def save_model_folder(run: Run, target: Path, dtype=None) -> None:
    """The model and its tokenizer as a Hugging Face folder."""
    from model import save_model

    formats = extra("formats", run.cfg.plain)
    if formats:
        formats.export_model(run.model, run.tokenizer, run.cfg.template, run.cfg.model, target,
                             run.folder, dtype=dtype)
    else:
        save_model(run.model, target, dtype=dtype)
        shutil.copy(run.tokenizer.path, target / "tokenizer.model")


def merged_copy(model):
    """For sampling: a copy with its adapters merged; the model itself if it cannot be merged."""
    if hasattr(model, "gather_copy"):  # its weights are spread over the processes
        return model.gather_copy()
    bases = [module.base for module in lora.lora_modules(model).values()]
    if bases and all(isinstance(base, torch.nn.Linear) for base in bases):
        return lora.merge_lora(model)
    return model.eval()  # without adapters, or over a quantised base


def record_name(record: dict) -> str:
    """What a message calls a record: task/id, or the id of one without a task."""
    return "/".join(str(record[key]) for key in ("task", "id") if record.get(key) is not None)


# ----- Batches and log-probabilities -----
def collate(items: list[dict], model, device) -> dict:
    """Items of a micro-batch as one packed row, and what they name.

    "input_ids" (N,) and "attend", the row's attention; "rows" (M,), the positions that predict a
    label, "targets" and "sequence_ids" (M,), the label and document of each; "ends" (n,), each
    document's last position; "documents" and "items", their numbers; and what the items name.
    """
    if hasattr(model, "lay_out"):  # extras/fast: a prompt that documents share is laid down once
        row, attend = model.lay_out(items)
    else:
        row, attend = lay_out_documents(items, device)
    labels = torch.tensor(row["labels"])  # (N,)
    rows, targets = losses.prediction_rows(labels, attend.before)
    sequence_ids = torch.tensor(row["sequence_ids"])[labels != data.IGNORE_INDEX]
    tensors = {"input_ids": torch.tensor(row["input_ids"]), "rows": rows, "targets": targets,
               "sequence_ids": sequence_ids, "ends": torch.tensor(row["ends"])}
    joined, start = {}, 0
    for item in items:
        for name, indices in item.get("indices", {}).items():
            joined.setdefault(name, []).extend(start + index for index in indices)
        for name, values in item.get("values", {}).items():
            joined.setdefault(name, []).extend(values)
        start += len(item["documents"])
    for name, values in joined.items():
        kind = torch.long if any(name in item.get("indices", {}) for item in items) else None
        tensors[name] = torch.tensor(values, dtype=kind)
    batch = {name: tensor.to(device) for name, tensor in tensors.items()}
    return batch | {"attend": attend, "documents": start, "items": len(items)}


def lay_out_documents(items: list[dict], device):
    """All documents of the items end to end: (row, attend), see data.pack and model.Packed."""
    from model import Packed

    row = data.pack([document for item in items for document in item["documents"]])
    ends = torch.tensor(row["lengths"]).cumsum(0) - 1
    return row | {"ends": ends.tolist()}, Packed(row["lengths"], device)


def label_hidden(model, batch: dict):
    """Final hidden states where labelled tokens are predicted: (M, D)."""
    return model.hidden(batch["input_ids"], batch["attend"], batch["rows"])


def label_logprobs(model, batch: dict, hidden=None, *, temperature: float = 1.0):
    """log p of each labelled token, (M,)."""
    hidden = label_hidden(model, batch) if hidden is None else hidden
    fused = getattr(model, "fused_logprobs", None)  # extras/fast: without keeping logits
    found = fused and fused(hidden, batch["targets"], temperature)
    if found:
        return found[0]
    logits = model.lm_head(hidden).float() / temperature  # (M, V)
    return losses.gathered_logprobs(logits, batch["targets"])


def both_logprobs(model, batch: dict):
    """log p and log(1 - p) of each labelled token, (M,), (M,)."""
    hidden = label_hidden(model, batch)
    fused = getattr(model, "fused_logprobs", None)
    found = fused and fused(hidden, batch["targets"])
    if found:
        return found
    logits = model.lm_head(hidden)  # (M, V)
    return (losses.gathered_logprobs(logits, batch["targets"]),
            losses.complement_logprobs(logits, batch["targets"]))


def document_logprobs(model, batch: dict):
    """Sum of log-probabilities and number of labelled tokens of each document: (n,), (n,)."""
    logprobs = label_logprobs(model, batch)
    return losses.sequence_logprobs(logprobs, batch["sequence_ids"], batch["documents"])


def token_step(model, batch: dict, cfg) -> dict:
    """The step of every method that only imitates: cross-entropy of the labelled tokens."""
    return {"ce": losses.cross_entropy(label_logprobs(model, batch))[0]}


def sequence_step(model, batch: dict, cfg) -> dict:
    """-(1/N) sum_t log p(y_t) of each document: every response counts the same."""
    sums, lengths = document_logprobs(model, batch)  # (n,), (n,)
    return {"ce": -(sums / lengths.clamp(min=1)).sum()}
