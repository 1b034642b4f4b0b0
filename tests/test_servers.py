"""Real servers on tiny models, llama.cpp's and transformers': judge, critic, paraphraser and evaluator go through them.

The model is built by hand: whatever it is shown, it says SAYS and ends. So it is known what every verdict has to be.
"""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import sentencepiece
import torch

from eval import main
from judge import FAILED, ChatClient, ClientConfig, HttpCritic, HttpJudge, JudgeStopped, make_question, paraphrase
from model import PRESETS, Llama, save_model

ROOT = Path(__file__).parent.parent
SAYS = "Output (a)"
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "JUDGE_API_KEY": ""}


def speaker(vocab_size: int, bos_id: int, eos_id: int, said_id: int) -> Llama:
    """A LLaMA whose next token is `said_id` after everything, and EOS after that: its layers add nothing."""
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=vocab_size, bos_id=bos_id, eos_ids=(eos_id,), tie_embeddings=False, max_position_embeddings=2048)
    model = Llama(config).init_weights(0)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            weight.fill_(1.0 if "norm" in name else 0.0)
        weights["model.embed_tokens.weight"][:, 0] = 1.0             # every token looks the same ...
        weights["model.embed_tokens.weight"][said_id, :2] = torch.tensor([0.0, 1.0])     # ... but this one
        weights["lm_head.weight"][said_id, 0] = weights["lm_head.weight"][eos_id, 1] = 8.0
    return model


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(command, port, path, log):
    """The process of a server that answers at `path`, or a failure with the end of its log."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=log.open("wb"), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    session = requests.Session()
    session.trust_env = False
    for _ in range(600):
        try:
            if session.get(f"http://127.0.0.1:{port}{path}", timeout=1).status_code == 200:
                return process
        except requests.RequestException:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


def hugging_face_folder(path):
    """The speaker with a tokenizer of bytes, as transformers loads them."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bare = tokenizers.Tokenizer(tokenizers.models.BPE({**{"<s>": 0, "</s>": 1}, **{char: 2 + k for k, char in enumerate(alphabet)}}, []))
    bare.pre_tokenizer, bare.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    bare.add_tokens([tokenizers.AddedToken(SAYS, normalized=False)])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=CHAT)
    save_model(speaker(len(wrapped), 0, 1, wrapped.convert_tokens_to_ids(SAYS)), path)
    wrapped.save_pretrained(path)
    return path


