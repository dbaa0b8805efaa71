"""Which activations carry what one input has and another lacks: activation patching, and its gradient.

A clean and a corrupted input of the same shape: the corrupted run gets one of the clean run's activations
back at a time, and `metric(outputs)` says how much of the clean behaviour that restores (Meng et al.,
"Locating and Editing Factual Associations", 2022; Zhang and Nanda, 2024). Attribution patching (Nanda, 2023;
Syed et al., 2023) approximates all of them to first order, with two forward passes and one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ... import InputError
from ...models.hooks import Given, run_with_cache, run_with_edits, site_shapes
from ...models.model import Model, Params
from .interventions import along, for_each, single_site


def patch_each(
    model: Model | nn.Module,
    params: Params,
    clean: Any,
    corrupted: Any,
    *,
    name: str,
    metric: Callable[[Any], Any],
    axis: int,
    chunk: int = 64,
    **kwargs: Any,
) -> Any:
    """`metric` of the run on `corrupted` with one unit along `axis` of the site `name` from that on `clean`.

    `clean` and `corrupted` are tokens `[B, T]`; `axis` 1 patches position by position, -1 neuron by neuron,
    2 of `attention/heads` head by head. The result has a leading axis over units, and is one program.
    """
    require_alike(clean, corrupted)
    path, shape = single_site(model, params, clean, name=name, **kwargs)
    source = run_with_cache(model, params, clean, names=[path], **kwargs)[1][path]

    def one(unit: jax.Array) -> Any:
        edit = partial(patched, source=source, unit=unit, axis=axis)
        return metric(run_with_edits(model, params, corrupted, edits={path: edit}, **kwargs))

    return for_each(one, jnp.arange(shape[axis]), chunk=chunk)


def attribute(
    model: Model | nn.Module,
    params: Params,
    clean: Any,
    corrupted: Any,
    *,
    names: Sequence[str],
    metric: Callable[[Any], jax.Array],
    **kwargs: Any,
) -> dict[str, jax.Array]:
    """By site path `(clean activation - corrupted activation) * d metric / d activation`, unsummed.

    The gradient is the corrupted run's. Summed over what is patched together, an entry estimates
    `patch_each` less the metric of the corrupted run; exact where the metric is linear in the activation.
    `metric(outputs)` is a scalar. Under scanned layers arrays are stacked.
    """
    require_alike(clean, corrupted)
    wanted = run_with_cache(model, params, clean, names=names, **kwargs)[1]
    found = run_with_cache(model, params, corrupted, names=names, **kwargs)[1]
    slopes = activation_gradients(model, params, corrupted, names=names, metric=metric, **kwargs)
    return {path: (wanted[path] - found[path]) * slopes[path] for path in wanted}


def activation_gradients(
    model: Model | nn.Module,
    params: Params,
    *args: Any,
    names: Sequence[str],
    metric: Callable[[Any], jax.Array],
    **kwargs: Any,
) -> dict[str, jax.Array]:
    """The gradient of the scalar `metric(outputs)` by the value at each site, shaped like it."""
    shapes = site_shapes(model, params, *args, names=names, **kwargs)
    zeros = {path: jnp.zeros(shape.shape, shape.dtype) for path, shape in shapes.items()}

    def score(added: dict[str, jax.Array]) -> jax.Array:
        return metric(run_with_edits(model, params, *args, edits={".*": Given(jnp.add, added)}, **kwargs))

    return jax.grad(score)(zeros)


def patched(x: jax.Array, source: jax.Array, unit: jax.Array, axis: int) -> jax.Array:
    """`x` with one unit along `axis` from `source`."""
    return jnp.where(along(axis, jnp.arange(x.shape[axis]) == unit, x.ndim), source, x)


def require_alike(clean: Any, corrupted: Any) -> None:
    """Raise `InputError` for inputs of two shapes."""
    if jnp.shape(clean) != jnp.shape(corrupted):
        raise InputError(
            f"clean tokens {jnp.shape(clean)} and corrupted tokens {jnp.shape(corrupted)} must have one "
            f"shape: position by position they are exchanged"
        )
