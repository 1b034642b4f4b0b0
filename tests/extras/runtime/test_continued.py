"""What a command names reaches its result: the run that --init continues, and records of one's own.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from extras.runtime import identity
from extras.runtime.program import summarise

ROOT = Path(train.__file__).parent
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def earlier(world, tmp_path_factory):
    """A run folder with an adapter of SFT and one of SFT(IA)."""
    folder = tmp_path_factory.mktemp("earlier")
    for stage in ("sft", "sft-ia"):
        argv = ["--stage", stage, "--model", f"{world}/model", "--tasks", f"{world}/tasks",
                "--paraphrases", f"{world}/paraphrases.json", "--out", f"{folder}/{stage}",
                "--steps", "2", "--lr", "1e-2", "--per-task", "8", "--judge-share", "0.3",
                "--max-new-tokens", "4", "--no-evaluate"]
        assert train.main(argv) == 0
    return folder


@pytest.mark.parametrize("plain", [["--plain"], []])
@pytest.mark.parametrize("stage, flag", [
    ("dpo", "--candidates"), ("reward", "--candidates"), ("cut", "--records")])
def test_a_stage_on_records_starts_from_init_without_tasks(stage, flag, plain, world, earlier,
                                                           candidates, judged, tmp_path):
    """Another start, other bytes; the same start, the same bytes."""
    file = judged if flag == "--records" else candidates
    argv = ["--stage", stage, "--model", f"{world}/model", flag, str(file), "--steps", "2",
            "--batch-size", "4", "--no-evaluate", "--no-compare", *plain]
    made = []
    for name, more in (("alone", []), ("first", ["--init", str(earlier)]),
                       ("again", ["--init", str(earlier)])):
        assert train.main([*argv, *more, "--out", str(tmp_path / name)]) == 0
        made.append((tmp_path / name / WEIGHTS).read_bytes())
    assert made[0] != made[1] == made[2]


def test_a_finished_run_on_judgments_has_its_report_and_its_summary(tmp_path, capsys):
    """A model and tasks named by absolute paths: found once trained, with the same result."""
    argv = ["--stage", "cut", "--model", str(ROOT / "demo/base"), "--tasks",
            str(ROOT / "demo/records"), "--out", str(tmp_path / "run"), "--steps", "2",
            "--sft-steps", "2", "--per-task", "4", "--pool-per-task", "4", "--eval-per-task", "2",
            "--max-new-tokens", "8", "--batch-size", "2", "--no-compare"]
    results = []
    for _ in range(2):
        (tmp_path / "run/summary.json").unlink(missing_ok=True)
        assert train.main(argv) == 0
        results.append((tmp_path / "run" / WEIGHTS).read_bytes())
        for name in ("report.md", "metrics.json", "summary.json", "plots/training.png"):
            assert (tmp_path / "run" / name).exists(), name
    said = capsys.readouterr()
    assert results[0] == results[1] and not said.err.count("error: ")
    assert f"cut: found in {tmp_path}/run." in said.out


@pytest.mark.parametrize("row", [{"tokens": 3}, {"seconds": 1.0}, {"tokens": "3", "seconds": 1.0}])
def test_a_damaged_last_row_is_named(row, tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps(row) + "\n")
    cfg = SimpleNamespace(out=str(tmp_path), stage="sft", device="cpu", dtype="auto")
    with pytest.raises(ValueError, match="log.jsonl: the last line lacks tokens or seconds"):
        summarise(cfg, 1.0)


@pytest.mark.parametrize("text", ["[]", '{"base": 3}'])
def test_identities_of_another_form_are_refused(text, tmp_path):
    (tmp_path / "identity.json").write_text(text)
    with pytest.raises(ValueError, match="holds no identities. Delete it to go on"):
        identity.read_identity(tmp_path)
