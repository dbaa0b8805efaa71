"""Blocks of our leaves from their tensors, and their tensors from our leaves.

Both directions walk the boxes of `mapping`, one block or tensor at a time.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from ... import InputError
from .container import Tensor
from .mapping import Index, Piece, Shape

SMALL = 1 << 20  # bytes of blocks that may stay in the heap
Read = Callable[[str, Index], np.ndarray]


def whole(index: Sequence[slice], shape: Shape) -> Index:
    """An index with each slice's start and stop filled in."""
    return tuple(slice(*part.indices(n)[:2]) for part, n in zip(index, shape))


def leaf_block(
    pieces: Sequence[Piece], shape: Shape, index: Index, dtype: np.dtype, read: Read
) -> np.ndarray:
    """Part `index` of a leaf of this shape, in `dtype`; `read(name, index)` gives their values there.

    The values go straight from what `read` returns into the block: nothing of its size is made beside it.
    """
    origin = [part.start for part in index]
    block = _zeros(tuple(part.stop - part.start for part in index), dtype)
    for piece in pieces:
        for row, box in piece.boxes(shape, index):
            values = read(piece.entry.theirs, box.their_index())
            into = block if row is None else block[row - origin[0]]
            part = box.our_index(origin if row is None else origin[1:])
            _copy(into[part], values, box.transposed)
    if dtype == np.float16 and not np.isfinite(block).all():
        names = ", ".join(sorted({piece.entry.theirs for piece in pieces})[:3])
        raise InputError(f"{names}: values beyond float16's ±65504; load as bfloat16 or float32")
    return block


def _copy(into: np.ndarray, values: np.ndarray, transposed: bool) -> None:
    """Copy and convert."""
    with np.errstate(over="ignore"):
        if transposed and values.ndim == 2:
            _copy_transposed(into, values)
        else:
            np.copyto(into, values.T if transposed else values, casting="unsafe")


def _copy_transposed(into: np.ndarray, values: np.ndarray) -> None:
    """`into[...] = values.T`, converted, by tiles that fit a cache.

    A tile's rows are a cache line further apart than their length: lengths are often powers of two, at which
    all rows would share the same few lines.
    """
    size = into.dtype.itemsize
    height, width, line = 16 * size, 2048, 64 // size
    tile = np.empty((height, width + line), into.dtype)
    bits, target = tile.view(f"u{size}"), into.view(f"u{size}")  # copied faster than bfloat16
    for column in range(0, values.shape[1], width):
        for row in range(0, len(values), height):
            part = values[row : row + height, column : column + width]
            rows, columns = part.shape
            np.copyto(tile[:rows, :columns], part, casting="unsafe")
            target[column : column + columns, row : row + rows] = bits[:rows, :columns].T


def place_leaf(
    pieces: Sequence[Piece], leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, read: Read
) -> jax.Array:
    """A leaf as an array on the devices of `sharding`, shard by shard.

    A shard is on its devices before the next is read, so that of what is not yet there one shard at most is
    in the host's memory. None of the array's own memory is the file's.
    """
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, part in sharding.addressable_devices_indices_map(shape).items():
        index = whole(part or (), shape)
        devices.setdefault(tuple((axis.start, axis.stop) for axis in index), []).append(device)
    arrays = []
    for spans, owners in devices.items():
        index = tuple(slice(start, stop) for start, stop in spans)
        arrays += _copies(leaf_block(pieces, shape, index, dtype, read), owners)
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _copies(block: np.ndarray, devices: Sequence[jax.Device]) -> list[jax.Array]:
    """The block on each of the devices, once it is there; a CPU's arrays are the block itself."""
    return jax.block_until_ready([jax.device_put(block, device) for device in devices])


def _zeros(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Zeros in pages of their own, which go back to the system when they are dropped.

    The heap would keep holes of a block's size. And JAX takes pages on a CPU as they are, without a copy; it
    never writes to them, not for donated arrays either.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < SMALL:
        return np.zeros(shape, dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: a transposed copy touches many pages at once
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)


def their_tensors(leaves: Mapping[str, list[Piece]], params: Any) -> Iterator[Tensor]:
    """Every tensor that the pieces of `leaves` name, made of the leaves in `params` when asked for."""
    flat = flatten_dict(params, sep="/")
    sources: dict[str, list[tuple[str, Piece]]] = {}
    for path, pieces in leaves.items():
        for piece in pieces:
            sources.setdefault(piece.entry.theirs, []).append((path, piece))
    for name, parts in sources.items():
        path, piece = parts[0]
        shape, dtype = piece.shape(tuple(flat[path].shape)), np.dtype(flat[path].dtype)
        yield Tensor(name, shape, dtype, partial(_make, parts, flat, shape, dtype))


def _make(
    parts: Sequence[tuple[str, Piece]], flat: Mapping[str, Any], shape: Shape, dtype: np.dtype
) -> np.ndarray:
    tensor, filled = np.zeros(shape, dtype), 0
    for path, piece in parts:
        leaf = flat[path]
        for index, values in _host_shards(leaf):
            origin = [part.start for part in index]
            for row, box in piece.boxes(tuple(leaf.shape), index):
                source = values if row is None else values[row - origin[0]]
                source = source[box.our_index(origin if row is None else origin[1:])]
                _copy(tensor[box.their_index()], source, box.transposed)
                filled += source.size
    assert filled == tensor.size, f"{parts[0][1].entry.theirs}: {filled} of {tensor.size} values have a place"
    return tensor


def _host_shards(leaf: Any) -> Iterator[tuple[Index, np.ndarray]]:
    """(index, values) for each part of an array, once, in the host's memory."""
    if not isinstance(leaf, jax.Array):
        yield whole((slice(None),) * np.ndim(leaf), np.shape(leaf)), np.asarray(leaf)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield whole(shard.index, leaf.shape), np.asarray(shard.data)
