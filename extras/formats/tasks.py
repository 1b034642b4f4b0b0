"""Tasks and wordings in other people's layouts, with errors that name the file and the record."""

import difflib
import re
from pathlib import Path

import data
from data import Instance, Task, Wording, as_list, read_json, split_wordings
from extras import tomllib
from extras.formats.checks import FILLED, TEXT, check, read_object, reading, refuse, show
from extras.formats.rows import read_rows

TEXTS = "a string or a list of strings", lambda value: value != [] and all(
    isinstance(text, str) for text in as_list(value))
TASK = {"Definition": TEXTS, "Instances": ("a list", lambda value: isinstance(value, list))}
SPLITS = ("train", "dev", "test")
QUESTION_FILES = (".jsonl", ".csv", ".tsv", ".parquet")


def read_tasks(path) -> list[Task]:
    """The tasks of a file of Super-NaturalInstructions, of a folder of them, of the folder of
    instruction induction (annotations/ and execute/), or of a file of plain questions. Raises
    ValueError."""
    path = Path(path)
    if path.suffix.lower() in QUESTION_FILES and path.is_file():
        return read_plain_questions(path)
    if (path / "annotations").is_dir() and (path / "execute").is_dir():
        return [read_induction(path, file.name) for file in sorted(path.glob("annotations/*.json"))]
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    refuse(not files, f"no task files at {path}. Give a folder of *.json files in the schema of "
           "Super-NaturalInstructions, or one such file.")
    return [read_task(file) for file in files]


def read_task(path: Path) -> Task:
    """A Super-NaturalInstructions file in any of its ages: texts or lists of texts, id or none."""
    with open(path, "rb") as file:
        whole = file.readline().rstrip().endswith(b"}")
        refuse(whole and file.read(100).strip(), f"{path} is JSON Lines, and a task is one "
               "object with Definition and Instances. Rows of whole prompts (full_prompt and "
               "output, or prompt and completion) are read by --stage sft --examples FILE; plain "
               "questions are read from a FILE.jsonl.")
    record, instances = read_object(path), []
    check(record, TASK, f"{path}")
    refuse(not record["Instances"], f"{path} has no instances. Give it some, or remove the file.")
    for number, row in enumerate(record["Instances"]):
        check(row, {"input": TEXTS, "output": TEXTS}, f"{path}, record {number}")
        outputs = tuple(text.strip() for text in as_list(row["output"]))
        name = str(row.get("id", f"{path.stem}-{number}"))
        instances.append(Instance(name, as_list(row["input"])[0].strip(), outputs))
    return Task(path.stem, " ".join(as_list(record["Definition"])).strip(), instances)


# ----- Plain questions -----
def read_plain_questions(path: Path) -> list[Task]:
    """A task for each row {"question", "id", "target", "wordings"} of a file; only the first is
    needed. Its one instance has no input. The wordings are held out for both splits.
    """
    tasks, places = [], {}
    for number, (row, where) in enumerate(read_rows(path, "plain questions")):
        check(row, {"question": FILLED}, where)
        name = f"{path.stem}-{number}"
        if row.get("id") not in (None, ""):
            name = str(row["id"])
        refuse(name in places, f"{where}: question {show(name)} stands in {places.get(name)}, too. "
               "Give each an id of its own.")
        places[name] = where
        targets = []
        given = [] if row.get("target") is None else as_list(row["target"])
        for text in given:
            refuse(type(text) not in (str, int, float), f"{where}: target is {show(text)}. "
                   "Expected a text, or a list of texts.")
            targets.append(str(text).strip())
        task = Task(name, row["question"].strip(), [Instance(name, "", tuple(targets))])
        if "wordings" in row:
            held = read_wordings(row["wordings"], where)
            check_places([wording.text for wording in held], task, where)
            task.wordings = {"dev": held, "test": held}
        tasks.append(task)
    return tasks


def is_plain(task: Task) -> bool:
    """Whether a task is one question without an input."""
    return len(task.instances) == 1 and not task.instances[0].input


def questions(tasks: list[Task], *, split: str, wordings: int, per_task: int) -> list[dict]:
    """`data.questions`, and the plain ones. Of these, wordings alone can be held out."""
    found = []
    for task in tasks:
        held = [Wording(task.definition)]
        if wordings:
            held = task.wordings.get(split, [])[:wordings]
        if not is_plain(task):
            found += data.questions([task], split=split, wordings=wordings, per_task=per_task)
        elif len(held) > 1 or not wordings:
            instance = task.instances[0]
            found.append({"task": task.name, "id": instance.id, "instruction": task.definition,
                          "input": "", "targets": list(instance.outputs), "labels": None,
                          "wordings": [wording.text for wording in held],
                          "styles": [wording.style for wording in held]})
    return found


