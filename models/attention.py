"""The attention layer: projections around the kernels' `attention()`.

Multi-head, grouped-query and multi-query attention are one layer with G key/value heads for H query
heads (Ainslie et al., "GQA", 2023): G = H, 1 < G < H, G = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import InputError
from .cache import COLLECTION, CROSS, Entries, Store
from .hooks import Hook
from .kernels import Bias, Joined, Mask, Window, attention, decode_attention

if TYPE_CHECKING:
    from .config import TransformerConfig


@dataclass(frozen=True)
class GroupedQuery:
    """H query heads, each group of H / G sharing one of G key/value heads.

    `kv_heads` 0 means H (multi-head), 1 is multi-query. `head_width` 0 means D / H. `window` limits
    each query to that many latest keys, itself included, and in an encoder to as many on its other side
    (0: no limit; cross-attention has none). `scale` 0 means 1 / sqrt(K).
    `soft_cap` c turns scores s into c tanh(s / c) (0: off). `bias` is that of the projections, `output_bias`
    of the last one where it differs. `query_key_norm` normalises each head's query and key before they are
    rotated (Qwen3). `implementation` names a kernel; a cache's own form of keys has a kernel of its own.
    """

    heads: int = 12
    kv_heads: int = 0
    head_width: int = 0
    window: int = 0
    bias: bool = True
    output_bias: bool | None = None
    scale: float = 0.0
    soft_cap: float = 0.0
    query_key_norm: bool = False
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

    @property
    def scores(self) -> dict[str, Any]:
        """What is done to the scores, as `attention` takes it."""
        return {"scale": self.scale or None, "soft_cap": self.soft_cap or None}

    def build(self, config: TransformerConfig, cross: bool = False) -> nn.Module:
        """`attention` or `cross_attention`, with children `query`, `key`, `value` and `output`."""
        return AttentionModule(config, self, cross, name=CROSS if cross else "attention")


def multi_head(heads: int, **options: bool | int | float | str) -> GroupedQuery:
    """Attention with as many key/value heads as query heads."""
    return GroupedQuery(heads, heads, **options)  # type: ignore[arg-type]


def multi_query(heads: int, **options: bool | int | float | str) -> GroupedQuery:
    """Attention with one key/value head (Shazeer, "Fast Transformer Decoding", 2019)."""
    return GroupedQuery(heads, 1, **options)  # type: ignore[arg-type]


class AttentionModule(nn.Module):
    """Self-attention of `x [B, T, D]`, or, where `cross`, attention to `memory [B, S, D]`.

    The hook `heads` sees each head's weighted values `[B, T, H, K]` before the output projection. The
    method `attend` is the core, there to be intercepted, and `compute` the kernel inside it, which
    `models.placement` intercepts: whatever changes `attend` is outside of what a mesh splits. With `slots`
    the layer keeps its keys and values in the collection `cache`; then cross-attention without a memory reads
    those it kept.
    """

    config: TransformerConfig
    choice: GroupedQuery
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        mask: Mask,
        bias: Bias | None = None,
        positions: Any = None,
        memory: jax.Array | None = None,
        slots: Store | None = None,
    ) -> jax.Array:
        config, choice = self.config, self.choice
        query = self._project(x, "query", choice.heads, positions)
        if self.cross:
            key, value = self._memory(memory, slots)
        else:
            key = self._project(x, "key", choice.groups, positions)
            value = self._project(x, "value", choice.groups)
            key, value = self._remember(key, value, slots)
            mask = self._windowed(mask, slots, x.shape[1] == key.shape[1])
        context = Hook(name="heads")(self.attend(query, key, value, mask, bias))
        flat = context.reshape(*context.shape[:2], -1)
        biased = choice.bias if choice.output_bias is None else choice.output_bias
        return config.linear(config.width, biased, name="output", residual=True)(flat)

    def _project(self, x: jax.Array, name: str, heads: int, positions: Any = None) -> jax.Array:
        width = self.choice.width_of_head(self.config.width)
        y = self.config.linear(heads * width, self.choice.bias, name=name)(x)
        y = y.reshape(*x.shape[:2], heads, width)
        if self.choice.query_key_norm and name != "value":
            y = self.config.norm.build(self.config.precision, f"{name}_norm")(y)
        return y if positions is None else self.config.positions.rotate(y, positions)

    def _memory(self, memory: jax.Array | None, slots: Store | None) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the memory, or those kept from the call that had it."""
        if memory is None:
            stored: Entries = self.get_variable(COLLECTION, "entries")
            return stored.read()
        key, value = (self._project(memory, name, self.choice.groups) for name in ("key", "value"))
        if slots is not None:
            self.put_variable(COLLECTION, "entries", slots.keep(key, value))
        return key, value

    def _remember(self, key: jax.Array, value: jax.Array, slots: Store | None) -> tuple[jax.Array, jax.Array]:
        """Keep the keys and values; return all that the queries look at."""
        if slots is None:
            return key, value
        stored: Entries | None = self.get_variable(COLLECTION, "entries")
        entries, key, value = slots.append(stored, key, value)
        self.put_variable(COLLECTION, "entries", entries)
        return key, value

    def _windowed(self, mask: Mask, slots: Store | None, own: bool) -> Mask:
        side = self.choice.window - 1
        if side < 0:
            return mask
        offset = 0 if slots is None or own else slots.start
        return mask & Window(left=side, right=side, offset=offset)

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: Mask,
        bias: Bias | None,
        return_lse: bool = False,
    ) -> Any:
        """Weighted values `[B, T, H, K]` of `query [B, T, H, K]`, `key` and `value` `[B, S, G, K]`.

        A cache may hand out keys and values in a form of its own, which is also taken for such an array.
        With `return_lse` also the scores' log-sum-exp `[B, H, T]`: who intercepts can weigh in more keys.
        """
        return self.compute(query, key, value, mask, bias, return_lse)

    def compute(
        self, query: jax.Array, key: Any, value: Any, mask: Mask, bias: Bias | None, return_lse: bool
    ) -> Any:
        """What `attend` returns, by whichever kernel is for these keys and values."""
        given: dict[str, Any] = {"mask": mask, "bias": bias, "return_lse": return_lse}
        if isinstance(key, Joined) and isinstance(value, Joined):
            return decode_attention(query, key, value, **given, **self.choice.scores)
        key, value = jnp.asarray(key), jnp.asarray(value)
        given |= {"impl": self.choice.implementation}
        return attention(query, key, value, **given, **self.choice.scores)
