"""Learned tables that are read row by row."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from .precision import Precision


def look_up(
    module: nn.Module, shape: tuple[int, int], precision: Precision, std: float, indices: jax.Array
) -> jax.Array:
    """Rows `[..., D]` of the parameter `table` `shape [rows, D]` of a module, in the arithmetic's type."""
    table = module.param("table", nn.initializers.normal(std), shape, jnp.dtype(precision.param))
    return jnp.take(table.astype(precision.compute), indices, axis=0)


def take_token(x: jax.Array, index: jax.Array) -> jax.Array:
    """Token `index [B]` of each row of `x [B, T, D]`, as `[B, 1, D]`."""
    return jnp.take_along_axis(x, index[:, None, None], axis=1)
