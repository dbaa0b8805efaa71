"""Sums: a trained offset on arrays of the backbone, which several methods are and differ in where."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .methods import LeafMethod, Variables


class Offset(LeafMethod):
    """`leaf + offset`, the offset at zero to start with.

    Training the offset or the array itself has the same gradients; the offset starts the model exactly
    where it was, decays towards the backbone and adds to other deltas.
    """

    alike: ClassVar[tuple[str, ...]] = ("offset",)

    def init(self, rng: jax.Array, leaf: jax.Array) -> Variables:
        """Zeros, in single precision at least: small steps vanish in a bfloat16 sum."""
        return {"offset": jnp.zeros(leaf.shape, offset_dtype(leaf))}

    def apply(self, variables: Variables, leaf: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """The sum, rounded to the array's own dtype."""
        return (leaf + variables["offset"]).astype(leaf.dtype)

    def unmerge(self, variables: Variables, leaf: jax.Array, path: str) -> jax.Array:
        """The difference."""
        return (leaf - variables["offset"]).astype(leaf.dtype)

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """The offset times `factor`."""
        return {**variables, "offset": variables["offset"] * factor}


def offset_dtype(leaf: jax.Array) -> Any:
    """The dtype of what is trained for `leaf`: its own, or float32 where that is shorter."""
    return jnp.promote_types(leaf.dtype, jnp.float32)
