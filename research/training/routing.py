"""The losses of routed experts, added to whatever loss a model is trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ...models.config import TransformerConfig
from ...models.experts import RoutedMLP
from ...models.routing import COLLECTION, routing_losses
from .objectives import Batch, Forward, Loss, LossSums

Tree = Any


def has_routers(config: TransformerConfig) -> bool:
    """Whether any layer routes its tokens."""
    return any(isinstance(config.layer(index)[1], RoutedMLP) for index in range(config.period))


def with_routing(make: Callable[[Forward], Loss], forward: Forward, config: TransformerConfig) -> Loss:
    """`make(forward)`, in training with the routing losses of the layers added to its mean.

    Reports `routing_loss` and `busiest_expert`, see `models.routing`; evaluation goes without. A model
    without routed experts has the loss that it had. Under accumulation the losses are those of each part.
    """
    if not has_routers(config):
        return make(forward)

    def loss(trainable: Tree, frozen: Tree, batch: Batch, rng: jax.Array | None) -> LossSums:
        if rng is None:
            return make(forward)(trainable, frozen, batch, None)
        sown: list[Tree] = []

        def keeping(*args: Any, **inputs: Any) -> Any:
            outputs, state = forward(*args, mutable=[COLLECTION], **inputs)
            sown.append(state[COLLECTION])
            return outputs

        sums = make(keeping)(trainable, frozen, batch, rng)
        found = routing_losses({"calls": sown})
        total = sums.total + found["routing_loss"].astype(sums.total.dtype) * sums.weight
        more = {name: value * sums.weight for name, value in found.items()}
        return LossSums(total, sums.weight, {**sums.metrics, **more})

    return loss
