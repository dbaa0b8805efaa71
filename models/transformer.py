"""`Transformer`: three assemblies of one block, as a pair of pure functions.

config = presets.preset("gpt2")
model = Transformer(config)
params = model.init(jax.random.key(0), tokens)       # tokens [B, T], integers
logits = model.apply(params, tokens)                 # [B, T, V]
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import InputError
from .axes import TRANSFORMER_AXES, AxisTable
from .block import Context, apply_layers
from .config import TransformerConfig
from .heads import Head, LanguageModelHead
from .hooks import Hook
from .kernels import Causal, Full, Mask, Segments
from .model import LinenModel


@dataclass(frozen=True)
class Transformer(LinenModel):
    """The Transformer that `config` describes, ending in `head` (None: hidden states `[B, T, D]`).

    `apply(params, tokens)` takes integers `[B, T]` and, by keyword, `segments` (0 is padding, 1, 2, ...
    are packed documents; tokens attend within their own) and `positions`. An encoder-decoder takes
    `decoder_tokens` `[B, U]`, `decoder_segments` and `decoder_positions` too, and returns logits for these.
    """

    module: nn.Module = field(init=False, repr=False, compare=False)
    config: TransformerConfig = TransformerConfig()
    head: Head | None = LanguageModelHead()

    def __post_init__(self) -> None:
        assembly = EncoderDecoder if self.config.kind == "encoder-decoder" else SingleStack
        object.__setattr__(self, "module", assembly(self.config, self.head))

    @property
    def axes(self) -> AxisTable:
        """Path patterns of parameters and the logical names of their axes."""
        return TRANSFORMER_AXES


class Embedding(nn.Module):
    """Word vectors plus what the positions add; also hands out the table for a tied head."""

    config: TransformerConfig

    def setup(self) -> None:
        config = self.config
        shape, dtype = (config.padded_vocab, config.width), jnp.dtype(config.precision.param)
        self.table = self.param("table", nn.initializers.normal(config.initial_std), shape, dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        scale = self.config.embedding_scale or np.sqrt(self.config.width)
        words = jnp.take(self.table, tokens, axis=0).astype(self.config.precision.compute)
        return words if scale == 1.0 else words * jnp.asarray(scale, words.dtype)


class SingleStack(nn.Module):
    """A decoder (causal) or an encoder (bidirectional) with its head."""

    config: TransformerConfig
    head: Head | None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        config, embedding = self.config, Embedding(self.config, name="embedding")
        mask: Mask = Causal() if config.kind == "decoder" else Full()
        if segments is not None:
            mask = mask & Segments(segments, segments)
        x, context = embed(
            config, embedding, tokens, mask, positions, train, bidirectional=config.kind == "encoder"
        )
        hidden = finish(config, apply_layers(config, x, context))
        return hidden if self.head is None else self.head.build(config)(hidden, segments, embedding.table)


class EncoderDecoder(nn.Module):
    """An encoder over `tokens` and a decoder over `decoder_tokens` that attends to its output."""

    config: TransformerConfig
    head: Head | None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        decoder_tokens: jax.Array | None = None,
        segments: jax.Array | None = None,
        decoder_segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        decoder_positions: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        if decoder_tokens is None:
            raise InputError("an encoder-decoder needs decoder_tokens [B, U] beside tokens [B, T]")
        config, embedding = self.config, Embedding(self.config, name="embedding")
        source = jnp.ones_like(tokens) if segments is None else segments
        target = jnp.ones_like(decoder_tokens) if decoder_segments is None else decoder_segments
        memory = Encoder(config, name="encoder")(embedding, tokens, source, positions, train)
        hidden = Decoder(config, name="decoder")(
            embedding, decoder_tokens, target, decoder_positions, memory, source, train
        )
        return hidden if self.head is None else self.head.build(config)(hidden, target, embedding.table)


class Encoder(nn.Module):
    """The bidirectional stack of an encoder-decoder."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        embedding: Embedding,
        tokens: jax.Array,
        segments: jax.Array,
        positions: jax.Array | None,
        train: bool,
    ) -> jax.Array:
        mask = Segments(segments, segments)
        x, context = embed(self.config, embedding, tokens, mask, positions, train, bidirectional=True)
        return finish(self.config, apply_layers(self.config, x, context))


class Decoder(nn.Module):
    """The causal stack of an encoder-decoder, reading the encoder's `memory` `[B, T, D]`."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        embedding: Embedding,
        tokens: jax.Array,
        segments: jax.Array,
        positions: jax.Array | None,
        memory: jax.Array,
        memory_segments: jax.Array,
        train: bool,
    ) -> jax.Array:
        mask = Causal() & Segments(segments, segments)
        x, context = embed(self.config, embedding, tokens, mask, positions, train, bidirectional=False)
        context = replace(context, memory=memory, memory_mask=Segments(segments, memory_segments))
        return finish(self.config, apply_layers(self.config, x, context, cross=True))


def embed(
    config: TransformerConfig,
    embedding: Embedding,
    tokens: jax.Array,
    mask: Mask,
    positions: jax.Array | None,
    train: bool,
    *,
    bidirectional: bool,
) -> tuple[jax.Array, Context]:
    """The residual stream `[B, T, D]` before the first layer, and what the layers see beside it."""
    config.precision.require_available()
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
    x = embedding(tokens)
    added = config.positions.embedding(config.width, config.precision, config.initial_std)
    if added is not None:
        x = x + added(positions)
    if config.embedding_norm:
        x = config.norm.build(config.precision, "embedding_norm")(x)
    x = Hook(name="embedded")(nn.Dropout(config.dropout, deterministic=not train)(x))
    bias = config.positions.bias(config.attention.heads, bidirectional, config.precision, config.initial_std)
    return x, Context(mask, positions, bias=None if bias is None else bias(), train=train)


def finish(config: TransformerConfig, x: jax.Array) -> jax.Array:
    """The stack's output, normalised once more where its residual connections ask for it."""
    return config.norm.build(config.precision, "final_norm")(x) if config.residual.final_norm else x
