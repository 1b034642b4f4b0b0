"""The file of answers: torn lines, damage, several processes, a full disk; what is usable."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from chatserver import ChatServer, completion, lines, make_client, number_of, say

from extras.judges import answers
from extras.judges.answers import AnswerFile, answer_key, checksum, usable
from extras.judges.client import ChatClient

ROOT = Path(__file__).parents[3]


def answer(name, text):
    """A record with all that is read of one, as earlier versions wrote it."""
    record = {"address": "a", "request": {"model": name, "messages": []}, "sample": 0,
              "version": "1", "sent": {}, "finish": "stop", "usage": None, "text": text}
    return {"key": answer_key(record), **record}


def text_of(store, name):
    """The text of that answer in a file."""
    return store.read(answer(name, "")["key"])["text"]


def test_thoughts_are_dropped_and_parts_before_them_do_not_count():
    assert usable(answer("k", "<think>a or b</think>\nVERDICT 1: a")) == ("VERDICT 1: a", "")
    assert usable(answer("k", "a or b</think>VERDICT 1: a")) == ("VERDICT 1: a", "")
    assert usable(answer("k", "<think>a</think> ")) == ("", "empty message")


def test_a_torn_last_line_at_every_byte(tmp_path, record_property):
    texts = ["plain", "é ü ß", "日本語", "🙂 emoji", "line\u2028separator\x85\x1e and \ud800"]
    records = [json.dumps(answer(str(k), text)).encode() for k, text in enumerate(texts)]
    whole = b"".join(record + b"\n" for record in records)
    # A raw multi-byte character, as another program might write it.
    whole = whole.replace(b"\\u65e5", "日".encode())
    starts = [0] + [i + 1 for i, byte in enumerate(whole) if byte == 10]
    record_property("trials", len(whole) + 1)
    path, torn = tmp_path / "a.jsonl", tmp_path / "a.jsonl.torn"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        torn.unlink(missing_ok=True)
        store = AnswerFile(path)
        # A record that lacks its line's end only is whole.
        kept = max(start for start in starts if start <= size + 1)
        assert path.read_bytes() == whole[:kept]
        found = [record["text"] for record in store]
        assert found == texts[:starts.index(kept)]
        assert torn.exists() == (size > kept)
        if size > kept:
            assert torn.read_bytes() == whole[kept:size] + b"\n"
        store.append(answer("new", "more"))
        store.file.close()
        assert text_of(AnswerFile(path), "new") == "more"


@pytest.mark.parametrize("damage", [
    b"{\n", b"null\n", b"[]\n", b"{}\n", b'{"key": "a"}\n', b"\n", b"\xff\n",
    b'{"key": "a", "text": "b"} {"key": "c"}\n', b"[" * 90000 + b"\n"])
def test_damage_elsewhere_is_refused_and_the_file_left_alone(damage, tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(answer("x", "y")).encode() + b"\n"
    path.write_bytes(line + damage + line)
    with pytest.raises(ValueError, match="a.jsonl, line 2, is not JSON or lacks a part of an ans"):
        AnswerFile(path)
    assert path.read_bytes() == line + damage + line


@pytest.mark.parametrize("name", ["address", "request", "sent", "finish", "usage"])
def test_an_answer_that_lacks_a_part_is_refused(name, tmp_path):
    path = tmp_path / "a.jsonl"
    with ChatServer() as server:
        make_client(server, path).ask(say(["1", "2"]))
        whole, other = lines(path)
        lacking = {key: value for key, value in whole.items() if key != name}
        for broken in (lacking, whole | {name: 7}):
            for record in (broken, broken | {"sum": checksum(broken)}):
                path.write_text(json.dumps(record) + "\n" + json.dumps(other) + "\n")
                with pytest.raises(ValueError, match="a.jsonl, line 1, (is not JSON or lacks|was)"):
                    make_client(server, path)


def test_several_processes_share_one_file(tmp_path):
    dice, fork = random.Random(1), multiprocessing.get_context("fork")

    def write(letter):
        store = AnswerFile(tmp_path / "a.jsonl")
        for k in range(150):
            store.append(answer(f"{letter}{k}", letter * dice.choice((10, 5000, 70000))))
            store.append(answer(f"both{k}", letter))
        os._exit(0)
    children = [fork.Process(target=write, args=(letter,)) for letter in "abc"]
    for child in children:
        child.start()
    for child in children:
        child.join()
    keys = [record["key"] for record in lines(tmp_path / "a.jsonl")]
    assert len(keys) == len(set(keys)) == 4 * 150


def test_what_another_process_has_written_is_found(tmp_path):
    mine, other = AnswerFile(tmp_path / "b.jsonl"), AnswerFile(tmp_path / "b.jsonl")
    mine.append(answer("k", "first"))
    with other.locked():
        assert text_of(other, "k") == "first"
    other.append(answer("k", "second"))
    assert len(lines(tmp_path / "b.jsonl")) == 1


# ----- Damage that is JSON -----
def every_place(value, path=()):
    """The paths to all values in a record, and to all names in it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for name, part in inner:
        yield (*path, name)
        if isinstance(part, (dict, list)):
            yield from every_place(part, (*path, name))


