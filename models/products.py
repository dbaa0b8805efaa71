"""Products of activations with weights, in the form whose gradients are fast too."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import lax


def dense_product(
    x: jax.Array,
    weights: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`lax.dot_general` of the last axis of `x [..., D]` with an axis of `weights`: `[..., F]`.

    On CPUs the leading axes of `x` are joined for the product. The weights' gradient then sums over one axis;
    over two, XLA:CPU writes a factor transposed first and multiplies at 60 to 75 instead of 95 to 105 GFLOP
    a CPU second. Elsewhere, and on a mesh, they stay apart: joining them would gather arrays that are sharded
    along both.
    """
    leading = x.shape[:-1]
    join = len(leading) > 1 and jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty
    if join:
        (_, contracted), batched = dimension_numbers
        x = x.reshape(math.prod(leading), x.shape[-1])
        dimension_numbers = ((1,), contracted), batched
    y = lax.dot_general(
        x, weights, dimension_numbers, precision=precision, preferred_element_type=preferred_element_type
    )
    return y.reshape(*leading, y.shape[-1]) if join else y


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x [..., D]` times `kernel [D, F]`, in the form of `dense_product`."""
    return dense_product(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def scaled_product(
    x: jax.Array,
    weights: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`dense_product` divided by the square root of the width of `x`: weights of variance 1 keep its scale.

    The factor lies on the product, as in CPM-Bee (`cpm_live/layers/linear.py` of OpenBMB/CPM-Live).
    """
    y = dense_product(x, weights, dimension_numbers, precision, preferred_element_type)
    return y * (1.0 / math.sqrt(x.shape[-1]))
