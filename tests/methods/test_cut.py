"""cut.py: detection and both losses by golden numbers and by hand, the authors' loss, its items."""

import json
import math

import pytest
import torch

import data
from methods import collate, cut, losses

VARIANTS = [
    (), ("--combine", "half", "--reduction", "token", "--positive", "text", "--unlike-gamma", "1"),
    ("--detector", "frozen", "--downsample", "0.25"), ("--detect", "all", "--no-use-judged"),
    ("--dropout", "0.1"), ("--no-use-l1",), ("--no-use-good", "--judged-warmup", "2")]


@pytest.fixture
def cut_run(ready, judged):
    """A function that makes a run whose adapters are moved, on the judged responses."""
    def make(*more):
        return ready("cut", "--records", str(judged), "--downsample", "0", *more)
    return make


# ----- Golden numbers -----

@pytest.mark.parametrize("flags, flagged, l1", [
    (("--unlike-alpha", "1"), 3, 0.4272930751), (("--unlike-alpha", "0.5"), 3, 0.3589349213),
    (("--unlike-alpha", "0.5", "--unlike-gamma", "1"), 3, 0.3190289312),
    (("--detect-lam", "1.5", "--unlike-alpha", "0.25", "--unlike-gamma", "2"), 2, 0.5571892214)])
def test_golden_step(flags, flagged, l1, golden, make_run):
    """The tokens of candidate 0, with the judgment under its own logits, without under row 1's."""
    model, documents = golden([0, 1], tokens=[0, 0])
    item = {"documents": documents, "values": {"roles": [losses.ALIGN_N, losses.MISALIGN]}}
    batch = collate([item], model, "cpu") | {"step": 0}
    cfg = make_run("cut", *flags).cfg
    terms = cut.step(model, batch, cfg)
    assert terms["l1"].item() == pytest.approx(l1, abs=1e-7)
    assert terms["l2"].item() == pytest.approx(1.4516185083, abs=1e-7)
    assert terms["flagged"] == flagged
    assert [cut.count_l1(batch, cfg), cut.count_l2(batch, cfg)] == [1, 1]
    assert cut.count_detected(batch, cfg) == 4


def test_probabilities_and_flags_of_the_golden_tokens(golden, make_run):
    model, documents = golden([0, 1], tokens=[0, 0])
    item = {"documents": documents, "values": {"roles": [losses.ALIGN_N, losses.MISALIGN]}}
    batch = collate([item], model, "cpu")
    logprobs = losses.gathered_logprobs(model.table[batch["rows"]], batch["targets"])
    assert logprobs.exp().tolist() == pytest.approx([.0746784, .3572816, .4455342, .2530424,
                                                     .0180993, .0995697, .3453913, .3127638],
                                                    abs=1e-7)
    for flags, wanted in ((("--detect-lam", "1.1"), [1, 1, 1, 0]),
                          (("--detect-lam", "1.3"), [1, 1, 0, 0]),
                          (("--detect-floor", "0.1"), [0, 1, 1, 0])):
        found = cut.detect(logprobs, batch, make_run("cut", *flags).cfg)
        assert found.tolist() == [bool(flag) for flag in wanted]


# ----- The authors' loss -----

def authors_loss(judged, plain, kinds, targets, *, alpha, threshold):
    """The published loss of a micro-batch (modeling_llama_unlikelihood.py), from its description.

    Rows A: the judged prompt, or the plain one of a good response. Rows B: the plain prompt of the
    bad ones.
    """
    def chosen(probs, i):
        return probs.gather(-1, targets[i][:, None]).squeeze(-1)
    row_a = torch.cat([chosen(judged[i].log_softmax(-1), i) for i in range(len(kinds))])
    bad = [i for i, kind in enumerate(kinds) if kind == "bad"]
    if not bad:
        return -row_a.mean()
    p_a = torch.cat([chosen(judged[i].softmax(-1), i) for i in bad])
    p_b = torch.cat([chosen(plain[i].softmax(-1), i) for i in bad])
    ratio = (p_a / p_b).detach()
    tokens = torch.where(ratio > threshold, alpha * (1 - p_b).log(), p_b.log())
    return (-tokens.mean() - row_a.mean()) / 2


