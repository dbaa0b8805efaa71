"""The registered way to attend to a cache in pages on TPUs: what it can do, layout, and gradients.

The kernel, `pages`, and with it Pallas, is imported when it is first used.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from ..biases import ALiBi
from ..masks import describe
from ..merging import merge_sinks
from ..page_gradient import with_gathered_gradient
from ..ranges import no_ranges, ranges
from ..request import PARTITIONED, Request
from ..terms import Terms
from .plan import LANES, SUBLANES, padded_length
from .schedule import schedule

if TYPE_CHECKING:
    from ..paged import Paged

DTYPES = ("float32", "bfloat16")
MOST_ROWS = (
    256  # query heads times queries: with more the masking of other groups' keys takes longer than copies
)
MOST_ENTRIES = 1 << 17  # numbers of 4 bytes in half of the scalar memory of 1 MiB
MOST_BUFFERS = 32 << 20  # bytes
BLOCK = 2048  # keys times key heads of a block: copies of about a microsecond, which hide those of the table


@dataclasses.dataclass(frozen=True)
class Pages:
    """Pallas on TPUs reads pages in place, two blocks of them in turn; with `interpret` anywhere, slowly."""

    name: str = "tpu"
    interpret: Any = False
    block: int = BLOCK
    unrolled: int = 8  # copies that are asked for without asking whether there are more

    def supports(self, request: Request) -> str | None:
        """TPUs, few rows, masks that show each query one range of keys, no bias but ALiBi."""
        if request.platform != "tpu" and not self.interpret:
            return f"it is for TPUs, not {request.platform}"
        if request.dtype not in DTYPES:
            return f"it computes in {' and '.join(DTYPES)}, not {request.dtype}"
        if not isinstance(request.bias, ALiBi | None):
            return f"a {describe(request.bias)} bias is not computed from positions"
        if (rows := request.heads * request.queries) > MOST_ROWS:
            return (
                f"{request.queries} queries of {request.heads} heads are {rows} rows, more than {MOST_ROWS}"
            )
        entries = 2 * request.batch * (request.keys // request.page + 2 * request.queries)
        if entries > MOST_ENTRIES:
            return f"tables of {entries} numbers do not fit the scalar memory ({MOST_ENTRIES})"
        return _too_large(request, self.block) or _no_intervals(request)

    def unfit(self, request: Request) -> str | None:
        """What XLA would have to partition, or to lay out again before each step."""
        if request.partitioned:
            return PARTITIONED
        if request.kv_heads not in (1, 2, 4) and request.kv_heads % SUBLANES:
            return f"pages of {request.kv_heads} key heads would be copied: 1, 2, 4 or 8, 16, … are not"
        if width := next((w for w in (request.width, request.value_width) if w % LANES), 0):
            return f"pages of heads {width} wide would be copied: multiples of {LANES} are not"
        return None

    def __call__(self, q: Array, k: Paged, v: Paged, lengths: Array, terms: Terms) -> tuple[Array, Array]:
        """Output `[B, T, H, V]` and log-sum-exp `[B, H, T]`."""
        return with_gathered_gradient(functools.partial(_attend, self), q, k, v, lengths, terms)


def _attend(how: Pages, q: Array, k: Paged, v: Paged, lengths: Array, terms: Terms) -> tuple[Array, Array]:
    from .pages import PagePlan, attend_pages

    (batch, queries, heads, width), (_, page, groups, value_width) = q.shape, v.pages.shape
    rows = padded_length(heads * queries, 2 * SUBLANES, 2 * SUBLANES)
    plan = PagePlan(
        *(batch, queries, heads, groups, rows, width, value_width, page, k.table.shape[1]),
        pages=_pages_of_block(page, groups, how.block, k.table.shape[1]),
        splits=2 if batch % 2 == 0 else 1,  # for the two cores of some chips
        scale=terms.scale,
        soft_cap=terms.soft_cap,
        alibi=terms.bias is not None,
        unrolled=how.unrolled,
        interpret=how.interpret,
    )
    laid = jnp.pad(q.swapaxes(1, 2).reshape(batch, -1, width), ((0, 0), (0, rows - heads * queries), (0, 0)))
    # an axis of size 1 beside the last would be laid out in registers of its own
    pools: Any = [x.pages.reshape(len(x.pages), page, -1) if groups == 1 else x.pages for x in (k, v)]
    tables = [jnp.clip(x.table, 0, len(x.pages) - 1).astype(jnp.int32).reshape(-1) for x in (k, v)]
    order = schedule(*_intervals(terms, lengths, queries, k.shape[1]), plan.keys, plan.splits)
    out, lse = attend_pages(
        plan, laid, pools, jnp.concatenate(tables), order, _alibi(terms, rows, queries, batch)
    )
    out = out[:, : heads * queries].reshape(batch, heads, queries, value_width).swapaxes(1, 2)
    lse = lse[:, : heads * queries].reshape(batch, heads, queries)
    return (out, lse) if terms.sinks is None else _with_sinks(out, lse, terms.sinks)


def _with_sinks(out: Array, lse: Array, sinks: Any) -> tuple[Array, Array]:
    merged, lse = merge_sinks(out, lse, jnp.asarray(sinks))
    return merged.astype(out.dtype), lse


def _intervals(terms: Terms, lengths: Array, queries: int, keys: int) -> tuple[Array, Array]:
    """The keys that each query sees, `[B, T]` both."""
    found, shape = ranges(terms.mask, queries, keys), (len(lengths), queries)
    starts = jnp.broadcast_to(0 if found.starts is None else found.starts, shape)
    ends = jnp.broadcast_to(keys if found.ends is None else found.ends, shape)
    return starts, jnp.minimum(ends, lengths[:, None])


def _alibi(terms: Terms, rows: int, queries: int, batch: int) -> list[Array]:
    """Slopes `[rows, 1]` and positions of first queries `[B]`, if there is a bias."""
    if terms.bias is None:
        return []
    assert isinstance(terms.bias, ALiBi)
    slopes = jnp.repeat(jnp.asarray(terms.bias.slopes, jnp.float32), queries)
    offset = jnp.asarray(terms.bias.offset, jnp.int32)
    return [jnp.pad(slopes, (0, rows - len(slopes)))[:, None], jnp.broadcast_to(offset, (batch,))]


def _pages_of_block(page: int, groups: int, block: int, room: int) -> int:
    return max(1, min(block // (page * groups), room))


def _too_large(request: Request, block: int) -> str | None:
    pages = _pages_of_block(request.page, request.kv_heads, block, request.keys // request.page)
    places = pages * request.page * max(request.kv_heads, SUBLANES)
    widths = sum(padded_length(width, LANES, LANES) for width in (request.width, request.value_width))
    size = 2 * places * widths * jnp.dtype(request.dtype).itemsize
    return f"two blocks of pages take {size >> 20} MiB" if size > MOST_BUFFERS else None


def _no_intervals(request: Request) -> str | None:
    """Why the mask is no range of keys for each query, or None; ids of keys would have to be read too."""
    if reason := no_ranges(request.mask, request.queries, request.keys):
        return reason
    found = jax.eval_shape(lambda mask: ranges(mask, request.queries, request.keys), request.mask)
    return None if found.key_ids is None else f"{describe(request.mask)} compares ids of keys"
