"""The forward kernel: one warpgroup copies keys and values, two others compute, taking turns.

A block holds queries of one head, half for each computing warpgroup, and goes over the tiles of keys that any
of them sees. While one warpgroup takes exponentials the other multiplies matrices: Shah et al. 2024,
"FlashAttention-3", §3.1; the order of the waits follows JAX's own example, `attention_mgpu.py`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .bias_tiles import BiasTiles
from .operations import Ref
from .problem import CONSUMERS, Problem, Tiles, tiled
from .query_block import Operands, QueryBlock, Rings, grid
from .scores import Visible, along

Sums = tuple[Array, Array, Array]  # of weighted values; the maximum, to base 2; of weights


class _Scratch(NamedTuple):
    queries: Any  # and then the output
    lse: Any
    loaded: Any
    turn: Any
    rings: Rings


class _Rows(NamedTuple):
    """What stays of a warpgroup's queries while it goes over the keys."""

    visible: Visible
    hashes: Array | None


def forward(problem: Problem, tiles: Tiles, operands: Operands) -> tuple[Array, Array]:
    """Output `[B, T, H, K]` and natural log-sum-exp `[B, H, T]`, -inf where a query sees no key."""
    rows = (CONSUMERS, tiles.queries)
    scratch = _Scratch(
        tiled((*rows, problem.width), problem.dtype),
        plgpu.SMEM(rows, jnp.float32),
        plgpu.Barrier(num_barriers=CONSUMERS),
        plgpu.Barrier(num_arrivals=CONSUMERS),
        Rings.scratch(problem, tiles, operands),
    )
    out = jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype)
    lse = jax.ShapeDtypeStruct((problem.batch, problem.heads, problem.queries), jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_body, problem, tiles),
        out_type=(out, lse),
        scratch_types=(scratch,),
        **grid(problem, tiles, "attention_forward"),
    )
    return kernel(operands)


def _body(problem: Problem, tiles: Tiles, operands: Operands, out: Ref, lse: Ref, scratch: _Scratch) -> None:
    block = QueryBlock.here(problem, tiles, operands, scratch.rings)
    block.run(lambda: _compute(block, scratch, out, lse))


def _compute(block: QueryBlock, scratch: _Scratch, out: Ref, lse: Ref) -> None:
    queries, sums, loaded = (
        ref.at[block.warpgroup] for ref in (scratch.queries, scratch.lse, scratch.loaded)
    )
    plgpu.copy_gmem_to_smem(block.operands.q.at[block.batch, block.rows, block.head], queries, loaded)
    plgpu.barrier_wait(loaded)
    pl.when(block.bounds.first < block.bounds.end)(lambda: block.rings.keys.wait(0))
    pl.when(block.warpgroup == 1)(lambda: _take_turns(scratch.turn))
    found = _over_keys(block, scratch.turn, queries)
    pl.when(block.warpgroup == 0)(lambda: _take_turns(scratch.turn))
    value, log_sum = finished(found)
    if block.problem.rate:
        value *= block.problem.kept
    queries[...], sums[...] = value.astype(queries.dtype), log_sum
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, out.at[block.batch, block.rows, block.head])
    plgpu.copy_smem_to_gmem(sums, lse.at[block.batch, block.head, block.rows])
    plgpu.wait_smem_to_gmem(0)


def _take_turns(turn: Ref) -> None:
    """Wait until the other computing warpgroup is here too."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _over_keys(block: QueryBlock, turn: Ref, queries: Ref) -> Sums:
    operations, size, visible = block.problem.operations, block.tiles.queries, block.visible()
    start = (
        operations.filled_tile((size, block.problem.width), 0),
        operations.filled_rows(size, -jnp.inf),
        operations.filled_rows(size, 0),
    )
    step = functools.partial(_step, block, turn, queries, _Rows(visible, block.query_hashes()))
    return block.loop(step, start)


def _step(block: QueryBlock, turn: Ref, queries: Ref, rows: _Rows, tile: Array, sums: Sums) -> Sums:
    (keys, values), operations, slot = block.rings, block.problem.operations, block.slot(tile)
    products = operations.product(queries, keys.buffers[0].at[slot], meanwhile=lambda: _take_turns(turn))
    value, factor = block.scores(rows.visible, tile, products, hidden=-jnp.inf)
    keep = block.keep(rows.hashes, tile)
    block.rings.release_keys(slot)
    # a row of a tile may be minus infinity
    no_key = block.operands.mask.bounds is not None or isinstance(block.operands.bias, BiasTiles)
    total, top, weights, low = softmax(sums, value, factor, no_key)
    low = (low if keep is None else jnp.where(keep, low, 0.0)).astype(block.problem.dtype)
    total, weights, top, low = lax.optimization_barrier((total, weights, top, low))
    plgpu.barrier_arrive(turn)
    values.wait(slot)
    plgpu.barrier_wait(turn)
    following = functools.partial(_wait_for_next, block, tile)
    total = operations.add_product(total, low, values.buffers[0].at[slot], meanwhile=following)
    values.release(slot)
    return total, top, weights


def softmax(sums: Sums, value: Array, factor: float, no_key: bool) -> tuple[Array, Array, Array, Array]:
    """The sums before a tile at its new maximum, the sum of weights with the tile, and the tile's weights."""
    total, top, weights = sums
    old, top = top, jnp.maximum(top, value.max(axis=1) * factor)
    base = jnp.where(top == -jnp.inf, 0.0, top) if no_key else top
    shrink = jnp.exp2(old - base)
    low = jnp.exp2(value * factor - along(base, value.shape, 0))
    return total * along(shrink, total.shape, 0), top, weights * shrink + low.sum(axis=1), low


def finished(sums: Sums) -> tuple[Array, Array]:
    """The weighted mean of values, and the natural log-sum-exp; 0 and -inf of no key."""
    total, top, weights = sums
    empty = weights == 0
    inverse = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, weights))
    log_sum = jnp.where(empty, -jnp.inf, top * jnp.log(2.0) + jnp.log(weights))
    return total * along(inverse, total.shape, 0), log_sum


def _wait_for_next(block: QueryBlock, tile: Array) -> None:
    following = block.slot(tile + 1)
    pl.when(tile + 1 < block.bounds.end)(lambda: block.rings.keys.wait(following))
