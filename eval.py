"""Are a model's answers the same, and right, however the question is worded? Generation, metrics, reports and plots.

    python eval.py --model DIR                              the base model on held-out wordings of held-out inputs
    python eval.py --model DIR --adapter runs/sft runs/cat  ... and with each adapter, side by side
    python eval.py --benchmark llmbar --data DIR --judge http --judge-model NAME --strategy rules metrics_reference
    python eval.py --paraphrase 8 --tasks DIR --judge-model NAME --out DIR      wordings of the tasks' instructions
    python eval.py --model DIR --adapter runs/cat --chat    talk to it; /help lists what else you can type
    python eval.py --model DIR --adapter runs/cat --merge OUT          write one folder for other programs
    python eval.py --model DIR --instructions FILE          answer them, in the form that alpaca_eval reads

Metrics: CR and MCR of arXiv 2403.14221; ROUGE of Lin 2004; exact match as Super-NaturalInstructions defines it; and of a
judge against people's labels, accuracy, agreement of both orders, kappa, and its biases (LLMBar, arXiv 2310.07641).

    question    one input under n wordings of its task's instruction, hence n responses
    similar     (n, n) bool matrix: similar[i, j] if the judge, shown responses i and j in this order, says they agree
    N           tokens laid end to end          M   next tokens that are scored          V   vocabulary

Whatever imports torch is imported by the function that needs it, so that a wrong flag answers at once.
"""

from __future__ import annotations

import argparse
import difflib
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
from itertools import combinations, groupby, permutations
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
class JudgeFlags:
    """The flags of a judge behind HTTP; eval.py and train.py have them both."""

    judge_url: str = flag("http://127.0.0.1:8000/v1", "address of an OpenAI-compatible server, with or without /v1")
    judge_model: str = flag("", "the judge's name there (for --benchmark several, with commas between)")
    judge_key_env: str = flag("JUDGE_API_KEY", "environment variable that holds the key, if the server wants one")
    judge_cache: str = flag("", "file of all answers; they are never asked for again (default: judge.jsonl in --out)")
    judge_workers: int = flag(8, "requests under way at a time")
    judge_tries: int = flag(5, "tries per request")
    judge_timeout: float = flag(60.0, "seconds of silence from the server")
    judge_deadline: float = flag(300.0, "seconds for a request with all its tries")
    judge_proxy: str = flag("", "proxy, http://host:port (those of the environment are not used)")
    judge_ca: str = flag("", "file of certificates to trust instead of the usual ones")
    judge_max_tokens: int = flag(0, "let every answer of the judge have at least so many tokens, e.g. to think (0: as few as its verdict needs)")
    max_requests: int = flag(0, "stop before sending more requests than this (0: no limit)")
    budget: float = flag(0.0, "stop before spending more than this, at --price-in and --price-out (0: no limit)")
    price_in: float = flag(0.0, "price of a million prompt tokens")
    price_out: float = flag(0.0, "price of a million completion tokens")
    max_unparsed: float = flag(0.1, "share of unreadable verdicts that stops a run, from the hundredth on")


@dataclass
class EvalConfig(JudgeFlags):
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
    prefix: str = flag("", "words before every instruction, e.g. the best mark of a conditional model")
    max_new_tokens: int = flag(128, "longest response in tokens")
    max_len: int = flag(0, "most tokens of prompt and response together (0: what the model takes)")
    batch_size: int = flag(64, "responses generated side by side")
    rouge_threshold: float = flag(0.7, "ROUGE-L from which the rule judge calls two free texts similar")
    judge: Literal["rule", "http", "self"] = flag("rule", "who judges: rules, a server, or (--benchmark only) the model itself")
    symmetrize: Literal["and", "or", "first"] = flag("and", "a pair agrees if the judge says so in both orders, in either, or in the first")
    cluster: Literal["clique", "component", "greedy"] = flag("clique", "what counts as a cluster in MCR")
    use_stemmer: bool = flag(False, "Porter stemmer in ROUGE, as Super-NI's own evaluation has it")
    seed: int = flag(0, "seeds the bootstrap")
    device: str = flag("auto", "cpu, cuda, cuda:1, ... (auto: cuda where there is one)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "type of the base weights (auto: bfloat16 on a GPU, else float32)")
    reference: str = flag("", "adapter folder: also measure each adapter's KL to the model under that one")
    best_of: int = flag(0, "instead of evaluating: sample so many answers per question, and what the best of n is worth")
    reward_model: str = flag("", "... with n chosen by this reward model, too (run folder of --stage reward)")
    benchmark: Literal["", "llmbar"] = flag("", "measure the judge against people's labels, instead of a model")
    data: str = flag("", "... on the instances in this folder or file: LLMBar's, or {input, output_1, output_2, label}")
    strategy: list[str] = flag(list, "... by these ways of asking (default: rules; with --judge rule: longer, shorter, overlap)")
    verdict_rule: Literal["live", "llmbar", "llmbar_verdict"] = flag("live", "... how a verdict is read: ours, or as LLMBar's code reads it")
    repeats: int = flag(1, "... asking so many times, to see how often the judge agrees with itself")
    own: str = flag("", "... with this as the judge's own family among the outputs' sources (source_1, source_2)")
    instances: int = flag(0, "... with so many instances per subset, at most (0: all)")
    paraphrase: int = flag(0, "write this many wordings of each task's instruction with the judge's model, instead of evaluating")
    quantize: Literal["none", "int8", "nf4"] = flag("none", "keep the model's linears in 8 or 4 bits")
    compile: bool = flag(False, "compile the one-token step of sampling: some 20 s for each shape, then faster")
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
    room, stop = prompt_room(model, max_new_tokens, max_len), (*stop_ids(tokenizer, asked), *model.config.eos_ids)
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


def prompt_room(model, max_new_tokens: int, max_len: int | None) -> int:
    """How many tokens a prompt may have, or a ValueError."""
    room = min(max_len or sys.maxsize, model.config.context) - max_new_tokens
    if room < 2:
        raise ValueError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: prompt and answer share "
                         f"{room + max_new_tokens} tokens. Lower it.")
    return room


@dataclass(frozen=True)
class _Branch:
    """Tokens to run behind a prefix, and the next tokens to score: (keyword 0 or 1, position, token id)."""

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


def _add_logprobs(model, forks: list[tuple[list[int], list[_Branch]]], results) -> None:
    """Read each prefix once and its branches behind it; add each target's log-probability to results (items, 2)."""
    import torch

    from model import attention, put

    ids, asked, device = [], [], results.device
    for prefix, branches in forks:
        ids += prefix
        for branch in branches:
            asked += [(branch.item, which, len(ids) + position, token) for which, position, token in branch.targets]
            ids += branch.token_ids
    items, which, positions, tokens = put(torch.tensor(asked), device).unbind(1)                    # (M,) each
    attend = attention([(len(prefix), [len(branch.token_ids) for branch in branches]) for prefix, branches in forks], device)
    hidden = model.hidden(put(torch.tensor(ids), device), attend, rows=positions)                   # (M, D)
    logprobs = model.lm_head(hidden).float().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)  # (M,)
    results.index_put_((items, which), logprobs, accumulate=True)


