"""Full tuning of chosen arrays: classifier heads, last layers, a linear probe, or everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from .methods import LeafMethod, Variables


@dataclass(frozen=True)
class Full(LeafMethod):
    """A trained copy of each addressed array, starting at the backbone's values.

    `{"classifier": Full()}` is a linear probe, `{"": Full()}` full tuning, `{"layers_{10-}": Full()}`
    tuning of the last layers. The copy is stored in full, so the delta is as large as what it replaces.
    """

    name: ClassVar[str] = "full"
    positions: ClassVar[tuple[str, ...]] = ("",)
    replaces: ClassVar[bool] = True
    alike: ClassVar[tuple[str, ...]] = ("value",)

    def init(self, rng: jax.Array, leaf: jax.Array) -> Variables:
        """The array's values, in memory of their own: an optimizer step may donate them."""
        return {"value": jnp.array(leaf, copy=True)}

    def apply(self, variables: Variables, leaf: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """The trained values."""
        return variables["value"].astype(leaf.dtype)
