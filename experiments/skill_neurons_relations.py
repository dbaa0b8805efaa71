"""What tasks have in common, by their neurons, and whether it says whose prompt serves whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..research.neurons import over_trials, select
from ..research.neurons.figures import heat_maps
from ..research.neurons.relations import OVERLAPS, agreement, cosine, matrix, same_kind, spearman
from ..research.neurons.specialisation import specialisation
from ..research.study.tables import Cell, Table

Found = Mapping[str, Any]
SKILLED = 0.2  # of a layer's neurons, among which activations are compared (Wang et al., 2022)


def relations(
    found: Found,
    names: Sequence[str],
    seeds: Sequence[int],
    measured: Sequence[int],
    kinds: Sequence[str],
    figures: Path,
) -> Table:
    """A row a measure of similarity: within and between kinds, and whether it says whose prompt serves."""
    transfer = np.array(
        [
            [fmean(found["transfer"][target, seed][source] for seed in measured) for source in names]
            for target in names
        ]
    )
    relative = transfer / np.diag(transfer)[:, None]
    maps = similarities(found, names, seeds)
    rows: list[tuple[Cell, ...]] = []
    for title, similarity in maps.items():
        contrast, told = same_kind(similarity, kinds), agreement(similarity, relative)
        rows.append(
            (title, round(contrast.same, 3), round(contrast.different, 3), round(contrast.p, 3),
             round(told.correlation, 2), f"[{told.low:.2f}, {told.high:.2f}]", round(told.p, 3))
        )  # fmt: skip
    heat_maps(figures / "similarity.png", dict(list(maps.items())[:2]), names, names)
    heat_maps(figures / "overlap.png", dict(list(maps.items())[2:6]), names, names)
    heat_maps(figures / "skill_overlap.png", dict(list(maps.items())[6:10]), names, names)
    heat_maps(
        figures / "transfer.png", {"probe accuracy relative to the task's own prompt": relative}, names, names
    )
    layers = found["trial"][names[0], seeds[0]]["by_layer"]
    best = np.array([np.mean([found["trial"][n, s]["by_layer"] for s in seeds], 0) for n in names])
    heat_maps(
        figures / "layers.png",
        {"best predictivity on dev": best},
        names,
        [f"layer {i}" for i in range(len(layers))],
    )
    columns = ("similarity", "same kind", "different kind", "p", "with transfer", "95%", "p of that")
    caption = (
        "Mean similarity of tasks of one kind and of different kinds, p by permuting tasks (one-sided); "
        "Spearman correlation with transfer relative to the task's own prompt, with its 95% interval over "
        "resampled tasks and p by Mantel's test. Kinds: "
        f"{', '.join(f'{name} {kind}' for name, kind in zip(names, kinds))}."
    )
    return Table(columns, tuple(rows), caption)


def similarities(found: Found, names: Sequence[str], seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Matrices `[N, N]` by measure, in the mean over layers; of trained and of untrained prompts."""

    def joined(key: str) -> dict[str, np.ndarray]:
        return {n: over_trials([found["arrays"][n, seed][key] for seed in seeds]).mean(0) for n in names}

    def states(name: str, seed: int) -> np.ndarray:
        return found["arrays"][name, seed]["states"]

    maps = {
        "Spearman of predictivity": matrix(joined("predictivity"), spearman),
        "the same, untrained prompt": matrix(joined("untrained"), spearman),
    }
    skilled = {
        name: select(over_trials([found["arrays"][name, seed]["predictivity"] for seed in seeds]), SKILLED)
        for name in names
    }
    first = {name: {seed: states(name, seed)[:, :1] for seed in seeds} for name in names}
    for title, measure in OVERLAPS.items():
        each = [matrix({name: states(name, seed) for name in names}, measure) for seed in seeds]
        maps[f"activated: {title}"] = np.mean(each, 0)
    for title, measure in OVERLAPS.items():
        own = [matrix({name: states(name, seed) for name in names}, measure, among=skilled) for seed in seeds]
        maps[f"skill neurons activated: {title}"] = np.mean(own, 0)
    one = [matrix({name: first[name][seed] for name in names}, cosine) for seed in seeds]
    return maps | {"activated at the first place: cosine": np.mean(one, 0)}


def layer_table(found: Found, names: Sequence[str], seeds: Sequence[int], kinds: Sequence[str]) -> Table:
    """A row a layer: how predictive its best neuron is, and how alike tasks' predictivities are there."""
    joined = {n: over_trials([found["arrays"][n, s]["predictivity"] for s in seeds]).mean(0) for n in names}
    own = specialisation(joined)
    rows: list[tuple[Cell, ...]] = []
    for layer, alike in enumerate(own.alike):
        contrast = same_kind(alike, kinds)
        best = round(100 * float(own.best[:, layer].mean()), 1)
        mean = round(100 * float(own.mean[:, layer].mean()), 1)
        rows.append(
            (layer, best, mean, round(contrast.same, 3), round(contrast.different, 3), round(contrast.p, 3))
        )
    caption = (
        "Predictivity on dev %, of the best neuron of a layer and of all in the mean, over tasks; Spearman "
        "correlation of two tasks' predictivities in this layer, for tasks of one kind and of different "
        "kinds, p by permuting tasks."
    )
    columns = ("layer", "best neuron", "mean", "same kind", "different kind", "p")
    return Table(columns, tuple(rows), caption)
