"""The optimal order of recomputation on a chain of layers, each kept whole, by its input, or not at all.

Where `dynamic` decides layer by layer, here a checkpoint may span several layers and be recomputed more
than once, so that memory can fall below one input a layer. The recurrence is rotor's (Beaumont et al.,
"Optimal checkpointing for heterogeneous chains", 2019), without its temporaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ... import InputError


@dataclass(frozen=True)
class Chain:
    """n stages with whole numbers of memory units.

    forward, backward  time of each stage, n
    sizes    memory of each stage's input and of the last output, n + 1; a gradient is as large
    saved    memory of all that a stage's backward pass needs, its output included, n
    """

    forward: Sequence[float]
    backward: Sequence[float]
    sizes: Sequence[int]
    saved: Sequence[int]
    budget: int

    def __post_init__(self) -> None:
        lengths = len(self.forward), len(self.backward), len(self.sizes) - 1, len(self.saved)
        if len(set(lengths)) > 1 or not self.forward:
            raise InputError(f"chain: {lengths} forward, backward, inputs and saved; they must be as many")

    @property
    def makespan(self) -> float:
        """Least time of one forward and backward pass within the budget; infinite where there is none.

        The budget does not count the chain's first input.
        """
        return float(self._table[0, len(self.forward) - 1][self.budget])

    @cached_property
    def _table(self) -> dict[tuple[int, int], np.ndarray]:
        """Time of stages i..l for every memory from 0 to the budget."""
        table: dict[tuple[int, int], np.ndarray] = {}
        count = len(self.forward)
        for span in range(count):
            for first in range(count - span):
                last = first + span
                table[first, last] = self._entry(table, first, last)
        return table

    def _entry(self, table: dict[tuple[int, int], np.ndarray], first: int, last: int) -> np.ndarray:
        gradient, x = self.sizes[last + 1], self.sizes
        if first == last:
            return self._from(gradient + self.saved[first], self._both(first))
        best = _after(self.saved[first], table[first + 1, last]) + table[first, first]
        ahead = 0.0
        for cut in range(first + 1, last + 1):
            ahead += self.forward[cut - 1]
            split = ahead + _after(x[cut], table[cut, last]) + table[first, cut - 1]
            best = np.minimum(best, split)
        passing = max(x[stage] + x[stage + 1] for stage in range(first + 1, last + 1))
        best[: min(len(best), gradient + max(x[first + 1], passing))] = np.inf
        return best

    def _both(self, stage: int) -> float:
        return self.forward[stage] + self.backward[stage]

    def _from(self, least: int, value: float) -> np.ndarray:
        entry = np.full(self.budget + 1, np.inf)
        entry[least:] = value
        return entry

    def schedule(self) -> list[tuple[str, int]]:
        """The operations in order: ("drop", i) forward keeping nothing, ("keep", i) forward from a kept
        input, ("save", i) forward keeping all, ("back", i) backward.

        Raises InputError where nothing fits the budget.
        """
        if not np.isfinite(self.makespan):
            raise InputError(f"chain: a budget of {self.budget} is too small for any order of recomputation")
        return self._operations(0, len(self.forward) - 1, self.budget)

    def _operations(self, first: int, last: int, memory: int) -> list[tuple[str, int]]:
        if first == last:
            return [("save", first), ("back", first)]
        goal = self._table[first, last][memory]
        ahead = 0.0
        for cut in range(first + 1, last + 1):
            ahead += self.forward[cut - 1]
            left = memory - self.sizes[cut]
            if (
                left >= 0
                and ahead + self._table[cut, last][left] + self._table[first, cut - 1][memory] == goal
            ):
                run = [("keep", first), *(("drop", stage) for stage in range(first + 1, cut))]
                return [*run, *self._operations(cut, last, left), *self._operations(first, cut - 1, memory)]
        rest = self._operations(first + 1, last, memory - self.saved[first])
        return [("save", first), *rest, ("back", first)]


def _after(used: int, table: np.ndarray) -> np.ndarray:
    """The table as seen with `used` memory taken."""
    shifted = np.full_like(table, np.inf)
    if used < len(table):
        shifted[used:] = table[: len(table) - used]
    return shifted
