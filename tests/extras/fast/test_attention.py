"""extras/fast/attention.py: stems, branches, padded rows and varlen give what copies alone give."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F

from extras.fast import attention as fast_attention
from extras.fast.attention import Branched, padded_rows, put, varlen_serves
from model import Packed


def documented(q, k, v, ends_q, ends_k, longest_q, longest_k, *, window_size, enable_gqa):
    """varlen_attn by its documentation: a segment's last query sees all keys, and so on back."""
    assert window_size == (-1, 0) and enable_gqa
    assert ends_q.dtype == ends_k.dtype == torch.int32 and ends_q[0] == ends_k[0] == 0
    assert longest_q == ends_q.diff().max() and longest_k == ends_k.diff().max()
    assert ends_q[-1] == len(q) and ends_k[-1] == len(k) == len(v)
    assert type(longest_q) is int and q.dtype == k.dtype == v.dtype
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    out, ends_q, ends_k = [], ends_q.tolist(), ends_k.tolist()
    for row in range(len(ends_q) - 1):
        queries, keys = slice(*ends_q[row:row + 2]), slice(*ends_k[row:row + 2])
        T, S = queries.stop - queries.start, keys.stop - keys.start
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        own = (x.transpose(0, 1) for x in (q[queries], k[keys], v[keys]))
        part = F.scaled_dot_product_attention(*own, attn_mask=seen, enable_gqa=True)
        out.append(part.transpose(0, 1))
    return torch.cat(out)


def random_qkv(n, dtype=torch.float64, device="cpu", size=8):
    return [torch.randn(n, heads, size, dtype=dtype, device=device, requires_grad=True)
            for heads in (4, 2, 2)]


def values_and_slopes(attend, qkv, weight):
    out = attend(0, *qkv)
    return (out, *torch.autograd.grad((out.float() * weight).sum(), qkv))


def test_positions_and_what_each_token_follows():
    attend = Branched([(2, [[7, 8, 9], [7, 8, 4, 5]]), (0, [[6, 6], [3]])])
    assert attend.input_ids == [7, 8, 9, 4, 5, 6, 6, 3]
    assert attend.tokens == [[0, 1, 2], [0, 1, 3, 4], [5, 6], [7]]
    assert attend.position_ids.tolist() == [0, 1, 2, 2, 3, 0, 1, 0]
    assert attend.before[[1, 2, 3, 4, 6]].tolist() == [0, 1, 1, 3, 5]
    assert attend(0, *random_qkv(8)).shape == (8, 4, 8)


@pytest.mark.parametrize("number", range(10))
def test_documents_that_share_a_stem_equal_documents_with_a_copy_each(number, fast, random_groups):
    groups, model = random_groups(longest=12), copy.deepcopy(fast).double()
    attend = Branched(groups)
    documents = [ids for _, rows in groups for ids in rows]
    flat = torch.tensor([token for ids in documents for token in ids])
    hidden = model.hidden(flat, Packed([len(ids) for ids in documents]))
    places = torch.tensor([token for tokens in attend.tokens for token in tokens])
    shared = model.hidden(torch.tensor(attend.input_ids), attend)[places]
    assert torch.allclose(shared, hidden, atol=1e-10)
    slope, found = torch.randn_like(hidden), []
    for states in (shared, hidden):
        weights = list(model.model.parameters())
        found.append(torch.autograd.grad((states * slope).sum(), weights))
    for one, two in zip(*found, strict=True):  # norms compute in float32
        assert (one - two).abs().max() <= 1e-5 * two.abs().max()


@pytest.mark.parametrize("number", range(10))
def test_varlen_attention_is_that_in_padded_rows(number, random_groups, monkeypatch):
    groups = random_groups() if number else [(5, [[1] * 8, [1] * 9]), (0, [[1] * 2])]
    found, attend = [], Branched(groups)
    qkv, weight = random_qkv(len(attend.input_ids)), torch.randn(len(attend.input_ids), 4, 8)
    monkeypatch.setattr(fast_attention, "varlen_attn", documented)
    for serves in (False, True):
        monkeypatch.setattr(fast_attention, "varlen_serves", lambda v, serves=serves: serves)
        found.append(values_and_slopes(attend, qkv, weight))
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(*found, strict=True))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-12)


@pytest.mark.parametrize("serves", [False, True])
@pytest.mark.parametrize("groups", [[(5, [[1] * 8, [1] * 9]), (0, [[1, 2]])],
                                    [(0, [[1] * 5, [1] * 3, [1] * 9])]])
