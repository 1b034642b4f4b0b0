"""Hostile input: every sentence a user should see, and files that are damaged, foreign or made to do harm.

Whatever may die of a signal runs in a child with limits. The short ones run with the suite; `pytest -m faults` draws more.
"""

import ast
import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import traceback
import zipfile
from pathlib import Path

import pytest
import torch
from chatserver import ChatServer, completion
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import train
from judge import STRATEGIES, Reply, evaluate_pairs
from lora import LoraConfig, apply_lora, lora_modules, save_adapter
from model import hf_fields, load_model, read_config, sample
from test_train import ROOT, SHARED, arguments, planted, world     # noqa: F401


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# Children with limits ------------------------------------------------------------------------------------------------


def said(program: str, argv: list[str]) -> tuple[int, str]:
    """main() of train.py or eval.py: exit status and what stands on stderr; an exception that it lets through is status 70 and a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = (train if program == "train" else evaluation).main([str(word) for word in argv]) or 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc(file=err)
            status = 70
    return status, err.getvalue()


def complaints(error: str) -> list[str]:
    """The lines of stderr but for progress bars and warnings."""
    return [line for line in re.sub(r"[^\n]*\r", "", error).splitlines() if line.strip() and not re.search(r"Warning: |^  warnings\.warn|it/s\]|s/it\]|\?it/s", line)]


def in_children(work, cases: list, *, memory: int = 4 << 30, seconds: float = 120) -> list[tuple[int, str]]:
    """work(case) -> (status, text) for each case, in forked children of limited memory; one that dies of signal n gives (-n, "").

    A case that takes longer than `seconds` counts as killed by SIGALRM. A child does cases until one of them kills it.
    """
    found: list[tuple[int, str]] = []
    while len(found) < len(cases):
        read, write = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                os.close(read)
                now = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
                resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
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
            found += [tuple(json.loads(line)) for line in stream if line.endswith("\n")]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if len(found) < len(cases):
            found.append((min(status, -1), ""))
    return found


def everything(folder: Path, but: Path) -> dict[str, bytes]:
    """What lies under a folder, outside `but`."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and but not in path.parents}


def judged(results: list[tuple[int, str]], cases: list) -> list[str]:
    """What is wrong with the outcomes: anything but a run that went well or one sentence and status 2."""
    wrong = []
    for (status, error), case in zip(results, cases, strict=True):
        lines = complaints(error)
        if status not in (0, 2) or status == 2 and (len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) > 1500) or "Traceback" in error:
            wrong.append(f"{status}: {case!r:.300}: {error[-700:]}")
    return wrong


# Mutations -----------------------------------------------------------------------------------------------------------


def nest(depth: int):
    """A list in a list in a list."""
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


NASTY = [None, True, False, -1, 0, 1, 2, 7, 0.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 10**12, 2**31, 2**63, -2**63, 10**40, "", " ", "1", "x" * 3000,
         "\ud800", "\x00", "\u2028", "\u202e", "../../x", "/etc/passwd", "{input}", "{}", "%s", "</s>", [], {}, [None], [[]], {"a": {"b": 1}}, ["x", 3], nest(50), {"": ""}, "é" * 40, [1] * 500]


def places(value, path=()) -> list[tuple]:
    """The paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path + (key,) for key, _ in inner] + [found for key, part in inner for found in places(part, path + (key,))]


def spoilt(value, rng: random.Random):
    """A copy of a JSON value with one or two places in it changed, removed, doubled, wrapped or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2))):
        *path, key = rng.choice(places(value) or [("x",)])
        home = value
        for part in path:
            home = home[part]
        how = rng.choice(("set", "set", "set", "remove", "wrap", "double", "rename", "swap"))
        if key == "x" and not places(value):
            return rng.choice(NASTY)
        if how == "remove":
            del home[key]
        elif how == "wrap":
            home[key] = rng.choice(([home[key]], {"value": home[key]}, [home[key]] * 3, [[home[key]]]))
        elif how == "double" and isinstance(home[key], (str, list)):
            home[key] = home[key] * 2
        elif how == "rename" and isinstance(home, dict):
            home[rng.choice((key.upper(), key + " ", "x", "", "__class__"))] = home.pop(key)
        elif how == "swap" and isinstance(home, dict):
            other = rng.choice(list(home))
            home[key], home[other] = home[other], home[key]
        else:
            home[key] = rng.choice(NASTY)
    return value


