"""rrhf.py: its step against the equation and the golden numbers, short runs."""

import json

import pytest
import torch

from methods import collate, losses, rrhf


@pytest.mark.parametrize("reduction, ce", [("sum", 8.7850893872), ("mean", 8.7850893872 / 3)])
def test_golden_numbers(reduction, ce, golden, make_run):
    model, documents = golden()
    better, worse = losses.best_vs_lower_pairs([1, 3, 2, 0], rule="all")
    item = {"documents": documents, "indices": {"better": better, "worse": worse},
            "values": {"weights": [0.0, 1.0, 0.0, 0.0]}}
    cfg = make_run("rrhf", "--ft-reduction", reduction).cfg
    terms = rrhf.step(model, collate([item], model, "cpu"), cfg)
    assert terms["rank"].item() == pytest.approx(4.6952193440, rel=1e-6)
    assert terms["ce"].item() == pytest.approx(ce, rel=1e-6)


def test_the_released_code_divides_by_the_padded_length():
    """The deviation that rrhf.py names, reproduced here and nowhere else."""
    sums = torch.tensor([-5.8064740333, -8.7850893872, -12.7249884894, -3.7316307244],
                        dtype=torch.float64)
    better, worse = map(torch.tensor, losses.best_vs_lower_pairs([1, 3, 2, 0], rule="all"))
    rank = losses.pairwise_ranking_loss(sums / 8, better, worse)[0]
    assert rank.item() == pytest.approx(3.2523486933, abs=1e-8)
    assert -sums[1].item() / 8 == pytest.approx(1.0981361734, abs=1e-8)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_step_equals_the_equation_and_micro_batches_change_nothing(
        reduction, ready, candidates, written_out, same_in_parts):
    run = ready("rrhf", "--candidates", str(candidates), "--ft-reduction", reduction)
    rank, ce, items = 0.0, 0.0, rrhf.items(run)
    for item in items:
        terms = [written_out(run.model, document) for document in item["documents"]]
        means = [sum(x) / len(x) for x in terms]
        for k, reward in enumerate(item["values"]["rewards"]):
            for j, lower in enumerate(item["values"]["rewards"]):
                if lower < reward:
                    rank += max(0.0, means[j] - means[k])
        ce -= sum(terms[0]) if reduction == "sum" else means[0]
    means = same_in_parts(run, items)
    n = len(items)
    assert means == pytest.approx({"rank": rank / n, "ce": ce / n}, rel=1e-4) and rank > 0


@pytest.mark.parametrize("flags", [(), ("--ft-reduction", "mean", "--max-worse", "1")])
def test_the_command_runs(flags, command, candidates):
    folder = command("rrhf", "--candidates", str(candidates), *flags)
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+RRHF"]
