"""What all readers of other people's files check. Whatever is wrong raises ValueError."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data import read_json

# What a field may hold: in words, and as a test.
TEXT = "a text", lambda value: isinstance(value, str)
FILLED = "a text that is not empty", lambda value: isinstance(value, str) and value.strip()
TEXT_OR_NULL = "a text or null", lambda value: value is None or isinstance(value, str)
NUMBER = "a number", lambda value: type(value) in (int, float) and abs(value) <= 1e300
# Models that are not in Hugging Face's layout, by what find_layout calls theirs.
LAYOUTS = {"gguf": "is in llama.cpp's GGUF format", "meta": "is in Meta's layout",
           "bin": "has its weights in .bin files"}


def refuse(when, sentence: str) -> None:
    """Raise ValueError with this sentence if something is wrong."""
    if when:
        raise ValueError(sentence)


@contextmanager
def reading(where, wanted: str) -> Iterator[None]:
    """Name the place in every ValueError, and in whatever malformed values raise inside."""
    try:
        yield
    except ValueError as error:
        named = str(where) in str(error)
        raise ValueError(str(error) if named else f"{where}: {error}") from None
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where} is malformed ({error!r:.80}). Expected {wanted}.") from None


def check(row, forms: dict[str, tuple], where) -> None:
    """Every field of an object must hold what it may."""
    names = ", ".join(forms)
    refuse(type(row) is not dict, f"{where} is {show(row)}. Expected an object with {names}.")
    for name, (words, test) in forms.items():
        found = f"is {show(row.get(name))}"
        if name not in row:
            found = f"is missing; found: {name_fields(row)}"
        refuse(not test(row.get(name)), f'{where}: field "{name}" {found}. Expected {words}.')


def name_fields(row) -> str:
    """The names of a record's fields, on one line."""
    return " ".join(", ".join(row).split())[:80]


def show(value) -> str:
    """The beginning of a value, as JSON."""
    return json.dumps(value, default=str)[:60]  # Parquet has dates


def read_value(raw: dict, key: str, default, low, high):
    """raw[key], of the type of `low`, from low to high; the default where it is absent or null."""
    value, kind = raw.get(key), type(low)
    if value is None:
        return default
    known = type(value) in ((int, float) if kind is float else (kind,))
    refuse(not known or not low <= value <= high,
           f"{key} is {value!r:.60}; expected {kind.__name__} from {low} to {high}.")
    return kind(value)


def read_object(file, most: int = 10**8) -> dict:
    """The JSON object in a file of at most `most` bytes; {} where there is no such file."""
    if not file.is_file():
        return {}
    size = file.stat().st_size
    refuse(size > most, f"{file} has {size:,} bytes, which is no {file.name}.")
    raw = read_json(file)
    refuse(type(raw) is not dict, f"{file} holds a {type(raw).__name__}. Expected a JSON object.")
    return raw


# ----- Layouts of models -----
def find_layout(path) -> str:
    """How a model is kept: hf, gguf, meta or bin; "" for none of these."""
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as stream:
            return "gguf" if path.suffix == ".gguf" or stream.read(4) == b"GGUF" else ""
    config = (path / "config.json").is_file()
    if config and any(path.glob("model*.safetensors*")):
        return "hf"
    if not config and (path / "params.json").is_file():
        return "meta"
    if any(path.glob("pytorch_model*.bin*")):
        return "bin"
    return "gguf" if any(path.glob("*.gguf")) else ""


def check_layout(path, others=tuple(LAYOUTS)) -> None:
    """Raise ValueError that says how to convert a model in one of the other layouts."""
    found = find_layout(path)
    refuse(Path(path).suffix == ".safetensors" and Path(path).is_file(),
           f"{path} is a file. Give the folder that it is in.")
    refuse(found in others, f"{path} {LAYOUTS.get(found)}. Convert it first: python -m "
           f"tools.convert {shlex.quote(str(path))} OUT")
