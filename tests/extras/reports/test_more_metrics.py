"""MoreMetrics and its parts by hand; the KL of samples against plain forward passes."""

import itertools
import json

import numpy as np
import pytest
import torch

from data import TEMPLATES
from extras.reports import MoreMetrics, metrics
from extras.reports.metrics import (
    components,
    greedy_clusters,
    paired_difference,
    rouge_scores,
    sample_answers,
    sampled_kl,
)
from methods.pretrain import init_weights

K4 = list(itertools.combinations(range(4), 2))
GRAPHS = {  # n, edges, MCR by component, greedy
    "path": (5, [(0, 1), (1, 2), (2, 3), (3, 4)], 1.0, 0.4),
    "triangle and edge": (5, [(0, 1), (1, 2), (0, 2), (3, 4)], 0.6, 0.6),
    "no edge": (4, [], 0.25, 0.25),
    "K4": (4, K4, 1.0, 1.0),
    "K4 minus 03": (4, [edge for edge in K4 if edge != (0, 3)], 1.0, 0.75),
}


def graph(n, edges):
    similar = np.eye(n, dtype=bool)
    for i, j in edges:
        similar[i, j] = similar[j, i] = True
    return similar


@pytest.mark.parametrize("name", GRAPHS)
def test_clusters_of_hand_drawn_graphs(name):
    n, edges, component, greedy = GRAPHS[name]
    similar = graph(n, edges)
    assert max(map(len, components(similar))) / n == component
    assert max(map(len, greedy_clusters(similar))) / n == greedy
    for found in (components(similar), greedy_clusters(similar)):
        assert sorted(sum(found, [])) == list(range(n))


def test_components_are_reached_by_chains_of_any_length():
    n = 40
    order = np.random.default_rng(0).permutation(n).tolist()
    path = graph(n, zip(order, order[1:], strict=False))
    assert [sorted(group) for group in components(path)] == [list(range(n))]


def test_components_read_both_orders_and_greedy_reads_one():
    similar = np.array([[1, 0], [1, 1]], dtype=bool)  # asked (1, 0): similar; asked (0, 1): not
    assert len(components(similar)) == 2
    assert greedy_clusters(similar) == [[0, 1]] and greedy_clusters(similar.T) == [[0], [1]]


def test_greedy_depends_on_the_order_of_the_responses():
    star = graph(3, [(0, 1), (0, 2)])  # 0 agrees with both, 1 and 2 do not agree
    assert greedy_clusters(star) == [[0, 1, 2]]
    assert greedy_clusters(star[[1, 0, 2]][:, [1, 0, 2]]) == [[0, 1], [2]]


@pytest.mark.parametrize("target, prediction, stem, rouge1, rouge2, rougeL", [
    ("the cat was found under the bed", "the cat was under the bed", False, 0.923077, 0.727273,
     0.923077),
    ("Running dogs, quickly!", "the dog runs quick", False, 0, 0, 0),
    ("Running dogs, quickly!", "the dog runs quick", True, 0.571429, 0, 0.285714),
    ("the cat", "", False, 0, 0, 0),
])
def test_rouge_by_hand(target, prediction, stem, rouge1, rouge2, rougeL):
    found = rouge_scores(prediction, [target], stem)
    values = {"rouge1": rouge1, "rouge2": rouge2, "rougeL": rougeL}
    assert {name: found[name] for name in values} == pytest.approx(values, abs=1e-6)
    assert found["tokenizer"] == "words"


def test_rouge_of_other_scripts_counts_characters_and_says_so():
    same, half = rouge_scores("猫在床下", ["猫在床下"]), rouge_scores("猫在", ["猫在床下"])
    assert same["rougeL"] == 1 and same["tokenizer"] == "characters"
    assert half["rouge1"] == pytest.approx(2 / 3)
    assert rouge_scores("猫 cat", ["a cat"])["tokenizer"] == "words"  # the references decide
    assert rouge_scores("амам", ["мама"])["rouge1"] == 0
    assert rouge_scores("мама мыла", ["мама ела"])["rouge1"] == pytest.approx(0.5)
    assert rouge_scores("हिन्दी", ["हिन्दी"])["rouge1"] == 1
    assert rouge_scores("हिन्दा", ["हिन्दी"])["rouge1"] == 0
    assert rouge_scores("cat猫dog", ["cat 猫 dog"])["rougeL"] == 1
    assert rouge_scores("猫", ["cat", "猫"])["rouge1"] == 1  # the best of the references


