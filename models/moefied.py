"""A feed-forward layer cut into experts, of which each token uses the few that its router names.

Not a mixture of experts that was trained as one: the experts are the neurons of a dense layer, regrouped, and
their outputs are added up unweighted, so that with all of them chosen it is the dense layer (Zhang et al.,
"MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import InputError
from .hooks import Hook
from .kernels.sparse import Experts, sparse_feed_forward
from .mlp import activation_function
from .selection import MLPSelection, Selection

if TYPE_CHECKING:
    from .config import TransformerConfig

EXPERT_WEIGHTS = ("up", "gate", "down")


@dataclass(frozen=True)
class MoefiedMLP:
    """`width` F neurons (0: four times the model width) in `experts` E, `chosen` k of which a token uses.

    `gated` neurons are those of `GatedMLP`. `impl` names an implementation of `sparse_feed_forward`.
    """

    width: int = 0
    experts: int = 32
    chosen: int = 8
    activation: str = "relu"
    bias: bool = True
    gated: bool = False
    selection: Selection = MLPSelection()
    impl: str = "auto"

    def __post_init__(self) -> None:
        activation_function(self.activation)
        if self.width < 0:
            raise InputError(f"mlp width={self.width} must be at least 0 (0: four times the model width)")
        if not 1 <= self.chosen <= self.experts:
            raise InputError(f"chosen={self.chosen} of experts={self.experts}: at least 1 of them is valid")
        if self.width % self.experts:
            raise InputError(f"{self.width} neurons do not divide into {self.experts} experts")

    @property
    def share(self) -> float:
        """The fraction of neurons that a token uses."""
        return self.chosen / self.experts

    def idle_weights(self, width: int) -> int:
        """Weights of the neurons that a token does not use, in a model of this width."""
        matrices = 3 if self.gated else 2
        unused = (self.width or 4 * width) // self.experts * (self.experts - self.chosen)
        return matrices * unused * width

    def build(self, config: TransformerConfig) -> nn.Module:
        """The module `mlp`, with children `experts` and `selection`."""
        return MoefiedModule(config, self, name="mlp")


class MoefiedModule(nn.Module):
    """The layer, `[B, T, D] -> [B, T, D]`; the hook `chosen` sees the experts of each token, `[B, T, k]`."""

    config: TransformerConfig
    choice: MoefiedMLP

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        choice, precision = self.choice, self.config.precision
        experts = ExpertsModule(self.config, choice, name="experts")()
        scores = choice.selection.build(choice.experts, precision)(x, experts)
        chosen = Hook(name="chosen")(lax.top_k(scores, choice.chosen)[1])
        x = x.astype(precision.compute)
        return sparse_feed_forward(x, experts, lax.stop_gradient(chosen), impl=choice.impl)


class ExpertsModule(nn.Module):
    """The weights, `[E, n, D]`, in the arithmetic's type."""

    config: TransformerConfig
    choice: MoefiedMLP

    @nn.compact
    def __call__(self) -> Experts:
        config, choice = self.config, self.choice
        width = choice.width or 4 * config.width
        if width % choice.experts:
            raise InputError(f"{width} neurons do not divide into {choice.experts} experts")
        matrix = (choice.experts, width // choice.experts, config.width)

        def weight(name: str, shape: tuple[int, ...], std: float) -> jax.Array:
            make = nn.initializers.normal(std)
            param = self.param(name, make, shape, jnp.dtype(config.precision.param))
            return param.astype(config.precision.compute)

        std = config.initial_std
        shapes: dict[str, tuple[tuple[int, ...], float]] = {
            "up": (matrix, std),
            "down": (matrix, std / np.sqrt(2 * config.layers)),
        }
        if choice.gated:
            shapes["gate"] = matrix, std
        if choice.bias:
            shapes |= {"up_bias": (matrix[:2], 0.0), "down_bias": (matrix[2:], 0.0)}
        if choice.bias and choice.gated:
            shapes["gate_bias"] = matrix[:2], 0.0
        return Experts(
            **{name: weight(name, *given) for name, given in shapes.items()}, activation=choice.activation
        )
