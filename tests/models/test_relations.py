"""Positions of CPM and ChatGLM, and the extended head, against formulas written here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    FP64,
    ExtendedHead,
    ExtraWords,
    GatedMLP,
    RMSNorm,
    Rotary2D,
    SegmentPositions,
    SegmentRelations,
    Transformer,
    TransformerConfig,
    TreePositions,
    TreeRelations,
    multi_head,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 20, (2, 9))


@pytest.mark.parametrize("half", [False, True])
def test_two_dimensional_rotation_is_a_rotation_of_complex_pairs(x64, half):
    x, positions = RNG.normal(size=(1, 5, 2, 16)), RNG.integers(0, 2000, (1, 5, 2))
    found = Rotary2D(half_frequencies=half).rotate(jnp.asarray(x), jnp.asarray(positions))
    frequencies = 10_000.0 ** -(np.arange(4) / 4)
    frequencies = frequencies.astype(np.float16).astype(float) if half else frequencies
    for part, start in enumerate((0, 8)):
        pairs = x[..., start : start + 4] + 1j * x[..., start + 4 : start + 8]
        turned = pairs * np.exp(1j * positions[..., part, None, None] * frequencies)
        wanted = np.concatenate([turned.real, turned.imag], -1)
        np.testing.assert_allclose(found[..., start : start + 8], wanted, atol=1e-12)


def test_plain_positions_are_those_of_given_text():
    x, choice = jnp.asarray(RNG.normal(size=(2, 9, 2, 8))), Rotary2D()
    plain = jnp.arange(9)[None].repeat(2, 0)
    pairs = jnp.stack([plain, jnp.zeros_like(plain)], -1)
    np.testing.assert_array_equal(choice.rotate(x, plain), choice.rotate(x, pairs))
    with pytest.raises(InputError, match="head width 6 must be a multiple of 4"):
        choice.rotate(x[..., :6], plain)


def test_positions_advance():
    """A block goes on where it stands, indices in their segment; a new word is the first of its name."""
    np.testing.assert_array_equal(Rotary2D().advance(jnp.array([[[3, 0], [3, 4]]])), [[[3, 5]]])
    ant = SegmentRelations().advance(SegmentPositions(jnp.array([[0, 1]]), jnp.array([[0, 2]])))
    assert (ant.index.tolist(), ant.segment.tolist()) == ([[2]], [[2]])
    one, two = jnp.array([[5, 6]]), jnp.array([[1, 2]])
    bee = TreeRelations().advance(TreePositions(one, two, two, jnp.array([[[0, 2], [3, 0]]]), two))
    assert [x.tolist() for x in (bee.index, bee.segment, bee.group, bee.sub)] == [[[7]], [[2]], [[2]], [[0]]]
    assert bee.relations.tolist() == [[[3, 0]]]


def small(positions):
    return TransformerConfig(
        layers=2,
        width=16,
        vocab=20,
        attention=multi_head(2, bias=False),
        mlp=GatedMLP(24, "gelu"),
        norm=RMSNorm(),
        positions=positions,
        embedding_scale=0.25,
        logit_scale=0.25,
        precision=FP64,
    )


def tree_positions(sub):
    index = jnp.broadcast_to(jnp.arange(9), (2, 9))
    segment = jnp.where(index < 4, 0, 1)
    relations = jnp.array([[0, 2], [9, 0]])[segment]
    return TreePositions(index, segment, jnp.zeros_like(index), relations, sub)


@pytest.fixture(scope="module")
def bee():
    with jax.enable_x64(True):
        model = Transformer(small(TreeRelations(8, 20, 16)), ExtendedHead())
        return model, model.init(jax.random.key(0), jnp.asarray(TOKENS))


def test_sub_zero_leaves_words_as_they_are(x64, bee):
    model, params = bee
    x = jnp.asarray(RNG.normal(size=(2, 9, 16)))
    np.testing.assert_array_equal(model.config.positions.turn(x, jnp.zeros((2, 9), int)), x)
    turned = model.config.positions.turn(x, jnp.full((2, 9), 2))
    angles = 32 * 10_000.0 ** -(np.arange(8) / 8)
    pairs = (np.asarray(x[..., :8]) + 1j * np.asarray(x[..., 8:])) * np.exp(1j * angles)
    np.testing.assert_allclose(turned, np.concatenate([pairs.real, pairs.imag], -1), atol=1e-12)
    plain = model.apply(params, TOKENS, positions=tree_positions(jnp.zeros((2, 9), int)))
    other = model.apply(params, TOKENS, positions=tree_positions(jnp.zeros((2, 9), int).at[0, 3].set(1)))
    assert (plain[1] == other[1]).all() and (plain[0, 3:] != other[0, 3:]).any()


def test_extra_words_are_scored_by_their_turned_vectors(x64, bee):
    model, params = bee
    extra = ExtraWords(jnp.array([4, 11, 4]), jnp.array([1, 0, 3]))
    positions = tree_positions(jnp.zeros((2, 9), int))
    logits = model.apply(params, TOKENS, positions=positions, extra=extra)
    assert logits.shape == (2, 9, 23)
    np.testing.assert_array_equal(logits[..., :20], model.apply(params, TOKENS, positions=positions))
    np.testing.assert_allclose(logits[..., 21], logits[..., 11], atol=1e-12)  # both scales are 1 / sqrt(D)
    hidden = Transformer(model.config, None).apply(params, TOKENS, positions=positions)
    vectors = model.config.positions.turn(params["embedding"]["table"][extra.words] * 0.25, extra.sub)
    np.testing.assert_allclose(logits[..., 20:], hidden @ vectors.T, atol=1e-12)
    with pytest.raises(InputError, match="extended head needs positions=TreeRelations"):
        Transformer(small(SegmentRelations()), ExtendedHead()).init(jax.random.key(0), TOKENS)


def test_kinds_of_segments_have_vectors_and_rows_of_the_bias(x64):
    """All in one segment is an index; another kind adds its vector, and the distance no longer counts."""
    model = Transformer(small(SegmentRelations(4, 8, 16, scale=0.25)), None)
    params = model.init(jax.random.key(0), jnp.asarray(TOKENS))
    assert params["type_embedding"]["table"].shape == (4, 16)
    assert params["relative_bias"]["table"].shape == (8 + 16, 2)
    index = jnp.broadcast_to(jnp.arange(9), (2, 9))
    given = SegmentPositions(index, jnp.zeros_like(index))
    np.testing.assert_array_equal(model.apply(params, TOKENS), model.apply(params, TOKENS, positions=given))
    kinds = jnp.where(index < 4, 1, 3)
    apart = model.apply(params, TOKENS, positions=SegmentPositions(index, kinds))
    further = SegmentPositions(jnp.where(index < 4, index, index + 7), kinds)
    np.testing.assert_allclose(model.apply(params, TOKENS, positions=further), apart, atol=1e-12)
