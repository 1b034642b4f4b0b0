"""Adapters against peft, and foreign or damaged ones."""

import copy
import json
import os
import random
import re
import shutil

import pytest
import torch
from damage import in_children
from safetensors.torch import load_file, save_file

from extras.formats import open_adapter, open_model, save_model
from lora import (
    LoraConfig,
    adapter_weights,
    apply_lora,
    lora_modules,
    merge_lora,
    save_adapter,
)

IDS = torch.randint(0, 300, (3, 11), generator=torch.Generator().manual_seed(0))
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def llama(make_model):
    """llama(): always the same base model."""
    base = make_model()
    return lambda: copy.deepcopy(base)


@pytest.fixture
def adapter(llama, tmp_path):
    """An adapter of the tiny model, saved; and the model."""
    model = apply_lora(llama(), LoraConfig(rank=4, alpha=6, targets=("q_proj", "down_proj")))
    torch.manual_seed(7)
    for module in lora_modules(model).values():
        module.lora_B.data.normal_(0, 0.3)
    save_adapter(model, tmp_path / "a", base_model="some/base")
    return tmp_path / "a", model


@torch.no_grad()
def test_round_trip_is_exact(adapter, llama, tmp_path):
    path, model = adapter
    for trainable in (False, True):
        again = open_adapter(llama(), path, trainable=trainable)
        assert torch.equal(again(IDS), model(IDS))
        assert {weight.requires_grad for weight in adapter_weights(again).values()} == {trainable}
        for name, weight in again.named_parameters():
            assert "lora_" in name or not weight.requires_grad
    save_adapter(again, tmp_path / "b", base_model="some/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (path / name).read_bytes()
    half = open_adapter(llama().to(torch.bfloat16), path)
    assert next(iter(adapter_weights(half).values())).dtype == torch.float32
    assert half(IDS).dtype == torch.bfloat16


def test_an_adapter_fits_a_quantised_base(adapter, llama, tmp_path):
    pytest.importorskip("extras.fast.quant")
    save_model(llama(), tmp_path / "base")
    model = open_adapter(open_model(tmp_path / "base", quantize="int8"), adapter[0])
    with torch.no_grad():
        difference = (model(IDS) - adapter[1](IDS)).abs().max()
    assert 0 < difference < 0.5


def twin_of(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(model, tmp_path / "base")
    return transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32).eval()


@torch.no_grad()
def test_peft_reads_ours(adapter, llama, tmp_path):
    peft, (path, model) = pytest.importorskip("peft"), adapter
    theirs = peft.PeftModel.from_pretrained(twin_of(llama(), tmp_path), path)
    assert (theirs(IDS).logits - model(IDS)).abs().max() < 1e-4


@pytest.mark.parametrize("options, saved", [
    ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, 3),
    ({"target_modules": "all-linear"}, 14),
    ({"target_modules": r".*layers\.1\.(self_attn\.(q|k)_proj|mlp\.down_proj)"}, 3),
    ({"target_modules": ["k_proj", "o_proj"], "use_rslora": True, "r": 9}, 2),
    ({"target_modules": ["layers.0.mlp.gate_proj"], "lora_dropout": 0.3,
      "init_lora_weights": "gaussian"}, 1),
])
def test_we_read_theirs(options, saved, llama, tmp_path):
    """Ends of names are saved as short as they came; patterns as the names that they fit."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM"} | options))
    theirs = peft.get_peft_model(twin_of(llama(), tmp_path), config).eval()
    torch.manual_seed(3)
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = open_adapter(open_model(tmp_path / "base"), tmp_path / "theirs").eval()
    save_adapter(ours, tmp_path / "ours")
    raw = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert len(raw["target_modules"]) == saved
    back = peft.PeftModel.from_pretrained(twin_of(llama(), tmp_path), tmp_path / "ours").eval()
    with torch.no_grad():
        assert (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-4
        assert (ours(IDS) - llama()(IDS)).abs().max() > 1e-3
        assert (back(IDS).logits - theirs(IDS).logits).abs().max() < 1e-4


def their_adapter(base, folder, resize=0, **options):
    """An adapter that peft made over a base and saved, with random weights; the model."""
    peft = pytest.importorskip("peft")
    if resize:
        base.resize_token_embeddings(resize)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.1)
    theirs.save_pretrained(folder)
    return theirs


ENDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = [{}, {"layers_to_transform": 0}, {"layers_to_transform": [1]},
          {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
          {"layers_to_transform": 1, "layers_pattern": ["blocks", "lay.rs"]}]


def random_options(rng):
    """LoraConfig's options: targets, layers, and what differs from module to module."""
    ends = rng.sample(ENDS, rng.randint(2, 7))
    keys = ends + [rf"{end[:2]}.*" for end in ends] + [f"layers.{k}.mlp.{ends[0]}" for k in "01"]
    keys += ["^model.layers.1.self_attn.q_proj", r".*\.1\..*", "mlp.(up|down)_proj"]
    options = {"target_modules": ends, **rng.choice(LAYERS)}
    if rng.random() < 0.2:
        options = {"target_modules": rng.choice(["all-linear", ".*(q|v|up)_proj"])}
    options["exclude_modules"] = rng.choice(
        [None, ends[:1], [f"0.mlp.{ends[1]}", "lm_head"], r".*\.1\.mlp\..*", ".*self_attn.k_proj"])
    for field, value in (("rank_pattern", lambda: rng.randint(1, 12)),
                         ("alpha_pattern", lambda: rng.randint(1, 30))):
        chosen = sorted(rng.sample(keys, rng.randint(0, 4)))  # as peft sorts them on saving
        options[field] = {key: value() for key in chosen}
    return options | {"r": rng.randint(1, 12), "lora_alpha": rng.randint(1, 30),
                      "use_rslora": rng.random() < 0.3}


