"""What the Hopper kernels are compiled for: sizes after padding, terms known at trace time, tile sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from .operations import Warpgroup

LOG2_E = math.log2(math.e)
CONSUMERS = 2  # warpgroups that compute; one more copies
# registers a thread after the launch's even shares are given back: 2 * 240 + 24 = 3 * 168
REGISTERS_TO_COMPUTE, REGISTERS_TO_COPY = 240, 24


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes: a warpgroup's `queries` by `keys`, in a ring of `stages` buffers.

    In the kernels that hold queries (forward, dq) a block has `CONSUMERS * queries` of them and goes over
    the keys; in the one that holds keys (dk, dv) it has `CONSUMERS * keys` of them.
    """

    queries: int
    keys: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """One attention; lengths are multiples of what every kernel steps by, `width` of 64."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    dtype: Any
    scale: float
    soft_cap: float | None
    operations: Warpgroup
    rate: float = 0.0  # of dropout

    @property
    def kept(self) -> float:
        """What dropout multiplies by the weights that stay."""
        return 1 / (1 - self.rate)

    @property
    def group(self) -> int:
        """Heads that share one key/value head."""
        return self.heads // self.kv_heads


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """A buffer in shared memory as wgmma and the copy engine want it: rows of 128 bytes, swizzled."""
    transforms = (plgpu.TilingTransform((8, 128 // dtype.itemsize)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
