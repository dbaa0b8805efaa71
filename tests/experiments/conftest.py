"""What the studies' tests share: a small encoder and a tokenizer of words that are numbers."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest

from modicum.experiments.delta_methods import Backbone
from modicum.models import Transformer, TransformerConfig
from modicum.models.attention import GroupedQuery
from modicum.models.norms import LayerNorm
from modicum.models.positions import Learned


@dataclass(frozen=True)
class Words:
    """A tokenizer: word 7 of a text is token 7."""

    pad: int = 0

    def encode_all(self, texts, limit, special):
        return [[1, *map(int, text.split())][:limit] for text in texts]

    def encode_pair(self, first, second, limit):
        one, two = ([1, *map(int, text.split())] for text in (first, second))
        return (one + two)[:limit], ([0] * len(one) + [1] * len(two))[:limit]


@pytest.fixture(scope="session")
def tiny_backbone():
    """`(vocab, token_types=0) -> Backbone`: two layers of width 8 and 32 neurons, with `Words`."""

    @functools.cache
    def make(vocab, token_types=0):
        config = TransformerConfig(
            kind="encoder",
            layers=2,
            width=8,
            vocab=vocab,
            attention=GroupedQuery(2),
            positions=Learned(64),
            norm=LayerNorm(),
            token_types=token_types,
            initial_std=0.3,
        )
        model = Transformer(config, None)
        return Backbone(model, model.init(jax.random.key(0), jnp.zeros((1, 4), int)), Words())

    return make
