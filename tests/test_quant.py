"""int8 and NF4 linears: the codes by definition, gradients, adapters over them, and what they do to a model's logits."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data import Tokenizer
from lora import LoraConfig, apply_lora, disabled, load_adapter, lora_modules, lora_parameters, merge_lora, mergeable, save_adapter
from model import (PRESETS, QUANTIZERS, Llama, QuantLinear, from_int8, from_nf4, generate, load_model, nf4_levels, save_meta, save_model, to_int8,
                   to_nf4)

DEMO = Path(__file__).parent.parent / "demo/base"
# Dettmers et al. 2023, Appendix E
PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
             -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
             0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def quantised(weight, kind, dtype=torch.float32):
    linear = QuantLinear(weight.shape[1], weight.shape[0], kind, dtype, "cpu")
    linear.encode_rows(slice(0, len(weight)), weight)
    return linear


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


# The codes -----------------------------------------------------------------------------------------------------------


def test_levels_are_the_published_ones():
    assert torch.allclose(nf4_levels(), torch.tensor(PUBLISHED), atol=1e-6) and nf4_levels()[7] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_rows_are_within_half_a_step(dtype):
    weight = normal(40, 70)
    codes, scales = to_int8(weight, dtype)
    assert codes.dtype == torch.int8 and codes.shape == (40, 70) and scales.shape == (40, 1) and scales.dtype == dtype
    back = from_int8(codes, scales, torch.float32)
    step = scales.float()
    slack = {torch.float32: 1e-4, torch.bfloat16: 0.51, torch.float16: 0.07}[dtype]      # a scale rounded down cuts the largest
    assert ((back - weight).abs() <= step * (0.5 + slack)).all()
    assert torch.allclose(from_int8(codes, scales, dtype).float(), back, rtol={torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype])
    assert (codes.abs().amax(1) >= 126).all()               # the whole range is used


def test_nf4_takes_the_nearest_level_of_each_block():
    weight = normal(8, 130)                                 # two blocks and two numbers of a third
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
    assert back[1, 3] == pytest.approx(5.0, rel=0.01) and torch.allclose(back[2:4], weight[2:4], rtol=0.01, atol=0)


def test_memory_is_what_the_names_say():
    int8, nf4 = quantised(normal(256, 512), "int8", torch.bfloat16), quantised(normal(256, 512), "nf4", torch.bfloat16)
    assert sum(x.nbytes for x in int8.buffers()) == 256 * 512 + 2 * 256
    assert sum(x.nbytes for x in nf4.buffers()) == 256 * 512 * (4 + 16 / 64) / 8         # 4.25 bits each


# The layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_equal_the_dense_ones(kind, dtype):
    linear = quantised(normal(48, 80), kind, dtype)
    linear.bias = nn.Parameter(normal(48, seed=1).to(dtype), requires_grad=False)
    x = normal(3, 5, 80, seed=2).to(dtype).requires_grad_()
    dense = F.linear(x, linear.dequantize(dtype), linear.bias)
    (wanted,) = torch.autograd.grad(dense.square().sum(), x)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = linear(x)
    assert out.shape == (3, 5, 48) and out.dtype == dtype and torch.allclose(out, dense, atol=2e-3 if dtype == torch.bfloat16 else 1e-6)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert torch.allclose(grad, wanted, rtol=2e-2, atol=1e-3) if dtype == torch.bfloat16 else torch.allclose(grad, wanted, atol=1e-6)
    assert 48 * 80 not in saved                             # no full-precision weight waits for the backward pass


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_adapters_over_codes_get_the_gradients_of_adapters_over_their_values(kind, tmp_path):
    save_model(Llama(PRESETS["tiny"]).init_weights(0), tmp_path)
    model = load_model(tmp_path, quantize=kind)
    dense = load_model(tmp_path)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            dense.get_submodule(name).weight.data = module.dequantize(torch.float32)
    ids, grads = torch.arange(40).view(2, 20), []
    for each in (model, dense):
        torch.manual_seed(3)
        apply_lora(each, LoraConfig(rank=4))
        base = each(ids)
        for module in lora_modules(each).values():
            module.lora_B.data.normal_(0, 0.1)
        with disabled(each):
            assert torch.equal(each(ids), base)
        for each.checkpointing in (False, True):
            each(ids).log_softmax(-1)[..., 5].sum().backward()
        grads.append([weight.grad for weight in lora_parameters(each)])
        assert not [name for name, weight in each.named_parameters() if weight.grad is not None and "lora_" not in name]
    assert len(grads[0]) == 28 and all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*grads))
    assert all(grad.any() for grad in grads[0])


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, bits", [("int8", 8.2), ("nf4", 4.6)])
def test_only_the_linears_of_the_blocks_are_quantised(kind, bits):
    full, model = load_model(DEMO), load_model(DEMO, quantize=kind)
    quants = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(quants) == 7 * full.config.n_layers
    weights = dict(full.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name])           # embedding, head and norms
    assert model.lm_head.weight is model.model.embed_tokens.weight
    held = load_model(DEMO, quantize=kind, dtype=torch.bfloat16)
    codes = sum(8 * x.nbytes for module in held.modules() if isinstance(module, QuantLinear) for x in module.buffers())
    assert codes / sum(m.in_features * m.out_features for m in quants.values()) < bits


@torch.no_grad()
@pytest.mark.parametrize("kind, divergence, agreement", [("int8", 1e-3, 0.98), ("nf4", 0.05, 0.85)])
def test_the_error_of_quantised_logits(kind, divergence, agreement):
    """KL divergence per token from the full-precision demo base, and how often the most probable token stays."""
    full, model, tokenizer = load_model(DEMO), load_model(DEMO, quantize=kind), Tokenizer(DEMO)
    records = json.loads((DEMO.parent / "tasks/purchase_colour.json").read_text())["Instances"][:60]
    kl, same, n = 0.0, 0, 0
    for record in records:
        ids = torch.tensor(tokenizer.encode_prompt(record["input"]))
        p, q = full(ids).log_softmax(-1), model(ids).log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same, n = same + int((p.argmax(-1) == q.argmax(-1)).sum()), n + len(ids)
    print(f"{kind}: KL {kl / n:.2e} nats per token, argmax kept {same / n:.4f} of {n}")
    assert 0 < kl / n < divergence and same / n > agreement


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_an_adapter_trained_over_codes_merges_into_the_full_base_only(kind, tmp_path):
    save_model(Llama(PRESETS["tiny"]).init_weights(0), tmp_path / "base")
    model = apply_lora(load_model(tmp_path / "base", quantize=kind), LoraConfig(rank=4))
    for module in lora_modules(model).values():
        module.lora_B.data.normal_(0, 0.1)
    assert not mergeable(model)
    with pytest.raises(ValueError, match="the base is quantised, and merging would round the update away"):
        merge_lora(model)
    save_adapter(model, tmp_path / "adapter")
    full = load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")
    merged, ids = merge_lora(full), torch.arange(30)
    assert mergeable(full) and torch.allclose(merged(ids), full(ids), atol=1e-5)
    again = load_adapter(load_model(tmp_path / "base", quantize=kind), tmp_path / "adapter")
    assert torch.equal(again(ids), model(ids)) and (again(ids) - full(ids)).abs().max() > 1e-4
    copied = copy.deepcopy(again)
    assert generate(copied, [[1, 5]], max_new_tokens=5) == generate(again, [[1, 5]], max_new_tokens=5)
    in_place = merge_lora(full, in_place=True)
    assert in_place is full and torch.equal(in_place(ids), merged(ids))


def test_quantised_models_are_not_written_and_unknown_kinds_are_named(tmp_path):
    save_model(Llama(PRESETS["tiny"]).init_weights(0), tmp_path)
    for save in (save_model, save_meta):
        with pytest.raises(ValueError, match="the model is quantised"):
            save(load_model(tmp_path, quantize="int8"), tmp_path / "x")
    with pytest.raises(ValueError, match="quantize is 'int3'; expected int8 or nf4"):
        load_model(tmp_path, quantize="int3")


@pytest.mark.parametrize("width", [33, 40, 172, 176, 1376])
@pytest.mark.parametrize("rows", [0, 1, 7, 16, 17])
def test_few_rows_in_bfloat16_are_those_of_the_dequantised_weight(width, rows):
    linear = QuantLinear(width, 24, "int8", torch.bfloat16, "cpu")
    linear.encode_rows(slice(None), torch.randn(24, width))
    x = torch.randn(rows, width).bfloat16()
    with torch.inference_mode():
        wanted = x.float() @ linear.dequantize(torch.float32).T
        assert linear(x).shape == (rows, 24) and torch.allclose(linear(x).float(), wanted, rtol=0, atol=0.02 * float(wanted.abs().amax()) if rows else 0)
