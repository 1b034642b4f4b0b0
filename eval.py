"""Are a model's answers the same, and right, however the question is worded? Generation, metrics, reports and plots.

    python eval.py --model DIR                              the base model on held-out wordings of held-out inputs
    python eval.py --model DIR --adapter runs/sft runs/cat  ... and with each adapter, side by side
    python eval.py --model DIR --adapter runs/cat --chat    talk to it; /help lists what else you can type
    python eval.py --model DIR --adapter runs/cat --merge OUT          write one folder for other programs
    python eval.py --model DIR --instructions FILE          answer them, in the form that alpaca_eval reads

Metrics: CR and MCR of arXiv 2403.14221; ROUGE of Lin 2004; exact match as Super-NaturalInstructions defines it.

    question    one input under n wordings of its task's instruction, hence n responses
    similar     (n, n) bool matrix: similar[i, j] if the judge, shown responses i and j in this order, says they agree
    N           tokens laid end to end          M   next tokens that are scored          V   vocabulary

Whatever imports torch is imported by the function that needs it, so that a wrong flag answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import string
import sys
import time
import unicodedata
from argparse import SUPPRESS
from collections import Counter
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from itertools import accumulate, chain, combinations, permutations
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np

DEMO = Path(__file__).parent / "demo"
METRICS = {                                                # name in metrics.json: (column title, what it says)
    "cr": ("CR", "share of a question's pairs of responses that the judge calls similar"),
    "mcr": ("MCR", "share of a question's responses in its largest set of mutually similar ones"),
    "mcr_component": ("MCR comp", "the same with connected components of the similarity graph, an upper bound"),
    "mcr_greedy": ("MCR greedy", "the same with the authors' sequential clusters, which depend on the order"),
    "rouge1": ("R-1", "ROUGE-1 F1 against the best reference, mean over a question's responses"),
    "rouge2": ("R-2", "ROUGE-2 F1, likewise"),
    "rougeL": ("R-L", "ROUGE-L F1, likewise"),
    "exact_match": ("EM", "share of responses equal to a reference but for case, punctuation and spacing"),
    "consistent_and_correct": ("C&C", "share of a question's pairs that are similar and both exact matches"),
    "worst_paraphrase": ("Worst", "ROUGE-L of the worst of a question's wordings"),
}
TABLE = ("cr", "mcr", "rouge1", "rougeL", "exact_match", "consistent_and_correct")
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")            # Paul Tol's "bright"
ALONE = "#BBBBBB"
NON_LATIN = re.compile(r"[^\W\d_\u0000-\u024f\u1e00-\u1eff]")                            # a letter of another script


def flag(default, help: str, only: tuple[str, ...] | None = None):
    """A dataclass field that becomes a command-line flag; `only` names the stages that read it (None: all)."""
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": help, "only": only})


@dataclass
class EvalConfig:
    """Every flag of eval.py."""

    model: str = flag("demo/base", "folder of the model")
    tokenizer: str = flag("", "tokenizer.model, where the model folder has none")
    adapter: list[str] = flag(list, "adapter folders to evaluate beside the model")
    tasks: str = flag("", "task file or folder (default: demo/tasks)")
    paraphrases: str = flag("", "JSON file of wordings per task (default for the demo's tasks: demo/paraphrases.json)")
    split: Literal["dev", "test"] = flag("dev", "which held-out wordings and inputs")
    wordings: int = flag(10, "wordings per question, at most")
    per_task: int = flag(20, "questions per task, at most")
    template: str = flag("", "prompt template: alpaca, alpaca-stanford, plain, vicuna, llama2, chatml, zephyr, raw, or a JSON file (default: the checkpoint's own, else alpaca)")
    max_new_tokens: int = flag(128, "longest response in tokens")
    max_len: int = flag(0, "most tokens of prompt and response together (0: what the model takes)")
    batch_size: int = flag(64, "responses generated side by side")
    rouge_threshold: float = flag(0.7, "ROUGE-L from which the rule judge calls two free texts similar")
    cluster: Literal["clique", "component", "greedy"] = flag("clique", "what counts as a cluster in MCR")
    use_stemmer: bool = flag(False, "Porter stemmer in ROUGE, as Super-NI's own evaluation has it")
    seed: int = flag(0, "seeds the bootstrap")
    device: str = flag("cpu", "cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "type of the weights")
    quantize: Literal["none", "int8", "nf4"] = flag("none", "keep the model's linears in 8 or 4 bits")
    chat: bool = flag(False, "talk to the model, or to its first adapter, at the terminal, instead of evaluating")
    temperature: float = flag(0.7, "... with this sampling temperature (0: the most probable token)")
    instructions: str = flag("", "JSON file of instructions: write OUT/NAME-outputs.json in alpaca_eval's form, instead of evaluating")
    merge: str = flag("", "folder for the model with its one adapter merged in, at full precision, instead of evaluating")
    layout: Literal["hf", "meta"] = flag("hf", "... in Hugging Face's layout or in Meta's")
    show_mask: str = flag("", "file of judged responses: show what CUT's mask flags in them, instead of evaluating")
    detect_lam: float = flag(1.1, "... with tokens flagged where p(token | judgment) > this * p(token)")
    out: str = flag("runs/eval", "folder for metrics.json, questions.jsonl, report.md and plots")


DEMO_DEFAULTS = {"wordings": 8, "per_task": 16, "max_new_tokens": 24, "rouge_threshold": 0.95}    # where --tasks is left out


# ---------------------------------------------------------------------------------------------------------------------
# Text in, text out


@dataclass(frozen=True)
class Completion:
    """One generated response; `finished` says that it ended with EOS, not at the length limit."""

    text: str
    token_ids: list[int]
    finished: bool


def complete(model, tokenizer, prompts: list[str], *, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
             top_k: int = 0, seed: int | list[int] = 0, batch_size: int = 64, max_len: int | None = None,
             progress=None) -> list[Completion]:
    """One completion per prompt, in order. At temperature 0 identical prompts are generated once.

    `seed` is one number, or one per prompt. Prompt and answer share max_len tokens (default: what the model takes); a
    longer prompt loses its left, as in training. `progress(k)` is called when k more rows are done.
    """
    from data import cut_left, stop_ids
    from model import generate

    asked = list(dict.fromkeys(prompts)) if temperature == 0 else prompts
    room, stop = min(max_len or sys.maxsize, model.config.context) - max_new_tokens, (*stop_ids(tokenizer, asked), *model.config.eos_ids)
    if room < 2:
        raise ValueError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: prompt and answer share "
                         f"{room + max_new_tokens} tokens. Lower it.")
    bar = None
    if progress is None:                                    # shown at a terminal only
        from tqdm import tqdm
        bar = tqdm(total=len(asked), desc="answers", disable=None, leave=False)
        progress = bar.update
    token_ids = generate(model, [cut_left(tokenizer.encode_prompt(text), room) for text in asked], max_new_tokens=max_new_tokens,
                         temperature=temperature, top_p=top_p, top_k=top_k, eos_ids=stop,
                         seed=0 if temperature == 0 else seed, batch_size=batch_size, progress=progress)
    if bar is not None:
        bar.close()
    made = [Completion(tokenizer.decode(ids), ids, ids[-1] in stop) for ids in token_ids]
    if temperature == 0:
        by_prompt = dict(zip(asked, made, strict=True))
        made = [by_prompt[text] for text in prompts]
    return made


@dataclass(frozen=True)
class _Branch:
    """Tokens to run behind a cached prefix, and the next tokens to score: (keyword 0 or 1, position, token id)."""

    item: int
    token_ids: tuple[int, ...]
    targets: list[tuple[int, int, int]]


def _branches(tokenizer, item: int, suffix: str, keywords: tuple[str, str]) -> list[_Branch]:
    """One branch per keyword; a single one where the keywords differ in their last token only."""
    stem = tokenizer.encode_continuation(suffix)
    if not stem:
        raise ValueError("a suffix has no tokens, and the keywords are read behind it. Give it some text.")
    targets = {}
    for which, keyword in enumerate(keywords):
        ids = tokenizer.encode_continuation(suffix + keyword)
        if ids[:len(stem)] != stem or len(ids) == len(stem):
            raise ValueError(f"keyword {keyword!r} fuses with the text before it, {suffix[-20:]!r}. "
                             "Begin the keyword with a space.")
        scored = [(which, position, ids[position + 1]) for position in range(len(stem) - 1, len(ids) - 1)]
        targets.setdefault(tuple(ids[:-1]), []).extend(scored)              # the last token is predicted, never read
    return [_Branch(item, ids, scored) for ids, scored in targets.items()]


def _read_prefixes(model, prefixes: list[list[int]], room: int, max_len: int | None):
    """A KV cache with a row per prefix and room for `room` more tokens in each; a prefix too long loses its left."""
    import torch

    from data import cut_left
    from model import KVCache

    limit = min(max_len or sys.maxsize, model.config.context) - room
    if limit < 2:
        raise ValueError(f"an answer to judge has about {room} tokens and leaves no room for its question within "
                         f"{limit + room}. Lower --max-new-tokens, or raise --max-len.")
    prefixes, weight = [cut_left(ids, limit) for ids in prefixes], model.lm_head.weight
    lengths = [len(ids) for ids in prefixes]
    cache = KVCache(model.config, len(prefixes), max(lengths) + room, weight.dtype, weight.device)
    input_ids = torch.tensor(list(chain(*prefixes)), device=weight.device)                          # (N,)
    unasked = torch.zeros(0, dtype=torch.long, device=weight.device)
    model(input_ids, lengths=lengths, kv_cache=cache, logits_at=unasked)
    return cache


def _add_logprobs(model, cache, branches: list[_Branch], results) -> None:
    """Run branches behind their rows of the cache; add each target's log-probability to results (items, 2)."""
    import torch

    lengths = [len(branch.token_ids) for branch in branches]
    starts = [0, *accumulate(lengths)]
    asked = [(branch.item, which, start + position, token) for branch, start in zip(branches, starts, strict=False)
             for which, position, token in branch.targets]
    items, which, positions, tokens = torch.tensor(asked).unbind(1)                                 # (M,) each
    input_ids = torch.tensor(list(chain(*(branch.token_ids for branch in branches))), device=cache.k.device)    # (N,)
    logits = model(input_ids, lengths=lengths, kv_cache=cache, logits_at=positions.to(cache.k.device))
    logprobs = logits.float().log_softmax(-1).gather(1, tokens[:, None].to(logits.device)).squeeze(1)    # (M,)
    results.index_put_((items, which), logprobs.cpu(), accumulate=True)


