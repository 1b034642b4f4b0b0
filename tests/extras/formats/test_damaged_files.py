"""Damaged, foreign and malicious files are read right, or refused in a sentence that names them.

What may die of a signal runs in a child with limits. The short trials run with the suite;
`pytest -m faults` draws more.
"""

import json
import os
import random
import resource
import shutil
import struct
import time
import traceback
from pathlib import Path

import pytest
import torch
from damage import garbled, in_children, of_both, spoilt, spoilt_text
from safetensors.torch import load_file, save_file

from data import Task
from extras.formats import (
    add_paraphrases,
    check_vocabulary,
    find_template,
    open_adapter,
    open_model,
    open_tokenizer,
    read_candidates,
    read_config,
    read_corpus,
    read_examples,
    read_instructions,
    read_judged,
    read_labelled,
    read_tasks,
    save_model,
)
from extras.formats.config import BOUNDS, KEYS
from lora import LoraConfig, apply_lora, lora_modules, save_adapter


def fault(read, names) -> str:
    """What is wrong with a call: anything but success or one sentence with one of the names."""
    try:
        read()
    except ValueError as error:
        sentence = str(error)
        if "\n" in sentence or len(sentence) > 1500 or not any(name in sentence for name in names):
            return f"an odd sentence: {sentence}"
    except BaseException:
        return traceback.format_exc()
    return ""


# Data ------------------------------------------------------------------------------------------


def said(role, text):
    return {"role": role, "content": text}


