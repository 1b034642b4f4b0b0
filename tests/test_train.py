"""train.py: the loop, the pipeline and mistakes, on stages that belong to no method.

Beside sft and sft-ia, SimPO is trained from a file, as anybody's own method would be.
"""

import dataclasses
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import lora
import methods
import train
from methods import collate, finding
from methods.common import CommonFlags
from model import load_model

ROOT = Path(__file__).parent.parent
SIMPO = '''"""SimPO without its margin (arXiv 2405.14734)."""
from dataclasses import dataclass
from methods import candidates, document_logprobs, losses
from methods.flags import flag
from methods.pairing import PairFlags, pair_items, ranked_item

title, base, TERMS, METRICS = "SFT(IA)+SimPO", candidates, {"loss": "pairs"}, {"accuracy": "pairs"}


@dataclass
class Flags(PairFlags):
    beta: float = flag(2.0, "inverse temperature", above=0)


def items(run):
    return pair_items(run, lambda *about: ranked_item(*about, about[1]["response"])[0])


def step(model, batch, cfg):
    sums, lengths = document_logprobs(model, batch)
    h = losses.preference_logits(sums / lengths, 0.0, batch["better"], batch["worse"])
    return {"loss": losses.dpo_loss(h, beta=cfg.beta)[0], "accuracy": (h > 0).sum().to(h)}
'''
SAMPLED = ("--judge", "length", "--pool-per-task", "4", "--wordings", "3", "--steps", "3",
           "--sft-steps", "3", "--batch-size", "4", "--temperature", "2")


@pytest.fixture
def simpo(tmp_path):
    """The path of a stage of one's own."""
    (tmp_path / "simpo.py").write_text(SIMPO)
    return str(tmp_path / "simpo.py")


@pytest.fixture
def start(arguments):
    """A function that runs a stage: start(stage, out, *flags) -> the run folder."""
    def run(stage, out, *more):
        assert train.main(["--stage", stage, *arguments(out, "--plain", *more, stage=stage)]) == 0
        return out
    return run