def keyword_logprobs(model, tokenizer, prefixes: list[str], suffixes: list[str], keywords: list[tuple[str, str]], *,
                     batch_size: int = 64, max_len: int | None = None) -> list[tuple[float, float]]:
    """log P(keyword | prefix + suffix), over all tokens of the keyword, for both keywords of every item.

    A prefix that several items share is read once; its row of the cache is forked to their suffixes. Prefixes end in a
    newline and keywords begin with a space. Raises ValueError where a keyword is no continuation of its suffix.
    """
    import torch

    by_prefix = {}
    for item, (prefix, suffix, pair) in enumerate(zip(prefixes, suffixes, keywords, strict=True)):
        by_prefix.setdefault(prefix, []).extend(_branches(tokenizer, item, suffix, pair))
    results, was_training = torch.zeros(len(prefixes), 2), model.training                           # (items, 2)
    order = sorted(by_prefix, key=len)                                      # like lengths attend together
    model.eval()
    try:
        with torch.inference_mode():
            for texts in _chunks(order, batch_size):
                forks = [(row, branch) for row, text in enumerate(texts) for branch in by_prefix[text]]
                room = max(len(branch.token_ids) for _, branch in forks)
                cache = _read_prefixes(model, [tokenizer.encode_prompt(text) for text in texts], room, max_len)
                for part in _chunks(forks, batch_size):
                    rows, branches = zip(*part, strict=True)
                    _add_logprobs(model, cache.select(rows), branches, results)
    finally:
        model.train(was_training)
    return [tuple(pair) for pair in results.tolist()]


def _chunks(items: list, size: int) -> list[list]:
    return [items[start:start + size] for start in range(0, len(items), size)]


# ---------------------------------------------------------------------------------------------------------------------
# Consistency: CR and MCR (arXiv 2403.14221)


def consistency_rate(similar) -> float | None:
    """CR = sum_{i<j} similar(i, j) / C(n, 2); None for a single response, which has no pair.

    `similar` is (n, n) bool; where the judge's two orders disagree, the pair counts as not similar.
    """
    similar = np.asarray(similar, dtype=bool)                                       # (n, n)
    n = len(similar)
    if n < 2:
        return None
    return float(np.triu(similar & similar.T, 1).sum() / (n * (n - 1) / 2))


def max_consistency_rate(similar, *, cluster: str = "clique") -> float:
    """MCR = size of the largest cluster / n. The rules are those of `clusters`; `similar` is (n, n) bool, n >= 1."""
    return max(map(len, clusters(similar, rule=cluster))) / len(similar)


def clusters(similar, *, rule: str = "clique") -> list[list[int]]:
    """The responses 0 .. n-1 in clusters, by one of three rules; `similar` is (n, n) bool.

    clique      mutually similar responses: the largest such set, then the largest of the rest, and so on (exact)
    component   responses joined by a chain of similar ones
    greedy      the authors' code (Self-DETECTION): join the first cluster whose first member is similar, in order

    The first two read both orders of a pair (and); greedy reads similar[new, first member], as it would ask the judge.
    """
    similar = np.asarray(similar, dtype=bool)                                       # (n, n)
    if rule == "greedy":
        return _greedy_clusters(similar)
    if rule not in ("clique", "component"):
        raise ValueError(f"unknown cluster rule {rule!r}. Rules: clique, component, greedy.")
    both = similar & similar.T & ~np.eye(len(similar), dtype=bool)
    neighbours = [sum(1 << int(j) for j in np.flatnonzero(row)) for row in both]    # one bit per response
    found, rest = [], (1 << len(similar)) - 1
    while rest:
        members = _largest_clique(0, rest, neighbours) if rule == "clique" else _component(rest & -rest, neighbours)
        found.append([i for i in range(len(similar)) if members >> i & 1])
        rest &= ~members
    return found


