"""Attention on a cache's keys and values is attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models.kernels import (
    ALiBi,
    Bucketed,
    Causal,
    Full,
    Joined,
    Lengths,
    Paged,
    Segments,
    Window,
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


PAGE, ROOM = 4, 3
LENGTHS = np.array([9, 3, 12])


def paged(rng, groups, width=4):
    """Pages in random order, shared first pages, no numbers where nothing is; and the contiguous arrays."""
    k, v = (rng.normal(size=(len(LENGTHS), ROOM * PAGE, groups, width)) for _ in range(2))
    k[2, :PAGE], v[2, :PAGE] = k[0, :PAGE], v[0, :PAGE]  # rows 0 and 2 begin with one page
    table = rng.permutation(len(LENGTHS) * ROOM).reshape(-1, ROOM)
    pools = []
    for rows in (k, v):
        pool = np.full((len(LENGTHS) * ROOM, PAGE, groups, width), np.nan)
        for b, length in enumerate(LENGTHS):
            for s in range(length):
                pool[table[b, s // PAGE], s % PAGE] = rows[b, s]
        pools.append(jnp.asarray(pool))
    table[2, 0] = table[0, 0]
    table[1, 1:] = [-1, 10**6]  # beyond the length of row 1: no page at all
    return k, v, [Paged(pool, jnp.asarray(table, jnp.int32)) for pool in pools]


PAGED_OPTIONS = {
    "plain": (None, lambda offset: None, {}),
    "window": (lambda start: Window(4, 0, start), lambda offset: None, {"soft_cap": 2.0}),
    "alibi": (None, lambda offset: ALiBi(jnp.asarray(alibi_slopes(4)), offset), {"sinks": jnp.arange(4.0)}),
    "buckets": (None, lambda offset: Bucketed(jnp.arange(32.0).reshape(8, 4) / 9, False, 16, offset), {}),
}


@pytest.mark.parametrize(
    ("name", "queries", "groups"), [("plain", 1, 2), ("window", 3, 4), ("alibi", 3, 2), ("buckets", 1, 1)]
)
def test_pages_are_rows_of_their_own_length(x64, name, queries, groups):
    """Each row by itself, on its keys alone, at its own position."""
    rng, (mask, bias, options) = np.random.default_rng(0), PAGED_OPTIONS[name]
    k, v, pages = paged(rng, groups)
    q = jnp.asarray(rng.normal(size=(len(LENGTHS), queries, 4, 4)))
    starts = jnp.asarray(LENGTHS - queries)
    out, lse = jax.jit(
        lambda q, pages: decode_attention(
            q,
            *pages,
            lengths=jnp.asarray(LENGTHS),
            mask=mask and mask(starts),
            bias=bias(starts),
            return_lse=True,
            **options,
        )
    )(q, pages)
    for b, length in enumerate(LENGTHS):
        start = int(length) - queries
        row = q[b : b + 1], jnp.asarray(k[b : b + 1, :length]), jnp.asarray(v[b : b + 1, :length])
        seen = mask(start) if mask else Causal(start)
        wanted, wanted_lse = attention(
            *row, mask=seen, bias=bias(start), impl="reference", return_lse=True, **options
        )
        np.testing.assert_allclose(out[b : b + 1], wanted, rtol=0, atol=1e-13)
        np.testing.assert_allclose(lse[b : b + 1], wanted_lse, rtol=0, atol=1e-13)


def test_an_empty_row_gives_nothing():
    _, _, pages = paged(np.random.default_rng(0), 2)
    q = jnp.ones((3, 1, 4, 4))
    out, lse = decode_attention(q, *pages, lengths=jnp.array([9, 0, 12]), return_lse=True)
    assert (out[1] == 0).all() and (lse[1] == -jnp.inf).all() and jnp.isfinite(out).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": None}, r"needs lengths \[B\]"),
        ({"lengths": jnp.ones(2, int)}, r"lengths are int32\[2\]; they must be int32 \[3\]"),
        ({"q": jnp.ones((3, 1, 3, 4))}, r"q \[3, 1, 3, 4\] and keys \[3, 12, 2, 4\]"),
        ({"mask": Causal(jnp.zeros(2, int))}, r"Causal.offset has shape \[2\]"),
        ({"impl": "pallas"}, "impl='pallas' is unknown; valid are auto, tpu, hopper, gathered"),
        ({"k": Paged(jnp.ones((3, 2)), jnp.ones((3, 2), int))}, r"k.pages has shape \[3, 2\]"),
        ({"k": Joined(jnp.ones((6, 7, 4)), 2)}, "k and v have one form"),
        (
            {"v": Paged(jnp.ones((6, 2, 2, 4)), jnp.ones((3, 6), int))},
            "pages of 4 keys and of 2 values must agree",
        ),
        ({"sinks": jnp.ones(2)}, r"sinks are float32\[2\]; they must be floating \[4\]"),
        ({"bias": ALiBi(jnp.ones(2))}, r"ALiBi.slopes has shape \[2\]; it must be \[4\]"),
        ({"bias": ALiBi(jnp.ones(4), jnp.ones(2, int))}, r"ALiBi.offset has shape \[2\]"),
    ],
)
def test_pages_that_do_not_fit_are_named(change, message):
    _, _, (k, v) = paged(np.random.default_rng(0), 2)
    given = {"q": jnp.ones((3, 1, 4, 4)), "k": k, "v": v, "lengths": jnp.asarray(LENGTHS)} | change
    with pytest.raises(InputError, match=message):
        decode_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_joined_keys_have_sinks_and_lengths_too(x64):
    q, k, v = arrays(1, 4, 2)
    lengths, sinks = jnp.asarray([0, 5]), jnp.arange(4.0)
    out, lse = decode_attention(
        q, Joined.of(k), Joined.of(v), mask=Full(), lengths=lengths, sinks=sinks, return_lse=True
    )
    wanted = attention(q, k, v, mask=Lengths(lengths), sinks=sinks, impl="reference", return_lse=True)
    np.testing.assert_allclose(out, wanted[0], atol=1e-14)
    np.testing.assert_allclose(lse, wanted[1], atol=1e-14)


def test_what_lies_beyond_a_rows_length_has_no_gradient_either():
    q, _, (k, v) = paged(np.random.default_rng(0), 2)
    q = jnp.ones((len(LENGTHS), 1, 4, 4))
    gradient = jax.grad(lambda q: decode_attention(q, k, v, lengths=jnp.asarray(LENGTHS)).sum())(q)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"impl": "chunked"}, "only 'auto' is valid"), ({"soft_cap": -1.0}, "soft_cap is -1.0")],
)
def test_joined_keys_refuse_what_they_do_not_do(change, message):
    q, k, v = arrays(1, 4, 2)
    with pytest.raises(InputError, match=message):
        decode_attention(q, Joined.of(k), Joined.of(v), mask=Full(), **change)
