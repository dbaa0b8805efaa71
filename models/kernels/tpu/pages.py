"""Attention of few queries on pages of keys and values that stay where they are, in HBM.

A step of the grid is a row of the batch. It goes over its keys block by block; the pages of a block are
copied by their numbers in the table, two blocks of buffers in turn, and only those that the row has. All key
heads of a page come with it, so the scores of all query heads with all of them are one product, of which the
mask keeps those of a head's own group: with few queries the chip waits for memory, and products cost nothing.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .call import VMEM_LIMIT
from .plan import LOG2_E
from .schedule import Schedule
from .scores import product


@dataclasses.dataclass(frozen=True)
class PagePlan:
    """What is static: `rows` are query heads times queries, one head's queries together, and padding."""

    batch: int
    queries: int
    heads: int
    groups: int
    rows: int
    width: int
    value_width: int
    page: int
    room: int  # pages of a row of the table
    pages: int  # of a block
    splits: int
    scale: float
    soft_cap: float | None
    alibi: bool
    unrolled: int
    interpret: Any

    @property
    def keys(self) -> int:
        """Of a block."""
        return self.pages * self.page

    @property
    def unit(self) -> float:
        """What scores are multiplied by first, as in `plan.Plan`."""
        return LOG2_E if self.soft_cap is None else 1 / self.soft_cap


def attend_pages(
    plan: PagePlan, q: Array, pools: tuple[Array, Array], tables: Array, order: Schedule, alibi: list[Array]
) -> tuple[Array, Array]:
    """Output `[B, rows, V]` in the type of q `[B, rows, K]`, and log-sum-exp `[B, rows]`.

    `pools` are keys and values `[N, page, G, width]`, without the axis of one head; `tables [2 * B * room]`
    their pages' numbers, all of them valid; `alibi` is empty, or slopes `[rows, 1]` and int32 `[B]` positions
    of the first queries.
    """
    slopes, positions = alibi[:1], alibi[1:]
    scalars = [tables, *order, *positions]
    constants = [*(jnp.asarray(x) for x in _places(plan)), *slopes]
    per_split = plan.batch // plan.splits

    def row(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, plan.rows, width), lambda split, i, *_: (split * per_split + i, 0, 0))

    buffers = [pltpu.VMEM((2, plan.pages, *pool.shape[1:]), pool.dtype) for pool in pools]
    state = [pltpu.VMEM((plan.rows, width), jnp.float32) for width in (1, 1, plan.value_width)]
    shapes = [((plan.batch, plan.rows, plan.value_width), q.dtype), ((plan.batch, plan.rows, 1), jnp.float32)]
    axes = jax.typeof(q).manual_axis_type
    out, lse = pl.pallas_call(
        functools.partial(_kernel, plan),
        name="attention_pages",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.splits, per_split),
            in_specs=[
                *(pl.BlockSpec(x.shape, lambda *_: (0, 0)) for x in constants),
                row(plan.width),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in pools),
            ],
            out_specs=[row(plan.value_width), row(1)],
            scratch_shapes=[*buffers, *state, pltpu.SemaphoreType.DMA((2, 2))],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes) for shape, dtype in shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
            disable_bounds_checks=True,  # what a table says is brought within bounds before
        ),
        cost_estimate=_cost(plan, q, pools),
        interpret=plan.interpret,
    )(*scalars, *constants, q, *pools)
    return out, lse[:, :, 0]