ROWS = {  # kind of file -> rows as the wild has them
    "judged": [
        {"instruction": "name it", "input": "a red hat", "response": "blue", "judgment": "No."},
        {"id": "7", "instruction": "name it", "input": "", "output": "tom has a hat",
         "judgment": "Too long.", "score": 3, "i_ans": "tom", "score_ans": 9},
        {"instruction": "name it", "input": "x", "response": "red", "judgment": None,
         "target": "red", "targets": ["red", "a red"]},
        {"question": "who has a hat ?", "answer": "mary", "feedback": "Wrong name.",
         "output_correct": "anna"},
        {"instruction": "who is it", "completions": [
            {"response": "anna", "critique": "Good.", "overall_score": 8},
            {"response": "tom", "critique": "Bad.", "overall_score": 2.5}]},
        {"data": {"passage": {"text": "anna has a hat"}, "questions": [{
            "question": "who ?", "rankings": [0.1, 0.9], "answers": [
                {"answer": "tom", "feedback": {"critiques": []}}, {
                    "answer": "mary", "feedback": {
                        "critiques": [{"text": "No.", "refinement": "anna"}]}}]}]}}],
    "candidates": [
        {"prompt": "name it", "chosen": "red", "rejected": "blue"},
        {"chosen": "\n\nHuman: who ?\n\nAssistant: anna",
         "rejected": "\n\nHuman: who ?\n\nAssistant: tom"},
        {"conversations": [{"from": "human", "value": "which hat ?"}],
         "chosen": {"from": "gpt", "value": "red"}, "rejected": {"from": "gpt", "value": "black"}},
        {"prompt": [said("system", "be short"), said("user", "who ?")],
         "chosen": [said("assistant", "anna")], "rejected": [said("assistant", "paul")]},
        {"instruction": "who has it ?", "completions": [
            {"response": "anna", "overall_score": 9.0}, {"response": "tom", "overall_score": 2}]},
        {"query": "which ?", "responses": ["red", "blue", "white"], "scores": [0.9, -0.3, 0.1]},
        {"instruction": "name it", "input": "x", "system": "be short", "history": [["a", "b"]],
         "chosen": "red", "rejected": "blue"},
        {"prompt": [said("user", [{"type": "text", "text": "who ?"}])], "completion": "anna",
         "label": True},
        {"prompt": "who ?", "prompt_id": "a", "score_chosen": 8.0, "score_rejected": 3.5,
         "chosen": [said("user", "who ?"), said("assistant", "anna")],
         "rejected": [said("user", "who ?"), said("assistant", "tom")]}],
    "own": [{"task": "colour", "id": str(n // 3), "instruction": "name it", "wording": f"w{n}",
             "input": f"hat {n // 3}", "target": "red", "sample": 0, "response": text,
             "reward": reward, "finished": True, "how": "rule", "expected": True,
             "correct": reward == 2, "p_expected": None, "p_correct": None}
            for n, (text, reward) in enumerate([("red", 2), ("blue", 1), ("hat hat", 0)] * 3)],
    "examples": [
        {"instruction": "name the colour", "input": "anna has a red hat", "output": "red"},
        {"instruction": "say a name", "input": "", "output": "tom", "text": "..."},
        {"id": "x_0", "conversations": [
            {"from": "human", "value": "who ?"}, {"from": "gpt", "value": "anna"},
            {"from": "human", "value": "sure ?"}, {"from": "gpt", "value": "yes"}]},
        {"messages": [said("system", "be short"), said("user", "which ?"),
                      said("assistant", "red") | {"weight": 0},
                      said("user", [{"type": "text", "text": "sure ?"}]),
                      said("assistant", "yes") | {"weight": 1}]},
        {"instruction": "name it", "input": "", "output": "red", "system": "be short",
         "history": [["which ?", "blue"]]},
        {"prompt": "who ?", "completion": "anna"},
        {"prompt": [said("user", "who ?")], "completion": [said("assistant", "anna")]}],
    "labelled": [{"task": "colour", "id": str(n), "number": 0, "instruction": "name it",
                  "input": f"hat {n}", "probability": p,
                  "first": {"wording": "name it", "response": "red"},
                  "second": {"wording": "colour ?", "response": "blue"}}
                 for n, p in enumerate((0.9, 0.2, 0.5))],
    "corpus": [[["anna has a red hat . ", False], ["red", True], ["</s>", True]],
               [["tom has a blue hat", True]], [["who ? ", False], ["tom", True]]],
    "instructions": [{"instruction": "name it", "input": "a red hat", "dataset": "x"},
                     {"instruction": "who ?"}, {"instruction": "which", "input": "", "id": 3}],
}
EXAMPLES = {"1": {"input": "a", "output": "b"}, "2": {"cause": "x", "effect": "y"},
            "3": {"items": ["a", "b"], "concept": "c", "all_common_concepts": ["d"]},
            "4": {"input": "hat", "output": "red", "other_rhymes": ["b"],
                  "possible_translations": ["c"]}}
WHOLE = {
    "task": {"Contributors": ["x"], "Definition": ["give the colour ."],
             "Positive Examples": [{"input": "a", "output": "b", "explanation": "c"}],
             "Instances": [{"id": f"task9-{n}", "input": f"tom has a {colour} hat {n}",
                            "output": [colour]} for n, colour in enumerate(("red", "blue") * 3)]},
    "wordings": {"colour": {"train": [{"text": "which colour ?", "style": "plain"}, "name it :"],
                            "dev": ["the colour , please", "colour ?"],
                            "test": ["say it", "tell it"]},
                 "person": [f"who {n} ?" for n in range(9)]},
    "execute": {"metadata": {"num_examples": 2}, "examples": EXAMPLES},
    "annotations": {"annotations": [f"name it {n}" for n in range(9)]},
    "template": {"description": "x", "prompt_input": "{instruction} {input} :", "end": "</s>",
                 "prompt_no_input": "{instruction} :", "response_split": ":",
                 "turn": "{opening}{user} :", "strip": True},
}


def read_wordings(file):
    add_paraphrases(file, [Task("colour", "d", []), Task("person", "d", [])])


def render_template(file):
    template = find_template(str(file))
    for judgment in (None, "j"):
        template.render("x", "y", judgment)
    template.render_turn("x", system="s")


READERS = {  # kind of file -> (long trials, name, what reads it)
    "judged": (3000, "f.json", read_judged), "candidates": (3000, "f.json", read_candidates),
    "own": (2000, "f.jsonl", read_candidates), "examples": (2000, "f.json", read_examples),
    "labelled": (1000, "f.jsonl", read_labelled), "corpus": (1000, "f.jsonl", read_corpus),
    "instructions": (1000, "f.json", read_instructions), "task": (3000, "t.json", read_tasks),
    "wordings": (2000, "f.json", read_wordings), "template": (2000, "f.json", render_template),
    "execute": (1000, "execute/a.json", lambda file: read_tasks(file.parents[1])),
    "annotations": (1000, "annotations/a.json", lambda file: read_tasks(file.parents[1]))}


def draw(kind, number):
    """A damaged file of a kind, and the record that is damaged, where it is one."""
    rng = random.Random(f"{kind}/{number}")
    if kind in WHOLE:
        text = json.dumps(WHOLE[kind], ensure_ascii=rng.random() < 0.5)
        if rng.random() < 0.25:
            return spoilt_text(text, rng), None
        return json.dumps(spoilt(WHOLE[kind], rng)).encode(), None
    at, broken = rng.randrange(len(ROWS[kind])), rng.random() < 0.25
    lines = kind == "corpus" or rng.random() < 0.5
    rows = [json.dumps(row).encode() for row in ROWS[kind]]
    if broken:
        rows[at] = spoilt_text(rows[at].decode(), rng)
    else:
        rows[at] = json.dumps(spoilt(ROWS[kind][at], rng)).encode()
    blob = b"\n".join(rows) if lines else b"[" + b", ".join(rows) + b"]"
    return blob, None if broken else at


@pytest.mark.parametrize("kind, trials", of_both([(k, row[0]) for k, row in READERS.items()], 60))
def test_damaged_data_are_read_or_refused_by_name(kind, trials, tmp_path):
    _, name, read = READERS[kind]
    for other in ("execute/a.json", "annotations/a.json"):
        (tmp_path / other).parent.mkdir()
        (tmp_path / other).write_text(json.dumps(WHOLE[Path(other).parent.name]))
    file, refused = tmp_path / name, 0
    for number in range(10_000 * trials, 10_000 * trials + trials):
        blob, at = draw(kind, number)
        file.write_bytes(blob)
        names = [str(file)] if at is None else [f"{file}, record {at}", f"{file}, line {at + 1}"]
        wrong = fault(lambda: read(file), names)
        assert not wrong, f"{number}: {blob[:500]}\n{wrong}"
        assert file.read_bytes() == blob
        refused += bool(fault(lambda: read(file), []))
    assert 0.2 * trials < refused < 0.9 * trials  # the trials try something


@pytest.mark.parametrize("lines", [False, True])
def test_a_line_of_fifty_megabytes_is_refused(lines, tmp_path):
    """As one text in a record, as brackets, and as a text that does not end."""
    file, row = tmp_path / "f.json", ROWS["judged"][0]

    def work(number):
        blob = ['{"a": ' + "[" * (50 << 20), '{"a": "' + "y" * (50 << 20),
                json.dumps({**row, "response": "x " * (25 << 20)})][number]
        rows = [json.dumps(row), blob, json.dumps(row)]
        file.write_text("\n".join(rows) if lines else f"[{', '.join(rows)}]")
        return fault(lambda: read_judged(file), [str(file)]) or ("" if fault(
            lambda: read_judged(file), []) else "it was read")
    assert in_children(work, [0, 1, 2]) == ["", "", ""]


# Model folders ---------------------------------------------------------------------------------

SIDE = {
    "tokenizer_config.json": {
        "legacy": False, "add_bos_token": True, "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True}, "added_tokens_decoder": {
            "0": {"content": "<unk>", "special": True}, "2": {"content": "</s>", "special": True}}},
    "added_tokens.json": {"<pad>": 3},
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"},
                                "additional_special_tokens": ["<pad>"]}}
