"""Files of responses: every form that is read, what is refused, and damage."""

import csv
import io
import json
import random
import re
import warnings

import numpy as np
import pytest
from damage import NASTY, spoilt, spoilt_text

from eval import evaluate_responses
from extras.formats.responses import read_files, read_responses
from extras.reports.agreement import match_questions
from extras.reports.metrics import paired_difference
from judge import RuleJudge

WORDS = ["red", "a blue lamp", "8", "", "it's \"so\", he said", "línea\nnueva", "猫; 犬", "\ttab",
         "x,y", " spaced ", "null", "3.50", "\u2028", "=1+1", "'", "[3, 4]", "'#'"]
# The names of columns that mean the same.
NAMES = {"question": ["question", "question_id", "id", "doc_id"],
         "wording": ["wording", "paraphrase", "prompt"],
         "response": ["response", "completion", "prediction"],
         "target": ["target", "targets", "reference", "references", "output"]}


def make_questions(rng, models=1):
    """{model: questions}, as random as a file may hold them."""
    found, styles = {f"model {k}": [] for k in range(models)}, rng.random() < 0.5
    for number in range(rng.randint(1, 6)):
        count = rng.randint(2, 5)
        wordings = [f"wording {rng.choice(WORDS)} {k}" for k in range(count)]
        wordings += rng.choices(wordings, k=rng.randint(0, 2))  # sampled several times
        question = {"task": rng.choice(["colours", "places"]), "input": rng.choice(WORDS),
                    "id": f"{rng.choice(WORDS)} {number}", "unfinished": 0, "labels": None,
                    "wordings": wordings,
                    "targets": rng.sample([x for x in WORDS if x], rng.randint(0, 3)),
                    "styles": [rng.choice(["", "terse"]) * styles for _ in wordings]}
        for asked in found.values():
            asked.append(question | {"responses": rng.choices(WORDS, k=len(wordings))})
    return found


def as_rows(questions, rng, names):
    """A row per response, those of the models mixed."""
    columns = []
    for model, asked in questions.items():
        rows = []
        for question in asked:
            # A list of one may be the text itself.
            targets, counts = question["targets"], {}
            if len(targets) == 1 and not targets[0].startswith("["):
                targets = targets[0]
            parts = (question[name] for name in ("wordings", "responses", "styles"))
            for wording, response, style in zip(*parts, strict=True):
                counts[wording] = counts.get(wording, 0) + 1
                row = {"model": model, "task": question["task"], "input": question["input"],
                       names["question"]: question["id"], names["wording"]: wording,
                       names["response"]: response, "style": style, "sample": counts[wording]}
                if targets:
                    row[names["target"]] = targets
                rows.append(row)
        columns.append(rows)
    mixed = []
    while any(columns):
        mixed.append(rng.choice([rows for rows in columns if rows]).pop(0))
    return mixed


