"""Metrics beside those of eval.py: other clusters, ROUGE for any script, styles, distances.

`MoreMetrics` is what eval.evaluate_responses takes as `more`; similar is (n, n) bool, as there.
"""

import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np

import data
import judge as judging
from eval import TABLE, bootstrap, complete, open_model
from extras.reports.cliques import bounded_clusters
from methods import merged_copy

TITLES = TABLE | {"rouge2": "R-2", "mcr_upper": "MCR at most", "mcr_component": "MCR of components",
                  "mcr_greedy": "MCR of the authors' clusters", "worst_paraphrase": "worst R-L"}
ROUGE = ("rouge1", "rouge2", "rougeL")


class MoreMetrics:
    """Adds to each question's row, and to the summary, what the course leaves out."""

    def __init__(self, use_stemmer: bool = False, cluster: str = "clique"):
        self.use_stemmer, self.cluster = use_stemmer, cluster

    def clusters(self, similar) -> list[list[int]]:
        """eval.clusters, with a budget."""
        return bounded_clusters(similar)[0]

    def question(self, row: dict, similar, at_most) -> dict:
        """The row with more metrics; ROUGE and `mcr` are replaced as the settings say.

        at_most (n, n): `similar` if every unparsed verdict were a yes.
        """
        n, targets, more = len(similar), row["targets"], dict.fromkeys([*ROUGE, "tokenizer"])
        more["worst_paraphrase"] = None
        if targets:
            rouge = [rouge_scores(text, targets, self.use_stemmer) for text in row["responses"]]
            more |= {name: sum(scores[name] for scores in rouge) / n for name in ROUGE}
            more["worst_paraphrase"] = min(scores["rougeL"] for scores in rouge)
            more["tokenizer"] = rouge[0]["tokenizer"]
        if row["cr"] is None:  # no two wordings, or no verdict
            return row | more | dict.fromkeys(["mcr_upper", "mcr_component", "mcr_greedy"])
        groups = {"component": components(similar), "greedy": greedy_clusters(similar)}
        more["mcr_upper"] = bounded_clusters(at_most)[1] / n
        for rule, found in groups.items():
            more[f"mcr_{rule}"] = max(map(len, found)) / n
        if self.cluster in groups:
            more["mcr"] = more["mcr_upper"] = more[f"mcr_{self.cluster}"]
            more["cluster"] = [0] * n
            ordered = sorted(groups[self.cluster], key=lambda group: (-len(group), group))
            for number, group in enumerate(ordered):
                for i in group:
                    more["cluster"][i] = number
        return row | more

    def summary(self, rows: list[dict], seed: int = 0) -> dict:
        """All means, the exact match by style of wording, and counts."""
        found = {"cluster": self.cluster, "use_stemmer": self.use_stemmer}
        tasks = [row["task"] for row in rows]
        for name in [*TITLES, "within"]:
            found[name] = summarize([row[name] for row in rows], tasks, seed=seed)
        noise = [None if None in (row["within"], row["cr"]) else row["within"] - row["cr"]
                 for row in rows]
        found["wording_effect"] = summarize(noise, tasks, seed=seed, span=(-1, 1))
        found["by_style"] = {style: summarize(values, tasks, seed=seed)
                             for style, values in exact_match_by_style(rows).items()}
        found["mcr_inexact"] = sum(row["cr"] is not None and row["mcr"] < row["mcr_upper"]
                                   for row in rows)
        if asked := sum(row["asked"] for row in rows):
            found["unread_share"] = sum(row["unparsed"] for row in rows) / asked
        found["without_cr"] = sum(row["cr"] is None for row in rows)
        texts = [text for row in rows for text in row["responses"]]
        found["responses"] = len(texts)
        found["empty"] = sum(not text.strip() for text in texts)
        found["rouge_tokenizer"] = dict(Counter(filter(None, (row["tokenizer"] for row in rows))))
        return found


def components(similar) -> list[list[int]]:
    """Responses that are joined by a chain of similar ones (in both orders of a pair)."""
    linked = similar & similar.T  # (n, n)
    for _ in range(len(linked).bit_length()):
        linked = linked.astype(np.float32) @ linked > 0  # chains of twice the length
    return [list(group) for group in {tuple(np.flatnonzero(row).tolist()) for row in linked}]


def greedy_clusters(similar) -> list[list[int]]:
    """The authors' code (Self-DETECTION): join the first cluster whose first member is similar.

    Only one order is read: whether the new response is similar to that member.
    """
    found = []
    for new in range(len(similar)):
        homes = [group for group in found if similar[new, group[0]]]
        if homes:
            homes[0].append(new)
        else:
            found.append([new])
    return found


def exact_match_by_style(rows: list[dict]) -> dict[str, list[float | None]]:
    """Per style of wording the exact match of each question; None where it has no such wording."""
    found = {}
    for place, row in enumerate(rows):
        hits = {}
        for style, correct in zip(row.get("styles") or [], row["correct"], strict=False):
            if correct is not None:
                hits.setdefault(style or "plain", []).append(correct)
        for style, values in hits.items():
            found.setdefault(style, [None] * len(rows))[place] = sum(values) / len(values)
    return dict(sorted(found.items()))


