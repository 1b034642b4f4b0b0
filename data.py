"""From a task and a wording to token ids and labels: tasks, wordings, splits, templates, records.

A *task* has a definition (its instruction) and instances (inputs with reference outputs). A
*wording* is another way to put the definition into words. A *question* is one input under several
held-out wordings, asked when consistency is measured.

A *document* is what the model reads: the token ids of a prompt and its response, with labels on the
response only. `input_ids` and `labels` are aligned; the shift by one position happens in losses.py.
A *record* is one line of a JSON Lines file in a run folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

IGNORE_INDEX = -100

# ----- Tokenizer -----
class Tokenizer:
    """A sentencepiece model as LLaMA uses it: BOS before a prompt, EOS behind a response.

    extras/formats has a subclass that reads added tokens and other files. Raises ValueError if the
    folder has no tokenizer.model.
    """

    def __init__(self, path):
        import sentencepiece

        self.path = Path(path)
        if self.path.is_dir():
            self.path = self.path / "tokenizer.model"
        if not self.path.is_file():
            raise ValueError(f"no tokenizer at {self.path}. Give one (--plain reads no others).")
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        self.control = {i for i in range(len(self.model)) if self.model.is_control(i)}

    def __len__(self) -> int:
        return len(self.model)

    def encode_prompt(self, prompt: str) -> list[int]:
        """BOS and the ids of the prompt."""
        return [self.bos_id] + self.model.encode(str(prompt))

    def encode_continuation(self, text: str, tail: str = "\n") -> list[int]:
        """The ids of `text` behind a prompt that ends in `tail`: those of the joint encoding.

        sentencepiece puts a space before whatever it encodes, so `tail` is encoded along and its
        ids are dropped. Where the two would fuse into one piece, as ":" and ")" do, another tail is
        taken that nothing fuses with.
        """
        for before in (tail, "\n", "\x01"):
            head, ids = self.model.encode(before), self.model.encode(before + text)
            if ids[:len(head)] == head:
                return ids[len(head):]
        raise ValueError(f"{self.path} makes one piece of a line break and {text[:20]!r}. Use the "
                         "tokenizer of a LLaMA-family model.")

    def decode(self, ids: list[int]) -> str:
        """The text of `ids` without control tokens and surrounding blanks."""
        return self.model.decode([i for i in ids if i not in self.control]).strip()

    def stop_ids(self, prompts: list[str]) -> list[int]:
        """The ids that end a response to these prompts."""
        return [self.eos_id]


# ----- Prompt templates -----
@dataclass(frozen=True)
class Template:
    """How an instruction and an input become a prompt."""

    with_input: str
    without_input: str
    judged_with_input: str  # the same with a judgment that the response should match
    judged_without_input: str
    separator: str = ""  # between prompt and response; learnt with the response

    @property
    def tail(self) -> str:
        """The last character of every prompt; responses are encoded behind it."""
        return self.with_input[-1]

    def render(self, instruction: str, input: str = "", judgment: str | None = None, *,
               literal: bool = False) -> str:
        """The prompt. A task's wording may place the input itself, with {input}.

        In other people's texts (`literal`), {input} is just text. All places are filled in one
        pass, so nothing that is filled in is searched again.
        """
        if "{input}" in instruction and not literal:
            instruction, input = instruction.replace("{input}", input), ""
        if judgment is None:
            text = self.with_input if input else self.without_input
        else:
            text = self.judged_with_input if input else self.judged_without_input
        values = {"instruction": instruction, "input": input, "judgment": judgment}
        return re.sub(r"\{(\w+)\}", lambda place: values[place[1]], text)

    def encode_response(self, tokenizer: Tokenizer, response: str) -> list[int]:
        """The ids of a response with EOS, the same behind any prompt of this template."""
        ids = tokenizer.encode_continuation(self.separator + response, self.tail)
        return ids + [tokenizer.eos_id]


def alpaca(ending: str) -> Template:
    """Stanford Alpaca's wording (2023), and CUT's form of it with a judgment (its Figure 5)."""
    paired = ", paired with an input that provides further context"
    intro = "Below is an instruction that describes a task{paired}. Write a response {wanted}.\n\n"
    plain = "that appropriately completes the request"
    judged = "to the instruction and the response should match the corresponding judgment"
    instruction, input = "### Instruction:\n{instruction}\n\n", "### Input:\n{input}\n\n"
    judgment, response = "### Judgment:\n{judgment}\n\n", "### Response:" + ending
    return Template(
        intro.format(paired=paired, wanted=plain) + instruction + input + response,
        intro.format(paired="", wanted=plain) + instruction + response,
        intro.format(paired=paired, wanted=judged) + instruction + input + judgment + response,
        intro.format(paired="", wanted=judged) + instruction + judgment + response)


TEMPLATES = {
    "alpaca": alpaca("\n"),  # as alpaca-lora and CUT have it: a line break behind the colon
    "alpaca-stanford": alpaca(""),
    "plain": Template(
        "### Instruction: {instruction}\n### Input: {input}\n### Response:",
        "### Instruction: {instruction}\n### Response:",
        "### Instruction: {instruction}\n### Input: {input}\n### Judgment: {judgment}\n"
        "### Response:",
        "### Instruction: {instruction}\n### Judgment: {judgment}\n### Response:",
        separator=" "),
}


def find_template(name: str, *folders) -> Template:
    """TEMPLATES[name]. Raises ValueError for others; extras/formats looks into the folders, too."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r:.60}. Templates: {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


