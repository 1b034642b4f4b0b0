"""Wordings and revisions."""

import pytest
from chatserver import Says, fenced, item

from extras.judges.questions import Reply
from extras.judges.writers import PRINCIPLES, constitutional, find_fault, paraphrase, unquote


@pytest.mark.parametrize("text, found", [
    ('"a b"', "a b"), ("“a”", "a"), ("'Don't do it'", "Don't do it"), ("```py\na\n```", "a"),
    ('"Say "hello" to him"', 'Say "hello" to him'), ("`a`", "a"), ('"', '"'), ('""', ""),
    *[(text, text) for text in ('"a" or "b"', "“a” or “b”", "`a` is `b`", "'a', 'b'", '"a" b')]])
def test_quotation_marks_around_all_of_a_text_are_left_out(text, found):
    assert unquote(text) == found


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
    rows = paraphrase(ask, {"colour": "Name the colour."}, 6, checker=ask, model="m")
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
    row, = paraphrase(ask, {"t": "Shorten {input} please."}, 1)
    assert row["reason"] == "lost a place holder" and not row["kept"]


@pytest.mark.parametrize("original, text, answers, fault", [
    ("How many legs has a spider?", "A spider has how many legs?", ["8"], ""),
    ("How many legs has a spider?", "Please give the number of a spider's legs.", ["8"], ""),
    ("How many legs has a spider?", "Say: how many legs has a spider? It is important. Go on then.",
     [], "repeats the original"),
    ("How many legs has a spider?", "How many legs?\nA spider.", [], "has several lines"),
    ("How many legs has a spider?", "A spider has 8 legs.", ["8"], "gives an answer"),
    ("How many legs has a spider?", "A spider has 8 legs.", [], "has other numbers"),
    ("How many legs has a spider?", "Spider legs are many.", ["8"], "asks nothing"),
    ("How many legs has a spider?", "Do not ask. Ask!", ["8"], "has no word of the original"),
    ("What is 17 plus 25?", "17 plus thirty-five is?", ["42"], "has other numbers"),
    ("What is 2 plus 25?", "25 plus two is what?", ["27"], ""),
    ("Is red or blue warmer?", "Which one is warmer, red or blue?", ["red"], ""),
    ("Shorten {input} please.", "Shorten this: {input}", None, ""),
    ("Shorten {input} please.", "Shorten it, please.", None, "lost a place holder"),
    ("Shorten it please.", "Shorten {text} please.", None, "made up a place holder"),
    ("Name the colour.", "Which hue is it?", None, ""), ("Name the colour.", " ", None, "empty"),
    ("猫在哪里？", "哪里有猫？", [], ""),
    ("猫在哪里？", "狗不见了", [], "has no word of the original")])
def test_faults_that_rules_can_see(original, text, answers, fault):
    assert find_fault(original, text, answers) == fault


def test_known_wordings_and_pieces_of_the_prompt_are_not_kept():
    def decide(question, text):
        return next(says).replace("NONCE", question.nonce)
    says = iter(["Tell the colour.", "Say the colour, NONCE!", "Which colour is it?"])
    rows = paraphrase(Says(decide), {"t": "Name the colour."}, 3, known={"t": ["tell the colour"]})
    assert [row["reason"] for row in rows] == ["said already", "repeats the prompt", ""]


def test_plain_questions_are_asked_for_as_such_and_checked_by_another():
    writer = Says(lambda question, text: "Which colour has snow?")
    checker = Says(lambda question, text: "VERDICT {n}: same")
    row, = paraphrase(writer, {"q": "What colour has snow?"}, 1, checker=checker,
                      answers={"q": ["white"]})
    assert row["kept"] and row["text"] == "Which colour has snow?"
    (asked,), (one, two) = ([question.messages[1]["content"] for question in who.asked]
                            for who in (writer, checker))
    assert asked.startswith("Word the question below anew") and "<question " in asked
    assert one.startswith("Two questions are given") and "<first question " in one
    assert one.index("What colour") < one.index("Which colour")
    assert two.index("What colour") > two.index("Which colour")


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
