"""Biases inside a kernel: how each kind is read for a tile, and how its gradient is summed over tiles.

A dense bias is read by tiles. One that goes by relative position is a Toeplitz matrix and is spread from a
few numbers: see `toeplitz`. ALiBi is computed; of relations (`relations`) rows of a table are looked up.
"""

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ..biases import ALiBi, Bias, Bucketed, Dense
from ..operands import Axes, Operand, standard
from ..relations import Relations
from ..trees import AnyArray
from .call import Block, Refs
from .pieces import Frame, Piece, Tile
from .plan import SUBLANES
from .relations import RelationsInside
from .toeplitz import toeplitz


class Inside(Protocol):
    """A bias in a kernel."""

    def scalars(self) -> dict[str, Array]:
        """Its numbers."""

    def inputs(self) -> dict[str, tuple[Array, Block]]:
        """Its arrays."""

    def tile(self, refs: Refs, tile: Tile) -> Array | float:
        """What is added to the scores of a tile, in the unit of the plan."""


def bias_inside(frame: Frame, bias: Bias | None) -> Inside:
    """The bias, extended to the plan's lengths, in a kernel."""
    match bias:
        case Dense(values=values):
            plan = frame.plan
            return DenseInside(frame, standard(values, Axes.PAIRS, plan.queries, plan.keys))
        case Bucketed():
            return BucketedInside(frame, bias)
        case ALiBi():
            return ALiBiInside(frame, bias)
        case Relations():
            return RelationsInside.of(frame, bias)
        case _:
            return Without()


class Without(NamedTuple):
    """No bias."""

    def scalars(self) -> dict[str, Array]:
        """None."""
        return {}

    def inputs(self) -> dict[str, tuple[Array, Block]]:
        """None."""
        return {}

    def tile(self, refs: Refs, tile: Tile) -> float:
        """Nothing."""
        return 0.0


class DenseInside(NamedTuple):
    """An array, its broadcast axes kept of size 1 where they are batch and heads."""

    frame: Frame
    operand: Operand

    def scalars(self) -> dict[str, Array]:
        """None."""
        return {}

    def inputs(self) -> dict[str, tuple[Array, Block]]:
        """The array."""
        return {"bias": Piece(self.frame, self.operand).input()}

    def tile(self, refs: Refs, tile: Tile) -> Array:
        """Its piece."""
        piece = Piece(self.frame, self.operand).load(refs.inputs["bias"], tile)
        return piece.astype(jnp.float32) * self.frame.plan.unit


class BucketedInside(NamedTuple):
    """Values by distance, eight rows a head: see `toeplitz`.

    The table has an entry for the distances around the offset. Beyond, a bucket goes on to infinity, and a
    tile that lies there reads the table's end.
    """

    frame: Frame
    bias: Bucketed

    def scalars(self) -> dict[str, Array]:
        """The distance at which the table starts, counted along lanes, a multiple of them."""
        lanes, offset = self.frame.plan.lanes, jnp.asarray(self.bias.offset, jnp.int32)
        center = -offset if self.frame.keys_first else offset
        start = (center - self.bias.max_distance - self._size()) // lanes * lanes
        return {"table_start": start.reshape(1)}

    def inputs(self) -> dict[str, tuple[Array, Block]]:
        """The table in the plan's unit."""
        table = self.table(self.bias.table) * self.frame.plan.unit
        return {"table": (table, Block((self.frame.heads, *table.shape[1:]), lambda at: (at.heads, 0, 0)))}

    def tile(self, refs: Refs, tile: Tile) -> Array:
        """A Toeplitz matrix."""
        window = refs.inputs["table"][tile.head, :, self.window(refs, tile)]
        return toeplitz(window, *self.frame.shape, self.frame.plan.lanes)

    def window(self, refs: Refs, tile: Tile) -> Any:
        """The part of the table, or of a gradient like it, that a tile reads."""
        across = tile.row - tile.column if self.frame.keys_first else tile.column - tile.row
        start = across - refs.scalars["table_start"][0] - self.frame.shape[0]
        start = jnp.clip(start, 0, self.length() - self._size())
        return pl.ds(pl.multiple_of(start, self.frame.plan.lanes), self._size())

    def table(self, table: AnyArray) -> Array:
        """`[H, 8, length]` of T5's `[buckets, H]`: place y of row r is for the distance `start + y - r`."""
        bias, start = Bucketed(table, self.bias.bidirectional, self.bias.max_distance), self.scalars()
        row = lax.broadcasted_iota(jnp.int32, (SUBLANES, self.length()), 0)
        along = start["table_start"] + lax.broadcasted_iota(jnp.int32, row.shape, 1) - row
        distance = (-along if self.frame.keys_first else along) - self.bias.offset
        return jnp.asarray(table, jnp.float32)[bias.bucket(distance)].transpose(2, 0, 1)

    def length(self) -> int:
        """Of the table: both sides of the offset, and room for tiles that lie beyond."""
        lanes = self.frame.plan.lanes
        return -(-2 * (self.bias.max_distance + self._size() + lanes) // lanes) * lanes

    def _size(self) -> int:
        return sum(self.frame.shape)


class ALiBiInside(NamedTuple):
    """Slopes and offset in scalar memory."""

    frame: Frame
    bias: ALiBi

    def scalars(self) -> dict[str, Array]:
        """A slope a head, and where queries start among keys."""
        slopes = jnp.asarray(self.bias.slopes, jnp.float32)
        return {"slopes": slopes, "bias_offset": jnp.asarray(self.bias.offset, jnp.int32).reshape(1)}

    def inputs(self) -> dict[str, tuple[Array, Block]]:
        """None."""
        return {}

    def tile(self, refs: Refs, tile: Tile) -> Array:
        """Distance times slope."""
        slope = refs.scalars["slopes"][self.frame.head(tile)]
        return self.distance(refs, tile) * (-slope * self.frame.plan.unit)

    def distance(self, refs: Refs, tile: Tile) -> Array:
        """Of each pair, float32."""
        across = tile.column - tile.row - refs.scalars["bias_offset"][0]
        query, key = (lax.broadcasted_iota(jnp.int32, self.frame.shape, axis) for axis in self.frame.sides)
        return jnp.abs(key - query + across).astype(jnp.float32)
