"""The kernel of the gradients with respect to keys and values: a block holds keys and goes over the queries.

Scores are computed transposed, a row for each key, so that weights come out of the tensor cores as they go in
again. Heads that share keys are gone over one after the other and summed in registers: the order is always
the same, and so is the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import dropping
from .bias_tiles import Slopes, tile_values
from .masking import Bounds, read_bounds, read_visible, where_needed
from .operations import Ref
from .problem import CONSUMERS, REGISTERS_TO_COMPUTE, REGISTERS_TO_COPY, Problem, Tiles, tiled
from .query_block import Operands
from .query_gradient import Gradients
from .ring import Index, Ring, copy_all
from .scores import Scores, along, hide, mask_scores, score_gradient, scores, weigh

Totals = tuple[Array, Array]
Step = Callable[["KeyBlock", tuple[Ref, Ref], Array, Totals], Totals]


class _Scratch(NamedTuple):
    keys: Any  # and then their gradient
    values: Any
    loaded: Any
    queries: Ring  # queries, the output's gradient, log-sum-exp, delta, hashes, tiles of dense mask and bias


class KeyBlock(NamedTuple):
    """One block: which keys it holds and which tiles of queries it goes over."""

    problem: Problem
    tiles: Tiles
    operands: Operands
    gradients: Gradients
    scratch: Any
    batch: Array
    head: Array
    tile: Array
    bounds: Bounds
    warpgroup: Array

    @classmethod
    def here(
        cls, problem: Problem, tiles: Tiles, operands: Operands, gradients: Gradients, scratch: Any
    ) -> KeyBlock:
        """The block that this thread belongs to."""
        batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
        bounds = read_bounds(operands.mask, batch, tile, problem.queries // tiles.queries)
        warpgroup = lax.axis_index("warpgroup")
        return cls(problem, tiles, operands, gradients, scratch, batch, head, tile, bounds, warpgroup)

    def run(self, compute: Callable[[], None]) -> None:
        """Two warpgroups compute, one copies."""
        pl.when(self.warpgroup < CONSUMERS)(compute)
        pl.when(self.warpgroup == CONSUMERS)(lambda: copy_queries(self))

    @property
    def steps(self) -> Index:
        """Tiles of queries that one head has."""
        return self.bounds.end - self.bounds.first

    @property
    def first_key(self) -> Array:
        """The first of this warpgroup's keys."""
        return (self.tile * CONSUMERS + self.warpgroup) * self.tiles.keys

    def place(self, step: Index) -> tuple[Index, Index]:
        """The member of the group and the tile of queries of a step; one loop for both saves registers."""
        if self.problem.group == 1:
            return 0, step + self.bounds.first
        return lax.div(step, self.steps), lax.rem(step, self.steps) + self.bounds.first

    def query_head(self, member: Index) -> Index:
        """The head of queries that is a given member of the group of this block's head."""
        return self.head * self.problem.group + member


