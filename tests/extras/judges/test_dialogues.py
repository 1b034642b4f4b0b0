"""Self-chat in one transcript, and dialogues of two sides."""

import random

import pytest
from chatserver import Says, fenced

from extras.formats.messages import find_fault
from extras.judges.dialogues import dialogue, read_turns, self_chat, show_turns
from extras.judges.questions import Reply
from extras.judges.recipes import Settings

TALK = "[Human] Why?\n[AI] Because.\nAnd so.\n[Human] Really?\n[AI] Yes."


def turns(*texts):
    """Messages of a human and an assistant in turns."""
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


# ----- Self-chat -----
@pytest.mark.parametrize("text, found", [
    (TALK, turns("Why?", "Because.\nAnd so.", "Really?", "Yes.")),
    ("Sure:\n\n**[Human]:** Why?\n**[AI]:** So.", turns("Why?", "So.")),
    ("[|Human|] Why?\n[|AI|]\nSo.", turns("Why?", "So.")),
    ("[human] 为什么？\n[ai]：因为", turns("为什么？", "因为")),
    ("**[Human]** Why?\n**[AI]**: So.\n**[Human] Really?**\n- [AI] *So*.",
     turns("Why?", "So.", "Really?", "*So*.")),
    ("[Human] Why?\n\n---\n\n[AI] * one\n* two\n---\n[End of conversation]",
     turns("Why?", "* one\n* two")),
    ("[Human] Why?\n[AI] So.\n\nEnd of conversation.", turns("Why?", "So.")),
    ("[Human] Why?\n[AI] So.\n(The end)\n", turns("Why?", "So.")),
    ("I write [AI] inside a line", []), ("", [])])
def test_transcripts(text, found):
    assert read_turns(text) == found


def test_turns_are_read_as_they_are_shown():
    messages = turns("a\nb", "[x] c", "- d [AI] e", "**x** y", "* a", "_x_", "**x**", "* a\n* b",
                     ": x", "---", "a\n---\nb", "```\n[AI] x\n```", "__init__.py", "*x", "> a")
    assert read_turns(show_turns(messages)) == messages


@pytest.mark.parametrize("text, reason", [
    (TALK, ""), (TALK + "\n[Human] Bye", ""), ("[Human] Why?", "has fewer than two turns"),
    ("no turns", "has fewer than two turns"),
    ("[AI] Hi.\n[Human] Why?\n[AI] So.", "speaks out of turn"),
    ("[Human] Why?\n[Human] Why?\n[AI] So.", "speaks out of turn"),
    ("[Human] Why?\n[AI] So.\n[AI] So.", "speaks out of turn"),
    ("[Human]\n[AI] So.", "has an empty turn"),
    ("[Human] The question below:\n[AI] So.", "repeats the prompt"),
    ("[Human] Why {n}?\n[AI] So.", "repeats the prompt"),
    (Reply(TALK, "cut at max_tokens"), "cut at max_tokens"), ("", "empty")])
def test_a_transcript_is_kept_or_dropped_whole(text, reason):
    row, = self_chat(Says(lambda question, prompt: text), ["Why?"], Settings(seed=3))
    assert row["reason"] == reason and row["kept"] == (not reason) and row["source"] == "Why?"
    if row["kept"]:
        assert row["example"]["messages"] == turns("Why?", "Because.\nAnd so.", "Really?", "Yes.")


def test_self_chat_asks_once_for_each_seed():
    ask = Says(lambda question, text: TALK)
    self_chat(ask, ["Why?", "How?"], Settings(seed=3))
    assert [fenced(question, "question") for question in ask.asked] == ["Why?", "How?"]
    assert ask.calls == [{"temperature": 0.7, "sample": 30_000}] * 2


# ----- Two sides -----
def talks(question, text):
    """Each side says how many turns it has seen."""
    seen = len(read_turns(fenced(question, "conversation"))) if "<conversation " in text else 0
    if "Write your answer" in text:
        return f"[AI] answer {seen}"
    return f"question {seen} on {fenced(question, 'topic')}"


