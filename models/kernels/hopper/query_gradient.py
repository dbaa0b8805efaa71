"""The kernel of the gradient with respect to the queries: a block holds queries and goes over the keys.

The weights are computed again from the scores and the log-sum-exp; while their exponentials are taken, the
tensor cores multiply values with the output's gradient.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from .bias_tiles import Slopes
from .operations import Ref
from .problem import CONSUMERS, Problem, Tiles, tiled
from .query_block import Operands, QueryBlock, Rings, grid
from .scores import Visible, score_gradient, weigh


class Gradients(NamedTuple):
    """What the backward pass reads besides; `lse` to base 2, infinite where no key is seen.

    `delta` is over `Problem.kept`, and with it what the kernels sum up until they write it.
    """

    d_out: Any
    lse: Any
    delta: Any


class _Scratch(NamedTuple):
    queries: Any  # and then their gradient
    d_out: Any
    loaded: Any
    rings: Rings


class _Rows(NamedTuple):
    """What stays while a warpgroup goes over the keys."""

    queries: Ref
    d_out: Ref
    lse: Array
    delta: Array
    visible: Visible
    hashes: Array | None


def query_gradient(
    problem: Problem, tiles: Tiles, operands: Operands, gradients: Gradients
) -> tuple[Array, Array | None]:
    """The gradient with respect to q, `[B, T, H, K]`, and each query's part of that of ALiBi's slopes."""
    rows = (CONSUMERS, tiles.queries, problem.width)
    scratch = _Scratch(
        tiled(rows, problem.dtype),
        tiled(rows, problem.dtype),
        plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
        Rings.scratch(problem, tiles, operands),
    )
    dq = jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype)
    slopes = jax.ShapeDtypeStruct((problem.batch, problem.heads, problem.queries), jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_body, problem, tiles),
        out_type=[dq, slopes if isinstance(operands.bias, Slopes) else None],
        scratch_types=(scratch,),
        **grid(problem, tiles, "attention_query_gradient"),
    )
    return tuple(kernel(operands, gradients))


def _body(
    problem: Problem,
    tiles: Tiles,
    operands: Operands,
    gradients: Gradients,
    dq: Ref,
    d_slopes: Ref | None,
    scratch: _Scratch,
) -> None:
    block = QueryBlock.here(problem, tiles, operands, scratch.rings)
    block.run(lambda: _compute(block, gradients, scratch, dq, d_slopes))


def _compute(
    block: QueryBlock, gradients: Gradients, scratch: _Scratch, dq: Ref, d_slopes: Ref | None
) -> None:
    operations, size = block.problem.operations, block.tiles.queries
    queries, d_out, loaded = (
        ref.at[block.warpgroup] for ref in (scratch.queries, scratch.d_out, scratch.loaded)
    )
    index = (block.batch, block.rows, block.head)
    numbers = (block.batch, block.head, block.rows)
    plgpu.copy_gmem_to_smem(block.operands.q.at[index], queries, loaded)
    plgpu.copy_gmem_to_smem(gradients.d_out.at[index], d_out, loaded)
    lse, delta = (operations.row_values(ref.at[numbers]) for ref in (gradients.lse, gradients.delta))
    row = _Rows(queries, d_out, lse, delta, block.visible(), block.query_hashes())
    plgpu.barrier_wait(loaded)
    start = (
        operations.filled_tile((size, block.problem.width), 0),
        None if d_slopes is None else operations.filled_rows(size, 0),
    )
    total, of_slope = block.loop(functools.partial(_step, block, row), start)
    queries[...] = (total * (block.problem.scale * block.problem.kept)).astype(queries.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, dq.at[index])
    if d_slopes is not None:
        d_slopes[numbers] = of_slope * block.problem.kept
    plgpu.wait_smem_to_gmem(0)


def _step(
    block: QueryBlock, row: _Rows, tile: Array, carry: tuple[Array, Array | None]
) -> tuple[Array, Array | None]:
    operations, slot, (total, of_slope) = block.problem.operations, block.slot(tile), carry
    keys, values = (ring.buffers[0].at[slot] for ring in block.rings)

    def respond(products: Array) -> Array:
        found = block.scores(row.visible, tile, products)
        return weigh(block.problem, found, row.lse, 0, block.keep(row.hashes, tile))[1]

    for ring in block.rings:
        ring.wait(slot)
    both = (row.queries, keys), (row.d_out, values)
    response, d_weights = operations.two_products(*both, respond)
    block.rings.values.release(slot)
    d_scores = score_gradient(block.problem, response, d_weights, row.delta, 0)
    total = operations.add_product(total, d_scores.astype(block.problem.dtype), keys)
    block.rings.release_keys(slot)
    if of_slope is not None:  # computed again: behind the barrier the compiler does not know it from before
        distance = block.distance(lax.optimization_barrier(tile))
        assert distance is not None
        of_slope -= (d_scores * distance).sum(axis=1)
    return total, of_slope
