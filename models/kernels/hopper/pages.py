"""The kernel for few queries on a cache in pages: a block has one key head and a part of a row's keys.

All query heads that share a key head, times the queries, are the rows of one product, padded to the 64 of
the tensor cores: few blocks would be too few for the GPU, so the keys of a row are split among several, whose
results are merged afterwards (Dao et al. 2023, "Flash-Decoding"). Pages are copied by their numbers in the
table (TMA), some tiles ahead; what bounds the time is memory.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .forward import Sums, finished, softmax
from .masking import MaskOperands, read_number, read_visible, with_key_ids
from .operations import Ref
from .problem import Problem, tiled
from .ring import Index
from .scores import Visible, along, mask_scores, scores

ROWS = 64  # of queries in a block, what one warpgroup multiplies
KEYS = 64  # of a tile


@dataclasses.dataclass(frozen=True)
class Pages:
    """How a cache lies: `page` keys to a page; `splits` blocks share a row's keys, `stages` tiles are ahead.

    The problem's heads are the key heads, its queries the rows of one, and its keys the room for a row's.
    """

    problem: Problem
    page: int
    splits: int
    stages: int

    @property
    def at_once(self) -> int:
        """Keys that one copy brings."""
        return min(self.page, KEYS)

    @property
    def copies(self) -> int:
        """Copies of keys for a tile."""
        return KEYS // self.at_once


class PageOperands(NamedTuple):
    """What the kernel reads.

    q `[B, G, rows, K]`; pools `[N, page, G, K]`; tables int32 `[B, P]`, all entries valid; `lengths [B]`;
    `bounds [B, splits, 2]`, the first tile of each block and the end; the mask's arrays over rows `[B or 1,
    rows]` and keys; `slopes [G, rows]` and `positions [B, rows]` of ALiBi, float32, or None.
    """

    q: Any
    k: Any
    v: Any
    k_table: Any
    v_table: Any
    lengths: Any
    bounds: Any
    mask: MaskOperands
    slopes: Any = None
    positions: Any = None


class _Scratch(NamedTuple):
    queries: Any
    loaded: Any
    keys: Any
    values: Any
    ready: Any


class _Block(NamedTuple):
    pages: Pages
    operands: PageOperands
    scratch: _Scratch
    batch: Array
    head: Array
    rows: Any
    first: Array
    end: Array


def attend_pages(pages: Pages, operands: PageOperands) -> tuple[Array, Array]:
    """Of each split the output `[splits, B, G, rows, K]` and natural log-sum-exp `[splits, B, G, rows]`."""
    problem = pages.problem
    shape = (pages.splits, problem.batch, problem.kv_heads, problem.queries)
    tiles = tiled((pages.stages, KEYS, problem.width), problem.dtype)
    scratch = _Scratch(
        tiled((ROWS, problem.width), problem.dtype),
        plgpu.Barrier(),
        tiles,
        tiles,
        plgpu.Barrier(num_arrivals=2 * pages.copies, num_barriers=pages.stages),
    )
    kernel = plgpu.kernel(
        functools.partial(_body, pages),
        out_type=(
            jax.ShapeDtypeStruct((*shape, problem.width), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        scratch_types=(scratch,),
        grid=(problem.kv_heads * (problem.queries // ROWS), pages.splits, problem.batch),
        grid_names=("head", "split", "batch"),
        kernel_name="attention_pages",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=problem.operations.interpret,
    )
    return kernel(operands)


def _body(pages: Pages, operands: PageOperands, out: Ref, lse: Ref, scratch: _Scratch) -> None:
    both, split, batch = (lax.axis_index(name) for name in ("head", "split", "batch"))
    blocks = jnp.asarray(pages.problem.queries // ROWS, jnp.int32)
    head, rows = lax.div(both, blocks), pl.ds(lax.rem(both, blocks) * ROWS, ROWS)
    ends = (read_number(operands.bounds.at[batch, split], i) for i in (0, 1))
    block = _Block(pages, operands, scratch, batch, head, rows, *ends)
    plgpu.copy_gmem_to_smem(operands.q.at[batch, head, rows], scratch.queries, scratch.loaded)
    for ahead in range(pages.stages):
        tile = block.first + ahead
        pl.when(tile < block.end)(functools.partial(_copy, block, tile))
    sums = _over_keys(block)
    value, log_sum = finished(sums)
    index = (split, batch, head, rows)
    out[index], lse[index] = value, log_sum


def _copy(block: _Block, tile: Array) -> None:
    """Start the copies of a tile's pages; those beyond the table's end are its last entry's, never seen."""
    pages, scratch, slot = block.pages, block.scratch, _slot(block, tile)
    pools = (
        (block.operands.k, block.operands.k_table, scratch.keys),
        (block.operands.v, block.operands.v_table, scratch.values),
    )
    for number in range(pages.copies):
        first = tile * KEYS + number * pages.at_once
        page, inside = (f(first, jnp.asarray(pages.page, jnp.int32)) for f in (lax.div, lax.rem))
        for pool, table, buffer in pools:
            entry = table[block.batch, jnp.minimum(page, table.shape[1] - 1)]
            source = pool.at[entry, pl.ds(inside, pages.at_once), block.head]
            part = buffer.at[slot, pl.ds(number * pages.at_once, pages.at_once)]
            plgpu.copy_gmem_to_smem(source, part, scratch.ready.at[slot])


def _slot(block: _Block, tile: Index) -> Array:
    return lax.rem(tile - block.first, jnp.asarray(block.pages.stages, jnp.int32))


def _over_keys(block: _Block) -> Sums:
    problem, mask = block.pages.problem, block.operands.mask._replace(key_ids=None)
    operations = problem.operations
    plgpu.barrier_wait(block.scratch.loaded)
    visible = read_visible(operations, mask, block.batch, block.rows, None, 0)
    start = (
        operations.filled_tile((ROWS, problem.width), 0),
        operations.filled_rows(ROWS, -jnp.inf),
        operations.filled_rows(ROWS, 0),
    )
    return lax.fori_loop(block.first, block.end, functools.partial(_step, block, visible), start)


def _step(block: _Block, visible: Visible, tile: Array, sums: Sums) -> Sums:
    problem, scratch, slot = block.pages.problem, block.scratch, _slot(block, tile)
    operations, values = problem.operations, scratch.values.at[slot]
    plgpu.barrier_wait(scratch.ready.at[slot])
    products = operations.product(scratch.queries, scratch.keys.at[slot])
    found = scores(problem, products, _bias(block, tile))
    seen = with_key_ids(operations, block.operands.mask, visible, block.batch, pl.ds(tile * KEYS, KEYS))
    value = mask_scores(operations, found.value, seen, tile * KEYS, 1, hidden=-jnp.inf)
    total, top, weights, low = softmax(sums, value, found.factor, no_key=True)
    length = block.operands.lengths[block.batch]
    pl.when(length < (tile + 1) * KEYS)(lambda: _empty(block, values, length - tile * KEYS))
    total = operations.add_product(total, low.astype(problem.dtype), values)
    following = tile + block.pages.stages
    pl.when(following < block.end)(lambda: _copy(block, following))
    return total, top, weights


def _empty(block: _Block, values: Ref, filled: Array) -> None:
    """Zeros in the place of values that are not there: 0 times no number is no number."""
    operations = block.pages.problem.operations
    there = operations.indices(values.shape, 0) < filled
    values[...] = jnp.where(there, operations.tile(values), 0).astype(values.dtype)
    plgpu.commit_smem()


def _bias(block: _Block, tile: Array) -> Array | None:
    """ALiBi's of a tile: minus the row's slope times the distance of its query from each key."""
    operands, operations = block.operands, block.pages.problem.operations
    if operands.slopes is None:
        return None
    slopes = operations.row_values(operands.slopes.at[block.head, block.rows])
    positions = operations.row_values(operands.positions.at[block.batch, block.rows])
    keys = (operations.positions(KEYS, 1) + tile * KEYS).astype(jnp.float32)
    shape = (ROWS, KEYS)
    return jnp.abs(along(keys, shape, 1) - along(positions, shape, 0)) * -along(slopes, shape, 0)
