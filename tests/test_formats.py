"""Real checkpoints: config spellings, RoPE scalings, shards, Meta's layout, memory while loading, against transformers."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import (PRESETS, KVCache, Llama, ModelConfig, generate, halves_to_pairs, load_model, pairs_to_halves, read_config,
                   rope_frequencies, save_meta, save_model)

ROOT = Path(__file__).parent.parent
TINY = PRESETS["tiny"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def sharpened(config, seed=0):
    """A model whose attention is far from uniform, so that a wrong angle shows."""
    model = Llama(config).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * (0.1 if weight.dim() == 2 else 0.2))
    return model.eval()


def tiny(**changes):
    return ModelConfig(**(vars(TINY) | changes))


def random_ids(length, seed=0):
    return torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(seed))


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


# RoPE ----------------------------------------------------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    LLAMA3,
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 3.0, "beta_slow": 0.2, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.4, "beta_fast": 4.0},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.3},
]


def theirs(folder):
    """transformers' own reading of a folder."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "plain" if s is None else "-".join(map(str, s.values())))
@pytest.mark.parametrize("theta, head_dim", [(10000.0, 8), (500.0, 16), (1e6, 20)])
def test_scaled_rope_equals_transformers_past_the_original_length(scaling, theta, head_dim, tmp_path):
    config = tiny(rope_scaling=scaling, rope_theta=theta, head_dim=head_dim, max_position_embeddings=64)
    model = sharpened(config)
    save_model(model, tmp_path)
    twin = theirs(tmp_path)
    again = load_model(tmp_path)
    assert again.config == config
    for length in (20, 64, 65, 150):
        ids = random_ids(length, length)[None]
        assert (again(ids) - twin(ids).logits).abs().max() < 1e-5, length
    plain = sharpened(tiny(rope_theta=theta, head_dim=head_dim, max_position_embeddings=64))
    changed = (plain(random_ids(150)[None]) - model(random_ids(150)[None])).abs().max()
    assert (changed > 1e-3) == (scaling is not None)                                     # the scaling is seen at all


