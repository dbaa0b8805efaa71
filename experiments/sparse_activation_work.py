"""What a cell of the study of sparse activation does: its text, its training, and what is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import InputError
from ..models import Learned, Transformer, TransformerConfig, multi_head
from ..models.costs import parameter_count
from ..models.model import Params
from ..parallel.layout import Layout
from ..research.data.batches import Rows, evaluation_batches
from ..research.data.packing import packed_corpus
from ..research.data.parts import every_nth
from ..research.data.sources import load_source
from ..research.data.tokenizers import Tokenizer, train_tokenizer
from ..research.sparsity.mass import measure_mass
from ..research.sparsity.statistics import ActivationStatistics, Counter
from ..research.study.runs import Run
from ..research.training.job import Job
from ..research.training.loop import train
from ..research.training.tasks import language_model_job
from .moefication_subjects import CORPORA, LENGTH

if TYPE_CHECKING:
    from .sparse_activation import Decoder

HEAD = 16  # channels of an attention head
PROBE = 32  # rows that neurons are counted on during training
GRID = np.linspace(0.0, 1.0, 201)  # shares of active neurons at which the distribution is kept
BOUNDS = (0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Texts:
    """Packed rows to train on and to measure on, and what makes them what they are."""

    train: Rows
    test: Rows
    vocab: int
    identity: str

    @classmethod
    def of(cls, data: Path, folder: Path, vocab: int) -> Texts:
        """WikiText-2 and Tiny Shakespeare, cut by a tokenizer that is trained on the first side."""
        sources = [
            [load_source(str(data / name / f"{splits[side]}.txt")) for name, splits in CORPORA.items()]
            for side in (0, 1)
        ]
        texts = [[text for source in side for text in source.texts()] for side in sources]
        digest = "-".join(source.fingerprint for side in sources for source in side)
        path = folder / f"tokenizer-{vocab}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            train_tokenizer(texts[0], vocab).save(path)
        tokenizer = Tokenizer.load(path)
        rows = [
            packed_corpus(text, tokenizer, LENGTH, folder / "data", f"{digest}-{side}-{vocab}")
            for side, text in enumerate(texts)
        ]
        return cls(rows[0], rows[1], tokenizer.vocab, f"{digest}-{tokenizer.fingerprint}")


@dataclass(frozen=True)
class Noise:
    """The rows with targets, and where `inputs` with tokens too, drawn evenly from the vocabulary.

    A row's draw depends on its number and `side` alone: it is the same in every pass, and what is measured on
    (another side) has no row of what is trained on.
    """

    rows: Rows
    vocab: int
    inputs: bool
    side: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        row = dict(self.rows[index])
        drawn = np.random.default_rng([self.side, index]).integers(
            0, self.vocab, len(row["tokens"]) + 1, np.int32
        )
        row["targets"] = drawn[1:]
        if self.inputs:
            row["tokens"] = drawn[:-1]
        return row


def trained_and_measured(decoder: Decoder, texts: Texts, run: Run) -> dict[str, Any]:
    """Train the decoder, or go on with it, and count its neurons on text that was held out."""
    noise: Callable[[Rows, int], Rows] = {
        "text": lambda rows, side: rows,
        "random labels": lambda rows, side: Noise(rows, texts.vocab, False, side),
        "random tokens": lambda rows, side: Noise(rows, texts.vocab, True, side),
    }[decoder.data]
    rows, test = noise(texts.train, 0), noise(every_nth(texts.test, decoder.test_rows), 1)
    model = Transformer(config_of(decoder, texts.vocab))
    counter = Counter(model, (decoder.site,))

    def counted(params: Params, of: Rows) -> ActivationStatistics:
        return counter.measure(params, evaluation_batches(of, PROBE))

    job = language_model_job(
        model, rows, decoder.training, layout=Layout.single(), evaluation=test, penalty=decoder.prices
    )
    start = jax.jit(model.init)(jax.random.key(decoder.seed), jnp.zeros((1, LENGTH), jnp.int32))
    first = counted(start, every_nth(test, PROBE))
    outcome = train(
        watching(job, lambda params: counted(params, every_nth(test, PROBE))), decoder.training, run
    )
    if outcome.stopped:
        raise InputError(f"{run.folder}: stopped ({outcome.stopped}); start the study again to go on")
    params, last = outcome.state.trainable, outcome.evaluations[-1]
    found = counted(params, test)
    return {
        "loss": last["loss"],
        "accuracy": last["accuracy"],
        "parameters": parameter_count(model),
        "steps": [{"step": 0, **shares(first)}, *outcome.evaluations],
        "train active": counted(params, every_nth(rows, decoder.test_rows)).active_ratio,
        **described(found),
        "effective": effective(model, params, test, decoder.site),
    }


def config_of(decoder: Decoder, vocab: int) -> TransformerConfig:
    """The decoder's configuration."""
    return TransformerConfig(
        layers=decoder.layers,
        width=decoder.width,
        vocab=vocab,
        attention=multi_head(max(1, decoder.width // HEAD)),
        mlp=decoder.mlp,
        positions=Learned(LENGTH),
        scan=True,  # a cell compiles as long as it trains otherwise
    )


def watching(job: Job, counted: Callable[[Params], ActivationStatistics]) -> Job:
    """The job, with neurons counted beside each of its evaluations."""
    evaluate = job.evaluate
    assert evaluate is not None

    def with_shares(trainable: Any, frozen: Any) -> dict[str, float]:
        return {**evaluate(trainable, frozen), **shares(counted(trainable))}

    return replace(job, evaluate=with_shares)


def shares(found: ActivationStatistics) -> dict[str, float]:
    """What is watched during training: active neurons of the mean token, and the talk's two statements."""
    return {
        "active": found.active_ratio,
        "below 5%": found.fraction_of_inputs_below(0.05),
        "ever active": found.ever_active,
    }


def described(found: ActivationStatistics) -> dict[str, Any]:
    """All that the tables and figures show of a trained model."""
    frequency = np.concatenate([layer.frequency for layer in found.layers])
    return {
        **shares(found),
        "below": {f"{bound:.0%}": found.fraction_of_inputs_below(bound) for bound in BOUNDS},
        "tokens": found.layers[0].tokens,
        "by layer": [layer.active_ratio for layer in found.layers],
        "inputs' 80%": share_of_inputs(found, 0.8),
        "cumulative": found.cumulative(GRID + 1e-9).tolist(),
        "frequency": np.quantile(frequency, GRID).tolist(),
        "rare": float(np.mean(frequency < 0.01)),
        "always on": sum(len(layer.always_on) for layer in found.layers) / len(frequency),
    }


def share_of_inputs(found: ActivationStatistics, part: float) -> float:
    """The smallest share of active neurons, on a grid of half percents, that `part` of the inputs keep to."""
    return float(GRID[np.argmax(found.cumulative(GRID + 1e-9) >= part)])


def effective(model: Transformer, params: Params, rows: Rows, site: str) -> float:
    """The effective number of neurons of a token (exp of the entropy of their sizes), mean over layers."""
    layers = measure_mass(model, params, evaluation_batches(rows, PROBE), names=site)
    return float(np.mean([layer.effective for layer in layers]))
