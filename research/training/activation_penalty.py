"""A price on activations, added to a loss so that fewer neurons fire: L1, with a schedule over the steps.

Song et al., "ProSparse", 2024, raise the price in stages along half a sine each. A loss knows no step: the
step's price comes with its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...models.hooks import run_with_cache
from ...models.model import Model
from .objectives import Batch, Forward, Loss, LossSums, full_tuning

Tree = Any
Batches = Callable[[int], Mapping[str, Any]]

PRICE = "activation_price"
"""A batch's `[B]`: the price at its step, the same in every row."""


@dataclass(frozen=True)
class ActivationPenalty:
    """`price` × the mean size of the neurons at the sites that `sites` matches is added to the mean loss.

    `stages` are (step, price): until the first stage's step its price holds, up to each later stage's step
    the price moves there along half a sine, after the last it stays.
    """

    stages: tuple[tuple[int, float], ...]
    sites: str = "mlp/act"

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.stages]
        if not steps or steps[0] < 0 or any(a >= b for a, b in pairwise(steps)):
            raise InputError(f"penalty: stages at steps {steps} must be one or more, from 0 up, each later")
        if any(not (math.isfinite(price) and price >= 0) for _, price in self.stages):
            raise InputError(f"penalty: prices {[p for _, p in self.stages]} must be finite and at least 0")

    @classmethod
    def rising(cls, price: float, steps: int, sites: str) -> Self | None:
        """A price that is reached in the middle of so many steps and stays; None for a price of 0."""
        return cls(((0, 0.0), (max(1, steps // 2), price)), sites) if price else None

    def price(self, step: int) -> float:
        """The price at `step`, counted from 0."""
        before = self.stages[0]
        for after in self.stages:
            if step <= after[0]:
                done = (step - before[0]) / max(after[0] - before[0], 1)
                risen = (1 - math.cos(math.pi * max(done, 0.0))) / 2
                return before[1] + risen * (after[1] - before[1])
            before = after
        return before[1]

    def priced(self, batches: Batches) -> Batches:
        """The same batches, each with its step's price."""

        def of_step(step: int) -> Mapping[str, Any]:
            batch = batches(step)
            return {**batch, PRICE: np.full(len(batch["tokens"]), self.price(step), np.float32)}

        return of_step


def with_activation_penalty(
    make: Callable[[Forward], Loss], model: Model, penalty: ActivationPenalty
) -> Loss:
    """`make` of a forward of `model`, in training with the penalty added; evaluation goes without.

    Reports `activation_size`, the mean over sites, neurons and real tokens. Batches are `penalty.priced`.
    """

    def loss(trainable: Tree, frozen: Tree, batch: Batch, rng: jax.Array | None) -> LossSums:
        if rng is None:
            return make(full_tuning(model))(trainable, frozen, batch, None)
        sizes: list[Any] = []

        def mean_size(path: str, value: jax.Array) -> jax.Array:
            real = batch["segments"] > 0 if "segments" in batch else jnp.ones(value.shape[:2], bool)
            size = jnp.abs(value.astype(jnp.float32)).mean(-1)
            return jnp.where(real, size, 0.0).sum() / jnp.maximum(real.sum(), 1)

        def keeping(trainable: Tree, frozen: Tree, tokens: jax.Array, **inputs: Any) -> Any:
            outputs, found = run_with_cache(
                model, trainable, tokens, names=[penalty.sites], reduce=mean_size, **inputs
            )
            sizes.extend(jax.tree.leaves(found))
            return outputs

        sums = make(keeping)(trainable, frozen, batch, rng)
        size = jnp.concatenate([jnp.ravel(each) for each in sizes]).mean()
        added = (batch[PRICE].mean() * size).astype(sums.total.dtype)
        metrics = {**sums.metrics, "activation_size": size * sums.weight}
        return LossSums(sums.total + added * sums.weight, sums.weight, metrics)

    return loss
