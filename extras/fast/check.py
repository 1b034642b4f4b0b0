"""Does the fast code agree with the plain code here? Asked on hardware where it has not run before.

A tiny random model goes both ways through training, decoding and judging.
"""

import copy
import functools
import platform
import random
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from extras.fast.attention import on_gpu
from extras.fast.llama import accelerate
from extras.fast.quant import QUANTIZERS, QuantLinear
from model import Answer, Llama, ModelConfig, Sampling, sample, uniform

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}  # relative


@functools.cache
def check_once(device: torch.device | str, dtype: torch.dtype) -> None:
    """Compare both codes, once in a process, and say so in a line.

    Nothing happens on x86 CPUs, where the fast code was developed. Raises RuntimeError that names
    the part that differs.
    """
    device = torch.device(device)
    if device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        return
    name = torch.cuda.get_device_name(device) if on_gpu(device) else platform.machine()
    generator, parts = torch.Generator().manual_seed(0), set()
    with torch.device("meta"):  # which leaves the run's random numbers alone
        plain = Llama(ModelConfig(vocab_size=128, dim=128, n_layers=2, n_heads=4, n_kv_heads=2,
                                  head_dim=32, hidden_dim=160)).requires_grad_(False)
    for weight in plain.to_empty(device="cpu").parameters():
        weight.normal_(float(weight.dim() == 1), 0.15, generator=generator)
    fast = accelerate(copy.deepcopy(plain.to(device, dtype)))
    for part, found, expected in compare(plain, fast, generator):
        error = float((found - expected).float().norm() / expected.float().norm())
        if not error < TOLERANCES[dtype]:
            raise RuntimeError(f"the fast code's {part} differ from the plain code's by "
                               f"{error:.1%} on {name} in {dtype}; run with --plain.")
        parts.add(part)
    print(f"fast code checked against the plain code on {name}: {len(parts)} parts agree")


def compare(plain: Llama, fast: Llama, generator) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (part, result of the fast code, result of the plain code)."""
    from methods import collate, label_logprobs
    from methods.examples import keyword_logprobs

    weight, device, dice = plain.lm_head.weight, plain.lm_head.weight.device, random.Random(0)
    items, prompts, results = [], [], []
    for _ in range(2):  # two prompts with three responses each
        prompt, documents = [dice.randrange(128) for _ in range(20)], []
        for size in (4, 9, 11):
            prompts.append(prompt + [dice.randrange(128) for _ in range(size)])
            labels = [-100] * 20 + prompts[-1][20:]
            documents.append({"input_ids": prompts[-1], "labels": labels})
        items.append({"documents": documents})
    for model in (fast, plain):
        model.model.requires_grad_(True)
        logprobs = label_logprobs(model, collate(items, model, device))
        slopes = torch.autograd.grad(logprobs.square().sum(), list(model.model.parameters()))
        results.append((logprobs.detach(), torch.cat([slope.flatten() for slope in slopes])))
        model.requires_grad_(False)
    yield "log-probabilities", results[0][0], results[1][0]
    yield "gradients", results[0][1], results[1][1]
    for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        answers = [Answer(prompt, 12, f"{k}", []) for k, prompt in enumerate(prompts)]
        for logits, batch in fast.decode(answers, 4):
            draws = [uniform(answer.stream, len(answer.tokens)) for answer in batch]
            tokens = sample(logits, draws, Sampling(temperature=temperature))
            for answer, row, token in zip(batch, logits, tokens, strict=True):
                ids = torch.tensor([answer.prompt + answer.tokens], device=device)
                yield f"logits of {how} responses", row, plain(ids)[0, -1]
                answer.tokens.append(token)
                answer.done = token < 12 or len(answer.tokens) == answer.most
    letters = SimpleNamespace(encode_prompt=lambda text: [1, *map(ord, text)],
                              encode_continuation=lambda text: [*map(ord, text)])
    asked = (["one text\n"] * 3 + ["two\n"], ["so", "it is", "so", "so"],
             [(" yes", " no"), (" right", " wrong")] * 2)
    found, expected = (torch.tensor(keyword_logprobs(x, letters, *asked)) for x in (fast, plain))
    yield "log-probabilities of keywords", found, expected
    signs = torch.randint(-1, 2, (48, 64), generator=generator).to(weight)  # their codes are exact
    for kind in QUANTIZERS:
        linear = QuantLinear(64, 48, kind, weight.dtype, device)
        linear.encode_rows(slice(None), signs)
        for x in (weight[:4, :64], weight[:40, :64]):
            yield f"{kind} products", linear(x), F.linear(x, signs)