def garbled(blob: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut out, put in or repeated."""
    blob = bytearray(blob)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, size = rng.randrange(len(blob) + 1), rng.choice((1, 1, 2, 4, 16, 200))
        how = rng.choice(("flip", "flip", "set", "cut", "insert", "repeat", "end"))
        if how == "flip" and at < len(blob):
            blob[at] ^= 1 << rng.randrange(8)
        elif how == "set":
            blob[at:at + size] = rng.choice((b"\x00", b"\xff", b"\x80", bytes([rng.randrange(256)]))) * len(blob[at:at + size])
        elif how == "cut":
            del blob[at:at + size]
        elif how == "insert":
            blob[at:at] = rng.choice((bytes(rng.randrange(256) for _ in range(size)), b"\x00" * size, b"\xff" * size))
        elif how == "repeat":
            blob[at:at] = blob[at:at + size * 8]
        elif how == "end":
            del blob[at:]
    return bytes(blob)


def spoilt_text(text: str, rng: random.Random) -> bytes:
    """JSON text with damage that no JSON value has."""
    blob, at = text.encode(errors="surrogatepass"), rng.randrange(max(1, len(text)))
    how = rng.randrange(9)
    if how == 0:
        return b"\xef\xbb\xbf" + blob
    if how == 1:
        return blob.replace(b"{", b"{" + rng.choice((b'"a": ' + b"[" * 100_000, b'"a": ' + b"7" * 5000 + b",", b'"a": 1e400,', b'"a": NaN,', b'"a": "\\ud800",')), 1)
    if how == 2:
        return blob[:at] + b"[" * 100_000
    if how == 3:
        return blob.replace(b"\n", b"\r\n") + b"\r\n\r\n"
    if how == 4:
        name = re.search(rb'"(\w+)":', blob[at:]) or re.search(rb'"(\w+)":', blob)
        return blob.replace(b"{", b'{"%s": null, ' % name[1] if rng.random() < 0.5 else b'{"%s": "twice", ' % name[1], 1) if name else blob
    if how == 5:
        return blob + rng.choice((b"\x00" * 40, b"{}", b"\n\n", b"]", b"\xff"))
    return garbled(blob, rng)


ROWS = {                                                    # flag of train.py -> rows as the wild has them
    "records": [
        {"instruction": "name it", "input": "anna has a red hat", "response": "blue", "judgment": "It is red, not blue."},
        {"id": "7", "instruction": "name it", "input": "", "output": "tom has a hat", "judgment": "Too long.", "score": 3, "i_ans": "tom", "score_ans": 9},
        {"instruction": "name it", "input": "x", "response": "red", "judgment": None, "target": "red", "targets": ["red", "a red"]},
        {"question": "who has a hat ?", "answer": "mary", "feedback": "Wrong name.", "output_correct": "anna"},
        {"instruction": "who is it", "completions": [{"response": "anna", "critique": "Good.", "overall_score": 8}, {"response": "tom", "critique": "Bad.", "overall_score": 2.5}]},
        {"data": {"passage": {"text": "anna has a hat"}, "questions": [{"question": "who ?", "rankings": [0.1, 0.9], "answers": [
            {"answer": "tom", "feedback": {"critiques": []}}, {"answer": "mary", "feedback": {"critiques": [{"text": "No.", "refinement": "anna"}]}}]}]}}],
    "candidates": [
        {"prompt": "name it", "chosen": "red", "rejected": "blue"},
        {"chosen": "\n\nHuman: who ?\n\nAssistant: anna", "rejected": "\n\nHuman: who ?\n\nAssistant: tom"},
        {"conversations": [{"from": "human", "value": "which hat ?"}], "chosen": {"from": "gpt", "value": "red"}, "rejected": {"from": "gpt", "value": "black"}},
        {"prompt": [{"role": "system", "content": "be short"}, {"role": "user", "content": "who ?"}], "chosen": [{"role": "assistant", "content": "anna"}],
         "rejected": [{"role": "assistant", "content": "paul"}]},
        {"instruction": "who has it ?", "completions": [{"response": "anna", "overall_score": 9.0}, {"response": "tom", "overall_score": 2}]},
        {"query": "which ?", "responses": ["red", "blue", "white"], "scores": [0.9, -0.3, 0.1]},
        {"prompt": "who ?", "prompt_id": "a", "chosen": [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "anna"}],
         "rejected": [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "tom"}], "score_chosen": 8.0, "score_rejected": 3.5}],
    "own": [{"task": "colour", "id": str(n // 3), "instruction": "name it", "wording": f"w{n}", "input": f"hat {n // 3}", "target": "red", "sample": 0, "response": text, "reward": reward,
             "finished": True, "how": "rule", "expected": True, "correct": reward == 2, "p_expected": None, "p_correct": None}
            for n, (text, reward) in enumerate([("red", 2), ("blue", 1), ("hat hat", 0)] * 3)],
    "examples": [
        {"instruction": "name the colour", "input": "anna has a red hat", "output": "red"}, {"instruction": "say a name", "input": "", "output": "tom", "text": "..."},
        {"id": "x_0", "conversations": [{"from": "human", "value": "who ?"}, {"from": "gpt", "value": "anna"}, {"from": "human", "value": "sure ?"}, {"from": "gpt", "value": "yes"}]},
        {"messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "which ?"}, {"role": "assistant", "content": "red"}]}],
}
ROWS |= {
    "labelled": [{"task": "colour", "id": str(n), "number": 0, "instruction": "name it", "input": f"hat {n}", "probability": p, "first": {"wording": "name it", "response": "red"},
                  "second": {"wording": "colour ?", "response": "blue"}} for n, p in enumerate((0.9, 0.2, 0.5))],
    "corpus": [[["anna has a red hat . ", False], ["red", True], ["</s>", True]], [["tom has a blue hat", True]], [["who ? ", False], ["tom", True]]],
    "pairs": [{"input": f"name it {n}", "output_1": "red", "output_2": "a blue hat", "label": 1 + n % 2} for n in range(4)],
    "instructions": [{"instruction": "name it", "input": "a red hat", "dataset": "x"}, {"instruction": "who ?"}, {"instruction": "which", "input": "", "output": "red"}]}
WHOLE = {
    "task": {"Contributors": ["x"], "Source": ["y"], "Definition": ["give the colour ."], "Positive Examples": [{"input": "a", "output": "b", "explanation": "c"}],
             "Instances": [{"id": f"task9-{n}", "input": f"{who} has a {colour} hat {n}", "output": [colour]} for n, (who, colour) in enumerate(
                 [("anna", "red"), ("tom", "blue"), ("mary", "white"), ("paul", "black")] * 6)]},
    "wordings": {"colour": {"train": [{"text": "which colour ?", "style": "plain"}, "name it :"], "dev": ["the colour , please", "colour ?"], "test": ["say it", "tell it"]},
                 "person": [f"who {n} ?" for n in range(9)]},
    "execute": {"metadata": {"num_examples": 2}, "examples": {"1": {"input": "a", "output": "b"}, "2": {"cause": "x", "effect": "y"}, "3": {"items": ["a", "b"], "concept": "c", "all_common_concepts": ["d"]},
                                                              **{str(n): {"input": f"hat {n}", "output": "red", "other_rhymes": ["b"], "possible_translations": ["c"]} for n in range(4, 20)}}},
    "annotations": {"annotations": [f"name it {n}" for n in range(9)]},
    "template": {"description": "x", "prompt_input": "{instruction} {input} :", "prompt_no_input": "{instruction} :", "response_split": ":", "end": "</s>", "turn": "{opening}{user} :", "strip": True},
}
TRAINED = ["train", "--steps", "1", "--batch-size", "2", "--no-evaluate", "--save-every", "0"]
READERS = {                                                 # kind of file -> (trials, name, a command that reads it)
    "records": (150, "f.json", [*TRAINED, "--stage", "cut", "--records", "FILE"]), "candidates": (150, "f.json", [*TRAINED, "--stage", "dpo", "--candidates", "FILE"]),
    "own": (100, "f.jsonl", [*TRAINED, "--stage", "cat", "--candidates", "FILE"]), "examples": (100, "f.json", [*TRAINED, "--stage", "sft", "--examples", "FILE"]),
    "task": (150, "colour.json", [*TRAINED, "--stage", "sft", "--tasks", "FILE"]), "wordings": (100, "f.json", [*TRAINED, "--stage", "sft-ia", "--tasks", "TASKS", "--paraphrases", "FILE"]),
    "execute": (60, "execute/a.json", [*TRAINED, "--stage", "sft", "--tasks", "HOME"]), "annotations": (60, "annotations/a.json", [*TRAINED, "--stage", "sft-ia", "--tasks", "HOME"]),
    "labelled": (60, "f.jsonl", [*TRAINED, "--stage", "reward", "--tasks", "TASKS", "--sft-steps", "1", "--preferences", "FILE"]),
    "corpus": (60, "f.jsonl", [*TRAINED[:-3], "--save-every", "0", "--stage", "pretrain", "--tokenizer", "TOKENIZER", "--preset", "tiny", "--corpus", "FILE"]),
    "template": (60, "f.json", ["eval", "--instructions", "ASKED", "--max-new-tokens", "2", "--template", "FILE"]),
    "pairs": (60, "f.json", ["eval", "--benchmark", "llmbar", "--judge", "rule", "--data", "FILE"]),
    "instructions": (60, "f.json", ["eval", "--max-new-tokens", "2", "--instructions", "FILE"])}


def drawn(kind: str, number: int) -> tuple[bytes, int | None]:
    """A damaged file of a kind, and the record that is damaged, where it is one."""
    rng = random.Random(f"{kind}/{number}")
    if kind in WHOLE:
        text = json.dumps(WHOLE[kind], ensure_ascii=rng.random() < 0.5)
        return spoilt_text(text, rng) if rng.random() < 0.25 else json.dumps(spoilt(WHOLE[kind], rng)).encode(), None
    at, lines = rng.randrange(len(ROWS[kind])), kind == "corpus" or kind != "pairs" and rng.random() < 0.5
    broken = rng.random() < 0.25
    rows = [json.dumps(row).encode() for row in ROWS[kind]]
    rows[at] = spoilt_text(rows[at].decode(), rng) if broken else json.dumps(spoilt(ROWS[kind][at], rng)).encode()
    return b"\n".join(rows) if lines else b"[" + b", ".join(rows) + b"]", None if broken else at


def reading(kind: str, world: Path, file: Path, out: Path) -> list:     # noqa: F811
    """The command of READERS with its paths."""
    asked = file.parent.parent / "asked.json"
    asked.write_text('[{"instruction": "name it", "input": "a red hat"}]')
    known = {"FILE": file, "HOME": file.parent.parent, "TASKS": world / "tasks", "TOKENIZER": world / "model/tokenizer.model", "ASKED": asked}
    argv = [known.get(word, word) for word in READERS[kind][2]]
    return argv + (["--model", world / "model"] if kind not in ("corpus", "pairs") else []) + ["--out", out]


def of_both(rows: list[tuple], quick: int) -> list:
    """(name, trials) of each row with `quick` trials, and with all of them under the marker."""
    return [(name, quick) for name, _ in rows] + [pytest.param(name, many, marks=pytest.mark.faults) for name, many in rows]


@pytest.mark.parametrize("kind, trials", of_both([(kind, row[0]) for kind, row in READERS.items()], 6))
def test_damaged_data_is_read_or_refused_by_name(kind, trials, world, tmp_path, monkeypatch, record_property):     # noqa: F811
    """The command goes well or ends in one sentence with the file, and the record where one is damaged; nothing is written outside --out."""
    file, out = tmp_path / "in" / READERS[kind][1], tmp_path / "out"
    for name in ("execute/a.json", "annotations/a.json") if kind in ("execute", "annotations") else (READERS[kind][1],):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_text(json.dumps(WHOLE.get(Path(name).parent.name)))
    argv = reading(kind, world, file, out)
    before = everything(tmp_path, but=out).keys()
    monkeypatch.setattr(os, "fsync", lambda handle: None)   # another test's matter

    def work(number):
        shutil.rmtree(out, ignore_errors=True)
        blob, at = drawn(kind, number)
        file.write_bytes(blob)
        status, error = said(argv[0], argv[1:])
        late = any(words in error for words in ("nothing to train on", "--max-len", "goes on for", "half of a character", "no task has two", "no instance", "no training wordings"))
        if file.read_bytes() != blob or everything(tmp_path, but=out).keys() != before:
            return 71, "something was written outside of --out"
        if status == 2 and not late and (file.name not in error or at is not None and f"record {at}" not in error and f"line {at + 1}" not in error):
            return 72, error
        return status, error
    cases = [10_000 * trials + k for k in range(trials)]    # the short trials are others than the long ones
    record_property("trials", trials)
    wrong = judged(in_children(work, cases), cases)
    assert not wrong, f"{len(wrong)} of {trials}:\n" + "\n".join(wrong[:9])


@pytest.mark.parametrize("kind", ["json", "lines"])
def test_a_line_of_fifty_megabytes_is_refused(kind, world, tmp_path, record_property):     # noqa: F811
    """As one text in a record, as brackets, and as a text that does not end."""
    file, row = tmp_path / "in/f.json", ROWS["records"][0]
    file.parent.mkdir()
    argv = reading("records", world, file, tmp_path / "out")

    def work(number):
        blob = json.dumps({**row, "response": "x " * (25 << 20)}) if number == 0 else '{"a": ' + ("[" * (50 << 20) if number == 1 else '"' + "y" * (50 << 20))
        file.write_text("\n".join([json.dumps(row), blob, json.dumps(row)]) if kind == "lines" else f"[{json.dumps(row)}, {blob}]")
        return said(argv[0], argv[1:])
    results = in_children(work, [0, 1, 2])
    record_property("trials", 3)
    assert not judged(results, [0, 1, 2]) and [status for status, _ in results] == [2, 2, 2] and not (tmp_path / "out").exists(), results


# Model folders -------------------------------------------------------------------------------------------------------


SIDE = {"tokenizer_config.json": {"legacy": False, "add_bos_token": True, "bos_token": "<s>", "eos_token": {"content": "</s>", "special": True},
                                  "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}, "2": {"content": "</s>", "special": True}}},
        "added_tokens.json": {"<pad>": 3}, "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "additional_special_tokens": ["<pad>"]}}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_dropout": 0.0, "pretraining_tp": 1, "use_cache": True, "initializer_range": 0.02,
          "transformers_version": "4.40.0", "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                            "original_max_position_embeddings": 256}, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": [2]}


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory):     # noqa: F811
    """A model folder with all that the wild has beside the weights, an adapter, and a question."""
    path = tmp_path_factory.mktemp("folders")
    shutil.copytree(world / "model", path / "model")
    raw = json.loads((path / "model/config.json").read_text())
    (path / "model/config.json").write_text(json.dumps(raw | CONFIG))
    for name, value in SIDE.items():
        (path / "model" / name).write_text(json.dumps(value))
    torch.manual_seed(0)
    model = apply_lora(load_model(path / "model"), LoraConfig(rank=2))
    for module in lora_modules(model).values():
        module.lora_B.data.normal_()
    save_adapter(model, path / "adapter", "some/base")
    save_file({"weight": torch.randn(1, model.config.dim), "bias": torch.zeros(1)}, path / "adapter/value_head.safetensors")
    (path / "asked.json").write_text('[{"instruction": "name it", "input": "a red hat"}]')
    return path


def spoilt_tensors(blob: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, or other bytes."""
    if rng.random() < 0.4:
        return garbled(blob[:1 + rng.randrange(4000)], rng) + blob[4000:] if rng.random() < 0.7 else garbled(blob, rng)
    size = struct.unpack("<Q", blob[:8])[0]
    header, data_part = json.loads(blob[8:8 + size]), blob[8 + size:]
    how, name = rng.randrange(12), rng.choice(list(header.keys() - {"__metadata__"}))
    entry = header[name]
    if how < 4:
        header = spoilt(header, rng)
    elif how == 4:
        entry["shape"] = rng.choice(([], [1], entry["shape"][::-1], entry["shape"] + [1], [2**62, 0], [0], [2**40, 2**40], [-1, 4], [1.5]))
    elif how == 5:
        entry["dtype"] = rng.choice(("F16", "BF16", "F64", "I64", "I8", "BOOL", "F8_E4M3", "C64", "x", 3))
    elif how == 6:
        header[rng.choice((name + "x", name.upper(), "", "\x00", "../x", name.replace("layers.0", "layers.77"), "lm_head.bias"))] = header.pop(name)
    elif how == 7:
        other = rng.choice(list(header.keys() - {"__metadata__"}))
        entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
    elif how == 8:
        begin, end = entry["data_offsets"]
        width = {"F32": 4, "F16": 2, "BF16": 2}.get(entry["dtype"], 4)
        data_part = data_part[:begin] + struct.pack("<f", rng.choice((float("nan"), float("inf"), -float("inf"))))[-width:] + data_part[begin + width:]
    elif how == 9:
        data_part = data_part[:rng.randrange(len(data_part))]
    elif how == 10:
        data_part += b"x" * rng.choice((1, 8, 4096))
    else:
        return struct.pack("<Q", rng.choice((0, 1, size - 1, size + 1, 10**8 + 1, 2**63, 2**64 - 1))) + blob[8:]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data_part


DAMAGES = {                                                 # file -> (trials, how)
    "model/config.json": 1000, "model/model.safetensors": 1500, "model/tokenizer.model": 700, "model/tokenizer_config.json": 120, "model/added_tokens.json": 60,
    "model/special_tokens_map.json": 60, "adapter/adapter_config.json": 300, "adapter/adapter_model.safetensors": 500,
    "adapter/value_head.safetensors": 200}


def damaged(file: Path, name: str, number: int) -> bytes:
    """The bytes of a file of a model folder, damaged."""
    blob, rng = file.read_bytes(), random.Random(f"{name}/{number}")
    if name.endswith(".json"):
        return spoilt_text(blob.decode(), rng) if rng.random() < 0.2 else json.dumps(spoilt(json.loads(blob), rng)).encode()
    return spoilt_tensors(blob, rng) if name.endswith(".safetensors") else garbled(blob, rng)


def loads_right(folder: Path, original: Path, name: str) -> str:
    """What a model that was loaded from a damaged folder has wrong, or nothing: its shapes, a number, or a value of config.json that it took for another."""
    raw, config = json.loads((folder / "model/config.json").read_text()), read_config(folder / "model")
    for item in hf_fields():
        if raw.get(item.metadata["hf"]) not in (None, getattr(config, item.name)):
            return f"{item.name} is {getattr(config, item.name)}"
    shapes = {key: tuple(value.shape) for key, value in load_model(original / "model").state_dict().items()}
    found = load_model(folder / "model").state_dict()
    if name == "model/model.safetensors" and {key: tuple(value.shape) for key, value in found.items()} != shapes or not all(x.isfinite().all() for x in found.values()):
        return "other shapes, or a number that is none"
    tokenizer = data.Tokenizer(folder / "model")
    ids = tokenizer.encode_prompt("anna has a red hat , é 日 </s>")
    return "" if max(ids) < config.vocab_size and isinstance(tokenizer.decode(ids), str) else f"ids {ids}"


@pytest.mark.parametrize("name, trials", of_both(list(DAMAGES.items()), 20))
def test_a_damaged_model_folder_loads_right_or_is_refused(name, trials, folders, tmp_path, record_property):
    """In a child: it dies of nothing, writes nothing outside of --out, and what is refused is one sentence that names a file or folder."""
    shutil.copytree(folders, tmp_path / "in")
    file, out = tmp_path / "in" / name, tmp_path / "out"
    argv = ["--model", tmp_path / "in/model", "--instructions", tmp_path / "in/asked.json", "--max-new-tokens", "2", "--out", out]
    argv += ["--adapter", tmp_path / "in/adapter"] if name.startswith("adapter") else []
    before = everything(tmp_path, but=out).keys()

    def work(number):
        shutil.rmtree(out, ignore_errors=True)
        file.write_bytes(damaged(folders / name, name, number))
        status, error = said("eval", argv)
        if everything(tmp_path, but=out).keys() != before:
            return 71, "something was written outside of --out"
        if status == 2 and str(file.parent) not in error and file.name not in error:
            return 72, error
        wrong = loads_right(tmp_path / "in", folders, name) if status == 0 else ""
        return (74, wrong) if wrong else (status, error)
    cases = [10_000 * trials + k for k in range(trials)]    # the short trials are others than the long ones
    record_property("trials", trials)
    wrong = judged(in_children(work, cases), cases)
    assert not wrong, f"{len(wrong)} of {trials}:\n" + "\n".join(wrong[:9])


# Tokenizers ----------------------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def messages(blob: bytes) -> list[tuple[int, bytes]]:
    """(field, bytes) of the messages that a sentencepiece model is made of: field 1 is a piece."""
    found, at = [], 0
    while at < len(blob):
        field, size, shift, at = blob[at] >> 3, 0, 0, at + 1
        while True:
            size, shift, at = size | (blob[at] & 127) << shift, shift + 7, at + 1
            if blob[at - 1] < 128:
                break
        found.append((field, blob[at:at + size]))
        at += size
    return found


def a_piece(text: bytes, score: float = 0.0, kind: int = 1) -> tuple[int, bytes]:
    return 1, b"\n" + varint(len(text)) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind)


