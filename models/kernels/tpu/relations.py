"""CPM's bias by relations inside a kernel: which row of the table each pair of a tile reads, and its value.

Which relation a pair has is a matrix product, of each query's relations with the keys' segments in unary: no
index is gathered. A bucket of the distance is computed by its logarithm and put right by a comparison, so
that no device's rounding decides. Then registers of the table are looked up lane by lane.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from ..biases import distance_buckets
from ..operands import Axes, standard
from ..relations import Relations
from .call import Block, Refs
from .pieces import Frame, Piece, Tile
from .plan import SUBLANES
from .products import split_product

_PART = 1 << 8  # integers up to this are exact in bfloat16
SIDES = {
    "segments": Axes.KEYS,
    "query_positions": Axes.QUERIES,
    "key_positions": Axes.KEYS,
    "query_groups": Axes.QUERIES,
    "key_groups": Axes.KEYS,
}


class RelationsInside(NamedTuple):
    """The table lies in memory whole, `[H, 1, rows]` padded to full registers; ids are read by blocks."""

    frame: Frame
    bias: Relations
    pieces: dict[str, Piece]

    @classmethod
    def of(cls, frame: Frame, bias: Relations) -> "RelationsInside":
        """Of a bias that was extended to the plan's lengths."""
        lengths, arrays = (frame.plan.queries, frame.plan.keys), {n: getattr(bias, n) for n in SIDES}
        found = {n: standard(a, SIDES[n], *lengths) for n, a in arrays.items() if a is not None}
        return cls(frame, bias, {name: Piece(frame, operand) for name, operand in found.items()})

    def scalars(self) -> dict[str, Array]:
        """None."""
        return {}

    def inputs(self) -> dict[str, tuple[Array, Block]]:
        """The table in the plan's unit, the borders of buckets, and the ids of queries and keys."""
        table = self.table(jnp.asarray(self.bias.table, jnp.float32)) * self.frame.plan.unit
        relations = self._relations()
        borders = _borders(self.bias.buckets // 2, self.bias.max_distance, self.frame.plan.lanes)
        by_batch, rows = relations.shape[0] > 1, self.frame.blocks.rows
        of_queries = Block(
            (None, relations.shape[1], rows), lambda at: (at.batch if by_batch else 0, 0, at.row)
        )
        return {
            "table": (table, Block((self.frame.heads, *table.shape[1:]), lambda at: (at.heads, 0, 0))),
            "borders": (jnp.asarray(borders), Block(borders.shape, lambda at: (0, 0))),
            "relations": (relations, of_queries),
            **{name: piece.input() for name, piece in self.pieces.items()},
        }

    def tile(self, refs: Refs, tile: Tile) -> Array:
        """The rows' values."""
        return lookup(refs.inputs["table"][tile.head], self.row(refs, tile), self.frame.plan.lanes)

    def row(self, refs: Refs, tile: Tile) -> Array:
        """Which row of the table each pair reads, int32."""
        bias, spread = self.bias, {name: piece for name, piece in self.pieces.items() if name != "segments"}
        read = {name: piece.load(refs.inputs[name], tile) for name, piece in spread.items()}
        relation = self._relation(refs, tile)
        if "query_groups" in read:
            relation = jnp.where(read["query_groups"] == read["key_groups"], relation, bias.apart)
        distance = read["key_positions"] - read["query_positions"]
        half = bias.buckets // 2
        bucket = self._bucket(refs, jnp.abs(distance)) + jnp.where(distance > 0, half, 0)
        return jnp.where(relation == 0, bucket, bias.buckets - 1 + relation)

    def table(self, table: Array) -> Array:
        """`[H, 1, length]` of `[rows, H]`, zeros beyond."""
        return jnp.pad(table, ((0, self.length() - table.shape[0]), (0, 0))).T[:, None]

    def length(self) -> int:
        """Of the table, a multiple of the lanes."""
        return -(-self.bias.table.shape[0] // self.frame.plan.lanes) * self.frame.plan.lanes

    def _relation(self, refs: Refs, tile: Tile) -> Array:
        """Of each pair, int32: low and high bytes lie one below the other, and the high ones count more."""
        relations = refs.inputs["relations"][...]
        segments = refs.inputs["segments"][0, :, tile.keys]
        shape = (relations.shape[0] // 2, segments.shape[1])
        unary = lax.broadcasted_iota(jnp.int32, shape, 0) == segments
        weights = jnp.concatenate([jnp.where(unary, value, 0) for value in (1.0, float(_PART))], 0)
        weights = weights.astype(jnp.bfloat16)
        left, right = (weights, relations) if self.frame.keys_first else (relations, weights)
        dimensions = (((0,), (0,)), ((), ()))
        found = lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)
        return found.astype(jnp.int32)

    def _bucket(self, refs: Refs, distance: Array) -> Array:
        """T5's bucket on one side: see `distance_buckets`."""
        count = self.bias.buckets // 2
        exact, lanes = count // 2, self.frame.plan.lanes
        far = jnp.minimum(distance, self.bias.max_distance).astype(jnp.float32)
        steps = (count - exact) / np.log(self.bias.max_distance / exact)
        guess = jnp.log(jnp.maximum(far, exact) * (1 / exact)) * steps
        guess = jnp.clip(guess.astype(jnp.int32), 0, count - exact - 1)
        start, end = (lookup(refs.inputs["borders"][i : i + 1], guess, lanes) for i in range(2))
        shared = exact + guess + jnp.where(far >= end, 1, 0) - jnp.where(far < start, 1, 0)
        return jnp.where(distance < exact, distance, shared)

    def _relations(self) -> Array:
        """`[B or 1, 2 N, T]`, low bytes above high ones, N filled up to registers."""
        relations = jnp.asarray(self.bias.relations, jnp.int32)
        missing = -relations.shape[2] % (2 * SUBLANES)
        relations = jnp.pad(relations, ((0, 0), (0, 0), (0, missing))).swapaxes(1, 2)
        relations = jnp.broadcast_to(relations, (*relations.shape[:2], self.frame.plan.queries))
        parts = jnp.concatenate([relations % _PART, relations // _PART], 1)
        return parts.astype(jnp.bfloat16)


def lookup(table: Array, index: Array, lanes: int) -> Array:
    """`table[0, index]` of a table `[1, n * lanes]` for each element of `index [a, m * lanes]`."""
    wide = [
        jnp.broadcast_to(table[:, i : i + lanes], (index.shape[0], lanes))
        for i in range(0, table.shape[1], lanes)
    ]
    parts = []
    for start in range(0, index.shape[1], lanes):
        part = index[:, start : start + lanes]
        register, lane = _split(part, lanes)
        found = _lanes_of(wide[0], lane)
        for number, each in enumerate(wide[1:], 1):
            found = jnp.where(register == number, _lanes_of(each, lane), found)
        parts.append(found)
    return jnp.concatenate(parts, 1)


def add_by_row(out: Any, d_scores: Array, row: Array, memory: Mapping[str, Any]) -> None:
    """Add each gradient to its row of the table, `out [registers, lanes]`; `memory` holds both of a tile.

    Query by query, a product of gradients by register and of keys by lane, both in unary.
    """
    registers, lanes = out.shape
    memory["d_scores"][...], memory["row"][...] = d_scores, row.astype(jnp.float32)
    by_lane, by_register = (
        lax.broadcasted_iota(jnp.int32, (count, row.shape[1]), 0) for count in (lanes, registers)
    )

    def query(i: Any, total: Array) -> Array:
        gradient, place = (memory[name][pl.ds(i, 1), :] for name in ("d_scores", "row"))
        place = place.astype(jnp.int32)
        register, lane = _split(place, lanes)
        unary = jnp.where(by_lane == lane, 1.0, 0.0).astype(jnp.bfloat16)
        left = jnp.where(by_register == register, gradient, 0.0)
        return total + split_product(left, unary, transposed=True)

    out[...] = out[...] + lax.fori_loop(0, row.shape[0], query, jnp.zeros((registers, lanes), jnp.float32))


def _split(index: Array, lanes: int) -> tuple[Array, Array]:
    """Register and lane; `lanes` is a power of two, and an integer division would ask for the sign."""
    return lax.shift_right_logical(index, jnp.int32(lanes.bit_length() - 1)), index & (lanes - 1)


def _lanes_of(register: Array, lane: Array) -> Array:
    return jnp.take_along_axis(register, lane, axis=1, mode="promise_in_bounds")


def _borders(count: int, max_distance: int, lanes: int) -> np.ndarray:
    """Where each shared bucket of one side begins, and where it ends, float32 `[2, n * lanes]`."""
    buckets, exact = distance_buckets(count, max_distance), count // 2
    begins = [int(np.argmax(buckets >= exact + k)) for k in range(count - exact)]
    ends = [*begins[1:], 1 << 24]
    missing = -len(begins) % lanes
    return np.pad(np.asarray([begins, ends], np.float32), ((0, 0), (0, missing)))
