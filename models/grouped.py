"""Products of rows with the matrix of their group: what experts compute once tokens lie side by side.

Rows are sorted by group and `sizes` says how many each has. Nothing is padded to a capacity and nothing is
dropped (Gale et al. 2023, "MegaBlocks", arXiv:2211.15841). Accelerators have `lax.ragged_dot`; on CPUs it
computes every group's product of every row, and tiles of rows, one after the other, take its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .kernels.varying import vary, varying_axes

TILE = 128  # rows: fewer lose speed in the product, more in rows that belong to the next group
GRADIENT = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def grouped_product(rows: Array, kernels: Array, sizes: Array) -> Array:
    """`rows [N, D]` times `kernels [E, D, F]`, each row with the matrix of its group: `[N, F]`.

    The first `sizes[0]` rows are of group 0, and so on; rows beyond the sum of `sizes [E]` give 0. Time grows
    with that sum, not with N. Differentiable in rows and kernels.
    """
    given = (rows, kernels, sizes)
    return _product(*vary(given, varying_axes(given)))  # in `shard_map`, over the same axes: loops need that


@jax.custom_vjp
def _product(rows: Array, kernels: Array, sizes: Array) -> Array:
    return _by_platform(_tiled_product, _ragged_product, rows, kernels, sizes)


def _forward(rows: Array, kernels: Array, sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return _product(rows, kernels, sizes), (rows, kernels, sizes)


def _backward(kept: tuple[Array, ...], slope: Array) -> tuple[Array, Array, np.ndarray]:
    rows, kernels, sizes = kept
    into_rows = _product(slope, kernels.swapaxes(1, 2), sizes)
    into_kernels = _by_platform(_tiled_outer, _ragged_outer, rows, slope, sizes)
    none = np.zeros(sizes.shape, jax.dtypes.float0)
    return into_rows.astype(rows.dtype), into_kernels.astype(kernels.dtype), none


_product.defvjp(_forward, _backward)


def _by_platform(on_cpu: Callable[..., Array], elsewhere: Callable[..., Array], *given: Array) -> Array:
    """Chosen where the program is lowered, which need not be where it is compiled from."""
    return lax.platform_dependent(*given, cpu=on_cpu, default=elsewhere)


def _ragged_product(rows: Array, kernels: Array, sizes: Array) -> Array:
    return _own(lax.ragged_dot(rows, kernels, sizes), sizes)


def _ragged_outer(rows: Array, slope: Array, sizes: Array) -> Array:
    return lax.ragged_dot_general(_own(rows, sizes), _own(slope, sizes), sizes, GRADIENT)


def _own(rows: Array, sizes: Array) -> Array:
    """Rows of no group made 0: what a platform has there is its own affair."""
    return jnp.where(jnp.arange(rows.shape[0])[:, None] < sizes.sum(), rows, 0)


class _Tiles(NamedTuple):
    """Tiles of `size` rows: tile j of `number` is of one group; its last rows may be of the next."""

    size: int
    sizes: Array
    ends: Array  # [E], how many tiles the groups up to each have
    number: Array

    @classmethod
    def of(cls, rows: int, sizes: Array) -> _Tiles:
        size = min(TILE, max(8, rows))
        ends = jnp.cumsum(-(-sizes // size))
        return cls(size, sizes, ends, ends[-1])

    def place(self, tile: Array) -> tuple[Array, Array, Array]:
        """Its group, its first row, and how many of its rows are of the group."""
        group = jnp.searchsorted(self.ends, tile, side="right")
        before = self.ends[group] - -(-self.sizes[group] // self.size)
        inside = (tile - before) * self.size
        first = jnp.cumsum(self.sizes)[group] - self.sizes[group]
        return group, first + inside, self.sizes[group] - inside


def _tiled_product(rows: Array, kernels: Array, sizes: Array) -> Array:
    tiles = _Tiles.of(len(rows), sizes)
    padded = jnp.pad(rows, ((0, tiles.size), (0, 0)))
    width = kernels.shape[2]

    def compute(tile: Array, out: Array) -> Array:
        group, first, _ = tiles.place(tile)
        x = lax.dynamic_slice_in_dim(padded, first, tiles.size)
        y = x @ lax.dynamic_index_in_dim(kernels, group, keepdims=False)
        return lax.dynamic_update_slice_in_dim(
            out, y, first, 0
        )  # the next tile overwrites what is not its own

    start = vary(jnp.zeros((len(padded), width), rows.dtype), varying_axes(rows))
    return _own(lax.fori_loop(0, tiles.number, compute, start)[: len(rows)], sizes)


def _tiled_outer(rows: Array, slope: Array, sizes: Array) -> Array:
    """Sums over each group's rows of the outer products of `rows [N, D]` and `slope [N, F]`: `[E, D, F]`."""
    tiles = _Tiles.of(len(rows), sizes)
    padded, slopes = (jnp.pad(x, ((0, tiles.size), (0, 0))) for x in (rows, slope))

    def add(tile: Array, total: Array) -> Array:
        group, first, own = tiles.place(tile)
        x, dy = (lax.dynamic_slice_in_dim(each, first, tiles.size) for each in (padded, slopes))
        x = jnp.where(jnp.arange(tiles.size)[:, None] < own, x, 0)
        here = lax.dynamic_index_in_dim(total, group) + x.T @ dy
        return lax.dynamic_update_index_in_dim(total, here, group, 0)

    zeros = jnp.zeros((len(sizes), rows.shape[1], slope.shape[1]), rows.dtype)
    return lax.fori_loop(0, tiles.number, add, vary(zeros, varying_axes(rows)))