@pytest.fixture
def error_of(arguments, capsys):
    """A function that gives the one line with which a command ends: error_of(stage, out, ...)."""
    def run(stage, out, *more):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.main(["--stage", stage, *arguments(out, "--plain", *more, stage=stage)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error
    return run


@pytest.fixture
def make_run(arguments, tmp_path):
    """A function that makes a run whose adapters are away from their start: make_run(stage)."""
    def make(stage, *more):
        argv = ["--stage", stage, *arguments(tmp_path / "run", "--plain", "--steps", "3", *more,
                                            stage=stage)]
        run = train.make_run(*train.parse_config(argv), train.Alone())
        run.folder.mkdir(exist_ok=True)
        run.model = train.trainable_model(run.cfg, None)
        with torch.no_grad():
            for weight in lora.adapter_weights(run.model).values():
                weight.normal_(0, 0.1)
        return run
    return make


@pytest.fixture
def method():
    """A function that makes a method of a few functions: method(step=..., TERMS=...)."""
    def make(**parts):
        own = type(sys)("mine")
        sft = finding.find_method("sft")
        for name in ("items", "step", "TERMS", "title", "Flags"):
            setattr(own, name, parts.pop(name, getattr(sft, name)))
        for name, part in parts.items():
            setattr(own, name, part)
        return finding.inherit(own)
    return make


def adapter(folder):
    """The bytes of a run's adapter."""
    return (folder / "adapter_model.safetensors").read_bytes()


def weights(run):
    """A copy of what a run trains."""
    return [p.detach().clone() for p in run.model.parameters() if p.requires_grad]


# ----- One step -----

@pytest.mark.parametrize("stage", ["sft", "simpo"])
def test_accumulated_gradients_are_those_of_the_full_batch(stage, simpo, make_run, candidates):
    run = make_run(simpo, "--candidates", str(candidates)) if stage == "simpo" else make_run(stage)
    items, found = run.method.items(run)[:8], []
    tokens = sum(len(x["input_ids"]) for item in items for x in item["documents"])
    for micro_tokens in (10**9, tokens // 2, 1):
        run.model.zero_grad()
        parts = data.micro_batches(items, micro_tokens)
        means = train.backward(run, [collate(part, run.model, "cpu") for part in parts])
        grads = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.requires_grad])
        found.append((len(parts), means, grads))
    assert found[0][0] == 1 < found[1][0] < found[2][0] == 8
    for _, means, grads in found[1:]:
        assert means == pytest.approx(found[0][1], rel=1e-5)
        torch.testing.assert_close(grads, found[0][2], atol=1e-7, rtol=1e-4)


def test_terms_are_divided_by_what_they_are_counted_in(make_run, method):
    run, seen = make_run("sft"), []

    def step(model, batch, cfg):
        seen.append(batch["items"])
        one = methods.label_hidden(model, batch).sum() * 0 + 1
        return {"a": 6 * one, "b": 6 * one, "c": 6 * one, "d": 6 * one, "e": 6 * one}
    terms = {"a": "tokens", "b": "items", "c": "documents", "d": lambda batch, cfg: cfg.seed + 2}
    run.method = method(step=step, TERMS=terms, METRICS={"e": "items"})
    items = finding.find_method("sft").items(run)[:4]
    batches = [collate(part, run.model, "cpu") for part in (items[:1], items[1:])]
    tokens = sum(len(batch["targets"]) for batch in batches)
    found = train.backward(run, batches)
    assert found == pytest.approx({"a": 12 / tokens, "b": 3, "c": 3, "d": 3, "e": 3})
    assert seen == [1, 3]


def test_a_step_that_returns_other_names_is_refused(make_run, method):
    run = make_run("sft")
    run.method = method(step=lambda model, batch, cfg: {"b": 1}, TERMS={"a": "items"})
    batch = collate(finding.find_method("sft").items(run)[:1], run.model, "cpu")
    with pytest.raises(ValueError, match=r"returns \['b'\]; expected the names in TERMS and METR"):
        train.backward(run, [batch])


def test_what_no_term_names_is_logged_and_not_learnt(make_run, method):
    run = make_run("sft")
    items, found = finding.find_method("sft").items(run)[:4], []
    for extra in (0.0, 1e6):
        def step(model, batch, cfg, extra=extra):
            terms = methods.token_step(model, batch, cfg)
            return terms | {"noted": extra * terms["ce"]}
        run.method = method(step=step, METRICS={"noted": "items"})
        run.model.zero_grad()
        means = train.backward(run, [collate(items, run.model, "cpu")])
        found.append([p.grad.clone() for p in run.model.parameters() if p.requires_grad])
    assert means["noted"] > 1e6
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("micro_tokens", [1, 60, 10**9])
def test_statistics_of_the_whole_step_reach_every_micro_batch(micro_tokens, make_run, method):
    """A baseline as in KTO: the loss does not depend on --micro-tokens."""
    def prepare(model, batch, cfg):
        assert not torch.is_grad_enabled()
        sums, _ = methods.document_logprobs(model, batch)
        eighth = batch["documents"] / 8
        return {"baseline": (sums.sum(), batch["documents"]), "none": (0.0, 0),
                "three": (3 * eighth, eighth)}

    def step(model, batch, cfg):
        sums, _ = methods.document_logprobs(model, batch)
        assert batch["statistics"]["none"] == 0 and batch["statistics"]["three"] == 3
        return {"loss": torch.relu(sums - batch["statistics"]["baseline"]).sum()}
    run = make_run("sft")
    run.method = method(step=step, TERMS={"loss": "documents"}, prepare=prepare)
    items = finding.find_method("sft").items(run)[:8]
    sums, _ = methods.document_logprobs(run.model, collate(items, run.model, "cpu"))
    wanted = torch.relu(sums - sums.mean()).mean().item()
    parts = data.micro_batches(items, micro_tokens)
    found = train.backward(run, [collate(part, run.model, "cpu") for part in parts])
    assert found["loss"] == pytest.approx(wanted, rel=1e-4) and wanted > 0.01


# ----- The loop -----

def test_the_loop_is_adamw_with_a_clipped_gradient_and_a_schedule(make_run):
    """Three steps, written out: one document at a time, plain tensors."""
    flags = ("--batch-size", "4", "--lr", "1e-2", "--clip", "0.5", "--weight-decay", "0.1",
             "--warmup-ratio", "0.5", "--judge-share", "0")
    run = make_run("sft", *flags)
    twin = make_run("sft", *flags)
    items = run.method.items(run)
    parameters = [p for p in twin.model.parameters() if p.requires_grad]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step, rate in enumerate((0.5e-2, 1e-2, 1e-2)):  # the cosine starts at its peak
        total, tokens = 0.0, 0
        for i in data.batch_indices(len(items), 4, step, 0):
            document = items[i]["documents"][0]
            ids, labels = torch.tensor(document["input_ids"]), document["labels"]
            logprobs = twin.model(ids[None])[0].log_softmax(-1)
            for t, label in enumerate(labels):
                if label != data.IGNORE_INDEX:
                    total, tokens = total - logprobs[t - 1, label], tokens + 1
        gradients = torch.autograd.grad(total / tokens, parameters)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        scale = min(1.0, 0.5 / (norm + 1e-6))
        for p, g, (m, v) in zip(parameters, gradients, moments, strict=True):
            m.mul_(0.9).add_(g * scale, alpha=0.1)
            v.mul_(0.98).add_((g * scale) ** 2, alpha=0.02)
            change = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8)
            with torch.no_grad():
                p.sub_(rate * 0.1 * p).sub_(rate * change)
    train.train(run)
    log = data.read_records(run.folder / "log.jsonl")
    assert [row["lr"] for row in log] == pytest.approx([0.5e-2, 1e-2, 1e-2])
    assert log[-1]["ce"] == pytest.approx(total.item() / tokens, rel=1e-4)
    assert log[-1]["norm"] == pytest.approx(norm, rel=1e-3)
    for found, wanted in zip(weights(run), parameters, strict=True):
        torch.testing.assert_close(found, wanted.detach(), atol=2e-4, rtol=1e-3)


