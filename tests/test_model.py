"""model.py against transformers, against itself by another path, and against broken files."""
import copy
import dataclasses
import json
import os
import random
import re
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import (PRESETS, Branched, Cached, KVCache, Llama, ModelConfig, Packed, SwiGLU, attention, generate, load_model, prepacked, sample, save_model,
                   shared_prompts, similar_lengths, weight_files)

TINY = PRESETS["tiny"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny():
    return sharpened(Llama(TINY).init_weights(0))


@pytest.fixture
def folder(tiny, tmp_path):
    save_model(tiny, tmp_path / "m")
    return tmp_path / "m"


def sharpened(model):
    """Larger weights than at init, so that attention is not uniform and a wrong position shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * (0.1 if weight.dim() == 2 else 0.2))
    return model.eval()


def grown(model, longest=16):
    """The model under dynamic RoPE, which changes past `longest` tokens."""
    twin = Llama(dataclasses.replace(model.config, max_position_embeddings=longest, rope_scaling={"rope_type": "dynamic", "factor": 4.0})).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def random_config(rng):
    n_kv_heads = rng.choice([1, 2, 3])
    n_heads = n_kv_heads * rng.choice([1, 2, 4])
    head_dim = rng.choice([2, 4, 6, 10, 14, 16])
    dim = rng.choice([n_heads * head_dim, 8 * n_heads, 24 * n_heads])
    return ModelConfig(vocab_size=rng.randint(20, 400), dim=dim, n_layers=rng.randint(1, 3), n_heads=n_heads,
                       n_kv_heads=n_kv_heads, head_dim=head_dim, hidden_dim=rng.randint(8, 70),
                       norm_eps=rng.choice([1e-6, 1e-5]), rope_theta=rng.choice([10000.0, 500.0, 1e6]),
                       max_position_embeddings=64, tie_embeddings=rng.random() < 0.5,
                       attention_bias=rng.random() < 0.5, mlp_bias=rng.random() < 0.5)


def transformers_twin(model, dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_hf())).eval()
    missing, surplus = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing and not surplus
    return twin.to(dtype)


def ragged(lengths, vocab_size=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]


def pad(rows, side):
    longest = max(map(len, rows))
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        input_ids[i, span], mask[i, span] = row, True
    return input_ids, mask


# Against transformers


@pytest.mark.parametrize("seed", range(30))
def test_logits_equal_transformers(seed):
    rng = random.Random(seed)
    model = sharpened(Llama(random_config(rng)).init_weights(seed))
    side = rng.choice(["left", "right"])
    input_ids, mask = pad(ragged([rng.randint(1, 12) for _ in range(4)], model.config.vocab_size, seed), side)
    position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)
    for dtype, atol in ((torch.float32, 1e-5), (torch.bfloat16, 0.06), (torch.float16, 0.008)):
        twin, ours = transformers_twin(model, dtype), copy.deepcopy(model).to(dtype)
        with torch.no_grad():
            theirs = twin(input_ids, attention_mask=mask.long(), position_ids=position_ids).logits
            logits = ours(input_ids, attention_mask=mask)
        assert logits.dtype == dtype and logits.shape == theirs.shape
        scale = max(1.0, theirs[mask].abs().max().item())
        assert (logits - theirs)[mask].abs().max() < atol * scale, (dtype, side)
        assert not logits[~mask].any()


def test_gradients_equal_transformers(tiny):
    twin, input_ids = transformers_twin(tiny), torch.stack(ragged([9, 9]))
    tiny(input_ids).log_softmax(-1)[..., 7].sum().backward()
    twin(input_ids).logits.log_softmax(-1)[..., 7].sum().backward()
    theirs = dict(twin.named_parameters())
    for name, weight in tiny.named_parameters():
        assert torch.allclose(weight.grad, theirs[name].grad, atol=1e-4, rtol=1e-4), name
    tiny.zero_grad(set_to_none=True)


def test_greedy_continuations_equal_transformers(tiny):
    twin, prompts = transformers_twin(tiny), [row.tolist() for row in ragged([1, 3, 8, 17, 30])]
    ours = generate(tiny, prompts, max_new_tokens=20, eos_ids=(7, 11))
    for prompt, answer in zip(prompts, ours):
        theirs = twin.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=[7, 11],
                               pad_token_id=0)
        assert answer == theirs[0, len(prompt):].tolist()


def test_transformers_reads_our_folder_and_we_read_theirs(tiny, tmp_path):
    transformers, input_ids = pytest.importorskip("transformers"), torch.stack(ragged([12]))
    for tied in (False, True):
        model = sharpened(Llama(ModelConfig(**(vars(TINY) | {"tie_embeddings": tied}))).init_weights(2))
        save_model(model, tmp_path / "ours", max_shard_bytes=20_000)
        twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
        twin.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
        again = load_model(tmp_path / "theirs")
        assert again.config == model.config
        with torch.no_grad():
            assert (twin(input_ids).logits - model(input_ids)).abs().max() < 1e-5
            assert torch.equal(again(input_ids), model(input_ids))
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
        shutil.rmtree(tmp_path / "theirs")


# One model, many paths


@torch.no_grad()
def test_single_padded_packed_and_cached_agree(tiny):
    lengths = [1, 9, 4, 30, 9, 2, 13]
    rows = ragged(lengths)
    single = [tiny(row[None])[0] for row in rows]                                        # (T, V) each
    flat = tiny(torch.cat(rows), lengths=lengths)                                        # (N, V)
    assert flat.shape == (sum(lengths), TINY.vocab_size)
    assert torch.allclose(flat, torch.cat(single), atol=1e-5)
    for side in ("left", "right"):
        input_ids, mask = pad(rows, side)
        assert torch.allclose(tiny(input_ids, attention_mask=mask)[mask], flat, atol=1e-5)
    packed = torch.zeros(2, 40, dtype=torch.long)
    segments = torch.zeros(2, 40, dtype=torch.long)
    for place, (row, start, document) in {3: (0, 0, 5), 1: (0, 30, 2), 6: (1, 3, 1), 4: (1, 16, 9)}.items():
        packed[row, start:start + lengths[place]] = rows[place]
        segments[row, start:start + lengths[place]] = document
    logits = tiny(packed, segment_ids=segments)
    for row, start, end, place in ((0, 0, 30, 3), (0, 30, 39, 1), (1, 3, 16, 6), (1, 16, 25, 4)):
        assert torch.allclose(logits[row, start:end], single[place], atol=1e-5)
    assert not logits[segments == 0].any()
    at = torch.tensor([0, 5, 5, 40])
    assert torch.allclose(tiny(torch.cat(rows), lengths=lengths, logits_at=at), flat[at], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[(5, 3, 8)], [(1, 1, 1)] * 8, [(4, 0, 2), (0, 3, 1), (1, 1, 1), (2, 4, 0)],
                                    [(2, 2, 2), (3, 0, 6)], [(0, 0, 3), (0, 0, 0), (5, 8, 1)]])
def test_cached_equals_uncached(tiny, chunks):
    rows = ragged([sum(counts) for counts in zip(*chunks)])
    cache, begin, pieces = KVCache(TINY, 3, 16, torch.float32, "cpu"), [0, 0, 0], [[], [], []]
    for counts in chunks:
        new = [row[start:start + count] for row, start, count in zip(rows, begin, counts)]
        logits = tiny(torch.cat(new), lengths=list(counts), kv_cache=cache).split(list(counts))
        for b in range(3):
            pieces[b].append(logits[b])
            begin[b] += counts[b]
    assert cache.lengths.tolist() == begin
    for row, piece in zip(rows, pieces):
        assert torch.allclose(torch.cat(piece), tiny(row), atol=1e-5)


@torch.no_grad()
def test_forked_branches_equal_whole_rows(tiny):
    prefix, other, *ends = ragged([10, 6, 3, 5, 1])
    cache = KVCache(TINY, 2, 10, torch.float32, "cpu")
    tiny(*[pad([prefix, other], "right")[0]], attention_mask=pad([prefix, other], "right")[1], kv_cache=cache)
    fork = cache.select([0, 1, 0], max_len=15)
    input_ids, mask = pad(ends, "right")
    logits = tiny(input_ids, attention_mask=mask, kv_cache=fork)
    for row, begin, end in zip(logits, (prefix, other, prefix), ends):
        assert torch.allclose(row[:len(end)], tiny(torch.cat([begin, end]))[len(begin):], atol=1e-5)
    assert cache.lengths.tolist() == [10, 6] and not logits[~mask].any()


@torch.no_grad()
def test_shapes_dtypes_and_degenerate_batches(tiny):
    config = TINY
    q, k = torch.randn(7, 4, 8), torch.randn(7, 2, 8)
    assert Packed([3, 4])(0, q, k, k).shape == (7, 4, 8)
    assert Packed([3, 4]).position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert tiny.hidden(torch.arange(7), Packed([3, 4])).shape == (7, config.dim)
    cache = KVCache(config, 2, 9, torch.float32, "cpu")
    assert len(cache.k) == 2 and cache.v[1].shape == (2, 2, 9, 8) and cache.lengths.dtype == torch.long
    assert Cached(cache, [5, 2])(0, q, k, k).shape == (7, 4, 8)
    input_ids = torch.stack(ragged([6, 6, 6]))
    mask = torch.tensor([[1] * 6, [0] * 6, [0, 0, 1, 1, 0, 0]]).bool()                   # a row that is all padding
    logits = tiny(input_ids, attention_mask=mask)
    assert logits.isfinite().all() and not logits[1].any()
    assert tiny(input_ids, attention_mask=torch.zeros_like(mask)).abs().sum() == 0
    assert tiny(torch.zeros(0, dtype=torch.long), lengths=[]).shape == (0, 300)
    assert torch.allclose(tiny(input_ids[0]), tiny(input_ids)[0], atol=1e-6)             # flat, one document
    own = tiny(input_ids, position_ids=torch.arange(6).expand(3, 6))
    assert torch.allclose(own, tiny(input_ids), atol=1e-6)
    far = tiny(input_ids, position_ids=torch.arange(6).expand(3, 6) + 40)                # RoPE is relative
    assert torch.allclose(far, own, atol=1e-4)


def test_grouping_wastes_little():
    lengths = torch.randint(1, 500, (200,), generator=torch.Generator().manual_seed(0))
    groups = list(similar_lengths(lengths))
    assert sorted(torch.cat(groups).tolist()) == list(range(200))
    assert sum(len(group) * int(lengths[group].max()) for group in groups) < 1.25 * int(lengths.sum())


def test_checkpointing_gives_the_same_gradients(tiny):
    input_ids, grads = torch.cat(ragged([5, 9])), []
    for tiny.checkpointing in (False, True):
        tiny(input_ids, lengths=[5, 9]).square().sum().backward()
        grads.append([weight.grad.clone() for weight in tiny.parameters()])
        tiny.zero_grad(set_to_none=True)
    tiny.checkpointing = False
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_init_is_reproducible():
    a, b, c = (dict(Llama(PRESETS["demo"]).init_weights(seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a) and "lm_head.weight" not in a
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    assert abs(a["model.embed_tokens.weight"].std() - 0.02) < 1e-3 and (a["model.norm.weight"] == 1).all()


def test_arguments_that_do_not_fit(tiny):
    rows, flat = torch.zeros(2, 4, dtype=torch.long), torch.zeros(6, dtype=torch.long)
    cache = KVCache(TINY, 2, 4, torch.float32, "cpu")
    for args, kwargs, words in [
        (flat, {"lengths": [2, 3]}, "lengths sum to 5"),
        (flat, {"lengths": [6, 0]}, "at least 1"),
        (flat, {"attention_mask": flat}, "flat input_ids"),
        (rows, {"lengths": [4, 4]}, "go with flat"),
        (rows, {"attention_mask": rows[:, :3]}, r"the mask is \(2, 3\)"),
        (rows, {"attention_mask": rows, "segment_ids": rows}, "not both"),
        (rows, {"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]])}, "row 1: document 1 is in 2 pieces"),
        (rows, {"segment_ids": torch.tensor([[3, 4, 4, 3], [1, 1, 2, 2]])}, "row 0: document 3 is in 2 pieces"),
        (rows, {"kv_cache": cache, "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}, "on the right"),
        (flat, {"kv_cache": cache, "lengths": [5, 1]}, "room for 4 tokens"),
        (flat, {"kv_cache": cache, "lengths": [6]}, "the cache has 2 rows"),
    ]:
        with pytest.raises(ValueError, match=words):
            tiny(args, **kwargs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@torch.no_grad()
def test_gpu_equals_cpu(tiny):
    there, rows = copy.deepcopy(tiny).cuda(), ragged([3, 17, 9])
    input_ids, mask = pad(rows, "left")
    logits = there(input_ids.cuda(), attention_mask=mask.cuda()).cpu()
    assert torch.allclose(logits, tiny(input_ids, attention_mask=mask), atol=1e-3)
    prompts = [row.tolist() for row in rows]
    assert generate(there, prompts, max_new_tokens=9, batch_size=2) == generate(tiny, prompts, max_new_tokens=9)


# Sampling


def test_sampled_logprobs_equal_teacher_forcing(tiny):
    prompts = [row.tolist() for row in ragged([2, 11, 5, 5, 20])]
    for how in ({}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 50}):
        tokens, logprobs = generate(tiny, prompts, max_new_tokens=9, batch_size=3, seed=4, return_logprobs=True, **how)
        for prompt, answer, given in zip(prompts, tokens, logprobs):
            with torch.no_grad():
                forced = tiny(torch.tensor(prompt + answer)).log_softmax(-1)[len(prompt) - 1:-1]
            assert torch.allclose(torch.tensor(given), forced.gather(1, torch.tensor(answer)[:, None])[:, 0], atol=1e-4)


def test_an_answer_depends_on_its_own_prompt_and_seed_only(tiny):
    prompts = [row.tolist() for row in ragged([3, 14, 7, 7, 1, 25, 9])]
    how = {"max_new_tokens": 12, "temperature": 1.3, "top_p": 0.95, "eos_ids": tuple(range(40))}
    seeds = [5, 6, 7, 8, 9, 10, 11]
    whole = generate(tiny, prompts, seed=seeds, **how)
    assert len({len(answer) for answer in whole}) > 2                                    # rows stop at different times
    for batch_size in (1, 2, 3, 64):
        assert generate(tiny, prompts, seed=seeds, batch_size=batch_size, **how) == whole
    assert generate(tiny, prompts[::-1], seed=seeds[::-1], **how) == whole[::-1]
    assert [generate(tiny, [prompt], seed=[seed], **how)[0] for prompt, seed in zip(prompts, seeds)] == whole
    same = generate(tiny, [prompts[0]] * 6, seed=0, **how)
    assert len(set(map(tuple, same))) > 1 and same == generate(tiny, [prompts[0]] * 6, seed=0, batch_size=4, **how)
    assert same != generate(tiny, [prompts[0]] * 6, seed=1, **how)
    longer = generate(tiny, prompts, seed=seeds, **(how | {"max_new_tokens": 15}))
    assert [answer[:12] for answer in longer] == whole                                   # a prefix of the longer one


def test_prompts_that_begin_alike_are_read_once_and_answered_as_alone(tiny):
    dice = random.Random()
    for _ in range(5):
        heads = [[dice.randrange(TINY.vocab_size) for _ in range(size)] for size in (30, 12, 50)]
        prompts = [head + [dice.randrange(TINY.vocab_size) for _ in range(dice.randrange(9))] for head in heads for _ in range(5)] + [heads[0]] * 3 + [[3]]
        dice.shuffle(prompts)
        groups = shared_prompts(prompts)
        assert sorted(member for _, members in groups for member in members) == list(range(len(prompts)))
        for stem, members in groups:
            assert len({tuple(prompts[member][:stem]) for member in members}) == 1
            assert all(len(prompts[member]) > stem or len(members) == 1 for member in members)
        read, hook = [], tiny.model.embed_tokens.register_forward_pre_hook(lambda module, args: read.append(len(args[0])))
        how = {"max_new_tokens": 5, "eos_ids": (), "return_logprobs": True, "temperature": 1.0}
        together = generate(tiny, prompts, seed=list(range(len(prompts))), **how)
        hook.remove()
        assert read[0] < 0.6 * sum(map(len, prompts))
        alone = [generate(tiny, [prompt], seed=[k], **how) for k, prompt in enumerate(prompts)]
        assert together[0] == [ids[0] for ids, _ in alone]
        assert torch.allclose(torch.tensor(together[1]), torch.tensor([logprobs[0] for _, logprobs in alone]), atol=1e-4)


def test_every_row_has_its_own_most_tokens(tiny):
    prompts, most = [row.tolist() for row in ragged([4, 9, 6])], [3, 1, 7]
    whole = generate(tiny, prompts, max_new_tokens=7, eos_ids=())
    assert generate(tiny, prompts, max_new_tokens=most, eos_ids=(), batch_size=2) == [answer[:size] for answer, size in zip(whole, most)]
    with pytest.raises(ValueError, match="one per prompt"):
        generate(tiny, prompts, max_new_tokens=[3, 1])


def test_branches_equal_documents_with_a_copy_of_the_stem_each(tiny):
    dice = random.Random()
    trees = [(dice.randint(2, 9), [dice.randint(1, 12) for _ in range(dice.randrange(5))]) for _ in range(6)] + [(3, [4, 4, 4])]
    model, row, documents, places = copy.deepcopy(tiny).double(), [], [], []
    for stem, branches in trees:
        head = [dice.randrange(TINY.vocab_size) for _ in range(stem)]
        at = len(row)
        row += head
        if not branches:
            documents.append(head)
            places += range(at, at + stem)
        for size in branches:
            own = [dice.randrange(TINY.vocab_size) for _ in range(size)]
            documents.append(head + own)
            places += [*range(at, at + stem), *range(len(row), len(row) + size)]
            row += own
    attend = Branched(trees)
    shared = model.hidden(torch.tensor(row), attend)
    plain = model.hidden(torch.tensor([token for document in documents for token in document]), Packed([len(document) for document in documents]))
    assert torch.allclose(shared[places], plain, atol=1e-10)
    assert [row[i] for i in attend.before[torch.tensor(places)].tolist() if i >= 0][:3] == documents[0][:3]
    weights, found = list(model.parameters()), []
    slope = torch.randn_like(plain)
    for hidden in (shared[places], plain):
        found.append(torch.autograd.grad((hidden * slope).sum(), weights, allow_unused=True, retain_graph=True))
    for one, two in zip(*found):                                                         # norms compute in float32
        assert one is two is None or (one - two).abs().max() <= 1e-5 * two.abs().max()


def test_states_at_chosen_rows_are_those_of_all_rows_and_their_gradients_too(tiny):
    dice = random.Random()
    trees = [(dice.randint(1, 9), [dice.randint(1, 12) for _ in range(dice.randrange(4))]) for _ in range(5)]
    size = sum(stem + sum(branches) for stem, branches in trees)
    ids, weights = torch.randint(TINY.vocab_size, (size,)), list(tiny.model.parameters())
    for checkpointing in (False, True):
        tiny.checkpointing = checkpointing
        for rows in (torch.randint(size, (dice.randint(1, 2 * size),)), torch.tensor([], dtype=torch.long)):           # some twice; none
            few, all_of_them = tiny.hidden(ids, attention(trees), rows=rows), tiny.hidden(ids, attention(trees))[rows]
            slope = torch.randn_like(few)
            assert few.shape == (len(rows), TINY.dim) and torch.allclose(few, all_of_them, atol=1e-5)
            for one, two in zip(*(torch.autograd.grad((hidden * slope).sum(), weights) for hidden in (few, all_of_them))):
                assert (one - two).abs().max() <= 1e-4 * two.abs().max()


def test_the_last_block_computes_chosen_rows_only(tiny):
    seen = []
    tiny.model.layers[-1].mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    tiny.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    tiny(torch.arange(20), lengths=[12, 8], logits_at=torch.tensor([11, 19]))
    generate(tiny, [[1, 5, 9], [7, 8]], max_new_tokens=1)
    assert seen == [20, 2, 5, 2]


@pytest.mark.parametrize("together", [1, 8])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_weights_laid_out_for_sampling_serve_alike_and_come_back(dtype, tolerance, together):
    rng = random.Random(5)
    for _ in range(6):
        model = Llama(dataclasses.replace(random_config(rng), vocab_size=321)).init_weights(rng.randrange(99)).to(dtype)
        for name, weight in model.named_parameters():
            weight.data.normal_(0, 0.1) if name.endswith("bias") else None
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        ids = torch.randint(321, (rng.randint(1, 40),))
        with torch.inference_mode():
            plain = model(ids)
            with pytest.raises(RuntimeError, match="inside"), prepacked(model, together):
                with prepacked(model, together):
                    inner = model(ids)
                laid = [module.layout is not None for module in model.modules() if hasattr(module, "layout")]
                freed = not model.model.layers[0].mlp.up_proj.weight.untyped_storage().nbytes()
                again, few, none = model(ids), model(ids[:1]), model(ids, logits_at=ids[:0])
                raise RuntimeError("inside")
        assert all(laid) == any(laid) == freed and none.shape == (0, 321)
        assert freed or together == 1 and dtype == torch.float32 or not torch.backends.mkldnn.is_available() or "AVX" not in torch.backends.cpu.get_cpu_capability()
        assert torch.equal(inner, again) and (inner - plain).abs().max() <= tolerance * plain.abs().max()
        assert (few - plain[:1]).abs().max() <= tolerance * plain.abs().max() and model.lm_head.layout is None
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_sampling_between_forward_and_backward_changes_no_gradient(tiny):
    def gradients(between):
        model = copy.deepcopy(tiny)
        loss = model(torch.arange(5, 25)).logsumexp(-1).sum()
        between(model)
        loss.backward()
        return [weight.grad for weight in model.parameters()]
    sampled = gradients(lambda model: generate(model, [[1, 5, 9]], max_new_tokens=3))
    assert all(torch.equal(a, b) for a, b in zip(gradients(lambda model: None), sampled, strict=True))


def test_swiglu_keeps_its_inputs_only_and_has_the_gradients_of_the_formula():
    torch.manual_seed(random.randrange(1000))
    gate, up = (torch.randn(7, 13, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = SwiGLU.apply(gate, up)
    assert (out - gate * gate.sigmoid() * up).abs().max() < 1e-12 and torch.autograd.gradcheck(SwiGLU.apply, (gate, up))
    assert {tensor.data_ptr() for tensor in out.grad_fn.saved_tensors} == {gate.data_ptr(), up.data_ptr()}


def test_a_branch_turns_as_tokens_behind_a_cached_stem_do(tiny):
    """Dynamic RoPE past the original length: a branch is as long as its stem and itself, the stem as long as it is."""
    dice = random.Random()
    model = grown(tiny)
    stem, ends = [dice.randrange(300) for _ in range(12)], [[dice.randrange(300) for _ in range(size)] for size in (9, 1, 20)]
    with torch.no_grad():
        rows = model.lm_head(model.hidden(torch.tensor(stem + sum(ends, [])), attention([(len(stem), list(map(len, ends)))])))[len(stem):]
        for end, logits in zip(ends, rows.split(list(map(len, ends)))):
            cache = KVCache(model.config, 1, 40, torch.float32, "cpu")
            model(torch.tensor(stem), kv_cache=cache)
            assert torch.allclose(logits, model(torch.tensor(end), kv_cache=cache), atol=1e-4)


def test_long_prompts_under_dynamic_rope_are_answered_as_alone(tiny):
    """There a beginning turns otherwise in each length, so that it cannot be read once for all."""
    dice = random.Random()
    head, model = [dice.randrange(300) for _ in range(14)], grown(tiny)
    prompts = [head + [dice.randrange(300) for _ in range(size)] for size in (1, 6, 15, 15)]
    how = {"max_new_tokens": 4, "eos_ids": (), "return_logprobs": True}
    together, alone = generate(model, prompts, **how), [generate(model, [prompt], **how) for prompt in prompts]
    assert together[0] == [ids[0] for ids, _ in alone]
    assert torch.allclose(torch.tensor(together[1]), torch.tensor([logprobs[0] for _, logprobs in alone]), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[7], [5, 9, 9, 1]])
def test_bfloat16_on_a_cpu_sees_the_past_alone_and_as_float32_does(tiny, lengths):
    model, rows = copy.deepcopy(tiny).bfloat16(), [torch.randint(300, (n,)) for n in lengths]
    logits = model(torch.cat(rows), lengths=lengths)
    assert (logits.float() - tiny(torch.cat(rows), lengths=lengths)).abs().mean() < 0.02 * logits.float().abs().mean()
    changed = [torch.cat([row[:-1], (row[-1:] + 1) % 300]) for row in rows]
    before = torch.cat([torch.arange(n) < n - 1 for n in lengths])
    other = model(torch.cat(changed), lengths=lengths)
    assert torch.equal(other[before], logits[before]) and not torch.equal(other, logits)


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile as a list of the calls to what it has made, which is the plain function."""
    calls = []

    def compile(function, **how):
        return lambda *arguments: calls.append(arguments) or function(*arguments)
    monkeypatch.setattr(torch, "compile", compile)
    return calls


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_compiled_step_says_what_the_plain_one_does(tiny, compiled, batch_size):
    prompts, model = [row.tolist() for row in ragged([3, 14, 7, 7, 1, 25, 9])], copy.deepcopy(tiny)
    how = {"max_new_tokens": 12, "temperature": 1.3, "eos_ids": tuple(range(40)), "seed": 2, "batch_size": batch_size, "return_logprobs": True}
    wanted = generate(model, prompts, **how)
    assert len({len(answer) for answer in wanted[0]}) > 2 and not compiled
    model.compiling = True
    found = generate(model, prompts, **how)
    assert found[0] == wanted[0] and compiled
    shapes = {(len(input_ids), n_keys, even) for _, input_ids, _, _, n_keys, even in compiled}       # each is compiled anew, so there are few
    assert shapes == {({1: 1, 3: 3, 16: 8}[batch_size], 256, False)}
    assert all(one == pytest.approx(two, abs=1e-4) for one, two in zip(found[1], wanted[1]))


def test_eos_is_kept_and_ends_the_row(tiny):
    prompts = [row.tolist() for row in ragged([4] * 20)]
    free = generate(tiny, prompts, max_new_tokens=8, eos_ids=())
    stop = {free[0][2], free[1][5]}
    for answer, full in zip(generate(tiny, prompts, max_new_tokens=8, eos_ids=stop, batch_size=6), free):
        first = next((i for i, token in enumerate(full) if token in stop), 7)
        assert answer == full[:first + 1]
    assert generate(tiny, [], max_new_tokens=3) == [] and len(free[0]) == 8


@pytest.mark.skipif(not torch.backends.mkldnn.is_available() or "AVX" not in torch.backends.cpu.get_cpu_capability(), reason="no other layouts on this machine")
@pytest.mark.parametrize("dtype, prompts, kind", [(torch.float32, 3, "oneDNN"), (torch.float32, 1, "torch"), (torch.bfloat16, 3, "oneDNN"), (torch.bfloat16, 1, "parts")])
def test_what_samples_lays_its_weights_out(tiny, dtype, prompts, kind):
    found, model = set(), copy.deepcopy(tiny).to(dtype)

    def watch(tokens):
        layout = model.model.layers[1].mlp.up_proj.layout
        found.add("torch" if layout is None else "oneDNN" if layout.is_mkldnn else "parts")
    generate(model, [[1, 2, 3]] * prompts, max_new_tokens=3, watch=watch)
    assert found == {kind} and model.model.layers[1].mlp.up_proj.layout is None


def test_progress_and_train_mode(tiny):
    seen = []
    tiny.train()
    generate(tiny, [[1, 2], [3]] * 5, max_new_tokens=3, batch_size=4, progress=seen.append)
    assert tiny.training and sum(seen) == 10 and min(seen) > 0
    with pytest.raises(ValueError):
        generate(tiny, [[1]], max_new_tokens=3, seed=[1, 2])
    tiny.eval()


def test_sample_follows_the_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -30.0]])
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.7), (2.0, 3, 0.8)):
        ids, logprobs = sample(logits.expand(20_000, 5), draws, temperature, top_k, top_p)
        wanted = (logits[0] / temperature).softmax(-1)
        order = wanted.argsort(descending=True)
        keep = order[:top_k or 5]
        kept = wanted[keep] / wanted[keep].sum()
        keep = keep[kept.cumsum(0) - kept < top_p]                                       # the one that crosses is kept
        wanted = torch.zeros(5).scatter(0, keep, wanted[keep])
        assert torch.allclose(ids.bincount(minlength=5) / 20_000, wanted / wanted.sum(), atol=1e-3)
        assert torch.allclose(logprobs, logits.log_softmax(-1)[0, ids], atol=1e-6)
    edge = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    zeros = torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 2)
    assert sample(zeros, edge, 1.0, 0, 1.0)[0].tolist() == [1, 1]                        # never an id of probability 0
    assert sample(logits, edge[:1], 1e-30, 0, 1.0)[0].tolist() == [3]


