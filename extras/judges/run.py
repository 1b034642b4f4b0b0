"""How train.py, eval.py and methods use this room. In a run, only one process asks a server."""

import argparse
import json
from collections.abc import Callable
from dataclasses import astuple, fields
from typing import get_args, get_type_hints

from extras.judges import asked
from extras.judges.client import RUN, ServerFlags, client_from_flags
from extras.judges.judges import HttpCritic, HttpJudge, canary_items, wrong_items
from extras.judges.local import LocalChat
from extras.judges.meta import wilson
from extras.judges.pairs import preference_probabilities
from extras.judges.questions import Reply, Unread, describe_problem
from extras.judges.writers import PRINCIPLES, constitutional
from judge import JudgeConfig, LocalJudge, RuleJudge, Verdict
from methods.flags import spelled


def add_flags(add: Callable) -> None:
    """Call argparse's add_argument for the flags of eval.py that only this room reads."""
    asked.add_flags(add)
    hints = get_type_hints(ServerFlags)
    for item in fields(ServerFlags):
        how = {"type": type(item.default), "choices": get_args(hints[item.name]) or None}
        if item.default is False:
            how = {"action": argparse.BooleanOptionalAction}
        add(spelled(item.name), default=item.default,
            help=f"{item.metadata['help']} ({item.default})", **how)


def make_backend(run) -> Callable:
    """Who answers the questions of a run, with the same replies in every process.

    A server, if --judge or --critic says http; else the model, of which each process asks a share.
    """
    cfg, memory, guard = run.cfg, run.memory, run.guard
    chat = LocalChat(run.model, run.tokenizer, run.template, batch_size=cfg.eval_batch)

    def ask_server(questions, **how):
        def work():
            if "server" not in memory:
                memory["server"] = client_from_flags(cfg, run.folder)
            return [astuple(reply) for reply in memory["server"].ask(questions, **how)]
        return [Reply(*row) for row in guard.first(work)]

    def ask_model(questions, **how):
        def work(part):
            return [astuple(reply) for reply in chat.ask(part, **how)]
        return [Reply(*row) for row in guard.share(questions, work)]
    said = [getattr(cfg, name, "") for name in ("judge", "critic", "agreement_by")]
    return ask_server if "http" in said else ask_model


def server_judge(cfg, config: JudgeConfig, run) -> HttpJudge:
    """The judge behind the server that the flags of a run name."""
    return HttpJudge(make_backend(run), config, max_unparsed=cfg.max_unparsed,
                     name=f"http {cfg.judge_model}")


def pair_judge(run) -> HttpJudge:
    """Who says that two answers agree: the server, or the model, that --agreement-by names."""
    cfg = run.cfg
    return HttpJudge(make_backend(run), max_unparsed=getattr(cfg, "max_unparsed", 0.1),
                     name=f"{cfg.agreement_by} {getattr(cfg, 'judge_model', '')}".strip())


def server_critic(cfg, run) -> HttpCritic:
    """The critic behind the server that the flags name."""
    refuse_keyword(cfg, "a judgment in words")
    return HttpCritic(make_backend(run), max_unparsed=cfg.max_unparsed)


def refuse_keyword(cfg, what: str) -> None:
    """Raise ValueError for --verdict keyword where it would not be read."""
    if getattr(cfg, "verdict", "line") == "keyword":
        raise ValueError(describe_problem("no_keyword", what=what))


def revise(run, records: list[dict], principles: list[str]) -> list[dict]:
    """Critique and revision of sampled answers, by our own principles where none are given."""
    refuse_keyword(run.cfg, "a revision")
    return constitutional(make_backend(run), records, principles or PRINCIPLES,
                          rounds=run.cfg.revisions, seed=run.cfg.seed)


def label_pairs(run, pairs: list[dict]) -> list[float | None]:
    """How probable it is that the "first" answer of each pair is better than the "second"."""
    texts = []
    for pair in pairs:
        asked = f"{pair['instruction']}\n\n{pair['input']}".strip()
        texts.append({"input": asked, "output_1": pair["first"]["response"],
                      "output_2": pair["second"]["response"]})
    most = run.cfg.max_unparsed if run.cfg.judge == "http" else 1.0
    verdicts = run.memory.setdefault("labels", Unread(None, most))  # counts over the whole run
    verdicts.backend = make_backend(run)
    return preference_probabilities(verdicts.ask, texts)


def after_collecting(run, judge, unanswered: Callable) -> None:
    """Report what a server was asked; write canaries.json, how often what is wrong passes as right.

    `unanswered(run)` gives the items that were collected for. Raises JudgeStopped if there were
    verdicts, and none could be read.
    """
    if isinstance(judge, HttpJudge):
        judge.verdicts.finish()
        if unread := judge.verdicts.describe():
            run.say(f"note: {unread} They are missing, not wrong.")
    path = run.folder / "canaries.json"
    gives_verdicts = isinstance(judge, (LocalJudge, HttpJudge))  # not plain numbers
    if gives_verdicts and not run.guard.first(path.exists):
        items, rule = unanswered(run), RuleJudge(run.cfg.rouge_threshold)
        kinds = {"answers without content": canary_items(items),
                 "wrong answers of the right kind": wrong_items(items, rule)}
        verdicts = iter(judge.judge([item for canaries in kinds.values() for item in canaries]))
        empty, wrong = (count_passed(run, kind, [next(verdicts) for _ in canaries])
                        for kind, canaries in kinds.items())
        found = empty | {"wrong": wrong}
        run.guard.first(lambda: path.write_text(json.dumps(found) + "\n"))
    RUN.tell(run.say)


def count_passed(run, kind: str, verdicts: list[Verdict]) -> dict:
    """How many canaries of a kind were called correct; says so if it is more than one in twenty."""
    read = [verdict for verdict in verdicts if verdict.how != "unparsed"]
    n, unread = len(read), len(verdicts) - len(read)
    passed = sum(verdict.correct is True for verdict in read)
    interval = wilson(passed, n)
    if 2 * unread > len(verdicts):
        run.say(f"warning: the judge gave no readable verdict on {unread} of {len(verdicts)} "
                f"{kind}; whether they please it is unknown.")
    if passed > 0.05 * n:
        run.say(f"warning: the judge called {passed} of {n} {kind} correct "
                f"({100 * passed / n:.0f} %, 95 % interval {100 * interval[0]:.0f} to "
                f"{100 * interval[1]:.0f} %); treat its scores with care.")
    return {"asked": len(verdicts), "unread": unread, "passed": passed, "ci95": interval}
