"""One exchange: what a response means, addresses, keys, redirects, the environment."""

import base64
import json
import random
import re
import string
from urllib.parse import quote

import pytest
import requests
from chatserver import ChatServer, completion, make_client, say

from extras.judges import server as server_module
from extras.judges.addresses import KNOWN_WORDS, chat_address, known_words, read_key, redact
from extras.judges.client import ServerFlags, client_from_flags
from extras.judges.questions import JudgeStopped, Reply
from extras.judges.server import read_response
from extras.judges.waits import retry_after

KEY = "sk-live-9Yq3ZtVb7KxWm2Rf"
BASE64 = base64.b64encode(KEY.encode()).decode()


def leaks(text):
    """Pieces of eight characters of the key, plain or in base64, that a text holds."""
    pieces = [secret[i:i + 8] for secret in (KEY, BASE64) for i in range(len(secret) - 7)]
    return [piece for piece in pieces if piece in text]


# ----- What a response means -----

STATUSES = [*range(200, 209), *range(300, 309), *range(400, 432), 451, *range(500, 512), 529]


@pytest.mark.parametrize("status", STATUSES)
def test_every_status(status):
    body = b'{"error": {"message": "Unknown model: x", "code": 7}}'
    kind, value, pause = read_response(status, {}, body, sent=[])
    if status < 300:  # success without a completion in it
        assert (kind, value) == ("retry", "no chat completion")
    elif status < 400 or status in (401, 402, 404):
        assert kind == "stop"
    elif status in (408, 409, 429) or status >= 500:
        assert (kind, value, pause) == ("retry", f"http {status}", None)
    else:
        assert (kind, value) == ("fail", f"http {status}: ... unknown model ...")


@pytest.mark.parametrize("value, seconds", [
    ("2", 2), ("0.25", 0.25), ("120", 120), ("Thu, 01 Jan 1970 00:17:00 GMT", 20),
    ("Thu, 01 Jan 1970 00:16:00 GMT", None), ("0", None), ("-10", None), ("nan", None),
    ("inf", None), ("1e400", None), ("", None), ("soon", None), ("1" * 400, None),
    ("Thu, 01 Jan 100000 00:00:00 GMT", None)])
def test_retry_after(value, seconds):
    assert retry_after({"retry-after": value}, now=lambda: 1000.0) == seconds


def test_a_long_wait_stops():
    assert read_response(429, {"retry-after": "121"}, b"", sent=[]) == ("stop", "long_wait", None)


@pytest.mark.parametrize("body, message", [
    ({"error": {"message": "Too long.", "code": 7}}, ": ... too long"),
    ({"error": "Too long", "error_type": "t"}, ": ... too long"),
    ({"detail": "too long"}, ": too long"), ({"detail": [{"msg": "too long"}]}, ": too long"),
    ({"message": "too (long)"}, ": too long"), ("too\n\n long", ": too long"),
    ("\x1b[31mm too", ": ... too"), ([], ""), ("", ""), ("4096", ""),
    ({"error": {"message": "prompt is 5000 tokens", "type": "invalid_request_error", "code": None}},
     ": invalid_request_error prompt is ... tokens")])
def test_every_shape_of_error(body, message):
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    assert read_response(418, {}, data, sent=[]) == ("fail", f"http 418{message}", None)


# ----- Addresses -----

@pytest.mark.parametrize("url, address", [
    ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
    ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
    ("https://host.example/v1", "https://host.example/v1"),
    ("https://host.example/v1/", "https://host.example/v1"),
    ("https://host.example/v1/chat/completions", "https://host.example/v1"),
    ("https://host.example/api", "https://host.example/api/v1"),
    ("https://host.example/v1beta/openai/", "https://host.example/v1beta/openai"),
    ("http://[::1]:80/v1", "http://[::1]:80/v1")])
def test_addresses(url, address):
    assert chat_address(url) == address + "/chat/completions"


@pytest.mark.parametrize("url", [
    "", "host", "host:8000", "//host/v1", "file:///etc/passwd", "ftp://host", "http://",
    "https:///v1", "http://evil.example\\@127.0.0.1/v1", f"https://{KEY}@host/v1",
    f"https://user:{KEY}@host/v1", f"https://host/v1?key={KEY}", f"https://host/v1#{KEY}",
    "http://host/ v1", "http://host\n/v1", "http://１２７.0.0.1/v1", "http://[::1/v1",
    "http://host:port/v1", f"https://user:{KEY[:6]}/{KEY[6:]}@host/v1",
    f"https://user:{KEY}@ho st", f"user:{KEY}@host", f"http://a@b:{KEY}@host",
    f"http:///{KEY}@x y", f"https://user:{KEY}%40host/v 1", f"https://host/v1?key=a\n{KEY}"])
