"""What one call of `sparse_feed_forward` asks for, and what an implementation must offer."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
from jax import Array

from ..request import PARTITIONED, partitioned, platform
from .experts import Experts


@dataclasses.dataclass(frozen=True)
class SparseRequest:
    """Everything about one call but the numbers; hashable, known at trace time.

    `tokens` N choose `chosen` k of `experts` E with `size` n neurons of `width` D each. `partitioned`: XLA
    may split the call over several devices. `dtype` is that of x and of the weights; where they differ, all.
    """

    platform: str
    tokens: int
    experts: int
    chosen: int
    size: int
    width: int
    dtype: str
    gated: bool
    activation: str
    partitioned: bool = False

    @property
    def share(self) -> float:
        """The fraction of neurons that a token uses."""
        return self.chosen / self.experts

    def __str__(self) -> str:
        kind = f"{'gated ' if self.gated else ''}{self.activation}"
        shape = f"N={self.tokens} k={self.chosen} E={self.experts} n={self.size} D={self.width}"
        return f"{shape} {kind} {self.dtype} on {self.platform}"


class SparseImplementation(Protocol):
    """One way to compute it."""

    @property
    def name(self) -> str:
        """What `impl=` calls it."""

    def supports(self, request: SparseRequest) -> str | None:
        """None, or the reason why it cannot compute the request."""

    def unfit(self, request: SparseRequest) -> str | None:
        """None, or the reason to look for another one, as long as this one is not asked for by name."""

    def __call__(self, x: Array, experts: Experts, chosen: Array) -> Array:
        """x `[N, D]` and chosen `[N, k]` to `[N, D]`, without the bias of `down`; differentiable."""


def for_few_tokens(request: SparseRequest) -> str | None:
    """None, or why kernels that read the chosen experts' rows and nothing else are not for this request.

    Tokens that together choose as much as the whole layer are better served by dense products.
    """
    if request.partitioned:
        return PARTITIONED
    if request.tokens * request.share >= 1.0:
        return f"{request.tokens} tokens may together choose the whole layer"
    return None


def sparse_request(x: Array, experts: Experts, chosen: Array) -> SparseRequest:
    """The description of the call with x `[N, D]` by which an implementation is chosen."""
    leaves = jax.tree.leaves((x, experts.without_output_bias()))
    return SparseRequest(
        platform=platform(),
        tokens=x.shape[0],
        experts=experts.count,
        chosen=chosen.shape[-1],
        size=experts.size,
        width=experts.width,
        dtype=" and ".join(sorted({leaf.dtype.name for leaf in leaves})),
        gated=experts.gate is not None,
        activation=experts.activation,
        partitioned=partitioned(),
    )
