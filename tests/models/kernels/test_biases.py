import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models.kernels import ALiBi, Bucketed, DenseBias, Full, alibi_slopes, attention
from modicum.models.kernels.spans import Span


def bucket_by_formula(distance, bidirectional, buckets, max_distance):
    """T5's `_relative_position_bucket`, one number at a time, in the paper's float32."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    share = np.log(np.float32(distance) / exact) / np.float32(np.log(max_distance / exact))
    return first + min(exact + int(share * (buckets - exact)), buckets - 1)


@pytest.mark.parametrize(
    ("bidirectional", "buckets", "longest"), [(True, 32, 128), (False, 32, 128), (True, 8, 20)]
)
def test_buckets_are_those_of_t5(bidirectional, buckets, longest):
    bias = Bucketed(np.zeros((buckets, 2)), bidirectional, longest)
    distance = np.arange(-2 * longest, 2 * longest)
    expected = [bucket_by_formula(int(d), bidirectional, buckets, longest) for d in distance]
    np.testing.assert_array_equal(bias.bucket(jnp.asarray(distance)), expected)
    assert len(set(expected)) == buckets - bidirectional  # distance 0 lies on one side only


def test_known_buckets_of_t5():
    """Values of the published formula with 32 buckets and a maximum of 128, worked by hand."""
    both, one = Bucketed(np.zeros((32, 1))), Bucketed(np.zeros((32, 1)), bidirectional=False)
    distance = jnp.array([0, -1, 1, -7, -8, -16, -64, -1000, 8, 127])
    np.testing.assert_array_equal(both.bucket(distance), [0, 1, 17, 7, 8, 10, 14, 15, 24, 31])
    np.testing.assert_array_equal(one.bucket(jnp.array([5, 0, -15, -16, -32, -128])), [0, 0, 15, 16, 21, 31])


@pytest.mark.parametrize("start", [(0, 0), (40, 3), (jnp.asarray(3), jnp.asarray(40))], ids=str)
def test_a_tile_reads_the_bucket_of_each_distance(start):
    table = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    bias, (row, column) = Bucketed(table, offset=2), (int(x) for x in start)
    tile = bias.tile(Span(start[0], 6), Span(start[1], 9))
    distance = np.arange(column, column + 9)[None] - np.arange(row, row + 6)[:, None] - 2
    np.testing.assert_array_equal(tile, table[np.asarray(bias.bucket(distance))].transpose(2, 0, 1)[None])


def test_alibi_is_slope_times_distance():
    tile = ALiBi(np.array([1.0, 0.5], np.float32)).tile(Span(2, 2), Span(1, 4))
    np.testing.assert_array_equal(tile[0, 0], [[-1, 0, -1, -2], [-2, -1, 0, -1]])
    np.testing.assert_array_equal(tile[0, 1], tile[0, 0] / 2)


def test_alibi_slopes_are_those_of_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    with pytest.raises(InputError, match="heads is 0"):
        alibi_slopes(0)


@pytest.mark.parametrize(
    "bias",
    [
        DenseBias(np.ones((1, 3, 6, 9))),
        DenseBias(np.ones((2, 1, 6, 1))),
        Bucketed(np.ones((8, 3)), max_distance=8),
        ALiBi(np.ones(3)),
    ],
    ids=lambda bias: type(bias).__name__,
)
def test_gradients_of_tiles_add_up_to_the_gradient_of_the_whole(x64, bias):
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6, 9)))
    pull = jax.vjp(lambda b: jnp.broadcast_to(b.tile(Span(0, 6), Span(0, 9)), cotangent.shape), bias)[1]
    total = jax.tree.map(jnp.zeros_like, bias)
    for row in (0, 3):
        for column in (0, 3, 6):
            part = cotangent[:, :, row : row + 3, column : column + 3]
            total = bias.add_gradient(total, part, Span(row, 3), Span(column, 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), total, pull(cotangent)[0])


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (jnp.ones((5, 7)), r"bias has shape \[5, 7\].*\[B, H, T, S\] = \[2, 4, 5, 7\]"),
        (Bucketed(jnp.ones((32, 3))), r"Bucketed.table has shape \[32, 3\].*\[buckets, 4\]"),
        (Bucketed(jnp.ones((31, 4))), "31 buckets"),
        (Bucketed(jnp.ones((32, 4)), max_distance=8), "max_distance is 8; it must exceed 8"),
        (ALiBi(jnp.ones(3)), r"ALiBi.slopes has shape \[3\].*\[4\]"),
        (ALiBi(jnp.ones(4), offset=jnp.ones(2)), r"ALiBi.offset has shape \[2\].*scalar"),
    ],
)
def test_arrays_that_do_not_fit_are_named(bias, message):
    q, k = jnp.zeros((2, 5, 4, 8)), jnp.zeros((2, 7, 4, 8))
    with pytest.raises(InputError, match=message):
        attention(q, k, k, mask=Full(), bias=bias)
