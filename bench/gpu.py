"""What does one GPU give? LoRA training, one answer, many answers, beside transformers and peft, and as shares of what the device can do.

    python bench/gpu.py                                     # 7B, bfloat16, random weights, two rounds
    python bench/gpu.py --preset tinyllama --rounds 3
    python bench/gpu.py --profile sft                       # where the time of one goes
    python bench/gpu.py --preset demo --device cpu --dtype float32 --rounds 1        # does the script run?

    sft      86 documents of 69 to 1,196 tokens, 32,768 in all, every token but the first a label; LoRA of rank 16 on all linears, AdamW; tokens/s
    stream   a prompt of 128 tokens, 128 new ones, greedy; new tokens/s
    sample   256 prompts (mean 247 tokens), answers of imposed lengths (mean 134, at most 512), temperature 1, 128 at a time; new tokens/s; 80 GB for 7B

One system after the other in one process, each with its own model; the first run of each warms up and is not counted. peft's adapters are float32 and
so are their products, as is its default; ours are float32 and multiply in the base's type. "limit" is measured here, too: for
sft the rate of a plain product of 8,192 x 8,192 matrices, for stream the rate of reading and adding up numbers. "gb" is the most memory that the
work took beside the weights (torch's own count; on a CPU there is none). peft and transformers are needed for their rows only.
"""
import argparse
import contextlib
import gc
import importlib.util
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch                                                # noqa: E402

import data                                                 # noqa: E402
import train                                                # noqa: E402
from lora import LoraConfig, apply_lora                     # noqa: E402
from model import PRESETS, Llama, generate, on_gpu          # noqa: E402
from speed import padded, ragged, stepped                   # noqa: E402


def tokens(config, n: int, seed: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(3, config.vocab_size) for _ in range(n)]


def documents(config, total: int) -> list[list[int]]:
    """Documents of `total` tokens in all."""
    found, left, longest = [], total, min(2048, config.max_position_embeddings)
    for k, length in enumerate(ragged(total, 400, 64, longest, 1)):
        found.append(tokens(config, min(length, left), k))
        left -= len(found[-1])
        if left < 2:
            return found


def wait(device) -> None:
    if on_gpu(device):
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def default_dtype(dtype):
    """Inside, new parameters are of this type."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def own_model(args, adapt: bool):
    with torch.device(args.device), default_dtype(args.dtype):
        model = Llama(PRESETS[args.preset])                 # random, as torch makes it
    return apply_lora(model, LoraConfig(rank=16, alpha=32, dropout=0.0)).train() if adapt else model.eval()


def peer_model(args, adapt: bool):
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    keys = {key: value for key, value in PRESETS[args.preset].to_hf().items() if key not in ("torch_dtype", "architectures", "model_type")}
    config = transformers.LlamaConfig(**keys, attn_implementation="sdpa")
    with torch.device(args.device), default_dtype(args.dtype):
        model = transformers.LlamaForCausalLM(config)
    return peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train() if adapt else model.eval()


def sft_own(args):
    model, cfg = own_model(args, adapt=True), train.TrainConfig(stage="sft", micro_tokens=args.micro_tokens)
    groups = [{"documents": [{"input_ids": ids, "labels": [-100] + ids[1:], "cut": False}]} for ids in documents(model.config, args.tokens)]
    return stepped(model, lambda: train.backward(model, train.STAGES["sft"], [train.collate(part, args.device) for part in data.micro_batches(groups, cfg.micro_tokens)], cfg))


def sft_peer(args):
    """peft as a trainer runs it: documents sorted by length, padded batches of at most --micro-tokens places."""
    model, rows = peer_model(args, adapt=True), [[]]
    made = sorted(documents(PRESETS[args.preset], args.tokens), key=len)
    for ids in made:
        if rows[-1] and len(ids) * (len(rows[-1]) + 1) > args.micro_tokens:
            rows.append([])
        rows[-1].append(ids)
    total = torch.tensor(sum(len(ids) - 1 for ids in made), device=args.device)

    def loss():
        for row in rows:
            ids, mask = padded(row, 0).to(args.device), padded([[1] * len(part) for part in row], 0).to(args.device)
            model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False, num_items_in_batch=total).loss.backward()
    return stepped(model, loss)


def stream_own(args, compiling: bool = False):
    model = own_model(args, adapt=False)
    model.compiling = compiling
    return lambda: generate(model, [tokens(model.config, 128, 1)], max_new_tokens=128, eos_ids=())


def stream_peer(args, **how):
    model, ids = peer_model(args, adapt=False), torch.tensor([tokens(PRESETS[args.preset], 128, 1)], device=args.device)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=128, eos_token_id=None, pad_token_id=0, **how)


def asked(args) -> tuple[list[list[int]], list[int]]:
    """The prompts of sample, and how long each answer is to be."""
    config = PRESETS[args.preset]
    return [tokens(config, length, k) for k, length in enumerate(ragged(args.prompts, 256, 32, 448, 2))], ragged(args.prompts, 128, 8, 512, 3)


def sample_own(args):
    model, (prompts, most) = own_model(args, adapt=False), asked(args)
    return lambda: generate(model, prompts, max_new_tokens=most, temperature=1.0, eos_ids=(), batch_size=128)


def sample_peer(args):
    """generate on batches of 128, sorted by the answers' lengths, which a user would not know; each batch runs to its longest."""
    model, (prompts, most) = peer_model(args, adapt=False), asked(args)
    order = sorted(range(len(prompts)), key=lambda k: most[k])

    def work():
        for start in range(0, len(order), 128):
            part = order[start:start + 128]
            ids, mask = (padded(rows, 0, left=True).to(args.device) for rows in ([prompts[k] for k in part], [[1] * len(prompts[k]) for k in part]))
            model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=max(most[k] for k in part), eos_token_id=None, pad_token_id=0)
    return work


