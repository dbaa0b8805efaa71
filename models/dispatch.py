"""Tokens to their experts and back, on one device or with the experts spread over a mesh axis.

On a mesh every device of an `expert` group gathers the group's tokens, computes those that chose its own
experts, and the results are summed where the tokens came from (reduce-scatter). Shapes are static and no
token is dropped, however uneven the routing; waiting for the busiest device is what unevenness costs. Over
`tensor` each expert is split as an mlp is. Forward, a layer moves (n - 1) / n of the group's tokens twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ..parallel.manual import mesh_here
from .grouped import grouped_product
from .mlp import activate
from .precision import promote_statistics


@struct.dataclass
class ExpertWeights:
    """Kernels `up` and `gate` `[E, D, F]`, `down` `[E, F, D]`; plain experts have no gate."""

    up: Array
    down: Array
    gate: Array | None = None


@dataclass(frozen=True)
class ExpertAxes:
    """Over which axes of `mesh` rows, lengths, experts and the experts' neurons lie."""

    mesh: Mesh
    batch: tuple[str, ...] = ()
    length: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    neurons: tuple[str, ...] = ()

    def free(self, manual: set[str], mesh: Mesh | AbstractMesh, rows: int) -> ExpertAxes:
        """Those axes that no enclosing `shard_map` has split already, and of rows those that divide them."""
        kept = [
            tuple(axis for axis in axes if axis not in manual)
            for axes in (self.batch, self.length, self.experts, self.neurons)
        ]
        while kept[0] and rows % math.prod(mesh.shape[axis] for axis in kept[0]):
            kept[0] = kept[0][:-1]
        return ExpertAxes(self.mesh, *kept)


def routed(
    x: Array, experts: Array, weights: Array, kernels: ExpertWeights, activation: str, axes: ExpertAxes | None
) -> Array:
    """The weighted sum `[B, T, D]` of what the chosen `experts [B, T, k]` make of `x [B, T, D]`."""
    if axes is None:
        return _through(x, experts, weights, kernels, activation)
    mesh, manual = mesh_here(axes.mesh)
    if manual == set(mesh.axis_names):
        return _through(x, experts, weights, kernels, activation)
    place = axes.free(manual, mesh, x.shape[0])
    tokens = PartitionSpec(place.batch or None, place.length or None)
    into = PartitionSpec(place.experts or None, None, place.neurons or None)
    back = PartitionSpec(place.experts or None, place.neurons or None)
    gate = None if kernels.gate is None else into
    places: Any = ExpertWeights(into, back, gate)  # type: ignore[arg-type]

    def own(x: Array, experts: Array, weights: Array, kernels: ExpertWeights) -> Array:
        return _on_device(place, x, experts, weights, kernels, activation)

    return jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, places),
        out_specs=tokens,
        axis_names=set(mesh.axis_names) - manual,
    )(x, experts, weights, kernels)


def _on_device(
    place: ExpertAxes, x: Array, experts: Array, weights: Array, kernels: ExpertWeights, activation: str
) -> Array:
    """Own experts on the tokens of the whole group, summed back to where the tokens are."""
    spread = [axis for axis in place.experts if axis in place.batch]
    whole = [axis for axis in place.experts if axis not in place.batch]
    for axis in reversed(spread):
        x, experts, weights = (
            lax.all_gather(each, axis, axis=0, tiled=True) for each in (x, experts, weights)
        )
    first = lax.axis_index(place.experts) * len(kernels.up) if place.experts else 0
    y = _through(x, experts - first, weights, kernels, activation)
    for axis in spread:
        y = lax.psum_scatter(y, axis, scatter_dimension=0, tiled=True)
    rest = (*whole, *place.neurons)
    return lax.psum(y, rest) if rest else y


def _through(x: Array, experts: Array, weights: Array, kernels: ExpertWeights, activation: str) -> Array:
    """`[B, T, D]`: tokens sorted by expert, through it, and back; experts that are not here give 0."""
    chosen, here = experts.shape[-1], len(kernels.up)
    which = experts.reshape(-1)
    which = jnp.where((which >= 0) & (which < here), which, here)
    order = jnp.argsort(which, stable=True)
    sizes = jnp.bincount(which, length=here + 1)[:here]
    rows = jnp.repeat(x.reshape(-1, x.shape[-1]), chosen, axis=0)
    out = _experts(_permuted(rows, order), kernels, sizes, activation)
    out = _permuted(out, jnp.argsort(order)).reshape(*experts.shape, x.shape[-1])
    y = jnp.einsum("btkd,btk->btd", promote_statistics(out), weights.astype(promote_statistics(out).dtype))
    return y.astype(x.dtype)


def _experts(rows: Array, kernels: ExpertWeights, sizes: Array, activation: str) -> Array:
    """Each row through its expert's mlp."""
    hidden: Any = grouped_product(rows, kernels.up, sizes)
    if kernels.gate is None:
        hidden = activate(activation, hidden)
    else:
        hidden = activate(activation, grouped_product(rows, kernels.gate, sizes)) * hidden
    return grouped_product(hidden, kernels.down, sizes)


def _permuted(rows: Array, order: Array) -> Array:
    """Rows in this order; each is there once, so the gradient is a permutation too, and no sum."""
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")
