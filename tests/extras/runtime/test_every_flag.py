"""Every flag of every stage reaches something: in some short run, code that is not about settings
reads it.

A read by dataclasses, by the files that parse, save, compare and check settings, or by the identity
of a run does not count. The control is a stage with a flag that nobody reads.
"""

import contextlib
import sys
from pathlib import Path

import pytest
import short_runs as runs

import data
import train
from extras import judges
from methods import finding, settings
from methods.flags import spelled

ABOUT_SETTINGS = {"settings.py", "folders.py", "flags.py", "defaults.py", "dataclasses.py",
                  "identity.py"}
# Settings.py alone reads these: they decide which stage and which run it is, and where from.
DECIDED_THERE = {"init", "sft_steps", "sft_lr", "stage"}
SHORT = ["--steps", "2", "--batch-size", "4"]
COLLECT = [*SHORT, "--sft-steps", "1", "--pool-per-task", "3", "--no-compare"]


@contextlib.contextmanager
def recorded_reads(patch):
    """{(stage, flag)} that are read meanwhile."""
    reads, real = set(), settings.config_class

    def config_class(method, **options):
        flags = real(method, **options)
        names = settings.flag_names(flags)

        def read(cfg, name):
            file = Path(sys._getframe(1).f_code.co_filename).name
            if name in names and file not in ABOUT_SETTINGS:
                reads.add((object.__getattribute__(cfg, "stage"), name))
            return object.__getattribute__(cfg, name)
        return type("Config", (flags,), {"__getattribute__": read})
    with patch.context() as patch:
        patch.setattr(settings, "config_class", config_class)
        yield reads


def unread_flags(stage, reads):
    """The flags that neither a stage nor, with the value that it hands on, an earlier one reads."""
    method = finding.find_method(stage)
    known, own = set(), {"steps", "lr", "batch_size", "epochs", "validation"}
    for name in (stage, method.needs, "sft", "reward"):
        known |= {flag for reader, flag in reads if reader == name and (
            reader == stage or flag not in own)}
    return settings.flag_names(settings.config_class(method)) - known - DECIDED_THERE


@pytest.fixture
def commands(taught, taught_command, candidates, judged, tmp_path):
    """A function: the short runs of a stage, which together should read all of its flags."""
    def make(stage):
        method = finding.find_method(stage)
        names = settings.flag_names(settings.config_class(method))
        more = [SHORT]
        if stage == "pretrain":
            data.append_records(tmp_path / "corpus.jsonl", [[["a hat", True]]] * 4)
            words = ["--stage", stage, "--corpus", str(tmp_path / "corpus.jsonl"),
                     "--tokenizer", f"{taught}/model/tokenizer.model", "--preset", "tiny", *SHORT]
            return [[*words, "--out", str(tmp_path / "new")],
                    [*words, "--out", str(tmp_path / "old"), "--model",
                     f"{taught}/model"]]
        if method.needs:
            more = [COLLECT]
        for flag, file in (("candidates", candidates), ("records", judged)):
            if flag in names:
                more.append([*COLLECT, f"--{flag}", str(file)])
        if "responses" in names:
            rows = data.read_records(candidates)
            for k in range(3):
                data.append_records(tmp_path / f"answers-{k}.jsonl", [
                    row | {"response": f"red {k}", "sample": number}
                    for number, row in enumerate(rows)])
            first, *others = (str(tmp_path / f"answers-{k}.jsonl") for k in range(3))
            weak = taught_command(tmp_path / "weak", "--stage", "sft", *SHORT)
            assert runs.call(train, weak) == (0, "")
            models = [first, str(tmp_path / "weak"), *others]
            more = [[*words, "--responses", *models] for words in more]
        if stage == "ppo":
            more.append([*COLLECT, "--no-fit-reward", "--max-new-tokens", "1"])
        if stage == "rlaif":
            more.append([*COLLECT, "--labels", "scores"])
        return [taught_command(tmp_path / str(number), "--stage", stage, *words)
                for number, words in enumerate(more)]
    return make


@pytest.mark.parametrize("stage", [
    pytest.param(name, marks=() if name in ("cut", "dpo", "sft") else pytest.mark.faults)
    for name in finding.stages()])
def test_every_flag_of_a_stage_is_read(stage, commands, monkeypatch):
    real = judges.revise
    monkeypatch.setattr(judges, "revise", lambda *args: [  # the tiny model cannot
        record | {"revision": "red"} for record in real(*args)])
    with recorded_reads(monkeypatch) as reads:
        for argv in commands(stage):
            assert runs.call(train, argv) == (0, ""), argv
    method = finding.find_method(stage)
    assert unread_flags(stage, reads) == set(method.unread)
    for name in method.unread:  # so they are refused
        assert f"does not read {spelled(name)}" in runs.call(
            train, ["--stage", stage, spelled(name), "3"])[1]


OWN = '''"""Imitate, with a flag that nobody reads."""
from dataclasses import dataclass
from methods import sft, token_step
from methods.flags import flag

title, TERMS, step, items = "mine", {"ce": "tokens"}, token_step, sft.items
check = sft.check


@dataclass
class Flags(sft.Flags):
    """Two more."""

    strength: float = flag(1.0, "never read")
    taste: float = flag(1.0, "only compared with an earlier run's", above=0)
'''


def test_a_flag_that_nobody_reads_is_found(taught_command, tmp_path, monkeypatch):
    """The control."""
    (tmp_path / "mine.py").write_text(OWN)
    stage = str(tmp_path / "mine.py")
    with recorded_reads(monkeypatch) as reads:
        assert runs.call(train, ["--stage", stage, *taught_command(tmp_path), *SHORT]) == (0, "")
    assert unread_flags(stage, reads) == {"strength", "taste"}
