"""The scanned layers of a Transformer in stages over the mesh axis `pipe`, with the parameters they have.

The tree stays as it is: `layers/...` with a leading axis over layers, of which each device holds its part
(rule `layers`), so checkpoints cross to meshes without `pipe`. Embedding and head are outside: they split the
batch over `pipe` too, and no device waits for them. Other mesh axes stay with the compiler inside a stage.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from .. import InputError
from ..parallel.layout import Layout
from ..parallel.pipeline import micro_batches, pipeline, whole_batch
from ..parallel.rules import make_spec, split_axes
from .block import Context
from .config import TransformerConfig
from .kernels.letters import map_arrays
from .routing import COLLECTION
from .stack import call_layer, remat_body

logger = logging.getLogger("modicum.pipeline")
AXIS = "pipe"
Tree = Any


def run_in_stages(layers: nn.Module, x: jax.Array, context: Context, layout: Layout) -> jax.Array:
    """`x [B, T, D]` through scanned `layers`, a bound `Block` or `Period`, in the layout's stages.

    A number of layers that the stages do not divide is filled up with layers that do nothing. Raises
    InputError for what a pipeline cannot have: dropout, a cache, two stacks, several remat policies, and
    numbers of rows that micro-batches and devices do not divide.
    """
    _check(layers, context, layout)
    schedule, mesh = layout.schedule, layout.mesh
    params = layers.variables["params"]
    rows = len(jax.tree.leaves(params)[0])
    parts = schedule.parts(x.shape[0], mesh.shape[AXIS], _blocks(layout))
    missing = -rows % (mesh.shape[AXIS] * schedule.rounds)
    stacked = jax.tree.map(
        lambda leaf: _padded(leaf, missing), {"params": params, "real": jnp.ones(rows, bool)}
    )
    cut = _Cut.of(layout, parts)
    given, shared, rebuild = split_context(context, x.shape[0])
    sows = layers.is_mutable_collection(COLLECTION) and not layers.is_initializing()

    def stage(weights: Tree, x: jax.Array, given: Tree) -> tuple[jax.Array, Tree]:
        here = rebuild(*given)

        def layer(x: jax.Array, row: Tree) -> tuple[jax.Array, Tree]:
            y, sown = _apply(layers, row["params"], x, here, sows)
            return (y if not missing else jnp.where(row["real"], y, x)), sown

        return jax.lax.scan(layer, x, weights)

    y, sown = pipeline(
        stage,
        stacked,
        cut(x),
        jax.tree.map(cut.everywhere, given),
        shared,
        mesh=mesh,
        axis=AXIS,
        rounds=schedule.rounds,
    )
    if sows:
        for name, value in sown.get(COLLECTION, {}).get("layers", {}).items():
            kept = jax.tree.map(lambda leaf: leaf[:rows], value)
            layers.put_variable(COLLECTION, name, kept)
    return cut.joined(y)


class _Layer(nn.Module):
    """One layer by itself, under the name that it has in the whole model."""

    body: type[nn.Module]
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        policy = self.config.remat_runs[0][0]
        layer = self.body(self.config, name="layers")
        return remat_body(call_layer, policy, False)(layer, x, context)[0]


def _apply(
    layers: nn.Module, params: Tree, x: jax.Array, context: Context, sows: bool
) -> tuple[jax.Array, Tree]:
    """One layer with its own row of the parameters, and what it sowed."""
    one = _Layer(type(layers), layers.config, parent=None)
    mutable = [COLLECTION] if sows else []
    y, sown = one.apply({"params": {"layers": params}}, x, context, mutable=mutable)
    return y, sown


class _Cut(NamedTuple):
    """How a batch `[B, ...]` becomes micro-batches `[M, b, ...]` and whole again."""

    layout: Layout
    parts: int
    rows: tuple[str, ...]

    @classmethod
    def of(cls, layout: Layout, parts: int) -> _Cut:
        return cls(layout, parts, _row_axes(layout))

    def __call__(self, x: jax.Array) -> jax.Array:
        """M over `pipe`, b over the other axes of the batch."""
        return self._held(self.everywhere(x), AXIS)

    def everywhere(self, x: jax.Array) -> jax.Array:
        """All micro-batches on every device of `pipe`: what each stage needs to know of them."""
        return micro_batches(x, self.parts, self.layout.mesh, self.rows, AXIS)

    def joined(self, x: jax.Array) -> jax.Array:
        """`[B, ...]` again."""
        return self.layout.activations(whole_batch(x, self.layout.mesh, self.rows, AXIS))

    def _held(self, x: jax.Array, axis: str) -> jax.Array:
        length = split_axes(self.layout.rules.mesh_axes("length"), self.layout.mesh)
        spec = make_spec([(axis,), self.rows, length])
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.layout.mesh, spec))


def split_context(
    context: Context, rows: int
) -> tuple[list[Any], list[Any], Callable[[list, list], Context]]:
    """The arrays of `context` with a row for each of the batch's, those that all rows share, and it again."""
    leaves, structure = jax.tree.flatten(context)
    marked = dataclasses.replace(
        context,
        mask=map_arrays(_has_rows(rows), context.mask),
        positions=jax.tree.map(lambda array: _has_rows(rows)("B", array), context.positions),
        bias=None if context.bias is None else map_arrays(_has_rows(rows), context.bias),
    )
    own = jax.tree.leaves(marked)

    def rebuild(given: list[Any], shared: list[Any]) -> Context:
        from_given, from_shared = iter(given), iter(shared)
        return jax.tree.unflatten(structure, [next(from_given if mine else from_shared) for mine in own])

    given = [leaf for leaf, mine in zip(leaves, own) if mine]
    return given, [leaf for leaf, mine in zip(leaves, own) if not mine], rebuild


def _has_rows(rows: int) -> Callable[[str, Any], np.ndarray]:
    # An array, not a bool: a tree takes those for structure where numbers are.
    return lambda letters, array: np.asarray(letters.startswith("B") and array.shape[0] == rows)


def _check(layers: nn.Module, context: Context, layout: Layout) -> None:
    config, devices = layers.config, f"{AXIS}={layout.mesh.shape[AXIS]}"
    problems = {
        "an encoder-decoder has two stacks; use a mesh without it": config.kind == "encoder-decoder",
        f"dropout={config.dropout} would draw anew for each micro-batch; use 0, or a mesh without it": (
            context.train and config.dropout > 0
        ),
        "a cache of keys and values is for generation; use a mesh without it": context.slots is not None,
        f"remat={config.remat!r} differs between layers; use one policy for all": len(config.remat_runs) > 1,
        "only the routing's sums leave a stage; read other values on a mesh without it": (
            layers.is_mutable_collection("hooks")
        ),
    }
    for problem, there in problems.items():
        if there:
            raise InputError(f"mesh {devices}: {problem}")


def _row_axes(layout: Layout) -> tuple[str, ...]:
    axes = split_axes(layout.rules.mesh_axes("batch"), layout.mesh)
    return tuple(axis for axis in axes if axis != AXIS)


def _blocks(layout: Layout) -> int:
    blocks = 1
    for axis in _row_axes(layout):
        blocks *= layout.mesh.shape[axis]
    return blocks


def _padded(leaf: jax.Array, missing: int) -> jax.Array:
    return jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf
