"""docs/porting.md runs as it stands, and its losses are those of the training loop."""

import re
from pathlib import Path

import pytest
import torch

import losses

PAGE = Path(__file__).parent.parent / "docs/porting.md"


def code_blocks() -> list[str]:
    """The page's blocks of Python."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.fixture
def run(world, capsys):
    """A function that runs a block: the names that it defines, and the losses that it prints."""
    pytest.importorskip("peft")

    def work(number):
        torch.manual_seed(0)
        names = {}
        exec(code_blocks()[number].replace('"DIR"', repr(str(world / "model"))), names)
        lines = capsys.readouterr().out.splitlines()
        return names, [float(line.split()[1]) for line in lines]
    return work


@pytest.mark.parametrize("number", [0, 1, 2], ids=["CAT", "CUT", "DPO"])
def test_each_example_is_short_runs_and_learns(number, run):
    lines = [line for line in code_blocks()[number].splitlines() if line]
    assert len(lines) <= 25
    _, found = run(number)
    assert len(found) == 5 and found[-1] < found[0]
    if number == 2:
        assert found[0] == pytest.approx(0.693, abs=1e-3)  # policy and reference are the same


def test_the_readme_shows_the_first_example():
    readme = (PAGE.parent.parent / "README.md").read_text(encoding="utf-8")
    assert code_blocks()[0] in readme


def test_responses_are_encoded_behind_their_prompts(run):
    names, _ = run(0)
    tokenizer, ids, labels = names["tokenizer"], names["ids"], names["labels"]
    for row, (prompt, response) in enumerate(names["rows"]):
        wanted = tokenizer(prompt + response).input_ids + [tokenizer.eos_token_id]
        assert ids[row, :len(wanted)].tolist() == wanted
        kept = labels[row][labels[row] != -100].tolist()
        assert kept == wanted[-len(kept):] and tokenizer.decode(kept[:-1]).strip() == response[1:]


def test_the_mean_losses_are_the_sums_of_the_training_loop():
    """The padded form of CAT and DPO against the packed form that train.py calls."""
    logits, labels = torch.randn(3, 9, 12), torch.randint(0, 12, (3, 9))
    for row, (begin, end) in enumerate(((2, 9), (4, 7), (1, 5))):
        labels[row, :begin] = labels[row, end:] = -100
    logprobs, kept = losses.token_logprobs(logits, labels)
    owners = torch.arange(3)[:, None].expand_as(kept)[kept]
    better, worse = torch.tensor([0, 0]), torch.tensor([1, 2])
    terms = losses.cat_loss(logprobs[kept], owners, better, worse, torch.tensor([1.0, 0, 0]),
                            lam=0.5, margin=0.3)
    wanted = sum(total / count for total, count in terms.values())
    found = losses.cat_loss_from_logits(logits, labels, [(0, 1), (0, 2)], lam=0.5, margin=0.3)
    assert torch.allclose(found, wanted, rtol=1e-6)
    h = losses.preference_logits(logprobs.sum(1), torch.zeros(3), better, worse)
    total, count = losses.dpo_loss(h, beta=0.2)
    found = losses.dpo_loss_from_logits(logits, torch.zeros_like(logits), labels,
                                        [(0, 1), (0, 2)], beta=0.2)
    shift = losses.token_logprobs(torch.zeros_like(logits), labels)[0].sum(1)
    h = losses.preference_logits(logprobs.sum(1), shift, better, worse)
    assert torch.allclose(found, losses.dpo_loss(h, beta=0.2)[0] / count, rtol=1e-6)