# ----- Tasks and wordings -----
@dataclass(frozen=True)
class Instance:
    """One input and its reference outputs."""

    id: str
    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Wording:
    """One way to put a task's instruction into words."""

    text: str
    style: str = ""


@dataclass
class Task:
    """A task: its original instruction, instances, and other wordings by split."""

    name: str
    definition: str
    instances: list[Instance]
    wordings: dict[str, list[Wording]] = field(default_factory=dict)  # "train", "dev", "test"

    @property
    def labels(self) -> list[str] | None:
        """The closed set of outputs of a classification task; None if answers are free text.

        Outputs that repeat: at most 50 of at most six words, each found twice or more on average.
        """
        outputs = [output for instance in self.instances for output in instance.outputs]
        labels = sorted(set(outputs))
        pair = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff]{2}"  # no spaces: a word
        short = all(len(re.sub(pair, "x ", label).split()) <= 6 for label in labels)
        closed = len(labels) <= 50 and 2 * len(labels) <= len(outputs) and short
        return labels if closed else None


def read_json(path):
    """The JSON in a file. Raises ValueError that names file, line and column."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON in UTF-8: {error}.") from None


def read_tasks(path) -> list[Task]:
    """The tasks of a Super-NaturalInstructions file, or of a folder of such files."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    if not files:
        raise ValueError(f"no task files at {path}. Give a folder of *.json files in the schema of "
                         "Super-NaturalInstructions, or one such file.")
    return [read_task(file) for file in files]


def read_task(path: Path) -> Task:
    """One Super-NaturalInstructions file; its texts may be strings or lists of strings."""
    record, instances = read_json(path), []
    if not isinstance(record, dict) or not {"Definition", "Instances"} <= record.keys():
        raise ValueError(f"{path} lacks Definition or Instances; expected a file of Super-NI.")
    for number, row in enumerate(record["Instances"]):
        name = str(row.get("id", f"{path.stem}-{number}"))
        outputs = tuple(text.strip() for text in as_list(row["output"]))
        instances.append(Instance(name, as_list(row["input"])[0].strip(), outputs))
    return Task(path.stem, " ".join(as_list(record["Definition"])).strip(), instances)


