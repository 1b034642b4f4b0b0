"""One exchange with an OpenAI-compatible server, and what its response means.

The key goes to that server alone: not over plain http to another machine, not along a redirect,
not into a message or a file. Proxies, netrc and certificates of the environment are not used.

Each exchange has a connection of its own. On one that is kept, answers belong to requests by their
order alone, and a single response too many gives every later request the answer of another.
"""

import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import threading
import time
import zlib
from urllib.parse import urlsplit

import requests

from extras.judges.addresses import chat_address, explain, known_words, read_key
from extras.judges.answers import ENDINGS, parse_json
from extras.judges.dialects import find_refused
from extras.judges.flags import role_of
from extras.judges.questions import describe_problem
from extras.judges.waits import LONGEST_WAIT, told_wait

CONNECT_SECONDS = 5.0
LONGEST_BODY = 8 << 20  # bytes, decompressed
PORTS = {"http": 80, "https": 443}
# Reasons for an ending in the words of many servers, and what they are called in ENDINGS.
REASONS = {"content_filter": re.compile(
               "filter|safety|recitation|block|prohibited|spii|sensitive|moderat|refus"),
           "length": re.compile("length|max|limit|trunc|exceed"),
           "tool_calls": re.compile("tool|function"),
           "error": re.compile("error|abort|cancel|timeout|resource|fail|interrupt")}


def read_response(status: int, headers, data: bytes, *, sent: list[str]) -> tuple:
    """What an HTTP response means: (kind, value, seconds to wait or None).

    answer    {"text", "finish", "usage"}, and "cached" where a part of the prompt was
    retry     a cause that may pass             fail    a cause that will not
    dialect   one of the names in `sent`, which this server wants left out or named otherwise, a
              colon, and what may be shown of its reason
    stop      the name of a problem in texts.toml: nothing more can be asked
    """
    body = parse_json(data)
    if 200 <= status < 300:
        if "event-stream" in headers.get("Content-Type", ""):
            return "stop", "streams", None
        found = read_completion(body)
        return ("answer" if isinstance(found, dict) else "retry"), found, None
    if 300 <= status < 400:
        return "stop", "redirects", None
    message, code = read_error(body, data)
    if status == 402 or "insufficient_quota" in code:
        return "stop", "no_credit", None
    if status in (401, 404):
        return "stop", {401: "wrong_key", 404: "not_found"}[status], None
    if "logprobs" in f"{message} {code}" and status in (400, 403, 422):
        return "stop", "no_logprobs", None
    shown = known_words(f"{code} {message}")
    if refused := find_refused(status, f"{message} {code}", sent):
        return "dialect", f"{refused}:{shown}", None
    if status not in (408, 409, 429) and status < 500:
        return "fail", f"http {status}: {shown}" if shown else f"http {status}", None
    pause = told_wait(status, headers, data)
    if pause and pause > LONGEST_WAIT:
        return "stop", "long_wait", None
    return "retry", f"http {status}", pause


def read_error(body, data: bytes) -> tuple[str, str]:
    """(message, codes) of an error in any form that servers use: not to be shown as they are."""
    texts, codes = [], []
    if isinstance(body, dict):
        collect_error(body, texts, codes)
    if not texts:
        texts.append(data[:2000].decode("utf-8", "replace"))
    return " ".join(" ".join(texts).split())[:300], " ".join(codes)


def collect_error(found, texts: list[str], codes: list[str], depth: int = 0) -> None:
    """Add what an error says to its texts and codes: of all messages and details inside it."""
    if isinstance(found, str):
        texts.append(found)
    elif isinstance(found, list) and depth < 6:
        for part in found[:5]:
            collect_error(part, texts, codes, depth + 1)
    elif isinstance(found, dict) and depth < 6:
        for name in ("code", "type", "param", "error_type"):
            if isinstance(found.get(name), (str, int)):
                codes.append(str(found[name]))
        if isinstance(found.get("loc"), list):  # of FastAPI: where in the body
            texts.append(" ".join(map(str, found["loc"])))
        for name in ("error", "detail", "message", "msg"):
            collect_error(found.get(name), texts, codes, depth + 1)


