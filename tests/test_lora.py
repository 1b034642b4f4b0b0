"""lora.py: the update by hand, its algebra, what is trained, files, and parity with PEFT."""

import copy
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from lora import LoraConfig, LoRALinear
from model import Llama, ModelConfig, save_model

TINY = dict(vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8,
            hidden_dim=64, norm_eps=1e-5, context=512)
IDS = torch.randint(300, (3, 11))


def mlp(dtype=torch.float32):
    """Three layers, of which two are linear: up (with a bias) and down."""
    model = nn.Sequential()
    model.add_module("up", nn.Linear(6, 10))
    model.add_module("act", nn.Tanh())
    model.add_module("down", nn.Linear(10, 4, bias=False))
    return model.to(dtype)


def llama(seed=0, **changes):
    """A tiny random model whose weights are large enough for differences to show."""
    model, generator = Llama(ModelConfig(**TINY | changes)), torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.normal_(0.0, 0.1, generator=generator)
    return model.eval()


def trained(model):
    """Adapters as after training: B is no longer zero."""
    for module in lora.lora_modules(model).values():
        module.lora_B.data.normal_(0, 0.3)
    return model


def states(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


# ----- The update -----

@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-6), (torch.bfloat16, 0.03), (torch.float16, 4e-3)])
def test_update_by_hand_in_every_dtype(dtype, tolerance):
    torch.manual_seed(0)
    base, config = mlp(dtype), LoraConfig(rank=3, alpha=4.5, targets=("up",))
    model = trained(lora.apply_lora(copy.deepcopy(base), config))
    x, adapted = torch.randn(2, 5, 6).to(dtype), model.up
    assert isinstance(adapted, LoRALinear) and type(model.down) is nn.Linear
    assert adapted.lora_A.dtype == adapted.lora_B.dtype == torch.float32
    assert adapted.base.weight.dtype == dtype
    assert adapted.lora_A.shape == (3, 6) and adapted.lora_B.shape == (10, 3)
    update = x.double() @ adapted.lora_A.double().T @ adapted.lora_B.double().T
    by_hand = base.up(x).double() + 4.5 / 3 * update
    assert adapted(x).dtype == dtype and adapted(x).shape == (2, 5, 10)
    assert (adapted(x) - by_hand).abs().max() < tolerance < 0.2 * update.abs().max()
    assert adapted(x[0, 0]).shape == (10,)  # and without a batch
    assert adapted(x[:, :0]).shape == (2, 0, 10)


def test_gradients_are_those_of_the_formula():
    base = mlp(torch.float64)
    model = trained(lora.apply_lora(copy.deepcopy(base), LoraConfig(rank=2, alpha=3.0,
                                                                    targets=("up", "down"))))
    x = torch.randn(7, 6, dtype=torch.float64)
    A1, B1, A2, B2 = (w.detach().double().requires_grad_() for w in model.parameters()
                      if w.requires_grad)
    hidden = torch.tanh(base.up(x) + 1.5 * x @ A1.T @ B1.T)
    out = base.down(hidden) + 1.5 * hidden @ A2.T @ B2.T
    wanted = torch.autograd.grad(out.square().sum(), (A1, B1, A2, B2))
    model(x).square().sum().backward()
    found = [w.grad for w in lora.adapter_weights(model).values()]
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)


def test_at_init_the_model_is_its_base():
    base = llama()
    model = lora.apply_lora(copy.deepcopy(base), LoraConfig(rank=4))
    assert torch.equal(model(IDS), base(IDS))
    assert len(lora.lora_modules(model)) == 7 * 2
    for module in lora.lora_modules(model).values():
        bound = 1 / math.sqrt(module.base.in_features)  # kaiming_uniform with a = sqrt(5)
        assert not module.lora_B.any() and 0.5 * bound < module.lora_A.abs().max() <= bound


def test_only_adapters_get_gradients():
    config = LoraConfig(rank=4, targets=("q_proj", "down_proj"))
    model = trained(lora.apply_lora(llama(), config))
    model(IDS).square().mean().backward()
    adapters = set(map(id, lora.adapter_weights(model).values()))
    assert len(adapters) == 2 * 2 * 2
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (id(weight) in adapters), name
        moved = weight.grad is not None and bool(weight.grad.any())
        assert moved == (id(weight) in adapters), name


