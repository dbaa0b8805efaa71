"""Matrix products of a tile: which factor the compiler turns around, and how many bits are kept."""

import jax.numpy as jnp
from jax import Array, lax

from .plan import LANES


def product(a: Array, b: Array, transposed: bool = False) -> Array:
    """`a @ b` or `a @ b.T` in float32; float32 factors are not rounded to bfloat16."""
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def turned_product(a: Array, b: Array) -> Array:
    """`a.T @ b` in float32.

    The compiler turns the left factor around: here the wide `a`, if `b` is at least as wide as registers,
    else the narrow `b`.
    """
    dimensions, precision = (
        (((0,), (0,)), ((), ())),
        lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    )
    narrow = b.shape[1] < LANES
    left, right = (b, a) if narrow else (a, b)
    found = lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
    return found.T if narrow else found


def split_product(a: Array, b: Array, transposed: bool = False) -> Array:
    """`product` of `a` in float32 and `b` in bfloat16, as the sum of three: eight bits of `a` in each.

    Sums over the rows of the backward pass need it: rounding `a` errs with one sign in a row.
    """
    total = jnp.zeros((a.shape[0], b.shape[0 if transposed else 1]), jnp.float32)
    for _ in range(3):
        bits = lax.bitcast_convert_type(a, jnp.int32) & jnp.int32(-(1 << 16))
        upper = lax.bitcast_convert_type(bits, jnp.float32)
        total, a = total + product(upper.astype(b.dtype), b, transposed), a - upper
    return total
