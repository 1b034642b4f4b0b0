"""extras/fast/llama.py: a model of the course, changed in place, gives the course's numbers."""

import copy
import os
import random

import pytest
import torch

from data import pack
from extras.fast import FastLlama, accelerate
from extras.fast.cpu import FastLinear
from extras.fast.llama import shared_start
from lora import LoraConfig, apply_lora, lora_modules, merge_lora
from losses import gathered_logprobs, prediction_rows
from model import Llama, ModelConfig, Packed, Sampling, generate, load_model, save_model


def random_items(seed=0, vocab_size=300):
    """Items of which some share a prompt that is long enough, and some responses begin alike."""
    dice, items = random.Random(seed), []
    for n, prompt_length in ((3, 30), (1, 12), (4, 20), (2, 3)):
        prompt = [dice.randrange(vocab_size) for _ in range(prompt_length)]
        begin, documents = [dice.randrange(vocab_size) for _ in range(2)], []
        for _ in range(n):
            response = begin + [dice.randrange(vocab_size) for _ in range(dice.randint(1, 9))]
            documents.append({"input_ids": prompt + response,
                              "labels": [-100] * prompt_length + response})
        items.append({"documents": documents})
    return items


def score(model, row, attend):
    """Log-probabilities of the labelled tokens, and the gradients of their sum."""
    rows, targets = prediction_rows(torch.tensor(row["labels"]), attend.before)
    hidden = model.hidden(torch.tensor(row["input_ids"]), attend, rows)
    logprobs = gathered_logprobs(model.lm_head(hidden), targets)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return logprobs, torch.autograd.grad(logprobs.sum(), weights)