def keyword_logprobs(model, tokenizer, prefixes: list[str], suffixes: list[str], keywords: list[tuple[str, str]], *,
                     batch_size: int = 64, max_len: int | None = None) -> list[tuple[float, float]]:
    """log P(keyword | prefix + suffix), over all tokens of the keyword, for both keywords of every item.

    A prefix that several items share is read once for each `batch_size` of them. Prefixes end in a newline and keywords begin
    with a space. Raises ValueError where a keyword is no continuation of its suffix.
    """
    import torch

    from data import cut_left

    by_prefix = {}
    for item, (prefix, suffix, pair) in enumerate(zip(prefixes, suffixes, keywords, strict=True)):
        by_prefix.setdefault(prefix, []).extend(_branches(tokenizer, item, suffix, pair))
    forks = [(text, branch) for text in sorted(by_prefix, key=len) for branch in sorted(by_prefix[text], key=lambda branch: len(branch.token_ids))]
    longest = {text: max(len(branch.token_ids) for branch in branches) for text, branches in by_prefix.items()}
    most = min(max_len or sys.maxsize, model.config.context)
    if most - max(longest.values(), default=0) < 2:
        raise ValueError(f"an answer to judge has about {max(longest.values())} tokens and leaves no room for its question within "
                         f"{most}. Lower --max-new-tokens, or raise --max-len.")
    results, was_training = torch.zeros(len(prefixes), 2, device=next(model.parameters()).device), model.training           # (items, 2)
    model.eval()
    try:
        with torch.inference_mode():
            for part in _chunks(forks, batch_size):                         # like lengths attend together
                _add_logprobs(model, [(cut_left(tokenizer.encode_prompt(text), most - longest[text]), [branch for _, branch in same])
                                      for text, same in groupby(part, key=lambda fork: fork[0])], results)
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


def _ask_pairs(questions: list[dict], judge, symmetrize: str) -> list[dict]:
    """For each question {(a, b): verdict} over its pairs of different texts; None is unparsed, and counts as not similar.

    Each ordered pair is asked once, "first" asks in order of appearance only. A judge with `similar_pairs` gets all of
    them at once, so that many can be under way.
    """
    pick = combinations if symmetrize == "first" else permutations
    pairs = [(question, a, b) for question in questions for a, b in pick(dict.fromkeys(question["responses"]), 2)]
    if hasattr(judge, "similar_pairs"):
        verdicts = judge.similar_pairs(pairs)
    else:
        verdicts = [judge.similar(a, b, question.get("labels")) for question, a, b in pairs]
    found = {id(question): {} for question in questions}
    for (question, a, b), verdict in zip(pairs, verdicts, strict=True):
        found[id(question)][a, b] = verdict
    return [found[id(question)] for question in questions]


def _similar(texts: list[str], said: dict, symmetrize: str) -> np.ndarray:
    """similar (n, n) from the verdicts on one question's pairs."""
    if symmetrize == "first":
        said = said | {(b, a): verdict for (a, b), verdict in said.items()}
    similar = np.array([[a == b or said[a, b] is True for b in texts] for a in texts], dtype=bool)
    return similar | similar.T if symmetrize == "or" else similar


def _evaluate_question(question: dict, said: dict, symmetrize: str, cluster: str, use_stemmer: bool) -> dict:
    """One question with its metrics, and for each response its cluster and whether it is an exact match."""
    responses, n = question["responses"], len(question["responses"])
    if not responses or not question["targets"]:
        raise ValueError(f"a question of task {question['task']} has {n} responses and {len(question['targets'])} "
                         "references. Give it at least one of each.")
    similar, unparsed = _similar(responses, said, symmetrize), sum(verdict is None for verdict in said.values())
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


