"""train.py: every stage for a few steps through main(), what it leaves behind, what it answers to mistakes, the house."""

import ast
import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

import data
import eval as evaluation
import losses
import lora
import train
from model import PRESETS, Llama, load_model, save_model

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
COLOURS = "red blue green black white".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny random model with a tokenizer, two tasks over the same inputs, and wordings, as files."""
    path, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    inputs = [f"{rng.choice('anna tom mary paul'.split())} has a {rng.choice(COLOURS)} hat {i}" for i in range(60)]
    (path / "tasks").mkdir()
    for name, place in (("colour", 3), ("person", 0)):
        record = {"Definition": [f"give the {name} ."],
                  "Instances": [{"id": f"{name}-{i}", "input": text, "output": [text.split()[place]]} for i, text in enumerate(inputs)]}
        (path / "tasks" / f"{name}.json").write_text(json.dumps(record))
    wordings = {name: {"train": [f"what is the {name} ?", f"{name} :", f"tell the {name}"], "dev": [f"the {name} , please", f"which {name} ?"],
                       "test": [f"name its {name}", f"say the {name}"]} for name in ("colour", "person")}
    (path / "paraphrases.json").write_text(json.dumps(wordings))
    (path / "model").mkdir()
    text = inputs + [w for task in wordings.values() for split in task.values() for w in split]
    text += ["judge each answer . type : expected unexpected correct incorrect instruction input response reference"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 3), model_prefix=str(path / "model/tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2)
    tokenizer = data.Tokenizer(path / "model")
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=len(tokenizer), max_position_embeddings=4096, prompt_template="plain", bos_id=tokenizer.bos_id,
                                 eos_ids=(tokenizer.eos_id,))
    save_model(Llama(config).init_weights(0), path / "model")
    return path


def arguments(world, out, *more):
    """A command line for the tiny world."""
    return ["--model", str(world / "model"), "--tasks", str(world / "tasks"), "--paraphrases", str(world / "paraphrases.json"),
            "--out", str(out), "--max-new-tokens", "4", "--eval-per-task", "3", "--eval-wordings", "2", "--per-task", "8",
            "--judge-share", "0.3", *more]


def cat(world, out, *more):
    """The arguments of a short `cat` run whose judge is the rules."""
    return ["--stage", "cat", *arguments(world, out, "--judge", "rule", "--pool-per-task", "4", "--wordings", "3", "--steps", "3", "--sft-steps", "3", *more)]


def planted(world, path):
    """Scored candidates, as a run folder holds them: each group has a good answer and worse ones."""
    tasks = data.load_tasks(world / "tasks")
    records = [{"task": task.name, "id": x.id, "instruction": task.definition, "wording": wording, "input": x.input,
                "target": x.outputs[0], "sample": 0, "response": response, "finished": True, "reward": reward, "how": "rule",
                "expected": True, "correct": reward == 2, "p_expected": None, "p_correct": None}
               for task in tasks for x in data.split_instances(task, "pool")[:5]
               for wording, response, reward in (("w1", x.outputs[0], 2), ("w2", "hat", 0), ("w3", "tom tom", 1), ("w3", "", 0))]
    data.append_records(path, records)
    return path


# Stages --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "sft-ia"])
def test_tuning_moves_the_adapter_and_nothing_else(world, tmp_path, stage):
    before = {p.name: p.read_bytes() for p in (world / "model").iterdir()}
    assert train.main(["--stage", stage, *arguments(world, tmp_path, "--steps", "3", "--no-evaluate")]) == 0
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * PRESETS["tiny"].n_layers
    assert all(w.abs().sum() > 0 for name, w in weights.items() if "lora_B" in name)         # all of them moved
    assert before == {p.name: p.read_bytes() for p in (world / "model").iterdir()}
    log = data.read_records(tmp_path / "log.jsonl")
    assert [row["step"] for row in log] == [0, 1, 2] and all(row["ce"] > 0 for row in log)


def test_adapt_names_the_linears(world, tmp_path, capsys):
    assert train.main(["--stage", "sft", *arguments(world, tmp_path, "--steps", "2", "--no-evaluate", "--adapt", "gate_proj", "down_proj")]) == 0
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert len(names) == 2 * 2 * PRESETS["tiny"].n_layers and all("gate_proj" in name or "down_proj" in name for name in names)
    assert train.main(["--stage", "sft", *arguments(world, tmp_path / "x", "--steps", "2", "--no-evaluate", "--adapt", "gait_proj")]) == 2
    assert "gait_proj" in capsys.readouterr().err


def test_compile_reaches_the_model_in_both_programs_and_changes_no_number(world, tmp_path, monkeypatch):
    calls, found = [], {}
    monkeypatch.setattr(torch, "compile", lambda function, **how: lambda *arguments: calls.append(1) or function(*arguments))
    for flag in ((), ("--compile",)):
        calls.clear()
        out = tmp_path / f"train{len(flag)}"
        assert train.main(["--stage", "sft", *arguments(world, out, "--steps", "2", *flag)]) == 0
        in_training = len(calls)
        evaluation.main(["--model", str(world / "model"), "--tasks", str(world / "tasks"), "--paraphrases", str(world / "paraphrases.json"),
                         "--per-task", "2", "--max-new-tokens", "4", "--out", str(out / "eval"), *flag])
        assert (in_training > 0, len(calls) > in_training) == (bool(flag), bool(flag))
        found[flag] = [(out / name).read_text() for name in ("metrics.json", "eval/metrics.json")]
    assert found[()] == found["--compile",]


def test_full_tuning_moves_all_weights_and_cat_continues_it(world, tmp_path):
    path = planted(world, tmp_path / "candidates.jsonl")
    assert train.main(cat(world, tmp_path / "run", "--candidates", str(path), "--full", "--no-compare")) == 0
    models = [load_model(folder / "model").state_dict() for folder in (tmp_path / "run/sft-ia", tmp_path / "run")]
    base = load_model(world / "model").state_dict()
    assert all(not torch.equal(base[k], models[0][k]) and not torch.equal(models[0][k], models[1][k]) for k in base)


def test_cat_goes_through_every_phase_and_finds_them_again(world, tmp_path, capsys):
    out = tmp_path / "run"
    path = planted(world, tmp_path / "candidates.jsonl")
    assert train.main(cat(world, out, "--candidates", str(path))) == 0
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("base", "SFT ", "SFT(IA) ", "SFT(IA)+CAT")) and "next: python train.py" in printed
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == ["base", "SFT", "SFT(IA)", "SFT(IA)+CAT"]
    for name in ("cr", "mcr", "rouge1", "rougeL", "exact_match", "consistent_and_correct", "worst_paraphrase"):
        assert set(metrics["base"][name]) == {"mean", "ci95", "n"}
    assert {"config.json", "log.jsonl", "adapter_config.json", "report.md", "judge.json", "sft", "sft-ia", "plots"} <= {
        p.name for p in out.iterdir()}
    adapter = (out / "adapter_model.safetensors").read_bytes()
    assert train.main(cat(world, out, "--candidates", str(path))) == 0
    assert "cat: found in" in capsys.readouterr().out and (out / "adapter_model.safetensors").read_bytes() == adapter
    assert train.main(cat(world, out, "--candidates", str(path), "--lam", "0.5")) == 2
    assert "holds another run: lam was 1.0, now 0.5" in capsys.readouterr().err


def test_collecting_resumes_to_the_very_same_records(world, tmp_path):
    """Per-record seeds: a file cut anywhere, mid-line too, is completed to what an undisturbed run wrote."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments_of = lambda out: cat(world, out, "--eval-batch", "8", "--no-compare", "--no-evaluate")       # noqa: E731
    train.main(arguments_of(whole))                         # a random model: 1 if no group has a good answer
    records = (whole / "candidates.jsonl").read_bytes()
    assert records.count(b"\n") == 2 * 4 * 4 * 2            # tasks, instances, wordings (3 and the original), samples
    shutil.copytree(whole, cut)
    for name in ("adapter_config.json", "log.jsonl"):
        (cut / name).unlink(missing_ok=True)
    (cut / "candidates.jsonl").write_bytes(records[:len(records) * 2 // 5])          # in the middle of a group and a line
    train.main(arguments_of(cut))
    assert (cut / "candidates.jsonl").read_bytes() == records


@pytest.mark.parametrize("condition", ["own", "original", "worse"])
@pytest.mark.parametrize("target", ["best", "gold"])
def test_cat_items_pair_good_with_worse(world, tmp_path, condition, target):
    cfg = train.parse_config(cat(world, tmp_path, "--condition", condition, "--ce-target", target))
    run = train.make_run(cfg)
    best = {"wording": "w1", "instruction": "do", "input": "in", "target": "red", "response": "blue", "reward": 2}
    worse = [{**best, "wording": w, "response": r, "reward": x} for w, r, x in (("w2", "hat", 0), ("w3", "coat", 1), ("w3", "", 0))]
    item = train.cat_item(run, best, worse)
    texts = [run.tokenizer.decode(d["input_ids"]) for d in item["documents"]]
    good = "red" if target == "gold" else "blue"
    assert item["n_best"] == (2 if condition == "worse" else 1) and len(item["pairs"]) == 3
    assert all(text.endswith(good) for text in texts[:item["n_best"]])
    wording = {"own": ["w1", "w1", "w1"], "original": ["do"] * 3, "worse": ["w2", "w3", "w3"]}[condition]
    for (better, lower), expected, row in zip(item["pairs"], wording, worse):
        assert f"Instruction: {expected}" in texts[better] and texts[lower].endswith(f"Response: {row['response']}".strip())


def test_pretrain_makes_a_checkpoint_that_loads(world, tmp_path):
    data.append_records(tmp_path / "corpus.jsonl", [[["anna has a red hat", True]], [["what ?", False], [" red", True], ["</s>", True]]] * 20)
    assert train.main(["--stage", "pretrain", "--corpus", str(tmp_path / "corpus.jsonl"), "--tokenizer", str(world / "model/tokenizer.model"),
                       "--preset", "tiny", "--steps", "30", "--lr", "0.02", "--out", str(tmp_path / "run"), "--export", str(tmp_path / "base")]) == 0
    log = data.read_records(tmp_path / "run/log.jsonl")
    assert log[-1]["ce"] < 0.3 * log[0]["ce"]
    assert load_model(tmp_path / "base").config.prompt_template == "plain"


def test_each_round_goes_on_from_the_last_and_the_report_asks_each_model(world, tmp_path, monkeypatch):
    began, asked, trainable, load_trained = [], [], train.trainable, train.load_trained
    monkeypatch.setattr(train, "trainable", lambda cfg, folder, **how: began.append(folder) or trainable(cfg, folder, **how))
    monkeypatch.setattr(train, "load_trained", lambda cfg, folder, **how: asked.append(folder) or load_trained(cfg, folder, **how))
    assert train.main(["--stage", "hindsight", *arguments(world, tmp_path / "run", *JUDGED, "--rounds", "2")]) == 0
    assert began == [None, tmp_path / "run/sft", tmp_path / "run/round1"]
    assert asked[-4:] == [None, tmp_path / "run/sft", tmp_path / "run/round1", tmp_path / "run"]
    assert train.main(["--stage", "sft", *arguments(world, tmp_path / "sft", "--steps", "2")]) == 0 and asked[-2:] == [None, tmp_path / "sft"]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_bad_answers_take_no_part_in_unlikelihood_of_what_was_said_before(level, world, judged, tmp_path):
    argv = ["--stage", "unlikelihood", *arguments(world, tmp_path, *JUDGED, "--records", str(judged), "--level", level)]
    run = train.make_run(train.parse_config(argv))
    groups = train.unlikelihood_groups(run)
    good = [group for group in groups if group["roles"] == [losses.ALIGN_P]]
    assert 0 < len(good) < len(groups)
    found = [train.unlikelihood_step(run.model, train.collate(part, "cpu"), run.cfg)["ce"].item() for part in (groups, good)]
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[1] > 0


def test_the_end_of_a_text_is_learnt_in_pretraining(world, tmp_path):
    data.append_records(tmp_path / "corpus.jsonl", [[["anna has a hat", True], ["</s>", True]], [["anna", True]]])
    cfg = train.parse_config(["--stage", "pretrain", "--corpus", str(tmp_path / "corpus.jsonl"), "--tokenizer", str(world / "model/tokenizer.model"), "--out", str(tmp_path)])
    tokenizer = data.Tokenizer(world / "model")
    ended, open_ended = (group["documents"][0] for group in train.corpus_groups(train.Run(cfg, None, tokenizer, None, [], tmp_path)))
    assert ended["input_ids"][-1] == ended["labels"][-1] == tokenizer.eos_id != open_ended["input_ids"][-1]


# The loop ------------------------------------------------------------------------------------------------------------


@pytest.fixture()
def cat_run(world, tmp_path):
    """A run at the start of its cat stage, with its groups of documents."""
    path = planted(world, tmp_path / "candidates.jsonl")
    cfg = train.parse_config(cat(world, tmp_path / "run", "--candidates", str(path), "--max-worse", "2"))
    run = train.make_run(cfg)
    run.model = train.trainable(cfg, None)
    with torch.no_grad():
        for p in lora.lora_parameters(run.model):
            p.normal_(0, 0.05)
    return run, train.cat_groups(run)


def gradients(run, groups, micro_tokens):
    """Gradients of one step, split into micro-batches of the given size."""
    stage, cfg = train.STAGES["cat"], run.cfg
    parameters = lora.lora_parameters(run.model)
    for p in parameters:
        p.grad = None
    batches = [train.collate(part, "cpu") for part in data.micro_batches(groups, micro_tokens)]
    train.backward(run.model, stage, batches, cfg)
    return len(batches), [p.grad.clone() for p in parameters]


def test_accumulated_gradients_equal_the_full_batch(cat_run):
    run, groups = cat_run
    one, whole = gradients(run, groups, 10**9)
    many, parts = gradients(run, groups, 60)
    assert one == 1 and many > 3
    for a, b in zip(whole, parts):
        assert torch.allclose(a, b, atol=1e-7, rtol=1e-4)


def test_step_equals_the_equation_written_out(cat_run):
    """L_rank + lambda L_ce of the batch, from plain log-softmax over one document at a time."""
    run, groups = cat_run
    cfg, rank, pairs, ce, tokens = run.cfg, 0.0, 0, 0.0, 0.0
    for group in groups:
        scores = []
        for k, document in enumerate(group["documents"]):
            ids, labels = torch.tensor(document["input_ids"]), torch.tensor(document["labels"])
            logits = run.model(ids[None])[0].log_softmax(-1)
            terms = [logits[t - 1, labels[t]] for t in range(len(ids)) if labels[t] != -100]
            scores.append(sum(terms) / len(terms))
            if k < group["n_best"]:
                ce, tokens = ce - sum(terms) / group["n_best"], tokens + len(terms) / group["n_best"]
        for better, worse in group["pairs"]:
            rank, pairs = rank + max(0.0, (scores[worse] - scores[better]).item()), pairs + 1
    batch = train.collate(groups, "cpu")
    terms = train.STAGES["cat"].step(run.model, batch, cfg)
    totals = train.STAGES["cat"].counts(batch, cfg)
    assert totals["rank"] == pairs and totals["ce"] == pytest.approx(tokens, rel=1e-6)
    assert terms["rank"].item() == pytest.approx(rank, rel=1e-4) and terms["ce"].item() == pytest.approx(ce.item(), rel=1e-5)


def test_a_non_finite_loss_stops_before_anything_moves(cat_run, tmp_path):
    run, groups = cat_run
    before = [p.clone() for p in lora.lora_parameters(run.model)]
    stage = dataclasses.replace(train.STAGES["cat"], step=lambda model, batch, cfg: {"ce": train.cat_step(model, batch, cfg)["ce"] * float("nan")},
                                counts=lambda batch, cfg: {"ce": 1})
    with pytest.raises(FloatingPointError, match="step 0 of cat gave a non-finite loss"):
        train.train(run, stage, groups, tmp_path / "log.jsonl")
    assert all(torch.equal(a, b) for a, b in zip(before, lora.lora_parameters(run.model)))


def test_steps_are_as_long_as_the_schedule_and_the_clip_let_them(cat_run, tmp_path, monkeypatch):
    run, groups = cat_run
    run.cfg = dataclasses.replace(run.cfg, lr=1e-2)

    def moved(**changes):
        before = [p.detach().clone() for p in lora.lora_parameters(run.model)]
        train.train(dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, **changes)), train.STAGES["cat"], groups, tmp_path / "log.jsonl")
        return max(float((a - b).detach().abs().max()) for a, b in zip(before, lora.lora_parameters(run.model)))
    assert moved() > 1e-3 and moved(clip=1e-12) < 1e-5      # so small a gradient drowns in AdamW's epsilon
    monkeypatch.setattr(train, "learning_rate", lambda step, cfg: 0.0)
    assert moved() == 0


