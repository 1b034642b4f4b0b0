"""With --shard the weights are spread over the processes, and train as one process trains them."""

import os

import pytest
import short_runs as runs
import torch
from safetensors.torch import load_file

import data
import train
from extras.runtime import ranks

FAULTS = pytest.mark.faults
SAMPLED = ["--sft-steps", "3", "--judge", "rule", "--temperature", "0", "--samples", "1",
           "--pool-per-task", "7", "--wordings", "3", "--pool-wordings", "2", "--no-compare"]
SHARDED = {
    "full": ["--stage", "sft", "--full", "--lr", "0.02"],
    "adapter": ["--stage", "sft"],
    "recomputed": ["--stage", "sft", "--full", "--checkpointing"],
    "few": ["--stage", "sft", "--micro-tokens", "60"],
    "cat": ["--stage", "cat", "--full", *SAMPLED, "--pool-per-task", "20", "--pool-wordings", "3",
            "--sft-lr", "1e-5"],
    "dpo": ["--stage", "dpo", *SAMPLED],
    "frozen": ["--stage", "cut", "--sft-steps", "3", "--detector", "frozen", "--samples", "1",
               "--pool-per-task", "7", "--downsample", "0", "--no-compare"],
}


class PlainSGD(torch.optim.SGD):
    """In place of AdamW, whose first steps have full size even where a gradient is rounding."""

    def __init__(self, weights, lr=0.0, **rest):
        super().__init__(weights, lr=lr, momentum=0.9)


@pytest.mark.parametrize("name, size", [
    ("full", 2), ("adapter", 2),
    *(pytest.param(name, size, marks=FAULTS) for name in SHARDED for size in (2, 3)
      if size != 2 or name not in ("full", "adapter"))])
def test_shards_train_as_one_process_does(name, size, taught_command, tmp_path, monkeypatch):
    """Within rounding; with uneven micro-batches, and stopped and resumed with and without."""
    if name == "full":
        monkeypatch.setattr(torch.optim, "AdamW", PlainSGD)
    loss, weight = {"full": (3e-6, 2e-6), "cat": (2e-4, 2e-4)}.get(name, (1e-4, 2e-5))

    def run(out, shard):
        argv = taught_command(tmp_path / out, "--steps", "6", "--batch-size", "4", "--micro-tokens",
                              "120", "--no-evaluate", "--save-every", "2", "--dtype", "float32",
                              *SHARDED[name])
        if not shard:
            return {runs.survive([*argv, "--no-shard"], [])[1]}
        return set(runs.run_together([*argv, "--shard"], size))
    assert run("one", False) == {0} and run("many", True) == {0}
    for first in (True, False) if name == "full" or (name, size) == ("adapter", 3) else ():
        with monkeypatch.context() as patch:
            steps, real = iter(range(9)), train.backward
            patch.setattr(train, "backward", lambda *args, steps=steps, real=real:
                          os._exit(9) if next(steps) == 3 else real(*args))
            assert run(f"then{first}", first) == {9}
        assert run(f"then{first}", not first) == {0}
    one = tmp_path / "one"
    for out in [path for path in tmp_path.iterdir() if path.name.startswith(("many", "then"))]:
        for row, wanted in zip(*(data.read_records(folder / "log.jsonl") for folder in (out, one)),
                               strict=True):
            for key in set(row) - {"seconds", "tokens"}:
                close = isinstance(row[key], float) and abs(row[key] - wanted[key]) < loss
                assert row[key] == wanted[key] or close
        for file in [path.relative_to(out) for path in out.rglob("*.safetensors")]:
            found, wanted = load_file(out / file), load_file(one / file)
            assert found.keys() == wanted.keys()
            for key in found:
                assert torch.allclose(found[key], wanted[key], atol=weight, rtol=weight)


def test_each_process_holds_its_share_alone(taught_command, tmp_path, monkeypatch):
    """Of n numbers each of two processes holds n / 2 (the last rows may be fewer)."""
    def look(run):
        total = sum(p.numel() for p in run.model.parameters())
        local = sum(p.to_local().numel() for p in run.model.parameters())
        whole = ranks.gather_model(run.model, run.guard.rank, torch.float32)
        if run.guard.rank == 0:
            from model import load_model
            before = load_model(run.cfg.model)
            for one, other in zip(whole.parameters(), before.parameters(), strict=True):
                assert torch.equal(one, other)
        (tmp_path / str(run.guard.rank)).write_text(str(local / total))
        raise ValueError("enough")
    monkeypatch.setattr(train, "train", look)
    argv = taught_command(tmp_path / "run", "--stage", "sft", "--full", "--shard")
    assert set(runs.run_together(argv, 2)) <= {1, 2}
    for rank in "01":
        assert 0.49 < float((tmp_path / rank).read_text()) < 0.51
