"""eval.py: hand-derived graphs and ROUGE values, brute force, invariants; no network, no checkpoint."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from eval import (
    METRICS,
    EvalConfig,
    bootstrap,
    clusters,
    complete,
    consistency_rate,
    cut_masks,
    evaluate_errors,
    evaluate_model,
    evaluate_responses,
    exact_match,
    keyword_logprobs,
    main,
    markdown_text,
    marked,
    mask_scores,
    max_consistency_rate,
    paired_difference,
    parse_flags,
    plot_sweep,
    printable,
    rouge_scores,
    summary_table,
    token_words,
    write_report,
)

ROOT = Path(__file__).parent.parent


def graph(n, edges):
    similar = np.eye(n, dtype=bool)
    for i, j in edges:
        similar[i, j] = similar[j, i] = True
    return similar


# ---------------------------------------------------------------------------------------------------------------------
# CR and MCR

K4 = list(itertools.combinations(range(4), 2))
GOLDEN = {                                                 # n, edges, CR, MCR by clique, component, greedy
    "path": (5, [(0, 1), (1, 2), (2, 3), (3, 4)], 0.4, 0.4, 1.0, 0.4),
    "triangle and edge": (5, [(0, 1), (1, 2), (0, 2), (3, 4)], 0.4, 0.6, 0.6, 0.6),
    "no edge": (4, [], 0.0, 0.25, 0.25, 0.25),
    "K4": (4, K4, 1.0, 1.0, 1.0, 1.0),
    "K4 minus 03": (4, [e for e in K4 if e != (0, 3)], 5 / 6, 0.75, 1.0, 0.75),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_consistency_of_hand_drawn_graphs(name):
    n, edges, cr, clique, component, greedy = GOLDEN[name]
    similar = graph(n, edges)
    assert consistency_rate(similar) == pytest.approx(cr)
    assert max_consistency_rate(similar) == clique
    assert max_consistency_rate(similar, cluster="component") == component
    assert max_consistency_rate(similar, cluster="greedy") == greedy


def test_one_response_has_no_cr_and_an_mcr_of_one():
    assert consistency_rate([[True]]) is None
    assert all(max_consistency_rate([[True]], cluster=rule) == 1 for rule in ("clique", "component", "greedy"))


def test_a_pair_counts_only_if_both_orders_agree_but_greedy_reads_one():
    similar = np.array([[1, 0], [1, 1]], dtype=bool)       # asked (1, 0): similar; asked (0, 1): not
    assert consistency_rate(similar) == consistency_rate(similar.T) == 0
    assert max_consistency_rate(similar) == max_consistency_rate(similar, cluster="component") == 0.5
    assert max_consistency_rate(similar, cluster="greedy") == 1
    assert max_consistency_rate(similar.T, cluster="greedy") == 0.5


def test_greedy_depends_on_the_order_of_the_responses():
    star = graph(3, [(0, 1), (0, 2)])                      # 0 agrees with both, 1 and 2 do not agree
    assert clusters(star, rule="greedy") == [[0, 1, 2]]
    assert clusters(star[[1, 0, 2]][:, [1, 0, 2]], rule="greedy") == [[0, 1], [2]]


def test_clique_is_the_largest_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(150):
        n = int(rng.integers(1, 10))
        similar = graph(n, [e for e in itertools.combinations(range(n), 2) if rng.random() < rng.random()])
        best = max(len(c) for k in range(1, n + 1) for c in itertools.combinations(range(n), k)
                   if all(similar[i, j] for i, j in itertools.combinations(c, 2)))
        found = clusters(similar)
        assert len(found[0]) == best and sorted(sum(found, [])) == list(range(n))
        assert all(similar[i, j] for group in found for i in group for j in group)
        assert max_consistency_rate(similar) <= max_consistency_rate(similar, cluster="component")


def test_clique_of_64_responses_is_quick():
    parts = np.arange(64) // 3                             # complete 22-partite: what defeats plain enumeration
    assert max_consistency_rate(parts[:, None] != parts) == 22 / 64
    rng = np.random.default_rng(1)
    dense = np.triu(rng.random((64, 64)) < 0.9, 1)
    assert 20 < 64 * max_consistency_rate(dense | dense.T | np.eye(64, dtype=bool)) < 45


def test_unknown_cluster_rule_names_the_known_ones():
    with pytest.raises(ValueError, match="clique, component, greedy"):
        clusters([[True]], rule="kmeans")


# ---------------------------------------------------------------------------------------------------------------------
# ROUGE, exact match


@pytest.mark.parametrize("target, prediction, stem, rouge1, rouge2, rougeL", [
    ("the cat was found under the bed", "the cat was under the bed", False, 0.923077, 0.727273, 0.923077),
    ("Running dogs, quickly!", "the dog runs quick", False, 0, 0, 0),
    ("Running dogs, quickly!", "the dog runs quick", True, 0.571429, 0, 0.285714),
    ("Don't stop_me 3.5", "dont stop me 3 5", False, 0.727273, None, 0.727273),
    ("the cat", "", False, 0, 0, 0),
])
def test_rouge_by_hand(target, prediction, stem, rouge1, rouge2, rougeL):
    found = rouge_scores(prediction, [target], use_stemmer=stem)
    for name, value in (("rouge1", rouge1), ("rouge2", rouge2), ("rougeL", rougeL)):
        assert value is None or found[name] == pytest.approx(value, abs=1e-6)
    assert found["tokenizer"] == "words"


def test_rouge_equals_the_package_and_takes_the_best_reference():
    from rouge_score.rouge_scorer import RougeScorer
    rng, words = np.random.default_rng(0), "a red lamp, café Paris; running 3.5 dogs isn't blue".split()
    for stem in (False, True):
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stem)
        for _ in range(20):
            prediction, *references = (" ".join(rng.choice(words, rng.integers(1, 8))) for _ in range(3))
            found = rouge_scores(prediction, references, use_stemmer=stem)
            for name in ("rouge1", "rouge2", "rougeL"):
                assert found[name] == max(scorer.score(text, prediction)[name].fmeasure for text in references)


def test_rouge_of_other_scripts_counts_characters_and_says_so():
    same, half = rouge_scores("猫在床下", ["猫在床下"]), rouge_scores("猫在", ["猫在床下"])
    assert same["rougeL"] == 1 and same["tokenizer"] == "characters"
    assert half["rouge1"] == pytest.approx(2 / 3)
    assert rouge_scores("猫 cat", ["a cat"])["tokenizer"] == "words"         # the references decide, not the model
    assert rouge_scores("амам", ["мама"])["rouge1"] == 0 and rouge_scores("мама мыла", ["мама ела"])["rouge1"] == pytest.approx(0.5)
    assert rouge_scores("हिन्दी", ["हिन्दी"])["rouge1"] == 1 and rouge_scores("हिन्दा", ["हिन्दी"])["rouge1"] == 0
    assert rouge_scores("cat猫dog", ["cat 猫 dog"])["rougeL"] == 1


def test_exact_match_ignores_case_punctuation_and_spacing_only():
    assert exact_match(" The  red-lamp. ", ["blue", "the redlamp"])
    assert not exact_match("a red lamp", ["red lamp"])
    assert exact_match("+", ["-", "+"]) and not exact_match("", ["-"]) and not exact_match("+", ["-"])


# ---------------------------------------------------------------------------------------------------------------------
# Bootstrap


def test_bootstrap_interval_covers_the_mean_about_95_times_in_100():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        low, high = bootstrap(rng.normal(0.5, 0.2, 60), resamples=400, seed=trial)["ci95"]
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_of_no_one_and_equal_values():
    assert bootstrap([]) == bootstrap([None]) == {"mean": None, "ci95": None, "n": 0}
    assert bootstrap([0.5, None]) == {"mean": 0.5, "ci95": None, "n": 1}
    assert bootstrap([1.0] * 5) == {"mean": 1.0, "ci95": [1.0, 1.0], "n": 5}
    assert bootstrap([0, 1, 1], seed=3) == bootstrap([0, 1, 1], seed=3)


# ---------------------------------------------------------------------------------------------------------------------
# Responses to metrics


class EqualJudge:
    """Similar means equal; a response that starts with "?" yields no verdict."""

    name = "equal"

    def __init__(self):
        self.asked = []

    def similar(self, a, b, labels):
        self.asked.append((a, b))
        return None if "?" in (a[:1], b[:1]) else a == b


def question(responses, targets=("red",), task="colour", **more):
    return {"task": task, "input": more.pop("input", "a red lamp"), "targets": list(targets), "labels": None,
            "wordings": [f"wording {i}" for i in range(len(responses))], "responses": list(responses), **more}


def test_identical_responses_are_consistent_without_a_call():
    judge = EqualJudge()
    metrics, _ = evaluate_responses([question(["red"] * 4)] * 3, judge=judge)
    assert all(metrics[name]["mean"] == 1 for name in METRICS if name != "rouge2") and not judge.asked
    assert metrics["cr"]["ci95"] == [1, 1] and metrics["cr"]["n"] == 3


def test_metrics_of_one_question_by_hand():
    asked = question(["red", "Red.", "blue", "red"], styles=["terse", "", "terse", "polite"])
    metrics, [row] = evaluate_responses([asked], judge=EqualJudge())
    assert row["cr"] == pytest.approx(1 / 6) and row["mcr"] == 0.5           # only the two that are equal
    assert row["exact_match"] == 0.75 and row["correct"] == [True, True, False, True]
    assert row["consistent_and_correct"] == pytest.approx(1 / 6)
    assert row["worst_paraphrase"] == 0 and row["rouge1"] == 0.75
    assert row["cluster"] == [0, 1, 2, 0]
    assert {style: found["mean"] for style, found in metrics["by_style"].items()} == dict(plain=1, polite=1, terse=0.5)
    assert metrics["judge"] == "equal" and metrics["cluster"] == "clique"


def test_unparsed_verdicts_count_as_different_and_are_counted():
    metrics, rows = evaluate_responses([question(["?", "red", "red"])], judge=EqualJudge())
    assert metrics["unparsed"] == rows[0]["unparsed"] == 2                   # "?" and red, asked in both orders
    assert rows[0]["cr"] == pytest.approx(1 / 3)


def test_metrics_are_strict_json_whatever_is_missing():
    for questions in ([], [question(["red"])], [question([""], targets=[""])], [question(["a", "b"]), question(["c"])]):
        metrics, rows = evaluate_responses(questions, judge=EqualJudge())
        json.dumps([metrics, rows], allow_nan=False)
        assert metrics["without_cr"] == sum(len(q["responses"]) == 1 for q in questions)
    with pytest.raises(ValueError, match="0 responses"):
        evaluate_responses([question([])], judge=EqualJudge())


def test_paired_difference_joins_by_question():
    one, two, better = question(["red", "blue"], id="1"), question(["red", "red"], id="2"), question(["a", "a"], id="1")
    _, before = evaluate_responses([one, two], judge=EqualJudge())
    _, after = evaluate_responses([two, better], judge=EqualJudge())
    assert paired_difference(before, after, "cr")["mean"] == 0.5
    assert paired_difference(before, before, "cr")["ci95"] == [0, 0]
    with pytest.raises(ValueError, match="share no question"):
        paired_difference(before, [], "cr")


# ---------------------------------------------------------------------------------------------------------------------
# Reports


HOSTILE = "a|b `c` <script>alert(1)</script> [x](http://e.org) $x_1$ \x1b[31m\n# head \u202e \ud800 **"


def two_models():
    made = {"base": evaluate_responses([question([HOSTILE, "red", "red"]), question(["a", "b"], task="|t|")],
                                       judge=EqualJudge()),
            "sft|x": evaluate_responses([question(["red"] * 3), question(["a", "a"], task="|t|")], judge=EqualJudge())}
    return {name: pair[0] for name, pair in made.items()}, {name: pair[1] for name, pair in made.items()}


def test_summary_table_has_a_line_per_model_of_one_width():
    lines = summary_table(two_models()[0]).splitlines()
    assert lines[0].split() == "model | CR | MCR | R-1 | R-L | EM | C&C".split()
    assert len(lines) == 3 and len(set(map(len, lines))) == 1
    assert summary_table({"none": evaluate_responses([], judge=EqualJudge())[0]}).count("-") >= 6


def test_report_neutralises_what_a_model_says(tmp_path):
    write_report(tmp_path, *two_models())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "\\<script\\>" in text and "<script" not in text.replace("\\<", "")
    assert "[x]" not in text and "\n# head" not in text
    json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert rows[0]["responses"][0] == HOSTILE and {row["model"] for row in rows} == {"base", "sft|x"}
    table = [line for line in text.splitlines() if line.startswith("| wording 0")]
    assert table and all(line.replace("\\|", "").count("|") == 4 for line in table)


def test_report_of_no_question(tmp_path):
    metrics, rows = evaluate_responses([], judge=EqualJudge())
    write_report(tmp_path, {"none": metrics}, {"none": rows})
    assert json.loads((tmp_path / "metrics.json").read_text())["none"]["cr"] == {"mean": None, "ci95": None, "n": 0}


def test_printable_and_markdown_text():
    assert len(markdown_text("a" * 10**6)) == 1000
    assert printable("a b\n\x00é\u2028") == "a b\\n\\x00é\\u2028"
    assert markdown_text("`<a>|b`*") == "\\`\\<a\\>\\|b\\`\\*"


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    results, tables = two_models()
    written = write_report(tmp_path, results, tables)
    assert {path.name for path in written} >= {"metrics.png", "question.png"}
    plot_sweep([(1.0, results["sft|x"]), (0.0, results["base"])], "lambda", tmp_path / "sweep.png")
    assert all(path.stat().st_size > 5000 for path in tmp_path.rglob("*.png"))


def test_report_without_matplotlib_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(tmp_path, *two_models())
    assert "pip install matplotlib" in capsys.readouterr().out and not list(tmp_path.rglob("*.png"))


# ---------------------------------------------------------------------------------------------------------------------
# Generation and the keyword question


class ToyTokenizer:
    """A byte is a token (3 and up); a space and the letter after it are one, so that keywords can be single tokens."""

    bos_id, eos_id, control = 1, 2, {1, 2}

    def encode_turn(self, text):
        return [{"</s>": 2}[text]]

    def encode_continuation(self, text, tail="\n"):
        ids, raw = [], text.encode()
        while raw:
            joined = raw[:1] == b" " and raw[1:2].isalpha()
            ids.append(3 + (raw[1] + 128 if joined else raw[0]))
            raw = raw[2 if joined else 1:]
        return ids

    def encode_prompt(self, text):
        return [self.bos_id, *self.encode_continuation(text)]

    def decode(self, ids):
        return "".join(chr(i - 3) if i < 131 else " " + chr(i - 131) for i in ids if i > 2)


ROOMY = SimpleNamespace(config=SimpleNamespace(context=10**6, eos_ids=()))                 # all that complete() reads


def fake_generate(calls):
    def generate(model, prompts, *, max_new_tokens, temperature, top_p, top_k, eos_ids, seed, batch_size, progress):
        calls.append(prompts)
        return [(prompt[1:] + list(eos_ids))[:max_new_tokens] for prompt in prompts]       # an echo
    return generate


def test_complete_generates_equal_greedy_prompts_once(monkeypatch):
    calls = []
    monkeypatch.setattr("model.generate", fake_generate(calls))
    made = complete(ROOMY, ToyTokenizer(), ["abc", "x", "abc", "abcdef"], max_new_tokens=4)
    assert [answer.text for answer in made] == ["abc", "x", "abc", "abcd"] and len(calls[0]) == 3
    assert [answer.finished for answer in made] == [True, True, True, False]
    assert len(complete(ROOMY, ToyTokenizer(), ["a", "a"], max_new_tokens=4, temperature=1.0, seed=[1, 2])) == 2
    assert len(calls[1]) == 2


def test_each_answer_is_asked_with_the_prefix_and_has_its_own_seed(monkeypatch):
    from eval import sampled_answers

    seen, tokenizer = [], ToyTokenizer()

    def generate(model, prompts, *, temperature, seed, eos_ids, **_):
        seen.append(([tokenizer.decode(prompt) for prompt in prompts], temperature, seed, eos_ids))
        return [[5, 2] for _ in prompts]
    monkeypatch.setattr("model.generate", generate)
    model = SimpleNamespace(config=SimpleNamespace(context=10**6, eos_ids=(77,)))
    asked = [question([], input=f"in {k}", wordings=["do it", "make it"]) for k in range(3)]
    config = EvalConfig(template="plain", max_new_tokens=4, prefix="best ")
    evaluate_errors(model, tokenizer, asked, config, judge=EqualJudge())
    sampled_answers(model, tokenizer, asked, config, n=5)
    assert [temperature for _, temperature, _, _ in seen] == [0.0, 1.0, 1.0]
    assert all(text.startswith("### Instruction: best ") for texts, *_ in seen for text in texts)
    assert all(len(set(seeds)) == len(texts) for texts, _, seeds, _ in seen[1:])
    assert all(set(eos_ids) == {2, 77} for *_, eos_ids in seen)     # the tokenizer's and the config's


def test_best_of_n_is_chosen_by_the_reward_and_worth_the_truth():
    from eval import best_of_table

    rows = best_of_table([[0.0, 1.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]])
    assert [(row["n"], row["reward"], row["truth"]) for row in rows] == [(1, 0.75, 0.5), (2, 1.5, 0.5)]
    assert best_of_table([[0.0, 1.0]], [[1.0, 0.0]])[-1]["truth"] == 0


def test_evaluate_model_answers_every_wording(monkeypatch):
    monkeypatch.setattr("model.generate", fake_generate([]))
    asked = [question([], input="in"), question([], input="other")]
    for row in asked:
        del row["responses"]
        row["wordings"] = ["Say it.", "Say it again."]
    answered = evaluate_model(ROOMY, ToyTokenizer(), asked, EvalConfig(template="plain", max_new_tokens=60))
    assert [len(row["responses"]) for row in answered] == [2, 2]
    assert answered[1]["responses"][1].startswith("### Instruction: Say it again.\n### Input: other")
    assert answered[0]["unfinished"] + answered[1]["unfinished"] == sum(
        not text.endswith("Response:") for row in answered for text in row["responses"])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_keyword_logprobs_equal_the_plain_forward_pass(batch_size):
    import torch

    from model import PRESETS, Llama

    torch.manual_seed(0)
    model, tokenizer = Llama(PRESETS["tiny"]).eval(), ToyTokenizer()
    prefixes = ["task one\n", "a longer task\n", "task one\n", "task one\n", "t\n"]
    suffixes = ["answer: x\nright:", "right:", "right:", "answer: much longer\nright:", ":"]
    keywords = [(" y", " n"), (" yes", " no"), (" yes", " n"), (" expected", " exotic"), (" y", " y")]
    found = keyword_logprobs(model, tokenizer, prefixes, suffixes, keywords, batch_size=batch_size)
    for prefix, suffix, pair, logprobs in zip(prefixes, suffixes, keywords, found, strict=True):
        for keyword, logprob in zip(pair, logprobs, strict=True):
            head = tokenizer.encode_prompt(prefix) + tokenizer.encode_continuation(suffix)
            ids = head + tokenizer.encode_continuation(keyword)
            table = model(torch.tensor([ids])).log_softmax(-1)                       # (1, T, V)
            plain = sum(table[0, t - 1, ids[t]].item() for t in range(len(head), len(ids)))
            assert logprob == pytest.approx(plain, abs=1e-5)


def test_keyword_logprobs_read_a_shared_prefix_once():
    from model import PRESETS, Llama

    model, read = Llama(PRESETS["tiny"]), []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: read.append(len(args[0])))
    keyword_logprobs(model, ToyTokenizer(), ["long prefix\n"] * 3, ["a:", "b:", "c:"], [(" y", " n")] * 3)
    assert read == [1 + len("long prefix\n") - 1 + 3 * 2]                    # " p" is one token; one branch per item
    assert model.training


def test_a_question_is_cut_for_its_own_answers_alone():
    """A long answer to another question takes none of its room."""
    import torch

    from model import PRESETS, Llama

    torch.manual_seed(0)
    model, tokenizer = Llama(PRESETS["tiny"]).eval(), ToyTokenizer()
    asked = (["a long question " * 8 + "\n", "t\n"], ["a:", "answer " * 9 + ":"], [(" y", " n")] * 2)
    most = len(tokenizer.encode_prompt(asked[0][0])) + len(tokenizer.encode_continuation("a:"))
    whole, fitted, cut = (keyword_logprobs(model, tokenizer, *asked, max_len=n) for n in (None, most, most - 9))
    for one, two in zip(whole, fitted):
        assert one == pytest.approx(two, abs=1e-5)
    assert cut[0] != pytest.approx(whole[0], abs=1e-5) and cut[1] == pytest.approx(whole[1], abs=1e-5)


def test_samples_of_a_question_differ_and_kl_is_that_of_the_samples():
    """Each answer from its own seed; the policy is asked with its prefix, the reference without."""
    import torch

    from eval import sampled_answers, sampled_kl
    from model import PRESETS, Llama

    policy, reference = (Llama(PRESETS["tiny"]).init_weights(seed) for seed in (1, 2))
    for weight in (*policy.parameters(), *reference.parameters()):
        weight.data.mul_(4)
    tokenizer, asked = ToyTokenizer(), [{"wordings": ["do it"], "input": f"x{k}"} for k in range(3)]
    config = EvalConfig(template="plain", max_new_tokens=6, prefix="best ")
    many = sampled_answers(policy, tokenizer, asked, config, n=4)
    assert all(len({tuple(answer.token_ids) for answer in answers}) == 4 for answers in many)
    assert sampled_answers(policy, tokenizer, asked, config, n=4) == many != sampled_answers(policy, tokenizer, asked, replace(config, seed=1), n=4)
    differences = []
    for question, (answer,) in zip(asked, sampled_answers(policy, tokenizer, asked, config, n=1)):
        sums = []
        for model, prefix in ((policy, "best "), (reference, "")):
            prompt = tokenizer.encode_prompt(f"### Instruction: {prefix}do it\n### Input: {question['input']}\n### Response:")
            with torch.no_grad():
                table = model(torch.tensor(prompt + answer.token_ids)).log_softmax(-1)[len(prompt) - 1:-1]
            sums.append(float(table.gather(1, torch.tensor(answer.token_ids)[:, None]).sum()))
        differences.append(sums[0] - sums[1])
    found = sampled_kl(policy, reference, tokenizer, asked, config)
    assert found["n"] == 3 and found["mean"] == pytest.approx(sum(differences) / 3, abs=1e-3) and abs(found["mean"]) > 0.1


def test_keyword_that_is_no_continuation_is_refused():
    with pytest.raises(ValueError, match="Begin the keyword with a space"):
        keyword_logprobs(None, ToyTokenizer(), ["p\n"], ["right: "], [("yes", "no")])
    with pytest.raises(ValueError, match="no tokens"):
        keyword_logprobs(None, ToyTokenizer(), ["p\n"], [""], [(" y", " n")])


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def test_flags_come_from_the_dataclass():
    config = EvalConfig(**parse_flags(EvalConfig, "--adapter a b --use-stemmer --cluster greedy --per-task 3".split()))
    assert (config.adapter, config.use_stemmer, config.cluster, config.per_task) == (["a", "b"], True, "greedy", 3)
    assert parse_flags(EvalConfig, []) == {}


@pytest.mark.parametrize("argv, said", [
    (["--no-such-flag"], "--no-such-flag"), (["--split", "train"], "--split"), (["--per-task", "0"], "--per-task 0"),
    (["--model", "/no/such\x1b[31m"], "/no/such\\x1b"),
])
def test_a_mistake_is_one_line_and_status_2(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and said in captured.err


def test_a_mistake_answers_before_torch_is_imported():
    code = ("import sys; from eval import main\n"
            "try: main(['--model', '/no/such'])\nexcept SystemExit: print('torch' in sys.modules)")
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def write_tiny_run(folder):
    """A random tiny model with a tokenizer and an adapter, two tasks and their wordings, under `folder`."""
    import sentencepiece
    import torch

    from lora import LoraConfig, apply_lora, save_adapter
    from model import PRESETS, Llama, save_model

    lines = [f"name the {thing} of item {i} in a sentence .\n" for i in range(60) for thing in ("colour", "place")]
    (folder / "text").write_text("".join(lines))
    torch.manual_seed(0)
    model = Llama(PRESETS["tiny"]).init_weights(0)
    save_model(model, folder / "base")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "base/tokenizer"), vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, model_type="bpe", minloglevel=2)
    save_adapter(apply_lora(model, LoraConfig()), folder / "adapter")
    (folder / "tasks").mkdir()
    wordings = {}
    for task in ("colour", "place"):
        rows = [{"input": f"item {i}", "output": [f"{task} {i % 3}"]} for i in range(24)]
        (folder / f"tasks/{task}.json").write_text(json.dumps({"Definition": [f"name the {task}"], "Instances": rows}))
        wordings[task] = {"test": [{"text": f"say the {task}", "style": "terse"}, f"which {task} is it ?"]}
    (folder / "paraphrases.json").write_text(json.dumps(wordings))


def test_command_evaluates_a_model_and_an_adapter_that_changes_nothing(tmp_path, capsys):
    write_tiny_run(tmp_path)
    main(["--model", f"{tmp_path}/base", "--adapter", f"{tmp_path}/adapter", "--tasks", f"{tmp_path}/tasks", "--out",
          f"{tmp_path}/out", "--paraphrases", f"{tmp_path}/paraphrases.json", "--split", "test", "--per-task", "2",
          "--template", "plain", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.startswith("model ")
    results = json.loads((tmp_path / "out/metrics.json").read_text())
    base, adapted = results.values()
    assert base == adapted and base["questions"] == 4 and base["responses"] == 8
    assert list(base["by_style"]) == ["plain", "terse"] and "judge" in base


# ---------------------------------------------------------------------------------------------------------------------
# Judged responses and CUT's mask


class Pieces:
    """A tokenizer of whole words and parts of words."""

    eos_id = 0

    def __init__(self, *pieces):
        self.pieces = ["</s>", *pieces]
        self.control, self.text_of = set(), {}
        self.model = SimpleNamespace(id_to_piece=lambda token: self.pieces[token], is_byte=lambda token: self.pieces[token].startswith("<0x"))


def test_token_words_and_marks():
    tokenizer = Pieces("\u2581name", "\u2581:", "\u2581an", "na", "\u2581", "\u2581;")
    ids = [1, 2, 3, 4, 6, 0]
    assert token_words(tokenizer, ids) == [0, 1, 2, 2, 3, None] and token_words(tokenizer, [5, 3, 4]) == [None, 0, 0]
    assert marked(tokenizer, ids, [False, False, True, True, False, False]) == "name : [anna] ;"
    assert marked(tokenizer, ids, [False] * 5 + [True]) == "name : anna ;[</s>]"
    assert marked(tokenizer, ids, [True] * 6) == "[name : anna ;</s>]"
    assert marked(tokenizer, [], []) == ""
    lines = Pieces("\u2581a", "<0x0A>", "b", "<0xC3>", "<0xA9>")             # "a", newline, "b", then the two bytes of an e acute
    assert token_words(lines, [1, 2, 3, 4, 5]) == [0, None, 1, 1, 1]
    assert marked(lines, [1, 2, 3, 4, 5], [False, False, True, True, True]) == "a\n[b\u00e9]"


def test_mask_scores_by_hand():
    masks = [{"wrong": [True, False, None], "flagged": {1.1: [True, True, True], 2.0: [False, False, False]}},
             {"wrong": None, "flagged": {1.1: [True], 2.0: [True]}},
             {"wrong": [True, True], "flagged": {1.1: [True, False], 2.0: [True, False]}}]
    assert mask_scores(masks) == [{"lam": 1.1, "precision": 2 / 3, "recall": 2 / 3, "n": 4},
                                  {"lam": 2.0, "precision": 1.0, "recall": 1 / 3, "n": 4}]
    assert mask_scores([]) == []


def judged_run(tmp_path):
    write_tiny_run(tmp_path)
    rows = [{"instruction": "name the colour", "input": f"item {i}", "response": "colour 1 place", "target": "colour 2 place",
             "judgment": None if i == 3 else "wrong : 1 ."} for i in range(4)]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_masks_are_eq_5_of_two_plain_forward_passes(tmp_path):
    import torch

    from data import Tokenizer, find_template
    from model import load_model

    rows, template = judged_run(tmp_path), find_template("plain")
    model, tokenizer = load_model(tmp_path / "base"), Tokenizer(tmp_path / "base")
    masks = cut_masks(model, tokenizer, template, rows, lams=[0.9, 1.0, 1.05])
    assert len(masks) == 3
    for row, mask in zip(rows, masks):
        values = []
        for judgment in (row["judgment"], None):
            prompt = tokenizer.encode_prompt(template.render(row["instruction"], row["input"], judgment))
            with torch.no_grad():
                logits = model(torch.tensor([prompt + mask["ids"]]))[0].softmax(-1)
            values.append([logits[len(prompt) + t - 1, token].item() for t, token in enumerate(mask["ids"])])
        assert mask["p_judged"] == pytest.approx(values[0], rel=1e-4) and mask["p_plain"] == pytest.approx(values[1], rel=1e-4)
        for lam, flags in mask["flagged"].items():
            assert flags == [judged > lam * plain for judged, plain in zip(*values)]
        words = [tokenizer.decode([token]) for token, wrong in zip(mask["ids"], mask["wrong"]) if wrong]
        assert "".join(words) == "1" and mask["wrong"][-1] is None


def test_responses_are_scored_behind_their_own_words_and_the_satisfied_condition():
    """Braces in a record are text; the plain prompt may be one with a judgment of satisfaction."""
    import torch

    from data import TEMPLATES, encode_response
    from model import PRESETS, Llama

    model, tokenizer = Llama(PRESETS["tiny"]).init_weights(0).eval(), ToyTokenizer()
    for weight in model.parameters():
        weight.data.mul_(4)
    record = {"instruction": "say {input}", "input": "x", "response": "red", "judgment": "bad", "target": None}
    for satisfied in (None, "fine"):
        (mask,) = cut_masks(model, tokenizer, TEMPLATES["plain"], [record], lams=[1.0], satisfied=satisfied)
        for found, judgment in ((mask["p_judged"], "bad"), (mask["p_plain"], satisfied)):
            middle = f"### Judgment: {judgment}\n" if judgment else ""
            prompt, answer = tokenizer.encode_prompt(f"### Instruction: say {{input}}\n### Input: x\n{middle}### Response:"), encode_response(tokenizer, TEMPLATES["plain"], "red")
            with torch.no_grad():
                table = model(torch.tensor(prompt + answer)).softmax(-1)[len(prompt) - 1:-1]
            assert found == pytest.approx(table.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist(), rel=1e-3)


def test_command_shows_the_mask(tmp_path, capsys):
    judged_run(tmp_path)
    argv = ["--model", f"{tmp_path}/base", "--template", "plain", "--out", f"{tmp_path}/out", "--show-mask"]
    main([*argv, f"{tmp_path}/judged.jsonl"])
    said = capsys.readouterr().out
    assert "three kinds of examples" in said and "    ### Judgment: wrong : 1 ." in said and "| lambda | precision | recall | tokens |" in said
    (tmp_path / "fine.jsonl").write_text(json.dumps({"instruction": "a", "response": "b", "judgment": None}) + "\n")
    with pytest.raises(SystemExit):
        main([*argv, f"{tmp_path}/fine.jsonl"])
    assert "no unsatisfying response" in capsys.readouterr().err


def test_error_rates_are_what_exact_match_leaves(tmp_path):
    from data import Tokenizer
    from judge import RuleJudge
    from model import load_model

    write_tiny_run(tmp_path)
    model, tokenizer = load_model(tmp_path / "base"), Tokenizer(tmp_path / "base")
    asked = [{"task": "t", "id": str(i), "input": f"item {i}", "wordings": ["name it"], "styles": [""], "labels": None, "targets": ["x"]} for i in range(3)]
    config = EvalConfig(template="plain", max_new_tokens=3)
    greedy = [row["responses"][0] for row in evaluate_model(model, tokenizer, asked, config)]
    for row, text in zip(asked[:2], greedy):
        row["targets"] = [text]
    results, _ = evaluate_errors(model, tokenizer, asked, config, judge=RuleJudge())
    assert results["error_rate"]["mean"] == pytest.approx(1 - sum(text in row["targets"] for row, text in zip(asked, greedy)) / 3)
    assert 0 <= results["sampled_error_rate"]["mean"] <= 1 and results["error_rate"]["n"] == 3
