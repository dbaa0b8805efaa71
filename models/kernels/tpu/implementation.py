"""The registered implementation: what it can do, and padding and layout.

The kernels, and with them Pallas, are imported when they are first used.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from ..biases import ALiBi, Bucketed
from ..biases import Dense as DenseBias
from ..masks import Lengths, describe
from ..operands import unknown_mask
from ..request import PARTITIONED, Request, request_of
from ..terms import Terms
from ..varying import vary, varying_axes
from .block_sizes import backward_blocks, fits_fused, forward_blocks
from .plan import LANES, SUBLANES, Blocks, Plan, fitting_block, padded_length, padded_width

DTYPES = ("float32", "bfloat16")
MOST_TILES = 1 << 16  # numbers of 4 bytes in scalar memory, of which there is 1 MiB


@dataclasses.dataclass(frozen=True)
class Tpu:
    """Pallas on TPUs; with `interpret` on anything, slowly, to be tested.

    Without `forward` and `backward` blocks are chosen by the request; without `fused` one kernel computes the
    gradients of q, k and v where that of all queries of a key head fits (see `fits_fused`). `lanes` is the
    chip's; tests may pretend that registers are small.
    """

    name: str = "tpu"
    interpret: Any = False
    forward: Blocks | None = None
    backward: Blocks | None = None
    fused: bool | None = None
    lanes: int = LANES

    def supports(self, request: Request) -> str | None:
        """TPUs, float32 and bfloat16, every mask, and biases that are dense, Bucketed or ALiBi."""
        if request.platform != "tpu" and not self.interpret:
            return f"it is for TPUs, not {request.platform}"
        if request.dtype not in DTYPES:
            return f"it computes in {' and '.join(DTYPES)}, not {request.dtype}"
        if not isinstance(request.bias, DenseBias | Bucketed | ALiBi | None):
            return f"a {describe(request.bias)} bias would need a gather of every pair"
        plan = self._plan(request, Terms(request.mask))
        tiles = max(
            plan.batch * plan.groups * (plan.queries // b.rows) * (plan.keys // b.columns)
            for b in (plan.forward, plan.backward)
        )
        if tiles > MOST_TILES:
            return f"{tiles} tiles are more than scalar memory lists ({MOST_TILES})"
        return unknown_mask(request.mask)

    def unfit(self, request: Request) -> str | None:
        """Few queries fill no block, and XLA does not partition what is written by hand."""
        if request.partitioned:
            return PARTITIONED
        if request.queries < SUBLANES:
            return f"{request.queries} queries are a small part of a block of {self.lanes}"
        return None

    def __call__(self, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
        """Output `[B, T, H, V]` and log-sum-exp `[B, H, T]`."""
        from .attend import attend

        given = (q, k, v, terms)
        q, k, v, terms = vary(given, varying_axes(given))
        (_, queries, _, _), keys = q.shape, k.shape[1]
        plan = self._plan(request_of(q, k, v, terms, lse=True), terms)
        terms = terms.extended(plan.queries, plan.keys)
        if plan.keys > keys:
            terms = dataclasses.replace(terms, mask=terms.mask & Lengths(keys))
        widths = (plan.width, plan.width, plan.value_width)
        lengths = (plan.queries, plan.keys, plan.keys)
        laid = [_lay(x, *sizes) for x, *sizes in zip((q, k, v), lengths, widths)]
        out, lse = attend(plan, *laid, terms)
        return out[:, :, :queries, : v.shape[3]].swapaxes(1, 2), lse[:, :, :queries]

    def _plan(self, request: Request, terms: Terms) -> Plan:
        forward, backward = self.forward or forward_blocks(request), self.backward or backward_blocks(request)
        queries = padded_length(request.queries, max(forward.rows, backward.rows), self.lanes)
        keys = padded_length(request.keys, max(forward.columns, backward.columns), self.lanes)

        def fitted(blocks: Blocks) -> Blocks:
            columns = fitting_block(keys, blocks.columns, self.lanes)
            chunk = fitting_block(columns, blocks.chunk, self.lanes)
            return Blocks(fitting_block(queries, blocks.rows, self.lanes), columns, chunk)

        width, itemsize = padded_width(request.width, self.lanes), jnp.dtype(request.dtype).itemsize
        repeats, fused = request.heads // request.kv_heads, self.fused
        if fused is None:
            fused = fits_fused(repeats, queries, width, itemsize, request)
        return Plan(
            batch=request.batch,
            heads=request.heads,
            groups=request.kv_heads,
            queries=queries,
            keys=keys,
            width=width,
            value_width=padded_width(request.value_width, self.lanes),
            forward=fitted(forward),
            backward=fitted(backward),
            fused=fused,
            scale=terms.scale,
            soft_cap=terms.soft_cap,
            lanes=self.lanes,
            interpret=self.interpret,
        )


def _lay(array: Array, length: int, width: int) -> Array:
    """`[B, T, H, K]` as `[B, H, length, width]`, zeros beyond."""
    beyond = [(0, 0), (0, length - array.shape[1]), (0, 0), (0, width - array.shape[3])]
    return jnp.pad(array, beyond).swapaxes(1, 2)
