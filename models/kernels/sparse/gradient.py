"""The gradient of what a kernel computes forward only: that of `gather` or `mask`, whatever the kernel.

Gather's copies are copied back, token by token: on two cores, with a tenth of the neurons, its gradient is
the faster for 4 tokens, and for 16 and 64 mask's by several times. So it is gather's where `auto` would take
that for the forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax import Array

from .experts import Experts
from .gather import Gather
from .mask import Mask
from .request import sparse_request

Compute = Callable[[Array, Experts, Array], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_portable_gradient(compute: Compute, x: Array, experts: Experts, chosen: Array) -> Array:
    """`compute(x, experts, chosen)`, `[N, D]`, differentiable in x and experts without a bias of `down`."""
    return compute(x, experts, chosen)


def _forward(
    compute: Compute, x: Array, experts: Experts, chosen: Array
) -> tuple[Array, tuple[Array, Experts, Array]]:
    return compute(x, experts, chosen), (x, experts, chosen)


def _backward(compute: Compute, kept: tuple[Array, Experts, Array], cotangent: Array) -> tuple:
    x, experts, chosen = kept
    few = Gather().unfit(sparse_request(x, experts, chosen)) is None
    portable = Gather() if few else Mask()
    _, pull = jax.vjp(lambda x, experts: portable(x, experts, chosen), x, experts)
    return *pull(cotangent), np.zeros(chosen.shape, jax.dtypes.float0)


with_portable_gradient.defvjp(_forward, _backward)
