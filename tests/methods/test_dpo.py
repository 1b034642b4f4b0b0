"""dpo.py: trl's losses on random models, the golden numbers, short runs."""

import json
import math

import pytest
import torch

import data
import train
from methods import collate, document_logprobs, dpo
from model import save_model

# S of the golden candidates under the reference 2 sin(0.9 i + 1.1 t + 1.7 v + 0.2)
REFERENCE = [-10.7027159023, -7.3647605120, -11.5411262450, -3.1807849124]
KINDS = [(), ("--preference", "ipo", "--length-normalize", "--pairs", "all",
               "--condition", "own"),
         ("--preference", "hinge", "--reference-free"),
         ("--preference", "robust", "--label-smoothing", "0.1")]


# ----- Against trl -----

@pytest.fixture
def policies(tmp_path, make_model):
    """A policy and a reference, their folders in tmp_path."""
    models = []
    for seed, name in ((1, "policy"), (2, "reference")):
        model = make_model(64, seed)
        save_model(model, tmp_path / name)
        models.append(model.requires_grad_(False))
    return models


def trl_loss(folder, rows, *, kind, beta, label_smoothing):
    """The loss of trl's trainer; rows: token ids of all chosen, then of all rejected responses."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    transformers, tokenizers = map(pytest.importorskip, ("transformers", "tokenizers"))
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3")),
        pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    theirs = [transformers.LlamaForCausalLM.from_pretrained(folder / name)
              for name in ("policy", "reference")]
    settings = trl.DPOConfig(output_dir=str(folder / "trl"), loss_type=kind, beta=beta,
                             report_to=[], bf16=False, use_cpu=True, gradient_checkpointing=False,
                             label_smoothing=label_smoothing)
    rows_of = pytest.importorskip("datasets").Dataset.from_list
    trainer = trl.DPOTrainer(
        model=theirs[0], ref_model=theirs[1], args=settings, processing_class=tokenizer,
        train_dataset=rows_of([{"prompt": "w4 w5", "chosen": "w6", "rejected": "w7"}]))
    ids, mask = torch.zeros(len(rows), 11).long(), torch.zeros(len(rows), 11).long()
    for k, row in enumerate(rows):
        ids[k, :len(row)], mask[k, :len(row)] = row, 1
    completion = mask.clone()
    completion[:, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
    return trainer._compute_loss(theirs[0].eval(), inputs, False).item()


@pytest.mark.parametrize("kind, flags", [
    ("sigmoid", ()), ("hinge", ()), ("ipo", ("--length-normalize",)),
    ("robust", ("--label-smoothing", "0.1"))])
def test_the_loss_is_that_of_trl(kind, flags, policies, tmp_path, make_run):
    policy, reference = policies
    pairs = [[torch.randint(3, 64, (4 + n,)) for n in sizes] for sizes in ((5, 2), (3, 7), (4, 4))]
    for first, second in pairs:
        second[:4] = first[:4]  # one prompt
    items = []
    for pair in pairs:
        documents = []
        for row in pair:
            labels = [data.IGNORE_INDEX] * 4 + row[4:].tolist()
            documents.append({"input_ids": row.tolist(), "labels": labels, "truncated": 0})
        sums = document_logprobs(reference, collate([{"documents": documents}], reference, "cpu"))
        items.append({"documents": documents, "indices": {"better": [0], "worse": [1]},
                      "values": {"reference": sums[0].tolist()}})
    cfg = make_run("dpo", "--beta", "0.3", "--preference", kind, *flags).cfg
    found = dpo.step(policy, collate(items, policy, "cpu"), cfg)["loss"] / len(pairs)
    rows = [pair[side] for side in (0, 1) for pair in pairs]
    wanted = trl_loss(tmp_path, rows, kind=kind, beta=0.3, label_smoothing=cfg.label_smoothing)
    assert found.item() == pytest.approx(wanted, rel=1e-5, abs=1e-5)


# ----- The step -----

@pytest.mark.parametrize("flags, wanted", [
    ((), 0.4263847502), (("--label-smoothing", "0.1"), 0.4895504577),
    (("--beta", "0.5"), 0.0416202817), (("--preference", "ipo"), 1.7333585244),
    (("--preference", "ipo", "--length-normalize"), 10.9064836237),
    (("--preference", "hinge", "--beta", "0.05"), 0.6841714628),
    (("--preference", "robust", "--label-smoothing", "0.1"), 0.3474276159)])
def test_golden_numbers(flags, wanted, golden, make_run):
    model, documents = golden()
    item = {"documents": documents, "indices": {"better": [0], "worse": [1]},
            "values": {"reference": REFERENCE}}
    terms = dpo.step(model, collate([item], model, "cpu"), make_run("dpo", *flags).cfg)
    assert terms["loss"].item() == pytest.approx(wanted, rel=3e-6)
    assert terms["accuracy"] == 1
    if "--length-normalize" not in flags:
        beta = float(flags[1]) if flags[:1] == ("--beta",) else 0.05 if "0.05" in flags else 0.1
        assert terms["margin"].item() == pytest.approx(beta * 6.3165707442, rel=1e-6)


def test_without_a_reference_only_the_policy_counts(golden, make_run):
    model, documents = golden()
    item = {"documents": documents, "indices": {"better": [3], "worse": [2]}}
    cfg = make_run("dpo", "--reference-free").cfg
    h = -3.7316307244 + 12.7249884894
    found = dpo.step(model, collate([item], model, "cpu"), cfg)["loss"].item()
    assert found == pytest.approx(math.log1p(math.exp(-0.1 * h)), rel=1e-5)


def test_a_step_equals_the_equation_and_micro_batches_change_nothing(
        ready, candidates, written_out, same_in_parts):
    run = ready("dpo", "--candidates", str(candidates), "--beta", "0.3")
    items = dpo.items(run)
    for item in items:  # another reference, so that h is not 0
        item["values"]["reference"] = [-10.0 - k for k in range(len(item["documents"]))]
    total, pairs, margin, right = 0.0, 0, 0.0, 0
    for item in items:
        gains = []
        for document, reference in zip(item["documents"], item["values"]["reference"], strict=True):
            gains.append(sum(written_out(run.model, document)) - reference)
        for w, lower in zip(item["indices"]["better"], item["indices"]["worse"], strict=True):
            h = gains[w] - gains[lower]
            total, pairs = total + math.log1p(math.exp(-0.3 * h)), pairs + 1
            margin, right = margin + 0.3 * h, right + (h > 0)
    means = same_in_parts(run, items)
    assert means == pytest.approx({"loss": total / pairs, "margin": margin / pairs,
                                   "accuracy": right / pairs}, rel=1e-4, abs=1e-4)


# ----- Items and runs -----

@pytest.mark.parametrize("flags", KINDS)
def test_the_command_runs_and_starts_where_policy_and_reference_are_one(flags, command, candidates):
    folder = command("dpo", "--candidates", str(candidates), *flags)
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+DPO"]
    first, *_, last = data.read_records(folder / "log.jsonl")
    assert last["step"] == 2 and all(math.isfinite(first[name]) for name in ("loss", "norm"))
    if not flags:
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["margin"] == 0


def test_with_all_weights_in_bfloat16_it_starts_at_log_2_too(command, candidates):
    folder = command("dpo", "--candidates", str(candidates), "--full", "--dtype", "bfloat16",
                     "--no-evaluate", behind=False)
    first = data.read_records(folder / "log.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["margin"] == 0


def test_flags_that_would_change_nothing_are_refused(refused):
    refused("--label-smoothing changes nothing", "dpo", "--preference", "hinge",
            "--label-smoothing", "0.1")
    refused("--label-smoothing is 0.5", "dpo", "--label-smoothing", "0.5")


def test_it_reads_the_flags_of_the_candidates_and_its_own():
    cfg, method = train.parse_config(["--stage", "dpo", "--plain"])
    assert method.needs == "sft-ia" and method.title == "SFT(IA)+DPO"
    assert (cfg.preference, cfg.beta, cfg.pairs, cfg.max_worse) == ("sigmoid", 0.1, "best", 3)
