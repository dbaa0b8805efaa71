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
from ..relations import Relations
from ..request import PARTITIONED, Request, request_of
from ..terms import Terms
from ..varying import vary, varying_axes
from .block_sizes import CANDIDATES, KERNELS, blocks_for, fits_fused
from .plan import LANES, SUBLANES, Blocks, Plan, common_length, fitting_block, padded_width

DTYPES = ("float32", "bfloat16")
MOST_TILES = 1 << 16  # numbers of 4 bytes in scalar memory, of which there is 1 MiB


@dataclasses.dataclass(frozen=True)
class Tpu:
    """Pallas on TPUs; with `interpret` on anything, slowly, to be tested.

    Without `forward` and `backward` (all gradients), or `blocks` by name of a kernel, which come first,
    blocks are chosen by the request. Without `fused` one kernel computes the gradients of q, k and v where
    that of all queries of a key head fits (see `fits_fused`). `lanes` is the chip's; tests may pretend that
    registers are small.
    """

    name: str = "tpu"
    interpret: Any = False
    forward: Blocks | None = None
    backward: Blocks | None = None
    blocks: tuple[tuple[str, Blocks], ...] = ()
    fused: bool | None = None
    lanes: int = LANES

    def supports(self, request: Request) -> str | None:
        """TPUs, float32 and bfloat16, every mask, and biases of the classes that are known here."""
        if request.platform != "tpu" and not self.interpret:
            return f"it is for TPUs, not {request.platform}"
        if request.dtype not in DTYPES:
            return f"it computes in {' and '.join(DTYPES)}, not {request.dtype}"
        if not isinstance(request.bias, DenseBias | Bucketed | ALiBi | Relations | None):
            return f"the kernels cannot compute a {describe(request.bias)} bias"
        plan = self._plan(request, Terms(request.mask))
        tiles = max(
            plan.batch * plan.groups * (plan.queries // b.rows) * (plan.keys // b.columns)
            for b in (plan.forward, plan.backward, plan.query_gradient, plan.key_gradients)
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

    def candidates(self, request: Request) -> dict[str, tuple[Blocks, ...]]:
        """Blocks worth a try for the kernels of a request, for `modicum bench attention --tune`."""
        fused = self._plan(request, Terms(request.mask)).fused
        gradients = ("backward",) if fused else ("query gradient", "key gradients")
        return {f"tpu {kernel}": CANDIDATES for kernel in ("forward", *gradients)}

    def with_blocks(self, name: str, blocks: tuple[int, ...]) -> Tpu:
        """Itself with these for the kernel of that name."""
        return dataclasses.replace(self, blocks=((name.removeprefix("tpu "), Blocks(*blocks)),))

    def _plan(self, request: Request, terms: Terms) -> Plan:
        given = {kernel: self.forward if kernel == "forward" else self.backward for kernel in KERNELS}
        given |= dict(self.blocks)
        chosen = {kernel: blocks or blocks_for(kernel, request) for kernel, blocks in given.items()}
        queries = common_length(request.queries, [b.rows for b in chosen.values()], self.lanes)
        keys = common_length(request.keys, [b.columns for b in chosen.values()], self.lanes)

        def fitted(kernel: str) -> Blocks:
            blocks = chosen[kernel]
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
            forward=fitted("forward"),
            backward=fitted("backward"),
            query_gradient=fitted("query gradient"),
            key_gradients=fitted("key gradients"),
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
