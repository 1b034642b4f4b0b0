"""best_of, meta_evaluate and paraphrase: values by hand, and judges behind a server."""

import itertools
import json
import random
import re

import pytest
from chatserver import ChatServer, completion

import data
from eval import parse_flags, read_questions
from extras.formats import add_paraphrases, read_tasks
from extras.formats.tasks import questions as ask_questions
from tools import best_of, meta_evaluate, paraphrase
from tools.best_of import best_of_n, best_of_table

PAIR = {"input": "Say a colour.", "output_1": "red", "output_2": "a long sentence", "label": 1}
HTTP = ("--judge", "http", "--judge-model", "m", "--judge-tries", "2", "--judge-workers", "2")


def shown(text, name):
    """What stands in a fence of a prompt."""
    return re.search(rf"<{name} (\w+)>\n(.*)\n</{name} \1>", text, re.S)[2]


def nonce(request):
    return re.search(r"VERDICT (\w+)", request["messages"][-1]["content"])[1]


# ----- best_of -----

def test_best_of_n_against_brute_force():
    rewards = [0.2, 1.0, 0.7, -0.5]
    found = [best_of_n(rewards, n, rewards) for n in (1, 2, 3, 4)]
    assert found == pytest.approx([0.35, 0.7666666667, 0.925, 1.0])
    rng = random.Random(0)
    rewards, values = [rng.random() for _ in range(7)], [rng.random() for _ in range(7)]
    for n in range(1, 8):
        subsets = list(itertools.combinations(range(7), n))
        chosen = [values[max(some, key=lambda i: rewards[i])] for some in subsets]
        assert best_of_n(rewards, n, values) == pytest.approx(sum(chosen) / len(subsets))
    assert best_of_n([1.0, 1.0], 2, [0.0, 1.0]) == 0.5  # ties are chosen alike


def test_the_table_leaves_out_questions_without_a_reward(capsys):
    rows = best_of_table([0.0, 1.0, 0.0, 2.0, None, 1.0], [1.0, 0.0, 0.0, 1.0, 1.0, 1.0], 2)
    found = [(row["n"], row["reward"], row["truth"]) for row in rows]
    assert found == [(1, 0.75, 0.5), (2, 1.5, 0.5)]
    assert [row["kl"] for row in rows] == pytest.approx([0, 0.1931], abs=1e-4)
    assert "1 left out: a sample got no reward" in capsys.readouterr().out
    with pytest.raises(ValueError, match="left a sample of every question without a reward"):
        best_of_table([None, 1.0], [0.0, 0.0], 2)
    assert [row["n"] for row in best_of_table([0.0] * 6, [0.0] * 6, 6)] == [1, 2, 4, 6]


