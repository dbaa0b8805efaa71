"""Masks as one range of keys a query, which kernels can go over without looking at single keys.

Causal masks, windows, prefixes and lengths show each query the keys from a first to a last, and so do
intersections of them. Packed documents do when the tokens of each lie together; `Ranges` gives the hull and
says where it is exact, so that ids that are mixed are right too, only slower.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .flags import Keys, Queries
from .masks import And, Causal, Full, Lengths, Mask, Not, Or, Prefix, Segments, Window, describe
from .trees import AnyArray

Interval = tuple[Array | None, Array | None]  # None: from the first key, to the last


class Ranges(NamedTuple):
    """Query i sees key j where `starts[i] <= j < ends[i]` and `query_ids[i] == key_ids[j]`, if there are ids.

    All int32 `[B or 1, T]`, `key_ids [B or 1, S]`; `starts` None is 0, `ends` None is S. A row that sees
    nothing has both 0, if it has both. `exact [B or 1, T]` says where the range alone is the mask although
    there are ids, which may be all but the least int32. `other_starts` and `other_ends` are what remains to
    be compared besides ids: `starts` and `ends` without what follows from ids.
    """

    starts: Array | None = None
    ends: Array | None = None
    query_ids: Array | None = None
    key_ids: Array | None = None
    exact: Array | None = None
    other_starts: Array | None = None
    other_ends: Array | None = None


class _NoRange(Exception):
    """The reason why a mask is no range a query."""


def no_ranges(mask: Mask, queries: int, keys: int) -> str | None:
    """Why `ranges` cannot express this mask, of arrays or their shapes, or None."""
    try:
        jax.eval_shape(lambda given: ranges(given, queries, keys), mask)
    except _NoRange as reason:
        return str(reason)
    return None


def ranges(mask: Mask, queries: int, keys: int) -> Ranges:
    """What each query sees; only for masks for which `no_ranges` is None."""
    parts = mask.parts if isinstance(mask, And) else (mask,)
    by_id = [part for part in parts if _id_pair(part, queries) is not None]
    others = tuple(part for part in parts if _id_pair(part, queries) is None)
    interval = _intersection([_interval(part, queries, keys) for part in others])
    alone = _normal(interval, keys)
    if not by_id:
        return Ranges(*alone, None, None, None, *alone)
    query_ids, key_ids = _joined_ids(by_id, queries)
    start, end, exact = _hull(query_ids, key_ids)
    starts, ends = _normal(_intersection([interval, (start, end)]), keys)
    query_ids = jnp.where(query_ids == 0, jnp.iinfo(jnp.int32).min, query_ids)
    return Ranges(starts, ends, query_ids, key_ids, exact, *alone)


def _interval(mask: Mask, queries: int, keys: int) -> Interval:
    row = jnp.arange(queries, dtype=jnp.int32)[None, :]
    match mask:
        case Full():
            return None, None
        case Causal(offset=offset):
            return None, row + 1 + _column(offset)
        case Window(left=left, right=right, offset=offset):
            at = row + _column(offset)
            return None if left is None else at - left, None if right is None else at + right + 1
        case Prefix(lengths=lengths, offset=offset):
            return None, jnp.maximum(_column(lengths), row + 1 + _column(offset))
        case Lengths(lengths=lengths):
            return None, jnp.zeros_like(row) + _column(lengths)
        case Queries(flags=flags):
            return None, jnp.where(flags, keys, 0).astype(jnp.int32)
        case And(parts=parts):
            return _intersection([_interval(part, queries, keys) for part in parts])
        case Or(parts=parts):
            return _union(mask, [_interval(part, queries, keys) for part in parts])
        case Not(part=part):
            return _complement(mask, _interval(part, queries, keys), queries, keys)
    raise _NoRange(f"{describe(mask)} does not show each query one range of keys")


def _column(value: int | AnyArray) -> Array:
    """A number, or one a batch row, as `[1 or B, 1]`."""
    return jnp.reshape(jnp.asarray(value, jnp.int32), (-1, 1))


def _intersection(intervals: list[Interval]) -> Interval:
    starts = [start for start, _ in intervals if start is not None]
    ends = [end for _, end in intervals if end is not None]
    return (
        functools.reduce(jnp.maximum, starts) if starts else None,
        functools.reduce(jnp.minimum, ends) if ends else None,
    )


def _union(mask: Mask, intervals: list[Interval]) -> Interval:
    """Of ranges that all begin at the first key or all end at the last."""
    if any(start is None and end is None for start, end in intervals):
        return None, None
    if all(start is None for start, _ in intervals):
        return None, functools.reduce(jnp.maximum, [end for _, end in intervals if end is not None])
    if all(end is None for _, end in intervals):
        return functools.reduce(jnp.minimum, [start for start, _ in intervals if start is not None]), None
    raise _NoRange(f"the union {describe(mask)} may have a gap")


def _complement(mask: Mask, interval: Interval, queries: int, keys: int) -> Interval:
    start, end = interval
    if start is None:
        return (jnp.full((1, queries), keys, jnp.int32) if end is None else end), None
    if end is None:
        return None, start
    raise _NoRange(f"{describe(mask)} shows what lies on both sides of a range")


def _normal(interval: Interval, keys: int) -> Interval:
    """Within the keys, and 0 to 0 for a row that sees nothing, whose bounds are not to widen a tile's."""
    start, end = interval
    if start is None:
        return None, None if end is None else jnp.clip(end, 0, keys)
    last = jnp.full_like(start, keys) if end is None else jnp.minimum(end, keys)
    start = jnp.maximum(start, 0)
    some = start < last
    return jnp.where(some, start, 0), jnp.where(some, last, 0)