def test_micro_batches_change_neither_log_nor_adapter(simpo, start, tmp_path, candidates):
    common = ("--candidates", str(candidates), "--steps", "3", "--sft-steps", "3", "--lr", "1e-3",
              "--no-compare", "--no-evaluate", "--batch-size", "4")
    one = start(simpo, tmp_path / "one", *common)
    many = start(simpo, tmp_path / "many", *common, "--init", str(one), "--micro-tokens", "1")
    logs = [data.read_records(folder / "log.jsonl") for folder in (one, many)]
    for first, second in zip(*logs, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
        assert first["tokens"] == second["tokens"]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (one, many)]
    moved = load_file(one / "sft-ia/adapter_model.safetensors")
    far = max(float((tensors[0][name] - moved[name]).abs().max()) for name in moved)
    near = max(float((tensors[0][name] - tensors[1][name]).abs().max()) for name in moved)
    assert near < 0.02 * far


def test_learning_rate_warms_up_and_decays():
    cfg = CommonFlags(steps=100, lr=1.0, warmup_ratio=0.1, min_lr_ratio=0.1)
    rates = [train.learning_rate(step, cfg) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.55)  # half of the way down
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.001)
    assert train.learning_rate(0, CommonFlags(steps=1, lr=1.0)) == 1


def test_a_non_finite_loss_stops_before_anything_moves(make_run, method):
    run, sft = make_run("sft"), finding.find_method("sft")
    for value in (math.nan, math.inf):
        before = weights(run)
        run.method = method(step=lambda *about, value=value: {
            "ce": sft.step(*about)["ce"] * value})
        with pytest.raises(FloatingPointError, match="not finite"):
            train.train(run)
        assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))
        assert not (run.folder / "log.jsonl").exists()


def test_a_non_finite_gradient_stops_before_anything_moves(make_run, method):
    run, sft = make_run("sft"), finding.find_method("sft")

    def step(model, batch, cfg):
        terms = sft.step(model, batch, cfg)
        return {"ce": terms["ce"] + (terms["ce"].detach() - terms["ce"]).sqrt()}  # slope infinite
    before, run.method = weights(run), method(step=step)
    with pytest.raises(FloatingPointError, match="not finite"):
        train.train(run)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))


def test_steps_are_as_long_as_the_schedule_and_the_clip_let_them(make_run, monkeypatch):
    def moved(*flags):
        run = make_run("sft", "--lr", "1e-2", *flags)
        before = weights(run)
        train.train(run)
        return max(float((a - b).abs().max()) for a, b in zip(before, weights(run), strict=True))
    assert moved() > 1e-3
    assert moved("--clip", "1e-12") < 1e-5  # so small a gradient drowns in AdamW's epsilon
    monkeypatch.setattr(train, "learning_rate", lambda step, cfg: 0.0)
    assert moved() == 0


def test_each_step_begins_without_the_gradients_of_the_last(make_run, monkeypatch):
    run, seen, backward = make_run("sft"), [], train.backward

    def note(run, batches):
        seen.append(any(p.grad is not None and bool(p.grad.any()) for p in run.model.parameters()))
        return backward(run, batches)
    monkeypatch.setattr(train, "backward", note)
    train.train(run)
    assert seen == [False] * 3


def test_each_step_trains_on_the_items_of_its_turn(make_run, method, monkeypatch):
    run, seen = make_run("sft", "--batch-size", "5", "--seed", "3"), []
    items, plain = finding.find_method("sft").items(run), collate
    monkeypatch.setattr(train, "collate", lambda part, *more: seen.append(
        [x["name"] for x in part]) or plain(part, *more))
    train.train(run)
    wanted = [[items[i]["name"] for i in data.batch_indices(len(items), 5, step, 3)]
              for step in range(3)]
    assert seen == wanted


