"""Are a model's answers the same, and right, however the question is worded?

    python eval.py --model DIR                               # on held-out wordings and inputs
    python eval.py --model DIR --adapter runs/sft runs/cat   # and with each adapter, side by side
    python eval.py --server URL --server-model NAME          # a model behind a server

CR and MCR, the consistency rate and the maximum consistency rate, are those of arXiv 2403.14221.
A *question* is one input under n wordings of its task's instruction, hence n responses. `similar`
is an (n, n) bool matrix: whether the judge, shown responses i and j in this order, says that they
agree. With s samples of each wording there are s n responses, and `similar` is (s n, s n).
"""

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path

import numpy as np

import data
import judge as judging

DEMO = Path(__file__).parent / "demo"


def extra(room, plain):
    """A room of extras/, or None if extras/ was deleted or --plain was given."""
    if plain or importlib.util.find_spec("extras") is None:
        return None
    return importlib.import_module(f"extras.{room}")


# ----- Opening a model -----
def pick_device(cfg) -> tuple:
    """The device, and the type of the weights (torch.dtype), that the flags mean here."""
    import torch
    device, dtype = cfg.device, cfg.dtype
    n = torch.cuda.device_count()
    if device == "auto" and not n:
        device = "cpu"
    elif device in ("auto", "cuda"):  # under torchrun every process has one of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device not in ["cpu"] + [f"cuda:{number}" for number in range(n)]:
        raise ValueError(f"--device {cfg.device} is not here: this machine has {n} GPUs, and they "
                         "count from cuda:0. Give another, or cpu.")
    if dtype == "auto":
        dtype = "bfloat16"
        if device == "cpu":
            dtype = "float32"
    return device, getattr(torch, dtype)


def open_model(cfg, adapter="", *, folder="", trainable=False):
    """The base model, or the one in `folder`, with an adapter over it."""
    if formats := extra("formats", cfg.plain):  # more kinds of files, and faster models
        return formats.open_all(cfg, adapter, folder, trainable)
    import lora
    from model import load_model
    device, dtype = pick_device(cfg)
    model = load_model(folder or cfg.model, dtype=dtype, device=device)
    if adapter:
        lora.load_adapter(model, adapter, trainable)
    return model


def open_tokenizer(cfg):
    """The tokenizer that --tokenizer or --model names."""
    if formats := extra("formats", cfg.plain):
        return formats.open_tokenizer(cfg.tokenizer or cfg.model, cfg.model)
    return data.Tokenizer(cfg.tokenizer or cfg.model)


def find_template(cfg, model, adapter=""):
    """The template that was asked for, or that the adapter or the model was trained with."""
    name, settings = cfg.template, Path(adapter, "config.json")
    if not name and adapter and settings.is_file():
        name = dict(data.read_json(settings)).get("template")
    formats = extra("formats", cfg.plain) or data
    name = name or model.config.prompt_template or "alpaca"
    return formats.find_template(name, adapter, cfg.model)


# ----- Text in, text out -----
@dataclass(frozen=True)
class Completion:
    """One generated response; `finished` says that it ended with EOS, not at the length limit."""

    text: str
    token_ids: list[int]
    finished: bool


def complete(model, tokenizer, prompts, sampling, *, seeds=None, batch_size=64,
             max_len=None) -> list:
    """One completion per prompt, in order.

    sampling: a model.Sampling. seeds: one per prompt. Prompt and response share max_len tokens (by
    default what the model takes); longer prompts are truncated from the left, as in training.
    """
    from tqdm import tqdm

    from model import generate
    limit = min(max_len or model.config.context, model.config.context)
    room = limit - sampling.max_new_tokens
    if room < 2:
        raise ValueError(f"--max-new-tokens {sampling.max_new_tokens} leaves no room for a prompt "
                         f"in {limit} tokens. Lower it, or raise --max-len.")
    ids = [data.truncate_left(tokenizer.encode_prompt(prompt), room) for prompt in prompts]
    stop = [*tokenizer.stop_ids(prompts), *model.config.eos_ids]
    with tqdm(total=len(prompts), desc="responses", disable=None, leave=False) as bar:
        made = generate(model, ids, sampling, seeds=seeds, eos_ids=stop, batch_size=batch_size,
                        watch=lambda answer: bar.update(answer.done))
    return [Completion(tokenizer.decode(tokens), tokens, tokens[-1] in stop) for tokens in made]


