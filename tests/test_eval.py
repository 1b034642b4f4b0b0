"""eval.py: CR and MCR of graphs, intervals, metrics by hand, text in and out, the command line."""

import importlib.util
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import lora
from eval import (
    TABLE,
    bootstrap,
    clusters,
    complete,
    consistency_rate,
    evaluate_responses,
    max_consistency_rate,
    write_results,
)
from judge import RuleJudge, rouge_scores
from model import Sampling, generate, load_model

ROOT = Path(__file__).parent.parent
SCRIPTS = json.loads((Path(__file__).parent / "scripts.json").read_text(encoding="utf-8"))
needs_extras = pytest.mark.skipif(importlib.util.find_spec("extras") is None,
                                  reason="extras/ was deleted")


def graph(n, edges):
    similar = np.eye(n, dtype=bool)
    for i, j in edges:
        similar[i, j] = similar[j, i] = True
    return similar


def random_graph(rng, n):
    share = rng.random()
    edges = [edge for edge in itertools.combinations(range(n), 2) if rng.random() < share]
    return graph(n, edges)


# ----- CR and MCR -----

K4 = list(itertools.combinations(range(4), 2))


@pytest.mark.parametrize("n, edges, cr, mcr", [
    (5, [(0, 1), (1, 2), (2, 3), (3, 4)], 0.4, 0.4),
    (5, [(0, 1), (1, 2), (0, 2), (3, 4)], 0.4, 0.6),
    (4, [], 0.0, 0.25),
    (4, K4, 1.0, 1.0),
    (4, [edge for edge in K4 if edge != (0, 3)], 5 / 6, 0.75),
    (6, [(0, 1), (2, 3), (4, 5)], 0.2, 1 / 3),
])
def test_consistency_of_hand_drawn_graphs(n, edges, cr, mcr):
    similar = graph(n, edges)
    assert consistency_rate(similar) == pytest.approx(cr, abs=1e-12)
    assert max_consistency_rate(similar) == mcr


def test_one_response_has_no_cr_and_an_mcr_of_one():
    assert consistency_rate([[True]]) is None and max_consistency_rate([[True]]) == 1


def test_a_pair_counts_only_if_both_orders_agree():
    similar = np.array([[1, 0], [1, 1]], dtype=bool)  # asked (1, 0): similar; asked (0, 1): not
    assert consistency_rate(similar) == consistency_rate(similar.T) == 0
    assert max_consistency_rate(similar) == max_consistency_rate(similar.T) == 0.5


def test_cr_is_the_share_of_pairs():
    rng = np.random.default_rng()
    for _ in range(50):
        n = int(rng.integers(2, 9))
        similar = rng.random((n, n)) < rng.random()
        agree = [similar[i, j] and similar[j, i] for i, j in itertools.combinations(range(n), 2)]
        assert consistency_rate(similar) == pytest.approx(sum(agree) / len(agree), abs=1e-12)


def test_mcr_is_the_largest_clique_by_brute_force():
    rng = np.random.default_rng()
    for _ in range(150):
        n = int(rng.integers(1, 10))
        similar, best = random_graph(rng, n), 0
        for members in itertools.product([False, True], repeat=n):
            chosen = [i for i in range(n) if members[i]]
            if similar[np.ix_(chosen, chosen)].all():
                best = max(best, len(chosen))
        found = clusters(similar)
        assert len(found[0]) == best and max_consistency_rate(similar) == best / n
        assert sorted(sum(found, [])) == list(range(n))
        sizes = [len(group) for group in found]
        assert sizes == sorted(sizes, reverse=True)
        assert all(similar[np.ix_(group, group)].all() for group in found)


def test_cliques_do_not_depend_on_the_order_of_the_responses():
    rng = np.random.default_rng()
    for _ in range(30):
        similar, order = random_graph(rng, 9), rng.permutation(9)
        assert max_consistency_rate(similar[order][:, order]) == max_consistency_rate(similar)


def test_clique_of_64_responses_is_quick():
    parts = np.arange(64) // 3  # complete 22-partite: what defeats plain enumeration
    assert max_consistency_rate((parts[:, None] != parts) | np.eye(64, dtype=bool)) == 22 / 64
    dense = np.triu(np.random.default_rng(1).random((64, 64)) < 0.9, 1)
    assert 20 < 64 * max_consistency_rate(dense | dense.T | np.eye(64, dtype=bool)) < 45


