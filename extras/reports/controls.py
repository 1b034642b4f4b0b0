"""Controls for CR: a constant answer, the references, and shuffled answers.

Three sets of answers to the same questions, by the same judge: always the same one, the reference
answers, and each model's own, shuffled among the questions of a task (questions that are tasks of
their own: among all of these).
"""

import random
from collections import Counter

from eval import evaluate_responses, print_table
from extras.judges.similar import BY_ROUGE


def add_controls(cfg, results: dict, tables: dict, judge, more) -> None:
    """Add "controls", {name: metrics}, to the metrics of each model.

    Those that a judge is paid for, or is slow on, are left out unless --controls all.
    """
    free = cfg.judge == "rule" and ":" not in cfg.similar
    if cfg.controls == "none" or cfg.controls == "auto" and not free:
        return
    for model, rows in tables.items():
        results[model]["controls"] = {}
        for name, answers in control_answers(rows, cfg.seed).items():
            asked = [row | {"responses": texts, "unfinished": 0}
                     for row, texts in zip(rows, answers, strict=True)]
            metrics, _ = evaluate_responses(asked, judge, symmetrize=cfg.symmetrize, more=more)
            results[model]["controls"][name] = metrics


def control_answers(rows: list[dict], seed: int) -> dict[str, list]:
    """{name: responses of each row}; without references, they are no control."""
    said = Counter(text for row in rows for text in row["responses"])
    usual = said.most_common(1)[0][0] if said else ""
    found = {"always the same answer": [[usual] * len(row["responses"]) for row in rows]}
    if rows and all(row["targets"] for row in rows):  # in turn, where there are several
        found["reference answers"] = [
            [row["targets"][i % len(row["targets"])] for i in range(len(row["responses"]))]
            for row in rows]
    sizes, pools, rng = Counter(row["task"] for row in rows), {}, random.Random(seed)
    # Tasks of a single question, as plain questions are, share their answers.
    homes = [row["task"] if sizes[row["task"]] > 1 else None for row in rows]
    for home, row in zip(homes, rows, strict=True):
        pools.setdefault(home, []).extend(row["responses"])
    for pool in pools.values():
        rng.shuffle(pool)
    found["shuffled answers"] = [
        [pools[home].pop() for _ in row["responses"]]
        for home, row in zip(homes, rows, strict=True)]
    return found


def describe(cfg, results: dict) -> None:
    """Add "settings" to each model's metrics: what a reader has to know of how they were made."""
    flags = {"judge": "rule", "similar": "", "responses": []} | vars(cfg)
    names = ["seed", "similar"]
    trained = "stage" in flags  # then answers are greedy, and rules compare them
    if trained or flags["judge"] == "rule" and flags["similar"] in BY_ROUGE:
        names.append("rouge_threshold")
    if not flags["responses"]:  # which nobody was asked for here
        names += ["split", "max_new_tokens"]
    if not flags["responses"] and not trained:
        names += ["test_set", "samples", "temperature", "prefix", "server_extra"]
    settings = {name: getattr(cfg, name) for name in names if hasattr(cfg, name)}
    for found in results.values():
        found["settings"] = settings | found.get("settings", {})


def print_notes(results: dict) -> None:
    """Print what stands beside the table: controls, sampling noise, what could not be read."""
    by_name, controls = {}, {}
    for model, found in results.items():
        for name, metrics in found.get("controls", {}).items():
            by_name.setdefault(name, {})[model] = metrics
    for name, by_model in by_name.items():
        first, *others = by_model.values()
        if all(metrics == first for metrics in others):
            controls[name] = first
        else:
            controls |= {f"{name}: {model}": metrics for model, metrics in by_model.items()}
    if controls:
        print()
        print_table(controls, "control")
    for model, found in results.items():
        if found["wording_effect"]["n"]:
            within, cr = percent(found["within"]), percent(found["cr"])
            effect = percent(found["wording_effect"], "points")
            print(f"{model}: two answers to one wording agree in {within}, to two wordings in "
                  f"{cr}; the effect of wording beyond sampling: {effect}.")
        if found.get("empty"):
            print(f"{model}: {found['empty']} of {found['responses']} answers are empty, and "
                  "empty answers agree with each other.")
        if found["unfinished"]:
            print(f"{model}: {found['unfinished']} of {found['responses']} answers were "
                  "truncated at the length limit.")
        if found["unparsed"]:
            print(f"{model}: {found['unparsed']} of {found['asked']} verdicts on pairs could not "
                  "be read; these pairs are left out.")
        if found.get("unanswered"):
            print(f"{model}: {found['unanswered']} wordings got no answer and are left out.")


def percent(summary: dict, unit: str = "%") -> str:
    """12.3 % [11.0, 13.6]; the unit of a difference of two shares is points."""
    text = f"{100 * summary['mean']:.1f} {unit}"
    if summary["ci95"]:  # which a single question has not
        low, high = summary["ci95"]
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text
