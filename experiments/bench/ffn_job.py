"""Feed-forward stacks to be timed: the same layers dense and in experts, each behind its router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...models.kernels.sparse import Experts, sparse_feed_forward
from ...models.precision import FP32
from ...models.selection import MLPSelection, Selection

Run = Callable[[], Any]


@dataclass(frozen=True)
class FeedForwardJob:
    """`layers` layers of `neurons` F in experts of `size` n, of width D; ReLU, float32.

    Layers are many, so that weights come from memory and not from a cache, as in a model.
    """

    name: str
    width: int
    neurons: int
    layers: int
    size: int = 32
    gated: bool = False
    selection: Selection = MLPSelection()

    @property
    def experts(self) -> int:
        """E."""
        return self.neurons // self.size


JOBS = {
    job.name: job
    for job in (FeedForwardJob("t5-base", 768, 3072, 12), FeedForwardJob("t5-large", 1024, 4096, 8))
}


class FeedForwardStack:
    """The job's weights, and compiled functions of them for any contender, batch and share."""

    def __init__(self, job: FeedForwardJob) -> None:
        self.job = job
        keys = jax.random.split(jax.random.key(0), job.layers)
        self.experts = [_experts(job, key) for key in keys]
        module = job.selection.build(job.experts, FP32)
        row = jnp.ones((1, job.width))
        self.routers = [module.init(key, row, self.experts[0]).get("params", {}) for key in keys]
        self.dense = [_matrices(each) for each in self.experts]

    def prepare(self, impl: str, batch: int, share: float) -> Run:
        """A compiled call, warmed up; `impl` "dense" is two products of `[D, F]` and `[F, D]`."""
        x = jax.random.normal(jax.random.key(1), (batch, self.job.width))
        if impl == "dense":
            run = partial(jax.jit(_dense), x, self.dense)
        else:
            chosen = max(1, round(share * self.job.experts))
            function = jax.jit(partial(_sparse, job=self.job, chosen=chosen, impl=impl))
            run = partial(function, x, self.experts, self.routers)
        jax.block_until_ready(run())
        return run


def _experts(job: FeedForwardJob, key: jax.Array) -> Experts:
    shape = (job.experts, job.size, job.width)
    up, down, gate = (0.02 * jax.random.normal(each, shape) for each in jax.random.split(key, 3))
    return Experts(up=up, down=down, gate=gate if job.gated else None)


def _matrices(experts: Experts) -> tuple[jax.Array, ...]:
    width = experts.width
    first = [leaf for leaf in (experts.up, experts.gate) if leaf is not None]
    return *(jnp.array(leaf.reshape(-1, width).T) for leaf in first), experts.down.reshape(-1, width)


def _dense(x: jax.Array, matrices: list[Any]) -> jax.Array:
    for up, *gate, down in matrices:
        hidden = jax.nn.relu(x @ gate[0]) * (x @ up) if gate else jax.nn.relu(x @ up)
        x = x + hidden @ down
    return x


def _sparse(
    x: jax.Array, stack: Any, routers: Any, *, job: FeedForwardJob, chosen: int, impl: str
) -> jax.Array:
    module = job.selection.build(job.experts, FP32)
    for experts, router in zip(stack, routers):
        scores: Any = module.apply({"params": router} if router else {}, x, experts)
        x = x + sparse_feed_forward(x, experts, lax.top_k(scores, chosen)[1], impl=impl)
    return x
