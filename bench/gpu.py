"""What does one GPU give? LoRA training, one response, many, beside transformers and peft.

    python bench/gpu.py                              # 7B, bfloat16, random weights, two rounds
    python bench/gpu.py --shape tinyllama --rounds 3
    python bench/gpu.py --profile sft                # where the time of one goes
    python bench/gpu.py --only sft --device cpu --quick      # does it run? without a GPU

    sft      86 documents of 69 to 1,196 tokens, 32,768 in all, every token but the first a label;
             LoRA of rank 16 on all linears, AdamW; tokens/s
    stream   a prompt of 128 tokens, 128 new ones, greedy; new tokens/s
    sample   256 prompts (mean 247 tokens), responses of imposed lengths (mean 134, at most 512),
             temperature 1, 128 at a time; new tokens/s; 80 GB for 7B

One system after the other in one process, each with its own model; the first run of each warms up
and is not counted. peft's adapters are float32 and so are their products, as is its default; ours
are float32 and multiply in the base's type. "limit" is measured here, too: for sft the rate of a
plain product of 8,192 x 8,192 matrices, for stream the rate of reading and adding up numbers. "gb"
is the most memory that the work took beside the weights (torch's own count; on a CPU there is
none). peft and transformers are needed for their rows only. "own --plain" is the course's code.
"""

import argparse
import gc
import importlib.util
import statistics
import sys
import time
from functools import partial

import torch
import work
from peers import peer_model
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
def peer(args, adapt: bool = False):
    """The model of transformers."""
    return peer_model(args.config, args.dtype, device=args.device, adapt=adapt)


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
    "sft": {"peft, padded, sorted": sft_peer, "own --plain": partial(sft_own, plain=True),
            "own": sft_own},
    "stream": {"generate": stream_peer,
               "generate, static cache": partial(stream_peer, cache_implementation="static"),
               "own --plain": partial(stream_own, plain=True), "own": stream_own},
    "sample": {"generate, sorted": sample_peer, "own --plain": partial(sample_own, plain=True),
               "own": sample_own},
}


# ----- Measuring -----
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


def measure(args, build) -> tuple[list[float], float | None]:
    """Seconds of each round after a first one, and the GB that the work took beside the weights."""
    run, taken = build(args), None
    if on_gpu(args.device):
        loaded = torch.cuda.memory_allocated(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
    seconds = [seconds_of(run, args.device) for _ in range(args.rounds + 1)]
    if on_gpu(args.device):
        taken = (torch.cuda.max_memory_allocated(args.device) - loaded) / 1e9
    return seconds[1:], taken


def profile(args, run) -> None:
    """Print which operators the second run of the work spends its time in."""
    run()
    kinds, order = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if on_gpu(args.device):
        kinds, order = [*kinds, torch.profiler.ProfilerActivity.CUDA], "self_cuda_time_total"
    with torch.profiler.profile(activities=kinds) as found:
        seconds_of(run, args.device)
    print(found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))


def read_flags():
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
    parser.add_argument("--quick", action="store_true",
                        help="the demo's shape, little work, one round: only shows that it runs")
    parser.add_argument("--profile", choices=PLAN, help="profile this instead of measuring")
    args = parser.parse_args()
    args.new, args.longest = 128, 512
    if args.quick:
        args.shape, args.rounds, args.tokens, args.micro_tokens = "demo", 1, 1500, 800
        args.prompts, args.new, args.longest = 4, 8, 16
    if on_gpu(args.device) and not torch.cuda.is_available():
        sys.exit(f"error: --device {args.device}, and torch {torch.__version__} finds no GPU here. "
                 "Give --device cpu, or install torch's CUDA build.")
    args.dtype, args.config = getattr(torch, args.dtype), ModelConfig(**SHAPES[args.shape])
    return args


def count_weights(config) -> int:
    """The parameters that every token meets: all but the embedding."""
    with torch.device("meta"):
        model = Llama(config)
    embedding = model.model.embed_tokens.weight.numel()
    return sum(weight.numel() for weight in model.parameters()) - embedding


def main() -> None:
    """Measure and print."""
    args = read_flags()
    if args.profile:
        return profile(args, PLAN[args.profile]["own"](args))
    (tflops, gbs), weights, name = limits(args), count_weights(args.config), "CPU"
    if on_gpu(args.device):
        name = torch.cuda.get_device_name(args.device)
    print(f"{name}, torch {torch.__version__}, {args.shape}, {str(args.dtype)[6:]}: products "
          f"{tflops:.3g} TFLOP/s, reading {gbs:.4g} GB/s\n\n"
          f"| work | system | rate | spread | x the first | of the limit | gb |\n{'|---' * 7}|")
    useful = {"sft": args.tokens, "stream": args.new, "sample": sum(asked(args)[1])}
    limit = {"sft": tflops * 1e12 / (4 * weights),
             "stream": gbs * 1e9 / (weights * args.dtype.itemsize)}
    for workload in args.only:
        first = None
        for system, build in PLAN[workload].items():
            if args.systems and not any(part in system for part in args.systems):
                continue
            cells = [workload, system]
            if system.startswith("own") or (importlib.util.find_spec("peft")
                                            and importlib.util.find_spec("transformers")):
                seconds, taken = measure(args, build)
                middle, spread = statistics.median(seconds), max(seconds) - min(seconds)
                rate = useful[workload] / middle
                first = first or rate
                cells += [f"{rate:.4g}", f"{100 * spread / middle:.0f} %", f"{rate / first:.2f}"]
                cells.append(f"{100 * rate / limit[workload]:.0f} %" if workload in limit else "")
                cells.append(f"{taken:.1f}" if taken is not None else "")
            else:
                cells += ["transformers or peft is not installed"] + [""] * 4
            print(f"| {' | '.join(cells)} |", flush=True)
            gc.collect()  # the model of this row goes before the next comes
            if on_gpu(args.device):
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
