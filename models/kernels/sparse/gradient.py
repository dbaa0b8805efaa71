"""The gradient of what a kernel computes forward only: that of `gather`, whatever the kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax import Array

from .experts import Experts
from .gather import Gather

Compute = Callable[[Array, Experts, Array], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_gathered_gradient(compute: Compute, x: Array, experts: Experts, chosen: Array) -> Array:
    """`compute(x, experts, chosen)`, `[N, D]`, differentiable in x and experts without a bias of `down`."""
    return compute(x, experts, chosen)


def _forward(
    compute: Compute, x: Array, experts: Experts, chosen: Array
) -> tuple[Array, tuple[Array, Experts, Array]]:
    return compute(x, experts, chosen), (x, experts, chosen)


def _backward(compute: Compute, kept: tuple[Array, Experts, Array], cotangent: Array) -> tuple:
    x, experts, chosen = kept
    _, pull = jax.vjp(lambda x, experts: Gather()(x, experts, chosen), x, experts)
    return *pull(cotangent), np.zeros(chosen.shape, jax.dtypes.float0)


with_gathered_gradient.defvjp(_forward, _backward)
