"""One exchange with an OpenAI-compatible server: where it is, and what its response means.

The key goes to that server alone: not over plain http to another machine, not along a redirect,
not into a message or a file. Proxies, netrc and certificates of the environment are not used.

Each exchange has a connection of its own. On one that is kept, answers belong to requests by their
order alone, and a single response too many gives every later request the answer of another.
"""

import base64
import contextlib
import email.utils
import http.client
import ipaddress
import json
import math
import os
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable
from urllib.parse import urlsplit

import requests
from requests.packages import urllib3  # the one that requests itself uses

from extras.judges.answers import ENDINGS, parse_json
from extras.judges.questions import TEXTS, describe_problem

CONNECT_SECONDS = 5.0
LONGEST_BODY = 8 << 20  # bytes, decompressed
PORTS = {"http": 80, "https": 443}
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is asked another day
OPTIONAL = ("max_tokens", "temperature", "top_p", "seed")  # servers refuse some of these names
# An error that refuses a name, not its value ("must be", "at most") ...
UNSUPPORTED = re.compile(
    r"unsupported|unrecogni[sz]ed|unknown.(?:parameter|argument|field|name)|"
    r"unexpected (?:keyword|argument|parameter|field)|(?:not|n't) (?:be )?support|"
    r"(?:inputs are|fields) not permitted|(?:was|were) unexpected", re.I)
# ... and one that refuses a prompt for its length: others may fit.
TOO_LONG = re.compile("context|too long|maximum.{0,20}tokens", re.I)
KNOWN_WORDS = frozenset(TEXTS["errors"]["words"].split())


def chat_address(url: str) -> str:
    """The address of chat completions behind a base URL, as the client will connect to it.

    Raises ValueError for what is no such address; what may be a password is not shown.
    """
    shown = repr(re.sub(r"[?#].*", "...", url, flags=re.S)[:80])
    if "@" in url or "%40" in url:
        shown = "(not shown, since it holds an @)"
    problem = ValueError(describe_problem("bad_address", shown=shown))
    if not re.fullmatch(r"https?://[!-~]+", url, re.I) or "\\" in url:
        raise problem
    try:
        parts = urllib3.util.parse_url(requests.Request("POST", url).prepare().url)
    except (requests.RequestException, urllib3.exceptions.HTTPError, UnicodeError):
        raise problem from None
    if parts.auth or parts.query or parts.fragment or not parts.host:
        raise ValueError(describe_problem("secret_address"))
    path = (parts.path or "").rstrip("/").removesuffix("/chat/completions")
    if not re.search(r"/v\d", path):
        path += "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}/chat/completions"


def read_key(name: str, address: str, proxy: str = "") -> str:
    """The key in the environment variable `name`, or "" where there is none.

    Raises ValueError, which never shows the key, if it cannot or must not be sent there.
    """
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,63}", name):
        raise ValueError(describe_problem("key_name"))
    key = os.environ.get(name, "")
    if re.search(r"[^!-~]", key):
        raise ValueError(describe_problem("key_characters", name=name))
    if key and urllib3.util.parse_url(address).scheme != "https":
        for place in filter(None, (address, proxy)):  # a proxy of plain http reads along
            host = urllib3.util.parse_url(place).host or ""
            if not is_loopback(host):
                raise ValueError(describe_problem("key_in_the_open", name=name, host=host))
    return key


def is_loopback(host: str) -> bool:
    """Whether a host is this machine for certain. (127.1 and the like are read in two ways.)"""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def redact(text: str, key: str) -> str:
    """The text with every piece of eight letters or digits of the key replaced by [key].

    Found are pieces of the key itself, reversed, in hexadecimal and in base64 behind any number of
    bytes, in upper or lower case, and with blanks or marks between the letters.
    """
    text = text.replace(key, "[key]") if key else text
    if len(key) < 8:
        return text
    secrets = [key, key[::-1], key.encode().hex(), key.encode().hex()[::-1]]
    for before in range(3):  # which letters of base64 stand for the key depends on what precedes it
        secrets.append(base64.b64encode(bytes(before) + key.encode()).decode()[4 * (before > 0):])
    forms = "\n".join("".join(filter(str.isalnum, secret)) for secret in secrets).lower()
    places = [i for i, letter in enumerate(text) if letter.isascii() and letter.isalnum()]
    letters, shown = "".join(text[i] for i in places).lower(), list(text)
    for start in range(len(letters) - 7):
        if letters[start:start + 8] in forms:
            first, last = places[start], places[start + 7]
            shown[first:last + 1] = [""] * (last - first) + ["[key]"]
    return re.sub(r"(\[key\])+", "[key]", "".join(shown))


