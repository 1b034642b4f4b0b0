"""The work of speed.py with llama.cpp's server. Needs the packages xllamacpp and gguf."""

import atexit
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
import torch
from work import SHAPE, SIZES, own_model, sample_work, shape, tokens

SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
params.n_parallel, params.n_ctx = int(sys.argv[3]), 1024 * int(sys.argv[3])
params.warmup = False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[4])
server = xllamacpp.Server(params)
time.sleep(3600)
"""
VALUES = {"context_length": "context", "embedding_length": "dim", "block_count": "n_layers",
          "feed_forward_length": "hidden_dim", "head_count": "n_heads",
          "head_count_kv": "n_kv_heads", "rope_dimension_count": "head_dim",
          "vocab_size": "vocab_size"}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
         "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}
KINDS = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}


def write_gguf(path: Path, kind: str) -> None:
    """The random model as llama.cpp reads it; the order of q's and k's rows changes no speed."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    for theirs, ours in VALUES.items():
        getattr(writer, f"add_{theirs}")(SHAPE[ours])
    writer.add_layer_norm_rms_eps(1e-5)
    rest = SHAPE["vocab_size"] - 3
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"t{k}".encode() for k in range(rest))])
    writer.add_token_scores([0.0] * (rest + 3))
    writer.add_token_types([2, 3, 3, *[1] * rest])
    kind = gguf.GGMLQuantizationType[KINDS[kind]]
    for name, weight in own_model(shape(), torch.float32).named_parameters():
        stem, weight = name.removesuffix(".weight"), weight.detach().numpy()
        if stem.startswith("model.layers."):
            block, _, part = stem.removeprefix("model.layers.").partition(".")
            their_name = f"blk.{block}.{NAMES[part]}.weight"
        else:
            their_name = f"{NAMES[stem]}.weight"
        if weight.ndim == 1 or kind.name == "F32":
            writer.add_tensor(their_name, weight)
        else:
            writer.add_tensor(their_name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_server(url: str, process, session) -> None:
    """Return when it answers; raises RuntimeError if it ends before that."""
    for _ in range(300):
        with contextlib.suppress(requests.RequestException):
            if session.get(f"{url}/health", timeout=1).status_code == 200:
                return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError("llama.cpp's server did not start")


def start_server(kind: str, slots: int, temperature: float = 1.0):
    """ask(prompts, lengths) of a server, which answers `slots` at a time and ends with us."""
    folder, session, port = tempfile.TemporaryDirectory(), requests.Session(), free_port()
    file, url, session.trust_env = Path(folder.name, "m.gguf"), f"http://127.0.0.1:{port}", False
    write_gguf(file, kind)
    arguments = [str(file), str(port), str(slots), str(torch.get_num_threads())]
    process = subprocess.Popen([sys.executable, "-c", SERVER, *arguments],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(process.kill)
    wait_for_server(url, process, session)
    folder.cleanup()  # the server has mapped the file

    def ask_one(job):
        prompt, length = job
        body = {"prompt": prompt, "n_predict": length, "ignore_eos": True, "top_k": 0,
                "temperature": temperature, "cache_prompt": False, "top_p": 1.0, "min_p": 0.0}
        reply = session.post(f"{url}/completion", json=body, timeout=600).json()
        assert reply["tokens_predicted"] == length, reply

    def ask(prompts, lengths):
        with ThreadPoolExecutor(slots) as pool:
            list(pool.map(ask_one, zip(prompts, lengths, strict=True)))
    return ask


def sample(dtype):
    """Many responses, 32 at a time."""
    ask, (prompts, lengths) = start_server(str(dtype).removeprefix("torch."), 32), sample_work()
    return lambda: ask(prompts, lengths)


def stream(dtype, kind: str = ""):
    """One response, greedy; `kind` in place of dtype for 8 bits."""
    ask = start_server(kind or str(dtype).removeprefix("torch."), 1, temperature=0.0)
    return lambda: ask([tokens(64, 1)], [SIZES["stream"]])
