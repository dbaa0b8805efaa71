"""The tiles of a score matrix that a kernel visits, as one list of numbers that its grid walks along.

A block map says for each tile whether it is skipped, full or partial. A kernel that goes through it row by
row wants the live tiles one after the other, and to know where a row begins and ends; so each entry packs
place, kind and these two flags in one int32. Static masks give the list in NumPy, those with arrays on the
device, as long as the structure of the mask can demand and padded at the end by entries that do nothing.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from .blocks import PARTIAL, SKIP, Grid, dynamic_blocks, is_dynamic, static_blocks
from .masks import Mask
from .trees import AnyArray

_PLACE = 14  # bits of a row or column of tiles
LONGEST = 1 << _PLACE


class Entry(NamedTuple):
    """One tile of a list; `kind` is SKIP where there is nothing to compute.

    `first` and `last` mark the ends of a row: what is summed over it starts and is written out there.
    """

    row: Any
    column: Any
    kind: Any
    first: Any
    last: Any


def unpack(packed: Any) -> Entry:
    """An entry from its number, or arrays of entries from an array of numbers."""
    flags, place = packed >> 2 * _PLACE, LONGEST - 1
    return Entry((packed >> _PLACE) & place, packed & place, flags & 3, (flags & 4) != 0, (flags & 8) != 0)


def block_map(mask: Mask, grid: Grid, groups: int) -> AnyArray:
    """SKIP, PARTIAL or FULL of each tile, int `[B or 1, G or 1, n, m]`; NumPy where the mask is static.

    What a group's heads do not agree on is partial.
    """
    static = static_blocks(mask, grid)[None, None]
    if not is_dynamic(mask):
        return static
    blocks = jnp.where(static == PARTIAL, dynamic_blocks(mask, grid), static).astype(jnp.int32)
    if blocks.shape[1] == 1:
        return blocks
    return agreed(blocks.reshape(blocks.shape[0], groups, -1, *grid.shape), 2)


def agreed(blocks: AnyArray, axis: int) -> AnyArray:
    """The map of several: full or skipped where they all say so."""
    least, most = blocks.min(axis), blocks.max(axis)
    return _module(blocks).where(least == most, least, PARTIAL)


def tile_list(blocks: AnyArray, bound: np.ndarray, every: bool = False) -> AnyArray:
    """Row by row the tiles of `blocks [b, g, n, m]` that are not skipped: packed int32 `[b, g, N]`.

    `bound [n, m]` is what the structure alone tells: what it skips cannot be live, which gives N. A row with
    no live tile has one entry, of kind SKIP; with `every` all tiles are listed, whatever their kind.
    """
    np_ = _module(blocks)
    columns, live = bound.shape[1], (blocks != SKIP) | every
    length = bound.size if every else int(np.maximum((bound != SKIP).sum(1), 1).sum())
    empty = ~live.any(3, keepdims=True) & (np.arange(columns) == 0)
    visited = (live | empty).reshape(*blocks.shape[:2], -1)
    order = np_.argsort(~visited, axis=2, stable=True)[:, :, :length]
    number = visited.sum(2, keepdims=True)
    entry = np_.minimum(np.arange(length), number - 1)  # beyond the end the last one is repeated, idle
    place = np_.take_along_axis(order, entry, 2)
    kinds = np_.take_along_axis(blocks.reshape(visited.shape), place, 2)
    row, idle = place // columns, np.arange(length) >= number
    change = row[:, :, 1:] != row[:, :, :-1]
    edge = np_.ones((*row.shape[:2], 1), bool)
    first = np_.concatenate([edge, change], 2)
    last = np_.concatenate([change, edge], 2) | (np.arange(length) == number - 1)
    flags = np_.where(idle, 0, kinds + 4 * first + 8 * last)
    packed = (flags << 2 * _PLACE) | (row << _PLACE) | (place % columns)
    return packed.astype(np.int32)


def _module(array: AnyArray) -> Any:
    return jnp if isinstance(array, Array) else np
