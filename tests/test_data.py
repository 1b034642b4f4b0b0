"""data.py: templates to the byte, the prompt/response boundary, task files of all ages, splits, packing, records."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
import torch

import data
from data import IGNORE_INDEX, TEMPLATES, Task, Tokenizer, Wording

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A byte-fallback BPE with LLaMA's settings, trained on a page of text."""
    path = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(0)
    words = "the red lamp in paris on monday anna bought a blue chair what is colour answer below instruction".split()
    text = [" ".join(rng.choices(words, k=8)) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(path / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        minloglevel=2)
    n = len(Tokenizer(path))
    write(path / "added_tokens.json", {"<|im_start|>": n, "<|im_end|>": n + 1})
    write(path / "special_tokens_map.json", {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return Tokenizer(path)


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def instance(input="a b", output=("x",), **more):
    return {"input": input, "output": list(output), **more}


# Templates and the boundary ------------------------------------------------------------------------------------------


def test_alpaca_to_the_byte():
    assert TEMPLATES["alpaca"].render("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert TEMPLATES["alpaca"].render("Add.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n")


def test_a_wording_may_place_the_input_and_braces_in_data_are_left_alone():
    plain = TEMPLATES["plain"]
    assert plain.render("{input} . which colour ?", "a red lamp") == "### Instruction: a red lamp . which colour ?\n### Response:"
    assert "{instruction} {x}" in plain.render("say {instruction} {x}", "{input}")
    assert plain.render("add", "{instruction}").count("{instruction}") == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_response_ids_are_those_of_the_joint_encoding(tokenizer, name):
    template, rng = TEMPLATES[name], random.Random(1)
    for _ in range(200):
        response = "".join(rng.choice("abe lamp\n,éß猫 ") for _ in range(rng.randrange(1, 12))).strip() or "x"
        prompt = template.render("what is the colour ?", "anna bought a red lamp")
        joint = tokenizer.encode_prompt(data.Prompt.of([*prompt.parts, (template.separator + response, False), (template.end, True)]))
        document = data.encode_example(tokenizer, template, prompt, response, max_len=512)
        assert document["input_ids"] == joint
        assert tokenizer.decode(data.encode_response(tokenizer, template, response)) == response


def test_control_pieces_never_come_from_text(tokenizer):
    ids = tokenizer.encode_prompt("</s><s> a </s>")
    assert ids.count(tokenizer.bos_id) == 1 and tokenizer.eos_id not in ids


def test_a_long_prompt_loses_its_left_and_a_long_response_is_refused(tokenizer):
    template = TEMPLATES["plain"]
    prompt = template.render("what is the colour ? " * 30, "anna")
    whole = data.encode_example(tokenizer, template, prompt, "red", max_len=9999)
    cut = data.encode_example(tokenizer, template, prompt, "red", max_len=40)
    assert len(cut["input_ids"]) == 40 and cut["cut"] == 1 and whole["cut"] == 0
    assert cut["input_ids"] == whole["input_ids"][:1] + whole["input_ids"][-39:]
    assert [i for i in cut["labels"] if i != IGNORE_INDEX] == data.encode_response(tokenizer, template, "red")
    with pytest.raises(ValueError, match="--max-len 3 leaves no room for a response of"):
        data.encode_example(tokenizer, template, prompt, "red lamp", max_len=3)


def test_documents_in_segments_equal_their_joint_encoding(tokenizer):
    segments = [("the red lamp", False), (" is", False), (" blue", True), ("\n### x", False), (" correct", True)]
    document = data.encode_document(tokenizer, segments, max_len=512)
    assert document["input_ids"] == tokenizer.encode_prompt("".join(text for text, _ in segments))
    labelled = [i for i in document["labels"] if i != IGNORE_INDEX]
    assert tokenizer.decode(labelled).replace(" ", "") == "bluecorrect"


@pytest.mark.parametrize("segments", [[("a \ud800 lamp", False), (" red", True)], [("a lamp", False), (" \udfff", True)]])
def test_half_a_character_is_one_sentence_in_every_segment(tokenizer, segments):
    with pytest.raises(ValueError, match="holds half of a character"):
        data.encode_document(tokenizer, segments, max_len=512)


def test_segments_may_be_empty(tokenizer):
    whole = tokenizer.encode_prompt("the red lamp is blue")
    for segments in ([("", False), ("the red lamp", False), ("", False), (" is blue", True)], [("the red lamp is blue", True)]):
        document = data.encode_document(tokenizer, segments, max_len=512)
        assert document["input_ids"] == whole and document["labels"][0] == IGNORE_INDEX


@pytest.mark.parametrize("blob, sentence", [
    (b"IQ== 0\nIg== 1\n", "is a tiktoken file"), (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    (b"<html>", "is not a sentencepiece model")])
def test_other_tokenizer_files_are_named(tmp_path, blob, sentence):
    (tmp_path / "tokenizer.model").write_bytes(blob)
    with pytest.raises(ValueError, match=sentence):
        Tokenizer(tmp_path)


def test_a_missing_tokenizer_says_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="Newer transformers versions do not save that file"):
        Tokenizer(tmp_path)


# Tasks and wordings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("definition", ["Do it.", ["Do it."]])
@pytest.mark.parametrize("output", ["x", ["x"], ["x", "y"]])
def test_all_ages_of_the_schema(tmp_path, definition, output):
    path = write(tmp_path / "t.json", {"Definition": definition, "Instances": [{"input": " a ", "output": output}]})
    (task,) = data.load_tasks(path)
    assert task.definition == "Do it." and task.instances[0].input == "a" and task.instances[0].outputs[0] == "x"
    assert len(task.instances[0].outputs) == (2 if output == ["x", "y"] else 1)


@pytest.mark.parametrize("record, sentence", [
    ([], "holds a list"), ({"Instances": []}, 'field "Definition" is missing'), ({"Definition": "d", "Instances": []}, "has no instances"),
    ({"Definition": 3, "Instances": [instance()]}, 'field "Definition" is 3'),
    ({"Definition": "d", "Instances": [instance(), {"input": "a"}]}, r'record 1: field "output" is missing; found: input'),
    ({"Definition": "d", "Instances": [instance(output=[1])]}, 'field "output" is'), ({"Definition": "d", "Instances": [3]}, "record 0 is a int")])
def test_a_bad_task_file_is_named_with_its_record(tmp_path, record, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        data.load_tasks(write(tmp_path / "t.json", record))
    assert "t.json" in str(error.value)


def test_json_errors_name_file_line_and_column(tmp_path):
    (tmp_path / "t.json").write_text('{"Definition": "d",\n oops}')
    with pytest.raises(ValueError, match=r"t.json is not JSON: .* line 2 column 2"):
        data.load_tasks(tmp_path)
    with pytest.raises(ValueError, match="no task files at"):
        data.load_tasks(tmp_path / "none")


def test_labels_are_for_tasks_with_few_repeated_short_outputs():
    def task(outputs):
        return Task("t", "d", [data.Instance(str(i), str(i), (o,)) for i, o in enumerate(outputs)])
    assert task(["yes", "no"] * 10).labels == ["no", "yes"]
    assert task([f"answer {i}" for i in range(20)]).labels is None
    assert task(["a text of more than six words here"] * 9).labels is None


def test_paraphrases_by_list_and_by_split_without_overlap(tmp_path):
    tasks = [Task("a", "do", []), Task("b", "make", [])]
    texts = [f"wording {i}" for i in range(12)]
    data.load_paraphrases(write(tmp_path / "p.json", {
        "a": texts, "b": {"train": ["one", "make", "one"], "dev": [{"text": "two", "style": "terse"}], "test": ["one"]}}), tasks)
    parts = [{w.text for w in tasks[0].wordings[s]} for s in ("train", "dev", "test")]
    assert [len(p) for p in parts] == [6, 3, 3] and set.union(*parts) == set(texts)
    assert tasks[1].wordings == {"train": [Wording("one")], "dev": [Wording("two", "terse")], "test": []}
    with pytest.raises(ValueError, match="which is not among the 2 tasks. Did you mean 'a'|Remove them"):
        data.load_paraphrases(write(tmp_path / "q.json", {"zzz": texts}), tasks)


@pytest.mark.parametrize("given, sentence", [
    (3, "task 'a' is 3"), ([3], "wording 0 is 3"), ([""], "wording 0 is"), ({"train": "x"}, "Expected a list of wordings"),
    ({"train": [{"style": "x"}]}, "wording 0 is"), ({"training": ["x"]}, "lists train, dev and test")])
def test_a_bad_wording_is_named(tmp_path, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.load_paraphrases(write(tmp_path / "p.json", {"a": given}), [Task("a", "do", [])])


def test_instance_splits_are_disjoint_and_follow_the_input():
    inputs = [f"input {i}" for i in range(400)]
    first = Task("a", "d", [data.Instance(f"a{i}", text, ("x",)) for i, text in enumerate(inputs)])
    second = Task("b", "d", [data.Instance(f"b{i}", text, ("x",)) for i, text in enumerate(reversed(inputs))])
    splits = {s: {x.input for x in data.split_instances(first, s)} for s in ("train", "pool", "dev", "test")}
    assert sum(len(v) for v in splits.values()) == 400 == len(set.union(*splits.values()))
    assert all(splits[s] == {x.input for x in data.split_instances(second, s)} for s in splits)


def test_assign_keeps_the_number_of_examples_and_product_multiplies_it():
    task = Task("a", "original", [data.Instance(str(i), f"input {i}", ("x",)) for i in range(100)],
                {"train": [Wording(f"w{i}") for i in range(6)]})
    plain = data.instruction_examples([task], wordings=0, augment="assign", per_task=20, seed=3)
    assigned = data.instruction_examples([task], wordings=4, augment="assign", per_task=20, seed=3)
    product = data.instruction_examples([task], wordings=4, augment="product", per_task=20, seed=3)
    assert [x["id"] for x in plain] == [x["id"] for x in assigned] and len(product) == 5 * len(plain)
    assert {x["wording"] for x in plain} == {"original"}
    assert {x["wording"] for x in assigned} == {"original", "w0", "w1", "w2", "w3"}


def test_questions_use_held_out_wordings_only():
    task = Task("a", "original", [data.Instance(str(i), f"input {i}", ("x",)) for i in range(100)],
                {"train": [Wording("t")], "dev": [Wording("d1"), Wording("d2")], "test": [Wording("e1")]})
    rows = data.questions([task], split="dev", wordings=8, per_task=5)
    assert len(rows) == 5 and all(row["wordings"] == ["d1", "d2"] for row in rows)
    assert data.questions([task], split="test", wordings=8, per_task=5) == []


# Packing and order ---------------------------------------------------------------------------------------------------


def test_pack_against_a_literal_row():
    documents = [{"input_ids": [1, 5, 6], "labels": [-100, -100, 6]}, {"input_ids": [1, 7], "labels": [-100, 7]}]
    batch = data.pack(documents)
    assert torch.equal(batch["input_ids"], torch.tensor([1, 5, 6, 1, 7]))       # no padding
    assert torch.equal(batch["labels"], torch.tensor([-100, -100, 6, -100, 7]))
    assert batch["lengths"] == [3, 2]


def test_only_what_carries_no_label_is_laid_down_once():
    """Answers that begin alike are learnt in each of their documents."""
    dice = random.Random()
    prompt, begin = ([dice.randrange(3, 99) for _ in range(size)] for size in (20, 4))
    answers = [begin + [100 + k] * dice.randint(1, 5) for k in range(3)]
    group = [{"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer} for answer in answers]
    batch = data.pack(group, [3])
    assert batch["trees"] == [(20, [len(answer) for answer in answers])]
    assert batch["labels"][batch["labels"] != IGNORE_INDEX].tolist() == sum(answers, [])


def test_micro_batches_keep_groups_whole_and_in_order():
    groups = [{"documents": [{"input_ids": [0] * n}] * k} for n, k in ((5, 2), (3, 1), (9, 1), (1, 1))]
    runs = data.micro_batches(groups, 12)
    assert [g for run in runs for g in run] == groups and [len(run) for run in runs] == [1, 2, 1]


def test_order_depends_on_seed_and_epoch_only_and_visits_all():
    steps = [data.batch_indices(10, 4, step, seed=7) for step in range(5)]
    flat = [i for step in steps for i in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert data.batch_indices(10, 4, 3, seed=7) == steps[3] and data.batch_indices(10, 4, 0, seed=8) != steps[0]


# Records -------------------------------------------------------------------------------------------------------------


def test_records_round_trip_and_a_torn_tail_is_kept_aside(tmp_path, capsys):
    path, records = tmp_path / "r.jsonl", [{"text": "a\u2028b\ud800\x1e 猫"}, {"n": 1}]
    data.append_records(path, records)
    with open(path, "ab") as file:
        file.write(b'{"n": 2')
    with pytest.raises(ValueError, match="line 3, is not JSON"):
        data.read_records(path)                             # another's file is never repaired
    assert data.read_records(path, own=True) == records and "kept in r.jsonl.torn" in capsys.readouterr().out
    data.append_records(path, [{"n": 3}])
    assert data.read_records(path, own=True) == [*records, {"n": 3}]
    path.write_bytes(path.read_bytes().rstrip(b"\n"))       # a whole record whose newline was lost
    assert data.read_records(path, own=True)[-1] == {"n": 3}
    data.append_records(path, [{"n": 4}])
    assert data.read_records(path)[-2:] == [{"n": 3}, {"n": 4}]


def test_damage_elsewhere_names_the_line(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"n": 1}\noops\n{"n": 2}\n')
    with pytest.raises(ValueError, match="r.jsonl, line 2, is not JSON"):
        data.read_records(tmp_path / "r.jsonl")


def test_candidates_to_judge_hold_right_and_wrong_answers():
    answers = data.answer_candidates("red lamp", same_task=["blue chair", "green hat"], same_input=["anna", "paris"],
                                     rng=random.Random(0), n=400)
    assert 0.3 < answers.count("red lamp") / 400 < 0.6
    assert {"anna", "paris", "blue chair"} < set(answers) and len(set(answers)) > 10


# Judged responses ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "cut").is_dir(), reason="the authors' judged responses are not here")
def test_the_authors_first_iteration_reads_as_published():
    found = data.load_judged(SHARED / "cut/train-alpaca-sample-iter1.json")
    kept, counts = data.keep_judged(found, downsample=0.25, seed=42)
    assert counts == {"negative": 287, "positive": 713, "kept": 71, "failed": 47}
    assert len(kept) == 287 - 47 + 71 and sum(record["judgment"] is None for record in kept) == 71


def judged_rows():
    """(a file's rows, the records that they mean)."""
    own = {"instruction": "a", "input": "b", "response": "c", "judgment": "no"}
    return [
        ([own], [("a", "b", "c", "no", None)]),
        ([{"instruction": "a", "input": None, "output": "c", "judgment": "no", "score": 7, "i_ans": "d"}], [("a", "", "c", None, "d")]),
        ([{"instruction": "a", "output": "c", "judgment": "no", "score": 6}], [("a", "", "c", "no", None)]),
        ([{"question": "a", "answer": "c", "feedback": "no", "output_correct": "e"}], [("a", "", "c", "no", "e")]),
        ([{"instruction": "a", "completions": [{"response": "c", "critique": "no", "overall_score": 4}, {"response": "x"},
                                               {"response": "d", "critique": "great", "overall_score": 9.0}]}],
         [("a", "", "c", "no", None), ("a", "", "d", None, None)]),
        ([{"data": {"passage": {"text": "p"}, "questions": [
            {"question": "q", "rankings": [0.1, 0.9], "answers": [{}, {"answer": "c", "feedback": {"critiques": [
                {"text": "no", "refinement": "r1"}, {"text": "never", "refinement": "r2"}]}}]},
            {"question": "q", "rankings": [1], "answers": [{"answer": "c", "feedback": {"critiques": [], "rating": 7}}]},
            {"question": "q", "rankings": [1], "answers": [{"answer": "c", "feedback": {"skip": True}}]}]}}],
         [("p\nq", "", "c", "no never", "r2"), ("p\nq", "", "c", None, None)]),
    ]


@pytest.mark.parametrize("rows, wanted", judged_rows())
@pytest.mark.parametrize("name, form", [("j.json", "list"), ("j.txt", "list"), ("j.jsonl", "lines"), ("j.json", "unended")])
def test_every_form_of_judged_responses(rows, wanted, name, form, tmp_path):
    path, lines = tmp_path / name, [json.dumps(row) for row in rows]
    text = {"list": json.dumps(rows), "lines": "".join(line + "\n" for line in lines), "unended": "\n".join(lines)}[form]
    path.write_text(text)
    found = data.load_judged(path)
    assert path.read_text() == text                         # a user's file stays as it is
    assert [(r["instruction"], r["input"], r["response"], r["judgment"], r["refinement"]) for r in found] == wanted


@pytest.mark.parametrize("change, said", [
    ({"judgment": 3}, 'field "judgment" is 3'), ({"response": ""}, 'field "response" is empty'), ({"response": None}, 'field "response" is null'),
    ({"judgment": " "}, "null for a satisfying response"), ({"instruction": ["x"]}, 'field "instruction"'), ({"input": 5}, 'field "input"'),
    ({"DROP": "judgment"}, 'field "judgment" is missing'),
])
def test_a_bad_judged_response_is_named(change, said, tmp_path):
    good = {"instruction": "a", "input": "b", "response": "c", "judgment": "no"}
    bad = {**good, **change}
    bad.pop(bad.pop("DROP", ""), None)
    (tmp_path / "j.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(ValueError) as found:
        data.load_judged(tmp_path / "j.jsonl")
    assert "record 1" in str(found.value) and said in str(found.value)


@pytest.mark.parametrize("template", list(data.TEMPLATES))
@pytest.mark.parametrize("input", ["", "an input"])
def test_a_response_has_the_same_ids_under_every_prompt(template, input, tokenizer):
    form = data.find_template(template)
    for response in ("red", " red", "a : b ; c", "é", "1"):
        prompts = [form.render("do it", input), form.render("do it", input, "wrong : {input} and {judgment} .")]
        assert "wrong : {input} and {judgment} ." in prompts[1]
        rows = [data.encode_example(tokenizer, form, prompt, response, max_len=400) for prompt in prompts]
        first, second = ([i for i in row["labels"] if i != data.IGNORE_INDEX] for row in rows)
        assert first == second and first[-1] in data.stop_ids(tokenizer, prompts)
