"""`Transformer`: three assemblies of one block, as a pair of pure functions.

config = presets.preset("gpt2")
model = Transformer(config)
params = model.init(jax.random.key(0), tokens)       # tokens [B, T], integers
logits = model.apply(params, tokens)                 # [B, T, V]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from .. import InputError
from .axes import TRANSFORMER_AXES, AxisTable
from .block import Context, apply_layers
from .cache import COLLECTION, Cache, Slots
from .config import TransformerConfig
from .heads import Head, LanguageModelHead
from .hooks import Hook
from .kernels import Causal, Full, Mask, Segments
from .model import LinenModel, Params


@dataclass(frozen=True)
class Transformer(LinenModel):
    """The Transformer that `config` describes, ending in `head` (None: hidden states `[B, T, D]`).

    `apply(params, tokens)` takes integers `[B, T]` and, by keyword,
    * `segments` (0 is padding, 1, 2, ... are packed documents; tokens attend within their own);
    * `positions` and `token_types`; `mask`, who sees whom instead of the configuration's rule;
    * `last=True`: only the last column goes to the head, `[B, 1, V]`;
    * `cache`: returns `(outputs, cache)`, see `models.cache`;
    * `extra`: what its head takes beside the hidden states (`ExtraWords` of an `ExtendedHead`).
    An encoder-decoder takes `decoder_tokens` `[B, U]`, `decoder_segments` and `decoder_positions` too, and
    returns logits for these; with a cache that holds the encoder's output, `tokens` are None.
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

    def apply(
        self,
        params: Params,
        *args: Any,
        cache: Cache | None = None,
        mutable: Sequence[str] | Literal[False] = (),
        **kwargs: Any,
    ) -> Any:
        """Outputs, or `(outputs, cache)`; with the collections named by `mutable` as in `LinenModel`."""
        if cache is None:
            return super().apply(params, *args, mutable=mutable or False, **kwargs)
        kept = {COLLECTION: cache.entries}
        (outputs, cache), state = super().apply(
            params, *args, cache=cache, kept=kept, mutable=[*(mutable or ()), COLLECTION], **kwargs
        )
        outputs = outputs, replace(cache, entries=state.pop(COLLECTION))
        return (outputs, state) if mutable else outputs


class Embedding(nn.Module):
    """Word vectors plus what positions and token types add; also hands out the table for a tied head."""

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
        shape, dtype = (config.token_types, config.width), jnp.dtype(config.precision.param)
        table = self.param("table", nn.initializers.normal(config.initial_std), shape, dtype)
        return jnp.take(table.astype(config.precision.compute), token_types, axis=0)


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
        positions: Any = None,
        token_types: jax.Array | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        last: bool = False,
        extra: Any = None,
        train: bool = False,
    ) -> Any:
        config, embedding = self.config, Embedding(self.config, name="embedding")
        place = Place.of(config.kind != "encoder", tokens, segments, positions, mask, cache)
        x = embed(config, embedding, tokens, place.positions, token_types, train)
        context = place.context(config, train)
        hidden = finish(config, apply_layers(config, x, context))
        if last:
            hidden, segments = hidden[:, -1:], None
        more = {} if extra is None else {"extra": extra}
        if self.head is not None:
            hidden = self.head.build(config)(hidden, segments, embedding.table, **more)
        return hidden if cache is None else (hidden, place.cache)


class EncoderDecoder(nn.Module):
    """An encoder over `tokens` and a decoder over `decoder_tokens` that attends to its output."""

    config: TransformerConfig
    head: Head | None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array | None,
        *,
        decoder_tokens: jax.Array | None = None,
        segments: jax.Array | None = None,
        decoder_segments: jax.Array | None = None,
        positions: Any = None,
        decoder_positions: Any = None,
        cache: Cache | None = None,
        last: bool = False,
        train: bool = False,
    ) -> Any:
        if decoder_tokens is None:
            raise InputError("an encoder-decoder needs decoder_tokens [B, U] beside tokens [B, T]")
        config, embedding = self.config, Embedding(self.config, name="embedding")
        memory, source = None, None if cache is None else cache.memory_segments
        if tokens is not None:
            source = jnp.ones_like(tokens) if segments is None else segments
            memory = Encoder(config, name="encoder")(embedding, tokens, source, positions, train)
        if source is None:
            raise InputError(
                "an encoder-decoder needs tokens [B, T] until a cache holds its encoder's output"
            )
        target = jnp.ones_like(decoder_tokens) if decoder_segments is None else decoder_segments
        place = Place.of(True, decoder_tokens, target, decoder_positions, None, cache)
        hidden = Decoder(config, name="decoder")(embedding, decoder_tokens, place, memory, source, train)
        if last:
            hidden, target = hidden[:, -1:], target[:, -1:]
        outputs = hidden if self.head is None else self.head.build(config)(hidden, target, embedding.table)
        return outputs if place.cache is None else (outputs, replace(place.cache, memory_segments=source))


