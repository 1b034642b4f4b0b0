"""What a user is told: each mistake and failure is one line, word for word, and a status.

In a child of this process; with the marker `faults` also as `python train.py`.
"""

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import short_runs as runs
import torch
from damage import in_children
from safetensors.torch import load_file, save_file

import eval as evaluation
import lora
import model as model_file
import train
from extras import fast, formats, judges, reports  # noqa: F401  as a run does, before it forks
from tools import convert

ROOT = Path(train.__file__).parent
PROGRAMS = {"train": train, "eval": evaluation, "tools.convert": convert}
KEY = "sk-live-9Yq3ZtVb7KxWm2Rf"
Q = "model.layers.0.self_attn.k_proj.weight"
SAVED = (" <n> answers are saved in {out}/judge.jsonl; run the same command to go on, nothing is "
         "asked twice.")


class Scene:
    """The files of one mistake: a model folder to spoil, a run folder, and a command."""

    def __init__(self, world, earlier, arguments, path):
        self.world, self.earlier, self.arguments, self.path = world, earlier, arguments, path
        self.model, self.out, self.plan = path / "model", path / "runs/x", {}
        self.program, self.limit = "train", 0  # the limit: how large a file may be
        shutil.copytree(world / "model", self.model)

    def sft(self, *more):
        """A short run on the model folder."""
        argv = self.arguments(self.out, "--stage", "sft", "--steps", "2", "--batch-size", "2")
        return [*argv, "--no-evaluate", "--model", str(self.model), *map(str, more)]

    def cat(self, **plan):
        """A run whose judge is a server that answers everything by one plan."""
        self.plan = plan
        return self.arguments(
            self.out, "--stage", "cat", "--judge", "http", "--judge-url", plan.pop("url", "URL"),
            "--judge-model", "m", "--judge-tries", "1", "--wordings", "3", "--steps", "1",
            "--sft-steps", "1", "--batch-size", "2", "--pool-per-task", "30", "--no-compare",
            "--no-evaluate", "--init", str(self.earlier))

    def file(self, name, content):
        """The run after a file of the model was written; None removes it."""
        if content is None:
            (self.model / name).unlink()
        else:
            blob = content if isinstance(content, bytes) else content.encode()
            (self.model / name).write_bytes(blob)
        return self.sft()

    def tensors(self, change):
        """The run after change(tensors) of the model's weights."""
        found = load_file(self.model / "model.safetensors")
        change(found)
        save_file(found, self.model / "model.safetensors", {"format": "pt"})
        return self.sft()

    def rows(self, stage, flag, rows):
        """A run on a file of rows, which are texts or records."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        return ["--stage", stage, "--model", str(self.model), "--out", str(self.out),
                flag, str(self.path / "rows.jsonl"), "--no-evaluate"]


def keep_tokenizer_json(scene):
    scene.file("tokenizer.json", "{}")
    return scene.file("tokenizer.model", None)


def point_outside(scene):
    scene.file("model.safetensors", None)
    index = {"metadata": {"total_size": 9}, "weight_map": {Q: "../other/model.safetensors"}}
    return scene.file("model.safetensors.index.json", json.dumps(index))


def cut_weights(scene):
    return scene.file("model.safetensors", (scene.model / "model.safetensors").read_bytes()[:9000])


def remove_rows(scene):
    raw = json.loads((scene.model / "config.json").read_text())
    scene.file("config.json", json.dumps(raw | {"vocab_size": 400}))
    names = "model.embed_tokens.weight", "lm_head.weight"
    return scene.tensors(lambda x: x.update({name: x[name][:400].clone() for name in names}))


def remove_an_output(scene):
    record = json.loads((scene.world / "tasks/colour.json").read_text())
    del record["Instances"][17]["output"]
    (scene.path / "t.json").write_text(json.dumps(record))
    return scene.sft("--tasks", scene.path / "t.json", "--paraphrases", "")


def break_a_line(scene):
    good = {"instruction": "a", "response": "b", "judgment": "c"}
    return scene.rows("cut", "--records", [good] * 203 + ['{"instruction": "a" "response": "b"}'])


def reward_all_alike(scene):
    row = {"task": "colour", "id": "1", "instruction": "name it", "input": "a hat", "target": "red",
           "sample": 0, "finished": True, "how": "rule", "expected": True, "correct": False,
           "p_expected": None, "p_correct": None, "reward": 0}
    rows = [row | {"wording": f"w{k}", "response": f"hat {k}"} for k in range(3)]
    return scene.rows("cat", "--candidates", rows)


def finish_another_run(scene):
    assert runs.survive(scene.sft("--lr", "1e-5"), []) == (0, 0)
    return scene.sft("--lr", "2e-5")


def take_the_folder(scene):
    from extras.runtime import guard

    scene.lock = guard.take_lock(scene.out)
    return scene.sft()


def give_the_adapter_of_another_model(scene):
    config = dataclasses.replace(model_file.load_model(scene.model).config, n_layers=3)
    model = lora.apply_lora(model_file.Llama(config), lora.LoraConfig(rank=2))
    lora.save_adapter(model, scene.path / "adapter", "TinyLlama/TinyLlama-1.1B")
    scene.program = "eval"
    return ["--model", str(scene.model), "--adapter", str(scene.path / "adapter"), "--tasks",
            str(scene.world / "tasks"), "--paraphrases", str(scene.world / "paraphrases.json"),
            "--out", str(scene.out)]


class Payload:
    """What a pickle can do to who loads it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def put_code_in_a_bin(scene):
    scene.file("model.safetensors", None)
    torch.save({"x": Payload(scene.path / "marker")}, scene.model / "pytorch_model.bin")
    return scene.sft()


