"""What is exported talks and stops elsewhere as it was trained to, with its template."""

import json
import os
import random
import shutil

import pytest
import torch

import train
from extras import formats
from extras.formats.export import export_model
from extras.formats.templates import TEMPLATES
from methods.folders import saved_settings
from model import Llama
from tools import merge

transformers = pytest.importorskip("transformers")
OWN = {"turn": "{opening}Q: {user}\nA:", "opening": "{system}\n", "separator": " ",
       "between": "\n", "end": "</s>"}


@pytest.fixture
def small(folders, make_config):
    """small(kind): a random model of few numbers with that tokenizer, and the tokenizer."""
    def make(kind):
        tokenizer = formats.open_tokenizer(folders[kind])
        torch.manual_seed(3)
        model = Llama(make_config(vocab_size=len(tokenizer)))
        model.config.bos_id, model.config.eos_ids = tokenizer.bos_id, [tokenizer.eos_id]
        return model, tokenizer
    return make


def random_words(rng):
    return " ".join(rng.choice(["red", "lamp?", "Ünï", "42", "a\nb"]) for _ in range(4)) + "."


@pytest.mark.parametrize("name, kind", [
    *((name, "smollm") for name in TEMPLATES), *((name, "prepend") for name in ("llama2", "raw")),
    *((name, "metaspace") for name in TEMPLATES if name != "chatml")])  # it has no such tokens
def test_transformers_reads_the_template_of_an_export(name, kind, small, folders, tmp_path):
    """Text, ids and stops, for conversations with and without a system message."""
    model, tokenizer = small(kind)
    export_model(model, tokenizer, name, folders[kind], tmp_path)
    theirs, rng = transformers.AutoTokenizer.from_pretrained(tmp_path), random.Random(name + kind)
    ours, template = formats.open_tokenizer(tmp_path), TEMPLATES[name]
    for turns in range(12):
        messages = [{"role": "system", "content": random_words(rng)}] * (turns % 2)
        for _ in range(turns // 4):
            messages += [{"role": "user", "content": random_words(rng)},
                         {"role": "assistant", "content": random_words(rng)}]
        messages.append({"role": "user", "content": random_words(rng)})
        prompt = template.render_conversation(messages)
        ids = ours.encode_prompt(prompt)
        assert theirs.apply_chat_template(messages, add_generation_prompt=True) == ids
        text = prompt.replace("</s>", theirs.eos_token).replace("<s>", theirs.bos_token)
        begin = "<s> " if kind == "metaspace" else "<s>" * ours.add_bos
        assert theirs.apply_chat_template(messages, tokenize=False) == begin + text
    assert formats.read_config(tmp_path).prompt_template == name
    stop = ours.stop_ids([prompt])
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    given = there.generation_config.eos_token_id
    assert set(stop) <= set(given if isinstance(given, list) else [given])


def test_generation_elsewhere_stops_at_the_templates_end(small, folders, tmp_path):
    """A model that says its end first says nothing else."""
    model, tokenizer = small("llama3")
    end = tokenizer.special["<|end_of_text|>"]
    with torch.no_grad():  # whatever is asked, the most probable token is `end`
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.abs_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = 1
    file = tmp_path / "own.json"
    file.write_text(json.dumps(OWN | {"end": "<|end_of_text|>"}))
    export_model(model, tokenizer, str(file), folders["llama3"], tmp_path / "out")
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt",
                                     add_generation_prompt=True)
    assert there.generate(ids, do_sample=False, max_new_tokens=9)[0].tolist() == [
        *ids[0].tolist(), end]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eos_token_id"] == [tokenizer.eos_id, end]
    assert config["prompt_template"] == "own.json"


def test_the_checkpoints_own_template_and_generation_config_are_kept(small, folders, tmp_path):
    model, tokenizer = small("smollm")
    source = tmp_path / "source"
    shutil.copytree(folders["smollm"], source)
    (source / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    (source / "generation_config.json").write_text('{"temperature": 0.2, "eos_token_id": [0]}')
    tokenizer = formats.open_tokenizer(source)
    export_model(model, tokenizer, "chat", source, tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_bytes() == (
        source / "chat_template.jinja").read_bytes()
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {
        "temperature": 0.2, "eos_token_id": [tokenizer.eos_id, 0], "bos_token_id": 1}
    assert formats.read_config(tmp_path / "out").prompt_template == "chat"
    export_model(model, tokenizer, "vicuna", source, tmp_path / "other")  # its own gives way
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "other")
    assert "USER: " in theirs.apply_chat_template([{"role": "user", "content": "Hi"}],
                                                  tokenize=False)


# ----- Whole commands -----
@pytest.fixture
def tuned(world, tmp_path, monkeypatch):
    """tuned(*flags): a short run with a template file, given by a relative path; its folder."""
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        argv = ["--stage", "sft", "--model", str(world / "model"), "--tasks", str(world / "tasks"),
                "--paraphrases", str(world / "paraphrases.json"), "--out", "run", "--steps", "2",
                "--per-task", "4", "--batch-size", "2", "--judge-share", "0", "--no-evaluate",
                "--template", "own.json", *flags]
        assert train.main(argv) == 0
        return tmp_path / "run"
    return run


def test_a_template_file_travels_with_a_run_and_a_merge(tuned, world, tmp_path, monkeypatch):
    run = tuned()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.remove(tmp_path / "own.json")
    monkeypatch.chdir(elsewhere)
    template = formats.find_template(saved_settings(run)["template"], run, world / "model")
    assert template.render("Hi") == "Q: Hi\nA:"
    assert merge.main(["--model", str(world / "model"), "--adapter", str(run), "--out", "out"]) == 0
    config = formats.read_config(elsewhere / "out")
    assert config.prompt_template == "own.json"
    assert formats.find_template("own.json", elsewhere / "out") == template
    theirs = transformers.AutoTokenizer.from_pretrained(elsewhere / "out")
    assert theirs.apply_chat_template([{"role": "user", "content": "Hi"}],
                                      tokenize=False) == "<s>Q: Hi\nA:"


def test_a_template_file_travels_with_a_model_that_was_trained_whole(tuned, tmp_path):
    model = tuned("--full") / "model"
    os.remove(tmp_path / "own.json")
    assert formats.read_config(model).prompt_template == "own.json"
    assert formats.find_template("own.json", model).render("Hi") == "Q: Hi\nA:"
