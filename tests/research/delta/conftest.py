"""A small Transformer, as any assembly."""

import jax
import pytest

from modicum.models.attention import GroupedQuery
from modicum.models.transformer import Transformer, TransformerConfig


@pytest.fixture
def tokens():
    return jax.random.randint(jax.random.key(5), (2, 6), 0, 50)


@pytest.fixture
def decoder():
    """Makes a decoder of four layers, 16 wide."""

    def make(**options):
        head = {"head": options.pop("head")} if "head" in options else {}
        config = TransformerConfig(
            **{"layers": 4, "width": 16, "vocab": 50, "attention": GroupedQuery(4, 2), **options}
        )
        return Transformer(config=config, **head)

    return make
