"""demo/results.py: what its arms learn from, all parts without training, intervals."""

import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import data

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


def test_precision_is_that_of_the_questions_that_are_learnt_from(tmp_path):
    """A question whose answers are all right teaches nothing; equal answers turn round together."""
    table = [("a", "x", 2), ("a", "x", 2), ("a", "y", 0), ("b", "x", 2), ("b", "x", 2)]
    data.append_records(tmp_path / "a.jsonl", [
        {"task": "t", "id": name, "response": text, "reward": reward}
        for name, text, reward in table])
    found = {}
    for seed in range(40):
        path = tmp_path / f"{seed}.jsonl"
        precision = results.write_flipped(tmp_path / "a.jsonl", path, 0.5, seed)
        if math.isnan(precision):  # nothing is learnt from
            continue
        a1, a2, a3, b1, b2 = (row["reward"] for row in rows(path))
        assert a1 == a2 and b1 == b2
        found[a1, a3] = precision
    assert found == {(2, 0): 1.0, (0, 2): 0.0}


def test_a_share_of_the_rewards_is_turned_round(candidates, tmp_path):
    precision = results.write_flipped(candidates, tmp_path / "b.jsonl", 0.2, seed=1)
    before, after = rows(candidates), rows(tmp_path / "b.jsonl")
    turned = [x != y for x, y in zip(before, after, strict=True)]
    assert sum(turned) == pytest.approx(0.2 * 600, abs=30)
    for x, y, changed in zip(before, after, turned, strict=True):
        if changed:
            assert y == x | {"reward": 0 if x["reward"] == 2 else 2}
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


# ----- Parts -----

METRICS = ("cr", "mcr", "rougeL", "exact_match", "consistent_and_correct")


