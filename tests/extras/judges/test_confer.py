"""Evaluators that confer, with scripted speakers: who hears what, who wins, what is counted."""

import random

import pytest
from chatserver import Says, fenced

from extras.judges import confer
from extras.judges.meta import annotator_metrics
from extras.judges.pairs import STRATEGIES, Evaluator, evaluate_pairs
from extras.judges.questions import TEXTS, Reply, Unread

PAIR = {"input": "Name a colour.", "output_1": "Red.", "output_2": "A colour is nice.", "label": 1}


def role_of(question):
    """Who speaks, by the system prompt."""
    return next(name for name, voice in TEXTS["voices"].items()
                if voice in question.messages[0]["content"])


def letter_of(question, output):
    """The letter under which this output is shown."""
    return "a" if fenced(question, "Output (a)") == output else "b"


def evaluate(ask, name, pairs=(PAIR,)):
    return Evaluator(ask, STRATEGIES[name]).evaluate(list(pairs))


@pytest.mark.parametrize("name", ["chateval", "prd", "layers"])
@pytest.mark.parametrize("winner", ["1", "2"])
def test_all_find_what_fair_speakers_prefer(name, winner):
    better = PAIR[f"output_{winner}"]

    def decide(question, text):
        if not question.menu:
            return "- 1. truth\n2) length\n\n* style"
        if question.menu == confer.TWO_SCORES:
            scores = {"a": "7 3", "b": "3, 7"}[letter_of(question, better)]
            return f"Good.\nVERDICT {{n}}: {scores}"
        return "I see.\nVERDICT {n}: " + letter_of(question, better)
    ask = Says(decide)
    row, = evaluate(ask, name)
    assert row["winners"] == [winner, winner] and not row["draw"] and row["failures"] == []
    # Two orders of: 3 roles twice; 2 reviews; 3 aspects in 2 layers, and the aspects once for both.
    assert len(ask.asked) == {"chateval": 12, "prd": 4, "layers": 13}[name]


# ----- Debate -----
def test_in_a_debate_each_hears_those_before_and_votes_in_the_last_round():
    votes = {"reader": "a", "critic": "b", "scientist": "a"}

    def decide(question, text):
        if question.menu:
            return f"So be it.\nVERDICT {{n}}: {votes[role_of(question)]}"
        return f"{role_of(question)} says {len(fenced(question, 'what was said'))}"
    ask = Says(decide)
    row, = evaluate(ask, "chateval")
    assert row["winners"] == ["1", "2"] and not row["draw"]
    heard = [fenced(question, "what was said") for question in ask.asked[::2]]
    assert heard[0] == "" and heard[1] == "reader: reader says 0"
    assert heard[2] == "reader: reader says 0\n\ncritic: critic says 21"
    assert heard[4].endswith("reader: So be it. (finds Output (a) better)")
    assert "Nobody votes yet." in ask.asked[5].messages[-1]["content"]
    assert [len(row["stages"][0][name]) for name in ("first", "second")] == [6, 6]
    for question in ask.asked:
        assert ("What counts, in this order" in question.messages[-1]["content"]) == bool(
            question.menu)


def test_votes_that_cannot_be_read_do_not_count():
    def decide(question, text):
        role = role_of(question)
        if not question.menu:
            return Reply("", "filtered") if role == "reader" else "hm"
        if role == "critic":
            return "no idea"
        return f"VERDICT {{n}}: {'a' if role == 'reader' else 'b'}"
    row, = evaluate(Says(decide), "chateval")
    assert row["winners"] == ["2", "1"] and row["draw"]  # one vote each
    assert sorted(row["failures"]) == ["filtered"] * 2 + ["no verdict"] * 2
    row, = evaluate(Says(lambda question, text: "hm"), "chateval")
    assert row["winners"] == [None, None] and not row["draw"]


# ----- Discussion -----
def test_reviewers_who_agree_do_not_talk_and_the_others_do_until_they_agree():
    def decide(question, text):
        first = role_of(question) == "first reviewer"
        turns = fenced(question, "what was said").count("reviewer:")
        letter = "a" if first or turns >= 5 else "b"  # the second gives in at the end
        return f"Turn {turns}.\nVERDICT {{n}}: {letter}"
    ask = Says(decide)
    row, = evaluate(ask, "prd")
    assert row["winners"] == ["1", "2"] and not row["draw"]
    said = [remark["text"] for remark in row["stages"][0]["first"]]
    assert said == ["Turn 0.", "Turn 0.", "Turn 2.", "Turn 3.", "Turn 4.", "Turn 5."]
    who = [remark["who"] for remark in row["stages"][0]["first"]]
    assert who == ["first reviewer", "second reviewer"] * 3
    for question in ask.asked[:4]:
        assert fenced(question, "what was said") == ""  # the reviews are independent


def test_reviewers_who_never_agree_make_a_draw_after_four_turns():
    def stubborn(question, text):
        return f"VERDICT {{n}}: {'a' if role_of(question) == 'first reviewer' else 'b'}"
    ask = Says(stubborn)
    row, = evaluate(ask, "prd")
    assert row["draw"] and row["winners"] == ["2", "1"] and len(ask.asked) == 2 * (2 + 4)


