"""Between hosts and mesh: each process gives its rows, all get one global array, and whole arrays back."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import InputError
from .rules import DEFAULT_RULES, AxisRules, leaf_path, make_spec, split_axes, ways
from .zigzag import Order, zigzag_order


def batch_sharding(mesh: Mesh, rank: int = 2, rules: AxisRules = DEFAULT_RULES) -> NamedSharding:
    """Where a batch leaf [B], [B, T] or [B, T, ...] lies: rows and length over the axes of their rules."""
    logical = ("batch", "length")[:rank]
    return NamedSharding(
        mesh, make_spec([split_axes(rules.mesh_axes(name), mesh, "batch") for name in logical])
    )


def local_rows(rows: int, mesh: Mesh, rules: AxisRules = DEFAULT_RULES) -> slice:
    """Which rows of a global batch of `rows` this process has to provide to `place_batch`.

    Processes that hold parts of the same copy of the model (tensor parallelism across machines) provide the
    same rows. Raises InputError if `rows` does not divide, or if the mesh gives this process rows that do
    not adjoin.
    """
    blocks, mine = _row_blocks(mesh, rules)
    if rows % blocks:
        raise InputError(_indivisible("the batch", rows, blocks, mesh, rules))
    each = rows // blocks
    return slice(mine[0] * each, (mine[-1] + 1) * each)


def fitting_rows(rows: int, mesh: Mesh, rules: AxisRules = DEFAULT_RULES) -> int:
    """The smallest number of rows, from `rows` up, that divides over the mesh."""
    blocks, _ = _row_blocks(mesh, rules)
    return -(-rows // blocks) * blocks


def place_batch(batch: Any, mesh: Mesh, rules: AxisRules = DEFAULT_RULES, order: Order = "contiguous") -> Any:
    """Turn this process's rows (numpy, [b, ...], see `local_rows`) into global arrays [B, ...] on the mesh.

    Every leaf has the whole length T, also where `context` splits it; scalars are copied. With `order`
    "zigzag" the columns of every leaf [B, T, ...] are laid in `zigzag_order`, which is the model's to know.
    Raises InputError for a number of rows or a length that does not divide.
    """
    blocks, mine = _row_blocks(mesh, rules)

    def place(key_path: Any, leaf: Any) -> jax.Array:
        path, array = leaf_path(key_path), np.asarray(leaf)
        sharding = batch_sharding(mesh, array.ndim, rules)
        if not array.ndim:
            return jax.make_array_from_process_local_data(sharding, array, ())
        if array.shape[0] % len(mine):
            raise InputError(
                _indivisible(f"batch[{path!r}] of shape {array.shape}", len(array), len(mine), mesh, rules)
            )
        rows = len(array) // len(mine) * blocks
        _check_length(path, array.shape, sharding, mesh, 2 if order == "zigzag" else 1)
        if order == "zigzag" and len(sharding.spec) > 1:
            array = array[:, zigzag_order(array.shape[1], ways(mesh, sharding.spec[1]))]
        return jax.make_array_from_process_local_data(sharding, array, (rows, *array.shape[1:]))

    return jax.tree_util.tree_map_with_path(place, batch)


def on_host(tree: Any) -> Any:
    """Global arrays as whole numpy arrays in every process; every process has to ask, for the same tree."""

    def fetch(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(fetch, tree)


def _row_blocks(mesh: Mesh, rules: AxisRules) -> tuple[int, list[int]]:
    """Into how many blocks the mesh splits the rows of a batch, and which of them this process holds."""
    sharding = batch_sharding(mesh, 1, rules)
    blocks = ways(mesh, sharding.spec[0]) if sharding.spec else 1
    held = sharding.addressable_devices_indices_map((blocks,)).values()
    mine = sorted({index[0].start or 0 for index in held if index})
    if mine != list(range(mine[0], mine[-1] + 1)):
        raise InputError(
            f"this process holds row blocks {mine} of {blocks}, which do not adjoin; "
            f"order the mesh's devices by process"
        )
    return blocks, mine


def _check_length(
    path: str, shape: tuple[int, ...], sharding: NamedSharding, mesh: Mesh, chunks: int
) -> None:
    if len(sharding.spec) < 2 or sharding.spec[1] is None:
        return
    parts = ways(mesh, sharding.spec[1])
    pieces = parts * chunks
    if shape[1] % pieces:
        each = " in two chunks each" if chunks == 2 else ""
        raise InputError(
            f"batch[{path!r}] of shape {shape}: length {shape[1]} does not divide over context={parts}{each};"
            f" pad it to {-(-shape[1] // pieces) * pieces}"
        )


def _indivisible(what: str, rows: int, blocks: int, mesh: Mesh, rules: AxisRules) -> str:
    axes = "×".join(split_axes(rules.mesh_axes("batch"), mesh))
    nearest = -(-rows // blocks) * blocks
    return (
        f"{what}: {rows} rows do not divide into {blocks} blocks ({axes}); use a multiple, such as {nearest}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