def write_file(folder, rows, form, rng):
    """The path of a file of the rows."""
    path = folder / f"answers {rng.randrange(10**9)}.{form}"
    if form == "json":
        text = json.dumps(rows, ensure_ascii=rng.random() < 0.5)
    elif form == "jsonl":
        text = "".join(json.dumps(row) + "\n" + "\n" * (rng.random() < 0.2) for row in rows)
    else:
        stream, columns = io.StringIO(), list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.writer(stream, delimiter="," if form == "csv" else "\t",
                            lineterminator=rng.choice(["\n", "\r\n"]),
                            quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        writer.writerow(columns)
        for row in rows:
            cells = [row.get(name, "") for name in columns]
            writer.writerow([json.dumps(x) if isinstance(x, list) else x for x in cells])
        text = stream.getvalue()
    path.write_bytes(text.encode(rng.choice(["utf-8", "utf-8-sig", "utf-16"])))
    return path


def plain(questions):
    """Without the fields that rows do not say, and the styles sorted out."""
    return [{name: part for name, part in question.items() if name != "instruction"}
            for question in questions]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder. Give a file of answers, such as its quest"):
        read_files([tmp_path])


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv"])
def test_random_files_are_read_back(form, tmp_path):
    rng = random.Random()
    for _ in range(30):
        wanted = make_questions(rng, rng.randint(1, 3))
        names = {column: rng.choice(some) for column, some in NAMES.items()}
        path = write_file(tmp_path, as_rows(wanted, rng, names), form, rng)
        found = read_responses(path)
        assert found.keys() == wanted.keys()
        for model, questions in wanted.items():
            assert plain(found[model]) == questions, path
        for question in next(iter(found.values())):
            shown = question["id"] * (names["question"] == "question")
            assert question["instruction"] == shown


def test_what_a_file_need_not_say(tmp_path):
    path = tmp_path / "gpt-x.jsonl"
    path.write_text("".join(json.dumps({"id": 7, "wording": k, "response": k / 2}) + "\n"
                            for k in range(3)))
    (model, (question,)), = read_responses(path).items()
    assert model == "gpt-x" and question == {
        "task": "gpt-x", "id": "7", "instruction": "", "input": "", "targets": [], "labels": None,
        "wordings": ["0", "1", "2"], "styles": [""] * 3, "responses": ["0.0", "0.5", "1.0"],
        "unfinished": 0}


def test_metrics_of_responses_are_those_of_a_hand(tmp_path):
    """Two of three answers agree: CR 1/3, MCR 2/3; those that match the target are 2/3."""
    path = tmp_path / "answers.csv"
    path.write_text("question,wording,response,target\n" + "".join(
        f"legs,{k},{said},8\n" for k, said in enumerate(["8 legs", "8", "seven"])))
    (_, questions), = read_responses(path).items()
    metrics, _ = evaluate_responses(questions, RuleJudge())
    assert metrics["cr"]["mean"] == pytest.approx(1 / 3)
    assert metrics["mcr"]["mean"] == pytest.approx(2 / 3)
    assert metrics["exact_match"]["mean"] == pytest.approx(1 / 3)


def test_a_single_wording_is_left_out_and_counted(tmp_path):
    rows = [{"question": name, "wording": w, "response": "x"}
            for name, w in (("a", 1), ("b", 1), ("b", 2), ("c", 1), ("c", 1))]
    path, said = tmp_path / "r.json", []
    path.write_text(json.dumps(rows))
    found = read_responses(path, said.append)
    assert [question["id"] for question in found["r"]] == ["b"]
    assert said == [f"{path}: 2 of 3 questions have one wording only, and are left out."]
    path.write_text(json.dumps(rows[:1] + rows[3:]))
    with pytest.raises(ValueError, match="none of its 2 questions was asked in two wordings, and"):
        read_responses(path)


def test_warnings_go_to_the_screen(tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"id": n, "wording": w, "response": "x"}
                                for n, w in ((1, 1), (1, 2), (2, 1))]))
    read_responses(path)
    assert capsys.readouterr().err.startswith(f"warning: {path}: 1 of 2 questions have one wording")


# ----- Other programs' -----

def harness_row(doc, prompt, texts, **more):
    """A sample as lm-evaluation-harness logs it."""
    return {"doc_id": doc, "doc": {"question": f"q{doc}"}, "target": doc * 2,
            "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {"until": ["\n"]}}},
            "resps": [texts], "filtered_resps": texts, "filter": "none", "doc_hash": "d",
            "exact_match": 1.0, **more}


def test_samples_of_the_evaluation_harness(tmp_path):
    rows = [harness_row(doc, f"{frame} {doc}?", texts)
            for frame in ("What is", "Tell me") for doc, texts in ((0, ["0"]), (21, ["42", "41"]))]
    rows[0]["arguments"] = [["What is 0?", {"until": ["\n"]}]]  # as older versions log it
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_responses(path)["samples"]
    assert (first["id"], first["wordings"], first["responses"], first["targets"]) == (
        "0", ["What is 0?", "Tell me 0?"], ["0", "0"], ["0"])
    assert (second["responses"], second["targets"]) == (["42", "41", "42", "41"], ["42"])
    assert second["wordings"] == ["What is 21?"] * 2 + ["Tell me 21?"] * 2


@pytest.mark.parametrize("change, said", [
    ({"filter": "strict-match"}, "are answers after several filters (none, strict-match), so"),
    ({"filtered_resps": [[-1.5, False]]}, "scores of answers to choose from are no responses"),
    ({"filtered_resps": "42"}, 'filtered_resps is "42". Expected a list of texts'),
    ({"arguments": {}}, "wording is {}. Expected a text or a number"),
    ({"target": 3}, 'the target of question "1" is ["3"], and in')])
