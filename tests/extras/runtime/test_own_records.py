"""A run's own records lose nothing that was reported, and are repaired before a run goes on."""

import json
import os
import random
import time

import pytest
import short_runs as runs

import data
import train
from extras.runtime.files import read_keys
from methods.candidates import candidate_key

FAULTS = pytest.mark.faults


def by_id(record):
    """What tells the records of these tests apart."""
    return record["id"]


def test_a_torn_last_line_is_moved_and_a_whole_one_is_ended(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    assert read_keys(path, by_id) == []
    path.write_bytes(b'{"id": 1}\n{"id": 2}')
    assert read_keys(path, by_id) == [1, 2] and path.read_bytes() == b'{"id": 1}\n{"id": 2}\n'
    assert capsys.readouterr().out == ""
    path.write_bytes(b'{"id": 1}\n{"id": 2, "te')
    assert read_keys(path, by_id) == [1] and path.read_bytes() == b'{"id": 1}\n'
    assert (tmp_path / "r.jsonl.torn").read_bytes() == b'{"id": 2, "te'
    assert "moved an unfinished record of 13 bytes" in capsys.readouterr().out


def test_duplicate_records_are_dropped_and_contradictions_refused(tmp_path, capsys):
    """1,000 records, 200 of them again: the first is kept. Others under a known key: refused."""
    rng, path = random.Random(0), tmp_path / "candidates.jsonl"
    records = [{"task": "t", "id": str(i), "wording": "w", "sample": 0,
                "response": rng.choice("abc")} for i in range(1000)]
    data.append_records(path, records + rng.sample(records, 200))
    assert read_keys(path, candidate_key) == [("t", str(i), "w", 0) for i in range(1000)]
    assert data.read_records(path) == records
    assert "dropped 200 duplicate records" in capsys.readouterr().out
    for record in rng.sample(records, 100):
        data.append_records(path, [record | {"response": "other"}])
        before = path.read_bytes()
        line = records.index(record) + 1
        with pytest.raises(ValueError, match=rf"line 1001, holds another .* than line {line}\."):
            read_keys(path, candidate_key)
        assert path.read_bytes() == before
        os.truncate(path, before[:-1].rindex(b"\n") + 1)


DAMAGE = [b"\x00" * 40, b'{"id": "x', b"null", b"[1]", b"\xef\xbb\xbf{}", b'{"a": "\xff"}', b"{}",
          b'{"a": 1} {"b": 2}', b"3", b'"x"', b"oops", b"[" * 90_000, b"{'id': 1}", b'{"id": 1,}',
          b"", b"   ", b'{"task": ["x"], "id": {}, "wording": 1, "sample": []}', b"\x1b[2J"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_that_is_not_at_the_end_is_refused_and_left_alone(damage, tmp_path):
    path = tmp_path / "candidates.jsonl"
    good = b'{"task": "t", "id": "1", "wording": "w", "sample": %d, "response": "r"}\n'
    path.write_bytes(blob := good % 0 + damage + b"\n" + good % 1)
    with pytest.raises(ValueError, match=r"candidates.jsonl, line 2, is no"):
        read_keys(path, candidate_key)
    assert path.read_bytes() == blob and not path.with_name("candidates.jsonl.torn").exists()


@pytest.mark.parametrize("how, trials", [
    ("ours", 3), ("unrepaired", 200), pytest.param("ours", 157, marks=FAULTS)])
def test_kills_while_recording_lose_no_record_that_was_reported(how, trials, tmp_path):
    """Two lives each; records of 300 bytes, 20 KB and 4 MB.

    The control leaves the torn end before it goes on, and loses what is glued to it.
    """
    rng, bad, total = random.Random(trials), 0, 0
    for trial in range(trials):
        path, reported = tmp_path / f"{trial}.jsonl", []
        size = (300, 20_000, 4_000_000)[trial % 3] if how == "ours" else 4_000_000
        for life in range(2):
            if how == "ours":
                read_keys(path, by_id)

            def work(path=path, life=life, size=size, said=tmp_path / f"{trial}.{life}"):
                with open(said, "a") as stream:
                    for number in range(10**6):
                        data.append_records(path, [{"id": f"{life}/{number}", "text": "x" * size}])
                        print(f"{life}/{number}", file=stream, flush=True)
            child = runs.fork(work)
            slow = 1 + trial // 20 if how != "ours" else 1  # until a busy machine writes, too
            time.sleep(rng.uniform(0.01, 0.06) * slow)
            runs.kill(child)
            if (tmp_path / f"{trial}.{life}").exists():
                reported += (tmp_path / f"{trial}.{life}").read_text().split()
        total += len(reported)
        try:
            if how == "ours":
                read_keys(path, by_id)
            found = [record["id"] for record in data.read_records(path)]
            bad += len(found) != len(set(found)) or not set(reported) <= set(found)
        except ValueError:
            bad += 1
        path.unlink(missing_ok=True)
        if how != "ours" and bad and total:
            break
    assert total and (bad == 0 if how == "ours" else bad), f"{bad} of {trials}"


@pytest.mark.parametrize("trials", [1, pytest.param(10, marks=FAULTS)])
def test_answers_collected_before_a_kill_are_not_sampled_again(trials, arguments, tmp_path):
    """Chunks of 16: after each kill all whole chunks are there, and the file ends as it should."""
    def argv(out):
        return [*arguments(out), "--stage", "cat", "--judge", "length", "--samples", "4",
                "--pool-per-task", "10", "--pool-wordings", "3", "--wordings", "3", "--eval-batch",
                "4", "--sft-steps", "2", "--steps", "2", "--no-compare", *runs.SHORT]
    assert runs.survive(argv(tmp_path / "whole"), []) == (0, 0)
    wanted, kills = (tmp_path / "whole/candidates.jsonl").read_bytes(), 0
    assert wanted.count(b"\n") >= 200
    for trial in range(trials):
        out = tmp_path / str(trial)
        path = out / "candidates.jsonl"
        for share in sorted(random.uniform(0.1, 0.9) for _ in range(2)):
            goal, status = share * len(wanted), None
            child = runs.fork(lambda out=out: train.main(argv(out)))
            while status is None and (not path.exists() or path.stat().st_size < goal):
                status = runs.wait_for(child, time.time() + 0.003)
            if status is None:
                runs.kill(child)
                kills += 1
            assert wanted.startswith(path.read_bytes())
            assert path.stat().st_size >= goal
        assert runs.survive(argv(out), []) == (0, 0) and path.read_bytes() == wanted
    assert kills  # a busy machine may let some runs end before they are seen


def test_records_are_kept_and_found_through_the_guard(tmp_path):
    from extras.runtime.guard import Guard

    guard, path = Guard(None), tmp_path / "r.jsonl"
    assert guard.kept(path, by_id) == set()
    guard.keep(path, [{"id": 1}, {"id": 2}])
    assert guard.kept(path, by_id) == {1, 2}
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [1, 2]
