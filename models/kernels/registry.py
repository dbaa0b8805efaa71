"""Which implementation computes a request: the first that can and has no reason to leave it to another."""

import functools
import logging
from collections.abc import Sequence
from typing import Protocol, TypeVar

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

    def supports(self, request: Request) -> str | None:
        """None, or the reason why it cannot compute the request."""

    def unfit(self, request: Request) -> str | None:
        """None, or the reason to look for another one."""


Candidate = TypeVar("Candidate", bound=Choosable)
logger = logging.getLogger("modicum.kernels")

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Whole(),
    Tpu(),
    Hopper(),
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


def pick(candidates: Sequence[Candidate], request: Request, impl: str) -> Candidate:
    """The choice of `choose` among any candidates, the preferred first."""
    by_name = {implementation.name: implementation for implementation in candidates}
    if impl != "auto":
        if impl not in by_name:
            raise InputError(f"impl={impl!r} is unknown; valid are auto, {', '.join(by_name)}")
        if reason := by_name[impl].supports(request):
            raise InputError(f"impl={impl!r} cannot compute this attention: {reason} ({request})")
        logger.info("attention %s: %s, as asked for", request, impl)
        return by_name[impl]
    reasons: list[str] = []
    for implementation in candidates:
        reason = implementation.supports(request) or implementation.unfit(request)
        if reason is None:
            logger.info(
                "attention %s: %s%s", request, implementation.name, "".join(f"; {r}" for r in reasons)
            )
            return implementation
        reasons.append(f"not {implementation.name}: {reason}")
    raise InputError(f"no implementation computes this attention ({request}): {'; '.join(reasons)}")