# ----- Intervals -----
def summarize(values: list, tasks: list, *, seed: int = 0, span: tuple | None = (0, 1)) -> dict:
    """eval.bootstrap, and "ci95_tasks", an interval over "tasks", of which there is a number.

    The answers to the questions of one task resemble each other, so that an interval over questions
    is too narrow for other tasks. This one is mean +- t * error with the clustered standard error
    of Miller 2024, arXiv 2411.00640, Section 2.2, and the quantile t of Student's distribution for
    as many tasks. Differences of two models, question by question, give the paired interval.
    """
    found, sums = bootstrap(values, seed=seed, span=span), {}
    for value, task in zip(values, tasks, strict=True):
        if value is not None:
            sums[task] = sums.get(task, 0.0) + value - found["mean"]
    n, found["ci95_tasks"], found["tasks"] = len(sums), None, len(sums)
    if n > 1:
        squares = sum(x * x for x in sums.values()) * n / (n - 1)
        half = student_t(n - 1) * math.sqrt(squares) / found["n"]
        bounds = [found["mean"] - half, found["mean"] + half]
        if span and half < 1e-9:  # all tasks are alike, as far as seen
            bounds = bootstrap([found["mean"]] * n, span=span)["ci95"]
        low, high = span or (-math.inf, math.inf)
        found["ci95_tasks"] = [max(low, bounds[0]), min(high, bounds[1])]
    return found


def student_t(df: int) -> float:
    """The 97.5 % quantile of Student's t: a series in 1 / df (Abramowitz and Stegun, 26.7.5)."""
    if df < 4:  # where the series is too short
        return (12.7062, 4.3027, 3.1824)[df - 1]
    z = 1.959964
    return (z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3))


def paired_difference(before: list[dict], after: list[dict], metric: str, seed: int = 0) -> dict:
    """`summarize` of after - before; both tables hold the same questions in order."""
    changes = []
    for old, new in zip(before, after, strict=True):
        known = None not in (old[metric], new[metric])
        changes.append(new[metric] - old[metric] if known else None)
    return summarize(changes, [row["task"] for row in after], seed=seed, span=(-1, 1))


# ----- ROUGE for any script -----
NON_LATIN = re.compile(r"[^\W\d_\u0000-\u024f\u1e00-\u1eff]")  # a letter of another script


def rouge_scores(prediction: str, references: list[str], use_stemmer: bool = False) -> dict:
    """The F1 of ROUGE, each the best over the references, and the "tokenizer" that was used.

    The package's own tokenizer deletes every letter but a-z ("words"); where a reference holds a
    letter of another script than Latin, `judge.split_words` is used ("characters").
    """
    if any(NON_LATIN.search(text) for text in references):
        tokenizer = SimpleNamespace(tokenize=judging.split_words)
        scores = judging.rouge_scores(prediction, references, tokenizer=tokenizer)
        return scores | {"tokenizer": "characters"}
    scores = judging.rouge_scores(prediction, references, use_stemmer=use_stemmer)
    return scores | {"tokenizer": "words"}


# ----- Sampled answers -----
def sample_answers(model, tokenizer, template, questions: list[dict], cfg, n: int) -> list[list]:
    """n completions per question under its first wording, at temperature 1, each with its seed."""
    from model import Sampling

    prompts = []
    for x in questions:
        prompts += [template.render(cfg.prefix + x["wordings"][0], x["input"])] * n
    made = complete(model, tokenizer, prompts, Sampling(cfg.max_new_tokens, 1.0),
                    seeds=[cfg.seed * 1_000_003 + k for k in range(len(prompts))],
                    batch_size=cfg.batch_size, max_len=cfg.max_len or None)
    return [made[k:k + n] for k in range(0, len(made), n)]


def sampled_kl(model, tokenizer, template, questions: list[dict], cfg) -> dict:
    """KL(model || reference) in nats per answer, with its intervals.

    The mean of log p / p_ref of one sampled answer per question. The sampled ids are scored, not
    their text encoded again. The reference is asked without --prefix, whose effect is measured too.
    """
    answers, sums = sample_answers(model, tokenizer, template, questions, cfg, 1), []
    room = min(cfg.max_len or model.config.context, model.config.context) - cfg.max_new_tokens
    reference = merged_copy(open_model(cfg, cfg.reference))
    for scorer, prefix in ((model, cfg.prefix), (reference, "")):
        documents = []
        for x, (answer,) in zip(questions, answers, strict=True):
            prompt = template.render(prefix + x["wordings"][0], x["input"])
            documents.append(data.encode_example(tokenizer, template, prompt, answer.token_ids,
                                                 max_len=room + len(answer.token_ids)))
        sums.append([float(logprobs.sum()) for logprobs in response_logprobs(scorer, documents)])
    return summarize([p - q for p, q in zip(*sums, strict=True)],
                     [x["task"] for x in questions], seed=cfg.seed, span=None)


def response_logprobs(model, documents: list[dict]) -> list:
    """log p of the labelled tokens of each document, tensors (N,) on the CPU."""
    from methods import collate, label_logprobs, torch

    found, device = [], next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for part in data.micro_batches([{"documents": [x]} for x in documents], 8192):
            batch = collate(part, model, device)
            logprobs = label_logprobs(model, batch).cpu()
            found += logprobs.split(batch["sequence_ids"].bincount().tolist())
    return found
