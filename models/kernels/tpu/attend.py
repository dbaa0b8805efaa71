"""The kernels as one differentiable function: what is kept for the backward pass, and what it calls."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..merging import sinks_gradient
from ..terms import Terms
from .bias_gradient import bias_gradient
from .forward import forward
from .gradients import Saved, all_gradients, key_gradients, query_gradient
from .plan import LOG2_E, Plan


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
    """Output `[B, H, T, V]` and log-sum-exp `[B, H, T]` of padded q, k and v, heads before positions."""
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
    if plan.fused:
        dq, dk, dv = all_gradients(plan, saved, terms)
    else:
        dq, (dk, dv) = query_gradient(plan, saved, terms), key_gradients(plan, saved, terms)
    d_sinks = None if terms.sinks is None else sinks_gradient(jnp.asarray(terms.sinks), lse, delta)
    return dq, dk, dv, terms.cotangent(bias_gradient(plan, saved, terms), d_sinks)


attend.defvjp(_forward, _backward)
