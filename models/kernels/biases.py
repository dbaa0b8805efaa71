"""What is added to the scores: a dense array, T5's bucketed relative positions, or ALiBi.

A bias computes one tile of `[B, H, T, S]` for given query and key indices and can add the gradient of a
tile to that of its own arrays, so the whole matrix never exists where the kernel works by tiles.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ... import InputError
from .masks import Sizes, broadcast_mismatch, per_batch
from .spans import Span, pad, relative
from .trees import AnyArray, structural

B = TypeVar("B", bound="Bias")


class Bias:
    """Something added to the scaled scores, before soft cap and mask."""

    def tile(self, rows: Span, columns: Span) -> Array:
        """The bias of each query of `rows` and key of `columns`: `[B or 1, H or 1, t, s]`."""
        raise NotImplementedError

    def add_gradient(self: B, total: B, gradient: Array, rows: Span, columns: Span) -> B:
        """`total`, a tree like this bias, plus the gradient that a tile's `gradient` `[B, H, t, s]` gives."""
        shape = jax.eval_shape(lambda: self.tile(rows, columns))
        _, pull = jax.vjp(lambda bias: bias.tile(rows, columns), self)
        (change,) = pull(_sum_to(gradient, shape.shape).astype(shape.dtype))
        return jax.tree.map(
            lambda a, b: a if b.dtype == jax.dtypes.float0 else a + b.astype(a.dtype), total, change
        )

    def mismatch(self, sizes: Sizes) -> str | None:
        """Why the arrays of this bias do not fit `sizes`, or None where they do."""
        raise NotImplementedError

    def extended(self, queries: int, keys: int) -> "Bias":
        """This bias with its arrays padded to `queries` and `keys` positions."""
        return self

    def cut(self, rows: Span, columns: Span) -> "Bias":
        """The bias of these queries and keys alone, counted from 0."""
        raise NotImplementedError


@structural
class Dense(Bias):
    """An array that broadcasts to `[B, H, T, S]`."""

    values: AnyArray

    def tile(self, rows: Span, columns: Span) -> Array:
        """The tile of the array."""
        return columns.cut(rows.cut(self.values, 2), 3)

    def add_gradient(self, total: "Dense", gradient: Array, rows: Span, columns: Span) -> "Dense":
        """Adds in place: the transpose of a slice would write the whole array once a tile."""
        have = self.tile(rows, columns)
        row, column = (rows.start if have.shape[2] > 1 else 0), (columns.start if have.shape[3] > 1 else 0)
        start = [jnp.asarray(i, jnp.int32) for i in (0, 0, row, column)]
        old = jax.lax.dynamic_slice(total.values, start, have.shape)
        new = old + _sum_to(gradient, have.shape).astype(old.dtype)
        return Dense(jax.lax.dynamic_update_slice(total.values, new, start))

    def mismatch(self, sizes: Sizes) -> str | None:
        """Four axes, each of full size or 1, and floating."""
        if not jnp.issubdtype(self.values.dtype, jnp.floating):
            return f"bias has type {self.values.dtype}; it must be floating; a mask goes to mask="
        return broadcast_mismatch("bias", self.values, sizes)

    def extended(self, queries: int, keys: int) -> "Dense":
        """Zeros beyond."""
        return Dense(pad(pad(self.values, 2, queries), 3, keys))

    def cut(self, rows: Span, columns: Span) -> "Dense":
        """The part of the array."""
        return Dense(self.tile(rows, columns))