def test_dropout_acts_on_the_adapter_only_and_only_in_training():
    torch.manual_seed(0)
    config = LoraConfig(rank=2, alpha=2, dropout=0.5, targets=("up",))
    model, x = trained(lora.apply_lora(mlp(), config)), torch.randn(4, 6)
    model.eval()
    assert torch.equal(model.up(x), model.up(x))
    model.train()
    assert not torch.equal(model.up(x), model.up(x))
    with lora.disabled(model):
        assert torch.equal(model.up(x), model.up.base(x))
    with torch.no_grad():
        mean = model.up(x.repeat(20_000, 1, 1)).mean(0)
    assert (mean - model.eval().up(x)).abs().max() < 0.03  # the mean is kept


@pytest.mark.parametrize("trials", [20])
def test_an_adapter_takes_over_the_mode_of_the_model(trials, tmp_path):
    """In a model in eval mode, no dropout: equal passes, and equal to the merged model."""
    for trial in range(trials):
        torch.manual_seed(trial)
        config = LoraConfig(rank=2, dropout=0.5, targets=("up",))
        base, x = mlp(), torch.randn(4, 6)
        lora.save_adapter(trained(lora.apply_lora(copy.deepcopy(base), config)), tmp_path)
        for training in (False, True):
            model = lora.load_adapter(copy.deepcopy(base).train(training), tmp_path)
            assert {part.training for part in model.modules()} == {training}
            first, second = model.up(x), model.up(x)
            merged = lora.merge_lora(model).up(x)
            assert torch.equal(first, second) != training  # the control: in training they differ
            assert torch.allclose(first, merged, atol=1e-5) != training


def test_no_dropout_draws_no_random_number():
    model = lora.apply_lora(mlp(), LoraConfig(targets=("up",))).train()
    state = torch.get_rng_state()
    model(torch.randn(4, 6, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)


# ----- Without it, and merged -----

def test_disabled_is_the_base_nests_and_survives_errors():
    base = llama()
    model = trained(lora.apply_lora(copy.deepcopy(base), LoraConfig(rank=4)))
    adapted = model(IDS)
    assert not torch.allclose(adapted, base(IDS), atol=1e-2)
    with lora.disabled(model):
        with lora.disabled(model):
            assert torch.equal(model(IDS), base(IDS))
        assert torch.equal(model(IDS), base(IDS))
    assert torch.equal(model(IDS), adapted)
    with pytest.raises(RuntimeError, match="inside"), lora.disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(model(IDS), adapted)
    with lora.disabled(base):  # nothing to disable is fine
        pass


@torch.no_grad()
def test_merged_equals_unmerged_and_leaves_the_model_alone():
    model = trained(lora.apply_lora(llama(), LoraConfig(rank=4, alpha=6)))
    before, adapted = states(model), model(IDS)
    with lora.disabled(model):
        merged = lora.merge_lora(model)
    assert not lora.lora_modules(merged)
    assert merged.state_dict().keys() == llama().state_dict().keys()
    assert isinstance(merged.model.layers[0].mlp.up_proj, nn.Linear)
    assert (merged(IDS) - adapted).abs().max() < 1e-5 * adapted.abs().max()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert torch.equal(model(IDS), adapted)
    assert lora.merge_lora(model, in_place=True) is model and not lora.lora_modules(model)
    assert torch.equal(model(IDS), merged(IDS))


def test_merged_weights_are_rounded_once():
    config = LoraConfig(rank=2, alpha=3, targets=("up",))
    half = trained(lora.apply_lora(mlp(torch.bfloat16), config))
    update = half.up.lora_B.double() @ half.up.lora_A.double()
    exact = half.up.base.weight.double() + 1.5 * update
    merged = lora.merge_lora(half).up.weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.float().to(torch.bfloat16))


def test_merging_under_autocast_is_exact():
    model = trained(lora.apply_lora(mlp(), LoraConfig(rank=2, alpha=3, targets=("up",))))
    plain = lora.merge_lora(model).up.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora.merge_lora(model).up.weight, plain)


class Quantised(nn.Module):
    """A linear layer that is no nn.Linear, as extras/fast makes them."""

    in_features, out_features = 6, 10

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randint(-9, 9, (10, 6), dtype=torch.int8))

    def forward(self, x):
        return x @ self.codes.to(x.dtype).T


