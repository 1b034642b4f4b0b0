"""teaching.py: documents that teach judging."""

import random

import data
import judge as judging
from methods import teaching

IGNORE = data.IGNORE_INDEX


def test_judging_examples_carry_the_verdicts_of_rules(make_run):
    run = make_run("sft", "--judge-share", "0.5")
    targets = {(task.definition, x.input): x.outputs[0]
               for task in run.tasks for x in task.instances}
    words, shown = {"expected": 0, "unexpected": 0, "correct": 0, "incorrect": 0}, 0
    for document in teaching.judging_documents(run, 40):
        ids, labels = document["input_ids"], document["labels"]
        text = run.tokenizer.decode(ids)
        lines = dict(line[4:].split(": ", 1) for line in text.splitlines() if ": " in line)
        target = targets[lines["Instruction"], lines["Input"]]
        shown += "Reference" in lines
        assert lines.get("Reference", target) == target
        blocks = text.split("### Answer: ")[1:]
        assert len(blocks) == 4
        for block in blocks:
            answer, _, verdict = block.partition("\n")
            kind, _, word = verdict.strip().removeprefix("### ").partition(": ")
            assert kind in ("Type", "Verdict") and word in words
            words[word] += 1
            if kind == "Verdict":
                assert (word == "correct") == (answer == target)
        learnt = run.tokenizer.decode([label for label in labels if label != IGNORE]).split()
        assert len(learnt) == 4 and set(learnt) <= set(words)
    assert all(words.values()) and 20 < shown < 40


def test_answers_to_judge_are_right_or_wrong_in_the_ways_of_models():
    rng, target = random.Random(3), "anna has a hat"
    answers = teaching.answers_to_judge(target, same_task=["tom ran", "red"],
                                        same_input=["blue"], rng=rng, n=4000)
    share = answers.count(target) / 4000
    assert 0.37 < share < 0.43 and 0.17 < answers.count("blue") / 4000 < 0.23
    others = {x for x in answers if x not in (target, "blue", "tom ran", "red")}
    for answer in others:  # one word dropped or changed
        words = answer.split()
        assert len(words) in (3, 4)
        assert sum(word not in target.split() for word in words) <= 1
    assert "anna a hat" in others and "anna has red hat" in others


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
