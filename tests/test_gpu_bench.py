"""bench/gpu.py without a GPU: which rows count, what is tried again, and the table."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))  # last: both have a judge.py
gpu = pytest.importorskip("gpu")
WORDS = ["--device", "cpu", "--dtype", "bfloat16", "--only", "stream", "--quick"]
LIMITS = {"name": "NVIDIA H100 80GB HBM3", "tflops": 700.0, "gbs": 3000.0}


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """A function that runs the script with stand-ins for its workers: (its rows, what was run)."""
    answers, started = {}, []

    def start(args, row, seconds):
        started.append((row[-1], seconds))
        found = {"name": LIMITS["name"], "seconds": [2.0, 1.0]}
        return LIMITS if row == ["limits"] else answers.get(row[-1], found)

    def run(*more, slow=(), broken=()):
        started.clear()
        answers.clear()
        answers.update({name: {"error": "not done after 150 s", "slow": True} for name in slow})
        answers.update({name: {"error": "no memory"} for name in broken})
        args = gpu.read_flags([*WORDS, "--out", str(tmp_path / "gpu.jsonl"), *more])
        return gpu.fill_in(args), [name for name, _ in started], args
    monkeypatch.setattr(gpu, "start_worker", start)
    return run


def test_what_is_done_is_not_measured_again(measure, tmp_path):
    systems = list(gpu.PLAN["stream"])
    assert measure(slow=systems[:1], broken=systems[1:2])[1] == ["limits", *systems]
    with open(tmp_path / "gpu.jsonl", "a") as file:
        file.write('{"row": ["stream", "ow')  # cut off
    # what failed is tried again, and first; what was too slow comes last
    assert measure()[1] == ["limits", systems[1], systems[0]]
    assert measure()[1] == ["limits"]


def test_other_cards_code_and_work_are_other_rows(measure, monkeypatch):
    systems = list(gpu.PLAN["stream"])
    measure()
    assert measure("--rounds", "7")[1] == ["limits"]  # --quick sets the rounds itself
    assert measure("--dtype", "float32")[1] == ["limits", *systems]
    monkeypatch.setattr(gpu, "hash_code", lambda: "other")
    assert measure()[1] == ["limits", *systems]
    monkeypatch.setitem(LIMITS, "name", "NVIDIA A100-SXM4-80GB")
    assert measure()[1] == ["limits", *systems]


def test_no_row_begins_without_time(measure):
    rows, started, args = measure("--minutes", "0.2")
    assert started == ["limits"]
    table = gpu.table(args, rows)
    assert table.count("there was no time left for it") == len(gpu.PLAN["stream"])
    assert table.endswith("Run the same command again for the rows that had no time.")


def test_the_table_and_its_shares(measure, tmp_path):
    rows, _, args = measure("--only", "sft", broken=["own --plain"])
    lines = gpu.table(args, rows).splitlines()
    weights = gpu.count_weights(args.config)
    rate = args.tokens / 1.5
    tflops = 4e-12 * weights * rate
    shares = f"{100 * tflops / 700:.0f} % | {100 * tflops / 989:.0f} %"
    assert f"| sft | own | {rate:.4g} | 67 % | 1.00 | {shares} |  |" in lines
    assert "sft, own --plain: no memory" in lines
    assert len(json.loads((tmp_path / "gpu.jsonl").read_text().splitlines()[1])["seconds"]) == 2


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 NVL", 835), ("NVIDIA H100 PCIe", 756),
    ("NVIDIA L40", 181), ("NVIDIA L4", 121), ("NVIDIA RTX A1000", None), ("NVIDIA T400", None)])
def test_peaks_are_found_by_whole_names(name, peak):
    assert gpu.find_peak(name) == peak
