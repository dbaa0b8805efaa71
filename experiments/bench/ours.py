"""Our train step as a contender: the library's model, objective, optimizer and step, and nothing beside."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ...models.attention import multi_head
from ...models.config import TransformerConfig
from ...models.mlp import MLP
from ...models.norms import LayerNorm
from ...models.positions import Learned
from ...models.transformer import Transformer
from ...research.training.config import OptimizerConfig, ScheduleConfig
from ...research.training.objectives import full_tuning, language_modelling
from ...research.training.optimizers import make_optimizer
from ...research.training.state import TrainState, create_state
from ...research.training.step import make_train_step
from .job import DecoderJob


def decoder_config(job: DecoderJob) -> TransformerConfig:
    """The job's decoder as our configuration."""
    return TransformerConfig(
        layers=job.layers,
        width=job.width,
        vocab=job.vocab,
        attention=multi_head(job.heads),
        mlp=MLP(4 * job.width, "gelu_tanh"),
        norm=LayerNorm(1e-5),
        positions=Learned(job.length),
    )


class Ours:
    """A train state and the compiled step, its state donated, as the training loop runs it."""

    def __init__(self, job: DecoderJob) -> None:
        self.versions = f"jax {jax.__version__}"
        self.batches = itertools.cycle(
            {"tokens": jnp.asarray(x), "targets": jnp.asarray(y), "weights": jnp.ones(x.shape, jnp.float32)}
            for x, y in job.batches()
        )
        optimizer = make_optimizer(adamw(job), steps=1)
        self.model = Transformer(decoder_config(job))
        self.loss = language_modelling(full_tuning(self.model))
        params = jax.jit(self.model.init)(jax.random.key(0), jnp.zeros((1, job.length), jnp.int32))
        self.state: TrainState = create_state(params, optimizer)
        self.step = jax.jit(make_train_step(self.loss, optimizer), donate_argnums=0)

    def run(self, steps: int) -> float:
        """Train for `steps` and wait for the last one's loss."""
        metrics: Any = {}
        for _ in range(steps):
            self.state, metrics = self.step(self.state, {}, next(self.batches))
        jax.block_until_ready(self.state)
        return float(metrics["loss"])

    def product(self, m: int, k: int, n: int) -> Callable[[], None]:
        """One product `[m, k] x [k, n]` of random float32 matrices."""
        return product(m, k, n)


class AdamWNumbers(Protocol):
    """What a job says of its AdamW."""

    @property
    def learning_rate(self) -> float:
        """Constant."""

    @property
    def betas(self) -> tuple[float, float]:
        """Decay of the moments."""

    @property
    def epsilon(self) -> float:
        """Added to the root of the second moment."""

    @property
    def weight_decay(self) -> float:
        """Of matrices."""

    @property
    def clip(self) -> float:
        """Greatest norm of the gradients."""


def product(m: int, k: int, n: int) -> Callable[[], None]:
    """A function that multiplies random float32 matrices `[m, k] x [k, n]` and waits for it."""
    left, right = jax.random.normal(jax.random.key(0), (m, k)), jax.random.normal(jax.random.key(1), (k, n))
    multiply = jax.jit(jnp.matmul).lower(left, right).compile()

    def once() -> None:
        jax.block_until_ready(multiply(left, right))

    return once


def adamw(job: AdamWNumbers) -> OptimizerConfig:
    """The job's AdamW, at a constant learning rate, as our configuration."""
    return OptimizerConfig(
        "adamw",
        job.learning_rate,
        ScheduleConfig("constant", warmup=0),
        weight_decay=job.weight_decay,
        beta1=job.betas[0],
        beta2=job.betas[1],
        epsilon=job.epsilon,
        clip=job.clip,
    )
