"""The kernel of a bias's gradient: a block holds one tile of the bias and goes over all its uses.

A tile of a bias that is the same for all batch rows or heads is used by each of them, one of a bucketed bias
by all pairs of tiles that lie equally far from the diagonal. Their gradients are summed in registers, in a
fixed order, and written once: `[B, H, T, S]` never exists. It costs two products more a tile of scores.
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
from .bias_tiles import BiasTiles
from .masking import Bounds, read_bounds, read_visible, where_needed
from .operations import Ref
from .problem import CONSUMERS, REGISTERS_TO_COMPUTE, REGISTERS_TO_COPY, Problem, Tiles, tiled
from .query_block import Operands
from .query_gradient import Gradients
from .ring import Index, Ring
from .scores import hide, mask_scores, score_gradient, scores, weigh

CHUNKS = 8  # blocks that share the uses of one tile of a bucketed bias: enough for all multiprocessors

Range = tuple[Index, Index]


class _Uses(NamedTuple):
    """Which pairs of tiles of which batch rows and heads a block goes over, and where its tile lies."""

    batches: Range
    heads: Range
    tiles: Range
    keys: Callable[[Array], Range]
    bias: tuple[Index, ...]
    out: tuple[Index, ...]


class _Use(NamedTuple):
    batch: Array
    head: Array
    tile: Array
    keys: Array
    bounds: Bounds


class _Block(NamedTuple):
    problem: Problem
    tiles: Tiles
    operands: Operands
    gradients: Gradients
    ring: Ring
    uses: _Uses
    warpgroup: Array


def bias_gradient(problem: Problem, tiles: Tiles, operands: Operands, gradients: Gradients) -> Array:
    """The gradient of the tiles `operands.bias`, float32 and of their shape; with `lowest` summed a head."""
    wide = (tiles.stages, CONSUMERS, tiles.queries, problem.width)
    narrow = tiled((tiles.stages, tiles.keys, problem.width), problem.dtype)
    numbers = plgpu.SMEM((tiles.stages, CONSUMERS, tiles.queries), jnp.float32)
    parts = [tiled(wide, problem.dtype), tiled(wide, problem.dtype), numbers, numbers]
    bias = _tiles(operands)
    shape, grid = _output(problem, tiles, bias)
    kernel = plgpu.kernel(
        functools.partial(_body, problem, tiles),
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        scratch_types=(Ring.scratch(tiles.stages, [narrow, narrow], parts),),
        grid=grid,
        grid_names=("plane", "tile", "other"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="attention_bias_gradient",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=problem.operations.interpret,
    )
    found = kernel(operands, gradients)
    return found if bias.lowest is None else found.sum(0)


def _tiles(operands: Operands) -> BiasTiles:
    assert isinstance(operands.bias, BiasTiles)
    return operands.bias


def _output(problem: Problem, tiles: Tiles, bias: BiasTiles) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of the result and the grid."""
    rows = problem.queries // (CONSUMERS * tiles.queries)
    if bias.lowest is None:
        planes = bias.values.shape[0] * bias.values.shape[1]
        return bias.values.shape, (planes, rows, problem.keys // tiles.keys)
    chunks = min(CHUNKS, rows)
    return (chunks, *bias.values.shape), (problem.heads, chunks, bias.values.shape[1])


def _uses(problem: Problem, tiles: Tiles, bias: BiasTiles) -> _Uses:
    """What this block does."""
    plane, tile, other = (lax.axis_index(name) for name in ("plane", "tile", "other"))
    rows, columns = problem.queries // (CONSUMERS * tiles.queries), problem.keys // tiles.keys
    if bias.lowest is None:
        batches, heads = bias.values.shape[:2]
        batch, head = (
            lax.div(plane, jnp.asarray(heads, jnp.int32)),
            lax.rem(plane, jnp.asarray(heads, jnp.int32)),
        )
        return _Uses(
            (batch, batch + 1) if batches > 1 else (0, problem.batch),
            (head, head + 1) if heads > 1 else (0, problem.heads),
            (tile, tile + 1),
            lambda _: (other, other + 1),
            bias=(batch, head, tile * bias.rows, other * bias.columns),
            out=(batch, head, tile * bias.rows, other * bias.columns),
        )
    chunk = -(-rows // min(CHUNKS, rows))
    last, step, lowest = bias.values.shape[1] - 1, bias.rows // bias.columns, bias.lowest

    def keys(row: Array) -> Range:
        """The tile of the diagonal, and all beyond for the first and the last."""
        on = row * step + lowest + other
        return (
            jnp.where(other == 0, 0, jnp.clip(on, 0, columns)),
            jnp.where(other == last, columns, jnp.clip(on + 1, 0, columns)),
        )

    tiles_of_chunk = tile * chunk, jnp.minimum((tile + 1) * chunk, rows)
    place = (plane, other, 0, 0)
    return _Uses((0, problem.batch), (plane, plane + 1), tiles_of_chunk, keys, place, (tile, *place))


def _body(
    problem: Problem, tiles: Tiles, operands: Operands, gradients: Gradients, out: Ref, ring: Ring
) -> None:
    warpgroup, uses = lax.axis_index("warpgroup"), _uses(problem, tiles, _tiles(operands))
    block = _Block(problem, tiles, operands, gradients, ring, uses, warpgroup)
    pl.when(warpgroup < CONSUMERS)(lambda: _compute(block, out))
    pl.when(warpgroup == CONSUMERS)(lambda: _copy(block))


def _for_each(block: _Block, visit: Callable[[_Use, Array, Any], Any], carry: Any) -> Any:
    """`carry = visit(use, number, carry)` for each use, in order."""
    uses, count = block.uses, block.problem.keys // block.tiles.keys

    def of_row(batch: Array, head: Array, tile: Array, carry: Any) -> Any:
        bounds = read_bounds(block.operands.mask, batch, tile, count)
        first, end = uses.keys(tile)

        def one(keys: Array, carry: Any) -> Any:
            number, inner = carry
            return number + 1, visit(_Use(batch, head, tile, keys, bounds), number, inner)

        return lax.fori_loop(jnp.maximum(first, bounds.first), jnp.minimum(end, bounds.end), one, carry)

    def of_head(batch: Array, head: Array, carry: Any) -> Any:
        return lax.fori_loop(*uses.tiles, lambda tile, c: of_row(batch, head, tile, c), carry)

    def of_batch(batch: Array, carry: Any) -> Any:
        return lax.fori_loop(*uses.heads, lambda head, c: of_head(batch, head, c), carry)

    return lax.fori_loop(*uses.batches, of_batch, (0, carry))


def _copy(block: _Block) -> None:
    plgpu.set_max_registers(REGISTERS_TO_COPY, action="decrease")
    operands, gradients, ring, tiles = block.operands, block.gradients, block.ring, block.tiles

    def visit(use: _Use, number: Array, _: None) -> None:
        slot = ring.slot(number)
        pl.when(number >= tiles.stages)(lambda: plgpu.barrier_wait(ring.consumed.at[slot]))
        key_head = lax.div(use.head, jnp.asarray(block.problem.group, jnp.int32))
        keys = (use.batch, pl.ds(use.keys * tiles.keys, tiles.keys), key_head)
        rows = [_rows(block, use, part) for part in range(CONSUMERS)]
        wide = [[ref.at[use.batch, row, use.head] for row in rows] for ref in (operands.q, gradients.d_out)]
        flat = [
            [ref.at[use.batch, use.head, row] for row in rows] for ref in (gradients.lse, gradients.delta)
        ]
        ring.fill(slot, [operands.k.at[keys], operands.v.at[keys], *wide, *flat])

    uses, _ = _for_each(block, visit, None)
    for slot in range(tiles.stages):
        pl.when(slot < uses)(functools.partial(plgpu.barrier_wait, ring.consumed.at[slot]))


def _rows(block: _Block, use: _Use, part: Index) -> Any:
    """The queries of one computing warpgroup."""
    return pl.ds((use.tile * CONSUMERS + part) * block.tiles.queries, block.tiles.queries)


def _compute(block: _Block, out: Ref) -> None:
    plgpu.set_max_registers(REGISTERS_TO_COMPUTE, action="increase")
    operations, uses, tiles = block.problem.operations, block.uses, block.tiles
    size = (tiles.queries, tiles.keys)

    def part(place: tuple[Index, ...]) -> tuple[Any, ...]:
        *plane, row, column = place
        return (*plane, pl.ds(row + block.warpgroup * size[0], size[0]), pl.ds(column, size[1]))

    lies = _tiles(block.operands).values.at[part(uses.bias)]
    bias = operations.tile(lies, in_shared_memory=False).astype(jnp.float32)
    step = functools.partial(_step, block, bias)
    _, total = _for_each(block, step, operations.filled_tile(size, 0))
    out[part(uses.out)] = total * block.problem.kept if block.problem.rate else total


def _step(block: _Block, bias: Array, use: _Use, number: Array, total: Array) -> Array:
    operations, mask, ring = block.problem.operations, block.operands.mask, block.ring
    slot, first_key = ring.slot(number), use.keys * block.tiles.keys
    ring.wait(slot)
    keys, values = (buffer.at[slot] for buffer in ring.buffers[:2])
    queries, d_out, lse, delta = (buffer.at[slot, block.warpgroup] for buffer in ring.buffers[2:])

    def apply(value: Array) -> Array:
        columns = pl.ds(first_key, block.tiles.keys)
        rows = _rows(block, use, block.warpgroup)
        visible = read_visible(operations, mask, use.batch, rows, columns, 0)
        return mask_scores(operations, value, visible, first_key, 1)

    def respond(products: Array) -> Array:
        found = scores(block.problem, products, bias)
        value = where_needed(mask, use.bounds, use.keys, found.value, apply)
        found = found._replace(value=hide(value, _allowed(block, use)))
        return weigh(block.problem, found, operations.row_values(lse), 0, _keep(block, use))[1]

    response, d_weights = operations.two_products((queries, keys), (d_out, values), respond)
    d_scores = score_gradient(block.problem, response, d_weights, operations.row_values(delta), 0)
    ring.release(slot, read=True)
    return total + d_scores


def _allowed(block: _Block, use: _Use) -> Array | None:
    """The tile of a dense mask."""
    if (allowed := block.operands.allowed) is None:
        return None
    first, size = block.warpgroup * block.tiles.queries, block.tiles.queries
    lies = allowed.part(use.batch, use.head, use.tile, use.keys, first, size)
    return block.problem.operations.tile(lies, in_shared_memory=False).astype(jnp.float32)


def _keep(block: _Block, use: _Use) -> Array | None:
    """Which weights of a tile dropout keeps."""
    if (hashes := block.operands.hashes) is None:
        return None
    operations, tiles = block.problem.operations, block.tiles
    rows = operations.row_values(hashes.queries.at[use.batch, use.head, _rows(block, use, block.warpgroup)])
    keys = pl.ds(use.keys * tiles.keys, tiles.keys)
    columns = operations.column_values(hashes.keys.at[use.batch, use.head, keys])
    return dropping.keep(block.problem, rows, columns, (tiles.queries, tiles.keys))
