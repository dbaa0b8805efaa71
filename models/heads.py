"""What a model returns from its last hidden states: logits over words, or over labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import InputError
from .config import TransformerConfig
from .mlp import activate, activation_function
from .precision import promote_statistics
from .tables import take_token
from .word_scores import WordScores

POOLINGS = ("last", "first", "mean")


@dataclass(frozen=True)
class LanguageModelHead:
    """Logits `[B, T, V]` over the vocabulary, from the embedding table where the model is tied."""

    def build(self, config: TransformerConfig, deferred: bool = False) -> nn.Module:
        """The module; untied, it has `head/kernel` `[D, V]`; `deferred`, it returns `WordScores`."""
        return LanguageModelHeadModule(config, deferred, name="head")


@dataclass(frozen=True)
class MaskedLanguageModelHead:
    """Logits `[B, T, V]` after one more layer, with a bias for each word (Devlin et al., BERT, 2019)."""

    activation: str = "gelu"

    def __post_init__(self) -> None:
        activation_function(self.activation)

    def build(self, config: TransformerConfig, deferred: bool = False) -> nn.Module:
        """The module `head`, with children `transform` and `norm`, a `bias` `[V]` and, untied, `kernel`.

        `deferred`, it returns `WordScores`.
        """
        return MaskedLanguageModelHeadModule(config, self, deferred, name="head")


@dataclass(frozen=True)
class Pooler:
    """One vector `[B, D]` per row: a dense layer with an activation on its first real token (BERT)."""

    activation: str = "tanh"

    def __post_init__(self) -> None:
        activation_function(self.activation)

    def build(self, config: TransformerConfig) -> nn.Module:
        """The module; it has `pooler/kernel` `[D, D]` and a bias."""
        return PoolerModule(config, self.activation, "first", name="pooler")


@dataclass(frozen=True)
class ClassifierHead:
    """Logits `[B, labels]` from one vector per sequence: its last or first real token, or their mean.

    `pooler` names an activation: the vector first passes a dense layer and this (BERT's and RoBERTa's tanh).
    `narrow`: the last layer's mlp, its hook `residual` and the final norm get the pooled token alone,
    `[B, 1, D]`. The logits are the same, as these look at each token by itself; for unrolled encoders and
    decoders.
    """

    labels: int
    pooling: Literal["last", "first", "mean"] = "last"
    pooler: str = ""
    narrow: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"pooling={self.pooling!r} is not one of {', '.join(POOLINGS)}")
        if self.labels < 1:
            raise InputError(f"a classifier needs at least 1 label, not {self.labels}")
        if self.pooler:
            activation_function(self.pooler)
        if self.narrow and self.pooling == "mean":
            raise InputError(
                "a classifier with pooling='mean' reads every token; narrow=True is for the others"
            )

    def read(self, shape: tuple[int, ...], segments: jax.Array | None) -> jax.Array | None:
        """Which token is all that is read of each row, int32 `[B]` for `shape [B, T, ...]`; None: any."""
        return pooled_token(shape, segments, self.pooling) if self.narrow else None

    def build(self, config: TransformerConfig) -> nn.Module:
        """The module; it has `classifier/kernel` `[D, labels]`, a bias and, if chosen, a child `pooler`.

        Raises `InputError` for `narrow` where the last layer cannot be told from the others.
        """
        if self.narrow and not last_layer_apart(config):
            kind = "scanned layers" if config.scan else "an encoder-decoder"
            raise InputError(
                f"a classifier with narrow=True is for unrolled encoders and decoders, not {kind}"
            )
        return ClassifierModule(config, self, name="classifier")


@dataclass(frozen=True)
class DeferredHead:
    """`head` with its logits left as factors, `WordScores`: for a loss that never holds all of them.

    Its parameters are those of `head`.
    """

    head: LanguageModelHead | MaskedLanguageModelHead

    def __post_init__(self) -> None:
        if not isinstance(self.head, LanguageModelHead | MaskedLanguageModelHead):
            raise InputError(f"{type(self.head).__name__} scores no words; only such a head can be deferred")

    def build(self, config: TransformerConfig) -> nn.Module:
        """The module of `head`, returning `WordScores`."""
        return self.head.build(config, deferred=True)


Head = LanguageModelHead | MaskedLanguageModelHead | DeferredHead | Pooler | ClassifierHead


class LanguageModelHeadModule(nn.Module):
    """Scores every word; rows of the table that are no words get a logit that no softmax notices."""

    config: TransformerConfig
    deferred: bool = False

    @nn.compact
    def __call__(
        self, hidden: jax.Array, segments: jax.Array | None, table: jax.Array
    ) -> jax.Array | WordScores:
        config = self.config
        if config.embedding_width:
            hidden = config.linear(config.embedding_width, False, name="projection")(hidden)
        scores = replace(word_scores(self, config, hidden, table), scale=config.logit_scale)
        return scores if self.deferred else scores.logits()


class MaskedLanguageModelHeadModule(nn.Module):
    """BERT's head: dense layer, activation, norm, then the scores with a bias."""

    config: TransformerConfig
    choice: MaskedLanguageModelHead
    deferred: bool = False

    @nn.compact
    def __call__(
        self, hidden: jax.Array, segments: jax.Array | None, table: jax.Array
    ) -> jax.Array | WordScores:
        config = self.config
        hidden = activate(self.choice.activation, config.linear(config.width, True, name="transform")(hidden))
        hidden = config.norm.build(config.precision, "norm")(hidden)
        dtype = jnp.dtype(config.precision.param)
        bias = self.param("bias", nn.initializers.zeros, (config.padded_vocab,), dtype)
        scores = replace(word_scores(self, config, hidden, table), bias=bias)
        return scores if self.deferred else scores.logits()


