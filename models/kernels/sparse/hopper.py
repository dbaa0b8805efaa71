"""Pallas on Hopper GPUs: only the chosen experts' rows are copied, each once for all tokens that chose it.

Two kernels, as a neuron's activation needs all of x and an output all neurons: so each has enough blocks to
keep the memory busy with one token. They are imported when they are first used.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from ..hopper.implementation import TYPES, no_hopper
from .experts import Experts
from .gradient import with_portable_gradient
from .request import SparseRequest, for_few_tokens

ACTIVATIONS = ("relu", "relu2", "gelu_tanh", "silu", "sigmoid", "tanh")
ROWS = 64  # tokens of one product of the tensor cores, padded
LEAST = 16  # neurons of one product of the tensor cores


class Chosen(NamedTuple):
    """Experts that any token chose, `[U]`, how many of them count, `[1]`, and who chose each, `[U, 64]`."""

    used: Array
    number: Array
    member: Array


@dataclasses.dataclass(frozen=True)
class SparseHopper:
    """Pallas (Mosaic GPU) on H100 and H200; with `interpret`, an `InterpretGPUParams`, on a CPU, slowly."""

    name: str = "hopper"
    interpret: Any = None

    def supports(self, request: SparseRequest) -> str | None:
        """A Hopper GPU, bfloat16 or float16, experts of whole tiles, tokens of one product."""
        if self.interpret is None and (reason := no_hopper(request.platform)):
            return reason
        if request.dtype not in TYPES:
            return f"its matrix products are of {' or '.join(TYPES)}, not {request.dtype}"
        if request.activation not in ACTIVATIONS:
            return f"it knows {', '.join(ACTIVATIONS)}, not {request.activation}"
        if request.width % 64 or request.size % LEAST:
            return f"experts of {request.size}×{request.width} are not whole tiles of {LEAST}×64"
        if request.tokens > ROWS:
            return f"{request.tokens} tokens are more than the {ROWS} rows of a product"
        return None

    def unfit(self, request: SparseRequest) -> str | None:
        """It is for few tokens."""
        return for_few_tokens(request)

    def __call__(self, x: Array, experts: Experts, chosen: Array) -> Array:
        """`[N, D]`; the backward pass is that of `gather` or `mask`."""
        compute = functools.partial(_compute, self.interpret)
        return with_portable_gradient(compute, x, experts.without_output_bias(), chosen)


def _compute(interpret: Any, x: Array, experts: Experts, chosen: Array) -> Array:
    from .hopper_kernels import run

    tokens = x.shape[0]
    padded = jnp.pad(x, ((0, ROWS - tokens), (0, 0)))
    return run(interpret, padded, experts, _chosen(experts.count, chosen))[:tokens].astype(x.dtype)


def _chosen(experts: int, chosen: Array) -> Chosen:
    """The experts that some token chose, in order, and which tokens did."""
    rows = jnp.arange(chosen.shape[0])[:, None]
    member = jnp.zeros((experts, ROWS), jnp.float32).at[chosen, rows].set(1.0)
    wanted = member.any(-1)
    used = jnp.argsort(~wanted, stable=True)[: min(experts, chosen.size)].astype(jnp.int32)
    number = wanted.sum(dtype=jnp.int32)[None]
    return Chosen(used, number, member[used])
