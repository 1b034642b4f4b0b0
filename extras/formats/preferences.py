"""Scored answers and preferences: a run's own candidates, and other people's in their shape."""

import re
from dataclasses import dataclass
from pathlib import Path

from data import as_list
from extras.formats.checks import NUMBER, TEXT, TEXT_OR_NULL, check, name_fields, refuse, show
from extras.formats.messages import as_text, find_fault, read_alpaca, read_content, read_turns
from extras.formats.rows import read_rows

WHAT = "scored candidates or preferences"
FORMS = ("{prompt, chosen, rejected}, {instruction, input, chosen, rejected}, {conversations, "
         "chosen, rejected}, whole dialogues as {chosen, rejected}, {prompt, completion, label}, "
         "{query, responses, scores}, or UltraFeedback's {instruction, completions}")
LABELS = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}


@dataclass
class Preference:
    """A question and its (answer, score) pairs; `fault` says why it is left out, if it is."""

    instruction: str
    input: str
    messages: list[dict] | None  # a dialogue or a system; None for a single instruction
    answers: list[tuple]
    how: str = "file"
    fault: str = ""


# ----- What a row asks -----
def read_question(row: dict, prompt) -> Preference:
    """What stands before the answers: a text, or turns of which the user's is the last."""
    if isinstance(prompt, str):
        refuse(not prompt.strip(), "the prompt is empty. Remove the record; there is nothing to "
               "answer.")
        if not row.get("system"):
            return Preference(prompt, "", None, [])
        prompt = [{"role": "user", "content": prompt}]
    return read_dialogue(read_turns(as_list(prompt), row.get("system")))


def read_dialogue(messages: list[dict]) -> Preference:
    """The question of messages; a single one is an instruction like any other."""
    refuse(not messages or messages[-1]["role"] != "user",
           "the dialogue before the response does not end with the user's turn.")
    messages, fault = find_fault(messages, answered=False)
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    text = as_text(messages) if messages else ""
    return Preference(text, "", messages if messages[1:] else None, [], fault=fault)


def read_alpaca_question(row: dict) -> Preference:
    """The question of a row with an instruction and maybe input, system and history."""
    if row.get("system") or row.get("history"):
        return read_dialogue(read_alpaca(row))
    found = read_question({}, row["instruction"])
    check({"input": row.get("input") or ""}, {"input": TEXT}, "its row")
    found.input = row.get("input") or ""
    return found


# ----- What is answered -----
def read_answer(turn) -> str:
    """The text of a response: a text, a message, or a list with one message. Blanks stay."""
    if isinstance(turn, list) and len(turn) == 1:
        turn = turn[0]
    if isinstance(turn, dict):
        turn = read_content(turn.get("content", turn.get("value")))
    refuse(not isinstance(turn, str), f"{show(turn)} is no response. Expected a text or a message.")
    return turn


def read_preference(row: dict) -> Preference:
    """A row in any form. A pair without scores has 1 and 0, as have good and bad single answers."""
    if isinstance(row.get("completions"), list):  # UltraFeedback
        found = read_question(row, row.get("instruction") or "")
        answers = [(answer.get("response"), answer["overall_score"]) for answer in
                   row["completions"] if isinstance(answer, dict)
                   and isinstance(answer.get("overall_score"), int | float)]
    elif "responses" in row and "scores" in row:  # RRHF (arXiv 2304.05302)
        refuse(not are_lists(row["responses"], row["scores"]) or len(row["responses"]) != len(
            row["scores"]), "responses and scores are no lists of one length.")
        found = read_question(row, row.get("query") or "")
        answers = zip(row["responses"], row["scores"], strict=True)
    elif "completion" in row and "label" in row:  # TRL's, for KTO
        score = LABELS.get(str(row["label"]).lower())
        refuse(score is None, f"its label is {show(row['label'])}. Expected true or false.")
        found, answers = read_question(row, row.get("prompt") or ""), [(row["completion"], score)]
        found.how = "label"
    else:
        found, answers = read_pair(row)
    found.answers = [(read_answer(response), score) for response, score in answers]
    return found


