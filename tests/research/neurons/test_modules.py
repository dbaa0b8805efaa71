"""Experts made of one function's neurons are found, those of chance are not."""

import numpy as np
import pytest
from scipy.stats import hypergeom

from modicum import InputError
from modicum.research.neurons.modules import enrichment, expert_counts, modularity, stability

EXPERTS = np.repeat(np.arange(16), 12)[None].repeat(2, 0)  # two layers of 16 experts of 12 neurons


def test_counts_and_p_values_are_the_definitions():
    chosen = np.zeros(EXPERTS.shape, bool)
    chosen[0, [0, 1, 2, 13]] = True
    counts, sizes = expert_counts(chosen, EXPERTS)
    assert counts[0, :2].tolist() == [3, 1] and not counts[1].any() and (sizes == 12).all()
    p = enrichment(chosen, EXPERTS)
    expected = sum(hypergeom.pmf(k, 192, 4, 12) for k in (3, 4))
    assert p[0, 0] == pytest.approx(expected) and p[0, 5] == 1 and (p[1] == 1).all()


def test_a_planted_module_is_found_and_shuffled_ones_are_not():
    chosen = np.zeros(EXPERTS.shape, bool)
    chosen[0, 24:32] = True  # eight of ten neurons in expert 2 of layer 0
    chosen[0, [0, 100]] = True
    chosen[1, ::20] = True  # spread over layer 1
    found = modularity(chosen, EXPERTS)
    assert np.argwhere(found.functional).tolist() == [[0, 2]] and found.share == 1 / 32
    assert found.together > 3 * found.random and found.p == pytest.approx(1 / 201)
    numbers = np.random.default_rng(0)
    chance = [modularity(numbers.permuted(chosen, axis=1), EXPERTS, draws=60) for _ in range(10)]
    assert sum(each.functional.sum() for each in chance) <= 1
    assert 0.2 < np.mean([each.p for each in chance]) < 0.8


def test_predictivities_that_settle_are_seen_to():
    numbers = np.random.default_rng(0)
    final = numbers.random((3, 300))
    noise = [1.0, 0.3, 0.01, 0.0]
    found = stability([final + scale * numbers.normal(size=final.shape) for scale in noise])
    assert found.shape == (3, 3)
    assert (np.diff(found, axis=0) > 0).all() and (found[-1] > 0.99).all()


def test_what_says_nothing_is_refused():
    with pytest.raises(InputError, match="at least two chosen neurons"):
        modularity(np.zeros(EXPERTS.shape, bool), EXPERTS)
    with pytest.raises(InputError, match="must be of one shape"):
        enrichment(np.ones((2, 5), bool), EXPERTS)
    with pytest.raises(InputError, match="compares each with the next"):
        stability([np.ones((1, 3))])
