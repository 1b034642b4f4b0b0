"""demo/frontier.py: which runs are compared, the table and the figure, without training."""

import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "demo"
sys.path.insert(0, str(DEMO))
import frontier  # noqa: E402


@pytest.fixture
def commands(monkeypatch):
    """[(program, folder, flags)]; distances and rewards follow from the number of the command."""
    made = []

    def train(stage, out, *flags, makes):
        made.append((stage, str(out), flags))

    def best_of(out, *flags):
        made.append(("best_of", str(out), flags))
        n, names = int(flags[1]), flags[3:flags.index("--reward-model")]
        return {name: {"reward model": [
            {"n": k, "kl": k / 10, "reward": float(k), "truth": k / 100}
            for k in (1, 2, 4, 8, 16, 32) if k <= n]} for name in names}

    def evaluate(out, *flags):
        made.append(("eval", str(out), flags))
        names = flags[flags.index("--adapter") + 1:flags.index("--split")]
        return {name: {"kl": {"mean": 0.5}} for name in names}
    for name, stub in (("train", train), ("best_of", best_of), ("evaluate", evaluate)):
        monkeypatch.setattr(frontier.trials, name, stub)
    return made


def test_all_methods_have_one_reward_model_and_are_measured_alike(commands, tmp_path):
    pytest.importorskip("extras.reports.plots")
    frontier.main(["--seeds", "1", "2", "--out", str(tmp_path), "--split", "dev"])
    folders = [folder for _, folder, _ in commands]
    assert len(set(folders)) == len(folders) == 2 * (1 + 7 + 3)
    for stage, folder, flags in commands:
        main = folder[:len(str(tmp_path / "seed1"))]
        if stage in ("dpo", "ppo"):
            assert flags[flags.index("--reward-model") + 1] == main
            assert flags[flags.index("--init") + 1] == main
        if stage == "dpo":
            shared = "--candidates" in flags and flags[flags.index("--candidates") + 1]
            first = f"{main}-dpo0"
            assert shared == (folder != first and f"{first}/candidates.jsonl")
        if stage in ("best_of", "eval"):
            assert "--split" in flags and "dev" in flags
        if stage == "eval":
            assert flags[:2] == ("--reference", f"{main}/sft-ia")
    rows = [line for line in (tmp_path / "results.md").read_text().splitlines()
            if line.startswith("| ") and "±" in line]
    assert len(rows) == 6 + 7
    assert "| best of n | n 32 | 3.20 ± 0.00 | 31.00 ± 0.00 | 32.00 ± 0.00 |" in rows
    assert "| PPO | KL coefficient 0.02 | 0.50 ± 0.00 | 0.00 ± 0.00 | 1.00 ± 0.00 |" in rows
    assert (tmp_path / "plots" / "frontier.png").exists()
