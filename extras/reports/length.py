"""How far rewards follow length, and what choosing by length alone gains: arXiv 2310.03716."""

import numpy as np

from extras.reports.tables import table


def length_figures(rows: list[dict]) -> dict:
    """Rewards against lengths; rows: {"group", "reward", "length"}, a group being a question.

    "length", "length_rank", "length_within": Pearson's and Spearman's correlation, and Pearson's
    within groups. "any", "longest", "best": the mean over groups of the reward of an answer drawn
    at random, of the longest, and of the best; "by_length": (longest - any) / (best - any), the
    share of what choosing gains that length alone gains. None where a figure does not exist.
    """
    groups, within, chosen = {}, [], []
    for row in rows:
        groups.setdefault(row["group"], []).append([row["reward"], row["length"]])
    for group in map(np.array, groups.values()):  # (answers, 2)
        within += (group - group.mean(0)).tolist()
        rewards, lengths = group.T
        longest = rewards[lengths == lengths.max()].mean()
        chosen.append([rewards.mean(), longest, rewards.max()])
    both = np.array([[row["reward"], row["length"]] for row in rows]).reshape(-1, 2).T
    found = {"length": correlation(*both), "length_rank": correlation(*map(ranks, both)),
             "length_within": correlation(*np.array(within).reshape(-1, 2).T)}
    found |= dict.fromkeys(("any", "longest", "best", "by_length"))
    if chosen:
        some, longest, best = np.mean(chosen, 0).tolist()
        found |= {"any": some, "longest": longest, "best": best}
        if best - some > 1e-9 * abs(best):  # more than rounding
            found["by_length"] = (longest - some) / (best - some)
    return found


def ranks(x):
    """The rank of each value of x (n,), and of equal ones the mean rank."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


def correlation(x, y) -> float | None:
    """Pearson's r; None where one of them does not vary, but for rounding."""
    if len(x) < 2 or any(np.ptp(z) <= 1e-9 * np.abs(z).max() + 1e-12 for z in (x, y)):
        return None
    return float(np.corrcoef(x, y)[0, 1])


def length_section(found: dict) -> str:
    """Markdown: the figures of `length_figures`."""
    correlations = {"Pearson": found["length"], "Spearman": found["length_rank"],
                    "Pearson within questions": found["length_within"]}
    gains = {"drawn at random": found["any"], "the longest": found["longest"],
             "the best": found["best"]}
    about = "Correlation of an answer's reward with its number of words."
    parts = ["\n## Reward and length", about,
             table("candidates", {"correlation": correlations}),
             "Mean reward of one answer to each question.", table("answer", {"reward": gains})]
    if found["by_length"] is not None:
        parts.append(f"Choosing by length alone gains {100 * found['by_length']:.0f} % of what "
                     "choosing by reward gains.")
    return "\n\n".join(parts) + "\n"
