"""The list of tiles that a kernel walks along is the block map, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.models.kernels import Causal, Dense, Segments, Window
from modicum.models.kernels.block_lists import Entry, block_map, tile_list, unpack
from modicum.models.kernels.blocks import FULL, PARTIAL, SKIP, Grid, static_blocks

GRID = Grid(20, 24, 4, 4)


def entries(packed):
    columns = [np.asarray(x).tolist() for x in unpack(np.asarray(packed))]
    return [Entry(*values) for values in zip(*columns)]


def assert_is_the_map(packed, blocks):
    """Every live tile once, with its kind, rows in order, each opened and closed once, idle entries last."""
    listed = entries(packed)
    live = [e for e in listed if e.kind != SKIP]
    assert {(e.row, e.column): e.kind for e in live} == {
        (i, j): blocks[i, j] for i, j in np.argwhere(blocks != SKIP).tolist()
    }
    assert len(live) == (blocks != SKIP).sum()
    assert [e.row for e in listed] == sorted(e.row for e in listed)
    rows = list(range(len(blocks)))
    assert [e.row for e in listed if e.first] == rows and [e.row for e in listed if e.last] == rows
    for row in rows:
        flags = [(e.first, e.last) for e in listed if e.row == row and (e.kind != SKIP or e.first or e.last)]
        assert flags[0][0] and flags[-1][1]


@pytest.mark.parametrize("mask", [Causal(), Causal(-9), Window(3, 2), ~Causal()], ids=str)
def test_a_static_mask_needs_no_device(mask):
    blocks = block_map(mask, GRID, 2)
    packed = tile_list(blocks, static_blocks(mask, GRID))
    assert isinstance(packed, np.ndarray) and packed.dtype == np.int32
    assert_is_the_map(packed[0, 0], static_blocks(mask, GRID))
    transposed = tile_list(blocks.swapaxes(2, 3), static_blocks(mask, GRID).T)
    assert_is_the_map(transposed[0, 0], static_blocks(mask, GRID).T)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_arrays_shorten_the_list_on_the_device(seed):
    rng = np.random.default_rng(seed)
    ids = [np.sort(rng.integers(0, 4, (2, n)), 1) for n in (20, 24)]
    mask = Causal(6) & Segments(*map(jnp.asarray, ids))
    blocks, bound = block_map(mask, GRID, 2), static_blocks(mask, GRID)
    packed = tile_list(blocks, bound)
    assert packed.shape[2] == np.maximum((bound != SKIP).sum(1), 1).sum()
    for batch in range(2):
        assert_is_the_map(packed[batch, 0], np.asarray(blocks[batch, 0]))


def test_heads_of_a_group_are_one_list():
    allowed = np.ones((1, 4, 20, 24), bool)
    allowed[0, 1] = False
    blocks = np.asarray(block_map(Dense(jnp.asarray(allowed)), GRID, 2))
    assert (blocks[0, 0] == PARTIAL).all() and (blocks[0, 1] == FULL).all()


def test_every_tile_on_demand():
    packed = tile_list(block_map(Causal(), GRID, 1), static_blocks(Causal(), GRID), every=True)
    listed = entries(packed[0, 0])
    assert len(listed) == 30 and {e.kind for e in listed} == {SKIP, PARTIAL, FULL}


def test_it_may_be_traced():
    @jax.jit
    def lists(offset):
        return tile_list(block_map(Causal(offset), GRID, 1), static_blocks(Causal(offset), GRID))

    assert_is_the_map(lists(jnp.asarray(-5))[0, 0], static_blocks(Causal(-5), GRID))
