"""Servers as they are in the wild: endings, parts, refusals, rate limits, proxies, progress."""

import io
import json
import random
import sys

import pytest
from chatserver import ChatServer, completion, fake_time, lines, make_client, number_of, say

from extras.judges import answers as answers_module
from extras.judges.addresses import chat_address, read_key
from extras.judges.answers import AnswerFile, answer_key
from extras.judges.client import RUN, ServerFlags, check_flags, client_from_flags
from extras.judges.flags import read_extra
from extras.judges.progress import Progress, format_left, warn
from extras.judges.questions import JudgeStopped, Question, Reply
from extras.judges.server import read_completion
from extras.judges.waits import Pace, parse_duration, reset_after, told_wait


def ask_one(plan, tmp_path, **flags):
    """(reply, client, bodies that were sent) of one question to a server that does as planned."""
    decide = plan if callable(plan) else lambda request, number: plan
    with ChatServer(decide) as server:
        client = make_client(server, tmp_path / "a.jsonl", **flags)
        reply, = client.ask(say(["1"]))
        return reply, client, [request for request, *_ in server.requests]


# ----- Endings and parts -----
@pytest.mark.parametrize("finish, failure", [
    ("eos", ""), ("STOP", ""), ("Stop", ""), ("", ""), (None, ""), ("end_turn", ""), ("done", ""),
    ("EOS_TOKEN", ""), ("MAX_TOKENS", "cut at max_tokens"), ("max_tokens", "cut at max_tokens"),
    ("model_length", "cut at max_tokens"), ("SAFETY", "filtered"), ("RECITATION", "filtered"),
    ("Content_Filter", "filtered"), ("function_call", "ended otherwise")])
def test_an_ending_in_the_words_of_any_server(finish, failure, tmp_path):
    body = completion("VERDICT 1: a", finish)
    assert ask_one({"body": body}, tmp_path)[0] == Reply("VERDICT 1: a", failure)
    assert lines(tmp_path / "a.jsonl")[0]["finish"] in (None, "unknown", *answers_module.ENDINGS)


@pytest.mark.parametrize("finish", [None, "", "whatever", "absent"])
def test_without_a_reason_the_tokens_tell(finish, tmp_path):
    body = completion("ok", finish, completion_tokens=512)
    if finish == "absent":
        del body["choices"][0]["finish_reason"]
    assert ask_one({"body": body}, tmp_path)[0].failure == "cut at max_tokens"
    del body["usage"]
    (tmp_path / "a.jsonl").unlink()
    assert ask_one({"body": body}, tmp_path)[0] == Reply("ok")


def test_an_answer_that_the_server_broke_off_is_tried_again(tmp_path):
    def decide(request, number):
        return {"body": completion("half", "error") if number == 1 else completion("ok")}
    assert ask_one(decide, tmp_path)[0] == Reply("ok")


@pytest.mark.parametrize("content, text", [
    ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ([{"type": "thinking", "thinking": [{"type": "text", "text": "x"}]},
      {"type": "text", "text": "b"}], "b"),
    ([{"type": "reasoning", "text": "x"}, {"type": "output_text", "text": "b"}], "b"),
    (["a", "b"], "ab"), ([{"type": "image_url"}, "b"], "b"), ([], "")])
def test_parts_of_a_message(content, text):
    assert read_completion(completion(content))["text"] == text


@pytest.mark.parametrize("content", [[7], [{"type": "text", "text": 7}], [None], {"text": "a"}])
def test_parts_that_are_none(content):
    assert read_completion(completion(content)) == "no message"


# ----- What a server does not take -----
def mistral(name):
    """Its answer of status 422, nested as it comes."""
    detail = [{"type": "extra_forbidden", "loc": ["body", name], "input": 0,
               "msg": "Extra inputs are not permitted"}]
    return {"status": 422, "body": {"object": "error", "message": {"detail": detail}, "code": None}}


def refusal(message, status=400):
    return {"status": status, "body": {"error": {"message": message}}}


@pytest.mark.parametrize("name, plan, words", [
    ("temperature", refusal("invalid temperature: only 1 is allowed for this model"), "only"),
    ("temperature", refusal("`temperature` is deprecated for this model."), "is deprecated for"),
    ("temperature", refusal("Unsupported value: 'temperature' does not support 0 with this model. "
                            "Only the default (1) value is supported."), "does not support"),
    ("temperature", mistral("temperature"), "inputs are not permitted"),
    ("temperature", {"status": 422, "body": mistral("temperature")["body"]["message"]}, "extra")])