def answer_questions(model, tokenizer, template, questions, sampling, *, prefix="",
                     **options) -> list:
    """The questions with "responses", one per wording, and how many are "unfinished"."""
    prompts, answered = [], []
    # All wordings of all questions are asked together, and dealt back to their questions after.
    for question in questions:
        for wording in question["wordings"]:
            prompts.append(template.render(prefix + wording, question["input"]))
    made = iter(complete(model, tokenizer, prompts, sampling, **options))
    for question in questions:
        own = [next(made) for _ in question["wordings"]]
        unfinished = sum(not response.finished for response in own)
        texts = [response.text for response in own]
        answered.append(question | {"responses": texts, "unfinished": unfinished})
    return answered


# ----- Consistency: CR and MCR -----
def consistency_rate(similar, counted=True):
    """CR = sum_{i<j} similar(i, j) / C(n, 2); None for a single response, which has no pair.

    Where the judge's two orders of a pair disagree, it counts as not similar. `counted` (n, n)
    restricts sum and number to some pairs; None where there are none.
    """
    similar = np.asarray(similar, dtype=bool)  # (n, n)
    pairs = np.triu(np.broadcast_to(counted, similar.shape), 1)
    return float((similar & similar.T)[pairs].mean()) if pairs.any() else None


def clusters(similar) -> list:
    """The responses 0 .. n-1 in sets of mutually similar ones; `similar` is (n, n) bool.

    First the largest such set, then the largest of the rest, and so on; exact. extras/reports has
    a search that gives up, the authors' own rule and connected components.
    """
    similar = np.asarray(similar, dtype=bool)  # (n, n)
    both = similar & similar.T
    neighbours = [set(np.flatnonzero(row).tolist()) - {i} for i, row in enumerate(both)]
    found, rest = [], set(range(len(both)))
    sys.setrecursionlimit(1000 + len(both))  # a call for each member of a clique
    while rest:
        members = largest_clique([], rest, neighbours, [])
        found.append(sorted(members))
        rest -= set(members)
    return found


def largest_clique(clique, candidates, neighbours, best) -> list:
    """The largest set of mutual neighbours that extends `clique`, by branch and bound.

    clique, best: lists of vertices; candidates: the set of those that may be added; neighbours[v]:
    a set. Candidates are coloured so that no two neighbours share a colour. A clique has at most
    one vertex of each, so a branch with too few colours cannot win (Tomita and Seki 2003).
    """
    coloured, left, colour = [], set(candidates), 0
    while left:
        colour, free = colour + 1, set(left)
        while free:
            vertex = min(free)
            coloured.append((colour, vertex))
            left.remove(vertex)
            free -= neighbours[vertex] | {vertex}
    # The last colour first: once its number cannot win, no lower one can.
    for colour, vertex in reversed(coloured):
        if len(clique) + colour <= len(best):
            break
        best = largest_clique([*clique, vertex], candidates & neighbours[vertex], neighbours, best)
        candidates = candidates - {vertex}
    return max(best, clique, key=len)


def max_consistency_rate(similar, find=clusters):
    """MCR = size of the largest cluster / n; by default of mutually similar responses."""
    return len(max(find(similar), key=len)) / len(similar)


# ----- From responses to metrics -----
TABLE = {"cr": "CR", "mcr": "MCR", "rouge1": "R-1", "rougeL": "R-L", "exact_match": "EM",
         "consistent_and_correct": "C&C"}  # what the table shows, and under which title
NEED_TARGETS = ("rouge1", "rougeL", "exact_match", "consistent_and_correct")


