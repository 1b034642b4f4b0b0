"""What a person types beside training and evaluating: chat, merge, instructions, dry runs, instruction data, summaries."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import train
from data import Tokenizer
from lora import LoraConfig, apply_lora, load_adapter, lora_modules, merge_lora, save_adapter
from model import PRESETS, Packed, load_model, read_config, save_model

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo/base"
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)      # what --device auto takes is compared with the CPU's


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that changes what the demo base says."""
    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = apply_lora(load_model(DEMO), LoraConfig(rank=4))
    for module in lora_modules(model).values():
        module.lora_B.data.normal_(0, 0.05)
    save_adapter(model, path, str(DEMO))
    return path


# Merged folders ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["", "float32"])
def test_a_merged_folder_is_read_by_transformers_with_its_tokenizer(dtype, adapter, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    evaluation.main(["--model", str(DEMO), "--adapter", str(adapter), "--merge", str(tmp_path / "m"), *(["--dtype", dtype] if dtype else [])])
    said = capsys.readouterr().out
    assert re.search(r"differ from the unmerged ones by at most \d\.\de[+-]\d\d", said)
    stored = load_file(tmp_path / "m/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32 if dtype else torch.bfloat16}
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "m", use_fast=False), Tokenizer(DEMO)
    text = "anna bought a red lamp in paris ."
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode_prompt(text) and theirs.eos_token_id == ours.eos_id
    wanted = merge_lora(load_adapter(load_model(DEMO, dtype=torch.float32 if dtype else None), adapter)).float()
    assert (twin(torch.tensor([ids])).logits - wanted(torch.tensor([ids]))).abs().max() < 2e-5
    assert (load_model(DEMO)(torch.tensor([ids])) - wanted(torch.tensor([ids]))).abs().max() > 0.1
    twin.save_pretrained(tmp_path / "back")                 # and the way back, bitwise
    again = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in stored.items())


@pytest.mark.parametrize("adapter_type", [torch.float32, torch.float16, torch.bfloat16])
def test_merging_keeps_each_tensors_type_and_rounds_once(adapter_type, adapter, tmp_path, capsys):
    """A base of mixed types, an adapter of yet another: W + s B A in float32, then the type that the base's tensor has."""
    base, source, folder = load_model(DEMO), tmp_path / "base", tmp_path / "adapter"
    kinds = {"norm": torch.float32, "embed": torch.float32, "q_proj": torch.float16, "down_proj": torch.float32}
    save_model(base, source)
    before = {name: weight.to(next((kind for part, kind in kinds.items() if part in name), torch.bfloat16)) for name, weight in load_file(source / "model.safetensors").items()}
    save_file(before, source / "model.safetensors", {"format": "pt"})
    shutil.copy(DEMO / "tokenizer.model", source)
    shutil.copytree(adapter, folder)
    update = {name: tensor.to(adapter_type) for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(update, folder / "adapter_model.safetensors")
    evaluation.main(["--model", str(source), "--adapter", str(folder), "--merge", str(tmp_path / "out"), "--template", "plain"])
    assert "logits differ from the unmerged ones by at most" in capsys.readouterr().out
    found = load_file(tmp_path / "out/model.safetensors")
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: tensor.dtype for name, tensor in found.items()}
    for name, tensor in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if key + "A.weight" in update:
            a, b = (update[f"{key}{side}.weight"].float() for side in "AB")
            assert torch.equal(found[name], torch.addmm(tensor.float(), b, a, alpha=raw["lora_alpha"] / raw["r"]).to(tensor.dtype)), name
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("gpus, device, dtype, wanted", [
    (0, "auto", "auto", ("cpu", torch.float32)), (0, "auto", "bfloat16", ("cpu", torch.bfloat16)), (2, "auto", "auto", ("cuda", torch.bfloat16)),
    (2, "cuda:1", "auto", ("cuda:1", torch.bfloat16)), (2, "cpu", "auto", ("cpu", torch.float32)), (2, "cuda:2", "auto", None), (0, "cuda", "auto", None), (0, "foo", "auto", None)])