def test_samples_that_cannot_be_measured(change, said, tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [harness_row(1, "a", ["x"]), harness_row(1, "b", ["x"]) | change]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_responses(path)
    assert f"{path}, record 1" in str(caught.value)


def test_our_own_table_is_read_back_and_measures_the_same(tmp_path):
    rng = random.Random()
    path, judge = tmp_path / "questions.jsonl", RuleJudge()
    for _ in range(10):
        asked, metrics, lines = make_questions(rng, 2), {}, []
        for model, questions in asked.items():
            for question in questions:
                question |= {"instruction": "do it", "unfinished": rng.randrange(3)}
                question["labels"] = rng.choice([None, ["red", "8", "null"]])
            metrics[model], rows = evaluate_responses(questions, judge)
            lines += [json.dumps({"model": model, **row}) + "\n" for row in rows]
        path.write_text("".join(lines))
        found = read_responses(path)
        assert found == asked
        for model, questions in found.items():
            assert evaluate_responses(questions, judge)[0] == metrics[model]


@pytest.mark.parametrize("change, said", [
    ({"responses": None}, "responses is null. Expected a list, as in the questions.jsonl"),
    ({"wordings": ["a"]}, "has 1 wordings, 2 responses and 2 styles"),
    ({"styles": 3}, "styles is 3. Expected a list"), ({"labels": "x"}, 'labels is "x"'),
    ({"unfinished": True}, "unfinished is true. Expected how many"),
    ({"id": "2", "responses": ["x", None]}, "the response is null, so this request was never"),
    ({"model": "m"}, 'sample "0 of one row" of wording "a" of question "1" is in')])
def test_tables_that_are_not_ours(change, said, tmp_path):
    row = {"model": "m", "task": "t", "id": "1", "input": "", "targets": [], "wordings": ["a", "b"],
           "styles": ["", ""], "responses": ["x", "y"], "unfinished": 0}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(ValueError, match=re.escape(said)):
        read_responses(path)


def test_files_of_several_models_are_compared_question_by_question(tmp_path):
    """Whatever the files are called, and in whatever order their rows are."""
    rng, names, files = random.Random(), list("pqr"), []
    for model, answers in (("one", "xy"), ("two", "xx")):
        rng.shuffle(names)
        rows = [{"question": q, "wording": w, "response": answer, "target": "x"}
                for q in names for w, answer in enumerate(answers)]
        files.append(tmp_path / f"{model}.json")
        files[-1].write_text(json.dumps(rows))
    found = read_files(files)
    tables = {model: evaluate_responses(asked, RuleJudge())[1] for model, asked in found.items()}
    matched = match_questions(tables)
    assert len(matched) == 3 and all(len(rows) == 2 for rows in matched)
    before, after = ([rows[model] for rows in matched] for model in ("one", "two"))
    assert paired_difference(before, after, "cr")["mean"] == 1
    assert paired_difference(before, after, "exact_match")["mean"] == 0.5
    assert read_files(files[:1])["one"][0]["task"] == "one"
    rows = [row | {"target": "z"} for row in rows]
    files[1].write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=re.escape('" is ["x"] in ') + ".*" + re.escape(
            f'["z"] in {files[1]}. Make them equal, or tell the questions apart in a column')):
        read_files(files)
    files[1].write_text(json.dumps([row | {"task": "other"} for row in rows]))
    assert {x["task"] for x in read_files(files)["two"]} == {"other"}


def test_prompts_may_be_messages_of_a_chat(tmp_path):
    path, system = tmp_path / "r.json", {"role": "system", "content": "be brief"}
    rows = [{"id": 1, "prompt": [system, {"role": "user", "content": text}], "response": "8"}
            for text in ("How many legs?", "Its legs?")]
    path.write_text(json.dumps(rows))
    [question] = read_responses(path)["r"]
    assert question["wordings"] == ["be brief\nHow many legs?", "be brief\nIts legs?"]


# ----- Mistakes -----

GOOD = {"question": "q", "wording": "w", "response": "r", "target": "t"}


