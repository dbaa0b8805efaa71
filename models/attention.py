"""The attention layer: projections around the kernels' `attention()`.

Multi-head, grouped-query and multi-query attention are one layer with G key/value heads for H query
heads (Ainslie et al., "GQA", 2023): G = H, 1 < G < H, G = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import flax.linen as nn
import jax

from .. import InputError
from .hooks import Hook
from .kernels import Bias, Mask, Window, attention

if TYPE_CHECKING:
    from .config import TransformerConfig


@dataclass(frozen=True)
class GroupedQuery:
    """H query heads, each group of H / G sharing one of G key/value heads.

    `kv_heads` 0 means H (multi-head), 1 is multi-query. `head_width` 0 means D / H. `window` limits
    each query to that many latest keys, itself included, and in an encoder to as many on its other side
    (0: no limit; cross-attention has none). `scale` 0 means 1 / sqrt(K).
    `soft_cap` c turns scores s into c tanh(s / c) (0: off). `implementation` names a kernel.
    """

    heads: int = 12
    kv_heads: int = 0
    head_width: int = 0
    window: int = 0
    bias: bool = True
    scale: float = 0.0
    soft_cap: float = 0.0
    implementation: str = "auto"

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise InputError(f"attention has heads={self.heads}; at least 1 is valid")
        for field in ("kv_heads", "head_width", "window"):
            if getattr(self, field) < 0:
                raise InputError(f"attention has {field}={getattr(self, field)}; at least 0 is valid")
        if self.heads % self.groups:
            raise InputError(f"attention has {self.heads} heads, which {self.groups} kv_heads do not divide")

    @property
    def groups(self) -> int:
        """G, the number of key/value heads."""
        return self.kv_heads or self.heads

    def width_of_head(self, model_width: int) -> int:
        """K; raises `InputError` where the heads do not divide the model width."""
        if not self.head_width and model_width % self.heads:
            raise InputError(f"width {model_width} is not a multiple of {self.heads} heads; set head_width")
        return self.head_width or model_width // self.heads

    def build(self, config: TransformerConfig, name: str = "attention") -> nn.Module:
        """The module, with children `query`, `key`, `value` and `output`."""
        return AttentionModule(config, self, name=name)


def multi_head(heads: int, **options: bool | int | float | str) -> GroupedQuery:
    """Attention with as many key/value heads as query heads."""
    return GroupedQuery(heads, heads, **options)  # type: ignore[arg-type]


def multi_query(heads: int, **options: bool | int | float | str) -> GroupedQuery:
    """Attention with one key/value head (Shazeer, "Fast Transformer Decoding", 2019)."""
    return GroupedQuery(heads, 1, **options)  # type: ignore[arg-type]


class AttentionModule(nn.Module):
    """Self-attention of `x [B, T, D]`, or attention from `x` to `memory [B, S, D]`.

    The hook `heads` sees each head's weighted values `[B, T, H, K]` before the output projection. The
    method `attend` is the core, there to be intercepted.
    """

    config: TransformerConfig
    choice: GroupedQuery

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        mask: Mask,
        bias: Bias | None = None,
        positions: jax.Array | None = None,
        memory: jax.Array | None = None,
    ) -> jax.Array:
        config, choice = self.config, self.choice
        source, width = (x if memory is None else memory), choice.width_of_head(config.width)
        query = self._project(x, "query", choice.heads, width)
        key = self._project(source, "key", choice.groups, width)
        value = self._project(source, "value", choice.groups, width)
        if memory is None and positions is not None:
            query = config.positions.rotate(query, positions)
            key = config.positions.rotate(key, positions)
        context = Hook(name="heads")(self.attend(query, key, value, mask, bias))
        flat = context.reshape(*context.shape[:2], choice.heads * width)
        return config.linear(config.width, choice.bias, name="output", residual=True)(flat)

    def _project(self, x: jax.Array, name: str, heads: int, width: int) -> jax.Array:
        y = self.config.linear(heads * width, self.choice.bias, name=name)(x)
        return y.reshape(*x.shape[:2], heads, width)

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, bias: Bias | None
    ) -> jax.Array:
        """Weighted values `[B, T, H, K]` of `query [B, T, H, K]`, `key` and `value` `[B, S, G, K]`."""
        choice = self.choice
        if choice.window:
            mask = mask & Window(left=choice.window - 1, right=choice.window - 1)
        return attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            scale=choice.scale or None,
            soft_cap=choice.soft_cap or None,
            impl=choice.implementation,
        )
