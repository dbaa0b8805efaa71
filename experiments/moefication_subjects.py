"""The models that the study of MoEfication converts: a ReLU decoder trained here, and MiniLM made ReLU.

MiniLM-L6 has GELU, whose neurons are never silent: its activation function is replaced by ReLU and all its
parameters are tuned on sst2, from the published weights ("ReLUfication"; Zhang et al., 2022, did so to BERT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from .. import InputError
from ..models import MLP, ClassifierHead, Learned, Transformer, TransformerConfig, multi_head
from ..models.model import Params
from ..parallel.layout import Layout
from ..research.data.batches import Rows
from ..research.data.packing import packed_corpus
from ..research.data.parts import Part, spread_out
from ..research.data.sources import load_source
from ..research.data.tokenizers import Tokenizer, train_tokenizer
from ..research.study.runs import Run, run_id
from ..research.training.config import OptimizerConfig, TrainingConfig
from ..research.training.loop import train
from ..research.training.model_folder import TrainedModel, load_model, save_model, with_classifier
from ..research.training.objectives import Loss, classification, full_tuning, language_modelling
from ..research.training.tasks import language_model_job, tuning_job
from .delta_methods import Backbone
from .delta_tasks import TASKS, load_task

REVISION = 1
LENGTH = 128  # tokens of the decoder's rows
CORPORA = {"wikitext2_valid_test": ("valid", "test"), "tinyshakespeare": ("train", "valid")}


@dataclass(frozen=True)
class Recipe:
    """How the two models are made: steps and rows of a batch, of each; rows of the test sets (0: all)."""

    steps: int = 600
    batch: int = 16
    width: int = 256
    layers: int = 4
    vocab: int = 2048
    tuning_steps: int = 400
    tuning_batch: int = 16
    tuning_rate: float = 1e-4
    test_rows: int = 512


@dataclass(frozen=True)
class Subject:
    """A trained dense model, what it is measured on, and what experts and routers are made from."""

    name: str
    model: Transformer
    params: Params
    train: Rows
    test: Rows
    loss_of: Callable[[Transformer], Loss]
    identity: str
    made: Mapping[str, Any]


def decoder(folder: Path, data: Path, recipe: Recipe) -> Subject:
    """The decoder on WikiText-2 (its valid split) and Tiny Shakespeare, measured on what these hold out."""
    sources = [
        [load_source(str(data / name / f"{split}.txt")) for split in splits]
        for name, splits in CORPORA.items()
    ]
    texts = [[text for own in sources for text in own[side].texts()] for side in (0, 1)]
    digest = "-".join(own[side].fingerprint for own in sources for side in (0, 1))
    training = TrainingConfig(
        recipe.steps, recipe.batch, optimizer=OptimizerConfig("muon", 0.02, weight_decay=0.1)
    )
    asked = recipe.width, recipe.layers, recipe.vocab, recipe.test_rows
    run = _open(folder, "decoder", (asked, training), digest)
    path = run.folder / "tokenizer.json"
    if not path.exists():
        train_tokenizer(texts[0], recipe.vocab).save(path)
    tokenizer = Tokenizer.load(path)
    rows = [
        packed_corpus(text, tokenizer, LENGTH, run.folder / "data", f"{digest}-{side}")
        for side, text in enumerate(texts)
    ]
    test = spread_out(rows[1], recipe.test_rows or len(rows[1]))
    if run.state != "finished":
        config = TransformerConfig(
            layers=recipe.layers,
            width=recipe.width,
            vocab=tokenizer.vocab,
            attention=multi_head(recipe.width // 32),
            mlp=MLP(4 * recipe.width, "relu"),
            positions=Learned(LENGTH),
        )
        model = Transformer(config)
        job = language_model_job(model, rows[0], training, layout=Layout.single(), evaluation=test)
        _train(run, job, training, model, tokenizer)
    return _subject("decoder", run, rows[0], test, lambda model: language_modelling(full_tuning(model)))


def minilm(folder: Path, data: Path, recipe: Recipe) -> Subject:
    """MiniLM with ReLU, tuned wholly on sst2; noted beside it is what GELU reaches by the same training."""
    backbone = Backbone.minilm()
    rows = load_task(data, TASKS["sst2"], backbone.tokenizer, dev_rows=0, test_rows=recipe.test_rows)
    training = TrainingConfig(
        recipe.tuning_steps, recipe.tuning_batch, optimizer=OptimizerConfig("adamw", recipe.tuning_rate)
    )
    made: dict[str, Any] = {}
    for activation in ("gelu", "relu"):
        run = _open(
            folder, f"minilm-{activation}", (recipe.test_rows, training, activation), rows.fingerprint
        )
        if run.state != "finished":
            model, params = _with_activation(backbone, activation, len(rows.labels))
            given: dict[str, Any] = {"layout": Layout.single(), "evaluation": rows.test}
            job = tuning_job(model, params, None, rows.train, training, **given)
            _train(run, job, training, model, None)
        made[f"{activation} accuracy"] = run.result["accuracy"]
    found = _subject("MiniLM on sst2", run, rows.train, rows.test, lambda m: classification(full_tuning(m)))
    return replace(found, made=made)


def _with_activation(backbone: Backbone, activation: str, labels: int) -> tuple[Transformer, Params]:
    config = backbone.model.config
    mlp = config.mlp
    if not isinstance(mlp, MLP):
        raise InputError(f"MiniLM's mlp is a {type(mlp).__name__}; a plain MLP is expected")
    model = Transformer(replace(config, mlp=replace(mlp, activation=activation)), None)
    return with_classifier(TrainedModel(model, backbone.params), ClassifierHead(labels, "mean"), seed=0)


def _open(folder: Path, name: str, question: Any, digest: str) -> Run:
    identity = run_id(question, 0, digest, REVISION)
    return Run.open(
        folder, question, data_fingerprint=digest, revision=REVISION, name=f"{name}-{identity[:6]}"
    )


def _train(run: Run, job: Any, training: TrainingConfig, model: Transformer, tokenizer: Any) -> None:
    outcome = train(job, training, run)
    if outcome.stopped:
        raise InputError(f"{run.folder}: stopped ({outcome.stopped}); start the study again to go on")
    params = jax.device_get(outcome.state.trainable)
    save_model(run.folder / "model", model, params, tokenizer=tokenizer)
    assert job.evaluate is not None
    run.finish(dict(job.evaluate(params, {})))


def _subject(name: str, run: Run, train_rows: Rows, test: Part, loss_of: Any) -> Subject:
    trained = load_model(run.folder / "model")
    return Subject(name, trained.model, trained.params, train_rows, test, loss_of, run.identity, run.result)
