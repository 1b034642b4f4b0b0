"""The file of answers: what a server was paid for is written down before anyone sees it.

A line is an answer, {"key", "text", ...}, or {"failed": key, "cause"}: a request that got none,
which is a note for the reader, and asked again. Each line ends with a checksum, "sum", of its
bytes, or of its values in lines of earlier versions; the first ones have none, and no nonce. Where
the bytes do not fit the checksum, and when an answer is read, values and key are hashed again.

Answers stay in the file until they are asked for; in memory is only where each one begins. Beside a
long file is FILE.index, which says so for the lines that have been checked, with a hash of them:
while it fits, they are not checked again when a program starts. It can be deleted at any time.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import threading
from collections import deque
from pathlib import Path

from extras.judges.progress import warn

# What is read of an answer; and what its "finish" means, "" being a whole answer.
FIELDS = {"key": str, "text": str, "address": str, "request": dict, "sample": int, "version": str,
          "sent": dict, "finish": (str, type(None)), "usage": (list, type(None))}
COVERED = ("address", "request", "sample", "version")  # by the key
ENDINGS = {"stop": "", "eos_token": "", "eos": "", "stop_sequence": "", "end_turn": "",
           "length": "cut at max_tokens", "content_filter": "filtered", "refusal": "refused",
           "tool_calls": "ended otherwise", "other": "ended otherwise"}
CUT, EMPTY = ENDINGS["length"], "empty message"
BLOCK = 1 << 20  # bytes that are read at a time, and the shortest part that is worth an index
ENTRY = struct.Struct("<32sQ")  # of the index: a key, and where its line begins
INDEX_VERSION = 1  # of the checks that its lines have passed


def parse_json(data: bytes):
    """The JSON in bytes, or None."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def usable(record: dict) -> tuple[str, str]:
    """(text, failure) of an answer on file, without what a model thinks before </think>."""
    text, usage = record["text"], record["usage"]
    failure = name_failure(record)
    if record.get("first") and failure == CUT:  # the probabilities of its only token were wanted
        failure = ""
    prompt = "".join(message["content"] for message in record["request"]["messages"])
    # The count of tokens tells of a prompt that was cut without a word. To some servers, the part
    # of it that was in a cache does not count.
    if not failure and usage and usage[0] > 0:
        if usage[0] + record.get("cached", 0) < len("".join(prompt.split())) / 8:
            failure = "prompt cut by the server"
    if failure or record.get("first"):
        return text, failure
    if "</think>" in text:
        text = text.rpartition("</think>")[2].strip()
    elif text.lstrip().startswith("<think>"):
        return text, "cut while thinking"
    return text, "" if text.strip() else EMPTY


def name_failure(record: dict) -> str:
    """What an answer's ending says is wrong with it, or "".

    Where it says nothing, the number of tokens does. Without that, the text is taken as whole.
    """
    finish, usage = record["finish"], record["usage"]
    if finish not in (None, "unknown"):
        return ENDINGS.get(finish, "ended otherwise")
    most = record["request"].get("max_tokens")
    return CUT if usage and isinstance(most, int) and usage[1] >= most else ""


def answer_key(record: dict) -> str:
    """The key of the answer to a request. It covers all that is sent but the nonce."""
    covered = {name: record[name] for name in COVERED}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def checksum(record: dict) -> str:
    """A hash of all values of a record but its checksum."""
    rest = {name: value for name, value in record.items() if name != "sum"}
    return hash_text(json.dumps(rest, sort_keys=True).encode())


def hash_text(text: bytes) -> str:
    """The checksum of a record's text, in which its names are sorted."""
    return hashlib.sha256(text).hexdigest()[:16]


def write_line(record: dict) -> tuple[dict, bytes]:
    """(the record with its checksum, its line). Raises ValueError for a number that JSON lacks."""
    text = json.dumps(record, sort_keys=True, allow_nan=False).encode()
    found = hash_text(text)
    return {**record, "sum": found}, text[:-1] + f', "sum": "{found}"}}\n'.encode()


def is_as_written(line: bytes) -> bool:
    """Whether the bytes of a line fit the checksum at its end."""
    text, _, found = line.rpartition(b', "sum": "')
    return found == f'{hash_text(text + b"}")}"}}\n'.encode()


