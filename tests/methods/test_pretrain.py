"""pretrain.py: fresh weights, what is learnt of a document, and a checkpoint that loads."""

import json

import pytest
import torch

import data
import train
from eval import DEMO
from methods import pretrain
from model import Llama, ModelConfig, load_model


@pytest.fixture
def arguments(world, tmp_path):
    """A function that makes a command line: arguments(documents, *flags)."""
    def make(documents, *more):
        data.append_records(tmp_path / "corpus.jsonl", documents)
        return ["--stage", "pretrain", "--corpus", str(tmp_path / "corpus.jsonl"), "--tokenizer",
                str(world / "model/tokenizer.model"), "--preset", "tiny", "--plain",
                "--out", str(tmp_path / "run"), *more]
    return make


DOCUMENTS = [[["anna has a red hat", True]],
             [["what ?", False], [" red", True], ["</s>", True]]] * 20


def test_the_checkpoint_loads_and_has_learnt(arguments, tmp_path, world):
    argv = arguments(DOCUMENTS, "--steps", "30", "--lr", "0.02", "--export", str(tmp_path / "base"))
    assert train.main(argv) == 0
    log = data.read_records(tmp_path / "run/log.jsonl")
    assert log[-1]["ce"] < 0.3 * log[0]["ce"]
    model, tokenizer = load_model(tmp_path / "base"), data.Tokenizer(tmp_path / "base")
    assert model.config.prompt_template == "plain"
    assert (model.config.vocab_size, model.config.eos_ids) == (len(tokenizer), [tokenizer.eos_id])
    raw = json.loads((tmp_path / "base/config.json").read_text())
    assert raw["torch_dtype"] == "bfloat16" and raw["hidden_size"] == pretrain.TINY["dim"]
    ids = tokenizer.encode_prompt("anna has a")
    best = model(torch.tensor([ids]))[0, -1].argmax().item()
    assert best == tokenizer.encode_prompt("anna has a red")[len(ids)]


def test_transformers_reads_the_checkpoint(arguments, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert train.main(arguments(DOCUMENTS, "--steps", "2")) == 0
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "run/model",
                                                           torch_dtype=torch.float32)
    ids = torch.randint(0, theirs.config.vocab_size, (2, 9))
    with torch.no_grad():
        wanted, found = theirs(ids).logits, load_model(tmp_path / "run/model")(ids)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_trained_model_is_trained_on(arguments, world, tmp_path):
    argv = arguments(DOCUMENTS, "--model", str(world / "model"), "--steps", "1", "--lr", "1e-9")
    assert train.main(argv) == 0
    before, after = load_model(world / "model"), load_model(tmp_path / "run/model")
    for name, weight in before.named_parameters():
        torch.testing.assert_close(after.get_parameter(name), weight, atol=1e-2, rtol=1e-2)
    assert after.config.context == before.config.context == 4096


def test_the_end_of_a_text_is_learnt(arguments):
    argv = arguments([[["anna has a hat", True], ["</s>", True]], [["anna", True]]])
    cfg, method = train.parse_config(argv)
    run = method.open_run(cfg, train.Alone(), method)
    (ended,), (unended,) = (item["documents"] for item in pretrain.items(run))
    eos = run.tokenizer.eos_id
    assert ended["input_ids"][-1] == ended["labels"][-1] == eos != unended["input_ids"][-1]
    assert ended["labels"][:1] == [data.IGNORE_INDEX]  # BOS is not predicted


def test_a_step_is_the_mean_over_the_tokens_that_are_learnt(
        arguments, same_in_parts, written_out):
    cfg, method = train.parse_config(arguments(DOCUMENTS[:8]))
    run = method.open_run(cfg, train.Alone(), method)
    items = pretrain.items(run)
    learnt = [run.tokenizer.decode([label for label in item["documents"][0]["labels"]
                                    if label != data.IGNORE_INDEX]) for item in items[:2]]
    assert learnt == ["anna has a red hat", "red"]
    terms = [x for item in items for x in written_out(run.model, item["documents"][0])]
    means = same_in_parts(run, items)
    assert means["ce"] == pytest.approx(-sum(terms) / len(terms), rel=1e-5)


def test_fresh_weights_follow_the_seed_alone():
    def weights(seed):
        torch.manual_seed(torch.randint(2**31, ()).item())
        config = ModelConfig(**pretrain.TINY | {"attention_bias": True})
        return dict(pretrain.init_weights(Llama(config), seed).named_parameters())
    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, weight in first.items():
        if weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not torch.equal(weight, other[name])
        else:
            assert weight.unique().tolist() == [0.0 if name.endswith("bias") else 1.0]


def test_the_demos_shape_is_that_of_the_demos_base():
    config = load_model(DEMO / "base").config
    for name, value in pretrain.PRESETS["demo"].items():
        assert getattr(config, name) == value or name == "vocab_size"  # the tokenizer's


@pytest.mark.parametrize("flags", [[], ["--corpus", __file__], ["--tokenizer", __file__]])
def test_missing_inputs_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--stage", "pretrain", "--plain", *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "needs --corpus FILE and --tokenizer FILE" in error
