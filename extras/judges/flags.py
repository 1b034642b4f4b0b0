"""The flags of a server, and which of them cannot work."""

import json
import re
from dataclasses import dataclass, fields
from typing import Literal

from extras.judges.addresses import chat_address, explain, read_key
from extras.judges.questions import describe_problem
from methods.flags import check_flags as check_limits
from methods.flags import flag, spelled

PROXY = re.compile(r"http://(\[[\da-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?/?")
# What --judge-extra may not set: limits and prices count on these.
TAKEN = ("model", "messages", "stream", "n", "max_tokens", "max_completion_tokens")
SECRET_FIELD = re.compile(
    r'"\w*(api.?key|secret|passw\w*|token|auth\w*|credentials?)": |sk-\w{8}', re.I)


@dataclass
class ServerFlags:
    """The flags of a judge behind a server."""

    judge_url: str = flag("http://127.0.0.1:8000/v1", "address of an OpenAI-compatible server")
    judge_model: str = flag("", "the judge's name there (to compare several, with commas between)")
    judge_key_env: str = flag("JUDGE_API_KEY", "environment variable that holds the server's key")
    judge_cache: str = flag("", "file of all answers (default: judge.jsonl in --out)")
    judge_workers: int = flag(8, "requests under way at a time", at_least=1)
    judge_rate: float = flag(0.0, "requests per minute at most (0: no limit)", at_least=0)
    judge_tries: int = flag(5, "tries per request", at_least=1)
    judge_timeout: float = flag(60.0, "seconds of silence from the server", above=0)
    judge_deadline: float = flag(300.0, "seconds for a request with all its tries", above=0)
    judge_proxy: str = flag("", "http://host:port (proxies of the environment are not used)")
    judge_ca: str = flag("", "certificates to trust instead of the usual ones", path=True)
    judge_max_tokens: int = flag(0, "let every answer have at least so many tokens", at_least=0)
    judge_extra: str = flag("", "JSON object of more fields for every request's body")
    judge_temperature: str = flag("", "none: send no temperature")
    judge_fold_system: bool = flag(False, "put the system prompt into the user's message")
    max_requests: int = flag(0, "stop before more requests than this (0: no limit)", at_least=0)
    budget: float = flag(0.0, "stop before spending more than this (0: no limit)", at_least=0)
    price_in: float = flag(0.0, "price of a million prompt tokens", at_least=0)
    price_out: float = flag(0.0, "price of a million completion tokens", at_least=0)
    max_unparsed: float = flag(0.1, "stop if a larger share of verdicts is unread", at_least=0)
    verdict: Literal["line", "keyword"] = flag("line", "written, or the likelier of two words")


def role_of(flags) -> str:
    """What the server is to the user: "judge", or "server" for one whose model is asked."""
    return getattr(flags, "role", "judge")


def check_flags(flags, asked: bool) -> None:
    """Raise ValueError for flags that cannot work, or are given though no server is `asked`."""
    given = ServerFlags(**{item.name: getattr(flags, item.name) for item in fields(ServerFlags)})
    for item in fields(ServerFlags):
        if not asked and getattr(given, item.name) != item.default:
            raise ValueError(describe_problem("not_asked", flag=spelled(item.name)))
    if not asked:
        return
    check_limits(given)
    role = role_of(flags)
    if not given.judge_model.split(",")[0].strip():
        raise ValueError(explain("no_model", role))
    if given.budget and not (given.price_in or given.price_out):
        raise ValueError(describe_problem("no_prices", budget=given.budget))
    if given.judge_proxy and not PROXY.fullmatch(given.judge_proxy):
        raise ValueError(describe_problem("bad_proxy"))
    if given.judge_temperature not in ("", "none"):
        raise ValueError(describe_problem("bad_temperature"))
    address = chat_address(given.judge_url, role)
    key = read_key(given.judge_key_env, address, given.judge_proxy, role)
    read_extra(given.judge_extra, key, role)


def read_extra(text: str, key: str = "", role: str = "judge") -> dict:
    """The fields that --judge-extra adds to every request.

    Raises ValueError, which never shows the text, if it cannot or must not be sent and kept.
    """
    if not text:
        return {}
    try:
        extra = json.loads(text)
        plain = json.dumps(extra, allow_nan=False, ensure_ascii=False)
    except (ValueError, RecursionError):
        extra = None
    if not isinstance(extra, dict):
        raise ValueError(explain("bad_extra", role))
    for name in TAKEN:
        if name in extra:
            raise ValueError(explain("taken_extra", role, name=name))
    if SECRET_FIELD.search(plain) or (key and key in plain):
        raise ValueError(explain("secret_extra", role))
    return extra
