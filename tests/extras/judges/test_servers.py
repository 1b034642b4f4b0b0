"""Real servers on tiny models, llama.cpp's and transformers': judge, critic, writer, evaluator.

The model is built by hand: whatever it is shown, it says SAYS and ends. So it is known what every
verdict has to be.
"""

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
from chatserver import item, make_client
from published import published_question, published_reply

from extras.judges.judges import FAILED, HttpCritic, HttpJudge
from extras.judges.pairs import STRATEGIES, Evaluator
from extras.judges.questions import JudgeStopped, make_question
from extras.judges.recipes import Settings
from extras.judges.writers import paraphrase
from model import Llama, ModelConfig, save_model

ROOT = Path(__file__).parents[3]
SAYS = "Output (a)"
CHAT = ("{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
               "OMP_NUM_THREADS": "1", "JUDGE_API_KEY": ""}


def make_speaker(vocab_size: int, bos_id: int, eos_id: int, said_id: int) -> Llama:
    """A LLaMA that says `said_id` after everything, and EOS after that: its layers add nothing."""
    model = Llama(ModelConfig(
        vocab_size=vocab_size, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16,
        hidden_dim=128, norm_eps=1e-5, context=2048, bos_id=bos_id, eos_ids=[eos_id]))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            weight.fill_(1.0 if "norm" in name else 0.0)
        # Every token looks the same but this one.
        weights["model.embed_tokens.weight"][:, 0] = 1.0
        weights["model.embed_tokens.weight"][said_id, :2] = torch.tensor([0.0, 1.0])
        weights["lm_head.weight"][said_id, 0] = weights["lm_head.weight"][eos_id, 1] = 8.0
    return model


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command, port, log):
    """The process of a server that answers at /health, or a failure with the end of its log."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=log.open("wb"),
                               stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    session = requests.Session()
    session.trust_env = False
    for _ in range(600):
        try:
            if session.get(f"http://127.0.0.1:{port}/health", timeout=1).status_code == 200:
                return process
        except requests.RequestException:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


def write_hugging_face_folder(path):
    """The speaker with a tokenizer of bytes, as transformers loads them."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<s>", "</s>", *letters])}
    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = tokenizers.decoders.ByteLevel()
    bare.add_tokens([tokenizers.AddedToken(SAYS, normalized=False)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        chat_template=CHAT)
    said_id = tokenizer.convert_tokens_to_ids(SAYS)
    save_model(make_speaker(len(tokenizer), 0, 1, said_id), path)
    tokenizer.save_pretrained(path)


SHORT = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
         "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}


def short_name(name: str) -> str:
    """A parameter's name in a GGUF file."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{SHORT[stem]}.weight"
    number, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{SHORT[part]}.weight"


def kind_of_piece(pieces, i: int) -> int:
    """GGUF's number for a kind of token."""
    for test, kind in ((pieces.is_unknown, 2), (pieces.is_control, 3), (pieces.is_byte, 6)):
        if test(i):
            return kind
    return 1


def write_gguf_file(path):
    """The speaker with a sentencepiece tokenizer, as llama.cpp loads them."""
    gguf = pytest.importorskip("gguf")
    words = ["instruction output judge verdict answer the a b same contradicted"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(path / "tokenizer"), vocab_size=320,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        user_defined_symbols=[SAYS])
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    model = make_speaker(len(pieces), pieces.bos_id(), pieces.eos_id(), pieces.piece_to_id(SAYS))
    config, writer = model.config, gguf.GGUFWriter(str(path / "speaker.gguf"), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i).replace(" ", "\u2581").encode()
                           for i in range(len(pieces))])
    writer.add_token_scores([pieces.get_score(i) for i in range(len(pieces))])
    writer.add_token_types([kind_of_piece(pieces, i) for i in range(len(pieces))])
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_chat_template(CHAT)
    for name, weight in model.named_parameters():  # q and k are zero: their order does not matter
        writer.add_tensor(short_name(name), weight.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 4096, 2, False, 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module", params=["llama.cpp", "transformers serve"])
def server(request, tmp_path_factory):
    """(address, name of the model, which server)."""
    path, port, program = tmp_path_factory.mktemp("server"), free_port(), None
    if request.param == "llama.cpp":
        pytest.importorskip("xllamacpp")
        write_gguf_file(path)
        file = str(path / "speaker.gguf")
        name, command = "any", [sys.executable, "-c", LLAMA_CPP, file, str(port)]
    else:
        program = ROOT / ".servers/bin/transformers"
        if not program.exists():
            pytest.skip("no .servers environment: its transformers is newer than the one that "
                        "parity is tested with; .ci/run makes it")
        write_hugging_face_folder(path)
        name, command = str(path), [str(program), "serve", "--port", str(port), "--device", "cpu",
                                    "--host", "127.0.0.1"]
    process = start(command, port, path / "server.log")
    try:
        yield f"http://127.0.0.1:{port}", name, request.param
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(path, ignore_errors=True)


def client_of(server, cache="", **flags):
    """A client of a real server."""
    client = make_client(server[0], cache, judge_model=server[1], judge_workers=2, judge_tries=2,
                         judge_key_env="NO_SUCH_KEY", **flags)
    client.backoff = 0.05
    return client


def test_answers_come_whole_counted_and_once(server, tmp_path):
    questions = [make_question("Say it.", {"response": str(k)}) for k in range(6)]
    client = client_of(server, tmp_path / "a.jsonl", price_in=1.0, price_out=1.0)
    found = [(reply.text, reply.failure) for reply in client.ask(questions)]
    assert found == [(SAYS, "")] * 6
    used = client.usage()
    assert used["answered"] == used["requests"] == 6
    assert used["retries"] == used["without_usage"] == 0 and not used["failures"]
    assert used["prompt_tokens"] > 6 * 50 and 6 <= used["completion_tokens"] <= 6 * 4
    again = client_of(server, tmp_path / "a.jsonl")
    again.ask(questions)
    assert again.usage()["requests"] == 0


def test_an_answer_that_is_truncated_is_a_failure(server):
    question = make_question("Say it.", {"response": "x"}, max_tokens=1)
    assert client_of(server).ask([question])[0].failure == "cut at max_tokens"


def test_judge_and_critic_guess_nothing(server):
    """The model never writes a verdict line with the nonce: all is unparsed, critiques fail."""
    client = client_of(server)
    verdict, exact = HttpJudge(client.ask, max_unparsed=1).judge([item("blue"), item("red")])
    assert (verdict.reward, verdict.how) == (None, "unparsed") and exact.reward == 2
    with pytest.raises(JudgeStopped, match=r"1 of 1 judge replies .* \(1 no verdict\)"):
        HttpJudge(client.ask).similar_pairs([({}, "blue", "red")])
    assert HttpCritic(client.ask, max_unparsed=1).critique([item("blue")]) == [FAILED]
    # Each of three questions was asked, and once more.
    assert client.usage()["requests"] == client.usage()["answered"] == 6


def test_wordings_are_checked_and_dropped_with_the_reason(server):
    tasks = {"colour": "Name the colour.", "place": "Name the place."}
    ask = client_of(server).ask
    rows = paraphrase(ask, tasks, 2, checker=ask, model=server[1])
    assert [(row["task"], row["text"], row["reason"]) for row in rows] == [
        ("colour", SAYS, "not checked: no verdict"), ("place", SAYS, "not checked: no verdict"),
        ("colour", SAYS, "said already"), ("place", SAYS, "said already")]


def test_the_tool_keeps_nothing_that_does_not_ask_the_question(server, tmp_path, capsys):
    from tools import paraphrase

    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": "legs", "question": "How many legs?", "target": "8"}\n')
    with pytest.raises(SystemExit) as stop:
        paraphrase.main(["--number", "2", "--tasks", str(path), "--judge-url", server[0],
                         "--judge-model", server[1], "--judge-key-env", "NO_SUCH_KEY", "--out",
                         str(tmp_path / "out")])
    said = capsys.readouterr()
    assert stop.value.code == 2 and "no task has two dev wordings, and consistency" in said.err
    assert "legs: 1 has no word of the original, 1 said already\n" in said.out
    assert (tmp_path / "out/paraphrases.json").read_text() == '{\n "legs": {}\n}\n'
    assert len((tmp_path / "out/paraphrases.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("recipe, reasons", [
    ("self-instruct", ["has no numbered list"] * 3), ("evol", ["not compared: no verdict",
                                                                 "said already"]),
    ("self-chat", ["has fewer than two turns"] * 2), ("explain", [""] * 2),
    ("dialogue", ["repeats an earlier turn"] * 2)])
def test_recipes_count_what_they_drop(server, recipe, reasons, tmp_path):
    from tools.write import RECIPES

    client = client_of(server, tmp_path / "a.jsonl")
    settings = Settings(number=2, rounds=1, max_unparsed=1)
    rows = RECIPES[recipe](client.ask, ["Why is snow white?", "How many legs?"], settings)
    assert [row["reason"] for row in rows] == reasons
    used = client.usage()
    assert used["requests"] == used["answered"] and not used["failures"]
    again = client_of(server, tmp_path / "a.jsonl")
    assert RECIPES[recipe](again.ask, ["Why is snow white?", "How many legs?"], settings) == rows
    assert again.usage()["requests"] == 0


@pytest.mark.parametrize("strategy, winners, failures", [
    ("rules", ["1", "2"], []), ("metrics_reference", ["1", "2"], []),
    ("swap", [None, None], ["no verdict"] * 2)])
def test_the_evaluator_reads_what_is_said(server, strategy, winners, failures):
    """Always "Output (a)": right in one order. No explanation ends as the rule for them wants."""
    pairs = [{"input": f"Name colour {k}.", "output_1": "Red.", "output_2": "Why?"}
             for k in range(3)]
    evaluator = Evaluator(client_of(server).ask, STRATEGIES[strategy], reask=0,
                          make=published_question, read=published_reply)
    rows = evaluator.evaluate(pairs)
    assert [(row["winners"], row["failures"]) for row in rows] == [(winners, failures)] * 3


def test_refusals_of_the_server_are_sentences(server):
    if server[2] == "llama.cpp":  # transformers serve lets a prompt grow beyond the limit
        question = make_question("Say it.", {"response": "word " * 9000})
        reply, = client_of(server).ask([question])
        assert reply.failure.startswith("http 400: ") and "context" in reply.failure
        return
    client = client_of((server[0], "no/such-model"))
    try:
        failure = client.ask([make_question("Say it.", {})])[0].failure
    except JudgeStopped as error:
        failure = str(error)
    assert "http 4" in failure or "http 5" in failure or "(404)" in failure
