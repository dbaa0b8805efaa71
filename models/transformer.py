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

from .. import InputError
from .axes import TRANSFORMER_AXES, AxisTable
from .cache import COLLECTION, Cache
from .config import TransformerConfig
from .embedding import Embedding, embed
from .heads import ClassifierHead, Head, LanguageModelHead
from .kernels import Mask, Segments
from .model import LinenModel, Params
from .place import Place
from .stack import apply_layers


@dataclass(frozen=True)
class Transformer(LinenModel):
    """The Transformer that `config` describes, ending in `head` (None: hidden states `[B, T, D]`).

    `apply(params, tokens)` takes integers `[B, T]` and, by keyword,
    * `segments` (0 is padding, 1, 2, ... are packed documents; tokens attend within their own);
    * `positions` (0, 1, ... unless given: padding on the left counts too) and `token_types`;
    * `mask`, who sees whom instead of the configuration's rule;
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
        read = self.head.read(x.shape, segments) if isinstance(self.head, ClassifierHead) else None
        hidden = finish(config, apply_layers(config, x, context, read=read))
        if last or read is not None:
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


def finish(config: TransformerConfig, x: jax.Array) -> jax.Array:
    """The stack's output, normalised once more where its residual connections ask for it."""
    return config.norm.build(config.precision, "final_norm")(x) if config.residual.final_norm else x