def test_a_new_phase_makes_new_items(make_run, method):
    run, made = make_run("sft", "--steps", "7"), []
    items = finding.find_method("sft").items(run)

    def fresh(run):
        made.append(run.model.training)
        return items
    run.method = method(items=fresh, phase=lambda cfg: 3)
    train.train(run)
    assert len(made) == 3  # before the steps 0, 3 and 6
    assert not run.model.training


def test_a_log_row_says_what_a_step_did(make_run):
    run = make_run("sft", "--batch-size", "4")
    train.train(run)
    items, tokens = run.method.items(run), 0
    for step, row in enumerate(data.read_records(run.folder / "log.jsonl")):
        for i in data.batch_indices(len(items), 4, step, 0):
            tokens += len(items[i]["documents"][0]["input_ids"])
        assert set(row) == {"stage", "step", "ce", "norm", "lr", "tokens", "seconds"}
        assert (row["stage"], row["step"], row["tokens"]) == ("sft", step, tokens)
        assert row["lr"] == train.learning_rate(step, run.cfg) and row["norm"] > 0


def test_nothing_to_train_on_is_said(make_run, method):
    run = make_run("sft")
    run.method = method(items=lambda run: [])
    with pytest.raises(ValueError, match="nothing to train on for stage sft"):
        train.train(run)


def test_truncated_prompts_are_counted(start, tmp_path, capsys):
    start("sft", tmp_path / "run", "--max-len", "25", "--no-evaluate", "--judge-share", "0",
          "--steps", "1")
    said = capsys.readouterr().out
    assert "sft: 16 documents are longer than --max-len 25, and were truncated." in said


@pytest.mark.parametrize("flags, computes", [
    ((), torch.float32), (("--full",), torch.float32),
    (("--full", "--dtype", "float32"), torch.float32),
    (("--full", "--dtype", "bfloat16"), torch.bfloat16)])
def test_full_tuning_computes_in_the_type_that_dtype_means(flags, computes, make_run):
    run = make_run("sft", *flags)
    with run.precision():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == computes
    if flags:
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}


# ----- The pipeline -----

def test_a_stage_of_ones_own_trains_what_it_needs_and_is_shown_beside_it(
        simpo, start, tmp_path, candidates, capsys):
    assert len(SIMPO.splitlines()) <= 25
    folder = start(simpo, tmp_path / "run", "--candidates", str(candidates), "--steps", "20",
                   "--sft-steps", "3", "--lr", "5e-3", "--batch-size", "4")
    titles = ["base", "SFT", "SFT(IA)", "SFT(IA)+SimPO"]
    metrics, said = json.loads((folder / "metrics.json").read_text()), capsys.readouterr().out
    assert list(metrics) == titles and all(f"\n{title} " in said for title in titles)
    for name in ("cr", "mcr", "rouge1", "rougeL", "exact_match", "consistent_and_correct"):
        assert set(metrics["base"][name]) == {"mean", "ci95", "n"}
    first, *_, last = data.read_records(folder / "log.jsonl")
    assert first["stage"] == simpo and last["loss"] < first["loss"]
    assert {"config.json", "log.jsonl", "adapter_config.json", "adapter_model.safetensors",
            "questions.jsonl", "sft", "sft-ia"} <= {path.name for path in folder.iterdir()}


def test_stages_on_the_way_have_their_own_steps_rate_and_batch(simpo, start, tmp_path, candidates):
    folder = start(simpo, tmp_path / "run", "--candidates", str(candidates), "--steps", "1",
                   "--sft-steps", "2", "--sft-lr", "0.003", "--batch-size", "3", "--seed", "5",
                   "--wordings", "2", "--no-evaluate")
    for stage in ("sft", "sft-ia"):
        cfg = json.loads((folder / stage / "config.json").read_text())
        assert (cfg["stage"], cfg["steps"], cfg["lr"], cfg["seed"]) == (stage, 2, 0.003, 5)
        assert cfg["batch_size"] == CommonFlags.batch_size and cfg["out"] == str(folder / stage)
    assert cfg["wordings"] == 2
    assert len(data.read_records(folder / "sft/log.jsonl")) == 2


