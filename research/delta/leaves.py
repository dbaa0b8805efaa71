"""Deltas on arrays of the parameter tree: `f(reparameterised(params), ...)` for any function `f`.

The gradient costs what full tuning of the addressed arrays costs, and the sum is rounded to the array's
dtype; what a delta gains is that nothing else needs gradients, moments or storage.
"""

from __future__ import annotations

import inspect
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


def init_leaf(method: LeafMethod, rng: jax.Array, path: str, leaf: jax.Array, hit: Hit) -> Variables:
    """Trained variables for one array, or for the rows of it that `hit` names."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise InputError(
            f"{path}: {type(method).__name__} tunes floating-point arrays, this one is {leaf.dtype}"
        )
    return method.init(rng, leaf if hit.rows is None else leaf[np.asarray(hit.rows)])


def apply_leaf(
    method: LeafMethod, variables: Variables, params: Mapping[str, Any], path: str, hit: Hit
) -> Tree:
    """`params` with the array at `path` re-parameterised."""
    leaf = node_at(params, path)
    if leaf is None or isinstance(leaf, Mapping):
        raise InputError(f"{path}: the delta tunes this array, but the model has none of that name")
    if hit.rows is None:
        return with_node(params, path, method.apply(variables, leaf))
    rows = np.asarray(hit.rows)
    return with_node(params, path, leaf.at[rows].set(method.apply(variables, leaf[rows])))
