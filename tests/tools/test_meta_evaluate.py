"""tools.meta_evaluate, eval.py and training with judges that cannot be read; --own; its flags."""

import json
import random
import re
from pathlib import Path

import pytest
from chatserver import ChatServer, completion

import data
import eval as evaluation
from tools import meta_evaluate

LLMBAR = Path(__file__).parents[3] / "shared" / "data" / "llmbar"
MUTE = {
    "garbage": (completion("I cannot say."), r"\(10 no verdict\)\. This judge does not keep"),
    "thinks": (completion("<think>\nLet me see", "length"),
               r"\(10 cut at max_tokens\)\. If the judge explains or thinks"),
    "thinks on": (completion("<think>\nLet me see"), "thinks before it answers: give it room with"),
    "empty": (completion(""), "The server sends empty messages")}


def nonce(request):
    return re.search(r"VERDICT (\w+)", request["messages"][-1]["content"])[1]


def write_pairs(tmp_path, n, **more):
    """The flags of a run on n pairs; the first output of each is the right one."""
    rows = [{"input": f"Name colour {k}.", "output_1": f"ruby {k}", "output_2": f"topaz {k}",
             "label": 1, **more} for k in range(n)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    return ["--data", str(tmp_path / "pairs.json"), "--out", str(tmp_path / "out")]


def http(server, *more):
    """The flags of a judge behind a server."""
    return ["--judge", "http", "--judge-url", server.url, "--judge-model", "m", "--judge-tries",
            "1", *more]


# ----- Judges that cannot be read -----

@pytest.mark.parametrize("kind", MUTE)
def test_nothing_read_is_no_number(kind, tmp_path, capsys):
    body, sentence = MUTE[kind]
    with ChatServer(lambda request, number: {"body": body}) as server:
        argv = [*write_pairs(tmp_path, 100), *http(server), "--strategy", "metrics"]
        assert meta_evaluate.main(argv) == 1
        asked = {text for text in server.texts() if "Output (a)" in text}
        assert len(asked) <= 20  # ten questions, some of them twice
    said = capsys.readouterr()
    assert re.search(f"10 of 10 judge replies .*{sentence}", said.err)
    assert " / " not in said.out and not (tmp_path / "out/metrics.json").exists()


def test_nothing_read_though_all_may_be_unread(tmp_path, capsys):
    with ChatServer(lambda request, number: {"body": completion("hm")}) as server:
        argv = [*write_pairs(tmp_path, 12), *http(server, "--max-unparsed", "1")]
        assert meta_evaluate.main(argv) == 1
    said = capsys.readouterr()
    assert "not a single verdict could be read, so nothing is known of this judge" in said.err
    assert r"| rules | - / - (100.0 % unread) |" in said.out.replace("\\", "")
    found = json.loads((tmp_path / "out/metrics.json").read_text())["evaluators"]["rules"]
    assert found["pairs"]["accuracy"] == {"mean": None, "ci95": None, "n": 0}
    assert found["Average"]["unread"] == {"mean": 1.0, "n": 24}


def test_the_share_of_unread_verdicts_stands_beside_the_numbers(tmp_path, capsys):
    """Right whenever it can be read: unread verdicts do not make it worse."""
    dice = random.Random()
    unread = set(dice.sample(range(40), 8))

    def judge(request, number):
        text = request["messages"][-1]["content"]
        k = int(text.split("Name colour ")[1].split(".")[0])
        if k in unread:
            return {"body": completion("hm")}
        letter = "a" if text.index("ruby") < text.index("topaz") else "b"
        return {"body": completion(f"VERDICT {nonce(request)}: {letter}")}
    with ChatServer(judge) as server:
        argv = [*write_pairs(tmp_path, 40), *http(server, "--max-unparsed", "0.99")]
        assert meta_evaluate.main(argv) == 0
    said, page = capsys.readouterr().out, (tmp_path / "out/report.md").read_text()
    for text in (said, page):
        assert text.count("100.0 / 100.0 (20.0 % unread)") == 2  # the set, and the average
    assert "over the verdicts that could be read" in page and "| 20.0 |" in page
    found = json.loads((tmp_path / "out/metrics.json").read_text())["evaluators"]["rules"]
    assert found["pairs"]["accuracy"]["mean"] == 1 and found["pairs"]["accuracy"]["n"] == 32
    assert found["pairs"]["unread"]["mean"] == found["Average"]["unread"]["mean"] == 0.2
    assert found["pairs"]["failures"] == {"no verdict": 16}


def test_one_judge_of_several_that_cannot_be_read_is_named(tmp_path, capsys):
    def judge(request, number):
        text = "hm" if request["model"] == "two" else f"VERDICT {nonce(request)}: a"
        return {"body": completion(text)}
    with ChatServer(judge) as server:
        argv = [*write_pairs(tmp_path, 9), *http(server), "--judge-model", "one,two"]
        assert meta_evaluate.main(argv) == 1
        assert "two rules: 10 of 10 judge replies had" in capsys.readouterr().err
        assert meta_evaluate.main([*argv, "--max-unparsed", "1"]) == 0
    said = capsys.readouterr().out
    assert "| one rules | 50.0 / 0.0 |" in said and "| two rules | - / - (100.0 % unread) |" in said


@pytest.mark.parametrize("kind", MUTE)
def test_an_evaluation_that_reads_nothing_fails(kind, questions, tmp_path, capsys, monkeypatch):
    def answer(model, tokenizer, template, asked, *_, **how):
        return [question | {"responses": [f"answer {k}" for k in range(len(question["wordings"]))],
                            "unfinished": 0} for question in asked]
    monkeypatch.setattr(evaluation, "answer_questions", answer)
    with ChatServer(lambda request, number: {"body": MUTE[kind][0]}) as server:
        argv = [*questions, "--wordings", "4", *http(server), "--out", str(tmp_path / "out")]
        assert evaluation.main(argv) == 1
    said = capsys.readouterr()
    assert "judge replies had no readable verdict (" in said.err
    assert not (tmp_path / "out/metrics.json").exists()


# ----- Several evaluators -----

def test_those_who_confer_share_the_models_and_all_have_costs_beside_controls(tmp_path, capsys):
    def judge(request, number):
        if "VERDICT" not in request["messages"][-1]["content"]:
            return {"body": completion("hm")}
        letter = "a" if request["model"] == "one" else "b"
        return {"body": completion(f"So.\nVERDICT {nonce(request)}: {letter}")}
    argv = [*write_pairs(tmp_path, 12), "--strategy", "rules", "prd", "annotators", "two_shot",
            "--price-in", "2", "--price-out", "4"]
    with ChatServer(judge) as server:
        argv += [*http(server), "--judge-model", "one,two"]
        assert meta_evaluate.main(argv) == 0
        said = capsys.readouterr().out
        first = json.loads((tmp_path / "out/metrics.json").read_text())
        assert meta_evaluate.main(argv) == 0
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    names = ["one rules", "two rules", "prd", "annotators", "one two_shot", "two two_shot"]
    assert list(found["evaluators"]) == [*names, "majority"] and list(found["costs"]) == names
    assert found["evaluators"]["prd"]["pairs"]["draws"] == 12  # the two never agree
    # The second run asks nothing again.
    assert found["costs"]["prd"]["answers on file"] == 12 * 2 * 6
    for name in ("cost", "tokens read", "tokens written"):
        whole = {"tokens read": "prompt_tokens", "tokens written": "completion_tokens"}
        used = sum(usage[whole.get(name, name)] for usage in first["usage"])
        assert sum(cost[name] for cost in first["costs"].values()) == pytest.approx(used) and used
    assert {cost["requests"] for cost in found["costs"].values()} == {0}
    assert "| prd | 144 | 0 |" in said and "| evaluator | requests | answers on file |" in said
    assert "| shorter (control) | 100.0 / 100.0 | 100.0 / 100.0 |" in said.replace("\\", "")
    assert found["controls"]["longer (control)"]["pairs"]["accuracy"]["mean"] == 0
    drawn = found["annotators"]["annotators"]
    assert sum(row["pairs"] for row in drawn.values()) == 12
    assert {name.split()[0] for name in drawn} == {"one", "two"}
    assert "The pool of annotators:" in said
    page = (tmp_path / "out/report.md").read_text()
    assert "## The pool of annotators" in page and "What each took in this run:" in page
    rows = data.read_records(tmp_path / "out/verdicts.jsonl")
    assert {row["annotator"] for row in rows if row["evaluator"] == "annotators"} == set(drawn)


# ----- By keyword -----

def test_keywords_from_end_to_end(tmp_path, capsys):
    """Each prefers output_2 but for a bias to the first place, which both orders undo."""
    def judge(request, number):
        text = request["messages"][-1]["content"]
        first = -1.0 if text.find("ruby") < text.find("topaz") else 0.5
        body = completion("The", "length")
        listed = [{"token": " A", "logprob": first - 1.5}, {"token": "b", "logprob": -1.5}]
        body["choices"][0]["logprobs"] = {
            "content": [{"token": "The", "logprob": -0.5, "top_logprobs": listed}]}
        return {"body": body}
    with ChatServer(judge) as server:
        argv = [*write_pairs(tmp_path, 15), *http(server), "--verdict", "keyword", "--strategy",
                "rules", "vanilla", "reference"]
        assert meta_evaluate.main(argv) == 0
    assert "| rules | 0.0 / 100.0 | 0.0 / 100.0 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/metrics.json").read_text())["evaluators"]
    assert [found[name]["pairs"]["unparsed"] for name in found] == [0] * 4


