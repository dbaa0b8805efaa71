"""Which neurons fire in decoders of growing width and depth, and what it costs to let fewer of them.

Claims put to the test: 80% of inputs activate less than 5% of the feed-forward neurons (the talk, of
T5-Large); almost every neuron is active for some input (ibid.); larger models are sparser, and sparsity comes
with random labels and random inputs too (Li et al., "The Lazy Neuron Phenomenon", 2023); top-k costs no
quality (ibid.), nor does statistical top-k (You et al., "Spark Transformer", 2025).

Command: `modicum study sparse-activation` (three seeds), `--size quick` for one seed, `--size smoke` for a
minute. Stopped at any point and started again, it goes on. Cost, result: docs/results/sparse_activation.md.

Each cell is a decoder trained here from scratch on WikiText-2's valid split and Tiny Shakespeare, and
measured on text that these hold out. All cells have one learning rate, one batch and one number of steps.
Cells of the first seed come first, so that a study that is stopped has a whole table.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .. import InputError
from ..models.mlp import MLP, GatedMLP
from ..models.sparse_activations import FATReLU, StatisticalTopK, TopK
from ..research.study.runs import RESULT, Run, run_id
from ..research.study.study import run_study
from ..research.study.sweeps import Sweep, chain, grid, product
from ..research.training.activation_penalty import ActivationPenalty
from ..research.training.config import OptimizerConfig, TrainingConfig
from .sparse_activation_work import Texts, trained_and_measured

logger = logging.getLogger(__name__)

REVISION, NOISE_REVISION = 1, 2  # cells on noise were first measured on rows that some were trained on
Data = Literal["text", "random labels", "random tokens"]
FeedForward = MLP | GatedMLP


@dataclass(frozen=True)
class Decoder:
    """One cell: a decoder, what it is trained on, and how.

    `neurons` 0 are four a channel. `activation` says what the layer is, `penalty` the price on activations at
    the end (0: none), reached along half a sine. `watched` times on the way the neurons are counted.
    """

    width: int = 64
    layers: int = 4
    neurons: int = 0
    activation: str | FATReLU | TopK | StatisticalTopK = "relu"
    penalty: float = 0.0
    data: Data = "text"
    seed: int = 0
    steps: int = 300
    batch: int = 8
    vocab: int = 1024
    rate: float = 2e-3
    test_rows: int = 64
    watched: int = 6

    @property
    def mlp(self) -> FeedForward:
        """The feed-forward choice; of a gated one two thirds of the neurons, for as many weights."""
        neurons = self.neurons or 4 * self.width
        if self.activation == "drelu":
            return GatedMLP(2 * neurons // 3, "drelu")
        return MLP(neurons, self.activation)

    @property
    def revision(self) -> int:
        """What its results are comparable with."""
        return REVISION if self.data == "text" else NOISE_REVISION

    @property
    def site(self) -> str:
        """The hook whose values above 0 are active neurons."""
        return "mlp/mid" if isinstance(self.mlp, GatedMLP) else "mlp/act"

    @property
    def prices(self) -> ActivationPenalty | None:
        """The schedule of the penalty: nothing for a tenth of the steps, all of it from the half on."""
        if not self.penalty:
            return None
        return ActivationPenalty(((self.steps // 10, 0.0), (self.steps // 2, self.penalty)), self.site)

    @property
    def training(self) -> TrainingConfig:
        """How it is trained."""
        return TrainingConfig(
            self.steps,
            self.batch,
            optimizer=OptimizerConfig("adamw", self.rate, weight_decay=0.1),
            seed=self.seed,
            evaluate_every=max(1, self.steps // self.watched),
            log_every=50,
        )


@dataclass(frozen=True)
class Size:
    """How much of everything: the cell that all others differ from, and what they have instead."""

    base: Decoder = Decoder()
    widths: tuple[int, ...] = (32, 64, 128, 256)
    depths: tuple[int, ...] = (1, 2, 4, 8)
    neurons: tuple[int, ...] = (64, 256, 1024)
    data: tuple[Data, ...] = ("random labels", "random tokens")
    functions: tuple[str | FATReLU, ...] = ("relu2", FATReLU(0.1), "drelu")
    kept: tuple[int, ...] = (8, 16, 32, 64)
    penalties: tuple[float, ...] = (0.1, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)


SIZES: Mapping[str, Size] = {
    "full": Size(Decoder(steps=800)),
    "quick": Size(
        Decoder(steps=100, watched=2),
        widths=(32, 64),
        depths=(2, 4),
        neurons=(64, 256),
        kept=(16,),
        penalties=(1.0,),
        seeds=(0,),
    ),
    "smoke": Size(
        Decoder(width=16, layers=1, steps=4, batch=4, vocab=300, test_rows=8, watched=2),
        widths=(16,),
        depths=(1,),
        neurons=(64, 96),
        data=("random labels",),
        functions=(),
        kept=(8,),
        penalties=(),
        seeds=(0,),
    ),
}


def sweep(size: Size) -> Sweep:
    """Every seed's cells, each once: those of size first, but for the widest, which takes longest."""
    base = size.base
    induced = [*size.functions, *(kind(k) for k in size.kept for kind in (TopK, StatisticalTopK))]
    widths = [each for each in size.widths if each != base.width]
    cells = chain(
        [{}],
        grid(layers=[each for each in size.depths if each != base.layers]),
        grid(neurons=[each for each in size.neurons if each != 4 * base.width]),
        grid(data=size.data),
        grid(width=widths[:-1]),
        grid(activation=induced),
        grid(penalty=size.penalties),
        grid(width=widths[-1:]),
    )
    return product(grid(seed=size.seeds), cells)


@dataclass(frozen=True)
class Study:
    """The study's folder, data and size; cells that are finished there are not run again.

    With `finished` no other cells are run: the results are those that there are.
    """

    folder: Path
    data: Path
    size: Size
    finished: bool = False

    def run(self) -> list[dict[str, Any]]:
        """Every cell: its fields beside what was measured, and whether it is of the `base` decoder."""
        texts = Texts.of(self.data, self.folder, self.size.base.vocab)

        def cell(decoder: Decoder, run: Run) -> Mapping[str, Any]:
            found = trained_and_measured(decoder, texts, run)
            logger.info("%s: %.1f%% active, loss %.3f", decoder, 100 * found["active"], found["loss"])
            return found

        results = []
        for overrides in sweep(self.size):
            decoder = replace(self.size.base, **overrides)
            identity = run_id(decoder, 0, texts.identity, decoder.revision)
            if self.finished and not (self.folder / identity / RESULT).exists():
                continue
            [found] = run_study(
                self.folder,
                self.size.base,
                [overrides],
                cell,
                data_fingerprint=texts.identity,
                revision=decoder.revision,
            )
            base = replace(decoder, seed=self.size.base.seed) == self.size.base
            results.append({**vars(decoder), "F": decoder.mlp.width, "base": base, **found})
        if not results:
            raise InputError(f"{self.folder}: no cell of this size is finished")
        return results