def _id_pair(mask: Mask, queries: int) -> tuple[Array, Array] | None:
    """Ids of queries and keys, 0 for those that see nothing or are not seen, if the mask compares ids."""
    match mask:
        case Segments():
            return jnp.asarray(mask.query, jnp.int32), jnp.asarray(mask.keys(), jnp.int32)
        case Keys(flags=flags):
            return jnp.ones((1, queries), jnp.int32), jnp.asarray(flags, jnp.int32)
        case Not(part=Keys(flags=flags)):
            return _id_pair(Keys(~flags), queries)
    return None


def _joined_ids(parts: list[Mask], queries: int) -> tuple[Array, Array]:
    """One pair of ids for several masks: flags of keys set the ids of the others to 0."""
    segments = [part for part in parts if isinstance(part, Segments)]
    if len(segments) > 1:
        raise _NoRange("two masks of segments would have to be compared at once")
    first = segments[0] if segments else parts[0]
    pair = _id_pair(first, queries)
    assert pair is not None
    query_ids, key_ids = pair
    for part in parts:
        if part is not first and (other := _id_pair(part, queries)) is not None:
            key_ids = jnp.where(other[1] == 0, 0, key_ids)
    return query_ids, key_ids


def _hull(query_ids: Array, key_ids: Array) -> tuple[Array, Array, Array]:
    """The first key of each query's id, the end after the last, and whether all between have it too.

    Padding, id 0, is given an empty range here, so kernels need not know about it.
    """
    batch = max(query_ids.shape[0], key_ids.shape[0])
    query_ids = jnp.broadcast_to(query_ids, (batch, query_ids.shape[1]))
    key_ids = jnp.broadcast_to(key_ids, (batch, key_ids.shape[1]))
    order = jnp.argsort(key_ids, axis=1, stable=True).astype(jnp.int32)
    ordered = jnp.take_along_axis(key_ids, order, axis=1)
    find = [jax.vmap(functools.partial(jnp.searchsorted, side=side)) for side in ("left", "right")]
    low, high = (search(ordered, query_ids).astype(jnp.int32) for search in find)
    some = (low < high) & (query_ids != 0)
    first = jnp.take_along_axis(order, jnp.where(some, low, 0), axis=1)
    last = jnp.take_along_axis(order, jnp.where(some, high - 1, 0), axis=1)
    exact = ~some | (last - first + 1 == high - low)
    return jnp.where(some, first, 0), jnp.where(some, last + 1, 0), exact
