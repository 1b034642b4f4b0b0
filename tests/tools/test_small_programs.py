"""Each program of tools/ from its command line: what it writes, says and refuses."""

import importlib
import io
import json
import re

import pytest
import torch

import data
from eval import complete
from extras import formats
from extras.reports.plots import printable
from model import Sampling

NAMES = ("best_of", "chat", "estimate", "masks", "merge", "meta_evaluate", "outputs", "paraphrase",
         "write")


def run(name, *argv):
    return importlib.import_module(f"tools.{name}").main([str(word) for word in argv])


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_one_screen(name, capsys):
    try:
        assert run(name, "--help") == 0
    except SystemExit as stop:
        assert stop.code == 0
    said = capsys.readouterr().out
    assert f"python -m tools.{name}" in said and said.count("\n") < 40


@pytest.mark.parametrize("line, said", [
    (["outputs"], "required: --instructions"),
    (["outputs", "--instructions", "gone.json"], "gone.json"),
    (["masks", "--records", "gone.jsonl"], "gone.jsonl"),
    (["merge", "--model", "WORLD", "--out", "WORLD"], "another folder than the model's"),
    (["merge", "--adapter", "ADAPTER", "ADAPTER"], "one adapter at most"),
    (["merge", "--model", "WORLD", "--plain"], "--plain has no part in a merge"),
    (["merge", "--adapter", "a", "b"], "no adapter at a"),
    (["meta_evaluate", "--data", "gone"], "gone"),
    (["meta_evaluate", "--data", "x", "--judge", "people"], "invalid choice"),
    (["best_of", "--samples", "many"], "invalid int value"),
    (["best_of", "--server", "x"], "--server is for eval.py alone. Leave it out."),
    (["chat", "--responses=x"], "--responses is for eval.py alone. Leave it out."),
    (["paraphrase", "--number", "1"], "--judge-model"),
    (["chat", "--template", "nobody"], "unknown template 'nobody'"),
])
def test_mistakes_are_one_sentence(line, said, world, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["--model", world / "model"]
    if "--model" in line or line[0] in ("meta_evaluate", "paraphrase"):  # ask no model here
        model = []
    places = {"WORLD": world / "model", "ADAPTER": adapter}
    line = [places.get(word, word) for word in line]
    with pytest.raises(SystemExit) as stop:
        run(*line, *model)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error
    assert error.startswith("error: ") and error.count("\n") == 1


# ----- merge -----

@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_merging_keeps_the_stored_types_and_rounds_once(kind, world, adapter, tmp_path, capsys):
    base = tmp_path / "base"
    formats.save_model(formats.open_model(world / "model"), base, dtype=kind)
    (base / "tokenizer.model").write_bytes((world / "model/tokenizer.model").read_bytes())
    (tmp_path / "run").mkdir()
    for file in adapter.iterdir():
        (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "run/config.json").write_text('{"template": "vicuna"}')
    assert run("merge", "--model", base, "--adapter", tmp_path / "run", "--out",
               tmp_path / "out") == 0
    assert "model.safetensors, tokenizer.model" in capsys.readouterr().out
    found = formats.open_model(tmp_path / "out", dtype=None)
    assert found.config.prompt_template == "vicuna"  # what the adapter was trained with
    before = dict(formats.open_model(base, dtype=None).named_parameters())
    adapted = formats.open_adapter(formats.open_model(base, dtype=None), tmp_path / "run")
    changed = 0
    for name, weight in found.named_parameters():
        wanted = before[name]
        part = adapted.get_submodule(name.rpartition(".")[0])
        if hasattr(part, "lora_A"):
            scale = part.config.alpha / part.config.rank
            wanted = (wanted.float() + scale * part.lora_B @ part.lora_A).to(kind)
            changed += 1
        assert weight.dtype == kind and torch.allclose(weight, wanted, atol=1e-6, rtol=1e-2), name
    assert changed == 14


# ----- chat -----

def talk(monkeypatch, capsys, world, lines, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert run("chat", "--model", world / "model", "--max-new-tokens", 8, "--temperature", 0,
               *flags) == 0
    said = capsys.readouterr().out
    answers = re.findall(r"((?:> )+.*)\n\(\d+ tokens", said)
    return said, [re.sub("^(> )+", "", text) for text in answers]


def answer(model, tokenizer, prompt):
    return complete(model, tokenizer, [prompt], Sampling(8))[0].text


def as_shown(texts):
    """Control characters as escapes, and no half of a character at the end."""
    return [printable(text).rstrip("\ufffd") for text in texts]


def test_chat_answers_with_the_adapter_on_and_off(world, adapter, tokenizer, monkeypatch, capsys,
                                                  tmp_path):
    monkeypatch.chdir(tmp_path)
    line = "tom has a red hat"
    said, found = talk(monkeypatch, capsys, world, [
        line, "/adapter off", "/reset", line, "/adapter on", "/reset", line, "", "/nonsense",
        "/quit", line], "--adapter", adapter)
    prompt = data.TEMPLATES["plain"].render(line)
    base = formats.open_model(world / "model")
    adapted = formats.open_adapter(formats.open_model(world / "model"), adapter)
    wanted = [answer(model, tokenizer, prompt) for model in (adapted, base, adapted)]
    assert found == as_shown(wanted) and wanted[0] != wanted[1]
    assert "/adapter on|off" in said


def test_chat_remembers_and_forgets(world, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    tokenizer = formats.open_tokenizer(world / "model")
    said, found = talk(monkeypatch, capsys, world, [
        "/system be brief", "tom has a lamp .", "who ?", "/reset", "who ?", "word " * 1100,
        "word " * 1100], "--max-len", 4096)
    model, plain = formats.open_model(world / "model"), formats.find_template("plain")
    messages = [{"role": "system", "content": "be brief"},
                {"role": "user", "content": "tom has a lamp ."}]
    first = answer(model, tokenizer, plain.render_conversation(messages))
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "who ?"}]
    second = answer(model, tokenizer, plain.render_conversation(messages))
    alone = answer(model, tokenizer, data.TEMPLATES["plain"].render("who ?"))
    assert found[:3] == as_shown([first, second, alone])
    assert "the oldest turn is forgotten" in said


def test_chat_goes_on_after_an_interrupt_and_after_a_line_that_is_no_text(
        world, monkeypatch, capsys, tmp_path):
    import model as model_file

    monkeypatch.chdir(tmp_path)
    calls, generate = [], model_file.generate

    def interrupted(*given, **more):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return generate(*given, **more)
    monkeypatch.setattr(model_file, "generate", interrupted)
    said, _ = talk(monkeypatch, capsys, world, ["a hat", "half \ud800", "a hat"])
    assert "(stopped)" in said and "lone surrogate" in said and len(calls) == 2


# ----- outputs -----

def test_outputs_in_alpaca_evals_form(world, adapter, tmp_path, capsys):
    rows = [{"instruction": "give the {input} .", "input": "anna has a red hat", "dataset": "own"},
            {"instruction": "say blue ."}]
    (tmp_path / "i.json").write_text(json.dumps(rows))
    assert run("outputs", "--model", world / "model", "--instructions", tmp_path / "i.json",
               "--adapter", adapter, "--max-new-tokens", 6, "--out", tmp_path / "out") == 0
    files = sorted((tmp_path / "out").glob("*-outputs.json"))
    assert len(files) == 2 and "2 answers" in capsys.readouterr().out
    for file in files:
        found = json.loads(file.read_text())
        names = ["instruction", "output", "generator"]
        assert [list(row) for row in found] == [[*names, "dataset"], names]
        assert found[0]["instruction"] == "give the {input} .\nanna has a red hat"  # just text
        assert all(row["generator"] == file.name.removesuffix("-outputs.json") for row in found)


# ----- masks -----

def test_flagged_tokens_are_shown_in_brackets(world, judged, tmp_path, capsys):
    assert run("masks", "--model", world / "model", "--records", judged, "--detect-lam", 0.9,
               "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert said.count("  response: ") == 6 and "\\[" in said
    assert "| lambda | precision | recall | n |" in said and "| 0.9 |" in said
    assert (tmp_path / "out/report.md").read_text() == said
    good = {"instruction": "a", "input": "", "response": "b", "judgment": None}
    data.append_records(tmp_path / "fine.jsonl", [good])
    with pytest.raises(SystemExit):
        run("masks", "--model", world / "model", "--records", tmp_path / "fine.jsonl", "--out",
            tmp_path / "out")
    assert "no unsatisfying response" in capsys.readouterr().err


def test_marks_by_hand():
    from tools.masks import mark

    texts = [b" name", b" :", b" an", b"na", b" ;", b""]
    assert mark(texts, [False, False, True, True, False, False]) == "name : [anna] ;"
    assert mark(texts, [False] * 5 + [True]) == "name : anna ;[</s>]"
    assert mark(texts, [True] * 6) == "[name : anna ;</s>]" and mark([], []) == ""
    assert mark([b" a", b"\n", b"b", b"\xc3", b"\xa9"], [False] * 2 + [True] * 3) == "a\n[bé]"


@pytest.mark.parametrize("program, flag, words", [
    ("best_of", "--samples", []), ("paraphrase", "--number", []),
    ("meta_evaluate", "--repeats", ["--data", "x"])])
def test_numbers_below_one_are_refused(program, flag, words, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"tools.{program}").main([flag, "0", *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {flag} is 0. Expected 1 or more.\n"