def test_the_seed_alone_decides_the_adapter(world, tmp_path):
    """Whatever torch has drawn before; `cat` goes on from an adapter, so that dropout alone is left to chance."""
    path = planted(world, tmp_path / "candidates.jsonl")

    def adapter(name, seed, *more):
        torch.manual_seed(random.randrange(2**31))
        assert train.main([*more, "--out", str(tmp_path / name), "--dropout", "0.3", "--no-evaluate", "--seed", seed]) == 0
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()
    ia = ["--stage", "sft-ia", *arguments(world, "", "--wordings", "3", "--steps", "3")]
    on = cat(world, "", "--candidates", str(path), "--init", str(tmp_path / "one"), "--no-compare")
    assert adapter("one", "5", *ia) == adapter("two", "5", *ia) != adapter("three", "6", *ia)
    assert adapter("four", "5", *on) == adapter("five", "5", *on)
    fresh = ["--stage", "sft", *arguments(world, "", "--steps", "3")]
    assert adapter("six", "5", *fresh) == adapter("seven", "5", *fresh)


def test_each_step_begins_without_the_gradients_of_the_last(cat_run, tmp_path, monkeypatch):
    (run, groups), seen, backward = cat_run, [], train.backward
    monkeypatch.setattr(train, "backward", lambda model, *rest: seen.append(any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())) or backward(model, *rest))
    train.train(run, train.STAGES["cat"], groups, tmp_path / "log.jsonl")
    assert seen == [False] * 3


