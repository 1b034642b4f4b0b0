"""train.py and eval.py with a judge behind HTTP: who is rewarded, what is written, stopping and going on, mistakes."""

import json
import re
import shutil

import pytest
from chatserver import ChatServer, completion
from test_train import arguments, cat, world  # noqa: F401

import data
import eval as evaluation
import train
import judge as judging
from judge import FAILED, RuleJudge
from model import load_model, save_model

HTTP = ("--judge", "http", "--judge-model", "m", "--judge-tries", "2", "--judge-workers", "4")


def shown(text, name):
    """What stands in a fence of a prompt."""
    return re.search(rf"<{name} (\w+)>\n(.*)\n</{name} \1>", text, re.S)[2]


def truthful(request, number=0):
    """A judge that reads the fences and knows the truth: a response is of the expected type if it is one word, right if it is the reference."""
    text = request["messages"][-1]["content"]
    nonce = re.search(r'VERDICT (\w{8}): X', text)[1]
    if "<first response" in text:
        said = "same" if shown(text, "first response")[:3] == shown(text, "second response")[:3] else "contradicted"
    elif "kind of answer" in text:
        said = "expected" if len(shown(text, "response").split()) == 1 else "unexpected"
    elif "nothing to say" in text:
        said = "Too long.\nVERDICT %s: flawed" % nonce if len(shown(text, "response").split()) > 1 else "VERDICT %s: perfect" % nonce
        return {"body": completion(said if number % 7 else "I cannot say.")}
    else:
        said = "correct" if shown(text, "response").strip() == shown(text, "reference") else "incorrect"
    return {"body": completion(f"VERDICT {nonce}: {said}")}


def http_cat(world, out, url, *more):                               # noqa: F811
    argv = cat(world, out, *more)
    argv[argv.index("rule") - 1:argv.index("rule") + 1] = [*HTTP, "--judge-url", url]
    return argv


def test_cat_with_a_judge_behind_http(world, tmp_path, capsys):     # noqa: F811
    with ChatServer(truthful) as server:
        train.main(http_cat(world, tmp_path / "run", server.url, "--price-in", "1", "--price-out", "2"))       # a random model may have nothing to rank
        records, asked = data.read_records(tmp_path / "run/candidates.jsonl"), len(server.requests)
        assert records and asked
        for record in records:
            words = record["response"].split()
            assert record["how"] in ("judged", "exact", "empty", "wordless") and record["reward"] in (0, 1, 2)
            assert (record["how"] == "wordless") == (any(words) and not any(map(str.isalnum, record["response"])))
            if record["how"] in ("judged", "wordless"):
                assert record["reward"] == (0 if record["how"] == "wordless" or len(words) != 1 else 2 if record["response"].strip() == record["target"] else 1)
        said = capsys.readouterr().out
        assert re.search(r"judge m: \d+ requests, \d+ answered, 0 from the cache, 0 retries; \d+ \+ \d+ tokens, cost 0\.\d{4}\.", said)
        assert (tmp_path / "run/judge.jsonl").exists()
        train.main(http_cat(world, tmp_path / "run", server.url, "--price-in", "9", "--price-out", "2", "--judge-workers", "2"))     # other prices are the same run
        assert len(server.requests) == asked
    (tmp_path / "run/candidates.jsonl").unlink()
    with ChatServer(truthful) as other:
        train.main(http_cat(world, tmp_path / "run", server.url))   # no server there, but every answer is on file
        assert other.requests == [] and data.read_records(tmp_path / "run/candidates.jsonl") == records
        capsys.readouterr()
        assert train.main(http_cat(world, tmp_path / "run", other.url)) == 2
        assert "judge_url was" in capsys.readouterr().err


