"""What a self-judge is asked: the taught question, examples to put before it, and another form.

A question is a function (key, words) -> (prefix, suffix, keywords). key: (instruction, input,
target, or None where it is hidden, response). words: judge.TYPE_WORDS or VERDICT_WORDS, which name
what is asked, whatever the keywords of the question are. The prefix ends in a line break, and a
keyword begins with a space.
"""

import judge as judging
from judge import TYPE_WORDS, VERDICT_WORDS, flatten
from methods.judge_auc import train_order
from methods.teaching import judge_document

UNFIT = "I am happy to help with that ."  # the kind of answer that no instruction asks for


def taught_question(key: tuple, words: tuple) -> tuple:
    """The question of `judge.LocalJudge`, which --judge-share teaches."""
    question = judging.verdict_question
    if words == TYPE_WORDS:
        question = judging.type_question
    return judging.judge_prefix(*key[:3]), question(key[3]), words


def describe(key: tuple) -> str:
    """The instruction, its input, and the reference if it is shown."""
    text = f"Instruction: {flatten(key[0])}\n"
    if key[1].strip():
        text += f"Input: {flatten(key[1])}\n"
    if key[2] is not None:
        text += f"Reference answer: {flatten(key[2])}\n"
    return text


def yes_question(key: tuple, words: tuple) -> tuple:
    """The same in plain words, answered by yes or no."""
    asked = "Is the answer right?"
    if words == TYPE_WORDS:
        asked = "Is it the kind of answer that the instruction asks for, right or wrong?"
    return describe(key), f"Answer: {flatten(key[3])}\n{asked} yes or no:", (" yes", " no")


# ----- Examples -----
def judged_examples(run, shown: bool) -> dict:
    """{(instruction, what is asked): a right and a wrong answer to two train inputs, judged}.

    In the form that --judge-share teaches. Tasks whose train outputs are all the same have none.
    """
    rule, found = judging.RuleJudge(run.cfg.rouge_threshold), {}
    for task in run.tasks:
        rows, text = train_order(run, task), {TYPE_WORDS: "", VERDICT_WORDS: ""}
        for number, row in enumerate(rows[:2]):
            outputs, target = [other.outputs[0] for other in rows], row.outputs[0]
            wrong = [x for x in outputs if not rule.similar(x, target, task.labels)]
            if not wrong:
                continue
            reference = target if shown else None
            answers = {TYPE_WORDS: [(target, True, None), (UNFIT, False, None)],
                       VERDICT_WORDS: [(target, None, True), (wrong[0], None, False)]}
            for words, judged in answers.items():
                # the right answer comes first, in the second example last
                judged = judged[::1 - 2 * number]
                parts = judge_document(task.definition, row.input, reference, judged)
                text[words] += "".join(part for part, _ in parts)
        for words in text:
            found[task.definition, words] = text[words]
    return found
