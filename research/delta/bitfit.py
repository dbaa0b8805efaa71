"""BitFit: only the biases are tuned (Ben Zaken et al., 2022, arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from .methods import LeafMethod, Variables


@dataclass(frozen=True)
class BitFit(LeafMethod):
    """`bias + offset` for every `bias` that the model has below the address; the offset starts at zero.

    Training the offset or the bias itself has the same gradients; the offset starts the model exactly
    where it was, decays towards the backbone and adds to other deltas. Default position: the whole model.
    """

    name: ClassVar[str] = "bitfit"
    positions: ClassVar[tuple[str, ...]] = ("",)

    def accepts(self, path: str) -> bool:
        """Only arrays called `bias`."""
        return path.rpartition("/")[2] == "bias"

    def init(self, rng: jax.Array, leaf: jax.Array) -> Variables:
        """Zeros, in single precision at least: small steps vanish in a bfloat16 sum."""
        return {"offset": jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))}

    def apply(self, variables: Variables, leaf: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """The sum, rounded to the bias's own dtype."""
        return (leaf + variables["offset"]).astype(leaf.dtype)