@structural
class Bucketed(Bias):
    """T5's relative position bias: `table[bucket(j - i), head]`, `table` being `[buckets, H]`.

    Distances up to a half of a side's buckets have one each, larger ones share logarithmically spaced
    buckets up to `max_distance` and beyond. `offset` is added to the query index (see `Causal`); for
    `decode_attention` it may be `[B]`, one a row.
    Raffel et al. 2020 §2.1; `_relative_position_bucket` of google-research/text-to-text-transfer-transformer
    (mesh_tensorflow/transformer/transformer_layers.py).
    """

    table: AnyArray
    bidirectional: bool = True
    max_distance: int = 128
    offset: int | AnyArray = 0

    def tile(self, rows: Span, columns: Span) -> Array:
        """A Toeplitz matrix a head, spread from its `t + s - 1` distinct values, `[1, H, t, s]`."""
        offset = jnp.expand_dims(self.offset, -1) if jnp.ndim(self.offset) else self.offset
        first = columns.start - rows.start - offset
        # distance d >= 0 stands at index d, d < 0 at t + s + d, as `_toeplitz` reads them
        order = jnp.arange(rows.size + columns.size)
        distance = jnp.asarray(first + jnp.where(order < columns.size, order, order - order.size))
        values = jnp.swapaxes(jnp.asarray(self.table)[self.bucket(distance)], -1, -2)
        tile = _toeplitz(values, rows.size, columns.size)
        return tile if jnp.ndim(self.offset) else tile[None]

    def bucket(self, distance: Array) -> Array:
        """The row of the table for each key-minus-query distance, int32 of the same shape."""
        count = self.table.shape[0] // (2 if self.bidirectional else 1)
        one_side = jnp.asarray(distance_buckets(count, self.max_distance))
        if not self.bidirectional:
            return one_side[jnp.clip(-distance, 0, self.max_distance)]
        bucket = one_side[jnp.minimum(jnp.abs(distance), self.max_distance)]
        return bucket + jnp.where(distance > 0, self.table.shape[0] // 2, 0)

    def mismatch(self, sizes: Sizes) -> str | None:
        """A column a head, enough buckets for the formula, and a maximum beyond the exact ones."""
        shape, sides = jnp.shape(self.table), 2 if self.bidirectional else 1
        if len(shape) != 2 or shape[1] != sizes.heads:
            return f"Bucketed.table has shape {list(shape)}; it must be [buckets, {sizes.heads}]"
        if shape[0] < 2 * sides or shape[0] % sides:
            return f"Bucketed.table has {shape[0]} buckets; it needs an even number, at least {2 * sides}"
        if self.max_distance <= shape[0] // sides // 2:
            return f"Bucketed.max_distance is {self.max_distance}; it must exceed {shape[0] // sides // 2}"
        return _offset_mismatch(self)

    def cut(self, rows: Span, columns: Span) -> "Bucketed":
        """The diagonals moved."""
        return dataclasses.replace(self, offset=self.offset + rows.start - columns.start)


@structural
class ALiBi(Bias):
    """Linear biases `-slopes[h] * |j - i|`, `slopes` being `[H]`.

    Press et al. 2022, "Train short, test long"; on the causal side it is the paper's formula, to the right
    its mirror image, as bidirectional encoders use it. `offset` is added to the query index, for
    `decode_attention` perhaps one a row, `[B]`.
    """

    slopes: AnyArray
    offset: int | AnyArray = 0

    def tile(self, rows: Span, columns: Span) -> Array:
        """Distance times slope, `[1, H, t, s]`."""
        distance = jnp.abs(relative(rows, columns) - per_batch(self.offset)).astype(self.slopes.dtype)
        tile = -jnp.asarray(self.slopes)[:, None, None] * distance
        return tile if jnp.ndim(self.offset) else tile[None]

    def mismatch(self, sizes: Sizes) -> str | None:
        """A slope a head."""
        if jnp.shape(self.slopes) != (sizes.heads,):
            return f"ALiBi.slopes has shape {list(jnp.shape(self.slopes))}; it must be [{sizes.heads}]"
        return _offset_mismatch(self)

    def cut(self, rows: Span, columns: Span) -> "ALiBi":
        """The diagonals moved."""
        return ALiBi(self.slopes, self.offset + rows.start - columns.start)


def distance_buckets(count: int, max_distance: int) -> np.ndarray:
    """T5's bucket of each distance 0..max_distance on one side of `count` buckets, int32.

    A table, so that no device rounds a logarithm; the published float32 arithmetic decides at the borders.
    """
    exact = count // 2
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    spread = ratio / np.float32(np.log(max_distance / exact)) * np.float32(count - exact)
    shared = np.minimum(exact + spread.astype(np.int32), count - 1)
    return np.where(distance < exact, distance, shared).astype(np.int32)


def alibi_slopes(heads: int) -> np.ndarray:
    """The paper's slopes, float32 `[heads]`: a geometric sequence from 2^(-8/n); see Press et al. 2022 §3.

    For a number of heads that is no power of two it takes every second slope of the next power, as the
    authors' code does (ofirpress/attention_with_linear_biases, fairseq/models/transformer.py).
    """
    if heads < 1:
        raise InputError(f"alibi_slopes: heads is {heads}; it must be at least 1")
    power = 2 ** int(np.log2(heads))
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    more = 2.0 ** (-4.0 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([slopes, more]).astype(np.float32)


def as_bias(bias: AnyArray | Bias | None) -> Bias | None:
    """A bare array becomes `Dense`; a bias and None stay."""
    return bias if bias is None or isinstance(bias, Bias) else Dense(bias)


def _offset_mismatch(bias: Bucketed | ALiBi) -> str | None:
    if jnp.ndim(bias.offset):
        return f"{type(bias).__name__}.offset has shape {list(jnp.shape(bias.offset))}; it must be a scalar"
    return None


def _toeplitz(values: Array, rows: int, columns: int) -> Array:
    """`out[..., i, j] = values[..., j - i]`, negative indices from the end; values `[..., rows + columns]`.

    Repeating the row of length n and reading it with a stride of n - 1 shifts each row by one: only copies,
    where a gather of every element costs much more, and the transpose is a sum of the same kind.
    """
    length = values.shape[-1]
    repeated = jnp.broadcast_to(values[..., None, :], (*values.shape[:-1], rows, length))
    flat = repeated.reshape(*values.shape[:-1], rows * length)[..., : rows * (length - 1)]
    return flat.reshape(*values.shape[:-1], rows, length - 1)[..., :columns]


def _sum_to(array: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes that `shape` broadcasts."""
    axes = tuple(i for i, (have, want) in enumerate(zip(array.shape, shape)) if want == 1 and have != 1)
    return array.sum(axes, keepdims=True) if axes else array
