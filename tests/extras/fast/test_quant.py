"""extras/fast/quant.py: the codes by definition, products, gradients, and adapters over them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
from eval import DEMO
from extras.fast import accelerate, prepacked
from extras.fast.quant import (
    QUANTIZERS,
    QuantLinear,
    from_int8,
    from_nf4,
    join,
    nf4_levels,
    to_int8,
    to_nf4,
)
from lora import (
    LoraConfig,
    adapter_weights,
    apply_lora,
    disabled,
    lora_modules,
    merge_lora,
)
from model import Packed, Sampling, generate, load_model

# Dettmers et al. 2023, Appendix E
PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
             -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
             0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
             0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def quantised(weight, kind, dtype=torch.float32):
    linear = QuantLinear(weight.shape[1], weight.shape[0], kind, dtype, "cpu")
    linear.encode_rows(slice(0, len(weight)), weight)
    return linear


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.fixture
def quantise():
    """A function that puts quantised linears in the place of a model's."""
    def replace(model, kind):
        for name, part in list(model.model.named_modules()):
            if isinstance(part, nn.Linear):
                linear = quantised(part.weight.data, kind, part.weight.dtype)
                linear.bias = part.bias
                model.model.set_submodule(name, linear)
        return model
    return replace


# ----- The codes -----