def test_best_of_by_rules_and_a_reward_model(questions, world, tmp_path, capsys):
    import torch

    import lora
    from methods import heads
    from model import load_model

    folder = tmp_path / "reward"
    model = lora.apply_lora(load_model(world / "model"), lora.LoraConfig(rank=2))
    lora.save_adapter(model, folder)
    from safetensors.torch import save_file
    save_file({"weight": torch.randn(1, 32), "bias": torch.zeros(1)}, folder / heads.HEAD)
    assert best_of.main([*questions, "--samples", "3", "--reward-model", str(folder), "--out",
                         str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/best_of.json").read_text())["model"]
    assert list(found) == ["exact rules", "reward model"]
    assert [row["n"] for row in found["reward model"]] == [1, 2, 3]
    rewards = [row["reward"] for row in found["reward model"]]
    assert rewards == sorted(rewards) and rewards[0] < rewards[-1]
    assert "model, best of n by reward model:" in capsys.readouterr().out


def test_best_of_by_a_judge_behind_a_server(questions, tmp_path, capsys):
    def judge(request, number):
        kind = "expected" if "kind of answer" in request["messages"][-1]["content"] else "correct"
        return {"body": completion(f"VERDICT {nonce(request)}: {kind}")}
    with ChatServer(judge) as server:
        assert best_of.main([*questions, *HTTP, "--judge-url", server.url, "--samples", "2",
                             "--out", str(tmp_path)]) == 0
    assert list(json.loads((tmp_path / "best_of.json").read_text())["model"]) == ["http m"]
    said = capsys.readouterr().out
    assert "best of n by http m" in said and "judge m: " in said  # and what was asked


# ----- meta_evaluate -----

@pytest.fixture
def pairs(tmp_path):
    """A file of two labelled pairs."""
    rows = [PAIR, {**PAIR, "input": "Another.", "label": 2}]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    return ["--data", str(tmp_path / "pairs.json"), "--out", str(tmp_path / "out")]


def test_rules_as_controls(pairs, tmp_path, capsys):
    assert meta_evaluate.main(pairs) == 0
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert found["judge"] == "rule" and list(found["evaluators"]) == ["longer", "shorter",
                                                                      "overlap"]
    assert "| longer | 50.0 / 100.0 | 50.0 / 100.0 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        meta_evaluate.main([*pairs, "--strategy", "rules"])
    assert "unknown rule 'rules'" in capsys.readouterr().err


def test_strategies_are_asked_anew_and_vote(pairs, tmp_path, capsys):
    def judge(request, number):
        return {"body": completion(f"VERDICT {nonce(request)}: {'ab'[number % 2]}")}
    with ChatServer(judge) as server:
        argv = [*pairs, "--judge", "http", "--judge-url", server.url, "--judge-model", "m",
                "--repeats", "3", "--judge-workers", "1", "--strategy", "rules", "vanilla", "cot"]
        assert meta_evaluate.main(argv) == 0
        assert len(server.requests) == 3 * 3 * 4
        assert meta_evaluate.main(argv) == 0  # from the file of answers
        assert len(server.requests) == 3 * 3 * 4
    found = json.loads((tmp_path / "out/metrics.json").read_text())["evaluators"]
    assert list(found) == ["rules", "vanilla", "cot", "majority"]
    assert found["rules"]["pairs"]["retest"]["n"] == 2
    assert len(data.read_records(tmp_path / "out/verdicts.jsonl")) == 3 * 3 * 2 + 2


def test_the_model_itself_and_an_unknown_strategy(pairs, world, tmp_path, capsys):
    argv = [*pairs, "--judge", "self", "--model", str(world / "model"), "--instances", "1"]
    assert meta_evaluate.main(argv) == 0
    found = json.loads((tmp_path / "out/metrics.json").read_text())["evaluators"]
    assert list(found) == ["rules"] and found["rules"]["pairs"]["n"] == 1
    with pytest.raises(SystemExit):
        meta_evaluate.main([*argv, "--strategy", "x"])
    assert "unknown strategy 'x'" in capsys.readouterr().err


def test_several_judges_have_a_line_each(pairs, tmp_path):
    def judge(request, number):
        letter = "a" if request["model"] == "one" else "b"
        return {"body": completion(f"VERDICT {nonce(request)}: {letter}")}
    with ChatServer(judge) as server:
        assert meta_evaluate.main([*pairs, "--judge", "http", "--judge-url", server.url,
                                   "--judge-model", "one, two"]) == 0
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(found["evaluators"]) == ["one rules", "two rules"] and len(found["usage"]) == 2


# ----- paraphrase -----

def writes(request, number):
    """A server that words every instruction or question anew, and finds all the same."""
    text = request["messages"][-1]["content"]
    if "VERDICT" in text:
        return {"body": completion(f"VERDICT {nonce(request)}: same")}
    kind = "question" if "<question " in text else "instruction"
    # A word of letters in place of a number, which would change what is asked.
    word = "".join(chr(ord("a") + int(digit)) for digit in str(number))
    return {"body": completion(f"please {word} {shown(text, kind)}")}


def write_wordings(out, *argv, server=None):
    """The exit status of the tool."""
    if server:
        argv = [*argv, "--judge-model", "m", "--judge-url", server.url]
    return paraphrase.main([*map(str, argv), "--out", str(out)])


@pytest.mark.parametrize("split", ["dev", "test", "train"])
def test_wordings_that_paraphrases_reads(split, world, tmp_path, capsys):
    with ChatServer(writes) as server:
        words = ["--number", "6", "--tasks", world / "tasks", "--split", split]
        assert write_wordings(tmp_path, *words, server=server) == 0
    said = capsys.readouterr().out
    assert "12 wordings: 12 kept" in said and "colour: 6 kept\nperson: 6 kept\n" in said
    tasks = data.read_tasks(world / "tasks")
    data.add_paraphrases(tmp_path / "paraphrases.json", tasks)
    for task in tasks:
        assert {name: len(some) for name, some in task.wordings.items() if some} == {split: 6}
    rows = data.read_records(tmp_path / "paraphrases.jsonl")
    assert len(rows) == 12
    assert all(row["kept"] and row["model"] == row["checker"] == "m" and row["original"]
               for row in rows)


def test_the_next_command_reads_them_without_another_flag(world, tmp_path):
    with ChatServer(writes) as server:
        words = ["--number", "3", "--tasks", world / "tasks"]
        assert write_wordings(tmp_path, *words, server=server) == 0
    cfg = parse_flags(["--tasks", str(world / "tasks"), "--paraphrases",
                       str(tmp_path / "paraphrases.json")], demo=True)
    questions = read_questions(cfg)
    assert len(questions) > 4 and all(len(x["wordings"]) == 3 for x in questions)


def test_wordings_are_added_to_those_that_there_are_and_differ_from_them(world, tmp_path):
    known = {"colour": {"train": ["please b give the colour ."], "test": [
        {"text": "which colour ?", "style": "plain"}]}}
    (tmp_path / "old.json").write_text(json.dumps(known))
    with ChatServer(writes) as server:
        words = ["--number", "8", "--tasks", world / "tasks", "--judge-workers", "1",
                 "--paraphrases", tmp_path / "old.json"]
        assert write_wordings(tmp_path, *words, server=server) == 0
        assert write_wordings(tmp_path / "all", *words, "--split", "divide", "--judge-cache",
                              tmp_path / "judge.jsonl", server=server) == 0
        asked = len(server.requests)
        assert asked == 16 + 2 * 15  # the second run asks nothing anew
    found = json.loads((tmp_path / "paraphrases.json").read_text())
    assert found["colour"]["train"] == [{"text": "please b give the colour .", "style": ""}]
    assert found["colour"]["test"] == known["colour"]["test"]
    assert len(found["colour"]["dev"]) == 7 and found["person"].keys() == {"dev"}
    divided = json.loads((tmp_path / "all/paraphrases.json").read_text())
    assert {name: len(some) for name, some in divided["colour"].items()} == {
        "train": 1 + 3, "dev": 2, "test": 1 + 2}


def test_plain_questions_become_what_eval_asks(tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"id": "legs", "question": "How many legs?", "target": [8]}) + "\n"
                    + json.dumps({"question": "Is snow white?"}) + "\n")
    with ChatServer(writes) as server:
        words = ["--number", "3", "--tasks", path]
        assert write_wordings(tmp_path / "out", *words, server=server) == 0
        assert all("question below anew" in text or "VERDICT" in text for text in server.texts())
    tasks = read_tasks(path)
    add_paraphrases(tmp_path / "out/paraphrases.json", tasks)
    first, second = ask_questions(tasks, split="dev", wordings=10, per_task=20)
    assert (first["task"], first["input"], first["targets"]) == ("legs", "", ["8"])
    assert len(first["wordings"]) == len(set(first["wordings"])) == 3
    assert (second["task"], second["targets"]) == ("questions-1", [])
    assert all("Is snow white?" in text for text in second["wordings"])


