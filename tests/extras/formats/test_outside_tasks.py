"""Tasks and wordings in other people's layouts."""

import json
import random
import re

import pytest

import data
from data import Task, Wording
from extras.formats import add_paraphrases, frame_bare_tasks, questions, read_tasks


def instance(input="a b", output=("x",), **more):
    return {"input": input, "output": list(output), **more}


@pytest.mark.parametrize("definition", ["Do it.", ["Do it."]])
@pytest.mark.parametrize("output", ["x", ["x"], ["x", "y"]])
def test_all_ages_of_the_schema(definition, output, write, tmp_path):
    rows = [{"input": " a ", "output": output}, {"input": ["b"], "output": "z", "id": 7}]
    (task,) = read_tasks(write(tmp_path / "t.json", {"Definition": definition, "Instances": rows}))
    assert task.definition == "Do it." and task.name == "t"
    outputs = ("x", "y") if output == ["x", "y"] else ("x",)
    assert task.instances == [data.Instance("t-0", "a", outputs), data.Instance("7", "b", ("z",))]


@pytest.mark.parametrize("record, sentence", [
    ([], "holds a list"), ({"Instances": []}, 'field "Definition" is missing; found: Instances'),
    ({"Definition": "d", "Instances": []}, "has no instances"),
    ({"Definition": "d"}, 'field "Instances" is missing'),
    ({"Definition": 3, "Instances": [instance()]}, 'field "Definition" is 3'),
    ({"Definition": "d", "Instances": [instance(), {"input": "a"}]},
     r'record 1: field "output" is missing; found: input. Expected a string or a list of strings.'),
    ({"Definition": "d", "Instances": [instance(output=[1])]}, 'field "output" is'),
    ({"Definition": "d", "Instances": [instance(output=[])]}, 'field "output" is'),
    ({"Definition": "d", "Instances": [3]}, "record 0 is 3")])
def test_a_bad_task_file_is_named_with_its_record(record, sentence, write, tmp_path):
    with pytest.raises(ValueError, match=sentence) as caught:
        read_tasks(write(tmp_path / "t.json", record))
    assert str(tmp_path / "t.json") in str(caught.value)


def test_json_errors_name_file_line_and_column(tmp_path):
    (tmp_path / "t.json").write_text('{"Definition": "d",\n oops}')
    with pytest.raises(ValueError, match=r"t.json is not JSON.*: .* line 2 column 2"):
        read_tasks(tmp_path)
    with pytest.raises(ValueError, match="no task files at"):
        read_tasks(tmp_path / "none")


def test_instruction_induction(write, tmp_path):
    for name in ("annotations", "execute"):
        (tmp_path / name).mkdir()
    texts = ["do it ", "", *(f"wording {k}" for k in range(9)), "do it"]
    write(tmp_path / "annotations/a.json", {"annotations": texts})
    write(tmp_path / "execute/a.json", {"examples": {
        "1": {"input": "q", "output": 3, "other_rhymes": ["b", "3"]},
        "2": {"cause": "z", "effect": "y"}, "3": {"input": "q", "output": "r"},
        "4": {"items": ["a", "b"], "concept": "c", "all_common_concepts": ["d", "c"]}}})
    (task,) = read_tasks(tmp_path)
    assert task.definition == "do it" and task.name == "a"
    assert sum(map(len, task.wordings.values())) == 9
    assert [(x.id, x.input, x.outputs) for x in task.instances] == [
        ("a-1", "q", ("3", "b")), ("a-2", "Sentence 1: y Sentence 2: z", ("z",)),
        ("a-3", "q", ("r",)), ("a-4", "a, b", ("c", "d"))]
    for file, value in (("execute", {}), ("execute", {"examples": {"1": {"input": "q"}}}),
                        ("execute", []), ("annotations", {"annotations": [3]}),
                        ("annotations", {"annotations": []})):
        before = (tmp_path / file / "a.json").read_text()
        write(tmp_path / file / "a.json", value)
        with pytest.raises(ValueError, match=f"{file}/a.json") as caught:
            read_tasks(tmp_path)
        assert "\n" not in str(caught.value)
        (tmp_path / file / "a.json").write_text(before)


def test_real_tasks(shared):
    tasks = read_tasks(shared / "ni_tasks")
    assert len(tasks) == 18 and all(task.instances and task.definition for task in tasks)
    course = data.read_tasks(shared / "ni_tasks")
    assert tasks == course
    found = read_tasks(shared / "instruction_induction")
    assert len(found) == 16 and all(any(task.wordings.values()) for task in found)


def test_paraphrases_by_list_and_by_split_without_overlap(write, tmp_path):
    tasks = [Task("a", "do", []), Task("b", "make", []), Task("c", "go", [])]
    texts = [f"wording {i}" for i in range(12)]
    add_paraphrases(write(tmp_path / "p.json", {
        "a": [*texts, "do"], "c": {"definition": "x", "paraphrases": texts[:3]},
        "b": {"train": ["one", "make", "one"], "dev": [{"text": "two", "style": "terse"}],
              "test": ["one"]}}), tasks)
    parts = [{w.text for w in tasks[0].wordings[split]} for split in ("train", "dev", "test")]
    assert [len(part) for part in parts] == [6, 3, 3] and set.union(*parts) == set(texts)
    assert tasks[1].wordings == {"train": [Wording("one")], "dev": [Wording("two", "terse")],
                                 "test": []}
    assert len(tasks[2].wordings["train"]) == 3
    for name, advice in (("zzz", "Remove them"), ("aa", "Did you mean 'a'?")):
        with pytest.raises(ValueError, match="which is not among the 3 tasks") as caught:
            add_paraphrases(write(tmp_path / "q.json", {name: texts}), tasks)
        assert advice in str(caught.value)


