"""Attention and its gradients written out in NumPy's float64, and any implementation held against it.

`check(implementation, case, dtype)` is the whole test of an implementation; `drawing.cases` draws the cases.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import reject

from modicum.models.kernels import Bias, Dropout, Request, Terms
from modicum.models.kernels.reference import Reference
from modicum.models.kernels.request import Implementation, abstract
from modicum.models.kernels.spans import Span

from .drawing import Case

# compiles in half the time
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Results(NamedTuple):
    """What attention gives and its gradients; those of the bias are the floating leaves of its tree."""

    out: Any
    lse: Any
    dq: Any
    dk: Any
    dv: Any
    bias: list[Any]
    sinks: Any


def check(implementation: Implementation, case: Case, dtype: Any = jnp.float32) -> None:
    """Raise AssertionError where an implementation is farther from float64 than its type allows.

    float32: 1e-5 of the largest of output and log-sum-exp, 1e-4 of the largest of a gradient. Half types:
    twice the error that the plain softmax of the same type has, or twice what rounding the results costs, or
    1e-5: sums are in float32, and where a gradient is exactly 0 they leave no more than their own noise.
    A case that it does not support is drawn again.
    """
    if implementation.supports(request_of(case, dtype)) is not None:
        reject()
    wanted, found = exact(case, dtype), computed(implementation, case, dtype)
    plain = computed(Reference(), case, dtype) if dtype != jnp.float32 else None
    assert found.out.dtype == dtype and found.lse.dtype == jnp.float32
    for name in Results._fields:
        for i, (a, b) in enumerate(zip(*(listed(getattr(r, name)) for r in (found, wanted)))):
            if plain is None:
                limit = {"out": 1e-5, "lse": 1e-5}.get(name, 1e-4) * max(1, largest(b))
            else:
                rounding = float(jnp.finfo(a.dtype).eps) / 2 * largest(b)
                limit = max(2 * error(listed(getattr(plain, name))[i], b), 2 * rounding, 1e-5)
            assert error(a, b) <= limit, f"{name}[{i}] errs by {error(a, b):.2e} > {limit:.2e} in {case}"


def request_of(case: Case, dtype: Any) -> Request:
    """What the front would ask an implementation on this platform."""
    (batch, queries, heads, width), (keys, groups) = case.q.shape, case.k.shape[1:3]
    terms = case.terms
    return Request(
        jax.default_backend(),
        batch,
        queries,
        keys,
        heads,
        groups,
        width,
        case.v.shape[3],
        jnp.dtype(dtype).name,
        abstract(terms.mask),
        abstract(terms.bias),
        terms.soft_cap is not None,
        terms.sinks is not None,
        terms.dropout.rate if terms.dropout else 0.0,
    )


def computed(implementation: Implementation, case: Case, dtype: Any) -> Results:
    """The implementation's results for q, k and v in `dtype`."""

    def call(q: Any, k: Any, v: Any, bias: Bias | None, sinks: Any) -> Any:
        return implementation(q, k, v, dataclasses.replace(case.terms, bias=bias, sinks=sinks))

    def both(*given: Any) -> Any:
        *given, d_out, d_lse = given
        outputs, pull = jax.vjp(call, *given)
        return outputs, pull((d_out.astype(outputs[0].dtype), d_lse))

    q, k, v = (jnp.asarray(x, dtype) for x in (case.q, case.k, case.v))
    step = jax.jit(both, compiler_options=FAST_COMPILE)
    (out, lse), gradients = step(q, k, v, case.terms.bias, case.terms.sinks, case.d_out, case.d_lse)
    return Results(out, lse, *gradients[:3], floating(gradients[3]), gradients[4])


