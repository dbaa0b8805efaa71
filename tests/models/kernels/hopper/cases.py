"""Attention that the Hopper kernels are tried on: by the interpreter, the compiler and the GPU alike."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modicum.models.kernels import (
    ALiBi,
    Bias,
    Bucketed,
    Causal,
    Dense,
    DenseBias,
    Dropout,
    Full,
    Lengths,
    Prefix,
    Segments,
    Window,
)
from modicum.models.kernels.masks import Mask
from modicum.models.kernels.reference import Reference
from modicum.models.kernels.spans import Span
from modicum.models.kernels.terms import Terms


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention: sizes and terms."""

    name: str
    mask: Mask
    queries: int = 256
    keys: int = 256
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    width: int = 64
    dtype: Any = jnp.bfloat16
    soft_cap: float | None = None
    sinks: bool = False
    bias: Bias | None = None
    dropout: Dropout | None = None

    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        rng = np.random.default_rng(0)
        shapes = [(self.batch, self.queries, self.heads, self.width)]
        shapes += 2 * [(self.batch, self.keys, self.kv_heads, self.width)]
        return tuple(jnp.asarray(rng.normal(size=shape), self.dtype) for shape in shapes)

    def terms(self) -> Terms:
        sinks = np.linspace(-1, 2, self.heads, dtype=np.float32) if self.sinks else None
        return Terms(self.mask, self.bias, self.width**-0.5, self.soft_cap, sinks, self.dropout)


def packed(batch: int, length: int, documents: int = 3, padding: int = 9) -> Segments:
    """Documents of random lengths one after the other, and padding at the end."""
    rng = np.random.default_rng(1)
    ids = np.sort(rng.integers(1, documents + 1, (batch, length)))
    ids[:, length - padding :] = 0
    return Segments(ids.astype(np.int32))


def values_and_gradients(implementation, arrays, terms):
    """Output, log-sum-exp and gradients of a random function of both with respect to q, k, v and sinks."""

    def call(q, k, v, sinks, bias):
        return implementation(q, k, v, dataclasses.replace(terms, sinks=sinks, bias=bias))

    (out, lse), pull = jax.vjp(call, *arrays, terms.sinks, terms.bias)
    rng = np.random.default_rng(2)
    # values that every type holds exactly, so that all see the same
    cotangents = [jnp.asarray(rng.integers(-4, 5, x.shape) / 4, x.dtype) for x in (out, lse)]
    dq, dk, dv, d_sinks, d_bias = pull(tuple(cotangents))
    others = {"dsinks": d_sinks, "dbias": next(iter(jax.tree.leaves(d_bias)), None)}
    found = {"output": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv} | others
    return {name: value for name, value in found.items() if value is not None}


def compiled(implementation, arrays, terms):
    """The same as one program: as many small ones take longer to compile than to run."""
    return jax.jit(lambda arrays: values_and_gradients(implementation, arrays, terms))(list(arrays))


