"""examples.py: how a model is asked to judge."""

import pytest

import data
import judge as judging
from methods import examples
from model import load_model

IGNORE = data.IGNORE_INDEX


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
