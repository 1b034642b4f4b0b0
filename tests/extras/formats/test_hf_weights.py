"""Folders of weights against transformers, against broken files, and in little memory."""

import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from extras.formats import open_model, read_config, save_model, weights
from extras.formats.config import HFConfig, to_hf
from lora import LoraConfig, apply_lora
from model import Sampling, generate, load_model

Q = "model.layers.0.self_attn.k_proj.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


@pytest.fixture
def saved(make_model, tmp_path):
    """A model folder."""
    save_model(make_model(), tmp_path / "m")
    return tmp_path / "m"


def twin_of(folder):
    """transformers' own reading of a folder."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()


def rewrite(folder, change):
    """Apply `change` to the dict of tensors in the folder's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refused(folder, words, **how):
    with pytest.raises(ValueError, match=words) as caught:
        open_model(folder, **how)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 + 2 * len(str(folder)), message


# Against transformers --------------------------------------------------------------------------

BASE = dict(vocab_size=320, hidden_size=48, intermediate_size=112, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=256, initializer_range=0.2)
VARIANTS = {  # what tells the families apart, in small
    "llama-1": dict(rms_norm_eps=1e-6),
    "llama-2-70b": dict(rms_norm_eps=1e-5, num_key_value_heads=2),
    "vicuna-16k": dict(rms_norm_eps=1e-5, rope_scaling={"type": "linear", "factor": 4.0}),
    "codellama": dict(rms_norm_eps=1e-5, rope_theta=1e6, vocab_size=336),
    "yi": dict(rms_norm_eps=1e-5, rope_theta=5e6, num_key_value_heads=2, bos_token_id=1),
    "yarn-llama": dict(rope_scaling={"type": "yarn", "factor": 16.0,
                                     "original_max_position_embeddings": 64}),
    "llama-3.1": dict(rope_theta=5e5, rope_scaling=LLAMA3, tie_word_embeddings=True),
    "biased": dict(attention_bias=True, mlp_bias=True),
    "wide heads": dict(head_dim=20),
}


