"""A bias that goes by how the segments of query and key are related, and by distance within one segment.

CPM-Ant and CPM-Bee (OpenBMB/CPM-Live, OpenBMB/CPM-Bee: `SegmentPositionEmbedding`, `BucketPositionBias`) cut
their inputs into segments: a prompt, a text, the names and values of a JSON tree.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import Array

from .biases import Bias, distance_buckets
from .masks import Sizes
from .spans import Span, pad
from .trees import AnyArray, structural

T = TypeVar("T")


@structural
class Relations(Bias):
    """`table[row(query, key), head]`, the row by relation; `table` is `[buckets + R, H]`.

    `relations [B, T, N]` holds for each query its relation to each of N segments, of which the key's is
    `segments[b, key]`, `[B, S]`. Relation 0 reads the bucket of the distance between `query_positions [B, T]`
    and `key_positions [B, S]` in T5's bidirectional formula (see `Bucketed`), relation r > 0 reads row
    `buckets + r - 1`. Where `query_groups [B, T]` and `key_groups [B, S]` are given and differ, the relation
    is `apart`.
    """

    table: AnyArray
    relations: AnyArray
    segments: AnyArray
    query_positions: AnyArray
    key_positions: AnyArray
    query_groups: AnyArray | None = None
    key_groups: AnyArray | None = None
    buckets: int = 512
    max_distance: int = 2048
    apart: int = 1

    def tile(self, rows: Span, columns: Span) -> Array:
        """The rows of the table, `[B or 1, H, t, s]`."""
        return jnp.asarray(self.table)[self.row(rows, columns)].transpose(0, 3, 1, 2)

    def row(self, rows: Span, columns: Span) -> Array:
        """Which row of the table each pair of a tile reads, int32 `[B or 1, t, s]`."""
        relation = self._relation(rows, columns)
        query, key = rows.cut(self.query_positions, 1), columns.cut(self.key_positions, 1)
        distance = key[:, None, :] - query[:, :, None]
        half = self.buckets // 2
        one_side = jnp.asarray(distance_buckets(half, self.max_distance))
        bucket = one_side[jnp.minimum(jnp.abs(distance), self.max_distance)]
        bucket = bucket + jnp.where(distance > 0, half, 0)
        return jnp.where(relation == 0, bucket, self.buckets + relation - 1)

    def _relation(self, rows: Span, columns: Span) -> Array:
        relations, segments = rows.cut(self.relations, 1), columns.cut(self.segments, 1)
        batch = max(relations.shape[0], segments.shape[0])
        relations = jnp.broadcast_to(relations, (batch, *relations.shape[1:]))
        segments = jnp.broadcast_to(segments[:, None], (batch, relations.shape[1], segments.shape[1]))
        found = jnp.take_along_axis(relations, segments, axis=2)
        if self.query_groups is None or self.key_groups is None:
            return found
        query, key = rows.cut(self.query_groups, 1), columns.cut(self.key_groups, 1)
        return jnp.where(query[:, :, None] == key[:, None, :], found, self.apart)

    def mismatch(self, sizes: Sizes) -> str | None:
        """A column a head, buckets for the formula, and an entry for each query and key."""
        shape = jnp.shape(self.table)
        if len(shape) != 2 or shape[1] != sizes.heads or shape[0] <= self.buckets:
            return f"Relations.table has shape {list(shape)}; it must be [> {self.buckets}, {sizes.heads}]"
        if self.buckets < 4 or self.buckets % 2:
            return f"Relations.buckets is {self.buckets}; it must be even and at least 4"
        if self.max_distance <= self.buckets // 4:
            return f"Relations.max_distance is {self.max_distance}; it must exceed {self.buckets // 4}"
        if (self.query_groups is None) != (self.key_groups is None):
            return "Relations has groups of queries or of keys alone; give both or neither"
        return self._sides_mismatch(sizes)

    def _sides_mismatch(self, sizes: Sizes) -> str | None:
        for name, length in _sides(sizes.queries, sizes.keys).items():
            if (array := getattr(self, name)) is None:
                continue
            shape, axes = jnp.shape(array), 3 if name == "relations" else 2
            if len(shape) != axes or shape[0] not in (1, sizes.batch) or shape[1] != length:
                want = ", ".join(map(str, [sizes.batch, length, "N"][:axes]))
                return f"Relations.{name} has shape {list(shape)}; it must be [{want}]"
        return None

    def extended(self, queries: int, keys: int) -> "Relations":
        """Zeros beyond."""
        return self._changed(_sides(queries, keys), lambda array, length: pad(array, 1, length))

    def cut(self, rows: Span, columns: Span) -> "Relations":
        """The parts of the arrays."""
        return self._changed(_sides(rows, columns), lambda array, span: span.cut(array, 1))

    def _changed(self, sides: dict[str, T], change: Callable[[AnyArray, T], Array]) -> "Relations":
        changed: dict[str, Any] = {}
        for name, side in sides.items():
            array = getattr(self, name)
            changed[name] = None if array is None else change(array, side)
        return dataclasses.replace(self, **changed)


def _sides(queries: T, keys: T) -> dict[str, T]:
    """Which of the two each array has along its second axis."""
    of_queries = ("relations", "query_positions", "query_groups")
    of_keys = ("segments", "key_positions", "key_groups")
    return dict.fromkeys(of_queries, queries) | dict.fromkeys(of_keys, keys)
