"""Merging with a look at what comes out: numbers that are none, and updates that the weights cannot hold.

A bfloat16 weight keeps 8 bits. Where an update is a thousandth of its weight, rounding the sum throws most
of it away, and the merged model is not the tuned one (PEFT's `safe_merge` looks for non-finite values only).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ... import InputError
from .attach import Tuned
from .methods import LeafMethod
from .trees import Tree, leaf_paths, node_at, with_node


def safe_merge(
    tuned: Tuned, params: Mapping[str, Any], variables: Mapping[str, Any], *, lost: float = 0.05
) -> Tree:
    """`tuned.merge`, checked: the parameters of the plain model, lying on devices as they did.

    The sums are made in float32 and rounded once to each array's own dtype. Raises `InputError` that names
    the array where a merged number is not finite, and where rounding loses more than `lost` of the update,
    as a norm relative to the update's (1 allows everything); and where `merge` does.
    """
    merged, figures = _merged(tuned, params, variables)
    for path, (broken, loss) in figures.items():
        array = node_at(merged, path)
        if broken:
            raise InputError(
                f"{path}: {broken} of its {array.size} merged numbers are not finite; the delta or the "
                f"backbone has such numbers already, or the sum is too large for {array.dtype}"
            )
        if loss > lost:
            raise InputError(
                f"{path}: rounding the sum to {array.dtype} loses {loss:.2g} of the update (norm), "
                f"more than lost={lost:g}; merge into float32 parameters, or allow it by lost=1.0"
            )
    return merged


def lost_in_merge(tuned: Tuned, params: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, float]:
    """By path of each array that `merge` changes: what part of the update rounding throws away (norms)."""
    return {path: loss for path, (_, loss) in _merged(tuned, params, variables)[1].items()}


def _merged(
    tuned: Tuned, params: Mapping[str, Any], variables: Mapping[str, Any]
) -> tuple[Tree, dict[str, tuple[int, float]]]:
    """All arrays after the merge, and of those that it may change (non-finite numbers, part lost)."""
    precise: Tree = dict(params)
    paths = _changed(tuned, variables, params)
    for path in paths:
        precise = with_node(precise, path, _precise(node_at(params, path)))
    merged, figures = tuned.merge(precise, variables), {}
    for path in paths:
        old, exact = node_at(params, path), node_at(merged, path)
        rounded = _placed_like(exact.astype(old.dtype), old)
        merged = with_node(merged, path, rounded)
        figures[path] = _figures(node_at(precise, path), exact, rounded)
    return merged, {path: (int(n), float(x)) for path, (n, x) in jax.device_get(figures).items()}


def _changed(tuned: Tuned, variables: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """The floating-point arrays that belong to a site of the delta, or that it re-parameterises."""
    places = [(path, isinstance(entry.method, LeafMethod)) for path, entry in tuned.hits(variables, params)]
    leaves = {path for path, leaf in places if leaf}
    modules = {path for path, leaf in places if not leaf}
    found = [path for path in leaf_paths(params) if path in leaves or path.rpartition("/")[0] in modules]
    return [path for path in found if jnp.issubdtype(node_at(params, path).dtype, jnp.floating)]


def _precise(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


@jax.jit
def _figures(old: jax.Array, exact: jax.Array, rounded: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many numbers are not finite, and the rounding error's norm relative to the update's."""
    update, error = exact - old, exact - rounded.astype(exact.dtype)
    size = jnp.linalg.norm(update.ravel())
    loss = jnp.where(size > 0, jnp.linalg.norm(error.ravel()) / jnp.where(size > 0, size, 1), 0)
    return jnp.sum(~jnp.isfinite(rounded)), loss


def _placed_like(new: jax.Array, old: Any) -> jax.Array:
    sharding = getattr(old, "sharding", None)
    return new if sharding is None or new.sharding == sharding else jax.device_put(new, sharding)
