"""The training run: resume, step, evaluate, checkpoint, stop.

    outcome = train(job, config, run)

A run is a function of its job, its configuration and its seed. Batches depend on the step, randomness on
the seed and the step, so a run killed at any moment and started again gives the losses of one that was
not, bit for bit on the same mesh.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from ... import InputError
from ...models.axes import AxisTable
from ...parallel.layout import Layout
from ..study.records import MetricsLog
from ..study.runs import Run
from .checkpoints import Checkpoints
from .config import TrainingConfig
from .evaluation import SumsOf
from .loss_scale import Scaling, scaling_for
from .memory import CompiledMemory, compiled_memory
from .metrics import Throughput
from .objectives import Loss, LossSums
from .optimizers import make_optimizer
from .state import TrainState, create_state
from .step import make_train_step
from .stopping import interruption, out_of_patience, require_finite

logger = logging.getLogger(__name__)

Tree = Any
Evaluation = dict[str, float]
Report = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Job:
    """What is trained, on what.

    `init(rng, given)` makes the trained tree from the arrays `given` (the frozen ones unless set); it
    runs jitted, so nothing is ever on one device that is meant for many. `batches(step)` is this process's
    part of the batch of a step, as numpy arrays `[B, ...]`. `axes` names the axes of the trained tree;
    `evaluate(trainable, frozen)` returns means by name, of what the jitted `sums_of` gives for a batch.
    Losses weigh by `unit`s, whose rate is reported; `flops_per_unit` is for MFU.
    """

    loss: Loss
    init: Callable[[jax.Array, Tree], Tree]
    batches: Callable[[int], Mapping[str, np.ndarray]]
    frozen: Tree = field(default_factory=dict)
    given: Tree | None = None
    axes: AxisTable | None = None
    evaluate: Callable[[Tree, Tree], Evaluation] | None = None
    sums_of: SumsOf | None = None
    unit: str = "tokens"
    flops_per_unit: float | None = None

    @property
    def start(self) -> Tree:
        """What `init` is given."""
        return self.frozen if self.given is None else self.given


class Outcome(NamedTuple):
    """How a run ended.

    The `state` after the last step, the `best` state by the configuration's metric (the last where
    nothing was stored on the way), all `evaluations` with their `step`, why it `stopped` early (None: it
    did not), and the `memory` that XLA says the step needs.
    """

    state: TrainState
    best: TrainState
    evaluations: list[Evaluation]
    stopped: str | None
    memory: CompiledMemory | None


class Program(NamedTuple):
    """The functions of a run, compiled for where their arrays lie, and the frozen arrays placed there."""

    create: Callable[[jax.Array, Tree], TrainState]
    step: jax.stages.Compiled
    abstract: Tree
    frozen: Tree


def train(
    job: Job,
    config: TrainingConfig,
    run: Run | None = None,
    *,
    layout: Layout | None = None,
    report: Report | None = None,
) -> Outcome:
    """Train for `config.steps` steps, or go on where `run` stopped.

    Without `run` nothing is written. `report(step, metrics)` is called for every step in order, some
    steps late. Raises `NonFiniteLoss` with the step, the last good checkpoint kept.
    """
    if config.evaluate_every and job.evaluate is None:
        raise InputError(f"evaluate_every={config.evaluate_every}, but the job has nothing to evaluate with")
    layout = layout or Layout.single()
    scaling = scaling_for(config.precision)
    program = build_program(job, config, layout, scaling)
    memory = compiled_memory(program.step)

    with ExitStack() as stack:
        checkpoints = stack.enter_context(_checkpoints(config, run)) if run else None
        state, evaluations = _start(program, job, config, checkpoints)
        start = int(state.step)
        stopped = _impatience(evaluations, config)
        log = stack.enter_context(run.metrics(start)) if run else MetricsLog(None)
        stop = stack.enter_context(interruption())
        throughput = Throughput(job.unit, job.flops_per_unit, list(layout.mesh.devices.flat))
        recorder = Recorder(log, report, throughput, scaling)

        for step in range(start + 1, config.steps + 1):
            if stopped:
                break
            state, metrics = program.step(state, program.frozen, layout.place(job.batches(step - 1)))
            recorder.add(step, metrics)

            last = step == config.steps
            evaluating = job.evaluate is not None and _due(step, config.evaluate_every, last)
            saving = checkpoints is not None and (evaluating or _due(step, config.checkpoint_every, last))
            signal = None if last else stop.signal  # read once: what is saved must have been flushed
            if evaluating or saving or signal or last or step == start + 1 or step % config.log_every == 0:
                recorder.flush()
            if evaluating:
                means = _evaluate(job, config, state.evaluated, program.frozen)
                recorder.evaluated(step, means)
                evaluations.append({"step": step, **means})
                stopped = None if last else _impatience(evaluations, config)
            stopped = signal or stopped
            if checkpoints and (saving or stopped):
                _save(checkpoints, step, state, evaluations, evaluating, config)
                recorder.skip()

        best = _best(checkpoints, program, state, config) if checkpoints else state
    return Outcome(state, best, evaluations, stopped, memory)


def build_program(job: Job, config: TrainingConfig, layout: Layout, scaling: Scaling) -> Program:
    """Compile the functions that make and change the state, with shardings in and out."""
    optimizer = make_optimizer(config.optimizer, config.steps)

    def create(rng: jax.Array, given: Tree) -> TrainState:
        trainable = job.init(rng, given)
        return create_state(trainable, optimizer, seed=config.seed, scaling=scaling, averaged=config.ema > 0)

    shapes = jax.eval_shape(create, jax.random.key(config.seed), job.start)
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
        create=jax.jit(create, out_shardings=shardings),
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


class Recorder:
    """Keeps metrics on the device until they are wanted, so that steps are dispatched without waiting.

    Nothing is evaluated or saved before every step so far was found finite.
    """

    def __init__(
        self, log: MetricsLog, report: Report | None, throughput: Throughput, scaling: Scaling
    ) -> None:
        self._log, self._report = log, report
        self._throughput, self._skips = throughput, scaling.dynamic
        self._pending: list[tuple[int, Mapping[str, jax.Array]]] = []

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Remember the metrics of `step`."""
        self._pending.append((step, metrics))

    def flush(self) -> None:
        """Wait for the pending steps, check them, and write them down with their mean rate."""
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        self._pending = []
        rates = self._throughput.read(sum(float(metrics["weight"]) for _, metrics in fetched))
        for step, metrics in fetched:
            require_finite(step, metrics, self._skips)
            values = {name: float(value) for name, value in metrics.items() if name != "finite"}
            self._log.append(step, values)
            if self._report:
                self._report(step, {**values, **rates})

    def evaluated(self, step: int, means: Mapping[str, float]) -> None:
        """Write down an evaluation; its time does not count as training."""
        self._log.append(step, {f"evaluation_{name}": value for name, value in means.items()})
        self.skip()

    def skip(self) -> None:
        """Leave out of the rate what was done since the last flush."""
        self._throughput.skip()


