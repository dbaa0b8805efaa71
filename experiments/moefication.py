"""How much of a model is left when each token uses a tenth to a half of its feed-forward neurons.

Claims put to the test (Zhang et al., "MoEfication", 2022): with 20% of the neurons in experts, chosen by a
small network, at least 97% of the dense model's quality is left where experts are clusters of neurons, and
clearly less where they are random; an oracle that knows what fires keeps most of it even then.

Command: `modicum study moefication` (three seeds), `--size quick` for one seed, `--size smoke` for a minute.
Stopped at any point and started again, it goes on. Cost and expected result: docs/results/moefication.md.

Dense ReLU models, a decoder trained here, MiniLM-L6 with sst2 and a decoder trained here to be sparser, are
cut into experts of 32 neurons in four ways; five routers choose {10, 20, 30, 50}% of the experts of each
token. Experts and routers are made from training tokens. Captured mass is measured on training tokens that
were held out of that, quality on test rows that nothing was chosen on. Seeds draw partitions and the order of
the routers' data, not the models. Cells of the first seed come first, so that a study that is stopped has
whole tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import InputError
from .moefication_costs import layer_times
from .moefication_subjects import Recipe, Subject, decoder, minilm, sparse_decoder
from .moefication_work import CONSTRUCTIONS, ROUTERS, THRESHOLD, TRAINED, Work

SUBJECTS: Mapping[str, Callable[..., Subject | None]] = {
    "decoder": decoder,
    "minilm": minilm,
    "sparse decoder": sparse_decoder,
}


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
    "quick": Size(
        Recipe(steps=200, test_rows=96, tuning_steps=80, tuning_test_rows=128),
        tokens=4096,
        epochs=15,
        seeds=(0,),
        subjects=("decoder", "minilm"),
    ),
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
class Study:
    """The study's folder, data and size; cells that are finished there are not run again.

    With `finished` no other cells are run: the results are those that there are.
    """

    folder: Path
    data: Path
    size: Size
    finished: bool = False

    @cached_property
    def works(self) -> dict[str, Work | None]:
        """The dense models that were asked for so far."""
        return {}

    def work(self, name: str) -> Work | None:
        """The dense model of this name, trained now where it is not yet; None where it shall be finished."""
        if name not in self.works:
            subject = SUBJECTS[name](self.folder, self.data, self.size.recipe, self.finished)
            self.works[name] = None if subject is None else Work(self, subject)
        return self.works[name]

    def run(self) -> list[dict[str, Any]]:
        """Every cell: results by model, construction, router, share and seed; models in the size's order."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.size.subjects}
        for seed in self.size.seeds:
            for name, results in found.items():
                if (work := self.work(name)) is not None:
                    for construction, router in self.cells(seed):
                        results += work.run(construction, router, seed)
        if not any(found.values()):
            raise InputError(f"{self.folder}: no cell of this size is finished")
        return [each for results in found.values() for each in results]

    def times(self, measure: bool) -> list[dict[str, Any]]:
        """What `layer_times` says of each model that has cells."""
        works = [self.work(name) for name in self.size.subjects]
        return [each for work in works if work is not None for each in layer_times(work, measure)]

    def cells(self, seed: int) -> Iterator[tuple[str, str]]:
        """Constructions and routers; what draws nothing is run with the first seed only."""
        first = seed == self.size.seeds[0]
        for router in self.size.routers:
            for construction in self.size.constructions:
                if first or construction != "contiguous" or router in TRAINED:
                    yield construction, router
        if first:
            yield THRESHOLD


def used(results: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """The results that have these values."""
    return [one for one in results if all(one[name] == value for name, value in wanted.items())]
