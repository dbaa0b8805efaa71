"""How much of a model is left when each token uses a tenth to a half of its feed-forward neurons.

Claims put to the test (Zhang et al., "MoEfication", 2022): with 20% of the neurons in experts, chosen by a
small network, at least 97% of the dense model's quality is left where experts are clusters of neurons, and
clearly less where they are random; an oracle that knows what fires keeps most of it even then.

Command: `modicum study moefication` (three seeds), `--size quick` for one seed, `--size smoke` for a minute.
Stopped at any point and started again, it goes on. Cost and expected result: docs/results/moefication.md.

Two dense ReLU models, a decoder trained here and MiniLM-L6 with sst2, are cut into experts of 32 neurons in
four ways; five routers choose {10, 20, 30, 50}% of the experts of each token. Experts and routers are made
from training tokens. Captured mass is measured on training tokens that were held out of that, quality on test
rows that nothing was chosen on. Seeds draw partitions and the order of the routers' data, not the models.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..models.hooks import run_with_edits
from ..models.kernels.sparse import Experts
from ..models.model import Params
from ..models.selection import (
    CentreSelection,
    LowRankSelection,
    MLPSelection,
    OracleSelection,
    Selection,
)
from ..models.transformer import Transformer
from ..parallel.layout import Layout
from ..research.data.batches import evaluation_batches
from ..research.data.parts import spread_out
from ..research.sparsity.feed_forward import Layers, capture_inputs, regrouped
from ..research.sparsity.moefication import Moefication, grafted, layer_parameters, moefied_config
from ..research.sparsity.partitions import (
    Clusters,
    CoActivation,
    Contiguous,
    Partition,
    Shuffled,
    centres,
    expert_count,
)
from ..research.sparsity.quality import captured
from ..research.sparsity.routing import Fitting, fit_selection
from ..research.sparsity.thresholds import find_thresholds
from ..research.study.runs import Run, run_id
from ..research.training.evaluation import SumsOf, make_evaluation
from ..research.training.objectives import Forward, classification, full_tuning, language_modelling
from ..research.training.tasks import evaluation_of
from .moefication_subjects import Recipe, Subject, decoder, minilm

logger = logging.getLogger(__name__)

REVISION = 1
SUBJECTS = {"decoder": decoder, "minilm": minilm}
CONSTRUCTIONS: Mapping[str, Partition] = {
    "contiguous": Contiguous(),
    "random": Shuffled(),
    "clusters": Clusters(),
    "co-activation": CoActivation("spectral"),
}
ROUTERS: Mapping[str, Selection] = {
    "oracle": OracleSelection(),
    "centres": CentreSelection("distance"),
    "similarity": CentreSelection("cosine"),
    "MLP": MLPSelection(),
    "low-rank": LowRankSelection(8),
}
THRESHOLD = "no experts", "threshold"


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    recipe: Recipe = Recipe()
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    neurons: int = 32
    tokens: int = 8192
    epochs: int = 30
    seeds: tuple[int, ...] = (0, 1, 2)
    subjects: tuple[str, ...] = tuple(SUBJECTS)
    constructions: tuple[str, ...] = tuple(CONSTRUCTIONS)
    routers: tuple[str, ...] = tuple(ROUTERS)


SIZES: Mapping[str, Size] = {
    "full": Size(),
    "quick": Size(Recipe(steps=200, tuning_steps=80, test_rows=128), tokens=4096, epochs=15, seeds=(0,)),
    "smoke": Size(
        Recipe(steps=4, batch=4, width=64, layers=1, vocab=300, test_rows=8),
        shares=(0.5,),
        tokens=256,
        epochs=1,
        seeds=(0,),
        subjects=("decoder",),
        constructions=("random", "clusters"),
        routers=("oracle", "MLP"),
    ),
}


@dataclass(frozen=True)
class Cell:
    """What one run of the study asks: a construction and a router on a dense model, at all shares."""

    subject: str
    construction: str
    router: str
    partition: Partition | None
    selection: Selection | None
    shares: tuple[float, ...]
    neurons: int
    tokens: int
    fitting: Fitting


@dataclass(frozen=True)
class Study:
    """The study's folder, data and size; cells that are finished there are not run again."""

    folder: Path
    data: Path
    size: Size
    makers: Mapping[str, Any] = field(default_factory=lambda: SUBJECTS)

    def run(self) -> list[dict[str, Any]]:
        """Every cell: results by model, construction, router, share and seed."""
        results = []
        for name in self.size.subjects:
            work = Work(self, self.makers[name](self.folder, self.data, self.size.recipe))
            for router in self.size.routers:  # outside: its programs serve all constructions
                for seed in self.size.seeds:
                    for construction in self.size.constructions:
                        results += work.run(construction, router, seed)
            results += work.run(*THRESHOLD, 0)
        return results


