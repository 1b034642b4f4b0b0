"""Conversations as other people write them: who speaks, what they say, and what is learnt of it."""

from extras.formats.checks import refuse, show

ROLES = {"human": "user", "user": "user", "system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "assistant", "bard", "bing", "model"), "assistant")
TOOLS = ("tool", "tools", "function", "function_call", "observation", "ipython")


def read_content(value):
    """What a turn says: a text, or a list of parts of the type text."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else part
        refuse(kind != "text" or not isinstance(part.get("text"), str),
               f"a turn holds a part of type {show(kind)}. Expected parts of type \"text\": images "
               "and other media are not read.")
        texts.append(part["text"])
    return "".join(texts)


def read_turns(turns, system=None) -> list[dict]:
    """Turns of ShareGPT's (from, value) or of messages (role, content) as messages.

    What a system or developer says at the beginning, and the `system` of a row, are one message.
    An assistant's "weight": 0 is kept: such a turn is not learnt.
    """
    messages = []
    for number, turn in enumerate(turns):
        known = {}
        if isinstance(turn, dict):  # Parquet has all fields of all rows
            known = {name: value for name, value in turn.items() if value is not None}
        speaker = str(known.get("role", known.get("from"))).lower()
        calls = known.get("tool_calls") or known.get("function_call")
        refuse(speaker in TOOLS or calls, f"turn {number} is a tool's, or calls one (role "
               f"{speaker!r:.20}). Calls of tools are not read; remove the record.")
        role, text = ROLES.get(speaker), read_content(known.get("content", known.get("value")))
        refuse(not role or not isinstance(text, str), f"turn {number} is {show(turn)}. Expected "
               f"role (or from) of {', '.join(sorted(ROLES))}, and content (or value) as text.")
        message, weight = {"role": role, "content": text}, known.get("weight", 1)
        refuse(weight not in (0, 1), f"turn {number} has the weight {show(weight)}. Expected 0 "
               "(not learnt) or 1.")
        if role == "assistant" and not weight:
            message["weight"] = 0
        messages.append(message)
    return join_systems(messages, system)


def join_systems(messages: list[dict], system=None) -> list[dict]:
    """The messages behind a single one of the system, if any has words."""
    refuse(not isinstance(system, str | None), f"its system is {show(system)}. Expected a text.")
    texts, begin = [system or ""], 0
    while begin < len(messages) and messages[begin]["role"] == "system":
        texts.append(messages[begin]["content"])
        begin += 1
    said = "\n".join(dict.fromkeys(text for text in texts if text.strip()))
    return [{"role": "system", "content": said}][:len(said)] + messages[begin:]


def read_alpaca(row: dict) -> list[dict]:
    """The messages before the answer of a row in Alpaca's form, with system and history."""
    instruction, input, history = row["instruction"], row.get("input"), row.get("history") or []
    pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in history)
    refuse(not pairs, f"its history is {show(history)}. Expected a list of [user, assistant].")
    turns = []
    for user, assistant in history:
        turns.append({"role": "user", "content": user})
        turns.append({"role": "assistant", "content": assistant})
    asked = f"{instruction}\n{input}" if input else instruction
    turns.append({"role": "user", "content": asked})
    return read_turns(turns, row.get("system"))


def find_fault(messages: list[dict], *, answered: bool) -> tuple[list[dict], str]:
    """The messages without what leads nowhere, and why they cannot be used, or "".

    Dropped is what an assistant says first, and if all users are to be `answered` what one says
    last. Otherwise the user's turn comes last.
    """
    roles = [message["role"] for message in messages]
    system = int(roles[:1] == ["system"])
    begin = system + (roles[system:system + 1] == ["assistant"])
    end = len(roles)
    if answered:
        end -= roles[begin:][-1:] == ["user"]
    if begin == end:
        return [], "without an answer" if answered else "without a question"
    wanted = ["user", "assistant"] * (len(roles) // 2 + 1)
    last = "assistant" if answered else "user"
    if roles[begin:end] != wanted[:end - begin] or roles[end - 1] != last:
        return [], "whose turns do not alternate"
    if not all(message["content"].strip() for message in messages[begin:end]):
        return [], "with an empty turn"
    return messages[:system] + messages[begin:end], ""


def as_text(messages: list[dict]) -> str:
    """A dialogue as one text to read: the user's words, or turns behind their roles."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) == 1:
        return "\n".join([*system, turns[0]["content"]])
    return "\n".join([*system, *(f"{turn['role']}: {turn['content']}" for turn in turns)])


def learnt_answers(messages: list[dict], train_on: str) -> list[bool]:
    """For each answer of an assistant, in order, whether it is learnt."""
    answers = [message for message in messages if message["role"] == "assistant"]
    found = [message.get("weight", 1) == 1 for message in answers]
    if train_on == "last":
        found[:-1] = [False] * (len(found) - 1)
    return found
