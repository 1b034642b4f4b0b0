"""The file of answers: what a server was paid for is written down before anyone sees it.

A line is an answer, {"key", "text", ...}, or {"failed": key, "cause"}: a request that got none,
which is a note for the reader, and asked again. Each line ends with a checksum of its other values,
"sum", and an answer's key is computed again from its request; lines of earlier versions have no
checksum and no nonce.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import threading

# What is read of an answer; and what its "finish" means, "" being a whole answer.
FIELDS = {"key": str, "text": str, "address": str, "request": dict, "sample": int, "version": str,
          "sent": dict, "finish": (str, type(None)), "usage": (list, type(None))}
COVERED = ("address", "request", "sample", "version")  # by the key
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
    if record.get("first") and record["finish"] == "length":
        failure = ""
    prompt = "".join(message["content"] for message in record["request"]["messages"])
    if not failure and usage and 0 < usage[0] < len("".join(prompt.split())) / 8:
        failure = "prompt cut by the server"  # without a word: its count of tokens tells
    if failure or record.get("first"):  # the probabilities of its only token are the answer
        return text, failure
    if "</think>" in text:
        text = text.rpartition("</think>")[2].strip()
    elif text.lstrip().startswith("<think>"):
        return text, "cut while thinking"
    return text, "" if text.strip() else "empty message"


def answer_key(record: dict) -> str:
    """The key of the answer to a request. It covers all that is sent but the nonce."""
    covered = {name: record[name] for name in COVERED}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def checksum(record: dict) -> str:
    """A hash of all values of a record but its checksum."""
    rest = {name: value for name, value in record.items() if name != "sum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def find_damage(record) -> str:
    """What is wrong with a line, or "" for a failed request or an answer that is as written."""
    lacking = "is not JSON or lacks a part of an answer"
    if not isinstance(record, dict):
        return lacking
    if "sum" in record and record["sum"] != checksum(record):
        return "was changed: its checksum does not fit"
    if "failed" in record:
        return ""
    if not all(isinstance(record.get(name, ...), kind) for name, kind in FIELDS.items()):
        return lacking
    messages, usage = record["request"].get("messages"), record["usage"] or [0, 0]
    if "model" not in record["request"] or not isinstance(messages, list):
        return lacking
    if len(usage) != 2 or not all(isinstance(count, int) for count in usage):
        return lacking
    if "nonce" in record and "sum" not in record:  # written together
        return "was changed: its checksum is missing"
    return "" if record["key"] == answer_key(record) else "was changed: its key does not fit"


@contextlib.contextmanager
def naming(path):
    """Let every OSError say which file it is about: those of write and fsync do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


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
        with self.lock, naming(self.path):
            fcntl.flock(self.file, fcntl.LOCK_EX)
            try:
                self._read_on()
                yield
            finally:
                fcntl.flock(self.file, fcntl.LOCK_UN)

    def append(self, record: dict) -> None:
        """Write a record, unless an answer with its key is there: the first one stays."""
        record = {**record, "sum": checksum(record)}
        with self.locked():
            if record.get("key") in self.records:
                return
            try:
                self.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            except OSError:
                self.file.truncate(self.offset)  # leave no half a line on a full disk
                raise
            self._read_on()

    def write(self, data: bytes) -> None:
        """Append all of the data, which the system may take in parts."""
        while data:
            data = data[self.file.write(data):]

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        with naming(self.path):
            os.fsync(self.file.fileno())

    def _read_on(self) -> None:
        self.file.seek(self.offset)
        data = self.file.read()
        *lines, torn = data.split(b"\n")
        if torn and not find_damage(parse_json(torn)):
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
            if problem := find_damage(record):
                raise ValueError(
                    f"{self.path}, line {number}, {problem}. Only a torn last line is repaired "
                    "automatically. Fix or delete that line, or give another file.")
            if "failed" not in record:
                self.records.setdefault(record["key"], record)
        self.offset, self.lines = self.offset + len(data), self.lines + len(lines)
