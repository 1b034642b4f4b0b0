"""Where a server is, and its key, which goes to that server alone and is shown nowhere."""

import base64
import ipaddress
import os
import re
from urllib.parse import parse_qsl

import requests
from requests.packages import urllib3  # the one that requests itself uses

from extras.judges.questions import TEXTS, describe_problem

# What may be a secret in the query of an address: by the name of a value, or by its looks.
SECRET_NAME = re.compile("key|token|sig|secret|pass|pwd|auth|cred|code|session", re.I)
SECRET_VALUE = re.compile("sk-|[A-Za-z0-9]{16,}")
PROXY_NAMES = ("https_proxy", "http_proxy", "all_proxy")
KNOWN_WORDS = frozenset(TEXTS["errors"]["words"].split())


def explain(problem: str, role: str, **values) -> str:
    """The sentence of that name in texts.toml, with the words for a server of that role."""
    return describe_problem(problem, **TEXTS["roles"][role], **values)


def chat_address(url: str, role: str = "judge") -> str:
    """The address of chat completions behind a URL, as the client will connect to it.

    A path that ends in /chat/completions is used as it is. Raises ValueError for what is no such
    address; what may be a password is not shown.
    """
    shown = repr(re.sub(r"[?#].*", "...", url, flags=re.S)[:80])
    if "@" in url or "%40" in url:
        shown = "(not shown, since it holds an @)"
    problem = ValueError(explain("bad_address", role, shown=shown))
    if not re.fullmatch(r"https?://[!-~]+", url, re.I) or "\\" in url:
        raise problem
    try:
        parts = urllib3.util.parse_url(requests.Request("POST", url).prepare().url)
    except (requests.RequestException, urllib3.exceptions.HTTPError, UnicodeError):
        raise problem from None
    query = parts.query or ""
    if parts.auth or parts.fragment or not parts.host or may_hold_secret(query):
        raise ValueError(explain("secret_address", role))
    path = (parts.path or "").rstrip("/")
    if not path.endswith("/chat/completions"):
        if not re.search(r"/v\d", path):
            path += "/v1"
        path += "/chat/completions"
    return f"{parts.scheme}://{parts.netloc}{path}" + f"?{query}" * bool(query)


def may_hold_secret(query: str) -> bool:
    """Whether a part of a query has the name or the looks of a secret."""
    return any(SECRET_NAME.search(name) or SECRET_VALUE.search(f"{name} {value}")
               for name, value in parse_qsl(query, keep_blank_values=True))


def read_key(name: str, address: str, proxy: str = "", role: str = "judge") -> str:
    """The key in the environment variable `name`, or "" where there is none.

    Raises ValueError, which never shows the key, if it cannot or must not be sent there.
    """
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,63}", name):
        raise ValueError(explain("key_name", role))
    key = os.environ.get(name, "")
    if re.search(r"[^!-~]", key):
        raise ValueError(describe_problem("key_characters", name=name))
    if len(key) >= 8 and key in address:
        raise ValueError(explain("secret_address", role))
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


def describe_ignored_proxies(address: str, proxy: str) -> str:
    """A sentence that names the proxies of the environment, which are not used; "" for none."""
    names = [name for name in sorted(os.environ)
             if name.lower() in PROXY_NAMES and os.environ[name]]
    if proxy or not names or is_loopback(urllib3.util.parse_url(address).host or ""):
        return ""
    return " " + describe_problem("proxy_ignored", names=", ".join(names))


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