def test_an_unreadable_reviewer_leaves_the_other():
    def decide(question, text):
        return "VERDICT {n}: a" if role_of(question) == "first reviewer" else "hm"
    row, = evaluate(Says(decide), "prd")
    assert row["winners"] == ["1", "2"] and not row["draw"]


# ----- Layers -----
def test_the_second_layer_reads_its_neighbours_reviews():
    def decide(question, text):
        if not question.menu:
            return "\n".join(f"{k}. aspect {k}" for k in range(9))
        return f"On {fenced(question, 'aspect')}.\nVERDICT {{n}}: 5 4"
    ask = Says(decide)
    row, = evaluate(ask, "layers")
    assert row["stages"][0] == [f"aspect {k}" for k in range(4)]  # the width
    reviews = [fenced(question, "reviews") for question in ask.asked[1:] if
               fenced(question, "reviews")]
    assert len(reviews) == 8
    assert reviews[0] == "aspect 0: On aspect 0.\n\naspect 1: On aspect 1."
    assert reviews[2].count("On aspect") == 3 and "aspect 0" not in reviews[2]
    assert "Do not say which output is better" in ask.asked[0].messages[-1]["content"]
    assert row["winners"] == ["1", "2"]


def test_equal_means_are_a_draw_and_no_aspects_no_verdict():
    scores = iter(["6 4", "4 6"] * 100)

    def decide(question, text):
        return f"VERDICT {{n}}: {next(scores)}" if question.menu else "truth\nlength"
    row, = evaluate(Says(decide), "layers")
    assert row["draw"] and row["winners"] == ["2", "1"]
    row, = evaluate(Says(lambda question, text: " \n"), "layers")
    assert row["winners"] == [None, None] and row["failures"] == ["aspects: empty"]
    row, = evaluate(Says(lambda question, text: "10 9" if question.menu else "truth"), "layers")
    assert row["winners"] == [None, None] and row["failures"] == ["no verdict"] * 4


# ----- Several models -----
def test_roles_and_aspects_are_given_to_several_models_in_turn():
    asked = {name: Says(lambda question, text: "VERDICT {n}: a" if question.menu else "one\ntwo")
             for name in "xyz"}
    peers = tuple(Unread(ask, 1.0) for ask in asked.values())
    row, = evaluate_pairs(peers[0], [PAIR], STRATEGIES["prd"], peers=peers)
    assert [len(ask.asked) for ask in asked.values()] == [2, 2, 0] and row["winners"] == ["1", "2"]
    for ask in asked.values():
        ask.asked.clear()
    evaluate_pairs(peers[0], [PAIR], STRATEGIES["chateval"], peers=peers)
    for role, ask in zip(STRATEGIES["chateval"].roles, asked.values(), strict=True):
        assert {role_of(question) for question in ask.asked} == {role}
        ask.asked.clear()
    evaluate_pairs(peers[0], [PAIR], STRATEGIES["layers"], peers=peers[:2])
    shown = [{fenced(question, "aspect") for question in asked[name].asked} for name in "xy"]
    assert shown == [{"", "one"}, {"two"}]


# ----- Annotators -----
def test_a_quarter_of_the_annotators_verdicts_is_turned_round():
    pairs = [PAIR | {"input": f"Name colour {random.random()}."} for _ in range(600)]

    def decide(question, text):
        if not question.menu:
            return "hm"
        return "VERDICT {n}: " + letter_of(question, PAIR["output_1"])
    rows = evaluate(Says(decide), "annotators", pairs)
    flipped = sum(row["flipped"] for row in rows)
    assert abs(flipped - 150) < 5 * (600 * 0.25 * 0.75) ** 0.5
    for row in rows:
        assert row["unflipped"] == ["1", "1"]
        assert row["winners"] == (["2", "2"] if row["flipped"] else ["1", "1"])
    assert {row["annotator"] for row in rows} == set(STRATEGIES["annotators"].pool)
    found = annotator_metrics({"s": pairs}, {"annotators": {"s": [rows]}, "other": {"s": [
        [{"winners": ["1", "1"]}] * 600]}})
    assert list(found) == ["annotators"]
    assert sum(x["pairs"] for x in found["annotators"].values()) == 600
    assert sum(x["turned round"] for x in found["annotators"].values()) == flipped
    for x in found["annotators"].values():
        assert x["before"]["mean"] == 1
        assert x["after"]["mean"] == pytest.approx(1 - x["turned round"] / x["pairs"])
    again = evaluate(Says(decide), "annotators", pairs)
    assert again == rows


def test_a_draw_stays_a_draw_and_an_unread_verdict_unread():
    always = STRATEGIES["annotators"].__class__(kind="annotators", pool=["rating"], flips=1.0)
    row, = Evaluator(Says(lambda question, text: "VERDICT {n}: 5"), always).evaluate([PAIR])
    assert row["draw"] and row["winners"] == ["2", "1"]
    row, = Evaluator(Says(lambda question, text: "hm"), always).evaluate([PAIR])
    assert row["winners"] == [None, None] and row["flipped"]
