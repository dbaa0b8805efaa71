"""Hypothesis strategies for masks, biases and whole calls of attention, with their numbers."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from modicum.models.kernels import (
    ALiBi,
    Bias,
    Bucketed,
    Causal,
    Dense,
    DenseBias,
    Dropout,
    Full,
    Keys,
    Lengths,
    Mask,
    Not,
    Prefix,
    Queries,
    Relations,
    Segments,
    Terms,
    Window,
)
from modicum.models.kernels.masks import Sizes, describe

Strategy = st.SearchStrategy[Any]
SEEDS = st.integers(0, 10**6)
RANDOM = SEEDS.map(np.random.default_rng)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of attention and the cotangents of its results, all float32 (or integers), in NumPy."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    terms: Terms
    d_out: np.ndarray
    d_lse: np.ndarray

    def __repr__(self) -> str:
        terms = self.terms
        return (
            f"Case(q {list(self.q.shape)}, k {list(self.k.shape)}, {describe(terms.mask)}, "
            f"bias {describe(terms.bias)}, soft cap {terms.soft_cap}, "
            f"sinks {terms.sinks is not None}, dropout {terms.dropout is not None})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis would print every number."""
        printer.text(repr(self))


def leaf_masks(sizes: Sizes) -> Strategy:
    """One mask of any class, its numbers static or arrays."""
    batch, _, queries, keys = sizes
    offsets, widths = st.integers(-5, 8), st.none() | st.integers(0, 9)

    def segments(rng: np.random.Generator) -> Mask:
        ids = [np.sort(rng.integers(0, 4, (batch, n)), axis=1) for n in (queries, keys)]
        return Segments(*(jnp.asarray(rng.permuted(x, axis=1) if rng.random() < 0.3 else x) for x in ids))

    def lengths(rng: np.random.Generator) -> jnp.ndarray:
        return jnp.asarray(rng.integers(0, keys + 2, batch))

    def dense(rng: np.random.Generator) -> Mask:
        shape = [n if rng.random() < 0.6 else 1 for n in sizes]
        return Dense(jnp.asarray(rng.random(shape) < rng.choice([0.02, 0.5, 0.98])))

    def flags(rng: np.random.Generator, length: int) -> jnp.ndarray:
        return jnp.asarray(rng.random((rng.choice([1, batch]), length)) < rng.choice([0.1, 0.5, 0.9]))

    def moved(rng: np.random.Generator) -> jnp.ndarray:
        return jnp.asarray(rng.integers(-5, 8, batch))

    return st.one_of(
        st.just(Full()),
        st.builds(Causal, offsets),
        st.builds(lambda rng: Causal(moved(rng)), RANDOM),
        st.builds(Window, widths, widths, offsets),
        st.builds(lambda rng, left, right: Window(left, right, moved(rng)), RANDOM, widths, widths),
        st.builds(lambda offset, left: Window(left, None, jnp.asarray(offset)), offsets, widths),
        st.builds(lambda rng, offset: Prefix(lengths(rng), offset), RANDOM, offsets),
        st.builds(lambda rng: Prefix(lengths(rng), moved(rng)), RANDOM),
        st.builds(segments, RANDOM),
        st.builds(lambda rng: Lengths(lengths(rng)), RANDOM),
        st.builds(Lengths, st.integers(0, keys)),
        st.builds(dense, RANDOM),
        st.builds(lambda rng: Keys(flags(rng, keys)), RANDOM),
        st.builds(lambda rng: Queries(flags(rng, queries)), RANDOM),
    )


def masks(sizes: Sizes) -> Strategy:
    """Expressions of up to about five masks."""

    def grow(inner: Strategy) -> Strategy:
        pairs = st.tuples(inner, inner)
        return st.one_of(pairs.map(lambda p: p[0] & p[1]), pairs.map(lambda p: p[0] | p[1]), inner.map(Not))

    return st.recursive(leaf_masks(sizes), grow, max_leaves=5)


def biases(sizes: Sizes) -> Strategy:
    """No bias, or one of any class, float32."""
    batch, heads, queries, keys = sizes
    offsets = st.integers(-5, 40) | st.integers(-5, 40).map(np.asarray)

    def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def dense(rng: np.random.Generator) -> Bias:
        return DenseBias(draw(rng, *(n if rng.random() < 0.6 else 1 for n in sizes)))

    def bucketed(rng: np.random.Generator, both: bool, offset: Any) -> Bias:
        return Bucketed(draw(rng, 8, heads), bidirectional=both, max_distance=16, offset=offset)

    def relations(rng: np.random.Generator) -> Bias:
        sides = rng.integers(0, 4, (batch, queries, 3)), rng.integers(0, 3, (batch, keys))
        places = rng.integers(0, 60, (batch, queries)), rng.integers(0, 60, (batch, keys))
        groups = [rng.integers(0, 2, (batch, n)) for n in (queries, keys)] if rng.random() < 0.5 else []
        return Relations(draw(rng, 20, heads), *sides, *places, *groups, buckets=16, max_distance=32)

    return st.one_of(
        st.none(),
        st.builds(dense, RANDOM),
        st.builds(bucketed, RANDOM, st.booleans(), offsets),
        st.builds(lambda rng, offset: ALiBi(abs(draw(rng, heads)), offset), RANDOM, offsets),
        st.builds(relations, RANDOM),
    )


@st.composite
def cases(
    draw: Any,
    lengths: tuple[tuple[int, int], ...] = ((21, 29), (24, 24), (40, 17)),
    heads: tuple[tuple[int, int], ...] = ((4, 4), (4, 2), (4, 1)),
    width: int = 8,
    mask: Any = masks,
    bias: Any = biases,
    sinks: bool = True,
    dropout: bool = True,
    soft_cap: bool = True,
) -> Case:
    """A call; `mask` and `bias` are functions of the sizes, the last three whether it may have such terms."""
    (queries, keys), (count, groups) = draw(st.sampled_from(lengths)), draw(st.sampled_from(heads))
    batch, rng = draw(st.integers(1, 2)), draw(RANDOM)
    sizes = Sizes(batch, count, queries, keys)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def perhaps(allowed: bool) -> bool:
        return allowed and draw(st.booleans())

    terms = Terms(
        draw(mask(sizes)),
        draw(bias(sizes)),
        0.3,
        2.0 if perhaps(soft_cap) else None,
        normal(count) if perhaps(sinks) else None,
        Dropout(0.3, np.uint32(draw(SEEDS))) if perhaps(dropout) else None,
    )
    q, d_out = normal(batch, queries, count, width), normal(batch, queries, count, width)
    k, v = normal(batch, keys, groups, width), normal(batch, keys, groups, width)
    return Case(q, k, v, terms, d_out, normal(batch, count, queries))
