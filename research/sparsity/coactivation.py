"""Which neurons fire together, from counts of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ... import InputError
from .statistics import LayerStatistics

STRONG = 0.5
BLOCK = 1 << 18  # pairs that are looked at at once: 2 MiB of float64


def correlation(layer: LayerStatistics) -> np.ndarray:
    """The correlation `[F, F]` over tokens of two neurons' being active (the φ coefficient).

    Neurons that are always or never active have none: 0, on the diagonal too. Raises `InputError` for
    statistics without pairs.
    """
    return _of_rows(layer, slice(0, layer.width))


def coactivation_rows(layers: Sequence[LayerStatistics]) -> list[dict[str, Any]]:
    """A table, one row a layer: how correlated pairs are, and the most correlated one.

    `by chance` is about what the mean of |φ| would be if all neurons fired on their own: √(2 / π tokens).
    Beside the counts themselves no more than 16 MiB are held, whatever F (up to 262,144): a few rows of the
    square at a time.
    """
    return [
        {
            "layer": layer.name,
            "mean |φ|": found.total / max(found.pairs, 1),
            "by chance": float(np.sqrt(2 / (np.pi * layer.tokens))),
            f"pairs above {STRONG:g}": found.strong / max(found.pairs, 1),
            "strongest pair": f"{found.one} and {found.other}",
            "its φ": found.best,
        }
        for layer, found in ((layer, _summed(layer)) for layer in layers)
    ]


class _Pairs(NamedTuple):
    """Of a layer's pairs: how many, the sum of |φ|, how many are strong, and the first of the strongest."""

    pairs: int
    total: float
    strong: int
    best: float
    one: int
    other: int


def _summed(layer: LayerStatistics) -> _Pairs:
    """All pairs of a layer with at least two neurons, some rows of the square at a time."""
    width = layer.width
    step = max(1, BLOCK // width)
    total, strong, best, place = 0.0, 0, -np.inf, (0, 0)
    for start in range(0, width, step):
        found = _of_rows(layer, slice(start, start + step))
        rows = np.arange(start, start + len(found))
        found[np.arange(width) <= rows[:, None]] = 0.0  # each pair once
        total += float(np.abs(found).sum())
        strong += int((found > STRONG).sum())
        found[np.arange(width) <= rows[:, None]] = -np.inf
        row, other = np.unravel_index(int(found.argmax()), found.shape)
        if found[row, other] > best:
            best, place = float(found[row, other]), (start + int(row), int(other))
    return _Pairs(width * (width - 1) // 2, total, strong, best, *place)


def _of_rows(layer: LayerStatistics, rows: slice) -> np.ndarray:
    """The correlation of some neurons with all, `[R, F]`."""
    if layer.together is None:
        raise InputError(f"{layer.name}: pairs were not counted; measure with together=True")
    often = layer.frequency
    spread = np.sqrt(often * (1 - often))
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    found = layer.together[rows] / layer.tokens
    found -= np.outer(often[rows], often)
    found *= np.outer(scale[rows], scale)
    return found