def test_device_and_type_mean_the_same_in_both_programs(gpus, device, dtype, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for config in (evaluation.EvalConfig, train.TrainConfig):
        given = {item.name: item for item in dataclasses.fields(config) if item.name in ("device", "dtype")}
        assert [given[name].default for name in given] == ["auto", "auto"]
        if wanted:
            assert evaluation.pick_device(config(device=device, dtype=dtype)) == wanted
    texts = [{item.name: item.metadata["help"] for item in dataclasses.fields(config)} for config in (evaluation.EvalConfig, train.TrainConfig)]
    assert [texts[0][name] == texts[1][name] for name in ("device", "dtype")] == [True, True]
    if not wanted:
        with pytest.raises(SystemExit) as stop:
            evaluation.main(["--device", device, "--chat"])
        assert stop.value.code == 2 == train.main(["--stage", "sft", "--device", device, "--out", str(tmp_path)])
        error = capsys.readouterr().err
        assert error.count(f"error: --device {device} is not on this machine, which has {gpus} GPUs") == error.count("\n") == 2


@pytest.mark.parametrize("flags, computes", [
    ([], torch.float32), (["--full"], torch.float32), (["--full", "--dtype", "float32"], torch.float32), (["--full", "--dtype", "bfloat16"], torch.bfloat16)])
def test_full_tuning_computes_in_the_type_that_dtype_means(flags, computes):
    with train.precision(train.parse_config(["--stage", "sft", *flags]), "cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == computes


def test_every_tokenizer_file_is_carried_over_and_meta_is_written(tmp_path, capsys):
    source = tmp_path / "source"
    save_model(load_model(DEMO, dtype=None), source)
    for name in (*data.TOKENIZER_FILES, "generation_config.json"):
        (source / name).write_text("{}")
    (source / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    evaluation.main(["--model", str(source), "--merge", str(tmp_path / "out"), "--template", "vicuna"])
    for name in (*data.TOKENIZER_FILES, "generation_config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    assert read_config(tmp_path / "out").prompt_template == "vicuna"
    evaluation.main(["--model", str(source), "--merge", str(tmp_path / "meta"), "--layout", "meta"])
    back = load_model(tmp_path / "meta", dtype=None)
    wanted = dict(load_model(source, dtype=None).named_parameters())
    assert all(torch.equal(weight, wanted.get(name, wanted["model.embed_tokens.weight"])) for name, weight in back.named_parameters())
    assert Tokenizer(tmp_path / "meta").encode_prompt("red")


@pytest.mark.parametrize("line, said", [
    (["--merge", "x", "--adapter", "a", "b"], "--merge takes one --adapter at most"),
    (["--merge", "x", "--quantize", "int8"], "--merge takes one --adapter at most and a model in full precision"),
    (["--merge", str(DEMO), "--model", str(DEMO)], "is the folder of the model itself"),
    (["--chat", "--temperature", "-1"], "--temperature -1.0 is below 0"),
    (["--chat", "--template", "chatml"], "template chatml ends responses with '<|im_end|>', which is no token of"),
    (["--chat", "--template", "nobody"], "unknown template 'nobody'"),
    (["--instructions", "gone.json"], "--instructions gone.json does not exist"),
])
def test_mistakes_are_one_sentence(line, said, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.main(line)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


# Talking -------------------------------------------------------------------------------------------------------------


def talk(monkeypatch, capsys, lines, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    evaluation.main(["--chat", "--max-new-tokens", "8", "--temperature", "0", *flags])
    return capsys.readouterr().out


def answers(said):
    return [re.sub(r"^(> )+", "", text) for text in re.findall(r"((?:> )+.*)\n\(\d+ tokens", said)]


def test_chat_says_what_complete_says_with_the_adapter_on_and_off(adapter, monkeypatch, capsys):
    line = "anna bought a red lamp . name the colour ."
    said = talk(monkeypatch, capsys, [line, "/adapter off", "/reset", line, "/adapter on", "/reset", line, "", "/nonsense", "/quit", line], "--adapter", str(adapter))
    tokenizer, prompt = Tokenizer(DEMO), data.TEMPLATES["plain"].render(line)
    base, adapted = load_model(DEMO), load_adapter(load_model(DEMO), adapter)
    wanted = [evaluation.complete(model, tokenizer, [prompt], max_new_tokens=8)[0].text for model in (adapted, base, adapted)]
    assert answers(said) == wanted and wanted[0] != wanted[1]
    assert "/adapter on|off" in said and "template plain" in said


def test_chat_remembers_and_forgets(monkeypatch, capsys):
    said = talk(monkeypatch, capsys, ["/system be brief", "anna has a lamp .", "who ?", "/reset", "who ?", "word " * 900, "word " * 900])
    tokenizer, model, plain = Tokenizer(DEMO), load_model(DEMO), data.TEMPLATES["plain"]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "anna has a lamp ."}]
    first = evaluation.complete(model, tokenizer, [plain.render_conversation(messages)], max_new_tokens=8)[0].text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "who ?"}]
    second = evaluation.complete(model, tokenizer, [plain.render_conversation(messages)], max_new_tokens=8)[0].text
    found = answers(said)
    assert found[:2] == [first, second] and found[2] == evaluation.complete(model, tokenizer, [plain.render("who ?")], max_new_tokens=8)[0].text
    assert "the oldest turn is forgotten" in said and len(re.findall(r"\(\d+ tokens", said)) == 5


def test_chat_writes_nothing_and_lays_weights_out_once(tmp_path, monkeypatch, capsys):
    import model as language_model

    (tmp_path / "file").write_text("mine")
    laid, prepacked = [], language_model.prepacked
    monkeypatch.setattr(language_model, "prepacked", lambda model, rows: laid.append((rows, model.lm_head.layout is None)) or prepacked(model, rows))
    assert len(answers(talk(monkeypatch, capsys, ["who ?", "who ?"], "--out", str(tmp_path / "file"), "--dtype", "bfloat16"))) == 2
    assert [rows for rows, _ in laid] == [1, 1, 1] and laid[0][1]


def test_chat_goes_on_after_an_interrupt_and_after_a_line_that_is_no_text(monkeypatch, capsys):
    import model as language_model
    line, calls, generate = "name the colour .", [], language_model.generate

    def interrupted(*given, **more):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return generate(*given, **more)
    monkeypatch.setattr(language_model, "generate", interrupted)
    said = talk(monkeypatch, capsys, [line, "half \ud800", line])
    assert "(stopped)" in said and "lone surrogate" in said and len(calls) == 2


def test_an_adapter_is_asked_in_the_template_it_was_trained_with(adapter, tmp_path, monkeypatch, capsys):
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    (own / "config.json").write_text(json.dumps({"template": "vicuna"}))
    assert "template vicuna" in talk(monkeypatch, capsys, [], "--adapter", str(own))
    assert "template plain" in talk(monkeypatch, capsys, [], "--adapter", str(own), "--template", "plain")
    config = evaluation.EvalConfig(model=str(DEMO), adapter=[str(own)])
    assert [model.config.prompt_template for _, model, _ in evaluation.load_models(config)] == ["plain", "vicuna"]
    (own / "config.json").write_text("[]")                  # another program's
    assert evaluation.adapter_template(own) == "" == evaluation.adapter_template(tmp_path)


def test_chat_on_a_quantised_model(adapter, monkeypatch, capsys):
    assert len(answers(talk(monkeypatch, capsys, ["name the colour ."], "--adapter", str(adapter), "--quantize", "nf4"))) == 1


# Outputs for alpaca_eval ---------------------------------------------------------------------------------------------


def test_outputs_in_alpaca_evals_form(adapter, tmp_path, monkeypatch, capsys):
    rows = [{"instruction": "name the colour .", "input": "anna has a red hat .", "dataset": "own"}, {"instruction": "say blue ."}]
    (tmp_path / "i.json").write_text(json.dumps(rows))
    evaluation.main(["--instructions", str(tmp_path / "i.json"), "--adapter", str(adapter), "--max-new-tokens", "6", "--out", str(tmp_path / "out")])
    files = sorted((tmp_path / "out").glob("*-outputs.json"))
    assert len(files) == 2 and "2 answers" in capsys.readouterr().out
    for file in files:
        found = json.loads(file.read_text())
        assert [list(row) for row in found] == [["instruction", "output", "generator", "dataset"], ["instruction", "output", "generator"]]
        assert found[0]["instruction"] == "name the colour .\nanna has a red hat ." and found[1]["instruction"] == "say blue ."
        assert all(isinstance(row["output"], str) and row["generator"] == file.name.removesuffix("-outputs.json") for row in found)
    (tmp_path / "i.json").write_text('[{"instruction": "x", "input": ["y"]}]')
    with pytest.raises(SystemExit):
        evaluation.main(["--instructions", str(tmp_path / "i.json"), "--out", str(tmp_path)])
    assert 'record 0: input is ["y"]. Expected a text' in capsys.readouterr().err
    (tmp_path / "i.json").write_text('[{"instruction": "say {input} .", "input": "red"}]')
    asked = []
    monkeypatch.setattr(evaluation, "complete", lambda model, tokenizer, prompts, **how: asked.extend(prompts) or [evaluation.Completion("", [], True)])
    evaluation.main(["--instructions", str(tmp_path / "i.json"), "--out", str(tmp_path / "out")])
    assert "say {input} ." in asked[0] and "red" in asked[0]
    (tmp_path / "i.json").write_text('[{"prompt": "x"}]')
    with pytest.raises(SystemExit):
        evaluation.main(["--instructions", str(tmp_path / "i.json"), "--out", str(tmp_path)])
    assert "record 0, has no text under instruction" in capsys.readouterr().err


# Training on outside data, and what a run takes ----------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "file/below", "link to nowhere/below", "closed", "closed/below"])
def test_places_that_cannot_be_written_to(place, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link to nowhere").symlink_to("/proc/none")
    (tmp_path / "closed").mkdir()
    if "closed" in place:                                   # by a mode it would be open to root
        monkeypatch.setattr("os.access", lambda place, mode: Path(place) != tmp_path / "closed")
    out = str(tmp_path / place)
    for program, flags in ((train, ["--out", out]), (train, ["--stage", "pretrain", "--corpus", str(DEMO / "config.json"), "--tokenizer", str(DEMO / "tokenizer.model"), "--export", out]),
                           (evaluation, ["--out", out]), (evaluation, ["--merge", out]), (evaluation, ["--show-mask", str(DEMO / "config.json"), "--out", out])):
        with pytest.raises(SystemExit) as stop:
            program.main(flags)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith(f"error: nothing can be written to {out}: ") and said.count("\n") == 1
    assert train.main(["--stage", "sft", "--dry-run", "--out", out]) == 0                # writes nothing
    assert (tmp_path / "file").read_text() == "mine"


def test_sft_on_alpaca_and_sharegpt_rows(tmp_path, capsys):
    rows = [{"instruction": f"say {word} .", "output": word} for word in "red blue green".split()] + [{"instruction": "x", "output": ""}]
    rows += [{"conversations": [{"from": "human", "value": "name a colour ."}, {"from": "gpt", "value": "red"}, {"from": "human", "value": "another ."},
                                {"from": "gpt", "value": "blue"}]}, {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y " * 900}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    code = train.main(["--stage", "sft", "--examples", str(tmp_path / "rows.json"), "--steps", "2", "--batch-size", "3", "--out", str(tmp_path / "run"),
                       "--quantize", "int8", "--checkpointing"])
    said = capsys.readouterr().out
    assert code == 0 and "4 examples; left out 1 with an empty instruction or output; left out 1 whose first answer is longer" in said
    assert re.search(r"sft: [\d,]+ tokens in .* tok/s; peak memory \d\.\d\d GB \(process\)", said) and "done in" in said
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["tokens_per_second"] > 0 and summary["peak_memory_bytes"]["process"] > 10**8 and summary["seconds"] > 0
    tensors = load_file(tmp_path / "run/adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    assert json.loads((tmp_path / "run/config.json").read_text())["quantize"] == "int8"


@pytest.mark.parametrize("line, said", [
    (["--stage", "sft", "--quantize", "int8", "--full"], "--quantize int8 keeps the base frozen under adapters"),
    (["--stage", "cat", "--examples", "x"], '--examples means nothing to stage "cat", only to sft'),
    (["--stage", "sft", "--examples", "gone"], "--examples gone does not exist"),
    (["--stage", "sft", "--quantize", "int4"], "invalid choice: 'int4'"),
    (["--stage", "pretrain", "--preset", "foo"], "invalid choice: 'foo' (choose from " + ", ".join(map(repr, train.PRESETS)) + ")"),
])
def test_mistakes_in_training_flags(line, said, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_config(line)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_sequences_longer_than_the_model_takes_are_refused(capsys):
    assert train.main(["--stage", "sft", "--max-len", "5000"]) == 2
    assert "--max-len is 5000, but" in capsys.readouterr().err


def test_dry_run_needs_no_weights(tmp_path, capsys):
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    assert train.main(["--stage", "cat", "--model", str(tmp_path / "config.json"), "--dry-run", "--tasks", str(ROOT / "demo/tasks"), "--out", str(tmp_path / "x")]) == 0
    said = capsys.readouterr().out
    assert f"{sum(p.numel() for p in load_model(DEMO).parameters()):,}" in said and not (tmp_path / "x").exists()
    assert re.search(r"steps +100 ", said) and "of 34 tasks" in said
    assert train.main(["--stage", "sft", "--model", "llama2-7b", "--dtype", "bfloat16", "--dry-run"]) == 0
    assert "6,738,415,616" in capsys.readouterr().out
    assert train.main(["--stage", "sft", "--model", "llama9", "--dry-run"]) == 2
    assert "is no folder, no config.json and no preset. Presets: tiny, demo" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--quantize", "nf4"], ["--dtype", "bfloat16"], ["--full"], ["--checkpointing"], ["--adapt", "gate_proj", "up_proj"]])
def test_estimates_are_what_a_model_takes(more):
    """Parameters and weights to the byte; activations against what a real forward pass keeps."""
    cfg = train.parse_config(["--stage", "sft", "--dry-run", "--micro-tokens", "600", *more])
    rows = {name: number for name, number, _ in train.estimate(cfg)}
    model = train.trainable(cfg, None)
    assert rows["trained parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = {id(x): x for x in (*model.parameters(), *model.buffers())}
    held = sum(x.nbytes for x in frozen.values()) - (0 if cfg.full else 4 * rows["trained parameters"])
    assert rows["weights"] == held
    weights, kept = {x.untyped_storage().data_ptr() for x in frozen.values()}, {}

    def count(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        hidden = model.hidden(torch.arange(600) % 1000, Packed([60] * 10))
    real = sum(number for number, _ in kept.values())
    if cfg.checkpointing:                                   # while a block is computed again, what it keeps is there, too
        plain = {name: number for name, number, _ in train.estimate(dataclasses.replace(cfg, checkpointing=False))}
        real += plain["activations"] / model.config.n_layers
    assert hidden.requires_grad and 0.75 < rows["activations"] / real < 1.3, (rows["activations"], real)


@pytest.mark.parametrize("flags, kept", [([], False), (["--full"], True), (["--adapt", "q_proj", "lm_head"], True)])
def test_estimates_know_that_a_frozen_heads_logits_come_in_pieces(flags, kept):
    config, found = PRESETS["tinyllama"], []
    for micro in ("2000", "5000"):
        cfg = train.parse_config(["--stage", "sft", "--model", "tinyllama", "--dry-run", "--micro-tokens", micro, *flags])
        found.append(next(number for name, number, _ in train.estimate(cfg) if name == "logits"))
    token = (found[1] - found[0]) / 3000                    # bytes that one more token takes
    assert token >= 4 * config.vocab_size if kept else token == 4 * config.dim and found[0] > 200 * 4 * config.vocab_size


@pytest.mark.parametrize("flags, documents", [
    (["cat"], 4), (["cat", "--condition", "worse", "--max-worse", "5"], 10), (["dpo", "--max-worse", "2"], 3), (["slic", "--ce-target", "gold"], 5),
    (["pro"], 4), (["rrhf", "--max-worse", "7"], 8), (["reward"], 4), (["rso"], 8), (["rlaif"], 2), (["expert"], 1), (["cut"], 2), (["cut", "--no-use-l1"], 1),
    (["forward"], 2), (["sft"], 1)])
def test_estimates_count_the_documents_of_a_group(flags, documents):
    cfg = train.parse_config(["--stage", *flags, "--dry-run", "--micro-tokens", "600", "--max-len", "300", "--steps", "7", "--batch-size", "5"])
    rows = {name: number for name, number, _ in train.estimate(cfg)}
    whole = {name: number for name, number, _ in train.estimate(dataclasses.replace(cfg, micro_tokens=max(600, 300 * documents)))}
    assert rows["tokens, at most"] == 7 * 5 * 300 * documents and rows["operations, at most"] == 4 * rows["parameters"] * rows["tokens, at most"]
    assert rows["activations"] == whole["activations"] and rows["logits"] == whole["logits"]             # a group is never torn
    if cfg.stage != "sft":
        assert rows["... of SFT on the way"] == 4 * rows["parameters"] * cfg.sft_steps * 24 * 300


def test_under_torchrun_a_finished_process_ends_at_once():
    """A thread of gloo that outlives its group can abort a process on its way out; here that way always aborts."""
    code = ("import atexit, os, runpy, sys; atexit.register(os.abort); sys.argv = ['train.py', '--stage', 'sft', '--model', 'tiny', '--dry-run']; "
            "runpy.run_path('train.py', run_name='__main__')")
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    ends = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=alone | more, capture_output=True, text=True, timeout=300)
            for more in ({}, {"RANK": "0", "WORLD_SIZE": "1"})]
    assert [end.returncode for end in ends] == [-signal.SIGABRT, 0]
    assert ends[1].stdout.rstrip() == ends[0].stdout.rstrip() != ""      # and what was printed is all there


@pytest.mark.parametrize("program, config", [("train.py", train.TrainConfig), ("eval.py", evaluation.EvalConfig)])
def test_help_names_every_flag(program, config):
    run = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0
    for item in dataclasses.fields(config):
        assert f"--{item.name.replace('_', '-')}" in run.stdout
