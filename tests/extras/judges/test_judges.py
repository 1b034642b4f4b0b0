"""Judges and critics in words, canaries, confusion; how a run asks them."""

import json
from types import SimpleNamespace

import pytest
from chatserver import ChatServer, Says, completion, fenced, item

from extras import judges
from extras.judges.client import RUN, ServerFlags
from extras.judges.judges import (
    FAILED,
    HttpCritic,
    HttpJudge,
    canary_items,
    confusion,
    wrong_items,
)
from extras.judges.meta import wilson
from extras.judges.questions import TEXTS, JudgeStopped, Reply
from judge import JudgeConfig, LocalJudge, RuleJudge, Verdict, combine_reward

# ----- Rewards and agreement -----

TRUTH = {"red!": (1, 1), "blue": (1, 0), "on monday": (0, 0), "reddish": (1, None),
         "loud": (None, 1)}


def by_truth(question, text):
    """A judge that answers by TRUTH: of the expected type, correct; None is no verdict."""
    answer = TRUTH[fenced(question)]["correct" in question.choices]
    if answer is None:
        return "who knows"
    return f"VERDICT {{n}}: {question.choices[not answer]}"


def test_rewards_by_two_questions():
    ask = Says(by_truth)
    found = HttpJudge(ask).judge([item(text) for text in ("red", *TRUTH, "...", "  ")])
    assert [(v.reward, v.how) for v in found] == [
        (2, "exact"), (2, "judged"), (1, "judged"), (0, "judged"), (1, "unparsed"),
        (None, "unparsed"), (0, "wordless"), (0, "empty")]
    assert all(fenced(q) != "..." for q in ask.asked), "nothing without a letter is asked about"
    prompts = [q.messages[1]["content"] for q in ask.asked if "correct" in q.choices]
    for text in prompts:
        assert "says the same as the reference" in text and "\nred\n</reference" in text


def test_a_hidden_target_is_not_shown():
    ask = Says(by_truth)
    judge = HttpJudge(ask, JudgeConfig(show_target=False, steps="one"))
    assert [v.reward for v in judge.judge([item("red!"), item("blue")])] == [2, 0]
    assert all("reference" not in q.messages[1]["content"] for q in ask.asked)


def test_marks_are_asked_about_where_a_target_has_no_word():
    ask = Says(lambda question, text: f"VERDICT {{n}}: {question.choices[0]}")
    verdict, = HttpJudge(ask).judge([item("?", target="!")])
    assert (verdict.reward, verdict.how) == (2, "judged")


def alpha_first(question, text):
    """A judge that says "same" where alpha stands before beta."""
    same = text.index("alpha") < text.index("beta")
    return "VERDICT {n}: " + ("same" if same else "contradicted")


def test_similarity_keeps_orders_apart():
    ask = Says(alpha_first)
    judge = HttpJudge(ask)
    pairs = [({}, "alpha", "beta"), ({}, "beta", "alpha"),
             ({"instruction": "i", "input": "x"}, "alpha", "beta")]
    assert judge.similar_pairs(pairs) == [True, False, True]
    assert "<input " in ask.asked[-1].messages[1]["content"]
    ask = Says(lambda question, text: "VERDICT {n}: same" if "<input " in text else "hm")
    assert HttpJudge(ask, max_unparsed=1).similar_pairs(pairs) == [None, None, True]


@pytest.mark.parametrize("rule, cr, asked", [("and", 1 / 3, 2), ("or", 1, 2), ("first", 1, 1)])
def test_orders_are_combined_in_cr(rule, cr, asked):
    from eval import evaluate_responses

    ask = Says(alpha_first)
    question = {"task": "t", "input": "i", "targets": ["alpha"], "wordings": ["u", "v", "w"],
                "responses": ["alpha", "beta", "beta"], "unfinished": 0}
    metrics, _ = evaluate_responses([question], HttpJudge(ask), symmetrize=rule)
    assert metrics["cr"]["mean"] == pytest.approx(cr) and len(ask.asked) == asked


def test_critiques():
    says = {"good": "All there.\nVERDICT {n}: perfect", "mute": "VERDICT {n}: flawed",
            "bad": "The colour is wrong.\nIt is red.\nVERDICT {n}: flawed", "lost": "hm",
            "truncated": Reply("The colour is", "cut at max_tokens")}
    critic = HttpCritic(Says(lambda question, text: says[fenced(question)]))
    assert critic.critique([item(name) for name in says]) == [
        None, FAILED, "The colour is wrong.\nIt is red.", FAILED, FAILED]