def test_a_quantised_base_is_adapted_but_not_merged():
    model = nn.Sequential()
    model.add_module("up", Quantised())
    x = torch.randn(3, 6)
    before = model(x)
    trained(lora.apply_lora(model, LoraConfig(rank=2, targets=("up",))))
    assert not torch.allclose(model(x), before)
    with pytest.raises(ValueError, match="the base is quantised, and merging would round the upd"):
        lora.merge_lora(model)


# ----- What can be adapted -----

def test_targets_that_name_nothing_are_refused():
    names = 'LoRA target "nope" names no linear layer of the model with a weight of its own'
    with pytest.raises(ValueError, match=f"{names}; there are: down, up."):
        lora.apply_lora(mlp(), LoraConfig(targets=("up", "nope")))
    with pytest.raises(ValueError, match='"p" names no'):  # whole words, not letters
        lora.apply_lora(mlp(), LoraConfig(targets=("p",)))
    with pytest.raises(ValueError, match="there are: none"):
        lora.apply_lora(nn.Tanh(), LoraConfig())


def test_a_refused_target_leaves_the_model_as_it_was():
    model = mlp()
    with pytest.raises(ValueError):
        lora.apply_lora(model, LoraConfig(targets=("up", "nope")))
    assert not lora.lora_modules(model)
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_second_adapter_is_refused():
    model = lora.apply_lora(mlp(), LoraConfig(targets=("up",)))
    with pytest.raises(ValueError, match="already has LoRA adapters; merge them first"):
        lora.apply_lora(model, LoraConfig(targets=("down",)))


def test_a_head_that_is_the_embedding_is_refused():
    config = LoraConfig(targets=("q_proj", "lm_head"))
    with pytest.raises(ValueError, match='"lm_head" names no linear layer of the model with a wei'):
        lora.apply_lora(llama(tie_embeddings=True), config)
    lora.apply_lora(llama(), config)
    lora.apply_lora(llama(tie_embeddings=True), LoraConfig(targets=("q_proj",)))


@pytest.mark.parametrize("name, targets, matched", [
    ("model.layers.1.mlp.up_proj", ("up_proj",), True),
    ("model.layers.1.mlp.up_proj", ("layers.1.mlp.up_proj",), True),
    ("model.layers.11.mlp.up_proj", ("1.mlp.up_proj",), False),
    ("up_proj", ("q_proj", "up_proj"), True),
    ("gate_up_proj", ("up_proj",), False),
    ("up_proj.base", ("up_proj",), False),
])
def test_names_match_at_dots(name, targets, matched):
    assert lora.matches(name, targets) == matched


def test_a_longer_target_adapts_one_layer():
    model = lora.apply_lora(llama(), LoraConfig(targets=("layers.1.self_attn.q_proj",)))
    assert list(lora.lora_modules(model)) == ["model.layers.1.self_attn.q_proj"]
    assert list(lora.adapter_weights(model)) == [
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]


# ----- Files -----

@pytest.fixture
def adapter(tmp_path):
    """A saved adapter of the tiny model, and the model."""
    config = LoraConfig(rank=4, alpha=6, targets=("q_proj", "down_proj"))
    model = trained(lora.apply_lora(llama(), config))
    lora.save_adapter(model, tmp_path / "a", base_model="some/base")
    return tmp_path / "a", model


def test_round_trip_is_exact(adapter, tmp_path):
    path, model = adapter
    for trainable in (False, True):
        again = lora.load_adapter(llama(), path, trainable=trainable)
        assert torch.equal(again(IDS), model(IDS))
        adapters = lora.adapter_weights(again).values()
        assert {weight.requires_grad for weight in adapters} == {trainable}
        for name, weight in again.named_parameters():
            assert "lora_" in name or not weight.requires_grad
    lora.save_adapter(again, tmp_path / "b", base_model="some/base")
    assert sorted(os.listdir(path)) == ["adapter_config.json", "adapter_model.safetensors"]
    for name in os.listdir(path):
        assert (tmp_path / "b" / name).read_bytes() == (path / name).read_bytes()


def test_adapters_of_half_precision_models_stay_float32(adapter):
    half = lora.load_adapter(llama().to(torch.bfloat16), adapter[0])
    assert {weight.dtype for weight in lora.adapter_weights(half).values()} == {torch.float32}
    assert half(IDS).dtype == torch.bfloat16