def directed(blob: bytes) -> dict[str, bytes]:
    """Tokenizer files that are made to do harm, or are something else."""
    parts = messages(blob)
    pieces, rest = [part for part in parts if part[0] == 1], [part for part in parts if part[0] != 1]

    def made(*more, pieces=pieces, rest=rest):
        return b"".join(bytes([field << 3 | 2]) + varint(len(part)) + part for field, part in [*pieces, *more, *rest])
    unknown = [part for part in pieces if not part[1].endswith(b"\x18\x02")]
    assert made() == blob
    return {"one more piece, which is well": made(a_piece(b"~q~")), "a piece of 2 MB": made(a_piece(b"x" * 2_000_000)), "a piece twice": made(pieces[-1]), "a control piece twice": made(pieces[1]), "no <unk>": made(pieces=unknown),
            "two <unk>": made(a_piece(b"<unk2>", 0, 2)), "scores that are no numbers": made(a_piece(b"~qq~", float("nan")), a_piece(b"~www~", float("inf"))), "an empty piece": made(a_piece(b"")),
            "a piece with a NUL": made(a_piece(b"a\0b")), "a piece that is no UTF-8": made(a_piece(b"\xff\xfe")), "a kind that is none": made(a_piece(b"~zz~", 0, 99)),
            "no pieces": made(pieces=[]), "one piece": made(pieces=pieces[:1]), "no BOS": made(pieces=pieces[:1] + pieces[3:]), "ids beyond the pieces": made(rest=[
                (field, part + (b"\xc8\x02" + varint(10**6) + b"\xd0\x02" + varint(2**31)) if field == 2 else part) for field, part in rest]),
            "no trainer": made(rest=rest[1:]), "nothing but pieces": made(rest=[]), "300,000 pieces more": made(*[a_piece(b"p%d" % n) for n in range(300_000)]),
            "a length of 2^63": blob + b"\n" + varint(2**63), "deep groups": blob + b"\x0b" * 100_000, "tiktoken": b"IQ== 0\nIg== 1\n", "JSON": b'{"model": {"type": "BPE"}}',
            "HTML": b"<html>sign in</html>", "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n", "empty": b"", "zeros": b"\0" * 10_000}


