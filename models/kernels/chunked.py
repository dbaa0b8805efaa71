"""Attention tile by tile in plain XLA: online softmax, time for live tiles only, memory linear in length.

The forward pass visits the tiles of the score matrix that hold allowed pairs and keeps for each query the
greatest score, the sum of exponentials and the weighted values (Milakov & Gimelshein 2018, "Online
normalizer calculation for softmax"; Rabe & Staats 2021, "Self-attention does not need O(n²) memory"). The
backward pass computes each tile again from the log-sum-exp (Dao et al. 2022, "FlashAttention", §3).

Batch and heads stay the leading axes of every product, so where they are sharded nothing is gathered.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .block_sizes import block_sizes, found_fields
from .blocks import FULL, PARTIAL, SKIP, Grid, dynamic_blocks, is_dynamic, static_blocks
from .dropout import Dropout
from .masks import Lengths, Mask
from .merging import sinks_gradient
from .reference import group_heads
from .request import Request
from .spans import Span, accumulation_dtype, pad
from .terms import Terms
from .trees import AnyArray
from .varying import vary, varying_axes

Carry = Any
Residuals = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Chunked:
    """XLA on any platform, with everything `attention` offers; `block` 0 takes tiles from `block_sizes`.

    Where nothing was measured they are near 128 up to a length of 512 and near 256 beyond. Up to 128 there is
    one tile, as fast as a plain softmax. Unrolling the loop over tiles took 12% more time and 2.6 times the
    memory.
    """

    name: str = "chunked"
    block: int | tuple[int, int] = 0

    def supports(self, request: Request) -> str | None:
        """It can do every request."""
        return None

    def unfit(self, request: Request) -> str | None:
        """A single query has no tiles to skip: decoding takes the plain softmax."""
        return "a single query needs no tiles" if request.queries == 1 else None

    def __call__(self, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
        """Output `[B, T, H, K]` and log-sum-exp `[B, H, T]`."""
        given = (q, k, v, terms)
        q, k, v, terms = vary(given, varying_axes(given))
        queries, keys = q.shape[1], k.shape[1]
        row_target, column_target = self._targets(q, k, terms)
        rows, columns = block_size(queries, row_target), block_size(keys, column_target)
        grid = Grid(-(-queries // rows) * rows, -(-keys // columns) * columns, rows, columns)
        terms = terms.extended(grid.queries, grid.keys)
        if grid.keys > keys:
            terms = dataclasses.replace(terms, mask=terms.mask & Lengths(keys))
        q, k, v = pad(q, 1, grid.queries), pad(k, 1, grid.keys), pad(v, 1, grid.keys)
        out, lse = _attend(grid, q, k, v, terms)
        return out[:, :queries], lse[:, :, :queries]

    def candidates(self, request: Request) -> dict[str, list[tuple[int, int]]]:
        """Tiles worth a try for a request, for `modicum bench attention --tune`."""
        length = max(request.queries, request.keys)
        sizes = [size for size in (64, 128, 256, 512) if size <= length] or [length]
        pairs = [(rows, columns) for rows in sizes for columns in sizes]
        return {self.name: [pair for pair in pairs if pair[0] <= 2 * pair[1] <= 4 * pair[0]]}

    def with_blocks(self, name: str, blocks: tuple[int, ...]) -> "Chunked":
        """Itself with tiles of so many queries and keys."""
        return dataclasses.replace(self, block=(blocks[0], blocks[1]))

    def _targets(self, q: Array, k: Array, terms: Terms) -> tuple[int, ...]:
        """How many queries and keys a tile should have about."""
        if self.block:
            return self.block if isinstance(self.block, tuple) else (self.block, self.block)
        fields = found_fields(q.dtype.name, q.shape[3], terms.mask)
        return block_sizes(self.name, length=max(q.shape[1], k.shape[1]), **fields) or (256, 256)


class Tile(NamedTuple):
    """A piece of the score matrix; all its pairs are allowed where it is not `partial`."""

    rows: Span
    columns: Span
    partial: bool


def block_size(length: int, target: int) -> int:
    """The size, near `target` and a multiple of 8, that cuts `length` into blocks with little padding."""
    if length <= target:
        return length
    count = -(-length // target)
    return -(-length // count // 8) * 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(grid: Grid, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
    return _forward(grid, q, k, v, terms)[0]


def _forward(grid: Grid, q: Array, k: Array, v: Array, terms: Terms) -> tuple[tuple[Array, Array], Residuals]:
    (batch, queries, heads, _), groups = q.shape, k.shape[2]
    dtype = accumulation_dtype(q.dtype)

    def visit(carry: Carry, tile: Tile) -> Carry:
        out, top, total = carry
        raw = _raw_scores(terms, _rows(q, tile, groups), _columns(k, tile), tile)
        scores = _cap_and_mask(terms, raw, tile)
        old_top, old_total = tile.rows.cut(top, 3), tile.rows.cut(total, 3)
        new_top = jnp.maximum(old_top, scores.max(-1))
        finite = jnp.where(new_top == -jnp.inf, 0, new_top)  # no key so far: exp(-inf - 0) = 0
        weights, shrink = jnp.exp(scores - finite[..., None]), jnp.exp(old_top - finite)
        kept = weights if terms.dropout is None else weights * _kept(terms.dropout, weights, tile)
        values = _product("bgrts,bgsk->bgrtk", kept, _columns(v, tile))
        out = _put(out, _ungroup(_rows(out, tile, groups) * shrink[..., None] + values), tile.rows, 1)
        total = _put(total, old_total * shrink + weights.sum(-1), tile.rows, 3)
        return out, _put(top, new_top, tile.rows, 3), total

    zeros = jnp.zeros((batch, groups, heads // groups, queries), dtype)
    start = (jnp.zeros((batch, queries, heads, v.shape[3]), dtype), zeros - jnp.inf, zeros)
    out, top, total = over_tiles(grid, terms.mask, visit, vary(start, varying_axes(q)))
    if terms.sinks is not None:
        out, top, total = _with_sinks(terms.sinks, out, top, total)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total)).reshape(batch, heads, queries)
    inverse = (1 / total).reshape(batch, heads, queries).swapaxes(1, 2)[..., None]
    out = out * inverse
    return (out.astype(q.dtype), lse), (q, k, v, terms, out, lse)


def _backward(grid: Grid, residuals: Residuals, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    # `out` is of weights and values that were never rounded: in half precision the error of `delta` would
    # enter every score of a row with one sign, and sums over rows, such as the gradient of ALiBi's slopes,
    # would err 13 times as much as the plain softmax (4 times where the weights alone are rounded)
    q, k, v, terms, out, lse = residuals
    (d_out, d_lse), groups = cotangents, k.shape[2]
    delta = _product("bthk,bthk->bht", out, d_out) - d_lse
    empty = lse == -jnp.inf
    delta = jnp.where(empty, 0, delta)
    d_sinks = None if terms.sinks is None else sinks_gradient(terms.sinks, lse, delta)
    delta = group_heads(delta, groups)
    norm = group_heads(jnp.where(empty, jnp.inf, lse), groups)  # a row without a key: exp(-inf - inf) = 0

    def visit(carry: Carry, tile: Tile) -> Carry:
        dq, dk, dv, d_bias = carry
        q_tile, d_out_tile = _rows(q, tile, groups), _rows(d_out, tile, groups)
        k_tile, v_tile = _columns(k, tile), _columns(v, tile)
        raw = _raw_scores(terms, q_tile, k_tile, tile)
        weights = jnp.exp(_cap_and_mask(terms, raw, tile) - tile.rows.cut(norm, 3)[..., None])
        kept, d_weights = weights, _product("bgrtk,bgsk->bgrts", d_out_tile, v_tile)
        if terms.dropout is not None:
            keep = _kept(terms.dropout, weights, tile)
            kept, d_weights = weights * keep, d_weights * keep
        d_scores = weights * (d_weights - tile.rows.cut(delta, 3)[..., None])
        if terms.soft_cap is not None:
            d_scores *= 1 - jnp.tanh(raw / terms.soft_cap) ** 2
        if terms.bias is not None:
            d_bias = terms.bias.add_gradient(d_bias, _merge_heads(d_scores), tile.rows, tile.columns)
        d_scores = (d_scores * terms.scale).astype(q.dtype)
        dq = _add(dq, _ungroup(_product("bgrts,bgsk->bgrtk", d_scores, k_tile)), tile.rows, 1)
        # [K, s] and not [s, K]: for the latter XLA:CPU transposes the large factor (26 against 76 GFLOP/s)
        dk = _add(dk, _product("bgrtk,bgrts->bgks", q_tile, d_scores), tile.columns, 3)
        dv = _add(dv, _product("bgrtk,bgrts->bgks", d_out_tile, kept.astype(v.dtype)), tile.columns, 3)
        return dq, dk, dv, d_bias

    zeros = functools.partial(jnp.zeros, dtype=lse.dtype)
    d_bias = jax.tree.map(lambda x: zeros(x.shape), terms.bias)
    start = (zeros(q.shape), *(zeros((*x.shape[::2], x.shape[3], x.shape[1])) for x in (k, v)), d_bias)
    dq, dk, dv, d_bias = over_tiles(grid, terms.mask, visit, vary(start, varying_axes(q)))
    dk, dv = (x.transpose(0, 3, 1, 2) for x in (dk, dv))
    d_terms = terms.cotangent(d_bias, d_sinks)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_terms


_attend.defvjp(_forward, _backward)


def over_tiles(grid: Grid, mask: Mask, visit: Callable[[Carry, Tile], Carry], carry: Carry) -> Carry:
    """Fold `visit` over the tiles with allowed pairs: those wholly allowed first, which need no mask.

    Tiles that the structure of the mask rules out are never in the loop; those that its arrays rule out are
    sorted to the end on the device, and the loop stops before them.
    """
    blocks = static_blocks(mask, grid)
    for wanted in (FULL, PARTIAL):
        tiles = np.argwhere(blocks == wanted).astype(np.int32)
        order: Array = jnp.asarray(tiles)
        count: int | Array = len(tiles)
        if wanted == PARTIAL and len(tiles) > 1 and is_dynamic(mask):
            live = (dynamic_blocks(mask, grid) != SKIP).any((0, 1))[tiles[:, 0], tiles[:, 1]]
            order, count = order[jnp.argsort(~live)], live.sum()

        def step(i: Any, carry: Carry, order: AnyArray = order, partial: bool = wanted == PARTIAL) -> Carry:
            rows = Span(order[i, 0] * grid.rows, grid.rows)
            return visit(carry, Tile(rows, Span(order[i, 1] * grid.columns, grid.columns), partial))

        if len(tiles):
            carry = lax.fori_loop(0, count, step, carry)
    return carry


def _raw_scores(terms: Terms, q: Array, k: Array, tile: Tile) -> Array:
    """The scores of a tile before soft cap and mask, `[B, G, R, t, s]`."""
    scores = _product("bgrtk,bgsk->bgrts", q, k) * terms.scale
    if terms.bias is not None:
        scores += group_heads(terms.bias.tile(tile.rows, tile.columns), k.shape[1]).astype(scores.dtype)
    return scores


def _cap_and_mask(terms: Terms, scores: Array, tile: Tile) -> Array:
    if terms.soft_cap is not None:
        scores = terms.soft_cap * jnp.tanh(scores / terms.soft_cap)
    if not tile.partial:
        return scores
    allowed = group_heads(terms.mask.predicate(tile.rows, tile.columns), scores.shape[1])
    return jnp.where(allowed, scores, -jnp.inf)


def _kept(dropout: Dropout, weights: Array, tile: Tile) -> Array:
    """What dropout multiplies a tile's weights `[B, G, R, t, s]` by: 0 or `1 / (1 - rate)`."""
    batch, groups, repeats = weights.shape[:3]
    keep = dropout.keep(Span(0, batch), Span(0, groups * repeats), tile.rows, tile.columns)
    return keep.reshape(weights.shape).astype(weights.dtype) / (1 - dropout.rate)


