"""The dynamic programme over layers is exact, monotone in the budget, and thins without losing
feasibility.
"""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.parallel.plan import Option, dynamic, frontier

OPTIONS = st.builds(
    Option,
    st.sampled_from(["none", "dots", "full"]),
    st.integers(0, 20).map(float),
    st.integers(0, 20).map(float),
)
LAYERS = st.lists(st.lists(OPTIONS, min_size=1, max_size=3), min_size=1, max_size=6)


def brute_force(layers, budget):
    """The least time over every combination within the budget."""
    sums = [(sum(o.memory for o in one), sum(o.time for o in one)) for one in itertools.product(*layers)]
    return min((time for memory, time in sums if memory <= budget), default=None)


@settings(max_examples=150, deadline=None)
@given(LAYERS, st.integers(0, 120))
def test_it_equals_brute_force(layers, budget):
    front = frontier(layers)
    point = front.best(budget)
    expected = brute_force(layers, budget)
    assert (None if point is None else front.time[point]) == expected


@settings(max_examples=100, deadline=None)
@given(LAYERS, st.lists(st.integers(0, 120), min_size=2, max_size=5))
def test_more_memory_is_never_slower(layers, budgets):
    front = frontier(layers)
    times = [np.inf if (point := front.best(b)) is None else front.time[point] for b in sorted(budgets)]
    assert times == sorted(times, reverse=True)


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.integers(0, 120))
def test_the_choices_cost_what_the_point_says(layers, budget):
    layers = [[Option(f"{i}", o.memory, o.time) for i, o in enumerate(options)] for options in layers]
    front = frontier(layers)
    point = front.best(budget)
    if point is not None:
        chosen = [options[int(name)] for options, name in zip(layers, front.choices(point))]
        assert sum(o.memory for o in chosen) == front.memory[point] <= budget
        assert sum(o.time for o in chosen) == front.time[point]


def test_a_thinned_front_keeps_both_ends(monkeypatch):
    monkeypatch.setattr(dynamic, "LIMIT", 16)
    rng = np.random.default_rng(0)
    layers = [[Option(n, *rng.random(2)) for n in "abc"] for _ in range(12)]
    front = frontier(layers)
    assert len(front.memory) <= 3 * 16
    assert np.isclose(front.least, sum(min(o.memory for o in options) for options in layers))
    assert np.isclose(front.time[-1], sum(min(o.time for o in options) for options in layers))


def test_identical_layers_recompute_only_as_many_as_needed():
    options = [Option("none", 10.0, 0.0), Option("full", 1.0, 3.0)]
    front = frontier([options] * 8)
    assert sorted(front.choices(front.best(8 * 10.0 - 9))) == ["full"] + ["none"] * 7