class Work:
    """One dense model: what its layers read, its partitions and compiled programs, made when first needed."""

    def __init__(self, study: Study, subject: Subject) -> None:
        self.size, self.folder, self.subject = study.size, study.folder, subject
        self._groups: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        self._sums: dict[tuple[str, float], SumsOf] = {}

    def run(self, construction: str, router: str, seed: int) -> list[dict[str, Any]]:
        """The results of a cell, a mapping for each share, measured now where they are not there yet."""
        size, subject = self.size, self.subject
        cell = Cell(
            subject.name,
            construction,
            router,
            CONSTRUCTIONS.get(construction),
            ROUTERS.get(router),
            size.shares,
            size.neurons,
            size.tokens,
            Fitting(epochs=size.epochs, seed=seed),
        )
        identity = run_id(cell, seed, subject.identity, REVISION)[:6]
        name = f"{subject.name}-{construction}-{router}-seed{seed}-{identity}".replace(" ", "-")
        run = Run.open(
            self.folder, cell, seed=seed, data_fingerprint=subject.identity, revision=REVISION, name=name
        )
        if run.state != "finished":
            found = self._threshold(cell) if cell.selection is None else self._convert(cell, seed)
            run.finish({"shares": found, "dense": self.dense, "made": subject.made})
            logger.info("%s: %s", name, found)
        told = {"subject": subject.name, "construction": construction, "router": router, "seed": seed}
        dense = {f"dense {what}": value for what, value in run.result["dense"].items()}
        return [{**told, **dense, **one, "made": run.result["made"]} for one in run.result["shares"]]

    @cached_property
    def layers(self) -> Layers:
        """The dense model's feed-forward layers."""
        return Layers.of(self.subject.model, self.subject.params)

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        """What each layer reads on training tokens, as many as experts are made from and an eighth more."""
        rows = spread_out(self.subject.train, max(32, self.size.tokens // 8))  # none has so few tokens
        batches = evaluation_batches(rows, 32)
        return capture_inputs(self.layers, batches, self.size.tokens * 9 // 8)

    @cached_property
    def dense(self) -> dict[str, float]:
        """What the dense model scores."""
        return self._scores(self.subject.params, make_evaluation(self._loss(self.subject.model)))

    def _convert(self, cell: Cell, seed: int) -> list[dict[str, Any]]:
        """Partition and router of every layer, then quality and captured mass at each share."""
        assert cell.selection is not None and cell.partition is not None
        groups = self._partition(cell, seed)
        experts = {path: regrouped(dense, groups[path]) for path, dense in self.layers.dense.items()}
        routers = {
            path: fit_selection(
                cell.selection,
                experts[path],
                centres(dense, groups[path]),
                self.inputs[path][: cell.tokens],
                cell.fitting,
            )
            for path, dense in self.layers.dense.items()
        }
        params = grafted(
            self.layers.params, {path: layer_parameters(experts[path], routers[path]) for path in experts}
        )
        return [self._at(cell, share, experts, routers, params) for share in cell.shares]

    def _at(
        self,
        cell: Cell,
        share: float,
        experts: Mapping[str, Experts],
        routers: Mapping[str, Params],
        params: Params,
    ) -> dict[str, Any]:
        assert cell.selection is not None
        wanted = Moefication(share, cell.neurons, selection=cell.selection)
        config = self.layers.model.config
        model = replace(self.subject.model, config=moefied_config(config, wanted))
        key = cell.router, share
        if key not in self._sums:
            self._sums[key] = make_evaluation(self._loss(model))
        kept = [
            captured(
                cell.selection,
                routers[path],
                experts[path],
                self.inputs[path][cell.tokens :],
                wanted.chosen(experts[path].count),
            )
            for path in experts
        ]
        means = {
            name: float(np.mean([getattr(one, name) for one in kept])) for name in ("mass", "best", "recall")
        }
        return {"share": share, **self._scores(params, self._sums[key]), **means}

    def _partition(self, cell: Cell, seed: int) -> dict[str, np.ndarray]:
        key = cell.construction, seed
        if key not in self._groups:
            assert cell.partition is not None
            self._groups[key] = {
                path: cell.partition.groups(
                    dense, self.inputs[path][: cell.tokens], expert_count(dense.count, cell.neurons), seed
                )
                for path, dense in self.layers.dense.items()
            }
        return self._groups[key]

    def _threshold(self, cell: Cell) -> list[dict[str, Any]]:
        """Without experts: small activations at zero, by a threshold for each layer, neuron by neuron."""
        model, params = self.layers.model, self.layers.params
        batches = list(evaluation_batches(spread_out(self.subject.train, 256), 32))
        results = []
        for share in cell.shares:
            edits = find_thresholds(model, params, batches, share).edits()

            loss = self._head_loss(edited(model, edits))
            results.append({"share": share, **self._scores(params, make_evaluation(loss))})
        return results

    def _loss(self, model: Transformer) -> Any:
        return self._head_loss(full_tuning(model))

    def _head_loss(self, forward: Forward) -> Any:
        return (classification if "sst2" in self.subject.name else language_modelling)(forward)

    def _scores(self, params: Params, sums_of: SumsOf) -> dict[str, float]:
        means = evaluation_of(sums_of, self.subject.test, Layout.single())
        assert means is not None
        found = means(params, {})
        return {name: float(found[name]) for name in ("loss", "accuracy")}


def edited(model: Transformer, edits: Mapping[str, Any]) -> Forward:
    """The model with values at hooks replaced, as losses take it."""

    def forward(
        trainable: Any, frozen: Any, tokens: jax.Array, *, rng: Any, train: bool, **inputs: Any
    ) -> Any:
        return run_with_edits(model, trainable, tokens, edits=edits, **inputs)

    return forward


def used(results: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """The results that have these values."""
    return [one for one in results if all(one[name] == value for name, value in wanted.items())]