def test_without_a_model_the_text_stands_in_fixed_sentences(world, tmp_path, capsys):
    def write(words):
        return paraphrase.main([str(word) for word in words])

    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"id": "legs", "question": "How many legs?"}) + "\n")
    for tasks, name, number in ((path, "legs", 11), (world / "tasks", "colour", 16)):
        words = ["--judge", "rule", "--tasks", tasks, "--out", tmp_path]
        assert write([*words, "--number", number]) == 0
        found = json.loads((tmp_path / "paraphrases.json").read_text())[name]["dev"]
        assert len({row["text"] for row in found}) == len({row["style"] for row in found}) == number
        own = read_tasks(tasks)[0].definition
        assert all(row["style"].replace("...", own) == row["text"] for row in found)
        with pytest.raises(SystemExit):
            write([*words, "--number", number + 1])
        assert f"--number {number + 1} is more than the {number} sentences of extras/formats/" in (
            capsys.readouterr().err)
    with ChatServer(writes) as server:  # a checker can still be asked
        assert write(["--judge", "rule", "--tasks", path, "--out", tmp_path, "--number", 2,
                      "--check", "http", "--check-model", "c", "--judge-url", server.url]) == 0
        assert len(server.texts()) == 4
        assert all("<first question " in text for text in server.texts())


