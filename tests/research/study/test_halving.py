"""Successive halving: who goes on, from where, and who wins."""

import math

import pytest

from modicum import InputError
from modicum.research.study.halving import successive_halving


def scored(value):
    return value if isinstance(value, tuple) else (value,)


def run(quality, stops=(2, 4, 8), **options):
    calls = []

    def advance(candidate, state, start, stop):
        assert (0 if state is None else state[1]) == start  # goes on from where it stood
        calls.append((candidate, start, stop))
        return candidate, stop

    found = successive_halving(
        list(quality), stops=stops, advance=advance, score=lambda state: scored(quality[state[0]]), **options
    )
    return found, calls


def test_the_better_half_goes_on_and_nothing_is_trained_twice():
    found, calls = run({"a": 1.0, "b": 4.0, "c": 3.0, "d": 2.0, "e": 5.0})
    assert found.best == "e"
    assert [sorted(rung.scores) for rung in found.rungs] == [list("abcde"), list("bce"), list("be")]
    assert calls[:5] == [(name, 0, 2) for name in "abcde"]
    assert sum(stop - start for _, start, stop in calls) == 5 * 2 + 3 * 2 + 2 * 4


def test_ties_go_to_the_earlier_and_numbers_are_compared_in_order():
    assert run({"a": 1.0, "b": 1.0})[0].best == "a"
    assert run({"a": (1.0, -0.5), "b": (1.0, -0.2)})[0].best == "b"


def test_what_is_not_finite_loses():
    assert run({"a": math.nan, "b": -3.0, "c": math.inf})[0].best == "b"


def test_without_a_finite_score_the_scores_tell():
    found, _ = run({"a": math.nan, "b": -math.inf})
    assert not math.isfinite(found.rungs[-1].scores[found.best][0])


def test_one_candidate_is_trained_to_the_end():
    found, calls = run({3e-4: 0.5})
    assert found.best == 3e-4 and [stop for *_, stop in calls] == [2, 4, 8]


@pytest.mark.parametrize(
    ("quality", "options", "words"),
    [
        ({}, {}, "at least one"),
        ({"a": 1.0}, {"stops": (4, 2)}, "steps that grow"),
        ({"a": 1.0}, {"stops": ()}, "steps that grow"),
        ({"a": 1.0}, {"keep": 1.0}, "keep=1.0"),
    ],
)
def test_what_cannot_be_is_refused(quality, options, words):
    with pytest.raises(InputError, match=words):
        run(quality, **options)