def test_both_sides_see_all_that_was_said():
    ask = Says(talks)
    rows = dialogue(ask, ["tea", "sea"], Settings(turns=3))
    assert rows[1]["example"]["messages"] == turns(
        "question 0 on sea", "answer 1", "question 2 on sea", "answer 3", "question 4 on sea",
        "answer 5")
    assert all(row["kept"] and not row["ended"] for row in rows)
    assert [how["sample"] for how in ask.calls] == [k for k in range(6) for _ in range(2)]
    assert "<topic " not in ask.asked[2].messages[1]["content"]  # the assistant's side
    assert rows[0]["text"] == show_turns(rows[0]["example"]["messages"])


@pytest.mark.parametrize("when, said, ended", [
    (0, Reply("x", "cut at max_tokens"), "cut at max_tokens"),
    (1, "", "empty"), (1, "[AI]", "empty"), (1, "[AI]\n---", "empty"),
    (3, "[AI] So.\n[AI] And so.", "speaks for the other side"),
    (2, "[AI] I am the other", "speaks for the other side"),
    (2, "ANSWER 1.", "repeats an earlier turn"),
    (3, "So.\n[Human] And now?", "speaks for the other side"), (3, "{n}", "repeats the prompt"),
    (2, '"question 0 on tea"', "repeats an earlier turn")])
def test_a_turn_that_cannot_be_used_ends_a_dialogue(when, said, ended):
    def decide(question, text):
        seen = len(read_turns(fenced(question, "conversation"))) if "<conversation " in text else 0
        return said if seen == when else talks(question, text)
    ask = Says(decide)
    row, = dialogue(ask, ["tea"], Settings(turns=3))
    assert row["ended"] == ended and len(ask.asked) == when + 1
    assert len(row["example"]["messages"]) == when - when % 2
    assert (row["kept"], row["reason"]) == ((True, "") if when > 1 else (False, ended))


def test_quotation_marks_around_all_of_it_are_the_users_only():
    def decide(question, text):
        return f'"{talks(question, text).removeprefix("[AI] ")}"'
    row, = dialogue(Says(decide), ["tea"], Settings(turns=1))
    assert row["example"]["messages"] == turns("question 0 on tea", '"answer 1"')


@pytest.mark.parametrize("said", [
    "**[AI]** * one\n* two", "* one\n* two\n---", "[AI]\n* one\n* two"])
def test_a_side_may_say_its_name(said):
    def decide(question, text):
        return said if "Write your answer" in text else talks(question, text)
    row, = dialogue(Says(decide), ["tea"], Settings(turns=1))
    assert row["example"]["messages"] == turns("question 0 on tea", "* one\n* two")


def test_a_dialogue_that_ends_leaves_the_others_alone():
    def decide(question, text):
        return "" if "tea" in text and "answer 1" in text else talks(question, text)
    rows = dialogue(Says(decide), ["tea", "sea"], Settings(turns=2))
    assert [len(row["example"]["messages"]) for row in rows] == [2, 4]


def test_what_is_kept_is_a_conversation_that_training_reads():
    rng = random.Random(0)
    pieces = ["[Human] a", "[AI] b", "c", "", "[AI]", "\n", "[Human]", "d [AI]", "{n}",
              "[system] e"]

    def decide(question, text):
        said = "\n".join(rng.choices(pieces, k=rng.randrange(6)))
        return Reply(said, rng.choice(["", "", "", "cut at max_tokens"]))
    kept = 0
    for seed in range(300):
        for recipe in (self_chat, dialogue):
            for row in recipe(Says(decide), ["tea", "sea"], Settings(seed=seed, turns=2)):
                if row["kept"]:
                    messages = row["example"]["messages"]
                    assert find_fault(messages, answered=True) == (messages, "")
                    kept += 1
    assert kept > 10
