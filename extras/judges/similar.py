"""Who says whether two answers agree, without a model: rules, or a function of the user's own.

    rule             judge.RuleJudge: numbers, short answers, ROUGE-L at a threshold
    exact            equal but for case, spacing, punctuation at the end and the form of numbers
    rouge            the same numbers, and ROUGE-L at a threshold, however short the texts are
    module:function  a Python function (a, b) or (question, a, b) -> True, False, or None for unread
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable

from judge import RuleJudge, normalize, rouge_l, split_numbers

NAMES = ("rule", "exact", "rouge")
BY_ROUGE = ("", "rule", "rouge")  # what --similar may be where --rouge-threshold is read
NEVER = 2.0  # a ROUGE-L that no pair reaches


def make_similar(name: str, rouge_threshold: float):
    """An object with `name` and `similar_pairs(pairs)` (seam 7). Raises ValueError."""
    if name == "rule":
        return RuleJudge(rouge_threshold)
    if name == "exact":
        return Own(name, lambda question, a, b: close(a, b, NEVER))
    if name == "rouge":
        return Own(name, lambda question, a, b: close(a, b, rouge_threshold))
    return Own(name, find_function(name))


def close(a: str, b: str, threshold: float) -> bool:
    """Whether two texts have the same numbers, and are equal or have a ROUGE-L as high as this."""
    a, b = normalize(a), normalize(b)
    (first, numbers), (second, others) = split_numbers(a), split_numbers(b)
    same = numbers == others
    return a == b or same and (first == second or rouge_l(first, second) >= threshold)


class Own:
    """Agreement by a function of (question, a, b)."""

    def __init__(self, name: str, function: Callable):
        self.name, self.function = name, function

    def similar_pairs(self, pairs: list[tuple[dict, str, str]]) -> list[bool | None]:
        """What the function says of each (question, a, b). Raises ValueError that names the pair.

        A NumPy bool is a bool; whatever else is not True, False or None is refused.
        """
        found = []
        for question, a, b in pairs:
            try:
                said = self.function(question, a, b)
            except Exception as error:
                raise ValueError(f"{self.name} stopped with {type(error).__name__}: "
                                 f"{str(error)[:100]!r}, on {describe(question, a, b)}. Fix it; "
                                 "for a pair that it cannot read it should return None.") from error
            if said is not None and type(said).__name__ not in ("bool", "bool_"):
                raise ValueError(f"{self.name} returned {said!r:.60} for "
                                 f"{describe(question, a, b)}. Expected True, False, or None for "
                                 "a pair that it cannot read.")
            found.append(said if said is None else bool(said))
        return found


def describe(question: dict, a: str, b: str) -> str:
    """A pair of answers in a few words."""
    where = " ".join(str(question[name]) for name in ("task", "id") if question.get(name))
    return f"the pair {a[:60]!r} and {b[:60]!r}" + f" of question {where}" * bool(where)


def find_function(name: str) -> Callable:
    """The function of (question, a, b) that "module:function" names. Raises ValueError.

    The module may lie in the current folder. A function of two arguments gets the answers alone.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ValueError(f"{name!r:.60} says no way to compare answers. Expected one of "
                         f"{', '.join(NAMES)}, or module:function.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file there must not stand in for one of ours
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module + ".").startswith(error.name + "."):
            raise ValueError(f"there is no module {module} for {name}, neither installed nor in "
                             f"{os.getcwd()}.") from None
        raise ValueError(f"{name} cannot be loaded: {error}.") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be loaded: {error!r:.100}.") from error
    function = getattr(found, attribute, None)
    if function is None:
        place = getattr(found, "__file__", "a part of Python")
        raise ValueError(f"module {module} ({place}) has no function {attribute}. If that is not "
                         "your module, give yours another name.")
    if not callable(function):
        raise ValueError(f"{name} is {function!r:.60}, and no function. Expected one of two "
                         "answers, or of a question and two answers.")
    count = count_arguments(name, function)
    if count == 3:
        return function
    return lambda question, a, b: function(a, b)


def count_arguments(name: str, function: Callable) -> int:
    """2 or 3: how many arguments a function takes. Raises ValueError for any other number."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C do not say
        return 2
    for count in (2, 3):
        try:
            signature.bind(*range(count))
            return count
        except TypeError:
            continue
    raise ValueError(f"{name} takes {signature}. Expected two answers (a, b), or a question and "
                     "two answers (question, a, b).")
