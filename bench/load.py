"""How much memory does loading take, beside the weights themselves? A random checkpoint, loaded in a fresh process.

    python bench/load.py                                           # 0.2 GB, each form
    python bench/load.py --preset llama2-7b --form shards --answer # 13.5 GB of bfloat16 in shards, then a few tokens

ratio = (peak resident memory of the process - its memory before loading) / bytes of the loaded weights. Files that are
mapped count while they are mapped, as the system counts them. Linux only: the figures are those of /proc/self/status.
"""
import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch                                                # noqa: E402
from safetensors.torch import save_file                     # noqa: E402

from model import PRESETS, Llama, ModelConfig, generate, load_model, save_meta, save_model    # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, what is resident now; VmHWM, the most there ever was."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def write_random(folder: Path, config: ModelConfig, form: str, shard_bytes: int) -> int:
    """A random bfloat16 checkpoint, written shard by shard so that it never is in memory whole; returns its bytes."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Llama(config).named_parameters()}
    total = 2 * sum(shape.numel() for shape in shapes.values())
    if shutil.disk_usage(folder).free < 1.1 * total:
        raise SystemExit(f"error: {folder} has {shutil.disk_usage(folder).free / 1e9:.1f} GB free, {1.1 * total / 1e9:.1f} are needed. Give --work.")
    if form == "meta":
        save_meta(Llama(config).init_weights(0).bfloat16(), folder)
        return total
    (folder / "config.json").write_text(json.dumps(config.to_hf("bfloat16")))
    block, shards, weight_map = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16(), [[]], {}
    for name, shape in shapes.items():
        if form == "shards" and shards[-1] and 2 * sum(shapes[x].numel() for x in [*shards[-1], name]) > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    for number, names in enumerate(shards, 1):
        tensors = {name: block.repeat(-(-shapes[name].numel() // len(block)))[:shapes[name].numel()].view(shapes[name])
                   if len(shapes[name]) == 2 else torch.ones(shapes[name], dtype=torch.bfloat16) for name in names}
        file = {"bin": "pytorch_model.bin", "single": "model.safetensors"}.get(form, f"model-{number:05}-of-{len(shards):05}.safetensors")
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, folder / file) if form == "bin" else save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if form == "shards":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def measure(folder: str, dtype: str, quantize: str, answer: bool) -> dict:
    """Load in this very process, which has only loaded a tiny model before, so that torch's own lazy parts are there."""
    with tempfile.TemporaryDirectory() as tiny:
        save_model(Llama(PRESETS["tiny"]).init_weights(0).bfloat16(), tiny)
        load_model(tiny, dtype=DTYPES[dtype], quantize=quantize)
    before, started = memory("VmRSS"), time.time()
    model = load_model(folder, dtype=DTYPES[dtype], quantize=quantize)
    seconds, peak = time.time() - started, memory("VmHWM")
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    found = {"weights": weights, "before": before, "peak": peak, "ratio": round((peak - before) / weights, 4), "seconds": round(seconds, 1)}
    if answer:
        started = time.time()
        ids = generate(model, [[1, 15, 43]], max_new_tokens=4, eos_ids=())[0]
        found |= {"answer": ids, "answer_seconds": round(time.time() - started, 1), "peak": memory("VmHWM")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="shape of the model, instead of --layers and --dim")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--form", choices=("single", "shards", "bin", "meta"), help="of the files (default: each in turn)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="to load into")
    parser.add_argument("--quantize", choices=("", "int8", "nf4"), default="")
    parser.add_argument("--answer", action="store_true", help="also generate four tokens")
    parser.add_argument("--shard-bytes", type=float, default=5e9)
    parser.add_argument("--work", default=tempfile.gettempdir(), help="where the checkpoint is written, and removed from again")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args.measure, args.dtype, args.quantize, args.answer)))
    config = PRESETS[args.preset] if args.preset else ModelConfig(dim=args.dim, n_layers=args.layers, n_heads=args.dim // 64,
                                                                   hidden_dim=4 * args.dim, vocab_size=8000)
    config = dataclasses.replace(config, norm_eps=1e-5)
    for form in [args.form] if args.form else ["single", "shards", "bin", "meta"]:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            write_random(Path(folder), config, form, args.shard_bytes if args.preset else 50e6)
            command = [sys.executable, __file__, "--measure", folder, "--dtype", args.dtype, "--quantize", args.quantize]
            run = subprocess.run(command + ["--answer"] * args.answer, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(run.stderr)
        found = json.loads(run.stdout)
        print(run.stdout.strip() if args.json else f"{form:7s} weights {found['weights'] / 1e9:.2f} GB, peak beside the program "
              f"{(found['peak'] - found['before']) / 1e9:.2f} GB, ratio {found['ratio']:.3f}, {found['seconds']} s "
              + (f"; {len(found['answer'])} tokens in {found['answer_seconds']} s" if args.answer else ""), flush=True)


if __name__ == "__main__":
    main()
