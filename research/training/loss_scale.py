"""Dynamic loss scaling for float16 (Micikevicius et al., "Mixed Precision Training", 2018, section 3.2).

The loss is multiplied by a scale so that small gradients stay above float16's smallest number. A step
whose gradients overflow is skipped and halves the scale, down to 1: what overflows there is not the
scale's doing. `growth_interval` good steps double it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

SMALLEST = 1.0


@struct.dataclass
class LossScale:
    """The scale now, good steps since it last changed, and steps skipped so far (scalars)."""

    value: jax.Array
    good: jax.Array
    skipped: jax.Array


@dataclass(frozen=True)
class Scaling:
    """How the scale moves; `initial` 1 and `growth_interval` 0 switch it off."""

    initial: float = 1.0
    growth_interval: int = 0
    largest: float = 2.0**24

    @property
    def dynamic(self) -> bool:
        """Whether overflowing steps are skipped."""
        return self.growth_interval > 0

    def init(self) -> LossScale:
        """The state before the first step."""
        # Three arrays: a train step that donates its state may not be given one buffer twice.
        good, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return LossScale(jnp.asarray(self.initial, jnp.float32), good, skipped)

    def update(self, scale: LossScale, finite: jax.Array) -> LossScale:
        """The state after a step whose gradients were `finite` or not."""
        if not self.dynamic:
            return scale
        grow = finite & (scale.good + 1 >= self.growth_interval)
        raised = jnp.minimum(scale.value * 2, self.largest)
        lowered = jnp.maximum(scale.value / 2, SMALLEST)
        value = jnp.where(finite, jnp.where(grow, raised, scale.value), lowered)
        good = jnp.where(finite & ~grow, scale.good + 1, 0)
        return LossScale(value, good, scale.skipped + jnp.where(finite, 0, 1))


NO_SCALING = Scaling()
DYNAMIC_SCALING = Scaling(initial=2.0**15, growth_interval=2000)


def scaling_for(precision: str) -> Scaling:
    """Dynamic for `fp16`; the other precisions have float32's range and need none."""
    return DYNAMIC_SCALING if precision == "fp16" else NO_SCALING


def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is finite, a scalar boolean."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all() if leaves else jnp.asarray(True)