@pytest.mark.parametrize("which", ["directed", pytest.param("random", marks=pytest.mark.faults)])
def test_a_real_tokenizer_that_is_damaged_kills_nothing(which, folders, tmp_path, record_property):
    """Mistral's, where it is there (LLaMA 2 has the same settings), else the tiny world's: refused in one sentence, or all of its ids are in the embedding."""
    real = SHARED / "tokenizers/mistral-v1.tokenizer.model"
    blob = (real if real.exists() else folders / "model/tokenizer.model").read_bytes()
    size = len(data.Tokenizer(real if real.exists() else folders / "model")) + 10
    made, file = list(directed(blob).items()), tmp_path / "tokenizer.model"
    cases = list(range(1000 if which == "random" else len(made)))

    def work(number):
        file.write_bytes(garbled(blob, random.Random(number)) if which == "random" else made[number][1])
        try:
            tokenizer = data.Tokenizer(file)
            data.check_vocabulary(tokenizer, size, 1, (2,), tmp_path)
            ids = tokenizer.encode_prompt("anna has a red hat , é 日 🙂 </s> [INST]") + tokenizer.encode_continuation("red")
            assert 0 <= min(ids) and max(ids) < len(tokenizer) <= size and isinstance(tokenizer.decode([*ids, size + 5]), str)
        except ValueError as error:
            return 2, f"error: {error}" if str(tmp_path) in str(error) else f"without a name: {error}"
        except BaseException:
            return 70, traceback.format_exc()
        return 0, ""
    results = in_children(work, cases, memory=1 << 30)
    wrong = judged(results, [made[case][0] if which == "directed" else case for case in cases])
    record_property("trials", len(cases))
    assert not wrong, "\n".join(wrong[:5])


# The sentences a user should see -------------------------------------------------------------------------------------


def typed(program: str, argv: list, *, environ: dict = {}, memory: int = 0, file: int = 0, real: bool = False, cwd: Path = ROOT) -> tuple[int, str]:
    """A command line in a process of its own: exit status and stderr. `real` starts Python anew, else a fork has torch imported already."""
    def limited():
        if memory:
            now = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
            resource.setrlimit(resource.RLIMIT_AS, ((1 << 30) + memory if real else now + memory,) * 2)
        if file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))
    if real:
        done = subprocess.run([sys.executable, str(ROOT / f"{program}.py"), *map(str, argv)], capture_output=True, text=True, cwd=cwd, timeout=600,
                              env={**os.environ, **environ}, preexec_fn=limited)
        return done.returncode, done.stderr

    def work(case):
        os.environ.update(environ)
        limited()
        return said(program, argv)
    return in_children(work, [0], memory=1 << 40, seconds=600)[0]