def _places(plan: PagePlan) -> tuple[np.ndarray, np.ndarray]:
    """Group and query of each row `[rows, 2]`; group and key of each column `[2, keys * groups]`."""
    row, column = np.arange(plan.rows), np.arange(plan.keys * plan.groups)
    group = row // (plan.queries * (plan.heads // plan.groups))  # of padding: one that is not there
    rows = np.stack([group, row % plan.queries], 1)
    return rows.astype(np.int32), np.stack([column % plan.groups, column // plan.groups]).astype(np.int32)


def _cost(plan: PagePlan, q: Array, pools: tuple[Array, Array]) -> pl.CostEstimate:
    """With all pages of the table filled."""
    columns = plan.batch * plan.room * plan.page * plan.groups
    widths = plan.width + plan.value_width
    return pl.CostEstimate(
        flops=2 * plan.rows * columns * widths,
        transcendentals=plan.rows * columns,
        bytes_accessed=columns * widths * pools[0].dtype.itemsize + 2 * q.size * q.dtype.itemsize,
    )


@dataclasses.dataclass(frozen=True)
class _Row:
    """A kernel's references, and the row of the batch it is at."""

    plan: PagePlan
    tables: Any
    order: Schedule
    positions: list[Any]
    rows: Any
    columns: Any
    slopes: list[Any]
    q: Any
    pools: list[Any]
    out: Any
    lse: Any
    buffers: list[Any]
    top: Any
    total: Any
    sums: Any
    semaphores: Any
    number: Any

    def copies(self, of: int, row: Any, block: Any, slot: Any, do: str) -> None:
        """Start, or wait for, the copies of keys (0) or values (1) of a block that a row has."""
        plan = self.plan
        first = jnp.maximum(block * plan.pages, lax.div(self.order.low[row], jnp.int32(plan.page)))
        filled = lax.div(self.order.high[row] + (plan.page - 1), jnp.int32(plan.page))
        entries = (of * plan.batch + row) * plan.room

        def some(number: int, page: Any) -> Any:
            for i in range(number):
                copy = pltpu.make_async_copy(
                    self.pools[of].at[self.tables[entries + page + i]],
                    self.buffers[of].at[slot, page + i - block * plan.pages],
                    self.semaphores.at[of, slot],
                )
                getattr(copy, do)()
            return page + number

        count = jnp.maximum(jnp.minimum((block + 1) * plan.pages, filled) - first, 0)
        many = lax.div(count, jnp.int32(plan.unrolled))
        page = lax.fori_loop(0, many, lambda _, page: some(plan.unrolled, page), first)
        lax.fori_loop(0, count - plan.unrolled * many, lambda _, page: some(1, page), page)


def _kernel(plan: PagePlan, *refs: Any) -> None:
    left = list(refs)

    def take(count: int) -> list[Any]:
        return [left.pop(0) for _ in range(count)]

    tables, order = left.pop(0), Schedule(*take(len(Schedule._fields)))
    positions, (rows, columns), slopes = take(plan.alibi), take(2), take(plan.alibi)
    q, pools, (out, lse), buffers = left.pop(0), take(2), take(2), take(2)
    number = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    given = (tables, order, positions, rows, columns, slopes, q, pools, out, lse, buffers, *left, number)
    row = _Row(plan, *given)
    begin, stop, parity = order.begin[number], order.stop[number], order.parity[number]

    @pl.when(order.leads[number] == 1)
    def lead() -> None:
        for of in (0, 1):
            row.copies(of, number, begin, parity, "start")

    row.top[...] = jnp.full(row.top.shape, -jnp.inf, jnp.float32)
    row.total[...] = jnp.zeros(row.total.shape, jnp.float32)
    row.sums[...] = jnp.zeros(row.sums.shape, jnp.float32)
    lax.fori_loop(begin, stop, lambda block, _: _block(row, block, (parity + block - begin) & 1), None)
    total = row.total[...]
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out[...] = (row.sums[...] / total).astype(out.dtype)
    lse[...] = jnp.where(empty, -jnp.inf, row.top[...] + jnp.log2(total)) * (1 / LOG2_E)


def _block(row: _Row, block: Any, slot: Any) -> None:
    """Ask for the next block, wait for this one, and add it to the sums."""
    order, number, plan = row.order, row.number, row.plan
    last = block + 1 == order.stop[number]
    after = jnp.where(last, order.following[number], number)

    @pl.when(after >= 0)
    def ask() -> None:
        begin = order.begin[jnp.maximum(after, 0)]
        for of in (0, 1):
            row.copies(of, after, jnp.where(last, begin, block + 1), 1 - slot, "start")

    row.copies(0, number, block, slot, "wait")
    q = row.q[...]
    keys = row.buffers[0][slot].reshape(-1, plan.width).astype(q.dtype)
    raw = _scores(row, product(q, keys, transposed=True), block)
    top = jnp.maximum(row.top[...], raw.max(1, keepdims=True))
    finite = jnp.where(top == -jnp.inf, 0, top)
    weights, shrink = jnp.exp2(raw - finite), jnp.exp2(row.top[...] - finite)
    row.top[...] = top
    row.total[...] = row.total[...] * shrink + weights.sum(1, keepdims=True)
    row.copies(1, number, block, slot, "wait")
    _clear(row, block, slot)
    values = row.buffers[1][slot].reshape(-1, plan.value_width).astype(q.dtype)
    row.sums[...] = row.sums[...] * shrink + product(weights.astype(q.dtype), values)


def _scores(row: _Row, raw: Array, block: Any) -> Array:
    """Scores to the base 2, -inf where a query does not see a key or it is another group's."""
    plan, order = row.plan, row.order
    query, first = row.rows[:, 1:], row.number * plan.queries
    key = row.columns[1:, :] + block * plan.keys
    start, end = (jnp.full(query.shape, bounds[first], jnp.int32) for bounds in (order.starts, order.ends))
    for i in range(1, plan.queries):
        start = jnp.where(query == i, order.starts[first + i], start)
        end = jnp.where(query == i, order.ends[first + i], end)
    scores = raw * (plan.scale * plan.unit)
    if plan.alibi:
        distance = jnp.abs(key - (query + row.positions[0][row.number])).astype(jnp.float32)
        scores = scores - distance * (row.slopes[0][...] * plan.unit)
    if plan.soft_cap is not None:
        scores = jnp.tanh(scores) * (plan.soft_cap * LOG2_E)
    seen = (row.columns[:1, :] == row.rows[:, :1]) & (key >= start) & (key < end)
    return jnp.where(seen, scores, -jnp.inf)


def _clear(row: _Row, block: Any, slot: Any) -> None:
    """Zeros in the place of values that the row does not have: 0 times no number is no number."""
    plan, values = row.plan, row.buffers[1]
    low, high = (bound[row.number] - block * plan.keys for bound in (row.order.low, row.order.high))

    @pl.when((low > 0) | (high < plan.keys))
    def _() -> None:
        page, place = (lax.broadcasted_iota(jnp.int32, values.shape[1:], axis) for axis in (0, 1))
        key = page * plan.page + place
        kept = jnp.where((key >= low) & (key < high), values[slot].astype(jnp.float32), 0)
        values[slot] = kept.astype(values.dtype)