def _greedy_clusters(similar) -> list[list[int]]:
    found = []
    for new in range(len(similar)):
        home = next((group for group in found if similar[new, group[0]]), None)
        if home is None:
            found.append([new])
        else:
            home.append(new)
    return found


def _component(members: int, neighbours: list[int]) -> int:
    """All that can be reached from `members`; sets are bit masks."""
    before = 0
    while before != members:
        before = members
        for i, mask in enumerate(neighbours):
            members |= mask if members >> i & 1 else 0
    return members


def _coloured(candidates: int, neighbours: list[int]) -> list[tuple[int, int]]:
    """(vertex, colours used so far), greedily coloured so that no two neighbours share a colour."""
    order, colours = [], 0
    while candidates:
        colours += 1
        free = candidates                                  # those that may still take this colour
        while free:
            bit = free & -free
            vertex = bit.bit_length() - 1
            order.append((vertex, colours))
            candidates &= ~bit
            free &= ~(bit | neighbours[vertex])
    return order


def _largest_clique(clique: int, candidates: int, neighbours: list[int], best: int = 0) -> int:
    """Branch and bound over bit masks: a clique takes one vertex of a colour at most (Tomita and Seki 2003)."""
    for vertex, colours in reversed(_coloured(candidates, neighbours)):
        if clique.bit_count() + colours <= best.bit_count():
            return best
        best = _largest_clique(clique | 1 << vertex, candidates & neighbours[vertex], neighbours, best)
        candidates &= ~(1 << vertex)
    return max(best, clique, key=int.bit_count)


# ---------------------------------------------------------------------------------------------------------------------
# Correctness: ROUGE (Lin 2004) and exact match


UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


class _Characters:
    """A tokenizer for rouge_score that keeps what the stock one deletes.

    Words of any script, with their marks; of scripts that are written without spaces (UNSPACED: Chinese, Japanese, Thai,
    Lao, Burmese, Khmer) each character.
    """

    def tokenize(self, text: str) -> list[str]:
        words = [""]
        for char in text.lower():
            if UNSPACED.match(char):
                words += [char, ""]
            elif char.isalnum() or unicodedata.category(char).startswith("M"):
                words[-1] += char
            else:
                words.append("")
        return [word for word in words if word]


@lru_cache
def _rouge_scorer(use_stemmer: bool, characters: bool):
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    return RougeScorer(names, use_stemmer=use_stemmer, tokenizer=_Characters() if characters else None)


def rouge_scores(prediction: str, references: list[str], *, use_stemmer: bool = False) -> dict:
    """{"rouge1", "rouge2", "rougeL"}: F1, each the maximum over references; and "tokenizer", "words" or "characters".

    Values are those of the package rouge_score. Its tokenizer deletes every letter but a-z; where a reference holds a
    letter of another script than Latin, all words count, and each character of scripts without spaces.
    """
    characters = any(NON_LATIN.search(text) for text in references)
    scorer = _rouge_scorer(use_stemmer, characters)
    scored = [scorer.score(text, prediction) for text in references]
    best = {name: max(score[name].fmeasure for score in scored) for name in ("rouge1", "rouge2", "rougeL")}
    return best | {"tokenizer": "characters" if characters else "words"}


def _plain(text: str) -> str:
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(kept.split()) or text.strip()


def exact_match(prediction: str, references: list[str]) -> bool:
    """Equal to a reference after lower-casing, dropping ASCII punctuation and collapsing spaces (Super-NI's rule).

    DEVIATION: text of punctuation alone is compared as it stands; there, "+" equals "-" and the empty response.
    """
    return _plain(prediction) in map(_plain, references)


# ---------------------------------------------------------------------------------------------------------------------
# From responses to metrics


def bootstrap(values, *, resamples: int = 1000, seed: int = 0) -> dict:
    """{"mean", "ci95", "n"} of the values that are not None: percentile bootstrap, questions drawn with replacement.

    Strict JSON: no value gives mean None, fewer than two give ci95 None. The interval covers the choice of questions,
    not that of tasks or training seeds.
    """
    known = np.array([value for value in values if value is not None], dtype=float)                # (n,)
    n = len(known)
    if n < 2:
        return {"mean": float(known[0]) if n else None, "ci95": None, "n": n}
    rng = np.random.default_rng(seed)
    means = known[rng.integers(0, n, (resamples, n), dtype=np.int32)].mean(1)                      # (resamples,)
    return {"mean": float(known.mean()), "ci95": [float(x) for x in np.quantile(means, (0.025, 0.975))], "n": n}


def _judge_pairs(question: dict, judge) -> tuple[np.ndarray, int]:
    """similar (n, n), and how many verdicts were None: unparsed, which counts as not similar.

    Equal texts are similar unasked; each ordered pair of different texts is asked once.
    """
    texts = question["responses"]
    said = {(a, b): judge.similar(a, b, question.get("labels")) for a, b in permutations(dict.fromkeys(texts), 2)}
    similar = [[a == b or said[a, b] is True for b in texts] for a in texts]
    return np.array(similar, dtype=bool), sum(verdict is None for verdict in said.values())


def _evaluate_question(question: dict, judge, cluster: str, use_stemmer: bool) -> dict:
    """One question with its metrics, and for each response its cluster and whether it is an exact match."""
    responses, n = question["responses"], len(question["responses"])
    if not responses or not question["targets"]:
        raise ValueError(f"a question of task {question['task']} has {n} responses and {len(question['targets'])} "
                         "references. Give it at least one of each.")
    similar, unparsed = _judge_pairs(question, judge)
    groups = sorted(clusters(similar, rule=cluster), key=lambda group: (-len(group), group))
    scores = {text: rouge_scores(text, question["targets"], use_stemmer=use_stemmer) for text in set(responses)}
    rouge = [scores[text] for text in responses]
    correct = [exact_match(text, question["targets"]) for text in responses]
    both = [bool(similar[i, j] and similar[j, i] and correct[i] and correct[j]) for i, j in combinations(range(n), 2)]
    return question | {
        "cr": consistency_rate(similar),
        "mcr": max_consistency_rate(similar, cluster=cluster),
        "mcr_component": max_consistency_rate(similar, cluster="component"),
        "mcr_greedy": max_consistency_rate(similar, cluster="greedy"),
        **{name: sum(score[name] for score in rouge) / n for name in ("rouge1", "rouge2", "rougeL")},
        "exact_match": sum(correct) / n,
        "consistent_and_correct": sum(both) / len(both) if both else None,
        "worst_paraphrase": min(score["rougeL"] for score in rouge),
        "correct": correct, "cluster": [next(k for k, group in enumerate(groups) if i in group) for i in range(n)],
        "unparsed": unparsed, "tokenizer": rouge[0]["tokenizer"],
    }


def _exact_match_by_style(rows: list[dict]) -> dict[str, list[float]]:
    """Per style of wording, the exact match of each question that has wordings of this style."""
    found = {}
    for row in rows:
        hits = {}
        for style, correct in zip(row.get("styles") or [], row["correct"], strict=False):
            hits.setdefault(style or "plain", []).append(correct)
        for style, values in hits.items():
            found.setdefault(style, []).append(sum(values) / len(values))
    return dict(sorted(found.items()))


