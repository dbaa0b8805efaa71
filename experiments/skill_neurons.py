"""Skill neurons of six tasks on MiniLM's published weights, by prompt tuning.

Claims put to the test: single neurons tell a task's labels apart, nearly as well as the tuned prompt (Wang et
al., 2022, arXiv 2211.07349, with RoBERTa-base); perturbing them costs more than perturbing as many others; a
few per cent of them in the upper layers are enough; tasks of one kind have similar ones; and similar neurons
say whose prompt serves whom (Su et al., 2022).

Command: `modicum study skill-neurons` (an hour of one core; stopped at any point, it goes on), `--size
quick` for minutes, `--size smoke` for one. Expected: docs/results/skill_neurons.md.

A prompt of 16 vectors and a linear classifier on the mean hidden state are tuned per task and seed, at the
rate that docs/results/delta_methods.md found for soft prompts. Neurons are read at the prompt's places:
baselines are means over training texts, predictivities are of dev, the best neuron's accuracy is measured on
test. Controls: the same prompt before training, and labels of dev that are shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ..research.neurons import over_trials, select
from ..research.sparsity.feed_forward import Layers
from ..research.sparsity.partitions import Clusters
from ..research.study.study import run_cell
from .delta_methods import Backbone
from .delta_tasks import Task, TaskRows, load_task
from .skill_neurons_cells import MEASURED, speed, trial, values
from .skill_neurons_deltas import Deltas, deltas, lora
from .skill_neurons_work import ARRAYS, Work, Works

REVISION = 3
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

    `fractions` of a layer's neurons are perturbed, `kept` are left; that, transfer and modules for the first
    `measured` of the seeds. Layers have `experts`, of which the `crowded` fullest are perturbed; neurons are
    also read at the `checkpoints`, parts of the training.
    """

    steps: int = 120
    batch: int = 16
    prompt: int = 16
    rate: float = 0.03
    read_rows: int = 240
    dev_rows: int = 240
    test_rows: int = 240
    seeds: tuple[int, ...] = (0, 1)
    measured: int = 1
    fractions: tuple[float, ...] = (0.1, 0.3)
    kept: tuple[float, ...] = (0.02, 0.1)
    draws: int = 8
    experts: int = 16
    crowded: int = 2
    checkpoints: tuple[float, ...] = (0.25, 0.5)
    tasks: tuple[str, ...] = SIX


SIZES: Mapping[str, Size] = {
    "full": Size(),
    "quick": Size(
        steps=40,
        read_rows=160,
        dev_rows=160,
        test_rows=160,
        seeds=(0,),
        fractions=(0.1,),
        kept=(0.1,),
        draws=4,
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
        checkpoints=(0.34,),
        tasks=("sst2", "cr", "subj"),
    ),
}


TUNING = ("steps", "batch", "prompt", "rate", "read_rows", "dev_rows", "test_rows")
READS: Mapping[str, tuple[str, ...]] = {  # of the size, by what is asked
    "trial": TUNING,
    "effects": (*TUNING, "seeds", "fractions", "kept", "draws"),
    "transfer": (*TUNING, "tasks"),
    "lora": TUNING,
    "deltas": (*TUNING, "tasks"),
    "modules": (*TUNING, "checkpoints", "experts", "crowded", "draws"),
    "values": TUNING,
    "speed": (*TUNING, "seeds", "kept"),
}


@dataclass(frozen=True)
class Cell:
    """What a run asks of a task, and the part of the size that it reads: more draws tune no new prompt."""

    what: str
    task: Task
    size: Mapping[str, Any]


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
        found: dict[str, Any] = {"trial": {}, "arrays": {}}
        for name in self.size.tasks:
            for seed in self.size.seeds:
                found["trial"][name, seed] = self.trial(name, seed)
                found["arrays"][name, seed] = self.arrays(name, seed)
        measured = self.size.seeds[: self.size.measured]
        for what, ask in {**MEASURED, "lora": lora, "deltas": deltas}.items():
            found[what] = {
                (name, seed): self._cell(what, name, seed, ask)[0]
                for name in self.size.tasks
                for seed in measured
            }
        found["lora_arrays"] = {(name, seed): self.arrays(name, seed, "lora") for name, seed in found["lora"]}
        first = self.size.tasks[0], self.size.seeds[0]
        found["values"] = self._cell("values", *first, values)[0]
        found["speed"] = self._cell("speed", *first, speed)[0]
        return found

    def work(self, name: str) -> Work:
        """What is compiled and encoded for a task; tasks of one shape share their programs."""
        return self._works[self.tasks[name]]

    @cached_property
    def _works(self) -> Works:
        common = next(iter(self.tasks.values()))  # whichever are asked for: a cell is not named by it
        return Works(self._load, common, self.backbone, self.size)

    def _load(self, task: Task) -> TaskRows:
        size = self.size
        return load_task(
            self.data, task, self.backbone.tokenizer, dev_rows=size.dev_rows, test_rows=size.test_rows
        )

    def trial(self, name: str, seed: int) -> dict[str, Any]:
        """What the trial of a task and seed found."""
        return self._cell("trial", name, seed, trial)[0]

    def arrays(self, name: str, seed: int, what: str = "trial") -> dict[str, np.ndarray]:
        """What the trial of a task and seed stored, or its `lora`."""
        return load_file(self._cell(what, name, seed, {"trial": trial, "lora": lora}[what])[1] / ARRAYS)

    @cached_property
    def deltas(self) -> Deltas:
        """The compiled functions of the tasks' LoRAs."""
        return Deltas(self)

    def checkpoints(self, seed: int) -> tuple[float, ...]:
        """The parts of a trial after which its neurons are read: of the seeds whose modules are asked for."""
        return self.size.checkpoints if seed in self.size.seeds[: self.size.measured] else ()

    def masks(self, name: str, fraction: float) -> np.ndarray:
        """The task's skill neurons `[L, F]`, by predictivities on dev in the mean over seeds."""
        trials = [self.arrays(name, seed)["predictivity"] for seed in self.size.seeds]
        return select(over_trials(trials), fraction)

    @cached_property
    def experts(self) -> np.ndarray:
        """The expert `[L, F]` of each neuron: clusters of like input weights in every layer."""
        dense = Layers.of(self.backbone.model, self.backbone.params).dense.values()
        labels = []
        for layer in dense:
            groups = Clusters().groups(layer, np.zeros((0, 0)), self.size.experts, 0)  # reads weights alone
            labels.append(np.argsort(groups.ravel(), kind="stable") // groups.shape[1])
        return np.stack(labels)

    def _cell(
        self, what: str, name: str, seed: int, ask: Callable[..., dict[str, Any]]
    ) -> tuple[dict[str, Any], Path]:
        reads = {field: getattr(self.size, field) for field in READS[what]}
        if what == "trial":
            reads["checkpoints"] = self.checkpoints(seed)
        run = run_cell(
            self.folder,
            Cell(what, self.tasks[name], reads),
            f"{what}-{name}-seed{seed}",
            partial(ask, self, name, seed),
            seed=seed,
            data_fingerprint=self.work(name).rows.fingerprint,
            revision=REVISION,
        )
        return run.result, run.folder