@pytest.mark.parametrize("flags, name", [
    (["--judge", "rule", "--wordings", "4"], "--wordings"),
    (["--judge", "rule", "--model", "x"], "--model"), (["--test-set", "I"], "--test-set"),
    (["--judge", "self", "--seed", "3"], "--seed"), (["--plain"], "--plain")])
def test_flags_of_eval_that_write_nothing_are_refused(flags, name, world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        write_wordings(tmp_path, "--tasks", world / "tasks", *flags)
    assert stop.value.code == 2
    assert f"error: {name} is not read with --judge " in capsys.readouterr().err


def test_who_writes_and_who_checks_can_be_two_servers_with_two_keys(world, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "key-of-the-writer")
    monkeypatch.setenv("CHECK_API_KEY", "key-of-the-checker")
    with ChatServer(writes) as writer, ChatServer(writes) as checker:
        assert write_wordings(tmp_path, "--number", "2", "--tasks", world / "tasks", "--check",
                              "http", "--check-url", checker.url, "--check-model", "c",
                              server=writer) == 0
        assert not any("VERDICT" in text for text in writer.texts())
        assert all("VERDICT" in text for text in checker.texts()) and len(checker.texts()) == 8
        for server, key in ((writer, "writer"), (checker, "checker")):
            assert {headers["Authorization"] for _, headers, _ in server.requests} == {
                f"Bearer key-of-the-{key}"}
    rows = data.read_records(tmp_path / "paraphrases.jsonl")
    assert {(row["model"], row["checker"]) for row in rows} == {("m", "c")}


def test_the_model_itself_writes_and_checks(world, tmp_path, capsys):
    """A random one: what it writes has faults that rules can see, or is checked by its odds."""
    words = ["--number", "2", "--tasks", world / "tasks", "--judge", "self", "--model",
             world / "model"]
    with pytest.raises(SystemExit):
        write_wordings(tmp_path, *words)
    assert "no task has two dev wordings, and consistency needs two" in capsys.readouterr().err
    rows = data.read_records(tmp_path / "paraphrases.jsonl")
    assert len(rows) == 4 and all(row["model"] == row["checker"] == "model" for row in rows)
    with ChatServer(writes) as server:
        assert write_wordings(tmp_path / "two", "--number", "2", "--tasks", world / "tasks",
                              "--check", "none", server=server) == 0
        assert len(server.requests) == 4


def test_tasks_with_fewer_than_two_wordings_are_named(world, tmp_path, capsys):
    def decide(request, number):
        text = request["messages"][-1]["content"]
        if "give the person" in text and "VERDICT" in text:
            return {"body": completion(f"VERDICT {nonce(request)}: different")}
        return writes(request, number)
    with ChatServer(decide) as server:
        words = ["--number", "2", "--tasks", world / "tasks"]
        assert write_wordings(tmp_path, *words, server=server) == 0
    said = capsys.readouterr()
    assert "colour: 2 kept\nperson: 2 asks for something else\n" in said.out
    assert ("warning: 1 of 2 tasks have fewer than two dev wordings, so they cannot be measured: "
            "person. Raise --number") in said.err


@pytest.mark.parametrize("words, said", [
    (["--adapter", "ADAPTER", "ADAPTER"], "--adapter names several adapters, and one model writes"),
    (["--check-url", "http://127.0.0.1:1"], "--check-url and --check-model are for a checker"),
    (["--check", "http"], "--check http needs --check-model NAME"),
    (["--check-key-env", "X"], "--check-key-env names the key for --check-url, which is not given"),
    (["--judge", "self", "--max-requests", "3"], "--max-requests is for a judge behind HTTP")])
def test_flags_that_nobody_would_read_are_refused(words, said, world, adapter, tmp_path, capsys):
    words = [adapter if word == "ADAPTER" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        write_wordings(tmp_path, "--tasks", world / "tasks", *words)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_the_folder_is_made_before_anything_is_paid(world, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    with ChatServer() as server, pytest.raises(SystemExit):
        paraphrase.main(["--number", "1", "--tasks", str(world / "tasks"), "--judge-model", "m",
                         "--judge-url", server.url, "--out", str(tmp_path / "file/out"),
                         "--judge-cache", str(tmp_path / "cache.jsonl")])
    assert server.requests == []


def test_a_judge_that_stops_ends_with_status_1(world, tmp_path, capsys):
    with ChatServer(lambda request, number: {"status": 401}) as server:
        status = paraphrase.main(["--tasks", str(world / "tasks"), "--judge-model", "m",
                                  "--judge-url", server.url, "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1
