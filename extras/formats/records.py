"""Other people's records: judged responses, preferences, instructions, texts to pre-train on.

A file is a JSON list or JSON Lines; every row becomes our own form. All readers raise ValueError
that names the file and the record.
"""

import re
from pathlib import Path

from data import as_list, read_json, read_records
from extras.formats.checks import FILLED, NUMBER, TEXT, TEXT_OR_NULL, check, reading, refuse, show

LONGEST_TEXT = 4 * 10**6  # characters; sentencepiece takes some hundred bytes for each
SATISFIED = 7  # as in the CUT authors' converter: a score of 7 or more is satisfaction
ROLES = {"human": "user", "user": "user", "system": "system"} | dict.fromkeys(
    ("gpt", "chatgpt", "assistant", "bard", "bing", "model"), "assistant")


def read_rows(path, what: str, read=dict) -> list[tuple]:
    """[(what `read` makes of an object, "FILE, record N"), ...] of the objects in a file."""
    path = Path(path)
    refuse(not path.exists(), f"{path} does not exist. Give a file of {what}.")
    with open(path, "rb") as file:
        is_list = file.read(100).lstrip().startswith(b"[")
    rows, found = read_json(path) if is_list else read_records(path), []
    refuse(not isinstance(rows, list) or not rows,
           f"{path} holds no list of records. Expected a JSON list or JSON Lines of {what}.")
    for number, row in enumerate(rows):
        where = f"{path}, record {number}"
        check(row, {}, where)
        longest = max((len(text) for text in row.values() if isinstance(text, str)), default=0)
        refuse(longest > LONGEST_TEXT, f"{where} holds a text of {longest:,} characters. Expected "
               f"at most {LONGEST_TEXT:,}. Remove the record.")
        with reading(where, what):
            found.append((read(row), where))
    return found


# ----- Judged responses -----
def judged_rows(row: dict) -> list[dict]:
    """The judged responses of a row, under our own names."""
    if isinstance(row.get("completions"), list):  # UltraFeedback (arXiv 2310.01377)
        found = [{"instruction": row.get("instruction"), "response": answer.get("response"),
                  "judgment": answer["critique"], "score": answer.get("overall_score")}
                 for answer in row["completions"] if answer.get("critique")]
    elif "question" in row and "answer" in row:  # Shepherd (arXiv 2308.04592)
        found = [{"instruction": row["question"], "response": row["answer"],
                  "judgment": row.get("feedback", ""),
                  "refinement": row.get("output_correct") or None}]
    elif isinstance(row.get("data"), dict) and "passage" in row["data"]:
        found = judged_summaries(row["data"])
    else:  # our own, or the CUT authors' (arXiv 2312.14591)
        refuse("judgment" not in row, f'field "judgment" is missing; found: {", ".join(row):.80}. '
               "Expected a text, or null for a satisfying response.")
        found = [{"response": row.get("output"), "refinement": row.get("i_ans")} | row]
    for part in found:
        if isinstance(part.get("score"), int | float) and part["score"] >= SATISFIED:
            part["judgment"] = None
    return found


def judged_summaries(data: dict) -> list[dict]:
    """Critiques of summaries (arXiv 2206.05802): of the best answer to each question on a passage.

    Skipped and empty answers are left out.
    """
    found = []
    for question in data.get("questions") or []:
        ranks = question["rankings"]
        answer = question["answers"][ranks.index(max(ranks))]
        if answer["feedback"].get("skip"):
            continue
        critiques = answer["feedback"].get("critiques") or []
        refinement = critiques[-1]["refinement"] if critiques else None
        if answer["answer"] and bool(critiques) == bool(refinement):
            judgment = " ".join(critique["text"] for critique in critiques).strip() or None
            found.append({"instruction": f"{data['passage']['text']}\n{question['question']}",
                          "response": answer["answer"], "judgment": judgment,
                          "refinement": refinement})
    return found


JUDGED = {"instruction": FILLED, "input": TEXT, "response": FILLED, "judgment": (
    "a text, or null for a satisfying response", lambda x: x is None or FILLED[1](x)),
    "refinement": TEXT_OR_NULL, "target": TEXT_OR_NULL, "targets": (
    "a list of texts, or null", lambda x: not x or isinstance(x, list) and all(
        isinstance(text, str) for text in x))}


def read_judged(path) -> list[dict]:
    """Judged responses: {"id"} and the fields of JUDGED. A judgment of None means satisfaction."""
    found = []
    for parts, where in read_rows(path, "judged responses", judged_rows):
        for part in parts:
            record = {"id": str(part.get("id", len(found)))}
            record |= {name: part.get(name) for name in JUDGED}
            record["input"] = record["input"] or ""
            check(record, JUDGED, where)
            found.append(record)
    return found


