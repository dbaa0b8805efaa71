"""Part of a set of rows, without copying it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ... import InputError
from .batches import Rows

__all__ = ["Part", "every_nth", "hold_out", "spread_out"]


@dataclass(frozen=True)
class Part:
    """The rows whose numbers are in `numbers`."""

    rows: Rows
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        return self.rows[self.numbers[index]]


def hold_out(rows: Rows, fraction: float) -> tuple[Part, Part]:
    """All rows but the last `fraction` to train on, and these to evaluate on; at least one each.

    The last rows, not random ones: neighbouring rows of a packed corpus share documents.
    """
    count = max(1, round(len(rows) * fraction))
    if not 0.0 < fraction < 1.0 or count >= len(rows):
        raise InputError(
            f"holding out {fraction} of {len(rows)} rows leaves nothing to train or to evaluate on; "
            f"give a fraction between 0 and 1, or more data"
        )
    border = len(rows) - count
    return Part(rows, range(border)), Part(rows, range(border, len(rows)))


def spread_out(rows: Rows, count: int) -> Part:
    """At most `count` rows at equal distances over the whole of `rows`, so that they stand for all.

    Distances differ by one, where `count` does not divide the number of rows. Raises `InputError` for none.
    """
    kept = min(_at_least_one(count), len(rows))
    return Part(rows, [number * len(rows) // kept for number in range(kept)])


def every_nth(rows: Rows, count: int) -> Part:
    """At most `count` rows at one distance, from the first on, whatever number is left at the end.

    For rows in random order; and for studies whose finished cells read these.
    """
    stride = max(1, len(rows) // _at_least_one(count))
    return Part(rows, range(0, len(rows), stride)[:count])


def _at_least_one(count: int) -> int:
    if count < 1:
        raise InputError(f"{count} rows at equal distances; at least one is valid")
    return count