def test_what_is_collected_follows_the_seed(world, tmp_path):
    found = []
    for seed in ("5", "5", "6"):
        run = train.make_run(train.parse_config(cat(world, tmp_path, "--pool-wordings", "1", "--seed", seed)))
        records = train.unanswered(run)
        same = [{**record, "wording": record["instruction"]} for record in records]
        found.append(([record["wording"] for record in records], [record["response"] for record in train.answered(run, same)]))
    assert found[0] == found[1] and all(one != two for one, two in zip(found[0], found[2]))


def test_learning_rate_warms_up_and_decays():
    cfg = train.TrainConfig(steps=100, lr=1.0, warmup_ratio=0.1, min_lr_ratio=0.1)
    rates = [train.learning_rate(step, cfg) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.1, abs=0.01) and rates[10:] == sorted(rates[10:], reverse=True)


def test_two_processes_train_as_one(world, tmp_path):
    """torchrun with two gloo ranks gives the adapter of one process, within float32 rounding."""
    path = planted(world, tmp_path / "candidates.jsonl")
    common = cat(world, "OUT", "--candidates", str(path), "--no-compare", "--no-evaluate", "--init", str(tmp_path / "ia"))
    assert train.main(["--stage", "sft-ia", *arguments(world, tmp_path / "ia", "--no-evaluate", "--wordings", "3", "--steps", "3")]) == 0
    outs = [tmp_path / "one", tmp_path / "two"]
    assert train.main([str(outs[0]) if x == "OUT" else x for x in common]) == 0
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"),
            *[str(outs[1]) if x == "OUT" else x for x in common]]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(out / "adapter_model.safetensors") for out in outs)
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 5e-5     # Adam enlarges the rounding of tiny gradients
    tokens = [[json.loads(row)["tokens"] for row in (out / "log.jsonl").read_text().splitlines()] for out in outs]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 3


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line, sentence", [
    (["--stage", "sfft"], f'unknown stage "sfft". Stages: {", ".join(train.STAGES)}. Did you mean "sft"?'),
    (["--stagee", "cat"], "there is no --stagee. Did you mean --stage?"), (["--judge", "oracle"], "invalid choice: 'oracle'"),
    (["--lr", "fast"], "invalid float value: 'fast'"), (["--lr", "-1"], "--lr is -1.0. Expected a positive number."),
    (["--steps", "0"], "--steps is 0. Expected 1 or more."), (["--model", "nowhere"], "--model nowhere does not exist."),
    (["--stage", "sft", "--lam", "1"], '--lam means nothing to stage "sft"'), (["--stage", "pretrain"], "needs --corpus FILE")])