def evaluate_responses(questions: list[dict], *, judge, cluster: str = "clique", use_stemmer: bool = False, symmetrize: str = "and",
                       resamples: int = 1000, seed: int = 0) -> tuple[dict, list[dict]]:
    """A model's metrics, and the table behind them: each question with its own values of METRICS.

    A question is {task, input, targets, wordings, responses} and, where known, id, labels, styles, unfinished. The
    judge is asked `judge.similar(a, b, labels) -> True | False | None` in both orders, or for all pairs at once with
    `judge.similar_pairs([(question, a, b)])`; None means unparsed. All metrics
    are means over questions; one with a single response has no CR and is left out there. `mcr` follows `cluster`.
    Raises ValueError for a question without responses or without references.
    """
    rows = [_evaluate_question(question, said, symmetrize, cluster, use_stemmer)
            for question, said in zip(questions, _ask_pairs(questions, judge, symmetrize), strict=True)]
    styles = _exact_match_by_style(rows)
    metrics = {name: bootstrap([row[name] for row in rows], resamples=resamples, seed=seed) for name in METRICS}
    metrics["by_style"] = {style: bootstrap(styles[style], resamples=resamples, seed=seed) for style in styles}
    return metrics | {
        "judge": getattr(judge, "name", type(judge).__name__), "cluster": cluster, "symmetrize": symmetrize, "use_stemmer": use_stemmer,
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
    prompts = [template.render(config.prefix + text, question["input"]) for question in questions for text in question["wordings"]]
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


VALUE_HEAD = "value_head.safetensors"


def add_head(model):
    """A scalar head on the final hidden states, float32, zero at the start, for rewards and PPO's values: model.value_head."""
    import torch

    model.value_head = torch.nn.Linear(model.config.dim, 1, device=next(model.parameters()).device)
    torch.nn.init.zeros_(model.value_head.weight)
    torch.nn.init.zeros_(model.value_head.bias)
    return model.value_head


def load_head(model, file: Path) -> None:
    """Put a saved head on the model. Raises ValueError where the file is damaged or another model's."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{file} is damaged or incomplete: {' '.join(str(error).split())[:100]}. Get it again.") from None
    shapes, wanted = {name: tuple(tensor.shape) for name, tensor in found.items()}, {"weight": (1, model.config.dim), "bias": (1,)}
    if shapes != wanted or not all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in found.values()):
        raise ValueError(f"{file} holds {str(shapes)[:200]}. Expected {wanted} in finite float32 numbers: it belongs to another model, or is broken.")
    add_head(model).load_state_dict(found)


def document_rewards(model, batch: dict):
    """The value head on the last token (EOS) of each packed document, float32 (n,)."""
    from model import attention

    attend = batch.get("attend") or attention(batch["trees"], batch["input_ids"].device)
    return model.value_head(model.hidden(batch["input_ids"], attend, rows=batch["ends"]).float()).squeeze(-1)        # (n, D) -> (n,)


def reward_scores(model, tokenizer, template, items: list[dict], *, max_len: int = 512, max_tokens: int = 8192) -> list[float]:
    """A reward model's scalars of responses under their wordings; items: {"wording", "input", "response"}."""
    import torch

    from data import encode_example, micro_batches, pack
    from model import put

    groups = [{"documents": [encode_example(tokenizer, template, template.render(item["wording"], item["input"]), item["response"],
                                            max_len=max_len)]} for item in items]
    scores, device = [], next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for part in micro_batches(groups, max_tokens):
            batch = pack([group["documents"][0] for group in part])
            scores += document_rewards(model, batch | {name: put(batch[name], device) for name in ("input_ids", "ends")}).tolist()
    return scores


def sampled_answers(model, tokenizer, questions: list[dict], config: EvalConfig, *, n: int, temperature: float = 1.0) -> list[list[Completion]]:
    """n answers per question under its first wording, each from its own seed."""
    from data import find_template

    template = find_template(config.template or model.config.prompt_template or "alpaca")
    prompts = [template.render(config.prefix + question["wordings"][0], question["input"]) for question in questions for _ in range(n)]
    made = complete(model, tokenizer, prompts, max_new_tokens=config.max_new_tokens, temperature=temperature, max_len=config.max_len or None,
                    seed=[config.seed * 1_000_003 + k for k in range(len(prompts))], batch_size=config.batch_size)
    return [made[k:k + n] for k in range(0, len(made), n)]


def sampled_kl(model, reference, tokenizer, questions: list[dict], config: EvalConfig) -> dict:
    """KL(model || reference) in nats per answer: the mean of log p / p_ref of sampled answers, with its bootstrap interval.

    One answer per question at temperature 1; the sampled ids are scored, not their text encoded again.
    """
    import torch

    from data import cut_left, find_template, micro_batches, pack
    from losses import gathered_logprobs, prediction_rows
    from model import put

    room = prompt_room(model, config.max_new_tokens, config.max_len or None)
    template, answers = find_template(config.template or model.config.prompt_template or "alpaca"), sampled_answers(model, tokenizer, questions, config, n=1)
    device, sums = next(model.parameters()).device, []
    for judge, prefix in ((model, config.prefix), (reference, "")):         # what the prefix changes is part of the distance
        documents, found = [], []
        for question, (answer,) in zip(questions, answers, strict=True):
            prompt = cut_left(tokenizer.encode_prompt(template.render(prefix + question["wordings"][0], question["input"])), room)
            documents.append({"input_ids": prompt + answer.token_ids, "labels": [-100] * len(prompt) + answer.token_ids})
        with torch.inference_mode():
            for part in micro_batches([{"documents": [document]} for document in documents], 8192):
                batch = pack([group["documents"][0] for group in part])
                rows, targets = prediction_rows(batch["labels"])
                logprobs = gathered_logprobs(judge(put(batch["input_ids"], device), lengths=batch["lengths"], logits_at=put(rows, device)), put(targets, device))
                sizes = [sum(label != -100 for label in group["documents"][0]["labels"]) for group in part]
                found += [float(piece.sum()) for piece in logprobs.cpu().split(sizes)]
        sums.append(found)
    return bootstrap([a - b for a, b in zip(*sums)], seed=config.seed)


def best_of_table(rewards: list[list[float]], truths: list[list[float]]) -> list[dict]:
    """What the best of n is worth: [{"n", "kl", "reward", "truth"}], n = 1, 2, 4, ..., means over questions, without bias.

    rewards: per question those of its N samples, by which the best is chosen; truths: what each is really worth.
    """
    from losses import best_of_n, best_of_n_kl

    total, rows = len(rewards[0]), []
    for n in [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < total] + [total]:
        rows.append({"n": n, "kl": best_of_n_kl(n), "reward": float(np.mean([best_of_n(r, n) for r in rewards])),
                     "truth": float(np.mean([best_of_n(r, n, t) for r, t in zip(rewards, truths, strict=True)]))})
    return rows


def evaluate_best_of(config: EvalConfig, asked: list[dict], judge) -> None:
    """Print and write best_of.json: per model, the exact answers among the best of n by the judge, and by a reward model.

    A question with a sample that the judge gave no reward is left out of its table.
    """
    from data import find_template

    found, scorer = {}, None
    if config.reward_model:
        _, scorer, _ = next(load_models(config, [config.reward_model]))
        if not hasattr(scorer, "value_head"):
            raise ValueError(f"{config.reward_model} has no {VALUE_HEAD}. Give the run folder of train.py --stage reward.")
    for name, model, tokenizer in load_models(config):
        answers = sampled_answers(model, tokenizer, asked, config, n=config.best_of)
        items = [{**question, "instruction": "", "target": question["targets"][0], "targets": question["targets"],
                  "wording": question["wordings"][0], "response": answer.text} for question, made in zip(asked, answers) for answer in made]
        truths = [float(exact_match(item["response"], item["targets"])) for item in items]
        choosers = {"exact rules" if config.judge == "rule" else judge.name: [verdict.reward for verdict in judge.judge(items)]}
        if scorer is not None:
            template = find_template(config.template or model.config.prompt_template or "alpaca")
            choosers["reward model"] = reward_scores(scorer, tokenizer, template, items)
        cut = [list(range(k, k + config.best_of)) for k in range(0, len(items), config.best_of)]
        for chooser, rewards in choosers.items():
            kept = [part for part in cut if all(rewards[i] is not None for i in part)]
            if not kept:
                raise ValueError(f"{chooser} left a sample of every question without a reward, so there is no best of n. Give another judge.")
            rows = found.setdefault(name, {})[chooser] = best_of_table([[rewards[i] for i in part] for part in kept], [[truths[i] for i in part] for part in kept])
            left = f" ({len(cut) - len(kept)} left out: a sample got no reward)" if len(kept) < len(cut) else ""
            print(f"{name}, best of n by {chooser}, {len(kept)} questions{left}:")
            for row in rows:
                print(f"  n {row['n']:4d} | KL <= {row['kl']:5.3f} nats | reward {row['reward']:6.3f} | exact {100 * row['truth']:5.1f} %")
    Path(config.out).mkdir(parents=True, exist_ok=True)
    Path(config.out, "best_of.json").write_text(json.dumps(found, indent=1) + "\n")


def correlation(x, y, *, ranks: bool = False) -> float | None:
    """Pearson's r of two lists, or with `ranks` Spearman's (ties share their mean rank); None where one does not vary."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if ranks:
        x, y = ([np.mean(np.flatnonzero(np.sort(z) == value)) for value in z] for z in (x, y))
    if len(x) < 2 or np.std(x) == 0 or np.std(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def reward_report(rows: list[dict]) -> dict:
    """A reward against its judge, the truth and length (arXiv 2310.03716); rows: {"group", "reward", "judge", "truth", "length"}.

    "accuracy" and "true_accuracy": share of a group's pairs of different judge's (true) reward that the reward orders
    alike, ties counting half; "longer_wins": the share that length alone orders as the judge does, of pairs of different
    length; "length" and "length_rank": Pearson and Spearman of reward and length; "length_within": Pearson after each
    group's means are taken off.
    """
    groups: dict = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    pairs = [pair for group in groups.values() for pair in combinations(group, 2)]

    def ordered(by, like, pairs):
        signs = [(np.sign(a[by] - b[by]) * np.sign(a[like] - b[like]) + 1) / 2 for a, b in pairs if a[like] != b[like]]
        return float(np.mean(signs)) if signs else None
    means = {group: {key: np.mean([row[key] for row in members]) for key in ("reward", "length")} for group, members in groups.items()}
    within = [[row[key] - means[row["group"]][key] for row in rows] for key in ("reward", "length")]
    rewards, lengths = [row["reward"] for row in rows], [row["length"] for row in rows]
    return {"accuracy": ordered("reward", "judge", pairs), "true_accuracy": ordered("reward", "truth", pairs),
            "longer_wins": ordered("length", "judge", [(a, b) for a, b in pairs if a["length"] != b["length"]]),
            "length": correlation(rewards, lengths), "length_rank": correlation(rewards, lengths, ranks=True),
            "length_within": correlation(*within), "comparisons": sum(a["judge"] != b["judge"] for a, b in pairs)}


def evaluate_errors(model, tokenizer, questions: list[dict], config: EvalConfig, *, judge, seed: int = 0,
                    share=lambda items, work: work(items)) -> tuple[dict, list[dict]]:
    """Metrics and table as `evaluate_responses` has them for greedy answers, plus the shares of answers that are wrong.

    "error_rate" counts greedy answers that are no exact match, "sampled_error_rate" answers sampled at temperature 1.
    `share(items, work)` returns work(items), and may have processes do parts of it.
    """
    from data import find_template

    template = find_template(config.template or model.config.prompt_template or "alpaca")
    results, tables = evaluate_responses(share(questions, lambda part: evaluate_model(model, tokenizer, part, config)), judge=judge)
    prompts = [template.render(config.prefix + text, question["input"]) for question in questions for text in question["wordings"]]

    def draw(part):
        texts, seeds = map(list, zip(*part))
        return [answer.text for answer in complete(model, tokenizer, texts, max_new_tokens=config.max_new_tokens, temperature=1.0, seed=seeds,
                                                   batch_size=config.batch_size, max_len=config.max_len or None)]
    made = iter(share([(prompt, seed + k) for k, prompt in enumerate(prompts)], draw))
    drawn = [{**question, "responses": [next(made) for _ in question["wordings"]]} for question in questions]
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
    from model import put

    groups = [{"documents": [encode_example(tokenizer, template, template.render(record["instruction"], record["input"], judgment, literal=True),
                                            record["response"], max_len=max_len)]} for record, judgment in zip(records, judgments, strict=True)]
    found, device = [], next(model.parameters()).device
    with torch.inference_mode():
        for part in micro_batches(groups, max_tokens):
            documents = [document for group in part for document in group["documents"]]
            batch = pack(documents)
            rows, targets = prediction_rows(batch["labels"])
            logprobs = gathered_logprobs(model(put(batch["input_ids"], device), lengths=batch["lengths"], logits_at=put(rows, device)), put(targets, device))
            sizes = [sum(label != -100 for label in document["labels"]) for document in documents]
            found += [(ids.tolist(), values) for ids, values in zip(targets.split(sizes), logprobs.cpu().split(sizes), strict=True)]
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
# How far to trust a judge: LLMBar (arXiv 2310.07641)

JUDGE_COLUMNS = {                                          # name in metrics.json: (column title, what it says)
    "accuracy": ("Acc", "share of verdicts that agree with people's label, mean of both orders"),
    "accuracy_both": ("Both", "share of instances that are right in both orders"),
    "agreement": ("Agr", "share of instances with the same verdict in both orders (two unread ones count as the same, as published)"),
}


def cohen_kappa(first: list, second: list) -> float | None:
    """Cohen's kappa of two codings, (p_o - p_e) / (1 - p_e), unweighted; None where chance alone explains everything."""
    n, known = len(first), set(first) | set(second)
    if not n:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    expected = sum(first.count(code) * second.count(code) for code in known) / n ** 2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def llmbar_statistics(labels: list[int], winners: list[list]) -> dict:
    """What LLMBar's statistics.json holds for these labels (1, 2) and winners ("1", "2", None, in both orders): its very strings.

    For parity only: its kappas with the label compare winners called 1 and 0 with labels called 1 and 2.
    """
    n, gold = len(labels), [str(label) for label in labels]
    first, second = ([pair[k] for pair in winners] for k in (0, 1))
    right = [sum(a == b for a, b in zip(side, gold, strict=True)) for side in (first, second)]
    both, equal = sum(a == b == c for a, b, c in zip(first, second, gold)), sum(a == b for a, b in zip(first, second))

    coded = [[int(winner == "1") for winner in side] for side in (first, second)]
    kappas = [cohen_kappa(side, labels) for side in coded]

    def share(k):
        return f"{k} / {n} = {k / n * 100}%"
    return {"correct_False": share(right[0]), "correct_True": share(right[1]), "correct_average": f"{sum(right) / 2 / n * 100}%",
            "correct_both": share(both), "equal": share(equal), "kappa_False": kappas[0], "kappa_True": kappas[1],
            "kappa_average": None if None in kappas else sum(kappas) / 2, "kappa_agreement": cohen_kappa(*coded)}


def judge_metrics(pairs: list[dict], rows: list[dict], *, own: str = "", seed: int = 0) -> dict:
    """A judge's rows (judge.evaluate_pairs) against the labels of its pairs.

    JUDGE_COLUMNS with intervals over instances; "kappa" with the label (mean of both orders, unparsed a code of its own)
    and "kappa_orders" of the two orders; "llmbar_compat", what LLMBar's own code would report; counts; "length" and "self_preference".
    """
    gold, winners = [str(pair["label"]) for pair in pairs], [row["winners"] for row in rows]
    hits = [[winner == label for winner in pair] for pair, label in zip(winners, gold, strict=True)]
    values = {"accuracy": [sum(pair) / 2 for pair in hits], "accuracy_both": [float(all(pair)) for pair in hits],
              "agreement": [float(a == b) for a, b in winners]}
    kappas = [cohen_kappa(["-" if pair[k] is None else pair[k] for pair in winners], gold) for k in (0, 1)]
    failures = Counter(failure.split(":")[0] for row in rows for failure in row["failures"])
    return {**{name: bootstrap(found, seed=seed) for name, found in values.items()},
            "kappa": None if None in kappas else sum(kappas) / 2,
            "kappa_orders": cohen_kappa(*(["-" if pair[k] is None else pair[k] for pair in winners] for k in (0, 1))),
            "llmbar_compat": llmbar_statistics([pair["label"] for pair in pairs], winners),
            "n": len(pairs), "verdicts": 2 * len(pairs), "unparsed": sum(winner is None for pair in winners for winner in pair),
            "draws": sum(row["draw"] for row in rows), "failures": dict(sorted(failures.items())),
            "length": length_bias(pairs, winners), "self_preference": self_preference(pairs, winners, own)}


def length_bias(pairs: list[dict], winners: list[list], *, least: int = 30) -> dict:
    """How often the longer output wins, and how often people say it should, where lengths differ by more than `least` characters.

    Also the accuracy where the longer output is right, and where the shorter one is. Unparsed verdicts are left out.
    """
    rows = []
    for pair, said in zip(pairs, winners, strict=True):
        difference = len(pair["output_1"]) - len(pair["output_2"])
        if abs(difference) > least:
            longer = "1" if difference > 0 else "2"
            rows += [(winner == longer, str(pair["label"]) == longer) for winner in said if winner is not None]

    def mean(found):
        return sum(found) / len(found) if found else None
    return {"verdicts": len(rows), "longer_wins": mean([won for won, _ in rows]), "longer_is_right": mean([right for _, right in rows]),
            "accuracy_longer_right": mean([won for won, right in rows if right]),
            "accuracy_shorter_right": mean([not won for won, right in rows if not right])}


def self_preference(pairs: list[dict], winners: list[list], own: str) -> dict | None:
    """The win rate that the judge gives outputs of its own family, less the one that people give them; None without sources.

    A pair counts where exactly one of source_1 and source_2 holds `own`.
    """
    rows = []
    for pair, said in zip(pairs, winners, strict=True):
        mine = [own.lower() in str(pair.get(name, "")).lower() for name in ("source_1", "source_2")]
        if own and mine[0] != mine[1]:
            name = "1" if mine[0] else "2"
            rows += [(winner == name, str(pair["label"]) == name) for winner in said if winner is not None]
    if not rows:
        return None
    judged, people = (sum(column) / len(rows) for column in zip(*rows))
    return {"own": own, "verdicts": len(rows), "judge": judged, "people": people, "difference": judged - people}


def retest_agreement(repeats: list[list[dict]]) -> dict | None:
    """How often the same question gets the same verdict when it is asked again, mean over pairs of repeats; None for one.

    A verdict that cannot be read agrees with nothing.
    """
    if len(repeats) < 2:
        return None
    return bootstrap([float(np.mean([a["winners"][k] == b["winners"][k] is not None for a, b in combinations(rows, 2) for k in (0, 1)])) for rows in zip(*repeats, strict=True)])


def average_metrics(subsets: dict[str, dict], names: list[str]) -> dict:
    """The unweighted mean over subsets of each of JUDGE_COLUMNS, as LLMBar averages; intervals from independent subsets."""
    found = {}
    for name in JUDGE_COLUMNS:
        values = [subsets[subset][name] for subset in names]
        mean = sum(value["mean"] for value in values) / len(values)
        spread = None if any(value["ci95"] is None for value in values) else sum(
            ((value["ci95"][1] - value["ci95"][0]) / 2) ** 2 for value in values) ** 0.5 / len(values)
        found[name] = {"mean": mean, "ci95": None if spread is None else [max(0.0, mean - spread), min(1.0, mean + spread)],
                       "n": sum(value["n"] for value in values)}
    return found


class LocalChat:
    """The local model as a backend for judge.py's questions, in place of a server.

    Where a question wants one of its choices and nothing else, the more probable one is the verdict; otherwise the model
    writes. A prompt that does not fit is a failure, never cut.
    """

    def __init__(self, model, tokenizer, template, *, batch_size: int = 16):
        self.model, self.tokenizer, self.template, self.batch_size = model, tokenizer, template, batch_size

    def ask(self, questions, *, temperature: float = 0.0, sample: int = 0, progress=None) -> list:
        """One judge.Reply per question."""
        from judge import Reply

        # the user's message goes where no place holder is looked for: it holds texts under judgment, which must stay as they are
        prompts = [self.template.render(*(message["content"] for message in question.messages)) for question in questions]
        limit = self.model.config.context
        fits = [i for i, text in enumerate(prompts) if len(self.tokenizer.encode_prompt(text)) + questions[i].max_tokens <= limit]
        picked = [i for i in fits if questions[i].pick]
        replies = {i: Reply("", "prompt longer than the model takes") for i in range(len(questions))}
        heads = [f"VERDICT {questions[i].nonce}:" for i in picked]
        words = [tuple(f" {word}" for word in questions[i].choices) for i in picked]
        said = keyword_logprobs(self.model, self.tokenizer, [prompts[i].rstrip("\n") + "\n" for i in picked], heads, words,
                                batch_size=self.batch_size) if picked else []
        for i, head, pair, (first, second) in zip(picked, heads, words, said, strict=True):
            known = first == first and second == second
            replies[i] = Reply(head + pair[second > first], odds=first - second) if known else Reply("", "no number")
        by_length = {}
        for i in fits:
            if i not in picked:
                by_length.setdefault(questions[i].max_tokens, []).append(i)
        for length, group in by_length.items():
            made = complete(self.model, self.tokenizer, [prompts[i] for i in group], max_new_tokens=length, temperature=temperature,
                            seed=[1000 * sample + i for i in group], batch_size=self.batch_size)
            replies |= {i: Reply(answer.text, "" if answer.finished and answer.text else "empty message" if answer.finished else "cut at max_tokens")
                        for i, answer in zip(group, made, strict=True)}
        return [replies[i] for i in range(len(questions))]


def check_judge(flags: JudgeFlags, *, asked: bool) -> None:
    """Raise ValueError for judge flags that cannot work, or that nothing reads; nothing is sent or written."""
    usual = JudgeFlags()
    given = [name for name in JudgeFlags.__annotations__ if getattr(flags, name) != getattr(usual, name)]
    if given and not asked:
        raise ValueError(f"--{given[0].replace('_', '-')} is for a judge behind HTTP. Add --judge http, or leave it out.")
    if not 0 <= flags.max_unparsed <= 1:
        raise ValueError(f"--max-unparsed is {flags.max_unparsed}. Expected a share between 0 and 1.")
    if asked:
        from judge import chat_address, read_key

        client_config(flags, flags.judge_model.split(",")[0], "")
        read_key(flags.judge_key_env, chat_address(flags.judge_url), flags.judge_proxy)


def client_config(flags: JudgeFlags, model: str, cache: str):
    """The client's settings that the flags give."""
    from judge import ClientConfig

    return ClientConfig(url=flags.judge_url, model=model.strip(), key_env=flags.judge_key_env, cache=cache, workers=flags.judge_workers,
                        tries=flags.judge_tries, timeout=flags.judge_timeout, deadline=flags.judge_deadline, max_tokens=flags.judge_max_tokens,
                        max_requests=flags.max_requests, budget=flags.budget, price_in=flags.price_in, price_out=flags.price_out, proxy=flags.judge_proxy, ca=flags.judge_ca)


def make_client(flags: JudgeFlags, out, model: str = ""):
    """The client that the flags describe, with its answers in --judge-cache or in `out`; its limits are those of the run."""
    from judge import RUN, ChatClient

    cache = Path(flags.judge_cache or Path(out) / "judge.jsonl")
    cache.parent.mkdir(parents=True, exist_ok=True)
    return ChatClient(client_config(flags, model or flags.judge_model, str(cache)), ledger=RUN)


def make_judge(config: EvalConfig):
    """Who says which responses agree: rules, or a server."""
    from judge import HttpJudge, RuleJudge

    if config.judge == "rule":
        return RuleJudge(rouge_threshold=config.rouge_threshold)
    client = make_client(config, config.out)
    return HttpJudge(client.ask, max_unparsed=config.max_unparsed, name=f"http {client.name}")


def evaluators(config: EvalConfig):
    """Yield (name, function from pairs and the number of the repeat to rows, client or None) for each evaluator asked for."""
    from data import find_template
    from judge import PAIR_RULES, check_parse, evaluate_by_rule, evaluate_pairs, find_strategy

    if config.judge == "rule":
        for rule in config.strategy or PAIR_RULES:
            yield rule, lambda pairs, repeat, rule=rule: evaluate_by_rule(pairs, rule), None
        return
    strategies = {name: find_strategy(name) for name in config.strategy or ["rules"]}
    for strategy in strategies.values():
        check_parse(strategy, config.verdict_rule)
    if config.judge == "http":
        backends = [(model.strip(), make_client(config, config.out, model.strip())) for model in config.judge_model.split(",")]
    else:
        backends = [(name, LocalChat(model, tokenizer, find_template(config.template or model.config.prompt_template or "alpaca"),
                                     batch_size=config.batch_size)) for name, model, tokenizer in load_models(config)]
    for model, backend in backends:
        for name, strategy in strategies.items():
            def run(pairs, repeat, ask=backend.ask, strategy=strategy):
                return evaluate_pairs(ask, pairs, strategy, parse=config.verdict_rule, sample=repeat)
            yield f"{model} {name}" if len(backends) > 1 else name, run, backend if config.judge == "http" else None


def meta_evaluate(config: EvalConfig) -> None:
    """Measure the judge on labelled pairs: print the table, write metrics.json, verdicts.jsonl, report.md and a plot."""
    from data import load_pairs
    from judge import majority

    subsets = {name: pairs[:config.instances or None] for name, pairs in load_pairs(config.data).items()}
    results, judged, clients = {}, {}, {}
    for name, run, client in list(evaluators(config)):
        judged[name] = {subset: [run(pairs, repeat) for repeat in range(config.repeats)] for subset, pairs in subsets.items()}
        results[name] = summarize_judge(subsets, judged[name], own=config.own, seed=config.seed)
        clients |= {client.name: client} if client else {}
    if len(judged) > 2 and config.judge != "rule":          # the rules are controls, and two of them contradict each other
        votes = {subset: [majority([found[subset][0] for found in judged.values()])] for subset in subsets}
        judged["majority"], results["majority"] = votes, summarize_judge(subsets, votes, own=config.own, seed=config.seed)
    usage = [client.usage() for client in clients.values()]
    report = write_judge_report(config.out, subsets, results, judged, {"judge": config.judge, "verdict_rule": config.verdict_rule, "usage": usage})
    print(judge_table(results))
    print(f"report: {report}")


def summarize_judge(subsets: dict[str, list], judged: dict[str, list], *, own: str = "", seed: int = 0) -> dict:
    """{subset: judge_metrics and "retest", "Average", and with LLMBar's subsets "Adversarial"}.

    The average is over LLMBar's five sets where all are there, else over all there are.
    """
    found = {name: judge_metrics(pairs, judged[name][0], own=own, seed=seed) | {"retest": retest_agreement(judged[name])} for name, pairs in subsets.items()}
    adversarial = [name for name in ("Neighbor", "GPTInst", "GPTOut", "Manual") if name in subsets]
    means = {"Adversarial": average_metrics(found, adversarial)} if len(adversarial) == 4 else {}
    published = ["Natural", *adversarial] if len(adversarial) == 4 and "Natural" in subsets else list(subsets)
    return found | means | {"Average": average_metrics(found, published)}


def judge_table(results: dict[str, dict], *, markdown: bool = False) -> str:
    """A line per evaluator: accuracy / agreement in percent, per subset and averaged."""
    subsets = list(next(iter(results.values())))
    head = ["evaluator", *subsets]
    clean = markdown_text if markdown else printable
    body = [[clean(name)] + [f"{_percent(found[subset]['accuracy'])} / {_percent(found[subset]['agreement'])}" for subset in subsets]
            for name, found in results.items()]
    if markdown:
        return _markdown_table([head, *body])
    widths = [max(len(line[k]) for line in [head, *body]) for k in range(len(head))]
    return "\n".join(" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *body])


def write_judge_report(out_dir, subsets: dict, results: dict[str, dict], judged: dict, about: dict) -> Path:
    """Write metrics.json, verdicts.jsonl, report.md and plots/judge.png; returns the report's path."""
    out_dir = Path(out_dir)
    (out_dir / "plots").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"evaluator": name, "subset": subset, "repeat": repeat, **pair, **row}, allow_nan=False)
             for name, found in judged.items() for subset, repeats in found.items() for repeat, rows in enumerate(repeats)
             for pair, row in zip(subsets[subset], rows, strict=True)]
    parts = ["# How far to trust the judge", f"Judge: {markdown_text(about['judge'])}. Verdicts are read by the rule {about['verdict_rule']}. "
             "Accuracy / agreement of both orders, percent; averages are over subsets, unweighted.", judge_table(results, markdown=True)]
    parts += [_judge_section(name, found) for name, found in results.items()]
    parts += ["\n".join(f"- **{title}** {text}." for title, text in JUDGE_COLUMNS.values())]
    parts += [f"Asked: {markdown_text(json.dumps(usage))}" for usage in about["usage"]]
    texts = {"metrics.json": json.dumps({**about, "evaluators": results}, indent=2, allow_nan=False) + "\n",
             "verdicts.jsonl": "".join(line + "\n" for line in lines), "report.md": "\n\n".join(parts) + "\n"}
    for name, text in texts.items():
        (out_dir / name).write_text(text, encoding="utf-8")
    try:
        plot_judges(results, out_dir / "plots/judge.png")
    except ImportError:
        print("plots skipped: matplotlib is not installed (pip install matplotlib)")
    return out_dir / "report.md"


