"""What an attention is made of besides q, k and v: one tree that every implementation takes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .biases import Bias
from .dropout import Dropout
from .masks import Mask
from .spans import Span
from .trees import AnyArray, structural


@structural
class Terms:
    """The order is scale, bias, soft cap, mask, sink, softmax, dropout.

    `sinks [H]` are logits that join the softmax's sum and give no value: the weights of a row sum to less
    than 1, and the log-sum-exp includes the sink (Xiao et al. 2024, "Efficient streaming language models
    with attention sinks"; learned ones as in gpt-oss). Neither bias nor soft cap touches them. `scale` and
    `soft_cap` are static; everything else is a subtree.
    """

    mask: Mask
    bias: Bias | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    sinks: AnyArray | None = None
    dropout: Dropout | None = None

    def extended(self, queries: int, keys: int) -> "Terms":
        """With arrays padded to `queries` and `keys` positions, whatever is allowed there."""
        bias = None if self.bias is None else self.bias.extended(queries, keys)
        return dataclasses.replace(self, mask=self.mask.extended(queries, keys), bias=bias)

    def cut(self, rows: Span, columns: Span) -> "Terms":
        """The terms of these queries and keys alone, counted from 0, as an attention by themselves."""
        bias = None if self.bias is None else self.bias.cut(rows, columns)
        dropout = None if self.dropout is None else self.dropout.cut(rows, columns)
        return dataclasses.replace(self, mask=self.mask.cut(rows, columns), bias=bias, dropout=dropout)

    def cotangent(self, bias: Bias | None, sinks: Array | None) -> "Terms":
        """Gradients in the types of their arrays; integers, and dropout, have none."""
        none: dict[str, Any] = dict.fromkeys(("mask", "dropout"))
        return dataclasses.replace(self, bias=jax.tree.map(_like, bias, self.bias), sinks=sinks, **none)


def _like(gradient: Array, array: AnyArray) -> Array | np.ndarray:
    if jnp.issubdtype(array.dtype, jnp.floating):
        return gradient.astype(array.dtype)
    return np.zeros(array.shape, jax.dtypes.float0)
