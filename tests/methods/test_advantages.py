"""advantages.py: PPO's figures against their definitions, by hand, and against trl."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from methods.advantages import (
    adapted_beta,
    gae,
    last_tokens,
    policy_loss,
    shaped_rewards,
    value_loss,
    whiten,
)


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.0, 1.0)])
def test_advantages_against_their_definition(gamma, gae_lambda):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, within each answer."""
    lengths = [3, 1, 5]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    rewards, values = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    advantages, returns = gae(rewards, values, ids, gamma=gamma, gae_lambda=gae_lambda)
    start = 0
    for n in lengths:
        r, v = rewards[start:start + n].tolist(), [*values[start:start + n].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            wanted = sum((gamma * gae_lambda) ** k * deltas[t + k] for k in range(n - t))
            assert advantages[start + t].item() == pytest.approx(wanted, abs=1e-12)
        start += n
    assert torch.equal(returns, advantages + values)
    if gamma == gae_lambda == 1:  # the return is then the plain sum of what is still to come
        assert returns[3].item() == pytest.approx(rewards[3].item(), abs=1e-12)
        assert returns[4].item() == pytest.approx(rewards[4:].sum().item(), abs=1e-12)


def test_the_score_lands_on_the_last_token_and_kl_on_each():
    ids, scores = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2.0, -1.0])
    old, reference = torch.randn(5), torch.randn(5)
    wanted = -0.1 * (old - reference)
    wanted[1] += 2.0
    wanted[4] -= 1.0
    found = shaped_rewards(scores, old, reference, ids, beta=0.1)
    torch.testing.assert_close(found, wanted)
    assert last_tokens(ids).tolist() == [False, True, False, False, True]


def test_the_objectives_by_hand():
    logprobs, old = torch.tensor([0.5, -0.5, 0.1, 0.5]), torch.zeros(4)
    advantages, wanted = torch.tensor([1.0, -1.0, 2.0, -2.0]), []
    for a, ratio in zip(advantages.tolist(), logprobs.exp().tolist(), strict=True):
        wanted.append(max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)))
    torch.testing.assert_close(policy_loss(logprobs, old, advantages),
                               torch.tensor(wanted))
    found = value_loss(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.9]),
                                torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.5 * 1.8**2, 0.5]))


def test_the_clipped_objective_is_that_of_trl():
    """GRPO's per-token loss with advantages per token, a mean over tokens ("bnpo")."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    new, old, advantages = (torch.randn(3, 6) * 0.3 for _ in range(3))
    mask = (torch.arange(6) < torch.tensor([[6], [2], [4]])).long()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros(3, 6), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=0.0, loss_type="bnpo", epsilon_low=0.2,
        epsilon_high=0.2, args=SimpleNamespace(delta=None), use_vllm=False,
        model=SimpleNamespace(training=False), _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x))
    ids = torch.zeros(3, 6).long()
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids,
              "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old}
    wanted = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    found = policy_loss(new[mask > 0], old[mask > 0], advantages[mask > 0])
    # Terms of either sign nearly cancel at times: what counts is their size, about 1.
    assert found.mean().item() == pytest.approx(wanted.item(), abs=1e-6)


def test_a_clipped_token_has_no_gradient():
    logprobs = torch.tensor([0.5, -0.5], requires_grad=True)
    policy_loss(logprobs, torch.zeros(2), torch.tensor([1.0, -1.0])).sum().backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]  # pushed past the clip in the wanted direction
    logprobs.grad = None
    policy_loss(logprobs, torch.zeros(2), torch.tensor([-1.0, 1.0])).sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([math.exp(0.5), -math.exp(-0.5)])


def test_gradients_of_the_objectives_against_finite_differences():
    x, old, advantages = (torch.randn(6, dtype=torch.float64) for _ in range(3))
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: policy_loss(p, old, advantages), x)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, advantages), x)


@pytest.mark.parametrize("new, old, advantage", [
    (0.0, -89.0, 1.0), (0.0, -89.0, -1.0), (-1e4, 0.0, -1.0), (1e4, -1e4, 1.0)])
def test_ratios_at_their_limits_are_finite(new, old, advantage):
    logprob = torch.tensor([new], requires_grad=True)
    loss = policy_loss(logprob, torch.tensor([old]), torch.tensor([advantage]))
    loss.sum().backward()
    assert loss.isfinite().all() and logprob.grad.isfinite().all()


@pytest.mark.parametrize("new, old, wanted", [(-1e4, 0.0, 1e4), (1e4, -1e4, 0.0), (0.0, 0.0, 0.0)])
def test_values_at_their_limits_are_finite(new, old, wanted):
    value = torch.tensor([new], requires_grad=True)
    loss = value_loss(value, torch.tensor([old]), torch.tensor([wanted]))
    loss.sum().backward()
    assert loss.isfinite().all() and value.grad.isfinite().all()


@pytest.mark.parametrize("n", [0, 1])
def test_advantages_at_their_limits_are_finite(n):
    """Of no token and of one."""
    found = gae(torch.ones(n), torch.full((n,), 3.0), torch.zeros(n, dtype=torch.long))
    assert [x.tolist() for x in found] == [[-2.0] * n, [1.0] * n]


@pytest.mark.parametrize("kl", [0.0, -1e9, 1e9])
def test_the_coefficient_at_its_limits_is_finite(kl):
    assert 0.097 < adapted_beta(0.1, kl, 1e-9) < 0.103


def test_whitening():
    values = torch.randn(50, dtype=torch.float64) * 3 + 5
    white = whiten(values)
    assert white.mean().item() == pytest.approx(0, abs=1e-9)
    assert white.std().item() == pytest.approx(1, abs=1e-6)
    kept = whiten(values, shift_mean=False)
    assert kept.mean().item() == pytest.approx(values.mean().item(), abs=1e-9)
    assert kept.std().item() == pytest.approx(1, abs=1e-6)
    assert whiten(torch.tensor([3.0])).tolist() == [0.0]
    assert whiten(torch.tensor([3.0]), shift_mean=False).tolist() == [3.0]
    assert whiten(torch.ones(5)).abs().max() == 0 == len(whiten(torch.ones(0)))


def test_adaptive_kl_moves_by_a_bounded_step():
    assert adapted_beta(0.1, 6.0, 6.0) == 0.1
    assert adapted_beta(0.1, 6.6, 6.0) == pytest.approx(0.1 * 1.01)
    assert adapted_beta(0.1, 600.0, 6.0) == pytest.approx(0.1 * 1.02)
    assert adapted_beta(0.1, -5.0, 6.0) == pytest.approx(0.1 * 0.98)
