"""data.py: the tokenizer, templates to the byte, task files, splits, examples, packing, records."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import data
from data import IGNORE_INDEX, TEMPLATES, Instance, Task, Wording

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real files beside the repository
LETTERS = "abe hat\n,.:)é猫 ß0"


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def random_text(rng, most=12):
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, most)))


def labelled(document):
    return [token for token in document["labels"] if token != IGNORE_INDEX]


# ----- Tokenizer -----

def test_prompts_begin_with_bos_and_text_makes_no_control_token(tokenizer):
    assert {tokenizer.bos_id, tokenizer.eos_id} == tokenizer.control
    for text in ("a red hat", "", "</s><s> a </s>", "猫\nß"):
        ids = tokenizer.encode_prompt(text)
        assert ids[0] == tokenizer.bos_id and not tokenizer.control & set(ids[1:])
        assert tokenizer.decode(ids) == text.strip()
    assert len(tokenizer) == len(tokenizer.model) and tokenizer.stop_ids([""]) == [tokenizer.eos_id]


def test_ids_equal_those_of_sentencepiece(tokenizer):
    rng = random.Random()
    for _ in range(100):
        text = random_text(rng, 30)
        assert tokenizer.encode_prompt(text) == [tokenizer.bos_id, *tokenizer.model.encode(text)]
        assert tokenizer.model.decode(tokenizer.encode_prompt(text)[1:]) == text


def test_decoding_leaves_out_control_tokens_and_blanks(tokenizer):
    ids = tokenizer.encode_prompt(" a hat ")
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "a hat" and tokenizer.decode([]) == ""


def test_a_continuation_behind_any_tail_is_that_of_the_joint_encoding(tokenizer):
    rng, joint = random.Random(), 0
    for _ in range(400):
        prompt, text = random_text(rng), random_text(rng)
        both = tokenizer.encode_prompt(prompt + text)
        found = tokenizer.encode_continuation(text, prompt[-1])
        assert tokenizer.model.decode(tokenizer.encode_prompt(prompt)[1:] + found) == prompt + text
        joint += both == tokenizer.encode_prompt(prompt) + found
    assert joint > 200  # elsewhere the joint encoding has a piece across the boundary


def test_a_folder_or_a_file_names_the_tokenizer(world, tmp_path):
    one, two = data.Tokenizer(world / "model"), data.Tokenizer(world / "model/tokenizer.model")
    assert one.path == two.path and one.encode_prompt("red") == two.encode_prompt("red")
    with pytest.raises(ValueError, match="no tokenizer at .*. Give one .--plain reads no others"):
        data.Tokenizer(tmp_path)


def test_a_tokenizer_that_fuses_a_line_break_with_text_is_refused(tokenizer):
    class Fusing:
        def encode(self, text):
            return [hash(text)]

    broken = object.__new__(data.Tokenizer)
    broken.path, broken.model = Path("x"), Fusing()
    with pytest.raises(ValueError, match="x makes one piece of a line break and 'red'"):
        broken.encode_continuation("red")


# ----- Templates -----

INTRO = "Below is an instruction that describes a task"
MORE = ", paired with an input that provides further context"
ASK = ". Write a response that appropriately completes the request.\n\n"
JUDGED = (". Write a response to the instruction and the response should match the corresponding "
          "judgment.\n\n")
RENDERED = {
    "alpaca": [
        INTRO + MORE + ASK + "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        INTRO + ASK + "### Instruction:\nAdd.\n\n### Response:\n",
        INTRO + MORE + JUDGED + "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
                                "### Judgment:\nno\n\n### Response:\n",
        INTRO + JUDGED + "### Instruction:\nAdd.\n\n### Judgment:\nno\n\n### Response:\n"],
    "plain": [
        "### Instruction: Add.\n### Input: 1 2\n### Response:",
        "### Instruction: Add.\n### Response:",
        "### Instruction: Add.\n### Input: 1 2\n### Judgment: no\n### Response:",
        "### Instruction: Add.\n### Judgment: no\n### Response:"],
}
RENDERED["alpaca-stanford"] = [text[:-1] for text in RENDERED["alpaca"]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_to_the_byte(name):
    template = data.find_template(name)
    found = [template.render("Add.", "1 2"), template.render("Add."),
             template.render("Add.", "1 2", "no"), template.render("Add.", judgment="no")]
    assert found == RENDERED[name]
    assert {text[-1] for text in found} == {template.tail}
    assert template.separator == (" " if name == "plain" else "")


def test_an_unknown_template_is_refused():
    with pytest.raises(ValueError, match="unknown template 'lama'. Templates: alpaca, alpaca-stan"):
        data.find_template("lama")


def test_a_wording_may_place_the_input_and_braces_in_data_are_left_alone():
    render = TEMPLATES["plain"].render
    assert render("{input} . which colour ?", "a red hat") == (
        "### Instruction: a red hat . which colour ?\n### Response:")
    assert render("{input} ?", "a hat", "no") == (
        "### Instruction: a hat ?\n### Judgment: no\n### Response:")
    assert render("say {input}", "x", literal=True) == (
        "### Instruction: say {input}\n### Input: x\n### Response:")
    assert "{instruction} {x}" in render("say {instruction} {x}", "{input}")
    assert "### Input: {input}\n" in render("say it", "{input}")
    assert render("add", "{instruction}").count("{instruction}") == 1
    assert r"\1 \g<0>" in render(r"\1 \g<0>", "x")


@pytest.mark.parametrize("name", TEMPLATES)
def test_response_ids_are_those_of_the_joint_encoding(tokenizer, name):
    template, rng = TEMPLATES[name], random.Random()
    for _ in range(200):
        response = random_text(rng).strip(" ") or "x"
        prompt = template.render("what is the colour ?", "anna has a red hat")
        joint = tokenizer.encode_prompt(prompt + template.separator + response)
        document = data.encode_example(tokenizer, template, prompt, response, max_len=512)
        if not response.startswith(("\n", ":", ")", ",", ".")):  # they may fuse with the tail
            assert document["input_ids"] == [*joint, tokenizer.eos_id]
        ids = template.encode_response(tokenizer, response)
        assert ids[-1] == tokenizer.eos_id and labelled(document) == ids
        assert tokenizer.decode(ids) == response.strip()


# ----- Documents -----

def test_labels_stand_on_the_response_only(tokenizer):
    template = TEMPLATES["plain"]
    prompt = template.render("give the colour .", "anna has a red hat")
    document = data.encode_example(tokenizer, template, prompt, "red", max_len=512)
    n = len(tokenizer.encode_prompt(prompt))
    assert document["labels"][:n] == [IGNORE_INDEX] * n and document["truncated"] == 0
    assert document["labels"][n:] == document["input_ids"][n:] == template.encode_response(
        tokenizer, "red")


def test_a_response_may_be_ids_that_a_model_sampled(tokenizer):
    ids = [7, 9, tokenizer.eos_id]
    document = data.encode_example(tokenizer, TEMPLATES["plain"], "a :", ids, max_len=512)
    assert document["input_ids"] == tokenizer.encode_prompt("a :") + ids
    assert labelled(document) == ids


def test_a_long_prompt_is_truncated_from_the_left_and_a_long_response_refused(tokenizer):
    template = TEMPLATES["plain"]
    prompt = template.render("what is the colour ? " * 30, "anna")
    whole = data.encode_example(tokenizer, template, prompt, "red", max_len=9999)
    short = data.encode_example(tokenizer, template, prompt, "red", max_len=40)
    assert len(short["input_ids"]) == len(short["labels"]) == 40
    assert (whole["truncated"], short["truncated"]) == (0, 1)
    assert short["input_ids"] == whole["input_ids"][:1] + whole["input_ids"][-39:]
    assert labelled(short) == labelled(whole) == template.encode_response(tokenizer, "red")
    exact = data.encode_example(tokenizer, template, prompt, "red",
                                max_len=len(whole["input_ids"]))
    assert exact == whole
    with pytest.raises(ValueError, match="--max-len 3 leaves no room for a response of .* raise"):
        data.encode_example(tokenizer, template, prompt, "red hat", max_len=3)


@pytest.mark.parametrize("room, kept", [
    (9, [0, 1, 2, 3, 4]), (5, [0, 1, 2, 3, 4]), (4, [0, 2, 3, 4]), (2, [0, 4]), (1, [0])])
def test_truncation_keeps_bos_and_the_right_end(room, kept):
    assert data.truncate_left([0, 1, 2, 3, 4], room) == kept


def test_documents_in_segments_equal_their_joint_encoding(tokenizer):
    segments = [("the red hat", False), (" is", False), (" blue", True), ("\n### x", False),
                (" correct", True)]
    document = data.encode_document(tokenizer, segments, max_len=512)
    assert document["input_ids"] == tokenizer.encode_prompt("".join(text for text, _ in segments))
    assert len(document["labels"]) == len(document["input_ids"]) and document["truncated"] == 0
    assert tokenizer.decode(labelled(document)).replace(" ", "") == "bluecorrect"


def test_segments_may_be_empty_or_all_learnt(tokenizer):
    whole = tokenizer.encode_prompt("the red hat is blue")
    for segments in ([("", False), ("the red hat", False), ("", False), (" is blue", True)],
                     [("the red hat is blue", True)]):
        document = data.encode_document(tokenizer, segments, max_len=512)
        assert document["input_ids"] == whole and document["labels"][0] == IGNORE_INDEX


def test_a_long_document_is_truncated_from_the_right(tokenizer):
    segments = [("a red hat ", False), ("blue " * 40, True)]
    whole = data.encode_document(tokenizer, segments, max_len=512)
    short = data.encode_document(tokenizer, segments, max_len=10)
    assert short["input_ids"] == whole["input_ids"][:10] and short["truncated"] == 1
    assert short["labels"] == whole["labels"][:10]


# ----- Tasks and wordings -----

@pytest.mark.parametrize("definition", ["Do it.", ["Do", "it."]])
@pytest.mark.parametrize("output", ["x", ["x"], ["x ", "y"]])
def test_all_ages_of_the_schema_are_read(tmp_path, definition, output):
    rows = [{"input": " a ", "output": output}, {"id": 7, "input": ["b"], "output": "z"}]
    path = write(tmp_path / "t.json", {"Definition": definition, "Instances": rows})
    (task,) = data.read_tasks(path)
    assert (task.name, task.definition) == ("t", "Do it.")
    outputs = ("x", "y") if len(output) == 2 else ("x",)
    assert task.instances == [Instance("t-0", "a", outputs), Instance("7", "b", ("z",))]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name in "bca":
        write(tmp_path / f"{name}.json", {"Definition": name, "Instances": []})
    (tmp_path / "notes.txt").write_text("not a task")
    assert [task.name for task in data.read_tasks(tmp_path)] == ["a", "b", "c"]


def test_json_errors_name_file_line_and_column(tmp_path):
    (tmp_path / "t.json").write_text('{"Definition": "d",\n oops}')
    with pytest.raises(ValueError, match=r"t.json is not JSON.* line 2 column 2"):
        data.read_tasks(tmp_path)
    (tmp_path / "t.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="t.json is not .*UTF-8"):
        data.read_tasks(tmp_path)
    (tmp_path / "t.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="t.json is not"):
        data.read_tasks(tmp_path)
    with pytest.raises(ValueError, match="no task files at .*none. Give a folder"):
        data.read_tasks(tmp_path / "none")


@pytest.mark.skipif(not SHARED.exists(), reason="the real task files are not beside the project")
def test_real_task_files_are_read():
    tasks = data.read_tasks(SHARED / "ni_tasks")
    assert len(tasks) == len(list((SHARED / "ni_tasks").glob("*.json"))) > 10
    for task in tasks:
        assert task.instances and task.definition
        assert all(x.outputs[0] and x.input for x in task.instances)
    labels = {task.name: task.labels for task in tasks}
    assert labels["task1344_glue_entailment_classification"] == ["0", "1"]
    assert labels["task1290_xsum_summarization"] is None


def task_of(outputs):
    return Task("t", "d", [Instance(str(i), str(i), (o,)) for i, o in enumerate(outputs)])


@pytest.mark.parametrize("outputs, labels", [
    (["yes", "no"] * 10, ["no", "yes"]),
    ([f"answer {i}" for i in range(20)], None),
    (["a text of more than six words here"] * 9, None),
    (["那只黑色的猫今天早上睡在床下面"] * 9, None),
    (["正面", "负面评价"] * 9, ["正面", "负面评价"]),
    (["แมวดำนอนอยู่ใต้เตียง"] * 9, None), (["หุ้นตกหนัก"] * 9, ["หุ้นตกหนัก"]),
    ([str(i % 50) for i in range(100)], sorted(map(str, range(50)))),
    ([str(i % 51) for i in range(200)], None),
    (["a", "b", "c"], None),
    (["one two three four five six"] * 2, ["one two three four five six"]),
])
def test_labels_are_for_tasks_with_few_repeated_short_outputs(outputs, labels):
    assert task_of(outputs).labels == labels


def test_paraphrases_by_list_and_by_split_without_overlap(tmp_path):
    tasks, texts = [Task("a", "do", []), Task("b", "make", [])], [f"wording {i}" for i in range(12)]
    data.add_paraphrases(write(tmp_path / "p.json", {
        "a": [*texts[1:], texts[1], "do", {"text": "wording 0", "style": "terse"}],
        "b": {"train": ["one", "make", "one"], "dev": [{"text": "two", "style": "terse"}],
              "test": ["one"]}}), tasks)
    parts = [{w.text for w in tasks[0].wordings[split]} for split in ("train", "dev", "test")]
    assert [len(part) for part in parts] == [6, 3, 3] and set.union(*parts) == set(texts)
    assert [w.style for part in tasks[0].wordings.values() for w in part if w.text == texts[0]] == [
        "terse"]
    assert tasks[1].wordings == {"train": [Wording("one")], "dev": [Wording("two", "terse")],
                                 "test": []}


def test_wordings_of_an_unknown_task_are_refused(tmp_path):
    path = write(tmp_path / "q.json", {"zzz": ["x"]})
    with pytest.raises(ValueError, match="q.json has wordings for task 'zzz', which is not among"):
        data.add_paraphrases(path, [Task("a", "do", [])])


def test_wordings_of_an_unknown_split_are_refused(tmp_path):
    path = write(tmp_path / "q.json", {"a": {"train": ["x"], "valid": ["y"]}})
    with pytest.raises(ValueError, match="q.json, task a: expected the splits train, dev and test"):
        data.add_paraphrases(path, [Task("a", "do", [])])


def test_a_file_that_is_no_task_is_refused(tmp_path):
    path = write(tmp_path / "q.json", {"Instances": []})
    with pytest.raises(ValueError, match="q.json lacks Definition or Instances"):
        data.read_tasks(path)


@pytest.mark.parametrize("n, sizes", [(0, (0, 0, 0)), (4, (4, 0, 0)), (5, (1, 2, 2)),
                                      (8, (4, 2, 2)), (40, (20, 10, 10))])
def test_sizes_of_the_splits_of_wordings(n, sizes):
    found = data.split_wordings("t", [f"w{i}" for i in range(n)])
    assert tuple(len(found[split]) for split in ("train", "dev", "test")) == sizes


def test_splits_of_wordings_depend_on_task_and_texts_alone():
    texts = [f"w{i}" for i in range(20)]
    again = texts[:]
    random.Random().shuffle(again)
    assert data.split_wordings("t", texts) == data.split_wordings("t", again)
    assert data.split_wordings("t", texts) != data.split_wordings("u", texts)


SPLITS = ("train", "pool", "dev", "test")


def test_instance_splits_are_disjoint_and_follow_the_input():
    inputs = [f"input {i}" for i in range(1000)]
    first = Task("a", "d", [Instance(f"a{i}", x, ("x",)) for i, x in enumerate(inputs)])
    second = Task("b", "e", [Instance(f"b{i}", x, ("y",)) for i, x in enumerate(inputs[::-1])])
    found = {split: {x.input for x in data.split_instances(first, split)} for split in SPLITS}
    assert sum(map(len, found.values())) == 1000 == len(set.union(*found.values()))
    for split, share in zip(SPLITS, (30, 30, 15, 25), strict=True):
        assert found[split] == {x.input for x in data.split_instances(second, split)}
        assert abs(len(found[split]) / 10 - share) < 6
    half = Task("a", "d", first.instances[:500])
    assert set(data.split_instances(half, "dev")) <= set(data.split_instances(first, "dev"))


def test_half_characters_in_texts_are_split_too():
    task = Task("a", "d", [Instance("0", "x \ud800", ("x",))])
    assert sum(len(data.split_instances(task, split)) for split in SPLITS) == 1
    assert data.split_wordings("t", ["x \ud800"] * 2)["train"] == [Wording("x \ud800")]


def test_splits_never_change():
    """Models were trained on them: another hash would let held-out questions into training."""
    task = Task("a", "d", [Instance(str(i), f"input {i}", ("x",)) for i in range(12)])
    found = {split: [x.id for x in data.split_instances(task, split)] for split in SPLITS}
    assert found == {"train": ["0", "1", "5"], "pool": ["2", "6", "7", "8", "11"],
                     "dev": ["4"], "test": ["3", "9", "10"]}
    words = data.split_wordings("t", [f"w{i}" for i in range(6)])
    assert {name: [w.text for w in part] for name, part in words.items()} == {
        "test": ["w1", "w5"], "dev": ["w0", "w4"], "train": ["w2", "w3"]}
    assert data.hash_order(["22", "4", "65", "70", "96"], "questions") == [
        "22", "96", "65", "70", "4"]


# ----- Examples and questions -----

@pytest.fixture
def hundred():
    """A task of a hundred instances with wordings."""
    rows = [Instance(str(i), f"input {i}", (f"output {i}", "other")) for i in range(100)]
    return Task("a", "original", rows, {"train": [Wording(f"w{i}") for i in range(6)],
                                        "dev": [Wording("d1", "terse"), Wording("d2")],
                                        "test": [Wording("e1")]})


def test_assign_keeps_the_number_of_examples_and_product_multiplies_it(hundred):
    def examples(wordings, augment):
        return data.instruction_examples([hundred], wordings=wordings, augment=augment,
                                         per_task=20, seed=3)

    plain, assigned, product = examples(0, "assign"), examples(4, "assign"), examples(4, "product")
    assert len(plain) == len(assigned) == 20 and len(product) == 5 * 20
    assert [x["id"] for x in plain] == [x["id"] for x in assigned]
    assert {x["wording"] for x in plain} == {"original"}
    assert Counter(x["wording"] for x in assigned) == {
        "original": 4, "w0": 4, "w1": 4, "w2": 4, "w3": 4}
    assert len({(x["id"], x["wording"]) for x in product}) == 100
    for x in product:
        assert x == {"task": "a", "id": x["id"], "wording": x["wording"],
                     "instruction": "original", "input": f"input {x['id']}",
                     "output": f"output {x['id']}"}
    train = {x.id for x in data.split_instances(hundred, "train")}
    assert {x["id"] for x in product} <= train


def test_examples_follow_the_seed(hundred):
    def ids(seed, tasks=(hundred,)):
        return [x["id"] for x in data.instruction_examples(
            list(tasks), wordings=0, augment="assign", per_task=10, seed=seed)]

    assert ids(1) == ids(1) != ids(2)
    other = Task("b", "second", hundred.instances, {})
    assert ids(1, (other, hundred))[10:] == ids(1)  # whatever tasks stand beside it


def test_questions_use_held_out_inputs_and_wordings_only(hundred):
    rows = data.questions([hundred], split="dev", wordings=8, per_task=5)
    dev = {x.id for x in data.split_instances(hundred, "dev")}
    assert len(rows) == 5 and len({row["id"] for row in rows}) == 5
    for row in rows:
        assert row["id"] in dev and row == {
            "task": "a", "id": row["id"], "instruction": "original",
            "input": f"input {row['id']}", "targets": [f"output {row['id']}", "other"],
            "labels": None, "wordings": ["d1", "d2"], "styles": ["terse", ""]}
    assert data.questions([hundred], split="test", wordings=8, per_task=5) == []
    assert data.questions([hundred], split="dev", wordings=1, per_task=5) == []


def test_questions_without_wordings_ask_with_the_instruction(hundred):
    rows = data.questions([hundred], split="test", wordings=0, per_task=3)
    assert [row["wordings"] for row in rows] == [["original"]] * 3


def test_fewer_questions_are_the_first_of_more(hundred):
    def ids(n, task=hundred):
        return [x["id"] for x in data.questions([task], split="dev", wordings=2, per_task=n)]

    assert ids(3) == ids(8)[:3]
    turned = Task("a", "original", hundred.instances[::-1], hundred.wordings)
    assert ids(8, turned) == ids(8)


# ----- Packing and order -----

def test_pack_against_a_literal_row():
    documents = [{"input_ids": [1, 5, 6], "labels": [-100, -100, 6]},
                 {"input_ids": [1, 7], "labels": [-100, 7]}]
    assert data.pack(documents) == {
        "input_ids": [1, 5, 6, 1, 7], "labels": [-100, -100, 6, -100, 7],
        "sequence_ids": [0, 0, 0, 1, 1], "lengths": [3, 2]}  # no padding
    assert data.pack([]) == {"input_ids": [], "labels": [], "sequence_ids": [], "lengths": []}


def items_of(*sizes):
    """Items whose documents have these lengths."""
    return [{"documents": [{"input_ids": [0] * n} for n in lengths]} for lengths in sizes]


def test_micro_batches_keep_items_whole_and_in_order():
    items = items_of([5, 5], [3], [9], [1])
    parts = data.micro_batches(items, 12)
    assert [item for part in parts for item in part] == items
    assert [len(part) for part in parts] == [1, 2, 1]


def test_random_micro_batches_are_as_large_as_fits():
    rng = random.Random()
    items = items_of(*[[rng.randint(1, 30) for _ in range(rng.randint(1, 3))] for _ in range(60)])
    parts = data.micro_batches(items, 64)
    sizes = [[sum(len(x["input_ids"]) for x in item["documents"]) for item in part]
             for part in parts]
    assert [item for part in parts for item in part] == items and all(parts)
    for part, following in zip(sizes, sizes[1:], strict=False):
        assert len(part) == 1 or sum(part) <= 64
        assert sum(part) + following[0] > 64


def test_no_items_make_one_empty_batch():
    assert data.micro_batches([], 8) == [[]]  # a process without items still takes part


def test_order_depends_on_seed_and_epoch_only_and_visits_all():
    steps = [data.batch_indices(10, 4, step, seed=7) for step in range(5)]
    flat = [i for step in steps for i in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert data.batch_indices(10, 4, 3, seed=7) == steps[3]
    assert data.batch_indices(10, 4, 0, seed=8) != steps[0]
    few = data.batch_indices(3, 8, 0, seed=7)  # several epochs in one step
    assert sorted(few[:3]) == sorted(few[3:6]) == [0, 1, 2] and len(few) == 8


def test_the_order_never_changes():
    """A stopped run goes on with the items that it has not seen."""
    assert data.batch_indices(10, 4, 0, seed=0) == [1, 0, 2, 4]
    assert data.batch_indices(10, 4, 2, seed=0) == [7, 5, 1, 4]  # over the end of an epoch


# ----- Records -----

def test_records_round_trip(tmp_path):
    path, records = tmp_path / "r.jsonl", [{"text": "a\u2028b\ud800\x1e\x85 猫\n\r"}, {"n": None}]
    assert data.read_records(path) == []
    data.append_records(path, records[:1])
    data.append_records(path, records[1:])
    data.append_records(path, [])
    assert data.read_records(path) == records
    assert path.read_bytes().count(b"\n") == 2


def test_records_without_a_number_are_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(ValueError):
        data.append_records(path, [{"n": 1}, {"n": float("nan")}])
    assert not path.exists()


@pytest.mark.parametrize("text, number", [
    ('{"n": 1}\noops\n{"n": 2}\n', 2), ('{"n": 1}\n{"n": 2', 2), ("[" * 100_000, 1)])
def test_damage_names_the_file_and_the_line(tmp_path, text, number):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"r.jsonl, line {number}, is not JSON: .*. Fix or delete"):
        data.read_records(path)
    assert path.read_text() == text  # reading mends nothing


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    """Each call writes once: after a kill all records of earlier calls are there."""
    path = tmp_path / "r.jsonl"
    code = ("import data, os, sys\n"
            "for n in range(20):\n"
            "    data.append_records(sys.argv[1], [{'n': n}, {'n': n}])\n"
            "    if n == 7: os._exit(9)\n")
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT)
    assert done.returncode == 9
    assert data.read_records(path) == [{"n": n // 2} for n in range(16)]
