"""Which tiles of the score matrix hold no allowed pair, only allowed pairs, or some of both.

The map follows from the structure of a mask by three-valued logic (Kleene's): SKIP is false, FULL is true,
PARTIAL is unknown; "and" is the minimum, "or" the maximum, "not" the mirror image. Unknown is always a
correct answer, so a mask this file does not know is PARTIAL everywhere.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .flags import Keys, Queries
from .masks import And, Causal, Dense, Full, Lengths, Mask, Not, Or, Prefix, Segments, Window, per_batch
from .trees import AnyArray

SKIP, PARTIAL, FULL = 0, 1, 2


class Grid(NamedTuple):
    """A score matrix `queries` x `keys`, cut into tiles `rows` x `columns`, the last perhaps smaller."""

    queries: int
    keys: int
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """How many tiles stand below and beside each other."""
        return -(-self.queries // self.rows), -(-self.keys // self.columns)

    def row_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last query of each row of tiles, `[n, 1]`."""
        first = np.arange(0, self.queries, self.rows)[:, None]
        return first, np.minimum(first + self.rows, self.queries) - 1

    def column_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last key of each column of tiles, `[1, m]`."""
        first = np.arange(0, self.keys, self.columns)[None, :]
        return first, np.minimum(first + self.columns, self.keys) - 1


def static_blocks(mask: Mask, grid: Grid) -> np.ndarray:
    """SKIP, PARTIAL or FULL for each tile as far as the structure alone tells, int8 `[n, m]`."""
    return np.broadcast_to(_static(mask, grid), grid.shape).astype(np.int8)


def dynamic_blocks(mask: Mask, grid: Grid) -> Array:
    """The same from the values of the arrays too, on the device: int8 `[B or 1, H or 1, n, m]`."""
    blocks = jnp.asarray(_dynamic(mask, grid), jnp.int8)
    blocks = blocks.reshape((1,) * (4 - blocks.ndim) + blocks.shape)
    return jnp.broadcast_to(blocks, (*blocks.shape[:2], *grid.shape))


def is_dynamic(mask: Mask) -> bool:
    """Whether the mask has arrays, whose values can rule out more tiles than its structure does."""
    return bool(jax.tree.leaves(mask))


def _static(mask: Mask, grid: Grid) -> Any:
    match mask:
        case Causal(offset=int()) | Window(offset=int()) | Full() | Lengths(lengths=int()):
            return _interval(mask, grid)
        case Prefix(offset=int(offset)):
            return np.maximum(_interval(Causal(offset), grid), PARTIAL)
        case And(parts=parts):
            return functools.reduce(np.minimum, (_static(part, grid) for part in parts))
        case Or(parts=parts):
            return functools.reduce(np.maximum, (_static(part, grid) for part in parts))
        case Not(part=part):
            return FULL - _static(part, grid)
        case _:
            return np.full(grid.shape, PARTIAL)


def _dynamic(mask: Mask, grid: Grid) -> Any:
    match mask:
        case Causal() | Window() | Full() | Lengths():
            return _interval(mask, grid)
        case Prefix(lengths=lengths, offset=offset):
            return jnp.maximum(_interval(Lengths(lengths), grid), _interval(Causal(offset), grid))
        case Segments():
            return _segments(mask, grid)
        case Dense(allowed=allowed):
            return _dense(allowed, grid)
        case Keys(flags=flags):
            return _dense(flags[:, None, None, :], grid)
        case Queries(flags=flags):
            return _dense(flags[:, None, :, None], grid)
        case And(parts=parts):
            return functools.reduce(jnp.minimum, (_dynamic(part, grid) for part in parts))
        case Or(parts=parts):
            return functools.reduce(jnp.maximum, (_dynamic(part, grid) for part in parts))
        case Not(part=part):
            return FULL - _dynamic(part, grid)
        case _:
            return np.full(grid.shape, PARTIAL)


def _interval(mask: Mask, grid: Grid) -> Any:
    """Masks that bound the key, or the key minus the query; their offsets and lengths may be traced."""
    (row, last_row), (column, last_column) = grid.row_bounds(), grid.column_bounds()
    least, most = column - last_row, last_column - row  # of key minus query in a tile
    match mask:
        case Causal(offset=offset):
            return _at_most(least, most, per_batch(offset))
        case Window(left=left, right=right, offset=offset):
            offset = per_batch(offset)
            after = FULL if right is None else _at_most(least, most, offset + right)
            before = FULL if left is None else _at_most(-most, -least, left - offset)
            return _minimum(after, before)
        case Lengths(lengths=lengths):
            return _at_most(column, last_column, per_batch(lengths) - 1)
        case _:
            return np.full(grid.shape, FULL)


def _at_most(least: np.ndarray, most: np.ndarray, bound: Any) -> Any:
    """Whether numbers between `least` and `most` are all, in part or never at most `bound`."""
    return (least <= bound) * 1 + (most <= bound) * 1


def _minimum(a: Any, b: Any) -> Any:
    return jnp.minimum(a, b) if isinstance(a, Array) or isinstance(b, Array) else np.minimum(a, b)


def _segments(mask: Segments, grid: Grid) -> Array:
    """FULL where one id fills both sides, SKIP where the ranges of ids, padding apart, do not meet."""
    low, high, real_low = _id_ranges(mask.query, grid.rows, grid.shape[0])
    key_low, key_high, key_real_low = _id_ranges(mask.keys(), grid.columns, grid.shape[1])
    low, high, real_low = (x[:, None, :, None] for x in (low, high, real_low))
    key_low, key_high, key_real_low = (x[:, None, None, :] for x in (key_low, key_high, key_real_low))
    meet = (real_low <= key_high) & (key_real_low <= high)
    same = (low == high) & (key_low == key_high) & (low == key_low) & (low != 0)
    return meet * 1 + same * 1


def _id_ranges(ids: AnyArray, size: int, count: int) -> tuple[Array, Array, Array]:
    """Least and greatest id of each block, and the least that is no padding, each `[B, count]`.

    A block of padding alone has its least real id above every other, so it meets nothing.
    """
    tiles = _tiled(jnp.asarray(ids), 1, size, count)
    real = jnp.where(tiles == 0, jnp.iinfo(tiles.dtype).max, tiles)
    return tiles.min(2), tiles.max(2), real.min(2)


def _dense(allowed: AnyArray, grid: Grid) -> Array:
    """All and any of each tile."""
    tiles = jnp.asarray(allowed)
    for axis, size, count in ((2, grid.rows, grid.shape[0]), (4, grid.columns, grid.shape[1])):
        tiles = _tiled(tiles, axis, size, count)
    return tiles.any((3, 5)) * 1 + tiles.all((3, 5)) * 1


def _tiled(array: Array, axis: int, size: int, count: int) -> Array:
    """Cut an axis in `count` blocks of `size`, the last filled up by its edge; size 1 stays `[1, 1]`."""
    length = array.shape[axis]
    if length == 1:
        return jnp.expand_dims(array, axis + 1)
    widths = [(0, count * size - length if i == axis else 0) for i in range(array.ndim)]
    array = jnp.pad(array, widths, mode="edge")
    return array.reshape(*array.shape[:axis], count, size, *array.shape[axis + 1 :])
