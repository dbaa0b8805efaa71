"""What the chunked path reads and writes: live tiles once, nothing of the size of all scores."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.models.kernels import (
    ALiBi,
    Bucketed,
    Causal,
    DenseBias,
    Full,
    Lengths,
    Prefix,
    Relations,
    Segments,
    Terms,
    Window,
)
from modicum.models.kernels.blocks import Grid
from modicum.models.kernels.chunked import Chunked, over_tiles
from modicum.models.kernels.masks import describe
from modicum.models.kernels.spans import Span

IDS = np.repeat([1, 2, 3, 0], [20, 28, 12, 4])[None]


@pytest.mark.parametrize(
    ("mask", "live"),
    [
        (Full(), 64),
        (Causal(), 36),
        (Causal(jnp.asarray(8)), 43),
        (Causal() & Window(15, 0), 21),
        (Window(8, 8, offset=jnp.asarray(0)), 22),
        (Prefix(np.array([24, 0])), 39),
        (Causal() & Segments(IDS), 18),
        (Lengths(np.array([3, 17])), 24),
        (~Full(), 0),
    ],
    ids=lambda value: describe(value) if hasattr(value, "predicate") else "",
)
def test_live_tiles_are_visited_once_and_others_never(mask, live):
    grid = Grid(64, 64, 8, 8)
    pairs = np.asarray(mask.predicate(Span(0, 64), Span(0, 64))).any((0, 1))
    expected = np.broadcast_to(pairs, (64, 64)).reshape(8, 8, 8, 8).any((1, 3))

    def count(seen, tile):
        return seen.at[tile.rows.start // 8, tile.columns.start // 8].add(1)

    seen = jax.jit(lambda mask: over_tiles(grid, mask, count, jnp.zeros((8, 8), jnp.int32)))(mask)
    np.testing.assert_array_equal(seen, expected)
    assert seen.sum() == live


def test_what_is_masked_by_tiles_is_not_even_read():
    """No number among the keys that no query sees would come through a product with weight 0."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 32, 2, 4)), jnp.float32) for _ in range(3))
    k, v = k.at[:, 16:].set(jnp.nan), v.at[:, 16:].set(jnp.nan)

    def loss(q, k, v):
        out, lse = Chunked(block=8)(q, k, v, Terms(Causal(jnp.asarray(-16)) | Window(3, 0, -20), scale=0.5))
        return (out**2).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)
    assert jnp.isfinite(value)
    for gradient in gradients:
        assert jnp.isfinite(gradient).all() and abs(gradient).max() > 0
    assert (gradients[1][:, 16:] == 0).all() and (gradients[2][:, 16:] == 0).all()


def sizes(jaxpr):
    """How many numbers each array of a program holds, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from sizes(inner)


BATCH, HEADS, LENGTH = 4, 4, 64
PLACES = np.arange(LENGTH)[None].repeat(BATCH, 0)
BIASES = {
    "dense for all rows": DenseBias(np.ones((1, HEADS, LENGTH, LENGTH), np.float32)),
    "dense for all heads": DenseBias(np.ones((BATCH, 1, LENGTH, LENGTH), np.float32)),
    "dense of keys": DenseBias(np.ones((BATCH, 1, 1, LENGTH), np.float32)),
    "bucketed": Bucketed(np.ones((32, HEADS), np.float32)),
    "alibi": ALiBi(np.ones(HEADS, np.float32)),
    "relations": Relations(
        np.ones((20, HEADS), np.float32),
        np.zeros((BATCH, LENGTH, 3), int),
        PLACES % 3,
        PLACES,
        PLACES,
        buckets=16,
        max_distance=32,
    ),
}


@pytest.mark.parametrize("name", BIASES)
def test_neither_scores_nor_gradients_are_ever_whole(name):
    q = jnp.ones((BATCH, LENGTH, HEADS, 8), jnp.float32)

    def loss(q, bias):
        return Chunked(block=16)(q, q, q, Terms(Full(), bias))[0].sum()

    program = jax.make_jaxpr(jax.grad(loss, (0, 1), allow_int=True))(q, BIASES[name])
    # the largest that may be: a bias or gradient that is given so, and one tile for all heads and rows
    assert max(sizes(program.jaxpr)) <= BATCH * HEADS * LENGTH * LENGTH // 4
