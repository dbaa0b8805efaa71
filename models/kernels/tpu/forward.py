"""The forward pass: online softmax over the live tiles of each block of queries.

Queries lie along the rows of registers. Of each row the greatest score is kept in every lane; the sum of
exponentials is kept apart for each lane and summed across lanes once, at the end of a row of tiles: reducing
across lanes is what would otherwise stand between the two matrix products.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..block_lists import block_map, tile_list
from ..blocks import static_blocks
from ..terms import Terms
from .call import At, Refs, Walk, call, cost, ids_and_entry
from .pieces import Frame, Tile
from .plan import LOG2_E, Plan
from .products import product, split_product
from .scores import Scores


def forward(plan: Plan, q: Array, k: Array, v: Array, terms: Terms, dtype: Any) -> tuple[Array, Array]:
    """Output `[B, H, T, V]` in `dtype` and log-sum-exp `[B, H, T]`, of arrays laid heads first."""
    frame = Frame(plan, plan.forward, plan.repeats, keys_first=False)
    scores, walk = Scores.of(frame, terms), by_queries(frame, terms)
    scalars = scores.scalars()
    if terms.sinks is not None:
        scalars["sinks"] = jnp.asarray(terms.sinks, jnp.float32) * LOG2_E
    inputs = {
        "q": (q, frame.queries(plan.width)),
        "k": (k, frame.keys(plan.width)),
        "v": (v, frame.keys(plan.value_width)),
        **scores.inputs(),
    }
    rows, width = plan.forward.rows, plan.value_width
    shape = (plan.batch, plan.heads, plan.queries, width)
    statistics = (plan.batch, plan.heads, 1, plan.queries)
    tiles = plan.batch * plan.heads * walk.lists.shape[2]
    results = call(
        lambda walk, refs: _kernel(frame, scores, walk, refs),
        "attention_forward",
        walk,
        scalars,
        inputs,
        {
            "out": (shape, dtype, frame.queries(width)),
            "lse": (statistics, jnp.float32, frame.statistics()),
        },
        {
            "top": (frame.heads, rows, plan.lanes),
            "total": (frame.heads, rows, plan.lanes),
            "out": (frame.heads, rows, width),
        },
        cost(tiles, rows * plan.forward.columns, plan.width + width, [q, k, v, q]),
        plan.interpret,
    )
    return results["out"], results["lse"][:, :, 0]


def by_queries(frame: Frame, terms: Terms) -> Walk:
    """Batch rows and key heads, and for each its live tiles, a row of tiles after the other."""
    plan, grid = frame.plan, frame.plan.grid(frame.blocks)
    lists = tile_list(block_map(terms.mask, grid, plan.groups), static_blocks(terms.mask, grid))
    return Walk(
        (plan.batch, plan.groups, lists.shape[2]),
        lists,
        lambda batch, group, number: (batch, group, number),
        lambda batch, group, number, entry: At(batch, group, group, entry.row, entry.column),
        parallel=2,
    )


def _kernel(frame: Frame, scores: Scores, walk: Walk, refs: Refs) -> None:
    _, entry, at = ids_and_entry(walk, refs)
    top, total, out = (refs.scratch[name] for name in ("top", "total", "out"))

    @pl.when(entry.first)
    def start() -> None:
        top[...] = jnp.full(top.shape, -jnp.inf, top.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)
        out[...] = jnp.zeros(out.shape, out.dtype)

    scores.visit(walk, entry, at, lambda tile, masked: _accumulate(scores, refs, tile, masked))

    @pl.when(entry.last)
    def finish() -> None:
        for head in range(frame.heads):
            _finish(frame, refs, at, head)


def _accumulate(scores: Scores, refs: Refs, tile: Tile, masked: bool) -> None:
    """Add the chunk of a tile to the sums of its rows."""
    top, total, out = (refs.scratch[name] for name in ("top", "total", "out"))
    head, lanes = tile.head, total.shape[2]
    v = refs.inputs["v"][tile.keys, :]
    raw, _ = scores.scores(refs.inputs["q"][head], refs.inputs["k"][tile.keys, :], refs, tile, masked)
    old_top = top[head]
    new_top = jnp.maximum(old_top, raw.max(1, keepdims=True))
    finite = jnp.where(new_top == -jnp.inf, 0, new_top) if scores.may_be_infinite(masked) else new_top
    weights = jnp.exp2(raw - across(finite, raw.shape[1]))
    shrink = jnp.exp2(old_top - finite)
    total[head] = total[head] * shrink + sum(
        weights[:, start : start + lanes] for start in range(0, weights.shape[1], lanes)
    )
    top[head] = new_top
    weights = scores.dropping.kept(weights, refs, tile)
    exact = refs.outputs["out"].dtype != v.dtype  # the output before rounding is asked for
    values = split_product(weights, v) if exact else product(weights.astype(v.dtype), v)
    out[head] = out[head] * across(shrink, out.shape[2]) + values


def _finish(frame: Frame, refs: Refs, at: At, head: int) -> None:
    """Write the output and log-sum-exp of a row of tiles."""
    top, out = refs.scratch["top"][head], refs.scratch["out"][head]
    total = jnp.broadcast_to(refs.scratch["total"][head].sum(1, keepdims=True), top.shape)
    if "sinks" in refs.scalars:
        sink = refs.scalars["sinks"][at.heads * frame.heads + head]
        new_top = jnp.maximum(top, sink)
        finite = jnp.where(new_top == -jnp.inf, 0, new_top)  # neither key nor sink
        shrink = jnp.exp2(top - finite)
        top, total, out = (
            new_top,
            total * shrink + jnp.exp2(sink - finite),
            out * across(shrink, out.shape[1]),
        )
    empty = total == 0
    total = jnp.where(empty, 1, total)
    refs.outputs["out"][head] = (out / across(total, out.shape[1])).astype(refs.outputs["out"].dtype)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log2(total)) * (1 / LOG2_E)
    refs.outputs["lse"][head] = lse[:, :1].T


def across(array: Array, columns: int) -> Array:
    """What is the same in every lane, in `columns` columns."""
    size = array.shape[1]
    return array[:, :columns] if columns < size else jnp.tile(array, (1, columns // size))