CONFIG = {"attention_dropout": 0.0, "pretraining_tp": 1, "use_cache": True, "pad_token_id": None,
          "transformers_version": "4.40.0", "bos_token_id": 1, "eos_token_id": [2],
          "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                           "high_freq_factor": 4.0, "original_max_position_embeddings": 256}}


@pytest.fixture(scope="module")
def folders(make_model, folder, tmp_path_factory):
    """A model folder with all that the wild has beside the weights, and an adapter."""
    path = tmp_path_factory.mktemp("folders")
    model = make_model(vocab_size=400)
    save_model(model, path / "model")
    shutil.copy(folder / "tokenizer.model", path / "model")
    raw = json.loads((path / "model/config.json").read_text())
    (path / "model/config.json").write_text(json.dumps(raw | CONFIG))
    for name, value in SIDE.items():
        (path / "model" / name).write_text(json.dumps(value))
    torch.manual_seed(0)
    apply_lora(model, LoraConfig(rank=2))
    for module in lora_modules(model).values():
        module.lora_B.data.normal_()
    save_adapter(model, path / "adapter", "some/base")
    return path


def spoilt_tensors(blob, rng):
    """A safetensors file with another header, or other bytes."""
    if rng.random() < 0.4:
        if rng.random() < 0.7:
            return garbled(blob[:1 + rng.randrange(4000)], rng) + blob[4000:]
        return garbled(blob, rng)
    size = struct.unpack("<Q", blob[:8])[0]
    header, numbers = json.loads(blob[8:8 + size]), blob[8 + size:]
    tensors = list(header.keys() - {"__metadata__"})
    how, name = rng.randrange(12), rng.choice(tensors)
    entry = header[name]
    if how < 4:
        header = spoilt(header, rng)
    elif how == 4:
        shape = entry["shape"]
        entry["shape"] = rng.choice(([], [1], shape[::-1], shape + [1], [2**62, 0], [0],
                                     [2**40, 2**40], [-1, 4], [1.5]))
    elif how == 5:
        kinds = ("F16", "BF16", "F64", "I64", "I8", "BOOL", "F8_E4M3", "C64", "x", 3)
        entry["dtype"] = rng.choice(kinds)
    elif how == 6:
        new = (name + "x", name.upper(), "", "\x00", "../x",
               name.replace("layers.0", "layers.77"), "lm_head.bias")
        header[rng.choice(new)] = header.pop(name)
    elif how == 7:
        other = header[rng.choice(tensors)]
        old = entry["data_offsets"]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], old
    elif how == 8:
        begin = entry["data_offsets"][0]
        odd = struct.pack("<f", rng.choice((float("nan"), float("inf"), -float("inf"))))
        numbers = numbers[:begin] + odd + numbers[begin + 4:]
    elif how == 9:
        numbers = numbers[:rng.randrange(len(numbers))]
    elif how == 10:
        numbers += b"x" * rng.choice((1, 8, 4096))
    else:
        sizes = (0, 1, size - 1, size + 1, 10**8 + 1, 2**63, 2**64 - 1)
        return struct.pack("<Q", rng.choice(sizes)) + blob[8:]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


