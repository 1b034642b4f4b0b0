"""kto.py: trl's loss and gradients on random models, one z0 for a whole step, a short run."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import train
from methods import collate, document_logprobs, kto
from model import save_model

SETTINGS = SimpleNamespace(beta=0.4, desirable_weight=1.5, undesirable_weight=0.8)


# ----- Against trl -----

@pytest.fixture
def policies(tmp_path, make_model):
    """A policy and a reference, their folders in tmp_path."""
    models = []
    for seed, name in ((1, "policy"), (2, "reference")):
        models.append(make_model(64, seed))
        save_model(models[-1], tmp_path / name)
    return models


def random_rows(rng):
    """Six answers as (prompt, response, desirable) of token ids; some are desirable."""
    def draw(n):
        return torch.randint(3, 64, (n,), generator=rng).tolist()
    return [(draw(4), draw(n), n % 3 != 0) for n in (5, 2, 3, 7, 6, 4)]


def encode(prompt, response):
    """A document of the two."""
    return {"input_ids": prompt + response, "truncated": 0,
            "labels": [data.IGNORE_INDEX] * len(prompt) + response}


def kto_items(rows, reference):
    """What kto.items makes of answers, with the log-probabilities of the reference."""
    items = []
    for number, (prompt, response, desirable) in enumerate(rows):
        documents = [encode(prompt, response), encode(prompt, rows[number - 1][1])]
        with torch.no_grad():
            batch = collate([{"documents": documents}], reference, "cpu")
            sums, _ = document_logprobs(reference, batch)
        items.append({"documents": documents, "indices": {"own": [0], "other": [1]},
                      "values": {"desirable": [float(desirable)], "reference": sums.tolist()}})
    return items


def padded(documents, prefix):
    """The documents as trl's inputs."""
    ids, mask = torch.zeros(len(documents), 11).long(), torch.zeros(len(documents), 11).long()
    for k, document in enumerate(documents):
        row = torch.tensor(document["input_ids"])
        ids[k, :len(row)], mask[k, :len(row)] = row, 1
    completion = mask.clone()
    completion[:, :4] = 0
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask,
            f"{prefix}completion_mask": completion}


