"""LLMBar as published: the form of its verdicts, how its code reads them, its statistics.

For parity. `published_question` and `published_reply` are the `make` and `read` of an Evaluator;
`published_winners` is how LLMBar writes what could not be read. The prompts themselves are ours.
"""

import re
from dataclasses import replace

from extras.judges.meta import cohen_kappa
from extras.judges.questions import NO_VERDICT, make_question

# How a prompt ends that asks for a verdict of each kind.
ENDINGS = {
    "verdict": "Answer with Output (a) or Output (b) and nothing else.",
    "cot": 'Explain your view in a few sentences. Then end with the sentence "Output (a) is '
           'better." or "Output (b) is better."',
    "score": "Answer with the number and nothing else."}
# Where LLMBar's code looks for a verdict: anywhere in the text, in this order.
RULES = {"verdict": ((r"(?:^|\n) ?Output \(a\)", "a"), (r"(?:^|\n) ?Output \(b\)", "b")),
         "cot": ((r"Output \(a\) is better.", "a"), (r"Output \(b\) is better.", "b"))}


def published_question(task, parts, kind, **menu):
    """A question in the form that the published rules read; its menu is the kind of verdict."""
    made = make_question(task, parts)
    system, user = made.messages
    user = {"role": "user", "content": f"{user['content']}\n\n{ENDINGS[kind]}"}
    return replace(made, messages=[system, user], menu=kind, max_tokens=50 + 250 * (kind == "cot"))


def published_verdict(text, kind):
    """What LLMBar's code reads in a text: "a", "b", a score as it stands, or None."""
    if kind == "score":
        try:
            return str(int(text))
        except ValueError:
            return None
    for rule, side in RULES[kind]:
        if re.search(rule, text.strip()):
            return side
    return None


def published_reply(question, reply):
    """A reply read by the published rules, which read any text, truncated or not."""
    if not reply.text or reply.failure == "cut while thinking":
        return reply
    verdict = published_verdict(reply.text, question.menu)
    failure = NO_VERDICT if verdict is None else ""
    return replace(reply, text=reply.text.strip(), verdict=verdict, failure=failure)


def published_winners(row, kind):
    """The winners of a row as LLMBar has them: scores of which one is no number are 1 and 2.

    (Equal scores are 2 and 1.) Other verdicts that cannot be read stay None: they are wrong, and
    two of them agree.
    """
    return ["1", "2"] if kind == "score" and None in row["winners"] else row["winners"]


def llmbar_statistics(labels, winners):
    """What LLMBar's statistics.json holds, in its very strings.

    Its kappas with the label compare winners called 1 and 0 with labels called 1 and 2.
    """
    n, gold, found = len(labels), [str(label) for label in labels], {}

    def share(flags):
        return f"{sum(flags)} / {n} = {sum(flags) / n * 100}%"
    sides = {"False": [first for first, _ in winners], "True": [second for _, second in winners]}
    right = {name: [a == b for a, b in zip(side, gold, strict=True)]
             for name, side in sides.items()}
    coded = {name: [int(winner == "1") for winner in side] for name, side in sides.items()}
    for name in sides:
        found[f"correct_{name}"] = share(right[name])
        found[f"kappa_{name}"] = cohen_kappa(coded[name], labels)
    kappas = [found["kappa_False"], found["kappa_True"]]
    return found | {
        "correct_average": f"{(sum(right['False']) + sum(right['True'])) / 2 / n * 100}%",
        "correct_both": share([a and b for a, b in zip(*right.values(), strict=True)]),
        "equal": share([a == b for a, b in winners]),
        "kappa_average": None if None in kappas else sum(kappas) / 2,
        "kappa_agreement": cohen_kappa(*coded.values())}