@pytest.mark.parametrize("row, said", [
    ({"question": "q", "wording": "w"}, "has no response (response or completion or"),
    ({"wording": "w", "response": "r"}, "has no question (question or question_id or id or"),
    ({"question": "q", "response": "r"}, "found: question, response. Expected responses: rows"),
    (GOOD | {"response": None}, "so this request was never answered. Ask again, or delete"),
    (GOOD | {"response": True}, "response is true. Expected a text or a number"),
    (GOOD | {"question": " "}, "question or wording is empty"),
    (GOOD | {"wording": ""}, "question or wording is empty"),
    (GOOD | {"target": ["t", "u"]}, 'the target of question "q" is ["t", "u"], and in'),
    (GOOD | {"target": {"a": 1}}, 'target is {"a": 1}. Expected a text or'),
    (GOOD | {"model": []}, "model is []. Expected a text"),
    (GOOD | {"model": "m\x1b[31m"}, "model is \"m\\u001b[31m\". Expected a name on one line."),
    ({"key": "k", "request": {}, "text": "x"}, "is an answer as the client of servers keeps it."),
    (GOOD | {"response": float("nan")}, "response is NaN"),
    ("x", 'is "x". Expected an object')])
def test_mistakes_name_the_file_and_the_record(row, said, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps([GOOD, GOOD | {"wording": "v"}, row]))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_responses(path)
    assert f"{path}, record 2" in str(caught.value) and "\n" not in str(caught.value)


def test_a_sample_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps([GOOD | {"sample": 1}, GOOD | {"sample": 2}, GOOD | {"sample": 1}]))
    with pytest.raises(ValueError, match='record 2: sample "1" of wording "w" of question "q" is'):
        read_responses(path)


def test_models_are_compared_on_the_same_wordings_only(tmp_path):
    path = tmp_path / "r.json"
    rows = [GOOD | {"model": model, "wording": w, "question": q, "response": f"{model}{w}{q}"}
            for model in "ab" for q in "xy" for w in "123"]
    path.write_text(json.dumps(rows[:6] + rows[:5:-1]))  # the second model's the other way round
    found = read_responses(path)
    assert [x["wordings"] for x in found["b"]] == [x["wordings"] for x in found["a"]]
    assert [x["responses"] for x in found["b"]] == [["b1x", "b2x", "b3x"], ["b1y", "b2y", "b3y"]]
    for left, said in (
            (rows[:-1], '"b" has fewer responses than "a" to wording "3" of question "y". Give'),
            (rows[:5] + rows[6:], '"b" has more responses than "a" to question "y". Give each'),
            (rows[:-3], '1 questions of model "a" were not put to "b", for example "r y'),
            (rows[3:], '1 questions of model "b" were not put to "a", for example "r x')):
        path.write_text(json.dumps(left))
        with pytest.raises(ValueError, match=re.escape(said)):
            read_responses(path)


@pytest.mark.parametrize("text, said", [
    ("question,wording,response\nq,w\n", "record 0 has 2 columns, and the first line names 3"),
    ('question,wording,response\nq,w,"r\n', "is no line of a table"), ("", "holds no list of"),
    ("question,wording,response\n", "holds no list of records")])
def test_tables_that_are_damaged(text, said, tmp_path):
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_responses(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_responses(tmp_path / "gone.csv")


def test_whatever_is_damaged_is_read_or_refused_in_a_sentence(tmp_path):
    rng, refused = random.Random(), 0
    warnings.simplefilter("ignore")
    for number in range(600):
        names = {column: some[0] for column, some in NAMES.items()}
        rows = as_rows(make_questions(rng, rng.randint(1, 2)), rng, names)
        if rng.random() < 0.3:
            rows = [harness_row(1, "a", ["x"]), harness_row(1, "b", ["x"])]
        form = rng.choice(["json", "jsonl", "csv"])
        path = tmp_path / f"{number}.{form}"
        if rng.random() < 0.5:
            rows = spoilt(rows, rng) if rng.random() < 0.9 else rng.choice(NASTY)
            path.write_text(json.dumps(rows))
        else:
            good = write_file(tmp_path, rows, form, rng)
            path.write_bytes(spoilt_text(good.read_bytes().decode("utf-8", "replace"), rng))
        try:
            found = read_responses(path, lambda text: None)
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
            continue
        for questions in found.values():
            metrics, table = evaluate_responses(questions, RuleJudge())
            assert len(table) == len(questions) and np.isfinite(metrics["mcr"]["mean"])
    assert 100 < refused < 600
