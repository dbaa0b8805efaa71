"""Normalisation layers, as choices of the configuration and as modules.

Both normalise over the last axis of `[..., D]` with float32 statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from .precision import Precision, promote_statistics


@dataclass(frozen=True)
class LayerNorm:
    """Zero mean, unit variance, learned scale and bias (Ba et al., "Layer Normalization", 2016)."""

    epsilon: float = 1e-5
    bias: bool = True

    def build(self, precision: Precision, name: str) -> nn.Module:
        """The module; its parameters are `scale` and, if chosen, `bias`, each `[D]`."""
        return LayerNormModule(self, precision, name=name)


@dataclass(frozen=True)
class RMSNorm:
    """Unit root mean square and a learned scale (Zhang and Sennrich, 2019)."""

    epsilon: float = 1e-6

    def build(self, precision: Precision, name: str) -> nn.Module:
        """The module; its parameter is `scale` `[D]`."""
        return RMSNormModule(self, precision, name=name)


Norm = LayerNorm | RMSNorm


class LayerNormModule(nn.Module):
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias`."""

    choice: LayerNorm
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, width = jnp.dtype(self.precision.param), x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,), dtype)
        wide = promote_statistics(x)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.choice.epsilon) * scale
        if self.choice.bias:
            y = y + self.param("bias", nn.initializers.zeros, (width,), dtype)
        return y.astype(x.dtype)


class RMSNormModule(nn.Module):
    """`x / sqrt(mean(x²) + epsilon) * scale`."""

    choice: RMSNorm
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.precision.param))
        wide = promote_statistics(x)
        mean_square = jnp.square(wide).mean(-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.choice.epsilon) * scale).astype(x.dtype)
