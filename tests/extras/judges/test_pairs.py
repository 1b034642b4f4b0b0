"""Evaluators of pairs: strategies with scripted judges, biased judges, rules, files of pairs."""

import json
import random
from pathlib import Path

import pytest
from chatserver import Says, fenced

from extras.judges.confer import FORMS
from extras.judges.meta import judge_metrics
from extras.judges.pairs import (
    PUBLISHED,
    STRATEGIES,
    Evaluator,
    Strategy,
    evaluate_by_rule,
    evaluate_pairs,
    find_strategy,
    load_pairs,
    majority,
    preference_probabilities,
)
from extras.judges.questions import JudgeStopped, Reply, Unread

LLMBAR = Path(__file__).parents[4] / "shared" / "data" / "llmbar"
PAIR = {"input": "Name a colour.", "output_1": "Red.", "label": 1,
        "output_2": "A colour is a very nice thing to have, I think."}


# ----- Strategies -----

def prefers(output):
    """A judge that finds `output` better wherever it stands, and writes helpers' texts."""
    def decide(question, text):
        if not question.menu:
            return "1. Is it a colour?" if "at most three questions" in text else "Blue."
        if question.menu == "[0-9]":
            return f"VERDICT {{n}}: {7 if output in text else 3}"
        first = text.index(output) < max(text.index(PAIR["output_1"]), text.index(PAIR["output_2"]))
        return f"Because.\nVERDICT {{n}}: {'a' if first else 'b'}"
    return Says(decide)


def always(letter):
    """A judge that finds the output in one place better, whatever stands there."""
    return Says(lambda question, text: f"Output ({letter}) came {letter}.\nVERDICT {{n}}: {letter}")


@pytest.mark.parametrize("name", [name for name, strategy in STRATEGIES.items()
                                  if strategy.kind not in FORMS])
def test_every_strategy_finds_what_a_fair_judge_prefers(name):
    strategy = STRATEGIES[name]
    for output, winner in ((PAIR["output_1"], "1"), (PAIR["output_2"], "2")):
        ask = prefers(output)
        row, = Evaluator(ask, strategy).evaluate([PAIR])
        assert row["winners"] == [winner, winner] and row["failures"] == [] and not row["draw"]
    for question in ask.asked:
        text = question.messages[-1]["content"]
        if question.menu:
            assert len(question.messages) == 2 + 2 * strategy.examples
            assert ("What counts, in this order" in text) == strategy.rules
            assert ("Is it a colour?" in text) == ("questions" in strategy.writes)
            assert ("Blue." in text) == ("reference" in strategy.writes)
            assert ("Explain your view" in text) == (strategy.kind == "cot")
    assert len(ask.asked) == len(strategy.writes) + 2


def test_a_judge_that_likes_the_first_place_is_caught():
    row, = Evaluator(always("a"), STRATEGIES["cot"]).evaluate([PAIR])
    assert row["winners"] == ["1", "2"]
    found = judge_metrics([PAIR] * 4, [row] * 4)
    means = [found[name]["mean"] for name in ("accuracy", "agreement", "accuracy_both")]
    assert means == [0.5, 0, 0]
    row, = Evaluator(always("a"), STRATEGIES["balanced"]).evaluate([PAIR])
    assert row["winners"] == ["2", "1"] and row["draw"]


@pytest.mark.parametrize("bias", [0.0, 0.25, 0.5, 1.0])
def test_a_judge_that_likes_the_first_place_is_measured(bias, record_property):
    """With probability `bias` it names the first of two answers, else the better one.

    Over 400 pairs the orders disagree that often, within three standard errors.
    """
    rng, pairs = random.Random(7), []
    for k in range(400):
        outputs = ("good", "poor") if k % 2 == 0 else ("poor", "good")
        pairs.append({"input": "say it", "output_1": outputs[0], "output_2": outputs[1],
                      "label": 1 + k % 2})

    def decide(question, text):
        first = rng.random() < bias or text.index("good") < text.index("poor")
        return f"VERDICT {{n}}: {'a' if first else 'b'}"
    rows = Evaluator(Says(decide), STRATEGIES["rules"]).evaluate(pairs)
    agreement = judge_metrics(pairs, rows)["agreement"]["mean"]
    assert abs(1 - agreement - bias) <= 3 * (bias * (1 - bias) / 400) ** 0.5
    record_property("trials", 400)


def test_swap_shows_both_explanations_with_the_letters_exchanged():
    ask = always("a")
    Evaluator(ask, STRATEGIES["swap_cot"]).evaluate([PAIR])
    assert len(ask.asked) == 4
    straight, crossed = (question.messages[1]["content"] for question in ask.asked[2:])
    for text in (straight, crossed):
        assert ">\nOutput (a) came a.\n</judge for (a)" in text
        assert ">\nOutput (b) came a.\n</judge for (b)" in text
    agreed = prefers(PAIR["output_1"])
    Evaluator(agreed, STRATEGIES["swap_cot"]).evaluate([PAIR])
    assert len(agreed.asked) == 2  # both orders agree: no second stage


