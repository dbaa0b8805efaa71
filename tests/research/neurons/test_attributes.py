"""Neurons made to know an attribute are ranked first, groups that are there are found; neither by chance."""

import numpy as np
import pytest

from modicum import InputError
from modicum.research.neurons import select
from modicum.research.neurons.attributes import attribute_scores, membership
from modicum.research.neurons.clusters import adjusted_rand, clusters, recovered

GROUPS = np.asarray(["joy"] * 8 + ["anger"] * 6 + ["fear"] * 4)


def states(seed, strength):
    """`[18, 2, 40]`, of which neurons 3 and 17 of layer 1 know whether something is joy."""
    drawn = np.random.default_rng(seed).normal(size=(len(GROUPS), 2, 40))
    drawn[:, 1, [3, 17]] += strength * np.asarray([[1, -1]]) * membership(GROUPS, "joy")[:, None]
    return drawn


def test_neurons_of_an_attribute_are_ranked_first_and_others_are_not():
    ratings = membership(GROUPS, "joy")
    scores = attribute_scores(states(0, 6.0), ratings)
    assert scores.shape == (2, 40) and set(np.argsort(-scores[1])[:2]) == {3, 17}
    assert scores[1, [3, 17]].min() > 0.7 > 0.5 > scores[0].max()
    found = select(scores[None], 0.05)
    assert np.flatnonzero(found[1]).tolist() == [3, 17] and found[0].sum() == 2
    a, b = np.triu_indices(len(GROUPS), 1)
    one = states(0, 6.0)[:, 1, 3]
    assert scores[1, 3] == pytest.approx(
        np.corrcoef(abs(one[a] - one[b]), abs(ratings[a] - ratings[b]))[0, 1]
    )
    shuffled = attribute_scores(states(0, 6.0), np.random.default_rng(1).permutation(ratings))
    assert shuffled[1, [3, 17]].max() < 0.3


def test_things_without_a_rating_are_left_out_and_constant_neurons_say_nothing():
    ratings = np.where(GROUPS == "fear", np.nan, membership(GROUPS, "joy"))
    drawn = states(2, 5.0)
    drawn[:, 0, 0] = 1.5
    scores = attribute_scores(drawn, ratings)
    kept = GROUPS != "fear"
    np.testing.assert_allclose(scores, attribute_scores(drawn[kept], ratings[kept]))
    assert scores[0, 0] == 0 and np.isfinite(scores).all()
    for given in (np.ones(18), np.r_[np.zeros(3), np.full(15, np.nan)]):
        with pytest.raises(InputError, match="at least four things and two ratings"):
            attribute_scores(drawn, given)
    with pytest.raises(InputError, match="as many things as ratings 3"):
        attribute_scores(drawn, np.ones(3))
    with pytest.raises(InputError, match="no thing is in group 'awe'; the groups are anger, fear, joy"):
        membership(GROUPS, "awe")


def test_groups_that_are_there_are_recovered_and_others_are_not():
    draw = np.random.default_rng(0)
    centre = {group: draw.normal(size=30) for group in sorted(set(GROUPS))}
    points = np.stack([centre[group] for group in GROUPS]) + 0.3 * draw.normal(size=(18, 30))
    similarity = np.corrcoef(points)
    assert adjusted_rand(clusters(similarity, 3).tolist(), GROUPS.tolist()) == 1
    assert recovered(similarity, GROUPS, 200) == (1, pytest.approx(1 / 201))
    chance = [recovered(np.corrcoef(draw.normal(size=(18, 30))), GROUPS, 60, seed) for seed in range(8)]
    assert 0.2 < np.mean([each.p for each in chance]) < 0.8
    assert abs(np.mean([each.rand for each in chance])) < 0.15


def test_the_adjusted_rand_index_is_the_published_one():
    """Worked by hand: the contingency table ((2, 1), (0, 3)) of six things."""
    both, rows, columns, all_pairs = 1 + 3, 3 + 3, 1 + 6, 15
    expected = rows * columns / all_pairs
    wanted = (both - expected) / ((rows + columns) / 2 - expected)
    assert adjusted_rand(list("aaabbb"), list("xxyyyy")) == pytest.approx(wanted)
    assert adjusted_rand(list("aab"), list("yyx")) == 1 and adjusted_rand([1, 1], [2, 2]) == 1
    with pytest.raises(InputError, match="clusters need"):
        clusters(np.ones((1, 1)), 2)
