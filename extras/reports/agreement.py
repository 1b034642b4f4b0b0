"""Which wordings and which styles of wording break the agreement of a question's responses.

A question here is {model: its row of eval.evaluate_responses}, of the models that answered it.
"""

from collections import Counter


def match_questions(tables: dict[str, list[dict]]) -> list[dict[str, dict]]:
    """The questions of all models, {model: row} each, in the order in which they first appear.

    Rows belong together that have the same task and id, or the same task and input where some row
    has no id. Of questions that are there twice, the first matches the first.
    """
    rows = [row for table in tables.values() for row in table]
    name = "id" if all(row.get("id") is not None for row in rows) else "input"
    found = {}
    for model, table in tables.items():
        seen = Counter()
        for row in table:
            key = row["task"], row[name]
            found.setdefault((*key, seen[key]), {})[model] = row
            seen[key] += 1
    return list(found.values())


def letters(number: int) -> str:
    """The name of a cluster: A, B, ..., Z, AA, AB, ..."""
    name = ""
    while number >= 0:
        name = chr(ord("A") + number % 26) + name
        number = number // 26 - 1
    return name


def outside_largest(cluster: list[int]) -> list[float]:
    """For each response 1 if it is outside the largest cluster, 0 if inside.

    If m clusters are the largest, each is the one with chance 1 / m; else the order of the
    responses, which decides cluster 0, would favour the first wordings.
    """
    sizes = Counter(cluster)
    most = max(sizes.values())
    largest = [number for number, size in sizes.items() if size == most]
    inside = 1 / len(largest)
    return [1 - inside if number in largest else 1.0 for number in cluster]


def share_outside(questions: list[dict], keys) -> dict:
    """{key: {model: [sum, n]}}; keys(row): a key per response, and None where it has none.

    A question counts once per key, with the mean over its responses of that key. Questions with a
    single response cannot disagree, and are left out.
    """
    found = {}
    for rows in questions:
        for model, row in rows.items():
            if len(row["responses"]) < 2:
                continue
            own = {}
            for key, outside in zip(keys(row), outside_largest(row["cluster"]), strict=True):
                own.setdefault(key, []).append(outside)
            for key, values in own.items():
                total = found.setdefault(key, {}).setdefault(model, [0.0, 0])
                total[0] += sum(values) / len(values)
                total[1] += 1
    found.pop(None, None)
    return found


def styles_of(row: dict) -> list:
    """A style per response: "plain" where a wording has none, None if the row does not say."""
    styles = row.get("styles") or []
    if len(styles) != len(row["responses"]):
        return [None] * len(row["responses"])
    return [style or "plain" for style in styles]


def summarize_sums(sums: dict[str, list]) -> dict[str, dict]:
    """{model: {"share", "n"}} from {model: [sum, n]}."""
    return {model: {"share": total / n, "n": n} for model, (total, n) in sums.items()}


def ranked(found: dict) -> list[tuple]:
    """(key, {model: {"share", "n"}}), those first that break agreement most, over all models."""
    def order(entry):
        total, n = map(sum, zip(*entry[1].values(), strict=True))
        return -total / n, -n
    return [(key, summarize_sums(sums)) for key, sums in sorted(found.items(), key=order)]


def rank_wordings(questions: list[dict]) -> list[dict]:
    """The wordings, {"task", "wording", "style", "models": {model: {"share", "n"}}} each."""
    def keys(row):
        return [(row["task"], wording, style) for wording, style in
                zip(row["wordings"], styles_of(row), strict=True)]
    found = []
    for (task, wording, style), models in ranked(share_outside(questions, keys)):
        found.append({"task": task, "wording": wording, "style": style, "models": models})
    return found


def rank_styles(questions: list[dict]) -> dict[str, dict]:
    """{style: {model: {"share", "n"}}}, those first that break agreement most."""
    return dict(ranked(share_outside(questions, styles_of)))