def change(record, place, dice):
    """A copy of the record with a name or value at a place changed, removed or exchanged."""
    record = json.loads(json.dumps(record))
    *path, name = place
    inner = record
    for step in path:
        inner = inner[step]
    old = inner.pop(name)
    kinds = ["value"] + ["rename", "remove"] * isinstance(inner, dict)
    kind = dice.choice(kinds)
    if kind == "rename":
        inner[dice.choice([f"{name}s", name.upper(), name[1:] or "x"])] = old
    elif kind == "value":
        new = dice.choice([None, 7, "VERDICT 1: a", [], {}, [1, 2], True, f"{old}x", -1, 1.5])
        new = {"other": 1} if new == old else new
        if isinstance(inner, dict):
            inner[name] = new
        else:
            inner.insert(name, new)
    return record


def damage_files(tmp_path, old):
    """How often a changed line was refused, and how often not; old: as earlier versions wrote."""
    dice, path, counts = random.Random(11), tmp_path / "a.jsonl", [0, 0]
    with ChatServer() as server:
        make_client(server, path, judge_workers=1).ask(say(["1", "2", "3"]))
        records = lines(path)
        if old:
            for record in records:
                del record["sum"], record["nonce"]
        for place in list(every_place(records[1])) * 5:
            changed = change(records[1], place, dice)
            path.write_text("".join(json.dumps(record) + "\n"
                                    for record in (records[0], changed, records[2])))
            before = path.read_bytes()
            try:
                make_client(server, path)
                counts[1] += 1
            except ValueError as error:
                assert str(error).startswith(f"{path}, line 2, ") and path.read_bytes() == before
                counts[0] += 1
    return counts


def test_one_changed_name_or_value_is_refused(tmp_path, record_property):
    refused, used = damage_files(tmp_path, old=False)
    record_property("trials", refused + used)
    assert refused > 100 and used == 0


def test_old_lines_have_no_checksum(tmp_path):
    """The control: without it, changed texts are used; names that are read are refused, too."""
    refused, used = damage_files(tmp_path, old=True)
    assert refused > 60 and used > 5


def test_exchanged_answers_and_flipped_bytes_are_refused(tmp_path, record_property):
    dice, path = random.Random(12), tmp_path / "a.jsonl"
    with ChatServer(lambda request, number: {"body": completion(f"say {number}")}) as server:
        make_client(server, path, judge_workers=1).ask(say(["1", "2", "3"]))
        one, two, three = lines(path)
        one["text"], two["text"] = two["text"], one["text"]
        path.write_text("".join(json.dumps(record) + "\n" for record in (one, two, three)))
        with pytest.raises(ValueError, match="line 1, was changed: its checksum does not fit"):
            make_client(server, path)
        one["text"], two["text"] = two["text"], one["text"]
        whole = [json.dumps(record).encode() + b"\n" for record in (one, two, three)]
        for _ in range(100):
            line = bytearray(whole[1])
            at = dice.randrange(len(line) - 1)
            line[at] = dice.choice([byte for byte in range(32, 256) if byte != line[at]])
            path.write_bytes(whole[0] + line + whole[2])
            try:
                records = list(AnswerFile(path))
            except ValueError as error:
                assert "line 2, " in str(error)
            else:  # another spelling of the same values
                assert records == [one, two, three]
    record_property("trials", 100)


def written_lines(path, n=3):
    """The bytes of n lines, as the client writes them."""
    with ChatServer() as server:
        make_client(server, path).ask(say(map(str, range(n))))
    return path.read_bytes().splitlines(keepends=True)


def test_a_line_as_written_is_checked_by_its_bytes_alone(tmp_path, monkeypatch):
    """So no start takes the time to hash its values. An answer that is read is hashed in full."""
    path = tmp_path / "a.jsonl"
    hashed = []
    whole = b"".join(written_lines(path))
    for name, hash_values in (("answer_key", answer_key), ("checksum", checksum)):
        def count(record, hash_values=hash_values):
            hashed.append(record)
            return hash_values(record)
        monkeypatch.setattr(answers, name, count)
    store = AnswerFile(path)
    assert len(store) == 3 and hashed == []
    records = list(store)
    assert len(hashed) == 2 * 3
    # The same values in another order, or with other blanks, take the longer way.
    for text in (json.dumps(dict(reversed(records[0].items()))),
                 json.dumps(records[0], separators=(",", ":")), json.dumps(records[0]) + " "):
        path.write_bytes(text.encode() + b"\n" + whole)
        hashed.clear()
        assert list(AnswerFile(path))[0] == records[0] and len(hashed) == 2 + 2 * 3


