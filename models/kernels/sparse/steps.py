"""One chosen expert after another: a loop that slices the stacked weights and copies none of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from ...precision import statistics_dtype
from .experts import Experts, neurons
from .request import SparseRequest


@dataclasses.dataclass(frozen=True)
class Steps:
    """A `lax.scan` over pairs of a token and an expert."""

    name: str = "steps"

    def supports(self, request: SparseRequest) -> str | None:
        """Everything."""

    def unfit(self, request: SparseRequest) -> str | None:
        """It is measured beside `gather` (`modicum bench ffn`) and is not the faster."""
        return "gather is at least as fast"

    def __call__(self, x: Array, experts: Experts, chosen: Array) -> Array:
        """`[N, D]`."""
        return lax.map(lambda each: _token(each[0], each[1], experts), (x, chosen))


def _token(x: Array, chosen: Array, experts: Experts) -> Array:
    wide = statistics_dtype(x.dtype)

    def step(total: Array, expert: Array) -> tuple[Array, None]:
        mine = jax.tree.map(
            lambda leaf: lax.dynamic_index_in_dim(leaf, expert, keepdims=False),
            experts.without_output_bias(),
        )
        hidden = neurons(mine, x, lambda weights, x: weights @ x)
        return total + jnp.dot(hidden, mine.down, preferred_element_type=wide), None

    return lax.scan(step, jnp.zeros(x.shape, wide), chosen)[0].astype(x.dtype)
