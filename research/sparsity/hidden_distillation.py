"""A body without a head taught by its own hidden states, and how near the taught one is to what it was.

A changed encoder has no next token to foretell: it is trained towards the hidden states that it had, as Jiao
et al., "TinyBERT", 2020, train a smaller one towards a larger one's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models.heads import pool
from ...models.model import Model, Params
from ...models.precision import promote_statistics
from ..data.batches import Rows, evaluation_batches
from ..training.objectives import Batch, Forward, Loss, LossSums, inputs_of

Tree = Any
TEACHER = "teacher"
ROWS = 64  # that are read at once


def hidden_distillation(teacher: Model) -> Callable[[Forward], Loss]:
    """Losses of a forward against `teacher`, whose parameters are the frozen `teacher`; weighs by `weights`.

    By token, of the last hidden states `[B, T, D]`: the squared distance between the forward's and the
    teacher's, as a share of the teacher's squared size. Reports `cosine`, that of the two.
    """

    def make(forward: Forward) -> Loss:
        def loss(trainable: Tree, frozen: Tree, batch: Batch, rng: jax.Array | None) -> LossSums:
            inputs: Mapping[str, Any] = inputs_of(batch)
            given = jax.lax.stop_gradient(teacher.apply(frozen[TEACHER], batch["tokens"], **inputs))
            hidden = forward(trainable, frozen, batch["tokens"], rng=rng, train=rng is not None, **inputs)
            wanted, found = promote_statistics(given), promote_statistics(hidden)
            size = jnp.square(wanted).sum(-1)
            distance = jnp.square(found - wanted).sum(-1) / size
            cosine = (found * wanted).sum(-1) / jnp.sqrt(size * jnp.square(found).sum(-1))
            weights = batch["weights"]
            return LossSums((distance * weights).sum(), weights.sum(), {"cosine": (cosine * weights).sum()})

        return loss

    return make


def row_vectors(model: Model, params: Params, rows: Rows) -> np.ndarray:
    """A unit vector for each row, `[N, D]`: the mean of its real tokens' hidden states."""

    @jax.jit
    def read(params: Params, batch: Batch) -> jax.Array:
        inputs: Mapping[str, Any] = inputs_of(batch)
        hidden = model.apply(params, batch["tokens"], **inputs)
        return pool(promote_statistics(hidden), batch.get("segments"), "mean")

    found = np.concatenate([np.asarray(read(params, batch)) for batch in evaluation_batches(rows, ROWS)])
    return found[: len(rows)] / np.linalg.norm(found[: len(rows)], axis=1, keepdims=True)


def same_neighbour(one: np.ndarray, other: np.ndarray) -> float:
    """Of how many rows the nearest other row is the same in both sets of vectors `[N, D]`; 0 for one row."""
    if len(one) < 2:
        return 0.0
    nearest = []
    for vectors in (one, other):
        likeness = vectors @ vectors.T
        np.fill_diagonal(likeness, -np.inf)
        nearest.append(likeness.argmax(1))
    return float((nearest[0] == nearest[1]).mean())
