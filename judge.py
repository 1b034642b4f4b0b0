"""Is a response of the expected type, is it correct, do two say the same? Judges and rewards.

    LocalJudge    two questions to the model itself, answered by the probability of a keyword:
                  CAT's self-reward, arXiv 2403.14221
    RuleJudge     exact match for labels, ROUGE-L for free text: offline, without a model
    HttpJudge     the same questions to a chat model behind an OpenAI-compatible server

A judge has `judge(items) -> [Verdict]`, and where it can compare `similar_pairs(pairs)`. An item is
a dict with `instruction`, `input`, `target` (the reference output) and `response`, and for rules
optionally `targets` and `labels` (lists). A model comes in as a function.
"""

import math
import os
import re
import secrets
import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from types import SimpleNamespace

# The self-judge's keywords. A model answers with the one that it finds more probable.
TYPE_WORDS = (" expected", " unexpected")
VERDICT_WORDS = (" correct", " incorrect")

TASK = ("### Task: judge each answer . type : expected if it is the kind of answer that the "
        "instruction asks for , else unexpected . verdict : correct if it {criterion} , else "
        "incorrect .\n")
WITH_TARGET = TASK.format(criterion="agrees with the reference")
WITHOUT_TARGET = TASK.format(criterion="answers the instruction rightly")

SHORT_WORDS = 2  # answers of up to so many words are compared exactly: ROUGE takes -5 for 5
LENGTH_FACTOR = 3  # free text of a third to three times the target's length has the expected type
ENDINGS = " .,;:!?。、।॥؟،؛۔։።၊။។"  # what may end a sentence
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
NUMERALS = re.compile("([²³¹¼-¾⁰-₎⅐-⅟↉])")  # raised and lowered digits, and fractions
UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
         "fifteen sixteen seventeen eighteen nineteen").split()
COUNTS = dict(zip(UNITS, range(20), strict=True))  # and twenty to ninety-nine:
for ten, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2):
    COUNTS[word] = 10 * ten
    for k, unit in enumerate(UNITS[1:10], 1):
        COUNTS[f"{word}-{unit}"] = 10 * ten + k
WORDS = "|".join(sorted(COUNTS, key=len, reverse=True)).replace("-", "[- ]")  # the longest first
NUMBER = re.compile(rf"(?:(?<![\w)])[-−])?(?:\d|{NUMERALS.pattern[1:-1]})+(?:[.,٫٬]\d+)*"
                    rf"|\b(?!one\b)(?:{WORDS})\b")
ONE = re.compile(r"(?<!ty[- ])\bone\b")  # but not that of twenty-one
# Texts that say a number and no more, with 0 in its place: not "0 million", "Friday at 0", "-0".
STATED = re.compile(r"((the )?answer( is)?:? |it is |there (is|are) |they have )?[*(\"']*0[*)\"']*"
                    r"( (?!(hundred|thousand|[mb]illion|dozen|percent)\b)[^\W\d]+)?")
# Thai, Lao, Burmese, Khmer, Japanese and Chinese are written without spaces between words.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u9fff"
                      "\U00020000-\U0003ffff]")


@dataclass
class JudgeConfig:
    """How a judge is asked and how its answers become a reward."""

    mode: str = "gated"  # an unexpected type gives 0 whatever the rest; or "sum": both add up
    steps: str = "two"  # ask for type and correctness; or "one": correctness alone
    show_target: bool = True  # let the judge read the reference
    threshold: float = 0.5  # a keyword counts if it is more probable than this


