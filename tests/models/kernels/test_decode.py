"""Attention on a cache's keys and values is attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.models.kernels import (
    ALiBi,
    Bucketed,
    Causal,
    Joined,
    Segments,
    alibi_slopes,
    attention,
    decode_attention,
)


def arrays(queries, heads, groups, batch=2, keys=7, width=4):
    rng = np.random.default_rng(0)
    shapes = (batch, queries, heads, width), (batch, keys, groups, width), (batch, keys, groups, width)
    return tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)


BIASES = {
    "none": lambda heads: None,
    "buckets": lambda heads: Bucketed(jnp.arange(8.0 * heads).reshape(8, heads) / 9, False, 16, offset=4),
    "alibi": lambda heads: ALiBi(jnp.asarray(alibi_slopes(heads)), offset=4),
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("queries, heads, groups", [(1, 4, 4), (1, 4, 2), (3, 6, 2), (2, 4, 1)])
def test_it_is_the_reference(queries, heads, groups, bias, x64):
    q, k, v = arrays(queries, heads, groups)
    segments = jnp.asarray([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
    mask = Causal(jnp.asarray(4)) & Segments(jnp.ones((2, queries), jnp.int32), segments)
    options = {"mask": mask, "bias": BIASES[bias](heads), "scale": 0.3, "soft_cap": 2.0}
    out, lse = decode_attention(q, Joined.of(k), Joined.of(v), return_lse=True, **options)
    wanted, wanted_lse = attention(q, k, v, impl="reference", return_lse=True, **options)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-14)
    np.testing.assert_allclose(lse, wanted_lse, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(decode_attention(q, Joined.of(k), Joined.of(v), **options), out)


def test_a_joined_array_is_taken_for_the_array_it_was():
    _, k, _ = arrays(1, 4, 2)
    joined = Joined.of(k)
    assert joined.shape == k.shape and joined.array.shape == (4, 7, 4)
    np.testing.assert_array_equal(jnp.asarray(joined), k)
    np.testing.assert_array_equal(jnp.concatenate([k, joined], 1), jnp.concatenate([k, k], 1))
    mapped = jax.tree.map(lambda x: 2 * x, joined)
    assert isinstance(mapped, Joined) and mapped.groups == 2
