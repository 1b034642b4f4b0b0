"""Flags: the fields of a dataclass become the command line.

A method declares a dataclass `Flags`; methods/settings.py joins it with `CommonFlags` and parses
both at once, so `--stage X --help` shows what X reads, and nothing else is accepted.
"""

import argparse
import difflib
import functools
import textwrap
from dataclasses import MISSING, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints


def flag(default, help: str, **limits):
    """A field that becomes a flag.

    limits: at_least, above or below a number; share=True for 0 to 1; path=True for what must exist,
    folder=True for what is made; extras=True for what only extras/ can do.
    """
    if isinstance(default, list):
        return field(default_factory=list, metadata={"help": help, **limits})
    return field(default=default, metadata={"help": help, **limits})


rare = functools.partial(flag, rare=True)  # what --help only names at its end


def spelled(name: str) -> str:
    """A field's name as a flag."""
    return "--" + name.replace("_", "-")


def flag_names(flags: type) -> set[str]:
    """The names of the fields of a dataclass."""
    return {item.name for item in fields(flags)}


def same(one, other) -> bool:
    """Whether two values of a setting are the same; a method's file has many spellings."""
    if str(one).endswith(".py") and str(other).endswith(".py"):
        return Path(one).resolve() == Path(other).resolve()
    return one == other


def parse_flags(flags: type, argv: list[str], title: str, defaults: dict, unread=()) -> dict:
    """{field: value} of the flags that were given. Raises ValueError for a mistake.

    unread: fields that the stage does not read, though its class has them.
    """
    parser = argparse.ArgumentParser(usage=title, allow_abbrev=False, epilog="Rarely needed:")
    parser.formatter_class, parser.error = Help, refuse
    hints, read = get_type_hints(flags), [x for x in fields(flags) if x.name not in unread]
    for item in read:
        kind, name = hints[item.name], spelled(item.name)
        about, default = item.metadata["help"], defaults.get(item.name, item.default)
        if default not in ("", MISSING) and not (item.metadata.get("rare") and kind is bool):
            about += f" ({default})"
        if get_origin(kind) is Literal:
            about = f"{'|'.join(get_args(kind))}: {about}"
        options = {"default": argparse.SUPPRESS, "help": about.replace("%", "%%"), "metavar": ""}
        if item.metadata.get("rare"):  # listed in one paragraph at the end
            parser.epilog += f" {name}: {about};"
            options["help"] = argparse.SUPPRESS
        if kind is bool:
            options = options | {"action": argparse.BooleanOptionalAction}
            del options["metavar"]
        elif kind == list[str]:
            options |= {"nargs": "+", "action": "extend"}
        elif get_args(kind):  # a Literal
            options["choices"] = get_args(kind)
        else:
            options["type"] = kind
        parser.add_argument(name, **options)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse(unknown_flag(unknown, read))
    found, plain = vars(found), "--plain" in argv or find_spec("extras") is None
    for item in read:
        if item.metadata.get("extras") and item.name in found and plain:
            refuse(f"{spelled(item.name)} needs extras/, which is not there, or left out by "
                   "--plain.")
    return found


def refuse(message: str):
    """What argparse calls for a mistake in the flags."""
    raise ValueError(message)


class Help(argparse.HelpFormatter):
    """Two columns; the paragraph of rare flags breaks at blanks only."""

    def __init__(self, prog):
        super().__init__(prog, 2, 30, width=120)

    def _fill_text(self, text, width, indent):
        return textwrap.fill(text, width, break_on_hyphens=False)


def unknown_flag(words: list[str], read: list) -> str:
    """A sentence about words that are none of the fields that are read."""
    names = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not names:  # the words themselves are not repeated: one may be a secret
        return f"words that belong to no flag: {len(words)}. --help lists the flags."
    if "key" in names[0] or "token" in names[0]:
        return (f"there is no {names[0]}: keys are not accepted on the command line. Put the key "
                "into the environment variable JUDGE_API_KEY, or one that --judge-key-env names.")
    known = [spelled(item.name) for item in read]
    near = difflib.get_close_matches(names[0], known, 1, cutoff=0.8)
    hint = f"Did you mean {near[0]}?" if near else "--help lists what it reads."
    if names[0].startswith("--judge-"):
        hint = "Flags of a server need --judge http."
    return f"this stage does not read {names[0]}. {hint}"


def check_flags(cfg) -> None:
    """Raise ValueError for a value outside the limits of its flag, or a path that is not there."""
    for item in fields(cfg):
        value, limits = getattr(cfg, item.name), item.metadata
        wanted = expected(value, limits)
        if wanted:
            raise ValueError(f"{spelled(item.name)} is {value}. Expected {wanted}.")
        for path in value if isinstance(value, list) else [value]:
            if limits.get("path") and path and not Path(path).exists():
                raise ValueError(f"{spelled(item.name)} {path} does not exist. Give one that does.")
        if limits.get("folder"):
            check_folder(item.name, Path(value))


def expected(value, limits) -> str:
    """What a number outside its limits should be; "" for any other value."""
    if "at_least" in limits and not value >= limits["at_least"]:
        return f"{limits['at_least']} or more"
    if "below" in limits and not 0 <= value < limits["below"]:
        return f"at least 0, and less than {limits['below']}"
    if "share" in limits and not 0 <= value <= 1:
        return "a share between 0 and 1"
    if "above" in limits and not limits["above"] < value < float("inf"):
        return "a positive number"
    return ""


def check_folder(name: str, path: Path) -> None:
    """Raise ValueError if a file is in the way of a folder."""
    for place in (path, *path.parents):
        if place.is_file():
            raise ValueError(f"{spelled(name)} {path}: {place} is a file. Give another folder.")