@torch.no_grad()
def test_dynamic_rope_belongs_to_the_document_not_to_the_batch():
    model = sharpened(tiny(rope_scaling={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=16))
    rows = [random_ids(length, length) for length in (5, 40, 16, 17)]
    packed = model(torch.cat(rows), lengths=[len(row) for row in rows]).split([len(row) for row in rows])
    for row, logits in zip(rows, packed):
        assert torch.allclose(logits, model(row), atol=1e-5)
    prompts = [row.tolist() for row in rows]
    whole = generate(model, prompts, max_new_tokens=20, eos_ids=())
    assert whole == [generate(model, [prompt], max_new_tokens=20, eos_ids=())[0] for prompt in prompts]
    cache = KVCache(model.config, 1, 64, torch.float32, "cpu")                           # as transformers: each call its own length
    first, last = model(rows[1][None, :10], kv_cache=cache), model(rows[1][None, 10:], kv_cache=cache)
    assert torch.allclose(first, model(rows[1][None, :10]), atol=1e-5) and last.isfinite().all()


@torch.no_grad()
def test_greedy_answers_under_dynamic_rope_equal_transformers(tmp_path):
    model = sharpened(tiny(rope_scaling={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=16))
    save_model(model, tmp_path)
    prompt = random_ids(12).tolist()
    out = theirs(tmp_path).generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(model, [prompt], max_new_tokens=30, eos_ids=()) == [out[0, 12:].tolist()]


def test_llama3_and_linear_frequencies_by_hand():
    config = tiny(rope_scaling=LLAMA3, head_dim=8, rope_theta=16.0)                      # plain: 1, 1/2, 1/4, 1/8
    turns = [32 / (2 * math.pi) * f for f in (1, 0.5, 0.25, 0.125)]                      # 5.1, 2.5, 1.3, 0.64
    wanted = [1.0, None, None, 0.125 / 8]
    for k in (1, 2):
        s = (turns[k] - 1) / 3
        wanted[k] = (1 - s) * 0.5**k / 8 + s * 0.5**k
    assert rope_frequencies(config, torch.tensor([9]))[0].tolist() == pytest.approx(wanted, rel=1e-6)
    config = tiny(rope_scaling={"rope_type": "linear", "factor": 4.0}, head_dim=8, rope_theta=16.0)
    assert rope_frequencies(config, torch.tensor([9]))[0].tolist() == pytest.approx([0.25, 0.125, 0.0625, 0.03125])


def raw(**changes):
    return {key: value for key, value in (TINY.to_hf() | changes).items() if value is not ...}


@pytest.mark.parametrize("changes, theta, scaling", [
    ({"rope_theta": ..., "rope_scaling": ...}, 1e4, None),
    ({"rope_theta": 1e6}, 1e6, None),
    ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 4}}, 7.0, {"rope_type": "linear", "factor": 4.0}),
    ({"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 4.0}}, 1e4, {"rope_type": "linear", "factor": 4.0}),
    ({"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 5.0}},
     9.0, {"rope_type": "linear", "factor": 2.0}),
    ({"rope_theta": 9.0, "rope_parameters": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 5.0}}, 5.0, {"rope_type": "dynamic", "factor": 8.0}),
    ({"rope_theta": 9.0, "rope_parameters": {"rope_type": "dynamic", "factor": 8.0}}, 9.0, {"rope_type": "dynamic", "factor": 8.0}),
    ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, LLAMA3),
    ({"original_max_position_embeddings": 64, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, LLAMA3 | {"original_max_position_embeddings": 64}),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": True}}, 1e4, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}),
])
def test_precedence_of_the_rope_spellings(changes, theta, scaling):
    config = ModelConfig.from_hf(raw(**changes))
    assert config.rope_theta == theta and config.rope_scaling == scaling
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("scaling, words", [
    ({"rope_type": "longrope"}, "RoPE scaling 'longrope' is not implemented; default, linear, dynamic, yarn, llama3 are"),
    ({"type": "linear"}, "RoPE scaling 'linear' lacks 'factor'"),
    ({"type": "linear", "factor": "4"}, "factor is '4'"),
    ({"type": "linear", "factor": 0.5}, "factor is 0.5; expected float from 1.0"),
    ({"type": "linear", "factor": float("nan")}, "factor is nan"),
    ({"type": "dynamic", "factor": 2.0, "alpha": 3}, "RoPE scaling 'dynamic' has the unknown value 'alpha'"),
    (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor must be below"),
    ({"rope_type": "llama3", "factor": 8.0}, "lacks 'low_freq_factor'"),
    ({"type": ["x"]}, "RoPE scaling ['x'] is not implemented"),
    ({"type": "yarn", "factor": 8.0, "rope_theta": 1}, "rope_theta is 1.0; RoPE scaling 'yarn' needs one above 1"),
    ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1e9}, "original_max_position_embeddings is 1000000000.0"),
])
def test_scalings_that_are_refused(scaling, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        ModelConfig.from_hf(raw(rope_scaling=scaling))


@pytest.mark.parametrize("changes, context", [
    ({}, 512), ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 2048), ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 1024),
    ({"rope_scaling": LLAMA3}, 512), ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 2048),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}, 512), ({"sliding_window": 100}, 100),
])
def test_how_long_a_sequence_may_be(changes, context):
    assert tiny(**changes).context == context


# Architectures -------------------------------------------------------------------------------------------------------

BASE = dict(vocab_size=320, hidden_size=48, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
            initializer_range=0.2)
