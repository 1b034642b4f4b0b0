"""lora.py against peft, against its own algebra, and against foreign adapters."""
import copy
import dataclasses
import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora import (LLAMA_TARGETS, LoraConfig, LoRALinear, apply_lora, disabled, load_adapter, lora_modules,
                  lora_parameters, merge_lora, save_adapter)
from model import PRESETS, Llama, load_model, save_model


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def mlp(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    names = {"up": nn.Linear(6, 10), "act": nn.Tanh(), "down": nn.Linear(10, 4, bias=False)}
    model = nn.Sequential()
    for name, module in names.items():
        model.add_module(name, module)
    return model.to(dtype)


def trained(model):
    """Adapters as after training: B no longer zero."""
    torch.manual_seed(7)
    for module in lora_modules(model).values():
        module.lora_B.data.normal_(0, 0.3)
    return model


def llama(seed=0):
    return Llama(PRESETS["tiny"]).init_weights(seed).eval()


IDS = torch.randint(0, 300, (3, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_update_by_hand_in_every_dtype(dtype):
    base = mlp(dtype=dtype)
    model = trained(apply_lora(copy.deepcopy(base), LoraConfig(rank=3, alpha=4.5, targets=("up",))))
    x = torch.randn(2, 5, 6).to(dtype)
    wrapped = model.up
    assert isinstance(wrapped, LoRALinear) and type(model.down) is nn.Linear
    assert wrapped.lora_A.dtype == wrapped.lora_B.dtype == torch.float32 and wrapped.base.weight.dtype == dtype
    assert wrapped.lora_A.shape == (3, 6) and wrapped.lora_B.shape == (10, 3)
    by_hand = base.up(x).double() + 1.5 * x.double() @ wrapped.lora_A.double().T @ wrapped.lora_B.double().T
    assert wrapped(x).dtype == dtype and wrapped(x).shape == (2, 5, 10)
    assert (wrapped(x) - by_hand).abs().max() < {torch.float32: 1e-6, torch.bfloat16: 0.03, torch.float16: 4e-3}[dtype]
    assert wrapped(x[0, 0]).shape == (10,)                                               # and without a batch


def test_at_init_the_model_is_its_base():
    base = llama()
    model = apply_lora(copy.deepcopy(base), LoraConfig(rank=4))
    assert torch.equal(model(IDS), base(IDS))
    assert len(lora_modules(model)) == 7 * 2
    for module in lora_modules(model).values():
        bound = 1 / math.sqrt(module.base.in_features)                                   # kaiming_uniform(a = sqrt 5)
        assert not module.lora_B.any() and 0.5 * bound < module.lora_A.abs().max() <= bound


def test_only_adapters_get_gradients():
    model = trained(apply_lora(llama(), LoraConfig(rank=4, targets=("q_proj", "down_proj"))))
    model(IDS).square().mean().backward()
    adapters = set(map(id, lora_parameters(model)))
    assert len(adapters) == 2 * 2 * 2
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (id(weight) in adapters), name
        assert (weight.grad is not None and bool(weight.grad.any())) == (id(weight) in adapters), name


def test_gradients_flow_under_checkpointing():
    plain = trained(apply_lora(llama(), LoraConfig(rank=4)))
    again = copy.deepcopy(plain)
    again.checkpointing = True
    for model in (plain, again):
        model(IDS).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) and a.grad.any() for a, b in
               zip(lora_parameters(plain), lora_parameters(again)))


def test_dropout_acts_on_the_adapter_only_and_only_in_training():
    model = trained(apply_lora(mlp(), LoraConfig(rank=2, alpha=2, dropout=0.5, targets=("up",))))
    x = torch.randn(4, 6)
    model.eval()
    assert torch.equal(model.up(x), model.up(x))
    model.train()
    assert not torch.equal(model.up(x), model.up(x))
    with disabled(model):
        assert torch.equal(model.up(x), model.up.base(x))
    mean = torch.stack([model.up(x) for _ in range(4000)]).mean(0)
    assert (mean - model.eval().up(x)).abs().max() < 0.08                                # the mean is kept
    state = torch.get_rng_state()
    still = apply_lora(mlp(), LoraConfig(rank=2, dropout=0.0, targets=("up",))).train()
    torch.set_rng_state(state)
    still(x)
    assert torch.equal(torch.get_rng_state(), state)                                     # p = 0 draws nothing


def test_disabled_is_the_base_nests_and_survives_errors():
    base = llama()
    model = trained(apply_lora(copy.deepcopy(base), LoraConfig(rank=4)))
    adapted = model(IDS)
    assert not torch.allclose(adapted, base(IDS), atol=1e-3)
    with disabled(model):
        with disabled(model):
            assert torch.equal(model(IDS), base(IDS))
        assert torch.equal(model(IDS), base(IDS))
    assert torch.equal(model(IDS), adapted)
    with pytest.raises(RuntimeError, match="inside"), disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(model(IDS), adapted)
    with disabled(base):                                                                 # nothing to disable is fine
        pass


@torch.no_grad()
def test_merged_equals_unmerged_and_leaves_the_model_alone():
    model = trained(apply_lora(llama(), LoraConfig(rank=4, alpha=6)))
    before, adapted = {k: v.clone() for k, v in model.state_dict().items()}, model(IDS)
    with disabled(model):
        merged = merge_lora(model)
    assert not lora_modules(merged) and isinstance(merged.model.layers[0].mlp.up_proj, nn.Linear)
    assert (merged(IDS) - adapted).abs().max() < 1e-5
    assert merged.state_dict().keys() == llama().state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(IDS), adapted)
    half = trained(apply_lora(mlp(dtype=torch.bfloat16), LoraConfig(rank=2, alpha=3, targets=("up",))))
    exact = half.up.base.weight.double() + 1.5 * half.up.lora_B.double() @ half.up.lora_A.double()
    assert torch.equal(merge_lora(half).up.weight, exact.float().to(torch.bfloat16))     # rounded once
    assert merge_lora(half).up.weight.dtype == torch.bfloat16


