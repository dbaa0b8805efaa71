"""Each processor against its definition in plain NumPy, and what a sample depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models.generation import GREEDY, Sampling
from modicum.models.generation.sampling import (
    draw,
    forbid,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    restrict,
)

LOGITS = np.random.default_rng(0).normal(0, 3, (5, 60)).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("k", [1, 2, 17, 59, 60, 1000])
def test_top_k_keeps_the_k_largest(k):
    got = np.asarray(jax.jit(keep_top_k)(LOGITS, k))
    for row, out in zip(LOGITS, got):
        kept = set(sorted(range(60), key=lambda i: -row[i])[:k])
        assert set(np.flatnonzero(np.isfinite(out))) == kept
        np.testing.assert_array_equal(out[sorted(kept)], row[sorted(kept)])


def test_top_k_keeps_all_that_tie_with_the_kth():
    got = np.asarray(keep_top_k(jnp.asarray([[1.0, 2.0, 2.0, 0.0, 2.0]]), 2))
    np.testing.assert_array_equal(np.isfinite(got), [[False, True, True, False, True]])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    got = np.asarray(jax.jit(keep_top_p)(LOGITS, p))
    for row, out in zip(LOGITS, got):
        probabilities, kept, total = softmax(row.astype(np.float64)), set(), 0.0
        for index in sorted(range(60), key=lambda i: -row[i]):
            if total >= p:
                break
            kept.add(index)
            total += probabilities[index]
        assert set(np.flatnonzero(np.isfinite(out))) == kept


def test_top_p_keeps_all_that_tie_with_the_last_it_needs():
    got = np.asarray(keep_top_p(jnp.asarray([[0.0, 0.0, 1.0, -1.0], [5.0, 0.0, -0.0, 0.0]]), 0.6))
    assert np.isfinite(got).tolist() == [[True, True, True, False], [True, False, False, False]]


def test_thresholds_hold_for_extreme_logits():
    """Infinities, zeros of both signs and huge numbers are ordered as floats are."""
    row = np.asarray([[-np.inf, -3e38, -1.0, -0.0, 0.0, 1e-30, 2.0, 3e38]], np.float32)
    for k in range(1, 9):
        kept = np.isfinite(np.asarray(keep_top_k(jnp.asarray(row), k)))[0]
        assert kept.tolist() == (np.isfinite(row[0]) & (row[0] >= np.sort(row[0])[-k])).tolist()


@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p_is_relative_to_the_most_probable(p):
    got = np.asarray(jax.jit(keep_min_p)(LOGITS, p))
    for row, out in zip(LOGITS, got):
        probabilities = softmax(row)
        np.testing.assert_array_equal(np.isfinite(out), probabilities >= p * probabilities.max())


def test_repetition_makes_seen_tokens_less_likely_whatever_their_sign():
    seen = np.zeros_like(LOGITS, bool)
    seen[0, [3, 7]] = seen[2, 9] = True
    got = np.asarray(penalise_repetition(jnp.asarray(LOGITS), jnp.asarray(seen), 1.5))
    expected = LOGITS.copy()
    for row, column in zip(*np.nonzero(seen)):
        value = expected[row, column]
        expected[row, column] = value * np.float32(1.5) if value < 0 else value / np.float32(1.5)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert (got[seen] < LOGITS[seen]).all()


def test_forbidden_tokens_are_forbidden_only_while_that_acts():
    tokens = jnp.asarray([4, -1, 77])
    got = np.asarray(forbid(jnp.asarray(LOGITS), tokens, jnp.asarray(True)))
    assert np.isneginf(got[:, 4]).all() and np.isfinite(np.delete(got, 4, 1)).all()
    np.testing.assert_array_equal(forbid(jnp.asarray(LOGITS), tokens, jnp.asarray(False)), LOGITS)


def test_the_processors_act_in_order():
    """Top-p counts the probabilities that temperature and top-k have left."""
    row = np.log(np.asarray([0.4, 0.3, 0.2, 0.1], np.float32))[None]
    numbers = Sampling(temperature=0.5, top_k=2, top_p=0.6).numbers()
    got = np.asarray(restrict(jnp.asarray(row), numbers))
    assert np.isfinite(got).tolist() == [[True, False, False, False]]  # 0.16 / 0.25 = 0.64 suffices
    numbers = Sampling(temperature=0.5, top_k=2, top_p=0.65).numbers()
    assert np.isfinite(np.asarray(restrict(jnp.asarray(row), numbers))).tolist() == [
        [True, True, False, False]
    ]


def test_only_active_processors_are_part_of_the_program():
    assert GREEDY.numbers() == {}
    assert set(Sampling().numbers()) == {"temperature"}
    assert set(Sampling(0.0, 5, 0.5, 0.1, 1.2).numbers()) == {"repetition_penalty"}
    assert len(Sampling(0.7, 5, 0.5, 0.1, 1.2).numbers()) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1e-39},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
    ],
)
def test_impossible_numbers_are_refused(options):
    with pytest.raises(InputError, match=min(options)):
        Sampling(**options)


def test_samples_have_the_probabilities_of_the_softmax():
    logits = jnp.tile(jnp.asarray([[0.0, 1.0, 2.0, -1.0]]), (20_000, 1))
    keys = jax.random.split(jax.random.key(3), 20_000)
    numbers = Sampling(temperature=2.0).numbers()
    counts = np.bincount(np.asarray(draw(logits, numbers, keys, jnp.int32(0))), minlength=4)
    np.testing.assert_allclose(counts / 20_000, softmax(np.asarray([0, 0.5, 1, -0.5])), atol=0.015)


def test_a_rows_sample_depends_on_its_key_and_step_only():
    numbers = Sampling(temperature=1.0).numbers()
    keys = jax.random.split(jax.random.key(0), 5)
    logits = jnp.asarray(LOGITS) * 0.1
    steps = [draw(logits, numbers, keys, jnp.int32(step)) for step in range(8)]
    alone = [draw(logits[2:3], numbers, keys[2:3], jnp.int32(step)) for step in range(8)]
    assert [int(step[2]) for step in steps] == [int(step[0]) for step in alone]
    assert len({int(step[2]) for step in steps}) > 2
