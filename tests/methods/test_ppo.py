"""ppo.py: its phases, what it compares with, its step, and that the reward rises."""

import copy
import json

import pytest
import torch

import data
import lora
import train
from judge import Verdict
from methods import collate, heads, ppo, settings
from methods.advantages import adapted_beta


@pytest.fixture
def start(make_run):
    """A function that makes a run at the start of its stage, with fresh adapters and a head."""
    def make(*more):
        run = make_run("ppo", "--judge", "rule", "--no-fit-reward", "--rollouts", "8",
                       "--batch-size", "8", "--pool-per-task", "4", *more)
        run.model = train.trainable_model(run.cfg, None)
        heads.attach(run)
        ppo.begin(run)
        return run
    return make


def move(model):
    """The same model with other adapters, or other weights where it has none."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)


def whole_batch(run, items):
    """One batch of all items."""
    return collate(items, run.model, "cpu")


# ----- A phase -----

def test_the_first_phase_is_on_policy(start, written_out):
    """Before any update every ratio is 1 and all values are the mean of what was returned."""
    run = start("--temperature", "0.7")
    items = ppo.items(run)
    batch = whole_batch(run, items)
    logprobs, values = ppo.token_figures(run.model, batch, run.cfg)
    torch.testing.assert_close(logprobs.detach(), batch["old"], atol=1e-5, rtol=0)
    torch.testing.assert_close(values.detach(), batch["old_values"], atol=1e-5, rtol=0)
    assert values.detach().unique().numel() == 1
    assert values[0].item() == pytest.approx(batch["returns"].mean().item(), abs=1e-4)
    terms = ppo.step(run.model, batch, run.cfg)
    assert terms["clipped"] == 0
    assert terms["policy"].item() == pytest.approx(-batch["advantages"].sum().item(), abs=1e-3)


def test_the_sampled_ids_are_scored_at_the_temperature_they_were_sampled_at(start):
    run = start("--temperature", "0.7")
    for item in ppo.items(run):
        document = item["documents"][0]
        ids = torch.tensor(document["input_ids"])
        logprobs = (run.model(ids[None])[0] / 0.7).log_softmax(-1)
        wanted = [logprobs[t - 1, ids[t]].item() for t, label in enumerate(document["labels"])
                  if label != data.IGNORE_INDEX]
        assert item["values"]["old"] == pytest.approx(wanted, abs=1e-4)


def test_advantages_are_white_over_the_phase(start):
    batch = whole_batch(run := start(), ppo.items(run))
    assert batch["advantages"].mean().item() == pytest.approx(0, abs=1e-4)
    assert batch["advantages"].var().item() == pytest.approx(1, abs=1e-3)


def test_the_books_of_the_first_phase_by_hand(start):
    """No token has moved yet, so every token returns its answer's score, and beta falls."""
    run = start("--no-whiten-rewards", "--unfinished-reward", "-3", "--kl-target", "0.5")
    items, rows = ppo.items(run), data.read_records(run.folder / "rollouts.jsonl")
    for item, row in zip(items, rows, strict=True):
        returns = item["values"]["returns"]
        assert returns == pytest.approx([row["score"]] * len(returns), abs=1e-4)
        assert row["kl"] == pytest.approx(0, abs=1e-4) and row["beta"] == run.cfg.kl_beta
        assert row["score"] == -3 or row["finished"]
    wanted = adapted_beta(run.cfg.kl_beta, 0.0, 0.5)
    assert run.memory["beta"] == pytest.approx(wanted, rel=1e-4) and wanted < run.cfg.kl_beta


def test_whitened_rewards_have_unit_variance_and_keep_their_mean(start):
    run = start("--unfinished-reward", "-3")
    items, rows = ppo.items(run), data.read_records(run.folder / "rollouts.jsonl")
    rewards = []  # no KL yet: each answer's score on its last token
    for item, row in zip(items, rows, strict=True):
        rewards.append([0.0] * (len(item["values"]["old"]) - 1) + [row["score"]])
    tokens = torch.tensor([x for row in rewards for x in row])
    for item, row in zip(items, rewards, strict=True):
        white = (torch.tensor(row) - tokens.mean()) / tokens.std() + tokens.mean()
        to_come = white.flip(0).cumsum(0).flip(0).tolist()
        assert item["values"]["returns"] == pytest.approx(to_come, abs=1e-3)


def test_each_phase_draws_anew_and_measures_kl_from_the_start(start):
    run = start("--unfinished-reward", "-3")
    run.memory["todo"] = run.memory["todo"][:1]  # one question, so phases differ in draws alone
    said = [[item["documents"][0]["labels"] for item in ppo.items(run)] for _ in range(2)]
    assert not any(labels in said[0] for labels in said[1])
    move(run.model)
    items = ppo.items(run)
    rows = [x for x in data.read_records(run.folder / "rollouts.jsonl") if x["phase"] == 2]
    with torch.no_grad():
        for item, row in zip(items, rows, strict=True):
            batch = whole_batch(run, [item])
            now = ppo.token_figures(run.model, batch, run.cfg)[0].sum()
            with lora.disabled(run.model):  # fresh adapters change nothing: the base is the start
                before = ppo.token_figures(run.model, batch, run.cfg)[0].sum()
            assert row["kl"] == pytest.approx(float(now - before), abs=1e-3)
    assert max(abs(row["kl"]) for row in rows) > 0.1


