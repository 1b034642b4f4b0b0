"""docs/reading.md and exercises.py: answers by hand, and what the page says of the code."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/reading.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"Example:\s+`([^`]+)`", PAGE.partition("## Exercises")[2])
RIGHT = [  # worked out by hand from the page
    "0 1 1 none", "4-0+4-1+4-3 0-1+3-1+4-0+4-1+4-3", "test dev 5", "0.4 0.6 0.6 0.8", "1.4 2",
    "0.15 0.4", "1+2+4 1+4 1+2", "0.693 0.474 0.693", "0 233472 B", "384", "0.99 1 0.99 nan", "1 3"]


def load_exercises():
    """exercises.py as a module."""
    spec = importlib.util.spec_from_file_location("exercises", ROOT / "tests/exercises.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


exercises = load_exercises()


@pytest.mark.parametrize("number", range(1, 13))
def test_an_answer_by_hand_is_right_and_the_pages_example_is_wrong(number, capsys):
    assert exercises.main([str(number), *RIGHT[number - 1].split()]) == 0
    assert capsys.readouterr().out == "right\n"
    assert exercises.main([str(number), *EXAMPLES[number - 1].split()]) == 1
    assert re.fullmatch(rf"wrong\. Hint {number}\. \w[\s\S]+\n", capsys.readouterr().out)


def test_there_are_a_dozen():
    assert len(exercises.EXERCISES) == len(EXAMPLES) == 12
    heads = re.findall(r"(?m)^### (\d+)\. ", PAGE.partition("## Exercises")[2])
    assert heads == [str(n) for n in range(1, 13)]


def test_commas_do_no_harm():
    assert exercises.main(["1", "0,", "1,", "1,", "None"]) == 0


@pytest.mark.parametrize("argv, status", [([], 0), (["13", "1"], 2), (["1"], 2), (["x", "1"], 2)])
def test_no_answer_lists_the_exercises(argv, status, capsys):
    assert exercises.main(argv) == status
    said = capsys.readouterr().out
    assert "### 12. The wrong shift" in said and "Hints" not in said


def test_an_answer_follows_the_code(monkeypatch):
    """It is computed when it is asked for, not written down."""
    monkeypatch.setattr(exercises.losses, "dpo_loss", lambda h, beta: (h.exp(), {}))
    assert exercises.main(["8", *RIGHT[7].split()]) == 1
    assert exercises.main(["8", "1", "148.41", "1"]) == 0


def test_what_the_page_prints_is_true(monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE, re.S).group(1)
    wanted = re.search(r"It prints `(.*?)` and `(.*?)`", PAGE).groups()
    said = io.StringIO()
    monkeypatch.chdir(ROOT)
    with contextlib.redirect_stdout(said):
        exec(compile(code, "docs/reading.md", "exec"), {})
    assert tuple(said.getvalue().splitlines()) == wanted


def test_the_walk_names_functions_of_the_files():
    walk = PAGE.partition("## One paraphrase")[2].partition("The same in a Python shell")[0]
    stops = re.findall(r"(?m)^\d+\. `(\w+\.py)`: `(\w+)`", walk)
    assert len(stops) == 15
    for name, function in stops:
        assert re.search(rf"\b(def|class) {function}\b", (ROOT / name).read_text()), function


def test_the_order_names_files():
    for name in re.findall(r"`([\w/]+\.py)`", PAGE):
        assert (ROOT / name).exists(), name
