"""The real decoder under the real train step, small: what mesh independence is shown on.

Loaded by path, by the tests (fixture `decoder`) and by `two_processes.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from modicum.models import Transformer, TransformerConfig
from modicum.models.attention import GroupedQuery
from modicum.models.positions import Learned
from modicum.models.precision import Precision
from modicum.research.training.objectives import full_tuning, language_modelling
from modicum.research.training.state import create_state
from modicum.research.training.step import make_train_step

B, T, V = 16, 16, 64
HEADS = 8  # so that `tensor=8` divides them

# Compiling takes nearly all of the time here; what LLVM makes of a loop has no part in what is tested.
QUICK = {"xla_backend_optimization_level": 0}


class Job(NamedTuple):
    """Compiled programs of a training, and where its state lies."""

    abstract: Any
    shardings: Any
    start: Any
    step: Any


class Result(NamedTuple):
    """What a training gives, on the host, and its compiled step."""

    initial: Any
    moment: Any  # Adam's first moment after the first step: 0.1 of the first gradients
    losses: list[float]
    state: Any
    job: Job


def prepare(layout, dtype="float32", wrap=lambda forward: forward):
    """Two layers, width 32, dropout 0.1, laid out by `layout` and compiled; `wrap` changes the forward."""
    precision = Precision(dtype, dtype, dtype)
    attention = GroupedQuery(heads=HEADS)
    config = TransformerConfig(
        layers=2,
        width=32,
        vocab=V,
        attention=attention,
        positions=Learned(T),
        dropout=0.1,
        precision=precision,
    )
    model, optimizer = Transformer(config), optax.adamw(3e-3)

    def start(rng):
        return create_state(model.init(rng, jnp.zeros((B, T), jnp.int32)), optimizer)

    abstract = jax.eval_shape(start, jax.random.key(0))
    shardings = layout.state(abstract, model.axes)
    gradients = layout.gradients(abstract.trainable, model.axes)
    step = make_train_step(
        language_modelling(wrap(full_tuning(model))), optimizer, gradient_shardings=gradients
    )
    batch = jax.eval_shape(lambda: next(batches(1)))
    replicated = layout.replicated()
    step = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, replicated, layout.batch(batch)),
        out_shardings=(shardings, replicated),
        compiler_options=QUICK,
    )
    start = jax.jit(start, out_shardings=shardings, compiler_options=QUICK)
    return Job(abstract, shardings, start, step.lower(abstract, {}, batch).compile())


def batches(steps):
    """Two packed documents a row, the second of random length, then padding that is not learned."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = rng.integers(0, V, (B, T), dtype=np.int32)
        ends = rng.integers(T // 2 + 1, T + 1, (B, 1))
        column = np.arange(T)
        segments = np.where(column < T // 2, 1, np.where(column < ends, 2, 0)).astype(np.int32)
        yield {
            "tokens": tokens,
            "targets": (tokens * 7 + 3) % V,
            "weights": (segments > 0).astype(np.float32),
            "segments": segments,
            "positions": np.where(column < T // 2, column, column - T // 2)
            .repeat(B)
            .reshape(T, B)
            .T.astype(np.int32),
        }


def train(layout, steps, dtype="float32"):
    """Train from seed 0 on `batches(steps)`; every process provides the rows it is asked for."""
    job = prepare(layout, dtype)
    state = job.start(jax.random.key(0))
    initial, moment, losses = fetch(state.trainable), None, []
    for batch in batches(steps):
        mine = {name: leaf[layout.local_rows(B)] for name, leaf in batch.items()}
        state, metrics = job.step(state, {}, layout.place(mine))
        losses.append(float(metrics["loss"]))
        moment = fetch(optax.tree.get(state.optimizer, "mu")) if moment is None else moment
    return Result(initial, moment, losses, state, job)


def fetch(tree):
    """The whole arrays on the host, from however many processes."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