def test_equal_scores_are_a_draw_and_unread_ones_no_verdict():
    row, = Evaluator(Says(lambda q, text: "VERDICT {n}: 5"), STRATEGIES["rating"]).evaluate([PAIR])
    assert row["winners"] == ["2", "1"] and row["draw"]
    row, = Evaluator(Says(lambda q, text: "5"), STRATEGIES["rating"]).evaluate([PAIR])
    assert row["winners"] == [None, None] and row["failures"] == ["no verdict"] * 2


FAILED = [Reply("VERDICT {n}: a", "cut at max_tokens"), Reply("", "http 500"),
          Reply("", "no answer in time"), Reply("No.", "refused"), Reply("", "filtered"),
          Reply("VERDICT {n}: a", "prompt cut by the server"),
          Reply("<think>", "cut while thinking")]


@pytest.mark.parametrize("bad", [Reply("I like VERDICT {n}: a but"),
                                 Reply("VERDICT 00000000: a"), *FAILED])
def test_what_holds_no_verdict_is_asked_again_once_and_what_failed_is_not(bad):
    ask = Says(lambda question, text: bad)
    row, = Evaluator(ask, STRATEGIES["rules"]).evaluate([PAIR])
    assert row["winners"] == [None, None] and len(row["failures"]) == 2
    again = [] if bad.failure else [(0.7, 1000)] * 2
    calls = [(how["temperature"], how["sample"]) for how in ask.calls]
    assert calls == [(0.0, 0)] * 2 + again
    found = judge_metrics([PAIR], [row])
    assert found["unparsed"] == 2 and found["unread"]["mean"] == 1
    assert found["accuracy"]["mean"] is None


@pytest.mark.parametrize("reply, shown, cause", [
    (Reply("", "http 500"), "", "http 500"), (Reply("", "filtered"), "", "filtered"),
    (Reply(""), "", "empty"), (Reply("1. Is", "cut at max_tokens"), "1. Is", None),
    (Reply("<think>", "cut while thinking"), "", "cut while thinking")])
def test_a_helper_that_fails_is_empty_and_counted(reply, shown, cause):
    ask = Says(lambda question, text: "VERDICT {n}: a" if question.menu else reply)
    row, = Evaluator(ask, STRATEGIES["metrics"]).evaluate([PAIR])
    assert row["winners"] == ["1", "2"] and row["stages"][0] == shown
    assert row["failures"] == ([f"questions: {cause}"] if cause else [])
    for question in ask.asked[1:]:
        assert fenced(question, "questions") == shown
    counted = judge_metrics([PAIR], [row])
    assert counted["failures"] == ({"questions": 1} if cause else {}) and not counted["unparsed"]


def test_repeats_are_other_samples():
    ask = prefers(PAIR["output_1"])
    row, = evaluate_pairs(Unread(ask, 0.1), [PAIR], STRATEGIES["metrics"], sample=2)
    assert row["winners"] == ["1", "1"]
    assert {how["sample"] for how in ask.calls} == {20}


@pytest.mark.parametrize("name", ["metrics_reference", "swap", "rating", "rules"])
def test_a_judge_that_cannot_be_read_is_asked_about_five_pairs(name):
    """Helpers have not written about the others by then."""
    mute = Says(lambda question, text: "Blue." if not question.menu else Reply("", "empty message"))
    pairs, helpers = [PAIR | {"input": str(k)} for k in range(50)], len(STRATEGIES[name].writes)
    with pytest.raises(JudgeStopped, match="10 of 10 judge replies had no readable verdict"):
        evaluate_pairs(Unread(mute, 0.1), pairs, STRATEGIES[name])
    assert len(mute.asked) == 10 + 5 * helpers
    rows = evaluate_pairs(Unread(mute, 1.0), pairs, STRATEGIES[name])
    assert [row["winners"] for row in rows] == [[None, None]] * 50


def test_the_first_look_is_one_for_all_subsets_and_repeats():
    ask = prefers(PAIR["output_1"])
    verdicts = Unread(ask, 0.1)
    for sample, n in enumerate((3, 0, 8, 1)):
        rows = evaluate_pairs(verdicts, [PAIR] * n, STRATEGIES["rules"], sample=sample)
        assert [row["winners"] for row in rows] == [["1", "1"]] * n
    assert verdicts.asked == 24 and not verdicts.causes