@contextmanager
def _checkpoints(config: TrainingConfig, run: Run) -> Iterator[Checkpoints]:
    best = (config.best_name, config.best_mode) if config.evaluate_every else None
    with Checkpoints(run.checkpoints, keep=config.keep, best=best) as checkpoints:
        yield checkpoints


def _start(
    program: Program, job: Job, config: TrainingConfig, checkpoints: Checkpoints | None
) -> tuple[TrainState, list[Evaluation]]:
    """The state to go on from: the newest good checkpoint, or a fresh one."""
    restored = checkpoints.restore(program.abstract) if checkpoints else None
    if restored is None:
        return program.create(jax.random.key(config.seed), job.start), []
    logger.info("resumed from the checkpoint after step %d", restored.step)
    return restored.state, list(restored.metadata["evaluations"])


def _evaluate(job: Job, config: TrainingConfig, trainable: Tree, frozen: Tree) -> Evaluation:
    assert job.evaluate is not None
    means = job.evaluate(trainable, frozen)
    if config.best_name not in means:
        names = ", ".join(sorted(means))
        raise InputError(f"best_metric={config.best_metric!r} is not measured; the evaluation has {names}")
    return means


def _best(
    checkpoints: Checkpoints, program: Program, state: TrainState, config: TrainingConfig
) -> TrainState:
    """The stored state with the best metric, the latest where no metric was stored."""
    step = checkpoints.best_step()
    if step is None or step == int(state.step):
        return state
    restored = checkpoints.restore(program.abstract, step)
    assert restored is not None
    return restored.state


def _save(
    checkpoints: Checkpoints,
    step: int,
    state: TrainState,
    evaluations: list[Evaluation],
    evaluated: bool,
    config: TrainingConfig,
) -> None:
    metrics = {config.best_name: evaluations[-1][config.best_name]} if evaluated else None
    checkpoints.save(step, state, metadata={"evaluations": evaluations}, metrics=metrics)


def _impatience(evaluations: list[Evaluation], config: TrainingConfig) -> str | None:
    if not out_of_patience(evaluations, config):
        return None
    return f"no better {config.best_name} for {config.patience} evaluations"


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
