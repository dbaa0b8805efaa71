"""Pallas on TPUs: the numbers of the chosen experts are read first, and only their rows are fetched.

The grid is tokens by chosen experts. `chosen` lies in scalar memory before the kernel starts
(`PrefetchScalarGridSpec`), so that the pipeline fetches an expert's rows while the one before is multiplied;
nothing is copied in between. The kernel is imported when it is first used.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jax import Array

from .experts import Experts
from .gradient import with_portable_gradient
from .request import SparseRequest, for_few_tokens

LANES = 128
ROWS = {"float32": 8, "bfloat16": 16}  # of a tile of registers
ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
MOST_VMEM = 32 << 20  # bytes of an expert's weights, each block held twice
MOST_CHOICES = 1 << 16  # numbers of 4 bytes in scalar memory, of which there is 1 MiB


@dataclasses.dataclass(frozen=True)
class SparseTpu:
    """Scalar-prefetched expert rows; with `interpret` on anything, slowly, to be tested."""

    name: str = "tpu"
    interpret: Any = False

    def supports(self, request: SparseRequest) -> str | None:
        """TPUs, float32 and bfloat16, experts of whole tiles."""
        if request.platform != "tpu" and not self.interpret:
            return f"it is for TPUs, not {request.platform}"
        if request.dtype not in ROWS:
            return f"it computes in {' and '.join(ROWS)}, not {request.dtype}"
        if request.activation not in ACTIVATIONS:
            return f"it knows {', '.join(ACTIVATIONS)}, not {request.activation}"
        if request.width % LANES or request.size % ROWS[request.dtype]:
            rows = ROWS[request.dtype]
            return f"experts of {request.size}×{request.width} are not whole tiles of {rows}×{LANES}"
        matrices, itemsize = 3 if request.gated else 2, {"float32": 4, "bfloat16": 2}[request.dtype]
        if 2 * matrices * request.size * request.width * itemsize > MOST_VMEM:
            return f"experts of {request.size}×{request.width} are larger than on-chip memory holds twice"
        if request.tokens * request.chosen > MOST_CHOICES:
            return f"{request.tokens * request.chosen} choices are more than scalar memory holds"
        return None

    def unfit(self, request: SparseRequest) -> str | None:
        """It is for few tokens, each of which fetches its own experts."""
        return for_few_tokens(request)

    def __call__(self, x: Array, experts: Experts, chosen: Array) -> Array:
        """`[N, D]`; the backward pass is that of `gather` or `mask`."""
        from .tpu_kernel import run

        compute = functools.partial(run, self.interpret)
        return with_portable_gradient(compute, x, experts.without_output_bias(), chosen)
