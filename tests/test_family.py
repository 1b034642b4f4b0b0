"""Reward models, PPO, best of n, RSO, conditional tokens: equations, traps, and short runs on a tiny world."""

import dataclasses
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import judge
import lora
import losses
import train
from eval import correlation, reward_report
from model import PRESETS, Llama, save_model
from test_train import cat, planted, world                  # noqa: F401


# Losses --------------------------------------------------------------------------------------------------------------


def test_reward_loss_by_hand_and_soft_labels():
    rewards, better, worse = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64), torch.tensor([0, 2]), torch.tensor([1, 0])
    loss, n = losses.reward_loss(rewards, better, worse)
    assert n == 2 and loss.item() == pytest.approx(math.log1p(math.exp(-1.5)) + math.log1p(math.exp(-1.0)), abs=1e-12)
    loss, _ = losses.reward_loss(rewards, better, worse, probability=torch.tensor([0.3, 1.0]))
    assert loss.item() == pytest.approx(0.3 * math.log1p(math.exp(-1.5)) + 0.7 * math.log1p(math.exp(1.5)) + math.log1p(math.exp(-1.0)), abs=1e-7)
    loss, n = losses.reward_loss(rewards, better, worse, weights=torch.tensor([0.5, 0.25]))
    assert n == 0.75 and loss.item() == pytest.approx(0.5 * math.log1p(math.exp(-1.5)) + 0.25 * math.log1p(math.exp(-1.0)), abs=1e-7)


def test_soft_labels_of_dpo_are_label_smoothing_per_pair():
    h = torch.randn(5, dtype=torch.float64)
    soft = losses.dpo_loss(h, label_smoothing=torch.full((5,), 0.2))[0]
    assert soft.item() == pytest.approx(losses.dpo_loss(h, label_smoothing=0.2)[0].item(), abs=1e-7)
    with pytest.raises(ValueError, match="soft labels"):
        losses.dpo_loss(h, kind="hinge", label_smoothing=torch.full((5,), 0.2))
    with pytest.raises(ValueError, match="one half"):
        losses.dpo_loss(h, label_smoothing=0.5)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.0, 1.0)])
