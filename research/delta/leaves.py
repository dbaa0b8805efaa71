"""Deltas on arrays of the parameter tree: `f(reparameterised(params), ...)` for any function `f`.

The gradient costs what full tuning of the addressed arrays costs, and the sum is rounded to the array's
dtype; what a delta gains is that nothing else needs gradients, moments or storage.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from .addresses import Hit
from .methods import LeafMethod, Variables
from .trees import Tree, node_at, with_node


@dataclass(frozen=True)
class FunctionModel:
    """A function `f(params, *args, **kwargs)` as a model; `rng` and `train` reach it if it takes them."""

    function: Callable[..., Any]

    def init(self, rng: jax.Array, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Not defined: a bare function comes with parameters of its own."""
        raise InputError("a function has no init; make its parameters yourself")

    def apply(
        self,
        params: Mapping[str, Any],
        *args: Any,
        rng: jax.Array | None = None,
        train: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The function's value."""
        taken = inspect.signature(self.function).parameters
        given = {"rng": rng, "train": train}
        return self.function(params, *args, **kwargs, **{key: given[key] for key in given if key in taken})


def init_leaf(
    method: LeafMethod, rng: jax.Array, path: str, leaf: jax.Array, hit: Hit
) -> tuple[Variables, Variables]:
    """Trained and untrained variables for one array, or for the rows of it that `hit` names."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise InputError(
            f"{path}: {type(method).__name__} tunes floating-point arrays, this one is {leaf.dtype}"
        )
    leaf = leaf if hit.rows is None else leaf[np.asarray(hit.rows)]
    first, second = jax.random.split(leaf_key(rng, path))
    trained = method.init(first, leaf)
    return trained, method.state(second, leaf, trained)


def apply_leaf(
    method: LeafMethod,
    variables: Variables,
    params: Mapping[str, Any],
    path: str,
    hit: Hit,
    rng: jax.Array | None = None,
) -> Tree:
    """`params` with the array at `path` re-parameterised."""
    key = leaf_key(rng, path) if method.random and rng is not None else None
    return on_rows(params, path, hit, lambda leaf: method.apply(variables, leaf, key))


def on_rows(params: Mapping[str, Any], path: str, hit: Hit, change: Callable[[jax.Array], jax.Array]) -> Tree:
    """`params` with the rows that `hit` names of the array at `path` changed."""
    leaf = node_at(params, path)
    if leaf is None or isinstance(leaf, Mapping):
        raise InputError(f"{path}: the delta tunes this array, but the model has none of that name")
    if hit.rows is None:
        return with_node(params, path, change(leaf))
    rows = np.asarray(hit.rows)
    return with_node(params, path, leaf.at[rows].set(change(leaf[rows])))


def leaf_key(rng: jax.Array, path: str) -> jax.Array:
    """A key of its own for every array."""
    return jax.random.fold_in(rng, np.uint32(zlib.crc32(path.encode())))
