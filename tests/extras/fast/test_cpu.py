"""extras/fast/cpu.py: products by other layouts, and the weights back afterwards."""

import copy

import pytest
import torch

from extras.fast import accelerate, prepacked
from extras.fast.cpu import packs
from model import Packed, Sampling, generate

CONFIGS = [{}, {"attention_bias": True, "mlp_bias": True, "tie_embeddings": True},
           {"vocab_size": 321, "hidden_dim": 33, "dim": 24, "head_dim": 6}]
ONEDNN = torch.backends.mkldnn.is_available()
ONEDNN = ONEDNN and torch.backends.cpu.get_cpu_capability().startswith("AVX")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("together", [1, 8])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_packed_weights_serve_alike_and_come_back(make_model, config, dtype, tolerance, together):
    model = accelerate(make_model(**config)).to(dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids, block = torch.randint(300, (23,)), model.model.layers[0]
    storage = block.mlp.up_proj.weight.untyped_storage()

    def logits(length, rows=None):
        return model.lm_head(model.hidden(ids[:length], Packed([length]), rows))
    with torch.inference_mode():
        expected = logits(23)
        with pytest.raises(RuntimeError, match="inside"), prepacked(model, together):
            with prepacked(model, together):
                inner = logits(23)
            laid, freed = bool(block.products), not storage.nbytes()
            found, few, none = logits(23), logits(1), logits(23, torch.tensor([], dtype=torch.long))
            chosen = logits(23, torch.tensor([20, 3]))
            raise RuntimeError("inside")
    assert laid == freed and none.shape == (0, model.config.vocab_size)
    assert laid == (ONEDNN and (together > 1 or dtype == torch.bfloat16)) or dtype == torch.bfloat16
    bound = tolerance * expected.abs().max()
    assert (chosen - found[[20, 3]]).abs().max() <= bound / 10
    assert torch.equal(inner, found) and (found - expected).abs().max() <= bound
    assert (few - expected[:1]).abs().max() <= bound and not block.products
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.skipif(not ONEDNN, reason="no other layouts on this machine")
@pytest.mark.parametrize("dtype, n, packed", [(torch.float32, 3, True), (torch.float32, 1, False),
                                              (torch.bfloat16, 3, True)])
def test_sampling_packs_the_weights(fast, dtype, n, packed):
    model, found = copy.deepcopy(fast).to(dtype), set()
    block = model.model.layers[1]

    def watch(answer):
        found.add(bool(block.products))
    generate(model, [[1, 2, 3]] * n, Sampling(3), watch=watch)
    assert found == {packed} and not block.products


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("out, bias", [(1, True), (7, False), (96, True), (1200, False)])
def test_one_row_is_multiplied_in_parts(out, bias, threads, fast):
    linear = fast.lm_head.__class__(40, out, bias)
    x = torch.randn(1, 40)
    torch.set_num_threads(threads)
    with torch.no_grad():
        found = linear(x)
    torch.set_num_threads(1)
    assert found.shape == (1, out) and not packs(linear, 1)
    assert torch.allclose(found, torch.nn.functional.linear(x, linear.weight, linear.bias),
                          atol=1e-6)
    assert linear(x).requires_grad  # with gradients torch's own product serves