DAMAGES = {  # file -> long trials
    "model/config.json": 1000, "model/model.safetensors": 1500, "model/tokenizer.model": 700,
    "model/tokenizer_config.json": 300, "model/added_tokens.json": 200,
    "model/special_tokens_map.json": 200, "adapter/adapter_config.json": 600,
    "adapter/adapter_model.safetensors": 1000}


def damaged(file, name, number):
    """The bytes of a file of a model folder, damaged."""
    blob, rng = file.read_bytes(), random.Random(f"{name}/{number}")
    if name.endswith(".json"):
        if rng.random() < 0.2:
            return spoilt_text(blob.decode(), rng)
        return json.dumps(spoilt(json.loads(blob), rng)).encode()
    return spoilt_tensors(blob, rng) if name.endswith(".safetensors") else garbled(blob, rng)


def use(home, original, name):
    """Open all that a folder holds, and answer; nothing may be other than its files say."""
    config, raw = read_config(home / "model"), json.loads((home / "model/config.json").read_text())
    for ours in BOUNDS:
        assert raw.get(KEYS[ours]) in (None, getattr(config, ours)), ours
    model = open_model(home / "model")
    state = model.state_dict()
    assert all(x.isfinite().all() for x in state.values())
    if name == "model/model.safetensors":
        shapes = {key: x.shape for key, x in load_file(original / name).items()}
        assert {key: x.shape for key, x in state.items()} == shapes
    tokenizer = open_tokenizer(home / "model")
    check_vocabulary(tokenizer, config.vocab_size, config.bos_id, config.eos_ids, home / "model")
    ids = tokenizer.encode_prompt("anna has a red hat , é 日 </s>")
    assert max(ids) < config.vocab_size and isinstance(tokenizer.decode(ids), str)
    if name.startswith("adapter"):
        open_adapter(model, home / "adapter")
    with torch.no_grad():
        model(torch.tensor([ids]))