def as_list(value) -> list:
    """A list as it is, anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def hash_order(names: list[str], salt: str) -> list[str]:
    """The names in an order that depends on each name and the salt alone, not on the others."""
    def digest(name):
        return hashlib.sha256(f"{salt}/{name}".encode(errors="surrogatepass")).digest()
    return sorted(names, key=digest)


def split_wordings(task: str, rows: list) -> dict[str, list[Wording]]:
    """Strings or {"text", "style"} in three splits by a hash of the text: dev and test a quarter.

    Held-out splits have at least two wordings. Fewer than five in all are all for training.
    """
    by_text = {wording.text: wording for wording in map(as_wording, rows)}
    order = [by_text[text] for text in hash_order(list(by_text), f"wordings/{task}")]
    held = max(2, len(order) // 4) if len(order) >= 5 else 0
    return {"test": order[:held], "dev": order[held:2 * held], "train": order[2 * held:]}


def add_paraphrases(path, tasks: list[Task]) -> None:
    """Read {task: [wording, ...]} or {task: {split: [wording, ...]}} into tasks.

    A wording is a string or {"text", "style"}. Lists are split by `split_wordings`. Duplicates, and
    wordings equal to the definition, are dropped.
    """
    by_name = {task.name: task for task in tasks}
    for name, given in read_json(path).items():
        if name not in by_name:
            raise ValueError(f"{path} has wordings for task {name!r}, which is not among the "
                             f"{len(tasks)} tasks. Remove them, or add the task.")
        task = by_name[name]
        if isinstance(given, list):
            others = [row for row in given if as_wording(row).text != task.definition]
            task.wordings = split_wordings(name, others)
            continue
        if given.keys() - {"train", "dev", "test"}:
            raise ValueError(f"{path}, task {name}: expected the splits train, dev and test.")
        seen = {task.definition}
        for split in ("train", "dev", "test"):
            task.wordings[split] = []
            for wording in map(as_wording, given.get(split, [])):
                if wording.text not in seen:
                    task.wordings[split].append(wording)
                seen.add(wording.text)


def as_wording(row) -> Wording:
    """A string, or {"text", "style"}, as a Wording."""
    if isinstance(row, str):
        return Wording(row)
    return Wording(row["text"], row.get("style", ""))


SHARES = {"train": (0, 30), "pool": (30, 60), "dev": (60, 75), "test": (75, 100)}  # percent


def split_instances(task: Task, split: str) -> list[Instance]:
    """The instances of one of four disjoint splits; "pool" is for sampled candidates.

    By a hash of the input, so that tasks that share inputs share the split, whatever their order.
    """
    low, high = SHARES[split]
    found = []
    for instance in task.instances:
        text = f"instances/{instance.input}".encode(errors="surrogatepass")
        bucket = int(hashlib.sha256(text).hexdigest()[:8], 16) % 100
        if low <= bucket < high:
            found.append(instance)
    return found


# ----- Examples and questions -----
def instruction_examples(tasks: list[Task], *, wordings: int, augment: str, per_task: int,
                         seed: int) -> list[dict]:
    """Instruction examples {task, id, instruction, wording, input, output}   arXiv 2403.14221.

    `wordings` = 0 gives the original instruction alone (SFT), k > 0 adds k training wordings
    (SFT(IA)). `augment` "assign" keeps the number of examples: wordings are dealt to the instances
    in turn. "product" gives each instance all of them.
    """
    examples = []
    for task in tasks:
        instances = split_instances(task, "train")
        random.Random(f"{seed}/{task.name}").shuffle(instances)  # some files are sorted by label
        texts = [task.definition] + [w.text for w in task.wordings.get("train", [])[:wordings]]
        for number, instance in enumerate(instances[:per_task]):
            chosen = texts if augment == "product" else [texts[number % len(texts)]]
            for text in chosen:
                examples.append({"task": task.name, "id": instance.id, "wording": text,
                                 "instruction": task.definition, "input": instance.input,
                                 "output": instance.outputs[0]})
    return examples


def questions(tasks: list[Task], *, split: str, wordings: int, per_task: int) -> list[dict]:
    """Held-out questions: one held-out instance under several held-out wordings of its task.

    `wordings` = 0 asks with the original instruction alone. Tasks with fewer than two held-out
    wordings are left out, because consistency needs two.
    """
    found = []
    for task in tasks:
        held = [Wording(task.definition)]
        if wordings:
            held = task.wordings.get(split, [])[:wordings]
            if len(held) < 2:
                continue
        by_id = {instance.id: instance for instance in split_instances(task, split)}
        for name in hash_order(list(by_id), "questions")[:per_task]:
            instance = by_id[name]
            found.append({"task": task.name, "id": name, "instruction": task.definition,
                          "input": instance.input, "targets": list(instance.outputs),
                          "labels": task.labels, "wordings": [w.text for w in held],
                          "styles": [w.style for w in held]})
    return found


# ----- Documents and batches -----
def encode_document(tokenizer: Tokenizer, segments: list[tuple], *, max_len: int) -> dict:
    """[(text, is_label), ...] as one document, with labels on the marked segments only."""
    ids = tokenizer.encode_prompt("")  # BOS, unless the tokenizer wants none
    labels, tail = [IGNORE_INDEX] * len(ids), ""
    for text, is_label in segments:
        if tail:
            piece = tokenizer.encode_continuation(text, tail)
        else:
            piece = tokenizer.encode_prompt(text)[len(ids):]
        ids += piece
        labels += piece if is_label else [IGNORE_INDEX] * len(piece)
        tail = text[-1:] or tail
    truncated = int(len(ids) > max_len)
    return {"input_ids": ids[:max_len], "labels": labels[:max_len], "truncated": truncated}


def encode_example(tokenizer: Tokenizer, template: Template, prompt: str, response, *,
                   max_len: int) -> dict:
    """Prompt and response (text, or ids that a model sampled) as a document.

    A long prompt is truncated from the left. Raises ValueError if the response alone fills max_len.
    """
    ids, tokens = tokenizer.encode_prompt(prompt), response
    if isinstance(response, str):
        tokens = template.encode_response(tokenizer, response)
    room = max_len - len(tokens)
    if room < 2:
        raise ValueError(f"--max-len {max_len} leaves no room for a response of {len(tokens)} "
                         f"tokens and a prompt; raise it to at least {len(tokens) + len(ids)}.")
    kept = truncate_left(ids, room)
    return {"input_ids": kept + tokens, "labels": [IGNORE_INDEX] * len(kept) + tokens,
            "truncated": int(len(ids) > room)}


def truncate_left(ids: list[int], room: int) -> list[int]:
    """Prompt ids that fit: BOS and the right end, on which the response depends most."""
    if len(ids) <= room:
        return ids
    return ids[:1] + ids[len(ids) - room + 1:]


def pack(documents: list[dict]) -> dict[str, list[int]]:
    """Documents laid end to end: "input_ids", "labels" and "sequence_ids" (N,), and "lengths".

    N: their tokens in all; there is no padding. sequence_ids names the document of each token.
    """
    row = {"input_ids": [], "labels": [], "sequence_ids": [], "lengths": []}
    for number, document in enumerate(documents):
        length = len(document["input_ids"])
        row["input_ids"] += document["input_ids"]
        row["labels"] += document["labels"]
        row["sequence_ids"] += [number] * length
        row["lengths"].append(length)
    return row


def micro_batches(items: list[dict], max_tokens: int) -> list[list[dict]]:
    """Split a step's items {"documents": [...]} into parts of at most `max_tokens` tokens.

    An item is never torn; one that is larger gets a part of its own.
    """
    parts, size = [[]], 0
    for item in items:
        tokens = sum(len(document["input_ids"]) for document in item["documents"])
        if parts[-1] and size + tokens > max_tokens:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += tokens
    return parts


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which of n items a step trains on, from seed and step alone: a new order every epoch."""
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, n)
        indices.append(permutation(n, seed, epoch)[offset])
    return indices


@functools.lru_cache(maxsize=2)  # a step may straddle two epochs
def permutation(n: int, seed: int, epoch: int) -> list[int]:
    """The numbers below n in the order of an epoch."""
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


# ----- Records: JSON Lines -----
def append_records(path, records: list[dict]) -> None:
    """Append whole lines and sync them, so that a stopped run keeps what it collected."""
    lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def read_records(path) -> list[dict]:
    """The records of a file, or [] where there is none. Raises ValueError that names the line."""
    records, path = [], Path(path)
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}. Fix or delete that "
                             "line.") from None
    return records
