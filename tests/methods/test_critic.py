"""critic.py: what a critic learns, and that its adapter is asked by other methods."""

import pytest

import data
import train
from methods import critic
from methods.critics import FAILED, PERFECT, critic_prompt
from methods.judged import make_critic


def test_it_learns_the_judgment_or_that_nothing_is_wrong(make_run, judged):
    run = make_run("critic", "--records", str(judged), "--downsample", "0")
    texts = [run.tokenizer.decode(item["documents"][0]["input_ids"]) for item in critic.items(run)]
    for record in data.read_records(judged):
        asked = critic_prompt(record["instruction"], record["input"], record["response"])
        text = run.template.render(*asked) + " " + (record["judgment"] or PERFECT)
        assert texts.count(text) == 1
    assert len(texts) == 12


def test_a_step_is_the_mean_of_means_and_micro_batches_change_nothing(
        ready, judged, written_out, same_in_parts):
    run = ready("critic", "--records", str(judged), "--downsample", "0")
    items, total = critic.items(run), 0.0
    for item in items:
        terms = written_out(run.model, item["documents"][0])
        total -= sum(terms) / len(terms)
    means = same_in_parts(run, items)
    assert means["ce"] == pytest.approx(total / len(items), rel=1e-5)


def test_a_trained_one_judges_for_other_methods(command, make_run, judged):
    """--critic RUN, while the model that is trained cannot judge."""
    folder = command("critic", "--records", str(judged), "--downsample", "0", "--steps", "40",
                     "--lr", "0.02", "--full", behind=False)
    run = make_run("critic", "--judge", "self", "--critic", str(folder), "--max-new-tokens", "8")
    run.model = train.trainable_model(run.cfg, None)
    records = data.read_records(judged)
    found = [make_critic(run).critique(records)]
    run.cfg.critic = ""
    found.append(make_critic(run).critique(records))
    assert set(found[0]) <= {record["judgment"] for record in records}
    assert set(found[1]) == {FAILED}  # the untrained model never ends


def test_a_critic_is_for_judge_self(refused):
    refused("--critic writes judgments only with --judge self", "critic", "--critic", "x")
