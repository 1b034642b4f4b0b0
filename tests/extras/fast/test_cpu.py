"""extras/fast/cpu.py: oneDNN's products, other layouts, and the weights back afterwards."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from extras.fast import accelerate, cpu, prepacked
from extras.fast.check import check
from extras.fast.cpu import FastLinear, product
from model import Packed, Sampling, generate

CONFIGS = [{}, {"attention_bias": True, "mlp_bias": True, "tie_embeddings": True},
           {"vocab_size": 321, "hidden_dim": 33, "dim": 24, "head_dim": 6}]
ONEDNN = torch.backends.mkldnn.is_available()
ONEDNN = ONEDNN and torch.backends.cpu.get_cpu_capability().startswith("AVX")
BFLOAT16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
    assert laid == (BFLOAT16 if dtype == torch.bfloat16 else ONEDNN)
    bound = tolerance * expected.abs().max()
    assert (chosen - found[[20, 3]]).abs().max() <= bound / 10
    assert torch.equal(inner, found) and (found - expected).abs().max() <= bound
    assert (few - expected[:1]).abs().max() <= bound and not block.products
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.skipif(not ONEDNN, reason="no other layouts on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3])
def test_sampling_packs_the_weights(fast, dtype, n):
    model, found = copy.deepcopy(fast).to(dtype), set()
    block = model.model.layers[1]

    def watch(answer):
        found.add(bool(block.products))
    generate(model, [[1, 2, 3]] * n, Sampling(3), watch=watch)
    assert found == {dtype == torch.float32 or BFLOAT16} and not block.products


@pytest.fixture
def counted(monkeypatch):
    """A list that grows with every product of oneDNN."""
    calls, multiply = [], cpu.multiply

    def count(*args):
        calls.append(args[0].shape)
        return multiply(*args)
    monkeypatch.setattr(cpu, "multiply", count)
    return calls


@pytest.mark.skipif(not ONEDNN, reason="torch's own product serves on this machine")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 77, 500])
def test_float32_rows_and_their_gradients(rows, frozen, bias, counted):
    plain = torch.nn.Linear(48, 80, bias)
    linear = FastLinear(48, 80, bias)
    linear.load_state_dict(plain.state_dict())
    plain.weight.requires_grad_(not frozen), linear.weight.requires_grad_(not frozen)
    wide = torch.randn(rows, 96)
    x, y = (wide[:, ::2].detach().requires_grad_() for _ in range(2))  # not contiguous
    slopes = torch.randn(80, rows).T
    (linear(x) * slopes).sum().backward()
    assert counted == [(rows, 48), (rows, 80)] * (rows > 0)  # no rows: torch's own
    (plain(y) * slopes).sum().backward()
    assert torch.allclose(linear(x), plain(y), atol=1e-5)
    assert torch.allclose(x.grad, y.grad, atol=1e-5)
    for found, expected in zip(linear.parameters(), plain.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            assert torch.allclose(found.grad, expected.grad, atol=1e-4)
    counted.clear()
    with torch.no_grad():
        assert torch.allclose(product(x, linear.weight), y @ plain.weight.T, atol=1e-5)
    assert counted == [(rows, 48)] * (rows > 0)
    if frozen and rows and not bias:
        assert linear(x).grad_fn.saved_tensors[0] is None  # what it read is not kept


@pytest.mark.skipif(not ONEDNN, reason="torch's own product serves on this machine")
def test_only_what_needs_a_gradient_gets_one(counted):
    linear, x = FastLinear(48, 80), torch.randn(6, 48)
    linear(x).sum().backward()
    assert counted == [(6, 48)]
    assert torch.allclose(linear.weight.grad, x.sum(0).expand(80, -1), atol=1e-5)
    assert torch.equal(linear.bias.grad, torch.full((80,), 6.0))
    with torch.no_grad():
        linear(x)
    assert len(counted) == 2


@pytest.mark.skipif(not ONEDNN, reason="torch's own product serves on this machine")
def test_a_wrong_backward_pass_is_found(monkeypatch):
    right = cpu.FloatProduct.backward
    monkeypatch.setattr(cpu.FloatProduct, "backward",
                        staticmethod(lambda ctx, grad: right(ctx, 1.5 * grad)))
    with pytest.raises(RuntimeError, match="the fast code's gradients differ"):
        check(torch.device("cpu"), torch.float32)


def test_other_rows_are_left_to_torch(counted):
    linear, x = FastLinear(48, 80), torch.randn(6, 48, requires_grad=True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[:, :47])
    with torch.backends.mkldnn.flags(enabled=False):
        assert linear(x).shape == (6, 80)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    assert linear.double()(x.double()).dtype == torch.float64
    assert linear.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert linear.float()(x.view(2, 3, 48)).shape == (2, 3, 80)
    assert not counted


@pytest.mark.skipif(not ONEDNN, reason="torch's own product serves on this machine")
def test_a_second_derivative_is_refused():
    x = torch.randn(3, 48, requires_grad=True)
    slope, = torch.autograd.grad(FastLinear(48, 80)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


MANY_SHAPES = """
import os, torch, extras.fast
from pathlib import Path

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])
x, weight = torch.randn(900, 64), torch.randn(64, 64)
before = resident()
for rows in range(100, 900):
    extras.fast.cpu.multiply(x[:rows], weight)
print((resident() - before) * 4 // 1024, *(os.environ[name] for name in extras.fast.cpu.KEPT))
"""


@pytest.mark.skipif(not ONEDNN or sys.platform != "linux", reason="reads /proc on an x86 CPU")
def test_few_kernels_are_kept_unless_the_user_says_how_many():
    other = {key: value for key, value in os.environ.items() if key not in cpu.KEPT}
    grown = {}
    for given in (None, "4096"):
        env = other | (dict.fromkeys(cpu.KEPT, given) if given else {})
        done = subprocess.run([sys.executable, "-c", MANY_SHAPES], capture_output=True, text=True,
                              env=env)
        grown[given], *kept = done.stdout.split()
        assert kept == [given or cpu.KERNELS] * 2, done.stderr
    assert int(grown[None]) < int(grown["4096"]) / 2
