"""What the study of skill neurons compiles and encodes for a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from ..models import Transformer
from ..models.hooks import site_shapes
from ..models.model import Params
from ..research import delta
from ..research.data.batches import Batches, evaluation_batches
from ..research.data.parts import Part, every_nth
from ..research.neurons import (
    Accuracy,
    Layers,
    Perturbed,
    Positions,
    Predictivity,
    Spread,
    TokenMean,
    activations,
    intervene,
    one_against_rest,
)
from ..research.neurons.interventions import Intervention
from ..research.neurons.reading import Batch, model_inputs, real_places
from ..research.training.config import OptimizerConfig, TrainingConfig
from ..research.training.trials import HEAD, Trial, Trials
from .delta_methods import Backbone
from .delta_tasks import Task, TaskRows

PROMPT = "~soft_prompt"
ARRAYS = "arrays.safetensors"
ROWS = 32  # of a batch that is read, at most


class Programs:
    """Compiled functions for tasks with as many labels and tokens a row.

    `arrays` are a delta's variables and the backbone's parameters: other prompts recompile nothing.
    """

    def __init__(self, backbone: Backbone, labels: int, example: Batch, steps: int, prompt: int) -> None:
        self.prompt, self.subtasks = prompt, one_against_rest(labels)
        self.model, self.params = backbone.with_head(labels)
        self.spec: delta.Spec = {"": delta.SoftPrompt(length=prompt), HEAD: delta.Full()}
        self.tuned = delta.attach(self.model, self.spec)
        training = TrainingConfig(
            steps=steps, batch=len(example["label"]), optimizer=OptimizerConfig("adamw")
        )
        self.trials = Trials.compile(self.model, self.params, self.spec, example, training)
        shapes = site_shapes(self.model, self.params, example["tokens"], names=["mlp/act"])
        self.layers = Layers.of(shapes)
        self.predictivity = Predictivity(self._at_prompt, self.subtasks)
        self.spread = Spread(self._over_tokens)
        self.at_prompt = jax.jit(self._at_prompt)
        self.perturbed = Perturbed(self._logits)
        self.body = delta.attach(Transformer(self.model.config, None), {"": delta.SoftPrompt(length=prompt)})
        self.hidden = jax.jit(self._hidden)

    def _at_prompt(self, arrays: Any, batch: Batch) -> jax.Array:
        bound = self.tuned.bind(arrays[0])
        return activations(bound, arrays[1], batch, read=Positions(0, self.prompt), prompt=self.prompt)

    def _over_tokens(self, arrays: Any, batch: Batch) -> jax.Array:
        bound = self.tuned.bind(arrays[0])
        return activations(bound, arrays[1], batch, read=TokenMean(), prompt=self.prompt)

    def _logits(self, arrays: Any, batch: Batch, intervention: Intervention, rng: jax.Array) -> jax.Array:
        given: dict[str, Any] = {"intervention": intervention, "layers": self.layers, "rng": rng}
        bound = self.tuned.bind(arrays[0])
        return intervene(bound, arrays[1], batch["tokens"], **given, **model_inputs(batch))

    def _hidden(self, prompt: jax.Array, params: Params, batch: Batch) -> jax.Array:
        """Mean hidden states `[B, D]` of the texts behind a prompt."""
        variables = {"delta": {PROMPT: {"prompt": prompt}}, "delta_state": {}}
        hidden = self.body.apply(variables, params, batch["tokens"], **model_inputs(batch))
        real = real_places(batch).astype(hidden.dtype)
        return jnp.einsum("btd,bt->bd", hidden, real) / real.sum(1, keepdims=True)


@dataclass(frozen=True)
class Work:
    """A task's rows and the programs for them; neurons are read on the training texts `read_rows`."""

    rows: TaskRows
    programs: Programs
    read_rows: Part
    common: Batch
    batch: int = ROWS

    def batches(self, rows: Part) -> Iterator[Batch]:
        """All rows once."""
        return evaluation_batches(rows, self.batch)

    def truth(self, rows: Part) -> np.ndarray:
        """The rows' labels."""
        return np.asarray([rows[index]["label"] for index in range(len(rows))])

    def arrays(self, variables: Mapping[str, Any]) -> tuple[Any, Params]:
        """A delta's variables beside the backbone, as the programs take them."""
        return variables, self.programs.params

    def variables(self, stored: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The delta's variables among what a trial stored."""
        own = {key: value for key, value in stored.items() if "~" in key}
        return {"delta": unflatten_dict(own, sep="/"), "delta_state": {}}

    def variables_of(self, trial: Trial) -> dict[str, Any]:
        """A trial's variables, on the host."""
        return jax.device_get(trial.variables)

    def read(self, variables: Mapping[str, Any]) -> tuple[np.ndarray, Accuracy, Accuracy]:
        """Baselines on training texts, accuracies on dev and on test."""
        probe, arrays = self.programs.predictivity, self.arrays(variables)
        thresholds = probe.thresholds(arrays, self.batches(self.read_rows))
        dev, test = (
            probe.accuracy(arrays, self.batches(rows), thresholds) for rows in (self.rows.dev, self.rows.test)
        )
        return thresholds, dev, test

    def predictivity(self, variables: Mapping[str, Any]) -> np.ndarray:
        """Predictivities on dev `[S, L, F]`, with baselines on training texts."""
        probe, arrays = self.programs.predictivity, self.arrays(variables)
        thresholds = probe.thresholds(arrays, self.batches(self.read_rows))
        return probe.accuracy(arrays, self.batches(self.rows.dev), thresholds).by_neuron()

    @cached_property
    def untrained(self) -> tuple[Accuracy, Accuracy]:
        """Accuracies on dev and on test before training.

        The same for every seed: prompts begin as the vocabulary's first vectors.
        """
        fresh = self.programs.trials.start(0, 1.0).variables
        return self.read(jax.device_get(fresh))[1:]

    def shuffled(self, variables: Mapping[str, Any], thresholds: np.ndarray, seed: int) -> Accuracy:
        """Accuracies on dev with its labels in another order: there is nothing to find."""
        labels = np.random.default_rng(seed).permutation(self.truth(self.rows.dev)).astype(np.int32)
        size, padded = self.batch, np.concatenate([labels, np.repeat(labels[-1:], self.batch)])
        batches = [
            {**batch, "label": padded[number * size : (number + 1) * size]}
            for number, batch in enumerate(self.batches(self.rows.dev))
        ]
        return self.programs.predictivity.accuracy(self.arrays(variables), batches, thresholds)

    def states(self, variables: Mapping[str, Any]) -> np.ndarray:
        """Mean activations `[L, P, F]` at the prompt's places on texts that are the same for all tasks."""
        return np.asarray(self.programs.at_prompt(self.arrays(variables), self.common)).mean(0)

    def hidden(self, prompt: np.ndarray, rows: Part) -> np.ndarray:
        """Mean hidden states `[N, D]` of `rows` behind a prompt."""
        body = {name: tree for name, tree in self.programs.params.items() if name != HEAD}
        found = [np.asarray(self.programs.hidden(prompt, body, batch)) for batch in self.batches(rows)]
        return np.concatenate(found)[: len(rows)]


class Works:
    """Tasks' rows and programs, made when they are first asked for."""

    def __init__(self, load: Callable[[Task], TaskRows], common: Task, backbone: Backbone, size: Any) -> None:
        self._load, self._shown, self._backbone, self._size = load, common, backbone, size
        self._programs: dict[tuple[int, int], Programs] = {}
        self._works: dict[str, Work] = {}

    def __getitem__(self, task: Task) -> Work:
        if task.name not in self._works:
            rows, size = self._load(task), self._size
            key = len(rows.labels), task.length
            if key not in self._programs:
                example = Batches(rows.train, size.batch)[0]
                self._programs[key] = Programs(
                    self._backbone, len(rows.labels), example, size.steps, size.prompt
                )
            read = every_nth(rows.train, size.read_rows)
            self._works[task.name] = Work(rows, self._programs[key], read, self._common, read_at_once(size))
        return self._works[task.name]

    @cached_property
    def _common(self) -> Batch:
        """Texts on which the prompts of all tasks are compared: some of one task's."""
        return next(iter(evaluation_batches(self._load(self._shown).dev, read_at_once(self._size))))


def read_at_once(size: Any) -> int:
    """The rows of a batch that is read: a smoke test's few are not filled up."""
    return min(rows for rows in (ROWS, size.read_rows, size.dev_rows, size.test_rows) if rows)  # 0: all