class Scene:
    """The files of one mistake: a model folder to spoil, a run folder, and a command line."""

    def __init__(self, world, tmp_path):    # noqa: F811
        self.world, self.path, self.model, self.out, self.plan = world, tmp_path, tmp_path / "model", tmp_path / "runs/x", {}
        shutil.copytree(world / "model", self.model)

    def sft(self, *more):
        """A short run of sft on the model folder."""
        return ["train", *arguments(self.world, self.out, "--stage", "sft", "--steps", "2", "--batch-size", "2", "--no-evaluate"), "--model", self.model, *more]

    def cat(self, plan):
        """A run of cat whose judge is a server that answers everything with `plan`; SFT(IA) is there already."""
        self.plan, before = plan, self.path / "before"
        wordings = ["--wordings", "3", "--steps", "1", "--no-evaluate"]
        assert said("train", [*arguments(self.world, before / "sft-ia", "--stage", "sft-ia"), *wordings])[0] == 0
        return ["train", *arguments(self.world, self.out, "--stage", "cat", "--judge", "http", "--judge-url", plan.get("url", "URL"), "--judge-model", "m", "--judge-tries", "1"),
                *wordings, "--sft-steps", "1", "--batch-size", "2", "--pool-per-task", "30", "--no-compare", "--init", before]

    def tensors(self, change, file="model.safetensors"):
        """Spoil the weights: change(tensors)."""
        found = load_file(self.model / "model.safetensors")
        change(found)
        save_file(found, self.model / file, {"format": "pt"})
        return self.sft()

    def file(self, name, content):
        (self.model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return self.sft()

    def without(self, name):
        (self.model / name).unlink()
        return self


KEY = "sk-live-9Yq3ZtVb7KxWm2Rf"
Q = "model.layers.0.self_attn.k_proj.weight"
REFUSES = {"status": 401, "body": {"error": {"message": f"Incorrect API key provided: {KEY}"}}}


def code_in_a_bin(scene):
    torch.save({"model.norm.weight": Payload(scene.path / "marker")}, scene.model / "pytorch_model.bin")
    return scene.without("model.safetensors").sft()


class Payload:
    """What a pickle can do to who loads it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def shards(scene, name):
    return scene.without("model.safetensors").file("model.safetensors.index.json", json.dumps({"metadata": {"total_size": 9}, "weight_map": {Q: name}}))


def task_without_output(scene):
    record = json.loads((scene.world / "tasks/colour.json").read_text())
    del record["Instances"][17]["output"]
    (scene.path / "t.json").write_text(json.dumps(record))
    return scene.sft("--tasks", scene.path / "t.json")


def broken_line(scene):
    (scene.path / "records.jsonl").write_text('{"instruction": "a", "response": "b", "judgment": "c"}\n' * 203 + '{"instruction": "a" "response": "b"}\n' * 2)
    return ["train", "--stage", "cut", "--model", scene.model, "--records", scene.path / "records.jsonl", "--out", scene.out, "--no-evaluate"]


def nothing_left(scene):
    (scene.path / "c.jsonl").write_text("".join(json.dumps({**row, "reward": 0}) + "\n" for row in ROWS["own"]))
    return ["train", "--stage", "cat", "--model", scene.model, "--candidates", scene.path / "c.jsonl", "--out", scene.out, "--no-evaluate"]


def another_run(scene):
    assert said("train", scene.sft("--lr", "1e-5")[1:])[0] == 0
    return scene.sft("--lr", "2e-5")


def in_use(scene):
    scene.lock = train.in_use(scene.out)
    scene.lock.__enter__()
    return scene.sft()


def too_large(scene):
    (scene.path / "corpus.jsonl").write_text('[["anna has a hat", true]]\n')
    return ["train", "--stage", "pretrain", "--preset", "llama2-7b", "--corpus", scene.path / "corpus.jsonl", "--tokenizer", scene.model / "tokenizer.model", "--out", scene.out]


def of_another(scene):
    small = train.dataclasses.replace(read_config(scene.model), n_layers=3)
    save_adapter(apply_lora(train.Llama(small), LoraConfig(rank=2)), scene.path / "adapter", "TinyLlama/TinyLlama-1.1B")
    return ["eval", "--model", scene.model, "--adapter", scene.path / "adapter", "--tasks", scene.world / "tasks", "--out", scene.out]


def rows_fewer(scene):
    raw = json.loads((scene.model / "config.json").read_text())
    (scene.model / "config.json").write_text(json.dumps(raw | {"vocab_size": 400}))
    return scene.tensors(lambda x: x.update({name: x[name][:400].clone() for name in ("model.embed_tokens.weight", "lm_head.weight") if name in x}))


SENTENCES = [                                               # number in the plan, status, what provokes it, the sentence; <n> is any number
    (1, 2, lambda s: ["train", "--stage", "sfft"], 'unknown stage "sfft". Stages: pretrain, sft, sft-ia, cat, <*>. Did you mean "sft"?'),
    (2, 2, lambda s: s.without("config.json").sft(), "no model at {model} (no config.json). Give a folder in Hugging Face format: config.json, *.safetensors, tokenizer.model; or in Meta's: "
                                                     "params.json, consolidated.*."),
    (3, 2, lambda s: s.without("tokenizer.model").file("tokenizer.json", "{}"), "{model} has tokenizer.json but no tokenizer.model, and this program reads sentencepiece only. Newer transformers "
     "versions do not save that file: take it from the original model and pass --tokenizer FILE."),
    (4, 2, lambda s: s.file("tokenizer.model", "IQ== 0\nIg== 1\n"), "{model}/tokenizer.model is a tiktoken file (LLaMA 3 and later), not sentencepiece. Use a LLaMA-1/2, Mistral, Vicuna or "
                                                                    "TinyLlama checkpoint."),
    (5, 2, lambda s: s.file("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13476831232\n"),
     '{model}/model.safetensors is a Git LFS pointer of 74 bytes, not weights. Run "git lfs pull" in that folder.'),
    (6, 2, lambda s: s.file("model.safetensors", (s.model / "model.safetensors").read_bytes()[:9000]), "{model}/model.safetensors is damaged or incomplete: <*>. Download it again (found 9,000 bytes)."),
    (7, 2, lambda s: s.tensors(lambda x: x.update({Q: x[Q][:8].clone()})), f"tensor {Q} is (8, 32) in {{model}}/model.safetensors, config.json says (16, 32). The weights and config.json are from "
                                                                           "different models."),
    (8, 2, rows_fewer, "tokenizer has <n> pieces but the embedding has 400 rows ({model}). Use the tokenizer that came with this checkpoint."),
    (9, 2, of_another, "adapter {path}/adapter was made for another model: no module named model.layers.2.<*>. It names TinyLlama/TinyLlama-1.1B as its base; pass that with --model."),
    (10, 2, task_without_output, '{path}/t.json, record 17: field "output" is missing; found: id, input. Expected a string or a list of strings.'),
    (11, 2, broken_line, "{path}/records.jsonl, line 204, is not JSON: Expecting ',' delimiter: <*>. Only a torn last line of a run's own file is repaired automatically. Fix or delete that line."),
    (12, 2, nothing_left, "nothing to train on for stage cat: no item is left. See the counts above; more samples or another judge may help."),
    (13, 1, lambda s: s.cat({**REFUSES}), "no API key: the environment variable JUDGE_API_KEY is empty, and {url}/v1/chat/completions wants one. Set it, or use --judge self or --judge rule. <saved>"),
    (14, 2, lambda s: s.cat({"key": KEY + "\n"}), "the key in JUDGE_API_KEY has a line break or blank at an end; HTTP cannot carry it. Set it again without it. (The key is not shown.)"),
    (15, 2, lambda s: s.cat({"key": KEY, "url": "http://10.0.0.5/v1"}), "refusing to send the key in JUDGE_API_KEY over plain http to 10.0.0.5. Use https, or a tunnel to 127.0.0.1, or unset the "
                                                                       "key if that server needs none."),
    (16, 1, lambda s: s.cat({"key": KEY, **REFUSES}), "the judge at {url}/v1/chat/completions refused the key (401). Correct the key in JUDGE_API_KEY and run the same command. <saved>"),
    (17, 1, lambda s: s.cat({"status": 429, "body": {"error": {"message": "no", "code": "insufficient_quota"}}}), "the judge's account at {url}/v1/chat/completions is out of credit. <saved>"),
    (18, 1, lambda s: s.cat({"url": "http://127.0.0.1:9"}), "no judge at http://127.0.0.1:9/v1/chat/completions: no connection in 1 tries. Start the server, or check --judge-url (it should end "
                                                            "in /v1). <saved>"),
    (18, 1, lambda s: s.cat({"status": 404, "body": {"error": {"message": "no"}}}), '{url}/v1/chat/completions has no chat completions (404). Does --judge-url end in /v1, and is the model "m" '
                                                                                    "served? It offers: m, other. <saved>"),
    (19, 2, another_run, "{out} holds another run: lr was 1e-05, now 2e-05. Use another --out, or the old settings."),
    (20, 1, too_large, "out of memory: can't allocate memory: you tried to allocate <n> bytes. Error code 12 (Cannot allocate memory). Lower --micro-tokens or --eval-batch, or add --checkpointing; what was finished is kept."),
    (21, 2, code_in_a_bin, "{model}/pytorch_model.bin contains posix.system, which is code, not weights. It was not loaded. Get a safetensors version of this model."),
    (22, 2, lambda s: shards(s, "../other/model.safetensors"), '{model}/model.safetensors.index.json points outside its folder ("../other/model.safetensors"). Refused; do not trust this download.'),
    (23, 2, lambda s: s.tensors(lambda x: x[Q][3, 1].fill_(float("nan"))), f"tensor {Q} has 1 non-finite values ({{model}}/model.safetensors). The checkpoint is broken."),
    (24, 1, lambda s: s.sft("--lr", "1e30", "--steps", "9", "--save-every", "1"), "step <n> of sft gave a non-finite loss or gradient norm (<*>; records <*>); nothing was updated. Last checkpoint: "
                                                                                 "step <n>. Try a lower --lr with another --out, or look at those records."),
    (25, 1, lambda s: s.sft(), "{out}/<*>: File too large. What was finished is kept; give another --out, or make room, and run the same command again."),
    (26, 2, in_use, "{out} is in use by process <n> on <*>. Wait for it, or choose another --out."),
    (27, 1, lambda s: s.cat({"key": KEY, "status": 307, "headers": {"Location": "http://127.0.0.1:1/v1"}}), "the judge at {url}/v1/chat/completions redirects. Redirects are not followed, since "
     "they would carry your prompts elsewhere. If that is right, set --judge-url to the new address. <saved>"),
    (28, 1, lambda s: s.cat({"body": completion("hm")}), "<n> of <n> judge replies had no readable verdict (<n> no verdict). Use another judge, or allow more with --max-unparsed."),
]


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.faults)])
@pytest.mark.parametrize("number, status, provoke, sentence", [pytest.param(*row, id=f"{row[0]}-{k}") for k, row in enumerate(SENTENCES)])
def test_every_sentence(number, status, provoke, sentence, real, world, tmp_path):     # noqa: F811
    """One line on stderr, as it stands here, the exit status that it means, no traceback, no key; where the input is wrong, nothing is made in --out.

    (Where nothing is left to train on, that is found out in the run folder, which keeps its config.json.)
    """
    scene = Scene(world, tmp_path)
    with ChatServer(lambda request, count: scene.plan) as server:
        program, *argv = [server.url if word == "URL" else word for word in provoke(scene)]
        before = everything(tmp_path, but=scene.out / "none")
        found, error = typed(program, argv, environ={"JUDGE_API_KEY": scene.plan.get("key", "")}, memory=300 << 20 if number == 20 else 0, file=30_000 if number == 25 else 0, real=real)
    (line,) = complaints(error)
    known = {"{path}": tmp_path, "{model}": scene.model, "{out}": scene.out, "{url}": server.url}
    wanted = re.escape(sentence)
    for name, value in known.items():
        wanted = wanted.replace(re.escape(name), re.escape(str(value)))
    wanted = wanted.replace("<n>", r"[\d,]+").replace(r"<\*>", ".+").replace("<saved>", rf"\d+ answers are saved in {re.escape(str(scene.out))}/judge.jsonl; run the same command to go on, "
                                                                                  r"nothing is asked twice\.")
    assert re.fullmatch(f"error: {wanted}", line), f"{line}\n{wanted}"
    assert found == status and "Traceback" not in error and KEY[3:11] not in error and not (tmp_path / "marker").exists()
    if status == 2:
        after = everything(tmp_path, but=scene.out / "none")
        assert {name for name in after if after[name] != before.get(name)} - {str(scene.out / "run.lock")} <= ({str(scene.out / "config.json")} if number == 12 else set())


@pytest.mark.parametrize("name, trials", of_both([("config.json", 100), ("log.jsonl", 60), ("candidates.jsonl", 60), ("sft-ia/config.json", 60)], 8))
def test_a_damaged_run_folder_goes_on_or_is_refused(name, trials, world, tmp_path, monkeypatch, record_property):     # noqa: F811
    """The same command again, in a folder that somebody has edited: it finds what it finished, or says in one sentence which file is wrong."""
    home, out = tmp_path / "done", tmp_path / "out"
    argv = lambda place: [*arguments(world, place, "--stage", "cat", "--judge", "rule", "--wordings", "3", "--steps", "1", "--sft-steps", "1", "--samples", "1", "--pool-per-task", "4",     # noqa: E731
                                     "--batch-size", "2", "--no-compare", "--no-evaluate")]
    planted(world, tmp_path / "c.jsonl")
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    status, error = said("train", [*argv(out), "--candidates", tmp_path / "c.jsonl"])
    assert status == 0, error
    data.append_records(out / "candidates.jsonl", [{**row, "sample": k % 4} for k, row in enumerate(data.read_records(tmp_path / "c.jsonl"))])
    out.rename(home)

    def work(number):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(home, out)
        rng, lines = random.Random(f"{name}/{number}"), (home / name).read_text().splitlines()
        at = rng.randrange(len(lines))
        if name.endswith(".json"):
            blob = spoilt_text("\n".join(lines), rng) if rng.random() < 0.3 else json.dumps(spoilt(json.loads("\n".join(lines)), rng)).encode()
        else:
            lines[at] = spoilt_text(lines[at], rng).decode(errors="replace") if rng.random() < 0.3 else json.dumps(spoilt(json.loads(lines[at]), rng))
            blob = ("\n".join(lines) + "\n").encode(errors="replace")
        (out / name).write_bytes(blob)
        if name == "candidates.jsonl":
            (out / "adapter_config.json").unlink()          # it was collecting when it was stopped
            (out / "config.json").write_text((home / "config.json").read_text().replace(str(tmp_path / "c.jsonl"), ""))
        status, error = said("train", argv(out) if name == "candidates.jsonl" else [*argv(out), "--candidates", tmp_path / "c.jsonl"])
        return status, error if status != 2 or str(out) in error or "nothing to train on" in error or "half of a character" in error else "no name: " + error
    cases = [10_000 * trials + k for k in range(trials)]    # the short trials are others than the long ones
    record_property("trials", trials)
    wrong = judged(in_children(work, cases), cases)
    assert not wrong, f"{len(wrong)} of {trials}:\n" + "\n".join(wrong[:9])


# Code in files, and files that are bombs -----------------------------------------------------------------------------


def pickled(home: Path, file: str, marker: Path, how: str = "", gone: tuple = ("model/model.safetensors",)) -> None:
    """Write a file whose pickle runs a command, in place of others."""
    for name in gone:
        (home / name).unlink()
    load = Payload(marker)
    if how == "bare":
        return (home / file).write_bytes(pickle.dumps(load)) and None
    if how == "tar":
        with tarfile.open(home / file, "w") as archive:
            for member, blob in (("sys_info", b""), ("pickle", pickle.dumps(load)), ("storages", b""), ("tensors", b"")):
                info = tarfile.TarInfo(member)
                info.size = len(blob)
                archive.addfile(info, io.BytesIO(blob))
        return
    torch.save({"model.norm.weight": load}, home / file, _use_new_zipfile_serialization=how != "old")


META = '{"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 420, "multiple_of": 32, "norm_eps": 1e-5}'
CODE = {                                                    # where code can lie -> what puts it there
    "a .bin": lambda home, marker: pickled(home, "model/pytorch_model.bin", marker),
    "an old .bin": lambda home, marker: pickled(home, "model/pytorch_model.bin", marker, "old"),
    "a tar": lambda home, marker: pickled(home, "model/pytorch_model.bin", marker, "tar"),
    "a bare pickle": lambda home, marker: pickled(home, "model/pytorch_model.bin", marker, "bare"),
    "a shard": lambda home, marker: (pickled(home, "model/a.bin", marker), (home / "model/pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "a.bin"}}')),
    "a .safetensors": lambda home, marker: pickled(home, "model/model.safetensors", marker, "bare"),
    "Meta's .pth": lambda home, marker: (pickled(home, "model/consolidated.00.pth", marker, gone=("model/model.safetensors", "model/config.json")),
                                         (home / "model/params.json").write_text(META)),
    "a tokenizer": lambda home, marker: pickled(home, "model/tokenizer.model", marker, "bare", gone=()),
    "an adapter's .bin": lambda home, marker: pickled(home, "adapter/adapter_model.bin", marker, gone=("adapter/adapter_model.safetensors",)),
    "an adapter's bare pickle": lambda home, marker: pickled(home, "adapter/adapter_model.bin", marker, "bare", gone=("adapter/adapter_model.safetensors",)),
    "an adapter": lambda home, marker: pickled(home, "adapter/adapter_model.safetensors", marker, "bare", gone=()),
    "a reward head": lambda home, marker: pickled(home, "adapter/value_head.safetensors", marker, "bare", gone=()),
    "code beside the model": lambda home, marker: [(home / "model" / name).write_text(text) for name, text in (
        ("modeling.py", f"import os; os.system('touch {marker}')"), ("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), ("config.json", json.dumps(
            json.loads((home / "model/config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}, "trust_remote_code": True})))],
}


@pytest.mark.parametrize("name", CODE)
def test_code_in_a_file_is_not_run(name, folders, tmp_path):
    home, marker = tmp_path / "in", tmp_path / "marker"
    shutil.copytree(folders, home)
    CODE[name](home, marker)
    argv = ["--model", home / "model", "--instructions", home / "asked.json", "--max-new-tokens", "2", "--out", tmp_path / "out", *(["--adapter", home / "adapter"] if "adapter" in name or "head" in name else [])]
    status, error = typed("eval", argv)
    assert not marker.exists() and not judged([(status, error)], [name]) and status == (0 if name == "code beside the model" else 2), error


def test_the_same_code_runs_where_a_file_is_unpickled(folders, tmp_path):
    """The control."""
    shutil.copytree(folders, tmp_path / "in")
    CODE["a bare pickle"](tmp_path / "in", tmp_path / "marker")
    with open(tmp_path / "in/model/pytorch_model.bin", "rb") as stream:
        pickle.load(stream)
    assert (tmp_path / "marker").exists()


def test_nothing_in_the_source_unpickles_or_evaluates():
    """Of every call in the seven files: torch.load with weights_only=True alone, and no eval, exec, pickle.load, system, shell or DCP."""
    found = []
    for file in sorted(ROOT.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name, more = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                bad = name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen") or re.search(r"pickle\.loads?$|yaml\.|marshal\.|shelve\.|checkpoint\.(load|save)$", name)
                if bad or "shell" in more or "allow_pickle" in more or name == "torch.load" and more.get("weights_only") != "True":
                    found.append(f"{file.name}:{node.lineno} {ast.unparse(node)[:80]}")
    assert not found


OUTSIDE = ("../outside.safetensors", "{path}/outside.safetensors", "a/../../outside.safetensors", "model/../../outside.safetensors", "./../outside.safetensors", "link.safetensors")


def test_a_reader_that_joins_paths_lets_foreign_files_in(folders, tmp_path):
    """The control of model::test_shards_stay_in_their_folder."""
    home = tmp_path / "home"
    (home / "a").mkdir(parents=True)
    (home / "model").mkdir()
    shutil.copy(folders / "model/model.safetensors", tmp_path / "outside.safetensors")
    os.symlink(tmp_path / "outside.safetensors", home / "link.safetensors")
    assert sum(bool(load_file(os.path.join(home, name.replace("{path}", str(tmp_path))))) for name in OUTSIDE) >= 4


def a_bomb(home: Path, name: str) -> None:
    """Spoil the model folder with something small that wants to be large."""
    file, config, weights = home / "model/pytorch_model.bin", home / "model/config.json", home / "model/model.safetensors"
    raw, state = json.loads(config.read_text()), load_file(weights)
    if name in BOMBS:
        return config.write_text(json.dumps(raw | BOMBS[name])) and None
    if name in ("stride 0", "meta", "sparse"):
        state["model.norm.weight"] = {"stride 0": torch.ones(1).expand(2**40), "meta": torch.ones(2**40, device="meta"), "sparse": torch.sparse_coo_tensor([[0]], [1.0], (2**40,))}[name]
    if name in ("stride 0", "meta", "sparse", "deflated"):
        torch.save(state if name != "deflated" else {"model.norm.weight": torch.zeros(64 << 20)}, file)
        weights.unlink()
    if name == "deflated":
        with zipfile.ZipFile(file) as stored, zipfile.ZipFile(home / "x", "w", zipfile.ZIP_DEFLATED) as deflated:
            for entry in stored.namelist():
                deflated.writestr(entry, stored.read(entry))
        os.replace(home / "x", file)
    if name == "300,000 names":
        header = json.dumps({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(300_000)}).encode()
        weights.write_bytes(struct.pack("<Q", len(header)) + header)
    if name == "a sparse file of 1 TiB":
        os.truncate(weights, 2**40)
    if name == "a million shards":
        weights.unlink()
        (home / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"t{n}": f"s{n}.safetensors" for n in range(10**6)}}))
    if name == "64 MB of settings":
        config.write_text(json.dumps(raw | {"x": "y" * (64 << 20)}))


BOMBS = {"hidden 2^31": {"hidden_size": 2**31}, "10^9 layers": {"num_hidden_layers": 10**9}, "a vocabulary of 2^40": {"vocab_size": 2**40}, "1,024 layers of width 2^17": {
    "hidden_size": 2**17, "num_hidden_layers": 1024, "intermediate_size": 2**20, "vocab_size": 2**24}, "head_dim 0": {"head_dim": 0}, "theta 1e308": {"rope_theta": 1e308},
    "4,096 heads": {"num_attention_heads": 4096, "head_dim": 4096}}


@pytest.mark.parametrize("name", [*BOMBS, "stride 0", "meta", "sparse", "deflated", "300,000 names", "a sparse file of 1 TiB", "a million shards", "64 MB of settings"])
def test_bombs_are_refused_in_little_time_and_memory(name, folders, tmp_path):
    home = tmp_path / "in"
    shutil.copytree(folders, home)
    a_bomb(home, name)
    argv = ["--model", home / "model", "--instructions", home / "asked.json", "--out", tmp_path / "out"]

    def work(case):
        begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status, error = said("eval", argv)
        return status, json.dumps([error, time.process_time() - begin, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024])
    (status, text), = in_children(work, [0], memory=2 << 40 if "TiB" in name else 4 << 30)
    error, seconds, grown = json.loads(text)
    assert status == 2 and not judged([(status, error)], [name]) and seconds < 5 and grown < 600, f"{status}, {seconds:.1f} s, {grown:.0f} MB: {error}"


# Two at once ---------------------------------------------------------------------------------------------------------


def test_two_processes_that_start_at_once_share_no_folder(tmp_path, record_property):
    """Twenty times: one has the folder, the other is told; killed, it leaves the folder free."""
    for trial in range(20):
        children, reports = [], []
        for _ in range(2):
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    train.take_lock(tmp_path / str(trial))
                    os.write(write, b"has it")
                    signal.pause()
                except ValueError as error:
                    os.write(write, str(error).encode())
                finally:
                    os._exit(0)
            children.append(child)
            os.close(write)
            reports.append(read)
        heard = sorted(os.read(read, 500).decode() for read in reports)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert heard[1] == "has it" and " is in use by " in heard[0], heard
        train.take_lock(tmp_path / str(trial))
        os.close(train.LOCKS.pop(tmp_path / str(trial)))
    record_property("trials", 20)


# Records, samplers and judges at their limits ------------------------------------------------------------------------


BETWEEN = [b"\x00" * 40, b'{"id": "x', b"null", b"[1]", b"\xef\xbb\xbf{}", b'{"a": "\xff"}', b'{"a": 1} {"b": 2}', b"{}", b"3", b'"x"', b"oops", b"[" * 90_000, b'{"id": ' + b"7" * 5000 + b"}",
           b"{'id': 1}", b'{"id": 1,}', b"", b"   ", b'{"task": ["x"], "id": {}, "wording": 1, "sample": []}', b"\x1b[2J", b"<html>"]


def test_damage_that_is_not_at_the_end_is_refused_and_left_alone(tmp_path, record_property):
    """Of a run's own records: the sentence names file and line, and the file stays as it is."""
    path, good = tmp_path / "candidates.jsonl", b'{"task": "t", "id": "1", "wording": "w", "sample": %d, "response": "r"}\n'
    for damage in BETWEEN:
        path.write_bytes(blob := good % 0 + damage + b"\n" + good % 1)
        with pytest.raises(ValueError, match=r"candidates.jsonl, line 2, is no"):
            train.collected(path, train.candidate_key)
        assert path.read_bytes() == blob and list(tmp_path.iterdir()) == [path], damage[:40]
    record_property("trials", len(BETWEEN))


def test_hostile_texts_come_back_from_a_record_file_as_they_were(tmp_path, record_property):
    """One physical line each; on the screen and in report.md no control character of theirs is left."""
    rng = random.Random(0)
    bits = ["\ud800", "\u2028", "\u2029", "\x85", "\x1e", "\x00", "\x1b[31m", "\r", "\n", "\u202e", "\u200b", "é", "日", "🙂", "\\", '"', "<b>", "|", "`", "[x](http://y)", "9" * 400, "x"]
    texts = ["".join(rng.choice(bits) for _ in range(rng.randrange(1, 40))) for _ in range(298)] + ["y" * 10**6, "\ud800" * 10**4]
    data.append_records(tmp_path / "r.jsonl", [{"id": k, "text": text} for k, text in enumerate(texts)])
    assert [record["text"] for record in data.read_records(tmp_path / "r.jsonl", own=True)] == texts
    assert (tmp_path / "r.jsonl").read_bytes().count(b"\n") == len((tmp_path / "r.jsonl").read_text().splitlines()) == len(texts)
    assert all(show(text).isprintable() for text in texts for show in (evaluation.printable, evaluation.markdown_text))
    record_property("trials", len(texts))


LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0]])
SAMPLES = [(LOGITS, how) for how in ((0.0, 0, 1.0), (1.0, 0, 1.0), (1e-6, 0, 1.0), (1e30, 0, 1.0), (1.0, 1, 1.0), (1.0, 5, 1.0), (1.0, 0, 1e-9), (1e-6, 3, 0.5))]
SAMPLES += [(LOGITS.masked_fill(torch.tensor(mask), float("-inf")), how) for mask in ((False, True, True, True), (True, True, False, True)) for how in (
    (0.0, 0, 1.0), (1.0, 0, 1.0), (1e-6, 2, 0.9), (1e30, 0, 0.9))]
