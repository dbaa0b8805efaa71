"""The scores of one tile, in registers: scale, bias, soft cap and mask, and how they are differentiated.

Exponentials are to base 2: scores come as `value * factor` with the factor in units of log2(e), which the
compiler folds into the multiplication-addition before each exponential.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from .operations import Warpgroup
from .problem import LOG2_E, Problem

# stands for minus infinity in the backward pass, where its square has to be finite and its exponential 0
MASKED = -1e18


class Scores(NamedTuple):
    """Scores are `value * factor` to base 2."""

    value: Array
    factor: float


def scores(problem: Problem, products: Array, bias: Array | None) -> Scores:
    """From the products of queries and keys `[rows, columns]`, and a bias of the same shape."""
    cap = problem.soft_cap
    if cap is None:
        if bias is None:
            return Scores(products, problem.scale * LOG2_E)
        return Scores(products * (problem.scale * LOG2_E) + bias * LOG2_E, 1.0)
    scaled = products * (problem.scale / cap)
    return Scores(jnp.tanh(scaled if bias is None else scaled + bias * (1 / cap)), cap * LOG2_E)


class Visible(NamedTuple):
    """Which keys a tile's queries see: vectors along its query axis, and ids along its key axis."""

    starts: Array | None = None
    ends: Array | None = None
    query_ids: Array | None = None
    key_ids: Array | None = None


def mask_scores(
    operations: Warpgroup,
    value: Array,
    visible: Visible,
    first_key: Array,
    key_axis: int,
    hidden: float = MASKED,
) -> Array:
    """`value` with `hidden` where a key, numbered from `first_key` on, is not visible."""
    shape, conditions = value.shape, []
    keys = first_key + operations.indices(shape, key_axis)
    if visible.starts is not None:
        conditions.append(keys >= along(visible.starts, shape, 1 - key_axis))
    if visible.ends is not None:
        conditions.append(keys < along(visible.ends, shape, 1 - key_axis))
    if visible.query_ids is not None and visible.key_ids is not None:
        query_ids = along(visible.query_ids, shape, 1 - key_axis)
        conditions.append(query_ids == along(visible.key_ids, shape, key_axis))
    return jnp.where(functools.reduce(operator.and_, conditions), value, hidden)


def hide(value: Array, tile: Array | None, hidden: float = MASKED) -> Array:
    """`value` with `hidden` where the tile of a dense mask, of zeros and ones, is zero."""
    return value if tile is None else jnp.where(tile > 0.5, value, hidden)


def along(vector: Array, shape: tuple[int, ...], axis: int) -> Array:
    """A vector that runs along `axis`, repeated to a tile."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def weigh(
    problem: Problem, tile: Scores, lse: Array, row_axis: int, keep: Array | None = None
) -> tuple[Array, Array]:
    """The softmax's weights again, from its log-sum-exp to base 2, and how they answer to uncapped scores.

    The second is `weights * d cap / d score`; a log-sum-exp of infinity gives zeros. With a soft cap `value`
    is the hyperbolic tangent. Weights that dropout does not `keep` are zero in the first, negative in the
    second.
    """
    weights = jnp.exp2(tile.value * tile.factor - along(lse, tile.value.shape, row_axis))
    if keep is not None:
        weights = jnp.where(keep, weights, -weights)
    response = weights if problem.soft_cap is None else weights * (1 - tile.value * tile.value)
    return weights if keep is None else jnp.maximum(weights, 0), response


def score_gradient(problem: Problem, response: Array, d_weights: Array, delta: Array, row_axis: int) -> Array:
    """The gradient with respect to scaled scores plus bias; `delta` runs along `row_axis`.

    With dropout it is that over `Problem.kept`, if `delta` is: dropped weights answer to `delta` alone.
    """
    delta = along(delta, response.shape, row_axis)
    less = d_weights - delta
    return response * (less if not problem.rate else jnp.where(response > 0, less, delta))
