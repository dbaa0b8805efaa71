"""Making a trained model's neurons fall silent: another activation function, and training to make up for it.

Mirzadeh et al., "ReLU Strikes Back", 2023, put ReLU in the place of GELU or SiLU and go on training on text.
Where the text is not what the model learned from, the model as it was may teach instead: the changed one is
trained towards its distribution over the next token (Hinton et al., "Distilling the Knowledge in a Neural
Network", 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ... import InputError
from ...models.activations import change_activation
from ...models.heads import LanguageModelHead
from ...models.mlp import Activation
from ...models.model import Model, Params
from ...models.precision import promote_statistics
from ...models.transformer import Transformer
from ...parallel.layout import Layout
from ..data.batches import Rows
from ..study.runs import Run
from ..training.activation_penalty import ActivationPenalty, with_activation_penalty
from ..training.config import OptimizerConfig, TrainingConfig
from ..training.job import Job
from ..training.loop import train
from ..training.objectives import Batch, Forward, Loss, LossSums, full_tuning, inputs_of
from ..training.recorder import Report
from ..training.tasks import language_model_job

Tree = Any
TEACHER = "teacher"


@dataclass(frozen=True)
class Relufication:
    """What to make: the activation function, and who teaches: `text`, or the model `itself` as it was.

    `penalty` is a price on activations in training (Song et al., "ProSparse", 2024).
    """

    activation: Activation = "relu"
    teacher: Literal["itself", "text"] = "itself"
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(200, 8, optimizer=OptimizerConfig("adamw", 1e-4))
    )
    penalty: ActivationPenalty | None = None


@dataclass(frozen=True)
class Relufied:
    """The changed model, and its loss on text that was held out.

    `before` is the model's as it was, `swapped` with the other function and untrained, `after` in the end.
    """

    model: Transformer
    params: Params
    before: float
    swapped: float
    after: float


def relufy(
    model: Transformer,
    params: Params,
    rows: Rows,
    held_out: Rows,
    wanted: Relufication | None = None,
    *,
    run: Run | None = None,
    report: Report | None = None,
) -> Relufied:
    """`model` with another activation function, all its parameters trained on packed or padded `rows`.

    Raises `InputError` for what is no decoder with a language model's head, or has no dense feed-forward
    layers.
    """
    wanted = wanted or Relufication()
    job = relufication_job(model, params, rows, held_out, wanted)
    measured = language_model_job(
        model, rows, wanted.training, layout=Layout.single(), evaluation=held_out, initial=params
    )
    assert job.evaluate is not None and measured.evaluate is not None
    before, swapped = (each(params, {})["loss"] for each in (measured.evaluate, job.evaluate))
    outcome = train(job, wanted.training, run, report=report)
    if outcome.stopped:
        raise InputError(f"training stopped ({outcome.stopped}) before the last step")
    made = outcome.state.evaluated
    after = outcome.evaluations[-1]["loss"]
    return Relufied(with_activation(model, wanted.activation), jax.device_get(made), before, swapped, after)


def relufication_job(
    model: Transformer, params: Params, rows: Rows, held_out: Rows, wanted: Relufication
) -> Job:
    """The job of `relufy`; evaluation is the loss on text whoever teaches."""
    if model.config.kind != "decoder" or not isinstance(model.head, LanguageModelHead):
        raise InputError(
            f"relufication trains decoders with a language model's head; this is an {model.config.kind} "
            f"with {type(model.head).__name__}"
        )
    changed = with_activation(model, wanted.activation)
    job = language_model_job(
        changed,
        rows,
        wanted.training,
        layout=Layout.single(),
        evaluation=held_out,
        initial=params,
        penalty=wanted.penalty,
    )
    if wanted.teacher == "text":
        return job
    make, penalty = self_distillation(model), wanted.penalty
    loss = make(full_tuning(changed)) if penalty is None else with_activation_penalty(make, changed, penalty)
    return replace(job, loss=loss, frozen={TEACHER: params})


def with_activation(model: Transformer, activation: Activation) -> Transformer:
    """The same model with another activation function in all its dense feed-forward layers.

    Parameters are the same. Raises `InputError` for layers of another kind, and for drelu in plain ones.
    """
    return replace(model, config=change_activation(model.config, activation))


def self_distillation(teacher: Model) -> Callable[[Forward], Loss]:
    """Losses of a forward against `teacher`, whose parameters are the frozen `teacher`; weighs by `weights`.

    The divergence of the student's distribution over the vocabulary from the teacher's, by token; reports
    `agreement`, how often both have the same most likely token.
    """

    def make(forward: Forward) -> Loss:
        def loss(trainable: Tree, frozen: Tree, batch: Batch, rng: jax.Array | None) -> LossSums:
            inputs: Mapping[str, Any] = inputs_of(batch)
            given = jax.lax.stop_gradient(teacher.apply(frozen[TEACHER], batch["tokens"], **inputs))
            scores = forward(trainable, frozen, batch["tokens"], rng=rng, train=rng is not None, **inputs)
            wanted, found = (jax.nn.log_softmax(promote_statistics(each)) for each in (given, scores))
            apart = (jnp.exp(wanted) * (wanted - found)).sum(-1)
            weights = batch["weights"]
            agreed = given.argmax(-1) == scores.argmax(-1)
            return LossSums((apart * weights).sum(), weights.sum(), {"agreement": (agreed * weights).sum()})

        return loss

    return make
