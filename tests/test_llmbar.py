"""Meta-evaluation: published statistics to the digit, stored completions read again, strategies replayed over HTTP, biases by hand."""

import json
from pathlib import Path

import pytest
from chatserver import ChatServer, completion

from data import load_pairs
from eval import cohen_kappa, judge_metrics, length_bias, llmbar_statistics, main, retest_agreement, self_preference, summarize_judge
from judge import PUBLISHED, STRATEGIES, Reply, Strategy, evaluate_by_rule, evaluate_pairs, find_strategy, majority, published_verdict

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "llmbar"
FOLDERS = sorted(path.parent for path in SHARED.glob("results/*/statistics.json"))
stored = pytest.mark.skipif(not FOLDERS, reason="LLMBar's stored results are not beside the repository (../shared/data/llmbar)")


def read(folder):
    """(subset, model, strategy by LLMBar's name, instances with results, statistics) of a folder such as Natural__GPT-4_CoT."""
    subset, _, rest = folder.name.partition("__")
    model, _, strategy = rest.partition("_")
    return subset, model, strategy, json.loads((folder / "result.json").read_text()), json.loads((folder / "statistics.json").read_text())


def kind_of(model, strategy):
    """The rule by which a folder's completions were read; PaLM2's explanations were read as short verdicts."""
    if strategy.startswith("Rating"):
        return "score"
    return "cot" if find_strategy(strategy).think and model != "PaLM2" else "verdict"


def winner(said, swapped):
    return said and {"a": "12", "b": "21"}[said][swapped]


def same_statistics(found, published):
    assert {k: v for k, v in found.items() if isinstance(v, str)} == {k: v for k, v in published.items() if isinstance(v, str)}
    for name, value in published.items():
        if not isinstance(value, str):
            assert found[name] == pytest.approx(value, abs=1e-12)
    assert found.keys() == published.keys()


# ---------------------------------------------------------------------------------------------------------------------
# Parity with what is published


@stored
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_published_statistics_to_the_digit(folder):
    *_, rows, published = read(folder)
    last = [row["results"][-1] for row in rows]
    winners = [[stage[f"swap = {swapped}"]["winner"] for swapped in (False, True)] for stage in last]
    same_statistics(llmbar_statistics([row["label"] for row in rows], winners), published)
    # the control: one winner changed is seen
    winners[0][0] = {"1": "2", "2": "1", None: "1"}[winners[0][0]]
    assert llmbar_statistics([row["label"] for row in rows], winners) != published


@stored
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_stored_completions_are_read_as_they_were(folder):
    _, model, strategy, rows, _ = read(folder)
    kind, texts = kind_of(model, strategy), 0
    for row in rows:
        for number, stage in enumerate(row["results"]):
            if isinstance(stage, list):
                continue
            if kind == "score":
                scores = [published_verdict(stage[name][0], kind) for name in ("score_1", "score_2")]
                one, two = (int(score) if score is not None else 0 for score in scores) if None not in scores else (0, 0)
                assert ["1" if one > two else "2", "2" if two > one else "1"] == [stage[f"swap = {s}"]["winner"] for s in (False, True)]
                texts += 2
                continue
            rule = "verdict" if strategy == "Swap" and number else kind
            for swapped in (False, True):
                case = stage[f"swap = {swapped}"]
                assert winner(published_verdict(case["completion"][0], rule), swapped) == case["winner"], case["completion"][0]
                texts += 1
    assert texts >= 2 * len(rows)