def perturbed(twin):
    """Norms and biases away from 1 and 0, too."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in twin.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return twin.eval()


def in_new_spelling(folder):
    """config.json as transformers 5 writes it: rope_parameters, no top-level rope_theta, dtype."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_scaling", None) or {"rope_type": "default"}
    rope = {("rope_type" if key == "type" else key): value for key, value in rope.items()}
    config["rope_parameters"] = rope | {"rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("torch_dtype", config.pop("dtype", None))
    file.write_text(json.dumps(config))


@torch.no_grad()
@pytest.mark.parametrize("spelling", ["4.57", "5"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_of_each_family_gives_the_same_logits(name, spelling, random_ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**(BASE | VARIANTS[name]))
    twin = perturbed(transformers.LlamaForCausalLM(config))
    twin.save_pretrained(tmp_path, max_shard_size="40KB" if name in ("yi", "llama-1") else "1GB")
    if spelling == "5":
        in_new_spelling(tmp_path)
    model = open_model(tmp_path)
    for length in (9, 200):
        ids = random_ids(length, 7)[None]
        assert (model(ids) - twin(ids).logits).abs().max() < 1e-5, length
    save_model(model, tmp_path / "ours")
    again = twin_of(tmp_path / "ours")(ids).logits
    assert (again - twin(ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_mistral_is_read_within_its_window_and_written_back(random_ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.MistralConfig(**BASE, num_key_value_heads=2, sliding_window=32)
    twin = perturbed(transformers.MistralForCausalLM(config))
    twin.save_pretrained(tmp_path / "theirs")
    model = open_model(tmp_path / "theirs")
    assert model.config.context == 32  # within the window it changes nothing
    ids = random_ids(32)[None]
    assert (model(ids) - twin(ids).logits).abs().max() < 1e-5
    save_model(model, tmp_path / "ours")
    assert read_config(tmp_path / "ours") == model.config
    again = twin_of(tmp_path / "ours")
    assert type(again).__name__ == "MistralForCausalLM" and again.config.sliding_window == 32
    assert (again(ids).logits - model(ids)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_our_folder_and_we_read_theirs(
        tied, make_model, same_weights, random_ids, tmp_path):
    model, ids = make_model(2, tie_embeddings=tied), random_ids(12)[None]
    save_model(model, tmp_path / "ours", max_shard_bytes=20_000)
    twin = twin_of(tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    again = open_model(tmp_path / "theirs")
    assert again.config == model.config and same_weights(again, model)
    assert (twin(ids).logits - model(ids)).abs().max() < 1e-5
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


# Round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_round_trips_are_bitwise(tied, make_model, same_weights, tmp_path):
    model = make_model(3, tie_embeddings=tied, attention_bias=True, eos_ids=[2, 5],
                       prompt_template="alpaca")
    save_model(model, tmp_path)
    again = open_model(tmp_path)
    assert same_weights(again, model) and again.config == model.config
    assert all(weight.requires_grad for weight in again.parameters())
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    assert same_weights(load_model(tmp_path), model)  # the course's own reader
    save_model(model, tmp_path, max_shard_bytes=10_000)  # over the single file
    names = sorted(os.listdir(tmp_path))
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names
    assert len(names) > 5 and not [name for name in names if name.startswith(".")]
    assert same_weights(open_model(tmp_path), model)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in model.parameters())
    save_model(model, tmp_path, dtype=torch.bfloat16)  # and back to one
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half = open_model(tmp_path, dtype=torch.bfloat16)
    assert same_weights(half, copy.deepcopy(model).to(torch.bfloat16))


def test_dtype_none_keeps_each_weight_as_it_is_stored(make_model, same_weights, tmp_path):
    model = make_model().bfloat16()
    model.model.norm.float()
    save_model(model, tmp_path)
    assert same_weights(open_model(tmp_path, dtype=None), model)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("numbers", [1, 100, 1000])
def test_small_chunks_change_nothing(numbers, make_model, same_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK_NUMBERS", numbers)
    model = make_model(head_dim=10, hidden_dim=70)
    save_model(model, tmp_path, max_shard_bytes=20_000)
    assert same_weights(open_model(tmp_path), model)
    assert same_weights(open_model(tmp_path, dtype=None), model)


def test_modes_follow_the_umask_and_writes_leave_nothing_behind(make_model, tmp_path):
    before = os.umask(0o027)
    try:
        save_model(make_model(), tmp_path)
    finally:
        os.umask(before)
    assert {os.stat(tmp_path / name).st_mode & 0o777 for name in os.listdir(tmp_path)} == {0o640}
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_models_that_are_not_plain_are_not_written(make_model, saved, tmp_path):
    extra = make_model()
    extra.extra = nn.Linear(2, 2)
    for model in (extra, apply_lora(make_model(), LoraConfig(rank=2))):
        with pytest.raises(ValueError, match="is not a weight of a plain model; merge adapters"):
            save_model(model, tmp_path / "x")
    quantised = pytest.importorskip("extras.fast.quant") and open_model(saved, quantize="int8")
    with pytest.raises(ValueError, match="the model is quantised"):
        save_model(quantised, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_save_that_fails_names_the_folder_and_leaves_the_old_model(
        make_model, same_weights, tmp_path, monkeypatch):
    model = make_model()
    save_model(model, tmp_path)

    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        save_model(make_model(1), tmp_path)
    assert caught.value.filename == str(tmp_path) and same_weights(open_model(tmp_path), model)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


# Quantised and sharded -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_only_the_linears_of_the_blocks_are_quantised(kind, make_model, tmp_path):
    quant = pytest.importorskip("extras.fast.quant")
    model = make_model(attention_bias=True, tie_embeddings=True)
    save_model(model, tmp_path)
    found = open_model(tmp_path, quantize=kind)
    linears = [part for part in found.modules() if isinstance(part, quant.QuantLinear)]
    plain = dict(model.named_parameters())
    assert len(linears) == 7 * 2 and found.lm_head.weight is found.model.embed_tokens.weight
    for name, weight in found.named_parameters():
        assert torch.equal(weight, plain[name])  # embedding, biases and norms
    for name, part in found.named_modules():
        if isinstance(part, quant.QuantLinear):
            weight = part.dequantize(torch.float32)
            assert (weight - plain[f"{name}.weight"]).abs().max() < 0.1
    assert len(generate(found, [[1, 5]], Sampling(max_new_tokens=4), eos_ids=[999])[0]) == 4
    refused(tmp_path, "quantize is 'int3'; expected int8 or nf4", quantize="int3")


SHARDS = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from extras.formats import open_model, weights

dist.init_process_group("gloo")
reads, read_rows = [], weights.read_rows

def counted(file, name, part, *rest):
    reads.append(torch.Size(part[1:]).numel())
    read_rows(file, name, part, *rest)

def spread(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)

weights.read_rows = counted
held = open_model(sys.argv[1], shard=spread)
read, local = sum(reads), sum(p.to_local().numel() for p in held.parameters())
whole = open_model(sys.argv[1])
total = sum(p.numel() for p in whole.parameters())
same = all(torch.equal(p.full_tensor(), q) for p, q in
           zip(held.parameters(), whole.parameters(), strict=True))
os.write(1, f"share {local / total} {read / total} {same}\\n".encode())  # whole lines
dist.destroy_process_group()
"""


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.faults)])
def test_each_process_reads_and_holds_its_rows_alone(tied, make_model, tmp_path):
    """Of a model of n numbers each of two processes holds n / 2 (the last rows may be fewer)."""
    save_model(make_model(tie_embeddings=tied), tmp_path, max_shard_bytes=30_000)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "--no-python", sys.executable, "-c", SHARDS, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(weights.__file__).parents[2], capture_output=True,
                          text=True, timeout=300)
    lines = re.findall(r"share ([\d.]+) ([\d.]+) (\w+)", done.stdout)
    assert len(lines) == 2, done.stderr
    for local, read, same in lines:
        assert same == "True" and 0.49 < float(local) < 0.51 and 0.49 < float(read) < 0.51


# Broken files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value, how", [
    (torch.nan, {}), (torch.inf, {}), (-torch.inf, {}), (torch.nan, {"quantize": "int8"}),
    (torch.inf, {"quantize": "nf4"}), (7e4, {"dtype": torch.float16}),
    (torch.nan, {"dtype": torch.bfloat16})])
def test_one_bad_number_in_any_tensor_is_refused_by_name(value, how, saved):
    if "quantize" in how:
        pytest.importorskip("extras.fast.quant")
    good, rng = load_file(saved / "model.safetensors"), random.Random(0)
    for name, tensor in good.items():
        at = rng.randrange(tensor.numel())
        rewrite(saved, lambda x, name=name, at=at: x[name].view(-1)[at].fill_(value))
        refused(saved, f"tensor {re.escape(name)} has 1 non-finite values", **how)
        save_file(good, saved / "model.safetensors", {"format": "pt"})


def test_sentences_about_files(saved, tmp_path):
    file = saved / "model.safetensors"
    good, blame = file.read_bytes(), "The weights and config.json are from different models."
    refused(tmp_path / "nothing", r"no model at .*nothing \(no config.json\). Give a folder")
    cases = [
        (lambda x: x.update({Q: x[Q][:8].clone()}),
         rf"tensor {Q} is \(8, 32\) in {file}, config.json says \(16, 32\). {blame}"),
        (lambda x: x.pop(Q), rf"tensor {Q} is not in {file}. {blame}"),
        (lambda x: x.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2)}),
         r"layers.9.mlp.up_proj.weight is \(2,\) in .*, config.json says that there is none"),
        (lambda x: x[Q][3].fill_(torch.nan),
         rf"tensor {Q} has 32 non-finite values \({file}\). The checkpoint is broken\."),
        (lambda x: x[Q][3, 1].fill_(torch.inf), "has 1 non-finite values"),
        (lambda x: x.update({Q: x[Q].long()}), "is I64, expected F32, F16 or BF16"),
    ]
    for change, words in cases:
        rewrite(saved, change)
        refused(saved, words)
        file.write_bytes(good)
    rewrite(saved, lambda x: x[Q][3, 1].fill_(7e4))
    assert open_model(saved).state_dict()[Q][3, 1] == 7e4
    refused(saved, "too large for float16", dtype=torch.float16)
    rewrite(saved, lambda x: x[Q][3].fill_(3e38))  # finite, though its sum is not
    open_model(saved)
    for damage in (good[:1000], good[:5], b"", good + b"x", b"\xff" * 200):
        file.write_bytes(damage)
        refused(saved, rf"model.safetensors is damaged or incomplete: .* \(found {len(damage):,} "
                       r"bytes\)")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refused(saved, r'is a Git LFS pointer of \d+ bytes, not weights. Run "git lfs pull" in that')
    file.unlink()
    refused(saved, "no weights at .* Give a folder in Hugging Face format")
    (saved / "pytorch_model.bin").write_bytes(b"")
    refused(saved, "its weights in .bin files. Convert it first: python -m tools.convert")


def test_extra_tensors_of_old_files_are_ignored(saved, make_model, same_weights):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(saved, lambda x: x.update({name: torch.ones(4)}))
    torch.save({"x": torch.zeros(1)}, saved / "pytorch_model.bin")  # safetensors are preferred
    assert same_weights(open_model(saved), make_model())


@torch.no_grad()
@pytest.mark.parametrize("trials", [20])
def test_a_tied_config_and_another_head_in_the_file(trials, make_model, random_ids, tmp_path):
    """The head counts, with a warning; the control: an equal head, or none, leaves them tied."""
    ids = random_ids(9)[None]
    for trial in range(trials):
        model, folder = make_model(), tmp_path / f"{trial}"
        embedding = model.model.embed_tokens.weight
        if trial % 2:  # one number differs
            model.lm_head.weight.data.copy_(embedding)
            row, column = torch.randint(300, ()), torch.randint(32, ())
            model.lm_head.weight[row, column] += 1e-3
        save_model(model, folder)
        tied = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(tied))
        with pytest.warns(UserWarning, match="another lm_head.weight than .* That head is used"):
            found = open_model(folder)
        assert not found.config.tie_embeddings and torch.equal(found(ids), model(ids))
        rewrite(folder, lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"] + 0}))
        found = open_model(folder)  # a warning would be an error
        assert found.lm_head.weight is found.model.embed_tokens.weight


def test_transformers_5_takes_the_other_head_too(make_model, random_ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, ids = make_model(), random_ids(9)[None]
    save_model(model, tmp_path)
    tied = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(tied))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        same = (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    assert same == (int(transformers.__version__.partition(".")[0]) >= 5)


def test_shards_stay_in_their_folder(saved, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.move(saved / "model.safetensors", outside)
    os.symlink(outside, saved / "link.safetensors")
    index = saved / "model.safetensors.index.json"
    names = ("../outside.safetensors", str(outside), "a/../../outside.safetensors",
             "..\\outside.safetensors", "", ".", "..", "link.safetensors", "https://x/y.safetensors",
             "x\0.safetensors", "x.safetensors\n", 3, None, "x" * 10**6 + ".safetensors",
             "config.json", ["x"], {})
    for name in names:
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refused(saved, "points outside its folder|is not JSON")
    for text in ("{}", '{"weight_map": []}', '{"weight_map": 1}'):
        index.write_text(text)
        refused(saved, r"points outside its folder \(null\). Refused; do not trust this download")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    refused(saved, "gone.safetensors is missing, though model.safetensors.index.json lists it")
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"  # Hugging Face's cache
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copy(outside, blobs / "0123")
    shutil.copy(saved / "config.json", snapshot)
    os.symlink("../../blobs/0123", snapshot / "m.safetensors")
    index = {"weight_map": {"a": "m.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    open_model(snapshot)


def test_a_wrong_config_allocates_nothing(saved):
    raw = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(
        raw | {"hidden_size": 2**16, "num_hidden_layers": 1000}))
    refused(saved, "config.json says")  # these shapes would take 10^14 bytes


# Memory ----------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from pathlib import Path
from extras.formats import open_model

def memory(name):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])

open_model(sys.argv[1], dtype=torch.bfloat16)  # torch's own lazy parts
before = memory("VmRSS")
model = open_model(sys.argv[2], dtype=torch.bfloat16)
held = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
print("ratio", (memory("VmHWM") - before) / held, held)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figures")
@pytest.mark.parametrize("form", ["single", pytest.param("shards", marks=pytest.mark.faults)])
def test_loading_takes_little_more_than_the_weights(form, make_model, tmp_path):
    save_model(make_model(), tmp_path / "small", dtype=torch.bfloat16)
    config = HFConfig(vocab_size=8000, dim=1024, n_layers=6, n_heads=16, n_kv_heads=16, head_dim=64,
                      hidden_dim=4096)
    shapes = {name: weight.shape for name, weight in weights.make_empty(config).named_parameters()}
    (tmp_path / "large").mkdir()
    (tmp_path / "large/config.json").write_text(json.dumps(to_hf(config, "bfloat16")))
    parts = [list(shapes)] if form == "single" else [list(shapes)[k::5] for k in range(5)]
    index = {}
    for number, names in enumerate(parts, 1):
        file = "model.safetensors" if form == "single" else f"model-{number}.safetensors"
        tensors = {name: torch.full(shapes[name], 0.01, dtype=torch.bfloat16) for name in names}
        save_file(tensors, tmp_path / "large" / file)
        index |= dict.fromkeys(names, file)
    if form == "shards":
        (tmp_path / "large/model.safetensors.index.json").write_text(
            json.dumps({"weight_map": index}))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large"],
        capture_output=True, text=True, timeout=300, cwd=Path(weights.__file__).parents[2])
    assert run.returncode == 0, run.stderr
    _, ratio, held = run.stdout.split()
    assert int(held) > 200e6 and 0.9 < float(ratio) < 1.15, run.stdout
