"""Make a plain Hugging Face folder of older files, or Meta's layout of a Hugging Face folder.

    python -m tools.convert FOLDER --out DIR              # of .bin files, or of Meta's layout
    python -m tools.convert FOLDER --out DIR --to meta

FOLDER holds pytorch_model*.bin, or consolidated.* and params.json of Meta or Mistral, or
adapter_model.bin of PEFT. Only plain tensors are ever unpickled, and shapes are checked before
anything is allocated. Meta's q and k pair neighbours (x_2i, x_2i+1), Hugging Face's halves (x_i,
x_{i + Dh/2}), so their rows are in another order; all else differs in name only. A model of n files
is divided for n GPUs: some matrices by rows, some by columns, norms not at all.
"""

import argparse
import json
import pickle
import re
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval import fail
from extras.formats import weights
from extras.formats.checks import read_object, read_value, reading, refuse
from extras.formats.config import BOUNDS, HFConfig, read_config
from extras.formats.tokenizer import ALL_FILES
from model import Llama

NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm"}
MOST_PICKLED = 10**6  # bytes of names and shapes; a model of 405B has half as many
GIVEN = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "norm_eps")


def read_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin or .pth, memory-mapped: plain dense tensors of floats alone."""
    try:
        check_directory(file)
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
        kinds = {part.compress_type for part in parts}
        refuse(kinds - {zipfile.ZIP_STORED}, "it is compressed, which torch.save never does")
        other = sum(part.file_size for part in parts if "/data/" not in part.filename)
        refuse(other > MOST_PICKLED, f"it holds {other:,} bytes beside its tensors")
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        for name, x in tensors.items():
            sound = isinstance(name, str) and isinstance(x, Tensor) and x.layout == torch.strided
            sound = sound and x.device.type == "cpu" and x.dtype in weights.TYPES.values()
            refuse(not sound or x.nbytes > x.untyped_storage().nbytes(),
                   f"entry {name!r:.100} is not a plain tensor of floats")
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error)) or ["", "an object"]
        raise ValueError(f"{file} contains {found[1]}, which is code, not weights. It was not "
                         "loaded. Get a safetensors version of this model.") from None
    except Exception as error:  # damaged bytes can make the reader raise anything
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{file} is damaged or not weights: {reason}. Not loaded.") from None
    return tensors


def check_directory(file: Path) -> None:
    """The list of a zip's entries must be where torch.save writes it: last, before its end records.

    Python and torch find a list that lies elsewhere in different ways. Each would read another one,
    and what was checked would not be what is unpacked.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        stream.seek(max(0, size - 98))
        tail = stream.read().rjust(98, b"\0")  # zip64's end record and its locator, the end record
    records, sound = 22, tail[-22:-18] == b"PK\5\6" and tail[-2:] == b"\0\0"
    length, begin = struct.unpack("<II", tail[-10:-2])
    if tail[56:60] == b"PK\6\7":
        length, begin = struct.unpack("<QQ", tail[40:56])
        records, (where,) = 98, struct.unpack("<Q", tail[64:72])
        sound = sound and tail[:4] == b"PK\6\6" and where == size - records
    refuse(not sound or begin + length + records != size, "it is not a zip as torch.save writes it")


def read_bins(folder: Path) -> Llama:
    """The model of pytorch_model.bin, or of the shards that its index lists."""
    config, parts, headers = read_config(folder), {}, {}
    for file in weights.weight_files(folder, "pytorch_model.bin"):
        parts[file] = read_bin(file)
        headers[file] = {name: (tuple(x.shape), x.dtype) for name, x in parts[file].items()}
    weights.untie_other_head(config, headers, lambda file, name: parts[file][name])
    model = weights.make_empty(config)
    homes = weights.find_tensors(headers, model)
    state = {name: parts[file][name] for name, file in homes.items()}
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


# ----- Meta's layout -----
def meta_name(name: str) -> str:
    """What Meta calls the weight that Hugging Face calls `name`."""
    head, _, layer = name.removesuffix(".weight").partition(".layers.")
    number, _, part = layer.partition(".")
    return f"layers.{number}.{NAMES[part]}.weight" if layer else f"{NAMES[head]}.weight"