# How a verdict came about. "unparsed": asked, but no answer could be read.
VERDICTS = ("exact", "empty", "wordless", "judged", "unparsed", "rule", "majority")


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one response. None means not asked, or not answered."""

    type: bool | None  # whether the response is of the expected type
    correct: bool | None
    reward: float | None  # 0, 1 or 2, or another judge's number; None is missing, never guessed
    how: str  # one of VERDICTS, or "scored"
    p_expected: float | None = None
    p_correct: float | None = None


# ----- The self-judge's questions -----
def flatten(text: str) -> str:
    """Text on one line and without "###", so that it cannot open a section of the prompt."""
    return re.sub("#{3,}", "#", " ".join(text.split()))


def judge_prefix(instruction: str, input: str, target: str | None) -> str:
    """Everything before the answer under judgment. A target of None is hidden."""
    text = f"### Instruction: {flatten(instruction)}\n"
    if input.strip():
        text += f"### Input: {flatten(input)}\n"
    if target is None:
        return WITHOUT_TARGET + text
    return WITH_TARGET + text + f"### Reference: {flatten(target)}\n"


def type_question(response: str) -> str:
    """What follows `judge_prefix` and is answered by TYPE_WORDS."""
    return f"### Answer: {flatten(response)}\n### Type:"


def verdict_question(response: str) -> str:
    """What follows `judge_prefix` and is answered by VERDICT_WORDS."""
    return f"### Answer: {flatten(response)}\n### Verdict:"


# ----- Reward -----
def combine_reward(expected: bool | None, correct: bool | None, *, mode: str = "gated"):
    """The reward 0, 1 or 2 of two answers; None where it cannot be told.

    gated: an unexpected type gives 0 whatever the correctness, an expected one 1, and 2 if correct.
    These are the rules of the CAT author's code. sum: expected + correct.
    """
    if expected is None or (mode == "sum" and correct is None):
        return None
    if mode == "gated" and not expected:
        return 0
    return int(expected) + int(bool(correct))


def gated_verdicts(items: list[dict], config: JudgeConfig, probabilities: Callable):
    """The verdicts of a judge that answers with probabilities. What need not be asked is not.

    probabilities(keys, question, words) returns {key: p of the first word, or None}; a key is
    (instruction, input, target or None, response). Equal items are asked once.
    """
    keys, p_expected, p_correct = [], {}, {}
    for item in items:
        target = item["target"] if config.show_target else None
        keys.append((item["instruction"], item["input"], target, item["response"]))
    verdicts = {key: verdict_unasked(key) for key in keys}
    asked = wanted = [key for key, verdict in verdicts.items() if verdict is None]
    # First the type of the answer, ...
    if config.steps == "two" and asked:
        p_expected = probabilities(asked, type_question, TYPE_WORDS)
        if config.mode == "gated":  # correctness cannot change the reward of the other types
            wanted = [key for key in asked if exceeds(p_expected[key], config.threshold)]
    # ... then its correctness.
    if wanted:
        p_correct = probabilities(wanted, verdict_question, VERDICT_WORDS)
    for key in asked:
        verdicts[key] = judged_verdict(key, p_expected, p_correct, config)
    return [verdicts[key] for key in keys]


def judged_verdict(key: tuple, p_expected: dict, p_correct: dict, config: JudgeConfig) -> Verdict:
    """The verdict of the probabilities that were given for a key; an answer of None is unparsed."""
    expected = exceeds(p_expected.get(key), config.threshold)
    correct = exceeds(p_correct.get(key), config.threshold)
    reward = combine_reward(expected, correct, mode=config.mode)
    if config.steps == "one":
        reward = None if correct is None else 2 * correct
    unread = None in (p_expected.get(key, 0.0), p_correct.get(key, 0.0))  # 0.0: it was not asked
    how = "unparsed" if unread else "judged"
    return Verdict(expected, correct, reward, how, p_expected.get(key), p_correct.get(key))


def verdict_unasked(key: tuple) -> Verdict | None:
    """Empty responses are wrong, and those equal to the shown target right, without asking."""
    *_, target, response = key
    if not response.strip():
        return Verdict(False, False, 0, "empty")
    if target is not None and fold(response) == fold(target):
        return Verdict(True, True, 2, "exact")
    return None


def exceeds(probability: float | None, threshold: float) -> bool | None:
    """Whether a probability is above a threshold; None where there is none."""
    return None if probability is None else probability > threshold


class LocalJudge:
    """A model as its own judge: the more probable of two keywords is its answer.

    ask(prefixes, suffixes, keywords): for each prompt the log-probabilities of its two keywords.
    """

    name = "self"

    def __init__(self, ask: Callable, config: JudgeConfig | None = None):
        self.ask, self.config = ask, config or JudgeConfig()

    def judge(self, items: list[dict]) -> list[Verdict]:
        """One verdict per item."""
        return gated_verdicts(items, self.config, self.probabilities)

    def probabilities(self, keys, question, words) -> dict:
        """{key: probability of the first word against the second}, from one call of `ask`."""
        prefixes = [judge_prefix(*key[:3]) for key in keys]
        suffixes = [question(key[3]) for key in keys]
        answers = self.ask(prefixes, suffixes, [words] * len(keys))
        return {key: two_way(*answer) for key, answer in zip(keys, answers, strict=True)}


def two_way(first: float, second: float) -> float | None:
    """exp(first) / (exp(first) + exp(second)); None where the model gave no number."""
    difference = second - first
    if math.isnan(difference):
        return None
    return 1 / (1 + math.exp(min(difference, 700)))


# ----- Rules -----
class RuleJudge:
    """Exact match for labels and short answers, ROUGE-L for free text. Needs a target.

    Label tasks (the item has `labels`): expected = one of the labels. Free text: expected = a third
    to three times as long as a target. Correct = `similar` to a target, and then expected too.
    ROUGE sees words, not meaning: "is not red" is close to "is red".
    """

    name = "rule"

    def __init__(self, rouge_threshold: float = 0.7):
        self.rouge_threshold = rouge_threshold

    def judge(self, items: list[dict]) -> list[Verdict]:
        """One verdict per item, against `targets` if it has any, else `target`."""
        return [self.verdict(item) for item in items]

    def verdict(self, item: dict) -> Verdict:
        """The verdict on one item."""
        response, labels = item["response"], item.get("labels")
        targets = item.get("targets") or [item["target"]]
        if not response.strip():
            return Verdict(False, False, 0, "empty")
        correct = any(self.similar(response, target, labels) for target in targets)
        if labels:
            expected = normalize(response) in map(normalize, labels)
        else:
            expected = any(similar_length(response, target) for target in targets)
        expected = expected or correct
        how = "rule"
        if normalize(response) in map(normalize, targets):
            how = "exact"
        return Verdict(expected, correct, combine_reward(expected, correct), how)

    def similar(self, a: str, b: str, labels: list[str] | None = None) -> bool:
        """Do two responses say the same? Equal when normalized, or free text close by ROUGE-L.

        Free text with other numbers never agrees; 8 agrees with "8 legs" and "It is eight".
        """
        a, b = normalize(a), normalize(b)
        if a == b or labels:
            return a == b
        # "one" is a number beside another 1 or alone; elsewhere it is often that of "no one".
        if re.search(r"(?m)^one$|\b1\b", f"{a}\n{b}"):
            a, b = ONE.sub("1", a), ONE.sub("1", b)
        (a, numbers), (b, others) = split_numbers(a), split_numbers(b)
        if numbers != others:
            return False
        if a == b:
            return True
        if "0" in (a, b):  # one of them is a number alone
            return bool(STATED.fullmatch(a) and STATED.fullmatch(b))
        if min(count_words(a), count_words(b)) <= SHORT_WORDS:
            return False
        return rouge_l(a, b) >= self.rouge_threshold

    def similar_pairs(self, pairs: list[tuple[dict, str, str]]) -> list[bool]:
        """`similar` for each (question, response, response)."""
        return [self.similar(a, b, question.get("labels")) for question, a, b in pairs]


def fold(text: str) -> str:
    """The form in which texts are compared: case, spacing and encoding do not matter.

    NFKC makes a letter and its accent one character and ﬁ two; casefold makes ß ss. But 10² and
    1½ stay other numbers than 102 and 11/2.
    """
    parts = NUMERALS.split(INVISIBLE.sub("", text))
    for k in range(0, len(parts), 2):  # what stands between such numerals
        part = unicodedata.normalize("NFKC", parts[k]).casefold()
        parts[k] = unicodedata.normalize("NFKC", part)
    return " ".join("".join(parts).split())


def normalize(text: str) -> str:
    """Folded, without punctuation at the end."""
    return fold(text).rstrip(ENDINGS) or fold(text)


def split_numbers(text: str) -> tuple[str, list]:
    """A normalized text with 0 for each of its numbers, and these: "8.0 legs" -> "0 legs", [8]."""
    numbers = []
    for found in NUMBER.findall(text):
        found = str(COUNTS.get(found.replace(" ", "-"), found))
        found = re.sub(r"(?<!\b0)[,٬](?=\d{3}(?!\d))", "", found)  # 1,000 is 1000, ...
        found = re.sub("[,٫]", ".", found).replace("−", "-")  # ... and 0,5 is 0.5
        try:
            numbers.append(Decimal(found))
        except InvalidOperation:  # 10² and 1.2.2003 stay texts
            numbers.append(found)
    return NUMBER.sub("0", text), numbers


def split_words(text: str) -> list[str]:
    """Runs of letters, digits and vowel signs; each letter of UNSPACED scripts alone; é is e."""
    # Only a to z lose their accents: elsewhere they tell letters apart, as か and が.
    plain = unicodedata.normalize("NFD", fold(text))
    plain = unicodedata.normalize("NFC", re.sub("(?<=[a-z])[\u0300-\u036f]+", "", plain))
    kept = [char if unicodedata.category(char)[0] in "LMN" else " " for char in plain]
    return UNSPACED.sub(r" \g<0> ", "".join(kept)).split()


def rouge_l(target: str, prediction: str) -> float:
    """ROUGE-L F1 (Lin 2004) of the words of all scripts; the package itself sees a-z and 0-9."""
    tokenizer = SimpleNamespace(tokenize=split_words)
    return rouge_scores(prediction, [target], tokenizer=tokenizer)["rougeL"]


def rouge_scores(prediction: str, references: list[str], *, use_stemmer: bool = False,
                 tokenizer=None) -> dict:
    """{"rouge1", "rouge2", "rougeL"}: F1 as the package counts it, the best over the references."""
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer, tokenizer=tokenizer)
    scores = scorer.score_multi(references or [""], prediction)
    return {name: score.fmeasure for name, score in scores.items()}


def exact_match(prediction: str, references: list[str]) -> bool:
    """Equal to a reference but for case, punctuation and spacing (Super-NI's rule)."""
    return without_punctuation(prediction) in map(without_punctuation, references)


def without_punctuation(text: str) -> str:
    """Folded, without ASCII's punctuation and symbols and without all scripts' punctuation.

    DEVIATION from Super-NI: text of punctuation alone stays, else "+" would equal "-".
    """
    kept = [char for char in fold(text) if char not in string.punctuation]
    kept = "".join(char for char in kept if unicodedata.category(char)[0] != "P")
    return " ".join(kept.split()) or fold(text)


def similar_length(response: str, target: str) -> bool:
    """Whether a response has a third to three times as many words (or signs) as the target."""
    count = count_words if any(map(str.isalnum, target)) else len
    size, wanted = count(normalize(response)), count(normalize(target))
    return size <= LENGTH_FACTOR * wanted and wanted <= LENGTH_FACTOR * size


def count_words(text: str) -> float:
    """Words between spaces; two letters of UNSPACED scripts count as one."""
    return len(UNSPACED.sub(" ", text).split()) + len(UNSPACED.findall(text)) / 2


# ----- A judge behind a server -----
def ask_server(url: str, model: str, task: str, texts: dict[str, str],
               choices: tuple[str, ...]) -> str | None:
    """Ask a chat model a question; the one of `choices` that it answers, or None.

    The texts under judgment stand in a fence that carries a random number. Only a last line with
    that number is a verdict, so a text cannot answer for the judge.
    """
    import requests
    nonce = secrets.token_hex(4)
    fenced = [f"<{name} {nonce}>\n{text}\n</{name} {nonce}>" for name, text in texts.items()]
    ending = f'End with the line "VERDICT {nonce}: X" with {" or ".join(choices)} in place of X.'
    message = {"role": "user", "content": "\n\n".join([task, *fenced, ending])}
    headers = {"Authorization": "Bearer " + os.environ.get("JUDGE_API_KEY", "none")}
    body = {"model": model, "messages": [message], "temperature": 0, "max_tokens": 512}
    address = url.rstrip("/") + "/chat/completions"
    answer = requests.post(address, json=body, headers=headers, timeout=60, allow_redirects=False)
    if answer.status_code != 200 or '"choices"' not in answer.text:
        raise ValueError(f"{address} answered with status {answer.status_code} and no completion.")
    text = answer.json()["choices"][0]["message"]["content"] or ""
    last = [""] + text.strip().splitlines()
    found = re.fullmatch(rf"VERDICT {nonce}: ({'|'.join(choices)})\.?", last[-1].strip())
    return found[1] if found else None


class HttpJudge:
    """The questions of the self-judge, asked of a server."""

    name = "http"

    def __init__(self, url: str, model: str, config: JudgeConfig | None = None):
        self.url, self.model, self.config = url, model, config or JudgeConfig()

    def judge(self, items: list[dict]) -> list[Verdict]:
        """One verdict per item; an answer that cannot be read is "unparsed"."""
        return gated_verdicts(items, self.config, self.probabilities)

    def probabilities(self, keys, question, words) -> dict:
        """{key: 1.0 or 0.0, or None}."""
        task = "Is the response correct? Wording and length do not matter."
        if words == TYPE_WORDS:
            task = "Is the response of the kind that the instruction asks for, right or wrong?"
        choices, found = tuple(word.strip() for word in words), {}
        for key in keys:
            parts = zip(("instruction", "input", "reference", "response"), key, strict=True)
            texts = {name: text for name, text in parts if text}
            said = ask_server(self.url, self.model, task, texts, choices)
            found[key] = said and float(said == choices[0])
        return found
