"""Programs as processes: Ctrl-C, pipes, closed streams, and commands that they print."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import eval as evaluation
import train
from tools import masks, meta_evaluate

ROOT = Path(__file__).parent.parent.parent


def start(*words, **options):
    """A Python process of the repository; its words are one command line."""
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def shell(line):
    """(status, stdout, stderr) of a line of bash; $python is this Python."""
    line = line.replace("$python", f"'{sys.executable}'")
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=ROOT, text=True,
                          capture_output=True)
    return done.returncode, done.stdout, done.stderr


def test_ctrl_c_ends_with_one_line(tmp_path):
    process = start("eval.py", "--per-task", 200, "--out", tmp_path / "out")
    while not (tmp_path / "out").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "error: stopped by Ctrl-C.\n")


def test_a_reader_that_leaves_ends_a_program_quietly(questions, tmp_path):
    process = start("-m", "tools.best_of", *questions, "--samples", 2, "--out", tmp_path)
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == ""
    status, said, error = shell("$python -m tools.estimate --help | head -1")
    assert status in (0, 141) and said.count("\n") == 1 and error == ""  # who is first may vary


def test_a_closed_stderr_is_no_mistake(questions, tmp_path):
    words = " ".join(f"'{word}'" for word in questions)
    status, said, _ = shell(f"$python eval.py {words} --out '{tmp_path}' 2>&-")
    assert status == 0 and said.startswith("model |")


def test_the_next_command_can_be_pasted(questions, arguments, tmp_path, capsys):
    """Whatever the folders are called."""
    out = tmp_path / 'a b "c\' $(touch pwned) `touch pwned`'
    assert train.main(["--stage", "sft", *arguments(out), "--steps", "1"]) == 0
    line = capsys.readouterr().out.partition("\nnext: python ")[2].splitlines()[0]
    assert line.startswith("eval.py --model ")
    status, said, error = shell(f"$python {line} --per-task 2 --out '{tmp_path}/e'")
    assert status == 0 and said.startswith("model "), error
    found = json.loads((tmp_path / "e/metrics.json").read_text())
    assert str(out) in found and not list(ROOT.glob("pwned"))


@pytest.mark.parametrize("flags, said", [
    (["--adapter", "ADAPTER", "/nope"], "no adapter at /nope (no adapter_config.json)"),
    (["--max-len", "0"], "--max-len is 0. Expected 1 or more."),
    (["--rouge-threshold", "nan"], "--rouge-threshold is nan. Expected a share between 0 and 1."),
    (["--rouge-threshold", "5"], "--rouge-threshold is 5.0. Expected a share"),
    (["--out", "FILE"], "cannot be made (File exists). Give another folder."),
    (["--out", "FILE/below"], "cannot be made (Not a directory). Give another folder.")])
def test_what_would_fail_late_is_refused_first(flags, said, questions, adapter, tmp_path, capsys,
                                               monkeypatch):
    (tmp_path / "file").touch()
    places = {"ADAPTER": str(adapter), "FILE": str(tmp_path / "file"),
              "FILE/below": str(tmp_path / "file/below")}
    monkeypatch.setattr(evaluation, "read_questions", None)  # it is never called
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*questions, "--out", str(tmp_path / "out"),
                         *(places.get(word, word) for word in flags)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize("program, flags, said", [
    (masks, ["--records", "x", "--detect-lam", "0"], "--detect-lam is 0. Expected a positive"),
    (masks, ["--records", "x", "--detect-lam", "nan"], "--detect-lam is nan. Expected 0 or more."),
    (masks, ["--records", "x", "--detect-lam", "-1"], "--detect-lam is -1.0. Expected 0 or more."),
    (meta_evaluate, ["--data", "x", "--instances", "-1"], "--instances is -1. Expected 0 or more."),
    (meta_evaluate, ["--data", "x", "--repeats", "0"], "--repeats is 0. Expected 1 or more.")])
def test_numbers_out_of_their_range_are_refused(program, flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main([*flags, "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize("out", ["file", "file/run", "proc"])
def test_a_run_folder_that_cannot_be_made(out, arguments, tmp_path, capsys):
    (tmp_path / "file").touch()
    place = Path("/proc/nowhere") if out == "proc" else tmp_path / out
    status = 2
    try:
        status = train.main(["--stage", "sft", *arguments(place), "--steps", "1"])
    except SystemExit as stop:
        assert stop.code == 2
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and str(place) in error
    assert "is kept" not in error
