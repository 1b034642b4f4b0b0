"""Does the time for a token grow with the work? Training over 100 to 10,000 examples, sampling in 1 to 64 slots, 2 to 32 answers a group.

    python bench/growth.py --out growth.png                 # the table, and the plot where a file is given

Each figure is the median of the rounds, microseconds per useful token: a token that is trained on or generated, or, for groups,
that stands in the prompt or in an answer (a prompt counts once, however many answers share it). Only answers go through the last
block's MLP and have logits, so the more of them a group has, the more arithmetic a token of it costs; the table says how much, and
the plot what would follow from that alone.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch                                                # noqa: E402

import data                                                 # noqa: E402
import train                                                # noqa: E402
from lora import LoraConfig, apply_lora                     # noqa: E402
from model import Llama, ModelConfig, generate              # noqa: E402
from speed import ragged, tokens                            # noqa: E402

CONFIG = ModelConfig(dim=256, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=688, vocab_size=8000, max_position_embeddings=2048)


def words(n: int, seed: int) -> list[int]:
    return [token % CONFIG.vocab_size for token in tokens(n, seed)]


def document(prompt: list[int], answer: list[int]) -> dict:
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "cut": False}


def steps(model, groups: list[dict], stage: str, batch_size: int, n: int) -> float:
    """Seconds of n steps of the loop's own work: choosing, packing, forward, backward."""
    cfg = train.TrainConfig(stage=stage, batch_size=batch_size)
    data._permutation.cache_clear()
    began = time.perf_counter()
    for step in range(n):
        chosen = [groups[i] for i in data.batch_indices(len(groups), batch_size, step, 0)]
        train.backward(model, train.STAGES[stage], [train.collate(part, "cpu") for part in data.micro_batches(chosen, cfg.micro_tokens)], cfg)
        model.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def examples(model, n: int) -> float:
    lengths = ragged(n, 96, 16, 320, 1)
    groups = [{"documents": [document(words(length - length // 4, k), words(length // 4, -k))]} for k, length in enumerate(lengths)]
    seen = sum(lengths[i] for step in range(6) for i in data.batch_indices(n, 16, step, 0))
    return steps(model, groups, "sft", 16, 6) / seen


def candidates(model, n: int) -> float:
    groups = []
    for k in range(64 // n):
        prompt, answers = words(200, k), [words(30, 100 * k + j) for j in range(n)]
        groups.append({"documents": [document(prompt, answer) for answer in answers], "n_best": 1, "pairs": [(0, j) for j in range(1, n)]})
    return steps(model, groups, "cat", len(groups), 1) / (len(groups) * (200 + 30 * n))


def slots(model, n: int) -> float:
    prompts, most = [words(40, k) for k in range(64)], ragged(64, 24, 4, 60, 3)
    began = time.perf_counter()
    generate(model.eval(), prompts, max_new_tokens=most, temperature=1.0, eos_ids=(), batch_size=n)
    return (time.perf_counter() - began) / sum(most)


SERIES = {"examples": (examples, (100, 1000, 10000)), "answers in a group": (candidates, (2, 4, 8, 16, 32)), "slots": (slots, (1, 4, 16, 64))}


def operations(n: int) -> float:
    """Million multiplications and additions per useful token of a group of n answers, forward and backward, without adapters and attention."""
    qkv = CONFIG.dim * CONFIG.head_dim * (CONFIG.n_heads + 2 * CONFIG.n_kv_heads)
    rest = CONFIG.dim * CONFIG.head_dim * CONFIG.n_heads + 3 * CONFIG.dim * CONFIG.hidden_dim
    answers = 30 * n / (200 + 30 * n)                       # the last block's rest and the head see these only
    return 4e-6 * (CONFIG.n_layers * qkv + (CONFIG.n_layers - 1 + answers) * rest + answers * CONFIG.dim * CONFIG.vocab_size)


def main() -> None:
    """Measure in turn, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="", help="a .png")
    args = parser.parse_args()
    model = apply_lora(Llama(CONFIG).init_weights(0), LoraConfig(rank=16, alpha=32)).train()
    plain, found = Llama(CONFIG).init_weights(0), {}
    for number in range(args.rounds + 1):                   # the first round warms up
        for name, (work, sizes) in SERIES.items():
            for n in sizes:
                seconds = work(plain if name == "slots" else model, n)
                if number:
                    found.setdefault((name, n), []).append(1e6 * seconds)
    print(f"{torch.get_num_threads()} threads, {args.rounds} rounds; microseconds per useful token\n\n| | | median | lowest | highest | million operations |\n|---|---|---|---|---|---|")
    for (name, n), values in found.items():
        print(f"| {name} | {n} | {statistics.median(values):.0f} | {min(values):.0f} | {max(values):.0f} | {f'{operations(n):.1f}' if 'answers' in name else ''} |")
    if args.out:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 3, figsize=(9, 3), layout="constrained", dpi=160)
        for axis, (name, (_, sizes)) in zip(axes, SERIES.items()):
            middle = [statistics.median(found[name, n]) for n in sizes]
            around = [[m - min(found[name, n]) for m, n in zip(middle, sizes)], [max(found[name, n]) - m for m, n in zip(middle, sizes)]]
            axis.errorbar(sizes, middle, yerr=around, marker="o", markersize=4, capsize=2, color="#4477aa")
            if "answers" in name:
                axis.plot(sizes, [middle[0] * operations(n) / operations(sizes[0]) for n in sizes], "--", color="#999999", label="by operations alone")
                axis.legend(frameon=False, loc="lower right")
            axis.set(xscale="log", xlabel=name, ylim=(0, None), title="µs per useful token" if name == "examples" else "")
            axis.set_xticks(sizes, sizes, minor=False)
            axis.minorticks_off()
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#dddddd")
        figure.savefig(args.out)


if __name__ == "__main__":
    main()
