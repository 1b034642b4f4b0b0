"""rso.py: acceptance rates, pairs, items, and the hinge of the paper."""

import json
import math
import random

import pytest

import data
from methods import collate, rso

# ----- Rejection sampling -----

class FirstPass:
    """Random numbers of which all behind the first n accept."""

    def __init__(self, rng, n):
        self.rng, self.n, self.draws = rng, n, 0

    def random(self):
        self.draws += 1
        return self.rng.random() if self.draws <= self.n else 0.0


def test_the_first_pass_accepts_at_the_published_rates():
    """exp((r - max) / beta); with n = 4 nothing stops the first pass early."""
    rewards, trials, rng, counts = [0.2, 1.0, 0.7, -0.5], 4000, random.Random(7), [0] * 4
    for _ in range(trials):
        source = FirstPass(rng, 4)
        accepted = rso.rejection_sample(rewards, 4, beta=0.5, rng=source)
        assert sorted(accepted) == [0, 1, 2, 3] and source.draws <= 8
        for i in accepted[:len(accepted) - (source.draws - 4)]:  # the rest came in the second pass
            counts[i] += 1
    for count, wanted in zip(counts, (0.201897, 1.0, 0.548812, 0.049787), strict=True):
        assert abs(count / trials - wanted) <= 4 * math.sqrt(wanted * (1 - wanted) / trials)


@pytest.mark.parametrize("rewards, wanted", [
    ([1.0] * 4, [0, 1]), ([1e9, 0.0], [0, 1]), ([0.0, 1e9, 0.0], [1]), ([5.0], [0]), ([], [])])
def test_rejection_sampling_at_its_limits(rewards, wanted):
    """Equal rewards, rewards far apart, one answer and none; a beta of almost 0 never waits."""
    found = rso.rejection_sample(rewards, 2, beta=1e-9, rng=random.Random(0))
    assert found[:len(wanted)] == wanted and len(found) == min(2, len(rewards))


def test_temperatures_between_the_best_and_the_first():
    rewards, rng = [0.1, 0.9, 0.5, 0.7, 0.3], random.Random(0)
    assert sorted(rso.rejection_sample(rewards, 2, beta=1e-6, rng=rng)) == [1, 3]
    assert rso.rejection_sample(rewards, 2, beta=1e6, rng=rng) == [0, 1]
    everything = rso.rejection_sample(rewards, 99, beta=0.5, rng=rng)
    assert sorted(everything) == [0, 1, 2, 3, 4]
    assert rso.rejection_sample([], 2, beta=0.5, rng=rng) == []
    assert rso.rejection_sample([1e9, 0.0], 2, beta=1e-9, rng=rng) == [0, 1]
    with pytest.raises(ValueError, match="rejection sampling needs a positive beta, not"):
        rso.rejection_sample(rewards, 2, beta=0.0, rng=rng)


@pytest.mark.parametrize("how, wanted", [
    ("first", [(0, 1), (3, 2)]), ("tournament", [(0, 1), (3, 2), (3, 0), (3, 4)]),
    ("all", [(0, 1), (0, 2), (0, 4), (2, 1), (2, 4), (3, 0), (3, 1), (3, 2), (3, 4)])])
def test_pairs_among_those_kept(how, wanted):
    assert sorted(rso.ranked_pairs([2, 0, 1, 3, 0], how)) == sorted(wanted)


def test_ties_make_no_pair():
    assert rso.ranked_pairs([1, 1, 2], "tournament") == [(2, 0)]
    assert rso.ranked_pairs([1, 1], "first") == [] == rso.ranked_pairs([1, 1, 1], "all")


# ----- Items -----

def test_an_answer_said_twice_is_drawn_once(make_run, candidates, monkeypatch):
    asked, sample = [], rso.rejection_sample
    records = data.read_records(candidates)[:4]
    data.append_records(candidates, [record | {"sample": 1} for record in records])
    run = make_run("rso", "--candidates", str(candidates))

    def note(rewards, *rest, **options):
        asked.append(sorted(rewards))
        return sample(rewards, *rest, **options)
    monkeypatch.setattr(rso, "rejection_sample", note)
    rso.items(run)
    assert asked == [[0, 0, 1, 2]] * 10


@pytest.mark.parametrize("how", ["first", "tournament", "all"])
def test_items_pair_answers_of_different_reward(how, make_run, candidates):
    run = make_run("rso", "--candidates", str(candidates), "--rso-ranking", how)
    rewards = {}
    for x in data.read_records(candidates):
        text = str(run.document(x["wording"], x["input"], x["response"]))
        rewards[text, f"{x['task']}/{x['id']}"] = x["reward"]
    items = rso.items(run)
    assert items
    for item in items:
        own = [rewards[str(x), item["name"]] for x in item["documents"]]
        pairs = list(zip(item["indices"]["better"], item["indices"]["worse"], strict=True))
        assert pairs and all(own[w] > own[lower] for w, lower in pairs)
        assert {i for pair in pairs for i in pair} == set(range(len(own)))
    sizes = {len(item["indices"]["better"]) for item in items}
    assert sizes <= {"first": {1, 2}, "tournament": {2, 3}, "all": {5}}[how]


def test_a_cold_temperature_keeps_the_best(make_run, candidates):
    run = make_run("rso", "--candidates", str(candidates), "--rso-keep", "2", "--rso-beta", "1e-6",
                   "--rso-ranking", "all")
    for item in rso.items(run):
        own = [x for x in data.read_records(candidates) if f"{x['task']}/{x['id']}" == item["name"]]
        wanted = [run.document(x["wording"], x["input"], x["response"])
                  for reward in (2, 1) for x in own if x["reward"] == reward]
        pair = [item["indices"][name][0] for name in ("better", "worse")]
        assert [item["documents"][i] for i in pair] == wanted and len(item["documents"]) == 2


# ----- The step -----

def test_the_default_is_the_hinge_of_the_paper(golden, make_run):
    cfg, (model, documents) = make_run("rso").cfg, golden()
    assert (cfg.preference, cfg.beta) == ("hinge", 0.05)
    item = {"documents": documents, "indices": {"better": [0], "worse": [1]},
            "values": {"reference": [-10.7027159023, -7.3647605120, 0.0, 0.0]}}
    loss = rso.step(model, collate([item], model, "cpu"), cfg)["loss"]
    assert loss.item() == pytest.approx(0.6841714628, rel=1e-6)


def test_micro_batches_change_nothing(ready, candidates, same_in_parts):
    run = ready("rso", "--candidates", str(candidates))
    assert same_in_parts(run, rso.items(run))["loss"] == pytest.approx(1, abs=1e-3)  # h is 0


@pytest.mark.parametrize("flags", [
    (), ("--rso-ranking", "tournament", "--preference", "sigmoid"), ("--reference-free",)])
def test_the_command_runs(flags, command, candidates):
    folder = command("rso", "--candidates", str(candidates), *flags)
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+RSO"]


def test_label_smoothing_of_a_hinge_is_refused(refused):
    refused("--label-smoothing changes nothing", "rso", "--label-smoothing", "0.1")
    refused("--rso-beta is 0.0. Expected a positive number", "rso", "--rso-beta", "0")