def evaluate_responses(questions: list[dict], *, judge, cluster: str = "clique", use_stemmer: bool = False,
                       resamples: int = 1000, seed: int = 0) -> tuple[dict, list[dict]]:
    """A model's metrics, and the table behind them: each question with its own values of METRICS.

    A question is {task, input, targets, wordings, responses} and, where known, id, labels, styles, unfinished. The
    judge is asked `judge.similar(a, b, labels) -> True | False | None` in both orders; None means unparsed. All metrics
    are means over questions; one with a single response has no CR and is left out there. `mcr` follows `cluster`.
    Raises ValueError for a question without responses or without references.
    """
    rows = [_evaluate_question(question, judge, cluster, use_stemmer) for question in questions]
    styles = _exact_match_by_style(rows)
    metrics = {name: bootstrap([row[name] for row in rows], resamples=resamples, seed=seed) for name in METRICS}
    metrics["by_style"] = {style: bootstrap(styles[style], resamples=resamples, seed=seed) for style in styles}
    return metrics | {
        "judge": getattr(judge, "name", type(judge).__name__), "cluster": cluster, "use_stemmer": use_stemmer,
        "questions": len(rows), "without_cr": sum(row["cr"] is None for row in rows),
        "responses": sum(len(row["responses"]) for row in rows),
        "unfinished": sum(row.get("unfinished", 0) for row in rows),
        "unparsed": sum(row["unparsed"] for row in rows),
        "rouge_tokenizer": dict(Counter(row["tokenizer"] for row in rows)),
    }, rows


def _key(row: dict) -> tuple:
    """What makes two models' rows the same question."""
    return row["task"], row.get("id", ""), row["input"]


def paired_difference(rows_a: list[dict], rows_b: list[dict], metric: str, *, resamples: int = 1000,
                      seed: int = 0) -> dict:
    """{"mean", "ci95", "n"} of metric(b) - metric(a) over the questions that both tables hold (paired bootstrap)."""
    before = {_key(row): row[metric] for row in rows_a}
    pairs = [(before[_key(row)], row[metric]) for row in rows_b if _key(row) in before]
    if not pairs:
        raise ValueError("the two models share no question. Evaluate both on the same tasks and split.")
    return bootstrap([b - a for a, b in pairs if a is not None and b is not None], resamples=resamples, seed=seed)


def evaluate_model(model, tokenizer, questions: list[dict], config: EvalConfig, progress=None) -> list[dict]:
    """The questions with the model's greedy responses, one per wording, and how many were cut at the length limit."""
    from data import find_template

    template = find_template(config.template or model.config.prompt_template or "alpaca")
    prompts = [template.render(text, question["input"]) for question in questions for text in question["wordings"]]
    made = iter(complete(model, tokenizer, prompts, max_new_tokens=config.max_new_tokens, max_len=config.max_len or None,
                         batch_size=config.batch_size, progress=progress))
    answered = []
    for question in questions:
        mine = [next(made) for _ in question["wordings"]]
        answered.append(question | {"responses": [answer.text for answer in mine],
                                    "unfinished": sum(not answer.finished for answer in mine)})
    return answered


# ---------------------------------------------------------------------------------------------------------------------
# Judged responses: error rates, and the tokens that CUT's mask flags


def evaluate_errors(model, tokenizer, questions: list[dict], config: EvalConfig, *, judge, seed: int = 0) -> tuple[dict, list[dict]]:
    """Metrics and table as `evaluate_responses` has them for greedy answers, plus the shares of answers that are wrong.

    "error_rate" counts greedy answers that are no exact match, "sampled_error_rate" answers sampled at temperature 1.
    """
    from data import find_template

    template = find_template(config.template or model.config.prompt_template or "alpaca")
    results, tables = evaluate_responses(evaluate_model(model, tokenizer, questions, config), judge=judge)
    prompts = [template.render(text, question["input"]) for question in questions for text in question["wordings"]]
    made = iter(complete(model, tokenizer, prompts, max_new_tokens=config.max_new_tokens, temperature=1.0,
                         seed=[seed + k for k in range(len(prompts))], batch_size=config.batch_size, max_len=config.max_len or None))
    drawn = [{**question, "responses": [next(made).text for _ in question["wordings"]]} for question in questions]
    sampled, _ = evaluate_responses(drawn, judge=judge)
    for name, source in (("error_rate", results), ("sampled_error_rate", sampled)):
        mean, ci95 = source["exact_match"]["mean"], source["exact_match"]["ci95"]
        results[name] = {"mean": None if mean is None else 1 - mean, "ci95": ci95 and [1 - ci95[1], 1 - ci95[0]], "n": source["exact_match"]["n"]}
    return results, tables


def response_logprobs(model, tokenizer, template, records: list[dict], judgments: list, *, max_len: int = 512, max_tokens: int = 8192):
    """[(token ids, log-probabilities (N,))] of the records' responses behind their prompts with these judgments (None: without)."""
    import torch

    from data import encode_example, micro_batches, pack
    from losses import gathered_logprobs, prediction_rows

    groups = [{"documents": [encode_example(tokenizer, template, template.render(record["instruction"], record["input"], judgment),
                                            record["response"], max_len=max_len)]} for record, judgment in zip(records, judgments, strict=True)]
    found, device = [], next(model.parameters()).device
    with torch.inference_mode():
        for part in micro_batches(groups, max_tokens):
            documents = [document for group in part for document in group["documents"]]
            batch = pack(documents)
            rows, targets = prediction_rows(batch["labels"].to(device))
            logprobs = gathered_logprobs(model(batch["input_ids"].to(device), lengths=batch["lengths"], logits_at=rows), targets)
            sizes = [sum(label != -100 for label in document["labels"]) for document in documents]
            found += [(ids.tolist(), values.cpu()) for ids, values in zip(targets.split(sizes), logprobs.split(sizes), strict=True)]
    return found


def surface(tokenizer, token: int) -> bytes:
    """The bytes that a token adds to the text; none for EOS and other control tokens."""
    if token == tokenizer.eos_id or token in tokenizer.control:
        return b""
    if token in tokenizer.text_of:
        return tokenizer.text_of[token].encode()
    piece = tokenizer.model.id_to_piece(token)
    return bytes([int(piece[3:-1], 16)]) if tokenizer.model.is_byte(token) else piece.replace("\u2581", " ").encode()


def token_words(tokenizer, ids: list[int]) -> list[int | None]:
    """For each token the index of the word (between blanks) in which it ends; None for EOS and for blanks alone."""
    text, ends = b"", []
    for token in ids:
        piece = surface(tokenizer, token)
        text += piece
        ends.append(len(text.split()) - 1 if piece.strip() else None)
    return ends