def _with_sinks(sinks: AnyArray, out: Array, top: Array, total: Array) -> tuple[Array, Array, Array]:
    """One more logit in the sum of every row: out `[B, T, H, K]`, top and total `[B, G, R, T]`."""
    sink = sinks.astype(top.dtype).reshape(*top.shape[1:3], 1)
    new_top = jnp.maximum(top, sink)
    finite = jnp.where(new_top == -jnp.inf, 0, new_top)
    shrink = jnp.exp(top - finite)
    of_rows = shrink.reshape(out.shape[0], out.shape[2], -1).swapaxes(1, 2)[..., None]
    return out * of_rows, finite, total * shrink + jnp.exp(sink - finite)


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=accumulation_dtype(a.dtype))


def _rows(array: Array, tile: Tile, groups: int) -> Array:
    """The rows of `[B, T, H, K]` as `[B, G, R, t, K]`."""
    part = tile.rows.cut(array, 1)
    batch, size, heads, width = part.shape
    return part.reshape(batch, size, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)


def _columns(array: Array, tile: Tile) -> Array:
    """The columns of `[B, S, G, K]` as `[B, G, s, K]`."""
    return tile.columns.cut(array, 1).transpose(0, 2, 1, 3)


def _ungroup(part: Array) -> Array:
    """`[B, G, R, t, K]` to `[B, t, H, K]`."""
    batch, groups, repeats, size, width = part.shape
    return part.transpose(0, 3, 1, 2, 4).reshape(batch, size, groups * repeats, width)


def _merge_heads(part: Array) -> Array:
    """`[B, G, R, t, s]` to `[B, H, t, s]`."""
    return part.reshape(part.shape[0], -1, *part.shape[3:])


def _put(array: Array, tile: Array, span: Span, axis: int) -> Array:
    return lax.dynamic_update_slice_in_dim(array, tile, span.start, axis)


def _add(array: Array, tile: Array, span: Span, axis: int) -> Array:
    return _put(array, lax.dynamic_slice_in_dim(array, span.start, span.size, axis) + tile, span, axis)