@pytest.mark.parametrize("kinds", [["bad", "good", "bad", "good"], ["good"] * 4, ["bad"] * 4])
def test_half_with_the_mean_over_tokens_is_the_authors_loss(kinds, make_run):
    sizes = [5, 3, 6, 2]
    judged, plain = ([torch.randn(n, 13, dtype=torch.float64, requires_grad=True) for n in sizes]
                     for _ in range(2))
    targets, items, table = [torch.randint(0, 13, (n,)) for n in sizes], [], []
    for i, kind in enumerate(kinds):
        ids = [1, 1, *targets[i].tolist()]
        document = {"input_ids": ids, "labels": [-100, -100, *ids[2:]], "truncated": 0}
        blank = torch.zeros(1, 13, dtype=torch.float64)  # position t predicts token t + 1
        roles = [losses.ALIGN_P]
        table.append(torch.cat([blank, judged[i], blank]))
        if kind == "bad":
            roles = [losses.ALIGN_N, losses.MISALIGN]
            table.append(torch.cat([blank, plain[i], blank]))
        items.append({"documents": [document] * len(roles), "values": {"roles": roles}})
    logits = torch.cat(table)

    class Given:
        def hidden(self, input_ids, attend, rows):
            return logits[rows]

        def lm_head(self, hidden):
            return hidden
    cfg = make_run("cut", "--combine", "half", "--reduction", "token", "--unlike-alpha", "0.5").cfg
    batch = collate(items, Given(), "cpu") | {"step": 0}
    terms = cut.step(Given(), batch, cfg)
    ours = sum(terms[name] / max(1, cut.TERMS[name](batch, cfg)) for name in ("l1", "l2"))
    theirs = authors_loss(judged, plain, kinds, targets, alpha=0.5, threshold=1.1)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    leaves = [*judged, *(x for x, kind in zip(plain, kinds, strict=True) if kind == "bad")]
    for mine, their in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves),
                           strict=True):
        torch.testing.assert_close(mine, their, atol=1e-12, rtol=0)


# ----- The step -----

@pytest.mark.parametrize("flags", [
    (), ("--unlike-alpha", "0.5", "--unlike-gamma", "1", "--detect-lam", "1.01"),
    ("--combine", "half"), ("--no-use-judged",), ("--no-use-l1",), ("--no-use-good",),
    ("--reduction", "token"), ("--detect", "all")])