def read_completion(body) -> dict | str:
    """{"text", "finish", "usage": [prompt, completion] or None}, or what is wrong with the body.

    "cached" is there too if a part of the prompt was in the server's cache. An empty text is an
    answer, and paid for: `usable` calls it a failure.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list):
        return "no chat completion"
    choice = choices[0] if choices and isinstance(choices[0], dict) else {}
    message, finish = choice.get("message"), choice.get("finish_reason")
    if not isinstance(message, dict):
        return "no message"
    text = join_parts(message.get("content"))
    if not text and isinstance(message.get("refusal"), str):
        text, finish = message["refusal"], "refusal"
    if not isinstance(text or "", str) or not isinstance(finish or "", str):
        return "no message"
    finish = name_ending(finish)
    if finish == "error":
        return "broken off by the server"
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    known = all(map(is_count, counts))
    found = {"text": text or "", "finish": finish, "usage": counts if known else None}
    if cached := count_cached(usage):
        found["cached"] = cached
    if first := read_first_token(choice.get("logprobs")):
        found["first"] = first
    return found


def read_first_token(logprobs) -> dict[str, float]:
    """{token: log-probability} of the first token and those that were likeliest in its place."""
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], dict):
        return {}
    listed, found = tokens[0].get("top_logprobs"), {}
    for row in [tokens[0], *(listed if isinstance(listed, list) else [])]:
        token, logprob = (row.get(name) if isinstance(row, dict) else None
                          for name in ("token", "logprob"))
        known = type(logprob) in (int, float) and -9999 < logprob <= 1  # OpenAI's -9999: unlisted
        if isinstance(token, str) and known:
            found[token] = logprob
    return found


def join_parts(content):
    """The text of a message that is a list of parts, without thoughts; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if isinstance(part, dict):  # of the types text, output_text, thinking, reasoning, ...
            thought = "think" in str(part.get("type")) or "reason" in str(part.get("type"))
            part = "" if thought else part.get("text", "")
        if not isinstance(part, str):
            return content  # no message
        texts.append(part)
    return "".join(texts)


def name_ending(reason: str | None) -> str | None:
    """The name in ENDINGS of a server's finish_reason: its own words go into no file.

    None where there is no reason, "unknown" for one that says nothing of a text that is cut.
    """
    reason = (reason or "").strip().lower()
    if not reason or reason in ENDINGS:
        return reason or None
    for ending, words in REASONS.items():
        if words.search(reason):
            return ending
    return "unknown"


def is_count(value) -> bool:
    """Whether a value is a number of tokens."""
    return type(value) is int and 0 <= value < 1 << 40


def count_cached(usage: dict) -> int:
    """The prompt's tokens that a server had in its cache: some do not count them as its tokens."""
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    found = [details.get("cached_tokens"), usage.get("cached_tokens"),
             usage.get("cache_read_input_tokens"), usage.get("prompt_cache_hit_tokens")]
    created = usage.get("cache_creation_input_tokens")
    read = max(filter(is_count, found), default=0)
    return read + (created if is_count(created) else 0)


# ----- The exchange -----
class Response(http.client.HTTPResponse):
    """A response behind any number of interim ones, of which http.client skips those of 100 only.

    Taken for the answer, a 102 or 103 would have the answer itself left over.
    """

    def begin(self):
        super().begin()
        while 101 < self.status < 200:
            self.headers = None  # else `begin` does nothing
            super().begin()


def trust(path: str) -> ssl.SSLContext:
    """A context that trusts the certificates at `path`, or else those that requests trusts."""
    place = path or requests.certs.where()
    try:
        return ssl.create_default_context(**{"capath" if os.path.isdir(place) else "cafile": place})
    except OSError:  # ssl.SSLError is one
        raise ValueError(describe_problem("bad_ca", path=path)) from None


def shut_down(connection: http.client.HTTPConnection) -> None:
    """End what waits for a connection, in whatever part of an exchange. Its thread closes it."""
    opened = getattr(connection, "opened", None) or connection.sock
    with contextlib.suppress(OSError, AttributeError):  # closed, or not yet there
        socket.socket.shutdown(opened, socket.SHUT_RDWR)


def read_body(response: http.client.HTTPResponse) -> bytes | None:
    """The body, decompressed; None if it is longer than LONGEST_BODY."""
    body = bytearray()
    while chunk := response.read1(1 << 14):
        body += chunk
        if len(body) > LONGEST_BODY:
            return None
    if response.length:  # `read1` ends in silence where a connection ends early
        raise http.client.IncompleteRead(bytes(body), response.length)
    if response.headers.get("Content-Encoding", "").lower() in ("gzip", "deflate"):
        body = zlib.decompressobj(47).decompress(body, LONGEST_BODY + 1)  # 47: of either kind
    return None if len(body) > LONGEST_BODY else bytes(body)