def test_a_run_that_is_stopped_by_a_limit_goes_on(world, tmp_path, capsys):        # noqa: F811
    with ChatServer(truthful) as server:
        assert train.main(http_cat(world, tmp_path / "run", server.url, "--max-requests", "5")) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: --max-requests 5 is reached. 5 answers are saved in ") and error.count("\n") == 1
        assert len(server.requests) == 5 and not (tmp_path / "run/candidates.jsonl").exists()
        train.main(http_cat(world, tmp_path / "run", server.url))
        prompts = server.texts()
        assert len(set(prompts)) == len(prompts) > 5


def test_the_report_says_how_far_the_judge_can_be_trusted(world, tmp_path):         # noqa: F811
    from test_train import planted
    assert train.main(cat(world, tmp_path / "run", "--candidates", str(planted(world, tmp_path / "candidates.jsonl")))) == 0
    report = (tmp_path / "run/report.md").read_text()
    found = json.loads((tmp_path / "run/judge.json").read_text())
    row = next(line for line in report.splitlines() if line.startswith("| best | all |")).split(" | ")
    c = found["all"]["best"]
    assert row[2] == str(c["tp"] + c["fp"] + c["fn"] + c["tn"]) and row[3].startswith(f"{100 * c['accuracy']:.1f} [")
    assert "## How far to trust the judge" in report and report.index("# Evaluation") < report.index("## How far to trust the judge")


def test_wilson_intervals_by_hand():
    assert evaluation.wilson(0, 0) is None
    assert evaluation.wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert evaluation.wilson(0, 20) == pytest.approx([0.0, 0.1611], abs=1e-4)


def test_cut_in_rounds_with_a_critic_behind_http(world, tmp_path, capsys):          # noqa: F811
    with ChatServer(truthful) as server:
        argv = ["--stage", "cut", *arguments(world, tmp_path / "run", "--pool-per-task", "4", "--steps", "3", "--sft-steps", "3", "--rounds", "2", "--critic", "http",
                                             "--judge-model", "m", "--judge-url", server.url, "--downsample", "0")]
        train.main(argv)
    records = data.read_records(tmp_path / "run/round1/judged.jsonl")
    assert records and server.requests
    for record in records:
        assert record["judgment"] in ("Too long.", FAILED) if len(record["response"].split()) > 1 else record["judgment"] in (None, FAILED)
    assert "without a judgment, dropped" in capsys.readouterr().out or all(record["judgment"] != FAILED for record in records)


def test_cr_with_a_judge_behind_http(world, tmp_path, capsys):      # noqa: F811
    shutil.copytree(world / "model", tmp_path / "model")
    model = load_model(world / "model")
    for name, weight in model.named_parameters():
        if "o_proj" in name:                                            # loud attention: what it says depends on the prompt
            weight.data *= 50
    save_model(model, tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), "--tasks", str(world / "tasks"), "--paraphrases", str(world / "paraphrases.json"), "--per-task", "4", "--max-new-tokens", "4",
            "--out", str(tmp_path / "out")]
    with ChatServer(truthful) as server:
        evaluation.main([*argv, *HTTP, "--judge-url", server.url])
        asked = len(server.requests)
    found = json.loads((tmp_path / "out/metrics.json").read_text())["model"]
    rows = [json.loads(line) for line in (tmp_path / "out/questions.jsonl").read_text().splitlines()]
    assert found["judge"] == "http m" and found["unparsed"] == 0
    for row in rows:
        one, two = row["responses"]
        assert row["cr"] == float(one == two or one[:3] == two[:3] and "" not in (one, two) or one.strip()[:3] == two.strip()[:3])
    pairs = {(row["input"], *row["responses"]) for row in rows if row["responses"][0] != row["responses"][1]}
    assert pairs and 2 <= asked <= 2 * len(rows) and "judge m:" in capsys.readouterr().out


