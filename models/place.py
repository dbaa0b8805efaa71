"""Where the tokens of one call stand: who sees whom, with a cache or without."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from .. import InputError
from .block import Context
from .cache import Cache, Store
from .config import TransformerConfig
from .kernels import Causal, Full, Mask, Segments


@struct.dataclass
class Place:
    """The tokens' positions and segments, who sees whom, and the cache that they extend, if any.

    `keys` are the positions of all that the tokens look at, `slots` where they stand in the cache.
    """

    positions: Any
    keys: Any
    mask: Mask
    segments: jax.Array | None
    causal: bool = struct.field(pytree_node=False)
    cache: Cache | None = None
    slots: Store | None = None

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
        start, slots = cache.length, cache.store
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
