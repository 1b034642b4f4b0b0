"""tools.convert: .bin files, Meta's layout in both directions, and nothing that is code."""

import contextlib
import copy
import io
import json
import pickle
import resource
import shutil
import struct
import tarfile
import time
import zipfile

import pytest
import torch
from damage import in_children
from safetensors.torch import load_file, save_file

from extras.formats import open_adapter, open_model, save_model
from extras.formats.meta import read_params
from lora import LoraConfig, apply_lora, lora_modules, save_adapter
from tools import convert


def run(*words):
    """The exit status of the program."""
    try:
        return convert.main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def converted(folder, out, *more):
    """Run the program, which must go well; returns `out`."""
    assert run(folder, out, *more) == 0
    return out


def refused(folder, tmp_path, capsys, words):
    """Run the program, which must say one sentence."""
    capsys.readouterr()
    assert run(folder, tmp_path / "refused") == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ") and sentence.count("\n") == 1 and words in sentence
    assert len(sentence) < 700 + 3 * len(str(tmp_path)), sentence
    assert not (tmp_path / "refused").exists()  # nor a part of it


@pytest.fixture
def bins(make_model, tmp_path):
    """A folder with config.json and pytorch_model.bin, and the model."""
    model = make_model()
    save_model(model, tmp_path / "bins")
    (tmp_path / "bins/model.safetensors").unlink()
    torch.save(dict(model.state_dict()), tmp_path / "bins/pytorch_model.bin")
    return tmp_path / "bins", model


# pytorch_model*.bin ----------------------------------------------------------------------------


