"""What a command says, and the log it writes: neither ends a run that nobody reads any more."""

import contextlib
import os
import sys
from pathlib import Path

import data
from methods.flags import spelled


class Disturbed(Exception):
    """Raised where somebody else has changed a file that this process is writing."""


def check_texts(cfg) -> None:
    """Raise ValueError for a setting that could not be printed or saved."""
    for name, value in vars(cfg).items():
        for text in data.as_list(value):
            try:
                str(text).encode()
            except UnicodeEncodeError:
                raise ValueError(f"{spelled(name)} {text} is not UTF-8. Give another.") from None


class Lasting:
    """A stream whose reader may leave: from then on, what is written is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """As of a file."""
        with self.dropping():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of a file."""
        with self.dropping():
            self.stream.flush()

    @contextlib.contextmanager
    def dropping(self):
        """Where writing fails, the stream leads to nowhere."""
        try:
            yield
        except OSError:  # `| head -1`, or a terminal that was closed
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def lasting_streams():
    """Print to streams that may close, or were closed when the process began."""
    before = sys.stdout, sys.stderr
    while None in (sys.stdin, *before) and os.open(os.devnull, os.O_RDWR) <= 2:
        pass  # so that no file of the run becomes number 2, to which libraries write
    sys.stdout, sys.stderr = [Lasting(x or open(os.devnull, "w")) for x in before]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class Watch:
    """The log of a stage, to which this process alone adds one row in each step."""

    def __init__(self, path: Path):
        self.path, self.file = path, open(path, "ab+")
        self.size = self.file.seek(0, os.SEEK_END)

    def check(self) -> str:
        """After a step: "", or what happened to a log that was removed and is now put back.

        Raises Disturbed if it cannot be put back.
        """
        same, added = False, b""
        if self.path.exists():
            with open(self.path, "rb") as file:
                same = os.path.sameopenfile(file.fileno(), self.file.fileno())
                file.seek(self.size if same else 0)
                added = file.read()
        if same and added.endswith(b"\n") and added.count(b"\n") == 1:
            self.size += len(added)
            return ""
        self.file.seek(0)
        kept = self.file.read()  # a file that was removed lives while it is open
        if same or len(kept) < self.size:
            raise Disturbed(f"{self.path} was changed by somebody else while this run wrote it. "
                            "Restore it and run the same command again, or use another --out.")
        if len(kept) == self.size:  # the row of this step is in the new file
            kept += b"".join(added.splitlines(True)[-1:])
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_bytes(kept)
        part.replace(self.path)
        return f"{self.path} was removed or replaced while this run wrote it; it is there again"
