"""The registered implementation: what it can do, padding and layout, and the gradient's way back."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..biases import ALiBi, Bucketed
from ..biases import Dense as DenseBias
from ..masks import Lengths, describe
from ..operands import unknown_mask
from ..request import Request
from ..spans import pad
from ..terms import Terms
from ..trees import AnyArray
from ..varying import vary, varying_axes
from .bias_gradient import bias_gradient
from .block_sizes import backward_blocks, forward_blocks
from .forward import forward
from .gradients import Saved, key_gradients, query_gradient
from .plan import LANES, LOG2_E, SUBLANES, Blocks, Plan, fitting_block, padded_length, padded_width

DTYPES = ("float32", "bfloat16")
MOST_TILES = 1 << 16  # numbers of 4 bytes in scalar memory, of which there is 1 MiB


@dataclasses.dataclass(frozen=True)
class Tpu:
    """Pallas on TPUs; with `interpret` on anything, slowly, to be tested.

    `blocks` 0 chooses them by the request. `lanes` is the chip's; tests may pretend that registers are small.
    """

    name: str = "tpu"
    interpret: Any = False
    forward: Blocks | None = None
    backward: Blocks | None = None
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
        """Few queries fill no block."""
        if request.queries < SUBLANES:
            return f"{request.queries} queries are a small part of a block of {self.lanes}"
        return None

    def __call__(self, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
        """Output `[B, T, H, V]` and log-sum-exp `[B, H, T]`."""
        given = (q, k, v, terms)
        q, k, v, terms = vary(given, varying_axes(given))
        (_, queries, _, _), keys = q.shape, k.shape[1]
        plan = self._plan(_request(q, k, v, terms), terms)
        terms = terms.extended(plan.queries, plan.keys)
        if plan.keys > keys:
            terms = dataclasses.replace(terms, mask=terms.mask & Lengths(keys))
        widths = (plan.width, plan.width, plan.value_width)
        lengths = (plan.queries, plan.keys, plan.keys)
        laid = [_lay(x, *sizes) for x, *sizes in zip((q, k, v), lengths, widths)]
        out, lse = _attend(plan, *laid, terms)
        return out[:, :, :queries, : v.shape[3]].swapaxes(1, 2), lse[:, :, :queries]

    def _plan(self, request: Request, terms: Terms) -> Plan:
        forward, backward = self.forward or forward_blocks(request), self.backward or backward_blocks(request)
        queries = padded_length(request.queries, max(forward.rows, backward.rows), self.lanes)
        keys = padded_length(request.keys, max(forward.columns, backward.columns), self.lanes)

        def fitted(blocks: Blocks) -> Blocks:
            columns = fitting_block(keys, blocks.columns, self.lanes)
            chunk = fitting_block(columns, blocks.chunk, self.lanes)
            return Blocks(fitting_block(queries, blocks.rows, self.lanes), columns, chunk)

        return Plan(
            batch=request.batch,
            heads=request.heads,
            groups=request.kv_heads,
            queries=queries,
            keys=keys,
            width=padded_width(request.width, self.lanes),
            value_width=padded_width(request.value_width, self.lanes),
            forward=fitted(forward),
            backward=fitted(backward),
            scale=terms.scale,
            soft_cap=terms.soft_cap,
            lanes=self.lanes,
            interpret=self.interpret,
        )


def _request(q: Array, k: Array, v: Array, terms: Terms) -> Request:
    """What the sizes of blocks are chosen by."""
    (batch, queries, heads, width), (keys, groups) = q.shape, k.shape[1:3]
    return Request(
        platform="tpu",
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        kv_heads=groups,
        width=width,
        value_width=v.shape[3],
        dtype=q.dtype.name,
        mask=terms.mask,
        bias=terms.bias,
        soft_cap=terms.soft_cap is not None,
    )


def _lay(array: Array, length: int, width: int) -> Array:
    """`[B, T, H, K]` as `[B, H, length, width]`, zeros beyond."""
    return pad(pad(array, 1, length), 3, width).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
    return forward(plan, q, k, v, terms, q.dtype)


def _forward(plan: Plan, q: Array, k: Array, v: Array, terms: Terms) -> tuple[tuple[Array, Array], Any]:
    """Where gradients sum over rows, the output is kept before rounding: its error has one sign in a row."""
    summed = terms.bias is not None or terms.sinks is not None
    out, lse = forward(plan, q, k, v, terms, jnp.float32 if summed else q.dtype)
    return (out.astype(q.dtype), lse), (q, k, v, terms, out, lse)


def _backward(plan: Plan, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    q, k, v, terms, out, lse = residuals
    d_out, d_lse = cotangents
    empty = lse == -jnp.inf
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(3) - d_lse
    delta = jnp.where(empty, 0, delta)
    norm = jnp.where(empty, jnp.inf, lse * LOG2_E)  # a row without a key: 2^(-inf - inf) = 0
    saved = Saved(q, k, v, d_out, norm[:, :, None], delta[:, :, None])
    dq, (dk, dv) = query_gradient(plan, saved, terms), key_gradients(plan, saved, terms)
    d_sinks = None
    if terms.sinks is not None:
        weights = jnp.exp2(jnp.asarray(terms.sinks, jnp.float32)[:, None] * LOG2_E - norm)
        d_sinks = -(weights * delta).sum((0, 2)).astype(terms.sinks.dtype)
    d_bias = jax.tree.map(_cotangent, bias_gradient(plan, saved, terms), terms.bias)
    return dq, dk, dv, dataclasses.replace(terms, mask=None, bias=d_bias, sinks=d_sinks, dropout=None)


_attend.defvjp(_forward, _backward)


def _cotangent(gradient: Array, like: AnyArray) -> Array | np.ndarray:
    """The gradient in the type of the array it belongs to; integers have none."""
    if jnp.issubdtype(like.dtype, jnp.floating):
        return gradient.astype(like.dtype)
    return np.zeros(like.shape, jax.dtypes.float0)
