"""cat.py: its items, its step against the equation and the golden numbers, short runs."""

import json

import pytest

import data
import train
from methods import cat, collate

BEST = {"wording": "w1", "instruction": "do", "input": "in", "target": "red", "response": "blue",
        "reward": 2, "task": "t", "id": "1", "how": "rule"}
WORSE = [BEST | {"wording": wording, "response": response, "reward": reward}
         for wording, response, reward in (("w2", "hat", 0), ("w3", "coat", 1), ("w3", "", 0))]


# ----- Items -----

@pytest.mark.parametrize("condition", ["own", "original", "worse"])
@pytest.mark.parametrize("target", ["best", "gold"])
def test_an_item_pairs_a_best_answer_with_worse_ones(condition, target, make_run):
    run = make_run("cat", "--condition", condition, "--ce-target", target)
    item = cat.cat_item(run, BEST, WORSE)
    texts = [run.tokenizer.decode(document["input_ids"]) for document in item["documents"]]
    n_best = 2 if condition == "worse" else 1
    good = "red" if target == "gold" else "blue"
    assert item["values"]["weights"] == [1 / n_best] * n_best + [0.0] * 3
    assert all(text.endswith(good) for text in texts[:n_best])
    wordings = {"own": ["w1", "w1", "w1"], "original": ["do"] * 3, "worse": ["w2", "w3", "w3"]}
    pairs = list(zip(item["indices"]["better"], item["indices"]["worse"], strict=True))
    assert len(pairs) == 3 and len({lower for _, lower in pairs}) == 3
    for (better, lower), wording, row in zip(pairs, wordings[condition], WORSE, strict=True):
        assert f"Instruction: {wording}\n" in texts[better] and better < n_best <= lower
        assert texts[lower].endswith(f"Response: {row['response']}".strip())


def test_without_ranking_the_same_documents_have_no_pairs(make_run):
    with_pairs, without = (cat.cat_item(make_run("cat", *more), BEST, WORSE)
                           for more in ((), ("--no-ranking",)))
    assert without["documents"] == with_pairs["documents"]
    assert without["indices"] == {"better": [], "worse": []} != with_pairs["indices"]


def test_items_hold_as_many_worse_answers_as_asked_for(make_run, candidates, capsys):
    for most, sizes in (("1", [2]), ("2", [2, 3]), ("3", [4])):
        run = make_run("cat", "--candidates", str(candidates), "--max-worse", most,
                       "--condition", "own")
        items = cat.items(run)
        assert {len(item["documents"]) for item in items} == set(sizes)
        assert sum(len(item["indices"]["worse"]) for item in items) == 30
    assert "cat: 10 questions to learn from; skipped 0 without" in capsys.readouterr().out


# ----- The step -----

def test_golden_numbers(golden, make_run):
    model, documents = golden()
    item = {"documents": documents, "indices": {"better": [1, 1, 1], "worse": [0, 2, 3]},
            "values": {"weights": [0.0, 1.0, 0.0, 0.0]}}
    cfg, batch = make_run("cat", "--lam", "0.5").cfg, collate([item], model, "cpu")
    terms = cat.step(model, batch, cfg)
    assert terms["rank"].item() == pytest.approx(2.9226578189, rel=1e-6)
    assert terms["ce"].item() == pytest.approx(0.5 * 8.7850893872, rel=1e-6)
    assert [train.count_of(cat.TERMS[term], batch, cfg) for term in ("rank", "ce")] == [3, 3]


@pytest.mark.parametrize("flags", [(), ("--condition", "own", "--pairs", "all"),
                                   ("--margin", "0.2", "--lam", "0.5", "--condition", "own"),
                                   ("--no-length-normalize",), ("--ce-target", "gold")])
def test_a_step_equals_the_equation_and_micro_batches_change_nothing(
        flags, ready, candidates, written_out, same_in_parts):
    run = ready("cat", "--candidates", str(candidates), *flags)
    rank, pairs, ce, tokens = 0.0, 0, 0.0, 0.0
    items = cat.items(run)
    for item in items:
        scores = []
        for document, weight in zip(item["documents"], item["values"]["weights"], strict=True):
            terms = written_out(run.model, document)
            scores.append(sum(terms))
            if run.cfg.length_normalize:
                scores[-1] /= len(terms)
            ce, tokens = ce - weight * sum(terms), tokens + weight * len(terms)
        for w, lower in zip(item["indices"]["better"], item["indices"]["worse"], strict=True):
            rank += max(0.0, run.cfg.margin - scores[w] + scores[lower])
            pairs += 1
    assert rank > 0
    means = same_in_parts(run, items)
    assert means == pytest.approx({"rank": rank / pairs, "ce": run.cfg.lam * ce / tokens}, rel=1e-4)


# ----- Runs -----

@pytest.mark.parametrize("flags", [(), ("--no-ranking",)])
def test_the_command_moves_the_adapter_that_it_continues(flags, command, candidates, earlier):
    folder = command("cat", "--candidates", str(candidates), *flags)
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+CAT"]
    adapters = [(place / "adapter_model.safetensors").read_bytes()
                for place in (folder, earlier["sft-ia"])]
    assert adapters[0] != adapters[1]
    log = data.read_records(folder / "log.jsonl")
    assert len(log) == 3 and all(row["ce"] > 0 for row in log)
    assert all((row["rank"] == 0) == bool(flags) for row in log)


def test_negative_weights_are_refused(refused):
    refused("--lam is -1.0. Expected 0 or more", "cat", "--lam", "-1")
    refused("--margin is -1.0", "cat", "--margin", "-1")
