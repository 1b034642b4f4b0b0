"""The client: faults, kills, limits, what is sent; and that nothing is paid for twice."""

import dataclasses
import gzip
import json
import multiprocessing
import os
import random
import signal
import threading
import time

import pytest
from chatserver import (
    ChatServer,
    answered,
    completion,
    fake_time,
    lines,
    make_client,
    number_of,
    say,
)

from extras.judges import questions as prompts
from extras.judges.answers import AnswerFile
from extras.judges.client import RUN, Ledger, ServerFlags, check_flags, client_from_flags
from extras.judges.questions import JudgeStopped, Reply, make_question

HTML = {"Content-Type": "text/html"}


def refusal(message, status=400, **more):
    """What a server does that refuses a request."""
    return {"status": status, "body": {"error": {"message": message, **more}}}


def answers(request, number=0, **plan):
    """A server's answer that says which question it answers."""
    return {"body": completion(f"answer {number_of(request)}"), **plan}


# ----- Faults -----

# What the server does, and what the client calls it if it lasts.
FAULTS = {
    "503": (refusal("slow", 503) | {"headers": {"Retry-After": "0.002"}}, "http 503"),
    "500": ({"status": 500, "body": "plain words"}, "http 500"),
    "502": ({"status": 502, "body": "<html>502</html>", "headers": HTML}, "http 502"),
    "html 200": ({"body": "<html>sign in</html>", "headers": HTML}, "no chat completion"),
    "reset": ({"drop": "early"}, "connection lost"),
    "half a body": ({"body": completion("lost"), "drop": "late"}, "connection lost"),
    "truncated json": ({"body": json.dumps(completion("lost"))[:-30]}, "no chat completion"),
    "no choices": ({"body": {"choices": [], "usage": {}}}, "no message"),
    "wrong shape": ({"body": {"choices": [{"message": "text"}]}}, "no message"),
    "wrong type": ({"body": {"choices": [{"message": {"content": 7}}]}}, "no message"),
    "a list": ({"body": [1, 2]}, "no chat completion"),
    "deep": ({"body": "[" * 100000}, "no chat completion"),
    "long number": ({"body": '{"choices": ' + "7" * 5000 + "}"}, "no chat completion"),
    "error in 200": ({"body": {"error": {"message": "upstream"}}}, "no chat completion"),
}
# Whole answers that hold no verdict: kept, and never asked for again.
ANSWERED = {
    "cut": (completion("VERDICT is", "length"), "cut at max_tokens"),
    "filtered": (completion(None, "content_filter"), "filtered"),
    "refused": (completion(None, refusal="I will not."), "refused"),
    "thinking": (completion("<think>VERDICT 1: a"), "cut while thinking"),
    "cut without a word": (completion("ok", None, completion_tokens=512), "cut at max_tokens"),
    "other end": (completion("ok", "tool_calls"), "ended otherwise"),
    "cut prompt": (completion("ok", prompt_tokens=3), "prompt cut by the server"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_tried_again_and_a_lasting_one_is_a_recorded_failure(name, tmp_path):
    plan, cause = FAULTS[name]

    def twice(request, number):
        return plan if number < 3 else {"body": completion("ok")}
    with ChatServer(twice) as server:
        client = make_client(server, tmp_path / "a.jsonl")
        assert client.ask(say(["1"])) == [Reply("ok")]
        assert len(server.requests) == 3 and client.counts["retries"] == 2
    with ChatServer(lambda request, number: plan) as server:
        client = make_client(server, tmp_path / "b.jsonl")
        assert client.ask(say(["1"])) == [Reply("", cause)] and len(server.requests) == 5
        record, = lines(tmp_path / "b.jsonl")
        assert record["cause"] == cause and "key" not in record
        assert client.usage()["failures"] == {cause: 1}
        # A failure is no answer: the next run asks again.
        make_client(server, tmp_path / "b.jsonl").ask(say(["1"]))
        assert len(server.requests) == 10


@pytest.mark.parametrize("name", ANSWERED)
def test_an_answer_without_a_verdict_is_kept_and_is_a_failure(name, tmp_path):
    body, cause = ANSWERED[name]
    with ChatServer(lambda request, number: {"body": body}) as server:
        for run in range(2):
            client = make_client(server, tmp_path / "a.jsonl")
            reply, = client.ask(say(["1"]))
            assert reply.failure == cause and client.usage()["failures"] == {cause: 1}
            assert client.usage()["cached"] == run
        assert len(server.requests) == 1  # it was paid for


def test_a_thousand_calls_through_every_fault(tmp_path):
    """Every call is accounted for, none is answered twice, none is guessed."""
    dice, said, lock = random.Random(7), {}, threading.Lock()

    def decide(request, number):
        with lock:
            name, ending = dice.choice([None] * 80 + [*FAULTS] + ["slow"] * 5), dice.random()
        if name in FAULTS:
            return FAULTS[name][0]
        body, kind = completion(f"answer {number_of(request)}"), ""
        if ending < 0.1:
            body, kind = ANSWERED[sorted(ANSWERED)[int(ending * 70)]]
        with lock:
            said.setdefault(number_of(request), []).append(kind)
        return {"body": body, "delay": 0.05 if name == "slow" else 0}
    with ChatServer(decide) as server:
        client = make_client(server, tmp_path / "a.jsonl", judge_workers=16)
        replies = client.ask(say(map(str, range(1000))))
        assert len(replies) == 1000 and client.usage()["requests"] == len(server.requests) > 1100
    causes = {cause for _, cause in FAULTS.values()}
    for number, reply in enumerate(replies):
        kinds = said.get(number, [])
        assert len(kinds) <= 1, "answered twice"
        if kinds:
            assert reply.failure == kinds[0] and (kinds[0] or reply.text == f"answer {number}")
        else:
            assert reply.text == "" and reply.failure in causes
    keys = [record["key"] for record in lines(tmp_path / "a.jsonl") if "key" in record]
    assert len(set(keys)) == len(keys) == len(said) == client.usage()["answered"]
    failed = [record for record in lines(tmp_path / "a.jsonl") if "failed" in record]
    assert len(failed) == 1000 - len(said)
    counted = sum(client.usage()["failures"].values())
    assert counted == sum(reply.failure != "" for reply in replies) > 50


# ----- Kills -----

def ask_and_record(url, cache):
    """A child that is killed: it asks 600 questions, eight at a time."""
    replies = make_client(url, cache).ask(say(map(str, range(600))))
    same = [reply.text for reply in replies] == [f"answer {k}" for k in range(600)]
    os._exit(0 if same else 3)


def fork(server, cache):
    """The child, which has begun."""
    child = multiprocessing.get_context("fork").Process(
        target=ask_and_record, args=(server.url, str(cache)))
    child.start()
    return child


def slowly(request, number):
    return answers(request, delay=0.01)


def test_twenty_kills_and_nothing_answered_is_asked_again(tmp_path):
    cache, dice, known = tmp_path / "a.jsonl", random.Random(3), []

    def on_file():
        whole = cache.read_bytes().rpartition(b"\n")[0] if cache.exists() else b""
        return {number_of(json.loads(line)["request"]) for line in whole.split(b"\n") if line}
    with ChatServer(slowly) as server:
        for _ in range(20):
            wanted = len(on_file()) + dice.randint(5, 20)
            child = fork(server, cache)
            while len(on_file()) < wanted:
                assert child.is_alive()
                time.sleep(dice.uniform(0, 0.01))
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            known.append((len(server.requests), on_file()))  # requests and numbers at this kill
        child = fork(server, cache)
        child.join(60)
        assert child.exitcode == 0
    sizes = [len(numbers) for _, numbers in known]
    gains = [after - before for before, after in zip(sizes, sizes[1:], strict=False)]
    assert min(gains) >= 5, "every run had answers to lose"
    for at, numbers in known:
        again = numbers & {number_of(request) for request, *_ in server.requests[at:]}
        assert not again, f"asked again: {again}"
    assert sorted(number_of(record["request"]) for record in lines(cache)) == list(range(600))
    assert len(server.sent) <= 600 + 8 * len(known)  # a kill loses what is under way, at most


@pytest.mark.parametrize("how", ["ours", "recorded after use"])
def test_a_kill_costs_what_was_under_way_and_no_more(how, tmp_path, monkeypatch, record_property):
    """Five kills, each 40 answers after the last.

    The control writes its answers down when all of them are used, as many programs do.
    """
    if how != "ours":
        held = []

        def hold(self, record, *, replace):
            held.append(record)
            return record

        def write_all(self):
            self.write(b"".join(json.dumps(record).encode() + b"\n" for record in held))
        monkeypatch.setattr(AnswerFile, "append", hold)
        monkeypatch.setattr(AnswerFile, "sync", write_all)
    with ChatServer(slowly) as server:
        for kill in [True] * 5 + [False]:
            before = len(server.sent)
            child = fork(server, tmp_path / "a.jsonl")
            while kill and len(server.sent) < before + 40:
                time.sleep(0.002)
            if kill:
                os.kill(child.pid, signal.SIGKILL)
            child.join(60)
        assert child.exitcode == 0
        paid_again = len(server.sent) - len({number_of(request) for request in server.sent})
    record_property("trials", 5)
    assert (paid_again <= 5 * 8) == (how == "ours"), paid_again


# ----- When to try again, and when to stop -----

def test_waits_as_asked_else_longer_and_longer():
    def plan(request, number):
        return {"status": 503, "headers": {"Retry-After": "3"}} if number < 2 else {"status": 500}
    with ChatServer(plan) as server:
        client = make_client(server, judge_tries=9)
        client.backoff = 0.5
        waits = fake_time(client)
        assert client.ask(say(["1"]))[0].failure == "http 500"
    assert waits[0] == 3 and len(waits) == 8
    for k, pause in enumerate(waits[1:], 2):  # the second try waits 1 s, and none more than 8 s
        longest = min(0.5 * 2 ** (k - 1), 8)
        assert 0.75 * longest <= pause <= longest


def stops(server, match, **flags):
    """The client, after it has stopped with a sentence that matches."""
    client = make_client(server, **flags)
    with pytest.raises(JudgeStopped, match=match):
        client.ask(say(map(str, range(50))))
    return client


@pytest.mark.parametrize("plan, match", [
    (refusal("bad key", 401), "no API key: the environment variable JUDGE_API_KEY is empty"),
    (refusal("no money", 429, code="insufficient_quota"), "out of credit"),
    (refusal("no such model", 404), r'and is the model "m" served\?'),
    ({"status": 429, "headers": {"Retry-After": "600"}}, "longer than 120 s"),
    ({"body": "data: {}\n\n", "headers": {"Content-Type": "text/event-stream"}}, "streams"),
    ({"status": 307, "headers": {"Location": "http://127.0.0.1:1/v1"}}, "Redirects are not follow"),
])
def test_what_cannot_get_better_stops_at_once(plan, match):
    with ChatServer(lambda request, number: plan) as server:
        stops(server, match, judge_workers=4)
        assert len(server.requests) <= 4  # one a worker, none of them again


def test_other_refusals_fail_alone_until_ten_in_a_row(tmp_path):
    def plan(request, number):
        bad = number_of(request) % 2 or number_of(request) > 40
        return refusal("no") if bad else {"body": completion("ok")}
    with ChatServer(plan) as server:
        client = make_client(server, tmp_path / "a.jsonl", judge_workers=1)
        failures = [reply.failure for reply in client.ask(say(map(str, range(20))))]
        assert failures == ["", "http 400: no"] * 10 and len(server.requests) == 20
        with pytest.raises(JudgeStopped, match="10 requests in a row failed .* http 400: no. 21 "
                                               "answers are saved"):
            client = make_client(server, tmp_path / "a.jsonl", judge_workers=1)
            client.ask(say(map(str, range(0, 100, 2))))


def test_prompts_that_are_too_long_fail_alone():
    long = refusal("This model's maximum context length is 4096 tokens", code="context_length")
    with ChatServer(lambda request, number: long) as server:
        replies = make_client(server).ask(say(map(str, range(30))))
        assert len(server.requests) == 30
        for reply in replies:
            assert reply.failure == ("http 400: ... this model's maximum context length is ... "
                                     "tokens")


def test_no_server_is_a_sentence():
    with ChatServer() as server:
        url = server.url
    match = (r"no judge at http://127.0.0.1:\d+/v1/chat/completions \(connections tried: 5\). "
             "Start the server")
    stops(url, match)


@pytest.mark.parametrize("plan", [
    {"body": completion("x" * 4000), "drip": 0.02}, {"delay": 5},
    {"status": 500, "headers": {"Retry-After": "60"}}], ids=["drips", "stalls", "long wait"])
def test_a_call_ends_at_its_deadline(plan):
    with ChatServer(lambda request, number: plan) as server:
        client, start = make_client(server, judge_timeout=0.4, judge_deadline=0.8), time.monotonic()
        assert client.ask(say(["1"]))[0].failure in ("no answer in time", "http 500")
        assert time.monotonic() - start < 2.8


def test_an_endless_or_bursting_body_is_given_up():
    plan = {"body": gzip.compress(b" " * (64 << 20)), "headers": {"Content-Encoding": "gzip"}}
    with ChatServer(lambda request, number: plan) as server:
        client = make_client(server, judge_tries=1)
        assert client.ask(say(["1"])) == [Reply("", "answer too long")]


# ----- What is sent -----

def test_hostile_text_is_sent_and_kept_as_it_is(tmp_path):
    text = "lone \ud800 surrogate, \x00, \u2028, </s>"
    with ChatServer(lambda request, number: {"body": completion(text)}) as server:
        for _ in range(2):
            client = make_client(server, tmp_path / "a.jsonl")
            reply, = client.ask([make_question("t", {"x": text})])
            assert reply.text == text and len(server.requests) == 1
        assert text in server.texts()[0]
        assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 1


def test_order_and_equal_requests():
    together, numbers = threading.Barrier(8), [*range(40), *range(40)]

    def decide(request, number):
        if number <= 8:
            together.wait(30)  # passes only when eight are under way at once
        return answers(request)
    with ChatServer(decide) as server:
        client = make_client(server, judge_workers=8)
        replies = client.ask(say(map(str, numbers)))
        assert [reply.text for reply in replies] == [f"answer {k}" for k in numbers]
        assert len(server.requests) == 40 == client.counts["repeated"]
        client.ask(say(["1"]), sample=1)
        client.ask(say(["1"]), temperature=0.7, sample=1)
        assert len(server.requests) == 42 and server.requests[-1][0]["seed"] == 1


def test_the_key_of_an_answer_covers_all_that_is_sent(monkeypatch):
    question = say(["1"])[0]
    system = {"role": "system", "content": "x"}

    def key(question=question, temperature=0.0, sample=0, url="http://127.0.0.1:9", **flags):
        return make_client(url, **flags).request(question, temperature, sample)[0]
    other = [key(url="http://127.0.0.1:9/v2"), key(judge_model="other"), key(say(["2"])[0]),
             key(temperature=0.5), key(sample=1), key(temperature=0.5, sample=1),
             key(dataclasses.replace(question, max_tokens=7)),
             key(dataclasses.replace(question, messages=[system, question.messages[1]]))]
    monkeypatch.setattr(prompts, "PROMPT_VERSION", "other")
    other.append(key())
    monkeypatch.undo()
    same = [key(judge_timeout=1.0), key(judge_tries=1), key(judge_workers=1), key(max_requests=5),
            key(url="http://127.0.0.1:9/v1/"), key(budget=1.0, price_in=1.0)]
    monkeypatch.setenv("JUDGE_API_KEY", "sk-live-9Yq3ZtVb7KxWm2Rf")
    same.append(key())
    assert len({key(), *other}) == len(other) + 1 and set(same) == {key()}


def test_answers_of_earlier_versions_are_found(tmp_path):
    """A line as the first version of this program wrote it, under the key that it computed."""
    question = make_question("t", {"x": "y \u00e9"}, choices=("a", "b"))
    record = {"key": "1ca368ef8a374895e26e23930aa7bb5f5c057e5068e2a36cffd2652b6d1c5eca",
              "address": "http://127.0.0.1:9/v1/chat/completions",
              "request": {"model": "m", "messages": question.messages, "max_tokens": 64,
                          "temperature": 0.7, "seed": 3},
              "sample": 3, "version": "1", "sent": {}, "text": "VERDICT c7dcb945: a",
              "finish": "stop", "usage": [200, 5], "time": "2026-11-28T16:26:11Z"}
    (tmp_path / "judge.jsonl").write_text(json.dumps(record) + "\n")
    client = make_client("http://127.0.0.1:9", tmp_path / "judge.jsonl")
    assert question.nonce == "c7dcb945"
    assert client.ask([question], temperature=0.7, sample=3) == [Reply("VERDICT c7dcb945: a")]
    assert client.usage()["requests"] == 0


def picky(request, number):
    """A server that takes neither max_tokens nor a temperature."""
    if "max_tokens" in request:
        return refusal("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
                       param="max_tokens")
    if "temperature" in request:
        return refusal("Unsupported value: only 1 is supported.", param="temperature")
    return {"body": completion("ok")}


def test_what_a_server_refuses_is_settled_once(tmp_path):
    with ChatServer(picky) as server:
        client = make_client(server, tmp_path / "a.jsonl", judge_workers=1)
        assert client.ask(say(map(str, range(20)))) == [Reply("ok")] * 20
        assert len(server.requests) == 22
        assert server.requests[-1][0].keys() == {"model", "messages", "max_completion_tokens"}
        # The next run knows from the file, and finds its answers.
        client = make_client(server, tmp_path / "a.jsonl")
        assert client.ask(say(map(str, range(21))))[20] == Reply("ok")
        assert len(server.requests) == 23
    with ChatServer(picky) as server:
        make_client(server, judge_workers=8).ask(say(map(str, range(100))))
        assert len(server.requests) <= 100 + 2 * 8  # eight may have asked before it was settled


@pytest.mark.parametrize("error", [
    {"message": "max_tokens must be at most 4096", "param": "max_tokens"},
    {"message": "Invalid 'max_tokens': too large", "param": "max_tokens"},
    {"message": "temperature should be between 0 and 2", "param": "temperature"},
    "max_tokens is too large: 9999", {"message": "The model is not supported"}])
def test_a_value_that_is_refused_is_no_question_of_names(error):
    plan = {"status": 400, "body": {"error": error}}
    with ChatServer(lambda request, number: plan) as server:
        client = make_client(server, judge_workers=1)
        failures = [reply.failure[:8] for reply in client.ask(say(["1", "2"]))]
        assert failures == ["http 400"] * 2 and len(server.requests) == 2 and client.dialect == {}


def test_what_is_not_taken_is_said(capsys):
    detail = {"type": "extra_forbidden", "loc": ["body", "seed"],
              "msg": "Extra inputs are not permitted"}

    def plain(request, number):
        if "seed" in request:
            return {"status": 422, "body": {"detail": [detail]}}
        return {"body": completion("ok")}
    with ChatServer(plain) as server:
        client = make_client(server, judge_workers=1)
        assert client.ask(say(["1", "2"]), temperature=0.5) == [Reply("ok")] * 2
    said = capsys.readouterr().err
    assert said.count("does not take seed; from now on it gets no seed") == 1
    assert client.usage()["dialect"] == {"seed": ""} and "seed" in client.summary()


def test_answers_can_be_given_more_room():
    with ChatServer() as server:
        for most, wanted in ((0, 50), (20, 50), (900, 900)):
            make_client(server, judge_max_tokens=most).ask(say(["1"], max_tokens=50))
            assert server.requests[-1][0]["max_tokens"] == wanted


# ----- Limits -----

def test_limits_hold_for_all_clients_of_a_run_and_usage_is_told_once(tmp_path):
    with ChatServer() as server:
        flags, said = ServerFlags(judge_model="m", judge_url=server.url, max_requests=30), []
        one, two = (client_from_flags(flags, tmp_path / name) for name in ("a", "b"))
        one.ask(say(map(str, range(20))))
        with pytest.raises(JudgeStopped, match="--max-requests 30 is reached"):
            two.ask(say(map(str, range(20))))
        assert len(server.requests) == RUN.requests == 30
    RUN.close(said.append)
    assert [line.split()[3] for line in said] == ["20,", "10,"]
    assert RUN.requests == 0 and RUN.clients == []
    assert (tmp_path / "a/judge.jsonl").stat().st_size


@pytest.mark.parametrize("workers", [1, 8, 32])
def test_requests_are_limited(workers, tmp_path):
    failed = set()  # each question fails once at most, so that no bad luck uses up its tries

    def answer(request, number):
        question = json.dumps(request["messages"])
        if number % 5 or question in failed:
            return {"body": completion("ok")}
        failed.add(question)
        return {"status": 500}
    with ChatServer(answer) as server:
        cache, questions = tmp_path / "a.jsonl", say(map(str, range(500)))
        client = make_client(server, cache, judge_workers=workers, max_requests=100)
        with pytest.raises(JudgeStopped, match=r"--max-requests 100 is reached. \d+ answers are "
                                               "saved in .*a.jsonl; run the same command"):
            client.ask(questions)
        assert len(server.requests) == 100 and len(lines(cache)) >= 79
        replies = make_client(server, cache, judge_workers=workers).ask(questions)
        assert [reply.text for reply in replies] == ["ok"] * 500 and answered(server, 500)


PAID = {"prompt_tokens": 100, "completion_tokens": 50}
PRICES = {"budget": 0.05, "price_in": 2.0, "price_out": 10.0}


@pytest.mark.parametrize("workers", [1, 16])
def test_the_budget_is_never_passed(workers):
    with ChatServer(lambda request, number: {"body": completion("ok", **PAID)}) as server:
        client = make_client(server, judge_workers=workers, **PRICES)
        with pytest.raises(JudgeStopped, match="could pass --budget 0.05"):
            client.ask(say(map(str, range(500)), max_tokens=50))
        cost = len(server.requests) * (100 * 2.0 + 50 * 10.0) / 1e6
        assert 0.03 < cost <= 0.05 and client.spent == pytest.approx(cost)
        assert client.usage()["cost"] == pytest.approx(cost, abs=1e-6)
        assert client.ledger.held == pytest.approx(0, abs=1e-12)
        assert f"cost {round(cost, 6)}" in client.summary()


def test_the_budget_holds_for_all_clients_of_a_run():
    book = Ledger()
    with ChatServer(lambda request, number: {"body": completion("ok", **PAID)}) as server:
        one, two = (make_client(server, ledger=book, **PRICES) for _ in range(2))
        one.ask(say(map(str, range(50)), max_tokens=50))
        with pytest.raises(JudgeStopped, match="could pass --budget 0.05"):
            two.ask(say(map(str, range(50, 150)), max_tokens=50))
        cost = len(server.requests) * (100 * 2.0 + 50 * 10.0) / 1e6
        assert two.spent > 0 and 0.035 < cost <= 0.05
        assert one.spent + two.spent == pytest.approx(cost) == book.spent


def test_usage_is_summed_and_what_may_have_been_paid_is_said():
    body = completion("ok", prompt_tokens=70, completion_tokens=3)

    def decide(request, number):
        return {"drop": "early"} if number == 1 else {"body": body}
    with ChatServer(decide) as server:
        client = make_client(server, judge_workers=1, price_in=1.0, price_out=1.0)
        client.ask(say(["1", "2"]))
        found = client.usage()
        counts = ("requests", "answered", "retries", "possibly_paid", "prompt_tokens",
                  "completion_tokens")
        assert [found[name] for name in counts] == [3, 2, 1, 1, 140, 6] and found["cost"] > 146e-6
        assert client.summary().startswith("judge m: requests 3, answered 2, retries 1, ")
        assert "possibly paid 1" in client.summary()


# ----- Flags -----

@pytest.mark.parametrize("flags, match", [
    ({"judge_model": " ,b"}, "the judge's model has no name"),
    ({"judge_workers": 0}, "--judge-workers is 0. Expected 1 or more"),
    ({"judge_timeout": float("nan")}, "--judge-timeout is nan"),
    ({"judge_deadline": 0.0}, "--judge-deadline is 0.0"), ({"max_requests": -1}, "0 or more"),
    ({"budget": 1.0}, "--budget 1 needs prices to be counted. Give --price-in"),
    ({"judge_ca": "nowhere.pem"}, "--judge-ca now"),
    ({"judge_url": "localhost:8000"}, "is not one. Expected an address such as"),
    ({"judge_proxy": "host:1"}, "--judge-proxy should read"),
    ({"judge_proxy": "http://user:sk-live-1@host:1"}, "is not shown"),
])
def test_flags_that_cannot_work_are_one_sentence(flags, match, tmp_path):
    with pytest.raises(ValueError, match=match) as found:
        client_from_flags(ServerFlags(**{"judge_model": "m"} | flags), tmp_path / "out")
    assert "sk-live" not in str(found.value) and not (tmp_path / "out").exists()


def test_flags_that_nothing_reads_are_refused():
    check_flags(ServerFlags(), asked=False)
    with pytest.raises(ValueError, match="--judge-url is for a judge behind HTTP. Add"):
        check_flags(ServerFlags(judge_url="http://127.0.0.1:1"), asked=False)
