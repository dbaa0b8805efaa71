"""The backward pass with respect to q, k and v: one kernel, or two where the gradient of q is too large.

Keys lie along the rows of registers, other than in the forward pass: numbers that belong to queries lie along
the lanes, where they come from memory, and one row of them serves all rows. One kernel goes through the tiles
column by column, sums the gradients of a column's keys and values, and holds that of all queries of a key
head; so it computes weights once, with five matrix products a tile. Two kernels take seven: that for q goes
row by row, that for k and v column by column.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ..block_lists import block_map, tile_list
from ..blocks import static_blocks
from ..terms import Terms
from .call import At, Block, Refs, Walk, call, cost, ids_and_entry
from .forward import by_queries
from .pieces import Frame, Tile
from .plan import Plan
from .products import product, turned_product
from .scores import Scores


class Saved(NamedTuple):
    """What gradients are computed from; `lse [B, H, 1, T]` to the base 2, inf where a row sees nothing.

    `delta [B, H, 1, T]` is the sum of output times its gradient, minus the gradient of the log-sum-exp.
    """

    q: Array
    k: Array
    v: Array
    d_out: Array
    lse: Array
    delta: Array

    def inputs(self, frame: Frame) -> dict[str, tuple[Array, Block]]:
        """As operands of a kernel."""
        widths = frame.plan.width, frame.plan.value_width
        return {
            "q": (self.q, frame.queries(widths[0])),
            "k": (self.k, frame.keys(widths[0])),
            "v": (self.v, frame.keys(widths[1])),
            "d_out": (self.d_out, frame.queries(widths[1])),
            "lse": (self.lse, frame.statistics()),
            "delta": (self.delta, frame.statistics()),
        }


def query_gradient(plan: Plan, saved: Saved, terms: Terms) -> Array:
    """The gradient of q, `[B, H, T, K]`."""
    frame = Frame(plan, plan.query_gradient, plan.repeats, keys_first=True)
    scores, walk = Scores.of(frame, terms), by_queries(frame, terms)
    rows, width = frame.blocks.rows, plan.width
    results = call(
        lambda walk, refs: _query_kernel(frame, scores, walk, refs),
        "attention_query_gradient",
        walk,
        scores.scalars(),
        {**saved.inputs(frame), **scores.inputs()},
        {"dq": (saved.q.shape, saved.q.dtype, frame.queries(width))},
        {"dq": (frame.heads, rows, width)},
        _cost(frame, walk, saved, 2 * width + plan.value_width),
        plan.interpret,
    )
    return results["dq"]


def key_gradients(plan: Plan, saved: Saved, terms: Terms) -> tuple[Array, Array]:
    """The gradients of k and v, `[B, G, S, K]` and `[B, G, S, V]`."""
    frame = Frame(plan, plan.key_gradients, plan.repeats, keys_first=True)
    scores, walk = Scores.of(frame, terms), by_keys(frame, terms)
    widths = plan.width, plan.value_width
    results = call(
        lambda walk, refs: _key_kernel(frame, scores, walk, refs),
        "attention_key_gradients",
        walk,
        scores.scalars(),
        {**saved.inputs(frame), **scores.inputs()},
        {
            name: (array.shape, array.dtype, frame.keys(width))
            for name, array, width in zip(("dk", "dv"), (saved.k, saved.v), widths)
        },
        {name: (frame.blocks.columns, width) for name, width in zip(("dk", "dv"), widths)},
        _cost(frame, walk, saved, 2 * sum(widths)),
        plan.interpret,
    )
    return results["dk"], results["dv"]


def all_gradients(plan: Plan, saved: Saved, terms: Terms) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v: weights are computed once, and that of q stays in VMEM until it is whole.

    Tiles go by columns, as for k and v. All tiles of a key head are on one core, one after the other, so
    sums have one order.
    """
    frame = Frame(plan, plan.backward, plan.repeats, keys_first=True)
    scores, walk = Scores.of(frame, terms), by_keys(frame, terms)
    widths = plan.width, plan.value_width
    whole = Block((None, frame.heads, plan.queries, plan.width), lambda at: (at.batch, at.heads, 0, 0))
    results = call(
        lambda walk, refs: _all_kernel(frame, scores, walk, refs),
        "attention_all_gradients",
        walk,
        scores.scalars(),
        {**saved.inputs(frame), **scores.inputs()},
        {
            "dq": (saved.q.shape, saved.q.dtype, whole),
            "dk": (saved.k.shape, saved.k.dtype, frame.keys(widths[0])),
            "dv": (saved.v.shape, saved.v.dtype, frame.keys(widths[1])),
        },
        {
            "dq": (frame.heads, plan.queries, plan.width),
            **{name: (frame.blocks.columns, width) for name, width in zip(("dk", "dv"), widths)},
        },
        _cost(frame, walk, saved, 3 * widths[0] + 2 * widths[1]),
        plan.interpret,
    )
    return results["dq"], results["dk"], results["dv"]


def by_keys(frame: Frame, terms: Terms) -> Walk:
    """Batch rows and key heads, and for each its live tiles, a column of tiles after the other."""
    plan, grid = frame.plan, frame.plan.grid(frame.blocks)
    blocks = block_map(terms.mask, grid, plan.groups).swapaxes(2, 3)
    lists = tile_list(blocks, static_blocks(terms.mask, grid).T)
    return Walk(
        (plan.batch, plan.groups, lists.shape[2]),
        lists,
        lambda batch, group, number: (batch, group, number),
        lambda batch, group, number, entry: At(batch, group, group, entry.column, entry.row),
        parallel=2,
    )


