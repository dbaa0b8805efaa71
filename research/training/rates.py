"""A learning rate that is an argument of the compiled step, not a constant in it.

    optimizer = with_rate_argument(make_optimizer(replace(config, learning_rate=1.0), steps))
    state = set_rate(create_state(trainable, optimizer), 3e-4)

The rate lies in the optimizer's state, so one compiled step serves every rate of a sweep. Exact for
optimizers whose update is the learning rate times something that does not depend on it: all of
`make_optimizer`, their decoupled weight decay included.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ... import InputError
from .state import TrainState


class RateState(NamedTuple):
    """The learning rate, float32 []."""

    rate: jax.Array


def with_rate_argument(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, made with a learning rate of 1, whose updates are multiplied by the rate in its state."""

    def init(params: Any) -> RateState:
        return RateState(jnp.ones((), jnp.float32))

    def update(updates: Any, state: RateState, params: Any = None) -> tuple[Any, RateState]:
        scaled = jax.tree.map(lambda leaf: leaf * state.rate.astype(leaf.dtype), updates)
        return scaled, state

    return optax.chain(optimizer, optax.GradientTransformation(init, update))


def set_rate(state: TrainState, rate: Any) -> TrainState:
    """`state` of an optimizer from `with_rate_argument`, at this learning rate; `rate` may be traced.

    The optimizer may be wrapped by others, which keep its state inside theirs.
    """
    found = []

    def at_rate(part: Any) -> Any:
        found.append(isinstance(part, RateState))
        return RateState(jnp.asarray(rate, jnp.float32)) if found[-1] else part

    moments = jax.tree.map(at_rate, state.optimizer, is_leaf=lambda part: isinstance(part, RateState))
    if not any(found):
        raise InputError("set_rate: this state's optimizer has no rate to set; make it by with_rate_argument")
    return replace(state, optimizer=moments)
