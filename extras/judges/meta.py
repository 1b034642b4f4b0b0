"""How far to trust a judge: its verdicts on pairs against people's labels, as LLMBar measures it.

Rows are those of pairs.evaluate_pairs: "winners" of both orders, "1", "2" or None (unread). All
figures are over what could be read, and "unread" is the share of what could not.
"""

from collections import Counter
from itertools import combinations

from eval import bootstrap
from extras.judges.pairs import SOURCES, SUBSETS

COLUMNS = {  # name: (title, what it says)
    "accuracy": ("Acc", "share of verdicts that agree with people's label, mean of both orders"),
    "accuracy_both": ("Both", "share of instances that are right in both orders"),
    "agreement": ("Agr", "share of instances with the same verdict in both orders"),
}


def cohen_kappa(first: list, second: list) -> float | None:
    """Cohen's kappa of two codings, (p_o - p_e) / (1 - p_e); None where chance explains all."""
    n, codes = len(first), set(first) | set(second)
    if not n:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    expected = sum(first.count(code) * second.count(code) for code in codes) / n**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def judge_metrics(pairs: list[dict], rows: list[dict], *, own: str = "", seed: int = 0) -> dict:
    """A judge's rows against the labels of the pairs.

    COLUMNS with intervals over instances; "unread", the share of verdicts; "kappa" with the label
    (mean of both orders) and of the two orders; counts; "length", see `length_bias`; with `own`,
    "own", see `self_preference`.
    """
    gold, winners = [str(pair["label"]) for pair in pairs], [row["winners"] for row in rows]
    shares, both_right, same, both_read, failures = [], [], [], [], Counter()
    for read, label, row in zip(winners, gold, rows, strict=True):
        shares.append(share_of(label, read))
        if None not in read:
            both_read.append(read)
            both_right.append(float(read == [label, label]))
            same.append(float(read[0] == read[1]))
        failures.update(failure.split(":")[0] for failure in row["failures"])
    kappas = []  # with the label, in either order
    for order in (0, 1):
        known = [(read[order], label) for read, label in zip(winners, gold, strict=True)
                 if read[order]]
        kappas.append(cohen_kappa([said for said, _ in known], [label for _, label in known]))
    unread = sum(read.count(None) for read in winners)
    found = {
        "accuracy": bootstrap(shares, seed=seed), "accuracy_both": bootstrap(both_right, seed=seed),
        "agreement": bootstrap(same, seed=seed),
        "unread": {"mean": unread / (2 * len(pairs)), "n": 2 * len(pairs)},
        "kappa": None if None in kappas else sum(kappas) / 2,
        "kappa_orders": cohen_kappa([one for one, _ in both_read], [two for _, two in both_read]),
        "n": len(pairs), "verdicts": 2 * len(pairs), "unparsed": unread,
        "draws": sum(row["draw"] for row in rows), "failures": dict(sorted(failures.items())),
        "length": length_bias(pairs, winners)}
    if own:
        found["own"] = self_preference(pairs, winners, own, seed=seed)
    return found


def annotator_metrics(subsets: dict[str, list], judged: dict[str, dict]) -> dict[str, dict]:
    """{pool of annotators: {annotator: its agreement with people's labels}}.

    Over the pairs of all subsets that were drawn for the annotator, in the first repeat: "pairs",
    how many were "flipped", and the accuracy "before" that and "after", with intervals.
    """
    found = {}
    for name, results in judged.items():
        groups = {}
        for subset, pairs in subsets.items():
            for pair, row in zip(pairs, results[subset][0], strict=True):
                if "annotator" in row:
                    groups.setdefault(row["annotator"], []).append((str(pair["label"]), row))
        for who in sorted(groups):
            shares = {}
            for title, column in (("before", "unflipped"), ("after", "winners")):
                shares[title] = bootstrap([share_of(label, row[column])
                                           for label, row in groups[who]])
            flipped = sum(row["flipped"] for _, row in groups[who])
            found.setdefault(name, {})[who] = {"pairs": len(groups[who]), "flipped": flipped,
                                               **shares}
    return found


def share_of(winner: str, both: list) -> float | None:
    """The share of the verdicts of both orders that name a winner; None if none could be read."""
    known = [said == winner for said in both if said]
    return sum(known) / len(known) if known else None


def own_sides(pair: dict, own: str) -> list[str]:
    """Which outputs of a pair, of "1" and "2", are by a source whose name holds `own`."""
    return [name[-1] for name in SOURCES if own.lower() in pair.get(name, "").lower()]


