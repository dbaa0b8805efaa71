"""`TrainState`: everything that a checkpoint holds, and nothing of the backbone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from .loss_scale import NO_SCALING, LossScale, Scaling

Tree = Any


@struct.dataclass
class TrainState:
    """What changes from step to step.

    `step` counts finished updates; randomness is a function of `seed` and `step`, so a resumed run draws
    what the uninterrupted one would have drawn. `average` is the moving average of `trainable`, or
    empty.
    """

    step: jax.Array
    seed: jax.Array
    trainable: Tree
    optimizer: optax.OptState
    scale: LossScale
    average: Tree

    @property
    def evaluated(self) -> Tree:
        """The parameters to evaluate: the average where there is one."""
        return self.average if jax.tree.leaves(self.average) else self.trainable


def create_state(
    trainable: Tree,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    scaling: Scaling = NO_SCALING,
    averaged: bool = False,
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        trainable=trainable,
        optimizer=optimizer.init(trainable),
        scale=scaling.init(),
        average=jax.tree.map(jnp.copy, trainable) if averaged else {},
    )
