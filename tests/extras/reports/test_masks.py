"""CUT's masks against Eq. 5 from plain forward passes; words and scores by hand."""

from types import SimpleNamespace

import pytest
import torch

from data import TEMPLATES
from extras.reports.masks import find_masks, score_masks, token_text, wrong_tokens
from methods import Run, open_model


class Pieces:
    """A tokenizer of whole words and parts of words."""

    def __init__(self, *pieces):
        self.pieces, self.control = ["</s>", *pieces], {0}
        self.model = SimpleNamespace(id_to_piece=lambda token: self.pieces[token],
                                     is_byte=lambda token: self.pieces[token].startswith("<0x"))


def texts_of(tokenizer, ids):
    return [token_text(tokenizer, token) for token in ids]


def test_the_word_in_which_a_token_ends():
    words = Pieces("\u2581name", "\u2581:", "\u2581an", "na", "\u2581", "\u2581;")
    texts = texts_of(words, [1, 2, 3, 4, 6, 0])
    assert texts == [b" name", b" :", b" an", b"na", b" ;", b""]
    assert wrong_tokens(texts, [False, False, True, False]) == [False, False, True, True, False,
                                                                None]
    assert wrong_tokens(texts_of(words, [5, 3, 4]), [True]) == [None, True, True]
    assert wrong_tokens(texts, [True]) == [True, None, None, None, None, None]  # no more words
    letters = Pieces("\u2581a", "<0x0A>", "b", "<0xC3>", "<0xA9>")  # a, line break, b, é
    texts = texts_of(letters, [1, 2, 3, 4, 5])
    assert b"".join(texts) == " a\nbé".encode()
    assert wrong_tokens(texts, [False, True]) == [False, None, True, True, True]


def test_the_text_of_an_added_token():
    words = Pieces("\u2581a")
    words.text_of = {7: "<new>"}
    assert token_text(words, 7) == b"<new>"


def test_scores_by_hand():
    masks = [{"wrong": [True, False, None],
              "flagged": {1.1: [True, True, True], 2.0: [False, False, False]}},
             {"wrong": None, "flagged": {1.1: [True], 2.0: [True]}},
             {"wrong": [True, True], "flagged": {1.1: [True, False], 2.0: [True, False]}}]
    assert score_masks(masks) == [{"lam": 1.1, "precision": 2 / 3, "recall": 2 / 3, "n": 4},
                                  {"lam": 2.0, "precision": 1.0, "recall": 1 / 3, "n": 4}]
    assert score_masks([]) == []
    assert score_masks(masks[1:2])[0] == {"lam": 1.1, "precision": None, "recall": None, "n": 0}


@pytest.mark.parametrize("satisfied", [None, "fine"])
def test_masks_are_eq_5_of_two_plain_forward_passes(world, tokenizer, satisfied):
    cfg = SimpleNamespace(model=str(world / "model"), device="cpu", dtype="float32", plain=True,
                          quantize="none", max_len=512)
    model, template = open_model(cfg), TEMPLATES["plain"]
    for weight in model.parameters():
        weight.data.mul_(4)
    run = Run(cfg, None, model, tokenizer, template, [], None, None)
    records = [{"instruction": "give the {input}", "input": f"hat {k}", "judgment": "wrong : 1 .",
                "response": "colour 1 place", "target": "colour 2 place"} for k in range(3)]
    masks = find_masks(run, records, [0.9, 1.0, 1.05], satisfied=satisfied)
    for record, mask in zip(records, masks, strict=True):
        values = []
        ids = template.encode_response(tokenizer, record["response"])
        for judgment in (record["judgment"], satisfied):
            text = template.render(record["instruction"], record["input"], judgment, literal=True)
            prompt = tokenizer.encode_prompt(text)
            with torch.no_grad():
                table = model(torch.tensor([prompt + ids]))[0].log_softmax(-1)
            values.append([table[len(prompt) + t - 1, token].item() for t, token in enumerate(ids)])
        assert mask["judged"].tolist() == pytest.approx(values[0], rel=1e-4)
        assert mask["plain"].tolist() == pytest.approx(values[1], rel=1e-4)
        for lam, flags in mask["flagged"].items():
            ratios = (mask["judged"] - mask["plain"]).exp()
            assert flags == (ratios > lam).tolist()
        wrong = [text for text, wrong in zip(mask["texts"], mask["wrong"], strict=True) if wrong]
        assert b"".join(wrong).strip() == b"1" and mask["wrong"][-1] is None
