"""Which of two outputs follows an instruction better? Evaluators of LLMBar (arXiv 2310.07641).

A pair is {input, output_1, output_2}, with a label 1 or 2 where people gave one, and source_1 and
source_2 where it is known which models wrote the outputs. It is judged in both orders. Its row
holds "winners", one for each order: "1", "2" or None (unread); whether it is a "draw"; what was
said in the "stages"; and "failures".
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import read_json
from extras.judges.judges import first_probability
from extras.judges.questions import FIRST_LOOK, TEXTS, Reply, Unread, make_question, read_reply
from judge import rouge_l

SUBSETS = ("Natural", "Neighbor", "GPTInst", "GPTOut", "Manual")  # LLMBar's
OUTPUTS, SOURCES = ("output_1", "output_2"), ("source_1", "source_2")
DRAW = ("2", "1")  # how LLMBar writes a draw: right in one order only


@dataclass(frozen=True)
class Strategy:
    """A way to compare two outputs; texts.toml names the combinations that are known."""

    kind: str = "verdict"  # "cot": explain first; "score": outputs one by one; or confer.FORMS
    rules: bool = True  # tell the judge what counts
    writes: list[str] | tuple = ()  # beforehand: "questions" to ask of outputs, a "reference"
    disagree: str = ""  # where the orders do: "verdict" or "cot" asks with both views; or "draw"
    examples: int = 0  # worked examples that are shown first
    published: str = ""  # its name in LLMBar
    rounds: int = 0  # how often those who confer speak, or how many layers there are
    roles: list[str] | tuple = ()  # who confers: names in [voices]
    width: int = 0  # aspects, at most
    window: int = 0  # a layer reads the reviews of aspects that are less than this apart
    pool: list[str] | tuple = ()  # annotators: the strategies they follow
    flips: float = 0.0  # and the share of their verdicts that is flipped


STRATEGIES = {name: Strategy(**row) for name, row in TEXTS["strategies"].items()}
PUBLISHED = {strategy.published: name for name, strategy in STRATEGIES.items()
             if strategy.published}
PROMPTS = TEXTS["pairs"] | TEXTS["confer"]
# Worked examples: the parts of a prompt, and the verdict on them.
EXAMPLES = [({"instruction": row["instruction"], "Output (a)": row["a"], "Output (b)": row["b"]},
             row["verdict"]) for row in TEXTS["examples"]]


def find_strategy(name: str) -> Strategy:
    """The strategy of that name, ours or LLMBar's. Raises ValueError that lists the names."""
    name = PUBLISHED.get(name, name)
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}. Strategies: {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]


