"""The Hopper kernel for a cache in pages as one of `paged.DECODERS`: what it can do, layout, and merging.

The kernel, `pages`, and with it Pallas, is imported when it is first used.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array

from .... import InputError
from ..biases import ALiBi
from ..masks import Lengths, describe
from ..merging import merge, merge_sinks
from ..page_gradient import with_gathered_gradient
from ..ranges import Ranges, no_ranges, ranges
from ..request import PARTITIONED, Request
from ..terms import Terms
from ..varying import vary, varying_axes
from .implementation import TYPES, no_hopper

if TYPE_CHECKING:
    from ..paged import Paged

WIDTHS = (64, 128)
BLOCKS = 264  # two for each of the 132 multiprocessors of an H100 or H200
LEAST_KEYS = 256  # of a split: less would not pay for merging
MOST_ROWS = 256  # a key head's query heads times queries: with more, products take longer than memory


@dataclasses.dataclass(frozen=True)
class HopperPages:
    """Pallas on H100 and H200 reads pages in place and splits each row's keys; `interpret` as in `Hopper`."""

    name: str = "hopper"
    interpret: Any = None
    blocks: int = BLOCKS
    least_keys: int = LEAST_KEYS

    def supports(self, request: Request) -> str | None:
        """A Hopper GPU, 16-bit caches of heads 64 or 128 wide, masks that are a range of keys a query."""
        if self.interpret is None and (reason := no_hopper(request.platform)):
            return reason
        if request.dtype not in TYPES:
            return f"its matrix products are of {' or '.join(TYPES)}, not {request.dtype}"
        if request.width not in WIDTHS or request.value_width != request.width:
            found = f"{request.width} and {request.value_width}"
            return f"it reads pages of keys and values both 64 or both 128 wide, not {found}"
        if request.page % 8 or (request.page % 64 and 64 % request.page):
            return f"its pages hold 8, 16, 32 or a multiple of 64 keys, not {request.page}"
        if (rows := request.heads // request.kv_heads * request.queries) > MOST_ROWS:
            return f"the queries of a key head are {rows} rows, more than {MOST_ROWS}"
        if not isinstance(request.bias, ALiBi | None):
            return f"a {describe(request.bias)} bias is not computed from positions"
        return no_ranges(request.mask, request.queries, request.keys)

    def unfit(self, request: Request) -> str | None:
        """What XLA would have to partition."""
        return PARTITIONED if request.partitioned else None

    def __call__(self, q: Array, k: Paged, v: Paged, lengths: Array, terms: Terms) -> tuple[Array, Array]:
        """Output `[B, T, H, K]` in the type of q and log-sum-exp `[B, H, T]`, float32."""
        if {k.pages.dtype, v.pages.dtype} != {q.dtype}:
            found = f"{q.dtype} queries on pages of {k.pages.dtype} keys and {v.pages.dtype} values"
            raise InputError(
                f"impl='hopper' multiplies numbers of one type, not {found}; use impl='gathered'"
            )
        return with_gathered_gradient(functools.partial(_attend, self), q, k, v, lengths, terms)


def _attend(
    how: HopperPages, q: Array, k: Paged, v: Paged, lengths: Array, terms: Terms
) -> tuple[Array, Array]:
    from .pages import ROWS, PageOperands, attend_pages

    (batch, queries, heads, width), groups = q.shape, k.shape[2]
    count = heads // groups * queries
    rows = -(-count // ROWS) * ROWS
    laid = q.reshape(batch, queries, groups, -1, width).transpose(0, 2, 3, 1, 4)
    laid = laid.reshape(batch, groups, count, width)
    pages = _pages(how, (batch, groups), rows, k, terms)
    seen = ranges(terms.mask & Lengths(lengths), queries, k.shape[1])
    repeated = functools.partial(_over_rows, members=heads // groups, rows=rows)
    slopes, positions = _alibi(terms, batch, groups, queries, rows)
    tables = [jnp.clip(x.table, 0, len(x.pages) - 1).astype(jnp.int32) for x in (k, v)]
    operands = PageOperands(
        jnp.pad(laid, ((0, 0), (0, 0), (0, rows - count), (0, 0))),
        k.pages,
        v.pages,
        tables[0],
        tables[1],
        lengths.astype(jnp.int32),
        _bounds(seen, batch, pages.splits, k.shape[1]),
        _mask(seen, repeated),
        slopes,
        positions,
    )
    found = vary(attend_pages(pages, operands), varying_axes(operands))
    out, lse = _merged(*found, batch * groups)
    out, lse = (x.reshape(batch, groups, rows, -1)[:, :, :count] for x in (out, lse))
    out = out.reshape(batch, groups, -1, queries, width).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    lse = lse.reshape(batch, heads, queries)
    if terms.sinks is not None:
        out, lse = merge_sinks(out, lse, jnp.asarray(terms.sinks))
    return out.astype(q.dtype), lse


def _pages(how: HopperPages, size: tuple[int, int], rows: int, k: Paged, terms: Terms) -> Any:
    """What is static; the number of splits is a power of two, so that they are merged in pairs."""
    from .operations import Interpreted, Warpgroup
    from .pages import ROWS, Pages
    from .problem import Problem

    (batch, groups), (_, room, _, width) = size, k.shape
    wanted = min(how.blocks // (batch * groups * (rows // ROWS)), room // how.least_keys)
    operations = Warpgroup() if how.interpret is None else Interpreted(how.interpret)
    scale, cap = terms.scale, terms.soft_cap
    problem = Problem(batch, rows, room, groups, groups, width, k.pages.dtype, scale, cap, operations)
    splits = 1 << max(0, int(math.log2(max(wanted, 1))))
    return Pages(problem, k.pages.shape[1], splits, stages=4 if width == 64 else 2)


def _over_rows(of_queries: Array | None, members: int, rows: int) -> Array | None:
    """`[B, T]` for each row: the queries of one head after the other, and padding that sees nothing."""
    if of_queries is None:
        return None
    repeated = jnp.tile(of_queries, (1, members))
    return jnp.pad(repeated, ((0, 0), (0, rows - repeated.shape[1])))


def _mask(seen: Ranges, repeated: Any) -> Any:
    from .masking import MaskOperands

    ids = seen.key_ids
    if ids is not None:
        ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % 64)))
    starts, ends = seen.other_starts, seen.other_ends
    return MaskOperands(None, repeated(starts), repeated(ends), repeated(seen.query_ids), ids)


def _bounds(seen: Ranges, batch: int, splits: int, room: int) -> Array:
    """First tile and end of each split `[B, splits, 2]`: even parts of what any query of a row sees."""
    from .pages import KEYS

    ends = seen.ends
    assert ends is not None  # lengths are among the masks
    starts = jnp.zeros_like(ends) if seen.starts is None else seen.starts
    some = starts < ends
    first = jnp.where(some, starts, room).min(-1) // KEYS
    end = -(-jnp.where(some, ends, 0).max(-1) // KEYS)
    each = -(-jnp.maximum(end - first, 0) // splits)
    begin = first[:, None] + each[:, None] * jnp.arange(splits)
    found = jnp.stack([begin, jnp.minimum(begin + each[:, None], end[:, None])], -1)
    return jnp.broadcast_to(found, (batch, splits, 2)).astype(jnp.int32)


def _alibi(
    terms: Terms, batch: int, groups: int, queries: int, rows: int
) -> tuple[Array | None, Array | None]:
    """Slopes `[G, rows]` and positions of queries `[B, rows]`, if there is a bias."""
    if not isinstance(terms.bias, ALiBi):
        return None, None
    slopes = jnp.repeat(jnp.asarray(terms.bias.slopes, jnp.float32).reshape(groups, -1), queries, axis=1)
    offset = jnp.broadcast_to(jnp.asarray(terms.bias.offset, jnp.float32).reshape(-1, 1), (batch, 1))
    positions = jnp.tile(offset + jnp.arange(queries), (1, slopes.shape[1] // queries))
    padded = [jnp.pad(x, ((0, 0), (0, rows - x.shape[1]))) for x in (slopes, positions)]
    return padded[0], padded[1]


def _merged(out: Array, lse: Array, heads: int) -> tuple[Array, Array]:
    """One result of those of all splits, in pairs; `merge` is given a batch of splits, rows as queries."""
    splits, *_, rows, width = out.shape
    out = out.reshape(splits, heads, rows, width).swapaxes(1, 2)
    lse = lse.reshape(splits, heads, rows)
    while len(out) > 1:
        half = len(out) // 2
        out, lse = merge(out[:half], lse[:half], out[half:], lse[half:])
    return out[0].swapaxes(0, 1), lse[0]
