"""Judges and critics that answer in words: a server, or any other backend (questions.py)."""

from collections import Counter
from collections.abc import Callable

from extras.judges.questions import TEXTS, Reply, Unread, make_question
from judge import (
    TYPE_WORDS,
    JudgeConfig,
    RuleJudge,
    Verdict,
    gated_verdicts,
    normalize,
    two_way,
)

FAILED = "$ERROR$"  # no judgment came; such records are dropped and counted


class HttpJudge:
    """The questions of the self-judge, and whether two responses agree, answered in words.

    The run stops when more than `max_unparsed` of them cannot be read, see questions.Unread.
    """

    def __init__(self, ask: Callable, config: JudgeConfig | None = None, *, reask: int = 1,
                 max_unparsed: float = 0.1, name: str = "http"):
        self.config, self.name = config or JudgeConfig(), name
        self.verdicts = Unread(ask, max_unparsed, reask)

    def judge(self, items: list[dict]) -> list[Verdict]:
        """One verdict per item, as LocalJudge gives them.

        A response without a letter or digit, known to please judges, is wrong unasked.
        """
        asked = [item for item in items if not is_wordless(item)]
        verdicts = iter(gated_verdicts(asked, self.config, self.probabilities))
        wrong = Verdict(False, False, 0, "wordless")
        return [wrong if is_wordless(item) else next(verdicts) for item in items]

    def probabilities(self, keys, question, words) -> dict:
        """For `gated_verdicts`: {key: probability, 1.0 or 0.0 of a verdict in words, None: unread}.
        """
        texts, choices, questions = TEXTS["judge"], tuple(word.strip() for word in words), []
        for instruction, input, target, response in keys:
            parts = {"instruction": instruction, "input": input or None, "reference": target,
                     "response": response}
            task = texts["type"]
            if words != TYPE_WORDS:
                criterion = texts["without_target" if target is None else "with_target"]
                task = texts["correct"].format(criterion=criterion)
            parts = {name: text for name, text in parts.items() if text is not None}
            questions.append(make_question(task, parts, choices=choices))
        replies = self.verdicts.ask(questions)
        return {key: first_probability(reply, choices[0])
                for key, reply in zip(keys, replies, strict=True)}

    def similar_pairs(self, pairs: list[tuple[dict, str, str]]) -> list[bool | None]:
        """For each (question, first, second) whether they say the same, asked in this order only.

        None: no verdict could be read. A question holds `instruction` and `input`, where known.
        Raises JudgeStopped if that is so for all of them.
        """
        questions = []
        for known, first, second in pairs:
            parts = shown_parts(known) | {"first response": first, "second response": second}
            questions.append(make_question(TEXTS["judge"]["similar"], parts,
                                           choices=("same", "contradicted")))
        replies = self.verdicts.ask(questions)
        self.verdicts.finish()
        return [reply.verdict and reply.verdict == "same" for reply in replies]


def first_probability(reply: Reply, first: str) -> float | None:
    """How probable the first choice is, where the backend knows; else 1.0 or 0.0. None: unread."""
    if reply.verdict and reply.odds is not None:
        return two_way(reply.odds, 0.0)
    return reply.verdict and float(reply.verdict == first)


class HttpCritic:
    """Judgments in words."""

    name = "http"

    def __init__(self, ask: Callable, *, reask: int = 1, max_unparsed: float = 0.1):
        self.verdicts = Unread(ask, max_unparsed, reask)

    def critique(self, items: list[dict]) -> list[str | None]:
        """One judgment per item: None for satisfaction, FAILED for none, or a flaw not named."""
        questions = []
        for item in items:
            parts = shown_parts(item) | {"response": item["response"]}
            questions.append(make_question(TEXTS["judge"]["critic"], parts, think=True,
                                           choices=("perfect", "flawed")))
        judgments = []
        for reply in self.verdicts.ask(questions):
            judgment = reply.text if reply.verdict and reply.text else FAILED
            judgments.append(None if reply.verdict == "perfect" else judgment)
        return judgments


def shown_parts(item: dict) -> dict[str, str]:
    """The instruction and input of an item, where it has them, as parts of a prompt."""
    return {name: item[name] for name in ("instruction", "input") if item.get(name)}


