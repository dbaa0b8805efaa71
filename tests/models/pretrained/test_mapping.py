"""Forms: boxes of our leaves in their tensors, in both directions, whole and in slices."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.models import Layer, TransformerConfig
from modicum.models.pretrained.assemble import leaf_block, their_tensors
from modicum.models.pretrained.mapping import (
    Entry,
    InterleavedHeads,
    Part,
    Piece,
    Rows,
    Same,
    Transposed,
    linear,
    norm,
    place,
    scanned_path,
)

SHAPE = (6, 8)
NUMBERS = np.random.default_rng(0)


def split_heads(theirs, index, heads, count):
    """`[heads count K, D]` to number `index` of each head, `[heads K, D]`."""
    return theirs.reshape(heads, count, -1, theirs.shape[-1])[:, index].reshape(-1, theirs.shape[-1])


FORMS = {
    "same": (Same(), (6, 8), lambda t: t),
    "transposed": (Transposed(), (8, 6), lambda t: t.T),
    "part of columns": (Part(1, 3, 1), (6, 24), lambda t: t[:, 8:16]),
    "part of rows": (Part(2, 3), (18, 8), lambda t: t[12:]),
    "part, transposed": (Part(1, 3, 0, transposed=True), (24, 6), lambda t: t[8:16].T),
    "part of columns, transposed": (Part(0, 2, 1, transposed=True), (8, 12), lambda t: t[:, :6].T),
    "heads": (InterleavedHeads(1, 2), (18, 8), lambda t: split_heads(t, 1, 2, 3)),
    "heads, transposed": (
        InterleavedHeads(2, 4, transposed=True),
        (24, 6),
        lambda t: split_heads(t, 2, 4, 3).T,
    ),
    "rows": (Rows(0, 5), (5, 8), lambda t: np.pad(t, ((0, 1), (0, 0)))),
    "columns, transposed": (
        Rows(2, 7, 1, Transposed()),
        (5, 6),
        lambda t: np.pad(t.T, ((0, 0), (2, 1))),
    ),
}


@pytest.mark.parametrize(("form", "their_shape", "ours"), FORMS.values(), ids=FORMS)
def test_a_form_reads_what_numpy_reads(form, their_shape, ours):
    """Every slice of our leaf, against plain indexing of the whole."""
    assert form.shape(SHAPE) == their_shape
    tensor = NUMBERS.random(their_shape, np.float32)
    pieces, expected = [Piece(Entry("t", "leaf", form))], ours(tensor)

    @settings(max_examples=30, deadline=None)
    @given(st.tuples(st.integers(0, 6), st.integers(0, 6)), st.tuples(st.integers(0, 8), st.integers(0, 8)))
    def check(rows, columns):
        index = tuple(slice(min(pair), max(pair)) for pair in (rows, columns))
        block = leaf_block(pieces, SHAPE, index, np.dtype(np.float32), lambda name, where: tensor[where])
        assert np.array_equal(block, expected[index])

    check()


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(70, 4100), (4100, 70), (1, 2049), (257, 1)])
def test_large_matrices_are_transposed_by_tiles(kind, shape):
    tensor = NUMBERS.random(shape, np.float32)
    pieces = [Piece(Entry("t", "leaf", Transposed()))]
    index = tuple(slice(0, n) for n in shape[::-1])
    block = leaf_block(pieces, shape[::-1], index, np.dtype(kind), lambda name, where: tensor[where])
    assert np.array_equal(block, tensor.T.astype(kind))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_fused_projections_come_apart_and_together(heads):
    """Three leaves of one tensor: out of it and back, the same bits."""
    tensor = NUMBERS.random((24, 6), np.float32)
    for form in (lambda i: Part(i, 3, 0, True), lambda i: InterleavedHeads(i, heads, transposed=True)):
        leaves = place([Entry("t", f"leaf_{i}", form(i)) for i in range(3)], TransformerConfig())
        whole = (slice(0, 6), slice(0, 8))
        params = {
            path: leaf_block(pieces, SHAPE, whole, tensor.dtype, lambda name, where: tensor[where])
            for path, pieces in leaves.items()
        }
        (back,) = their_tensors(leaves, params)
        assert back.shape == (24, 6) and back.make().tobytes() == tensor.tobytes()


def test_a_tensor_that_is_only_half_filled_is_no_export():
    leaves = place([Entry("t", "leaf", Part(0, 2))], TransformerConfig())
    (tensor,) = their_tensors(leaves, {"leaf": np.ones((2, 3), np.float32)})
    with pytest.raises(AssertionError, match="6 of 12 values"):
        tensor.make()


def test_rows_of_several_tensors_fill_one_leaf():
    tensors = {"words": np.full((3, 2), 1.0), "prompts": np.full((2, 2), 2.0)}
    entries = [Entry("words", "table", Rows(0, 3)), Entry("prompts", "table", Rows(3, 5))]
    pieces = place(entries, TransformerConfig())["table"]
    index, kind = (slice(1, 6), slice(0, 2)), np.dtype(np.float32)
    block = leaf_block(pieces, (6, 2), index, kind, lambda name, where: tensors[name][where])
    assert block[:, 0].tolist() == [1, 1, 2, 2, 0]


def test_scanned_paths_are_those_of_stacking():
    config = TransformerConfig(layers=6, scan=True)
    assert scanned_path("layers_4/mlp/up/kernel", config) == ("layers/mlp/up/kernel", 4)
    assert scanned_path("decoder/layers_4/mlp/up", config) == ("decoder/layers/mlp/up", 4)
    assert scanned_path("embedding/table", config) == ("embedding/table", None)
    patterned = replace(config, pattern=(Layer(), Layer()))
    assert scanned_path("layers_5/mlp/up", patterned) == ("layers/layer_1/mlp/up", 2)


def test_a_stacked_leaf_is_read_row_by_row_and_only_the_rows_asked_for():
    config = TransformerConfig(layers=4, scan=True)
    entries = [Entry(f"h.{i}", f"layers_{i}/leaf", Transposed()) for i in range(4)]
    pieces, read = place(entries, config)["layers/leaf"], []

    def tensor(name, where):
        read.append(name)
        return np.full((3, 2), float(name[-1]))[where]

    index = (slice(1, 3), slice(0, 2), slice(1, 3))
    block = leaf_block(pieces, (4, 2, 3), index, np.dtype(np.float32), tensor)
    assert block.shape == (2, 2, 2) and block[:, 0, 0].tolist() == [1, 2]
    assert read == ["h.1", "h.2"]


def test_the_usual_layers_have_their_entries():
    assert [entry.theirs for entry in (*linear("a", "b"), *norm("c", "d"))] == [
        "a.weight",
        "a.bias",
        "c.weight",
        "c.bias",
    ]
    assert [entry.ours for entry in (*linear("a", "b", False), *norm("c", "d", False))] == [
        "b/kernel",
        "d/scale",
    ]
