"""Does the time for a token grow with the work: with examples, with responses, with slots?

    python bench/growth.py --out growth.png          # the table, and the plot if a file is given
    python bench/growth.py --only slots --quick      # does it run? one round of the smallest sizes

Each figure is the median of the rounds, in microseconds per useful token: one that is trained on
or generated, or, for groups, that stands in the prompt or in a response (a prompt counts once,
however many responses share it). Only responses go through the last block's MLP and have logits, so
a token of a group with more of them costs more arithmetic. The table says how much, and the plot
what would follow from that alone.
"""

import argparse
import statistics
import time

import torch
import work

import data
from model import ModelConfig

CONFIG = ModelConfig(vocab_size=8000, dim=256, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64,
                     hidden_dim=688, context=2048)
COLUMNS = ("", "", "median", "lowest", "highest", "million operations")


def words(n: int, seed: int) -> list[int]:
    """n random token ids."""
    return [token % CONFIG.vocab_size for token in work.tokens(n, seed)]


def train(run, items: list[dict], n: int) -> float:
    """Seconds of n steps of the loop's own work: choosing, packing, forward, backward."""
    data.permutation.cache_clear()
    began = time.perf_counter()
    for step in range(n):
        chosen = data.batch_indices(len(items), run.cfg.batch_size, step, 0)
        work.gradients(run, [items[index] for index in chosen])
        run.model.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def examples(model, n: int) -> float:
    """Seconds per token of 6 steps of sft over n examples."""
    lengths, items, seen = work.ragged(n, 96, 16, 320, 1), [], 0
    for seed, length in enumerate(lengths):
        row = work.document(words(length - length // 4, seed), words(length // 4, -seed))
        items.append({"documents": [row]})
    for step in range(6):
        seen += sum(lengths[index] for index in data.batch_indices(n, 16, step, 0))
    return train(work.make_run(model, "sft", batch_size=16), items, 6) / seen


def responses(model, n: int) -> float:
    """Seconds per token of a step of cat with 64 responses, n to a prompt."""
    items = []
    for seed in range(64 // n):
        made = [words(30, 100 * seed + j) for j in range(n)]
        items.append(work.ranked_item(words(200, seed), made))
    run = work.make_run(model, "cat", batch_size=len(items))
    return train(run, items, 1) / (len(items) * (200 + 30 * n))


def slots(model, n: int) -> float:
    """Seconds per new token of 64 responses, n at a time."""
    prompts, lengths = [words(40, seed) for seed in range(64)], work.ragged(64, 24, 4, 60, 3)
    began = time.perf_counter()
    work.answer(model, prompts, lengths, batch_size=n)
    return (time.perf_counter() - began) / sum(lengths)


SERIES = {"examples": (examples, (100, 1000, 10000)),
          "answers in a group": (responses, (2, 4, 8, 16, 32)),
          "slots": (slots, (1, 4, 16, 64))}


def operations(n: int) -> float:
    """Million operations per useful token of a group of n responses, forward and backward.

    Without those of adapters and attention.
    """
    c = CONFIG
    qkv = c.dim * c.head_dim * (c.n_heads + 2 * c.n_kv_heads)
    rest = c.dim * c.head_dim * c.n_heads + 3 * c.dim * c.hidden_dim
    share = 30 * n / (200 + 30 * n)  # of tokens that the last block's rest and the head see
    head = share * c.dim * c.vocab_size
    return 4e-6 * (c.n_layers * qkv + (c.n_layers - 1 + share) * rest + head)


def measure(names: list[str], rounds: int, most: int) -> dict:
    """{name: {n: microseconds of each round}}; a first round warms up."""
    tuned = work.own_model(CONFIG, torch.float32, adapt=True)
    plain, found = work.own_model(CONFIG, torch.float32), {name: {} for name in names}
    for number in range(rounds + 1):
        for name in names:
            run, sizes = SERIES[name]
            for n in sizes[:most]:
                seconds = run(plain if name == "slots" else tuned, n)
                if number:
                    found[name].setdefault(n, []).append(1e6 * seconds)
    return found


def plot(found: dict, path: str) -> None:
    """Median and range of each series, beside what the operations alone would take."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(3 * len(found), 3), squeeze=False,
                                   layout="constrained", dpi=160)
    for axis, (name, values) in zip(axes[0], found.items(), strict=True):
        sizes = list(values)
        middle = [statistics.median(values[n]) for n in sizes]
        below = [m - min(values[n]) for m, n in zip(middle, sizes, strict=True)]
        above = [max(values[n]) - m for m, n in zip(middle, sizes, strict=True)]
        axis.errorbar(sizes, middle, yerr=[below, above], marker="o", markersize=4, capsize=2,
                      color="#4477aa")
        if "answers" in name:
            scaled = [middle[0] * operations(n) / operations(sizes[0]) for n in sizes]
            axis.plot(sizes, scaled, "--", color="#999999", label="by operations alone")
            axis.legend(frameon=False, loc="lower right")
        axis.set(xscale="log", xlabel=name, ylim=(0, None))
        axis.set_xticks(sizes, sizes, minor=False)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd")
    axes[0, 0].set_title("µs per useful token")
    figure.savefig(path)


def main() -> None:
    """Measure in turn, print, plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SERIES, default=list(SERIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of two sizes each")
    parser.add_argument("--out", default="", help="a .png")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 1
    found = measure(args.only, args.rounds, 2 if args.quick else 9)
    print(f"{torch.get_num_threads()} threads, {args.rounds} rounds; microseconds per useful "
          f"token\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name, values in found.items():
        for n, every in values.items():
            cells = [name, n, *(round(f(every)) for f in (statistics.median, min, max)), ""]
            if "answers" in name:
                cells[-1] = f"{operations(n):.1f}"
            print(f"| {' | '.join(map(str, cells))} |")
    if args.out:
        plot(found, args.out)


if __name__ == "__main__":
    main()