def test_a_repeated_command_finds_everything_and_trains_nothing(
        simpo, start, tmp_path, candidates, capsys):
    common = ("--candidates", str(candidates), "--steps", "2", "--sft-steps", "2", "--no-evaluate")
    folder = start(simpo, tmp_path / "run", *common)
    before = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    start(simpo, folder, *common)
    said = capsys.readouterr().out
    assert "training in" not in said and f"{simpo}: found in {folder}." in said
    assert before == {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_alone_says_how_its_run_was_made(simpo, start, tmp_path, candidates, capsys):
    folder = start(simpo, tmp_path / "run", "--candidates", str(candidates), "--steps", "2",
                   "--sft-steps", "2", "--no-evaluate", "--beta", "3")
    before = adapter(folder)
    assert train.main(["--stage", simpo, "--out", str(folder), "--plain"]) == 0
    assert adapter(folder) == before
    cfg, _ = train.parse_config(["--stage", simpo, "--out", str(folder), "--plain"])
    saved = json.loads((folder / "config.json").read_text())
    assert cfg.beta == 3 and dataclasses.asdict(cfg) == saved | {"template": cfg.template}


def test_another_setting_in_the_same_folder_is_refused_by_name(
        simpo, start, error_of, tmp_path, candidates):
    common = ("--candidates", str(candidates), "--steps", "2", "--sft-steps", "2", "--no-evaluate")
    folder = start(simpo, tmp_path / "run", *common)
    before = adapter(folder)
    start(simpo, folder, *common, "--eval-per-task", "5", "--micro-tokens", "50")  # change nothing
    assert adapter(folder) == before
    wanted = f"{folder} holds another run: --beta was 2.0, now 1.0."
    assert wanted in error_of(simpo, folder, *common, "--beta", "1")
    (folder / "adapter_config.json").unlink()  # as if it had been stopped while training
    assert wanted in error_of(simpo, folder, *common, "--beta", "1")
    wanted = f"{folder} holds another run: --sft-steps was 2, now 3."
    assert wanted in error_of(simpo, folder, *common, "--sft-steps", "3")


def test_another_run_in_the_folder_is_refused_before_any_training(
        simpo, start, error_of, tmp_path, candidates):
    """Its stages on the way are gone, so they would be trained first."""
    common = ("--candidates", str(candidates), "--steps", "2", "--sft-steps", "2", "--no-evaluate")
    folder = start(simpo, tmp_path / "run", *common)
    for stage in ("sft", "sft-ia"):
        shutil.rmtree(folder / stage)
    error = error_of(simpo, folder, *common, "--beta", "1")
    assert f"{folder} holds another run: --beta was 2.0, now 1.0." in error
    assert not (folder / "sft").exists() and not (folder / "sft-ia").exists()


def test_the_log_of_an_earlier_try_is_not_gone_on_with(start, tmp_path):
    common = ("--steps", "2", "--no-evaluate")
    folder = start("sft", tmp_path / "run", *common)
    before = adapter(folder), data.read_records(folder / "log.jsonl")
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # as if it had been stopped
        (folder / name).unlink()
    (folder / "rollouts.jsonl").write_text("{}\n")
    (folder / "candidates.jsonl").write_text("{}\n")
    start("sft", folder, *common)
    log = data.read_records(folder / "log.jsonl")
    assert adapter(folder) == before[0] and len(log) == 2
    assert [row["ce"] for row in log] == [row["ce"] for row in before[1]]
    assert not (folder / "rollouts.jsonl").exists()
    assert (folder / "candidates.jsonl").exists()  # what was collected is kept


def test_a_folder_of_another_stage_is_refused(simpo, start, error_of, tmp_path, candidates):
    folder = start("sft", tmp_path / "run", "--steps", "1", "--no-evaluate")
    error = error_of(simpo, folder, "--candidates", str(candidates), "--sft-steps", "1",
                     "--steps", "1", "--no-evaluate")
    assert f"{folder} holds another run: --stage was sft, now" in error


def test_init_takes_the_settings_of_the_run_that_it_continues(
        simpo, start, error_of, tmp_path, candidates, arguments, capsys):
    ia = start("sft-ia", tmp_path / "ia", "--steps", "2", "--seed", "5", "--rank", "3",
               "--wordings", "3", "--lr", "0.003")
    argv = ["--stage", simpo, "--init", str(ia), "--out", str(tmp_path / "run"), "--steps", "2",
            "--candidates", str(candidates), "--no-compare", "--plain"]
    capsys.readouterr()
    assert train.main(argv) == 0
    assert f"sft-ia: found in {ia}." in capsys.readouterr().out
    cfg, own = train.parse_config(argv)[0], CommonFlags()
    assert (cfg.seed, cfg.rank, cfg.wordings, cfg.sft_steps, cfg.sft_lr) == (5, 3, 3, 2, 0.003)
    assert (cfg.lr, cfg.batch_size) == (1e-4, 16) and own.lr != 1e-4  # its own stage's
    assert json.loads((tmp_path / "run/adapter_config.json").read_text())["r"] == 3
    assert not (tmp_path / "run/sft-ia").exists()
    out = str(tmp_path / "other")
    for name, value in (("--seed", "6"), ("--rank", "4"), ("--wordings", "2"), ("--sft-lr", "1")):
        with pytest.raises(SystemExit):
            train.main([*argv, "--out", out, name, value])
        error = capsys.readouterr().err
        assert f"{ia} holds another run: {name} was" in error and error.count("\n") == 1


def test_init_may_be_a_whole_run_folder(simpo, start, tmp_path, candidates, capsys):
    common = ("--candidates", str(candidates), "--steps", "2", "--sft-steps", "2", "--no-evaluate")
    first = start(simpo, tmp_path / "one", *common)
    capsys.readouterr()
    start(simpo, tmp_path / "two", *common, "--init", str(first), "--beta", "1")
    said = capsys.readouterr().out
    assert f"sft: found in {first}/sft." in said and f"sft-ia: found in {first}/sft-ia." in said
    assert not (tmp_path / "two/sft-ia").exists() and adapter(tmp_path / "two") != adapter(first)


def test_the_seed_alone_decides_the_adapter(simpo, start, tmp_path, candidates):
    """Whatever torch drew before; `simpo` goes on from an adapter, so dropout is what is left."""
    def made(name, stage, *more):
        torch.manual_seed(random.randrange(2**31))
        return adapter(start(stage, tmp_path / name, "--dropout", "0.3", "--no-evaluate",
                             "--steps", "2", "--wordings", "3", *more))
    one, two, three = (made(f"ia{k}", "sft-ia", "--seed", seed)
                       for k, seed in enumerate(("5", "5", "6")))
    assert one == two != three
    on = ("--candidates", str(candidates), "--init", str(tmp_path / "ia0"), "--no-compare",
          "--seed", "5")
    four, five = (made(name, simpo, *on) for name in ("four", "five"))
    assert four == five != made("six", simpo, *on[:-2], "--batch-size", "3")


def test_what_is_collected_is_resumed_to_the_same_records_and_adapter(simpo, start, tmp_path):
    flags = (*SAMPLED, "--eval-batch", "8", "--no-compare", "--no-evaluate")
    whole = start(simpo, tmp_path / "whole", *flags)
    records = (whole / "candidates.jsonl").read_bytes()
    assert records.count(b"\n") == 2 * 4 * 4 * 2  # tasks, instances, wordings, samples
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for name in ("adapter_config.json", "adapter_model.safetensors", "log.jsonl"):
        (stopped / name).unlink()
    lines = records.splitlines(keepends=True)[:27]  # in the middle of a question
    (stopped / "candidates.jsonl").write_bytes(b"".join(lines))
    start(simpo, stopped, *flags)
    assert (stopped / "candidates.jsonl").read_bytes() == records
    assert adapter(stopped) == adapter(whole)


def test_each_round_goes_on_from_the_last_on_new_inputs(simpo, start, tmp_path, monkeypatch):
    began, asked, trainable, opened = [], [], train.trainable_model, train.open_trained

    def note(cfg, before):
        began.append(before)
        return trainable(cfg, before)

    def open_trained(cfg, folder, **options):
        asked.append(folder)
        return opened(cfg, folder, **options)
    monkeypatch.setattr(train, "trainable_model", note)
    monkeypatch.setattr(train, "open_trained", open_trained)
    folder = start(simpo, tmp_path / "run", *SAMPLED, "--rounds", "2")
    assert began == [None, None, folder / "sft-ia", folder / "round1"]
    assert asked[-4:] == [folder / "sft", folder / "sft-ia", folder / "round1", folder]
    titles = ["base", "SFT", "SFT(IA)", "SFT(IA)+SimPO, round 1", "SFT(IA)+SimPO"]
    assert list(json.loads((folder / "metrics.json").read_text())) == titles
    first, second = (data.read_records(place / "candidates.jsonl")
                     for place in (folder / "round1", folder))
    assert first and second and not {x["input"] for x in first} & {x["input"] for x in second}
    before = adapter(folder)
    (folder / "adapter_config.json").unlink()  # as if the second round had not ended
    (folder / "adapter_model.safetensors").unlink()
    began.clear()
    start(simpo, folder, *SAMPLED, "--rounds", "2")
    assert adapter(folder) == before and began == [folder / "round1"]


def test_a_loss_that_is_not_finite_is_one_line(tmp_path, error_of):
    (tmp_path / "wild.py").write_text('''"""A loss without bounds."""
from methods import sft, token_step
title, TERMS, Flags, kind, items = "wild", {"ce": "tokens"}, sft.Flags, "sft", sft.items


def step(model, batch, cfg):
    return {"ce": token_step(model, batch, cfg)["ce"] * float("inf")}
''')
    error = error_of(str(tmp_path / "wild.py"), tmp_path / "run", "--steps", "2")
    assert "not finite" in error and not (tmp_path / "run/adapter_config.json").exists()


def test_rounds_that_the_pool_cannot_feed_are_refused_before_training(simpo, error_of, tmp_path):
    error = error_of(simpo, tmp_path / "run", *SAMPLED, "--rounds", "9", "--no-evaluate")
    assert "finds no instance left" in error
    assert not (tmp_path / "run/sft-ia").exists()


def test_full_tuning_moves_all_weights_and_is_continued(simpo, start, tmp_path, candidates, world):
    folder = start(simpo, tmp_path / "run", "--candidates", str(candidates), "--full", "--steps",
                   "2", "--sft-steps", "2", "--no-compare")
    models = [load_model(place / "model").state_dict() for place in (folder / "sft-ia", folder)]
    base = load_model(world / "model").state_dict()
    for name in base:
        assert not torch.equal(base[name], models[0][name])
        assert not torch.equal(models[0][name], models[1][name])
    assert not (folder / "adapter_config.json").exists()
    assert len(data.Tokenizer(folder / "model")) == len(data.Tokenizer(world / "model"))
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+SimPO"]


def test_adapt_names_the_linears(start, error_of, tmp_path):
    common = ("--steps", "1", "--no-evaluate", "--adapt")
    folder = start("sft", tmp_path / "run", *common, "gate_proj", "down_proj")
    names = load_file(folder / "adapter_model.safetensors")
    assert len(names) == 2 * 2 * 2
    assert all("gate_proj" in name or "down_proj" in name for name in names)
    assert '"gait_proj" names no linear' in error_of("sft", tmp_path / "x", *common, "gait_proj")


def test_hooks_are_called_in_order(tmp_path, start, capsys):
    (tmp_path / "hooks.py").write_text('''"""Hooks."""
from methods import sft, token_step
title, TERMS, Flags, kind = "hooks", {"ce": "tokens"}, sft.Flags, "sft"


def say(name, run):
    print("hook", name, (run.folder / "config.json").exists())


def items(run):
    say("items", run)
    return sft.items(run)


def attach(run): say("attach", run)
def collect(run): say("collect", run)
def begin(run): say("begin", run)
def detach(run, folder): say("detach", run)
def report(run, ladder): print("hook report", list(ladder))


step = token_step
''')
    start(str(tmp_path / "hooks.py"), tmp_path / "run", "--steps", "2")
    hooks = [line[5:] for line in capsys.readouterr().out.splitlines() if line[:5] == "hook "]
    names = ("attach", "collect", "begin", "items", "detach")
    assert hooks == [*(f"{name} True" for name in names), "report ['base', 'hooks']"]


@pytest.mark.parametrize("beginning", ["from __future__ import annotations\n", ""])
def test_a_stage_may_put_off_its_annotations(beginning, simpo, tmp_path):
    text = Path(simpo).read_text().replace("from dataclasses", beginning + "from dataclasses", 1)
    Path(simpo).write_text(text)
    cfg, _ = train.parse_config(["--stage", simpo, "--beta", "3", "--plain"])
    assert cfg.beta == 3.0


def test_without_evaluation_the_adapter_is_named(start, tmp_path, capsys):
    start("sft", tmp_path / "run", "--steps", "1", "--no-evaluate")
    assert f"The adapter is in {tmp_path / 'run'}." in capsys.readouterr().out
    assert not (tmp_path / "run/metrics.json").exists()


def test_sft_ia_is_shown_beside_sft(start, tmp_path):
    folder = start("sft-ia", tmp_path / "run", "--steps", "1", "--wordings", "3")
    assert list(json.loads((folder / "metrics.json").read_text())) == ["base", "SFT", "SFT(IA)"]


def test_the_evaluation_asks_held_out_questions_only(start, tmp_path, world):
    folder = start("sft", tmp_path / "run", "--steps", "1", "--split", "test")
    rows = data.read_records(folder / "questions.jsonl")
    tasks = data.read_tasks(world / "tasks")
    data.add_paraphrases(world / "paraphrases.json", tasks)
    held_out = {task.name: {x.input for x in data.split_instances(task, "test")} for task in tasks}
    assert len(rows) == 2 * 6 and {row["model"] for row in rows} == {"base", "SFT"}
    for row in rows:
        assert row["input"] in held_out[row["task"]]
        assert row["wordings"] == [f"name its {row['task']}", f"say the {row['task']}"]


# ----- Mistakes -----

LINES = [
    (["--stage", "sfft"], 'unknown stage "sfft". Stages: '),
    (["--stagee", "x", "--stage", "sft"], "does not read --stagee. Did you mean --stage?"),
    (["--stage", "sft", "--judge", "oracle"], "this stage does not read --judge"),
    (["--stage", "sft", "--split", "x"], "argument --split: invalid choice: 'x'"),
    (["--stage", "sft", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["--stage", "sft", "--lr", "-1"], "--lr is -1.0. Expected a positive number."),
    (["--stage", "sft", "--lr", "nan"], "--lr is nan. Expected a positive number."),
    (["--stage", "sft", "--steps", "0"], "--steps is 0. Expected 1 or more."),
    (["--stage=sft", "--steps=0"], "--steps is 0. Expected 1 or more."),
    (["--stage", "sft", "--steps"], "argument --steps: expected one argument"),
    (["--stage", "sft", "--model", "nowhere"], "--model nowhere does not exist."),
    (["--stage", "sft", "--lam", "1"], "this stage does not read --lam"),
    (["--stage", "sft", "more"], "words that belong to no flag: 1. --help lists the flags."),
    (["--stage", "sft", "--max-l", "9"], "does not read --max-l. Did you mean --max-len?"),
    (["--stage", "sft", "--model", "x\ny"], "--model x\\ny does not exist."),
    (["--stage", "nowhere/mine.py"], 'unknown stage "nowhere/mine.py"'),
]


def test_wrong_commands_and_help_answer_before_torch_is_imported():
    """One child for all: each line is asked, then whether torch is there."""
    child = """if True:
        import contextlib, io, json, sys
        import train
        rows = []
        for line in json.loads(sys.argv[1]):
            text, status = io.StringIO(), 0
            with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
                try:
                    status = train.main(line)
                except SystemExit as stop:
                    status = stop.code
            rows.append([status, text.getvalue(), "torch" in sys.modules])
        print(json.dumps(rows))
    """
    stages = finding.stages()
    lines = [[*line, "--plain"] for line, _ in LINES]
    lines += [["--stage", stage, "--no-such-flag", "--plain"] for stage in stages]
    lines += [["--stage", stage, "--help", "--plain"] for stage in stages]
    done = subprocess.run([sys.executable, "-c", child, json.dumps(lines)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    for line, (status, text, torch_is_there) in zip(lines, rows, strict=True):
        assert not torch_is_there, line
        assert status == (0 if "--help" in line else 2), line
        if "--help" not in line:
            assert text.startswith("error: ") and text.count("\n") == 1 and len(text) < 600, line
    for (_, wanted), (_, text, _) in zip(LINES, rows, strict=False):
        assert wanted in text


def test_the_program_ends_with_the_status_of_a_mistake():
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--stage", "sft", "--steps", "0",
                           "--plain"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --steps is 0. Expected 1 or more.\n"


def test_bad_input_is_one_line_and_nothing_is_written(world, tmp_path, capsys):
    def answer(name, text):
        place = tmp_path / "bad"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(world, place)
        (place / name).write_text(text)
        with pytest.raises(SystemExit) as stop:
            train.main(["--stage", "sft", "--model", str(place / "model"), "--tasks",
                        str(place / "tasks"), "--paraphrases", str(place / "paraphrases.json"),
                        "--out", str(tmp_path / "never"), "--plain"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert not (tmp_path / "never").exists()
        return error
    assert "is not JSON" in answer("tasks/colour.json", "{")
    assert "not among the 2 tasks" in answer("paraphrases.json", '{"shape": ["a", "b"]}')
    assert "is not JSON in UTF-8: Expecting" in answer("paraphrases.json", "[")


@pytest.mark.parametrize("flags, wanted", [
    (("--max-len", "3"), "--max-len 3 leaves no room"),
    (("--max-len", "5000"), "--max-len is 5000, but"),
    (("--template", "vicuna"), "unknown template 'vicuna'"),
    (("--device", "cuda:99"), "--device cuda:99 is not"),
    (("--device", "foo"), "--device foo is not")])
def test_what_does_not_fit_the_model_is_one_line(flags, wanted, error_of, tmp_path):
    assert wanted in error_of("sft", tmp_path / "run", *flags)
    assert not (tmp_path / "run/adapter_config.json").exists()


def test_no_instance_for_training_is_one_line(error_of, tmp_path, world):
    record = json.loads((world / "tasks/colour.json").read_text())
    (tmp_path / "tasks").mkdir()
    pool = {x.id for x in data.split_instances(data.read_tasks(world / "tasks")[0], "pool")}
    record["Instances"] = [row for row in record["Instances"] if row["id"] in pool]
    (tmp_path / "tasks/colour.json").write_text(json.dumps(record))
    (tmp_path / "words.json").write_text("{}")
    error = error_of("sft", tmp_path / "run", "--tasks", str(tmp_path / "tasks"), "--paraphrases",
                     str(tmp_path / "words.json"), "--judge-share", "0")
    assert "nothing to train on for stage sft" in error
