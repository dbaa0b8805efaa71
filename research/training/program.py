"""A job compiled for a layout: the functions that make and change the state, and where their arrays lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import optax

from ...models.placement import placed
from ...parallel.layout import Layout
from .config import TrainingConfig
from .job import Job
from .loss_scale import Scaling
from .offload import fetching, in_host_memory
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
    initial = job.frozen if job.initial is None else job.initial
    create, optimizer, abstract = _state(job, config, layout, scaling, any_rate)
    frozen = jax.device_put(job.frozen, layout.parameters(job.frozen, job.axes))
    if step is None:
        placed_batch = layout.place(job.batches(0))
        batch = _abstract(placed_batch, jax.tree.map(lambda leaf: leaf.sharding, placed_batch))
        step = _lowered(job, config, layout, scaling, optimizer, abstract, frozen, batch).compile()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return Program(
        create=lambda: jax.jit(create, out_shardings=shardings)(jax.random.key(config.seed), initial),
        step=step,
        abstract=abstract,
        frozen=frozen,
    )


def lower_step(
    job: Job, config: TrainingConfig, layout: Layout, scaling: Scaling, batch: Mapping[str, Any]
) -> jax.stages.Lowered:
    """The train step of `build_program`, traced for a `batch` of shapes: only to be compiled.

    The devices of the layout need not be there, nor the arrays of `job.frozen`, which may be shapes.
    """
    _, optimizer, abstract = _state(job, config, layout, scaling, any_rate=False)
    frozen = _abstract(job.frozen, layout.parameters(job.frozen, job.axes))
    rows = _abstract(batch, layout.batch(batch))
    return _lowered(job, config, layout, scaling, optimizer, abstract, frozen, rows)


def _state(
    job: Job, config: TrainingConfig, layout: Layout, scaling: Scaling, any_rate: bool
) -> tuple[Callable[[jax.Array, Tree], TrainState], optax.GradientTransformation, TrainState]:
    """What makes the state, the optimizer, and the state's shapes and shardings."""
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
    shardings = in_host_memory(shardings, shapes) if config.offload else shardings
    return create, optimizer, _abstract(shapes, shardings)


def _lowered(
    job: Job,
    config: TrainingConfig,
    layout: Layout,
    scaling: Scaling,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    frozen: Tree,
    batch: Tree,
) -> jax.stages.Lowered:
    """The train step, for states like `abstract` and batches like `batch`."""
    gradients = layout.gradients(abstract.trainable, job.axes) if layout.zero >= 2 else None
    step = make_train_step(
        placed(job.loss, layout),
        optimizer,
        accumulate=config.accumulate,
        scaling=scaling,
        average_decay=config.ema,
        gradient_shardings=gradients,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = fetching(step, shardings) if config.offload else step
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated()))
    return jitted.lower(abstract, frozen, batch)


def _abstract(shapes: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
