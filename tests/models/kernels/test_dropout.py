"""The mask of dropout is a function of indices, and looks like chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models.kernels import Causal, Dropout, attention
from modicum.models.kernels.spans import Span

SEED = jnp.uint32(2_654_435_769)


def whole(dropout, batch=2, heads=3, queries=64, keys=96):
    return np.asarray(dropout.keep(*(Span(0, n) for n in (batch, heads, queries, keys))))


def test_bits_are_these_on_every_machine():
    """Worked by hand in Python's integers, so that a kernel's own arithmetic can be held against it."""

    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    keep = whole(Dropout(0.3, SEED))
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 63, 95), (1, 0, 7, 50), (0, 2, 31, 1), (1, 1, 1, 1)]:
        plane = mix(mix(int(SEED) ^ b * 0x9E3779B9 % 2**32) ^ h * 0x85EBCA6B % 2**32)
        row, column = mix(plane ^ i * 0xC2B2AE35 % 2**32), mix((plane + j * 0x27D4EB2F) % 2**32)
        assert keep[b, h, i, j] == (mix(row ^ column) >> 8 >= round(0.3 * 2**24)), (b, h, i, j)


def test_a_part_has_the_bits_of_the_whole():
    full = whole(Dropout(0.5, SEED))
    tile = Dropout(0.5, SEED).keep(Span(1, 1), Span(1, 2), Span(jnp.asarray(10), 20), Span(30, 7))
    np.testing.assert_array_equal(tile, full[1:, 1:, 10:30, 30:37])
    moved = Dropout(0.5, SEED, batch=1, head=jnp.asarray(1), query=10, key=jnp.asarray(30))
    np.testing.assert_array_equal(whole(moved, 1, 2, 20, 7), full[1:, 1:, 10:30, 30:37])


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_kept_are_as_many_as_the_rate_says_and_independent(rate):
    keep = whole(Dropout(rate, SEED), 2, 2, 256, 256) - (1 - rate)
    scale = rate * (1 - rate)
    assert abs(keep.mean()) < 5 * np.sqrt(scale / keep.size)
    for axis in range(4):  # neighbours along each axis, whole rows and columns
        a, b = (
            np.take(keep, range(keep.shape[axis] - 1), axis),
            np.take(keep, range(1, keep.shape[axis]), axis),
        )
        assert abs((a * b).mean()) < 5 * scale / np.sqrt(a.size)
    for axis in (2, 3):
        means = keep.mean(axis)
        assert abs(means).max() < 5.5 * np.sqrt(scale / 256)
    squares = keep[..., :-1, :-1] * keep[..., :-1, 1:] * keep[..., 1:, :-1] * keep[..., 1:, 1:]
    assert abs(squares.mean()) < 5 * scale**2 / np.sqrt(squares.size)  # rows and columns are mixed


def test_seeds_give_other_masks():
    a, b = (whole(Dropout.of(0.5, jax.random.key(i))) for i in (0, 1))
    assert abs((a == b).mean() - 0.5) < 5 * 0.5 / np.sqrt(a.size)


def test_rate_zero_adds_no_operation():
    q = jnp.ones((2, 5, 4, 8))

    def traced(**options):
        return str(
            jax.make_jaxpr(lambda q: attention(q, q, q, mask=Causal(), impl="reference", **options))(q)
        )

    assert traced(dropout=Dropout(0.0, SEED)) == traced() == traced(sinks=None)
    assert "xor" in traced(dropout=Dropout(0.5, SEED)) and "xor" not in traced()


@pytest.mark.parametrize("rate", [1.0, -0.1, "0.1", jnp.ones(())], ids=str)
def test_a_rate_is_a_probability_below_one(rate):
    with pytest.raises(InputError, match=r"Dropout.rate is .*at least 0 and below 1"):
        Dropout(rate, SEED)


def test_what_does_not_fit_is_named():
    q = jnp.ones((2, 5, 4, 8))
    for dropout, message in (
        (
            Dropout(0.1, jax.random.split(jax.random.key(0))),
            r"Dropout.seed is .*\[2\]; .* scalar of type uint32",
        ),
        (Dropout(0.1, SEED, head=jnp.arange(2)), r"Dropout.head has shape \[2\]"),
    ):
        with pytest.raises(InputError, match=message):
            attention(q, q, q, mask=Causal(), dropout=dropout)