def cut_masks(model, tokenizer, template, records: list[dict], *, lams: list[float], floor: float = 0.0,
              satisfied: str | None = None, max_len: int = 512) -> list[dict]:
    """CUT's flagged tokens of unsatisfying responses (arXiv 2312.14591, Eq. 5), and the truly wrong ones where known.

    `satisfied` is the judgment of the satisfied condition, None for the plain prompt. Returns, per record with a
    judgment, {"ids", "p_judged", "p_plain", "flagged": {lam: [bool]}, "wrong": [bool or None] or None}: probabilities
    with and without the judgment; a token is wrong if its word has no counterpart in the record's target; None for
    EOS, and for records without a target.
    """
    from judge import wrong_words
    from losses import inappropriate_tokens

    records = [record for record in records if record["judgment"] is not None]
    told = response_logprobs(model, tokenizer, template, records, [record["judgment"] for record in records], max_len=max_len)
    plain = response_logprobs(model, tokenizer, template, records, [satisfied] * len(records), max_len=max_len)
    masks = []
    for record, (ids, given), (same, without) in zip(records, told, plain, strict=True):
        assert ids == same, "a response has other tokens under its judgment"
        wrong = None
        if record.get("target") is not None:
            words = wrong_words(record["response"], record["target"])
            wrong = [None if k is None or k >= len(words) else words[k] for k in token_words(tokenizer, ids)]
        masks.append({"ids": ids, "wrong": wrong, "p_judged": given.exp().tolist(), "p_plain": without.exp().tolist(), "flagged": {lam: inappropriate_tokens(given, without, lam=lam, floor=floor).tolist() for lam in lams}})
    return masks


MASK_LAMS = (1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)


def mask_scores(masks: list[dict]) -> list[dict]:
    """Precision and recall of the flagged tokens against the wrong ones, per lambda: [{"lam", "precision", "recall", "n"}]."""
    scores = []
    for lam in masks[0]["flagged"] if masks else ():
        pairs = [(flag, wrong) for mask in masks if mask["wrong"] for flag, wrong in zip(mask["flagged"][lam], mask["wrong"], strict=True)
                 if wrong is not None]
        hits, flags, wrongs = (sum(map(bool, found)) for found in ([f and w for f, w in pairs], [f for f, _ in pairs], [w for _, w in pairs]))
        scores.append({"lam": lam, "precision": hits / flags if flags else None, "recall": hits / wrongs if wrongs else None, "n": len(pairs)})
    return scores


def marked(tokenizer, ids: list[int], flags: list[bool]) -> str:
    """The text of `ids` with each run of flagged tokens between [brackets]; a flagged EOS shows as </s>."""
    text, inside = b"", False
    for token, flag in zip(ids, flags, strict=True):
        piece = surface(tokenizer, token) if token != tokenizer.eos_id else b"</s>" if flag else b""
        if flag != inside:
            space = b" " if flag and piece.startswith(b" ") else b""
            text += space + (b"[" if flag else b"]")
            piece, inside = piece[len(space):], flag
        text += piece
    return (text + b"]" * inside).decode(errors="replace").strip()


# ---------------------------------------------------------------------------------------------------------------------
# Tables and reports


def _percent(summary: dict, *, sign: str = "", interval: bool = False) -> str:
    if summary["mean"] is None:
        return "-"
    text = f"{100 * summary['mean']:{sign}.1f}"
    if interval and summary["ci95"]:
        low, high = (100 * bound for bound in summary["ci95"])
        text += f" [{low:{sign}.1f}, {high:{sign}.1f}]"
    return text


def summary_table(results: dict[str, dict], *, markdown: bool = False) -> str:
    """One line per model, in percent: fixed width for a terminal, or a Markdown table with 95 % intervals."""
    head = ["model"] + [METRICS[name][0] for name in TABLE]
    clean = markdown_text if markdown else printable
    body = [[clean(model)] + [_percent(metrics[name], interval=markdown) for name in TABLE]
            for model, metrics in results.items()]
    if markdown:
        return _markdown_table([head, *body])
    width = max(len(line[0]) for line in [head, *body])
    return "\n".join(f"{line[0]:<{width}} | " + " | ".join(f"{cell:>5}" for cell in line[1:]) for line in [head, *body])


def _markdown_table(lines: list[list[str]]) -> str:
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


