"""The real decoder under the real training program, small: what mesh independence is shown on.

Loaded by path, by the tests (fixture `decoder`) and by `two_processes.py`.
"""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from modicum.models import GatedMLP, GroupedQuery, RMSNorm, Rotary, Transformer, TransformerConfig
from modicum.models.experts import RoutedMLP
from modicum.models.precision import policy
from modicum.research.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from modicum.research.training.loss_scale import NO_SCALING
from modicum.research.training.program import build_program, lower_step
from modicum.research.training.tasks import language_model_job

B, T, V = 16, 16, 64
PRECISIONS = {"float64": "fp64", "float32": "fp32"}  # as `two_processes.py` calls them
MLPS = {"dense": GatedMLP(32), "routed": RoutedMLP(experts=4, chosen=2, width=16)}


class Result(NamedTuple):
    """What a training gives, on the host, and where its state lies."""

    initial: Any
    moment: Any  # Adam's first moment after the first step: 0.1 of the first gradients
    losses: list[float]
    metrics: dict[str, float]
    state: Any
    program: Any


def model_of(precision="fp32", mlp="dense", dropout=0.1):
    """Two scanned layers of width 32; eight heads, so that `tensor=8` divides them."""
    return Transformer(
        TransformerConfig(
            layers=2,
            width=32,
            vocab=V - 3,
            vocab_multiple=8,
            attention=GroupedQuery(heads=8, bias=False),
            norm=RMSNorm(),
            positions=Rotary(),
            mlp=MLPS[mlp],
            dropout=dropout,
            scan=True,
            precision=policy(precision),
        )
    )


def config_of(precision="fp32", steps=20, chunk=None, accumulate=1):
    """AdamW at a constant rate, nothing clipped: a wrong factor of the gradients shows in their moment."""
    schedule = ScheduleConfig("constant", warmup=0)
    optimizer = OptimizerConfig("adamw", 3e-3, schedule, weight_decay=0.01, clip=0)
    return TrainingConfig(
        steps=steps,
        batch=B,
        precision=precision,
        optimizer=optimizer,
        loss_chunk=chunk,
        accumulate=accumulate,
    )


@cache
def rows():
    """Two packed documents a row, the second of random length, then padding that is not learned."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V - 3, (B, T), dtype=np.int32)
    column = np.arange(T)
    ends = rng.integers(T // 2 + 1, T + 1, (B, 1))
    segments = np.where(column < T // 2, 1, np.where(column < ends, 2, 0)).astype(np.int32)
    positions = np.broadcast_to(np.where(column < T // 2, column, column - T // 2), (B, T))
    targets = (tokens * 7 + 3) % (V - 3)
    arrays = {
        "tokens": tokens,
        "targets": targets.astype(np.int32),
        "weights": (segments > 0).astype(np.float32),
        "segments": segments,
        "positions": positions.astype(np.int32),
    }
    return [{name: array[row] for name, array in arrays.items()} for row in range(B)]


def job_of(layout, precision, mlp, chunk=None, accumulate=1, dropout=0.1):
    """The job and its configuration."""
    config = config_of(precision, chunk=chunk, accumulate=accumulate)
    return language_model_job(model_of(precision, mlp, dropout), rows(), config, layout=layout), config


def train(layout, steps, precision="fp32", mlp="dense", scaling=NO_SCALING, **options):
    """Train from seed 0; every process provides the rows it is asked for."""
    precision = PRECISIONS.get(precision, precision)
    job, config = job_of(layout, precision, mlp, **options)
    program = build_program(job, config, layout, scaling)
    state, moment, losses = program.create(), None, []
    initial = fetch(state.trainable)
    for step in range(steps):
        state, metrics = program.step(state, program.frozen, layout.place(job.batches(step)))
        losses.append(float(metrics["loss"]))
        moment = fetch(optax.tree.get(state.optimizer, "mu")) if moment is None else moment
    return Result(initial, moment, losses, {k: float(v) for k, v in metrics.items()}, state, program)


def lowered(layout, precision="fp32", mlp="dense", chunk=None):
    """The train step, traced for the devices of a layout, which need not be there."""
    job, config = job_of(layout, precision, mlp, chunk)
    batch = {
        name: jax.ShapeDtypeStruct((B, *leaf.shape), jnp.asarray(leaf).dtype)
        for name, leaf in rows()[0].items()
    }
    return lower_step(job, config, layout, NO_SCALING, batch)


def fetch(tree):
    """The whole arrays on the host, from however many processes."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