@pytest.mark.parametrize("strategy", ["cot", "rating", "swap"])
def test_keywords_do_not_explain(strategy, tmp_path, capsys):
    with pytest.raises(SystemExit):
        meta_evaluate.main([*write_pairs(tmp_path, 1), "--judge", "http", "--judge-model", "m",
                            "--verdict", "keyword", "--strategy", "rules", strategy])
    assert (f"--verdict keyword compares two words, and --strategy {strategy} asks for more. Leave "
            "out one of them.") in capsys.readouterr().err


# ----- Self-preference -----

def test_own_outputs_are_liked_more_than_people_like_them(tmp_path, capsys):
    """A judge that prefers what Acme wrote, wherever it stands; people prefer it half the time."""
    rows = []
    for k in range(20):
        mine = 1 + k % 2
        rows.append({"input": f"Do {k}.", f"output_{mine}": "mine", f"output_{3 - mine}": "theirs",
                     "label": 1 + k // 10, f"source_{mine}": "acme-7b",
                     f"source_{3 - mine}": "other"})
    (tmp_path / "pairs.json").write_text(json.dumps(rows))

    def judge(request, number):
        text = request["messages"][-1]["content"]
        letter = "a" if text.index("mine") < text.index("theirs") else "b"
        return {"body": completion(f"VERDICT {nonce(request)}: {letter}")}
    with ChatServer(judge) as server:
        assert meta_evaluate.main(["--data", str(tmp_path / "pairs.json"), "--out",
                                   str(tmp_path / "out"), *http(server), "--own", "Acme"]) == 0
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    own = found["evaluators"]["rules"]["Average"]["own"]
    assert found["own"] == "Acme" and own["judge"]["mean"] == 1 and own["people"]["mean"] == 0.5
    assert own["difference"]["mean"] == 0.5
    low, high = own["difference"]["ci95"]
    assert 0 < low < 0.5 < high < 1
    for text in (capsys.readouterr().out, (tmp_path / "out/report.md").read_text()):
        assert "Outputs by Acme" in text and "| rules | 100.0" in text
    assert data.read_records(tmp_path / "out/verdicts.jsonl")[0]["source_1"] == "acme-7b"