def test_levels_are_the_published_quantiles():
    """8 from below, 9 from above, 0 counted once, the outermost midway between 1/32 and 1/30."""
    assert torch.allclose(nf4_levels("cpu"), torch.tensor(PUBLISHED), atol=1e-6)
    outer, double = 1 - (1 / 30 + 1 / 32) / 2, torch.float64
    above = torch.special.ndtri(torch.linspace(outer, 0.5, 9, dtype=double)[:-1])
    below = -torch.special.ndtri(torch.linspace(outer, 0.5, 8, dtype=double)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=double), above]).sort().values
    assert torch.equal(nf4_levels("cpu"), (levels / levels.max()).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_rows_are_within_half_a_step(dtype):
    weight = normal(40, 70)
    codes, scales = to_int8(weight, dtype)
    assert codes.dtype == torch.int8 and codes.shape == (40, 70)
    assert scales.shape == (40, 1) and scales.dtype == dtype
    back = from_int8(codes, scales, torch.float32)
    slack = {torch.float32: 1e-4, torch.bfloat16: 0.51, torch.float16: 0.07}[dtype]
    assert ((back - weight).abs() <= scales.float() * (0.5 + slack)).all()
    assert (codes.abs().amax(1) >= 126).all()  # the whole range is used


def test_nf4_takes_the_nearest_level_of_each_block():
    weight = normal(8, 130)  # two blocks and two numbers of a third
    codes, scales = to_nf4(weight, torch.float32)
    assert codes.shape == (8, 96) and codes.dtype == torch.uint8 and scales.shape == (8, 3)
    back = from_nf4(codes, scales, torch.float32)[:, :130]
    for row in range(8):
        for begin, end in ((0, 64), (64, 128), (128, 130)):
            block = weight[row, begin:end]
            levels = torch.tensor(PUBLISHED) * block.abs().max()
            nearest = levels[(block[:, None] - levels).abs().argmin(1)]
            assert torch.allclose(back[row, begin:end], nearest, atol=1e-6)


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_extremes_and_odd_widths_stay_finite(kind, dtype):
    weight = torch.zeros(6, 67)
    weight[1, 3], weight[2], weight[3], weight[4, 66] = 5.0, 1e-30, 1e30, -1e-40
    back = quantised(weight, kind, dtype).dequantize(dtype).float()
    assert back.shape == (6, 67) and back.isfinite().all() and not back[0].any()
    assert back[1, 3] == pytest.approx(5.0, rel=0.01)
    assert torch.allclose(back[2:4], weight[2:4], rtol=0.01, atol=0)


def test_memory_is_what_the_names_say():
    weight = normal(256, 512)
    sizes = {kind: sum(x.nbytes for x in quantised(weight, kind, torch.bfloat16).buffers())
             for kind in QUANTIZERS}
    assert sizes["int8"] == 256 * 512 + 2 * 256
    assert sizes["nf4"] == 256 * 512 * (4 + 16 / 64) / 8  # 4.25 bits each


def test_rows_are_filled_part_by_part_and_on_any_device():
    weight, linear = normal(10, 70), QuantLinear(70, 10, "nf4", torch.float32, "cpu")
    for begin in (0, 4, 8):
        linear.encode_rows(slice(begin, begin + 4), weight[begin:begin + 4])
    assert torch.equal(linear.codes, quantised(weight, "nf4").codes)
    with torch.device("meta"):
        empty = QuantLinear(70, 10, "nf4", torch.float32, "meta")
    assert empty.codes.is_meta and empty.codes.shape == linear.codes.shape


# ----- The layer -----

@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_equal_the_dense_ones(kind, dtype):
    linear = quantised(normal(48, 80), kind, dtype)
    linear.bias = nn.Parameter(normal(48, seed=1).to(dtype), requires_grad=False)
    x = normal(15, 80, seed=2).to(dtype).requires_grad_()
    dense = F.linear(x, linear.dequantize(dtype), linear.bias)
    expected, = torch.autograd.grad(dense.square().sum(), x)
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = linear(x)
    found, = torch.autograd.grad(out.square().sum(), x)
    rough = dtype == torch.bfloat16
    assert out.dtype == dtype and torch.allclose(out, dense, atol=2e-3 if rough else 1e-6)
    assert torch.allclose(found, expected, rtol=2e-2 if rough else 0, atol=1e-3 if rough else 1e-6)
    assert 48 * 80 not in saved  # no full-precision weight waits for the backward pass


@pytest.mark.parametrize("width", [33, 40, 172, 176, 1376])
@pytest.mark.parametrize("rows", [0, 1, 7, 16, 17])
def test_few_rows_in_bfloat16_are_those_of_the_dequantised_weight(width, rows):
    linear = quantised(torch.randn(24, width), "int8", torch.bfloat16)
    x = torch.randn(rows, width).bfloat16()
    with torch.inference_mode():
        expected = x.float() @ linear.dequantize(torch.float32).T
        found = linear(x).float()
    assert found.shape == (rows, 24)
    assert not rows or (found - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_adapters_over_codes_get_the_gradients_of_adapters_over_their_values(kind, fast, quantise):
    dense, model = copy.deepcopy(fast), quantise(fast, kind)
    for name, part in model.named_modules():
        if isinstance(part, QuantLinear):
            dense.get_submodule(name).weight.data = part.dequantize(torch.float32)
    items, slopes = [{"documents": [{"input_ids": list(range(40)), "labels": [-100] * 40}]}], []
    for each in (model, dense):
        torch.manual_seed(3)
        apply_lora(each, LoraConfig(rank=4))
        row, attend = each.lay_out(items)
        ids = torch.tensor(row["input_ids"])
        base = each.hidden(ids, attend)
        for module in lora_modules(each).values():
            module.lora_B.data.normal_(0, 0.1)
        with disabled(each):
            assert torch.equal(each.hidden(ids, attend), base)
        for each.checkpointing in (False, True):
            each.hidden(ids, attend).log_softmax(-1)[..., 5].sum().backward()
        slopes.append([weight.grad for weight in adapter_weights(each).values()])
        others = [weight for name, weight in each.named_parameters() if "lora_" not in name]
        assert all(weight.grad is None for weight in others)
    assert len(slopes[0]) == 28 and all(slope.any() for slope in slopes[0])
    assert all(torch.allclose(*pair, atol=1e-4, rtol=1e-4) for pair in zip(*slopes, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("kind, most, least", [("int8", 1e-3, 0.98), ("nf4", 0.05, 0.85)])
def test_the_error_of_quantised_logits(kind, most, least, quantise):
    """The KL divergence per token from the demo's base, and how often the top token stays."""
    full, tokenizer = load_model(DEMO / "base"), data.Tokenizer(DEMO / "base")
    model = quantise(load_model(DEMO / "base"), kind)
    instances = data.read_tasks(DEMO / "tasks/purchase_colour.json")[0].instances[:60]
    kl, same, n = 0.0, 0, 0
    for instance in instances:
        ids = torch.tensor(tokenizer.encode_prompt(instance.input))[None]  # (1, T)
        p, q = full(ids).log_softmax(-1), model(ids).log_softmax(-1)  # (1, T, V)
        kl += float((p.exp() * (p - q)).sum())
        same, n = same + int((p.argmax(-1) == q.argmax(-1)).sum()), n + ids.numel()
    print(f"{kind}: KL {kl / n:.2e} nats per token, top token the same in {same / n:.4f} of {n}")
    assert 0 < kl / n < most and same / n > least


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_quantised_base_is_not_merged_into_and_can_be_copied(kind, fast, quantise):
    model = apply_lora(quantise(fast, kind), LoraConfig(rank=4))
    with pytest.raises(ValueError, match="the base is quantised, and merging would round"):
        merge_lora(model)
    twin = copy.deepcopy(model)
    assert generate(twin, [[1, 5]], Sampling(5)) == generate(model, [[1, 5]], Sampling(5))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_joined_linears_multiply_as_each_alone(kind, bias):
    weights = [normal(n, 128, seed=n) for n in (48, 16, 16)]
    linears = [quantised(weight, kind, torch.bfloat16) for weight in weights]
    for linear in linears:
        linear.bias = normal(linear.out_features).bfloat16() if bias else None
    x, before = normal(3, 128).bfloat16(), [linear.codes.clone() for linear in linears]
    expected = torch.cat([linear(x) for linear in linears], dim=1)
    with torch.inference_mode():
        joint = join(linears)
    assert joint.out_features == 80 and torch.equal(joint(x), expected)
    assert torch.equal(torch.cat([linear(x) for linear in linears], dim=1), expected)
    assert all(torch.equal(y.codes, codes) for y, codes in zip(linears, before, strict=True))
    assert not joint.codes.is_inference() and join(linears[:1]) is linears[0]


@pytest.mark.parametrize("rows, dtype, joined", [
    (1, torch.bfloat16, True), (16, torch.bfloat16, True), (17, torch.bfloat16, False),
    (1, torch.float32, False)])
def test_few_rows_of_8_bits_are_multiplied_together(rows, dtype, joined, make_model, quantise):
    model = accelerate(quantise(make_model(dim=32, hidden_dim=48).to(dtype), "int8"))
    block, ids = model.model.layers[0], torch.randint(300, (rows,))
    with torch.inference_mode():
        expected = model.hidden(ids, Packed([rows]))
        with prepacked(model, rows):
            assert bool(block.products) == joined
            found = model.hidden(ids, Packed([rows]))
    assert torch.equal(found, expected) and block.products is None
