"""Tiny random models for the fast code, and a tokenizer of characters."""

import random

import pytest
import torch

from extras.fast import accelerate
from model import Llama, ModelConfig

TINY = {"vocab_size": 300, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8,
        "hidden_dim": 64, "norm_eps": 1e-5, "context": 512, "eos_ids": []}


class Characters:
    """A tokenizer whose tokens are characters; a space before a letter belongs to it."""

    bos_id = 1

    def encode_prompt(self, text):
        return [1, *self.encode_continuation(text)]

    def encode_continuation(self, text):
        ids, space = [], False
        for character in text.rstrip("\n"):
            if space:
                ids.append(150 + ord(character) % 100)
            elif character != " ":
                ids.append(3 + ord(character) % 130)
            space = character == " "
        return ids + [2] * space


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny."""
    torch.set_num_threads(1)


@pytest.fixture
def make_model():
    """A function that makes a plain model whose attention is not uniform: make_model(**config)."""
    def make(seed=0, **changes):
        model = Llama(ModelConfig(**TINY | changes)).eval()
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            spread = 0.12 if weight.dim() == 2 else 0.2
            weight.data.normal_(float(weight.dim() == 1), spread, generator=generator)
        return model
    return make


@pytest.fixture
def plain(make_model):
    """A plain model."""
    return make_model()


@pytest.fixture
def fast(make_model):
    """The same weights, accelerated."""
    return accelerate(make_model())


@pytest.fixture
def characters():
    """The tokenizer of characters."""
    return Characters()


@pytest.fixture
def random_groups():
    """A function that makes [(shared tokens or 0, [documents])]."""
    def make(seed=None, longest=9):
        dice, groups = random.Random(seed), []
        for _ in range(dice.randint(1, 6)):
            size = dice.choice([0, dice.randint(1, longest)])
            shared = [dice.randrange(300) for _ in range(size)]
            documents = []
            for _ in range(dice.randint(1, 4)):
                rest = [dice.randrange(300) for _ in range(dice.randint(1, longest))]
                documents.append(shared + rest)
            groups.append((len(shared), documents))
        return groups
    return make