@torch.no_grad()
@pytest.mark.parametrize("trials", [20])
def test_an_adapter_that_differs_from_module_to_module_becomes_one(trials, llama, tmp_path):
    """Ranks, scalings, layers and exceptions: read, merged, saved by us, and read by peft again."""
    peft, rng, different = pytest.importorskip("peft"), random.Random(), 0
    for trial in range(4 * trials):  # until the control below holds, too
        if trial >= trials and different > trials // 4:
            break
        options, path, again = random_options(rng), tmp_path / f"{trial}", tmp_path / f"{trial}b"
        try:
            theirs = their_adapter(twin_of(llama(), tmp_path), path, **options)
        except ValueError as error:  # nothing is left to adapt
            assert re.search("No modules were targeted|not found in the base model|excluded",
                             str(error)), options
            continue
        wanted = theirs(IDS).logits
        ours = open_adapter(open_model(tmp_path / "base"), path).eval()
        ranks = {len(x) for name, x in theirs.named_parameters() if "lora_A" in name}
        different += len(ranks) > 1
        assert {len(module.lora_A) for module in lora_modules(ours).values()} == {max(ranks)}
        save_adapter(ours, again)
        back = peft.PeftModel.from_pretrained(twin_of(llama(), tmp_path), again).eval()
        effect = float((wanted - llama()(IDS)).abs().max())
        assert effect > 1e-4
        for found in (ours(IDS), merge_lora(ours)(IDS), back(IDS).logits,
                      open_adapter(llama(), again)(IDS)):
            # An alpha of 30 over rank 1 moves logits by 4: float32's rounding grows with it.
            assert (found - wanted).abs().max() < 1e-5 * max(1, 2 * effect), options
    assert different > trials // 4  # the control: peft took the patterns


def test_what_is_added_to_a_rank_stays_zero_in_training(llama, tmp_path):
    their_adapter(twin_of(llama(), tmp_path), tmp_path / "a", r=2, rank_pattern={"v_proj": 5},
                  target_modules=["q_proj", "v_proj"])
    ours = open_adapter(llama(), tmp_path / "a", trainable=True)
    ours(IDS).float().square().sum().backward()
    for name, module in lora_modules(ours).items():
        added = slice(2 if "q_proj" in name else 5, None)
        assert not module.lora_A.grad[added].any() and not module.lora_B.grad[:, added].any()
        assert module.lora_A.grad[:2].all(1).any() and module.lora_B.grad[:, :2].any()


@pytest.mark.parametrize("options, resize", [
    ({"use_dora": True}, 0), ({"trainable_token_indices": [3, 5]}, 0),
    ({"modules_to_save": ["embed_tokens", "lm_head"]}, 303), ({"modules_to_save": ["lm_head"]}, 0),
    ({"target_parameters": ["mlp.up_proj.weight"]}, 0), ({"bias": "all"}, 0)])
