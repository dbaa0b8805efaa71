"""Matrices with `w[column - row]` and the sums of their diagonals, in registers of 8 rows.

Row r of such a matrix is row 0 moved by r. A table of 8 rows, each moved by one, is made outside the kernel;
8 rows of the matrix are then a piece of it, at a place that moves by 8. A piece is cut at a multiple of the
lanes after rolling the table, so as many rolls are needed as there are multiples of 8 among the lanes.
Sums of diagonals go the same way back. (Rolling each row by its own number is refused by the compiler for
one of the two directions, so this is used for both.)
"""

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from .plan import SUBLANES


def toeplitz(window: Array, rows: int, columns: int, lanes: int) -> Array:
    """`[rows, columns]` from `window [8, rows + columns]`, which is `w[y - row - rows]` at column y."""
    rolled: dict[int, Array] = {}
    parts = []
    for start in range(rows, 0, -SUBLANES):
        rest = start % lanes
        if rest not in rolled:
            rolled[rest] = _roll(window, -rest)
        parts.append(rolled[rest][:, start - rest : start - rest + columns])
    return jnp.concatenate(parts, 0)


def diagonals(tile: Array, lanes: int) -> Array:
    """The transpose of `toeplitz`: `[8, rows + columns]` from `[rows, columns]`."""
    rows, columns = tile.shape
    sums: dict[int, Array] = {}
    for start in range(rows, 0, -SUBLANES):
        rest = start % lanes
        before, after = start - rest, rows - start + rest
        part = tile[rows - start : rows - start + SUBLANES]
        zeros = [jnp.zeros((SUBLANES, size), tile.dtype) for size in (before, after)]
        part = jnp.concatenate([x for x in (zeros[0], part, zeros[1]) if x.shape[1]], 1)
        sums[rest] = sums[rest] + part if rest in sums else part
    total = jnp.zeros((SUBLANES, rows + columns), tile.dtype)
    for rest, part in sums.items():
        total = total + _roll(part, rest)
    return total


def _roll(array: Array, by: int) -> Array:
    by %= array.shape[1]
    return pltpu.roll(array, by, 1) if by else array
