"""Tuning a trained model to a task, as runs: train, keep the best by the dev split, measure, store.

What is stored is what was trained: a delta folder for a delta, a model folder for full tuning. Runs of one
task at several learning rates and seeds share their compiled programs (`Tuner`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from ... import InputError
from ...models.heads import ClassifierHead
from ...models.model import Params
from ...models.placement import placed
from ...models.transformer import Transformer
from ...parallel.batches import on_host
from ...parallel.layout import Layout
from ...parallel.processes import is_main
from ..data.batches import Rows
from ..data.examples import Examples
from ..data.tokenizers import Tokenizer
from ..delta import Spec, Tuned, as_transformer, attach, load_delta, read_header, save_delta
from ..delta.summary import parameter_count
from ..study.runs import TREE, Run, write_atomically
from .config import TrainingConfig
from .evaluation import SumsOf, make_evaluation
from .job import Evaluation, Job, Wrap
from .loop import Outcome, train
from .loss_scale import scaling_for
from .model_folder import TrainedModel, save_model, with_classifier
from .objectives import Forward, Loss, classification, delta_tuning, inputs_of, language_modelling
from .program import build_program
from .recorder import Report
from .tasks import evaluation_of, tuning_job

DELTA, MODEL = "delta", "model"
Kind = Literal["classification", "text-to-text"]
LOSSES: Mapping[Kind, tuple[Callable[[Forward], Loss], str]] = {
    "classification": (classification, "examples"),
    "text-to-text": (language_modelling, "tokens"),
}
"""By kind of task its loss, and what that weighs by."""
Settle = Callable[[Tuned, Mapping[str, Any]], tuple[Tuned, Mapping[str, Any]]]


@dataclass(frozen=True)
class ClassificationRows:
    """Encoded examples of the three splits, and what their labels are called."""

    train: Examples
    dev: Examples
    test: Examples | None
    labels: tuple[Any, ...]


@dataclass(frozen=True)
class TuningTask:
    """What is tuned: a model from its parameters by `spec` (None: all of them), on the rows of each split.

    `rows` has `train`, `dev` and perhaps `test`; `notes` are JSON that is stored with what was trained, the
    `labels` of a classifier among them; `tokenizer` is stored with a whole model. `wrap` is what a method
    adds to the optimizer; `settle(tuned, variables)` makes of a trained delta what is measured and stored,
    which is of step `best_from` or later.
    """

    model: Transformer
    params: Params
    spec: Spec | None
    rows: Mapping[str, Rows]
    kind: Kind = "classification"
    notes: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | Path | None = None
    wrap: Wrap | None = None
    settle: Settle | None = None
    best_from: int = 0

    def tuned(self) -> Tuned | None:
        """The model with its deltas; None where all parameters are tuned."""
        return None if self.spec is None else attach(self.model, self.spec)

    def untrained(self) -> tuple[Tuned, Mapping[str, Any]]:
        """The delta before any training as it would be stored: what may refuse it is asked early."""
        tuned = attach(self.model, self.spec or {})
        row = {name: jax.numpy.asarray(array)[None] for name, array in self.rows["train"][0].items()}
        variables = tuned.init(jax.random.key(0), self.params, row["tokens"], **inputs_of(row))
        return (tuned, variables) if self.settle is None else self.settle(tuned, variables)

    def job(self, config: TrainingConfig, layout: Layout, sums_of: SumsOf | None = None) -> Job:
        """What the training loop is to do."""
        loss_of, unit = LOSSES[self.kind]
        return tuning_job(
            self.model,
            self.params,
            self.tuned(),
            self.rows["train"],
            config,
            layout=layout,
            loss_of=loss_of,
            unit=unit,
            evaluation=self.rows["dev"],
            sums_of=sums_of,
            wrap=self.wrap,
            best_from=self.best_from,
        )


Measure = Callable[["TuningTask", Callable[[], tuple[Any, Params]]], Mapping[str, float]]
"""Measurements by name of a task and its tuned model, which the function gives with its parameters."""


class Tuner:
    """Trains runs of one task at any learning rate, with any seed, through one compiled step.

    The tasks given may differ in the values of their parameters (a new classifier for each seed) and in
    nothing else.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._step: jax.stages.Compiled | None = None
        self._sums_of: SumsOf | None = None

    def train(
        self,
        run: Run,
        task: TuningTask,
        config: TrainingConfig,
        *,
        until: int | None = None,
        report: Report | None = None,
    ) -> Outcome:
        """Train `run`, or go on with it, up to step `until` (None: to its end)."""
        job = task.job(config, self.layout, self._sums_of)
        scaling = scaling_for(config.precision)
        program = build_program(job, config, self.layout, scaling, any_rate=True, step=self._step)
        self._step, self._sums_of = program.step, job.sums_of
        return train(job, config, run, layout=self.layout, report=report, until=until, program=program)

    def finish(
        self,
        run: Run,
        task: TuningTask,
        config: TrainingConfig,
        outcome: Outcome,
        measure: Measure | None = None,
    ) -> None:
        """Store what was trained best, and finish the run with what was measured of it.

        `measure` gives further measurements of the tuned model.
        """
        finish_run(run, task, task.job(config, self.layout, self._sums_of), outcome, self.layout, measure)