# ----- Scored candidates and preferences -----
def read_text(turn) -> str:
    """The text of a response: a text, a message, or a list with one message."""
    if isinstance(turn, list) and len(turn) == 1:
        turn = turn[0]
    if isinstance(turn, dict):
        turn = turn.get("content", turn.get("value"))
    refuse(not isinstance(turn, str), f"{show(turn)} is no response. Expected a text or a message.")
    return turn.strip()


def read_turns(turns) -> list[dict]:
    """Turns of ShareGPT's (from, value) or of messages (role, content) as messages."""
    messages = []
    for number, turn in enumerate(turns):
        known = turn if isinstance(turn, dict) else {}
        role = ROLES.get(str(known.get("role", known.get("from"))).lower())
        text = known.get("content", known.get("value"))
        refuse(not role or not isinstance(text, str), f"turn {number} is {show(turn)}. Expected "
               f"role (or from) of {', '.join(sorted(ROLES))}, and content (or value) as text.")
        messages.append({"role": role, "content": text})
    return messages


def read_dialogue(prompt) -> str:
    """What stands before a response as one text: the user's words, or turns behind their roles."""
    if isinstance(prompt, str):
        return prompt.strip()
    said = [(turn["role"], turn["content"].strip()) for turn in read_turns(as_list(prompt))]
    system = "\n".join(text for role, text in said if role == "system")
    turns = [(role, text) for role, text in said if role != "system" and text]
    refuse(not turns or turns[-1][0] != "user",
           "the dialogue before the response does not end with the user's turn.")
    text = "\n".join(f"{role}: {text}" for role, text in turns) if turns[1:] else turns[0][1]
    return f"{system}\n{text}" if system else text


def read_preference(row: dict) -> tuple[str, list[tuple]]:
    """(prompt, [(response, score), ...]) of a row; a pair without scores has 1 and 0."""
    if isinstance(row.get("completions"), list):  # UltraFeedback
        answers = [(answer.get("response"), answer["overall_score"]) for answer in
                   row["completions"] if isinstance(answer, dict)
                   and isinstance(answer.get("overall_score"), int | float)]
        prompt = read_text(row.get("instruction"))
    elif "responses" in row and "scores" in row:  # RRHF (arXiv 2304.05302)
        refuse(not are_lists(row["responses"], row["scores"]) or len(row["responses"]) != len(
            row["scores"]), "responses and scores are no lists of one length.")
        answers = zip(row["responses"], row["scores"], strict=True)
        prompt = read_text(row.get("query"))
    else:  # TRL, ShareGPT, HH-RLHF, UltraFeedback's binarized form
        refuse("chosen" not in row or "rejected" not in row, 'fields "chosen" and "rejected" are '
               f"missing; found: {', '.join(row):.80}. Expected a preference.")
        prompt = row.get("prompt") or row.get("conversations") or row.get("messages")
        pair = [row["chosen"], row["rejected"]]
        if not prompt and isinstance(pair[0], str) and "\n\nAssistant:" in pair[0]:
            pair = [read_hh(text) for text in pair]
        if not prompt:
            refuse(not are_lists(*pair) or pair[0][:-1] != pair[1][:-1], "no prompt, and no two "
                   'dialogues that differ in their last turn alone. Give a field "prompt".')
            prompt, pair = pair[0][:-1], [turns[-1:] for turns in pair]
        elif isinstance(prompt, str) and are_lists(*pair):  # which repeat the prompt
            pair = [turns[-1:] for turns in pair]
        prompt, scores = read_dialogue(prompt), {"chosen": 1.0, "rejected": 0.0}
        answers = [(text, row.get(f"score_{name}", usual)) for text, (name, usual) in
                   zip(pair, scores.items(), strict=True)]
    refuse(not prompt, "the prompt is empty. Remove the record; there is nothing to answer.")
    return prompt, [(read_text(response), score) for response, score in answers]


def are_lists(*values) -> bool:
    """Whether all values are lists that are not empty."""
    return all(isinstance(value, list) and value for value in values)


