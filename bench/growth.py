"""Does the time for a token grow with the work: examples, responses, slots, long prompts?

    python bench/growth.py --out growth.png          # the table, and the plot if a file is given
    python bench/growth.py --only slots --quick      # does it run? one round of the smallest sizes

Each figure is the median of the rounds, in microseconds per useful token: one that is trained on,
generated or read. Of a group, these are the tokens of the prompt and of all its responses. The
growth exponent e is fitted: time per token = factor * size ** e. It is 0 where nothing grows.

In two series the arithmetic of a token grows, too: of a group, only responses go through the last
block's MLP and have logits; in a prompt, each token attends to all before it.
"""

import argparse
import math
import statistics
import time

import torch
import work

import data
from model import ModelConfig

CONFIG = ModelConfig(vocab_size=8000, dim=256, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64,
                     hidden_dim=688, context=8192)


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


def reading(model, n: int) -> float:
    """Seconds per token of reading 16,000 tokens in prompts of n, with one new token each."""
    found = [words(n, seed) for seed in range(16000 // n)]
    began = time.perf_counter()
    work.answer(model, found, [1] * len(found), batch_size=len(found))
    return (time.perf_counter() - began) / (n * len(found))


SERIES = {"examples": (examples, (100, 1000, 10000)),
          "answers in a group": (responses, (2, 4, 8, 16, 32)),
          "slots": (slots, (1, 4, 16, 64)),
          "prompt tokens": (reading, (100, 250, 500, 1000, 2000, 4000, 8000))}


def linears(share: float) -> float:
    """Multiplications per token in linear layers; only a share goes beyond the last attention."""
    c = CONFIG
    qkv = c.dim * c.head_dim * (c.n_heads + 2 * c.n_kv_heads)
    rest = c.dim * c.head_dim * c.n_heads + 3 * c.dim * c.hidden_dim
    return c.n_layers * qkv + (c.n_layers - 1 + share) * rest + share * c.dim * c.vocab_size


def group_operations(n: int) -> float:
    """Million operations per token, forward and backward, without adapters and attention."""
    return 4e-6 * linears(30 * n / (200 + 30 * n))


def prompt_operations(n: int) -> float:
    """Million operations per token of a prompt, which sees (n + 1) / 2 tokens on average."""
    queries = CONFIG.n_layers * CONFIG.n_heads * CONFIG.head_dim
    return 2e-6 * (linears(1 / n) + (n + 1) * queries)  # a product with the keys, one with values


OPERATIONS = {"answers in a group": group_operations, "prompt tokens": prompt_operations}


def measure(names: list[str], rounds: int, most: int) -> dict:
    """{name: {n: microseconds of each round}}; a first round warms up."""
    tuned = work.own_model(CONFIG, torch.float32, adapt=True)
    bare, found = work.own_model(CONFIG, torch.float32), {name: {} for name in names}
    for number in range(rounds + 1):
        for name in names:
            run, sizes = SERIES[name]
            for n in sizes[:most]:
                seconds = run(bare if name in ("slots", "prompt tokens") else tuned, n)
                if number:
                    found[name].setdefault(n, []).append(1e6 * seconds)
    return found


def summarise(name: str, values: dict[int, list[float]]) -> list[list[float]]:
    """Medians, lowest and highest figures, and operations where they are known: over the sizes."""
    columns = [[*map(f, values.values())] for f in (statistics.median, min, max)]
    if name in OPERATIONS:
        columns.append([OPERATIONS[name](n) for n in values])
    return columns


def fit(sizes, figures: list[float]) -> tuple[float, float]:
    """(e, height) of log(figure) = e * log(size) + height, by least squares."""
    return statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, figures)])


def exponent(sizes, figures: list[float]) -> str:
    """The growth exponent, in which -0.00 has no sign."""
    return f"{round(fit(sizes, figures)[0], 2) + 0.0:.2f}"


def print_series(name: str, values: dict[int, list[float]]) -> None:
    """A line of the table for each size, and one for the growth exponent of each column."""
    columns = summarise(name, values)
    for n, *figures in zip(values, *columns, strict=True):
        print(f"| {name} | {n} | {' | '.join(f'{x:.1f}' for x in figures)} |")
    exponents = " | ".join(exponent(values, column) for column in columns)
    print(f"| {name} | growth exponent | {exponents} |")


def plot(found: dict, path: str) -> None:
    """Median, range and fit of each series, beside what the operations alone would take."""
    from matplotlib import figure, style, ticker

    style.use(work.ROOT / "extras/reports/plots.mplstyle")
    page = figure.Figure(figsize=(8, 6))
    axes = page.subplots(-(-len(found) // 2), min(2, len(found)), sharey=True, squeeze=False)
    for axis, (name, values) in zip(axes.flat, found.items(), strict=False):
        sizes, (middle, lowest, highest, *operations) = list(values), summarise(name, values)
        slope, height = fit(sizes, middle)
        axis.vlines(sizes, lowest, highest, "C0")
        axis.loglog(sizes, middle, "C0o", markersize=4)
        fitted = [math.exp(height) * n**slope for n in sizes]
        axis.loglog(sizes, fitted, "C0", label=f"growth exponent {exponent(sizes, middle)}")
        for column in operations:
            label = f"by operations alone {exponent(sizes, column)}"
            axis.loglog(sizes, [middle[0] * x / column[0] for x in column], "k:", label=label)
        axis.legend()
        axis.set(xlabel=name, ylabel="µs per useful token", xticks=sizes, xticklabels=sizes)
        axis.yaxis.set(major_locator=ticker.LogLocator(subs=(1, 3)), major_formatter="{x:g}")
        axis.minorticks_off()
    page.savefig(path)


def main(argv: list[str] | None = None) -> None:
    """Measure in turn, print, plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SERIES, default=list(SERIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of two sizes each")
    parser.add_argument("--out", default="", help="a .png")
    args = parser.parse_args(argv)
    rounds = 1 if args.quick else args.rounds
    found = measure(args.only, rounds, 2 if args.quick else 9)
    print(f"{torch.get_num_threads()} threads, {rounds} rounds; microseconds per useful token\n"
          f"\n| | | median | lowest | highest | million operations |\n{'|---' * 6}|")
    for name, values in found.items():
        print_series(name, values)
    if args.out:
        plot(found, args.out)


if __name__ == "__main__":
    main()
