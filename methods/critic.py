"""Critic: a model that writes the judgment of a response, or that it is perfect.

The loss is the mean likelihood of the judgment's tokens   (CUT's paper, section 5.2). Its adapter
then judges for other methods: --judge self --critic RUN.
"""

from methods import judged, sequence_step
from methods.critics import PERFECT
from methods.judged import critic_document, judged_records, one_document

title = "critic"
base = judged
TERMS = {"ce": "items"}
step = sequence_step


def items(run) -> list[dict]:
    """One document per judged response: the critic's prompt and the judgment."""
    found = []
    for record in judged_records(run):
        document = critic_document(run, record, record["judgment"] or PERFECT)
        found.append(one_document(record, document))
    return found
