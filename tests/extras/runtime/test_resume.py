"""Runs that are killed at any moment go on to the very same bytes; damage is told in a sentence."""

import json
import random
import shutil

import pytest
import short_runs as runs
import torch

import train
from extras.runtime import checkpoint, guard
from methods import early, probe

FAULTS = pytest.mark.faults


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("sft", "ppo") else FAULTS) for name in runs.RUNS])
def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(name, command, unstopped, tmp_path):
    wanted, seconds = unstopped(name, command(name, ""), tmp_path / "unstopped")
    seed, out = random.randrange(10**6), tmp_path / "run"
    delays = [random.Random(f"{seed}/{k}").uniform(0.05, 0.7) * seconds for k in range(3)]
    kills, status = runs.survive(command(name, out), delays)
    assert status == 0, f"seed {seed}"
    assert runs.read_results(out) == wanted, f"seed {seed}, {kills} kills after {delays}"
    assert not list(out.rglob("checkpoints"))  # a finished stage has removed them


@pytest.mark.parametrize("name, steps", [
    ("cat", (7,)), ("ppo", (4, 5)), ("full", (3,)), ("held out", (4, 11)),
    ("patience", (3, 6)),
    *(pytest.param(*x, marks=FAULTS) for x in [
        ("cat", (1, 3)), ("ppo", (2, 11)), ("cut", (5,)), ("dpo", (4,)), ("rounds", (3, 5))])])
def test_a_run_stopped_at_each_step_resumes_there(name, steps, command, unstopped, tmp_path,
                                                  monkeypatch, capsys):
    """In the middle of an epoch or a phase, and at its border: one row is run again."""
    wanted, _ = unstopped(name, command(name, ""), tmp_path / "unstopped")
    for step in steps:
        out = tmp_path / str(step)
        with monkeypatch.context() as patch, pytest.raises(runs.Died):
            runs.die_after(patch, step)
            train.main(command(name, out))
        saved = runs.saved_steps(out)
        assert saved or step == 1
        assert not list(out.rglob(".tmp-*"))
        capsys.readouterr()
        assert train.main(command(name, out)) == 0
        if saved:
            assert f"resuming at step {saved[-1]}." in capsys.readouterr().out
        assert runs.read_results(out) == wanted


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_that_dies_with_its_best_weights_put_back_goes_on(number, command, unstopped,
                                                                tmp_path, monkeypatch):
    """Before the result is saved, and between that and the removal of what was kept."""
    wanted, _ = unstopped("patience", command("patience", ""), tmp_path / "unstopped")
    module, name = [(probe, "finish"), (early, "discard_weights")][number]
    real, argv = getattr(module, name), command("patience", tmp_path / "run")

    def die(run):
        if run.cfg.stage == "cat":
            if not number:
                real(run)
            raise runs.Died
        real(run)
    with monkeypatch.context() as patch, pytest.raises(runs.Died):
        patch.setattr(module, name, die)
        train.main(argv)
    assert (tmp_path / "run" / "best").is_dir()
    assert train.main(argv) == 0
    assert runs.read_results(tmp_path / "run") == wanted
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.parametrize("what", ["weights", "moments", "adam's step", "random state", "beta",
                                  "phase"])
def test_whatever_a_checkpoint_leaves_out_is_missed(what, command, unstopped, tmp_path,
                                                    monkeypatch):
    """The control: with one part of the state not restored the same comparison fails."""
    name, step = ("ppo", 4) if what in ("beta", "phase") else ("sft", 7)
    wanted, _ = unstopped(name, command(name, ""), tmp_path / "unstopped")
    argv, real = command(name, tmp_path / "run"), checkpoint.load_checkpoint
    with monkeypatch.context() as patch, pytest.raises(runs.Died):
        runs.die_after(patch, step + 1)
        train.main(argv)

    def load(run, optimizer, *rest):
        weights = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in weights.items()}
        state = torch.get_rng_state()
        found = real(run, optimizer, *rest)
        if what == "weights":
            for key, weight in weights.items():
                weight.data.copy_(before[key])
        for slots in optimizer.state.values():
            if what == "moments":
                slots["exp_avg_sq"] = slots["exp_avg_sq"].bfloat16().float()
            if what == "adam's step":
                slots["step"] = torch.zeros_like(slots["step"])
        if what == "random state":
            torch.set_rng_state(state)
        if what == "beta":
            run.memory["beta"] = run.cfg.kl_beta
        if what == "phase":
            run.memory["phase"] = 0
        return found
    monkeypatch.setattr(checkpoint, "load_checkpoint", load)
    assert train.main(argv) == 0
    assert runs.read_results(tmp_path / "run") != wanted


def test_a_checkpoint_of_the_first_version_is_read(command, unstopped, tmp_path, monkeypatch):
    """It had other names for two parts of the items that PPO saves."""
    out = tmp_path / "run"
    wanted, _ = unstopped("ppo", command("ppo", ""), tmp_path / "unstopped")
    with monkeypatch.context() as patch, pytest.raises(runs.Died):
        runs.die_after(patch, 7)
        train.main(command("ppo", out))
    for place in checkpoint.saved_steps(out):
        file = place / "state.json"
        text = file.read_text().replace('"values": ', '"per_token": ')
        file.write_text(text.replace('"truncated": ', '"cut": '))
        manifest = json.loads((place / "manifest.json").read_text())
        manifest["state.json"]["sha256"] = checkpoint.checksum(file)
        (place / "manifest.json").write_text(json.dumps(manifest))
    assert '"per_token": ' in text and train.main(command("ppo", out)) == 0
    assert runs.read_results(out) == wanted