def adapt(model):
    torch.manual_seed(1)
    apply_lora(model, LoraConfig(rank=4))
    for module in lora_modules(model).values():
        module.lora_B.data.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("adapted", ["not", "before", "after"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prompts_train_as_copies_of_them(make_model, adapted, checkpointing):
    items, plain, fast = random_items(), make_model().double(), make_model().double()
    if adapted != "not":
        adapt(plain)
    if adapted == "before":
        adapt(fast)
    accelerate(fast, checkpointing=checkpointing)
    if adapted == "after":
        adapt(fast)
    documents = [document for item in items for document in item["documents"]]
    expected_row, (row, attend) = pack(documents), fast.lay_out(items)
    assert len(row["input_ids"]) < 0.7 * len(expected_row["input_ids"])
    expected = score(plain, expected_row, Packed(expected_row["lengths"]))
    found = score(fast, row, attend)
    assert torch.allclose(found[0], expected[0], atol=1e-6)  # norms compute in float32
    for one, two in zip(found[1], expected[1], strict=True):
        assert (one - two).abs().max() <= 1e-5 * two.abs().max() + 1e-9


def test_what_lay_out_says_of_the_row(fast):
    items = random_items()
    row, attend = fast.lay_out(items)
    documents = [document for item in items for document in item["documents"]]
    assert row["lengths"] == [len(document["input_ids"]) for document in documents]
    assert len(row["labels"]) == len(row["input_ids"]) == len(row["sequence_ids"])
    labels, owners = torch.tensor(row["labels"]), torch.tensor(row["sequence_ids"])
    for number, document in enumerate(documents):
        response = [label for label in document["labels"] if label != -100]
        own = (labels != -100) & (owners == number)
        assert labels[own].tolist() == response  # learnt in each, even where they begin alike
        assert row["input_ids"][row["ends"][number]] == document["input_ids"][-1]
        assert [row["input_ids"][i] for i in attend.tokens[number]] == document["input_ids"]


def test_only_unlabelled_tokens_are_shared_and_only_where_it_pays():
    def documents(*rows, prompt=4):
        return [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in rows]
    assert shared_start(documents([1, 2, 3, 4, 9, 9], [1, 2, 3, 4, 9, 8])) == 4
    assert shared_start(documents([1, 2, 3, 4, 9, 9])) == 0
    assert shared_start(documents([1, 2, 0, 4, 9], [1, 2, 3, 4, 9])) == 0  # under a quarter
    assert shared_start(documents([1, 2, 3, 4], [1, 2, 3, 4], prompt=4)) == 3


def test_chosen_rows_are_rows_of_all_and_others_go_no_further(fast):
    row, attend = fast.lay_out(random_items())
    ids, seen = torch.tensor(row["input_ids"]), []
    for layer in (0, -1):
        norm = fast.model.layers[layer].post_attention_layernorm
        norm.register_forward_hook(lambda part, given, out: seen.append(len(out)))
    none = torch.tensor([], dtype=torch.long)
    for rows in (torch.randint(len(ids), (90,)), torch.tensor([3]), none):
        few, every = fast.hidden(ids, attend, rows), fast.hidden(ids, attend)[rows]
        assert few.shape == (len(rows), 32) and torch.allclose(few, every, atol=1e-5)
        assert seen[-4:-2] == [len(ids), len(rows)]
        slope, weights = torch.randn_like(few), list(fast.model.parameters())
        found, expected = (torch.autograd.grad((x * slope).sum(), weights) for x in (few, every))
        for one, two in zip(found, expected, strict=True):
            assert (one - two).abs().max() <= 1e-4 * two.abs().max() + 1e-9
    seen.clear()
    generate(fast, [[1, 5, 9], [7, 8]], Sampling(1))
    assert seen == [5, 2]


def test_accelerating_twice_copying_merging_and_saving(make_model, tmp_path):
    model = accelerate(accelerate(make_model()), checkpointing=True)
    assert type(model) is FastLlama and model.checkpointing
    assert not accelerate(model).checkpointing and isinstance(model, Llama)
    assert isinstance(model.lm_head, FastLinear)
    prompts = [[1, 2, 3], [4, 5]]
    merged = merge_lora(adapt(model))
    assert type(merged) is FastLlama and type(merged.model.layers[1].mlp.up_proj) is FastLinear
    assert generate(merged, prompts, Sampling(6)) == generate(model, prompts, Sampling(6))
    twin = copy.deepcopy(merged)
    assert torch.equal(twin.lm_head.weight, merged.lm_head.weight)
    save_model(merged, tmp_path)
    again = load_model(tmp_path)
    assert type(again) is Llama and again.state_dict().keys() == merged.state_dict().keys()
    assert generate(again, prompts, Sampling(6)) == generate(merged, prompts, Sampling(6))


def test_a_model_without_storage_and_a_tied_head(make_model):
    with torch.device("meta"):
        empty = accelerate(Llama(ModelConfig(**vars(make_model().config))))
    assert empty.lm_head.weight.is_meta and type(empty) is FastLlama
    tied = accelerate(make_model(tie_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    head = torch.nn.Linear(32, 1)
    tied.value_head = head
    accelerate(tied)
    assert type(head) is torch.nn.Linear  # only the model's own linears change


def test_weights_can_be_sharded_afterwards(fast):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    row, attend = fast.lay_out(random_items())
    ids, rows = torch.tensor(row["input_ids"]), torch.tensor([3, 9])
    expected = fast.hidden(ids, attend, rows)
    expected.sum().backward()
    slope = fast.model.layers[0].mlp.up_proj.weight.grad
    sharded = copy.deepcopy(fast)
    sharded.zero_grad(set_to_none=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for part in (*sharded.model.layers, sharded):
            fully_shard(part, mesh=mesh)
        register_fsdp_forward_method(sharded, "hidden")
        assert isinstance(sharded, FastLlama)
        found = sharded.hidden(ids, attend, rows)
        found.sum().backward()
        assert torch.allclose(found, expected, atol=1e-6)
        own = sharded.model.layers[0].mlp.up_proj.weight.grad.full_tensor()
        assert torch.allclose(own, slope, atol=1e-5)
    finally:
        dist.destroy_process_group()
    assert not os.environ.get("MASTER_ADDR")
