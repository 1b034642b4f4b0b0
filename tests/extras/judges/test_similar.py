"""Ways to compare answers: by name, and functions of the user's own."""

import random
import re
import sys

import pytest

from extras.judges.similar import make_similar
from judge import RuleJudge, rouge_l


def says(name, *pairs, threshold=0.7):
    return make_similar(name, threshold).similar_pairs([({}, a, b) for a, b in pairs])


@pytest.mark.parametrize("name, wanted", [
    ("rule", [True, True, True, True, False, False, True]),
    ("exact", [True, True, False, False, False, False, False]),
    ("rouge", [True, True, False, False, False, True, True])])
def test_the_ways_by_name(name, wanted):
    pairs = [("Red.", "red"), ("eight legs", "8.0 legs"), ("8 legs", "8"), ("It is one", "1"),
             ("the answer is 42", "the answer is 43"), ("no cat", "no red cat"),
             ("the red lamp is here", "the red lamp is there")]
    found = make_similar(name, 0.7)
    assert found.name == name
    assert found.similar_pairs([({}, a, b) for a, b in pairs]) == wanted


def test_the_threshold_is_that_of_rouge_and_numbers_come_first():
    rng = random.Random()
    for _ in range(200):
        a, b = (" ".join(rng.choices("the a red lamp is here".split(), k=rng.randint(1, 6)))
                for _ in range(2))
        threshold = rng.random()
        assert says("rouge", (a, b), threshold=threshold) == [a == b or rouge_l(a, b) >= threshold]
        assert says("rouge", (f"{a} 3", f"{b} 4"), threshold=0) == [False]
        assert says("exact", (a, b), (a.upper() + " 3.0", f"{a}  3 .")) == [a == b, True]
        rule = RuleJudge(threshold).similar_pairs([({"labels": ["x"]}, a, b), ({}, a, b)])
        made = make_similar("rule", threshold)
        assert made.similar_pairs([({"labels": ["x"]}, a, b), ({}, a, b)]) == rule


@pytest.fixture
def own(tmp_path, monkeypatch):
    """write(code) -> the name of a new module in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(code):
        name = f"own{random.randrange(10**12)}"
        (tmp_path / f"{name}.py").write_text(code)
        return name
    return write


def test_functions_of_ones_own_get_what_they_take(own):
    name = own("""
import numpy
def two(a, b):
    return None if "?" in a + b else a[0] == b[0]
def three(question, a, b):
    return numpy.bool_(question["input"] == a)
def more(a, b, strict=False):
    return bool(strict)
class Same:
    def __call__(self, a, b):
        return True
same = Same()
""")
    pairs = [({"input": "x"}, "x", "xy"), ({"input": "y"}, "x", "z"), ({"input": "z"}, "?", "z")]
    for part, wanted in (("two", [True, False, None]), ("three", [True, False, False]),
                         ("same", [True] * 3)):
        found = make_similar(f"{name}:{part}", 0.7)
        said = found.similar_pairs(pairs)
        assert found.name == f"{name}:{part}" and said == wanted
        assert all(type(x) in (bool, type(None)) for x in said)
    assert make_similar("operator:eq", 0).similar_pairs(pairs) == [False] * 3  # written in C


@pytest.mark.parametrize("part, said", [
    ("", "says no way to compare answers. Expected one of rule, exact, rouge, or"),
    ("gone", "has no function gone. If that is not your module"),
    ("number", "is 3, and no function. Expected one of two answers"),
    ("one", "takes (a). Expected two answers (a, b), or a question"),
    ("four", "takes (a, b, c, d). Expected two")])
def test_what_is_no_function_of_answers(own, part, said):
    name = own("number = 3\ndef one(a): pass\ndef four(a, b, c, d): pass\n")
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        make_similar(f"{name}:{part}", 0.7)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nearly", "a b:c", ":", "os.path:", "x:y:z", ""])
def test_a_name_that_is_none(name):
    with pytest.raises(ValueError, match="says no way to compare answers"):
        make_similar(name, 0.7)


def test_modules_that_are_not_there_or_broken(own):
    with pytest.raises(ValueError, match="there is no module gone.deep for gone.deep:f, neither"):
        make_similar("gone.deep:f", 0.7)
    for code, said in (("import nowhere_at_all\n", "No module named 'nowhere_at_all'"),
                       ("def f(:\n", "SyntaxError"), ("1 / 0\n", "ZeroDivisionError")):
        with pytest.raises(ValueError, match=f"cannot be loaded: .*{said}"):
            make_similar(f"{own(code)}:f", 0.7)
    with pytest.raises(ValueError, match=r"module sys \(a part of Python\) has no function f"):
        make_similar("sys:f", 0.7)


@pytest.mark.parametrize("body, said", [
    ("a[5]", "stopped with IndexError: 'string index out of range', on the pair 'red' and 'blue' "
     "of question colour q7. Fix it; for a pair that it cannot read it should return None."),
    ("0.8", "returned 0.8 for the pair 'red' and 'blue' of question colour q7. Expected True, "),
    ("'yes'", "returned 'yes' for the pair"), ("1", "returned 1 for the pair")])
def test_what_a_function_of_ones_own_does_wrong_is_one_sentence(own, body, said):
    judge = make_similar(own(f"def f(a, b):\n    return {body}\n") + ":f", 0.7)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        judge.similar_pairs([({"task": "colour", "id": "q7"}, "red", "blue")])
    assert "\n" not in str(caught.value)
