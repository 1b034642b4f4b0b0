"""Estimates against models as they are, and train.py's flags."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lora
from model import Packed
from tools.estimate import (
    SHAPES,
    count_parameters,
    documents_per_item,
    estimate_memory,
    main,
    read_flags,
)

DEMO = Path(__file__).parent.parent.parent / "demo"


def memory(*flags, per_item=1):
    cfg, _, config = read_flags(["--stage", "sft", *flags])
    return {what: size for what, (size, _) in estimate_memory(cfg, config, per_item).items()}


@pytest.mark.parametrize("more, most", [
    ([], 1.1), (["--quantize", "nf4"], 1.1), (["--quantize", "int8"], 1.1),
    (["--dtype", "bfloat16"], 1.1), (["--full"], 1.1),
    (["--adapt", "gate_proj", "up_proj"], 1.4)])  # the inputs of all linears are counted
def test_estimates_are_what_a_model_takes(more, most):
    """Parameters exactly; activations against what a real forward pass keeps."""
    from eval import open_model

    cfg, _, config = read_flags(["--stage", "sft", "--micro-tokens", "600", *more])
    model = open_model(cfg)
    if cfg.full:
        model = model.float()
    else:
        targets = tuple(cfg.adapt) or lora.LLAMA_TARGETS
        lora.apply_lora(model, lora.LoraConfig(cfg.rank, cfg.alpha, 0.0, targets))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_parameters(cfg, config)[2] == trained
    found = {what: size for what, (size, _) in estimate_memory(cfg, config, 1).items()}
    frozen = [*model.parameters(), *model.buffers()]
    held = sum(x.nbytes for x in frozen) - (0 if cfg.full else 4 * trained)
    assert found["weights"] == pytest.approx(held, rel=0.02)
    weights, kept = {x.untyped_storage().data_ptr() for x in frozen}, {}

    def count(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.hidden(torch.arange(600) % 1000, Packed([60] * 10))
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert 0.8 < found["activations"] / real < most, (found["activations"], real)


def test_checkpointing_keeps_the_inputs_of_the_blocks():
    plain, less = memory(), memory("--checkpointing")
    assert plain["activations"] / 4 < less["activations"] < plain["activations"] / 2


def test_an_item_is_never_torn():
    found, larger = memory("--micro-tokens", "600", per_item=4), memory("--micro-tokens", "2048")
    assert found["activations"] == larger["activations"]  # 4 documents of --max-len 512


@pytest.mark.parametrize("flags, documents", [
    (["cat"], 6), (["cat", "--condition", "own"], 4), (["cat", "--max-worse", "5"], 10),
    (["dpo", "--max-worse", "2"], 4), (["slic", "--ce-target", "gold"], 7), (["pro"], 4),
    (["slic", "--ce-target", "gold", "--condition", "own"], 5), (["rrhf", "--max-worse", "7"], 8),
    (["reward"], 4), (["rso"], 8), (["rlaif"], 2), (["rlcd"], 2),
    (["expert"], 1), (["cut"], 2), (["cut", "--no-use-l1"], 1), (["forward"], 2), (["sft"], 1)])
def test_how_many_documents_an_item_has_at_most(flags, documents):
    assert documents_per_item(read_flags(["--stage", *flags])[0]) == documents


def test_known_shapes_and_files_without_weights(tmp_path, capsys):
    config = (DEMO / "base/config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    assert main(["--stage", "cat", "--model", str(tmp_path / "config.json"), "--tasks",
                 str(DEMO / "tasks"), "--out", str(tmp_path / "x")]) == 0
    said = capsys.readouterr().out
    assert "2,059,200 parameters" in said and not (tmp_path / "x").exists()
    assert re.search(r"cat +[\d,]+ tokens", said) and re.search(r"sft-ia +[\d,]+ tokens", said)
    assert main(["--stage", "sft", "--model", "llama2-7b", "--dtype", "bfloat16"]) == 0
    assert "6,738,415,616 parameters" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--stage", "sft", "--model", "llama9"])
    assert "no known shape. Shapes: " + ", ".join(SHAPES) in capsys.readouterr().err


@pytest.mark.parametrize("stage", [["cut"], ["hindsight"], ["cut", "--records", "README.md"]])
def test_judged_responses_are_not_needed(stage, monkeypatch, capsys):
    monkeypatch.chdir(DEMO.parent)
    assert main(["--stage", *stage, "--model=llama2-13b"]) == 0
    assert "13,015,864,320 parameters" in capsys.readouterr().out


def test_a_base_in_four_bits_is_smaller():
    cfg, _, config = read_flags(["--stage", "sft", "--model", "llama2-7b", "--dtype", "bfloat16"])
    sizes = [estimate_memory(replace(cfg, quantize=kind), config, 1)["weights"][0]
             for kind in ("none", "int8", "nf4")]
    assert sizes[0] > 1.8 * sizes[1] > 3 * sizes[2]
