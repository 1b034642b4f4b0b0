"""Shared by the tests of extras/formats: tiny models, tokenizers, real files."""

import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch

from extras.formats.config import HFConfig, from_hf, to_hf
from extras.formats.tokenizer import HFTokenizer
from model import Llama

SHARED = Path(__file__).parents[4] / "shared" / "data"
sys.path.append(str(Path(__file__).parent))  # for saved_tokenizers.py
TINY = {"vocab_size": 300, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8,
        "hidden_dim": 64, "norm_eps": 1e-5, "max_position_embeddings": 512}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared():
    """The folder of real files beside the repository; tests skip without it."""
    if not (SHARED / "tokenizers").is_dir():
        pytest.skip("the shared data are not beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def write():
    """write(path, value): the value as JSON; returns the path."""
    def write(path, value):
        path.write_text(json.dumps(value))
        return path
    return write


@pytest.fixture(scope="session")
def raw():
    """raw(**changes): the keys of a tiny config.json; ... removes one."""
    def raw(**changes):
        found = to_hf(HFConfig(**TINY)) | changes
        return {key: value for key, value in found.items() if value is not ...}
    return raw


@pytest.fixture(scope="session")
def make_config(raw):
    """make_config(rope_scaling=None, **changes): a tiny config, its scaling as read from a file."""
    def make_config(rope_scaling=None, **changes):
        config = HFConfig(**TINY | changes)
        return from_hf(to_hf(config) | {"rope_scaling": rope_scaling})
    return make_config


@pytest.fixture(scope="session")
def make_model(make_config):
    """make_model(**changes): a tiny model whose attention is far from uniform."""
    def make_model(seed=0, **changes):
        model = Llama(make_config(**changes)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * 0.12 if weight.dim() == 2 else 1 + noise * 0.2)
        return model
    return make_model


@pytest.fixture(scope="session")
def same_weights():
    """same_weights(a, b): whether two models have the same weights, bit for bit."""
    def same_weights(a, b):
        a, b = a.state_dict(), b.state_dict()
        return a.keys() == b.keys() and all(
            torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    return same_weights


@pytest.fixture(scope="session")
def random_ids():
    """random_ids(length, seed): token ids (length,)."""
    def random_ids(length, seed=0):
        return torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(seed))
    return random_ids


@pytest.fixture(scope="session")
def folder(tmp_path_factory, write):
    """A folder with a byte-fallback BPE, to which ChatML's tokens and a plain word were added."""
    path = tmp_path_factory.mktemp("tokenizer")
    text = ["the red lamp in paris on monday anna bought a blue chair user assistant system"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(path / "tokenizer"), vocab_size=330,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, hard_vocab_limit=False)
    n = len(HFTokenizer(path))
    write(path / "tokenizer_config.json", {
        "legacy": False, "bos_token": {"content": "<s>"}, "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            str(n): {"content": "<|im_start|>", "special": True},
            str(n + 1): {"content": "<|im_end|>", "special": True},
            str(n + 2): {"content": "wordplay", "special": False}}})
    return path


@pytest.fixture(scope="session")
def tokenizer(folder):
    """The tokenizer of that folder."""
    return HFTokenizer(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory, shared):
    """{kind: a folder with a tokenizer.json as transformers saves it}."""
    pytest.importorskip("transformers")
    from saved_tokenizers import save_tokenizers
    return save_tokenizers(shared / "tokenizers/mistral-v1.tokenizer.model",
                           tmp_path_factory.mktemp)


class Payload:
    """What a pickle can do to who loads it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="session")
def payload():
    """payload(marker): an object whose unpickling makes a file."""
    return Payload


@pytest.fixture(scope="session")
def real_texts(shared):
    """Strings of the real data: Alpaca, CUT, ShareGPT, Super-NaturalInstructions, in order."""
    texts = []
    for name in ("alpaca/alpaca_en_demo.json", "cut/train-alpaca-sample-iter1.json"):
        for row in json.loads((shared / name).read_text()):
            texts += [value for value in row.values() if isinstance(value, str) and value]
    for row in json.loads((shared / "sharegpt/dummy_conversation.json").read_text()):
        texts += [turn["value"] for turn in row["conversations"]]
    for file in sorted((shared / "ni_tasks").glob("*.json")):
        for row in json.loads(file.read_text())["Instances"]:
            outputs = row["output"]
            texts += [row["input"], *([outputs] if isinstance(outputs, str) else outputs)]
    return list(dict.fromkeys(texts))