def trl_loss(folder, items):
    """The loss of trl's trainer over the items, and the gradients of its policy by name."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    transformers, tokenizers = map(pytest.importorskip, ("transformers", "tokenizers"))
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3")),
        pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    policy, reference = (transformers.LlamaForCausalLM.from_pretrained(folder / name)
                         for name in ("policy", "reference"))
    settings = trl.KTOConfig(output_dir=str(folder / "trl"), report_to=[], bf16=False, use_cpu=True,
                             gradient_checkpointing=False, per_device_train_batch_size=2,
                             **vars(SETTINGS))
    rows_of = pytest.importorskip("datasets").Dataset.from_list
    answers = [{"prompt": "w4 w5", "completion": f"w{n}", "label": n % 2 == 0} for n in (6, 7)]
    trainer = trl.KTOTrainer(model=policy, ref_model=reference, args=settings,
                             processing_class=tokenizer, train_dataset=rows_of(answers))
    own, other = zip(*(item["documents"] for item in items), strict=True)
    inputs = padded(own, "") | padded(other, "KL_")
    inputs["label"] = torch.tensor([item["values"]["desirable"][0] > 0 for item in items])
    loss = trainer._compute_loss(policy.eval(), inputs, False)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in policy.named_parameters()}


@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradients_are_those_of_trl(seed, policies, tmp_path):
    policy, reference = policies
    items = kto_items(random_rows(torch.Generator().manual_seed(seed)), reference)
    batch = collate(items, policy, "cpu")
    with torch.no_grad():
        total, count = kto.prepare(policy, batch, SETTINGS)["kl"]
    batch["statistics"] = {"kl": float(total) / count}
    assert (total > 0) == (seed in (0, 3))  # both sides of max(0, KL)
    ours = kto.step(policy, batch, SETTINGS)["loss"] / len(items)
    ours.backward()
    theirs, slopes = trl_loss(tmp_path, items)
    assert ours.item() == pytest.approx(theirs, abs=1e-6)
    for weight in policy.parameters():
        weight.data = weight.grad
    save_model(policy, tmp_path / "slopes")  # under the names that transformers has
    found = load_file(tmp_path / "slopes" / "model.safetensors")
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, atol=1e-7, rtol=1e-4)
    assert max(slope.abs().max() for slope in slopes.values()) > 1e-3


# ----- The step -----

@pytest.mark.parametrize("shift", [4.0, -4.0])
def test_a_step_equals_the_equation_and_micro_batches_change_nothing(
        shift, ready, candidates, written_out, same_in_parts):
    """z0 is the mean over the whole step, or 0 where that is below 0, however it is divided."""
    run = ready("kto", "--candidates", str(candidates), "--beta", "0.3",
                "--desirable-weight", "1.2", "--undesirable-weight", "0.7")
    items, ratios = kto.items(run), []
    for item in items:
        sums = [sum(written_out(run.model, document)) for document in item["documents"]]
        item["values"]["reference"] = [sums[0] + 1.0 - len(ratios) / 9, sums[1] - shift]
        ratios.append(len(ratios) / 9 - 1.0)
    z0, total = max(shift, 0.0), 0.0
    for item, r in zip(items, ratios, strict=True):
        if item["values"]["desirable"] == [1.0]:
            total += 1.2 * (1 - 1 / (1 + math.exp(-0.3 * (r - z0))))
        else:
            total += 0.7 * (1 - 1 / (1 + math.exp(-0.3 * (z0 - r))))
    means = same_in_parts(run, items)
    assert means == pytest.approx({"loss": total / len(items), "kl": z0}, rel=1e-4, abs=1e-4)


def test_z0_has_no_gradient(ready, candidates):
    run = ready("kto", "--candidates", str(candidates))
    batch = collate(kto.items(run), run.model, "cpu") | {"statistics": {"kl": 0.5}}
    logprobs, kept = torch.zeros(batch["documents"], requires_grad=True), kto.document_logprobs
    try:
        kto.document_logprobs = lambda model, batch: (logprobs, None)
        terms = kto.step(run.model, batch, run.cfg)
    finally:
        kto.document_logprobs = kept
    terms["loss"].backward()
    assert logprobs.grad[batch["own"]].abs().min() > 0
    assert logprobs.grad[batch["other"]].abs().max() == 0 and not terms["kl"].requires_grad


# ----- Items and runs -----

def prompt_of(document):
    """The token ids without a label."""
    pairs = zip(document["input_ids"], document["labels"], strict=True)
    return [token for token, label in pairs if label == data.IGNORE_INDEX]


def response_of(document):
    """The labels."""
    return [label for label in document["labels"] if label != data.IGNORE_INDEX]


def test_best_answers_are_desirable_and_others_are_answers_to_another_question(make_run, candidates,
                                                                        monkeypatch):
    run = make_run("kto", "--candidates", str(candidates))
    monkeypatch.setattr(kto, "add_reference", lambda run, items: items)
    found, wanted = kto.items(run), []
    for record in data.read_records(candidates):
        document = run.document(record["wording"], record["input"], record["response"])
        wanted.append((document["input_ids"], [float(record["reward"] == 2)]))
    made = [(x["documents"][0]["input_ids"], x["values"]["desirable"]) for x in found]
    assert sorted(made) == sorted(wanted) and made != wanted
    for number, item in enumerate(found):
        own, other = item["documents"]
        assert prompt_of(own) == prompt_of(other)
        back = [found[number - k] for k in range(1, len(found))]
        nearest = next(x for x in back if x["name"] != item["name"])
        assert response_of(other) == response_of(nearest["documents"][0])


def test_one_question_is_too_few(make_run, candidates, tmp_path):
    alone = tmp_path / "alone.jsonl"
    alone.write_text("\n".join(candidates.read_text().split("\n")[:3]) + "\n")
    run = make_run("kto", "--candidates", str(alone))
    with pytest.raises(ValueError, match=r"all answers are to .*/.* needs two questions"):
        kto.items(run)


def test_the_command_runs_and_starts_where_policy_and_reference_are_one(command, candidates):
    folder = command("kto", "--candidates", str(candidates))
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+KTO"]
    first, *_, last = data.read_records(folder / "log.jsonl")
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert last["step"] == 2 and math.isfinite(last["loss"])


def test_a_run_in_parts_is_the_run_in_one(command, candidates):
    logs = []
    for name, tokens in (("one", "4096"), ("parts", "32")):
        folder = command("kto", "--candidates", str(candidates), "--micro-tokens", tokens, out=name)
        logs.append([(x["loss"], x["kl"], x["norm"]) for x in
                     data.read_records(folder / "log.jsonl")])
    assert logs[0] == [pytest.approx(x, rel=1e-4, abs=1e-6) for x in logs[1]]


@pytest.mark.parametrize("words, wanted", [
    (("--beta", "0"), "--beta"), (("--desirable-weight", "-1"), "--desirable-weight")])
def test_wrong_flags_are_refused(words, wanted, refused):
    refused(wanted, "kto", *words)


def test_the_title_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        train.main(["--stage", "kto", "--help"])
    assert "lambda_D" in capsys.readouterr().out