def known_words(text: str) -> str:
    """What may be shown of a server's error: its words on our list, "..." for all others.

    A server may repeat the key, in a form that nobody thought of.
    """
    shown = []
    for word in text.lower().split():
        word = word.strip(".,:;!?()[]{}'\"`")
        if word in KNOWN_WORDS:
            shown.append(word)
        elif shown[-1:] != ["..."]:
            shown.append("...")
    return " ".join(shown) if shown != ["..."] else ""


def read_response(status: int, headers, data: bytes, *, sent: list[str]) -> tuple:
    """What an HTTP response means: (kind, value, seconds to wait or None).

    answer    {"text", "finish", "usage"}
    retry     a cause that may pass             fail    a cause that will not
    dialect   one of the names in `sent`, which this server wants left out or named otherwise
    stop      the name of a problem in texts.toml: nothing more can be asked
    """
    body = parse_json(data)
    message, code = read_error(body, data)
    if 200 <= status < 300:
        if "event-stream" in headers.get("Content-Type", ""):
            return "stop", "streams", None
        found = read_completion(body)
        return ("answer" if isinstance(found, dict) else "retry"), found, None
    if 300 <= status < 400:
        return "stop", "redirects", None
    if status == 402 or "insufficient_quota" in code:
        return "stop", "no_credit", None
    if status in (401, 404):
        return "stop", {401: "wrong_key", 404: "not_found"}[status], None
    if "logprobs" in f"{message} {code}" and status in (400, 403, 422):
        return "stop", "no_logprobs", None
    refused = [name for name in sent if name in f"{message} {code}"]
    if refused and status in (400, 422) and UNSUPPORTED.search(f"{message} {code}"):
        if not TOO_LONG.search(message):
            return "dialect", refused[0], None
    if status not in (408, 409, 429) and status < 500:
        shown = known_words(f"{code} {message}")
        return "fail", f"http {status}: {shown}" if shown else f"http {status}", None
    pause = retry_after(headers)
    if pause and pause > LONGEST_WAIT:
        return "stop", "long_wait", None
    return "retry", f"http {status}", pause


def read_error(body, data: bytes) -> tuple[str, str]:
    """(message, codes) of an error in any form that servers use: not to be shown as they are."""
    found, code = None, ""
    if isinstance(body, dict):
        found = body.get("error", body.get("detail", body.get("message")))
        code = str(body.get("error_type", ""))
    if isinstance(found, dict):
        codes = [found.get(name) for name in ("code", "type", "param")]
        code = " ".join(str(value) for value in codes if value is not None)
        found = str(found.get("message"))
    if found is None:
        found = data[:2000].decode("utf-8", "replace")
    return " ".join(str(found).split())[:300], code


def retry_after(headers, now: Callable[[], float] = time.time) -> float | None:
    """The seconds that a server asks to wait, given as a number or a date. None for nonsense."""
    value = headers.get("retry-after", "")
    try:
        pause = float(value)
    except ValueError:
        try:
            pause = email.utils.parsedate_to_datetime(value).timestamp() - now()
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
    return pause if 0 < pause < math.inf else None


def read_completion(body) -> dict | str:
    """{"text", "finish", "usage": [prompt, completion] or None}, or what is wrong with the body.

    An empty text is an answer, too, and paid for: it is kept, and `usable` calls it a failure.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list):
        return "no chat completion"
    choice = choices[0] if choices and isinstance(choices[0], dict) else {}
    message, finish = choice.get("message"), choice.get("finish_reason")
    if not isinstance(message, dict):
        return "no message"
    text = message.get("content")
    if not text and isinstance(message.get("refusal"), str):
        text, finish = message["refusal"], "refusal"
    if not isinstance(text or "", str) or not isinstance(finish or "", str):
        return "no message"
    if finish not in tuple(ENDINGS):
        finish = "other"  # a server's own words go into no file but as the text
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    known = all(type(count) is int and 0 <= count < 1 << 40 for count in counts)
    found = {"text": text or "", "finish": finish, "usage": counts if known else None}
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
        self.flags, self.address = flags, chat_address(flags.judge_url)
        self.key = read_key(flags.judge_key_env, self.address, flags.judge_proxy)
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
            value = describe_problem(
                value, address=self.address, model=body["model"], proxy=self.flags.judge_proxy,
                key_env=self.flags.judge_key_env)
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
        by_proxy = self.flags.judge_proxy and not self.context
        path = self.address if by_proxy else urlsplit(self.address).path
        with contextlib.suppress(BrokenPipeError):  # a server may refuse before it has read all
            connection.request("POST", path, payload, headers)
        response = connection.getresponse()
        body = read_body(response)
        if body is None:
            return "retry", "answer too long", None
        if time.monotonic() >= until and parse_json(body) is None:  # a body without a length
            raise TimeoutError
        return read_response(response.status, response.headers, body, sent=optional)
