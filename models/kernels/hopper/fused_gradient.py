"""All gradients in one kernel: a block holds keys, goes over the queries and adds to theirs in device memory.

The two kernels of `query_gradient` and `key_gradient` multiply seven times a tile, this one five. The copy
engine adds in float32 (TMA reduction), in the order in which blocks come by, so the last bits of the
gradients of queries differ from run to run (Shah et al. 2024, "FlashAttention-3", does the same).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .key_gradient import KeyBlock, Totals, compute, gradient_of_scores, query_ring
from .operations import Ref
from .problem import CONSUMERS, Problem, Tiles, tiled
from .query_block import Operands
from .query_gradient import Gradients
from .ring import Index, Ring

COLUMNS = 64  # of the queries' gradient at a time: one tile of float32 beside the sums of dk and dv


class _Scratch(NamedTuple):
    keys: Any  # and then their gradient
    values: Any
    loaded: Any
    queries: Ring
    d_scores: Any
    staged: Any  # columns of the queries' gradient on their way


def fused_gradient(
    problem: Problem, tiles: Tiles, operands: Operands, gradients: Gradients
) -> tuple[Array, Array, Array]:
    """The gradients with respect to q, k and v, for attention without a bias."""
    rows = (CONSUMERS, tiles.keys, problem.width)
    scratch = _Scratch(
        tiled(rows, problem.dtype),
        tiled(rows, problem.dtype),
        plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
        query_ring(problem, tiles, operands),
        tiled((CONSUMERS, tiles.keys, tiles.queries), problem.dtype),
        tiled((CONSUMERS, tiles.queries, COLUMNS), jnp.dtype(jnp.float32)),
    )
    axes = jax.typeof(operands.k).manual_axis_type
    gradient = jax.ShapeDtypeStruct(operands.k.shape, operands.k.dtype, manual_axis_type=axes)
    mesh = plgpu.Mesh(
        grid=(problem.kv_heads, problem.keys // (CONSUMERS * tiles.keys), problem.batch),
        grid_names=("head", "tile", "batch"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="attention_fused_gradient",
    )
    body = functools.partial(_body, problem, tiles)
    kernel = pl.kernel(  # and not `plgpu.kernel`, which takes no reference
        lambda *refs: pl.run_scoped(functools.partial(body, *refs), scratch, collective_axes="warpgroup"),
        out_type=(gradient, gradient),
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=problem.operations.interpret,
        name="attention_fused_gradient",
    )

    def whole(operands: Operands, gradients: Gradients) -> tuple[Array, Array, Array]:
        dq = jax.new_ref(jnp.zeros(operands.q.shape, jnp.float32), memory_space=plgpu.GMEM)
        dk, dv = kernel(operands, gradients, dq)
        return dq[...].astype(operands.q.dtype), dk, dv

    return jax.jit(whole)(operands, gradients)  # references in device memory are for compiled functions


def _body(
    problem: Problem,
    tiles: Tiles,
    operands: Operands,
    gradients: Gradients,
    dq: Ref,
    dk: Ref,
    dv: Ref,
    scratch: _Scratch,
) -> None:
    block = KeyBlock.here(problem, tiles, operands, gradients, scratch)
    block.run(lambda: compute(block, dk, dv, functools.partial(_step, dq)))


def _step(dq: Ref, block: KeyBlock, held: tuple[Ref, Ref], number: Array, totals: Totals) -> Totals:
    ring, operations, (d_keys, d_values) = block.scratch.queries, block.problem.operations, totals
    slot, place = ring.slot(number), block.place(number)
    ring.wait(slot)
    d_scores, d_values = gradient_of_scores(block, held, slot, place, d_values)
    d_keys = operations.add_product(d_keys, d_scores, ring.buffers[0].at[slot])
    ring.release(slot, read=True)
    _add_to_queries(block, dq, held[0], place, d_scores)
    return d_keys, d_values


def _add_to_queries(block: KeyBlock, dq: Ref, keys: Ref, place: tuple[Index, Index], d_scores: Array) -> None:
    """`dq += d_scores^T keys`, some columns after the other; each warpgroup adds what its own keys give."""
    problem, size, (member, tile) = block.problem, block.tiles.queries, place
    turned, staged = (ref.at[block.warpgroup] for ref in (block.scratch.d_scores, block.scratch.staged))
    turned[...] = d_scores
    plgpu.commit_smem()
    for first in range(0, problem.width, COLUMNS):
        columns = pl.ds(first, COLUMNS)
        part = problem.operations.product_of_transposed(turned, keys.at[:, columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was staged before has been read
        staged[...] = part * (problem.scale * problem.kept)
        plgpu.commit_smem()
        index = (block.batch, pl.ds(tile * size, size), block.query_head(member), columns)
        plgpu.copy_smem_to_gmem(staged, dq.at[index], reduction_op="add")
