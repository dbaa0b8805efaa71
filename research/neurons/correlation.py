"""Correlation of neurons with any number per example: a label, a length, the model's own confidence.

The group that found skill neurons extends them so ("Auxiliary Metrics Help Decoding Skill Neurons in the
Wild", arXiv 2511.21610): what a neuron is about need not be a label. Pearson's r, streamed: batches' centred
moments are merged by Chan, Golub and LeVeque's formula (1979), so large means lose no digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from .reading import Batch, Reader

Metric = Callable[[Any, Batch], jax.Array]
ROUNDING = 1e-6  # of a mean over a batch in single precision, relative


@dataclass(frozen=True, eq=False)
class Moments:
    """Weight, means and centred second moments of activations a and a metric m."""

    weight: np.ndarray
    mean_a: np.ndarray
    mean_m: np.ndarray
    aa: np.ndarray
    mm: np.ndarray
    am: np.ndarray

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of examples."""
        weight = self.weight + other.weight
        share = other.weight / np.where(weight > 0, weight, 1)
        a, m = other.mean_a - self.mean_a, other.mean_m - self.mean_m
        between = self.weight * share
        return Moments(
            weight,
            self.mean_a + share * a,
            self.mean_m + share * m,
            self.aa + other.aa + between * a * a,
            self.mm + other.mm + between * m * m,
            self.am + other.am + between * a * m,
        )

    @property
    def correlation(self) -> np.ndarray:
        """Pearson's r, shaped like the activations of one example; 0 for a neuron that is constant.

        What varies by no more than single precision's rounding is constant.
        """
        varies = self.aa > self.weight * np.square(ROUNDING * self.mean_a)
        size = np.sqrt(self.aa * self.mm)
        return np.divide(self.am, size, out=np.zeros_like(self.am), where=varies & (size > 0))


class Correlation:
    """r between each neuron `[L, P, F]` of a reader and `metric(arrays, batch) [B]`, compiled once."""

    def __init__(self, reader: Reader, metric: Metric) -> None:
        self._moments = jax.jit(partial(_moments, reader, metric))

    def __call__(self, arrays: Any, batches: Iterable[Batch]) -> np.ndarray:
        """The correlations over all examples; raises `InputError` for none, or a metric that is constant."""
        total: Moments | None = None
        for batch in batches:
            parts = jax.device_get(self._moments(arrays, dict(batch)))
            found = Moments(*(np.asarray(part, np.float64) for part in parts))
            total = found if total is None else total.merge(found)
        if total is None or total.weight == 0:
            raise InputError("no examples to correlate neurons over")
        if not total.mm > 0:
            raise InputError(
                f"the metric is {float(total.mean_m):.4g} for every example: nothing varies with it"
            )
        return total.correlation


def _moments(reader: Reader, metric: Metric, arrays: Any, batch: Batch) -> tuple[jax.Array, ...]:
    a, m = reader(arrays, batch), metric(arrays, batch).astype(jnp.float32)
    weight = jnp.asarray(batch.get("weight", jnp.ones(m.shape)), jnp.float32)
    total = weight.sum()
    share = weight / jnp.maximum(total, 1)
    mean_a, mean_m = jnp.einsum("b,blpf->lpf", share, a), share @ m
    a, m = a - mean_a, m - mean_m
    aa, am = (jnp.einsum("b,b...->...", weight, a * other) for other in (a, m[:, None, None, None]))
    return total, mean_a, mean_m, aa, weight @ (m * m), am