class Replay:
    """Finds the stored completion for a request by what its prompt shows: which instance, which order, which stage."""

    def __init__(self, rows, strategy):
        self.rows, self.strategy, self.counts = rows, find_strategy(strategy), []

    def __call__(self, request, number):
        text = request["messages"][-1]["content"]
        system = request["messages"][0]["content"]
        shown = [row for row in self.rows if f">\n{row['input']}\n</instruction" in text]
        if system.startswith("You are a helpful"):                  # a helper's stage: it sees the instruction alone
            stage = shown[0]["results"][1 if "Carry out the instruction" in text and self.strategy.questions else 0]
            return self.reply("helper", stage)
        shown = [row for row in shown if any(f">\n{row[name]}\n</" in text for name in ("output_1", "output_2"))]
        if self.strategy.score:
            name = next(name for row in shown for name in ("output_1", "output_2") if f"\n{row[name]}\n</output " in text)
            row = next(row for row in shown if f"\n{row[name]}\n</output " in text)
            return self.reply("score", row["results"][-1][f"score_{name[-1]}"])
        row = next(row for row in shown if all(f">\n{row[name]}\n</Output (" in text for name in ("output_1", "output_2")))
        swapped = f">\n{row['output_2']}\n</Output (a)" in text
        late = "Two judges disagree" in text
        for helper in row["results"]:                               # what earlier stages said is handed on unaltered
            assert not isinstance(helper, list) or f">\n{helper[0]}\n</" in text
        if late:
            self.views(row, swapped, text)
        stage = row["results"][1] if late else next(stage for stage in row["results"] if isinstance(stage, dict))
        return self.reply("late" if late else "compare", stage[f"swap = {swapped}"]["completion"])

    def views(self, row, swapped, text):
        """The explanations stand under the letters that the stored prompts of the second stage gave them."""
        prompt = row["results"][1][f"swap = {swapped}"]["prompt"]
        first, second = (prompt.split(f"who thinks Output ({letter}) is better:\n")[1] for letter in "ab")
        assert f">\n{first.split(chr(10) + '## Evaluation given')[0].strip()}\n</judge for (a)" in text
        assert f">\n{second.split(chr(10) * 2 + '# Decision')[0].strip()}\n</judge for (b)" in text

    def reply(self, name, stage):
        self.counts.append(name)
        return {"body": completion(stage[0], stage[1] or "stop")}


@stored
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_strategies_replayed_over_http_give_the_published_statistics(folder, tmp_path, capsys):
    subset, model, strategy, rows, published = read(folder)
    (tmp_path / "set.json").write_text(json.dumps([{k: row[k] for k in ("input", "output_1", "output_2", "label")} for row in rows]))
    replay = Replay(rows, strategy)
    argv = ["--benchmark", "llmbar", "--data", str(tmp_path / "set.json"), "--judge", "http", "--judge-model", model, "--strategy", strategy,
            "--verdict-rule", "llmbar_verdict" if kind_of(model, strategy) == "verdict" and find_strategy(strategy).think else "llmbar",
            "--judge-workers", "16", "--out", str(tmp_path / "out")]
    with ChatServer(replay) as server:
        main([*argv, "--judge-url", server.url])
        asked = len(server.requests)
        main([*argv, "--judge-url", server.url])                    # everything is on file: nothing is asked again
        assert len(server.requests) == asked
    found = json.loads((tmp_path / "out/metrics.json").read_text())["evaluators"][strategy]["set"]
    same_statistics(found["llmbar_compat"], published)
    assert f"{100 * found['accuracy']['mean']!r}"[:12] == published["correct_average"].rstrip("%")[:12]
    late = sum(len(row["results"]) == 2 for row in rows) if find_strategy(strategy).swap else 0
    assert replay.counts.count("late") <= 2 * late and (late == 0) == (replay.counts.count("late") == 0)
    report = (tmp_path / "out/report.md").read_text()
    assert "kappa of orders" in report and (tmp_path / "out/plots/judge.png").stat().st_size > 5000
    assert "answered" in capsys.readouterr().out


