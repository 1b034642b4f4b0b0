"""demo/pairs.py: every arm starts from one model and has a row, without training."""

import json
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "demo"
sys.path.insert(0, str(DEMO))
import pairs  # noqa: E402


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def commands(monkeypatch):
    """{folder: (stage, flags)} of what was run. Right are "yes" and "Yes."."""
    made = {}

    def train(stage, out, *flags):
        assert out not in made, "a folder is made by two commands"
        made[out] = stage, flags
        folder = Path(out)
        folder.mkdir(parents=True)
        write(folder / "candidates.jsonl", [{"task": "t", "id": 1, "target": "yes"}])
        said = [("yes", "no", 0.9), ("no", "Yes.", 0.9), ("no", "yes", 0.2), ("no", "on", 1.0)]
        write(folder / "preferences.jsonl", [
            {"task": "t", "id": "1", "first": {"response": one}, "second": {"response": two},
             "probability": p} for one, two, p in said])
        return {"base": {}, out: {metric: {"mean": len(made) / 100}
                                  for metric in pairs.trials.METRICS}}
    monkeypatch.setattr(pairs.trials, "train", train)
    return made


def test_all_arms_start_from_one_model_and_have_a_row(commands, tmp_path, capsys):
    pairs.main(["--seeds", "1", "2", "--out", str(tmp_path / "out"), "--split", "dev"])
    assert len(commands) == 2 * 11
    for folder, (stage, flags) in commands.items():
        start = folder[:folder.index("seed") + 5] + "-start"
        assert flags[flags.index("--split") + 1] == "dev" and "--no-compare" in flags
        if stage == "sft-ia":
            assert "--init" not in flags
        else:
            assert flags[flags.index("--init") + 1] == start
        if stage == "curriculum":
            assert flags[-3:] == (f"{start[:-6]}-weak", start, f"{start[:-6]}-strong")
    text = (tmp_path / "out" / "results.md").read_text()
    first, deltas, worth = text.split("\n\n")[1:6:2]
    assert len(first.splitlines()) == 2 + 11 and len(deltas.splitlines()) == 2 + 10
    assert "| RLCD | 4 | 50.0 ± 0.0 | 25.0 ± 0.0 |" in worth and len(worth.splitlines()) == 2 + 3
    assert "| DPO, exact rules | +1.0 [" in deltas and "nan" not in text