def bootstrap(values, *, resamples=1000, seed=0, span=(0, 1)):
    """{"mean", "ci95", "n"} over questions, without None; values lie in span (None: anywhere)."""
    known = np.array([value for value in values if value is not None], dtype=float)  # (n,)
    n = len(known)
    if n < 2:
        return {"mean": next(iter(known.tolist()), None), "ci95": None, "n": n}
    draws = np.random.default_rng(seed).integers(0, n, (resamples, n), dtype=np.int32)
    bounds = np.quantile(known[draws].mean(1), (0.025, 0.975))
    # Where all are equal, so are all resamples, and the interval would be empty.
    # Wilson's instead, with z^2 = 1.96^2 = 3.84.
    if span and not np.ptp(known):
        bounds += (span - bounds) * 3.84 / (n + 3.84)
    return {"mean": float(known.mean()), "ci95": bounds.tolist(), "n": n}


def ask_pairs(questions, judge, symmetrize: str) -> list:
    """For each question {(a, b): whether b says the same as a; None: unparsed}.

    Every ordered pair of different responses is asked once; "first" asks in one order only.
    """
    pairs, pick = [], permutations
    if symmetrize == "first":
        pick = combinations
    for k, question in enumerate(questions):
        pairs += [(k, a, b) for a, b in pick(dict.fromkeys(question["responses"]), 2)]
    verdicts = judge.similar_pairs([(questions[k], a, b) for k, a, b in pairs])
    if set(verdicts) == {None}:
        raise ValueError(f"none of the judge's {len(pairs)} verdicts could be read, so there is "
                         "no consistency to report. Use another judge.")
    found = [{} for _ in questions]
    for (k, a, b), verdict in zip(pairs, verdicts, strict=True):
        found[k][a, b] = verdict
    return found


def similarity(responses, said: dict, symmetrize: str, unparsed: bool = False):
    """similar (n, n) from the verdicts on one question's pairs, `unparsed` where one is None."""
    similar = np.eye(len(responses), dtype=bool)
    for i, a in enumerate(responses):
        for j, b in enumerate(responses):
            verdict = a == b or said.get((a, b), said.get((b, a)))
            similar[i, j] = unparsed if verdict is None else verdict
    return similar | similar.T if symmetrize == "or" else similar


def evaluate_question(question, similar, at_most, find=clusters):
    """One question with its metrics, and for each response its cluster and whether it is exact.

    similar, at_most (n, n): pairs that agree for certain, and if unparsed verdicts were yes.
    """
    responses, targets, n = question["responses"], question["targets"], len(similar)
    # A pair whose verdict hangs on an unparsed one is left out.
    settled = (similar & similar.T) == (at_most & at_most.T)  # (n, n)
    # CR is of pairs under two wordings. Pairs under one wording show the noise of sampling.
    wordings = np.array(question["wordings"], dtype=object)  # (n,)
    same_wording = wordings[:, None] == wordings  # (n, n)
    counted = settled & ~same_wording
    row = question | {"cr": consistency_rate(similar, counted), "mcr": None}
    row["within"] = consistency_rate(similar, settled & same_wording)
    if row["cr"] is not None:
        row["mcr"] = max_consistency_rate(similar, find)
    # Each response gets the number of its cluster: the largest first, and of equally large ones
    # that of the earlier response.
    row["cluster"] = [0] * n
    for number, members in enumerate(sorted(sorted(find(similar)), key=len, reverse=True)):
        for member in members:
            row["cluster"][member] = number
    if not targets:
        return row | dict.fromkeys(NEED_TARGETS) | {"correct": [None] * n}
    # Exact match, and C&C: CR where only pairs of right answers agree.
    correct = np.array([judging.exact_match(text, targets) for text in responses])  # (n,)
    row |= {"exact_match": float(correct.mean()), "correct": correct.tolist()}
    both = similar & np.outer(correct, correct)
    row["consistent_and_correct"] = consistency_rate(both, counted)
    # ROUGE, the best over the targets, as means over the responses.
    rouge = [judging.rouge_scores(text, targets) for text in responses]
    for name in rouge[0]:
        row[name] = sum(scores[name] for scores in rouge) / n
    return row


