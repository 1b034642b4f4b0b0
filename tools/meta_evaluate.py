"""Measure judges on pairs of outputs that people have labelled (LLMBar, arXiv 2310.07641).

    python -m tools.meta_evaluate --data DIR --judge http --judge-model NAME --strategy cot
    python -m tools.meta_evaluate --benchmark mtbench --data FILE --judge http --judge-model NAME

Writes metrics.json, verdicts.jsonl, report.md and a plot.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from eval import parse_flags
from extras.judges import JudgeStopped, ServerFlags, check_flags, client_from_flags, confer, pairs
from extras.judges.benchmarks import describe_labels, load_benchmark
from extras.judges.local import LocalChat
from extras.judges.meta import annotator_metrics, check_sources, summarize_judge
from extras.judges.questions import Unread
from extras.reports.judges import cost_table, judge_table, own_table, write_judge_report
from extras.reports.tables import table
from methods.flags import flag_names, spelled
from tools import make_main, open_models

OWN = {"data": (None, "LLMBar's folder, a file of labelled pairs, or what --benchmark names"),
       "benchmark": (("llmbar", "pairs", "mtbench", "llmeval2", "faireval"), "form of --data"),
       "judge": (("rule", "http", "self"), "rules, a server, or the model itself"),
       "strategy": ([], "ways of asking (default: rules); with --judge rule which rules (all)"),
       "own": ("", "how often the judge prefers outputs by this source, and people do"),
       "repeats": (1, "ask so many times, to see if a judge agrees with itself"),
       "instances": (0, "pairs per subset, at most (0: all)"), "seed": (0, "seeds the bootstrap")}
# What of a client's usage is counted for each evaluator, and what it is called.
COSTS = {"requests": "requests", "cached": "answers on file", "prompt_tokens": "tokens read",
         "completion_tokens": "tokens written", "cost": "cost"}
# The flags of eval.py that say which model judges itself, and how it is run.
MODEL = {"model", "adapter", "template", "batch_size", "tokenizer", "device", "dtype", "quantize"}


def meta_evaluate(cfg) -> None:
    """Ask every evaluator about every pair, and write what that says of them."""
    check(cfg)
    everything, labels = load_benchmark(cfg.benchmark, cfg.data)
    subsets = {name: found[:cfg.instances or None] for name, found in everything.items()}
    if cfg.own:
        check_sources([pair for found in subsets.values() for pair in found], cfg.own)
    clients, results = [], {}
    judged, costs = ask_evaluators(cfg, subsets, clients)
    pools = annotator_metrics(subsets, judged)
    judges = [found for name, found in judged.items() if name not in pools]  # pools are noisy
    if len(judges) > 2 and cfg.judge != "rule":  # two of the rules contradict each other
        judged["majority"] = {subset: [pairs.majority([found[subset][0] for found in judges])]
                              for subset in subsets}
    for name, found in judged.items():
        results[name] = summarize_judge(subsets, found, own=cfg.own, seed=cfg.seed)
    controls = {} if cfg.judge == "rule" else control_results(subsets, cfg)
    about = {"judge": cfg.judge, "own": cfg.own, "usage": [client.usage() for client in clients],
             "labels": labels, "controls": controls, "costs": costs, "annotators": pools}
    write_judge_report(Path(cfg.out), subsets, results, judged, about)
    print(judge_table(results | controls))
    print("\n" + cost_table(costs))
    for name, found in pools.items():
        print(f"\nThe pool of {name}:\n{table('annotator', found)}")
    if labels:
        print(describe_labels(labels))
    if cfg.own:
        print(f"\nOutputs by {cfg.own}:\n{own_table(results)}")
    if all(found["Average"]["unread"]["mean"] == 1 for found in results.values()):
        raise JudgeStopped("not a single verdict could be read, so nothing is known of this judge. "
                           f"{Path(cfg.out, 'verdicts.jsonl')} says why. Use another judge, or, "
                           "behind a server, --verdict keyword.")


def ask_evaluators(cfg, subsets: dict[str, list], clients: list) -> tuple[dict, dict]:
    """({evaluator: {subset: repeats of rows}}, {evaluator: what it took}).

    Clients that are made are added to `clients`. Raises JudgeStopped that names the evaluator.
    """
    judged, costs, named = {}, {}, dict(evaluators(cfg, clients))
    for name, evaluate in named.items():
        start, before = time.perf_counter(), count_costs(clients)
        try:
            judged[name] = {subset: [evaluate(found, k) for k in range(cfg.repeats)]
                            for subset, found in subsets.items()}
        except JudgeStopped as error:
            if len(named) > 1:
                raise JudgeStopped(f"{name}: {error}") from None
            raise
        after = count_costs(clients)
        costs[name] = {title: after[title] - before[title] for title in after}
        costs[name]["seconds"] = time.perf_counter() - start
    return judged, costs


def count_costs(clients: list) -> dict[str, float]:
    """What all clients have used so far, by COSTS; empty without clients."""
    found = {}
    for client in clients:
        usage = client.usage()
        for name, title in COSTS.items():
            found[title] = found.get(title, 0) + usage[name]
    return found


def control_results(subsets: dict[str, list], cfg) -> dict[str, dict]:
    """What the rules, which use no model, say of the same pairs, as results of evaluators."""
    found = {}
    for rule in pairs.PAIR_RULES:
        rows = {name: [pairs.evaluate_by_rule(some, rule)] for name, some in subsets.items()}
        found[f"{rule} (control)"] = summarize_judge(subsets, rows, own=cfg.own, seed=cfg.seed)
    return found


def check(cfg) -> None:
    """Raise ValueError for flags that would not be read."""
    read = set(OWN) | {"out"} | flag_names(ServerFlags)
    if cfg.judge == "self":
        read |= MODEL
    refuse_unread(cfg, read)
    check_flags(cfg, asked=cfg.judge == "http")
    if cfg.repeats > 1 and cfg.judge != "http":
        raise ValueError(f"--repeats {cfg.repeats} needs --judge http: rules and the model itself "
                         "say the same every time. Leave it out.")
    if cfg.verdict == "keyword":
        for name in cfg.strategy:
            if pairs.find_strategy(name).kind != "verdict":
                raise ValueError(f"--verdict keyword compares two words, and --strategy {name} "
                                 "asks for more. Leave out one of them.")


def refuse_unread(cfg, read: set[str]) -> None:
    """Raise ValueError for a flag of eval.py that is given and not among those that are read."""
    # From the last on: --test-set sets flags that stand before it.
    for name, default in reversed(vars(parse_flags([])).items()):
        if name not in read and getattr(cfg, name, default) != default:
            raise ValueError(f"{spelled(name)} is not read with --judge {cfg.judge}. Leave it out.")


def evaluators(cfg, clients: list) -> Iterator[tuple]:
    """(name, function from pairs and the number of the repeat to rows) of each evaluator.

    Clients that are made are added to `clients`. There is one evaluator for each strategy and
    model, but one for all models together where they confer (confer.py).
    """
    if cfg.judge == "rule":
        for rule in cfg.strategy or pairs.PAIR_RULES:
            yield rule, lambda found, repeat, rule=rule: pairs.evaluate_by_rule(found, rule)
        return
    strategies = {name: pairs.find_strategy(name) for name in cfg.strategy or ["rules"]}
    if cfg.judge == "http":
        names = cfg.judge_model.split(",")
        clients += [client_from_flags(cfg, cfg.out, name) for name in names]
        backends = list(zip(names, clients, strict=True))
    else:
        backends = [(name, LocalChat(*parts, batch_size=cfg.batch_size))
                    for name, *parts in open_models(cfg)]
    most = cfg.max_unparsed if cfg.judge == "http" else 1.0
    for name, strategy in strategies.items():
        readers = []
        for model, backend in backends:
            title = model.strip() if len(backends) > 1 else ""
            readers.append(Unread(backend.ask, most, name=title))
        if strategy.kind in confer.FORMS:
            yield name, evaluator_of(strategy, readers[0], tuple(readers))
            continue
        for verdicts in readers:
            yield f"{verdicts.name} {name}".strip(), evaluator_of(strategy, verdicts)


def evaluator_of(strategy, verdicts: Unread, peers: tuple = ()):
    """A function from pairs and the number of the repeat to rows."""
    def evaluate(found, repeat):
        return pairs.evaluate_pairs(verdicts, found, strategy, sample=repeat, peers=peers)
    return evaluate


main = make_main(meta_evaluate, __doc__, **OWN)

if __name__ == "__main__":
    sys.exit(main())