def check_sources(pairs: list[dict], own: str) -> None:
    """Raise ValueError if no pair tells how often outputs of `own` win."""
    found = sorted({pair[name] for pair in pairs for name in SOURCES if name in pair})
    if not found:
        raise ValueError(f"--own {own} needs to know who wrote the outputs, and no pair has a "
                         "source_1 or source_2. Add them to the file, or leave --own out.")
    if not any(len(own_sides(pair, own)) == 1 for pair in pairs):
        raise ValueError(f"--own {own}: no pair has one output by {own} and one by another. The "
                         f"sources are {', '.join(found[:20])}. Give (a part of) one of them.")


def self_preference(pairs: list[dict], winners: list[list], own: str, *, seed: int = 0) -> dict:
    """How often the judge prefers outputs by `own`, how often people do, and the difference.

    Over pairs with one such output and a verdict: {"judge", "people", "difference"}, each with its
    interval over pairs. A judge that likes its own family's outputs has a positive difference.
    """
    judge, people = [], []
    for pair, both in zip(pairs, winners, strict=True):
        mine = own_sides(pair, own)
        if len(mine) == 1 and both != [None, None]:
            judge.append(share_of(mine[0], both))
            people.append(float(str(pair["label"]) == mine[0]))
    more = [one - other for one, other in zip(judge, people, strict=True)]
    return {"judge": bootstrap(judge, seed=seed), "people": bootstrap(people, seed=seed),
            "difference": bootstrap(more, seed=seed, span=(-1, 1))}


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

    Mean over pairs of repeats in which both verdicts could be read.
    """
    if len(repeats) < 2:
        return None
    shares = []
    for rows in zip(*repeats, strict=True):
        same = []
        for one, other in combinations([row["winners"] for row in rows], 2):
            same += [a == b for a, b in zip(one, other, strict=True) if a and b]
        if same:
            shares.append(sum(same) / len(same))
    return bootstrap(shares)


def average_metrics(subsets: dict[str, dict], names: list[str]) -> dict:
    """The unweighted mean over subsets of each of COLUMNS; intervals as of independent subsets.

    It is None if a subset has none. "unread" is the mean, too.
    """
    found = {}
    for column in COLUMNS:
        values = [subsets[name][column] for name in names]
        means, interval, mean = [value["mean"] for value in values], None, None
        if None not in means:
            mean = sum(means) / len(means)
        if all(value["ci95"] for value in values):
            halves = [(value["ci95"][1] - value["ci95"][0]) / 2 for value in values]
            spread = sum(half**2 for half in halves) ** 0.5 / len(values)
            interval = [max(0.0, mean - spread), min(1.0, mean + spread)]
        found[column] = {"mean": mean, "ci95": interval, "n": sum(value["n"] for value in values)}
    shares = [subsets[name]["unread"] for name in names]
    found["unread"] = {"mean": sum(share["mean"] for share in shares) / len(shares),
                       "n": sum(share["n"] for share in shares)}
    return found


def summarize_judge(subsets: dict[str, list], judged: dict[str, list], *, own: str = "",
                    seed: int = 0) -> dict:
    """{subset: judge_metrics and "retest", "Average", and with LLMBar's subsets "Adversarial"}.

    subsets: pairs by name; judged: for each a list of repeats, each a list of rows. The average is
    over LLMBar's five sets where all are there, else over all there are. With `own`, the average's
    "own" is over all pairs together.
    """
    found, means = {}, {}
    for name, pairs in subsets.items():
        found[name] = judge_metrics(pairs, judged[name][0], own=own, seed=seed)
        found[name]["retest"] = retest_agreement(judged[name])
    if subsets.keys() >= set(SUBSETS[1:]):
        means["Adversarial"] = average_metrics(found, list(SUBSETS[1:]))
    averaged = SUBSETS if subsets.keys() >= set(SUBSETS) else subsets
    means["Average"] = average_metrics(found, list(averaged))
    if own:
        everything = [pair for pairs in subsets.values() for pair in pairs]
        winners = [row["winners"] for name in subsets for row in judged[name][0]]
        means["Average"]["own"] = self_preference(everything, winners, own, seed=seed)
    return found | means


def wilson(k: int, n: int) -> list[float] | None:
    """The 95 % interval of a share k / n (Wilson 1927); None for n = 0."""
    if not n:
        return None
    z, p = 1.959964, k / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]