def test_gae_against_its_definition(gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, within each response."""
    lengths = [3, 1, 5]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    rewards, values = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    advantages, returns = losses.gae(rewards, values, ids, gamma=gamma, lam=lam)
    start = 0
    for n in lengths:
        r, v = rewards[start:start + n].tolist(), values[start:start + n].tolist() + [0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            assert advantages[start + t].item() == pytest.approx(sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)), abs=1e-12)
        start += n
    assert torch.equal(returns, advantages + values)
    if gamma == lam == 1:                                   # the return is then the plain sum of what is still to come
        assert returns[3].item() == pytest.approx(rewards[3].item(), abs=1e-12)
        assert returns[4].item() == pytest.approx(rewards[4:].sum().item(), abs=1e-12)


def test_the_score_lands_on_the_last_token_and_kl_on_each():
    ids = torch.tensor([0, 0, 1, 1, 1])
    old, reference = torch.randn(5), torch.randn(5)
    rewards = losses.shaped_rewards(torch.tensor([2.0, -1.0]), old, reference, ids, beta=0.1)
    wanted = -0.1 * (old - reference)
    wanted[1] += 2.0
    wanted[4] -= 1.0
    torch.testing.assert_close(rewards, wanted)


def test_ppo_losses_by_hand():
    logprobs, old = torch.tensor([0.5, -0.5, 0.1, 0.5]).log_softmax(0), torch.zeros(4)
    ratios = logprobs.exp()
    advantages = torch.tensor([1.0, -1.0, 2.0, -2.0])
    wanted = [max(-a * r, -a * min(max(r, 0.8), 1.2)) for a, r in zip(advantages.tolist(), ratios.tolist())]
    torch.testing.assert_close(losses.ppo_policy_loss(logprobs, old, advantages), torch.tensor(wanted))
    found = losses.ppo_value_loss(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.9]), torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.5 * 1.8 ** 2, 0.5]))


def test_a_clipped_token_has_no_gradient():
    logprobs = torch.tensor([0.5, -0.5], requires_grad=True)
    losses.ppo_policy_loss(logprobs, torch.zeros(2), torch.tensor([1.0, -1.0])).sum().backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]             # already pushed past the clip in the wanted direction
    logprobs.grad = None
    losses.ppo_policy_loss(logprobs, torch.zeros(2), torch.tensor([-1.0, 1.0])).sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([math.exp(0.5), -math.exp(-0.5)])


def test_whitening():
    values = torch.randn(50, dtype=torch.float64) * 3 + 5
    white = losses.whiten(values)
    assert white.mean().item() == pytest.approx(0, abs=1e-9) and white.std().item() == pytest.approx(1, abs=1e-6)
    assert losses.whiten(values, shift_mean=False).mean().item() == pytest.approx(values.mean().item(), abs=1e-9)
    assert losses.whiten(torch.tensor([3.0])).tolist() == [0.0]


def test_reward_and_ppo_gradients_against_finite_differences():
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    better, worse = torch.tensor([0, 2, 4]), torch.tensor([1, 3, 0])
    assert torch.autograd.gradcheck(lambda r: losses.reward_loss(r, better, worse, probability=torch.tensor([0.9, 0.2, 1.0]).double())[0], x)
    old, advantages = torch.randn(6).double(), torch.randn(6).double()
    assert torch.autograd.gradcheck(lambda p: losses.ppo_policy_loss(p, old, advantages), x)
    assert torch.autograd.gradcheck(lambda v: losses.ppo_value_loss(v, old, advantages), x)


def test_adaptive_kl_moves_by_a_bounded_step():
    assert losses.adapted_beta(0.1, 6.0, 6.0) == 0.1
    assert losses.adapted_beta(0.1, 600.0, 6.0) == pytest.approx(0.1 * 1.02)
    assert losses.adapted_beta(0.1, -5.0, 6.0) == pytest.approx(0.1 * 0.98)


# Choosing among samples ----------------------------------------------------------------------------------------------


def test_best_of_n_against_brute_force_and_published_numbers():
    rewards = [0.2, 1.0, 0.7, -0.5]
    assert [losses.best_of_n(rewards, n) for n in (1, 2, 3, 4)] == pytest.approx([0.35, 0.7666666667, 0.925, 1.0])
    rng = random.Random(random.randrange(10 ** 9))
    rewards, values = [rng.random() for _ in range(7)], [rng.random() for _ in range(7)]
    for n in range(1, 8):
        subsets = list(itertools.combinations(range(7), n))
        assert losses.best_of_n(rewards, n) == pytest.approx(sum(max(rewards[i] for i in s) for s in subsets) / len(subsets))
        chosen = sum(values[max(s, key=lambda i: rewards[i])] for s in subsets) / len(subsets)
        assert losses.best_of_n(rewards, n, values) == pytest.approx(chosen)
    assert losses.best_of_n([1.0, 1.0], 2, [0.0, 1.0]) == 0.5             # ties are chosen alike
    with pytest.raises(ValueError, match="cannot be estimated"):
        losses.best_of_n(rewards, 8)
    assert [losses.best_of_n_kl(n) for n in (1, 2, 4, 16, 64)] == pytest.approx([0, 0.1931, 0.6363, 1.8351, 3.1745], abs=1e-4)


def test_rejection_sampling_accepts_at_the_published_rates():
    """First-pass acceptance is exp((r - max) / beta): with n = 4 nothing stops the first pass early."""
    rewards, trials, rng = [0.2, 1.0, 0.7, -0.5], 4000, random.Random(7)
    counts = [0] * 4
    for _ in range(trials):
        class FirstPass:
            draws = 0

            def random(self):
                self.draws += 1
                return rng.random() if self.draws <= 4 else 0.0
        accepted = losses.rejection_sample(rewards, 4, beta=0.5, rng=(source := FirstPass()))
        assert sorted(accepted) == [0, 1, 2, 3] and source.draws <= 8
        first = accepted[:len(accepted) - (source.draws - 4)]             # the others came in the second pass
        for i in first:
            counts[i] += 1
    for count, wanted in zip(counts, (0.201897, 1.0, 0.548812, 0.049787)):
        assert abs(count / trials - wanted) <= 4 * math.sqrt(wanted * (1 - wanted) / trials)


def test_rejection_sampling_limits():
    rewards, rng = [0.1, 0.9, 0.5, 0.7, 0.3], random.Random(0)
    assert sorted(losses.rejection_sample(rewards, 2, beta=1e-6, rng=rng)) == [1, 3]        # the best
    assert losses.rejection_sample(rewards, 2, beta=1e6, rng=rng) == [0, 1]                 # the first
    assert sorted(losses.rejection_sample(rewards, 99, beta=0.5, rng=rng)) == [0, 1, 2, 3, 4]
    assert losses.rejection_sample([], 2, beta=0.5, rng=rng) == []
    with pytest.raises(ValueError, match="positive beta"):
        losses.rejection_sample(rewards, 2, beta=0.0, rng=rng)


@pytest.mark.parametrize("how, wanted", [("first", [(0, 1), (3, 2)]), ("tournament", [(0, 1), (3, 2), (3, 0), (3, 4)]),
                                         ("all", [(0, 1), (0, 2), (0, 4), (2, 1), (2, 4), (3, 0), (3, 1), (3, 2), (3, 4)])])
def test_ranked_pairs(how, wanted):
    assert sorted(train.ranked_pairs([2, 0, 1, 3, 0], how)) == sorted(wanted)


def test_ranked_pairs_leave_ties_out():
    assert train.ranked_pairs([1, 1, 2], "tournament") == [(2, 0)]
    assert train.ranked_pairs([1, 1], "first") == []


# Diagnostics ---------------------------------------------------------------------------------------------------------


def test_correlations():
    x = [1.0, 2.0, 3.0, 4.0]
    assert correlation(x, [2.0, 4.0, 6.0, 8.0]) == pytest.approx(1)
    assert correlation(x, [1.0, 10.0, 100.0, 1000.0], ranks=True) == pytest.approx(1)
    assert correlation(x, [4.0, 3.0, 3.0, 1.0], ranks=True) == pytest.approx(-0.948683, abs=1e-6)     # ties share a rank
    assert correlation(x, [1.0] * 4) is None


def test_reward_report():
    rows = [{"group": 0, "reward": 3.0, "judge": 2, "truth": 0, "length": 5}, {"group": 0, "reward": 1.0, "judge": 0, "truth": 2, "length": 9},
            {"group": 1, "reward": 0.0, "judge": 1, "truth": 1, "length": 2}, {"group": 1, "reward": 0.0, "judge": 0, "truth": 0, "length": 1}]
    found = reward_report(rows)
    assert found["accuracy"] == 0.75 and found["true_accuracy"] == 0.25 and found["longer_wins"] == 0.5 and found["comparisons"] == 2
    assert reward_report(rows[:1])["accuracy"] is None


# Runs ----------------------------------------------------------------------------------------------------------------


def stage(world, out, name, *more):                         # noqa: F811
    argv = cat(world, out, *more)
    argv[argv.index("cat")] = name
    return train.main(argv)


@pytest.mark.parametrize("name, more", [
    ("rso", ()), ("rso", ("--rso-ranking", "tournament", "--preference", "sigmoid")), ("rso", ("--reference-free",)),
    ("slic", ("--ce-target", "gold")), ("rrhf", ("--ft-reduction", "mean")), ("pro", ("--no-use-rewards",)), ("conditional", ()),
    ("conditional", ("--conditional", "quantiles")), ("conditional", ("--conditional", "reward")), ("conditional", ("--conditional", "best")),
])
def test_methods_on_scored_candidates(name, more, world, tmp_path):     # noqa: F811
    path = planted(world, tmp_path / "candidates.jsonl")
    assert stage(world, tmp_path / "run", name, "--candidates", str(path), "--no-compare", *more) == 0
    assert train.STAGES[name].title in json.loads((tmp_path / "run/metrics.json").read_text())


def test_reward_model_learns_and_then_judges(world, tmp_path, capsys):  # noqa: F811
    path = planted(world, tmp_path / "candidates.jsonl")
    steps = ("--steps", "40", "--lr", "3e-3")
    assert stage(world, tmp_path / "rm", "reward", "--candidates", str(path), *steps) == 0
    log = data.read_records(tmp_path / "rm/log.jsonl")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and log[-1]["loss"] < 0.4 and log[-1]["accuracy"] > 0.8
    found = json.loads((tmp_path / "rm/rewards.json").read_text())
    assert found["trained on"]["accuracy"] > 0.8
    capsys.readouterr()
    assert stage(world, tmp_path / "x", "expert", "--judge", "reward", "--reward-model", str(tmp_path / "rm"), "--no-compare") == 0
    records = data.read_records(tmp_path / "x/candidates.jsonl")
    assert {r["how"] for r in records} == {"scored"} and len({r["reward"] for r in records}) > 3
    assert stage(world, tmp_path / "y", "expert", "--judge", "length", "--no-compare") == 0


def test_ppo_raises_the_reward_and_keeps_the_books(world, tmp_path):    # noqa: F811
    """Answers of a model that has seen little are rewarded by exact rules; the same run without a learning rate is the control."""
    scores = {}
    for lr in ("1e-3", "1e-12"):
        out, more = tmp_path / lr, ("--rollouts", "64", "--batch-size", "16", "--lr", lr, "--kl-beta", "0.01", "--no-fit-reward", "--no-compare",
                                    "--no-evaluate", "--sft-steps", "40", "--sft-lr", "3e-3", "--max-new-tokens", "8", "--full")
        assert stage(world, out, "ppo", *more, "--steps", "80") == 0
        rows = data.read_records(out / "rollouts.jsonl")
        phases = sorted({row["phase"] for row in rows})
        assert len(rows) == 64 * 10 and phases == list(range(10))       # 2 epochs of 64 answers in batches of 16: 8 steps
        assert all(row["kl"] == pytest.approx(0, abs=1e-4) for row in rows if row["phase"] == 0)
        scores[lr] = [sum(r["score"] for r in rows if r["phase"] == p) / 64 for p in phases]
        log = data.read_records(out / "log.jsonl")
        assert log[0]["clipped"] == 0 and len(log) == 80
    assert sum(scores["1e-3"][-3:]) / 3 > sum(scores["1e-12"]) / 10 + 0.25


def ppo_run(world, out, *more):                             # noqa: F811
    """A run at the start of its ppo stage."""
    argv = cat(world, out, "--no-fit-reward", "--rollouts", "8", "--batch-size", "8", *more)
    argv[argv.index("cat")] = "ppo"
    run = train.make_run(train.parse_config(argv))
    run.model = train.trainable(run.cfg, None)
    train.add_head(run.model)
    run.folder.mkdir(exist_ok=True)
    return run


def shaken(model):
    """The same model with other adapters, or other weights where it has none."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)


def test_ppo_draws_anew_each_phase_and_measures_kl_from_its_start(world, tmp_path):     # noqa: F811
    run = ppo_run(world, tmp_path, "--unfinished-reward", "-3")
    train.begin_ppo(run)
    run.memory["todo"] = run.memory["todo"][:1]             # one question, so that phases differ by their draws alone
    said = [[group["documents"][0]["labels"] for group in train.ppo_groups(run)] for _ in range(2)]
    assert not any(one in said[0] for one in said[1])
    shaken(run.model)
    groups = train.ppo_groups(run)
    rows = [row for row in data.read_records(tmp_path / "rollouts.jsonl") if row["phase"] == 2]
    assert all(row["score"] == -3 for row in rows if not row["finished"]) and not all(row["finished"] for row in rows)
    with torch.no_grad():
        for group, row in zip(groups, rows, strict=True):
            batch = train.collate([group], "cpu")
            now = train.policy_and_values(run.model, batch, run.cfg)[0].sum()
            with lora.disabled(run.model):                  # a fresh adapter changes nothing: the base is the start
                start = train.policy_and_values(run.model, batch, run.cfg)[0].sum()
            assert row["kl"] == pytest.approx(float(now - start), abs=1e-3)
    assert max(abs(row["kl"]) for row in rows) > 0.1
    advantages = torch.tensor([value for group in groups for value in group["per_token"]["advantages"]])
    assert advantages.mean() == pytest.approx(0, abs=1e-4) and advantages.var() == pytest.approx(1, abs=1e-3)


def test_ppo_scores_the_prompt_that_it_answered(world, tmp_path):       # noqa: F811
    """A prompt that is too long loses the same tokens for sampling and for training."""
    run = ppo_run(world, tmp_path, "--max-len", "16", "--max-new-tokens", "4")
    for group in train.ppo_groups(run):
        ids = group["documents"][0]["input_ids"]
        assert len(ids) <= 16 and ids[0] == run.tokenizer.bos_id


@pytest.mark.parametrize("more", [(), ("--full",)])
def test_the_judge_of_ppo_does_not_learn(more, world, tmp_path):        # noqa: F811
    run = ppo_run(world, tmp_path, "--judge", "self", *more)
    train.begin_ppo(run)
    items = [{**record, "response": "red hat"} for record in run.memory["todo"][:3]]
    before = run.memory["judge"].judge(items)
    shaken(run.model)
    assert run.memory["judge"].judge(items) == before
    run.memory.clear()
    train.begin_ppo(run)
    assert run.memory["judge"].judge(items) != before       # another model judges otherwise


def test_ppo_books_by_hand_in_its_first_phase(world, tmp_path):         # noqa: F811
    """No token has moved yet, so that every token of an answer returns its score; and the price of KL falls, as there is none."""
    run = ppo_run(world, tmp_path, "--gae-lam", "1", "--no-whiten-rewards", "--unfinished-reward", "-3", "--kl-target", "0.5")
    groups, rows = train.ppo_groups(run), data.read_records(tmp_path / "rollouts.jsonl")
    for group, row in zip(groups, rows, strict=True):
        assert group["per_token"]["returns"] == pytest.approx([row["score"]] * len(group["per_token"]["old"]), abs=1e-4)
    assert run.memory["beta"] == pytest.approx(losses.adapted_beta(run.cfg.kl_beta, 0.0, 0.5)) != run.cfg.kl_beta


def test_ppo_compares_in_the_type_that_its_steps_compute_in(world, tmp_path):           # noqa: F811
    run = ppo_run(world, tmp_path, "--full", "--dtype", "bfloat16")
    groups = train.ppo_groups(run)
    batch = train.collate(groups, "cpu")
    with train.precision(run.cfg, "cpu"):
        logprobs, _ = train.policy_and_values(run.model, batch, run.cfg)
    assert (logprobs - batch["old"]).abs().max() < 1e-5


def test_ppo_first_step_is_on_policy(world, tmp_path):                  # noqa: F811
    """Before any update every ratio is 1, the reference is the policy, and all values are the mean of what was returned."""
    argv = cat(world, tmp_path, "--temperature", "0.7", "--no-fit-reward")
    argv[argv.index("cat")] = "ppo"
    run = train.make_run(train.parse_config(argv))
    run.model = train.trainable(run.cfg, None)
    train.add_head(run.model)
    run.folder.mkdir(exist_ok=True)
    groups = train.ppo_groups(run)
    batch = train.collate(groups[:5], "cpu")
    logprobs, values = train.policy_and_values(run.model, batch, run.cfg)
    torch.testing.assert_close(logprobs.detach(), batch["old"], atol=1e-5, rtol=0)
    returned = [value for group in groups for value in group["per_token"]["returns"]]
    assert values.detach().unique().numel() == 1 and values[0].item() == pytest.approx(sum(returned) / len(returned), abs=1e-4)
    torch.testing.assert_close(values.detach(), batch["old_values"], atol=1e-5, rtol=0)
    for group in groups[:5]:                                # the scored ids are the sampled ones, at the sampling temperature
        document = group["documents"][0]
        ids = torch.tensor(document["input_ids"])
        logits = run.model(ids[None])[0] / 0.7
        wanted = [logits[t - 1].log_softmax(-1)[ids[t]].item() for t, label in enumerate(document["labels"]) if label != -100]
        assert group["per_token"]["old"] == pytest.approx(wanted, abs=1e-4)


def test_swapped_weights_come_back(world):                              # noqa: F811
    weight = torch.nn.Parameter(torch.randn(3))
    before = weight.detach().clone()
    with pytest.raises(RuntimeError), train.swapped([(weight, torch.zeros(3))]):
        assert not weight.any()
        raise RuntimeError
    assert torch.equal(weight, before)


@pytest.mark.parametrize("more, wanted", [
    (("--judge", "reward"), "--reward-model"), (("--top-p", "0.9"), "--top-p 1"), (("--rollouts", "1", "--ppo-epochs", "1", "--batch-size", "8"), "make no whole number of batches"),
    (("--rollouts", "64", "--batch-size", "48"), "whole number"),
])
def test_wrong_flags_of_ppo(more, wanted, world, tmp_path, capsys):     # noqa: F811
    argv = cat(world, tmp_path, *more)
    argv[argv.index("cat")] = "ppo"
    with pytest.raises(SystemExit):
        train.parse_config(argv)
    assert wanted in capsys.readouterr().err


def test_best_answers_of_verdicts_and_of_numbers():
    group = [{"reward": r, "how": "rule"} for r in (2, 1, 0, None)]
    assert [len(part) for part in train.best_answers(group)] == [1, 2]
    assert train.best_answers(group[1:3])[0] == []          # verdicts: no best answer below 2
    group = [{"reward": r, "how": "scored"} for r in (0.3, -1.0)]
    assert train.best_answers(group)[0] == [group[0]]


def test_conditional_marks_follow_the_reward(world, tmp_path):          # noqa: F811
    path = planted(world, tmp_path / "candidates.jsonl")
    argv = cat(world, tmp_path / "run", "--candidates", str(path))
    argv[argv.index("cat")] = "conditional"
    run = train.make_run(train.parse_config(argv))
    groups = train.conditional_groups(run)
    texts = [run.tokenizer.decode(group["documents"][0]["input_ids"]) for group in groups]
    good = sum("good answer" in text for text in texts)
    assert good == 10 and len(texts) == 40                  # of four answers per question one is right
    assert train.best_mark(run) == "good answer : "
    run.cfg = dataclasses.replace(run.cfg, conditional="best")
    assert len(train.conditional_groups(run)) == 10


def test_held_out_questions_teach_no_reward_model(world, tmp_path, monkeypatch):        # noqa: F811
    path = planted(world, tmp_path / "candidates.jsonl")
    argv = cat(world, tmp_path / "run", "--candidates", str(path))
    argv[argv.index("cat")] = "reward"
    run = train.make_run(train.parse_config(argv))
    monkeypatch.setattr(train, "held_out", lambda record: record["task"] == "colour")
    groups = train.reward_groups(run)
    assert {group["name"].split("/")[0] for group in groups} == {"person"}
    assert all(len(group["pairs"]) > 1 and sum(group["pair_weights"]) == pytest.approx(1) for group in groups)       # each question counts once


def test_full_tuning_keeps_its_weights_in_float32(world, tmp_path):     # noqa: F811
    cfg = train.parse_config(cat(world, tmp_path, "--full", "--dtype", "bfloat16"))
    assert {p.dtype for p in train.trainable(cfg, None).parameters()} == {torch.float32}


def test_later_rounds_of_conditional_ask_with_the_best_mark(world, tmp_path, monkeypatch):     # noqa: F811
    asked, argv = [], cat(world, tmp_path / "run")
    argv[argv.index("cat")] = "conditional"
    run = train.make_run(train.parse_config(argv))
    monkeypatch.setattr(train, "sampled", lambda run, records, prompts: asked.append(prompts[0]) or [train.Completion("x", [], True) for _ in records])
    for number in (0, 1):
        train.answered(dataclasses.replace(run, round=number), train.unanswered(run)[:2])
    assert [train.best_mark(run) in prompt for prompt in asked] == [False, True]


def test_soft_labels_of_a_step_are_those_of_the_first_answer(monkeypatch):
    sums, q = torch.randn(4), torch.rand(2)
    monkeypatch.setattr(train, "document_logprobs", lambda model, batch: (sums, torch.ones(4)))
    batch = {"reference": torch.zeros(4), "better": torch.tensor([0, 2]), "worse": torch.tensor([1, 3]), "probability": q}
    h = 0.1 * (sums[[0, 2]] - sums[[1, 3]])
    wanted = -(q * torch.nn.functional.logsigmoid(h) + (1 - q) * torch.nn.functional.logsigmoid(-h)).sum()
    assert train.dpo_step(None, batch, train.TrainConfig(stage="rlaif", beta=0.1))["loss"].item() == pytest.approx(wanted.item(), abs=1e-5)


def test_pairs_without_a_label_are_left_out_and_told(world, tmp_path, monkeypatch, capsys):        # noqa: F811
    path, argv = planted(world, tmp_path / "candidates.jsonl"), cat(world, tmp_path / "run", "--judge", "self")
    argv[argv.index("cat")] = "rlaif"
    run = train.make_run(train.parse_config([*argv, "--candidates", str(path)]))
    run.folder.mkdir()
    monkeypatch.setattr(train, "make_labeller", lambda run: lambda pairs: [None if pair["task"] == "colour" else 0.25 for pair in pairs])
    train.collect_preferences(run)
    rows = data.read_records(run.folder / "preferences.jsonl")
    assert rows and {(row["task"], row["probability"]) for row in rows} == {("person", 0.25)} and "got no label and are left out" in capsys.readouterr().out


def test_rejection_sampling_of_answers_said_twice_takes_each_once(world, tmp_path, monkeypatch):      # noqa: F811
    argv = cat(world, tmp_path / "run")
    argv[argv.index("cat")] = "rso"
    run, seen = train.make_run(train.parse_config(argv)), []
    group = [{"task": "t", "id": "1", "wording": "w", "instruction": "w", "input": "", "target": "a", "response": text, "reward": reward, "how": "rule"}
             for text, reward in (("a", 2), ("b", 0), ("a", 2), ("c", 1), ("b", 0), ("d", None))]
    monkeypatch.setattr(train, "grouped_candidates", lambda run: [group])
    monkeypatch.setattr(train, "with_reference", lambda run, groups: groups)
    monkeypatch.setattr(losses, "rejection_sample", lambda rewards, n, **_: seen.append(sorted(rewards)) or list(range(len(rewards))))
    train.rso_groups(run)
    assert seen == [[0, 1, 2]]


def test_a_conditional_model_alone_is_evaluated_with_the_best_mark(world, tmp_path, monkeypatch):      # noqa: F811
    path, seen, evaluate = planted(world, tmp_path / "candidates.jsonl"), [], train.evaluate_model
    monkeypatch.setattr(train, "evaluate_model", lambda model, tokenizer, rows, config: seen.append(config.prefix) or evaluate(model, tokenizer, rows, config))
    assert stage(world, tmp_path / "run", "conditional", "--candidates", str(path)) == 0
    assert seen == ["", "", "", "good answer : "]           # base, SFT, SFT(IA), and the one that knows marks


# Against trl ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, trl_kind, switches", [("sigmoid", "sigmoid", {}), ("hinge", "hinge", {}), ("ipo", "ipo", {"length_normalize": True}),
                                                      ("robust", "robust", {"label_smoothing": 0.1})])
