"""Is a response of the expected type, and is it correct? Prompts, verdicts, the self-judge and the rule judge.

Methods:
    LocalJudge            two questions to a model, answered by the probability of a keyword    CAT, arXiv 2403.14221
    combine_reward        the two answers as a reward 0, 1, 2                                   its author's code
    RuleJudge             exact match for labels, ROUGE-L for free text: offline, no model
    RuleCritic, LocalCritic   judgments in words, by rule or by a model                         CUT, arXiv 2312.14591
    similarity_matrix     which responses to one question agree; feeds CR and MCR               CAT, section on metrics
    confusion             one judge measured against another

Strings only: no tensors, no files. The model comes in as the callable `ask`. An item is a dict with `instruction`,
`input`, `target`, `response` and, for RuleJudge, optionally `targets` and `labels` (lists).
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from rouge_score.rouge_scorer import RougeScorer

TYPE_WORDS = (" expected", " unexpected")
VERDICT_WORDS = (" correct", " incorrect")

TASK = ("### Task: judge each answer . type : expected if it is the kind of answer that the instruction asks for , "
        "else unexpected . verdict : correct if it {criterion} , else incorrect .\n")
WITH_TARGET = TASK.format(criterion="agrees with the reference")
WITHOUT_TARGET = TASK.format(criterion="answers the instruction rightly")

SHORT_WORDS = 2                 # answers of up to so many words are compared exactly: ROUGE ignores signs (-5 and 5)
LENGTH_FACTOR = 3               # free text of a third to three times the target's length is of the expected type


@dataclass
class JudgeConfig:
    """How the self-judge is asked and how its answers become a reward."""

    mode: Literal["gated", "sum"] = field(default="gated", metadata={"help": "unexpected type gives 0, or both add up"})
    steps: Literal["two", "one"] = field(default="two", metadata={"help": "ask type and verdict, or verdict only"})
    show_target: bool = field(default=True, metadata={"help": "let the judge read the target"})
    exact_is_best: bool = field(default=True, metadata={"help": "a response equal to the shown target gets 2 unasked"})
    threshold: float = field(default=0.5, metadata={"help": "expected, correct count if more probable than this"})

    def __post_init__(self):
        if self.mode not in ("gated", "sum") or self.steps not in ("two", "one"):
            raise ValueError(f"judge mode {self.mode!r}, steps {self.steps!r}: use gated or sum, and two or one.")


VERDICTS = ("exact", "empty", "judged", "unparsed", "rule")     # how a reward of 0, 1, 2 came about; unparsed: no answer


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one response; None means not asked, or not answered."""

    type: bool | None               # of the expected type
    correct: bool | None
    reward: float | None            # 0, 1, 2, or a ScoreJudge's number; None is missing, never guessed
    how: str                        # one of VERDICTS, or "scored"
    p_expected: float | None = None
    p_correct: float | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def flatten(text: str) -> str:
    """Text on one line and without "###", so that nothing under judgment can open a section of the prompt."""
    return re.sub("#{3,}", "#", " ".join(text.split()))


def judge_prefix(instruction: str, input: str, target: str | None) -> str:
    """Everything before the answer: the same for all responses of a group. A target of None is hidden."""
    text = (WITHOUT_TARGET if target is None else WITH_TARGET) + f"### Instruction: {flatten(instruction)}\n"
    if input.strip():
        text += f"### Input: {flatten(input)}\n"
    if target is not None:
        text += f"### Reference: {flatten(target)}\n"
    return text


def type_question(response: str) -> str:
    """The suffix to judge_prefix that TYPE_WORDS answer."""
    return f"### Answer: {flatten(response)}\n### Type:"


def verdict_question(response: str) -> str:
    """The suffix to judge_prefix that VERDICT_WORDS answer."""
    return f"### Answer: {flatten(response)}\n### Verdict:"


