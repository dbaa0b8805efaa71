"""From tokens to the residual stream: word vectors, and what positions and token types add to them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import InputError
from .config import TransformerConfig
from .hooks import Hook
from .tables import look_up


class Embedding(nn.Module):
    """Word vectors `[B, T, D]` of tokens `[B, T]`; also hands out the table, for a tied head."""

    config: TransformerConfig

    def setup(self) -> None:
        config = self.config
        shape = config.padded_vocab, config.embedding_width or config.width
        dtype = jnp.dtype(config.precision.param)
        self.table = self.param("table", nn.initializers.normal(config.initial_std), shape, dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        scale = self.config.embedding_scale or np.sqrt(self.config.width)
        words = jnp.take(self.table, tokens, axis=0).astype(self.config.precision.compute)
        return words if scale == 1.0 else words * jnp.asarray(scale, words.dtype)


class TypeEmbedding(nn.Module):
    """A vector for each kind of token, `token_types [B, T] -> [B, T, D]`."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, token_types: jax.Array) -> jax.Array:
        config = self.config
        shape = config.token_types, config.width
        return look_up(self, shape, config.precision, config.initial_std, token_types)


def embed(
    config: TransformerConfig,
    embedding: Embedding,
    tokens: jax.Array,
    positions: Any,
    token_types: jax.Array | None,
    train: bool,
) -> jax.Array:
    """The residual stream `[B, T, D]` before the first layer."""
    config.precision.require_available()
    x = config.positions.place(embedding(tokens), positions)
    if config.embedding_width:
        x = config.linear(config.width, False, name="embedding_projection")(x)
    added = config.positions.embedding(config.width, config.precision, config.initial_std)
    if added is not None:
        x = x + added(positions)
    if config.token_types:
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = x + TypeEmbedding(config, name="type_embedding")(types)
    elif token_types is not None:
        raise InputError("token_types are given, but the model has none (token_types=0)")
    if config.embedding_norm:
        x = config.norm.build(config.precision, "embedding_norm")(x)
    return Hook(name="embedded")(nn.Dropout(config.dropout, deterministic=not train)(x))
