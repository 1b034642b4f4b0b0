"""What some servers do not take of a request, how they say so, and what they get in its place."""

import re

# Names that some servers refuse in a body; "system" is the role of a message.
OPTIONAL = ("max_tokens", "temperature", "top_p", "seed", "system")
# An error that refuses a name, or all its values but one, not a value ("must be", "at most") ...
UNSUPPORTED = re.compile(
    r"unsupported|unrecogni[sz]ed|unknown.(?:parameter|argument|field|name)|deprecated|"
    r"unexpected (?:keyword|argument|parameter|field)|(?:not|n't) (?:be )?support|"
    r"(?:inputs are|fields) not permitted|(?:was|were) unexpected|"
    r"only (?:the default|1(?:\.0)? is|be set to 1\b)", re.I)
# ... one that refuses a system prompt, in the words of templates and servers ...
NO_SYSTEM = re.compile(
    r"(?:system|developer)['\"]? (?:role|message|prompt|instruction)s?\b.{0,30}"
    r"(?:not|n't|unsupported)\b|roles must alternate|only user and assistant roles|"
    r"role:? ['\"]?system['\"]?.{0,30}(?:not|n't|unsupported)\b|"
    r"(?:invalid|unexpected|unknown|unsupported) role.{0,10}system", re.I)
# ... and one that refuses a prompt for its length: others may fit.
TOO_LONG = re.compile("context|too long|maximum.{0,20}tokens", re.I)
# What a server gets in place of what it does not take.
INSTEAD = {"max_tokens": ("max_completion_tokens", "max_completion_tokens"),
           "system": ("user", "the system prompt in the user's message")}


def find_refused(status: int, error: str, sent: list[str]) -> str:
    """The first of the names in `sent` that an error refuses, or ""."""
    # A template that raises is an error of the server to some.
    if "system" in sent and status in (400, 422, 424, 500) and NO_SYSTEM.search(error):
        return "system"
    if status not in (400, 422) or not UNSUPPORTED.search(error) or TOO_LONG.search(error):
        return ""
    return next((name for name in sent if name != "system" and name in error), "")


def fold_system(messages: list[dict]) -> list[dict]:
    """The messages with what the system says at the head of the first other one."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    if not system or not others:
        return messages
    first, *rest = others
    return [{**first, "content": "\n\n".join([*system, first["content"]])}, *rest]


def translate(request: dict, dialect: dict) -> dict:
    """The body of a request in the names that a server takes."""
    body = {}
    for name, value in request.items():
        if dialect.get(name, name):
            body[dialect.get(name, name)] = value
    if "system" in dialect:
        body["messages"] = fold_system(body["messages"])
    return body


def name_optional(body: dict, dialect: dict) -> list[str]:
    """The names of a body that the server may refuse: not those that are settled already."""
    names = {*body, *(message["role"] for message in body["messages"])}
    return [name for name in OPTIONAL if name in names and name not in dialect]
