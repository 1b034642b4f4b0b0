"""How far to trust a judge: its verdicts on pairs against people's labels, as LLMBar measures it.

Rows are those of pairs.evaluate_pairs: "winners" of both orders, "1", "2" or None (unparsed).
"""

from collections import Counter
from itertools import combinations

from eval import bootstrap
from extras.judges.pairs import SUBSETS

COLUMNS = {  # name: (title, what it says)
    "accuracy": ("Acc", "share of verdicts that agree with people's label, mean of both orders"),
    "accuracy_both": ("Both", "share of instances that are right in both orders"),
    "agreement": ("Agr", "share of instances with the same verdict in both orders (two unread ones "
                  "count as the same, as published)"),
}


def cohen_kappa(first: list, second: list) -> float | None:
    """Cohen's kappa of two codings, (p_o - p_e) / (1 - p_e); None where chance explains all."""
    n, codes = len(first), set(first) | set(second)
    if not n:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    expected = sum(first.count(code) * second.count(code) for code in codes) / n**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def judge_metrics(pairs: list[dict], rows: list[dict], *, seed: int = 0) -> dict:
    """A judge's rows against the labels of the pairs.

    COLUMNS with intervals over instances; "kappa" with the label (mean of both orders, unparsed a
    code of its own) and of the two orders; counts; "length", see `length_bias`.
    """
    gold, winners = [str(pair["label"]) for pair in pairs], [row["winners"] for row in rows]
    hits = [[winner == label for winner in both]
            for both, label in zip(winners, gold, strict=True)]
    codes = [[both[order] or "-" for both in winners] for order in (0, 1)]
    kappas = [cohen_kappa(code, gold) for code in codes]
    failures = Counter()
    for row in rows:
        failures.update(failure.split(":")[0] for failure in row["failures"])
    return {
        "accuracy": bootstrap([sum(both) / 2 for both in hits], seed=seed),
        "accuracy_both": bootstrap([float(all(both)) for both in hits], seed=seed),
        "agreement": bootstrap([float(a == b) for a, b in winners], seed=seed),
        "kappa": None if None in kappas else sum(kappas) / 2, "kappa_orders": cohen_kappa(*codes),
        "n": len(pairs), "verdicts": 2 * len(pairs),
        "unparsed": sum(both.count(None) for both in winners),
        "draws": sum(row["draw"] for row in rows), "failures": dict(sorted(failures.items())),
        "length": length_bias(pairs, winners)}


def length_bias(pairs: list[dict], winners: list[list], *, least: int = 30) -> dict:
    """How often the longer output wins, and should; accuracy where it should, and where not.

    Over verdicts on pairs whose lengths differ by more than `least` characters.
    """
    cases = []  # (the longer one won, the longer one should have)
    for pair, both in zip(pairs, winners, strict=True):
        difference = len(pair["output_1"]) - len(pair["output_2"])
        longer = "1" if difference > 0 else "2"
        if abs(difference) > least:
            cases += [(winner == longer, str(pair["label"]) == longer) for winner in both if winner]

    def mean(values):
        return sum(values) / len(values) if values else None
    return {"verdicts": len(cases), "longer_wins": mean([won for won, _ in cases]),
            "longer_is_right": mean([should for _, should in cases]),
            "accuracy_longer_right": mean([won for won, should in cases if should]),
            "accuracy_shorter_right": mean([not won for won, should in cases if not should])}


def retest_agreement(repeats: list[list[dict]]) -> dict | None:
    """How often the same question gets the same verdict when asked again; None for one repeat.

    Mean over pairs of repeats. A verdict that cannot be read agrees with nothing.
    """
    if len(repeats) < 2:
        return None
    shares = []
    for rows in zip(*repeats, strict=True):
        same = [a["winners"][order] == b["winners"][order] is not None
                for a, b in combinations(rows, 2) for order in (0, 1)]
        shares.append(sum(same) / len(same))
    return bootstrap(shares)


def average_metrics(subsets: dict[str, dict], names: list[str]) -> dict:
    """The unweighted mean over subsets of each of COLUMNS; intervals as of independent subsets."""
    found = {}
    for column in COLUMNS:
        values = [subsets[name][column] for name in names]
        mean, interval = sum(value["mean"] for value in values) / len(values), None
        if all(value["ci95"] for value in values):
            halves = [(value["ci95"][1] - value["ci95"][0]) / 2 for value in values]
            spread = sum(half**2 for half in halves) ** 0.5 / len(values)
            interval = [max(0.0, mean - spread), min(1.0, mean + spread)]
        found[column] = {"mean": mean, "ci95": interval, "n": sum(value["n"] for value in values)}
    return found


def summarize_judge(subsets: dict[str, list], judged: dict[str, list], *, seed: int = 0) -> dict:
    """{subset: judge_metrics and "retest", "Average", and with LLMBar's subsets "Adversarial"}.

    subsets: pairs by name; judged: for each a list of repeats, each a list of rows. The average is
    over LLMBar's five sets where all are there, else over all there are.
    """
    found, means = {}, {}
    for name, pairs in subsets.items():
        found[name] = judge_metrics(pairs, judged[name][0], seed=seed)
        found[name]["retest"] = retest_agreement(judged[name])
    if subsets.keys() >= set(SUBSETS[1:]):
        means["Adversarial"] = average_metrics(found, list(SUBSETS[1:]))
    averaged = SUBSETS if subsets.keys() >= set(SUBSETS) else subsets
    return found | means | {"Average": average_metrics(found, list(averaged))}


def wilson(k: int, n: int) -> list[float] | None:
    """The 95 % interval of a share k / n (Wilson 1927); None for n = 0."""
    if not n:
        return None
    z, p = 1.959964, k / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]