def test_failed_judgments_are_those_of_the_methods():
    from methods import judged

    assert judged.FAILED == FAILED


# ----- Confusion -----

def verdicts(*pairs):
    """Verdicts of (type, correct)."""
    return [Verdict(type, correct, combine_reward(type, correct), "judged")
            for type, correct in pairs]


def test_confusion_by_hand():
    said = verdicts((True, True), (True, True), (False, None), (True, False), (None, None))
    true = verdicts((True, True), (True, False), (True, True), (True, False), (True, True))
    found = confusion([item(str(k)) for k in range(5)], said, true)["all"]
    assert found["n"] == 5
    assert found["type"] == {"tp": 3, "fp": 0, "fn": 1, "tn": 0, "missing": 1, "accuracy": 0.75,
                             "precision": 1.0, "recall": 0.75}
    assert found["correct"] == {"tp": 1, "fp": 1, "fn": 0, "tn": 1, "missing": 2, "precision": 0.5,
                                "accuracy": pytest.approx(2 / 3), "recall": 1.0}
    assert found["best"] == {"tp": 1, "fp": 1, "fn": 1, "tn": 1, "missing": 1, "accuracy": 0.5,
                             "precision": 0.5, "recall": 0.5}


def test_confusion_of_what_was_asked():
    items = [item("blue"), item("blue"), item("red"), item("")]
    yes = LocalJudge(lambda prefixes, *_: [(0.0, -1.0)] * len(prefixes))
    found = confusion(items, yes.judge(items), RuleJudge().judge(items))
    assert found["all"]["n"] == 4 and found["all"]["best"]["accuracy"] == 0.5
    assert found["asked"]["n"] == 1 and found["asked"]["best"]["fp"] == 1
    assert found["asked"]["best"]["recall"] is None
    assert confusion([], [], [])["all"]["type"]["accuracy"] is None


# ----- Runs -----

def make_run(folder, **cfg):
    """As much of a run as this room needs, and what it says."""
    said = []
    cfg = SimpleNamespace(**vars(ServerFlags(judge_model="m", judge_workers=2)) | {
        "judge": "http", "critic": "", "eval_batch": 4, "out": folder,
        "rouge_threshold": 0.7} | cfg)
    guard = SimpleNamespace(rank=0, first=lambda action: json.loads(json.dumps(action())))
    return SimpleNamespace(cfg=cfg, folder=folder, guard=guard, memory={},
                           model=None, tokenizer=None, template=None, say=said.append), said


def nonce_of(request):
    return request["messages"][-1]["content"].split('"VERDICT ')[1].split(":")[0]


def pleased(request, number):
    """A server that finds everything right."""
    word = "expected" if "kind of answer" in request["messages"][-1]["content"] else "correct"
    return {"body": completion(f"VERDICT {nonce_of(request)}: {word}")}


def strict(request, number):
    """A server that finds nothing right."""
    word = "expected" if "kind of answer" in request["messages"][-1]["content"] else "incorrect"
    return {"body": completion(f"VERDICT {nonce_of(request)}: {word}")}


COLOURS = "red blue green black white".split()
ITEMS = [item("?", input=str(k), target=COLOURS[k % 5]) for k in range(40)]


@pytest.mark.parametrize("decide, warned", [(pleased, True), (strict, False)])
def test_canaries_are_measured_and_warned_about(decide, warned, tmp_path):
    with ChatServer(decide) as server:
        run, said = make_run(tmp_path, judge_url=server.url)
        judge = judges.server_judge(run.cfg, None, run)
        judges.after_collecting(run, judge, lambda run: ITEMS)
        asked = len(server.requests)
        judges.after_collecting(run, judge, lambda run: ITEMS)  # they are there already
        assert asked == len(server.requests) == 2 * 72
    found = json.loads((tmp_path / "canaries.json").read_text())
    n = 36
    counts = {"asked": n, "unread": 0, "passed": n * warned, "ci95": wilson(n * warned, n)}
    assert found == counts | {"wrong": counts}
    kinds = ("answers without content", "wrong answers of the right kind")
    for line, kind in zip(said, kinds, strict=False):
        assert line.startswith(f"warning: the judge called 36 of 36 {kind} correct") == warned
    assert judge.name == "http m" and sum(line.startswith("judge m: ") for line in said) == 1
    RUN.close(print)
    assert RUN.clients == []


