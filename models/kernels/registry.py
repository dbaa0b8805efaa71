"""Which implementation computes a request: the first that can and has no reason to leave it to another."""

import functools
import logging
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from ... import InputError
from .chunked import Chunked
from .cudnn import CuDNN
from .hopper import Hopper
from .reference import Reference
from .request import Implementation, Request
from .tpu import Tpu
from .whole import Whole


class Choosable(Protocol):
    """What a choice asks of a candidate: see `Implementation`, whose methods these are."""

    @property
    def name(self) -> str:
        """What `impl=` calls it."""

    def supports(self, request: Any) -> str | None:
        """None, or the reason why it cannot compute the request."""

    def unfit(self, request: Any) -> str | None:
        """None, or the reason to look for another one."""


Candidate = TypeVar("Candidate", bound=Choosable)
logger = logging.getLogger("modicum.kernels")

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Whole(),
    Tpu(),
    Hopper(),
    Hopper("hopper_fused", deterministic=False),  # by name only
    Chunked(),
    Reference(),
    CuDNN(),
)


def implementations() -> tuple[Implementation, ...]:
    """All implementations, the preferred first."""
    return IMPLEMENTATIONS


@functools.lru_cache(maxsize=1024)
def choose(request: Request, impl: str) -> Implementation:
    """The implementation named `impl`, or for "auto" the first that supports and fits the request.

    Logs the choice to `modicum.kernels`; the cache makes that once a request, however many layers make it.
    Raises InputError for an unknown name and for a forced implementation that cannot do the request.
    """
    return pick(IMPLEMENTATIONS, request, impl)


def pick(candidates: Sequence[Candidate], request: Any, impl: str, what: str = "attention") -> Candidate:
    """The choice of `choose` among any candidates, the preferred first; `what` is computed."""
    by_name = {implementation.name: implementation for implementation in candidates}
    if impl != "auto":
        if impl not in by_name:
            raise InputError(f"impl={impl!r} is unknown; valid are auto, {', '.join(by_name)}")
        if reason := by_name[impl].supports(request):
            raise InputError(f"impl={impl!r} cannot compute this {what}: {reason} ({request})")
        logger.info("%s %s: %s, as asked for", what, request, impl)
        return by_name[impl]
    reasons: list[str] = []
    for implementation in candidates:
        reason = implementation.supports(request) or implementation.unfit(request)
        if reason is None:
            told = "".join(f"; {reason}" for reason in reasons)
            logger.info("%s %s: %s%s", what, request, implementation.name, told)
            return implementation
        reasons.append(f"not {implementation.name}: {reason}")
    raise InputError(f"no implementation computes this {what} ({request}): {'; '.join(reasons)}")
