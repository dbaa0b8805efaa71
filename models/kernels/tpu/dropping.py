"""Dropout inside a kernel: the same bits as everywhere, from the indices of a tile."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..dropout import Dropout
from .call import Refs
from .pieces import Frame, Tile

NUMBERS = ("seed", "batch", "head", "query", "key")


class Dropping(NamedTuple):
    """Dropout or none; its numbers go to scalar memory."""

    frame: Frame
    dropout: Dropout | None

    def scalars(self) -> dict[str, Array]:
        """Seed and first indices, int32."""
        if self.dropout is None:
            return {}
        numbers = {name: jnp.asarray(getattr(self.dropout, name)).reshape(1) for name in NUMBERS}
        unsigned = jnp.uint32
        return {
            f"dropout_{name}": jax.lax.bitcast_convert_type(number.astype(unsigned), jnp.int32)
            for name, number in numbers.items()
        }

    def kept(self, weights: Array, refs: Refs, tile: Tile) -> Array:
        """Weights, or gradients with respect to dropped ones, after dropout."""
        if self.dropout is None:
            return weights
        numbers = {name: refs.scalars[f"dropout_{name}"][0] for name in NUMBERS}
        starts = (tile.row, tile.column)
        row, column = (self._indices(axis) + start for axis, start in zip(self.frame.sides, starts))
        head = self.frame.head(tile)
        keep = dataclasses.replace(self.dropout, **numbers).keep_at(tile.at.batch, head, row, column)
        return jnp.where(keep, weights * (1 / (1 - self.dropout.rate)), 0)

    def _indices(self, axis: int) -> Array:
        """Along one side of a tile, with an axis of size 1 for the other."""
        shape = tuple(size if i == axis else 1 for i, size in enumerate(self.frame.shape))
        return lax.broadcasted_iota(jnp.int32, shape, axis)