def test_a_judge_that_takes_any_colour_passes_with_empty_talk_alone(tmp_path):
    """It calls every wrong answer correct, and no text without content."""
    run, said = make_run(tmp_path)

    def by_kind(prefixes, suffixes, words):
        return [(0.0, -9.0) if any(f" {colour}\n" in suffix for colour in COLOURS)
                else (-9.0, 0.0) for suffix in suffixes]
    judges.after_collecting(run, LocalJudge(by_kind), lambda run: ITEMS)
    found = json.loads((tmp_path / "canaries.json").read_text())
    assert (found["asked"], found["passed"]) == (36, 0)
    assert (found["wrong"]["asked"], found["wrong"]["passed"]) == (36, 36)
    assert said == ["warning: the judge called 36 of 36 wrong answers of the right kind correct "
                    "(100 %, 95 % interval 90 to 100 %); treat its scores with care."]


def test_canaries_say_nothing_or_are_right_elsewhere():
    tasks = [item("?", input=f"{k}", instruction=f"task {k // 20}", target=f"{k // 20} {k % 4} !",
                  targets=[f"{k // 20} {k % 4} !", f"also {k}"]) for k in range(60)]
    tasks += [item("?", input=f"{k}", instruction="all alike", target="yes") for k in range(20)]
    empty = canary_items(tasks + tasks)  # a question under several wordings counts once
    assert len(empty) == 36 and len({(x["instruction"], x["input"]) for x in empty}) == 8
    texts = [x["response"] for x in empty]
    assert {texts.count(text) for text in TEXTS["judge"]["canaries"]} == {4}
    assert {x["instruction"] for x in empty} == {x["instruction"] for x in tasks}
    wrong = wrong_items(tasks + tasks, RuleJudge())
    assert len({(x["instruction"], x["input"]) for x in wrong}) == len(wrong) == 36
    for x in wrong:
        others = [y["target"] for y in tasks if y["instruction"] == x["instruction"]]
        assert x["response"] in others and x["response"] not in x["targets"]
    for task in range(3):  # all tasks, and all their labels
        texts = [x["response"] for x in wrong if x["instruction"] == f"task {task}"]
        assert len(texts) == 12 and len(set(texts)) == 4
    assert wrong_items([], RuleJudge()) == canary_items([]) == []


def test_unread_rewards_are_counted_and_said(tmp_path):
    def decide(request, number):
        text = request["messages"][-1]["content"]
        if "kind of answer" in text and "\nblue\n" in text:
            return {"body": completion("hm")}
        return strict(request, number)
    with ChatServer(decide) as server:
        run, said = make_run(tmp_path, judge_url=server.url, max_unparsed=0.5)
        judge = judges.server_judge(run.cfg, None, run)
        found = judge.judge([item("blue"), item("green"), item("grey")])
        assert [v.reward for v in found] == [None, 1, 1]
        judges.after_collecting(run, judge, lambda run: ITEMS)
    note = "note: 1 of 5 judge replies had no readable verdict (1 no verdict). They are missing"
    assert note in said[0]
    RUN.close(print)


def test_canaries_know_what_was_not_said(tmp_path):
    """A judge without verdicts is not given a clean bill."""
    run, said = make_run(tmp_path)
    n = 36
    unparsed, wrong = Verdict(None, None, None, "unparsed"), Verdict(True, False, 1, "judged")
    judge = LocalJudge(None)
    judge.judge = lambda items: ([unparsed] * (n - 10) + [Verdict(True, True, 2, "judged")]
                                 + [wrong] * (9 + n))
    judges.after_collecting(run, judge, lambda run: ITEMS)
    found = json.loads((tmp_path / "canaries.json").read_text())
    assert (found["asked"], found["unread"], found["passed"]) == (n, n - 10, 1)
    assert found["ci95"] == pytest.approx(wilson(1, 10))
    assert (found["wrong"]["unread"], found["wrong"]["passed"]) == (0, 0)
    assert f"no readable verdict on {n - 10} of {n}" in said[0] and "called 1 of 10" in said[1]
    judge.judge = lambda items: [unparsed] * 2 * n
    (tmp_path / "canaries.json").unlink()
    judges.after_collecting(run, judge, lambda run: ITEMS)
    found = json.loads((tmp_path / "canaries.json").read_text())
    assert found["ci95"] is found["wrong"]["ci95"] is None
    assert "on 36 of 36 wrong answers of the right kind; whether they please it" in said[-1]


def test_judges_of_plain_numbers_get_no_canaries(tmp_path):
    run, _ = make_run(tmp_path)
    judges.after_collecting(run, SimpleNamespace(), lambda run: ITEMS)
    assert not (tmp_path / "canaries.json").exists()


