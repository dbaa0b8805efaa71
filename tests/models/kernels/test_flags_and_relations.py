"""Masks by flags and the bias by relations, against CPM's rules written in NumPy for each pair."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models.kernels import Causal, Full, Keys, Queries, Relations, Segments, Terms, attention
from modicum.models.kernels.blocks import FULL, PARTIAL, SKIP, Grid, dynamic_blocks
from modicum.models.kernels.chunked import Chunked
from modicum.models.kernels.masks import describe
from modicum.models.kernels.reference import Reference
from modicum.models.kernels.spans import Span

B, H, K, BUCKETS, FARTHEST = 2, 4, 8, 16, 12
RAGGED, EVEN = (21, 29), (24, 24)


def cpm_mask(queries, keys):
    """The rule of CPM's training with random contexts and spans, and the same pair by pair."""
    rng = np.random.default_rng(queries)
    context = rng.random((B, max(queries, keys))) < 0.5
    span = np.sort(rng.integers(1, 3, (B, max(queries, keys))), axis=1)
    query, key = context[:, :queries], context[:, :keys]
    mask = (Keys(key) | (Queries(~query) & Causal())) & Segments(span[:, :queries], span[:, :keys])
    allowed = np.zeros((B, queries, keys), bool)
    for b, q, k in np.ndindex(allowed.shape):
        allowed[b, q, k] = (key[b, k] or (not query[b, q] and k <= q)) and span[b, q] == span[b, k]
    return mask, allowed


def relations(queries, keys, groups, dtype=np.float64):
    rng = np.random.default_rng(3)
    longest = max(queries, keys)
    segments = np.sort(rng.integers(0, 4, (B, longest)), axis=1)
    related = rng.integers(1, 9, (B, 4, 4)) * (1 - np.eye(4, dtype=int))
    positions = np.broadcast_to(np.arange(longest), (B, longest)) + rng.integers(0, 5, (B, 1))
    group = rng.integers(0, 2, (B, longest))
    return Relations(
        rng.normal(size=(BUCKETS + 8, H)).astype(dtype),
        np.take_along_axis(related, segments[:, :queries, None], axis=1),
        segments[:, :keys],
        positions[:, :queries],
        positions[:, :keys],
        group[:, :queries] if groups else None,
        group[:, :keys] if groups else None,
        buckets=BUCKETS,
        max_distance=FARTHEST,
    )


def bucket(distance):
    """T5's bidirectional bucket of one distance, in the published float32."""
    half = BUCKETS // 2
    first, distance, exact = (half if distance > 0 else 0), abs(distance), half // 2
    if distance < exact:
        return first + distance
    share = np.log(np.float32(distance) / exact) / np.float32(np.log(FARTHEST / exact))
    return first + min(exact + int(share * (half - exact)), half - 1)


def dense(bias, queries, keys):
    """The bias pair by pair, `[B, H, T, S]`."""
    out = np.zeros((B, H, queries, keys))
    for b, q, k in np.ndindex(B, queries, keys):
        relation = bias.relations[b, q, bias.segments[b, k]]
        if bias.query_groups is not None and bias.query_groups[b, q] != bias.key_groups[b, k]:
            relation = 1
        distance = int(bias.key_positions[b, k] - bias.query_positions[b, q])
        row = BUCKETS + relation - 1 if relation else bucket(distance)
        out[b, :, q, k] = bias.table[row]
    return out


@pytest.mark.parametrize("shape", [RAGGED, EVEN], ids=str)
def test_the_rule_of_cpm_is_a_composition(shape):
    mask, allowed = cpm_mask(*shape)
    found = mask.predicate(Span(0, shape[0]), Span(0, shape[1]))
    np.testing.assert_array_equal(found[:, 0], allowed)
    assert describe(mask) == "(Keys | Queries & Causal) & Segments"
    tile = mask.predicate(Span(jnp.asarray(3), 5), Span(jnp.asarray(7), 9))
    np.testing.assert_array_equal(tile[:, 0], allowed[:, 3:8, 7:16])


