"""Fixtures of the methods' tests: runs before they train, one step's gradients, golden numbers.

No method but sft and sft_ia is imported here, so that each other one may be deleted.
"""

import pytest
import torch

import data
import lora
import train
from methods import collate, finding
from model import Llama, ModelConfig

LENGTHS = (7, 6, 8, 5)  # of the four golden candidates, in tokens, of which 3 are the prompt
PROMPT, VOCAB = 3, 7


# ----- Runs -----

@pytest.fixture(scope="session")
def earlier(world, tmp_path_factory):
    """{stage: run folder} of sft and sft-ia, trained for three steps."""
    folders = {}
    for stage, more in (("sft", []), ("sft-ia", ["--wordings", "3"])):
        folders[stage] = tmp_path_factory.mktemp("earlier") / stage
        argv = ["--stage", stage, "--model", str(world / "model"), "--tasks", str(world / "tasks"),
                "--paraphrases", str(world / "paraphrases.json"), "--out", str(folders[stage]),
                "--steps", "3", "--per-task", "8", "--max-new-tokens", "4", "--judge-share", "0.3",
                "--no-evaluate", "--plain", *more]
        run = train.make_run(*train.parse_config(argv), train.Alone())
        train.run_stage(run, stage)
    return folders


SCORED = '''"""A stage on scored candidates."""
from dataclasses import dataclass
from methods import candidates, pairing, preference

base, title, TERMS, METRICS = candidates, "mine", {"loss": "pairs"}, preference.METRICS
step = preference.preference_step


@dataclass
class Flags(preference.PreferenceFlags, pairing.PairFlags):
    """All of them."""


def items(run):
    """The items of CAT."""
    return pairing.pair_items(run, lambda run, best, worse: pairing.ranked_item(
        run, best, worse, best["response"])[0])
'''

JUDGED = '''"""A stage on judged responses."""
from methods import judged, sequence_step

base, title, TERMS, step = judged, "mine", {"ce": "items"}, sequence_step


def items(run):
    """All responses."""
    return [judged.one_document(record, judged.judged_document(run, record))
            for record in judged.judged_records(run)]
'''


@pytest.fixture(scope="session")
def scored_stage(tmp_path_factory):
    """The path of a stage on scored candidates that belongs to no method."""
    path = tmp_path_factory.mktemp("stages") / "scored.py"
    path.write_text(SCORED)
    return str(path)


@pytest.fixture(scope="session")
def judged_stage(tmp_path_factory):
    """The path of a stage on judged responses that belongs to no method."""
    path = tmp_path_factory.mktemp("stages") / "judged_ones.py"
    path.write_text(JUDGED)
    return str(path)


@pytest.fixture
def make_run(arguments, tmp_path):
    """A function that makes the run of a stage before it trains: make_run(stage, *flags)."""
    def make(stage, *more):
        argv = ["--stage", stage, *arguments(tmp_path / "run", "--plain", *more, stage=stage)]
        run = train.make_run(*train.parse_config(argv), train.Alone())
        run.folder.mkdir(exist_ok=True)
        return run
    return make


@pytest.fixture
def ready(make_run):
    """The same with the model that the stage trains, its adapters far from their start."""
    def make(stage, *more):
        run = make_run(stage, *more)
        run.model = train.trainable_model(run.cfg, None)
        with torch.no_grad():
            for weight in lora.adapter_weights(run.model).values():
                weight.normal_(0, 0.2)
        run.method.attach(run)
        if hasattr(run.model, "value_head"):
            torch.nn.init.normal_(run.model.value_head.weight)
        return run
    return make


@pytest.fixture
def command(arguments, earlier, tmp_path):
    """A function that runs a stage for three steps behind a finished one; returns its folder.

    behind=False: the stage before it is trained first.
    """
    def run(stage, *more, out="run", behind=True):
        needs = getattr(finding.find_method(stage), "needs", "")
        argv = ["--stage", stage, *arguments(tmp_path / out, "--plain", "--steps", "3",
                                            "--evaluate", stage=stage)]
        if needs:
            argv += ["--no-compare", "--batch-size", "4"]
            argv += ["--init", str(earlier[needs])] if behind else ["--sft-steps", "3"]
        assert train.main([*argv, *more]) == 0
        return tmp_path / out
    return run


