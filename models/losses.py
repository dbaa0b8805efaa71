"""Losses and scores, summed over what counts: the caller divides by the summed weight.

Sums, not means, so that gradient accumulation and data parallelism weigh every token alike.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .precision import promote_statistics

# What the padded rows of a vocabulary score: no softmax notices them. Finite, so that their gradient is
# zero and not NaN in any loss.
MASKED_LOGIT = -1e9


def cross_entropy(logits: jax.Array, targets: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Negative log likelihood in nats, `[...]`, of `targets [...]` under `logits [..., V]`, in float32.

    `smoothing` mixes the target with the uniform distribution (Szegedy et al., 2016) over the logits
    that are not masked.
    """
    wide = promote_statistics(logits)
    normaliser = jax.nn.logsumexp(wide, axis=-1)
    chosen = jnp.take_along_axis(wide, targets[..., None], axis=-1)[..., 0]
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
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    after = jnp.arange(logits.shape[-1]) >= targets[..., None]
    best = ((logits < chosen) | ((logits == chosen) & after)).all(-1)
    return (best * weights).sum().astype(jnp.float32)
