"""Runs of train.py, in this process or in children; makes short_runs.py importable by its name."""

import importlib.util
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def load(path):
    """A module of the tests, by the path of its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules.setdefault(path.stem, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


runs = load(HERE / "short_runs.py")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """As a child process has it."""
    torch.set_num_threads(1)


@pytest.fixture
def command(arguments, candidates):
    """A function that makes the command of one of short_runs.RUNS: command(name, out)."""
    def make(name, out):
        more = ["--candidates", str(candidates)] if name in ("cat", "dpo", "patience") else []
        return arguments(out, *runs.RUNS[name], *more)
    return make


@pytest.fixture(scope="session")
def unstopped():
    """A function: what a command leaves when nothing stops it, and its seconds; made once."""
    made = {}

    def run(name, argv, folder):
        if name not in made:
            start, at = time.time(), argv.index("--out") + 1
            argv = [*argv[:at], str(folder), *argv[at + 1:]]
            assert runs.survive(argv, []) == (0, 0)
            made[name] = runs.read_results(folder), time.time() - start
        return made[name]
    return run


@pytest.fixture(scope="session")
def taught(world, tmp_path_factory):
    """The tiny world with a model that has learnt a little: some of its answers are right."""
    out, path = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("taught")
    argv = ["--stage", "sft", "--model", str(world / "model"), "--tasks", str(world / "tasks"),
            "--paraphrases", str(world / "paraphrases.json"), "--out", str(out), "--full",
            "--steps", "120", "--lr", "5e-3", "--per-task", "30", "--batch-size", "8",
            "--judge-share", "0.1", "--no-evaluate"]
    assert runs.survive(argv, []) == (0, 0)
    shutil.copytree(world, path, dirs_exist_ok=True)
    shutil.copytree(out / "model", path / "model", dirs_exist_ok=True)
    return path


@pytest.fixture
def taught_command(arguments, world, taught):
    """A function that makes a command line for that model: taught_command(out, *more)."""
    def make(out, *more):
        return [x.replace(str(world), str(taught)) for x in arguments(out, *more)]
    return make


@pytest.fixture(scope="session")
def chatserver():
    """The chat server of the tests of extras/judges."""
    return load(HERE.parent / "judges/chatserver.py")
