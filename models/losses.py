"""Losses and scores, summed over what counts: the caller divides by the summed weight.

Sums, not means, so that gradient accumulation and data parallelism weigh every token alike.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .precision import promote_statistics
from .word_scores import MASKED_LOGIT

__all__ = ["MASKED_LOGIT", "cross_entropy", "weighted_correct", "weighted_cross_entropy"]


def cross_entropy(logits: jax.Array, targets: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Negative log likelihood in nats, `[...]`, of `targets [...]` under `logits [..., V]`, in float32.

    `smoothing` mixes the target with the uniform distribution (Szegedy et al., 2016) over the logits
    that are not masked.

    Under a mesh that splits V nothing is gathered: maximum, sums and the target's logit are found in each
    part and combined, `[...]` numbers at a time.
    """
    wide = promote_statistics(logits)
    normaliser = jax.nn.logsumexp(wide, axis=-1)
    chosen = target_logit(wide, targets)[..., 0]
    loss = normaliser - chosen
    if smoothing:
        uniform = normaliser - wide.mean(-1, where=wide > MASKED_LOGIT / 2)
        loss = (1 - smoothing) * loss + smoothing * uniform
    return loss


def weighted_cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Summed weighted loss and summed weight, both scalars in float32."""
    loss = cross_entropy(logits, targets, smoothing)
    weights = weights.astype(loss.dtype)
    return (loss * weights).sum(), weights.sum()


def weighted_correct(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Summed weight of the rows whose largest logit is the target's; of equal ones the first counts."""
    # What `logits.argmax(-1) == targets` says, but a comparison vectorises on CPUs, where argmax does not.
    chosen = target_logit(logits, targets)
    after = jnp.arange(logits.shape[-1]) >= targets[..., None]
    best = ((logits < chosen) | ((logits == chosen) & after)).all(-1)
    return (best * weights).sum().astype(jnp.float32)


def target_logit(logits: jax.Array, targets: jax.Array, first: jax.Array | int = 0) -> jax.Array:
    """The targets' logits `[..., 1]`, of `logits [..., V]` of words from number `first` on; 0 if not there.

    By a comparison, not by an index: it is fused with what else is done to the logits, and split as they are.
    """
    hit = first + jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.where(hit, logits, 0).sum(-1, keepdims=True, dtype=logits.dtype)