def test_dpo_equals_trl(kind, trl_kind, switches, tmp_path):
    """Policy, reference, pairs and loss of the dpo stage against trl's trainer, on random models and ragged responses."""
    trl, transformers = pytest.importorskip("trl", reason="trl is not installed"), pytest.importorskip("transformers")
    tokenizers, datasets = pytest.importorskip("tokenizers"), pytest.importorskip("datasets")
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=64)
    ours = [Llama(config).init_weights(seed).requires_grad_(False) for seed in (1, 2)]
    for model, name in zip(ours, ("policy", "reference")):
        for weight in model.parameters():
            weight.mul_(3)                                  # far from uniform
        save_model(model, tmp_path / name)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3")),
                                                     pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    theirs = [transformers.LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("policy", "reference")]
    arguments = trl.DPOConfig(output_dir=str(tmp_path / "o"), loss_type=trl_kind, beta=0.3, report_to=[], bf16=False, fp16=False, use_cpu=True,
                              gradient_checkpointing=False, label_smoothing=switches.get("label_smoothing", 0.0))
    data_set = datasets.Dataset.from_list([{"prompt": "w4 w5", "chosen": "w6", "rejected": "w7"}])
    trainer = trl.DPOTrainer(model=theirs[0], ref_model=theirs[1], args=arguments, train_dataset=data_set, processing_class=tokenizer)

    sizes, prompt, pairs = [(5, 2), (3, 7), (4, 4)], torch.randint(3, 64, (3, 4)), []
    for size, start in zip(sizes, prompt):
        pairs.append([torch.cat([start, torch.randint(3, 64, (n,))]) for n in size])
    rows = [pair[side] for side in (0, 1) for pair in pairs]            # trl wants all chosen first
    ids, mask = torch.zeros(6, 11, dtype=torch.long), torch.zeros(6, 11, dtype=torch.long)
    for k, row in enumerate(rows):
        ids[k, :len(row)], mask[k, :len(row)] = row, 1
    completion = mask.clone()
    completion[:, :4] = 0
    wanted = trainer._compute_loss(theirs[0].eval(), {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}, False)

    groups = [{"documents": [{"input_ids": row.tolist(), "labels": [-100] * 4 + row[4:].tolist(), "cut": 0} for row in pair], "pairs": [(0, 1)]}
              for pair in pairs]
    reference = train.document_logprobs(ours[1], train.collate(groups, "cpu"))[0].tolist()
    for k, group in enumerate(groups):
        group["reference"] = reference[2 * k:2 * k + 2]
    cfg = dataclasses.replace(train.TrainConfig(), stage="dpo", preference=kind, beta=0.3, **switches)
    found = train.dpo_step(ours[0], train.collate(groups, "cpu"), cfg)["loss"] / 3
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-5)