def read_induction(folder: Path, name: str) -> Task:
    """A task of instruction induction: human wordings, the first the definition, and instances."""
    annotations, execute = folder / "annotations" / name, folder / "execute" / name
    with reading(annotations, "human instructions under annotations"):
        texts = [text.strip() for text in read_json(annotations)["annotations"]]
        definition, *others = dict.fromkeys(filter(None, texts))
        task = Task(execute.stem, definition, [], split_wordings(execute.stem, others))
    with reading(execute, "examples by number"):
        for number, row in read_json(execute)["examples"].items():
            if "cause" in row:  # two sentences in either order; the cause is asked for
                first, second = sorted((row["cause"], row["effect"]))
                input, outputs = f"Sentence 1: {first} Sentence 2: {second}", [row["cause"]]
            elif "items" in row:
                input = ", ".join(row["items"])
                outputs = [row["concept"], *row["all_common_concepts"]]
            else:
                more = row.get("other_rhymes", []) + row.get("possible_translations", [])
                input, outputs = str(row["input"]), [row["output"], *more]
            outputs = tuple(dict.fromkeys(map(str, outputs)))
            task.instances.append(Instance(f"{task.name}-{number}", input, outputs))
    return task


def add_paraphrases(path, tasks: list[Task]) -> None:
    """Read {task: [wording, ...]} or {task: {split: [wording, ...]}} into tasks.

    A wording is a text or {"text", "style"}. Lists are split by `split_wordings`. The human
    paraphrases of Tk-Instruct ({task: {"paraphrases": [...]}}) are read too. Wordings that are
    said twice, or equal the definition, are dropped. Raises ValueError.
    """
    by_name = {task.name: task for task in tasks}
    for name, given in read_object(Path(path)).items():
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, 1)
            advice = f"Did you mean {near[0]!r}?" if near else "Remove them, or add the task."
            raise ValueError(f"{path} has wordings for task {name!r}, which is not among the "
                             f"{len(tasks)} tasks. {advice}")
        task, where = by_name[name], f"{path}, task {name!r}"
        if isinstance(given, dict) and "paraphrases" in given:
            given = given["paraphrases"]
        if isinstance(given, list):
            texts = [wording.text for wording in read_wordings(given, where)]
            check_places(texts, task, where)
            pairs = zip(given, texts, strict=True)
            others = [row for row, text in pairs if text != task.definition]
            task.wordings = split_wordings(name, others)
            continue
        refuse(not isinstance(given, dict) or given.keys() - set(SPLITS), f"{where} is "
               f"{show(given)}. Expected a list of wordings, or the lists train, dev and test.")
        seen = {task.definition}
        for split in SPLITS:
            task.wordings[split] = []
            wordings = read_wordings(given.get(split, []), f"{where}, {split}")
            check_places([wording.text for wording in wordings], task, where)
            for wording in wordings:
                if wording.text not in seen:
                    task.wordings[split].append(wording)
                seen.add(wording.text)


def read_wordings(rows, where: str) -> list[Wording]:
    """A list of texts or {"text", "style"} as wordings. Raises ValueError."""
    refuse(not isinstance(rows, list), f"{where} is {show(rows)}. Expected a list of wordings.")
    found = []
    for number, row in enumerate(rows):
        row = row if isinstance(row, dict) else {"text": row}
        row = {"style": ""} | row
        check(row, {"text": FILLED, "style": TEXT}, f"{where}, wording {number}")
        found.append(Wording(row["text"], row["style"]))
    return found


def check_places(texts: list[str], task: Task, where: str) -> None:
    """Raise ValueError for a wording with a place other than {input}: it would stay as it is.

    What stands in the task's own definition is text.
    """
    for text in texts:
        for name in re.findall(r"\{(?:[A-Za-z_]\w*|\d*)\}", text):
            refuse(name != "{input}" and name not in task.definition, f"{where}: the wording "
                   f"{show(text)} holds {name}, which is no place that is filled. Write {{input}} "
                   "where the input goes, or leave it out: the input then follows the wording.")


def read_frames() -> dict[str, list[str]]:
    """{split: sentences with {definition} in them}."""
    return tomllib.loads(Path(__file__).with_name("frames.toml").read_text(encoding="utf-8"))


def frame_task(task: Task, number: int) -> list[Wording]:
    """The task's own words in the first sentences of frames.toml, each a style of its own."""
    frames = [text for texts in read_frames().values() for text in texts]
    if is_plain(task):  # there is no input
        frames = [text for text in frames if "{input}" not in text and " below" not in text]
    refuse(number > len(frames), f"--number {number} is more than the {len(frames)} sentences of "
           "extras/formats/frames.toml. Give less, or --judge http.")
    return [Wording(text.replace("{definition}", task.definition),
                    text.replace("{definition}", "...")) for text in frames[:number]]


def frame_bare_tasks(tasks: list[Task]) -> str:
    """Give tasks without wordings some made of frames.toml; returns a sentence that says so, or "".

    They are a weak stand-in for paraphrases, since the definition's own words stay.
    """
    frames = read_frames()
    bare = [task for task in tasks if not any(task.wordings.values())]
    for task in bare:
        for split, texts in frames.items():
            framed = [text.replace("{definition}", task.definition) for text in texts]
            task.wordings[split] = [Wording(text, "frame") for text in framed]
    return (f"{len(bare)} of {len(tasks)} tasks have no paraphrases: their definitions are set "
            "into the sentences of extras/formats/frames.toml. Real paraphrases (--paraphrases "
            "FILE) measure more.") if bare else ""
