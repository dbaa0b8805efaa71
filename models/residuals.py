"""How a sublayer joins the residual stream: normalise before it or after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

Function = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class PreNorm:
    """`(x + f(norm(x))) / divisor`, and one more norm at the end of the stack (GPT-2, LLaMA).

    The divisor is 1 but in CPM-Bee, where it is 1.05.
    """

    final_norm: bool = True
    divisor: float = 1.0

    def __call__(self, x: jax.Array, norm: Function, sublayer: Function) -> jax.Array:
        """The residual stream after the sublayer."""
        x = x + sublayer(norm(x))
        return x if self.divisor == 1.0 else x / self.divisor


@dataclass(frozen=True)
class PostNorm:
    """`norm(x + f(x))` (Vaswani et al., 2017; GPT-1, BERT)."""

    final_norm: bool = False

    def __call__(self, x: jax.Array, norm: Function, sublayer: Function) -> jax.Array:
        """The residual stream after the sublayer."""
        return norm(x + sublayer(x))


@dataclass(frozen=True)
class NormedResidual:
    """`alpha y + f(y)` with `y = norm(x)`: the stream goes on from the norm's output (ChatGLM-6B)."""

    alpha: float = 1.0
    final_norm: bool = True

    def __call__(self, x: jax.Array, norm: Function, sublayer: Function) -> jax.Array:
        """The residual stream after the sublayer."""
        y = norm(x)
        return self.alpha * y + sublayer(y)


Residual = PreNorm | PostNorm | NormedResidual
