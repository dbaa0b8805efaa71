"""Attention on a Hopper GPU as one differentiable function of padded arrays."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..biases import ALiBi, Bias, Bucketed, Dense
from ..varying import vary, varying_axes
from .bias_gradient import bias_gradient
from .bias_tiles import BiasTiles, bucket_sums, operand
from .dropping import Hashes
from .forward import forward
from .fused_gradient import fused_gradient
from .key_gradient import key_gradient
from .problem import CONSUMERS, LOG2_E, Problem, Tiles
from .query_block import Operands
from .query_gradient import Gradients, query_gradient
from .tile_sizes import Plan
from .tiling import mask_over_keys, mask_over_queries


class Inputs(NamedTuple):
    """What attention is a function of, padded to what a `Problem` says; gradients have no integers."""

    q: Array
    k: Array
    v: Array
    seen: Any  # Ranges
    bias: Bias | None
    hashes: Hashes | None = None  # for dropout
    allowed: Array | None = None  # bool, a dense mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(problem: Problem, plan: Plan, inputs: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, H, K]` and log-sum-exp `[B, H, T]`.

    Kernels do not know over which mesh axes their operands vary; so it is said of what they return.
    """
    found = forward(problem, plan.forward, _over_keys(problem, plan.forward, inputs))
    return vary(found, varying_axes(inputs))


def _over_keys(problem: Problem, tiles: Tiles, inputs: Inputs) -> Operands:
    q, k, v, seen, bias, hashes, allowed = inputs
    rows = CONSUMERS * tiles.queries
    mask = mask_over_keys(seen, problem, rows, tiles.keys)
    dense = None if allowed is None else BiasTiles(allowed.astype(jnp.bfloat16), rows, tiles.keys)
    return Operands(q, k, v, mask, operand(bias, rows, tiles.keys, over_queries=False), hashes, dense)


def _over_queries(problem: Problem, tiles: Tiles, inputs: Inputs) -> Operands:
    q, k, v, seen, bias, hashes, allowed = inputs
    rows = CONSUMERS * tiles.keys
    mask = mask_over_queries(seen, problem, tiles.queries, rows)
    dense = None
    if allowed is not None:
        dense = BiasTiles(allowed.swapaxes(2, 3).astype(jnp.bfloat16), rows, tiles.queries)
    return Operands(q, k, v, mask, operand(bias, rows, tiles.queries, over_queries=True), hashes, dense)


def _forward(problem: Problem, plan: Plan, inputs: Inputs) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    out, lse = attend(problem, plan, inputs)
    return (out, lse), (inputs, out, lse)


def _backward(
    problem: Problem, plan: Plan, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Inputs]:
    inputs = residuals[0]
    return (vary(_gradients(problem, plan, residuals, cotangents), varying_axes(inputs)),)


def _gradients(
    problem: Problem, plan: Plan, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> Inputs:
    (inputs, out, lse), (d_out, d_lse) = residuals, cotangents
    delta = jnp.einsum("bthk,bthk->bht", out, d_out, preferred_element_type=jnp.float32) - d_lse
    delta = delta / problem.kept
    gradients = Gradients(d_out, jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E), delta)
    if not plan.deterministic:
        operands = _over_queries(problem, plan.key_gradient, inputs)
        return Inputs(*fused_gradient(problem, plan.key_gradient, operands, gradients), None, None)
    operands = _over_keys(problem, plan.query_gradient, inputs)
    dq, d_slopes = query_gradient(problem, plan.query_gradient, operands, gradients)
    operands = _over_queries(problem, plan.key_gradient, inputs)
    dk, dv = key_gradient(problem, plan.key_gradient, operands, gradients)
    d_bias = _bias_gradient(problem, plan.bias_gradient, inputs, gradients, d_slopes)
    return Inputs(dq, dk, dv, None, d_bias)


def _bias_gradient(
    problem: Problem, tiles: Tiles, inputs: Inputs, gradients: Gradients, d_slopes: Array | None
) -> Bias | None:
    """A tree like the bias; `d_slopes [B, H, T]` is what the other kernels found of ALiBi's."""
    bias = inputs.bias
    if bias is None:
        return None
    if isinstance(bias, ALiBi):
        assert d_slopes is not None
        return dataclasses.replace(bias, slopes=d_slopes.sum((0, 2)).astype(bias.slopes.dtype))
    operands = _over_keys(problem, tiles, inputs)
    found = bias_gradient(problem, tiles, operands, gradients)
    if isinstance(bias, Dense):
        return dataclasses.replace(bias, values=found.astype(bias.values.dtype))
    if isinstance(bias, Bucketed):
        table = bucket_sums(bias, found, CONSUMERS * tiles.queries, tiles.keys)
        return dataclasses.replace(bias, table=table)
    raise AssertionError(f"{type(bias).__name__} has no gradient here")


attend.defvjp(_forward, _backward)
