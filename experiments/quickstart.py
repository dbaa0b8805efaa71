"""The whole story on one small model: train it, tune under 1% of it, count the neurons that fire.

Claims put to the test: deltas of about 1% of the parameters reach full tuning on a real task (not at this
scale: docs/quickstart.md), and a ReLU model leaves most of its feed-forward neurons silent (it does).

Command: `modicum quickstart` (offline, CPU; about four minutes on two cores), `--smoke` for a minute.
Killed at any point and started again, it continues; run again, it only rewrites the report.

The corpus is the running Python's own standard library. The task is to say which of eight parts of the
library a masked snippet comes from; test modules are held out from the language model, too. Learning
rates come from a sweep on the dev split, one seed: `modicum quickstart --sweep`, kept in
docs/quickstart-sweep.md. Expected: see docs/quickstart.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..models import ClassifierHead, Transformer, TransformerConfig, preset
from ..parallel.layout import Layout
from ..research import delta
from ..research.data.batches import evaluation_batches
from ..research.data.examples import Labels, examples
from ..research.data.packing import packed_corpus
from ..research.data.parts import Part, spread_out
from ..research.data.standard_library import Document, corpus_fingerprint, library_documents, snippets
from ..research.data.tokenizers import Tokenizer, train_tokenizer
from ..research.sparsity.statistics import ActivationStatistics, measure
from ..research.study.records import read_records
from ..research.study.runs import Run, run_id
from ..research.training.config import OptimizerConfig, TrainingConfig
from ..research.training.loop import Outcome, train
from ..research.training.model_folder import TrainedModel, load_model, save_model, with_classifier
from ..research.training.recorder import Report
from ..research.training.tasks import EVALUATION_BATCH, language_model_job
from ..research.training.tuning import ClassificationRows, tune_classifier
from .baselines import BigramModel, corpus_pairs, majority_accuracy, naive_bayes_accuracy, target_pairs

REVISION = 1
LABEL_HEAD = "classifier"

METHODS: Mapping[str, delta.Spec | None] = {
    "full tuning": None,
    "LoRA": {"attention/(query|value)": delta.LoRA(rank=4), LABEL_HEAD: delta.Full()},
    "adapter": {"(attention/output|mlp/down)": delta.Adapter(width=4), LABEL_HEAD: delta.Full()},
    "BitFit": {
        "(query|key|value|output|up|down|[a-z_]*norm)": delta.BitFit(),
        LABEL_HEAD: delta.Full(),
    },
    "linear probe": {LABEL_HEAD: delta.Full()},
}

# Best dev accuracy in docs/quickstart-sweep.md.
LEARNING_RATES: Mapping[str, float] = {
    "full tuning": 3e-3,
    "LoRA": 3e-3,
    "adapter": 3e-3,
    "BitFit": 1e-2,
    "linear probe": 3e-2,
}
SWEEP = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    pretraining_steps: int = 320
    pretraining_batch: int = 16
    heldout_rows: int = 256
    evaluations: int = 4
    tuning_steps: int = 100
    tuning_evaluations: int = 2
    tuning_batch: int = 16
    snippets: int = 500
    dev_snippets: int = 40
    snippet_tokens: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)


FULL = Size()
SMOKE = Size(
    pretraining_steps=8,
    heldout_rows=64,
    evaluations=1,
    tuning_steps=4,
    tuning_evaluations=1,
    snippets=16,
    dev_snippets=8,
    seeds=(0, 1),
)

Bar = Callable[[str, int], AbstractContextManager[Report]]


@dataclass(frozen=True)
class Pretrained:
    """The language model, the text it was measured on, and what simpler models score there."""

    trained: TrainedModel
    tokenizer: Tokenizer
    heldout: Part
    result: Mapping[str, Any]
    identity: str
    losses: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Findings:
    """All that the report is made of; every number was measured by this study."""

    size: Size
    pretrained: Pretrained
    tunings: tuple[Mapping[str, Any], ...]
    baselines: Mapping[str, float]
    sparsity: Mapping[str, ActivationStatistics]
    counts: Mapping[str, int]


class Interrupted(Exception):
    """A signal stopped a run; everything so far is stored."""

    def __init__(self, outcome: Outcome, folder: Path) -> None:
        super().__init__(outcome.stopped)
        self.outcome, self.folder = outcome, folder


def run_quickstart(folder: Path, size: Size, bar: Bar) -> Findings:
    """Do what is not done yet below `folder`, and return what was found."""
    documents = library_documents()
    pretrained = pretrain(folder, documents, size, bar)
    rows = classification_rows(documents, pretrained, size)
    tunings = [
        tune(folder / "tuning", pretrained, rows, name, LEARNING_RATES[name], seed, size, bar)
        for name in METHODS
        for seed in size.seeds
    ]
    assert rows.test is not None
    counts = {"train": len(rows.train), "dev": len(rows.dev), "test": len(rows.test)}
    return Findings(
        size=size,
        pretrained=pretrained,
        tunings=tuple(tunings),
        baselines=classification_baselines(rows, pretrained.tokenizer.vocab),
        sparsity=measure_sparsity(pretrained),
        counts=counts,
    )


def sweep_learning_rates(folder: Path, size: Size, bar: Bar) -> list[Mapping[str, Any]]:
    """Every method at every rate of `SWEEP` with seed 0: where `LEARNING_RATES` comes from."""
    documents = library_documents()
    pretrained = pretrain(folder, documents, size, bar)
    rows = classification_rows(documents, pretrained, size)
    return [
        tune(folder / "sweep", pretrained, rows, name, rate, 0, size, bar)
        for name in METHODS
        for rate in SWEEP
    ]


def pretrain(folder: Path, documents: list[Document], size: Size, bar: Bar) -> Pretrained:
    """Train tokenizer and language model on the train modules; measure both on the dev modules."""
    texts = {split: [d.text for d in documents if d.split == split] for split in ("train", "dev")}
    training = TrainingConfig(
        steps=size.pretraining_steps,
        batch=size.pretraining_batch,
        optimizer=OptimizerConfig("muon", 0.02, weight_decay=0.1),
        evaluate_every=max(1, size.pretraining_steps // size.evaluations),
        checkpoint_every=max(1, size.pretraining_steps // 16),
    )
    config, fingerprint = preset("quick"), corpus_fingerprint(documents)
    run = open_run(folder, "language-model", (config, training), 0, fingerprint)
    tokenizer = tokenizer_of(run.folder / "tokenizer.json", texts["train"], config.vocab)
    model = Transformer(replace(config, vocab=tokenizer.vocab))
    packed = {
        split: packed_corpus(
            text, tokenizer, max_length(config), run.folder / "data", f"{fingerprint}-{split}"
        )
        for split, text in texts.items()
    }
    heldout = spread_out(packed["dev"], size.heldout_rows)
    if run.state != "finished":
        job = language_model_job(model, packed["train"], training, layout=Layout.single(), evaluation=heldout)
        with bar("language model", training.steps) as report:
            outcome = train(job, training, run, report=report)
        if outcome.stopped:
            raise Interrupted(outcome, run.folder)
        save_model(run.folder / "model", model, jax.device_get(outcome.best.evaluated), tokenizer=tokenizer)
        bigram = BigramModel(corpus_pairs(packed["train"]), tokenizer.vocab)
        run.finish(
            {
                "loss": min(evaluation["loss"] for evaluation in outcome.evaluations),
                "bigram_loss": bigram.loss(target_pairs(evaluation_batches(heldout, EVALUATION_BATCH))),
                "tokens_seen": training.steps * training.batch * max_length(config),
                "train_tokens": len(packed["train"]) * max_length(config),
            }
        )
    losses = [
        (record["step"], record["evaluation_loss"])
        for record in read_records(run.folder / "metrics.jsonl")
        if "evaluation_loss" in record
    ]
    trained = load_model(run.folder / "model")
    return Pretrained(trained, tokenizer, heldout, run.result, run.identity, tuple(losses))


def open_run(folder: Path, label: str, question: Any, seed: int, fingerprint: str) -> Run:
    """The run of this question, in a folder that people can read and that a changed question leaves alone."""
    identity = run_id(question, seed, fingerprint, REVISION)
    return Run.open(
        folder,
        question,
        seed=seed,
        data_fingerprint=fingerprint,
        revision=REVISION,
        name=f"{label}-{identity[:6]}",
    )


def tokenizer_of(path: Path, texts: list[str], vocab: int) -> Tokenizer:
    """The tokenizer at `path`, trained on `texts` where it is not there yet."""
    if not path.exists():
        train_tokenizer(texts, vocab).save(path)
    return Tokenizer.load(path)


def max_length(config: TransformerConfig) -> int:
    """How many positions the quickstart's model has."""
    return config.positions.max_length  # type: ignore[attr-defined]


