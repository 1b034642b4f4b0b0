"""A run's own files: written completely or not at all; records are repaired after a kill."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

import data


def write_folder(part: Path, save: Callable, publish: Callable) -> None:
    """save(part) into a new folder and, once all of that is on the disk, publish(part).

    The folder is gone afterwards. Raises OSError that names its parent if the disk is full.
    """
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        mode = part.stat().st_mode & 0o666  # as the umask has it; safetensors is stricter
        save(part)
        for path in [*part.rglob("*"), part]:
            if path.is_file():
                path.chmod(mode)
            sync(path)
        publish(part)
        sync(part.parent)
    except (OSError, SafetensorError) as error:
        code = re.search(r"os error (\d+)", str(error))  # as safetensors says it
        number = getattr(error, "errno", None) or int(code[1] if code else errno.EIO)
        raise OSError(number, os.strerror(number), str(part.parent)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_keys(path: Path, key: Callable[[dict], object]) -> list:
    """key(record) of every record in a file, which is repaired; [] where there is none.

    Duplicates are dropped. Raises ValueError for a record that contradicts another or has no key.
    """
    repair_last_line(path)
    records, first = data.read_records(path), {}
    for number, record in enumerate(records, 1):
        try:
            line, known = first.setdefault(key(record), (number, record))
        except (KeyError, TypeError):
            raise ValueError(f"{path}, line {number}, is no record of this stage. Fix or delete "
                             "that line.") from None
        if known != record:
            raise ValueError(f"{path}, line {number}, holds another record for {key(record)} than "
                             f"line {line}. Expected one. Delete one of the two lines.")
    if len(first) < len(records):
        kept = [record for _, record in first.values()]
        write_folder(path.with_name(f".tmp-{path.name}"),
                     lambda part: data.append_records(part / path.name, kept),
                     lambda part: os.replace(part / path.name, path))
        print(f"warning: dropped {len(records) - len(first)} duplicate records from {path}.")
    return list(first)


def repair_last_line(path: Path) -> None:
    """End the last line of a file, or move it to PATH.torn if it is only the start of a record."""
    last = path.read_bytes().rpartition(b"\n")[2] if path.exists() else b""
    if not last:
        return
    try:
        json.loads(last)
        with open(path, "ab") as file:
            file.write(b"\n")
    except (ValueError, RecursionError):
        path.with_name(path.name + ".torn").write_bytes(last)
        os.truncate(path, path.stat().st_size - len(last))
        print(f"warning: moved an unfinished record of {len(last)} bytes from {path} to "
              f"{path.name}.torn.")


def checksum(file: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
