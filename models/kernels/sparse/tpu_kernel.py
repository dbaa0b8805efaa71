"""The kernel of `tpu`: one chosen expert of one token a step, summed in float32."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...mlp import activation_function
from ..tpu.call import VMEM_LIMIT
from .experts import Experts

NAMES = ("up", "gate", "up_bias", "gate_bias", "down")  # in this order, those that there are


def run(interpret: Any, x: Array, experts: Experts, chosen: Array) -> Array:
    """x `[N, D]` and chosen `[N, k]` to `[N, D]`."""
    tokens, width = x.shape
    given = {name: leaf for name in NAMES if (leaf := getattr(experts, name)) is not None}
    picked = chosen.shape[1]

    def expert(token: Any, step: Any, choices: Any) -> tuple[Any, int, int]:
        return choices[token * picked + step], 0, 0

    def token(token: Any, step: Any, choices: Any) -> tuple[Any, int, int]:
        return token, 0, 0

    # A block's last two axes are whole axes of its array, so that one row and one bias are allowed.
    arrays = [leaf if leaf.ndim == 3 else leaf[:, None] for leaf in given.values()]
    specs = [pl.BlockSpec((None, *leaf.shape[1:]), expert) for leaf in arrays]
    row = pl.BlockSpec((None, 1, width), token)
    found = pl.pallas_call(
        functools.partial(_kernel, tuple(given), experts.activation),
        name="sparse_feed_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tokens, picked),
            in_specs=[row, *specs],
            out_specs=row,
            scratch_shapes=[pltpu.VMEM((1, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((tokens, 1, width), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=_cost(tokens * picked, experts),
        interpret=interpret,
    )(chosen.astype(jnp.int32).reshape(-1), x[:, None], *arrays)
    return found[:, 0]


def _kernel(names: tuple[str, ...], activation: str, choices: Any, x: Any, *refs: Any) -> None:
    del choices  # where blocks lie has been decided by it
    *weights, out, total = refs
    given = dict(zip(names, weights))
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    def linear(name: str) -> Array:
        product = _product(x[...], given[name][...], 1)
        bias = given.get(f"{name}_bias")
        return product if bias is None else product + bias[...].astype(jnp.float32)

    act = activation_function(activation)
    hidden = act(linear("gate")) * linear("up") if "gate" in given else act(linear("up"))
    total[...] += _product(hidden.astype(x.dtype), given["down"][...], 0)

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _product(row: Array, matrix: Array, axis: int) -> Array:
    """`[1, a]` with an axis of the matrix summed away, in float32 at full precision."""
    precision = lax.Precision.HIGHEST if row.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        row, matrix, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _cost(steps: int, experts: Experts) -> pl.CostEstimate:
    matrices = 3 if experts.gate is not None else 2
    numbers = steps * matrices * experts.size * experts.width
    return pl.CostEstimate(
        flops=2 * numbers,
        transcendentals=steps * experts.size,
        bytes_accessed=numbers * experts.up.dtype.itemsize,
    )
