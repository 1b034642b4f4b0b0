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
    parts = check(device, dtype)
    print(f"fast code checked against the plain code on {hardware(device)}: {len(parts)} parts "
          "agree")


def hardware(device: torch.device) -> str:
    """What a device is called."""
    return torch.cuda.get_device_name(device) if on_gpu(device) else platform.machine()


def check(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """{part of the fast code: its largest relative difference from the plain code}.

    Raises RuntimeError that names a part that differs.
    """
    generator, parts = torch.Generator().manual_seed(0), {}
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
                               f"{error:.1%} on {hardware(device)} in {dtype}; run with --plain.")
        parts[part] = max(parts.get(part, 0.0), error)
    return parts


def compare(plain: Llama, fast: Llama, generator) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (part, result of the fast code, result of the plain code)."""
    dice = random.Random(0)
    yield from compare_training(plain, fast, dice)
    yield from compare_sampling(plain, fast, dice)
    yield from compare_keywords(plain, fast)
    yield from compare_quantised(plain.lm_head.weight, generator)


def draw(dice: random.Random, n: int) -> list[int]:
    """n token ids."""
    return [dice.randrange(128) for _ in range(n)]


def compare_training(plain: Llama, fast: Llama, dice) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Log-probabilities of labels and their gradients."""
    from methods import collate, label_logprobs

    def train(model, documents: list[list[dict]]) -> tuple[Tensor, Tensor]:
        model.model.requires_grad_(True)
        items = [{"documents": group} for group in documents]
        batch = collate(items, model, model.lm_head.weight.device)
        logprobs = label_logprobs(model, batch)
        slopes = torch.autograd.grad(logprobs.square().sum(), list(model.model.parameters()))
        model.requires_grad_(False)
        return logprobs.detach(), torch.cat([slope.flatten() for slope in slopes])

    groups = []  # two prompts with three responses each
    for _ in range(2):
        prompt, documents = draw(dice, 20), []
        for size in (4, 9, 11):
            response = draw(dice, size)
            documents.append({"input_ids": prompt + response, "labels": [-100] * 20 + response})
        groups.append(documents)
    alone = [[document] for documents in groups for document in documents]
    for how, given in (("", groups), (" of whole documents", alone)):
        found, expected = train(fast, given), train(plain, given)
        for part, x, y in zip(("log-probabilities", "gradients"), found, expected, strict=True):
            yield part + how, x, y
    fast.checkpointing = True
    yield "gradients of recomputed blocks", train(fast, groups)[1], train(plain, groups)[1]
    fast.checkpointing = False


def compare_sampling(plain: Llama, fast: Llama, dice) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Logits of each token of responses: several at a time, refilled, and one at a time."""
    stem = draw(dice, 20)
    prompts = [stem + draw(dice, size) for size in (4, 9, 11)] + [draw(dice, 24), draw(dice, 280)]
    for how, temperature, together in (("greedy", 0.0, 3), ("sampled", 1.0, 3), ("single", 1.0, 1)):
        answers = [Answer(prompt, 12, f"{k}", []) for k, prompt in enumerate(prompts)]
        for found, expected in answer_twice(plain, fast, answers, temperature, together):
            yield f"logits of {how} responses", found, expected


@torch.inference_mode()  # as `generate` is
def answer_twice(plain: Llama, fast: Llama, answers: list[Answer], temperature: float,
                 together: int) -> list[tuple[Tensor, Tensor]]:
    """Logits of every token of the answers, by the fast and by the plain code: (V,) each."""
    found, device = [], plain.lm_head.weight.device
    for logits, batch in fast.decode(answers, together):
        for answer, row in zip(batch, logits, strict=True):
            ids = torch.tensor([answer.prompt + answer.tokens], device=device)
            found.append((row.clone(), plain(ids)[0, -1]))
        if not logits.isfinite().all():  # the comparison will say so; `sample` blames the model
            break
        draws = [uniform(answer.stream, len(answer.tokens)) for answer in batch]
        tokens = sample(logits, draws, Sampling(temperature=temperature))
        for answer, token in zip(batch, tokens, strict=True):
            answer.tokens.append(token)
            answer.done = token < 12 or len(answer.tokens) == answer.most
    return found


def compare_keywords(plain: Llama, fast: Llama) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What a judge's header and its items are asked."""
    from methods.examples import keyword_logprobs

    letters = SimpleNamespace(encode_prompt=lambda text: [1, *map(ord, text)],
                              encode_continuation=lambda text: [*map(ord, text)])
    asked = (["one text\n"] * 3 + ["two\n"], ["so", "it is", "so", "so"],
             [(" yes", " no"), (" right", " wrong")] * 2)
    found, expected = (torch.tensor(keyword_logprobs(x, letters, *asked)) for x in (fast, plain))
    yield "log-probabilities of keywords", found, expected


def compare_quantised(weight: Tensor, generator) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Products of few and many rows with weights of -1, 0 and 1, whose codes are exact."""
    signs = torch.randint(-1, 2, (48, 64), generator=generator).to(weight)
    for kind in QUANTIZERS:
        linear = QuantLinear(64, 48, kind, weight.dtype, weight.device)
        linear.encode_rows(slice(None), signs)
        for x in (weight[:4, :64], weight[:40, :64]):
            yield f"{kind} products", linear(x), F.linear(x, signs)
