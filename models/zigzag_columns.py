"""A causal language model whose columns lie in zigzag order over devices, and that does not know it.

Attention speaks of the order itself (`kernels.MeshAxes`). What else goes by where a token stands in its row
is put right here: positions that nobody gave, and the random numbers of dropout: those of one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import InputError
from ..parallel.zigzag import zigzag_order
from .heads import ClassifierHead, Pooler
from .transformer import EncoderDecoder, SingleStack


class ZigzagColumns:
    """What one trace of a model has to be told; `devices` share each row."""

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.length = 0

    def adapted(self, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        """A module's call with what it needs to know of the order; raises `InputError` where it cannot."""
        if isinstance(module, EncoderDecoder):
            raise InputError("zigzag order is for causal language models, not for an encoder-decoder")
        if isinstance(module, SingleStack):
            return lambda tokens, **inputs: call(tokens, **self._inputs(module, tokens, inputs))
        if isinstance(module, nn.Dropout) and not module.deterministic and module.rate:
            return lambda x: self._dropped(module.rate, call, x)
        return call

    def require(self, length: int) -> None:
        """Raise `InputError` for attention of another length: rows that a prompt has made longer, say."""
        if length != self.length:
            raise InputError(
                f"attention is of {length} tokens in a row of {self.length} columns in zigzag order; "
                f'what changes the length of rows needs Layout(order="contiguous")'
            )

    def _inputs(self, module: SingleStack, tokens: jax.Array, inputs: dict[str, Any]) -> dict[str, Any]:
        other = module.config.kind != "decoder" or isinstance(module.head, ClassifierHead | Pooler)
        if other or inputs.get("cache") is not None or inputs.get("last"):
            raise InputError(
                "zigzag order is for causal language models on whole rows: a last or first token is not "
                'where it was, and an encoder gains nothing; use Layout(order="contiguous")'
            )
        self.length = tokens.shape[1]
        if inputs.get("positions") is not None:
            return inputs
        order = jnp.asarray(zigzag_order(self.length, self.devices))
        return {**inputs, "positions": jnp.broadcast_to(order, tokens.shape)}

    def _dropped(self, rate: float, call: Callable[..., Any], x: jax.Array) -> jax.Array:
        """`x [B, T, D]` with what the natural order would lose: a mask is drawn in it, and then laid."""
        if x.shape[1] != self.length:
            return call(x)
        keep = call(jnp.ones(x.shape, x.dtype)) > 0
        chunks = keep.reshape(x.shape[0], 2, self.devices, -1, x.shape[2])
        keep = jnp.stack([chunks[:, 0], jnp.flip(chunks[:, 1], 1)], axis=2).reshape(x.shape)
        return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
