"""The range of keys of each query says what the mask says, or why there is none."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.models.kernels import Causal, Dense, Full, Lengths, Prefix, Segments, Window
from modicum.models.kernels.flags import Keys, Queries
from modicum.models.kernels.masks import And
from modicum.models.kernels.ranges import no_ranges, ranges
from modicum.models.kernels.spans import Span

B, T, S = 2, 7, 9


def allowed(found):
    """What the ranges allow, `[B or 1, T, S]`."""
    key = np.arange(S)
    seen = np.ones((1, T, S), bool)
    if found.starts is not None:
        seen = seen & (key >= np.asarray(found.starts)[:, :, None])
    if found.ends is not None:
        seen = seen & (key < np.asarray(found.ends)[:, :, None])
    if found.query_ids is not None:
        compared = np.asarray(found.query_ids)[:, :, None] == np.asarray(found.key_ids)[:, None, :]
        exact = np.broadcast_to(
            np.asarray(found.exact)[:, :, None], np.broadcast_shapes(seen.shape, (B, T, S))
        )
        np.testing.assert_array_equal((seen & ~compared & exact).any(), False)
        alone = np.ones((1, T, S), bool)
        if found.other_starts is not None:
            alone = alone & (key >= np.asarray(found.other_starts)[:, :, None])
        if found.other_ends is not None:
            alone = alone & (key < np.asarray(found.other_ends)[:, :, None])
        seen = seen & compared
        np.testing.assert_array_equal(*np.broadcast_arrays(alone & compared, seen))
    return np.broadcast_to(seen, (B, T, S))


def assert_same(mask):
    wanted = np.asarray(mask.predicate(Span(0, T), Span(0, S)))
    assert wanted.shape[1] == 1
    np.testing.assert_array_equal(allowed(ranges(mask, T, S)), np.broadcast_to(wanted[:, 0], (B, T, S)))


def whole(low, high, *shape):
    return st.integers(0, 2**32 - 1).map(
        lambda seed: np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)
    )


OFFSETS = st.one_of(st.integers(-4, 4), whole(-4, 4, B))
SIDES = st.one_of(st.none(), st.integers(0, 5))
INTERVALS = st.one_of(
    st.just(Full()),
    st.builds(Causal, OFFSETS),
    st.builds(Window, SIDES, SIDES, OFFSETS),
    st.builds(Prefix, whole(0, S + 1, B), OFFSETS),
    st.builds(Lengths, st.one_of(st.integers(0, S), whole(0, S + 1, B))),
    whole(0, 2, B, T).map(lambda flags: Queries(flags.astype(bool))),
)
FROM_FIRST = st.one_of(st.builds(Causal, OFFSETS), st.builds(Lengths, whole(0, S + 1, B)))
NOT_FIRST = FROM_FIRST.map(lambda mask: ~mask)
EITHER = st.tuples(FROM_FIRST, FROM_FIRST).map(lambda pair: pair[0] | pair[1])
IDS = st.one_of(
    st.builds(Segments, whole(0, 3, B, T), whole(0, 3, B, S)),
    st.builds(lambda q, k: Segments(np.sort(q), np.sort(k)), whole(0, 3, B, T), whole(0, 3, 1, S)),
    whole(0, 2, B, S).map(lambda flags: Keys(flags.astype(bool))),
    whole(0, 2, B, S).map(lambda flags: ~Keys(flags.astype(bool))),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(INTERVALS, NOT_FIRST, EITHER), min_size=1, max_size=3), st.none() | IDS)
def test_ranges_are_the_mask(parts, ids):
    assert_same(And((*parts, ids)) if ids is not None else And(tuple(parts)))


def test_flags_of_keys_join_the_ids_of_segments():
    rng = np.random.default_rng(0)
    segments = Segments(rng.integers(0, 3, (B, T)), rng.integers(0, 3, (B, S)))
    assert_same(segments & Keys(rng.random((B, S)) < 0.7) & Keys(rng.random((1, S)) < 0.7) & Causal(2))


def test_packed_documents_are_exact_and_mixed_ids_are_not():
    found = ranges(Segments(np.array([[1, 1, 2, 2, 3, 0]])), 6, 6)
    np.testing.assert_array_equal(found.starts, [[0, 0, 2, 2, 4, 0]])
    np.testing.assert_array_equal(found.ends, [[2, 2, 4, 4, 5, 0]])
    assert found.exact.all()
    mixed = ranges(Segments(np.array([[1, 2, 1]])), 3, 3)
    np.testing.assert_array_equal(mixed.exact, [[False, True, False]])


SEGMENTS = Segments(np.ones((B, S), np.int32))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Dense(np.ones((1, 1, S, S), bool)), "Dense does not show each query one range"),
        (Causal() & Dense(np.ones((1, 1, S, S), bool)), "Dense does not show"),
        (Causal() | SEGMENTS, "Segments does not show"),
        (Window(2, 0) | Lengths(3), "the union Window.2, 0. | Lengths may have a gap"),
        (~Window(2, 0), "~Window.2, 0. shows what lies on both sides"),
        (SEGMENTS & Segments(np.ones((B, S), np.int32)), "two masks of segments"),
    ],
)
def test_what_is_no_range_says_why(mask, reason):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), mask)
    assert re.search(reason, no_ranges(shapes, S, S))
    assert no_ranges(Causal(jnp.array(3)) & Lengths(jnp.array([1, 2])), S, S) is None