# ----- Bootstrap -----

def test_bootstrap_interval_covers_the_mean_about_95_times_in_100():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        low, high = bootstrap(rng.normal(0.5, 0.2, 60), resamples=400, seed=trial)["ci95"]
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_of_no_one_and_equal_values():
    assert bootstrap([]) == bootstrap([None]) == {"mean": None, "ci95": None, "n": 0}
    assert bootstrap([0.5, None]) == {"mean": 0.5, "ci95": None, "n": 1}
    assert bootstrap([1.0] * 5, span=None) == {"mean": 1.0, "ci95": [1.0, 1.0], "n": 5}
    assert bootstrap([0, None, 1]) == bootstrap([0, 1])


@pytest.mark.parametrize("value, span, low, high", [
    (1.0, (0, 1), 5 / 8.84, 1), (0.0, (0, 1), 0, 3.84 / 8.84), (0.0, (-1, 1), -0.434, 0.434),
    (0.5, (0, 1), 0.283, 0.717)])
def test_equal_values_have_wilsons_interval(value, span, low, high):
    found = bootstrap([value] * 5, span=span)
    assert found["mean"] == value and found["ci95"] == pytest.approx([low, high], abs=1e-3)


def test_an_interval_of_equal_values_holds_the_mean_of_rare_others():
    """A share of 2 % or 98 %, 40 questions: whenever all are alike, the control has no width."""
    rng, alike, held = np.random.default_rng(0), 0, {(0, 1): 0, None: 0}
    for trial in range(200):
        share = 0.02 if trial % 2 else 0.98
        values = (rng.random(40) < share).astype(float)
        if values.min() == values.max():
            alike += 1
            for span in held:
                low, high = bootstrap(values, resamples=20, span=span)["ci95"]
                held[span] += low <= share <= high
    assert alike > 50 and held == {(0, 1): alike, None: 0}


@pytest.mark.parametrize("prediction, references", [
    ("", ["x"]), ("x", [""]), ("", [""]), ("x", [])])
def test_rouge_of_nothing_is_a_number(prediction, references):
    scores = rouge_scores(prediction, references)
    assert set(scores.values()) == {0.0}
    json.dumps(scores, allow_nan=False)


def test_bootstrap_follows_its_seed():
    values = np.random.default_rng(0).random(40)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3) != bootstrap(values, seed=4)
    found = bootstrap(values)
    assert found["mean"] == values.mean() and found["ci95"][0] < found["mean"] < found["ci95"][1]


# ----- Responses to metrics -----

class EqualJudge:
    """Similar means equal when lowered; a response that starts with "?" yields no verdict."""

    name = "equal"

    def __init__(self):
        self.asked = []

    def similar_pairs(self, pairs):
        self.asked += [(a, b) for _, a, b in pairs]
        return [None if "?" in (a[:1], b[:1]) else self.agree(a, b) for _, a, b in pairs]

    def agree(self, a, b):
        return a.lower() == b.lower()


class OneWayJudge(EqualJudge):
    """Sees agreement only where the shorter response comes first."""

    def agree(self, a, b):
        return len(a) < len(b)


def question(responses, targets=("red",), task="colour", **more):
    return {"task": task, "id": "0", "input": "a red lamp", "targets": list(targets),
            "labels": None, "wordings": [f"wording {i}" for i in range(len(responses))],
            "responses": list(responses), "unfinished": 0, **more}


def test_identical_responses_are_consistent_without_a_call():
    judge = EqualJudge()
    metrics, _ = evaluate_responses([question(["red"] * 4)] * 3, judge)
    assert all(metrics[name]["mean"] == 1 for name in TABLE) and not judge.asked
    assert metrics["cr"] == bootstrap([1, 1, 1]) and metrics["cr"]["ci95"][1] == 1