def test_top_p_and_top_k_equal_transformers():
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(3)) * 3
    draws = torch.rand(50, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    warpers = [transformers.TemperatureLogitsWarper(0.8), transformers.TopKLogitsWarper(12),
               transformers.TopPLogitsWarper(0.85)]
    warped = logits
    for warper in warpers:
        warped = warper(None, warped)
    seen = torch.zeros(50, 40, dtype=torch.bool)
    for column in draws.T:
        seen.scatter_(1, sample(logits, column, 0.8, 12, 0.85)[0][:, None], True)
    assert not (seen & warped.isinf()).any()
    probable = warped.softmax(-1) > 0.03
    assert (seen | ~probable).all()


def test_refused_requests(tiny):
    for prompts, how, words in [
        ([[1], []], {}, "prompt 1 has 0 tokens"),
        ([[1] * 510], {"max_new_tokens": 5}, "prompt 0 has 510 tokens; expected 1 to 507"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0"),
        ([[1]], {"temperature": -1.0}, "temperature -1"),
        ([[1]], {"top_p": 0.0}, "top_p 0"),
        ([[1]], {"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ]:
        with pytest.raises(ValueError, match=words):
            generate(tiny, prompts, **({"max_new_tokens": 4} | how))
    broken = copy.deepcopy(tiny)
    broken.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="non-finite logits"):
        generate(broken, [[1]], max_new_tokens=2)


# Files


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("tied", [False, True])
def test_round_trips_are_bitwise(tied, tmp_path):
    config = ModelConfig(**(vars(TINY) | {"tie_embeddings": tied, "attention_bias": True, "eos_ids": (2, 5),
                                          "prompt_template": "alpaca"}))
    model = sharpened(Llama(config).init_weights(3))
    save_model(model, tmp_path / "a")
    again = load_model(tmp_path / "a")
    assert states_equal(again, model) and again.config == config
    assert all(weight.requires_grad for weight in again.parameters())
    assert ("lm_head.weight" in load_file(tmp_path / "a/model.safetensors")) != tied
    save_model(model, tmp_path / "a", max_shard_bytes=10_000)                            # over the single file
    names = sorted(os.listdir(tmp_path / "a"))
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names and len(names) > 5
    assert not [name for name in names if name.startswith(".")]
    assert states_equal(load_model(tmp_path / "a"), model)
    total = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(weight.nbytes for weight in model.parameters())
    save_model(model, tmp_path / "a", dtype=torch.bfloat16)                              # and back to one
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "a/config.json").read_text())["torch_dtype"] == "bfloat16"
    half = load_model(tmp_path / "a", dtype=torch.bfloat16)
    assert states_equal(half, copy.deepcopy(model).to(torch.bfloat16))
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a/config.json", tmp_path / "b")
    old = dict(model.state_dict()) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(old, tmp_path / "b/pytorch_model.bin")
    assert states_equal(load_model(tmp_path / "b"), model)
    names = list(old)
    shards = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
    for file, part in shards.items():
        torch.save({name: old[name] for name in part}, tmp_path / "b" / file)
    os.remove(tmp_path / "b/pytorch_model.bin")
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "b/pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert states_equal(load_model(tmp_path / "b"), model)


def test_modes_follow_the_umask_and_writes_leave_nothing_behind(tiny, tmp_path):
    before = os.umask(0o027)
    try:
        save_model(tiny, tmp_path)
    finally:
        os.umask(before)
    assert {os.stat(tmp_path / name).st_mode & 0o777 for name in os.listdir(tmp_path)} == {0o640}
    with pytest.raises(ValueError, match="merge adapters"):
        extra = copy.deepcopy(tiny)
        extra.extra = torch.nn.Linear(2, 2)
        save_model(extra, tmp_path)


def test_safetensors_is_preferred(folder, tiny):
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert [file.name for file in weight_files(folder)] == ["model.safetensors"]
    assert states_equal(load_model(folder), tiny)


def rewrite(folder, change):
    """Apply `change` to the dict of tensors in the folder's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refused(folder, words, **how):
    with pytest.raises(ValueError, match=words) as caught:
        load_model(folder, **how)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 + 2 * len(str(folder)), message


@pytest.mark.parametrize("value, how", [(torch.nan, {}), (torch.inf, {}), (-torch.inf, {}), (torch.nan, {"quantize": "int8"}), (torch.inf, {"quantize": "nf4"}),
                                        (7e4, {"dtype": torch.float16}), (torch.nan, {"dtype": torch.bfloat16})])
def test_one_bad_number_in_any_tensor_is_refused_by_name(value, how, folder, record_property):
    good = load_file(folder / "model.safetensors")
    for name, tensor in good.items():
        rewrite(folder, lambda x: x[name].view(-1)[random.randrange(tensor.numel())].fill_(value))
        refused(folder, f"tensor {re.escape(name)} has 1 non-finite values", **how)
        save_file(good, folder / "model.safetensors", {"format": "pt"})
    record_property("trials", len(good))


def test_sentences_about_files(folder, tmp_path):
    name = "model.layers.0.self_attn.k_proj.weight"
    good = (folder / "model.safetensors").read_bytes()
    refused(tmp_path / "nothing", r"no model at .*nothing \(no config.json\). Give a folder in Hugging Face format")
    cases = [
        (lambda x: x.update({name: x[name][:8].clone()}),
         rf"tensor {name} is \(8, 32\) in .*, config.json says \(16, 32\)"),
        (lambda x: x.pop(name), rf"tensor {name} is missing from .* \(1 of 21 are\)"),
        (lambda x: x.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2)}), "layers.9.*has no place in the mod"),
        (lambda x: x[name][3].fill_(torch.nan), rf"tensor {name} has 32 non-finite values \(.*\). The checkpoint is b"),
        (lambda x: x[name][3, 1].fill_(torch.inf), "has 1 non-finite values"),
        (lambda x: x.update({name: x[name].long()}), "is I64, expected F32, F16 or BF16"),
    ]
    for change, words in cases:
        rewrite(folder, change)
        refused(folder, words)
        (folder / "model.safetensors").write_bytes(good)
    rewrite(folder, lambda x: x[name][3, 1].fill_(7e4))
    assert load_model(folder).state_dict()[name][3, 1] == 7e4
    refused(folder, "too large for float16", dtype=torch.float16)
    rewrite(folder, lambda x: x[name][3].fill_(3e38))                                    # finite, though its sum is not
    load_model(folder)
    for damage in (good[:1000], good[:5], b"", good + b"x", b"\xff" * 200):
        (folder / "model.safetensors").write_bytes(damage)
        refused(folder, rf"model.safetensors is damaged or incomplete: .* \(found {len(damage):,} bytes\)")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refused(folder, r'is a Git LFS pointer of \d+ bytes, not weights. Run "git lfs pull" in that folder.')
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights at")
    (folder / "config.json").write_text('{"model_type": "llama",')
    refused(folder, "is not JSON")
    (folder / "config.json").write_text("[" * 100_000)
    refused(folder, "is not JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "is not a JSON object")
    (folder / "config.json").write_text(" " * 2_000_000)
    refused(folder, "2,000,000 bytes")


def test_shards_stay_in_their_folder(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    os.symlink(outside, folder / "link.safetensors")
    index = folder / "model.safetensors.index.json"
    for name in ("../outside.safetensors", str(outside), "a/../../outside.safetensors", "..\\outside.safetensors", "",
                 ".", "..", "link.safetensors", "https://x/y.safetensors", "x\0.safetensors", "x.safetensors\n", 3,
                 None, "x" * 10**6 + ".safetensors", "config.json"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refused(folder, "points outside its folder|is not JSON")
    for text in ("{}", '{"weight_map": []}', '{"weight_map": 1}', '{"weight_map": {"a": ["x"]}}', '{"weight_map": {"a": {}}}'):
        index.write_text(text)
        refused(folder, "points outside its folder")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    refused(folder, "gone.safetensors is missing, though model.safetensors.index.json lists it")
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"             # the Hugging Face cache's way
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copy(outside, blobs / "0123")
    shutil.copy(folder / "config.json", snapshot)
    os.symlink("../../blobs/0123", snapshot / "m.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "m.safetensors"}}))
    load_model(snapshot)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_bin_files_run_nothing(folder, tiny, tmp_path):
    marker, file = tmp_path / "marker", folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(marker)}, file)
    refused(folder, r"contains (posix|nt).system, which is code, not weights. It was not loaded")
    state = dict(tiny.state_dict())
    assert not marker.exists()
    torch.save(state | {"model.norm.weight": torch.ones(1).expand(32)}, file)            # 32 elements in 4 bytes
    refused(folder, "not a plain tensor of floats")
    torch.save(state | {"model.norm.weight": torch.ones(32, device="meta")}, file)
    refused(folder, "not a plain tensor|damaged")
    torch.save(state | {"model.norm.weight": [1.0]}, file)
    refused(folder, "not a plain tensor")
    torch.save(torch.ones(3), file)
    refused(folder, "not a plain tensor")
    torch.save(state | {"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}, file)
    refused(folder, "'model.norm.weight' in .* is torch.float8_e4m3fn, expected float32, float16 or bfloat16")
    torch.save(state, file, _use_new_zipfile_serialization=False)
    refused(folder, "damaged or incomplete")
    torch.save(state, file)
    with zipfile.ZipFile(file) as stored, zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as deflated:
        for entry in stored.namelist():
            deflated.writestr(entry, stored.read(entry))
    shutil.copy(tmp_path / "x", file)
    refused(folder, "is compressed")


# Config


def hf(**changes):
    return {key: value for key, value in (TINY.to_hf() | changes).items() if value is not ...}


def test_config_spellings():
    assert ModelConfig.from_hf(hf()) == TINY
    assert ModelConfig.from_hf({"model_type": "llama"}) == ModelConfig()
    for changes, theta in [
        ({"rope_theta": ...}, 1e4), ({"rope_theta": 1e6}, 1e6), ({"rope_theta": 1000}, 1000.0),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}}, 7.0),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "x", "rope_type": "default"}}, 7.0),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 9.0}}, 7.0),
    ]:
        assert ModelConfig.from_hf(hf(**changes)).rope_theta == theta, changes
    assert ModelConfig.from_hf(hf(head_dim=None, num_key_value_heads=None)).n_kv_heads == 4
    assert ModelConfig.from_hf(hf(head_dim=...)).head_dim == 8
    assert ModelConfig.from_hf(hf(eos_token_id=[2, 7])).eos_ids == (2, 7)
    assert ModelConfig.from_hf(hf(eos_token_id=None, bos_token_id=None)).eos_ids == ()
    assert ModelConfig.from_hf(hf(dtype="bfloat16", torch_dtype=..., pad_token_id=0, unknown={"a": 1})) == TINY
    for window, context in ((None, 512), (512, 512), (4096, 512), (100, 100), (..., 512)):                   # absent: 4096
        config = ModelConfig.from_hf(hf(model_type="mistral", sliding_window=window))
        assert config.context == context and dataclasses.replace(config, sliding_window=None) == TINY
    for config in PRESETS.values():
        assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "gemma"}, "model_type is 'gemma'; only llama and mistral"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"model_type": "mistral", "sliding_window": "100"}, "sliding_window is '100'"),
    ({"rope_scaling": {"type": "longrope", "factor": 2}}, "RoPE scaling 'longrope' is not implemented"),
    ({"rope_scaling": {"rope_type": "llama3", "type": "default"}}, "RoPE scaling 'llama3' lacks 'factor'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": [1]}, "malformed"),
    ({"rope_theta": 1e308}, "rope_theta is 1e\\+308"),
    ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ({"hidden_size": 2**31}, "hidden_size is 2147483648; expected int from 1 to"),
    ({"hidden_size": 32.0}, "hidden_size is 32.0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_attention_heads": 64, "head_dim": None}, "head_dim is 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"vocab_size": 2**40}, "vocab_size"),
    ({"vocab_size": "300"}, "vocab_size is '300'"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"head_dim": 7}, "head_dim is 7; RoPE turns pairs"),
    ({"num_key_value_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"eos_token_id": [2, -1]}, "eos_token_id is"),
    ({"bos_token_id": "1"}, "bos_token_id is '1'"),
])
def test_config_refusals(changes, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_hf(hf(**changes))


def test_an_unknown_rope_is_refused_in_the_constructor():
    with pytest.raises(ValueError, match="not implemented"):
        ModelConfig(rope_scaling={"rope_type": "longrope", "factor": 2.0})
