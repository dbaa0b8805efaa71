"""Optax transformations from an `OptimizerConfig`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from ... import InputError
from .config import OptimizerConfig, ScheduleConfig

Schedule = Callable[[jax.Array], jax.Array]


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then the optimizer under its schedule over `steps` updates.

    Decay is decoupled (Loshchilov and Hutter, 2019): every step takes `weight_decay` times the learning
    rate of a matrix away, whatever the optimizer. What counts as a matrix is judged in the tree that is
    trained: a delta's matrices decay, its biases do not.
    """
    if config.name not in OPTIMIZERS:
        raise InputError(f"optimizer {config.name!r} is unknown; valid: {', '.join(OPTIMIZERS)}")
    schedule = make_schedule(config.schedule, config.learning_rate, steps)
    optimizer = OPTIMIZERS[config.name](config, schedule)
    return optax.chain(optax.clip_by_global_norm(config.clip), optimizer) if config.clip else optimizer


def make_schedule(config: ScheduleConfig, peak: float, steps: int) -> Schedule:
    """Learning rate at a step, from 0 to `peak` in the warmup and from there by the schedule's shape."""
    if config.name not in SHAPES:
        raise InputError(f"schedule {config.name!r} is unknown; valid: {', '.join(SHAPES)}")
    warmup = round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    if warmup >= steps:
        raise InputError(f"warmup of {warmup} steps leaves none of the {steps} steps")
    after = SHAPES[config.name](config, peak, steps - warmup, max(warmup, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decayed(params: Any) -> Any:
    """Which leaves weight decay acts on: those with two axes or more, a scan's layer axis not counted."""

    def is_matrix(path: tuple, leaf: Any) -> bool:
        return leaf.ndim - ("layers" in _keys(path)) >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _keys(path: tuple) -> list[Any]:
    return [getattr(entry, "key", None) for entry in path]


def _scaled(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    """What follows an update of unit learning rate: decoupled weight decay and the schedule."""
    decay = optax.add_decayed_weights(config.weight_decay, decayed)
    return optax.chain(decay, optax.scale_by_learning_rate(schedule))


def _adamw(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay, mask=decayed
    )


def _adafactor(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    # Not optax.adafactor: its weight decay is not multiplied by the learning rate.
    factored = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    return optax.chain(factored, _scaled(config, schedule))


def _lion(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    return optax.lion(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decayed)


def _muon(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    # Scaled to AdamW's root mean square, so that one learning rate serves both halves (Liu et al., "Muon
    # is Scalable for LLM Training", 2025, section 2.2). Its own weight decay would spare the tables.
    muon = contrib.muon(
        1.0,
        eps=config.epsilon,
        muon_weight_dimension_numbers=_muon_matrices,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        consistent_rms=0.2,
    )
    return optax.chain(muon, optax.scale(-1.0), _scaled(config, schedule))


def _muon_matrices(params: Any) -> Any:
    """Muon orthogonalises kernels, scanned ones layer by layer.

    Tables, vectors and output layers are left to Adam (Jordan et al., "Muon", 2024).
    """

    def dimensions(path: tuple, leaf: Any) -> Any:
        keys = _keys(path)
        if keys[-1:] != ["kernel"] or leaf.ndim < 2 or {"head", "classifier"} & set(keys):
            return None
        return contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _sgd(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    momentum = optax.trace(config.beta1) if config.beta1 else optax.identity()
    return optax.chain(momentum, _scaled(config, schedule))


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}


def _constant(config: ScheduleConfig, peak: float, steps: int, warmup: int) -> Schedule:
    return optax.constant_schedule(peak)


def _cosine(config: ScheduleConfig, peak: float, steps: int, warmup: int) -> Schedule:
    return optax.cosine_decay_schedule(peak, steps, config.final)


def _linear(config: ScheduleConfig, peak: float, steps: int, warmup: int) -> Schedule:
    return optax.linear_schedule(peak, peak * config.final, steps)


def _rsqrt(config: ScheduleConfig, peak: float, steps: int, warmup: int) -> Schedule:
    return lambda step: peak * jnp.sqrt(warmup / (step + warmup))


def _wsd(config: ScheduleConfig, peak: float, steps: int, warmup: int) -> Schedule:
    falling = max(1, round(config.decay * steps))
    return optax.linear_schedule(peak, peak * config.final, falling, transition_begin=steps - falling)


SHAPES: dict[str, Callable[[ScheduleConfig, float, int, int], Schedule]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "rsqrt": _rsqrt,
    "wsd": _wsd,
}