def test_metrics_of_one_question_by_hand():
    asked = question(["red", "Red.", "blue", "RED", "a red"], unfinished=2)
    metrics, [row] = evaluate_responses([asked], EqualJudge())
    assert row["cr"] == pytest.approx(1 / 10) and row["mcr"] == 0.4  # only "red" and "RED" agree
    assert row["correct"] == [True, True, False, True, False] and row["exact_match"] == 0.6
    assert row["consistent_and_correct"] == pytest.approx(1 / 10)
    assert row["rouge1"] == row["rougeL"] == pytest.approx((3 + 2 / 3) / 5) and row["rouge2"] == 0
    assert row["cluster"] == [0, 1, 2, 0, 3]
    assert {name: row[name] for name in asked} == asked
    assert (metrics["judge"], metrics["questions"], metrics["unfinished"]) == ("equal", 1, 2)
    assert metrics["cr"] == {"mean": row["cr"], "ci95": None, "n": 1}


def test_consistent_but_wrong_pairs_are_not_consistent_and_correct():
    _, [row] = evaluate_responses([question(["blue", "BLUE", "red", "RED"])], EqualJudge())
    assert row["cr"] == pytest.approx(2 / 6)
    assert row["consistent_and_correct"] == pytest.approx(1 / 6)


def test_metrics_are_means_over_questions():
    asked = [question(["red", "red"]), question(["red", "blue"]), question(["red"])]
    metrics, rows = evaluate_responses(asked, EqualJudge())
    assert metrics["cr"]["mean"] == 0.5 and metrics["cr"]["n"] == 2  # one response has no pair
    assert metrics["consistent_and_correct"]["n"] == 2
    assert metrics["mcr"] == bootstrap([1.0, 0.5])
    assert metrics["exact_match"] == bootstrap([1.0, 0.5, 1.0])
    assert [rows[2][name] for name in ("cr", "mcr", "consistent_and_correct")] == [None] * 3


def test_the_best_of_several_references_counts():
    _, [row] = evaluate_responses([question(["a big cat"], ["a dog", "a big cat"])], EqualJudge())
    assert row["exact_match"] == row["rougeL"] == row["rouge2"] == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_cr_by_rules_is_one_or_zero_in_all_scripts(script):
    near, far = SCRIPTS[script].values()
    asked = [question(near, [near[0]]), question(far, [far[0]])]
    asked.append(asked[1] | {"labels": far})
    metrics, rows = evaluate_responses(asked, RuleJudge())
    assert [row["cr"] for row in rows] == [1, 0, 0]
    assert [row["mcr"] for row in rows] == pytest.approx([1, 1 / 3, 1 / 3])
    assert rows[1]["correct"] == [True, False, False] and rows[0]["correct"][:2] == [True, True]


def test_unparsed_verdicts_are_missing_and_counted():
    asked = [question(["?", "red", "red", "blue"]), question(["?", "red"])]
    metrics, rows = evaluate_responses(asked, EqualJudge())
    assert metrics["asked"] == 8 and metrics["unparsed"] == 6  # both orders of three pairs
    assert rows[0]["cr"] == pytest.approx(1 / 3)  # of red, red and blue
    assert rows[0]["mcr"] == 0.5 and rows[0]["consistent_and_correct"] == pytest.approx(1 / 3)
    assert rows[1]["cr"] is rows[1]["mcr"] is None and metrics["cr"]["n"] == 1


@pytest.mark.parametrize("symmetrize, cr", [("and", [0, None]), ("or", [None, 1])])
def test_one_order_that_is_read_can_be_enough(symmetrize, cr):
    """A no settles a pair that needs both orders, a yes one that needs either."""
    class HalfRead(EqualJudge):
        def similar_pairs(self, pairs):
            return [a.endswith("!") if a < b else None for _, a, b in pairs]

    asked = [question(["a", "b"]), question(["a!", "b!"])]
    _, rows = evaluate_responses(asked, HalfRead(), symmetrize=symmetrize)
    assert [row["cr"] for row in rows] == cr


@pytest.mark.parametrize("n", [1, 5])
def test_a_judge_of_whom_nothing_is_read_fails(n):
    with pytest.raises(ValueError, match=f"none of the judge's {2 * n} verdicts could be read, "):
        evaluate_responses([question(["?", "red"])] * n, EqualJudge())


