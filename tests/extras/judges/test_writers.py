"""Wordings and revisions."""

import pytest
from chatserver import Says, fenced, item

from extras.judges.questions import Reply
from extras.judges.writers import PRINCIPLES, constitutional, paraphrase


def test_paraphrases_are_new_checked_and_say_where_they_come_from():
    says = iter(["Tell the colour.", '"Say the colour."', "name the colour", "Give the place.",
                 "tell the colour", "Odd one."])

    def decide(question, text):
        if not question.menu:
            return next(says)
        if "Odd" in text:
            return "hm"
        return "VERDICT {n}: " + ("different" if "place." in text else "same")
    ask = Says(decide)
    rows = paraphrase(ask, {"colour": "Name the colour."}, 6, model="m")
    assert [(row["text"], row["kept"], row["reason"]) for row in rows] == [
        ("Tell the colour.", True, ""), ("Say the colour.", True, ""),
        ("name the colour", False, "said already"),
        ("Give the place.", False, "asks for something else"),
        ("tell the colour", False, "said already"),
        ("Odd one.", False, "not checked: no verdict")]
    for number, row in enumerate(rows):
        assert row["original"] == "Name the colour." and row["model"] == "m"
        assert row["task"] == "colour" and row["sample"] == number
    texts = [question.messages[1]["content"] for question in ask.asked if question.menu]
    first, second = [text for text in texts if "Tell the" in text]
    assert first.index("Tell") > first.index("Name") and second.index("Tell") < second.index("Name")


def test_a_wording_keeps_its_place_holder():
    ask = Says(lambda question, text: "Shorten it.")
    row, = paraphrase(ask, {"t": "Shorten {input} please."}, 1, check=False)
    assert row["reason"] == "lost a place holder" and not row["kept"]


def test_revisions_keep_failures():
    def decide(question, text):
        if "Name the ways" in text:
            return Reply("", "http 500") if "lost" in text else "It is rude."
        if "stuck" in text:
            return Reply("", "cut at max_tokens")
        return "polite " + fenced(question)
    items = [item("words"), item("lost"), item("stuck")]
    rows = constitutional(Says(decide), items, ["be polite", "be short"], rounds=2)
    assert [row["revision"] for row in rows] == ["polite polite words", None, None]
    assert [turn["failure"] for turn in rows[1]["history"]] == ["http 500"] * 2
    assert rows[2]["history"][0]["critique"] == "It is rude."
    assert [row["response"] for row in rows] == ["words", "lost", "stuck"]
    drawn = {turn["principle"] for row in rows for turn in row["history"]}
    assert drawn == {"be polite", "be short"} and len(PRINCIPLES) == 6
    with pytest.raises(ValueError, match="needs principles"):
        constitutional(Says(decide), [], [])
