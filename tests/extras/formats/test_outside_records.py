"""Judged responses, preferences, instruction data: every form that is read, and what is refused."""

import json
import random

import pytest

from extras.formats import (
    read_candidates,
    read_corpus,
    read_examples,
    read_instructions,
    read_judged,
    read_labelled,
)
from extras.formats.messages import ROLES, as_text


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# Judged responses ------------------------------------------------------------------------------

JUDGED = [  # a row, and what it means: instruction, input, response, judgment, refinement
    ({"instruction": "a", "input": "b", "response": "c", "judgment": "no"},
     [("a", "b", "c", "no", None)]),
    ({"instruction": "a", "input": None, "output": "c", "judgment": "no", "score": 7, "i_ans": "d"},
     [("a", "", "c", None, "d")]),
    ({"instruction": "a", "output": "c", "judgment": "no", "score": 6},
     [("a", "", "c", "no", None)]),
    ({"question": "a", "answer": "c", "feedback": "no", "output_correct": "e"},
     [("a", "", "c", "no", "e")]),
    ({"instruction": "a", "completions": [
        {"response": "c", "critique": "no", "overall_score": 4}, {"response": "x"},
        {"response": "d", "critique": "great", "overall_score": 9.0}]},
     [("a", "", "c", "no", None), ("a", "", "d", None, None)]),
    ({"data": {"passage": {"text": "p"}, "questions": [
        {"question": "q", "rankings": [0.1, 0.9], "answers": [{}, {
            "answer": "c", "feedback": {"critiques": [{"text": "no", "refinement": "r1"},
                                                      {"text": "never", "refinement": "r2"}]}}]},
        {"question": "q", "rankings": [1], "answers": [
            {"answer": "c", "feedback": {"critiques": [], "rating": 7}}]},
        {"question": "q", "rankings": [1], "answers": [
            {"answer": "c", "feedback": {"critiques": [{"text": "no", "refinement": ""}]}}]},
        {"question": "q", "rankings": [1], "answers": [
            {"answer": "c", "feedback": {"skip": True}}]}]}},
     [("p\nq", "", "c", "no never", "r2"), ("p\nq", "", "c", None, None)]),
]


@pytest.mark.parametrize("row, wanted", JUDGED)
@pytest.mark.parametrize("form", ["list", "lines", "unended"])
def test_every_form_of_judged_responses(row, wanted, form, tmp_path):
    texts = {"list": json.dumps([row]), "lines": as_lines([row]), "unended": json.dumps(row)}
    path = tmp_path / "j.txt"
    path.write_text(texts[form])
    names = ("instruction", "input", "response", "judgment", "refinement")
    found = read_judged(path)
    assert path.read_text() == texts[form]  # a user's file stays as it is
    assert [tuple(record[name] for name in names) for record in found] == wanted
    assert [record["id"] for record in found] == [str(k) for k in range(len(wanted))]


