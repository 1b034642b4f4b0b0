"""Systems, histories, weights and parts of turns are used; what is not read is named."""

import pytest

from data import IGNORE_INDEX
from extras.formats import encode_conversation, read_candidates, read_examples
from extras.formats.messages import as_text, learnt_answers
from extras.formats.templates import TEMPLATES


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


HISTORY = [["a", "b"], ["c", "d"]]
TOLD = [user("a"), assistant("b"), user("c"), assistant("d")]
PARTS = [{"type": "text", "text": "which "}, {"type": "text", "text": "hat ?"}]


# ----- Instruction data -----

@pytest.mark.parametrize("row, wanted", [
    ({"instruction": "q", "input": "x", "output": "r", "system": "s", "history": HISTORY},
     [system("s"), *TOLD, user("q\nx"), assistant("r")]),
    ({"instruction": "q", "output": "r", "system": "s", "history": []},
     [system("s"), user("q"), assistant("r")]),
    ({"instruction": "q", "input": "", "output": "r", "system": "", "history": HISTORY[:1]},
     [*TOLD[:2], user("q"), assistant("r")]),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}],
      "system": "s"}, [system("s"), user("q"), assistant("r")]),
    ({"messages": [system("t"), user("q"), assistant("r")], "system": "s"},
     [system("s\nt"), user("q"), assistant("r")]),
    ({"messages": [system("s"), user("q"), assistant("r")], "system": "s"},
     [system("s"), user("q"), assistant("r")]),
    ({"messages": [{"role": "developer", "content": "s"}, user("q"), assistant("r")]},
     [system("s"), user("q"), assistant("r")]),
    ({"messages": [user(PARTS), assistant([{"type": "text", "text": "red"}])]},
     [user("which hat ?"), assistant("red")]),
    ({"messages": [user("q"), assistant("r", weight=0), user("q"), assistant("r", weight=1)]},
     [user("q"), assistant("r", weight=0), user("q"), assistant("r")]),
    ({"prompt": [system("s"), *TOLD[:3]], "completion": [assistant("r")]},
     [system("s"), user("a"), assistant("b", weight=0), user("c"), assistant("r")]),
    ({"prompt": "q", "completion": "r", "system": "s"}, [system("s"), user("q"), assistant("r")]),
    ({"prompt": [user("q")], "completion": "r"}, [user("q"), assistant("r")])])
def test_what_has_turns_or_a_system_becomes_messages(row, wanted, write, tmp_path):
    assert read_examples(write(tmp_path / "x.json", [row])) == ([{"messages": wanted}], {})


@pytest.mark.parametrize("row, instruction", [
    ({"prompt": "q\n", "completion": " r"}, "q\n"), ({"full_prompt": "q", "output": [" r"]}, "q")])
def test_a_prompt_as_text_is_an_instruction(row, instruction, write, tmp_path):
    wanted = {"instruction": instruction, "input": "", "output": " r"}
    assert read_examples(write(tmp_path / "x.json", [row])) == ([wanted], {})


def test_rows_without_an_answer_are_left_out_and_counted(write, tmp_path):
    good = {"instruction": "a", "input": "", "output": "b"}
    rows = [good, good | {"output": None}, good | {"instruction": None},
            {"prompt": "x", "completion": None}, {"prompt": " ", "completion": "x"},
            {"messages": [user("q"), assistant("r", weight=0)]},
            {"messages": [user("q"), system("s"), assistant("r")]}]
    assert read_examples(write(tmp_path / "x.json", rows)) == ([good], {
        "with an empty instruction or output": 4, "without an answer to learn": 1,
        "whose turns do not alternate": 1})


