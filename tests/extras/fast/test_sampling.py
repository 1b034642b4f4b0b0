"""extras/fast/sampling.py: the course's own responses, from refilled rows and shared prompts."""

import contextlib
import copy
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from extras.fast import accelerate, attention, sampling
from extras.fast.sampling import Rows, group_prompts
from model import Answer, Sampling, generate


def ragged(lengths, seed=0):
    dice = random.Random(seed)
    return [[dice.randrange(300) for _ in range(length)] for length in lengths]


def record_logits(model, prompts, temperature=1.0, batch_size=3, most=9):
    """Responses as `generate` makes them, and the logits that each token was drawn from."""
    found, decode = {}, type(model).decode

    def recorded(answers, batch_size):
        for logits, batch in decode(model, answers, batch_size):
            for answer, row in zip(batch, logits, strict=True):
                found.setdefault(answer.stream, []).append(row.clone())
            yield logits, batch
    model.decode = recorded
    made = generate(model, prompts, Sampling(most, temperature), batch_size=batch_size)
    del model.decode
    return made, [torch.stack(found[f"0,{k}"]) for k in range(len(prompts))]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize("sampled", [Sampling(12), Sampling(12, 1.3, 0.95)])
def test_responses_are_those_of_the_plain_model(plain, fast, sampled, batch_size):
    prompts, seeds = ragged([3, 14, 7, 7, 1, 25, 9]), list(range(7))
    how = {"seeds": seeds, "eos_ids": list(range(40))}
    expected = generate(plain, prompts, sampled, **how)
    assert len({len(tokens) for tokens in expected}) > 2 or sampled.temperature == 0
    assert generate(fast, prompts, sampled, batch_size=batch_size, **how) == expected
    backwards = generate(fast, prompts[::-1], sampled, seeds=seeds[::-1], eos_ids=how["eos_ids"],
                         batch_size=batch_size)
    assert backwards[::-1] == expected


def test_logits_are_those_of_the_whole_text(plain, fast):
    prompts = ragged([2, 11, 5, 5, 20])
    for prompt, tokens, logits in zip(prompts, *record_logits(fast, prompts), strict=True):
        with torch.no_grad():
            expected = plain(torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1:]
        assert torch.allclose(logits, expected, atol=1e-4)


def test_every_answer_gets_one_token_before_the_next_are_asked_for(fast):
    answers, steps = [Answer(prompt, 4, str(k), []) for k, prompt in enumerate(ragged([4] * 6))], 0
    with torch.inference_mode():
        for logits, batch in fast.decode(answers, 4):
            assert len(logits) == len(batch) and not any(answer.done for answer in batch)
            for answer in batch:
                answer.tokens.append(7)
                answer.done = len(answer.tokens) == answer.most
            steps += 1
    assert all(answer.tokens == [7] * 4 for answer in answers) and steps == 8
    assert list(fast.decode([], 4)) == []


def test_prompts_that_begin_alike_are_read_once_and_answered_as_alone(fast):
    dice = random.Random()
    for _ in range(3):
        heads = ragged([30, 12, 50], dice.random())
        prompts = [head + ragged([dice.randrange(9)], dice.random())[0]
                   for head in heads for _ in range(5)] + [heads[0]] * 3 + [[3]]
        dice.shuffle(prompts)
        groups = group_prompts(prompts)
        members = [member for _, group in groups for member in group]
        assert sorted(members) == list(range(len(prompts)))
        for stem, group in groups:
            assert len({tuple(prompts[member][:stem]) for member in group}) == 1
            assert all(len(prompts[member]) > stem for member in group)
        read, embed = [], fast.model.embed_tokens
        hook = embed.register_forward_pre_hook(lambda module, given, read=read: read.append(given))
        together = record_logits(fast, prompts, batch_size=64, most=5)
        hook.remove()
        assert len(read[0][0]) < 0.6 * sum(map(len, prompts))
        for k, prompt in enumerate(prompts):
            seeds = [f"0,{k}"]
            assert generate(fast, [prompt], Sampling(5, 1.0), seeds=seeds) == [together[0][k]]


