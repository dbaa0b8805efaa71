"""Logits over words as the factors they are products of, for a loss that never holds all of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from .products import dense_product

# What the padded rows of a vocabulary score: no softmax notices them. Finite, so that their gradient is
# zero and not NaN in any loss.
MASKED_LOGIT = -1e9


@struct.dataclass
class WordScores:
    """Hidden states `[B, T, D]` and a vector for each word: `weights`, `[V, D]` or, `across`, `[D, V]`.

    The logits `[B, T, V]` are products in the hidden states' type, given in the type `output`, times
    `scale`, plus `bias` `[V]`; words from number `vocab` on pad the table and are masked.
    """

    hidden: jax.Array
    weights: jax.Array
    bias: jax.Array | None = None
    across: bool = struct.field(pytree_node=False, default=False)
    vocab: int = struct.field(pytree_node=False, default=0)
    scale: float = struct.field(pytree_node=False, default=1.0)
    output: str = struct.field(pytree_node=False, default="float32")

    @property
    def words(self) -> int:
        """V: the vocabulary with its padding."""
        return self.weights.shape[1 if self.across else 0]

    def product(self) -> jax.Array:
        """`[..., V]`, before scale, bias and mask."""
        dimensions = ((self.hidden.ndim - 1,), (0 if self.across else 1,)), ((), ())
        weights = self.weights.astype(self.hidden.dtype)
        return dense_product(self.hidden, weights, dimensions, preferred_element_type=jnp.dtype(self.output))

    def logits(self) -> jax.Array:
        """`[..., V]`."""
        logits = self.product()
        logits = logits * self.scale if self.scale != 1.0 else logits
        logits = logits if self.bias is None else logits + self.bias.astype(logits.dtype)
        return words_only(logits, self.vocab)


def words_only(logits: jax.Array, vocab: int, first: jax.Array | int = 0) -> jax.Array:
    """`logits [..., V]` of the words from number `first` on, with those beyond the vocabulary masked."""
    if isinstance(first, int) and first + logits.shape[-1] <= vocab:
        return logits
    return jnp.where(first + jnp.arange(logits.shape[-1]) < vocab, logits, MASKED_LOGIT)
