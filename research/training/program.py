"""A job compiled for a layout: the functions that make and change the state, and where their arrays lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from ...parallel.layout import Layout
from .config import TrainingConfig
from .job import Job
from .loss_scale import Scaling
from .objectives import Loss, LossSums
from .optimizers import make_optimizer
from .state import TrainState, create_state
from .step import make_train_step

Tree = Any


class Program(NamedTuple):
    """The functions of a run, compiled for where their arrays lie, and the frozen arrays placed there.

    `create()` makes the state before the first step, `abstract` is its shapes and shardings.
    """

    create: Callable[[], TrainState]
    step: jax.stages.Compiled
    abstract: Tree
    frozen: Tree


def build_program(job: Job, config: TrainingConfig, layout: Layout, scaling: Scaling) -> Program:
    """Compile the functions that make and change the state, with shardings in and out."""
    optimizer = make_optimizer(config.optimizer, config.steps)

    def create(rng: jax.Array, initial: Tree) -> TrainState:
        trainable = job.init(rng, initial)
        return create_state(trainable, optimizer, seed=config.seed, scaling=scaling, averaged=config.ema > 0)

    initial = job.frozen if job.initial is None else job.initial
    shapes = jax.eval_shape(create, jax.random.key(config.seed), initial)
    shardings = layout.state(shapes, job.axes)
    gradients = layout.gradients(shapes.trainable, job.axes) if layout.zero >= 2 else None
    step = make_train_step(
        held_in_rows(job.loss, layout),
        optimizer,
        accumulate=config.accumulate,
        scaling=scaling,
        average_decay=config.ema,
        gradient_shardings=gradients,
    )
    abstract = _abstract(shapes, shardings)
    frozen = jax.device_put(job.frozen, layout.parameters(job.frozen, job.axes))
    placed = layout.place(job.batches(0))
    batch = _abstract(placed, jax.tree.map(lambda leaf: leaf.sharding, placed))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated()))
    return Program(
        create=lambda: jax.jit(create, out_shardings=shardings)(jax.random.key(config.seed), initial),
        step=jitted.lower(abstract, frozen, batch).compile(),
        abstract=abstract,
        frozen=frozen,
    )


def held_in_rows(loss: Loss, layout: Layout) -> Loss:
    """`loss` with the embedded tokens held where their rows lie, see `Layout.activations`.

    Only Linen models have the hook `embedded`; for others nothing changes.
    """
    if layout.mesh.size == 1:
        return loss

    def hold(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        value = call(*args, **kwargs)
        return layout.activations(value) if context.module.name == "embedded" else value

    def held(
        trainable: Tree, frozen: Tree, batch: Mapping[str, jax.Array], rng: jax.Array | None
    ) -> LossSums:
        with nn.intercept_methods(hold):
            return loss(trainable, frozen, batch, rng)

    return held


def _abstract(shapes: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