def evaluate_responses(questions, judge, *, symmetrize: str = "and", more=None) -> tuple:
    """Metrics of one model's responses, and the table behind them: a row per question.

    A question is {task, input, targets, wordings, responses, ...}. Metrics are means over
    questions; one with a single wording has no CR and is left out there, and so are pairs whose
    verdict is unparsed. `more` adds metrics of its own (extras/reports).
    """
    rows = []
    metrics = {"judge": judge.name, "symmetrize": symmetrize, "questions": len(questions)}
    for question, said in zip(questions, ask_pairs(questions, judge, symmetrize), strict=True):
        pairs = question["responses"], said, symmetrize
        similar, at_most = similarity(*pairs), similarity(*pairs, unparsed=True)
        row = evaluate_question(question, similar, at_most, getattr(more, "clusters", clusters))
        row |= {"asked": len(said), "unparsed": list(said.values()).count(None)}
        rows.append(more.question(row, similar, at_most) if more else row)
    metrics |= {name: bootstrap([row[name] for row in rows]) for name in [*TABLE, "within"]}
    for name in ("unfinished", "asked", "unparsed"):
        metrics[name] = sum(row[name] for row in rows)
    if more:
        metrics |= more.summary(rows)
    return metrics, rows


def write_results(cfg, results, tables):
    """Write metrics.json and questions.jsonl, by extras/reports a page with plots; print the table.

    results, tables: the two values of `evaluate_responses` for each model, as {name: value}.
    """
    folder, reports = Path(cfg.out), extra("reports", cfg.plain)
    if reports:
        reports.describe(cfg, results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    (folder / "questions.jsonl").unlink(missing_ok=True)
    for model, rows in tables.items():
        data.append_records(folder / "questions.jsonl", [{"model": model, **row} for row in rows])
    if reports:
        reports.write_report(folder, results, tables)
    print_table(results)
    if reports:
        reports.print_notes(results)


def print_table(results, corner="model"):
    """TABLE of {name: metrics}, in percent. Without targets, there are CR and MCR alone."""
    shown = list(TABLE)
    if not sum(found["exact_match"]["n"] for found in results.values()):
        shown = ["cr", "mcr"]
    width = max(map(len, [corner, *results]))
    print(corner.ljust(width), *(f"{TABLE[name]:>5}" for name in shown), sep=" | ")
    for model, metrics in results.items():
        cells = [model.ljust(width)]
        for name in shown:
            mean = metrics[name]["mean"]
            cells.append("    -" if mean is None else f"{100 * mean:5.1f}")
        print(*cells, sep=" | ")


# ----- Command line -----
def read_questions(cfg):
    """The held-out questions that the flags mean."""
    formats = extra("formats", cfg.plain) or data
    tasks = formats.read_tasks(cfg.tasks)
    if cfg.paraphrases:
        formats.add_paraphrases(cfg.paraphrases, tasks)
    found = formats.questions(tasks, split=cfg.split, wordings=cfg.wordings, per_task=cfg.per_task)
    if not found:
        raise ValueError(f"no task has two {cfg.split} wordings, and consistency needs two. Give "
                         "--paraphrases FILE, or the other --split.")
    return found


def parse_flags(argv, demo=False):
    """The flags of eval.py; each room of extras/ adds those that only it reads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error, add = fail, parser.add_argument
    add("--model", default=f"{DEMO}/base", help="folder of the model")
    add("--adapter", nargs="+", default=[], help="adapter folders to evaluate beside it")
    add("--tasks", default=f"{DEMO}/tasks", help="task file or folder")
    add("--paraphrases", default="", help="JSON file of wordings per task")
    add("--split", choices=("dev", "test"), default="dev", help="held-out wordings and inputs")
    add("--wordings", type=int, default=10, help="wordings per question, at most")
    add("--per-task", type=int, default=20, help="questions per task, at most")
    add("--template", default="", help="prompt template (default: the checkpoint's, or alpaca)")
    add("--prefix", default="", help='words before every instruction, e.g. "good answer : "')
    add("--max-new-tokens", type=int, default=128, help="longest response in tokens")
    add("--max-len", type=int, help="most tokens of prompt and response together")
    add("--batch-size", type=int, default=64, help="responses generated side by side")
    add("--rouge-threshold", type=float, default=0.7, help="ROUGE-L of similar texts, for rules")
    add("--tokenizer", default="", help="tokenizer file, if the model folder has none")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--plain", action="store_true", help="run the course's own code, without extras/")
    add("--out", default="runs/eval", help="folder for metrics.json, report.md and plots")
    for room in ("formats", "judges", "reports"):  # a flag that nobody would read is refused
        if extra(room, "--plain" in argv):
            extra(room, False).add_flags(add)
    given = {word.partition("=")[0] for word in argv}
    if demo and not given & {"--tasks", "--responses"}:  # what fits the demo's tasks
        parser.set_defaults(paraphrases=f"{DEMO}/paraphrases.json",
                            **data.read_json(DEMO / "settings.json")["eval"])
    cfg, unknown = parser.parse_known_args(argv)
    if unknown:  # its value, which may be a secret, is not repeated
        fail(f"there is no flag {unknown[0].partition('=')[0]} here; see --help.")
    for name, least in {"wordings": 2, "per_task": 1, "max_new_tokens": 1, "batch_size": 1}.items():
        if getattr(cfg, name) < least:
            fail(f"--{name.replace('_', '-')} is {getattr(cfg, name)}. Expected {least} or more.")
    if judges := extra("judges", cfg.plain):
        judges.settle_flags(cfg, argv)
    return cfg


def fail(message: str):
    """Print a mistake of the user in one line, and exit with status 2."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    print(f"error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def local_answers(cfg, questions, temperature=0.0, seeds=None):
    """Yield (name, answered questions, further metrics) of the model and of each adapter."""
    tokenizer, reports = open_tokenizer(cfg), extra("reports", cfg.plain)
    import lora  # and with it torch, which takes a second; mistakes have shown by now
    from model import Sampling
    for adapter in ["", *cfg.adapter]:
        name, model = adapter or Path(cfg.model).name, open_model(cfg, adapter)
        about = {}
        template = find_template(cfg, model, adapter)
        if getattr(cfg, "quantize", "none") == "none":
            model = lora.merge_lora(model, in_place=True)
        answered = answer_questions(
            model, tokenizer, template, questions, Sampling(cfg.max_new_tokens, temperature),
            prefix=cfg.prefix, seeds=seeds, batch_size=cfg.batch_size, max_len=cfg.max_len)
        if reports and cfg.reference:
            about["kl"] = reports.sampled_kl(model, tokenizer, template, questions, cfg)
        yield name, answered, about


def evaluate(cfg) -> None:
    """Evaluate all models that the flags name, side by side."""
    reports, results, tables = extra("reports", cfg.plain), {}, {}
    more = reports and reports.MoreMetrics(cfg.use_stemmer, cfg.cluster)
    judge, symmetrize = judging.RuleJudge(cfg.rouge_threshold), "and"
    if judges := extra("judges", cfg.plain):  # other judges; servers, and files of answers
        judge, symmetrize = judges.make_judge(cfg), cfg.symmetrize
        answers = judges.all_answers(cfg)
    else:
        answers = local_answers(cfg, read_questions(cfg))
    for name, answered, about in answers:
        results[name], tables[name] = evaluate_responses(answered, judge, more=more,
                                                         symmetrize=symmetrize)
        results[name] |= about
    if reports:
        reports.add_controls(cfg, results, tables, judge, more)
    write_results(cfg, results, tables)


def main(argv=None) -> int:
    """Run `evaluate`; the exit status is 2 for a mistake in what was given."""
    cfg = parse_flags(sys.argv[1:] if argv is None else argv, demo=True)
    if runtime := extra("runtime", cfg.plain):
        return runtime.run_program(evaluate, cfg)
    try:
        evaluate(cfg)
    except (ValueError, OSError) as error:
        fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
