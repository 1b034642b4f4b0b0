"""eval.py on models behind a server, files of answers, and several samples of each wording."""

import json
import re

import pytest
from chatserver import ChatServer, answered, completion, lines

import data
import eval as evaluation


@pytest.fixture
def run(world, tmp_path):
    """run(*flags): the exit status of eval.py on the tiny world, and what it wrote."""
    def call(*flags):
        argv = ["--tasks", str(world / "tasks"), "--paraphrases", str(world / "paraphrases.json"),
                "--out", str(tmp_path / "out"), "--per-task", "3", "--max-new-tokens", "4", *flags]
        status = evaluation.main(argv)
        if status:
            return status, {}, []
        return (status, json.loads((tmp_path / "out/metrics.json").read_text()),
                data.read_records(tmp_path / "out/questions.jsonl"))
    return call


def colour_of(request, number=0):
    """A model that knows colours, and is asked for persons in vain."""
    text = request["messages"][0]["content"]
    found = re.search(" has a ([a-z]+) hat", text)[1]
    return {"body": completion(found if "colour" in text else f"{number}")}


def server_flags(server, model="m"):
    return ["--server", f"{server.url}/v1", "--server-model", model]


def test_a_server_is_asked_every_wording_and_nothing_else(run, tmp_path):
    with ChatServer(colour_of) as server:
        status, results, rows = run(*server_flags(server))
        assert status == 0 and answered(server, 12)
        again = run(*server_flags(server))
        assert again[2] == rows and answered(server, 12)  # all of it is in answers.jsonl
    assert len(lines(tmp_path / "out/answers.jsonl")) == 12
    assert set(results) == {"m"} and len(rows) == 6
    by_task = {task: [row["cr"] for row in rows if row["task"] == task]
               for task in ("colour", "person")}
    assert by_task == {"colour": [1, 1, 1], "person": [0, 0, 0]}
    assert results["m"]["cr"]["mean"] == 0.5 and results["m"]["exact_match"]["mean"] == 0.5
    usage = again[1]["m"]["usage"]
    assert usage["answered"] == 0 and usage["cached"] == 12
    for request in server.sent:
        assert request["max_tokens"] == 4 and request["temperature"] == 0
        [message] = request["messages"]
        wording, input = message["content"].split("\n")
        assert message["role"] == "user"
        assert (wording, input) in [(w, row["input"]) for row in rows for w in row["wordings"]]


def test_samples_are_asked_apart_and_compared_within_their_wording(run, capsys):
    """The server says 1, 2 or 3 in turn: no two samples agree by their wording."""
    def decide(request, number):
        return {"body": completion(f"answer {request.get('seed', 0)}")}

    with ChatServer(decide) as server:
        flags = [*server_flags(server), "--samples", "3", "--temperature", "0.7"]
        _, results, rows = run(*flags)
        assert answered(server, 36) and {x["temperature"] for x in server.sent} == {0.7}
        assert {request["seed"] for request in server.sent} == {0, 1, 2}
        run(*flags, "--seed", "1")
        assert {request["seed"] for request in server.sent[36:]} == {1000, 1001, 1002}
    assert results["m"]["within"]["mean"] == 0
    assert results["m"]["cr"]["mean"] == pytest.approx(1 / 3)
    assert results["m"]["wording_effect"]["mean"] == pytest.approx(-1 / 3)
    for row in rows:
        assert len(row["responses"]) == len(row["wordings"]) == 6
        assert row["responses"] == ["answer 0", "answer 1", "answer 2"] * 2
    assert "m: two answers to one wording agree in 0.0 % [" in capsys.readouterr().out


def test_several_models_stand_in_one_table_with_a_local_one(run, world, capsys, tmp_path):
    with ChatServer(colour_of) as server:
        _, results, rows = run(*server_flags(server, "m, n"), "--model", str(world / "model"))
        assert {request["model"] for request in server.sent} == {"m", "n"}
    assert list(results) == ["m", "n", "model"] and len(rows) == 18
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip() for line in printed[:4]] == ["model", "m", "n", "model"]
    assert "n - m" in (tmp_path / "out/report.md").read_text().replace("\\", "")


def test_what_a_server_leaves_unanswered_is_left_out_and_counted(run, capsys):
    """A cut answer is one, and so is an empty one; a filtered one is none."""
    def decide(request, number):
        text = request["messages"][0]["content"]
        if text.startswith("which colour"):
            return {"body": completion("re", "length")}
        if text.startswith("the colour"):
            return {"body": completion("")}
        if text.startswith("which person"):
            return {"body": completion("", "content_filter")}
        return {"body": completion("anna")}

    with ChatServer(decide) as server:
        status, results, rows = run(*server_flags(server), "--max-unparsed", "0.3")
        assert status == 0 and results["m"]["unanswered"] == 3
        assert results["m"]["unfinished"] == 3 and results["m"]["cr"]["n"] == 3
        assert [row["responses"] for row in rows] == [["", "re"]] * 3 + [["anna"]] * 3
        assert "m: 3 wordings got no answer and are left out." in capsys.readouterr().out
        status, *_ = run(*server_flags(server))
    assert status == 1
    assert ("m left 3 of 12 questions without an answer (3 filtered). These are not asked again; "
            "--max-unparsed allows more.") in capsys.readouterr().err


