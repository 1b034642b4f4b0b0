"""Evol-Instruct: ways to evolve, eliminations, and what goes back into the pool."""

import pytest
from chatserver import Says, fenced

from extras.judges.evolving import WAYS, copies_prompt, evolve
from extras.judges.questions import JudgeStopped, Reply
from extras.judges.recipes import DATA, Settings

SEEDS = ["Name a red fruit.", "Write about the sea."]


def kind_of(question, text):
    """write, compare or answer."""
    if not question.nonce:
        return "answer"
    return "compare" if "VERDICT" in text else "write"


def evolves(question, text, *, write=None, compare="different", answer="It is red."):
    """A model that adds a word to each instruction, finds it different and answers."""
    kind = kind_of(question, text)
    if kind == "answer":
        return answer
    if kind == "compare":
        return "VERDICT {n}: " + compare
    return write or fenced(question, "instruction") + " Then say why."


def test_instructions_grow_round_by_round_and_are_answered():
    ask = Says(evolves)
    rows = evolve(ask, SEEDS, Settings(rounds=2))
    assert [row["text"] for row in rows] == [
        *(f"{seed} Then say why." for seed in SEEDS),
        *(f"{seed} Then say why. Then say why." for seed in SEEDS)]
    assert [row["round"] for row in rows] == [1, 1, 2, 2]
    assert all(row["kept"] and row["step"] in WAYS for row in rows)
    assert rows[3]["example"] == {"instruction": rows[3]["text"], "input": "",
                                  "output": "It is red."}
    kinds = [kind_of(question, question.messages[1]["content"]) for question in ask.asked]
    assert kinds == ["write", "write", "compare", "compare", "answer", "answer"] * 2
    by_kind = dict(zip(kinds, ask.calls, strict=True))
    assert by_kind["write"]["temperature"] == by_kind["answer"]["temperature"] == 0.7
    assert by_kind["compare"]["temperature"] == 0.0 and by_kind["write"]["sample"] == 1


def test_all_six_ways_are_taken_and_say_what_to_do():
    ask = Says(lambda question, text: Reply("", "http 500"))
    rows = evolve(ask, [f"Name fruit {k}." for k in range(60)], Settings(rounds=1))
    assert {row["step"] for row in rows} == set(WAYS) and len(WAYS) == 6
    for row, question in zip(rows, ask.asked, strict=True):
        prompt = question.messages[1]["content"]
        if row["step"] == "widen":
            assert "invent another one from the same field" in prompt
        else:
            assert DATA["evolving"][row["step"]] in prompt


@pytest.mark.parametrize("said, reason", [
    ({"write": "Name a red fruit!"}, "said already"),
    ({"compare": "equal"}, "gains no information"),
    ({"write": " "}, "empty"), ({"write": '""'}, "empty"),
    ({"write": "{n} what"}, "repeats the prompt"),
    ({"write": "New instruction:"}, "empty"),
    ({"write": "Carry out the rewritten instruction."}, "copies words of the prompt"),
    ({"write": "Name two. Add twenty words at most; a person."}, "copies words of the prompt"),
    ({"write": Reply("Name", "cut at max_tokens")}, "cut at max_tokens"),
    ({"answer": "Sorry, no."}, "its answer: refuses"),
    ({"answer": "..."}, "its answer: says nothing"),
    ({"answer": Reply("", "http 500: x")}, "its answer: http 500: x"),
    ({"answer": "  "}, "its answer: empty")])
def test_an_eliminated_instruction_goes_back_as_it_was(said, reason):
    seed, copied = SEEDS[0], said.get("write", "")
    ask = Says(lambda question, text: evolves(question, text, **said))
    # Seeds of which one way or another deepens; the prompt to widen has other words.
    rows = evolve(ask, [seed], Settings(rounds=2, seed=2))
    assert rows[0]["step"] != "widen" and rows[0]["reason"] == reason
    assert rows[1]["source"] == seed and not rows[1]["kept"]
    if copied:  # nothing is paid for after a rule has spoken
        assert {kind_of(x, x.messages[1]["content"]) for x in ask.asked} == {"write"}


@pytest.mark.parametrize("said", [
    "{}", "Revised instruction: {}", "**The new instruction:** {}", "### Modified Prompt: {}",
    "Here is a harder version: {}", "Sure! Here's the modified prompt:\n\n{}", 'New prompt: "{}"',
    "Certainly, I can do that. Here is a more complex version of the instruction: {}",
    "Instruction: {}", "Harder question：{}"])
def test_a_preamble_is_left_out(said):
    for text in ("Name two: a fruit and a berry.", "**Name** two red fruits."):
        ask = Says(lambda question, prompt, text=text: evolves(
            question, prompt, write=said.format(text)))
        row, = evolve(ask, SEEDS[:1], Settings(rounds=1))
        assert (row["text"], row["reason"]) == (text, "")


@pytest.mark.parametrize("text", [
    "Here is a list of prices: 3, 5. Add them.", "Write a new instruction for a robot.",
    "Follow the provided instructions and print the resulting text.", "Question: why is it red?",
    "Here is a table:\n| a | b |\nAdd it up.", "Instruction manuals: what are they for?",
    "Task: name fruits. Version: 2. Is it done?", "Sure signs of rain: name two."])
def test_instructions_that_only_look_like_a_preamble_stay(text):
    row, = evolve(Says(lambda question, prompt: evolves(question, prompt, write=text)), SEEDS[:1],
                  Settings(rounds=1))
    assert (row["text"], row["reason"]) == (text, "")


def test_what_the_source_begins_with_is_no_preamble():
    seed = "Here is a prompt: draw a cat. Make it better."
    row, = evolve(Says(evolves), [seed], Settings(rounds=1))
    assert row["text"] == seed + " Then say why."


def test_an_instruction_that_nobody_can_compare_is_dropped():
    def decide(question, text):
        wanted = kind_of(question, text) == "compare" and "sea" in text
        return "hm" if wanted else evolves(question, text)
    rows = evolve(Says(decide), SEEDS, Settings(rounds=1, max_unparsed=1))
    assert [row["reason"] for row in rows] == ["", "not compared: no verdict"]

    def never(question, text):
        return "hm" if kind_of(question, text) == "compare" else evolves(question, text)
    with pytest.raises(JudgeStopped, match="2 of 2 judge replies had no readable verdict"):
        evolve(Says(never), SEEDS, Settings(rounds=1))


def test_the_same_text_from_two_seeds_is_kept_once():
    rows = evolve(Says(lambda question, text: evolves(question, text, write="Name two berries.")),
                  SEEDS, Settings(rounds=1))
    assert [row["reason"] for row in rows] == ["", "said already"]


def test_words_of_the_prompt_count_only_if_the_source_has_them_not():
    prompt = "Make the thing below a little harder for them. Add one more rule."
    assert copies_prompt("Please, add one more rule: make the thing below a little.", "x", prompt)
    assert not copies_prompt("Make the thing below a dog.", "x", prompt)  # five words
    text = "Shorten the given instruction. Make the thing below a little."
    assert copies_prompt(text, "x", prompt) and not copies_prompt(text, text + " Now!", prompt)
    assert not copies_prompt("写一首诗", "x", prompt)


def test_the_seed_decides_the_ways():
    seeds = [f"Name fruit {k}." for k in range(10)]
    ways = [[row["step"] for row in evolve(Says(evolves), seeds, Settings(rounds=1, seed=seed))]
            for seed in (0, 0, 1)]
    assert ways[0] == ways[1] != ways[2]
