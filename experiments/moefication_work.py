"""A cell of the study of MoEfication: one dense model, cut into experts in one way, with one router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
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
    expert_mass,
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
from ..research.study.runs import RESULT, run_name
from ..research.study.study import run_cell
from ..research.training.evaluation import SumsOf, make_evaluation
from ..research.training.objectives import Forward, Loss, full_tuning
from ..research.training.tasks import evaluation_of
from .moefication_subjects import Subject

if TYPE_CHECKING:
    from .moefication import Study

REVISION = 2
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
TRAINED = ("MLP", "low-rank")
THRESHOLD = "no experts", "threshold"
HEADLINE = 0.2  # the share of neurons that claims are about


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


class Work:
    """One dense model: what its layers read, its partitions and compiled programs, made when first needed."""

    def __init__(self, study: Study, subject: Subject) -> None:
        self.size, self.folder, self.subject = study.size, study.folder, subject
        self.finished = study.finished
        self._groups: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        self._sums: dict[tuple[str, float], SumsOf] = {}

    def cell(self, construction: str, router: str, seed: int) -> Cell:
        """What the run of these asks."""
        size = self.size
        partition, selection = CONSTRUCTIONS.get(construction), ROUTERS.get(router)
        fitting = Fitting(epochs=size.epochs, seed=seed)
        asked = partition, selection, size.shares, size.neurons, size.tokens, fitting
        return Cell(self.subject.name, construction, router, *asked)

    def run(self, construction: str, router: str, seed: int) -> list[dict[str, Any]]:
        """The results of a cell, a mapping for each share, measured now where they are not there yet."""
        cell, subject = self.cell(construction, router, seed), self.subject
        asked: dict[str, Any] = {"data_fingerprint": subject.identity, "revision": REVISION}
        name = f"{subject.name}-{construction}-{router}-seed{seed}".replace(" ", "-")
        done = self.folder / run_name(name, cell, seed, **asked) / RESULT
        if self.finished and not done.exists():
            return []

        def measure(folder: Path) -> Mapping[str, Any]:
            found = self._threshold(cell) if cell.selection is None else self._convert(cell)
            return {"shares": found, "dense": self.dense, "made": subject.made}

        result = run_cell(self.folder, cell, name, measure, seed=seed, **asked).result
        told = {"subject": subject.name, "construction": construction, "router": router, "seed": seed}
        dense = {f"dense {what}": value for what, value in result["dense"].items()}
        return [{**told, **dense, **one, "made": result["made"]} for one in result["shares"]]

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
    def dense(self) -> dict[str, Any]:
        """What the dense model scores, how active and how uneven its neurons are, and its sizes."""
        scores = self._scores(self.subject.params, make_evaluation(self._loss(self.subject.model)))
        [neurons] = {dense.count for dense in self.layers.dense.values()}
        sizes = {
            "width": self.layers.model.config.width,
            "neurons": neurons,
            "layers": len(self.layers.dense),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.subject.params)),
            "rows": len(self.subject.test),
        }
        return scores | neuron_spread(self.layers, self.unseen()) | sizes

    def unseen(self) -> dict[str, np.ndarray]:
        """What each layer reads on the tokens that experts and routers are not made from."""
        return {path: found[self.size.tokens :] for path, found in self.inputs.items()}

    def converted(self, cell: Cell) -> tuple[dict[str, Experts], dict[str, Params]]:
        """Experts and router of every layer."""
        assert cell.selection is not None and cell.partition is not None
        groups = self._partition(cell)
        experts = {path: regrouped(dense, groups[path]) for path, dense in self.layers.dense.items()}
        routers: dict[str, Params] = {
            path: fit_selection(
                cell.selection,
                experts[path],
                centres(dense, groups[path]),
                self.inputs[path][: cell.tokens],
                cell.fitting,
            )
            for path, dense in self.layers.dense.items()
        }
        return experts, routers

    def _convert(self, cell: Cell) -> list[dict[str, Any]]:
        """Partition and router of every layer, then quality and captured mass at each share."""
        experts, routers = self.converted(cell)
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
        unseen, count = self.unseen(), next(iter(experts.values())).count
        chosen = wanted.chosen(count)
        kept = [
            captured(cell.selection, routers[path], experts[path], unseen[path], chosen) for path in experts
        ]
        means = {
            name: float(np.mean([getattr(one, name) for one in kept])) for name in ("mass", "best", "recall")
        }
        by_layer = {f"{name} by layer": [getattr(one, name) for one in kept] for name in ("mass", "recall")}
        neurons = self.layers.dense[next(iter(experts))].count
        products = share_of_products(cell.selection, chosen, count, config.width, neurons)
        cost = {"used": chosen / count, "products": products}
        return {"share": share, **cost, **self._scores(params, self._sums[key]), **means, **by_layer}

    def _partition(self, cell: Cell) -> dict[str, np.ndarray]:
        key = cell.construction, cell.fitting.seed
        if key not in self._groups:
            assert cell.partition is not None
            self._groups[key] = {
                path: cell.partition.groups(
                    dense,
                    self.inputs[path][: cell.tokens],
                    expert_count(dense.count, cell.neurons),
                    cell.fitting.seed,
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
            scores = self._scores(params, make_evaluation(self.subject.loss_of(edited(model, edits))))
            results.append({"share": share, "used": share, "products": (1 + share) / 2, **scores})
        return results

    def _loss(self, model: Transformer) -> Loss:
        return self.subject.loss_of(full_tuning(model))

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


def neuron_spread(layers: Layers, inputs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over layers and tokens: the share of neurons that is active, and the largest fifth's mass."""
    active, held = [], []
    for path, dense in layers.dense.items():
        sizes = np.asarray(expert_mass(dense, jnp.asarray(inputs[path])))
        active.append((sizes > 0).mean())
        sizes = sizes[sizes.sum(-1) > 0]
        largest = -np.sort(-sizes, axis=-1)[:, : round(HEADLINE * dense.count)]
        held.append((largest.sum(-1) / sizes.sum(-1)).mean())
    return {"active": float(np.mean(active)), "largest": float(np.mean(held))}


def share_of_products(selection: Selection, chosen: int, experts: int, width: int, neurons: int) -> float:
    """Multiplications of a converted layer over the dense one's, the router's included.

    The oracle has to compute the first product whole before it knows whose second to leave out.
    """
    used = chosen / experts
    if isinstance(selection, OracleSelection):
        return (1 + used) / 2
    return used + selection.flops(width, experts) / (4 * width * neurons)