VARIANTS = {                                                # what tells the families apart, in small
    "llama-1": dict(rms_norm_eps=1e-6),
    "llama-2-70b": dict(rms_norm_eps=1e-5, num_key_value_heads=2),
    "vicuna-16k": dict(rms_norm_eps=1e-5, rope_scaling={"type": "linear", "factor": 4.0}),
    "tinyllama": dict(rms_norm_eps=1e-5, num_key_value_heads=1),
    "codellama": dict(rms_norm_eps=1e-5, rope_theta=1e6, vocab_size=336),
    "yi": dict(rms_norm_eps=1e-5, rope_theta=5e6, num_key_value_heads=2, bos_token_id=1, eos_token_id=2),
    "yarn-llama": dict(rope_scaling={"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}),
    "llama-3.1": dict(rope_theta=5e5, rope_scaling=LLAMA3, tie_word_embeddings=True),
    "biased": dict(attention_bias=True, mlp_bias=True),
    "wide heads": dict(head_dim=20),
}


def perturbed(twin):
    """Norms and biases away from 1 and 0, too."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in twin.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return twin.eval()


def in_new_spelling(folder):
    """config.json as transformers 5 writes it: rope_parameters, no top-level rope_theta, dtype."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_scaling", None) or {"rope_type": "default"}
    rope = {("rope_type" if key == "type" else key): value for key, value in rope.items()}
    config["rope_parameters"] = rope | {"rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("torch_dtype", config.pop("dtype", None))
    file.write_text(json.dumps(config))


@torch.no_grad()
@pytest.mark.parametrize("spelling", ["4.57", "5"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_of_each_family_loads_to_the_same_logits(name, spelling, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    twin = perturbed(transformers.LlamaForCausalLM(transformers.LlamaConfig(**(BASE | VARIANTS[name]))))
    twin.save_pretrained(tmp_path, max_shard_size="40KB" if name in ("yi", "llama-1") else "1GB", safe_serialization=name != "vicuna-16k")
    assert (tmp_path / "pytorch_model.bin").exists() == (name == "vicuna-16k")
    if spelling == "5":
        in_new_spelling(tmp_path)
    model = load_model(tmp_path)
    for length in (9, 200):
        ids = random_ids(length, 7)[None]
        assert (model(ids) - twin(ids).logits).abs().max() < 1e-5, length


@torch.no_grad()
def test_mistral_is_read_within_its_window_and_written_back_as_mistral(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    twin = perturbed(transformers.MistralForCausalLM(transformers.MistralConfig(**BASE, num_key_value_heads=2, sliding_window=32)))
    twin.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.config.context == 32                       # within the window it changes nothing; beyond it nothing is said
    ids = random_ids(32)[None]
    assert (model(ids) - twin(ids).logits).abs().max() < 1e-5
    with pytest.raises(ValueError, match="prompt 0 has 30 tokens; expected 1 to 27"):
        generate(model, [ids[0, :30].tolist()], max_new_tokens=5)
    save_model(model, tmp_path / "ours")
    assert load_model(tmp_path / "ours").config == model.config
    again = theirs(tmp_path / "ours")
    assert type(again).__name__ == "MistralForCausalLM" and again.config.sliding_window == 32
    assert (again(ids).logits - model(ids)).abs().max() < 1e-5


def test_a_quantised_checkpoint_is_refused_by_its_config():
    with pytest.raises(ValueError, match="quantization_config is given"):
        ModelConfig.from_hf(raw(quantization_config={"quant_method": "gptq"}))


# Meta's layout -------------------------------------------------------------------------------------------------------


def split_for_gpus(folder, n):
    """consolidated.00.pth as n files, as Meta cuts it: by rows or by columns, norms in each."""
    whole = torch.load(folder / "consolidated.00.pth", weights_only=True)
    columns = ("tok_embeddings", "attention.wo", "feed_forward.w2")
    for rank in range(n):
        part = {name: tensor if tensor.dim() == 1 else tensor.chunk(n, int(any(word in name for word in columns)))[rank].clone()
                for name, tensor in whole.items()}
        torch.save(part | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{rank:02}.pth")


def metas_forward(tensors, params, ids):
    """LLaMA as Meta writes it, for one row: rotary angles as complex numbers on neighbouring pairs. Logits (T, V)."""
    def norm(x, weight):
        return weight * x * (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).rsqrt()
    T, H, D = len(ids), params["n_heads"], params["dim"]
    Dh = D // H
    turns = torch.polar(torch.ones(T, Dh // 2), torch.outer(torch.arange(T).float(), 1e4 ** (-torch.arange(0, Dh, 2).float() / Dh)))
    x = tensors["tok_embeddings.weight"][ids]
    for layer in range(params["n_layers"]):
        part = {name.removeprefix(f"layers.{layer}."): tensor for name, tensor in tensors.items() if name.startswith(f"layers.{layer}.")}
        h = norm(x, part["attention_norm.weight"])
        q, k, v = ((h @ part[f"attention.{name}.weight"].T).view(T, -1, Dh) for name in ("wq", "wk", "wv"))
        q, k = (torch.view_as_real(torch.view_as_complex(y.reshape(T, -1, Dh // 2, 2)) * turns[:, None]).flatten(2) for y in (q, k))
        k, v = (y.repeat_interleave(H // params["n_kv_heads"], 1) for y in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / Dh**0.5 + torch.full((T, T), -torch.inf).triu(1)
        x = x + torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1) @ part["attention.wo.weight"].T
        h = norm(x, part["ffn_norm.weight"])
        x = x + (torch.nn.functional.silu(h @ part["feed_forward.w1.weight"].T) * (h @ part["feed_forward.w3.weight"].T)) @ part["feed_forward.w2.weight"].T
    return norm(x, tensors["norm.weight"]) @ tensors["output.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("hidden_dim", [64, 100, 256, 171])
def test_metas_layout_and_back_is_bitwise(hidden_dim, tmp_path):
    config = tiny(hidden_dim=hidden_dim, max_position_embeddings=4096)
    model = sharpened(config)
    save_meta(model, tmp_path / "meta")
    params, tensors = json.loads((tmp_path / "meta/params.json").read_text()), torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=True)
    assert params.keys() <= {"dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "vocab_size", "multiple_of", "ffn_dim_multiplier"}
    ids = random_ids(30)
    assert (metas_forward(tensors, params, ids) - model(ids)).abs().max() < 1e-4         # their order of q and k, their rotation
    swapped = tensors | {name: pairs_to_halves(t, config.head_dim) for name, t in tensors.items() if name.endswith("wq.weight")}
    assert (metas_forward(swapped, params, ids) - model(ids)).abs().max() > 1e-2         # and it would show
    again = load_model(tmp_path / "meta")
    assert again.config == config and states_equal(again, model)
    save_model(again, tmp_path / "hf")
    save_meta(load_model(tmp_path / "hf"), tmp_path / "back")
    back = torch.load(tmp_path / "back/consolidated.00.pth", weights_only=True)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
    split_for_gpus(tmp_path / "meta", 2)
    (tmp_path / "meta/params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    assert states_equal(load_model(tmp_path / "meta"), model)
    assert torch.equal(halves_to_pairs(pairs_to_halves(model.lm_head.weight[:64], 8), 8), model.lm_head.weight[:64])


def test_contexts_and_keys_of_params_json(tmp_path):
    model = sharpened(tiny(norm_eps=1e-6))
    save_meta(model, tmp_path)
    params = json.loads((tmp_path / "params.json").read_text())
    for changes, context, theta in (({}, 2048, 1e4), ({"norm_eps": 1e-5}, 4096, 1e4), ({"rope_theta": 1e6}, 16384, 1e6),
                                    ({"norm_eps": 1e-5, "sliding_window": 100}, 100, 1e4), ({"max_seq_len": 77}, 77, 1e4)):
        (tmp_path / "params.json").write_text(json.dumps(params | changes))
        config = read_config(tmp_path)
        assert (config.context, config.rope_theta) == (context, theta)
    seven = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6, "vocab_size": 32000}
    for changes, hidden_dim in (({}, 11008), ({"dim": 5120, "n_heads": 40}, 13824),
                                ({"dim": 8192, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672)):
        (tmp_path / "params.json").write_text(json.dumps(seven | changes))
        assert read_config(tmp_path).hidden_dim == hidden_dim


def test_sentences_about_metas_files(tmp_path):
    model = sharpened(TINY)
    save_meta(model, tmp_path)
    good, params = torch.load(tmp_path / "consolidated.00.pth", weights_only=True), json.loads((tmp_path / "params.json").read_text())

    def refused(words):
        with pytest.raises(ValueError, match=words) as caught:
            load_model(tmp_path)
        assert "\n" not in str(caught.value)
    for changes, words in (({"dim": None, "n_heads": "4"}, "params.json: n_heads is '4'"), ({"n_heads": 2**40}, "params.json: n_heads is"),
                           ({"moe": {"num_experts": 8}}, "moe, use_scaled_rope and"), ({"dim": 64}, r"params.json says \(300, 64\)"),
                           ({"n_layers": 1}, "tensor 'layers.1.* has no place in"), ({"n_layers": 3}, "tensor 'layers.2.* is missing from")):
        (tmp_path / "params.json").write_text(json.dumps(params | changes))
        refused(words)
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    torch.save(good | {"output.weight": torch.tensor(1.0)}, tmp_path / "consolidated.00.pth")
    refused("no output.weight says how large the vocabulary is")
    (tmp_path / "params.json").write_text(json.dumps(params))
    good["layers.0.attention.wq.weight"][0, 0] = torch.nan
    torch.save(good, tmp_path / "consolidated.00.pth")
    refused("has 1 non-finite values")
    shutil.move(tmp_path / "consolidated.00.pth", tmp_path / "consolidated.01.pth")
    refused("numbered with gaps")
    with pytest.raises(ValueError, match="Meta's layout has no biases"):
        save_meta(sharpened(tiny(mlp_bias=True)), tmp_path)


# Streaming -----------------------------------------------------------------------------------------------------------


def test_a_wrong_config_allocates_nothing(tmp_path):
    model = sharpened(TINY)
    save_model(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf() | {"hidden_size": 2**16, "num_hidden_layers": 1000}))
    with pytest.raises(ValueError, match="config.json says"):
        load_model(tmp_path)                                # these shapes would take 10^14 bytes


@pytest.mark.parametrize("numbers", [1, 100, 1000])
def test_small_chunks_change_nothing(numbers, tmp_path, monkeypatch):
    monkeypatch.setattr("model.CHUNK_NUMBERS", numbers)
    model = sharpened(tiny(head_dim=10, hidden_dim=70))
    save_model(model, tmp_path / "hf", max_shard_bytes=20_000)
    assert states_equal(load_model(tmp_path / "hf"), model)
    assert states_equal(load_model(tmp_path / "hf", dtype=None), model)
    model = sharpened(TINY)
    save_meta(model, tmp_path / "meta")
    split_for_gpus(tmp_path / "meta", 2)                    # heads, and so chunks, across two files
    assert states_equal(load_model(tmp_path / "meta"), model)
    half = load_model(tmp_path / "meta", dtype=torch.bfloat16)
    assert states_equal(half, model.bfloat16())


@pytest.mark.parametrize("form", ["single", "shards", "bin", "meta"])
def test_loading_takes_little_more_than_the_weights(form):
    run = subprocess.run([sys.executable, ROOT / "bench/load.py", "--layers", "6", "--dim", "1024", "--form", form, "--json"],
                         capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["weights"] > 200e6 and 0.9 < found["ratio"] < 1.15, found
