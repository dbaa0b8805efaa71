"""Where a token stands: position information as a choice of the configuration.

A choice may add something to the embeddings, rotate queries and keys, or bias the attention scores; by
default it does none of these. Positions are integers `[B, T]`, restarting at each packed document; a choice
that needs to know more of a token takes any pytree of arrays `[B, T, ...]` in their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import InputError
from .kernels import ALiBi as ALiBiBias
from .kernels import Bias, Bucketed, alibi_slopes
from .precision import Precision
from .rotary import RotaryScaling, rotate_pairs
from .tables import look_up


@dataclass(frozen=True)
class Positions:
    """No position information; the base of the others."""

    @property
    def limit(self) -> int | None:
        """How many positions there are; None where there is no limit."""
        return None

    def require(self, length: int) -> None:
        """Raise `InputError` for a sequence that is longer than the positions."""
        if self.limit is not None and length > self.limit:
            raise InputError(
                f"sequence length {length} exceeds the model's {self.limit} positions; "
                f"use length <= {self.limit} or a model with more positions"
            )

    def embedding(self, width: int, precision: Precision, std: float) -> nn.Module | None:
        """A module `positions [B, T] -> [B, T, D]` whose value is added to the embeddings, if any."""
        return None

    def place(self, x: jax.Array, positions: Any) -> jax.Array:
        """Word vectors `[B, T, D]` as the positions change them (CPM-Bee turns words of one name apart)."""
        return x

    def rotate(self, x: jax.Array, positions: Any) -> jax.Array:
        """Queries or keys `[B, T, H, K]` at `positions [B, T]`."""
        return x

    def bias(self, heads: int, bidirectional: bool, precision: Precision, std: float) -> nn.Module | None:
        """A module whose value, a `Bias`, is added to the attention scores of every layer, if any.

        It is called with the positions of the queries and of the keys, and the index of the first query
        among the keys: 0, or how many tokens a cache holds.
        """
        return None

    def advance(self, positions: Any) -> Any:
        """The positions `[B, 1]` of the tokens that follow those at `positions [B, T]`."""
        return jax.tree.map(lambda each: each[:, -1:] + 1, positions)


@dataclass(frozen=True)
class Learned(Positions):
    """A learned vector for each of `max_length` positions; row `position + offset` of the table is taken.

    OPT's tables begin with 2 rows, RoBERTa's with as many as its padding index plus 1, for no position.
    """

    max_length: int = 1024
    offset: int = 0

    @property
    def limit(self) -> int:
        """As many as there are vectors."""
        return self.max_length

    def embedding(self, width: int, precision: Precision, std: float) -> nn.Module:
        """Looks positions up in `position_embedding/table` `[max_length + offset, D]`."""
        return LearnedModule(self, width, precision, std, name="position_embedding")


@dataclass(frozen=True)
class Sinusoidal(Positions):
    """Fixed sines and cosines (Vaswani et al., "Attention Is All You Need", 2017, section 3.5)."""

    base: float = 10_000.0

    def embedding(self, width: int, precision: Precision, std: float) -> nn.Module:
        """Computes the encoding; it has no parameters."""
        return SinusoidalModule(self.base, width, precision, name="position_embedding")


@dataclass(frozen=True)
class Rotary(Positions):
    """Rotates pairs of query and key entries by an angle proportional to the position.

    The score of a query at m and a key at n then depends on n - m only (Su et al., "RoFormer", 2021).
    `width` is how many leading entries of a head are rotated (0: all). Pairs are the two halves
    (GPT-NeoX, LLaMA), or neighbouring entries where `interleaved` (GPT-J, the paper). `scaling` stretches
    the rotation past the trained length.
    """

    base: float = 10_000.0
    width: int = 0
    interleaved: bool = False
    scaling: RotaryScaling = RotaryScaling()

    def rotate(self, x: jax.Array, positions: Any) -> jax.Array:
        """`x` with the first `width` entries of each head rotated; angles and products in float32."""
        width = self.width or x.shape[-1]
        if width % 2 or width > x.shape[-1]:
            raise InputError(f"rotary width {width} must be even and at most the head width {x.shape[-1]}")
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        frequencies = jnp.asarray(self.scaling.frequencies(self.base, width, positions), dtype)
        angles = positions[..., None, None].astype(dtype) * frequencies
        rotated = rotate_pairs(x[..., :width].astype(dtype), angles, self.interleaved)
        if self.scaling.amplitude != 1.0:
            rotated = rotated * self.scaling.amplitude
        rotated = rotated.astype(x.dtype)
        return rotated if width == x.shape[-1] else jnp.concatenate([rotated, x[..., width:]], -1)


@dataclass(frozen=True)
class RelativeBuckets(Positions):
    """T5's learned bias per head and bucket of the distance (Raffel et al., 2020, section 2.1)."""

    buckets: int = 32
    max_distance: int = 128

    def bias(self, heads: int, bidirectional: bool, precision: Precision, std: float) -> nn.Module:
        """One table `relative_bias/table` `[buckets, H]`, shared by all layers of a stack."""
        return RelativeBias(self, heads, bidirectional, precision, std, name="relative_bias")


@dataclass(frozen=True)
class ALiBi(Positions):
    """Subtracts a fixed slope per head times the distance (Press et al., 2022)."""

    def bias(self, heads: int, bidirectional: bool, precision: Precision, std: float) -> nn.Module:
        """Computes the slopes 2^(-8 i / H), i = 1..H; it has no parameters."""
        return ALiBiModule(heads, name="relative_bias")


class LearnedModule(nn.Module):
    """A table of positions."""

    choice: Learned
    width: int
    precision: Precision
    std: float

    @nn.compact
    def __call__(self, positions: jax.Array) -> jax.Array:
        self.choice.require(positions.shape[-1])
        shape = self.choice.max_length + self.choice.offset, self.width
        return look_up(self, shape, self.precision, self.std, positions + self.choice.offset)


class SinusoidalModule(nn.Module):
    """Sines in the even entries, cosines in the odd ones."""

    base: float
    width: int
    precision: Precision

    def __call__(self, positions: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(self.precision.compute, jnp.float32)
        frequencies = jnp.asarray(self.base ** -(np.arange(0, self.width, 2) / self.width), dtype)
        angles = positions[..., None].astype(dtype) * frequencies
        pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1)
        return pairs.reshape(*positions.shape, -1)[..., : self.width].astype(self.precision.compute)


class RelativeBias(nn.Module):
    """Holds T5's table and hands it to the attention kernels, which never build `[H, T, S]` from it."""

    choice: RelativeBuckets
    heads: int
    bidirectional: bool
    precision: Precision
    std: float

    @nn.compact
    def __call__(self, queries: Any, keys: Any, offset: int | jax.Array) -> Bias:
        shape, dtype = (self.choice.buckets, self.heads), jnp.dtype(self.precision.param)
        table = self.param("table", nn.initializers.normal(self.std), shape, dtype)
        return Bucketed(table, self.bidirectional, self.choice.max_distance, offset)


class ALiBiModule(nn.Module):
    """Hands ALiBi's slopes to the attention kernels."""

    heads: int

    def __call__(self, queries: Any, keys: Any, offset: int | jax.Array) -> Bias:
        return ALiBiBias(alibi_slopes(self.heads), offset)
