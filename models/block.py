"""One layer of a Transformer, and a stack of them, unrolled or scanned."""

from __future__ import annotations

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


class Block(nn.Module):
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


class Period(nn.Module):
    """The layers of one period of the pattern, as the body of a scan."""

    config: TransformerConfig
    cross: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, None]:
        for index in range(self.config.period):
            x, _ = Block(self.config, index, self.cross, name=f"layer_{index}")(x, context)
        return x, None


def apply_layers(
    config: TransformerConfig,
    x: jax.Array,
    context: Context,
    cross: bool = False,
    read: jax.Array | None = None,
) -> jax.Array:
    """Run the stack inside the calling module's compact method.

    Unrolled, the layers are its children `layers_0`, `layers_1`, ...; scanned, they are one child
    `layers` whose parameters have a leading axis over layers (over periods, with the layers of a period
    called `layer_0`, ..., where the configuration has a pattern). `read [B]`: of the unrolled stack's output
    only these tokens are needed, `[B, 1, D]`.
    """
    if config.scan:
        return _scanned(config, cross)(x, context)[0]
    block = _remat(Block, config)
    layers = config.depth_of_decoder if cross else config.layers
    for index in range(layers):
        needed = read if index == layers - 1 else None
        x, _ = block(config, index % config.period, cross, name=f"layers_{index}")(x, context, needed)
    return x


def _scanned(config: TransformerConfig, cross: bool) -> Any:
    body = Block if config.period == 1 else Period
    scan = nn.scan(
        _remat(body, config),
        variable_axes={True: 0},  # parameters, the cache, and whatever hooks sow
        split_rngs={True: True},
        in_axes=nn.broadcast,
        length=(config.depth_of_decoder if cross else config.layers) // config.period,
    )
    return scan(config, cross=cross, name="layers")


def _remat(module: type[nn.Module], config: TransformerConfig) -> Any:
    if config.remat == "none":
        return module
    policy = jax.checkpoint_policies.dots_saveable if config.remat == "dots" else None
    return nn.remat(module, policy=policy, prevent_cse=not config.scan)