def test_a_model_without_adapters_has_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="nothing to save to .*: the model has no LoRA adapters"):
        lora.save_adapter(llama(), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_adapter_of_another_model_is_refused(adapter):
    path = adapter[0]
    file, raw = path / "adapter_model.safetensors", json.loads(
        (path / "adapter_config.json").read_text())
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(ValueError, match="the adapter was made for another model: .*layers.1"):
        lora.load_adapter(llama(n_layers=1), path)
    save_file({name: x for name, x in tensors.items() if name != key}, file)
    with pytest.raises(ValueError, match=f"another model: {key} does not fit."):
        lora.load_adapter(llama(), path)
    save_file(tensors, file)
    (path / "adapter_config.json").write_text(json.dumps(raw | {"target_modules": ["gait_proj"]}))
    with pytest.raises(ValueError, match='"gait_proj" names no linear'):
        lora.load_adapter(llama(), path)


@pytest.mark.parametrize("rank", [1, 8])
def test_weights_of_another_rank_are_refused(adapter, rank):
    """A rank of 1 would be repeated by copy_."""
    tensors = load_file(adapter[0] / "adapter_model.safetensors")
    config = LoraConfig(rank=4, alpha=6, targets=("q_proj", "down_proj"))
    for name, x in tensors.items():
        tensors[name] = torch.ones(rank, x.shape[1]) if "lora_A" in name else x
    with pytest.raises(ValueError, match="another model: .*lora_A.weight does not fit."):
        lora.attach_adapter(llama(), config, tensors)


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}},
                                    {"alpha_pattern": {"q_proj": 2}}])
def test_adapters_with_another_scale_are_refused(change, adapter):
    file = adapter[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match="is no plain LoRA adapter; reading it takes extras"):
        lora.load_adapter(llama(), adapter[0])


# ----- PEFT -----

@pytest.fixture
def twin(tmp_path):
    """A function that opens transformers' copy of the tiny model."""
    transformers = pytest.importorskip("transformers")
    save_model(llama(), tmp_path / "base")

    def make():
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        return model.to(torch.float32).eval()
    return make


@torch.no_grad()
def test_peft_reads_ours(adapter, twin):
    peft, (path, model) = pytest.importorskip("peft"), adapter
    theirs = peft.PeftModel.from_pretrained(twin(), path)
    scale = model(IDS).abs().max()
    assert (theirs(IDS).logits - model(IDS)).abs().max() < 1e-5 * scale
    merged = theirs.merge_and_unload()(IDS).logits
    assert (merged - lora.merge_lora(model)(IDS)).abs().max() < 1e-5 * scale


@torch.no_grad()
def test_a_round_trip_through_peft_changes_no_bit(adapter, twin, tmp_path):
    peft, (path, model) = pytest.importorskip("peft"), adapter
    theirs = peft.PeftModel.from_pretrained(twin(), path)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)  # asks no server
    again = lora.load_adapter(llama(), tmp_path / "theirs")
    assert torch.equal(again(IDS), model(IDS))
    config = lora.lora_modules(again)["model.layers.0.self_attn.q_proj"].config
    assert (config.rank, config.alpha, config.dropout) == (4, 6, 0.0)
    assert sorted(config.targets) == ["down_proj", "q_proj"]


@torch.no_grad()
@pytest.mark.parametrize("options", [
    {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    {"target_modules": ["layers.0.mlp.gate_proj"], "lora_dropout": 0.3},
])
def test_we_read_plain_adapters_of_peft(options, twin, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(twin(), config).eval()
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = lora.load_adapter(llama(), tmp_path / "theirs").eval()
    scale = ours(IDS).abs().max()
    assert (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-5 * scale
    assert (ours(IDS) - llama()(IDS)).abs().max() > 1e-2 * scale


def test_gradients_equal_those_of_peft(twin):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(twin(), config)
    ours = lora.apply_lora(llama(), LoraConfig(rank=4, alpha=10, targets=("q_proj", "down_proj")))
    ours = trained(ours)
    given = dict(theirs.named_parameters())
    for name, weight in lora.adapter_weights(ours).items():
        given[name.replace(".weight", ".default.weight")].data.copy_(weight)
    ours(IDS).log_softmax(-1)[..., 7].sum().backward()
    theirs(IDS).logits.log_softmax(-1)[..., 7].sum().backward()
    for name, weight in lora.adapter_weights(ours).items():
        wanted = given[name.replace(".weight", ".default.weight")].grad
        assert (weight.grad - wanted).abs().max() < 1e-4 * wanted.abs().max(), name