def test_wordings_from_the_command_line(world, tmp_path, capsys):   # noqa: F811
    def write(request, number):
        text = request["messages"][-1]["content"]
        if "VERDICT" in text:
            return {"body": completion("VERDICT " + re.search(r"VERDICT (\w{8})", text)[1] + ": same")}
        return {"body": completion(f"please do {number}: {shown(text, 'instruction')}")}
    with ChatServer(write) as server:
        evaluation.main(["--paraphrase", "6", "--tasks", str(world / "tasks"), "--judge-model", "m", "--judge-url", server.url, "--out", str(tmp_path)])
    assert "12 of 12 wordings kept" in capsys.readouterr().out
    tasks = data.load_tasks(world / "tasks")
    data.load_paraphrases(tmp_path / "paraphrases.json", tasks)     # what it writes is what --paraphrases reads
    assert all(sum(map(len, task.wordings.values())) == 6 for task in tasks)
    rows = data.read_records(tmp_path / "paraphrases.jsonl")
    assert len(rows) == 12 and all(row["kept"] and row["model"] == "m" and row["original"] for row in rows)


def test_mistakes_get_one_sentence_before_anything_happens(world, tmp_path, capsys, monkeypatch):      # noqa: F811
    def said(*argv):
        with pytest.raises(SystemExit) as stop:
            train.main([*arguments(world, tmp_path / "run"), *argv])
        assert stop.value.code == 2 and not (tmp_path / "run").exists()
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error
    assert "--judge-url is for a judge behind HTTP" in said("--stage", "cat", "--judge-url", "http://127.0.0.1:1")
    assert "the judge's model has no name" in said("--stage", "cat", "--judge", "http")
    assert "is not one. Expected an address such as" in said("--stage", "cat", *HTTP, "--judge-url", "localhost:8000")
    assert "needs prices" in said("--stage", "cat", *HTTP, "--budget", "1")
    assert "--max-unparsed is 7.0" in said("--stage", "cat", *HTTP, "--max-unparsed", "7")
    monkeypatch.setenv("JUDGE_API_KEY", "sk-secret-secret")
    assert "over plain http to proxy.example" in said("--stage", "cat", *HTTP, "--judge-proxy", "http://proxy.example:3128")
    assert "over plain http to 10.0.0.5" in said("--stage", "cat", *HTTP, "--judge-url", "http://10.0.0.5/v1")
    assert "sk-secret" not in said("--stage", "cat", *HTTP, "--judge-key-env", "sk-secret-secret")
    for words in (("--api-key", "sk-secret-secret"), ("--judge-key=sk-secret-secret",), ("--token", "sk-secret-secret")):
        assert f"no {words[0].partition('=')[0]}: keys are not accepted on the command line" in (error := said("--stage", "cat", *words)) and "sk-secret" not in error
    assert "there is no --judge-ulr. Did you mean --judge-url?" in said("--judge-ulr", "http://x")
    assert '"sft" belongs to no flag. --help lists the flags.' in said("sft")
    assert '"sk-live…" belongs to no flag. --help lists the flags.' in said("sk-live-1234567890")              # which may be a key
    assert "--critic writes judgments only with --judge self" in said("--stage", "cut", "--critic", str(tmp_path))


def test_no_server_ends_with_one_and_one_sentence(world, tmp_path, capsys):         # noqa: F811
    with ChatServer() as server:
        url = server.url
    assert train.main(http_cat(world, tmp_path / "run", url)) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: no judge at http://127.0.0.1:\d+/v1/chat/completions: no connection in 2 tries\. Start the server.*\n", error)