def test_samples_of_a_wording_are_its_noise_and_not_its_consistency():
    """CR, C&C and `within` against their definitions, on random answers."""
    rng = random.Random()
    for _ in range(50):
        n, k = rng.randint(1, 5), rng.randint(1, 4)
        responses = [rng.choice(["red", "Red", "blue", "green"]) for _ in range(n * k)]
        wordings = [f"wording {i // k}" for i in range(n * k)]
        _, [row] = evaluate_responses([question(responses, wordings=wordings)], EqualJudge())
        values = {True: [], False: []}
        for i, j in itertools.combinations(range(n * k), 2):
            values[wordings[i] == wordings[j]].append(
                responses[i].lower() == responses[j].lower())
        for name, found in (("within", values[True]), ("cr", values[False])):
            wanted = sum(found) / len(found) if found else None
            assert row[name] == (wanted and pytest.approx(wanted))
        assert (row["mcr"] is None) == (n == 1)


def test_without_references_there_is_consistency_alone(tmp_path, capsys):
    asked = [question(["red", "red", "blue"], []), question(["a", "b", "c"], [])]
    results, tables = evaluate_responses(asked, EqualJudge())
    assert tables[0]["correct"] == [None] * 3 and tables[0]["cluster"] == [0, 0, 1]
    assert results["cr"]["mean"] == pytest.approx(1 / 6) and results["exact_match"]["n"] == 0
    write_results(SimpleNamespace(out=tmp_path, plain=True), {"m": results}, {"m": tables})
    assert capsys.readouterr().out == "model |    CR |   MCR\nm     |  16.7 |  50.0\n"


def test_each_ordered_pair_of_different_responses_is_asked_once():
    judge = EqualJudge()
    evaluate_responses([question(["a", "b", "a", "c"]), question(["a", "b"])], judge)
    assert judge.asked == [*itertools.permutations("abc", 2), ("a", "b"), ("b", "a")]


@pytest.mark.parametrize("symmetrize, cr, n_asked", [("and", 0.0, 2), ("or", 1.0, 2),
                                                      ("first", 1.0, 1)])
def test_orders_of_a_pair_are_joined_as_asked_for(symmetrize, cr, n_asked):
    judge = OneWayJudge()
    metrics, _ = evaluate_responses([question(["red", "a red"])], judge, symmetrize=symmetrize)
    assert metrics["cr"]["mean"] == metrics["mcr"]["mean"] * 2 - 1 == cr
    assert len(judge.asked) == n_asked
    turned, _ = evaluate_responses([question(["a red", "red"])], OneWayJudge(),
                                   symmetrize=symmetrize)
    assert turned["cr"]["mean"] == (0.0 if symmetrize == "first" else cr)


def test_metrics_are_strict_json_whatever_is_missing():
    for questions in ([], [question(["red"])], [question([""], targets=[""])],
                      [question(["a", "b"]), question(["c"])]):
        json.dumps(evaluate_responses(questions, EqualJudge()), allow_nan=False)


def test_more_metrics_see_every_question_and_add_to_the_summary():
    class More:
        def question(self, row, similar, at_most):
            assert (similar == at_most).all()  # all verdicts were read
            return row | {"worst": int(similar.sum(1).min())}

        def summary(self, rows):
            return {"worst": min(row["worst"] for row in rows), "mcr": "another"}

    metrics, rows = evaluate_responses([question(["a", "a", "b"]), question(["a", "a"])],
                                       EqualJudge(), more=More())
    assert [row["worst"] for row in rows] == [1, 2] and metrics["worst"] == 1
    assert metrics["mcr"] == "another" and metrics["cr"]["n"] == 2


def test_rules_compare_as_they_judge():
    asked = question(["the cat was found under the bed", "the cat was under the bed", "a dog"])
    assert evaluate_responses([asked], RuleJudge())[1][0]["cr"] == pytest.approx(1 / 3)
    assert evaluate_responses([asked], RuleJudge(0.95))[1][0]["cr"] == 0


# ----- Results -----

def two_models():
    made = {"base": evaluate_responses([question(["a|b\n", "red", "red"])], EqualJudge()),
            "sft": evaluate_responses([question(["red"] * 3), question(["x"])], EqualJudge()),
            "none": evaluate_responses([], EqualJudge())}
    return ({name: pair[0] for name, pair in made.items()},
            {name: pair[1] for name, pair in made.items()})


