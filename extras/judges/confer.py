"""Evaluators that confer about a pair, once in each order of its outputs.

    debate      several roles speak in turn, `rounds` times; then they vote
                                                                 ChatEval, arXiv 2308.07201
    discussion  two reviewers; where they differ, they answer each other, at most `rounds` times
                                                                 PRD, arXiv 2307.02762
    layers      a scorer for each aspect; those of the next layer see the reviews of their
                neighbours; the mean of all scores decides       LLMEval^2, arXiv 2308.01862
    annotators  every pair goes to one of several evaluators, and a share of the verdicts is turned
                round                                            AlpacaFarm, arXiv 2305.14387

What is said stands between fences, as the outputs do: it is material, and gives no orders. Who
speaks, how often and under which prompt is in texts.toml. With several models (`Evaluator.peers`)
the roles, reviewers, aspects and annotators are given to them in turn.
"""

import random
import re
from dataclasses import dataclass, field, replace

from extras.judges.pairs import DRAW, STRATEGIES, Evaluator, elect, show_pair, written_text
from extras.judges.questions import TEXTS, Unread, make_question

TWO_SCORES = r"[0-9][\s,;/]+(?:and\s+)?[0-9]"
SHOWN_SCORES = "two digits from 0 to 9, with a blank between, the first for Output (a),"
WRITTEN_LENGTH = 300  # tokens of what is said without a verdict
OUTPUT = {"a": "Output (a)", "b": "Output (b)"}
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

    def transcript(self, remarks: list[dict] | None = None) -> str:
        """What was said, as text: all of it, or these remarks."""
        lines = []
        for remark in self.remarks if remarks is None else remarks:
            found = OUTPUT.get(remark["verdict"])
            choice = f" (finds {found} better)" if found else ""
            lines.append(f"{remark['who']}: {remark['text']}{choice}")
        return "\n\n".join(lines)

    def winner(self, letter: str | None) -> str | None:
        """The output, "1" or "2", that is shown as this letter here; None for None."""
        return SHOWN_AS[self.order].get(letter)


def open_talks(pairs: list[dict]) -> list[Talk]:
    """Two talks about each pair: one in each order."""
    return [Talk(show_pair(pair, {}, swapped=order == 1), order)
            for pair in pairs for order in (0, 1)]


def close_talks(talks: list[Talk], results: list[tuple]) -> list[dict]:
    """Rows as those of an Evaluator, from the (winner, whether it is a draw) of each talk."""
    rows = []
    for number in range(0, len(talks), 2):
        both = talks[number:number + 2]
        winners, draws = zip(*results[number:number + 2], strict=True)
        stage = dict(zip(("first", "second"), [talk.remarks for talk in both], strict=True))
        failures = [x["failure"] for talk in both for x in talk.remarks if x["failure"]]
        rows.append({"winners": list(winners), "draw": any(draws), "stages": [stage],
                     "failures": failures})
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
        said = {"what was said": talk.transcript()} if talk.remarks and task != "compare" else {}
        parts.append(talk.parts | said)
    if vote:
        replies = evaluator.judge(task, "cot", parts, peer, choices=("a", "b"), system=system)
    else:
        questions = [make_question(TEXTS["confer"][task], part, max_tokens=WRITTEN_LENGTH,
                                   system=system) for part in parts]
        replies = peer.backend(questions, sample=10 * evaluator.sample)
    for talk, reply in zip(talks, replies, strict=True):
        text, failure = (reply.text, reply.failure) if vote else written_text(reply)
        talk.remarks.append({"who": role, "text": text, "verdict": reply.verdict,
                             "failure": failure})


