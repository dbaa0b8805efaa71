"""Packed documents and padding change nothing of what a document alone gives."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from modicum.models import (
    FP64,
    MLP,
    ALiBi,
    Learned,
    RelativeBuckets,
    Rotary,
    Sinusoidal,
    Transformer,
    TransformerConfig,
    multi_head,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = TransformerConfig(layers=1, width=8, vocab=11, attention=multi_head(2), mlp=MLP(8), precision=FP64)
FIRST, SECOND = np.asarray([[3, 1, 4, 1]]), np.asarray([[5, 9, 2, 6]])
PACKED = np.concatenate([FIRST, SECOND, [[7, 7]]], 1)  # the last two are padding
SEGMENTS = np.asarray([[1] * 4 + [2] * 4 + [0] * 2])
PLACES = np.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 0, 0]])

POSITIONS = {
    "rotary": Rotary(),
    "learned": Learned(16),
    "sinusoidal": Sinusoidal(),
    "buckets": RelativeBuckets(8, 6),
    "alibi": ALiBi(),
}


@pytest.mark.parametrize(
    "kind, positions",
    [*(("decoder", name) for name in POSITIONS), ("encoder", "learned"), ("encoder", "buckets")],
)
def test_packed_documents_give_the_logits_of_the_documents_alone(kind, positions, random_parameters, x64):
    model = Transformer(replace(CONFIG, kind=kind, positions=POSITIONS[positions]))
    params, apply = random_parameters(model, FIRST), jax.jit(model.apply)
    packed = apply(params, PACKED, segments=SEGMENTS, positions=PLACES)
    np.testing.assert_allclose(packed[:, :4], apply(params, FIRST), rtol=0, atol=1e-12)
    np.testing.assert_allclose(packed[:, 4:8], apply(params, SECOND), rtol=0, atol=1e-12)
    assert np.isfinite(packed).all()  # padding attends to nothing; it must not make NaN of it


def test_without_segments_the_documents_would_see_each_other(random_parameters, x64):
    model = Transformer(CONFIG)
    params, apply = random_parameters(model, FIRST), jax.jit(model.apply)
    packed = apply(params, PACKED, positions=PLACES)
    assert np.abs(packed[:, 4:8] - apply(params, SECOND)).max() > 1e-3


def test_an_encoder_decoder_takes_packed_pairs(random_parameters, x64):
    """Target document i reads source document i, and nothing of the others."""
    config = replace(CONFIG, kind="encoder-decoder", positions=Learned(16))
    model, apply = Transformer(config), jax.jit(Transformer(config).apply)
    targets = np.asarray([[1, 2, 3]]), np.asarray([[8, 4, 6]])
    params = random_parameters(model, FIRST, decoder_tokens=targets[0])
    packed = apply(
        params,
        PACKED,
        segments=SEGMENTS,
        positions=PLACES,
        decoder_tokens=np.concatenate(targets, 1),
        decoder_segments=np.asarray([[1, 1, 1, 2, 2, 2]]),
        decoder_positions=np.asarray([[0, 1, 2, 0, 1, 2]]),
    )
    first = apply(params, FIRST, decoder_tokens=targets[0])
    second = apply(params, SECOND, decoder_tokens=targets[1])
    np.testing.assert_allclose(packed, np.concatenate([first, second], 1), rtol=0, atol=1e-12)


def test_what_stands_in_the_padding_changes_nothing_and_gets_no_gradient(random_parameters, x64):
    model = Transformer(replace(CONFIG, positions=Learned(16)))
    params = random_parameters(model, PACKED)

    @jax.jit
    def loss_and_gradient(tokens):
        def loss(params):
            logits = model.apply(params, tokens, segments=SEGMENTS, positions=PLACES)
            return (logits[:, :8] ** 2).sum()

        return jax.value_and_grad(loss)(params)

    other = PACKED.copy()
    other[:, 8:] = [[0, 10]]
    value, gradient = loss_and_gradient(PACKED)
    other_value, other_gradient = loss_and_gradient(other)
    np.testing.assert_allclose(other_value, value, rtol=1e-14)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), gradient, other_gradient)
