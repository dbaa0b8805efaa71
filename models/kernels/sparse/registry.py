"""Which implementation computes a sparse feed-forward layer: the first that can and has no reason not to."""

from __future__ import annotations

import functools

from ..registry import pick
from .gather import Gather
from .hopper import SparseHopper
from .mask import Mask
from .native import Native
from .request import SparseImplementation, SparseRequest
from .steps import Steps
from .tpu import SparseTpu

IMPLEMENTATIONS: tuple[SparseImplementation, ...] = (
    SparseTpu(),
    SparseHopper(),
    Native(),
    Gather(),
    Mask(),
    Steps(),
)


def implementations() -> tuple[SparseImplementation, ...]:
    """All implementations, the preferred first."""
    return IMPLEMENTATIONS


@functools.lru_cache(maxsize=1024)
def choose(request: SparseRequest, impl: str) -> SparseImplementation:
    """The implementation named `impl`, or for "auto" the first that supports and fits the request.

    Logs the choice to `modicum.kernels`, once a request. Raises `InputError` for an unknown name and for a
    forced implementation that cannot do the request.
    """
    return pick(IMPLEMENTATIONS, request, impl, what="sparse feed-forward layer")
