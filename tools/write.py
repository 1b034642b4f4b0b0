"""Write training data with a model: instructions with answers, explanations, conversations.

    python -m tools.write self-instruct --seeds FILE --judge-url URL --judge-model NAME --out DIR
    python -m tools.write evol --seeds FILE --rounds 4 --judge self --model DIR --out DIR

RECIPE is self-instruct, evol, self-chat, explain or dialogue (docs/recipes.md). FILE
has rows {"instruction", "input"}, {"question"} or {"topic"}. examples.jsonl has what is kept, for
--examples of train.py --stage sft; written.jsonl everything that was written, and why it was kept
or not. The same command goes on where it was stopped, and asks a server nothing twice.
"""

import hashlib
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from extras.formats.checks import FILLED, TEXT, check, name_fields, read_object, refuse
from extras.formats.rows import read_rows
from extras.judges import ServerFlags, check_flags, client_from_flags
from extras.judges.dialogues import dialogue, self_chat
from extras.judges.evolving import evolve
from extras.judges.questions import describe_problem
from extras.judges.recipes import SURROGATE, Settings, answer_and_explain
from extras.judges.self_instruct import self_instruct
from extras.runtime.files import write_folder
from methods.flags import flag_names, spelled
from tools import make_main
from tools.meta_evaluate import MODEL, refuse_unread
from tools.paraphrase import open_local

RECIPES = {"self-instruct": self_instruct, "evol": evolve, "self-chat": self_chat,
           "explain": answer_and_explain, "dialogue": dialogue}
ONLY = {"rounds": "evol", "turns": "dialogue"}  # the recipe that reads a flag
JUDGED = ("self-instruct", "evol")  # recipes that ask for verdicts
RESULTS, SETTINGS = ("written.jsonl", "examples.jsonl"), "recipe.json"
SEED_NAMES = ("instruction", "question", "topic")


def write_data(cfg) -> None:
    """Carry out a recipe, write both files, and say what was kept and what was dropped."""
    check_choices(cfg)
    # Tasks are compared and shown without an input, as in the code of self-instruct.
    seeds = read_seeds(cfg.seeds, inputs=cfg.recipe != "self-instruct")
    settings = record_settings(cfg, seeds)
    if cfg.recipe != "self-instruct" and len(seeds) > cfg.number:  # which draws from all of them
        print(f"The first {cfg.number} of {len(seeds)} seeds are used (--number).")
        seeds = seeds[:cfg.number]
    rows = RECIPES[cfg.recipe](open_writer(cfg), seeds, cfg)
    examples = [row["example"] for row in rows if row["kept"] and "example" in row]
    files = {SETTINGS: [settings], "written.jsonl": rows, "examples.jsonl": examples}
    write_files(Path(cfg.out), files)
    report(cfg, rows, len(examples))


def check_choices(cfg) -> None:
    """Raise ValueError for a recipe that there is not, and for flags that nobody would read."""
    refuse(cfg.recipe not in RECIPES, f"there is no recipe {cfg.recipe!r:.40}. Give one of "
           f"{', '.join(RECIPES)}, as the first word.")
    for name, recipe in ONLY.items():
        refuse(cfg.recipe != recipe and getattr(cfg, name) != getattr(Settings, name),
               f"{spelled(name)} is for the recipe {recipe}. Leave it out.")
    if cfg.recipe not in JUDGED:
        refuse(cfg.verdict == "keyword", describe_problem("no_keyword", what=cfg.recipe))
        refuse(cfg.max_unparsed != ServerFlags.max_unparsed, "--max-unparsed is about verdicts, "
               f"and the recipe {cfg.recipe} asks for none. Leave it out.")
    refuse(len(cfg.adapter) > 1, "--adapter names several adapters, and one model writes. Give "
           "one at most.")
    read = {"judge", "out", "seed"} | flag_names(ServerFlags)
    if cfg.judge == "self":
        read |= MODEL
    refuse_unread(cfg, read)
    check_flags(cfg, asked=cfg.judge == "http")