def test_metrics_of_one_question_by_hand(question, evaluate):
    asked = question(["red", "Red.", "blue", "red"], styles=["terse", "", "terse", "polite"])
    found, [row] = evaluate([asked])
    assert row["cr"] == pytest.approx(1 / 6) and row["mcr"] == 0.5  # only two are equal
    assert row["exact_match"] == 0.75 and row["correct"] == [True, True, False, True]
    assert row["consistent_and_correct"] == pytest.approx(1 / 6)
    assert row["worst_paraphrase"] == 0 and row["rouge1"] == 0.75 and row["tokenizer"] == "words"
    assert row["cluster"] == [0, 1, 2, 0] and row["mcr_component"] == row["mcr_greedy"] == 0.5
    styles = {style: summary["mean"] for style, summary in found["by_style"].items()}
    assert styles == dict(plain=1, polite=1, terse=0.5)
    assert found["judge"] == "equal" and found["cluster"] == "clique"
    assert (found["responses"], found["without_cr"]) == (4, 0)
    assert found["rouge_tokenizer"] == {"words": 1} and found["use_stemmer"] is False


def test_the_cluster_rule_changes_mcr_and_the_numbers_of_clusters():
    row = {"responses": ["a"] * 5, "targets": ["a"], "cr": 0.4, "mcr": 0.4,
           "cluster": [0, 0, 1, 1, 2]}
    path = graph(5, GRAPHS["path"][1])
    for rule, mcr, cluster in (("clique", 0.4, [0, 0, 1, 1, 2]), ("component", 1.0, [0] * 5),
                               ("greedy", 0.4, [0, 0, 1, 1, 2])):
        found = MoreMetrics(cluster=rule).question(row, path, path)
        assert (found["mcr"], found["cluster"]) == (mcr, cluster)
        assert found["mcr_component"] == 1.0 and found["mcr_greedy"] == 0.4
    moved = graph(4, [(1, 2), (2, 3)])
    found = MoreMetrics(cluster="component").question(row | {"responses": ["a"] * 4}, moved, moved)
    assert found["cluster"] == [1, 0, 0, 0]  # the largest is number 0


def test_the_stemmer_reaches_rouge(question, evaluate):
    asked = question(["the dog runs quick"], targets=["Running dogs, quickly!"])
    values = [evaluate([asked], MoreMetrics(stem))[1][0]["rouge1"] for stem in (False, True)]
    assert values == pytest.approx([0, 0.571429], abs=1e-6)


def test_metrics_are_strict_json_whatever_is_missing(question, evaluate):
    cases = ([], [question(["red"])], [question([""], targets=[""])],
             [question(["a", "b"]), question(["c"])], [question(["?", "red", "a"])])
    for questions in cases:
        found, rows = evaluate(questions)
        json.dumps([found, rows], allow_nan=False)
        assert found["without_cr"] == sum(len(x["responses"]) == 1 for x in questions)


def test_paired_difference(question, evaluate):
    _, before = evaluate([question(["red", "blue"]), question(["red", "red"])])
    _, after = evaluate([question(["a", "a"]), question(["red", "red"])])
    assert paired_difference(before, after, "cr")["mean"] == 0.5
    low, high = paired_difference(before, before, "cr")["ci95"]
    assert -1 < low == -high < 0  # two questions do not tell that no question differs
    _, single = evaluate([question(["red"]), question(["red"])])
    assert paired_difference(single, single, "cr") == {
        "mean": None, "ci95": None, "n": 0, "ci95_tasks": None, "tasks": 0}


def test_samples_differ_and_the_kl_is_that_of_the_samples(tiny, tokenizer, settings, monkeypatch):
    """The policy is asked with its prefix, the reference without."""
    import copy

    policy = init_weights(copy.deepcopy(tiny), seed=1)
    tokens = len(tokenizer)
    for model, seed in ((policy, 1), (tiny, 2)):
        torch.manual_seed(seed)
        for name, weight in model.named_parameters():
            if "embed" in name or "lm_head" in name:
                weight.data = torch.randn(tokens, weight.shape[1]) / 5
            else:
                weight.data.mul_(4)
    monkeypatch.setattr(metrics, "open_model", lambda cfg, adapter: tiny)
    asked, plain = [], TEMPLATES["plain"]
    for k in range(3):
        asked.append({"wordings": ["do it"], "input": f"x{k}", "task": f"t{k % 2}"})
    many = sample_answers(policy, tokenizer, plain, asked, settings, 4)
    assert all(len({tuple(answer.token_ids) for answer in made}) == 4 for made in many)
    assert sample_answers(policy, tokenizer, plain, asked, settings, 4) == many
    differences = []
    single = sample_answers(policy, tokenizer, plain, asked, settings, 1)
    for question, (answer,) in zip(asked, single, strict=True):
        sums = []
        for model, prefix in ((policy, "best "), (tiny, "")):
            text = plain.render(prefix + "do it", question["input"])
            prompt = tokenizer.encode_prompt(text)
            ids = torch.tensor(answer.token_ids)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer.token_ids]))[0]
            table = logits.log_softmax(-1)[len(prompt) - 1:-1]
            sums.append(float(table.gather(1, ids[:, None]).sum()))
        differences.append(sums[0] - sums[1])
    found = sampled_kl(policy, tokenizer, plain, asked, settings)
    assert found["n"] == 3 and abs(found["mean"]) > 0.05
    assert found["mean"] == pytest.approx(sum(differences) / 3, abs=1e-3)
