"""Damage to files, and children with limits in which to read them."""

import copy
import json
import os
import re
import resource
import signal
import sys
from pathlib import Path

import pytest


def in_children(work, cases, *, memory=4 << 30, seconds=120):
    """work(case) -> "" or what is wrong, for each case, in forked children of limited memory.

    A child does cases until one of them kills it. A case that takes longer than `seconds` counts
    as killed, too.
    """
    found = []
    while len(found) < len(cases):
        read, write = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                os.close(read)
                status = Path("/proc/self/status").read_text()
                most = (int(re.search(r"VmSize:\s+(\d+)", status)[1]) << 10) + memory
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                with os.fdopen(write, "w") as stream:
                    for case in cases[len(found):]:
                        signal.setitimer(signal.ITIMER_REAL, seconds)
                        print(json.dumps(work(case)), file=stream, flush=True)
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as stream:
            found += [json.loads(line) for line in stream if line.endswith("\n")]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if len(found) < len(cases):
            found.append(f"died with status {status}")
    return found


# Mutations -------------------------------------------------------------------------------------


def nest(depth):
    """A list in a list in a list."""
    found = []
    for _ in range(depth):
        found = [found]
    return found


NASTY = [None, True, False, -1, 0, 1, 2, 7, 0.5, -0.0, 1e308, -1e308, float("nan"), float("inf"),
         float("-inf"), 10**12, 2**31, 2**63, -2**63, 10**40, "", " ", "1", "x" * 3000, "\ud800",
         "\x00", "\u2028", "\u202e", "../../x", "/etc/passwd", "{input}", "{}", "%s", "</s>", [],
         {}, [None], [[]], {"a": {"b": 1}}, ["x", 3], nest(50), {"": ""}, "é" * 40, [1] * 500]


def places(value, path=()):
    """The paths of everything inside a JSON value."""
    inner = []
    if isinstance(value, dict):
        inner = list(value.items())
    if isinstance(value, list):
        inner = list(enumerate(value))
    found = [path + (key,) for key, _ in inner]
    for key, part in inner:
        found += places(part, path + (key,))
    return found


def spoilt(value, rng):
    """A copy of a JSON value with a place or two changed, removed, doubled, wrapped or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2))):
        if not places(value):
            return rng.choice(NASTY)
        *path, key = rng.choice(places(value))
        home = value
        for part in path:
            home = home[part]
        how = rng.choice(("set", "set", "set", "remove", "wrap", "double", "rename", "swap"))
        if how == "remove":
            del home[key]
        elif how == "wrap":
            old = home[key]
            home[key] = rng.choice(([old], {"value": old}, [old] * 3, [[old]]))
        elif how == "double" and isinstance(home[key], str | list):
            home[key] = home[key] * 2
        elif how == "rename" and isinstance(home, dict):
            home[rng.choice((key.upper(), key + " ", "x", "", "__class__"))] = home.pop(key)
        elif how == "swap" and isinstance(home, dict):
            other = rng.choice(list(home))
            home[key], home[other] = home[other], home[key]
        else:
            home[key] = copy.deepcopy(rng.choice(NASTY))  # a later change must not reach NASTY
    return value


def garbled(blob, rng):
    """Bytes changed, taken out, put in or repeated."""
    blob = bytearray(blob)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, size = rng.randrange(len(blob) + 1), rng.choice((1, 1, 2, 4, 16, 200))
        how = rng.choice(("flip", "flip", "set", "remove", "insert", "repeat", "end"))
        if how == "flip" and at < len(blob):
            blob[at] ^= 1 << rng.randrange(8)
        elif how == "set":
            letter = rng.choice((b"\x00", b"\xff", b"\x80", bytes([rng.randrange(256)])))
            blob[at:at + size] = letter * len(blob[at:at + size])
        elif how == "remove":
            del blob[at:at + size]
        elif how == "insert":
            noise = bytes(rng.randrange(256) for _ in range(size))
            blob[at:at] = rng.choice((noise, b"\x00" * size, b"\xff" * size))
        elif how == "repeat":
            blob[at:at] = blob[at:at + size * 8]
        elif how == "end":
            del blob[at:]
    return bytes(blob)


def spoilt_text(text, rng):
    """JSON text with damage that no JSON value has."""
    blob, at = text.encode(errors="surrogatepass"), rng.randrange(max(1, len(text)))
    how = rng.randrange(9)
    if how == 0:
        return b"\xef\xbb\xbf" + blob
    if how == 1:
        more = rng.choice((b'"a": ' + b"[" * 100_000, b'"a": ' + b"7" * 5000 + b",", b'"a": 1e400,',
                           b'"a": NaN,', b'"a": "\\ud800",'))
        return blob.replace(b"{", b"{" + more, 1)
    if how == 2:
        return blob[:at] + b"[" * 100_000
    if how == 3:
        return blob.replace(b"\n", b"\r\n") + b"\r\n\r\n"
    if how == 4:
        name = re.search(rb'"(\w+)":', blob[at:]) or re.search(rb'"(\w+)":', blob)
        twice = rng.choice((b'{"%s": null, ', b'{"%s": "twice", '))
        return blob.replace(b"{", twice % name[1], 1) if name else blob
    if how == 5:
        return blob + rng.choice((b"\x00" * 40, b"{}", b"\n\n", b"]", b"\xff"))
    return garbled(blob, rng)


def of_both(names, quick):
    """(name, trials) of each with `quick` trials, and with all of them under the marker."""
    many = [pytest.param(name, trials, marks=pytest.mark.faults) for name, trials in names]
    return [(name, quick) for name, _ in names] + many
