"""Models in Hugging Face's safetensors files: checked before memory is taken, read row by row.

What is read of a mapped file counts as used memory until the mapping is gone. So each tensor gets
a mapping of its own, and goes some rows at a time into its place: loading never needs more memory
than the finished model and about one tensor.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from extras.formats.checks import check_layout, read_object, refuse
from extras.formats.config import read_config, to_hf
from extras.runtime.files import write_folder
from model import Llama

SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHUNK_NUMBERS = 2**20  # so many numbers are converted, checked and quantised at a time
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# ----- Reading -----
def open_model(path, *, dtype: torch.dtype | None = torch.float32, device="cpu",
               quantize: str = "", shard: Callable | None = None) -> Llama:
    """The model in a folder with config.json and model.safetensors, or shards and their index.

    dtype: of the weights; None keeps each as it is stored. quantize: "int8" or "nf4" for the
    linears of the blocks. shard(model): makes each weight of a model without storage a DTensor, of
    which this process then reads and holds its own rows alone. Raises ValueError.
    """
    quantize = quantize.removeprefix("none")
    refuse(quantize not in ("", "int8", "nf4"),
           f"quantize is {quantize!r:.60}; expected int8 or nf4.")
    check_layout(path)
    config = read_config(path)
    headers = {file: read_header(file) for file in weight_files(Path(path))}
    untie_other_head(config, headers, lambda file, name: safe_open(file, "pt").get_slice(name))
    model = make_empty(config)
    homes, state = find_tensors(headers, model), {}
    if shard:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shard(model.to(dtype))
        model.to_empty(device=device)
    for name, weight in list(model.named_parameters()):
        begin, shape, file = 0, weight.shape, homes[name]
        kept = dtype or headers[file][name][1]
        if shard:
            shape, (begin, *_) = compute_local_shape_and_global_offset(
                shape, weight.device_mesh, weight.placements)
            place = weight.detach().to_local().__setitem__
        elif quantize and ".layers." in name and len(shape) == 2:
            place = put_quantised(model, name.removesuffix(".weight"), quantize, kept, device)
        else:
            state[name] = torch.empty(shape, dtype=kept, device=device)
            place = state[name].__setitem__
        read_rows(file, name, (begin, *shape), kept, place)
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


class Uninitialized(TorchFunctionMode):
    """Inside, torch.nn.init does nothing: on weights without storage it only imports much."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return arguments[0] if arguments else named["tensor"]
        return function(*arguments, **(named or {}))


def make_empty(config) -> Llama:
    """A model without storage."""
    with torch.device("meta"), Uninitialized():
        return Llama(config)


def put_quantised(model: Llama, name: str, kind: str, dtype, device) -> Callable:
    """Put an empty quantised linear in the place of a linear. Returns what fills its rows."""
    from extras.fast.quant import QuantLinear

    old = model.get_submodule(name)
    linear = QuantLinear(old.in_features, old.out_features, kind, dtype, device)
    linear.bias = old.bias  # read like any other weight
    model.set_submodule(name, linear)
    return linear.encode_rows


def read_rows(file: Path, name: str, part: tuple, dtype: torch.dtype, place: Callable) -> None:
    """place(rows, numbers) for all rows of a part (first row, number of rows, ...), in chunks.

    Raises ValueError unless all numbers are finite in `dtype`.
    """
    begin, n_rows, *width = part
    step = max(1, CHUNK_NUMBERS // math.prod(width))
    broken, limit = 0, torch.finfo(dtype).max
    with safe_open(file, "pt") as handle:
        tensor = handle.get_slice(name)
        for start in range(0, n_rows, step):
            stop = min(start + step, n_rows)
            rows = tensor[begin + start:begin + stop]
            low, high = rows.aminmax()  # NaN where there is one, and it makes no copy
            if not (low >= -limit and high <= limit):
                broken += int((~(rows.abs() <= limit)).sum())
            place(slice(start, stop), rows)
    cause = ", or too large for float16" * (dtype == torch.float16)
    refuse(broken, f"tensor {name} has {broken} non-finite values ({file}). The checkpoint is "
           f"broken{cause}.")


def weight_files(folder: Path, single: str = SINGLE) -> list[Path]:
    """The weight file of a folder, or the shards of its index, which must lie in the folder."""
    if (folder / single).is_file():
        return [folder / single]
    index = folder / f"{single}.index.json"
    if not index.is_file():
        raise ValueError(f"no weights at {folder} (no {single}, no index of shards). Give a folder "
                         "in Hugging Face format: config.json, *.safetensors, tokenizer.model.")
    listed = read_object(index).get("weight_map")
    listed = listed.values() if isinstance(listed, dict) else [None]
    # links of the Hugging Face cache lead to its blobs
    homes = folder.resolve(), folder.resolve().parent.parent / "blobs"
    pattern, files = r"[\w.-]{1,200}\." + single.rpartition(".")[2], []
    for text, name in {json.dumps(name): name for name in listed}.items():
        plain = isinstance(name, str) and re.fullmatch(pattern, name)
        refuse(not plain or (folder / name).resolve().parent not in homes, f"{index} points "
               f"outside its folder ({text:.80}). Refused; do not trust this download.")
        files.append(folder / name)
        refuse(not files[-1].is_file(),
               f"{files[-1]} is missing, though {index.name} lists it. Download it again.")
    return files


def read_header(file: Path) -> dict[str, tuple]:
    """Shape and type of each tensor of a safetensors file. Raises ValueError for a damaged one."""
    size, header = file.stat().st_size, {}
    with open(file, "rb") as stream:
        refuse(stream.read(40).startswith(b"version https://git-lfs"), f"{file} is a Git LFS "
               f"pointer of {size} bytes, not weights. Run \"git lfs pull\" in that folder.")
    try:
        with safe_open(file, "pt") as handle:
            for name in handle.keys():
                tensor = handle.get_slice(name)
                header[name] = tuple(tensor.get_shape()), TYPES.get(tensor.get_dtype())
                refuse(not header[name][1], f"tensor {name!r:.200} in {file} is "
                       f"{tensor.get_dtype()}, expected F32, F16 or BF16.")
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{file} is damaged or incomplete: {' '.join(str(error).split())[:100]}. "
                         f"Download it again (found {size:,} bytes).") from None
    return header


