"""Templates to the byte, files of one's own, and conversations as documents."""

import pytest

import data
from data import IGNORE_INDEX
from extras.formats import encode_conversation, find_template, read_candidates, read_examples
from extras.formats.templates import TEMPLATES, Prompt

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions.")
ONE = [{"role": "user", "content": "Hi"}]
TWO = [*ONE, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye"}]
TOLD = [{"role": "system", "content": "Be kind."}]
BELOW = ("Below is an instruction that describes a task. Write a response that appropriately "
         "completes the request.\n\n### Instruction:\nHi\n\n")


@pytest.mark.parametrize("name, messages, text", [
    ("alpaca", ONE, BELOW + "### Response:\n"),
    ("alpaca-stanford", ONE, BELOW + "### Response:"),
    ("alpaca", TOLD + ONE, "Be kind.\n\n### Instruction:\nHi\n\n### Response:\n"),
    ("vicuna", ONE, SYSTEM + " USER: Hi ASSISTANT:"),
    ("vicuna", TWO, SYSTEM + " USER: Hi ASSISTANT: Yes?</s>USER: Bye ASSISTANT:"),
    ("vicuna", TOLD + ONE, "Be kind. USER: Hi ASSISTANT:"),
    ("llama2", ONE, "[INST] Hi [/INST]"),
    ("llama2", TOLD + ONE, "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]"),
    ("llama2", TOLD + TWO,
     "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Yes? </s><s>[INST] Bye [/INST]"),
    ("llama2", [{"role": "user", "content": " Hi\n"}], "[INST] Hi [/INST]"),
    ("llama2", [{"role": "system", "content": " Be kind.\n"}] + ONE,
     "[INST] <<SYS>>\n Be kind.\n\n<</SYS>>\n\nHi [/INST]"),
    ("chatml", ONE, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ("chatml", TOLD + TWO,
     "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
     "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
     "<|im_start|>assistant\n"),
    ("zephyr", ONE, "<|user|>\nHi</s>\n<|assistant|>\n"),
    ("zephyr", TOLD + TWO,
     "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\nYes?</s>\n<|user|>\nBye</s>\n"
     "<|assistant|>\n"),
    ("raw", ONE, "Hi"),
    ("plain", TOLD + TWO, "Be kind.\n### Instruction: Hi\n### Response: Yes?</s>\n"
                          "### Instruction: Bye\n### Response:"),
])
def test_prompts_are_the_published_strings(name, messages, text):
    prompt = TEMPLATES[name].render_conversation(messages)
    assert prompt == text and isinstance(prompt, Prompt)
    assert "".join(part for part, _ in prompt.parts) == text
    if messages == ONE:
        assert TEMPLATES[name].render("Hi") == text  # an instruction is a conversation of one turn


@pytest.mark.parametrize("name", data.TEMPLATES)
def test_texts_are_the_courses(name):
    for arguments in (("Do {x}.", "in"), ("Do.",), ("Do.", "in", "bad"), ("Do.", "", "bad"),
                      ("{input} . which ?", "a lamp"),
                      ("say {instruction}", "{input}", "{judgment}")):
        for literal in (False, True):
            ours = TEMPLATES[name].render(*arguments, literal=literal)
            assert ours == data.TEMPLATES[name].render(*arguments, literal=literal)
            assert isinstance(ours, Prompt)


def test_judged_forms_of_conversations():
    assert TEMPLATES["llama2"].render("Do.", " in ", " bad ") == (
        "[INST] Do.\nin\n\nJudgment of the response: bad [/INST]")
    assert TEMPLATES["raw"].render("Do.", "", "bad") == "Do.\n\nJudgment of the response: bad"
    assert TEMPLATES["raw"].tail == "\n" and TEMPLATES["vicuna"].tail == ":"


# A user's own template -------------------------------------------------------------------------


def test_a_template_of_ones_own(write, tmp_path, tokenizer):
    file = write(tmp_path / "t.json", {"turn": "{opening}Q: {user}\nA:", "opening": "{system}\n",
                                       "separator": " ", "between": "\n"})
    mine = find_template(str(file))
    assert mine.render("Hi") == "Q: Hi\nA:" and mine.render("Hi", "x") == "Q: Hi\nx\nA:"
    assert mine.tail == ":"
    wanted = "Be kind.\nQ: Hi\nA: Yes?</s>\nQ: Bye\nA:"
    assert mine.render_conversation(TOLD + TWO) == wanted
    assert "no" in mine.render("Hi", "x", "no")
    assert mine.encode_response(tokenizer, "red")[-1] == tokenizer.eos_id
    judged = "{instruction} {input} {judgment}:"
    file = write(tmp_path / "judged.json", {"turn": "{user}:", "judged_with_input": judged})
    assert find_template(str(file)).render("Hi", "x", "no") == "Hi x no:"
    file = write(tmp_path / "lora.json", {
        "description": "alpaca-lora's form", "prompt_input": "{instruction} | {input} >\n",
        "prompt_no_input": "{instruction} >\n", "response_split": ">"})
    theirs = find_template(str(file))
    assert theirs.render("a", "b") == "a | b >\n" and theirs.render("a") == "a >\n"
    assert theirs.render_turn("c") == "c >\n"
    assert theirs.render("a", "b", "bad") == "a\n\nJudgment of the response: bad | b >\n"


@pytest.mark.parametrize("given, words", [
    ([1], "holds a list"), ({"turn": 3}, "malformed|turn is 3"), ({"trun": "x"}, "trun"),
    ({"strip": "yes", "turn": "{user}"}, 'strip is "yes". Expected a bool'),
    ({"separator": 3, "turn": "{user}"}, "separator is 3. Expected a str"),
    ({"turn": "Q:"}, "lacks {instruction}|lacks {user}|lacks {input}"),
    ({"turn": "<s>{user}"}, "begins with <s>"), ({}, "lacks {instruction}|lacks {input}"),
    ({"prompt_input": "{instruction}{input}:", "prompt_no_input": "{instruction}\n"},
     "its prompts end in"),
    ({"turn": "{user}:", "end": ""}, "end is empty"),
    ({"turn": "{user}:", "judged_with_input": ""}, "judged_with_input lacks {instruction}"),
    ({"turn": "{user}:", "judged_without_input": "{instruction}:"},
     "judged_without_input lacks {judgment}"),
])
def test_templates_that_are_refused(given, words, write, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        find_template(str(write(tmp_path / "t.json", given)))
    assert str(tmp_path / "t.json") in str(caught.value)
    with pytest.raises(ValueError, match="there is no template file"):
        find_template(str(tmp_path / "gone.json"))
    with pytest.raises(ValueError, match="unknown template 'vicunna'. Templates: alpaca, .*or a"):
        find_template("vicunna")


# Conversations as documents --------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_what_the_assistant_says_is_learnt(tokenizer, name):
    template = TEMPLATES[name]
    roles = ("user", "assistant", "user", "assistant")
    messages = TOLD + [{"role": role, "content": text} for role, text in
                       zip(roles, ("lamp", "red", "chair", "blue"), strict=True)]
    example = {"messages": messages}
    document = encode_conversation(tokenizer, template, example, max_len=2000)
    red, blue = (template.encode_response(tokenizer, text) for text in ("red", "blue"))
    assert [i for i in document["labels"] if i != IGNORE_INDEX] == red + blue
    for token, label in zip(document["input_ids"], document["labels"], strict=True):
        assert label in (IGNORE_INDEX, token)
    # what generation would be asked
    shown = tokenizer.encode_prompt(template.render_conversation(messages[:-1]))
    assert document["input_ids"][:len(shown)] == shown and document["truncated"] == 0
    shorter = len(document["input_ids"]) - 1
    first = encode_conversation(tokenizer, template, example, max_len=shorter)
    assert first["truncated"] == 1
    assert [i for i in first["labels"] if i != IGNORE_INDEX] == red
    assert encode_conversation(tokenizer, template, example, max_len=3) is None


def test_places_in_other_peoples_text_are_text(tokenizer, write, tmp_path):
    odd, template = "lamp {input} chair {instruction}", TEMPLATES["alpaca"]
    for input in ("", "the red lamp"):
        example = {"instruction": odd, "input": input, "output": "red"}
        document = encode_conversation(tokenizer, template, example, max_len=2000)
        text = tokenizer.decode(document["input_ids"])
        assert odd in text and text.count("the red lamp") == bool(input)
    pair = {"prompt": odd, "chosen": "red", "rejected": "blue"}
    for row in read_candidates(write(tmp_path / "p.json", [pair])):
        for name in ("wording", "instruction"):
            assert template.render(row[name], row["input"]) == template.render(odd, literal=True)
    assert odd in template.render(odd, literal=True)
    assert odd in template.render(odd, "y", "z", literal=True)


def test_real_conversations_and_alpaca_rows(tokenizer, shared):
    found, left_out = read_examples(shared / "sharegpt/dummy_conversation.json")
    assert len(found) + sum(left_out.values()) == 500 and len(found) > 400
    rows, dropped = read_examples(shared / "alpaca/alpaca_en_demo.json")
    assert len(rows) + sum(dropped.values()) == 999
    for example in found[:50] + rows[:50]:
        document = encode_conversation(tokenizer, TEMPLATES["vicuna"], example, max_len=4096)
        assert document["input_ids"].count(tokenizer.bos_id) == 1
        messages = example.get("messages", [{"role": "assistant"}])
        turns = sum(message["role"] == "assistant" for message in messages)
        assert document["truncated"] or document["labels"].count(tokenizer.eos_id) == turns


def test_a_template_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="the template in config.json of a model is 3. Exp"):
        find_template(3)