def test_requests_that_failed_are_asked_again(run, capsys):
    def decide(request, number):
        if request["messages"][0]["content"].startswith("which person"):
            return {"status": 400, "body": {"error": {"message": "no"}}}
        return colour_of(request)

    with ChatServer(decide) as server:
        assert run(*server_flags(server))[0] == 1
        said = capsys.readouterr().err
        server.decide = colour_of
        assert run(*server_flags(server))[0] == 0 and answered(server, 12)
    assert "(3 http 400" in said and (
        "Run the same command again to ask these anew; --max-unparsed allows more.") in said


@pytest.mark.parametrize("text", ["<think>anna has a", "", "<think>x</think>\n"])
def test_a_model_that_only_thought_gave_no_answer(text, run, capsys):
    """Else empty answers would agree with each other, and thoughts would be compared."""
    with ChatServer(lambda request, number: {"body": completion(text, "length")}) as server:
        assert run(*server_flags(server))[0] == 1
    said = capsys.readouterr().err
    assert ("m left 12 of 12 questions without an answer (12 cut while thinking). Raise "
            "--max-new-tokens, or turn thinking off with --server-extra;") in said


def test_thoughts_are_no_part_of_an_answer_that_was_cut(run):
    def decide(request, number):
        return {"body": completion(f"<think>{number}</think>\nanna", "length")}

    with ChatServer(decide) as server:
        _, results, rows = run(*server_flags(server))
    assert {text for row in rows for text in row["responses"]} == {"anna"}
    assert results["m"]["cr"]["mean"] == 1 and results["m"]["unfinished"] == 12


def test_equal_wordings_are_asked_once(tmp_path):
    """Sent once, they would count as samples that always agree."""
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "q", "wordings": ["a", "a", "b"]}) + "\n")
    with ChatServer() as server:
        assert evaluation.main(["--tasks", str(path), "--out", str(tmp_path),
                                *server_flags(server)]) == 0
        assert sorted(server.texts()) == ["a", "b"]
    [row] = data.read_records(tmp_path / "questions.jsonl")
    assert row["wordings"] == ["a", "b"] and row["within"] is None


@pytest.mark.parametrize("name", ["seed", "temperature"])
def test_fields_that_have_a_flag_are_refused(name, run, capsys):
    with ChatServer(colour_of) as server, pytest.raises(SystemExit):
        run(*server_flags(server), "--server-extra", f'{{"{name}": 1}}')
    assert not server.requests
    assert f"--server-extra sets {name}. Use --{name}." in capsys.readouterr().err


