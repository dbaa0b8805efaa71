"""Which neurons fire together, from counts of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ... import InputError
from .statistics import LayerStatistics

STRONG = 0.5


def correlation(layer: LayerStatistics) -> np.ndarray:
    """The correlation `[F, F]` over tokens of two neurons' being active (the φ coefficient).

    Neurons that are always or never active have none: 0, on the diagonal too. Raises `InputError` for
    statistics without pairs.
    """
    if layer.together is None:
        raise InputError(f"{layer.name}: pairs were not counted; measure with together=True")
    often = layer.frequency
    spread = np.sqrt(often * (1 - often))
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    return (layer.together / layer.tokens - np.outer(often, often)) * np.outer(scale, scale)


def coactivation_rows(layers: Sequence[LayerStatistics]) -> list[dict[str, Any]]:
    """A table, one row a layer: how correlated pairs are, and the most correlated one.

    `by chance` is about what the mean of |φ| would be if all neurons fired on their own: √(2 / π tokens).
    """
    rows = []
    for layer in layers:
        found = correlation(layer)
        one, other = np.triu_indices(layer.width, 1)
        pairs = found[one, other]
        best = int(np.argmax(pairs))
        rows.append(
            {
                "layer": layer.name,
                "mean |φ|": float(np.abs(pairs).mean()),
                "by chance": float(np.sqrt(2 / (np.pi * layer.tokens))),
                f"pairs above {STRONG:g}": float((pairs > STRONG).mean()),
                "strongest pair": f"{one[best]} and {other[best]}",
                "its φ": float(pairs[best]),
            }
        )
    return rows
