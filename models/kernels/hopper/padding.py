"""Attention of any lengths and widths by kernels that take whole tiles."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from ..merging import merge_sinks
from ..ranges import ranges
from ..terms import Terms
from ..varying import vary, varying_axes
from .attend import Inputs, attend
from .dense_masks import allowed, split, within
from .dropping import hashes
from .operations import Interpreted, Warpgroup
from .problem import Problem
from .tile_sizes import Asked, plan
from .tiling import padded_ranges

MULTIPLE = 128  # of lengths: what a block of the kernels holds


def padded_attention(
    q: Array,
    k: Array,
    v: Array,
    terms: Terms,
    interpret: Any = None,
    deterministic: bool = True,
    tiles: Asked = (),
) -> tuple[Array, Array]:
    """Output `[B, T, H, K]` and log-sum-exp `[B, H, T]`, float32.

    Lengths are padded to multiples of 128 and widths to 64 or 128; where they are, nothing is copied.
    """
    given = (q, k, v, terms)
    q, k, v, terms = vary(given, varying_axes(given))
    queries, keys, width = q.shape[1], k.shape[1], v.shape[3]
    problem = _problem(q, k, v, terms, interpret)
    dense, rest = split(terms.mask)
    seen = within(ranges(rest, queries, keys), allowed(dense, queries, keys))
    seen = padded_ranges(seen, keys, problem)
    shown = allowed(dense, problem.queries, problem.keys)
    lengths = (problem.queries, problem.keys, problem.keys)
    q, k, v = (_padded(x, length, problem.width) for x, length in zip((q, k, v), lengths))
    bias = None if terms.bias is None else terms.bias.extended(problem.queries, problem.keys)
    inputs = Inputs(q, k, v, seen, bias, hashes(terms.dropout, problem), shown)
    out, lse = attend(problem, plan(problem, terms, deterministic, tiles), inputs)
    out, lse = out[:, :queries, :, :width], lse[:, :, :queries]
    if terms.sinks is None:
        return out, lse
    wide, lse = merge_sinks(out, lse, jnp.asarray(terms.sinks))
    return wide.astype(out.dtype), lse


def _problem(q: Array, k: Array, v: Array, terms: Terms, interpret: Any) -> Problem:
    return Problem(
        batch=q.shape[0],
        queries=-(-q.shape[1] // MULTIPLE) * MULTIPLE,
        keys=-(-k.shape[1] // MULTIPLE) * MULTIPLE,
        heads=q.shape[2],
        kv_heads=k.shape[2],
        width=64 if max(q.shape[3], v.shape[3]) <= 64 else 128,
        dtype=q.dtype,
        scale=terms.scale,
        soft_cap=terms.soft_cap,
        operations=Warpgroup() if interpret is None else Interpreted(interpret),
        rate=0.0 if terms.dropout is None else terms.dropout.rate,
    )


def _padded(array: Array, length: int, width: int) -> Array:
    """Zeros up to `length` positions and `width` numbers each."""
    widths = [(0, 0), (0, length - array.shape[1]), (0, 0), (0, width - array.shape[3])]
    return jnp.pad(array, widths) if any(map(sum, widths)) else array
