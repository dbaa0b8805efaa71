"""Experts made of one function's neurons are found, those of chance are not."""

import numpy as np
import pytest
from scipy.stats import hypergeom

from modicum import InputError
from modicum.research.neurons.modules import (
    densest,
    enrichment,
    expert_counts,
    expert_means,
    modularity,
    of_function,
    random_experts,
    stability,
)
from modicum.research.neurons.specialisation import average_precision, ranked_predictivity, specialisation

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


def test_experts_of_a_function_are_perturbed_beside_as_many_others():
    chosen = np.zeros(EXPERTS.shape, bool)
    chosen[0, 24:32] = chosen[1, 180:] = True
    chosen[:, [0, 100]] = True
    found = densest(chosen, EXPERTS, 1)
    assert np.flatnonzero(found[0]).tolist() == list(range(24, 36)) and found[1, 180:].all()
    others = random_experts(EXPERTS, 3, 0)
    assert (found.sum(1) == 12).all() and (others.sum(1) == 36).all()
    assert all(each.all() or not each.any() for each in others.reshape(2, 16, 12).reshape(32, 12))
    assert (others != random_experts(EXPERTS, 3, 1)).any()
    with pytest.raises(InputError, match="17 experts of 16"):
        densest(chosen, EXPERTS, 17)


def test_experts_without_neurons_are_not_chosen():
    """Two layers of four and of two experts, the second's numbered 1 and 3."""
    ragged = np.stack([np.arange(8) // 2, np.arange(8) // 4 * 2 + 1])
    chosen = np.zeros(ragged.shape, bool)
    chosen[:, 6:] = True
    assert densest(chosen, ragged, 2).sum(1).tolist() == [4, 8]
    for seed in range(20):
        assert random_experts(ragged, 1, seed).sum(1).tolist() == [2, 4]
    for choose in (
        lambda count: densest(chosen, ragged, count),
        lambda count: random_experts(ragged, count, 0),
    ):
        with pytest.raises(InputError, match="3 experts of 2; at least one and at most all"):
            choose(3)


def test_a_function_has_experts_where_several_of_its_parts_do():
    functional = np.zeros((3, 2, 16), bool)
    functional[:, 0, 4] = functional[0, 1, 7] = True
    p = of_function(functional, 0.01)
    assert p[0, 4] == pytest.approx(0.01**3) and p[1, 7] == pytest.approx(1 - 0.99**3) and p[0, 0] == 1
    with pytest.raises(InputError, match="must be"):
        of_function(functional[0])


def test_experts_that_settle_before_their_neurons_are_seen_to():
    """Each expert has a level that stays; within it neurons are drawn anew at each checkpoint."""
    numbers = np.random.default_rng(0)
    level = numbers.permutation(16)[EXPERTS]
    checkpoints = [level + 20 * numbers.normal(size=EXPERTS.shape) for _ in range(3)]
    assert expert_means(level, EXPERTS)[0].tolist() == level[0, ::12].tolist()
    scattered = numbers.permuted(EXPERTS, axis=1)
    own, neurons, control = (stability(checkpoints, each) for each in (EXPERTS, None, scattered))
    assert own.mean() > 0.2 + max(neurons.mean(), control.mean())


def test_average_precision_is_the_definition_and_ties_have_no_order():
    values, marks = np.asarray([0.9, 0.8, 0.7, 0.6]), np.asarray([1, 0, 1, 0], bool)
    assert average_precision(values, marks) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.ones(4), marks) == pytest.approx(0.5)
    tied = np.asarray([2, 1, 1, 0.0])
    for order in ([0, 1, 2, 3], [0, 2, 1, 3]):
        assert average_precision(tied[order], marks[order]) == pytest.approx((1 + 2 / 3) / 2)
    assert ranked_predictivity(-values, marks) == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(InputError, match="both kinds are needed"):
        average_precision(values, np.ones(4, bool))


def test_specialised_neurons_are_found_where_they_are():
    numbers = np.random.default_rng(0)
    marks = numbers.random((3, 120)) < 0.4
    values = numbers.normal(size=(120, 2, 50))
    values[:, 1, 7] += 8 * marks[0]
    values[:, 1, 9] -= 8 * marks[1]
    found = specialisation({f"f{i}": ranked_predictivity(values, each) for i, each in enumerate(marks)})
    assert found.best.shape == (3, 2) and found.alike.shape == (2, 3, 3)
    assert found.best[:2, 1].min() > 0.99 and max(found.best[2].max(), found.best[:, 0].max()) < 0.85
    assert ranked_predictivity(values, marks[0])[1].argmax() == 7
    assert abs(found.alike[0] - np.eye(3)).max() < 0.5
    with pytest.raises(InputError, match="one function or more"):
        specialisation({})
