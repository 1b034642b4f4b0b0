"""slic.py: its items, its step against the equation, golden numbers and trl's hinge."""

import json
from types import SimpleNamespace

import pytest
import torch

from methods import collate, slic


def test_golden_numbers(golden, make_run):
    model, documents = golden()
    item = {"documents": documents, "indices": {"better": [0], "worse": [1], "imitated": [2]}}
    cfg = make_run("slic", "--margin", "1", "--lam", "0.5").cfg
    terms = slic.step(model, collate([item], model, "cpu"), cfg)
    assert terms["rank"].item() == 0
    assert terms["ce"].item() == pytest.approx(6.3624942447, rel=1e-6)


def test_the_ranking_term_is_the_hinge_of_trl(golden, make_run):
    CPOTrainer = pytest.importorskip("trl.experimental.cpo", reason="trl is needed").CPOTrainer
    model, documents = golden()
    better, worse = [0, 1, 2, 3, 3], [1, 0, 3, 2, 0]
    item = {"documents": documents,
            "indices": {"better": better, "worse": worse, "imitated": better}}
    found = slic.step(model, collate([item], model, "cpu"), make_run("slic").cfg)["rank"]
    trainer = SimpleNamespace(alpha=0.0, beta=1.0, loss_type="hinge",
                              accelerator=SimpleNamespace(device="cpu"))
    sums = torch.tensor([-5.8064740333, -8.7850893872, -12.7249884894, -3.7316307244])
    wanted = CPOTrainer.cpo_loss(trainer, sums[better], sums[worse])[0].sum()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6) and wanted > 1


@pytest.mark.parametrize("flags", [(), ("--ce-target", "gold"), ("--length-normalize",),
                                   ("--margin", "0.3", "--lam", "2", "--pairs", "all",
                                    "--condition", "own")])
def test_a_step_equals_the_equation_and_micro_batches_change_nothing(
        flags, ready, candidates, written_out, same_in_parts):
    run = ready("slic", "--candidates", str(candidates), *flags)
    rank, ce, pairs, items = 0.0, 0.0, 0, slic.items(run)
    for item in items:
        scores = []
        for document in item["documents"]:
            terms = written_out(run.model, document)
            scores.append(sum(terms) / (len(terms) if run.cfg.length_normalize else 1))
        about = item["indices"]
        for w, lower, ref in zip(about["better"], about["worse"], about["imitated"], strict=True):
            rank += max(0.0, run.cfg.margin - scores[w] + scores[lower])
            ce, pairs = ce - run.cfg.lam * scores[ref], pairs + 1
    means = same_in_parts(run, items)
    assert means == pytest.approx({"rank": rank / pairs, "ce": ce / pairs}, rel=1e-4)


@pytest.mark.parametrize("condition", ["own", "original", "worse"])
def test_the_reference_output_is_imitated_beside_the_answers(condition, make_run, candidates):
    made = {}
    for target in ("best", "gold"):
        run = make_run("slic", "--candidates", str(candidates), "--condition", condition,
                       "--ce-target", target)
        made[target] = slic.items(run)
    for best, gold in zip(made["best"], made["gold"], strict=True):
        assert best["indices"]["imitated"] == best["indices"]["better"]
        assert gold["documents"][:-1] == best["documents"]
        assert set(gold["indices"]["imitated"]) == {len(best["documents"])}
        first = gold["documents"][gold["indices"]["better"][0]]
        assert gold["documents"][-1] == first  # here the best answer is the reference output


@pytest.mark.parametrize("flags", [(), ("--ce-target", "gold")])
def test_the_command_runs(flags, command, candidates):
    folder = command("slic", "--candidates", str(candidates), *flags)
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+SLiC"]