def word_scores(
    head: nn.Module, config: TransformerConfig, hidden: jax.Array, table: jax.Array
) -> WordScores:
    """Scores by the embedding table, or untied by the head's parameter `kernel` `[D, V]`.

    Their logits are in the output's precision; the factors are in the arithmetic's.
    """
    weights = table
    if not config.tied:
        dtype, shape = jnp.dtype(config.precision.param), (hidden.shape[-1], config.padded_vocab)
        weights = head.param("kernel", nn.initializers.normal(config.initial_std), shape, dtype)
    return WordScores(
        hidden, weights, across=not config.tied, vocab=config.vocab, output=config.precision.output
    )


class PoolerModule(nn.Module):
    """One vector per row, through a dense layer and an activation."""

    config: TransformerConfig
    activation: str
    pooling: str

    @nn.compact
    def __call__(
        self, hidden: jax.Array, segments: jax.Array | None, table: jax.Array | None = None
    ) -> jax.Array:
        pooled = pool(hidden, segments, self.pooling)
        return activation_function(self.activation)(affine(self, self.config, pooled, self.config.width))


class ClassifierModule(nn.Module):
    """A linear classifier on the pooled hidden state."""

    config: TransformerConfig
    choice: ClassifierHead

    @nn.compact
    def __call__(self, hidden: jax.Array, segments: jax.Array | None, table: jax.Array) -> jax.Array:
        if self.choice.pooler:
            first = PoolerModule(self.config, self.choice.pooler, self.choice.pooling, name="pooler")
            pooled = first(hidden, segments)
        else:
            pooled = pool(hidden, segments, self.choice.pooling)
        logits = affine(self, self.config, pooled, self.choice.labels)
        return logits.astype(self.config.precision.output)


def last_layer_apart(config: TransformerConfig) -> bool:
    """Whether the layer that a head reads from is a module of its own, so that it may compute less."""
    return not config.scan and config.kind != "encoder-decoder"


def affine(head: nn.Module, config: TransformerConfig, x: jax.Array, features: int) -> jax.Array:
    """`x [B, D]` times the head's parameter `kernel` `[D, features]`, plus its `bias`, in the type of `x`."""
    shape, dtype = (x.shape[-1], features), jnp.dtype(config.precision.param)
    kernel = head.param("kernel", nn.initializers.normal(config.initial_std), shape, dtype)
    bias = head.param("bias", nn.initializers.zeros, shape[1:], dtype)
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def pool(hidden: jax.Array, segments: jax.Array | None, pooling: str) -> jax.Array:
    """One vector `[B, D]` per row of `hidden [B, T, D]`; `segments [B, T]` is 0 at padding."""
    if pooling == "mean":
        real = _real(hidden.shape, segments)
        wide = promote_statistics(hidden)
        weights = real.astype(wide.dtype)
        total, count = jnp.einsum("btd,bt->bd", wide, weights), jnp.maximum(weights.sum(-1), 1)
        return (total / count[:, None]).astype(hidden.dtype)
    return take_token(hidden, pooled_token(hidden.shape, segments, pooling))[:, 0]


def pooled_token(shape: tuple[int, ...], segments: jax.Array | None, pooling: str) -> jax.Array:
    """The last or first real token of each row of a batch of `shape [B, T, ...]`, int32 `[B]`."""
    real = _real(shape, segments)
    index = jnp.where(real, jnp.arange(shape[1]), -1).max(-1) if pooling == "last" else jnp.argmax(real, -1)
    return jnp.maximum(index, 0)


def _real(shape: tuple[int, ...], segments: jax.Array | None) -> jax.Array:
    return jnp.ones(shape[:2], bool) if segments is None else segments > 0
