"""How fast is the project beside transformers, peft, trl and llama.cpp, and beside itself?

    python bench/speed.py                                  # all workloads, three rounds
    python bench/speed.py --only sft sample --dtypes float32 --rounds 1
    python bench/speed.py --only house --code DIR          # another checkout, --plain, and this
    python bench/speed.py --only sft --systems own --quick # does it run? one small round
    python bench/speed.py --profile sft own float32        # where the time of one goes

Each measurement is a process of its own: it builds the model, does the work once to warm up (not
for sample and house, which take long), then times it. Systems take turns, round by round. "limit"
is the share of what this machine's fastest matrix products allow for the same arithmetic
(measured in the same run); "grow" is how much memory the work took beyond the loaded model.
Weights and tokens are random; lengths are the same for everyone. "own --plain" is the course's
code without extras/.

    sft      16 ragged examples (mean 192 tokens, a quarter labelled), LoRA of rank 16 on all
             linears, AdamW included; useful tokens/s
    sample   80 prompts (mean 225 tokens, nothing in common), responses of imposed lengths (mean
             43, at most 96), temperature 1, 32 at a time; new tokens/s
    stream   one prompt of 64 tokens, 128 new ones, greedy, by a model that is ready to answer;
             new tokens/s
    rank     items of one better and three worse responses (40 tokens each) to one prompt of 300,
             LoRA, AdamW included; items/s
    judge    40 items of about 60 tokens behind one header of 600, two words asked; items/s
    house    the demo's main job, `train.py --stage cat`, with a quarter of its steps, questions
             and samples; jobs/h

Needs transformers, peft and trl; generate_batch needs transformers 5, llama.cpp the packages
xllamacpp and gguf. What is not installed is said.
"""

import argparse
import atexit
import contextlib
import gc
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import llamacpp
import peers
import torch
import work
from work import SHAPE, SIZES

JOB = {"--sft-steps": 100, "--steps": 25, "--pool-per-task": 5, "--eval-per-task": 4}
SMALL_JOB = {"--sft-steps": 4, "--steps": 2, "--pool-per-task": 1, "--eval-per-task": 1}
HELD = contextlib.ExitStack()  # what lasts as long as the process
atexit.register(HELD.close)
# of the measured processes; what extras/fast sets in this one is not for the peers
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


# ----- Our side -----
def own_model(dtype, plain: bool, adapt: bool = False):
    """The model of all workloads but house."""
    return work.own_model(work.shape(), dtype, adapt=adapt, plain=plain)


def sft(dtype, plain: bool = False, **settings):
    """A step of stage sft."""
    items = [{"documents": [row]} for row in work.documents()]
    return work.own_step(own_model(dtype, plain, adapt=True), items, **settings)


def sample(dtype, plain: bool = False):
    """Many responses."""
    model, (prompts, lengths) = own_model(dtype, plain), work.sample_work()
    return lambda: work.answer(model, prompts, lengths)


def stream(dtype, plain: bool = False, quantize: str = ""):
    """One response; the fast weights are laid out once for all of them, as in tools.chat."""
    model = own_model(dtype, plain)
    if quantize:
        model = quantized(model, quantize)
    if not plain:
        from extras.fast import prepacked

        HELD.enter_context(prepacked(model, 1))
    prompts, lengths = [work.tokens(64, 1)], [SIZES["stream"]]
    return lambda: work.answer(model, prompts, lengths, temperature=0.0)


def quantized(model, kind: str):
    """The model as it is opened with --quantize."""
    from extras.fast import accelerate
    from extras.formats import open_model, save_model

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        return accelerate(open_model(folder, dtype=model.lm_head.weight.dtype, quantize=kind))


def rank(dtype, plain: bool = False):
    """A step of stage cat."""
    return work.own_step(own_model(dtype, plain, adapt=True), work.rank_work(), "cat")


class Numbers:
    """A tokenizer whose text is the ids."""

    def encode_prompt(self, text):
        return [int(word) for word in text.split()]

    encode_continuation = encode_prompt


def judge(dtype, plain: bool = False):
    """What the self-judge asks."""
    from methods.examples import keyword_logprobs

    model, (header, items, words) = own_model(dtype, plain), work.judge_work()
    prefixes = [" ".join(map(str, header))] * len(items)
    suffixes = [" ".join(map(str, item)) for item in items]
    pairs = [tuple(f" {word}" for word in words)] * len(items)
    return lambda: keyword_logprobs(model, Numbers(), prefixes, suffixes, pairs)


