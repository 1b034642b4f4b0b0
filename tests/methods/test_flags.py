"""flags.py: help, limits, and what a command line becomes."""

import dataclasses
import math

import pytest

import train
from eval import DEMO
from methods import finding, settings
from methods.flags import check_flags, flag, parse_flags, spelled

FREE_NUMBERS = {"seed", "weight_decay", "rouge_threshold", "unfinished_reward", "sft_weight"}


def flags_of(stage):
    """The dataclass of all flags that a stage reads."""
    return settings.config_class(finding.find_method(stage), plain=True)


@pytest.mark.parametrize("stage", finding.stages())
def test_help_is_short_and_names_every_flag(stage, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--stage", stage, "--help", "--plain"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and len(text.splitlines()) < 60
    words = set(text.replace(",", " ").replace(":", " ").split())
    for item in dataclasses.fields(flags_of(stage)):
        read = item.name not in finding.find_method(stage).unread
        assert (spelled(item.name) in words) == read
    assert finding.find_method(stage).__doc__.splitlines()[0] in text


@pytest.mark.parametrize("stage", finding.stages())
def test_every_limit_of_every_flag_is_held(stage):
    cfg = flags_of(stage)()
    check_flags(cfg)  # defaults are inside
    for item in dataclasses.fields(cfg):
        limits, wrong, right = item.metadata, [], []
        if "at_least" in limits:
            wrong += [limits["at_least"] - 1, math.nan]
            right.append(limits["at_least"])
        if limits.get("share"):
            wrong += [-0.1, 1.1, math.nan]
            right += [0, 1]
        if "below" in limits:
            wrong += [limits["below"], -0.1, math.nan]
            right += [0, 0.999 * limits["below"]]
        if "above" in limits:
            wrong += [limits["above"], -1, math.inf, math.nan]
            right.append(limits["above"] + 1e-9)
        if limits.get("path"):
            wrong.append("no/such/place")
            right += ["", str(DEMO)]
        if limits.get("folder"):
            wrong += [__file__, f"{__file__}/below"]
            right += ["no/such/place", str(DEMO)]
        for value in wrong:
            with pytest.raises(ValueError, match=f"^{spelled(item.name)} .*"):
                check_flags(dataclasses.replace(cfg, **{item.name: value}))
        for value in right:
            check_flags(dataclasses.replace(cfg, **{item.name: value}))
        numbers = isinstance(item.default, int | float) and not isinstance(item.default, bool)
        assert limits["help"] and (not numbers or wrong or item.name in FREE_NUMBERS), item.name


@pytest.mark.parametrize("words", [
    ("--save-every", "3"), ("--checkpointing",), ("--quantize", "int8"), ("--shard",)])
def test_what_only_extras_can_do_is_refused_without_them(words, refused):
    refused(f"{words[0]} needs extras/, which is not there, or left out by --plain.", "sft", *words)


@dataclasses.dataclass
class Some:
    """Flags of every type."""

    number: int = flag(1, "a number")
    share: float = flag(0.5, "a share of 100 %")
    on: bool = flag(True, "a switch")
    names: list[str] = flag([], "some names")


def parsed(*words):
    return parse_flags(Some, list(words), "title", {})


def test_flags_become_fields_of_their_types():
    assert parsed() == {}
    assert parsed("--number", "-3", "--share", "2", "--no-on", "--names", "a", "b") == {
        "number": -3, "share": 2.0, "on": False, "names": ["a", "b"]}
    assert Some().names is not Some().names


@pytest.mark.parametrize("words, said", [
    (("--numbe", "3"), "this stage does not read --numbe. Did you mean --number?"),  # in full
    (("--colour", "3"), "this stage does not read --colour. --help lists what it reads."),
    (("a", "b"), "words that belong to no flag: 2. --help lists the flags."),
    (("--number", "x"), "argument --number: invalid int value: 'x'")])
def test_what_no_flag_reads_is_one_sentence(words, said):
    with pytest.raises(ValueError) as stop:
        parsed(*words)
    assert str(stop.value).startswith(said) and "\n" not in str(stop.value)


@pytest.mark.parametrize("words", [
    ("--api-key", "sk-secret"), ("--judge-key=sk-secret",), ("--token", "sk-secret"),
    ("sk-secret",)])
def test_a_key_on_the_command_line_is_refused_and_not_repeated(words):
    with pytest.raises(ValueError) as stop:
        parsed(*words)
    assert "sk-secret" not in str(stop.value)
    if words != ("sk-secret",):
        assert "keys are not accepted on the command line" in str(stop.value)


def test_help_shows_the_stages_own_default(capsys):
    for defaults, shown in (({}, "(1)"), ({"number": 7}, "(7)")):
        with pytest.raises(SystemExit):
            parse_flags(Some, ["--help"], "title", defaults)
        assert f"a number {shown}" in capsys.readouterr().out
