"""The file of answers: what a server was paid for is written down before anyone sees it.

A line is an answer, {"key", "text", ...}, or {"failed": key, "cause"}: a request that got none,
which is a note for the reader, and asked again.
"""

import contextlib
import fcntl
import json
import os
import sys
import threading

# What is read of an answer; and what its "finish" means, "" being a whole answer.
FIELDS = {"key": str, "text": str, "address": str, "request": dict, "sent": dict,
          "finish": (str, type(None)), "usage": (list, type(None))}
ENDINGS = {"stop": "", "eos_token": "", "stop_sequence": "", "end_turn": "",
           "length": "cut at max_tokens", "content_filter": "filtered", "refusal": "refused",
           None: "no finish_reason"}


def parse_json(data: bytes):
    """The JSON in bytes, or None."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def usable(record: dict) -> tuple[str, str]:
    """(text, failure) of an answer on file, without what a model thinks before </think>."""
    text, usage = record["text"], record["usage"]
    failure = ENDINGS.get(record["finish"], "ended otherwise")
    prompt = "".join(message["content"] for message in record["request"]["messages"])
    if not failure and usage and 0 < usage[0] < len("".join(prompt.split())) / 8:
        failure = "prompt cut by the server"  # without a word: its count of tokens tells
    if failure:
        return text, failure
    if "</think>" in text:
        text = text.rpartition("</think>")[2].strip()
    elif text.lstrip().startswith("<think>"):
        return text, "cut while thinking"
    return text, "" if text.strip() else "empty message"


def is_record(record) -> bool:
    """Whether a line is a failed request, or an answer with all that is read of one."""
    if not isinstance(record, dict) or "failed" in record:
        return isinstance(record, dict)
    known = all(isinstance(record.get(name, ...), kind) for name, kind in FIELDS.items())
    return known and {"model", "messages"} <= record["request"].keys()


class AnswerFile:
    """JSON Lines that are only appended to; `records` holds the answers by key.

    Safe against kill -9 and shared by several processes. A torn last line, which a killed writer
    leaves, is moved to PATH.torn; if it lacks nothing but its line break, it gets one.
    """

    def __init__(self, path):
        self.path, self.records, self.lock = path, {}, threading.Lock()
        self.file = open(path, "ab+", buffering=0)
        self.offset = self.lines = 0  # that have been read
        with self.locked():
            pass

    @contextlib.contextmanager
    def locked(self):
        """Hold the file against other threads and processes, and read what they have written."""
        with self.lock:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            try:
                self._read_on()
                yield
            finally:
                fcntl.flock(self.file, fcntl.LOCK_UN)

    def append(self, record: dict) -> None:
        """Write a record, unless an answer with its key is there: the first one stays."""
        with self.locked():
            if record.get("key") not in self.records:
                self.write(json.dumps(record, allow_nan=False).encode() + b"\n")
                self._read_on()

    def write(self, data: bytes) -> None:
        """Append all of the data, which the system may take in parts."""
        while data:
            data = data[self.file.write(data):]

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        os.fsync(self.file.fileno())

    def _read_on(self) -> None:
        self.file.seek(self.offset)
        data = self.file.read()
        *lines, torn = data.split(b"\n")
        if torn and is_record(parse_json(torn)):
            self.write(b"\n")
            data, lines = data + b"\n", [*lines, torn]
        elif torn:
            with open(f"{self.path}.torn", "ab") as kept:
                kept.write(torn + b"\n")
            data = data[:-len(torn)]
            self.file.truncate(self.offset + len(data))
            print(f"warning: moved an unfinished record of {len(torn)} bytes from {self.path} to "
                  f"{self.path}.torn.", file=sys.stderr)
        for number, line in enumerate(lines, self.lines + 1):
            record = parse_json(line)
            if not is_record(record):
                raise ValueError(
                    f"{self.path}, line {number}, is not JSON or lacks a part of an answer. Only a "
                    "torn last line is repaired automatically. Fix or delete that line, or give "
                    "another file.")
            if "failed" not in record:
                self.records.setdefault(record["key"], record)
        self.offset, self.lines = self.offset + len(data), self.lines + len(lines)