def test_a_critic_and_a_judge_of_eval(tmp_path):
    from types import SimpleNamespace

    def decide(request, number):
        return {"body": completion(f"Wrong.\nVERDICT {nonce_of(request)}: flawed")}
    with ChatServer(decide) as server:
        run, _ = make_run(tmp_path, judge="rule", critic="http", judge_url=server.url)
        assert judges.server_critic(run.cfg, run).critique([item("x")]) == ["Wrong."]
    with ChatServer(pleased) as server:
        run, _ = make_run(tmp_path / "eval", judge_url=server.url)
        cfg = SimpleNamespace(**vars(run.cfg) | {"judge": "http", "server": ""})
        assert judges.make_judge(cfg).judge([item("x")])[0].reward == 2
    assert (tmp_path / "eval/judge.jsonl").is_file()
    RUN.close(print)


def test_flags_for_argparse():
    import argparse

    parser = argparse.ArgumentParser()
    judges.add_flags(parser.add_argument)
    argv = ["--judge-workers", "3", "--budget", "1.5", "--verdict", "keyword"]
    given = vars(parser.parse_args(argv))
    wanted = vars(ServerFlags(judge_workers=3, budget=1.5, verdict="keyword"))
    assert {name: given[name] for name in wanted} == wanted
    with pytest.raises(SystemExit):
        parser.parse_args(["--verdict", "word"])


def test_revisions_and_labels_of_a_run(tmp_path):
    def decide(request, number):
        text = request["messages"][-1]["content"]
        if "VERDICT" in text:
            return {"body": completion(f"VERDICT {nonce_of(request)}: a")}
        return {"body": completion("It is rude." if "Name the ways" in text else "polite")}
    with ChatServer(decide) as server:
        run, _ = make_run(tmp_path, judge_url=server.url, revisions=1, seed=0)
        row, = judges.revise(run, [item("rude words")], [])
        assert row["revision"] == "polite"
        assert row["history"][0]["principle"] in TEXTS["writers"]["principles"]
        pair = {"instruction": "i", "input": "x", "first": item("red"), "second": item("blue")}
        assert judges.label_pairs(run, [pair]) == [0.5]
        assert "<instruction " in server.texts()[-1] and "i\n\nx\n" in server.texts()[-1]
        assert len(RUN.clients) == 1  # the client is made once
    RUN.close(print)


# ----- Rewards, labels and judgments that cannot be read -----

@pytest.mark.parametrize("stage, more, file", [
    ("cat", [], "candidates.jsonl"), ("rlaif", ["--labels", "letters"], "preferences.jsonl"),
    ("cut", ["--critic", "http"], "judged.jsonl")])
@pytest.mark.parametrize("most", ["0.1", "1"])
def test_a_run_that_can_read_nothing_fails(stage, more, file, most, arguments, tmp_path):
    """Nothing is kept, unless all may be unread: then there is nothing to train on."""
    import train
    from methods.schedule import check_items

    with ChatServer(lambda request, number: {"body": completion("hm")}) as server:
        argv = arguments(tmp_path / "run", "--stage", stage, "--pool-per-task", "4", "--judge",
                         "http", "--judge-url", server.url, "--judge-model", "m", "--temperature",
                         "2", "--max-unparsed", most, *more)
        run = train.make_run(*train.parse_config(argv), train.Alone())
        run.folder.mkdir()
        run.model = train.trainable_model(run.cfg, None)
        with pytest.raises((JudgeStopped, ValueError), match="judge replies had no readable verdict"
                                                             "|there is nothing to train on|"
                                                             "nothing to train on for stage cut"):
            run.method.collect(run)
            assert most == "1" and stage != "cat"
            check_items(run, run.method.items(run))
        assert most == "1" or len(server.requests) <= 2 * 10
    kept = run.folder / file
    assert most == "1" or not kept.exists() or not kept.read_text()
    RUN.close(print)


def test_labels_are_counted_over_the_whole_run(tmp_path):
    """Calls with a pair each: the first ten verdicts are looked at together."""
    def decide(request, number):
        text = request["messages"][-1]["content"]
        if int(text.split("question ")[1].split()[0]) % 2:
            return {"body": completion("hm")}
        return {"body": completion(f"VERDICT {nonce_of(request)}: a")}
    with ChatServer(decide) as server:
        run, _ = make_run(tmp_path, judge_url=server.url)
        pairs = [{"instruction": f"question {k} .", "input": "", "first": item("red"),
                  "second": item("blue")} for k in range(100)]
        with pytest.raises(JudgeStopped, match="50 of 100 judge replies"):
            for k in range(100):
                found = judges.label_pairs(run, pairs[k:k + 1])
                assert found == ([None] if k % 2 else [0.5])
    RUN.close(print)
