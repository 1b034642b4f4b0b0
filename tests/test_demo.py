"""demo/: the tasks are what world.py writes, wordings are held out, the base fits and loads."""

import json
import sys
from pathlib import Path

import pytest

import data
from model import load_model

DEMO = Path(__file__).parent.parent / "demo"
sys.path.insert(0, str(DEMO))


@pytest.fixture(scope="module")
def tasks():
    found = data.read_tasks(DEMO / "tasks")
    data.add_paraphrases(DEMO / "paraphrases.json", found)
    return found


def test_the_task_files_are_what_the_world_writes(tmp_path):
    import world
    world.write_tasks(tmp_path)
    written = {p.name: p.read_bytes() for p in (tmp_path / "tasks").iterdir()}
    assert written == {p.name: p.read_bytes() for p in (DEMO / "tasks").iterdir()}


def test_size_of_the_world(tasks):
    assert len(tasks) >= 24
    several, by_input = 0, {}  # tasks whose answers mostly have several words
    for task in tasks:
        longer = sum(len(x.outputs[0].split()) > 1 for x in task.instances)
        several += longer > len(task.instances) / 2
    assert 3 * several >= len(tasks)
    for task in tasks:
        for x in task.instances:
            by_input.setdefault(x.input, set()).add(task.name)
    # only the instruction tells them apart
    assert all(len(names) >= 7 for names in by_input.values())


def test_wordings_are_many_in_all_styles_and_never_shared(tasks):
    styles = {"plain", "terse", "wordy", "polite", "after", "typo", "distractor"}
    owners = {}  # (kind of input, wording): the task and the split that have it
    for task in tasks:
        texts = [(split, w) for split in ("train", "dev", "test") for w in task.wordings[split]]
        assert len(texts) == 30
        kind = task.name.split("_")[0]
        for split, wording in texts:
            own = task.name, split
            assert owners.setdefault((kind, wording.text), own) == own
        for split in ("train", "dev", "test"):
            assert {w.style for w in task.wordings[split]} == styles


def test_every_split_has_enough_questions(tasks):
    for split in ("dev", "test"):
        rows = data.questions(tasks, split=split, wordings=8, per_task=12)
        assert len(rows) == 12 * len(tasks) and all(len(row["wordings"]) == 8 for row in rows)


def test_the_corpus_holds_no_input_of_the_task_files_and_no_held_out_wording(tasks):
    import make_base
    corpus = make_base.Corpus(3, {kind: 1 for shares, *_ in make_base.PHASES for kind in shares})
    inputs = {x.input for task in tasks for x in task.instances}
    held_out = {}
    for task in tasks:
        wordings = task.wordings["dev"] + task.wordings["test"]
        held_out[task.name] = {w.text.removeprefix("{input} . ") for w in wordings}
    for _ in range(300):
        text = "\n" + "".join(segment for segment, _ in corpus.draw())
        for row in inputs:
            for place in (f"\n{row} .", f"- {row} :", f"Input: {row}\n"):
                assert place not in text
    for task in tasks * 40:
        assert corpus.term(task.name) not in held_out[task.name]
        assert corpus.request(task.name) not in held_out[task.name]


def test_the_base_fits_and_loads():
    assert sum(p.stat().st_size for p in (DEMO / "base").iterdir()) < 8e6
    model = load_model(DEMO / "base")
    assert len(data.Tokenizer(DEMO / "base")) == model.config.vocab_size
    assert json.loads((DEMO / "base/config.json").read_text())["prompt_template"] == "plain"
