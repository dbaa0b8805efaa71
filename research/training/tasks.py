"""Jobs for the training loop: a language model from text, a trained model tuned to a task.

A model is tuned through a delta specification, or wholly where there is none; either way the loop
and the train step are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ... import InputError
from ...models.costs import training_flops_per_token
from ...models.extended import ExtendedHead
from ...models.heads import DeferredHead, LanguageModelHead, MaskedLanguageModelHead
from ...models.model import Params
from ...models.placement import placed
from ...models.precision import policy
from ...models.transformer import Transformer
from ...models.word_losses import WordSplit
from ...parallel.layout import Layout
from ...parallel.pipeline import Schedule
from ..data.batches import Batches, Rows, evaluation_batches
from ..delta.attach import Tuned
from ..delta.axes import delta_axes
from .activation_penalty import ActivationPenalty, with_activation_penalty
from .config import TrainingConfig
from .evaluation import SumsOf, evaluate, make_evaluation
from .job import Evaluation, Job, Wrap
from .objectives import (
    Forward,
    Loss,
    classification,
    delta_tuning,
    full_tuning,
    inputs_of,
    language_modelling,
    penalised,
)
from .routing import has_routers, with_routing

Tree = Any
EVALUATION_BATCH = 64


def language_model_job(
    model: Transformer,
    rows: Rows,
    config: TrainingConfig,
    *,
    layout: Layout,
    evaluation: Rows | None = None,
    initial: Params | None = None,
    penalty: ActivationPenalty | None = None,
) -> Job:
    """Train `model` on packed `rows` from scratch, or from the parameters `initial`.

    With a `penalty` activations have a price in training.
    """
    _require_precision(model, config)
    length = len(rows[0]["tokens"])
    example = jnp.zeros((1, length), jnp.int32)

    def init(rng: jax.Array, start: Tree) -> Tree:
        return model.init(rng, example) if initial is None else start

    loss = _language_modelling(model, config, layout, penalty)
    batches = local_batches(rows, config, layout)
    sums_of = make_evaluation(placed(loss, replace(layout, schedule=Schedule())))
    return Job(
        loss=loss,
        init=init,
        batches=batches if penalty is None else penalty.priced(batches),
        initial=initial,
        axes=model.axes,
        evaluate=evaluation_of(sums_of, evaluation, layout),
        sums_of=sums_of,
        unit="tokens",
        flops_per_unit=training_flops_per_token(model.config, length),
    )


def tuning_job(
    model: Transformer,
    params: Params,
    tuned: Tuned | None,
    rows: Rows,
    config: TrainingConfig,
    *,
    layout: Layout,
    loss_of: Callable[[Forward], Loss] = classification,
    unit: str = "examples",
    evaluation: Rows | None = None,
    sums_of: SumsOf | None = None,
    wrap: Wrap | None = None,
    best_from: int = 0,
) -> Job:
    """Tune a model from the parameters `params`, by a delta or, where `tuned` is None, wholly.

    Under a delta `frozen` holds the backbone and what the methods keep fixed, and the train state nothing
    of either. `unit` is what `loss_of` weighs by; `sums_of` is that of a job which differs in seed, learning
    rate and values only, so that nothing is compiled again.
    """
    _require_precision(model, config)
    batches = local_batches(rows, config, layout)
    loss = loss_of(full_tuning(model)) if tuned is None else penalised(loss_of(delta_tuning(tuned)), tuned)
    sums_of = sums_of or make_evaluation(placed(loss, replace(layout, schedule=Schedule())))
    job = Job(
        loss=loss,
        init=lambda rng, initial: initial,
        batches=batches,
        initial=params,
        axes=model.axes,
        evaluate=evaluation_of(sums_of, evaluation, layout),
        sums_of=sums_of,
        unit=unit,
        wrap=wrap,
        best_from=best_from,
    )
    if tuned is None:
        return job
    example = {name: array[:1] for name, array in batches(0).items()}
    tokens, inputs = example["tokens"], inputs_of(example)
    state = tuned.init(jax.random.key(config.seed), params, tokens, **inputs)["delta_state"]
    return replace(
        job,
        init=lambda rng, initial: tuned.init(rng, initial["params"], tokens, **inputs)["delta"],
        initial=None,
        frozen={"params": params, "delta_state": state},
        axes=delta_axes(tuned, model.axes),
    )


def local_batches(rows: Rows, config: TrainingConfig, layout: Layout) -> Callable[[int], Mapping[str, Any]]:
    """This process's rows of the batch of each step, in an order that the seed decides."""
    mine = layout.local_rows(config.batch)
    count = config.batch // (mine.stop - mine.start)
    return Batches(
        rows, config.batch, config.seed, part=(mine.start * count // config.batch, count)
    ).__getitem__


def evaluation_of(
    sums_of: SumsOf, rows: Rows | None, layout: Layout, batch: int = EVALUATION_BATCH
) -> Callable[[Tree, Tree], Evaluation] | None:
    """The function from trained and frozen arrays to means over all `rows`; None without rows.

    A batch has at least `batch` rows, and as many more as it takes to divide over the mesh.
    """
    if rows is None:
        return None
    batch = layout.fitting_rows(batch)
    mine = layout.local_rows(batch)
    count = batch // (mine.stop - mine.start)
    part = (mine.start * count // batch, count)

    def means(trainable: Tree, frozen: Tree) -> Evaluation:
        batches = map(layout.place, evaluation_batches(rows, batch, part))
        return evaluate(sums_of, trainable, frozen, batches)

    return means


def _language_modelling(
    model: Transformer, config: TrainingConfig, layout: Layout, penalty: ActivationPenalty | None
) -> Loss:
    """The loss of all parameters, in chunks where the head can leave its logits as factors."""
    head = model.head
    if isinstance(head, LanguageModelHead | MaskedLanguageModelHead) and not isinstance(head, ExtendedHead):
        model = replace(model, head=DeferredHead(head))
    elif config.loss_chunk:
        raise InputError(
            f"loss_chunk={config.loss_chunk} is for heads over the vocabulary alone, not for "
            f"{type(head).__name__}; leave it out"
        )
    split = WordSplit(layout.mesh, layout.rules)
    make = partial(language_modelling, chunk=config.loss_chunk, split=split)
    if penalty is not None:
        if has_routers(model.config):
            raise InputError("a penalty on activations is for dense feed-forward layers, not for a RoutedMLP")
        return with_activation_penalty(make, model, penalty)
    return with_routing(make, full_tuning(model), model.config)


def _require_precision(model: Transformer, config: TrainingConfig) -> None:
    """The run's precision decides loss scaling, the model's the arithmetic: they have to be one."""
    wanted, found = policy(config.precision), model.config.precision
    if found.compute != wanted.compute:
        raise InputError(
            f"training in {config.precision} asks for {wanted.compute} arithmetic, the model computes in "
            f"{found.compute}; give the model precision {wanted}"
        )
