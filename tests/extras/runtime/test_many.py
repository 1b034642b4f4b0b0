"""Several processes train, sample and judge as one does, and say one line when something fails."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import short_runs as runs
import torch
from safetensors.torch import load_file

import data
import train

FAULTS = pytest.mark.faults
ROOT = Path(train.__file__).parent
COLLECT = {
    "greedy": ["--stage", "cat", "--judge", "rule", "--temperature", "0"],
    "sampled": ["--stage", "cat", "--judge", "rule"],
    "self": ["--stage", "cat", "--judge", "self"],
    "ilf": ["--stage", "ilf", "--judge", "rule", "--refinements", "2", "--downsample", "0"],
    "scores": ["--stage", "rlaif", "--judge", "self", "--labels", "scores"],
    "letters": ["--stage", "rlaif", "--judge", "self", "--labels", "letters"],
    "contrasts": ["--stage", "rlcd", "--temperature", "2"],
    "judged": ["--stage", "cut", "--judge", "rule", "--downsample", "0"],
}
RECORDS = ("candidates.jsonl", "judged.jsonl", "refined.jsonl", "preferences.jsonl",
           "contrasts.jsonl")


def nearly(one, other, most: float = 1e-4) -> bool:
    """Equal, but for rounding in float32."""
    if isinstance(one, (dict, list)):
        keys = one.keys() if isinstance(one, dict) else range(len(one))
        return len(one) == len(other) and all(nearly(one[k], other[k], most) for k in keys)
    floats = isinstance(one, float) and isinstance(other, float)
    return one == other or floats and abs(one - other) <= most + most * abs(one)


@pytest.mark.parametrize("name, size", [
    ("greedy", 2), ("self", 2),
    *(pytest.param(name, size, marks=FAULTS) for name in COLLECT for size in (2, 3, 4)
      if size != 2 or name not in ("greedy", "self"))])
def test_processes_share_sampling_judging_and_evaluation(name, size, taught_command, tmp_path):
    """Records as one process writes them, also where the work is uneven; weights within rounding.
    """
    one, many = tmp_path / "one", tmp_path / "many"
    way, more = "sft-ia", ["--wordings", "3", "--pool-wordings", "2"]
    if name in ("ilf", "judged"):
        way, more = "sft", []

    def argv(out):
        return taught_command(out, *COLLECT[name], "--pool-per-task", "7", "--steps", "3",
                              "--sft-steps", "3", "--batch-size", "4", "--samples", "1",
                              "--no-compare", *more)
    assert runs.survive(argv(one), []) == (0, 0)
    shutil.copytree(one / way, many / way)  # the same start, to the bit
    assert runs.run_together(argv(many), size) == [0] * size
    found = [path.name for path in one.iterdir() if path.name in RECORDS]
    for file in found:
        rows = [data.read_records(folder / file) for folder in (one, many)]
        assert rows[0] and nearly(*rows)
        if name not in ("self", "scores", "letters"):  # whose probabilities are rounded otherwise
            assert (one / file).read_bytes() == (many / file).read_bytes()
    assert found and {x.name for x in one.iterdir()} == {x.name for x in many.iterdir()}
    for file in {x.name for x in one.glob("*.json")} - {"summary.json", "config.json",
                                                        "identity.json"}:
        assert nearly(*(json.loads((folder / file).read_text()) for folder in (one, many)))
    for file in [x.name for x in one.glob("*.safetensors")]:
        weights = [load_file(folder / file) for folder in (one, many)]
        assert all(torch.allclose(weights[0][k], weights[1][k], atol=1e-5) for k in weights[0])


def die_in_backward(patch, step: int) -> None:
    """All processes die in a step."""
    steps, real = iter(range(99)), train.backward
    patch.setattr(train, "backward",
                  lambda *args: os._exit(9) if next(steps) == step else real(*args))


@pytest.mark.parametrize("pairs", [
    ((2, 1), (1, 2), (2, 2)),
    pytest.param(((3, 1), (1, 3), (3, 2), (2, 3), (3, 3), (4, 1), (2, 4)), marks=FAULTS)])
def test_a_run_of_two_processes_goes_on_with_one_and_back(pairs, command, tmp_path, monkeypatch):
    """Equal to one process that nothing stops within rounding; from 2 to 2 to the bit."""
    same = next(first for first, second in pairs if first == second)

    def run(out, size):
        argv = [*command("sft", tmp_path / out), "--dropout", "0", "--save-every", "2"]
        return set(runs.run_together([*argv, "--steps", "6"], size))
    assert run("1", 1) == {0} and run(str(same), same) == {0}
    for first, second in pairs:
        with monkeypatch.context() as patch:
            die_in_backward(patch, 3)
            assert run(f"{first}{second}", first) == {9}
        assert runs.saved_steps(tmp_path / f"{first}{second}") == [2]
        assert run(f"{first}{second}", second) == {0}
    name = "adapter_model.safetensors"
    final = {path.name: load_file(path / name) for path in tmp_path.glob("*[0-9]")}
    rows = {out: data.read_records(tmp_path / out / "log.jsonl") for out in final}
    assert ((tmp_path / f"{same}{same}" / name).read_bytes()
            == (tmp_path / str(same) / name).read_bytes())
    for out in final:
        assert [row["step"] for row in rows[out]] == list(range(6))
        for row, wanted in zip(rows[out], rows["1"], strict=True):
            assert abs(row["ce"] - wanted["ce"]) <= 2e-6 and row["tokens"] == wanted["tokens"]
        for key, value in final[out].items():
            assert torch.allclose(value, final["1"][key], atol=1e-6, rtol=1e-5)


def test_what_one_process_alone_finds_or_dies_of_is_one_line(command, tmp_path, monkeypatch, capfd):
    real_run, real_backward, count = train.make_run, train.backward, [0]

    def make_run(cfg, method, guard):
        if guard.rank == 1:
            raise ValueError("this machine has no such file")
        return real_run(cfg, method, guard)
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_run", make_run)
        assert runs.run_together(command("sft", tmp_path / "a"), 2) == [1, 2]
    assert capfd.readouterr().err == "error: rank 1: this machine has no such file\n"

    def backward(run, batches):
        count[0] += 1
        if run.guard.rank == 1 and count[0] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return real_backward(run, batches)
    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", backward)
        assert runs.run_together(command("sft", tmp_path / "b"), 2) == [1, -signal.SIGKILL]
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: another process of this job ended before its work was done.")
    assert runs.saved_steps(tmp_path / "b") == [2, 3]


@pytest.mark.parametrize("change, words", [
    (["--max-len", "100000"], "--max-len is 100000, but"),
    (["--batch-size", "2"], "--batch-size 2 is less than 3 processes. Raise it."),
    (["--shard", "--quantize", "int8"], "It needs several, no --quantize, and a stage without"),
    *(pytest.param(*row, marks=FAULTS) for row in [
        (["--template", "nobody"], "unknown template 'nobody'"),
        (["--model", "/tmp"], "no model at /tmp (no config.json)"),
        (["--template", "chatml"], "template chatml ends responses with"),
        (["--tasks", str(ROOT / "demo/base")], "config.json: field \"Definition\" is missing")])])
def test_a_mistake_that_all_find_is_one_line(change, words, command, tmp_path, capfd):
    capfd.readouterr()
    assert set(runs.run_together([*command("sft", tmp_path), *change], 3)) <= {1, 2}
    error = capfd.readouterr().err  # in which torch may say that a peer has gone
    line, = [line for line in error.splitlines() if line.startswith("error: ")]
    assert words in line and "extras/runtime" not in error  # no traceback


@pytest.mark.parametrize("change, words", [
    (["--stepz", "3"], "does not read --stepz"), (["--stage", "sfft"], "unknown stage"),
    pytest.param(["--tasks", "/nowhere"], "--tasks /nowhere does not exist", marks=FAULTS)])
def test_a_mistake_in_the_flags_is_said_once_under_torchrun(change, words, command, tmp_path):
    """The first process says it, and torchrun ends the others, which wait for that."""
    argv = [*command("sft", tmp_path), *change]
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc-per-node", "3", str(ROOT / "train.py"), *argv],
                         capture_output=True, text=True, timeout=120)
    line, = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert run.returncode and words in line


def test_where_the_first_process_fails_alone_it_alone_speaks(command, tmp_path, monkeypatch, capfd):
    """The lock is taken by rank 0; the others wait for it."""
    def take_lock(folder):
        time.sleep(0.2)
        raise ValueError(f"{folder} is in use")
    from extras.runtime import guard
    monkeypatch.setattr(guard, "take_lock", take_lock)
    assert runs.run_together(command("sft", tmp_path), 2) == [2, 1]
    assert capfd.readouterr().err == f"error: {tmp_path} is in use\n"


def test_without_torchrun_there_are_no_shards(command, tmp_path, capsys):
    assert train.main([*command("sft", tmp_path), "--shard"]) == 2
    assert "It needs several, no --quantize" in capsys.readouterr().err


# ----- A server that judges -----

def serve(taught_command, out, server, *more) -> list[str]:
    """The command of a run whose judge is a server."""
    return taught_command(out, "--stage", "cat", "--judge", "http", "--judge-url", server.url,
                          "--judge-model", "m", "--sft-steps", "2", "--steps", "2", "--wordings",
                          "3", "--no-compare", *runs.SHORT, *more)


def test_a_server_is_asked_by_the_first_process_alone(taught_command, chatserver, tmp_path):
    def decide(request, number):
        text = request["messages"][-1]["content"]
        pattern = r'VERDICT ([0-9a-f]+): X" with (\w+) or (\w+)'
        nonce, *words = re.search(pattern, text).groups()
        verdict = f"VERDICT {nonce}: {words[len(text) % 2]}"
        return {"body": chatserver.completion(verdict)}
    asked, records = [], []
    with chatserver.ChatServer(decide) as server:
        for size in (1, 2):
            out = tmp_path / str(size)
            if size > 1:
                shutil.copytree(tmp_path / "1/sft-ia", out / "sft-ia")
            argv = serve(taught_command, out, server, "--pool-per-task", "5")
            assert runs.run_together(argv, size) == [0] * size
            shown = [json.dumps(request) for request, *_ in server.requests]
            asked.append(sorted(re.sub("[0-9a-f]{24}", "nonce", text) for text in shown))
            records.append((out / "candidates.jsonl").read_bytes())
            server.requests.clear()
    assert records[0] == records[1] and asked[0] == asked[1]
    assert len(asked[0]) == len(set(asked[0])) > 50


@FAULTS
@pytest.mark.parametrize("reply, words", [
    ({"status": 401}, "no API key"), ({"status": 402}, "out of credit"),
    ({"status": 404}, "has no chat completions"), ({}, "had no readable verdict"),
    ({"status": 307, "headers": {"Location": "http://127.0.0.1:1"}}, "redirects"),
    ({"status": 429, "headers": {"Retry-After": "600"}}, "longer than 120 s"),
    ({"status": 429, "body": {"error": {"code": "insufficient_quota"}}}, "out of credit"),
    ({"status": 400, "body": {"error": {"message": "no"}}}, "10 requests in a row failed"),
    ({"headers": {"Content-Type": "text/event-stream"}}, "streams its answers")])
def test_a_server_that_fails_the_first_process_stops_all_with_one_line(
        reply, words, taught_command, chatserver, tmp_path, capfd):
    reply = {"body": chatserver.completion("hm")} | reply
    with chatserver.ChatServer(lambda request, number: reply) as server:
        argv = serve(taught_command, tmp_path, server, "--pool-per-task", "30")
        capfd.readouterr()
        assert runs.run_together(argv, 2) == [1, 1]
    error = capfd.readouterr().err
    assert error.count("error: ") == 1 and words in error and "Traceback" not in error


# ----- Under torchrun -----

def start_torchrun(*words) -> subprocess.Popen:
    """torchrun's agent, which starts train.py."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *words], cwd=ROOT,
                            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


