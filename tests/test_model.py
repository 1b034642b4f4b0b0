"""model.py against transformers, and against itself by another path.

Tolerances are relative to the largest number compared, so larger weights do not loosen them.
"""

import copy
import dataclasses
import json
import math
import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import model as model_file
from model import (
    HF_KEYS,
    Cached,
    KVCache,
    Llama,
    ModelConfig,
    Packed,
    Sampling,
    generate,
    load_model,
    sample,
    save_model,
)

TINY = ModelConfig(vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8,
                   hidden_dim=64, norm_eps=1e-5, context=512)


def sharpened(model, seed=0):
    """Weights larger than at init, so that attention is not uniform and a wrong position shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            weight.normal_(centre, 0.15, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def tiny():
    return sharpened(Llama(TINY))


def random_config(rng):
    n_kv_heads = rng.choice([1, 2, 3])
    n_heads = n_kv_heads * rng.choice([1, 2, 4])
    head_dim = rng.choice([2, 4, 6, 10, 14, 16])
    return ModelConfig(
        vocab_size=rng.randint(20, 400), dim=rng.choice([n_heads * head_dim, 8 * n_heads]),
        n_layers=rng.randint(1, 3), n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
        hidden_dim=rng.randint(8, 70), norm_eps=rng.choice([1e-6, 1e-5]),
        rope_theta=rng.choice([10000.0, 500.0, 1e6]), context=64,
        tie_embeddings=rng.random() < 0.5, attention_bias=rng.random() < 0.5,
        mlp_bias=rng.random() < 0.5)


def twin_of(model, dtype=torch.float32):
    """transformers' model with the same weights."""
    transformers = pytest.importorskip("transformers")
    raw = {theirs: getattr(model.config, ours) for ours, theirs in HF_KEYS.items()}
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).eval()
    missing, surplus = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing and not surplus
    return twin.to(dtype)


