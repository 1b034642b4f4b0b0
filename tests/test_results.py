"""demo/results.py: the candidates and the halves of the tasks that its arms learn from."""

import json
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "demo"
sys.path.insert(0, str(DEMO))
import results  # noqa: E402


@pytest.fixture
def candidates(tmp_path):
    """Three answers to each of 200 questions under two wordings; one in three is right."""
    records = []
    for number in range(200):
        for answer in range(3):
            records.append({"task": "a", "id": str(number), "wording": f"w{answer % 2}",
                            "sample": answer, "response": f"x{answer}", "target": "x0",
                            "reward": 2 if answer == 0 else answer - 1})
    path = tmp_path / "candidates.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_flips_leave_the_rewards_and_the_precision_is_one(candidates, tmp_path):
    assert results.write_flipped(candidates, tmp_path / "b.jsonl", 0.0, seed=1) == 1
    assert rows(tmp_path / "b.jsonl") == rows(candidates)


def test_a_share_of_the_rewards_is_turned_round(candidates, tmp_path):
    precision = results.write_flipped(candidates, tmp_path / "b.jsonl", 0.2, seed=1)
    before, after = rows(candidates), rows(tmp_path / "b.jsonl")
    turned = [x != y for x, y in zip(before, after, strict=True)]
    assert sum(turned) == pytest.approx(0.2 * 600, abs=30)
    for x, y, changed in zip(before, after, turned, strict=True):
        if changed:
            assert y == x | {"reward": 0 if x["reward"] == 2 else 2}
    best = [x["reward"] == 2 for x, y in zip(before, after, strict=True) if y["reward"] == 2]
    assert precision == sum(best) / len(best)
    assert precision == pytest.approx(0.8 / (0.8 + 2 * 0.2), abs=0.06)  # 2 wrong for 1 right
    results.write_flipped(candidates, tmp_path / "c.jsonl", 0.2, seed=2)
    assert rows(tmp_path / "c.jsonl") != after


@pytest.fixture
def folder(candidates):
    """The folder of a run that sampled those candidates for a task file."""
    instances = [{"id": str(number), "input": str(number), "output": ["x0"]}
                 for number in range(200)]
    task = {"Definition": ["say x0"], "Instances": instances}
    path = candidates.parent / "a.json"
    path.write_text(json.dumps(task))
    (candidates.parent / "config.json").write_text(json.dumps({"tasks": str(path)}))
    return candidates.parent


def test_gold_is_the_reference_under_each_wording_of_each_question(folder):
    found = rows(results.write_judged(folder, "gold"))
    assert {x["id"] for x in found} == {f"{n} {w}" for n in range(200) for w in ("w0", "w1")}
    assert len(found) == 400
    assert {(x["response"], x["reward"]) for x in found} == {("x0", 2)}


def test_the_same_answers_get_the_rewards_of_another_judge(folder, candidates):
    assert results.write_judged(folder, "self") == candidates
    by_rule = rows(results.write_judged(folder, "rule"))
    assert [x["response"] for x in by_rule] == [x["response"] for x in rows(candidates)]
    assert {(x["response"], x["reward"]) for x in by_rule} == {("x0", 2), ("x1", 0), ("x2", 0)}
    # No two of three answers agree, so no question has a majority.
    assert {x["reward"] for x in rows(results.write_judged(folder, "agreement"))} == {None}
    same = [x | {"response": "x1"} if x["sample"] else x for x in rows(candidates)]
    candidates.write_text("".join(json.dumps(x) + "\n" for x in same))
    agreed = rows(results.write_judged(folder, "agreement"))
    assert {(x["response"], x["reward"]) for x in agreed} == {("x0", 0), ("x1", 2)}


@pytest.mark.parametrize("source", ["demo", "demo/real"])
def test_a_task_is_seen_or_held_out_with_all_its_wordings(source, tmp_path, monkeypatch):
    monkeypatch.chdir(DEMO.parent)
    seen, held = results.hold_out(source, tmp_path)
    words = json.loads(Path(source, "paraphrases.json").read_text())
    parts = {}
    for half, flags in (("seen", seen), ("held", held)):
        assert flags == f"--tasks {tmp_path / half} --paraphrases {tmp_path / half}.json"
        parts[half] = json.loads((tmp_path / f"{half}.json").read_text())
        files = {path.stem: path for path in (tmp_path / half).iterdir()}
        assert set(files) == set(parts[half])
        for path in files.values():
            assert path.read_bytes() == Path(source, "tasks", path.name).read_bytes()
    assert set(parts["held"]) == set(results.HELD_OUT[source])
    assert parts["seen"] | parts["held"] == words
    assert not set(parts["seen"]) & set(parts["held"])
