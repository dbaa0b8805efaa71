"""Whether tasks that have neurons in common serve each other's labels through a delta, as through a prompt.

For each task a LoRA of attention's queries and values is tuned together with a linear classifier, at the rate
that docs/results/delta_methods.md found, on the same texts in the same order as the task's prompt. A target's
labels are then read from mean hidden states with a source's LoRA in place, by a new linear probe on the
target's training texts: what the study asks of prompts, asked of deltas. Controls: no delta, and the
transfer of prompts itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from ..models import Transformer
from ..models.model import Params
from ..research import delta
from ..research.data.batches import Batches
from ..research.data.parts import Part, every_nth
from ..research.neurons import Predictivity, TokenMean, activations, fit_probe, over_trials
from ..research.neurons.reading import Batch, model_inputs, real_places
from ..research.neurons.relations import agreement, binary_cosine, cosine, matrix, same_kind, spearman
from ..research.study.tables import Cell, Measured, Table
from ..research.training.config import OptimizerConfig, TrainingConfig
from ..research.training.trials import HEAD, Trials
from .skill_neurons_work import ARRAYS, Programs, Work

if TYPE_CHECKING:
    from .skill_neurons import Study

Found = Mapping[str, Any]
RATE = 0.003
SPEC: delta.Spec = {"attention/(query|value)": delta.LoRA(rank=8)}
NONE = "no delta"


class DeltaPrograms:
    """Compiled functions of the LoRAs of tasks that share `programs`; other LoRAs recompile nothing."""

    def __init__(self, programs: Programs, example: Batch, steps: int) -> None:
        self.params = {name: tree for name, tree in programs.params.items() if name != HEAD}
        spec: delta.Spec = {**SPEC, HEAD: delta.Full()}
        training = TrainingConfig(
            steps=steps, batch=len(example["label"]), optimizer=OptimizerConfig("adamw")
        )
        self.trials = Trials.compile(programs.model, programs.params, spec, example, training)
        self.body = delta.attach(Transformer(programs.model.config, None), SPEC)
        self.predictivity = Predictivity(self._neurons, programs.subtasks)
        self.neurons = jax.jit(self._neurons)
        self._hidden = jax.jit(self._means)

    def hidden(self, variables: Mapping[str, Any], work: Work, rows: Part) -> np.ndarray:
        """Mean hidden states `[N, D]` of a task's `rows` with a LoRA in place."""
        arrays = variables, self.params
        return np.concatenate([np.asarray(self._hidden(arrays, b)) for b in work.batches(rows)])[: len(rows)]

    def _neurons(self, arrays: tuple[Any, Params], batch: Batch) -> jax.Array:
        return activations(self.body.bind(arrays[0]), arrays[1], batch, read=TokenMean())

    def _means(self, arrays: tuple[Any, Params], batch: Batch) -> jax.Array:
        hidden = self.body.apply(*arrays, batch["tokens"], **model_inputs(batch))
        real = real_places(batch).astype(hidden.dtype)
        return jnp.einsum("btd,bt->bd", hidden, real) / real.sum(1, keepdims=True)


class Deltas:
    """The compiled functions of a study's tasks, made when they are first asked for."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._made: dict[tuple[int, int], DeltaPrograms] = {}

    def __getitem__(self, name: str) -> DeltaPrograms:
        work, size = self._study.work(name), self._study.size
        key = len(work.rows.labels), work.rows.task.length
        if key not in self._made:
            example = Batches(work.rows.train, size.batch)[0]
            self._made[key] = DeltaPrograms(work.programs, example, size.steps)
        return self._made[key]


def lora(study: Study, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Tune a task's LoRA; read the neurons, in their mean over a text's tokens, with it in place."""
    work, programs, size = study.work(name), study.deltas[name], study.size
    trial = programs.trials.start(seed, RATE)
    trial = programs.trials.advance(trial, Batches(work.rows.train, size.batch, seed), size.steps)
    chosen = programs.trials.score(trial, work.rows.test, work.batch).chosen
    variables = without_head(jax.device_get(trial.variables))
    arrays, probe = (variables, programs.params), programs.predictivity
    thresholds = probe.thresholds(arrays, work.batches(work.read_rows))
    stored = {
        **flatten_dict(variables["delta"], sep="/"),
        "predictivity": probe.accuracy(arrays, work.batches(work.rows.dev), thresholds).by_neuron(),
        "states": np.asarray(programs.neurons(arrays, work.common)).mean(0),
    }
    save_file(
        {key: np.ascontiguousarray(value, np.float32) for key, value in stored.items()}, folder / ARRAYS
    )
    return {"accuracy": float((chosen == work.truth(work.rows.test)).mean())}