def find_damage(record, *, as_written: bool = False) -> str:
    """What is wrong with a line, or "" for a failed request or an answer that is as written.

    as_written: its bytes fit its checksum, so nothing is hashed again.
    """
    lacking = "is not JSON or lacks a part of an answer"
    if not isinstance(record, dict):
        return lacking
    if "sum" in record and not as_written and record["sum"] != checksum(record):
        return "was changed: its checksum does not fit"
    if "failed" in record:
        return ""
    if not all(isinstance(record.get(name, ...), kind) for name, kind in FIELDS.items()):
        return lacking
    messages, usage = record["request"].get("messages"), record["usage"] or [0, 0]
    counts = [*usage, record.get("cached", 0)]
    whole = "model" in record["request"] and isinstance(messages, list) and len(counts) == 3
    if not whole or not all(isinstance(count, int) for count in counts):
        return lacking
    if "nonce" in record and "sum" not in record:  # written together
        return "was changed: its checksum is missing"
    fits = as_written or record["key"] == answer_key(record)
    return "" if fits else "was changed: its key does not fit"


@contextlib.contextmanager
def naming(path):
    """Let every OSError say which file it is about: those of write and fsync do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class AnswerFile:
    """JSON Lines that are only appended to. Of answers with the same key, the last one counts.

    Safe against kill -9 and shared by several processes. A torn last line, which a killed writer
    leaves, is moved to PATH.torn; if it lacks nothing but its line break, it gets one.
    """

    def __init__(self, path):
        self.path, self.lock = path, threading.Lock()
        self.waiting = deque()  # what threads have to write
        self.starts = {}  # {key, as bytes: where its line begins}
        self.dialects = {}  # {(address, model): "sent" of its last answer}
        self.file = open(path, "ab+", buffering=0)
        self.offset = self.lines = self.indexed = 0  # that have been read; that the index covers
        self.hash = hashlib.sha256()  # of what has been read
        self._load_index()
        with self.locked():
            pass
        self._save_index()

    def __len__(self) -> int:
        return len(self.starts)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self.starts

    def __iter__(self):
        for key in list(self.starts):
            yield self.read(key.hex())

    @contextlib.contextmanager
    def locked(self):
        """Hold the file against other threads and processes, and read what they have written."""
        with self.lock, self._held():
            yield

    @contextlib.contextmanager
    def _held(self):
        """The same for a thread that holds the lock."""
        with naming(self.path):
            fcntl.flock(self.file, fcntl.LOCK_EX)
            try:
                self._read_on()
                yield
            finally:
                fcntl.flock(self.file, fcntl.LOCK_UN)

    def read(self, key: str) -> dict:
        """The answer with that key, checked again. Raises KeyError if there is none."""
        start = self.starts[bytes.fromhex(key)]
        line, size = b"", 1 << 12
        with naming(self.path):
            while b"\n" not in line:
                part = os.pread(self.file.fileno(), size, start + len(line))
                if not part:
                    break
                line, size = line + part, 4 * size
        record = parse_json(line.partition(b"\n")[0])
        problem = find_damage(record)
        if problem or record.get("key") != key:
            number = 1 + sum(block.count(b"\n") for block in self._blocks(start))
            raise self._refuse(number, problem or "was changed")
        return record

    def append(self, record: dict, *, replace: bool = False) -> dict:
        """Write a record, unless an answer with its key is there: the first one stays.

        replace: write it all the same if the answer that is there is empty. Returns the record
        that counts.
        """
        record, line = write_line(record)
        entry = {"record": record, "line": line, "replace": replace}
        self.waiting.append(entry)
        with self.lock:
            # The thread that comes first writes for all that wait by then.
            if "kept" not in entry and "error" not in entry:
                with self._held():
                    while self.waiting:
                        self._write_entry(self.waiting.popleft())
        if "error" in entry:
            raise entry["error"]
        return entry["kept"]

    def _write_entry(self, entry: dict) -> None:
        """Write what a thread has to write; adds the record that counts, "kept", or "error"."""
        try:
            record = entry["record"]
            if "key" in record and record["key"] in self:
                entry["kept"] = self.read(record["key"])
                if not entry["replace"] or usable(entry["kept"])[1] != EMPTY:
                    return
            try:
                with naming(self.path):
                    self.write(entry["line"])
            except OSError:
                self.file.truncate(self.offset)  # leave no half a line on a full disk
                raise
            self._take(record, entry["line"])
            entry["kept"] = record
        except (OSError, ValueError) as error:
            entry["error"] = error

    def write(self, data: bytes) -> None:
        """Append all of the data, which the system may take in parts."""
        while data:
            data = data[self.file.write(data):]

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        with naming(self.path):
            os.fsync(self.file.fileno())
        self._save_index()

    def _read_on(self) -> None:
        """Check and take the lines that are new, whoever wrote them."""
        if os.fstat(self.file.fileno()).st_size <= self.offset:
            return
        with open(os.dup(self.file.fileno()), "rb", BLOCK) as reader:
            reader.seek(self.offset)
            for line in reader:
                record = parse_json(line)
                problem = find_damage(record, as_written=is_as_written(line))
                if line.endswith(b"\n") or not problem:
                    if problem:
                        raise self._refuse(self.lines + 1, problem)
                    if not line.endswith(b"\n"):
                        self.write(b"\n")
                        line += b"\n"
                    self._take(record, line)
                else:
                    self._move_torn(line)

    def _move_torn(self, line: bytes) -> None:
        with open(f"{self.path}.torn", "ab") as kept:
            kept.write(line + b"\n")
        self.file.truncate(self.offset)
        warn(f"warning: moved an unfinished record of {len(line)} bytes from {self.path} to "
             f"{self.path}.torn.")

    def _take(self, record: dict, line: bytes) -> None:
        """Note a line that stands at the end of what has been read."""
        if "failed" not in record:
            self.starts[bytes.fromhex(record["key"])] = self.offset
            self.dialects[record["address"], record["request"]["model"]] = record["sent"]
        self.offset, self.lines = self.offset + len(line), self.lines + 1
        self.hash.update(line)

    def _refuse(self, number: int, problem: str) -> ValueError:
        return ValueError(
            f"{self.path}, line {number}, {problem}. Only a torn last line is repaired "
            "automatically. Fix or delete that line, or give another file.")

    def _blocks(self, end: int):
        """The file up to there, in blocks."""
        for start in range(0, end, BLOCK):
            yield os.pread(self.file.fileno(), min(BLOCK, end - start), start)

    # ----- The index -----
    def _load_index(self) -> None:
        """Take the lines that an index covers, if it and they are as they were."""
        try:
            data = Path(f"{self.path}.index").read_bytes()
        except OSError:
            return
        digest, _, rest = data.partition(b"\n")
        if hashlib.sha256(rest).hexdigest().encode() != digest:
            return
        head, _, entries = rest.partition(b"\n")
        head, found = json.loads(head), hashlib.sha256()
        for block in self._blocks(head["bytes"]):
            found.update(block)
        if (head["version"], head["sha256"]) != (INDEX_VERSION, found.hexdigest()):
            return
        self.starts = dict(ENTRY.iter_unpack(entries))
        self.dialects = {(address, model): sent for address, model, sent in head["dialects"]}
        self.offset = self.indexed = head["bytes"]
        self.lines, self.hash = head["lines"], found

    def _save_index(self) -> None:
        """Write the index, if it would cover much more than it does."""
        with self.lock:
            if self.offset - self.indexed < max(BLOCK, self.offset // 8):
                return
            head = {"version": INDEX_VERSION, "bytes": self.offset, "lines": self.lines,
                    "sha256": self.hash.hexdigest(),
                    "dialects": [[*place, sent] for place, sent in self.dialects.items()]}
            entries = b"".join(ENTRY.pack(*entry) for entry in self.starts.items())
            self.indexed = self.offset
        rest = json.dumps(head).encode() + b"\n" + entries
        new = f"{self.path}.index.{os.getpid()}"
        try:
            Path(new).write_bytes(hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
            os.replace(new, f"{self.path}.index")
        except OSError:  # the next start takes longer; that is all
            Path(new).unlink(missing_ok=True)