@pytest.fixture
def refused(arguments, tmp_path, capsys):
    """A function that checks that a command ends with status 2 and one line that has some words."""
    def check(wanted, stage, *more):
        with pytest.raises(SystemExit) as stop:
            train.main(["--stage", stage, *arguments(tmp_path / "refused", "--plain", *more,
                                                     stage=stage)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert wanted in error
    return check


@pytest.fixture
def make_model():
    """A function that makes a small random model: make_model(vocab_size, seed)."""
    def make(vocab_size, seed):
        model = Llama(ModelConfig(vocab_size, dim=32, n_layers=2, n_heads=4, n_kv_heads=2,
                                  head_dim=8, hidden_dim=64, norm_eps=1e-5, context=512))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 2:
                    weight.normal_(0, 0.06, generator=generator)
        return model
    return make


# ----- One step -----

@pytest.fixture
def gradients():
    """A function (run, items, micro_tokens) -> ({term: mean}, gradients end to end)."""
    def compute(run, items, micro_tokens=10**9):
        run.model.zero_grad()
        parts = data.micro_batches(items, micro_tokens)
        means = train.backward(run, [collate(x, run.model, "cpu") | {"step": 9999} for x in parts])
        found = [p.grad.flatten() for p in run.model.parameters() if p.grad is not None]
        return means, torch.cat(found)
    return compute


@pytest.fixture
def same_in_parts(gradients):
    """A function that checks that a step in micro-batches is the step in one batch."""
    def check(run, items):
        assert len(data.micro_batches(items, 1)) == len(items) > 2
        means, whole = gradients(run, items)
        split, parts = gradients(run, items, 1)
        assert means == pytest.approx(split, rel=1e-5, abs=1e-6) and whole.abs().max() > 1e-5
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)
        return means
    return check


@pytest.fixture
def written_out():
    """A function (model, document) -> [log p of each labelled token], from plain log-softmax."""
    def compute(model, document):
        ids, labels = torch.tensor(document["input_ids"]), document["labels"]
        with torch.no_grad():
            logprobs = model(ids[None])[0].double().log_softmax(-1)  # (T, V)
        return [float(logprobs[t - 1, label]) for t, label in enumerate(labels) if label != -100]
    return compute


# ----- Golden numbers -----

class Golden(torch.nn.Module):
    """A model whose logits are a table: pi(i, t, v) = 2 sin(0.7 i + 1.3 t + 2.1 v + 0.5)."""

    def __init__(self, candidates):
        super().__init__()
        rows, v = [], torch.arange(VOCAB, dtype=torch.float64)
        for i, length in candidates:
            t = torch.arange(length, dtype=torch.float64)[:, None]
            rows.append(2 * torch.sin(0.7 * i + 1.3 * t + 2.1 * v + 0.5))  # (T, V)
        self.table = torch.nn.Parameter(torch.cat(rows))

    def hidden(self, input_ids, attend, rows):
        """The logits themselves, as `lm_head` changes nothing."""
        return self.table[rows]

    def lm_head(self, hidden):
        """The logits."""
        return hidden


@pytest.fixture
def golden():
    """A function that makes the model above and the documents of four candidates.

    What tests expect of them was computed from the equations in float64, without this code.

    golden([0, 1], tokens=[0, 0]): the logits of candidates 0 and 1 over the tokens of candidate 0.
    """
    def make(logits=(0, 1, 2, 3), tokens=None):
        documents, candidates = [], []
        for i, k in zip(logits, tokens or logits, strict=True):
            ids = [(3 * k + 2 * t + 1) % VOCAB for t in range(LENGTHS[k])]
            labels = [data.IGNORE_INDEX] * PROMPT + ids[PROMPT:]
            documents.append({"input_ids": ids, "labels": labels, "truncated": 0})
            candidates.append((i, LENGTHS[k]))
        return Golden(candidates), documents
    return make