def test_a_step_equals_the_equation_and_micro_batches_change_nothing(
        flags, cut_run, written_out, same_in_parts):
    run = cut_run(*flags)
    cfg, items, l1, l2, flagged = run.cfg, cut.items(run), 0.0, 0.0, 0
    responses, n1, n2 = 0, 0, 0
    half = 0.5 if cfg.combine == "half" else 1.0
    for item in items:
        terms = [written_out(run.model, document) for document in item["documents"]]
        scale = 1 if cfg.reduction == "token" else 1 / len(terms[0])
        responses += 1
        n2 += len(terms[0])
        if item["values"]["roles"] == [losses.ALIGN_P]:
            l2 -= scale * sum(terms[0])
            continue
        if cfg.use_judged:
            l2 -= half * scale * sum(terms[0])
        for told, plain in zip(*terms, strict=True) if len(terms) == 2 else ():
            n1 += 1
            wrong = cfg.detect == "all" or math.exp(told - plain) > cfg.detect_lam
            weight = cfg.unlike_alpha * math.exp(told) ** cfg.unlike_gamma
            loss = -weight * math.log1p(-math.exp(plain)) if wrong else -plain
            l1, flagged = l1 + half * scale * loss, flagged + wrong
    if cfg.reduction == "mean_per_sequence":
        n1 = n2 = responses
    wanted = {"l1": l1 / max(1, n1), "l2": l2 / n2}
    means = same_in_parts(run, items)
    assert {name: means[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    tokens = sum(len([x for x in item["documents"][0]["labels"] if x != -100]) for item in items
                 if len(item["documents"]) == 2)
    assert means["flagged"] == pytest.approx(flagged / max(1, tokens))
    assert 0 < flagged < tokens or cfg.detect == "all" or not tokens


def test_detection_sees_no_dropout_and_training_does(cut_run):
    run = cut_run("--dropout", "0.5")
    batch = collate(cut.items(run), run.model, "cpu") | {"step": 9999}
    wanted, found = int(cut.flagged_tokens(run.model.eval(), batch, run.cfg).sum()), []
    for _ in range(3):
        terms = cut.step(run.model.train(), batch, run.cfg)
        assert terms["flagged"] == wanted and run.model.training
        found.append(terms["l2"].item())
    assert len(set(found)) == 3


def test_a_frozen_detector_flags_what_the_model_flags_before_it_moves(cut_run):
    run = cut_run("--detector", "frozen")
    items = cut.items(run)
    batch = collate(items, run.model, "cpu") | {"step": 9999}
    live = cut.flagged_tokens(run.model, batch, run.cfg)
    assert batch["flagged"].tolist() == live.tolist() and 0 < live.sum() < len(live)
    with torch.no_grad():
        for weight in run.model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    assert cut.flagged_tokens(run.model, batch, run.cfg).tolist() != live.tolist()
    assert cut.step(run.model, batch, run.cfg)["flagged"] == live.sum()


# ----- Items -----

@pytest.mark.parametrize("positive, words", [("plain", ""), ("text", "perfect .")])
def test_the_satisfied_condition_stands_before_good_answers_and_twins(positive, words, cut_run):
    run, seen = cut_run("--positive", positive), set()
    for item in cut.items(run):
        ids = []
        for document, role in zip(item["documents"], item["values"]["roles"], strict=True):
            text = run.tokenizer.decode(document["input_ids"])
            wanted = "wrong : blue ." if role == losses.ALIGN_N else words
            assert ("Judgment:" in text) == bool(wanted) and wanted in text
            ids.append([label for label in document["labels"] if label != data.IGNORE_INDEX])
            seen.add(role)
        assert all(row == ids[0] for row in ids)  # twins have the same tokens
    assert seen == {losses.ALIGN_P, losses.ALIGN_N, losses.MISALIGN}


@pytest.mark.parametrize("flags, roles", [
    ((), [[0], [1, 2]]), (("--no-use-good",), [[1, 2]]), (("--no-use-l1",), [[0], [1]]),
    (("--no-use-judged",), [[0], [1, 2]]), (("--no-use-l1", "--no-use-judged"), [[0]])])
def test_ablations_leave_documents_out(flags, roles, cut_run):
    found = [item["values"]["roles"] for item in cut.items(cut_run(*flags))]
    assert sorted(set(map(tuple, found))) == [tuple(row) for row in roles]


# ----- Runs -----

@pytest.mark.parametrize("flags", VARIANTS)
def test_the_command_runs(flags, command, judged, capsys):
    folder = command("cut", "--records", str(judged), "--downsample", "0", *flags,
                     behind="--dropout" not in flags)
    log = data.read_records(folder / "log.jsonl")
    assert len(log) == 3 and all(math.isfinite(row["l1"] + row["l2"]) for row in log)
    said = capsys.readouterr().out
    assert "cut: 6 unsatisfying responses (0 of them without a judgment, dropped)" in said
    assert ("1 of them kept" if "0.25" in flags else "6 of them kept") in said
    if "--judged-warmup" in flags:
        assert [row["l1"] for row in log[:2]] == [0, 0] and log[2]["l1"] > 0
    if "--no-use-l1" in flags:
        assert all(row["l1"] == 0 for row in log)


def test_rounds_go_on_from_the_last_on_new_inputs(command):
    folder = command("cut", "--rounds", "2", "--pool-per-task", "4", "--downsample", "0")
    first, second = (data.read_records(place / "judged.jsonl")
                     for place in (folder / "round1", folder))
    assert first and second and not {x["input"] for x in first} & {x["input"] for x in second}
    adapters = [(place / "adapter_model.safetensors").read_bytes()
                for place in (folder / "round1", folder)]
    assert adapters[0] != adapters[1]
    assert json.loads((folder / "config.json").read_text())["rounds"] == 2


def test_wrong_flags_are_refused(refused):
    refused("--critic writes judgments only with --judge self", "cut", "--critic", ".")
    refused("--detect-lam is 0.0", "cut", "--detect-lam", "0")
    refused("invalid choice: 'length'", "cut", "--judge", "length")
