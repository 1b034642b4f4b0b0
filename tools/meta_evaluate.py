"""Measure judges on pairs of outputs that people have labelled (LLMBar, arXiv 2310.07641).

    python -m tools.meta_evaluate --data DIR --judge http --judge-model NAME --strategy cot

Writes metrics.json, verdicts.jsonl, report.md and a plot.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from extras.judges import client_from_flags, pairs
from extras.judges.local import LocalChat
from extras.judges.meta import summarize_judge
from extras.reports.judges import judge_table, write_judge_report
from tools import make_main, open_models


def meta_evaluate(cfg) -> None:
    """Ask every evaluator about every pair, and write what that says of them."""
    subsets = {name: found[:cfg.instances or None]
               for name, found in pairs.load_pairs(cfg.data).items()}
    judged, results, clients = {}, {}, []
    for name, evaluate in list(evaluators(cfg, clients)):
        judged[name] = {subset: [evaluate(found, k) for k in range(cfg.repeats)]
                        for subset, found in subsets.items()}
    if len(judged) > 2 and cfg.judge != "rule":  # two of the rules contradict each other
        judges = list(judged.values())
        judged["majority"] = {subset: [pairs.majority([found[subset][0] for found in judges])]
                              for subset in subsets}
    for name, found in judged.items():
        results[name] = summarize_judge(subsets, found, seed=cfg.seed)
    about = {"judge": cfg.judge, "usage": [client.usage() for client in clients]}
    write_judge_report(Path(cfg.out), subsets, results, judged, about)
    print(judge_table(results))


def evaluators(cfg, clients: list) -> Iterator[tuple]:
    """(name, function from pairs and the number of the repeat to rows) of each evaluator.

    Clients that are made are added to `clients`.
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
    for model, backend in backends:
        for name, strategy in strategies.items():
            def evaluate(found, repeat, ask=backend.ask, strategy=strategy):
                return pairs.evaluate_pairs(ask, found, strategy, sample=repeat)
            yield f"{model.strip()} {name}" if len(backends) > 1 else name, evaluate


main = make_main(
    meta_evaluate, __doc__, data=(None, "LLMBar's folder, or a file of labelled pairs"),
    judge=(("rule", "http", "self"), "rules, a server, or the model itself"),
    strategy=([], "ways of asking (default: rules); with --judge rule which rules (default: all)"),
    repeats=(1, "ask so many times, to see if a judge agrees with itself"),
    instances=(0, "pairs per subset, at most (0: all)"), seed=(0, "seeds the bootstrap"))

if __name__ == "__main__":
    sys.exit(main())
