"""extras/fast/keywords.py: the keywords' log-probabilities of whole texts, prefixes read once."""

import pytest
import torch

from extras.fast.attention import Branched


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_keywords_have_the_log_probabilities_of_the_plain_pass(plain, fast, characters, batch_size):
    prefixes = ["task one\n", "a longer task\n", "task one\n", "task one\n", "t\n"]
    suffixes = ["answer: x\nright:", "right:", "right:", "answer: much longer\nright:", ":"]
    keywords = [(" y", " n"), (" yes", " no"), (" yes", " n"), (" expected", " exotic"),
                (" y", " y")]
    found = fast.keyword_logprobs(characters, prefixes, suffixes, keywords, batch_size=batch_size)
    for prefix, suffix, pair, logprobs in zip(prefixes, suffixes, keywords, found, strict=True):
        head = characters.encode_prompt(prefix) + characters.encode_continuation(suffix)
        for keyword, logprob in zip(pair, logprobs, strict=True):
            ids = head + characters.encode_continuation(keyword)
            table = plain(torch.tensor([ids])).log_softmax(-1)[0]  # (T, V)
            expected = sum(table[t - 1, ids[t]].item() for t in range(len(head), len(ids)))
            assert logprob == pytest.approx(expected, abs=1e-4)
    assert fast.keyword_logprobs(characters, [], [], []) == []


def test_a_shared_prefix_is_read_once(fast, characters):
    read = []
    fast.train()
    fast.model.embed_tokens.register_forward_pre_hook(lambda part, given: read.append(given[0]))
    fast.keyword_logprobs(characters, ["long prefix\n"] * 3, ["a:", "b:", "c:"],
                          [(" y", " n")] * 3)
    prefix = characters.encode_prompt("long prefix\n")
    assert [len(ids) for ids in read] == [len(prefix) + 3 * 2]  # one branch for each item
    assert fast.training


def test_a_question_is_truncated_for_its_own_responses_alone(fast, characters):
    """A long response to another question takes none of its room."""
    asked = (["a long question " * 8 + "\n", "t\n"], ["a:", "answer " * 9 + ":"],
             [(" y", " n")] * 2)
    most = len(characters.encode_prompt(asked[0][0])) + 2
    full, fitted, truncated = (fast.keyword_logprobs(characters, *asked, max_len=n)
                               for n in (None, most, most - 9))
    for one, two in zip(full, fitted, strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    assert truncated[0] != pytest.approx(full[0], abs=1e-5)
    assert truncated[1] == pytest.approx(full[1], abs=1e-5)


def test_what_cannot_be_asked_is_refused(fast, characters):
    for suffix, pair, max_len, words in (
            ("right: ", ("yes", "no"), None, "Begin the keyword with a space"),
            ("", (" y", " n"), None, "a suffix has no tokens, but the keywords are read behind it"),
            ("a long answer", (" y", " n"), 10, "leaves no room")):
        with pytest.raises(ValueError, match=words):
            fast.keyword_logprobs(characters, ["p\n"], [suffix], [pair], max_len=max_len)


def test_keywords_of_a_bfloat16_model_are_compared_in_float32(fast, characters):
    """In bfloat16, logits of 16 to 32 are multiples of 1/8, and so would be the differences."""
    with torch.no_grad():
        fast.lm_head.weight.mul_(200)
    fast.bfloat16()
    prefixes = [f"task {k}\n" for k in range(12)]
    found = fast.keyword_logprobs(characters, prefixes, ["right:"] * 12, [(" y", " n")] * 12)
    gaps, rounded = [], []
    for prefix, answer in zip(prefixes, found, strict=True):
        ids = characters.encode_prompt(prefix) + characters.encode_continuation("right:")
        pair = [characters.encode_continuation(word)[0] for word in (" y", " n")]
        with torch.no_grad():
            attend = Branched([(len(ids) - 1, [ids])], "cpu")
            hidden = fast.hidden(torch.tensor(ids), attend)[-1:]  # (1, D)
            exact = (hidden.float() @ fast.lm_head.weight.float().T).log_softmax(-1)[0]  # (V,)
            coarse = fast.lm_head(hidden).float()[0]  # (V,)
        assert answer == pytest.approx([float(exact[k]) for k in pair], abs=1e-3)
        gaps.append(answer[0] - answer[1])
        if min(abs(coarse[k]) for k in pair) >= 16:
            rounded.append(float(8 * (coarse[pair[0]] - coarse[pair[1]]) % 1))
    assert sum(0.02 < 8 * gap % 1 < 0.98 for gap in gaps) > 9
    assert len(rounded) > 3 and not any(rounded)  # what is avoided
