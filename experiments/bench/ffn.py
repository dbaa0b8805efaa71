"""Time dense and sparse feed-forward stacks in turn, in one process: ratios are of the same moments."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from ... import InputError
from ...models.kernels.sparse import SparseRequest, implementations
from .ffn_job import JOBS, FeedForwardStack, Run

DENSE = "dense"
Key = tuple[str, int, float, str]  # job, batch, share, contender; the dense layer's share is 1


@dataclass(frozen=True)
class Seen:
    """Seconds of every turn by job, batch, share and contender, and the machine's load before and after."""

    times: dict[Key, list[float]] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)

    def milliseconds(self, key: Key) -> float:
        """Median."""
        return 1e3 * float(np.median(self.times[key]))

    def gain(self, key: Key) -> tuple[float, float, float]:
        """How many times faster than the dense layer of the same turn: median and quartiles."""
        dense = np.asarray(self.times[key[0], key[1], 1.0, DENSE])
        ratios = dense / np.asarray(self.times[key])
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        return float(middle), float(low), float(high)


def measure_feed_forward(
    *,
    jobs: Sequence[str],
    shares: Sequence[float],
    batches: Sequence[int],
    contenders: Sequence[str],
    rounds: int,
    report: Callable[[str], None] = print,
) -> Seen:
    """All contenders of a job and batch take turns, `rounds` times, after one call that warms up.

    Without `contenders` all take part that can on this machine. Raises `InputError` for names that are not
    known and counts below 1.
    """
    contenders = contenders or [each.name for each in implementations() if each.supports(asked()) is None]
    _check(jobs, shares, batches, contenders, rounds)
    seen = Seen(load=[os.getloadavg()[0]])
    for name in jobs:
        stack = FeedForwardStack(JOBS[name])
        for batch in batches:
            report(f"{name}, batch {batch}")
            runs: dict[Key, Run] = {(name, batch, 1.0, DENSE): stack.prepare(DENSE, batch, 1.0)}
            for share in shares:
                for impl in contenders:
                    runs[name, batch, share, impl] = stack.prepare(impl, batch, share)
            take_turns(runs, rounds, seen.times)
    seen.load.append(os.getloadavg()[0])
    return seen


def asked() -> SparseRequest:
    """What all jobs ask for, but for their sizes."""
    return SparseRequest(jax.default_backend(), 1, 128, 13, 32, 1024, "float32", False, "relu")


def take_turns(runs: Mapping[Key, Run], rounds: int, times: dict[Key, list[float]]) -> None:
    """Call each in turn, so often, and note the seconds."""
    for _ in range(rounds):
        for key, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.setdefault(key, []).append(time.perf_counter() - start)


def _check(
    jobs: Sequence[str],
    shares: Sequence[float],
    batches: Sequence[int],
    contenders: Sequence[str],
    rounds: int,
) -> None:
    known = ["auto", *(each.name for each in implementations())]
    for what, given, valid in (("widths", jobs, list(JOBS)), ("contenders", contenders, known)):
        if unknown := [each for each in given if each not in valid]:
            raise InputError(f"{what}: {unknown[0]!r} is unknown; valid: {', '.join(valid)}")
    if rounds < 1 or min(batches, default=0) < 1:
        raise InputError(f"rounds={rounds} and batches={tuple(batches)} must be at least 1")
    if not shares or not all(0 < share <= 1 for share in shares):
        raise InputError(f"shares={tuple(shares)} must be above 0 and at most 1")