def test_with_all_weights_too_kl_is_measured_from_the_start(start):
    run = start("--full")
    first = copy.deepcopy(run.model)
    ppo.items(run)
    move(run.model)
    items = ppo.items(run)
    rows = [x for x in data.read_records(run.folder / "rollouts.jsonl") if x["phase"] == 1]
    with torch.no_grad():
        for item, row in zip(items, rows, strict=True):
            batch = whole_batch(run, [item])
            now, before = (ppo.token_figures(model, batch, run.cfg)[0].sum()
                           for model in (run.model, first))
            assert row["kl"] == pytest.approx(float(now - before), abs=1e-3)
    assert max(abs(row["kl"]) for row in rows) > 0.1


def test_a_long_prompt_loses_the_same_tokens_for_sampling_and_training(start):
    run = start("--max-len", "16", "--max-new-tokens", "4")
    for item in ppo.items(run):
        ids = item["documents"][0]["input_ids"]
        assert len(ids) <= 16 and ids[0] == run.tokenizer.bos_id


@pytest.mark.parametrize("more", [(), ("--full",)])
def test_the_judge_does_not_learn(more, start):
    run = start("--judge", "self", *more)
    items = [record | {"response": "red hat"} for record in run.memory["todo"][:3]]
    before = run.memory["judge"].judge(items)
    move(run.model)
    assert run.memory["judge"].judge(items) == before
    ppo.begin(run)
    assert run.memory["judge"].judge(items) != before  # another model judges otherwise


def test_with_half_precision_old_and_new_are_computed_alike(start):
    run = start("--full", "--dtype", "bfloat16")
    items = ppo.items(run)
    batch = whole_batch(run, items)
    with run.precision():
        logprobs, _ = ppo.token_figures(run.model, batch, run.cfg)
    assert (logprobs - batch["old"]).abs().max() < 1e-5


def test_answers_without_a_verdict_are_left_out_and_said(start, capsys):
    run = start("--unfinished-reward", "0")
    judge = run.memory["judge"]

    class Moody:
        def judge(self, items):
            verdicts = judge.judge(items)
            for verdict in verdicts[:3]:
                object.__setattr__(verdict, "reward", None)
            return verdicts
    run.memory["judge"] = Moody()
    run.model.config.eos_ids = list(range(run.model.config.vocab_size))  # every answer ends
    items = ppo.items(run)
    assert len(items) == 5 and "3 of 8 answers got no verdict" in capsys.readouterr().out


def test_a_phase_without_any_verdict_is_refused(start):
    run = start("--unfinished-reward", "0")

    class Silent:
        def judge(self, items):
            return [Verdict(None, None, None, "unparsed")] * len(items)
    run.memory["judge"] = Silent()
    run.model.config.eos_ids = list(range(run.model.config.vocab_size))  # every answer ends
    with pytest.raises(ValueError, match="ppo phase 0: the judge gave no verdict on any of 8 ans"):
        ppo.items(run)


# ----- The step -----

def test_micro_batches_change_nothing(start, same_in_parts):
    run = start()
    items = ppo.items(run)
    move(run.model)
    means = same_in_parts(run, items)
    assert means["clipped"] > 0


def test_a_step_is_the_objectives_over_its_tokens(start):
    run = start("--clip-ratio", "0.1", "--clip-value", "0.3", "--value-weight", "0.5")
    items = ppo.items(run)
    move(run.model)
    batch = whole_batch(run, items)
    found, wanted = ppo.step(run.model, batch, run.cfg), [0.0, 0.0, 0]
    logprobs, values = (x.tolist() for x in ppo.token_figures(run.model, batch, run.cfg))
    rows = zip(logprobs, values, *(batch[name].tolist() for name in
                                   ("old", "old_values", "advantages", "returns")), strict=True)
    for logprob, value, old, old_value, advantage, target in rows:
        ratio = torch.tensor(logprob - old).exp().item()
        clipped = min(max(ratio, 0.9), 1.1)
        wanted[0] += max(-advantage * ratio, -advantage * clipped)
        near = min(max(value, old_value - 0.3), old_value + 0.3)
        wanted[1] += 0.5 * 0.5 * max((value - target) ** 2, (near - target) ** 2)
        wanted[2] += abs(ratio - 1) > 0.1
    assert found["policy"].item() == pytest.approx(wanted[0], rel=1e-4, abs=1e-4)
    assert found["value"].item() == pytest.approx(wanted[1], rel=1e-4, abs=1e-4)
    assert found["clipped"].item() == wanted[2] > 0


# ----- Runs -----