def test_results_are_written_and_printed(tmp_path, capsys):
    results, tables = two_models()
    for _ in range(2):  # the second time over the first
        write_results(SimpleNamespace(out=tmp_path / "out", plain=True), results, tables)
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == results
    rows = data.read_records(tmp_path / "out/questions.jsonl")
    assert [row.pop("model") for row in rows] == ["base", "sft", "sft"]
    assert rows == tables["base"] + tables["sft"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.json",
                                                                    "questions.jsonl"}
    lines = capsys.readouterr().out.splitlines()[:4]
    assert lines[0].split() == "model | CR | MCR | R-1 | R-L | EM | C&C".split()
    assert lines[2].split() == "sft | 100.0 | 100.0 | 50.0 | 50.0 | 50.0 | 100.0".split()
    assert lines[3].split() == ["none", *["|", "-"] * 6]
    assert len({len(line) for line in lines}) == 1


# ----- Opening -----

def settings(world, *more):
    """The flags of a plain command for the tiny world."""
    return evaluation.parse_flags(["--plain", "--model", str(world / "model"), *more])


def trained_adapter(world, folder):
    """The tiny world's model with adapters that change what it says; they are saved in folder."""
    torch.manual_seed(0)
    model = lora.apply_lora(load_model(world / "model"), lora.LoraConfig(rank=2))
    for module in lora.lora_modules(model).values():
        module.lora_B.data.normal_()
    lora.save_adapter(model, folder)
    return model


def test_the_plain_course_opens_models_with_and_without_an_adapter(world, tmp_path):
    cfg = settings(world)
    model = evaluation.open_model(cfg)
    assert type(model).__name__ == "Llama" and model.config.vocab_size == len(
        evaluation.open_tokenizer(cfg))
    adapted, ids = trained_adapter(world, tmp_path), torch.tensor([[1, 5, 9]])
    opened = evaluation.open_model(cfg, str(tmp_path), trainable=True)
    assert torch.equal(opened(ids), adapted(ids)) and not torch.equal(opened(ids), model(ids))
    assert all(weight.requires_grad for weight in lora.adapter_weights(opened).values())
    half = evaluation.open_model(settings(world, "--dtype", "bfloat16"))
    assert half.lm_head.weight.dtype == torch.bfloat16


def test_the_template_is_the_one_asked_for_then_the_adapters_then_the_models(world, tmp_path):
    model, named = evaluation.open_model(settings(world)), data.TEMPLATES
    (tmp_path / "config.json").write_text(json.dumps({"template": "alpaca-stanford"}))
    asked, free = settings(world, "--template", "alpaca"), settings(world)
    assert evaluation.find_template(asked, model, str(tmp_path)) == named["alpaca"]
    assert evaluation.find_template(free, model, str(tmp_path)) == named["alpaca-stanford"]
    assert evaluation.find_template(free, model, str(tmp_path / "none")) == named["plain"]
    model.config.prompt_template = None
    assert evaluation.find_template(free, model) == named["alpaca"]


def test_devices_that_are_not_there_are_refused(world):
    n = torch.cuda.device_count()
    assert evaluation.pick_device(settings(world, "--device", "cpu")) == ("cpu", torch.float32)
    with pytest.raises(ValueError, match=f"--device cuda:{n} is not here: this machine has"):
        evaluation.pick_device(settings(world, "--device", f"cuda:{n}"))


def test_plain_means_no_extras():
    for room in ("formats", "fast", "runtime", "judges", "reports"):
        assert evaluation.extra(room, plain=True) is None


# ----- Text in, text out -----

class Bytes:
    """A tokenizer whose tokens are bytes, from 3 up."""

    bos_id, eos_id = 1, 2

    def encode_prompt(self, text):
        return [1, *(3 + byte for byte in text.encode())]

    def decode(self, ids):
        return bytes(token - 3 for token in ids if token > 2).decode()

    def stop_ids(self, prompts):
        return [2]


@pytest.fixture
def echo(monkeypatch):
    """A model that says what it is asked, and what `generate` was called with."""
    calls = []

    def generate(model, prompts, sampling, *, eos_ids, watch, **options):
        calls.append((prompts, eos_ids, options))
        for _ in prompts:
            watch(SimpleNamespace(done=True))
        return [(prompt[1:] + eos_ids[:1])[:sampling.max_new_tokens] for prompt in prompts]

    monkeypatch.setattr("model.generate", generate)
    return SimpleNamespace(config=SimpleNamespace(context=30, eos_ids=[77]), calls=calls)


