"""What the study of skill neurons asks of a task and seed: a tuned prompt, and what its neurons are worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from ..models.model import Params
from ..research import delta
from ..research.data.batches import Batch, Batches
from ..research.data.parts import every_nth
from ..research.neurons import Accuracy, fit_probe, fixed, noised, prune, random_like, select, stacked
from ..research.neurons.modules import densest, modularity, random_experts, stability
from ..research.neurons.reading import model_inputs
from .skill_neurons_work import ARRAYS, PROMPT, ROWS

if TYPE_CHECKING:
    from .skill_neurons import Study

FUNCTIONAL = 0.05  # of a layer's neurons are a task's, when experts are tested for them


def trial(study: Study, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Tune a prompt; read its neurons, and those of the same prompt before training."""
    work, size = study.work(name), study.size
    trials = work.programs.trials
    batches = Batches(work.rows.train, size.batch, seed)
    trial, settled = trials.start(seed, size.rate), []
    for part in (*study.checkpoints(seed), 1.0):
        trial = trials.advance(trial, batches, round(part * size.steps))
        if part < 1:
            settled.append(work.predictivity(work.variables_of(trial)))
    chosen = trials.score(trial, work.rows.test, work.batch).chosen
    variables = work.variables_of(trial)
    thresholds, dev, test = work.read(variables)
    shuffled = work.shuffled(variables, thresholds, seed)
    dev_before, test_before = work.untrained
    means, deviations = work.programs.spread(work.arrays(variables), work.batches(work.read_rows))
    settled = [dev_before.by_neuron(), *settled, dev.by_neuron()]
    stored = {
        "checkpoints": np.stack(settled).astype(np.float32),
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
        **top_neurons("top", dev, test),
        **top_neurons("untrained_top", dev_before, test_before),
        **top_neurons("shuffled_top", shuffled, test),
        "by_layer": dev.by_neuron().mean(0).max(-1).tolist(),
    }


def effects(study: Study, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Which test examples are right where neurons are perturbed, removed, or all that is left."""
    work, size = study.work(name), study.size
    stored = study.arrays(name, seed)
    labels, changes = [], []
    for fraction in size.fractions:
        skill = study.masks(name, fraction)
        for who, mask in _chosen(skill, size.draws, seed):
            power = np.sqrt((stored["means"] ** 2 + stored["deviations"] ** 2).mean(1, keepdims=True))
            labels += [f"noise/{fraction}/{who}", f"mean/{fraction}/{who}"]
            changes += [noised(mask, power), fixed(mask, stored["means"])]
    upper = np.arange(len(stored["means"])) >= len(stored["means"]) // 2
    for fraction in size.kept:
        for who, mask in _chosen(study.masks(name, fraction), size.draws, seed):
            labels.append(f"kept/{fraction}/{who}")
            changes.append(fixed(~mask & upper[:, None], stored["means"]))
    correct = work.programs.perturbed(
        work.arrays(work.variables(stored)), work.batches(work.rows.test), stacked(changes), seed
    )
    return {"correct": {label: np.flatnonzero(row).tolist() for label, row in zip(labels, correct)}} | {
        "rows": correct.shape[1]
    }


def transfer(study: Study, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """How well this task's labels are read from hidden states under each task's prompt."""
    work = study.work(name)
    train, test = every_nth(work.rows.train, study.size.read_rows), work.rows.test
    prompts = {source: study.arrays(source, seed)[f"{PROMPT}/prompt"] for source in study.size.tasks}
    fresh = work.programs.trials.start(seed, study.size.rate).variables
    prompts["untrained"] = jax.device_get(fresh)["delta"][PROMPT]["prompt"]
    result = {}
    for source, prompt in prompts.items():
        probe = fit_probe(work.hidden(prompt, train), work.truth(train), len(work.rows.labels))
        result[source] = probe.accuracy(work.hidden(prompt, test), work.truth(test))
    return result


def values(study: Study, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """What the best neuron of a trial does on each test text, by label."""
    work, trial = study.work(name), study.trial(name, seed)
    stored = study.arrays(name, seed)
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


def speed(study: Study, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Milliseconds of a forward pass whole and with the upper half's layers pruned, in turn."""
    work = study.work(name)
    stored = study.arrays(name, seed)
    batch, programs = dict(next(iter(work.batches(work.rows.test)))), work.programs
    means = stored["means"]
    upper = np.arange(len(means)) >= len(means) // 2
    models = {"whole": (programs.model, programs.params)}
    for fraction in study.size.kept:
        keep = study.masks(name, fraction) | ~upper[:, None]
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


def modules(study: Study, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Whether the task's neurons lie together in experts, what those are worth, and when they settle.

    Experts are clusters of input weights. As many neurons are held at their means each time: those of the
    experts with most of the task's neurons, of random experts, the most predictive ones, random ones.
    """
    work, size, stored = study.work(name), study.size, study.arrays(name, seed)
    experts = study.experts
    chosen = select(stored["predictivity"], FUNCTIONAL)
    untrained = select(stored["untrained"], FUNCTIONAL)
    found, before = (modularity(each, experts, seed=seed) for each in (chosen, untrained))
    crowded = densest(chosen, experts, size.crowded)
    masks = {"experts": crowded, "neurons": select(stored["predictivity"], size.crowded / size.experts)}
    for draw in range(size.draws):
        masks[f"random experts{draw}"] = random_experts(experts, size.crowded, 1000 * seed + draw)
        masks[f"random neurons{draw}"] = random_like(crowded, 1000 * seed + draw)
    changes = stacked([fixed(mask, stored["means"]) for mask in masks.values()])
    batches = work.batches(work.rows.test)
    correct = work.programs.perturbed(work.arrays(work.variables(stored)), batches, changes, seed)
    steps = stored["checkpoints"].mean(1)
    scattered = np.random.default_rng(seed).permuted(experts, axis=1)
    settled = {"neurons": None, "experts": experts, "random partition": scattered}
    return {
        "functional": int(found.functional.sum()),
        "of": int(found.functional.size),
        "together": found.together,
        "random": found.random,
        "p": found.p,
        "untrained_together": before.together,
        "untrained_p": before.p,
        "correct": {label: np.flatnonzero(row).tolist() for label, row in zip(masks, correct)},
        "rows": correct.shape[1],
        "stability": {what: stability(steps, each).mean(1).tolist() for what, each in settled.items()},
    }


MEASURED: Mapping[str, Callable[..., dict[str, Any]]] = {
    "modules": modules,
    "effects": effects,
    "transfer": transfer,
}


def balanced_accuracy(chosen: np.ndarray, truth: np.ndarray) -> float:
    """The mean over labels of the share of their examples that are right."""
    return float(np.mean([(chosen[truth == label] == label).mean() for label in np.unique(truth)]))


def top_neurons(name: str, chosen_on: Accuracy, measured_on: Accuracy) -> dict[str, Any]:
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
