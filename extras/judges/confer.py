"""Evaluators that confer about a pair, once in each order of its outputs.

    debate      several roles speak in turn, `rounds` times; then they vote
                                                                 ChatEval, arXiv 2308.07201
    discussion  two reviewers; where they differ, they answer each other, at most `rounds` times
                                                                 PRD, arXiv 2307.02762
    layers      a scorer for each aspect; those of the next layer see the reviews of their
                neighbours; the mean of all scores decides       LLMEval^2, arXiv 2308.01862
    annotators  every pair goes to one of several evaluators, and a share of the verdicts is flipped
                                                                 AlpacaFarm, arXiv 2305.14387

Every remark stands between fences of its own, as the outputs do: it is material, gives no orders,
and cannot speak for others. Who speaks, how often and under which prompt is in texts.toml. With
several models (`Evaluator.peers`) the roles, reviewers and aspects go to them in turn, and every
kind of annotator is there with each of them.
"""

import json
import random
import re
from dataclasses import dataclass, field, replace
from itertools import product

from extras.judges.pairs import OUTPUTS, STRATEGIES, Evaluator, elect, show_pair, written_text
from extras.judges.questions import TEXTS, Unread, make_question

TWO_SCORES = r"[0-9][\s,;/]+(?:and\s+)?[0-9]"
SHOWN_SCORES = "two digits from 0 to 9, with a blank between, the first for Output (a),"
WRITTEN_LENGTH = 300  # tokens of what is said without a verdict
LIST_MARK = r"(?:[-*\u2022]\s+)?\d+[.)](?!\d)\s*|[-*\u2022]\s+"
OTHER = {"1": "2", "2": "1"}
SHOWN_AS = ({"a": "1", "b": "2"}, {"a": "2", "b": "1"})  # in either order


@dataclass
class Talk:
    """A pair in one of its two orders, and what was said about it.

    A remark is {"who", "text", "verdict", "failure"}.
    """

    parts: dict[str, str]
    order: int
    aspects: list[str] = field(default_factory=list)
    remarks: list[dict] = field(default_factory=list)

    def heard(self) -> dict[str, str]:
        """What was said so far, as parts of a prompt."""
        parts = {}
        for number, remark in enumerate(self.remarks, 1):
            choice = f", for Output ({remark['verdict']})" if remark["verdict"] else ""
            parts[f"remark {number} by the {remark['who']}{choice}"] = remark["text"]
        return parts

    def winner(self, letter: str | None) -> str | None:
        """The output, "1" or "2", that is shown as this letter here; None for None."""
        return SHOWN_AS[self.order].get(letter)


def open_talks(pairs: list[dict]) -> list[Talk]:
    """Two talks about each pair: one in each order."""
    return [Talk(show_pair(pair, {}, swapped=order == 1), order)
            for pair in pairs for order in (0, 1)]


def close_talks(talks: list[Talk], votes: list[list]) -> list[dict]:
    """Rows as those of an Evaluator; votes: of each talk, for "1", "2" or nobody (None)."""
    rows = []
    for number in range(0, len(talks), 2):
        first, second = talks[number:number + 2]
        stage = {"first": first.remarks, "second": second.remarks}
        failures = [x["failure"] for x in first.remarks + second.remarks if x["failure"]]
        rows.append({**elect(votes[number:number + 2]), "stages": [stage], "failures": failures})
    return rows


def find_peers(evaluator: Evaluator) -> tuple[Unread, ...]:
    """The models that confer."""
    return evaluator.peers or (evaluator.verdicts or Unread(evaluator.ask, 1.0, evaluator.reask),)