def convert_code_in_a_bin(scene):
    put_code_in_a_bin(scene)
    scene.program = "tools.convert"
    return [str(scene.model), str(scene.out)]


def fill_the_disk(scene):
    scene.limit = 30_000
    return scene.sft()


CHAT = "{url}/v1/chat/completions"
CONVERT = "{model} has its weights in .bin files. Convert it first: python -m tools.convert {model}"
NO_CREDIT = {"error": {"code": "insufficient_quota"}}
SENTENCES = [  # (status, what provokes it, the sentence; <n> is a number, <*> anything)
    (2, lambda s: ["--stage", "sfft"], 'unknown stage "sfft". Stages: cat, <*>, unlikelihood; '
     "or give the path of a file like those in methods/."),
    (2, lambda s: s.file("config.json", None), "no model at {model} (no config.json). Give a "
     "folder in Hugging Face format: config.json, *.safetensors, and a tokenizer."),
    (2, keep_tokenizer_json, "{model}/tokenizer.json is not a tokenizer that the tokenizers "
     "library reads (<*>). Get it again."),
    (2, lambda s: s.file("tokenizer.model", "IQ== 0\nIg== 1\n"), "{model}/tokenizer.model is "
     "Meta's tokenizer of LLaMA 3 and later, not sentencepiece. Put the tokenizer.json of the same "
     "model in Hugging Face's format beside it, or name that with --tokenizer FILE."),
    (2, lambda s: s.file("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"
                                              "oid sha256:00\nsize 13476831232\n"),
     "{model}/model.safetensors is a Git LFS pointer of 74 bytes, not weights. Run \"git lfs "
     "pull\" in that folder."),
    (2, cut_weights, "{model}/model.safetensors is damaged or incomplete: <*>. Download it again "
     "(found 9,000 bytes)."),
    (2, lambda s: s.tensors(lambda x: x.update({Q: x[Q][:8].clone()})), f"tensor {Q} is (8, 32) in "
     "{model}/model.safetensors, config.json says (16, 32). The weights and config.json are from "
     "different models."),
    (2, remove_rows, "tokenizer has <n> pieces but the embedding has 400 rows ({model}). Use the "
     "tokenizer that came with this checkpoint."),
    (2, remove_an_output, '{path}/t.json, record 17: field "output" is missing; found: id, input. '
     "Expected a string or a list of strings."),
    (2, break_a_line, "{path}/rows.jsonl, line 204, is not JSON: Expecting ',' delimiter: <*>. Fix "
     "or delete that line."),
    (2, reward_all_alike, "nothing to train on for stage cat: no item is left. See the counts "
     "above; more samples or another judge may help."),
    (1, lambda s: s.sft("--rank", 10**12), "out of memory: <*>DefaultCPUAllocator: can't allocate "
     "memory: you tried to allocate <n> bytes. Error code 12 (Cannot allocate memory). What was "
     "finished is kept; lower --micro-tokens or --eval-batch, or add --checkpointing."),
    (2, put_code_in_a_bin, f"{CONVERT} OUT"),
    (2, convert_code_in_a_bin, "{model}/pytorch_model.bin contains posix.system, which is code, "
     "not weights. It was not loaded. Get a safetensors version of this model."),
    (2, point_outside, "{model}/model.safetensors.index.json points outside its folder "
     '("../other/model.safetensors"). Refused; do not trust this download.'),
    (2, lambda s: s.tensors(lambda x: x[Q][3, 1].fill_(float("nan"))), f"tensor {Q} has 1 "
     "non-finite values ({model}/model.safetensors). The checkpoint is broken."),
    (1, fill_the_disk, "{out}: File too large. What was finished is kept; give another --out, or "
     "make room, and run the same command again."),
    (2, take_the_folder, "{out} is in use by process <n> on <*>. Wait for it, or choose another "
     "--out."),
]
SLOW = [  # those of a server, and those that train first
    (2, give_the_adapter_of_another_model, "adapter {path}/adapter was made for another model: no "
     "module named model.layers.2.<*>. It names TinyLlama/TinyLlama-1.1B as its base; pass that "
     "with --model."),
    (1, lambda s: s.cat(status=401), "no API key: the environment variable JUDGE_API_KEY is empty, "
     f"and {CHAT} wants one. Set it, or use --judge self or --judge rule.{SAVED}"),
    (2, lambda s: s.cat(key=KEY + "\n"), "the key in JUDGE_API_KEY has a blank, a line break, a "
     "control character or one outside ASCII, such as a curly quote; HTTP cannot carry it. Set it "
     "again without it. (The key is not shown.)"),
    (2, lambda s: s.cat(key=KEY, url="http://10.0.0.5/v1"), "refusing to send the key in "
     "JUDGE_API_KEY over plain http to 10.0.0.5. Use https, or a tunnel to 127.0.0.1, or unset the "
     "key if that server needs none."),
    (1, lambda s: s.cat(key=KEY, status=401), f"the judge at {CHAT} refused the key (401). Correct "
     f"the key in JUDGE_API_KEY and run the same command.{SAVED}"),
    (1, lambda s: s.cat(status=429, body=NO_CREDIT), f"the judge's account at {CHAT} is out of "
     f"credit.{SAVED}"),
    (1, lambda s: s.cat(url="http://127.0.0.1:9"), "no judge at http://127.0.0.1:9/v1/chat/"
     "completions (connections tried: 1). Start the server, or check --judge-url (it should end "
     f"in /v1).{SAVED}"),
    (1, lambda s: s.cat(status=404), f"{CHAT} has no chat completions (404). Does --judge-url end "
     f'in /v1, and is the model "m" served?{SAVED}'),
    (2, finish_another_run, "{out} holds another run: --lr was 1e-05, now 2e-05. Use another "
     "--out, or leave --lr out."),
    (1, lambda s: s.sft("--lr", "1e30", "--steps", "9", "--save-every", "1"), "step <n> of sft "
     "gave a non-finite loss or gradient norm (<*>; records <*>); nothing was updated. Last "
     "checkpoint: step <n>. Try a lower --lr with another --out, or look at those records."),
    (1, lambda s: s.cat(key=KEY, status=307, headers={"Location": "http://127.0.0.1:1/v1"}),
     f"the judge at {CHAT} redirects. Redirects are not followed, since they would carry your "
     f"prompts elsewhere. If that is right, set --judge-url to the new address.{SAVED}"),
    (1, lambda s: s.cat(says="hm"), "<n> of <n> judge replies had no readable verdict (<n> no "
     "verdict). If they were cut, raise --judge-max-tokens; else use another judge, or allow more "
     "with --max-unparsed."),
]


