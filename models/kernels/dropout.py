"""Dropout of attention weights whose mask is a function of indices: every backend computes the same bits.

A kernel that works by tiles makes the mask again in its backward pass, in tiles of another shape, so the
mask must follow from the indices alone. Two hashes, one a row and one a column of the score matrix, are
mixed for each pair; nothing but 32-bit xor, shift and multiplication, which all backends have.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from ... import InputError
from .spans import Span
from .trees import AnyArray, structural

_RESOLUTION = 1 << 24  # rates are multiples of 2^-24: what is compared fits a signed integer


@structural
class Dropout:
    """Each weight is zero with probability `rate` and otherwise divided by `1 - rate`; `seed` is a uint32.

    The other fields are the indices of the first batch row, head, query and key of the call, for one that
    computes a part of a larger attention, e.g. on one device of many: an int, or an int32 that is traced.
    """

    rate: float
    seed: AnyArray
    batch: int | AnyArray = 0
    head: int | AnyArray = 0
    query: int | AnyArray = 0
    key: int | AnyArray = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rate, (int, float)) or not 0 <= self.rate < 1:
            raise InputError(f"Dropout.rate is {self.rate!r}; it must be a number of at least 0 and below 1")
        object.__setattr__(self, "rate", float(self.rate))

    @classmethod
    def of(cls, rate: float, rng: Array) -> "Dropout":
        """Dropout with the seed that a JAX random key gives."""
        return cls(rate, jax.random.bits(rng, (), jnp.uint32))

    def keep(self, batch: Span, heads: Span, rows: Span, columns: Span) -> Array:
        """Whether the weight of each pair stays, bool `[b, h, t, s]`."""
        b, h = batch.indices()[:, None, None, None], heads.indices()[:, None, None]
        return self.keep_at(b, h, rows.indices()[:, None], columns.indices())

    def keep_at(self, batch: AnyArray, head: AnyArray, row: AnyArray, column: AnyArray) -> Array:
        """The same for index arrays that broadcast, in any shapes."""
        return kept(self.rate, *self.hashes(batch, head, row, column))

    def hashes(self, batch: AnyArray, head: AnyArray, row: AnyArray, column: AnyArray) -> tuple[Array, Array]:
        """Of rows, and of columns: all that `kept` needs of the indices, uint32."""
        seed = jnp.asarray(self.seed).astype(jnp.uint32)
        plane = _mix(seed ^ _unsigned(batch + self.batch) * jnp.uint32(0x9E3779B9))
        plane = _mix(plane ^ _unsigned(head + self.head) * jnp.uint32(0x85EBCA6B))
        of_row = _mix(plane ^ _unsigned(row + self.query) * jnp.uint32(0xC2B2AE35))
        of_column = _mix(plane + _unsigned(column + self.key) * jnp.uint32(0x27D4EB2F))
        return of_row, of_column

    def cut(self, rows: Span, columns: Span) -> "Dropout":
        """The dropout of these queries and keys alone, counted from 0."""
        return dataclasses.replace(self, query=self.query + rows.start, key=self.key + columns.start)

    def mismatch(self) -> str | None:
        """Why the arrays are not of the form they must have, or None."""
        if jnp.shape(self.seed) or not jnp.issubdtype(jnp.result_type(self.seed), jnp.integer):
            found = f"{jnp.result_type(self.seed)}{list(jnp.shape(self.seed))}"
            return f"Dropout.seed is {found}; it must be a scalar of type uint32"
        for name in ("batch", "head", "query", "key"):
            if jnp.shape(getattr(self, name)):
                return f"Dropout.{name} has shape {list(jnp.shape(getattr(self, name)))}; it must be a scalar"
        return None


def kept(rate: float, of_row: Array, of_column: Array) -> Array:
    """Whether a weight stays, from the hashes of its row and its column."""
    bits = _mix(of_row ^ of_column)
    return (bits >> jnp.uint32(8)).astype(jnp.int32) >= round(rate * _RESOLUTION)


def _unsigned(index: AnyArray) -> Array:
    return jnp.asarray(index).astype(jnp.uint32)


def _mix(x: Array) -> Array:
    """A bijection of 32 bits in which each input bit flips each output bit about half the time.

    The constants of least bias that Wellons found for two multiplications ("Prospecting for hash
    functions", 2018, nullprogram.com/blog/2018/07/31).
    """
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))