def read_seeds(path, *, inputs: bool = True) -> list[str]:
    """The texts of a file of seeds, each once: an instruction, a question or a topic.

    inputs: an instruction is followed by its input. Raises ValueError that names the record.
    """
    found = []
    for row, where in read_rows(path, "seeds with an instruction, a question or a topic"):
        names = [name for name in SEED_NAMES if row.get(name) is not None]
        refuse(not names, f"{where} has the fields {name_fields(row)}. Expected instruction, "
               "question or topic.")
        text, input = row[names[0]], row.get("input") or ""
        check({names[0]: text, "input": input}, {names[0]: FILLED, "input": TEXT}, where)
        if input and inputs:
            text = f"{text}\n{input}"
        refuse(SURROGATE.search(text), f"{where} holds half a character (a lone surrogate). Mend "
               "it where it comes from.")
        found.append(text.strip())
    return list(dict.fromkeys(found))


def record_settings(cfg, seeds: list[str]) -> dict:
    """What says which run the files in --out are of. Raises ValueError if they are another's."""
    texts = hashlib.sha256(json.dumps(seeds).encode()).hexdigest()
    settings = {"recipe": cfg.recipe, "seed": cfg.seed, "seeds": texts}
    there = [name for name in RESULTS if Path(cfg.out, name).exists()]
    known = read_object(Path(cfg.out, SETTINGS))
    names = [name for name in settings if known.get(name) != settings[name]]
    refuse(there and names, f"{cfg.out} has the {' and '.join(there)} of a run with another "
           f"{', '.join(map(spelled, names))}. Choose another --out, or remove these files.")
    return settings


def open_writer(cfg) -> Callable:
    """The backend that writes: the model behind --judge-url, or --model itself."""
    if cfg.judge == "http":
        return client_from_flags(cfg, cfg.out).ask
    return open_local(cfg)[1]


def write_files(out: Path, files: dict[str, list[dict]]) -> None:
    """Write files of JSON Lines, {name: records}, in place of those that are there."""
    def save(part: Path) -> None:
        for name, records in files.items():
            (part / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def publish(part: Path) -> None:
        for name in files:
            os.replace(part / name, out / name)
    write_folder(out / ".tmp-written", save, publish)


def report(cfg, rows: list[dict], n: int) -> None:
    """Say what became of each step, and how to train. Raises ValueError if nothing is kept."""
    for step in dict.fromkeys(row["step"] for row in rows):
        reasons = [row["reason"] or "kept" for row in rows if row["step"] == step]
        print(f"{step}: {count_reasons(reasons)}")
    early = [row["ended"] for row in rows if row["kept"] and row.get("ended")]
    if early:
        print(f"ended early: {count_reasons(early)}")
    refuse(not n, f"nothing that was written is kept. {cfg.out}/written.jsonl says why. Use a "
           "larger model, give other or more seeds, or try another --seed.")
    path = shlex.quote(f"{cfg.out}/examples.jsonl")
    print(f"{n} kept as examples. Next:\n"
          f"  python train.py --stage sft --model DIR --examples {path}")


def count_reasons(reasons: list[str]) -> str:
    """How often each reason is given, the most frequent first; of an HTTP error only its number."""
    counts = Counter(re.sub(r"(?s)(http \d+).*", r"\1", reason) for reason in reasons)
    return ", ".join(f"{n} {reason}" for reason, n in counts.most_common())


run = make_main(
    write_data, __doc__, recipe=(None, "self-instruct, evol, self-chat, explain or dialogue"),
    seeds=(None, "file of instructions, questions or topics"),
    number=(Settings.number, "self-instruct: tasks to invent; else seeds used, at most (100)"),
    rounds=(Settings.rounds, "evol: rounds (4)"),
    turns=(Settings.turns, "dialogue: turns of each side (3)"),
    judge=(("http", "self"), "who writes: a server, or --model itself"),
    seed=(Settings.seed, "another seed draws other prompts and texts (0)"))


def main(argv: list[str] | None = None) -> int:
    """The program; the first word may name the recipe without --recipe."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--recipe")
    return run(words)


if __name__ == "__main__":
    sys.exit(main())