@pytest.fixture(scope="module")
def earlier(world, tmp_path_factory):
    """A run folder with SFT(IA)."""
    folder = tmp_path_factory.mktemp("earlier")
    argv = ["--stage", "sft-ia", "--model", world / "model", "--tasks", world / "tasks",
            "--paraphrases", world / "paraphrases.json", "--out", folder / "sft-ia", "--steps", "1",
            "--per-task", "8", "--max-new-tokens", "4", "--wordings", "3", "--judge-share", "0.3",
            "--no-evaluate"]
    assert runs.survive([str(word) for word in argv], []) == (0, 0)
    return folder


def contents(folder):
    """The files under a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("status, provoke, sentence, real", [
    *((*row, False) for row in SENTENCES),
    *(pytest.param(*row, False, marks=pytest.mark.faults) for row in SLOW),
    *(pytest.param(*row, True, marks=pytest.mark.faults) for row in SENTENCES + SLOW)])
def test_every_sentence(status, provoke, sentence, real, world, earlier, arguments, chatserver,
                        tmp_path):
    scene = Scene(world, earlier, arguments, tmp_path)
    argv = provoke(scene)
    reply = {"body": chatserver.completion(scene.plan.get("says", "ok"))} | scene.plan
    environment = {"JUDGE_API_KEY": scene.plan.get("key", "")}

    def limit_files():
        if scene.limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (scene.limit, scene.limit))

    def work(case):
        os.environ.update(environment)
        limit_files()
        return runs.call(PROGRAMS[scene.program], argv)
    with chatserver.ChatServer(lambda request, number: reply) as server:
        argv = [server.url if word == "URL" else word for word in argv]
        before = contents(tmp_path)
        if real:
            done = subprocess.run([sys.executable, "-m", scene.program, *argv], cwd=ROOT,
                                  env=os.environ | environment, preexec_fn=limit_files,
                                  capture_output=True, text=True)
            found, error = done.returncode, done.stderr
        else:
            (found, error), = in_children(work, [0])
    line, = [line for line in error.splitlines() if line.startswith("error: ")]
    pattern = re.escape(sentence).replace("<n>", r"[\d,]+").replace(r"<\*>", ".+")
    for name, place in {"path": tmp_path, "model": scene.model, "out": scene.out,
                        "url": server.url}.items():
        pattern = pattern.replace(rf"\{{{name}\}}", re.escape(str(place)))
    assert re.fullmatch(f"error: {pattern}", line), f"{line}\n{pattern}"
    assert found == status and "Traceback" not in error and KEY[3:11] not in error
    assert not (tmp_path / "marker").exists()
    if status == 2:  # a mistake leaves nothing but an empty run folder
        after = contents(tmp_path)
        changed = {path for path in after if after[path] != before.get(path)}
        left = ("run.lock", "config.json", "identity.json")
        assert changed <= {scene.out / name for name in left}
