"""The block map promises: SKIP holds no allowed pair, FULL no forbidden one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.models.kernels import Causal, Dense, Full, Lengths, Mask, Segments, Window
from modicum.models.kernels.blocks import FULL, PARTIAL, SKIP, Grid, dynamic_blocks, static_blocks
from modicum.models.kernels.masks import describe
from modicum.models.kernels.spans import Span

from .cases import FAST_COMPILE

BATCH, HEADS = 2, 3
GRIDS = [Grid(13, 17, 4, 4), Grid(16, 16, 4, 8), Grid(1, 17, 1, 5)]


@functools.partial(jax.jit, static_argnums=1, compiler_options=FAST_COMPILE)
def pairs_and_blocks(mask: Mask, grid: Grid):
    """Of all pairs and of all tiles; one program, where single operations are many."""
    pairs = mask.predicate(Span(0, grid.queries), Span(0, grid.keys))
    return (
        jnp.broadcast_to(pairs, (BATCH, HEADS, grid.queries, grid.keys)),
        jnp.broadcast_to(dynamic_blocks(mask, grid), (BATCH, HEADS, *grid.shape)),
    )


def tiles_of(pairs: np.ndarray, grid: Grid):
    """For each tile its place and its pairs `[B, H, t, s]`."""
    for i, j in np.ndindex(*grid.shape):
        rows = slice(i * grid.rows, (i + 1) * grid.rows)
        yield (i, j), pairs[:, :, rows, j * grid.columns : (j + 1) * grid.columns]


def assert_sound(mask: Mask, grid: Grid):
    static = static_blocks(mask, grid)
    every, dynamic = map(np.asarray, pairs_and_blocks(mask, grid))
    for (i, j), pairs in tiles_of(every, grid):
        for found, allowed in [(static[i, j], pairs)] + [
            (dynamic[b, h, i, j], pairs[b, h]) for b, h in np.ndindex(BATCH, HEADS)
        ]:
            assert found in (SKIP, PARTIAL, FULL)
            assert found != SKIP or not allowed.any(), (describe(mask), grid, i, j)
            assert found != FULL or allowed.all(), (describe(mask), grid, i, j)
        assert static[i, j] == PARTIAL or (dynamic[:, :, i, j] == static[i, j]).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_block_map_keeps_its_promises(random_masks, grid, data):
    assert_sound(data.draw(random_masks(BATCH, HEADS, grid.queries, grid.keys)), grid)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_block_map_keeps_its_promises_on_many(random_masks, data):
    grid = data.draw(st.sampled_from(GRIDS))
    assert_sound(data.draw(random_masks(BATCH, HEADS, grid.queries, grid.keys)), grid)


def test_intervals_are_decided_exactly():
    grid = Grid(13, 17, 4, 4)
    for mask in (
        Causal(),
        Causal(-3),
        Causal(5),
        Window(3, 2),
        Window(None, 1),
        Window(2, None),
        Lengths(9),
        Full(),
    ):
        every, dynamic = map(np.asarray, pairs_and_blocks(mask, grid))
        for found in (static_blocks(mask, grid), dynamic[0, 0]):
            for place, pairs in tiles_of(every, grid):
                exact = FULL if pairs.all() else PARTIAL if pairs.any() else SKIP
                assert found[place] == exact, (describe(mask), place)


def test_causal_visits_the_triangle_of_tiles():
    blocks = static_blocks(Causal(), Grid(1024, 1024, 128, 128))
    assert (blocks != SKIP).sum() == 36 and (blocks == PARTIAL).sum() == 8


def test_a_window_costs_a_band_of_tiles():
    blocks = static_blocks(Causal() & Window(255, 0), Grid(4096, 4096, 128, 128))
    assert (blocks != SKIP).sum(1).max() == 3


def test_packed_documents_are_found_on_the_device():
    ids = np.repeat([1, 2, 3, 0], 4)[None]
    blocks = np.asarray(dynamic_blocks(Segments(ids), Grid(16, 16, 4, 4)))[0, 0]
    np.testing.assert_array_equal(blocks, np.diag([FULL, FULL, FULL, SKIP]))


def test_dense_is_decided_by_its_values():
    allowed = np.kron([[1, 0], [0, 1]], np.ones((4, 4), bool)).astype(bool)
    allowed[0, 3] = False
    blocks = np.asarray(dynamic_blocks(Dense(allowed[None, None]), Grid(8, 8, 4, 4)))[0, 0]
    np.testing.assert_array_equal(blocks, [[PARTIAL, SKIP], [SKIP, FULL]])