def classification_rows(documents: list[Document], pretrained: Pretrained, size: Size) -> ClassificationRows:
    """The task's examples, cut to `snippet_tokens` on purpose: it is the same for all methods."""
    counts = {"train": size.snippets, "dev": size.dev_snippets, "test": size.snippets}
    sources = {split: snippets(documents, split, count) for split, count in counts.items()}
    labels = Labels.of(sources["train"])
    encoded = {
        split: examples(source, pretrained.tokenizer, labels, size.snippet_tokens, truncate=True)
        for split, source in sources.items()
    }
    return ClassificationRows(encoded["train"], encoded["dev"], encoded["test"], labels.names)


def tune(
    folder: Path,
    pretrained: Pretrained,
    rows: ClassificationRows,
    name: str,
    learning_rate: float,
    seed: int,
    size: Size,
    bar: Bar,
) -> Mapping[str, Any]:
    """One method at one learning rate with one seed; the seed draws head, delta and order of the data."""
    training = TrainingConfig(
        steps=size.tuning_steps,
        batch=size.tuning_batch,
        optimizer=OptimizerConfig("adamw", learning_rate),
        seed=seed,
        evaluate_every=max(1, size.tuning_steps // size.tuning_evaluations),
        best_metric="+accuracy",
    )
    spec = METHODS[name]
    question = (name, spec, training, pretrained.trained.model.config)
    label = f"{name.replace(' ', '-')}-{learning_rate:g}-seed{seed}"
    run = open_run(folder, label, question, seed, pretrained.identity)
    model, params = with_classifier(pretrained.trained, ClassifierHead(len(rows.labels), "mean"), seed)
    with bar(f"{name}, seed {seed}", training.steps) as report:
        outcome = tune_classifier(
            run, model, params, spec, rows, training, layout=Layout.single(), report=report
        )
    if outcome is not None and outcome.stopped:
        raise Interrupted(outcome, run.folder)
    total = delta.parameter_count(params)
    return {"method": name, "learning rate": learning_rate, "seed": seed, "parameters": total, **run.result}


def classification_baselines(rows: ClassificationRows, vocab: int) -> Mapping[str, float]:
    """Test accuracy of what needs no neural network."""
    train_rows, test_rows = rows.train, rows.test
    assert test_rows is not None
    return {
        "majority class": majority_accuracy(train_rows.labels, test_rows.labels),
        "naive Bayes": naive_bayes_accuracy(
            train_rows.ids, train_rows.labels, test_rows.ids, test_rows.labels, vocab
        ),
    }


def measure_sparsity(pretrained: Pretrained) -> Mapping[str, ActivationStatistics]:
    """Which neurons fire on held-out text, in the trained model and in a fresh one."""
    model = pretrained.trained.model
    fresh = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    batches = list(evaluation_batches(pretrained.heldout, EVALUATION_BATCH))
    return {
        "trained": measure(model, pretrained.trained.params, batches),
        "untrained": measure(model, fresh, batches),
    }