def test_a_name_that_is_refused_is_left_out_and_the_reason_is_shown(name, plan, words, tmp_path,
                                                                    capsys):
    def decide(request, number):
        return plan if name in request else {"body": completion("ok")}
    reply, client, sent = ask_one(decide, tmp_path)
    assert reply == Reply("ok") and len(sent) == 2 and name not in sent[1]
    said = capsys.readouterr().err
    assert f"does not take {name}; from now on it gets no {name}. (It said: " in said
    assert words in said


@pytest.mark.parametrize("message, status", [
    ("System role not supported", 400), ("System role not supported", 500),
    ("Conversation roles must alternate user/assistant/user/assistant/...", 422),
    ("Developer instruction is not enabled for models/x", 400),
    ("Only user and assistant roles are supported!", 400)])
def test_a_system_prompt_that_is_refused_is_folded(message, status, tmp_path):
    def decide(request, number):
        folded = [x["role"] for x in request["messages"]] == ["user"]
        return {"body": completion("ok")} if folded else refusal(message, status)
    reply, client, sent = ask_one(decide, tmp_path)
    assert reply == Reply("ok") and len(sent) == 2 and client.dialect == {"system": "user"}
    system, user = (x["content"] for x in sent[0]["messages"])
    assert len(sent[1]["messages"][0]["content"]) == len(system) + 2 + len(user)
    # The next run knows from the file.
    with ChatServer(decide) as server:
        other = make_client(server, tmp_path / "a.jsonl")
        other.dialect = dict(AnswerFile(tmp_path / "a.jsonl").dialects[client.server.address, "m"])
        assert other.ask(say(["2"])) == [Reply("ok")] and len(server.requests) == 1


def test_flags_force_what_is_sent(tmp_path):
    extra = {"enable_thinking": False, "top_k": random.randint(1, 99)}
    reply, client, (sent,) = ask_one({"body": completion("ok")}, tmp_path, judge_fold_system=True,
                                     judge_temperature="none", judge_extra=json.dumps(extra))
    assert reply == Reply("ok") and [x["role"] for x in sent["messages"]] == ["user"]
    assert "temperature" not in sent and sent.items() >= extra.items()
    assert client.ask(say(["1"])) == [reply]  # from the file


def test_flags_that_change_what_is_sent_change_the_key():
    question, keys = say(["1"])[0], set()
    for flags in ({}, {"judge_extra": '{"a": 1}'}, {"judge_extra": '{"a": 2}'},
                  {"judge_fold_system": True}, {"judge_temperature": "none"}):
        client = make_client("http://127.0.0.1:9/v1", **flags)
        keys.add(client.request(question, 0.0, 0)[0])
    assert len(keys) == 5


@pytest.mark.parametrize("text, match", [
    ("[1]", "--judge-extra is not a JSON object"), ("{", "is not a JSON object"),
    ('{"a": NaN}', "is not a JSON object"), (
        '{"model": "x"}', '--judge-extra may not set "model", which the client sets itself. '),
    ('{"messages": []}', 'may not set "messages"'), ('{"stream": true}', "may not set"),
    ('{"api_key": "x"}', "--judge-extra seems to hold a key or a password"),
    ('{"x": {"password": "y"}}', "seems to hold"), ('{"x": "sk-abcdefgh1234"}', "seems to hold"),
    ('{"x": "zz-my-very-own-key"}', "seems to hold")])
def test_extra_fields_that_cannot_be_sent(text, match):
    with pytest.raises(ValueError, match=match) as found:
        read_extra(text, "zz-my-very-own-key")
    assert "own-key" not in str(found.value) and "1234" not in str(found.value)


def test_a_temperature_is_none_or_not_given():
    with pytest.raises(ValueError, match='--judge-temperature takes nothing but "none"'):
        check_flags(ServerFlags(judge_model="m", judge_temperature="1"), asked=True)


# ----- Addresses -----
@pytest.mark.parametrize("url", [
    "https://host/openai/deployments/x/chat/completions?api-version=2024-06-01",
    "https://host/api/chat/completions", "https://host/v1/chat/completions?a=b&c=d"])