def test_majority_of_several_judges():
    def vote(*winners):
        return [{"winners": list(winners), "draw": False, "stages": [], "failures": []}]
    row, = majority([vote("1", "1"), vote("1", "2"), vote("2", "2")])
    assert row["winners"] == ["1", "2"] and not row["draw"]
    row, = majority([vote("1", None), vote("2", "2"), vote(None, None)])
    assert row == {"winners": ["2", "1"], "draw": True, "failures": [],
                   "stages": [["1", None], ["2", "2"], [None, None]]}
    row, = majority([vote(None, None)] * 3)
    assert row["winners"] == [None, None] and not row["draw"]


def test_soft_labels():
    """The probability where it is known, else the verdict; a mean over both orders."""
    def labels(ask):
        return preference_probabilities(Unread(ask, 1.0).ask, [PAIR])
    assert labels(prefers(PAIR["output_1"])) == [1.0] and labels(always("a")) == [0.5]
    assert labels(Says(lambda question, text: "hm")) == [None]

    def ask(questions, **how):
        first, second = (f"VERDICT {question.nonce}: a" for question in questions)
        return [Reply(first, odds=0), Reply(second, odds=800)]
    assert labels(ask) == [pytest.approx((0.5 + 1 - 1) / 2)]


def test_names():
    assert len(PUBLISHED) == 15 and find_strategy("Vanilla_NoRules") is STRATEGIES["vanilla"]
    both = Strategy(writes=["questions", "reference"], published="Metrics_Reference")
    assert find_strategy("Metrics_Reference") == find_strategy("metrics_reference") == both
    with pytest.raises(ValueError, match="unknown strategy 'chat'. Strategies: vanilla, rules"):
        find_strategy("chat")


# ----- Rules and files -----

def test_rules():
    other = PAIR | {"input": "have a colour , I think"}
    found = {}
    for rule in ("longer", "shorter", "overlap"):
        row, = evaluate_by_rule([other], rule)
        found[rule] = row["winners"]
    assert found == {"longer": ["2", "2"], "shorter": ["1", "1"], "overlap": ["2", "2"]}
    row, = evaluate_by_rule([PAIR | {"output_2": "Red."}], "longer")
    assert row == {"winners": ["2", "1"], "draw": True, "stages": [], "failures": []}
    with pytest.raises(ValueError, match="unknown rule 'best' for two outputs"):
        evaluate_by_rule([PAIR], "best")


@pytest.mark.skipif(not LLMBAR.exists(), reason=f"LLMBar is not at {LLMBAR}")
def test_subsets_are_found_and_counted():
    sizes = {name: len(pairs) for name, pairs in load_pairs(LLMBAR).items()}
    wanted = {"Natural": 100, "Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46}
    assert sizes == wanted and list(sizes) == list(wanted)


def test_subsets_in_the_layout_of_the_repository(tmp_path):
    pair = {"input": "i", "output_1": "a", "output_2": "b", "label": 2}
    for name in ("LLMBar/Adversarial/Manual", "LLMBar/Mine", "LLMBar/Natural"):
        (tmp_path / "Dataset" / name).mkdir(parents=True)
        (tmp_path / "Dataset" / name / "dataset.json").write_text(json.dumps([pair]))
    assert load_pairs(tmp_path) == {"Natural": [pair], "Manual": [pair], "Mine": [pair]}
    known = [pair | {"source_1": "m", "source_2": "people", "more": 1}, pair]
    (tmp_path / "known.json").write_text(json.dumps(known))
    assert load_pairs(tmp_path / "known.json") == {
        "known": [pair | {"source_1": "m", "source_2": "people"}, pair]}
    (tmp_path / "Manual").mkdir()
    (tmp_path / "Manual/dataset.json").write_text(json.dumps([pair]))
    with pytest.raises(ValueError, match="subset 'Manual' is there twice. Rename one"):
        load_pairs(tmp_path)


def test_files_that_hold_no_pairs(tmp_path):
    pair, file = {"input": "i", "output_1": "a", "output_2": "b", "label": 2}, tmp_path / "a.json"
    with pytest.raises(ValueError, match="no pairs at .*. Give LLMBar's folder"):
        load_pairs(tmp_path)
    wrong = [pair | {"label": label} for label in (3, True, 1.0, "1", None)]
    for record in (*wrong, pair | {"input": 7}, pair | {"source_2": 7}, {"label": 1}, [], None):
        file.write_text(json.dumps([pair, record]))
        with pytest.raises(ValueError, match=r"a.json, record 1 is .* label 1 or 2"):
            load_pairs(file)
    for records in ([], {}, "x"):
        file.write_text(json.dumps(records))
        with pytest.raises(ValueError, match="a.json holds no list. Expected a JSON list of"):
            load_pairs(file)
