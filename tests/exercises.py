"""Checks answers to the exercises of docs/reading.md, which holds their text and hints.

    python tests/exercises.py               # lists them
    python tests/exercises.py N ANSWER      # prints right or wrong; exit status 0 or 1

A function per exercise yields the parts of its answer, computed by the code of this repository.
"""

import inspect
import math
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import eval as evaluation
import judge
import lora
import losses
import model as llama

PAGE = Path(__file__).parent.parent / "docs/reading.md"
BASE = PAGE.parent.parent / "demo/base"


def changed(function, old: str, new: str):
    """A function of the course with one expression replaced, in memory only."""
    names, source = dict(vars(inspect.getmodule(function))), inspect.getsource(function)
    assert source.count(old) == 1, f"{function.__name__} should hold {old!r} once"
    exec(source.replace(old, new), names)
    return names[function.__name__]


def rewards():
    for answers in ((False, True), (True, None)):
        yield from (judge.combine_reward(*answers, mode=mode) for mode in ("gated", "sum"))


def pairs():
    for rule in ("best", "all"):
        better, worse = losses.best_vs_lower_pairs([1, 0, None, 1, 2], rule=rule)
        yield "+".join(f"{i}-{j}" for i, j in zip(better, worse, strict=True))


def splits():
    for name in ("tom", "Tom"):
        task = data.Task("any", "", [data.Instance("0", f"{name} has a red hat", ("red",))])
        yield from (split for split in data.SHARES if data.split_instances(task, split))
    yield len(data.split_wordings("any", [f"wording {number}" for number in range(9)])["train"])


def consistency():
    agreed = "ab ba ac ca bc cb cd dc ad db".split()
    said = {(a, b): a + b in agreed for a in "abcde" for b in "abcde"}
    for symmetrize in ("and", "or"):
        similar = evaluation.similarity("abcde", said, symmetrize)  # (n, n)
        yield from (evaluation.consistency_rate(similar), evaluation.max_consistency_rate(similar))


def division():
    parts = [losses.cross_entropy(torch.full((n,), -nats)) for n, nats in ((2, 3.0), (8, 1.0))]
    yield sum(total for total, _ in parts) / sum(count for _, count in parts)
    yield sum(total / count for total, count in parts) / len(parts)


def cat():
    logprobs, ids = torch.tensor([-0.1, -0.2, -0.3, -0.25, -0.25, -0.1]), [0, 0, 0, 1, 1, 2]
    indices = [torch.tensor(x) for x in (ids, [0, 0], [1, 2])]  # answer of a token, better, worse
    for loss in (losses.cat_loss, changed(losses.cat_loss, "sums / lengths.clamp(min=1)", "sums")):
        terms = loss(logprobs, *indices, torch.tensor([1.0, 0.0, 0.0]), lam=0.5)
        yield sum(total / count for total, count in terms.values())


def flags():
    judged, plain = torch.tensor([[0.5, 0.9, 0.02, 0.3, 0.56], [0.48, 0.6, 0.001, 0.3, 0.5]]).log()
    for lam, floor in ((1.1, 0.0), (1.1, 0.05), (1.3, 0.0)):
        found = losses.inappropriate_tokens(judged, plain, detect_lam=lam, floor=floor)  # (K,)
        yield "+".join(map(str, found.nonzero().flatten().tolist()))


def dpo():
    reference = torch.tensor([-12.0, -10.0])
    for gains in ([0.0, 0.0], [3.0, -2.0], [3.0, 3.0]):
        h = losses.preference_logits(reference + torch.tensor(gains), reference, [0], [1])  # (1,)
        yield losses.dpo_loss(h, beta=0.1)[0]


def adapter():
    model, ids = llama.load_model(BASE), torch.arange(3, 20)[None]  # (1, T)
    before, after = model(ids), lora.apply_lora(model, lora.LoraConfig(rank=16))(ids)  # (1, T, V)
    after.logsumexp(-1).sum().backward()
    weights = lora.adapter_weights(model)
    yield (after - before).abs().max().item()
    yield sum(weight.numel() for weight in weights.values())
    yield "+".join(sorted({name[-8] for name, weight in weights.items() if weight.grad.any()}))


def cache():
    model = llama.load_model(BASE).to("meta")  # shapes without memory
    yield llama.KVCache(model, 128, 512).kv.nbytes / 2**20


def complements():
    naive = changed(losses.complement_logprobs, "others.logsumexp(-1) - logits.logsumexp(-1)",
                    "(1 - gathered_logprobs(logits, targets).exp()).log()")
    for function in (losses.complement_logprobs, naive):
        for logit in (math.log(99), 20.0):
            logits = torch.tensor([[logit, 0.0]], requires_grad=True)  # (1, V)
            loss = -function(logits, torch.tensor([0]))
            yield torch.autograd.grad(loss, logits)[0][0, 0]


def shift():
    labels, logits = torch.tensor([-100, -100, 1, 2, 3]), torch.eye(4)[[0, 1, 1, 2, 3]]  # (T, V)
    wrong = changed(losses.prediction_rows, "positions - 1", "positions")
    for find in (losses.prediction_rows, wrong):
        rows, targets = find(labels)
        yield (logits[rows].argmax(-1) == targets).sum()


EXERCISES = (rewards, pairs, splits, consistency, division, cat, flags, dpo, adapter, cache,
             complements, shift)


def rounded(part) -> str:
    """A number to two decimals, anything else as it is."""
    try:
        return f"{float(part):.2f}"
    except (TypeError, ValueError):
        return str(part).lower()


def main(argv: list[str]) -> int:
    """Check an answer, or list the exercises; the exit status is 2 for what is no answer."""
    _, text, hints = re.split("\n## Exercises\n|\n## Hints\n", PAGE.read_text(encoding="utf-8"))
    if len(argv) < 2 or argv[0] not in map(str, range(1, len(EXERCISES) + 1)):
        print(text.strip())
        return 2 * bool(argv)
    number, words = int(argv[0]) - 1, " ".join(argv[1:]).replace(",", " ").split()
    right = list(map(rounded, words)) == list(map(rounded, EXERCISES[number]()))
    print("right" if right else "wrong. Hint " + hints.strip().split("\n\n")[number])
    return int(not right)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