def test_a_whole_address_is_used_as_it_is(url):
    assert chat_address(url) == url


def test_a_query_is_sent_and_is_part_of_the_key(tmp_path):
    with ChatServer() as server:
        address = f"{server.url}/openai?api-version=2024-06-01"
        client = make_client(address, tmp_path / "a.jsonl")
        client.ask(say(["1"]))
        assert server.requests[0][2] == "/openai/v1/chat/completions?api-version=2024-06-01"
        make_client(address.replace("-06-", "-07-"), tmp_path / "a.jsonl").ask(say(["1"]))
        assert len(server.requests) == 2


@pytest.mark.parametrize("query", [
    "key=a", "api_key=a", "token=a", "access_token=a", "sig=a", "password=a", "code=a", "KEY=a",
    "x=sk-a", "x=abcd1234efgh5678", "abcd1234efgh5678", "x%2Dkey=a", "a=b&subscription-key=a"])
def test_a_query_that_may_hold_a_secret_is_refused(query):
    with pytest.raises(ValueError, match="what may be a secret in its query"):
        chat_address(f"https://host/v1?{query}")


def test_a_key_in_the_address_is_refused(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "my-own-key-1")
    with pytest.raises(ValueError, match="may be a secret") as found:
        read_key("JUDGE_API_KEY", "https://host/my-own-key-1/v1")
    assert "my-own" not in str(found.value)


# ----- Empty answers -----
def test_an_empty_answer_is_asked_for_again(tmp_path):
    def decide(request, number):
        return {"body": completion("ok" if number == 2 else "<think>hm</think>")}
    assert ask_one(decide, tmp_path)[0] == Reply("ok")


def test_empty_answers_end_and_are_no_answers(tmp_path):
    reply, client, sent = ask_one({"body": completion("<think>hm</think>")}, tmp_path)
    assert (reply, len(sent)) == (Reply("", "empty message"), 2)
    record, = lines(tmp_path / "a.jsonl")
    assert record["cause"] == "empty message" and record["texts"] == ["<think>hm</think>"] * 2
    assert "Empty answers come most often from models that use up" in client.summary()
    assert client.counts["prompt_tokens"] == 2000  # both were paid for
    assert ask_one({"body": completion("ok")}, tmp_path)[0] == Reply("ok")


def test_an_empty_answer_of_an_earlier_version_is_replaced(tmp_path):
    with ChatServer() as server:
        client = make_client(server, tmp_path / "a.jsonl")
        key, request = client.request(say(["1"])[0], 0.0, 0)
        AnswerFile(tmp_path / "a.jsonl").append(
            {"key": key, **request, "sent": {}, "text": "", "finish": "stop", "usage": None})
        for _ in range(2):
            assert make_client(server, tmp_path / "a.jsonl").ask(say(["1"])) == [Reply("ok")]
        assert len(server.requests) == 1


# ----- Tokens in a cache -----
@pytest.mark.parametrize("more", [
    {"prompt_tokens_details": {"cached_tokens": 900}}, {"cached_tokens": 900},
    {"cache_read_input_tokens": 900}, {"cache_creation_input_tokens": 900}])
def test_cached_tokens_are_a_part_of_the_prompt(more, tmp_path):
    body = completion("ok", prompt_tokens=3)
    body["usage"] |= more
    reply, client, _ = ask_one({"body": body}, tmp_path)
    assert reply == Reply("ok") and client.counts["prompt_tokens"] == 903
    (tmp_path / "a.jsonl").unlink()
    plain = {"body": completion("ok", prompt_tokens=3)}
    assert ask_one(plain, tmp_path)[0].failure == "prompt cut by the server"


# ----- Rate limits -----
@pytest.mark.parametrize("text, seconds", [
    ("20s", 20), ("1m30s", 90), ("350ms", 0.35), ("6m0s", 360), ("1h", 3600), ("34.5s", 34.5),
    ("24 seconds", 24), ("2 minutes", 120), ("7", 7), ("soon", None), ("", None), ("1 week", None)])
