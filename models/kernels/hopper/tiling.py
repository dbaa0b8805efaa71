"""From the range of keys of each query to the tiles that each block of a kernel goes over."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from ..ranges import Ranges
from .masking import MaskOperands
from .problem import Problem


def padded_ranges(found: Ranges, keys: int, problem: Problem) -> Ranges:
    """`found` for padded lengths: no query sees a padded key, a padded one sees what the last does."""
    padded = {name: _extended(value, problem.queries) for name, value in found._asdict().items()}
    if problem.keys > keys:
        every = jnp.full((1, problem.queries), keys, jnp.int32)
        padded |= {name: every for name in ("ends", "other_ends") if padded[name] is None}
    return Ranges(**padded | {"key_ids": _extended(found.key_ids, problem.keys)})


def mask_over_keys(found: Ranges, problem: Problem, rows: int, columns: int) -> MaskOperands:
    """For kernels whose blocks hold `rows` queries and go over tiles of `columns` keys."""
    if found.starts is None and found.ends is None:
        return MaskOperands()
    least, most, full_from, full_to = _of_tiles(found, problem, rows)
    first, end = least // columns, -(-most // columns)
    first_full = jnp.clip(-(-full_from // columns), first, end)
    end_full = jnp.clip(full_to // columns, first_full, end)
    return _operands(found, jnp.stack([first, first_full, end_full, end], -1))


def mask_over_queries(found: Ranges, problem: Problem, rows: int, columns: int) -> MaskOperands:
    """For the kernel whose blocks hold `columns` keys and go over tiles of `rows` queries."""
    if found.starts is None and found.ends is None:
        return MaskOperands()
    least, most, full_from, full_to = (x[:, None, :] for x in _of_tiles(found, problem, rows))
    key = jnp.arange(0, problem.keys, columns)[None, :, None]
    meets = (least < key + columns) & (most > key)
    full = meets & (full_from <= key) & (full_to >= key + columns)
    first, end = _first(meets), meets.shape[-1] - _first(meets[..., ::-1])
    some, some_full = meets.any(-1), full.any(-1)
    first, end = jnp.where(some, first, 0), jnp.where(some, end, 0)
    first_full = jnp.where(some_full, _first(full), end)
    later = ~full & (jnp.arange(full.shape[-1]) >= first_full[..., None])
    end_full = jnp.where(later.any(-1), jnp.minimum(_first(later), end), end)
    end_full = jnp.maximum(end_full, first_full)
    return _operands(found, jnp.stack([first, first_full, end_full, end], -1))


def _of_tiles(found: Ranges, problem: Problem, rows: int) -> tuple[Array, Array, Array, Array]:
    """Of each tile of queries the range of keys that any sees and the one that all see, `[B or 1, tiles]`."""
    ends = jnp.full((1, problem.queries), problem.keys) if found.ends is None else found.ends
    starts = jnp.zeros_like(ends) if found.starts is None else found.starts
    starts, ends, exact = jnp.broadcast_arrays(starts, ends, True if found.exact is None else found.exact)
    starts, ends, exact = (x.reshape(x.shape[0], -1, rows) for x in (starts, ends, exact))
    some = starts < ends
    least = jnp.where(some, starts, problem.keys).min(-1)
    most = jnp.where(some, ends, 0).max(-1)
    full_to = jnp.where(exact & some, ends, 0).min(-1)
    return jnp.minimum(least, most), most, starts.max(-1), full_to


def _first(flags: Array) -> Array:
    return jnp.argmax(flags, axis=-1)


def _operands(found: Ranges, bounds: Array) -> MaskOperands:
    ids = found.query_ids, found.key_ids
    return MaskOperands(bounds.astype(jnp.int32), found.other_starts, found.other_ends, *ids)


def _extended(array: Array | None, length: int) -> Array | None:
    """The last value repeated up to `length`."""
    if array is None:
        return None
    return jnp.pad(array, [(0, 0), (0, length - array.shape[1])], mode="edge")
