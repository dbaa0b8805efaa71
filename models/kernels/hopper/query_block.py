"""A block of threads that holds queries and goes over the keys: what the forward and the dq kernel share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import dropping
from .bias_tiles import BiasTiles, Operand, Slopes, buffers, tile_parts, tile_values
from .masking import Bounds, MaskOperands, read_bounds, read_visible, where_needed, with_key_ids
from .operations import Ref, Warpgroup
from .problem import CONSUMERS, REGISTERS_TO_COMPUTE, REGISTERS_TO_COPY, Problem, Tiles, tiled
from .ring import Index, Ring, copy_all
from .scores import MASKED, Scores, Visible, hide, mask_scores, scores


class Operands(NamedTuple):
    """What both kernels read."""

    q: Any
    k: Any
    v: Any
    mask: MaskOperands
    bias: Operand | None
    hashes: dropping.Hashes | None = None
    allowed: BiasTiles | None = None  # a dense mask's zeros and ones

    def parts(self, batch: Index, head: Index, block: Index, other: Index) -> tuple[list[Ref], ...]:
        """What is copied for one tile to the last buffers of a ring: of the dense mask, of the bias."""
        return tuple(
            part for each in (self.allowed, self.bias) for part in tile_parts(each, batch, head, block, other)
        )

    def buffers(self, stages: int) -> tuple[Any, ...]:
        """Shared memory for them."""
        return (*buffers(self.allowed, stages), *buffers(self.bias, stages))

    def allowed_tile(self, operations: Warpgroup, ring: Ring, slot: Index, warpgroup: Index) -> Array | None:
        """A warpgroup's tile of the dense mask, from the ring, in registers."""
        if self.allowed is None:
            return None
        buffer = ring.buffers[-2 if isinstance(self.bias, BiasTiles) else -1]
        return operations.tile(buffer.at[slot, warpgroup]).astype(jnp.float32)


class Rings(NamedTuple):
    """Tiles of keys, with the keys' hashes and tiles of dense mask and bias, and tiles of values."""

    keys: Ring
    values: Ring

    @classmethod
    def scratch(cls, problem: Problem, tiles: Tiles, operands: Operands) -> Rings:
        """What a kernel asks for."""
        ring = tiled((tiles.stages, tiles.keys, problem.width), problem.dtype)
        hashes = dropping.buffers(problem.rate > 0, tiles.stages, tiles.keys)
        with_keys = operands.buffers(tiles.stages)
        return cls(Ring.scratch(tiles.stages, [ring, *hashes], with_keys), Ring.scratch(tiles.stages, [ring]))

    def release_keys(self, slot: Index) -> None:
        """This warpgroup needs a tile of keys no more, nor what came with it, which threads read."""
        self.keys.release(slot, read=len(self.keys.buffers) > 1)