def speak(evaluator: Evaluator, talks: list[Talk], number: int, task: str, *,
          vote: bool = True) -> None:
    """Let role `number` of the strategy add a remark to each talk, with a verdict or without."""
    role, peers, parts = evaluator.strategy.roles[number], find_peers(evaluator), []
    peer = peers[number % len(peers)]
    system = f"{TEXTS['question']['judge']} {TEXTS['voices'][role]}"
    for talk in talks:
        parts.append(talk.parts if task == "compare" else talk.parts | talk.heard())
    if vote:
        replies = evaluator.judge(task, "cot", parts, peer, choices=("a", "b"), system=system)
    else:
        questions = [make_question(TEXTS["confer"][task], part, max_tokens=WRITTEN_LENGTH,
                                   system=system) for part in parts]
        replies = peer.backend(questions, sample=10 * evaluator.sample)
    for talk, reply in zip(talks, replies, strict=True):
        text, failure = written_text(reply)
        talk.remarks.append({"who": role, "text": text, "verdict": reply.verdict,
                             "failure": reply.failure if vote else failure})


# ----- Forms -----
def debate(evaluator: Evaluator, pairs: list[dict]) -> list[dict]:
    """ChatEval with its one-by-one order: whoever speaks has heard all that was said before."""
    talks, strategy = open_talks(pairs), evaluator.strategy
    for turn in range(strategy.rounds):
        last = turn == strategy.rounds - 1
        for number in range(len(strategy.roles)):
            speak(evaluator, talks, number, "debate_vote" if last else "debate", vote=last)
    votes = []
    for talk in talks:
        votes.append([talk.winner(x["verdict"]) for x in talk.remarks[-len(strategy.roles):]])
    return close_talks(talks, votes)


def discussion(evaluator: Evaluator, pairs: list[dict]) -> list[dict]:
    """PRD's peer discussion: two reviews, then turns until both name the same output.

    Two that never agree make a draw. A remark without a readable verdict changes no opinion.
    """
    talks, strategy = open_talks(pairs), evaluator.strategy
    for number in (0, 1):
        speak(evaluator, talks, number, "compare")  # without the other's review
    for turn in range(strategy.rounds):
        disputed = [talk for talk in talks if set(opinions(talk)) == {"a", "b"}]
        speak(evaluator, disputed, turn % 2, "discuss")
    return close_talks(talks, [list(map(talk.winner, opinions(talk))) for talk in talks])


def opinions(talk: Talk) -> list[str | None]:
    """What either reviewer said last: "a", "b" or None."""
    last = {}
    for number, remark in enumerate(talk.remarks):
        last[number % 2] = remark["verdict"] or last.get(number % 2)
    return [last[0], last[1]]


def layers(evaluator: Evaluator, pairs: list[dict]) -> list[dict]:
    """LLMEval^2's wide and deep network; one aspect is one neuron of each layer."""
    talks, strategy = open_talks(pairs), evaluator.strategy
    failures = name_aspects(evaluator, talks)
    for layer in range(strategy.rounds):
        score_layer(evaluator, talks, layer)
    rows = close_talks(talks, list(map(count_scores, talks)))
    for row, talk, failure in zip(rows, talks[::2], failures, strict=True):
        row["stages"].insert(0, talk.aspects)
        row["failures"] += failure
    return rows


def name_aspects(evaluator: Evaluator, talks: list[Talk]) -> list[list[str]]:
    """Let the first model name the aspects of each pair, for both orders; returns the failures."""
    width, failures = evaluator.strategy.width, []
    task = TEXTS["confer"]["aspects"].replace("{width}", str(width))
    questions = [make_question(task, talk.parts, max_tokens=150) for talk in talks[::2]]
    replies = find_peers(evaluator)[0].backend(questions, sample=10 * evaluator.sample)
    for first, second, reply in zip(talks[::2], talks[1::2], replies, strict=True):
        text, failure = written_text(reply)
        first.aspects = second.aspects = read_list(text)[:width]
        if not first.aspects:
            failure = failure or "empty"
        failures.append([f"aspects: {failure}"] if failure else [])
    return failures