def printable(text: str) -> str:
    """The text on one line: control, format and surrogate characters are written as escapes, such as \\n or \\x1b."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _short(text: str, width: int) -> str:
    text = printable(text[:width + 1])
    return text if len(text) <= width else text[:width - 1] + "…"


def markdown_text(text: str, width: int = 1000) -> str:
    """Text from outside as literal text in a Markdown table: no markup, link, HTML or control character survives."""
    return re.sub(r"([\\`*_\[\]<>#|~&$:@!])", r"\\\1", _short(text, width))


def _question_table(number: int, tables: dict[str, list[dict]], key: tuple) -> str:
    """One question: a line per wording, a column per model; a letter names the cluster, a tick an exact match."""
    found = {model: row for model, rows in tables.items() for row in rows if _key(row) == key}
    first = next(iter(found.values()))
    lines = [["wording", *map(markdown_text, found)]]
    for i, wording in enumerate(first["wordings"]):
        cells = [f"{_letter(row['cluster'][i])}{' ✓' if row['correct'][i] else ''} {markdown_text(row['responses'][i])}"
                 for row in found.values()]
        lines.append([markdown_text(wording), *cells])
    targets = " / ".join(map(markdown_text, first["targets"]))
    return (f"### {number}. {markdown_text(first['task'])}\n\nInput: {markdown_text(first['input'])}  \n"
            f"Reference: {targets}\n\n{_markdown_table(lines)}\n")


def _letter(cluster: int) -> str:
    return string.ascii_uppercase[cluster % 26]


def _differences(tables: dict[str, list[dict]]) -> str:
    """Each model against the one before it."""
    lines = [["difference, points"] + [METRICS[name][0] for name in TABLE]]
    names = list(tables)
    for before, after in zip(names, names[1:], strict=False):
        changes = [paired_difference(tables[before], tables[after], name) for name in TABLE]
        lines.append([f"{markdown_text(after)} - {markdown_text(before)}"]
                     + [_percent(change, sign="+", interval=True) for change in changes])
    return _markdown_table(lines)


def write_report(out_dir, results: dict[str, dict], tables: dict[str, list[dict]], *, shown: int = 10) -> list[Path]:
    """Write metrics.json, questions.jsonl, report.md and plots/*.png to `out_dir`; returns what was written.

    `results` and `tables` hold, per model name, the two values of `evaluate_responses`. Without matplotlib the plots
    are left out and a line says so.
    """
    out_dir = Path(out_dir)
    (out_dir / "plots").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"model": model, **row}, allow_nan=False) for model, rows in tables.items() for row in rows]
    keys = [_key(row) for row in next(iter(tables.values()))]
    chosen = [keys[i] for i in np.linspace(0, len(keys) - 1, min(shown, len(keys))).astype(int)]   # evenly, not picked
    counts = [f"- {markdown_text(model)}: {m['questions']} questions, {m['responses']} responses "
              f"({m['unfinished']} cut at the length limit), judge {markdown_text(m['judge'])}, "
              f"{m['unparsed']} unparsed verdicts, MCR by {m['cluster']}" for model, m in results.items()]
    parts = ["# Evaluation", summary_table(results, markdown=True),
             "Percent, with 95 % bootstrap intervals over questions."]
    parts += [_differences(tables)] if len(tables) > 1 else []
    parts += ["\n".join(counts), "## Metrics", "\n".join(f"- **{title}** {text}." for title, text in METRICS.values())]
    parts += [f"## {len(chosen)} questions", "Spread evenly over the test set. A letter names the cluster of similar "
              "responses, a tick an exact match."]
    parts += [_question_table(number, tables, key) for number, key in enumerate(chosen, 1)]
    texts = {"metrics.json": json.dumps(results, indent=2, allow_nan=False) + "\n",
             "questions.jsonl": "".join(line + "\n" for line in lines), "report.md": "\n\n".join(parts) + "\n"}
    for name, text in texts.items():
        (out_dir / name).write_text(text, encoding="utf-8")
    written = [out_dir / name for name in texts]
    try:
        written.append(plot_metrics(results, out_dir / "plots/metrics.png"))
        written += [plot_question(tables, out_dir / "plots/question.png")] if keys else []
    except ImportError:
        print("plots skipped: matplotlib is not installed (pip install matplotlib)")
    return written


# ---------------------------------------------------------------------------------------------------------------------
# Plots


def _figure(width: float, height: float, **layout):
    """A figure and its axes, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    return figure, figure.subplots(**layout)


def _tidy(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylabel("percent")


def plot_metrics(results: dict[str, dict], path) -> Path:
    """Grouped bars: a group per metric, a bar per model, whiskers for the 95 % interval."""
    names = [name for name in TABLE if name != "rouge1"]
    figure, axes = _figure(max(7, 1.5 + 0.32 * len(names) * (len(results) + 1)), 4)
    width = 0.8 / len(results)
    for k, (model, metrics) in enumerate(results.items()):
        means = [100 * (metrics[name]["mean"] or 0) for name in names]
        bounds = [metrics[name]["ci95"] or [metrics[name]["mean"] or 0] * 2 for name in names]
        whiskers = np.abs(100 * np.array(bounds).T - means)                                        # (2, metrics)
        at = np.arange(len(names)) + (k - (len(results) - 1) / 2) * width
        axes.bar(at, means, width * 0.92, yerr=whiskers, capsize=2, color=COLOURS[k % len(COLOURS)],
                 label=_short(model, 40), error_kw={"elinewidth": 1, "ecolor": "#444444"})
    axes.set_xticks(range(len(names)), [METRICS[name][0] for name in names])
    axes.set(xlim=(-0.55, len(names) - 0.45), ylim=(0, 100))
    _tidy(axes)
    figure.legend(loc="outside upper center", ncols=min(len(results), 5), frameon=False)
    figure.savefig(path)
    return Path(path)


def plot_question(tables: dict[str, list[dict]], path, *, key: tuple | None = None) -> Path:
    """One question's responses per model, similar ones in one colour.

    `key` is (task, id, input); by default the question on which the models' CR differ most, then the least consistent.
    """
    found = {}
    for rows in tables.values():
        for row in rows:
            found.setdefault(_key(row), []).append(row)
    rates = {k: [row["cr"] or 0 for row in rows] for k, rows in found.items() if len(rows) == len(tables)}
    rows = found[key or max(rates, key=lambda k: (np.ptp(rates[k]), -min(rates[k])))]
    first, n = rows[0], len(rows[0]["wordings"])
    figure, axes = _figure(4 + 1.9 * len(rows), 1.2 + 0.34 * n)
    colours = {}                                                            # a cluster's commonest text -> its colour
    for column, row in enumerate(rows):
        for i, text in enumerate(row["responses"]):
            peers = [other for other, k in zip(row["responses"], row["cluster"], strict=True) if k == row["cluster"][i]]
            name = Counter(peers).most_common(1)[0][0]
            colour = ALONE if len(peers) == 1 else colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])
            axes.barh(i, 0.96, 0.86, left=column - 0.48, color=colour, alpha=0.4)
            label = _short(text, 24) + (" ✓" if row["correct"][i] else "")
            axes.text(column, i, label, ha="center", va="center", fontsize=8, parse_math=False)
    axes.set_yticks(range(n), [_short(text, 50) for text in first["wordings"]], fontsize=8, parse_math=False)
    axes.set_xticks(range(len(rows)), [_short(model, 24) for model in tables], fontsize=9, parse_math=False)
    axes.xaxis.tick_top()
    axes.set(xlim=(-0.5, len(rows) - 0.5), ylim=(n - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(f"{_short(first['task'], 30)}: {_short(first['input'], 60)}", fontsize=10, parse_math=False)
    figure.supxlabel("one colour: similar responses   grey: alone   ✓ exact match", fontsize=8)
    figure.savefig(path)
    return Path(path)


def plot_sweep(points: list[tuple[float, dict]], xlabel: str, path, *, names=("cr", "rougeL")) -> Path:
    """Lines of metrics (by default CR and ROUGE-L) over a swept value, with their 95 % bands; points (x, metrics)."""
    figure, axes = _figure(6, 3.8)
    points = sorted(points, key=lambda point: point[0])
    at = [x for x, _ in points]
    for k, name in enumerate(names):
        means = [100 * metrics[name]["mean"] for _, metrics in points]
        bounds = [metrics[name]["ci95"] or [metrics[name]["mean"]] * 2 for _, metrics in points]
        low, high = 100 * np.array(bounds).T                                                       # (points,) each
        axes.plot(at, means, marker="o", color=COLOURS[k % len(COLOURS)], label=METRICS[name][0])
        axes.fill_between(at, low, high, color=COLOURS[k % len(COLOURS)], alpha=0.15, linewidth=0)
    axes.set_xlabel(xlabel)
    axes.set_xticks(at)
    _tidy(axes)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path)
    return Path(path)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def complain(message: str) -> int:
    """Print the user's mistake in one line, once for all processes; returns the exit status for it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {printable(message)}", file=sys.stderr)
    return 2


def fail(message: str) -> None:
    """Complain and exit."""
    raise SystemExit(complain(message))


def parse_flags(config_class, argv=None, description: str = "") -> dict:
    """{field: value} of what the command line gives of a dataclass of `flag`s."""
    parser = argparse.ArgumentParser(description=description or config_class.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    hints = get_type_hints(config_class)
    for item in fields(config_class):
        name, kind, default, only = "--" + item.name.replace("_", "-"), hints[item.name], item.default, item.metadata["only"]
        options = {"default": SUPPRESS, "help": item.metadata["help"] + (f" [{', '.join(only)}]" if only else "")
                   + (f" (default: {default})" if default not in ("", MISSING) else "")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is list:
            options |= {"nargs": "+", "metavar": "DIR"}
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(name, **options)
    return vars(parser.parse_args(argv))


def check_config(config: EvalConfig) -> None:
    """Raise ValueError for what can be seen to be wrong before anything is loaded."""
    for name in ("wordings", "per_task", "max_new_tokens", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} is too small. Give 1 or more.")
    if config.merge and (len(config.adapter) > 1 or config.quantize != "none"):
        raise ValueError(f"--merge takes one --adapter at most and a model in full precision; got {len(config.adapter)} and --quantize "
                         f"{config.quantize}. Merge each adapter into a folder of its own.")
    if config.merge and Path(config.merge).resolve() == Path(config.model).resolve():
        raise ValueError(f"--merge {config.merge} is the folder of the model itself. Give another.")
    if not config.temperature >= 0:
        raise ValueError(f"--temperature {config.temperature} is below 0. Give 0 or more.")
    given = [("--model", config.model), ("--instructions", config.instructions), ("--tasks", config.tasks), ("--paraphrases", config.paraphrases), ("--show-mask", config.show_mask)]
    for flag, path in given + [("--adapter", path) for path in config.adapter]:
        if path and not Path(path).exists():
            raise ValueError(f"{flag} {path} does not exist. Give the path of a file or folder that does.")


def load_questions(config: EvalConfig) -> list[dict]:
    """The held-out questions of the split, without responses."""
    from data import frame_bare_tasks, load_paraphrases, load_tasks, questions

    tasks, wordings = load_tasks(config.tasks or DEMO / "tasks"), config.paraphrases
    if wordings or not config.tasks:
        load_paraphrases(wordings or DEMO / "paraphrases.json", tasks)
    framed = frame_bare_tasks(tasks)
    if framed:
        print(framed)
    found = questions(tasks, split=config.split, wordings=config.wordings, per_task=config.per_task)
    if not found:
        raise ValueError(f"no task has two {config.split} wordings. "
                         "CR needs at least two: add some, or take the other split.")
    return found


def show_masks(config: EvalConfig) -> None:
    """Print and write to report.md the judged responses with their flagged tokens in brackets, per model."""
    from data import ERROR_JUDGMENT, find_template, load_judged

    records = [record for record in load_judged(config.show_mask) if record["judgment"] not in (None, ERROR_JUDGMENT)]
    if not records:
        raise ValueError(f"{config.show_mask} holds no unsatisfying response, so there is nothing to flag.")
    parts = []
    for name, model, tokenizer in load_models(config):
        template = find_template(config.template or model.config.prompt_template or "alpaca")
        lams = sorted({*MASK_LAMS, config.detect_lam})
        masks = cut_masks(model, tokenizer, template, records, lams=lams, max_len=config.max_len or model.config.context)
        parts.append(mask_report(name, records, masks, tokenizer, config.detect_lam))
        if len(parts) == 1:
            parts.insert(0, worked_example(name, records[0], masks[0], template, tokenizer, config.detect_lam))
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts) + f"\nreport: {out / 'report.md'}")


def worked_example(name: str, record: dict, mask: dict, template, tokenizer, lam: float) -> str:
    """Markdown: one response as CUT's three kinds of examples, token by token (arXiv 2312.14591, section 4.1)."""
    told, plain = ("\n    ".join(map(printable, template.render(record["instruction"], record["input"], judgment).split("\n")))
                   for judgment in (record["judgment"], None))
    lines = [f"## One judged response, three kinds of examples ({markdown_text(name)})", "",
             "ALIGN_N: the response fits the instruction together with its judgment; it is made likelier under", "", f"    {told}", "",
             "MISALIGN: it does not fit the instruction alone; its flagged tokens are made unlikelier, the others likelier, under", "",
             f"    {plain}", "", "ALIGN_P: had it been satisfying, it would just have been made likelier under this second prompt.", "",
             f"| token | p given the judgment | p without | ratio | more than {lam:g} |", "|---|---|---|---|---|"]
    for token, judged, alone, flag in zip(mask["ids"], mask["p_judged"], mask["p_plain"], mask["flagged"][lam], strict=True):
        lines.append(f"| {markdown_text(tokenizer.model.id_to_piece(token))} | {judged:.3f} | {alone:.3f} | {judged / max(alone, 1e-12):.2f} | {'unlearn' if flag else ''} |")
    return "\n".join(lines)


def mask_report(name: str, records: list[dict], masks: list[dict], tokenizer, lam: float, *, examples: int = 10) -> str:
    """Markdown: some responses with their flagged tokens in [brackets], and precision and recall where the truth is known."""
    lines = [f"## CUT's mask, {markdown_text(name)}, lambda {lam:g}", ""]
    for record, mask in list(zip(records, masks, strict=True))[:examples]:
        lines += [f"- instruction: {markdown_text(record['instruction'] + ' | ' + record['input'], 110)}",
                  f"  judgment: {markdown_text(record['judgment'], 110)}",
                  f"  response: {markdown_text(marked(tokenizer, mask['ids'], mask['flagged'][lam]))}"]
    scores = [score for score in mask_scores(masks) if score["n"]]
    if scores:
        lines += ["", "| lambda | precision | recall | tokens |", "|---|---|---|---|"]
        lines += [f"| {s['lam']:g} | {_ratio(s['precision'])} | {_ratio(s['recall'])} | {s['n']} |" for s in scores]
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def plot_mask(scores: list[dict], path) -> Path:
    """Precision and recall of the mask against lambda."""
    figure, axes = _figure(6, 3.8)
    for k, name in enumerate(("precision", "recall")):
        axes.plot([s["lam"] for s in scores], [100 * s[name] if s[name] is not None else float("nan") for s in scores], marker="o",
                  color=COLOURS[k], label=name)
    axes.set(xscale="log", xlabel="lambda", ylim=(0, 100))
    axes.set_xticks([s["lam"] for s in scores], [f"{s['lam']:g}" for s in scores])
    _tidy(axes)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path)
    return Path(path)


def load_models(config: EvalConfig):
    """Yield (name, model, tokenizer) for the base model and for it under each adapter."""
    import torch

    from data import Tokenizer
    from lora import load_adapter, merge_lora, mergeable
    from model import load_model

    tokenizer = Tokenizer(config.tokenizer or config.model)
    for adapter in ["", *config.adapter]:
        model = load_model(config.model, dtype=getattr(torch, config.dtype), device=config.device, quantize=config.quantize.removeprefix("none"))
        check_tokenizer(config, model, tokenizer, quiet=bool(adapter))
        if adapter:
            load_adapter(model, adapter)
            model = merge_lora(model, in_place=True) if mergeable(model) else model.eval()
        yield adapter or Path(config.model).name, model, tokenizer


def check_tokenizer(config: EvalConfig, model, tokenizer, *, quiet: bool = False) -> None:
    """The tokenizer and the template against the model; prints a warning where their BOS and EOS differ."""
    from data import check_template, check_vocabulary, find_template

    warning = check_vocabulary(tokenizer, model.config.vocab_size, model.config.bos_id, model.config.eos_ids, config.model)
    if warning and not quiet:
        print(warning)
    name = config.template or model.config.prompt_template or "alpaca"
    check_template(tokenizer, find_template(name), name)


def merge(config: EvalConfig, dtype: str | None) -> None:
    """Write the model, with its adapter merged in, and all tokenizer files. The dtype is the stored one unless given."""
    import torch

    from data import Tokenizer, copy_tokenizer
    from lora import load_adapter, merge_lora
    from model import load_model, save_meta, save_model

    tokenizer, target = Tokenizer(config.tokenizer or config.model), Path(config.merge)
    model = load_model(config.model, dtype=getattr(torch, dtype) if dtype else None, device=config.device).eval()
    check_tokenizer(config, model, tokenizer)
    if config.adapter:
        ids = torch.tensor(tokenizer.encode_prompt("The quick brown fox jumps over the lazy dog."), device=config.device)
        with torch.no_grad():
            before = load_adapter(model, config.adapter[0])(ids).float()
            after = merge_lora(model, in_place=True)(ids).float()
        print(f"merged {config.adapter[0]}: logits differ from the unmerged ones by at most {(before - after).abs().max():.1e} "
              f"(largest logit {before.abs().max():.1f}).")
    if config.template and not config.template.endswith(".json"):
        model.config.prompt_template = config.template
    if config.layout == "meta":
        save_meta(model, target)
        (target / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    else:
        save_model(model, target)
        copy_tokenizer(tokenizer, config.model, target)
    print(f"wrote {target}: {', '.join(sorted(path.name for path in target.iterdir()))}")


def answer_instructions(config: EvalConfig) -> None:
    """For each model a JSON list of {instruction, output, generator, ...}, as alpaca_eval's --model_outputs reads it."""
    from data import _read_json, find_template, read_records

    path = Path(config.instructions)
    rows = _read_json(path) if path.read_bytes().lstrip().startswith(b"[") else read_records(path)
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("instruction"), str) or not row["instruction"].strip():
            raise ValueError(f"{path}, record {number}, has no text under instruction. Expected objects with instruction and, if there is one, input.")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, model, tokenizer in load_models(config):
        template = find_template(config.template or model.config.prompt_template or "alpaca")
        made = complete(model, tokenizer, [template.render(row["instruction"], row.get("input") or "") for row in rows], batch_size=config.batch_size,
                        max_new_tokens=config.max_new_tokens, max_len=config.max_len or None)
        generator = re.sub(r"[^\w.-]+", "-", name).strip("-")
        found = [{"dataset": row["dataset"]} if isinstance(row.get("dataset"), str) else {} for row in rows]
        found = [{"instruction": "\n".join(filter(None, (row["instruction"], row.get("input")))), "output": answer.text, "generator": generator, **more}
                 for row, answer, more in zip(rows, made, found, strict=True)]
        (out / f"{generator}-outputs.json").write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        cut = sum(not answer.finished for answer in made)
        print(f"{name}: {len(found)} answers, {cut} of them cut at --max-new-tokens {config.max_new_tokens}: {out / f'{generator}-outputs.json'}")


CHAT_HELP = """/reset            begin a new conversation
/system TEXT      begin a new one under this system message
/adapter on|off   with the adapter, or the base model alone
/temperature X    0 takes the most probable token
/quit             leave, as the end of the input does"""


def chat(config: EvalConfig) -> None:
    """Read lines, print answers as they come. The adapter stays apart, so that it can be switched off."""
    import torch

    from data import Tokenizer, find_template
    from lora import disabled, load_adapter
    from model import load_model

    tokenizer = Tokenizer(config.tokenizer or config.model)
    model = load_model(config.model, dtype=getattr(torch, config.dtype), device=config.device, quantize=config.quantize.removeprefix("none")).eval()
    check_tokenizer(config, model, tokenizer)
    if config.adapter:
        load_adapter(model, config.adapter[0])
    name = config.template or model.config.prompt_template or "alpaca"
    print(f"{config.model}{' with ' + config.adapter[0] if config.adapter else ''}, template {name}. /help lists the commands.")
    messages, on, temperature = [], bool(config.adapter), config.temperature
    for line in iter(lambda: _ask("> "), None):
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            break
        if command in ("/reset", "/system"):
            messages = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
        elif command == "/adapter" and rest in ("on", "off") and config.adapter:
            on = rest == "on"
        elif command == "/temperature" and re.fullmatch(r"\d+(\.\d*)?", rest):
            temperature = float(rest)
        elif command.startswith("/"):
            print(CHAT_HELP if config.adapter else CHAT_HELP.replace("/adapter on|off   with", "(no --adapter)    with"))
        elif line.strip():
            messages.append({"role": "user", "content": line})
            with disabled(model) if not on else nullcontext():
                answer = _say_answer(model, tokenizer, find_template(name), messages, config, temperature)
            messages.append({"role": "assistant", "content": answer})


def _ask(mark: str) -> str | None:
    """A line from the terminal; None at its end."""
    try:
        return input(mark)
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _say_answer(model, tokenizer, template, messages: list[dict], config: EvalConfig, temperature: float) -> str:
    """Print the answer while it is made, and how fast it came; the oldest turns are forgotten where they no longer fit."""
    from data import cut_left, stop_ids
    from model import generate

    room = min(config.max_len or sys.maxsize, model.config.context) - config.max_new_tokens
    if room < 2:
        raise ValueError(f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt. Lower it.")
    first = sum(message["role"] == "system" for message in messages[:1])
    prompt = template.render_conversation(messages)
    while len(tokenizer.encode_prompt(prompt)) > room and len(messages) > first + 2:
        del messages[first:first + 2]
        prompt = template.render_conversation(messages)
        print("(the oldest turn is forgotten: the conversation is longer than the model takes)")
    shown, started, stop = [""], time.time(), (*stop_ids(tokenizer, [prompt]), *model.config.eos_ids)

    def watch(ids: list[int]) -> None:
        text = "\n".join(map(printable, tokenizer.decode(ids).split("\n")))
        if text.startswith(shown[0]) and not text.endswith("\ufffd"):                   # half of a character comes later
            print(text[len(shown[0]):], end="", flush=True)
            shown[0] = text
    ids = generate(model, [cut_left(tokenizer.encode_prompt(prompt), room)], max_new_tokens=config.max_new_tokens, temperature=temperature,
                   eos_ids=stop, seed=config.seed + len(messages), watch=watch)[0]
    print(f"\n({len(ids)} tokens, {len(ids) / (time.time() - started):.1f} a second{'' if ids[-1] in stop else ', cut at --max-new-tokens'})")
    return tokenizer.decode(ids)


def main(argv=None) -> None:
    """Evaluate a model and its adapters; print the table and write the report."""
    given = parse_flags(EvalConfig, argv)
    other = any(given.get(name) for name in ("tasks", "chat", "instructions", "merge"))
    config = EvalConfig(**({} if other else DEMO_DEFAULTS) | given)
    try:
        check_config(config)
        if config.merge:
            return merge(config, given.get("dtype"))
        if config.chat:
            return chat(config)
        if config.instructions:
            return answer_instructions(config)
        if config.show_mask:
            return show_masks(config)
        from judge import RuleJudge

        asked, judge = load_questions(config), RuleJudge(rouge_threshold=config.rouge_threshold)
        results, tables = {}, {}
        for name, model, tokenizer in load_models(config):
            results[name], tables[name] = evaluate_responses(
                evaluate_model(model, tokenizer, asked, config), judge=judge, cluster=config.cluster,
                use_stemmer=config.use_stemmer, seed=config.seed)
        report = write_report(config.out, results, tables)[2]
    except (ValueError, OSError) as error:
        fail(str(error))
    print(f"{summary_table(results)}\nreport: {report}")


if __name__ == "__main__":
    main()
