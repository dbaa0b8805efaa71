"""Batches as a function of (seed, step).

The order is a permutation of the rows a pass, reshuffled every pass, computed by index
(`grain.MapDataset`): batch k takes entries k·B … k·B + B - 1 of the endless order. The state to
resume from is therefore the step, whatever was read before and however many processes read.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import grain
import numpy as np

from ... import InputError

__all__ = ["Batch", "Batches", "Rows", "evaluation_batches", "stack"]

Batch = dict[str, np.ndarray]
WEIGHTS = ("weight", "weights")


class Rows(Protocol):
    """Anything with rows by index: each a dict of numpy arrays of the same fields and shapes."""

    def __len__(self) -> int:
        """How many rows there are."""

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        """Row `index`."""


@dataclass(frozen=True)
class Batches:
    """Training batches without end: `batches[step]` is a dict of numpy arrays, [B, …] each.

    Attributes:
        rows: what to draw from.
        size: B, rows of the global batch.
        seed: of the order, 0 … 2³² - 1.
        shuffle: whether to reshuffle every pass; otherwise the rows' own order, over and over.
        part: (index, count) of the part of every global batch that this process reads.
    """

    rows: Rows
    size: int
    seed: int = 0
    shuffle: bool = True
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        index, count = self.part
        if len(self.rows) == 0:
            raise InputError("batches: there are no rows")
        if self.size < 1:
            raise InputError(f"batches: size is {self.size}; at least 1 is valid")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"batches: seed is {self.seed}; 0 to 2**32 - 1 is valid")
        if self.size % count or not 0 <= index < count:
            raise InputError(f"batches: a batch of {self.size} rows does not divide among {count} processes")

    @cached_property
    def order(self) -> grain.MapDataset:
        """The endless order of row numbers."""
        numbers = grain.MapDataset.range(len(self.rows))
        return (numbers.shuffle(seed=self.seed) if self.shuffle else numbers).repeat()

    def __getitem__(self, step: int) -> Batch:
        index, count = self.part
        share = self.size // count
        first = step * self.size + index * share
        return stack([self.rows[self.order[first + offset]] for offset in range(share)])

    def process_slice(self, index: int, count: int) -> "Batches":
        """The part of every batch that process `index` of `count` reads; the parts in order are the whole."""
        return replace(self, part=(index, count))

    def steps_per_pass(self) -> float:
        """How many batches one pass over the rows takes; not always whole."""
        return len(self.rows) / self.size

    def iterate(self, start: int = 0, prefetch: int = 2) -> Iterator[Batch]:
        """The batches from step `start` on, `prefetch` of them made ahead in a thread."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
            ahead: deque[Future[Batch]] = deque()
            step = start
            try:
                while True:
                    while len(ahead) <= prefetch:
                        ahead.append(pool.submit(self.__getitem__, step))
                        step += 1
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()


def evaluation_batches(rows: Rows, size: int, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
    """Every row once, in order; the last batch is filled up with copies of the last row of weight 0.

    Raises:
        InputError: where there are no rows, they have no weight, or `size` does not divide among processes.
    """
    Batches(rows, size, part=part)  # the same checks
    index, count = part
    share = size // count
    for first in range(index * share, len(rows) + index * share, size):
        numbers = range(first, first + share)
        yield stack([rows[n] if n < len(rows) else _weightless(rows[len(rows) - 1]) for n in numbers])


def stack(rows: list[Mapping[str, np.ndarray]]) -> Batch:
    """Rows of the same fields as one batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _weightless(row: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """`row` without weight: real tokens, so that no attention is over nothing, that count for nothing."""
    weights = {name: np.zeros_like(row[name]) for name in WEIGHTS if name in row}
    if not weights:
        raise InputError(f"evaluation: rows have no field {' or '.join(WEIGHTS)} to mark filling with")
    return {**row, **weights}
