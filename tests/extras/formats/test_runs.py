"""What is checked before a run, and what is left out of the records it is given."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

import data
import train
from extras.formats.chat import JinjaTemplate
from extras.formats.runs import check_tasks, example_items, fitting_records, usable_candidates
from methods.groups import candidate_document
from methods.pairing import labelled_items, pair_items
from methods.settings import parse_config


@pytest.fixture
def make_run(arguments, tmp_path):
    """make_run(stage, *flags): a run of the tiny world as train.py makes it, with its checks."""
    def make(stage, *more):
        cfg, method = parse_config(["--stage", stage, *arguments(
            tmp_path / "run", *more, stage=stage)])
        return train.make_run(cfg, method, train.Alone())
    return make


def write_rows(path, rows):
    """Rows as JSON Lines; returns the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ----- Tasks -----

@pytest.mark.parametrize("stage, framed", [("sft", True), ("cat", True), ("cut", False)])
def test_tasks_without_paraphrases_are_framed_where_wordings_are_read(
        stage, framed, make_run, capsys):
    run = make_run(stage, "--paraphrases", "")
    said = "2 of 2 tasks have no paraphrases" in capsys.readouterr().out
    assert said == framed
    assert all(bool(task.wordings) == framed for task in run.tasks)
    make_run(stage)
    assert "no paraphrases" not in capsys.readouterr().out


@pytest.mark.parametrize("wordings, stage, said", [
    (["a", "b"], "sft", "no task has two held-out wordings in split 'dev'"),
    ({"dev": ["a", "b"]}, "sft-ia", "no training wordings for any of the 2 tasks"),
    ({"dev": ["a", "b"]}, "cat", "no training wordings for any of the 2 tasks"),
    ({"test": ["a", "b"]}, "sft", "no task has two held-out wordings in split 'dev'")])
def test_tasks_without_the_wordings_that_a_stage_needs_are_refused(
        wordings, stage, said, make_run, tmp_path):
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"colour": wordings, "person": wordings}))
    with pytest.raises(ValueError, match=said):
        make_run(stage, "--paraphrases", str(file))
    if stage == "sft":
        make_run(stage, "--paraphrases", str(file), "--no-evaluate")
    if "test" in wordings:
        make_run(stage, "--paraphrases", str(file), "--split", "test")


def test_judged_stages_need_held_out_instances_and_no_wordings():
    def cfg(**more):
        return SimpleNamespace(**{"evaluate": True, "split": "dev"} | more)
    instances = [data.Instance(str(k), f"input {k}", ("x",)) for k in range(50)]
    task = data.Task("t", "do", instances)
    check_tasks([task], cfg(), "judged")
    task.instances = data.split_instances(task, "train")
    with pytest.raises(ValueError, match="no instance of the 1 tasks falls into split 'dev'"):
        check_tasks([task], cfg(), "judged")
    check_tasks([task], cfg(evaluate=False), "judged")


# ----- Model, template, records -----

def test_a_model_that_names_other_ids_than_its_tokenizer_is_told(make_run, world, tmp_path, capsys):
    shutil.copytree(world / "model", tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [7]}))
    make_run("sft", "--model", str(tmp_path / "model"))
    assert "warning: config.json of" in capsys.readouterr().out
    make_run("sft")
    assert "warning" not in capsys.readouterr().out


