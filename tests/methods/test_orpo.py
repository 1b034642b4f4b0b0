"""orpo.py: trl's loss and gradients on random models, log odds at both ends, a short run."""

import json
import math
from types import MethodType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
from methods import collate, orpo
from model import save_model

# ----- Against trl -----

def random_pairs(rng):
    """Pairs of responses of different lengths; the prompt is one BOS.

    trl imitates the prompt, too. Nothing of a lone BOS is predicted, so the two are the same here.
    """
    def draw(n):
        return torch.randint(3, 64, (n,), generator=rng).tolist()
    return [(draw(a), draw(b)) for a, b in ((5, 2), (3, 7), (4, 4), (1, 6))]


def pair_items(pairs):
    """What orpo.items makes of pairs."""
    items = []
    for pair in pairs:
        documents = [{"input_ids": [1, *response], "labels": [data.IGNORE_INDEX, *response],
                      "truncated": 0} for response in pair]
        items.append({"documents": documents, "indices": {"better": [0], "worse": [1]}})
    return items


def trl_loss(folder, pairs, lam):
    """The loss of trl's trainer over the pairs, and the gradients of its model by name."""
    experimental = pytest.importorskip("trl.experimental.orpo", reason="trl is not installed")
    transformers = pytest.importorskip("transformers")
    policy, inputs = transformers.LlamaForCausalLM.from_pretrained(folder / "policy").eval(), {}
    for side, name in enumerate(("chosen", "rejected")):
        ids, mask = torch.zeros(len(pairs), 9).long(), torch.zeros(len(pairs), 9).long()
        for k, pair in enumerate(pairs):
            row = torch.tensor([1, *pair[side]])
            ids[k, :len(row)], mask[k, :len(row)] = row, 1
        labels = torch.where(mask == 1, ids, -100)
        labels[:, 0] = -100
        inputs |= {f"{name}_input_ids": ids, f"{name}_attention_mask": mask,
                   f"{name}_labels": labels}
    kind = experimental.ORPOTrainer
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x),
        beta=lam, is_encoder_decoder=False, aux_loss_enabled=False, padding_value=0,
        concatenated_inputs=kind.concatenated_inputs, get_batch_logps=kind.get_batch_logps)
    for name in ("concatenated_forward", "odds_ratio_loss"):
        setattr(trainer, name, MethodType(getattr(kind, name), trainer))
    loss, _ = kind.get_batch_loss_metrics(trainer, policy, inputs)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in policy.named_parameters()}


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_are_those_of_trl(seed, make_model, tmp_path):
    policy, pairs = make_model(64, seed), random_pairs(torch.Generator().manual_seed(seed))
    save_model(policy, tmp_path / "policy")
    batch, cfg = collate(pair_items(pairs), policy, "cpu"), SimpleNamespace(lam=0.4)
    terms = orpo.step(policy, batch, cfg)
    ours = terms["ce"] / orpo.count_tokens(batch, cfg) + terms["odds"] / len(pairs)
    ours.backward()
    theirs, slopes = trl_loss(tmp_path, pairs, 0.4)
    assert ours.item() == pytest.approx(theirs, rel=1e-6)
    for weight in policy.parameters():
        weight.data = weight.grad
    save_model(policy, tmp_path / "slopes")  # under the names that transformers has
    found = load_file(tmp_path / "slopes" / "model.safetensors")
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, atol=1e-6, rtol=1e-4)


# ----- The step -----

@pytest.mark.parametrize("x", [-2e-6, -1e-3, -0.5, -0.7, -3.0, -20.0, -80.0, -300.0])
def test_log_odds_are_exact_at_both_ends(x):
    given = torch.tensor(x, requires_grad=True)
    found = orpo.odds_logarithm(given)
    found.backward()
    x = given.item()
    assert found.item() == pytest.approx(x - math.log(-math.expm1(x)), rel=2e-6)
    assert given.grad.item() == pytest.approx(-1 / math.expm1(x), rel=1e-5)


def test_a_certain_answer_gives_finite_numbers():
    """P rounds to 1 where every token's probability does."""
    x = torch.tensor([0.0, -0.5], requires_grad=True)
    log_odds = orpo.odds_logarithm(x)
    torch.nn.functional.logsigmoid(log_odds[1] - log_odds[0]).backward()
    assert log_odds.isfinite().all() and x.grad.isfinite().all()


def test_a_step_equals_the_equation_and_micro_batches_change_nothing(
        ready, candidates, written_out, same_in_parts):
    run = ready("orpo", "--candidates", str(candidates), "--lam", "0.7")
    items = orpo.items(run)
    ce, tokens, odds, pairs, right = 0.0, 0, 0.0, 0, 0
    for item in items:
        logprobs = [written_out(run.model, document) for document in item["documents"]]
        for w, lower in zip(item["indices"]["better"], item["indices"]["worse"], strict=True):
            ce, tokens = ce - sum(logprobs[w]), tokens + len(logprobs[w])
            p, q = (math.exp(sum(x) / len(x)) for x in (logprobs[w], logprobs[lower]))
            ratio = math.log(p / (1 - p)) - math.log(q / (1 - q))
            odds, pairs = odds + 0.7 * math.log1p(math.exp(-ratio)), pairs + 1
            right += ratio > 0
    means = same_in_parts(run, items)
    wanted = {"ce": ce / tokens, "odds": odds / pairs, "accuracy": right / pairs}
    assert means == pytest.approx(wanted, rel=1e-4, abs=1e-4)


# ----- Runs -----

@pytest.mark.parametrize("flags", [(), ("--pairs", "all", "--condition", "own")])
def test_the_command_runs(flags, command, candidates):
    folder = command("orpo", "--candidates", str(candidates), *flags)
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+ORPO"]
    *_, last = data.read_records(folder / "log.jsonl")
    assert last["step"] == 2 and all(math.isfinite(last[name]) for name in ("ce", "odds", "norm"))


def test_wrong_flags_are_refused(refused):
    refused("--lam", "orpo", "--lam", "-1")
