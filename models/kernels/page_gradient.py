"""The gradient of kernels that read a cache in pages: that of the pages copied together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax import Array

from .terms import Terms
from .varying import vary, varying_axes

if TYPE_CHECKING:
    from .paged import Paged

Attend = Callable[..., tuple[Array, Array]]


def with_gathered_gradient(
    attend: Attend, q: Array, k: Paged, v: Paged, lengths: Array, terms: Terms
) -> tuple[Array, Array]:
    """`attend(q, k, v, lengths, terms)`, differentiable as `paged.Gathered` is.

    Nobody trains on a cache in pages, but who differentiates gets what XLA's way gives.
    """
    given = (q, k, v, lengths, terms)
    return _differentiable(attend, *vary(given, varying_axes(given)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(attend: Attend, *given: Any) -> tuple[Array, Array]:
    return attend(*given)


def _forward(attend: Attend, *given: Any) -> tuple[tuple[Array, Array], Any]:
    return attend(*given), given


def _backward(attend: Attend, given: Any, cotangents: tuple[Array, Array]) -> Any:
    from .paged import Gathered

    return jax.vjp(Gathered(), *given)[1](cotangents)


_differentiable.defvjp(_forward, _backward)
