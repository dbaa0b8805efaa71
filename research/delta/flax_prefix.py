"""Prefix tuning at Flax's own attention, Linen's and NNX's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ... import InputError
from .methods import Site, Variables
from .prefix import Prefix


@dataclass(frozen=True)
class FlaxPrefix(Prefix):
    """`Prefix` put in front of what the module's `attention_fn` is given.

    `G` is `num_heads`, on NNX `num_kv_heads`. The mask is padded where there is one, so any attention
    function serves that takes `mask`, and the module's normalised keys, dropout and cache (`decode=True`)
    stay what they are. Default position: modules of the name that Linen gives them.
    """

    name: ClassVar[str] = "flax_prefix"
    positions: ClassVar[tuple[str, ...]] = (r"re:MultiHead(DotProduct)?Attention_\d+",)
    at: ClassVar[str] = "__call__"

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """`key` and `value`, or the MLP that makes them; raises `InputError` at any other module."""
        module: Any = site.module
        if not _is_flax_attention(module):
            linen = isinstance(module, nn.Module)
            needed = "nn.MultiHeadDotProductAttention" if linen else "nnx.MultiHeadAttention"
            found = type(module).__name__
            raise InputError(f"{site.path or 'the root module'}: a FlaxPrefix needs an {needed}, not {found}")
        if "mask" not in inspect.signature(module.attention_fn).parameters:
            raise InputError(
                f"{site.path or 'the root module'}: a FlaxPrefix needs an attention_fn that takes mask="
            )
        heads = getattr(module, "num_kv_heads", module.num_heads)
        shape = heads, (module.qkv_features or args[0].shape[-1]) // module.num_heads
        return self.start(rng, shape, shape)

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The module's output with its attention function wrapped for the duration of the call."""
        module: Any = site.module
        key, value = self.keys_and_values(variables)
        attend = _with_prefix(module.attention_fn, key, value, variables["on"] > 0)
        with _replaced(module, attention_fn=attend):
            return call(*args, **kwargs)


def _is_flax_attention(module: Any) -> bool:
    """Whether it is Linen's, or NNX's, which is not imported for this."""
    if isinstance(module, nn.Module):
        return isinstance(module, nn.MultiHeadDotProductAttention)
    return all(
        hasattr(module, name) for name in ("attention_fn", "num_heads", "num_kv_heads", "qkv_features")
    )


def _with_prefix(attend: Callable, prefix_key: jax.Array, prefix_value: jax.Array, on: jax.Array) -> Callable:
    """`attend` with keys and values `[n, H, K]` in front of its own `[..., S, H, K]`, seen by all if `on`."""

    @functools.wraps(attend)  # Flax reads the signature to know what the function takes
    def attend_with_prefix(
        query: jax.Array, key: jax.Array, value: jax.Array, *args: Any, **kwargs: Any
    ) -> Any:
        length, own = prefix_key.shape[0], key.shape[-3]
        mask = kwargs.get("mask")
        if kwargs.pop("is_causal", False):  # NNX's; as a mask, for the prefix shifts the keys
            causal = jnp.tril(jnp.ones((query.shape[-3], own), bool))
            mask = causal[None] if mask is None else jnp.logical_and(mask, causal)
        mask = jnp.ones((1,) * (query.ndim - 1) + (own,), bool) if mask is None else mask.astype(bool)
        mask = jnp.broadcast_to(mask, (*mask.shape[:-1], own))  # it may say the same of all keys
        seen = jnp.broadcast_to(on, (*mask.shape[:-1], length))
        kwargs["mask"] = jnp.concatenate([seen, mask], -1)
        key, value = (_in_front(x, each) for x, each in ((key, prefix_key), (value, prefix_value)))
        return attend(query, key, value, *args, **kwargs)

    return attend_with_prefix


def _in_front(x: jax.Array, prefix: jax.Array) -> jax.Array:
    """`[..., n + S, H, K]` of `x [..., S, H, K]`."""
    prefix = jnp.broadcast_to(prefix.astype(x.dtype), (*x.shape[:-3], *prefix.shape))
    return jnp.concatenate([prefix, x], -3)


@contextmanager
def _replaced(module: Any, **fields: Any) -> Iterator[None]:
    """Fields of a module that is running, which is a copy and never the user's, for a while."""
    assert not isinstance(module, nn.Module) or module.scope is not None
    before = {name: getattr(module, name) for name in fields}
    try:
        for name, value in fields.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)
