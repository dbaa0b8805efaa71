"""Tiny random models whose next tokens are clearly decided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.models import (
    MLP,
    ALiBi,
    GatedMLP,
    GroupedQuery,
    Learned,
    RelativeBuckets,
    RMSNorm,
    Rotary,
    Transformer,
    TransformerConfig,
)

VOCAB = 97
SHAPE = {"layers": 2, "width": 32, "vocab": VOCAB, "mlp": MLP(64), "tied": False}

CONFIGS = {
    "learned": TransformerConfig(**SHAPE, attention=GroupedQuery(4), positions=Learned(96)),
    "rotary": TransformerConfig(
        **{**SHAPE, "mlp": GatedMLP(48, "silu")},
        attention=GroupedQuery(4, 2, bias=False),
        positions=Rotary(),
        norm=RMSNorm(),
        vocab_multiple=16,
    ),
    "buckets": TransformerConfig(**SHAPE, attention=GroupedQuery(4), positions=RelativeBuckets(8, 20)),
    "alibi": TransformerConfig(**SHAPE, attention=GroupedQuery(4), positions=ALiBi()),
    "window": TransformerConfig(**SHAPE, attention=GroupedQuery(4, 1, window=7), positions=Rotary()),
    "encoder-decoder": TransformerConfig(
        **SHAPE, kind="encoder-decoder", attention=GroupedQuery(4), positions=RelativeBuckets(8, 20)
    ),
}


def build(config, seed=1):
    """A model and random parameters, large enough that its choices vary with the text."""
    model, rng = Transformer(config), np.random.default_rng(seed)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    more = {"decoder_tokens": tokens} if config.kind == "encoder-decoder" else {}
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, **more)

    def fill(path, leaf):
        scale = str(path[-1].key) == "scale"
        spread = 0.25 if len(leaf.shape) > 1 else 0.05
        return jnp.asarray(rng.normal(1.0 if scale else 0.0, spread, leaf.shape), leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(fill, shapes)


def ragged(*lengths, seed=0):
    """Rows of random ids of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, length).tolist() for length in lengths]


@pytest.fixture(scope="session")
def small():
    """The rotary model with grouped queries."""
    return build(CONFIGS["rotary"])
