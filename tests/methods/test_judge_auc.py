"""judge_auc.py: how well a self-judge tells right answers from wrong ones, before it is used."""

import json
import random

import numpy as np
import pytest

import data
import judge as judging
from methods import candidates, judge_auc


def counted(scores, right):
    """The AUC by counting pairs one by one."""
    wins = n = 0
    for a, is_right in zip(scores, right, strict=True):
        for b, also in zip(scores, right, strict=True):
            if is_right and not also:
                n += 1
                wins += 1 if a > b else 0.5 if a == b else 0
    return wins / n


def test_the_auc_is_the_share_of_pairs_in_the_right_order():
    rng = random.Random(1)
    for levels in (2, 5, 1000):  # few levels: many ties
        scores = [rng.randrange(levels) / levels for _ in range(60)]
        right = [rng.random() < 0.4 for _ in scores]
        found = judge_auc.auc(scores, right, list(range(60)))
        assert found["auc"] == pytest.approx(counted(scores, right))
        low, high = found["ci95"]
        assert low < found["auc"] < high


@pytest.mark.parametrize("scores, wanted", [
    ([0.9, 0.8, 0.1], 1.0), ([0.1, 0.2, 0.9], 0.0), ([0.5, 0.5, 0.5], 0.5), ([0.9, 0.1, 0.5], 0.5)])
def test_aucs_by_hand(scores, wanted):
    assert judge_auc.auc(scores, [True, True, False], list("abc"))["auc"] == wanted


def test_one_kind_of_answer_has_no_auc():
    for right in ([True, True], [False, False], []):
        found = judge_auc.auc([0.3] * len(right), right, list(range(len(right))))
        assert found == {"auc": None, "ci95": None}


def test_the_interval_is_of_questions_and_covers():
    """Answers that are repeated say nothing new; of 95 % intervals some 95 % hold the truth."""
    rng = np.random.default_rng(2)
    covered, true = 0, 0.7602  # Phi(1 / sqrt(2)) of two normal distributions one apart
    for _ in range(100):
        right = rng.random(60) < 0.5
        found = judge_auc.auc(rng.normal(right.astype(float)), right, list(range(60)))
        covered += found["ci95"][0] <= true <= found["ci95"][1]
    assert 88 <= covered
    scores = rng.normal(right.astype(float))
    once = judge_auc.auc(scores, right, list(range(60)))["ci95"]
    often = judge_auc.auc(np.tile(scores, 4), np.tile(right, 4), list(range(60)) * 4)["ci95"]
    assert often == pytest.approx(once)


@pytest.fixture
def measured(make_run, scored_stage):
    """A function that measures a judge that gives p(item), on answers that are set.

    Every other answer is the reference; returns what was said, the file and the keys.
    """
    def make(p, answer=None):
        run, said, asked = make_run(scored_stage, "--judge", "self"), [], []
        run.say = said.append
        (run.folder / "self_judge.json").unlink(missing_ok=True)

        def set_answers(run, records):
            found = []
            for number, record in enumerate(records):
                text = record["target"] if number % 2 else "grey"
                found.append(record | {"response": answer or text, "finished": True})
            return found

        class Judge(judging.LocalJudge):
            def probabilities(self, keys, question, words):
                asked.extend(keys)
                assert (question, words) == (judging.verdict_question, judging.VERDICT_WORDS)
                return {key: p(key) for key in keys}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(candidates, "answered", set_answers)
            for _ in range(2):  # what is there is not measured again
                judge_auc.measure(run, Judge(None))
        path = run.folder / "self_judge.json"
        return said, json.loads(path.read_text()) if path.exists() else None, asked
    return make


def test_a_good_judge_is_not_warned_about(measured):
    said, found, asked = measured(lambda key: 0.9 if key[2] == key[3] else 0.1)
    assert found["auc"] == 1 and found["passed_wrong"] == 0 < found["passed_right"]
    assert found["n"] == len(asked) and found["passed_right"] == found["right"]
    assert said == [f"self-judge: AUC 1.00 [1.00, 1.00] over {found['n']} sampled answers "
                    f"({found['right']} right); it accepts {found['right']} of {found['right']} "
                    f"right answers and 0 of {found['n'] - found['right']} wrong ones."]


def test_a_judge_that_knows_nothing_is_warned_about(measured):
    said, found, _ = measured(lambda key: 0.7)
    assert found["auc"] == 0.5 and found["passed_wrong"] == found["n"] - found["right"] > 0
    assert said[0].startswith("self-judge: AUC 0.50 [0.50, 0.50] over")
    assert said[1].startswith("warning: an AUC of 0.5 is chance, and the self-judge's is 0.50.")
    for flag in ("--judge agreement", "--judge http", "--judge rule", "--judge-share",
                 "--self-questions 2"):
        assert flag in said[1]


def test_what_cannot_be_measured_is_said(measured, make_run, scored_stage):
    said, found, _ = measured(lambda key: 0.7, "grey")
    assert found["auc"] is None and found["right"] == 0
    assert said == [f"warning: the self-judge's AUC is unknown over {found['n']} sampled answers "
                    "(0 right); an AUC needs right and wrong ones."]
    run, said = make_run(scored_stage, "--judge", "self"), []
    for task in run.tasks:
        task.instances = data.split_instances(task, "pool")
    run.say = said.append
    (run.folder / "self_judge.json").unlink()
    judge_auc.measure(run, judging.LocalJudge(None))
    assert said == ["warning: the self-judge's AUC is unknown: there are no train instances."]


def test_unread_answers_are_left_out(measured):
    _, whole, _ = measured(lambda key: 0.9 if key[2] == key[3] else 0.1)
    _, found, _ = measured(lambda key: 0.9 if key[2] == key[3] else None)
    assert found["n"] == found["right"] == whole["right"] and found["auc"] is None


def test_train_instances_alone_are_read_the_unseen_ones_first(make_run, scored_stage):
    run = make_run(scored_stage, "--judge", "self")
    parts = [judge_auc.train_instances(run, part) for part in (0, 1)]
    ids = [{x.id for _, x in part} for part in parts]
    train = {x.id for task in run.tasks for x in data.split_instances(task, "train")}
    assert ids[0] and ids[1] and not ids[0] & ids[1] and ids[0] | ids[1] <= train
    seen = {x["id"] for x in data.instruction_examples(
        run.tasks, wordings=0, augment="assign", per_task=8, seed=run.cfg.seed)}
    for part in parts:
        for task in run.tasks:
            marks = [x.id in seen for name, x in part if name is task]
            assert marks == sorted(marks) and not marks[0] and marks[-1]
    assert judge_auc.train_instances(run, 0) == parts[0]
    run.tasks = run.tasks * 80  # many tasks: every second one, one instance each
    assert len(judge_auc.train_instances(run, 0)) == 80


def test_measuring_changes_nothing_that_is_sampled_later(ready, scored_stage, monkeypatch):
    flags = ("--judge", "self", "--pool-per-task", "2", "--wordings", "1")
    files = []
    for measure in (judge_auc.measure, lambda run, judge: None):
        run = ready(scored_stage, *flags)
        (run.folder / "candidates.jsonl").unlink(missing_ok=True)
        monkeypatch.setattr(judge_auc, "measure", measure)
        candidates.collect(run)
        files.append((run.folder / "candidates.jsonl").read_bytes())
    assert files[0] == files[1] and (run.folder / "self_judge.json").exists()


def test_other_judges_are_not_measured(make_run, scored_stage):
    run = make_run(scored_stage, "--judge", "rule", "--pool-per-task", "2")
    candidates.collect(run)
    assert not (run.folder / "self_judge.json").exists()
