"""expert.py: one best answer of each question, learnt like a reference output."""

import json

import pytest

import data
from methods import expert


def test_one_best_answer_of_each_question_is_learnt(make_run, candidates):
    run = make_run("expert", "--candidates", str(candidates))
    items = expert.items(run)
    records = {(x["task"], x["id"]): x for x in data.read_records(candidates) if x["reward"] == 2}
    assert {tuple(item["name"].split("/")) for item in items} == set(records)
    for item in items:
        best = records[tuple(item["name"].split("/"))]
        wanted = run.document(best["wording"], best["input"], best["response"])
        assert item["documents"] == [wanted]


def test_which_of_several_best_answers_follows_the_seed(make_run, candidates):
    records = data.read_records(candidates)
    for record in records:
        record["reward"] = 2
    candidates.unlink()
    data.append_records(candidates, records)
    chosen = [[item["documents"] for item in expert.items(
        make_run("expert", "--candidates", str(candidates), "--seed", seed))]
        for seed in ("1", "1", "2")]
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_step_is_the_mean_over_tokens(ready, candidates, written_out, same_in_parts):
    run = ready("expert", "--candidates", str(candidates))
    items = expert.items(run)
    terms = [x for item in items for x in written_out(run.model, item["documents"][0])]
    means = same_in_parts(run, items)
    assert means["ce"] == pytest.approx(-sum(terms) / len(terms), rel=1e-5)


def test_the_command_samples_has_its_answers_judged_and_trains(command):
    folder = command("expert", "--judge", "length", "--pool-per-task", "3", "--wordings", "3")
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+expert"]
    records = data.read_records(folder / "candidates.jsonl")
    assert len(records) == 2 * 3 * 4 * 2 and {x["how"] for x in records} == {"scored"}
    assert len(data.read_records(folder / "log.jsonl")) == 3
