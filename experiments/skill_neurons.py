"""Skill neurons of six tasks on MiniLM's published weights, by prompt tuning.

Claims put to the test: single neurons tell a task's labels apart, nearly as well as the tuned prompt (Wang et
al., 2022, arXiv 2211.07349, with RoBERTa-base); perturbing them costs more than perturbing as many others; a
few per cent of them in the upper layers are enough; tasks of one kind have similar ones; and similar neurons
say whose prompt serves whom (Su et al., 2022).

Command: `modicum study skill-neurons` (hours on two cores; stopped at any point, it goes on), `--size quick`
for the committed table, `--size smoke` for a minute. Expected: docs/results/skill_neurons.md.

A prompt of 16 vectors and a linear classifier on the mean hidden state are tuned per task and seed, at the
rate that docs/results/delta_methods.md found for soft prompts. Neurons are read at the prompt's places:
baselines are means over training texts, predictivities are of dev, the best neuron's accuracy is measured on
test. Controls: the same prompt before training, and labels of dev that are shuffled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from ..models.model import Params
from ..research import delta
from ..research.data.batches import Batch, Batches
from ..research.data.parts import spread_out
from ..research.neurons import (
    Accuracy,
    fit_probe,
    fixed,
    noised,
    over_trials,
    prune,
    random_like,
    select,
    stacked,
)
from ..research.neurons.reading import model_inputs
from ..research.study.runs import Run, run_id
from .delta_methods import Backbone
from .delta_tasks import Task, TaskRows, load_task
from .skill_neurons_work import PROMPT, ROWS, Work, Works

logger = logging.getLogger(__name__)

REVISION = 1
ARRAYS = "arrays.safetensors"
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("sst2", 32),
        Task("cr", 32),
        Task("mr", 32),
        Task("subj", 32),
        Task("mrpc", 48, "sentence1", "sentence2"),
        Task("qnli_dev5463", 48, "question", "sentence"),
        Task("trec", 32, dev=""),
    )
}
KINDS = {
    "sst2": "sentiment",
    "cr": "sentiment",
    "mr": "sentiment",
    "subj": "subjectivity",
    "mrpc": "pairs",
    "qnli_dev5463": "pairs",
    "trec": "questions",
}
SIX = ("sst2", "cr", "mr", "subj", "mrpc", "qnli_dev5463")


@dataclass(frozen=True)
class Size:
    """How much of everything; rows are texts.

    `fractions` of a layer's neurons are perturbed, `kept` are left; that and transfer for the first
    `measured` of the seeds.
    """

    steps: int = 600
    batch: int = 16
    prompt: int = 16
    rate: float = 0.03
    read_rows: int = 2000
    dev_rows: int = 800
    test_rows: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    measured: int = 3
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    kept: tuple[float, ...] = (0.02, 0.1, 0.3)
    draws: int = 5
    tasks: tuple[str, ...] = SIX


SIZES: Mapping[str, Size] = {
    "full": Size(),
    "quick": Size(
        steps=80,
        read_rows=240,
        dev_rows=240,
        test_rows=240,
        seeds=(0, 1),
        measured=1,
        fractions=(0.1, 0.3),
        kept=(0.02, 0.1),
        draws=2,
    ),
    "smoke": Size(
        steps=3,
        batch=4,
        prompt=4,
        read_rows=16,
        dev_rows=16,
        test_rows=16,
        seeds=(0,),
        measured=1,
        fractions=(0.2,),
        kept=(0.1,),
        draws=1,
        tasks=("sst2", "cr", "subj"),
    ),
}


@dataclass(frozen=True)
class Cell:
    """What a run asks: `what` of a task (of all tasks: "")."""

    what: str
    task: Task | None
    size: Size


@dataclass(frozen=True)
class Study:
    """The study's folder, data, backbone and size; cells that are finished there are not run again."""

    folder: Path
    data: Path
    size: Size
    backbone: Backbone
    tasks: Mapping[str, Task] = field(default_factory=lambda: TASKS)

    def run(self) -> dict[str, Any]:
        """Every cell: results by what was asked, task and seed, and the arrays of the trials."""
        found: dict[str, Any] = {"trial": {}, "arrays": {}, "effects": {}, "transfer": {}}
        for name in self.size.tasks:
            for seed in self.size.seeds:
                result, folder = self._cell("trial", name, seed, self._trial)
                found["trial"][name, seed] = result
                found["arrays"][name, seed] = load_file(folder / ARRAYS)
        for name in self.size.tasks:
            for seed in self.size.seeds[: self.size.measured]:
                found["effects"][name, seed] = self._cell("effects", name, seed, self._effects)[0]
                found["transfer"][name, seed] = self._cell("transfer", name, seed, self._transfer)[0]
        first = self.size.tasks[0], self.size.seeds[0]
        found["values"] = self._cell("values", *first, self._values)[0]
        found["speed"] = self._cell("speed", *first, self._speed)[0]
        return found

    def work(self, name: str) -> Work:
        """What is compiled and encoded for a task; tasks of one shape share their programs."""
        return self._works[self.tasks[name]]

    @cached_property
    def _works(self) -> Works:
        return Works(self._load, self.tasks[self.size.tasks[0]], self.backbone, self.size)

    def _load(self, task: Task) -> TaskRows:
        size = self.size
        return load_task(
            self.data, task, self.backbone.tokenizer, dev_rows=size.dev_rows, test_rows=size.test_rows
        )

    def arrays(self, name: str, seed: int) -> dict[str, np.ndarray]:
        """What the trial of a task and seed stored."""
        return load_file(self._cell("trial", name, seed, self._trial)[1] / ARRAYS)

    def masks(self, name: str, fraction: float) -> np.ndarray:
        """The task's skill neurons `[L, F]`, by predictivities on dev in the mean over seeds."""
        trials = [self.arrays(name, seed)["predictivity"] for seed in self.size.seeds]
        return select(over_trials(trials), fraction)

    def _cell(
        self, what: str, name: str, seed: int, ask: Callable[..., dict[str, Any]]
    ) -> tuple[dict[str, Any], Path]:
        cell, digest = Cell(what, self.tasks[name], self.size), self.work(name).rows.fingerprint
        identity = run_id(cell, seed, digest, REVISION)[:6]
        label = f"{what}-{name}-seed{seed}-{identity}"
        run = Run.open(self.folder, cell, seed=seed, data_fingerprint=digest, revision=REVISION, name=label)
        if run.state != "finished":
            start = time.perf_counter()
            result = ask(name, seed, run.folder)
            run.finish(result | {"seconds": round(time.perf_counter() - start, 1)})
            logger.warning("%s: %.0f s", label, time.perf_counter() - start)
        return run.result, run.folder

    def _trial(self, name: str, seed: int, folder: Path) -> dict[str, Any]:
        """Tune a prompt; read its neurons, and those of the same prompt before training."""
        work, size = self.work(name), self.size
        trials = work.programs.trials
        batches = Batches(work.rows.train, size.batch, seed)
        trial = trials.advance(trials.start(seed, size.rate), batches, size.steps)
        chosen = trials.score(trial, work.rows.test, ROWS).chosen
        variables = jax.device_get(trial.variables)
        thresholds, dev, test = work.read(variables)
        shuffled = work.shuffled(variables, thresholds, seed)
        dev_before, test_before = work.untrained
        means, deviations = work.programs.spread(work.arrays(variables), work.batches(work.read_rows))
        stored = {
            **flatten_dict(variables["delta"], sep="/"),
            "predictivity": dev.by_neuron().astype(np.float32),
            "untrained": dev_before.by_neuron().astype(np.float32),
            "thresholds": thresholds,
            "means": means[:, 0],
            "deviations": deviations[:, 0],
            "states": work.states(variables),
        }
        save_file({key: np.ascontiguousarray(value) for key, value in stored.items()}, folder / ARRAYS)
        truth = work.truth(work.rows.test)
        return {
            "accuracy": float((chosen == truth).mean()),
            "balanced": balanced_accuracy(chosen, truth),
            "majority": float(np.bincount(truth).max() / len(truth)),
            **_tops("top", dev, test),
            **_tops("untrained_top", dev_before, test_before),
            **_tops("shuffled_top", shuffled, test),
            "by_layer": dev.by_neuron().mean(0).max(-1).tolist(),
        }

    def _effects(self, name: str, seed: int, folder: Path) -> dict[str, Any]:
        """Which test examples are right where neurons are perturbed, removed, or all that is left."""
        work, size = self.work(name), self.size
        stored = self.arrays(name, seed)
        labels, changes = [], []
        for fraction in size.fractions:
            skill = self.masks(name, fraction)
            for who, mask in _chosen(skill, size.draws, seed):
                power = np.sqrt((stored["means"] ** 2 + stored["deviations"] ** 2).mean(1, keepdims=True))
                labels += [f"noise/{fraction}/{who}", f"mean/{fraction}/{who}"]
                changes += [noised(mask, power), fixed(mask, stored["means"])]
        upper = np.arange(len(stored["means"])) >= len(stored["means"]) // 2
        for fraction in size.kept:
            for who, mask in _chosen(self.masks(name, fraction), size.draws, seed):
                labels.append(f"kept/{fraction}/{who}")
                changes.append(fixed(~mask & upper[:, None], stored["means"]))
        correct = work.programs.perturbed(
            work.arrays(work.variables(stored)), work.batches(work.rows.test), stacked(changes), seed
        )
        return {"correct": {label: np.flatnonzero(row).tolist() for label, row in zip(labels, correct)}} | {
            "rows": correct.shape[1]
        }

    def _transfer(self, name: str, seed: int, folder: Path) -> dict[str, Any]:
        """How well this task's labels are read from hidden states under each task's prompt."""
        work = self.work(name)
        train, test = spread_out(work.rows.train, self.size.read_rows), work.rows.test
        prompts = {source: self.arrays(source, seed)[f"{PROMPT}/prompt"] for source in self.size.tasks}
        fresh = work.programs.trials.start(seed, self.size.rate).variables
        prompts["untrained"] = jax.device_get(fresh)["delta"][PROMPT]["prompt"]
        result = {}
        for source, prompt in prompts.items():
            probe = fit_probe(work.hidden(prompt, train), work.truth(train), len(work.rows.labels))
            result[source] = probe.accuracy(work.hidden(prompt, test), work.truth(test))
        return result

    def _values(self, name: str, seed: int, folder: Path) -> dict[str, Any]:
        """What the best neuron of a trial does on each test text, by label."""
        work, trial = self.work(name), self._cell("trial", name, seed, self._trial)[0]
        stored = self.arrays(name, seed)
        layer, position, neuron, _, _ = trial["top"][0]
        arrays, rows = work.arrays(work.variables(stored)), work.rows.test
        found = [
            np.asarray(work.programs.at_prompt(arrays, batch))[:, layer, position, neuron]
            for batch in work.batches(rows)
        ]
        values, truth = np.concatenate(found)[: len(rows)], work.truth(rows)
        by_label = {str(label): values[truth == label].tolist() for label in np.unique(truth)}
        threshold = float(stored["thresholds"][0, layer, position, neuron])
        return {"task": name, "top": trial["top"][0], "threshold": threshold, "values": by_label}

    def _speed(self, name: str, seed: int, folder: Path) -> dict[str, Any]:
        """Milliseconds of a forward pass whole and with the upper half's layers pruned, in turn."""
        work = self.work(name)
        stored = self.arrays(name, seed)
        batch, programs = dict(next(iter(work.batches(work.rows.test)))), work.programs
        means = stored["means"]
        upper = np.arange(len(means)) >= len(means) // 2
        models = {"whole": (programs.model, programs.params)}
        for fraction in self.size.kept:
            keep = self.masks(name, fraction) | ~upper[:, None]
            models[f"{fraction}"] = prune(programs.model, programs.params, keep, means)
        runs, shares = {}, {}
        for label, (model, params) in models.items():
            tuned = delta.attach(model, programs.spec)
            runs[label] = _forward(tuned, work.variables(stored), params, batch)
            jax.block_until_ready(runs[label]())
            shares[label] = delta.parameter_count(params) / delta.parameter_count(programs.params)
        times: dict[str, list[float]] = {label: [] for label in runs}
        for _ in range(15 if len(work.rows.test) >= ROWS else 3):  # the smoke size says nothing of speed
            for label, forward in runs.items():
                begin = time.perf_counter()
                jax.block_until_ready(forward())
                times[label].append(1e3 * (time.perf_counter() - begin))
        ratios = {
            label: median(whole / own for whole, own in zip(times["whole"], found))
            for label, found in times.items()
        }
        return {"milliseconds": {k: median(v) for k, v in times.items()}, "ratio": ratios, "share": shares}