def reorder(name: str, weight: Tensor, head_dim: int, *, to_meta: bool) -> Tensor:
    """The rows of q and k in the other layout's order; every other weight as it is."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    pair = (2, head_dim // 2) if to_meta else (head_dim // 2, 2)
    return weight.view(-1, *pair, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_params(file: Path, rows: int) -> HFConfig:
    """The config that Meta's or Mistral's params.json describes; rows: of the output matrix.

    The vocabulary may be given as -1, and the longest sequence is not given: 4096 where norm_eps is
    1e-5 (LLaMA-2), 2048 where it is 1e-6 (LLaMA-1), 16384 with a rope_theta (CodeLlama).
    """
    raw = read_object(file, 10**6)
    with reading(file, "Meta's params.json"):
        refuse(raw.get("moe") or raw.get("use_scaled_rope") or raw.get("quantization_args"),
               "moe, use_scaled_rope and quantization_args are not implemented.")
        for name in GIVEN[:3]:
            refuse(name not in raw, f"{name} is missing.")
        values = {name: read_value(raw, name, None, *BOUNDS[name]) for name in GIVEN}
        wide = int(2 * 4 * values["dim"] / 3)  # two thirds of 4 dim, rounded up to a multiple
        wide = int(read_value(raw, "ffn_dim_multiplier", 1.0, 1e-3, 1e3) * wide)
        multiple = read_value(raw, "multiple_of", 256, 1, 2**20)
        usual = {"n_kv_heads": values["n_heads"], "head_dim": values["dim"] // values["n_heads"],
                 "norm_eps": 1e-6, "hidden_dim": multiple * -(-wide // multiple)}
        values |= {name: value for name, value in usual.items() if values[name] is None}
        vocab_size = read_value(raw, "vocab_size", -1, -1, 2**24)
        vocab_size = vocab_size if vocab_size > 0 else rows
        refuse(vocab_size < 1, "no output.weight says how large the vocabulary is.")
        longest = 4096 if values["norm_eps"] > 5e-6 else 2048
        longest = 16384 if "rope_theta" in raw else longest
        return HFConfig(
            **values, vocab_size=vocab_size,
            rope_theta=read_value(raw, "rope_theta", 10000.0, 1.0, 1e12),
            sliding_window=read_value(raw, "sliding_window", None, 1, 2**24),
            max_position_embeddings=read_value(raw, "max_seq_len", longest, 1, 2**24))


def read_meta(folder: Path) -> Llama:
    """The model of consolidated.00.pth, 01, ..., or of Mistral's consolidated.safetensors."""
    files = [folder / "consolidated.safetensors"]
    if files[0].is_file():
        weights.read_header(files[0])  # which checks it
        parts = [load_file(files[0])]
    else:
        files = sorted(folder.glob("consolidated.*.pth"))
        wanted = [folder / f"consolidated.{number:02}.pth" for number in range(len(files))]
        refuse(not files or files != wanted, f"{folder} has {len(files)} files consolidated.*.pth, "
               "numbered with gaps or not at all. Expected consolidated.00.pth and the next ones.")
        parts = [read_bin(file) for file in files]
    outputs = [part["output.weight"] for part in parts if "output.weight" in part]
    rows = sum(len(output) for output in outputs if output.dim() == 2)
    config = read_params(folder / "params.json", rows)
    model, dims, state = weights.make_empty(config), {}, {}
    ours = {meta_name(name): name for name, _ in model.named_parameters()}
    for part in parts:
        for name in (part.keys() ^ ours.keys()) - {"rope.freqs"}:
            raise ValueError(f"tensor {name!r:.200} is in {folder} or in params.json's model, and "
                             "not in the other. They are from different models.")
    for theirs, name in ours.items():
        shapes = [tuple(part[theirs].shape) for part in parts]
        dims[theirs] = find_division(shapes, tuple(model.get_parameter(name).shape), theirs)
    for theirs, name in ours.items():
        weight = parts[0][theirs]
        if dims[theirs] is not None:
            weight = torch.cat([part[theirs] for part in parts], dims[theirs])
        state[name] = reorder(name, weight, config.head_dim, to_meta=False)
    model.load_state_dict(state, assign=True)
    return model


def find_division(shapes: list[tuple], whole: tuple, name: str) -> int | None:
    """The dimension along which parts of these shapes make the whole; None if each is the whole."""
    if len(whole) == 1 and set(shapes) == {whole}:
        return None
    for dim in range(len(whole)):
        others = {shape[:dim] + shape[dim + 1:] for shape in shapes if len(shape) == len(whole)}
        if others == {whole[:dim] + whole[dim + 1:]}:
            if sum(shape[dim] for shape in shapes) == whole[dim]:
                return dim
    raise ValueError(f"tensor {name} is {shapes[0]} in each of {len(shapes)} files, params.json "
                     f"says {whole} in all. They are from different models.")


def save_meta(model: Llama, folder: Path) -> None:
    """Write params.json and consolidated.00.pth, as Meta reads them, in the type of the weights."""
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
        tensors[meta_name(name)] = weight.clone()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(raw, indent=2))


# ----- The program -----
def convert(folder: Path, out: Path, to: str) -> None:
    """Read whatever model or adapter the folder holds, and write it to `out`. Raises ValueError."""
    names = [*ALL_FILES, "generation_config.json"]
    if (folder / "adapter_model.bin").is_file():
        names = ["adapter_config.json"]
        file = folder / "adapter_model.bin"
        tensors = read_bin(file)
        refuse(sum(tensor.nbytes for tensor in tensors.values()) > file.stat().st_size,
               f"{file} holds the same numbers under several names. It is no adapter.")
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    else:
        if not (folder / "config.json").is_file() and (folder / "params.json").is_file():
            model = read_meta(folder)
        elif any(folder.glob("model*.safetensors")):
            model = weights.open_model(folder, dtype=None)
        else:
            model = read_bins(folder)
        save = save_meta if to == "meta" else weights.save_model
        save(model, out)
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def main(argv: list[str] | None = None) -> int:
    """The program; 0, or 2 after a sentence on what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a model or of an adapter")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--to", choices=("hf", "meta"), default="hf", help="layout to write")
    parser.error = fail
    args = parser.parse_args(argv)
    try:
        if args.out.resolve() == args.folder.resolve():
            raise ValueError(f"--out {args.out} is the folder that is read. Give another.")
        convert(args.folder, args.out, args.to)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