# ----- How far to trust a judge -----
def is_wordless(item: dict) -> bool:
    """Whether a response has marks, but no letter or digit, while every known target has some."""
    texts = [item["response"], *(item.get("targets") or [item["target"] or "unknown"])]
    response, *targets = (any(map(str.isalnum, text)) for text in texts)
    return bool(item["response"].strip()) and not response and all(targets)


def canary_items(items: list[dict], n: int = 8) -> list[dict]:
    """Up to `n` questions among the items, each with half of the texts that say nothing.

    None is right, but such texts are known to please judges (arXiv 2507.08794).
    """
    canaries = []
    for number, item in enumerate(spread_questions(items, n)):
        right = list(map(normalize, known_targets(item)))
        # every other text, so that two questions have all of them
        for text in TEXTS["judge"]["canaries"][number % 2::2]:
            if normalize(text) not in right:
                canaries.append({**item, "response": text})
    return canaries


def wrong_items(items: list[dict], rule: RuleJudge, n: int = 36) -> list[dict]:
    """Up to `n` questions among the items, each with the target of another question as response.

    It is of the right kind: from the same task, for closed tasks another label. By `rule` it
    agrees with none of the question's own targets. Questions without such a text are left out.
    """
    by_task, found = {}, []
    for item in spread_questions(items, len(items)):
        by_task.setdefault(item["instruction"], []).append(item)
    for number, item in enumerate(spread_questions(items, len(items))):
        others = by_task[item["instruction"]]
        # begin at another place each time, so that no single text is the wrong answer to all
        for k in range(len(others)):
            text = others[(number + k) % len(others)]["target"]
            if text and not any(rule.similar(text, target) for target in known_targets(item)):
                found.append({**item, "response": text})
                break
    return spread_questions(found, n)


def spread_questions(items: list[dict], n: int) -> list[dict]:
    """Up to `n` different questions, evenly over the items, so that no task has them all."""
    first = {}
    for item in items:
        first[item["instruction"], item["input"]] = item
    questions = list(first.values())
    n = min(n, len(questions))
    return [questions[k * len(questions) // n] for k in range(n)]


def known_targets(item: dict) -> list[str]:
    """All known right answers to an item; [] for an input without a target."""
    return item.get("targets") or list(filter(None, [item["target"]]))


def confusion(items: list[dict], verdicts: list[Verdict], truths: list[Verdict]) -> dict:
    """A judge's verdicts against another's, the truths: {"all": counts, "asked": counts}.

    "asked" keeps each different item once, and only where the judge was really asked: exact
    matches, which are easy, and repeated answers flatter a judge. Counts: "n", and for "type",
    "correct" and "best" (reward 2) tp, fp, fn, tn, missing, accuracy, precision and recall.
    """
    everything, asked, found = list(zip(verdicts, truths, strict=True)), {}, {}
    for item, pair in zip(items, everything, strict=True):
        if pair[0].how in ("judged", "unparsed"):
            asked[item["instruction"], item["input"], item["target"], item["response"]] = pair
    for name, pairs in (("all", everything), ("asked", list(asked.values()))):
        found[name] = {"n": len(pairs)}
        for question in ("type", "correct", "best"):
            said = [tuple(read_answer(verdict, question) for verdict in pair) for pair in pairs]
            found[name][question] = count_agreement(said)
    return found


def read_answer(verdict: Verdict, question: str) -> bool | None:
    """A verdict's answer to a question of `confusion`; None where it is missing."""
    if question == "best":
        return None if verdict.reward is None else verdict.reward == 2
    return getattr(verdict, question)


def count_agreement(pairs: list[tuple]) -> dict:
    """Counts and ratios of (said, true) pairs of bool or None; a ratio without a case is None."""
    count = Counter(pairs)
    tp, fp = count[True, True], count[True, False]
    fn, tn = count[False, True], count[False, False]
    known = tp + fp + fn + tn
    found = {"tp": tp, "fp": fp, "fn": fn, "tn": tn, "missing": len(pairs) - known}
    for name, part, whole in (("accuracy", tp + tn, known), ("precision", tp, tp + fp),
                              ("recall", tp, tp + fn)):
        found[name] = part / whole if whole else None
    return found
