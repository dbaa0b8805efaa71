"""Biases as the kernels read them: tiles in device memory, or slopes from which a tile is computed.

A dense bias is cut in tiles where it lies. A bucketed relative one is the same in all tiles that lie equally
far from the diagonal, and constant beyond its maximum distance, so a few tiles a head stand for all: `[T, S]`
is never written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ..biases import ALiBi, Bias, Bucketed, Dense
from ..trees import structural
from .operations import Ref, Warpgroup
from .problem import CONSUMERS, tiled
from .ring import Index


@structural
class Slopes:
    """ALiBi: `-slopes[h] * |key - query - offset|`, `slopes [H]` float32."""

    slopes: Any
    offset: int

    def distance(
        self,
        operations: Warpgroup,
        shape: tuple[int, ...],
        first_query: Index,
        first_key: Index,
        key_axis: int,
    ) -> Array:
        """How far apart the queries and keys of a tile are, float32."""
        apart = first_key - first_query - self.offset
        rows = operations.positions(shape[0], 0)
        # a thread has many columns: where they differ from tile to tile, they are not kept between tiles
        columns = operations.positions(shape[1], 1) + (apart if key_axis == 1 else -apart)
        spread = [
            lax.broadcast_in_dim(x.astype(jnp.float32), shape, [axis])
            for axis, x in enumerate((rows, columns))
        ]
        return jnp.abs(spread[1] - spread[0])


@structural
class BiasTiles:
    """Tiles of `rows` along the side that a block holds by `columns` along the other.

    `values` is `[1 or B, 1 or H, side, other side]`; or, with `lowest`, `[H, n, rows, columns]`, the tiles
    that lie `lowest`, `lowest + 1`, ... times `columns` from the diagonal, the first and the last standing
    for all beyond.
    """

    values: Any
    rows: int
    columns: int
    lowest: int | None = None

    def part(self, batch: Index, head: Index, block: Index, other: Index, first: Index, size: int) -> Ref:
        """`size` rows from `first` on of the tile of a block and of a tile of the other side."""
        columns = (
            pl.ds(0, self.columns) if self.lowest is not None else pl.ds(other * self.columns, self.columns)
        )
        if self.lowest is None:
            shape = self.values.shape
            plane = batch if shape[0] > 1 else 0, head if shape[1] > 1 else 0
            return self.values.at[(*plane, pl.ds(block * self.rows + first, size), columns)]
        diagonal = other - block * (self.rows // self.columns) - self.lowest
        diagonal = jnp.clip(diagonal, 0, self.values.shape[1] - 1)
        return self.values.at[head, diagonal, pl.ds(first, size), columns]


Operand = BiasTiles | Slopes


def operand(bias: Bias | None, rows: int, columns: int, over_queries: bool) -> Operand | None:
    """What a kernel reads whose blocks hold `rows` queries, or keys, and that goes over the others."""
    match bias:
        case Dense(values=values):
            values = jnp.asarray(values)
            return BiasTiles(values.swapaxes(2, 3) if over_queries else values, rows, columns)
        case Bucketed():
            return _diagonal_tiles(bias, rows, columns, over_queries)
        case ALiBi(slopes=slopes, offset=offset):
            assert isinstance(offset, int)
            return Slopes(jnp.asarray(slopes, jnp.float32), offset)
    return None


def diagonals(bias: Bucketed, rows: int, columns: int, over_queries: bool) -> tuple[int, Array]:
    """The lowest of the diagonals whose tiles differ, and key minus query minus offset in the tiles of each.

    Tile `d` begins `d * columns` after its block on the other side; from the last on, as from the first
    back, all distances are at least the maximum, beyond which the bias is constant.
    """
    sign = -1 if over_queries else 1
    far, offset = bias.max_distance, bias.offset * sign
    lowest = math.floor((offset - far - columns + 1) / columns)
    highest = math.ceil((offset + far + rows - 1) / columns)
    start = jnp.arange(lowest, highest + 1, dtype=jnp.int32)[:, None, None] * columns
    relative = start + jnp.arange(columns, dtype=jnp.int32) - jnp.arange(rows, dtype=jnp.int32)[:, None]
    return lowest, (relative - offset) * sign


def _diagonal_tiles(bias: Bucketed, rows: int, columns: int, over_queries: bool) -> BiasTiles:
    lowest, distance = diagonals(bias, rows, columns, over_queries)
    values = jnp.asarray(bias.table, jnp.float32)[bias.bucket(distance)]
    return BiasTiles(values.transpose(3, 0, 1, 2), rows, columns, lowest)


def bucket_sums(bias: Bucketed, gradient: Array, rows: int, columns: int) -> Array:
    """The gradient of the table from that of the tiles `[H, n, rows, columns]` of a kernel over keys."""
    _, distance = diagonals(bias, rows, columns, over_queries=False)
    flat = gradient.reshape(gradient.shape[0], -1).T
    total = jnp.zeros(jnp.shape(bias.table), jnp.float32).at[bias.bucket(distance).reshape(-1)].add(flat)
    return total.astype(jnp.result_type(bias.table))


def buffers(operand: Operand | None, stages: int) -> tuple[Any, ...]:
    """Shared memory for tiles in flight, a part for each computing warpgroup."""
    if not isinstance(operand, BiasTiles):
        return ()
    shape = (stages, CONSUMERS, operand.rows // CONSUMERS, operand.columns)
    return (tiled(shape, jnp.dtype(operand.values.dtype)),)


def tile_parts(
    operand: Operand | None, batch: Index, head: Index, block: Index, other: Index
) -> tuple[list[Ref], ...]:
    """What is copied to those buffers for one tile."""
    if not isinstance(operand, BiasTiles):
        return ()
    size = operand.rows // CONSUMERS
    return ([operand.part(batch, head, block, other, i * size, size) for i in range(CONSUMERS)],)


def tile_values(
    operations: Warpgroup,
    operand: Operand | None,
    read: Callable[[], Ref],
    head: Index,
    distance: Array | None,
) -> Array | None:
    """The bias of one tile in registers, float32: from the part of a buffer, or from the distances."""
    if operand is None:
        return None
    if isinstance(operand, BiasTiles):
        return operations.tile(read()).astype(jnp.float32)
    assert distance is not None
    return distance * -operand.slopes[head]
