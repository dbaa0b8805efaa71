"""Attention of short sequences: the whole score matrix at once, with a backward pass written by hand.

Up to the length of one tile there is nothing to skip, so the loop over tiles and its online softmax are work
for nothing; and the probabilities, about as large as a feed-forward layer's neurons, are kept for the
backward pass instead of being computed again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .masks import Full, Mask
from .request import Request
from .spans import Span, accumulation_dtype
from .terms import Terms
from .varying import vary, varying_axes


@dataclasses.dataclass(frozen=True)
class Whole:
    """Short sequences on CPUs, without bias, soft cap, sinks and dropout.

    On one CPU core (float32, B=16 T=128 H=12 K=32, no mask) forward and backward take 31.7 ms of CPU time
    where `chunked` takes 39.0, forward alone 9.5 and 15.5. `limit` is the greatest length for which it
    offers itself.
    """

    name: str = "whole"
    limit: int = 128

    def supports(self, request: Request) -> str | None:
        """No bias, no soft cap, no sinks, no dropout."""
        if request.bias is not None or request.soft_cap:
            return "it has no bias and no soft cap"
        if request.sinks or request.dropout:
            return "it has no sinks and no dropout"
        return None

    def unfit(self, request: Request) -> str | None:
        """Accelerators, decoding and long sequences are others' work."""
        if request.platform != "cpu":
            return "its layouts are chosen for CPUs"
        if request.queries == 1:
            return "a single query needs no backward pass of its own"
        if max(request.queries, request.keys) > self.limit:
            return f"it keeps the probabilities, which is for lengths up to {self.limit}"
        return None

    def __call__(self, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
        """Output `[B, T, H, K]` and log-sum-exp `[B, H, T]`."""
        given = (q, k, v, terms.mask)
        q, k, v, mask = vary(given, varying_axes(given))
        return _attend(terms.scale, q, k, v, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    out, lse, _, _ = _weighted(scale, q, k, v, mask)
    return out.astype(q.dtype), lse


def _weighted(scale: float, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array, Array, Array]:
    """Output not rounded, log-sum-exp, weights `[B, G, (H / G) T, S]` and what to multiply them by.

    Without a mask there is nothing but products, exponentials and sums, which XLA:CPU makes one kernel of:
    a single `where` among them would cost it (9.5 against 13.4 ms for the shape above).
    """
    (batch, queries, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    scores = _product("bgtk,bgsk->bgts", _scaled(q, groups, scale), _heads_first(k))
    if isinstance(mask, Full):
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        inverse, lse = 1 / total, top + jnp.log(total)
    else:
        allowed = mask.predicate(Span(0, queries), Span(0, keys))
        apart = scores.reshape(batch, heads, queries, keys)
        scores = jnp.where(allowed, apart, -jnp.inf).reshape(scores.shape)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))  # no key: exp(-inf - 0) = 0
        total = weights.sum(-1, keepdims=True)
        inverse, lse = jnp.where(total == 0, 0, 1 / total), top + jnp.log(total)
    values = _product("bgts,bgsk->bgtk", weights.astype(v.dtype), _heads_first(v))
    out = _ungrouped(values * inverse, heads)
    return out, lse.reshape(batch, heads, queries), weights, inverse


def _forward(
    scale: float, q: Array, k: Array, v: Array, mask: Mask
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    out, lse, weights, inverse = _weighted(scale, q, k, v, mask)
    return (out.astype(q.dtype), lse), (q, k, v, out, weights * inverse)


def _backward(scale: float, residuals: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    q, k, v, out, probabilities = residuals
    (d_out, d_lse), groups = cotangents, k.shape[2]
    delta = (_product("bthk,bthk->bht", out, d_out) - d_lse).reshape(*probabilities.shape[:3], 1)
    grouped, d_values = _scaled(q, groups, scale), _grouped(d_out, groups)
    d_weights = _product("bgtk,bgsk->bgts", d_values, _heads_first(v))
    d_scores = (probabilities * (d_weights - delta)).astype(q.dtype)
    dq = _ungrouped(_product("bgts,bgsk->bgtk", d_scores, _heads_first(k)), q.shape[2]) * scale
    # [K, s] and not [s, K]: for the latter XLA:CPU transposes the large factor
    dk = _product("bgtk,bgts->bgks", grouped, d_scores)
    dv = _product("bgtk,bgts->bgks", d_values, probabilities.astype(v.dtype))
    dk, dv = (x.transpose(0, 3, 1, 2) for x in (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=accumulation_dtype(a.dtype))


def _heads_first(array: Array) -> Array:
    """`[B, S, G, K]` to `[B, G, S, K]`."""
    return array.transpose(0, 2, 1, 3)


def _grouped(array: Array, groups: int) -> Array:
    """`[B, T, H, K]` to `[B, G, (H / G) T, K]`: the queries of a group's heads one after the other."""
    batch, length, heads, width = array.shape
    return array.transpose(0, 2, 1, 3).reshape(batch, groups, heads // groups * length, width)


def _scaled(q: Array, groups: int, scale: float) -> Array:
    """Grouped queries times the scale, at least float32: rounded to half precision they would move scores."""
    return _grouped(q, groups).astype(accumulation_dtype(q.dtype)) * scale


def _ungrouped(array: Array, heads: int) -> Array:
    """`[B, G, (H / G) T, K]` to `[B, T, H, K]`."""
    batch, width = array.shape[0], array.shape[-1]
    return array.reshape(batch, heads, -1, width).transpose(0, 2, 1, 3)