def score_gradient(
    scores: Scores, refs: Refs, tile: Tile, masked: bool, lse: Array, delta: Array
) -> tuple[Array, Array]:
    """Weights before dropout, gradient of the biased scores; `lse` and `delta` spread over the tile."""
    q, d_out = refs.inputs["q"][tile.head], refs.inputs["d_out"][tile.head]
    k, v = refs.inputs["k"][tile.keys, :], refs.inputs["v"][tile.keys, :]
    raw, bent = scores.scores(q, k, refs, tile, masked)
    weights = jnp.exp2(raw - lse)
    left, right = (v, d_out) if scores.frame.keys_first else (d_out, v)
    d_weights = product(left, right, transposed=True)
    return weights, scores.gradient(weights, d_weights, delta, bent, refs, tile)


def spread_statistics(frame: Frame, refs: Refs) -> None:
    """Bring `lse` and `delta` from along the lanes to the rows of scratch memory."""
    for name in ("lse", "delta"):
        for head in range(frame.heads):
            scratch = refs.scratch[name]
            scratch[head] = jnp.broadcast_to(refs.inputs[name][head].T, scratch.shape[1:])


def _query_kernel(frame: Frame, scores: Scores, walk: Walk, refs: Refs) -> None:
    _, entry, at = ids_and_entry(walk, refs)
    dq = refs.scratch["dq"]

    @pl.when(entry.first)
    def start() -> None:
        dq[...] = jnp.zeros(dq.shape, dq.dtype)

    def body(tile: Tile, masked: bool) -> None:
        k = refs.inputs["k"][tile.keys, :]
        lse, delta = (refs.inputs[name][tile.head] for name in ("lse", "delta"))
        _, d_scores = score_gradient(scores, refs, tile, masked, lse, delta)
        dq[tile.head] = dq[tile.head] + turned_product(d_scores.astype(k.dtype), k)

    scores.visit(walk, entry, at, body)

    @pl.when(entry.last)
    def finish() -> None:
        out = refs.outputs["dq"]
        out[...] = (dq[...] * frame.plan.scale).astype(out.dtype)


def _key_kernel(
    frame: Frame, scores: Scores, walk: Walk, refs: Refs, also: Callable[[Tile, Array], None] | None = None
) -> None:
    """`also` gets the gradient of the scores of each chunk."""
    _, entry, at = ids_and_entry(walk, refs)
    dk, dv = refs.scratch["dk"], refs.scratch["dv"]

    @pl.when(entry.first)
    def start() -> None:
        dk[...] = jnp.zeros(dk.shape, dk.dtype)
        dv[...] = jnp.zeros(dv.shape, dv.dtype)

    def body(tile: Tile, masked: bool) -> None:
        q, d_out = refs.inputs["q"][tile.head], refs.inputs["d_out"][tile.head]
        lse, delta = (refs.inputs[name][tile.head] for name in ("lse", "delta"))
        weights, d_scores = score_gradient(scores, refs, tile, masked, lse, delta)
        weights = scores.dropping.kept(weights, refs, tile)
        dv[tile.keys, :] = dv[tile.keys, :] + product(weights.astype(d_out.dtype), d_out)
        dk[tile.keys, :] = dk[tile.keys, :] + product(d_scores.astype(q.dtype), q)
        if also is not None:
            also(tile, d_scores)

    scores.visit(walk, entry, at, body)

    @pl.when(entry.last)
    def finish() -> None:
        refs.outputs["dk"][...] = (dk[...] * frame.plan.scale).astype(refs.outputs["dk"].dtype)
        refs.outputs["dv"][...] = dv[...].astype(refs.outputs["dv"].dtype)


def _all_kernel(frame: Frame, scores: Scores, walk: Walk, refs: Refs) -> None:
    dq, out, rows = refs.scratch["dq"], refs.outputs["dq"], frame.blocks.rows
    step, steps = pl.program_id(2), pl.num_programs(2)

    def each_block(do: Callable[[int, Any], None]) -> None:
        """Of queries: a loop, because what is written out would grow with the length."""
        for head in range(frame.heads):
            block = lambda i, _, head=head: do(head, _part(i * rows, rows))  # noqa: E731
            lax.fori_loop(0, frame.plan.queries // rows, block, None)

    @pl.when(step == 0)
    def start() -> None:
        def clear(head: int, part: Any) -> None:
            dq[head, part] = jnp.zeros((rows, dq.shape[2]), dq.dtype)

        each_block(clear)

    def add(tile: Tile, d_scores: Array) -> None:
        k, part = refs.inputs["k"][tile.keys, :], _part(tile.row, rows)
        dq[tile.head, part] = dq[tile.head, part] + turned_product(d_scores.astype(k.dtype), k)

    _key_kernel(frame, scores, walk, refs, add)

    @pl.when(step == steps - 1)
    def finish() -> None:
        def write(head: int, part: Any) -> None:
            out[head, part] = (dq[head, part] * frame.plan.scale).astype(out.dtype)

        each_block(write)


def _part(start: Any, size: int) -> Any:
    return pl.ds(pl.multiple_of(start, size), size)


def _cost(frame: Frame, walk: Walk, saved: Saved, widths: int) -> Any:
    tiles = frame.plan.batch * frame.plan.heads * walk.lists.shape[2]
    return cost(tiles, frame.blocks.rows * frame.blocks.columns, widths, [*saved, saved.q])
