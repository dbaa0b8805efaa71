"""Rotary positions in two dimensions: a place in the text, and a place in the block that fills it (GLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .. import InputError
from .positions import Positions
from .rotary import inverse_frequencies, rotate_pairs


@dataclass(frozen=True)
class Rotary2D(Positions):
    """The first half of each head is rotated by the position, the second by the position in the block.

    Positions are `[B, T, 2]` (Du et al., "GLM", 2022, section 2.1): of given text its place and 0; of
    generated text the place of the mask that it fills, and 1, 2, ... A plain array `[B, T]` is the places of
    given text. `half_frequencies` rounds the frequencies to float16, as ChatGLM-6B's published code does;
    the angles are in float32, as in that code after `.float()`.
    """

    base: float = 10_000.0
    half_frequencies: bool = True

    def rotate(self, x: jax.Array, positions: Any) -> jax.Array:
        """`x` with both halves of each head rotated; pairs are the halves of a half."""
        width = x.shape[-1] // 2
        if x.shape[-1] % 4:
            raise InputError(f"head width {x.shape[-1]} must be a multiple of 4 for rotation in 2 dimensions")
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        frequencies = jnp.asarray(inverse_frequencies(self.base, width), dtype)
        if self.half_frequencies:
            frequencies = frequencies.astype(jnp.float16).astype(dtype)
        angles = in_two_dimensions(positions)[..., None, :, None].astype(dtype) * frequencies
        first, second = jnp.split(x.astype(dtype), 2, -1)
        turned = [rotate_pairs(half, angles[..., i, :], False) for i, half in enumerate((first, second))]
        return jnp.concatenate(turned, -1).astype(x.dtype)

    def advance(self, positions: Any) -> jax.Array:
        """The same place, one further in the block."""
        return in_two_dimensions(positions)[:, -1:] + jnp.array([0, 1])


def in_two_dimensions(positions: jax.Array) -> jax.Array:
    """`positions` `[B, T, 2]`, or places `[B, T]` of given text with 0 beside them."""
    return positions if positions.ndim == 3 else jnp.stack([positions, jnp.zeros_like(positions)], -1)