SAMPLES += [(torch.full((1, 4), value), how) for value in (float("nan"), float("inf"), float("-inf")) for how in ((0.0, 0, 1.0), (1.0, 2, 0.9))]
SAMPLES += [(torch.tensor([[value, 1.0]]), (1.0, 0, 1.0)) for value in (float("nan"), float("inf"))] + [(torch.tensor([[3.0]]), (1.0, 5, 0.1)), (torch.tensor([[3e38, -3e38]]), (1.0, 0, 1.0))]


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_a_sampler_gives_a_possible_token_or_a_sentence(number):
    logits, (temperature, top_k, top_p) = SAMPLES[number]
    for draw in (0.0, 0.5, 1 - 2**-53):
        if logits.logsumexp(-1).isfinite().all():
            (token,), (logprob,) = sample(logits, torch.tensor([draw], dtype=torch.float64), temperature, top_k, top_p)
            assert logits[0, token] > float("-inf") and logprob.isfinite()
        else:
            with pytest.raises(ValueError, match="non-finite logits"):
                sample(logits, torch.tensor([draw], dtype=torch.float64), temperature, top_k, top_p)


@pytest.mark.parametrize("bias", [0.0, 0.25, 0.5, 1.0])
def test_a_judge_that_likes_the_first_place_is_measured(bias, record_property):
    """It names the first of two answers with probability `bias`, else the better one: over 400 pairs the orders disagree that often, within three standard errors."""
    rng = random.Random(7)
    pairs = [{"input": "say it", "output_1": ("good", "poor")[k % 2], "output_2": ("poor", "good")[k % 2], "label": 1 + k % 2} for k in range(400)]

    def say(question):
        text = question.messages[1]["content"]
        first = rng.random() < bias or text.index("good") < text.index("poor")
        return Reply(f"VERDICT {question.nonce}: {'a' if first else 'b'}")
    rows = evaluate_pairs(lambda questions, **how: [say(question) for question in questions], pairs, STRATEGIES["rules"])
    agreement = evaluation.judge_metrics(pairs, rows)["agreement"]["mean"]
    assert abs(1 - agreement - bias) <= 3 * (bias * (1 - bias) / 400) ** 0.5
    record_property("trials", 400)
