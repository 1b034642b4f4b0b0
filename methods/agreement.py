"""Agreement as a reward: an answer counts as right if it is the commonest to its question.

    r(y) = 2 if y is in C, else 0,   C the largest cluster of the answers Y to one question,
                                     if |C| >= max(2, share * |Y|), and no other is as large

The answers to a question are those to one input, under all wordings that it was sampled under, all
samples together; C is called a majority, whatever its share. Clusters are those
that MCR counts (eval.clusters). No target and no judge is needed, so `--unlabelled FILE` may name
inputs that nobody has answered. A question without such a cluster gives no rewards.

Sources: self-consistency as a preference, arXiv 2411.04109; majority votes as rewards, arXiv
2504.16084; consistency over prompts, arXiv 2205.00049. A majority can be wrong, and a model that
always says the same agrees with itself: see `tell`.
"""

from collections import Counter

import judge as judging
from eval import ask_pairs, clusters, extra, similarity

# One answer to nearly all questions of a task is warned about: to such a share of so many.
CROWDED, LEAST_QUESTIONS = 0.8, 5


def question_key(record: dict) -> tuple:
    """What the answers to one question have in common."""
    return record["task"], record["id"]


class AgreementJudge:
    """Rewards answers by how many others to the same question agree with them.

    similar: a judge with `similar_pairs`, as for CR. share: of a question's answers, the least that
    have to agree. All answers to a question have to be judged together.
    """

    name = "agreement"

    def __init__(self, similar, share: float):
        self.similar, self.share = similar, share

    def judge(self, items: list[dict]) -> list[judging.Verdict]:
        """One verdict per item; its reward is None where the question has no majority."""
        numbers, questions = {}, []  # {question: numbers of its items}
        for number, item in enumerate(items):
            numbers.setdefault(question_key(item), []).append(number)
        for some in numbers.values():
            question = items[some[0]] | {"responses": [], "numbers": [], "n": len(some)}
            for number in some:
                if is_whole(items[number]):
                    question["responses"].append(items[number]["response"])
                    question["numbers"].append(number)
            questions.append(question)
        found = [self.verdict(None)] * len(items)
        said = ask_pairs(questions, self.similar, "and")
        for some, question, pairs in zip(numbers.values(), questions, said, strict=True):
            members = self.majority(question, pairs)
            for number in some:
                found[number] = self.verdict(members and number in members)
        return found

    def majority(self, question: dict, said: dict) -> set[int] | None:
        """The numbers of the answers in the largest cluster; None if it is too small or tied."""
        similar = similarity(question["responses"], said, "and")
        found = sorted(clusters(similar), key=len, reverse=True)
        sizes = [*map(len, found), 0, 0]
        if sizes[0] < max(2, self.share * question["n"]) or sizes[0] == sizes[1]:
            return None
        return {question["numbers"][place] for place in found[0]}

    def verdict(self, agrees: bool | None) -> judging.Verdict:
        """The verdict on an answer; agrees: None where its question has no majority."""
        if agrees is None:
            return judging.Verdict(None, None, None, "majority")
        return judging.Verdict(None, agrees, 2 * int(agrees), "majority")


def is_whole(item: dict) -> bool:
    """Whether an answer can be in a majority: not if it is empty or truncated."""
    return bool(item["response"].strip()) and item.get("finished", True)


def make_judge(run) -> AgreementJudge:
    """The judge of the flags --agreement-by and --agreement-share."""
    cfg, similar = run.cfg, judging.RuleJudge(run.cfg.rouge_threshold)
    if cfg.agreement_by != "rule":
        similar = extra("judges", cfg.plain).pair_judge(run)
    return AgreementJudge(similar, cfg.agreement_share)


# ----- What there is to say without a target -----
def tell(run, records: list[dict]) -> None:
    """Say how many questions have a majority, and warn of answers that crowd out the others."""
    groups, shares, majorities = {}, [], []
    for record in records:
        groups.setdefault(question_key(record), []).append(record)
    for (task, _), group in groups.items():
        best = [record["response"] for record in group if record["reward"] == 2]
        if best:
            shares.append(len(best) / len(group))
            majorities.append((task, best))
    run.say(f"agreement: {len(shares)} of {len(groups)} questions have a majority, which has "
            f"{100 * sum(shares) / max(1, len(shares)):.0f} % of their answers in the mean.")
    for task, counts in commonest_answers(majorities).items():
        (text, count), = counts.most_common(1)
        if counts.total() >= LEAST_QUESTIONS and count >= CROWDED * counts.total():
            run.say(f"warning: {count} of {counts.total()} majorities of task {task} say {text!r}. "
                    "A model that always says the same agrees with itself: look at these answers, "
                    "and at those to other wordings.")


def commonest_answers(questions: list[tuple]) -> dict[str, Counter]:
    """{task: how many of its questions have each answer}, from [(task, responses), ...].

    The answer to a question is what most of its responses say; a question without any is left out.
    """
    found = {}
    for task, responses in questions:
        texts = Counter(map(judging.normalize, responses))
        for text, _ in texts.most_common(1):
            found.setdefault(task, Counter())[text] += 1
    return found
