"""Dynamic programming over layers: which way each layer keeps its activations, under a memory budget.

The state of Galvatron's recurrence (Miao et al., "Galvatron", 2022: F[i][v] = min over ways s of
time[i,s] + F[i-1][v - memory[i,s]]) is kept as its Pareto front: the pairs (memory, time) that no other
pair beats in both. The front answers every budget at once, which makes the answer monotone in the budget,
and needs no division of memory into slots: it is exact until it has more than `LIMIT` points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LIMIT = (
    4096  # points of a front; beyond, only the fastest of each of so many equal parts of the memory is kept
)


class Option(NamedTuple):
    """One way to compute a layer: what it keeps and how much longer it takes."""

    name: str
    memory: float
    time: float


@dataclass(frozen=True)
class Frontier:
    """The pairs (memory, time) worth having, by rising memory and falling time, and how each came about."""

    memory: np.ndarray
    time: np.ndarray
    steps: tuple[
        tuple[np.ndarray, np.ndarray], ...
    ]  # for each layer: point of the front before, option taken
    options: tuple[tuple[Option, ...], ...]

    @property
    def least(self) -> float:
        """The memory below which nothing is possible."""
        return float(self.memory[0])

    def best(self, budget: float) -> int | None:
        """The fastest point within the budget, None where there is none."""
        index = int(np.searchsorted(self.memory, budget, side="right")) - 1
        return index if index >= 0 else None

    def choices(self, index: int) -> tuple[str, ...]:
        """The option of every layer at a point."""
        names = []
        for (parents, taken), options in zip(reversed(self.steps), reversed(self.options)):
            names.append(options[taken[index]].name)
            index = int(parents[index])
        return tuple(reversed(names))


def frontier(layers: Sequence[Sequence[Option]]) -> Frontier:
    """The front over all layers, given each layer's options; both costs add up over layers."""
    memory, time = np.zeros(1), np.zeros(1)
    most = sum(max(option.memory for option in options) for options in layers)
    steps = []
    for options in layers:
        all_memory = (memory[:, None] + np.array([option.memory for option in options])).ravel()
        all_time = (time[:, None] + np.array([option.time for option in options])).ravel()
        kept = _undominated(all_memory, all_time, most / LIMIT)
        memory, time = all_memory[kept], all_time[kept]
        steps.append((kept // len(options), kept % len(options)))
    return Frontier(memory, time, tuple(steps), tuple(tuple(options) for options in layers))


def _undominated(memory: np.ndarray, time: np.ndarray, part: float) -> np.ndarray:
    """Indices of the points that none beats, by rising memory; thinned where they are too many."""
    order = np.lexsort((time, memory))
    before = np.concatenate([[np.inf], np.minimum.accumulate(time[order])[:-1]])
    order = order[time[order] < before]
    if len(order) <= LIMIT or part == 0:
        return order
    parts = np.floor(memory[order] / part)
    last_of_its_part = np.concatenate([parts[1:] != parts[:-1], [True]])
    last_of_its_part[0] = True  # the least memory must stay possible
    return order[last_of_its_part]
