"""pairing.py: how the candidates of a question become pairs and rankings."""

import pytest

import data
from methods import pairing, ranking


def record(reward, wording="w", response="r", **more):
    """A scored candidate."""
    return {"task": "t", "id": "1", "instruction": "do", "input": "in", "target": "gold",
            "reward": reward, "wording": wording, "response": response, "how": "rule", **more}


@pytest.fixture
def pair_run(make_run, scored_stage, tmp_path):
    """A function that makes a run on some candidates: pair_run(records, *flags)."""
    def make(records, *more):
        path = tmp_path / "records.jsonl"
        path.unlink(missing_ok=True)
        data.append_records(path, records)
        return make_run(scored_stage, "--candidates", str(path), *more)
    return make


def test_questions_without_a_pair_are_skipped_and_counted(pair_run, capsys):
    records = [record(2), record(0, "w2"), record(1, id="2"), record(0, "w2", id="2"),
               record(2, id="3"), record(2, "w2", id="3"), record(None, id="4")]
    items = pairing.pair_items(pair_run(records), lambda run, best, worse: (best, worse))
    assert items == [(records[0], [records[1]])]
    assert "1 questions to learn from; skipped 2 without a best answer and 1 with nothing below" \
        in capsys.readouterr().out


def test_worse_answers_come_in_parts_and_none_twice(pair_run):
    worse = [record(reward, f"w{k}") for k, reward in enumerate((0, 1, 0, 1, 0))]
    run = pair_run([record(2, "b1"), record(2, "b2"), *worse, worse[0]], "--max-worse", "2")
    items = pairing.pair_items(run, lambda run, best, worse: (best["wording"], worse))
    assert [len(lower) for _, lower in items] == [2, 2, 1]
    found = sorted((x for _, lower in items for x in lower), key=lambda x: x["wording"])
    assert found == worse and {best for best, _ in items} <= {"b1", "b2"}


def test_which_answers_share_an_item_follows_the_seed(pair_run):
    records = [record(2), *(record(0, f"w{k}") for k in range(8))]
    found = [pairing.pair_items(pair_run(records, "--max-worse", "3", "--seed", seed),
                                lambda run, best, worse: worse) for seed in ("1", "1", "2")]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("condition, wordings, better", [
    ("own", ["best", "w1", "w2", "w2"], [0, 0, 0]), ("original", ["do"] * 4, [0, 0, 0]),
    ("worse", ["w1", "w2", "w1", "w2", "w2"], [0, 1, 1])])
def test_the_wording_of_each_document(condition, wordings, better, pair_run):
    run = pair_run([], "--condition", condition)
    worse = [record(0, "w1", "a"), record(1, "w2", "b"), record(0, "w2", "c")]
    item, n_best = pairing.ranked_item(run, record(2, "best"), worse, "good")
    texts = ["good"] * n_best + ["a", "b", "c"]
    assert item["documents"] == [run.document(w, "in", x)
                                 for w, x in zip(wordings, texts, strict=True)]
    assert item["indices"]["better"] == better
    assert item["indices"]["worse"] == [n_best, n_best + 1, n_best + 2]


def test_all_pairs_rank_the_lower_answers_too(pair_run):
    worse = [record(0, "w1"), record(1, "w2"), record(0, "w3")]
    item, _ = pairing.ranked_item(
        pair_run([], "--pairs", "all", "--condition", "own"), record(2), worse, "good")
    found = sorted(zip(item["indices"]["better"], item["indices"]["worse"], strict=True))
    assert found == [(0, 1), (0, 2), (0, 3), (2, 1), (2, 3)]


def test_rankings_are_best_first_and_spread_over_the_rewards(pair_run):
    records = [record(reward, f"w{k}", f"r{k}")
               for k, reward in enumerate((0, 0, 2, 2, 1, 0, 2, None))]
    run = pair_run(records, "--max-worse", "3", "--condition", "own")
    item, = ranking.ranking_items(run)
    assert item["values"]["rewards"] == [2, 2, 1, 0]  # one of each in turn
    assert item["values"]["weights"] == [1, 0, 0, 0] and item["indices"]["best"] == [0]
    found = set(zip(item["indices"]["better"], item["indices"]["worse"], strict=True))
    assert found == {(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
    by_text = {str(run.document(x["wording"], "in", x["response"])): x for x in records}
    for document, reward in zip(item["documents"], item["values"]["rewards"], strict=True):
        assert by_text[str(document)]["reward"] == reward


def test_rankings_under_each_wording_that_failed(pair_run):
    records = [record(2, "w1", "a"), record(0, "w1", "b"), record(1, "w1", "c"),
               record(0, "w2", "b"), record(2, "w3", "a"), record(None, "w2", "d")]
    run = pair_run(records)
    first, second = ranking.ranking_items(run)
    assert first["values"]["rewards"] == [2, 1, 0] and second["values"]["rewards"] == [2, 0]
    for item, wording, texts in ((first, "w1", "acb"), (second, "w2", "ab")):
        assert item["documents"] == [run.document(wording, "in", text) for text in texts]
    run.cfg.condition = "original"
    item, = ranking.ranking_items(run)
    assert item["documents"] == [run.document("do", "in", text) for text in "acb"]


def test_questions_of_one_reward_have_no_ranking(pair_run):
    run = pair_run([record(1), record(1, "w2"), record(None, "w3")])
    assert ranking.ranking_items(run) == []


def test_records_are_taken_in_turn():
    records = [{"reward": reward, "k": k} for k, reward in enumerate((2, 2, 2, 1, 0, 0))]
    for most, wanted in ((1, [0]), (3, [0, 3, 4]), (5, [0, 3, 4, 1, 5]), (9, [0, 3, 4, 1, 5, 2])):
        assert [x["k"] for x in ranking.take_in_turn(records, most)] == wanted


def test_labelled_pairs_become_items(pair_run, tmp_path, capsys):
    row = {"task": "t", "id": "1", "input": "in", "probability": 0.2,
           "first": {"wording": "w1", "response": "a"},
           "second": {"wording": "w2", "response": "b"}}
    data.append_records(tmp_path / "soft.jsonl", [row])
    run = pair_run([])
    item, = pairing.labelled_items(run, tmp_path / "soft.jsonl")
    assert item == {"documents": [run.document("w1", "in", "a"), run.document("w2", "in", "b")],
                    "indices": {"better": [0], "worse": [1]}, "name": "t/1",
                    "values": {"probability": [0.2], "pair_weights": [1.0]}}
    assert "1 labelled pairs" in capsys.readouterr().out