def test_what_is_more_than_low_rank_is_refused_with_a_way_out_that_works(options, resize, llama,
                                                                         tmp_path):
    theirs = their_adapter(twin_of(llama(), tmp_path), tmp_path / "a", resize, r=4,
                           target_modules=["q_proj", "v_proj"], **options)
    for name, weight in theirs.named_parameters():
        if weight.requires_grad and "lora_" not in name:
            weight.data += 0.1 * torch.randn_like(weight)
    theirs.save_pretrained(tmp_path / "a")
    field, = options
    refused(llama(), tmp_path / "a", f'field "{field}" is .*Merge it with peft, and give DIR')
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if resize:
        base.resize_token_embeddings(resize)
    peft.PeftModel.from_pretrained(base, tmp_path / "a").merge_and_unload().save_pretrained(
        tmp_path / "merged")
    with torch.no_grad():
        wanted = theirs(IDS).logits
        assert (open_model(tmp_path / "merged")(IDS) - wanted).abs().max() < 1e-4
        assert (llama()(IDS) - wanted[..., :300]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"modules_to_save": []}, {"modules_to_save": None},
                                     {"rank_pattern": {}, "alpha_pattern": None},
                                     {"layers_to_transform": [], "layers_pattern": ""},
                                     {"exclude_modules": []}, {"trainable_token_indices": None}])
