"""Normalisation layers, as choices of the configuration and as modules.

Both normalise over the last axis of `[..., D]` with float32 statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

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
        bias = self.param("bias", nn.initializers.zeros, (width,), dtype) if self.choice.bias else None
        return layer_norm(x, scale, bias, self.choice.epsilon)


class RMSNormModule(nn.Module):
    """`x / sqrt(mean(x²) + epsilon) * scale`."""

    choice: RMSNorm
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.precision.param))
        return rms_norm(x, scale, self.choice.epsilon)


# Both are computed again in the backward pass, from `x` alone: what is left to keep of the forward pass would
# be several arrays of its size, and to write and read these takes longer than the arithmetic.


@partial(jax.checkpoint, static_argnums=3)
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    """`x [..., D]` with mean 0 and variance 1 over its last axis, times `scale [D]`, plus `bias [D]`."""
    wide = promote_statistics(x)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + epsilon) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


@partial(jax.checkpoint, static_argnums=2)
def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """`x [..., D]` with root mean square 1 over its last axis, times `scale [D]`."""
    wide = promote_statistics(x)
    mean_square = jnp.square(wide).mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + epsilon) * scale).astype(x.dtype)