def test_durations(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("headers, body, seconds", [
    ({}, "Rate limit reached. Limit 3. Please try again in 20s. Visit https://x", 20),
    ({}, "Please try again in 1m30.5s.", 90.5), ({}, "try again in 350ms", 0.35),
    ({}, "Please retry after 24 seconds.", 24),
    ({}, '{"@type": "x/google.rpc.RetryInfo", "retryDelay": "34s"}', 34),
    ({"retry-after-ms": "1500", "retry-after": "9"}, "", 1.5),
    ({"x-ratelimit-reset-requests": "12s"}, "", 12),
    ({"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "12s"}, "", None),
    ({"x-ratelimit-reset-requests": "23h"}, "", None), ({}, "slow down", None)])
def test_what_a_server_asks_to_wait(headers, body, seconds):
    assert told_wait(429, headers, body.encode()) == pytest.approx(seconds)
    if "retry-after-ms" not in headers:
        assert told_wait(500, headers, body.encode()) is None
    assert reset_after({}) is None


def test_rate_limits_use_up_time_and_no_tries(tmp_path):
    with ChatServer(lambda request, number: {"status": 429}) as server:
        client = make_client(server, tmp_path / "a.jsonl")
        client.backoff = 0.5
        pauses = fake_time(client)
        assert client.ask(say(["1"]))[0].failure == "http 429"
        assert sum(pauses) == pytest.approx(300) and 8 < len(server.requests) < 20
        assert max(pauses) <= 60
        assert "fewer --judge-workers, or begin at most N requests" in client.summary()
        with pytest.raises(JudgeStopped, match="10 requests in a row .* --judge-rate N"):
            client.ask(say(map(str, range(2, 30))))


def test_a_told_wait_is_kept_by_all_workers(tmp_path):
    def decide(request, number):
        body = {"error": {"message": "Please try again in 20s."}}
        return {"status": 429, "body": body} if number == 1 else {"body": completion("ok")}
    with ChatServer(decide) as server:
        client = make_client(server, tmp_path / "a.jsonl", judge_workers=1)
        pauses = fake_time(client)
        assert client.ask(say("123")) == [Reply("ok")] * 3 and pauses == [20]


def test_a_pace_lets_no_more_begin_than_allowed():
    pace, now, begun = Pace(), 0.0, []
    pace.limit(30)
    pace.limit(10)
    while now < 120:
        wait = pace.enter(now)
        if not wait:
            begun.append(now)
        now += min(wait or 1e-3, random.uniform(0.1, 3))
    for start in begun:
        assert sum(start <= time < start + 59.9 for time in begun) <= 10
    assert len(begun) > 12
    pace.hold(500.0)
    assert pace.enter(400.0) == 100.0


def test_judge_rate_holds_across_workers_and_clients(tmp_path):
    with ChatServer() as server:
        one = make_client(server, tmp_path / "a.jsonl", judge_rate=60.0, judge_workers=1)
        two = make_client(server, tmp_path / "b.jsonl", judge_rate=60.0, judge_workers=1,
                          ledger=one.ledger)
        pauses = fake_time(one)
        two.sleep, two.clock = one.sleep, one.clock
        one.ask(say("123"))
        two.ask(say("45"))
        assert sum(pauses) == pytest.approx(4.0)


# ----- Roles -----
@pytest.mark.parametrize("plan, words", [
    ({"status": 401}, "and http.* wants one. Set it and run the same command"),
    ({"status": 404}, "Does --server end in /v1"), ({"status": 302}, "set --server to the new")])
def test_errors_of_an_asked_model_speak_of_no_judge(plan, words, tmp_path):
    with ChatServer(lambda request, number: plan) as server:
        flags = ServerFlags(judge_url=server.url, judge_model="m")
        flags.role = "server"
        client = client_from_flags(flags, tmp_path)
        with pytest.raises(JudgeStopped) as found:
            client.ask(say(["1"]))
    RUN.close(lambda line: None)
    said = str(found.value).partition(" 0 answers")[0]
    assert "the judge" not in said and "--judge self" not in said and "--judge-url" not in said
    assert client.cache == tmp_path / "server.jsonl" and client.summary().startswith("server m: ")
    flags.judge_model = ""
    with pytest.raises(ValueError, match="the server's model has no name. .*--server-model"):
        client_from_flags(flags, tmp_path)


def test_plain_prompts_are_sent_as_they_are(tmp_path):
    prompt = f"Name {random.random()}"
    with ChatServer() as server:
        client = make_client(server, tmp_path / "a.jsonl", judge_temperature="")
        question = Question([{"role": "user", "content": prompt}], max_tokens=20)
        for sample in (0, 1, 0):
            assert client.ask([question], temperature=0.7, sample=sample) == [Reply("ok")]
        assert server.texts() == [prompt] * 2


# ----- Proxies of the environment, and progress -----
def test_a_proxy_that_is_not_used_is_named(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy.example:1")
    client = make_client("https://host.invalid", judge_tries=1)
    with pytest.raises(JudgeStopped, match="HTTPS_PROXY is set, but proxies of the environment are "
                                           "not used: name one with --judge-proxy") as found:
        client.ask(say(["1"]))
    assert "secret" not in str(found.value)


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())

    def decide(request, number):  # slower than a bar is drawn
        status = 418 if number_of(request) == 1 else 200
        return {"status": status, "body": completion("ok"), "delay": 0.15}
    with ChatServer(decide) as server:
        make_client(server, tmp_path / "a.jsonl", judge_workers=1).ask(say("123"))
    shown = sys.stderr.getvalue()
    assert "judge m" in shown and "3/3" in shown and "http 418=1" in shown
    assert capsys.readouterr().out == ""


def test_a_line_a_minute_elsewhere(capsys):
    now = [0.0]
    progress = Progress("judge m", lambda: now[0])
    progress.begin(100)
    for _ in range(40):
        now[0] += 4.5
        progress.add("http 429" if now[0] > 100 else "")
        progress.look()
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "judge m: 14 of 100 requests done, about 6 min left.",
        "judge m: 28 of 100 requests done, http 429 6, about 5 min left."]
    assert format_left(50) == "50 s" and format_left(9000) == "2.5 h"


def test_a_closed_stderr_stops_nothing(monkeypatch, tmp_path):
    closed = io.StringIO()
    closed.close()
    for stderr in (closed, None):
        monkeypatch.setattr(sys, "stderr", stderr)
        warn("nobody sees this")
        assert ask_one({"body": completion("ok")}, tmp_path)[0] == Reply("ok")


# ----- The index of a long file -----
def fill(path, n):
    store = AnswerFile(path)
    for k in range(n):
        record = {"address": "a", "request": {"model": "m", "messages": [], "k": k}, "sample": 0,
                  "version": "1", "sent": {"seed": ""}, "finish": "stop", "usage": None,
                  "text": f"{k} é", "nonce": ""}
        store.append({"key": answer_key(record), **record})
    store.sync()


def test_an_index_is_used_while_it_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(answers_module, "BLOCK", 1000)
    path, checked = tmp_path / "a.jsonl", []
    fill(path, 30)
    assert (tmp_path / "a.jsonl.index").exists()
    whole, find_damage = path.read_bytes(), answers_module.find_damage

    def count(record, **how):
        checked.append(record)
        return find_damage(record, **how)
    monkeypatch.setattr(answers_module, "find_damage", count)
    store = AnswerFile(path)
    assert checked == [] and len(store) == 30 and store.dialects == {("a", "m"): {"seed": ""}}
    assert [record["text"] for record in store] == [f"{k} é" for k in range(30)]
    fill(path, 31)  # one more, which the index does not cover
    whole = path.read_bytes()
    assert len(AnswerFile(path)) == 31
    for _ in range(20):  # one byte of the file is another one, or one of the index
        at = random.randrange(len(whole) - 1)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(ValueError, match=f"line {whole[:at].count(10) + 1}, "):
            AnswerFile(path)
        path.write_bytes(whole)
        index = bytearray((tmp_path / "a.jsonl.index").read_bytes())
        index[random.randrange(len(index))] ^= 1
        (tmp_path / "a.jsonl.index").write_bytes(index)
        assert len(AnswerFile(path)) == 31


def test_a_line_that_changes_under_a_run_is_refused_when_it_is_read(tmp_path):
    fill(tmp_path / "a.jsonl", 3)
    store = AnswerFile(tmp_path / "a.jsonl")
    text = (tmp_path / "a.jsonl").read_text().replace('"1 \\u00e9"', '"2 \\u00e9"')
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match="line 2, was changed: its checksum does not fit"):
        list(store)
