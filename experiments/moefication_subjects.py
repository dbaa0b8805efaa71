"""The models that the study of MoEfication converts: ReLU decoders trained here, and MiniLM made ReLU.

One decoder is trained plainly, and one with a price on activations, since what is claimed was found on models
of which a few per cent of the neurons are active, and a small decoder that is trained briefly is not sparse.

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
from ..research.study.runs import RESULT, Run, run_name
from ..research.training.activation_penalty import ActivationPenalty
from ..research.training.config import OptimizerConfig, TrainingConfig
from ..research.training.loop import train
from ..research.training.model_folder import TrainedModel, load_model, save_model, with_classifier
from ..research.training.objectives import Forward, Loss, classification, language_modelling
from ..research.training.tasks import language_model_job, tuning_job
from .delta_methods import Backbone
from .delta_tasks import TASKS, load_task

REVISION = 2
LENGTH = 128  # tokens of the decoder's rows
CORPORA = {"wikitext2_valid_test": ("valid", "test"), "tinyshakespeare": ("train", "valid")}


@dataclass(frozen=True)
class Recipe:
    """How the models are made: steps and rows of a batch, of each; rows of the test sets (0: all).

    `price` on activations at the end of the sparse decoder's training, reached along half a sine.
    """

    steps: int = 400
    batch: int = 16
    width: int = 256
    layers: int = 4
    vocab: int = 2048
    price: float = 1.0
    test_rows: int = 192
    tuning_steps: int = 300
    tuning_batch: int = 16
    tuning_rate: float = 1e-4
    tuning_test_rows: int = 512

    def penalty(self) -> ActivationPenalty:
        """Nothing for a tenth of the steps, all of the price from the half on."""
        return ActivationPenalty(((self.steps // 10, 0.0), (max(1, self.steps // 2), self.price)))


@dataclass(frozen=True)
class Subject:
    """A trained dense model, what it is measured on, and what experts and routers are made from."""

    name: str
    model: Transformer
    params: Params
    train: Rows
    test: Rows
    loss_of: Callable[[Forward], Loss]
    identity: str
    made: Mapping[str, Any]


def decoder(folder: Path, data: Path, recipe: Recipe, finished: bool = False) -> Subject | None:
    """The decoder on WikiText-2 (its valid split) and Tiny Shakespeare, measured on what these hold out.

    None where it is not trained yet and shall be `finished`.
    """
    return _decoder(folder, data, recipe, finished, "decoder", None)


def sparse_decoder(folder: Path, data: Path, recipe: Recipe, finished: bool = False) -> Subject | None:
    """The same, trained with a price on activations."""
    return _decoder(folder, data, recipe, finished, "sparse decoder", recipe.penalty())


def _decoder(
    folder: Path, data: Path, recipe: Recipe, finished: bool, name: str, penalty: ActivationPenalty | None
) -> Subject | None:
    sources = [
        [load_source(str(data / corpus / f"{split}.txt")) for split in splits]
        for corpus, splits in CORPORA.items()
    ]
    texts = [[text for own in sources for text in own[side].texts()] for side in (0, 1)]
    digest = "-".join(own[side].fingerprint for own in sources for side in (0, 1))
    training = TrainingConfig(
        recipe.steps, recipe.batch, optimizer=OptimizerConfig("muon", 0.02, weight_decay=0.1)
    )
    asked = recipe.width, recipe.layers, recipe.vocab, recipe.test_rows, training, penalty
    run = _open(folder, name.replace(" ", "-"), asked, digest, finished)
    if run is None:
        return None
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
        model, layout = Transformer(config), Layout.single()
        job = language_model_job(model, rows[0], training, layout=layout, evaluation=test, penalty=penalty)
        _train(run, job, training, model, tokenizer)
    return _subject(name, run, rows[0], test, language_modelling)


def minilm(folder: Path, data: Path, recipe: Recipe, finished: bool = False) -> Subject | None:
    """MiniLM with ReLU, tuned wholly on sst2; noted beside it is what GELU reaches by the same training.

    None where it is not trained yet and shall be `finished`.
    """
    backbone = Backbone.minilm()
    given = {"dev_rows": 0, "test_rows": recipe.tuning_test_rows}
    rows = load_task(data, TASKS["sst2"], backbone.tokenizer, **given)
    training = TrainingConfig(
        recipe.tuning_steps, recipe.tuning_batch, optimizer=OptimizerConfig("adamw", recipe.tuning_rate)
    )
    made: dict[str, Any] = {}
    for activation in ("gelu", "relu"):
        asked = recipe.tuning_test_rows, training, activation
        run = _open(folder, f"minilm-{activation}", asked, rows.fingerprint, finished)
        if run is None:
            return None
        if run.state != "finished":
            model, params = _with_activation(backbone, activation, len(rows.labels))
            layout = Layout.single()
            job = tuning_job(model, params, None, rows.train, training, layout=layout, evaluation=rows.test)
            _train(run, job, training, model, None)
        made[f"{activation} accuracy"] = run.result["accuracy"]
    assert run is not None
    found = _subject("MiniLM on sst2", run, rows.train, rows.test, classification)
    return replace(found, made=made)


def _with_activation(backbone: Backbone, activation: str, labels: int) -> tuple[Transformer, Params]:
    config = backbone.model.config
    mlp = config.mlp
    if not isinstance(mlp, MLP):
        raise InputError(f"MiniLM's mlp is a {type(mlp).__name__}; a plain MLP is expected")
    model = Transformer(replace(config, mlp=replace(mlp, activation=activation)), None)
    return with_classifier(TrainedModel(model, backbone.params), ClassifierHead(labels, "mean"), seed=0)


def _open(folder: Path, name: str, question: Any, digest: str, finished: bool) -> Run | None:
    name = run_name(name, question, 0, digest, REVISION)
    if finished and not (folder / name / RESULT).exists():
        return None
    return Run.open(folder, question, data_fingerprint=digest, revision=REVISION, name=name)


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