def balanced_accuracy(chosen: np.ndarray, truth: np.ndarray) -> float:
    """The mean over labels of the share of their examples that are right."""
    return float(np.mean([(chosen[truth == label] == label).mean() for label in np.unique(truth)]))


def _tops(name: str, chosen_on: Accuracy, measured_on: Accuracy) -> dict[str, Any]:
    """The best neuron of each subtask of one set, and what it does on another, in the mean over subtasks."""
    tops = [chosen_on.top(subtask) for subtask in range(len(chosen_on.values))]
    found = [measured_on.of(top, subtask) for subtask, top in enumerate(tops)]
    return {name: [list(top) for top in tops], f"{name}_test": float(np.mean(found))}


def _chosen(skill: np.ndarray, draws: int, seed: int) -> list[tuple[str, np.ndarray]]:
    """The skill neurons and as many random ones, `draws` times."""
    controls = [(f"random{draw}", random_like(skill, 1000 * seed + draw)) for draw in range(draws)]
    return [("skill", skill), *controls]


def _forward(tuned: Any, variables: Any, params: Params, batch: Batch) -> Callable[[], jax.Array]:
    run = jax.jit(lambda v, p, b: tuned.apply(v, p, b["tokens"], **model_inputs(b)))
    return lambda: run(variables, params, batch)