def deltas(study: Study, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """How well this task's labels are read from hidden states with each task's LoRA in place, or none."""
    work, programs = study.work(name), study.deltas[name]
    train, test = every_nth(work.rows.train, study.size.read_rows), work.rows.test
    sources = {each: work.variables(study.arrays(each, seed, "lora")) for each in study.size.tasks}
    sources[NONE] = without_head(programs.trials.start(seed, RATE).variables)  # B is 0: the model as it was
    result = {}
    for source, variables in sources.items():
        probe = fit_probe(programs.hidden(variables, work, train), work.truth(train), len(work.rows.labels))
        result[source] = probe.accuracy(programs.hidden(variables, work, test), work.truth(test))
    return result


def without_head(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The delta's variables without those of the classifier, which hidden states know nothing of."""
    return {**variables, "delta": {key: tree for key, tree in variables["delta"].items() if key != HEAD}}


def deltas_table(found: Found, names: Sequence[str], seeds: Sequence[int]) -> Table:
    """A row a target task, a column a source whose LoRA is in place."""
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        own = Measured.of([100 * found["lora"][name, seed]["accuracy"] for seed in seeds])
        read = [
            Measured.of([100 * found["deltas"][name, seed][each] for seed in seeds])
            for each in (*names, NONE)
        ]
        rows.append((name, own, *read))
    caption = (
        "Test accuracy % of the row's task: tuned with a LoRA of its own (rank 8, queries and values) and a "
        "classifier; then of a linear probe on mean hidden states with the column's LoRA in place."
    )
    return Table(("task", "tuned", *names, NONE), tuple(rows), caption)


def delta_relations(
    found: Found,
    maps: Mapping[str, np.ndarray],
    names: Sequence[str],
    seeds: Sequence[int],
    kinds: Sequence[str],
) -> Table:
    """A row a measure of similarity: whether it says whose LoRA serves whom; `maps` are those of prompts."""
    relative = {what: _relative(found[what], names, seeds) for what in ("transfer", "deltas")}
    of_prompts = {f"prompts: {title}": similarity for title, similarity in maps.items()}
    rows: list[tuple[Cell, ...]] = []
    for title, similarity in {
        **of_prompts,
        **delta_similarities(found, names, seeds),
        "prompts: transfer": relative["transfer"],
    }.items():
        contrast, told = same_kind(similarity, kinds), agreement(similarity, relative["deltas"])
        rows.append(
            (title, round(contrast.same, 3), round(contrast.different, 3), round(contrast.p, 3),
             round(told.correlation, 2), f"[{told.low:.2f}, {told.high:.2f}]", round(told.p, 3))
        )  # fmt: skip
    columns = ("similarity", "same kind", "different kind", "p", "with LoRAs' transfer", "95%", "p of that")
    caption = (
        "Mean similarity of tasks of one kind and of different kinds, p by permuting tasks (one-sided); "
        "Spearman correlation with the transfer of LoRAs relative to the task's own, with its 95% interval "
        "over resampled tasks and p by Mantel's test. Neurons as they are read under prompts, or under LoRAs "
        "in their mean over a text's tokens; updates are the products that the LoRAs add to the kernels. The "
        "two transfers also share how easy a target is: near chance all sources are alike."
    )
    return Table(columns, tuple(rows), caption)


def delta_similarities(found: Found, names: Sequence[str], seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Matrices `[N, N]` by measure, of what the tasks' LoRAs are and do, in the mean over layers."""
    arrays = found["lora_arrays"]
    joined = {
        name: over_trials([arrays[name, seed]["predictivity"] for seed in seeds]).mean(0) for name in names
    }
    maps = {"LoRAs: Spearman of predictivity": matrix(joined, spearman)}
    for title, measure in (("cosine", cosine), ("binary cosine", binary_cosine)):
        each = [matrix({name: arrays[name, seed]["states"] for name in names}, measure) for seed in seeds]
        maps[f"LoRAs: activated, {title}"] = np.mean(each, 0)
    each = [matrix({name: updates(arrays[name, seed]) for name in names}, cosine) for seed in seeds]
    return maps | {"LoRAs: updates, cosine": np.mean(each, 0)}


def updates(stored: Mapping[str, np.ndarray]) -> np.ndarray:
    """The products `[sites, in, out]` that a LoRA adds to its kernels, but for their common scale."""
    sites = sorted(key.removesuffix("/a") for key in stored if key.endswith("/a"))
    return np.stack([stored[f"{site}/a"] @ stored[f"{site}/b"] for site in sites])


def _relative(found: Mapping[Any, Any], names: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """Accuracies `[target, source]` relative to the target's own."""
    read = [[fmean(found[target, seed][source] for seed in seeds) for source in names] for target in names]
    return np.array(read) / np.diag(np.array(read))[:, None]
