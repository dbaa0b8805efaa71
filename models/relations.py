"""Positions within segments: CPM-Ant's kinds of segments and CPM-Bee's trees of them.

A token has a place and a segment. Within a segment the attention scores are biased by distance, between two
segments by how these are related: `kernels.Relations` says how the table is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from .kernels import Bias, Relations
from .positions import Positions
from .precision import Precision
from .rotary import inverse_frequencies, rotate_pairs
from .tables import look_up


@struct.dataclass
class SegmentPositions:
    """Index and kind of segment of each token, both int `[B, T]`."""

    index: jax.Array
    segment: jax.Array


@dataclass(frozen=True)
class SegmentRelations(Positions):
    """CPM-Ant: a vector for each kind of segment, and a bias by distance or by the pair of kinds.

    Positions are `SegmentPositions`; a plain array `[B, T]` is the index of tokens in segment 0. The vectors,
    times `scale`, are added to the words (`type_embedding/table` `[kinds, D]`). `relative_bias/table`
    `[buckets + kinds², H]` is shared by all layers (OpenBMB/CPM-Live, branch cpm-ant,
    `SegmentPositionEmbedding`). `prompt_length` is how many of the model's `input_rows` make one prompt.
    """

    kinds: int = 32
    buckets: int = 512
    max_distance: int = 2048
    scale: float = 1.0
    prompt_length: int = 32

    def embedding(self, width: int, precision: Precision, std: float) -> nn.Module:
        """Looks segments up."""
        return KindsModule(self, width, precision, std, name="type_embedding")

    def bias(self, heads: int, bidirectional: bool, precision: Precision, std: float) -> nn.Module:
        """Holds the table of distances and pairs of kinds."""
        return RelationsModule(self, self.kinds**2, heads, precision, name="relative_bias")

    def advance(self, positions: Any) -> SegmentPositions:
        """The next index, in the segment of the last token."""
        last = jax.tree.map(lambda each: each[:, -1:], as_segments(positions))
        return SegmentPositions(last.index + 1, last.segment)

    def relate(self, table: jax.Array, queries: Any, keys: Any) -> Relations:
        """The bias: different kinds a of the query and b of the key have relation `1 + kinds a + b`."""
        query, key = as_segments(queries), as_segments(keys)
        kinds = jnp.arange(self.kinds)
        own = query.segment[..., None]
        relations = jnp.where(own == kinds, 0, 1 + own * self.kinds + kinds)
        return Relations(
            table,
            relations,
            key.segment,
            query.index,
            key.index,
            buckets=self.buckets,
            max_distance=self.max_distance,
        )


def as_segments(positions: Any) -> SegmentPositions:
    """`positions`, or an array `[B, T]` as the indices of one segment."""
    if isinstance(positions, SegmentPositions):
        return positions
    return SegmentPositions(positions, jnp.zeros_like(positions))


@struct.dataclass
class TreePositions:
    """Where each token stands in a row of trees; int `[B, T]` each, `relations` `[B, T, N]`.

    `index` counts within the token's text. `segment` is the node of the tree, numbered from 0 in each tree.
    `group` tells the trees of a row apart. `relations` is the row of the token's node in its tree's table
    of relations: entry n is that to node n, 0 to itself. `sub` tells words of one name apart, `<ans_0>` from
    `<ans_1>`; 0 leaves the word's vector as it is.
    """

    index: jax.Array
    segment: jax.Array
    group: jax.Array
    relations: jax.Array
    sub: jax.Array


@dataclass(frozen=True)
class TreeRelations(Positions):
    """CPM-Bee: a bias by distance in a text or by the relation of two nodes, and words turned by their `sub`.

    Positions are `TreePositions`; a plain array `[B, T]` is the index of tokens in one node.
    `relative_bias/table` is `[buckets + relations, H]`; relation 1 is that of two trees. All of a word's
    vector is rotated by the angles of position `sub_step * sub` (OpenBMB/CPM-Bee, `src/cpm_live/layers`,
    `BucketPositionBias` and `EmbeddingExt`).
    """

    buckets: int = 256
    relations: int = 256
    max_distance: int = 2048
    sub_step: int = 16
    base: float = 10_000.0

    def place(self, x: jax.Array, positions: Any) -> jax.Array:
        """Turned word vectors; angles and products in float32."""
        return self.turn(x, as_tree(positions).sub)

    def turn(self, x: jax.Array, sub: jax.Array) -> jax.Array:
        """Vectors `[..., D]` of words, each for its `sub` `[...]`."""
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        frequencies = jnp.asarray(inverse_frequencies(self.base, x.shape[-1]), dtype)
        angles = (sub * self.sub_step)[..., None].astype(dtype) * frequencies
        return rotate_pairs(x.astype(dtype), angles, False).astype(x.dtype)

    def bias(self, heads: int, bidirectional: bool, precision: Precision, std: float) -> nn.Module:
        """Holds the table of distances and relations."""
        return RelationsModule(self, self.relations, heads, precision, name="relative_bias")

    def advance(self, positions: Any) -> TreePositions:
        """The next index, in the node of the last token; its word is the first of its name."""
        last = jax.tree.map(lambda each: each[:, -1:], as_tree(positions))
        return last.replace(index=last.index + 1, sub=jnp.zeros_like(last.sub))

    def relate(self, table: jax.Array, queries: Any, keys: Any) -> Relations:
        """The bias of the rows of relations."""
        query, key = as_tree(queries), as_tree(keys)
        return Relations(
            table,
            query.relations,
            key.segment,
            query.index,
            key.index,
            query.group,
            key.group,
            buckets=self.buckets,
            max_distance=self.max_distance,
        )


def as_tree(positions: Any) -> TreePositions:
    """`positions`, or an array `[B, T]` as the indices of the text of one node."""
    if isinstance(positions, TreePositions):
        return positions
    zeros = jnp.zeros_like(positions)
    return TreePositions(positions, zeros, zeros, zeros[..., None], zeros)


class KindsModule(nn.Module):
    """A table of kinds of segments."""

    choice: SegmentRelations
    width: int
    precision: Precision
    std: float

    @nn.compact
    def __call__(self, positions: Any) -> jax.Array:
        shape = self.choice.kinds, self.width
        rows = look_up(self, shape, self.precision, self.std, as_segments(positions).segment)
        return rows if self.choice.scale == 1.0 else rows * jnp.asarray(self.choice.scale, rows.dtype)


class RelationsModule(nn.Module):
    """Holds the table of distances and `more` relations and hands it to the attention kernels.

    It starts from variance 1, as upstream.
    """

    choice: SegmentRelations | TreeRelations
    more: int
    heads: int
    precision: Precision

    @nn.compact
    def __call__(self, queries: Any, keys: Any, offset: int | jax.Array) -> Bias:
        shape, dtype = (self.choice.buckets + self.more, self.heads), jnp.dtype(self.precision.param)
        table = self.param("table", nn.initializers.normal(1.0), shape, dtype)
        return self.choice.relate(table, queries, keys)