@pytest.mark.parametrize("more, said", [
    ({}, "--own acme needs to know who wrote the outputs, and no pair has a source_1"),
    ({"source_1": "b", "source_2": "c"}, "one output by acme and one by another. The sources are "
                                         "b, c. Give (a part of) one of them.")])
def test_own_without_such_outputs_is_refused(more, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        meta_evaluate.main([*write_pairs(tmp_path, 2, **more), "--own", "acme"])
    assert said in capsys.readouterr().err


# ----- Flags that nothing would read -----

@pytest.mark.parametrize("flags, said", [
    (["--judge-workers", "3"], "--judge-workers is for a judge behind HTTP. Add --judge http"),
    (["--judge", "self", "--verdict", "keyword"], "--verdict is for a judge behind HTTP"),
    (["--repeats", "3"], "--repeats 3 needs --judge http: rules and the model itself say the same"),
    (["--judge", "self", "--repeats", "2"], "--repeats 2 needs --judge http"),
    (["--model", "x"], "--model is not read with --judge rule. Leave it out."),
    (["--judge", "http", "--judge-model", "m", "--adapter", "x"], "--adapter is not read"),
    (["--judge", "http", "--judge-model", "m", "--wordings", "3"], "--wordings is not read with"),
    (["--judge", "self", "--tasks", "x"], "--tasks is not read with --judge self"),
    (["--judge", "self", "--symmetrize", "or"], "--symmetrize is not read with --judge self"),
    (["--judge", "http"], "the judge's model has no name"),
    (["--plain"], "--plain is not read with --judge rule"),
    (["--test-set", "I"], "--test-set is not read with --judge rule"),
    (["--strategy", "rules"], "unknown rule 'rules' for two outputs")])
def test_flags_that_would_be_ignored_are_refused(flags, said, tmp_path, capsys):
    argv = write_pairs(tmp_path, 1)
    if "--adapter" in flags:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter/adapter_config.json").write_text("{}")
        flags = [word if word != "x" else str(tmp_path / "adapter") for word in flags]
    with pytest.raises(SystemExit) as stop:
        meta_evaluate.main([*argv, *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.skipif(not LLMBAR.exists(), reason=f"LLMBar is not at {LLMBAR}")
def test_all_of_llmbar_is_asked_in_few_calls(tmp_path, monkeypatch):
    """So that what the client says of its progress is of hundreds of questions."""
    from extras.judges.client import ChatClient

    calls, ask = [], ChatClient.ask

    def counted(self, questions, **how):
        calls.append(len(questions))
        return ask(self, questions, **how)
    monkeypatch.setattr(ChatClient, "ask", counted)

    def judge(request, number):
        return {"body": completion(f"VERDICT {nonce(request)}: a")}
    with ChatServer(judge) as server:
        assert meta_evaluate.main(["--data", str(LLMBAR), "--out", str(tmp_path / "out"),
                                   *http(server, "--judge-workers", "16")]) == 0
    assert sum(calls) == 838 and len(calls) <= 8
