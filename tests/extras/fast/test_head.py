"""extras/fast/head.py: the values and gradients of logits, without logits."""

import pytest
import torch

from extras.fast.head import HeadLogprobs
from losses import complement_logprobs, gathered_logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_values_and_gradients_are_those_of_logits(scale, temperature):
    hidden = (torch.randn(700, 8, dtype=torch.float64) * scale).requires_grad_()
    weight, targets = torch.randn(50, 8, dtype=torch.float64), torch.randint(0, 50, (700,))
    logits, slopes = hidden @ weight.T / temperature, torch.randn(2, 700, dtype=torch.float64)
    plain = torch.stack([gathered_logprobs(logits, targets), complement_logprobs(logits, targets)])
    fused = torch.stack(HeadLogprobs.apply(hidden, weight, targets, temperature))
    assert torch.allclose(fused, plain, atol=1e-10, rtol=1e-12)
    expected, = torch.autograd.grad((plain * slopes).sum(), hidden)
    found, = torch.autograd.grad((fused * slopes).sum(), hidden)
    assert torch.allclose(found, expected, atol=1e-9)


def test_a_sure_model_stays_finite():
    """p(target) is 1 to the last bit; log(1 - p) still has its value, and its full gradient."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    logprobs, complements = HeadLogprobs.apply(hidden, weight, torch.tensor([0]), 1.0)
    assert logprobs.item() == 0 and complements.item() == pytest.approx(-200)
    slope, = torch.autograd.grad(complements.sum(), hidden)
    assert torch.allclose(slope, weight[1:2] - weight[:1])


def test_no_rows_and_no_gradients():
    weight, hidden = torch.randn(9, 4), torch.zeros(0, 4, requires_grad=True)
    logprobs, _ = HeadLogprobs.apply(hidden, weight, torch.zeros(0, dtype=torch.long), 1.0)
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    with torch.no_grad():
        found, _ = HeadLogprobs.apply(torch.randn(3, 4), weight, torch.tensor([1, 2, 3]), 1.0)
    assert found.isfinite().all()


def test_a_trained_head_and_an_adapted_one_are_left_to_the_course(fast):
    hidden, targets = torch.randn(3, 32), torch.tensor([1, 2, 3])
    assert fast.fused_logprobs(hidden, targets) is None
    fast.requires_grad_(False)
    found, _ = fast.fused_logprobs(hidden, targets)
    assert torch.allclose(found, gathered_logprobs(fast.lm_head(hidden), targets), atol=1e-5)
    fast.lm_head = torch.nn.Sequential(fast.lm_head)
    assert fast.fused_logprobs(hidden, targets) is None