def gguf_file(path):
    """The speaker with a sentencepiece tokenizer, as llama.cpp loads them."""
    gguf = pytest.importorskip("gguf")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["instruction output judge verdict answer the a b same contradicted"] * 20), model_prefix=str(path / "tokenizer"), vocab_size=320,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, user_defined_symbols=[SAYS], minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    model = speaker(len(pieces), pieces.bos_id(), pieces.eos_id(), pieces.piece_to_id(SAYS))
    config, file = model.config, path / "speaker.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    for name, value in (("context_length", 2048), ("embedding_length", config.dim), ("block_count", config.n_layers), ("feed_forward_length", config.hidden_dim),
                        ("head_count", config.n_heads), ("head_count_kv", config.n_kv_heads), ("layer_norm_rms_eps", 1e-5),
                        ("rope_dimension_count", config.dim // config.n_heads), ("vocab_size", len(pieces))):
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("llama")
    kinds = [(pieces.is_unknown, 2), (pieces.is_control, 3), (pieces.is_byte, 6)]
    writer.add_token_list([pieces.id_to_piece(i).replace(" ", "\u2581").encode() for i in range(len(pieces))])
    writer.add_token_scores([pieces.get_score(i) for i in range(len(pieces))])
    writer.add_token_types([next((kind for test, kind in kinds if test(i)), 1) for i in range(len(pieces))])     # 1: a plain piece
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_chat_template(CHAT)
    short = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for name, weight in model.named_parameters():                   # all of q and k is zero, so their order does not matter
        stem = name.removesuffix(".weight")
        block = stem.removeprefix("model.layers.").partition(".") if stem.startswith("model.layers.") else None
        writer.add_tensor(f"blk.{block[0]}.{short[block[2]]}.weight" if block else f"{short[stem]}.weight", weight.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"], 4096, 2, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module", params=["llama.cpp", "transformers serve"])
def server(request, tmp_path_factory):
    """(address, name of the model, which server)."""
    path, port = tmp_path_factory.mktemp("server"), free_port()
    if request.param == "llama.cpp":
        pytest.importorskip("xllamacpp")
        model, command, probe = "any", [sys.executable, "-c", LLAMA_CPP, str(gguf_file(path)), str(port)], "/health"
    else:
        program = ROOT / ".servers/bin/transformers"
        if not program.exists():
            pytest.skip("no .servers environment: its transformers is newer than the one that parity is tested with; .ci/run makes it")
        model = str(hugging_face_folder(path))
        command, probe = [str(program), "serve", "--port", str(port), "--device", "cpu", "--host", "127.0.0.1"], "/health"
    process = started(command, port, probe, path / "server.log")
    try:
        yield f"http://127.0.0.1:{port}", model, request.param
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(path, ignore_errors=True)


def client(server, **more):
    return ChatClient(ClientConfig(url=server[0], model=server[1], workers=2, tries=2, backoff=0.05, key_env="NO_SUCH_KEY", **more))


def test_answers_come_whole_counted_and_once(server, tmp_path):
    asked = client(server, cache=str(tmp_path / "a.jsonl"), price_in=1.0, price_out=1.0)
    replies = asked.ask([make_question("Say it.", {"response": str(k)}) for k in range(6)])
    assert [(reply.text, reply.failure) for reply in replies] == [(SAYS, "")] * 6
    found = asked.usage()
    assert found["answered"] == found["requests"] == 6 and found["retries"] == 0 and not found["failures"]
    assert found["prompt_tokens"] > 6 * 50 and 6 <= found["completion_tokens"] <= 6 * 4 and found["without_usage"] == 0
    again = client(server, cache=str(tmp_path / "a.jsonl"))
    again.ask([make_question("Say it.", {"response": str(k)}) for k in range(6)])
    assert again.usage()["requests"] == 0


def test_an_answer_that_is_cut_is_a_failure(server):
    reply, = client(server).ask([make_question("Say it.", {"response": "x"}, max_tokens=1)])
    assert reply.failure == "cut at max_tokens"


def test_judge_and_critic_guess_nothing(server):
    """The model never writes a verdict line with the nonce, so all is unparsed, and critiques have failed."""
    asked = client(server)
    item = {"instruction": "name the colour", "input": "a lamp", "target": "red", "response": "blue"}
    verdict, exact = HttpJudge(asked.ask).judge([item, {**item, "response": "red"}])
    assert (verdict.reward, verdict.how) == (None, "unparsed") and exact.reward == 2
    assert HttpJudge(asked.ask).similar("blue", "red") is None
    assert HttpCritic(asked.ask).critique([item]) == [FAILED]
    assert asked.usage()["requests"] == asked.usage()["answered"] == 6             # each of three questions, and once more


def test_wordings_are_checked_and_dropped_with_the_reason(server):
    rows = paraphrase(client(server).ask, {"colour": "Name the colour.", "place": "Name the place."}, 2, model=server[1])
    assert [(row["task"], row["text"], row["reason"]) for row in rows] == [
        ("colour", SAYS, "not checked: no verdict"), ("place", SAYS, "not checked: no verdict"), ("colour", SAYS, "said already"), ("place", SAYS, "said already")]


@pytest.mark.parametrize("strategy, winners, failures", [("rules", ["1", "2"], []), ("metrics_reference", ["1", "2"], []), ("swap", [None, None], ["no verdict"] * 2)])
def test_the_evaluator_reads_what_is_said(server, strategy, winners, failures, tmp_path, capsys):
    """Always "Output (a)": right in one order, wrong in the other; no explanation ends as the rule for explanations wants it."""
    pairs = [{"input": f"Name colour {k}.", "output_1": "Red.", "output_2": "Why?", "label": 1 + k % 2} for k in range(3)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    argv = ["--benchmark", "llmbar", "--data", str(tmp_path / "pairs.json"), "--judge", "http", "--judge-url", server[0], "--judge-model", server[1], "--judge-key-env",
            "NO_SUCH_KEY", "--judge-workers", "2", "--strategy", strategy, "--verdict-rule", "llmbar", "--out", str(tmp_path / "out")]
    main(argv)
    rows = [json.loads(line) for line in (tmp_path / "out/verdicts.jsonl").read_text().splitlines()]
    assert [(row["winners"], row["failures"]) for row in rows] == [(winners, failures)] * 3
    found = json.loads((tmp_path / "out/metrics.json").read_text())["evaluators"][strategy]["pairs"]
    assert found["accuracy"]["mean"] == (0.5 if winners[0] else 0) and found["unparsed"] == (0 if winners[0] else 6)
    assert "cost" not in capsys.readouterr().out


def test_refusals_of_the_server_are_sentences(server):
    reply, = client(server).ask([make_question("Say it.", {"response": "word " * 9000})]) if server[2] == "llama.cpp" else [None]
    if reply:                                                       # transformers serve lets a prompt grow beyond the model's limit
        assert reply.failure.startswith("http 400: ") and "context" in reply.failure
    if server[2] == "transformers serve":
        other = ChatClient(ClientConfig(url=server[0], model="no/such-model", tries=1, key_env="NO_SUCH_KEY"))
        try:
            failure = other.ask([make_question("Say it.", {})])[0].failure
        except JudgeStopped as error:
            failure = str(error)
        assert "http 4" in failure or "http 5" in failure or "(404)" in failure
