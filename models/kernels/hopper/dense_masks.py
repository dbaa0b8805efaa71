"""Dense masks: read tile by tile, beside the range of keys that the rest of a mask shows each query."""

from __future__ import annotations

import functools
import operator

import jax.numpy as jnp
from jax import Array

from ..masks import And, Dense, Full, Mask
from ..ranges import Ranges, no_ranges


def split(mask: Mask) -> tuple[list[Dense], Mask]:
    """The dense parts of an intersection, or of one mask, and the rest."""
    parts = mask.parts if isinstance(mask, And) else (mask,)
    dense = [part for part in parts if isinstance(part, Dense)]
    others = tuple(part for part in parts if not isinstance(part, Dense))
    return dense, And(others) if len(others) > 1 else others[0] if others else Full()


def no_mask(mask: Mask, queries: int, keys: int) -> str | None:
    """Why the kernels cannot read a mask, of arrays or their shapes, or None."""
    dense, rest = split(mask)
    if any(part.allowed.shape[2:] != (queries, keys) for part in dense):
        return "its dense masks have a row for every query and a column for every key"
    return no_ranges(rest, queries, keys)


def allowed(dense: list[Dense], queries: int, keys: int) -> Array | None:
    """What all of them allow, bool `[1 or B, 1 or H, T, S]`, padded with what is not to be seen."""
    if not dense:
        return None
    found = functools.reduce(operator.and_, (jnp.asarray(part.allowed) for part in dense))
    return jnp.pad(found, [(0, 0), (0, 0), (0, queries - found.shape[2]), (0, keys - found.shape[3])])


def within(seen: Ranges, dense: Array | None) -> Ranges:
    """`seen` no wider than the first to the last key that any head shows a query, for whole tiles to be left.

    What remains to be compared stays: tiles inside these ranges read the dense mask all the same.
    """
    if dense is None:
        return seen
    shown = dense.any(1)
    starts, ends = jnp.argmax(shown, -1), shown.shape[-1] - jnp.argmax(shown[..., ::-1], -1)
    starts = starts if seen.starts is None else jnp.maximum(starts, seen.starts)
    ends = ends if seen.ends is None else jnp.minimum(ends, seen.ends)
    some = shown.any(-1) & (starts < ends)
    starts, ends = (jnp.where(some, x, 0).astype(jnp.int32) for x in (starts, ends))
    return seen._replace(starts=starts, ends=ends)
