"""demo/real: the tasks are right, every split is large enough, and wordings are held out."""

import re
import sys
from difflib import SequenceMatcher
from pathlib import Path

import pytest

import data

REAL = Path(__file__).parent.parent / "demo/real"
sys.path.insert(0, str(REAL))
LABELS = {
    "continent": {"Africa", "Asia", "Europe", "North America", "South America", "Oceania"},
    "kind": {"animal", "plant", "food", "tool", "clothing", "vehicle"},
    "sentiment": {"positive", "negative"},
    "word_class": {"noun", "verb", "adjective"}}


@pytest.fixture(scope="module")
def tasks():
    found = data.read_tasks(REAL / "tasks")
    data.add_paraphrases(REAL / "paraphrases.json", found)
    return found


@pytest.fixture(scope="module")
def answers(tasks):
    """{task: {input: answer}}."""
    return {task.name: {x.input: x.outputs[0] for x in task.instances} for task in tasks}


def all_wordings(task):
    return [wording for split in ("train", "dev", "test") for wording in task.wordings[split]]


def test_the_task_files_are_what_the_program_writes(tmp_path):
    import make_tasks
    make_tasks.write_tasks(tmp_path)
    written = {p.name: p.read_bytes() for p in (tmp_path / "tasks").iterdir()}
    assert written == {p.name: p.read_bytes() for p in (REAL / "tasks").iterdir()}


def test_every_split_is_large_enough(tasks):
    assert len(tasks) >= 10
    for task in tasks:
        for split, least in {"train": 24, "pool": 40, "dev": 16, "test": 24}.items():
            assert len(data.split_instances(task, split)) >= least, (task.name, split)
    for split in ("dev", "test"):
        rows = data.questions(tasks, split=split, wordings=8, per_task=16)
        assert len(rows) == 16 * len(tasks) >= 150
        assert all(len(row["wordings"]) == 8 for row in rows)


def test_every_input_has_one_short_answer_and_is_in_one_split(tasks):
    for task in tasks:
        inputs = [x.input.lower() for x in task.instances]
        assert len(set(inputs)) == len(inputs) >= 160
        for x in task.instances:
            assert len(x.outputs) == 1 and 1 <= len(x.outputs[0].split()) <= 2
        names = [x.id for split in data.SHARES for x in data.split_instances(task, split)]
        assert sorted(names) == sorted(x.id for x in task.instances)


def test_closed_sets_of_labels(tasks):
    """Every definition and wording names all of the labels, so that no answer has to be guessed."""
    assert {task.name for task in tasks if task.labels} == LABELS.keys()
    for task in tasks:
        labels = LABELS.get(task.name, set())
        assert set(task.labels or []) == labels
        for text in [task.definition] + [wording.text for wording in all_wordings(task)]:
            for label in labels:
                assert re.search(rf"\b{label}\b", text), (task.name, label, text)


def test_definitions_and_outputs_agree(tasks):
    for task in tasks:
        assert task.definition.endswith(".") and "{input}" not in task.definition
        lower = all(x.outputs[0] == x.outputs[0].lower() for x in task.instances)
        assert lower == (task.name != "continent")


def test_wordings_are_many_in_all_styles_and_never_shared(tasks):
    owners = {}  # the letters of a wording: the task and the split that have it
    for task in tasks:
        assert [len(task.wordings[split]) for split in ("train", "dev", "test")] == [14, 8, 8]
        styles = [[w.style for w in task.wordings[split]] for split in ("train", "dev", "test")]
        assert styles[1] == styles[2] and set(styles[0]) == set(styles[1])
        for wording in all_wordings(task) + [data.Wording(task.definition)]:
            letters = re.sub(r"\W+", " ", wording.text.lower()).strip()
            assert letters not in owners, (task.name, wording.text, owners[letters])
            owners[letters] = task.name
    assert len(owners) == 31 * len(tasks)


def test_the_first_wordings_differ_in_style(tasks):
    """--wordings 5 takes the first five."""
    for task in tasks:
        for split in ("train", "dev", "test"):
            styles = [wording.style for wording in task.wordings[split][:8]]
            assert len(set(styles)) == 8


def test_wordings_place_the_input_once_or_not_at_all(tasks):
    for task in tasks:
        for wording in all_wordings(task):
            assert wording.text.count("{input}") == (wording.style == "after"), wording.text
            assert not re.search(r"[{}]", wording.text.replace("{input}", "")), wording.text
            assert wording.text == wording.text.strip() and "  " not in wording.text


def test_held_out_wordings_are_no_small_edits_of_others(tasks):
    for task in tasks:
        known = [wording.text for wording in task.wordings["train"]] + [task.definition]
        for split in ("dev", "test"):
            for wording in task.wordings[split]:
                words = wording.text.lower().split()
                for text in known:
                    same = SequenceMatcher(None, words, text.lower().split()).ratio()
                    assert same < 0.6, (task.name, wording.text, text)
            known += [wording.text for wording in task.wordings[split]]


def test_spelling_by_hand(answers):
    for task, given, wanted in (
            ("plural", "city", "cities"), ("plural", "boy", "boys"), ("plural", "box", "boxes"),
            ("plural", "church", "churches"), ("plural", "child", "children"),
            ("past", "stop", "stopped"), ("past", "bake", "baked"), ("past", "cry", "cried"),
            ("past", "enjoy", "enjoyed"), ("past", "go", "went"),
            ("comparative", "big", "bigger"), ("comparative", "wide", "wider"),
            ("comparative", "happy", "happier"), ("comparative", "good", "better"),
            ("comparative", "famous", "more famous")):
        assert answers[task][given] == wanted


def test_numbers_are_right(answers):
    for text, answer in answers["sum"].items():
        assert sum(map(int, text.split(", "))) == int(answer)
    for text, answer in answers["largest"].items():
        assert max(map(int, text.split(", "))) == int(answer)
    for text, answer in (("seventy", "70"), ("nine hundred and seventy-two", "972"),
                         ("fifteen thousand five hundred and thirty-seven", "15537"),
                         ("eighty-five thousand nine hundred", "85900"),
                         ("eight thousand and nineteen", "8019")):
        assert answers["digits"][text] == answer


def test_labels_are_balanced(tasks):
    """Continents differ in size; the other closed sets have about as many of each label."""
    for task in tasks:
        outputs = [x.outputs[0] for x in task.instances]
        for label in set(outputs) & LABELS.get(task.name, set()):
            share = outputs.count(label) * len(LABELS[task.name]) / len(outputs)
            assert 0.9 < share < 1.1 or task.name == "continent", (task.name, label)
