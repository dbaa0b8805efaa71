"""The mask inside a kernel: which tiles it goes over, and which of them have to look at single keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array, lax

from .operations import Ref, Warpgroup
from .ring import Index
from .scores import Visible


class MaskOperands(NamedTuple):
    """Arrays of a mask, or references to them in a kernel; None where every query sees every key.

    `bounds [B or 1, tiles, 4]` are for each tile of the side that a block holds the first tile of the other
    side it meets, the first and the end of those that need no mask, and the end; `starts` and `ends` are
    `[B or 1, T]`, `query_ids [B or 1, T]` and `key_ids [B or 1, S]`, all int32.
    """

    bounds: Any = None
    starts: Any = None
    ends: Any = None
    query_ids: Any = None
    key_ids: Any = None

    @property
    def compares(self) -> bool:
        """Whether there is anything to be looked at for single keys."""
        return any(ref is not None for ref in self[1:])


class Bounds(NamedTuple):
    """Tiles `first` to `end`, of which those from `first_full` to `end_full` need no mask."""

    first: Index
    first_full: Index
    end_full: Index
    end: Index


def read_bounds(mask: MaskOperands, batch: Array, tile: Array, count: int) -> Bounds:
    """Those of one tile; without a mask all `count`."""
    if mask.bounds is None:
        return Bounds(0, 0, count, count)
    row = mask.bounds.at[_row(mask.bounds, batch), tile]
    return Bounds(*(read_number(row, i) for i in range(4)))


def read_number(ref: Ref, index: int) -> Array:
    """An int32 that a loop may begin or end with.

    Inside `shard_map` what is read varies over its mesh axes by its type, and what is computed in a kernel
    does not; a loop refuses to begin with the one and go on with the other.
    """
    return ref[index] + 0


def read_visible(
    operations: Warpgroup, mask: MaskOperands, batch: Array, queries: Any, keys: Any, query_axis: int
) -> Visible:
    """What a tile of these slices of queries and keys needs; `queries` run along `query_axis` of the tile."""
    readers = (operations.row_values, operations.column_values)

    def read(ref: Ref, positions: Any, axis: int) -> Array | None:
        return None if ref is None else readers[axis](ref.at[_row(ref, batch), positions])

    return Visible(
        read(mask.starts, queries, query_axis),
        read(mask.ends, queries, query_axis),
        read(mask.query_ids, queries, query_axis),
        read(mask.key_ids, keys, 1 - query_axis),
    )


def with_key_ids(
    operations: Warpgroup, mask: MaskOperands, visible: Visible, batch: Array, keys: Any
) -> Visible:
    """`visible` of a tile's queries, with the ids of its keys where the mask compares them."""
    only = MaskOperands(key_ids=mask.key_ids)
    return visible._replace(key_ids=read_visible(operations, only, batch, None, keys, 0).key_ids)


def where_needed(
    mask: MaskOperands, bounds: Bounds, tile: Index, value: Array, apply: Callable[[Array], Array]
) -> Array:
    """`apply(value)` in tiles in which not every query sees every key, elsewhere `value`."""
    if mask.bounds is None or not mask.compares:
        return value
    partial = (tile < bounds.first_full) | (tile >= bounds.end_full)
    return lax.cond(partial, apply, lambda unmasked: unmasked, value)


def _row(ref: Ref, batch: Array) -> Index:
    """The row of a batch row; an array that is the same for all has one."""
    return batch if ref.shape[0] > 1 else 0