def test_a_reader_that_fails_leaves_the_model_as_it_was(fast):
    before, broken = copy.deepcopy(fast.state_dict()), copy.deepcopy(fast)
    broken.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="non-finite"):
        generate(broken, [[1, 2], [3]], Sampling(2))
    assert broken.model.layers[0].mlp.up_proj.weight.abs().sum() > 0

    def stop(answer):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        generate(fast, [[1, 2], [3]], Sampling(2), watch=stop)
    after = fast.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_sampling_between_forward_and_backward_changes_no_gradient(fast):
    def slopes(between):
        model = copy.deepcopy(fast)
        row, attend = model.lay_out([{"documents": [{"input_ids": list(range(5, 25)),
                                                     "labels": [-100] * 20}]}])
        loss = model.lm_head(model.hidden(torch.tensor(row["input_ids"]), attend)).logsumexp(-1)
        between(model)
        loss.sum().backward()
        return [weight.grad for weight in model.parameters()]
    sampled = slopes(lambda model: generate(model, [[1, 5, 9], [4]], Sampling(3)))
    untouched = slopes(lambda model: None)
    assert all(torch.equal(*pair) for pair in zip(untouched, sampled, strict=True))


# ----- CUDA graphs, without a GPU -----

class Recorded(TorchDispatchMode):
    """A CUDA graph, in what it remembers: operations and their tensors, no number, no Python."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert function not in reads, f"{function} cannot be captured"
        out = function(*arguments, **(named or {}))
        self.calls.append((function, arguments, named or {}, out))
        return out

    def replay(self):
        """Once more, into the same memory."""
        for function, given, named, out in self.calls:
            again = function(*given, **named)
            olds, news = (x if isinstance(x, (list, tuple)) else [x] for x in (out, again))
            for old, new in zip(olds, news, strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self):
        return "pool"


@pytest.fixture
def graphs(monkeypatch):
    """As if there were a GPU, whose CUDA graphs are `Recorded`: those that were made."""
    made, waits = [], []
    sampling.recording_stream.cache_clear()

    class Stream:
        def __init__(self, device=None):
            self.aside = device is not None

        def wait_stream(self, other):
            waits.append((self.aside, other.aside))

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert pool == ("pool" if made else None)  # they share their memory
        assert stream is sampling.recording_stream(torch.device("cpu"))
        made.append(graph)
        # the warm-up begins behind what went before, and the rest behind it
        assert waits[-2:] == [(True, False), (False, True)]
        with graph:
            yield
    fakes = {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Recorded, "graph": capture,
             "stream": lambda stream: contextlib.nullcontext(),
             "device": lambda device: contextlib.nullcontext()}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for place in (sampling, attention):
        monkeypatch.setattr(place, "on_gpu", lambda device: True)
        monkeypatch.setattr(place, "put", lambda x, device: x.clone())
    monkeypatch.setattr(attention, "varlen_serves", lambda v: False)
    yield made
    sampling.recording_stream.cache_clear()


@pytest.mark.parametrize("most", [40, 300])
def test_graphs_say_what_the_plain_step_says(most, fast, graphs, monkeypatch):
    """Also beyond the places of the first graph."""
    prompts, eos = ragged([3, 40, 17, 1, 25, 9, 9, 30, 12]), list(range(25))
    how = {"seeds": list(range(9)), "eos_ids": eos if most == 40 else [], "batch_size": 5}
    found, shapes = generate(fast, prompts, Sampling(most, 1.0), **how), len(graphs)
    monkeypatch.setattr(sampling, "on_gpu", lambda device: False)
    assert found == generate(fast, prompts, Sampling(most, 1.0), **how)
    assert shapes == len(graphs) and 2 <= shapes <= 8
    assert all(len(graph.calls) > 20 for graph in graphs)


def test_a_graph_is_recorded_once_for_each_power_of_two(fast, graphs):
    rows = Rows(fast, 6, 500)
    with torch.inference_mode():
        for live, longest, expected in (
                (1, 0, (1, 256)), (3, 255, (4, 256)), (4, 10, (4, 256)), (5, 256, (6, 500)),
                (6, 499, (6, 500)), (3, 256, (4, 500))):
            rows.lengths[:] = [longest] * live + [0] * (6 - live)
            assert rows.step(list(range(live))).shape == (live, 300)
            assert expected in rows.graphs
            assert rows.lengths == [longest + 1] * live + [0] * (6 - live)
    assert set(rows.graphs) == {(1, 256), (4, 256), (6, 500), (4, 500)} and len(graphs) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_responses_are_those_of_the_cpu(fast):
    prompts = ragged([3, 40, 17, 1, 25, 9, 9, 30, 12])
    expected = record_logits(fast, prompts, batch_size=5, most=30)
    found = record_logits(accelerate(copy.deepcopy(fast).cuda()), prompts, batch_size=5, most=30)
    assert found[0] == expected[0]
    for one, two in zip(found[1], expected[1], strict=True):
        assert torch.allclose(one.cpu(), two, atol=1e-3)
