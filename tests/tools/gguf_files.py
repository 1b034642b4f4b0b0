"""GGUF files of tiny models, and llama.cpp's server over one: what tests of tools.convert share."""

import contextlib
import json
import subprocess
import sys

import numpy as np
import requests
import torch

SHORT = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}
SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1], 0, ["127.0.0.1"]
params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 256, 1, False, 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(600)
"""


def short_name(name):
    """What GGUF calls a weight."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{SHORT[stem]}.{kind}"
    number, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{SHORT[part]}.{kind}"


def permute(array, n_heads):
    """The rows of q (n_heads) or k (n_kv_heads) as llama.cpp's converter writes them."""
    rows = array.reshape(n_heads, 2, array.shape[0] // n_heads // 2, *array.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(array.shape))


def gguf_arrays(model):
    """{GGUF's name: numbers in float32} of a model."""
    arrays, config = {}, model.config
    for name, weight in model.named_parameters():
        array = weight.detach().float().numpy()
        if ".q_proj." in name or ".k_proj." in name:
            array = permute(array, config.n_heads if ".q_" in name else config.n_kv_heads)
        arrays[short_name(name)] = array
    return arrays


def write_gguf(file, model, *, tokenizer=None, kind="F32", values=None, drop=(), arrays=None,
               raw=None):
    """A model as a GGUF file.

    tokenizer: {key behind tokenizer.ggml.: value}. kind: of the matrices. values: more keys, or
    other values. drop: keys left out. arrays: more tensors. raw: {name: bytes of that kind}.
    """
    import gguf

    config, kind = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(file), "llama")
    found = {"context_length": config.max_position_embeddings, "embedding_length": config.dim,
             "block_count": config.n_layers, "feed_forward_length": config.hidden_dim,
             "attention.head_count": config.n_heads, "attention.head_count_kv": config.n_kv_heads,
             "attention.layer_norm_rms_epsilon": config.norm_eps, "vocab_size": config.vocab_size,
             "rope.freq_base": config.rope_theta, "rope.dimension_count": config.head_dim}
    if config.head_dim * config.n_heads != config.dim:
        found |= dict.fromkeys(("attention.key_length", "attention.value_length"), config.head_dim)
    found = {f"llama.{key}": value for key, value in found.items()}
    found |= {f"tokenizer.ggml.{key}": value for key, value in (tokenizer or {}).items()}
    found |= values or {}
    for key, value in found.items():
        if key in drop:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
                   str: writer.add_string}[type(value)]
            add(key, value)
    for name, array in (gguf_arrays(model) | (arrays or {})).items():
        if name in drop:
            continue
        if raw and name in raw:
            writer.add_tensor(name, raw[name], raw_dtype=kind)
        elif array.ndim == 2 and kind.name != "F32":
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def bpe_fields(pre, *, n_tokens=500, text=(), **more):
    """A byte-level BPE that was trained on a text, as a GGUF file holds it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(list(text), trainers.BpeTrainer(
        vocab_size=n_tokens, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges,
            "token_type": [3 if token in specials else 1 for token in tokens],
            "bos_token_id": 1, "eos_token_id": 2} | more


@contextlib.contextmanager
def llama_cpp(file):
    """ask(path, **body): the answer of llama.cpp's server over a GGUF file."""
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(file)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True)
    session = requests.Session()
    session.trust_env = False
    try:
        address = process.stdout.readline().strip()
        assert address, "llama.cpp did not load the file"

        def ask(path, **body):
            answer = session.post(f"{address}/{path}", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.json()
        yield ask
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ids_of(ask, text):
    """llama.cpp's ids of a text, in which nothing is a control token."""
    return ask("tokenize", content=text, add_special=False, parse_special=False)["tokens"]


def next_logprobs(ask, ids, n=8):
    """{id: log p} of the most probable next tokens behind a prompt of ids.

    A bias makes it say a letter, since it tells nothing behind half a character.
    """
    answer = ask("completion", prompt=list(ids), n_predict=1, temperature=0, n_probs=n,
                 cache_prompt=False, logit_bias=[["a", 1000]])
    first, = answer["completion_probabilities"]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}


def varied_texts(rng, number):
    """Strings of digits, blanks, code, emoji and several scripts."""
    pools = ["abc XYZ's I'll DON'T we've  ", "0123456789 12.5e-3", "éüßñçøÅ", "日本語テスト漢字",
             "مرحبا بالعالم", "हिन्दी", "😀🎉👩‍👩‍👧🏽", "\n\t\r  \u00a0\u2003 ",
             "{}[]()<>=+-*/&|^%$#@!~`\\\"';:,.?_", "½²Ⅷ٣४", "the quick brown def return import ",
             "<|im_end|></s><s>"]
    for _ in range(number):
        text = ""
        for _ in range(rng.randint(1, 12)):
            pool = rng.choice(pools)
            text += "".join(rng.choice(pool) for _ in range(rng.randint(1, 8)))
        yield text


def random_model(seed=0, **changes):
    """A tiny model whose attention is far from uniform."""
    from extras.formats.config import HFConfig
    from model import Llama

    tiny = {"vocab_size": 500, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
            "head_dim": 16, "hidden_dim": 96, "norm_eps": 1e-5, "max_position_embeddings": 512}
    model = Llama(HFConfig(**tiny | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * 0.12 if weight.dim() == 2 else 1 + noise * 0.2)
    return model