@pytest.mark.filterwarnings("ignore:adapter .* changes nothing")
@pytest.mark.parametrize("name, trials", of_both(list(DAMAGES.items()), 30))
def test_a_damaged_model_folder_opens_right_or_is_refused(name, trials, folders, tmp_path):
    home = tmp_path / "in"
    shutil.copytree(folders, home)
    before = sorted(path for path in tmp_path.rglob("*"))

    def work(number):
        (home / name).write_bytes(damaged(folders / name, name, number))
        wrong = fault(lambda: use(home, folders, name), [str((home / name).parent)])
        return wrong or "" if sorted(tmp_path.rglob("*")) == before else "something was written"
    cases = range(10_000 * trials, 10_000 * trials + trials)  # the short trials are others
    wrong = [f"{case}: {text}" for case, text in zip(cases, in_children(work, cases), strict=True)
             if text]
    assert not wrong, f"{len(wrong)} of {trials}:\n" + "\n".join(wrong[:5])


BOMBS = {
    "hidden 2^31": {"hidden_size": 2**31}, "10^9 layers": {"num_hidden_layers": 10**9},
    "a vocabulary of 2^40": {"vocab_size": 2**40}, "head_dim 0": {"head_dim": 0},
    "1,024 layers of width 2^17": {"hidden_size": 2**17, "num_hidden_layers": 1024,
                                   "intermediate_size": 2**20, "vocab_size": 2**24},
    "theta 1e308": {"rope_theta": 1e308},
    "4,096 heads": {"num_attention_heads": 4096, "head_dim": 4096}}


def lay_bomb(home, name):
    """Spoil the model folder with something small that wants to be large."""
    config, weights = home / "model/config.json", home / "model/model.safetensors"
    raw = json.loads(config.read_text())
    if name in BOMBS:
        config.write_text(json.dumps(raw | BOMBS[name]))
    if name == "100,000 names":
        entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header = json.dumps({f"t{n}": entry for n in range(100_000)}).encode()
        weights.write_bytes(struct.pack("<Q", len(header)) + header)
    if name == "a sparse file of 1 TiB":
        os.truncate(weights, 2**40)
    if name == "300,000 shards":
        weights.unlink()
        shards = {f"t{n}": f"s{n}.safetensors" for n in range(300_000)}
        (home / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    if name == "64 MB of settings":
        config.write_text(json.dumps(raw | {"x": "y" * (64 << 20)}))


@pytest.mark.parametrize("name", [*BOMBS, "100,000 names", "a sparse file of 1 TiB",
                                  "300,000 shards", "64 MB of settings"])
def test_bombs_are_refused_in_little_time_and_memory(name, folders, tmp_path):
    home = tmp_path / "in"
    shutil.copytree(folders, home)
    lay_bomb(home, name)

    def work(case):
        begin, usage = time.process_time(), resource.getrusage(resource.RUSAGE_SELF)
        sentence = fault(lambda: open_model(home / "model"), [])
        wrong = "" if str(home) in sentence and "odd sentence" in sentence else sentence or "opened"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - usage.ru_maxrss) / 1024
        seconds = time.process_time() - begin
        return wrong or (f"{seconds:.1f} s, {grown:.0f} MB" if seconds > 10 or grown > 600 else "")
    memory = 2 << 40 if "TiB" in name else 4 << 30
    assert in_children(work, [0], memory=memory) == [""]


def test_code_in_a_model_folder_is_not_run(folders, payload, tmp_path):
    import pickle

    shutil.copytree(folders, tmp_path / "in")
    marker, home = tmp_path / "marker", tmp_path / "in/model"
    good = (home / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "tokenizer.model"):
        before = (home / name).read_bytes()
        (home / name).write_bytes(pickle.dumps(payload(marker)))
        assert not fault(lambda: use(home.parent, folders, ""), [str(home)])
        (home / name).write_bytes(before)
    torch.save({"model.norm.weight": payload(marker)}, home / "pytorch_model.bin")
    (home / "model.safetensors").unlink()
    assert not fault(lambda: open_model(home), ["python -m tools.convert"])
    (home / "model.safetensors").write_bytes(good)
    raw = json.loads((home / "config.json").read_text())
    auto = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}, "trust_remote_code": True}
    (home / "config.json").write_text(json.dumps(raw | auto))
    (home / "modeling.py").write_text(f"import os; os.system('touch {marker}')")
    use(home.parent, folders, "")
    assert not marker.exists()
    with open(home / "x", "wb") as stream:  # the control: it runs where a file is unpickled
        pickle.dump(payload(marker), stream)
    with open(home / "x", "rb") as stream:
        pickle.load(stream)
    assert marker.exists()