def ragged(lengths, vocab_size=300, seed=0):
    """Random token ids, a tensor of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def lists(lengths, **how):
    return [row.tolist() for row in ragged(lengths, **how)]


def packed_logits(model, rows):
    """Logits of rows laid end to end, (N, V)."""
    attend = Packed([len(row) for row in rows])
    return model.lm_head(model.hidden(torch.cat(rows), attend))


def near(found, wanted, tolerance=1e-5):
    """Equal up to a share of the largest number."""
    scale = max(1.0, wanted.abs().max().item())
    return found.shape == wanted.shape and (found - wanted).abs().max() <= tolerance * scale


# ----- transformers -----

@torch.no_grad()
@pytest.mark.parametrize("seed", range(20))
def test_logits_equal_transformers(seed):
    rng = random.Random(seed)
    model = sharpened(Llama(random_config(rng)), seed)
    lengths = [rng.randint(1, 14) for _ in range(4)]
    rows = ragged(lengths, model.config.vocab_size, seed)
    kinds = [(torch.float32, 2e-5), (torch.bfloat16, 0.06), (torch.float16, 0.008)]
    for dtype, tolerance in kinds:
        twin, ours = twin_of(model, dtype), copy.deepcopy(model).to(dtype)
        theirs = torch.cat([twin(row[None]).logits[0] for row in rows])  # (N, V)
        logits = packed_logits(ours, rows)
        assert logits.dtype == dtype and near(logits, theirs, tolerance), dtype


def test_gradients_equal_transformers(tiny):
    model = copy.deepcopy(tiny)
    twin, ids = twin_of(model), torch.stack(ragged([9, 9]))
    model(ids).log_softmax(-1)[..., 7].sum().backward()
    twin(ids).logits.log_softmax(-1)[..., 7].sum().backward()
    theirs = dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        wanted = theirs[name].grad
        assert (weight.grad - wanted).abs().max() < 1e-4 * wanted.abs().max(), name


def test_greedy_continuations_equal_transformers(tiny):
    twin, prompts = twin_of(tiny), lists([1, 3, 8, 17, 30])
    ours = generate(tiny, prompts, Sampling(20), eos_ids=[7, 11], batch_size=3)
    for prompt, answer in zip(prompts, ours, strict=True):
        theirs = twin.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False,
                               eos_token_id=[7, 11], pad_token_id=0)
        assert answer == theirs[0, len(prompt):].tolist()


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_our_folder_and_we_read_theirs(tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, tie_embeddings=tied, attention_bias=True, rope_theta=500.0,
                                 eos_ids=[2, 5])
    model, ids = sharpened(Llama(config), 2), torch.stack(ragged([12]))
    save_model(model, tmp_path / "ours")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert twin.dtype == torch.float32 and near(twin(ids).logits, model(ids))
    assert twin.config.eos_token_id == [2, 5] and twin.config.max_position_embeddings == 512
    twin.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1  # shards
    again = load_model(tmp_path / "theirs")
    assert again.config == model.config and torch.equal(again(ids), model(ids))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


# ----- One model, many paths -----

@torch.no_grad()
def test_packed_equals_separate(tiny):
    lengths = [1, 9, 4, 30, 9, 2, 13]
    rows = ragged(lengths)
    single = torch.cat([tiny(row[None])[0] for row in rows])  # (N, V)
    logits = packed_logits(tiny, rows)
    assert logits.shape == (sum(lengths), 300) and near(logits, single)
    order = [3, 0, 6, 1, 2, 5, 4]
    again = packed_logits(tiny, [rows[i] for i in order]).split([lengths[i] for i in order])
    assert near(torch.cat([again[order.index(i)] for i in range(7)]), single)
    batch = torch.stack([rows[1], rows[4]])
    assert near(tiny(batch), torch.stack([tiny(rows[1][None])[0], tiny(rows[4][None])[0]]))


def test_gradients_of_packed_documents_are_the_sum_of_the_separate_ones(tiny):
    rows, model = ragged([5, 1, 9]), copy.deepcopy(tiny)
    packed_logits(model, rows).logsumexp(-1).sum().backward()
    together = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    for row in rows:
        model(row[None]).logsumexp(-1).sum().backward()
    for one, weight in zip(together, model.parameters(), strict=True):
        assert (one - weight.grad).abs().max() <= 1e-4 * weight.grad.abs().max()


@torch.no_grad()
def test_a_token_sees_the_past_of_its_own_document_only(tiny):
    rows = ragged([7, 6, 5])
    before = packed_logits(tiny, rows)
    rows[1] = rows[1].clone()
    rows[1][3] = (rows[1][3] + 1) % 300
    changed = packed_logits(tiny, rows)
    same = [i for i in range(18) if torch.equal(before[i], changed[i])]
    assert same == [*range(10), *range(13, 18)]


@torch.no_grad()
@pytest.mark.parametrize("chunks", [
    [(5, 3, 8)], [(1, 1, 1)] * 8, [(4, 0, 2), (0, 3, 1), (1, 1, 1), (2, 4, 0)],
    [(2, 2, 2), (3, 0, 6)], [(0, 0, 3), (5, 8, 1)]])
def test_cached_equals_uncached_in_chunks(tiny, chunks):
    rows = ragged([sum(counts) for counts in zip(*chunks, strict=True)])
    cache, begins, pieces = KVCache(tiny, 3, 16), [0, 0, 0], [[], [], []]
    for counts in chunks:
        new = []
        for row, begin, count in zip(rows, begins, counts, strict=True):
            new.append(row[begin:begin + count])
        hidden = tiny.hidden(torch.cat(new), Cached(cache, list(counts)))
        logits = tiny.lm_head(hidden).split(list(counts))
        for b in range(3):
            pieces[b].append(logits[b])
            begins[b] += counts[b]
        assert cache.lengths == begins
    for row, piece in zip(rows, pieces, strict=True):
        assert near(torch.cat(piece), tiny(row[None])[0])


@torch.no_grad()
def test_a_cache_keeps_what_stands_in_its_other_rows(tiny):
    cache = KVCache(tiny, 2, 9)
    tiny.hidden(torch.cat(ragged([4, 6])), Cached(cache, [4, 6]))
    kept = cache.kv[:, :, 1].clone()
    tiny.hidden(torch.tensor([5]), Cached(cache, [1, 0]))
    assert torch.equal(cache.kv[:, :, 1], kept) and cache.lengths == [5, 6]
    assert not cache.kv[:, :, 0, 5:].any()


def test_states_at_chosen_rows_are_those_of_all_rows_and_their_gradients_too(tiny):
    ids, attend = torch.cat(ragged([12, 8])), Packed([12, 8])
    weights, rows = list(tiny.model.parameters()), torch.tensor([11, 3, 3, 19])
    slope, found = torch.randn(4, TINY.dim), []
    for hidden in (tiny.hidden(ids, attend, rows), tiny.hidden(ids, attend)[rows]):
        assert hidden.shape == (4, TINY.dim)
        found.append([hidden, *torch.autograd.grad((hidden * slope).sum(), weights)])
    assert all(near(one, two, 1e-5) for one, two in zip(*found, strict=True))
    assert tiny.hidden(ids, attend, torch.tensor([], dtype=torch.long)).shape == (0, TINY.dim)


@torch.no_grad()
def test_positions_count_from_the_beginning_of_each_document(tiny):
    assert Packed([3, 4]).position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3]
    cache = KVCache(tiny, 2, 9)
    assert Cached(cache, [3, 1]).position_ids.tolist() == [0, 1, 2, 0]
    assert Cached(cache, [0, 2]).position_ids.tolist() == [1, 2]
    q, k = torch.randn(7, 4, 8), torch.randn(7, 2, 8)
    assert Packed([3, 4])(0, q, k, k).shape == (7, 4, 8)
    assert Cached(KVCache(tiny, 2, 9), [5, 2])(0, q, k, k).shape == (7, 4, 8)


@torch.no_grad()
def test_rope_is_relative(tiny):
    row, near_by, far = ragged([9])[0], Packed([9]), Packed([9])
    far.position_ids = far.position_ids + 40
    assert near(tiny.hidden(row, far), tiny.hidden(row, near_by), 1e-4)
    far.position_ids = 2 * near_by.position_ids
    assert not near(tiny.hidden(row, far), tiny.hidden(row, near_by), 1e-2)


def test_rope_angles_by_hand():
    config = dataclasses.replace(TINY, rope_theta=100.0)
    frequencies = [1.0, 100**-0.25, 0.1, 100**-0.75]
    assert config.rope_frequencies("cpu").tolist() == pytest.approx(frequencies, rel=1e-6)
    cos, sin = config.rope_tables(torch.tensor([0, 3, 400]))
    assert cos.shape == sin.shape == (3, 1, 8) and cos.dtype == sin.dtype == torch.float32
    for row, position in enumerate((0, 3, 400)):  # both halves of a head turn alike
        angles = [position * frequency for frequency in frequencies] * 2
        assert cos[row, 0].tolist() == pytest.approx(list(map(math.cos, angles)), abs=1e-4)
        assert sin[row, 0].tolist() == pytest.approx(list(map(math.sin, angles)), abs=1e-4)
    angle = torch.tensor([0.3])
    x = torch.tensor([[[1.0, 2.0]]])  # (1, 1, 2): one pair
    turned = model_file.rotate(x, angle.cos(), angle.sin())[0, 0].tolist()
    c, s = math.cos(0.3), math.sin(0.3)
    assert turned == pytest.approx([c - 2 * s, 2 * c + s], rel=1e-6)


def test_attention_by_hand():
    """Two query heads read one key/value head; softmax of q k / sqrt(Dh), causal."""
    q, k, v = torch.randn(3, 2, 4), torch.randn(3, 1, 4), torch.randn(3, 1, 4)
    found = Packed([3])(0, q, k, v)
    for t in range(3):
        for head in range(2):
            scores = (k[:t + 1, 0] @ q[t, head]) / 2
            wanted = scores.softmax(0) @ v[:t + 1, 0]
            assert near(found[t, head], wanted, 1e-6)


# ----- Sampling -----

def test_an_answer_depends_on_its_own_prompt_and_seed_only(tiny):
    prompts, seeds = lists([3, 14, 7, 7, 1, 25, 9]), [5, 6, 7, 8, 9, 10, 11]
    how = Sampling(12, temperature=1.3, top_p=0.95)
    stop = {"eos_ids": list(range(40))}
    found = generate(tiny, prompts, how, seeds=seeds, **stop)
    assert len({len(answer) for answer in found}) > 2  # rows stop at different times
    for batch_size in (1, 2, 3):
        again = generate(tiny, prompts, how, seeds=seeds, batch_size=batch_size, **stop)
        assert again == found
    assert generate(tiny, prompts[::-1], how, seeds=seeds[::-1], **stop) == found[::-1]
    alone = [generate(tiny, [prompt], how, seeds=[seed], **stop)[0]
             for prompt, seed in zip(prompts, seeds, strict=True)]
    assert alone == found
    longer = generate(tiny, prompts, dataclasses.replace(how, max_new_tokens=15), seeds=seeds,
                      **stop)
    assert [answer[:12] for answer in longer] == found


def test_seeds_decide_and_without_them_every_row_has_its_own(tiny):
    how, prompt = Sampling(8, temperature=1.0), lists([6])
    assert generate(tiny, prompt, how, seeds=[1]) == generate(tiny, prompt, how, seeds=[1])
    assert generate(tiny, prompt, how, seeds=[1]) != generate(tiny, prompt, how, seeds=[2])
    own = generate(tiny, prompt * 6, how)
    assert len(set(map(tuple, own))) == 6 and own == generate(tiny, prompt * 6, how, batch_size=4)


@pytest.mark.parametrize("prompts, most", [([[1, 5, 9], []], 3), ([[1, 5, 9]], 0), ([[1]], -1)])
def test_an_empty_prompt_and_no_new_tokens_are_refused(prompts, most, tiny):
    with pytest.raises(ValueError, match="a prompt is empty, or max_new_tokens below 1"):
        generate(tiny, prompts, Sampling(most))


def test_seeds_are_as_many_as_prompts(tiny):
    with pytest.raises(ValueError):
        generate(tiny, [[1], [2]], Sampling(2, temperature=1.0), seeds=[1])


def test_generation_leaves_torchs_random_state_alone(tiny):
    state = torch.get_rng_state()
    generate(tiny, lists([3]), Sampling(3, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_eos_is_kept_and_ends_the_row(tiny):
    prompts = lists([4] * 20)
    free = generate(tiny, prompts, Sampling(8), eos_ids=[-1])
    stop = [free[0][2], free[1][5]]
    found = generate(tiny, prompts, Sampling(8), eos_ids=stop, batch_size=6)
    for answer, full in zip(found, free, strict=True):
        first = next((i for i, token in enumerate(full) if token in stop), 7)
        assert answer == full[:first + 1]
    assert generate(tiny, [], Sampling(3)) == [] and {len(answer) for answer in free} == {8}


def test_the_configs_eos_ids_are_the_default(tiny):
    prompts = lists([4] * 3)
    free = generate(tiny, prompts, Sampling(6), eos_ids=[-1])
    model = copy.deepcopy(tiny)
    model.config.eos_ids = [free[0][1]]
    cut = free[0].index(free[0][1]) + 1
    assert generate(model, prompts[:1], Sampling(6)) == [free[0][:cut]]


def test_watch_sees_every_token(tiny):
    seen, prompts = [], lists([2, 5, 1])
    found = generate(tiny, prompts, Sampling(4), eos_ids=[-1], batch_size=2,
                     watch=lambda answer: seen.append((answer.prompt, len(answer.tokens),
                                                       answer.done)))
    assert sorted(seen) == sorted((prompt, n, n == 4) for prompt in prompts for n in range(1, 5))
    assert [len(answer) for answer in found] == [4, 4, 4]


@pytest.mark.parametrize("training", [True, False])
def test_answers_are_made_in_eval_mode(tiny, training):
    model, modes = copy.deepcopy(tiny).train(training), []
    model.model.layers[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    generate(model, lists([2]), Sampling(2))
    assert modes == [False, False] and not model.training


def test_sampling_between_forward_and_backward_changes_no_gradient(tiny):
    def gradients(between):
        model = copy.deepcopy(tiny)
        loss = model(torch.arange(5, 25)[None]).logsumexp(-1).sum()
        between(model)
        loss.backward()
        return [weight.grad for weight in model.parameters()]

    plain = gradients(lambda model: None)
    sampled = gradients(lambda model: generate(model, [[1, 5, 9]], Sampling(3)))
    assert all(torch.equal(a, b) for a, b in zip(plain, sampled, strict=True))


def test_a_model_that_was_sampled_from_can_be_trained(tiny):
    model = copy.deepcopy(tiny)
    generate(model, [[1, 5, 9]], Sampling(3))
    model(torch.arange(5)[None]).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_non_finite_logits_are_refused(tiny):
    for value in (torch.nan, torch.inf):
        broken = copy.deepcopy(tiny)
        broken.model.norm.weight.data[3] = value
        with pytest.raises(ValueError, match="the model gave non-finite logits; its weights are"):
            generate(broken, [[1]], Sampling(2))


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.8)])
def test_sample_follows_the_distribution(temperature, top_p):
    logits, n = torch.tensor([0.0, 1.0, 2.0, 3.0, -30.0]), 20_000
    draws = [(i + 0.5) / n for i in range(n)]
    ids = sample(logits.expand(n, 5), draws, Sampling(1, temperature, top_p))
    wanted = (logits / temperature).softmax(-1)
    order = wanted.argsort(descending=True)
    kept = wanted[order]
    keep = order[kept.cumsum(0) - kept < top_p]  # the token that crosses top_p is kept
    wanted = torch.zeros(5).scatter(0, keep, wanted[keep])
    found = torch.tensor(ids).bincount(minlength=5) / n
    assert torch.allclose(found, wanted / wanted.sum(), atol=1e-4)


@pytest.mark.parametrize("trials", [300])
def test_top_p_ends_where_the_kept_tokens_hold_just_that_much(trials):
    """Shares in tenths, top_p a sum of the largest; the old sum in float32 keeps one token more."""
    rng, control, n = np.random.default_rng(0), 0, 200
    draws = [(i + 0.5) / n for i in range(n)]
    for _ in range(trials):
        cuts = np.sort(rng.choice(np.arange(1, 10), 4, replace=False))
        shares = np.diff([0, *cuts, 10]) / 10
        order, k = np.argsort(-shares, kind="stable"), int(rng.integers(1, 5))
        top_p = round(float(shares[order[:k]].sum()), 6)
        logits = torch.tensor(shares).log().float()[None]
        ids = sample(logits.expand(n, -1), draws, Sampling(1, 1.0, top_p))
        assert len(set(ids)) == k
        probs = logits.softmax(-1).sort(descending=True)[0]
        control += int((probs.cumsum(-1) - probs < top_p).sum()) != k
    assert control > 5
    asked = torch.tensor([[0.3, 0.1, 0.1, 0.5]]).log().expand(n, 4)
    assert set(sample(asked, draws, Sampling(1, 1.0, 0.8))) == {0, 3}


def test_sample_at_its_edges():
    certain = torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 2)
    edges = [0.0, 1 - 2**-53]
    for top_p in (1.0, 0.5):  # never an id of probability 0
        assert sample(certain, edges, Sampling(1, 1.0, top_p)) == [1, 1]
    logits = torch.tensor([[0.0, 3.0, 2.9]])
    assert sample(logits, [0.999], Sampling(1, 1e-30)) == [1]
    assert sample(logits, [0.999], Sampling(1, 0.0)) == [1]
    assert sample(logits, [0.999], Sampling(1, 1.0, 1e-6)) == [1]
    assert sample(logits.half() * 1e4, [0.5], Sampling(1, 1.0)) == [1]


PARTLY = [torch.tensor([[2.0, 1.0, 0.5, -1.0]]), torch.tensor([[2.0, *[-torch.inf] * 3]]),
          torch.tensor([[-torch.inf, -torch.inf, 0.5, -torch.inf]])]  # some ids are impossible
ODD = [torch.full((1, 4), value) for value in (torch.nan, torch.inf, -torch.inf)]
ODD += [torch.tensor([[value, 1.0]]) for value in (torch.nan, torch.inf)]
AT_LIMITS = [(logits, how) for logits in PARTLY for how in (
    (0.0, 1.0), (1.0, 1.0), (1e-6, 1.0), (1e30, 1.0), (1e30, 0.9), (1.0, 1e-9), (1e-6, 0.5))]
AT_LIMITS += [(logits, how) for logits in ODD for how in ((0.0, 1.0), (1.0, 0.9))]
AT_LIMITS += [(torch.tensor([[3.0]]), (1.0, 0.1)), (torch.tensor([[3e38, -3e38]]), (1.0, 1.0))]


@pytest.mark.parametrize("logits, how", AT_LIMITS)
def test_sample_gives_a_possible_id_or_a_sentence(logits, how):
    for draw in (0.0, 0.5, 1 - 2**-53):
        if logits.logsumexp(-1).isfinite().all():
            chosen, = sample(logits, [draw], Sampling(1, *how))
            assert logits[0, chosen] > -torch.inf
        else:
            with pytest.raises(ValueError, match="non-finite logits"):
                sample(logits, [draw], Sampling(1, *how))


def test_top_p_equals_transformers():
    transformers = pytest.importorskip("transformers")
    logits, n = torch.randn(20, 40) * 3, 500
    warped = transformers.TemperatureLogitsWarper(0.8)(None, logits)
    wanted = transformers.TopPLogitsWarper(0.85)(None, warped).softmax(-1)
    draws = [(i + 0.5) / n for i in range(n)]
    for row, probabilities in zip(logits, wanted, strict=True):
        ids = sample(row.expand(n, 40), draws, Sampling(1, 0.8, 0.85))
        found = torch.tensor(ids).bincount(minlength=40) / n
        assert (found - probabilities).abs().max() < 1.01 / n + 1e-6
        assert not found[probabilities == 0].any()


def test_uniform_numbers_are_uniform_independent_and_reproducible():
    n = 20_000
    numbers = torch.tensor([model_file.uniform("7,3", step) for step in range(n)])
    others = torch.tensor([model_file.uniform("7,4", step) for step in range(n)])
    assert numbers.min() >= 0 and numbers.max() < 1
    shares = (numbers * 10).long().bincount(minlength=10) / n
    assert (shares - 0.1).abs().max() < 0.01
    both = torch.corrcoef(torch.stack([numbers[1:], numbers[:-1], others[1:]]))
    assert (both - torch.eye(3)).abs().max() < 0.03
    assert model_file.uniform("7,3", 5) == model_file.uniform("7,3", 5) == pytest.approx(
        float(numbers[5]))


def test_a_random_stream_never_changes():
    """Runs are resumed, and records compared, across versions: these numbers are for good."""
    assert model_file.uniform("0,0", 0) == 0.484396524105176
    assert model_file.uniform("12345", 7) == 0.7003229363007146


def test_decoding_yields_the_logits_of_the_whole_text(tiny):
    """What `decode` yields is what the model says of prompt and tokens, without a cache."""
    answers = [model_file.Answer(prompt, 4, "", []) for prompt in lists([3, 9, 1])]
    with torch.inference_mode():
        for logits, batch in tiny.decode(answers, batch_size=2):
            assert len(logits) == len(batch) <= 2
            for row, answer in zip(logits, batch, strict=True):
                ids = torch.tensor([answer.prompt + answer.tokens])
                assert near(row, tiny(ids)[0, -1])
                answer.tokens.append(len(answer.tokens))
                answer.done = len(answer.tokens) == 4 - len(answer.prompt) % 2
    assert [len(answer.tokens) for answer in answers] == [3, 3, 3]


# ----- Files -----

def test_another_head_in_the_file_counts_although_the_config_says_tied(tiny, tmp_path):
    """As in transformers 5; an equal head is tied."""
    ids = torch.randint(0, 300, (2, 9))
    for equal in (False, True):
        if equal:
            tiny.lm_head.weight.data.copy_(tiny.model.embed_tokens.weight)
        save_model(tiny, tmp_path)
        raw = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        again = load_model(tmp_path)
        assert torch.equal(again(ids), tiny(ids)) and again.config.tie_embeddings == equal


@pytest.mark.parametrize("tied", [False, True])
def test_round_trips_are_bitwise(tied, tmp_path):
    config = dataclasses.replace(TINY, tie_embeddings=tied, attention_bias=True, mlp_bias=True,
                                 eos_ids=[2, 5], bos_id=None, prompt_template="alpaca")
    model = sharpened(Llama(config), 3)
    save_model(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    again = load_model(tmp_path)
    assert again.config == config and all(weight.requires_grad for weight in again.parameters())
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_weights_are_saved_and_read_in_the_type_that_is_asked_for(tiny, tmp_path):
    save_model(tiny, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half, rounded = load_model(tmp_path, dtype=torch.bfloat16), load_model(tmp_path)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    for one, two, exact in zip(half.parameters(), rounded.parameters(), tiny.parameters(),
                               strict=True):
        assert torch.equal(one, exact.bfloat16()) and torch.equal(two, exact.bfloat16().float())
    assert {weight.dtype for weight in tiny.parameters()} == {torch.float32}


def test_what_a_config_leaves_out_has_llamas_defaults(tiny, tmp_path):
    save_model(tiny, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_theta", "attention_bias", "mlp_bias", "tie_word_embeddings",
                 "prompt_template", "bos_token_id"):
        del raw[name]
    (tmp_path / "config.json").write_text(json.dumps(raw | {"eos_token_id": 2, "pad_token_id": 0}))
    assert load_model(tmp_path).config == TINY


@pytest.mark.parametrize("change", [
    {"model_type": "mistral"}, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}])  # transformers 5's name
def test_models_that_are_not_plain_llama_are_refused(change, tiny, tmp_path):
    save_model(tiny, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match="is not a plain LLaMA model; reading it takes extras"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["head_dim", "num_key_value_heads"])
def test_older_configs_leave_out_what_follows_from_the_rest(name, tmp_path):
    """LLaMA-1's config.json has neither head_dim nor num_key_value_heads."""
    config = dataclasses.replace(TINY, n_kv_heads=4)
    save_model(Llama(config), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_model(tmp_path).config == config