# ----- Forms -----
def debate(evaluator: Evaluator, pairs: list[dict]) -> list[dict]:
    """ChatEval with its one-by-one order: whoever speaks has heard all that was said before."""
    talks, strategy = open_talks(pairs), evaluator.strategy
    for turn in range(strategy.rounds):
        last = turn == strategy.rounds - 1
        for number in range(len(strategy.roles)):
            speak(evaluator, talks, number, "debate_vote" if last else "debate", vote=last)
    results = []
    for talk in talks:
        votes = [talk.winner(x["verdict"]) for x in talk.remarks[-len(strategy.roles):]]
        results.append(elect(votes, talk.order))
    return close_talks(talks, results)


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
    return close_talks(talks, [elect(list(map(talk.winner, opinions(talk))), talk.order)
                               for talk in talks])


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
    results = []
    for talk in talks:
        scores = [list(map(int, re.findall("[0-9]", x["verdict"])))
                  for x in talk.remarks if x["verdict"]]
        one, two = (sum(score[place] for score in scores) for place in (0, 1))
        votes = [talk.winner("a" if one > two else "b")] if one != two else ["1", "2"]
        results.append(elect(votes if scores else [], talk.order))
    rows = close_talks(talks, results)
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
        lines = [re.sub(r"^[\s\-*\u2022]*(?:\d+[.)])?\s*", "", line) for line in text.splitlines()]
        first.aspects = second.aspects = [line.strip() for line in lines if line.strip()][:width]
        if not first.aspects:
            failure = failure or "empty"
        failures.append([f"aspects: {failure}"] if failure else [])
    return failures


def score_layer(evaluator: Evaluator, talks: list[Talk], layer: int) -> None:
    """Add a remark for each aspect of each talk, with two digits as its verdict."""
    peers, made = find_peers(evaluator), {}
    seats = [(talk, place) for talk in talks for place in range(len(talk.aspects))]
    for number, peer in enumerate(peers):
        mine = [(talk, place) for talk, place in seats if place % len(peers) == number]
        parts = [aspect_parts(talk, place, layer, evaluator.strategy.window)
                 for talk, place in mine]
        replies = evaluator.judge("score_reviewed" if layer else "score_aspect", "cot", parts, peer,
                                  menu=TWO_SCORES, shown=SHOWN_SCORES)
        for (talk, place), reply in zip(mine, replies, strict=True):
            made[id(talk), place] = reply
    for talk, place in seats:
        reply = made[id(talk), place]
        talk.remarks.append({"who": talk.aspects[place], "text": reply.text,
                             "verdict": reply.verdict, "failure": reply.failure})


def aspect_parts(talk: Talk, place: int, layer: int, window: int) -> dict[str, str]:
    """The parts of a prompt for one aspect; from the second layer on with the reviews near it."""
    parts, width = talk.parts | {"aspect": talk.aspects[place]}, len(talk.aspects)
    if not layer:
        return parts
    before = talk.remarks[-width:]
    near = [remark for other, remark in enumerate(before) if abs(other - place) < window]
    return parts | {"reviews": talk.transcript(near)}


def annotators(evaluator: Evaluator, pairs: list[dict]) -> list[dict]:
    """AlpacaFarm's pool: who judges a pair, and whether the verdict is turned round, is drawn.

    Both follow from the pair and the number of the repeat. A row names its "annotator", and has
    "flipped" and, as they were before that, "unflipped" winners.
    """
    strategy, peers, drawn, rows = evaluator.strategy, find_peers(evaluator), {}, {}
    pool = [(name, number) for name in strategy.pool for number in range(len(peers))]
    for place, pair in enumerate(pairs):
        dice = random.Random(f"{evaluator.sample}/{pair['input']}/{pair['output_1']}")
        who, flipped = dice.choice(pool), dice.random() < strategy.flips
        drawn.setdefault(who, []).append((place, flipped))
    for who in sorted(drawn):
        name, number = who
        title = f"{name}, model {number + 1}" if len(peers) > 1 else name
        one = replace(evaluator, strategy=STRATEGIES[name], verdicts=peers[number], peers=())
        places, flips = zip(*drawn[who], strict=True)
        for place, flipped, row in zip(places, flips, one.evaluate([pairs[x] for x in places]),
                                       strict=True):
            winners = row["winners"]
            turned = [{"1": "2", "2": "1"}.get(x) for x in winners] if flipped else winners
            if row["draw"]:
                turned = list(DRAW)
            rows[place] = row | {"annotator": title, "flipped": flipped, "winners": turned,
                                 "unflipped": winners}
    return [rows[place] for place in range(len(pairs))]


FORMS = {"debate": debate, "discussion": discussion, "layers": layers, "annotators": annotators}
