"""Losses as pure functions of `(trainable, frozen, batch, rng)`.

Full tuning trains all parameters and freezes nothing; delta tuning has the backbone in `frozen`. A
`Forward` hides which of the two it is; a loss is made of a forward and knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

from ...models.model import Model
from ...models.word_losses import UNSPLIT, WordSplit, word_loss_sums

Batch = Mapping[str, jax.Array]
Tree = Any

# What a batch may hold for the model beside `tokens`.
MODEL_INPUTS = (
    "segments",
    "positions",
    "token_types",
    "decoder_tokens",
    "decoder_segments",
    "decoder_positions",
)


class LossSums(NamedTuple):
    """Sums over a batch: `total` loss, `weight` to divide by, and further sums by name."""

    total: jax.Array
    weight: jax.Array
    metrics: Mapping[str, jax.Array]


class Forward(Protocol):
    """Logits from what is trained, what is frozen and the model's inputs."""

    def __call__(
        self,
        trainable: Tree,
        frozen: Tree,
        tokens: jax.Array,
        *,
        rng: jax.Array | None,
        train: bool,
        **inputs: Any,
    ) -> Any:
        """Outputs of the model: logits, or of one that defers them `WordScores`."""


class Loss(Protocol):
    """Summed loss of a batch; without `rng` there is no dropout."""

    def __call__(self, trainable: Tree, frozen: Tree, batch: Batch, rng: jax.Array | None) -> LossSums:
        """Sums over the batch's rows."""


def full_tuning(model: Model) -> Forward:
    """All parameters are trained; `frozen` is empty."""

    def forward(trainable: Tree, frozen: Tree, tokens: jax.Array, **inputs: Any) -> jax.Array:
        return model.apply(trainable, tokens, **inputs)

    return forward


def delta_tuning(tuned: Any) -> Forward:
    """Only a delta is trained.

    `tuned` is what `research.delta.attach` returned; `trainable` is its `delta`, `frozen` has the
    backbone as `params` and what the methods keep fixed as `delta_state`.
    """

    def forward(trainable: Tree, frozen: Tree, tokens: jax.Array, **inputs: Any) -> jax.Array:
        variables = {"delta": trainable, "delta_state": frozen["delta_state"]}
        return tuned.apply(variables, frozen["params"], tokens, **inputs)

    return forward


def penalised(loss: Loss, tuned: Any) -> Loss:
    """`loss` plus what the delta methods of `tuned` add to its mean in training; evaluation goes without.

    `trainable` and `frozen` are those of `delta_tuning`.
    """
    if not tuned.penalised:
        return loss

    def with_penalty(trainable: Tree, frozen: Tree, batch: Batch, rng: jax.Array | None) -> LossSums:
        sums = loss(trainable, frozen, batch, rng)
        if rng is None:
            return sums
        added = tuned.penalty({"delta": trainable, "delta_state": frozen["delta_state"]})
        return sums._replace(total=sums.total + added * sums.weight)

    return with_penalty


def language_modelling(
    forward: Forward, smoothing: float = 0.0, chunk: int | None = None, split: WordSplit = UNSPLIT
) -> Loss:
    """Cross entropy of `targets [B, T]` weighted by `weights [B, T]`; reports `accuracy` by token.

    Of a model that defers its logits (`DeferredHead`) a device makes those of `chunk` tokens at a time, see
    `models.word_losses`; `split` is how the mesh of the run splits rows and words.
    """
    return _cross_entropy(forward, "targets", "weights", smoothing, chunk, split)


def classification(forward: Forward, smoothing: float = 0.0) -> Loss:
    """Cross entropy of `label [B]` weighted by `weight [B]`; reports `accuracy` by row."""
    return _cross_entropy(forward, "label", "weight", smoothing)


def inputs_of(batch: Batch) -> dict[str, jax.Array]:
    """What of a batch goes to the model by keyword."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def _cross_entropy(
    forward: Forward,
    targets: str,
    weights: str,
    smoothing: float,
    chunk: int | None = None,
    split: WordSplit = UNSPLIT,
) -> Loss:
    def loss(trainable: Tree, frozen: Tree, batch: Batch, rng: jax.Array | None) -> LossSums:
        scores = forward(
            trainable, frozen, batch["tokens"], rng=rng, train=rng is not None, **inputs_of(batch)
        )
        sums = word_loss_sums(
            scores, batch[targets], batch[weights], smoothing=smoothing, chunk=chunk, split=split
        )
        return LossSums(sums.total, sums.weight, {"accuracy": sums.correct})

    return loss
