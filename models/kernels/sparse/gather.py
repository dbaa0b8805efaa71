"""The chosen experts' weights are copied and multiplied, token by token: plain XLA, on any device.

A weight is read, written and read again where the dense layer reads it once, so that a share f of the
neurons saves time where 3 f < 1, and by at most 1 / (3 f), unless copies stay in a cache, as they do on CPUs;
of several tokens each copies its own.
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
ONE, SEVERAL = 0.4, 1.1  # of a layer, what one token and several together may copy on CPUs: docs/sparsity.md


@dataclasses.dataclass(frozen=True)
class Gather:
    """`jnp.take` of `[k, n, D]`, then two small products."""

    name: str = "gather"

    def supports(self, request: SparseRequest) -> str | None:
        """Everything."""

    def unfit(self, request: SparseRequest) -> str | None:
        """Weights that are copied for several tokens cost more than the dense layer's, which all share."""
        if request.chosen == request.experts:
            return "all experts are chosen"
        most = 1 / TRAFFIC
        if request.platform == "cpu":  # where `mask` is as fast as the dense layer for one token only
            most = ONE if request.tokens == 1 else SEVERAL
        copied = request.share * request.tokens
        if copied < most:
            return None
        return f"{request.tokens} tokens would copy {copied:.2g} times the layer, which pays below {most:.2g}"

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
