"""The file of answers: torn lines, damage, several processes, a full disk; what is usable."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from chatserver import ChatServer, lines, make_client, say

from extras.judges.answers import AnswerFile, usable

ROOT = Path(__file__).parents[3]


def answer(key, text):
    """A record with all that is read of one."""
    return {"key": key, "text": text, "address": "a", "request": {"model": "m", "messages": []},
            "sent": {}, "finish": "stop", "usage": None}


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
        found = [record["text"] for record in store.records.values()]
        assert found == texts[:starts.index(kept)]
        assert torn.exists() == (size > kept)
        if size > kept:
            assert torn.read_bytes() == whole[kept:size] + b"\n"
        store.append(answer("new", "more"))
        store.file.close()
        assert AnswerFile(path).records["new"]["text"] == "more"


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
            path.write_text(json.dumps(broken) + "\n" + json.dumps(other) + "\n")
            with pytest.raises(ValueError, match="a.jsonl, line 1, is not JSON or lacks a part"):
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
        assert other.records["k"]["text"] == "first"
    other.append(answer("k", "second"))
    assert len(lines(tmp_path / "b.jsonl")) == 1


FULL_DISK = """
import resource, signal, sys
from extras.judges.answers import AnswerFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
store = AnswerFile(sys.argv[1])
record = {"address": "a", "request": {"model": "m", "messages": []}, "sent": {}, "finish": "stop",
          "usage": None, "text": "x" * 300}
try:
    for k in range(99):
        store.append({"key": str(k), **record})
except OSError as error:
    print(k, error.strerror)
"""


def test_a_full_disk_is_an_error_and_loses_no_earlier_answer(tmp_path):
    said = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "a.jsonl")], text=True,
                          capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."})
    kept = int(said.stdout.split()[0])
    assert "File too large" in said.stdout and kept > 10
    assert len(AnswerFile(tmp_path / "a.jsonl").records) == kept
