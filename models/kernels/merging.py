"""Attention on two sets of keys from attention on each: the log-sum-exp says how much each weighs."""

import jax.numpy as jnp
from jax import Array, lax

from .trees import AnyArray


def merge(out: Array, lse: Array, out2: Array, lse2: Array) -> tuple[Array, Array]:
    """Output `[B, T, H, K]` and log-sum-exp `[B, H, T]` on all keys from those on two disjoint sets.

    The results have the wider of the types. Differentiable in everything; where no key is seen on either
    side it stays output 0, lse -inf, and no gradient (Liu et al. 2023, "Ring attention", appendix A).
    """
    top = lax.stop_gradient(jnp.maximum(lse, lse2))
    top = jnp.where(top == -jnp.inf, 0, top)
    weight, weight2 = jnp.exp(lse - top), jnp.exp(lse2 - top)
    total = weight + weight2
    empty = total == 0
    total = jnp.where(empty, 1, total)
    merged = out * _by_row(weight / total) + out2 * _by_row(weight2 / total)
    return merged, jnp.where(empty, -jnp.inf, top + jnp.log(total))


def merge_sinks(out: Array, lse: Array, sinks: AnyArray) -> tuple[Array, Array]:
    """One more key a head, of logit `sinks [H]` and value 0, as if it had been there from the start."""
    sink = jnp.broadcast_to(sinks.astype(lse.dtype)[:, None], lse.shape)
    return merge(out, lse, jnp.zeros_like(out), sink)


def sinks_gradient(sinks: AnyArray, lse: Array, delta: Array) -> Array:
    """What log-sum-exp and `delta = sum(out * d_out) - d_lse`, `[B, H, T]`, say of logits without values."""
    norm = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    weights = jnp.exp(sinks.astype(lse.dtype)[:, None] - norm)
    return -(weights * delta).sum((0, 2)).astype(sinks.dtype)


def _by_row(weight: Array) -> Array:
    """`[B, H, T]` as `[B, T, H, 1]`."""
    return jnp.swapaxes(weight, 1, 2)[..., None]
