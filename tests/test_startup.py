"""bench/startup.py: it waits for the right output, ends what goes on, and prints its table."""

import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))  # last: both have a judge.py
startup = pytest.importorskip("startup")

CHAT = """
import sys, time
print("model: /help lists the commands.")
input("> ")
print(end="token", flush=True)
time.sleep(60)
"""


def test_a_program_that_goes_on_is_ended_once_it_has_answered():
    _, _, prompt, answer = startup.model_rows("DIR", "OUT")
    prompt.words = answer.words = ["-c", CHAT]
    began = time.perf_counter()
    for row in (prompt, answer):
        assert 0 < startup.seconds_until(row) < 30
    assert time.perf_counter() - began < 55


def test_the_prompt_is_not_taken_for_the_answer():
    row = startup.model_rows("DIR", "OUT")[-1]
    row.words, row.said = ["-c", CHAT.split("print(end")[0]], b"hello\n"
    with pytest.raises(ValueError, match="the first token ended, or was silent"):
        startup.seconds_until(row)


def test_a_progress_bar_is_seen():
    pytest.importorskip("tqdm")
    row = startup.model_rows("DIR", "OUT")[0]
    row.words = ["-c", "from tqdm import tqdm; import time\n"
                 "for _ in tqdm('ab', desc='responses', disable=None): time.sleep(60)"]
    assert 0 < startup.seconds_until(row) < 30


def test_flags_are_timed(capsys):
    startup.main(["--quick"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["| train.py --help",
                                            "| train.py --stage cat --no-such-flag"]
    assert all(0 < float(row[1]) < 60 for row in rows[2:])


def test_without_the_model_its_rows_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(startup, "seconds_until", lambda row: 1.0)
    startup.main(["--model", "no/such", "--rounds", "3"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "no model at no/such: eval.py and tools.chat are left out."
    assert said[-1] == "| python -c 'import torch' | 1.00 | 1.00 | 1.00 |" and len(said) == 6
