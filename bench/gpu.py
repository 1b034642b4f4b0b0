"""What does one GPU give? LoRA training, one response, many, beside transformers and peft.

    python bench/gpu.py                              # 7B, bfloat16, random weights, 8 minutes
    python bench/gpu.py                              # again: only the rows that are missing
    python bench/gpu.py --shape tinyllama --rounds 3
    python bench/gpu.py --profile sft                # where the time of one goes
    python bench/gpu.py --only sft --device cpu --quick      # does it run? without a GPU

    sft      86 documents of 69 to 1,196 tokens, 32,768 in all, every token but the first a label;
             LoRA of rank 16 on all linears, AdamW; tokens/s
    stream   a prompt of 128 tokens, 128 new ones, greedy; new tokens/s
    sample   256 prompts (mean 247 tokens), responses of imposed lengths (mean 134, at most 512),
             temperature 1, 128 at a time; new tokens/s; 80 GB for 7B

Each row is a process of its own, with its own model; its first run warms up and is not counted. A
row that is done is kept in --out, so that a loan of a card that ends too early, or --minutes, costs
one row at most. Rows count if card, code, versions of the libraries and work are the same. Systems
take turns: ours, then the peers, work by work.

peft's adapters are float32 and so are their products, as is its default; ours are float32 and
multiply in the base's type. "limit" is measured here, too: for sft the rate of a plain product of
8,192 x 8,192 matrices, for stream the rate of reading and adding up numbers. "of the peak" is of
the rate that the maker gives for products of 16 bits (dense); a token counts as 4 operations per
weight that it meets. As a mark: NVIDIA's NeMo AutoModel reports 12,473 tokens/s for LoRA on Llama 3
8B with full rows of 4,096 on an H100, 41 % of its peak by their count and 38 % by this one.
"gb" is the most memory that the work took beside the weights (torch's own count; on a CPU there is
none). "own --plain" is the course's code.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import work
from peers import packed_rows, peer_model
from work import mask, padded, ragged

from extras.fast.attention import on_gpu
from model import Llama, ModelConfig
from tools.estimate import SHAPES


# ----- The work -----
def tokens(args, n: int, seed: int) -> list[int]:
    """n random token ids."""
    return work.tokens(n, seed, args.config.vocab_size)


def documents(args) -> list[list[int]]:
    """Documents of --tokens tokens in all."""
    found, left = [], args.tokens
    for seed, length in enumerate(ragged(left, 400, 64, min(2048, args.config.context), 1)):
        found.append(tokens(args, min(length, left), seed))
        left -= len(found[-1])
        if left < 2:
            break
    return found


def asked(args) -> tuple[list[list[int]], list[int]]:
    """The prompts of sample, and how long each response is to be."""
    lengths = ragged(args.prompts, 256, 32, 448, 2)
    prompts = [tokens(args, length, seed) for seed, length in enumerate(lengths)]
    return prompts, ragged(args.prompts, 128, 8, args.longest, 3)


# ----- Our side -----
def own(args, adapt: bool = False, plain: bool = False):
    """Our model."""
    return work.own_model(args.config, args.dtype, device=args.device, adapt=adapt, plain=plain)


def sft_own(args, **how):
    """A step of stage sft."""
    items = [{"documents": [work.document(ids[:1], ids[1:])]} for ids in documents(args)]
    return work.own_step(own(args, adapt=True, **how), items, device=args.device,
                         micro_tokens=args.micro_tokens)


def stream_own(args, **how):
    """One response."""
    model, prompts = own(args, **how), [tokens(args, 128, 1)]
    return lambda: work.answer(model, prompts, [args.new], temperature=0.0)


def sample_own(args, **how):
    """Many responses."""
    model, (prompts, lengths) = own(args, **how), asked(args)
    return lambda: work.answer(model, prompts, lengths, batch_size=128)


# ----- The peers -----
def peer(args, **how):
    """The model of transformers."""
    return peer_model(args.config, args.dtype, device=args.device, **how)


def sft_peer(args):
    """peft as trainers run it: sorted by length, padded batches of at most --micro-tokens."""
    model, rows = peer(args, adapt=True), [[]]
    made = sorted(documents(args), key=len)
    for ids in made:
        if rows[-1] and len(ids) * (len(rows[-1]) + 1) > args.micro_tokens:
            rows.append([])
        rows[-1].append(ids)
    total = torch.tensor(sum(len(ids) - 1 for ids in made), device=args.device)

    def loss():
        for row in rows:
            ids, real = padded(row, 0).to(args.device), mask(row).to(args.device)
            labels = ids.masked_fill(real == 0, -100)
            model(input_ids=ids, attention_mask=real, labels=labels, use_cache=False,
                  num_items_in_batch=total).loss.backward()
    return work.training_step(model, loss)


def sft_packed_peer(args):
    """peft on rows without padding of at most 2,048 tokens, by flash-attn if it is installed."""
    kernel = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    model = peer(args, adapt=True, attn_implementation=kernel)
    made = [{"input_ids": ids} for ids in documents(args)]
    rows, total = packed_rows(made, 2048), sum(len(x["input_ids"]) - 1 for x in made)

    def loss():
        for row in rows:
            ids, positions, labels = [], [], []
            for tokens_of in (x["input_ids"] for x in row):
                ids += tokens_of
                positions += range(len(tokens_of))
                labels += [*tokens_of[1:], -100]  # of the next token; none across documents
            ids, positions, labels = torch.tensor([[ids], [positions], [labels]]).to(args.device)
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
            ce = torch.nn.functional.cross_entropy(logits.float(), labels[0], reduction="sum")
            (ce / total).backward()
    return work.training_step(model, loss)


def stream_peer(args, **how):
    """`generate` on one prompt."""
    model, ids = peer(args), torch.tensor([tokens(args, 128, 1)], device=args.device)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                  max_new_tokens=args.new, eos_token_id=None, pad_token_id=0, **how)


def sample_peer(args):
    """`generate` on batches of 128, each of which runs to its longest.

    Sorted by the lengths of the responses, which a user would not know.
    """
    model, (prompts, lengths) = peer(args), asked(args)
    order = sorted(range(len(prompts)), key=lambda k: lengths[k])

    def run():
        for start in range(0, len(order), 128):
            part = order[start:start + 128]
            rows, most = [prompts[k] for k in part], max(lengths[k] for k in part)
            model.generate(padded(rows, 0, left=True).to(args.device), do_sample=True,
                           attention_mask=mask(rows, left=True).to(args.device), top_k=0,
                           temperature=1.0, max_new_tokens=most, eos_token_id=None, pad_token_id=0)
    return run


PLAN = {
    "sft": {"own": sft_own, "peft, padded, sorted": sft_peer,
            "peft, without padding": sft_packed_peer, "own --plain": partial(sft_own, plain=True)},
    "stream": {"own": stream_own, "generate": stream_peer,
               "generate, static cache": partial(stream_peer, cache_implementation="static"),
               "own --plain": partial(stream_own, plain=True)},
    "sample": {"own": sample_own, "generate, sorted": sample_peer,
               "own --plain": partial(sample_own, plain=True)},
}
# TFLOP/s of dense products of 16 bits, by the makers' data sheets; the first name that fits
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362,
         "L40": 181, "L4": 121, "4090": 165, "A10G": 70, "A10": 125, "T4": 65}


# ----- Measuring -----
MOST_SECONDS = 40  # no further round of a row begins after so many
LEAST_SECONDS = 20  # no row begins with less time than that
ROW_SECONDS = 150  # no row takes more


def seconds_of(run, device) -> float:
    """How long a run takes, until the device has finished it."""
    if on_gpu(device):
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if on_gpu(device):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def limits(args) -> tuple[float, float]:
    """TFLOP/s of a plain product, GB/s of reading."""
    size, numbers = (8192, 2**30) if on_gpu(args.device) else (512, 2**24)
    a, b = torch.randn(2, size, size, device=args.device).to(args.dtype)
    x = torch.ones(numbers, device=args.device)
    product = min(seconds_of(lambda: a @ b, args.device) for _ in range(10))
    reading = min(seconds_of(x.sum, args.device) for _ in range(10))
    return 2 * size**3 / 1e12 / product, x.nbytes / 1e9 / reading


def measure(args, build) -> dict:
    """Seconds of the rounds after a first one, and the GB that the work took beside the weights."""
    run = build(args)
    if on_gpu(args.device):
        loaded = torch.cuda.memory_allocated(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
    seconds = [seconds_of(run, args.device)]
    while len(seconds) <= args.rounds and (len(seconds) < 2 or sum(seconds) < MOST_SECONDS):
        seconds.append(seconds_of(run, args.device))
    found = {"seconds": seconds[1:]}
    if on_gpu(args.device):
        found["gb"] = (torch.cuda.max_memory_allocated(args.device) - loaded) / 1e9
    return found


def be_worker(args) -> None:
    """Measure one row in this process, and print it as JSON."""
    name = torch.cuda.get_device_name(args.device) if on_gpu(args.device) else "CPU"
    if args.worker == ["limits"]:
        tflops, gbs = limits(args)
        found = {"tflops": tflops, "gbs": gbs}
    else:
        found = measure(args, PLAN[args.worker[0]][args.worker[1]])
    print(json.dumps({"name": name, **found}))


def start_worker(args, row: list[str], seconds: float) -> dict:
    """Measure one row in a process of its own; {"error": why} if it fails or takes too long."""
    command = [sys.executable, __file__, *args.words, "--worker", *row]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s", "slow": True}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode or not last.startswith("{"):
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}
    return json.loads(last)


def profile(args, run) -> None:
    """Print which operators the second run of the work spends its time in."""
    run()
    kinds, order = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if on_gpu(args.device):
        kinds, order = [*kinds, torch.profiler.ProfilerActivity.CUDA], "self_cuda_time_total"
    with torch.profiler.profile(activities=kinds) as found:
        seconds_of(run, args.device)
    print(found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))


def read_flags(words: list[str]):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [name for name in SHAPES if name != "tiny"]  # whose texts are too short for this
    parser.add_argument("--shape", choices=shapes, default="llama2-7b", help="of the model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=PLAN, default=list(PLAN))
    parser.add_argument("--systems", nargs="+", help="only these, by a part of their names")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32768, help="of a step of sft")
    parser.add_argument("--micro-tokens", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=256, help="of sample")
    parser.add_argument("--minutes", type=float, default=8, help="for all that is missing")
    parser.add_argument("--out", default="runs/gpu.jsonl", help="keeps the rows that are done")
    parser.add_argument("--quick", action="store_true",
                        help="the demo's shape, little work, one round: only shows that it runs")
    parser.add_argument("--profile", choices=PLAN, help="profile this instead of measuring")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.words, args.new, args.longest = words, 128, 512
    if args.quick:
        args.shape, args.rounds, args.tokens, args.micro_tokens = "demo", 1, 1500, 800
        args.prompts, args.new, args.longest = 4, 8, 16
    if on_gpu(args.device) and not torch.cuda.is_available():
        sys.exit(f"error: --device {args.device}, and torch {torch.__version__} finds no GPU here. "
                 "Give --device cpu, or install torch's CUDA build.")
    # rows of other work, or of another torch, are other rows
    args.about = {name: getattr(args, name) for name in
                  ("shape", "device", "dtype", "rounds", "tokens", "micro_tokens", "prompts")}
    args.about |= {"quick": args.quick, "code": hash_code()}
    for name in ("torch", "transformers", "peft"):
        found = importlib.util.find_spec(name)
        args.about[name] = importlib.metadata.version(name) if found else None
    args.dtype, args.config = getattr(torch, args.dtype), ModelConfig(**SHAPES[args.shape])
    return args


def count_weights(config) -> int:
    """The parameters that every token meets: all but the embedding."""
    with torch.device("meta"):
        model = Llama(config)
    embedding = model.model.embed_tokens.weight.numel()
    return sum(weight.numel() for weight in model.parameters()) - embedding


def hash_code() -> str:
    """What changes when the code that is measured does."""
    files = []
    for pattern in ("*.py", "methods/*.py", "extras/fast/*.py", "bench/*.py"):
        files += work.ROOT.glob(pattern)
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def read_rows(args, name: str) -> dict:
    """{(work, system): row} of --out, as far as it is about the same work on the card `name`."""
    found, path = {}, Path(args.out)
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # a line that was cut off
            row = json.loads(line)
            if row["about"] == args.about and row["name"] == name:
                found[tuple(row["row"])] = row
    return found


def fill_in(args) -> dict:
    """Measure the rows that are missing, for --minutes; {(work, system): row} of all."""
    end, wanted = time.monotonic() + 60 * args.minutes, []
    limit = start_worker(args, ["limits"], ROW_SECONDS)
    if "error" in limit:
        sys.exit(f"error: this card's limits could not be measured: {limit['error']}")
    rows = read_rows(args, limit["name"])
    for workload in args.only:
        for system in PLAN[workload]:
            if not args.systems or any(part in system for part in args.systems):
                wanted.append((workload, system))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    for row in sorted(wanted, key=lambda row: row in rows):  # what was too slow comes last
        if row not in rows or "error" in rows[row]:
            left = min(ROW_SECONDS, end - time.monotonic())
            found = {"error": "there was no time left for it"}
            if left > LEAST_SECONDS:
                found = start_worker(args, list(row), left)
            rows[row] = {"row": list(row), "about": args.about, "name": limit["name"]} | found
            if "error" not in found or "slow" in found:
                with open(args.out, "a") as file:
                    file.write("\n" + json.dumps(rows[row]) + "\n")
        print(f"{', '.join(row)}: {rows[row].get('error', 'done')}", file=sys.stderr, flush=True)
    return {("limits",): limit} | {row: rows[row] for row in wanted}


def find_peak(name: str) -> int | None:
    """TFLOP/s of a card by its name; None for one that is not known."""
    return next((peak for card, peak in PEAKS.items() if re.search(rf"\b{card}\b", name)), None)


def table(args, rows: dict) -> str:
    """Markdown: a row for each system; what failed stands below."""
    limit, weights, errors = rows.pop(("limits",)), count_weights(args.config), []
    peak = find_peak(limit["name"]) if args.dtype.itemsize == 2 else None
    useful = {"sft": args.tokens, "stream": args.new, "sample": sum(asked(args)[1])}
    most = {"sft": limit["tflops"] * 1e12 / (4 * weights),
            "stream": limit["gbs"] * 1e9 / (weights * args.dtype.itemsize)}
    lines = [f"{limit['name']}, torch {torch.__version__}, {args.shape}, {str(args.dtype)[6:]}: "
             f"products {limit['tflops']:.3g} TFLOP/s, reading {limit['gbs']:.4g} GB/s\n",
             "| work | system | rate | spread | x best peer | of the limit | of the peak | gb |",
             "|---" * 8 + "|"]
    rates = {row: useful[row[0]] / statistics.median(found["seconds"])
             for row, found in rows.items() if "error" not in found}
    for (workload, system), found in rows.items():
        if "error" in found:
            errors.append(f"\n{workload}, {system}: {found['error']}")
            continue
        rate, seconds = rates[workload, system], found["seconds"]
        peers = [rate for (work, name), rate in rates.items()
                 if work == workload and not name.startswith("own")]
        share = (max(seconds) - min(seconds)) / statistics.median(seconds)
        cells = [workload, system, f"{rate:.4g}", f"{100 * share:.0f} %",
                 f"{rate / max(peers):.2f}" if peers else "",
                 f"{100 * rate / most[workload]:.0f} %" if workload in most else ""]
        trained = peak and workload == "sft"
        cells.append(f"{100 * rate * 4 * weights / peak / 1e12:.0f} %" if trained else "")
        cells.append(f"{found['gb']:.1f}" if "gb" in found else "")
        lines.append(f"| {' | '.join(cells)} |")
    if any("no time" in error for error in errors):
        errors.append("\nRun the same command again for the rows that had no time.")
    return "\n".join(lines + errors)


def main() -> None:
    """Measure what is missing, and print all."""
    args = read_flags(sys.argv[1:])
    if args.worker:
        be_worker(args)
    elif args.profile:
        profile(args, PLAN[args.profile]["own"](args))
    else:
        print(table(args, fill_in(args)))


if __name__ == "__main__":
    main()