@FAULTS
def test_two_processes_of_torchrun_are_as_two_of_ours(command, tmp_path):
    """They end well, and leave the bytes that two processes leave here."""
    argv = ["--dropout", "0", "--save-every", "5"]
    done = start_torchrun("--standalone", "--nproc-per-node", "2", "train.py",
                          *command("sft", tmp_path / "torchrun"), *argv)
    error = done.communicate(timeout=100)[1]
    assert done.returncode == 0, error
    assert runs.run_together([*command("sft", tmp_path / "ours"), *argv], 2) == [0, 0]
    assert runs.read_results(tmp_path / "torchrun") == runs.read_results(tmp_path / "ours")


@FAULTS
@pytest.mark.parametrize("change, words", [
    (["--lr", "1e30"], "gave a non-finite loss or gradient norm"),
    (["--max-len", "100000"], "--max-len is 100000, but")])
def test_a_mistake_is_one_line_for_the_whole_job(change, words, command, tmp_path):
    """After it torchrun writes what it has to say itself."""
    done = start_torchrun("--standalone", "--nproc-per-node", "2", "train.py",
                          *command("sft", tmp_path), *change)
    error = done.communicate(timeout=100)[1]
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and words in lines[0], error
    assert "extras/runtime" not in error  # no traceback


@FAULTS
def test_two_machines_are_one_job(command, tmp_path):
    """Two agents of torchrun on loopback: one line for a mistake, the weights of one agent."""
    found = []
    for name, more in (("two", []), ("mistake", ["--max-len", "100000"])):
        port, agents = str(runs.free_port()), []
        for node in "01":
            agents.append(start_torchrun(
                "--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1", "--master-addr",
                "127.0.0.1", "--master-port", port, "train.py",
                *command("sft", tmp_path / name), "--dropout", "0", *more))
        error = "".join(agent.communicate(timeout=200)[1] for agent in agents)
        well = [agent.returncode == 0 for agent in agents]
        found.append((well, error.count("error: "), "--max-len is 100000" in error))
    assert found == [([True, True], 0, False), ([False, False], 1, True)]
    argv = [*command("sft", tmp_path / "one"), "--dropout", "0"]
    assert runs.run_together(argv, 2) == [0, 0]
    assert runs.read_results(tmp_path / "two") == runs.read_results(tmp_path / "one")