def untie_other_head(config, headers: dict[Path, dict], read: Callable) -> None:
    """Where the config says that the head is the embedding, and the files hold another: untie it.

    read(file, name): rows of a tensor. transformers does the same from version 5 on; version 4
    ignored such a head.
    """
    homes = {name: file for file, header in headers.items() for name in header}
    if not config.tie_embeddings or not {EMBEDDING, HEAD} <= homes.keys():
        return
    shape, other = (headers[homes[name]][name][0] for name in (EMBEDDING, HEAD))
    head, embedding = read(homes[HEAD], HEAD), read(homes[EMBEDDING], EMBEDDING)
    step = max(1, CHUNK_NUMBERS // math.prod(shape[1:]))
    config.tie_embeddings = shape == other and all(
        torch.equal(head[k:k + step], embedding[k:k + step]) for k in range(0, shape[0], step))
    if not config.tie_embeddings:
        warnings.warn(f"config.json says tie_word_embeddings, and {homes[HEAD]} holds another "
                      f"{HEAD} than the embedding. That head is used, as in transformers 5; "
                      "transformers 4 ignores it.", stacklevel=3)


def find_tensors(headers: dict[Path, dict], model: Llama) -> dict[str, Path]:
    """The file of each weight of the model. Raises ValueError unless the files hold just those.

    headers: shapes and types of the tensors by name, for each file.
    """
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    homes, blame = {}, "The weights and config.json are from different models."
    for file, header in headers.items():
        for name, (shape, _) in header.items():
            tied = name == HEAD and name not in expected
            if tied or name.endswith("rotary_emb.inv_freq"):  # old files hold such a buffer
                continue
            wanted = expected.get(name, "that there is none")
            refuse(shape != wanted,
                   f"tensor {name:.200} is {shape} in {file}, config.json says {wanted}. {blame}")
            homes[name] = file
    for name in expected.keys() - homes.keys():
        raise ValueError(f"tensor {name} is not in {', '.join(map(str, headers)):.300}. {blame}")
    return homes


# ----- Writing -----
def save_model(model: Llama, path, *, dtype: torch.dtype | None = None,
               max_shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and model.safetensors, or shards and their index, as transformers does.

    dtype: cast to this; None leaves each weight as it is. max_shard_bytes: a new file begins at
    this size. Raises ValueError for a model that is quantised or has adapters.
    """
    folder, weights = Path(path), dict(model.named_parameters())
    refuse(any(hasattr(module, "dequantize") for module in model.modules()), "the model is "
           "quantised, and quantised weights are not written; load it in full precision first.")
    for odd in weights.keys() ^ dict(make_empty(model.config).named_parameters()).keys():
        raise ValueError(f"{odd} is not a weight of a plain model; merge adapters with merge_lora "
                         "before saving.")
    shards, room, sizes = [], 0, {}
    for name, weight in weights.items():
        kind = dtype or weight.dtype
        n_bytes = weight.numel() * kind.itemsize
        sizes[kind] = sizes.get(kind, 0) + n_bytes
        if n_bytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = weight
        room -= n_bytes

    def save(part):
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": {}}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = file if len(shards) > 1 else SINGLE
            tensors = {name: x.detach().to("cpu", dtype).contiguous() for name, x in shard.items()}
            save_file(tensors, part / file, {"format": "pt"})
            index["weight_map"] |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            (part / f"{SINGLE}.index.json").write_text(json.dumps(index, indent=2))
        main_type = str(max(sizes, key=sizes.get)).removeprefix("torch.")  # where they are mixed
        (part / "config.json").write_text(json.dumps(to_hf(model.config, main_type), indent=2))

    def publish(part):
        written = [file.name for file in part.iterdir()]
        for name in written:
            os.replace(part / name, folder / name)
        for old in folder.glob("model*.safetensors*"):  # an earlier save must not hide this one
            ours = re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", old.name)
            if ours and old.name not in written:
                old.unlink()
    write_folder(folder / ".model.part", save, publish)
