"""preference.py: the forms of the loss, and the reference."""

import pytest
import torch

import data
from methods import preference


@pytest.mark.parametrize("kind, beta, e, wanted", [
    ("sigmoid", 0.1, 0.0, 0.4263847502), ("sigmoid", 0.1, 0.1, 0.4895504577),
    ("sigmoid", 0.5, 0.0, 0.0416202817), ("robust", 0.1, 0.1, 0.3474276159),
    ("ipo", 0.1, 0.0, 1.7333585244), ("hinge", 0.05, 0.0, 0.6841714628)])
def test_golden_preferences(kind, beta, e, wanted):
    h = torch.tensor([6.3165707442], dtype=torch.float64)
    assert preference.preference_loss(h, kind, beta, e).item() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "ipo", "hinge"])
def test_preference_losses_at_the_extremes_and_their_gradients(kind):
    def loss(h):
        return preference.preference_loss(h, kind, 0.3, 0.1)
    assert torch.autograd.gradcheck(loss, torch.randn(5, dtype=torch.float64).requires_grad_())
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    value = loss(far)
    value.backward()
    assert value.isfinite() and far.grad.isfinite().all()
    assert loss(torch.zeros(0)).item() == 0


def test_margin_and_accuracy_of_pairs():
    found = preference.pair_metrics(torch.tensor([2.0, -1.0, 0.0, 3.0]), 0.5)
    assert found["margin"] == 2.0 and found["accuracy"] == 2


# ----- The reference -----

def test_the_reference_is_the_model_as_it_is_now(ready, scored_stage, candidates, written_out):
    run = ready(scored_stage, "--candidates", str(candidates))
    items = run.method.items(run)
    items[0]["values"] = {"weights": [1.0]}
    found = preference.add_reference(run, items)
    assert found is items and len(items) == 10 and items[0]["values"]["weights"] == [1.0]
    for item in items:
        for document, reference in zip(item["documents"], item["values"]["reference"],
                                       strict=True):
            assert reference == pytest.approx(sum(written_out(run.model, document)), abs=1e-3)
    assert preference.add_reference(run, []) == []


def test_the_reference_sees_no_dropout(ready, scored_stage, candidates):
    found = []
    for dropout in ("0", "0.5"):
        run = ready(scored_stage, "--candidates", str(candidates), "--dropout", dropout)
        run.model.train()
        items = preference.add_reference(run, run.method.items(run))
        found.append([item["values"]["reference"] for item in items])
    assert found[0] == found[1]


def test_only_items_that_some_step_sees_have_a_reference(ready, scored_stage, candidates):
    run = ready(scored_stage, "--candidates", str(candidates), "--steps", "2", "--batch-size", "2")
    items = preference.add_reference(run, run.method.items(run))
    seen = {i for step in (0, 1) for i in data.batch_indices(len(items), 2, step, 0)}
    assert {i for i, item in enumerate(items) if "reference" in item.get("values", {})} == seen
    assert len(seen) == 4 < len(items) == 10
