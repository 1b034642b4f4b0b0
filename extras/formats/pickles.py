"""Weights in .bin and .pth files of torch.save: plain tensors alone, checked before they are read.

Such a file is a zip since torch 1.6, and was a row of pickles and numbers before. Only plain
tensors are ever unpickled, and what a file claims is compared with its size first.
"""

import io
import pickle
import pickletools
import re
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from extras.formats import weights
from extras.formats.checks import refuse
from extras.formats.config import read_config
from model import Llama

MOST_PICKLED = 10**6  # bytes of names and shapes; a model of 405B has half as many
OLD_FORM = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # how files from before torch 1.6 begin


def read_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin or .pth: plain dense tensors of floats alone.

    A zip is memory-mapped; a file of the older form is read whole.
    """
    try:
        with open(file, "rb") as stream:
            old = stream.read(len(OLD_FORM)) == OLD_FORM
        if old:
            check_pickles(file)
        else:
            check_directory(file)
            check_entries(file)
        tensors = torch.load(file, map_location="cpu", mmap=not old, weights_only=True)
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


def check_pickles(file: Path) -> None:
    """A file of the older form: five pickles, and then the numbers of each storage.

    The last two name the tensors. No number in them may be above the size of the file, since memory
    is taken as they say before the numbers are read.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = io.BytesIO(stream.read(MOST_PICKLED))
    for number in range(5):
        for opcode, value, _ in pickletools.genops(head):
            claims = number > 2 and opcode.name != "LONG_BINGET" and type(value) is int
            refuse(claims and value > size, f"it claims {value} numbers in {size:,} bytes")


def check_entries(file: Path) -> None:
    """A zip must hold its entries as they are, and little beside the tensors' numbers."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    kinds = {part.compress_type for part in parts}
    refuse(kinds - {zipfile.ZIP_STORED}, "it is compressed, which torch.save never does")
    other = sum(part.file_size for part in parts if "/data/" not in part.filename)
    refuse(other > MOST_PICKLED, f"it holds {other:,} bytes beside its tensors")


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
    config, parts, headers = read_config(folder / "config.json"), {}, {}
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