def judge_document(instruction: str, input: str, target: str | None,
                   judged: list[tuple[str, bool | None, bool | None]]) -> list[tuple[str, bool]]:
    """A training document of several judged answers (response, type, correct), in the format the judge is asked in.

    True is the first word of TYPE_WORDS or VERDICT_WORDS, False the second, None is not asked; an answer with both
    appears twice. Returns segments (text, is_label), where the labelled ones are the keywords.
    """
    segments = [(judge_prefix(instruction, input, target), False)]
    for response, *answers in judged:
        for question, words, answer in zip((type_question, verdict_question), (TYPE_WORDS, VERDICT_WORDS), answers):
            if answer not in (True, False, None):
                raise ValueError(f"judged answer {answer!r} for {response!r} is no verdict; use True, False or None.")
            if answer is not None:
                segments += [(question(response), False), (words[0] if answer else words[1], True), ("\n", False)]
    return segments


# ---------------------------------------------------------------------------------------------------------------------
# Reward


def combine_reward(expected: bool | None, correct: bool | None, *, mode: str = "gated") -> int | None:
    """The reward 0, 1, 2 of two verdicts; None (missing) where it cannot be told.

    gated: not expected -> 0 whatever the correctness; expected -> 1, and 2 if correct; expected with no answer on
    correctness -> 1; no answer on type -> None. These are the rules of the CAT author's code, which writes -1 for
    None. sum: expected + correct, None if either is missing.
    """
    if mode not in ("gated", "sum"):
        raise ValueError(f"reward mode {mode!r} is unknown; use 'gated' or 'sum'.")
    if expected is None or (mode == "sum" and correct is None):
        return None
    if mode == "gated" and not expected:
        return 0
    return int(expected) + int(bool(correct))


# ---------------------------------------------------------------------------------------------------------------------
# Judges

Ask = Callable[[list[str], list[str], list[tuple[str, str]]], list[tuple[float, float]]]


class LocalJudge:
    """A model as its own judge: the more probable of two keywords is the answer.

    `ask(prefixes, suffixes, keywords)` returns, for each prompt prefix + suffix, the log-probabilities of its two
    keywords; the caller wires the model, and may compute what a shared prefix needs once.
    """

    name = "self"

    def __init__(self, ask: Ask, config: JudgeConfig | None = None):
        self.ask, self.config = ask, config or JudgeConfig()

    def judge(self, items: list[dict]) -> list[Verdict]:
        """One verdict per item; equal items are asked once, empty and (with a shown target) exact ones never."""
        keys = [self._key(item) for item in items]
        verdicts = {key: self._unasked(key) for key in keys}                # dicts keep order and drop duplicates
        open_keys = [key for key, verdict in verdicts.items() if verdict is None]
        verdicts.update(zip(open_keys, self._asked(open_keys), strict=True))
        return [verdicts[key] for key in keys]

    def _key(self, item):
        target = item["target"] if self.config.show_target else None
        return item["instruction"], item["input"], target, item["response"]

    def _unasked(self, key):
        *_, target, response = key
        if not response.strip():
            return Verdict(False, False, 0, "empty")
        if self.config.exact_is_best and target is not None and response.strip().lower() == target.strip().lower():
            return Verdict(True, True, 2, "exact")
        return None

    def _asked(self, keys):
        p_expected, wanted = {}, keys
        if self.config.steps == "two":
            p_expected = self._probabilities(keys, type_question, TYPE_WORDS)
            if self.config.mode == "gated":                        # correctness cannot change the reward of the others
                wanted = [key for key in keys if self._decide(p_expected[key])]
        p_correct = self._probabilities(wanted, verdict_question, VERDICT_WORDS)
        unparsed = {key for answers in (p_expected, p_correct) for key, answer in answers.items() if answer is None}
        return [self._verdict(p_expected.get(key), p_correct.get(key), "unparsed" if key in unparsed else "judged")
                for key in keys]

    def _probabilities(self, keys, question, words):
        """{key: probability of the first word against the second}, from one call of `ask`; None if not a number."""
        if not keys:
            return {}
        prefixes = [judge_prefix(*key[:3]) for key in keys]
        answers = self.ask(prefixes, [question(key[3]) for key in keys], [words] * len(keys))
        return {key: _two_way(*answer) for key, answer in zip(keys, answers, strict=True)}

    def _decide(self, probability):
        return None if probability is None else probability > self.config.threshold

    def _verdict(self, p_expected, p_correct, how):
        expected, correct = self._decide(p_expected), self._decide(p_correct)
        if self.config.steps == "one":
            reward = None if correct is None else 2 * correct
        else:
            reward = combine_reward(expected, correct, mode=self.config.mode)
        return Verdict(expected, correct, reward, how, p_expected, p_correct)


