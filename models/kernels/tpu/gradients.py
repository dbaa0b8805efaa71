"""The backward pass with respect to q, and that with respect to k and v: each computes the weights again.

For q the tiles of a row of the score matrix are visited, queries along the rows of registers as in the
forward pass. For k and v it is the tiles of a column, keys along the rows: then all products are of
the kind that the matrix unit does best, with the shorter factor standing still.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..block_lists import block_map, tile_list
from ..blocks import static_blocks
from ..terms import Terms
from .call import At, Block, Refs, Walk, call, cost, ids_and_entry
from .forward import across, by_queries
from .pieces import Frame, Tile
from .plan import Plan
from .scores import Scores, product


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
    frame = Frame(plan, plan.backward, plan.repeats, keys_first=False)
    scores, walk = Scores.of(frame, terms), by_queries(frame, terms)
    rows, width = plan.backward.rows, plan.width
    results = call(
        lambda walk, refs: _query_kernel(frame, scores, walk, refs),
        "attention_query_gradient",
        walk,
        scores.scalars(),
        {**saved.inputs(frame), **scores.inputs()},
        {"dq": (saved.q.shape, saved.q.dtype, frame.queries(width))},
        {
            "lse": (frame.heads, rows, plan.lanes),
            "delta": (frame.heads, rows, plan.lanes),
            "dq": (frame.heads, rows, width),
        },
        _cost(plan, walk, saved, 2 * width + plan.value_width),
        plan.interpret,
    )
    return results["dq"]


def key_gradients(plan: Plan, saved: Saved, terms: Terms) -> tuple[Array, Array]:
    """The gradients of k and v, `[B, G, S, K]` and `[B, G, S, V]`."""
    frame = Frame(plan, plan.backward, plan.repeats, keys_first=True)
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
        {name: (plan.backward.columns, width) for name, width in zip(("dk", "dv"), widths)},
        _cost(plan, walk, saved, 2 * sum(widths)),
        plan.interpret,
    )
    return results["dk"], results["dv"]


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
        spread_statistics(frame, refs)

    def body(tile: Tile, masked: bool) -> None:
        k, chunk = refs.inputs["k"][tile.keys, :], frame.blocks.chunk
        lse, delta = (across(refs.scratch[name][tile.head], chunk) for name in ("lse", "delta"))
        _, d_scores = score_gradient(scores, refs, tile, masked, lse, delta)
        dq[tile.head] = dq[tile.head] + product(d_scores.astype(k.dtype), k)

    scores.visit(walk, entry, at, body)

    @pl.when(entry.last)
    def finish() -> None:
        out = refs.outputs["dq"]
        out[...] = (dq[...] * frame.plan.scale).astype(out.dtype)


def _key_kernel(frame: Frame, scores: Scores, walk: Walk, refs: Refs) -> None:
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

    scores.visit(walk, entry, at, body)

    @pl.when(entry.last)
    def finish() -> None:
        refs.outputs["dk"][...] = (dk[...] * frame.plan.scale).astype(refs.outputs["dk"].dtype)
        refs.outputs["dv"][...] = dv[...].astype(refs.outputs["dv"].dtype)


def _cost(plan: Plan, walk: Walk, saved: Saved, widths: int) -> Any:
    tiles = plan.batch * plan.heads * walk.lists.shape[2]
    return cost(tiles, plan.backward.rows * plan.backward.columns, widths, [*saved, saved.q])
