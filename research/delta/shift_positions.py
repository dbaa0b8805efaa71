"""Positions that start at n, as libraries count them that keep a prefix of n keys as past tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ... import InputError
from .bottleneck import require_positive
from .methods import Site, SiteMethod, Variables


@dataclass(frozen=True)
class ShiftPositions(SiteMethod):
    """The positions of our Transformer's tokens plus `by`; nothing is trained.

    PEFT gives a prefix as past keys, so its tokens stand after it: beside `Prefix(n)` this makes exchange
    exact where positions are absolute (GPT-2). In an encoder-decoder the decoder's. Address: the root, "".
    """

    by: int = 6

    name: ClassVar[str] = "shift_positions"
    positions: ClassVar[tuple[str, ...]] = ("",)

    def __post_init__(self) -> None:
        require_positive("ShiftPositions", by=self.by)

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """Nothing; raises `InputError` at another module than a whole Transformer of this library."""
        if not hasattr(getattr(site.module, "config", None), "positions") or site.path:
            raise InputError(
                f"{site.path or 'the root module'}: ShiftPositions acts at the root of a Transformer, at "
                f"the address '', not at {type(site.module).__name__}"
            )
        return {}

    def state(self, rng: jax.Array, site: Site, args: tuple, output: Any, trained: Variables) -> Variables:
        """`shift`, the number added."""
        return {"shift": jnp.asarray(self.by, jnp.int32)}

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The model's output at the shifted positions; raises `InputError` where there are too few."""
        side = "decoder_" if "decoder_tokens" in kwargs else ""
        tokens = kwargs[f"{side}tokens"] if side or not args else args[0]
        given, cache = kwargs.get(f"{side}positions"), kwargs.get("cache")
        if given is None and cache is not None:
            segments = kwargs.get(f"{side}segments")
            given = cache.next_positions(jnp.ones_like(tokens) if segments is None else segments)
        elif given is None:
            given = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        if not hasattr(given, "shape"):
            raise InputError("ShiftPositions adds to positions [B, T]; this model's are of another kind")
        site.module.config.positions.require(tokens.shape[-1] + self.by)
        return call(*args, **{**kwargs, f"{side}positions": given + variables["shift"]})