@pytest.mark.parametrize("row, sentence", [
    ({"instruction": "q", "output": "r", "history": ["a", "b"]},
     'its history is ["a", "b"]. Expected a list of [user, assistant].'),
    ({"instruction": "q", "output": "r", "system": ["s"]}, 'its system is ["s"]. Expected a text.'),
    ({"messages": [user("q"), assistant("r", weight=0.5)]},
     "turn 1 has the weight 0.5. Expected 0 (not learnt) or 1."),
    ({"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant("r")]},
     'a turn holds a part of type "image_url". Expected parts of type "text": images and other '
     "media are not read."),
    ({"messages": [user("q"), {"role": "tool", "content": "42"}, assistant("r")]},
     "turn 1 is a tool's, or calls one (role 'tool'). Calls of tools are not read; remove the "
     "record."),
    ({"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
     "turn 1 is a tool's, or calls one (role 'assistant'). Calls of tools are not read; remove the "
     "record."),
    ({"prompt": "x", "response": "y"}, "it has the fields prompt, response. Expected {instruction, "
     "input, output} (with system and history, if any), {messages}, {conversations}, or {prompt, "
     "completion}."),
    ({"prompt": "x", "chosen": "y", "rejected": "z"}, "it has the fields prompt, chosen, reject")])
def test_a_row_that_cannot_be_read_is_refused(row, sentence, write, tmp_path):
    good = {"instruction": "a", "output": "b"}
    with pytest.raises(ValueError) as caught:
        read_examples(write(tmp_path / "x.json", [good, row]))
    assert str(caught.value).startswith(f"{tmp_path / 'x.json'}, record 1: {sentence}")


def test_answers_of_preferences_that_are_not_used_are_said(write, tmp_path):
    row, told = {"conversations": [user("q"), assistant("r"), user("s")], "chosen": assistant("a"),
                 "rejected": assistant("b")}, []
    path = write(tmp_path / "x.json", [row, row])
    assert read_examples(path, told.append)[0] == [{"messages": [user("q"), assistant("r")]}] * 2
    assert told == [f"2 records of {path} have chosen and rejected answers, which are not used. "
                    "Methods on preferences (dpo, orpo, cat and others) read them with "
                    "--candidates."]


def test_which_answers_are_learnt():
    turns = [user("q"), assistant("a"), user("q"), assistant("b", weight=0), user("q")]
    assert learnt_answers(turns, "all") == [True, False]
    assert learnt_answers([*turns, assistant("c")], "all") == [True, False, True]
    assert learnt_answers([*turns, assistant("c")], "last") == [False, False, True]
    assert learnt_answers(turns, "last") == [False, False]


# ----- Preferences -----

@pytest.mark.parametrize("row, wanted", [
    ({"prompt": "q", "chosen": "r", "rejected": "s", "system": "be kind"},
     [system("be kind"), user("q")]),
    ({"prompt": [user("a"), assistant("b"), user("q\n")], "chosen": [assistant("r")],
      "rejected": [assistant("s")]}, [user("a"), assistant("b"), user("q\n")]),
    ({"conversations": [user("q")], "chosen": assistant("r"), "rejected": assistant("s"),
      "system": "be kind"}, [system("be kind"), user("q")]),
    ({"instruction": "q", "input": "x", "chosen": "r", "rejected": "s", "history": HISTORY},
     [*TOLD, user("q\nx")]),
    ({"prompt": "q", "chosen": [*TOLD, user("q"), assistant("r")],
      "rejected": [*TOLD, user("q"), assistant("s")]}, [*TOLD, user("q")]),
    ({"chosen": [system("t"), user("q"), assistant("r")], "system": "s",
      "rejected": [system("t"), user("q"), assistant("s")]}, [system("s\nt"), user("q")])])
def test_a_dialogue_before_the_answers_is_kept(row, wanted, write, tmp_path):
    for record, answer in zip(read_candidates(write(tmp_path / "p.json", [row])), "rs",
                              strict=True):
        assert record["messages"] == wanted and record["response"] == answer
        assert record["instruction"] == record["wording"] == as_text(wanted)


def test_an_instruction_keeps_its_input(write, tmp_path):
    row = {"instruction": "do", "input": "x", "chosen": "r", "rejected": "s"}
    for record in read_candidates(write(tmp_path / "p.json", [row])):
        assert (record["wording"], record["input"]) == ("do", "x") and "messages" not in record
    row |= {"instruction": "do {input}"}
    for record in read_candidates(write(tmp_path / "p.json", [row])):
        assert (record["wording"], record["input"]) == ("{input}", "do {input}\nx")


def test_labels_of_single_answers(write, tmp_path):
    rows = [{"prompt": "q", "completion": "r", "label": True},
            {"prompt": [user("p")], "completion": [assistant("s")], "label": False},
            {"prompt": "q", "completion": "t", "label": False}]
    found = read_candidates(write(tmp_path / "p.json", rows))
    assert [(x["id"], x["wording"], x["response"], x["reward"], x["how"]) for x in found] == [
        ("0", "q", "r", 1, "label"), ("1", "p", "s", 0, "label"), ("0", "q", "t", 0, "label")]
    with pytest.raises(ValueError) as caught:
        read_candidates(write(tmp_path / "p.json", [rows[0] | {"label": "good"}]))
    assert str(caught.value).endswith(
        'record 0: its label is "good". Expected true or false.')


def test_a_runs_own_dialogue_must_be_one(write, tmp_path):
    row = {"task": "t", "id": "1", "instruction": "i", "wording": "w", "input": "", "target": "x",
           "response": "r", "reward": 2, "how": "file", "messages": [user("q")]}
    assert read_candidates(write(tmp_path / "c.json", [row])) == [row]
    for messages in ([user("q"), user("q")], [user("q"), assistant("r")], [], 3):
        with pytest.raises(ValueError, match="messages do not alternate, or do|turn 0 is 3"):
            read_candidates(write(tmp_path / "c.json", [row | {"messages": messages}]))


# ----- As others do it -----

def test_implicit_prompts_are_those_of_trl(write, tmp_path):
    extract_prompt = pytest.importorskip("trl.data_utils").extract_prompt
    row = {"chosen": [*TOLD, user("q"), assistant("r")],
           "rejected": [*TOLD, user("q"), assistant("s")]}
    theirs = extract_prompt(row)
    found = read_candidates(write(tmp_path / "p.json", [row]))
    assert [x["messages"] for x in found] == [theirs["prompt"]] * 2
    assert [[assistant(x["response"])] for x in found] == [theirs["chosen"], theirs["rejected"]]


CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
          "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
          "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
          "{% endif %}{{ '\\n' }}{% endfor %}")


def test_learnt_tokens_are_those_of_transformers(folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaTokenizerFast.from_pretrained(
        folder, legacy=False, bos_token="<s>")
    messages = [system("the blue lamp"), user("who ?"), assistant("anna bought a chair"),
                user("where ?"), assistant("in paris")]
    wanted = theirs.apply_chat_template(messages, chat_template=CHATML, return_dict=True,
                                        return_assistant_tokens_mask=True)
    ours = encode_conversation(tokenizer, TEMPLATES["chatml"], {"messages": messages}, max_len=500)
    learnt = [label for label in ours["labels"] if label != IGNORE_INDEX]
    masked = [token for token, learnt in zip(wanted["input_ids"], wanted["assistant_masks"],
                                             strict=True) if learnt]
    assert learnt == masked