def test_indices_made_in_inference_mode_serve_a_pass_with_gradients(groups, serves, fast,
                                                                    monkeypatch):
    monkeypatch.setattr(fast_attention, "varlen_attn", documented)
    monkeypatch.setattr(fast_attention, "varlen_serves", lambda v: serves)
    attend = Branched(groups)
    ids = torch.tensor(attend.input_ids)
    with torch.inference_mode():
        expected = fast.hidden(ids, attend)
    found = fast.hidden(ids, attend)
    found.sum().backward()
    assert torch.equal(found, expected)
    assert fast.model.layers[0].self_attn.q_proj.weight.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[7], [5, 9, 9, 1]])
def test_bfloat16_on_a_cpu_sees_the_past_alone_and_as_float32_does(fast, lengths):
    half = copy.deepcopy(fast).bfloat16()
    rows = [torch.randint(300, (n,)) for n in lengths]
    attend = Branched([(0, [row.tolist() for row in rows])])
    states = half.hidden(torch.cat(rows), attend)
    exact = fast.hidden(torch.cat(rows), attend)
    assert (states.float() - exact).abs().mean() < 0.02 * exact.abs().mean()
    changed = [torch.cat([row[:-1], (row[-1:] + 1) % 300]) for row in rows]
    before = torch.cat([torch.arange(n) < n - 1 for n in lengths])
    other = half.hidden(torch.cat(changed), attend)
    assert torch.equal(other[before], states[before]) and not torch.equal(other, states)


@pytest.mark.parametrize("number", range(4))
def test_bfloat16_branches_on_a_cpu_are_those_of_float32(number, random_groups):
    attend = Branched(random_groups())
    qkv, weight = random_qkv(len(attend.input_ids), torch.float32), torch.randn(1)
    half = [x.detach().bfloat16().requires_grad_() for x in qkv]
    found = values_and_slopes(attend, half, weight)
    expected = values_and_slopes(attend, qkv, weight)
    for one, two in zip(found, expected, strict=True):
        assert (one.float() - two).norm() < 0.03 * two.norm() + 1e-3


def test_padded_rows_waste_little():
    dice, begin, segments = random.Random(0), 0, []
    for _ in range(200):
        segments.append((begin, dice.randint(1, 500), None, None))
        begin += segments[-1][1]
    segments = [fast_attention.Segment(*segment) for segment in segments]
    rows = list(padded_rows(segments))
    real = torch.cat([tokens[is_real] for tokens, is_real in rows])
    assert sorted(real.tolist()) == list(range(begin))
    assert sum(tokens.numel() for tokens, _ in rows) < 1.25 * begin


def test_varlen_attn_serves_16_bits_on_a_gpu_that_has_it(monkeypatch):
    half = torch.zeros(3, 2, 64, dtype=torch.bfloat16)
    assert not varlen_serves(half)  # on a CPU
    monkeypatch.setattr(fast_attention, "on_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert varlen_serves(half) and varlen_serves(torch.zeros(3, 2, 128, dtype=torch.float16))
    for odd in (torch.zeros(3, 2, 64), torch.zeros(3, 2, 12).half(), torch.zeros(3, 2, 256).half()):
        assert not varlen_serves(odd)
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")
        assert not varlen_serves(half)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not varlen_serves(half)


def test_tensors_go_to_a_gpu_from_pinned_memory():
    class Tensor:
        def __init__(self, pinned=False):
            self.pinned = pinned

        def pin_memory(self):
            return Tensor(pinned=True)

        def to(self, device, non_blocking=False):
            return self.pinned, device, non_blocking
    assert put(Tensor(), "cuda:1") == (True, "cuda:1", True)
    assert put(Tensor(), "cpu") == (False, "cpu", False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("number", range(10))
def test_on_a_gpu_varlen_attention_is_that_in_padded_rows(number, random_groups, monkeypatch):
    attend, found = Branched(random_groups(), "cuda"), []
    qkv = random_qkv(len(attend.input_ids), torch.bfloat16, "cuda", 64)
    for serves in (True, False):
        monkeypatch.setattr(fast_attention, "varlen_serves", lambda v, serves=serves: serves)
        found.append(values_and_slopes(attend, qkv, 1.0))
    assert all(torch.allclose(*pair, atol=0.03, rtol=0.03) for pair in zip(*found, strict=True))