def test_refusals_of_apply_lora():
    with pytest.raises(ValueError, match='"nope" names no linear layer of the model; there are: down, up.'):
        apply_lora(mlp(), LoraConfig(targets=("up", "nope")))
    with pytest.raises(ValueError, match='"p" names no'):                                # whole words, not letters
        apply_lora(mlp(), LoraConfig(targets=("p",)))
    model = apply_lora(mlp(), LoraConfig(targets=("up",)))
    for again in (lambda: apply_lora(model, LoraConfig(targets=("down",))), lambda: load_adapter(model, "nowhere")):
        with pytest.raises(ValueError, match="already has LoRA adapters|no adapter at"):
            again()
    for wrong in ({"rank": 0}, {"rank": 2.5}, {"alpha": 0}, {"alpha": math.nan}, {"alpha": 1e30}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=f"LoRA {next(iter(wrong))} is"):
            LoraConfig(**wrong)
    assert LoraConfig().targets == LLAMA_TARGETS
    only = apply_lora(llama(), LoraConfig(targets=("layers.1.self_attn.q_proj",)))
    assert list(lora_modules(only)) == ["model.layers.1.self_attn.q_proj"]


# Files


@pytest.fixture
def adapter(tmp_path):
    """An adapter of the tiny model, saved; and the model."""
    model = trained(apply_lora(llama(), LoraConfig(rank=4, alpha=6, targets=("q_proj", "down_proj"))))
    save_adapter(model, tmp_path / "a", base_model="some/base")
    return tmp_path / "a", model


