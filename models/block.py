"""One layer of a Transformer; `stack` has them one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import struct

from .cache import Store
from .config import TransformerConfig
from .hooks import Hook
from .kernels import Bias, Mask
from .tables import take_token


@struct.dataclass
class Context:
    """What every layer of a stack sees beside the residual stream.

    `mask` and `memory_mask` say who attends whom, `bias` is added to self-attention's scores,
    `positions` are `[B, T]`, `memory` `[B, S, D]` is what cross-attention reads, `slots` where these tokens
    stand in the cache.
    """

    mask: Mask
    positions: Any
    bias: Bias | None = None
    memory: jax.Array | None = None
    memory_mask: Mask | None = None
    slots: Store | None = None
    train: bool = struct.field(pytree_node=False, default=False)


class Stacked(nn.Module):
    """The body of a scan over layers."""

    def stacked(self, run: Callable[..., jax.Array], x: jax.Array, context: Context) -> jax.Array:
        """`run(self, x, context)`, which runs all layers of the stack: a method, there to be intercepted."""
        return run(self, x, context)


class Block(Stacked):
    """Self-attention, cross-attention where there is a memory, and a feed-forward layer.

    Hooks `middle` and `residual` see the stream after attention and at the end, `[B, T, D]`. With `read [B]`,
    one token of each row, the mlp and what follows get that token alone. Returns `(x, None)`, the carry and
    output of a scan's body, so that one class serves unrolled and scanned.
    """

    config: TransformerConfig
    index: int = 0
    cross: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, read: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        config = self.config
        attention, mlp = config.layer(self.index)
        if not config.lacks(self.index, "attention"):
            x = self._self_attention(attention.build(config), x, context)
        if self.cross:
            x = self._cross_attention(attention.build(config, cross=True), x, context)
        x = Hook(name="middle")(x)
        if read is not None:
            x = take_token(x, read)
        if not config.lacks(self.index, "mlp"):
            feed_forward = mlp.build(config)
            norm = self._norm("mlp_norm")
            x = config.residual(x, norm, lambda y: self._drop(feed_forward(y), context))
        return Hook(name="residual")(x), None

    def _self_attention(self, attend: nn.Module, x: jax.Array, context: Context) -> jax.Array:
        given = {"mask": context.mask, "bias": context.bias, "positions": context.positions}
        return self.config.residual(
            x,
            self._norm("attention_norm"),
            lambda y: self._drop(attend(y, **given, slots=context.slots), context),
        )

    def _cross_attention(self, attend: nn.Module, x: jax.Array, context: Context) -> jax.Array:
        given = {"mask": context.memory_mask, "memory": context.memory, "slots": context.slots}
        return self.config.residual(
            x, self._norm("cross_attention_norm"), lambda y: self._drop(attend(y, **given), context)
        )

    def _norm(self, name: str) -> nn.Module:
        return self.config.norm.build(self.config.precision, name)

    def _drop(self, x: jax.Array, context: Context) -> jax.Array:
        return nn.Dropout(self.config.dropout, deterministic=not context.train)(x)
