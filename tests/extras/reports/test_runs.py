"""What is reported of a run: error rates, masks, rewards against judges and rules."""

import json
from types import SimpleNamespace

import pytest

import data
from eval import DEMO
from extras.reports import report_judged, report_rewards, report_run
from extras.reports.plots import plot_training
from extras.reports.runs import (
    compare_rewards,
    next_command,
    report_candidates,
    report_length,
)
from methods import heads


def test_rewards_compared_by_hand():
    rows = [{"group": 0, "reward": 3.0, "judge": 2, "truth": 0, "length": 5},
            {"group": 0, "reward": 1.0, "judge": 0, "truth": 2, "length": 9},
            {"group": 1, "reward": 0.0, "judge": 1, "truth": 1, "length": 2},
            {"group": 1, "reward": 0.0, "judge": 0, "truth": 0, "length": 1}]
    found = compare_rewards(rows)
    assert found["accuracy"] == 0.75 and found["true_accuracy"] == 0.25  # a tie counts half
    assert found["longer_wins"] == 0.5 and found["comparisons"] == 2
    assert found["length_within"] == pytest.approx(-0.970143, abs=1e-6)
    assert compare_rewards(rows[:1])["accuracy"] is None
    assert compare_rewards([])["length_rank"] is None
    ranks = [{"group": 0, "reward": r, "judge": 0, "truth": 0, "length": n}
             for r, n in ((1.0, 4), (2.0, 3), (3.0, 3), (4.0, 1))]
    assert compare_rewards(ranks)["length_rank"] == pytest.approx(-0.948683, abs=1e-6)


def test_candidates_are_compared_with_exact_rules(make_run, candidates, tmp_path, capsys):
    run = make_run("cat", tmp_path / "run", "--candidates", str(candidates))
    report_candidates(run)  # without a report there is nothing to add to
    assert not (run.folder / "report.md").exists()
    (run.folder / "report.md").write_text("# Evaluation\n")
    report_candidates(run)
    found = json.loads((run.folder / "judge.json").read_text())
    records = data.read_records(candidates)
    assert found["all"]["n"] == len(records) and found["all"]["best"]["tp"] > 0
    text = (run.folder / "report.md").read_text()
    assert text.startswith("# Evaluation\n\n## How far to trust the judge")


@pytest.mark.parametrize("stage, judged_too", [("cat", True), ("ppo", False), ("sft", False)])
def test_a_run_gets_curves_of_all_its_stages_and_a_page_on_its_judge(
        stage, judged_too, make_run, candidates, tmp_path):
    pytest.importorskip("matplotlib")
    more = ["--candidates", str(candidates)] if stage != "sft" else []
    run = make_run(stage, tmp_path / "run", "--judge-share", "0", *more)
    row = {"stage": stage, "step": 0, "ce": 1.0, "norm": 1.0, "lr": 1e-3, "tokens": 9,
           "seconds": 0.1}
    for folder in (run.folder, run.folder / "sft-ia"):
        folder.mkdir(exist_ok=True)
        data.append_records(folder / "log.jsonl", [row, row | {"step": 1}])
    report_run(run)
    assert {str(path.relative_to(run.folder)) for path in run.folder.rglob("*.png")} == {
        "plots/training.png", "sft-ia/plots/training.png"}
    assert (run.folder / "judge.json").exists() == judged_too
    assert (run.folder / "length.json").exists() == judged_too


def test_held_out_losses_are_drawn_beside_their_terms():
    pytest.importorskip("matplotlib")
    rows = [{"stage": "sft", "step": k, "ce": 3.0 - k, "norm": 1.0} for k in range(4)]
    plain = [axes for axes in plot_training(rows).axes if axes.get_visible()]
    for k in (1, 3):
        rows[k]["validation_ce"] = 3.5 - k
    panels = [axes for axes in plot_training(rows).axes if axes.get_visible()]
    assert [x.get_title() for x in panels] == [x.get_title() for x in plain] == ["ce", "norm"]
    lines = {x.get_label(): (list(x.get_xdata()), list(x.get_ydata())) for x in panels[0].lines}
    assert lines == {"trained on": ([0, 1, 2, 3], [3, 2, 1, 0]), "held out": ([1, 3], [2.5, 0.5])}
    assert panels[0].get_legend() and not panels[1].get_legend() and len(panels[1].lines) == 1


@pytest.mark.parametrize("more, wanted", [
    ({"model": f"{DEMO}/base", "tasks": f"{DEMO}/tasks"},
     "python eval.py --adapter 'runs/a b' --split test"),
    ({}, "python eval.py --model m --adapter 'runs/a b' --tasks t --paraphrases p "
         "--max-new-tokens 9 --rouge-threshold 0.7 --split test"),
    ({"paraphrases": ""}, "python -m tools.chat --model m --adapter 'runs/a b'")])
def test_the_next_command(more, wanted):
    settings = {"model": "m", "tasks": "t", "paraphrases": "p", "out": "runs/a b", "full": False,
                "max_new_tokens": 9, "rouge_threshold": 0.7}
    assert next_command(SimpleNamespace(**settings | more)) == wanted


