"""The chain's schedule is right, holds what it says it holds, and is never worse than sqrt(L)
checkpointing.
"""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum import InputError
from modicum.parallel.plan import Chain


def uniform(count, budget, whole=4):
    return Chain([1.0] * count, [2.0] * count, [1] * (count + 1), [whole] * count, budget)


def sqrt_checkpointing(count, whole=4):
    """Memory and time: inputs of segments of sqrt(L) layers kept, each segment but the last recomputed
    once.
    """
    segment = math.isqrt(count)
    memory = (count // segment - 1) + segment * whole + 1
    return memory, 3.0 * count + (count - segment)


@pytest.mark.parametrize("count", [4, 9, 16, 25])
def test_it_is_never_worse_than_sqrt_checkpointing(count):
    memory, time = sqrt_checkpointing(count)
    assert uniform(count, memory).makespan <= time


def test_it_is_better_where_recomputing_twice_pays():
    """With less memory than sqrt(L) checkpointing takes, there is still a schedule."""
    memory, _ = sqrt_checkpointing(16)
    assert math.isfinite(uniform(16, memory - 4).makespan)


def test_everything_is_computed_once_where_it_fits():
    assert uniform(6, 6 * 4 + 1).makespan == 18.0
    assert uniform(6, 6 * 4).makespan > 18.0


def peak_memory(chain):
    """Replays the schedule: the most memory that stored inputs, saved stages, one value on its way and the
    gradient take together, the chain's first input left out.
    """
    x, saved, kept, passing, peak = chain.sizes, set(), set(), 0, 0
    gradient = len(chain.forward)  # whose output's gradient there is
    for what, stage in chain.schedule():
        held = sum(x[i] for i in kept) + sum(chain.saved[i] for i in saved) + x[gradient]
        if what == "back":
            assert gradient == stage + 1 and stage in saved
            saved.remove(stage)
            kept.discard(stage)
            gradient, passing = stage, None
            peak = max(peak, held)
            continue
        assert stage in (0, passing) or stage in kept or stage - 1 in saved, "its input is there"
        if what != "drop" and stage == passing and stage > 0 and stage - 1 not in saved:
            held += 0 if stage in kept else x[stage]
            kept.add(stage)
        elif what == "drop":
            held += x[stage]
        held += chain.saved[stage] if what == "save" else x[stage + 1]
        peak = max(peak, held)
        passing = None if what == "save" else stage + 1
        saved |= {stage} if what == "save" else set()
    return peak


def test_saving_counts_the_gradient_of_what_is_saved():
    """Going back through stage 0 takes its 10 saved and a gradient of 10."""
    assert Chain([1, 1], [1, 1], [1, 10, 1], [10, 1], 12).makespan == math.inf
    exact = Chain([1, 1], [1, 1], [1, 10, 1], [10, 1], 20)
    assert exact.makespan == 4.0 and peak_memory(exact) == 20


COSTS = st.integers(1, 6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(COSTS, COSTS, st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=6),
    st.integers(3, 40),
)
def test_more_memory_is_never_slower_and_the_schedule_takes_the_time_it_should(stages, budget):
    forward, backward, sizes, more = (list(column) for column in zip(*stages))
    sizes = [*sizes, 1]
    saved = [sizes[i + 1] + more[i] for i in range(len(more))]
    chain = Chain([float(f) for f in forward], [float(b) for b in backward], sizes, saved, budget)
    roomier = Chain(chain.forward, chain.backward, sizes, saved, budget + 3)
    assert roomier.makespan <= chain.makespan
    if math.isfinite(chain.makespan):
        assert peak_memory(chain) <= budget
        order = chain.schedule()
        time = sum(chain.backward[i] if what == "back" else chain.forward[i] for what, i in order)
        assert time == chain.makespan
        assert [i for what, i in order if what == "back"] == list(reversed(range(len(forward))))
        for position, (what, stage) in enumerate(order):  # saved before it is needed, and not used up since
            if what == "back":
                assert ("save", stage) in order[:position]


def test_too_small_a_budget_says_so():
    with pytest.raises(InputError, match="budget of 2 is too small"):
        uniform(4, 2).schedule()