def exact(case: Case, dtype: Any = jnp.float32) -> Results:
    """The definition in float64, for q, k, v and the output's cotangent as `dtype` holds them."""
    terms = case.terms
    q, k, v, d_out = (
        np.asarray(jnp.asarray(x, dtype), np.float64) for x in (case.q, case.k, case.v, case.d_out)
    )
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat(repeats, 2), v.repeat(repeats, 2)
    spans = [Span(0, n) for n in (q.shape[0], q.shape[2], q.shape[1], k.shape[1])]
    allowed, bias = allowed_and_bias(terms, *spans[2:])
    raw = np.einsum("bthk,bshk->bhts", q, k) * terms.scale + bias
    scores = raw if terms.soft_cap is None else terms.soft_cap * np.tanh(raw / terms.soft_cap)
    scores = np.where(allowed, scores, -np.inf)
    weights, of_sinks, lse = softmax(scores, terms.sinks)
    keep = kept(terms.dropout, spans)
    out = np.einsum("bhts,bshk->bthk", weights * keep, v)

    d_weights = np.einsum("bthk,bshk->bhts", d_out, v) * keep
    delta = (weights * d_weights).sum(-1) - np.where(lse == -np.inf, 0, case.d_lse)
    d_scores = weights * (d_weights - delta[..., None])
    d_scores *= 1 if terms.soft_cap is None else 1 - np.tanh(raw / terms.soft_cap) ** 2
    dq = np.einsum("bhts,bshk->bthk", d_scores, k) * terms.scale
    dk = np.einsum("bhts,bthk->bshk", d_scores, q) * terms.scale
    dv = np.einsum("bhts,bthk->bshk", weights * keep, d_out)
    dk, dv = (x.reshape(*x.shape[:2], -1, repeats, x.shape[3]).sum(3) for x in (dk, dv))
    sinks = None if terms.sinks is None else -(of_sinks * delta).sum((0, 2))
    return Results(out, lse, dq, dk, dv, bias_gradient(terms.bias, d_scores, *spans[2:]), sinks)


def softmax(scores: np.ndarray, sinks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, those of the sinks `[B, H, T]`, and log-sum-exp."""
    sink = np.full((1, 1, 1), -np.inf) if sinks is None else np.asarray(sinks, np.float64)[:, None]
    top = np.maximum(scores.max(-1), sink)
    top = np.where(top == -np.inf, 0, top)
    weights, of_sinks = np.exp(scores - top[..., None]), np.exp(sink - top)
    total = weights.sum(-1) + of_sinks
    some = np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        return weights / some[..., None], of_sinks / some, top + np.log(total)


def kept(dropout: Dropout | None, spans: list[Span]) -> Any:
    """What dropout multiplies the weights by."""
    return 1.0 if dropout is None else np.asarray(dropout.keep(*spans), np.float64) / (1 - dropout.rate)


def allowed_and_bias(terms: Terms, rows: Span, columns: Span) -> Any:
    """What the mask allows, and all of the bias in float64; one program, where single operations are many."""

    def both(mask: Any, bias: Any) -> Any:
        return mask.predicate(rows, columns), 0.0 if bias is None else bias.tile(rows, columns)

    with jax.enable_x64(True):
        step = jax.jit(both, compiler_options=FAST_COMPILE)
        return jax.tree.map(np.asarray, step(terms.mask, doubled(terms.bias)))


def bias_gradient(bias: Bias | None, d_scores: np.ndarray, rows: Span, columns: Span) -> list[Any]:
    """What JAX's own differentiation of the whole bias gives, in float64."""
    if bias is None:
        return []

    def pulled(bias: Any, d_scores: Any) -> Any:
        spread = lambda b: jnp.broadcast_to(b.tile(rows, columns), d_scores.shape)  # noqa: E731
        return floating(jax.vjp(spread, bias)[1](d_scores)[0])

    with jax.enable_x64(True):
        step = jax.jit(pulled, compiler_options=FAST_COMPILE)
        return [np.asarray(x) for x in step(doubled(bias), d_scores)]


def doubled(bias: Bias | None) -> Bias | None:
    """The bias with float64 in the place of float32."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype), bias)


def floating(tree: Any) -> list[Any]:
    """The leaves that are numbers one can differentiate by."""
    return [x for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]


def listed(value: Any) -> list[Any]:
    """A list of arrays, from one, none or a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def error(found: Any, wanted: np.ndarray) -> float:
    """The greatest difference; infinities must agree, and nothing may be no number."""
    found = np.asarray(found, np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where(found == wanted, 0, abs(found - wanted))
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0))


def largest(array: np.ndarray) -> float:
    """The greatest finite magnitude."""
    return float(abs(np.where(np.isfinite(array), array, 0)).max(initial=0))


def without(terms: Terms, **changes: Any) -> Terms:
    """`terms` with some replaced."""
    return dataclasses.replace(terms, **changes)