@pytest.fixture
def commands(monkeypatch):
    """{folder: its command}; runs write what the scripts read, and train nothing."""
    made, rng = {}, random.Random(0)

    def answer(folder, titles):
        metrics, rows = {}, []
        for title in titles:
            metrics[title] = {name: {"mean": rng.random()} for name in METRICS}
            for task in ("a", "b"):
                rows.append({"model": title, "task": task, "labels": ["x", "y"], "targets": ["x"],
                             "responses": ["x", "y", "x"], "cr": 0.5, "exact_match": 0.25,
                             "consistent_and_correct": rng.random()})
        data.append_records(folder / "questions.jsonl", rows)
        (folder / "metrics.json").write_text(json.dumps(metrics))

    def run(words, out, flags, makes):
        folder, command = Path(out), [*words, *flags]
        if str(out) in made:  # such as the SFT(IA) of two parts
            assert command == made[str(out)], f"{out} is used twice"
            return json.loads((folder / "metrics.json").read_text())
        made[str(out)] = command
        folder.mkdir(parents=True)
        if words[0] == "eval.py":
            adapters = flags[flags.index("--adapter") + 1:]
            assert all(Path(adapter, "adapter_config.json").exists() for adapter in adapters)
            answer(folder, ["smollm2", *adapters])
        else:
            for name in ("init", "candidates", "unlabelled"):
                if f"--{name}" in flags:
                    assert Path(flags[flags.index(f"--{name}") + 1]).exists()
            answer(folder, ["before", words[-1]] if words[-1].startswith("sft") else [words[-1]])
            (folder / "config.json").write_text(json.dumps({"tasks": "demo/tasks"}))
            rows = [{"task": "review_word", "id": str(k // 4), "wording": f"w{k % 4}", "sample": 0,
                     "input": "i", "instruction": "i", "response": f"r{k % 3}", "finished": True,
                     "target": "r0", "reward": 2 * (k % 3 == 0)} for k in range(80)]
            data.append_records(folder / "candidates.jsonl", rows)
        cost = {"seconds": 60, "tokens": 5000, "peak_memory_bytes": {"process": 2e9}}
        (folder / "summary.json").write_text(json.dumps(cost))
        (folder / "adapter_config.json").write_text("{}")
        return json.loads((folder / "metrics.json").read_text()) if makes == "metrics.json" else {}
    monkeypatch.setattr(results.trials, "run", run)
    return made


@pytest.fixture
def run_parts(tmp_path, monkeypatch):
    """A function that runs parts for two seeds; returns the folder with their results."""
    monkeypatch.chdir(DEMO.parent)

    def run(*parts):
        results.main(["--seeds", "1", "2", "--out", str(tmp_path / "out"), "--part", *parts])
        return tmp_path / "out"
    return run


def test_all_parts_have_folders_of_their_own_and_a_row_for_each_arm(commands, run_parts, capsys):
    pytest.importorskip("extras.reports.plots")
    out = run_parts(*results.PARTS)
    for part, n_arms in (("without", 10), ("with", 9), ("unseen", 6), ("unseen-real", 6),
                         ("precision", 21), ("ranking", 14), ("real", 8)):
        text = (out / part / "results.md").read_text()
        first, *_ = text.split("Paired differences")
        rows = [line for line in first.splitlines() if line.startswith("| ")]
        assert len(rows) == 1 + n_arms, part
        assert "nan" not in text and text.count("agreement") > 0 or part == "precision"
    assert (out / "plots" / "precision.png").exists() or list(out.rglob("precision.png"))
    assert "share of 100.0" in (out / "real" / "results.md").read_text()
    assert "agreement 100.0 ± 0.0; " in (out / "ranking" / "results.md").read_text()
    assert " with 30 % flipped." in (out / "precision" / "results.md").read_text()


def test_the_precision_of_what_a_run_sampled(tmp_path):
    rows = [("1", "Yes.", 2), ("1", "no", 2), ("1", "no", 0), ("2", "yes", 2), ("3", "no", None),
            ("4", "yes", 2), ("4", "no", None), ("4", "no", 1)]
    (tmp_path / "candidates.jsonl").write_text("".join(json.dumps(
        {"task": "t", "id": key, "response": said, "target": "yes", "reward": reward}) + "\n"
        for key, said, reward in rows))
    assert results.sampled_precision(tmp_path) == 2 / 3  # of questions 1 and 4
    (tmp_path / "candidates.jsonl").write_text(json.dumps(
        {"task": "t", "id": "1", "response": "yes", "target": None, "reward": 2}) + "\n")
    assert math.isnan(results.sampled_precision(tmp_path))


def test_the_same_items_are_those_of_the_agreement_arm(commands, run_parts):
    out = run_parts("without")
    ((folder, _),) = [x for x in commands.items() if "seed1-" in x[0] and x[1][-1] == "agreement"]
    for flags in commands.values():
        if "--no-ranking" in flags and str(out / "seed1-few") in flags:
            assert flags[flags.index("--candidates") + 1] == f"{folder}/candidates.jsonl"


def test_what_another_command_made_is_refused(tmp_path, monkeypatch):
    calls = []

    def call(line, **streams):
        calls.append(line)
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / "metrics.json").write_text("{}")
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(results.trials.subprocess, "run", call)
    for _ in range(2):  # made once
        assert results.trials.train("cat", tmp_path / "x", "--seed", "1", "--init", "a b") == {}
    assert len(calls) == 1
    results.trials.train("cat", tmp_path / "x", "--seed", "1", "--init", "c")
    with pytest.raises(SystemExit, match="was made by another command"):
        results.trials.train("cat", tmp_path / "x", "--seed", "2", "--init", "a b")


def test_an_interval_by_hand():
    assert results.trials.interval([0.01, 0.03, 0.02]) == "+2.0 [-0.5, +4.5] 3/3"  # 4.303 / 3^0.5
    assert results.trials.interval([-0.01, 0.01]) == "+0.0 [-12.7, +12.7] 1/2"
    assert results.trials.interval([0.01]) == "+1.0 1/1"