def read_pair(row: dict) -> tuple[Preference, list[tuple]]:
    """A chosen and a rejected answer: TRL, ShareGPT, Alpaca, HH-RLHF, UltraFeedback binarized."""
    refuse(row.get("chosen") is None or row.get("rejected") is None, 'fields "chosen" and '
           f'"rejected" are missing; found: {name_fields(row)}. Expected {FORMS}.')
    prompt = row.get("prompt") or row.get("conversations") or row.get("messages")
    pair = [row["chosen"], row["rejected"]]
    if prompt is None and row.get("instruction") is not None:
        found = read_alpaca_question(row)
    else:
        if not prompt and isinstance(pair[0], str) and "\n\nAssistant:" in pair[0]:
            pair = [read_hh(text) for text in pair]
        lists = are_lists(*pair)
        alike = lists and pair[0][:-1] == pair[1][:-1]
        if not prompt:
            refuse(not alike, "no prompt, and no two dialogues that differ in their last turn "
                   'alone. Give a field "prompt".')
            prompt, pair = pair[0][:-1], [turns[-1:] for turns in pair]
        elif isinstance(prompt, str) and lists:  # which repeat the prompt
            if alike and len(pair[0]) > 2:  # behind more than the prompt
                prompt = pair[0][:-1]
            pair = [turns[-1:] for turns in pair]
        found = read_question(row, prompt)
    usual = {"chosen": 1.0, "rejected": 0.0}
    return found, [(text, usual[name] if row.get(f"score_{name}") is None
                    else row[f"score_{name}"]) for text, name in zip(pair, usual, strict=True)]


def are_lists(*values) -> bool:
    """Whether all values are lists that are not empty."""
    return all(isinstance(value, list) and value for value in values)


def read_hh(text) -> list[dict]:
    """HH-RLHF's dialogue in one text as turns."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text)[1:]
    refuse(len(parts) < 4 or parts[-2] != "Assistant",
           f"{show(text)} is no dialogue that ends with the Assistant's turn.")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": role.lower(), "content": text} for role, text in turns]


# ----- Records -----
OWN = dict.fromkeys(("task", "instruction", "wording", "input", "response", "how"), TEXT)
OWN["target"] = TEXT_OR_NULL  # null for inputs of --unlabelled
OWN |= dict.fromkeys(("reward", "p_expected", "p_correct"), (
    "a number, or null where there is no verdict", lambda x: x is None or NUMBER[1](x)))
OWN["id"] = "a text or a number", lambda x: isinstance(x, str | int)


def read_candidates(path) -> list[dict]:
    """Scored candidates: a run's own as they are, or other people's preferences in their shape.

    The target is then the best response, and "how" is "file", or "label" for single answers. A
    record of a dialogue has its "messages", too; its instruction, wording and input are to read.
    """
    return read_preferences(path)[0]


def read_preferences(path) -> tuple[list[dict], dict[str, int]]:
    """What `read_candidates` gives, and how many rows were left out, by reason."""
    rows, found, left_out, first = read_rows(path, WHAT), [], {}, {}
    if any("response" in row and "reward" in row for row, _ in rows):
        for row, where in rows:
            check_own(row, where)
        return [row for row, _ in rows], {}
    for number, (asked, where) in enumerate(read_rows(path, FORMS, read_preference)):
        for _, score in asked.answers:
            check({"score": score}, {"score": NUMBER}, where)
        name = str(number)
        if asked.how == "label":  # all answers to one prompt make one question
            name = first.setdefault(repr((asked.instruction, asked.messages)), name)
        elif len(asked.answers) < 2:
            refuse(True, f"{where} has {len(asked.answers)} responses with a score, not two.")
        elif len({text for text, _ in asked.answers}) == 1:
            asked.fault = "whose answers are all the same"
        if asked.fault:
            left_out[asked.fault] = left_out.get(asked.fault, 0) + 1
        else:
            found += as_records(asked, Path(path).stem, name)
    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
    refuse(not found, f"{path}: none of its records can be used ({reasons}).")
    return found, left_out


def check_own(row: dict, where: str) -> None:
    """Raise ValueError for a candidate that no run of ours could have written."""
    check(row, OWN, where)
    refuse("reward" not in row, f'{where}: field "reward" is missing.')
    if "messages" in row:
        turns = read_turns(as_list(row["messages"]))
        refuse(find_fault(turns, answered=False) != (turns, ""), f"{where}: its messages do not "
               "alternate, or do not end with the user's turn.")


def as_records(asked: Preference, task: str, name: str) -> list[dict]:
    """The answers to a question in the shape of a run's own candidates."""
    wording, input = asked.instruction, asked.input
    if "{input}" in wording:  # other people's texts have no places for an input
        wording, input = "{input}", f"{wording}\n{input}" if input else wording
    best = max(asked.answers, key=lambda answer: answer[1])[0]
    more, found = {}, []
    if asked.messages:
        more = {"messages": asked.messages}
    for sample, (response, reward) in enumerate(asked.answers):
        found.append({"task": task, "id": name, "instruction": wording, "wording": wording,
                      "input": input, "target": best, "response": response,
                      "reward": float(reward), "how": asked.how, "sample": sample,
                      "expected": None, "correct": None} | more)
    return found
