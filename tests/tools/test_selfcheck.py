"""tools/selfcheck.py: one line where all agrees, one sentence where something does not."""

import re

import pytest
import torch

from extras.fast.llama import FastLlama
from tools.selfcheck import main


def test_one_line(capsys):
    assert main(["--device", "cpu", "--dtypes", "float32", "float16"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("fast code checked against the plain code on ")
    assert "11 parts in float32 (the " in out and "11 parts in float16 (the " in out
    assert "bfloat16" not in out


def test_a_part_that_differs(monkeypatch, capsys):
    monkeypatch.setattr(FastLlama, "keyword_logprobs",
                        lambda self, *given, **named: [(-1.0, -2.0)] * len(given[1]))
    assert main(["--device", "cpu", "--dtypes", "float32"]) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    assert said.err.startswith("error: the fast code's log-probabilities of keywords differ from ")
    assert said.err.endswith("run with --plain.\n")


@pytest.mark.parametrize("flags, words", [
    (["--device", "cuda:99"], r"--device cuda:99 is not here: this machine has \d+ GPUs"),
    (["--dtypes", "int3"], "invalid choice: 'int3'"), (["--bogus"], "unrecognized arguments")])
def test_wrong_flags(flags, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu(capsys):
    assert main(["--device", "cuda"]) == 0
    assert "11 parts in bfloat16" in capsys.readouterr().out
