"""config.json in both spellings, its ranges, what is written, and RoPE scalings by hand."""

import dataclasses
import json
import math
import re

import pytest
import torch

from extras.formats import read_config
from extras.formats.config import HFConfig, from_hf, to_hf
from model import ModelConfig

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


def test_spellings(raw, make_config):
    tiny = make_config()
    assert from_hf(raw()) == tiny
    assert from_hf({"model_type": "llama"}) == HFConfig()
    for changes, theta in [
        ({"rope_theta": ...}, 1e4), ({"rope_theta": 1e6}, 1e6), ({"rope_theta": 1000}, 1000.0),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}}, 7.0),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "x", "rope_type": "default"}}, 7.0),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "default"},
          "rope_parameters": {"rope_theta": 9.0}}, 7.0),
    ]:
        assert from_hf(raw(**changes)).rope_theta == theta, changes
    assert from_hf(raw(head_dim=None, num_key_value_heads=None)).n_kv_heads == 4
    assert from_hf(raw(head_dim=...)).head_dim == 8
    assert from_hf(raw(eos_token_id=[2, 7])).eos_ids == [2, 7]
    assert from_hf(raw(eos_token_id=None, bos_token_id=None)).eos_ids == []
    new = raw(dtype="bfloat16", torch_dtype=..., pad_token_id=0, unknown={"a": 1})
    assert from_hf(new) == tiny
    windows = ((None, 512), (512, 512), (4096, 512), (100, 100), (..., 512))  # absent: 4096
    for window, context in windows:
        config = from_hf(raw(model_type="mistral", sliding_window=window))
        assert config.context == context
        assert dataclasses.replace(config, sliding_window=None) == tiny


def test_what_is_written(make_config):
    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "rms_norm_eps": 1e-5,
             "max_position_embeddings": 512, "tie_word_embeddings": False, "attention_bias": False,
             "mlp_bias": False}
    rest = {"rope_theta": 10000.0, "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2}
    begin = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
             "torch_dtype": "bfloat16", "hidden_act": "silu"}
    wanted = begin | shape | rest
    assert json.dumps(to_hf(make_config(), "bfloat16")) == json.dumps(wanted)  # in this order, too
    config = make_config(sliding_window=100, eos_ids=[2, 5], prompt_template="alpaca")
    wanted = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    wanted |= {"sliding_window": 100, "eos_token_id": [2, 5], "prompt_template": "alpaca"}
    assert to_hf(config) == begin | {"torch_dtype": "float32"} | shape | rest | wanted
    assert to_hf(make_config(eos_ids=[]))["eos_token_id"] is None
    fields = {name: value for name, value in vars(make_config()).items()
              if name in ModelConfig.__dataclass_fields__}
    assert to_hf(ModelConfig(**fields)) == to_hf(make_config())  # a config of the course


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "gemma"}, "model_type is 'gemma'; only llama and mistral"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"model_type": "mistral", "sliding_window": "100"}, "sliding_window is '100'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is given"),
    ({"rope_scaling": {"type": "longrope", "factor": 2}}, "'longrope' is not implemented"),
    ({"rope_scaling": {"rope_type": "llama3", "type": "default"}}, "'llama3' lacks 'factor'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": [1]}, "malformed"),
    ({"rope_theta": 1e308}, "rope_theta is 1e\\+308"),
    ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ({"hidden_size": 2**31}, "hidden_size is 2147483648; expected int from 1 to"),
    ({"hidden_size": 32.0}, "hidden_size is 32.0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_attention_heads": 64, "head_dim": None}, "head_dim is 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"vocab_size": 2**40}, "vocab_size"),
    ({"vocab_size": "300"}, "vocab_size is '300'"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"head_dim": 7}, "head_dim is 7; RoPE turns pairs"),
    ({"num_key_value_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"eos_token_id": [2, -1]}, "eos_token_id is"),
    ({"bos_token_id": "1"}, "bos_token_id is '1'"),
    ({"prompt_template": 3}, "prompt_template is 3"),
])
def test_refusals_name_the_file(changes, words, raw, write, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        read_config(write(tmp_path / "config.json", raw(**changes)).parent)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"no model at .*nothing \(no config.json\). Give a fold"):
        read_config(tmp_path / "nothing")
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(ValueError, match="in Meta's layout. Convert it first: python -m tool"):
        read_config(tmp_path)
    for text, words in (('{"model_type": "llama",', "is not JSON"), ("[" * 100_000, "JSON"),
                        ("[]", "Expected a JSON object"), (" " * 2_000_000, "2,000,000 bytes")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words) as caught:
            read_config(tmp_path)
        assert "\n" not in str(caught.value)


# RoPE ------------------------------------------------------------------------------------------

OUTSIDE = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5.0}


