"""Successive halving: many candidates get a little training, the better ones the rest.

Jamieson and Talwalkar, 2016, arXiv 1502.07943.

    found = successive_halving([1e-4, 3e-4, 1e-3], stops=(50, 100), advance=train_to, score=dev_accuracy)
    found.best, found.rungs

Candidates go on from where they stood, so nothing is trained twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ... import InputError

Candidate = TypeVar("Candidate")
State = TypeVar("State")
Score = tuple[float, ...]


@dataclass(frozen=True)
class Rung(Generic[Candidate]):
    """What each candidate that came so far scored at step `stop`; larger is better."""

    stop: int
    scores: dict[Candidate, Score]


@dataclass(frozen=True)
class Found(Generic[Candidate]):
    """The best candidate of the last rung, and all rungs."""

    best: Candidate
    rungs: tuple[Rung[Candidate], ...]


def successive_halving(
    candidates: Sequence[Candidate],
    *,
    stops: Sequence[int],
    advance: Callable[[Candidate, State | None, int, int], State],
    score: Callable[[State], Score],
    keep: float = 0.5,
) -> Found[Candidate]:
    """Train every candidate to `stops[0]`, the best `keep` of them (at least one) to `stops[1]`, and so on.

    `advance(candidate, state, start, stop)` trains from its `state` (None: from the beginning) and returns
    the new one; `score(state)` are numbers compared in order, larger is better; one that is not finite loses.
    Of equal scores the earlier candidate wins. Where none is finite the best is not either.
    """
    _check(candidates, stops, keep)
    states: dict[Candidate, State | None] = dict.fromkeys(candidates)
    rungs: list[Rung[Candidate]] = []
    start = 0
    for stop in stops:
        scores: dict[Candidate, Score] = {}
        for candidate in states:
            state = advance(candidate, states[candidate], start, stop)
            states[candidate], scores[candidate] = state, score(state)
        rungs.append(Rung(stop, scores))
        ranked = sorted(scores, key=lambda each: _ranked(scores[each]), reverse=True)
        kept = ranked[: max(1, math.ceil(len(ranked) * keep))]
        states = {candidate: states[candidate] for candidate in states if candidate in kept}
        start = stop
    return Found(ranked[0], tuple(rungs))


def _ranked(score: Score) -> Score:
    return score if all(map(math.isfinite, score)) else (-math.inf,)


def _check(candidates: Sequence[object], stops: Sequence[int], keep: float) -> None:
    if not candidates or len(set(candidates)) != len(candidates):
        raise InputError(f"successive halving needs different candidates, at least one, not {candidates}")
    if not stops or list(stops) != sorted(set(stops)) or stops[0] < 1:
        raise InputError(f"successive halving: stops={list(stops)} must be steps that grow, from 1 on")
    if not 0.0 < keep < 1.0:
        raise InputError(f"successive halving: keep={keep} must be above 0 and below 1")
