"""Means over a data set: sums of every batch, divided once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from ... import InputError
from .objectives import Batch, Loss, LossSums

Tree = Any
SumsOf = Callable[[Tree, Tree, Batch], LossSums]


def make_evaluation(loss: Loss) -> SumsOf:
    """The jitted function from a batch to its sums, without dropout."""
    return jax.jit(lambda trainable, frozen, batch: loss(trainable, frozen, batch, None))


def evaluate(
    sums_of: SumsOf,
    trainable: Tree,
    frozen: Tree,
    batches: Iterable[Mapping[str, Any]],
) -> dict[str, float]:
    """Means by name, `loss` among them, over `batches`; padding rows weigh nothing.

    Sums of batches are added in Python's float, which is float64: their order and number do not show.
    """
    total, weight, metrics = 0.0, 0.0, dict[str, float]()
    for batch in batches:
        sums = jax.device_get(sums_of(trainable, frozen, batch))
        total, weight = total + float(sums.total), weight + float(sums.weight)
        for name, value in sums.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    if not weight:
        raise InputError("nothing to evaluate: the data set has no rows with a weight above 0")
    return {"loss": total / weight, **{name: value / weight for name, value in metrics.items()}}


def perplexity(loss: float) -> float:
    """exp(loss) of a mean loss in nats; infinity where it is larger than any float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