def _judge_section(name: str, found: dict) -> str:
    """Markdown: one evaluator in full."""
    lines = [["subset", "n", *(title for title, _ in JUDGE_COLUMNS.values()), "kappa", "kappa of orders", "unparsed", "draws", "retest",
              "longer wins (should)", "right if longer / shorter is"]]
    for subset, m in found.items():
        cells = [_percent(m[column], interval=True) for column in JUDGE_COLUMNS]
        if "length" in m:
            length = m["length"]
            cells += [_ratio(m["kappa"]), _ratio(m["kappa_orders"]), f"{m['unparsed']} of {m['verdicts']}", str(m["draws"]),
                      _percent(m["retest"]) if m["retest"] else "-", f"{_ratio(length['longer_wins'])} ({_ratio(length['longer_is_right'])})",
                      f"{_ratio(length['accuracy_longer_right'])} / {_ratio(length['accuracy_shorter_right'])}"]
        lines.append([markdown_text(subset), str(m["accuracy"]["n"]), *cells, *["-"] * (len(lines[0]) - 2 - len(cells))])
    causes = sum((Counter(m.get("failures", {})) for m in found.values()), Counter())
    own = [f"{markdown_text(subset)}: {m['self_preference']['difference']:+.2f}" for subset, m in found.items() if m.get("self_preference")]
    notes = [f"Unread: {', '.join(f'{n} {markdown_text(cause)}' for cause, n in causes.items())}."] if causes else []
    notes += [f"Preference for its own family, win rate less people's: {', '.join(own)}."] if own else []
    return "\n\n".join([f"## {markdown_text(name)}", _markdown_table(lines), *notes])


