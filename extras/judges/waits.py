"""How long a server asks to wait, and when requests may begin: for all workers together."""

import email.utils
import math
import re
import threading
import time
from collections.abc import Callable

LONGEST_WAIT = 120.0  # seconds; a server that asks for more is asked another day
PART = r"\d+(?:\.\d+)?\s*(?:ms|milliseconds?|h|hours?|m|min|minutes?|s|sec|seconds?)(?![a-z])\s*"
UNITS = {"ms": 0.001, "mi": 60.0, "h": 3600.0, "m": 60.0, "s": 1.0}
# "Please try again in 1m30s", "Please retry after 24 seconds", "retryDelay": "34s"
TOLD = re.compile(rf"(?:try again|retry|wait)[^.\d]{{0,40}}((?:{PART})+)", re.I)


def parse_duration(text: str) -> float | None:
    """The seconds of a duration such as 20s, 1m30s, 350ms, or a bare number; None for nonsense."""
    text = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if not re.fullmatch(f"({PART})+", text):
        return None
    seconds = 0.0
    for number, unit in re.findall(r"([\d.]+)\s*([a-z]+)", text):
        short = "ms" if unit.startswith("milli") else unit[:2]
        seconds += float(number) * UNITS.get(short, UNITS.get(unit[0], 0.0))
    return seconds


def retry_after(headers, now: Callable[[], float] = time.time) -> float | None:
    """The seconds that headers ask to wait, as a number or a date. None for nonsense."""
    value, scale = headers.get("retry-after-ms", ""), 0.001
    if not value:
        value, scale = headers.get("retry-after", ""), 1.0
    try:
        pause = float(value) * scale
    except ValueError:
        try:
            pause = email.utils.parsedate_to_datetime(value).timestamp() - now()
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
    return pause if 0 < pause < math.inf else None


def reset_after(headers) -> float | None:
    """The seconds until a limit that is used up is reset, as x-ratelimit headers say it."""
    waits = [0.0]
    for kind in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{kind}", "0").strip() in ("0", "-1"):
            waits.append(parse_duration(headers.get(f"x-ratelimit-reset-{kind}", "")) or 0.0)
    return max(waits) if 0 < max(waits) <= LONGEST_WAIT else None


def told_wait(status: int, headers, data: bytes) -> float | None:
    """The seconds that a response asks to wait: by a header, in its body, or by a limit's reset."""
    pause = retry_after(headers)
    if pause or status not in (429, 503):
        return pause
    told = TOLD.search(data[:20000].decode("utf-8", "replace"))
    pause = parse_duration(told[1]) if told else None
    return pause or reset_after(headers)


class Pace:
    """When requests to one server may begin, at most so many per minute; 0: without a limit."""

    def __init__(self):
        self.gap, self.next, self.lock = 0.0, -math.inf, threading.Lock()

    def limit(self, per_minute: float) -> None:
        """Let no more requests begin than that; of several limits the lowest holds."""
        if per_minute > 0:
            self.gap = max(self.gap, 60.0 / per_minute)

    def enter(self, now: float) -> float:
        """Seconds to wait before asking again to begin; 0.0: a request begins now."""
        with self.lock:
            if now < self.next:
                return self.next - now
            self.next = now + self.gap
        return 0.0

    def hold(self, until: float) -> None:
        """Let no request begin before then: the server wants a pause from everyone."""
        with self.lock:
            self.next = max(self.next, until)
