"""Parity with LLMBar: published statistics, stored completions, strategies replayed over HTTP."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from chatserver import ChatServer, Says, completion, make_client
from published import (
    llmbar_statistics,
    published_question,
    published_reply,
    published_verdict,
    published_winners,
)

from extras.judges.meta import judge_metrics
from extras.judges.pairs import DRAW, STRATEGIES, Evaluator, find_strategy
from extras.judges.questions import Reply

LLMBAR = Path(__file__).parents[4] / "shared" / "data" / "llmbar"
FOLDERS = sorted(path.parent for path in LLMBAR.glob("results/*/statistics.json"))
SWAPS = ("swap = False", "swap = True")
if not FOLDERS:
    FOLDERS = [pytest.param(None, marks=pytest.mark.skip(f"LLMBar's results are not at {LLMBAR}"))]
each_folder = pytest.mark.parametrize(
    "folder", FOLDERS, ids=lambda folder: getattr(folder, "name", "none"))


def read(folder):
    """(model, strategy by LLMBar's name, instances with results, statistics) of a folder.

    Its name is such as Natural__GPT-4_CoT.
    """
    model, _, strategy = folder.name.partition("__")[2].partition("_")
    rows = json.loads((folder / "result.json").read_text())
    return model, strategy, rows, json.loads((folder / "statistics.json").read_text())


def kind_of(model, strategy):
    """The rule by which completions were read; PaLM2's explanations were read as short verdicts."""
    if strategy.startswith("Rating"):
        return "score"
    return "cot" if find_strategy(strategy).kind == "cot" and model != "PaLM2" else "verdict"


def same_statistics(found, published):
    assert found.keys() == published.keys()
    for name, value in published.items():
        if isinstance(value, str):
            assert found[name] == value
        else:
            assert found[name] == pytest.approx(value, abs=1e-12)


@each_folder
def test_published_statistics_to_the_digit(folder):
    *_, rows, published = read(folder)
    labels = [row["label"] for row in rows]
    winners = [[row["results"][-1][swap]["winner"] for swap in SWAPS] for row in rows]
    same_statistics(llmbar_statistics(labels, winners), published)
    # The control: one winner changed is seen.
    winners[0][0] = {"1": "2", "2": "1", None: "1"}[winners[0][0]]
    assert llmbar_statistics(labels, winners) != published


@each_folder
def test_stored_completions_are_read_as_they_were(folder):
    model, strategy, rows, _ = read(folder)
    kind, texts = kind_of(model, strategy), 0
    for row in rows:
        stages = [stage for stage in row["results"] if isinstance(stage, dict)]
        for number, stage in enumerate(stages):
            texts += 2
            if kind == "score":
                said = [published_verdict(stage[name][0], kind) for name in ("score_1", "score_2")]
                one, two = (0, 0) if None in said else map(int, said)
                winners = ["1" if one > two else "2", "2" if two > one else "1"]
                if None in said:
                    winners = ["1", "2"]
            else:
                rule = "verdict" if strategy == "Swap" and number else kind
                said = [published_verdict(stage[swap]["completion"][0], rule) for swap in SWAPS]
                winners = [{"a": "1", "b": "2"}.get(said[0]), {"a": "2", "b": "1"}.get(said[1])]
            assert winners == [stage[swap]["winner"] for swap in SWAPS]
    assert texts >= 2 * len(rows)


class Replay:
    """Finds the stored completion for a request by what its prompt shows."""

    def __init__(self, rows, strategy):
        self.rows, self.strategy, self.counts = rows, find_strategy(strategy), []

    def __call__(self, request, number):
        system, text = (message["content"] for message in request["messages"])
        rows = [row for row in self.rows if f">\n{row['input']}\n</instruction" in text]
        if system.startswith("You are a helpful"):  # a helper's stage sees the instruction alone
            second = "Carry out the instruction" in text and "questions" in self.strategy.writes
            return self.reply("helper", rows[0]["results"][1 if second else 0])
        outputs = ("output_1", "output_2")
        if self.strategy.kind == "score":
            for row in rows:
                for name in outputs:
                    if f"\n{row[name]}\n</output " in text:
                        return self.reply("score", row["results"][-1][f"score_{name[-1]}"])
        row = next(row for row in rows
                   if all(f">\n{row[name]}\n</Output (" in text for name in outputs))
        swapped = f">\n{row['output_2']}\n</Output (a)" in text
        for helper in row["results"]:  # what earlier stages said is handed on unaltered
            assert not isinstance(helper, list) or f">\n{helper[0]}\n</" in text
        stages = [stage for stage in row["results"] if isinstance(stage, dict)]
        late = "Two judges disagree" in text
        if late:
            self.check_views(stages[1][SWAPS[swapped]]["prompt"], text)
        return self.reply("late" if late else "compare", stages[late][SWAPS[swapped]]["completion"])

    def check_views(self, prompt, text):
        """The explanations stand under the letters that the stored prompt gave them."""
        first, second = (prompt.split(f"who thinks Output ({letter}) is better:\n")[1]
                         for letter in "ab")
        first, second = first.split("\n## Evaluation given")[0], second.split("\n\n# Decision")[0]
        assert f">\n{first.strip()}\n</judge for (a)" in text
        assert f">\n{second.strip()}\n</judge for (b)" in text

    def reply(self, name, stage):
        self.counts.append(name)
        return {"body": completion(stage[0], stage[1] or "stop")}


def replayed(rows, model, strategy, cache):
    """(our rows for LLMBar's rows, replayed over HTTP, the Replay); each is asked for once."""
    kind, replay = kind_of(model, strategy), Replay(rows, strategy)

    def make(task, parts, asked, **menu):
        question = published_question(task, parts, asked, **menu)
        if asked == "cot" and kind == "verdict":  # PaLM2's explanations
            return replace(question, menu="verdict")
        return question
    with ChatServer(replay) as server:
        for _ in range(2):  # the second time all is on file, and only empty answers asked again
            client = make_client(server, cache, judge_workers=16)
            found = Evaluator(client.ask, find_strategy(strategy), reask=0, make=make,
                              read=published_reply).evaluate(rows)
        usage = client.usage()
        assert usage["requests"] == 2 * usage["failures"].get("empty message", 0)
        assert len(server.requests) == len(replay.counts)
    for row in found:
        row["winners"] = published_winners(row, kind)
    return found, replay


@each_folder
def test_strategies_replayed_over_http_give_the_published_statistics(folder, tmp_path):
    model, strategy, rows, published = read(folder)
    found, replay = replayed(rows, model, strategy, tmp_path / "judge.jsonl")
    winners, labels = [row["winners"] for row in found], [row["label"] for row in rows]
    same_statistics(llmbar_statistics(labels, winners), published)
    if not any(None in both for both in winners):  # ours leave out what could not be read
        accuracy = judge_metrics(rows, found)["accuracy"]["mean"]
        assert f"{100 * accuracy!r}"[:12] == published["correct_average"].rstrip("%")[:12]
    late = sum(len(row["results"]) == 2 for row in rows) if find_strategy(strategy).disagree else 0
    assert replay.counts.count("late") <= 2 * late
    assert (late == 0) == (replay.counts.count("late") == 0)


def rows_of_scores(dice, n):
    """LLMBar's rows of a rating strategy with helpers, some of whose texts are empty or filtered.

    The winners are those that its code gives to such completions.
    """
    rows = []
    for k in range(n):
        said = [dice.choice(["7", " 3 ", "+4", "9\n", "", "7.5", "Score: 8", "seven", "7/10"])
                for _ in range(2)]
        winners = ["1", "2"]
        if all(text.strip().lstrip("+").isdigit() for text in said):
            one, two = map(int, said)
            winners = ["1" if one > two else "2", "2" if two > one else "1"]
        last = {f"score_{i + 1}": [text, "stop"] for i, text in enumerate(said)}
        last |= {swap: {"winner": winner} for swap, winner in zip(SWAPS, winners, strict=True)}
        helper = dice.choice([["1. Is it?", "stop"], ["", "stop"], ["", "content_filter"],
                              ["1. Is", "length"], ["1. I", "content_filter"]])
        rows.append({"input": f"Do {k}.", "output_1": f"one {k}", "output_2": f"two {k}",
                     "label": dice.randint(1, 2), "results": [helper, last]})
    return rows


def test_scores_and_helpers_that_are_nothing_are_coded_as_llmbar_does(tmp_path):
    """No row is dropped: an empty helper's text is handed on, a score that is none is 1 and 2."""
    rows = rows_of_scores(random.Random(), 120)
    found, _ = replayed(rows, "GPT-4", "Rating_Metrics", tmp_path / "judge.jsonl")
    stored = [[row["results"][-1][swap]["winner"] for swap in SWAPS] for row in rows]
    assert [row["winners"] for row in found] == stored
    # The controls: there are such rows, and coded as draws they would be others.
    broken = [row for row in found if "no verdict" in row["failures"]]
    assert broken and all(row["winners"] == ["1", "2"] != list(DRAW) for row in broken)
    assert any(row["failures"] == ["questions: empty message"] for row in found)
    assert any("questions: filtered" in row["failures"] for row in found)


@pytest.mark.parametrize("helper", [["", "stop"], ["", "content_filter"], ["In part", "length"]])
def test_an_empty_reference_does_not_drop_a_pair(helper, tmp_path):
    rows = []
    for k in range(6):
        stage = {swap: {"completion": [f"Output ({letter})", "stop"], "winner": "1"}
                 for swap, letter in zip(SWAPS, "ab", strict=True)}
        rows.append({"input": f"Do {k}.", "output_1": f"one {k}", "output_2": f"two {k}",
                     "label": 1, "results": [helper, stage]})
    found, replay = replayed(rows, "GPT-4", "Reference", tmp_path / "judge.jsonl")
    assert [row["winners"] for row in found] == [["1", "1"]] * 6
    assert replay.counts.count("compare") == 12


def test_an_endless_thought_is_no_verdict_under_the_published_rules():
    pair = {"input": "Name a colour.", "output_1": "Red.", "output_2": "Why?"}
    for failure, winner in (("cut while thinking", None), ("cut at max_tokens", "1")):
        ask = Says(lambda question, text, failure=failure: Reply("<think>\nOutput (a)", failure))
        row, = Evaluator(ask, STRATEGIES["rules"], reask=0, make=published_question,
                         read=published_reply).evaluate([pair])
        assert row["winners"][0] == winner
        assert row["failures"] == ([] if winner else [failure] * 2)


def test_the_published_kappa_is_not_the_right_one():
    labels, winners = [1, 2] * 10, [["1", "1"], ["2", "2"]] * 10
    assert llmbar_statistics(labels, winners)["kappa_average"] == pytest.approx(1 / 3)
    pairs = [{"output_1": "a", "output_2": "b", "label": label} for label in labels]
    rows = [{"winners": pair, "draw": False, "failures": []} for pair in winners]
    assert judge_metrics(pairs, rows)["kappa"] == 1
