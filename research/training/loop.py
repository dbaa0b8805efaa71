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

import jax
import numpy as np

from ... import InputError
from ...models.axes import AxisTable
from ...parallel.layout import Layout
from ..study.records import MetricsLog
from ..study.runs import Run
from .checkpoints import Checkpoints
from .config import TrainingConfig
from .loss_scale import Scaling, scaling_for
from .metrics import Throughput
from .objectives import Loss
from .optimizers import make_optimizer
from .state import TrainState, create_state
from .step import TrainStep, make_train_step
from .stopping import interruption, out_of_patience, require_finite

logger = logging.getLogger(__name__)

Tree = Any
Evaluation = dict[str, float]
Report = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Job:
    """What is trained, on what.

    `init(rng, given)` makes the trained tree from the arrays `given` (the frozen ones unless set); it
    runs jitted, so nothing is ever on one device that is meant for many. `batches(step)` is the global batch of a step, as numpy arrays `[B, ...]`. `axes`
    names the axes of the trained tree; `evaluate(trainable, frozen)` returns means by name. Losses weigh
    by `unit`s, whose rate is reported; `flops_per_unit` is for MFU.
    """

    loss: Loss
    init: Callable[[jax.Array, Tree], Tree]
    batches: Callable[[int], Mapping[str, np.ndarray]]
    frozen: Tree = field(default_factory=dict)
    given: Tree | None = None
    axes: AxisTable | None = None
    evaluate: Callable[[Tree, Tree], Evaluation] | None = None
    unit: str = "tokens"
    flops_per_unit: float | None = None

    @property
    def start(self) -> Tree:
        """What `init` is given."""
        return self.frozen if self.given is None else self.given


class Outcome(NamedTuple):
    """The state at the end, all evaluations (each with its `step`), and why it ended early, if it did."""

    state: TrainState
    evaluations: list[Evaluation]
    stopped: str | None


class Program(NamedTuple):
    """The compiled functions of a run and where their arrays lie."""

    create: Callable[[jax.Array, Tree], TrainState]
    step: TrainStep
    abstract: Tree


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
    layout = layout or Layout.single()
    scaling = scaling_for(config.precision)
    if config.evaluate_every and job.evaluate is None:
        raise InputError(f"evaluate_every={config.evaluate_every}, but the job has nothing to evaluate with")
    program = build_program(job, config, layout, scaling)

    with ExitStack() as stack:
        checkpoints = stack.enter_context(_checkpoints(config, run)) if run else None
        state, evaluations = _start(program, job, config, checkpoints)
        start = int(state.step)
        if out_of_patience(evaluations, config):
            return Outcome(state, evaluations, _impatience(config))
        log = stack.enter_context(run.metrics(start)) if run else MetricsLog(None)
        stop = stack.enter_context(interruption())
        throughput = Throughput(job.unit, job.flops_per_unit, list(layout.mesh.devices.flat))
        recorder = Recorder(log, report, throughput, scaling)

        for step in range(start + 1, config.steps + 1):
            state, metrics = program.step(state, job.frozen, layout.place(job.batches(step - 1)))
            recorder.add(step, metrics)

            last = step == config.steps
            if step % config.log_every == 0 or step == start + 1 or last or stop:
                recorder.flush()
            evaluated = _due(step, config.evaluate_every, last) and job.evaluate is not None
            if evaluated:
                recorder.flush()
                evaluations.append(_evaluate(job, config, state, step, recorder))
            patience_over = evaluated and out_of_patience(evaluations, config)
            ending = last or bool(stop) or patience_over
            if checkpoints and (evaluated or ending or _due(step, config.checkpoint_every, last)):
                recorder.flush()
                _save(checkpoints, step, state, evaluations, evaluated, config)
                recorder.skip()
            if patience_over and not last:
                return Outcome(state, evaluations, _impatience(config))
            if stop and not last:
                logger.warning("%s: stopping after step %d%s", stop.signal, step, ", saved" if run else "")
                return Outcome(state, evaluations, stop.signal)
    return Outcome(state, evaluations, None)


def build_program(job: Job, config: TrainingConfig, layout: Layout, scaling: Scaling) -> Program:
    """Jit the functions that make and change the state, with shardings in and out."""
    optimizer = make_optimizer(config.optimizer, config.steps)

    def create(rng: jax.Array, given: Tree) -> TrainState:
        trainable = job.init(rng, given)
        return create_state(trainable, optimizer, seed=config.seed, scaling=scaling, averaged=config.ema > 0)

    shapes = jax.eval_shape(create, jax.random.key(config.seed), job.start)
    shardings = layout.state(shapes, job.axes)
    gradients = layout.gradients(shapes.trainable, job.axes) if layout.zero >= 2 else None
    step = make_train_step(
        job.loss,
        optimizer,
        accumulate=config.accumulate,
        scaling=scaling,
        average_decay=config.ema,
        gradient_shardings=gradients,
    )
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    return Program(
        create=jax.jit(create, out_shardings=shardings),
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
        abstract=abstract,
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


def _evaluate(
    job: Job, config: TrainingConfig, state: TrainState, step: int, recorder: Recorder
) -> Evaluation:
    assert job.evaluate is not None
    means = job.evaluate(state.evaluated, job.frozen)
    if config.best_name not in means:
        names = ", ".join(sorted(means))
        raise InputError(f"best_metric={config.best_metric!r} is not measured; the evaluation has {names}")
    recorder.evaluated(step, means)
    return {"step": step, **means}


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


def _impatience(config: TrainingConfig) -> str:
    return f"no better {config.best_name} for {config.patience} evaluations"


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