def house(dtype, *more: str, code: str = ""):
    """The main job in this process, by the train.py of another checkout if `code` names one."""
    sys.path.insert(0, code or str(work.ROOT))
    import train

    flags = [str(word) for pair in JOB.items() for word in pair]

    def run():
        with tempfile.TemporaryDirectory() as out:
            status = train.main(["--stage", "cat", "--out", out, *flags, *more])
            if status:
                raise RuntimeError(f"train.py ended with status {status}")
            for stage in ("sft", "sft-ia", "."):  # how long the training took, and how it ended
                lines = Path(out, stage, "log.jsonl").read_text().splitlines()
                run.stages[json.loads(lines[-1])["stage"]] = json.loads(lines[-1])
    run.stages = {}
    return run


# ----- What is compared -----
PLAN = {  # {workload: {system: what builds the work for a dtype}}; the first is the default way
    "sft": {
        "peft padded (default)": peers.sft_padded,
        "peft sorted, rows of 4": partial(peers.sft_padded, rows=4, sort=True),
        "peft packed, labelled only": peers.sft_packed,
        "peft packed, adapters in the base's type": partial(peers.sft_packed,
                                                            float32_adapters=False),
        "trl SFTTrainer": peers.sft_trl,
        "own --plain": partial(sft, plain=True),
        "own": sft,
        "own --micro-tokens 512": partial(sft, micro_tokens=512),
    },
    "sample": {
        "generate (default)": partial(peers.sample, sort=False),
        "generate, sorted": partial(peers.sample, sort=True),
        "generate_batch": peers.sample_batch,
        "llama.cpp": llamacpp.sample,
        "own --plain": partial(sample, plain=True),
        "own": sample,
    },
    "stream": {
        "generate (default)": peers.stream,
        "generate, compiled": partial(peers.stream, cache_implementation="static"),
        "llama.cpp": llamacpp.stream,
        "llama.cpp q8_0": partial(llamacpp.stream, kind="q8_0"),
        "own --plain": partial(stream, plain=True),
        "own": stream,
        "own, int8": partial(stream, quantize="int8"),
    },
    "rank": {
        "peft, all logits (default)": partial(peers.rank, all_logits=True),
        "peft, answers' logits": partial(peers.rank, all_logits=False),
        "own --plain": partial(rank, plain=True),
        "own": rank,
    },
    "judge": {
        "naive (default)": partial(peers.judge, reuse=False),
        "cache reused by hand": partial(peers.judge, reuse=True),
        "own --plain": partial(judge, plain=True),
        "own": judge,
    },
    "house": {"own --plain": lambda dtype: house(dtype, "--plain"), "own": house},
}
UNITS = {"sft": "tok/s", "sample": "tok/s", "stream": "tok/s", "rank": "items/s",
         "judge": "items/s", "house": "jobs/h"}
HEADER = "| system | rate | spread | x default | x best peer | of the limit | grow, MB |"
EIGHT_BITS = ("own, int8", "llama.cpp q8_0")  # no peers of 16
NEEDS = {"llama.cpp": ("xllamacpp", "gguf"), "trl": ("trl", "datasets"), "peft": ("peft",),
         "generate": ("transformers",)}