def test_checkpoints_that_a_kill_left_beside_a_finished_stage_are_removed(command, tmp_path):
    for out in (tmp_path, tmp_path / "round1", tmp_path / "sft", tmp_path / "mine"):
        (out / "checkpoints/step-000002").mkdir(parents=True)
        (out / "adapter_config.json").write_text("")
    (tmp_path / "sft/adapter_config.json").unlink()  # not finished
    guard.remove_leftovers(tmp_path)
    left = [str(path.relative_to(tmp_path).parent) for path in tmp_path.rglob("checkpoints")]
    assert sorted(left) == ["mine", "sft"]


# ----- Damage and changes -----

@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """Where `stopped` keeps a run folder, to make it once."""
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture
def stopped(stopped_run, command, tmp_path, monkeypatch):
    """The command that goes on with a run, out of its checkpoints of steps 5 and 6, and its folder.
    """
    if not (stopped_run / "config.json").exists():
        with monkeypatch.context() as patch, pytest.raises(runs.Died):
            runs.die_after(patch, 7)
            train.main(command("sft", stopped_run))
        assert runs.saved_steps(stopped_run) == [5, 6]
    shutil.copytree(stopped_run, tmp_path / "run")
    return command("sft", tmp_path / "run"), tmp_path / "run"


def spoil(file, how: str) -> None:
    """Damage a file."""
    blob = file.read_bytes()
    middle = len(blob) // 2
    flipped = blob[:middle] + bytes([blob[middle] ^ 1]) + blob[middle + 1:]
    if how == "deleted":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "shortened": blob[:-1], "flipped": flipped}[how])


SAVED = ("weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json",
         "manifest.json")
QUICK = [("weights.safetensors", "flipped"), ("optimizer.safetensors", "deleted"),
         ("manifest.json", "empty")]
SLOW = [(name, how) for name in SAVED for how in ("deleted", "empty", "shortened", "flipped")
        if (name, how) not in (*QUICK, ("manifest.json", "flipped"))]


@pytest.mark.parametrize("name, how", [*QUICK, *(pytest.param(*x, marks=FAULTS) for x in SLOW)])
def test_a_damaged_checkpoint_is_told_and_passed_over(name, how, stopped, command, unstopped,
                                                      tmp_path, capsys):
    argv, out = stopped
    wanted = unstopped("sft", command("sft", ""), tmp_path / "unstopped")[0]
    spoil(out / "checkpoints/step-000006" / name, how)
    (out / "checkpoints/.tmp-step-000007").mkdir()  # of a process that was killed while it wrote
    assert train.main(argv) == 0
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "step-000006 is damaged (" in said
    assert "resuming at step 5." in said
    assert runs.read_results(out) == wanted and not (out / "checkpoints").exists()


def test_no_complete_checkpoint_is_one_sentence(stopped, capsys):
    argv, out = stopped

    def read_files():
        return {path: path.read_bytes() for path in out.rglob("*")
                if path.is_file() and path.name != "run.lock"}
    for place in checkpoint.saved_steps(out):
        spoil(place / "optimizer.safetensors", "flipped")
    before = read_files()
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "and so are all newer ones" in error
    assert "step-000005 is damaged (optimizer.safetensors: checksum differs)" in error
    assert read_files() == before


@pytest.mark.parametrize("change, sentence", [
    (["--seed", "7"], "--seed was 0, now 7"), (["--rank", "4"], "--rank was 16, now 4"),
    (["--lr", "0.1"], "--lr was 0.0002, now 0.1"), (["--steps", "13"], "--steps was 12, now 13")])
def test_other_settings_do_not_go_on_with_a_checkpoint(change, sentence, stopped, capsys):
    argv, out = stopped
    assert train.main([*argv, *change]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and sentence in error and runs.saved_steps(out) == [5, 6]


def test_settings_that_change_no_result_may_change(stopped, command, unstopped, tmp_path):
    argv, out = stopped
    assert train.main([*argv, "--save-every", "0"]) == 0
    wanted = unstopped("sft", command("sft", ""), tmp_path / "unstopped")[0]
    assert runs.read_results(out) == wanted


def test_changed_inputs_and_a_lost_log_are_refused(stopped, world, tmp_path, capsys):
    argv, out = stopped
    shutil.copytree(world / "tasks", tmp_path / "tasks")
    file, settings = tmp_path / "tasks/colour.json", out / "config.json"
    file.write_text(file.read_text().replace("hat 1", "cap 1"))
    config = json.loads(settings.read_text())
    settings.write_text(json.dumps(config | {"tasks": str(tmp_path / "tasks")}))
    at = argv.index("--tasks") + 1
    assert train.main([*argv[:at], str(tmp_path / "tasks"), *argv[at + 1:]]) == 2
    assert f"{file} is not as it was when {out} was trained (--tasks). " in capsys.readouterr().err
    (out / "identity.json").unlink()  # as the first version left it, but for the checkpoint
    assert train.main([*argv[:at], str(tmp_path / "tasks"), *argv[at + 1:]]) == 2
    assert f"{file} is not as it was when {out}/checkpoints/step-" in capsys.readouterr().err
    settings.write_text(json.dumps(config))
    (out / "log.jsonl").unlink()
    assert train.main(argv) == 2
    assert "log.jsonl is shorter than when the last checkpoint" in capsys.readouterr().err