def test_what_a_run_is_given_is_read_before_anything_is_trained(make_run, tmp_path):
    with pytest.raises(ValueError, match="template chatml ends responses with '<.im_end.>', which"):
        make_run("sft", "--template", "chatml")
    (tmp_path / "bad.jsonl").write_text('{"response": "x", "reward": "high"}\n')
    with pytest.raises(ValueError, match="bad.jsonl"):
        make_run("cat", "--candidates", str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x"}\n')
    with pytest.raises(ValueError, match="bad.jsonl"):
        make_run("cut", "--records", str(tmp_path / "bad.jsonl"))


# ----- What is left out -----

def test_judged_responses_that_do_not_fit_are_left_out_and_counted(
        make_run, judged, tmp_path, capsys):
    rows = data.read_records(judged)
    rows[3]["response"] = "red hat " * 40  # it satisfies, so that no judgment stands before it
    rows[4]["judgment"] = "wrong : blue " * 20
    path = write_rows(tmp_path / "long.jsonl", rows)
    for stage, left in (("cut", [3, 4]), ("unlikelihood", [3])):  # the second reads no judgments
        run = make_run(stage, "--records", path, "--max-len", "60")
        capsys.readouterr()
        found = fitting_records(run, rows)
        assert found == [row for k, row in enumerate(rows) if k not in left]
        assert capsys.readouterr().out == (
            f"{stage}: of the records of {path}, these are left out: {len(left)} longer than "
            "--max-len 60 allows.\n")
    assert fitting_records(make_run("cut", "--records", path), rows) == rows
    with pytest.raises(ValueError, match="all 2 records are longer than --max-len 60 allows"):
        fitting_records(run, [rows[3]] * 2)


def test_other_peoples_answers_that_are_empty_or_too_long_are_left_out_and_counted(
        make_run, tmp_path, capsys):
    rows = [{"prompt": f"what is hat {k} ?", "chosen": "red", "rejected": "a blue one"}
            for k in range(3)]
    rows[1]["rejected"] = ""
    rows[2]["rejected"] = "blue hat " * 30
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    run = make_run("cat", "--candidates", path, "--max-len", "60")
    capsys.readouterr()
    found = usable_candidates(path, run)
    assert [(x["id"], x["response"]) for x in found] == [
        ("0", "red"), ("0", "a blue one"), ("1", "red"), ("2", "red")]
    said = f"cat: 2 of 6 answers of {path} are empty or longer than --max-len 60 allows"
    assert said in capsys.readouterr().out
    assert usable_candidates(path, run) == found and capsys.readouterr().out == ""  # said once


def test_a_runs_own_candidates_are_all_taken(make_run, candidates, capsys):
    run = make_run("cat", "--candidates", str(candidates), "--max-len", "20")
    assert usable_candidates(candidates, run) == data.read_records(candidates)
    assert "left out" not in capsys.readouterr().out


def test_examples_become_items_and_what_is_left_out_is_said(make_run, tmp_path, capsys):
    rows = [{"instruction": "give the colour .", "input": "a red hat", "output": "red"},
            {"instruction": "say {input}", "input": "", "output": "hat"},
            {"instruction": "do", "input": "", "output": " "},
            {"instruction": "do", "input": "", "output": "red hat " * 60},
            {"conversations": [{"from": "human", "value": "hi"}]}]
    path = write_rows(tmp_path / "examples.jsonl", rows)
    run = make_run("sft", "--examples", path, "--max-len", "60", "--judge-share", "0")
    capsys.readouterr()
    items = example_items(run)
    texts = [run.tokenizer.decode(item["documents"][0]["input_ids"]) for item in items]
    assert texts == ["### Instruction: give the colour .\n### Input: a red hat\n### Response: red",
                     "### Instruction: say {input}\n### Response: hat"]
    for item in items:
        document, = item["documents"]
        labels = [label for label in document["labels"] if label != data.IGNORE_INDEX]
        assert run.tokenizer.decode(labels) in ("red", "hat")
        assert labels[-1] == run.tokenizer.eos_id
    said = capsys.readouterr().out
    for reason in ("sft: 2 examples", "1 with an empty instruction or output", "1 without an answ",
                   "1 whose first answer is longer than --max-len 60"):
        assert reason in said


@pytest.mark.parametrize("weights, numbers", [
    ([], [6, 2]), (["3", "1"], [6, 2]), (["1", "1"], [6, 6]), (["1", "2"], [6, 12]),
    (["1", "0.5"], [6, 3])])
def test_files_are_mixed_by_weight_and_the_rarer_is_repeated(
        weights, numbers, make_run, tmp_path, capsys):
    files = []
    for name, n in (("a", 6), ("b", 2)):
        rows = [{"instruction": "say", "input": f"{name} {k}", "output": "red"} for k in range(n)]
        files.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    mix = ["--mix", *weights] if weights else []
    run = make_run("sft", "--examples", *files, *mix, "--judge-share", "0")
    capsys.readouterr()
    items = example_items(run)
    names = Counter(item["name"] for item in items)
    for number, path, own in zip(numbers, files, (6, 2), strict=True):
        counts = [names[f"{path}, example {k}"] for k in range(own)]
        assert sum(counts) == number and max(counts) - min(counts) <= 1
    assert len(items) == sum(numbers)
    said = capsys.readouterr().out
    for number, path, own in zip(numbers, files, (6, 2), strict=True):
        line = f"sft: in a pass {number} examples of {path}, which has {own}."
        assert (line in said) == bool(weights)


def test_a_file_of_which_nothing_fits_is_named(make_run, tmp_path):
    good, long = (write_rows(tmp_path / f"{name}.jsonl", [
        {"instruction": "say", "input": "", "output": text}]) for name, text in
        (("good", "red"), ("long", "red hat " * 60)))
    run = make_run("sft", "--examples", good, long, "--max-len", "40", "--judge-share", "0")
    with pytest.raises(ValueError, match="long.jsonl: none of its 1 examples can be learnt"):
        example_items(run)


def turns(*texts):
    """A conversation in which user and assistant say these."""
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def learnt(run, items):
    """What each item teaches to say."""
    found = []
    for item in items:
        labels = [x for x in item["documents"][0]["labels"] if x != data.IGNORE_INDEX]
        found.append(run.tokenizer.decode(labels))
    return found


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_the_answers_that_are_learnt_are_those_that_were_asked_for(
        train_on, make_run, tmp_path, capsys):
    one = turns("who ?", "red", "which ?", "hat")
    first = [*one[:1], one[1] | {"weight": 0}, *one[2:]]
    last = [*one[:3], one[3] | {"weight": 0}]
    long = turns("who ?", "red", "which ?", "hat " * 60)
    rows = [{"messages": one}, {"messages": first}, {"prompt": one[:2] + turns("and ?"),
                                                      "completion": turns("", "blue")[1:]},
            {"messages": last}, {"messages": long}]
    rows[2]["prompt"][1] = rows[2]["prompt"][1] | {"weight": 1}  # a prompt is not learnt
    path = write_rows(tmp_path / "examples.jsonl", rows)
    run = make_run("sft", "--examples", path, "--max-len", "60", "--judge-share", "0",
                   "--train-on", train_on)
    capsys.readouterr()
    found = learnt(run, example_items(run))
    said = capsys.readouterr().out
    if train_on == "all":  # of what is too long, the turns that fit
        assert found == ["red hat", "hat", "blue", "red", "red"] and "left out" not in said
    else:
        assert found == ["hat", "hat", "blue"]
        assert "left out 1 of whose learnt answers none fits --max-len 60" in said
        assert "left out 1 whose last answer is longer than --max-len 60" in said


def test_learning_last_answers_needs_conversations(make_run):
    with pytest.raises(ValueError, match="--train-on last is about conversations. Add --examples"):
        make_run("sft", "--train-on", "last")


@pytest.mark.parametrize("template", ["plain", "vicuna", "llama2"])
@pytest.mark.parametrize("system", [None, "be kind"])
def test_a_preference_in_a_dialogue_has_the_ids_of_sft_and_chat(
        template, system, make_run, tmp_path):
    said = turns("who ?", "red hat", "which {input} ?")
    row = {"prompt": said, "chosen": "anna", "rejected": " tom", "system": system}
    path = write_rows(tmp_path / "pairs.jsonl", [row])
    answers = [write_rows(tmp_path / f"{k}.jsonl", [
        {"messages": [*said, *turns("", text)[1:]], "system": system}])
        for k, text in enumerate(("anna", " tom"))]
    more = ["--template", template, "--judge-share", "0"]
    dpo = make_run("dpo", "--candidates", path, *more)
    (pair,) = pair_items(dpo)
    for document, file in zip(pair["documents"], answers, strict=True):
        (item,) = example_items(make_run("sft", "--examples", file, *more))
        assert document["input_ids"] == item["documents"][0]["input_ids"]
    messages = usable_candidates(path, dpo)[0]["messages"]
    prompt = dpo.tokenizer.encode_prompt(dpo.template.render_conversation(messages))
    assert document["input_ids"][:len(prompt)] == prompt


@pytest.mark.parametrize("opening, said", [("", True), ("{opening}", False)])
def test_a_system_that_a_template_does_not_show_is_said(opening, said, make_run, tmp_path, capsys):
    template = tmp_path / "t.json"
    template.write_text(json.dumps({"turn": opening + "{user}:", "opening": "{system}\n"}))
    row = {"conversations": turns("who ?"), "system": "be kind", "chosen": "anna",
           "rejected": "tom"}
    path = write_rows(tmp_path / "pairs.jsonl", [row, row | {"system": ""}])
    run = make_run("dpo", "--candidates", path, "--template", str(template))
    usable_candidates(path, run)
    sentence = f"dpo: template {template} has no place for a system, so what it says is not used."
    assert (sentence in capsys.readouterr().out) == said


def test_equal_answers_and_broken_dialogues_are_left_out_and_counted(make_run, tmp_path, capsys):
    rows = [{"prompt": "q", "chosen": "    return 1", "rejected": "return 1"},
            {"prompt": "q", "chosen": "same", "rejected": "same"},
            {"prompt": turns("a", "b") * 2, "chosen": "x", "rejected": "y"}]
    rows[2]["prompt"] = [*turns("a"), *turns("b")]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    run = make_run("dpo", "--candidates", path)
    capsys.readouterr()
    assert [x["response"] for x in usable_candidates(path, run)] == ["    return 1", "return 1"]
    assert (f"dpo: of the records of {path}, these are left out: 1 whose answers are all the same, "
            "1 whose turns do not alternate.") in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of its records can be used .1 whose answers are al"):
        usable_candidates(write_rows(tmp_path / "same.jsonl", rows[1:2]), make_run("dpo"))


def test_a_mark_stands_before_what_the_user_says_last(make_run, tmp_path):
    rows = [{"prompt": turns("who ?", "tom", f"hat {k} ?"), "chosen": "red", "rejected": "blue"}
            for k in range(2)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    run = make_run("sft", "--template", "plain")
    record = usable_candidates(path, run)[0]
    for mark in ("", "good : "):
        ids = candidate_document(run, record, mark)["input_ids"]
        text = run.tokenizer.decode(ids)
        assert text.startswith("### Instruction: who ?\n### Response: tom")
        assert text.endswith(f"\n### Instruction: {mark}hat 0 ?\n### Response: red")


def test_soft_labels_of_dialogues_are_asked_as_dialogues(make_run, tmp_path):
    rlaif = pytest.importorskip("methods.rlaif")
    row = {"prompt": turns("who ?", "tom", "sure ?"), "chosen": "yes", "rejected": "no"}
    path = write_rows(tmp_path / "pairs.jsonl", [row])
    run = make_run("rlaif", "--candidates", path)
    group = usable_candidates(path, run)
    (pair,) = rlaif.answer_pairs(run, group)
    assert pair["messages"] == row["prompt"] and pair["instruction"].startswith("user: who ?\n")
    labelled = write_rows(tmp_path / "labelled.jsonl", [pair | {"probability": 0.7}])
    (item,) = labelled_items(run, labelled)
    wanted = {x["response"]: candidate_document(run, x) for x in group}
    assert item["documents"] == [wanted[pair[side]["response"]] for side in ("first", "second")]


def test_single_answers_with_labels_are_for_methods_that_take_them(make_run, tmp_path):
    rows = [{"prompt": f"what is hat {k} ?", "completion": "red", "label": k % 2 == 0}
            for k in range(4)]
    path = write_rows(tmp_path / "labels.jsonl", rows)
    with pytest.raises(ValueError) as caught:
        make_run("dpo", "--candidates", path)
    assert str(caught.value) == (
        f"{path} holds single answers (prompt, completion and label), and --stage dpo compares "
        "answers. Use --stage kto, or give chosen and rejected answers.")
    run = make_run("kto", "--candidates", path)
    assert len(usable_candidates(path, run)) == 4
    items = [(item["name"], item["values"]["desirable"]) for item in run.method.items(run)]
    assert sorted(items) == [(f"labels/{k}", [float(k % 2 == 0)]) for k in range(4)]


def test_what_a_chat_template_cannot_write_is_left_out_and_said(make_run, tmp_path, capsys):
    """One that takes no system message, and one dialogue of preferences with such."""
    source = ("{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
              "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
              "{% if add_generation_prompt %}assistant: {% endif %}")
    template = JinjaTemplate.make(source, {"eos_token": "</s>"}, ["</s>"])
    asked, told = turns("who ?"), [{"role": "system", "content": "be kind"}]
    rows = [{"messages": [*told, *turns("who ?", "red")]}, {"messages": turns("who ?", "hat")}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    run = make_run("sft", "--examples", path, "--judge-share", "0")
    items = example_items(replace(run, template=template))
    said = capsys.readouterr().out
    assert learnt(run, items) == ["hat"] and (
        "left out 1 that the template cannot write (the chat template says: No system. Change the "
        "data, or name another template with --template.)") in said
    pairs = [{"prompt": before + asked, "chosen": turns("", "red")[1:],
              "rejected": turns("", "hat")[1:]} for before in (told, turns("a", "b"))]
    run = make_run("dpo", "--candidates", write_rows(tmp_path / "b.jsonl", pairs))
    run = replace(run, template=template)
    assert len(usable_candidates(run.cfg.candidates, run)) == 2
    assert "left out: 2 that the template cannot write" in capsys.readouterr().out
    run = make_run("dpo", "--candidates", write_rows(tmp_path / "b.jsonl", pairs[:1]))
    with pytest.raises(ValueError, match="the template can write none of the dialogues"):
        usable_candidates(run.cfg.candidates, replace(run, template=template))


def test_answers_labelled_bad_are_no_examples(make_run, tmp_path, capsys):
    rows = [{"prompt": "who ?", "completion": text, "label": label}
            for text, label in (("red", True), ("hat", False))]
    path = write_rows(tmp_path / "a.jsonl", rows)
    run = make_run("sft", "--examples", path, "--judge-share", "0")
    assert learnt(run, example_items(run)) == ["red"]
    assert "left out 1 whose label says that the answer is bad" in capsys.readouterr().out
