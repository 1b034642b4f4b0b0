"""Finding a method by its name or path, and filling in what it does not say."""

import importlib
import importlib.util
import sys
from pathlib import Path

from methods import common

INHERITED = ("Flags", "DEFAULTS", "kind", "needs", "beside", "unread", "check", "inspect",
             "collect", "begin", "remark", "report")
DIVISORS = ("tokens", "items", "pairs", "documents")  # of a term of the loss
KINDS = ("", "sft", "candidates", "judged")  # of the demo's settings


def find_method(name: str):
    """The module of a stage: a file of this folder by its name, or the path of another file."""
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        spec = importlib.util.spec_from_file_location(f"own.{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (SyntaxError, ImportError, NameError, AttributeError) as error:
            raise ValueError(f"{name} cannot be loaded: {error!r}.") from error
    elif name in stages():
        module = importlib.import_module("methods." + name.replace("-", "_"))
    else:
        raise ValueError(f'unknown stage "{name}". Stages: {", ".join(stages())}; or give the path '
                         "of a file like those in methods/.")
    check_method(name, inherit(module))
    return module


def check_method(name: str, method) -> None:
    """Raise ValueError if a method lacks what it must have, or has it in another form."""
    wanted = {"__doc__": str, "title": str, "TERMS": dict, "METRICS": dict, "DEFAULTS": dict,
              "beside": tuple, "Flags": type}
    for part, kind in wanted.items():
        if not isinstance(getattr(method, part, None), kind):
            raise ValueError(f"{name} has no {part} that is a {kind.__name__}. methods/__init__.py "
                             "says what a method has.")
    for part in ("items", "step"):
        if not hasattr(method, part):
            raise ValueError(f"{name} has no function {part}. methods/__init__.py says what a "
                             "method has.")
    for term, count in (method.TERMS | method.METRICS).items():
        if not callable(count) and count not in DIVISORS:
            raise ValueError(f"{name} divides {term} by {count!r}. Expected one of "
                             f"{', '.join(DIVISORS)}, or a function.")
    if method.kind not in KINDS:
        raise ValueError(f"{name} has the kind {method.kind!r}. Expected sft, candidates or "
                         "judged.")


def inherit(method):
    """The method, with what it does not say itself from its base, or else from common.py."""
    base = getattr(method, "base", None)
    for place, names in ((base, INHERITED), (common, vars(common))):
        for name in names:
            if not hasattr(method, name) and hasattr(place, name):
                setattr(method, name, getattr(place, name))
    return method


def stages() -> list[str]:
    """The names of the methods in this folder: the files that say what their terms are."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(x.stem.replace("_", "-") for x in files if "\nTERMS = " in x.read_text())
