"""A module seen as one matrix, whatever axes it contracts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ... import InputError
from .methods import Site


@dataclass(frozen=True)
class Matrix:
    """The map of a Dense or DenseGeneral from `inputs` to `outputs` features, both flattened."""

    axes: tuple[int, ...]
    inputs: int
    outputs: int

    def flatten(self, x: jax.Array) -> jax.Array:
        """`x` with the contracted axes last, as one: `[..., inputs]`."""
        if self.axes == (-1,):
            return x
        count = len(self.axes)
        moved = jnp.moveaxis(x, self.axes, tuple(range(-count, 0)))
        return moved.reshape(*moved.shape[:-count], self.inputs)


def matrix_of(site: Site, x: Any, y: Any, method: str) -> Matrix:
    """The matrix of the module at `site`, which takes `x` to `y`.

    Read from shapes: a kernel `[*contracted, *features]` turns `x [..., *contracted]` into
    `y [..., *features]`. Raises `InputError` for a module that does something else.
    """
    kernel = site.params.get("kernel")
    shapes = [getattr(each, "shape", None) for each in (kernel, x, y)]
    if None not in shapes:
        (kernel_shape, x_shape, y_shape), axis = shapes, getattr(site.module, "axis", None)
        contracted = (len(kernel_shape) - len(y_shape) + len(x_shape)) // 2
        axes = _axes(axis, contracted, len(x_shape))
        features = len(kernel_shape) - contracted
        if (
            contracted > 0
            and features > 0
            and len(axes) == contracted
            and not getattr(site.module, "batch_dims", ())
            and not hasattr(site.module, "kernel_size")
            and kernel_shape == (*(x_shape[a] for a in axes), *y_shape[len(y_shape) - features :])
        ):
            inputs = math.prod(kernel_shape[:contracted])
            return Matrix(axes, inputs, math.prod(kernel_shape[contracted:]))
    name = type(site.module).__name__
    raise InputError(
        f"{site.path or 'the root module'}: {method} needs a module that multiplies its input by a 'kernel', "
        f"as Dense and DenseGeneral do; {name} does not "
        f"(kernel {shapes[0]}, input {shapes[1]}, output {shapes[2]})"
    )


def _axes(axis: int | tuple[int, ...] | None, contracted: int, ndim: int) -> tuple[int, ...]:
    """The contracted axes of the input, counted from its end, as Flax orders them in the kernel."""
    if axis is None:
        return tuple(range(-contracted, 0))
    axes = axis if isinstance(axis, tuple) else (axis,)
    return tuple(sorted(a if a < 0 else a - ndim for a in axes))