def test_flags_rule_out_tiles():
    flags = np.repeat([True, False, True, False], [4, 4, 3, 5])[None]
    for mask, along in ((Keys(flags), 1), (Queries(flags), 0)):
        blocks = np.asarray(dynamic_blocks(mask, Grid(16, 16, 4, 4)))[0, 0]
        wanted = np.broadcast_to(np.expand_dims([FULL, SKIP, PARTIAL, SKIP], 1 - along), (4, 4))
        np.testing.assert_array_equal(blocks, wanted)


@pytest.mark.parametrize("groups", [False, True])
def test_a_tile_reads_the_rows_of_its_pairs(groups):
    bias = relations(*RAGGED, groups)
    wanted = dense(bias, *RAGGED)
    np.testing.assert_array_equal(bias.tile(Span(0, 21), Span(0, 29)), wanted.astype(np.float32))
    tile = bias.tile(Span(jnp.asarray(4), 8), Span(jnp.asarray(2), 16))
    np.testing.assert_array_equal(tile, wanted[:, :, 4:12, 2:18].astype(np.float32))


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("shape", [RAGGED, EVEN], ids=str)
@pytest.mark.parametrize("implementation", [Reference(), Chunked(block=8)], ids=lambda i: i.name)
def test_attention_and_gradients_are_those_of_the_dense_arrays(x64, implementation, shape, groups):
    """Values from NumPy; the table's gradient from that of the dense bias, summed by row in NumPy."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(B, n, H, K)) for n in (shape[0], shape[1], shape[1]))
    (mask, allowed), bias = cpm_mask(*shape), relations(*shape, groups)

    def call(table):
        return implementation(q, k, v, Terms(mask, replace(bias, table=table), 0.4))[0]

    out, pull = jax.vjp(jax.jit(call), jnp.asarray(bias.table))
    scores = np.einsum("bthk,bshk->bhts", q, k) * 0.4 + dense(bias, *shape)
    weights = np.where(allowed[:, None], np.exp(scores), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    wanted = np.einsum("bhts,bshk->bthk", weights, v)
    np.testing.assert_allclose(out, wanted, atol=1e-12)

    cotangent = rng.normal(size=out.shape)
    d_weights = np.einsum("bthk,bshk->bhts", cotangent, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    row, gradient = np.asarray(bias.row(Span(0, shape[0]), Span(0, shape[1]))), np.zeros_like(bias.table)
    np.add.at(gradient, row, d_scores.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], gradient, atol=1e-11)


@pytest.mark.parametrize(
    ("mask", "bias", "message"),
    [
        (Keys(np.ones((2, 5), bool)), None, r"Keys.flags has shape \[2, 5\]; it must be \[2, 7\]"),
        (Queries(np.ones((2, 5))), None, "Queries.flags has type float64; it must be bool"),
        (Full(), {"segments": np.zeros((2, 5), int)}, r"Relations.segments has shape .*\[2, 7\]"),
        (Full(), {"relations": np.zeros((2, 5), int)}, r"Relations.relations .*\[2, 5, N\]"),
        (Full(), {"query_groups": np.zeros((2, 5), int)}, "groups of queries or of keys alone"),
        (Full(), {"table": np.zeros((16, 4))}, r"Relations.table .*\[> 16, 4\]"),
        (Full(), {"max_distance": 4}, "max_distance is 4; it must exceed 4"),
    ],
)
def test_arrays_that_do_not_fit_are_named(mask, bias, message):
    q, k = jnp.zeros((2, 5, 4, 8)), jnp.zeros((2, 7, 4, 8))
    given = {
        "table": np.zeros((20, 4)),
        "relations": np.zeros((2, 5, 3), int),
        "segments": np.zeros((2, 7), int),
        "query_positions": np.zeros((2, 5), int),
        "key_positions": np.zeros((1, 7), int),
        "buckets": 16,
        "max_distance": 20,
    }
    bias = None if bias is None else Relations(**given | bias)
    with pytest.raises(InputError, match=message):
        attention(q, k, k, mask=mask, bias=bias)