class Encoder(nn.Module):
    """The bidirectional stack of an encoder-decoder."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, embedding: Embedding, tokens: jax.Array, segments: jax.Array, positions: Any, train: bool
    ) -> jax.Array:
        place = Place.of(False, tokens, segments, positions)
        x = embed(self.config, embedding, tokens, place.positions, None, train)
        return finish(self.config, apply_layers(self.config, x, place.context(self.config, train)))


class Decoder(nn.Module):
    """The causal stack of an encoder-decoder, reading the encoder's `memory` `[B, T, D]`."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        embedding: Embedding,
        tokens: jax.Array,
        place: Place,
        memory: jax.Array | None,
        memory_segments: jax.Array,
        train: bool,
    ) -> jax.Array:
        x = embed(self.config, embedding, tokens, place.positions, None, train)
        assert place.segments is not None
        mask = Segments(place.segments, memory_segments)
        context = replace(place.context(self.config, train), memory=memory, memory_mask=mask)
        return finish(self.config, apply_layers(self.config, x, context, cross=True))


@struct.dataclass
class Place:
    """Where the tokens of one call stand: their positions, who sees whom, and the cache that they extend.

    `keys` are the positions of all that they look at and `start` is the index of the first of them there.
    """

    positions: Any
    keys: Any
    mask: Mask
    segments: jax.Array | None
    causal: bool = struct.field(pytree_node=False)
    cache: Cache | None = None
    slots: Slots | None = None

    @classmethod
    def of(
        cls,
        causal: bool,
        tokens: jax.Array,
        segments: jax.Array | None,
        positions: Any,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> Place:
        """That of `tokens [B, T]`; without positions they count from 0, or on from what the cache holds."""
        if cache is not None:
            return cls._in_cache(causal, tokens, segments, positions, mask, cache)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        mask = mask if mask is not None else Causal() if causal else Full()
        mask = mask if segments is None else mask & Segments(segments, segments)
        return cls(positions, positions, mask, segments, causal)

    @classmethod
    def _in_cache(
        cls,
        causal: bool,
        tokens: jax.Array,
        segments: jax.Array | None,
        positions: Any,
        mask: Mask | None,
        cache: Cache,
    ) -> Place:
        if not causal:
            raise InputError("an encoder sees its whole input at once and has no use for a cache")
        segments = jnp.ones_like(tokens) if segments is None else segments
        positions = cache.next_positions(segments) if positions is None else positions
        start, slots = cache.length, Slots(cache.length, cache.capacity, cache.joined)
        grown = cache.extended(segments, positions)
        seen = (segments, positions) if cache.fresh else (grown.segments, grown.positions)
        mask = mask if mask is not None else Causal(start)
        return cls(positions, seen[1], mask & Segments(segments, seen[0]), segments, causal, grown, slots)

    def context(self, config: TransformerConfig, train: bool) -> Context:
        """What the layers see; called inside the compact method of the stack, which gets the bias's child."""
        bias = config.positions.bias(
            config.attention.heads, not self.causal, config.precision, config.initial_std
        )
        start = 0 if self.slots is None else self.slots.start
        value = None if bias is None else bias(self.positions, self.keys, start)
        return Context(self.mask, self.positions, value, slots=self.slots, train=train)


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


def finish(config: TransformerConfig, x: jax.Array) -> jax.Array:
    """The stack's output, normalised once more where its residual connections ask for it."""
    return config.norm.build(config.precision, "final_norm")(x) if config.residual.final_norm else x