class Server:
    """An address and its key. While exchanges are under way, `end_late` has to be called."""

    def __init__(self, flags):
        self.flags, self.role = flags, role_of(flags)
        self.address = chat_address(flags.judge_url, self.role)
        self.key = read_key(flags.judge_key_env, self.address, flags.judge_proxy, self.role)
        self.context = trust(flags.judge_ca) if self.address.startswith("https:") else None
        self.until, self.lock = {}, threading.Lock()  # {connection: when its exchange has to end}

    def end_late(self) -> None:
        """End the exchanges whose time is up. Timeouts end silence, but not bytes that drip in."""
        now = time.monotonic()
        with self.lock:
            late = [connection for connection, until in self.until.items() if now >= until]
        for connection in late:
            shut_down(connection)

    def exchange(self, body: dict, optional: list[str], left: float) -> tuple:
        """Send a request; (kind, value, pause) as read_response has them, within `left` seconds.

        `optional` are the names in the body that may be left out. A stop is a whole sentence.
        What a library says of an error is not repeated: it may hold the key.
        """
        until = time.monotonic() + left
        connection = self.make_connection(min(CONNECT_SECONDS, left))
        with self.lock:
            self.until[connection] = until
        try:
            kind, value, pause = self.connect(connection, until) or self.post(
                connection, json.dumps(body).encode(), optional, until)
        except TimeoutError:
            return "retry", "no answer in time", None
        except (http.client.HTTPException, OSError, ValueError, zlib.error):
            in_time = time.monotonic() < until
            return "retry", "connection lost" if in_time else "no answer in time", None
        finally:
            with self.lock:
                del self.until[connection]
            connection.close()
        if kind == "stop":
            if value == "wrong_key" and not self.key:
                value = "no_key"
            value = explain(
                value, self.role, address=self.address, model=body["model"],
                proxy=self.flags.judge_proxy, key_env=self.flags.judge_key_env)
        return kind, value, pause

    def make_connection(self, seconds: float) -> http.client.HTTPConnection:
        """A connection that is not open yet, by way of the proxy if there is one.

        Without a session: so there is no redirect, cookie, netrc, proxy or certificate of the
        environment.
        """
        goal = urlsplit(self.address)
        place = urlsplit(self.flags.judge_proxy) if self.flags.judge_proxy else goal
        host, port = place.hostname, place.port or PORTS[place.scheme]
        if not self.context:
            connection = http.client.HTTPConnection(host, port, timeout=seconds)
        else:
            connection = http.client.HTTPSConnection(host, port, timeout=seconds,
                                                     context=self.context)
            if self.flags.judge_proxy:
                connection.set_tunnel(goal.hostname, goal.port or PORTS["https"])
        connection.response_class = Response
        return connection

    def connect(self, connection: http.client.HTTPConnection, until: float) -> tuple | None:
        """Open a connection; what it means, as `exchange` says it, if that fails."""
        try:
            connection.connect()
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, TimeoutError) or time.monotonic() >= until:
                return "retry", "no server", None
            if isinstance(error, ssl.SSLCertVerificationError):
                return "stop", "not_trusted", None
            if isinstance(error, ssl.SSLError):
                return "stop", "no_tls", None
            if self.flags.judge_proxy:
                return "stop", "no_proxy", None
            return "retry", "no server", None
        return None

    def post(self, connection, payload: bytes, optional: list[str], until: float) -> tuple:
        """`exchange` over an open connection, but a stop is a name, and a broken one raises."""
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.opened = connection.sock  # http.client may forget it before the body is read
        connection.sock.settimeout(min(self.flags.judge_timeout, left))
        headers = {"Content-Type": "application/json", "User-Agent": "judge", "Connection": "close"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        path = self.address  # for a proxy that is no tunnel
        if self.context or not self.flags.judge_proxy:
            goal = urlsplit(self.address)
            path = goal.path + f"?{goal.query}" * bool(goal.query)
        with contextlib.suppress(BrokenPipeError):  # a server may refuse before it has read all
            connection.request("POST", path, payload, headers)
        response = connection.getresponse()
        body = read_body(response)
        if body is None:
            return "retry", "answer too long", None
        if time.monotonic() >= until and parse_json(body) is None:  # a body without a length
            raise TimeoutError
        return read_response(response.status, response.headers, body, sent=optional)
