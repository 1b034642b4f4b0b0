"""demo/: the shipped tasks are what world.py writes, wordings are held out, the base checkpoint fits and loads."""

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
    found = data.load_tasks(DEMO / "tasks")
    data.load_paraphrases(DEMO / "paraphrases.json", found)
    return found


def test_the_task_files_are_what_the_world_writes(tmp_path):
    import world
    world.write_tasks(tmp_path)
    written = {p.name: p.read_bytes() for p in (tmp_path / "tasks").iterdir()}
    assert written == {p.name: p.read_bytes() for p in (DEMO / "tasks").iterdir()}


def test_size_of_the_world(tasks):
    assert len(tasks) >= 24
    several = [t for t in tasks if sum(len(x.outputs[0].split()) > 1 for x in t.instances) > len(t.instances) / 2]
    assert 3 * len(several) >= len(tasks)
    by_input = {}
    for task in tasks:
        for x in task.instances:
            by_input.setdefault(x.input, set()).add(task.name)
    assert all(len(names) >= 7 for names in by_input.values())          # only the instruction tells them apart


def test_wordings_are_many_in_all_styles_and_never_shared(tasks):
    everywhere = {}
    for task in tasks:
        texts = [(split, w) for split in ("train", "dev", "test") for w in task.wordings[split]]
        assert len(texts) == 30
        for split, wording in texts:
            assert everywhere.setdefault((task.name.split("_")[0], wording.text), (task.name, split)) == (task.name, split)
        for split in ("train", "dev", "test"):
            assert {w.style for w in task.wordings[split]} == {"plain", "terse", "wordy", "polite", "after", "typo", "distractor"}


def test_every_split_has_enough_questions(tasks):
    for split in ("dev", "test"):
        rows = data.questions(tasks, split=split, wordings=8, per_task=12)
        assert len(rows) == 12 * len(tasks) and all(len(row["wordings"]) == 8 for row in rows)


def test_the_corpus_holds_no_input_of_the_task_files_and_no_held_out_wording(tasks):
    import make_base
    corpus = make_base.Corpus(3, {kind: 1 for shares, *_ in make_base.PHASES for kind in shares})
    inputs = {x.input for task in tasks for x in task.instances}
    held_out = {task.name: {w.text.removeprefix("{input} . ") for split in ("dev", "test") for w in task.wordings[split]} for task in tasks}
    for _ in range(300):
        text = "\n" + "".join(segment for segment, _ in corpus.draw())
        assert not any(f"\n{row} ." in text or f"- {row} :" in text or f"Input: {row}\n" in text for row in inputs)
    for task in tasks * 40:
        assert corpus.term(task.name) not in held_out[task.name]
        assert corpus.request(task.name.split("_")[0], task.name) not in held_out[task.name]


def test_the_base_fits_and_loads():
    assert sum(p.stat().st_size for p in (DEMO / "base").iterdir()) < 8e6
    model = load_model(DEMO / "base")
    assert len(data.Tokenizer(DEMO / "base")) == model.config.vocab_size
    assert json.loads((DEMO / "base/config.json").read_text())["prompt_template"] == "plain"
