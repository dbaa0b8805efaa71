"""The low-rank adapter: OpenDelta's, after Karimi Mahabadi et al. (2021, arXiv 2106.04647)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ... import InputError
from .bottleneck import (
    ACTIVATIONS,
    features_of,
    first_of,
    require_activation,
    require_positive,
    scale_some,
    with_first,
)
from .methods import Site, SiteMethod, Variables


@dataclass(frozen=True)
class LowRankAdapter(SiteMethod):
    """An adapter of `D / reduction` units whose two matrices are products `left @ right` of this rank.

    Defaults and positions are OpenDelta's. Its code multiplies the factors elementwise, which is their
    product at rank 1 only; here it is the matrix product at any rank. The factors start Glorot-uniform with
    gain sqrt(2), the right one of the second matrix and the biases at zero: the model starts exactly where
    it was.
    """

    reduction: int = 32
    rank: int = 1
    activation: str = "gelu"

    name: ClassVar[str] = "low_rank_adapter"
    positions: ClassVar[tuple[str, ...]] = ("attention/output", "mlp/down")

    def __post_init__(self) -> None:
        require_positive("low-rank adapter", reduction=self.reduction, rank=self.rank)
        require_activation("low-rank adapter", self.activation)

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """Two pairs of factors with biases; raises `InputError` where units or rank do not fit the output."""
        size = features_of(site, first_of(output), "a low-rank adapter")
        width = size // self.reduction
        if width < self.rank:
            raise InputError(
                f"{site.path}: a low-rank adapter with reduction={self.reduction} has {width} units for "
                f"{size} features, fewer than its rank={self.rank}"
            )
        glorot = jax.nn.initializers.variance_scaling(2.0, "fan_avg", "uniform")
        keys = jax.random.split(rng, 3)
        return {
            "down_left": glorot(keys[0], (size, self.rank)),
            "down_right": glorot(keys[1], (self.rank, width)),
            "down_bias": jnp.zeros(width),
            "up_left": glorot(keys[2], (width, self.rank)),
            "up_right": jnp.zeros((self.rank, size)),
            "up_bias": jnp.zeros(size),
        }

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The adapted output, computed in the output's dtype; the products of factors are never formed."""
        output = call(*args, **kwargs)
        y = first_of(output)
        cast = {key: value.astype(y.dtype) for key, value in variables.items()}
        hidden = y @ cast["down_left"] @ cast["down_right"] + cast["down_bias"]
        hidden = ACTIVATIONS[self.activation](hidden)
        added = hidden @ cast["up_left"] @ cast["up_right"] + cast["up_bias"]
        return with_first(output, y + added)

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """What is added, `factor` times."""
        return scale_some(variables, ("up_right", "up_bias"), factor)
