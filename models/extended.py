"""Logits over the vocabulary and over further words of one batch (CPM-Bee's extended table)."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from .. import InputError
from .config import TransformerConfig
from .heads import LanguageModelHead, word_scores
from .products import dense_product
from .relations import TreeRelations
from .word_scores import words_only


@struct.dataclass
class ExtraWords:
    """Words without a row of their own: row `words[n]` of the table, turned as number `sub[n]` of its name.

    Both are int `[N]`; word n of them has the logit `vocab + n` of every row of the batch.
    """

    words: jax.Array
    sub: jax.Array


@dataclass(frozen=True)
class ExtendedHead(LanguageModelHead):
    """Logits `[B, T, V + N]`: those of the vocabulary, then those of N `ExtraWords`, if given.

    An extra word is scored by its input vector, scaled as the inputs are; the vocabulary's logits have
    `logit_scale` (OpenBMB/CPM-Bee, `EmbeddingExt.projection`).
    """

    def build(self, config: TransformerConfig, deferred: bool = False) -> nn.Module:
        """The module; raises `InputError` for a model whose words are not turned, or that is not tied."""
        if not isinstance(config.positions, TreeRelations) or not config.tied or config.embedding_width:
            raise InputError(
                "an extended head needs positions=TreeRelations, tied=True and embedding_width=0"
            )
        if deferred:
            raise InputError("an extended head has words of each batch; its logits cannot be deferred")
        return ExtendedHeadModule(config, config.positions, name="head")


class ExtendedHeadModule(nn.Module):
    """Scores words, and extra words."""

    config: TransformerConfig
    positions: TreeRelations

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        segments: jax.Array | None,
        table: jax.Array,
        extra: ExtraWords | None = None,
    ) -> jax.Array:
        config = self.config
        logits = word_scores(self, config, hidden, table).product() * config.logit_scale
        if extra is None:
            return words_only(logits, config.vocab)
        scale = config.embedding_scale or config.width**0.5
        vectors = self.positions.turn(jnp.take(table, extra.words, axis=0).astype(hidden.dtype), extra.sub)
        dimensions = ((hidden.ndim - 1,), (1,)), ((), ())
        more = dense_product(hidden, vectors * scale, dimensions, preferred_element_type=logits.dtype)
        return jnp.concatenate([logits[..., : config.vocab], more], -1)
