"""Attention of one or few queries on keys and values that a cache holds.

On CPUs a cache stores batch and heads as one axis, `[B·G, S, K]`: the product's own form. With two axes
XLA:CPU (jax 0.10) brings them to this form in every step, behind the update in place, and so copies the
keys four times and transposes the values: 12 layers of GPT-2's size with 256 slots take 4.7 ms a token
instead of 0.7 (the time to read them at 25 GB/s is 0.75 ms).
"""

import dataclasses
from typing import Literal, overload

import jax.numpy as jnp
from jax import Array, lax

from ... import InputError
from .biases import ALiBi, Bias, Bucketed, as_bias
from .front import check_number, sinks_mismatch
from .masks import Causal, Lengths, Mask, Sizes
from .paged import Paged, check_pages, choose_decoder
from .reference import masked_scores, softmax
from .request import request_of
from .spans import accumulation_dtype
from .terms import Terms
from .trees import AnyArray, structural


@structural
class Joined:
    """Keys or values `[B, S, G, K]`, stored as `array [B·G, S, K]`; JAX functions take it as the former."""

    array: AnyArray
    groups: int

    @classmethod
    def of(cls, x: Array) -> "Joined":
        """`x [B, S, G, K]` in this form."""
        batch, length, groups, width = x.shape
        return cls(jnp.swapaxes(x, 1, 2).reshape(batch * groups, length, width), groups)

    def __jax_array__(self) -> Array:
        rows, length, width = self.array.shape
        split = self.array.reshape(rows // self.groups, self.groups, length, width)
        return jnp.swapaxes(split, 1, 2)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[B, S, G, K]`."""
        rows, length, width = self.array.shape
        return rows // self.groups, length, self.groups, width


@overload
def decode_attention(
    q: Array,
    k: Joined | Paged,
    v: Joined | Paged,
    *,
    mask: Mask | None = None,
    lengths: Array | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    impl: str = "auto",
    return_lse: Literal[False] = False,
) -> Array: ...


@overload
def decode_attention(
    q: Array,
    k: Joined | Paged,
    v: Joined | Paged,
    *,
    mask: Mask | None = None,
    lengths: Array | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    impl: str = "auto",
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...


def decode_attention(
    q: Array,
    k: Joined | Paged,
    v: Joined | Paged,
    *,
    mask: Mask | None = None,
    lengths: Array | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """`attention` of q `[B, T, H, K]` on a cache's keys and values: `[B, T, H, K]` (and lse `[B, H, T]`).

    The same function of the same numbers, for few queries: all scores at once, no gradient rules of its own.
    On a `Joined` cache `mask` says what is seen. On a `Paged` one row b has `lengths[b]` keys, and without
    `mask` its T queries are the last T of them; masks, and biases with offsets, may give each row its own
    position by arrays `[B]`. `impl` chooses among the kernels for pages. Raises InputError where arrays of
    a paged call do not fit, and where mask and lengths are both missing.
    """
    check_number("scale", scale)
    check_number("soft_cap", soft_cap)
    bias = as_bias(bias)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if isinstance(k, Paged) and isinstance(v, Paged):
        lengths = check_pages(q, k, v, lengths)
        sizes = Sizes(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        if reason := _bias_mismatch(bias, sizes) or sinks_mismatch(sinks, sizes.heads):
            raise InputError(f"decode_attention: {reason}")
        terms = Terms(_mask_of_pages(sizes, lengths, mask), bias, scale, soft_cap, sinks)
        request = dataclasses.replace(request_of(q, k, v, terms, return_lse), page=k.pages.shape[1])
        out, lse = choose_decoder(request, impl)(q, k, v, lengths, terms)
    elif isinstance(k, Joined) and isinstance(v, Joined) and mask is not None:
        if impl != "auto":
            raise InputError(
                f"decode_attention: impl={impl!r} is for pages; on Joined keys only 'auto' is valid"
            )
        mask = mask if lengths is None else mask & Lengths(lengths)
        out, lse = _on_joined(q, k, v, Terms(mask, bias, scale, soft_cap, sinks))
    else:
        raise InputError("decode_attention needs a mask on Joined keys and values; k and v have one form")
    return (out, lse) if return_lse else out


def _mask_of_pages(sizes: Sizes, lengths: Array, mask: Mask | None) -> Mask:
    """The given mask, checked; without one the queries are the last of each row."""
    if mask is None:
        return Causal(lengths - sizes.queries)
    if reason := mask.mismatch(sizes):
        raise InputError(f"decode_attention: {reason}")
    return mask


def _bias_mismatch(bias: Bias | None, sizes: Sizes) -> str | None:
    """Why the bias does not fit, or None; here, and nowhere else, its offset may be one a row."""
    if isinstance(bias, ALiBi | Bucketed) and jnp.ndim(bias.offset):
        if jnp.shape(bias.offset) != (sizes.batch,):
            found = f"{type(bias).__name__}.offset has shape {list(jnp.shape(bias.offset))}"
            return f"{found}; it must be a scalar or [{sizes.batch}], one number a batch row"
        bias = dataclasses.replace(bias, offset=0)
    return None if bias is None else bias.mismatch(sizes)


def _on_joined(q: Array, k: Joined, v: Joined, terms: Terms) -> tuple[Array, Array]:
    batch, queries, heads, width = q.shape
    grouped = q.reshape(batch, queries, k.groups, heads // k.groups, width)
    rows = grouped.transpose(0, 2, 3, 1, 4).reshape(batch * k.groups, -1, width)
    dtype = accumulation_dtype(q.dtype)
    raw = lax.dot_general(rows, k.array, (((2,), (2,)), ((0,), (0,))), preferred_element_type=dtype)
    raw = raw.reshape(batch, heads, queries, -1) * terms.scale
    weights, lse = softmax(masked_scores(raw, terms.mask, terms.bias, terms.soft_cap), terms.sinks)
    weights = weights.reshape(*rows.shape[:2], -1)
    out = lax.dot_general(
        weights.astype(v.array.dtype), v.array, (((2,), (1,)), ((0,), (0,))), preferred_element_type=dtype
    )
    out = out.reshape(batch, k.groups, heads // k.groups, queries, -1).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, queries, heads, -1).astype(q.dtype), lse
