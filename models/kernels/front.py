"""attention(): the one function models call, whatever computes it."""

from typing import Literal, overload

import jax
from jax import Array

from ... import InputError
from .biases import Bias, as_bias
from .dropout import Dropout
from .masks import Mask, Sizes
from .reference import attention_scores, softmax
from .registry import choose
from .request import request_of
from .terms import Terms


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask,
    bias: Bias | Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    dropout: Dropout | None = None,
    impl: str = "auto",
    return_lse: Literal[False] = False,
) -> Array: ...


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask,
    bias: Bias | Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    dropout: Dropout | None = None,
    impl: str = "auto",
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask,
    bias: Bias | Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    dropout: Dropout | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Softmax attention of q `[B, T, H, K]` on k and v `[B, S, G, K]`: `[B, T, H, K]` (and lse `[B, H, T]`).

    H is a multiple of G; query head h reads key head `h // (H / G)`. Scores are `q·k * scale` (default
    `K ** -0.5`), plus `bias`, then `soft_cap * tanh(scores / soft_cap)`, then the mask. `sinks [H]` are
    logits that join the softmax's sum and give no value; `dropout` zeroes weights after it, unknown to lse. A
    query that may see no key gives output 0, lse -inf (or its sink) and zero gradients. Softmax and sums are
    in float32 (float64 for float64 input), the output in the type of q. Everything is differentiable, the
    bias, the sinks and lse too.

    `impl` is "auto" or a name of `implementations()`; the choice is logged to `modicum.kernels` when traced.
    Raises InputError where shapes do not fit, the name is unknown or the named one cannot do it.
    """
    terms = terms_of(q, k, v, mask, bias, scale, soft_cap, sinks, dropout)
    out, lse = choose(request_of(q, k, v, terms, return_lse), impl)(q, k, v, terms)
    return (out, lse) if return_lse else out


def attention_probabilities(
    q: Array,
    k: Array,
    *,
    mask: Mask,
    bias: Bias | Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """The attention pattern `[B, H, T, S]`, at least float32: rows sum to 1, or to 0 where all is masked.

    With sinks the rows sum to less than 1.
    """
    terms = terms_of(q, k, k, mask, bias, scale, soft_cap, sinks, None)
    return softmax(attention_scores(q, k, terms), terms.sinks)[0]


def terms_of(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    bias: Bias | Array | None,
    scale: float | None,
    soft_cap: float | None,
    sinks: Array | None,
    dropout: Dropout | None,
    whole: tuple[int, int] | None = None,
) -> Terms:
    """What the call asks for, checked; dropout at rate 0 is none.

    `whole` are the lengths that mask and bias are for, of queries and keys, where those given are parts.
    """
    _check_arrays(q, k, v)
    check_number("scale", scale)
    check_number("soft_cap", soft_cap)
    if not isinstance(mask, Mask):
        raise InputError(
            f"mask is {type(mask).__name__}; it must be a mask, e.g. Full(), Causal() or Dense(array)"
        )
    bias = as_bias(bias)
    sizes = Sizes(q.shape[0], q.shape[2], *(whole or (q.shape[1], k.shape[1])))
    reasons = (
        mask.mismatch(sizes),
        bias.mismatch(sizes) if bias is not None else None,
        sinks_mismatch(sinks, sizes.heads),
        dropout.mismatch() if dropout is not None else None,
    )
    if reason := next(filter(None, reasons), None):
        raise InputError(f"attention: {reason}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Terms(mask, bias, scale, soft_cap, sinks, dropout if dropout and dropout.rate else None)


def _check_arrays(q: Array, k: Array, v: Array) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise InputError(
                f"attention: {name} has shape {list(array.shape)}; it must be [batch, length, heads, width]"
            )
        if array.dtype != q.dtype or not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            raise InputError(
                f"attention: {name} has type {array.dtype}; q, k and v must have one floating type"
            )
    if k.shape[:3] != v.shape[:3]:
        raise InputError(
            f"attention: k {list(k.shape)} and v {list(v.shape)} must agree but for the last axis"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise InputError(
            f"attention: q {list(q.shape)} and k {list(k.shape)} must have one batch size and one width"
        )
    if q.shape[2] % k.shape[2]:
        raise InputError(f"attention: q has {q.shape[2]} heads, which k's {k.shape[2]} heads do not divide")


def check_number(name: str, value: float | None) -> None:
    """Raise `InputError` for a traced number, and one that is not above 0."""
    if value is not None and (isinstance(value, jax.Array) or not value > 0):
        raise InputError(f"attention: {name} is {value!r}; it must be a positive Python number")


def sinks_mismatch(sinks: Array | None, heads: int) -> str | None:
    """Why these are no sinks of so many heads, or None."""
    if sinks is None:
        return None
    if jax.numpy.shape(sinks) != (heads,) or not jax.numpy.issubdtype(sinks.dtype, jax.numpy.floating):
        found = f"{sinks.dtype}{list(jax.numpy.shape(sinks))}"
        return f"sinks are {found}; they must be floating [{heads}], one logit a head"
    return None
