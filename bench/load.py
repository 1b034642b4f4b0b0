"""How much memory does loading take beside the weights? A random checkpoint, in a fresh process.

    python bench/load.py                                   # 0.2 GB in one file, and in shards
    python bench/load.py --form single --layers 1          # does it run?
    python bench/load.py --shape llama2-7b --form shards --answer  # 13.5 GB, then a few tokens

ratio = (peak resident memory of the process - its memory before loading) / bytes of the loaded
weights. Files that are mapped count while they are mapped, as the system counts them. Linux only.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import work
from safetensors.torch import save_file

from extras.fast import accelerate
from extras.formats import open_model, save_model
from extras.formats.config import to_hf
from extras.formats.weights import make_empty
from model import Llama, ModelConfig, Sampling, generate
from tools.estimate import SHAPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMS = ("single", "shards")


def split_names(shapes: dict, form: str, most: float) -> list[list[str]]:
    """The names of the weights of each file, whose bytes are `most` at most."""
    files, room = [[]], most
    for name, shape in shapes.items():
        size = 2 * shape.numel()
        if form == "shards" and files[-1] and size > room:
            files.append([])
            room = most
        files[-1].append(name)
        room -= size
    return files


def write_random(folder: Path, config: ModelConfig, form: str, shard_bytes: float) -> None:
    """A random bfloat16 checkpoint, written file by file: shards are never in memory together."""
    shapes = {name: weight.shape for name, weight in make_empty(config).named_parameters()}
    total = 2 * sum(shape.numel() for shape in shapes.values())
    free = shutil.disk_usage(folder).free
    if free < 1.1 * total:
        sys.exit(f"error: {folder} has {free / 1e9:.1f} GB free, {1.1 * total / 1e9:.1f} are "
                 "needed. Give --work.")
    (folder / "config.json").write_text(json.dumps(to_hf(config, "bfloat16")))
    block, weight_map = torch.randn(2**20 + 7).mul(0.02).bfloat16(), {}
    files = split_names(shapes, form, shard_bytes)
    for number, names in enumerate(files, 1):
        tensors, file = {}, f"model-{number:05}-of-{len(files):05}.safetensors"
        if form == "single":
            file = "model.safetensors"
        for name in names:
            shape = shapes[name]
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 2:  # the same numbers again and again
                times = -(-shape.numel() // len(block))
                tensors[name] = block.repeat(times)[:shape.numel()].view(shape)
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if form == "shards":
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def measure(folder: str, dtype: torch.dtype, quantize: str, answer: bool) -> dict:
    """Load in this very process, after a tiny model, so that torch's own lazy parts are there."""
    with tempfile.TemporaryDirectory() as tiny:
        save_model(Llama(ModelConfig(**SHAPES["tiny"])).bfloat16(), tiny)
        open_model(tiny, dtype=dtype, quantize=quantize)
    before, began = work.memory("VmRSS"), time.time()
    model = open_model(folder, dtype=dtype, quantize=quantize)
    seconds, peak = time.time() - began, work.memory("VmHWM")
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    found = {"weights": weights, "before": before, "peak": peak, "seconds": round(seconds, 1),
             "ratio": round((peak - before) / weights, 4)}
    if answer:
        began = time.time()
        found["answer"] = generate(accelerate(model), [[1, 15, 43]], Sampling(4), eos_ids=[-1])[0]
        found["answer_seconds"] = round(time.time() - began, 1)
    return found


def describe(form: str, found: dict) -> str:
    """A line for what was measured."""
    taken = (found["peak"] - found["before"]) / 1e9
    text = (f"{form:7s} weights {found['weights'] / 1e9:.2f} GB, peak beside the program "
            f"{taken:.2f} GB, ratio {found['ratio']:.3f}, {found['seconds']} s")
    if "answer" in found:
        text += f"; {len(found['answer'])} tokens in {found['answer_seconds']} s"
    return text


def read_flags():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="of the model, instead of --layers, --dim")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--form", nargs="+", choices=FORMS, default=FORMS, help="of the files")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="to load into")
    parser.add_argument("--quantize", choices=("", "int8", "nf4"), default="")
    parser.add_argument("--answer", action="store_true", help="also generate four tokens")
    parser.add_argument("--shard-bytes", type=float, default=5e9,
                        help="of a shard (50 MB without --shape)")
    parser.add_argument("--work", default=tempfile.gettempdir(),
                        help="where the checkpoint is written, and removed again")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Write a checkpoint of each form, measure, remove it."""
    args = read_flags()
    if args.measure:
        found = measure(args.measure, DTYPES[args.dtype], args.quantize, args.answer)
        return print(json.dumps(found))
    config, shard_bytes = ModelConfig(
        vocab_size=8000, dim=args.dim, n_layers=args.layers, n_heads=args.dim // 64,
        n_kv_heads=args.dim // 64, head_dim=64, hidden_dim=4 * args.dim, norm_eps=1e-5), 50e6
    if args.shape:
        config, shard_bytes = ModelConfig(**SHAPES[args.shape]), args.shard_bytes
    for form in args.form:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            write_random(Path(folder), config, form, shard_bytes)
            command = [sys.executable, __file__, "--measure", folder, "--dtype", args.dtype,
                       "--quantize", args.quantize, *["--answer"] * args.answer]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout)
        print(json.dumps(found) if args.json else describe(form, found), flush=True)


if __name__ == "__main__":
    main()
