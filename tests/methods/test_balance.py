"""balance.py: no task and no label has most of the questions."""

from types import SimpleNamespace

import pytest

from methods import balance


@pytest.fixture
def run():
    """A run with a task of two labels, and others of free text."""
    tasks = [SimpleNamespace(name="mood", labels=["bad", "good"])]
    tasks += [SimpleNamespace(name=name, labels=None) for name in ("a", "b")]
    said = []
    return SimpleNamespace(cfg=SimpleNamespace(balance=True, stage="cat"), tasks=tasks, said=said,
                           say=said.append)


def group(task, best, number):
    """Two answers to a question, of which the first is best."""
    return [{"task": task, "id": str(number), "response": best, "reward": 2, "how": "rule"},
            {"task": task, "id": str(number), "response": "x", "reward": 0, "how": "rule"}]


def groups(task, *bests):
    """Groups with these best answers."""
    return [group(task, best, number) for number, best in enumerate(bests)]


def ids(found):
    """Which groups they are."""
    return [(answers[0]["task"], answers[0]["id"]) for answers in found]


def test_a_label_has_at_most_twice_as_many_questions_as_the_rarest(run):
    given = groups("mood", "good", "Good", "good.", "bad", "good", "good")
    assert ids(balance.balanced_groups(run, given)) == [("mood", k) for k in "013"]
    assert run.said == ["cat: balanced, 3 of 6 questions are kept."]


def test_an_answer_that_is_no_label_of_its_task_is_not_the_rarest_one(run):
    given = groups("mood", "good", "good", "bad", "bad", "the food", "good", "good", "good")
    assert ids(balance.balanced_groups(run, given)) == [("mood", k) for k in "0123456"]


def test_of_a_single_label_one_question_stays(run):
    assert ids(balance.balanced_groups(run, groups("mood", "good", "good", "good"))) == [
        ("mood", "0")]


def test_a_task_has_at_most_twice_as_many_as_the_median_task(run):
    given = groups("a", *"pqrstuvw") + groups("b", "y", "z") + groups("mood", "good", "bad")
    kept = ids(balance.balanced_groups(run, given))
    assert [task for task, _ in kept] == ["a"] * 4 + ["b"] * 2 + ["mood"] * 2
    assert kept == [x for x in ids(given) if x in kept]  # in their order


def test_without_the_flag_and_without_questions_nothing_changes(run):
    assert balance.balanced_groups(run, []) == []
    run.cfg.balance = False
    given = groups("mood", "good", "good", "good")
    assert balance.balanced_groups(run, given) is given and not run.said


def test_a_question_without_a_best_answer_has_no_label(run):
    given = groups("mood", *["good", "bad"] * 6)
    given[0][0]["reward"] = 1  # ranked, but not best
    assert len(balance.balanced_groups(run, given)) == 12
