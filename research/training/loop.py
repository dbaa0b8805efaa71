"""The training run: resume, step, evaluate, checkpoint, stop.

    outcome = train(job, config, run)

A run is a function of its job, its configuration and its seed. Batches depend on the step, randomness on
the seed and the step, so a run killed at any moment and started again gives the losses of one that was
not, bit for bit on the same mesh.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from ... import InputError
from ...parallel.layout import Layout
from ..study.records import MetricsLog
from ..study.runs import Run
from .checkpoints import Checkpoints
from .config import TrainingConfig
from .job import Evaluation, Job
from .loss_scale import scaling_for
from .memory import CompiledMemory, compiled_memory
from .metrics import Throughput
from .program import Program, build_program
from .recorder import Recorder, Report
from .state import TrainState
from .stopping import interruption, out_of_patience

logger = logging.getLogger(__name__)

Tree = Any


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


class Due(NamedTuple):
    """What is to be done after a step; what is evaluated or saved is recorded before."""

    record: bool
    evaluate: bool
    save: bool


def train(
    job: Job,
    config: TrainingConfig,
    run: Run | None = None,
    *,
    layout: Layout | None = None,
    report: Report | None = None,
    until: int | None = None,
    program: Program | None = None,
) -> Outcome:
    """Train for `config.steps` steps, or go on where `run` stopped.

    Without `run` nothing is written. `report(step, metrics)` is called for every step in order, some
    steps late. `until` is a step to pause after, evaluated and stored, from which `run` goes on another
    time. `program` is what `build_program` made of this job and configuration. Raises `NonFiniteLoss` with
    the step, the last good checkpoint kept.
    """
    if config.evaluate_every and job.evaluate is None:
        raise InputError(f"evaluate_every={config.evaluate_every}, but the job has nothing to evaluate with")
    layout = layout or Layout.single()
    scaling = scaling_for(config.precision)
    program = program or build_program(job, config, layout, scaling)
    last = config.steps if until is None else min(until, config.steps)

    with ExitStack() as stack:
        # Where an earlier attempt stopped
        checkpoints = stack.enter_context(_checkpoints(config, run)) if run else None
        state, evaluations = _start(program, checkpoints)
        first, stopped = int(state.step) + 1, _impatience(evaluations, config, job)

        # Who watches
        log = stack.enter_context(run.metrics(first - 1)) if run else MetricsLog(None)
        throughput = Throughput(job.unit, job.flops_per_unit, list(layout.mesh.devices.flat))
        recorder = Recorder(log, report, throughput, scaling)
        interrupted = stack.enter_context(interruption())

        for step in range(first, last + 1) if not stopped else ():
            state, metrics = program.step(state, program.frozen, layout.place(job.batches(step - 1)))
            recorder.add(step, metrics)

            signal = interrupted.agreed(at=step % config.log_every == 0)
            due = _due(step, first, last, config, job, signal)
            if due.record:
                recorder.flush()
            if due.evaluate:
                means = _evaluate(job, config, state.evaluated, program.frozen)
                recorder.evaluated(step, means)
                evaluations.append({"step": step, **means})
            if step < config.steps:
                stopped = signal or (_impatience(evaluations, config, job) if due.evaluate else None)
            if checkpoints and (due.save or stopped):
                counts = due.evaluate and step >= job.best_from
                _save(checkpoints, step, state, evaluations, counts, config)
                recorder.skip()
            if stopped:
                break

        best = _best(checkpoints, program, state) if checkpoints else state
    return Outcome(state, best, evaluations, stopped, compiled_memory(program.step))


def _due(step: int, first: int, last: int, config: TrainingConfig, job: Job, signal: str | None) -> Due:
    def every(count: int) -> bool:
        return step == last or (count > 0 and step % count == 0)

    evaluate = job.evaluate is not None and every(config.evaluate_every)
    save = evaluate or every(config.checkpoint_every)
    # The first step too: a user sees at once that it runs.
    record = save or step == first or every(config.log_every) or signal is not None
    return Due(record, evaluate, save)


@contextmanager
def _checkpoints(config: TrainingConfig, run: Run) -> Iterator[Checkpoints]:
    best = (config.best_name, config.best_mode) if config.evaluate_every else None
    with Checkpoints(run.checkpoints, keep=config.keep, best=best) as checkpoints:
        yield checkpoints


def _start(program: Program, checkpoints: Checkpoints | None) -> tuple[TrainState, list[Evaluation]]:
    """The state to go on from: the newest good checkpoint, or a fresh one."""
    restored = checkpoints.restore(program.abstract) if checkpoints else None
    if restored is None:
        return program.create(), []
    logger.info("resumed from the checkpoint after step %d", restored.step)
    return restored.state, list(restored.metadata["evaluations"])


def _evaluate(job: Job, config: TrainingConfig, trainable: Tree, frozen: Tree) -> Evaluation:
    assert job.evaluate is not None
    means = job.evaluate(trainable, frozen)
    if config.best_name not in means:
        names = ", ".join(sorted(means))
        raise InputError(f"best_metric={config.best_metric!r} is not measured; the evaluation has {names}")
    return means


def _best(checkpoints: Checkpoints, program: Program, state: TrainState) -> TrainState:
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
    counts: bool,
    config: TrainingConfig,
) -> None:
    metrics = {config.best_name: evaluations[-1][config.best_name]} if counts else None
    checkpoints.save(step, state, metadata={"evaluations": evaluations}, metrics=metrics)


def _impatience(evaluations: list[Evaluation], config: TrainingConfig, job: Job) -> str | None:
    counted = [means for means in evaluations if means["step"] >= job.best_from]
    if not out_of_patience(counted, config):
        return None
    return f"no better {config.best_name} for {config.patience} evaluations"