def _two_way(first: float, second: float) -> float | None:
    """exp(first) / (exp(first) + exp(second)); None where a model returned nan or twice -inf."""
    difference = second - first
    if math.isnan(difference):
        return None
    return 1 / (1 + math.exp(difference)) if difference < 700 else 0.0


class RuleJudge:
    """An offline judge that needs a target: exact match for labels, ROUGE-L for free text.

    Label tasks (`labels` of the item, or of this judge): expected = one of the labels, correct = equal to a target.
    Free text: correct = `similar` to a target; expected = a third to three times as long as a target, in words (in
    characters where the target has none for ROUGE). Both compare after `normalize`. Whatever is correct is expected.
    ROUGE-L sees words, not meaning: "is not red" is close to "is red". It measures a self-judge; it is no human.
    """

    name = "rule"

    def __init__(self, labels: list[str] | None = None, rouge_threshold: float = 0.7, mode: str = "gated"):
        self.labels, self.rouge_threshold, self.mode = labels, rouge_threshold, mode

    def judge(self, items: list[dict]) -> list[Verdict]:
        """One verdict per item, against `targets` if it has any, else `target`."""
        return [self._verdict(item) for item in items]

    def _verdict(self, item):
        response, targets = item["response"], item.get("targets") or [item["target"]]
        labels = item.get("labels") or self.labels
        if not response.strip():
            return Verdict(False, False, 0, "empty")
        correct = any(self.similar(response, target, labels) for target in targets)
        if labels:
            expected = normalize(response) in {normalize(label) for label in labels}
        else:
            expected = any(_like_length(response, target) for target in targets)
        exact = normalize(response) in {normalize(target) for target in targets}
        reward = combine_reward(expected or correct, correct, mode=self.mode)
        return Verdict(expected or correct, correct, reward, "exact" if exact else "rule")

    def similar(self, a: str, b: str, labels: list[str] | None = None) -> bool:
        """Do two responses say the same? Equal after `normalize`, or free text with ROUGE-L F1 >= the threshold."""
        labels, a, b = labels or self.labels, normalize(a), normalize(b)
        if a == b:
            return True
        if labels or min(len(a.split()), len(b.split())) <= SHORT_WORDS:
            return False
        return rouge_l(a, b) >= self.rouge_threshold


class ScoreJudge:
    """A judge whose rewards are plain numbers, from `score(items)`: a reward model, or a control."""

    name = "score"

    def __init__(self, score: Callable[[list[dict]], list[float]]):
        self.score = score

    def judge(self, items: list[dict]) -> list[Verdict]:
        """One verdict per item, with a reward and nothing else; equal items are scored once."""
        keys = [(item["wording"], item["input"], item["response"]) for item in items]
        first = {key: item for key, item in zip(reversed(keys), reversed(items))}
        scores = dict(zip(first, self.score(list(first.values())), strict=True))
        return [Verdict(None, None, scores[key], "scored") for key in keys]


def length_scores(items: list[dict]) -> list[float]:
    """1 - |len / L - 1| with L the target's length in words: a reward that reads nothing   (arXiv 2310.03716)."""
    return [1 - abs(len(item["response"].split()) / max(1, len(item["target"].split())) - 1) for item in items]


def normalize(text: str) -> str:
    """Lower-case, one space between words, no punctuation at the end (unless there is nothing else)."""
    text = " ".join(text.lower().split())
    return text.rstrip(" .,;:!?。，；：！？") or text


def rouge_l(target: str, prediction: str) -> float:
    """ROUGE-L F1 (Lin 2004) without stemming, accents dropped; 0 where a text has letters that ROUGE does not know.

    The stock tokenizer deletes all but a-z and 0-9: of "paris 巴黎" it would compare "paris" alone. Such texts score
    0 here, i.e. they are compared exactly by whoever tested for equality first.
    """
    target, prediction = _without_accents(target), _without_accents(prediction)
    if any(letter.isalnum() and not letter.isascii() for letter in target + prediction):
        return 0.0
    return _scorer().score(target, prediction)["rougeL"].fmeasure