def test_a_wrong_command_answers_in_one_sentence_before_torch(line, sentence):
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "train.py"), *line], capture_output=True, text=True)
    ours = [row for row in done.stderr.splitlines() if not row.startswith("import time:")]
    assert done.returncode == 2 and len(ours) == 1 and ours[0].startswith("error: ") and sentence in ours[0]
    assert " torch\n" not in done.stderr and "Traceback" not in done.stderr


def test_bad_input_is_one_sentence_and_nothing_is_written(world, tmp_path, capsys):
    def answer(**files):
        place = tmp_path / "bad"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(world, place)
        for name, text in files.items():
            (place / name.replace("__", "/").replace("_json", ".json").replace("_model", ".model")).write_text(text)
        assert train.main(cat(place, tmp_path / "never")) == 2
        assert not (tmp_path / "never").exists()
        return capsys.readouterr().err
    assert "is not JSON" in answer(tasks__colour_json="{")
    assert 'field "output" is missing' in answer(tasks__colour_json='{"Definition": "d", "Instances": [{"input": "a"}]}')
    assert "no instances" in answer(tasks__colour_json='{"Definition": "d", "Instances": []}')
    assert "not among the 2 tasks" in answer(paraphrases_json='{"shape": ["a", "b"]}')
    assert "tiktoken" in answer(model__tokenizer_model="IQ== 0\n")
    assert "is not JSON" in answer(paraphrases_json="[")