def test_foreign_files_would_be_read_by_who_joins_paths(folders, tmp_path):
    """The control of test_shards_stay_in_their_folder in test_hf_weights.py."""
    shutil.copy(folders / "model/model.safetensors", tmp_path / "outside.safetensors")
    (tmp_path / "home").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "home/model.safetensors")
    assert len(load_file(os.path.join(tmp_path / "home", "../outside.safetensors"))) > 5


# Tokenizers ------------------------------------------------------------------------------------


def varint(number):
    """A number as protobuf writes it."""
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def messages(blob):
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


def piece(text, score=0.0, kind=1):
    """A piece of a sentencepiece model."""
    return 1, b"\n" + varint(len(text)) + text + b"\x15" + struct.pack("<f", score) + (
        b"\x18" + varint(kind))


def aimed(blob):
    """Tokenizer files that are made to do harm, or are something else."""
    parts = messages(blob)
    pieces = [part for part in parts if part[0] == 1]
    rest = [part for part in parts if part[0] != 1]

    def made(*more, pieces=pieces, rest=rest):
        return b"".join(bytes([field << 3 | 2]) + varint(len(part)) + part
                        for field, part in [*pieces, *more, *rest])
    assert made() == blob
    unknown = [part for part in pieces if not part[1].endswith(b"\x18\x02")]
    far = b"\xc8\x02" + varint(10**6) + b"\xd0\x02" + varint(2**31)
    return {
        "one more piece, which is well": made(piece(b"~q~")),
        "a piece of 2 MB": made(piece(b"x" * 2_000_000)), "a piece twice": made(pieces[-1]),
        "a control piece twice": made(pieces[1]), "no <unk>": made(pieces=unknown),
        "two <unk>": made(piece(b"<unk2>", 0, 2)), "an empty piece": made(piece(b"")),
        "odd scores": made(piece(b"~qq~", float("nan")), piece(b"~www~", float("inf"))),
        "a piece with a NUL": made(piece(b"a\0b")), "no UTF-8": made(piece(b"\xff\xfe")),
        "a kind that is none": made(piece(b"~zz~", 0, 99)), "no pieces": made(pieces=[]),
        "one piece": made(pieces=pieces[:1]), "no BOS": made(pieces=pieces[:1] + pieces[3:]),
        "ids beyond the pieces": made(rest=[(field, part + far * (field == 2))
                                            for field, part in rest]),
        "no trainer": made(rest=rest[1:]), "nothing but pieces": made(rest=[]),
        "300,000 pieces more": made(*[piece(b"p%d" % n) for n in range(300_000)]),
        "a length of 2^63": blob + b"\n" + varint(2**63), "deep groups": blob + b"\x0b" * 100_000,
        "tiktoken": b"IQ== 0\nIg== 1\n", "JSON": b'{"model": {"type": "BPE"}}',
        "HTML": b"<html>sign in</html>", "empty": b"", "zeros": b"\0" * 10_000,
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"}


@pytest.mark.parametrize("which", ["aimed", pytest.param("random", marks=pytest.mark.faults)])
def test_a_real_tokenizer_that_is_damaged_kills_nothing(which, shared, tmp_path):
    """It is refused in one sentence, or all of its ids are in the embedding."""
    real, file = shared / "tokenizers/mistral-v1.tokenizer.model", tmp_path / "tokenizer.model"
    blob, size = real.read_bytes(), len(open_tokenizer(real)) + 10
    made = list(aimed(blob).items())

    def read():
        tokenizer = open_tokenizer(file)
        check_vocabulary(tokenizer, size, 1, [2], tmp_path)
        ids = tokenizer.encode_prompt("anna has a red hat , é 日 🙂 </s> [INST]")
        ids += tokenizer.encode_continuation("red")
        assert 0 <= min(ids) and max(ids) < len(tokenizer) <= size
        assert isinstance(tokenizer.decode([*ids, size + 5]), str)

    def work(number):
        noise = garbled(blob, random.Random(number)) if which == "random" else made[number][1]
        file.write_bytes(noise)
        return fault(read, [str(tmp_path)])
    cases = range(1000 if which == "random" else len(made))
    found = in_children(work, cases, memory=1 << 30)
    wrong = [(made[case][0] if which == "aimed" else case, text)
             for case, text in zip(cases, found, strict=True) if text]
    assert not wrong, wrong[:5]
