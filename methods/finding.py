"""Finding a method by its name or path, and filling in what it does not say."""

import importlib
import importlib.util
import sys
from pathlib import Path

from methods import common

INHERITED = ("Flags", "DEFAULTS", "kind", "needs", "beside", "check", "inspect", "collect",
             "report")


def find_method(name: str):
    """The module of a stage: a file of this folder by its name, or the path of another file."""
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        spec = importlib.util.spec_from_file_location(f"own.{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    elif name in stages():
        module = importlib.import_module("methods." + name.replace("-", "_"))
    else:
        raise ValueError(f'unknown stage "{name}". Stages: {", ".join(stages())}; or give the path '
                         "of a file like those in methods/.")
    inherit(module)
    for needed in ("__doc__", "TERMS", "items", "step", "Flags"):
        if not getattr(module, needed, None):
            raise ValueError(f"{name} is no method: it has no {needed}. methods/__init__.py says "
                             "what a method has.")
    return module


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
