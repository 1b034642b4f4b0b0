"""schedule.py: passes over the items, and a held-out share that nothing is learnt from."""

import json
from dataclasses import asdict

import pytest

import data
import train
from methods import schedule
from methods.settings import is_finished, parse_config, saved_settings, stage_config

SFT = ("sft", "--judge-share", "0")


def log(folder):
    """The rows of a run's log."""
    return data.read_records(folder / "log.jsonl")


# ----- Passes -----

@pytest.mark.parametrize("epochs, steps", [("2", 8), ("0.3", 2), ("1.01", 5), ("0.01", 1)])
def test_epochs_are_passes_over_the_items(epochs, steps, make_run, capsys):
    run = make_run(*SFT, "--epochs", epochs, "--batch-size", "4")  # 16 items
    items = schedule.items_to_train(run)
    assert len(items) == 16 and run.cfg.steps == steps
    assert saved_settings(run.folder)["steps"] == steps
    assert f"sft: {steps} steps of 4 are {4 * steps / 16:.3g} passes over 16 items.\n" in (
        capsys.readouterr().out)


def test_with_steps_it_is_said_how_many_passes_they_are(make_run, capsys):
    run = make_run(*SFT, "--steps", "200", "--batch-size", "24")
    schedule.items_to_train(run)
    assert "sft: 200 steps of 24 are 300 passes over 16 items.\n" in capsys.readouterr().out
    assert run.cfg.steps == 200


def test_epochs_and_steps_are_not_given_together(refused):
    refused("--steps and --epochs both say how long to train. Leave one of them out.", *SFT,
            "--steps", "3", "--epochs", "1")
    refused("--epochs is -1.0. Expected at least 0, and less than 1000000.", *SFT, "--epochs", "-1")
    refused("--epochs is nan. Expected at least 0", *SFT, "--epochs", "nan")


def test_a_run_of_epochs_is_found_again_and_continued(arguments, tmp_path, capsys):
    argv = ["--stage", *SFT[:1], *arguments(tmp_path / "run", "--plain", "--no-evaluate",
                                            "--batch-size", "8", "--epochs", "1")]
    assert train.main(argv) == 0
    rows = log(tmp_path / "run")
    assert len(rows) == saved_settings(tmp_path / "run")["steps"]
    assert train.main(argv) == 0 and "sft: found in" in capsys.readouterr().out
    assert train.main(argv[:-2]) == 0  # its settings are those of the folder
    assert log(tmp_path / "run") == rows
    for more, said in ((["--epochs", "2"], "--epochs was 1.0, now 2.0"),
                       (["--steps", "9"], "steps was 3, now 9")):
        with pytest.raises(SystemExit):
            train.main([*argv[:-2], *more])
        assert said in capsys.readouterr().err


def test_a_stage_on_the_way_has_steps_alone(scored_stage):
    cfg = parse_config(["--stage", scored_stage, "--plain", "--epochs", "2", "--validation", "0.1",
                        "--sft-steps", "7"])[0]
    before = stage_config(cfg, "sft")
    assert (before.steps, before.epochs, before.validation) == (7, 0, 0)
    assert (cfg.epochs, cfg.validation) == (2, 0.1)


def test_a_folder_of_an_earlier_version_had_steps(tmp_path):
    argv = ["--stage", "sft", "--plain", "--out", str(tmp_path)]
    cfg = parse_config(argv)[0]
    saved = {name: value for name, value in asdict(cfg).items() if name != "epochs"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "log.jsonl").touch()
    assert not is_finished(tmp_path, cfg)
    with pytest.raises(ValueError, match="holds another run: --epochs was 0.0, now 2.0"):
        is_finished(tmp_path, parse_config([*argv, "--epochs", "2"])[0])


def test_a_stage_that_was_trained_by_epochs_is_continued(arguments, scored_stage, tmp_path, capsys):
    argv = arguments(tmp_path / "sft-ia", "--plain", "--no-evaluate", "--epochs", "1")
    assert train.main(["--stage", "sft-ia", "--batch-size", "8", "--validation", "0.2", *argv]) == 0
    cfg = parse_config(["--stage", scored_stage, "--init", str(tmp_path / "sft-ia"), "--plain",
                        "--out", str(tmp_path / "run")])[0]
    before = stage_config(cfg, "sft-ia")
    assert (cfg.sft_steps, cfg.epochs, cfg.validation, before.steps) == (3, 0, 0, 3)
    assert is_finished(tmp_path / "sft-ia", before)


# ----- Held-out items -----

def test_the_split_goes_by_the_prompts_alone(make_run, capsys):
    run = make_run(*SFT, "--validation", "0.25")
    items = run.method.items(run)
    kept, held = schedule.split_items(run, items)
    assert (len(kept), len(held)) == (12, 4)
    assert "sft: 4 items are held out, 12 are trained on.\n" in capsys.readouterr().out
    again = schedule.split_items(run, items[::-1])
    assert [x["name"] for x in again[1][::-1]] == [x["name"] for x in held]
    # the same prompt under another name, and other prompts of the same name, are on the same side
    twins = [x | {"name": f"twin of {x['name']}"} for x in items]
    more = [x | {"documents": [y["documents"][0]]} for x, y in zip(items, items[1:], strict=False)]
    kept, held = schedule.split_items(run, [*items, *twins, *more])
    names = [{x["name"].removeprefix("twin of ") for x in part} for part in (kept, held)]
    assert not names[0] & names[1]


@pytest.mark.parametrize("share", ["0.01", "0.99"])
def test_a_share_that_leaves_nothing_is_refused(share, make_run):
    run = make_run(*SFT, "--validation", share)
    said = rf"--validation {share} holds out \d+ of 16 items. Expected at least one"
    with pytest.raises(ValueError, match=said):
        schedule.items_to_train(run)


def test_held_out_items_are_measured_and_not_learnt(command, monkeypatch):
    seen = {train: [], schedule: []}
    for module, found in seen.items():
        def collate(items, *rest, found=found, real=module.collate):
            found += [item["name"] for item in items]
            return real(items, *rest)
        monkeypatch.setattr(module, "collate", collate)
    folder = command(*SFT, "--no-evaluate", "--steps", "25", "--validation", "0.25",
                     "--batch-size", "5", "--dropout", "0.3", "--micro-tokens", "60")
    told = [step for step, row in enumerate(log(folder)) if "validation_ce" in row]
    assert told == [*range(1, 25, 2), 24]  # where a line is printed, and at the end
    assert len(seen[schedule]) == 4 * len(told) and len(set(seen[schedule])) == 4
    assert len(seen[train]) == 5 * 25 and len(set(seen[train])) == 12
    assert not set(seen[train]) & set(seen[schedule])


def test_the_measured_loss_is_that_of_the_weights_after_the_step(make_run, ready):
    run = ready(*SFT, "--validation", "0.25", "--dropout", "0.5", "--steps", "10")
    schedule.items_to_train(run)
    run.model.train()
    held = run.memory[schedule.HELD_OUT]
    found = schedule.measured(run, 0, train.backward)
    assert run.model.training and all(p.grad is None for p in run.model.parameters())
    run.model.eval()
    batch = schedule.collate(held, run.model, "cpu")
    mean = run.method.step(run.model, batch, run.cfg)["ce"].item() / len(batch["targets"])
    assert found == {"validation_ce": pytest.approx(mean, rel=1e-5)}


def test_without_a_share_nothing_is_measured(command):
    assert not any("validation" in json.dumps(row) for row in log(command(*SFT, "--no-evaluate")))
