"""What a model returns from its last hidden states: logits over words, or over labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import InputError
from .config import TransformerConfig
from .losses import MASKED_LOGIT
from .precision import promote_statistics
from .products import dense_product

POOLINGS = ("last", "first", "mean")


@dataclass(frozen=True)
class LanguageModelHead:
    """Logits `[B, T, V]` over the vocabulary, from the embedding table where the model is tied."""

    def build(self, config: TransformerConfig) -> nn.Module:
        """The module; untied, it has `head/kernel` `[D, V]`."""
        return LanguageModelHeadModule(config, name="head")


@dataclass(frozen=True)
class ClassifierHead:
    """Logits `[B, labels]` from one vector per sequence: its last or first real token, or their mean."""

    labels: int
    pooling: Literal["last", "first", "mean"] = "last"

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"pooling={self.pooling!r} is not one of {', '.join(POOLINGS)}")
        if self.labels < 2:
            raise InputError(f"a classifier needs at least 2 labels, not {self.labels}")

    def build(self, config: TransformerConfig) -> nn.Module:
        """The module; it has `classifier/kernel` `[D, labels]` and a bias."""
        return ClassifierModule(config, self, name="classifier")


Head = LanguageModelHead | ClassifierHead


class LanguageModelHeadModule(nn.Module):
    """Scores every word; padded rows of the vocabulary get a logit that no softmax notices."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, hidden: jax.Array, segments: jax.Array | None, table: jax.Array) -> jax.Array:
        config = self.config
        if config.tied:
            logits = self._product(hidden, table, 1)
        else:
            dtype, shape = jnp.dtype(config.precision.param), (config.width, config.padded_vocab)
            kernel = self.param("kernel", nn.initializers.normal(config.initial_std), shape, dtype)
            logits = self._product(hidden, kernel, 0)
        logits = logits * config.logit_scale if config.logit_scale != 1.0 else logits
        if config.padded_vocab == config.vocab:
            return logits
        return jnp.where(jnp.arange(config.padded_vocab) < config.vocab, logits, MASKED_LOGIT)

    def _product(self, hidden: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
        """Sums over `axis` of the weights, in the output's precision; factors in the arithmetic's."""
        dimensions = ((hidden.ndim - 1,), (axis,)), ((), ())
        output = jnp.dtype(self.config.precision.output)
        weights = weights.astype(hidden.dtype)
        return dense_product(hidden, weights, dimensions, preferred_element_type=output)


class ClassifierModule(nn.Module):
    """A linear classifier on the pooled hidden state."""

    config: TransformerConfig
    choice: ClassifierHead

    @nn.compact
    def __call__(self, hidden: jax.Array, segments: jax.Array | None, table: jax.Array) -> jax.Array:
        pooled = pool(hidden, segments, self.choice.pooling)
        dtype, shape = jnp.dtype(self.config.precision.param), (hidden.shape[-1], self.choice.labels)
        kernel = self.param("kernel", nn.initializers.normal(self.config.initial_std), shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[1:], dtype)
        logits = pooled @ kernel.astype(pooled.dtype) + bias.astype(pooled.dtype)
        return logits.astype(self.config.precision.output)


def pool(hidden: jax.Array, segments: jax.Array | None, pooling: str) -> jax.Array:
    """One vector `[B, D]` per row of `hidden [B, T, D]`; `segments [B, T]` is 0 at padding."""
    real = jnp.ones(hidden.shape[:2], bool) if segments is None else segments > 0
    if pooling == "mean":
        wide = promote_statistics(hidden)
        weights = real.astype(wide.dtype)
        total, count = jnp.einsum("btd,bt->bd", wide, weights), jnp.maximum(weights.sum(-1), 1)
        return (total / count[:, None]).astype(hidden.dtype)
    steps = jnp.arange(hidden.shape[1])
    index = jnp.where(real, steps, -1).max(-1) if pooling == "last" else jnp.argmax(real, -1)
    return jnp.take_along_axis(hidden, jnp.maximum(index, 0)[:, None, None], axis=1)[:, 0]
