"""A number that is not finite stops a run before any weight changes, and names its record."""

import random

import pytest
import short_runs as runs
import torch

import data
import methods.sft
import train
from extras.runtime import checkpoint, guard, ranks

FAULTS = pytest.mark.faults


def poison(monkeypatch, name: str, step: int, value: float, where: str) -> None:
    """From `step` on a record's loss is `value`; or finite, with a gradient that is not."""
    real_collate, real = train.collate, methods.sft.step

    def collate(items, model, device):
        bad = any(item["name"] == name for item in items)
        return real_collate(items, model, device) | {"bad": bad}

    def bad_step(model, batch, cfg):
        terms = real(model, batch, cfg)
        if batch["bad"] and batch["step"] >= step:
            p = next(p for p in model.parameters() if p.requires_grad)
            more = {"loss": (p * 0).sum() + value, "large": value * p.sum(),
                    "gradient": (p - p.detach()).abs().sum().sqrt() * 0}
            terms["ce"] = terms["ce"] + more[where]
        return terms
    monkeypatch.setattr(train, "collate", collate)
    monkeypatch.setattr(guard, "collate", collate)
    monkeypatch.setattr(methods.sft, "step", bad_step)


@pytest.mark.parametrize("size, where, value", [
    (1, "loss", float("nan")), (1, "gradient", 0.0), (2, "loss", float("inf")),
    *(pytest.param(size, where, value, marks=FAULTS) for size in (1, 2, 3) for where, value in (
        ("loss", float("nan")), ("loss", float("inf")), ("gradient", 0.0), ("large", 3e38)))])
def test_a_bad_number_changes_no_bit_and_names_its_record(size, where, value, command, tmp_path,
                                                          monkeypatch, capfd):
    names, real_items = [], methods.sft.items
    monkeypatch.setattr(methods.sft, "items", lambda run: found_items(run))

    def found_items(run):
        found = real_items(run)
        names[:] = [item["name"] for item in found]
        return found
    assert train.main([*command("sft", tmp_path / "look"), "--steps", "1"]) == 0
    wanted, step = names[0], 0
    for step in range(5, 12):  # the first step that sees the first record
        chosen = data.batch_indices(len(names), 4, step, 0)
        if any(names[i] == wanted for i in chosen):
            break
    poison(monkeypatch, wanted, 5, value, where)
    kept, seen = [], tmp_path / "weights"
    real_save, real_inspect = checkpoint.save_checkpoint, guard.Guard.inspect

    def save(run, optimizer, items, books):
        real_save(run, optimizer, items, books)
        if books["step"] == step:  # weights and moments before the bad step ...
            weights = [p for p in run.model.parameters() if p.requires_grad]
            slots = [x for state in optimizer.state.values() for x in state.values()]
            kept.extend((x, x.detach().clone()) for x in (*weights, *slots))

    def inspect(self, run, *rest):
        try:
            return real_inspect(self, run, *rest)
        except FloatingPointError:  # ... are there when it gives up
            with open(seen, "a") as file:
                file.write(f"{bool(kept) and all(torch.equal(a, b) for a, b in kept)} ")
            raise
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    monkeypatch.setattr(guard.Guard, "inspect", inspect)
    capfd.readouterr()
    argv = command("sft", tmp_path / "run")
    statuses = runs.run_together(argv, size) if size > 1 else [train.main(argv)]
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert statuses == [1] * size and len(lines) == 1 and "Traceback" not in error
    assert f"step {step} of sft gave a non-finite" in lines[0] and wanted in lines[0]
    assert f"Last checkpoint: step {step}." in lines[0]
    assert where != "loss" or f"records {wanted})" in lines[0]  # and no other
    assert seen.read_text() == "True " * size


def test_clipping_alone_would_have_spread_it():
    """The control: behind the usual clipping one bad element spoils every weight."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones(3)
    weights[0].grad[1] = float("nan")
    assert guard.Guard(None).clip(weights, 1.0) != 0
    optimizer.step()
    assert all(weight.isnan().all() for weight in weights)


class FakeRun:
    """What `inspect` reads of a run."""

    method = type("Method", (), {"TERMS": {"ce": "tokens"}})

    def say(self, message):
        assert message.startswith("warning: the loss of ")


def test_planted_spikes_are_found_and_clean_losses_are_not_flagged():
    rng, flagged, false_alarms = random.Random(0), 0, 0
    planted, seen = set(rng.sample(range(20, 2020), 20)), guard.Guard(None)
    for step in range(2020):
        loss = (2 * 0.999 ** step + 0.5) * rng.lognormvariate(0, 0.15)
        before = seen.recent
        if step in planted:
            flagged += bool(seen.inspect(FakeRun(), {"ce": 50 * loss}, 1.0, []))
            seen.recent = before  # what came of it in a real run is not known here
        else:
            false_alarms += bool(seen.inspect(FakeRun(), {"ce": loss}, 1.0, []))
    assert flagged == 20 and false_alarms == 0


def test_a_spike_is_flagged_in_the_log_with_its_records(command, tmp_path, monkeypatch, capsys):
    real, steps = train.backward, iter(range(100))

    def backward(*args):
        factor = 50 if next(steps) == 10 else 1
        return {name: factor * value for name, value in real(*args).items()}
    monkeypatch.setattr(train, "backward", backward)
    assert train.main(command("sft", tmp_path / "run")) == 0
    rows = data.read_records(tmp_path / "run/log.jsonl")
    assert [row["step"] for row in rows if "spike" in row] == [10]
    assert "colour/" in rows[10]["spike"] or "person/" in rows[10]["spike"]
    said = capsys.readouterr()
    assert "warning: the loss of sft jumped at step 10 (records " in said.out + said.err


def test_names_of_records_are_listed_once_and_five_at_most():
    items = [{"name": name} for name in "aabcdefg"]
    assert guard.list_names(items) == "a, b, c, d, e and 2 more"
    assert guard.list_names(items[:3]) == "a, b"


def test_what_travels_between_processes_comes_back_as_it_was():
    from eval import Completion

    value = [Completion("a\ud800", [1, 2], True), ("x", 0.1 + 0.2), {"a": (None, [float("inf")])},
             {1: {"b": ()}}, [], "list", 3]
    found = ranks.decode(ranks.encode(value))
    assert found == value and type(found[1]) is tuple and type(found[2]["a"]) is tuple
