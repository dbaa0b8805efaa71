"""Neurons' activations of a batch, `[B, L, P, F]`: of each example in each layer, at P positions.

Which P values stand for an example is a choice: those at a prompt's places (Wang et al., "Finding Skill
Neurons", 2022), or the mean or the maximum over its tokens (Zhang et al., "Emergent Modularity", 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...models.hooks import run_with_cache
from ...models.model import Model, Params
from .layers import Layers

Batch = Mapping[str, Any]
Reader = Callable[[Any, Batch], jax.Array]
"""A pure function of arrays (variables, parameters) and a batch; returns activations `[B, L, P, F]`."""

MODEL_INPUTS = "segments", "positions", "token_types"


@dataclass(frozen=True)
class Positions:
    """The positions from `start` to before `stop`: P = stop - start."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise InputError(f"positions {self.start} to {self.stop} are none; give 0 <= start < stop")

    def __call__(self, value: jax.Array, real: jax.Array) -> jax.Array:
        """`value [B, T, F]` at these positions, `[B, P, F]`."""
        if self.stop > value.shape[1]:
            raise InputError(f"positions up to {self.stop} are asked for, a row has {value.shape[1]}")
        return value[:, self.start : self.stop]


@dataclass(frozen=True)
class TokenMean:
    """The mean over an example's real tokens: P = 1."""

    def __call__(self, value: jax.Array, real: jax.Array) -> jax.Array:
        """`[B, 1, F]` of `value [B, T, F]`; `real [B, T]` is False at padding."""
        weights = real.astype(value.dtype)
        total = jnp.einsum("btf,bt->bf", value, weights)
        return (total / jnp.maximum(weights.sum(-1), 1)[:, None])[:, None]


@dataclass(frozen=True)
class TokenMax:
    """The largest value over an example's real tokens: P = 1."""

    def __call__(self, value: jax.Array, real: jax.Array) -> jax.Array:
        """`[B, 1, F]` of `value [B, T, F]`; `real [B, T]` is False at padding."""
        lowest = jnp.finfo(value.dtype).min
        return jnp.where(real[..., None], value, lowest).max(1, keepdims=True)


Read = Positions | TokenMean | TokenMax


class Spread:
    """Means and standard deviations `[L, P, F]` over examples of what a reader reads, compiled once."""

    def __init__(self, reader: Reader) -> None:
        self._moments = jax.jit(partial(_moments, reader))

    def __call__(self, arrays: Any, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
        """Both over all examples of weight above 0; batches' moments are merged (Chan et al., 1979)."""
        weight, mean, square = 0.0, np.zeros(()), np.zeros(())
        for batch in batches:
            parts = jax.device_get(self._moments(arrays, dict(batch)))
            count, found, own = (np.asarray(part, np.float64) for part in parts)
            total = weight + float(count)
            if total:
                share, step = float(count) / total, found - mean
                square = square + own + weight * share * step**2
                mean, weight = mean + share * step, total
        if not weight:
            raise InputError("no examples to read neurons on")
        return mean.astype(np.float32), np.sqrt(square / weight).astype(np.float32)


def _moments(reader: Reader, arrays: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weight, weighted means and sums of centred squares of a batch."""
    found = reader(arrays, batch)
    weight = jnp.asarray(batch.get("weight", jnp.ones(len(found))), jnp.float32)
    mean = jnp.einsum("b,blpf->lpf", weight / jnp.maximum(weight.sum(), 1), found)
    return weight.sum(), mean, jnp.einsum("b,blpf->lpf", weight, (found - mean) ** 2)


def activations(
    model: Model | nn.Module,
    params: Params,
    batch: Batch,
    *,
    read: Read,
    name: str = "mlp/act",
    prompt: int = 0,
) -> jax.Array:
    """Activations `[B, L, P, F]`, float32, at the sites `name`, which must be one in each layer of a stack.

    `prompt` is how many places a soft prompt puts in front of the batch's tokens `[B, T]`.
    """
    real = real_places(batch, prompt)

    def reduce(path: str, value: jax.Array) -> jax.Array:
        return read(value.astype(jnp.float32), real)

    kept = run_with_cache(model, params, batch["tokens"], names=[name], reduce=reduce, **model_inputs(batch))[
        1
    ]
    return jnp.moveaxis(Layers.of(kept).join(kept), 0, 1)


def real_places(batch: Batch, prompt: int = 0) -> jax.Array:
    """Which places are no padding, `[B, prompt + T]`."""
    tokens = jnp.asarray(batch["tokens"])
    real = jnp.asarray(batch["segments"]) > 0 if "segments" in batch else jnp.ones(tokens.shape, bool)
    return jnp.concatenate([jnp.ones((len(tokens), prompt), bool), real], 1)


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What of a batch goes to the model by keyword."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}
