"""Expert iteration: fine-tune on the best of n sampled answers, and repeat with --rounds.

The loss is that of SFT on one best answer of each question   (best of n: WebGPT, arXiv 2112.09332;
iterated: arXiv 1705.08439). tools/best_of.py measures best of n without training.
"""

from methods import candidates, record_name, token_step
from methods.groups import best_answers, candidate_document, group_rng, grouped_candidates

title = "SFT(IA)+expert"
base = candidates
unread = ("max_worse",)
TERMS = {"ce": "tokens"}
step = token_step


def items(run) -> list[dict]:
    """A best answer of each question."""
    found = []
    for group in grouped_candidates(run):
        best, _ = best_answers(group)
        if best:
            chosen = group_rng(run, group).choice(best)
            found.append({"documents": [candidate_document(run, chosen)],
                          "name": record_name(chosen)})
    run.say(f"expert: {len(found)} questions with a best answer.")
    return found