class QueryBlock(NamedTuple):
    """One block: which queries it holds and which tiles of keys it goes over."""

    problem: Problem
    tiles: Tiles
    operands: Operands
    rings: Rings
    batch: Array
    head: Array
    tile: Array
    bounds: Bounds
    warpgroup: Array

    @classmethod
    def here(cls, problem: Problem, tiles: Tiles, operands: Operands, rings: Rings) -> QueryBlock:
        """The block that this thread belongs to."""
        batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
        if operands.mask.ends is not None:  # the longest rows first: with a causal mask the last
            tile = problem.queries // (CONSUMERS * tiles.queries) - 1 - tile
        bounds = read_bounds(operands.mask, batch, tile, problem.keys // tiles.keys)
        return cls(problem, tiles, operands, rings, batch, head, tile, bounds, lax.axis_index("warpgroup"))

    def run(self, compute: Callable[[], None]) -> None:
        """Two warpgroups compute, one copies."""

        @pl.when(self.warpgroup < CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS_TO_COMPUTE, action="increase")
            compute()

        @pl.when(self.warpgroup == CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS_TO_COPY, action="decrease")
            copy_all(self.rings, self.bounds.end - self.bounds.first, self._sources)

    def _sources(self, step: Index) -> Any:
        tile, size = self.bounds.first + step, self.tiles.keys
        head = lax.div(self.head, jnp.asarray(self.problem.group, jnp.int32))
        index = (self.batch, pl.ds(tile * size, size), head)
        of_keys = None if self.operands.hashes is None else self.operands.hashes.keys
        hashes = dropping.sources(of_keys, (self.batch, self.head, pl.ds(tile * size, size)))
        parts = self.operands.parts(self.batch, self.head, self.tile, tile)
        return (self.operands.k.at[index], *hashes, *parts), (self.operands.v.at[index],)

    @property
    def first_query(self) -> Array:
        """The first of this warpgroup's queries."""
        return (self.tile * CONSUMERS + self.warpgroup) * self.tiles.queries

    @property
    def rows(self) -> Any:
        """This warpgroup's queries."""
        return pl.ds(self.first_query, self.tiles.queries)

    def visible(self) -> Visible:
        """Which keys this warpgroup's queries see, but for the keys' ids."""
        mask = self.operands.mask._replace(key_ids=None)
        return read_visible(self.problem.operations, mask, self.batch, self.rows, None, 0)

    def query_hashes(self) -> Array | None:
        """Of this warpgroup's queries, for dropout."""
        if self.operands.hashes is None:
            return None
        return self.problem.operations.row_values(
            self.operands.hashes.queries.at[self.batch, self.head, self.rows]
        )

    def keep(self, query_hashes: Array | None, tile: Array) -> Array | None:
        """Which weights of a tile dropout keeps, while the tile's keys are in their ring."""
        if query_hashes is None:
            return None
        of_keys = self.problem.operations.column_values(self.rings.keys.buffers[1].at[self.slot(tile)])
        return dropping.keep(self.problem, query_hashes, of_keys, (self.tiles.queries, self.tiles.keys))

    def slot(self, tile: Array) -> Array:
        """The stage of the rings that holds a tile."""
        return self.rings.keys.slot(tile - self.bounds.first)

    def distance(self, tile: Array) -> Array | None:
        """How far apart the queries and keys of a tile are, for biases that go by it."""
        if not isinstance(bias := self.operands.bias, Slopes):
            return None
        shape = self.tiles.queries, self.tiles.keys
        first_key = tile * self.tiles.keys
        return bias.distance(self.problem.operations, shape, self.first_query, first_key, 1)

    def loop(self, step: Callable[[Array, Any], Any], start: Any) -> Any:
        """`carry = step(tile, carry)` for each tile of keys."""
        return lax.fori_loop(self.bounds.first, self.bounds.end, step, start)

    def scores(self, visible: Visible, tile: Array, products: Array, hidden: float = MASKED) -> Scores:
        """The scores of a tile from its products of queries and keys, `hidden` where the mask forbids."""
        operations, mask, buffer = self.problem.operations, self.operands.mask, self.rings.keys.buffers[-1]
        bias = tile_values(
            operations,
            self.operands.bias,
            lambda: buffer.at[self.slot(tile), self.warpgroup],
            self.head,
            self.distance(tile),
        )
        found = scores(self.problem, products, bias)
        first, size = tile * self.tiles.keys, self.tiles.keys

        def apply(value: Array) -> Array:
            seen = with_key_ids(operations, mask, visible, self.batch, pl.ds(first, size))
            return mask_scores(operations, value, seen, first, 1, hidden)

        value = where_needed(mask, self.bounds, tile, found.value, apply)
        dense = self.operands.allowed_tile(operations, self.rings.keys, self.slot(tile), self.warpgroup)
        return found._replace(value=hide(value, dense, hidden))


def grid(problem: Problem, tiles: Tiles, name: str) -> dict[str, Any]:
    """A block for each head, batch row and `CONSUMERS * tiles.queries` queries."""
    return {
        "grid": (problem.heads, problem.queries // (CONSUMERS * tiles.queries), problem.batch),
        "grid_names": ("head", "tile", "batch"),
        "num_threads": CONSUMERS + 1,
        "thread_name": "warpgroup",
        "kernel_name": name,
        "compiler_params": plgpu.CompilerParams(approx_math=True),
        "interpret": problem.operations.interpret,
    }
