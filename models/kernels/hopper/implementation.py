"""The Hopper kernels as an implementation of `attention`: what they can do, and why not the rest.

The kernels, and with them Pallas, are imported when they are first used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..biases import ALiBi, Bias, Bucketed, Dense
from ..request import PARTITIONED, Request
from ..terms import Terms
from .dense_masks import no_mask

TYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Hopper:
    """Flash attention in Pallas (Mosaic GPU) on H100 and H200: bfloat16 or float16, widths up to 128.

    Dao 2023, "FlashAttention-2", with the warp specialisation of Shah et al. 2024, "FlashAttention-3". The
    backward pass is a kernel for queries, one for keys and values and one for biases that need it; each sums
    in a fixed order, so gradients are the same every time. Without `deterministic` one kernel does the work
    of the first two with two products less a tile, adding to the queries' gradient in any order. `interpret`,
    an `InterpretGPUParams`, runs the kernels on a CPU instead (see `operations`); `tiles` names kernels and
    blocks to be taken whatever the table says (see `tile_sizes`).
    """

    name: str = "hopper"
    interpret: Any = None
    deterministic: bool = True
    tiles: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def supports(self, request: Request) -> str | None:
        """A Hopper GPU, 16-bit inputs, widths up to 128, masks that are dense or a range of keys a query."""
        if self.interpret is None and (reason := no_hopper(request.platform)):
            return reason
        if request.dtype not in TYPES:
            return f"its matrix products are of {' or '.join(TYPES)}, not {request.dtype}"
        if max(request.width, request.value_width) > 128:
            return f"its tiles hold widths up to 128, not {max(request.width, request.value_width)}"
        if not self.deterministic and (reason := _no_fused(request)):
            return reason
        no_bias = request.bias and _no_bias(request.bias, request.queries, request.keys)
        return no_bias or no_mask(request.mask, request.queries, request.keys)

    def unfit(self, request: Request) -> str | None:
        """Decoding, as a block holds 128 queries, and what XLA would have to partition."""
        if request.partitioned:
            return PARTITIONED
        if not self.deterministic:
            return "its gradients differ from run to run in their last bits"
        return "a block of its kernels holds 128 queries" if request.queries < 16 else None

    def __call__(self, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
        """Output `[B, T, H, K]` in the type of q and log-sum-exp `[B, H, T]`, float32."""
        from .padding import padded_attention

        return padded_attention(q, k, v, terms, self.interpret, self.deterministic, self.tiles)

    def candidates(self, request: Request) -> Mapping[str, Sequence[tuple[int, ...]]]:
        """By name of entries in the table of block sizes what is worth a try for a request."""
        from .tile_sizes import candidates

        return candidates(request) if self.deterministic else {}

    def with_blocks(self, name: str, blocks: tuple[int, ...]) -> Hopper:
        """Itself with these for the kernel of that name, whatever the table says."""
        return dataclasses.replace(self, tiles=(*self.tiles, (name, blocks)))


def _no_fused(request: Request) -> str | None:
    """Why one kernel cannot compute all gradients, or None."""
    if request.bias is not None:
        return "its backward pass that adds in any order has no biases"
    if (width := max(request.width, request.value_width)) > 64:
        return f"its backward pass that adds in any order holds widths up to 64 in registers, not {width}"
    return None


def no_hopper(platform: str) -> str | None:
    """Why a platform, as JAX calls it, has no Hopper GPU, or None."""
    if platform != "gpu":
        return f"it is for Hopper GPUs, and this is a {platform}"
    capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
    if capability.split(".")[0] != "9":
        return f"it is for GPUs of compute capability 9 (Hopper), and this one's is {capability}"
    return None


def _no_bias(bias: Bias, queries: int, keys: int) -> str | None:
    """Why the kernels cannot read this bias, of arrays or their shapes, or None."""
    match bias:
        case Dense(values=values):
            if values.shape[2:] != (queries, keys) or 1 in (queries, keys):
                return "its dense biases have a row for every query and a column for every key"
            if jnp.dtype(values.dtype).itemsize not in (2, 4):
                return f"its biases have 16 or 32 bits, not {values.dtype}"
        case Bucketed() | ALiBi():
            if not isinstance(bias.offset, int):
                return f"the offset of {type(bias).__name__} has to be known when compiling"
        case _:
            return f"it cannot read {type(bias).__name__}"
    return None
