"""What a GPU would do, checked without one; with one, the last tests run on it.

Numbers: torch's varlen_attn and CUDA graphs are replaced by what their documentation says they do. Places: stages and evaluation run on a second
device, which is the CPU under another name, but no operation takes tensors of both, and what is read back from it is counted.
"""
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import random
import sys
import traceback

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import data
import eval as evaluation
import lora
import model as modeling
import train
from model import PRESETS, Branched, KVCache, Llama, OneToken, Packed, Segments, generate
from tests.test_train import JUDGED, arguments, judged, planted, world       # noqa: F401

TINY = PRESETS["tiny"]


# Attention -----------------------------------------------------------------------------------------------------------


def documented(q, k, v, ends_q, ends_k, longest_q, longest_k, *, window_size, enable_gqa):
    """varlen_attn as documented: each segment's last query sees all of its keys, the one before one less, and so on."""
    assert window_size == (-1, 0) and enable_gqa and ends_q.dtype == ends_k.dtype == torch.int32 and ends_q[0] == ends_k[0] == 0
    assert longest_q == ends_q.diff().max() and longest_k == ends_k.diff().max() and ends_q[-1] == len(q) and ends_k[-1] == len(k) == len(v)
    assert type(longest_q) is int and all(x.stride(-1) == 1 for x in (q, k, v)) and q.dtype == k.dtype == v.dtype
    out, ends_q, ends_k = [], ends_q.tolist(), ends_k.tolist()
    for q_begin, q_end, k_begin, k_end in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        seen = torch.ones(q_end - q_begin, k_end - k_begin, dtype=torch.bool, device=q.device).tril(k_end - k_begin - (q_end - q_begin))
        own = (x.transpose(0, 1) for x in (q[q_begin:q_end], k[k_begin:k_end], v[k_begin:k_end]))
        out.append(F.scaled_dot_product_attention(*own, attn_mask=seen, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


def some_trees(dice):
    """Documents, of which some branch."""
    return [(dice.randint(1, 9), [dice.randint(1, 7) for _ in range(dice.choice([0, 0, 1, 4]))]) for _ in range(dice.randint(1, 6))]


@pytest.mark.parametrize("number", range(20))
def test_attention_in_segments_is_that_in_padded_rows(number, monkeypatch):
    """Values and gradients, for documents that share their beginnings and for those that do not."""
    dice = random.Random()
    trees = some_trees(dice) if number else [(5, [3, 4]), (2, []), (1, [1, 6])]
    attend = Branched(trees) if number % 2 == 0 else Packed([stem for stem, _ in trees])
    N = len(attend.position_ids)
    q, k, v = (torch.randn(N, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    found, weight = [], torch.randn(N, 4, 8)
    for serves in (False, True):
        monkeypatch.setattr(modeling, "varlen_attn", documented)
        monkeypatch.setattr(Segments, "serve", lambda v, serves=serves: serves)
        out = attend(0, q, k, v)
        found.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    assert all(torch.allclose(one, two, atol=1e-12) for one, two in zip(*found)), trees


def test_tensors_go_to_a_gpu_from_pinned_memory():
    class Tensor:
        def __init__(self, pinned=False):
            self.pinned = pinned

        def pin_memory(self):
            return Tensor(pinned=True)

        def to(self, device, non_blocking=False):
            return self.pinned, device, non_blocking
    assert modeling.put(Tensor(), "cuda:1") == (True, "cuda:1", True) and modeling.put(Tensor(), "cpu") == (False, "cpu", False)


@pytest.mark.parametrize("serves", [False, True])
@pytest.mark.parametrize("trees", [[(5, [3, 4]), (2, [])], [(5, []), (3, []), (9, [])]])
def test_attention_first_used_without_gradients_serves_with_them(trees, serves, monkeypatch):
    monkeypatch.setattr(modeling, "varlen_attn", documented)
    monkeypatch.setattr(Segments, "serve", lambda v: serves)
    attend, model = modeling.attention(trees), Llama(TINY).init_weights(0)
    ids = torch.arange(len(attend.position_ids))
    with torch.inference_mode():
        wanted = model.hidden(ids, attend)
    found = model.hidden(ids, attend)
    found.sum().backward()
    assert torch.equal(found, wanted) and model.model.layers[0].self_attn.q_proj.weight.grad.any()


def test_varlen_attn_serves_16_bits_on_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(modeling, "on_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert Segments.serve(torch.zeros(3, 2, 64, dtype=torch.bfloat16)) and Segments.serve(torch.zeros(3, 2, 128, dtype=torch.float16))
    assert not any(map(Segments.serve, (torch.zeros(3, 2, 64), torch.zeros(3, 2, 12).half(), torch.zeros(3, 2, 256).half())))
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")
        assert not Segments.serve(torch.zeros(3, 2, 64, dtype=torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not Segments.serve(torch.zeros(3, 2, 64, dtype=torch.float16))
    monkeypatch.undo()
    assert not Segments.serve(torch.zeros(3, 2, 64, dtype=torch.bfloat16))           # on a CPU


# CUDA graphs ---------------------------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """A CUDA graph, in what it remembers: operations and the tensors they read and write, but no number and no Python."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), f"{function} cannot be captured"
        out = function(*arguments, **(named or {}))
        self.calls.append((function, arguments, named or {}, out))
        return out

    def replay(self):
        """Once more, into the same memory."""
        for function, given, named, out in self.calls:
            again = function(*given, **named)
            pairs = zip(out if isinstance(out, (list, tuple)) else [out], again if isinstance(again, (list, tuple)) else [again])
            for old, new in pairs:
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self):
        return "pool"


@pytest.fixture
def graphs(monkeypatch):
    """As if there were a GPU, whose CUDA graphs are `Recorded`: those that were made."""
    made, waits = [], []
    modeling.recording_stream.cache_clear()

    class Stream:
        def __init__(self, device=None):
            self.aside = device is not None

        def wait_stream(self, other):
            waits.append((self.aside, other.aside))

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert pool == ("pool" if made else None) and stream is modeling.recording_stream(torch.device("cpu"))       # they share their memory
        made.append(graph)
        assert waits[-2:] == [(True, False), (False, True)]          # the warm-up begins behind what went before, and the rest behind it
        with graph:
            yield
    for name, value in {"Stream": Stream, "current_stream": Stream, "stream": lambda stream: contextlib.nullcontext(), "device": lambda device: contextlib.nullcontext(), "CUDAGraph": Recorded, "graph": capture}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(modeling, "on_gpu", lambda device: True)
    monkeypatch.setattr(modeling, "put", lambda x, device: x.clone())
    monkeypatch.setattr(Segments, "serve", lambda v: False)
    return made


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("scaling, longest", [(None, 300), ({"rope_type": "dynamic", "factor": 4.0}, 40), ({"rope_type": "yarn", "factor": 4.0}, 40)])
def test_graphs_say_what_the_plain_step_says(scaling, longest, compiling, graphs, monkeypatch):
    """Also beyond the places of the first graph, and beyond the length from which dynamic scaling grows."""
    dice, config = random.Random(), dataclasses.replace(TINY, rope_scaling=scaling, max_position_embeddings=32 if scaling else 512)
    model = Llama(config).init_weights(0).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    prompts = [[dice.randrange(300) for _ in range(dice.randint(1, 40))] for _ in range(9)]
    how = {"max_new_tokens": [dice.randint(1, 40) for _ in range(8)] + [longest], "temperature": 1.0, "eos_ids": (), "seed": 3, "batch_size": 5, "return_logprobs": True}
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    model.compiling = compiling
    found, shapes = generate(model, prompts, **how), len(graphs)
    model.compiling = False
    monkeypatch.setattr(modeling, "on_gpu", lambda device: False)
    wanted = generate(model, prompts, **how)
    assert found[0] == wanted[0] and all(one == pytest.approx(two, abs=1e-4) for one, two in zip(found[1], wanted[1]))
    assert shapes == len(graphs) and (shapes == 1 if compiling else 2 <= shapes <= 8) and all(len(graph.calls) > 20 for graph in graphs)


def test_a_graph_is_recorded_once_for_each_power_of_two(graphs):
    model, cache = Llama(TINY).init_weights(0).eval(), KVCache(TINY, 6, 500, torch.float32, "cpu")
    step = OneToken(model, cache)
    with torch.inference_mode():
        for live, longest, wanted in ((1, 0, (1, 256)), (3, 255, (4, 256)), (4, 10, (4, 256)), (5, 256, (6, 500)), (6, 499, (6, 500)), (3, 256, (4, 500))):
            cache.lengths[:] = 0
            cache.lengths[:live] = longest
            assert step.shape(live) == wanted and step(list(range(live))).shape == (live, TINY.vocab_size)
            assert cache.lengths.tolist() == [longest + 1] * live + [0] * (6 - live)
    assert set(step.graphs) == {(1, 256), (4, 256), (6, 500), (4, 500)} and len(graphs) == 4


# Places --------------------------------------------------------------------------------------------------------------


class There(torch.Tensor):
    """A tensor on the other device, which lies in the CPU's memory as `inner`."""

    @staticmethod
    def __new__(cls, inner):
        with torch.inference_mode(inner.is_inference()):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=OTHER)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        raise AssertionError(f"{function} outside of the mode")


OTHER = "other:0"
COPIES = [torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default]
ASKED = [torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default]


class OtherDevice(TorchDispatchMode):
    """A device beside the CPU with the CPU's numbers. No operation takes tensors of both, as on a GPU; what the CPU asks it for is counted."""

    def __init__(self):
        super().__init__()
        torch.utils.backend_registration._setup_privateuseone_for_python_backend("other")
        torch.other.get_amp_supported_dtype = lambda: [torch.bfloat16]
        self.asked, tolist = 0, torch.Tensor.tolist
        torch.Tensor.tolist = lambda x: tolist(self.answer(x) if isinstance(x, There) else x)

    def answer(self, x):
        self.asked += 1
        return x.inner

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named, seen = dict(named or {}), []
        tree_map_only(torch.Tensor, seen.append, (arguments, named))
        there = [x for x in seen if isinstance(x, There)]
        if there and function not in COPIES and not all(isinstance(x, There) or x.dim() == 0 for x in seen):
            raise AssertionError(f"{function} of tensors on two devices")
        self.asked += bool(there) and function in ASKED
        asked_for = named.get("device")
        if asked_for is not None and torch.device(asked_for).type == "other":
            named["device"] = "cpu"
        if "pin_memory" in named:
            named["pin_memory"] = False
        out = function(*tree_map_only(There, lambda x: x.inner, arguments), **tree_map_only(There, lambda x: x.inner, named))
        if function is torch.ops.aten._local_scalar_dense.default or (asked_for is not None and torch.device(asked_for).type == "cpu"):
            return out
        first = next(iter(function._schema.arguments), None)
        if first is not None and first.alias_info and first.alias_info.is_write and isinstance(arguments[0], There):       # in place
            return arguments[0]
        if asked_for is not None or there and function is not torch.ops.aten.copy_.default:
            return tree_map_only(torch.Tensor, There, out)
        return out


def there(check, *arguments):
    """check(other device, *arguments) in a process of its own, which has not computed before: autograd counts the devices once."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    mine, its = server.Pipe()
    child = server.Process(target=checked, args=(its, check, arguments))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))                # the server begins with it, and imports this file
        child.start()
    its.close()
    try:
        said, problem = mine.recv()
    except EOFError:
        said, problem = "", "it ended without a word"
    child.join()
    print(said)
    assert not problem, problem


def checked(parent, check, arguments):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            with OtherDevice() as device:
                check(device, *arguments)
            problem = ""
        except BaseException:
            problem = traceback.format_exc()
    parent.send((said.getvalue(), problem))


def two_places(device):
    model = Llama(TINY).init_weights(0)
    ids = torch.arange(7)
    wanted = model.hidden(ids, Packed([3, 4]))
    model = model.to(OTHER)
    assert all(isinstance(p, There) for p in model.parameters())
    attend = Packed([3, 4], OTHER)
    hidden = model.hidden(ids.to(OTHER), attend)
    assert hidden.device == torch.device(OTHER) and torch.allclose(hidden.cpu(), wanted, atol=1e-6)
    hidden.sum().backward()
    assert all(p.grad is None or p.grad.device == torch.device(OTHER) for p in model.parameters())
    for mistake in (lambda: model.hidden(ids, attend), lambda: model.hidden(ids.to(OTHER), attend, rows=torch.arange(2)), lambda: hidden + torch.ones(7, TINY.dim)):
        with pytest.raises((AssertionError, RuntimeError)):
            mistake()
    before = device.asked
    hidden.sum().item()
    assert device.asked == before + 1


def test_the_other_device_refuses_tensors_of_the_cpu():
    there(two_places)


RUNS = {                                                    # stages of train.py, some with sampling, judging and evaluation
    "sft": ("--evaluate",), "sft nf4": ("--quantize", "nf4"), "sft int8": ("--quantize", "int8", "--checkpointing"), "sft full": ("--full",),
    "cat": ("--micro-tokens", "150", "--dropout", "0.1"), "cat collecting": ("--judge", "self"), "dpo": ("--length-normalize", "--pairs", "all"), "rso": (), "slic": (), "rrhf": (),
    "pro": (), "reward": (), "conditional": (), "ppo": ("--rollouts", "8", "--no-fit-reward", "--judge", "rule", "--kl-target", "0.1"), "rlaif": ("--judge", "self"), "sft-ia": (), "expert": (),
    "cut": (), "cut tokens": ("--combine", "half", "--reduction", "token", "--detector", "frozen"), "forward": (), "ilf": ("--refinements", "2"), "hindsight": (),
    "unlikelihood": (), "unlikelihood token": ("--level", "token"), "unlikelihood sequence": ("--level", "sequence"), "critic": ()}
PADDED = {"sft full", "cat", "pro", "reward", "cut"}        # in padded rows, as where varlen_attn does not serve


def as_a_gpu(varlen=True):
    """The other device is taken for a GPU, with varlen_attn, where it is to serve, and CUDA graphs as they are said to be."""
    train.pick_device = evaluation.pick_device = lambda config: (config.device, torch.float32)
    modeling.on_gpu = lambda device: torch.device(device).type == "other"
    modeling.varlen_attn, Segments.serve = documented, lambda v: varlen and isinstance(v, There)
    OneToken.replay = lambda step, *inputs: step.run(*inputs)
    torch.Tensor.pin_memory = lambda x: x


def runs_alike(device, argv, folder, varlen):
    """train.py on the CPU and on the other device: the same answers, judgments and figures, and the same weights but for rounding."""
    as_a_gpu(varlen)
    found = []
    for name in ("cpu", OTHER):
        out = folder / name.partition(":")[0]
        assert train.main([*argv, "--out", str(out), "--device", name]) == 2 * ("collecting" in folder.name)     # random answers: none is good enough
        found.append({str(path.relative_to(out)): path for path in sorted(out.rglob("*")) if path.is_file()})
    assert found[0].keys() == found[1].keys() and device.asked
    for name, path in found[0].items():
        if path.suffix == ".jsonl" and path.name != "log.jsonl":
            for here, there in zip(data.read_records(path), data.read_records(found[1][name]), strict=True):
                assert {key: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for key, value in here.items()} == there, name
        if path.suffix == ".safetensors":
            here, there = load_file(path), load_file(found[1][name])
            assert all(torch.allclose(here[key], there[key], atol=1e-5) for key in here), name
        if path.name in ("metrics.json", "rewards.json"):
            assert path.read_text() == found[1][name].read_text()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_another_device_is_that_on_the_cpu(name, world, judged, tmp_path):        # noqa: F811
    stage = name.split()[0]
    argv, more = ["--stage", stage, *arguments(world, "x"), "--steps", "2", "--batch-size", "4", "--no-evaluate"], RUNS[name]
    at = argv.index("--out")
    del argv[at:at + 2]
    if train.kind(stage) in train.JUDGED:
        argv += ["--records", str(judged), *JUDGED]
    elif "--judge" not in more and stage not in ("sft", "sft-ia"):
        argv += ["--candidates", str(planted(world, tmp_path / "candidates.jsonl"))]
    if train.STAGES[stage].needs == "sft-ia":
        argv += ["--sft-steps", "1", "--pool-per-task", "4", "--wordings", "3"]
    there(runs_alike, [*argv, *more], tmp_path / name.replace(" ", "-"), name not in PADDED)


def evaluates_alike(device, argv, folder, names):
    as_a_gpu()
    for name in ("cpu", OTHER):
        evaluation.main([*argv, "--out", str(folder / name.partition(":")[0]), "--device", name])
    for name in names:
        here, there = (json.loads((folder / place / name).read_text()) for place in ("cpu", "other"))
        assert here == there or rounded(here) == rounded(there), name


def rounded(found):
    """Nested figures to 4 digits."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    return [rounded(value) for value in found] if isinstance(found, list) else round(found, 4) if isinstance(found, float) else found


@pytest.fixture(scope="module")
def reward_run(world, tmp_path_factory):                    # noqa: F811
    folder = tmp_path_factory.mktemp("reward")
    assert train.main(["--stage", "reward", *arguments(world, folder / "run", "--steps", "2", "--sft-steps", "1", "--no-evaluate"),
                       "--candidates", str(planted(world, folder / "candidates.jsonl"))]) == 0
    return folder / "run"


@pytest.mark.parametrize("name", ["plain", "best of", "kl", "mask"])
def test_evaluation_on_another_device_is_that_on_the_cpu(name, world, judged, reward_run, tmp_path):      # noqa: F811
    files = ["--model", str(world / "model"), "--adapter", str(reward_run)]
    tasks = ["--tasks", str(world / "tasks"), "--paraphrases", str(world / "paraphrases.json"), "--per-task", "2", "--wordings", "2", "--max-new-tokens", "4"]
    more = {"plain": tasks, "best of": [*tasks, "--best-of", "3", "--reward-model", str(reward_run)], "kl": [*tasks, "--reference", str(reward_run / "sft-ia")], "mask": ["--show-mask", str(judged)]}[name]
    there(evaluates_alike, [*files, *more], tmp_path, {"mask": [], "best of": ["best_of.json"]}.get(name, ["metrics.json"]))


def asks_little(device):
    """A step asks a GPU once for each figure of the log, at its end, however many micro-batches it has."""
    as_a_gpu()
    dice = random.Random(0)

    def group():
        prompt, answers = [dice.randrange(300) for _ in range(12)], [[dice.randrange(300) for _ in range(dice.randint(1, 9))] for _ in range(3)]
        documents = [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "cut": False} for answer in answers]
        return {"documents": documents, "n_best": 1, "pairs": [(0, 1), (0, 2)], "imitated": [0, 0], "rewards": [2.0, 1.0, 0.0], "pair_weights": [0.5, 0.5],
                "reference": [-3.0, -2.0, -5.0]}
    model = lora.apply_lora(Llama(TINY).init_weights(0), lora.LoraConfig(rank=4)).to(OTHER)
    evaluation.add_head(model)
    for name in ("sft", "cat", "dpo", "slic", "rrhf", "pro", "reward"):
        batches, cfg = [{**train.collate([group() for _ in range(2)], OTHER), "step": 0} for _ in range(5)], train.TrainConfig(stage=name)
        modeling.varlen_attn, stage = lambda q, k, v, *more, **named: q + 0 * v.sum() + 0 * k.sum(), train.STAGES[name]      # the documented one asks
        counted = [stage.counts(batch, cfg) for batch in batches]            # asked before the work begins
        before = device.asked
        figures = train.backward(model, dataclasses.replace(stage, counts=lambda batch, cfg, left=iter(counted): next(left)), batches, cfg)
        assert device.asked - before <= len(figures), (name, device.asked - before)


def test_a_step_asks_a_gpu_for_nothing_but_its_figures():
    there(asks_little)


# With a GPU ----------------------------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@on_a_gpu
@pytest.mark.parametrize("number", range(10))
def test_on_a_gpu_segments_are_the_padded_rows(number, monkeypatch):
    trees = some_trees(random.Random())
    attend = Branched(trees, "cuda") if number % 2 else Packed([stem for stem, _ in trees], "cuda")
    q, k, v = (torch.randn(len(attend.position_ids), heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    found = []
    for serves in (True, False):
        monkeypatch.setattr(Segments, "serve", lambda v, serves=serves: serves)
        out = attend(0, q, k, v)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    assert all(torch.allclose(one, two, atol=0.03, rtol=0.03) for one, two in zip(*found)), trees


@on_a_gpu
@pytest.mark.parametrize("compiling", [False, True])
def test_on_a_gpu_answers_are_those_of_the_cpu(compiling):
    model, dice = Llama(TINY).init_weights(0), random.Random()
    prompts = [[dice.randrange(300) for _ in range(dice.randint(1, 40))] for _ in range(12)]
    wanted = generate(model, prompts, max_new_tokens=30, temperature=1.0, batch_size=5, seed=3, return_logprobs=True)
    model = model.to("cuda")
    model.compiling = compiling
    found = generate(model, prompts, max_new_tokens=30, temperature=1.0, batch_size=5, seed=3, return_logprobs=True)
    assert found[0] == wanted[0]
    assert all(one == pytest.approx(two, abs=1e-3) for one, two in zip(found[1], wanted[1]))


@on_a_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_a_run_ends_with_its_table(dtype, world, tmp_path):       # noqa: F811
    assert train.main(["--stage", "cat", *arguments(world, tmp_path / "run", "--steps", "2", "--sft-steps", "1", "--pool-per-task", "4", "--wordings", "3"),
                       "--candidates", str(planted(world, tmp_path / "candidates.jsonl")), "--device", "cuda", "--dtype", dtype]) == 0
    assert train.STAGES["cat"].title in json.loads((tmp_path / "run/metrics.json").read_text())