@pytest.mark.parametrize("given, sentence", [
    (3, "task 'a' is 3"), ([3], 'wording 0: field "text" is 3'), ([""], "wording 0"),
    ({"train": "x"}, 'train is "x". Expected a list of wordings'),
    ({"train": [{"style": "x"}]}, 'wording 0: field "text" is missing'),
    ({"training": ["x"]}, "lists train, dev and test"),
    ([{"text": "x", "style": 3}], 'field "style" is 3')])
def test_a_bad_wording_is_named(given, sentence, write, tmp_path):
    with pytest.raises(ValueError, match=sentence) as caught:
        add_paraphrases(write(tmp_path / "p.json", {"a": given}), [Task("a", "do", [])])
    assert str(tmp_path / "p.json") in str(caught.value)


@pytest.mark.parametrize("place", ["{sentence}", "{}", "{0}", "{text}"])
def test_a_place_that_nothing_fills_is_refused(place, write, tmp_path):
    text = f"what is {place} ?"
    for given in ([text], {"train": ["a {input}"], "dev": [text]}):
        path = write(tmp_path / "p.json", {"a": given})
        with pytest.raises(ValueError) as caught:
            add_paraphrases(path, [Task("a", "do", [])])
        assert f'the wording "{text}" holds {place}, which is no place that is filled. Write ' in (
            str(caught.value))
        task = Task("a", f"do {place}", [])  # there it is text
        add_paraphrases(path, [task])
        assert text in [wording.text for part in task.wordings.values() for wording in part]


def test_instances_as_lines_are_refused_as_tasks(tmp_path):
    (tmp_path / "t.json").write_text('{"full_prompt": "a", "output": "b"}\n' * 2)
    with pytest.raises(ValueError) as caught:
        read_tasks(tmp_path)
    assert str(caught.value).startswith(
        f"{tmp_path}/t.json is JSON Lines, and a task is one object with Definition and Instances. "
        "Rows of whole prompts (full_prompt and output, or prompt and completion) are read by")


# ----- Plain questions -----

def test_plain_questions_are_tasks_without_an_input(tmp_path):
    rng, rows = random.Random(), []
    for number in range(rng.randint(2, 9)):
        row = {"question": f" What is {number}? ", "target": rng.choice([None, "x", 7, ["x", 8]])}
        if rng.random() < 0.5:
            row["wordings"] = ["Tell me {input}.", {"text": f"{number}?", "style": "terse"}]
        if rng.random() < 0.5:
            row["id"] = rng.choice([number, f"q{number}"])
        rows.append(row)
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = read_tasks(path)
    assert [task.name for task in tasks] == [
        str(row.get("id", f"some-{number}")) for number, row in enumerate(rows)]
    for split in ("dev", "test"):
        found = questions(tasks, split=split, wordings=5, per_task=1)
        asked = [row for row in rows if "wordings" in row]
        assert [x["instruction"] for x in found] == [row["question"].strip() for row in asked]
        for x, row in zip(found, asked, strict=True):
            given = row["target"] if isinstance(row["target"], list) else [row["target"]]
            assert x["targets"] == [str(text) for text in given if text is not None]
            assert x["input"] == "" and x["styles"] == ["", "terse"] and x["labels"] is None
    assert questions(tasks, split="dev", wordings=1, per_task=1) == []
    original = questions(tasks, split="dev", wordings=0, per_task=1)
    assert [x["wordings"] for x in original] == [[row["question"].strip()] for row in rows]


def test_other_tasks_are_asked_as_ever(shared):
    tasks = read_tasks(shared / "ni_tasks")[:5]
    for task in tasks:
        task.wordings = {"dev": [Wording("do"), Wording("make")]}
    how = {"split": "dev", "wordings": 2, "per_task": 3}
    assert questions(tasks, **how) == data.questions(tasks, **how) != []


@pytest.mark.parametrize("row, said", [
    ({"id": 1}, 'field "question" is missing; found: id'),
    ({"question": "a?", "id": "x"}, 'question "x" stands in '),
    ({"question": "b?", "target": {"a": 1}}, 'target is {"a": 1}. Expected a text, or a list of'),
    ({"question": "b?", "target": [True]}, "target is true. Expected a text"),
    ({"question": "b?", "wordings": "c?"}, "Expected a list of wordings"),
    ({"question": "b?", "wordings": ["{name}?"]}, "holds {name}, which is no place that")])
def test_plain_questions_that_cannot_be_asked(row, said, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"question": "a?", "id": "x"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_tasks(path)
    assert f"{path}, record 1" in str(caught.value)


def test_real_paraphrases(shared):
    names = json.loads((shared / "para_instructions/para_instructions.json").read_text())
    tasks = [Task(name, "d", []) for name in names]
    add_paraphrases(shared / "para_instructions/para_instructions.json", tasks)
    assert all(len(task.wordings["train"]) == 3 for task in tasks)


def test_bare_tasks_get_frames():
    tasks = [Task("a", "do {x}", []), Task("b", "make", [], {"train": [Wording("w")]})]
    sentence = frame_bare_tasks(tasks)
    assert sentence.startswith("1 of 2 tasks have no paraphrases")
    wordings = tasks[0].wordings
    assert {split: len(found) for split, found in wordings.items()} == {
        "train": 8, "dev": 4, "test": 4}
    assert wordings["train"][0] == Wording("Please do the following. do {x}", "frame")
    assert wordings["train"][4].text == "{input}\n\ndo {x}"
    assert tasks[1].wordings == {"train": [Wording("w")]} and frame_bare_tasks(tasks) == ""
