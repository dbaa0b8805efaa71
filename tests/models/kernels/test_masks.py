import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models.kernels import (
    And,
    Bucketed,
    Causal,
    Dense,
    Full,
    Lengths,
    Not,
    Or,
    Prefix,
    Segments,
    Window,
    attention,
)
from modicum.models.kernels.masks import describe
from modicum.models.kernels.spans import Span


def whole(mask, queries, keys):
    return np.asarray(mask.predicate(Span(0, queries), Span(0, keys)))


ROW, COLUMN = np.arange(5)[:, None], np.arange(7)[None, :]
LENGTHS = np.array([2, 6])
QUERY, KEY = (
    np.array([[1, 1, 2, 0, 0], [1, 2, 2, 3, 3]]),
    np.array([[1, 1, 2, 2, 0, 0, 0], [2, 2, 3, 3, 3, 4, 0]]),
)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (Full(), (ROW >= 0) & (COLUMN >= 0)),
        (Causal(), COLUMN <= ROW),
        (Causal(2), COLUMN <= ROW + 2),
        (Causal(jnp.array([0, 3])), ROW + np.array([0, 3])[:, None, None, None] >= COLUMN),
        (Window(1, 2), (COLUMN >= ROW - 1) & (COLUMN <= ROW + 2)),
        (Window(1, 0, offset=2), (COLUMN >= ROW + 1) & (COLUMN <= ROW + 2)),
        (Window(None, 0), COLUMN <= ROW),
        (Prefix(LENGTHS), (COLUMN <= ROW) | (LENGTHS[:, None, None, None] > COLUMN)),
        (Lengths(3), (COLUMN < 3) & (ROW >= 0)),
        (Lengths(LENGTHS), LENGTHS[:, None, None, None] > COLUMN),
        (
            Segments(QUERY, KEY),
            (QUERY[:, None, :, None] == KEY[:, None, None, :]) & (QUERY > 0)[:, None, :, None],
        ),
        (~Causal() & Lengths(6), (COLUMN > ROW) & (COLUMN < 6)),
        (Window(0, 0) | Lengths(1), (COLUMN == ROW) | (COLUMN < 1)),
    ],
    ids=lambda value: describe(value) if hasattr(value, "predicate") else "",
)
def test_predicate_is_the_definition(mask, expected):
    found = whole(mask, 5, 7)
    assert found.ndim == 4
    np.testing.assert_array_equal(*np.broadcast_arrays(found, expected))


def test_segment_ids_of_the_queries_serve_the_keys_too():
    np.testing.assert_array_equal(whole(Segments(QUERY), 5, 5), whole(Segments(QUERY, QUERY), 5, 5))


def test_a_tile_is_the_cut_of_the_whole():
    allowed = np.random.default_rng(0).random((2, 1, 5, 7)) < 0.5
    for mask in (
        Causal(1),
        Window(2, 1),
        Prefix(LENGTHS),
        Segments(QUERY, KEY),
        Dense(allowed),
        Lengths(LENGTHS),
    ):
        for start in (2, jnp.asarray(2)):
            tile = np.asarray(mask.predicate(Span(start, 3), Span(4, 2)))
            cut = np.broadcast_to(whole(mask, 5, 7), (2, 1, 5, 7))[:, :, 2:5, 4:6]
            np.testing.assert_array_equal(*np.broadcast_arrays(tile, cut), err_msg=describe(mask))


def test_expressions_flatten_and_describe_themselves():
    mask = Causal() & Lengths(3) & (Full() | Window(1, None))
    assert mask == And((Causal(), Lengths(3), Or((Full(), Window(1, None)))))
    assert describe(mask) == "Causal & Lengths & (Full | Window(1, None))"
    assert ~~mask == mask
    assert describe(~mask) == f"~({describe(mask)})"
    assert ~Causal() == Not(Causal())


def test_numbers_are_structure_and_arrays_are_leaves():
    assert jax.tree.leaves(Causal(3) & Window(1, 2)) == []
    assert len(jax.tree.leaves(Causal(jnp.array(3)) & Segments(QUERY, KEY))) == 3
    same = jax.tree.structure(Causal(1)) == jax.tree.structure(Causal(1))
    assert same and jax.tree.structure(Causal(1)) != jax.tree.structure(Causal(2))
    doubled = jax.tree.map(lambda x: x * 2, Prefix(LENGTHS, offset=1))
    assert doubled.offset == 1 and list(doubled.lengths) == [4, 12]


def test_a_tree_mapped_to_numbers_keeps_its_leaves():
    assert jax.tree.leaves(jax.tree.map(lambda x: x.size, Segments(QUERY, KEY))) == [10, 14]
    assert jax.tree.leaves(jax.tree.map(np.sum, Bucketed(np.ones((8, 2))))) == [16]


def test_masks_pass_through_jit_and_vmap():
    traced = jax.jit(lambda mask: mask.predicate(Span(0, 5), Span(0, 7)))
    mask = Causal(jnp.array(1)) & Segments(QUERY, KEY)
    np.testing.assert_array_equal(traced(mask), whole(mask, 5, 7))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), Lengths(LENGTHS), Lengths(LENGTHS - 1))
    found = jax.vmap(traced)(stacked)
    np.testing.assert_array_equal(
        found[1], whole(Lengths(LENGTHS - 1), 5, 7)[:, :, :1].repeat(found.shape[3], 2)
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            Segments(jnp.ones((2, 4), int), jnp.ones((2, 7), int)),
            r"Segments.query has shape \[2, 4\].*\[2, 5\]",
        ),
        (Full() & Segments(jnp.ones((2, 5), int)), r"Segments.key has shape \[2, 5\].*\[2, 7\]"),
        (~Lengths(jnp.ones(3, int)), r"Lengths.lengths has shape \[3\].*\[2\]"),
        (Prefix(jnp.ones((), int)), r"Prefix.lengths has shape \[\].*\[2\]"),
        (Causal(jnp.ones(3, int)), r"Causal.offset has shape \[3\].*scalar or \[2\]"),
        (Dense(jnp.ones((2, 3, 5, 7), bool)), r"Dense.allowed has shape \[2, 3, 5, 7\].*\[2, 4, 5, 7\]"),
        (Dense(jnp.ones((2, 1, 5, 7))), "Dense.allowed has type float32; it must be bool"),
        (jnp.ones((5, 7), bool), "it must be a mask"),
    ],
)
def test_arrays_that_do_not_fit_are_named(mask, message):
    q, k = jnp.zeros((2, 5, 4, 8)), jnp.zeros((2, 7, 4, 8))
    with pytest.raises(InputError, match=message):
        attention(q, k, k, mask=mask)


def test_a_window_cannot_be_negative():
    with pytest.raises(InputError, match=r"Window.left is -1"):
        Window(-1, 0)
