"""What Pallas's Mosaic GPU calls by different names in the versions of JAX that we support."""

from __future__ import annotations

import inspect
from typing import Any

from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

_LOAD_TAKES_INDEX = "idx" in inspect.signature(plgpu.load).parameters  # up to JAX 0.10


def load(ref: Any, layout: Any, optimized: bool = True) -> Array:
    """The whole of a reference in shared or device memory, brought to registers in `layout`."""
    index = ((),) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)
