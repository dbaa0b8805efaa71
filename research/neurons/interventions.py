"""Edits of neurons as data: ablation, replacement, noise; thousands of them in one compiled program.

An intervention says for each of the F neurons of L layers what becomes of its activation a:
`scale * a + shift + noise * n`, with one standard normal n for each example and neuron, the same at all
positions (as in Wang et al., "Finding Skill Neurons", 2022). Scale 0 switches a neuron off; with its mean
as the shift it is fixed there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from ... import InputError
from ...models.hooks import Given, run_with_edits, site_shapes
from ...models.model import Model, Params
from .layers import Layers, is_stacked

Metric = Callable[[Any], Any]


@struct.dataclass
class Intervention:
    """What becomes of each neuron; arrays `[L, F]`, or `[M, L, F]` for M interventions at once."""

    scale: jax.Array
    shift: jax.Array
    noise: jax.Array


def unchanged(shape: tuple[int, ...]) -> Intervention:
    """The intervention that leaves `[L, F]` neurons alone."""
    return Intervention(jnp.ones(shape), jnp.zeros(shape), jnp.zeros(shape))


def fixed(mask: Any, values: Any = 0.0) -> Intervention:
    """The neurons of `mask [L, F]` hold `values` (a number or `[L, F]`): their mean, or 0."""
    chosen = jnp.asarray(mask, bool)
    shift = jnp.where(chosen, values, 0.0)
    return Intervention(jnp.where(chosen, 0.0, 1.0), shift, jnp.zeros(chosen.shape))


def noised(mask: Any, deviation: Any) -> Intervention:
    """The neurons of `mask [L, F]` get normal noise of this standard deviation (a number or `[L, F]`)."""
    chosen = jnp.asarray(mask, bool)
    return replace(unchanged(chosen.shape), noise=jnp.where(chosen, deviation, 0.0))


def stacked(interventions: list[Intervention]) -> Intervention:
    """M interventions as one, `[M, L, F]`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *interventions)


def intervene(
    model: Model | nn.Module,
    params: Params,
    *args: Any,
    intervention: Intervention,
    layers: Layers,
    name: str = "mlp/act",
    rng: jax.Array | None = None,
    **kwargs: Any,
) -> Any:
    """The model's outputs under one intervention at the sites `name` of `layers`; `rng` draws its noise.

    Without `rng` the noise is left out. Pure; map over the intervention for many.
    """
    values: Any = intervention
    if rng is not None:
        values = intervention, jax.random.split(rng, len(layers))
    edit = _affine if rng is None else with_noise
    return run_with_edits(model, params, *args, edits={name: Given(edit, layers.split(values))}, **kwargs)


def for_each(run: Callable[[Any], Any], interventions: Any, *, chunk: int = 64) -> Any:
    """`run(intervention)` for each row of a pytree with a leading axis M, `chunk` of them at a time.

    What does not depend on the intervention is computed once a chunk. The result has the leading axis M.
    """
    if chunk < 1:
        raise InputError(f"chunk={chunk} must be at least 1")
    return jax.lax.map(run, interventions, batch_size=chunk)


def ablate_each(
    model: Model | nn.Module,
    params: Params,
    *args: Any,
    name: str,
    metric: Metric,
    values: Any = 0.0,
    axis: int = -1,
    chunk: int = 64,
    **kwargs: Any,
) -> Any:
    """`metric(outputs)` with each unit along `axis` of the site `name` held at `values`, one after the other.

    `name` must match one site of an unrolled model, such as `layers_3/mlp/act` (F neurons) or
    `layers_3/attention/heads` with `axis=2` (H heads). `values` is a number or one for each unit. The result
    has a leading axis over units; all of them are one compiled program under `jit`.
    """
    path, shape = single_site(model, params, *args, name=name, **kwargs)
    units = shape[axis]
    held = jnp.broadcast_to(jnp.asarray(values), (units,))

    def one(unit: jax.Array) -> Any:
        edit = partial(_held, unit=unit, value=held[unit], axis=axis)
        return metric(run_with_edits(model, params, *args, edits={path: edit}, **kwargs))

    return for_each(one, jnp.arange(units), chunk=chunk)


def single_site(
    model: Model | nn.Module, params: Params, *args: Any, name: str, **kwargs: Any
) -> tuple[str, tuple[int, ...]]:
    """Path and shape of the one site that `name` matches; raises `InputError` where it matches several."""
    shapes = site_shapes(model, params, *args, names=[name], **kwargs)
    if len(shapes) != 1:
        raise InputError(
            f"{name!r} matches {len(shapes)} sites ({', '.join(sorted(shapes))}); name one of them"
        )
    ((path, shape),) = shapes.items()
    if is_stacked(path):
        raise InputError(f"{path} is scanned: unroll the model (`unstack_layers`) to edit one layer's units")
    return path, tuple(shape.shape)


def along(axis: int, units: jax.Array, ndim: int) -> jax.Array:
    """`units [U]` shaped to broadcast along `axis` of an array of `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = -1
    return units.reshape(shape)


def _held(x: jax.Array, unit: jax.Array, value: jax.Array, axis: int) -> jax.Array:
    """`x` with one unit along `axis` replaced by `value`."""
    chosen = along(axis, jnp.arange(x.shape[axis]) == unit, x.ndim)
    return jnp.where(chosen, value.astype(x.dtype), x)


def _affine(x: jax.Array, given: Intervention) -> jax.Array:
    return x * given.scale.astype(x.dtype) + given.shift.astype(x.dtype)


def with_noise(x: jax.Array, given: tuple[Intervention, jax.Array]) -> jax.Array:
    """`x [B, ..., F]` under an intervention of one layer, with its key for the noise."""
    intervention, key = given
    drawn = jax.random.normal(key, (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1]), x.dtype)
    return _affine(x, intervention) + intervention.noise.astype(x.dtype) * drawn
