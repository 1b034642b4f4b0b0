"""What methods share: batches, log-probabilities, the steps that only imitate."""

import random

import pytest
import torch

import data
import lora
import methods
from methods import collate, document_logprobs

IGNORE = data.IGNORE_INDEX


def random_items(n=5, vocab_size=64):
    """Items of one to three documents of random length, with indices and values."""
    items = []
    for number in range(n):
        documents = []
        for _ in range(random.randint(1, 3)):
            size = random.randint(3, 12)
            ids = [random.randrange(vocab_size) for _ in range(size)]
            labels = [IGNORE if t == 0 or random.random() < 0.3 else ids[t] for t in range(size)]
            labels[-1] = ids[-1]
            documents.append({"input_ids": ids, "labels": labels, "truncated": 0})
        last = len(documents) - 1
        items.append({"documents": documents, "name": str(number),
                      "indices": {"better": [0] * last, "worse": list(range(1, last + 1))},
                      "values": {"rewards": [random.random() for _ in documents]}})
    return items


# ----- Batches -----

def test_documents_lie_end_to_end_and_indices_are_counted_on(make_model):
    items, better, worse, rewards, ids = random_items(), [], [], [], []
    batch = collate(items, make_model(64, 0), "cpu")
    for item in items:
        start = len(rewards)
        better += [start] * (len(item["documents"]) - 1)
        worse += [start + k for k in range(1, len(item["documents"]))]
        rewards += item["values"]["rewards"]
        ids += [token for document in item["documents"] for token in document["input_ids"]]
    assert batch["input_ids"].tolist() == ids
    assert batch["better"].tolist() == better and batch["worse"].tolist() == worse
    assert batch["better"].dtype == torch.long
    assert batch["rewards"].tolist() == pytest.approx(rewards)
    assert (batch["documents"], batch["items"]) == (len(rewards), len(items))


def test_rows_predict_the_labels_of_their_own_document(make_model):
    items = random_items()
    batch = collate(items, make_model(64, 0), "cpu")
    rows, targets, owners, ends, start = [], [], [], [], 0
    documents = [document for item in items for document in item["documents"]]
    for number, document in enumerate(documents):
        for t, label in enumerate(document["labels"]):
            if label != IGNORE:
                rows.append(start + t - 1)
                targets.append(label)
                owners.append(number)
        start += len(document["labels"])
        ends.append(start - 1)
    for name, wanted in (("rows", rows), ("targets", targets), ("sequence_ids", owners),
                         ("ends", ends)):
        assert batch[name].tolist() == wanted, name


def test_names_that_some_items_lack_are_joined_from_the_others(make_model):
    items = random_items(3)
    items[0]["indices"], items[0]["values"] = {"better": [], "worse": []}, {"flagged": [True]}
    items[1] = {"documents": items[1]["documents"]}
    batch = collate(items, make_model(64, 0), "cpu")
    start = len(items[0]["documents"]) + len(items[1]["documents"])
    assert batch["worse"].tolist() == [start + k for k in items[2]["indices"]["worse"]]
    assert batch["flagged"].tolist() == [True] and batch["flagged"].dtype == torch.bool
    for item in items:
        item["indices"] = {"better": [], "worse": []}
    batch = collate(items, make_model(64, 0), "cpu")
    assert batch["better"].dtype == torch.long and len(batch["better"]) == 0


def test_a_model_that_lays_items_out_itself_is_asked_to(make_model):
    model, items, asked = make_model(64, 0), random_items(), []

    def lay_out(items):
        asked.append(items)
        return methods.lay_out_documents(items, "cpu")
    model.lay_out = lay_out
    own, plain = collate(items, model, "cpu"), collate(items, make_model(64, 0), "cpu")
    assert asked == [items] and own["rows"].tolist() == plain["rows"].tolist()


# ----- Log-probabilities -----

def test_packed_documents_have_the_log_probabilities_of_separate_ones(make_model, written_out):
    model, items = make_model(64, 1), random_items()
    sums, lengths = document_logprobs(model, collate(items, model, "cpu"))
    documents = [document for item in items for document in item["documents"]]
    for document, total, length in zip(documents, sums.tolist(), lengths.tolist(), strict=True):
        terms = written_out(model, document)
        assert total == pytest.approx(sum(terms), abs=1e-4) and length == len(terms)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probabilities_and_complements(temperature, make_model):
    model = make_model(64, 1)
    batch = collate(random_items(), model, "cpu")
    logits = model.lm_head(methods.label_hidden(model, batch)).double() / temperature
    p = logits.softmax(-1).gather(-1, batch["targets"][:, None]).squeeze(-1)
    found = methods.label_logprobs(model, batch, temperature=temperature)
    torch.testing.assert_close(found.double(), p.log(), atol=1e-5, rtol=0)
    if temperature == 1:
        logprobs, complements = methods.both_logprobs(model, batch)
        assert torch.equal(logprobs, found)
        torch.testing.assert_close(complements.double(), (1 - p).log(), atol=1e-5, rtol=0)


def test_a_model_that_fuses_the_head_is_asked_to(make_model):
    model, asked = make_model(64, 1), []
    batch = collate(random_items(), model, "cpu")

    def fused(hidden, targets, temperature=1.0):
        asked.append(temperature)
        return (torch.zeros(len(targets)), torch.ones(len(targets))) if len(asked) < 3 else None
    wanted = methods.label_logprobs(model, batch)
    model.fused_logprobs = fused
    assert not methods.label_logprobs(model, batch, temperature=0.5).any()
    assert methods.both_logprobs(model, batch)[1].all()
    assert torch.equal(methods.label_logprobs(model, batch), wanted)  # it may decline
    assert asked == [0.5, 1.0, 1.0]


def test_the_steps_that_only_imitate_have_golden_numbers(golden):
    model, documents = golden()
    batch = collate([{"documents": [x]} for x in documents], model, "cpu")
    tokens = methods.token_step(model, batch, None)["ce"] / 14
    means = methods.sequence_step(model, batch, None)["ce"] / 4
    assert tokens.item() == pytest.approx(2.2177273310, rel=1e-6)
    assert means.item() == pytest.approx(2.1976986744, rel=1e-6)


def test_a_document_without_a_label_adds_nothing_and_no_nan(golden):
    model, documents = golden()
    blank = {"input_ids": [1, 2], "labels": [IGNORE] * 2, "truncated": 0}
    for step in (methods.token_step, methods.sequence_step):
        found = []
        for more in ([], [blank]):
            batch = collate([{"documents": [x]} for x in documents + more], model, "cpu")
            model.table.grad = None
            loss = step(model, batch, None)["ce"]
            loss.backward()
            found.append((loss.item(), model.table.grad.clone()))
        assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_a_merged_copy_says_the_same_and_leaves_the_model_alone(ready):
    run = ready("sft")
    ids = torch.randint(0, 300, (2, 9))
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    merged = methods.merged_copy(run.model)
    torch.testing.assert_close(merged(ids), run.model(ids), atol=1e-5, rtol=1e-4)
    assert not lora.lora_modules(merged) and lora.lora_modules(run.model)
    assert all(torch.equal(before[name], weight) for name, weight in run.model.named_parameters())
    assert methods.merged_copy(merged) is merged and not merged.training


def test_what_a_message_calls_a_record():
    assert methods.record_name({"task": "t", "id": 3, "x": 1}) == "t/3"
    assert methods.record_name({"id": "a"}) == "a" and methods.record_name({}) == ""
