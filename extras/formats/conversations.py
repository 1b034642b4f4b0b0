"""Other people's instruction data: Alpaca, ShareGPT, messages, prompts with completions."""

from collections.abc import Callable

from data import as_list
from extras.formats.checks import FILLED, TEXT, TEXT_OR_NULL, check, name_fields, refuse, show
from extras.formats.messages import find_fault, read_alpaca, read_turns
from extras.formats.rows import read_rows

FORMS = ("{instruction, input, output} (with system and history, if any), {messages}, "
         "{conversations}, or {prompt, completion}")
EMPTY = "with an empty instruction or output"


def read_examples(path, say: Callable | None = None) -> tuple[list[dict], dict[str, int]]:
    """Instruction data, and how many rows were left out, by reason.

    Alpaca's rows become {"instruction", "input", "output"}; what has more than one turn, or a
    system, {"messages": [{"role", "content"}, ...]}: maybe one of the system, then user and
    assistant in turns. say: is told of fields that are not used.
    """
    found, left_out, unused = [], {}, 0
    for (example, fault, pair), _ in read_rows(path, FORMS, read_example):
        unused += pair
        if fault:
            left_out[fault] = left_out.get(fault, 0) + 1
        else:
            found.append(example)
    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
    refuse(not found, f"{path}: none of its records can be used ({reasons}).")
    if unused and say:
        say(f"{unused} records of {path} have chosen and rejected answers, which are not used. "
            "Methods on preferences (dpo, orpo, cat and others) read them with --candidates.")
    return found, left_out


def read_example(row: dict) -> tuple[dict, str, bool]:
    """A row of instruction data; why it is left out, or ""; whether it holds a preference, too."""
    given = {name for name, value in row.items() if value is not None}
    pair = {"chosen", "rejected"} <= given
    if {"messages", "conversations"} & given:
        return *read_conversation(row), pair
    if {"prompt", "completion"} <= row.keys():
        return *read_completion(row), pair
    if "full_prompt" in given:  # collections for continual learning, made of Super-NI
        row = {"instruction": row["full_prompt"], "output": as_list(row.get("output"))[0]}
    refuse("instruction" not in row or "output" not in row,
           f"it has the fields {name_fields(row)}. Expected {FORMS}.")
    fields = {"instruction": row["instruction"], "input": row.get("input") or "",
              "output": row["output"]}
    check(fields, {"instruction": TEXT_OR_NULL, "input": TEXT, "output": TEXT_OR_NULL}, "its row")
    filled = (fields["instruction"] or "").strip() and (fields["output"] or "").strip()
    if not filled:
        return {}, EMPTY, pair
    if row.get("system") or row.get("history"):
        answer = {"role": "assistant", "content": fields["output"]}
        return *as_example([*read_alpaca(row), answer]), pair
    return fields, "", pair


def read_conversation(row: dict) -> tuple[dict, str]:
    """The messages of a row of messages or of ShareGPT's."""
    turns = row.get("messages")
    if turns is None:
        turns = row["conversations"]
    refuse(not isinstance(turns, list), f"its conversation is {show(turns)}. Expected a list.")
    return as_example(read_turns(turns, row.get("system")))


def read_completion(row: dict) -> tuple[dict, str]:
    """TRL's prompt and completion, each a text or messages. The completion alone is learnt."""
    prompt, completion, system = row["prompt"], row["completion"], row.get("system")
    if prompt is None or completion is None:
        return {}, EMPTY
    if str(row.get("label")).lower() in ("false", "0"):  # of KTO's rows
        return {}, "whose label says that the answer is bad"
    texts = isinstance(prompt, str) and isinstance(completion, str)
    if texts and not system:
        filled = prompt.strip() and completion.strip()
        return {"instruction": prompt, "input": "", "output": completion}, "" if filled else EMPTY
    before = read_turns(as_turns(prompt, "user"), system)
    for message in before:
        if message["role"] == "assistant":
            message["weight"] = 0
    return as_example(before + read_turns(as_turns(completion, "assistant")))


def as_turns(said, role: str) -> list:
    """A text as the only turn of a list; a list of turns as it is."""
    if isinstance(said, str):
        return [{"role": role, "content": said}]
    return as_list(said)


def as_example(messages: list[dict]) -> tuple[dict, str]:
    """{"messages"}, and why they are left out, or ""."""
    messages, fault = find_fault(messages, answered=True)
    if not fault and all(message.get("weight") == 0 for message in messages
                         if message["role"] == "assistant"):
        fault = "without an answer to learn"
    return {"messages": messages}, fault


def read_instructions(path) -> list[dict]:
    """Rows with an instruction and, if there is one, an input."""
    rows = read_rows(path, "instructions")
    for row, where in rows:
        check(row, {"instruction": FILLED}, where)
        check({"input": row.get("input") or ""}, {"input": TEXT}, where)
    return [row for row, _ in rows]
