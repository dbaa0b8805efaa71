"""Routed experts: a feed-forward layer of which each token uses a few parts, chosen by a router.

Shazeer et al. 2017, "Outrageously large neural networks" (arXiv:1701.06538), with top-k softmax routing as in
GShard and Mixtral. No capacity: every token reaches all experts it chose. The router is in float32 at least.

    TransformerConfig(mlp=RoutedMLP(experts=8, chosen=2, width=1024))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import InputError
from .dispatch import ExpertAxes, ExpertWeights, routed
from .mlp import MLP, GatedMLP, GatedMLPModule, MLPModule, activation_function
from .precision import statistics_dtype
from .products import dense_product
from .routing import choose, routing_sums, sow_routing

if TYPE_CHECKING:
    from .config import TransformerConfig


@dataclass(frozen=True)
class RoutedMLP:
    """E `experts`, of which each token uses `chosen`; each is an mlp, gated or plain, of `width` F.

    `width` 0 is four times the model width. `shared` is the width of one more expert that every token uses
    (DeepSeekMoE, arXiv:2401.06066; 0: none). `normalised` makes the weights of the chosen sum to 1.
    `balance` and `z_loss` weigh the losses of `models.routing`, which training adds. There are no biases.
    """

    experts: int = 8
    chosen: int = 2
    width: int = 0
    activation: str = "silu"
    gated: bool = True
    shared: int = 0
    normalised: bool = True
    balance: float = 0.01
    z_loss: float = 0.001

    def __post_init__(self) -> None:
        activation_function(self.activation)
        for name, least in (("experts", 1), ("chosen", 1), ("width", 0), ("shared", 0)):
            if getattr(self, name) < least:
                raise InputError(f"routed mlp: {name}={getattr(self, name)} must be at least {least}")
        if self.chosen > self.experts:
            raise InputError(
                f"routed mlp: chosen={self.chosen} of experts={self.experts}; choose at most all"
            )
        if self.chosen == 1 < self.experts and self.normalised:
            raise InputError(
                "routed mlp: chosen=1 with normalised=True weighs each token's expert 1 whatever the router "
                "says, so the loss teaches it nothing; use normalised=False"
            )
        for name in ("balance", "z_loss"):
            if getattr(self, name) < 0:
                raise InputError(f"routed mlp: {name}={getattr(self, name)} must be at least 0")

    def build(self, config: TransformerConfig) -> nn.Module:
        """The module `mlp`, with children `router`, `experts` and, where there is one, `shared`."""
        if config.scaled_linears:
            raise InputError("a routed mlp has no scaled_linears; choose another mlp or scaled_linears=False")
        return RoutedMLPModule(config, self, name="mlp")

    def width_of_expert(self, model_width: int) -> int:
        """F."""
        return self.width or 4 * model_width

    def idle_weights(self, model_width: int) -> int:
        """How many weights of the layer a token is not multiplied with: those of the experts not chosen."""
        kernels = 3 if self.gated else 2
        return (self.experts - self.chosen) * kernels * model_width * self.width_of_expert(model_width)


class RoutedMLPModule(nn.Module):
    """The routed feed-forward layer, `[B, T, D] -> [B, T, D]`.

    Its child `router` returns the logits `[B, T, E]`, its child `experts` their weighted sum. Every token
    counts in the routing's statistics, padding too.
    """

    config: TransformerConfig
    choice: RoutedMLP

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, choice = self.config, self.choice
        logits = self._router()(x)
        experts, weights = choose(logits, choice.chosen, choice.normalised)
        sow_routing(self, routing_sums(logits, experts, choice.balance, choice.z_loss))
        y = Experts(config, choice, name="experts")(x, experts, weights)
        return y + self._shared()(x) if choice.shared else y

    def _router(self) -> nn.Module:
        precision = self.config.precision
        return nn.Dense(
            self.choice.experts,
            use_bias=False,
            dtype=statistics_dtype(precision.compute),
            param_dtype=jnp.dtype(precision.param),
            kernel_init=nn.initializers.normal(self.config.initial_std),
            dot_general=dense_product,
            name="router",
        )

    def _shared(self) -> nn.Module:
        choice = self.choice
        if choice.gated:
            return GatedMLPModule(self.config, GatedMLP(choice.shared, choice.activation), name="shared")
        return MLPModule(self.config, MLP(choice.shared, choice.activation, bias=False), name="shared")


class Experts(nn.Module):
    """The experts' weighted sum `[B, T, D]` for `x [B, T, D]`, `experts` and `weights [B, T, k]`.

    Kernels are `up/kernel` and, gated, `gate/kernel` `[E, D, F]`, and `down/kernel` `[E, F, D]`. On a mesh
    `models.placement` gives `axes`. Neurons are no sites for hooks: they lie in the experts' order.
    """

    config: TransformerConfig
    choice: RoutedMLP

    @nn.compact
    def __call__(
        self, x: jax.Array, experts: jax.Array, weights: jax.Array, axes: ExpertAxes | None = None
    ) -> jax.Array:
        config, choice = self.config, self.choice
        hidden = choice.width_of_expert(config.width)
        into, back = (choice.experts, config.width, hidden), (choice.experts, hidden, config.width)
        std = config.initial_std
        kernels = ExpertWeights(
            self._kernel("up", into, std),
            self._kernel("down", back, std / np.sqrt(2 * config.layers)),
            self._kernel("gate", into, std) if choice.gated else None,
        )
        return routed(x, experts, weights, kernels, choice.activation, axes)

    def _kernel(self, name: str, shape: tuple[int, ...], std: float) -> jax.Array:
        precision = self.config.precision
        kernel = ExpertKernel(shape, std, precision.param, name=name)()
        return kernel.astype(precision.compute)


class ExpertKernel(nn.Module):
    """Holds one `kernel` for each expert, `[E, in, out]`."""

    shape: tuple[int, ...]
    std: float
    dtype: str

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", nn.initializers.normal(self.std), self.shape, jnp.dtype(self.dtype))