def test_complete_decodes_one_answer_for_each_prompt(echo):
    made = complete(echo, Bytes(), ["abc", "x", "abc", "abcdef"], Sampling(4))
    assert [answer.text for answer in made] == ["abc", "x", "abc", "abcd"]
    assert [answer.finished for answer in made] == [True, True, True, False]
    assert made[0].token_ids == [*Bytes().encode_prompt("abc")[1:], 2]
    (_, eos_ids, options), = echo.calls
    assert eos_ids == [2, 77]  # the tokenizer's and the config's
    assert options == {"seeds": None, "batch_size": 64}


def test_complete_samples_equal_prompts_with_seeds_of_their_own(echo):
    complete(echo, Bytes(), ["a", "a"], Sampling(4, temperature=1.0), seeds=[1, 2], batch_size=3)
    assert len(echo.calls[0][0]) == 2 and echo.calls[0][2] == {"seeds": [1, 2], "batch_size": 3}


@pytest.mark.parametrize("max_len, kept", [(None, 25), (12, 7), (99, 25)])
def test_long_prompts_are_truncated_from_the_left(echo, max_len, kept):
    text = "".join(chr(97 + i % 26) for i in range(60))
    complete(echo, Bytes(), [text], Sampling(4), max_len=max_len)
    assert echo.calls[0][0] == [[1, *Bytes().encode_prompt(text)[-kept:]]]


def test_no_room_for_a_prompt_is_refused(echo):
    with pytest.raises(ValueError, match="--max-new-tokens 29 leaves no room for a prompt in 30 "
                                         "tokens. Lower it, or raise --max-len"):
        complete(echo, Bytes(), ["a"], Sampling(29))
    complete(echo, Bytes(), ["a"], Sampling(28))


def test_complete_is_generate_between_two_tokenizers(world, tokenizer):
    model = load_model(world / "model")
    prompts = ["what is the colour ?", "anna :", "what is the colour ?"]
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    for sampling, seeds in ((Sampling(5), None), (Sampling(5, temperature=1.5), [4, 5, 6])):
        made = complete(model, tokenizer, prompts, sampling, seeds=seeds)
        wanted = generate(model, ids, sampling, seeds=seeds)
        assert [answer.token_ids for answer in made] == wanted
        assert [answer.text for answer in made] == [tokenizer.decode(x) for x in wanted]
        assert [answer.finished for answer in made] == [
            x[-1] == tokenizer.eos_id for x in wanted]
    assert made[0] != made[2]  # equal prompts, other seeds


def test_every_wording_is_answered_behind_the_prefix(echo):
    echo.config.context = 1000
    asked = [{"wordings": ["Say.", "Say {input} again."], "input": "in", "id": 1},
             {"wordings": ["Do."], "input": "", "id": 2}]
    found = evaluation.answer_questions(echo, Bytes(), data.TEMPLATES["plain"], asked,
                                        Sampling(48), prefix="best ")
    assert found[0] == asked[0] | {"unfinished": 2, "responses": [
        "### Instruction: best Say.\n### Input: in\n### Response:"[:48],
        "### Instruction: best Say in again.\n### Response:"[:48]]}
    assert found[1]["responses"] == ["### Instruction: best Do.\n### Response:"]
    assert found[1]["unfinished"] == 0


# ----- Command line -----

@pytest.fixture
def command(world, tmp_path):
    """A function that makes a short plain command for the tiny world."""
    def make(*more):
        return ["--plain", "--model", str(world / "model"), "--tasks", str(world / "tasks"),
                "--paraphrases", str(world / "paraphrases.json"), "--out", str(tmp_path / "out"),
                "--per-task", "2", "--max-new-tokens", "4", *more]
    return make


