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
        value = 0.5 + 0.01 * ("dpo" in out)
        return {"base": {}, out: {metric: {"mean": value} for metric in pairs.trials.METRICS}}
    monkeypatch.setattr(pairs.trials, "train", train)
    return made


def test_all_arms_start_from_one_model_and_have_a_row(commands, tmp_path, capsys):
    pairs.main(["--seeds", "1", "2", "--out", str(tmp_path / "out"), "--split", "dev"])
    for seed in ("1", "2"):
        out = f"{tmp_path / 'out'}/seed{seed}"
        common = f"--seed {seed} --split dev --eval-per-task 15 --no-compare"
        init, same = f"{common} --init {out}-start", "--max-worse 1 --condition own"
        models = f"--responses {out}-weak {out}-start {out}-strong"
        wanted = {
            "start": f"sft-ia {common}", "weak": f"sft-ia {common} --steps 100",
            "strong": f"sft-ia {common} --wordings 14", "rlcd": f"rlcd {init} --samples 1"}
        for judge in ("rule", "self"):
            wanted[f"dpo-{judge}"] = f"dpo {init} --judge {judge} {same}"
            wanted[f"rlaif-{judge}"] = (f"rlaif {init} --judge {judge} --candidates "
                                        f"{out}-dpo-{judge}/candidates.jsonl")
        for order in ("easy", "hard", "mixed"):
            wanted[f"curriculum-{order}"] = f"curriculum {init} --curriculum {order} {models}"
        for name, words in wanted.items():
            stage, flags = commands.pop(f"{out}-{name}")
            assert " ".join([stage, *flags]) == words
    assert not commands
    text = (tmp_path / "out" / "results.md").read_text()
    first, deltas, worth = text.split("\n\n")[1:6:2]
    assert len(first.splitlines()) == 2 + 11 and len(deltas.splitlines()) == 2 + 10
    assert "| RLCD | 4 | 50.0 ± 0.0 | 25.0 ± 0.0 |" in worth and len(worth.splitlines()) == 2 + 3
    assert "| DPO, exact rules | +1.0 [" in deltas and "nan" not in text