@pytest.mark.parametrize("change, words", [
    ({"judgment": 3}, 'field "judgment" is 3'), ({"response": ""}, 'field "response" is ""'),
    ({"response": None}, 'field "response" is null'),
    ({"judgment": " "}, "null for a satisfying response"),
    ({"instruction": ["x"]}, 'field "instruction"'), ({"input": 5}, 'field "input"'),
    ({"judgment": ...}, 'field "judgment" is missing; found: instruction, input, response'),
    ({"targets": [3]}, 'field "targets" is'),
    ({"data": {"passage": 1, "questions": [3]}}, "Expected judged responses"),
    ({"response": "x" * 4_000_001}, "holds a text of 4,000,001 characters"),
])
def test_a_bad_judged_response_is_named(change, words, tmp_path):
    good = {"instruction": "a", "input": "b", "response": "c", "judgment": "no"}
    bad = {name: value for name, value in (good | change).items() if value is not ...}
    (tmp_path / "j.jsonl").write_text(as_lines([good, bad]))
    with pytest.raises(ValueError) as caught:
        read_judged(tmp_path / "j.jsonl")
    assert f"{tmp_path / 'j.jsonl'}, record 1" in str(caught.value)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_files_without_records_are_named(tmp_path):
    for text, words in (("", "holds no list of records"), ("[]", "holds no list of records"),
                        ("[1]", "record 0 is 1. Expected an object"), ("{", "line 1, is not JSON")):
        (tmp_path / "f.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_judged(tmp_path / "f.json")
    with pytest.raises(ValueError, match="gone.json does not exist. Give a file of judged resp"):
        read_judged(tmp_path / "gone.json")


def test_the_cut_authors_first_iteration_reads_as_published(shared):
    found = read_judged(shared / "cut/train-alpaca-sample-iter1.json")
    satisfied = sum(record["judgment"] is None for record in found)
    failed = sum((record["judgment"] or "").strip() == "$ERROR$" for record in found)
    assert (len(found), satisfied, failed) == (1000, 713, 47)


# Candidates and preferences --------------------------------------------------------------------

USER, A, B = {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}, {
    "role": "assistant", "content": "bad"}
PAIR = [("good", 1.0), ("bad", 0.0)]
PREFERENCES = [  # a row, its prompt, its responses with rewards
    ({"prompt": " q\n", "chosen": " good\n", "rejected": "good"}, " q\n",
     [(" good\n", 1.0), ("good", 0.0)]),
    ({"prompt": "q", "chosen": [USER, A], "rejected": [USER, B]}, "q", PAIR),
    ({"prompt": [USER], "chosen": [A], "rejected": [B]}, "q", PAIR),
    ({"chosen": [USER, A], "rejected": [USER, B]}, "q", PAIR),
    ({"prompt": "q", "chosen": [USER, A], "rejected": [USER, B], "score_chosen": 8,
      "score_rejected": 3.5}, "q", [("good", 8.0), ("bad", 3.5)]),
    ({"conversations": [{"from": "human", "value": "q"}],
      "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
     "q", PAIR),
    ({"prompt": [{"role": "system", "content": "s"}, USER, A, USER], "chosen": "good",
      "rejected": "bad"}, "s\nuser: q\nassistant: good\nuser: q", PAIR),
    ({"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
     "q", PAIR),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: good",
      "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: bad"},
     "user: a\nassistant: b\nuser: q", PAIR),
    ({"instruction": "q", "completions": [{"response": "bad", "overall_score": 2},
                                          {"response": "good", "overall_score": 9.0},
                                          {"response": "x", "overall_score": None}]},
     "q", [("bad", 2.0), ("good", 9.0)]),
    ({"query": "q", "responses": ["bad", "good", "so so"], "scores": [-0.3, 0.9, 0.1]}, "q",
     [("bad", -0.3), ("good", 0.9), ("so so", 0.1)]),
]


@pytest.mark.parametrize("row, prompt, answers", PREFERENCES)
def test_every_form_of_preferences(row, prompt, answers, write, tmp_path):
    found = read_candidates(write(tmp_path / "p.json", [row]))
    assert [(record["response"], record["reward"]) for record in found] == answers
    for k, record in enumerate(found):
        rest = {name: value for name, value in record.items() if name not in ("response", "reward")}
        messages = rest.pop("messages", None)
        assert rest == {"task": "p", "id": "0", "instruction": prompt, "wording": prompt,
                        "input": "", "target": max(answers, key=lambda x: x[1])[0], "how": "file",
                        "sample": k, "expected": None, "correct": None}
        assert bool(messages) == ("\nuser: " in prompt)
        assert not messages or as_text(messages) == prompt


@pytest.mark.parametrize("row, words", [
    ({"prompt": "q"}, 'fields "chosen" and "rejected" are missing; found: prompt'),
    ({"chosen": "x", "rejected": "y"}, 'Give a field "prompt"'),
    ({"chosen": [USER, A], "rejected": [A, B]}, "no two dialogues that differ in their last turn"),
    ({"prompt": " ", "chosen": "x", "rejected": "y"}, "the prompt is empty"),
    ({"prompt": [A], "chosen": "x", "rejected": "y"}, "does not end with the user's turn"),
    ({"prompt": [{"role": "tool", "content": "x"}], "chosen": "x", "rejected": "y"}, "turn 0 is"),
    ({"prompt": "q", "chosen": 3, "rejected": "y"}, "3 is no response"),
    ({"prompt": "q", "chosen": "x", "rejected": "y", "score_chosen": "8"}, 'is "8". Expected a nu'),
    ({"chosen": "\n\nAssistant: x", "rejected": "\n\nAssistant: y"}, "is no dialogue that ends"),
    ({"query": "q", "responses": ["a"], "scores": [1, 2]}, "no lists of one length"),
    ({"query": "q", "responses": ["a"], "scores": [1]}, "has 1 responses with a score"),
    ({"query": "q", "responses": ["a", "b"], "scores": [1, float("nan")]}, "is NaN. Expected a nu"),
])
def test_a_bad_preference_is_named(row, words, write, tmp_path):
    good = {"prompt": "q", "chosen": "x", "rejected": "y"}
    with pytest.raises(ValueError) as caught:
        read_candidates(write(tmp_path / "p.json", [good, row]))
    assert f"{tmp_path / 'p.json'}, record 1" in str(caught.value) and words in str(caught.value)


def own_candidate(**changes):
    row = {"task": "t", "id": "1", "instruction": "i", "wording": "w", "input": "", "target": "x",
           "response": "r", "reward": 2, "how": "rule", "more": [1], "p_expected": 0.5} | changes
    return {name: value for name, value in row.items() if value is not ...}


def test_own_candidates_come_as_they_are(write, tmp_path):
    rows = [own_candidate(), own_candidate(reward=None, id=3, p_correct=None)]
    assert read_candidates(write(tmp_path / "c.json", rows)) == rows
    for change, words in (({"reward": "2"}, 'field "reward" is "2"'), ({"task": 3}, 'field "task"'),
                          ({"reward": ...}, 'field "reward" is missing'), ({"id": [1]}, "a number"),
                          ({"how": ...}, 'field "how" is missing'), ({"p_expected": []}, "is []")):
        with pytest.raises(ValueError) as caught:
            read_candidates(write(tmp_path / "c.json", [*rows, own_candidate(**change)]))
        assert "record 2" in str(caught.value) and words in str(caught.value)


def test_real_preferences(shared):
    found = read_candidates(shared / "preference/dpo_en_demo.json")
    assert len(found) == 600 and {record["reward"] for record in found} == {0.0, 1.0}


def test_labelled_pairs(write, tmp_path):
    side = {"wording": "w", "response": "r"}
    row = {"input": "i", "probability": 0.3, "first": side, "second": side, "more": 1}
    assert read_labelled(write(tmp_path / "l.json", [row])) == [row]
    for change, words in (({"probability": 1.5}, "a number from 0 to 1"),
                          ({"first": 3}, "first is 3"),
                          ({"second": {"wording": "w"}}, 'second: field "response" is missing')):
        with pytest.raises(ValueError, match=words):
            read_labelled(write(tmp_path / "l.json", [row | change]))


# Instructions, conversations, texts ------------------------------------------------------------


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def test_three_shapes_of_instruction_data(write, tmp_path):
    told = [{"role": "system", "content": "s"}, USER, A]
    rows = [{"instruction": "a", "input": None, "output": "b"}, {"instruction": "a", "output": " "},
            {"conversations": [gpt("hello"), human("q"), gpt("r"), human("s")]}, {"messages": told},
            {"conversations": [human("q")]}, {"conversations": [human("q"), gpt("")]},
            {"conversations": [human("q"), human("q"), gpt("r")]}]
    two = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    wanted = [{"instruction": "a", "input": "", "output": "b"}, {"messages": two},
              {"messages": told}]
    left_out = {"with an empty instruction or output": 1, "without an answer": 1,
                "with an empty turn": 1, "whose turns do not alternate": 1}
    assert read_examples(write(tmp_path / "x.json", rows)) == (wanted, left_out)
    (tmp_path / "x.jsonl").write_text(as_lines(rows))
    assert read_examples(tmp_path / "x.jsonl") == (wanted, left_out)
    with pytest.raises(ValueError, match=r"none of its records can be used \(1 without an ans"):
        read_examples(write(tmp_path / "x.json", rows[4:5]))


@pytest.mark.parametrize("speaker", ROLES)
def test_every_speaker_is_known(speaker, write, tmp_path):
    turns = [{"role": name, "content": name} for name in ("system", "user", "assistant")]
    given = [{"from": speaker if turn["role"] == ROLES[speaker] else turn["role"],
              "value": turn["content"]} for turn in turns]
    found = read_examples(write(tmp_path / "x.json", [{"conversations": given}]))
    assert found == ([{"messages": turns}], {})


@pytest.mark.parametrize("row, words", [
    (3, "record 1 is 3"), ({"prompt": "x"}, "it has the fields prompt. Expected {instr"),
    ({"instruction": "x", "output": 4}, 'field "output" is 4'),
    ({"messages": [{"role": ["x"], "content": "y"}]}, "turn 0 is"),
    ({"messages": "x"}, 'its conversation is "x"'),
    ({"messages": [{"role": "tool", "content": "x"}]}, "turn 0 is"),
    ({"conversations": [{"from": "human", "value": None}]}, "turn 0 is"),
    ({"messages": ["x"]}, 'turn 0 is "x"')])
def test_rows_of_another_shape_are_named(row, words, write, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        read_examples(write(tmp_path / "x.json", [{"instruction": "a", "output": "b"}, row]))
    assert "record 1" in str(caught.value)


def test_instructions_and_texts(write, tmp_path):
    rows = [{"instruction": "a", "input": "b", "dataset": "x"}, {"instruction": "a", "input": None}]
    assert read_instructions(write(tmp_path / "i.json", rows)) == rows
    for bad in ({"instruction": " "}, {"input": "x"}, {"instruction": "a", "input": [1]}, 3):
        with pytest.raises(ValueError, match="record 0"):
            read_instructions(write(tmp_path / "i.json", [bad]))
    documents = [[["a", False], ["b", True]], [["c", 1]]]
    (tmp_path / "c.jsonl").write_text(as_lines(documents))
    assert read_corpus(tmp_path / "c.jsonl") == documents
    for bad in ([], [["a"]], [["a", "b"]], "ab", {"a": 1}, [[1, True]], 3, [["a", True, 1]], [[]]):
        (tmp_path / "c.jsonl").write_text(as_lines([*documents, bad]))
        with pytest.raises(ValueError, match=r"line 3.* is .*Expected a list of \[text, true"):
            read_corpus(tmp_path / "c.jsonl")


def test_order_of_rows_does_not_matter_for_what_they_are(tmp_path):
    rng, rows = random.Random(0), [row for row, _ in JUDGED for _ in range(3)]
    rng.shuffle(rows)
    (tmp_path / "j.jsonl").write_text(as_lines(rows))
    found = read_judged(tmp_path / "j.jsonl")
    one_by_one = []
    for row in rows:
        (tmp_path / "one.jsonl").write_text(as_lines([row]))
        one_by_one += read_judged(tmp_path / "one.jsonl")
    for one, other in zip(found, one_by_one, strict=True):
        assert one | {"id": ""} == other | {"id": ""}
