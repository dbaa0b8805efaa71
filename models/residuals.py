"""How a sublayer joins the residual stream: normalise before it or after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

Function = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class PreNorm:
    """`x + f(norm(x))`, and one more norm at the end of the stack (GPT-2, LLaMA)."""

    final_norm: bool = True

    def __call__(self, x: jax.Array, norm: Function, sublayer: Function) -> jax.Array:
        """The residual stream after the sublayer."""
        return x + sublayer(norm(x))


@dataclass(frozen=True)
class PostNorm:
    """`norm(x + f(x))` (Vaswani et al., 2017; GPT-1, BERT)."""

    final_norm: bool = False

    def __call__(self, x: jax.Array, norm: Function, sublayer: Function) -> jax.Array:
        """The residual stream after the sublayer."""
        return norm(x + sublayer(x))


Residual = PreNorm | PostNorm
