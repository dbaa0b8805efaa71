"""The chosen experts' weights are copied and multiplied, token by token: plain XLA, on any device.

A weight is read, written and read again where the dense layer reads it once, so that a share f of the
neurons saves time where 3 f < 1, and by at most 1 / (3 f); of several tokens each copies its own.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from ...precision import statistics_dtype
from .experts import Experts, neurons
from .request import SparseRequest

TRAFFIC = 3  # times that a chosen weight moves


@dataclasses.dataclass(frozen=True)
class Gather:
    """`jnp.take` of `[k, n, D]`, then two small products."""

    name: str = "gather"

    def supports(self, request: SparseRequest) -> str | None:
        """Everything."""

    def unfit(self, request: SparseRequest) -> str | None:
        """Weights that are copied for several tokens cost more than the dense layer's, which all share."""
        copied = TRAFFIC * request.share * request.tokens
        if copied >= 1.0 and request.chosen < request.experts:
            return f"moving what {request.tokens} tokens choose takes {copied:.1f} times the layer's traffic"
        if request.chosen == request.experts:
            return "all experts are chosen"
        return None

    def __call__(self, x: Array, experts: Experts, chosen: Array) -> Array:
        """`[N, D]`."""
        if x.shape[0] == 1:
            return _token(x[0], chosen[0], experts)[None]
        return lax.map(lambda each: _token(each[0], each[1], experts), (x, chosen))


def _token(x: Array, chosen: Array, experts: Experts) -> Array:
    """One token `[D]` and its experts `[k]`."""
    mine = jax.tree.map(lambda leaf: jnp.take(leaf, chosen, axis=0), experts.without_output_bias())
    hidden = neurons(mine, x, lambda weights, x: jnp.einsum("knd,d->kn", weights, x))
    wide = statistics_dtype(x.dtype)
    return jnp.einsum("kn,knd->d", hidden, mine.down, preferred_element_type=wide).astype(x.dtype)
