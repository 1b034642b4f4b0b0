"""The step of every method on answers that are only an end, and on answers without a target."""

import math

import pytest
import torch

import data
from methods import finding

CASES = [(stage,) for stage in finding.stages()] + [
    ("dpo", "--preference", "ipo"), ("dpo", "--preference", "hinge"), ("dpo", "--length-normalize"),
    ("dpo", "--preference", "robust", "--label-smoothing", "0.1"),
    ("unlikelihood", "--level", "token"), ("unlikelihood", "--level", "sequence"),
    ("pro", "--no-use-rewards"), ("rrhf", "--ft-reduction", "mean"), ("cut", "--positive", "text")]
FLAGS = {"rlaif": ["--labels", "scores"], "rlcd": ["--temperature", "2"]}
# A phase, several models, a corpus, and extras/ make their items.
LEFT_OUT = {"ppo", "curriculum", "pretrain", "constitutional"}
LABELLED = {"task": "colour", "id": "1", "number": 0, "instruction": "name it", "input": "a hat",
            "probability": 0.9, "first": {"wording": "name it", "response": "red"},
            "second": {"wording": "colour ?", "response": "blue"}}


@pytest.fixture
def items_of(ready, candidates, judged):
    """A function (stage, *flags) -> its run, and the items that it makes of answers in files."""
    def make(stage, *flags):
        kind = finding.find_method(stage).kind
        files = {"candidates": ["--candidates", str(candidates)],
                 "judged": ["--records", str(judged), "--downsample", "0"]}
        run = ready(stage, *(FLAGS.get(stage) or files.get(kind, [])), *flags)
        run.model.eval()  # no dropout
        data.append_records(run.folder / "preferences.jsonl", [LABELLED])
        return run, run.method.items(run)
    return make


def keep_labels(item, n):
    """The item with only the last n labels of each document."""
    documents = []
    for document in item["documents"]:
        labels = document["labels"]
        blank = [data.IGNORE_INDEX] * (len(labels) - n)
        documents.append({**document, "labels": blank + labels[len(labels) - n:]})
    return {**item, "documents": documents}


@pytest.mark.parametrize("case", [
    pytest.param(case, id=" ".join(case)) for case in CASES
    if case[0] in finding.stages() and case[0] not in LEFT_OUT])
def test_every_step_on_empty_answers_is_finite(case, items_of, gradients):
    """Answers in pairs have an end; a lone one without a target changes no mean of tokens."""
    run, items = items_of(*case)
    alone, of_tokens = len(items[0]["documents"]) == 1, {"tokens"} == {*run.method.TERMS.values()}
    ends, blank = keep_labels(items[0], 1), keep_labels(items[-1], 0)
    means, grads = gradients(run, [ends])
    assert grads.any() or "--level" in case  # an end alone repeats nothing
    for chosen in [[ends], [ends, blank], [blank]] if alone else [[ends]]:
        found, more = gradients(run, chosen)
        assert all(math.isfinite(value) for value in found.values()) and more.isfinite().all()
        if of_tokens and ends in chosen:
            assert found == pytest.approx(means, rel=1e-5)
            torch.testing.assert_close(more, grads, atol=1e-6, rtol=1e-4)