PLAN = {
    "sft": {"peft, padded, sorted": sft_peer, "own": sft_own},
    "stream": {"generate": stream_peer, "generate, static cache": lambda args: stream_peer(args, cache_implementation="static"), "own": stream_own,
               "own, compiled": lambda args: stream_own(args, True)},
    "sample": {"generate, sorted": sample_peer, "own": sample_own},
}


def limits(args) -> tuple[float, float]:
    """TFLOP/s of a plain product, GB/s of reading."""
    size = 8192 if on_gpu(args.device) else 512
    a, b = (torch.randn(size, size, device=args.device).to(args.dtype) for _ in range(2))
    x = torch.ones(2**30 if on_gpu(args.device) else 2**24, device=args.device)
    found = []
    for work, amount in ((lambda: a @ b, 2 * size**3 / 1e12), (x.sum, x.nbytes / 1e9)):
        best = 0.0
        for _ in range(10):
            wait(args.device)
            began = time.perf_counter()
            work()
            wait(args.device)
            best = max(best, amount / (time.perf_counter() - began))
        found.append(best)
    return tuple(found)


def measure(args, build) -> tuple[list[float], float]:
    """Seconds of each round behind a first one, and the gigabytes that the work took beside the weights."""
    work, seconds, loaded = build(args), [], 0
    if on_gpu(args.device):
        loaded = torch.cuda.memory_allocated(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
    for _ in range(args.rounds + 1):
        wait(args.device)
        began = time.perf_counter()
        work()
        wait(args.device)
        seconds.append(time.perf_counter() - began)
    took = (torch.cuda.max_memory_allocated(args.device) - loaded) / 1e9 if on_gpu(args.device) else 0.0
    return seconds[1:], took


def profile(args, work) -> None:
    """Print which operators the second run of the work spends its time in."""
    work()
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu(args.device)
    with torch.profiler.profile(activities=kinds) as found:
        work()
        wait(args.device)
    print(found.key_averages().table(sort_by=f"self_{'cuda' if on_gpu(args.device) else 'cpu'}_time_total", row_limit=20, max_name_column_width=60))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=[name for name in PRESETS if name != "tiny"], default="llama2-7b")      # whose texts are too short for this
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=PLAN, default=list(PLAN))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32768, help="of a step of sft")
    parser.add_argument("--micro-tokens", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=256, help="of sample")
    parser.add_argument("--profile", choices=PLAN, help="profile this instead of measuring")
    args = parser.parse_args()
    if on_gpu(args.device) and not torch.cuda.is_available():
        sys.exit(f"error: --device {args.device}, and torch {torch.__version__} finds no GPU here. Give --device cpu, or install torch's CUDA build.")
    args.dtype = getattr(torch, args.dtype)
    if args.profile:
        return profile(args, PLAN[args.profile]["own"](args))
    tflops, gbs = limits(args)
    config = PRESETS[args.preset]
    with torch.device("meta"):
        weights = sum(p.numel() for name, p in Llama(config).named_parameters() if "embed_tokens" not in name)
    name = torch.cuda.get_device_name(args.device) if on_gpu(args.device) else "CPU"
    print(f"{name}, torch {torch.__version__}, {args.preset}, {str(args.dtype)[6:]}: products {tflops:.3g} TFLOP/s, reading {gbs:.4g} GB/s\n", flush=True)
    print("| work | system | rate | spread | x the first | of the limit | gb |\n" + "|---" * 7 + "|", flush=True)
    useful = {"sft": args.tokens, "stream": 128, "sample": sum(asked(args)[1])}
    for workload in args.only:
        first = None
        for system, build in PLAN[workload].items():
            if not system.startswith("own") and not (importlib.util.find_spec("transformers") and importlib.util.find_spec("peft")):
                print(f"| {workload} | {system} | transformers or peft is not installed | | | | |", flush=True)
                continue
            seconds, took = measure(args, build)
            gc.collect()                                    # the model of this row goes before the next comes
            if on_gpu(args.device):
                torch.cuda.empty_cache()
            rate = useful[workload] / statistics.median(seconds)
            first = first or rate
            share = {"sft": 4 * weights * rate / tflops / 1e10, "stream": weights * args.dtype.itemsize * rate / gbs / 1e7}.get(workload)
            print(f"| {workload} | {system} | {rate:.4g} | {100 * (max(seconds) - min(seconds)) / statistics.median(seconds):.0f} % | {rate / first:.2f} | "
                  f"{'' if share is None else f'{share:.0f} %'} | {f'{took:.1f}' if on_gpu(args.device) else ''} |", flush=True)


if __name__ == "__main__":
    main()