# Files of preferences ------------------------------------------------------------------------------------------------


PAIR = ("Say hi.", "Hi!", "No.")
MESSAGES = [{"role": "user", "content": "Say hi."}]
FORMS = {
    "texts": {"prompt": "Say hi.", "chosen": "Hi!", "rejected": "No."},
    "messages": {"prompt": MESSAGES, "chosen": [{"role": "assistant", "content": "Hi!"}], "rejected": [{"role": "assistant", "content": "No."}]},
    "implicit prompt": {"chosen": MESSAGES + [{"role": "assistant", "content": "Hi!"}], "rejected": MESSAGES + [{"role": "assistant", "content": "No."}]},
    "binarized": {"prompt": "Say hi.", "chosen": MESSAGES + [{"role": "assistant", "content": "Hi!"}],
                  "rejected": MESSAGES + [{"role": "assistant", "content": "No."}], "score_chosen": 8.5, "score_rejected": 3.0},
    "sharegpt": {"conversations": [{"from": "human", "value": "Say hi."}], "chosen": {"from": "gpt", "value": "Hi!"}, "rejected": {"from": "gpt", "value": "No."}},
    "hh": {"chosen": "\n\nHuman: Say hi.\n\nAssistant: Hi!", "rejected": "\n\nHuman: Say hi.\n\nAssistant: No."},
    "ultrafeedback": {"instruction": "Say hi.", "completions": [{"response": "No.", "overall_score": 2.0}, {"response": "Hi!", "overall_score": 7.5}]},
    "rrhf": {"query": "Say hi.", "responses": ["Hi!", "No."], "scores": [1.0, -1.0]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lines", [False, True])
def test_forms_of_preferences(form, lines, tmp_path):
    path = tmp_path / "p.json"
    path.write_text((json.dumps(FORMS[form]) + "\n") * 2 if lines else json.dumps([FORMS[form]] * 2))
    found = data.load_candidates(path)
    assert len(found) == 4 and {c["id"] for c in found} == {"0", "1"} and all(name in found[0] for name in data.CANDIDATE)
    best, worst = sorted(found[:2], key=lambda c: -c["reward"])
    assert (best["instruction"], best["response"], worst["response"]) == PAIR and best["reward"] > worst["reward"] and worst["target"] == "Hi!"


def test_a_dialogue_keeps_its_turns(tmp_path):
    turns = [("system", "Be kind."), ("human", "Hi."), ("gpt", "Hello."), ("human", "How are you?")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "chosen": {"value": "Fine."}, "rejected": {"value": "Go."}}
    (tmp_path / "p.json").write_text(json.dumps([row]))
    assert data.load_candidates(tmp_path / "p.json")[0]["wording"] == "Be kind.\nuser: Hi.\nassistant: Hello.\nuser: How are you?"
    hh = {"chosen": "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: C?\n\nAssistant: D.", "rejected": "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: C?\n\nAssistant: E."}
    (tmp_path / "p.json").write_text(json.dumps([hh]))
    found = data.load_candidates(tmp_path / "p.json")
    assert found[0]["wording"] == "user: A?\nassistant: B.\nuser: C?" and [c["response"] for c in found] == ["D.", "E."]


@pytest.mark.parametrize("row, wanted", [
    ({"prompt": "a", "chosen": "b"}, "rejected"), ({"prompt": "a", "chosen": 3, "rejected": "c"}, "record 0: 3 is no response"),
    ({"prompt": "", "chosen": "a", "rejected": "c"}, "no prompt"), ({"prompt": " ", "chosen": "a", "rejected": "c"}, "the prompt is empty"),
    ({"chosen": MESSAGES, "rejected": [{"role": "user", "content": "x"}, MESSAGES[0]]}, "differ before their last turn"),
    ({"query": "a", "responses": ["b"], "scores": [1, 2]}, "one score per response"), ({"query": "a", "responses": ["b"], "scores": [1]}, "two or more"),
    ({"response": "a", "reward": 1}, '"task" is missing'),
    ({**dict.fromkeys(data.CANDIDATE, "x"), "reward": "high"}, "Expected a number, or null"),
    ({**dict.fromkeys(data.CANDIDATE, "x"), "reward": 1, "target": None}, "target is null. Expected a text"), ([1], "is a list"), ({"prompt": [{"role": "robot", "content": "x"}], "chosen": "a", "rejected": "b"}, "no turn"),
    ({"prompt": [{"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"}, "does not end with the user"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": "high"}, "Expected a number"),
])
def test_broken_preferences_are_told(row, wanted, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=wanted):
        data.load_candidates(tmp_path / "p.json")


@pytest.mark.parametrize("name", ["dpo", "slic", "rrhf"])
def test_real_preferences_train_as_they_are(name, tmp_path, capsys):
    shared = Path(__file__).parent.parent.parent / "shared" / "data"
    if not shared.is_dir():
        pytest.skip("the shared data is not there")
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=32000)
    save_model(Llama(config).init_weights(0), tmp_path / "model")
    (tmp_path / "model/tokenizer.model").write_bytes((shared / "tokenizers/mistral-v1.tokenizer.model").read_bytes())
    argv = ["--stage", name, "--model", str(tmp_path / "model"), "--candidates", str(shared / "preference/dpo_en_demo.json"), "--steps", "3",
            "--batch-size", "4", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    said = capsys.readouterr().out
    assert "of 600 answers" in said and "nothing is evaluated" in said
    assert len(data.read_records(tmp_path / "run/log.jsonl")) == 3


def test_fresh_wordings_are_those_beyond_sft(world, tmp_path, capsys):  # noqa: F811
    run = train.make_run(train.parse_config(cat(world, tmp_path, "--wordings", "1", "--fresh-wordings", "2")))
    assert {r["wording"] for r in train.unanswered(run) if r["task"] == "colour"} == {"colour :", "tell the colour"}
    run = train.make_run(train.parse_config(cat(world, tmp_path, "--wordings", "3", "--fresh-wordings", "2")))
    with pytest.raises(ValueError, match="Lower --wordings"):
        train.unanswered(run)


# AI feedback ---------------------------------------------------------------------------------------------------------


def test_soft_labels_average_both_orders():
    pairs = [{"input": "q", "output_1": "good", "output_2": "bad"}, {"input": "q", "output_1": "x", "output_2": "y"}]

    def by_odds(questions, **_):                            # sees the first letter as likelier by its position alone, and "good" by a bit
        replies = []
        for question in questions:
            text = question.messages[1]["content"]
            good_first = "good" in text and text.index("good") < text.index("bad")
            odds = 1.0 + (0.5 if good_first else -0.5 if "good" in text else 0.0)
            replies.append(judge.Reply(f"VERDICT {question.nonce}: a", odds=odds))
        return replies
    first, second = judge.preference_probabilities(by_odds, pairs)
    sigma = lambda x: 1 / (1 + math.exp(-x))                # noqa: E731
    assert first == pytest.approx((sigma(1.5) + 1 - sigma(0.5)) / 2) and second == pytest.approx(0.5)

    def parrot(questions, **_):
        return [judge.Reply(f"VERDICT {question.nonce}: a") for question in questions]
    assert judge.preference_probabilities(parrot, pairs) == [0.5, 0.5]    # verdicts that disagree between the orders

    def silent(questions, **_):
        return [judge.Reply("", "empty message") for _ in questions]
    assert judge.preference_probabilities(silent, pairs) == [None, None]


@pytest.mark.parametrize("more", [("--labels", "letters"), ("--labels", "scores"), ("--labels", "scores", "--judge", "rule")])
def test_rlaif_labels_pairs_and_trains(more, world, tmp_path, capsys):  # noqa: F811
    argv = cat(world, tmp_path / "run", "--judge", "self", *more, "--no-compare")
    argv[argv.index("cat")] = "rlaif"
    assert train.main(argv) == 0
    rows = data.read_records(tmp_path / "run/preferences.jsonl")
    assert rows and all(0 <= row["probability"] <= 1 and row["first"]["response"] != row["second"]["response"] for row in rows)
    assert train.STAGES["rlaif"].title in json.loads((tmp_path / "run/metrics.json").read_text())
    if more[1] == "letters":                                # a reward model from the same labels
        assert stage(world, tmp_path / "rm", "reward", "--preferences", str(tmp_path / "run/preferences.jsonl")) == 0
        assert (tmp_path / "rm/value_head.safetensors").exists() and len(data.read_records(tmp_path / "rm/log.jsonl")) == 3


def test_constitutional_trains_on_revisions(world, tmp_path, monkeypatch, capsys):  # noqa: F811
    asked = []

    class Chat:
        def __init__(self, *_, **__):
            pass

        def ask(self, questions, **_):
            asked.extend(question.messages[1]["content"] for question in questions)
            return [judge.Reply("too long ." if "Name the ways" in text.messages[1]["content"] else "red") for text in questions]
    monkeypatch.setattr(train, "LocalChat", Chat)
    (tmp_path / "principles.txt").write_text("say one word .\n")
    argv = cat(world, tmp_path / "run", "--judge", "self", "--principles", str(tmp_path / "principles.txt"), "--revisions", "2", "--no-compare")
    argv[argv.index("cat")] = "constitutional"
    assert train.main(argv) == 0
    rows = data.read_records(tmp_path / "run/revisions.jsonl")
    assert rows and all(row["revision"] == "red" and len(row["history"]) == 2 for row in rows) and all("say one word ." in text for text in asked)
    assert f"{len(rows)} of {len(rows)} answers were revised" in capsys.readouterr().out
    before = (tmp_path / "run/revisions.jsonl").read_bytes()
    argv[argv.index("--steps") + 1] = "3"
    assert train.main(argv) == 0 and (tmp_path / "run/revisions.jsonl").read_bytes() == before


def test_constitutional_with_the_model_itself(world, tmp_path, capsys):  # noqa: F811
    """A random model's critiques never end: each is a recorded failure, and nothing is made up."""
    argv = cat(world, tmp_path / "run", "--judge", "self", "--no-compare")
    argv[argv.index("cat")] = "constitutional"
    assert train.main(argv) == 2 and "nothing to train on" in capsys.readouterr().err
    rows = data.read_records(tmp_path / "run/revisions.jsonl")
    assert rows and all((row["revision"] is None) == any(turn["failure"] for turn in row["history"]) for row in rows)


def test_the_readme_s_method_of_your_own_runs(world, tmp_path):        # noqa: F811
    root = Path(__file__).parent.parent
    code = (root / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "simpo_step" in code and len(code.splitlines()) <= 30
    (tmp_path / "simpo.py").write_text(code)
    path = planted(world, tmp_path / "candidates.jsonl")
    argv = cat(world, tmp_path / "run", "--candidates", str(path), "--no-compare", "--beta", "2")
    argv[argv.index("cat")] = "simpo"
    done = subprocess.run([sys.executable, str(tmp_path / "simpo.py"), *argv], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SFT(IA)+SimPO" in json.loads((tmp_path / "run/metrics.json").read_text())
    first, *_, last = data.read_records(tmp_path / "run/log.jsonl")
    assert first["stage"] == "simpo" and last["loss"] < first["loss"]
    wrong = subprocess.run([sys.executable, str(tmp_path / "simpo.py"), *argv, "--lam", "1"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert wrong.returncode == 2 and "--lam means nothing" in wrong.stderr


# Review -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, more, wanted", [
    ("dpo", ("--preference", "hinge", "--label-smoothing", "0.1"), "changes nothing"), ("rso", ("--label-smoothing", "0.1"), "changes nothing"),
    ("rlaif", ("--labels", "letters"), "no letters"), ("reward", ("--rounds", "2"), "one round"), ("constitutional", (), "writes no critiques"),
    ("constitutional", ("--candidates", "x"), "means nothing"), ("cut", ("--judge", "length"), "writes no judgments"),
])
def test_flags_that_would_do_nothing_are_refused(name, more, wanted, world, tmp_path, capsys):      # noqa: F811
    argv = cat(world, tmp_path, *more) if name != "cut" else ["--stage", "cut", "--model", str(world / "model"), "--tasks", str(world / "tasks"), *more]
    if name != "cut":
        argv[argv.index("cat")] = name
    with pytest.raises(SystemExit):
        train.parse_config(argv)
    assert wanted in capsys.readouterr().err


def test_equal_rewards_make_quantiles_of_every_task(world, tmp_path):   # noqa: F811
    path = planted(world, tmp_path / "candidates.jsonl")
    records = [{**r, "reward": 2} for r in data.read_records(path)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    argv = ["--stage", "conditional", *cat(world, tmp_path / "run", "--candidates", str(path))[2:], "--conditional", "best", "--quantiles", "2"]
    run = train.make_run(train.parse_config(argv))
    texts = [run.tokenizer.decode(group["documents"][0]["input_ids"]) for group in train.conditional_groups(run)]
    assert len(texts) == 20
    colour = {r["target"] for r in records if r["task"] == "colour"}
    last = [text.split()[-1] for text in texts]
    assert any(word in colour for word in last) and any(word not in colour for word in last)


def test_soft_labels_turn_pairs_round_in_the_log():
    batch = {"probability": torch.tensor([0.95, 0.05])}
    assert train.likelier(batch, torch.zeros(2)).tolist() == [1.0, -1.0] and train.likelier({}, torch.zeros(2)).tolist() == [1.0, 1.0]


def test_scores_of_all_kinds_lie_on_one_scale():
    """An exact answer beats every judged one, an expected one every unexpected one."""
    label = train.make_labeller(type("Run", (), {"cfg": train.TrainConfig(stage="rlaif", labels="scores")})())
    exact = {"how": "exact", "reward": 2, "p_expected": None, "p_correct": None}
    sure = {"how": "judged", "reward": 2, "p_expected": 0.99, "p_correct": 0.95}
    expected = {"how": "judged", "reward": 1, "p_expected": 0.9, "p_correct": 0.1}
    unexpected, empty = {"how": "judged", "reward": 0, "p_expected": 0.45, "p_correct": None}, {"how": "empty", "reward": 0, "p_expected": None, "p_correct": None}
    order = [exact, sure, expected, unexpected, empty]
    for a, b in itertools.combinations(order, 2):
        assert label([{"first": a, "second": b}])[0] > 0.5 > label([{"first": b, "second": a}])[0]
    one_step = [{"how": "judged", "reward": 2, "p_expected": None, "p_correct": p} for p in (0.97, 0.51)]
    assert label([{"first": one_step[0], "second": one_step[1]}])[0] > 0.9


def test_outside_preferences_can_be_labelled(world, tmp_path, monkeypatch):         # noqa: F811
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": f"say {k}", "chosen": "red", "rejected": "blue"} for k in range(4)]))
    argv = ["--stage", "rlaif", "--model", str(world / "model"), "--candidates", str(tmp_path / "p.json"), "--labels", "letters", "--steps", "2",
            "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    assert len(data.read_records(tmp_path / "run/preferences.jsonl")) == 4


def test_a_reference_computes_as_the_step_does(world, tmp_path):        # noqa: F811
    """With --full in bfloat16, too, DPO starts at log 2 exactly."""
    path = planted(world, tmp_path / "candidates.jsonl")
    assert stage(world, tmp_path / "run", "dpo", "--candidates", str(path), "--full", "--dtype", "bfloat16", "--no-compare", "--no-evaluate") == 0
    first = data.read_records(tmp_path / "run/log.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["margin"] == 0


def test_reward_and_ppo_with_all_weights_on_two_ranks(world, tmp_path):  # noqa: F811
    path = planted(world, tmp_path / "candidates.jsonl")
    argv = ["--stage", "reward", *cat(world, tmp_path / "run", "--candidates", str(path), "--full", "--no-evaluate")[2:]]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(Path(train.__file__)), *argv]
    done = subprocess.run(line, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run/value_head.safetensors").exists()


def test_an_unfinished_ppo_leaves_no_rollouts_behind(world, tmp_path, monkeypatch):         # noqa: F811
    more = ("--rollouts", "8", "--batch-size", "8", "--no-fit-reward", "--no-compare", "--no-evaluate")
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_trained", lambda run: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert stage(world, tmp_path / "run", "ppo", *more) == 1
    assert stage(world, tmp_path / "run", "ppo", *more) == 0
    phases = [row["phase"] for row in data.read_records(tmp_path / "run/rollouts.jsonl")]
    assert phases == [0] * 8 + [1] * 8


def test_likelihood_terms_by_hand():
    """PRO's fine-tuning term, RRHF's by sum and by mean, and SLiC's on the fine-tuning target (spec 2.G)."""
    sums = torch.tensor([-5.8064740333, -8.7850893872, -12.7249884894, -3.7316307244], dtype=torch.float64)
    lengths = torch.tensor([4.0, 3.0, 5.0, 2.0], dtype=torch.float64)
    cfg = train.TrainConfig(stage="pro")
    found = {}

    def fixed(model, batch):
        return sums, lengths
    original, train.document_logprobs = train.document_logprobs, fixed
    try:
        found["pro"] = train.pro_step(None, {"rewards": [[3.0, 2.0, 1.0, 0.0]]}, cfg)
        pairs = losses.best_vs_lower_pairs([1, 3, 2, 0], rule="all")
        batch = {"weights": torch.tensor([0.0, 1.0, 0.0, 0.0]), "better": torch.tensor(pairs[0]), "worse": torch.tensor(pairs[1])}
        found["sum"], found["mean"] = (train.rrhf_step(None, batch, dataclasses.replace(cfg, ft_reduction=how)) for how in ("sum", "mean"))
        batch = {"better": torch.tensor([0]), "worse": torch.tensor([1]), "imitated": torch.tensor([2])}
        found["slic"] = train.slic_step(None, batch, dataclasses.replace(cfg, margin=1.0, lam=0.5))
    finally:
        train.document_logprobs = original
    assert found["pro"]["ce"].item() == pytest.approx(2.6129133150, abs=1e-8)
    assert (found["pro"]["rank"] + found["pro"]["ce"]).item() == pytest.approx(9.0882890244, abs=1e-8)
    assert found["sum"]["ce"].item() == pytest.approx(8.7850893872, abs=1e-8) and found["mean"]["ce"].item() == pytest.approx(8.7850893872 / 3, abs=1e-8)
    assert (found["sum"]["rank"] + found["sum"]["ce"]).item() == pytest.approx(13.4803087312, abs=1e-8)
    assert found["slic"]["ce"].item() == pytest.approx(6.3624942447, abs=1e-8)