def test_round_trip_is_exact(adapter, tmp_path):
    path, model = adapter
    for trainable in (False, True):
        again = load_adapter(llama(), path, trainable=trainable)
        assert torch.equal(again(IDS), model(IDS))
        assert {weight.requires_grad for weight in lora_parameters(again)} == {trainable}
        assert not any(weight.requires_grad for name, weight in again.named_parameters() if "lora_" not in name)
    save_adapter(again, tmp_path / "b", base_model="some/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (path / name).read_bytes()
    assert sorted(os.listdir(path)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert len({os.stat(path / name).st_mode for name in os.listdir(path)}) == 1
    half = load_adapter(llama().to(torch.bfloat16), path)
    assert lora_parameters(half)[0].dtype == torch.float32 and half(IDS).dtype == torch.bfloat16
    tensors = load_file(path / "adapter_model.safetensors")
    torch.save(tensors, path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()
    assert torch.equal(load_adapter(llama(), path)(IDS), model(IDS))
    with pytest.raises(ValueError, match="no LoRA adapters"):
        save_adapter(llama(), tmp_path / "c")


def twin_of(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(llama(), tmp_path / "base")
    return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()


def test_peft_reads_ours(adapter, tmp_path):
    peft, (path, model) = pytest.importorskip("peft"), adapter
    theirs = peft.PeftModel.from_pretrained(twin_of(tmp_path), path)
    with torch.no_grad():
        assert (theirs(IDS).logits - model(IDS)).abs().max() < 1e-6
        merged = theirs.merge_and_unload()(IDS).logits
        assert (merged - merge_lora(model)(IDS)).abs().max() < 1e-6


@pytest.mark.parametrize("options", [
    {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": r".*layers\.1\.(self_attn\.(q|k)_proj|mlp\.down_proj)"},
    {"target_modules": ["k_proj", "o_proj"], "use_rslora": True, "r": 9},
    {"target_modules": ["layers.0.mlp.gate_proj"], "lora_dropout": 0.3, "init_lora_weights": "gaussian"},
])
def test_we_read_theirs(options, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM"} | options))
    theirs = peft.get_peft_model(twin_of(tmp_path), config).eval()
    torch.manual_seed(3)
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(load_model(tmp_path / "base"), tmp_path / "theirs").eval()
    save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(twin_of(tmp_path), tmp_path / "ours").eval()
    with torch.no_grad():
        assert (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-6
        assert (ours(IDS) - llama()(IDS)).abs().max() > 1e-3
        assert (back(IDS).logits - theirs(IDS).logits).abs().max() < 1e-6


def refused(path, words):
    base = llama()
    with pytest.raises(ValueError, match=words) as caught:
        load_adapter(base, path)
    assert "\n" not in str(caught.value)
    assert not lora_modules(base) and all(weight.requires_grad for weight in base.parameters())      # left untouched


@pytest.mark.parametrize("changes, words", [
    ({"peft_type": "IA3"}, "does not describe a LoRA adapter"),
    ({"use_dora": True}, "asks for use_dora = True, which is not implemented"),
    ({"bias": "all"}, "asks for bias = 'all'"),
    ({"rank_pattern": {"q_proj": 8}}, "asks for rank_pattern"),
    ({"alpha_pattern": {"q_proj": 8}}, "asks for alpha_pattern"),
    ({"modules_to_save": ["lm_head"]}, "asks for modules_to_save"),
    ({"layer_replication": [[0, 1]]}, "asks for layer_replication"),
    ({"target_parameters": ["x"]}, "asks for target_parameters"),
    ({"layers_to_transform": [0]}, "asks for layers_to_transform"),
    ({"init_lora_weights": "pissa"}, "asks for init_lora_weights = 'pissa'"),
    ({"r": 0}, "LoRA rank is 0"),
    ({"r": None}, "LoRA rank is None"),
    ({"lora_alpha": float("nan")}, "LoRA alpha is nan"),
    ({"lora_alpha": "8"}, "LoRA alpha is '8'"),
    ({"target_modules": None}, "target_modules is None"),
    ({"target_modules": "(((" }, r"target_modules is '\(\(\('"),
    ({"target_modules": [1]}, r"target_modules is \[1\]"),
    ({"target_modules": "a{999999999999}"}, r"target_modules is 'a\{9"),
    ({"r": 8}, r"lora_[AB].weight of adapter .* is \(.*4.*\), expected \(.*8.*\)"),
    ({"target_modules": ["q_proj", "v_proj", "down_proj"]}, "lacks base_model.model.model.layers.0.self_attn.v_proj"),
    ({"target_modules": ["q_proj"]}, "down_proj.lora_A.weight' of adapter .* is not one that its adapter_config.json"),
])
def test_refused_configs(adapter, changes, words):
    file = adapter[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(adapter[0], words)


def test_refused_weights(adapter, tmp_path):
    path, _ = adapter
    file = path / "adapter_model.safetensors"
    good, key = load_file(file), "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    far = key.replace("layers.0", "layers.24")
    for tensors, words in [
        (good | {far: good[key].clone()},
         "made for another model: no module named model.layers.24.self_attn.q_proj. It names some/base as its base"),
        ({name: value for name, value in good.items() if name != key}, f"lacks {key}"),
        ({name.removeprefix("base_model.model."): value for name, value in good.items()}, "is not one that its"),
        (good | {key.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}, "magnitude_vector' of adap"),
        (good | {key: good[key].index_fill(0, torch.tensor([1]), torch.nan)}, "has non-finite values"),
        (good | {key: good[key].long()}, "does not hold tensors by name"),
        (good | {key: good[key].to(torch.float8_e4m3fn)}, "does not hold tensors by name"),
        ({}, "lacks"),
    ]:
        save_file(tensors, file)
        refused(path, words)
    for damage in (b"", b"x" * 50):
        file.write_bytes(damage)
        refused(path, "is damaged or incomplete")
    file.unlink()
    refused(path, "no adapter at .* \\(no adapter_model.safetensors\\)")
    marker = tmp_path / "marker"
    torch.save({key: Payload(marker)}, path / "adapter_model.bin")
    refused(path, "contains code, not weights. It was not loaded")
    (path / "adapter_model.bin").write_bytes(b"junk")
    refused(path, "contains code|damaged")
    assert not marker.exists()
    (path / "adapter_config.json").write_text("{")
    refused(path, "is not JSON")
    shutil.rmtree(path)
    refused(path, "no adapter at .* \\(no adapter_config.json\\)")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_an_adapter_that_changes_nothing_is_warned_about(tmp_path):
    save_adapter(apply_lora(llama(), LoraConfig(rank=2)), tmp_path)
    with pytest.warns(UserWarning, match="changes nothing"):
        load_adapter(llama(), tmp_path)


def test_an_adapter_on_a_head_that_is_the_embedding_is_refused():
    tied, free = (Llama(dataclasses.replace(PRESETS["tiny"], tie_embeddings=tie)) for tie in (True, False))
    with pytest.raises(ValueError, match="lm_head is its embedding"):
        apply_lora(tied, LoraConfig(targets=("q_proj", "lm_head")))
    apply_lora(free, LoraConfig(targets=("q_proj", "lm_head")))
    apply_lora(tied, LoraConfig(targets=("q_proj",)))
