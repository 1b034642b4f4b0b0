"""Forward prediction: learn the response, and behind it its judgment.

    L = -(1/N) sum_t log p(y_t | x, y_<t) - (1/N_j) sum_t log p(j_t | x, y, j_<t)     CUT's, Eq. 1

as two documents, each with its own mean. The judgment is the response to the critic's prompt.
"""

from methods import judged, record_name, sequence_step
from methods.judged import critic_document, judged_document, judged_records

title = "forward prediction"
base = judged
TERMS = {"ce": "items"}
step = sequence_step


def items(run) -> list[dict]:
    """The response, and if there is one its judgment."""
    found = []
    for record in judged_records(run):
        documents = [judged_document(run, record)]
        if record["judgment"] is not None:
            documents.append(critic_document(run, record, record["judgment"]))
        found.append({"documents": documents, "name": record_name(record)})
    return found
