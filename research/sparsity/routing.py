"""Making a router: centres read off the weights, or a small network trained to foresee the experts' mass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ...models.kernels.sparse import Experts
from ...models.precision import FP32
from ...models.selection import (
    CentreSelection,
    LowRankSelection,
    MLPSelection,
    OracleSelection,
    Selection,
    expert_mass,
)


@dataclass(frozen=True)
class Fitting:
    """How a router is trained: epochs over the tokens, tokens of a batch, Adam's rate at the start."""

    epochs: int = 30
    batch: int = 512
    rate: float = 0.01
    seed: int = 0


def fit_selection(
    selection: Selection, experts: Experts, centres: np.ndarray, inputs: np.ndarray, fitting: Fitting
) -> dict[str, jax.Array]:
    """Parameters of the module `selection` for these experts with these `centres [E, D]`.

    Where there is something to train, each expert's share of the most massive one's mass is foretold on
    `inputs [N, D]` by a logistic loss (Zhang et al., 2022, section 3.3, whose code scales by the batch's most
    massive one), from the centres as first layer, with a rate that falls to 0 along a cosine.
    """
    match selection:
        case OracleSelection():
            return {}
        case CentreSelection():
            return {"centres": jnp.asarray(centres)}
    start = _start(selection, centres)
    size = min(fitting.batch, len(inputs))
    order = np.random.default_rng(fitting.seed).permuted(
        np.tile(np.arange(len(inputs)), (fitting.epochs, 1)), axis=1
    )
    batches = order[:, : len(inputs) // size * size].reshape(-1, size)
    return _train(selection, start, experts, jnp.asarray(inputs), jnp.asarray(batches), fitting.rate)


def _start(selection: MLPSelection | LowRankSelection, centres: np.ndarray) -> dict[str, jax.Array]:
    """The centres' scores, as far as the layer's width allows."""
    experts = len(centres)
    rank = (selection.hidden or experts) if isinstance(selection, MLPSelection) else selection.rank
    left, values, right = np.linalg.svd(centres.T, full_matrices=False)
    if rank == experts:
        first, second = centres.T, np.eye(experts)
    else:
        kept = min(rank, len(values))
        first, second = np.zeros((centres.shape[1], rank)), np.zeros((rank, experts))
        first[:, :kept], second[:kept] = left[:, :kept] * values[:kept], right[:kept]
    parts = {"first": first, "second": second, "bias": np.zeros(experts)}
    return {name: jnp.asarray(part, jnp.float32) for name, part in parts.items()}


@partial(jax.jit, static_argnames=("selection", "rate"))
def _train(
    selection: MLPSelection | LowRankSelection,
    start: dict[str, jax.Array],
    experts: Experts,
    inputs: jax.Array,
    batches: jax.Array,
    rate: float,
) -> dict[str, jax.Array]:
    module = selection.build(experts.count, FP32)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, len(batches)))
    mass = expert_mass(experts, inputs)
    targets = mass / jnp.maximum(mass.max(-1, keepdims=True), 1e-12)

    def loss(params: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
        scores = module.apply({"params": params}, inputs[rows], experts)
        return optax.sigmoid_binary_cross_entropy(scores, targets[rows]).mean()

    def step(carry: tuple, rows: jax.Array) -> tuple[tuple, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state)
        return (optax.apply_updates(params, updates), state), None

    return lax.scan(step, (start, optimizer.init(start)), batches)[0][0]
