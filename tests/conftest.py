"""Fixtures for all tests: a tiny random model with a tokenizer, and a world of two tasks, as files.

One thread for every test: the models are tiny, and threads that wait for each other are slow.
"""

import json
import os
import random
import signal
import threading
from pathlib import Path

# Before torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import model as model_file  # noqa: E402
from methods import finding  # noqa: E402

# A shell that starts pytest in the background has it ignore Ctrl-C, which children would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# tqdm's lock is shared with forked children: one that is killed while it holds it would stop all.
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real files beside the repository; tests skip without it
COLOURS = "red blue green black white".split()
TINY = {"vocab_size": 300, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8,
        "hidden_dim": 64, "norm_eps": 1e-5, "context": 512}


def init_weights(model, seed):
    """Matrices normal(0, 0.02), norms 1, from the seed alone. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.normal_(0.0, 0.02, generator=generator)
    return model


@pytest.fixture
def tiny():
    """A tiny random model in float32."""
    return init_weights(model_file.Llama(model_file.ModelConfig(**TINY)), seed=0)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Files: model/ (random, with a tokenizer), tasks/ (two over the same inputs), paraphrases."""
    path, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    names = "anna tom mary paul".split()
    inputs = [f"{rng.choice(names)} has a {rng.choice(COLOURS)} hat {i}" for i in range(60)]
    (path / "tasks").mkdir()
    for name, place in (("colour", 3), ("person", 0)):
        rows = [{"id": f"{name}-{i}", "input": text, "output": [text.split()[place]]}
                for i, text in enumerate(inputs)]
        record = {"Definition": [f"give the {name} ."], "Instances": rows}
        (path / "tasks" / f"{name}.json").write_text(json.dumps(record))
    wordings = {}
    for name in ("colour", "person"):
        wordings[name] = {"train": [f"what is the {name} ?", f"{name} :", f"tell the {name}"],
                          "dev": [f"the {name} , please", f"which {name} ?"],
                          "test": [f"name its {name}", f"say the {name}"]}
    (path / "paraphrases.json").write_text(json.dumps(wordings))
    text = inputs + [w for task in wordings.values() for split in task.values() for w in split]
    text += ["judge each answer . type : expected unexpected correct incorrect instruction input "
             "response reference"] * 5
    (path / "model").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 3), model_prefix=str(path / "model/tokenizer"),
        vocab_size=420, model_type="bpe", byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False)
    tokenizer = data.Tokenizer(path / "model")
    config = model_file.ModelConfig(**TINY | {
        "vocab_size": len(tokenizer), "context": 4096, "prompt_template": "plain",
        "bos_id": tokenizer.bos_id, "eos_ids": [tokenizer.eos_id]})
    model_file.save_model(init_weights(model_file.Llama(config), seed=0), path / "model")
    return path


@pytest.fixture(scope="session")
def tokenizer(world):
    """The tokenizer of the tiny world."""
    return data.Tokenizer(world / "model")


@pytest.fixture
def arguments(world):
    """A function that makes a short command line for the tiny world: arguments(out, *more).

    stage: that of the command, if `more` does not name it; its unread flags are left out.
    """
    def make(out, *more, stage=""):
        stage = stage or dict(zip(more, more[1:], strict=False)).get("--stage", "sft")
        known = Path(stage).suffix == ".py" or stage in finding.stages()
        unread = finding.find_method(stage).unread if known else ()
        evaluation = []
        for name, value in (("eval_per_task", "3"), ("eval_wordings", "2")):
            if name not in unread:
                evaluation += [f"--{name.replace('_', '-')}", value]
        return ["--model", str(world / "model"), "--tasks", str(world / "tasks"),
                "--paraphrases", str(world / "paraphrases.json"), "--out", str(out),
                "--max-new-tokens", "4", *evaluation, "--per-task", "8", "--judge-share", "0.3",
                *more]
    return make


@pytest.fixture
def candidates(world, tmp_path):
    """A candidates.jsonl in which every question has a good answer and worse ones."""
    records = []
    for task in data.read_tasks(world / "tasks"):
        for x in data.split_instances(task, "pool")[:5]:
            for wording, response, reward in (("w1", x.outputs[0], 2), ("w2", "hat", 0),
                                              ("w3", "tom tom", 1), ("w3", "", 0)):
                records.append({
                    "task": task.name, "id": x.id, "instruction": task.definition,
                    "wording": wording, "input": x.input, "target": x.outputs[0], "sample": 0,
                    "response": response, "finished": True, "reward": reward, "how": "rule",
                    "expected": True, "correct": reward == 2, "p_expected": None,
                    "p_correct": None})
    data.append_records(tmp_path / "candidates.jsonl", records)
    return tmp_path / "candidates.jsonl"


@pytest.fixture
def judged(tmp_path):
    """A file of judged responses to the tiny world's inputs, half of them satisfying."""
    rows = []
    for i in range(12):
        rows.append({"instruction": "give the colour .", "input": f"tom has a red hat {i}",
                     "response": "red hat" if i % 2 else "blue hat", "target": "red hat",
                     "judgment": None if i % 2 else "wrong : blue ."})
    data.append_records(tmp_path / "judged_responses.jsonl", rows)
    return tmp_path / "judged_responses.jsonl"
