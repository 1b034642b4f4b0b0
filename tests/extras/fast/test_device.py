"""What a GPU would do, checked without one: the CPU under another name.

No operation takes tensors of both devices, and what is read back from the other one is counted.
Each check runs in a process of its own, because autograd counts the devices once.
"""

import contextlib
import copy
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ROOT, OTHER = Path(__file__).parents[3], "other:0"
COPIES = [torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default]
READ = torch.ops.aten._local_scalar_dense.default
ASKED = [READ, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default]


class There(torch.Tensor):
    """A tensor on the other device, which lies in the CPU's memory as `inner`."""

    @staticmethod
    def __new__(cls, inner):
        with torch.inference_mode(inner.is_inference()):
            return torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
                dtype=inner.dtype, device=OTHER)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        raise AssertionError(f"{function} outside of the mode")


class OtherDevice(TorchDispatchMode):
    """A device beside the CPU with the CPU's numbers; `asked` counts what is read from it."""

    def __init__(self):
        super().__init__()
        torch.utils.backend_registration._setup_privateuseone_for_python_backend("other")
        torch.other.get_amp_supported_dtype = lambda: [torch.bfloat16]
        self.asked, tolist = 0, torch.Tensor.tolist
        torch.Tensor.tolist = lambda x: tolist(self.answer(x) if isinstance(x, There) else x)
        make = torch.tensor  # which goes past the mode where a device is named
        torch.tensor = lambda x, device="cpu", **how: make(x, **how).to(device)

    def answer(self, x):
        self.asked += 1
        return x.inner

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named, seen = dict(named or {}), []
        tree_map_only(torch.Tensor, seen.append, (arguments, named))
        there = [x for x in seen if isinstance(x, There)]
        alone = all(isinstance(x, There) or x.dim() == 0 for x in seen)
        if there and function not in COPIES and not alone:
            raise AssertionError(f"{function} of tensors on two devices")
        self.asked += bool(there) and function in ASKED
        device = named.get("device")
        if device is not None and torch.device(device).type == "other":
            named["device"] = "cpu"
        if "pin_memory" in named:
            named["pin_memory"] = False
        inner = tree_map_only(There, lambda x: x.inner, (arguments, named))
        out = function(*inner[0], **inner[1])
        if function is READ or device is not None and torch.device(device).type == "cpu":
            return out
        first = next(iter(function._schema.arguments), None)
        writes = first and first.alias_info and first.alias_info.is_write
        if writes and isinstance(arguments[0], There):  # in place
            return arguments[0]
        if device is not None or there and function is not torch.ops.aten.copy_.default:
            return tree_map_only(torch.Tensor, There, out)
        return out


# ----- The checks, each in a process of its own -----

def make_models():
    """A model on the CPU, and its copy on the other device, which is taken for a GPU."""
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    from conftest import TINY

    from extras.fast import accelerate, attention, sampling
    from model import Llama, ModelConfig

    for place in (attention, sampling):
        place.on_gpu = lambda device: torch.device(device).type == "other"
    torch.Tensor.pin_memory = lambda x: x
    torch.cuda.device = contextlib.nullcontext
    sampling.Rows.record = lambda rows, *shape: Graph(rows, shape).parts()
    model = accelerate(Llama(ModelConfig(**TINY)))
    for weight in model.parameters():
        weight.data.normal_(float(weight.dim() == 1), 0.12)
    model.lm_head.requires_grad_(False)
    return model, copy.deepcopy(model).to(OTHER)


class Graph:
    """A CUDA graph that computes its step anew."""

    def __init__(self, rows, shape):
        self.rows, self.shape, self.logits = rows, shape, rows.compute(*shape)

    def parts(self):
        return self, self.logits

    def replay(self):
        self.logits.copy_(self.rows.compute(*self.shape))


def place_of(model):
    return model.lm_head.weight.device


def random_items():
    dice, items = random.Random(0), []
    for n in (3, 1, 4):
        prompt, documents = [dice.randrange(300) for _ in range(20)], []
        for _ in range(n):
            response = [dice.randrange(300) for _ in range(dice.randint(1, 9))]
            documents.append({"input_ids": prompt + response, "labels": [-100] * 20 + response})
        items.append({"documents": documents})
    return items


def refuses(device):
    """The other device is told from the CPU."""
    model, there = make_models()
    ids = torch.arange(7)
    _, attend = there.lay_out([{"documents": [{"input_ids": [0] * 7, "labels": [-100] * 7}]}])
    for mistake in (lambda: there.hidden(ids, attend), lambda: model.hidden(ids, attend),
                    lambda: there.hidden(ids.to(OTHER), attend, torch.arange(2))):
        with pytest.raises((AssertionError, RuntimeError)):
            mistake()
    before = device.asked
    there.hidden(ids.to(OTHER), attend).sum().item()
    assert device.asked == before + 1


def trains(device):
    """Same log-probabilities and gradients; the device is asked for nothing."""
    from losses import prediction_rows

    found = []
    for model in make_models():
        for each in model.model.parameters():
            each.requires_grad_(True)
        model.checkpointing = place_of(model) == torch.device(OTHER)
        place = place_of(model)
        row, attend = model.lay_out(random_items())
        rows, targets = prediction_rows(torch.tensor(row["labels"]), attend.before)
        ids, rows, targets = (x.to(place) for x in (torch.tensor(row["input_ids"]), rows, targets))
        before = device.asked
        logprobs, complements = model.fused_logprobs(model.hidden(ids, attend, rows), targets)
        (logprobs.sum() + complements.sum()).backward()
        assert device.asked == before, device.asked - before
        slopes = [weight.grad for weight in model.model.parameters()]
        assert all(x.device == place for x in (logprobs, *slopes))
        found.append([x.detach().cpu() for x in (logprobs, complements, *slopes)])
    assert all(torch.allclose(*pair, atol=1e-4, rtol=1e-4) for pair in zip(*found, strict=True))


def samples(device):
    """Same responses and same keywords."""
    from conftest import Characters

    from model import Sampling, generate

    here, there = make_models()
    dice = random.Random(1)
    prompts = [[dice.randrange(300) for _ in range(dice.randint(1, 40))] for _ in range(9)]
    prompts += [prompts[0][:1] * 12 + [k] for k in range(3)]
    found = [generate(model, prompts, Sampling(12, 1.0), eos_ids=list(range(20)), batch_size=5)
             for model in (here, there)]
    assert found[0] == found[1] and device.asked
    asked = ["a text\n"] * 3 + ["b\n"], ["x:", "xy:", "x:", "z:"], [(" y", " n")] * 4
    one, two = (model.keyword_logprobs(Characters(), *asked) for model in (here, there))
    assert all(a == pytest.approx(b, abs=1e-4) for a, b in zip(one, two, strict=True))


CHECKS = {check.__name__: check for check in (refuses, trains, samples)}


@pytest.mark.parametrize("name", CHECKS)
def test_on_another_device(name):
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    with OtherDevice() as other:
        CHECKS[sys.argv[1]](other)
