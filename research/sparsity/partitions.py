"""How neurons become experts: four constructions, each a partition into groups of one size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...models.kernels.sparse import Experts
from ...models.selection import expert_mass
from .balanced import balanced_kmeans
from .feed_forward import input_weights
from .graph import partition_graph

ROWS = 1024  # tokens whose neurons are held at a time


@dataclass(frozen=True)
class Contiguous:
    """Neuron i belongs to expert i // n, as the code published with Zhang et al., 2022, splits "randomly"."""

    def groups(self, dense: Experts, inputs: np.ndarray, experts: int, seed: int) -> np.ndarray:
        """Neurons' numbers `[E, n]`."""
        return _grouped(np.arange(dense.count) * experts // dense.count, experts)


@dataclass(frozen=True)
class Shuffled:
    """Neurons at random."""

    def groups(self, dense: Experts, inputs: np.ndarray, experts: int, seed: int) -> np.ndarray:
        """Neurons' numbers `[E, n]`."""
        return np.sort(np.random.default_rng(seed).permutation(dense.count).reshape(experts, -1), axis=1)


@dataclass(frozen=True)
class Clusters:
    """Neurons with like input weights: balanced k-means on their directions (Zhang et al., 2022, 3.2)."""

    def groups(self, dense: Experts, inputs: np.ndarray, experts: int, seed: int) -> np.ndarray:
        """Neurons' numbers `[E, n]`."""
        return _grouped(balanced_kmeans(directions(dense), experts, seed), experts)


@dataclass(frozen=True)
class CoActivation:
    """Neurons that are active on the same inputs: few ties of the co-activation graph are cut (ibid.)."""

    method: Literal["auto", "metis", "spectral"] = "auto"

    def groups(self, dense: Experts, inputs: np.ndarray, experts: int, seed: int) -> np.ndarray:
        """Neurons' numbers `[E, n]`."""
        return _grouped(partition_graph(coactivation(dense, inputs), experts, seed, self.method), experts)


Partition = Contiguous | Shuffled | Clusters | CoActivation


def directions(dense: Experts) -> np.ndarray:
    """Input weights `[F, D]` of length 1; a neuron without any stays 0."""
    weights = input_weights(dense)
    return weights / np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-12)


def coactivation(dense: Experts, inputs: np.ndarray) -> np.ndarray:
    """`[F, F]`: the sum over tokens of the products of two neurons' sizes (Zhang et al., 2022, section 3.2).

    Activation functions that are never 0 leave a small product for every pair: what is below a neuron's mean
    size counts as inactive there.
    """
    never_zero = dense.activation not in ("relu", "relu2")

    @jax.jit
    def products(total: jax.Array, rows: jax.Array) -> jax.Array:
        size = expert_mass(dense, rows)
        size = jnp.where(size < size.mean(0), 0.0, size) if never_zero else size
        return total + size.T @ size

    total = jnp.zeros((dense.count, dense.count), jnp.float32)
    for rows in _parts(inputs):
        total = products(total, rows)
    return np.asarray(total)


def centres(dense: Experts, groups: np.ndarray) -> np.ndarray:
    """The mean direction of each expert's input weights, `[E, D]`."""
    return directions(dense)[groups].mean(1)


def expert_count(width: int, neurons: int) -> int:
    """How many experts of `neurons` neurons F make; raises `InputError` where they do not divide."""
    if neurons < 1 or width % neurons:
        near = [n for n in range(1, width + 1) if width % n == 0 and n <= 4 * max(neurons, 1)][-4:]
        raise InputError(
            f"{width} neurons do not divide into experts of {neurons}; e.g. {', '.join(map(str, near))} do"
        )
    return width // neurons


def _grouped(labels: np.ndarray, experts: int) -> np.ndarray:
    return np.argsort(labels, kind="stable").reshape(experts, -1)


def _parts(inputs: np.ndarray) -> list[np.ndarray]:
    """In parts of one size, so that one program serves them all; what fills no part is left out."""
    size = min(ROWS, len(inputs))
    return np.split(inputs[: len(inputs) // size * size], len(inputs) // size)
