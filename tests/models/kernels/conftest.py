"""Random masks and arrays for the kernels' tests."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from modicum.models.kernels import Causal, Dense, Full, Lengths, Mask, Not, Prefix, Segments, Window

Strategy = st.SearchStrategy[Mask]


def _leaves(batch: int, heads: int, queries: int, keys: int) -> Strategy:
    seeds, offsets = st.integers(0, 10**6).map(np.random.default_rng), st.integers(-5, 8)
    widths = st.none() | st.integers(0, 9)

    def segments(rng: np.random.Generator) -> Mask:
        ids = [np.sort(rng.integers(0, 4, (batch, n)), axis=1) for n in (queries, keys)]
        return Segments(*(jnp.asarray(rng.permuted(x, axis=1) if rng.random() < 0.3 else x) for x in ids))

    def lengths(rng: np.random.Generator) -> jnp.ndarray:
        return jnp.asarray(rng.integers(0, keys + 2, batch))

    def dense(rng: np.random.Generator) -> Mask:
        shape = [n if rng.random() < 0.6 else 1 for n in (batch, heads, queries, keys)]
        return Dense(jnp.asarray(rng.random(shape) < rng.choice([0.02, 0.5, 0.98])))

    return st.one_of(
        st.just(Full()),
        st.builds(Causal, offsets),
        st.builds(lambda rng: Causal(jnp.asarray(rng.integers(-5, 8, batch))), seeds),
        st.builds(Window, widths, widths, offsets),
        st.builds(lambda offset, left: Window(left, None, jnp.asarray(offset)), offsets, widths),
        st.builds(lambda rng, offset: Prefix(lengths(rng), offset), seeds, offsets),
        st.builds(segments, seeds),
        st.builds(lambda rng: Lengths(lengths(rng)), seeds),
        st.builds(Lengths, st.integers(0, keys)),
        st.builds(dense, seeds),
    )


@pytest.fixture(scope="session")
def random_masks() -> Callable[[int, int, int, int], Strategy]:
    """Expressions of up to about five masks for sizes B, H, T, S."""

    def draw(batch: int, heads: int, queries: int, keys: int) -> Strategy:
        def grow(inner: Strategy) -> Strategy:
            pairs = st.tuples(inner, inner)
            return st.one_of(
                pairs.map(lambda p: p[0] & p[1]), pairs.map(lambda p: p[0] | p[1]), inner.map(Not)
            )

        return st.recursive(_leaves(batch, heads, queries, keys), grow, max_leaves=5)

    return draw