def test_no_room_for_a_response(world, tmp_path, capsys):
    assert train.main(cat(world, tmp_path / "a", "--max-len", "3")) == 2
    assert "--max-len 3 leaves no room" in capsys.readouterr().err


# Real data -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason="the real task files are not beside the project")
@pytest.mark.parametrize("folder", ["ni_tasks", "instruction_induction"])
def test_real_task_files_are_read(folder):
    tasks = data.load_tasks(SHARED / folder)
    assert len(tasks) == len(list((SHARED / folder).rglob("*.json" if folder == "ni_tasks" else "annotations/*.json")))
    assert all(task.instances and task.definition and all(x.outputs[0] for x in task.instances) for task in tasks)


# Learning from judgments ---------------------------------------------------------------------------------------------

JUDGED = ["--sft-steps", "3", "--steps", "3", "--batch-size", "4", "--pool-per-task", "6", "--downsample", "0"]


@pytest.fixture(scope="module")
def judged(world):
    """Judged responses to the tiny world's inputs."""
    path = world / "judged.jsonl"
    rows = [{"instruction": "give the colour .", "input": f"tom has a red hat {i}", "response": "red hat" if i % 2 else "blue hat",
             "judgment": None if i % 2 else "wrong : blue .", "target": "red hat"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("stage, more", [
    ("cut", ()), ("cut", ("--combine", "half", "--reduction", "token", "--positive", "text", "--unlike-gamma", "1")),
    ("cut", ("--detector", "frozen", "--downsample", "0.25")), ("cut", ("--detect", "all", "--no-use-judged")), ("cut", ("--dropout", "0.1")),
    ("cut", ("--no-use-l1",)), ("cut", ("--no-use-good", "--judged-warmup", "2")), ("forward", ()), ("ilf", ("--refinements", "2")), ("hindsight", ()),
    ("unlikelihood", ()), ("unlikelihood", ("--level", "token")), ("unlikelihood", ("--level", "sequence")), ("critic", ()),
])
def test_stages_on_judged_records(stage, more, world, judged, tmp_path, capsys):
    assert train.main(["--stage", stage, *arguments(world, tmp_path, *JUDGED, "--records", str(judged), *more)]) == 0
    said = capsys.readouterr().out
    assert f"{stage}: 6 unsatisfying responses, 6 satisfying ones" in said and "errors: greedy" in said
    assert len([line for line in (tmp_path / "log.jsonl").read_text().splitlines()]) == 3
    assert set(json.loads((tmp_path / "metrics.json").read_text())) == {"base", "SFT", train.STAGES[stage].title}
    if "--judged-warmup" in more:
        l1 = [json.loads(line)["l1"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert l1[:2] == [0, 0] and l1[2] > 0
    if stage == "cut":
        assert len(json.loads((tmp_path / "mask.json").read_text())) == 2 and "CUT's mask" in (tmp_path / "report.md").read_text()


def cut_run(world, judged, out, *more):
    """A run at the start of its cut stage, its adapters moved."""
    cfg = train.parse_config(["--stage", "cut", *arguments(world, out, *JUDGED, "--records", str(judged), *more)])
    run = train.make_run(cfg)
    run.model = train.trainable(cfg, None)
    with torch.no_grad():
        for p in lora.lora_parameters(run.model):
            p.normal_(0, 0.2)
    return run


def test_detection_sees_no_dropout_and_training_does(world, judged, tmp_path):
    run = cut_run(world, judged, tmp_path, "--dropout", "0.5")
    batch = {**train.collate(train.cut_groups(run), "cpu"), "step": 10**6}
    wanted, found = int(train.flagged_tokens(run.model.eval(), batch, run.cfg).sum()), []
    for _ in range(3):
        terms = train.cut_step(run.model.train(), batch, run.cfg)
        assert terms["flagged"] == wanted and run.model.training
        found.append(float(terms["l2"]))
    assert len(set(found)) == 3


@pytest.mark.parametrize("positive, words", [("none", ""), ("text", "perfect .")])
def test_the_satisfied_condition_stands_before_good_answers_and_twins(positive, words, world, judged, tmp_path):
    run, seen = cut_run(world, judged, tmp_path, *(["--positive", positive] if words else [])), set()
    for group in train.cut_groups(run):
        for document, role in zip(group["documents"], group["roles"], strict=True):
            text = run.tokenizer.decode(document["input_ids"])
            wanted = {losses.ALIGN_P: words, losses.MISALIGN: words, losses.ALIGN_N: "wrong : blue ."}[role]
            assert ("Judgment:" in text) == bool(wanted) and wanted in text
            seen.add(role)
    assert len(seen) == 3


def test_the_best_of_several_refinements_is_kept(world, judged, tmp_path, monkeypatch):
    texts = itertools.cycle(["blue coat", "red hat", "hat"])
    run = train.make_run(train.parse_config(["--stage", "ilf", *arguments(world, tmp_path / "run", *JUDGED, "--judge", "rule", "--records", str(judged), "--refinements", "3")]))
    run.folder.mkdir()
    monkeypatch.setattr(train, "sampled", lambda run, records, prompts: [train.Completion(next(texts), [], True) for _ in records])
    train.collect_refined(run)
    assert [record["refinement"] for record in data.read_records(run.folder / "refined.jsonl")] == ["red hat"] * 6


def test_rounds_collect_anew_and_continue(world, tmp_path):
    argv = ["--stage", "cut", *arguments(world, tmp_path, *JUDGED, "--rounds", "2")]
    assert train.main(argv) == 0
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == ["base", "SFT", "CUT, round 1", "CUT"]
    first, second = ([json.loads(line) for line in (tmp_path / part / "judged.jsonl").read_text().splitlines()] for part in ("round1", "."))
    assert first and second and not {r["input"] for r in first} & {r["input"] for r in second}
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "sft")
    (tmp_path / "adapter_config.json").unlink()                            # as if the second round had not ended
    (tmp_path / "adapter_model.safetensors").unlink()
    assert train.main(argv) == 0
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_a_critic_that_never_ends_its_judgment_is_not_believed(world, judged, tmp_path, capsys):
    assert train.main(["--stage", "critic", *arguments(world, tmp_path / "critic", *JUDGED, "--records", str(judged), "--no-evaluate")]) == 0
    argv = ["--stage", "hindsight", *arguments(world, tmp_path / "run", *JUDGED, "--no-evaluate"), "--critic", str(tmp_path / "critic")]
    with pytest.raises(SystemExit):
        train.main(argv)
    assert "--judge self" in capsys.readouterr().err
    assert train.main([*argv, "--judge", "self"]) == 2                     # four tokens of a random model end nothing
    assert {record["judgment"] for record in data.read_records(tmp_path / "run/judged.jsonl")} == {data.ERROR_JUDGMENT}
    assert "12 without a judgment, dropped" in capsys.readouterr().out


def test_collected_records_of_other_settings_are_not_continued(world, tmp_path, capsys):
    argv = ["--stage", "cut", *arguments(world, tmp_path, *JUDGED, "--no-evaluate")]
    assert train.main(argv) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):      # as if it had been stopped while training
        (tmp_path / name).unlink()
    assert train.main([*argv, "--temperature", "0.5"]) == 2 and "temperature was 1.0, now 0.5" in capsys.readouterr().err
    assert train.main(argv) == 0


def test_rounds_that_the_pool_cannot_feed_are_refused(world, tmp_path, capsys):
    assert train.main(["--stage", "cut", *arguments(world, tmp_path, *JUDGED, "--rounds", "9", "--no-evaluate")]) == 2
    assert "finds no instance left" in capsys.readouterr().err and not (tmp_path / "sft").exists()


def test_another_model_with_records_alone_starts_from_the_model(world, judged, tmp_path, capsys):
    argv = ["--stage", "cut", "--model", str(world / "model"), "--out", str(tmp_path), "--steps", "2", "--batch-size", "4"]
    with pytest.raises(SystemExit):
        train.main(argv)
    assert "--records FILE" in capsys.readouterr().err
    assert train.main([*argv, "--records", str(judged)]) == 0
    assert "sft" not in capsys.readouterr().out and (tmp_path / "adapter_model.safetensors").exists()


def test_the_next_command_repeats_what_differs_from_the_defaults(world, tmp_path):
    cfg = train.parse_config(cat(world, tmp_path / "run", "--seed", "3", "--no-compare"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/candidates.jsonl").touch()
    words = train.next_command(cfg).split()
    assert words[:4] == ["python", "train.py", "--stage", "cat"] and "--no-compare" in words and words[words.index("--seed") + 1] == "3"
    again = train.parse_config(words[2:] + ["--lam", "1.0"])
    assert dataclasses.replace(again, out=cfg.out, init=cfg.init, candidates=cfg.candidates) == cfg


@pytest.mark.parametrize("stage", ["cat", "sft"])
def test_the_next_command_repeats_the_template_that_was_given(stage, world, tmp_path):
    own = dataclasses.replace(train.parse_config(cat(world, tmp_path / "run")), stage=stage)
    given = dataclasses.replace(own, template="vicuna")
    wanted = train.read_config(own.model).prompt_template or "alpaca"
    assert " --template vicuna" in train.next_command(given)
    assert "--template" not in train.next_command(dataclasses.replace(own, template=wanted))       # as `make_run` fills it in


def test_a_wording_that_places_the_input_is_placed_in_judged_records_and_braces_in_them_are_text(world, tmp_path, monkeypatch):
    run = train.make_run(train.parse_config(["--stage", "cut", *arguments(world, tmp_path / "run", "--judge", "rule")]))
    run.folder.mkdir()
    record = {"task": "t", "id": "0", "sample": 0, "wording": "{input} : which ?", "instruction": "{input} : which ?", "input": "the {x} hat", "target": "red"}
    monkeypatch.setattr(train, "unanswered", lambda run: [record])
    monkeypatch.setattr(train, "answered", lambda run, records: [{**r, "response": "blue", "finished": True} for r in records])
    train.collect_judged(run)
    (found,) = data.load_judged(run.folder / "judged.jsonl")
    assert (found["instruction"], found["input"]) == ("the {x} hat : which ?", "")
    found["instruction"] = "tom {input} ann"
    assert train.judged_document(run, found) == data.encode_example(run.tokenizer, run.template, run.template.render("tom {input} ann", literal=True),
                                                                    "blue", max_len=run.cfg.max_len)


def test_a_judgment_longer_than_the_window_is_named(world, judged, tmp_path, capsys):
    rows = [json.loads(line) for line in judged.read_text().splitlines()]
    rows[4]["judgment"] = "wrong " * 200
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train.main(["--stage", "cut", *arguments(world, tmp_path / "x", *JUDGED, "--records", str(tmp_path / "long.jsonl"), "--max-len", "90")]) == 2
    error = capsys.readouterr().err
    assert "record 4" in error and "--max-len 90" in error and error.count("\n") == 1


# The house -----------------------------------------------------------------------------------------------------------

ROOMS = {"model": set(), "lora": set(), "losses": set(), "data": set(), "judge": set(), "eval": {"model", "lora", "data", "judge", "losses"},
         "train": {"model", "lora", "losses", "data", "judge", "eval"}}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_direction_of_the_house(room):
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{room}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names & set(ROOMS) <= ROOMS[room]


def test_tables_of_stages_agree_and_ignore_index_is_one():
    assert train.STAGES.keys() == train.STAGE_DEFAULTS.keys() and data.IGNORE_INDEX == -100
    assert losses.prediction_rows(torch.tensor([-100, 5]))[1].tolist() == [5]


def test_every_flag_in_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    names = {"--" + item.name.replace("_", "-") for item in dataclasses.fields(train.TrainConfig)}
    for line in re.findall(r"python train\.py[^\n`]*", text):
        for name in re.findall(r"--[a-z-]+", line):
            assert name in names or name.replace("--no-", "--") in names, f"{name} in: {line}"


def test_line_counts_in_the_readme_are_true():
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\(\w+\.py\) \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert {name for name, _ in rows} == {f"{room}.py" for room in ROOMS}
    for name, count in rows:
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(int(count) - lines) <= 0.1 * lines, f"{name} has {lines} lines"


# Preferences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, more", [
    ("dpo", ()), ("dpo", ("--preference", "ipo", "--length-normalize", "--pairs", "all")), ("dpo", ("--preference", "hinge", "--reference-free")),
    ("dpo", ("--preference", "robust", "--label-smoothing", "0.1")), ("slic", ()), ("rrhf", ()), ("pro", ()), ("expert", ()),
])
def test_stages_on_scored_candidates(stage, more, world, tmp_path, capsys):
    path = planted(world, tmp_path / "candidates.jsonl")
    argv = cat(world, tmp_path / "run", "--candidates", str(path), *more)
    argv[argv.index("cat")] = stage
    assert train.main(argv) == 0
    assert train.STAGES[stage].title in json.loads((tmp_path / "run/metrics.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    if more == ():
        assert "margin" not in rows[0] or rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and rows[0]["margin"] == pytest.approx(0, abs=1e-4)


def test_preference_steps_equal_their_equations(cat_run):
    """dpo, slic, rrhf and pro of one batch, from plain log-softmax over one document at a time."""
    run, groups = cat_run
    groups = [{**group, "imitated": [better for better, _ in group["pairs"]], "reference": [-3.0 - k for k in range(len(group["documents"]))],
               "rewards": [2.0] + [1.0 / k for k in range(1, len(group["documents"]))]} for group in groups]
    batch, scores, lengths = train.collate(groups, "cpu"), [], []
    for document in (d for group in groups for d in group["documents"]):
        ids, labels = torch.tensor(document["input_ids"]), document["labels"]
        logits = run.model(ids[None])[0].double().log_softmax(-1)
        terms = [logits[t - 1, labels[t]].item() for t in range(len(ids)) if labels[t] != -100]
        scores, lengths = [*scores, sum(terms)], [*lengths, len(terms)]
    wanted, start = dict.fromkeys(("dpo", "slic", "ce", "rrhf", "pro"), 0.0), 0
    for group in groups:
        s, n = scores[start:start + len(group["documents"])], lengths[start:start + len(group["documents"])]
        mean = [a / b for a, b in zip(s, n)]
        for w, k in group["pairs"]:
            h = s[w] - s[k] - group["reference"][w] + group["reference"][k]
            wanted["dpo"] += math.log1p(math.exp(-0.1 * h))
            wanted["slic"] += max(0.0, 1 - s[w] + s[k])
            wanted["ce"] -= s[w]
            wanted["rrhf"] += max(0.0, mean[k] - mean[w])
        for k in range(len(s) - 1):
            gaps = [group["rewards"][k] - r for r in group["rewards"][k + 1:]]
            exponents = [mean[k] * max(gaps)] + [m * g for m, g in zip(mean[k + 1:], gaps)]
            wanted["pro"] += math.log(sum(map(math.exp, exponents))) - exponents[0]
        start += len(s)
    cfg = dataclasses.replace(run.cfg, margin=1.0)
    found = {"dpo": train.dpo_step(run.model, batch, cfg)["loss"], **train.slic_step(run.model, batch, cfg)}
    found = {"dpo": found["dpo"], "slic": found["rank"], "ce": found["ce"], "rrhf": train.rrhf_step(run.model, batch, cfg)["rank"],
             "pro": train.pro_step(run.model, batch, cfg)["rank"]}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(wanted, rel=1e-4, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Shared prompts


@pytest.mark.parametrize("stage", ["cat", "dpo", "slic", "rrhf", "pro", "reward", "sft"])
def test_a_shared_prompt_trains_as_copies_of_it(stage, monkeypatch):
    """Losses, counts and gradients of a step whose groups lay their prompt down once, and of one that repeats it."""
    dice = random.Random()
    config = PRESETS["tiny"]

    def group():
        prompt = [dice.randrange(config.vocab_size) for _ in range(dice.randint(10, 30))]
        answers = [[dice.randrange(config.vocab_size) for _ in range(dice.randint(1, 9))] for _ in range(3)]
        documents = [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "cut": False} for answer in answers]
        return {"documents": documents, "n_best": 1, "pairs": [(0, 1), (0, 2)], "imitated": [0, 0], "rewards": [2.0, 1.0, 0.0], "pair_weights": [0.5, 0.5],
                "reference": [-3.0, -2.0, -5.0]}
    groups, cfg, found = [group() for _ in range(4)], train.TrainConfig(stage=stage), []
    model = lora.apply_lora(Llama(config).init_weights(0).double(), lora.LoraConfig(rank=4)).double()
    evaluation.add_head(model)
    for weight in lora.lora_parameters(model):
        torch.nn.init.normal_(weight, std=0.1)
    torch.nn.init.normal_(model.value_head.weight)
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(data, "shared_start", lambda group: 0)
        batch = {**train.collate(groups, "cpu"), "step": 0}
        means = train.backward(model, train.STAGES[stage], [batch], cfg)
        found.append((len(batch["input_ids"]), means, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
    (fewer, one, slopes), (tokens, two, others) = found
    assert fewer < 0.7 * tokens and one == pytest.approx(two, abs=1e-6) and len(slopes) == len(others)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(slopes, others))