def test_every_bit_of_a_line_as_written_counts(tmp_path, record_property):
    """Every other line is refused, or is another spelling of the same values."""
    path, same = tmp_path / "a.jsonl", 0
    line, last, _ = written_lines(path)
    record_property("trials", 8 * (len(line) - 1))
    for at in range(len(line) - 1):
        for bit in range(8):
            changed = bytearray(line)
            changed[at] ^= 1 << bit
            assert not answers.is_as_written(bytes(changed))
            record = answers.parse_json(bytes(changed))
            if not answers.find_damage(record):
                assert record == json.loads(line)
                same += 1
    assert answers.is_as_written(line) and same < 50
    for size in range(1, len(line)):  # a line that is cut, and joined to the next one
        path.write_bytes(line[:size] + last)
        with pytest.raises(ValueError, match="a.jsonl, line 1, is not JSON or lacks a part"):
            AnswerFile(path)


def test_a_wrong_key_under_a_right_checksum_is_refused_when_it_is_read(tmp_path):
    """Nobody but a program with a bug writes such a line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(answers.write_line(answer("x", "y") | {"key": "0" * 64})[1])
    store = AnswerFile(path)
    with pytest.raises(ValueError, match="a.jsonl, line 1, was changed: its key does not fit"):
        store.read("0" * 64)
    lacking = {name: value for name, value in answer("x", "y").items() if name != "sent"}
    path.write_bytes(2 * answers.write_line(lacking)[1])
    with pytest.raises(ValueError, match="a.jsonl, line 1, is not JSON or lacks a part"):
        AnswerFile(path)


# ----- A full disk -----
FULL_DISK = """
import resource, signal, sys
from extras.judges.answers import AnswerFile, answer_key
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
store = AnswerFile(sys.argv[1])
try:
    for k in range(99):
        record = {"address": "a", "request": {"model": "m", "messages": []}, "sample": k,
                  "version": "1", "sent": {}, "finish": "stop", "usage": None, "text": "x" * 300}
        store.append({"key": answer_key(record), **record})
except OSError as error:
    print(k, error.strerror, error.filename)
"""


def test_a_full_disk_is_an_error_and_loses_no_earlier_answer(tmp_path):
    said = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "a.jsonl")], text=True,
                          capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."})
    kept = int(said.stdout.split()[0])
    assert f"File too large {tmp_path / 'a.jsonl'}" in said.stdout and kept > 10
    assert (tmp_path / "a.jsonl").read_bytes().endswith(b"}\n")
    assert len(AnswerFile(tmp_path / "a.jsonl")) == kept


def fill_disk(server, path, kept, monkeypatch):
    """(what the client raised, requests sent after the failed write): `kept` answers fit."""
    failed, write = [], AnswerFile.write

    def fail(self, data):
        if len(self) >= kept:
            failed.append(len(server.requests))
            self.file.write(data[:len(data) // 2])  # a part still fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "write", fail)
        with pytest.raises(OSError) as found:
            make_client(server, path, judge_workers=8).ask(say(map(str, range(60))))
    return found.value, len(server.requests) - failed[0]


def answers_of(request, dice):
    return {"delay": dice.uniform(0, 0.005), "body": completion(f"{number_of(request)}")}


@pytest.mark.parametrize("protected", [True, False], ids=["ours", "no name, no end"])
def test_a_full_disk_ends_the_sending_and_is_named(protected, tmp_path, monkeypatch,
                                                      record_property):
    """Twenty-five disks; the control lets workers go on, and leaves errors as they come."""
    dice, unnamed, sent_after = random.Random(13), 0, []
    if not protected:
        monkeypatch.setattr(answers, "naming", contextlib.nullcontext)
        monkeypatch.setattr(ChatClient, "_halt", lambda self, error: None)
    for disk in range(25):
        path, kept = tmp_path / f"{disk}.jsonl", dice.randrange(1, 30)
        with ChatServer(lambda request, number: answers_of(request, dice)) as server:
            error, after = fill_disk(server, path, kept, monkeypatch)
            unnamed += error.filename != str(path)
            sent_after.append(after)
            assert len(AnswerFile(path)) == kept == len(lines(path))
            if protected:
                make_client(server, path).ask(say(map(str, range(60))))
                assert len(server.sent) <= 60 + 8  # one a worker: those that were under way
    record_property("trials", 25)
    assert (unnamed == 0 and max(sent_after) < 8) == protected
