"""Tuning a classifier, as one run: train, keep the best by the dev split, measure, store.

What is stored is what was trained: a delta folder for a delta, a model folder for full tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ... import InputError
from ...models.heads import ClassifierHead
from ...models.model import Params
from ...models.transformer import Transformer
from ...parallel.batches import on_host
from ...parallel.layout import Layout
from ...parallel.processes import is_main
from ..data.examples import Examples
from ..data.tokenizers import Tokenizer
from ..delta import Spec, Tuned, attach, load_delta, read_header, save_delta
from ..delta.summary import parameter_count
from ..study.runs import Run
from .config import TrainingConfig
from .job import Job
from .loop import Outcome, train
from .model_folder import TrainedModel, save_model, with_classifier
from .recorder import Report
from .tasks import classification_job, evaluation_of

DELTA, MODEL = "delta", "model"


@dataclass(frozen=True)
class ClassificationRows:
    """Encoded examples of the three splits, and what their labels are called."""

    train: Examples
    dev: Examples
    test: Examples | None
    labels: tuple[Any, ...]


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
    """Tune `model` from `params` by `spec` (None: all parameters) and finish `run` with what was measured.

    The result has `dev_*` and `test_*` means at the best step by the dev split, `trained_parameters`,
    `stored_bytes` of what the task needs beside the backbone, and `memory_*` bytes of the compiled step.
    Returns None where the run was finished before.
    """
    if run.state == "finished":
        return None
    tuned = None if spec is None else attach(model, spec)
    job = classification_job(model, params, tuned, rows.train, config, layout=layout, evaluation=rows.dev)
    outcome = train(job, config, run, layout=layout, report=report)
    if outcome.stopped and outcome.stopped.startswith("SIG"):
        return outcome
    result = _measure(outcome, job, rows, layout)
    trained = on_host(outcome.best.evaluated)
    if is_main():
        stored = _store(run.folder, model, params, tuned, trained, rows.labels, job, tokenizer)
        result["stored_bytes"] = sum(file.stat().st_size for file in stored.rglob("*") if file.is_file())
    run.finish(result)
    return outcome


def load_tuned(folder: Path, trained: TrainedModel) -> tuple[Tuned, dict[str, Any], Params, tuple[Any, ...]]:
    """A stored delta on its backbone: the tuned model, its variables, the parameters, the labels."""
    notes = read_header(folder).get("notes", {})
    if missing := sorted({"labels", "pooling"} - set(notes)):
        raise InputError(
            f"{folder}: its notes have no {missing[0]!r}; `modicum tune` stores it with a classifier's delta"
        )
    labels = tuple(notes["labels"])
    model, params = with_classifier(trained, ClassifierHead(len(labels), notes["pooling"]), seed=0)
    tuned, variables = load_delta(folder, model, params)
    return tuned, variables, params, labels


def _measure(outcome: Outcome, job: Job, rows: ClassificationRows, layout: Layout) -> dict[str, Any]:
    best, memory = outcome.best, outcome.memory
    dev = next(means for means in outcome.evaluations if means["step"] == int(best.step))
    result: dict[str, Any] = {"best_step": dev["step"]}
    result |= {f"dev_{metric}": value for metric, value in dev.items() if metric != "step"}
    assert job.sums_of is not None
    frozen = jax.device_put(job.frozen, layout.parameters(job.frozen, job.axes))
    if (test := evaluation_of(job.sums_of, rows.test, layout)) is not None:
        result |= {f"test_{metric}": value for metric, value in test(best.evaluated, frozen).items()}
    return result | {
        "trained_parameters": parameter_count(best.trainable),
        "memory_total": memory and memory.total,
        "memory_arguments": memory and memory.arguments,
        "memory_temporaries": memory and memory.temporaries,
    }


def _store(
    folder: Path,
    model: Transformer,
    params: Params,
    tuned: Tuned | None,
    trained: Params,
    labels: tuple[Any, ...],
    job: Job,
    tokenizer: Tokenizer | None,
) -> Path:
    if tuned is None:
        save_model(folder / MODEL, model, trained, labels=labels, tokenizer=tokenizer)
        return folder / MODEL
    assert isinstance(model.head, ClassifierHead)
    variables = {"delta": trained, "delta_state": job.frozen["delta_state"]}
    notes = {"labels": list(labels), "pooling": model.head.pooling}
    return save_delta(folder / DELTA, tuned, variables, params, notes=notes)