def finish_run(
    run: Run,
    task: TuningTask,
    job: Job,
    outcome: Outcome,
    layout: Layout,
    measure: Measure | None = None,
) -> None:
    """Store what was trained and finish `run`.

    The result has `dev_*` and `test_*` means at the best step by the dev split, `trained_parameters`,
    `stored_bytes` of what the task needs beside the backbone, and `memory_*` bytes of the compiled step.
    """
    best, memory = outcome.best, outcome.memory
    trained = on_host(best.evaluated)
    delta = _settled(task, trained, job)
    dev: Evaluation = next(means for means in outcome.evaluations if means["step"] == int(best.step))
    result: dict[str, Any] = {
        "best_step": dev["step"],
        **_measured(task, job, best.evaluated, dev, delta, layout),
    }
    if measure is not None:
        result |= measure(task, (lambda: (task.model, trained)) if delta is None else delta.plain)
    if is_main():
        stored = _store(run.folder, task, trained, delta)
        result["stored_bytes"] = sum(file.stat().st_size for file in stored.rglob("*") if file.is_file())
    run.finish(
        result
        | {
            "trained_parameters": parameter_count(best.trainable),
            "memory_total": memory and memory.total,
            "memory_arguments": memory and memory.arguments,
            "memory_temporaries": memory and memory.temporaries,
        }
    )


def tune_classifier(
    run: Run,
    model: Transformer,
    params: Params,
    spec: Spec | None,
    rows: ClassificationRows,
    config: TrainingConfig,
    *,
    layout: Layout,
    report: Report | None = None,
    tokenizer: Tokenizer | None = None,
) -> Outcome | None:
    """Tune a classifier in one run of its own, and finish it as `finish_run` does.

    Returns None where the run was finished before.
    """
    if run.state == "finished":
        return None
    assert isinstance(model.head, ClassifierHead)
    splits = {"train": rows.train, "dev": rows.dev} | ({"test": rows.test} if rows.test else {})
    notes = {"labels": list(rows.labels), "pooling": model.head.pooling}
    task = TuningTask(model, params, spec, splits, notes=notes, tokenizer=tokenizer)
    job = task.job(config, layout)
    outcome = train(job, config, run, layout=layout, report=report)
    if not (outcome.stopped and outcome.stopped.startswith("SIG")):
        finish_run(run, task, job, outcome, layout)
    return outcome


class LoadedDelta(NamedTuple):
    """A stored delta on its backbone: the tuned model, its variables, the parameters, the stored notes."""

    tuned: Tuned
    variables: dict[str, Any]
    params: Params
    notes: Mapping[str, Any]

    @property
    def frozen(self) -> dict[str, Any]:
        """What training does not change, as `objectives.delta_tuning` takes it."""
        return {"params": self.params, "delta_state": self.variables["delta_state"]}

    def plain(self) -> tuple[Any, Params]:
        """The tuned model and its parameters, for code that knows nothing of deltas, such as `generate`."""
        return as_transformer(self.tuned, self.variables, self.params)


def load_tuned(folder: Path, model: Transformer, params: Params) -> LoadedDelta:
    """The delta in `folder` on its backbone, which gets a classifier where the delta has one."""
    notes = read_header(folder).get("notes", {})
    if notes.get("kind", "classification") == "classification":
        if missing := sorted({"labels", "pooling"} - set(notes)):
            raise InputError(
                f"{folder}: its notes have no {missing[0]!r}; `modicum tune` stores it with a classifier"
            )
        head = ClassifierHead(len(notes["labels"]), notes["pooling"])
        model, params = with_classifier(TrainedModel(model, params), head, seed=0)
    tuned, variables = load_delta(folder, model, params)
    return LoadedDelta(tuned, variables, params, notes)


def _settled(task: TuningTask, trained: Any, job: Job) -> LoadedDelta | None:
    """The trained delta as it is stored; None where all parameters were trained."""
    if (tuned := task.tuned()) is None:
        return None
    variables: Mapping[str, Any] = {"delta": trained, "delta_state": job.frozen["delta_state"]}
    if task.settle is not None:
        tuned, variables = task.settle(tuned, variables)
    return LoadedDelta(tuned, dict(variables), task.params, task.notes)


def _measured(
    task: TuningTask, job: Job, best: Any, dev: Evaluation, delta: LoadedDelta | None, layout: Layout
) -> dict[str, float]:
    """Means of the dev and test splits; where the delta was settled, of what that made of it."""
    assert job.sums_of is not None
    sums_of, frozen, means = job.sums_of, job.frozen, dict(dev)
    if delta is not None and task.settle is not None:
        best, frozen = delta.variables["delta"], delta.frozen
        loss = LOSSES[task.kind][0](delta_tuning(delta.tuned))
        sums_of = make_evaluation(placed(loss, layout))
    frozen = jax.device_put(frozen, layout.parameters(frozen, job.axes))
    if task.settle is not None:
        evaluated = evaluation_of(sums_of, task.rows["dev"], layout)
        means = evaluated(best, frozen) if evaluated else means
    result = {f"dev_{metric}": value for metric, value in means.items() if metric != "step"}
    if (test := evaluation_of(sums_of, task.rows.get("test"), layout)) is not None:
        result |= {f"test_{metric}": value for metric, value in test(best, frozen).items()}
    return result


def _store(folder: Path, task: TuningTask, trained: Params, delta: LoadedDelta | None) -> Path:
    if delta is None:
        labels = task.notes.get("labels", ())
        save_model(
            folder / MODEL, task.model, trained, labels=labels, tokenizer=task.tokenizer, notes=task.notes
        )
        return folder / MODEL
    write_atomically(folder / TREE, f"{delta.tuned.tree(delta.params, delta.variables)}\n")
    return save_delta(folder / DELTA, delta.tuned, delta.variables, delta.params, notes=task.notes)
