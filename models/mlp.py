"""Feed-forward layers: plain and gated, with any activation, by name or one of `sparse_activations`.

The hook `act` sees what the activation function returns, `[B, T, F]`: these are the neurons that
activation sparsity and skill neurons are about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import InputError
from .hooks import Hook
from .precision import promote_statistics
from .sparse_activations import FATReLU, StatisticalTopK, TopK

if TYPE_CHECKING:
    from .config import TransformerConfig


def squared_relu(x: jax.Array) -> jax.Array:
    """`max(x, 0)²` (So et al., "Primer", 2021)."""
    return jnp.square(jax.nn.relu(x))


def exact_gelu(x: jax.Array) -> jax.Array:
    """`x Φ(x)` with the normal distribution function Φ (Hendrycks and Gimpel, "GELU", 2016).

    By `erf`, in single precision at least: `erfc`, which narrow types would need for negative `x`, has two
    branches that are both computed, and takes twice the time.
    """
    wide = promote_statistics(x)
    return (0.5 * wide * (1.0 + lax.erf(wide * np.sqrt(0.5).astype(wide.dtype)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu2": squared_relu,
    "gelu": exact_gelu,
    # GPT-2's approximation of it
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


Activation = str | FATReLU | TopK | StatisticalTopK

DRELU = "drelu"  # of both products of a gated layer (Song et al., "Turbo Sparse", 2024)


def activation_function(name: str) -> Callable[[jax.Array], jax.Array]:
    """The elementwise function called `name`; raises `InputError` listing the valid names."""
    if name == DRELU:
        raise InputError(f"activation 'drelu' is for the two products of a GatedMLP; valid here: {_valid()}")
    if name not in ACTIVATIONS:
        raise InputError(f"activation {name!r} is unknown; valid: {_valid()}")
    return ACTIVATIONS[name]


def activate(activation: Activation, x: jax.Array) -> jax.Array:
    """The function called so, of `x [..., F]`; the backward pass computes it again from `x` alone.

    Otherwise parts of it, as large as `x` and the widest arrays of a layer, would be kept until then. Exact
    top-k, whose sorting costs more than the mask that it keeps, is not computed again.
    """
    if isinstance(activation, TopK):
        return activation(x)
    function = activation_function(activation) if isinstance(activation, str) else activation
    return jax.checkpoint(function)(x)


@dataclass(frozen=True)
class MLP:
    """`down(activation(up(x)))` with `width` F neurons (0: four times the model width)."""

    width: int = 0
    activation: Activation = "gelu"
    bias: bool = True

    def __post_init__(self) -> None:
        _check(self.width, self.activation)

    def build(self, config: TransformerConfig) -> nn.Module:
        """The module `mlp`, with children `up` and `down`."""
        return MLPModule(config, self, name="mlp")


@dataclass(frozen=True)
class GatedMLP:
    """`down(activation(gate(x)) * up(x))` (Shazeer, "GLU Variants Improve Transformer", 2020).

    `activation="sigmoid"` is GLU, `"gelu"` GeGLU, `"silu"` SwiGLU, `"relu"` ReGLU; `"drelu"` is ReLU on both
    products (Song et al., "Turbo Sparse", 2024), whose neurons are active where the hook `mid` is not 0.
    """

    width: int = 0
    activation: Activation = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        _check(self.width, "relu" if self.activation == DRELU else self.activation)

    def build(self, config: TransformerConfig) -> nn.Module:
        """The module `mlp`, with children `gate`, `up` and `down`."""
        return GatedMLPModule(config, self, name="mlp")


def _valid() -> str:
    return ", ".join(ACTIVATIONS)


def _check(width: int, activation: Activation) -> None:
    if isinstance(activation, str):
        activation_function(activation)
    if width < 0:
        raise InputError(f"mlp width={width} must be at least 0 (0: four times the model width)")


class MLPModule(nn.Module):
    """The plain feed-forward layer, `[B, T, D] -> [B, T, D]`."""

    config: TransformerConfig
    choice: MLP

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, bias = self.config, self.choice.bias
        width = self.choice.width or 4 * config.width
        hidden = config.linear(width, bias, name="up")(x)
        hidden = Hook(name="act")(activate(self.choice.activation, hidden))
        return config.linear(config.width, bias, name="down", residual=True)(hidden)


class GatedMLPModule(nn.Module):
    """The gated feed-forward layer, `[B, T, D] -> [B, T, D]`; the hook `mid` sees the gated product."""

    config: TransformerConfig
    choice: GatedMLP

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, bias = self.config, self.choice.bias
        width = self.choice.width or 4 * config.width
        gate = config.linear(width, bias, name="gate")(x)
        both = self.choice.activation == DRELU
        gate = Hook(name="act")(activate("relu" if both else self.choice.activation, gate))
        up = config.linear(width, bias, name="up")(x)
        hidden = Hook(name="mid")(gate * (activate("relu", up) if both else up))
        return config.linear(config.width, bias, name="down", residual=True)(hidden)