def read_list(text: str) -> list[str]:
    """The different items of a list that a model wrote, in order.

    If any line has a number or a mark of a list, only such lines are items.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line for line in lines if re.match(LIST_MARK, line)]
    items = [re.sub(LIST_MARK, "", line).replace("**", "").strip() for line in marked or lines]
    return list(dict.fromkeys(filter(None, items)))


def score_layer(evaluator: Evaluator, talks: list[Talk], layer: int) -> None:
    """Add a remark for each aspect of each talk, with two digits as its verdict."""
    peers, strategy = find_peers(evaluator), evaluator.strategy
    before = [talk.remarks[-len(talk.aspects):] if layer else [] for talk in talks]
    for place in range(strategy.width):
        parts, seated = [], []
        for talk, reviews in zip(talks, before, strict=True):
            if place < len(talk.aspects):
                seated.append(talk)
                parts.append(aspect_parts(talk, place, reviews, strategy.window))
        task = "score_reviewed" if layer else "score_aspect"
        replies = evaluator.judge(task, "cot", parts, peers[place % len(peers)], menu=TWO_SCORES,
                                  shown=SHOWN_SCORES)
        for talk, reply in zip(seated, replies, strict=True):
            talk.remarks.append({"who": talk.aspects[place], "text": written_text(reply)[0],
                                 "verdict": reply.verdict, "failure": reply.failure})


def aspect_parts(talk: Talk, place: int, reviews: list[dict], window: int) -> dict[str, str]:
    """The parts of a prompt for one aspect, with those reviews of the layer before that are near.

    reviews: one for each aspect, or none in the first layer.
    """
    parts = talk.parts | {"aspect": talk.aspects[place]}
    for number, review in enumerate(reviews):
        if abs(number - place) < window:
            scores = f"\nScores: {review['verdict']}" if review["verdict"] else ""
            parts[f"review {number + 1}"] = f"{review['who']}: {review['text']}{scores}"
    return parts


def count_scores(talk: Talk) -> list[str | None]:
    """The vote of all scores together: for the output with more of them, or one for each."""
    scores = [re.findall("[0-9]", x["verdict"]) for x in talk.remarks if x["verdict"]]
    one, two = (sum(int(score[place]) for score in scores) for place in (0, 1))
    if one == two:
        return ["1", "2"] if scores else [None]
    return [talk.winner("a" if one > two else "b")]


def annotators(evaluator: Evaluator, pairs: list[dict]) -> list[dict]:
    """AlpacaFarm's pool: who judges a pair, and whether the verdict is flipped, is drawn.

    Both follow from the pair, but not its label, and from the number of the repeat. A row names
    its "annotator", and has "flipped" and, as they were before, the "unflipped" winners. Draws are
    not flipped.
    """
    peers, drawn, rows = find_peers(evaluator), {}, {}
    pool = list(product(evaluator.strategy.pool, peers))
    for place, pair in enumerate(pairs):
        seed = [evaluator.sample, *(pair[name] for name in ("input", *OUTPUTS))]
        dice = random.Random(json.dumps(seed))
        number, flip = dice.randrange(len(pool)), dice.random() < evaluator.strategy.flips
        drawn.setdefault(number, []).append((place, flip))
    for number in sorted(drawn):
        (name, peer), (places, flips) = pool[number], zip(*drawn[number], strict=True)
        # The first verdicts are spread over the pool, so they are counted together, below.
        quiet = Unread(peer.backend, 1.0, peer.reask)
        one = replace(evaluator, ask=peer.backend, strategy=STRATEGIES[name], verdicts=quiet,
                      peers=())
        title = f"{peer.name} {name}" if peer.name else name
        found = one.evaluate([pairs[place] for place in places])
        for place, flip, row in zip(places, flips, found, strict=True):
            winners = row["winners"]
            flip = flip and not row["draw"] and winners != [None, None]
            turned = [OTHER.get(winner) for winner in winners] if flip else winners
            rows[place] = row | {"annotator": title, "flipped": flip, "winners": turned,
                                 "unflipped": winners}
        peers[0].asked += quiet.asked
        peers[0].causes.update(quiet.causes)
    peers[0].look()
    return [rows[place] for place in range(len(pairs))]


FORMS = {"debate": debate, "discussion": discussion, "layers": layers, "annotators": annotators}