def wilson(k: int, n: int) -> list[float] | None:
    """The 95 % interval of a share k / n (Wilson 1927); None for n = 0."""
    if not n:
        return None
    z, p = 1.959964, k / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]


def confusion_report(found: dict, name: str) -> str:
    """Markdown: judge.confusion of the rewards of a run, as the meta-evaluation reports a judge: accuracy, kappa, unread."""
    lines = [["question", "answers", "n", "Acc", "kappa", "precision", "recall", "unread"]]
    for answers, title in (("all", "all"), ("asked", "different ones that it was asked about")):
        for question in ("type", "correct", "best"):
            c = found[answers][question]
            n = c["tp"] + c["fp"] + c["fn"] + c["tn"]
            said = [True] * (c["tp"] + c["fp"]) + [False] * (c["fn"] + c["tn"])
            true = [True] * c["tp"] + [False] * c["fp"] + [True] * c["fn"] + [False] * c["tn"]
            accuracy = {"mean": c["accuracy"], "ci95": wilson(c["tp"] + c["tn"], n)}
            lines.append([question, title, str(n), _percent(accuracy, interval=True), _ratio(cohen_kappa(said, true)), _ratio(c["precision"]),
                          _ratio(c["recall"]), str(c["missing"])])
    return (f"\n## How far to trust the judge\n\nThe {markdown_text(name)} judge's rewards against exact rules; accuracy in percent with its 95 % interval. "
            f"An answer equal to the shown target is not asked about.\n\n{_markdown_table(lines)}\n")


