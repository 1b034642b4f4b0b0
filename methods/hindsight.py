"""Hindsight: learn every response behind its judgment, good ones behind the plain prompt.

    L = -(1/N) sum_t log p(y_t | x, j, y_<t)                                 CUT's paper, Eq. 4
"""

from methods import judged, sequence_step
from methods.judged import judged_document, judged_records, one_document

title = "hindsight"
base = judged
TERMS = {"ce": "items"}
step = sequence_step


def items(run) -> list[dict]:
    """One document per judged response."""
    found = []
    for record in judged_records(run):
        found.append(one_document(record, judged_document(run, record, record["judgment"])))
    return found
