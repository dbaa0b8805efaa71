"""A range of query or key indices: what a tile of the score matrix is cut from."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from .trees import AnyArray


class Span(NamedTuple):
    """The `size` indices from `start` on; a tile has a static size and perhaps a traced start.

    `held` is where they begin in arrays that hold a part of all indices only, such as one device's.
    """

    start: int | Array
    size: int
    held: int | Array | None = None

    def indices(self) -> Array:
        """The indices themselves, int32 `[size]`."""
        return self.start + lax.iota(jnp.int32, self.size)

    def cut(self, array: AnyArray, axis: int) -> Array:
        """This range of `array` along `axis`; an axis of size 1 broadcasts and stays whole."""
        if array.shape[axis] == 1:
            return jnp.asarray(array)
        start = self.start if self.held is None else self.held
        if isinstance(start, int):
            return lax.slice_in_dim(array, start, start + self.size, axis=axis)
        return lax.dynamic_slice_in_dim(array, start, self.size, axis=axis)


def pad(array: AnyArray, axis: int, length: int) -> Array:
    """`array` with zeros up to `length` along `axis`; an axis of size 1 broadcasts and stays."""
    have = array.shape[axis]
    if have in (1, length):
        return jnp.asarray(array)
    return jnp.pad(array, [(0, length - have if i == axis else 0) for i in range(array.ndim)])


def relative(rows: Span, columns: Span) -> Array:
    """Key index minus query index for each pair, int32 `[t, s]`."""
    return columns.indices()[None, :] - rows.indices()[:, None]


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """At least float32: the type in which scores, sums and gradients are kept for inputs of `dtype`."""
    return jnp.promote_types(dtype, jnp.float32)