def plot_judges(results: dict[str, dict], path) -> Path:
    """Accuracy per subset, a bar per evaluator with its 95 % interval; a tick marks the agreement of both orders, a line chance."""
    subsets = list(next(iter(results.values())))
    figure, axes = _figure(max(7, 1.5 + 0.3 * len(subsets) * (len(results) + 1)), 4)
    width = 0.8 / len(results)
    for k, (name, found) in enumerate(results.items()):
        means = [100 * found[subset]["accuracy"]["mean"] for subset in subsets]
        bounds = [found[subset]["accuracy"]["ci95"] or [found[subset]["accuracy"]["mean"]] * 2 for subset in subsets]
        at = np.arange(len(subsets)) + (k - (len(results) - 1) / 2) * width
        axes.bar(at, means, width * 0.92, yerr=np.abs(100 * np.array(bounds).T - means), capsize=2, color=COLOURS[k % len(COLOURS)],
                 label=_short(name, 40), error_kw={"elinewidth": 1, "ecolor": "#444444"})
        axes.plot(at, [100 * found[subset]["agreement"]["mean"] for subset in subsets], linestyle="", marker="_", markersize=9, color="black",
                  label="agreement of both orders" if k == len(results) - 1 else None)
    axes.axhline(50, color="#888888", linewidth=1, linestyle=":")
    axes.set_xticks(range(len(subsets)), [_short(subset, 14) for subset in subsets])
    axes.set(xlim=(-0.55, len(subsets) - 0.45), ylim=(0, 103))
    _tidy(axes)
    figure.legend(loc="outside upper center", ncols=min(len(results) + 1, 4), frameon=False)
    figure.savefig(path)
    return Path(path)