def test_options_that_say_nothing_are_fine(options, adapter, llama):
    file = adapter[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    assert torch.equal(open_adapter(llama(), adapter[0])(IDS), adapter[1](IDS))


@pytest.mark.parametrize("trials", [20])
def test_an_adapter_on_the_head_comes_with_the_head(trials, llama, tmp_path):
    """Random ranks and targets, a base as it is or rounded; whatever differs is refused."""
    rng = random.Random()
    for trial in range(trials):
        others = rng.sample(["q_proj", "v_proj", "o_proj", "up_proj"], rng.randrange(4))
        path = tmp_path / f"{trial}"
        theirs = their_adapter(twin_of(llama(), tmp_path), path, r=rng.randrange(1, 9),
                               lora_alpha=rng.uniform(1, 20), target_modules=["lm_head", *others])
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        key = "base_model.model.lm_head.base_layer.weight"
        assert key in tensors  # the control: this is what peft writes
        ours = open_adapter(open_model(tmp_path / "base"), path).eval()
        with torch.no_grad():
            assert (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-4
            assert (ours(IDS) - llama()(IDS)).abs().max() > 1e-3
        open_adapter(open_model(tmp_path / "base", dtype=torch.bfloat16), path)
        save_adapter(ours, tmp_path / "ours")
        assert key not in load_file(tmp_path / "ours/adapter_model.safetensors")
        for kind in (torch.bfloat16, torch.float64):
            save_file(tensors | {key: tensors[key].to(kind)}, file)
            open_adapter(llama(), path)
        tensors[key][rng.randrange(300), rng.randrange(32)] += 0.01
        save_file(tensors, file)
        refused(llama(), path, r"saved with a lm_head of its own, \(300, 32\), and the model's")


def test_an_adapter_of_a_resized_vocabulary_says_how_to_merge(llama, tmp_path):
    """The sentence's recipe gives a model that we read, with the same logits."""
    theirs = their_adapter(twin_of(llama(), tmp_path), tmp_path / "a", resize=303,
                           target_modules=["q_proj"])
    refused(llama(), tmp_path / "a", r"saved with a model.embed_tokens of its own, \(303, 32\), "
            r"and the model's, \(300, 32\), is another.*resize_token_embeddings\(303\); PeftModel")
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(303)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "a").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        ids = torch.tensor([[1, 302, 5, 301]])
        found = open_model(tmp_path / "merged")(ids)
    assert (found - theirs(ids).logits).abs().max() < 1e-4


def nasty_pattern(rng):
    """A regular expression that backtracks over every way to divide a name."""
    inner = rng.choice([".+", ".*?.", "(.|.)", ".{1,9}", "[a-z_.0-9]+"])
    return f"({inner})" + rng.choice(["+", "*", "{1,99}"]) + rng.choice(["!", "x!", "[^a-z_.0-9]"])


@pytest.mark.faults
@pytest.mark.parametrize("trials", [20])
def test_a_regular_expression_that_never_ends_is_refused(trials, adapter, llama, monkeypatch):
    monkeypatch.setattr("extras.formats.peft.MATCH_SECONDS", 2)
    file, rng = adapter[0] / "adapter_config.json", random.Random(0)
    raw = json.loads(file.read_text())
    for pattern in ["(.+)+x$", *(nasty_pattern(rng) for _ in range(trials - 1))]:
        option = rng.choice([{"target_modules": pattern}, {"exclude_modules": pattern},
                             {"alpha_pattern": {pattern: 3}}, {"rank_pattern": {pattern: 4}},
                             {"layers_to_transform": [0], "layers_pattern": pattern}])
        file.write_text(json.dumps(raw | option))
        refused(llama(), adapter[0], "a regular expression that fails, or takes over 2 seconds")


@pytest.mark.faults
def test_python_does_not_end_such_an_expression():
    rng, name = random.Random(0), "model.layers.0.self_attn.q_proj.and.more"
    patterns = ["(.+)+x$", *(nasty_pattern(rng) for _ in range(4))]
    found = in_children(lambda pattern: re.fullmatch(pattern, name) and "", patterns, seconds=4)
    assert found == ["died with status -14"] * 5


def refused(base, path, words):
    with pytest.raises(ValueError, match=words) as caught:
        open_adapter(base, path)
    assert "\n" not in str(caught.value)
    assert not lora_modules(base)  # left untouched
    assert all(weight.requires_grad for weight in base.parameters())


@pytest.mark.parametrize("changes, words", [
    ({"peft_type": "IA3"}, 'field "peft_type" is "IA3". Expected LORA'),
    ({"use_dora": True}, 'field "use_dora" is true. Expected nothing: DoRA rescales the whole '
     "weight. Merge it with peft, and give DIR with --model: base = AutoModelFor.*save_pretrained"),
    ({"trainable_token_indices": [3]}, "Expected nothing: rows of the embedding were trained. Mer"),
    ({"lora_bias": True}, 'field "lora_bias" is true. Expected nothing: it is not implemented'),
    ({"use_qalora": True}, 'field "use_qalora" is true. Expected nothing: it is not implemented'),
    ({"bias": "all"}, 'field "bias" is "all". Expected none: the biases were trained. Merge it'),
    ({"rank_pattern": {"q_proj": 0}}, 'field "rank_pattern" is .* modules with ranks of at least'),
    ({"rank_pattern": ["q_proj"]}, 'field "rank_pattern" is .* an object of modules with ranks'),
    ({"rank_pattern": {"q_proj": 8}}, r"q_proj.lora_A.weight .* is \(4, .*\), expected \(8, .*\)"),
    ({"rank_pattern": {"(": 8}}, r"rank_pattern has .*: a regular expression that fails"),
    ({"alpha_pattern": {"q_proj": "8"}}, 'field "alpha_pattern" is .* with positive numbers'),
    ({"alpha_pattern": {"q_proj": 0}}, 'field "alpha_pattern" is .* with positive numbers'),
    ({"modules_to_save": ["lm_head"]}, 'field "modules_to_save" is .* were trained in full; if the'
     r" vocabulary has grown to N, base.resize_token_embeddings\(N\) comes first. Merge it with"),
    ({"layer_replication": [[0, 1]]}, 'field "layer_replication" is'),
    ({"target_parameters": ["x"]}, "it adapts weights that are not of a linear layer. Merge it"),
    ({"layers_to_transform": [0.5]}, 'field "layers_to_transform" is .* a list of them, or null'),
    ({"layers_to_transform": [0]}, "layers.1.*expected none of this name"),
    ({"layers_to_transform": [0], "layers_pattern": [1]}, 'field "layers_pattern" is'),
    ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern has .* that fails"),
    ({"layers_pattern": "layers"}, "layers_pattern is 'layers', but layers_to_transform is null"),
    ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "layers_to_transform and layers_"
     "pattern go with a list as target_modules, and it is '.*q_proj'. Put the layers into that"),
    ({"exclude_modules": {"q_proj": 1}}, 'field "exclude_modules" is .* a regular expression, or'),
    ({"exclude_modules": ["q_proj"]}, "q_proj.* expected none of this name"),
    ({"exclude_modules": "((("}, r"exclude_modules has .*: a regular expression that fails"),
    ({"init_lora_weights": "pissa"}, 'field "init_lora_weights" is "pissa"'),
    ({"r": 0}, 'field "r" is 0'), ({"r": None}, 'field "r" is null'),
    ({"r": 2.5}, 'field "r" is 2.5'),
    ({"lora_alpha": float("nan")}, "is NaN. Expected a positive number"),
    ({"lora_alpha": "8"}, 'field "lora_alpha" is "8"'), ({"lora_alpha": 0}, "positive number"),
    ({"lora_dropout": 1.0}, r"Expected a number in \[0, 1\)"),
    ({"target_modules": None}, 'field "target_modules" is null'),
    ({"target_modules": []}, 'field "target_modules" is'),
    ({"target_modules": "((("}, r'field "target_modules" is "\(\(\("'),
    ({"target_modules": [1]}, 'field "target_modules" is'),
    ({"target_modules": "a{999999999999}"}, 'field "target_modules" is "a{9'),
    ({"r": 8}, r"tensor .*lora_A.weight of adapter .* is \(4, .*\), expected \(8, .*\)"),
    ({"target_modules": ["q_proj", "v_proj", "down_proj"]}, "v_proj.lora_A.weight .* is missing"),
    ({"target_modules": ["q_proj"]}, r"down_proj.lora_A.weight .* expected none of this name"),
    ({"target_modules": ["nothing"]}, "expected none of this name"),
])
def test_refused_configs(changes, words, adapter, llama):
    file = adapter[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(llama(), adapter[0], words)


def test_refused_weights(adapter, llama):
    path, _ = adapter
    file = path / "adapter_model.safetensors"
    good = load_file(file)
    far = KEY.replace("layers.0", "layers.24")
    for tensors, words in [
        (good | {far: good[KEY].clone()}, "was made for another model: no module named "
         "model.layers.24.self_attn.q_proj. It names some/base as its base; pass that with"),
        ({name: value for name, value in good.items() if name != KEY}, f"{KEY} .* is missing"),
        ({name.removeprefix("base_model.model."): value for name, value in good.items()},
         "expected none of this name"),
        (good | {KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)},
         "lora_magnitude_vector of adapter .* expected none of this name"),
        (good | {KEY: good[KEY].index_fill(0, torch.tensor([1]), torch.nan)}, "non-finite values"),
        (good | {KEY: good[KEY].long()}, "does not hold tensors of float32"),
        (good | {KEY: good[KEY].to(torch.float8_e4m3fn)}, "does not hold tensors of float32"),
        ({}, "is missing, expected"),
    ]:
        save_file(tensors, file)
        refused(llama(), path, words)
    for damage in (b"", b"x" * 50):
        file.write_bytes(damage)
        refused(llama(), path, "is damaged or incomplete")
    file.unlink()
    refused(llama(), path, "no adapter at .* \\(no adapter_model.safetensors\\)")
    (path / "adapter_model.bin").write_bytes(b"junk")
    refused(llama(), path, "its weights in a .bin file. Convert it first: python -m tools.convert")
    (path / "adapter_config.json").write_text("{")
    refused(llama(), path, "is not JSON")
    shutil.rmtree(path)
    refused(llama(), path, "no adapter at .* \\(no adapter_config.json\\)")


def test_a_model_with_an_adapter_is_refused(adapter):
    with pytest.raises(ValueError, match="already has LoRA adapters; merge them first"):
        open_adapter(adapter[1], adapter[0])


def test_an_adapter_that_changes_nothing_is_warned_about(llama, tmp_path):
    save_adapter(apply_lora(llama(), LoraConfig(rank=2)), tmp_path)
    with pytest.warns(UserWarning, match="changes nothing"):
        open_adapter(llama(), tmp_path)


def test_code_in_an_adapter_is_not_run(adapter, llama, payload, tmp_path):
    import pickle

    marker, file = tmp_path / "marker", adapter[0] / "adapter_model.safetensors"
    file.write_bytes(pickle.dumps(payload(marker)))
    refused(llama(), adapter[0], "is damaged or incomplete")
    os.rename(file, file.with_suffix(".bin"))
    refused(llama(), adapter[0], "Convert it first")
    assert not marker.exists()
