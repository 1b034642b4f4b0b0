"""extras/fast/check.py: it says nothing at home, one line elsewhere, and finds each broken part."""

import platform

import pytest
import torch

from extras.fast import attention, check, cpu, head, quant, sampling
from extras.fast.check import check_once
from extras.fast.cpu import FastLinear
from extras.fast.llama import FastBlock, FastLlama


@pytest.fixture
def elsewhere(monkeypatch):
    """As if the CPU were of a kind on which the fast code has not run before."""
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    check_once.cache_clear()
    yield
    check_once.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_line_elsewhere_once_and_none_at_home(dtype, elsewhere, monkeypatch, capsys):
    numbers = torch.get_rng_state()
    check_once("cpu", dtype)
    expected = "fast code checked against the plain code on riscv64: 11 parts agree\n"
    assert capsys.readouterr().out == expected
    check_once("cpu", dtype)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    check_once(torch.device("cpu"), torch.float64)
    assert not capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), numbers)  # the run's own random numbers are untouched


def wrong(function, factor=1.5):
    """The function, whose result (or its first part) is too large."""
    def larger(*given, **named):
        out = function(*given, **named)
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor
    return larger


def positions_from_zero(self, *given, init=attention.Branched.__init__):
    init(self, *given)
    for segment in self.segments:
        own = torch.arange(segment.size)
        self.position_ids[segment.begin:segment.begin + segment.size] = own


def forgets_the_last(self, rows, position_ids, n_keys, init=sampling.Step.__init__):
    init(self, rows, position_ids, n_keys)
    if self.mask is not None:  # one row needs none
        self.mask[..., :4] = float("-inf")


def moves_nothing(self, source, target):
    self.lengths[target] = self.lengths[source]


def drops_the_gradient(ctx, *slopes, backward=head.HeadLogprobs.backward):
    return (backward(ctx, *slopes)[0] * 0.5, None, None, None)


def wrong_when_recomputed(self, x, *given, forward=FastBlock.forward):
    in_backward = torch._C._current_graph_task_id() >= 0
    return forward(self, x + in_backward, *given)


def wrong_for_one_row(self, rows, n_keys, compute=sampling.Rows.compute):
    return compute(self, rows, n_keys) * (1.5 if len(self.lengths) == 1 else 1)


BROKEN = {  # what is broken: (where, name, by what, the part that the message names)
    "branches": (attention.Branched, "__init__", positions_from_zero, "log-probabilities"),
    "stems": (attention, "attend_beyond", wrong(attention.attend_beyond, 3), "log-probabilities"),
    "head": (FastLlama, "fused_logprobs", wrong(FastLlama.fused_logprobs), "log-probabilities"),
    "gradient": (head.HeadLogprobs, "backward", staticmethod(drops_the_gradient), "gradients"),
    "documents": (attention, "attend_causally", wrong(attention.attend_causally, 3),
                  "(log-probabilities|gradients)"),
    "blocks": (FastBlock, "forward", wrong_when_recomputed, "gradients of recomputed blocks"),
    "joined": (FastBlock, "forward_joined", wrong(FastBlock.forward_joined),
               "logits of greedy responses"),
    "one row": (sampling.Rows, "compute", wrong_for_one_row, "logits of single responses"),
    "products": (cpu, "multiply", wrong(cpu.multiply, 3),
                 "(log-probabilities|logits of greedy responses)"),
    "step": (sampling.Step, "__init__", forgets_the_last, "logits of greedy responses"),
    "rows": (sampling.Rows, "move", moves_nothing, "logits of greedy responses"),
    "keywords": (FastLlama, "keyword_logprobs",
                 lambda self, *given, **named: [(-1.0, -2.0)] * len(given[1]),
                 "log-probabilities of keywords"),
    "int8": (quant, "from_int8", None, "int8 products"),
    "nf4": (quant.QuantLinear, "dequantize", None, "nf4 products"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_part_is_named(name, dtype, elsewhere, monkeypatch):
    where, attribute, broken, part = BROKEN[name]
    if where is cpu and not cpu.packs(FastLinear(8, 8, dtype=dtype)):
        pytest.skip("torch's own products serve on this machine")
    if name in ("int8", "nf4"):
        encode, decode = quant.QUANTIZERS[name]
        monkeypatch.setitem(quant.QUANTIZERS, name, (encode, wrong(decode)))
        # torch's own kernel reads the codes, so that few rows stay right
    else:
        monkeypatch.setattr(where, attribute, broken)
    words = rf"the fast code's {part} differ from the plain code's by .* on riscv64 .*--plain"
    with pytest.raises(RuntimeError, match=words) as caught:
        check_once("cpu", dtype)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_none_differ(elsewhere, monkeypatch):
    nowhere = wrong(FastLlama.fused_logprobs, float("nan"))
    monkeypatch.setattr(FastLlama, "fused_logprobs", nowhere)
    with pytest.raises(RuntimeError, match="log-probabilities differ"):
        check_once("cpu", torch.float32)


def test_numbers_that_are_none_in_sampling_are_the_fast_code_s(elsewhere, monkeypatch):
    nowhere = wrong(sampling.Rows.compute, float("nan"))
    monkeypatch.setattr(sampling.Rows, "compute", nowhere)
    with pytest.raises(RuntimeError, match="the fast code's logits of greedy responses differ"):
        check_once("cpu", torch.float32)


def test_every_type_of_weights_has_a_tolerance():
    assert set(check.TOLERANCES) == {torch.float32, torch.float16, torch.bfloat16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_both_codes_agree(dtype, capsys):
    check_once.__wrapped__("cuda", dtype)
    assert "11 parts agree" in capsys.readouterr().out
