"""Every neuron is computed and those of experts that were not chosen are zeroed: the reference."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from ...precision import statistics_dtype
from .experts import Experts, neurons
from .request import SparseRequest


@dataclasses.dataclass(frozen=True)
class Mask:
    """Two dense products: no time is saved, whatever is chosen; with many tokens nothing is faster."""

    name: str = "mask"

    def supports(self, request: SparseRequest) -> str | None:
        """Everything."""

    def unfit(self, request: SparseRequest) -> str | None:
        """Always fits."""

    def __call__(self, x: Array, experts: Experts, chosen: Array) -> Array:
        """`[N, D]`. Weights are taken as `[E n, D]`: of three axes XLA on CPUs would make a copy first."""
        rows = jnp.arange(x.shape[0])[:, None]
        picked = jnp.zeros((x.shape[0], experts.count), bool).at[rows, chosen].set(True)
        dense = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), experts.without_output_bias())
        hidden = neurons(dense, x, lambda weights, x: x @ weights.T)
        hidden = jnp.where(jnp.repeat(picked, experts.size, axis=1), hidden, 0)
        wide = statistics_dtype(x.dtype)
        return jnp.dot(hidden, dense.down, preferred_element_type=wide).astype(x.dtype)