def test_bins_become_a_plain_folder(bins, folder, same_weights, tmp_path):
    path, model = bins
    shutil.copy(folder / "tokenizer.model", path)
    (path / "generation_config.json").write_text("{}")
    state = dict(model.state_dict())
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(state, path / "pytorch_model.bin")
    out = converted(path, tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model"]
    again = open_model(out)
    assert same_weights(again, model) and again.config == model.config
    names, index = list(state), {}  # and in shards
    for number, part in enumerate((names[:7], names[7:]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, path / file)
        index |= dict.fromkeys(part, file)
    (path / "pytorch_model.bin").unlink()
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert same_weights(open_model(converted(path, tmp_path / "again")), model)


def test_a_tied_head_and_the_stored_type_are_kept(make_model, same_weights, tmp_path):
    model = make_model(tie_embeddings=True).bfloat16()
    save_model(model, tmp_path / "x")
    (tmp_path / "x/model.safetensors").unlink()
    torch.save(dict(model.state_dict()), tmp_path / "x/pytorch_model.bin")
    assert same_weights(open_model(converted(tmp_path / "x", tmp_path / "y"), dtype=None), model)


def test_bins_run_nothing(bins, payload, tmp_path, capsys):
    path, model = bins
    state, file, marker = dict(model.state_dict()), path / "pytorch_model.bin", tmp_path / "marker"
    for new_form in (True, False):
        torch.save({"model.norm.weight": payload(marker)}, file,
                   _use_new_zipfile_serialization=new_form)
        refused(path, tmp_path, capsys, "contains posix.system, which is code, not weights")
    norm = "model.norm.weight"
    for odd, words in (
            ([1.0], "not a plain tensor"),
            (torch.ones(32).to(torch.float8_e4m3fn), f"'{norm}' is not a plain tensor of floats"),
            (torch.ones(32).long(), "not a plain tensor"),
            (torch.ones(8), f"tensor {norm} is (8,) in {file}, config.json says (32,)")):
        torch.save(state | {norm: odd}, file)
        refused(path, tmp_path, capsys, words)
    torch.save(torch.ones(3), file)
    refused(path, tmp_path, capsys, "damaged or not weights")
    for damage in (b"", b"x" * 100, b"PK\x03\x04" + b"x" * 100):
        file.write_bytes(damage)
        refused(path, tmp_path, capsys, "damaged or not weights")
    file.unlink()
    refused(path, tmp_path, capsys, "no weights at")
    refused(tmp_path / "none", tmp_path, capsys, "no model at")
    assert not marker.exists()


def write_code(place, marker, how):
    """A file that runs a command where it is unpickled: as a zip, bare, or in torch's old tar."""
    if how == "zip":
        torch.save({"model.norm.weight": marker}, place)
    if how == "bare":
        place.write_bytes(pickle.dumps(marker))
    if how == "tar":
        with tarfile.open(place, "w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                blob = pickle.dumps(marker) if name == "pickle" else b""
                info = tarfile.TarInfo(name)
                info.size = len(blob)
                archive.addfile(info, io.BytesIO(blob))


@pytest.mark.parametrize("how", ["zip", "bare", "tar"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "a shard.bin", "consolidated.00.pth",
                                  "adapter_model.bin"])
def test_code_in_any_file_and_form_is_not_run(name, how, bins, payload, tmp_path, capsys):
    path, marker = bins[0], tmp_path / "marker"
    (path / "pytorch_model.bin").unlink()
    write_code(path / name, payload(marker), how)
    if name.startswith("a shard"):
        index = json.dumps({"weight_map": {"model.norm.weight": name}})
        (path / "pytorch_model.bin.index.json").write_text(index)
    if name.startswith("consolidated"):
        (path / "config.json").unlink()
        (path / "params.json").write_text(json.dumps({
            "dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": 300}))
    if name.startswith("adapter"):
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refused(path, tmp_path, capsys, name)
    assert not marker.exists()
    with contextlib.suppress(Exception):  # the control: a zip or a bare pickle would run it
        torch.load(path / name, weights_only=False)
    assert marker.exists() == (how != "tar")


@pytest.mark.parametrize("how", ["stride 0", "meta", "sparse", "deflated"])
def test_bins_that_claim_a_huge_size_are_refused_in_little_time_and_memory(how, bins, tmp_path):
    path, model = bins
    state, file = dict(model.state_dict()), path / "pytorch_model.bin"
    state["model.norm.weight"] = {
        "stride 0": torch.ones(1).expand(2**40), "meta": torch.ones(2**40, device="meta"),
        "sparse": torch.sparse_coo_tensor([[0]], [1.0], (2**40,)),
        "deflated": torch.zeros(16 << 20)}[how]
    torch.save(state, file)
    if how == "deflated":
        file.rename(tmp_path / "stored")
        with zipfile.ZipFile(tmp_path / "stored") as stored, zipfile.ZipFile(
                file, "w", zipfile.ZIP_DEFLATED) as deflated:
            for entry in stored.namelist():
                deflated.writestr(entry, stored.read(entry))
    words = "is compressed" if how == "deflated" else "not a plain tensor"

    def work(case):
        begin, error = time.process_time(), io.StringIO()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with contextlib.redirect_stderr(error):
            status = run(path, tmp_path / "refused")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        seconds = time.process_time() - begin
        well = status == 2 and words in error.getvalue() and seconds < 5 and grown < 600
        return "" if well else f"{status}, {seconds:.1f} s, {grown:.0f} MB: {error.getvalue()}"
    assert in_children(work, [0]) == [""]


def write_two_lists(file, megabytes):
    """A zip with two lists of entries: for zipfile all are stored, for torch all are packed.

    What torch would unpack is `megabytes` large.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w") as entry:
            for _ in range(megabytes):
                entry.write(bytes(1 << 20))
        archive.writestr("archive/version", "3\n")
    blob = file.read_bytes()
    end = blob.rindex(b"PK\5\6")
    length, begin = struct.unpack("<II", blob[end + 12:end + 20])
    stored = bytearray(blob[begin:begin + length])
    place = stored.find(b"PK\1\2")
    while place >= 0:
        stored[place + 10:place + 12] = b"\0\0"
        place = stored.find(b"PK\1\2", place + 4)
    file.write_bytes(blob[:end] + stored + blob[end:])


@pytest.mark.faults
@pytest.mark.parametrize("how", ["two lists", "long pickle", "shared storage", "deflated"])
@pytest.mark.parametrize("trials", [5])
def test_adapters_that_unpack_to_gigabytes_are_refused_in_little_memory(how, trials, tmp_path):
    """The control, for two lists: torch.load itself takes what the entry says."""
    file = tmp_path / "a/adapter_model.bin"
    file.parent.mkdir()
    (tmp_path / "a/adapter_config.json").write_text("{}")
    numbers = torch.zeros(1000, 1000)

    def grown(action):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status = action()
        return status, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    def ours(_):
        with contextlib.redirect_stderr(io.StringIO()) as error:
            status, megabytes = grown(
                lambda: run(tmp_path / "a", tmp_path / "b"))
        well = status == 2 and megabytes < 150 and error.getvalue().count("\n") == 1
        return "" if well else f"{status}, {megabytes:.0f} MB: {error.getvalue()}"

    def torchs(_):
        with contextlib.suppress(Exception):
            return f"{grown(lambda: torch.load(file, mmap=True))[1]:.0f}"
        return str(int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    for trial in range(trials):
        if how == "two lists":
            write_two_lists(file, 600 + 50 * trial)
        if how == "long pickle":  # 216 bytes of memory for each byte
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("archive/data.pkl", b"\x80\2" + b"\x8f" * (4 << 20) + b".")
                archive.writestr("archive/version", "3\n")
        if how == "shared storage":
            torch.save({f"{k}": numbers.T for k in range(400 + 50 * trial)}, file)
        if how == "deflated":
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("archive/data.pkl", bytes(300 << 20))
        assert file.stat().st_size < 6e6
        assert in_children(ours, [0]) == [""]
    if how == "two lists":
        assert int(in_children(torchs, [0])[0]) > 1000


def test_another_head_in_bins_of_a_tied_config(make_model, random_ids, tmp_path):
    model = make_model()
    save_model(model, tmp_path / "x")
    (tmp_path / "x/model.safetensors").unlink()
    file = tmp_path / "x/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    torch.save(dict(model.state_dict()), tmp_path / "x/pytorch_model.bin")
    with pytest.warns(UserWarning, match="That head is used"):
        again = open_model(converted(tmp_path / "x", tmp_path / "y"))
    ids = random_ids(9)[None]
    assert torch.equal(again(ids), model(ids)) and not again.config.tie_embeddings


def test_an_adapter_in_a_bin(make_model, payload, tmp_path, capsys):
    base = make_model()
    model = apply_lora(copy.deepcopy(base), LoraConfig(rank=2, targets=("q_proj",)))
    for module in lora_modules(model).values():
        module.lora_B.data.normal_(0, 0.3)
    save_adapter(model, tmp_path / "a")
    file = tmp_path / "a/adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    again = open_adapter(copy.deepcopy(base), converted(tmp_path / "a", tmp_path / "b"))
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids), model(ids))
    torch.save({"x": payload(tmp_path / "marker")}, file.with_suffix(".bin"))
    refused(tmp_path / "a", tmp_path, capsys, "contains posix.system, which is code")
    assert not (tmp_path / "marker").exists()


# Files from before torch 1.6 --------------------------------------------------------------------


def test_bins_of_the_older_form(bins, same_weights, tmp_path):
    path, model = bins
    state, file = dict(model.bfloat16().state_dict()), path / "pytorch_model.bin"
    state["lm_head.weight"] = state["lm_head.weight"].T.contiguous().T  # strides are kept
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(file)
    assert same_weights(open_model(converted(path, tmp_path / "out"), dtype=None), model)
    out = converted(path, tmp_path / "in float32", "--dtype", "float32")
    assert same_weights(open_model(out, dtype=None), model.float())


def old_form(state, sizes):
    """The bytes of a file of the older form, with other sizes of the storages: {old: new}."""
    stream = io.BytesIO()
    torch.save(state, stream, _use_new_zipfile_serialization=False)
    blob = stream.getvalue()
    for old, new in sizes.items():
        blob = blob.replace(pickle.dumps(old, 2)[2:-1], pickle.dumps(new, 2)[2:-1])
    return blob


@pytest.mark.parametrize("how, words", [
    ("huge", "it claims 1099511627776 numbers in"), ("larger", "damaged or not weights"),
    ("cut off", "damaged or not weights"), ("long pickle", "damaged or not weights"),
    ("stride 0", "is not a plain tensor of floats")])
def test_older_files_that_claim_too_much(how, words, bins, tmp_path):
    path, model = bins
    state, file = dict(model.state_dict()), path / "pytorch_model.bin"
    state["model.norm.weight"] = torch.ones(1237)
    if how == "stride 0":
        state["model.norm.weight"] = torch.ones(1).expand(2**20)
    changes = {"huge": {1237: 2**40}, "larger": {1237: 30000}}.get(how, {})
    blob = old_form(state, changes)
    if how == "cut off":
        blob = blob[:len(blob) * 2 // 3]
    if how == "long pickle":
        blob = blob[:15] + b"\x80\2" + b"\x8f" * (4 << 20) + b"."
    if how == "stride 0":
        blob += bytes(2**22)  # so that the shape is not above the size of the file
    file.write_bytes(blob)

    def work(case):
        error, before = io.StringIO(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with contextlib.redirect_stderr(error):
            status = run(path, tmp_path / "refused")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        well = status == 2 and words in error.getvalue() and grown < 300
        return "" if well else f"{status}, {grown:.0f} MB: {error.getvalue()}"
    assert in_children(work, [0]) == [""] and not (tmp_path / "refused").exists()


# Meta's layout ---------------------------------------------------------------------------------


def split_for_gpus(folder, n):
    """consolidated.00.pth as n files, as Meta divides it: by rows or by columns, norms in each."""
    whole = torch.load(folder / "consolidated.00.pth", weights_only=True)
    columns = ("tok_embeddings", "attention.wo", "feed_forward.w2")
    for rank in range(n):
        part = {"rope.freqs": torch.ones(4)}
        for name, tensor in whole.items():
            dim = int(any(word in name for word in columns))
            part[name] = tensor if tensor.dim() == 1 else tensor.chunk(n, dim)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02}.pth")


def metas_forward(tensors, params, ids):
    """LLaMA as Meta writes it, for one row: rotary angles as complex numbers on neighbours.

    Logits (T, V).
    """
    def norm(x, weight):
        return weight * x * (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).rsqrt()

    def turn(x):
        pairs = torch.view_as_complex(x.reshape(T, -1, Dh // 2, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(2)
    T, H = len(ids), params["n_heads"]
    Dh = params["dim"] // H
    angles = torch.outer(torch.arange(T).float(), 1e4 ** (-torch.arange(0, Dh, 2).float() / Dh))
    turns = torch.polar(torch.ones(T, Dh // 2), angles)
    x = tensors["tok_embeddings.weight"][ids]
    for layer in range(params["n_layers"]):
        def part(name, layer=layer):
            return tensors[f"layers.{layer}.{name}.weight"]
        h = norm(x, part("attention_norm"))
        q, k, v = ((h @ part(f"attention.{name}").T).view(T, -1, Dh) for name in ("wq", "wk", "wv"))
        q, k = turn(q), turn(k)
        k, v = (y.repeat_interleave(H // params["n_kv_heads"], 1) for y in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / Dh**0.5
        scores = scores + torch.full((T, T), -torch.inf).triu(1)
        mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ part("attention.wo").T
        h = norm(x, part("ffn_norm"))
        gate = torch.nn.functional.silu(h @ part("feed_forward.w1").T)
        x = x + (gate * (h @ part("feed_forward.w3").T)) @ part("feed_forward.w2").T
    return norm(x, tensors["norm.weight"]) @ tensors["output.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("hidden_dim", [64, 100, 256, 171])
def test_metas_layout_and_back_is_bitwise(
        hidden_dim, make_model, same_weights, random_ids, folder, tmp_path):
    model = make_model(hidden_dim=hidden_dim, max_position_embeddings=4096)
    save_model(model, tmp_path / "hf")
    shutil.copy(folder / "tokenizer.model", tmp_path / "hf")
    meta = converted(tmp_path / "hf", tmp_path / "meta", "--to", "meta")
    params = json.loads((meta / "params.json").read_text())
    tensors = torch.load(meta / "consolidated.00.pth", weights_only=True)
    assert params.keys() <= {"dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "vocab_size",
                             "multiple_of", "ffn_dim_multiplier"}
    ids = random_ids(30)
    theirs = metas_forward(tensors, params, ids)  # their order of q and k, their rotation
    assert (theirs - model(ids[None])[0]).abs().max() < 1e-3
    q = "layers.0.attention.wq.weight"
    swapped = tensors | {q: convert.reorder("q_proj.weight", tensors[q], 8, to_meta=False)}
    wrong = metas_forward(swapped, params, ids)
    assert (wrong - model(ids[None])[0]).abs().max() > 1e-2  # and it would show
    back = converted(meta, tmp_path / "back")
    again = open_model(back)
    assert again.config == model.config and same_weights(again, model)
    assert (back / "tokenizer.model").is_file()
    for n in (2, 4):  # heads, and so q and k, across the files
        parts = tmp_path / f"in {n}"
        shutil.copytree(meta, parts)
        if hidden_dim % n == 0:
            split_for_gpus(parts, n)
        (parts / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
        assert same_weights(open_model(converted(parts, tmp_path / f"of {n}")), model)


def test_mistrals_single_file(make_model, same_weights, tmp_path):
    model = make_model(norm_eps=1e-6)
    save_model(model, tmp_path / "hf")
    meta = converted(tmp_path / "hf", tmp_path / "meta", "--to", "meta")
    tensors = torch.load(meta / "consolidated.00.pth", weights_only=True)
    (meta / "consolidated.00.pth").unlink()
    save_file(tensors, meta / "consolidated.safetensors")
    params = json.loads((meta / "params.json").read_text())
    (meta / "params.json").write_text(json.dumps(params | {"hidden_dim": 64, "head_dim": 8}))
    assert same_weights(open_model(converted(meta, tmp_path / "back")), model)


def test_contexts_and_keys_of_params_json(write, tmp_path):
    small = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-6, "vocab_size": 300}
    file = tmp_path / "params.json"
    for changes, context, theta in (
            ({}, 2048, 1e4), ({"norm_eps": 1e-5}, 4096, 1e4), ({"rope_theta": 1e6}, 16384, 1e6),
            ({"norm_eps": 1e-5, "sliding_window": 100}, 100, 1e4), ({"max_seq_len": 77}, 77, 1e4)):
        config = read_params(write(file, small | changes), 0)
        assert (config.context, config.rope_theta) == (context, theta)
    seven = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6,
             "vocab_size": 32000}
    large = {"dim": 8192, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}
    for changes, hidden_dim in (({}, 11008), ({"dim": 5120, "n_heads": 40}, 13824), (large, 28672)):
        assert read_params(write(file, seven | changes), 0).hidden_dim == hidden_dim


def test_sentences_about_metas_files(make_model, write, tmp_path, capsys):
    save_model(make_model(), tmp_path / "hf")
    meta = converted(tmp_path / "hf", tmp_path / "meta", "--to", "meta")
    params = json.loads((meta / "params.json").read_text())
    file = meta / "consolidated.00.pth"
    good = torch.load(file, weights_only=True)
    for changes, words in (
            ({"n_heads": "4"}, "params.json: n_heads is '4'"),
            ({"n_heads": 2**40}, "params.json: n_heads is"),
            ({"moe": {"num_experts": 8}}, "moe, use_scaled_rope and"),
            ({"dim": 64}, "params.json says (300, 64)"),
            ({"n_layers": 1}, "tensor 'layers.1."), ({"n_layers": 3}, "tensor 'layers.2.")):
        write(meta / "params.json", params | changes)
        refused(meta, tmp_path, capsys, words)
    write(meta / "params.json", {name: x for name, x in params.items() if name != "n_heads"})
    refused(meta, tmp_path, capsys, "n_heads is missing")
    write(meta / "params.json", params | {"vocab_size": -1})
    torch.save(good | {"output.weight": torch.tensor(1.0)}, file)
    refused(meta, tmp_path, capsys, "no output.weight says how large the vocabulary is")
    write(meta / "params.json", params)
    torch.save(good | {"norm.weight": torch.tensor(1.0)}, file)
    refused(meta, tmp_path, capsys, "tensor norm.weight is () in each of 1 files")
    torch.save(good, file)
    shutil.move(file, meta / "consolidated.01.pth")
    refused(meta, tmp_path, capsys, "numbered with gaps")


@pytest.mark.parametrize("changes", [
    {"mlp_bias": True}, {"sliding_window": 100}, {"head_dim": 16},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}])
def test_what_metas_layout_cannot_say(changes, make_model, tmp_path, capsys):
    save_model(make_model(**changes), tmp_path / "hf")
    assert run(tmp_path / "hf", tmp_path / "out", "--to", "meta") == 2
    assert "error: Meta's layout has no biases" in capsys.readouterr().err


def test_the_folder_that_is_read_is_not_written_to(bins, capsys):
    path = str(bins[0])
    assert run(path, path) == 2
    sentence = f"error: OUT {path} is the folder that is read. Give another.\n"
    assert capsys.readouterr().err == sentence