@stored
def test_subsets_are_found_and_counted():
    sizes = {name: len(pairs) for name, pairs in load_pairs(SHARED).items()}
    assert sizes == {"Natural": 100, "Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46}


def test_subsets_in_the_layout_of_the_repository(tmp_path):
    for name in ("LLMBar/Natural", "LLMBar/Adversarial/Manual"):
        (tmp_path / "Dataset" / name).mkdir(parents=True)
        (tmp_path / "Dataset" / name / "dataset.json").write_text(json.dumps([{"input": "i", "output_1": "a", "output_2": "b", "label": 2}]))
    assert list(load_pairs(tmp_path)) == ["Natural", "Manual"]
    (tmp_path / "bad.json").write_text(json.dumps([{"input": "i", "output_1": "a", "output_2": "b", "label": 3}]))
    for label in (3, True, 1.0, "1", None):
        (tmp_path / "bad.json").write_text(json.dumps([{"input": "i", "output_1": "a", "output_2": "b", "label": label}]))
        with pytest.raises(ValueError, match=r"bad.json, record 0 .* label 1 or 2"):
            load_pairs(tmp_path / "bad.json")


def test_the_average_is_over_the_published_sets():
    rows = {"right": [{"winners": ["1", "1"], "draw": False, "failures": []}], "wrong": [{"winners": ["2", "2"], "draw": False, "failures": []}]}
    names = ["Natural", "Neighbor", "GPTInst", "GPTOut", "Manual"]

    def average(names):
        judged = {name: [rows["wrong" if name == "Mine" else "right"]] for name in names}
        return summarize_judge({name: [PAIR] for name in names}, judged)["Average"]["accuracy"]["mean"]
    assert average(names) == average([*names, "Mine"]) == 1 and average([*names[:4], "Mine"]) == 0.8


def test_an_endless_thought_is_no_verdict_under_the_published_rules():
    for failure, said in (("cut while thinking", None), ("cut at max_tokens", "1")):
        judge = Scripted(lambda question: Reply("<think>\nOutput (a)", failure))
        row, = evaluate_pairs(judge, [PAIR], STRATEGIES["rules"], parse="llmbar")
        assert row["winners"][0] == said and row["failures"] == ([failure] * 2 if said is None else [])


# ---------------------------------------------------------------------------------------------------------------------
# Strategies with a scripted judge


PAIR = {"input": "Name a colour.", "output_1": "Red.", "output_2": "A colour is a very nice thing to have, I think.", "label": 1}


class Scripted:
    """A backend that answers by a function of the question; keeps what it was asked."""

    def __init__(self, say):
        self.say, self.asked = say, []

    def __call__(self, questions, *, temperature=0.0, sample=0, progress=None):
        self.asked += [(question, temperature, sample) for question in questions]
        return [self.say(question) if isinstance(self.say(question), Reply) else Reply(self.say(question)) for question in questions]


def user(question):
    return question.messages[1]["content"]


def prefers(text, *, why="Because."):
    """A judge that finds `text` better wherever it stands, and writes helpers' texts."""
    def say(question):
        if not question.menu:
            return "1. Is it a colour?" if "at most three questions" in user(question) else "Blue."
        shown = user(question)
        if question.menu == "[0-9]":
            return f"VERDICT {question.nonce}: {7 if text in shown else 3}"
        first = shown.index(text) < max(shown.index(PAIR["output_1"]), shown.index(PAIR["output_2"]))
        if "10|" in question.menu:
            return f"{why}\nVERDICT {question.nonce}: {'8 4' if first else '4 8'}"
        return f"{why}\nVERDICT {question.nonce}: {'a' if first else 'b'}"
    return Scripted(say)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_finds_what_a_fair_judge_prefers(name):
    for text, expected in ((PAIR["output_1"], "1"), (PAIR["output_2"], "2")):
        judge = prefers(text)
        row, = evaluate_pairs(judge, [PAIR], STRATEGIES[name])
        assert row["winners"] == [expected, expected] and row["failures"] == [] and not row["draw"]
    strategy, prompts = STRATEGIES[name], [user(question) for question, *_ in judge.asked]
    final = [question for question, *_ in judge.asked if question.menu]
    assert all(("What counts, in this order" in user(question)) == strategy.rules for question in final)
    assert all(("Is it a colour?" in user(question)) == strategy.questions and ("Blue." in user(question)) == strategy.reference for question in final)
    assert all(("Explain your view" in user(question)) == strategy.think for question in final)
    assert len(prompts) == strategy.questions + strategy.reference + 2 * strategy.samples
    assert {sample for question, _, sample in judge.asked if question.menu} == set(range(strategy.samples))


def always(letter):
    return Scripted(lambda question: f"Output ({letter}) came {letter}.\nVERDICT {question.nonce}: {letter}" if question.menu else "help")


def test_a_judge_that_likes_the_first_place_is_caught():
    row, = evaluate_pairs(always("a"), [PAIR], STRATEGIES["cot"])
    assert row["winners"] == ["1", "2"]
    found = judge_metrics([PAIR] * 4, [row] * 4)
    assert found["accuracy"]["mean"] == 0.5 and found["agreement"]["mean"] == 0 and found["accuracy_both"]["mean"] == 0
    row, = evaluate_pairs(always("a"), [PAIR], STRATEGIES["balanced"])
    assert row["winners"] == ["2", "1"] and row["draw"]


def test_swap_shows_both_explanations_with_the_letters_exchanged():
    judge = always("a")
    evaluate_pairs(judge, [PAIR], STRATEGIES["swap_cot"])
    straight, crossed = (user(question) for question, *_ in judge.asked[2:])
    assert ">\nOutput (a) came a.\n</judge for (a)" in straight and ">\nOutput (b) came a.\n</judge for (b)" in straight
    assert ">\nOutput (a) came a.\n</judge for (a)" in crossed and ">\nOutput (b) came a.\n</judge for (b)" in crossed
    assert len(judge.asked) == 4
    agreed = prefers(PAIR["output_1"])
    evaluate_pairs(agreed, [PAIR], STRATEGIES["swap_cot"])
    assert len(agreed.asked) == 2                                   # both orders agree: no second stage


def test_faireval_averages_over_samples_and_orders():
    says = iter(["9 1", "4 6", "2 8", "5 5", "10 1", "7 2"])        # (first, swapped) of three samples
    judge = Scripted(lambda question: None)
    judge.__class__ = type("Drawn", (Scripted,), {"__call__": lambda self, questions, **how: [Reply(f"VERDICT {q.nonce}: {next(says)}") for q in questions]})
    row, = evaluate_pairs(judge, [PAIR], STRATEGIES["faireval"])
    assert row["scores"] == [[9, 6, 2, 5, 10, 2], [1, 4, 8, 5, 1, 7]] and row["winners"] == ["1", "1"]


def test_equal_scores_are_a_draw_and_unread_ones_no_verdict():
    row, = evaluate_pairs(Scripted(lambda q: f"VERDICT {q.nonce}: 5"), [PAIR], STRATEGIES["rating"])
    assert row["winners"] == ["2", "1"] and row["draw"]
    row, = evaluate_pairs(Scripted(lambda q: "5"), [PAIR], STRATEGIES["rating"])
    assert row["winners"] == [None, None] and row["failures"] == ["no verdict"] * 2


FAILED = [Reply("VERDICT {n}: a", "cut at max_tokens"), Reply("", "http 500"), Reply("", "no answer in time"), Reply("No.", "refused"), Reply("", "filtered"),
          Reply("VERDICT {n}: a", "prompt cut by the server"), Reply("<think>", "cut while thinking")]


@pytest.mark.parametrize("bad", [Reply("I like VERDICT {n}: a but"), Reply("VERDICT 00000000: a"), *FAILED])
def test_what_holds_no_verdict_is_asked_again_once_and_what_failed_is_not(bad):
    judge = Scripted(lambda question: Reply(bad.text.replace("{n}", question.nonce), bad.failure))
    row, = evaluate_pairs(judge, [PAIR], STRATEGIES["rules"])
    assert row["winners"] == [None, None] and len(row["failures"]) == 2
    assert [(temperature, sample) for _, temperature, sample in judge.asked] == [(0.0, 0)] * 2 + [(0.7, 1000)] * (0 if bad.failure else 2)
    assert judge_metrics([PAIR], [row])["unparsed"] == 2 and judge_metrics([PAIR], [row])["accuracy"]["mean"] == 0


def test_a_helper_that_fails_is_not_made_up():
    judge = Scripted(lambda q: Reply("", "http 500") if not q.menu else f"VERDICT {q.nonce}: a")
    row, = evaluate_pairs(judge, [PAIR], STRATEGIES["metrics"])
    assert row["winners"] == [None, None] and row["failures"] == ["questions: http 500"] and len(judge.asked) == 1


def test_majority_of_several_judges():
    def vote(*winners):
        return [{"winners": list(winners), "draw": False, "stages": [], "failures": []}]
    assert majority([vote("1", "1"), vote("1", "2"), vote("2", "2")])[0]["winners"] == ["1", "2"]
    assert majority([vote("1", None), vote("2", "2"), vote(None, None)])[0] == {
        "winners": ["2", "2"], "draw": True, "stages": [["1", None], ["2", "2"], [None, None]], "failures": []}
    assert majority([vote(None, None)] * 3)[0]["winners"] == [None, None]


def test_names():
    assert all(PUBLISHED[name] in STRATEGIES for name in PUBLISHED) and find_strategy("Metrics_Reference") == Strategy(questions=True, reference=True)
    with pytest.raises(ValueError, match="unknown strategy 'chat'. Strategies: vanilla, rules"):
        find_strategy("chat")


# ---------------------------------------------------------------------------------------------------------------------
# Figures by hand


def test_kappa_by_hand():
    assert cohen_kappa([1, 1, 2, 2], [1, 1, 2, 2]) == 1 and cohen_kappa([1, 2, 1, 2], [1, 1, 2, 2]) == 0
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed 0.7, expected 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    first, second = [1] * 25 + [0] * 25, [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa([1, 1], [1, 1]) is None and cohen_kappa([], []) is None


def test_the_published_kappa_is_not_the_right_one():
    labels, winners = [1, 2] * 10, [["1", "1"], ["2", "2"]] * 10
    assert llmbar_statistics(labels, winners)["kappa_average"] == pytest.approx(1 / 3)
    found = judge_metrics([{**PAIR, "label": label} for label in labels], [{"winners": pair, "draw": False, "failures": []} for pair in winners])
    assert found["kappa"] == 1 and found["llmbar_compat"]["kappa_average"] == pytest.approx(1 / 3)


def test_length_bias_by_hand():
    long, short = "x" * 100, "x" * 50
    pairs = [{"input": "i", "output_1": long, "output_2": short, "label": label} for label in (1, 2, 2, 2)]
    pairs.append({"input": "i", "output_1": "abc", "output_2": "abcd", "label": 1})          # too near to count
    found = length_bias(pairs, [["1", "1"], ["1", "2"], ["2", None], ["1", "1"], ["2", "2"]])
    assert found == {"verdicts": 7, "longer_wins": 5 / 7, "longer_is_right": 2 / 7, "accuracy_longer_right": 1.0, "accuracy_shorter_right": 2 / 5}
    rows = evaluate_by_rule(pairs, "longer")
    assert length_bias(pairs, [row["winners"] for row in rows])["longer_wins"] == 1.0


def test_self_preference_by_hand():
    pairs = [{**PAIR, "label": 2, "source_1": "acme-7b", "source_2": "other"}, {**PAIR, "label": 1, "source_1": "other", "source_2": "ACME-13b"},
             {**PAIR, "label": 1, "source_1": "acme-7b", "source_2": "acme-13b"}]
    found = self_preference(pairs, [["1", "1"], ["1", "2"], ["1", "1"]], "acme")
    assert found == {"own": "acme", "verdicts": 4, "judge": 0.75, "people": 0.0, "difference": 0.75}
    assert self_preference([PAIR], [["1", "1"]], "acme") is None


def test_retest_by_hand():
    def rows(*winners):
        return [{"winners": list(pair)} for pair in winners]
    found = retest_agreement([rows("11", "12"), rows("11", "11"), rows("12", "12")])
    assert found["mean"] == pytest.approx((4 / 6 + 4 / 6) / 2) and retest_agreement([rows("11")]) is None
    assert retest_agreement([rows((None, "1")), rows((None, "1"))])["mean"] == 0.5          # an unread verdict agrees with nothing


def test_retest_asks_anew_and_reports(tmp_path, capsys):
    (tmp_path / "pairs.json").write_text(json.dumps([PAIR, {**PAIR, "input": "Another.", "label": 2}]))
    with ChatServer(lambda request, number: {"body": completion(f"VERDICT {nonce(request)}: {'ab'[number % 2]}")}) as server:
        main(["--benchmark", "llmbar", "--data", str(tmp_path / "pairs.json"), "--judge", "http", "--judge-url", server.url, "--judge-model", "m",
              "--repeats", "3", "--judge-workers", "1", "--out", str(tmp_path / "out"), "--strategy", "rules", "vanilla", "cot"])
        assert len(server.requests) == 3 * 3 * 4
    found = json.loads((tmp_path / "out/metrics.json").read_text())["evaluators"]
    assert list(found) == ["rules", "vanilla", "cot", "majority"] and found["rules"]["pairs"]["retest"]["n"] == 2


def nonce(request):
    return request["messages"][-1]["content"].split("VERDICT ")[-1][:8]


def test_mistakes_get_one_sentence(tmp_path, capsys):
    def said(*argv):
        with pytest.raises(SystemExit) as stop:
            main(["--out", str(tmp_path / "out"), *argv])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and not (tmp_path / "out").exists()
        return error
    assert "needs --data DIR" in said("--benchmark", "llmbar")
    (tmp_path / "pairs.json").write_text(json.dumps([PAIR]))
    data = ("--benchmark", "llmbar", "--data", str(tmp_path / "pairs.json"))
    assert "unknown rule 'rules'" in said(*data, "--strategy", "rules")
    assert "unknown strategy 'x'" in said(*data, "--judge", "http", "--judge-model", "m", "--strategy", "x")
    assert "--judge-model" in said(*data, "--judge", "http")
    assert "--judge-url is for a judge behind HTTP" in said(*data, "--judge-url", "http://127.0.0.1:1")
    assert "--judge self judges only --benchmark" in said("--judge", "self")
    http = ("--judge", "http", "--judge-model", "m")
    assert "cannot read scores side by side" in said(*data, *http, "--verdict-rule", "llmbar", "--strategy", "vanilla", "faireval")
    assert "--max-unparsed stops no --benchmark or --paraphrase" in said(*data, *http, "--max-unparsed", "0.5")
    assert "--max-unparsed stops no --benchmark or --paraphrase" in said("--paraphrase", "2", "--judge-model", "m", "--max-unparsed", "0.5")
    assert "no pairs at" in said("--benchmark", "llmbar", "--data", str(tmp_path / "empty" if (tmp_path / "empty").mkdir() is None else ""))
