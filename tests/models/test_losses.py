"""Losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.models.losses import MASKED_LOGIT, cross_entropy, weighted_correct, weighted_cross_entropy

LOGITS = np.random.default_rng(0).normal(size=(2, 3, 5))
TARGETS = np.asarray([[0, 4, 2], [1, 1, 3]])
WEIGHTS = np.asarray([[1.0, 0.0, 0.5], [1.0, 1.0, 0.0]])


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_with_smoothed_targets(smoothing, x64):
    target = (1 - smoothing) * np.eye(5)[TARGETS] + smoothing / 5
    expected = -(target * log_softmax(LOGITS)).sum(-1)
    np.testing.assert_allclose(cross_entropy(LOGITS, TARGETS, smoothing), expected, rtol=1e-13)


def test_smoothing_spreads_over_the_words_there_are(x64):
    padded = np.concatenate([LOGITS, np.full((2, 3, 3), MASKED_LOGIT)], -1)
    for smoothing in (0.0, 0.1):
        value, gradient = jax.value_and_grad(lambda x, s=smoothing: cross_entropy(x, TARGETS, s).sum())(
            padded
        )
        np.testing.assert_allclose(value, cross_entropy(LOGITS, TARGETS, smoothing).sum(), rtol=1e-13)
        assert not np.asarray(gradient)[..., 5:].any()


def test_large_logits_do_not_overflow():
    logits = jnp.asarray([[1e4, 0.0], [-1e4, 1e4]])
    np.testing.assert_allclose(cross_entropy(logits, jnp.asarray([0, 0])), [0, 2e4])


def test_sums_are_weighted(x64):
    total, weight = weighted_cross_entropy(LOGITS, TARGETS, WEIGHTS)
    np.testing.assert_allclose(total, (cross_entropy(LOGITS, TARGETS) * WEIGHTS).sum(), rtol=1e-14)
    assert weight == 3.5
    correct = weighted_correct(LOGITS, LOGITS.argmax(-1), WEIGHTS)
    assert correct == 3.5


def test_correct_is_what_argmax_says_with_ties_too():
    logits = np.random.default_rng(1).integers(0, 3, (40, 5)).astype(np.float32)
    logits[0], logits[1] = 0.0, np.nan
    for target in range(5):
        targets = np.full(40, target)
        hits = weighted_correct(jnp.asarray(logits[2:]), targets[2:], jnp.ones(38))
        assert hits == (logits[2:].argmax(-1) == target).sum()
        assert weighted_correct(jnp.asarray(logits[:1]), targets[:1], jnp.ones(1)) == (target == 0)
        assert weighted_correct(jnp.asarray(logits[1:2]), targets[:1], jnp.ones(1)) == 0
