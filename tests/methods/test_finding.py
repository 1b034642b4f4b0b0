"""finding.py: a method by its name or path, and what it takes from its base and common.py."""

import re
from types import ModuleType

import pytest

from methods import candidates, common, finding


def test_every_file_with_terms_is_a_stage():
    assert {"sft", "sft-ia"} <= set(finding.stages())
    shared = {"candidates", "common", "critics", "groups", "heads", "judged", "pairing"}
    assert not shared & set(finding.stages())
    for name in finding.stages():
        method = finding.find_method(name)
        assert method.TERMS and callable(method.step) and callable(method.items)
        assert method.title and isinstance(method.DEFAULTS, dict) and method.Flags, name
        assert method.__doc__.splitlines()[0].endswith("."), name


def test_a_method_is_found_by_path_and_takes_from_its_base_what_it_does_not_say(scored_stage):
    method = finding.find_method(scored_stage)
    assert method.__doc__ == "A stage on scored candidates." and method.title == "mine"
    assert method.needs == "sft-ia" and method.kind == "candidates"
    assert method.collect is candidates.collect and method.check is candidates.check
    assert method.Flags.__name__ == "Flags" and method.Flags is not candidates.Flags


def test_an_unknown_name_is_told_with_all_that_there_are(tmp_path):
    with pytest.raises(ValueError, match='unknown stage "sfft"') as stop:
        finding.find_method("sfft")
    assert ", ".join(finding.stages()) in str(stop.value) and "path of a file" in str(stop.value)
    with pytest.raises(ValueError, match="unknown stage"):
        finding.find_method(str(tmp_path / "nowhere.py"))


def test_a_method_without_a_base_has_the_rest_from_common():
    bare = finding.inherit(ModuleType("bare"))
    assert bare.Flags is common.Flags and bare.DEFAULTS == bare.METRICS == {}
    assert (bare.title, bare.kind, bare.needs, bare.beside) == ("tuned", "", "", ())
    assert (bare.phase(None), bare.prefix(None), bare.also_needs(None)) == (0, "", {})
    for hook in (bare.check, bare.inspect, bare.attach, bare.collect, bare.begin):
        assert hook(None) is None
    assert not hasattr(bare, "report") and not hasattr(bare, "detach")


def test_a_methods_own_words_go_before_its_bases_and_those_before_common():
    own = ModuleType("own")
    own.base, own.needs, own.phase = candidates, "sft", lambda cfg: 3
    assert finding.inherit(own) is own
    assert own.needs == "sft" and own.phase(None) == 3
    assert own.beside == ("sft",) and own.inspect is candidates.inspect
    assert own.DEFAULTS is candidates.DEFAULTS and own.Flags is candidates.Flags
    assert own.begin is candidates.begin and own.attach is common.attach
    assert not hasattr(own, "candidate_key")  # no more than the contract says


WORKING = '''"""A stage."""
from methods import sequence_step as step
TERMS = {"ce": "items"}


def items(run):
    return []
'''


@pytest.mark.parametrize("old, new, wanted", [
    ("", "", None), ('"""A stage."""', "", "has no __doc__ that is a str"),
    ('TERMS = {"ce": "items"}', "", "has no TERMS that is a dict"),
    ('{"ce": "items"}', '["ce"]', "has no TERMS that is a dict"),
    ('"items"', '"words"', "divides ce by 'words'. Expected one of tokens, items, pairs"),
    ("def items", "def some", "has no function items"),
    ("sequence_step as step", "sequence_step", "has no function step"),
    ("TERMS", "beside = 'sft'\nTERMS", "has no beside that is a tuple. methods/__init__.py says"),
    ("TERMS", "kind = 'judge'\nTERMS", "has the kind 'judge'. Expected sft, candidates or judged"),
    ("TERMS", "x = y\nTERMS", "cannot be loaded: NameError"),
    ("TERMS", "x =\nTERMS", "cannot be loaded: SyntaxError"),
    ("sequence_step", "no_step", "cannot be loaded: ImportError")])
def test_a_broken_method_is_refused_before_anything_runs(old, new, wanted, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(WORKING.replace(old, new, 1) if old else WORKING)
    if wanted is None:
        assert finding.find_method(str(path)).TERMS == {"ce": "items"}
        return
    with pytest.raises(ValueError, match=f"mine.py {re.escape(wanted)}"):
        finding.find_method(str(path))
