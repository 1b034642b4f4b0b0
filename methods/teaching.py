"""How a model is taught to judge, so that a small one can be its own judge later.

Answers to training inputs, right and wrong ones, with the verdicts of exact rules, become documents
in the format in which the self-judge asks (judge.py).
"""

import random

import data
import judge as judging


def judging_documents(run, n: int) -> list[dict]:
    """n documents in the self-judge's format: four answers to one training input each."""
    cfg, documents, by_input = run.cfg, [], {}
    rng = random.Random(f"judge/{cfg.seed}")
    # Tasks share inputs; the output of one is a tempting wrong answer to another.
    for task in run.tasks:
        for instance in task.instances:
            by_input.setdefault(instance.input, []).append(instance.outputs[0])
    for _ in range(n):
        task = rng.choice(run.tasks)
        pool = data.split_instances(task, "train")[:cfg.per_task] or task.instances
        instance = rng.choice(pool)
        target = instance.outputs[0]
        # Four answers to it, right ones and wrong ones.
        others = [text for text in by_input[instance.input] if text != target]
        outputs = [other.outputs[0] for other in pool]
        answers = answers_to_judge(target, same_task=outputs, same_input=others, rng=rng, n=4)
        judged = judged_by_rule(run, task, instance, answers, rng)
        # A quarter of the documents hides the target, so that the judge can do without.
        shown = target
        if rng.random() >= 0.75:
            shown = None
        segments = judge_document(task.definition, instance.input, shown, judged)
        documents.append(data.encode_document(run.tokenizer, segments, max_len=cfg.max_len))
    return documents


def judged_by_rule(run, task, instance, answers, rng) -> list[tuple]:
    """(answer, type, correct) by exact rules; one of the two is asked of each answer."""
    about = {
        "instruction": task.definition,
        "input": instance.input,
        "target": instance.outputs[0],
        "labels": task.labels,
    }
    rule, judged = judging.RuleJudge(run.cfg.rouge_threshold), []
    for text in answers:
        verdict = rule.verdict(about | {"response": text})
        if rng.random() < 0.5:
            judged.append((text, verdict.type, None))
        else:
            judged.append((text, None, verdict.correct))
    return judged


def answers_to_judge(target: str, *, same_task, same_input, rng, n: int) -> list[str]:
    """n answers: the target about half the time, else an error of the kinds that models make.

    same_input: outputs of other tasks for this input. same_task: outputs of this task for other
    inputs. An error is one of those, or the target with one word dropped or changed.
    """
    answers = []
    for _ in range(n):
        kind, words = rng.random(), target.split()
        if kind < 0.4:
            answer = target
        elif kind < 0.6 and same_input:  # right for another task
            answer = rng.choice(same_input)
        elif kind < 0.8 and len(words) > 1:  # one word changed, or dropped
            at = rng.randrange(len(words))
            other = rng.choice(rng.choice(same_task).split())
            words[at] = other if rng.random() < 0.7 else ""
            answer = " ".join(filter(None, words))
        else:  # right for another input
            answer = rng.choice(same_task)
        answers.append(answer)
    return answers


def judge_document(instruction: str, input: str, target: str | None,
                   judged: list[tuple[str, bool | None, bool | None]]) -> list[tuple[str, bool]]:
    """A training document that teaches judging, in the format in which the judge is asked.

    judged: (response, of the expected type, correct), None where that is not asked. Returns
    segments (text, is_label); the labelled ones are the keywords.
    """
    segments = [(judging.judge_prefix(instruction, input, target), False)]
    for response, expected, correct in judged:
        if expected is not None:
            word = judging.TYPE_WORDS[not expected]
            segments += [(judging.type_question(response), False), (word, True), ("\n", False)]
        if correct is not None:
            word = judging.VERDICT_WORDS[not correct]
            segments += [(judging.verdict_question(response), False), (word, True), ("\n", False)]
    return segments