def key_gradient(
    problem: Problem, tiles: Tiles, operands: Operands, gradients: Gradients
) -> tuple[Array, Array]:
    """The gradients with respect to k and v, `[B, S, G, K]` each."""
    rows = (CONSUMERS, tiles.keys, problem.width)
    scratch = _Scratch(
        tiled(rows, problem.dtype),
        tiled(rows, problem.dtype),
        plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
        query_ring(problem, tiles, operands),
    )
    gradient = jax.ShapeDtypeStruct(operands.k.shape, operands.k.dtype)
    kernel = plgpu.kernel(
        functools.partial(_body, problem, tiles),
        out_type=(gradient, gradient),
        scratch_types=(scratch,),
        grid=(problem.kv_heads, problem.keys // (CONSUMERS * tiles.keys), problem.batch),
        grid_names=("head", "tile", "batch"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="attention_key_gradient",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=problem.operations.interpret,
    )
    return kernel(operands, gradients)


def query_ring(problem: Problem, tiles: Tiles, operands: Operands) -> Ring:
    """What a block needs at once of queries; with dropout the fifth buffer is for their hashes."""
    ring = tiled((tiles.stages, tiles.queries, problem.width), problem.dtype)
    numbers = plgpu.SMEM((tiles.stages, tiles.queries), jnp.float32)
    hashes = dropping.buffers(problem.rate > 0, tiles.stages, tiles.queries)
    buffers = [ring, ring, numbers, numbers, *hashes]
    return Ring.scratch(tiles.stages, buffers, operands.buffers(tiles.stages))


def _body(
    problem: Problem,
    tiles: Tiles,
    operands: Operands,
    gradients: Gradients,
    dk: Ref,
    dv: Ref,
    scratch: _Scratch,
) -> None:
    block = KeyBlock.here(problem, tiles, operands, gradients, scratch)
    block.run(lambda: compute(block, dk, dv, _step))


def copy_queries(block: KeyBlock) -> None:
    """The work of the copying warpgroup."""
    plgpu.set_max_registers(REGISTERS_TO_COPY, action="decrease")
    operands, gradients, size = block.operands, block.gradients, block.tiles.queries

    def sources(step: Index) -> Any:
        member, tile = block.place(step)
        head, rows = block.query_head(member), pl.ds(tile * size, size)
        wide, narrow = (block.batch, rows, head), (block.batch, head, rows)
        references = operands.q.at[wide], gradients.d_out.at[wide]
        numbers = gradients.lse.at[narrow], gradients.delta.at[narrow]
        hashes = dropping.sources(None if operands.hashes is None else operands.hashes.queries, narrow)
        parts = operands.parts(block.batch, head, block.tile, tile)
        return ((*references, *numbers, *hashes, *parts),)

    copy_all((block.scratch.queries,), block.steps * block.problem.group, sources)


def compute(block: KeyBlock, dk: Ref, dv: Ref, step: Step) -> None:
    """The work of a computing warpgroup; `step(block, (keys, values), number, totals)` adds a tile."""
    plgpu.set_max_registers(REGISTERS_TO_COMPUTE, action="increase")
    problem, operands, scratch = block.problem, block.operands, block.scratch
    index = (block.batch, pl.ds(block.first_key, block.tiles.keys), block.head)
    keys, values, loaded = (ref.at[block.warpgroup] for ref in (scratch.keys, scratch.values, scratch.loaded))
    plgpu.copy_gmem_to_smem(operands.k.at[index], keys, loaded)
    plgpu.copy_gmem_to_smem(operands.v.at[index], values, loaded)
    plgpu.barrier_wait(loaded)
    zeros = problem.operations.filled_tile((block.tiles.keys, problem.width), 0)

    steps = problem.group * block.steps
    each = functools.partial(step, block, (keys, values))
    d_keys, d_values = lax.fori_loop(0, steps, each, (zeros, zeros))
    keys[...] = (d_keys * (problem.scale * problem.kept)).astype(keys.dtype)
    values[...] = (d_values * problem.kept if problem.rate else d_values).astype(values.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(keys, dk.at[index])
    plgpu.copy_smem_to_gmem(values, dv.at[index])
    plgpu.wait_smem_to_gmem(0)


def _step(block: KeyBlock, held: tuple[Ref, Ref], number: Array, totals: Totals) -> Totals:
    ring = block.scratch.queries
    slot = ring.slot(number)
    ring.wait(slot)
    compute = _one_by_one if block.problem.width > 64 else _two_at_once
    totals = compute(block, held, slot, block.place(number), totals)
    ring.release(slot, read=True)
    return totals


def _one_by_one(
    block: KeyBlock, held: tuple[Ref, Ref], slot: Array, place: tuple[Index, Index], totals: Totals
) -> Totals:
    """The sums with a tile, one product after the other, where they leave few registers."""
    d_keys, d_values = totals
    d_scores, d_values = gradient_of_scores(block, held, slot, place, d_values)
    queries = block.scratch.queries.buffers[0].at[slot]
    return block.problem.operations.add_product(d_keys, d_scores, queries), d_values


def _two_at_once(
    block: KeyBlock, held: tuple[Ref, Ref], slot: Array, place: tuple[Index, Index], totals: Totals
) -> Totals:
    """The same; the tensor cores are busy while exponentials are taken."""
    problem, operations, (keys, values) = block.problem, block.problem.operations, held
    queries, d_out, lse, delta = (buffer.at[slot] for buffer in block.scratch.queries.buffers[:4])

    def respond(products: Array) -> tuple[Array, Array]:
        found = _tile_scores(block, slot, place, products)
        keep = _keep(block, slot, place)
        weights, response = weigh(problem, found, operations.column_values(lse), 1, keep)
        return weights.astype(problem.dtype), response

    (weights, response), d_weights = operations.two_products((keys, queries), (values, d_out), respond)
    d_scores = _score_gradient(block, response, d_weights, delta)
    return operations.add_two_products(totals, ((d_scores, queries), (weights, d_out)))


def gradient_of_scores(
    block: KeyBlock, held: tuple[Ref, Ref], slot: Array, place: tuple[Index, Index], d_values: Array
) -> tuple[Array, Array]:
    """A tile's gradient `[keys, queries]` in the type of the inputs, and `d_values` with the tile.

    The barriers keep the compiler from doing early what is needed late. With a soft cap the exponentials are
    taken twice, as scores and what follows from them do not fit at once.
    """
    problem, operations = block.problem, block.problem.operations
    keys, values = held
    queries, d_out, _, delta = (buffer.at[slot] for buffer in block.scratch.queries.buffers[:4])
    found = _tile_scores(block, slot, place, operations.product(keys, queries))

    def respond(value: Array, slot: Array) -> tuple[Array, Array]:
        lse = operations.column_values(block.scratch.queries.buffers[2].at[slot])
        return weigh(problem, found._replace(value=value), lse, 1, _keep(block, slot, place))

    value, later = found.value, slot
    if problem.soft_cap is None:
        value, later = lax.optimization_barrier((value, later))
    weights, response = respond(value, later)
    low = weights.astype(problem.dtype)
    if problem.soft_cap is not None:
        value, low, later = lax.optimization_barrier((value, low, slot))
    d_values = operations.add_product(d_values, low, d_out)
    if problem.rate:
        d_weights = operations.product(values, d_out)
    else:  # delta is taken off first: then it needs no registers of its own
        less = along(-operations.column_values(delta), found.value.shape, 1)
        d_weights = operations.product_from(less, values, d_out)
    if problem.soft_cap is not None:
        response = respond(value, later)[1]
    if problem.rate:
        return _score_gradient(block, response, d_weights, delta), d_values
    return (response * d_weights).astype(problem.dtype), d_values


def _score_gradient(block: KeyBlock, response: Array, d_weights: Array, delta: Ref) -> Array:
    values = block.problem.operations.column_values(delta)
    return score_gradient(block.problem, response, d_weights, values, 1).astype(block.problem.dtype)


def _keep(block: KeyBlock, slot: Array, place: tuple[Index, Index]) -> Array | None:
    """Which weights of a tile dropout keeps."""
    if block.operands.hashes is None:
        return None
    operations, (member, _) = block.problem.operations, place
    keys = pl.ds(block.first_key, block.tiles.keys)
    of_keys = block.operands.hashes.keys.at[block.batch, block.query_head(member), keys]
    of_queries = block.scratch.queries.buffers[4].at[slot]
    shape = (block.tiles.keys, block.tiles.queries)
    rows, columns = operations.row_values(of_keys), operations.column_values(of_queries)
    return dropping.keep(block.problem, rows, columns, shape)


def _tile_scores(block: KeyBlock, slot: Array, place: tuple[Index, Index], products: Array) -> Scores:
    operands, operations, sizes = block.operands, block.problem.operations, block.tiles
    member, tile = place
    first_query, distance = tile * sizes.queries, None
    if isinstance(operands.bias, Slopes):
        distance = operands.bias.distance(operations, products.shape, first_query, block.first_key, 0)
    buffer = block.scratch.queries.buffers[-1]
    bias = tile_values(
        operations,
        operands.bias,
        lambda: buffer.at[slot, block.warpgroup],
        block.query_head(member),
        distance,
    )
    found = scores(block.problem, products, bias)
    queries, keys = pl.ds(first_query, sizes.queries), pl.ds(block.first_key, sizes.keys)

    def apply(value: Array) -> Array:
        visible = read_visible(operations, operands.mask, block.batch, queries, keys, 1)
        return mask_scores(operations, value, visible, block.first_key, 0)

    value = where_needed(operands.mask, block.bounds, tile, found.value, apply)
    dense = operands.allowed_tile(operations, block.scratch.queries, slot, block.warpgroup)
    return found._replace(value=hide(value, dense))