@pytest.mark.parametrize("changes, theta, scaling", [
    ({"rope_theta": ..., "rope_scaling": ...}, 1e4, None),
    ({"rope_theta": 1e6}, 1e6, None),
    ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 4}}, 7.0, LINEAR),
    ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 4.0}}, 1e4, LINEAR),
    ({"rope_theta": 9.0, "rope_scaling": LINEAR, "rope_parameters": OUTSIDE}, 9.0, LINEAR),
    ({"rope_theta": 9.0, "rope_parameters": OUTSIDE}, 5.0, {"rope_type": "linear", "factor": 8.0}),
    ({"rope_theta": 9.0, "rope_parameters": LINEAR}, 9.0, LINEAR),
    ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, LLAMA3),
    ({"original_max_position_embeddings": 64, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5,
     LLAMA3 | {"original_max_position_embeddings": 64}),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": True}}, 1e4,
     {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}),
])
def test_precedence_of_the_rope_spellings(changes, theta, scaling, raw):
    config = from_hf(raw(**changes))
    assert config.rope_theta == theta and config.rope_scaling == scaling
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize("scaling, words", [
    ({"rope_type": "longrope"}, "'longrope' is not implemented; default, linear, yarn, llama3 are"),
    ({"rope_type": "dynamic", "factor": 2.0}, "RoPE scaling 'dynamic' is not implemented"),
    ({"type": "linear"}, "RoPE scaling 'linear' lacks 'factor'"),
    ({"type": "linear", "factor": "4"}, "factor is '4'"),
    ({"type": "linear", "factor": 0.5}, "factor is 0.5; expected float from 1.0"),
    ({"type": "linear", "factor": float("nan")}, "factor is nan"),
    ({"type": "linear", "factor": 2.0, "alpha": 3}, "'linear' has the unknown value 'alpha'"),
    (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor must be below"),
    ({"rope_type": "llama3", "factor": 8.0}, "lacks 'low_freq_factor'"),
    ({"type": ["x"]}, "RoPE scaling ['x'] is not implemented"),
    (YARN | {"rope_theta": 1}, "rope_theta is 1.0; RoPE scaling 'yarn' needs one above 1"),
    (YARN | {"original_max_position_embeddings": 1e9},
     "original_max_position_embeddings is 1000000000.0"),
])
def test_scalings_that_are_refused(scaling, words, raw):
    with pytest.raises(ValueError, match=re.escape(words)):
        from_hf(raw(rope_scaling=scaling))


@pytest.mark.parametrize("changes, context", [
    ({}, 512), ({"rope_scaling": LINEAR}, 2048), ({"rope_scaling": LLAMA3}, 512),
    ({"rope_scaling": YARN}, 2048), ({"sliding_window": 100}, 100),
    ({"rope_scaling": YARN | {"original_max_position_embeddings": 128}}, 512),
])
def test_how_long_a_sequence_may_be(changes, context, make_config):
    assert make_config(**changes).context == context


def test_llama3_and_linear_frequencies_by_hand(make_config):
    # plain frequencies: 1, 1/2, 1/4, 1/8
    config = make_config(rope_scaling=LLAMA3, head_dim=8, rope_theta=16.0)
    turns = [32 / (2 * math.pi) * f for f in (1, 0.5, 0.25, 0.125)]  # 5.1, 2.5, 1.3, 0.64
    wanted = [1.0, None, None, 0.125 / 8]
    for k in (1, 2):
        keep = (turns[k] - 1) / 3
        wanted[k] = (1 - keep) * 0.5**k / 8 + keep * 0.5**k
    assert config.rope_frequencies("cpu").tolist() == pytest.approx(wanted, rel=1e-6)
    config = make_config(rope_scaling=LINEAR, head_dim=8, rope_theta=16.0)
    assert config.rope_frequencies("cpu").tolist() == pytest.approx([0.25, 0.125, 0.0625, 0.03125])
    cos, sin = config.rope_tables(torch.tensor([0]))
    assert cos.tolist() == [[[1.0] * 8]] and sin.tolist() == [[[0.0] * 8]]


SCALINGS = [
    None, LINEAR, LLAMA3, YARN, YARN | {"original_max_position_embeddings": 16},
    YARN | {"original_max_position_embeddings": 16, "beta_fast": 3.0, "beta_slow": 0.2,
            "truncate": False},
    YARN | {"factor": 8.0, "attention_factor": 1.4, "beta_fast": 4.0},
    YARN | {"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.3},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: "-".join(
    map(str, (scaling or {"plain": "plain"}).values())))
@pytest.mark.parametrize("theta, head_dim", [(10000.0, 8), (500.0, 16), (1e6, 20)])
def test_scaled_frequencies_equal_transformers(scaling, theta, head_dim, make_config):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = make_config(rope_scaling=scaling, rope_theta=theta, head_dim=head_dim,
                         max_position_embeddings=64)
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**to_hf(config)))
    assert torch.allclose(config.rope_frequencies("cpu"), theirs.inv_freq, rtol=1e-6)
    cos, _ = config.rope_tables(torch.tensor([0]))
    assert cos.flatten().tolist() == pytest.approx([theirs.attention_scaling] * head_dim)


def test_a_file_of_weights_is_no_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"12345678")
    with pytest.raises(ValueError, match="is a file. Give the folder that it is in"):
        read_config(file)