def write_paraphrases(config: EvalConfig) -> None:
    """--paraphrase: wordings of the tasks' instructions into paraphrases.json, and where each came from into paraphrases.jsonl."""
    from data import load_tasks
    from judge import paraphrase

    client, out = make_client(config, config.out), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)                  # before anything is paid for
    rows = paraphrase(client.ask, {task.name: task.definition for task in load_tasks(config.tasks or DEMO / "tasks")}, config.paraphrase, model=client.name)
    (out / "paraphrases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = {}
    for row in rows:
        if row["kept"]:
            kept.setdefault(row["task"], []).append({"text": row["text"], "style": row["style"]})
    (out / "paraphrases.json").write_text(json.dumps(kept, indent=1) + "\n")
    reasons = Counter(row["reason"] for row in rows if not row["kept"])
    print(f"{len(rows) - sum(reasons.values())} of {len(rows)} wordings kept" + (f"; dropped: {', '.join(f'{n} {why}' for why, n in reasons.items())}" if reasons else "")
          + f".\nwordings: {out / 'paraphrases.json'}")


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
    rank = os.environ.get("RANK", "0")
    if first_to_complain():
        print(f"error: {f'rank {rank}: ' if rank != '0' else ''}{printable(message)}", file=sys.stderr, flush=True)
    return 2


def out_of_memory(error: BaseException) -> str:
    """The beginning of a sentence where there was no room in memory, on a GPU or not; else nothing."""
    told = " ".join(str(error).rpartition("DefaultCPUAllocator: ")[2].split())     # torch's word on a CPU, where it raises a plain RuntimeError
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or re.match("can't allocate memory|not enough memory", told)
    return f"out of memory: {told[:200].rstrip('.') or 'no more is to be had'}." if known else ""


def first_to_complain() -> bool:
    """Whether no other process of this torchrun job has complained; they count in the store by which they found each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from datetime import timedelta

    from torch.distributed import TCPStore
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        return store.add(f"complaints of start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except (KeyError, ValueError, RuntimeError):            # no store, or rank 0 kept it and is gone: it has spoken
        return os.environ.get("RANK", "0") == "0"


def fail(message: str) -> None:
    """Complain and exit."""
    raise SystemExit(complain(message))


def parse_flags(config_class, argv=None, description: str = "") -> dict:
    """{field: value} of what the command line gives of a dataclass of `flag`s."""
    parser = argparse.ArgumentParser(description=description or config_class.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    hints = get_type_hints(config_class)
    for item in sorted(fields(config_class), key=lambda item: item.name in JudgeFlags.__annotations__):     # the judge's flags last
        name, kind, default, only = "--" + item.name.replace("_", "-"), hints[item.name], item.default, item.metadata["only"]
        options = {"default": SUPPRESS, "help": item.metadata["help"] + (f" [{', '.join(only)}]" if only else "")
                   + (f" (default: {default})" if default not in ("", MISSING) else "")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is list:
            options |= {"nargs": "+", "metavar": "STR"}
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(name, **options)
    found, unknown = parser.parse_known_args(argv)
    if unknown:                                             # said without values, for one may be a secret
        name = next((word.partition("=")[0] for word in unknown if word.startswith("-")), "")
        if "key" in name or name == "--token":
            fail(f"there is no {name}: keys are not accepted on the command line. Put the key into the environment variable JUDGE_API_KEY, or into one "
                 "that --judge-key-env names.")
        near = difflib.get_close_matches(name, ["--" + item.name.replace("_", "-") for item in fields(config_class)], 1)
        fail((f"there is no {name}." if name else f'"{unknown[0]:.7}{"…" * (len(unknown[0]) > 7)}" belongs to no flag.') + (f" Did you mean {near[0]}?" if near else " --help lists the flags."))
    return vars(found)


def check_writable(place: str) -> None:
    """Raise ValueError where no folder `place` can be made or written to."""
    there = next(parent for parent in (Path(place), *Path(place).absolute().parents) if os.path.lexists(parent))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"nothing can be written to {place}: {there} is no folder that this user may write to. Give another.")


def check_config(config: EvalConfig) -> None:
    """Raise ValueError for what can be seen to be wrong before anything is loaded."""
    for name in ("wordings", "per_task", "max_new_tokens", "batch_size", "repeats"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} is too small. Give 1 or more.")
    if not config.chat:                                     # which writes nothing
        check_writable(config.merge or config.out)
    if config.merge and (len(config.adapter) > 1 or config.quantize != "none"):
        raise ValueError(f"--merge takes one --adapter at most and a model in full precision; got {len(config.adapter)} and --quantize "
                         f"{config.quantize}. Merge each adapter into a folder of its own.")
    if config.merge and Path(config.merge).resolve() == Path(config.model).resolve():
        raise ValueError(f"--merge {config.merge} is the folder of the model itself. Give another.")
    if not config.temperature >= 0:
        raise ValueError(f"--temperature {config.temperature} is below 0. Give 0 or more.")
    if config.judge == "self" and not config.benchmark:
        raise ValueError("--judge self judges only --benchmark. For CR and MCR give --judge rule or --judge http.")
    if config.benchmark and not config.data:
        raise ValueError(f"--benchmark {config.benchmark} needs --data DIR, the folder with its instances.")
    check_judge(config, asked=config.judge == "http" or config.paraphrase > 0)
    if (config.benchmark or config.paraphrase) and config.max_unparsed != JudgeFlags.max_unparsed:
        raise ValueError("--max-unparsed stops no --benchmark or --paraphrase: they count unreadable verdicts in what they write. Leave it out.")
    given = [("--model", config.model), ("--tasks", config.tasks), ("--paraphrases", config.paraphrases),
             ("--show-mask", config.show_mask), ("--data", config.data), ("--instructions", config.instructions)]
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
    told, plain = ("\n    ".join(map(printable, template.render(record["instruction"], record["input"], judgment, literal=True).split("\n")))
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


def plot_mask(found: dict[str, list[dict]], path) -> Path:
    """Precision and recall of the mask against lambda, of each model: {title: scores as `mask_scores` has them}."""
    figure, axes = _figure(6, 3.8)
    for (title, scores), style in zip(found.items(), ("--", "-", ":")):
        for k, name in enumerate(("precision", "recall")):
            values = [100 * s[name] if s[name] is not None else float("nan") for s in scores]
            axes.plot([s["lam"] for s in scores], values, style, marker="o", color=COLOURS[k], label=f"{name}, {title}", clip_on=False)
    shown = [s["lam"] for s in scores if s["lam"] != 1.1]
    axes.set(xscale="log", xlabel="lambda", ylim=(0, 100))
    axes.set_xticks(shown, [f"{lam:g}" for lam in shown])
    axes.minorticks_off()
    _tidy(axes)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path)
    return Path(path)


def plot_rollouts(rows: list[dict], path) -> Path:
    """PPO's score and KL per phase, from rollouts.jsonl."""
    phases = sorted({row["phase"] for row in rows})
    figure, axes = _figure(8, 3.2, ncols=2)
    for axis, name, title in zip(axes, ("score", "kl"), ("reward per answer", "KL to the start, nats per answer")):
        axis.plot(phases, [np.mean([row[name] for row in rows if row["phase"] == phase]) for phase in phases], color=COLOURS[0])
        axis.set_xlabel("phase")
        axis.set_title(title)
        _tidy(axis)
        axis.set_ylabel("")
    figure.savefig(path)
    return Path(path)


def pick_device(config):
    """The device and the base weights' type (torch.dtype) that --device and --dtype mean here, of train.py's flags or ours."""
    import torch

    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:     # under torchrun every process has a GPU of its own
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    n, found = torch.cuda.device_count(), re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    planned = getattr(config, "dry_run", False)             # for another machine, perhaps
    if not found or (device != "cpu" and int(found[1] or 0) >= n and not planned):
        raise ValueError(f"--device {device} is not on this machine, which has {n} GPUs that torch can use. Expected cpu, or with a GPU cuda or cuda:N.")
    dtype = config.dtype if config.dtype != "auto" else ("bfloat16" if device.startswith("cuda") else "float32")
    return device, getattr(torch, dtype)


def load_models(config: EvalConfig, adapters: list[str] | None = None):
    """Yield (name, model, tokenizer) for the base model and for it under each adapter; a value head comes along."""
    from data import Tokenizer
    from lora import load_adapter, merge_lora, mergeable
    from model import load_model

    device, dtype = pick_device(config)
    tokenizer = Tokenizer(config.tokenizer or config.model, config.model)
    for adapter in ["", *config.adapter] if adapters is None else adapters:
        model = load_model(config.model, dtype=dtype, device=device, quantize=config.quantize.removeprefix("none"))
        model.compiling = config.compile
        check_tokenizer(config, model, tokenizer, quiet=bool(adapter))
        if adapter:
            load_adapter(model, adapter)
            model = merge_lora(model, in_place=True) if mergeable(model) else model.eval()
            model.config.prompt_template = adapter_template(adapter) or model.config.prompt_template
            if Path(adapter, VALUE_HEAD).exists():
                load_head(model, Path(adapter, VALUE_HEAD))
        yield adapter or Path(config.model).name, model, tokenizer


def check_tokenizer(config: EvalConfig, model, tokenizer, *, quiet: bool = False) -> None:
    """The tokenizer and the template against the model; prints a warning where their BOS and EOS differ."""
    from data import check_template, check_vocabulary, find_template

    warning = check_vocabulary(tokenizer, model.config.vocab_size, model.config.bos_id, model.config.eos_ids, config.model)
    if warning and not quiet:
        print(warning)
    name = config.template or model.config.prompt_template or "alpaca"
    check_template(tokenizer, find_template(name), name)


def merge(config: EvalConfig) -> None:
    """Write the model, with its adapter merged in, and all tokenizer files. The dtype is the stored one unless given."""
    import torch

    from data import Tokenizer, copy_tokenizer
    from lora import load_adapter, merge_lora
    from model import load_model, save_meta, save_model

    tokenizer, target = Tokenizer(config.tokenizer or config.model, config.model), Path(config.merge)
    device, dtype = pick_device(config)
    model = load_model(config.model, dtype=dtype if config.dtype != "auto" else None, device=device).eval()
    check_tokenizer(config, model, tokenizer)
    if config.adapter:
        ids = torch.tensor(tokenizer.encode_prompt("The quick brown fox jumps over the lazy dog."), device=device)
        mixed = len({weight.dtype for weight in model.parameters()}) > 1
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=mixed, cache_enabled=False):    # for these logits only
            before = load_adapter(model, config.adapter[0])(ids).float()
            after = merge_lora(model, in_place=True)(ids).float()
        print(f"merged {config.adapter[0]}: logits differ from the unmerged ones by at most {(before - after).abs().max():.1e} "
              f"(largest logit {before.abs().max():.1f}).")
    template = config.template or (adapter_template(config.adapter[0]) if config.adapter else "")
    if template and not template.endswith(".json"):
        model.config.prompt_template = template
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
        if not isinstance(row.get("input") or "", str):
            raise ValueError(f"{path}, record {number}: input is {json.dumps(row['input'])[:60]}. Expected a text, or none.")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, model, tokenizer in load_models(config):
        template = find_template(config.template or model.config.prompt_template or "alpaca")
        made = complete(model, tokenizer, [template.render(row["instruction"], row.get("input") or "", literal=True) for row in rows], batch_size=config.batch_size,
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


def adapter_template(folder) -> str:
    """The template that an adapter of ours was trained with, from its run's config.json; "" where that says nothing."""
    try:
        found = json.loads(Path(folder, "config.json").read_text(encoding="utf-8")).get("template")
    except (OSError, ValueError, AttributeError):           # another program's adapter
        return ""
    return found if isinstance(found, str) else ""


def chat(config: EvalConfig) -> None:
    """Read lines, print answers as they come. The adapter stays apart, so that it can be switched off."""
    from data import Tokenizer, find_template
    from lora import load_adapter
    from model import load_model, prepacked

    tokenizer = Tokenizer(config.tokenizer or config.model, config.model)
    device, dtype = pick_device(config)
    model = load_model(config.model, dtype=dtype, device=device, quantize=config.quantize.removeprefix("none")).eval()
    check_tokenizer(config, model, tokenizer)
    if config.adapter:
        load_adapter(model, config.adapter[0])
    name = config.template or (adapter_template(config.adapter[0]) if config.adapter else "") or model.config.prompt_template or "alpaca"
    print(f"{config.model}{' with ' + config.adapter[0] if config.adapter else ''}, template {name}. /help lists the commands.")
    with prepacked(model, rows=1):
        _converse(config, model, tokenizer, find_template(name))


def _converse(config: EvalConfig, model, tokenizer, template) -> None:
    """Obey commands and answer messages until /quit or the end of the input."""
    from lora import disabled

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
            try:
                with disabled(model) if not on else nullcontext():
                    answer = _say_answer(model, tokenizer, template, messages, config, temperature)
            except (KeyboardInterrupt, ValueError) as error:        # the line is forgotten, the conversation goes on
                print(f"\n({str(error) or 'stopped'})")
                messages.pop()
                continue
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
    from judge import RUN, JudgeStopped

    try:
        check_config(config)
        if config.merge:
            return merge(config)
        if config.chat:
            return chat(config)
        if config.instructions:
            return answer_instructions(config)
        if config.show_mask:
            return show_masks(config)
        if config.benchmark:
            return meta_evaluate(config)
        if config.paraphrase:
            return write_paraphrases(config)
        asked, judge = load_questions(config), make_judge(config)
        if config.best_of:
            return evaluate_best_of(config, asked, judge)
        results, tables = {}, {}
        reference = next((model for _, model, _ in load_models(config, [config.reference])), None) if config.reference else None
        for name, model, tokenizer in load_models(config):
            results[name], tables[name] = evaluate_responses(
                evaluate_model(model, tokenizer, asked, config), judge=judge, cluster=config.cluster,
                use_stemmer=config.use_stemmer, symmetrize=config.symmetrize, seed=config.seed)
            if reference is not None:
                results[name]["kl"] = sampled_kl(model, reference, tokenizer, asked, config)
        report = write_report(config.out, results, tables)[2]
        print(f"{summary_table(results)}\nreport: {report}")
        for name, found in results.items() if reference is not None else ():
            print(f"KL of {name} to {config.reference}: {found['kl']['mean']:.3f} nats per answer")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        fail(f"{place}{error.strerror or error}. Expected a place that can be read, and under --out one that can be written to.")
    except ValueError as error:
        fail(str(error))
    except (JudgeStopped, RuntimeError, MemoryError) as error:
        full = out_of_memory(error)
        if not full and not isinstance(error, JudgeStopped):
            raise
        complain(f"{full} Lower --batch-size or --max-new-tokens." if full else str(error))
        raise SystemExit(1) from None
    finally:
        RUN.close(print)


if __name__ == "__main__":
    main()
