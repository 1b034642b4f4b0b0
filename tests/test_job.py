"""bench/job.py: its peer computes what ours does, phases are timed apart, mistakes are said."""

import json
import pkgutil
import sys
import time
from pathlib import Path

import pytest
import torch

from lora import LoraConfig, apply_lora
from model import save_model
from train import backward, collate

sys.path.append(str(Path(__file__).parent.parent / "bench"))  # last: both have a judge.py
job = pytest.importorskip("job")
work = pytest.importorskip("work")


@pytest.fixture
def peer(tiny, tmp_path):
    """job_peer, and transformers' model under peft's LoRA with the weights of `tiny`."""
    transformers, peft = map(pytest.importorskip, ("transformers", "peft"))
    import job_peer

    save_model(tiny, tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    return job_peer, peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))


def ids(n, seed):
    """n random token ids of the tiny model."""
    return work.tokens(n, seed, 300)


@pytest.mark.parametrize("stage", ("sft", "cat"))
@pytest.mark.parametrize("row", (30, 512))
def test_the_first_losses_are_ours(stage, row, tiny, peer, monkeypatch):
    """Adapters begin with B = 0, so whatever is random, the loss is that of the model."""
    job_peer, model = peer
    monkeypatch.setattr(job_peer, "ROW", row)  # one item each, or all in a row
    if stage == "cat":
        items = [work.ranked_item(ids(9 + n, n), [ids(3, n + 9), ids(5, n + 8)]) for n in range(3)]
    else:
        items = [{"documents": [work.document(ids(9 + n, n), ids(4, n + 9))]} for n in range(3)]
    more = {"margin": 0.1, "lam": 0.5} if stage == "cat" else {}
    run = work.make_run(apply_lora(tiny, LoraConfig()), stage, steps=1, batch_size=3, **more)
    ours = backward(run, [collate(items, tiny, "cpu") | {"step": 0}])
    given = job.steps_of(run.cfg, items)
    chosen = [given["items"][index] for index in given["steps"][0]]
    theirs = job_peer.backward(model, chosen, given)
    for term, value in ours.items():
        assert theirs[term] == pytest.approx(value, abs=1e-5)
    assert sorted(given["steps"][0]) == [0, 1, 2] and given["rates"] == [run.cfg.lr]


def test_the_judge_reads_every_row_behind_its_header(tiny, peer, monkeypatch):
    """Headers of several lengths, with rows of several lengths, two at a time."""
    job_peer, model = peer
    monkeypatch.setattr(job_peer, "HEADERS", 2)
    headers, expected = [], {}
    for n in range(3):
        entry = {"header": ids(6 + 3 * n, n), "a": [(ids(3 + k, 10 * n + k), [-1])
                                                    for k in range(n + 1)]}
        if n:  # a second question about some of them
            entry["b"] = [(ids(7, 100 + n), [-2, -1])]
        headers.append(entry)
        for kind, words in (("a", [5, 6]), ("b", [7, 8])):
            for row, places in entry.get(kind, []):
                logprobs = tiny(torch.tensor([entry["header"] + row]))[0].log_softmax(-1)
                for place in places:
                    expected[kind, tuple(row), place] = logprobs[place, words].tolist()
    found = job_peer.judge(model.get_base_model(), headers, {"a": [5, 6], "b": [7, 8]})
    assert len(found) == len(expected) == 10
    for kind, row, place, logprobs in found:
        assert logprobs == pytest.approx(expected[kind, tuple(row), place], abs=1e-5)


def test_a_batch_of_answers_ends_with_its_longest(peer):
    job_peer, model = peer
    asked, made = [(ids(4 + n, n), length) for n, length in enumerate((1, 2, 3, 1, 1))], []

    class Tokenizer:
        def batch_decode(self, rows, **how):
            made.append(tuple(rows.shape))
    model.generation_config.eos_token_id = None
    job_peer.answer(model, Tokenizer(), asked, 2, do_sample=False)
    assert made == [(2, 2), (2, 3), (1, 1)]


def test_what_is_wrapped_is_there():
    for place in job.PARTS:
        assert callable(pkgutil.resolve_name(place)), place


def test_inner_phases_are_not_counted_twice():
    began = time.monotonic()
    clock = job.Clock(began)
    with clock.phase("CAT"):
        time.sleep(0.02)
        with clock.phase("checks"), clock.phase("sampling"):
            time.sleep(0.05)
    clock.switch(["all else"])
    found = clock.seconds
    assert found.keys() == {"load", "CAT", "checks"}  # checks have no phases inside
    assert found["CAT"] >= 0.02 and found["checks"] >= 0.05
    assert sum(found.values()) == pytest.approx(clock.last - began)


def test_the_table_has_medians_totals_and_memory():
    rows = []
    for system, factor in (("own", 1), ("peer", 3)):
        for number in (1, 2, 6):
            seconds = dict.fromkeys(job.SHARED, factor * number)
            if system == "own":
                seconds |= {"checks": 4.0}
            rows.append({"system": system, "seconds": seconds, "peak": (2 + factor) * 2**20,
                         "losses": {"CAT ce": [1.0, 0.5]}, "answers": str(number)})
    said = job.table(rows, {"weights": 2**20, "answers": "1"}).splitlines()
    assert "| CAT | 2.0 | 6.0 | 3.00 | 1.0 to 6.0 | 3.0 to 18.0 |" in said
    assert "| checks | 4.0 |  |  | 4.0 to 4.0 |  |" in said
    assert "| what both do | 12.0 | 36.0 | 3.00 | 6.0 to 36.0 | 18.0 to 108.0 |" in said
    assert "| **total** | 16.0 | 36.0 |  | 10.0 to 40.0 | 18.0 to 108.0 |" in said
    assert "| most memory beside the weights, MB | 2 | 4 | 2.00 | 2 to 2 | 4 to 4 |" in said
    assert said[-1].startswith("2 of 3 rounds of own sampled other answers")


def test_mistakes_are_said(tmp_path, capsys):
    model = tmp_path / "model"
    assert job.main(["--model", str(model)]) == 1
    assert "tools.convert smollm2" in capsys.readouterr().err
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    given = ["--model", str(model), "--work", str(tmp_path), "--only", "own"]
    assert job.main([*given, "--threads", "0"]) == 1
    assert "--threads is 0" in capsys.readouterr().err
    (tmp_path / "work.json").write_text(json.dumps({"flags": []}))
    assert job.main(given) == 1
    assert "job with other settings" in capsys.readouterr().err


def test_missing_peers_are_named(tmp_path, monkeypatch):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: None)
    args = job.read_flags(["--model", str(tmp_path)])
    with pytest.raises(ValueError, match="not installed: transformers, peft"):
        job.check(args)
    args.only = "own"
    job.check(args)