def live_question(task: str, parts: dict[str, str], kind: str, **menu):
    """A question whose verdict carries a nonce; kind as in Strategy."""
    return make_question(task, parts, think=kind == "cot", **menu)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates pairs by a strategy; `make` and `read` are the form of verdicts.

    `verdicts` counts those that cannot be read, and stops where there are too many. A case is
    (pair, texts that were written about it beforehand, its row).
    """

    ask: Callable
    strategy: Strategy
    reask: int = 1
    sample: int = 0
    make: Callable = live_question
    read: Callable = read_reply
    verdicts: Unread | None = None
    peers: tuple[Unread, ...] = ()  # who confers, where that is not one model with itself

    def evaluate(self, pairs: list[dict]) -> list[dict]:
        """One row per pair."""
        from extras.judges import confer  # which builds on this module

        cases, strategy = [], self.strategy
        if strategy.kind in confer.FORMS:
            return confer.FORMS[strategy.kind](self, pairs)
        for pair in pairs:
            row = {"winners": [None, None], "draw": False, "stages": [], "failures": []}
            cases.append((pair, {}, row))
        for name in strategy.writes:
            self.write(cases, name)
        if strategy.kind == "score":
            self.score(cases)
        else:
            self.compare(cases, "compare", strategy.kind)
            disputed = [case for case in cases if set(case[2]["winners"]) == {"1", "2"}]
            if strategy.disagree == "draw":
                for _, _, row in disputed:
                    row.update(winners=list(DRAW), draw=True)
            elif strategy.disagree:
                self.compare(disputed, "synthesis", strategy.disagree)
        return [row for _, _, row in cases]

    def write(self, cases: list[tuple], name: str) -> None:
        """Let the judge write something about each instruction.

        As in LLMBar a truncated text still helps, and one that fails is empty; both count.
        """
        questions, length = [], {"questions": 150, "reference": 384}[name]
        for pair, _, _ in cases:
            questions.append(make_question(
                TEXTS["pairs"][name], {"instruction": pair["input"]}, max_tokens=length,
                system=TEXTS["question"]["writer"]))
        replies = self.ask(questions, sample=10 * self.sample)
        for (_, written, row), reply in zip(cases, replies, strict=True):
            written[name], failure = written_text(reply)
            row["stages"].append(written[name])
            if failure:
                row["failures"].append(f"{name}: {failure}")

    def judge(self, task: str, kind: str, parts: list[dict], verdicts: Unread | None = None,
              **menu) -> list[Reply]:
        """A reply with a verdict for each of the parts, by `verdicts` or the evaluator's own."""
        notes = [task] + ["rules"] * self.strategy.rules
        notes += [f"{name}_note" for name in self.strategy.writes]
        task = "\n\n".join(PROMPTS[note] for note in notes)
        questions = [self.make(task, part, kind, **menu) for part in parts]
        verdicts = verdicts or self.verdicts or Unread(self.ask, 1.0, self.reask)
        return verdicts.ask(questions, read=self.read, sample=10 * self.sample)

    def compare(self, cases: list[tuple], task: str, kind: str) -> None:
        """Ask which is better in both orders; write winners, texts and failures into the rows."""
        parts = []
        for pair, written, row in cases:
            for swapped in (False, True):
                views = show_views(row, swapped) if task == "synthesis" else {}
                parts.append(show_pair(pair, written, swapped) | views)
        menu = {"choices": ("a", "b")}
        if self.strategy.examples:
            menu["examples"] = EXAMPLES[:self.strategy.examples]
        replies = self.judge(task, kind, parts, **menu)
        for (_, _, row), first, second in zip(cases, replies[::2], replies[1::2], strict=True):
            row["winners"] = [{"a": "1", "b": "2"}.get(first.verdict),
                              {"a": "2", "b": "1"}.get(second.verdict)]
            row["stages"].append({"first": first.text, "second": second.text})
            row["failures"] += [reply.failure for reply in (first, second) if reply.failure]

    def score(self, cases: list[tuple]) -> None:
        """Score each output alone, 0 to 9; the higher score wins, equal ones are a draw."""
        parts = [{"instruction": pair["input"], **written, "output": pair[name]}
                 for pair, written, _ in cases for name in OUTPUTS]
        replies = self.judge("score", "score", parts, menu="[0-9]", shown="a digit from 0 to 9")
        for (_, _, row), one, two in zip(cases, replies[::2], replies[1::2], strict=True):
            row["stages"].append({"score_1": one.verdict or one.text,
                                  "score_2": two.verdict or two.text})
            row["failures"] += [reply.failure for reply in (one, two) if reply.failure]
            if one.verdict and two.verdict:
                decide(row, int(one.verdict), int(two.verdict))


def written_text(reply: Reply) -> tuple[str, str]:
    """What a helper wrote and why it failed, or ""; a text that was cut still helps."""
    text = reply.text
    if reply.failure in ("cut while thinking", "prompt cut by the server"):
        text = ""  # it says nothing of what was asked
    if text and reply.failure in ("", "cut at max_tokens"):
        return text, ""
    return text, reply.failure or "empty"


def evaluate_pairs(verdicts: Unread, pairs: list[dict], strategy: Strategy, *,
                   sample: int = 0, peers: tuple[Unread, ...] = ()) -> list[dict]:
    """One row per pair, by the live form of verdicts. `sample` numbers the repeats.

    The first few pairs are judged before helpers write about the others, so that a judge that
    cannot be read is not paid for to the end.
    """
    evaluator = Evaluator(verdicts.backend, strategy, sample=sample, verdicts=verdicts,
                          peers=peers)
    first = max(0, FIRST_LOOK - verdicts.asked) // 2
    return evaluator.evaluate(pairs[:first]) + evaluator.evaluate(pairs[first:])


def show_pair(pair: dict, written: dict, swapped: bool) -> dict[str, str]:
    """The parts of a prompt about a pair, in one of two orders."""
    a, b = OUTPUTS[::-1] if swapped else OUTPUTS
    return {"instruction": pair["input"], **written, "Output (a)": pair[a], "Output (b)": pair[b]}


def show_views(row: dict, swapped: bool) -> dict[str, str]:
    """What both judges said, first the one for the output that is shown as (a) now.

    A view from the other order calls the outputs by each other's letters; these are exchanged.
    """
    texts, other = list(row["stages"][-1].values()), 0 if swapped else 1
    texts[other] = re.sub(r"(?<=utput \()[ab](?=\))", lambda found: {"a": "b", "b": "a"}[found[0]],
                          texts[other])
    views = dict(zip(row["winners"], texts, strict=True))
    first, second = ("2", "1") if swapped else ("1", "2")
    return {"judge for (a)": views[first], "judge for (b)": views[second]}