def write_answers(path, **more):
    path.parent.mkdir(exist_ok=True)
    rows = [{"question": "q", "wording": w, "response": "x", **more} for w in "ab"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_models_of_one_name_in_two_files_are_not_taken_for_each_other(tmp_path, capsys):
    files = [write_answers(tmp_path / name / "answers.jsonl") for name in "ab"]
    with pytest.raises(SystemExit):
        evaluation.main(["--out", str(tmp_path), "--responses", *files])
    assert f'{files[0]} and {files[1]} both have a model "answers".' in capsys.readouterr().err
    write_answers(tmp_path / "b" / "answers.jsonl", model="other")
    assert evaluation.main(["--out", str(tmp_path), "--responses", *files]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert list(found) == ["answers", "other"]
    assert "split" not in found["answers"]["settings"]  # nobody chose one


def test_results_are_not_written_over_the_answers(tmp_path, capsys):
    path = write_answers(tmp_path / "questions.jsonl")
    before = (tmp_path / "questions.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        evaluation.main(["--out", f"{tmp_path}/../{tmp_path.name}", "--responses", path])
    assert (f"the results would be written over {path}, which --responses reads. Give another "
            "--out.") in capsys.readouterr().err
    assert (tmp_path / "questions.jsonl").read_bytes() == before


def test_a_place_holder_takes_the_input(run, world, tmp_path):
    wordings = {"colour": {"dev": ["of {input} : the colour", "say the colour :"]}}
    path = tmp_path / "w.json"
    path.write_text(json.dumps(wordings))
    with ChatServer(colour_of) as server:
        _, _, rows = run(*server_flags(server), "--paraphrases", str(path), "--prefix", "well , ")
    inputs = [row["input"] for row in rows]
    assert set(server.texts()) == {f"well , of {x} : the colour" for x in inputs} | {
        f"well , say the colour :\n{x}" for x in inputs}


@pytest.mark.parametrize("name, wordings, most", [("I", 2, 10), ("II", 1, 100)])
def test_the_papers_test_sets_are_one_flag_each(name, wordings, most, world, tmp_path, capsys):
    """The tiny world has two held-out wordings a task, and some ten held-out inputs."""
    argv = ["--tasks", str(world / "tasks"), "--paraphrases", str(world / "paraphrases.json"),
            "--out", str(tmp_path), "--test-set", name]
    cfg = evaluation.parse_flags(argv)
    questions = evaluation.read_questions(cfg)
    assert (cfg.per_task, {len(row["wordings"]) for row in questions}) == (most, {wordings})
    with ChatServer(colour_of) as server:
        assert evaluation.main([*argv, *server_flags(server)]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())["m"]
    less = {"I": f"{len(questions)} of {len(questions)} questions have fewer than 10 wordings",
            "II": "2 of 2 tasks have fewer than 100 inputs"}[name]
    assert (f"warning: this is less than the paper's test set {name}: {less}."
            ) in capsys.readouterr().err
    assert found["settings"]["test_set"] == name and (found["cr"]["n"] == 0) == (name == "II")


def test_answers_from_elsewhere_are_not_compared_as_strictly_as_the_demos(tmp_path):
    """0.7 for all but the demo's tasks, whose answers are exact."""
    said = "the cat was found under the big bed"
    rows = [{"question": "q", "wording": f"w{k}", "response": text}
            for k, text in enumerate((said, said.replace("bed", "tree")))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--responses", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]
    for more, threshold, cr in (([], 0.7, 1), (["--rouge-threshold", "0.95"], 0.95, 0)):
        assert evaluation.main([*argv, *more]) == 0
        found = json.loads((tmp_path / "out/metrics.json").read_text())["a"]
        assert found["settings"]["rouge_threshold"] == threshold and found["cr"]["mean"] == cr


def test_what_a_judge_is_told_is_not_told_to_the_model_that_is_asked(run, world):
    def decide(request, number):
        return {"body": completion(f"answer {number}")}

    with ChatServer(decide) as server:
        run(*server_flags(server), "--temperature", "0.7", "--judge", "http", "--judge-model", "j",
            "--judge-url", server.url, "--judge-temperature", "none", "--controls", "none",
            "--max-unparsed", "1")
        asked = [request for request in server.sent if request["model"] == "m"]
        judged = [request for request in server.sent if request["model"] == "j"]
    assert {request.get("temperature") for request in asked} == {0.7}
    assert judged and not any("temperature" in request for request in judged)


def test_the_flags_of_the_comparison_reach_it(run, monkeypatch):
    seen, found = {}, evaluation.evaluate_responses

    def recorded(questions, judge, **options):
        seen.update(options, threshold=judge.rouge_threshold)
        return found(questions, judge, **options)

    monkeypatch.setattr(evaluation, "evaluate_responses", recorded)
    with ChatServer(colour_of) as server:
        run(*server_flags(server), "--symmetrize", "or", "--rouge-threshold", "0.9")
    assert (seen["symmetrize"], seen["threshold"]) == ("or", 0.9)


@pytest.mark.parametrize("flags, said", [
    (["--server", "http://127.0.0.1:9/v1"], "--server has no model. Name those to be asked with "
     "--server-model."),
    (["--server-model", "m"], "--server-model needs --server. Leave it out."),
    (["--server", "http://127.0.0.1:9/v1", "--server-model", "m", "--adapter", "x"],
     "--adapter is for a local model. Name it with --model, or ask the server alone. Leave it out"),
    (["--server", "http://127.0.0.1:9/v1", "--server-model", "m", "--judge-url", "x"],
     "--judge-url needs --judge http. Leave it out."),
    (["--server", "http://127.0.0.1:9/v1", "--server-model", "m", "--judge", "self"],
     "--judge self needs the model that is to judge. Name it with --model."),
    (["--test-set", "I", "--wordings", "3"], "--wordings is set by --test-set. Leave it "
     "out."),
    (["--server", "http://127.0.0.1:9/v1", "--server-model", "m", "--judge-fold-system"],
     "--judge-fold-system needs --judge http. Leave it out."),
    (["--server", "http://127.0.0.1:9/v1", "--server-model", "m, n,m"],
     "2 of the models are called m, and each needs a name of its own. Leave one out, or give its"),
    (["--server", "http://127.0.0.1:9/v1", "--server-model", "base", "--model", "demo/base"],
     "2 of the models are called base, and each needs a name of its own."),
    (["--similar", "exact", "--rouge-threshold", "0.5"], "--rouge-threshold is for rules, and "
     "others compare the answers. Leave it out."),
    (["--responses", "x", "--samples", "3"], "--samples is for asking a model, and --responses "
     "brings the answers. Leave it out."),
    (["--responses", "x", "--model", "x"], "--model is for asking a model, and --responses brings "
     "the answers. Leave it out."),
    (["--similar", "exact", "--judge", "rule"], "--judge and --similar both say how answers are "
     "compared. Leave it out."),
    (["--samples", "0"], "--samples is 0. Expected 1 or more."),
    (["--temperature", "-1"], "--temperature is -1.0. Expected 0 or more."),
    (["--temperature", "nan"], "--temperature is nan. Expected 0 or more."),
    (["--samples", "3"], "--samples 3 at --temperature 0 would be the same answer each time. Give "
     "a --temperature above 0.")])
def test_flags_that_cannot_work_together_are_one_sentence(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.main(flags)
    assert stop.value.code == 2 and f"error: {said}" in capsys.readouterr().err