@functools.cache
def _scorer():
    return RougeScorer(["rougeL"])


def _without_accents(text):
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))


def _like_length(response, target):
    unit = str.split if re.search("[a-z0-9]", target.lower()) else list         # words, or characters
    size, wanted = len(unit(normalize(response))), len(unit(normalize(target)))
    return size <= LENGTH_FACTOR * wanted and wanted <= LENGTH_FACTOR * size


# ---------------------------------------------------------------------------------------------------------------------
# Judgments in words (CUT, arXiv 2312.14591)

PERFECT = "perfect ."
FAILED = "$ERROR$"                                          # no judgment came; data.keep_judged drops and counts it
FIELD = re.compile(r"^\s*([^:;]+?)\s*:\s*(.*?)\s*$")


def critic_prompt(instruction: str, input: str, response: str) -> tuple[str, str]:
    """What a critic is asked, as an instruction and its input; it writes PERFECT, or what is wrong (paper, Fig. 9)."""
    asked = f"{flatten(instruction)} {flatten(input)}".strip()
    return (f'say what is wrong in the response , or "{PERFECT}" if nothing is .',
            f"{asked} ### Answer: {flatten(response)}")


def refine_prompt(instruction: str, input: str, response: str, judgment: str) -> tuple[str, str]:
    """What a model is asked to improve a response by its judgment (ILF, arXiv 2204.14146), as instruction and input."""
    asked = f"{flatten(instruction)} {flatten(input)}".strip()
    return ("write the answer again as the judgment says .",
            f"{asked} ### Answer: {flatten(response)} ### Judgment: {flatten(judgment)}")


def parse_judgment(text: str) -> str | None:
    """A critic's text as the judgment of a record: None where it begins with "perfect" (paper, appendix A.2)."""
    return None if text.strip().lower().startswith("perfect") else text.strip()


class LocalCritic:
    """A model that writes judgments: `write` takes (instruction, input) pairs and returns (text, whether it ended)."""

    name = "self"

    def __init__(self, write: Callable[[list[tuple[str, str]]], list[tuple[str, bool]]]):
        self.write = write

    def critique(self, items: list[dict]) -> list[str | None]:
        """One judgment per item, None for satisfaction, FAILED for an empty or unfinished one; equal items are asked once."""
        prompts = [critic_prompt(item["instruction"], item["input"], item["response"]) for item in items]
        asked = list(dict.fromkeys(prompts))
        written = dict(zip(asked, self.write(asked), strict=True))
        return [parse_judgment(text) if ended and text.strip() else FAILED for text, ended in map(written.get, prompts)]


class RuleCritic:
    """Judgments written by rule from the target (or the nearest of `targets`): None for a response that equals one.

    Responses of the form "name : value ; name : value" get the names whose values are wrong or missing; others the
    words that do not belong, or that are missing.
    """

    name = "rule"

    def critique(self, items: list[dict]) -> list[str | None]:
        """One judgment per item."""
        return [self._judgment(item["response"], item.get("targets") or [item["target"]]) for item in items]

    def _judgment(self, response, targets):
        if normalize(response) in map(normalize, targets):
            return None
        target = min(targets, key=lambda text: sum(wrong_words(response, text)))
        wanted, given = _fields(target), _fields(response)
        if wanted and given:
            bad = [name for name in wanted if given.get(name) != wanted[name]] or [name for name in given if name not in wanted]
            return f"wrong : {' , '.join(bad)} ." if bad else "wrong : the order ."
        bad = [word for word, wrong in zip(response.split(), wrong_words(response, target)) if wrong]
        missing = [word for word, wrong in zip(target.split(), wrong_words(target, response)) if wrong]
        return f"wrong : {' '.join(bad)} ." if bad else f"missing : {' '.join(missing)} ."


