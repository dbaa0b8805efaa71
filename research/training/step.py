"""The train step: gradients of a loss, summed over micro-batches, and one update of the state.

    step = make_train_step(loss, optimizer)
    state, metrics = jax.jit(step, donate_argnums=0)(state, frozen, batch)

The step is pure and knows no mesh: shardings of what goes in and comes out decide where it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ... import InputError
from .loss_scale import NO_SCALING, Scaling, all_finite
from .objectives import Batch, Loss, LossSums
from .state import TrainState

Tree = Any
Metrics = Mapping[str, jax.Array]
TrainStep = Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    scaling: Scaling = NO_SCALING,
    average_decay: float = 0.0,
    gradient_shardings: Tree | None = None,
) -> TrainStep:
    """The pure function `(state, frozen, batch) -> (state, metrics)`.

    `gradient_shardings`, a tree like the trainable one, is ZeRO's second level. Metrics are scalars:
    the loss's means, `gradient_norm` (before clipping), `update_norm`, `weight`, `finite`, and under
    dynamic scaling `loss_scale` and `skipped_steps`.
    """

    def train_step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(state.seed), state.step)
        gradients, sums = summed_gradients(loss, accumulate)(state, frozen, batch, rng)
        if gradient_shardings is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, gradient_shardings)
        finite = all_finite((sums.total, gradients))
        updates, moments = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        new = replace(
            state,
            trainable=trainable,
            optimizer=moments,
            average=_moving_average(state.average, trainable, average_decay),
        )
        if scaling.dynamic:  # an overflowing step changes nothing but the scale
            new = jax.tree.map(lambda fresh, old: jnp.where(finite, fresh, old), new, state)
        scale = scaling.update(state.scale, finite)
        norms = {"gradient_norm": optax.tree.norm(gradients), "update_norm": optax.tree.norm(updates)}
        metrics = {**means(sums), **norms, "finite": finite}
        if scaling.dynamic:
            metrics |= {"loss_scale": scale.value, "skipped_steps": scale.skipped}
        return replace(new, step=state.step + 1, scale=scale), metrics

    return train_step


def summed_gradients(loss: Loss, accumulate: int) -> Callable[..., tuple[Tree, LossSums]]:
    """Gradients of the mean loss over a batch, computed in `accumulate` equal parts one after another.

    Parts weigh by their tokens, not equally, so the result does not depend on how rows fall into parts.
    """

    def scaled(trainable: Tree, frozen: Tree, batch: Batch, rng: jax.Array, scale: jax.Array) -> Any:
        sums = loss(trainable, frozen, batch, rng)
        return sums.total * scale.astype(sums.total.dtype), sums

    gradient = jax.grad(scaled, has_aux=True)

    def compute(state: TrainState, frozen: Tree, batch: Batch, rng: jax.Array) -> tuple[Tree, LossSums]:
        # Differentiate the sum over a fixed number rather than the sum: the scale of what flows back
        # must not grow with the batch, or float16 overflows. The exact weight divides at the end.
        size = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(batch))
        scale = state.scale.value / size
        if accumulate == 1:
            gradients, sums = gradient(state.trainable, frozen, batch, rng, scale)
        else:
            gradients, sums = _accumulated(gradient, accumulate, state, frozen, batch, rng, scale)
        factor = 1.0 / (scale * jnp.maximum(sums.weight, 1e-9))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients), sums

    return compute


def means(sums: LossSums) -> dict[str, jax.Array]:
    """Means by name, `loss` among them, and the `weight` they were taken over."""
    weight = jnp.maximum(sums.weight, 1e-9)
    metrics = {name: value / weight for name, value in sums.metrics.items()}
    return {"loss": sums.total / weight, **metrics, "weight": sums.weight}


def _accumulated(
    gradient: Callable,
    accumulate: int,
    state: TrainState,
    frozen: Tree,
    batch: Batch,
    rng: jax.Array,
    scale: jax.Array,
) -> tuple[Tree, LossSums]:
    parts = jax.tree.map(lambda leaf: _split_rows(leaf, accumulate), batch)

    def add(total: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        index, rows = part
        new = gradient(state.trainable, frozen, rows, jax.random.fold_in(rng, index), scale)
        return jax.tree.map(jnp.add, total, new), None

    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(gradient, state.trainable, frozen, first, rng, scale)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))[0]


def _split_rows(leaf: jax.Array, parts: int) -> jax.Array:
    """`[B, ...] -> [parts, B / parts, ...]`, every `parts`-th row to a part.

    Strided, so that a device that holds consecutive rows keeps its own rows in every part.
    """
    if leaf.shape[0] % parts:
        raise InputError(f"a batch of {leaf.shape[0]} rows does not divide into {parts} parts")
    return leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)


def _moving_average(average: Tree, trainable: Tree, decay: float) -> Tree:
    if not jax.tree.leaves(average):
        return average
    return jax.tree.map(lambda old, new: old * decay + new * (1 - decay), average, trainable)
