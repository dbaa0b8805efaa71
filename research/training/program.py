"""A job compiled for a layout: the functions that make and change the state, and where their arrays lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax

from ...parallel.layout import Layout
from .config import TrainingConfig
from .job import Job
from .loss_scale import Scaling
from .objectives import Loss, LossSums
from .optimizers import make_optimizer
from .rates import set_rate, with_rate_argument
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


def build_program(
    job: Job,
    config: TrainingConfig,
    layout: Layout,
    scaling: Scaling,
    *,
    any_rate: bool = False,
    step: jax.stages.Compiled | None = None,
) -> Program:
    """Compile the functions that make and change the state, with shardings in and out.

    With `any_rate` the learning rate lies in the state: the compiled step of such a program may be given as
    `step` to another one that differs in learning rate, seed and values only, and nothing is compiled again.
    """
    unit = replace(config.optimizer, learning_rate=1.0) if any_rate else config.optimizer
    optimizer = make_optimizer(unit, config.steps)
    optimizer = with_rate_argument(optimizer) if any_rate else optimizer
    optimizer = job.wrap(optimizer, config.steps) if job.wrap else optimizer

    def create(rng: jax.Array, initial: Tree) -> TrainState:
        trainable, averaged = job.init(rng, initial), config.ema > 0
        state = create_state(trainable, optimizer, seed=config.seed, scaling=scaling, averaged=averaged)
        return set_rate(state, config.optimizer.learning_rate) if any_rate else state

    initial = job.frozen if job.initial is None else job.initial
    shapes = jax.eval_shape(create, jax.random.key(config.seed), initial)
    shardings = layout.state(shapes, job.axes)
    abstract = _abstract(shapes, shardings)
    frozen = jax.device_put(job.frozen, layout.parameters(job.frozen, job.axes))
    return Program(
        create=lambda: jax.jit(create, out_shardings=shardings)(jax.random.key(config.seed), initial),
        step=step or _compiled(job, config, layout, scaling, optimizer, abstract, frozen),
        abstract=abstract,
        frozen=frozen,
    )


def _compiled(
    job: Job,
    config: TrainingConfig,
    layout: Layout,
    scaling: Scaling,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    frozen: Tree,
) -> jax.stages.Compiled:
    """The train step, for states like `abstract`."""
    gradients = layout.gradients(abstract.trainable, job.axes) if layout.zero >= 2 else None
    step = make_train_step(
        held_in_rows(job.loss, layout),
        optimizer,
        accumulate=config.accumulate,
        scaling=scaling,
        average_decay=config.ema,
        gradient_shardings=gradients,
    )
    placed = layout.place(job.batches(0))
    batch = _abstract(placed, jax.tree.map(lambda leaf: leaf.sharding, placed))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated()))
    return jitted.lower(abstract, frozen, batch).compile()


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
