"""demo/family.py: all methods on the same candidates, each run made once, without training."""

import json
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "demo"
sys.path.insert(0, str(DEMO))
import family  # noqa: E402


@pytest.fixture
def commands(monkeypatch):
    """{folder: (program, flags)} of what was run; metrics follow from the number of the command."""
    made = {}

    def train(stage, out, *flags, makes):
        assert str(out) not in made, "a folder is made by two commands"
        made[str(out)] = stage, flags
        Path(out).mkdir()
        if "--init" not in flags:  # SFT(IA) is trained on the way
            Path(out, "sft-ia").mkdir()
        row = {"phase": 0, "score": 1.0, "kl": 0.1, "seconds": 2.0}
        for name in ("log", "rollouts"):
            Path(out, f"{name}.jsonl").write_text(json.dumps(row) + "\n")

    def evaluate(out, *flags):
        assert str(out) not in made, "a folder is made by two commands"
        made[str(out)] = "eval", flags
        names = flags[flags.index("--adapter") + 1:]
        return {name: {metric: {"mean": 0.5} for metric in (*family.trials.METRICS, "kl")}
                for name in names if not name.startswith("--")}
    monkeypatch.setattr(family.trials, "train", train)
    monkeypatch.setattr(family.trials, "evaluate", evaluate)
    return made


@pytest.mark.parametrize("setting, judges", [("seen", ["self", "rule"]), ("fresh", ["agreement"])])
def test_every_run_is_made_once_from_the_same_candidates(setting, judges, commands, tmp_path):
    pytest.importorskip("extras.reports.plots")
    family.main(["--seeds", "1", "2", "--out", str(tmp_path), "--setting", setting, "--judges",
                 *judges])
    text = (tmp_path / "results.md").read_text()
    for title in ("SFT(IA)", *family.METHODS):
        assert text.count(f"| {title} | 50.0 ± 0.0 |") == len(judges)
    assert text.count("| CAT | +0.0 [+0.0, +0.0] 0/2 |") == len(judges)
    assert "| SFT(IA) | +0.0" not in text
    for seed in (1, 2):
        for judge in judges:
            first = f"{tmp_path}/seed{seed}-{judge}"
            stages = {folder: words for folder, words in commands.items()
                      if folder.startswith(first) and words[0] != "eval"}
            assert len(stages) == len(family.METHODS)
            for folder, (stage, flags) in stages.items():
                assert ("--condition" in flags) == (
                    setting == "seen" and stage in family.COMPARING)
                if folder != first:
                    assert flags[flags.index("--candidates") + 1] == f"{first}/candidates.jsonl"
                    assert flags[flags.index("--init") + 1] == f"{tmp_path}/seed{seed}"
                if stage == "ppo":
                    assert ("--no-fit-reward" in flags) == (judge == "rule")
    for name in ("family", "ppo"):
        assert (tmp_path / "plots" / f"{name}.png").exists()
