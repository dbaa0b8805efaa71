"""What the adapters share: two layers with an activation between, from features to few units and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ... import InputError
from .methods import Site, Variables

ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu, "tanh": jnp.tanh}


def require_activation(method: str, name: str) -> None:
    """Raise `InputError` unless `name` is one of `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise InputError(f"{method} activation={name!r} is not one of {', '.join(ACTIVATIONS)}")


def require_positive(method: str, **numbers: int) -> None:
    """Raise `InputError` for a number that is below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{method} {name}={number} must be at least 1")


def first_of(output: Any) -> Any:
    """A module's output, the first of several."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, y: Any) -> Any:
    """`output` with its first (or only) value replaced by `y`."""
    return (y, *output[1:]) if isinstance(output, tuple) else y


def features_of(site: Site, value: Any, method: str, what: str = "output") -> int:
    """D of an array `[..., D]` of floats; raises `InputError` for anything else."""
    if not getattr(value, "ndim", 0) or not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(
            f"{site.path or 'the root module'}: {method} needs an {what} [..., D] of floats, not {value}"
        )
    return value.shape[-1]


def two_layers(rng: jax.Array, inputs: int, width: int, outputs: int) -> Variables:
    """`down` uniform in ±1/sqrt(inputs); `up` and the biases zero, so that the two return zero."""
    bound = inputs**-0.5
    return {
        "down_kernel": jax.random.uniform(rng, (inputs, width), minval=-bound, maxval=bound),
        "down_bias": jnp.zeros(width),
        "up_kernel": jnp.zeros((width, outputs)),
        "up_bias": jnp.zeros(outputs),
    }


def through(variables: Variables, activation: str, x: jax.Array) -> jax.Array:
    """`up(activation(down(x)))` of `x [..., D]`, in the dtype of `x`."""
    cast = {key: value.astype(x.dtype) for key, value in variables.items()}
    hidden = ACTIVATIONS[activation](x @ cast["down_kernel"] + cast["down_bias"])
    return hidden @ cast["up_kernel"] + cast["up_bias"]


def scale_some(variables: Variables, names: tuple[str, ...], factor: Any) -> Variables:
    """`variables` with those in `names`, which the effect is linear in, multiplied by `factor`."""
    return {key: value * factor if key in names else value for key, value in variables.items()}