def test_soft_labels_have_no_rewards_to_compare(make_run, tmp_path):
    row = {"task": "t", "id": "1", "number": 0, "instruction": "do", "input": "x",
           "probability": 0.9, "first": {"wording": "w", "response": "a"},
           "second": {"wording": "w", "response": "b"}}
    data.append_records(tmp_path / "soft.jsonl", [row])
    run = make_run("reward", tmp_path / "run", "--preferences", str(tmp_path / "soft.jsonl"))
    report_run(run)
    assert not (run.folder / "judge.json").exists()


def test_every_run_on_candidates_says_how_far_rewards_follow_length(make_run, candidates, tmp_path):
    run = make_run("cat", tmp_path / "run", "--candidates", str(candidates))
    report_length(run)  # without a report the figures alone
    (run.folder / "report.md").write_text("# Evaluation\n")
    report_length(run)
    found = json.loads((run.folder / "length.json").read_text())
    records = data.read_records(candidates)
    rewards = [record["reward"] for record in records]
    assert found["any"] == pytest.approx(sum(rewards) / len(rewards)) and found["best"] == 2
    text = (run.folder / "report.md").read_text()
    assert text.startswith("# Evaluation\n\n## Reward and length\n\nCorrelation")
    (run.folder / "length.json").unlink()
    rows = [record | {"reward": None} for record in records]
    data.append_records(tmp_path / "none.jsonl", rows)
    report_length(make_run("cat", tmp_path / "run", "--candidates", str(tmp_path / "none.jsonl")))
    assert not (run.folder / "length.json").exists()


def test_plain_numbers_are_not_compared_with_verdicts(make_run, candidates, tmp_path):
    rows = [row | {"how": "scored", "reward": 0.5} for row in data.read_records(candidates)]
    data.append_records(tmp_path / "scored.jsonl", rows)
    run = make_run("cat", tmp_path / "run", "--candidates", str(tmp_path / "scored.jsonl"))
    report_candidates(run)
    assert not (run.folder / "judge.json").exists()


def test_the_rewards_of_a_reward_model(make_run, candidates, tmp_path, monkeypatch):
    run = make_run("reward", tmp_path / "run", "--candidates", str(candidates))
    records = data.read_records(candidates)
    monkeypatch.setattr(heads, "open_reward_model", lambda run, folder: None)
    monkeypatch.setattr(heads, "reward_scores", lambda run, model, records: [
        2.0 * record["reward"] for record in records])
    report_rewards(run)
    found = json.loads((run.folder / "rewards.json").read_text())
    assert list(found) == ["held out", "trained on"]
    assert found["trained on"]["accuracy"] == 1.0
    pairs = sum(part["comparisons"] for part in found.values())
    assert pairs == len(records) // 4 * 5  # of the rewards 2, 0, 1, 0 five pairs differ


def test_error_rates_are_what_exact_match_leaves(make_run, judged, tmp_path, capsys):
    out = tmp_path / "run"
    run = make_run("critic", out, "--records", str(judged))
    report_judged(run, {"base": None})
    found = json.loads((out / "metrics.json").read_text())["base"]
    assert found["error_rate"]["mean"] == 1 - found["exact_match"]["mean"]
    assert found["error_rate"]["n"] == 6 and 0 <= found["sampled_error_rate"]["mean"] <= 1
    low, high = found["exact_match"]["ci95"]
    assert found["error_rate"]["ci95"] == [1 - high, 1 - low]
    assert "base                     errors: greedy" in capsys.readouterr().out
    assert not (out / "mask.json").exists()


def test_a_method_that_flags_tokens_gets_masks(make_run, judged, tmp_path):
    import lora
    from methods import open_model

    out = tmp_path / "run"
    run = make_run("cut", out, "--records", str(judged))
    model = lora.apply_lora(open_model(run.cfg), lora.LoraConfig(rank=2))
    lora.save_adapter(model, out)
    report_judged(run, {"base": None, "CUT": out})
    scores = json.loads((out / "mask.json").read_text())
    assert list(scores) == ["CUT"] and len(scores["CUT"]) >= 8
    assert {"lam", "precision", "recall", "n"} == scores["CUT"][0].keys() and scores["CUT"][0]["n"]
    assert (out / "plots/mask.png").exists()


def test_masks_without_a_known_truth_have_no_plot(make_run, judged, tmp_path):
    import lora
    from extras.reports.runs import measure_masks
    from methods import open_model

    rows = [{name: row[name] for name in ("instruction", "input", "response", "judgment")}
            for row in data.read_records(judged)]
    data.append_records(tmp_path / "plain.jsonl", rows)
    run = make_run("cut", tmp_path / "run", "--records", str(tmp_path / "plain.jsonl"))
    model = lora.apply_lora(open_model(run.cfg), lora.LoraConfig(rank=2))
    lora.save_adapter(model, run.folder)
    measure_masks(run, {"CUT": run.folder})
    scores = json.loads((run.folder / "mask.json").read_text())["CUT"]
    assert {score["n"] for score in scores} == {0}
    assert not (run.folder / "plots/mask.png").exists()
