"""Activation functions that are made to leave few neurons active.

* `FATReLU` has a threshold that is not 0; `TopK` and `StatisticalTopK` compare the neurons of a token.
* `relu` and `relu2` are among the named functions of `models.mlp`, where `GatedMLP(activation="drelu")` has
  ReLU on both of its products.

Neurons are compared over the whole last axis, also where a mesh splits it: under `jax.jit` the numbers are
those of one device.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import jax
import jax.numpy as jnp
from jax import lax

from .. import InputError
from .precision import promote_statistics

TINY = 1e-12  # added to variances: the root has no slope at 0


@dataclass(frozen=True)
class FATReLU:
    """`x` where it is above `threshold`, else 0 (Kurtz et al., "Inducing and Exploiting Activation Sparsity",
    2020).
    """

    threshold: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold < float("inf"):
            raise InputError(f"FATReLU threshold={self.threshold} must be at least 0 and finite")

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., F] -> [..., F]`."""
        return jnp.where(x <= self.threshold, jnp.zeros_like(x), x)


@dataclass(frozen=True)
class TopK:
    """The `k` largest of a token's neurons where they are above 0, exactly: never more than `k`.

    Li et al., "The Lazy Neuron Phenomenon", 2023, section 4. Of equal values the first ones stay. Gradients
    reach the neurons that stay and no others.
    """

    k: int

    def __post_init__(self) -> None:
        _require_positive(self.k)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., F] -> [..., F]`; raises `InputError` where F is less than `k`."""
        if self.k > x.shape[-1]:
            raise InputError(f"top-k: k={self.k} of {x.shape[-1]} neurons; at most all is valid")
        seen = lax.stop_gradient(x)
        values, places = lax.top_k(seen, self.k)  # of equal values the first
        least, last = values[..., -1:], places[..., -1:]
        place = lax.broadcasted_iota(places.dtype, x.shape, x.ndim - 1)
        tied_out = (seen == least) & (place > last)
        silent = (seen < least) | tied_out | (seen <= 0)
        return jnp.where(silent, jnp.zeros_like(x), x)


@dataclass(frozen=True)
class StatisticalTopK:
    """About `k` of a token's F neurons: what lies above a threshold, less the threshold.

    The threshold is the mean of the token's neurons plus Φ⁻¹(1 - k / F) of their standard deviations, above
    which k lie if they are normally distributed (You et al., "Spark Transformer", 2025): sums alone, no
    sorting. Differentiable in the threshold too.
    """

    k: int

    def __post_init__(self) -> None:
        _require_positive(self.k)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., F] -> [..., F]`; raises `InputError` unless F is more than `k`."""
        width = x.shape[-1]
        if self.k >= width:
            raise InputError(f"statistical top-k: k={self.k} of {width} neurons; fewer than all is valid")
        wide = promote_statistics(x)
        mean = wide.mean(-1, keepdims=True)
        deviation = jnp.sqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + TINY)
        threshold = mean + NormalDist().inv_cdf(1 - self.k / width) * deviation
        return jax.nn.relu(wide - threshold).astype(x.dtype)


def _require_positive(k: int) -> None:
    if k < 1:
        raise InputError(f"top-k: k={k} must be at least 1")