def decide(row: dict, one: float, two: float) -> None:
    """Write the winner of two scores into a row."""
    row.update(draw=one == two, winners=["1" if one > two else "2"] * 2)
    if one == two:
        row["winners"] = list(DRAW)


def majority(evaluations: list[list[dict]]) -> list[dict]:
    """Several evaluators' rows as one: in each order the winner that most of them name.

    Unread verdicts do not vote. A tie in one order makes the pair a draw.
    """
    rows = []
    for found in zip(*evaluations, strict=True):
        stages = [row["winners"] for row in found]
        votes = [[winners[order] for winners in stages] for order in (0, 1)]
        rows.append({**elect(votes), "stages": stages, "failures": []})
    return rows


def elect(votes: list[list]) -> dict:
    """"winners" and "draw" of a row from the votes in either order, each "1", "2" or None.

    None does not count. A tie in one order makes the pair a draw.
    """
    winners, draw = [], False
    for some in votes:
        count = Counter(some)
        draw = draw or count["1"] == count["2"] > 0
        winner = "1" if count["1"] > count["2"] else "2"
        winners.append(winner if count["1"] + count["2"] else None)
    if draw:
        winners = [winner and DRAW[order] for order, winner in enumerate(winners)]
    return {"winners": winners, "draw": draw}


def preference_probabilities(ask: Callable, pairs: list[dict]) -> list[float | None]:
    """How probable it is that output_1 is the better one: soft labels (RLAIF, arXiv 2309.00267).

    The mean over both orders, against position bias. `ask` gives replies with their verdicts read.
    The probability of the letter counts where the backend knows it, else the verdict, 1 or 0. None
    where an order has no answer.
    """
    parts = [show_pair(pair, {}, swapped) for pair in pairs for swapped in (False, True)]
    questions = [make_question(TEXTS["pairs"]["compare"], part, choices=("a", "b"))
                 for part in parts]
    found = [first_probability(reply, "a") for reply in ask(questions)]
    return [None if None in (first, second) else (first + 1 - second) / 2
            for first, second in zip(found[::2], found[1::2], strict=True)]


# ----- Without a model: controls that a judge has to beat -----
PAIR_RULES = {"longer": lambda pair, text: len(text), "shorter": lambda pair, text: -len(text),
              "overlap": lambda pair, text: rouge_l(pair["input"], text)}


def evaluate_by_rule(pairs: list[dict], rule: str) -> list[dict]:
    """The rows of an Evaluator by one of PAIR_RULES. Raises ValueError for another."""
    if rule not in PAIR_RULES:
        raise ValueError(f"unknown rule {rule!r} for two outputs. Rules: {', '.join(PAIR_RULES)}.")
    rows = [{"stages": [], "failures": []} for _ in pairs]
    for pair, row in zip(pairs, rows, strict=True):
        decide(row, *(PAIR_RULES[rule](pair, pair[name]) for name in OUTPUTS))
    return rows


def load_pairs(path) -> dict[str, list[dict]]:
    """Labelled pairs by subset, as LLMBar has them. Raises ValueError for other data.

    path: LLMBar's repository or any folder in it (dataset.json in a folder per subset), a folder of
    such files named by subset (LLMBar_Natural.json), or one file.
    """
    path, subsets = Path(path), {}
    wanted = "a JSON list of {input, output_1, output_2, label 1 or 2; source_1, source_2 if known}"
    files = [path]
    if path.is_dir():
        files = sorted(path.rglob("dataset.json")) or sorted(path.glob("*.json"))
    for file in files:
        rows, name = read_json(file), file.stem.split("_")[-1]
        if file.name == "dataset.json":
            name = file.parent.name
        if name in subsets:
            raise ValueError(f"{file}: subset {name!r} is there twice. Rename one of the files.")
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{file} holds no list. Expected {wanted}.")
        for number, row in enumerate(rows):
            row = row if isinstance(row, dict) else {}
            kinds = [type(row.get(name)) for name in ("input", *OUTPUTS, "label")]
            kinds += [type(row.get(name, "")) for name in SOURCES]
            if kinds != [str, str, str, int, str, str] or row["label"] not in (1, 2):
                raise ValueError(f"{file}, record {number} is {json.dumps(rows[number])[:60]}. "
                                 f"Expected {wanted}.")
        names = ("input", *OUTPUTS, "label", *SOURCES)
        subsets[name] = [{key: row[key] for key in names if key in row} for row in rows]
    if not subsets:
        raise ValueError(f"no pairs at {path}. Give LLMBar's folder, or {wanted}.")
    known = [name for name in SUBSETS if name in subsets]
    return {name: subsets[name] for name in dict.fromkeys([*known, *subsets])}