# ----- Measuring -----
def timed(run, *, times: int, useful: float, warm: bool = True, **more) -> dict:
    """Warm up once, then the mean of some runs; memory beyond what was loaded before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building
    loaded = work.memory("VmRSS")
    if warm:
        run()
    began = time.perf_counter()
    for _ in range(times):
        run()
    seconds, peak = (time.perf_counter() - began) / times, work.memory("VmHWM")
    return {"rate": useful / seconds, "seconds": seconds, "grow": (peak - loaded) / 2**20, **more}


def profiled(run, *, warm: bool = True, **more) -> None:
    """Print which operators a run of the work spends its time in."""
    if warm:
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15,
                                       max_name_column_width=50))


def build(workload: str, system: str, dtype: str):
    """The work of a system, and its effort."""
    dtype = getattr(torch, dtype)
    if system.startswith("code "):
        run = house(dtype, code=system.removeprefix("code "))
    else:
        run = PLAN[workload][system](dtype)
    return run, work.effort(workload, system, dtype)


def be_worker(workload: str, system: str, dtype: str) -> None:
    """Measure in this process, and print what was found as JSON."""
    run, about = build(workload, system, dtype)
    found = timed(run, **about) | {"stages": getattr(run, "stages", {})}
    if system.startswith("llama.cpp"):  # whose memory and operations are not known here
        found = {key: found[key] for key in ("rate", "seconds")}
    print(json.dumps(found | {"cpu": sum(os.times()[:4])}))


def busy() -> float:
    """CPU seconds that all processes of the machine have used."""
    ticks = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:4])
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def measure(workload: str, system: str, dtype: str, args) -> dict:
    """One measurement in a process of its own; {"error": why} if a peer fails."""
    for prefix, names in NEEDS.items():
        lacking = [name for name in names if importlib.util.find_spec(name) is None]
        if system.startswith(prefix) and lacking:
            return {"error": f"not installed: {', '.join(lacking)}"}
    before, began = busy(), time.perf_counter()
    command = [sys.executable, __file__, "--worker", workload, system, dtype]
    command += ["--threads", str(args.threads)] + ["--quick"] * args.quick
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode or not last.startswith("{"):
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}
    found, elapsed = json.loads(last), time.perf_counter() - began
    return found | {"others": max(0.0, (busy() - before - found["cpu"]) / elapsed)}


def best_rate(run, amount: float) -> float:
    """The most of `amount` per second that a piece of work reaches in five tries."""
    run()
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        run()
        best = max(best, amount / (time.perf_counter() - began))
    return best


def limits(dtype) -> dict:
    """What this machine reaches: GFLOP/s of the fastest product of 1 to 512 rows, GB/s of reading.

    And GFLOP/s of 1, 32 and 512 rows through all weights of the model's size, as torch multiplies
    ("plain"), as extras/fast does while it trains ("train") and while it samples ("sample").
    """
    from extras.fast.cpu import FastLinear, prepacked

    n, size, found = 60, 512 * 1376, {"plain": [], "train": [], "sample": []}
    layers = torch.nn.ModuleList(FastLinear(512, 1376, bias=False) for _ in range(n))
    layers.to(dtype).requires_grad_(False)
    multiply, x, first = torch.nn.functional.linear, torch.randn(512, 512).to(dtype), layers[0]
    with torch.inference_mode():
        gflops = best_rate(lambda: [multiply(x, first.weight) for _ in range(40)],
                           40 * 2 * 512 * size / 1e9)
        for rows in (1, 32, 512):
            part, amount = x[:rows], n * 2 * rows * size / 1e9
            plain = best_rate(lambda p=part: [multiply(p, y.weight) for y in layers], amount)
            found["plain"].append(plain)
            found["train"].append(best_rate(lambda p=part: [y(p) for y in layers], amount))
            with prepacked(layers, rows):
                found["sample"].append(best_rate(lambda p=part: [y(p) for y in layers], amount))
        gbs = best_rate(lambda: [y.weight.view(torch.float32).sum() for y in layers],
                        n * first.weight.nbytes / 1e9)
    gflops = max(gflops, *itertools.chain(*found.values()))
    return {"gflops": gflops, "gbs": gbs, **found}


# ----- The tables -----
def table(rows: list[dict], limits: dict) -> str:
    """Markdown: for each workload and dtype a row per system, and what failed."""
    lines = []
    for workload, dtype in dict.fromkeys((row["workload"], row["dtype"]) for row in rows):
        found, errors = {}, {}
        for row in rows:
            if (row["workload"], row["dtype"]) != (workload, dtype):
                continue
            if "rate" in row:
                found.setdefault(row["system"], []).append(row)
            else:
                errors[row["system"]] = row["error"]
        lines.append(f"\n**{workload}, {dtype}** ({UNITS[workload]})\n")
        lines += [HEADER, "|---" * 7 + "|"]
        lines += system_lines(workload, found, limits.get(dtype))
        for system, part in found.items():
            if workload == "house":
                lines.append(f"\n{system}: {describe_job(part)}")
        lines += [f"\n{system}: {error}" for system, error in errors.items()]
    return "\n".join(lines)


def system_lines(workload: str, found: dict, limit: dict) -> list[str]:
    """A row per system: median of the rounds, ratios to the peers, share of the limit."""
    lines, rates, peer_rates = [], {}, []
    for system, part in found.items():
        rates[system] = statistics.median(row["rate"] for row in part)
        if not system.startswith("own") and system not in EIGHT_BITS:
            peer_rates.append(rates[system])
    default = rates.get(next(iter(PLAN[workload])))
    for system, part in found.items():
        rate, row = rates[system], part[0]
        every = [row["rate"] for row in part]
        cells = [system, f"{rate:.4g}", f"{100 * (max(every) - min(every)) / rate:.0f} %"]
        cells.append(f"{rate / default:.2f}" if default else "")
        fair = peer_rates and system not in EIGHT_BITS
        cells.append(f"{rate / max(peer_rates):.2f}" if fair else "")
        share = ""
        if "flops" in row:
            seconds = statistics.median(row["seconds"] for row in part)
            share = f"{row['flops'] / seconds / 1e7 / limit['gflops']:.0f} %"
        if "bytes" in row:
            share = f"{row['bytes'] * rate / 1e7 / limit['gbs']:.0f} %"
        cells.append(share)
        grow = [row["grow"] for row in part if "grow" in row]
        cells.append(f"{statistics.median(grow):.0f}" if grow else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def describe_job(part: list[dict]) -> str:
    """Where a job's time goes, medians of the rounds, and how its stages ended."""
    rest, words, ends = statistics.median(row["seconds"] for row in part), [], []
    for stage, last in part[0]["stages"].items():
        seconds = statistics.median(row["stages"][stage]["seconds"] for row in part)
        rest -= seconds
        words.append(f"{stage} {1000 * seconds / (last['step'] + 1):.0f} ms a step")
        ends.append(f"{stage} {last['ce']:.3f}")
    return f"{', '.join(words)}; all else {rest:.1f} s. Last losses: {', '.join(ends)}."