def test_a_model_and_an_adapter_that_changes_nothing(world, command, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    lora.save_adapter(lora.apply_lora(load_model(world / "model"), lora.LoraConfig()), adapter)
    assert evaluation.main(command("--adapter", str(adapter), "--split", "test")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("model ") and len(printed) == 3
    results = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(results) == ["model", str(adapter)]
    assert results["model"] == results[str(adapter)] and results["model"]["questions"] == 4
    rows = data.read_records(tmp_path / "out/questions.jsonl")
    assert len(rows) == 8 and {row["model"] for row in rows} == set(results)
    for row in rows:
        assert row["wordings"] in (["name its colour", "say the colour"],
                                   ["name its person", "say the person"])
        assert len(row["responses"]) == len(row["cluster"]) == 2


def test_adapters_are_merged_before_they_answer(world, command, tmp_path, monkeypatch):
    adapted, ids = trained_adapter(world, tmp_path / "adapter"), torch.tensor([[1, 5, 9, 30]])
    answered, seen = evaluation.answer_questions, []

    def watched(model, *arguments, **options):
        seen.append((len(lora.lora_modules(model)), model(ids)))
        return answered(model, *arguments, **options)

    monkeypatch.setattr(evaluation, "answer_questions", watched)
    assert evaluation.main(command("--adapter", str(tmp_path / "adapter"))) == 0
    assert [modules for modules, _ in seen] == [0, 0]
    for (_, found), model in zip(seen, (load_model(world / "model"), adapted), strict=True):
        torch.testing.assert_close(found, model(ids), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(seen[0][1], seen[1][1], atol=1e-3)


def test_the_command_repeats_itself_and_follows_its_flags(command, tmp_path, monkeypatch):
    asked = []

    def watched(model, tokenizer, prompts, sampling, **options):
        asked.append(prompts)
        return complete(model, tokenizer, prompts, sampling, **options)

    def run(*more):
        assert evaluation.main(command(*more)) == 0
        return data.read_records(tmp_path / "out/questions.jsonl"), asked[-1]

    monkeypatch.setattr(evaluation, "complete", watched)
    rows, prompts = run()
    assert run() == (rows, prompts) and len(rows) == 4 and len(prompts) == 8
    mark, plain = "### Instruction: ", data.TEMPLATES["plain"]
    assert prompts[0] == plain.render("the colour , please", rows[0]["input"])
    assert run("--prefix", "good : ")[1] == [x.replace(mark, mark + "good : ") for x in prompts]
    assert run("--template", "alpaca")[1] == [
        data.TEMPLATES["alpaca"].render(wording, row["input"])
        for row in rows for wording in row["wordings"]]
    assert run("--per-task", "1")[0] == [rows[0], rows[2]]
    assert not {x["input"] for x in run("--split", "test")[0]} & {row["input"] for row in rows}


def test_the_flags_of_the_comparison_reach_it(command, monkeypatch):
    seen = {}

    def recorded(questions, judge, **options):
        seen.update(options, threshold=judge.rouge_threshold)
        return evaluate_responses(questions, judge, **options)

    monkeypatch.setattr(evaluation, "evaluate_responses", recorded)
    assert evaluation.main(command("--rouge-threshold", "0.9")) == 0
    assert (seen["symmetrize"], seen["threshold"], seen["more"]) == ("and", 0.9, None)


def test_the_demos_tasks_are_the_default(world, monkeypatch):
    tasks = data.read_tasks(ROOT / "demo/tasks")
    found = evaluation.read_questions(evaluation.parse_flags(["--per-task", "1"], demo=True))
    assert {row["task"] for row in found} <= {task.name for task in tasks} and len(found) > 20
    assert all(2 <= len(row["wordings"]) <= 10 for row in found)


@needs_extras
def test_extras_add_their_flags_and_change_no_number_of_the_course(command, tmp_path, capsys):
    found = []
    for argv in (command(), command("--cluster", "component")[1:]):  # the second without --plain
        assert evaluation.main(argv) == 0
        table = [line for line in capsys.readouterr().out.splitlines() if " | " in line][:2]
        found.append((json.loads((tmp_path / "out/metrics.json").read_text())["model"], table))
    (plain, first), (more, second) = found
    assert first == second and len(first) == 2
    for name in TABLE.keys() - {"mcr"}:
        assert {key: more[name][key] for key in plain[name]} == plain[name]
    assert more["cluster"] == "component" and more["responses"] == 8
    assert (tmp_path / "out/report.md").exists()


@needs_extras
def test_the_kl_to_a_reference_is_measured_with_a_seed(world, command, tmp_path):
    trained_adapter(world, tmp_path / "adapter")
    found = []
    for seed in ("1", "1", "2"):
        argv = command("--reference", str(tmp_path / "adapter"), "--seed", seed)[1:]
        assert evaluation.main(argv) == 0
        found.append(json.loads((tmp_path / "out/metrics.json").read_text())["model"]["kl"])
    assert found[0] == found[1] != found[2] and found[0]["n"] == 4


@needs_extras
@pytest.mark.parametrize("more, said", [
    (["--cluster", "star"], "argument --cluster: invalid choice: 'star'"),
    (["--judge-model", "m"], "--judge-model"), (["--budget", "1"], "--budget"),
    (["--judge", "http"], "--judge-model"), (["--quantize", "int2"], "invalid choice: 'int2'")])
def test_mistakes_in_the_flags_of_extras_are_one_line(more, said, command, capsys):
    status, line = answer_to(command(*more)[1:], capsys)
    assert status == 2 and line.startswith("error: ") and line.count("\n") == 1 and said in line


def answer_to(argv, capsys):
    """Exit status and error output of a command that stops, of which nothing went to stdout."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    captured = capsys.readouterr()
    assert captured.out == ""
    return stop.value.code, captured.err


@pytest.mark.parametrize("more, said", [
    (["--model", "/no/such"], "no tokenizer at /no/such"),
    (["--tasks", "/no/such"], "no task files at /no/such"),
    (["--paraphrases", "/no/such"], "No such file or directory: '/no/such'"),
    (["--adapter", "/no/such"], "'/no/such/adapter_config.json'"),
    (["--device", "cuda:99"], "--device cuda:99 is not here: this machine has"),
    (["--template", "lama"], "unknown template 'lama'"),
    (["--max-new-tokens", "5000"], "--max-new-tokens 5000 leaves no room"),
    (["--no-such-flag"], "there is no flag --no-such-flag here; see --help."),
    (["--compile"], "there is no flag --compile here; see --help."),
    (["--per", "3"], "there is no flag --per here; see --help."),  # no abbreviations
    (["--split", "train"], "argument --split: invalid choice: 'train'"),
    (["--per-task", "few"], "argument --per-task: invalid int value: 'few'"),
    (["--per-task", "0"], "--per-task is 0. Expected 1 or more."),
    (["--wordings", "1"], "--wordings is 1. Expected 2 or more."),
    (["--max-new-tokens", "0"], "--max-new-tokens is 0. Expected 1 or more."),
    (["--batch-size", "0"], "--batch-size is 0. Expected 1 or more."),
    (["--out", "eval.py"], "File exists: 'eval.py'"),
])
def test_a_mistake_is_one_line_and_status_2(more, said, command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, line = answer_to(command(*more), capsys)
    assert status == 2 and line.startswith("error: ") and line.count("\n") == 1 and said in line


def test_the_value_of_an_unknown_flag_and_control_characters_are_not_printed(command, capsys):
    _, line = answer_to(command("--api-key=sk-secret"), capsys)
    assert line == "error: there is no flag --api-key here; see --help.\n"
    _, line = answer_to(command("--template", "a\x1b[31m\nb"), capsys)
    assert line.count("\n") == 1 and "\x1b" not in line


ONLY_EXTRAS = ["--cluster component", "--use-stemmer", "--reference x", "--seed 1",
               "--quantize int8", "--judge http", "--judge-model m", "--judge-workers 2",
               "--judge-cache x", "--budget 1"]


@pytest.mark.parametrize("flag", ONLY_EXTRAS)
def test_flags_that_only_extras_reads_are_refused_under_plain(flag, command, capsys):
    words = flag.split()
    assert answer_to(command(*words), capsys) == (
        2, f"error: there is no flag {words[0]} here; see --help.\n")


def test_tasks_without_held_out_wordings_are_refused(command, world, tmp_path, capsys):
    (tmp_path / "few.json").write_text(json.dumps({"colour": ["a", "b"]}))
    status, line = answer_to(command("--paraphrases", str(tmp_path / "few.json")), capsys)
    assert status == 2 and line == (
        "error: no task has two dev wordings, and consistency needs two. Give --paraphrases FILE, "
        "or the other --split.\n")


def imports_of(*argv):
    """Exit status of a command, its own error lines, and the modules that it imported."""
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "eval.py"), *argv],
                          cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    own = [line for line in lines if not line.startswith("import time:")]
    modules = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    return done.returncode, own, modules


def test_help_is_quick():
    status, own, modules = imports_of("--help")
    assert status == 0 and own == [] and "torch" not in modules


def test_a_mistake_is_answered_before_torch_is_imported():
    status, own, modules = imports_of("--plain", "--model", "/no/such")
    assert status == 2 and len(own) == 1 and own[0].startswith("error: no tokenizer at /no/such")
    assert "torch" not in modules