def test_the_local_model_as_a_backend(world):                       # noqa: F811
    """Where a choice is wanted the more probable one is taken, as keyword_logprobs has it; a prompt that does not fit is a failure."""
    from eval import LocalChat, keyword_logprobs
    from judge import STRATEGIES, evaluate_pairs, make_question
    from model import load_model
    model, tokenizer, template = load_model(world / "model"), data.Tokenizer(world / "model"), data.find_template("plain")
    chat = LocalChat(model, tokenizer, template)
    short = make_question("pick", {"x": "red"}, choices=("a", "b"), guard="{nonce}")
    reply, = chat.ask([short])
    prompt = template.render(short.messages[0]["content"], short.messages[1]["content"]).rstrip("\n") + "\n"
    (a, b), = keyword_logprobs(model, tokenizer, [prompt], [f"VERDICT {short.nonce}:"], [(" a", " b")])
    assert reply.text == f"VERDICT {short.nonce}: {'ab'[b > a]}" and not reply.failure
    free, long = make_question("say", {"x": "red"}, guard="{nonce}", max_tokens=5), make_question("pick", {"x": "red " * 9000}, choices=("a", "b"))
    replies = chat.ask([long, free, short])
    assert replies[0].failure == "prompt longer than the model takes" and replies[2] == reply
    assert replies[1].failure in ("", "cut at max_tokens", "empty message")
    held, asked = make_question("pick", {"x": "{input} {instruction}"}, choices=("a", "b"), guard="{nonce}"), []
    chat.template = type("Spy", (), {"render": lambda self, *parts: asked.append(template.render(*parts)) or asked[-1]})()
    chat.ask([held])
    assert "\n{input} {instruction}\n" in asked[0]                 # a text under judgment stays as it is
    row, = evaluate_pairs(chat.ask, [{"input": "red " * 9000, "output_1": "x", "output_2": "y"}], STRATEGIES["rules"], reask=0)
    assert row["winners"] == [None, None] and row["failures"] == ["prompt longer than the model takes"] * 2


def test_an_evaluation_by_rules_asks_as_before():
    """Batching pairs for a server changes nothing for a judge that is asked one by one."""
    asked = []

    class Counting(RuleJudge):
        def similar(self, a, b, labels=None):
            asked.append((a, b))
            return super().similar(a, b, labels)
    question = {"task": "t", "input": "i", "targets": ["x"], "wordings": ["w"] * 4, "responses": ["x", "y", "x", "X."]}
    metrics, rows = evaluation.evaluate_responses([question, {**question, "input": "j"}], judge=Counting())
    assert len(asked) == 12 and metrics["cr"]["mean"] == 0.5 and rows[0]["mcr"] == 0.75


def test_canaries_are_measured_and_warned_about(world, tmp_path, capsys):           # noqa: F811
    def yes(request, number):
        nonce = re.search(r"VERDICT (\w{8}): X", request["messages"][-1]["content"])[1]
        kind = "expected" if "kind of answer" in request["messages"][-1]["content"] else "correct"
        return {"body": completion(f"VERDICT {nonce}: {kind}")}
    for name, decide, warned in (("yes", yes, True), ("truthful", truthful, False)):
        with ChatServer(decide) as server:
            train.main(http_cat(world, tmp_path / name, server.url))
        said = capsys.readouterr().out
        assert ("warning: the judge called" in said) == warned
        found = json.loads((tmp_path / name / "canaries.json").read_text())
        assert found["asked"] == 8 * len(judging.CANARIES) and found["passed"] == (found["asked"] if warned else 0) and found["unread"] == 0


def test_canaries_know_what_was_not_said(world, tmp_path, capsys):  # noqa: F811
    """A judge without a verdict is not given a clean bill, and one without verdicts gets none at all."""
    from types import SimpleNamespace
    items, run = [{"instruction": "i", "input": str(k), "target": "red"} for k in range(8)], SimpleNamespace(folder=tmp_path)
    n = 8 * len(judging.CANARIES)
    says = iter([judging.Verdict(None, None, None, "unparsed")] * (n - 10) + [judging.Verdict(True, True, 2, "judged")] + [judging.Verdict(True, False, 1, "judged")] * 9)
    train.measure_canaries(run, SimpleNamespace(judge=lambda items: [next(says) for _ in items]), items)
    found = json.loads((tmp_path / "canaries.json").read_text())
    assert (found["asked"], found["unread"], found["passed"]) == (n, n - 10, 1) and found["ci95"] == pytest.approx(evaluation.wilson(1, 10))
    said = capsys.readouterr().out
    assert f"no readable verdict on {n - 10} of {n}" in said and "called 1 of 10 answers" in said
    train.measure_canaries(run, SimpleNamespace(judge=lambda items: [judging.Verdict(None, None, None, "unparsed")] * n), items)
    assert json.loads((tmp_path / "canaries.json").read_text())["ci95"] is None
    argv = cat(world, tmp_path / "run")
    argv[argv.index("rule")] = "length"
    train.main(argv)
    assert (tmp_path / "run/candidates.jsonl").exists() and not (tmp_path / "run/canaries.json").exists()