def plain(q, k, v, terms):
    """What anybody writes first, products in the type of the inputs: how much error is usual."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) * terms.scale
    if terms.bias is not None:
        scores += terms.bias.tile(Span(0, q.shape[1]), Span(0, k.shape[1]))
    if terms.soft_cap is not None:
        scores = terms.soft_cap * jnp.tanh(scores / terms.soft_cap)
    allowed = terms.mask.predicate(Span(0, q.shape[1]), Span(0, k.shape[1]))
    scores = jnp.where(allowed, scores, -1e30)
    if terms.sinks is not None:
        sinks = jnp.broadcast_to(terms.sinks[None, :, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sinks.astype(scores.dtype)], -1)
    lse = jax.nn.logsumexp(scores, -1)
    weights = jnp.exp(scores - lse[..., None])[..., : k.shape[1]].astype(v.dtype)
    weights = jnp.where(allowed, weights, 0)
    if terms.dropout is not None:
        keep = terms.dropout.keep(*(Span(0, n) for n in (q.shape[0], q.shape[2], q.shape[1], k.shape[1])))
        weights = jnp.where(keep, weights / (1 - terms.dropout.rate), 0).astype(v.dtype)
    return jnp.einsum("bhts,bshk->bthk", weights, v), lse


def assert_within_twice_plain(case: Case, implementation) -> None:
    """Against float64: no more than twice the error of `plain`, on the scale of each array."""
    arrays, terms = case.arrays(), case.terms()
    found = compiled(implementation, arrays, terms)
    usual = values_and_gradients(plain, arrays, terms)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        exact = {name: np.asarray(value) for name, value in compiled(Reference(), wide, terms).items()}
    empty = exact["lse"] == -np.inf
    np.testing.assert_array_equal(np.asarray(found["lse"]) == -np.inf, empty)
    found["lse"], usual["lse"], exact["lse"] = (
        np.where(empty, 0, np.asarray(x["lse"], np.float64)) for x in (found, usual, exact)
    )
    for name, wanted in exact.items():
        error, unavoidable = (_error(x[name], wanted) for x in (found, usual))
        assert error <= 2 * unavoidable + 1e-6, (
            f"{case.name}: {name} is off by {error}, plain by {unavoidable}"
        )


def _error(found, wanted) -> float:
    """Root of the mean square difference, in units of the values' own."""
    difference = np.asarray(found, np.float64) - wanted
    return float(np.sqrt(np.mean(difference**2)) / max(np.sqrt(np.mean(wanted**2)), 1e-30))


def draw(*shape: int) -> np.ndarray:
    """Normal numbers, float32."""
    return np.random.default_rng(4).normal(size=shape).astype(np.float32)


DROPOUT = Dropout(0.3, np.uint32(7), batch=1, head=2, query=5, key=9)
ALLOWED = np.random.default_rng(5).random((2, 1, 128, 200)) < 0.5
ALLOWED[0, :, 7] = ALLOWED[1, :, :, 60:] = False  # a row without keys, tiles without pairs
SQUARE = np.random.default_rng(6).random((1, 2, 128, 128)) < 0.5
MIXED = Segments(np.random.default_rng(3).integers(0, 3, (1, 128)).astype(np.int32))
CASES = (
    Case("full", Full(), 128, 256, dtype=jnp.float16),
    Case(
        "causal, groups, sinks, soft cap, dropout, wide",
        Causal(128),
        128,
        256,
        width=128,
        sinks=True,
        soft_cap=5.0,
        dropout=DROPOUT,
    ),
    Case("packed causal, ragged", Causal() & packed(1, 200), 200, 200, heads=1, width=40),
    Case("window", Window(70, 0), heads=1),
    Case("lengths, one 0, of mixed segments", Lengths(np.array([0, 70])) & MIXED, 128, 128, batch=2, heads=1),
    Case("prefix, longer keys", Prefix(np.array([130]), offset=128), 128, 256, heads=1, width=128),
    Case("no key for most", Causal(-140), heads=1),
    Case(
        "dense bias for all heads, soft cap, dropout",
        Causal(),
        128,
        128,
        bias=DenseBias(draw(1, 1, 128, 128)),
        soft_cap=5.0,
        dropout=DROPOUT,
    ),
    Case("bucketed bias", Full(), 128, 128, heads=1, bias=Bucketed(draw(8, 1), max_distance=32)),
    Case("bucketed bias, far tiles", Full(), heads=1, bias=Bucketed(draw(8, 1), max_distance=32)),
    Case("dropout", Causal(), 128, 200, batch=2, dropout=DROPOUT),
    Case("dense mask a batch row", Dense(ALLOWED) & Causal(60), 128, 200, batch=2, heads=1),
    Case(
        "dense mask a head, bias, soft cap, dropout",
        Dense(SQUARE),
        128,
        128,
        width=128,
        soft_cap=5.0,
        bias=DenseBias(draw(1, 1, 128, 128)),
        dropout=DROPOUT,
    ),
    Case("ALiBi", Causal(3), 128, 128, heads=1, width=128, bias=ALiBi(np.float32([0.1]), offset=3)),
)