def _fields(text):
    """{name: value} of "name : value ; name : value", normalized; {} for another form or a name said twice."""
    found = [FIELD.match(part) for part in normalize(text).split(";")]
    fields = {match[1]: match[2] for match in found} if len(found) > 1 and all(found) else {}
    return fields if len(fields) == len(found) else {}


def wrong_words(response: str, target: str) -> list[bool]:
    """For each word of the response, whether it is outside a longest common subsequence with the target's words."""
    words, wanted = response.lower().split(), target.lower().split()
    common = [[0] * (len(wanted) + 1) for _ in range(len(words) + 1)]       # lengths for the suffixes from i and j
    for i in reversed(range(len(words))):
        for j in reversed(range(len(wanted))):
            common[i][j] = common[i + 1][j + 1] + 1 if words[i] == wanted[j] else max(common[i + 1][j], common[i][j + 1])
    wrong, i, j = [True] * len(words), 0, 0
    while i < len(words) and j < len(wanted):
        if words[i] == wanted[j]:
            wrong[i], i, j = False, i + 1, j + 1
        elif common[i + 1][j] >= common[i][j + 1]:
            i += 1
        else:
            j += 1
    return wrong


# ---------------------------------------------------------------------------------------------------------------------
# Agreement: of responses with each other, of a judge with another


def similarity_matrix(responses: list[str], similar: Callable[[str, str], bool], *,
                      symmetrize: Literal["and", "or", "first"] = "and") -> list[list[bool]]:
    """The symmetric (n, n) matrix `similar` of one question's responses, for CR and MCR (arXiv 2403.14221).

    Equal strings are similar without a call; an ordered pair of different texts is asked once. A judge need not be
    symmetric: "and" asks both orders and wants both, "or" wants either, "first" asks only in order of appearance.
    """
    if symmetrize not in ("and", "or", "first"):
        raise ValueError(f"symmetrize {symmetrize!r} is unknown; use 'and', 'or' or 'first'.")
    texts = list(dict.fromkeys(responses))
    agree = {(text, text): True for text in texts}
    for i, a in enumerate(texts):
        for b in texts[i + 1:]:
            verdicts = [bool(similar(a, b))] + ([] if symmetrize == "first" else [bool(similar(b, a))])
            agree[a, b] = agree[b, a] = any(verdicts) if symmetrize == "or" else all(verdicts)
    return [[agree[a, b] for b in responses] for a in responses]


def confusion(items: list[dict], verdicts: list[Verdict], truths: list[Verdict]) -> dict:
    """A judge's `verdicts` against another's `truths`, as {"all": ..., "asked": ...}.

    "asked" keeps each different item once and only where the judge was really asked: exact matches, which are easy,
    and repeated answers flatter a judge. Each holds "type", "correct" and "best" (reward 2) with the counts tp, fp,
    fn, tn, missing (either side None) and accuracy, precision, recall (None without a case).
    """
    rows = list(zip(items, verdicts, truths, strict=True))
    unique = {(item["instruction"], item["input"], item["target"], item["response"]): (item, verdict, truth)
              for item, verdict, truth in rows if verdict.how in ("judged", "unparsed")}
    return {"all": _agreement(rows), "asked": _agreement(list(unique.values()))}


def _agreement(rows):
    best = [(_is_best(verdict), _is_best(truth)) for _, verdict, truth in rows]
    return {"n": len(rows), "type": _counts([(verdict.type, truth.type) for _, verdict, truth in rows]),
            "correct": _counts([(verdict.correct, truth.correct) for _, verdict, truth in rows]), "best": _counts(best)}


def _is_best(verdict):
    return None if verdict.reward is None else verdict.reward == 2


def _counts(pairs):
    """Counts and ratios of (said, true) pairs."""
    tp, fp, fn, tn = (pairs.count(pair) for pair in [(True, True), (True, False), (False, True), (False, False)])
    known = tp + fp + fn + tn
    return {"tp": tp, "fp": fp, "fn": fn, "tn": tn, "missing": len(pairs) - known, "accuracy": _ratio(tp + tn, known),
            "precision": _ratio(tp, tp + fp), "recall": _ratio(tp, tp + fn)}


def _ratio(part, whole):
    return part / whole if whole else None
