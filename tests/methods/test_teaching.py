"""teaching.py: documents that teach judging."""

import judge as judging
from methods import teaching


def test_a_document_asks_in_the_words_of_the_judge():
    judged = [("blue", True, False), ("red\nlamp", None, True), ("on monday", False, None),
              ("unasked", None, None)]
    segments = teaching.judge_document("name it", "a lamp", "red", judged)
    assert [text for text, is_label in segments if is_label] == [
        " expected", " incorrect", " correct", " unexpected"]
    assert "".join(text for text, _ in segments) == (
        judging.judge_prefix("name it", "a lamp", "red")
        + judging.type_question("blue") + " expected\n"
        + judging.verdict_question("blue") + " incorrect\n"
        + judging.verdict_question("red\nlamp") + " correct\n"
        + judging.type_question("on monday") + " unexpected\n")
