"""rollouts.py: PPO's answers; more of it in test_ppo.py, on runs of the stage."""

import pytest
import torch

from methods import rollouts


def test_swapped_weights_come_back_even_behind_an_error():
    weight = torch.nn.Parameter(torch.randn(3))
    before = weight.detach().clone()
    with pytest.raises(RuntimeError), rollouts.swapped([(weight, torch.zeros(3))]):
        assert not weight.any()
        raise RuntimeError
    assert torch.equal(weight, before)
