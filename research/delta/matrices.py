"""A module seen as one matrix, whatever axes it contracts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ... import InputError
from .methods import Site

Shape = tuple[int, ...]


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

    def restore(self, flat: jax.Array, shape: Shape) -> jax.Array:
        """What `flatten` made `flat` of, an array of this shape."""
        if self.axes == (-1,):
            return flat
        moved = flat.reshape(*flat.shape[:-1], *(shape[axis] for axis in self.axes))
        return jnp.moveaxis(moved, tuple(range(-len(self.axes), 0)), self.axes)


def matrix_of(site: Site, x: Any, y: Any, method: str) -> Matrix:
    """The matrix of the module at `site`, which takes `x` to `y`.

    Read from shapes: a kernel `[*contracted, *features]` turns `x [..., *contracted]` into
    `y [..., *features]`. Raises `InputError` for a module that does something else.
    """
    kernel = site.params.get("kernel")
    shapes: list[Any] = [getattr(each, "shape", None) for each in (kernel, x, y)]
    if None not in shapes and (matrix := _read(site.module, *shapes)):
        return matrix
    name = type(site.module).__name__
    raise InputError(
        f"{site.path or 'the root module'}: {method} needs a module that multiplies its input by a 'kernel', "
        f"as Dense and DenseGeneral do; {name} does not "
        f"(kernel {shapes[0]}, input {shapes[1]}, output {shapes[2]})"
    )


def contracted_matrix(site: Site, x: Any, inputs: int) -> Matrix:
    """The matrix of `inputs` features that the module at `site` multiplies `x` by, its output not known yet.

    For a site that `matrix_of` accepted before. Raises `InputError` where no axes of `x` fit.
    """
    kernel, axis = site.params["kernel"].shape, getattr(site.module, "axis", None)
    for contracted in range(1, len(kernel)):
        axes = _axes(axis, contracted, x.ndim)
        if (
            kernel[:contracted] == tuple(x.shape[a] for a in axes)
            and math.prod(kernel[:contracted]) == inputs
        ):
            return Matrix(axes, inputs, math.prod(kernel[contracted:]))
    raise InputError(
        f"{site.path or 'the root module'}: the delta is for {inputs} inputs, but the kernel is {kernel} and "
        f"the input {x.shape}"
    )


def _read(module: nn.Module, kernel: Shape, x: Shape, y: Shape) -> Matrix | None:
    # An input of b + c axes becomes an output of b + f, through a kernel of c + f.
    contracted = (len(kernel) - len(y) + len(x)) // 2
    features = len(kernel) - contracted
    axes = _axes(getattr(module, "axis", None), contracted, len(x))
    batched = getattr(module, "batch_dims", ()) or hasattr(module, "kernel_size")
    if batched or contracted < 1 or features < 1 or len(axes) != contracted:
        return None
    if kernel != (*(x[axis] for axis in axes), *y[len(y) - features :]):
        return None
    return Matrix(axes, math.prod(kernel[:contracted]), math.prod(kernel[contracted:]))


def _axes(axis: int | tuple[int, ...] | None, contracted: int, ndim: int) -> tuple[int, ...]:
    """The contracted axes of the input, counted from its end, as Flax orders them in the kernel."""
    if axis is None:
        return tuple(range(-contracted, 0))
    axes = axis if isinstance(axis, tuple) else (axis,)
    return tuple(sorted(a if a < 0 else a - ndim for a in axes))