def test_limits_hold_for_the_run_and_usage_is_told_however_it_ends(tmp_path, capsys):
    from judge import RUN, JudgeStopped, make_question
    with ChatServer() as server:
        flags = evaluation.JudgeFlags(judge_model="m", judge_url=server.url, max_requests=6)
        one, two = evaluation.make_client(flags, tmp_path / "a"), evaluation.make_client(flags, tmp_path / "b")
        one.ask([make_question(f"say {k}", {}) for k in range(4)])
        with pytest.raises(JudgeStopped, match="--max-requests 6 is reached"):
            two.ask([make_question(f"say {k}", {}) for k in range(4)])
        assert len(server.requests) == RUN.requests == 6
    RUN.close(print)
    assert capsys.readouterr().out.count("judge m: ") == 2 and RUN.requests == 0 and RUN.clients == []


def test_best_of_n_by_a_judge_behind_http(world, tmp_path, capsys):                 # noqa: F811
    """The table carries the judge's name; a question with a missing reward is left out, or all are in one sentence."""
    argv = ["--model", str(world / "model"), "--tasks", str(world / "tasks"), "--paraphrases", str(world / "paraphrases.json"), "--per-task", "4", "--max-new-tokens", "4",
            "--best-of", "2"]
    with ChatServer(truthful) as server:
        evaluation.main([*argv, "--out", str(tmp_path / "a"), *HTTP, "--judge-url", server.url])
    assert list(json.loads((tmp_path / "a/best_of.json").read_text())["model"]) == ["http m"]
    out = capsys.readouterr().out
    assert "best of n by http m" in out and "judge m: " in out
    first = []

    def sulks(request, number):
        first.append(shown(request["messages"][-1]["content"], "input"))
        return truthful(request) if first[-1] != first[0] else {"body": completion(None, "content_filter")}
    with ChatServer(sulks) as server:
        evaluation.main([*argv, "--out", str(tmp_path / "b"), *HTTP, "--judge-url", server.url, "--max-unparsed", "1"])
    assert "left out: a sample got no reward" in capsys.readouterr().out
    with ChatServer(lambda request, number: {"body": completion(None, "content_filter")}) as server, pytest.raises(SystemExit):
        evaluation.main([*argv, "--out", str(tmp_path / "c"), *HTTP, "--judge-url", server.url, "--max-unparsed", "1"])
    assert "left a sample of every question without a reward" in capsys.readouterr().err


def test_the_folder_of_wordings_is_made_before_anything_is_paid(world, tmp_path, capsys):           # noqa: F811
    (tmp_path / "file").write_text("in the way")
    with ChatServer() as server, pytest.raises(SystemExit):
        evaluation.main(["--paraphrase", "1", "--tasks", str(world / "tasks"), "--judge-model", "m", "--judge-url", server.url, "--out", str(tmp_path / "file/out"),
                         "--judge-cache", str(tmp_path / "cache.jsonl")])
    assert server.requests == []


def test_flags_of_eval_in_the_readme_exist():
    import dataclasses
    names = {"--" + item.name.replace("_", "-") for item in dataclasses.fields(evaluation.EvalConfig)}
    used = {name for line in re.findall(r"python eval\.py[^\n`]*", (train.HERE / "README.md").read_text()) for name in re.findall(r"--[a-z-]+", line)}
    assert used <= names and {"--benchmark", "--strategy", "--judge-model"} <= used