def read_hh(text) -> list[dict]:
    """HH-RLHF's dialogue in one text as turns."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text)[1:]
    refuse(len(parts) < 4 or parts[-2] != "Assistant",
           f"{show(text)} is no dialogue that ends with the Assistant's turn.")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": role.lower(), "content": text.strip()} for role, text in turns]


OWN = dict.fromkeys(("task", "instruction", "wording", "input", "target", "response", "how"), TEXT)
OWN |= dict.fromkeys(("reward", "p_expected", "p_correct"), (
    "a number, or null where there is no verdict", lambda x: x is None or NUMBER[1](x)))
OWN["id"] = "a text or a number", lambda x: isinstance(x, str | int)


def read_candidates(path) -> list[dict]:
    """Scored candidates: a run's own as they are, or other people's preferences in their shape.

    The target is then the best response, and "how" is "file".
    """
    what, found = "scored candidates or preferences", []
    rows = read_rows(path, what)
    if any("response" in row and "reward" in row for row, _ in rows):
        for row, where in rows:
            check(row, OWN, where)
            refuse("reward" not in row, f'{where}: field "reward" is missing.')
        return [row for row, _ in rows]
    for number, ((prompt, answers), where) in enumerate(read_rows(path, what, read_preference)):
        refuse(len(answers) < 2, f"{where} has {len(answers)} responses with a score, not two.")
        for _, score in answers:
            check({"score": score}, {"score": NUMBER}, where)
        best = max(answers, key=lambda answer: answer[1])[0]
        wording, input = prompt, ""
        if "{input}" in prompt:  # other people's texts have no places for an input
            wording, input = "{input}", prompt
        for sample, (response, reward) in enumerate(answers):
            found.append({"task": Path(path).stem, "id": str(number), "instruction": wording,
                          "wording": wording, "input": input, "target": best, "response": response,
                          "reward": float(reward), "how": "file", "sample": sample,
                          "expected": None, "correct": None})
    return found


def read_labelled(path) -> list[dict]:
    """Pairs {input, first, second, probability} with a judge's soft label: that first is better."""
    share = "a number from 0 to 1", lambda x: NUMBER[1](x) and 0 <= x <= 1
    rows = read_rows(path, "pairs with first, second and probability")
    for row, where in rows:
        check(row, {"probability": share, "input": TEXT}, where)
        for side in ("first", "second"):
            check(row.get(side), {"wording": TEXT, "response": TEXT}, f"{where}, {side}")
    return [row for row, _ in rows]


# ----- Instructions, conversations, texts -----
def read_examples(path) -> tuple[list[dict], dict[str, int]]:
    """Instruction data, and how many rows were left out, by reason.

    Alpaca's rows become {"instruction", "input", "output"}; ShareGPT's and messages {"messages":
    [{"role", "content"}, ...]}: maybe one of the system, then user and assistant in turns.
    """
    found, left_out = [], {}
    for (example, fault), _ in read_rows(path, "Alpaca, ShareGPT or messages rows", read_example):
        if fault:
            left_out[fault] = left_out.get(fault, 0) + 1
        else:
            found.append(example)
    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
    refuse(not found, f"{path}: none of its records can be used ({reasons}).")
    return found, left_out


def read_example(row: dict) -> tuple[dict, str]:
    """A row of instruction data, and why it is left out, or ""."""
    turns = row.get("messages", row.get("conversations"))
    if turns is None:
        example = {"instruction": row.get("instruction"), "input": row.get("input") or "",
                   "output": row.get("output")}
        check(example, dict.fromkeys(example, TEXT), "an Alpaca row")
        filled = example["instruction"].strip() and example["output"].strip()
        return example, "" if filled else "with an empty instruction or output"
    refuse(not isinstance(turns, list), f"its conversation is {show(turns)}. Expected a list.")
    messages = read_turns(turns)
    roles = [message["role"] for message in messages]
    system = int(roles[:1] == ["system"])
    # what an assistant says first, and a user last, is dropped
    begin = system + (roles[system:system + 1] == ["assistant"])
    end = len(roles) - (roles[begin:][-1:] == ["user"])
    if begin == end:
        return {}, "without an answer"
    if roles[begin:end] != ["user", "assistant"] * ((end - begin) // 2):
        return {}, "whose turns do not alternate"
    if not all(message["content"].strip() for message in messages[begin:end]):
        return {}, "with an empty turn"
    return {"messages": messages[:system] + messages[begin:end]}, ""


def read_instructions(path) -> list[dict]:
    """Rows with an instruction and, if there is one, an input."""
    rows = read_rows(path, "instructions")
    for row, where in rows:
        check(row, {"instruction": FILLED}, where)
        check({"input": row.get("input") or ""}, {"input": TEXT}, where)
    return [row for row, _ in rows]


def read_corpus(path) -> list[list]:
    """Documents to pre-train on, one a line: [[text, whether it is learnt], ...]."""
    documents = read_records(path)
    for number, document in enumerate(documents, 1):
        parts = document if isinstance(document, list) else []
        sound = [isinstance(part, list) and len(part) == 2 and isinstance(part[0], str)
                 and isinstance(part[1], int) for part in parts]
        refuse(not parts or not all(sound), f"{path}, line {number} is {show(document)}. Expected "
               "a list of [text, true or false].")
    return documents
