"""Making a trained model's neurons fall silent: another activation function, and training to make up for it.

Mirzadeh et al., "ReLU Strikes Back", 2023, put ReLU in the place of GELU or SiLU and go on training on text.
Where the text is not what the model learned from, the model as it was may teach instead: the changed one is
trained towards its distribution over the next token (Hinton et al., "Distilling the Knowledge in a Neural
Network", 2015), or, of a body without a head such as an encoder, towards its hidden states.
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
from ..training.tasks import language_model_job, tuning_job
from .hidden_distillation import TEACHER, hidden_distillation, row_vectors, same_neighbour

Tree = Any
Scores = Mapping[str, float]


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
    """The changed model, and what it scores on rows that were held out.

    `before` is the model's score as it was, `swapped` with the other function and untrained, `after` in the
    end. Of a language model: `loss` and `accuracy` on the text. Of a body without a head: `distance` and
    `cosine` of its hidden states to what they were (see `hidden_distillation`), and `same neighbour`, of how
    many rows the nearest other row by mean hidden state is still the same.
    """

    model: Transformer
    params: Params
    before: Scores
    swapped: Scores
    after: Scores


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

    Raises `InputError` for what is neither a decoder with a language model's head nor a body without a head,
    for a body that text shall teach, and for layers that are not dense.
    """
    wanted = wanted or Relufication()
    changed = with_activation(model, wanted.activation)
    job = relufication_job(model, params, rows, held_out, wanted)
    before, scores = _judges(model, params, changed, job, rows, held_out, wanted)
    swapped = scores(params)
    outcome = train(job, wanted.training, run, report=report)
    if outcome.stopped:
        raise InputError(f"training stopped ({outcome.stopped}) before the last step")
    made = jax.device_get(outcome.state.evaluated)
    return Relufied(changed, made, before, swapped, scores(made))


def relufication_job(
    model: Transformer, params: Params, rows: Rows, held_out: Rows, wanted: Relufication
) -> Job:
    """The job of `relufy`; evaluation is the loss on text whoever teaches, of a body the teacher's."""
    changed = with_activation(model, wanted.activation)
    if not speaks(model):
        return _body_job(model, changed, params, rows, held_out, wanted)
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
    return replace(job, loss=_priced(self_distillation(model), changed, wanted), frozen={TEACHER: params})


def speaks(model: Transformer) -> bool:
    """Whether this is a decoder with a language model's head, or else a body without a head.

    Raises `InputError` for what is neither.
    """
    kind, head = model.config.kind, model.head
    if kind == "decoder" and isinstance(head, LanguageModelHead):
        return True
    if kind != "encoder-decoder" and head is None:
        return False
    raise InputError(
        f"relufication trains decoders with a language model's head, and encoders and decoders without a "
        f"head; this is an {kind} with {type(head).__name__}"
    )


def _body_job(
    model: Transformer,
    changed: Transformer,
    params: Params,
    rows: Rows,
    held_out: Rows,
    wanted: Relufication,
) -> Job:
    """Towards the hidden states of `model`; the penalty is in what is trained, not in what is evaluated."""
    if wanted.teacher == "text":
        raise InputError("an encoder has no next token that text could teach; teacher 'itself' is valid")
    make = hidden_distillation(model)
    job = tuning_job(
        changed,
        params,
        None,
        rows,
        wanted.training,
        layout=Layout.single(),
        loss_of=make,
        unit="tokens",
        evaluation=held_out,
    )
    batches = job.batches if wanted.penalty is None else wanted.penalty.priced(job.batches)
    return replace(job, loss=_priced(make, changed, wanted), batches=batches, frozen={TEACHER: params})


def _priced(make: Callable[[Forward], Loss], changed: Transformer, wanted: Relufication) -> Loss:
    if wanted.penalty is None:
        return make(full_tuning(changed))
    return with_activation_penalty(make, changed, wanted.penalty)


def _judges(
    model: Transformer,
    params: Params,
    changed: Transformer,
    job: Job,
    rows: Rows,
    held_out: Rows,
    wanted: Relufication,
) -> tuple[Scores, Callable[[Params], Scores]]:
    """The scores of `model` as it is, and the function that has those of `changed` with some parameters."""
    evaluate = job.evaluate
    assert evaluate is not None
    if speaks(model):
        dense = language_model_job(
            model, rows, wanted.training, layout=Layout.single(), evaluation=held_out, initial=params
        )
        assert dense.evaluate is not None
        return _on_text(dense.evaluate(params, {})), lambda own: _on_text(evaluate(own, job.frozen))
    vectors = row_vectors(model, params, held_out)

    def to_itself(own: Params) -> Scores:
        found = evaluate(own, job.frozen)
        same = same_neighbour(vectors, row_vectors(changed, own, held_out))
        return {"distance": found["loss"], "cosine": found["cosine"], "same neighbour": same}

    return {"distance": 0.0, "cosine": 1.0, "same neighbour": 1.0}, to_itself  # from itself to itself


def _on_text(found: Mapping[str, float]) -> Scores:
    return {name: found[name] for name in ("loss", "accuracy")}


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
