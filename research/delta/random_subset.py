"""Offsets on a few numbers of an array: chosen at random, or by something else that has chosen them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ... import InputError
from .methods import LeafMethod, Variables
from .offsets import offset_dtype


@dataclass(frozen=True)
class SparseOffset(LeafMethod):
    """`leaf + offset` at the positions `index [k]` of the flattened array, which have been chosen already.

    What a projection leaves (`diff_pruning.project`): 8 bytes are stored for each number. It chooses
    nothing itself, so it cannot be initialised. It has no default position.
    """

    name: ClassVar[str] = "sparse_offset"
    positions: ClassVar[tuple[str, ...]] = ()

    def init(self, rng: jax.Array, leaf: jax.Array) -> Variables:
        """Refused: its positions are the result of another method."""
        raise InputError(
            "SparseOffset has no positions of its own: it is what diff_pruning.project returns; "
            "RandomSubset(fraction) draws them"
        )

    def apply(self, variables: Variables, leaf: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """The array with the chosen numbers moved, each sum rounded to the array's dtype."""
        return _moved(leaf, variables["index"], variables["offset"])

    def unmerge(self, variables: Variables, leaf: jax.Array, path: str) -> jax.Array:
        """The array with the chosen numbers moved back."""
        return _moved(leaf, variables["index"], -variables["offset"])

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """The offsets times `factor`."""
        return {**variables, "offset": variables["offset"] * factor}


@dataclass(frozen=True)
class RandomSubset(SparseOffset):
    """Offsets on a share of each array's numbers, drawn once without replacement and then kept.

    The random mask beside which Sung et al. (2021, arXiv 2111.09839) put theirs, of the same share chosen by
    Fisher information; their 0.5% is the default. It is of every addressed array, rounded, at least one
    number; `count`, where given, is the number itself. With a layer range the rows of a stack are one
    array. The positions are stored with the delta. Default position: the whole model.
    """

    fraction: float = 0.005
    count: int | None = None

    name: ClassVar[str] = "random_subset"
    positions: ClassVar[tuple[str, ...]] = ("",)

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise InputError(f"random subset fraction={self.fraction} must be above 0 and at most 1")
        if self.count is not None and self.count < 1:
            raise InputError(f"random subset count={self.count} must be at least 1")

    def init(self, rng: jax.Array, leaf: jax.Array) -> Variables:
        """Zeros `[k]`; raises `InputError` for an array of fewer than `count` numbers."""
        count = max(1, round(self.fraction * leaf.size)) if self.count is None else self.count
        if count > leaf.size or leaf.size > jnp.iinfo(jnp.int32).max:
            raise InputError(
                f"random subset: {count} positions of an array {leaf.shape} of {leaf.size} numbers; "
                f"at most all, and arrays of fewer than 2**31"
            )
        return {"offset": jnp.zeros(count, offset_dtype(leaf))}

    def state(self, rng: jax.Array, leaf: jax.Array, trained: Variables) -> Variables:
        """The positions `[k]` in the flattened array, ascending."""
        drawn = jax.random.choice(rng, leaf.size, trained["offset"].shape, replace=False)
        return {"index": jnp.sort(drawn).astype(jnp.int32)}


def _moved(leaf: jax.Array, index: jax.Array, offset: jax.Array) -> jax.Array:
    flat = leaf.reshape(-1)
    # The sum is made of the chosen numbers alone: a short array has no copy in single precision.
    changed = (flat[index] + offset).astype(leaf.dtype)
    return flat.at[index].set(changed, unique_indices=True, indices_are_sorted=True).reshape(leaf.shape)