def read_flags(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PLAN, default=list(PLAN))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"),
                        default=["float32", "bfloat16"], help="house has float32 only")
    parser.add_argument("--systems", nargs="+", help="only these, by a part of their names")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--code", nargs="+", default=[], metavar="DIR",
                        help="checkouts that do the job of house, too")
    parser.add_argument("--quick", action="store_true",
                        help="a small model, little work, one round: only shows that it runs")
    parser.add_argument("--out", help="also append every measurement to this JSON Lines file")
    parser.add_argument("--profile", nargs=3, metavar=("WORK", "SYSTEM", "DTYPE"),
                        help="profile one instead of measuring all")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        SHAPE["n_layers"], args.rounds = 2, 1
        SIZES.update(work.SMALL)
        JOB.update(SMALL_JOB)
    return args


def jobs(args) -> list[tuple[str, str, str]]:
    """(workload, dtype, system) of every measurement of a round."""
    found = []
    for workload in args.only:
        systems = list(PLAN[workload])
        if workload == "house":
            systems += [f"code {Path(folder).resolve()}" for folder in args.code]
        for dtype in args.dtypes:
            for system in systems:
                wanted = not args.systems or any(part in system for part in args.systems)
                if wanted and (workload != "house" or dtype == "float32"):
                    found.append((workload, dtype, system))
    return found


def main() -> None:
    """Measure in turn, then print."""
    args, rows, reached = read_flags(), [], {}
    torch.set_num_threads(args.threads)
    if args.worker:
        return be_worker(*args.worker)
    if args.profile:
        run, about = build(*args.profile)
        return profiled(run, **about)
    if args.only != ["house"]:
        for dtype in args.dtypes:
            reached[dtype] = limit = limits(getattr(torch, dtype))
            print(f"{args.threads} threads, {dtype}: {limit['gflops']:.0f} GFLOP/s, "
                  f"{limit['gbs']:.1f} GB/s; GFLOP/s of 1, 32, 512 rows: "
                  + ", ".join(f"{kind} {' '.join(f'{x:.0f}' for x in limit[kind])}"
                              for kind in ("plain", "train", "sample")), flush=True)
    for number in range(1, args.rounds + 1):
        for workload, dtype, system in jobs(args):
            found = measure(workload, system, dtype, args)
            rows.append({"workload": workload, "dtype": dtype, "system": system,
                         "round": number, **found})
            said = found.get("error")
            if not said:
                said = (f"{found['rate']:.4g} {UNITS[workload]}, others used "
                        f"{found['others']:.2f} cores")
            print(f"round {number} {workload} {dtype} {system}: {said}", flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows, reached))
    loud = sum(row.get("others", 0) > 0.25 for row in rows)
    if loud:
        print(f"\nDuring {loud} of {len(rows)} measurements other programs used more than a "
              "quarter of a core.")


if __name__ == "__main__":
    main()