def test_addresses_that_are_refused_and_nothing_of_a_password_is_repeated(url):
    with pytest.raises(ValueError, match="the judge's address") as found:
        chat_address(url)
    assert not leaks(str(found.value))


# ----- Keys -----

@pytest.mark.parametrize("host, allowed", [
    ("https://host.example", True), ("http://127.0.0.1", True), ("http://localhost", True),
    ("http://127.8.9.1", True), ("http://[::1]", True), ("http://LOCALHOST", True),
    ("http://10.0.0.5", False), ("http://host.example", False),
    ("http://127.0.0.1.evil.example", False), ("http://localhost.evil.example", False),
    ("http://0.0.0.0", False), ("http://127.1", False), ("http://2130706433", False),
    ("http://0x7f000001", False), ("http://[::ffff:10.0.0.5]", False), ("http://[::]", False)])
def test_no_key_over_plain_http_but_to_this_machine(host, allowed, monkeypatch):
    address = chat_address(host)
    assert read_key("JUDGE_API_KEY", address) == ""
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    if allowed:
        assert read_key("JUDGE_API_KEY", address) == KEY
        return
    with pytest.raises(ValueError, match="refusing to send the key in JUDGE_API_KEY over plain"):
        read_key("JUDGE_API_KEY", address)


def test_no_key_to_a_proxy_that_reads_along(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    local, proxy = "http://127.0.0.1:8000/v1", "http://proxy.example:3128"
    with pytest.raises(ValueError, match="over plain http to proxy.example"):
        read_key("JUDGE_API_KEY", local, proxy)
    assert read_key("JUDGE_API_KEY", local, "http://127.0.0.1:3128") == KEY
    assert read_key("JUDGE_API_KEY", "https://host.example/v1", proxy) == KEY  # a tunnel


@pytest.mark.parametrize("proxy", [
    f"http://user:{KEY}@host:1", f"user:{KEY}@host:1", f"socks5://{KEY}:1", "host:1"])
def test_a_proxy_that_is_no_address_is_not_repeated(proxy, tmp_path):
    with pytest.raises(ValueError, match="--judge-proxy should read") as found:
        client_from_flags(ServerFlags(judge_model="m", judge_proxy=proxy), tmp_path)
    assert not leaks(str(found.value))


@pytest.mark.parametrize("key", [KEY + "\n", " " + KEY, "“" + KEY, "sk a" + KEY, KEY + "\x7f"])
def test_keys_that_http_cannot_carry(key, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", key)
    with pytest.raises(ValueError, match="HTTP cannot carry it") as found:
        read_key("JUDGE_API_KEY", "https://host/v1")
    assert not leaks(str(found.value))


def test_a_key_in_place_of_a_name_is_not_repeated():
    with pytest.raises(ValueError, match="keys are not accepted on the command line") as found:
        read_key(KEY, "https://host/v1")
    assert not leaks(str(found.value))


def said_and_written(client, folder, capfd, caplog):
    """All that a client says and writes while it asks two questions."""
    try:
        text = repr(client.ask(say(["1", "2"])))
    except JudgeStopped as error:
        text = repr(error) + repr(error.__cause__)
        assert error.__suppress_context__
    out = capfd.readouterr()
    text += out.out + out.err + caplog.text + json.dumps(client.usage()) + client.summary()
    text += "".join(repr(record.args) for record in caplog.records)
    return text + "".join(path.read_text() for path in folder.iterdir())


@pytest.mark.parametrize("plan", [
    {"status": 401, "body": {"error": {"message": f"Incorrect API key provided: {KEY}"}}},
    {"status": 403, "body": f"no {KEY[:12]}**** for you"}, {"status": 500, "body": KEY},
    {"status": 429, "body": {"error": {"message": KEY, "code": "insufficient_quota"}}},
    {"status": 418, "body": {"error": KEY}}, {"body": completion("ok", KEY)},
    {"body": completion(f"your key is {KEY}, in base64 {BASE64}")}, {"drop": "early"},
    {"drop": "late", "body": KEY * 9}, {"body": completion(KEY, "length")},
    {"status": 302, "headers": {"Location": f"http://127.0.0.1:1/{KEY}"}},
    {"status": 400, "body": {"detail": f"header Bearer {KEY[3:15]}"}},
    {"status": 429, "headers": {"Retry-After": KEY}}, {"body": f"<html>{KEY}</html>"}])
def test_the_key_is_nowhere_to_be_read(plan, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    caplog.set_level("DEBUG")
    with ChatServer(lambda request, number: plan) as server:
        client = make_client(server, tmp_path / "a.jsonl", judge_tries=2, judge_workers=1,
                             judge_deadline=0.5)
        text = said_and_written(client, tmp_path, capfd, caplog)
        # It was sent, and only there.
        assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert not leaks(text) and "completions" in text
    # The control: without care it would be there.
    assert leaks(str(plan.get("body", plan)).replace("\\", "")) or plan.get("drop") == "early"


def test_the_key_is_nowhere_to_be_read_where_tls_fails(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    caplog.set_level("DEBUG")
    with ChatServer() as server:
        url = server.url.replace("http:", "https:")
        client = make_client(url, tmp_path / "a.jsonl", judge_tries=2, judge_workers=1)
        text = said_and_written(client, tmp_path, capfd, caplog)
        assert server.requests == []  # nothing arrived that could be read
    assert "does not speak TLS as expected" in text and not leaks(text)


def encode64(text):
    return base64.b64encode(text.encode()).decode()


# A key in other clothes; those of the first list are removed from answers, too.
COMMON = [str, str.upper, lambda key: key[::-1], lambda key: key.encode().hex(), encode64,
          lambda key: encode64(f"Bearer {key}"), lambda key: encode64(f"x: {key}\n"),
          lambda key: encode64(f"ab{key}cd"), " ".join, "-".join, lambda key: ". ".join(key[::-1]),
          lambda key: base64.urlsafe_b64encode(f"Bearer {key}".encode()).decode(),
          lambda key: key.encode().hex().upper(), lambda key: key.encode().hex(" ")]
CLOTHES = [*COMMON, lambda key: "".join(f"&#{ord(c)};" for c in key),
           lambda key: "".join(f"&#x{ord(c):x};" for c in key), quote,
           lambda key: "".join(f"%{ord(c):02x}" for c in key),
           lambda key: "".join(f"\\u{ord(c):04x}" for c in key),
           lambda key: " ".join(str(ord(c)) for c in key), lambda key: str(list(key)),
           lambda key: key[:8] + "*" * 9 + key[-9:], str.swapcase,
           lambda key: " ".join(key[i:i + 4] for i in range(0, len(key), 4)),
           lambda key: base64.b32encode(key.encode()).decode(),
           lambda key: "".join(chr(ord(c) + 0xFEE0) for c in key)]


def draw_key(dice):
    letters = string.ascii_letters + string.digits
    return "sk-" + "".join(dice.choice(letters) for _ in range(dice.randint(20, 48)))


def make_error(shown, dice):
    """A server's error that holds a text."""
    message = dice.choice(["Incorrect API key provided: {}.", "{}", "bad header 'Bearer {}'",
                           "model x is not supported with {}"]).format(shown)
    return {"status": dice.choice([400, 403, 405, 422, 500, 503]), "body": dice.choice([
        {"error": {"message": message, "type": "invalid_request_error"}}, message,
        {"error": message}, {"detail": [{"msg": message}]}, {"error": {"code": shown}},
        {"message": message}, {"error_type": shown, "error": "no"}])}


@pytest.mark.parametrize("number", range(len(CLOTHES)))
def test_the_key_is_in_no_error_in_whatever_clothes(number, tmp_path, monkeypatch, capfd, caplog,
                                                    record_property):
    """Errors are shown in our own words alone."""
    dice, wear, plan, held = random.Random(number), CLOTHES[number], {}, 0
    caplog.set_level("DEBUG")
    with ChatServer(lambda request, number: plan) as server:
        for trial in range(20):
            key, path = draw_key(dice), tmp_path / str(trial)
            plan.update(make_error(wear(key), dice))
            monkeypatch.setenv("JUDGE_API_KEY", key)
            path.mkdir()
            client = make_client(server, path / "a.jsonl", judge_tries=1, judge_workers=1)
            for reply in client.ask(say(["1", "2"])):
                status, _, words = reply.failure.partition(": ")
                assert status == f"http {plan['status']}"
                assert set(words.split()) <= KNOWN_WORDS | {"..."}
            text = said_and_written(client, path, capfd, caplog)
            assert wear(key) not in text and key not in text
            held += wear(key) in str(plan["body"]).replace("\\\\", "\\")  # it was sent
    record_property("trials", 20)
    assert held == 20


def test_errors_as_they_come_hold_the_key(tmp_path, monkeypatch):
    """The control: messages are shown, without the key and its aligned base64."""
    monkeypatch.setattr(server_module, "known_words", lambda text: text)
    monkeypatch.setattr("extras.judges.client.redact", plain_redact)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    leaked = 0
    for number, wear in enumerate(CLOTHES):
        plan = {"status": 400, "body": {"message": f"bad header: {wear(KEY)}"}}
        with ChatServer(lambda request, number, plan=plan: plan) as server:
            client = make_client(server, tmp_path / str(number), judge_tries=1)
            leaked += wear(KEY) in client.ask(say(["1"]))[0].failure
    assert leaked > len(CLOTHES) / 2


def test_known_words_are_words():
    """None of them could be a piece of a key, and what tells a prompt that is too long is there."""
    assert all(re.fullmatch("[a-z_']+", word) for word in KNOWN_WORDS)
    assert max(len(word) for word in KNOWN_WORDS if "_" not in word) <= 15
    assert known_words("This model's maximum context length is 4096 tokens.") == (
        "this model's maximum context length is ... tokens")
    assert known_words("sk-live-9Yq3") == known_words("") == ""


def plain_redact(text, key):
    """The control: as it was, with the key itself and its aligned base64 alone."""
    secrets, shown = key + "\n" + encode64(key), list(text)
    for start in range(len(text) - 7):
        if text[start:start + 8] in secrets:
            shown[start:start + 8] = [""] * 7 + ["[key]"]
    return "".join(shown)


def test_common_clothes_are_removed_from_answers(record_property):
    dice, missed = random.Random(31), 0
    for _ in range(25):
        key = draw_key(dice)
        for wear in COMMON:
            shown = wear(key)
            text = f"The key is {shown}, I think."
            left = redact(text, key)
            assert "[key]" in left and left.startswith("The key is ")
            kept = re.sub("[^0-9A-Za-z]", "", left.removeprefix("The key is ").partition(",")[0])
            assert len(kept) - 3 < 16, (left, key)  # "key", and what no piece of eight holds
            missed += plain_redact(text, key) == text
        harmless = "".join(dice.choice("aeinrst \n.") for _ in range(500))
        assert redact(harmless, key) == harmless
    record_property("trials", 25 * len(COMMON))
    assert missed > 25 * 8


def test_redaction():
    assert redact(f"a {KEY} b {KEY[4:]} c", KEY) == "a [key] b [key] c"
    assert redact(f"{KEY}{KEY}x{BASE64}", KEY) == "[key]x[key]"
    assert redact("nothing here", KEY) == "nothing here" and redact("abc", "") == "abc"
    assert redact("my abc", "abc") == "my [key]"


# ----- Redirects, and what the environment says -----

@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_reach_nobody(status, monkeypatch):
    """To another port, name or user, to this origin, and to itself: the first request is all."""
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    with ChatServer() as other:
        there = f"127.0.0.1:{other.port}"
        for place in (f"{other.url}/v1/chat/completions", f"//{there}/x", f"http://user@{there}/",
                      f"http://localhost:{other.port}/", "/elsewhere", "HERE/elsewhere",
                      "HERE/v1/chat/completions"):
            def redirect(request, number, place=place):
                location = place.replace("HERE", server.url)  # noqa: B023
                return {"status": status, "headers": {"Location": location}}
            with ChatServer(redirect) as server:
                client = make_client(server, judge_workers=1)
                with pytest.raises(JudgeStopped, match="Redirects are not followed"):
                    client.ask(say(["1", "2"]))
                assert len(server.requests) == 1 and server.visits == []
        assert other.requests == other.visits == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_plain_requests_would_follow_them(status):
    """The control: a key in a header of its own arrives elsewhere, by 307 and 308 the prompt."""
    with ChatServer() as other:
        plan = {"status": status, "headers": {"Location": f"{other.url}/v1"}}
        with ChatServer(lambda request, number: plan) as server:
            body = {"messages": [{"content": "the prompt"}]}
            requests.post(server.url, json=body, headers={"api-key": KEY})
        arrived = [headers for _, headers, _ in other.requests] + other.visits
        assert [headers["api-key"] for headers in arrived] == [KEY]
        assert len(other.requests) == (status > 303)


def test_a_proxy_that_does_not_answer_stops_with_a_sentence():
    client = make_client("https://host.invalid", judge_proxy="http://127.0.0.1:9", judge_tries=1)
    words = "the proxy http://127.0.0.1:9 does not answer. Check"
    with pytest.raises(JudgeStopped, match=words) as found:
        client.ask(say(["1"]))
    assert not leaks(repr(found.value))


def test_the_environment_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with ChatServer() as server, ChatServer() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere")
        assert make_client(server).ask(say(["1"])) == [Reply("ok")]
        assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}" and proxy.requests == []
        client = make_client("http://host.invalid", judge_proxy=proxy.url, judge_key_env="NO_SUCH")
        client.ask(say(["1"]))
        assert len(proxy.requests) == 1  # a proxy is used where it is named
