"""How far the requests are: a bar on a terminal, elsewhere a line a minute at most. On stderr."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable

from tqdm import tqdm

LINE_SECONDS = 60.0  # between two lines, where there is no terminal
REFRESH_SECONDS = 1.0  # between two looks of the bar at the clock


def warn(text: str) -> None:
    """Print a line on stderr, above a bar if there is one. A closed stderr stops nothing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def format_left(seconds: float) -> str:
    """A time that is left, in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Progress:
    """The progress of one client; each call of `begin` starts another count."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic):
        self.name, self.clock, self.told, self.refreshed = name, clock, clock(), 0.0
        self.begin(0)

    def begin(self, total: int) -> None:
        """Start with `total` requests to do."""
        self.total, self.done, self.began, self.failures = total, 0, self.clock(), Counter()
        off = True
        with contextlib.suppress(OSError, ValueError, AttributeError):
            off = not total or not sys.stderr.isatty()
        self.bar = None if off else tqdm(total=total, desc=self.name, unit="request", leave=False,
                                         dynamic_ncols=True)

    def add(self, failure: str) -> None:
        """One more request is done, with a failure or with "" for none."""
        self.done += 1
        if failure:
            self.failures[failure.split(":")[0]] += 1
        with contextlib.suppress(OSError, ValueError):  # a terminal may go away
            if self.bar is not None:
                self.bar.set_postfix(self.failures, refresh=False)
                self.bar.update()

    def look(self) -> None:
        """Show the time that passes, from time to time."""
        now = self.clock()
        if self.bar is None and now - self.told >= LINE_SECONDS:
            self.told = now
            warn(self.describe(now))
        elif self.bar is not None and now - self.refreshed >= REFRESH_SECONDS:
            self.refreshed = now
            with contextlib.suppress(OSError, ValueError):
                self.bar.refresh()

    def describe(self, now: float) -> str:
        """The line."""
        parts = [f"{self.done} of {self.total} requests done"]
        parts += [f"{failure} {n}" for failure, n in self.failures.most_common()]
        if self.done:
            left = (now - self.began) / self.done * (self.total - self.done)
            parts.append(f"about {format_left(left)} left")
        return f"{self.name}: {', '.join(parts)}."

    def close(self) -> None:
        """Draw the bar as it is now, and take it away."""
        with contextlib.suppress(OSError, ValueError):
            if self.bar is not None:
                self.bar.refresh()
                self.bar.close()
        self.bar = None
