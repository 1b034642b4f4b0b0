"""One exchange with an OpenAI-compatible server: where it is, and what its response means.

The key goes to that server alone: not over plain http to another machine, not along a redirect,
not into a message or a file. Proxies, netrc and certificates of the environment are not used.
"""

import base64
import email.utils
import http.client
import ipaddress
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable

import requests
from requests.packages import urllib3  # the one that requests itself uses

from extras.judges.answers import ENDINGS, parse_json
from extras.judges.questions import describe_problem

CONNECT_SECONDS = 5.0
LONGEST_BODY = 8 << 20  # bytes, decompressed
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is asked another day
OPTIONAL = ("max_tokens", "temperature", "top_p", "seed")  # servers refuse some of these names
# An error that refuses a name, not its value ("must be", "at most") ...
UNSUPPORTED = re.compile(
    r"unsupported|unrecogni[sz]ed|unknown.(?:parameter|argument|field|name)|"
    r"unexpected (?:keyword|argument|parameter|field)|(?:not|n't) (?:be )?support|"
    r"(?:inputs are|fields) not permitted|(?:was|were) unexpected", re.I)
# ... and one that refuses a prompt for its length: others may fit.
TOO_LONG = re.compile("context|too long|maximum.{0,20}tokens", re.I)


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
    """The text with every piece of eight characters of the key, plain or in base64, replaced."""
    if len(key) < 8:
        return text.replace(key, "[key]") if key else text
    secrets, shown = key + "\n" + base64.b64encode(key.encode()).decode(), list(text)
    for start in range(len(text) - 7):
        if text[start:start + 8] in secrets:
            shown[start:start + 8] = [""] * 7 + ["[key]"]
    return "".join(shown).replace("[key]" * 2, "[key]")


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
    refused = [name for name in sent if name in f"{message} {code}"]
    if refused and status in (400, 422) and UNSUPPORTED.search(f"{message} {code}"):
        if not TOO_LONG.search(message):
            return "dialect", refused[0], None
    if status not in (408, 409, 429) and status < 500:
        return "fail", f"http {status}: {message}", None
    pause = retry_after(headers)
    if pause and pause > LONGEST_WAIT:
        return "stop", "long_wait", None
    return "retry", f"http {status}", pause


def read_error(body, data: bytes) -> tuple[str, str]:
    """(message, codes) of an error in any form that servers use, the message on one short line."""
    found, code = None, ""
    if isinstance(body, dict):
        found = body.get("error", body.get("detail", body.get("message")))
        code = str(body.get("error_type", ""))
    if isinstance(found, dict):
        code = " ".join(str(found.get(name)) for name in ("code", "type", "param"))
        found = str(found.get("message"))
    if found is None:
        found = data[:2000].decode("utf-8", "replace")
    line = " ".join(str(found).split())
    return "".join(char if char.isprintable() else " " for char in line)[:300], code


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
    return {"text": text or "", "finish": finish, "usage": counts if known else None}


class Server:
    """An address and its key, with a connection for each thread."""

    def __init__(self, flags):
        self.flags, self.local = flags, threading.local()
        self.address = chat_address(flags.judge_url)
        self.key = read_key(flags.judge_key_env, self.address, flags.judge_proxy)

    def exchange(self, body: dict, optional: list[str], left: float) -> tuple:
        """Send a request; (kind, value, pause) as read_response has them, within `left` seconds.

        `optional` are the names in the body that may be left out. A stop is a whole sentence.
        What the library says of an error is not repeated: it may hold the key.
        """
        broken = requests.exceptions
        try:
            kind, value, pause = self.post(json.dumps(body).encode(), optional, left)
        except broken.SSLError as error:
            trusted = "CERTIFICATE_VERIFY_FAILED" not in str(error)
            kind, value, pause = "stop", "no_tls" if trusted else "not_trusted", None
        except broken.ProxyError:
            kind, value, pause = "stop", "no_proxy", None
        except broken.ConnectTimeout:
            return "retry", "no server", None
        except broken.Timeout:
            return "retry", "no answer in time", None
        except (broken.RequestException, urllib3.exceptions.HTTPError,
                http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr((error.args or [None])[0], "reason", None)
            refused = isinstance(reason, urllib3.exceptions.NewConnectionError)
            return "retry", "no server" if refused else "connection lost", None
        if kind == "stop":
            if value == "wrong_key" and not self.key:
                value = "no_key"
            value = describe_problem(
                value, address=self.address, model=body["model"], proxy=self.flags.judge_proxy,
                key_env=self.flags.judge_key_env)
        return kind, value, pause

    def post(self, payload: bytes, optional: list[str], left: float) -> tuple:
        """`exchange`, but a stop is a name, and a broken connection raises.

        Through an adapter, not a session: so there is no redirect, cookie, netrc, proxy or
        certificate of the environment.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "judge"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = requests.Request("POST", self.address, headers=headers, data=payload).prepare()
        if not hasattr(self.local, "adapter"):
            self.local.adapter = requests.adapters.HTTPAdapter()
        proxies = dict.fromkeys(("http", "https"), self.flags.judge_proxy)
        until, body = time.monotonic() + left, b""
        silence = min(CONNECT_SECONDS, left), min(self.flags.judge_timeout, left)
        with self.local.adapter.send(request, stream=True, timeout=silence, proxies=proxies,
                                     verify=self.flags.judge_ca or True) as response:
            while chunk := response.raw.read1(1 << 14, decode_content=True):
                body += chunk
                if len(body) > LONGEST_BODY:
                    return "retry", "answer too long", None
                if time.monotonic() > until:
                    return "retry", "no answer in time", None
            return read_response(response.status_code, response.headers, body, sent=optional)