def test_the_reward_rises_and_the_books_are_kept(command):
    """Exact rules reward a model that has seen little; the control has no learning rate."""
    scores = {}
    for lr, steps in (("1e-3", 56), ("1e-12", 24)):
        folder = command(
            "ppo", "--judge", "rule", "--no-fit-reward", "--rollouts", "64", "--batch-size", "16",
            "--lr", lr, "--kl-beta", "0.01", "--no-evaluate", "--sft-steps", "40", "--sft-lr",
            "3e-3", "--max-new-tokens", "8", "--full", "--steps", str(steps), "--wordings", "3",
            "--pool-per-task", "4", out=lr, behind=False)
        rows, log = (data.read_records(folder / name) for name in ("rollouts.jsonl", "log.jsonl"))
        phases = sorted({row["phase"] for row in rows})
        assert phases == list(range(steps // 8))  # 2 epochs of 4 batches of 16
        assert len(rows) == 64 * len(phases)
        assert all(row["kl"] == pytest.approx(0, abs=1e-4) for row in rows if row["phase"] == 0)
        assert log[0]["clipped"] == 0 and len(log) == steps
        measured = data.read_records(folder / "probe.jsonl")  # agreement, before and after
        assert [x["step"] for x in measured] == [0, steps]
        scores[lr] = [sum(x["score"] for x in rows if x["phase"] == phase) / 64 for phase in phases]
    assert sum(scores["1e-3"][-3:]) / 3 > sum(scores["1e-12"]) / 3 + 0.25


def test_the_command_leaves_an_adapter_without_its_head_inside(command):
    folder = command("ppo", "--judge", "length", "--no-fit-reward", "--rollouts", "8",
                     "--ppo-epochs", "1", "--pool-per-task", "4")
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+PPO"]
    assert {"adapter_model.safetensors", heads.HEAD, "rollouts.jsonl"} <= {
        path.name for path in folder.iterdir()}
    assert sorted({x["phase"] for x in data.read_records(folder / "rollouts.jsonl")}) == [0, 1]
    assert not (folder / "candidates.jsonl").exists()  # every phase samples its own answers


def test_it_fits_a_reward_model_first(command, candidates):
    pytest.importorskip("methods.reward", reason="the method reward was deleted")
    folder = command("ppo", "--candidates", str(candidates), "--judge", "rule", "--rollouts", "8",
                     "--rm-steps", "2", "--rm-lr", "0.25", "--no-evaluate", "--pool-per-task", "4")
    assert (folder / "reward" / heads.HEAD).exists()
    rows = data.read_records(folder / "reward/log.jsonl")
    assert len(rows) == 2 and (folder / "rollouts.jsonl").exists()
    saved = json.loads((folder / "reward/config.json").read_text())
    assert (saved["steps"], saved["lr"]) == (2, 0.25)


def test_the_reward_model_on_the_way_is_not_compared(command, candidates):
    """It answers nothing, so the table has no row for it."""
    pytest.importorskip("methods.reward", reason="the method reward was deleted")
    folder = command("ppo", "--candidates", str(candidates), "--judge", "rule", "--rollouts", "8",
                     "--rm-steps", "2", "--pool-per-task", "4", "--compare")
    titles = ["base", "SFT", "SFT(IA)", "SFT(IA)+PPO"]
    assert list(json.loads((folder / "metrics.json").read_text())) == titles


@pytest.mark.parametrize("more, needed", [
    (("--judge", "rule"), {"reward": {"steps": 100, "lr": 1e-4}}),
    (("--judge", "rule", "--no-fit-reward"), {}),
    (("--judge", "reward", "--reward-model", "FOLDER"), {})])
def test_a_reward_model_is_needed_unless_the_judges_rewards_are_taken(
        more, needed, make_run, tmp_path):
    (tmp_path / "value_head.safetensors").touch()
    more = [str(tmp_path) if word == "FOLDER" else word for word in more]
    assert ppo.also_needs(make_run("ppo", *more).cfg) == needed


def test_the_reward_model_on_the_way_asks_the_same_server(make_run):
    pytest.importorskip("methods.reward", reason="the method reward was deleted")
    run = make_run("ppo", "--judge", "http", "--judge-url", "http://x/v1", "--judge-model", "m")
    cfg = settings.stage_config(run.cfg, "reward")
    assert (cfg.judge, cfg.judge_url, cfg.judge_model) == ("http", "http://x/v1", "m")


@pytest.mark.parametrize("wanted, more", [
    ("--judge reward needs --reward-model", ("--judge", "reward")),
    ("--top-p 1", ("--top-p", "0.9")), ("--temperature above 0", ("--temperature", "0")),
    ("--dropout 0", ("--dropout", "0.1")),
    ("are no whole number of batches", ("--rollouts", "1", "--ppo-epochs", "1")),
    ("are no whole number of batches", ("--rollouts", "64", "--batch-size", "48"))])
def test_wrong_flags_are_refused(wanted, more, refused):
    refused(wanted, "ppo", *more)
