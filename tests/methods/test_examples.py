"""examples.py: examples that teach judging, and how a model is asked to judge."""

import random

import pytest
import torch

import data
import judge as judging
from methods import examples
from model import Packed, load_model

IGNORE = data.IGNORE_INDEX


def test_judging_examples_carry_the_verdicts_of_rules(make_run):
    run = make_run("sft", "--judge-share", "0.5")
    targets = {(task.definition, x.input): x.outputs[0]
               for task in run.tasks for x in task.instances}
    words, shown = {"expected": 0, "unexpected": 0, "correct": 0, "incorrect": 0}, 0
    for document in examples.judging_documents(run, 40):
        ids, labels = document["input_ids"], document["labels"]
        text = run.tokenizer.decode(ids)
        lines = dict(line[4:].split(": ", 1) for line in text.splitlines() if ": " in line)
        target = targets[lines["Instruction"], lines["Input"]]
        shown += "Reference" in lines
        assert lines.get("Reference", target) == target
        blocks = text.split("### Answer: ")[1:]
        assert len(blocks) == 4
        for block in blocks:
            answer, _, verdict = block.partition("\n")
            kind, _, word = verdict.strip().removeprefix("### ").partition(": ")
            assert kind in ("Type", "Verdict") and word in words
            words[word] += 1
            if kind == "Verdict":
                assert (word == "correct") == (answer == target)
        learnt = run.tokenizer.decode([label for label in labels if label != IGNORE]).split()
        assert len(learnt) == 4 and set(learnt) <= set(words)
    assert all(words.values()) and 20 < shown < 40


def test_answers_to_judge_are_right_or_wrong_in_the_ways_of_models():
    rng, target = random.Random(3), "anna has a hat"
    answers = examples.answers_to_judge(target, same_task=["tom ran", "red"],
                                        same_input=["blue"], rng=rng, n=4000)
    share = answers.count(target) / 4000
    assert 0.37 < share < 0.43 and 0.17 < answers.count("blue") / 4000 < 0.23
    others = {x for x in answers if x not in (target, "blue", "tom ran", "red")}
    for answer in others:  # one word dropped or changed
        words = answer.split()
        assert len(words) in (3, 4)
        assert sum(word not in target.split() for word in words) <= 1
    assert "anna a hat" in others and "anna has red hat" in others


def test_keywords_are_asked_over_all_their_tokens(tokenizer, world, written_out):
    model = load_model(world / "model")
    prefixes, suffixes = ["judge :\nx\n", "judge :\ny y\n"], ["### Type:", "### Verdict:"]
    words = [judging.TYPE_WORDS, judging.VERDICT_WORDS]
    found = examples.keyword_logprobs(model, tokenizer, prefixes, suffixes, words, batch_size=3)
    for prefix, suffix, pair, answer in zip(prefixes, suffixes, words, found, strict=True):
        for word, logprob in zip(pair, answer, strict=True):
            stem = tokenizer.encode_prompt(prefix + suffix)
            ids = tokenizer.encode_prompt(prefix + suffix + word)
            assert ids[:len(stem)] == stem and len(ids) > len(stem)
            document = {"input_ids": ids, "labels": [IGNORE] * len(stem) + ids[len(stem):]}
            assert logprob == pytest.approx(sum(written_out(model, document)), abs=1e-4)


def test_a_long_prefix_is_truncated_from_the_left(tokenizer, world):
    model = load_model(world / "model")
    arguments = [["### Type:"], [judging.TYPE_WORDS]]
    (long,), (short,) = (examples.keyword_logprobs(model, tokenizer, [text], *arguments, max_len=60)
                         for text in ("red hat " * 500 + "\n", "red hat " * 400 + "\n"))
    assert long == short


def test_a_suffix_without_room_for_its_prefix_is_refused(tokenizer, world):
    model, arguments = load_model(world / "model"), [["### Type:"], [judging.TYPE_WORDS]]
    with pytest.raises(ValueError, match="--max-len 4 leaves no room for a judge's prompt before"):
        examples.keyword_logprobs(model, tokenizer, ["red hat\n"], *arguments, max_len=4)


def float32_sums(model, ids, start):
    """The log-probability of ids[start:] by a float32 head on the model's own hidden states."""
    with torch.no_grad():
        hidden = model.hidden(torch.tensor(ids), Packed([len(ids)], "cpu"))  # (N, D)
        logprobs = (hidden.float() @ model.lm_head.weight.float().T).log_softmax(-1)  # (N, V)
    return sum(float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids)))


def test_keywords_of_a_bfloat16_model_are_compared_in_float32(tokenizer, world):
    """In bfloat16, logits of 16 to 32 are multiples of 1/8, and so would be the differences."""
    model = load_model(world / "model")
    with torch.no_grad():
        model.lm_head.weight.mul_(200)
    model = model.bfloat16()
    prefixes, words = [f"judge hat {k} :\n" for k in range(12)], (" y", " n")
    found = examples.keyword_logprobs(model, tokenizer, prefixes, ["### Type:"] * 12, [words] * 12)
    gaps = []
    for prefix, answer in zip(prefixes, found, strict=True):
        start, wanted = len(tokenizer.encode_prompt(prefix + "### Type:")), []
        for word in words:
            ids = tokenizer.encode_prompt(prefix + "### Type:" + word)
            wanted.append(float32_sums(model, ids, start))
        assert answer == pytest.approx(wanted, abs=1e-3)
        gaps.append(answer[0] - answer[1])
    assert sum(0.02 < 8 * gap % 1 < 0.98 for gap in gaps) > 9


def test_a_float32_head_is_used_as_it_is(world):
    model = load_model(world / "model")
    assert examples.float32_head(model) is model.lm_head
    head = examples.float32_head(model.bfloat16())
    assert head is not model.lm_head and head.weight.dtype == torch.float32
    assert head.weight.equal(model.lm_head.weight.float())
