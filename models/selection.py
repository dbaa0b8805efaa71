"""How a token's experts are chosen: scores of each expert, of which the highest are taken.

Scores read the layer's input `x [..., D]` alone, scaled to length 1. `Oracle` is the exception: it computes
every neuron, so it saves nothing and shows what the best choice of experts would give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from .. import InputError
from .kernels.sparse import Experts
from .kernels.sparse.experts import neurons
from .precision import Precision, promote_statistics

SELECTION_WEIGHTS = ("centres", "first", "second")


@dataclass(frozen=True)
class OracleSelection:
    """The sum of the sizes of each expert's own neurons: "groundtruth" in Zhang et al., 2022, section 3.3."""

    def build(self, experts: int, precision: Precision) -> nn.Module:
        """The module `selection`, without parameters."""
        return OracleModule(name="selection")

    def flops(self, width: int, experts: int) -> int:
        """Of one token, without the neurons, which are counted where they are used."""
        return 0


@dataclass(frozen=True)
class CentreSelection:
    """How near the input is to the expert's centre, the mean of its neurons' unit input weights.

    By "distance" as in the code published with Zhang et al., 2022, by "cosine" as in its section 3.3. Needs
    no training.
    """

    measure: Literal["distance", "cosine"] = "cosine"

    def __post_init__(self) -> None:
        if self.measure not in ("distance", "cosine"):
            raise InputError(f"measure={self.measure!r} is not one of distance, cosine")

    def build(self, experts: int, precision: Precision) -> nn.Module:
        """The module `selection` with `centres [E, D]`."""
        return CentreModule(experts, self.measure, precision, name="selection")

    def flops(self, width: int, experts: int) -> int:
        """Of one token."""
        return 2 * width * experts


@dataclass(frozen=True)
class MLPSelection:
    """`second(tanh(first(x)))`, the router of Zhang et al., 2022; `hidden` units (0: one for each expert)."""

    hidden: int = 0

    def __post_init__(self) -> None:
        _at_least("hidden", self.hidden, 0)

    def build(self, experts: int, precision: Precision) -> nn.Module:
        """The module `selection` with `first [D, h]`, `second [h, E]` and `bias [E]`."""
        return TwoLayerModule(experts, self.hidden or experts, True, precision, name="selection")

    def flops(self, width: int, experts: int) -> int:
        """Of one token."""
        return 2 * (self.hidden or experts) * (width + experts)


@dataclass(frozen=True)
class LowRankSelection:
    """`second(first(x))` of rank `rank` (Liu et al., "Deja Vu", 2023): cheap where experts are many."""

    rank: int = 16

    def __post_init__(self) -> None:
        _at_least("rank", self.rank, 1)

    def build(self, experts: int, precision: Precision) -> nn.Module:
        """The module `selection` with `first [D, r]`, `second [r, E]` and `bias [E]`."""
        return TwoLayerModule(experts, self.rank, False, precision, name="selection")

    def flops(self, width: int, experts: int) -> int:
        """Of one token."""
        return 2 * self.rank * (width + experts)


Selection = OracleSelection | CentreSelection | MLPSelection | LowRankSelection


def expert_mass(experts: Experts, x: jax.Array) -> jax.Array:
    """The sum of the sizes of each expert's neurons, `[..., E]`, of x `[..., D]`.

    Of ReLU that is the sum of its activations, as in Zhang et al., 2022; gated neurons count as the products
    that the output matrix takes.
    """
    rows = x.reshape(-1, x.shape[-1])
    dense = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), experts.without_output_bias())
    hidden = promote_statistics(neurons(dense, rows, lambda weights, x: x @ weights.T))
    mass = jnp.abs(hidden).reshape(-1, experts.count, experts.size).sum(-1)
    return mass.reshape(*x.shape[:-1], experts.count)


def unit(x: jax.Array) -> jax.Array:
    """`x [..., D]` over its length, in single precision at least; zeros stay."""
    x = promote_statistics(x)
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


class OracleModule(nn.Module):
    """`[..., D] -> [..., E]`: what the experts' neurons sum up to."""

    def __call__(self, x: jax.Array, experts: Experts) -> jax.Array:
        return expert_mass(experts, x)


class CentreModule(nn.Module):
    """`[..., D] -> [..., E]`: how near the unit input is to each centre."""

    experts: int
    measure: str
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array, experts: Experts) -> jax.Array:
        shape, param = (self.experts, x.shape[-1]), jnp.dtype(self.precision.param)
        centres = promote_statistics(self.param("centres", nn.initializers.normal(1.0), shape, param))
        if self.measure == "cosine":
            return unit(x) @ unit(centres).T
        return 2 * unit(x) @ centres.T - jnp.square(centres).sum(-1)


class TwoLayerModule(nn.Module):
    """`[..., D] -> [..., E]` through a narrower layer, with tanh between or straight."""

    experts: int
    hidden: int
    bent: bool
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array, experts: Experts) -> jax.Array:
        normal, param = nn.initializers.lecun_normal(), jnp.dtype(self.precision.param)
        first = self.param("first", normal, (x.shape[-1], self.hidden), param)
        second = self.param("second", normal, (self.hidden, self.experts), param)
        bias = self.param("bias", nn.initializers.zeros, (self.experts,), param)
        hidden = unit(x) @ promote_statistics(first)
        hidden = jnp.tanh(hidden) if self.bent else hidden
        return hidden @ promote_statistics(second) + promote_statistics(bias)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name}={value} must be at least {least}")
