"""The gradient of a bias, summed in the kernel over what the bias is shared by.

It is a kernel of its own: where the bias is not trained, the compiler drops it. Its grid goes over the batch
rows and heads that the bias tells apart, the tiles, and innermost those that share the bias, so the gradient
of a `[1, H, T, S]` array is never written as `[B, H, T, S]`; Bucketed's is a sum over diagonals, ALiBi's one
number a head, that of relations a sum by rows of the table.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..biases import ALiBi, Bias, Bucketed, Dense
from ..block_lists import agreed, block_map, tile_list
from ..blocks import static_blocks
from ..operands import Axes
from ..relations import Relations
from ..terms import Terms
from .biases import ALiBiInside, BucketedInside, DenseInside
from .call import At, Block, Refs, Walk, call, cost, ids_and_entry
from .forward import across
from .gradients import Saved, score_gradient, spread_statistics
from .pieces import Frame, Tile
from .plan import SUBLANES, Plan
from .relations import RelationsInside, add_by_row
from .scores import Scores
from .toeplitz import diagonals


def bias_gradient(plan: Plan, saved: Saved, terms: Terms) -> Bias | None:
    """A tree like the bias with float32 gradients in the place of its floating arrays, or None."""
    if terms.bias is None:
        return None
    frame = Frame(plan, plan.backward, 1, keys_first=False)
    scores = Scores.of(frame, terms)
    match terms.bias, scores.bias:
        case Dense(values=values), DenseInside(operand=operand):
            total = _summed(plan, saved, terms, scores, operand.array.shape, operand.axes)
            total = total.swapaxes(2, 3) if operand.axes is Axes.QUERIES else total
            return Dense(_to_shape(total, values.shape))
        case Bucketed(), BucketedInside() as inside:
            shape = (1, plan.heads, SUBLANES, inside.length())
            total = _summed(plan, saved, terms, scores, shape, None)[0]
            gradient = jax.vjp(inside.table, jnp.asarray(terms.bias.table, jnp.float32))[1](total)[0]
            return dataclasses.replace(terms.bias, table=gradient)
        case Relations(table=table), RelationsInside() as inside:
            shape = (1, plan.heads, inside.length() // plan.lanes, plan.lanes)
            total = _summed(plan, saved, terms, scores, shape, None).reshape(plan.heads, -1)
            return dataclasses.replace(terms.bias, table=total.T[: table.shape[0]])
        case ALiBi(), _:
            total = _summed(plan, saved, terms, scores, (1, plan.heads, 1, plan.lanes), None)
            return dataclasses.replace(terms.bias, slopes=-total.sum((0, 2, 3)))
    raise NotImplementedError(type(terms.bias).__name__)


def _summed(
    plan: Plan, saved: Saved, terms: Terms, scores: Scores, shape: tuple[int, ...], axes: Axes | None
) -> Array:
    """The sum, float32 of `shape`: by tiles where `axes` are given, else one block a head."""
    frame = scores.frame
    walk = _walk(frame, terms, shape[:2], axes)
    rows, columns = frame.blocks.rows, frame.blocks.columns
    block = {
        None: Block((None, None, *shape[2:]), lambda at: (0, at.heads, 0, 0)),
        Axes.PAIRS: Block((None, None, rows, columns), lambda at: (*_kept(shape, at), at.row, at.column)),
        Axes.KEYS: Block((None, None, 1, columns), lambda at: (*_kept(shape, at), 0, at.column)),
        Axes.QUERIES: Block((None, None, 1, rows), lambda at: (*_kept(shape, at), 0, at.row)),
    }[axes]
    results = call(
        lambda walk, refs: _kernel(scores, axes, walk, refs),
        "attention_bias_gradient",
        walk,
        scores.scalars(),
        {**saved.inputs(frame), **scores.inputs()},
        {"bias": (shape, jnp.float32, block)},
        {**dict.fromkeys(("lse", "delta"), (1, rows, plan.lanes)), **_memory(scores)},
        cost(
            plan.batch * plan.heads * walk.lists.shape[2],
            rows * columns,
            plan.width + plan.value_width,
            list(saved),
        ),
        plan.interpret,
    )
    return results["bias"]


def _memory(scores: Scores) -> dict[str, tuple[int, ...]]:
    """Scratch memory for a kind of bias: that of relations goes through a tile query by query."""
    names = ("d_scores", "row") if isinstance(scores.bias, RelationsInside) else ()
    return dict.fromkeys(names, scores.frame.shape)


def _kept(shape: tuple[int, ...], at: At) -> tuple[Any, Any]:
    return (at.batch if shape[0] > 1 else 0, at.heads if shape[1] > 1 else 0)


def _walk(frame: Frame, terms: Terms, kept: tuple[int, ...], axes: Axes | None) -> Walk:
    """What is kept outermost, what is summed innermost; where each pair has a gradient, every tile."""
    plan, grid = frame.plan, frame.plan.grid(frame.blocks)
    blocks, bound = block_map(terms.mask, grid, plan.groups), static_blocks(terms.mask, grid)
    for axis in (0, 1):
        if kept[axis] == 1 and blocks.shape[axis] > 1:
            blocks = jnp.expand_dims(agreed(blocks, axis), axis)
    by_keys = axes is Axes.KEYS
    if by_keys:
        blocks, bound = blocks.swapaxes(2, 3), bound.T
    lists = tile_list(blocks, bound, every=axes is Axes.PAIRS)

    def group_of(head: Any) -> Any:
        # `//` would ask for the sign, whose lowering looks for a chip that may not be there
        return jax.lax.div(jnp.int32(head), jnp.int32(plan.repeats))

    def locate(batch: Any, head: Any, number: Any, more: Any, other: Any, entry: Any) -> At:
        head = head + other
        row, column = (entry.column, entry.row) if by_keys else (entry.row, entry.column)
        return At(batch + more, head, group_of(head), row, column)

    return Walk(
        (*kept, lists.shape[2], plan.batch // kept[0], plan.heads // kept[1]),
        lists,
        lambda batch, head, number, more, other: (batch, group_of(head), number),
        locate,
        parallel=2,
    )


def _kernel(scores: Scores, axes: Axes | None, walk: Walk, refs: Refs) -> None:
    ids, entry, at = ids_and_entry(walk, refs)
    out, frame = refs.outputs["bias"], scores.frame
    starts = ids[2] == 0 if axes is None else True if axes is Axes.PAIRS else entry.first

    @pl.when((ids[3] == 0) & (ids[4] == 0) & starts)
    def _() -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

    def body(tile: Tile, masked: bool) -> None:
        chunk = frame.blocks.chunk
        lse, delta = (across(refs.scratch[name][0], chunk) for name in ("lse", "delta"))
        _, d_scores = score_gradient(scores, refs, tile, masked, lse, delta)
        _add(scores, axes, d_scores, refs, tile)

    spread_statistics(frame, refs)
    scores.visit(walk, entry, at, body)


def _add(scores: Scores, axes: Axes | None, d_scores: Array, refs: Refs, tile: Tile) -> None:
    """A tile's part."""
    out, lanes = refs.outputs["bias"], scores.frame.plan.lanes
    match scores.bias:
        case DenseInside() if axes is Axes.PAIRS:
            out[:, tile.keys] = out[:, tile.keys] + d_scores
        case DenseInside() if axes is Axes.KEYS:
            out[:, tile.keys] = out[:, tile.keys] + d_scores.sum(0, keepdims=True)
        case DenseInside():
            out[...] = out[...] + d_scores.sum(1, keepdims=True).T
        case BucketedInside() as bias:
            window = bias.window(refs, tile)
            out[:, window] = out[:, window] + diagonals(d_scores, lanes)
        case RelationsInside() as bias:
            add_by_row(out, d_scores, bias.row(refs, tile), refs.scratch)
        case ALiBiInside() as bias:
            by_column = (d_scores * bias.distance(refs, tile)).sum(0, keepdims=True)
            parts = [by_column[:, i : i + lanes] for i in range(0, by_column.shape[1], lanes)]
            out[...] = out[...] + sum(parts)


def _to_shape(total: Array, shape: tuple[int, ...]) -> Array:
    """Sum what was spread from size 1, and cut what was padded."""
    for axis in (2, 3):
        if shape[axis] == 1:
            total = total.sum(axis, keepdims=True)
    return total[:, :, : shape[2], : shape[3]]
