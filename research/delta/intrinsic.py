"""SAID: all arrays moved by one short vector (Aghajanyan et al., 2021, arXiv 2012.13255)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ... import InputError
from .methods import LeafMethod, Variables
from .offsets import offset_dtype

# Numbers of an array that are made at a time: their intermediate values stay in a cache.
AT_ONCE = 1 << 16


@dataclass(frozen=True)
class SAID(LeafMethod):
    """`leaf + factor * P(vector)`, one `vector [dimension]` for all addressed arrays, a `factor` for each.

    The structure-aware intrinsic dimension: P is a Fastfood transform (`fastfood`) of its own for every
    array, made again from a stored seed whenever it is needed, so that only the vector, the factors and
    the seeds are kept. The vector starts at zero and the factors at one, so the model starts exactly where
    it was. `dimension` counts the vector; the paper's d counts the factors too. The paper has a factor for
    each layer, public code for it one for each array, as here; a stack of scanned layers is one array.
    Default position: the whole model. The default dimension is ours.
    """

    dimension: int = 1000

    name: ClassVar[str] = "said"
    positions: ClassVar[tuple[str, ...]] = ("",)

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise InputError(f"SAID dimension={self.dimension} must be at least 1")

    def shared(self, rng: jax.Array) -> Variables:
        """The vector, of zeros."""
        return {"vector": jnp.zeros(self.dimension, jnp.promote_types(jnp.float32, jnp.result_type(float)))}

    def init(self, rng: jax.Array, leaf: jax.Array) -> Variables:
        """The array's factor, one."""
        return {"factor": jnp.ones((), offset_dtype(leaf))}

    def state(self, rng: jax.Array, leaf: jax.Array, trained: Variables) -> Variables:
        """What the array's projection is made of."""
        return {"seed": jax.random.bits(rng, dtype=jnp.uint32)}

    def apply(self, variables: Variables, leaf: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """The sum, rounded to the array's own dtype."""
        return (leaf + self._difference(variables, leaf)).astype(leaf.dtype)

    def unmerge(self, variables: Variables, leaf: jax.Array, path: str) -> jax.Array:
        """The difference."""
        return (leaf - self._difference(variables, leaf)).astype(leaf.dtype)

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """The array's factor times `factor`; the shared vector stays."""
        return {name: each * factor if name == "factor" else each for name, each in variables.items()}

    def _difference(self, variables: Variables, leaf: jax.Array) -> jax.Array:
        made = fastfood(variables["vector"], variables["seed"], leaf.size)
        return (made * variables["factor"]).reshape(leaf.shape)


@partial(jax.jit, static_argnums=2)
def fastfood(vector: jax.Array, seed: jax.Array, size: int) -> jax.Array:
    """A random linear map of `vector [d]` to `[size]` that keeps its length on average.

    Blocks of `H G Π H B vector` (Le et al., 2013, "Fastfood", arXiv 1408.3060) of the least power of two
    that holds the vector: signs B, permutation Π, normal numbers G, and Hadamard transforms H, divided by
    their size. Public code for SAID pads the vector to the array's size and so makes one block of it. Random
    numbers are hashes of (seed, position): the same under every version and setting of JAX. A few blocks
    are made at a time, and nothing of them is kept for the backward pass.
    """
    width = 1 << (vector.size - 1).bit_length()
    blocks = -(-size // width)
    at_once = max(1, min(blocks, AT_ONCE // width))
    rounds = -(-blocks // at_once)
    padded = jnp.pad(vector, (0, width - vector.size))
    each = jax.checkpoint(partial(_blocks, padded, seed))
    made = jax.lax.map(each, jnp.arange(rounds * at_once, dtype=jnp.uint32).reshape(rounds, at_once))
    return made.reshape(-1)[:size] / math.sqrt(size / width)


def _blocks(vector: jax.Array, seed: jax.Array, block: jax.Array) -> jax.Array:
    """The blocks numbered `block [n]` of the map of a padded `vector [width]`, `[n, width]`."""
    width = vector.size
    position = block[:, None] * jnp.uint32(width) + jnp.arange(width, dtype=jnp.uint32)
    signs = jnp.where(_hash(position, seed, 0) >> 31, 1, -1).astype(vector.dtype)
    normal = _normal(position, seed).astype(vector.dtype)
    x = hadamard(signs * vector)
    x = hadamard(jnp.take_along_axis(x, permutations(seed, block, width), axis=1) * normal)
    return x / jnp.sqrt(width * jnp.square(normal).sum(1, keepdims=True))


def hadamard(x: jax.Array) -> jax.Array:
    """The Walsh-Hadamard transform of the last axis, whose length is a power of two; not normalised."""
    shape, half = x.shape, 1
    while half < shape[-1]:
        pairs = x.reshape(*shape[:-1], -1, 2, half)
        left, right = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([left + right, left - right], axis=-2).reshape(shape)
        half *= 2
    return x


def permutations(seed: jax.Array, block: jax.Array, width: int) -> jax.Array:
    """A permutation of `0 ... width - 1` for each number in `block [n]`, `[n, width]`.

    Rounds that are each invertible on numbers of log2(width) bits, keyed by the block; sorting, the uniform
    draw, would take most of a training step.
    """
    bits = (width - 1).bit_length()
    block = block[:, None]
    place = jnp.broadcast_to(jnp.arange(width, dtype=jnp.uint32), (block.size, width))
    for turn in range(4):
        place = place * (_hash(block, seed, 10 + 2 * turn) | 1) + _hash(block, seed, 11 + 2 * turn)
        place = place & jnp.uint32(width - 1)
        place = place ^ (place >> jnp.uint32(max(1, (bits + 1) // 2)))
    return place.astype(jnp.int32)


def _hash(position: jax.Array, seed: jax.Array, stream: int) -> jax.Array:
    """Random bits `uint32` by position."""
    return _mix(position ^ _mix(_mix(seed.astype(jnp.uint32)) + jnp.uint32(stream)))


def _mix(x: jax.Array) -> jax.Array:
    """The last step of MurmurHash3 (Appleby, public domain): an invertible mixing of 32 bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _normal(position: jax.Array, seed: jax.Array) -> jax.Array:
    """Standard normal numbers by position (Box and Muller, 1958)."""
    one, two = ((_hash(position, seed, i) >> 8).astype(jnp.float32) + 0.5 for i in (1, 2))
    radius = jnp.sqrt(-2 * jnp.log(one * 2**-24))
    return radius * jnp.cos(2 * math.pi * (two * 2**-24))
