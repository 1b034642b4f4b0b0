"""What a model reads that learns to judge: verdicts of exact rules, in the judge's own format."""

import judge as judging


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
