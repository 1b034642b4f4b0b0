"""label_free.py: what report.md says of a run without targets."""

from extras.reports.label_free import label_free_section


def group(task, *answers):
    """A question's answers, (text, reward) each."""
    return [{"task": task, "response": text, "reward": reward, "how": "majority"}
            for text, reward in answers]


def test_majorities_and_agreement_are_shown():
    groups = [group("mood", ("Good.", 2), ("good", 2), ("bad", 0)), group("mood", ("good", 2)),
              group("mood", ("bad", 2)), group("mood", ("x", None)), group("free", ("a | b", 2))]
    measured = [{"step": 0, "agreement": 0.5}, {"step": 10, "agreement": 0.61}]
    text = label_free_section(groups, measured)
    assert text.startswith("\n## What is known without targets\n\nAgreement is CR of greedy ")
    assert "| after step | agreement |\n| --- | --- |\n| 0 | 50.0 |\n| 10 | 61.0 |" in text
    assert "| mood | 4 | 3 | good (2), bad (1) |" in text
    assert "| free | 1 | 1 | a \\| b (1) |" in text


def test_nothing_is_said_of_nothing():
    assert label_free_section([], []) == ""
    assert "agreement" not in label_free_section([group("t", ("a", 0))], [])
    good = [{"task": "t", "response": "a", "reward": 1, "how": "label"}]  # best among labels
    assert "| t | 1 | 1 | a (1) |" in label_free_section([good], [])
